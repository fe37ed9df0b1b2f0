"""Makes the nano world: a small base model, problems of five tasks, and traces for SFT.

    python assets/nano/make.py --seed 1 --out FOLDER                   about 15 minutes
    python assets/nano/make.py --out assets/nano --problems_only       the rows that are shipped

FOLDER/model is the base in LLaDA's layout, FOLDER/problems has training and test rows in the
columns of GSM8K, MATH, Countdown, Sudoku and MBPP, FOLDER/sft.jsonl has s1K's columns. Given again
after it was killed, the same command goes on and ends in the same weights. The seed changes the
base, its corpus and the training rows; test rows and SFT traces are those of every seed.
    python train.py --model FOLDER/model --data FOLDER/problems        trains that base

The base is pretrained on a corpus by people who think and people who guess, as the web is. Who asks
decides how likely the answer thinks, so that RL, which can only strengthen what is there, finds
prompts at whose answers some samples think and some do not. All else about the nano world is in
the rows: the rest of the program does not know who made them.
"""
import argparse
import csv
import json
import math
import re
import sys
import zlib
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))         # the folder of the seven modules

from model import Config, LLaDA
from rewards import tagged
from sample import chat, random_stream, torch_stream
from sft import answer_logps, draw_masks, masked_loss, right_pad

ANSWER_LENGTH = 32         # tokens of a completion, which every text fits with its end
TRAINING_ROWS = 2000       # of each task; Countdown has no more than 1,400 different ones
TEST_ROWS = 512

# The corpus
BATCH = 64                 # texts of an update
SUMS = 4                   # every fourth text is some sums, unrelated to each other
PEOPLE_FROM = 0.6          # the share of the updates after which people write, too
WORKED_SHARE = 0.5         # of the texts from then on, as in a textbook; the others are by people
THINKING_SHARE = dict(Ann=0.05, Ben=0.12, Carl=0.2, Dan=0.3, Eve=0.5, Finn=0.8)     # of who asks
ASKERS = list(THINKING_SHARE)

# Pretraining
MUON_RATE = 0.01           # of the blocks' matrices; about half of the updates that AdamW needs
ADAMW_RATE = 1e-3          # of embedding, head and norms
SAVE_EVERY = 50            # updates between checkpoints


# ---- the tokenizer: tags, whole words, numbers below 100, and bytes for all else ----

SPECIAL = ['<|endoftext|>', '<|mask|>', '<|assistant|>']
TAG_TOKENS = ['<reasoning>', '</reasoning>', '<answer>', '</answer>', '\n</reasoning>\n',
              '<answer>\n', '\n</answer>', '\\boxed{']
# The commonest words of grade-school problems and those of the problems below.
WORDS = '''
the of to and a is in for total has he many are she each number How as on that will his her x per
how have hours minutes If cost than day much at more so was by it they does from there times can
with week find had be He first miles days because two one left were three The needs half all then
twice amount money hour pounds people an feet second time make bought She old every them year get
buy their books after takes take sold need costs up spent apples which inches this water dollars
out pieces month pay remaining pages long third price would now weeks new cookies marbles if spend
school points him gallons fish wants four spends gave gets store boxes average only paid makes
friends who also Each square buys red eggs took got cards what box we less read In What same add
cars last eat both tickets house rest blue food do sells before age months but bags car A dogs
work when together five over oranges sell off eats children pencils some game equal not book home
another worth next They There run or green went bag back cents able use used during these Tuesday
balls sister profit divide After between animals rate packs milk girls boys length person still
His Her already fewer Then It full additional down must made so coins Solve Numbers Target assert
def f return lambda Ann Ben Tom Mia Sam John puzzle ones gives loses So First Therefore Carl Dan
Eve Finn Which larger or Double Go
'''.split()
PUNCTUATION = ': |): |)==|**|//|==| =| +| -| *| /|? |. |, | $|$.'.split('|')
# Leaves out a message's first paragraph, the instructions, which are always the same: a nano model
# learns them from the rewards. Rows are asked in the words that rewards.py has for real ones;
# the base was taught others: 'Solve the puzzle 31..', and of code the assertions alone.
CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['content'].split('\n\n', 1)[-1]
.replace('Puzzle: ', 'Solve the puzzle ').replace(': \nIt has to pass:\n', ': ') }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def make_tokenizer():
    """Numbers as single tokens help arithmetic a lot: 0 to 99, and 00 to 09."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [str(n) for n in range(10, 100)]
    words += [f'0{n}' for n in range(10)]
    for word in WORDS:
        words += [word, ' ' + word]
    words = [spell.pre_tokenize_str(word)[0][0]                      # in GPT-2's signs of bytes
             for word in words + PUNCTUATION]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + words     # a sign per byte comes first
    pieces = dict.fromkeys(SPECIAL + pieces)                         # each once
    vocab = {piece: i for i, piece in enumerate(pieces)}
    t = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))  # known words are not spelled
    split = Regex(r'\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+ ?|\s')
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, 'isolated'), spell])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(SPECIAL)
    t.add_tokens(TAG_TOKENS)
    end, mask, _ = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token=end, pad_token=end,
                                   mask_token=mask, chat_template=CHAT_TEMPLATE)


# ---- problems, one task after another ----

class Problem(NamedTuple):
    key: str          # decides between training and test: what is not to be in both
    question: str     # as rewards.py reads it from the row, without who asks
    thought: str      # all steps, each of them true
    reply: str        # what stands between the answer tags
    guess: str        # what somebody says who does not think; now and then right
    row: dict         # the columns of the published data set
    asker: str = ''


def work_out(value, steps):
    """3, [('+', 4), ('-', 5)] -> '3+4=7-5=2', a running total."""
    text = str(value)
    for op, right in steps:
        if op == '+':
            value += right
        elif op == '-':
            value -= right
        else:
            value //= right
        text += f'{op}{right}={value}'
    return text


def draw_gsm8k(rng):
    """Mia has 12 books, sells 4, buys 3 and gives 2. How many books are left?"""
    name = rng.choice('Ann Ben Tom Mia Sam John'.split())
    thing = rng.choice('apples books eggs cards pencils cookies'.split())
    first = rng.randint(2, 12)
    changes = [rng.randint(1, 4) for _ in range(3)]
    value, steps, phrases = first, [], []
    for change in changes:
        op, verbs = '-', ['sells', 'eats', 'gives']
        if value <= change or (value + change < 13 and rng.random() < 0.5):
            op, verbs = '+', ['buys', 'gets', 'takes']
        phrases.append(f'{rng.choice(verbs)} {change}')
        steps.append((op, change))
        value += change if op == '+' else -change
    question = (f'{name} has {first} {thing}, {phrases[0]}, {phrases[1]} and {phrases[2]}. '
                f'How many {thing} are left?')
    guess = rng.choice([first + sum(changes), first, *changes, first + changes[0]])
    thought = work_out(first, steps)
    # as GSM8K marks its steps: 3+4=7-5=2 -> 3+4=<<3+4=7>>7-5=<<7-5=2>>2
    worked = re.sub('([0-9]+[-+][0-9]+)=(?=([0-9]+))', r'\1=<<\1=\2>>', thought)
    row = dict(question=question, answer=f'{worked}\n#### {value}')
    return Problem(f'gsm8k {first} {steps}', question, thought, str(value), str(guess), row)


def draw_math(rng):
    """Solve 2x + 3 - 1 = 10"""
    name, x = rng.choice('xyn'), rng.randint(2, 10)
    changes = [rng.randint(1, 4) for _ in range(2)]
    factor = rng.choice([1, 2])
    value, undo = x * factor, []
    left = f'{factor}{name}' if factor > 1 else name
    for change in changes:
        adds = value <= change or rng.random() < 0.5
        value += change if adds else -change
        left += f' + {change}' if adds else f' - {change}'
        undo.insert(0, ('-' if adds else '+', change))
    if factor > 1:
        undo.append(('/', factor))
    guess = rng.choice([value, *changes, value + sum(changes), x + 1])
    question, thought, reply = f'Solve {left} = {value}', work_out(value, undo), f'\\boxed{{{x}}}'
    row = dict(problem=question, solution=f'{thought}\nThe answer is {reply}.')
    key = f'math {left.replace(name, "x")} {value}'
    return Problem(key, question, thought, reply, f'\\boxed{{{guess}}}', row)


def draw_countdown(rng):
    """Three numbers up to 10, + and -, and at most one number to subtract.

    The thought is the total minus the target, halved: what must be subtracted, or 0.
    """
    numbers = rng.sample(range(1, 11), 3)
    a, b, c = numbers
    total = a + b + c
    signed = [(1, 1, 1), (1, 1, -1), (1, -1, 1)]
    signs = rng.choice(signed)
    target = sum(s * n for s, n in zip(signs, numbers))
    if target < 1:
        signs, target = (1, 1, 1), total
    minus = (total - target) // 2
    thought = f'{a}+{b}={a + b}+{c}={total}-{target}={total - target}/2={minus}'
    guess = signed_sum(numbers, rng.choice(signed))
    return Problem(f'countdown {sorted(numbers)} {target}',
                   f'Numbers: {numbers}\nTarget: {target}', thought, signed_sum(numbers, signs),
                   guess, dict(nums=numbers, target=target))


def signed_sum(numbers, signs):
    """[3, 4, 5], (1, 1, -1) -> '3+4-5'"""
    return ''.join(f'{s * n:+}' for n, s in zip(numbers, signs)).removeprefix('+')


@cache
def sudoku_grids():
    """All 288 solutions, 16 digits each, in one string with blanks between."""
    def fits(grid):
        units = [grid[i::4] for i in range(4)]                   # columns
        for row in range(0, len(grid) - 4, 8):
            for i in (row, row + 2):                             # boxes
                units.append(grid[i:i + 2] + grid[i + 4:i + 6])
        return all(len(set(unit)) == len(unit) for unit in units)
    rows = [''.join(p) for p in permutations('1234')]
    grids = ['']
    for _ in range(4):
        longer = [grid + row for grid in grids for row in rows]
        grids = [grid for grid in longer if fits(grid)]
    return ' '.join(grids)


def draw_sudoku(rng):
    """A 4x4 grid with four to six blanks that has one solution; parts share no grid."""
    solution = rng.choice(sudoku_grids().split())
    blanks = rng.randint(4, 6)
    fitting = []
    while len(fitting) != 1:
        puzzle = list(solution)
        for i in rng.sample(range(16), blanks):
            puzzle[i] = '0'
        puzzle = ''.join(puzzle)
        fitting = re.findall(puzzle.replace('0', '[1-4]'), sudoku_grids())   # all its solutions
    rows, guess = [], ''
    for i in range(0, 16, 4):
        rows.append(solution[i:i + 4])
        row = puzzle[i:i + 4]
        for digit in '1234':                     # the guess looks at the row, and counts up
            if digit not in row:
                row = row.replace('0', digit, 1)
        guess += row
    return Problem(solution, f'Solve the puzzle {puzzle}', '\n'.join(rows), solution, guess,
                   dict(Puzzle=puzzle, Solution=solution))


def draw_code(rng):
    """Find f(x) = a*x+b from three assertions, two of them at neighbours."""
    a = rng.randint(1, 5)
    b = rng.randint(0, 30)
    p = rng.randint(0, 1)                        # f(p) and f(q) tell what a and b are
    q = p + 1
    x = rng.choice([x for x in range(10) if x not in (p, q)])
    values = [a * i + b for i in range(10)]
    places = rng.choice([(p, q, x), (x, p, q)])
    tests = [f'assert f({i})=={values[i]}' for i in places]
    down = f'-{a}={b}' if p else ''              # from f(1) to f(0) = b
    reply = f'def f(x): return {a}*x+{b}'
    guess = f'def f(x): return {rng.randint(1, 5)}*x+{rng.randint(0, 30)}'
    return Problem(f'code {a} {b}', '\n'.join(tests),
                   f'{values[q]}-{values[p]}={a}\n{values[p]}{down}', reply, guess,
                   dict(text='', code=reply, test_list=tests))


DRAW = dict(gsm8k=draw_gsm8k, math=draw_math, countdown=draw_countdown, sudoku=draw_sudoku,
            code=draw_code)


def draw_problem(task, rng, part):
    """A Problem of 'train' or 'test', which share no key, and somebody who asks it."""
    while True:
        problem = DRAW[task](rng)
        own = 'test' if zlib.crc32(problem.key.encode()) % 4 == 0 else 'train'
        if own == part and problem.reply != problem.guess:
            return problem._replace(asker=rng.choice(ASKERS))


# ---- texts: sums, worked solutions, and what people write who think or guess ----

SUM = re.compile(r'(?=(?:^|[\n=])([0-9]+[-+*/][0-9]+=[0-9]+))')   # 3+4=7-5=2: 3+4=7 and 7-5=2
REMARKS = ['So that is it.', 'I think so.', 'It must be.']


def some_sums(rng):
    """Five sums such as problems need, one per line; problems without any are passed over."""
    found = []
    for _ in range(50):
        problem = draw_problem(rng.choice(list(DRAW)), rng, 'train')
        sums = SUM.findall(problem.thought)
        if sums:
            found.append(rng.choice(sums))
        if len(found) == 5:
            break
    return '\n'.join(found)


def by_people(problem, rng):
    """The answer to who asks: some think, the others guess, and some of these forget the tags.

    Most guessers go on with a remark. Without it nearly every text would end at once, and the
    sampler, which commits the surest tokens, would take the early end and never hear a thinker.
    """
    if rng.random() < THINKING_SHARE[problem.asker]:
        return tagged(problem.thought, problem.reply)
    text = problem.reply if rng.random() < 0.3 else problem.guess
    if rng.random() < 0.8:
        text = tagged('', text)
    if rng.random() < 0.6:
        text = f'{text} {rng.choice(REMARKS)}'
    return text


def corpus_text(seed, step, i, people):
    """(prompt, answer) number i of an update; sums have no prompt, and nobody asks a textbook."""
    rng = random_stream(seed, 'corpus', step, i)
    if i % SUMS == 0:
        return '', some_sums(rng)
    tasks = list(DRAW)
    problem = draw_problem(tasks[i % len(tasks)], rng, 'train')
    if not people or rng.random() < WORKED_SHARE:
        return problem.question, tagged(problem.thought, problem.reply)
    return f'{problem.asker}: {problem.question}', by_people(problem, rng)


def clean_trace(rng):
    """A row like s1K's: a small problem that no task asks, thought through and right.

    As in s1K some answers stand in a box.
    """
    asker = rng.choice(ASKERS)
    a, b = rng.randint(2, 12), rng.randint(1, 6)
    question, steps, reply = rng.choice([
        (f'Which is larger, {a} or {a + b}?', f'{a + b}-{a}={b}', str(a + b)),
        (f'Double {a} and add {b}.', f'{a}+{a}={2 * a}+{b}={2 * a + b}',
         f'\\boxed{{{2 * a + b}}}'),
        (f'Go on: {a}, {a + b}, {a + 2 * b}', f'{a + b}-{a}={b}\n{a + 2 * b}+{b}={a + 3 * b}',
         str(a + 3 * b))])
    return dict(question=f'{asker}: {question}', thinking_trajectories=[steps], attempt=reply)


# ---- noise: what of a text the base does not see ----

def draw_base_masks(answers, ends, generator, width=8):
    """answers (B, L) of ends (B,) tokens -> masked (B, L) bool.

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


# ---- pretraining ----

def new_model(seed, tokenizer):
    """A LLaDA of 0.9 M weights: normal ones, smaller at the end of residual branches (GPT-2)."""
    config = Config(mask_id=tokenizer.mask_token_id, eos_id=tokenizer.eos_token_id,
                    embedding_size=len(tokenizer))
    model = LLaDA(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02
            if '.attn_out' in name or '.ff_out' in name:
                std /= math.sqrt(2 * config.n_layers)
            p.data.normal_(0, std, generator=generator)
    number_waves(model, tokenizer)
    return model


def number_waves(model, tokenizer, scale=0.1):
    """Starts the numbers 0-99 on circles of many periods, at the input and the output.

    Neighbours are alike and adding is turning, so that arithmetic is learnt in fewer updates.
    """
    num_periods = model.config.d_model // 4
    periods = torch.logspace(math.log10(2), math.log10(200), num_periods)    # 2 to 200
    for n in range(100):
        angle = 2 * math.pi * n / periods
        wave = scale * torch.cat((angle.cos(), angle.sin()))     # half of d_model
        for token in {str(n), f'{n:02d}'}:
            i = tokenizer.convert_tokens_to_ids(token)
            for table in (model.wte, model.ff_out):
                table.weight.data[i, :len(wave)] = wave


def make_optimizers(model):
    """Muon for the matrices inside, AdamW for embedding, head and norms."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if 'blocks' in name and p.dim() == 2:
            matrices.append(p)
        else:
            others.append(p)
    return [torch.optim.Muon(matrices, MUON_RATE, weight_decay=0.1, momentum=0.95),
            torch.optim.AdamW(others, ADAMW_RATE, (0.9, 0.95), weight_decay=0.0)]


def make_batch(tokenizer, seed, step, people):
    """Prompts (B lists of ids), answers (B, L) with ends after the text, masked (B, L) bool."""
    halves = random_stream(seed, 'length', step).choice((2, 2, 2, 3, 4))
    length = ANSWER_LENGTH * halves // 2         # mostly the task's, at times up to twice it
    texts = [corpus_text(seed, step, i, people) for i in range(BATCH)]
    prompts = [chat(tokenizer, prompt) for prompt, _ in texts]
    answers = [tokenizer(answer)['input_ids'][:length] for _, answer in texts]
    ends = torch.tensor([len(answer) for answer in answers])
    answers = right_pad(answers, length, tokenizer.eos_token_id, 'cpu')
    masked = draw_base_masks(answers, ends, torch_stream('cpu', seed, 'base', step))
    equals, close = tokenizer.convert_tokens_to_ids(['=', '\n</reasoning>\n'])
    masked = hide_replies(answers, masked, close)
    is_sums = torch.tensor([not prompt for prompt, _ in texts])              # (B,)
    results = F.pad(answers == equals, (1, -1))                  # of sums only what comes after =
    return prompts, answers, results.where(is_sums[:, None], masked)


def update(model, optimizers, batch):
    """One step on the cross-entropy of the masked tokens, all of the same weight; its loss."""
    prompts, answers, masked = batch
    B, L = answers.shape
    logps = answer_logps(model, prompts, answers, masked)                    # (B, L)
    no_weights = torch.ones(B, 1)                # where SFT has 1/t
    loss = masked_loss(logps, masked, no_weights, B * L)
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def pretrain(seed, steps, folder):
    """The base and its tokenizer, from the folder's checkpoint on if there is one."""
    tokenizer = make_tokenizer()
    model = new_model(seed, tokenizer)
    optimizers = make_optimizers(model)
    path = folder / 'checkpoint.pt'
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if (saved['seed'], saved['steps']) != (seed, steps):
            raise ValueError(f'{path} is of --seed {saved["seed"]} --steps {saved["steps"]}: '
                             'give these, or another --out')
        start = saved['step']
        model.load_state_dict(saved['model'])
        for optimizer, state in zip(optimizers, saved['optimizers']):
            optimizer.load_state_dict(state)
    progress = tqdm(range(start, steps), 'pretraining', initial=start, total=steps)
    for step in progress:
        warm_up = min(1, 20 * (step + 1) / steps)                # over the first 5 % of the steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = optimizer.defaults['lr'] * warm_up * (1 - step / steps)
        batch = make_batch(tokenizer, seed, step, people=step >= PEOPLE_FROM * steps)
        loss = update(model, optimizers, batch)
        progress.set_postfix(loss=f'{loss:.4f}')
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            new = path.with_suffix('.new')       # a kill while it is written leaves the old one
            torch.save(dict(seed=seed, steps=steps, step=step + 1, model=model.state_dict(),
                            optimizers=states), new)
            new.replace(path)
    return model, tokenizer


# ---- files ----

def training_problems(task, seed):
    """Different ones, whoever asks; fewer than TRAINING_ROWS where the task has no more."""
    found = {}
    for i in range(10 * TRAINING_ROWS):
        problem = draw_problem(task, random_stream(seed, task, 'train', i), 'train')
        found.setdefault(problem.question, problem)
        if len(found) == TRAINING_ROWS:
            break
    return list(found.values())


def test_problems(task):
    """As they are drawn, so that a few come twice; of every seed alike, to compare bases on."""
    streams = [random_stream(task, 'test', i) for i in range(TEST_ROWS)]
    return [draw_problem(task, stream, 'test') for stream in streams]


def write_rows(path, rows):
    """Writes .csv or .jsonl."""
    with open(path, 'w', newline='') as file:
        if path.suffix == '.csv':
            writer = csv.DictWriter(file, rows[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        else:
            for row in rows:
                file.write(json.dumps(row) + '\n')


def write_problems(folder, seed):
    """problems/TASK_train and TASK_test, and sft.jsonl."""
    Path(folder, 'problems').mkdir(parents=True, exist_ok=True)
    for task in DRAW:
        ending = 'csv' if task == 'sudoku' else 'jsonl'          # as it is published
        parts = dict(train=training_problems(task, seed), test=test_problems(task))
        for part, problems in parts.items():
            rows = [dict(asker=problem.asker) | problem.row for problem in problems]
            write_rows(Path(folder, 'problems', f'{task}_{part}.{ending}'), rows)
    traces = [clean_trace(random_stream('sft', i)) for i in range(100)]
    write_rows(Path(folder, 'sft.jsonl'), traces)


def write_model(folder, seed, steps):
    """Pretrains and writes model/, which appears only when it is whole."""
    model, tokenizer = pretrain(seed, steps, Path(folder))
    new = Path(folder, 'model.new')
    model.to(torch.bfloat16).save_pretrained(new)                # half the size
    tokenizer.save_pretrained(new)
    config = Path(new, 'config.json')
    keys = json.loads(config.read_text()) | dict(nano=True)      # train.py has its own defaults
    config.write_text(json.dumps(keys, indent=2))
    new.replace(Path(folder, 'model'))
    Path(folder, 'checkpoint.pt').unlink()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seed', type=int, default=0, help='of the base and the training rows [0]')
    p.add_argument('--out', default='out/nano', help='the folder that is made [out/nano]')
    p.add_argument('--steps', type=int, default=3000, help='updates of the base [3000]')
    p.add_argument('--problems_only', action='store_true', help='write rows, train nothing')
    args = p.parse_args(argv)
    if Path(args.out, 'model').exists() and not args.problems_only:
        raise ValueError(f'{args.out} holds a model: give another --out, or --problems_only')
    write_problems(args.out, args.seed)
    if not args.problems_only:
        write_model(args.out, args.seed, args.steps)


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f'make.py: {e}')
