"""The runs behind the README's results, over bases of different seeds. A script; hours on a CPU.

    python tests/experiments.py                     all cells that are not in assets/results/ yet
    python tests/experiments.py --bases 0 --tasks gsm8k math --kinds d1
    python tests/experiments.py --table             only the tables
A cell is one run of train.py: a base, a task, a kind. The base's seed is also the run's seed, so
that the spread is what a user's own base and seed would give. A finished cell is a JSON line; stop
at any time and repeat the command. Several processes may share the work if each has its own bases.
"""
import argparse
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, 'assets', 'results', 'nano.jsonl')
TASKS = ['gsm8k', 'math', 'countdown', 'sudoku', 'code']
ALL = ','.join(TASKS)
KINDS = {                        # name -> flags of train.py
    # the base made to think; with the line end, for the nano tokenizer has both as one token
    'made': ['--eval_only', '--prefill', '<reasoning>\n'],
    'grpo': ['--stages', 'grpo'],
    'd1': ['--stages', 'sft,grpo'],
}
ONE_MODEL = {                    # one model for all tasks: as many problems in all, and five times
    'all': ['--stages', 'sft,grpo', '--task', ALL],
    'all5': ['--stages', 'sft,grpo', '--task', ALL, '--grpo_steps', '200'],
}


def finished(path):
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def run_cell(args, base, task, kind):
    """Runs train.py for one cell and appends a line per stage, test set and length."""
    flags = (KINDS | ONE_MODEL)[kind]
    name = f'x-{kind}-{task}-{base}'
    folder = os.path.join(args.out, name)
    command = [sys.executable, os.path.join(ROOT, 'train.py'), '--task', task, *flags,
               '--base_seed', str(base), '--seed', str(base), '--eval_lengths', '32,64',
               '--name', name, '--out', args.out, *args.flags.split()]
    if os.path.exists(os.path.join(folder, 'config.json')):
        command.append('--resume')
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.time() - began
    with open(os.path.join(folder, 'results.json')) as file:
        results = json.load(file)
    log = finished(os.path.join(folder, 'log.jsonl'))
    rows = [row for row in log if row['stage'] == 'grpo']
    curve = {name: [round(row[name], 4) for row in rows]
             for name in ('reward', 'length', 'kl', 'grad_norm')} if rows else {}
    with open(args.results, 'a') as file:
        cell = dict(base=base, task=task, kind=kind, flags=' '.join(command[2:]), seconds=seconds,
                    results=results, curve=curve)
        file.write(json.dumps(cell) + '\n')


def cells(args):
    """Every (base, task, kind) that was asked for; one model for all comes after single tasks."""
    for base in args.bases:
        for kind in args.kinds:
            if kind in ONE_MODEL:
                yield base, 'all', kind
            else:
                for task in args.tasks:
                    yield base, task, kind


def spread(values, scale=100):
    """'mean (lowest to highest)'"""
    if not values:
        return '-'
    values = [scale * value for value in values]
    return f'{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})'


def table(rows, length):
    """Accuracy in % of every stage at one completion length; effective tokens beside it."""
    columns = [('grpo', 'base', 'base'), ('made', 'base', 'base made to think'),
               ('d1', 'sft', '+ SFT'), ('grpo', 'grpo', '+ diffu-GRPO'), ('d1', 'grpo', 'd1'),
               ('all', 'grpo', 'd1, one model for all'), ('all5', 'grpo', '5 times longer')]
    print(f'\nAccuracy in % at {length} tokens: mean over bases (lowest to highest)\n')
    print('| task | ' + ' | '.join(name for _, _, name in columns) + ' | tokens: base, d1 |')
    print('| --- ' * (len(columns) + 2) + '|')
    for task in TASKS:
        line, tokens = f'| {task} ', {}
        for kind, stage, name in columns:
            found = [row['results'][stage][task][str(length)] for row in rows
                     if row['kind'] == kind and task in row['results'].get(stage, {})]
            line += f"| {spread([score['accuracy'] for score in found])} "
            tokens[name] = spread([score['effective_tokens'] for score in found], 1).split()[0]
        print(line + f"| {tokens['base']}, {tokens['d1']} |")
    bases = sorted({row['base'] for row in rows})
    print(f'\nbases and seeds {bases}')


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--bases', nargs='*', type=int, default=[0, 1, 2, 3, 4])
    p.add_argument('--tasks', nargs='*', default=TASKS, choices=TASKS)
    p.add_argument('--kinds', nargs='*', default=[*KINDS, *ONE_MODEL],
                   choices=[*KINDS, *ONE_MODEL])
    p.add_argument('--out', default='out', help='where the runs are kept')
    p.add_argument('--results', default=RESULTS)
    p.add_argument('--flags', default='', help='more flags for every run')
    p.add_argument('--table', action='store_true', help='only print what is there')
    args = p.parse_args()
    os.makedirs(os.path.dirname(args.results), exist_ok=True)
    if not args.table:
        for cell in cells(args):
            done = {(row['base'], row['task'], row['kind']) for row in finished(args.results)}
            if cell not in done:
                run_cell(args, *cell)
                print(*cell, flush=True)
    for length in (32, 64):
        table(finished(args.results), length)


if __name__ == '__main__':
    main()
