"""Shows what diffu-GRPO sees in a group of completions, token by token, as one HTML page.

    python tests/tools/microscope.py
    python tests/tools/microscope.py --model nano out/NAME/model --titles base d1 --task countdown
Each model samples groups for the first training problems, an iteration's at least, until it has
--problems mixed ones (unequal rewards) and a flat one (equal rewards). A copy of the model then
makes the mu updates of train_grpo on each, as if it were the only group of an iteration. All other
flags are train.py's, with its defaults: --seed 1, --epsilon 0.2, --num_iterations 8. All weights
are trained, without adapters. The page needs neither a server nor a library; its other half is
microscope_template.html.

What stands after # in its address sets the controls. assets/microscope.png is made like this:
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1080,890 \\
        --blink-settings=preferredColorScheme=1 --screenshot=assets/microscope.png \\
        "file://$PWD/assets/microscope.html#group=2&step=16&update=4&completion=2&token=8"
    pngquant --force --ext .png assets/microscope.png
"""
import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

ROOT = Path(__file__).resolve().parents[2]                       # the folder of the seven modules
sys.path.insert(0, str(ROOT))

import train                                                                 # noqa: E402
from grpo import old_and_ref_logps, policy_loss, rollout                     # noqa: E402
from loglik import (completion_logps, draw_views, random_prompt_mask,        # noqa: E402
                    stepmerge_views)
from model import load                                                       # noqa: E402
from sample import torch_stream                                              # noqa: E402

TEMPLATE = Path(__file__).with_name('microscope_template.html')
SEARCH = 200               # so many training problems are tried
SETTINGS = ('task', 'seed', 'temperature', 'num_generations', 'num_iterations', 'p_mask_prompt',
            'epsilon', 'beta', 'learning_rate', 'estimator')     # what the page says of the run


def find_groups(args, model, tokenizer, problems, num_mixed):
    """The most mixed groups of the first problems and a flat one, as [(problem index, group)].

    Problems, groups and noise are those of a run of train.py that begins with this model.
    """
    sampling = train.sampling_knobs(args, args.gen_length, args.steps, args.temperature)
    mixed, flat = [], []
    for index in range(SEARCH):
        step, prompt_number = divmod(index, args.num_prompts)
        problem = (prompt_number, *problems.draw(index))
        [group] = rollout(model, tokenizer, [problem], args.num_generations, sampling, args.seed,
                          step, args.prefill, args.divide_by_std)
        if group.advantages.any():
            mixed.append((index, group))
        else:
            flat.append((index, group))
        enough = len(mixed) >= num_mixed and flat
        if enough and index + 1 >= args.num_prompts:
            break
    if len(mixed) < num_mixed or not flat:
        print(f'{args.model}: {len(mixed)} mixed and {len(flat)} flat groups in {SEARCH} problems')
    mixed.sort(key=spread, reverse=True)
    return mixed[:num_mixed] + flat[:1]


def spread(found):
    """The standard deviation of a found group's rewards."""
    _, group = found
    return group.rewards.std().item()


@torch.no_grad()
def commit_confidences(model, group):
    """What the sampler ranks tokens by, (G, L): a token's probability in the step it came in."""
    G, L = group.completion_ids.shape
    mask_id, device = model.config.mask_id, group.prompt_ids.device
    positions = group.prompt_ids.size(1) + torch.arange(L, device=device).expand(G, L)
    confidences = torch.zeros(G, L, device=device)
    for step in range(int(group.commit_steps.max()) + 1):
        completion = group.completion_ids.masked_fill(group.commit_steps >= step, mask_id)
        ids = torch.cat((group.prompt_ids, completion), dim=1)               # (G, T)
        logits = model(ids, None, positions).float()                         # (G, L, V)
        logits[..., mask_id] = -torch.inf                                    # is never drawn
        tokens = group.completion_ids.unsqueeze(-1)                          # (G, L, 1)
        drawn = logits.softmax(-1).gather(-1, tokens)[..., 0]                # (G, L)
        confidences = torch.where(group.commit_steps == step, drawn, confidences)
    return confidences


@torch.no_grad()
def sighted_logps(model, group):
    """Log-probs of a group without a prompt mask, (G, L) each: one step, and along the rollout."""
    no_mask = torch.zeros_like(group.prompt_ids, dtype=torch.bool)
    inputs = group.prompt_ids, group.completion_ids, no_mask, group.completion_mask
    one_step = completion_logps(model, *inputs)
    # as many views as steps: each token in the sight of what was committed before its step
    views = stepmerge_views(group.commit_steps, int(group.commit_steps.max()) + 1)
    return one_step, completion_logps(model, *inputs, views)


def make_updates(args, model, group, step, num_prefill):
    """The mu updates of train_grpo on one group, by a copy of the model: a dict for each.

    step: the iteration, which keys the prompt masks, so that they are those of train_grpo.
    """
    policy = copy.deepcopy(model)
    reference = train.reference_policy(args, policy)
    optimizer = train.adamw(policy, args.learning_rate)
    has_gradient = bool(args.beta or group.advantages.any())     # else train_grpo leaves it out
    prepared = []                                # all before the first update
    for n in range(args.num_iterations):
        key = (0 if args.fixed_mask else n, group.prompt_number)
        stream = torch_stream(args.device, args.seed, 'mask', step, *key)
        prompt_mask = random_prompt_mask(group.prompt_ids, args.p_mask_prompt, stream, num_prefill)
        views = draw_views(args.estimator, args.num_views, group.completion_ids,
                           group.commit_steps, stream, args.block_length, args.temperature)
        old_logps, ref_logps = old_and_ref_logps(policy, reference, group, prompt_mask, views,
                                                 args.loss, args.beta)
        prepared.append((prompt_mask, views, old_logps, ref_logps))

    updates = []
    A = group.advantages.unsqueeze(1)                                        # (G, 1)
    for prompt_mask, views, old_logps, ref_logps in prepared:
        inputs = group.prompt_ids, group.completion_ids, prompt_mask, group.completion_mask, views
        logps = completion_logps(policy, *inputs)
        loss, stats = policy_loss(args.loss, logps, old_logps, ref_logps, group.advantages,
                                  group.completion_mask, args.epsilon, args.beta, args.norm)
        if has_gradient:
            loss.backward()
        grad_norm = clip_grad_norm_(policy.parameters(), 0.2)                # d1's
        optimizer.step()                         # leaves weights without a gradient alone
        optimizer.zero_grad()
        with torch.no_grad():
            logps_after = completion_logps(policy, *inputs)
        ratio = (logps.detach() - old_logps).exp()               # (G, L); 1 where nothing counts
        clip_high = (ratio > 1 + args.epsilon) & (A > 0)
        clip_low = (ratio < 1 - args.epsilon) & (A < 0)
        updates.append(dict(
            prompt_mask=prompt_mask.int().tolist(), old=rounded(old_logps),
            ratio=rounded(ratio), ratio_after=rounded((logps_after - old_logps).exp()),
            clip=(clip_high | clip_low).int().tolist(), grad_norm=round(grad_norm.item(), 4),
            stats={name: round(value, 4) for name, value in stats.items()}))
    return updates


def rounded(values):
    """values (G, L) -> nested lists, four decimals."""
    return [[round(value, 4) for value in row] for row in values.tolist()]


def pieces(tokenizer, ids):
    """What each token reads as, '' for special ones."""
    return [tokenizer.decode([token], skip_special_tokens=True) for token in ids.tolist()]


def group_data(args, model, tokenizer, title, index, group):
    """All that the page shows of a group; lists per completion (G), or per completion and token."""
    step = index // args.num_prompts
    num_prefill = len(train.prefill_ids(args, tokenizer))
    one_step, along_rollout = sighted_logps(model, group)
    return dict(
        model=title, problem=index, flat=not group.advantages.any().item(),
        prompt=[tokenizer.decode([token]) for token in group.prompt_ids[0].tolist()],
        tokens=[pieces(tokenizer, ids) for ids in group.completion_ids],
        lengths=group.completion_mask.sum(1).tolist(),           # tokens that count
        commit_steps=group.commit_steps.tolist(),
        confidence=rounded(commit_confidences(model, group)),
        one_step=rounded(one_step), along_rollout=rounded(along_rollout),
        rewards=[round(reward, 4) for reward in group.rewards.tolist()],
        advantages=[round(advantage, 4) for advantage in group.advantages.tolist()],
        updates=make_updates(args, model, group, step, num_prefill))


def page(settings, groups):
    """The page, as text. A completion may say anything, so no < of it may end the script."""
    data = json.dumps(dict(settings=settings, groups=groups), separators=(',', ':'))
    return TEMPLATE.read_text().replace('$DATA', data.replace('<', '\\u003c'))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', nargs='+', default=['nano'], help='folders or hub ids [nano]')
    p.add_argument('--titles', nargs='+', help='of the models [their names]')
    p.add_argument('--task', default='countdown', help='whose training problems [countdown]')
    p.add_argument('--problems', type=int, default=1, help='mixed groups per model [1]')
    p.add_argument('--out', default=ROOT / 'assets/microscope.html',
                   help='the file [assets/microscope.html]')
    own, others = p.parse_known_args(argv)
    titles = own.titles or own.model
    if len(titles) != len(own.model):
        p.error('--titles are as many as --model are')
    groups = []
    for name, title in zip(own.model, titles):
        args = train.parse(['--model', name, '--task', own.task, *others])
        if args.loss != 'grpo':
            p.error('the page shows the ratio and the clip of --loss grpo')
        model, tokenizer = load(name, device=args.device)
        _, tested = train.load_test_sets(args, tokenizer)
        problems = train.Problems(args, tokenizer, tested)
        for index, group in find_groups(args, model, tokenizer, problems, own.problems):
            groups.append(group_data(args, model, tokenizer, title, index, group))
    if not groups:
        p.error('no groups, no page: raise --problems')
    settings = {name: getattr(args, name) for name in SETTINGS}
    text = page(settings, groups)
    Path(own.out).write_text(text)
    print(f'{own.out}: {len(groups)} groups, {len(text.encode()) / 1000:.0f} KB')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f'microscope.py: {e}')
