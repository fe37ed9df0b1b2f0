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


def group_advantages(rewards, num_generations):
    """rewards (N*G,) -> (N*G,): each minus its group's mean, not divided by the std (d1, eq. 2)."""
    groups = rewards.view(-1, num_generations)                   # (N, G)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def completion_mask(completion_ids, end_ids):
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
    """
    mask = completion_mask.float()
    outside = ~completion_mask.bool()
    A = advantages.unsqueeze(1)                                  # (B, 1)

    log_ratio = (logps - old_logps).masked_fill(outside, 0)
    ratio = log_ratio.clamp(max=80).exp()                        # rho; finite, for inf * 0 is nan
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * A, clipped * A)            # (B, L)

    kl = torch.zeros_like(logps)
    if beta:
        difference = (ref_logps - logps).masked_fill(outside, 0).clamp(max=80)
        kl = difference.exp() - difference - 1                   # k3 estimate, never negative

    # the clip cuts the gradient only where the clipped branch is the smaller one
    clip_high = (ratio > 1 + epsilon) & (A > 0)
    clip_low = (ratio < 1 - epsilon) & (A < 0)
    loss = masked_mean(beta * kl - objective, mask, norm)
    stats = dict(ratio=ratio, clip_high=clip_high.float(), clip_low=clip_low.float(), kl=kl)
    return loss, {name: masked_mean(value, mask, norm).item() for name, value in stats.items()}


def masked_mean(values, mask, norm):
    """The mean of values (B, L) where mask (B, L) is 1: over 'token's, or per 'sequence' first."""
    assert norm in ('token', 'sequence'), norm
    if norm == 'sequence':
        return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


@dataclass
class Group:
    """One prompt's completions, a micro-batch of G rows, and all that its updates need."""
    k: int                                                       # its number in the iteration
    task: str
    example: dict
    prompt_ids: torch.Tensor                                     # (G, P), all rows equal
    completion_ids: torch.Tensor                                 # (G, L)
    completion_mask: torch.Tensor                                # (G, L), True up to the end
    texts: list                                                  # the completions, decoded
    rewards: torch.Tensor                                        # (G,)
    advantages: torch.Tensor                                     # (G,)
    prompt_masks: list = field(default_factory=list)             # mu times (G, P)
    old_logps: list = field(default_factory=list)                # mu times (G, L)
    ref_logps: list = field(default_factory=list)                # mu times (G, L), or None


def complete(model, tokenizer, prompts, sampling, generators=None, prefill=''):
    """Completions of prompts (lists of ids): ids (B, L), completion_mask (B, L), texts.

    sampling: generate's knobs, a dict; generators: one per row; prefill: the text that the prompts
    end in and that belongs to the answer.
    """
    prompt_ids, attention_mask = left_pad(prompts, model.config.eos_id, model.device)
    completion_ids = generate(model, prompt_ids, attention_mask=attention_mask,
                              generators=generators, **sampling)
    mask = completion_mask(completion_ids, model.config.end_ids)
    texts = [prefill + tokenizer.decode(ids[keep], skip_special_tokens=True)
             for ids, keep in zip(completion_ids, mask)]
    return completion_ids, mask, texts


def rollout(model, tokenizer, problems, num_generations, sampling, seed, step, prefill=''):
    """Samples and rewards a group for each of some problems, all in one call of the sampler.

    problems: [(k, task, prompt ids, example)], k = the prompt's number in this iteration;
    sampling: generate's knobs. Every row has a random stream of its own, of seed, step, k and row.
    """
    prompts, generators = [], []
    for k, _, prompt, _ in problems:
        for row in range(num_generations):
            prompts.append(prompt)
            generators.append(torch_stream(model.device, seed, 'rollout', step, k, row))
    completion_ids, mask, texts = complete(model, tokenizer, prompts, sampling, generators,
                                           prefill)
    groups = []
    for i, (k, task, prompt, example) in enumerate(problems):
        rows = slice(i * num_generations, (i + 1) * num_generations)
        grades = rewards.grade_all(task, texts[rows], [example] * num_generations)
        reward = torch.tensor([float(reward) for reward, _ in grades], device=model.device)
        prompt_ids = torch.tensor([prompt] * num_generations, device=model.device)
        groups.append(Group(k, task, example, prompt_ids, completion_ids[rows], mask[rows],
                            texts[rows], reward, group_advantages(reward, num_generations)))
    return groups


@torch.no_grad()
def fixed_logps(model, reference, group, beta, batch):
    """Old and reference log-probs of a group: for each of its prompt masks a (G, L) each.

    model is pi_old as long as nothing has been updated. reference: a frozen model, or the policy
    itself, whose adapters are off here; it is not asked when beta is 0. batch: rows at once.
    """
    mu = len(group.prompt_masks)
    prompt_masks = torch.cat(group.prompt_masks)                 # (mu*G, P)

    def all_masks(policy):
        parts = []
        for rows in torch.arange(len(prompt_masks), device=model.device).split(batch):
            own = rows % len(group.texts)                        # row of the group
            parts.append(completion_logps(policy, group.prompt_ids[own], group.completion_ids[own],
                                          prompt_masks[rows], group.completion_mask[own]))
        return torch.cat(parts).chunk(mu)
    old_logps = all_masks(model)
    if not beta:
        return old_logps, [None] * mu
    with lora_off(reference):
        return old_logps, all_masks(reference)
