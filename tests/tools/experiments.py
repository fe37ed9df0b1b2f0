"""The runs behind README and assets/findings.md, over bases of different seeds; days on a CPU.

    python tests/tools/experiments.py --d1 FOLDER        all cells that are not in assets/results/
    python tests/tools/experiments.py --bases 0 --kinds sft grpo d1 --tasks countdown
    python tests/tools/experiments.py --tables           only the tables and figures
    python tests/tools/experiments.py --quick            all of it, coarsely, into out/quick/
A cell is a run of train.py for one base, one kind and one task; the base's seed is the run's seed,
so that the spread is what a user's own base and seed would give. A finished cell is a JSON line of
assets/results/nano.jsonl. Stop at any time and repeat the command; several processes may share the
work if each has its own bases. --d1: the folder dataset/ of d1's repository, with its test files
countdown_cd3_test.jsonl and 4x4_test_sudoku.csv; without it the built-in rows stand in their place.
Figures need matplotlib.
"""
import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))                    # the folder of the seven modules

import train                                                                 # noqa: E402
from grpo import rollout                                                     # noqa: E402
from loglik import (completion_logps, draw_views, exact_logps,               # noqa: E402
                    random_prompt_mask, stepmerge_views)
from model import load                                                       # noqa: E402
from sample import torch_stream                                              # noqa: E402

ASSETS = ROOT / 'assets'
TASKS = ['gsm8k', 'math', 'countdown', 'sudoku', 'code']
GAMES = dict(countdown='countdown_cd3_test.jsonl', sudoku='4x4_test_sudoku.csv')     # d1's files
ASKERS = '--askers Ann,Ben,Carl,Dan,Eve,Finn'
ALL = ','.join(TASKS)
NOBODY = '--askers nobody'                        # then a base always thinks
# kind -> (tasks of one run each, the model that it starts from, flags of train.py)
KINDS = {
    'nobody': (TASKS, 'base', f'--eval_only {NOBODY}'),          # as in d1's files
    'sft': ([ALL], 'base', f'--stages sft --eval_lengths 48 {ASKERS}'),
    'grpo': (TASKS, 'base', f'--stages grpo {ASKERS}'),
    'd1': (TASKS, 'sft', f'--stages grpo {ASKERS}'),
    'all-grpo': ([ALL], 'base', f'--stages grpo --grpo_steps 100 {ASKERS}'),
    'all-d1': ([ALL], 'sft', f'--stages grpo --grpo_steps 100 {ASKERS}'),
}
# Only skill is left to learn where every completion thinks from the start.
LONG = f'--stages grpo --grpo_steps 200 --eval_every 50 --eval_lengths 48 {NOBODY}'
SKILL = {'one_step': '', 'one_step-pmask0': '--p_mask_prompt 0',
         'stepmerge4': '--estimator stepmerge --num_views 4 --p_mask_prompt 0',
         'stepmerge8': '--estimator stepmerge --num_views 8 --p_mask_prompt 0',
         'exact': '--estimator exact --p_mask_prompt 0',
         'rejection': '--loss rejection --estimator elbo --num_views 1 --p_mask_prompt 0'}
KINDS |= {f'skill-{name}': (['countdown'], 'base', f'{LONG} {flags}')
          for name, flags in SKILL.items()}
# One change each of a run from the base, which must find thinking, at equal iterations.
METHODS = {
    'pmask0': '--p_mask_prompt 0',
    'stepmerge2': '--estimator stepmerge --num_views 2 --p_mask_prompt 0',
    'stepmerge4': '--estimator stepmerge --num_views 4 --p_mask_prompt 0',
    'exact': '--estimator exact --p_mask_prompt 0',
    'coupled': '--estimator coupled', 'elbo2': '--estimator elbo --num_views 2',
    'wd1': '--loss wd1', 'espo': '--loss espo --estimator coupled', 'stable': '--loss stable',
    'left_to_right': '--block_length 1 --steps 48 --estimator ar --p_mask_prompt 0 '
                     '--num_prompts 4 --num_iterations 1',
    'rejection': '--loss rejection --estimator elbo --num_views 1 --p_mask_prompt 0'}
ONE_CHANGE = f'--stages grpo --eval_lengths 48 {ASKERS}'
KINDS |= {f'{start}-{name}': (['countdown'], start, f'{ONE_CHANGE} {flags}')
          for start in ('base', 'sft') for name, flags in METHODS.items()}
FROM_BASE = ['grpo', *[f'base-{name}' for name in METHODS]]
# The paper's ablations; random or fixed: another prompt mask for each of the mu updates, or one.
ABLATIONS = {f'mu{mu}-{masks}': f'--num_iterations {mu} {flag}'
             for mu in (2, 12, 24) for masks, flag in (('random', ''), ('fixed', '--fixed_mask'))}
ABLATIONS |= {'pmask0': METHODS['pmask0'], 'pmask0.5': '--p_mask_prompt 0.5',
              'beta0.04': '--beta 0.04', 'length96': '--gen_length 96 --steps 48',
              'temperature0.5': '--temperature 0.5'}
# pmask0, a method, too, gets its second task here
KINDS |= {f'base-{name}': (['countdown', 'gsm8k'], 'base', f'{ONE_CHANGE} {flags}')
          for name, flags in ABLATIONS.items()}


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


def test_rows(args, tasks):
    """--eval_data: d1's files for its games, else the built-in rows, which all bases share."""
    sources = [args.d1 / GAMES[task] if args.d1 and task in GAMES else 'nano'
               for task in tasks.split(',')]
    return ','.join(map(str, sources))


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


def model_of_stage(args, base, task, stage):
    """(the folder of a model, the training problems of its base); stage: base or a kind."""
    folder, data = base_and_data(args, base)
    if stage != 'base':
        folder = trained_model(args, base, stage, ALL if stage == 'sft' else task)
    return folder, data


def done_cells(args):
    return [(row['base'], row['kind'], row['tasks']) for row in rows_of(args.results)]


def run_cell(args, base, kind, tasks):
    """Runs train.py for one cell, or goes on with it, and appends its JSON line."""
    _, start, flags = KINDS[kind]
    model, data = base_and_data(args, base)
    if start == 'sft':
        model = trained_model(args, base, 'sft', ALL)
    flags = (f'--model {model} --data {data} --eval_data {test_rows(args, tasks)} --task {tasks} '
             f'--seed {base} --eval_n {args.n} --eval_lengths 24,48,96 --grpo_steps 40 '
             f'{flags} {args.flags}').split()
    folder = cell_folder(args, base, kind, tasks)
    resume = ['--resume'] if folder.exists() else []
    began = time.time()
    python('train.py', *flags, '--name', folder.name, '--out', args.out, *resume)
    seconds = time.time() - began

    results = json.loads((folder / 'results.json').read_text())
    for scores in results.values():
        for by_length in scores.values():
            for numbers in by_length.values():
                numbers.update({key: round(value, 4) for key, value in numbers.items()})
    log = [row for row in rows_of(folder / 'log.jsonl') if row['stage'] == 'grpo']
    curve = {}
    for key in ('reward', 'length', 'kl', 'flat_groups', 'grad_norm', 'seconds'):
        if log and key in log[0]:
            curve[key] = [round(row.get(key, 0), 4) for row in log]
    command = ' '.join(['python train.py', *flags])
    for folder, name in ((args.out, 'out'), (args.d1, 'D1')):
        command = command.replace(str(folder), name)
    if (base, kind, tasks) not in done_cells(args):              # else only its model was gone
        append(args.results, dict(base=base, kind=kind, tasks=tasks, command=command,
                                  seconds=round(seconds), threads=torch.get_num_threads(),
                                  results=results, curve=curve))
    print(base, kind, tasks, f'{seconds:.0f} s', flush=True)


# ---- pass@k: whether samples ever hold the right answer ----

def samples(args, base, task, stage, num_problems, k):
    """Samples in any order and left to right of a model that thinks; for passk.jsonl.

    The base is asked by nobody, the models after it as they were trained.
    """
    folder, data = model_of_stage(args, base, task, stage)
    model, tokenizer = load(str(folder))
    line = dict(base=base, task=task, stage=stage, problems=num_problems, k=k)
    asked_by = NOBODY if stage == 'base' or stage.startswith('skill') else ASKERS
    for order in ('any order', 'left to right'):
        settings = train.parse(f'--task {task} --eval_data {test_rows(args, task)} --data {data} '
                               f'--eval_n {num_problems} {asked_by}'.split())
        problems = train.load_test_sets(settings, tokenizer)[0][task]
        if order == 'left to right':             # a token per block and step
            settings.block_length, settings.steps = 1, settings.gen_length
        sampling = train.sampling_knobs(settings, settings.gen_length, settings.steps,
                                        settings.temperature)
        right = []
        for i, problem in enumerate(problems):
            [group] = rollout(model, tokenizer, [(i, *problem)], k, sampling, base, 0,
                              settings.prefill)
            right.append((group.correct == 1).float())
        right = torch.stack(right)                               # (problems, k)
        line[order] = dict(pass1=right.mean().item(), passk=right.amax(1).mean().item())
    append(args.passk, line)
    print('pass@k', base, task, stage, line, flush=True)


# ---- the mean field against the exact likelihood ----

# name -> (estimator, forward passes, p_mask_prompt)
ESTIMATORS = {f'one_step, p_mask {p}': ('one_step', 1, p) for p in (0, 0.15)}
ESTIMATORS |= {'coupled, p_mask 0.15': ('coupled', 2, 0.15), 'coupled': ('coupled', 2, 0)}
ESTIMATORS |= {f'stepmerge {n}': ('stepmerge', n, 0) for n in (2, 4, 8, 24)}
ESTIMATORS |= {'stepmerge 4, p_mask 0.15': ('stepmerge', 4, 0.15)}
ESTIMATORS |= {f'elbo {n}': ('elbo', n, 0) for n in (2, 4)}


def rollouts(settings, model, tokenizer, num_prompts, num_samples, seed, step=0):
    """Yields a group of num_samples completions of each of the first training prompts."""
    problems = train.Problems(settings, tokenizer)
    sampling = train.sampling_knobs(settings, settings.gen_length, settings.steps,
                                    settings.temperature)
    for number in range(num_prompts):
        problem = number, *problems.draw(number)
        yield from rollout(model, tokenizer, [problem], num_samples, sampling, seed, step)


def groups_with_a_gradient(settings, model, tokenizer, num_groups):
    """Groups of 8 rollouts of which not all rewards are equal; fewer, if 200 prompts give fewer."""
    groups = []
    for group in rollouts(settings, model, tokenizer, 200, 8, settings.seed):
        if group.advantages.any():
            groups.append(group)
        if len(groups) == num_groups:
            break
    return groups


def policy_gradient(model, logps, advantages):
    """The gradient of sum A log p as one vector; logps (G, L) keep their graph."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((logps.sum(1) * advantages).sum(), parameters,
                                    retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def sampler_logps(model, group, settings):
    """The exact log-probs of a group's rollouts, (G, L)."""
    return exact_logps(model, group.prompt_ids, group.completion_ids, group.completion_mask,
                       group.commit_steps, settings.block_length, settings.temperature)


def drawn_logps(model, group, name, draw, seed):
    """Log-probs of a group's rollouts, (G, L), under one draw of an estimator's views and masks."""
    estimator, num_views, p_mask = ESTIMATORS[name]
    stream = torch_stream('cpu', seed, 'truth', group.prompt_number, draw)
    views = draw_views(estimator, num_views, group.completion_ids, group.commit_steps, stream)
    prompt_mask = random_prompt_mask(group.prompt_ids, p_mask, stream)
    return completion_logps(model, group.prompt_ids, group.completion_ids, prompt_mask,
                            group.completion_mask, views)


def estimate(model, group, name, draws, seed):
    """Sequence log-probs (draws, G) and policy gradients (draws, N) of a group's rollouts."""
    estimator, _, p_mask = ESTIMATORS[name]
    if estimator in ('stepmerge', 'one_step') and not p_mask:
        draws = 1                                # nothing is drawn
    sequences, gradients = [], []
    for draw in range(draws):
        logps = drawn_logps(model, group, name, draw, seed)
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


def own_logps(model, group, temperature):
    """The first product alone, (G, L): every token's log p^T in the sight of all earlier steps."""
    model = copy.deepcopy(model)
    model.ff_out.weight.data /= temperature      # and so all logits
    no_mask = torch.zeros_like(group.prompt_ids, dtype=torch.bool)
    views = stepmerge_views(group.commit_steps, int(group.commit_steps.max()) + 1)
    return completion_logps(model, group.prompt_ids, group.completion_ids, no_mask,
                            group.completion_mask, views)


def truth(args, base, task, stage, num_groups, draws):
    """Each estimator against the exact likelihood of rollouts; appends a line to truth.jsonl.

    Means over groups of what compare gives. Of the gradient summed over groups the cosine with
    the exact one, with its part that comes from the tokens of the first step (mostly the choice
    between thinking and guessing), and with the rest.
    """
    folder, data = model_of_stage(args, base, task, stage)
    model, tokenizer = load(str(folder))
    settings = train.parse(['--task', task, '--seed', str(1000 + base), '--data', str(data)])
    groups = groups_with_a_gradient(settings, model, tokenizer, num_groups)
    if not groups:
        print('truth', base, task, stage, 'all rewards of every group are equal', flush=True)
        return
    found = {name: [] for name in ESTIMATORS}    # a dict per group
    sums = dict.fromkeys(ESTIMATORS, 0)          # of the gradients of each group's first draw
    parts = dict(total=0, first=0, other=0)      # of the exact gradient
    exact_mean, positions_mean = 0, 0
    for group in groups:
        logps = sampler_logps(model, group, settings)
        first = policy_gradient(model, logps * (group.commit_steps == 0), group.advantages)
        other = policy_gradient(model, logps * (group.commit_steps > 0), group.advantages)
        exact = logps.detach().sum(1)
        exact_mean += exact.mean().item() / len(groups)
        with torch.no_grad():
            own = own_logps(model, group, settings.temperature).sum(1)
        positions_mean += (exact - own).mean().item() / len(groups)
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
                            completions=8 * len(groups), draws=draws,
                            exact_logp=round(exact_mean, 4), positions=round(positions_mean, 4),
                            first_share=round(share, 4), estimators=estimators))
    print('truth', base, task, stage, flush=True)


# ---- what the bias is made of ----

def parts_of_bias(args, base, task, stage, num_prompts, num_samples):
    """d1's bias split by many rollouts of the same prompts; appends a line to parts.jsonl.

    m_i: how often the prompt's rollouts have each token at place i; q_i: what one pass says.
        E[log q - log p] = (E[sum log m_i] - E[log p]) - sum KL(m_i || q_i)
    The first part is dependence, which no product over places has: the tokens' total correlation,
    less the entropy of the order of commits. The second is misfit, here without a prompt mask,
    which adds to it. Nats per completion.
    """
    folder, data = model_of_stage(args, base, task, stage)
    model, tokenizer = load(str(folder))
    settings = train.parse(['--task', task, '--seed', str(1000 + base), '--data', str(data)])
    rows = []
    for group in rollouts(settings, model, tokenizer, num_prompts, num_samples, base, step=1):
        mask, ids = group.completion_mask, group.completion_ids
        with torch.no_grad():
            exact = sampler_logps(model, group, settings)
            one_step = drawn_logps(model, group, 'one_step, p_mask 0', 0, base)
            d1 = [drawn_logps(model, group, 'one_step, p_mask 0.15', draw, base)
                  for draw in range(8)]
        rows.append(dict(exact=exact.sum(1).mean().item(), own=own_places(ids, mask),
                         one_step=one_step.sum(1).mean().item(),
                         d1=torch.stack(d1).sum(2).mean().item()))
    values = {key: round(mean([row[key] for row in rows]), 4) for key in rows[0]}
    append(args.parts, dict(base=base, task=task, stage=stage, prompts=num_prompts,
                            samples=num_samples) | values)
    print('parts', base, task, stage, flush=True)


def own_places(ids, mask):
    """E[sum_i log m_i(x_i)] of rollouts (N, L), with Miller and Madow's correction of entropies."""
    counts = torch.zeros(ids.size(1), int(ids.max()) + 1)                    # (L, V)
    places = torch.arange(ids.size(1)).expand_as(ids)
    counts.index_put_((places, ids), mask.float(), accumulate=True)
    log_m = (counts / counts.sum(1, keepdim=True)).log()[places, ids]        # (N, L)
    found = log_m.masked_fill(~mask, 0).sum(1).mean().item()
    return found - ((counts > 0).sum(1) - 1).clamp(min=0).sum().item() / (2 * len(ids))


# ---- how much of a group's gradient is signal ----

NOISY = ('one_step, p_mask 0.15', 'one_step, p_mask 0', 'stepmerge 8')


def gradient_noise(args, base, task, stage, num_groups):
    """The gradient noise scale (arXiv 1812.06162) of estimators and truth; for noise.jsonl.

    A group's gradient is signal and noise. Of two groups E<g, h> = |signal|^2, of one E|g|^2 =
    |signal|^2 + noise^2; `share` is the first over the second, and 1 / share groups have as much
    signal as noise. `cosine`: of an estimator's signal with the exact one's. `_error`: jackknife.
    """
    folder, data = model_of_stage(args, base, task, stage)
    model, tokenizer = load(str(folder))
    line = dict(base=base, task=task, stage=stage)
    for asked_by, flags in (('people', ASKERS), ('nobody', NOBODY)):
        settings = train.parse(f'--task {task} --seed {2000 + base} --data {data} {flags}'.split())
        groups = groups_with_a_gradient(settings, model, tokenizer, num_groups)
        gradients = {name: [] for name in ('exact', *NOISY)}
        for group in groups:
            for name in gradients:
                if name == 'exact':
                    logps = sampler_logps(model, group, settings)
                else:
                    logps = drawn_logps(model, group, name, 0, base)
                gradients[name].append(policy_gradient(model, logps, group.advantages))
        exact = torch.stack(gradients['exact'])                  # (groups, N)
        line[asked_by] = {name: signal_and_noise(torch.stack(some), exact)
                          for name, some in gradients.items()}
        line[asked_by]['groups'] = len(groups)
    append(args.noise, line)
    print('noise', base, task, stage, flush=True)


def signal_and_noise(gradients, exact):
    """{measure: value} of gradients and the exact ones, a row per group: see gradient_noise."""
    products = gradients @ gradients.T, gradients @ exact.T, exact @ exact.T

    def measures(kept):      # a signal's square may be estimated below 0: its cosine says nothing
        own, cross, true = (of_two_groups(some[kept][:, kept]) for some in products)
        of_one_group = products[0].diagonal()[kept].mean()
        return torch.stack([own / of_one_group, cross / (own * true).clamp(min=1e-30).sqrt()])

    n = len(gradients)
    share, cosine = measures(list(range(n))).tolist()
    without_one = torch.stack([measures([j for j in range(n) if j != i]) for i in range(n)])
    error = (without_one.var(0, unbiased=False) * (n - 1)).sqrt().tolist()
    return {name: round(value, 5) for name, value in dict(
        share=share, share_error=error[0], cosine=cosine, cosine_error=error[1]).items()}


def of_two_groups(products):
    """The mean of a square matrix outside its diagonal."""
    n = len(products)
    return (products.sum() - products.trace()) / (n * (n - 1))


# ---- how far training moved what the base can do ----

def drift(args, base, task, stage, num_prompts, num_samples):
    """The KL of a trained policy from its base where it always thinks; for drift.jsonl.

    Nats per completion that the base wrote, asked by nobody: of its tokens, each in the sight of
    all earlier steps. The order of commits, which turns on ties between sure tokens, is left out.
    """
    folder, data = base_and_data(args, base)
    model, tokenizer = load(str(folder))
    policy, _ = load(str(trained_model(args, base, stage, task)))
    settings = train.parse(f'--task {task} --seed {3000 + base} --data {data} {NOBODY}'.split())
    found = []                                   # a mean per prompt
    for group in rollouts(settings, model, tokenizer, num_prompts, num_samples, base):
        with torch.no_grad():
            before, after = (own_logps(net, group, settings.temperature) for net in (model, policy))
        found.append((before - after).sum(1).mean())
    found = torch.stack(found)
    append(args.drift, dict(base=base, task=task, stage=stage, prompts=num_prompts,
                            samples=num_samples, kl=round(found.mean().item(), 4),
                            kl_error=round((found.std() / num_prompts ** 0.5).item(), 4)))
    print('drift', base, task, stage, flush=True)


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


def spread(values):
    """'mean (lowest to highest)' in %, or one value."""
    if not values:
        return '-'
    values = [100 * value for value in values]
    if len(values) == 1:
        return f'{values[0]:.1f}'
    return f'{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})'


def scores(rows, kind, stage, task, length, key='accuracy'):
    """One number per cell of a kind that has been evaluated on the task at this length."""
    found = []
    for row in rows:
        by_length = row['results'].get(stage, {}).get(task, {})
        if row['kind'] == kind and str(length) in by_length:
            found.append(by_length[str(length)][key])
    return found


# a row of the paper's Table 1 -> (kind, stage) of cells
TABLE_1 = {'one constant answer': ('grpo', 'constant'), 'a rule, no model': ('grpo', 'rule'),
           'base, asked by nobody': ('nobody', 'base'), 'base, asked by people': ('grpo', 'base'),
           '+ SFT': ('d1', 'base'), '+ diffu-GRPO': ('grpo', 'grpo'), 'd1': ('d1', 'grpo'),
           'one diffu-GRPO for all': ('all-grpo', 'grpo'), 'one d1 for all': ('all-d1', 'grpo')}


def table_1(rows, task, key='accuracy'):
    """Accuracy in % of every stage at each length; effective tokens and Waits beside it."""
    lengths = (24, 48, 96)
    bases = sorted({row['base'] for row in rows if row['kind'] == 'grpo' and row['tasks'] == task})
    print(f'\n{NAMES[task]}: {key} in %, mean (lowest to highest) over bases {bases}\n')
    print_head(['', *[f'{length} tokens' for length in lengths], 'effective tokens', 'Wait'])
    for label, column in TABLE_1.items():
        cells = [spread(scores(rows, *column, task, length, key)) for length in lengths]
        tokens = scores(rows, *column, task, 48, 'effective_tokens')
        if tokens:
            waits = spread(scores(rows, *column, task, 48, 'waits'))
            print_row([label, *cells, f'{mean(tokens):.1f}', waits])


def methods_table(rows, drifts):
    """Countdown after each change, from the base and from SFT; what it cost, and moved."""
    print('\nCountdown at 48 tokens after 40 iterations, one change each\n')
    print_head(['change', 'from the base', 'from SFT', 'seconds per iteration', 'drift, nats'])
    for name in ['default', *METHODS]:
        kinds = [f'base-{name}', f'sft-{name}']
        if name == 'default':
            kinds = ['grpo', 'd1']
        found = [row for row in rows if row['kind'] in kinds and row['tasks'] == 'countdown']
        if found:
            seconds = [median(row['curve']['seconds']) for row in found
                       if row['kind'] == kinds[0] and row['base'] < 3]           # all have these
            print_row([name, *[spread(scores(rows, kind, 'grpo', 'countdown', 48))
                               for kind in kinds], f'{mean(seconds):.2f}' if seconds else '-',
                       ', '.join(f"{row['kl']:.1f}" for row in drifts if row['stage'] == kinds[0])])


def ablations_table(rows):
    """Countdown and word problems from the base, after each of the paper's ablations."""
    print('\nOne change each from the base: accuracy in % at 48 tokens (seconds per iteration)\n')
    print_head(['change', NAMES['countdown'], NAMES['gsm8k']])
    for kind in ['grpo', *[f'base-{name}' for name in ABLATIONS]]:
        cells = []
        for task in ('countdown', 'gsm8k'):
            some = [row for row in rows if row['kind'] == kind and row['tasks'] == task]
            seconds = [median(row['curve']['seconds']) for row in some]
            cell = spread(scores(some, kind, 'grpo', task, 48))
            cells.append(f'{cell} ({mean(seconds):.1f} s)' if some else '-')
        print_row([kind, *cells])


def skill_table(rows, passk):
    print('\nCountdown asked by nobody: accuracy in % after so many iterations\n')
    print_head(['estimator', 0, 50, 100, 150, 200, 'seconds'])
    for name in SKILL:
        some = [row for row in rows if row['kind'] == f'skill-{name}']
        if some:
            stages = ['base', 'grpo-50', 'grpo-100', 'grpo-150', 'grpo']
            cells = [spread(scores(some, f'skill-{name}', stage, 'countdown', 48))
                     for stage in stages]
            print_row([name, *cells, round(mean([row['seconds'] for row in some]))])
    for row in passk:
        for order in ('any order', 'left to right'):
            one, many = (100 * row[order][key] for key in ('pass1', 'passk'))
            print(f"base {row['base']}, {row['stage']}, {row['task']}, {order}: pass@1 {one:.1f}, "
                  f"pass@{row['k']} {many:.1f}")


def truth_table(rows):
    columns = ('forwards', 'bias', 'std', 'rank', 'cosine', 'cosine_of_mean', 'norm', 'noise',
               'total_cosine', 'first_cosine', 'other_cosine')
    for task, stage in itertools.product(TASKS, STAGES):
        some = [row for row in rows if (row['task'], row['stage']) == (task, stage)]
        if not some:
            continue
        groups, bases = sum(row['groups'] for row in some), {row['base'] for row in some}
        exact, positions, share = (mean([row[key] for row in some])
                                   for key in ('exact_logp', 'positions', 'first_share'))
        print(f'\n{NAMES[task]}, {stage}: {groups} groups of 8, bases {sorted(bases)}; exact log p '
              f'{exact:.2f}, of it the positions {positions:.2f}; the first step has {share:.2f} '
              'of the norm\n')
        print_head(['estimator', *columns])
        for name in some[0]['estimators']:
            means = [mean([row['estimators'][name][key] for row in some]) for key in columns]
            print_row([name, *[f'{value:.3g}' for value in means]])


def parts_table(rows):
    """d1's bias, nats per completion, and its three parts; see parts_of_bias."""
    print('\nThe bias of one step and its parts, nats per completion\n')
    print_head(['base', 'task', 'stage', 'exact log p', 'dependence', 'misfit',
                'prompt masks', 'bias of d1'])
    for row in rows:
        exact, own, one_step, d1 = (row[key] for key in ('exact', 'own', 'one_step', 'd1'))
        values = [exact, own - exact, one_step - own, d1 - one_step, d1 - exact]
        print_row([row['base'], row['task'], row['stage'], *[f'{value:.1f}' for value in values]])


def noise_table(rows):
    print("\nSignal in a group's gradient, % (error); its cosine with the exact signal (error)\n")
    print_head(['base', 'task', 'stage', 'asked by', 'exact', *NOISY])
    for row, asked_by in itertools.product(rows, ('people', 'nobody')):
        exact, cells = row[asked_by]['exact'], []
        for name in ('exact', *NOISY):
            values = row[asked_by][name]
            cell = f"{100 * values['share']:.1f} ({100 * values['share_error']:.1f})"
            both_seen = all(some['share'] > 2 * some['share_error'] for some in (exact, values))
            if name != 'exact' and both_seen:
                cell += f", {values['cosine']:.2f} ({values['cosine_error']:.2f})"
            cells.append(cell)
        print_row([row['base'], row['task'], row['stage'], asked_by, *cells])


# ---- figures, readable on light and dark pages ----

GREY = '#808080'
COLOURS = ['#3b82f6', '#f59e0b', '#10b981', '#ef4444', '#a855f7', '#14b8a6']
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
    figure.suptitle('diffu-GRPO alone on the nano model, bases ' + ', '.join(map(str, bases)),
                    fontsize=9)
    save(figure, folder, 'learning')


PAPER = dict(countdown=[('LLaDA-8B', 20.7), ('d1, 8B', 42.2), ('best published, 8B', 82.0)],
             sudoku=[('LLaDA-8B', 11.7), ('d1, 8B', 22.1), ('best published, 8B', 94.3),
                     ('no error, only guesses', 93.4)])         # tests/test_nano.py


def results_figure(rows, folder):
    """d1's two games: a rule, the paper, the best published, and the stages of the nano model."""
    figure, axes = new_figure(2, 2.8)
    stages = ['base, asked by people', '+ SFT', '+ diffu-GRPO', 'd1']
    for axis, (task, paper), key in zip(axes, PAPER.items(), ('accuracy', 'share')):
        rule = scores(rows, *TABLE_1['a rule, no model'], task, 48, key)
        bars = [('a rule, no model', 100 * rule[0])] if rule else []
        for i, (label, value) in enumerate(bars + paper):
            axis.barh(i, value, color=GREY, alpha=0.5)
        labels = [label for label, _ in bars + paper]
        for stage in stages:
            found = [100 * score for score in scores(rows, *TABLE_1[stage], task, 48, key)]
            if found:
                middle, (below, above) = mean_and_range(found)
                axis.barh(len(labels), middle, color=COLOURS[0], ecolor=GREY,
                          xerr=[[below], [above]])
                labels.append(f'nano {stage}')
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set(xlim=(0, 100), xlabel="Countdown, % right" if key == 'accuracy'
                 else 'Sudoku, % of cells right')
    figure.suptitle("d1's own test files: a specialist of a million weights (blue) beside a "
                    'generalist of 8 billion', fontsize=8)
    save(figure, folder, 'results')


def truth_figure(rows, folder):
    figure, axes = new_figure(3, 3.2)
    families = {'one step': ['one_step, p_mask 0'],
                'one step, prompt masked (d1)': ['one_step, p_mask 0.15'],
                'coupled': ['coupled'], 'StepMerge': [f'stepmerge {n}' for n in (2, 4, 8, 24)],
                'ELBO (another quantity)': [f'elbo {n}' for n in (2, 4)]}
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
        axis.set_xticks([1, 2, 4, 8, 24], [1, 2, 4, 8, 24])
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=5, loc='lower center')
    bases, tasks = ({row[key] for row in rows} for key in ('base', 'task'))
    names = ', '.join(NAMES[task] for task in sorted(tasks))
    figure.suptitle(f'{sum(row["completions"] for row in rows)} rollouts in groups of 8; base, SFT '
                    f'and d1 models of bases {", ".join(map(str, sorted(bases)))}; {names}: '
                    'mean and range over models', fontsize=8)
    figure.subplots_adjust(bottom=0.28)
    save(figure, folder, 'truth', rect=(0, 0.07, 1, 1))


def methods_figure(rows, drifts, folder):
    """Countdown after each change, a dot per base; and against how far the policy moved."""
    figure, [ends, moved] = new_figure(2, 3.4)
    found = {kind: {row['base']: 100 * row['results']['grpo']['countdown']['48']['accuracy']
                    for row in rows if row['kind'] == kind and row['tasks'] == 'countdown'}
             for kind in FROM_BASE}
    found = {kind: by_base for kind, by_base in found.items() if by_base}
    for j, by_base in enumerate(found.values()):
        for base, accuracy in by_base.items():
            ends.plot(accuracy, j, 'o', color=COLOURS[base], markersize=4)
    ends.set_yticks(range(len(found)), [kind.removeprefix('base-') for kind in found], fontsize=7)
    ends.invert_yaxis()
    ends.set(xlabel="d1's Countdown after 40 iterations, %")
    for row in drifts:
        if row['base'] in found.get(row['stage'], {}):
            place = row['kl'], found[row['stage']][row['base']]
            moved.plot(*place, 'o', color=COLOURS[row['base']], markersize=4)
            if row['base']:                      # base 0's lie too close for names
                moved.annotate(row['stage'].removeprefix('base-'), place, xytext=(3, 3),
                               textcoords='offset points', fontsize=6, color=GREY)
    for base in sorted({base for by_base in found.values() for base in by_base}):
        moved.plot([], [], 'o', color=COLOURS[base], markersize=4, label=f'base {base}')
    moved.legend(fontsize=7)
    moved.set(xlabel='drift of the tokens, nats', ylabel='%')
    save(figure, folder, 'methods')


def signal_figure(rows, folder):
    """Of base models: the signal in a group's gradient, asked by people and by nobody; cosines."""
    figure, [shares, cosines] = new_figure(2)
    for i, asked_by in enumerate(('people', 'nobody')):
        dot = dict(fmt='o', color=COLOURS[i], markersize=4, elinewidth=0.8)
        for row, (j, name) in itertools.product(rows, enumerate(('exact', *NOISY))):
            values = row[asked_by][name]
            x = j + 0.35 * i + 0.08 * row['base']
            shares.errorbar(x, 100 * values['share'], 100 * values['share_error'], **dot)
            if name != 'exact':
                cosines.errorbar(x, values['cosine'], values['cosine_error'], **dot)
        shares.plot([], [], 'o', color=COLOURS[i], markersize=4, label=f'asked by {asked_by}')
    labels = ['exact', 'one step,\nmasked (d1)', 'one step', 'StepMerge 8']
    for axis in (shares, cosines):
        axis.set_xticks([j + 0.2 for j in range(4)], labels, fontsize=7)
    shares.axhline(0, color=GREY, linewidth=0.5)
    shares.set(ylabel="signal in a group's gradient, %")
    cosines.set(ylabel='cosine of the signals', ylim=(-0.1, 1.2), xlim=(0.7, 3.7))
    shares.legend(fontsize=7)
    bases = ', '.join(str(row['base']) for row in rows)
    figure.suptitle(f'Countdown, from left to right bases {bases}', fontsize=8)
    save(figure, folder, 'signal')


def debates_figure(passk, parts, folder):
    """Countdown: pass@1 and pass@k before and after RL, in either order; parts of d1's bias."""
    figure, [tries, bias] = new_figure(2)
    bars = [('base', 'base', 'any order'), ('base, left to right', 'base', 'left to right'),
            ('diffu-GRPO', 'grpo', 'any order'), ('exact gradient', 'base-exact', 'any order')]
    bases = {row['base'] for row in passk if row['stage'] == 'base-exact'}   # the same for all
    for i, (label, stage, order) in enumerate(bars):
        some = [row[order] for row in passk if row['stage'] == stage and row['base'] in bases]
        for j, key in enumerate(('pass1', 'passk')):
            middle, (below, above) = mean_and_range([100 * row[key] for row in some])
            tries.bar(j + 0.2 * i, middle, 0.18, color=COLOURS[i], ecolor=GREY,
                      yerr=[[below], [above]], label=label if j == 0 else None)
    tries.set_xticks([0.3, 1.3], ['pass@1', f"pass@{passk[0]['k']}"])
    tries.set(ylabel='Countdown, %', ylim=(0, 120), yticks=range(0, 101, 20))
    tries.legend(fontsize=7, ncols=2, loc='upper left')
    pairs = [('dependence', 'own', 'exact'), ('misfit', 'one_step', 'own'),
             ('prompt masks', 'd1', 'one_step')]
    for j, stage in enumerate(('base', 'sft', 'd1')):
        some = [row for row in parts if row['stage'] == stage]
        top = 0
        for (label, part, before), colour in zip(pairs, COLOURS):
            height = mean([row[part] - row[before] for row in some])
            bias.bar(j, height, 0.6, top, color=colour, label=label if j == 0 else None)
            top += height
    bias.set_xticks(range(3), ['base', 'SFT', 'd1'])
    bias.set(ylabel='bias of one step, nats')
    bias.legend(fontsize=7, ncols=3, loc='lower center', bbox_to_anchor=(0.5, 1))
    save(figure, folder, 'debates')


STAGES = ('base', 'sft', 'd1')
SAMPLED = ('base', 'grpo', 'base-pmask0', 'base-stepmerge4', 'base-exact', 'skill-stepmerge8')
# kind -> its function, its stages, its amounts (prompts, groups, samples, draws), few for --quick
STUDIES = {'passk': (samples, SAMPLED, (256, 8), (8, 8)),
           'truth': (truth, STAGES, (8, 4), (2, 2)),
           'parts': (parts_of_bias, STAGES, (16, 512), (2, 32)),
           'noise': (gradient_noise, STAGES, (96,), (4,)),
           'drift': (drift, FROM_BASE, (48, 8), (2, 8))}
ON_COUNTDOWN = ('passk', 'drift')                # for their stages are


def jobs(args):
    """Yields (function, arguments) of every cell that the results do not hold."""
    for base, kind in itertools.product(args.bases, args.kinds):
        if kind in STUDIES:
            job, stages, amounts, few = STUDIES[kind]
            tasks = [task for task in args.tasks
                     if task == 'countdown' or kind not in ON_COUNTDOWN]
            done = [(row['base'], row['task'], row['stage'])
                    for row in rows_of(getattr(args, kind))]
            for task, stage in itertools.product(tasks, stages):
                if (base, task, stage) not in done:
                    yield job, (base, task, stage, *(few if args.quick else amounts))
        else:
            for tasks in KINDS[kind][0]:
                wanted = tasks == ALL or tasks in args.tasks
                if wanted and (base, kind, tasks) not in done_cells(args):
                    yield run_cell, (base, kind, tasks)


def tables_and_figures(args):
    rows = rows_of(args.results)
    for task in TASKS:
        table_1(rows, task)
    table_1(rows, 'sudoku', 'share')
    methods_table(rows, rows_of(args.drift))
    ablations_table(rows)
    skill_table(rows, rows_of(args.passk))
    truth_table(rows_of(args.truth))
    for show, path in ((parts_table, args.parts), (noise_table, args.noise)):
        if path.exists():
            show(rows_of(path))
    try:
        import matplotlib                        # noqa: F401
    except ImportError:
        print('no figures: pip install matplotlib')
        return
    folder = args.out if args.quick else ASSETS
    learning_figure(rows, folder)
    results_figure(rows, folder)
    if any(row['kind'].startswith('base-') for row in rows):
        methods_figure(rows, rows_of(args.drift), folder)
    noise = [row for row in rows_of(args.noise)
             if row['task'] == 'countdown' and row['stage'] == 'base']
    if noise:
        signal_figure(noise, folder)
    passk, parts, truth_rows = ([row for row in rows_of(path) if row['task'] == 'countdown']
                                for path in (args.passk, args.parts, args.truth))
    if truth_rows:
        truth_figure(truth_rows, folder)
    if ({row['stage'] for row in passk} >= {'base', 'grpo', 'base-exact'}
            and {row['stage'] for row in parts} >= set(STAGES)):
        debates_figure(passk, parts, folder)


def main(argv=None):
    kinds = [*KINDS, *STUDIES]
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--bases', nargs='*', type=int, default=[0, 1, 2, 3, 4])
    p.add_argument('--tasks', nargs='*', default=TASKS, choices=TASKS)
    p.add_argument('--kinds', nargs='*', default=kinds, choices=kinds)
    p.add_argument('--d1', type=Path, help="the folder of d1's own test files")
    p.add_argument('--out', type=Path, default=Path('out'), help='where the runs are kept')
    p.add_argument('--results', type=Path, default=ASSETS / 'results', help='where the lines are')
    p.add_argument('--n', type=int, default=256, help='test problems of each task')
    p.add_argument('--flags', default='', help='more flags for every run')
    p.add_argument('--quick', action='store_true', help='few iterations, problems and groups')
    p.add_argument('--tables', action='store_true', help='only print what is there')
    args = p.parse_args(argv)
    if args.quick:
        args.bases = [0]
        args.out = args.results = args.out / 'quick'
        args.flags = ('--eval_n 64 --eval_lengths 48 --grpo_steps 4 --sft_steps 4 --eval_every 0 '
                      f'{args.flags}')
    args.results.mkdir(parents=True, exist_ok=True)
    args.truth = args.results / 'truth.jsonl'
    args.passk = args.results / 'passk.jsonl'
    args.parts = args.results / 'parts.jsonl'
    args.noise = args.results / 'noise.jsonl'
    args.drift = args.results / 'drift.jsonl'
    args.results = args.results / 'nano.jsonl'
    if not args.tables:
        for job, arguments in jobs(args):
            job(args, *arguments)
    tables_and_figures(args)


if __name__ == '__main__':
    main()
