"""The README's table of GPU memory: what LLaDA-8B needs, computed from the code's own shapes; no GPU, no weights, seconds.

    python tests/memory.py
The code runs on the meta device, where tensors have shapes but no memory, while every storage that it makes is counted
until it is freed. Left out: the allocator's rounding and fragments, CUDA's own 0.5 to 1 GB, the buffers of DDP and NCCL, and what
kernels need inside. Attention counts as a fused kernel: without its (T, T) matrix.
"""
import contextlib
import os
import sys
import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from loglik import completion_logps
from model import Config, LLaDA, add_lora
from sample import choose

# GSAI-ML/LLaDA-8B-Instruct
CONFIG = dict(d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, mlp_hidden_size=12288, embedding_size=126464,
              max_sequence_length=4096, rope_theta=500000.0, mask_token_id=126336, eos_token_id=126081)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)} - old:
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, size):
        self.now -= size


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: q, k, v, the output, and one float32 a query and head."""

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
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, enable_gqa=False: FusedAttention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def build(config, lora_rank, checkpointing, device='meta'):
    """The model as train.py makes it for bfloat16, its gradients in place as after a first micro-batch."""
    with torch.device(device):
        model = LLaDA(Config(**config))
    if lora_rank:
        add_lora(model.to(torch.bfloat16), lora_rank, targets=('q_proj', 'k_proj', 'v_proj', 'up_proj'))
    model.compute_dtype, model.gradient_checkpointing = torch.bfloat16, checkpointing
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return model


def grpo_pass(model, B, P, L):
    prompt_ids, completion_ids = (torch.zeros(B, n, dtype=torch.long, device=model.device) for n in (P, L))
    completion_logps(model, prompt_ids, completion_ids, torch.zeros_like(prompt_ids, dtype=torch.bool)).sum().backward()


@torch.no_grad()
def rollout_step(model, B, T, columns):
    ids = torch.zeros(B, T, dtype=torch.long, device=model.device)
    at = torch.arange(B, device=model.device)[:, None], torch.zeros(B, columns, dtype=torch.long, device=model.device)
    choose(model(ids, at=at), model.config.mask_id, 0.9, 'low_confidence', None)


def peak(step, *arguments):
    with Live() as live:
        step(*arguments)
    return live.peak


def rows(config, lora_rank, settings):
    """{row: bytes} for adapters of lora_rank, or for all weights when it is 0."""
    G, P, L, sft_length, block_length = settings
    found = {}
    for checkpointing in (True, False):
        model = build(config, lora_rank, checkpointing)
        trained = [p for p in model.parameters() if p.requires_grad]
        if checkpointing:
            found['weights, frozen (bfloat16)'] = size(p for p in model.parameters() if not p.requires_grad)
            found['weights, trained (float32)'] = size(trained)
            found['their gradients'] = size(p.grad for p in trained)
            found["AdamW's two moments"] = 2 * size(trained)
            found['reference policy'] = 0 if lora_rank else 2 * sum(p.numel() for p in model.parameters())
            standing = sum(found.values())
        kind = 'with' if checkpointing else 'without'
        for name, shape in ((f'diffu-GRPO pass, {G} x {P + L}', (G, P, L)), (f'SFT pass, 1 x {P + sft_length}', (1, P, sft_length))):
            found[f'{name}, {kind} checkpointing'] = peak(grpo_pass, model, *shape)
    found[f'rollout step, {G} x {P + L}'] = peak(rollout_step, model, G, P + L, block_length)
    passes = {name: found[name] for name in found if 'checkpointing' in name}
    found['all weights over 8 GPUs (FSDP2), each, in rollouts'] = 0 if lora_rank else (
        standing // 8 + found['reference policy'] + found[f'rollout step, {G} x {P + L}'])  # the policy is whole there
    for kind in ('with', 'without'):
        found[f'**all on one GPU, {kind} checkpointing**'] = standing + max(v for name, v in passes.items() if f' {kind} ' in name)
    return found


def main():
    import train
    args = train.parse(['--model', 'GSAI-ML/LLaDA-8B-Instruct'])
    settings = args.num_generations, args.max_prompt, args.gen_length, args.sft_length, args.block_length
    with fused_attention():
        columns = [rows(CONFIG, args.lora_rank, settings), rows(CONFIG, 0, settings)]
    print(f'| GB (10^9 bytes), computed | LoRA, rank {args.lora_rank} | all weights |\n| --- | --- | --- |')
    for name in columns[0]:
        print(f'| {name} | ' + ' | '.join(f'{column[name] / 1e9:.1f}' if column[name] else '-' for column in columns) + ' |')


if __name__ == '__main__':
    main()
