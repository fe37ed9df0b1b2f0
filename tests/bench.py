"""What speed and memory cost: prints a markdown table, the textbook version of each piece first. Needs Linux's /proc.

    python tests/bench.py                            everything; 25 minutes on 2 idle cores
    python tests/bench.py --only rollout --repeats 5
    python tests/bench.py --nano out/NAME ...        trained models: speed-up, forwards, accuracy of the faster modes
Each case is a process of its own; their repetitions alternate, the median counts. A random model is never sure, so
`threshold` commits one token a step: its worst case (--nano has the other one). A rollout is timed over its first
block, whose work is that of every other block, times the number of blocks; --whole times all of it. In `ended` the
completions have 50 to 100 % of their tokens before their end.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))

FAST = dict(textbook=None, exact={}, cache=dict(cache=True), threshold=dict(threshold=0.9), both=dict(cache=True, threshold=0.9))
SECTIONS = dict(forward=['ours'], rollout=list(FAST), logps=['textbook', 'ours', 'ended'], backward=['textbook', 'ours'],
                pretrain=['textbook', 'ours'], grpo=['textbook', 'exact', 'cache'])
NANO = ('pretrain', 'grpo')  # sections about the nano main job: its own sizes


# ---- the textbook versions, in the plainest way ----

def textbook_rollout(model, prompt_ids, gen_length, block_length, steps, temperature=0.0, generator=None, blocks=None, **_):
    """LLaDA's sampler: all logits and noise everywhere at every step, no early end. blocks: stop after so many."""
    import torch
    P, mask_id = prompt_ids.size(1), model.config.mask_id
    ids = torch.cat((prompt_ids, torch.full((len(prompt_ids), gen_length), mask_id)), 1)
    a_step = gen_length // steps
    with torch.no_grad():
        for first in range(P, P + (blocks or gen_length // block_length) * block_length, block_length):
            for _ in range(block_length // a_step):
                logits = model(ids)  # (B, T, V)
                logits[..., mask_id] = -torch.inf
                scores = logits
                if temperature > 0:
                    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
                    scores = logits.double() - temperature * (-noise.log()).log()
                tokens = scores.argmax(-1)
                sure = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
                sure[ids != mask_id] = -torch.inf
                sure[:, first + block_length:] = -torch.inf
                for row in range(len(ids)):
                    chosen = sure[row].topk(a_step).indices
                    ids[row, chosen] = tokens[row, chosen]
    return ids[:, P:]


def textbook_logps(model, prompt_ids, completion_ids, prompt_mask, completion_mask=None):
    """All logits, their log-softmax, and of that the completion's tokens."""
    from loglik import model_config, one_step_view
    ids = one_step_view(prompt_ids, completion_ids, prompt_mask, model_config(model).mask_id)
    logps = model(ids).log_softmax(-1)[:, prompt_ids.size(1):]
    return logps.gather(-1, completion_ids[..., None])[..., 0]


# ---- one case, in its own process ----

def build(section, case, V, L, quick, whole=False):
    """One repetition as a function that returns numbers to compare with the textbook's, and what share of the case it is."""
    import torch
    from grpo import grpo_loss
    from loglik import completion_logps, random_prompt_mask
    from model import Config, LLaDA
    from sample import denoise
    if section in NANO:
        return build_nano(section, case, quick), 1
    size = dict(d_model=64, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=192) if quick else \
        dict(d_model=512, n_heads=8, n_kv_heads=8, n_layers=8, mlp_hidden_size=1536)
    B, P, block = (2, 8, 8) if quick else (4, 64, 32)
    model = LLaDA(Config(**size, embedding_size=V, mask_token_id=V - 1, eos_token_id=V - 2)).eval()
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 1.4 / size['d_model'] ** 0.5, generator=g)  # large, so that it has opinions
    prompt_ids, completion_ids = (torch.randint(V - 2, (B, n), generator=g) for n in (P, L))
    masks = [random_prompt_mask(prompt_ids, 0.15, g) for _ in range(4)]
    logps = textbook_logps if case == 'textbook' else completion_logps
    lengths = torch.linspace(L / 2, L, B).long()  # `ended`: completions fill three quarters of the room on average
    counted = torch.arange(L) < lengths[:, None] if case == 'ended' else None

    @torch.no_grad()
    def forward():
        return model.hidden(torch.cat((prompt_ids, completion_ids), 1))[0, 0].tolist()

    def rollout():
        blocks = L // block if whole else 1
        if case == 'textbook':
            ids = textbook_rollout(model, prompt_ids, L, block, L // 2, blocks=blocks)
        else:
            for state in denoise(model, prompt_ids, L, block, L // 2, **FAST[case]):
                if (state[:, P:P + blocks * block] != V - 1).all():
                    break
            ids = state[:, P:]
        return ids[:, :blocks * block].flatten().tolist()

    @torch.no_grad()
    def four_masks():
        if case == 'textbook':
            return logps(model, prompt_ids.repeat(4, 1), completion_ids.repeat(4, 1), torch.cat(masks)).flatten().tolist()
        return torch.cat([logps(model, prompt_ids, completion_ids, mask, counted) for mask in masks]).flatten().tolist()

    def backward():
        model.zero_grad()
        new = logps(model, prompt_ids, completion_ids, masks[0])
        old = new.detach()
        loss, _ = grpo_loss(new, old + 0.1, old - 0.1, torch.linspace(-1, 1, B), torch.ones(B, L), beta=0.04)
        loss.backward()
        return [loss.item(), *(p.grad.norm().item() for p in model.parameters())]
    share = 1 if whole or section != 'rollout' else block / L
    return dict(forward=forward, rollout=rollout, logps=four_masks, backward=backward)[section], share


def build_nano(section, case, quick):
    """A step of the nano main job: an update of its pretraining, or an outer iteration of diffu-GRPO from a new model."""
    import grpo
    import sft
    import train
    from model import load
    args = train.check(train.parse([*'--num_prompts 2 --base_batch 4 --gen_length 16 --steps 8'.split()] if quick else []))
    model, tokenizer = load('nano')
    source = train.Problems(args, tokenizer, 'gsm8k', 'train')
    if section == 'pretrain':
        def step():
            pairs = train.base_batch(args, tokenizer, [source], 0)
            model.zero_grad()
            if case == 'ours':
                return [sft.sft_backward(model, pairs, args.gen_length, model.config, train.torch_stream('cpu', 0), 64)]
            ids, seen, P = sft.pad(pairs, args.gen_length, model.config.eos_id)
            noisy, masked, t = sft.add_noise(ids[:, P:], model.config.mask_id, train.torch_stream('cpu', 0))
            labels = ids.clone()
            labels[:, :P] = -100
            labels[:, P:][~masked] = -100
            ids[:, P:] = noisy
            loss = sft.sft_loss(model(ids, seen), labels, t, P * len(ids))
            loss.backward()
            return [loss.item()]
        return step
    if case == 'textbook':
        grpo.generate = lambda *tensors, remasking, cfg_scale, **knobs: textbook_rollout(*tensors, **knobs)
        grpo.completion_logps = train.completion_logps = textbook_logps
    args.cache, args.grpo_steps = case == 'cache', 1

    def step():
        with tempfile.TemporaryDirectory() as args.out, contextlib.redirect_stdout(None):
            run = train.Run(args)
            run.end_step = lambda *_: None  # no checkpoint
            os.makedirs(run.folder)
            train.train_grpo(args, run, model, tokenizer, [source])
        return []
    return step


def work(section, case, V, L, quick, whole):
    """The process of a case: a repetition for every line that comes in, a line of numbers for each and one at the end."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    memory = lambda name: next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith(name))
    once, share = build(section, case, V, L, quick, whole)
    base = memory('VmRSS')
    x, w = torch.randn(768, 512), torch.randn(1536, 512)  # the MLP at d_model 512, batch 4, 192 tokens
    for _ in sys.stdin:
        rates = []
        for _ in range(20):
            began = time.perf_counter()
            x @ w.T
            rates.append(2 * 768 * 512 * 1536 / (time.perf_counter() - began))
        began = time.perf_counter()
        numbers = once()
        seconds = (time.perf_counter() - began) / share
        print('\n' + json.dumps(dict(base=base, peak=memory('VmHWM'), seconds=seconds, rate=statistics.median(rates))), flush=True)
    with FlopCounterMode(display=False) as counter:  # after all else, for it takes memory and time
        once()
    print('\n' + json.dumps(dict(base=base, numbers=numbers, flops=counter.get_total_flops() / share)))


# ---- the table ----

def measure(section, V, L, args):
    """Rows of one section at one vocabulary and length: every case in its process, repetitions alternating."""
    workers, results = {}, {}
    for case in SECTIONS[section]:
        command = [sys.executable, os.path.abspath(__file__), '--worker', json.dumps([section, case, V, L, args.quick, args.whole])]
        workers[case] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(args.repeats):
        for case, worker in workers.items():
            worker.stdin.write('go\n')
            worker.stdin.flush()
            line = next((line for line in worker.stdout if line.startswith('{"base"')), None)
            if line is None:
                sys.exit(f'bench.py: {section}, {case} ended; its error stands above')
            results.setdefault(case, []).append(json.loads(line))
    for case, worker in workers.items():
        results[case][-1] |= json.loads(worker.communicate()[0].splitlines()[-1])
    seconds = {case: statistics.median(r['seconds'] for r in rows) for case, rows in results.items()}
    first = results[SECTIONS[section][0]][-1]['numbers']
    for case, rows in results.items():
        rate, last = statistics.median(r['rate'] for r in rows), rows[-1]
        same = ''
        if section == 'rollout':
            same = f'{100 * statistics.mean(a == b for a, b in zip(first, last["numbers"])):.0f} % of ids'
        elif case == 'ours' and section in ('logps', 'backward'):
            gap = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(first, last['numbers']))
            same = f'within {gap:.0e}'
        size = '' if section in NANO else f'{V:,} | {L}'
        print(f'| {section} | {case} | {size or " | "} | {seconds[case]:.3g} | {seconds[SECTIONS[section][0]] / seconds[case]:.2f} | '
              f'{last["peak"]:.0f} ({last["base"]:.0f}) | {last["flops"] / 1e9:.4g} | '
              f'{100 * last["flops"] / seconds[case] / rate:.0f} | {same} |', flush=True)


def nano_table(folders, n, length, thresholds, blocks=None, part='test'):
    """What the faster modes of the sampler cost a trained model: greedy completions of n problems."""
    import grpo
    import rewards
    import train
    from model import load
    print('| run | mode | seconds | speed-up | forwards a text | fewer | tokens a step | accuracy % [95 %] | reward +- 95 % |\n' + '| --- ' * 9 + '|')
    for folder in folders:
        with open(os.path.join(folder, 'config.json')) as f:
            config = json.load(f)
        args = train.check(train.parse(['--task', config['task'], '--eval_n', str(n), '--device', 'cpu']))
        model, tokenizer = load(os.path.join(folder, 'model'))
        problems = train.Problems(args, tokenizer, args.task, part)
        pairs = problems.first(n) if part == 'test' else [problems.draw(10 ** 7 + i) for i in range(n)]  # no run comes so far
        calls, seconds, base = [], [], None
        generate = grpo.generate

        def timed(*tensors, **knobs):
            began = time.perf_counter()
            completion_ids = generate(*tensors, **knobs)
            seconds.append(time.perf_counter() - began)
            return completion_ids
        modes = {}
        for b in blocks or [args.block_length]:
            label = f'blocks of {b}, ' if blocks else ''
            modes |= {f'{label}exact': dict(block_length=b), f'{label}cache': dict(block_length=b, cache=True)}
            for t in thresholds:
                modes |= {f'{label}threshold {t}': dict(block_length=b, threshold=t),
                          f'{label}cache, threshold {t}': dict(block_length=b, cache=True, threshold=t)}
        model.wte.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
        for mode, knobs in modes.items():
            calls.clear(), seconds.clear()
            with mock.patch.object(grpo, 'generate', timed):
                graded = train.answers(argparse.Namespace(**{**vars(args), **knobs}), model, tokenizer, args.task, pairs, length)
            block = knobs['block_length']
            # a row stops behind the block in which it has ended
            tokens = sum(-(-g['effective_tokens'] // block) * block for g in graded)
            s = rewards.summary(graded)
            spread = 1.96 * statistics.stdev(g['reward'] for g in graded) / n ** 0.5
            forwards = sum(calls) / n  # a sequence's
            base = base or (sum(seconds), forwards)
            print(f'| {os.path.basename(folder.rstrip("/"))} | {mode} | {sum(seconds):.2f} | {base[0] / sum(seconds):.2f} | {forwards:.1f} | '
                  f'{base[1] / forwards:.2f} | {tokens / n / forwards:.2f} | {100 * s["accuracy"]:.1f} [{100 * s["low"]:.1f}, '
                  f'{100 * s["high"]:.1f}] | {s["reward"]:.3f} +- {spread:.3f} |', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', default=list(SECTIONS), choices=SECTIONS)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--whole', action='store_true', help='time all blocks of a rollout')
    p.add_argument('--quick', action='store_true', help='tiny sizes: does it run?')
    p.add_argument('--nano', nargs='*', metavar='FOLDER', help='folders of runs, out/NAME')
    p.add_argument('--n', type=int, default=512, help='test problems of --nano')
    p.add_argument('--length', type=int, default=32, help='generation length of --nano')
    p.add_argument('--thresholds', nargs='*', type=float, default=[0.9], help='of --nano')
    p.add_argument('--blocks', nargs='*', type=int, help="block lengths of --nano, the first is the one to compare with [the run's]")
    p.add_argument('--part', default='test', choices=('test', 'train'), help='problems of --nano: training problems, to choose by')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        return work(*json.loads(args.worker))
    if args.nano:
        return nano_table(args.nano, args.n, args.length, args.thresholds, args.blocks, args.part)
    print('Seconds: median. Peak: VmHWM of the process in MB (before the work). GFLOP: multiply-adds of the matrices x 2.\n'
          'Matmul %: share of the rate of (768, 512) @ (512, 1536) measured before every repetition in the same process.\n')
    print('| piece | case | vocabulary | tokens | seconds | x textbook | peak MB | GFLOP | matmul % | agrees with the textbook |\n'
          + '| --- ' * 10 + '|')
    V, more_V, lengths = (1000, 2000, (16,)) if args.quick else (32000, 126464, (128, 256, 512))
    for section in args.only:
        if section in NANO:
            measure(section, V, lengths[0], args)
            continue
        for L in lengths:
            measure(section, V, L, args)
        if section != 'forward':
            measure(section, more_V, lengths[0], args)


if __name__ == '__main__':
    main()
