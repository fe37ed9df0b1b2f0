"""What the tests share: small random models, ways to bias what they say, where the numbers are."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from model import Config, LLaDA, read_config

torch.set_num_threads(1)     # matrices this small are slower with more
SHARED = Path(__file__).resolve().parents[2] / 'shared'
GOLDEN = Path(__file__).resolve().parent / 'golden'
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='../shared is not here')
V, MASK, EOS = 40, 1, 0


def tiny(seed=0, **keys):
    """A LLaDA of 2 layers, fewer key than query heads, weights so large that it has opinions."""
    keys = dict(d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, mlp_hidden_size=48,
                embedding_size=V, mask_id=MASK, eos_id=EOS) | keys
    model = LLaDA(Config(**keys))
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=g)
        p.data = 0.25 * noise if p.dim() == 2 else 1 + 0.1 * noise
    return model.eval()


def bias(model, amounts):
    """Adds {token: amount} to the model's logits."""
    def hook(module, inputs, logits):
        logits = logits.clone()
        for token, amount in amounts.items():
            logits[..., token] += amount
        return logits
    model.ff_out.register_forward_hook(hook)
    return model


def says(logits, **keys):
    """A model that gives the same logits (V,) everywhere."""
    model = tiny(embedding_size=len(logits), **keys)
    model.ff_out.weight.data[:] = torch.tensor(logits)[:, None]

    def constant(module, inputs, h):
        return torch.full_like(h, 1 / h.size(-1))
    model.ln_f.register_forward_hook(constant)
    return model


def tokens(*shape, seed=0, low=2, high=V):
    """Random ids that are neither mask nor end."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def left_pad(prompts):
    """A list of 1-d prompts -> ids (B, P), attention_mask (B, P), with noise for padding."""
    P = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat((tokens(P - len(p), seed=9), p)) for p in prompts])
    return ids, torch.stack([torch.arange(P) >= P - len(p) for p in prompts])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def grad_norm(model):
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


def assert_same(ours, theirs, tolerance):
    """Two dictionaries of tensors are equal, relative to the size of each tensor."""
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        gap = (ours[name] - theirs[name]).abs().max().item()
        assert gap <= tolerance * max(theirs[name].abs().max().item(), 1e-3), f'{name}: {gap}'


def edit_json(path, **keys):
    """Sets keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def byte_tokenizer(special, prefix_space):
    """A tokenizer whose tokens are bytes, and the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=prefix_space)
    alphabet = {c: i for i, c in enumerate(sorted(spell.alphabet()))}
    t = Tokenizer(models.BPE(alphabet, merges=[]))
    t.pre_tokenizer = spell
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(text, special=True) for text in special])
    return t


def llada_folder(folder, dtype=torch.float32):
    """A small model in the 8B's layout: its config and tokenizer files, a byte tokenizer.json."""
    source = SHARED / 'llada-8b'
    added = json.loads((source / 'tokenizer_config.json').read_text())['added_tokens_decoder']
    t = byte_tokenizer([added[i]['content'] for i in sorted(added, key=int)], True)
    folder.mkdir()
    t.save(str(folder / 'tokenizer.json'))
    for name in ('config.json', 'tokenizer_config.json', 'special_tokens_map.json'):
        shutil.copyfile(source / name, folder / name)
    end = t.token_to_id('<|endoftext|>')
    edit_json(folder / 'config.json', d_model=16, n_heads=2, n_kv_heads=2, n_layers=1,
              mlp_hidden_size=16, vocab_size=t.get_vocab_size(), embedding_size=t.get_vocab_size(),
              eos_token_id=end, pad_token_id=end, mask_token_id=t.token_to_id('<|mdm_mask|>'))
    config = read_config(folder)
    model = LLaDA(config).to(dtype)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.02, generator=g)
    model.save_pretrained(folder)
    return folder


QWEN3_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}")


def qwen3_folder(folder, tied=True, dtype=torch.float32):
    """A random checkpoint written by transformers; returns it, with tokens that are bytes."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    t = byte_tokenizer(['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|mask|>'], False)
    PreTrainedTokenizerFast(
        tokenizer_object=t, eos_token='<|im_end|>', pad_token='<|endoftext|>',
        chat_template=QWEN3_TEMPLATE).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=t.get_vocab_size() + 8, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rope_parameters=dict(rope_type='default', rope_theta=500.0), tie_word_embeddings=tied,
        max_position_embeddings=4096, eos_token_id=t.token_to_id('<|im_end|>'),
        mask_token_id=t.token_to_id('<|mask|>'), attn_implementation='eager',
        initializer_range=0.2, rms_norm_eps=0.1)
    qwen = Qwen3ForCausalLM(config).eval()
    for name, p in qwen.named_parameters():
        if p.dim() == 1:                         # norms start at 1: move them
            p.data += 0.1 * torch.randn(p.shape)
    qwen.to(dtype).save_pretrained(folder)
    return qwen
