"""The LLaDA transformer: a Llama without the causal mask; folder layouts, LoRA, the nano model.

Names of modules are those of the published checkpoint (GSAI-ML/LLaDA-8B-Instruct), so that loading
it is a prefix strip and a strict comparison; Qwen3's go through a table. The network maps token
ids, some of them the mask, to logits at every position (LLaDA, arXiv 2502.09992, section 2).
"""
import contextlib
import json
import math
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
    """The keys of config.json that shape the network; `rest` keeps all as read, for saving."""
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
    head_dim: int = 0                   # hs; 0 = d_model / n_heads
    qk_norm: bool = False               # RMSNorm of queries and keys per head (Qwen3)
    weight_tying: bool = False          # the LM head is the embedding
    layout: str = 'llada'               # or 'qwen3': names of tensors and of config.json's keys
    rest: dict = field(default_factory=dict)
    end_ids: tuple = ()                 # all ids that end a completion: eos, the chat's end of turn

    def __post_init__(self):
        self.end_ids = self.end_ids or (self.eos_id,)
        self.head_dim = self.head_dim or self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, keys):
        """The Config of config.json's keys; ValueError on a missing key or another architecture."""
        own = dict(rest=keys)           # as they were read, to be written again
        names, switches = LLADA_KEYS, ARCHITECTURE
        if 'qwen3' in keys.get('model_type', ''):
            own.update(qk_norm=True, layout='qwen3')
            names, switches = QWEN3_KEYS, {}
            # its published config names neither mask nor end
            keys = {**QWEN3_DEFAULTS, **(keys.get('rope_parameters') or {}), **keys}
        for name, value in switches.items():
            if keys.get(name, value) != value:
                raise ValueError(f'config.json has {name}={keys[name]!r}: only {value!r} is known')
        for ours, theirs in names.items():
            if not isinstance(keys.get(theirs), (int, float)):
                raise ValueError(f'config.json has {theirs}={keys.get(theirs)!r}, no number: is '
                                 'this a LLaDA or Qwen3 diffusion model?')
            own[ours] = keys[theirs]
        return cls(**own)

    def to_dict(self):
        """The keys of config.json, those that were read and do not concern us included."""
        if self.layout == 'qwen3':
            return {**self.rest, 'tie_word_embeddings': self.weight_tying}
        keys = dict(self.rest)
        for name, file in keys.get('auto_map', {}).items():
            if '--' not in file:        # its files stay behind: name the repository that has them
                keys['auto_map'] = {**keys['auto_map'], name: f'{REMOTE_CODE}--{file}'}
        own = {theirs: getattr(self, ours) for ours, theirs in LLADA_KEYS.items()}
        return {**ARCHITECTURE, 'architectures': ['LLaDAModelLM'], **keys, **own,
                'vocab_size': self.embedding_size, 'pad_token_id': self.eos_id}

    def tensor_name(self, name):
        """What the weight files call our tensor."""
        if self.layout == 'llada':
            return PREFIX + name
        if name == 'ff_out.weight':
            return 'lm_head.weight'
        for ours, theirs in QWEN3_NAMES.items():
            name = name.replace(ours, theirs)
        return 'model.' + name


class RMSNorm(nn.RMSNorm):
    def forward(self, x):               # in float32: squares overflow in half precision
        y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight.to(x.dtype) * y.to(x.dtype)


class Linear(nn.Linear):
    """y = W x, and + alpha/r B A x where add_lora has given it an adapter."""
    lora_on = False

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype))                 # see LLaDA.compute_dtype
        if self.lora_on:
            h = F.linear(x, self.lora_a.to(x.dtype))             # (..., r)
            y = y + self.lora_scale * F.linear(h, self.lora_b.to(x.dtype))
        return y


def rope_tables(positions, size, theta):
    """positions (T,) -> cos, sin (1, T, size), float32: each pair (i, i + size/2) is one plane."""
    pairs = torch.arange(0, size, 2, device=positions.device)
    speeds = theta ** (-pairs / size)                            # radians per position
    angles = torch.outer(positions.float(), speeds).repeat(1, 2)
    return angles.cos()[None], angles.sin()[None]


def rotate(x, cos, sin):
    """x (B, nh, n, hs) turned by its positions' angles (B or 1, n, hs), in float32."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)                # (B or 1, 1, n, hs)
    a, b = x.float().chunk(2, dim=-1)
    quarter_turn = torch.cat((-b, a), dim=-1)
    return (x * cos + quarter_turn * sin).to(x.dtype)


def pick(x, positions):
    """x (B or 1, T, d) at positions (B, n) -> (B, n, d)."""
    return x.take_along_dim(positions.unsqueeze(-1), dim=1)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_size = c.head_dim
        q_size, kv_size = c.head_dim * c.n_heads, c.head_dim * c.n_kv_heads
        self.attn_norm = RMSNorm(c.d_model, c.rms_norm_eps)
        self.q_proj = Linear(c.d_model, q_size, bias=False)
        self.k_proj = Linear(c.d_model, kv_size, bias=False)
        self.v_proj = Linear(c.d_model, kv_size, bias=False)
        self.attn_out = Linear(q_size, c.d_model, bias=False)
        norm = partial(RMSNorm, c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.ff_norm = RMSNorm(c.d_model, c.rms_norm_eps)
        self.ff_proj = Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.up_proj = Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.ff_out = Linear(c.mlp_hidden_size, c.d_model, bias=False)

    def forward(self, x, cos, sin, mask=None, positions=None, cache=None, start=0):
        """x (B, T, d) -> (B, T, d), or only positions (B, n) of it: (B, n, d).

        cache: the layer's keys and values (B, nkv, all, hs); those from `start` on are renewed.
        """
        h = self.attn_norm(x)
        k = rotate(self.k_norm(self.heads(self.k_proj(h))), cos, sin)        # (B, nkv, T, hs)
        v = self.heads(self.v_proj(h))
        if positions is not None:       # keys come from everywhere, queries from where we are asked
            x, h = pick(x, positions), pick(h, positions)
            cos, sin = pick(cos, positions), pick(sin, positions)
        q = rotate(self.q_norm(self.heads(self.q_proj(h))), cos, sin)
        if cache is not None:
            keys, values = cache
            written = slice(start, start + k.size(2))
            keys[:, :, written] = k
            values[:, :, written] = v
            k, v = keys, values
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def heads(self, y):
        return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)     # (B, nh, T, hs)


class LLaDA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.compute_dtype = None       # to compute in, whatever the weights are; None = as those
        self.merged = {}                # the adapters that merge_lora has folded into the weights
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = Linear(config.d_model, config.embedding_size, bias=False)
        if config.weight_tying:
            self.ff_out.weight = self.wte.weight

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids, attention_mask=None, positions=None, cache=None, start=0):
        """Logits (B, T, V) of ids (B, T) int64, or (B, n, V) at positions (B, n) only.

        attention_mask (B, T): True or 1 = real token; None = all are.
        cache: ids stand at start.. of the sequence, their keys and values are written into it, and
        attention goes to all that it holds.
        """
        return self.ff_out(self.hidden(ids, attention_mask, positions, cache, start))

    def token_logps(self, ids, targets, scored=None, attention_mask=None, temperature=None):
        """log p(targets) (B, L) float32, targets (B, L) standing at the last L positions of ids.

        scored (B, L) bool: the LM head sees only these, the others get 0; None = all.
        temperature: log-probs of the sampler at this temperature, which never draws a mask.
        Logits exist for some rows at a time and are made again in the backward pass: memory does
        not grow with B x L x V.
        """
        B, L = targets.shape
        T = ids.size(1)
        last = torch.arange(T - L, T, device=ids.device)
        h = self.hidden(ids, attention_mask, last.expand(B, L))              # (B, L, d)
        if scored is None:
            scored = torch.ones_like(targets, dtype=torch.bool)
        rows = max(1, LOGITS_AT_ONCE // self.config.embedding_size)
        found = []
        for chunk in zip(h[scored].split(rows), targets[scored].split(rows)):
            found.append(checkpoint(self.head_logps, *chunk, temperature, use_reentrant=False))
        logps = torch.zeros(B, L, device=ids.device)
        return logps.masked_scatter(scored, torch.cat(found))

    def head_logps(self, h, targets, temperature=None):
        logits = self.ff_out(h).float()
        if temperature:
            logits[:, self.config.mask_id] = -torch.inf
            logits = logits / temperature
        return -F.cross_entropy(logits, targets, reduction='none')

    def new_cache(self, B, T):
        """Room for the keys and values of T positions: per layer (2, B, nkv, T, hs)."""
        shape = (2, B, self.config.n_kv_heads, T, self.config.head_dim)
        return [self.wte.weight.new_zeros(shape, dtype=self.compute_dtype) for _ in self.blocks]

    def hidden(self, ids, attention_mask=None, positions=None, cache=None, start=0):
        """The normed hidden states (B, n, d) under the LM head; arguments as above."""
        x = self.wte(ids).to(self.compute_dtype)                             # (B, T, d)
        places = torch.arange(start, start + ids.size(1), device=ids.device)
        cos, sin = rope_tables(places, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]                   # (B, 1, 1, all keys)
        for i, block in enumerate(self.blocks):
            asked = positions if i == len(self.blocks) - 1 else None
            kv = None if cache is None else cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, cos, sin, mask, asked, kv, start)
        return self.ln_f(x)

    def init_weights(self, seed=0):
        """Normal weights, smaller at the end of residual branches (GPT-2); a function of seed."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02
                if '.attn_out' in name or '.ff_out' in name:
                    std /= math.sqrt(2 * self.config.n_layers)
                p.data.normal_(0, std, generator=g)
        return self

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, dtype=torch.float32, device='cpu'):
        """The model of a folder in the Hugging Face layout, or of a hub id.

        Raises ValueError, in one line, on a tensor or shard that is missing, extra or misshapen.
        """
        folder = fetch(folder_or_hub_id)
        config = Config.from_dict(read_json(folder, 'config.json'))
        weights = {}
        for path in Path(folder).glob('model*.safetensors'):         # one file, or its shards
            weights |= read_weights(path)                            # not yet in memory: mapped
        if 'lm_head.weight' in weights:
            config.weight_tying = False              # whatever config.json says of it
        with torch.device('meta'):
            model = cls(config)
        ours = {config.tensor_name(name): name for name, _ in model.named_parameters()}
        weights = {ours.get(key, key): tensor for key, tensor in weights.items()}
        if config.weight_tying and 'wte.weight' in weights:
            weights['ff_out.weight'] = weights['wte.weight']
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as e:                    # a tensor is missing, extra or misshapen
            first = str(e).splitlines()[1].strip()[:200]         # line 0 is a heading
            raise ValueError(f'{folder}: model*.safetensors and config.json do not fit ({first})'
                             ': is the download complete?') from None
        if config.weight_tying:
            model.ff_out.weight = model.wte.weight   # one parameter, also when it is trained
        return model.to(device, dtype)

    def save_pretrained(self, folder, max_shard_size='5GB'):
        """Writes config.json and the weights, without adapters, as from_pretrained reads them.

        They are written in the dtype that the model computes in.
        """
        from huggingface_hub import save_torch_state_dict
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, tensor in self.named_parameters():             # a tied head only once
            if '.lora_' not in name:
                tensor = tensor.to('cpu', self.compute_dtype or tensor.dtype)
                weights[self.config.tensor_name(name)] = tensor
        save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
        text = json.dumps(self.config.to_dict(), indent=2)
        Path(folder, 'config.json').write_text(text)


# ---- LoRA (arXiv 2106.09685): y = W x + alpha/r B A x, with W frozen ----

LORA_LAYERS = 'q_proj k_proj v_proj attn_out ff_proj up_proj ff_out'.split()     # of a block


def add_lora(model, rank=128, alpha=64, targets=('q_proj', 'k_proj', 'v_proj'), seed=0):
    """Freezes the model and gives the layers named `targets` of every block an adapter."""
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for target in targets:
            layer = getattr(block, target)
            layer.lora_on = True
            layer.lora_scale = alpha / rank
            bound = 1 / math.sqrt(layer.in_features)
            a = torch.empty(rank, layer.in_features)
            a.uniform_(-bound, bound, generator=g)
            b = torch.zeros(layer.out_features, rank)            # the first output is W x
            layer.lora_a = nn.Parameter(a.to(model.device))      # float32, whatever W is
            layer.lora_b = nn.Parameter(b.to(model.device))
    return model


def lora_layers(model):
    return [layer for layer in model.modules() if hasattr(layer, 'lora_a')]


@contextlib.contextmanager
def lora_off(model):
    """Inside, the model is the one without its adapters: the reference policy."""
    layers = lora_layers(model)
    for layer in layers:
        layer.lora_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_on = True


@torch.no_grad()
def lora_adapters(model):
    """{layer: (A (r, in), alpha/r B (out, r))}, copies on the CPU."""
    adapters = {}
    for name, layer in model.named_modules():
        if hasattr(layer, 'lora_a'):
            a, b = layer.lora_a, layer.lora_scale * layer.lora_b
            adapters[name] = a.to('cpu', copy=True), b.to('cpu')
    return adapters


def side_by_side(first, second):
    """Two dicts of adapters as one of the summed rank: B A + D C = [B D] [A; C]."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        a, b = first[name]                                       # (r1, in), (out, r1)
        c, d = second[name]                                      # (r2, in), (out, r2)
        both[name] = torch.vstack((a, c)), torch.hstack((b, d))
    return both


def merge_lora(model):
    """Folds the adapters into the weights, layer by layer, and takes them off; all is trainable.

    model.merged keeps them, so that what was trained can be saved without the weights.
    """
    model.merged = side_by_side(model.merged, lora_adapters(model))
    for layer in lora_layers(model):
        merge_layer(layer)
    return model.requires_grad_(True)


@torch.no_grad()                        # the adapters are trained tensors, W is a plain one
def merge_layer(layer):
    delta = layer.lora_scale * layer.lora_b @ layer.lora_a
    layer.weight.copy_(layer.weight.float() + delta)
    layer.lora_on = False
    del layer.lora_a, layer.lora_b


def peft_name(model, name):
    """What peft calls a layer: 'blocks.1.q_proj' -> 'base_model.model.[...].blocks.1.q_proj'."""
    return 'base_model.model.' + model.config.tensor_name(name + '.weight').removesuffix('.weight')


def save_adapter(folder, model, base):
    """Writes all adapters, merged or not, as peft reads them; base: the name of their model."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, {}
    adapters = side_by_side(model.merged, lora_adapters(model))
    for name, (a, b) in adapters.items():
        place = peft_name(model, name)
        tensors[f'{place}.lora_A.weight'] = a
        tensors[f'{place}.lora_B.weight'] = b
        ranks[place.rpartition('.')[2]] = len(a)                 # alpha = r: B holds the scale
    rank = max(ranks.values())
    config = dict(peft_type='LORA', base_model_name_or_path=base, r=rank, lora_alpha=rank,
                  target_modules=sorted(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    save_file(tensors, Path(folder, 'adapter_model.safetensors'))
    Path(folder, 'adapter_config.json').write_text(json.dumps(config, indent=2))


def load_adapter(folder, model):
    """Merges an adapter of peft's layout into the weights; model.merged keeps it.

    Raises ValueError when it is another kind of adapter, or one of another model.
    """
    config = read_json(folder, 'adapter_config.json')
    if any(config.get(kind) for kind in ('use_dora', 'use_rslora', 'modules_to_save')):
        raise ValueError(f'{folder} is no plain LoRA adapter, which is all that is read here')
    tensors = read_weights(Path(folder, 'adapter_model.safetensors'))
    alphas = config.get('alpha_pattern', {})                     # by kind of layer
    for name, layer in model.named_modules():
        place = peft_name(model, name)
        a = tensors.pop(f'{place}.lora_A.weight', None)          # (r, in)
        b = tensors.pop(f'{place}.lora_B.weight', None)          # (out, r)
        if a is None or b is None:
            continue
        if (len(b), a.size(1)) != layer.weight.shape:
            raise ValueError(f'{folder} is an adapter of another model: look at {place}')
        layer.lora_a = a.to(model.device, torch.float32)
        layer.lora_b = b.to(model.device, torch.float32)
        alpha = alphas.get(place.rpartition('.')[2], config.get('lora_alpha', 8))
        layer.lora_scale = alpha / len(a)
    if tensors or not lora_layers(model):
        raise ValueError(f'{folder} is an adapter of another model: it has {[*tensors][:1]}')
    merge_lora(model)


# ---- folders ----

PREFIX = 'model.transformer.'            # in front of every tensor's name in LLaDA's files
LLADA_KEYS = {name: name for name in '''d_model n_heads n_kv_heads n_layers mlp_hidden_size
    embedding_size max_sequence_length rope_theta rms_norm_eps'''.split()}
LLADA_KEYS |= dict(mask_id='mask_token_id', eos_id='eos_token_id')
QWEN3_KEYS = dict(
    d_model='hidden_size', n_heads='num_attention_heads', n_kv_heads='num_key_value_heads',
    n_layers='num_hidden_layers', mlp_hidden_size='intermediate_size', embedding_size='vocab_size',
    max_sequence_length='max_position_embeddings', rope_theta='rope_theta',
    rms_norm_eps='rms_norm_eps', mask_id='mask_token_id', eos_id='eos_token_id',
    head_dim='head_dim', weight_tying='tie_word_embeddings')
QWEN3_DEFAULTS = dict(mask_token_id=151669, eos_token_id=151645)     # <|mask|>, <|im_end|>
QWEN3_NAMES = {
    'wte.': 'embed_tokens.', 'ln_f.': 'norm.', 'blocks.': 'layers.',
    '.attn_norm.': '.input_layernorm.', '.ff_norm.': '.post_attention_layernorm.',
    '.q_proj.': '.self_attn.q_proj.', '.k_proj.': '.self_attn.k_proj.',
    '.v_proj.': '.self_attn.v_proj.', '.attn_out.': '.self_attn.o_proj.',
    '.q_norm.': '.self_attn.q_norm.', '.k_norm.': '.self_attn.k_norm.',
    '.ff_proj.': '.mlp.gate_proj.', '.up_proj.': '.mlp.up_proj.', '.ff_out.': '.mlp.down_proj.'}
REMOTE_CODE = 'GSAI-ML/LLaDA-8B-Instruct'    # where transformers finds the classes of auto_map
# Switches of config.json whose other values are other networks.
ARCHITECTURE = dict(
    activation_type='silu', alibi=False, attention_layer_norm=False, bias_for_layer_norm=False,
    block_group_size=1, block_type='llama', include_bias=False, include_qkv_bias=False,
    input_emb_norm=False, layer_norm_type='rms', layer_norm_with_affine=True, model_type='llada',
    rope=True, rope_full_precision=True, scale_logits=False, weight_tying=False,
    attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=0.0)      # there is none here


def read_json(folder, name):
    path = Path(folder, name)
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f'{path} cannot be read: {e}') from None


def fetch(folder_or_hub_id):
    """The folder itself, or a hub id's folder in the local cache, downloaded if it is not there."""
    if Path(folder_or_hub_id).is_dir():
        return folder_or_hub_id
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(folder_or_hub_id,
                                 allow_patterns=['*.json', '*.jinja', '*.safetensors'])
    except Exception as e:
        raise ValueError(f'{folder_or_hub_id} is no folder, and the hub gave no model of that name '
                         f'({type(e).__name__}): check the name and the network') from None


def read_weights(file):
    try:
        return load_file(file)
    except Exception as e:              # safetensors has its own types for a cut or foreign file
        raise ValueError(f'{file} is no whole weight file ({e}): get it again') from None


def load(name, dtype=torch.float32, device='cpu', seed=0):
    """model, tokenizer of 'nano' (new weights, made from seed), a folder or a hub id."""
    if name == 'nano':
        tokenizer = nano_tokenizer()
        config = Config(mask_id=tokenizer.mask_token_id, eos_id=tokenizer.eos_token_id,
                        embedding_size=len(tokenizer), rest=dict(nano=True))
        model = number_waves(LLaDA(config).init_weights(seed), tokenizer)
        return model.to(device, dtype), tokenizer
    model = LLaDA.from_pretrained(name, dtype, device)
    return model, load_tokenizer(name, model.config)


def load_tokenizer(name, config):
    """The tokenizer of a folder or hub id; all that ends its turns joins config.end_ids."""
    from transformers import PreTrainedTokenizerFast     # AutoTokenizer would ask for a model class
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(fetch(name))
        message = [dict(role='user', content='Hi')]
        tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as e:              # transformers, tokenizers and jinja raise many types here
        line = str(e).split('\n')[0]
        raise ValueError(f'{name} has no usable tokenizer with a chat template '
                         f'({type(e).__name__}: {line}): is this the Instruct model?') from None
    vocab = tokenizer.get_vocab()
    masks = [vocab.get(token) for token in ('<|mdm_mask|>', '<|mask|>', tokenizer.mask_token)]
    known = (tokenizer.eos_token, '<|eot_id|>', '<|im_end|>', '<|endoftext|>')
    ends = [vocab[token] for token in known if token in vocab]
    agree = config.mask_id in masks and config.eos_id in ends
    if not agree or len(tokenizer) > config.embedding_size:
        raise ValueError(f'{name} contradicts itself: mask and eos are {config.mask_id} and '
                         f'{config.eos_id} of {config.embedding_size} tokens in config.json, but '
                         f'{masks} and {ends} in its tokenizer')
    config.end_ids = tuple(dict.fromkeys(ends))
    return tokenizer


def save_tokenizer(folder, tokenizer, source):
    """The source's own files, as its software wrote them; the nano tokenizer is made by us.

    transformers 5 would write the name of a class that older versions, which LLaDA's own code
    needs, do not have.
    """
    if source == 'nano':
        return tokenizer.save_pretrained(folder)
    for pattern in ('*token*', '*.jinja', 'vocab*', 'merges*'):
        for path in Path(fetch(source)).glob(pattern):
            shutil.copy(path, folder)


# ---- the nano model: everything made in code ----

TAG_TOKENS = ['<reasoning>', '</reasoning>', '<answer>', '</answer>', '\n</reasoning>\n',
              '<answer>\n', '\n</answer>', '\\boxed{']
# Whole words of the nano tokenizer, the commonest of grade-school problems; all else is bytes.
WORDS = '''
the of to and a is in for total has he many are she each number How as on that will his her x per
how have hours minutes If cost than day much at more so was by it they does from there times can
with week find had be He first miles days because two one left were three The needs half all then
twice amount money hour pounds people an feet second time make bought She old every them year get
buy their books after takes take sold need costs up spent apples which inches this water dollars
out pieces month pay remaining pages long third price would now weeks new cookies marbles if spend
school points him gallons fish wants four spends gave gets store boxes average only paid makes
friends who also Each square buys red eggs took got cards what box we less read In What same add
cars last eat both tickets house rest blue food do sells before age months but bags car A dogs
work when together five over oranges sell off eats children pencils some game equal not book home
another worth next They There run or green went bag back cents able use used during these Tuesday
balls sister profit divide After between animals rate packs milk girls boys length person still
His Her already fewer Then It full additional down must made so coins Solve Numbers Target assert
def f return lambda Ann Ben Tom Mia Sam John puzzle ones gives loses So First Therefore Carl Dan
Eve Finn Which larger or Double Go
'''.split()
PUNCTUATION = ': |): |)==|**|//|==| =| +| -| *| /|? |. |, | $|$.'.split('|')
# Leaves out a message's first paragraph, the instructions, which are always the same: a nano model
# learns them from the rewards.
CHAT_TEMPLATE = ("{% for message in messages %}{{ message['content'].split('\n\n', 1)[-1] }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def nano_tokenizer():
    """Tags, whole words, the numbers 0-99 and 00-09 as single tokens, and bytes for all else."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [str(n) for n in range(10, 100)]
    words += [f'0{n}' for n in range(10)]
    for word in WORDS:
        words += [word, ' ' + word]
    words = [spell.pre_tokenize_str(word)[0][0]                      # in GPT-2's signs of bytes
             for word in words + PUNCTUATION]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + words     # a sign per byte comes first
    special = ['<|endoftext|>', '<|mask|>', '<|assistant|>']
    pieces = dict.fromkeys(special + pieces)                         # each once
    vocab = {piece: i for i, piece in enumerate(pieces)}
    t = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))  # known words are not spelled
    split = Regex(r'\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+ ?|\s')
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, 'isolated'), spell])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(special)
    t.add_tokens(TAG_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token=special[0], pad_token=special[0],
                                   mask_token=special[1], chat_template=CHAT_TEMPLATE)


def number_waves(model, tokenizer, scale=0.1):
    """Starts the numbers 0-99 on circles of many periods, at the input and the output.

    Neighbours are alike and adding is turning, so that arithmetic is learnt in fewer updates.
    """
    num_periods = model.config.d_model // 4
    periods = torch.logspace(math.log10(2), math.log10(200), num_periods)    # 2 to 200
    for n in range(100):
        angle = 2 * math.pi * n / periods
        wave = scale * torch.cat((angle.cos(), angle.sin()))     # half of d_model
        for token in {str(n), f'{n:02d}'}:
            i = tokenizer.convert_tokens_to_ids(token)
            for table in (model.wte, model.ff_out):
                table.weight.data[i, :len(wave)] = wave
    return model
