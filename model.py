"""The LLaDA transformer: a Llama without the causal mask, its folder layout, LoRA, and the nano model.

Names of modules are those of the published checkpoint (GSAI-ML/LLaDA-8B-Instruct), so that loading is
a prefix strip and a strict comparison. The network maps token ids, some of them the mask, to logits at
every position at once (LLaDA, arXiv 2502.09992, section 2); ask it only for the positions you need.
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

PREFIX = 'model.transformer.'  # in front of every tensor's name in a checkpoint file
# Switches of config.json whose other values are other networks, which this file does not implement.
ARCHITECTURE = dict(activation_type='silu', alibi=False, attention_layer_norm=False, bias_for_layer_norm=False,
                    block_group_size=1, block_type='llama', include_bias=False, include_qkv_bias=False,
                    input_emb_norm=False, layer_norm_type='rms', layer_norm_with_affine=True, model_type='llada',
                    rope=True, rope_full_precision=True, scale_logits=False, weight_tying=False,
                    attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=0.0)
REMOTE_CODE = 'GSAI-ML/LLaDA-8B-Instruct'  # where transformers finds the classes that auto_map names
# Logits held when only log-probs are wanted: 256 MB in float32; more are made again in the backward pass.
LOGITS_AT_ONCE = 2 ** 26


@dataclass
class Config:
    """The keys of config.json that shape the network; `rest` keeps the others for save_pretrained."""
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
    end_ids: tuple = ()                 # every id that ends a completion: eos, and the chat's end of turn

    @property
    def mask_id(self): return self.mask_token_id

    @property
    def eos_id(self): return self.eos_token_id

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.end_ids = self.end_ids or (self.eos_token_id,)

    @classmethod
    def from_dict(cls, keys):
        """The Config of a config.json's keys; raises ValueError on a switch or a value that is not implemented."""
        for name, value in ARCHITECTURE.items():
            if keys.get(name, value) != value:
                raise ValueError(f'config.json has {name}={keys[name]!r}: only {value!r} is implemented')
        own = [name for name in cls.__dataclass_fields__ if name not in ('rest', 'end_ids')]
        if missing := [name for name in own if name not in keys]:
            raise ValueError(f'config.json has no {", ".join(missing)}: is this the folder of a LLaDA model?')
        config = cls(**{name: keys[name] for name in own}, rest={k: v for k, v in keys.items() if k not in own})
        for name in own:
            value, kind = getattr(config, name), cls.__dataclass_fields__[name].type
            if type(value) not in (int, kind) or not (name.endswith('_id') or 0 < value < math.inf):
                raise ValueError(f'config.json has {name}={value!r}: it must be a positive {kind.__name__}')
        mask_id, eos_id, size = config.mask_id, config.eos_id, config.embedding_size
        if mask_id == eos_id or not 0 <= min(mask_id, eos_id) <= max(mask_id, eos_id) < size:
            raise ValueError(f'config.json has mask_token_id={mask_id} and eos_token_id={eos_id} of {size} tokens')
        if config.d_model % (2 * config.n_heads) or config.n_heads % config.n_kv_heads:  # rotary angles take pairs
            raise ValueError(f'config.json has d_model={config.d_model}, n_heads={config.n_heads} and n_kv_heads='
                             f'{config.n_kv_heads}: heads of an even size must fill d_model, n_kv_heads divide n_heads')
        return config

    def to_dict(self):
        keys = asdict(self)
        del keys['end_ids']
        rest = keys.pop('rest')
        if isinstance(rest.get('auto_map'), dict):  # its files stay behind: name the repository that has them
            rest['auto_map'] = {k: f'{REMOTE_CODE}--{v}' if isinstance(v, str) and '--' not in v else v
                                for k, v in rest['auto_map'].items()}
        return {**ARCHITECTURE, 'architectures': ['LLaDAModelLM'], 'vocab_size': self.embedding_size,
                'pad_token_id': self.eos_token_id, **rest, **keys}


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()  # squares overflow in half precision
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * y.to(x.dtype)


class Linear(nn.Linear):
    lora_on = False  # add_lora gives a layer its adapter

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype))  # see LLaDA.compute_dtype
        if self.lora_on:
            h = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_a.to(x.dtype))
            y = y + self.lora_scale * F.linear(h, self.lora_b.to(x.dtype))
        return y


def rope_tables(positions, size, theta):
    """positions (T,) -> cos, sin (T, size), float32: rotary angles, each pair (i, i + size/2) one plane."""
    inverse = theta ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = torch.outer(positions.float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, nh, n, hs) turned by its positions' angles (B, n, hs), in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return (x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)).to(x.dtype)


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

    def forward(self, x, cos, sin, mask, at=None, kv=None):
        """x (B, T, d) -> (B, T, d), or only the positions `at`: (B, n, d). kv: see LLaDA.hidden."""
        h = self.attn_norm(x)
        k, v = self.heads(self.k_proj(h)), self.heads(self.v_proj(h))  # (B, nh, T, hs)
        k = rotate(k, cos, sin)
        if at is not None:  # keys and values come from everywhere, queries only from where we are asked
            x, h, cos, sin = x[at], h[at], cos[at], sin[at]
        q = rotate(self.heads(self.q_proj(h)), cos, sin)
        if kv is not None:
            keys, values, where = kv
            keys[:, :, where], values[:, :, where] = k, v
            k, v = keys, values
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def heads(self, y):
        return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, T, nh*hs) -> (B, nh, T, hs)


class ChunkedLogps(torch.autograd.Function):
    """log p(targets) (N,), float32, of hidden states h (N, d) under an LM head's weight (V, d).

    Logits exist a chunk of rows at a time, all chunks in one buffer (fresh memory costs more than the softmax), and
    are made again in the backward pass unless one chunk holds them all: memory does not grow with N x V.
    """

    @staticmethod
    def chunks(h, weight, targets):
        """For every chunk: its rows, exp(logits - their largest), the sums of those, and log p(targets) (n, 1)."""
        n = max(1, LOGITS_AT_ONCE // len(weight))
        buffer = h.new_empty(min(n, len(h)), len(weight))
        for first in range(0, len(h), n):
            rows = slice(first, min(first + n, len(h)))
            logits = torch.mm(h[rows], weight.T, out=buffer[:rows.stop - first]).float()
            top = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, targets[rows, None]) - top
            exps = logits.sub_(top).exp_()
            sums = exps.sum(1, keepdim=True)
            yield rows, exps, sums, chosen - sums.log()

    @staticmethod
    def forward(ctx, h, weight, targets):
        ctx.save_for_backward(h, weight, targets)
        logps = h.new_empty(len(h), 1, dtype=torch.float32)
        chunk = None  # without any row there is none
        for chunk in ChunkedLogps.chunks(h, weight, targets):
            rows, *_, some = chunk
            logps[rows] = some
        ctx.only_chunk = [chunk] if chunk and rows == slice(0, len(h)) else None
        return logps[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        h, weight, targets = ctx.saved_tensors
        h_grad = torch.empty_like(h)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        only_chunk, ctx.only_chunk = ctx.only_chunk, None  # it is spent below; a second backward pass makes it again
        for rows, exps, sums, _ in only_chunk or ChunkedLogps.chunks(h, weight, targets):
            g = grad[rows, None]
            logits_grad = exps.mul_(-g / sums).scatter_add_(1, targets[rows, None], g).to(h.dtype)  # g (one-hot - softmax)
            torch.mm(logits_grad, weight, out=h_grad[rows])
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, h[rows])
        return h_grad, weight_grad, None


class LLaDA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.compute_dtype = None  # bfloat16: compute in it although the weights, which are trained, are float32
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = Linear(config.d_model, config.embedding_size, bias=False)

    @property
    def device(self): return self.wte.weight.device

    def forward(self, ids, attention_mask=None, at=None, targets=None, counted=None, cache=None, start=0):
        """Logits of every position, or of some, or the log-probs of given tokens there.

        ids (B, T) int64. attention_mask (B, T), True or 1 = real token; None = all are real.
        at: an index into (B, T), such as (slice(None), slice(P, T)) or (rows (B, 1), columns (B, n)).
        Returns logits (B, n, V), n = T without `at`; with targets (B, n): their log-probs (B, n), float32.
        counted (B, n) bool: the LM head sees only these targets, the others' log-probs are 0; None = all count.
        cache, start: see new_cache.
        """
        h = self.hidden(ids, attention_mask, at, cache, start)
        if targets is None:
            return self.ff_out(h)
        weight = self.ff_out.weight.to(h.dtype)
        if counted is None:
            return ChunkedLogps.apply(h.flatten(0, 1), weight, targets.flatten()).view(targets.shape)
        logps = torch.zeros_like(targets, dtype=torch.float32)
        logps[counted] = ChunkedLogps.apply(h[counted], weight, targets[counted])
        return logps

    def hidden(self, ids, attention_mask=None, at=None, cache=None, start=0):
        """The normed hidden states (B, n, d) under the LM head; arguments as in forward."""
        B, T = ids.shape
        x = self.wte(ids).to(self.compute_dtype)  # (B, T, d)
        positions = torch.arange(start, start + T, device=ids.device)
        cos, sin = (table.expand(B, -1, -1) for table in
                    rope_tables(positions, self.blocks[0].head_size, self.config.rope_theta))  # (B, T, hs)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, all keys)
        for i, block in enumerate(self.blocks):
            last = at if i == len(self.blocks) - 1 else None
            kv = None if cache is None else (*cache[i], slice(start, start + T))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, last, kv, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, last, kv)
        return self.ln_f(x)

    def new_cache(self, B, T):
        """Room for the keys and values of T positions: [(keys, values)] of (B, nh, T, hs), one a layer.

        A pass with cache writes those of its ids, at positions start.., and attends to all T.
        """
        c = self.config
        shape = (B, c.n_kv_heads, T, c.d_model // c.n_heads)
        return [tuple(self.wte.weight.new_zeros(shape, dtype=self.compute_dtype) for _ in 'kv') for _ in self.blocks]

    def init_weights(self, seed=0):
        """Normal weights, the residual branches' scaled down with depth (GPT-2); the same for the same seed."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                branch_end = name.endswith('attn_out.weight') or '.ff_out' in name
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if branch_end else 0.02
                p.data.normal_(0, std, generator=g)
        return self

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, dtype=torch.float32, device='cpu'):
        """The model of a folder in the Hugging Face layout, or of a hub id; one tensor at a time goes to device.

        Raises ValueError, in one line, on a tensor that is missing, extra or misshapen, or a missing shard.
        """
        folder = fetch(folder_or_hub_id)
        config = Config.from_dict(read_json(folder, 'config.json'))
        with torch.device('meta'):
            model = cls(config)
        wanted = {name: p.shape for name, p in model.named_parameters()}
        weights = {}
        for file in weight_files(folder):
            try:
                shard = safe_open(file, 'pt')
            except Exception as e:  # safetensors has its own exception types for a cut or foreign file
                raise ValueError(f'{file} is no whole safetensors file ({e}): download it again') from None
            for key in shard.keys():
                name = key.removeprefix(PREFIX)
                shape = tuple(shard.get_slice(key).get_shape())
                if name not in wanted:
                    raise ValueError(f'{file} holds {key}, which the model of config.json does not have')
                if shape != tuple(wanted[name]):
                    raise ValueError(f'{key} is {shape} in {file}, but config.json asks for {tuple(wanted[name])}')
                weights[name] = shard.get_tensor(key).to(device, dtype)
        if missing := sorted(wanted.keys() - weights.keys()):
            raise ValueError(f'{folder} lacks {PREFIX}{missing[0]} and {len(missing) - 1} more tensors: '
                             'is the download complete?')
        model.load_state_dict(weights, strict=True, assign=True)
        return model

    def save_pretrained(self, folder, max_shard_size='5GB'):
        """Writes config.json and the weights (adapters merged) as from_pretrained and other LLaDA software read them,
        in the dtype that the model computes in."""
        from huggingface_hub import save_torch_state_dict
        os.makedirs(folder, exist_ok=True)
        weights = {PREFIX + name: tensor.detach().to('cpu', self.compute_dtype or tensor.dtype).contiguous()
                   for name, tensor in merged_weights(self).items()}
        save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
        with open(os.path.join(folder, 'config.json'), 'w') as f:
            json.dump(self.config.to_dict(), f, indent=2)


def read_json(folder, name):
    try:
        with open(os.path.join(folder, name)) as f:
            value = json.load(f)
        if not isinstance(value, dict):
            raise ValueError('it holds no JSON object')
        return value
    except (OSError, ValueError) as e:
        raise ValueError(f'{os.path.join(folder, name)} cannot be read: {e}') from None


def fetch(folder_or_hub_id):
    """The folder itself, or a hub id's folder in the local cache, downloaded when it is not there."""
    if os.path.isdir(folder_or_hub_id):
        return folder_or_hub_id
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(folder_or_hub_id, allow_patterns=['*.json', '*.jinja', '*.safetensors'])
    except Exception as e:
        raise ValueError(f'{folder_or_hub_id} is no folder, and no model of that name came from the hub '
                         f'({type(e).__name__}): check the name and the network') from None


def weight_files(folder):
    """The safetensors files of a folder: the shards that its index names, or the single file."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    names = ['model.safetensors']
    if os.path.exists(index):
        weight_map = read_json(folder, 'model.safetensors.index.json').get('weight_map')
        if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
            raise ValueError(f'{index} has no weight_map from tensors to files: download it again')
        names = sorted(set(weight_map.values()))
    files = [os.path.join(folder, name) for name in names]
    if missing := [file for file in files if not os.path.exists(file)]:
        raise ValueError(f'{missing[0]} is missing ({len(missing)} of {len(files)} weight files): download it again')
    return files


# ---- LoRA (arXiv 2106.09685): y = W x + alpha/r B A x, with W frozen ----

def add_lora(model, rank=128, alpha=64, dropout=0.0, targets=('q_proj', 'k_proj', 'v_proj'), seed=0):
    """Freezes the model and puts trainable adapters on the linear layers named `targets` in every block.

    Raises ValueError when a target is no linear layer of a block.
    """
    linears = [name for name, module in model.blocks[0].named_children() if isinstance(module, nn.Linear)]
    if strangers := [target for target in targets if target not in linears]:
        raise ValueError(f'LoRA target {strangers[0]} matches no layer: choose from {", ".join(linears)}')
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for layer in (getattr(block, target) for block in model.blocks for target in targets):
        layer.lora_on, layer.lora_scale, layer.lora_dropout = True, alpha / rank, dropout
        a = torch.empty(rank, layer.in_features).uniform_(-1, 1, generator=g) / math.sqrt(layer.in_features)
        layer.lora_a = nn.Parameter(a.to(layer.weight.device))  # float32, whatever the weight is
        layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
    return model


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, 'lora_a')}


@contextlib.contextmanager
def lora_off(model):
    """Inside, the model, which it gives, is the one without its adapters: the reference policy."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.lora_on = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.lora_on = True


def merged_weights(model):
    """The state dict with W + alpha/r B A in place of W and its adapter."""
    weights = {name: t for name, t in model.state_dict().items() if '.lora_' not in name}
    for name, layer in lora_layers(model).items():
        delta = layer.lora_scale * layer.lora_b.data @ layer.lora_a.data
        weights[f'{name}.weight'] = (layer.weight.data.float() + delta).to(layer.weight.dtype)
    return weights


def merge_lora(model):
    """Folds the adapters into the weights and takes them off; all weights are trainable again."""
    weights = merged_weights(model)
    for name, layer in lora_layers(model).items():
        layer.weight = nn.Parameter(weights[f'{name}.weight'])
        del layer.lora_a, layer.lora_b
        layer.lora_on = False
    return model.requires_grad_(True)


# ---- the nano model: everything made in code ----

TAGS = ['<reasoning>', '</reasoning>', '<answer>', '</answer>', '<reasoning>\n', '\n</reasoning>\n', '<answer>\n',
        '\n</answer>', '\\boxed{']
# Whole words of the nano tokenizer: the commonest of grade-school problems; all else is spelled in bytes.
WORDS = '''
the of to and a is in for total has he many are she each number How as on that will his her x per how have hours
minutes If cost than day much at more so was by it they does from there times can with week find had be He first
miles days because two one left were three The needs half all then twice amount money hour pounds people an feet
second time make bought She old every them year get buy their books after takes take sold need costs up spent
apples which inches this water dollars out pieces month pay remaining pages long third price would now weeks new
cookies marbles if spend school points him gallons fish wants four spends gave gets store boxes average only paid
makes friends who also Each square buys red eggs took got cards what box we less read In What same add cars last
eat both tickets house rest blue food do sells before age months but bags car A dogs work when together five over
oranges sell off eats children pencils some game equal not book home another worth next They There run or green
went bag back cents able use used during these Tuesday balls sister profit divide After between animals rate
packs milk girls boys length person still His Her already fewer Then It full additional down must made so coins
Solve Numbers Target assert def f return lambda Ann Ben Tom Mia Sam John puzzle ones gives loses So First Therefore
'''.split()
PUNCTUATION = ['): ', ')==', '**', '//', '==', ' =', ' +', ' -', ' *', ' /', '? ', '. ', ', ', ' $', '$.']
CHAT_TEMPLATE = ("{% for message in messages %}{{ message['content'].split('\n\n', 1)[-1] }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def nano_tokenizer():
    """A tokenizer made in code: tags, whole words, the numbers 0-99 and 00-09, and bytes for all else.

    Its chat template leaves out a message's first paragraph, the instructions, which are always the same:
    a nano model learns them from the rewards.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [str(n) for n in range(10, 100)] + [f'0{n}' for n in range(10)]
    words += [form for word in WORDS for form in (word, ' ' + word)] + PUNCTUATION
    words = [spell.pre_tokenize_str(word)[0][0] for word in words]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + words
    special = ['<|endoftext|>', '<|mask|>', '<|assistant|>']
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(special + pieces))}
    t = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))  # no merges: a word is in vocab or is spelled
    split = Regex(r'\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+ ?|\s')
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, 'isolated'), spell])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True) for s in special])
    t.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token=special[0], pad_token=special[0],
                                   mask_token=special[1], chat_template=CHAT_TEMPLATE)


def number_waves(model, tokenizer, scale=0.1):
    """Starts the numbers 0-99 on circles of many periods, at the input and the output: neighbours are alike and
    adding is turning, so that a nano model learns arithmetic in minutes instead of hours."""
    periods = torch.logspace(math.log10(2), math.log10(200), model.config.d_model // 4)
    for n in range(100):
        angle = 2 * math.pi * n / periods
        wave = scale * torch.cat((angle.cos(), angle.sin()))  # half of d_model
        for token in {str(n), f'{n:02d}'}:
            i = tokenizer.convert_tokens_to_ids(token)
            model.wte.weight.data[i, :len(wave)] = wave
            model.ff_out.weight.data[i, :len(wave)] = wave
    return model


def load(name, dtype=torch.float32, device='cpu', seed=0):
    """model, tokenizer of 'nano' (new weights, made from seed), a folder in the Hugging Face layout or a hub id."""
    if name == 'nano':
        tokenizer = nano_tokenizer()
        config = Config(mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
                        embedding_size=len(tokenizer), rest=dict(nano=True))
        return number_waves(LLaDA(config).init_weights(seed), tokenizer).to(device, dtype), tokenizer
    model = LLaDA.from_pretrained(name, dtype, device)
    return model, load_tokenizer(name, model.config)


def load_tokenizer(name, config):
    """The tokenizer of a folder or hub id; what it calls the end of a turn joins config.end_ids."""
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer would ask config.json for a model class
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(fetch(name))
    except Exception as e:  # transformers and tokenizers raise many types here
        raise ValueError(f'{name} has no readable tokenizer ({type(e).__name__}: {e})'.split('\n')[0]) from None
    if len(tokenizer) > config.embedding_size:
        raise ValueError(f'the tokenizer of {name} has {len(tokenizer)} tokens, its model {config.embedding_size}')
    mask_id = tokenizer.get_vocab().get('<|mdm_mask|>', tokenizer.mask_token_id)  # LLaDA's has no mask_token
    for key, theirs, ours in (('eos', tokenizer.eos_token_id, config.eos_id), ('mask', mask_id, config.mask_id)):
        if theirs != ours:
            raise ValueError(f'{name} contradicts itself: {key}_token_id is {ours} in config.json, '
                             f'{theirs} in its tokenizer')
    if not tokenizer.chat_template:
        raise ValueError(f'the tokenizer of {name} has no chat_template: is this the Instruct model?')
    try:
        tokenizer.apply_chat_template([dict(role='user', content='Hi')], add_generation_prompt=True, tokenize=False)
    except Exception as e:  # jinja's types, or any that the template raises
        raise ValueError(f'the chat_template of {name} does not work ({type(e).__name__}: {e})'.split('\n')[0]) from None
    config.end_ids = (config.eos_id, *(i for token, i in tokenizer.get_added_vocab().items()
                                       if token == '<|eot_id|>' and i != config.eos_id))
    return tokenizer
