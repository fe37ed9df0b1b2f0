"""The runs behind the README's results, over bases of different seeds; hours on a CPU.

    python tests/tools/experiments.py                    all cells that are not in assets/results/
    python tests/tools/experiments.py --bases 0 --kinds base made d1 --tasks gsm8k
    python tests/tools/experiments.py --tables           only the tables and figures
    python tests/tools/experiments.py --quick            all of it, coarsely, into out/quick/
A cell is a run of train.py for one base, one kind and one task; the base's seed is the run's seed,
so that the spread is what a user's own base and seed would give. A finished cell is a JSON line of
assets/results/nano.jsonl. Stop at any time and repeat the command; several processes may share the
work if each has its own bases. Figures need matplotlib.
"""
import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))                    # the folder of the seven modules

import train                                                                 # noqa: E402
from grpo import rollout                                                     # noqa: E402
from loglik import (completion_logps, draw_views, exact_logps,               # noqa: E402
                    random_prompt_mask)
from model import load                                                       # noqa: E402
from sample import torch_stream                                              # noqa: E402

ASSETS = ROOT / 'assets'
TASKS = ['gsm8k', 'math', 'countdown', 'sudoku', 'code']
ALL = ','.join(TASKS)
# kind -> (tasks of one run, the model that it starts from, flags of train.py)
KINDS = {
    'base': ([ALL], 'base', '--stages sft'),     # the base and, one for all tasks, the SFT model
    'made': ([ALL], 'base', '--eval_only --prefill <reasoning>'),
    'grpo': (TASKS, 'base', '--stages grpo'),
    'd1': (TASKS, 'sft', '--stages grpo'),
    'all': ([ALL], 'sft', '--stages grpo'),      # as many problems in all as a run for one task
    'all5': ([ALL], 'sft', '--stages grpo --grpo_steps 200'),
    # every completion thinks from the start, so that only skill is left to learn
    'skill': (['math', 'code'], 'made', '--stages grpo --prefill <reasoning> --grpo_steps 80 '
                                        '--eval_every 20 --eval_lengths 32'),
}
# The paper's ablations and the later methods, one change each, with as many iterations as make the
# forward passes of every cell equal: 40 * (16 denoising steps + 4 updates * 2 policies) = 960 per
# completion, less those of groups of equal rewards, which are not trained on. From the base, which
# must find thinking, and one model for all five tasks.
ABLATIONS = {f'mu{mu}-{kind}': f'--num_iterations {mu} --grpo_steps {steps}{flag}'
             for mu, steps in ((2, 48), (12, 24), (24, 15))
             for kind, flag in (('random', ''), ('fixed', ' --fixed_mask'))}
ABLATIONS |= {f'pmask{p}': f'--p_mask_prompt {p}' for p in (0, 0.3, 0.5, 0.7)}
ABLATIONS |= {f'temperature{t}': f'--temperature {t}' for t in (0.6, 1.2)}
ABLATIONS |= {'std': '--divide_by_std', 'sequence': '--norm sequence',
              'epsilon0.2': '--epsilon 0.2',
              'length64': '--gen_length 64 --steps 32 --grpo_steps 24'}
METHODS = {
    'stable': '--loss stable',
    'wd1': '--loss wd1 --grpo_steps 48',
    'elbo2': '--estimator elbo --num_views 2 --grpo_steps 30',
    'stepmerge4': '--estimator stepmerge --num_views 4 --grpo_steps 20',
    'coupled': '--estimator coupled --grpo_steps 30',
    'espo': '--loss espo --estimator coupled --grpo_steps 30'}
KL = {'beta0.04': '--beta 0.04', 'stable-kl': '--beta 0.04 --loss stable'}
CHANGES = {'default': '', **METHODS, **ABLATIONS, **KL}
KINDS |= {name: ([ALL], 'base', f'--stages grpo --eval_lengths 32 {flags}')
          for name, flags in CHANGES.items()}
# the later methods once more where SFT has shown how to think; 'all' is the default there
KINDS |= {f'sft-{name}': ([ALL], 'sft', f'--stages grpo --eval_lengths 32 {flags}')
          for name, flags in METHODS.items()}
# lengths that neither the corpus nor training has seen; before and after 'default'
KINDS |= {'long-base': ([ALL], 'base', '--eval_only --eval_lengths 96,128 --eval_n 256'),
          'long-default': ([ALL], 'default', '--eval_only --eval_lengths 64,96,128 --eval_n 256')}


# ---- cells ----

def rows_of(path):
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def append(path, row):
    with open(path, 'a') as file:
        file.write(json.dumps(row) + '\n')


def python(script, *flags):
    """Runs a script of ours with its output kept back, unless it fails."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.stderr.decode())


def base_and_data(args, base):
    """The model and the training problems of a base: 0 is shipped, others are made if need be."""
    if base == 0:
        return 'nano', 'nano'
    folder = args.out / f'base-{base}'
    if not (folder / 'model').exists():
        python('assets/nano/make.py', '--seed', base, '--out', folder)
    return folder / 'model', folder / 'problems'


def cell_folder(args, base, kind, tasks):
    name = f'x-{kind}-{base}'
    if tasks != ALL:
        name += f'-{tasks}'
    return args.out / name


def trained_model(args, base, kind, tasks):
    """The folder of the model that a cell ends in; the cell is run if need be."""
    folder = cell_folder(args, base, kind, tasks) / 'model'
    if not folder.exists():
        run_cell(args, base, kind, tasks)
    return folder


def done_cells(args):
    return [(row['base'], row['kind'], row['tasks']) for row in rows_of(args.results)]


def known_scores(args, base, start, tasks):
    """What the model that a cell starts from has scored in an earlier cell, or {}."""
    kind, stage = dict(base=('base', 'base'), made=('made', 'base'), sft=('base', 'sft'))[start]
    for row in rows_of(args.results):
        if (row['base'], row['kind']) == (base, kind):
            return {task: row['results'][stage][task] for task in tasks.split(',')}
    return {}


def run_cell(args, base, kind, tasks):
    """Runs train.py for one cell, or goes on with it, and appends its JSON line."""
    _, start, flags = KINDS[kind]
    model, data = base_and_data(args, base)
    if start == 'sft':
        model = trained_model(args, base, 'base', ALL)
    if start == 'default':
        model = trained_model(args, base, 'default', ALL)
    flags = (f'--model {model} --data {data} --task {tasks} --seed {base} --eval_n 512 '
             f'--grpo_steps 40 {flags} {args.flags}').split()
    folder = cell_folder(args, base, kind, tasks)
    resume = ['--resume'] if folder.exists() else []
    if not folder.exists() and '--stages' in flags and kind != 'base':
        scores = known_scores(args, base, start, tasks)
        if scores:                               # the run adds what it evaluates itself
            folder.mkdir(parents=True)
            (folder / 'results.json').write_text(json.dumps(dict(base=scores)))
            resume = ['--resume']
    began = time.time()
    python('train.py', *flags, '--name', folder.name, '--out', args.out, *resume)
    seconds = time.time() - began

    results = json.loads((folder / 'results.json').read_text())
    log = [row for row in rows_of(folder / 'log.jsonl') if row['stage'] == 'grpo']
    curve = {}
    for key in ('reward', 'length', 'kl', 'grad_norm', 'seconds'):
        if log and key in log[0]:
            curve[key] = [round(row[key], 4) for row in log]
    command = ' '.join(['python train.py', *flags]).replace(str(args.out), 'out')
    if (base, kind, tasks) not in done_cells(args):              # else only its model was gone
        append(args.results, dict(base=base, kind=kind, tasks=tasks, command=command,
                                  seconds=seconds, threads=torch.get_num_threads(),
                                  results=results, curve=curve))
    print(base, kind, tasks, f'{seconds:.0f} s', flush=True)


# ---- the mean field against the exact likelihood ----

# name -> (estimator, forward passes, p_mask_prompt)
ESTIMATORS = {f'one_step, p_mask {p}': ('one_step', 1, p) for p in (0, 0.15, 0.3, 0.5)}
ESTIMATORS |= {'coupled': ('coupled', 2, 0.15), 'coupled, p_mask 0': ('coupled', 2, 0)}
ESTIMATORS |= {f'stepmerge {n}': ('stepmerge', n, 0) for n in (2, 4, 8, 16)}
ESTIMATORS |= {f'elbo {n}': ('elbo', n, 0) for n in (1, 2, 4, 16)}
ESTIMATORS |= {'stepmerge 4, p_mask 0.15': ('stepmerge', 4, 0.15),       # as in training
               'elbo 2, p_mask 0.15': ('elbo', 2, 0.15)}


def groups_with_a_gradient(settings, model, tokenizer, num_groups):
    """Groups of 8 rollouts of which not all rewards are equal; fewer, if 200 prompts give fewer."""
    problems = train.Problems(settings, tokenizer, {})
    sampling = train.sampling_knobs(settings, settings.gen_length, settings.steps,
                                    settings.temperature)
    groups = []
    for number in range(200):
        if len(groups) == num_groups:
            break
        problem = number, *problems.draw(number)
        [group] = rollout(model, tokenizer, [problem], 8, sampling, settings.seed, step=0)
        if group.advantages.any():
            groups.append(group)
    return groups


def policy_gradient(model, logps, advantages):
    """The gradient of sum A log p as one vector; logps (G, L) keep their graph."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((logps.sum(1) * advantages).sum(), parameters,
                                    retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def estimate(model, group, name, draws, seed):
    """Sequence log-probs (draws, G) and policy gradients (draws, N) of a group's rollouts."""
    estimator, num_views, p_mask = ESTIMATORS[name]
    if estimator in ('stepmerge', 'one_step') and not p_mask:
        draws = 1                                # nothing is drawn
    sequences, gradients = [], []
    for draw in range(draws):
        stream = torch_stream('cpu', seed, 'truth', group.prompt_number, draw)
        views = draw_views(estimator, num_views, group.completion_ids, group.commit_steps, stream)
        prompt_mask = random_prompt_mask(group.prompt_ids, p_mask, stream)
        logps = completion_logps(model, group.prompt_ids, group.completion_ids, prompt_mask,
                                 group.completion_mask, views)
        sequences.append(logps.detach().sum(1))
        gradients.append(policy_gradient(model, logps, group.advantages))
    return torch.stack(sequences), torch.stack(gradients)


def compare(sequences, gradients, exact, exact_gradient):
    """{measure: value} of a group: an estimator's draws against the exact ones, (G,) and (N,).

    Bias and std of the sequence log-prob, in nats; its rank correlation within the group; cosine
    and norm of the policy gradient, the cosine of its mean over draws, its noise (std over draws /
    exact norm).
    """
    mean_gradient = gradients.mean(0)
    variance = (gradients - mean_gradient).square().sum() / max(1, len(gradients) - 1)
    size = exact_gradient.norm()
    std = sequences.std(0).mean().item() if len(sequences) > 1 else 0.0
    return dict(
        bias=(sequences.mean(0) - exact).mean().item(), std=std,
        rank=torch.tensor([rank_correlation(line, exact) for line in sequences]).nanmean().item(),
        cosine=mean([cosine(gradient, exact_gradient) for gradient in gradients]),
        cosine_of_mean=cosine(mean_gradient, exact_gradient),
        norm=(gradients.norm(dim=1).mean() / size).item(), noise=(variance.sqrt() / size).item())


def truth(args, base, task, stage, num_groups, draws):
    """Each estimator against the exact likelihood of rollouts; appends a line to truth.jsonl.

    Means over groups of what compare gives. Of the gradient summed over groups the cosine with
    the exact one, with its part that comes from the tokens of the first step (mostly the choice
    between thinking and guessing), and with the rest.
    """
    folder, data = base_and_data(args, base)
    if stage == 'sft':
        folder = trained_model(args, base, 'base', ALL)
    if stage == 'd1':
        folder = trained_model(args, base, 'd1', task)
    model, tokenizer = load(str(folder))
    settings = train.parse(['--task', task, '--seed', str(1000 + base), '--data', str(data)])
    groups = groups_with_a_gradient(settings, model, tokenizer, num_groups)
    if not groups:
        print('truth', base, task, stage, 'all rewards of every group are equal', flush=True)
        return
    found = {name: [] for name in ESTIMATORS}    # a dict per group
    sums = dict.fromkeys(ESTIMATORS, 0)          # of the gradients of each group's first draw
    parts = dict(total=0, first=0, other=0)      # of the exact gradient
    exact_mean = 0
    for group in groups:
        logps = exact_logps(model, group.prompt_ids, group.completion_ids, group.completion_mask,
                            group.commit_steps, settings.block_length, settings.temperature)
        first = policy_gradient(model, logps * (group.commit_steps == 0), group.advantages)
        other = policy_gradient(model, logps * (group.commit_steps > 0), group.advantages)
        exact = logps.detach().sum(1)
        exact_mean += exact.mean().item() / len(groups)
        for part, gradient in dict(total=first + other, first=first, other=other).items():
            parts[part] = parts[part] + gradient
        for name in ESTIMATORS:
            sequences, gradients = estimate(model, group, name, draws, base)
            found[name].append(compare(sequences, gradients, exact, first + other))
            sums[name] = sums[name] + gradients[0]

    estimators = {}
    for name, rows in found.items():
        values = {}
        for key in rows[0]:                      # not nan: a rank needs two different values
            known = [row[key] for row in rows if row[key] == row[key]]
            values[key] = mean(known) if known else 0.0
        for part, gradient in parts.items():
            values[f'{part}_cosine'] = cosine(sums[name], gradient)
        estimators[name] = {key: round(value, 4) for key, value in values.items()}
        estimators[name]['forwards'] = ESTIMATORS[name][1]
    share = (parts['first'].norm() / parts['total'].norm()).item()
    append(args.truth, dict(base=base, task=task, stage=stage, groups=len(groups),
                            completions=8 * len(groups), draws=draws, exact_logp=exact_mean,
                            first_share=share, estimators=estimators))
    print('truth', base, task, stage, flush=True)


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


def rank_correlation(a, b):
    """Spearman's, of two tensors (n,), equal values sharing a rank; nan if all are equal."""
    ranks = []
    for values in (a, b):
        values = values.round(decimals=3)        # the same completion twice differs by rounding
        above, equal = values[:, None] > values, values[:, None] == values
        ranks.append(above.sum(1) + equal.sum(1) / 2)
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def mean(values):
    return sum(values) / len(values)


# ---- tables ----

def print_row(cells):
    print('| ' + ' | '.join(map(str, cells)) + ' |')


def print_head(cells):
    print_row(cells)
    print('| --- ' * len(cells) + '|')


def spread(values, scale=100):
    """'mean (lowest to highest)'"""
    if not values:
        return '-'
    values = [scale * value for value in values]
    return f'{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})'


def scores(rows, kind, stage, task, length, key='accuracy'):
    """One number per cell of a kind that has been evaluated on the task at this length."""
    found = []
    for row in rows:
        by_length = row['results'].get(stage, {}).get(task, {})
        if row['kind'] == kind and str(length) in by_length:
            found.append(by_length[str(length)][key])
    return found


def score(row, stage, task):
    return row['results'][stage][task]['32']['accuracy']


def mean_score(row, stage):
    return mean([score(row, stage, task) for task in TASKS])


def main_table(rows, length):
    """Accuracy in % of every stage at one completion length; effective tokens beside it."""
    columns = {'base': ('base', 'base'), 'base made to think': ('made', 'base'),
               '+ SFT': ('base', 'sft'), '+ diffu-GRPO': ('grpo', 'grpo'), 'd1': ('d1', 'grpo'),
               'one diffu-GRPO for all': ('default', 'grpo'), 'one d1 for all': ('all', 'grpo'),
               '5 times longer': ('all5', 'grpo')}               # -> (kind, stage)
    bases = sorted({row['base'] for row in rows if row['kind'] == 'd1'})
    print(f'\nAccuracy in % at {length} tokens, mean (lowest to highest) over bases {bases}\n')
    print_head(['task', *columns, 'tokens: base, d1'])
    for task in TASKS:
        cells = [spread(scores(rows, *column, task, length)) for column in columns.values()]
        tokens = []
        for column in ('base', 'd1'):
            values = scores(rows, *columns[column], task, length, 'effective_tokens')
            tokens.append(f'{mean(values):.1f}' if values else '-')
        print_row([task, *cells, ', '.join(tokens)])


def change_table(rows, start):
    """One change each, one model for all tasks, from the base or from the SFT model."""
    if start == 'base':
        default = 'default'
        lines = [('base', 'base', 'base'), ('made', 'base', 'base made to think')]
        lines += [(name, 'grpo', flags or 'default') for name, flags in CHANGES.items()]
    else:
        default = 'all'
        lines = [('base', 'sft', 'SFT'), ('all', 'grpo', 'default')]
        lines += [(f'sft-{name}', 'grpo', flags) for name, flags in METHODS.items()]
    print(f'\nFrom {start}: accuracy in % at 32 tokens, mean over bases; mean of the five tasks '
          '(lowest to highest base); found: tasks and bases that gained at least 15 points\n')
    print_head(['change', 'bases', *NAMES.values(), 'mean', 'found', 'iterations', 'seconds'])
    before = {row['base']: row for row in rows if row['kind'] == 'base'}
    bases = {row['base'] for row in rows if row['kind'] == default}
    for kind, stage, label in lines:
        some = [row for row in rows if row['kind'] == kind and row['base'] in bases]
        if not some:
            continue
        accuracies = [mean(scores(some, kind, stage, task, 32)) for task in TASKS]
        gains = [score(row, stage, task) - score(before[row['base']], start, task)
                 for row in some for task in TASKS]
        found = sum(gain >= 0.15 for gain in gains)
        iterations, seconds = 0, 0
        if stage == 'grpo':
            iterations = len(some[0]['curve']['reward'])
            seconds = mean([sum(row['curve']['seconds']) for row in some])
        print_row([label, ' '.join(str(row['base']) for row in some),
                   *[f'{100 * accuracy:.1f}' for accuracy in accuracies],
                   spread([mean_score(row, stage) for row in some]), f'{found} of {len(gains)}',
                   iterations, f'{seconds:.0f}'])


def truth_table(rows):
    columns = ('forwards', 'bias', 'std', 'rank', 'cosine', 'cosine_of_mean', 'norm', 'noise',
               'total_cosine', 'first_cosine', 'other_cosine')
    for stage in ('base', 'sft', 'd1'):
        some = [row for row in rows if row['stage'] == stage]
        if not some:
            continue
        groups, bases = sum(row['groups'] for row in some), {row['base'] for row in some}
        print(f'\n{stage}: {groups} groups of 8, bases {sorted(bases)}\n')
        print_head(['estimator', *columns])
        for name in some[0]['estimators']:
            means = [mean([row['estimators'][name][key] for row in some]) for key in columns]
            print_row([name, *[f'{value:.3g}' for value in means]])


# ---- figures, readable on light and dark pages ----

GREY = '#808080'
COLOURS = ['#3b82f6', '#f59e0b', '#10b981', '#ef4444', '#a855f7']
NAMES = dict(gsm8k='word problems', math='equations', countdown='Countdown', sudoku='Sudoku',
             code='code')


def new_figure(columns, height=2.6):
    import matplotlib
    matplotlib.use('svg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        'text.color': GREY, 'axes.labelcolor': GREY, 'axes.edgecolor': GREY, 'xtick.color': GREY,
        'ytick.color': GREY, 'axes.titlecolor': GREY, 'font.size': 9, 'legend.frameon': False,
        'axes.spines.top': False, 'axes.spines.right': False, 'svg.hashsalt': 'd1'})
    figure, axes = plt.subplots(1, columns, figsize=(8, height), squeeze=False)
    return figure, axes[0]


def save(figure, folder, name, rect=(0, 0, 1, 1)):
    figure.tight_layout(rect=rect)
    path = folder / f'{name}.svg'
    figure.savefig(path, transparent=True, metadata=dict(Date=None))
    print(f'drew {path.name}')


def mean_and_range(values):
    """mean, [how far the lowest is below it, how far the highest above]"""
    middle = mean(values)
    return middle, [middle - min(values), max(values) - middle]


def mean_curve(curves):
    """The mean over runs at each iteration, as far as all have come."""
    return [mean(values) for values in zip(*curves)]


def smoothed(curve, width):
    """Each value replaced by the mean of the `width` values around it, fewer at the ends."""
    half = width // 2
    return [mean(curve[max(0, k - half):k + half + 1]) for k in range(len(curve))]


def band(axis, curves, label, colour, width=3):
    """Mean over runs, with the lowest and the highest as a band."""
    n = min(map(len, curves))
    curves = torch.tensor([smoothed(curve[:n], width) for curve in curves])
    x = range(1, n + 1)
    axis.plot(x, curves.mean(0), color=colour, label=label)
    axis.fill_between(x, curves.min(0).values, curves.max(0).values, color=colour, alpha=0.2)


def learning_figure(rows, folder):
    figure, axes = new_figure(2)
    bases = sorted({row['base'] for row in rows if row['kind'] == 'grpo'})
    for task, colour in zip(TASKS, COLOURS):
        curves = [row['curve'] for row in rows if row['kind'] == 'grpo' and row['tasks'] == task]
        if not curves:
            continue
        highest = dict(gsm8k=4, math=3, countdown=1, sudoku=1, code=1.5)[task]
        band(axes[0], [[r / highest for r in c['reward']] for c in curves], NAMES[task], colour)
        band(axes[1], [c['length'] for c in curves], NAMES[task], colour)
    axes[0].set(xlabel='iteration of diffu-GRPO', ylabel='reward / highest possible', ylim=(0, 1))
    axes[1].set(xlabel='iteration of diffu-GRPO', ylabel='tokens per completion')
    axes[0].legend(fontsize=7, ncols=2)
    figure.suptitle(f'diffu-GRPO alone on the nano model: mean and range over {len(bases)} bases',
                    fontsize=9)
    save(figure, folder, 'learning')


def results_figure(rows, folder):
    figure, [ours, paper] = new_figure(2)
    stages = [('base', 'base', 'base'), ('base', 'sft', '+ SFT'),
              ('grpo', 'grpo', '+ diffu-GRPO'), ('d1', 'grpo', 'd1')]
    for i, (kind, stage, label) in enumerate(stages):
        for j, task in enumerate(TASKS):
            found = [100 * score for score in scores(rows, kind, stage, task, 32)]
            if found:
                height, (below, above) = mean_and_range(found)
                ours.bar(j + 0.2 * i, height, 0.2, color=COLOURS[i], yerr=[[below], [above]],
                         ecolor=GREY, label=label if j == 0 else None)
    table = [[76.7, 32.4, 19.5, 6.7], [78.8, 32.6, 14.5, 8.5], [79.8, 37.2, 31.3, 12.9],
             [81.1, 38.6, 32.0, 16.7]]           # the paper's Table 1, 256 tokens
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            paper.bar(j + 0.2 * i, value, 0.2, color=COLOURS[i])
    ours.set_xticks([j + 0.3 for j in range(5)],
                    [NAMES[task].replace(' ', '\n') for task in TASKS], fontsize=7)
    paper.set_xticks([j + 0.3 for j in range(4)], ['GSM8K', 'MATH500', 'Countdown', 'Sudoku cells'],
                     fontsize=7)
    bases = sorted({row['base'] for row in rows if row['kind'] == 'grpo'})
    ours.set(ylabel='accuracy, %', ylim=(0, 130), yticks=range(0, 101, 20),
             title=f'nano model, {len(bases)} bases, n = 512 each')
    paper.set(ylim=(0, 100), title="LLaDA-8B, the paper's Table 1 (256 tokens)")
    ours.legend(fontsize=7, ncols=2)
    save(figure, folder, 'results')


def truth_figure(rows, folder):
    figure, axes = new_figure(3, 3.2)
    families = {'one step': ['one_step, p_mask 0'],
                'one step, prompt masked (d1)': ['one_step, p_mask 0.15'],
                'coupled': ['coupled, p_mask 0'],
                'StepMerge': [f'stepmerge {n}' for n in (2, 4, 8, 16)],
                'ELBO (another quantity)': [f'elbo {n}' for n in (1, 2, 4, 16)]}
    for i, ((label, names), colour) in enumerate(zip(families.items(), COLOURS)):
        for axis, key in zip(axes, ('bias', 'rank', 'cosine')):
            means, ranges, forwards = [], [], []
            for name in names:
                found = [row['estimators'][name] for row in rows]
                middle, below_and_above = mean_and_range([values[key] for values in found])
                means.append(middle)
                ranges.append(below_and_above)
                forwards.append(found[0]['forwards'] * 1.04 ** (i - 2))      # side by side
            axis.errorbar(forwards, means, yerr=list(zip(*ranges)), marker='o', markersize=4,
                          color=colour, label=label, capsize=2, elinewidth=0.8)
    axes[0].set(ylabel='log p - exact log p, nats (bias)')
    axes[1].set(ylabel='rank correlation in a group', ylim=(None, 1.02))
    axes[2].set(ylabel='cosine with the exact gradient', ylim=(None, 1.02))
    for axis in axes:
        axis.set(xscale='log', xlabel='forward passes')
        axis.minorticks_off()
        axis.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=5, loc='lower center')
    bases, tasks = ({row[key] for row in rows} for key in ('base', 'task'))
    figure.suptitle(f'{sum(row["completions"] for row in rows)} rollouts in groups of 8; base, SFT '
                    f'and d1 models of bases {", ".join(map(str, sorted(bases)))}; {len(tasks)} '
                    'tasks: mean and range over models', fontsize=8)
    figure.subplots_adjust(bottom=0.28)
    save(figure, folder, 'truth', rect=(0, 0.07, 1, 1))


def ablation_figure(rows, folder):
    """Reward during training; every cell has the same number of forward passes."""
    figure, axes = new_figure(3, 2.9)
    bases = sorted({row['base'] for row in rows if row['kind'] == 'mu12-random'})
    rows = [row for row in rows if row['base'] in bases]

    def curves(name, key='reward'):
        name = 'default' if name in ('pmask0.15', 'mu4-random') else name
        return [row['curve'][key] for row in rows if row['kind'] == name]
    mus = [('mu2-random', 2), ('mu2-fixed', 2), ('mu4-random', 4), ('mu12-random', 12),
           ('mu12-fixed', 12), ('mu24-random', 24), ('mu24-fixed', 24)]
    colours = dict(zip((2, 4, 12, 24), COLOURS))
    for name, mu in mus:
        if not curves(name):
            continue
        reward = smoothed(mean_curve(curves(name)), 5)
        updates = [mu * (k + 1) for k in range(len(reward))]
        seconds = list(itertools.accumulate(mean_curve(curves(name, 'seconds'))))
        for axis, x in ((axes[0], updates), (axes[1], seconds)):
            axis.plot(x, reward, color=colours[mu], linestyle='--' if 'fixed' in name else '-',
                      label=name.replace('mu', 'mu ').replace('-', ', '))
    masks = ['pmask0', 'pmask0.15', 'pmask0.3', 'pmask0.5', 'pmask0.7']
    for name, colour in zip(masks, COLOURS):
        if curves(name):
            reward = smoothed(mean_curve(curves(name)), 5)
            axes[2].plot(range(1, len(reward) + 1), reward, color=colour,
                         label=name.replace('pmask', 'p_mask '))
    axes[0].set(xlabel='updates', ylabel='mean reward', title='random and fixed prompt masks')
    axes[1].set(xlabel='seconds', title='the same')
    axes[2].set(xlabel='iteration', title='masked share of the prompt')
    for axis, place, columns in ((axes[0], 0.31, 4), (axes[2], 0.81, 3)):
        figure.legend(*axis.get_legend_handles_labels(), fontsize=7, loc='lower center',
                      bbox_to_anchor=(place, 0), ncols=columns, columnspacing=1, handlelength=1.5)
    for axis in axes:
        axis.title.set_fontsize(8)
    figure.suptitle('One model for all five tasks, mean over bases ' + ', '.join(map(str, bases))
                    + ', at equal forward passes', fontsize=8)
    save(figure, folder, 'ablations', rect=(0, 0.12, 1, 1))


def methods_figure(rows, truth_rows, folder):
    """What training ends at, beside the part of the exact gradient that each estimator sees."""
    figure, [ends, cosines] = new_figure(2, 2.8)
    bases = sorted({row['base'] for row in rows if row['kind'] == 'espo'})
    rows = [row for row in rows if row['base'] in bases]
    starts = (('base', 'from the base', COLOURS[0], -0.15), ('sft', 'from SFT', COLOURS[1], 0.15))
    methods = dict(default='d1', stable='StableDRL', wd1='wd1', stepmerge4='StepMerge, 4 views',
                   elbo2='ELBO, 2 views', coupled='coupled views', espo='ESPO, coupled')
    for stage, label, colour, shift in starts:
        start = mean([100 * mean_score(row, stage) for row in rows if row['kind'] == 'base'])
        ends.axvline(start, color=colour, linestyle=':', linewidth=1)
        for j, name in enumerate(methods):
            if stage == 'sft':
                name = 'all' if name == 'default' else f'sft-{name}'
            found = [100 * mean_score(row, 'grpo') for row in rows if row['kind'] == name]
            if found:
                ends.plot(found, [j + shift] * len(found), 'o', color=colour, markersize=3,
                          label=label if j == 0 else None)
                ends.plot(mean(found), j + shift, '|', color=colour, markersize=12)
    ends.set_yticks(range(len(methods)), methods.values(), fontsize=7)
    ends.invert_yaxis()
    ends.set(xlabel='accuracy, % (mean of 5 tasks)')
    ends.set_title(f'a dot per base ({", ".join(map(str, bases))}); dotted: the start', fontsize=8)
    names = {'one_step, p_mask 0.15': 'one step (d1)', 'stepmerge 4, p_mask 0.15': 'StepMerge, 4',
             'elbo 2, p_mask 0.15': 'ELBO, 2', 'coupled': 'coupled'}
    seen = (('base', 'first_cosine', 'first step, base models', COLOURS[0]),
            ('sft', 'other_cosine', 'later steps, SFT models', COLOURS[1]))
    for i, (stage, key, label, colour) in enumerate(seen):
        lines = [row for row in truth_rows if row['stage'] == stage]
        for j, name in enumerate(names):
            width, (below, above) = mean_and_range([row['estimators'][name][key] for row in lines])
            cosines.barh(j + 0.36 * i - 0.18, width, 0.36, color=colour, ecolor=GREY,
                         xerr=[[below], [above]], label=label if j == 0 else None)
    cosines.set_yticks(range(len(names)), names.values(), fontsize=7)
    cosines.invert_yaxis()
    cosines.axvline(0, color=GREY, linewidth=0.8)
    cosines.set(xlabel='cosine with that part of the exact gradient')
    cosines.set_title('prompt masks as in training', fontsize=8)
    for axis, place in ((ends, 0.3), (cosines, 0.78)):
        figure.legend(*axis.get_legend_handles_labels(), fontsize=7, loc='lower center',
                      bbox_to_anchor=(place, 0), ncols=2)
    save(figure, folder, 'methods', rect=(0, 0.07, 1, 1))


def length_figure(rows, folder):
    """Accuracy and effective tokens over completion lengths, before and after one 'default'."""
    figure, axes = new_figure(2)
    bases = sorted({row['base'] for row in rows if row['kind'] == 'long-default'})
    rows = [row for row in rows if row['base'] in bases]
    lengths = (32, 64, 96, 128)
    before = (('base', 'base'), ('long-base', 'base'))           # (kind, stage)
    after = (('default', 'grpo'), ('long-default', 'base'))
    for axis, key, scale in zip(axes, ('accuracy', 'effective_tokens'), (100, 1)):
        for task, colour in zip(TASKS, COLOURS):
            for cells, style, label in ((before, ':', None), (after, '-', NAMES[task])):
                found = {length: scale * mean(values) for kind, stage in cells for length in lengths
                         if (values := scores(rows, kind, stage, task, length, key))}
                axis.plot(list(found), found.values(), style, marker='o', markersize=3,
                          color=colour, label=label)
        axis.set_xticks(lengths)
        axis.set(xlabel='completion length, tokens (training: 32)')
    axes[0].set(ylabel='accuracy, %', ylim=(0, 102))
    axes[1].set(ylabel='effective tokens', ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=5, loc='lower center')
    figure.suptitle('One model for all five tasks, before (dotted) and after diffu-GRPO; mean over '
                    f'bases {", ".join(map(str, bases))}', fontsize=8)
    save(figure, folder, 'lengths', rect=(0, 0.07, 1, 1))


def jobs(args):
    """Yields (function, arguments) of every cell that the results do not hold."""
    for base, kind in itertools.product(args.bases, args.kinds):
        if kind == 'truth':
            done = [(row['base'], row['task'], row['stage']) for row in rows_of(args.truth)]
            num_groups, draws = (2, 2) if args.quick else (8, 4)
            for task, stage in itertools.product(args.tasks, ('base', 'sft', 'd1')):
                if (base, task, stage) not in done:
                    yield truth, (base, task, stage, num_groups, draws)
            continue
        for tasks in KINDS[kind][0]:
            wanted = tasks == ALL or tasks in args.tasks
            if wanted and (base, kind, tasks) not in done_cells(args):
                yield run_cell, (base, kind, tasks)


def tables_and_figures(args):
    rows, truth_rows = rows_of(args.results), rows_of(args.truth)
    for length in (32,) if args.quick else (32, 64):
        main_table(rows, length)
    change_table(rows, 'base')
    change_table(rows, 'sft')
    truth_table(truth_rows)
    try:
        import matplotlib                        # noqa: F401
    except ImportError:
        print('no figures: pip install matplotlib')
        return
    folder = args.out if args.quick else ASSETS
    kinds = {row['kind'] for row in rows}
    learning_figure(rows, folder)
    results_figure(rows, folder)
    if 'mu12-random' in kinds:
        ablation_figure(rows, folder)
    if 'long-default' in kinds:
        length_figure(rows, folder)
    if truth_rows:
        truth_figure(truth_rows, folder)
        methods_figure(rows, truth_rows, folder)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--bases', nargs='*', type=int, default=[0, 1, 2, 3, 4])
    p.add_argument('--tasks', nargs='*', default=TASKS, choices=TASKS)
    p.add_argument('--kinds', nargs='*', default=[*KINDS, 'truth'], choices=[*KINDS, 'truth'])
    p.add_argument('--out', type=Path, default=Path('out'), help='where the runs are kept')
    p.add_argument('--results', type=Path, default=ASSETS / 'results', help='where the lines are')
    p.add_argument('--flags', default='', help='more flags for every run')
    p.add_argument('--quick', action='store_true', help='few iterations, problems and groups')
    p.add_argument('--tables', action='store_true', help='only print what is there')
    args = p.parse_args(argv)
    if args.quick:
        args.bases = [0]
        args.out = args.results = args.out / 'quick'
        args.flags = f'--eval_n 64 --eval_lengths 32 --grpo_steps 5 --eval_every 0 {args.flags}'
    args.results.mkdir(parents=True, exist_ok=True)
    args.truth = args.results / 'truth.jsonl'
    args.results = args.results / 'nano.jsonl'
    if not args.tables:
        for job, arguments in jobs(args):
            job(args, *arguments)
    tables_and_figures(args)


if __name__ == '__main__':
    main()
