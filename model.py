"""The LLaDA transformer: a Llama without the causal mask; its folder layout, LoRA, the nano model.

Names of modules are those of the published checkpoint (GSAI-ML/LLaDA-8B-Instruct), so that loading
is a prefix strip and a strict comparison. The network maps token ids, some of them the mask, to
logits at every position at once (LLaDA, arXiv 2502.09992, section 2).
"""
import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2 ** 25       # of token_logps: 128 MB in float32


@dataclass
class Config:
    """The keys of config.json that shape the network; `rest` keeps the others for saving."""
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 4
    n_layers: int = 3
    mlp_hidden_size: int = 384
    embedding_size: int = 1024          # V
    max_sequence_length: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    mask_token_id: int = 1
    eos_token_id: int = 0
    rest: dict = field(default_factory=dict)
    end_ids: tuple = ()                 # all ids that end a completion: eos, the chat's end of turn

    def __post_init__(self):
        self.end_ids = self.end_ids or (self.eos_token_id,)

    @property
    def mask_id(self):
        return self.mask_token_id

    @property
    def eos_id(self):
        return self.eos_token_id

    @classmethod
    def from_dict(cls, keys):
        """The Config of config.json's keys; ValueError on a missing key or another architecture."""
        for name, value in ARCHITECTURE.items():
            if keys.get(name, value) != value:
                raise ValueError(f'config.json has {name}={keys[name]!r}: only {value!r} is known')
        own = [name for name in cls.__dataclass_fields__ if name not in ('rest', 'end_ids')]
        for name in own:
            kind = cls.__dataclass_fields__[name].type
            if not isinstance(keys.get(name), (int, kind)):
                raise ValueError(f'config.json has {name}={keys.get(name)!r}, not {kind.__name__}: '
                                 'is this the folder of a LLaDA model?')
        rest = {name: value for name, value in keys.items() if name not in own}
        return cls(**{name: keys[name] for name in own}, rest=rest)

    def to_dict(self):
        keys = asdict(self)
        del keys['end_ids']
        rest = keys.pop('rest')
        for name, file in rest.get('auto_map', {}).items():
            if '--' not in file:        # its files stay behind: name the repository that has them
                rest['auto_map'][name] = f'{REMOTE_CODE}--{file}'
        return {**ARCHITECTURE, 'architectures': ['LLaDAModelLM'], **rest, **keys,
                'vocab_size': self.embedding_size, 'pad_token_id': self.eos_token_id}


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()                   # squares overflow in half precision
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
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
    """positions (T,) -> cos, sin (T, size), float32: each pair (i, i + size/2) is one plane."""
    pairs = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angles = torch.outer(positions.float(), theta ** (-pairs / size)).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, nh, n, hs) turned by its positions' angles (B, n, hs), in float32."""
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    return (x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


def pick(x, positions):
    """x (B, T, d) at positions (B, n) -> (B, n, d)."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, positions]


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_size = c.d_model // c.n_heads
        kv_size = self.head_size * c.n_kv_heads
        self.attn_norm = RMSNorm(c.d_model, c.rms_norm_eps)
        self.q_proj = Linear(c.d_model, c.d_model, bias=False)
        self.k_proj = Linear(c.d_model, kv_size, bias=False)
        self.v_proj = Linear(c.d_model, kv_size, bias=False)
        self.attn_out = Linear(c.d_model, c.d_model, bias=False)
        self.ff_norm = RMSNorm(c.d_model, c.rms_norm_eps)
        self.ff_proj = Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.up_proj = Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.ff_out = Linear(c.mlp_hidden_size, c.d_model, bias=False)

    def forward(self, x, cos, sin, mask=None, positions=None, cache=None, start=0):
        """x (B, T, d) -> (B, T, d), or only positions (B, n) of it: (B, n, d).

        cache: the layer's keys and values (B, nh, all, hs); those from `start` on are renewed.
        """
        h = self.attn_norm(x)
        k = rotate(self.heads(self.k_proj(h)), cos, sin)         # (B, nh, T, hs)
        v = self.heads(self.v_proj(h))
        if positions is not None:       # keys come from everywhere, queries from where we are asked
            x, h = pick(x, positions), pick(h, positions)
            cos, sin = pick(cos, positions), pick(sin, positions)
        q = rotate(self.heads(self.q_proj(h)), cos, sin)
        if cache is not None:
            keys, values = cache
            keys[:, :, start:start + k.size(2)] = k
            values[:, :, start:start + k.size(2)] = v
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
        self.compute_dtype = None       # bfloat16: compute in it although the weights are float32
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = Linear(config.d_model, config.embedding_size, bias=False)

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids, attention_mask=None, positions=None):
        """Logits (B, T, V) of ids (B, T) int64, or (B, n, V) at positions (B, n) only.

        attention_mask (B, T): True or 1 = real token; None = all are.
        """
        return self.ff_out(self.hidden(ids, attention_mask, positions))

    def token_logps(self, ids, targets, scored=None, attention_mask=None):
        """log p(targets) (B, L) float32, targets (B, L) standing at the last L positions of ids.

        scored (B, L) bool: the LM head sees only these, the others get 0; None = all.
        Logits exist for some rows at a time and are made again in the backward pass: memory does
        not grow with B x L x V.
        """
        B, L = targets.shape
        last = torch.arange(ids.size(1) - L, ids.size(1), device=ids.device)
        h = self.hidden(ids, attention_mask, last.expand(B, L))              # (B, L, d)
        if scored is None:
            scored = torch.ones_like(targets, dtype=torch.bool)
        rows = max(1, LOGITS_AT_ONCE // self.config.embedding_size)
        found = [h.new_empty(0, dtype=torch.float32)]
        for some_h, some_targets in zip(h[scored].split(rows), targets[scored].split(rows)):
            found.append(checkpoint(self.head_logps, some_h, some_targets, use_reentrant=False))
        logps = torch.zeros(B, L, device=ids.device)
        return logps.masked_scatter(scored, torch.cat(found))

    def head_logps(self, h, targets):
        return -F.cross_entropy(self.ff_out(h).float(), targets, reduction='none')

    def new_cache(self, B, T):
        """Room for keys and values of T positions: per layer (keys, values) of (B, nh, T, hs)."""
        c = self.config
        shape = (B, c.n_kv_heads, T, self.blocks[0].head_size)
        weight = self.wte.weight
        return [(weight.new_zeros(shape, dtype=self.compute_dtype),
                 weight.new_zeros(shape, dtype=self.compute_dtype)) for _ in self.blocks]

    def cached_logits(self, ids, positions, cache, start, attention_mask=None):
        """Logits (B, n, V) at positions (B, n) of ids, which stand at start.. of the sequence.

        Their keys and values are written into the cache; attention goes to all that it holds.
        """
        return self.ff_out(self.hidden(ids, attention_mask, positions, cache, start))

    def hidden(self, ids, attention_mask=None, positions=None, cache=None, start=0):
        """The normed hidden states (B, n, d) under the LM head; arguments as above."""
        B, T = ids.shape
        x = self.wte(ids).to(self.compute_dtype)                             # (B, T, d)
        places = torch.arange(start, start + T, device=ids.device)
        cos, sin = rope_tables(places, self.blocks[0].head_size, self.config.rope_theta)
        cos, sin = cos.expand(B, -1, -1), sin.expand(B, -1, -1)              # (B, T, hs)
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]                   # (B, 1, 1, all keys)
        for i, block in enumerate(self.blocks):
            asked = positions if i == len(self.blocks) - 1 else None
            kv = None if cache is None else cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, asked, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, asked, kv, start)
        return self.ln_f(x)

    def init_weights(self, seed=0):
        """Normal weights, smaller at the end of residual branches (GPT-2); a function of seed."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02
                if name.endswith('attn_out.weight') or '.ff_out' in name:
                    std /= math.sqrt(2 * self.config.n_layers)
                p.data.normal_(0, std, generator=g)
        return self

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, dtype=torch.float32, device='cpu'):
        """The model of a folder in the Hugging Face layout, or of a hub id; tensor by tensor.

        Raises ValueError, in one line, on a tensor or shard that is missing, extra or misshapen.
        """
        folder = fetch(folder_or_hub_id)
        config = Config.from_dict(read_json(folder, 'config.json'))
        with torch.device('meta'):
            model = cls(config)
        shapes = {PREFIX + name: p.shape for name, p in model.named_parameters()}
        weights = {}
        for file in weight_files(folder):
            try:
                shard = safe_open(file, 'pt')
            except Exception as e:      # safetensors has its own types for a cut or foreign file
                raise ValueError(f'{file} is no whole weight file ({e}): get it again') from None
            for key in shard.keys():
                shape = torch.Size(shard.get_slice(key).get_shape())
                if shapes.get(key) != shape:
                    raise ValueError(f'{key} is {tuple(shape)} in {file}, but config.json asks for '
                                     f'{tuple(shapes.get(key, ())) or "no such tensor"}')
                weights[key.removeprefix(PREFIX)] = shard.get_tensor(key).to(device, dtype)
        missing = [key for key in shapes if key.removeprefix(PREFIX) not in weights]
        if missing:
            raise ValueError(f'{folder} lacks {missing[0]} and {len(missing) - 1} more tensors: is '
                             'the download complete?')
        model.load_state_dict(weights, assign=True)
        return model

    def save_pretrained(self, folder, max_shard_size='5GB'):
        """Writes config.json and the weights, without adapters, as from_pretrained reads them.

        They are written in the dtype that the model computes in.
        """
        from huggingface_hub import save_torch_state_dict
        os.makedirs(folder, exist_ok=True)
        weights = {}
        for name, tensor in self.state_dict().items():
            if '.lora_' not in name:
                tensor = tensor.detach().to('cpu', self.compute_dtype or tensor.dtype)
                weights[PREFIX + name] = tensor.contiguous()
        save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
        with open(os.path.join(folder, 'config.json'), 'w') as file:
            json.dump(self.config.to_dict(), file, indent=2)


# ---- LoRA (arXiv 2106.09685): y = W x + alpha/r B A x, with W frozen ----

def add_lora(model, rank=128, alpha=64, targets=('q_proj', 'k_proj', 'v_proj'), seed=0):
    """Freezes the model and gives the layers named `targets` of every block an adapter."""
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for target in targets:
            layer = getattr(block, target)
            layer.lora_on = True
            layer.lora_scale = alpha / rank
            a = torch.empty(rank, layer.in_features).uniform_(-1, 1, generator=g)
            a = a / math.sqrt(layer.in_features)
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
def merge_lora(model):
    """Folds the adapters into the weights, layer by layer, and takes them off; all is trainable."""
    for layer in lora_layers(model):
        delta = layer.lora_scale * layer.lora_b @ layer.lora_a
        layer.weight.copy_(layer.weight.float() + delta)
        layer.lora_on = False
        del layer.lora_a, layer.lora_b
    return model.requires_grad_(True)


# ---- folders ----

PREFIX = 'model.transformer.'  # in front of every tensor's name in a checkpoint file
REMOTE_CODE = 'GSAI-ML/LLaDA-8B-Instruct'    # where transformers finds the classes of auto_map
# Switches of config.json whose other values are other networks.
ARCHITECTURE = dict(
    activation_type='silu', alibi=False, attention_layer_norm=False, bias_for_layer_norm=False,
    block_group_size=1, block_type='llama', include_bias=False, include_qkv_bias=False,
    input_emb_norm=False, layer_norm_type='rms', layer_norm_with_affine=True, model_type='llada',
    rope=True, rope_full_precision=True, scale_logits=False, weight_tying=False,
    attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=0.0)


def read_json(folder, name):
    path = os.path.join(folder, name)
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f'{path} cannot be read: {e}') from None


def fetch(folder_or_hub_id):
    """The folder itself, or a hub id's folder in the local cache, downloaded if it is not there."""
    if os.path.isdir(folder_or_hub_id):
        return folder_or_hub_id
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(folder_or_hub_id,
                                 allow_patterns=['*.json', '*.jinja', '*.safetensors'])
    except Exception as e:
        raise ValueError(f'{folder_or_hub_id} is no folder, and the hub gave no model of that name '
                         f'({type(e).__name__}): check the name and the network') from None


def weight_files(folder):
    """The safetensors files of a folder: the shards that its index names, or the single file."""
    names = ['model.safetensors']
    if os.path.exists(os.path.join(folder, 'model.safetensors.index.json')):
        index = read_json(folder, 'model.safetensors.index.json')
        names = sorted(set(index.get('weight_map', {}).values()))
    files = [os.path.join(folder, name) for name in names]
    for file in files:
        if not os.path.exists(file):
            raise ValueError(f'{file} is missing: download it again')
    return files


def load(name, dtype=torch.float32, device='cpu', seed=0):
    """model, tokenizer of 'nano' (new weights, made from seed), a folder or a hub id."""
    if name == 'nano':
        tokenizer = nano_tokenizer()
        config = Config(mask_token_id=tokenizer.mask_token_id,
                        eos_token_id=tokenizer.eos_token_id,
                        embedding_size=len(tokenizer), rest=dict(nano=True))
        model = number_waves(LLaDA(config).init_weights(seed), tokenizer)
        return model.to(device, dtype), tokenizer
    model = LLaDA.from_pretrained(name, dtype, device)
    return model, load_tokenizer(name, model.config)


def load_tokenizer(name, config):
    """The tokenizer of a folder or hub id; its end of a turn joins config.end_ids."""
    from transformers import PreTrainedTokenizerFast     # AutoTokenizer would ask for a model class
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(fetch(name))
        message = [dict(role='user', content='Hi')]
        tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as e:              # transformers, tokenizers and jinja raise many types here
        line = str(e).split('\n')[0]
        raise ValueError(f'{name} has no usable tokenizer with a chat template '
                         f'({type(e).__name__}: {line}): is this the Instruct model?') from None
    vocabulary = tokenizer.get_vocab()
    mask_id = vocabulary.get('<|mdm_mask|>', tokenizer.mask_token_id)    # LLaDA names no mask_token
    theirs = (mask_id, tokenizer.eos_token_id)
    if theirs != (config.mask_id, config.eos_id) or len(tokenizer) > config.embedding_size:
        ours = (config.mask_id, config.eos_id)
        raise ValueError(f'{name} contradicts itself: mask, eos are {theirs} of {len(tokenizer)} in '
                         f'its tokenizer, {ours} of {config.embedding_size} in config.json')
    end_of_turn = vocabulary.get('<|eot_id|>', config.eos_id)
    config.end_ids = tuple({config.eos_id: 1, end_of_turn: 1})
    return tokenizer


# ---- the nano model: everything made in code ----

TAGS = ['<reasoning>', '</reasoning>', '<answer>', '</answer>', '<reasoning>\n',
        '\n</reasoning>\n', '<answer>\n', '\n</answer>', '\\boxed{']
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
def f return lambda Ann Ben Tom Mia Sam John puzzle ones gives loses So First Therefore
'''.split()
PUNCTUATION = ['): ', ')==', '**', '//', '==', ' =', ' +', ' -', ' *', ' /', '? ', '. ', ', ', ' $',
               '$.']
# Leaves out a message's first paragraph, the instructions, which are always the same: a nano model
# learns them from the rewards.
CHAT_TEMPLATE = ("{% for message in messages %}{{ message['content'].split('\n\n', 1)[-1] }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def nano_tokenizer():
    """Tags, whole words, the numbers 0-99 and 00-09 as single tokens, and bytes for all else."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [str(n) for n in range(10, 100)] + [f'0{n}' for n in range(10)]
    words += [form for word in WORDS for form in (word, ' ' + word)] + PUNCTUATION
    words = [spell.pre_tokenize_str(word)[0][0] for word in words]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + words
    special = ['<|endoftext|>', '<|mask|>', '<|assistant|>']
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(special + pieces))}
    t = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))  # known words are not spelled
    split = Regex(r'\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+ ?|\s')
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, 'isolated'), spell])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True) for s in special])
    t.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token=special[0], pad_token=special[0],
                                   mask_token=special[1], chat_template=CHAT_TEMPLATE)


def number_waves(model, tokenizer, scale=0.1):
    """Starts the numbers 0-99 on circles of many periods, at the input and the output.

    Neighbours are alike and adding is turning, so that arithmetic is learnt in fewer updates.
    """
    periods = torch.logspace(math.log10(2), math.log10(200), model.config.d_model // 4)
    for n in range(100):
        angle = 2 * math.pi * n / periods
        wave = scale * torch.cat((angle.cos(), angle.sin()))  # half of d_model
        for token in {str(n), f'{n:02d}'}:
            i = tokenizer.convert_tokens_to_ids(token)
            model.wte.weight.data[i, :len(wave)] = wave
            model.ff_out.weight.data[i, :len(wave)] = wave
    return model
