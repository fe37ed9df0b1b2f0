"""What speed and memory cost: a markdown table, the textbook version of each piece first.

    python tests/bench.py                            everything, on an idle machine
    python tests/bench.py --only rollout --repeats 5
    python tests/bench.py --only pretrain grpo --against OLD   beside another checkout of this code
    python tests/bench.py --nano out/NAME ...        what the faster modes cost trained models
Each case is a process of its own. Their repetitions alternate, the median counts. It needs Linux.
A rollout is timed over its first block, whose work is that of every block, times their number. A
random model is never sure: `threshold` commits one token per step, its worst case.
"""
import argparse
import contextlib
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from unittest import mock

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
FAST_MODES = dict(exact={}, cache=dict(cache=True), threshold=dict(threshold=0.9),
                  both=dict(cache=True, threshold=0.9))
# A case is measured beside the first of its section. `ended`: completions fill 3/4 of their room.
SECTIONS = dict(rollout=['textbook', 'plain', *FAST_MODES],
                logps=['textbook', 'ours', 'ended'],
                backward=['textbook', 'ours'],
                pretrain=['textbook', 'ours'],
                grpo=['textbook', 'exact', 'cache'])
NANO = ('pretrain', 'grpo')                      # train.py itself, with the nano model's settings
SMALL_MODEL = dict(d_model=64, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=192)
MODEL = dict(d_model=512, n_heads=8, n_kv_heads=8, n_layers=8, mlp_hidden_size=1536)


# ---- the textbook versions, in the plainest way ----

def textbook_rollout(model, prompt_ids, gen_length, block_length, steps, temperature=0.0,
                     attention_mask=None, generators=None, **_):
    """LLaDA's sampler with all logits and noise everywhere at every step, to the last block."""
    import torch
    assert attention_mask is None, 'it knows no padding'
    P, mask_id = prompt_ids.size(1), model.config.mask_id
    masks = torch.full((len(prompt_ids), gen_length), mask_id)
    ids = torch.cat((prompt_ids, masks), 1)
    count = gen_length // steps                  # tokens that a step commits
    with torch.no_grad():
        for block_end in range(P + block_length, P + gen_length + 1, block_length):
            for _ in range(block_length // count):
                logits = model(ids)                                          # (B, T, V)
                logits[..., mask_id] = -torch.inf
                scores = logits
                if temperature > 0:
                    noise = torch.empty(logits.shape, dtype=torch.float64)
                    for row, generator in zip(noise, generators):
                        row.uniform_(generator=generator)
                    scores = logits.double() - temperature * (-noise.log()).log()
                tokens = scores.argmax(-1)
                confidence = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
                confidence[ids != mask_id] = -torch.inf
                confidence[:, block_end:] = -torch.inf
                surest = confidence.topk(count).indices
                ids.scatter_(1, surest, tokens.gather(1, surest))
    return ids[:, P:]


def textbook_token_logps(model, ids, targets, scored=None, attention_mask=None, temperature=None):
    """All logits, their log-softmax, and of that the targets."""
    logps = model(ids, attention_mask).log_softmax(-1)[:, -targets.size(1):]
    return logps.gather(-1, targets[..., None])[..., 0]


# ---- pieces, with a random model: once() -> seconds, numbers to compare with the textbook's ----

def timed(function, *tensors, **knobs):
    """The seconds that a call takes, and what it returns."""
    began = time.perf_counter()
    result = function(*tensors, **knobs)
    return time.perf_counter() - began, result


def build(section, case, V, L, quick, against=''):
    """once() of a case, at vocabulary V and L completion tokens."""
    if section in NANO:
        sys.path.insert(0, against or ROOT)
        return build_nano(section, case, quick)
    sys.path.insert(0, ROOT)
    import torch
    from loglik import random_prompt_mask
    from model import Config, LLaDA
    B, P, size = (2, 8, SMALL_MODEL) if quick else (4, 64, MODEL)
    model = LLaDA(Config(**size, embedding_size=V, mask_id=V - 1, eos_id=V - 2)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:                         # large weights, so that it has opinions
            p.data.normal_(0, 1.4 / size['d_model'] ** 0.5, generator=generator)
    prompt_ids = torch.randint(V - 2, (B, P), generator=generator)
    completion_ids = torch.randint(V - 2, (B, L), generator=generator)
    prompt_masks = [random_prompt_mask(prompt_ids, 0.15, generator) for _ in range(4)]
    if section == 'rollout':
        return build_rollout(case, model, prompt_ids, L, 8 if quick else 32)
    if section == 'logps':
        return partial(timed, build_logps(case, model, prompt_ids, completion_ids, prompt_masks))
    return partial(timed, build_backward(case, model, prompt_ids, completion_ids, prompt_masks[0]))


class BlockFilled(Exception):
    pass


def build_rollout(case, model, prompt_ids, L, block):
    """The first block of a rollout; its seconds count for every block."""
    import sample
    P, seen = prompt_ids.size(1), []

    def stop_after_block(model, inputs):         # the loops write into the ids that they show it
        seen.append(inputs[0])
        if (seen[0][:, P:P + block] != model.config.mask_id).all():
            raise BlockFilled

    def first_block():
        if case in FAST_MODES:
            for ids in sample.denoise(model, prompt_ids, L, block, L // 2, **FAST_MODES[case]):
                if (ids[:, P:P + block] != model.config.mask_id).all():
                    return ids[:, P:P + block].flatten().tolist()
        loop = textbook_rollout if case == 'textbook' else sample.generate_plain
        seen.clear()
        hook = model.register_forward_pre_hook(stop_after_block)
        with hook, contextlib.suppress(BlockFilled):
            loop(model, prompt_ids, L, block, L // 2)
        return seen[0][:, P:P + block].flatten().tolist()

    def once():
        seconds, ids = timed(first_block)
        return seconds * L / block, ids
    return once


def one_step_ids(prompt_ids, completion_ids, prompt_mask, mask_id):
    """ids (B, T): the prompt with holes, the completion all masks."""
    import torch
    prompt = prompt_ids.masked_fill(prompt_mask, mask_id)
    return torch.cat((prompt, torch.full_like(completion_ids, mask_id)), dim=1)


def build_logps(case, model, prompt_ids, completion_ids, prompt_masks):
    """Log-probs under four prompt masks, as before the updates of an iteration."""
    import torch
    B, L = completion_ids.shape
    lengths = torch.linspace(L / 2, L, B).long()
    ended = torch.arange(L) < lengths[:, None] if case == 'ended' else None

    @torch.no_grad()
    def four_masks():
        views = [one_step_ids(prompt_ids, completion_ids, prompt_mask, model.config.mask_id)
                 for prompt_mask in prompt_masks]
        if case == 'textbook':
            targets = completion_ids.repeat(4, 1)
            return textbook_token_logps(model, torch.cat(views), targets).flatten().tolist()
        logps = [model.token_logps(ids, completion_ids, ended) for ids in views]
        return torch.cat(logps).flatten().tolist()
    return four_masks


def build_backward(case, model, prompt_ids, completion_ids, prompt_mask):
    """The diffu-GRPO loss of a micro-batch and its gradient."""
    import torch
    from grpo import grpo_loss
    token_logps = textbook_token_logps if case == 'textbook' else type(model).token_logps
    advantages = torch.linspace(-1, 1, len(completion_ids))
    ids = one_step_ids(prompt_ids, completion_ids, prompt_mask, model.config.mask_id)

    def backward():
        model.zero_grad()
        new = token_logps(model, ids, completion_ids)
        old = new.detach()
        loss, _ = grpo_loss(new, old + 0.1, old - 0.1, advantages, torch.ones_like(new))
        loss.backward()
        return [loss.item(), *(p.grad.norm().item() for p in model.parameters())]
    return backward


# ---- train.py itself: its flags and its log are what all checkouts have in common ----

def build_nano(section, case, quick):
    """An update of the nano base's pretraining, or the iteration of diffu-GRPO after it."""
    import train
    updates = 2 if quick or section == 'grpo' else 20
    flags = (f'--device cpu --stages grpo --grpo_steps 1 --base_seed 0 --base_steps {updates} '
             '--name run')
    flags += ' --eval_n 1 --eval_lengths 16'
    if section == 'pretrain':
        flags += ' --num_prompts 1 --num_iterations 1 --task gsm8k,math,countdown,sudoku,code'
    if quick:
        flags += ' --gen_length 16 --steps 8'
    if case == 'cache':
        flags += ' --cache'
    if case == 'textbook':
        flags += ' --rollout_batch 8'            # one prompt's group per call, so no padding
    train_sft, pretrain_seconds = train.train_sft, []

    def timed_train_sft(*args):
        pretrain_seconds.append(timed(train_sft, *args)[0])

    def once():
        pretrain_seconds.clear()
        with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(None))
            stack.enter_context(mock.patch.object(train, 'train_sft', timed_train_sft))
            if case == 'textbook':
                import grpo
                from model import LLaDA
                stack.enter_context(mock.patch.object(grpo, 'generate', textbook_rollout))
                stack.enter_context(
                    mock.patch.object(LLaDA, 'token_logps', textbook_token_logps))
            train.main([*flags.split(), '--out', out])
            logs = {}                            # stage -> rows
            for path in glob.glob(os.path.join(out, '*', 'log.jsonl')):
                with open(path) as file:
                    for row in map(json.loads, file):
                        logs.setdefault(row['stage'], []).append(row)
        if section == 'pretrain':
            return pretrain_seconds[0] / updates, [row['loss'] for row in logs.get('base', [])]
        row, = logs['grpo']
        return row['seconds'], [row['rollout_seconds']]
    return once


# ---- processes and the table ----

def memory(name):
    """VmRSS, or VmHWM, its peak, of this process in MB."""
    with open('/proc/self/status') as file:
        line, = (line for line in file if line.startswith(name))
    return int(line.split()[1]) / 1024


def work(*case):
    """The process of a case: a line of JSON for every line that comes in."""
    once = build(*case)
    base = memory('VmRSS')
    for _ in sys.stdin:
        seconds, numbers = once()
        result = dict(base=base, peak=memory('VmHWM'), seconds=seconds, numbers=numbers)
        print('\n' + json.dumps(result), flush=True)


def measure(section, V, L, args):
    """Prints the rows of a section at one vocabulary and length."""
    workers, results = {}, {}
    cases = list(SECTIONS[section])
    if section in NANO and args.against:
        cases.append('before')
    for case in cases:
        folder = os.path.abspath(args.against) if case == 'before' else ''
        job = json.dumps([section, case, V, L, args.quick, folder])
        workers[case] = subprocess.Popen([sys.executable, os.path.abspath(__file__), '--job', job],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        results[case] = []
    for _ in range(args.repeats):
        for case, worker in workers.items():
            worker.stdin.write('once\n')
            worker.stdin.flush()
            line = next((line for line in worker.stdout if line.startswith('{"base"')), None)
            if line is None:
                sys.exit(f'bench.py: {section}, {case} ended; its error stands above')
            results[case].append(json.loads(line))
    for worker in workers.values():
        worker.communicate()
    first = results[cases[0]]
    for case in cases:
        seconds = median(results[case], 'seconds')
        ratio = median(first, 'seconds') / seconds
        last = results[case][-1]
        size = ' | ' if section in NANO else f'{V:,} | {L}'
        print(f'| {section} | {case} | {size} | {seconds:.3g} | {ratio:.2f} | {last["peak"]:.0f} '
              f'({last["base"]:.0f}) | {remark(section, results[case], first)} |', flush=True)


def median(results, name):
    return statistics.median(result[name] for result in results)


def remark(section, results, first):
    """How far a case's numbers are the textbook's; of an iteration, the seconds of its rollouts."""
    if section == 'grpo':
        seconds = statistics.median(result['numbers'][0] for result in results)
        ratio = statistics.median(result['numbers'][0] for result in first) / seconds
        return f'rollouts, old and reference log-probs: {seconds:.3g} s, {ratio:.2f} x textbook'
    ours, theirs = results[-1]['numbers'], first[-1]['numbers']
    if section == 'rollout':
        same = statistics.mean(a == b for a, b in zip(ours, theirs))
        return f'{100 * same:.0f} % of ids'
    gaps = [abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs) if a]   # 0: not scored
    return f'within {max(gaps):.0e}' if gaps else ''


# ---- trained models ----

def nano_table(folders, n, length, thresholds, blocks):
    """What the faster modes of the sampler cost trained models: greedy answers to n problems."""
    import grpo
    import rewards
    import train
    from model import load
    print('| run | test set | mode | seconds | speed-up | forwards per text | fewer '
          '| accuracy % [95 %] | reward |\n' + '| --- ' * 9 + '|')
    for folder in folders:
        with open(os.path.join(folder, 'config.json')) as file:
            task = json.load(file)['task']
        args = train.parse(['--task', task, '--eval_n', str(n), '--device', 'cpu'])
        model, tokenizer = load(os.path.join(folder, 'model'))
        rows_seen = []                           # by each forward pass
        model.wte.register_forward_pre_hook(lambda _, inputs: rows_seen.append(len(inputs[0])))
        seconds = []                             # of each call of the sampler

        def timed_generate(*tensors, generate=grpo.generate, **knobs):
            elapsed, completion_ids = timed(generate, *tensors, **knobs)
            seconds.append(elapsed)
            return completion_ids

        for name, problems in train.test_sets(args, tokenizer).items():
            exact = None
            for mode, knobs in modes(thresholds, blocks or [args.block_length]).items():
                rows_seen.clear()
                seconds.clear()
                mode_args = argparse.Namespace(**{**vars(args), **knobs})
                with mock.patch.object(grpo, 'generate', timed_generate):
                    items = train.answers(mode_args, model, tokenizer, problems, length, mode)
                score = rewards.summary(items)
                forwards = sum(rows_seen) / len(problems)
                exact = exact or (sum(seconds), forwards)
                accuracy, low, high = (100 * score[key] for key in ('accuracy', 'low', 'high'))
                print(f'| {os.path.basename(folder.rstrip("/"))} | {name} | {mode} '
                      f'| {sum(seconds):.2f} | {exact[0] / sum(seconds):.2f} '
                      f'| {forwards:.1f} | {exact[1] / forwards:.2f} '
                      f'| {accuracy:.1f} [{low:.1f}, {high:.1f}] | {score["reward"]:.3f} |',
                      flush=True)


def modes(thresholds, blocks):
    """{label: the knobs that differ}, the exact sampler with the first block length first."""
    found = {}
    for block in blocks:
        for threshold in [0.0, *thresholds]:
            for cache in (False, True):
                label = f'threshold {threshold}' if threshold else 'exact'
                if cache:
                    label = f'cache, {label}' if threshold else 'cache'
                found[f'blocks of {block}, {label}'] = dict(block_length=block, cache=cache,
                                                            threshold=threshold)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', default=list(SECTIONS), choices=SECTIONS)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--quick', action='store_true', help='tiny sizes: does it run?')
    p.add_argument('--against', metavar='FOLDER', default='',
                   help='measure pretrain and grpo of this checkout, too, as the case `before`')
    p.add_argument('--nano', nargs='*', metavar='FOLDER', help='folders of runs, out/NAME')
    p.add_argument('--n', type=int, default=512, help='test problems of --nano')
    p.add_argument('--length', type=int, default=32, help='completion length of --nano')
    p.add_argument('--thresholds', nargs='*', type=float, default=[0.9], help='of --nano')
    p.add_argument('--blocks', nargs='*', type=int, help="block lengths of --nano [train.py's]")
    p.add_argument('--job', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job:
        return work(*json.loads(args.job))
    if args.nano:
        sys.path.insert(0, ROOT)
        return nano_table(args.nano, args.n, args.length, args.thresholds, args.blocks)
    print('Seconds: median. Peak: of the process (before the work).\n\n| piece | case | vocabulary '
          '| tokens | seconds | x textbook | peak MB | agrees with the textbook |\n'
          + '| --- ' * 8 + '|')
    V, large_V, lengths = (1000, 2000, [16]) if args.quick else (32000, 126464, [128, 256, 512])
    for section in args.only:
        if section in NANO:
            measure(section, 0, 0, args)
            continue
        for L in lengths:
            measure(section, V, L, args)
        measure(section, large_V, lengths[0], args)


if __name__ == '__main__':
    main()
