"""Memory and seconds of LLaDA-8B's and Qwen3-0.6B's shapes, with random weights. No network.

    python tests/tools/gpu.py                computed memory; on a machine with a GPU measured, too
    python tests/tools/gpu.py --tiny         a tiny model, also on the CPU: does it run?
Memory is computed on the meta device, where tensors have shapes but no content, while every storage
that is made counts until it is freed. Left out are the allocator's fragments, CUDA's own 0.5 to
1 GB, NCCL's buffers and what kernels need inside. The last row is a nano run on the device.
"""
import argparse
import contextlib
import sys
import tempfile
import time
import weakref
from pathlib import Path

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))     # the folder of the seven modules

from grpo import rollout                                                     # noqa: E402
from loglik import completion_logps, random_prompt_mask                      # noqa: E402
from model import Config, LLaDA, add_lora, last_adapter_off                  # noqa: E402
from sample import choose                                                    # noqa: E402
from sft import masked_loss                                                  # noqa: E402

LLADA = dict(d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, mlp_hidden_size=12288,
             embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0,
             mask_id=126336, eos_id=126081)
QWEN3 = dict(layout='qwen3', d_model=1024, n_heads=16, n_kv_heads=8, n_layers=28, head_dim=128,
             mlp_hidden_size=3072, embedding_size=151936, rope_theta=1e6, qk_norm=True,
             weight_tying=True, mask_id=151669, eos_id=151645, rms_norm_eps=1e-6)
TINY = dict(d_model=64, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=128,
            embedding_size=1000)
SIZES = dict(rank=128, G=6, P=200, L=256, steps=128, block_length=32, sft_length=3584)
TINY_SIZES = dict(rank=4, G=2, P=8, L=16, steps=8, block_length=8, sft_length=32)


# ---- work ----

def build(config, rank, device):
    """The model of d1's second stage: SFT's adapter and the one in training, or all weights."""
    with torch.device(device):
        model = LLaDA(Config(**config))
    model.compute_dtype = torch.bfloat16
    if rank:
        model.to(torch.bfloat16)
        add_lora(model, rank, 2 * rank, ('q_proj', 'k_proj', 'v_proj'))
        add_lora(model, rank, 64, ('q_proj', 'k_proj', 'v_proj', 'up_proj'))
    return model


def new_optimizer(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, 1e-6, foreach=True)        # as PyTorch does on a GPU


def random_ids(model, *shape):
    return torch.randint(2, 900, shape, device=model.device)


def update(model, optimizer, sizes):
    """Two micro-batches of diffu-GRPO and a step; gradients stand while the second one passes."""
    prompt_ids = random_ids(model, sizes['G'], sizes['P'])
    completion_ids = random_ids(model, sizes['G'], sizes['L'])
    prompt_mask = torch.zeros_like(prompt_ids, dtype=torch.bool)
    mask = torch.ones_like(completion_ids, dtype=torch.bool)
    advantages = torch.ones(sizes['G'], device=model.device)
    for _ in range(2):
        logps = completion_logps(model, prompt_ids, completion_ids, prompt_mask, mask)
        ratio = (logps - logps.detach()).exp()
        (ratio * advantages[:, None]).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sft_update(model, optimizer, sizes):
    ids = random_ids(model, 1, sizes['P'] + sizes['sft_length'])
    answers = ids[:, sizes['P']:]
    masked = torch.ones_like(answers, dtype=torch.bool)
    t = torch.ones(1, 1, device=model.device)
    for _ in range(2):
        logps = model.token_logps(ids, answers, masked)
        masked_loss(logps, masked, t, answers.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def rollout_step(model, sizes):
    """A step of the sampler, whose inputs and outputs have the sizes of every step of a block."""
    G, T = sizes['G'], sizes['P'] + sizes['L']
    positions = torch.zeros(G, sizes['block_length'], dtype=torch.long, device=model.device)
    choose(model(random_ids(model, G, T), positions=positions), 0.9)


# ---- memory, computed ----

torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True     # every token is scored


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

    def fused(q, k, v, attn_mask=None):
        return FusedAttention.apply(q, k, v)
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def computed_memory(config, rank, sizes):
    """{piece: bytes at its peak, weights and AdamW's state included}."""
    model = build(config, rank, 'meta')
    optimizer = new_optimizer(model)
    standing = size(model.parameters())
    if not rank:                                 # the reference is a frozen copy in bfloat16
        standing += standing // 2
    found = {'weights, and the reference policy': standing}
    with fused_attention(), Live() as live:
        for kind in ('with', 'without'):
            model.gradient_checkpointing = kind == 'with'
            for name, work in (('update', update), ('SFT update', sft_update)):
                live.peak = live.now
                work(model, optimizer, sizes)
                found[f'{name}, {kind} checkpointing'] = standing + live.peak
        live.peak = live.now                     # AdamW's state
        rollout_step(model, sizes)
        found['rollout step'] = standing + live.peak
    return found


def computed_table(name, config, sizes):
    columns = [computed_memory(config, rank, sizes) for rank in (sizes['rank'], 0)]
    print(f'| {name}: GB (10^9 bytes), computed | LoRA, rank {sizes["rank"]} | all weights |\n'
          '| --- | --- | --- |')
    for piece in columns[0]:
        cells = [f'{column[piece] / 1e9:.1f}' for column in columns]
        print(f'| {piece} | {cells[0]} | {cells[1]} |', flush=True)
    print()


# ---- memory and seconds, measured ----

class Numbers:
    """A tokenizer for random weights: ids as text."""

    def decode(self, ids, skip_special_tokens=True):
        return ' '.join(map(str, ids.tolist()))


def measure(device, work, *arguments):
    """Runs work once to warm up and once on the clock: peak GB and seconds, as text."""
    def synchronize():
        if device == 'cuda':
            torch.cuda.synchronize()
    try:
        work(*arguments)
        synchronize()
        if device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        began = time.time()
        work(*arguments)
        synchronize()
    except torch.OutOfMemoryError:
        return 'out of memory | -'
    seconds = time.time() - began
    peak = f'{torch.cuda.max_memory_allocated() / 1e9:.1f}' if device == 'cuda' else '-'
    return f'{peak} | {seconds:.3g}'


def pieces(model, device, sizes):
    """Yields (name of a piece of work, its measured cells) with LoRA."""
    G, P, L = sizes['G'], sizes['P'], sizes['L']
    optimizer = new_optimizer(model)
    prompt = random_ids(model, P).tolist()
    problems = [(number, 'gsm8k', prompt, dict(question='', answer=1.0)) for number in range(4)]

    def sample(groups, cache=False):
        knobs = dict(gen_length=L, steps=sizes['steps'], block_length=sizes['block_length'],
                     temperature=0.9, cache=cache)
        return rollout(model, Numbers(), problems[:groups], G, knobs, seed=0, step=0)
    for groups in (1, 4):
        yield f'rollout, {groups} x {G} completions', measure(device, sample, groups)
        yield f'rollout, {groups} x {G} completions, cache', measure(device, sample, groups, True)

    [group] = sample(1, cache=True)
    prompt_mask = random_prompt_mask(group.prompt_ids, 0.15)

    @torch.no_grad()
    def policy_logps():
        return completion_logps(model, group.prompt_ids, group.completion_ids, prompt_mask)

    def reference_logps():
        with last_adapter_off(model):
            return policy_logps()
    yield 'old log-probs of a group', measure(device, policy_logps)
    yield 'reference log-probs of a group', measure(device, reference_logps)
    for kind in ('with', 'without'):
        model.gradient_checkpointing = kind == 'with'
        yield f'update, {kind} checkpointing', measure(device, update, model, optimizer, sizes)
        cells = measure(device, sft_update, model, optimizer, sizes)
        yield f'SFT update, {kind} checkpointing', cells

    if device == 'cuda':
        model.gradient_checkpointing = True
        for block in model.blocks:
            block.compile(dynamic=True)
        yield 'update, compiled', measure(device, update, model, optimizer, sizes)
        yield f'rollout, 1 x {G} completions, compiled', measure(device, sample, 1)


def measured_table(models, device, sizes):
    gpu = torch.cuda.get_device_name() if device == 'cuda' else 'no GPU here'
    print(f'{device}, {gpu}, torch {torch.__version__}, bfloat16, LoRA of rank {sizes["rank"]}\n\n'
          '| model | piece | peak GB | seconds |\n| --- | --- | --- | --- |')
    for name, config in models.items():
        model = build(config, sizes['rank'], device)
        for piece, cells in pieces(model, device, sizes):
            print(f'| {name} | {piece} | {cells} |', flush=True)
        del model
        if device == 'cuda':
            torch.cuda.empty_cache()


def nano_run(device):
    """A short nano run on the device, end to end."""
    import train
    flags = ('--grpo_steps 2 --sft_steps 2 --num_prompts 2 --num_generations 4 --eval_n 8 '
             '--eval_lengths 32')
    began = time.time()
    with tempfile.TemporaryDirectory() as out:
        train.main([*flags.split(), '--device', device, '--out', out])
    print(f'\na nano run of 2 iterations on {device}: {time.time() - began:.1f} s')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tiny', action='store_true', help='a tiny model, in seconds')
    args = p.parse_args(argv)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    models, sizes = {'LLaDA-8B': LLADA, 'Qwen3-0.6B': QWEN3}, SIZES
    if args.tiny:
        models, sizes = dict(tiny=TINY), TINY_SIZES
    for name, config in models.items():
        computed_table(name, config, sizes)
    if args.tiny or device == 'cuda':
        measured_table(models, device, sizes)
        nano_run(device)


if __name__ == '__main__':
    main()
