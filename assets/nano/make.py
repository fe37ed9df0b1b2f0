"""Makes the nano world: a small base model, problems of five tasks, and traces for SFT.

    python assets/nano/make.py --seed 1 --out FOLDER                   about an hour and a quarter
    python assets/nano/make.py --seed 1 --layers 4 --out FOLDER        deeper, a quarter slower
    python assets/nano/make.py --seed 0 --base assets/nano/model --out FOLDER      a third cycle
    python assets/nano/make.py --out assets/nano --problems_only       the rows that are shipped

FOLDER/model is the base in LLaDA's layout, FOLDER/problems has training and test rows in the
columns of GSM8K, MATH, Countdown, Sudoku and MBPP, FOLDER/sft.jsonl has s1K's columns. Given again
after it was killed, the same command goes on and ends in the same weights. The seed changes the
base, its corpus and the training rows; test rows and SFT traces are those of every seed. Countdown
and Sudoku are as in the paper; the problems of d1's own test files are left out of all. The
shipped base was made in two parts (assets/notebook.md): seed 0 in one go has other weights.
    python train.py --model FOLDER/model --data FOLDER/problems        trains that base

The base reads sums, then textbooks, in which every answer thinks, and at last people, too, of whom
most guess. Who asks decides how likely the answer thinks, so that RL, which can only strengthen
what is there, finds prompts at whose answers some samples think and some do not. All else about
the nano world is in the rows: the rest of the program does not know who made them.
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

from model import Config, LLaDA, load
from rewards import TASKS, tagged
from sample import chat, random_stream, torch_stream
from sft import answer_logps, draw_masks, masked_loss, right_pad

ANSWER_LENGTH = 48         # tokens of a completion, which every text fits with its end
MAX_NUMBER = 399           # the largest that is one token
TRAINING_ROWS = 2000       # of each task
TEST_ROWS = 512
TRACES = 1000              # for SFT
WAIT_SHARE = 0.2           # of them go wrong on their way, notice it and go on right
TIMES_SHARE = 0.15         # of the Countdown problems need * or /
# Checksums of d1's test problems: what is measured with them was not seen in training.
D1_TESTS = set(Path(HERE, 'd1_tests.txt').read_text().split())

# The corpus
TURNS = 'countdown sudoku gsm8k sudoku countdown math sudoku code'.split()     # of its texts
SUMS_WEIGHT = 4.0          # of a result's loss, in texts of sums
THINKING_SHARE = dict(Ann=0.05, Ben=0.12, Carl=0.2, Dan=0.3, Eve=0.5, Finn=0.8)     # of who asks
ASKERS = list(THINKING_SHARE)
PEOPLE_FROM = 0.7          # the share of a cycle after which people write, too
WORKED_SHARE = 0.5         # of whole texts from then on are a textbook's; the others by people

# Pretraining
BATCH = 32                 # texts of an update

MUON_RATE = 0.02           # of the blocks' matrices; about half of the updates that AdamW needs
ADAMW_RATE = 3e-3          # of embedding, head and norms
SAVE_EVERY = 100           # updates between checkpoints


class Cycle(NamedTuple):
    """Updates in which the rates rise and fall to 0, and what is read in them."""
    until: float               # when it is over, in parts of --updates
    rate: float                # the highest, in parts of the rates above
    kinds: list                # of texts, in turn; see corpus_text
    sums_until: float          # the share of the cycle in which nothing but sums is read
    block: int                 # tokens of the noise's blocks (Sudoku's: 8)


CYCLES = [Cycle(5 / 6, 1, 'text text sums'.split(), sums_until=0.15, block=8),
          Cycle(1, 0.5, 'text text sums rest'.split(), sums_until=0, block=4),
          Cycle(3 / 2, 0.5, 'text text sums rest'.split(), sums_until=0, block=4)]    # of --base


# ---- the tokenizer: tags, the words of the problems, numbers below 400, and bytes ----

SPECIAL = ['<|endoftext|>', '<|mask|>', '<|assistant|>']
TAG_TOKENS = ['<reasoning>\n', '</reasoning>', '<answer>', '</answer>', '\n</reasoning>\n',
              '<answer>\n', '\n</answer>', '\\boxed{']
WORDS = '''
Ann Ben Tom Mia Sam John Carl Dan Eve Finn has apples books eggs cards pencils cookies sells eats
gives half buys gets takes doubles them and How many are left Solve Numbers Target Puzzle Write It
to pass assert def f return So that is it I think so must be Which larger or Double
add Add Go on Wait
'''.split()
PUNCTUATION = ': |): |)==|**|//|==| =| +| -| *| /|? |. |, | $|$.'.split('|')
# Leaves out a message's first paragraph, the instructions, which are always the same: a nano model
# learns them from the rewards.
CHAT_TEMPLATE = ("{% for message in messages %}{{ message['content'].split('\n\n', 1)[-1] }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def make_tokenizer():
    """Numbers as single tokens help arithmetic a lot; those above MAX_NUMBER are spelled."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [str(n) for n in range(10, MAX_NUMBER + 1)]
    for word in WORDS:
        words += [word, ' ' + word]
    words = [spell.pre_tokenize_str(word)[0][0]                      # in GPT-2's signs of bytes
             for word in words + PUNCTUATION]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + words     # a sign per byte comes first
    pieces = dict.fromkeys(SPECIAL + pieces)                         # each once
    vocab = {piece: i for i, piece in enumerate(pieces)}
    t = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))  # known words are not spelled
    split = Regex(r'(?<!\d)\d{1,3}(?!\d)|\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+ ?|\s')
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
    thought: str      # all steps, each of them true
    reply: str        # what stands between the answer tags
    guess: str        # what somebody says who does not think
    row: dict         # the columns of the published data set
    question: str = ''    # as rewards.py reads it from the row
    asker: str = ''       # not in the question


def work_out(value, steps):
    """3, [('+', 4), ('-', 5)] -> '3+4=7-5=2', a running total."""
    text = str(value)
    for op, right in steps:
        value = apply(value, op, right)
        text += f'{op}{right}={value}'
    return text


def apply(left, op, right):
    """The result, or 0 where it is no whole number from 1 to MAX_NUMBER."""
    if op == '/':
        result = left // right if right and left % right == 0 else 0
    else:
        result = {'+': left + right, '-': left - right, '*': left * right}[op]
    return result if 1 <= result <= MAX_NUMBER else 0


def draw_gsm8k(rng):
    """Mia has 12 books, sells 4, doubles them and buys 12. How many books are left?"""
    name = rng.choice('Ann Ben Tom Mia Sam John'.split())
    thing = rng.choice('apples books eggs cards pencils cookies'.split())
    first = value = rng.randint(5, 40)
    steps, phrases, amounts = [], [], []
    while len(steps) < 3:
        op, amount = rng.choice('++--*/'), rng.randint(2, 12)
        verb = rng.choice(['sells', 'eats', 'gives'])
        phrase = f'{verb} {amount}'
        if op == '+':
            phrase = f'{rng.choice(["buys", "gets", "takes"])} {amount}'
        elif op == '*':
            phrase, amount = 'doubles them', 2
        elif op == '/':
            phrase, amount = f'{verb} half', 2
        if apply(value, op, amount):             # else another change
            value = apply(value, op, amount)
            steps.append((op, amount))
            phrases.append(phrase)
            amounts.append(amount)
    question = (f'{name} has {first} {thing}, {phrases[0]}, {phrases[1]} and {phrases[2]}. '
                f'How many {thing} are left?')
    guess = rng.choice([first + sum(amounts), first, *amounts, first + amounts[0]])
    thought = work_out(first, steps)
    # as GSM8K marks its steps: 3+4=7-5=2 -> 3+4=<<3+4=7>>7-5=<<7-5=2>>2
    worked = re.sub('([0-9]+[-+*/][0-9]+)=(?=([0-9]+))', r'\1=<<\1=\2>>', thought)
    row = dict(question=question, answer=f'{worked}\n#### {value}')
    return Problem(f'gsm8k {first} {steps}', thought, str(value), str(guess), row)


def draw_math(rng):
    """Solve 4x + 9 - 2 = 35"""
    name, x = rng.choice('xyn'), rng.randint(2, 12)
    changes = [rng.randint(1, 9) for _ in range(2)]
    factor = rng.randint(1, 5)
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
    thought, reply = work_out(value, undo), f'\\boxed{{{x}}}'
    row = dict(problem=f'Solve {left} = {value}',
               solution=f'{thought}\nThe answer is {reply}.')
    key = f'math {left.replace(name, "x")} {value}'
    return Problem(key, thought, reply, f'\\boxed{{{guess}}}', row)


def draw_countdown(rng):
    """Three numbers and a target, all from 1 to 100, as d1's; some problems need * or /."""
    needs_times = rng.random() < TIMES_SHARE
    found = None
    while not found:
        a, b, c = numbers = [rng.randint(1, 100) for _ in range(3)]
        signs = rng.choices((1, -1), k=3)
        target = sum(sign * n for sign, n in zip(signs, numbers))
        if needs_times:
            parts = [apply(a, rng.choice('+-*/'), b), c]
            rng.shuffle(parts)
            target = apply(parts[0], rng.choice('+-*/'), parts[1])
        if 1 <= target <= 100:
            found = with_signs(numbers, target)
            if needs_times:
                found = None if found else with_times(numbers, target)
    thought, reply = found
    signs = rng.choices((1, -1), k=3)
    if sum(sign * n for sign, n in zip(signs, numbers)) < 0:
        signs = [-sign for sign in signs]
    return Problem(f'countdown {sorted(numbers)} {target}', thought, reply,
                   signed_sum(numbers, signs), dict(nums=numbers, target=target))


def signed_sum(numbers, signs):
    """[3, 4, 5], (1, 1, -1) -> '3+4-5'"""
    return ''.join(f'{s * n:+}' for n, s in zip(numbers, signs)).removeprefix('+')


def halve(numbers, target):
    """How every Countdown thought begins, and the half, which may be negative or end in .5.

    The sum of all less the target is twice what must be subtracted:
    [24, 99, 50], 73: 24+99=123+50=173-73=100/2=50
    """
    a, b, c = numbers
    excess = a + b + c - target
    steps = [('+', b), ('+', c)]
    if excess >= 0:
        steps.append(('-', target))
    if excess > 0 and excess % 2 == 0:
        steps.append(('/', 2))
    return work_out(a, steps), excess / 2


def with_signs(numbers, target):
    """A thought and an equation of + and - alone, or None.

    Where two numbers are to be subtracted, the thought goes on to the one that stays:
    [24, 99, 50], 25: 24+99=123+50=173-25=148/2=74+25=99 is 99-24-50
    """
    thought, half = halve(numbers, target)
    others = list(numbers)
    if half == 0:
        a, b, c = numbers
        return thought, f'{a}+{b}+{c}'
    if half in numbers:
        others.remove(half)
        return thought, f'{others[0]}+{others[1]}-{int(half)}'
    if half > 0 and half + target in numbers:
        stays = int(half) + target
        others.remove(stays)
        return f'{thought}+{target}={stays}', f'{stays}-{others[0]}-{others[1]}'
    return None


# What a third number c makes of x, which comes from the other two, and the way back from target t.
TIMES_FORMS = [('x+c', 't-c'), ('x-c', 't+c'), ('c-x', 'c-t'),
               ('x*c', 't/c'), ('x/c', 't*c'), ('c/x', 'c/t')]
UNDO = {'+': '-', '-': '+', '*': '/', '/': '*'}


def with_times(numbers, target):
    """A thought and an equation with * or /, the first in the order of TIMES_FORMS, or None.

    + and - have led nowhere; a second line undoes the equation from the target to a number:
    [5, 12, 7], 67: 5+12=17+7=24 and 67-7=60/12=5 is 5*12+7
    """
    thought, _ = halve(numbers, target)
    for form, back in TIMES_FORMS:
        for i, c in enumerate(numbers):
            others = numbers[:i] + numbers[i + 1:]
            left, op, right = (dict(c=c, t=target).get(sign, sign) for sign in back)   # 67, -, 7
            x = apply(left, op, right)
            for a, b in (others, others[::-1]):
                for inner in '*/' if form[1] in '+-' else '*/+-':
                    if x and apply(a, inner, b) == x:
                        pair = f'{a}{inner}{b}'
                        if inner in '+-' or form == 'c/x':
                            pair = f'({pair})'
                        undoing = work_out(left, [(op, right), (UNDO[inner], b)])
                        equation = form.replace('c', str(c)).replace('x', pair)
                        return f'{thought}\n{undoing}', equation
    return None


@cache
def sudoku_grids():
    """All 288 solutions, 16 digits each."""
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
    return grids


@cache
def grids_with(place, digit):
    return {grid for grid in sudoku_grids() if grid[place] == digit}


def solutions(puzzle):
    """All of a puzzle's, 0 = empty; of d1's 500 test puzzles 124 have several."""
    clues = [grids_with(place, digit) for place, digit in enumerate(puzzle) if digit != '0']
    return set(sudoku_grids()).intersection(*clues)


def draw_sudoku(rng):
    """A 4x4 grid with eight blanks, as d1's, but with one solution; parts share no grid."""
    solution = rng.choice(sudoku_grids())
    fitting = []
    while len(fitting) != 1:
        puzzle = list(solution)
        for i in rng.sample(range(16), 8):
            puzzle[i] = '0'
        puzzle = ''.join(puzzle)
        fitting = solutions(puzzle)
    rows, guess = [], ''
    for i in range(0, 16, 4):
        rows.append(solution[i:i + 4])
        row = puzzle[i:i + 4]
        for digit in '1234':                     # the guess looks at the row, and counts up
            if digit not in row:
                row = row.replace('0', digit, 1)
        guess += row
    return Problem(solution, '\n'.join(rows), solution, guess,
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
    return Problem(f'code {a} {b}', f'{values[q]}-{values[p]}={a}\n{values[p]}{down}', reply, guess,
                   dict(text='Write f.', code=reply, test_list=tests))


DRAW = dict(gsm8k=draw_gsm8k, math=draw_math, countdown=draw_countdown, sudoku=draw_sudoku,
            code=draw_code)


def draw_problem(task, rng, part):
    """A Problem of 'train' or 'test', which share no key, and somebody who asks it."""
    while True:
        problem = DRAW[task](rng)
        own = 'test' if zlib.crc32(problem.key.encode()) % 4 == 0 else 'train'
        question = TASKS[task].from_row(problem.row)['question']
        left_out = {checksum(problem.key), checksum(question)} & D1_TESTS
        if own == part and problem.reply != problem.guess and not left_out:
            return problem._replace(question=question, asker=rng.choice(ASKERS))


def checksum(text):
    """Of d1's test problems: of a Countdown's key, and of a Sudoku's question."""
    return f'{zlib.crc32(text.encode()):08x}'


# ---- texts: worked solutions, and what people write who think or guess ----

def some_sums(rng, amount):
    """Lines of one or two sums such as thoughts hold: 24+99=123+50=173

    Each is of another problem: two of one would tell each other's results, and copying would be
    learnt in place of adding.
    """
    lines = []
    while len(lines) < amount:
        if rng.random() < 0.7:                   # of Countdown, whose sums are the hardest
            thought, _ = halve([rng.randint(1, 100) for _ in range(3)], rng.randint(1, 100))
        else:
            thought = draw_problem(rng.choice(TURNS), rng, 'train').thought
        parts = rng.choice(thought.split('\n')).split('=')       # 24+99, 123+50, 173
        if len(parts) > 1:
            last = rng.randint(1, len(parts) - 1)
            first = max(0, last - rng.randint(1, 2))
            result = re.match('[0-9]+', parts[last])[0]
            lines.append('='.join(parts[first:last] + [result]))
    return ''.join(f'{line}\n' for line in lines)


REMARKS = ['So that is it.', 'I think so.', 'It must be.']


def by_people(problem, rng):
    """The answer to who asks: some think, the others guess, and some of these forget the tags.

    Most guessers go on with a remark. Without it nearly every text would end at once, and the
    sampler, which commits the surest tokens, would take the early end and never hear a thinker.
    """
    if rng.random() < THINKING_SHARE[problem.asker]:
        return tagged(problem.thought, problem.reply)
    text = problem.reply if rng.random() < 0.3 else problem.guess            # luck, or not
    if rng.random() < 0.8:
        text = tagged('', text)
    if rng.random() < 0.6:
        text = f'{text} {rng.choice(REMARKS)}'
    return text


class Text(NamedTuple):
    prompt: str
    answer: str
    task: str
    given: str = ''            # how the answer begins, always in sight
    is_sums: bool = False      # then only results are learnt


def corpus_text(seed, step, i, cycle, done):
    """Text number i of an update. Nobody asks a textbook. done: the share of the cycle before it.

    Sums stand where a thought would, under any question, so that what is learnt of them serves
    thoughts. A text of kind 'rest' is a Countdown whose first sums are in sight, for what follows
    from them is a small part of other texts.
    """
    rng = random_stream(seed, 'corpus', step, i)
    rounds, place = divmod(i, len(cycle.kinds))
    kind = 'sums' if done < cycle.sums_until else cycle.kinds[place]
    # whole texts, which come first in kinds, go through TURNS; step: or some never met sums
    turn = rounds * cycle.kinds.count('text') + place
    task = 'countdown' if kind == 'rest' else TURNS[(turn + step) % len(TURNS)]
    problem = draw_problem(task, rng, 'train')
    if kind == 'sums':
        return Text(problem.question, '<reasoning>\n' + some_sums(rng, 12), task, is_sums=True)
    answer = tagged(problem.thought, problem.reply)
    if kind == 'rest':
        sums, _ = halve(problem.row['nums'], problem.row['target'])
        if rng.random() < 0.5:                   # whether it is halved is to be learnt, too
            sums = sums.partition('/2=')[0]
        return Text(problem.question, answer, task, given=f'<reasoning>\n{sums}')
    if done < PEOPLE_FROM or rng.random() < WORKED_SHARE:
        return Text(problem.question, answer, task)
    return Text(f'{problem.asker}: {problem.question}', by_people(problem, rng), task)


def trace(rng):
    """A row like s1K's: a problem that no task asks, thought through and right in the end.

    As in s1K some answers stand in a box, and some thoughts go wrong, notice it and go on right:
    24+99=133
    Wait, 24+99=123+50=173
    """
    a, b, c = rng.randint(2, 100), rng.randint(1, 80), rng.randint(1, 80)
    question, thought, reply = rng.choice([
        (f'Which is larger, {a} or {a + b}?', f'{a + b}-{a}={b}', str(a + b)),
        (f'Double {a} and add {b}.', work_out(a, [('+', a), ('+', b)]),
         f'\\boxed{{{2 * a + b}}}'),
        (f'Add {a}, {b} and {c}.', work_out(a, [('+', b), ('+', c)]),
         f'\\boxed{{{a + b + c}}}'),
        (f'Go on: {a}, {a + b}, {a + 2 * b}', f'{a + b}-{a}={b}\n{a + 2 * b}+{b}={a + 3 * b}',
         str(a + 3 * b))])
    if rng.random() < WAIT_SHARE:
        first, result = re.match(r'(.*?=)([0-9]+)', thought).groups()
        wrong = int(result) + rng.choice((-10, -2, -1, 1, 2, 10))
        thought = f'{first}{max(0, wrong)}\nWait, {thought}'
    return dict(question=f'{rng.choice(ASKERS)}: {question}', thinking_trajectories=[thought],
                attempt=reply)


# ---- noise: what of a text the base does not see ----

def draw_base_masks(answers, ends, blocks, equals_id, generator):
    """answers (B, L), each of ends (B,) tokens, and its block length (B,) -> masked (B, L) bool.

    Even rows have SFT's noise with t ~ U(0.3, 1). Odd rows look as they do to the sampler, which
    fills blocks from left to right: of a random block some tokens are masked, and all of later
    ones. The results of sums tend to be the last, for the model is least sure of them. In a
    quarter of these rows the first token is given, as by --prefill, and blocks begin behind it.
    """
    B, L = answers.shape
    masked, _ = draw_masks(answers, generator, t_min=0.3)
    size = blocks[:, None]                                       # (B, 1)
    prefilled = (torch.rand((B, 1), generator=generator) < 0.25).long()      # tokens: 0 or 1
    block = (torch.arange(L) - prefilled).div(size, rounding_mode='floor')   # (B, L), from -1 on
    last = (ends[:, None] - prefilled) // size                                 # (B, 1)
    current = (torch.rand((B, 1), generator=generator) * (last + 1)).long()
    inside = block == current                                                # (B, L)
    results = F.pad(answers == equals_id, (1, -1))               # what comes after =
    late = torch.rand((B, L), generator=generator) + 0.7 * results           # mostly, not always
    late = late.masked_fill(~inside, -1)
    place = late.argsort(dim=1, descending=True).argsort(dim=1)  # 0: the last to be committed
    left = 1 + (torch.rand((B, 1), generator=generator) * size).long()       # 1 to size
    as_sampled = (inside & (place < left)) | (block > current)
    masked[1::2] = as_sampled[1::2]
    return masked


def sums_masks(answers, equals_id, newline_id, generator):
    """Of sums only the last results of lines are learnt: masked, scored (B, L) bool.

    Results before them are in sight, for the next sum begins with them. Half of the rows end for
    the model at a result, as everything does for the sampler: what comes later is masked and not
    scored.
    """
    after_equals = F.pad(answers == equals_id, (1, -1))
    results = after_equals & F.pad(answers == newline_id, (-1, 1))
    lot = torch.rand(answers.shape, generator=generator)
    place = lot.where(results, 0).argmax(dim=1, keepdim=True)
    ends_there = torch.rand((len(answers), 1), generator=generator) < 0.5
    later = ends_there & (torch.arange(answers.size(1)) > place)
    return results | later, results & ~later


def hide_replies(answers, masked, close_id):
    """masked (B, L), and all from the closing tag on wherever a token of the reasoning is masked.

    Otherwise the last step would be learnt by copying it from the reply. close_id: the tag's.
    """
    is_reply = (answers == close_id).cumsum(dim=1) > 0
    hidden_step = (masked & ~is_reply).any(dim=1, keepdim=True)              # (B, 1)
    return masked | (is_reply & hidden_step)


# ---- pretraining ----

def new_model(seed, tokenizer, layers):
    """A LLaDA; its weights are normal, smaller at the end of residual branches (GPT-2).

    Three layers have 0.84 M weights, four 1.05 M.
    """
    config = Config(mask_id=tokenizer.mask_token_id, eos_id=tokenizer.eos_token_id,
                    embedding_size=len(tokenizer), n_layers=layers)
    model = LLaDA(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02
            if '.attn_out' in name or '.ff_out' in name:         # of blocks, not the head
                std /= math.sqrt(2 * config.n_layers)
            p.data.normal_(0, std, generator=generator)
    number_waves(model, tokenizer)
    return model


def number_waves(model, tokenizer, scale=0.3):
    """Starts the numbers on circles of many periods, at the input and the output.

    Neighbours are alike and adding is turning, so that arithmetic is learnt in fewer updates.
    scale: of the entries; other weights begin at 0.02.
    """
    num_periods = model.config.d_model // 2
    periods = torch.logspace(math.log10(4), math.log10(1000), num_periods)   # 4 to 1000
    for n in range(MAX_NUMBER + 1):
        angle = 2 * math.pi * n / periods
        wave = scale * torch.cat((angle.cos(), angle.sin()))     # (d_model,)
        i = tokenizer.convert_tokens_to_ids(str(n))
        for table in (model.wte, model.ff_out):
            table.weight.data[i] = wave


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, so that it moves all directions equally far.

    It is torch's own Muon but for float32: torch's takes bfloat16, which is more than half of all
    time on a CPU that has no fast arithmetic for it.
    """

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.3):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for p in group['params']:
            if not self.state[p]:
                self.state[p]['mean'] = torch.zeros_like(p)
            mean = self.state[p]['mean'].lerp_(p.grad, 1 - group['momentum'])
            direction = orthogonal(p.grad.lerp(mean, group['momentum']))     # Nesterov's
            p.mul_(1 - group['lr'] * group['weight_decay'])
            p.sub_(group['lr'] * max(1, p.size(0) / p.size(1)) ** 0.5 * direction)


def orthogonal(matrix):
    """The matrix with singular values near 1: five steps of Muon's Newton-Schulz iteration."""
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


def make_optimizers(model):
    """Muon for the matrices inside, AdamW for embedding, head and norms."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if 'blocks' in name and p.dim() == 2:
            matrices.append(p)
        else:
            others.append(p)
    return [Muon(matrices, MUON_RATE),
            torch.optim.AdamW(others, ADAMW_RATE, (0.9, 0.95), weight_decay=0.0)]


def make_batch(tokenizer, seed, step, cycle, done):
    """Prompts (B lists of ids), answers, masked, scored (B, L), weights (B, 1), by prompt length.

    answers: with ends after the text; masked, scored bool. done: the share of the cycle before.
    """
    halves = random_stream(seed, 'length', step).choice((2, 2, 2, 2, 2, 2, 3, 4))
    length = ANSWER_LENGTH * halves // 2         # at times up to twice the tasks', as evaluated
    texts = [corpus_text(seed, step, i, cycle, done) for i in range(BATCH)]
    texts.sort(key=lambda text: len(text.prompt))                # for update
    prompts = [chat(tokenizer, text.prompt) for text in texts]
    answers = [tokenizer(text.answer)['input_ids'][:length] for text in texts]     # sums are cut
    ends = torch.tensor([len(answer) for answer in answers])
    given = torch.tensor([[len(tokenizer(text.given)['input_ids'])] for text in texts])  # (B, 1)
    blocks = torch.tensor([8 if text.task == 'sudoku' else cycle.block for text in texts])
    is_sums = torch.tensor([[text.is_sums] for text in texts])               # (B, 1)
    answers = right_pad(answers, length, tokenizer.eos_token_id, 'cpu')
    equals, close = tokenizer.convert_tokens_to_ids(['=', '\n</reasoning>\n'])
    [newline] = tokenizer('\n')['input_ids']
    generator = torch_stream('cpu', seed, 'base', step)
    masked = draw_base_masks(answers, ends, blocks, equals, generator)
    masked = hide_replies(answers, masked & (torch.arange(length) >= given), close)
    sums_masked, sums_scored = sums_masks(answers, equals, newline, generator)
    weights = torch.where(is_sums, SUMS_WEIGHT, 1.0)
    return (prompts, answers, sums_masked.where(is_sums, masked),
            sums_scored.where(is_sums, masked), weights)


def update(model, optimizers, batch):
    """One step on the cross-entropy of the scored tokens, weighed by their text; its loss."""
    prompts, answers, masked, scored, weights = batch
    total = 0.0
    half = len(answers) // 2
    for part in (slice(0, half), slice(half, None)):             # less padding of short prompts
        logps = answer_logps(model, prompts[part], answers[part], masked[part])
        # masked_loss divides by its third argument
        loss = masked_loss(logps, scored[part], 1 / weights[part], answers.numel())
        loss.backward()
        total += loss.item()
    clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def making(args):
    """The flags that decide what base is made."""
    return dict(seed=args.seed, updates=args.updates, layers=args.layers, base=args.base)


def read_checkpoint(args):
    """The folder's checkpoint, or None; ValueError where other flags have made it."""
    path = Path(args.out, 'checkpoint.pt')
    if not path.exists():
        return None
    saved = torch.load(path, weights_only=True)
    if saved['flags'] != making(args):
        said = ' '.join(f'--{name} {value}' for name, value in saved['flags'].items())
        raise ValueError(f'{path} is of {said}: give these, or another --out')
    return saved


def pretrain(args):
    """The base and its tokenizer, from the folder's checkpoint on if there is one."""
    tokenizer = make_tokenizer()
    updates = args.updates
    if args.base:                                # the third cycle
        model, _ = load(args.base)
        start, stop = updates, round(updates * CYCLES[2].until)
    else:
        model = new_model(args.seed, tokenizer, args.layers)
        start, stop = 0, updates
    optimizers = make_optimizers(model)
    saved = read_checkpoint(args)
    if saved:
        start = saved['step']
        model.load_state_dict(saved['model'])
        for optimizer, state in zip(optimizers, saved['optimizers']):
            optimizer.load_state_dict(state)
    progress = tqdm(range(start, stop), 'pretraining', initial=start, total=stop)
    for step in progress:
        begin = 0                                # the first step of its cycle
        for cycle in CYCLES:
            end = round(updates * cycle.until)
            if step < end:
                break
            begin = end
        place, length = step - begin, end - begin
        if place == 0:
            optimizers = make_optimizers(model)
        warm_up = min(1, 20 * (place + 1) / length)              # over the first 5 %
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = optimizer.defaults['lr'] * cycle.rate * warm_up * (1 - place / length)
        batch = make_batch(tokenizer, args.seed, step, cycle, done=place / length)
        loss = update(model, optimizers, batch)
        progress.set_postfix(loss=f'{loss:.4f}')
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stop:
            states = [optimizer.state_dict() for optimizer in optimizers]
            new = Path(args.out, 'checkpoint.new')   # a kill while it is written leaves the old one
            torch.save(dict(flags=making(args), step=step + 1, model=model.state_dict(),
                            optimizers=states), new)
            new.replace(Path(args.out, 'checkpoint.pt'))
    return model, tokenizer


# ---- files ----

def training_problems(task, seed):
    """TRAINING_ROWS different ones, whoever asks, or as many as ten times as many draws give."""
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
    traces = [trace(random_stream('sft', i)) for i in range(TRACES)]
    write_rows(Path(folder, 'sft.jsonl'), traces)


def write_model(args):
    """Pretrains and writes model/, which appears only when it is whole."""
    model, tokenizer = pretrain(args)
    new = Path(args.out, 'model.new')
    model.to(torch.bfloat16).save_pretrained(new)                # half the size
    tokenizer.save_pretrained(new)
    config = Path(new, 'config.json')
    keys = json.loads(config.read_text()) | dict(nano=True)      # train.py has its own defaults
    config.write_text(json.dumps(keys, indent=2))
    new.replace(Path(args.out, 'model'))
    Path(args.out, 'checkpoint.pt').unlink(missing_ok=True)      # --updates 0 has none


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seed', type=int, default=0, help='of the base and the training rows [0]')
    p.add_argument('--out', default='out/nano', help='the folder that is made [out/nano]')
    p.add_argument('--updates', type=int, default=14400, help='of the base [14400]')
    p.add_argument('--layers', type=int, default=3, help='of the base; shipped is one of three [3]')
    p.add_argument('--base', default='', help='the model folder of a finished base, which is '
                   'trained for half as many updates more')
    p.add_argument('--problems_only', action='store_true', help='write rows, train nothing')
    args = p.parse_args(argv)
    if Path(args.out, 'model').exists() and not args.problems_only:
        raise ValueError(f'{args.out} holds a model: give another --out, or --problems_only')
    if not args.problems_only:
        # another seed's is refused first
        read_checkpoint(args)
    write_problems(args.out, args.seed)
    if not args.problems_only:
        write_model(args)


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f'make.py: {e}')
