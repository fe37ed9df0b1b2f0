"""The README's table of nano results: all runs behind it, then mean and spread over seeds. A script, hours on a CPU.

    python tests/experiments.py                        five tasks, seeds 0 1 2, d1 and diffu-GRPO alone
    python tests/experiments.py --tasks math --seeds 0 --flags "--fixed_mask" --label fixed
Runs that are finished are not run again, so it can be stopped, repeated, and shared by processes with different tasks.
"""
import argparse
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = dict(d1='sft,grpo', grpo='grpo')


def run(task, seed, kind, args):
    """The results of a run {stage: {task: {length: scores}}}; trains it if they are not there."""
    name = '-'.join(filter(None, ['x', args.label, task, kind, str(seed)]))
    folder = os.path.join(args.out, name)
    if not os.path.exists(os.path.join(folder, 'model')) and not args.table:
        command = [sys.executable, os.path.join(ROOT, 'train.py'), '--task', task, '--seed', str(seed), '--stages', STAGES[kind],
                   '--eval_lengths', '32', '--name', name, '--out', args.out, *args.flags.split()]
        command += ['--resume'] if os.path.exists(folder) else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with open(os.path.join(folder, 'results.json')) as f:
            return json.load(f)
    except FileNotFoundError:
        return {}


def cell(results, stage, task, score='accuracy', scale=100):
    """'mean (lowest to highest)' of one score of a stage over the seeds' results."""
    values = [scale * r[stage][task]['32'][score] for r in results if stage in r]
    return f'{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})' if values else '-'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tasks', nargs='*', default=['gsm8k', 'math', 'countdown', 'sudoku', 'code'])
    p.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    p.add_argument('--kinds', nargs='*', default=list(STAGES), choices=STAGES)
    p.add_argument('--out', default='out')
    p.add_argument('--label', default='', help='a part of the runs\' names, for other flags')
    p.add_argument('--flags', default='', help='more flags of train.py')
    p.add_argument('--table', action='store_true', help='only print what is there')
    args = p.parse_args()
    results = {(task, kind): [run(task, seed, kind, args) for seed in args.seeds] for task in args.tasks for kind in args.kinds}
    print('| task | constant | base | + SFT | + diffu-GRPO | d1 | tokens: base, SFT, diffu-GRPO, d1 |\n' + '| --- ' * 7 + '|')
    for task in args.tasks:
        d1, alone = results.get((task, 'd1'), []), results.get((task, 'grpo'), [])
        columns = [(d1 or alone, 'base'), (d1, 'sft'), (alone, 'grpo'), (d1, 'grpo')]
        for score, row in [('accuracy', task), ('share', 'Sudoku cells')][:1 + (task == 'sudoku')]:
            lengths = ', '.join(cell(r, stage, task, 'effective_tokens', 1).split()[0] for r, stage in columns)
            print(f'| {row} | ' + ' | '.join(cell(r, stage, task, score) for r, stage in [(d1 or alone, 'constant'), *columns])
                  + f' | {lengths} |')


if __name__ == '__main__':
    main()
