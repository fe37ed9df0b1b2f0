"""The LLaDA transformer: a Llama without the causal mask; log-probs, LoRA, folders of weights.

Names of modules are those of the published checkpoint (GSAI-ML/LLaDA-8B-Instruct), so that loading
it is a prefix strip and a strict comparison; Qwen3's go through a table. The network maps token
ids, some of them the mask, to logits at every position (LLaDA, arXiv 2502.09992, section 2).
"""
import contextlib
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2 ** 25       # of token_logps: 128 MB in float32


@dataclass
class Config:
    """What shapes the network."""
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 4
    n_layers: int = 3
    mlp_hidden_size: int = 384
    embedding_size: int = 1024          # V
    max_sequence_length: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    mask_id: int = 1
    eos_id: int = 0
    end_ids: tuple = ()                 # all ids that end a completion: eos, the chat's end of turn
    head_dim: int = 0                   # hs; 0 = d_model / n_heads
    qk_norm: bool = False               # RMSNorm of queries and keys per head (Qwen3)
    weight_tying: bool = False          # the LM head is the embedding
    layout: str = 'llada'               # or 'qwen3': names of tensors and of config.json's keys
    file_keys: dict = field(default_factory=dict)       # all of config.json, to be written again

    def __post_init__(self):
        self.end_ids = self.end_ids or (self.eos_id,)
        self.head_dim = self.head_dim or self.d_model // self.n_heads


class RMSNorm(nn.RMSNorm):
    def forward(self, x):               # in float32: squares overflow in half precision
        y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight.to(x.dtype) * y.to(x.dtype)


class Linear(nn.Linear):
    """y = W x, and + scale B A x for each adapter that add_lora or load_adapter has appended."""

    def __init__(self, in_size, out_size):
        super().__init__(in_size, out_size, bias=False)
        self.adapters = nn.ModuleList()

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype))                 # see LLaDA.compute_dtype
        for adapter in self.adapters:
            if adapter.on:
                h = F.linear(x, adapter.A.to(x.dtype))           # (..., r)
                y = y + adapter.scale * F.linear(h, adapter.B.to(x.dtype))
        return y


class Adapter(nn.Module):
    """A (r, in) and B (out, r), in float32 whatever W is, and the scale of B A."""

    def __init__(self, A, B, scale):
        super().__init__()
        self.A = nn.Parameter(A.float())
        self.B = nn.Parameter(B.float())
        self.scale = scale
        self.on = True


def rope_table(positions, size, theta):
    """positions (T,) -> cos and sin (1, T, 2 x size), float32; each pair (i, i + size/2) turns."""
    pairs = torch.arange(0, size, 2, device=positions.device)
    speeds = theta ** (-pairs / size)                            # radians per position
    angles = torch.outer(positions.float(), speeds).repeat(1, 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)[None]


def rotate(x, rope):
    """x (B, nh, n, hs) turned by its positions' angles, rope (B or 1, n, 2 hs), in float32."""
    cos, sin = rope.unsqueeze(1).chunk(2, dim=-1)                # (B or 1, 1, n, hs)
    a, b = x.float().chunk(2, dim=-1)
    quarter_turn = torch.cat((-b, a), dim=-1)
    return (x * cos + quarter_turn * sin).to(x.dtype)


def at_positions(x, positions):
    """x (B or 1, T, d) at positions (B, n) -> (B, n, d)."""
    index = positions.unsqueeze(-1).expand(-1, -1, x.size(-1))               # (B, n, d)
    # not take_along_dim, which torch.compile compiles anew for every size
    return x.expand(len(index), -1, -1).gather(1, index)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_size = c.head_dim
        d = c.d_model
        q_size = c.head_dim * c.n_heads
        kv_size = c.head_dim * c.n_kv_heads
        self.attn_norm = RMSNorm(d, c.rms_norm_eps)
        self.q_proj = Linear(d, q_size)
        self.k_proj = Linear(d, kv_size)
        self.v_proj = Linear(d, kv_size)
        self.attn_out = Linear(q_size, d)
        norm = RMSNorm if c.qk_norm else nn.Identity             # Identity ignores its arguments
        self.q_norm = norm(c.head_dim, c.rms_norm_eps)
        self.k_norm = norm(c.head_dim, c.rms_norm_eps)
        self.ff_norm = RMSNorm(d, c.rms_norm_eps)
        self.ff_proj = Linear(d, c.mlp_hidden_size)
        self.up_proj = Linear(d, c.mlp_hidden_size)
        self.ff_out = Linear(c.mlp_hidden_size, d)

    def forward(self, x, rope, mask=None, positions=None, cache=None, start=0):
        """x (B, T, d) -> (B, T, d), or only positions (B, n) of it: (B, n, d).

        cache: the layer's keys and values (2, B, nkv, all, hs); x renews those from `start` on.
        """
        h = self.attn_norm(x)
        k = rotate(self.k_norm(self.heads(self.k_proj(h))), rope)            # (B, nkv, T, hs)
        v = self.heads(self.v_proj(h))
        if cache is not None:
            renewed = cache.narrow(3, start, k.size(2))
            renewed[0] = k
            renewed[1] = v
            k, v = cache                                                     # (B, nkv, all, hs)
        if positions is not None:       # keys come from everywhere, queries from where we are asked
            x = at_positions(x, positions)
            h = at_positions(h, positions)
            rope = at_positions(rope, positions)
        q = rotate(self.q_norm(self.heads(self.q_proj(h))), rope)            # (B, nh, n, hs)
        if q.size(1) > k.size(1):       # several queries share a key (GQA)
            # not enable_gqa, which has no fused kernel for float32 or masks on a GPU
            repeats = q.size(1) // k.size(1)
            k = k.repeat_interleave(repeats, dim=1)
            v = v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)          # (B, nh, n, hs)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def heads(self, y):
        return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)         # (B, nh, T, hs)


class LLaDA(nn.Module):
    """The network of LLaDA, and of Qwen3 without its causal mask."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.compute_dtype = None       # to compute in, whatever the weights are; None = as those
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = Linear(config.d_model, config.embedding_size)
        if config.weight_tying:
            self.ff_out.weight = self.wte.weight

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids, attention_mask=None, positions=None, cache=None, start=0):
        """Logits (B, T, V) of ids (B, T) int64, or (B, n, V) at positions (B, n) only.

        attention_mask (B, T): True or 1 = real token; None = all are.
        cache: ids stand at start.. of the sequence, their keys and values are written into it, and
        attention goes to all that it holds: with one, attention_mask is as long as the cache.
        """
        return self.ff_out(self.hidden(ids, attention_mask, positions, cache, start))

    def hidden(self, ids, attention_mask=None, positions=None, cache=None, start=0):
        """The normed hidden states (B, n, d) under the LM head; arguments as above."""
        x = self.wte(ids).to(self.compute_dtype)                             # (B, T, d)
        places = torch.arange(start, start + ids.size(1), device=ids.device)
        rope = rope_table(places, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]                   # (B, 1, 1, all keys)
        for block, kv in zip(self.blocks, cache or [None] * len(self.blocks)):
            # only the last layer may leave positions out: the others' keys come from all of them
            wanted = positions if block is self.blocks[-1] else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, rope, mask, wanted, kv, start)
        return self.ln_f(x)

    def new_cache(self, B, T):
        """Room for the keys and values of T positions: per layer (2, B, nkv, T, hs)."""
        shape = (2, B, self.config.n_kv_heads, T, self.config.head_dim)
        return [self.wte.weight.new_zeros(shape, dtype=self.compute_dtype) for _ in self.blocks]

    def token_logps(self, ids, targets, scored, attention_mask=None):
        """log p(targets) (B, L) float32, targets (B, L) standing at the last L positions of ids.

        scored (B, L) bool: the LM head sees only these, the others get 0.
        The logits of some tokens exist at a time and are made again in the backward pass: memory
        does not grow with B x L x V.
        """
        B, L = targets.shape
        T = ids.size(1)
        positions = torch.arange(T - L, T, device=ids.device).expand(B, L)
        h = self.hidden(ids, attention_mask, positions)                      # (B, L, d)
        at_once = LOGITS_AT_ONCE // self.config.embedding_size               # tokens
        chunks = zip(h[scored].split(at_once), targets[scored].split(at_once))
        parts = [checkpoint(self.head_logps, *chunk, use_reentrant=False) for chunk in chunks]
        logps = torch.zeros(B, L, device=ids.device)
        logps[scored] = torch.cat(parts)
        return logps

    def head_logps(self, h, targets):
        """h (n, d), targets (n,) -> their log-probs (n,) float32."""
        logits = self.ff_out(h).float()
        return -F.cross_entropy(logits, targets, reduction='none')

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, dtype=torch.float32, device='cpu'):
        """The model of a folder in the Hugging Face layout, or of a hub id.

        Raises ValueError, in one line, on a tensor or shard that is missing, extra or misshapen.
        """
        folder = fetch(folder_or_hub_id)
        config = read_config(folder)
        weights = {}
        for name in weight_files(folder):
            weights |= read_weights(folder, name)
        if 'lm_head.weight' in weights:
            config.weight_tying = False              # whatever config.json says of it
        with torch.device('meta'):
            model = cls(config)
        ours = {file_name(config, name): name for name, _ in model.named_parameters()}
        weights = {ours.get(name, name): tensor for name, tensor in weights.items()}
        if config.weight_tying:
            weights['ff_out.weight'] = weights.get('wte.weight')
        with explained(f'{folder}: weights and config.json do not fit; is the download complete?'):
            model.load_state_dict(weights, assign=True)
        if config.weight_tying:
            model.ff_out.weight = model.wte.weight   # one parameter, also when it is trained
        return model.to(device, dtype)

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Writes config.json and the weights, adapters merged into them; the model stays as it is.

        They are written in the dtype that the model computes in. OSError where the disk is full.
        """
        from huggingface_hub import save_torch_state_dict
        Path(folder).mkdir(parents=True, exist_ok=True)
        dtype = self.compute_dtype or self.wte.weight.dtype
        weights = {}
        for name, tensor in self.named_parameters():             # a tied head only once
            if '.adapters.' in name:
                continue
            layer = self.get_submodule(name.removesuffix('.weight'))
            for adapter in getattr(layer, 'adapters', []):
                tensor = tensor + adapter.scale * adapter.B @ adapter.A      # float32, as B A is
            weights[file_name(self.config, name)] = tensor.to('cpu', dtype)
        with explained(f'{folder} cannot be written', OSError):
            save_torch_state_dict(weights, folder)
        keys = config_keys(self.config, dtype)
        Path(folder, 'config.json').write_text(json.dumps(keys, indent=2))


# ---- LoRA (arXiv 2106.09685): y = W x + alpha/r B A x, with W frozen ----
# Adapters stay beside W while a run goes on: an update added to bfloat16 weights is rounded away.

LORA_LAYERS = 'q_proj k_proj v_proj attn_out ff_proj up_proj ff_out'.split()     # of a block


def add_lora(model, rank=128, alpha=64, targets=('q_proj', 'k_proj', 'v_proj'), seed=0):
    """Freezes all that is there and appends an adapter to the layers `targets` of every block.

    Its tensors are the parameters blocks.I.TARGET.adapters.N.A and .B.
    """
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for target in targets:
            layer = getattr(block, target)
            bound = 1 / math.sqrt(layer.in_features)
            A = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=g)
            B = torch.zeros(layer.out_features, rank)            # the first output is W x
            layer.adapters.append(Adapter(A, B, alpha / rank).to(model.device))
    return model


@contextlib.contextmanager
def last_adapter_off(model):
    """Inside, the model is the one without the adapter in training: the reference policy.

    A model of which no adapter is trained, such as a frozen copy, stays as it is.
    """
    trained = [module for module in model.modules()
               if isinstance(module, Adapter) and module.A.requires_grad]       # the last one's
    for adapter in trained:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in trained:
            adapter.on = True


def linear_layers(model):
    """{path of a layer in the published model, as peft names it: Linear}, without a tied head."""
    return {file_name(model.config, name): layer for name, layer in model.named_modules()
            if isinstance(layer, Linear) and layer.weight is not model.wte.weight}


@torch.no_grad()
def save_adapter(folder, model, base_name):
    """Writes all adapters as one, as peft reads it; base_name: where it finds their model.

    Those of a layer stand side by side: s B A x + t D C x = [sB tD] [A; C] x, at scale 1.
    OSError where the disk is full.
    """
    tensors, ranks = {}, {}
    for path, layer in linear_layers(model).items():
        if layer.adapters:
            A = torch.cat([adapter.A for adapter in layer.adapters])                     # (r, in)
            B = torch.cat([adapter.scale * adapter.B for adapter in layer.adapters], 1)  # (out, r)
            tensors[f'base_model.model.{path}.lora_A.weight'] = A.cpu()
            tensors[f'base_model.model.{path}.lora_B.weight'] = B.cpu()
            ranks[path] = len(A)
    rank = max(ranks.values())
    others = {path: r for path, r in ranks.items() if r != rank}
    config = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base_name,
                  target_modules=list(ranks), r=rank, lora_alpha=rank,
                  rank_pattern=others, alpha_pattern=others)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with explained(f'{folder} cannot be written', OSError):
        save_file(tensors, Path(folder, 'adapter_model.safetensors'))
    Path(folder, 'adapter_config.json').write_text(json.dumps(config, indent=2))


# What adapter_config.json may say, spelled as there; other values are adapters of another kind. A
# key that is missing has the first value. Of the ways to begin, pissa, olora, corda, loftq and
# lora_ga change W.
PLAIN_LORA = json.loads('''{
    "peft_type": ["LORA"], "bias": ["none"], "lora_bias": [false], "fan_in_fan_out": [false],
    "init_lora_weights": [true, false, null, "gaussian", "eva", "orthogonal", "mica"],
    "use_dora": [false], "use_qalora": [false], "use_bdlora": [null, false],
    "alora_invocation_tokens": [null], "arrow_config": [null], "kasa_config": [null],
    "monteclora_config": [null], "modules_to_save": [null, []], "layer_replication": [null, []],
    "target_parameters": [null, []], "trainable_token_indices": [null, []]}''')


def load_adapter(folder, model):
    """Appends an adapter in peft's layout, frozen. All is checked before the model changes.

    Raises ValueError when it is another kind of adapter, or one of another model.
    """
    config = read_json(folder, 'adapter_config.json')
    refuse_others(folder, config, PLAIN_LORA)
    tensors = read_weights(folder, 'adapter_model.safetensors')
    layers = linear_layers(model)
    paths = [path for path in layers if f'base_model.model.{path}.lora_A.weight' in tensors]
    adapters = {}
    for path in paths:
        A = tensors.pop(f'base_model.model.{path}.lora_A.weight')
        B = tensors.pop(f'base_model.model.{path}.lora_B.weight', torch.empty(0))
        rank = pattern_value(config, 'rank_pattern', path, config.get('r', 8))
        alpha = pattern_value(config, 'alpha_pattern', path, config.get('lora_alpha', 8))
        out_size, in_size = layers[path].weight.shape
        if A.shape != (rank, in_size) or B.shape != (out_size, rank):
            raise ValueError(f'{folder} is an adapter of another model or rank: look at {path}')
        scale = alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)
        adapters[path] = Adapter(A, B, scale).requires_grad_(False)
    if tensors or not adapters:
        first = min(tensors, default='no tensor')
        raise ValueError(f'{folder} is an adapter of another model or kind: it has {first}')
    for path, adapter in adapters.items():
        layers[path].adapters.append(adapter.to(model.device))


def pattern_value(config, key, path, default):
    """What config[key] says of a layer, else the default, as peft reads it.

    Its patterns are regular expressions for a path or for its end, from a dot on; the first that
    fits counts.
    """
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf'(.*\.)?({pattern})', path):
            return value
    return default


# ---- folders ----

def pairs(text):
    """Lines of ours=theirs as a dict."""
    return dict(pair.split('=') for pair in text.split())


PREFIX = 'model.transformer.'            # in front of every tensor's name in LLaDA's files
QWEN3_NAMES = pairs('''
    wte=embed_tokens ln_f=norm blocks=layers attn_norm=input_layernorm
    ff_norm=post_attention_layernorm q_proj=self_attn.q_proj k_proj=self_attn.k_proj
    v_proj=self_attn.v_proj attn_out=self_attn.o_proj q_norm=self_attn.q_norm
    k_norm=self_attn.k_norm ff_proj=mlp.gate_proj up_proj=mlp.up_proj ff_out=mlp.down_proj''')
# Per layout: what config.json calls the sizes of Config ...
KEYS = dict(llada=pairs('''
    d_model=d_model n_heads=n_heads n_kv_heads=n_kv_heads n_layers=n_layers
    mlp_hidden_size=mlp_hidden_size embedding_size=embedding_size rope_theta=rope_theta
    max_sequence_length=max_sequence_length rms_norm_eps=rms_norm_eps mask_id=mask_token_id
    eos_id=eos_token_id'''), qwen3=pairs('''
    d_model=hidden_size n_heads=num_attention_heads n_kv_heads=num_key_value_heads
    n_layers=num_hidden_layers mlp_hidden_size=intermediate_size embedding_size=vocab_size
    rope_theta=rope_theta max_sequence_length=max_position_embeddings rms_norm_eps=rms_norm_eps
    mask_id=mask_token_id eos_id=eos_token_id head_dim=head_dim
    weight_tying=tie_word_embeddings'''))
# ... and the switches whose other values are other networks.
SWITCHES = dict(llada=json.loads('''{
    "activation_type": ["silu"], "alibi": [false], "attention_layer_norm": [false],
    "bias_for_layer_norm": [false], "block_group_size": [1], "block_type": ["llama"],
    "include_bias": [false], "include_qkv_bias": [false], "input_emb_norm": [false],
    "layer_norm_type": ["rms"], "layer_norm_with_affine": [true], "model_type": ["llada"],
    "rope": [true], "rope_full_precision": [true], "scale_logits": [false],
    "weight_tying": [false], "attention_dropout": [0.0], "embedding_dropout": [0.0],
    "residual_dropout": [0.0]}'''), qwen3=json.loads('''{
    "hidden_act": ["silu"], "attention_bias": [false], "attention_dropout": [0.0],
    "use_sliding_window": [false, null], "rope_type": ["default"], "type": ["default"]}'''))
QWEN3_IDS = dict(mask_token_id=151669, eos_token_id=151645)      # its published config has neither


def file_name(config, name):
    """What the published files call our tensor or layer."""
    if config.layout == 'llada':
        return PREFIX + name
    if name.startswith('ff_out'):                # at the top: the LM head
        return name.replace('ff_out', 'lm_head')
    return 'model.' + '.'.join(QWEN3_NAMES.get(part, part) for part in name.split('.'))


def refuse_others(folder, keys, known):
    """ValueError where a config of the folder has another value than the known ones."""
    for name, values in known.items():
        if keys.get(name, values[0]) not in values:
            raise ValueError(f'{folder} has {name}={keys[name]!r}: only {values} can be read here')


def read_config(folder):
    """The Config of a folder; ValueError on a missing key or another architecture."""
    keys = file_keys = read_json(folder, 'config.json')
    layout = 'llada'
    if 'qwen3' in str(keys.get('model_type')):
        layout = 'qwen3'
        rope = {**(keys.get('rope_parameters') or {}), **(keys.get('rope_scaling') or {})}
        keys = {**QWEN3_IDS, **keys, **rope}
    refuse_others(folder, keys, SWITCHES[layout])
    sizes = {}
    for ours, theirs in KEYS[layout].items():
        sizes[ours] = keys.get(theirs)
        if not isinstance(sizes[ours], (int, float)):
            raise ValueError(f'{folder}: config.json has {theirs}={sizes[ours]!r}, no number: is '
                             'this a LLaDA or Qwen3 diffusion model?')
    return Config(**sizes, layout=layout, qk_norm=layout == 'qwen3', file_keys=file_keys)


def config_keys(config, dtype):
    """config.json for weights in dtype: as it was read, with our sizes."""
    keys = dict(config.file_keys)
    for ours, theirs in KEYS[config.layout].items():
        keys[theirs] = getattr(config, ours)
    for name in {'dtype', 'torch_dtype'} & keys.keys():          # transformers casts to it
        keys[name] = str(dtype).removeprefix('torch.')
    return keys


def fetch(name):
    """A folder itself, that of 'nano', or a hub id's in the local cache, downloaded if need be."""
    if name == 'nano':
        return Path(__file__).resolve().parent / 'assets/nano/model'
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download
    with explained(f'{name} is no folder, and the hub gave no model: are name and network right?'):
        return snapshot_download(
            name, allow_patterns=['*.json', '*.jinja', '*.safetensors', '*.py'])


def read_json(folder, name):
    """The dict in a JSON file of the folder; ValueError where there is none."""
    with explained(f'{folder}/{name} cannot be read'):
        return dict(json.loads(Path(folder, name).read_text()))


def weight_files(folder):
    """The names of the files that transformers would read: the single one, else the index's."""
    index = 'model.safetensors.index.json'
    if Path(folder, index).exists() and not Path(folder, 'model.safetensors').exists():
        return set(read_json(folder, index).get('weight_map', {}).values())
    return ['model.safetensors']


def read_weights(folder, name):
    """{name: tensor}, mapped from the file: not yet in memory."""
    with explained(f'{folder}/{name} cannot be read; safetensors are needed, whole, and no .bin'):
        return load_file(Path(folder, name))


@contextlib.contextmanager
def explained(message, kind=ValueError):
    """Whatever fails inside ends in one line: the message, and what was raised."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise                   # run in train.py explains these
    except Exception as e:      # safetensors, the hub, tokenizers and jinja have their own types
        reason = ' '.join(str(e).split())[:300]
        raise kind(f'{message} ({type(e).__name__}: {reason})') from None


def load(name, dtype=torch.float32, device='cpu'):
    """model, tokenizer of a folder, a hub id, or 'nano', the small model in assets/."""
    model = LLaDA.from_pretrained(name, dtype, device)
    return model, load_tokenizer(name, model.config)


def load_tokenizer(name, config):
    """The tokenizer of a folder or hub id; all that ends its turns joins config.end_ids."""
    from transformers import PreTrainedTokenizerFast     # AutoTokenizer would ask for a model class
    with explained(f'{name} has no tokenizer with a chat template: is this the Instruct model?'):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(fetch(name))
        tokenizer.apply_chat_template([dict(role='user', content='Hi')])
    vocab = tokenizer.get_vocab()
    masks = [vocab.get(token) for token in ('<|mdm_mask|>', '<|mask|>', tokenizer.mask_token)]
    known = (tokenizer.eos_token, '<|eot_id|>', '<|im_end|>', '<|endoftext|>')
    ends = [vocab[token] for token in known if token in vocab]
    size = config.embedding_size
    if config.mask_id not in masks or config.eos_id not in ends or len(tokenizer) > size:
        raise ValueError(f'{name} contradicts itself: mask and eos are {config.mask_id} and '
                         f'{config.eos_id} of {size} tokens in config.json, but {masks} and {ends} '
                         f'of {len(tokenizer)} in its tokenizer')
    config.end_ids = tuple(dict.fromkeys(ends))
    return tokenizer


def save_tokenizer(folder, source):
    """Copies the files of a tokenizer, and the code of auto_map, from a folder or hub id.

    They stay as they were written: transformers 5 would write the name of a class that older
    versions, which LLaDA's own code needs, do not have.
    """
    source = Path(fetch(source))
    for pattern in ('*token*', '*.jinja', 'vocab*', 'merges*', '*.py'):
        for path in source.glob(pattern):
            shutil.copy(path, folder)
