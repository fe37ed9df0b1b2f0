"""Masked supervised fine-tuning (d1, arXiv 2504.12216, Algorithm 2; LLaDA's objective).

Every answer draws t ~ U(0, 1), each of its tokens is masked with probability t, and the loss is the
cross-entropy of the masked tokens weighed by 1/t. The prompt is never masked; the end-of-text padding
belongs to the answer, so that the model learns where to stop. The nano base is pretrained without the
weights 1/t.
    python sft.py --task gsm8k      the SFT stage alone (train.py's flags)
"""
import sys

import torch
import torch.nn.functional as F


def pad(pairs, length, eos_id, device='cpu'):
    """[(prompt ids, answer ids)] -> ids (B, P + length), attention_mask (B, P + length) or None, P.

    Prompts are padded on the left, where nothing looks; answers on the right with eos, which is learnt.
    """
    P = max(len(prompt) for prompt, _ in pairs)
    ids = torch.full((len(pairs), P + length), eos_id)
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, P - len(prompt):P] = torch.tensor(prompt)
        ids[row, P:P + len(answer)] = torch.tensor(answer, dtype=torch.long)
        attention_mask[row, :P - len(prompt)] = False
    return ids.to(device), None if attention_mask.all() else attention_mask.to(device), P


def add_noise(answers, mask_id, generator=None, t_min=0.0):
    """answers (B, L) -> noisy (B, L), masked (B, L) bool, t (B, 1) (d1, Algorithm 2, lines 3-5).

    The batch's t are spread evenly over (t_min, 1] from one random start: each is uniform, their sum varies less.
    """
    B = len(answers)
    start = torch.rand(1, device=answers.device, generator=generator)
    t = 1 - (start + torch.arange(B, device=answers.device) / B) % 1
    t = (t_min + (1 - t_min) * t).unsqueeze(1)
    masked = torch.rand(answers.shape, device=answers.device, generator=generator) < t
    return answers.masked_fill(masked, mask_id), masked, t


def add_base_noise(answers, mask_id, generator=None, width=8):
    """The nano base's noise: answers (B, L) -> noisy (B, L), masked (B, L) bool, t = 1, for the loss has no weights.

    Even rows have SFT's noise, with t ~ U(0.3, 1). Odd rows look as they do to the sampler: masks begin at a random
    place, within `width` tokens, so that most sums are learnt with their numbers in sight.
    """
    B, L = answers.shape
    _, masked, t = add_noise(answers, mask_id, generator, t_min=0.3)
    place = torch.rand((B, 1), device=answers.device, generator=generator) * (L + width) - width
    places = place + width * torch.rand((B, L), device=answers.device, generator=generator)
    masked[1::2] = (torch.arange(L, device=answers.device) > places)[1::2]
    return answers.masked_fill(masked, mask_id), masked, torch.ones_like(t)


def masked_loss(logps, masked, t, num_tokens):
    """Sum of -logps/t over the masked tokens, divided by num_tokens, the answers' tokens in all."""
    return -(logps / t)[masked].sum() / num_tokens


def sft_loss(logits, labels, t, num_prompt_tokens=0):
    """The masked SFT loss of a batch, a scalar (d1, Algorithm 2; LLaDA, eq. 5).

    logits (B, T, V), labels (B, T) with -100 where nothing is scored, t (B, T) or (B, 1);
    num_prompt_tokens: how many of the B*T positions are prompt, which the mean leaves out.
    """
    logps = -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction='none')  # (B, T), 0 at -100
    return masked_loss(logps, labels != -100, t.expand_as(logps), labels.numel() - num_prompt_tokens)


def sft_backward(model, pairs, length, config, generator, micro_batch, rank=0, world=1, noise=add_noise):
    """Adds the gradient of one batch's loss and returns this process' part of the loss.

    pairs: [(prompt ids, answer ids)], the same on every process; each takes every world-th row, in
    micro-batches, and its gradients are to be averaged over the processes. noise: add_noise or add_base_noise.
    """
    device = next(model.parameters()).device
    ids, attention_mask, P = pad(pairs, length, config.eos_id, device)
    noisy, masked, t = noise(ids[:, P:], config.mask_id, generator)
    total = 0.0
    for rows in torch.arange(rank, len(ids), world, device=device).split(micro_batch):
        logps = model(torch.cat((ids[rows, :P], noisy[rows]), 1),
                      None if attention_mask is None else attention_mask[rows],
                      at=(slice(None), slice(P, None)), targets=ids[rows, P:], counted=masked[rows])  # (rows, length)
        loss = masked_loss(logps, masked[rows], t[rows].expand_as(logps), masked.numel() / world)
        loss.backward()
        total += loss.item()
    return total


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): momentum, made orthogonal by five Newton-Schulz steps; for matrices.

    It needs half of AdamW's steps for the nano base. torch.optim.Muon does the same in bfloat16, which on a
    CPU takes longer than the training step itself.
    """
    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):  # torch gives a closure, None, when a checkpoint is read into an optimizer
        for group in self.param_groups:
            for p in (p for p in group['params'] if p.grad is not None):
                momentum = self.state[p].setdefault('momentum', torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group['momentum'])
                x = p.grad.lerp(momentum, group['momentum'])
                x = x / (x.norm() + 1e-7)
                x = x.T if x.size(0) > x.size(1) else x
                for _ in range(5):
                    y = x @ x.T
                    x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
                x = x.T if p.size(0) > p.size(1) else x
                p.add_(x, alpha=-group['lr'] * max(1, p.size(0) / p.size(1)) ** 0.5)


if __name__ == '__main__':
    import train
    train.run(['--stages', 'sft', *sys.argv[1:]])
