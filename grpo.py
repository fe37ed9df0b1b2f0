"""diffu-GRPO (d1, arXiv 2504.12216, section 3.2, equation 4): a policy gradient from groups.

Each prompt gets a group of completions; a completion's advantage is its reward minus the group's
mean. The clipped ratio of new to old mean-field probabilities weighs it, token by token, and a KL
term holds the policy near the reference. A prompt's group is one micro-batch, so that the update
needs no padding. The loop itself is train_grpo in train.py.
"""
from typing import NamedTuple

import torch

from loglik import completion_logps
from model import last_adapter_off
from rewards import grade_all
from sample import generate, left_pad, torch_stream


def group_advantages(rewards, num_generations, divide_by_std=False):
    """rewards (N*G,) -> (N*G,): each minus its group's mean (d1, eq. 2).

    GRPO divides by the group's standard deviation (of G - 1) + 1e-4, too.
    """
    groups = rewards.view(-1, num_generations)                   # (N, G)
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)   # (N, 1)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    # of eight 0.1 the float32 mean is not 0.1: without this they would have a tiny gradient
    advantages = advantages.masked_fill(equal, 0)
    if divide_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten()


def up_to_end(completion_ids, end_ids):
    """completion_ids (B, L) -> (B, L) bool: True up to and with the first token of end_ids."""
    end_ids = torch.tensor(end_ids, device=completion_ids.device)
    is_end = torch.isin(completion_ids, end_ids).long()
    ends_before = is_end.cumsum(dim=1) - is_end                  # [5,0,7,0] -> 0 0 1 1, if 0 ends
    return ends_before == 0


def grpo_loss(logps, old_logps, ref_logps, advantages, completion_mask, epsilon=0.5, beta=0.04,
              norm='token'):
    """The diffu-GRPO loss of a micro-batch, a scalar, and its statistics (d1, eq. 4).

    logps, old_logps, ref_logps (B, L) under the same prompt mask (ref_logps may be None if beta
    is 0), advantages (B,), completion_mask (B, L). norm: 'token' = one mean over all tokens, as
    the official code does; 'sequence' = the mean of each sequence's mean, as in the equation.
    Statistics, means of the same kind: ratio; clip_high, clip_low: 1 where the clip cuts the
    gradient; if beta is not 0, kl.
    """
    outside = ~completion_mask
    A = advantages.unsqueeze(1)                                  # (B, 1)

    log_ratio = (logps - old_logps).masked_fill(outside, 0)
    ratio = log_ratio.clamp(max=80).exp()    # rho; exp(89) would be inf, and inf * 0 is nan
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(ratio * A, clipped * A)                # (B, L)

    # the clip cuts the gradient only where the clipped branch is the smaller one
    clip_high = (ratio > 1 + epsilon) & (A > 0)
    clip_low = (ratio < 1 - epsilon) & (A < 0)
    stats = dict(ratio=ratio, clip_high=clip_high, clip_low=clip_low)

    if beta:
        difference = (ref_logps - logps).masked_fill(outside, 0).clamp(max=80)
        stats['kl'] = difference.exp() - difference - 1          # the k3 estimate, never negative
        loss = loss + beta * stats['kl']

    means = {name: masked_mean(values, completion_mask, norm).item()
             for name, values in stats.items()}
    return masked_mean(loss, completion_mask, norm), means


def masked_mean(values, mask, norm):
    """The mean of values (B, L) where mask (B, L) is 1: over 'token's, or per 'sequence' first."""
    values = values * mask
    if norm == 'sequence':
        means = values.sum(1) / mask.sum(1)                      # (B,)
        return means.mean()
    assert norm == 'token', norm
    return values.sum() / mask.sum()


# ---- rollouts, and what an update needs of the policies that do not change ----

class Group(NamedTuple):
    """One prompt's completions: a micro-batch of G rows."""
    prompt_number: int               # in its iteration
    task: str
    example: dict
    prompt_ids: torch.Tensor         # (G, P), all rows equal
    completion_ids: torch.Tensor     # (G, L)
    completion_mask: torch.Tensor    # (G, L) bool, True up to the end
    commit_steps: torch.Tensor       # (G, L), the step that committed each token
    texts: list                      # the completions, decoded
    rewards: torch.Tensor            # (G,)
    correct: torch.Tensor            # (G,), 1 = right; for sudoku the share of cells
    advantages: torch.Tensor         # (G,)


def sample_texts(model, tokenizer, prompts, sampling, generators=None, prefill=''):
    """Completions of prompts (lists of ids): ids, completion_mask, commit_steps (B, L), and texts.

    sampling: generate's knobs, a dict; generators: one per row; prefill: the text that the prompts
    end in and that belongs to the answer.
    """
    prompt_ids, attention_mask = left_pad(prompts, model.config.eos_id, model.device)
    completion_ids, commit_steps = generate(model, prompt_ids, attention_mask=attention_mask,
                                            generators=generators, **sampling)
    mask = up_to_end(completion_ids, model.config.end_ids)
    texts = [prefill + tokenizer.decode(ids[keep], skip_special_tokens=True)
             for ids, keep in zip(completion_ids, mask)]
    return completion_ids, mask, commit_steps, texts


def rollout(model, tokenizer, problems, num_generations, sampling, seed, step, prefill='',
            divide_by_std=False):
    """Samples and rewards a group for each of some problems, all in one call of the sampler.

    problems: [(prompt_number, task, prompt ids, example)]; sampling: generate's knobs. Every row
    has a random stream of its own, of seed, step, prompt_number and row.
    """
    G = num_generations
    prompts, generators = [], []
    for prompt_number, _, prompt, _ in problems:
        for row in range(G):
            prompts.append(prompt)
            key = (seed, 'rollout', step, prompt_number, row)
            generators.append(torch_stream(model.device, *key))
    completion_ids, mask, commit_steps, texts = sample_texts(model, tokenizer, prompts, sampling,
                                                             generators, prefill)
    groups = []
    for i, (prompt_number, task, prompt, example) in enumerate(problems):
        rows = slice(i * G, (i + 1) * G)
        graded = grade_all(task, texts[rows], [example] * G)
        rewards, correct = torch.tensor(graded, dtype=torch.float, device=model.device).T
        groups.append(Group(
            prompt_number, task, example, torch.tensor([prompt] * G, device=model.device),
            completion_ids[rows], mask[rows], commit_steps[rows], texts[rows], rewards,
            correct, group_advantages(rewards, G, divide_by_std)))
    return groups


@torch.no_grad()
def old_and_ref_logps(model, reference, group, prompt_mask, views, loss_name, beta):
    """Old and reference log-probs of a group, (G, L) each, or None where the loss asks for none.

    model is pi_old as long as nothing has been updated. reference: the policy itself, whose last
    adapter is off here, or a frozen copy of it.
    """
    if loss_name in ('wd1', 'rejection'):
        return None, None
    inputs = group.prompt_ids, group.completion_ids, prompt_mask, group.completion_mask, views
    old_logps = completion_logps(model, *inputs)
    if not beta:
        return old_logps, None
    with last_adapter_off(reference):            # a frozen copy stays as it is
        return old_logps, completion_logps(reference, *inputs)


# ---- other losses: grpo_loss's arguments as far as they need them, the same statistics ----

def mean_logps(logps, completion_mask):
    """logps (B, L) -> (B, 1): each completion's mean per token."""
    sums = (logps * completion_mask).sum(1, keepdim=True)
    return sums / completion_mask.sum(1, keepdim=True)


def espo_loss(logps, old_logps, ref_logps, advantages, completion_mask, epsilon, beta):
    """One ratio per sequence, of the mean log-prob per token, clipped (ESPO, arXiv 2512.03759).

    A sequence goes up or down as a whole. The KL is the k2 estimate of the same means.
    """
    new = mean_logps(logps, completion_mask)                     # (B, 1), as if of one token
    old = mean_logps(old_logps, completion_mask)
    everything = torch.ones_like(new, dtype=torch.bool)
    loss, stats = grpo_loss(new, old, None, advantages, everything, epsilon, beta=0)
    if beta:
        ref = mean_logps(ref_logps, completion_mask)
        kl = (ref - new).square().mean() / 2
        stats['kl'] = kl.item()
        loss = loss + beta * kl
    return loss, stats


def stable_loss(logps, old_logps, ref_logps, advantages, completion_mask, epsilon, beta):
    """Ratios that are always clipped, and divided by their sum (StableDRL, arXiv 2603.06743).

    grpo_loss lets a ratio through unclipped where A < 0, however large its noise has made it. The
    statistics are grpo_loss's.
    """
    tensors = logps, old_logps, ref_logps
    _, stats = grpo_loss(*tensors, advantages, completion_mask, epsilon, beta)
    # with advantages of 0 nothing but the KL term is left of the loss
    kl_term, _ = grpo_loss(*tensors, 0 * advantages, completion_mask, epsilon, beta)
    ratio = (logps - old_logps).clamp(max=80).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * completion_mask        # (B, L): weights
    objective = (clipped * advantages.unsqueeze(1)).sum() / clipped.sum()    # their mean of A
    return kl_term - objective, stats


def wd1_loss(logps, advantages, completion_mask):
    """Weighted log-likelihoods without a ratio, so without other policies (wd1, arXiv 2507.08838).

    -sum softmax(A) log p + sum softmax(-A) log p over the group, log p as a mean per token.
    """
    weights = advantages.softmax(0) - (-advantages).softmax(0)           # (B,)
    means = mean_logps(logps, completion_mask)[:, 0]                     # (B,)
    return -(weights * means).sum(), {}


def rejection_loss(logps, right, completion_mask):
    """No RL but SFT on the right completions alone (rejection sampling); right (B,), 1 or 0.

    With the estimator 'elbo', one view and no prompt mask this is masked SFT on them: ends are
    learnt, padding is not.
    """
    kept = completion_mask * right.unsqueeze(1)                              # (B, L)
    return -(logps * kept).sum() / kept.sum().clamp(min=1), {}


def policy_loss(loss_name, logps, old_logps, ref_logps, advantages, completion_mask, epsilon,
                beta, norm):
    """The loss of this name and its statistics; arguments as in grpo_loss.

    norm is for 'grpo' only; 'wd1' and 'rejection' take no epsilon and beta either. The advantages
    of 'rejection' are 1 for what is right and 0 for what is wrong.
    """
    tensors = logps, old_logps, ref_logps, advantages, completion_mask
    if loss_name == 'wd1':
        return wd1_loss(logps, advantages, completion_mask)
    if loss_name == 'rejection':
        return rejection_loss(logps, advantages, completion_mask)
    if loss_name == 'espo':
        return espo_loss(*tensors, epsilon, beta)
    if loss_name == 'stable':
        return stable_loss(*tensors, epsilon, beta)
    assert loss_name == 'grpo', loss_name
    return grpo_loss(*tensors, epsilon, beta, norm)
