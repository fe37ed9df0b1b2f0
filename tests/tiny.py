"""What the tests share: a small random LLaDA, ways to bias what it says, where the numbers are."""
from pathlib import Path

import pytest
import torch

from model import Config, LLaDA

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
