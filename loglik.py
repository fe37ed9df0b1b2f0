"""Log-probs of a completion; a masked diffusion model has no exact left-to-right ones.

d1 (arXiv 2504.12216, section 3.1) takes log p(o|q) as the sum over k of log p(o_k|q'), all from one
forward pass in which the whole completion o is masked and each prompt token is masked with
probability p_mask_prompt (q'). Another q' for each inner update of the same rollouts makes many
noisy views of one sample, which regularises and saves rollouts. Later methods differ in what the
forward pass sees: below, each is a list of views.
"""
from typing import NamedTuple

import torch


def random_prompt_mask(prompt_ids, p_mask_prompt, generator=None, num_prefill=0):
    """prompt_ids (B, P) -> (B, P) bool, True = masked, each token on its own with p_mask_prompt.

    The last num_prefill tokens are the given beginning of the answer and are never masked.
    """
    noise = torch.rand(prompt_ids.shape, device=prompt_ids.device, generator=generator)
    noise[:, prompt_ids.size(1) - num_prefill:] = 1
    return noise < p_mask_prompt


class View(NamedTuple):
    """One forward pass over a completion of which a part is in sight."""
    masked: torch.Tensor       # (B, L) bool: the tokens that the model does not see
    scored: torch.Tensor       # (B, L) bool: those of them whose log-probs count
    weight: object = 1.0       # of these log-probs in the sum: one number, or (B, 1)


def whole_view(completion_ids):
    """d1's view: all of a completion masked, every token scored."""
    everything = torch.ones_like(completion_ids, dtype=torch.bool)
    return View(everything, everything)


def completion_logps(model, prompt_ids, completion_ids, prompt_mask, completion_mask=None,
                     views=None, temperature=None):
    """log p(o_k | q') of every completion token, (B, L) float32; d1's one-step estimate.

    prompt_ids (B, P), completion_ids (B, L) int64; prompt_mask (B, P) bool, True = masked;
    completion_mask (B, L) bool: the tokens that count, the others get 0; None = all count.
    New, old and reference log-probs are comparable only under the same prompt_mask and views.
    views: those of another estimator; temperature: see LLaDA.token_logps.
    """
    mask_id = model.config.mask_id
    views = views or [whole_view(completion_ids)]
    prompt = prompt_ids.masked_fill(prompt_mask, mask_id)                    # (B, P): q'
    logps = 0                                    # (B, L) from the first view on
    for view in views:
        completion = completion_ids.masked_fill(view.masked, mask_id)        # (B, L)
        ids = torch.cat((prompt, completion), dim=1)                         # (B, T)
        scored = view.scored
        if completion_mask is not None:
            scored = scored & completion_mask
        logps = logps + view.weight * model.token_logps(ids, completion_ids, scored,
                                                        temperature=temperature)
    return logps


# ---- other estimators: what is masked, and which tokens are scored, in each forward pass ----

def segment_views(order, num_views):
    """StepMerge (d2, arXiv 2509.21474): order (B, L), the step that committed each token.

    The steps are cut into num_views equal parts. A token is scored in the sight of what earlier
    parts had committed. One part is d1's estimate; as many as steps follow the whole rollout.
    """
    steps = int(order.max()) + 1
    part = order * num_views // steps                            # (B, L): 0 .. num_views - 1
    return [View(part >= i, part == i) for i in range(num_views)]


def coupled_views(order, generator=None):
    """Coupled masking (DiffuCoder, arXiv 2506.20639): a random half, then the other half.

    Each token is scored once, with about half of the completion in sight.
    """
    first = torch.rand(order.shape, device=order.device, generator=generator) < 0.5
    return [View(first, first), View(~first, ~first)]


def elbo_views(order, num_views, generator=None):
    """LLaDA's bound (arXiv 2502.09992, eq. 3) from num_views noise levels, evenly spread.

    Each masks a share t of the tokens at random and weighs them by 1/t. The sum bounds log p(o|q)
    from below for text in any order: another quantity than the likelihood of a rollout.
    """
    B, device = len(order), order.device
    start = torch.rand((B, 1), device=device, generator=generator)
    views = []
    for i in range(num_views):
        t = 1 - (start + i / num_views) % 1                      # (B, 1), never 0
        masked = torch.rand(order.shape, device=device, generator=generator) < t
        views.append(View(masked, masked, 1 / (t * num_views)))
    return views


def draw_views(estimator, num_views, order, generator=None):
    """The views of an estimator for completions whose tokens were committed at steps order (B, L).

    'ar' scores each token in the sight of all before it (JustGRPO, arXiv 2601.15165), which is
    exact for rollouts in blocks of one token.
    """
    if estimator == 'coupled':
        return coupled_views(order, generator)
    if estimator == 'elbo':
        return elbo_views(order, num_views, generator)
    if estimator == 'stepmerge':
        return segment_views(order, num_views)
    if estimator == 'ar':
        L = order.size(1)
        left_to_right = torch.arange(L, device=order.device).expand_as(order)
        return segment_views(left_to_right, L)
    assert estimator == 'one_step', estimator
    return [whole_view(order)]


def exact_logps(model, prompt_ids, completion_ids, order, completion_mask, block_length,
                temperature):
    """log p of each token under the sampler that drew it, (B, L); their sum is the exact log p.

    order (B, L): the step that committed each token; block_length, temperature: the sampler's. What
    it drew after an end, in the end's own block, counts too. One forward pass per step.
    It holds where the logits alone decide which positions a step commits: remasking 'top_prob', or
    blocks of one token. LLaDA's own rule looks at the tokens that were drawn. Two masks, each 'a'
    with probability 0.6, else 'b', one commit per step: it prefers a position that drew 'a', so
    that the first commit is 'a' with 1 - 0.4 * 0.4 = 0.84, and the product says 0.6.
    """
    lengths = completion_mask.sum(dim=1, keepdim=True)                       # (B, 1)
    blocks = (lengths - 1) // block_length + 1                               # those drawn
    place = torch.arange(completion_ids.size(1), device=completion_ids.device)
    drawn = place < blocks * block_length                                    # (B, L)
    nothing = torch.zeros_like(prompt_ids, dtype=torch.bool)
    views = segment_views(order, int(order.max()) + 1)
    return completion_logps(model, prompt_ids, completion_ids, nothing, drawn, views, temperature)
