"""The five tasks: problems, prompt, rows of real data, reward and verifier of each in one place.

Rewards are those of d1 (arXiv 2504.12216, section 4 and appendix). An example is a dict with
'question', 'answer' (the ground truth) and, for built-in problems, 'solution' (worked out), 'reply'
(the right answer as text) and 'wrong' (a guess). A completion is whatever the model wrote: no
function here raises on it or hangs, and no program in it runs in this process.
    python rewards.py gsm8k FILE.json ...    scores saved generations, ours or the official ones
"""
import ast
import builtins
import csv
import functools
import gzip
import inspect
import json
import operator
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import permutations
from typing import Callable, NamedTuple

END = re.compile(r'<\|eot_id\|>|<\|endoftext\|>')    # a completion is over at the first of these
TAGS = ('<reasoning>', '</reasoning>', '<answer>', '</answer>')
FORM = ('Work it out step by step first and give the answer after that, in this form:\n'
        '<reasoning>\nyour steps\n</reasoning>\n<answer>\nyour answer\n</answer>\nThe answer is ')
MAX_ANSWER = 1000    # characters; a longer one (code aside) is never right


class Task(NamedTuple):
    """All that the rest of the program knows of a task."""
    instructions: str        # one paragraph in front of the question
    grade: Callable          # (completion, example) -> (reward, correct)
    from_row: Callable       # a row of a data set -> an example; None: leave it out
    datasets: tuple          # (train, test): lists of (hub id, config, split)
    draw: Callable           # rng -> (key, example), a built-in problem; see make
    constant_answer: str     # what answers without reading the question

    def reward(self, completion, example):
        return self.grade(completion, example)[0]

    def correct(self, completion, example):
        """True or False; for sudoku the share of cells, solved if 1.0."""
        return self.grade(completion, example)[1]


# ---- reading a completion: no pattern that could backtrack, so time is linear in the text ----

def tagged(thought, reply):
    reasoning = f'<reasoning>\n{thought}\n</reasoning>\n' if thought else ''
    return f'{reasoning}<answer>\n{reply}\n</answer>'


def visible(completion):
    """The part of a decoded completion before its first end token."""
    return END.split(completion, maxsplit=1)[0]


def between_tags(text):
    """What the last closed <answer> holds, or None."""
    before, closed, _ = text.rpartition('</answer>')
    _, opened, inside = before.rpartition('<answer>')
    return inside if opened and closed else None


def last_box(text):
    r"""What the last \boxed{} holds, braces balanced; None if there is none or it is empty."""
    _, found, rest = text.rpartition('\\boxed{')
    depth = 1
    for i, c in enumerate(rest if found else ''):
        depth += (c == '{') - (c == '}')
        if depth == 0:
            return rest[:i].strip() or None


def boxed_answer(text):
    r"""What the \boxed{} in the answer tags holds, or without such tags the last one, or None."""
    inside = between_tags(text)
    return last_box(text if inside is None else inside)


def final_answer(text):
    """The answer, '' if there is none: the box, or without a box all that the tags hold."""
    answer = boxed_answer(text) or (between_tags(text) or '').strip()
    return answer if len(answer) <= MAX_ANSWER else ''


DIGITS = r'(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)'         # 1200 or 1,200; ASCII only
NUMBER = re.compile(rf'-?(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)')
NOISE = r'\left \right \! \, \; \: \( \) \$ $ \% % ^{\circ} ^\circ °'.split()
SYNONYMS = [('\\ ', ' '), ('{,}', ','), ('−', '-'), ('\\dfrac', '\\frac'), ('\\tfrac', '\\frac'),
            ('\\mbox', '\\text'), ('\\textbf', '\\text'), ('\\mathrm', '\\text')]


def plain_latex(latex):
    """The text without signs that change how an answer looks but not what it says."""
    for sign in NOISE:
        latex = latex.replace(sign, '')
    for old, new in SYNONYMS:
        latex = latex.replace(old, new)
    return latex.strip()


def number(text):
    """The first number in a short text as a float, or None: '$1,200 a day' is 1200.0."""
    found = NUMBER.search(plain_latex(text))
    return float(found[0].replace(',', '')) if found else None


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


# ---- gsm8k: word problems ----

def draw_gsm8k(rng):
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
    wrong = rng.choice([first + sum(changes), first, *changes, first + changes[0]])
    example = dict(question=question, answer=float(value), reply=str(value),
                   wrong=str(wrong), solution=work_out(first, steps))
    return f'gsm8k {first} {steps}', example


def gsm8k_row(row):
    """GSM8K: question, answer (worked text, then #### 18); its <<3*6=18>> are the steps."""
    question = column(row, 'question')
    work, marker, final = column(row, 'answer').rpartition('####')
    if not marker or number(final) is None:
        raise ValueError("column 'answer' does not end in #### and a number")
    steps = re.findall('<<([^<>]*)>>', work)
    numbers = re.findall(DIGITS, question) or ['0']
    return dict(question=question, answer=number(final),
                solution='\n'.join(steps) or work.strip(), reply=final.strip(),
                wrong=numbers[-1])


def tag_count(text):
    """0.125 per tag that occurs once, less 0.001 per character after </answer>; never below 0."""
    tail = text.rpartition('</answer>')[2] if '</answer>' in text else ''
    once = sum(text.count(tag) == 1 for tag in TAGS)
    return max(0.0, 0.125 * once - 0.001 * len(tail.removeprefix('\n')))


def soft_format(text):
    """0.5 if the text begins with the reasoning and the answer follows, on any number of lines."""
    for tag in TAGS:
        before, found, text = text.partition(tag)
        between_parts = not tag.startswith('</')     # there only blanks may stand
        if not found or (between_parts and before.strip()):
            return 0.0
    return 0.5


def strict_format(text):
    """0.5 if each tag stands once, on a line of its own, with nothing around the two parts."""
    text = text.removesuffix('\n')
    once = all(text.count(tag) == 1 for tag in TAGS)
    good = (once and text.startswith('<reasoning>\n')
            and '\n</reasoning>\n<answer>\n' in text and text.endswith('\n</answer>'))
    return 0.5 * good


def integer_answer(text):
    """0.5 if the answer is a whole number and nothing else; thousands may have commas."""
    return 0.5 * bool(re.fullmatch(f'-?{DIGITS}', final_answer(text)))


def grade_gsm8k(completion, example):
    """0 to 4: tags 0.5, soft format 0.5, strict format 0.5, whole number 0.5, right answer 2.

    Right: the first number of the answer equals the truth (as in the official evaluation).
    """
    text = visible(completion)
    found = number(final_answer(text))
    correct = found is not None and found == example['answer']   # two official truths are None
    form = tag_count(text) + soft_format(text) + strict_format(text)
    return form + integer_answer(text) + 2.0 * correct, correct


GSM8K = Task(f'Solve this word problem. {FORM}one number in digits, without unit or words.',
             grade_gsm8k, gsm8k_row, ([('openai/gsm8k', 'main', 'train')],
                                      [('openai/gsm8k', 'main', 'test')]), draw_gsm8k, '12')


# ---- math: equations, or MATH ----

def draw_math(rng):
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
    wrong = rng.choice([value, *changes, value + sum(changes), x + 1])
    example = dict(question=f'Solve {left} = {value}', answer=str(x),
                   solution=work_out(value, undo), reply=f'\\boxed{{{x}}}',
                   wrong=f'\\boxed{{{wrong}}}')
    return f'math {left.replace(name, "x")} {value}', example


def math_row(row):
    r"""MATH: problem, solution with the answer in \boxed{}; an answer column is used if there."""
    solution = column(row, 'solution')
    answer = row.get('answer') or last_box(solution)
    bare = re.findall(r'\\boxed ([^\s$]+)', solution)            # a few rows have \boxed 2
    if bare and not answer:
        answer = bare[-1]
    if not isinstance(answer, str):
        raise ValueError("column 'solution' has no \\boxed{answer}")
    return dict(question=column(row, 'problem'), answer=answer, solution=solution)


def latex_key(latex):
    r"""One spelling for the ways to write a short answer: \frac12, \tfrac{1}{2}, x = 1/2, 0.50.

    As with the MATH data set's own checker, an unreduced fraction or a decimal other than 0.5 is
    another answer.
    """
    key = re.sub(r'(?<=\S)\s*\\text\{[^{}]*\}(\^\{?[0-9]\}?)?$', '', plain_latex(latex))    # a unit
    key = re.sub(r'\\text\{([^{}]*)\}', r'\1', key)                          # a word is the answer
    key = re.sub(r'\s', '', key)
    key = re.sub(r'^[a-zA-Z]=', '', key).removesuffix('.')                   # x = 5.
    key = re.sub(r'\\sqrt(\w)', r'\\sqrt{\1}', key)
    key = re.sub(r'\\frac(?:\{([^{}]*)\}|(\w))(?:\{([^{}]*)\}|(\w))', r'\\frac{\1\2}{\3\4}', key)
    key = re.sub(r'([0-9]+)/([0-9]+)', r'\\frac{\1}{\2}', key)
    if NUMBER.fullmatch(key):
        amount = Fraction(key.replace(',', ''))      # 1,200 is 1200, 36.00 is 36, .5 is 0.5
        return '\\frac{1}{2}' if amount == 0.5 else str(amount)
    return key


def grade_math(completion, example):
    """0.25 to 3: right 2; form 1, 0.75, 0.5 or 0.25 for tags with box, tags, box, neither.

    The truth is LaTeX, compared spelling aside; without a box nothing is right (official).
    """
    text = visible(completion)
    tags = between_tags(text) is not None
    box = boxed_answer(text) is not None
    correct = box and latex_key(final_answer(text)) == latex_key(example['answer'])
    return 2.0 * correct + 0.25 + 0.5 * tags + 0.25 * box, correct


MATH = Task(f'Solve this problem. {FORM}one LaTeX expression inside \\boxed{{}}.', grade_math,
            math_row, ([('ankner/math-500', None, 'train')], [('ankner/math-500', None, 'test')]),
            draw_math, '\\boxed{6}')


# ---- countdown: reach a target with three numbers ----

def draw_countdown(rng):
    numbers = rng.sample(range(1, 11), 3)
    a, b, c = numbers
    total = a + b + c
    signed = [(1, 1, 1), (1, 1, -1), (1, -1, 1)]
    signs = rng.choice(signed)
    target = sum(s * n for s, n in zip(signs, numbers))
    if target < 1:
        signs, target = (1, 1, 1), total
    minus = (total - target) // 2                    # the number to subtract, or 0
    example = dict(
        question=f'Numbers: {numbers}\nTarget: {target}', answer=[numbers, target],
        solution=f'{a}+{b}={a + b}+{c}={total}-{target}={total - target}/2={minus}',
        reply=signed_sum(numbers, signs), wrong=signed_sum(numbers, rng.choice(signed)))
    return f'countdown {sorted(numbers)} {target}', example


def signed_sum(numbers, signs):
    return ''.join(f'{s * n:+}' for n, s in zip(numbers, signs)).removeprefix('+')


def countdown_row(row):
    """Countdown: nums, target (hub) or input '30,100,93', output '23' (d1's); three numbers."""
    names = ('input', 'output') if 'input' in row else ('nums', 'target')
    given = [str(column(row, name, object)) for name in names]
    text = ' to '.join(given)
    if not re.fullmatch(r'\[?[0-9]+(, ?[0-9]+)*\]? to [0-9]+', text):
        raise ValueError(f'{text[:60]!r} is no list of whole numbers and a target')
    *numbers, target = map(int, re.findall('[0-9]+', text))
    if len(numbers) != 3:                            # the paper trains and tests on three
        return None
    return dict(question=f'Numbers: {numbers}\nTarget: {target}', answer=[numbers, target])


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}
SIGNS = [('\\times', '*'), ('\\cdot', '*'), ('\\div', '/'), ('×', '*'), ('÷', '/'), ('−', '-')]
EQUATION = re.compile('[-+*/() 0-9]{0,200}')  # short: small numbers, nesting a parser can take


def value_of(node):
    """The exact value of a syntax tree of + - * / and numbers; KeyError on anything else."""
    match node:
        case ast.Constant(number):
            return Fraction(number)
        case ast.UnaryOp(ast.USub(), operand):
            return -value_of(operand)
        case ast.BinOp(left, op, right):
            apply = OPERATIONS[type(op)]             # no ** and //
            return apply(value_of(left), value_of(right))
    raise KeyError(node)                             # a call, a tuple, ...


def grade_countdown(completion, example):
    """1 if the equation has each number once and hits the target, 0.1 if just the numbers."""
    equation = final_answer(visible(completion)).partition('=')[0].strip()
    for old, new in SIGNS:
        equation = equation.replace(old, new)
    if not EQUATION.fullmatch(equation):
        return 0.0, False
    numbers, target = example['answer']
    used = [int(digits) for digits in re.findall('[0-9]+', equation)]
    try:
        value = value_of(ast.parse(equation, mode='eval').body)
    except Exception:        # no equation, or a division by zero
        return 0.0, False
    if sorted(used) != sorted(numbers):
        return 0.0, False
    correct = value == target
    return 1.0 if correct else 0.1, correct


COUNTDOWN = Task(
    'Reach the target from the numbers with + - * / and parentheses, taking every number exactly '
    f'once. {FORM}only the expression, such as (5 - 2) * 7.', grade_countdown, countdown_row,
    ([('Jiayi-Pan/Countdown-Tasks-3to4', None, 'train')], []), draw_countdown, '1+2+3')


# ---- sudoku: 4 x 4 ----

@functools.cache
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
        for digit in '1234':                         # the guess looks at the row, and counts up
            if digit not in row:
                row = row.replace('0', digit, 1)
        guess += row
    example = dict(question=f'Solve the puzzle {puzzle}', answer=solution,
                   solution='\n'.join(rows), reply=solution, wrong=guess)
    return solution, example                         # tests share no grid with training


def sudoku_row(row):
    """Sudoku: Puzzle, Solution; 16 digits row by row, 0 = empty; integers lack leading zeros."""
    puzzle = str(column(row, 'Puzzle', object)).zfill(16)
    solution = str(column(row, 'Solution', object))
    well_formed = re.fullmatch('[1-4]{16}', solution) and len(puzzle) == 16
    if not well_formed or '0' not in puzzle:
        raise ValueError(f'{puzzle[:40]!r} and {solution[:40]!r} are no 4x4 puzzle and solution')
    if any(given not in ('0', cell) for given, cell in zip(puzzle, solution)):
        raise ValueError(f'the solution {solution} does not fit the puzzle {puzzle}')
    return dict(question=f'Puzzle: {puzzle}', answer=solution)


PUZZLE = re.compile('(?<![0-9])(?=[1-4]*0)[0-4]{16}(?![0-9])')   # 0 = empty


def grade_sudoku(completion, example):
    """The share of empty cells filled right; 16 digits are read, missing ones are wrong."""
    puzzle = PUZZLE.search(example['question'])[0]
    digits = re.findall('[0-9]', final_answer(visible(completion)))
    filled = ''.join(digits[:16]).ljust(16, '0')
    empty = [i for i in range(16) if puzzle[i] == '0']
    right = sum(filled[i] == example['answer'][i] for i in empty)
    cells = right / len(empty)
    return cells, cells


SUDOKU = Task(
    'Fill this 4x4 Sudoku, given row by row with 0 for an empty cell, so that each row, column and '
    f'2x2 box has 1, 2, 3 and 4. {FORM}the full grid, row by row, as 16 digits.', grade_sudoku,
    sudoku_row, ([], []), draw_sudoku, 16 * '1')


# ---- code: write a function that passes tests ----

def draw_code(rng):
    a = rng.randint(1, 5)                            # f(x) = a x + b
    b = rng.randint(0, 30)
    p = rng.randint(0, 1)                            # f(p) and f(q) tell what a and b are
    q = p + 1
    x = rng.choice([x for x in range(10) if x not in (p, q)])
    values = [a * i + b for i in range(10)]
    places = rng.choice([(p, q, x), (x, p, q)])
    tests = [f'assert f({i})=={values[i]}' for i in places]
    down = f'-{a}={b}' if p else ''                  # from f(1) to f(0) = b
    example = dict(
        question='\n'.join(tests),
        answer=dict(tests=tests, entry_point='f', setup=''),
        solution=f'{values[q]}-{values[p]}={a}\n{values[p]}{down}',
        reply=f'def f(x): return {a}*x+{b}',
        wrong=f'def f(x): return {rng.randint(1, 5)}*x+{rng.randint(0, 30)}')
    return f'code {a} {b}', example


def code_row(row):
    """Code: prompt, test, entry_point (HumanEval); text, test_list (MBPP); question, test."""
    setup, name = '', None
    if 'entry_point' in row:
        question, name = column(row, 'prompt'), column(row, 'entry_point')
        setup = question.partition(f'def {name}(')[0]
        tests = [f"{column(row, 'test')}\ncheck({name})"]
    elif 'test_list' in row:
        tests = column(row, 'test_list', list)
        imports = row.get('test_imports') or []
        setup = '\n'.join([row.get('test_setup_code') or '', *imports])
        text = column(row, 'text' if 'text' in row else 'prompt')    # sanitized MBPP has prompt
        defined = re.findall(r'^def (\w+)\(', row.get('code') or '', re.M)
        name = defined[-1] if defined else None      # tells a function `sum` from Python's own
        question = '\n'.join([text, 'It has to pass:', *tests])
    else:                                            # KodCode
        name, tests = pytest_functions(column(row, 'test'))
        question = column(row, 'question') + (f'\nName it {name}.' if name else '')
    if not tests:
        return None
    return dict(question=question, answer=dict(tests=tests, entry_point=name, setup=setup))


def pytest_functions(source):
    """A KodCode test file -> (tested name, tests); no tests if it needs more of pytest."""
    name, others, cases = '', '', []
    for node in ast.parse(source).body:
        text = ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module == 'solution':
            name = name or node.names[0].name
        elif isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
            if node.args.args:                       # a fixture
                return None, []
            cases.append(f'{text}\n{node.name}()')
        elif text != 'import pytest':
            others += text + '\n'
    if not name or 'pytest.' in source:
        return None, []
    return None if name == '*' else name, [others + case for case in cases]


def code_of(completion):
    """The program: what the answer tags hold, else the last fenced block, else ''."""
    text = visible(completion)
    inside = between_tags(text)
    text = text if inside is None else inside
    _, fence, block = text.rstrip().removesuffix('```').rpartition('```')
    if fence:
        return re.sub(r'\A[a-z0-9]*[ \r]*\n', '', block)
    return inside or ''


def grade_code(completion, example):
    """0 to 1.5: the share of unit tests passed, and 0.5 for reasoning and answer in their tags."""
    code = code_of(completion)
    passed = 0.0
    if code.strip():
        passed = run_tests(code, **example['answer'])
    return passed + soft_format(visible(completion)), passed == 1.0


CODE = Task(f'Write this Python function. {FORM}the whole function with the imports it needs, and '
            'no other text.', grade_code, code_row,
            ([('KodCode/KodCode-Light-RL-10K', None, 'train')],
             [('openai/openai_humaneval', None, 'test'),
              ('google-research-datasets/mbpp', None, 'test')]), draw_code, 'def f(x): return x')


# ---- all tasks ----

TASKS = dict(gsm8k=GSM8K, math=MATH, countdown=COUNTDOWN, sudoku=SUDOKU, code=CODE)


ASKERS = 'Ann Ben Carl Dan Eve Finn'.split()     # who answers them how: sft.py


def make(task_name, rng, part):
    """A built-in problem of 'train' or 'test', which share none: 'Ann: Solve x + 3 = 7'."""
    while True:
        key, example = TASKS[task_name].draw(rng)
        own = 'test' if zlib.crc32(key.encode()) % 4 == 0 else 'train'
        if own == part and example['reply'] != example['wrong']:
            asker = rng.choice(ASKERS)
            return example | dict(asker=asker, question=f"{asker}: {example['question']}")


def prompt(task_name, example, instructions=''):
    """The text of the one user message for an example, the same in training and evaluation."""
    return f"{instructions or TASKS[task_name].instructions}\n\n{example['question']}"


def grade_all(task_name, completions, examples):
    """[(reward, correct)] of each completion for its example; in a pool, for code runs apart."""
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))       # torchrun's, on this machine
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // processes)) as pool:
        return list(pool.map(TASKS[task_name].grade, completions, examples))


# ---- files and hub data sets ----

def column(row, name, kind=str):
    """row[name], which must be of the given type."""
    if name not in row:
        raise KeyError(f'no column {name!r} (there are {", ".join(map(str, row))})')
    value = row[name]
    if not isinstance(value, kind):
        raise ValueError(f'column {name!r} holds {str(value)[:40]!r}, not {kind.__name__}')
    if kind is str:
        value.encode()                               # a lone surrogate: no tokenizer takes it
    return value


def read_rows(source, config=None, split=None):
    """The rows (dicts) of a .jsonl, .json or .csv file (.gz too), or of a hub data set's split."""
    if split:
        from datasets import load_dataset
        try:
            return load_dataset(source, config, split=split)
        except Exception as e:                       # datasets has many kinds; one line will do
            line = str(e).strip().partition('\n')[0]
            raise ValueError(f'{source} was not loaded ({line}): check the network, or give a '
                             'local file') from None
    where = ''
    try:
        opener = gzip.open if source.endswith('.gz') else open
        with opener(source, 'rt', encoding='utf-8-sig') as file:
            name = source.removesuffix('.gz')
            if name.endswith('.csv'):
                return list(csv.DictReader(file))
            if name.endswith('.json'):
                rows = json.load(file)
                if isinstance(rows, dict):           # saved generations, as the official code has
                    rows = rows['generations']
                return [dict(row) for row in rows]               # raises on what is no object
            rows = []
            for i, line in enumerate(file, 1):
                where = f'line {i}: '
                if line.strip():
                    rows.append(dict(json.loads(line)))
            return rows
    except Exception as e:                           # each reader has kinds of its own
        raise ValueError(f'{source} is no .jsonl, .json or .csv file of rows '
                         f'({where}{e})') from None


def load_rows(sources, from_row):
    """from_row of every row of some (file or hub id, config, split).

    A row that it refuses is dropped and counted; ValueError if a column is missing or none is left.
    """
    found, dropped, total = [], [], 0
    for source in sources:
        rows = read_rows(*source)
        total += len(rows)
        for i, row in enumerate(rows, 1):
            try:
                example = from_row(row)
            except KeyError as e:
                raise ValueError(f'{source[0]}, row {i}: {e.args[0]}; expected '
                                 f'{from_row.__doc__}') from None
            except (ValueError, SyntaxError, TypeError) as e:
                dropped.append(f'{source[0]}, row {i}: {e}')
                continue
            if example is not None:
                found.append(example)
    if not found:
        reason = dropped[0] if dropped else f'{sources[0][0]}: no rows to use'
        raise ValueError(f'{reason}; expected {from_row.__doc__}')
    if dropped:
        print(f'{len(dropped)} of {total} rows dropped (first: {dropped[0]})', file=sys.stderr)
    return found


def load_examples(task_name, source='', split='train'):
    """A list of examples from a file, from one hub data set (id, config, split) or the task's own.

    Raises ValueError, in one line, when there are none.
    """
    task = TASKS[task_name]
    train, test = task.datasets
    sources = train if split == 'train' else test
    if source:
        sources = [source if isinstance(source, tuple) else (source,)]
    if not sources:
        flag = '--data' if split == 'train' else '--eval_data'
        raise ValueError(f'{task_name} has no {split} data on the hub: give a file by {flag} '
                         f'({task.from_row.__doc__})')
    return load_rows(sources, task.from_row)


# ---- scoring ----

def wilson(k, n):
    """(low, high), Wilson's 95 % interval for the share k of n; (0, 1) if n = 0."""
    if n == 0:
        return 0.0, 1.0
    z2 = 1.96 ** 2
    centre = (k + z2 / 2) / (n + z2)
    half = (z2 * (k * (n - k) / n + z2 / 4)) ** 0.5 / (n + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(items):
    """Accuracy with its interval, mean reward and mean effective tokens of graded items."""
    n = len(items)
    right = sum(item['correct'] == 1.0 for item in items)
    low, high = wilson(right, n)
    def mean(name):
        return sum(item[name] for item in items) / n
    return dict(accuracy=right / n, low=low, high=high, n=n,
                share=mean('correct'),               # of cells, for sudoku
                reward=mean('reward'), effective_tokens=mean('effective_tokens'))


def score(task_name, paths):
    """Prints accuracy with its interval, mean reward and mean length of saved generations.

    paths: files of the official JSON layout, which is also ours.
    """
    items = []
    for path in paths:
        for i, item in enumerate(read_rows(path), 1):
            try:
                text, answer = item['generations'], item['ground_truth']
                if task_name == 'gsm8k' and isinstance(answer, str):
                    answer = float(answer.replace(',', ''))
                reward, correct = TASKS[task_name].grade(text, {**item, 'answer': answer})
                words = len(visible(text).split())
                tokens = float(item.get('effective_tokens', words))
            except (LookupError, TypeError, ValueError, AttributeError) as e:
                raise ValueError(f'{path}, item {i} is none of {task_name}\'s ({e!r})') from None
            items.append(dict(reward=reward, correct=correct, effective_tokens=tokens))
    if not items:
        raise ValueError(f'{" ".join(paths)}: no generations of the task {task_name}')
    s = summary(items)
    name = f"cells {s['share']:.1%}, solved" if task_name == 'sudoku' else 'accuracy'
    right = round(s['accuracy'] * s['n'])
    print(f"{task_name}: {name} {s['accuracy']:.1%} ({right} of n = {s['n']}), 95 % interval "
          f"{s['low']:.1%} to {s['high']:.1%}")
    print(f"mean reward {s['reward']:.3f}, mean length {s['effective_tokens']:.1f} tokens (words, "
          'where a file has no effective_tokens)')


# ---- running model-written code ----
# Tests and completion never share a memory. A fresh interpreter runs the functions below that are
# listed in CHILD. It reads the completion and forks; the fork locks itself in and runs the
# completion; only after the fork does the first process read the tests. Only plain data crosses
# between the two, and the verdicts go over a pipe that the completion's process never had. This is
# no sandbox for a determined attacker: use a container. On Linux x86-64 the kernel (seccomp) stands
# behind the audit hook; elsewhere the hook and the resource limits stand alone.

MAX_CODE = 100_000           # characters; a longer completion scores 0 unread
COMPILED_HERE = 6_000        # characters; to compile more may take seconds: only in the child


def run_tests(code, tests, entry_point=None, setup='', timeout=2.0):
    """The share of `tests` (trusted sources) that the untrusted source `code` passes, 0 to 1.

    Answers within about timeout + 0.5 seconds and never raises; safe to call from many threads.
    `setup` is trusted source that runs before the tests and, in its own process, before the
    completion. A completion that writes, spawns, exits or breaks the protocol gets 0; one that runs
    out of time keeps the tests it had passed. Only functions of plain data can be tested: arguments
    and results are copies, None to dict.
    """
    if not tests or len(code) > MAX_CODE or not may_compile(code):
        return 0.0
    # the second line, the tests, is read only after the completion's process has been forked off
    message = (json.dumps([f'{setup}\n{code}', time.monotonic() + timeout]) + '\n'
               + json.dumps([tests, setup, entry_point]))
    # not -I, which would ignore PYTHONHASHSEED: the order of sets must not change from run to run
    command = [sys.executable, '-S', '-B', '-W', 'ignore', '-c', CHILD_PROGRAM]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, subprocess.Popen(
            command, cwd=folder, env={'PYTHONHASHSEED': '0', 'HOME': '/'}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as child:
        try:
            verdicts = child.communicate(message.encode(), timeout + 0.3)[0]
        except subprocess.TimeoutExpired:
            verdicts = b'!'
        finally:
            if child.returncode != 0:                # it did not get to kill the completion itself
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except OSError:                      # none is left
                    pass
    return 0.0 if b'!' in verdicts else verdicts.count(b'1') / len(tests)


def may_compile(code):
    """False for what is certainly no program: most of that needs no process."""
    head = code[:COMPILED_HERE]
    if 'finally' in head:    # the compiler's time doubles with each finally inside another
        return True
    warnings.filterwarnings('ignore', module='<completion>')
    try:
        compile(head, '<completion>', 'exec', dont_inherit=True)
    except Exception as e:   # SyntaxError, ValueError (NUL), MemoryError and RecursionError, ...
        was_cut = head != code                       # then the rest may mend it, but for nesting
        return was_cut and 'too many' not in str(e)
    return True


def to_plain(x):
    """A value as JSON; what JSON lacks is {"name of the type": parts}."""
    if x is None or isinstance(x, (int, float, str)):
        return x
    if isinstance(x, list):
        return [to_plain(y) for y in x]
    if isinstance(x, bytes):
        return {'bytes': x.hex()}
    if isinstance(x, complex):
        return {'complex': repr(x)}
    if isinstance(x, dict):
        return {'dict': [to_plain(pair) for pair in x.items()]}
    for kind in (tuple, set, frozenset):             # subclasses arrive as their base
        if isinstance(x, kind):
            return {kind.__name__: [to_plain(y) for y in x]}
    raise TypeError(f'{type(x).__name__} is not plain data')


def from_plain(parts):
    """The value of an object with one key; anything that to_plain does not write raises."""
    [(kind, value)] = parts.items()
    make = dict(tuple=tuple, set=set, frozenset=frozenset, dict=dict, complex=complex,
                bytes=bytes.fromhex)
    return make[kind](value)


def pack(*values):
    return json.dumps(to_plain(list(values))).encode() + b'\n'


def receive(file):
    return json.loads(file.readline(1 << 24), object_hook=from_plain)    # cut at 16 MB: no JSON


def lock_kernel():
    """seccomp, on Linux x86-64: the kernel lets this process compute and read, or kills it."""
    if sys.platform != 'linux' or os.uname().machine != 'x86_64':
        return
    import ctypes
    import struct
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06       # linux/filter.h
    kill, allow, no_such_call = 0x80000000, 0x7FFF0000, 0x50026

    def rule(code, k, yes=0, no=0):                  # yes, no: how many rules to skip
        return struct.pack('HBBI', code, yes, no, k)
    # load reads seccomp_data: 0 = the call, 4 = the machine, 16 + 8 i = argument i
    program = [rule(load, 4),                        # the machine: 64-bit calls only
               rule(equal, 0xC000003E, 1),
               rule(end, kill),
               rule(load, 0),                        # the call's number; from 332 on: no such call
               rule(at_least, 332, 0, 1),
               rule(end, no_such_call)]
    for call in (16, 72, 157, 291):                  # ioctl fcntl prctl epoll_create1
        program += [rule(equal, call, 0, 1), rule(end, no_such_call)]
    # read write close .. brk sigreturn pread access yield mremap madvise nanosleep getpid exit
    # uname getcwd readlink times getuid .. getppid gettid futex getdents clocks exit_group stat
    allowed = '''0 1 3 4 5 6 7 8 9 10 11 12 15 17 21 23 24 25 28 35 39 60 63 79 89 96 97 98 99
        100 102 104 107 108 110 186 201 202 204 217 228 229 230 231 262 267 269 270 318'''
    for call in map(int, allowed.split()):
        program += [rule(equal, call, 0, 1), rule(end, allow)]
    for call, flags in ((257, 32), (2, 24)):         # openat and open, but never to write or create
        program += [rule(equal, call, 0, 4),
                    rule(load, flags),
                    rule(any_bit, 0o1103, 1),
                    rule(end, allow),
                    rule(end, kill)]
    program = b''.join([*program, rule(end, kill)])
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack('HQ', len(program) // 8, ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None).prctl
    prctl(38, 1, 0, 0, 0)                            # PR_SET_NO_NEW_PRIVS
    prctl(22, 2, header)                             # PR_SET_SECCOMP; a refusal is not insisted on


def add_audit_hook(die=os._exit, kind=type, text=str, integer=int):
    """Ends the process at any event that a pure function has no need of.

    What the hook uses are closure variables: the completion can patch builtins.
    """
    fine = frozenset('''compile exec marshal.loads code.__new__ function.__new__ object.__getattr__
        object.__setattr__ object.__delattr__ sys._getframe sys._getframemodulename
        sys.unraisablehook builtins.id array.__new__ time.sleep pickle.find_class os.listdir
        os.scandir os.putenv os.unsetenv builtins.input builtins.input/result'''.split())
    banned = frozenset('''ctypes _ctypes _posixsubprocess _interpreters _xxsubinterpreters
        _testcapi'''.split())
    library = tuple(folder + '/' for folder in sys.path if folder)           # '' would be all files
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, args):   # exact types only: a method of the completion's would run in here
        if event in fine:
            return
        name = args[0] if args else None
        is_text = kind(name) is text
        if event == 'import' and is_text and name.rpartition('.')[2] not in banned:
            return
        if event == 'open' and is_text and name.startswith(library) and '/..' not in name:
            if kind(args[2]) is integer and not args[2] & writing:
                return
        die(1)               # at once, so that catching the exception is no use
    sys.addaudithook(hook)


def run_untrusted(code, seconds, calls, replies):
    """The completion's process: locks itself in, runs the code, then answers calls."""
    import resource
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)    # should the others die, this one ends too
    limits = dict(AS=512 << 20, CPU=int(seconds) + 2, NOFILE=32,     # bytes, seconds, files
                  FSIZE=0, CORE=0, NPROC=0)
    for name, most in limits.items():
        try:
            resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (most, most))
        except (AttributeError, ValueError, OSError):
            pass                                     # not on this system
    random.seed(0)
    try:
        lock_kernel()
    except (ImportError, OSError, AttributeError):
        pass                                         # an interpreter without ctypes
    for name in list(sys.modules):                   # to import it again is an event: see the hook
        if 'ctypes' in name:
            del sys.modules[name]
    sys.modules['readline'] = None                   # it handles signals and files, unseen
    sys.modules['solution'] = module = type(sys)('solution')
    names = vars(module)
    names[''] = lambda nonce: nonce                  # called last: has it answered unasked?
    add_audit_hook()
    exec(compile(code, '<completion>', 'exec'), names)
    while True:
        name, args, kwargs = receive(calls)
        try:
            if name not in names:
                raise NameError(name)
            reply = pack('', names[name](*args, **kwargs))
        except Exception as e:
            kinds = type(e).__mro__                  # an own exception arrives as its base
            known = [kind.__name__ for kind in kinds if kind.__module__ == 'builtins']
            reply = pack(known[0], str(e))
        os.write(replies, reply)


def child_main():
    """The fresh interpreter: forks off the completion, then runs the tests against it.

    Two pipes join them: one for calls of the completion's functions, one for their replies.
    """
    source = open(os.dup(0), 'rb', buffering=0)      # reads nothing ahead: the tests come second
    verdicts = os.dup(1)
    for fd in (0, 1):
        os.dup2(2, fd)                               # 2 is /dev/null
    code, deadline = receive(source)
    sys.set_int_max_str_digits(0)
    seconds = max(deadline - time.monotonic(), 1e-3)
    calls_out, calls_in = os.pipe()
    replies_out, replies_in = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for fd in (source.fileno(), verdicts, calls_in, replies_out):
                os.close(fd)
            run_untrusted(code, seconds, open(calls_out, 'rb'), replies_in)
        finally:
            os._exit(1)
    os.close(calls_out)
    os.close(replies_in)
    run_trusted(child, seconds, source, calls_in, open(replies_out, 'rb'), verdicts)


def run_trusted(child, seconds, source, calls, replies, verdicts):
    """The tests' process: reads them from source, and writes 1 per test passed, ! for a breach."""
    def finish(*_):          # all done, or the alarm: tests without their turn count as failed
        signal.setitimer(signal.ITIMER_REAL, 0)      # no alarm in the middle of this
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(0)

    def call(name, /, *args, **kwargs):
        message = pack(name, args, kwargs)
        try:
            os.write(calls, message)
            error, value = receive(replies)
        except BaseException:    # it ended, was killed or wrote garbage: no test counts
            os.write(verdicts, b'!')
            finish()
        if error == '':
            return value
        kind = getattr(builtins, error, RuntimeError)
        raise kind.__new__(kind, value)              # some kinds take more to __init__

    class Names(dict):       # a name that nothing else defines is a function of the completion
        def __missing__(self, name):
            if name.startswith('__') or hasattr(builtins, name):
                raise KeyError(name)
            return functools.partial(call, name)

    signal.signal(signal.SIGALRM, finish)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        tests, setup, entry_point = json.loads(source.read())
        random.seed(0)
        names = Names(__name__='__main__', __builtins__=builtins)
        exec(setup, names)
        if entry_point:
            names[entry_point] = functools.partial(call, entry_point)
        for test in tests:
            try:
                exec(test, Names(names))
                os.write(verdicts, b'1')
            except BaseException:
                pass
        nonce = os.urandom(8)
        assert call('', nonce) == nonce
    except BaseException:
        os.write(verdicts, b'!')
    finally:
        finish()


CHILD = (to_plain, from_plain, pack, receive, lock_kernel, add_audit_hook, run_untrusted,
         run_trusted, child_main)
# The same as a program, so that the child imports nothing of ours. Made when this file is read: an
# edit of it must not reach a run that goes on.
CHILD_PROGRAM = '\n'.join(['import builtins, functools, json, os, random, signal, sys, time',
                           *map(inspect.getsource, CHILD), 'child_main()'])


if __name__ == '__main__':
    try:
        if len(sys.argv) < 3 or sys.argv[1] not in TASKS:
            raise ValueError(f'usage: python rewards.py {"|".join(TASKS)} FILE.json ...')
        score(sys.argv[1], sys.argv[2:])
    except (ValueError, OSError) as e:
        sys.exit(f'rewards.py: {e}')
