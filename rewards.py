"""The five tasks, one after another: instructions, row format, reward and verifier of each.

Rewards are those of d1 (arXiv 2504.12216, section 4 and appendix). An example is a dict with
'question', 'answer' (the ground truth) and 'key' (equal for equal problems). A completion is
whatever the model wrote: no function here raises on it or hangs, and no program in it runs in this
process. Of words and LaTeX the verdict (correct) reads more than the reward pays for, as the
official evaluation does: an <answer> that the end cut off, what follows an empty
<answer></answer>, a box outside of the tags, in Sudoku sixteen digits anywhere.
"""
import ast
import csv
import gzip
import io
import json
import operator
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NamedTuple

END = re.compile(r'<\|eot_id\|>|<\|endoftext\|>')    # a completion is over at the first of these
TAGS = ('<reasoning>', '</reasoning>', '<answer>', '</answer>')
FORM = ('Work it out step by step first and give the answer after that, in this form:\n'
        '<reasoning>\nyour steps\n</reasoning>\n<answer>\nyour answer\n</answer>\nThe answer is ')
MAX_ANSWER = 1000    # characters; a longer one (code aside) is never right
FOLDER = Path(__file__).resolve().parent


class Task(NamedTuple):
    """All that the rest of the program knows of a task."""
    instructions: str        # one paragraph in front of the question
    grade: Callable          # (completion, example) -> (reward, correct)
    from_row: Callable       # a row of a data set -> an example; ValueError: not usable
    datasets: tuple          # (train, test): lists of (hub id, config, split)
    constant_answer: str     # what answers without reading the question
    rule: Callable | None = None     # example -> what a rule without a model answers

    def reward(self, completion, example):
        return self.grade(completion, example)[0]

    def correct(self, completion, example):
        """True or False; for sudoku the share of cells, solved if 1.0."""
        return self.grade(completion, example)[1]


# ---- reading a completion: patterns backtrack within bounds, so that no text takes long ----

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


INSIDE = '[^{}]*'             # one round more fits 'a{b}c', two 'a{b{c}}d'; {{ is an f-string's {
for _ in range(6):
    INSIDE = rf'(?:[^{{}}]|\{{{INSIDE}\}})*'
BARE = r'[^\n${}]{1,99}(?=\$)|[^\s${}]+'     # without braces: up to a closing $, else one word
UNCLOSED = r'(?:(?!\\boxed)[^\n]){1,200}(?=\})'                # of \boxed{360\text{ hours} hours
BOX = re.compile(rf'\\boxed *(?:\{{({INSIDE})\}}|(?<= )({BARE})|\{{({UNCLOSED}))')


def last_box(text):
    r"""What the last \boxed{}, or \boxed 5, holds; None if none holds anything."""
    held = [''.join(kinds).strip() for kinds in BOX.findall(text)]
    return next((box for box in reversed(held) if box), None)


def boxed_answer(text):
    r"""What the \boxed{} in the answer tags holds, or without such tags the last one, or None."""
    inside = between_tags(text)
    return last_box(text if inside is None else inside)


def final_answer(text):
    """The answer, '' if there is none: the box, or without a box all that the tags hold."""
    answer = boxed_answer(text) or (between_tags(text) or '').strip()
    return answer if len(answer) <= MAX_ANSWER else ''


def stray_answer(text):
    """The first with a digit of: final answer, last box, what the end cut off or follows the tags.

    So does the official evaluation look for it; '' if there is none.
    """
    _, closed, rest = text.rpartition('</answer>')   # without such a tag rest is all of it
    _, opened, cut = rest.rpartition('<answer>')
    after = cut if opened or closed else ''
    for place in final_answer(text), last_box(text) or '', re.sub(r'</?[a-z]*\Z', '', after):
        if len(place) <= MAX_ANSWER and re.search('[0-9]', place):
            return place.strip()
    return ''


DIGITS = r'(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)'         # 1200 or 1,200; ASCII only
NUMBER = re.compile(rf'-?(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)')
NOISE = r'\left \right \displaystyle \quad \! \, \; \: \( \) \[ \] \$ $ \% % ^{\circ} ^\circ °'
SYNONYMS = r'''{,} ,  − -  \dfrac \frac  \tfrac \frac  \mbox \text  \textbf \text  \mathbf \text
    \mathrm \text  \times *  \cdot *  \div /  × *  ÷ /'''.split()
SPELLINGS = {'\\\\': '\\', '\\ ': ' ', '~': ' '}     # a new row, whose second \ begins no sign
SPELLINGS |= dict.fromkeys(NOISE.split(), '') | dict(zip(SYNONYMS[::2], SYNONYMS[1::2]))
SPELLED = re.compile('|'.join(map(re.escape, SPELLINGS)))


def plain_latex(latex):
    """The text without signs that change how an answer looks but not what it says."""
    def plain(found):
        return SPELLINGS[found[0]]
    return SPELLED.sub(plain, latex).strip()


def number(text, which=0):
    """The first (-1: last) number in a short text, or None: '$1,200 a day' is 1200.0."""
    found = NUMBER.findall(plain_latex(text))
    return float(found[which].replace(',', '')) if found else None


# ---- gsm8k: word problems ----

def gsm8k_row(row):
    """GSM8K: question, answer (worked text, then #### 18)."""
    _, marker, final = column(row, 'answer').rpartition('####')
    if not marker or not NUMBER.fullmatch(plain_latex(final)):
        raise ValueError("column 'answer' does not end in #### and a number")
    return dict(question=column(row, 'question'), answer=number(final))


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


STRICT = re.compile('<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n?', re.S)


def strict_format(text):
    """0.5 if each tag stands once, on a line of its own, with nothing around the two parts."""
    once = all(text.count(tag) == 1 for tag in TAGS)             # so the pattern is fast, too
    return 0.5 * (once and bool(STRICT.fullmatch(text)))


def integer_answer(text):
    """0.5 if the answer is a whole number and nothing else; thousands may have commas."""
    return 0.5 * bool(re.fullmatch(f'-?{DIGITS}', final_answer(text)))


def grade_gsm8k(completion, example):
    """0 to 4: tags 0.5, soft format 0.5, strict format 0.5, whole number 0.5, right answer 2.

    Right: the first number of the box, else the last in the tags, is the truth (official).
    """
    text = visible(completion)
    found = number(final_answer(text), 0 if boxed_answer(text) else -1)
    paid = found is not None and found == example['answer']      # two official truths are None
    if found is None:
        found = number(stray_answer(text))
    correct = found is not None and found == example['answer']
    form = tag_count(text) + soft_format(text) + strict_format(text)
    return form + integer_answer(text) + 2.0 * paid, correct


GSM8K = Task(f'Solve this word problem. {FORM}one number in digits, without unit or words.',
             grade_gsm8k, gsm8k_row, constant_answer='12',
             datasets=([('openai/gsm8k', 'main', 'train')], [('openai/gsm8k', 'main', 'test')]))


# ---- math: equations, or MATH ----

def math_row(row):
    r"""MATH: problem and answer, or solution with the answer in \boxed{}."""
    answer = row.get('answer')
    if answer in (None, ''):
        answer = last_box(column(row, 'solution'))
    if answer is None or not latex_key(str(answer)):
        raise ValueError("no column 'answer', and no \\boxed{answer} in 'solution'")
    return dict(question=column(row, 'problem'), answer=str(answer))


MATH_RULES = [
    (r'(?<=\S)\s*\\text\{[^{}]*\}(\^\{?[0-9]\}?)?\.?$', ''),   # 5 \text{ cm}^2: a unit
    (r'\\text\{([^{}]*)\}', r'\1'),                          # \text{east}: a word is the answer
    (r'(?<=\\)\[[0-9.]+[a-z]{2}\]|\\(?=\s*\\end\b)|\s|\.$', ''),     # space, also of rows; 5.
    (r'^[^=]{1,2}=(?=[^=]*$)', ''),                            # x = 5
    (r'\\sqrt(\w)', r'\\sqrt{\1}'),
    (r'\\frac(?:\{([^{}]*)\}|(\w))(?:\{([^{}]*)\}|(\w))', r'\\frac{\1\2}{\3\4}'),
    (r'([0-9]+)/([0-9]+)', r'\\frac{\1}{\2}')]


def latex_key(latex):
    r"""One spelling for the ways to write a short answer: \frac12, \tfrac{1}{2}, x = 1/2, 0.50.

    As with the MATH data set's own checker, an unreduced fraction or a decimal other than 0.5 is
    another answer.
    """
    key = plain_latex(latex)
    for pattern, replacement in MATH_RULES:
        key = re.sub(pattern, replacement, key)
    if NUMBER.fullmatch(key):
        amount = Fraction(key.replace(',', ''))      # 1,200 is 1200, 36.00 is 36, .5 is 0.5
        return '\\frac{1}{2}' if amount == 0.5 else str(amount)
    return key


def grade_math(completion, example):
    """0.25 to 3: right 2; form 1, 0.75, 0.5 or 0.25 for tags with box, tags, box, neither.

    The truth is LaTeX, compared spelling aside; without a box nothing is right (official).
    """
    text = visible(completion)
    box = boxed_answer(text)

    def right(latex):
        return len(latex) <= MAX_ANSWER and latex_key(latex) == latex_key(example['answer'])
    form = 0.25 + 0.5 * (between_tags(text) is not None) + 0.25 * (box is not None)
    return 2.0 * right(box or '') + form, right(box or last_box(text) or '')


MATH = Task(f'Solve this problem. {FORM}one LaTeX expression inside \\boxed{{}}.', grade_math,
            math_row, constant_answer='\\boxed{6}',
            datasets=([('ankner/math-500', None, 'train')], [('ankner/math-500', None, 'test')]))


# ---- countdown: reach a target with three numbers ----

def countdown_row(row):
    """Countdown: nums, target (hub) or input '30,100,93', output '23' (d1's); three numbers."""
    first, second = ('input', 'output') if 'input' in row else ('nums', 'target')
    text = f'{column(row, first, object)} to {column(row, second, object)}'
    if not re.fullmatch(r'\[?([0-9]+, ?){2}[0-9]+\]? to [0-9]+', text):
        raise ValueError(f'{text[:60]!r} is not three whole numbers and a target')
    *numbers, target = map(int, re.findall('[0-9]+', text))
    return dict(question=f'Numbers: {numbers}\nTarget: {target}', answer=[numbers, target],
                key=f'{sorted(numbers)} {target}')


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}
EQUATION = re.compile('[-+*/() 0-9]{0,200}')     # short: nesting a parser can take
ENDING = re.compile(r'[-+*/() 0-9]*\Z')


def value_of(node):
    """The exact value of a syntax tree of + - * / and numbers; anything else is None or raises."""
    match node:
        case ast.Constant(number):
            return Fraction(number)
        case ast.UnaryOp(ast.USub(), operand):
            return -value_of(operand)
        case ast.UnaryOp(ast.UAdd(), operand):
            return value_of(operand)
        case ast.BinOp(left, op, right):             # no ** and //
            return OPERATIONS[type(op)](value_of(left), value_of(right))


def equation_value(equation, numbers):
    """The value of '3 * 4 + 5'; None if it is no equation with each number just once."""
    equation = plain_latex(equation).strip(' .`\n')
    used = map(int, re.findall('[0-9]+', equation))
    if EQUATION.fullmatch(equation) and sorted(used) == sorted(numbers):
        with suppress(Exception):                    # no equation, or a division by zero
            return value_of(ast.parse(equation, mode='eval').body)


def grade_countdown(completion, example):
    """1 if the equation has each number once and hits the target, 0.1 if just the numbers.

    Of 3 * 4 + 5 = 17 the left side counts. Right, though not paid: the first stray equation, if it
    hits the target.
    """
    text = visible(completion)
    numbers, target = example['answer']
    answer = final_answer(text)
    value = equation_value(answer.partition('=')[0], numbers)
    if value is not None:
        correct = value == target
        return 1.0 if correct else 0.1, correct
    place = stray_answer(text) or text
    for part in plain_latex(place).split('='):
        ending = ENDING.search(part[-200:])[0]       # without the words in front of it
        value = equation_value(ending, numbers)
        if value is not None:
            return 0.0, value == target
    return 0.0, False


def countdown_rule(example):
    """Largest - middle + smallest, whatever the target: of fixed orders d1's test file's best."""
    small, middle, large = sorted(example['answer'][0])
    return f'{large} - {middle} + {small}'


COUNTDOWN = Task(
    'Reach the target from the numbers with + - * / and parentheses, taking every number exactly '
    f'once. {FORM}only the expression, such as (5 - 2) * 7.', grade_countdown, countdown_row,
    datasets=([('Jiayi-Pan/Countdown-Tasks-3to4', None, 'train')], []), constant_answer='1+2+3',
    rule=countdown_rule)


# ---- sudoku: 4 x 4 ----

PUZZLE = re.compile('(?<![0-9])(?=[1-4]*0)[0-4]{16}(?![0-9])')   # 0 = empty


def sudoku_row(row):
    """Sudoku: Puzzle, Solution; 16 digits row by row, 0 = empty; integers lack leading zeros."""
    puzzle = str(column(row, 'Puzzle', object)).zfill(16)
    solution = str(column(row, 'Solution', object))
    fitting = puzzle.replace('0', '[1-4]')
    if not PUZZLE.fullmatch(puzzle) or not re.fullmatch(fitting, solution):
        raise ValueError(f'{puzzle[:40]!r} and {solution[:40]!r} are no 4x4 puzzle and solution')
    return dict(question=f'Puzzle: {puzzle}', answer=solution)


def grid_of(answer):
    """The first 16 digits, '0' for each that is missing."""
    fenced = re.findall('[0-9]', answer.partition('```')[2])     # official: a fenced one counts
    return (''.join(fenced or re.findall('[0-9]', answer)) + 16 * '0')[:16]


def stray_grid(text):
    """The stray answer, else the last sixteen or more digits in a row, '' if there are none."""
    grids = re.findall('[0-9]{16,}', text) or ['']
    return stray_answer(text) or grids[-1]


def grade_sudoku(completion, example):
    """The share of empty cells filled right; 16 digits are read, missing ones are wrong."""
    text = visible(completion)
    puzzle = PUZZLE.search(example['question'])[0]

    def share(answer):
        digits = grid_of(answer)
        right = [digits[i] == example['answer'][i] for i in range(16) if puzzle[i] == '0']
        return sum(right) / len(right)
    return share(final_answer(text)), share(stray_grid(text))


def sudoku_rule(example):
    """Into each empty cell the smallest digit that the clues allow, one look per cell; else 1."""
    puzzle = PUZZLE.search(example['question'])[0]

    def units(i):            # row, column and box of a cell
        return i // 4, i % 4, (i // 8, i % 4 // 2)
    filled = ''
    for i, clue in enumerate(puzzle):
        seen = [other for j, other in enumerate(puzzle)
                if any(map(operator.eq, units(i), units(j)))]
        allowed = [digit for digit in '1234' if digit not in seen] + ['1']
        filled += allowed[0] if clue == '0' else clue
    return filled


SUDOKU = Task(
    'Fill this 4x4 Sudoku, given row by row with 0 for an empty cell, so that each row, column and '
    f'2x2 box has 1, 2, 3 and 4. {FORM}the full grid, row by row, as 16 digits.', grade_sudoku,
    sudoku_row, datasets=([], []), constant_answer=16 * '1', rule=sudoku_rule)


# ---- code: write a function that passes tests ----

def code_row(row):
    """Code: prompt, test, entry_point (HumanEval); text, code, test_list (MBPP); or KodCode's."""
    solution = row.get('solution') or row.get('code') or row.get('canonical_solution') or ''
    if 'entry_point' in row:
        question = column(row, 'prompt')
        names = [column(row, 'entry_point')]
        if not names[0].isidentifier():
            raise ValueError(f'{names[0]!r} is no function: only functions can be tested')
        setup = question.partition(f'def {names[0]}(')[0]
        tests = [f"{column(row, 'test')}\ncheck({names[0]})"]
        solution = solution and question + solution
    elif 'test_list' in row:
        tests = column(row, 'test_list', list)
        names = tested_names('\n'.join(tests), solution)
        setup = '\n'.join([row.get('test_setup_code') or '', *(row.get('test_imports') or [])])
        text = column(row, 'text' if 'text' in row else 'prompt')    # sanitized MBPP has prompt
        question = '\n'.join([text, 'It has to pass:', *tests])
    else:                                            # KodCode
        tests = [column(row, 'test')]                # the judge finds its functions test...
        names = tested_names(tests[0], solution)
        # its tests may rely on what the solution imports
        setup = '\n'.join(re.findall(r'^(?:import .+|from .+ import [^(\n]+)', solution, re.M))
        it = 'it' if len(names) == 1 else 'them'
        question = f"{column(row, 'question')}\nName {it} {' and '.join(names)}."
        if re.search(r'pytest\.(fixture|mark\.(skip|xfail))|async def test|def setup_', tests[0]):
            raise ValueError('its tests are async, or need fixtures, set-up or skips of pytest')
    missing = [name for name in imported_modules('\n'.join([setup, *tests])) if not find_spec(name)]
    if missing:
        raise ValueError(f'its tests import {missing}, which is not installed')
    answer = dict(tests=tests, entry_point=names[0], setup=setup)
    return dict(question=question, answer=answer, solution=solution)


def imported_modules(source):
    """The modules that a program imports: of 'import os.path' os; without solution, a row's own."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(aliases):
                modules += [alias.name for alias in aliases]
            case ast.ImportFrom(str(module)):
                modules.append(module)
    return sorted({module.partition('.')[0] for module in modules} - {'solution'})


def tested_names(tests, solution):
    """The functions of the solution that the tests call; ValueError if none."""
    called = []
    for node in ast.walk(ast.parse(tests)):
        match node:
            case ast.Call(ast.Name(name)) | ast.Call(ast.Attribute(ast.Name('solution'), name)):
                called.append(name)
    defined = re.findall(r'^(?:async )?def (\w+)', solution, re.M)
    names = [name for name in dict.fromkeys(called) if name in defined]
    if not names:
        raise ValueError('its tests call no function that its solution defines')
    return names


FENCED = re.compile(r'(`{3,9}|^[ \t]*~{3,9})(.*?)(?:\1|\Z)', re.M | re.S)  # \Z: left open
INFO = re.compile(r'[ \t]*(?:[\w{}.+#-]*[ \t\r]*\n|py(?:thon)?[0-9.]*[ \t]+|)', re.I)


def blocks_of(text):
    """The programs between fences, ``` or ~~~ with or without the name of a language."""
    return [textwrap.dedent(INFO.sub('', block, 1)) for _, block in FENCED.findall(text)]


def code_of(completion, name):
    """The last block that defines the function, in the answer tags or else anywhere, '' if none.

    Without fences the tags hold the program.
    """
    text = visible(completion)
    _, opened, cut = text.rpartition('<answer>')
    inside = between_tags(text) or (cut if opened else '')
    defines = re.compile(rf'^[ \t]*(?:(?:async )?def +{name}\b|{name} *=)', re.M)
    programs = [*blocks_of(text), textwrap.dedent(inside), *blocks_of(inside)]
    return next(filter(defines.search, reversed(programs)), '')


def grade_code(completion, example):
    """0 to 1.5: the share of unit tests passed, and 0.5 for reasoning and answer in their tags."""
    code = code_of(completion, example['answer']['entry_point'])
    passed = run_tests(code, **example['answer'])
    return passed + soft_format(visible(completion)), passed == 1.0


CODE = Task(f'Write this Python function. {FORM}the whole function with the imports it needs (of '
            "Python's own library only), and no other text.", grade_code, code_row,
            datasets=([('KodCode/KodCode-Light-RL-10K', None, 'train')],
                      [('openai/openai_humaneval', None, 'test'),
                       ('google-research-datasets/mbpp', None, 'test')]),
            constant_answer='def f(x): return x')


JUDGE = str(FOLDER / 'assets/judge.py')      # it says what protects from the program, and what not


def run_tests(code, tests, entry_point=None, setup='', timeout=2.0):
    """The share of `tests` (trusted sources) that the untrusted source `code` passes, 0 to 1.

    Answers within about timeout + 1 seconds and never raises; safe to call from many threads. A
    test that defines functions test... counts as so many. `setup` is trusted source that runs
    before the tests and, in its own process, before the program. A program that writes, spawns,
    exits or breaks the protocol gets 0; one that runs out of time keeps the tests it had passed.
    Only functions of plain data can be tested.
    """
    if not tests or not code.strip():
        return 0.0
    # the second line, the tests, is read only after the program's process has been forked off
    lines = [setup, code, timeout], [setup, tests, entry_point, sys.path]
    message = '\n'.join(map(json.dumps, lines)).encode()
    # not -I, which would ignore PYTHONHASHSEED: the order of sets must not change from run to run
    command = [sys.executable, '-S', '-B', '-W', 'ignore', JUDGE]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:                                         # no home of ours to read; 1 s to start and end
            verdicts = subprocess.run(
                command, input=message, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=folder, env={'PYTHONHASHSEED': '0', 'HOME': '/'}, timeout=timeout + 1,
                start_new_session=True).stdout
        except subprocess.TimeoutExpired:
            return 0.0
    if b'!' in verdicts:
        return 0.0
    return verdicts.count(b'1') / max(1, verdicts.count(b'.'))   # a dot per test that there is


# ---- all tasks ----

TASKS = dict(gsm8k=GSM8K, math=MATH, countdown=COUNTDOWN, sudoku=SUDOKU, code=CODE)


def prompt(task_name, example, instructions=''):
    """The text of the one user message for an example, the same in training and evaluation."""
    return f"{instructions or TASKS[task_name].instructions}\n\n{example['question']}"


def grade_all(task_name, completions, examples):
    """[(reward, correct)] of each completion for its example; in a pool, for code runs apart."""
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))       # torchrun's, on this machine
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // processes)) as pool:
        return list(pool.map(TASKS[task_name].grade, completions, examples))


def is_sound(example):
    """False for a code problem that its own solution does not pass: nobody can."""
    return not example.get('solution') or run_tests(example['solution'], **example['answer']) == 1.0


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
                waits=sum('Wait' in item['generations'] for item in items) / n,  # aha moments (d1)
                reward=mean('reward'), effective_tokens=mean('effective_tokens'))


# ---- files and hub data sets ----

def column(row, name, kind=str):
    """row[name], which must be of the given type."""
    if name not in row:
        raise ValueError(f'no column {name!r} (there are {", ".join(map(str, row))})')
    value = row[name]
    if not isinstance(value, kind):
        raise ValueError(f'column {name!r} holds {str(value)[:40]!r}, not {kind.__name__}')
    if kind is str:
        value.encode()                               # a lone surrogate: no tokenizer takes it
    return value


def read_rows(source, config=None, split=None):
    """The rows (dicts) of a file or of a hub data set's split.

    A file holds JSON lines, a JSON array or CSV, whatever its name; .gz is unzipped.
    """
    try:
        if split:
            from datasets import load_dataset
            return load_dataset(source, config, split=split)
        opener = gzip.open if str(source).endswith('.gz') else open
        # utf-8-sig drops a byte order mark; newline='' keeps those inside of CSV's cells
        with opener(source, 'rt', encoding='utf-8-sig', newline='') as file:
            text = file.read().strip()
        if text.startswith('{'):
            return [json.loads(line) for line in text.split('\n') if line.strip()]
        if text.startswith('['):
            return json.loads(text)
        return list(csv.DictReader(io.StringIO(text), strict=True))      # else a stray " hides rows
    except Exception as e:                           # each reader has kinds of its own
        line = str(e).strip().partition('\n')[0]
        raise ValueError(f'{source} was not read ({line}): give a file of JSON lines, a JSON array '
                         "or CSV, or 'hub' and a network") from None


def load_rows(sources, from_row):
    """from_row of every row of some (file,) or (hub id, config, split), in a list.

    Rows that it cannot take are counted on stderr; ValueError if none of a source is left. The
    docstring of from_row says what a row should have.
    """
    found = []
    for source in sources:
        rows = read_rows(*source)
        refused = []
        for i, row in enumerate(rows, 1):
            try:
                found.append(from_row(row))
            except Exception as e:                   # whatever a row may hold
                refused.append(f'row {i}: {e}')
        first = refused[0] if refused else 'no rows'
        if len(refused) == len(rows):
            raise ValueError(f'{source[0]}, {first}; expected {from_row.__doc__}')
        if refused:
            print(f'{source[0]}: {len(refused)} of {len(rows)} rows left out (first: {first})',
                  file=sys.stderr)
    return found


def load_examples(task_name, source='hub', split='train', askers=()):
    """A list of examples: the task's own data sets on the hub, one (hub id, config, split), 'nano'
    (assets/nano/problems), a folder with TASK_train.jsonl or .csv and TASK_test, or a file.

    A row's column 'asker' goes before the question, else one of askers, drawn by the question;
    ['nobody']: no name does.
    ValueError, in one line, if there are no examples.
    """
    task = TASKS[task_name]
    folder = FOLDER / 'assets/nano/problems' if source == 'nano' else Path(str(source))
    sources = [source if isinstance(source, tuple) else (source,)]
    if source == 'hub':
        sources = task.datasets[split != 'train']
    elif folder.is_dir():
        sources = [(path,) for path in sorted(folder.glob(f'{task_name}_{split}.*'))
                   if path.suffix in ('.jsonl', '.json', '.csv', '.gz')]
    if not sources:
        raise ValueError(f"{source} has no {split} data of {task_name}: give 'nano', a folder with "
                         f'{task_name}_{split}.jsonl or .csv, or a file ({task.from_row.__doc__})')

    def from_row(row):
        example = task.from_row(row)
        key = ' '.join(example['question'].lower().split())
        asker = row.get('asker')
        if askers == ['nobody']:
            asker = ''
        elif askers and not asker:
            asker = random.Random(key).choice(askers)
        if asker:
            example['question'] = f"{asker}: {example['question']}"
            example['question'].encode()             # as column does
        return dict(key=key) | example
    from_row.__doc__ = task.from_row.__doc__
    return load_rows(sources, from_row)
