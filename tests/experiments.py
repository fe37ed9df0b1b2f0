"""The README's tables of nano results: all runs behind them, then mean and spread over seeds. A script, hours on a CPU.

    python tests/experiments.py                        five tasks, seeds 0 1 2, d1 and diffu-GRPO alone
    python tests/experiments.py --tasks math --seeds 0 --flags="--fixed_mask" --label fixed
    python tests/experiments.py --kinds d1 --label fast --flags="--cache --threshold 0.7" --pace
--pace sets d1 with a label's flags beside d1 without: accuracy under the exact sampler, and time to a reward.
Runs that are finished are not run again, so it can be stopped, repeated, and shared by processes with different tasks.
"""
import argparse
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = ['gsm8k', 'math', 'countdown', 'sudoku', 'code']
STAGES = dict(d1='sft,grpo', grpo='grpo')


def run(args, name, last, *flags):
    """The results of a run {stage: {task: {length: scores}}}; runs it unless the file that it writes last is there."""
    folder = os.path.join(args.out, name)
    if not os.path.exists(os.path.join(folder, last)) and not args.table:
        command = [sys.executable, os.path.join(ROOT, 'train.py'), *flags, '--eval_lengths', '32', '--name', name, '--out', args.out]
        command += ['--resume'] if os.path.exists(folder) else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with open(os.path.join(folder, 'results.json')) as f:
            return json.load(f)
    except FileNotFoundError:
        return {}


def train(args, label, task, kind, seed):
    name = '-'.join(filter(None, ['x', label, task, kind, str(seed)]))
    flags = args.flags.split() if label else []
    return name, run(args, name, 'model', '--task', task, '--seed', str(seed), '--stages', STAGES[kind], *flags)


def cell(results, stage, task, score='accuracy', scale=100):
    """'mean (lowest to highest)' of one score of a stage over the seeds' results."""
    return spread([scale * r[stage][task]['32'][score] for r in results if stage in r])


def spread(values):
    return f'{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})' if values else '-'


def table(args):
    print('| task | constant | base | + SFT | + diffu-GRPO | d1 | tokens: base, SFT, diffu-GRPO, d1 |\n' + '| --- ' * 7 + '|')
    for task in args.tasks:
        d1, alone = ([train(args, args.label, task, kind, seed)[1] for seed in args.seeds if kind in args.kinds] for kind in STAGES)
        columns = [(d1 or alone, 'base'), (d1, 'sft'), (alone, 'grpo'), (d1, 'grpo')]
        for score, row in [('accuracy', task), ('share', 'Sudoku cells')][:1 + (task == 'sudoku')]:
            lengths = ', '.join(cell(r, stage, task, 'effective_tokens', 1).split()[0] for r, stage in columns)
            print(f'| {row} | ' + ' | '.join(cell(r, stage, task, score) for r, stage in [(d1 or alone, 'constant'), *columns])
                  + f' | {lengths} |')


def pace(args):
    """Rows of every task without and with the label: what its policies can do, and how long they took to a reward."""
    print('| task | rollouts | accuracy, exact sampler | reward | reached after s | in iterations | s an iteration | first ratio |\n'
          + '| --- ' * 8 + '|')
    for task in args.tasks:
        goal = None  # nine tenths of the way from the first iteration's reward to the end's, in the mean of the exact runs
        for label in ('', args.label):
            exact, logs = [], []
            for seed in args.seeds:
                name, results = train(args, label, task, 'd1', seed)
                if label:  # its own evaluation was a fast one
                    results = run(args, f'{name}-exact', 'results.json', '--task', task, '--seed', str(seed), '--eval_only',
                                  '--model', os.path.join(args.out, name, 'model'))
                exact.append(100 * results['base' if label else 'grpo'][task]['32']['accuracy'])
                with open(os.path.join(args.out, name, 'log.jsonl')) as f:
                    logs.append([row for row in map(json.loads, f) if row['stage'] == 'grpo'])
            mean = lambda rows, key='reward': sum(row[key] for row in rows) / len(rows)
            start, end = (sum(map(mean, parts)) / len(parts) for parts in ([log[:1] for log in logs], [log[-10:] for log in logs]))
            goal = goal or start + 0.9 * (end - start)
            steps = [next((i for i in range(3, len(log) + 1) if mean(log[i - 3:i]) >= goal), None) for log in logs]
            times = [sum(row['seconds'] for row in log[:i]) for log, i in zip(logs, steps) if i]
            print(f'| {task} | {args.flags if label else "exact"} | {spread(exact)} | {goal:.2f} | {spread(times)} | '
                  f'{", ".join(map(str, steps))} | {mean([row for log in logs for row in log], "seconds"):.2f} | '
                  f'{mean([row for log in logs for row in log], "first_ratio"):.3f} |', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tasks', nargs='*', default=TASKS, choices=TASKS)
    p.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    p.add_argument('--kinds', nargs='*', default=list(STAGES), choices=STAGES)
    p.add_argument('--out', default='out')
    p.add_argument('--label', default='', help='a part of the runs\' names, for other flags')
    p.add_argument('--flags', default='', help='more flags of train.py, with a label')
    p.add_argument('--table', action='store_true', help='only print what is there')
    p.add_argument('--pace', action='store_true', help='compare the label with no label')
    args = p.parse_args()
    if bool(args.flags) != bool(args.label) or args.pace and (args.table or not args.label):
        p.error('--label and --flags go together; --pace needs both, and no --table')
    (pace if args.pace else table)(args)


if __name__ == '__main__':
    main()
