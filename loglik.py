"""Log-probs of a completion; a masked diffusion model has no exact left-to-right ones.

d1 (arXiv 2504.12216, section 3.1) takes log p(o|q) as the sum over k of log p(o_k|q'), all from one
forward pass in which the whole completion o is masked and each prompt token is masked with
probability p_mask_prompt (q'). Another q' for each inner update of the same rollouts makes many
noisy views of one sample, which regularises and saves rollouts. Later methods differ in what the
forward pass sees: below, each is a list of views.
"""
from typing import NamedTuple

import torch

TIE = 1e-5     # probabilities closer than this are a tie; float32 numbers near 16 are 2e-6 apart


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


class Exact(NamedTuple):
    """In the place of views: what the exact likelihood needs to know of the sampler."""
    commit_steps: torch.Tensor     # (B, L)
    block_length: int
    temperature: float


def completion_logps(model, prompt_ids, completion_ids, prompt_mask, completion_mask=None,
                     views=None):
    """log p(o_k | q') of every completion token, (B, L) float32; d1's one-step estimate.

    prompt_ids (B, P), completion_ids (B, L) int64; prompt_mask (B, P) bool, True = masked;
    completion_mask (B, L) bool: the tokens that count, the others get 0; None = all count.
    New, old and reference log-probs are comparable only under the same prompt_mask and views.
    views: those of another estimator; None = d1's one; Exact: exact_logps, of the masked prompt.
    """
    mask_id = model.config.mask_id
    views = views or [whole_view(completion_ids)]
    if completion_mask is None:
        completion_mask = torch.ones_like(completion_ids, dtype=torch.bool)
    prompt = prompt_ids.masked_fill(prompt_mask, mask_id)                    # (B, P): q'
    if isinstance(views, Exact):
        return exact_logps(model, prompt, completion_ids, completion_mask, *views)
    logps = 0                                    # (B, L) from the first view on
    for view in views:
        completion = completion_ids.masked_fill(view.masked, mask_id)        # (B, L)
        ids = torch.cat((prompt, completion), dim=1)                         # (B, T)
        scored = view.scored & completion_mask
        logps = logps + view.weight * model.token_logps(ids, completion_ids, scored)
    return logps


# ---- other estimators: what is masked, and which tokens are scored, in each forward pass ----

def stepmerge_views(commit_steps, num_views):
    """StepMerge (d2, arXiv 2509.21474): commit_steps (B, L), the step that committed each token.

    Of the batch's T steps, step s belongs to part s * num_views // T. A token is scored in the
    sight of what earlier parts had committed: of 6 steps in 2 parts those of steps 3 to 5 see
    those of 0 to 2. One part is d1's estimate; T parts follow the whole rollout.
    """
    steps = int(commit_steps.max()) + 1
    num_views = min(num_views, steps)                         # a part without a step scores nothing
    part = commit_steps * num_views // steps                  # (B, L): 0 .. num_views - 1
    return [View(part >= i, part == i) for i in range(num_views)]


def coupled_views(completion_ids, generator=None):
    """Coupled masking (DiffuCoder, arXiv 2506.20639): a random half, then the other half.

    Each token is scored once, with about half of the completion in sight.
    """
    first = torch.rand(completion_ids.shape, device=completion_ids.device,
                       generator=generator) < 0.5
    return [View(first, first), View(~first, ~first)]


def elbo_views(completion_ids, num_views, generator=None):
    """LLaDA's bound (arXiv 2502.09992, eqs. 3, 4) from num_views noise levels, evenly spread.

    Each masks a share t of the tokens at random and weighs them by 1/t. In the mean the sum bounds
    log p(o|q) from below for text in any order: another quantity than the likelihood of a rollout.
    """
    B, device = len(completion_ids), completion_ids.device
    start = torch.rand((B, 1), device=device, generator=generator)
    views = []
    for i in range(num_views):
        t = 1 - (start + i / num_views) % 1                      # (B, 1), never 0
        masked = torch.rand(completion_ids.shape, device=device, generator=generator) < t
        views.append(View(masked, masked, 1 / (t * num_views)))
    return views


def draw_views(estimator, num_views, completion_ids, commit_steps, generator=None,
               block_length=None, temperature=None):
    """The views of an estimator; completion_ids, commit_steps (B, L): see sample.generate.

    'ar' scores each token in the sight of all before it (JustGRPO, arXiv 2601.15165). That is exact
    for rollouts at temperature 1 in blocks of one token, if the mask has no probability.
    block_length, temperature: the sampler's, which 'exact' alone needs.
    """
    if estimator == 'coupled':
        return coupled_views(completion_ids, generator)
    if estimator == 'elbo':
        return elbo_views(completion_ids, num_views, generator)
    if estimator == 'stepmerge':
        return stepmerge_views(commit_steps, num_views)
    if estimator == 'ar':
        B, L = completion_ids.shape
        left_to_right = torch.arange(L, device=completion_ids.device).expand(B, L)
        return stepmerge_views(left_to_right, L)
    if estimator == 'exact':
        return Exact(commit_steps, block_length, temperature)
    assert estimator == 'one_step', estimator
    return [whole_view(completion_ids)]


# ---- the exact likelihood of the sampler ----

def drawn_tokens(completion_mask, block_length):
    """completion_mask (B, L) -> (B, L) bool: all that the sampler drew.

    It fills the block of an end to its last mask; in later blocks it writes eos without drawing.
    """
    lengths = completion_mask.sum(dim=1, keepdim=True)                       # (B, 1)
    blocks = (lengths - 1) // block_length + 1
    position = torch.arange(completion_mask.size(1), device=completion_mask.device)
    return position < blocks * block_length


def exact_logps(model, prompt_ids, completion_ids, completion_mask, commit_steps, block_length,
                temperature):
    """log p of a completion under LLaDA's own sampler, (B, L), whose sum over a row is exact.

    A step draws a token x_i ~ p_i^T at each mask i of the block on its own and commits those of
    the highest p_i(x_i) (p^T: at the sampler's temperature, p: at 1). With S the committed
    positions and c the lowest p_i(x_i) among them,
        P(step) = prod_{i in S} p_i^T(x_i) * prod_{j not in S} sum_{v: p_j(v) < c} p_j^T(v):
    no other mask j drew what would have been committed instead. A token has its own factor and an
    equal share of its step's second product. The mask is never drawn: its p is 0. What was drawn
    after an end, in its block, is the end's. commit_steps (B, L), block_length, temperature (over
    0): the sampler's. One forward per step. The set of v jumps where p_j(v) passes c: the gradient
    is that between jumps. In bfloat16 ties are wider, and a sum is wrong by up to 1.7 nats.
    """
    B, L = completion_ids.shape
    mask_id = model.config.mask_id
    drawn = drawn_tokens(completion_mask, block_length)
    positions = prompt_ids.size(1) + torch.arange(L, device=prompt_ids.device).expand(B, L)
    total = torch.zeros(B, L, device=prompt_ids.device)
    for step in range(int(commit_steps.max()) + 1):
        # what was not drawn has the number of the row's last step
        committed = drawn & (commit_steps == step)                           # (B, L): S
        in_block = committed.view(B, -1, block_length).any(dim=2)            # (B, blocks)
        in_block = in_block.repeat_interleave(block_length, dim=1)           # (B, L)
        passed_over = in_block & (commit_steps > step)                       # (B, L): not in S
        completion = completion_ids.masked_fill(commit_steps >= step, mask_id)
        ids = torch.cat((prompt_ids, completion), dim=1)                     # (B, T)
        logits = model(ids, None, positions).float()                         # (B, L, V)
        logits[..., mask_id] = -torch.inf                                    # is never drawn
        logp = logits.log_softmax(-1)                                        # p
        logp_T = (logits / temperature).log_softmax(-1)                      # p^T
        tokens = completion_ids.unsqueeze(-1)                                # (B, L, 1)
        own = logp_T.gather(-1, tokens)[..., 0]                              # (B, L)
        # the second product: what the masks that were passed over may have drawn
        confidence = logp.gather(-1, tokens)[..., 0].masked_fill(~committed, torch.inf)
        c = confidence.amin(dim=1)[:, None, None].exp()                      # (B, 1, 1)
        less_sure = logp.exp() < c + TIE         # (B, L, V); what is as sure as c may lose the tie
        # where no mask was passed over all v count: a factor of 1, a log of 0
        less_sure |= ~passed_over.unsqueeze(-1)
        others = logp_T.masked_fill(~less_sure, -torch.inf).logsumexp(-1)    # (B, L)
        product = others.sum(dim=1, keepdim=True)                            # (B, 1), a log
        share = product / committed.sum(dim=1, keepdim=True).clamp(min=1)    # of each token
        total = total + (own + share).masked_fill(~committed, 0)
    # what was drawn after an end, in its block, is added to the end's own
    counted = total.masked_fill(~completion_mask, 0)                         # (B, L)
    after_end = total.masked_fill(completion_mask, 0).sum(dim=1, keepdim=True)       # (B, 1)
    end = completion_mask.sum(dim=1, keepdim=True) - 1                       # (B, 1): its place
    return counted.scatter_add(1, end, after_end)
