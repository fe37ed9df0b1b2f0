"""The GPU memory that LLaDA-8B needs, computed from the code's own shapes; no GPU, no weights.

    python tests/memory.py
The code runs on the meta device, where tensors have shapes but no memory, while every storage that
it makes is counted until it is freed. Left out: the allocator's rounding and fragments, CUDA's own
0.5 to 1 GB, NCCL's buffers, what kernels need inside. Attention counts as a fused kernel: without
its (T, T) matrix.
"""
import contextlib
import os
import sys
import weakref

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from loglik import completion_logps
from model import Config, LLaDA, add_lora, lora_layers, merge_layer
from sample import choose

torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True     # every token is scored

# GSAI-ML/LLaDA-8B-Instruct
CONFIG = dict(d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, mlp_hidden_size=12288,
              embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0,
              mask_id=126336, eos_id=126081)


def storages(tree):
    return {t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for storage in storages(out) - old:
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, size):
        self.now -= size


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: q, k, v, the output, and one float32 per query and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, torch.empty(q.shape[:-1], device=q.device))
        return y

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextlib.contextmanager
def fused_attention():
    plain = F.scaled_dot_product_attention

    def fused(q, k, v, attn_mask=None, enable_gqa=False):
        return FusedAttention.apply(q, k, v)
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def build(config, lora_rank, device='meta'):
    """The model as train.py makes it for bfloat16; gradients stand as after a first micro-batch."""
    with torch.device(device):
        model = LLaDA(Config(**config))
    if lora_rank:
        targets = ('q_proj', 'k_proj', 'v_proj', 'up_proj')
        add_lora(model.to(torch.bfloat16), lora_rank, targets=targets)
    model.compute_dtype = torch.bfloat16
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def grpo_pass(model, B, P, L):
    prompt_ids = torch.zeros(B, P, dtype=torch.long, device=model.device)
    completion_ids = torch.zeros(B, L, dtype=torch.long, device=model.device)
    prompt_mask = torch.zeros_like(prompt_ids, dtype=torch.bool)
    completion_logps(model, prompt_ids, completion_ids, prompt_mask).sum().backward()


@torch.no_grad()
def rollout_step(model, B, T, n):
    ids = torch.zeros(B, T, dtype=torch.long, device=model.device)
    positions = torch.zeros(B, n, dtype=torch.long, device=model.device)
    choose(model(ids, positions=positions), model.config.mask_id, 0.9)


def adamw_step(model):
    """foreach is what PyTorch takes for weights on a GPU; its temporaries are as large as they."""
    torch.optim.AdamW(trained(model), 3e-6, foreach=True).step()


def merge(model):
    """What merge_lora does on the device; the adapters' copies go to the CPU."""
    for layer in lora_layers(model):
        merge_layer(layer)


def peak(step, *arguments):
    """The most bytes that the step holds beside what stood before it."""
    with Live() as live:
        step(*arguments)
    return live.peak


def rows(config, lora_rank, settings):
    """{row: bytes} for adapters of lora_rank, or for all weights when it is 0."""
    G, P, L, sft_length, block_length = settings
    model = build(config, lora_rank)
    weights = size(trained(model))
    standing = {
        'weights, frozen (bfloat16)': size(p for p in model.parameters() if not p.requires_grad),
        'weights, trained (float32)': weights,
        'their gradients': size(p.grad for p in trained(model)),
        "AdamW's two moments": 2 * weights,
        # adapters can be switched off; else a frozen copy in bfloat16
        'reference policy': 0 if lora_rank else weights // 2}
    passing = {}
    for kind in ('with', 'without'):
        model.gradient_checkpointing = kind == 'with'
        passing[f'diffu-GRPO pass, {G} x {P + L}, {kind} checkpointing'] = peak(
            grpo_pass, model, G, P, L)
        passing[f'SFT pass, 1 x {P + sft_length}, {kind} checkpointing'] = peak(
            grpo_pass, model, 1, P, sft_length)
    passing[f'rollout step, {G} x {P + L}'] = peak(rollout_step, model, G, P + L, block_length)
    passing["AdamW's temporaries"] = peak(adamw_step, model) - 2 * weights   # without the moments
    passing['merging the adapters'] = peak(merge, model) if lora_rank else 0
    found = {**standing, **passing}
    for kind, other in (('with', 'without'), ('without', 'with')):
        most = max(passing[name] for name in passing if f' {other} ' not in name)
        found[f'**all on one GPU, {kind} checkpointing**'] = sum(standing.values()) + most
    return found


def main():
    import train
    args = train.parse(['--model', 'GSAI-ML/LLaDA-8B-Instruct'])
    settings = (args.num_generations, args.max_prompt, args.gen_length, args.sft_length,
                args.block_length)
    with fused_attention():
        columns = [rows(CONFIG, args.lora_rank, settings), rows(CONFIG, 0, settings)]
    print(f'| GB (10^9 bytes), computed | LoRA, rank {args.lora_rank} | all weights |')
    print('| --- | --- | --- |')
    for name in columns[0]:
        cells = [f'{column[name] / 1e9:.1f}' for column in columns]
        print(f'| {name} | {cells[0]} | {cells[1]} |')


if __name__ == '__main__':
    main()
