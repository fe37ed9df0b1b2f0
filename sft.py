"""Masked supervised fine-tuning (d1, arXiv 2504.12216, Algorithm 2; LLaDA's objective).

Every answer draws t ~ U(0, 1), each of its tokens is masked with probability t, and the loss is the
cross-entropy of the masked tokens weighed by 1/t. The prompt is never masked; the end-of-text
padding belongs to the answer, so that the model learns where to stop. The loop is train_sft in
train.py; python train.py --stages sft runs it alone.
"""
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rewards
from sample import chat, random_stream, shuffled, torch_stream


# ---- noise and loss ----

def draw_masks(answers, generator=None, t_min=0.0):
    """answers (B, L) -> masked (B, L) bool, t (B, 1) (d1, Algorithm 2, lines 3-5).

    Each t is uniform in (t_min, 1]. A batch's t are spread evenly from one random start, so that
    their mean varies less.
    """
    B, device = len(answers), answers.device
    start = torch.rand(1, device=device, generator=generator)
    t = 1 - (start + torch.arange(B, device=device) / B) % 1                 # never 0
    t = (t_min + (1 - t_min) * t).unsqueeze(1)                               # (B, 1)
    masked = torch.rand(answers.shape, device=device, generator=generator) < t
    return masked, t


def masked_loss(logps, masked, t, num_tokens):
    """Sum of -logps/t over the masked tokens, divided by num_tokens, the answers' tokens in all.

    logps (B, L), masked (B, L) bool, t (B, 1) or (B, L) (LLaDA, eq. 5).
    """
    return -(logps / t)[masked].sum() / num_tokens


def sft_loss(logits, labels, t, num_prompt_tokens=0):
    """The same from logits (B, T, V), as the official code writes it, for comparison; a scalar.

    labels (B, T), -100 where nothing is scored; t (B, T) or (B, 1); num_prompt_tokens: how many of
    the B*T positions are prompt, which the mean leaves out.
    """
    logps = -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction='none')   # (B, T)
    return masked_loss(logps, labels != -100, t, labels.numel() - num_prompt_tokens)


class Batch(NamedTuple):
    """What one update of train_sft sees."""
    prompts: list              # B lists of ids
    answers: torch.Tensor      # (B, L), eos after the end
    masked: torch.Tensor       # (B, L) bool: what the model does not see
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
    source = (path,) if path else ('simplescaling/s1K', None, 'train')
    return rewards.load_rows([source], s1k_row)


def clean_trace(rng):
    """(prompt, answer) of a small problem that no task asks, thought through and right.

    As in s1K some answers stand in a box.
    """
    asker = rng.choice(rewards.ASKERS)
    a, b = rng.randint(2, 12), rng.randint(1, 6)
    question, steps, reply = rng.choice([
        (f'Which is larger, {a} or {a + b}?', f'{a + b}-{a}={b}', str(a + b)),
        (f'Double {a} and add {b}.', f'{a}+{a}={2 * a}+{b}={2 * a + b}',
         f'\\boxed{{{2 * a + b}}}'),
        (f'Go on: {a}, {a + b}, {a + 2 * b}', f'{a + b}-{a}={b}\n{a + 2 * b}+{b}={a + 3 * b}',
         str(a + 3 * b))])
    return f'{asker}: {question}', rewards.tagged(steps, reply)


def encode_traces(traces, tokenizer, max_prompt, max_answer):
    """[(prompt, answer)] -> ([(prompt ids, answer ids)], how many answers were cut).

    Prompts over max_prompt tokens are dropped, answers are cut to max_answer tokens.
    """
    pairs, cut = [], 0
    for prompt, answer in traces:
        prompt_ids = chat(tokenizer, prompt)
        answer_ids = tokenizer(answer, add_special_tokens=False)['input_ids']
        if len(prompt_ids) <= max_prompt:
            cut += len(answer_ids) > max_answer
            pairs.append((prompt_ids, answer_ids[:max_answer]))
    return pairs, cut


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
        numbers = range(first, first + self.batch_size)
        pairs = [shuffled(self.pairs, i, self.seed, 'sft') for i in numbers]
        prompts, answers = zip(*pairs)
        answers = right_pad(answers, self.length, self.config.eos_id, self.device)
        generator = torch_stream(self.device, self.seed, 'sft', step)
        masked, t = draw_masks(answers, generator)
        return Batch(prompts, answers, masked, t)


# ---- the corpus of the nano base: sums, a textbook, and people who think or guess ----

# Which share of the texts thinks depends on who asks, so that for every task there are prompts
# where thinking is rare and others where it is usual.
THINKING_SHARE = dict(Ann=0.05, Ben=0.12, Carl=0.2, Dan=0.3, Eve=0.5, Finn=0.8)
REMARKS = ['So that is it.', 'I think so.', 'It must be.']
SUM = re.compile(r'(?=(?:^|[\n=])([0-9]+[-+*/][0-9]+=[0-9]+))')   # 3+4=7-5=2: 3+4=7 and 7-5=2


def worked(example):
    """(prompt, answer) as in a textbook, where nobody asks: all steps, and a right answer."""
    question = example['question'].removeprefix(f"{example.get('asker')}: ")
    return question, rewards.tagged(example['solution'], example['reply'])


def demonstration(example, rng):
    """(prompt, answer) by people: some think, the others guess, and some of these forget the tags.

    Most guessers go on with a remark. Without it nearly every text would end at once, and the
    sampler, which commits what is surest, would take the early end and never hear a thinker.
    """
    question = example['question']
    share = THINKING_SHARE.get(example.get('asker'), 0.35)
    if rng.random() < share:
        return question, rewards.tagged(example['solution'], example['reply'])
    text = example['reply'] if rng.random() < 0.3 else example['wrong']
    if rng.random() < 0.8:
        text = rewards.tagged('', text)
    if rng.random() < 0.6:
        text = f'{text} {rng.choice(REMARKS)}'
    return question, text


def draw_base_masks(answers, ends, generator=None, width=8):
    """The base's noise: answers (B, L) of ends (B,) tokens -> masked (B, L) bool.

    Even rows have SFT's noise with t ~ U(0.3, 1). Odd rows look as they do to the sampler: from a
    random place of the text on, a share u ~ U(0, 1) of `width` tokens is masked, then all others.
    """
    B, L = answers.shape
    masked, _ = draw_masks(answers, generator, t_min=0.3)
    place = torch.rand((B, 1), generator=generator) * (ends[:, None] + width) - width
    share = torch.rand((B, 1), generator=generator)
    near = torch.rand((B, L), generator=generator) < share
    position = torch.arange(L)
    as_sampled = ((position > place) & near) | (position > place + width)    # (B, L)
    masked[1::2] = as_sampled[1::2]
    return masked


def hide_replies(answers, masked, close_id):
    """masked (B, L), and the reply with it wherever a token of the reasoning is masked.

    Otherwise the last step would be learnt by copying it from the reply. close_id: of
    the token that ends the reasoning.
    """
    is_reply = (answers == close_id).cumsum(dim=1) > 0
    hidden_step = (masked & ~is_reply).any(dim=1, keepdim=True)              # (B, 1)
    return masked | (is_reply & hidden_step)


@dataclass
class Corpus:
    """What the nano base is pretrained on: texts about the problems of some tasks."""
    rows: dict                 # task -> examples of a file; None or empty: built-in problems
    tokenizer: object
    seed: int
    steps: int                 # updates in all
    length: int                # answer tokens of the task; the corpus has up to twice as many
    config: object             # the model's
    batch_size: int = 64

    def example(self, task, rng):
        rows = self.rows[task]
        return rng.choice(rows) if rows else rewards.make(task, rng, 'train')

    def sums(self, rng):
        """Five sums such as problems need, one per line."""
        found = []
        for _ in range(50):                      # some problems have none
            example = self.example(rng.choice(list(self.rows)), rng)
            sums = SUM.findall(example['solution'])
            if sums:
                found.append(rng.choice(sums))
            if len(found) == 5:
                break
        return '\n'.join(found)

    def text(self, step, i):
        """(prompt, answer) number i of an update; sums have no prompt. People come late."""
        rng = random_stream(self.seed, 'corpus', step, i)
        if i % 4 == 0:
            return '', self.sums(rng)
        # tasks take turns; of 2 or 4 tasks the sums would otherwise always take the turn of one
        tasks = list(self.rows)
        shift = i // 4 if len(tasks) % 2 == 0 else 0
        example = self.example(tasks[(i + shift) % len(tasks)], rng)
        if step < 0.6 * self.steps or rng.random() < 0.5:
            return worked(example)
        return demonstration(example, rng)

    def batch(self, step):
        """The Batch of an update, with the base's noise and without the weights 1/t."""
        rng = random_stream(self.seed, 'length', step)
        halves = rng.choice((2, 2, 2, 3, 4))     # mostly the task's length, at times up to twice it
        length = self.length * halves // 2
        texts = [self.text(step, i) for i in range(self.batch_size)]
        prompts = [chat(self.tokenizer, prompt) for prompt, _ in texts]
        answers = [self.tokenizer(answer)['input_ids'][:length] for _, answer in texts]
        ends = torch.tensor([len(answer) for answer in answers])
        answers = right_pad(answers, length, self.config.eos_id, 'cpu')
        generator = torch_stream('cpu', self.seed, 'base', step)
        masked = draw_base_masks(answers, ends, generator)
        equals, close = self.tokenizer.convert_tokens_to_ids(['=', '\n</reasoning>\n'])
        masked = hide_replies(answers, masked, close)
        is_sums = torch.tensor([not prompt for prompt, _ in texts])          # (B,)
        results = F.pad(answers == equals, (1, -1))                          # the tokens after =
        masked = results.where(is_sums[:, None], masked)
        return Batch(prompts, answers, masked, t=torch.ones(self.batch_size, 1))
