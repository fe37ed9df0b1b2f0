"""diffu-GRPO (d1, arXiv 2504.12216, section 3.2, equation 4): a policy gradient from groups of completions.

Each prompt gets a group of completions; a completion's advantage is its reward minus the group's mean.
The clipped ratio of new to old mean-field probabilities weighs it, token by token, and a KL term holds
the policy near the reference. A prompt's group is one micro-batch, so nothing here needs padding.
"""
from typing import NamedTuple

import torch

from loglik import completion_logps
from sample import generate


def group_advantages(rewards, num_generations):
    """rewards (N*G,) -> (N*G,): each minus the mean of its G neighbours, not divided by their std (d1, eq. 2)."""
    groups = rewards.view(-1, num_generations)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def completion_mask(completion_ids, end_ids):
    """completion_ids (B, L) -> (B, L) bool: True up to and with the first token of end_ids, False behind it."""
    is_end = torch.isin(completion_ids, torch.tensor(end_ids, device=completion_ids.device))
    return is_end.cumsum(1) - is_end.long() == 0  # no end before this token


def grpo_loss(logps, old_logps, ref_logps, advantages, completion_mask, epsilon=0.5, beta=0.04, norm='token'):
    """The diffu-GRPO loss of a micro-batch, a scalar, and its statistics (d1, eq. 4).

    logps, old_logps, ref_logps (B, L) under the same prompt mask (ref_logps may be None when beta is 0),
    advantages (B,), completion_mask (B, L). norm: 'token' = one mean over all tokens, as the official
    code does; 'sequence' = the mean of each sequence's mean, as the paper's equation has it.
    """
    mask, outside = completion_mask.float(), ~completion_mask.bool()
    A = advantages.unsqueeze(1)                                          # (B, 1)
    ratio = (logps - old_logps).masked_fill(outside, 0).clamp(max=80).exp()  # (B, L), finite: inf * 0 would be nan
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * A, clipped * A)
    kl = torch.zeros_like(logps)
    if beta:
        difference = (ref_logps - logps).masked_fill(outside, 0).clamp(max=80)
        kl = difference.exp() - difference - 1                           # k3 estimate, never negative
    per_token = beta * kl - objective

    def mean(x):
        if norm == 'sequence':
            return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        return (x * mask).sum() / mask.sum().clamp(min=1)
    if norm not in ('token', 'sequence'):
        raise ValueError(f"norm is 'token' or 'sequence', not {norm!r}")
    high = (ratio > 1 + epsilon) & (A > 0)  # the gradient is cut only where the clipped branch is the smaller
    low = (ratio < 1 - epsilon) & (A < 0)
    stats = dict(ratio=mean(ratio), clip_high=mean(high.float()), clip_low=mean(low.float()), kl=mean(kl))
    return mean(per_token), {name: value.item() for name, value in stats.items()}


class Group(NamedTuple):
    """One prompt's completions, a micro-batch of G."""
    prompt_ids: torch.Tensor       # (G, P), all rows equal
    completion_ids: torch.Tensor   # (G, L)
    mask: torch.Tensor             # (G, L) completion_mask
    rewards: torch.Tensor          # (G,)
    texts: list                    # the completions as decoded


def complete(model, tokenizer, prompt_ids, **sampling):
    """Completions (B, L) of prompt_ids (B, P), their completion_mask and their texts; sampling: generate's knobs."""
    model.eval()
    completion_ids = generate(model, prompt_ids, **sampling)
    mask = completion_mask(completion_ids, model.config.end_ids)
    texts = [tokenizer.decode(ids[keep], skip_special_tokens=True) for ids, keep in zip(completion_ids, mask)]
    return completion_ids, mask, texts


def rollout(model, tokenizer, prompt_ids, reward, num_generations, generator, **sampling):
    """Samples a prompt's group and rewards it.

    prompt_ids: list of P ids. reward: texts -> list of floats. sampling: generate's knobs.
    """
    prompts = torch.tensor([prompt_ids] * num_generations, device=model.device)
    completion_ids, mask, texts = complete(model, tokenizer, prompts, generator=generator, **sampling)
    rewards = torch.tensor(reward(texts), device=model.device, dtype=torch.float32)
    return Group(prompts, completion_ids, mask, rewards, texts)


@torch.no_grad()
def fixed_logps(model, reference, group, prompt_mask, beta):
    """old_logps and ref_logps (G, L) of a group under prompt_mask; ref_logps is None when beta is 0.

    reference() is a context that gives the reference policy: the model without its adapters, or a frozen copy.
    """
    model.eval()
    tensors = group.prompt_ids, group.completion_ids, prompt_mask, group.mask
    old_logps = completion_logps(model, *tensors)
    if not beta:
        return old_logps, None
    with reference() as reference_model:
        return old_logps, completion_logps(reference_model, *tensors)
