"""Masked supervised fine-tuning (d1, arXiv 2504.12216, Algorithm 2; LLaDA's objective).

Every answer draws t ~ U(0, 1), each of its tokens is masked with probability t, and the loss is the
cross-entropy of the masked tokens weighed by 1/t. The prompt is never masked; the end-of-text
padding belongs to the answer, so that the model learns where to stop. The loop is train_sft in
train.py; python train.py --stages sft runs it alone.
"""
from typing import NamedTuple

import torch

import rewards
from sample import chat, left_pad, pad_mask, shuffled, torch_stream


# ---- noise and loss ----

def draw_masks(answers, generator=None, t_min=0.0):
    """answers (B, L) -> masked (B, L) bool, t (B, 1) (d1, Algorithm 2, lines 3-5).

    Each t is uniform in (t_min, 1]. A batch's t are spread evenly from one random start (of four:
    .9 .65 .4 .15), so that their mean varies less.
    """
    B, device = len(answers), answers.device
    start = torch.rand(1, device=device, generator=generator)
    t = 1 - (start + torch.arange(B, device=device) / B) % 1                 # never 0
    t = (t_min + (1 - t_min) * t).unsqueeze(1)                               # (B, 1)
    masked = torch.rand(answers.shape, device=device, generator=generator) < t
    return masked, t


def answer_logps(model, prompts, answers, masked):
    """Log-probs (B, L) of the answers' masked tokens, each given all that is not masked; else 0.

    prompts: B lists of ids; answers (B, L); masked (B, L) bool.
    """
    prompt_ids, attention_mask = left_pad(prompts, model.config.eos_id, answers.device)
    attention_mask = pad_mask(attention_mask, answers.size(1))                       # (B, T)
    noisy = answers.masked_fill(masked, model.config.mask_id)
    ids = torch.cat((prompt_ids, noisy), dim=1)                                      # (B, T)
    return model.token_logps(ids, answers, masked, attention_mask)


def masked_loss(logps, masked, t, num_tokens):
    """Sum of -logps/t over the masked tokens, divided by num_tokens, the answers' tokens in all.

    logps (B, L), masked (B, L) bool, t (B, 1) (LLaDA, eq. 5).
    """
    return -(logps / t)[masked].sum() / num_tokens


# ---- the batch of an update ----

class Batch(NamedTuple):
    """What one update of train_sft sees."""
    prompts: tuple             # B lists of ids
    answers: torch.Tensor      # (B, L), eos after the end
    masked: torch.Tensor       # (B, L) bool: what the model does not see
    t: torch.Tensor            # (B, 1), the noise level


def right_pad(answers, length, eos_id, device):
    """[list of ids] -> ids (B, length), each filled up with eos, which is learnt."""
    rows = [answer + [eos_id] * (length - len(answer)) for answer in answers]
    return torch.tensor(rows, device=device)


def draw_batch(pairs, step, batch_size, length, eos_id, seed, device):
    """The Batch of an update; every pair comes once before any comes again.

    pairs: [(prompt ids, answer ids)]; length: of the answers, eos included.
    """
    first = step * batch_size
    drawn = [shuffled(pairs, i, seed, 'sft') for i in range(first, first + batch_size)]
    prompts, answers = zip(*drawn)
    answers = right_pad(answers, length, eos_id, device)                     # (B, L)
    masked, t = draw_masks(answers, torch_stream(device, seed, 'sft', step))
    return Batch(prompts, answers, masked, t)


# ---- the SFT set: s1K, or a file with its columns ----

S1K_PROMPT = f'Solve this problem. {rewards.FORM}the solution.\n\n'


def s1k_row(row):
    """s1K: question, thinking_trajectories, attempt; -> (prompt, answer)."""
    thoughts = rewards.column(row, 'thinking_trajectories', list)
    text = rewards.tagged(thoughts[0].strip(), rewards.column(row, 'attempt').strip())
    text.encode()                                    # as rewards.column does
    return S1K_PROMPT + rewards.column(row, 'question'), text


def load_s1k(source):
    """[(prompt, answer)] of 'hub', 'nano' (assets/nano/sft.jsonl), or a file with s1K's columns."""
    known = dict(hub=('simplescaling/s1K', None, 'train'),
                 nano=(rewards.FOLDER / 'assets/nano/sft.jsonl',))
    return rewards.load_rows([known.get(source, (source,))], s1k_row)


def encode_traces(traces, tokenizer, max_prompt, max_answer):
    """[(prompt, answer)] -> [(prompt ids, answer ids)].

    Prompts over max_prompt tokens are dropped, answers are cut to max_answer tokens. ValueError
    where none is left.
    """
    pairs = []
    for prompt, answer in traces:
        prompt_ids = chat(tokenizer, prompt)
        answer_ids = tokenizer(answer, add_special_tokens=False)['input_ids']
        if len(prompt_ids) <= max_prompt:
            pairs.append((prompt_ids, answer_ids[:max_answer]))
    if not pairs:
        raise ValueError('SFT has no trace whose prompt fits --max_prompt: raise it')
    return pairs
