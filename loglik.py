"""The mean-field estimate of a completion's log-probabilities (d1, arXiv 2504.12216, section 3.1).

A masked diffusion model has no left-to-right likelihood. d1 takes log p(o|q) as the sum over k of
log p(o_k|q'), all from one forward pass in which the whole completion o is masked and each prompt
token is masked with probability p_mask_prompt (q'). Another q' for each inner update of the same
rollouts makes many noisy views of one sample, which regularises and saves rollouts.
"""
import torch


def random_prompt_mask(prompt_ids, p_mask_prompt, generator=None, num_prefill=0):
    """prompt_ids (B, P) -> (B, P) bool, True = masked, each token on its own with p_mask_prompt.

    The last num_prefill tokens are the given beginning of the answer and are never masked.
    """
    noise = torch.rand(prompt_ids.shape, device=prompt_ids.device, generator=generator)
    noise[:, prompt_ids.size(1) - num_prefill:] = 1
    return noise < p_mask_prompt


def one_step_view(prompt_ids, completion_ids, prompt_mask, mask_id):
    """ids (B, T): the prompt masked where prompt_mask (B, P) is True, the completion everywhere."""
    prompt = prompt_ids.masked_fill(prompt_mask, mask_id)        # (B, P)
    completion = torch.full_like(completion_ids, mask_id)        # (B, L)
    return torch.cat((prompt, completion), dim=1)


def completion_logps(model, prompt_ids, completion_ids, prompt_mask, completion_mask=None):
    """log p(o_k | q') of every completion token, (B, L) float32 (d1, section 3.1).

    prompt_ids (B, P), completion_ids (B, L) int64; prompt_mask (B, P) bool, True = masked;
    completion_mask (B, L) bool: the tokens that count, the others get 0; None = all count.
    New, old and reference log-probs are comparable only under the same prompt_mask.
    """
    ids = one_step_view(prompt_ids, completion_ids, prompt_mask, model.config.mask_id)
    return model.token_logps(ids, completion_ids, completion_mask)
