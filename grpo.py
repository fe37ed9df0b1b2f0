"""diffu-GRPO (d1, arXiv 2504.12216, section 3.2, equation 4): a policy gradient from groups.

Each prompt gets a group of completions; a completion's advantage is its reward minus the group's
mean. The clipped ratio of new to old mean-field probabilities weighs it, token by token, and a KL
term holds the policy near the reference. A prompt's group is one micro-batch, so that the update
needs no padding. The loop itself is train_grpo in train.py.
"""
from dataclasses import dataclass, field

import torch

import rewards
from loglik import completion_logps
from model import lora_off
from sample import generate, left_pad, torch_stream


def group_advantages(rewards, num_generations, divide_by_std=False):
    """rewards (N*G,) -> (N*G,): each minus its group's mean (d1, eq. 2); GRPO has the std, too."""
    groups = rewards.view(-1, num_generations)                   # (N, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten()


def completion_mask(completion_ids, end_ids):
    """completion_ids (B, L) -> (B, L) bool: True up to and with the first token of end_ids."""
    end_ids = torch.tensor(end_ids, device=completion_ids.device)
    is_end = torch.isin(completion_ids, end_ids).long()
    ends_before = is_end.cumsum(dim=1) - is_end                  # [5,0,7,0] -> 0 0 1 1, if 0 ends
    return ends_before == 0


def grpo_loss(logps, old_logps, ref_logps, advantages, completion_mask, epsilon=0.5, beta=0.04,
              norm='token', kl_estimate='k3'):
    """The diffu-GRPO loss of a micro-batch, a scalar, and its statistics (d1, eq. 4).

    logps, old_logps, ref_logps (B, L) under the same prompt mask (ref_logps may be None if beta
    is 0), advantages (B,), completion_mask (B, L). norm: 'token' = one mean over all tokens, as
    the official code does; 'sequence' = the mean of each sequence's mean, as in the equation.
    kl_estimate: 'k3' is theirs; 'k2' is half the squared difference, without k3's heavy tail.
    """
    outside = ~completion_mask.bool()
    A = advantages.unsqueeze(1)                                  # (B, 1)

    log_ratio = (logps - old_logps).masked_fill(outside, 0)
    ratio = log_ratio.clamp(max=80).exp()                        # rho; finite, for inf * 0 is nan
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * A, clipped * A)            # (B, L)

    kl = torch.zeros_like(logps)
    if beta:
        difference = (ref_logps - logps).masked_fill(outside, 0).clamp(max=80)
        if kl_estimate == 'k2':
            kl = difference.square() / 2
        else:
            kl = difference.exp() - difference - 1               # k3, never negative

    # the clip cuts the gradient only where the clipped branch is the smaller one
    clip_high = (ratio > 1 + epsilon) & (A > 0)
    clip_low = (ratio < 1 - epsilon) & (A < 0)
    loss = masked_mean(beta * kl - objective, completion_mask, norm)
    stats = dict(ratio=ratio, clip_high=clip_high, clip_low=clip_low, kl=kl)
    means = {name: masked_mean(values, completion_mask, norm).item()
             for name, values in stats.items()}
    return loss, means


def masked_mean(values, mask, norm):
    """The mean of values (B, L) where mask (B, L) is 1: over 'token's, or per 'sequence' first."""
    assert norm in ('token', 'sequence'), norm
    values = values * mask
    if norm == 'sequence':
        means = values.sum(1) / mask.sum(1).clamp(min=1)         # (B,)
        return means.mean()
    return values.sum() / mask.sum().clamp(min=1)


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
    ref = mean_logps(ref_logps, completion_mask) if beta else None
    everything = torch.ones_like(new, dtype=torch.bool)
    return grpo_loss(new, old, ref, advantages, everything, epsilon, beta, kl_estimate='k2')


def stable_loss(logps, old_logps, ref_logps, advantages, completion_mask, epsilon, beta):
    """Ratios that are always clipped, and divided by their sum (StableDRL, arXiv 2603.06743).

    grpo_loss lets a ratio through unclipped where A < 0, however large its noise has made it.
    """
    tensors = logps, old_logps, ref_logps
    _, stats = grpo_loss(*tensors, advantages, completion_mask, epsilon, beta)
    kl_term, _ = grpo_loss(*tensors, 0 * advantages, completion_mask, epsilon, beta)
    ratio = (logps - old_logps).clamp(max=80).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * completion_mask        # (B, L)
    objective = (clipped * advantages.unsqueeze(1)).sum() / clipped.sum()
    return kl_term - objective, stats


def wd1_loss(logps, advantages, completion_mask):
    """Weighted log-likelihoods without a ratio, so without other policies (wd1, arXiv 2507.08838).

    -sum softmax(A) log p + sum softmax(-A) log p over the group, log p as a mean per token.
    """
    weights = advantages.softmax(0) - (-advantages).softmax(0)           # (B,)
    means = mean_logps(logps, completion_mask)[:, 0]                     # (B,)
    loss = -(weights * means).sum()
    return loss, dict(ratio=1.0, clip_high=0.0, clip_low=0.0, kl=0.0)


def policy_loss(logps, old_logps, ref_logps, advantages, completion_mask, kind, epsilon, beta, norm,
                kl_estimate):
    """The loss of this kind and its statistics; arguments as in grpo_loss.

    norm and kl_estimate are for kind 'grpo' only; 'wd1' takes no epsilon and beta either.
    """
    if kind == 'wd1':
        return wd1_loss(logps, advantages, completion_mask)
    tensors = logps, old_logps, ref_logps, advantages, completion_mask
    if kind == 'espo':
        return espo_loss(*tensors, epsilon, beta)
    if kind == 'stable':
        return stable_loss(*tensors, epsilon, beta)
    return grpo_loss(*tensors, epsilon, beta, norm, kl_estimate)


@dataclass
class Group:
    """One prompt's completions, a micro-batch of G rows, and all that its updates need."""
    k: int                                                       # its number in the iteration
    task: str
    example: dict
    prompt_ids: torch.Tensor                                     # (G, P), all rows equal
    completion_ids: torch.Tensor                                 # (G, L)
    completion_mask: torch.Tensor                                # (G, L), True up to the end
    order: torch.Tensor                                          # (G, L), each token's step
    texts: list                                                  # the completions, decoded
    rewards: torch.Tensor                                        # (G,)
    advantages: torch.Tensor                                     # (G,)
    prompt_masks: list = field(default_factory=list)             # mu times (G, P)
    views: list = field(default_factory=list)                    # mu times the estimator's views
    old_logps: list = None                                       # mu times (G, L)
    ref_logps: list = None                                       # mu times (G, L), or None


def complete(model, tokenizer, prompts, sampling, generators=None, prefill=''):
    """Completions of prompts (lists of ids): ids, completion_mask, order, all (B, L), and texts.

    sampling: generate's knobs, a dict; generators: one per row; prefill: the text that the prompts
    end in and that belongs to the answer.
    """
    prompt_ids, attention_mask = left_pad(prompts, model.config.eos_id, model.device)
    order = prompt_ids.new_empty(len(prompts), sampling['gen_length'])       # generate fills it in
    completion_ids = generate(model, prompt_ids, attention_mask=attention_mask,
                              generators=generators, order=order, **sampling)
    mask = completion_mask(completion_ids, model.config.end_ids)
    texts = [prefill + tokenizer.decode(ids[keep], skip_special_tokens=True)
             for ids, keep in zip(completion_ids, mask)]
    return completion_ids, mask, order, texts


def rollout(model, tokenizer, problems, num_generations, sampling, seed, step, prefill='',
            divide_by_std=False):
    """Samples and rewards a group for each of some problems, all in one call of the sampler.

    problems: [(k, task, prompt ids, example)], k = the prompt's number in this iteration;
    sampling: generate's knobs. Every row has a random stream of its own, of seed, step, k and row.
    """
    prompts, generators = [], []
    for k, _, prompt, _ in problems:
        for row in range(num_generations):
            prompts.append(prompt)
            generators.append(torch_stream(model.device, seed, 'rollout', step, k, row))
    completion_ids, mask, order, texts = complete(model, tokenizer, prompts, sampling, generators,
                                                  prefill)
    groups = []
    for i, (k, task, prompt, example) in enumerate(problems):
        rows = slice(i * num_generations, (i + 1) * num_generations)
        grades = rewards.grade_all(task, texts[rows], [example] * num_generations)
        earned = [float(reward) for reward, _ in grades]
        reward = torch.tensor(earned, device=model.device)                   # (G,)
        prompt_ids = torch.tensor([prompt] * num_generations, device=model.device)
        advantages = group_advantages(reward, num_generations, divide_by_std)
        groups.append(Group(k, task, example, prompt_ids, completion_ids[rows], mask[rows],
                            order[rows], texts[rows], reward, advantages))
    return groups


@torch.no_grad()
def fixed_logps(model, reference, group, loss, beta):
    """Old and reference log-probs of a group: for each of its prompt masks a (G, L) each.

    model is pi_old as long as nothing has been updated. reference: a frozen model, or the policy
    itself, whose adapters are off here; it is not asked when beta is 0. The loss 'wd1' needs
    neither.
    """
    def all_masks(policy):
        return [completion_logps(policy, group.prompt_ids, group.completion_ids, prompt_mask,
                                 group.completion_mask, views)
                for prompt_mask, views in zip(group.prompt_masks, group.views)]
    nothing = [None] * len(group.prompt_masks)
    if loss == 'wd1':
        return nothing, nothing
    old_logps = all_masks(model)
    if not beta:
        return old_logps, nothing
    with lora_off(reference):                                    # a frozen copy has no adapters
        return old_logps, all_masks(reference)
