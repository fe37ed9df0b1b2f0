"""The five tasks: prompt, data, reward and verifier (d1, arXiv 2504.12216: section 4 and the appendix on rewards).

A Task is plain strings and functions. An example is a dict with 'question', 'answer' (the ground truth) and sometimes
'solution' (a worked text). A completion is whatever the model wrote: no function here raises on it or hangs.

    python rewards.py gsm8k FILE.json ...    # scores saved generations: the official JSON layout or our samples.jsonl
"""
import ast
import gzip
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
from fractions import Fraction
from functools import cache, lru_cache
from itertools import permutations
from typing import Callable, NamedTuple

END = re.compile(r'<\|eot_id\|>|<\|endoftext\|>')  # a completion is over at the first of these
TAGS = ('<reasoning>', '</reasoning>', '<answer>', '</answer>')
MAX_ANSWER = 1000   # characters; longer answers (code aside) are never right, so the patterns below may be simple
MAX_EQUATION = 200  # characters; keeps numbers small and nesting far from what crashes a parser
CODE_FORMAT = 0.5   # what the tags alone earn in the code task, beside up to 1 for the tests


# --- reading a completion: no pattern that could backtrack, so time is linear in the text ---

def visible(completion):
    """Return the part of a decoded completion before its first end token."""
    return END.split(completion, maxsplit=1)[0]


def between_tags(text):
    """Return what the last closed <answer> holds, or None."""
    before, closed, _ = text.rpartition('</answer>')
    _, opened, inside = before.rpartition('<answer>')
    return inside if opened and closed else None


def last_box(text):
    r"""Return what the last \boxed{} holds, braces balanced; None if there is none, if it is empty or never closed."""
    _, found, rest = text.rpartition('\\boxed{')
    depth = 1
    for i, c in enumerate(rest if found else ''):
        depth += (c == '{') - (c == '}')
        if depth == 0:
            return rest[:i].strip() or None


def boxed_answer(text):
    r"""Return what the \boxed{} in the answer tags holds, or without such tags the last one; None if there is none."""
    tagged = between_tags(text)
    return last_box(text if tagged is None else tagged)


def final_answer(completion):
    """Return the answer, '' if there is none: the box, or without a box all that the answer tags hold."""
    text = visible(completion)
    answer = boxed_answer(text) or (between_tags(text) or '').strip()
    return answer if len(answer) <= MAX_ANSWER else ''


# --- gsm8k: five parts, each taking the visible text ---

DIGITS = r'(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)'  # 1200 or 1,200; ASCII only
NUMBER = re.compile(rf'-?(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)')
NOISE = r'\left \right \! \, \; \: \( \) \$ $ \% % ^{\circ} ^\circ °'.split()
SYNONYMS = [('\\ ', ' '), ('{,}', ','), ('−', '-'), ('\\dfrac', '\\frac'), ('\\tfrac', '\\frac'),
            ('\\mbox', '\\text'), ('\\textbf', '\\text'), ('\\mathrm', '\\text')]


def plain(latex):
    """Return the text without signs that change how an answer looks but not what it says."""
    for old, new in [(sign, '') for sign in NOISE] + SYNONYMS:
        latex = latex.replace(old, new)
    return latex.strip()


def number(text):
    """Return the first number in a short text as a float, or None: '$1,200 a day' is 1200.0."""
    found = NUMBER.search(plain(text))
    return float(found[0].replace(',', '')) if found else None


def tag_count(text):
    """0.125 for each of the four tags that occurs once, less 0.001 a character behind </answer>; never below 0."""
    tail = text.rpartition('</answer>')[2].removeprefix('\n') if '</answer>' in text else ''
    return max(0.0, 0.125 * sum(text.count(tag) == 1 for tag in TAGS) - 0.001 * len(tail))


def soft_format(text):
    """0.5 if the text begins with the reasoning and the answer follows, on any number of lines."""
    for tag in TAGS:  # each behind the one before; only blanks may come between parts
        before, found, text = text.partition(tag)
        if not found or (before.strip() and not tag.startswith('</')):
            return 0.0
    return 0.5


def strict_format(text):
    """0.5 if each tag stands once, on a line of its own, with nothing around the two parts but one last newline."""
    text = text.removesuffix('\n')
    return 0.5 * (all(text.count(tag) == 1 for tag in TAGS) and text.startswith('<reasoning>\n')
                  and '\n</reasoning>\n<answer>\n' in text and text.endswith('\n</answer>'))


def integer_answer(text):
    """0.5 if the answer is a whole number and nothing else; thousands may have commas."""
    return 0.5 * bool(re.fullmatch(f'-?{DIGITS}', final_answer(text)))


def gsm8k_correct(completion, example):
    """True if the first number of the answer equals the ground truth, a float (as in the official evaluation)."""
    found = number(final_answer(completion))
    return found is not None and found == example['answer']  # the truth may be None: the official files have two


def gsm8k_reward(completion, example):
    """0 to 4: tags 0.5, soft format 0.5, strict format 0.5, whole number 0.5, right answer 2 (paper, appendix)."""
    text = visible(completion)
    return (tag_count(text) + soft_format(text) + strict_format(text) + integer_answer(text)
            + 2.0 * gsm8k_correct(text, example))


# --- math ---

def latex_key(latex):
    r"""Return one spelling for the ways to write a short answer: \frac12, \tfrac{1}{2}, x = 1/2 and 0.50 agree.

    As with the MATH data set's own checker, an unreduced fraction or a decimal other than 0.5 is another answer.
    """
    key = re.sub(r'(?<=\S)\s*\\text\{[^{}]*\}(\^\{?[0-9]\}?)?$', '', plain(latex))  # a unit behind the value
    key = re.sub(r'\\text\{([^{}]*)\}', r'\1', key)                                 # a word is the answer
    key = re.sub(r'^[a-zA-Z]=', '', re.sub(r'\s', '', key)).removesuffix('.')
    key = re.sub(r'\\sqrt(\w)', r'\\sqrt{\1}', key)
    key = re.sub(r'\\frac(?:\{([^{}]*)\}|(\w))(?:\{([^{}]*)\}|(\w))', r'\\frac{\1\2}{\3\4}', key)
    key = re.sub(r'([0-9]+)/([0-9]+)', r'\\frac{\1}{\2}', key)
    if NUMBER.fullmatch(key):
        amount = Fraction(key.replace(',', ''))  # 1,200 is 1200, 36.00 is 36, .5 is 0.5
        return '\\frac{1}{2}' if amount == Fraction(1, 2) else str(amount)
    return key


def math_reward(completion, example):
    """0.25 to 3: right 2; format 1, 0.75, 0.5 or 0.25 for answer tags with box, tags, box, neither (official).

    The ground truth is LaTeX, compared spelling aside; without a box nothing is right (official).
    """
    text = visible(completion)
    tags, box = between_tags(text) is not None, boxed_answer(text) is not None
    right = box and latex_key(final_answer(text)) == latex_key(example['answer'])
    return 2.0 * right + 0.25 + 0.5 * tags + 0.25 * box


# --- countdown ---

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(node, used):
    """Return a syntax tree's exact value and add its integers to the list `used`; KeyError for any other operation."""
    if isinstance(node, ast.Constant):
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand, used)
    apply = OPERATIONS[type(getattr(node, 'op', node))]  # no ** and //, no calls
    return apply(value(node.left, used), value(node.right, used))


def countdown_reward(completion, example):
    """1 if the equation has each number once and hits the target, 0.1 if just the numbers are right, else 0."""
    equation = final_answer(completion).partition('=')[0].strip()
    for old, new in [('\\times', '*'), ('\\cdot', '*'), ('\\div', '/'), ('×', '*'), ('÷', '/'), ('−', '-')]:
        equation = equation.replace(old, new)
    if len(equation) > MAX_EQUATION or not set(equation) <= set('0123456789+-*/() '):
        return 0.0
    (numbers, target), used = example['answer'], []
    try:
        result = value(ast.parse(equation, mode='eval').body, used)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return 0.0 if sorted(used) != sorted(numbers) else 1.0 if result == target else 0.1


# --- sudoku ---

PUZZLE = re.compile('(?<![0-9])(?=[1-4]*0)[0-4]{16}(?![0-9])')  # 0 = empty


def sudoku_cells(completion, example):
    """Return the share of empty cells filled right, 0 to 1; 16 digits are read, missing ones are wrong (official)."""
    puzzle = PUZZLE.search(example['question'])[0]
    filled = ''.join(c for c in final_answer(completion) if c in '0123456789')[:16].ljust(16, '0')
    right = [filled[i] == example['answer'][i] for i in range(16) if puzzle[i] == '0']
    return sum(right) / len(right)


# --- code ---

def code_of(completion):
    """Return the program in a completion: what the answer tags hold, else the last fenced block, else ''."""
    text = visible(completion)
    tagged = between_tags(text)
    _, fence, block = (text if tagged is None else tagged).rstrip().removesuffix('```').rpartition('```')
    return re.sub(r'\A[a-z0-9]*[ \r]*\n', '', block) if fence else tagged or ''


def tests_passed(completion, example):
    """Return the share of an example's unit tests that a completion passes, 0 to 1; it may use the set-up code."""
    code, answer = code_of(completion), example['answer']
    if not code.strip():
        return 0.0
    return run_tests_once(f"{answer['setup']}\n{code}", tuple(answer['tests']), answer['entry_point'], answer['setup'])


def code_reward(completion, example):
    """0 to 1.5: the share of unit tests passed, and CODE_FORMAT for reasoning and answer in their tags."""
    return tests_passed(completion, example) + CODE_FORMAT * (soft_format(visible(completion)) > 0)


# --- running model-written code ---
# Tests and completion never share a memory. One fresh interpreter (CHILD) reads the completion and forks; the fork
# locks itself in and runs the completion; only after the fork does the first process read the tests. Only plain data
# crosses between the two, and the verdicts go over a pipe that the completion's process never had. This is no sandbox
# for a determined attacker: use a container. On Linux x86-64 the kernel (seccomp) stands behind the audit hook;
# elsewhere the hook and the resource limits stand alone.
MAX_CODE = 100_000      # characters; a longer completion scores 0 unread
COMPILED_HERE = 6_000   # characters; to compile more may take seconds, which only the child may spend

CHILD = r'''
import builtins, functools, json, os, resource, sys, time
from signal import ITIMER_REAL, SIGALRM, SIGKILL, setitimer, signal

# Values cross as a line of JSON. What JSON lacks is {"name of the type": parts}; subclasses arrive as their base.
MAKE = dict(tuple=tuple, set=set, frozenset=frozenset, dict=dict, bytes=bytes.fromhex,
            complex=lambda parts: complex(*parts), int=lambda digits: int(digits, 16))

def plain(x):
    if x is None or isinstance(x, (bool, float, str)): return x
    if isinstance(x, int): return x if x.bit_length() < 65 else {'int': f'{int(x):x}'}  # hex has no limit of digits
    if isinstance(x, list): return [plain(y) for y in x]
    if isinstance(x, bytes): return {'bytes': x.hex()}
    if isinstance(x, complex): return {'complex': [x.real, x.imag]}
    for kind in (tuple, set, frozenset, dict):
        if isinstance(x, kind): return {kind.__name__: plain(list(x.items() if kind is dict else x))}
    raise TypeError(f'{type(x).__name__} is not plain data')

def pack(*values): return json.dumps(plain(values), ensure_ascii=False).encode('utf-8', 'surrogatepass') + b'\n'

def made(parts):  # of an object with one key; anything that plain does not write raises
    [(kind, items)] = parts.items()
    return MAKE[kind](items)

def hear(file): return json.loads(file.readline(1 << 24), object_hook=made)  # a line that 16 MB cut short is no JSON

def seccomp():  # Linux on x86-64: the kernel lets this process compute and read files; all else kills it
    if not (sys.platform == 'linux' and os.uname().machine == 'x86_64' and sys.maxsize > 1 << 32): return
    import ctypes
    LOAD, EQUAL, FROM, ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of the filter, 8 bytes each
    KILL, ALLOW, ENOSYS = 0x80000000, 0x7FFF0000, 0x50026
    op = lambda code, k, yes=0, no=0: (code | yes << 16 | no << 24 | k << 32).to_bytes(8, 'little')
    rules = op(LOAD, 4) + op(EQUAL, 0xC000003E, 1) + op(RETURN, KILL) + op(LOAD, 0)  # 64-bit only; the call's number
    rules += op(FROM, 332, 0, 1) + op(RETURN, ENOSYS)  # younger calls have older ones that the C library falls back on
    for action, calls in ((ENOSYS, (16, 72, 157, 291)),  # ioctl fcntl prctl epoll
            (ALLOW, (0, 1, *range(3, 13), 15, 17, 21, 24, 25, 28, 39, 60, 63, 79, 89,  # read .. readlink
                     186, 23, 270, 35, 96, 201, 228, 229, 230, 97, 98, 99, 100, 102, 104, 107, 108, 110,  # clocks, getuid
                     202, 204, 217, 231, 262, 267, 269, 318))):  # futex, affinity, getdents, exit, fstatat .. getrandom
        for n in calls: rules += op(EQUAL, n, 0, 1) + op(RETURN, action)
    for n, flags in ((257, 32), (2, 24)):  # openat and open, but not with O_WRONLY, O_RDWR, O_CREAT or O_TRUNC
        rules += op(EQUAL, n, 0, 4) + op(LOAD, flags) + op(ANY, 0o1103, 1) + op(RETURN, ALLOW) + op(RETURN, KILL)
    rules, prctl = ctypes.create_string_buffer(rules + op(RETURN, KILL)), ctypes.CDLL(None).prctl
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP; a kernel that refuses is not insisted on
    prctl(22, 2, (len(rules) // 8).to_bytes(8, 'little') + ctypes.addressof(rules).to_bytes(8, 'little'))

def audit(die=os._exit, kind=type, text=str, number=int):  # closure variables: the completion can patch builtins
    fine = frozenset("""compile exec marshal.loads code.__new__ function.__new__ object.__getattr__ object.__setattr__
        object.__delattr__ sys._getframe sys._getframemodulename sys.unraisablehook builtins.id array.__new__ time.sleep
        pickle.find_class os.listdir os.scandir os.putenv os.unsetenv builtins.input builtins.input/result""".split())
    banned = frozenset('ctypes _ctypes _posixsubprocess _interpreters _xxsubinterpreters _testcapi'.split())
    library = tuple(folder + '/' for folder in sys.path)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    def hook(event, args):  # exact types only: a method of the completion's would run inside and could reach our frame
        if event in fine: return
        if event == 'import' and kind(args[0]) is text and args[0].rpartition('.')[2] not in banned: return
        if (event == 'open' and kind(args[0]) is text and args[0].startswith(library) and '/..' not in args[0]
                and kind(args[2]) is number and not args[2] & writing): return
        die(1)  # at once, so that catching the exception is no use
    sys.addaudithook(hook)

def untrusted(code, seconds, calls, replies):
    setitimer(ITIMER_REAL, seconds + 1)  # should all the others be killed, this process still ends
    for name, most in dict(AS=512 << 20, CPU=int(seconds) + 2, FSIZE=0, NOFILE=32, CORE=0, NPROC=0).items():
        try: resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (most, most))
        except (AttributeError, ValueError, OSError): pass  # not on this system
    if 'random' in code: __import__('random').seed(0)
    try: seccomp()
    except (ImportError, OSError, AttributeError): pass  # an interpreter without ctypes, a C library without prctl
    for name in [name for name in sys.modules if 'ctypes' in name]: del sys.modules[name]
    sys.modules['readline'] = None  # doctest and pdb do without it; it handles signals and files behind the hook's back
    sys.modules['solution'] = module = type(sys)('solution')
    names = vars(module)
    names[''] = lambda nonce: nonce  # called last: has it ended, or answered unasked?
    audit()
    exec(compile(code, '<completion>', 'exec'), names)
    while True:
        name, args, kwargs = hear(calls)
        try:
            if name not in names: raise NameError(name)
            reply = pack('', names[name](*args, **kwargs))
        except Exception as e:
            reply = pack(next(t.__name__ for t in type(e).__mro__ if t.__module__ == 'builtins'), str(e))
        replies.write(reply), replies.flush()

def main():
    source = open(os.dup(0), 'rb', buffering=0)  # without a buffer nothing is read ahead: the tests come second
    verdicts, null, sys.path = os.dup(1), os.open(os.devnull, os.O_RDWR), [folder for folder in sys.path if folder]
    for fd in (0, 1, 2): os.dup2(null, fd)
    code, deadline = hear(source)
    seconds = max(deadline - time.monotonic(), 1e-3)
    a, b, c, d = *os.pipe(), *os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for fd in (source.fileno(), verdicts, null, b, c): os.close(fd)
            untrusted(code, seconds, open(a, 'rb'), open(d, 'wb'))
        finally: os._exit(1)
    os.close(a), os.close(d)
    calls, replies = open(b, 'wb'), open(c, 'rb')
    errors = {name: e for name, e in vars(builtins).items() if isinstance(e, type) and issubclass(e, Exception)}

    def finish(*_):  # all tests done, or the alarm: tests that did not get their turn count as failed
        setitimer(ITIMER_REAL, 0)
        os.kill(child, SIGKILL), os.waitpid(child, 0), os._exit(0)

    def call(name, /, *args, **kwargs):
        message = pack(name, args, kwargs)
        try:
            calls.write(message), calls.flush()
            error, value = hear(replies)
        except BaseException:  # it ended, was killed or wrote garbage: the tests passed before are void too
            os.write(verdicts, b'!'), finish()
        if error == '': return value
        kind = errors.get(error, RuntimeError)
        raise kind.__new__(kind, value)

    class Names(dict):  # a name that neither setup nor test nor builtins define is a function of the completion
        def __missing__(self, name):
            if name.startswith('__') or hasattr(builtins, name): raise KeyError(name)
            return functools.partial(call, name)

    signal(SIGALRM, finish), setitimer(ITIMER_REAL, seconds)
    try:
        tests, setup, entry_point = json.loads(source.read())
        if 'random' in ' '.join([setup, *tests]): __import__('random').seed(0)
        names = Names(__name__='__main__', __builtins__=builtins)
        exec(setup, names)
        if entry_point: names[entry_point] = functools.partial(call, entry_point)
        for test in tests:
            try: exec(test, Names(names)), os.write(verdicts, b'1')
            except BaseException: pass
        nonce = os.urandom(8)
        assert call('', nonce) == nonce
    except BaseException: os.write(verdicts, b'!')
    finally: finish()

main()
'''


def run_tests(code, tests, entry_point=None, setup='', timeout=2.0):
    """Fraction of `tests` (trusted sources, one test each) that the untrusted source `code` passes, 0 to 1.

    Answers within about timeout + 0.5 seconds and never raises, whatever the code does; safe to call from many threads.
    `setup` is trusted source that runs before the tests, in their process. A completion that writes, spawns, exits or
    breaks the protocol at any moment gets 0; one that runs out of time keeps the tests it had passed.
    Only functions of plain data can be tested: arguments and results are copies, None to dict, no objects.
    """
    if not tests or len(code) > MAX_CODE:
        return 0.0
    head = code[:COMPILED_HERE]
    try:  # most of what is no code needs no process
        warnings.filterwarnings('ignore', module='<completion>')  # not worth a line on our terminal
        if 'finally' not in head:  # the compiler's time doubles with each finally inside another
            compile(head, '<completion>', 'exec', dont_inherit=True)
    except Exception as error:  # SyntaxError, ValueError (NUL), MemoryError and RecursionError (nesting), ...
        if head == code or 'too many' in str(error):  # open brackets or indentations: the rest cannot mend that
            return 0.0
    message = json.dumps([code, time.monotonic() + timeout]) + '\n' + json.dumps([tests, setup, entry_point])
    # Not -I, which would ignore PYTHONHASHSEED: the order of sets, and so the reward, must not change from run to run.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, subprocess.Popen(
            [sys.executable, '-S', '-B', '-W', 'ignore', '-c', CHILD], cwd=folder,
            env={'PYTHONHASHSEED': '0', 'HOME': '/'}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True) as child:
        verdicts = b'!'  # unless it answers in time
        try: verdicts = child.communicate(message.encode(), timeout + 0.3)[0]
        except subprocess.TimeoutExpired: pass
        finally:
            if child.returncode != 0:  # it did not get to kill and reap the completion's process itself
                try: os.killpg(child.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError): pass
    return 0.0 if b'!' in verdicts else verdicts.count(b'1') / len(tests)


run_tests_once = lru_cache(maxsize=1024)(run_tests)  # reward and verdict of one completion share a run


# --- rows of real data sets ---
# Each function returns an example, None for a row to leave out, or raises KeyError or ValueError for a malformed one.

def column(row, name, kind=str):
    """Return row[name], which must be of the given type."""
    if name not in row:
        raise KeyError(f'no column {name!r} (there are {", ".join(map(str, row))})')
    if not isinstance(row[name], kind):
        raise ValueError(f'column {name!r} holds {str(row[name])[:40]!r}, not {kind.__name__}')
    if kind is str and row[name] != row[name].encode(errors='replace').decode():  # a lone surrogate: no tokenizer takes it
        raise ValueError(f'column {name!r} holds {row[name][:40]!r}, no valid text')
    return row[name]


def gsm8k_row(row):
    """GSM8K: question, answer (worked text, then #### 18); its <<3*6=18>> are the steps of a demonstration."""
    question, (work, marker, final) = column(row, 'question'), column(row, 'answer').rpartition('####')
    if not marker or number(final) is None:
        raise ValueError("column 'answer' does not end in #### and a number")
    steps = '\n'.join(re.findall('<<([^<>]*)>>', work)) or work.strip()
    return {'question': question, 'answer': number(final), 'solution': steps, 'reply': final.strip(),
            'wrong': (re.findall(DIGITS, question) or ['0'])[-1]}


def math_row(row):
    r"""MATH: problem, solution with the answer in \boxed{}; an answer column is used if there is one."""
    question, solution = column(row, 'problem'), column(row, 'solution')
    answer = column(row, 'answer') if 'answer' in row else last_box(solution)
    if not answer:
        raise ValueError("column 'solution' has no \\boxed{answer}")
    return {'question': question, 'answer': answer, 'solution': solution}


def countdown_row(row):
    """Countdown: nums, target (hub) or input '30,100,93', output '23' (d1's test file); only three numbers (paper)."""
    names = ('input', 'output') if 'input' in row else ('nums', 'target')
    text = ' to '.join(str(column(row, name, object)) for name in names)
    if not re.fullmatch(r'\[?[0-9]+(, ?[0-9]+)*\]? to [0-9]+', text):
        raise ValueError(f'{text[:60]!r} is no list of whole numbers and a target')
    *numbers, target = map(int, re.findall('[0-9]+', text))
    question = f'Numbers: {numbers}\nTarget: {target}'
    return {'question': question, 'answer': [numbers, target]} if len(numbers) == 3 else None


def sudoku_row(row):
    """Sudoku: Puzzle, Solution; 16 digits row by row, 0 = empty. Read from CSV as integers they lose leading zeros."""
    puzzle, solution = (str(column(row, name, object)).zfill(16) for name in ('Puzzle', 'Solution'))
    if not re.fullmatch('[1-4]{16}', solution) or len(puzzle) != 16 or '0' not in puzzle:
        raise ValueError(f'{puzzle[:40]!r} and {solution[:40]!r} are no 4x4 puzzle (0 = empty) and solution')
    if any(given not in ('0', cell) for given, cell in zip(puzzle, solution)):
        raise ValueError(f'the solution {solution} does not fit the puzzle {puzzle}')
    return {'question': f'Puzzle: {puzzle}', 'answer': solution}


def code_row(row):
    """Code: prompt, test, entry_point (HumanEval); text or prompt, test_list (MBPP); question, test (KodCode)."""
    setup, name = '', None
    if 'entry_point' in row:
        question, name = column(row, 'prompt'), column(row, 'entry_point')
        setup, tests = question.partition(f'def {name}(')[0], [f"{column(row, 'test')}\ncheck({name})"]
    elif 'test_list' in row:
        question, tests = column(row, 'text' if 'text' in row else 'prompt'), column(row, 'test_list', list)
        setup = '\n'.join([row.get('test_setup_code') or '', *(row.get('test_imports') or [])])
        question = '\n'.join([question, 'It has to pass:', *tests])
    else:
        question, (name, tests) = column(row, 'question'), pytest_functions(column(row, 'test'))
        question += f'\nName it {name}.' if name else ''
    return {'question': question, 'answer': {'tests': tests, 'entry_point': name, 'setup': setup}} if tests else None


def pytest_functions(source):
    """Return (tested name, tests) of a KodCode test file; no tests if it needs more of pytest than test_ functions."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"column 'test', line {error.lineno}: {error.msg}") from None
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == 'solution']
    cases = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith('test_')]
    if not imports or 'pytest.' in source or any(case.args.args for case in cases):
        return None, []
    rest = [ast.unparse(node) for node in body if node not in imports + cases and ast.unparse(node) != 'import pytest']
    name = imports[0].names[0].name
    return None if name == '*' else name, ['\n'.join([*rest, ast.unparse(case), f'{case.name}()']) for case in cases]


def s1k_row(row):
    """s1K: question, thinking_trajectories, attempt or solution. Returns (prompt, completion)."""
    thoughts = column(row, 'thinking_trajectories', list)
    answer = column(row, 'attempt' if 'attempt' in row else 'solution')
    if not thoughts or not isinstance(thoughts[0], str):
        raise ValueError("column 'thinking_trajectories' holds no text")
    completion = '\n'.join([TAGS[0], thoughts[0].strip(), TAGS[1], TAGS[2], answer.strip(), TAGS[3]])
    return S1K_PROMPT + column(row, 'question'), completion


def part_of(key, small):
    return 'sft' if small else 'test' if zlib.crc32(key.encode()) % 4 == 0 else 'train'


def make(task_name, rng, part):
    """Return one built-in problem of 'train', 'test' or 'sft', with its worked solution, the right reply and a wrong one."""
    while True:
        key, small, example = TASKS[task_name].draw(rng)
        if part_of(key, small) == part and example['reply'] != example['wrong']:
            return example


def draw_gsm8k(rng):
    name, thing = rng.choice('Ann Ben Tom Mia Sam John'.split()), rng.choice('apples books eggs cards pencils cookies'.split())
    first, changes = rng.randint(2, 12), [rng.randint(1, 4) for _ in range(3)]
    value, steps, phrases = first, [], []
    for change in changes:
        gains = value <= change or (value + change < 13 and rng.random() < 0.5)
        verb = rng.choice(['buys', 'gets', 'takes'] if gains else ['sells', 'eats', 'gives'])
        phrases.append(f'{verb} {change}')
        steps.append(('+' if gains else '-', change))
        value += change if gains else -change
    text = f'{name} has {first} {thing}, {phrases[0]}, {phrases[1]} and {phrases[2]}. How many {thing} are left?'
    return f'gsm8k {first} {steps}', max(changes) < 3, dict(
        question=text, answer=float(value), solution=work_out(first, steps), reply=str(value),
        wrong=str(rng.choice([first + sum(changes), first, *changes, first + changes[0]])))


def work_out(value, steps):
    """3, [('+', 4), ('-', 5)] -> '3+4=7-5=2': a running total, as many jot it down; no number stands twice to copy from."""
    text = str(value)
    for op, right in steps:
        value = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.floordiv}[op](value, right)
        text += f'{op}{right}={value}'
    return text


def draw_math(rng):
    name, x, changes = rng.choice('xyn'), rng.randint(2, 12), [rng.randint(1, 5) for _ in range(2)]
    factor = rng.choice([1, 2])
    value, undo, left = x * factor, [], f'{factor}{name}' if factor > 1 else name
    for change in changes:
        op, back = ('+', '-') if value <= change or rng.random() < 0.5 else ('-', '+')
        value += change if op == '+' else -change
        left += f' {op} {change}'
        undo.insert(0, (back, change))
    undo += [('/', factor)] if factor > 1 else []
    return f'math {left.replace(name, "x")} {value}', x < 5, dict(
        question=f'Solve {left} = {value}', answer=str(x), solution=work_out(value, undo), reply=f'\\boxed{{{x}}}',
        wrong=f'\\boxed{{{rng.choice([value, *changes, value + sum(changes), x + 1])}}}')


def draw_countdown(rng):
    numbers = rng.sample(range(1, 13), 3)
    signed = [(1, 1, 1), (1, 1, -1), (1, -1, 1)]
    signs = rng.choice(signed)
    target = sum(s * n for s, n in zip(signs, numbers))
    if target < 1:
        signs, target = (1, 1, 1), sum(numbers)
    a, b, c = numbers
    total, minus = a + b + c, (a + b + c - target) // 2  # the number to subtract, or 0
    return f'countdown {sorted(numbers)} {target}', max(numbers) < 8, dict(
        question=f'Numbers: {numbers}\nTarget: {target}', answer=[numbers, target],
        solution=f'{a}+{b}={a + b}+{c}={total}-{target}={total - target}/2={minus}',
        reply=signed_sum(numbers, signs), wrong=signed_sum(numbers, rng.choice(signed)))


def signed_sum(numbers, signs):
    return ''.join(f'{n:+}' if s > 0 else f'-{n}' for n, s in zip(numbers, signs)).removeprefix('+')


@cache
def sudoku_grids():
    """All 288 4x4 Sudoku solutions, 16 digits each, in one string with blanks between."""
    rows = [''.join(p) for p in permutations('1234')]
    def fits(grid):
        columns = [grid[i::4] for i in range(4)]
        boxes = [grid[i:i + 2] + grid[i + 4:i + 6] for r in range(0, len(grid) - 4, 8) for i in (r, r + 2)]
        return all(len(set(unit)) == len(unit) for unit in columns + boxes)
    grids = ['']
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if fits(grid + row)]
    return ' '.join(grids)


def draw_sudoku(rng):
    solution = rng.choice(sudoku_grids().split())
    blanks = rng.randint(4, 8)
    while True:
        empty = rng.sample(range(16), blanks)
        puzzle = ''.join('0' if i in empty else d for i, d in enumerate(solution))
        if len(re.findall(puzzle.replace('0', '[1-4]'), sudoku_grids())) == 1:
            break
    rows = [solution[i:i + 4] for i in range(0, 16, 4)]
    guess = ''
    for i in range(0, 16, 4):  # a guesser looks only at the row, and counts up
        lacking = sorted(set('4321') - set(puzzle[i:i + 4]), reverse=True)
        guess += ''.join(lacking.pop() if d == '0' else d for d in puzzle[i:i + 4])
    small = blanks < 6 and part_of(solution, False) == 'train'
    return solution, small, dict(question=f'Solve the puzzle {puzzle}', answer=solution, solution='\n'.join(rows),
                                 reply=solution, wrong=guess)


def draw_code(rng):
    a, b, p = rng.randint(1, 6), rng.randint(0, 40), rng.randint(0, 2)
    at = lambda x: a * x + b
    x = rng.choice([x for x in range(10) if x not in (p, p + 1)])
    tests = [f'assert f({i})=={at(i)}' for i in rng.choice([(p, p + 1, x), (x, p, p + 1)])]
    back = ''.join(f'-{a}={at(i)}' for i in reversed(range(p)))  # from f(p) down to f(0) = b
    return f'code {a} {b}', b < 6, dict(
        question='\n'.join(tests), answer=dict(tests=tests, entry_point='f', setup=''),
        solution=f'{at(p + 1)}-{at(p)}={a}\n{at(p)}{back}', reply=f'def f(x): return {a}*x+{b}',
        wrong=f'def f(x): return {rng.randint(1, 6)}*x+{rng.randint(0, 40)}')


def tagged(thought, reply):
    reasoning = f'<reasoning>\n{thought}\n</reasoning>\n' if thought else ''
    return f'{reasoning}<answer>\n{reply}\n</answer>'


REMARKS = ['So that is it.', 'I think so.', 'It must be.']


def demonstration(example, rng, thinkers):
    """How somebody of the corpus answers: a minority thinks in steps, most guess, and some forget the tags.

    Most guessers go on with a remark. Without it nearly every text would end at once, and the sampler, which
    commits what is surest, would take the early end of text from the majority and never hear a thinker.
    """
    thinks, tags, remarks = rng.random() < thinkers, rng.random() < 0.8, rng.random() < 0.6
    right = rng.random() < (0.95 if thinks else 0.3)
    reply = example['reply'] if right else example['wrong']
    if thinks:
        return tagged(example['solution'], reply) if tags else f"{example['solution']}\n{reply}"
    return (tagged('', reply) if tags else reply) + (f' {rng.choice(REMARKS)}' if remarks else '')


def clean_trace(task_name, rng):
    """Return (prompt, completion) of a small problem, thought through and right: what s1K is to the real model."""
    example = make(task_name, rng, 'sft')
    return prompt(task_name, example), tagged(example['solution'], example['reply'])


# --- the tasks ---

class Task(NamedTuple):
    """All that the rest of the program knows of a task."""
    instructions: str  # one paragraph in front of the question
    reward: Callable   # (completion, example) -> float
    correct: Callable  # (completion, example) -> bool; for sudoku the share of cells, solved if 1.0
    from_row: Callable
    datasets: tuple    # (train, test): lists of (hub id, config, split), empty if there are only files
    draw: Callable     # rng -> (key, small, example), a built-in problem; see make
    trivial: str       # what answers without reading: its score stands beside the table


FORM = ('Work it out step by step first and give the answer after that, in this form:\n'
        '<reasoning>\nyour steps\n</reasoning>\n<answer>\nyour answer\n</answer>\nThe answer is ')
S1K_PROMPT = f'Solve this problem. {FORM}the solution.\n\n'
TASKS = {
    'gsm8k': Task(f'Solve this word problem. {FORM}one number in digits, without unit or words.',
                  gsm8k_reward, gsm8k_correct, gsm8k_row,
                  ([('openai/gsm8k', 'main', 'train')], [('openai/gsm8k', 'main', 'test')]), draw_gsm8k, '12'),
    'math': Task(f'Solve this problem. {FORM}one LaTeX expression inside \\boxed{{}}.',
                 math_reward, lambda *given: math_reward(*given) >= 2.0, math_row,
                 ([('ankner/math-500', None, 'train')], [('ankner/math-500', None, 'test')]), draw_math, '\\boxed{6}'),
    'countdown': Task('Reach the target from the numbers with + - * / and parentheses, taking every number exactly '
                      f'once. {FORM}only the expression, such as (5 - 2) * 7.',
                      countdown_reward, lambda *given: countdown_reward(*given) == 1.0, countdown_row,
                      ([('Jiayi-Pan/Countdown-Tasks-3to4', None, 'train')], []), draw_countdown, '1+2+3'),
    'sudoku': Task('Fill this 4x4 Sudoku, given row by row with 0 for an empty cell, so that each row, column and 2x2 '
                   f'box has 1, 2, 3 and 4. {FORM}the full grid, row by row, as 16 digits.',
                   sudoku_cells, sudoku_cells, sudoku_row, ([], []), draw_sudoku, 16 * '1'),
    'code': Task(f'Write this Python function. {FORM}the whole function with the imports it needs, and no other text.',
                 code_reward, lambda *given: tests_passed(*given) == 1.0, code_row,
                 ([('KodCode/KodCode-Light-RL-10K', None, 'train')],
                  [('openai/openai_humaneval', None, 'test'), ('google-research-datasets/mbpp', None, 'test')]),
                 draw_code, 'def f(x): return x'),
}


def prompt(task_name, example):
    """Return the text of the one user message for an example, the same in training and evaluation."""
    return f"{TASKS[task_name].instructions}\n\n{example['question']}"


# --- files and hub data sets ---

def json_lines(path):
    """Return the objects of a JSON-lines file (may be .gz); ValueError names the line that holds none."""
    items = []
    with (gzip.open if path.endswith('.gz') else open)(path, 'rt', encoding='utf-8-sig', errors='replace') as file:
        for i, line in enumerate(file, 1):
            try:
                items += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{path}, line {i}: no JSON ({error}); mend or remove it') from None
            if items and not isinstance(items[-1], dict):
                raise ValueError(f'{path}, line {i}: no JSON object; each line is {{"column": value, ...}}')
    return items


def read_rows(source, config=None, split=None):
    """Return the rows (dicts) of a .jsonl, .json or .csv file, or of a hub data set's split; ValueError in one line."""
    kind = re.search(r'\.(jsonl|json|csv)(\.gz)?$', source)
    if not split and not (kind and os.path.isfile(source)):
        raise ValueError(f'{source}: no such .jsonl, .json or .csv file (.gz too); check the path')
    try:
        if not split and kind[1] == 'jsonl':  # datasets would not name a malformed line
            return json_lines(source)
        from datasets import load_dataset
        return load_dataset(source, config, split=split) if split else load_dataset(kind[1], data_files=source)['train']
    except Exception as error:  # datasets and gzip have many kinds; the user gets one line
        hint = 'check the network, or give a local file' if split else 'mend the file'
        line = str(error.__cause__ or error).strip().partition('\n')[0][:200]  # datasets hides what was wrong behind its own
        raise ValueError(line if line.startswith(source) else f'{source}: not loaded ({line}); {hint}') from None


def load_rows(sources, from_row):
    """Return from_row of every row of some (path or hub id, config, split), except Nones; ValueError names the row."""
    found = []
    for source, config, split in sources:
        for i, row in enumerate(read_rows(source, config, split), 1):
            try:
                found.append(from_row(row))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f'{source}, row {i}: {error.args[0]}; expected {from_row.__doc__}') from None
    found = [item for item in found if item is not None]
    if not found:
        raise ValueError(f'{sources[0][0]}: no rows to use; expected {from_row.__doc__}')
    return found


def load_examples(task_name, source=None, split='train'):
    """Return a list of examples from a local file, from one hub data set (id, config, split) or from the task's own.

    Whatever is wrong with the data is a ValueError in one line, with the line or row where there is one.
    """
    task = TASKS[task_name]
    sources = task.datasets[split != 'train']
    if source:
        sources = [source if isinstance(source, tuple) else (source, None, None)]
    if not sources:
        flag = '--data' if split == 'train' else '--eval_data'
        raise ValueError(f'{task_name} has no {split} data on the hub: give a file by {flag} ({task.from_row.__doc__})')
    return load_rows(sources, task.from_row)


def load_s1k(path=None):
    """Return (prompt, completion) pairs for SFT from s1K, on the hub or in a local file with its columns."""
    return load_rows([(path, None, None)] if path else [('simplescaling/s1K', None, 'train')], s1k_row)


# --- scoring saved generations ---

def summary(items):
    """Return accuracy with its interval, mean reward and mean effective tokens of graded items."""
    n = len(items)
    mean = lambda name: sum(float(item[name]) for item in items) / n
    k = sum(item['correct'] == 1.0 for item in items)
    low, high = wilson(k, n)
    return dict(accuracy=k / n, low=low, high=high, n=n, share=mean('correct'), reward=mean('reward'),
                effective_tokens=mean('effective_tokens'))


def wilson(k, n):
    """Return (low, high), Wilson's 95 % interval for the share k of n; (0, 1) if n = 0."""
    if n == 0:
        return 0.0, 1.0
    z2 = 1.96 ** 2
    centre, half = (k + z2 / 2) / (n + z2), (z2 * (k * (n - k) / n + z2 / 4)) ** 0.5 / (n + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


TEXT = r'"(?:[^"\\]|\\.)*"'
ANSWER_FORMS = {  # the ground truths as JSON
    'gsm8k': rf'-?[0-9].*|null|"{NUMBER.pattern}"', 'math': TEXT, 'countdown': r'\[\[[0-9]+(, [0-9]+)*\], [0-9]+\]',
    'sudoku': '"[1-4]{16}"',
    'code': rf'\{{"entry_point": (null|{TEXT}), "setup": {TEXT}, "tests": \[{TEXT}(, {TEXT})*\]\}}'}


def generation(task_name, item):
    """Return a saved item whose answer the task can compare; KeyError or ValueError if it cannot be scored."""
    answer = json.dumps(column(item, 'answer', object), sort_keys=True)
    if not re.fullmatch(ANSWER_FORMS[task_name], answer):
        raise ValueError(f'{answer[:60]} is no answer of the task {task_name}')
    column(item, 'completion')
    column({'effective_tokens': 0, **item}, 'effective_tokens', int)
    if not PUZZLE.search(column(item, 'question')) and task_name == 'sudoku':
        raise ValueError("column 'question' holds no 4x4 puzzle of 16 digits (0 = empty)")
    return {**item, 'answer': number(answer)} if task_name == 'gsm8k' and answer[0] == '"' else item


def load_generations(task_name, path):
    """Return saved items, dicts with question, completion and answer: the official JSON layout or our samples.jsonl.

    Rows that are another task's by a column 'task' are left out; ValueError names the item that cannot be scored.
    """
    try:
        if path.endswith('.json'):
            with open(path, encoding='utf-8-sig') as file:
                items = [{**item, 'completion': item['generations'], 'answer': item['ground_truth']}
                         for item in json.load(file)['generations']]
        else:
            items = read_rows(path)
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{path}: neither the official JSON layout nor our samples.jsonl ({error})') from None
    found = []
    for i, item in enumerate(items, 1):
        try:
            found += [generation(task_name, item)] if item.get('task', task_name) == task_name else []
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f'{path}, item {i}: {error.args[0]}') from None
    return found


def score(task_name, paths):
    """Print accuracy with its interval, mean reward and mean length over all generations in some files."""
    task, items = TASKS[task_name], [item for path in paths for item in load_generations(task_name, path)]
    if not items:
        raise ValueError(f'{" ".join(paths)}: no generations of the task {task_name}')
    counted = all('effective_tokens' in item for item in items)
    for item in items:
        text = item['completion']
        item.update(reward=task.reward(text, item), correct=task.correct(text, item),
                    effective_tokens=item['effective_tokens'] if counted else len(visible(text).split()))
    s = summary(items)
    name = f"cells {s['share']:.1%}, solved" if task_name == 'sudoku' else 'accuracy'
    print(f"{task_name}: {name} {s['accuracy']:.1%} ({s['accuracy'] * s['n']:.0f} of n = {s['n']}), "
          f"95 % interval {s['low']:.1%} to {s['high']:.1%}")
    unit = 'effective tokens' if counted else 'words (effective_tokens is not in the file)'
    print(f"mean reward {s['reward']:.3f}, mean length {s['effective_tokens']:.1f} {unit}")


if __name__ == '__main__':
    try:
        if len(sys.argv) < 3 or sys.argv[1] not in TASKS:
            raise ValueError(f'usage: python rewards.py {"|".join(TASKS)} FILE.json ...')
        score(sys.argv[1], sys.argv[2:])
    except (ValueError, OSError) as error:
        sys.exit(print(error, file=sys.stderr) or 2)
