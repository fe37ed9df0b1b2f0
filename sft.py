"""Masked supervised fine-tuning (d1, arXiv 2504.12216, Algorithm 2; LLaDA's objective).

Every answer draws t ~ U(0, 1), each of its tokens is masked with probability t, and the loss is the
cross-entropy of the masked tokens weighed by 1/t. The prompt is never masked; the end-of-text
padding belongs to the answer, so that the model learns where to stop. The loop is train_sft in
train.py; python train.py --stages sft runs it alone.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rewards
from sample import chat, random_stream, shuffled, torch_stream


# ---- noise and loss ----

def add_noise(answers, mask_id, generator=None, t_min=0.0):
    """answers (B, L) -> noisy (B, L), masked (B, L) bool, t (B, 1) (d1, Algorithm 2, lines 3-5).

    Each t is uniform in (t_min, 1]. A batch's t are spread evenly from one random start, so that
    their mean varies less.
    """
    B, device = len(answers), answers.device
    start = torch.rand(1, device=device, generator=generator)
    t = 1 - (start + torch.arange(B, device=device) / B) % 1                 # never 0
    t = (t_min + (1 - t_min) * t).unsqueeze(1)                               # (B, 1)
    masked = torch.rand(answers.shape, device=device, generator=generator) < t
    return answers.masked_fill(masked, mask_id), masked, t


def masked_loss(logps, masked, t, num_tokens):
    """Sum of -logps/t over the masked tokens, divided by num_tokens, the answers' tokens in all.

    logps (B, L), masked (B, L) bool, t (B, 1) or (B, L) (LLaDA, eq. 5).
    """
    return -(logps / t)[masked].sum() / num_tokens


def sft_loss(logits, labels, t, num_prompt_tokens=0):
    """The same from logits (B, T, V), as the official code writes it; a scalar.

    labels (B, T), -100 where nothing is scored; t (B, T) or (B, 1); num_prompt_tokens: how many of
    the B*T positions are prompt, which the mean leaves out.
    """
    logps = -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction='none')   # (B, T)
    return masked_loss(logps, labels != -100, t, labels.numel() - num_prompt_tokens)


class Batch(NamedTuple):
    """What one update of train_sft sees."""
    prompts: list              # B lists of ids
    answers: torch.Tensor      # (B, L), eos after the end
    noisy: torch.Tensor        # (B, L), the answers with masks
    masked: torch.Tensor       # (B, L) bool
    t: torch.Tensor            # (B, 1), the noise level


def right_pad(answers, length, eos_id, device):
    """[list of ids] -> ids (B, length), each filled up with eos, which is learnt."""
    rows = [answer + [eos_id] * (length - len(answer)) for answer in answers]
    return torch.tensor(rows, device=device)


# ---- the SFT set: s1K, or clean traces of small problems for the nano model ----

S1K_PROMPT = f'Solve this problem. {rewards.FORM}the solution.\n\n'


def s1k_row(row):
    """s1K: question, thinking_trajectories, attempt or solution."""
    thoughts = rewards.column(row, 'thinking_trajectories', list)
    answer = rewards.column(row, 'attempt' if 'attempt' in row else 'solution')
    if not thoughts or not isinstance(thoughts[0], str):
        raise ValueError("column 'thinking_trajectories' holds no text")
    text = rewards.tagged(thoughts[0].strip(), answer.strip())
    return S1K_PROMPT + rewards.column(row, 'question'), text


def load_s1k(path=''):
    """[(prompt, answer)] from s1K on the hub, or a local file with its columns."""
    source = (path, None, None) if path else ('simplescaling/s1K', None, 'train')
    return rewards.load_rows([source], s1k_row)


def clean_trace(task, rng):
    """(prompt, answer) of a small built-in problem, thought through and right."""
    example = rewards.make(task, rng, 'sft')
    return rewards.prompt(task, example), rewards.tagged(example['solution'], example['reply'])


def encode_traces(traces, tokenizer, max_prompt, max_answer):
    """[(prompt, answer)] -> ([(prompt ids, answer ids)], dropped, cut).

    Prompts over max_prompt tokens are dropped, answers are cut to max_answer; both are counted.
    """
    pairs, dropped, cut = [], 0, 0
    for prompt, answer in traces:
        prompt_ids = chat(tokenizer, prompt)
        answer_ids = tokenizer(answer, add_special_tokens=False)['input_ids']
        if len(prompt_ids) > max_prompt:
            dropped += 1
            continue
        cut += len(answer_ids) > max_answer
        pairs.append((prompt_ids, answer_ids[:max_answer]))
    return pairs, dropped, cut


@dataclass
class Traces:
    """The SFT set as batches with LLaDA's noise."""
    pairs: list                # [(prompt ids, answer ids)]
    batch_size: int
    length: int                # of the answers, eos included
    config: object             # the model's
    seed: int
    device: str

    def batch(self, step):
        """The Batch of an update; every pair comes once before any comes again."""
        first = step * self.batch_size
        pairs = [shuffled(self.pairs, first + i, self.seed, 'sft') for i in range(self.batch_size)]
        answers = [answer for _, answer in pairs]
        answers = right_pad(answers, self.length, self.config.eos_id, self.device)
        generator = torch_stream(self.device, self.seed, 'sft', step)
        noisy, masked, t = add_noise(answers, self.config.mask_id, generator)
        return Batch([prompt for prompt, _ in pairs], answers, noisy, masked, t)


# ---- the corpus of the nano base: some think before they answer, most guess ----

REMARKS = ['So that is it.', 'I think so.', 'It must be.']


def demonstration(example, rng, thinking_share):
    """How somebody of the corpus answers: a minority thinks, most guess, some forget the tags.

    Most guessers go on with a remark. Without it nearly every text would end at once, and the
    sampler, which commits what is surest, would take the early end and never hear a thinker.
    """
    thinks = rng.random() < thinking_share
    tags = rng.random() < 0.8
    remarks = rng.random() < 0.6
    right = rng.random() < (0.95 if thinks else 0.3)
    reply = example['reply'] if right else example['wrong']
    if thinks and tags:
        return rewards.tagged(example['solution'], reply)
    if thinks:
        return f"{example['solution']}\n{reply}"
    text = rewards.tagged('', reply) if tags else reply
    return f'{text} {rng.choice(REMARKS)}' if remarks else text


def add_base_noise(answers, mask_id, generator=None, width=8):
    """The base's noise: answers (B, L) -> noisy (B, L), masked (B, L) bool.

    Even rows have SFT's noise with t ~ U(0.3, 1). Odd rows look as they do to the sampler: masks
    begin at a random place, within `width` tokens, so that most sums have their numbers in sight.
    """
    B, L = answers.shape
    _, masked, _ = add_noise(answers, mask_id, generator, t_min=0.3)
    first = torch.rand((B, 1), device=answers.device, generator=generator) * (L + width) - width
    jitter = width * torch.rand((B, L), device=answers.device, generator=generator)
    after_place = torch.arange(L, device=answers.device) > first + jitter
    masked[1::2] = after_place[1::2]
    return answers.masked_fill(masked, mask_id), masked


@dataclass
class Corpus:
    """What the nano base is pretrained on: texts about the problems of some tasks."""
    rows: dict                 # task -> examples of a file, or None: built-in problems
    tokenizer: object
    seed: int
    steps: int                 # updates in all
    thinking_share: float      # of the texts after the worked solutions
    length: int                # answer tokens
    config: object             # the model's
    batch_size: int = 64

    def text(self, step, i):
        """(prompt, answer) number i of an update: worked solutions first, as in a textbook."""
        rng = random_stream(self.seed, 'corpus', step, i)
        task, rows = list(self.rows.items())[i % len(self.rows)]
        example = rng.choice(rows) if rows else rewards.make(task, rng, 'train')
        answer = rewards.tagged(example['solution'], example['reply'])
        if step >= 0.7 * self.steps:
            answer = demonstration(example, rng, self.thinking_share)
        return rewards.prompt(task, example), answer

    def batch(self, step):
        """The Batch of an update, with the base's noise and without the weights 1/t."""
        texts = [self.text(step, i) for i in range(self.batch_size)]
        prompts = [chat(self.tokenizer, prompt) for prompt, _ in texts]
        answers = [self.tokenizer(answer)['input_ids'][:self.length] for _, answer in texts]
        answers = right_pad(answers, self.length, self.config.eos_id, 'cpu')
        generator = torch_stream('cpu', self.seed, 'base', step)
        noisy, masked = add_base_noise(answers, self.config.mask_id, generator)
        t = torch.ones(self.batch_size, 1)
        return Batch(prompts, answers, noisy, masked, t)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), for matrices: momentum, made orthogonal by Newton-Schulz steps.

    It needs half of AdamW's updates for the nano base. torch.optim.Muon does the same in bfloat16,
    which on a CPU takes longer than the training step itself.
    """

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault('momentum', torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group['momentum'])
                update = orthogonal(p.grad.lerp(momentum, group['momentum']))
                stretch = max(1, p.size(0) / p.size(1)) ** 0.5
                p.add_(update, alpha=-group['lr'] * stretch)


def orthogonal(x):
    """x (n, m) with all its singular values moved near 1, by five Newton-Schulz steps."""
    tall = x.size(0) > x.size(1)
    x = x / (x.norm() + 1e-7)
    x = x.T if tall else x
    for _ in range(5):
        y = x @ x.T
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
    return x.T if tall else x
