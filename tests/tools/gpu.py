"""What only a GPU can tell: memory and seconds of the real shapes, with random weights. No network.

    python tests/gpu.py                    LLaDA-8B's and Qwen3-0.6B's shapes; minutes on an H100
    python tests/gpu.py --tiny             a tiny model, also on the CPU: the same table, in seconds
Prints a row per piece of work: peak memory, seconds, and what memory.py computes for it. The last
rows are a nano run end to end on the device.
"""
import argparse
import os
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]

import memory
from grpo import fixed_logps, grpo_loss, rollout
from loglik import completion_logps, draw_views, random_prompt_mask
from model import Config, LLaDA, add_lora, merge_lora
from sft import masked_loss

QWEN3 = dict(layout='qwen3', d_model=1024, n_heads=16, n_kv_heads=8, n_layers=28, head_dim=128,
             mlp_hidden_size=3072, embedding_size=151936, rope_theta=1e6, qk_norm=True,
             weight_tying=True, mask_id=151669, eos_id=151645, rms_norm_eps=1e-6)
TINY = dict(d_model=64, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=128,
            embedding_size=1000)
SIZES = dict(G=6, P=200, L=256, steps=128, block_length=32, sft_length=3584)
TINY_SIZES = dict(G=2, P=8, L=16, steps=8, block_length=8, sft_length=32)


class Numbers:
    """A tokenizer for random weights: ids as text."""

    def decode(self, ids, skip_special_tokens=True):
        return ' '.join(map(str, ids.tolist()))


def synchronize(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def measure(device, work):
    """Runs work() once to warm up and once on the clock; (peak GB or None, seconds, result)."""
    work()
    synchronize(device)
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    result = work()
    synchronize(device)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if device == 'cuda' else None
    return gigabytes, time.time() - began, result


def build(config, device, dtype, checkpointing):
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LLaDA(Config(**config))
    torch.set_default_dtype(torch.float32)
    model.compute_dtype = dtype
    model.gradient_checkpointing = checkpointing
    return model


def pieces(config, device, dtype, sizes, computed):
    """Yields (piece, peak GB, seconds, computed GB) of one model."""
    G, P, L = sizes['G'], sizes['P'], sizes['L']
    sampling = dict(gen_length=L, steps=sizes['steps'], block_length=sizes['block_length'],
                    temperature=0.9)
    model = build(config, device, dtype, True)
    add_lora(model, 128 if config is not TINY else 4, 64, ('q_proj', 'k_proj', 'v_proj', 'up_proj'))
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, 900, (P,), generator=g).tolist()
    problems = [(k, 'gsm8k', prompt, dict(question='', answer=1.0)) for k in range(4)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6)

    def sample(groups, cache):
        return rollout(model, Numbers(), problems[:groups], G, dict(sampling, cache=cache), 0, 0)
    for cache in (False, True):
        for groups in (1, 4):
            gigabytes, seconds, found = measure(device, lambda: sample(groups, cache))
            name = f'rollout, {groups} x {G} completions' + (', cache' if cache else '')
            yield name, gigabytes, seconds, None
    group = found[0]
    group.prompt_masks = [random_prompt_mask(group.prompt_ids, 0.15) for _ in range(4)]
    group.views = [draw_views('one_step', 1, group.order) for _ in range(4)]

    def fixed():
        return fixed_logps(model, model, group, 'grpo', 0.04)
    gigabytes, seconds, (old, ref) = measure(device, fixed)
    yield 'old and reference log-probs, 4 masks', gigabytes, seconds, None

    def update():
        logps = completion_logps(model, group.prompt_ids, group.completion_ids,
                                 group.prompt_masks[0], group.completion_mask)
        loss, _ = grpo_loss(logps, old[0], ref[0], group.advantages, group.completion_mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def sft():
        ids = torch.randint(2, 900, (1, P + sizes['sft_length']), device=device)
        answers = ids[:, P:]
        scored = torch.rand(answers.shape, device=device) < 0.5
        logps = model.token_logps(ids, answers, scored)
        masked_loss(logps, scored, torch.ones(1, 1, device=device), answers.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for kind in ('with', 'without'):
        model.gradient_checkpointing = kind == 'with'
        for name, work in (('update', update), ('SFT update', sft)):
            try:
                gigabytes, seconds, _ = measure(device, work)
            except torch.OutOfMemoryError:
                gigabytes, seconds = None, float('nan')
            expected = computed.get(kind) if name == 'update' else None
            yield f'{name}, {kind} checkpointing', gigabytes, seconds, expected
    model.gradient_checkpointing = True
    reference = completion_logps(model, group.prompt_ids, group.completion_ids,
                                 group.prompt_masks[0]).detach()
    if device == 'cuda' or config is TINY:
        for block in model.blocks:
            block.compile(dynamic=True, backend='inductor' if device == 'cuda' else 'eager')
        gigabytes, seconds, _ = measure(device, update)
        yield 'update, compiled', gigabytes, seconds, None
        gigabytes, seconds, _ = measure(device, lambda: sample(1, False))
        yield f'rollout, 1 x {G}, compiled', gigabytes, seconds, None
        again = completion_logps(model, group.prompt_ids, group.completion_ids,
                                 group.prompt_masks[0]).detach()
        yield f'compiled log-probs differ by {(again - reference).abs().max():.1e}', None, 0, None
    began = time.time()
    merge_lora(model)
    synchronize(device)
    yield 'merging the adapters', None, time.time() - began, None
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        torch.save(optimizer.state_dict(), os.path.join(folder, 'checkpoint.pt'))
        yield "writing the optimizer's state", None, time.time() - began, None


def table(models, device, dtype, sizes, computed):
    print(f'{device}, {torch.cuda.get_device_name() if device == "cuda" else "no GPU here"}, torch '
          f'{torch.__version__}, {dtype}\n')
    print('| model | piece | peak GB | seconds | computed GB |\n| --- | --- | --- | --- | --- |')
    for name, config in models.items():
        for piece, gigabytes, seconds, expected in pieces(config, device, dtype, sizes,
                                                          computed.get(name, {})):
            cells = ['-' if value is None else f'{value:.1f}' for value in (gigabytes, expected)]
            print(f'| {name} | {piece} | {cells[0]} | {seconds:.3g} | {cells[1]} |', flush=True)
        if device == 'cuda':
            torch.cuda.empty_cache()


def nano_run(device):
    """A short nano run on the device, end to end."""
    import train
    with tempfile.TemporaryDirectory() as out:
        began = time.time()
        train.main(['--device', device, '--out', out, '--grpo_steps', '2', '--sft_steps', '2',
                    '--num_prompts', '2', '--num_generations', '4', '--eval_n', '8',
                    '--eval_lengths', '32'])
        print(f'\na nano run of 2 iterations on {device}: {time.time() - began:.1f} s')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tiny', action='store_true', help='a tiny model, in seconds')
    args = p.parse_args(argv)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not args.tiny:
        print('no GPU here: a tiny model on the CPU instead')
    if args.tiny or device == 'cpu':
        table({'tiny': TINY}, device, torch.float32, TINY_SIZES, {})
    else:
        with memory.fused_attention():
            found = memory.rows(memory.CONFIG, 128, (6, 200, 256, 3584, 32))
        computed = {kind: found[f'**all on one GPU, {kind} checkpointing**'] / 1e9
                    for kind in ('with', 'without')}
        table({'LLaDA-8B': memory.CONFIG, 'Qwen3-0.6B': QWEN3}, device, torch.bfloat16, SIZES,
              {'LLaDA-8B': computed})
    nano_run(device)


if __name__ == '__main__':
    main()
