"""Model-written code is scored by its tests alone; whatever it does, nothing is left behind.

Each attack is a program, or one line that a function with a right answer tries first.
"""
import contextlib
import glob
import importlib.util
import inspect
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import rewards
from rewards import run_tests

spec = importlib.util.spec_from_file_location('judge', rewards.JUDGE)
judge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(judge)

TESTS = ['assert f(1) == 2', 'assert f(3) == 6', 'assert f(-4) == -8']
HONEST = 'def f(x): return 2 * x\n'
SECCOMP = sys.platform == 'linux' and os.uname().machine == 'x86_64'
needs_seccomp = pytest.mark.skipif(not SECCOMP, reason='needs Linux on x86-64')

PRELUDE = '''import __main__, atexit, builtins, itertools, os, re, sys, time
def yes(*a, **k): return True
def write_all(line):
    for fd in range(64):
        try: os.write(fd, line)
        except OSError: pass
def reply(value): return b'["", %d, {"tuple": []}, {"dict": []}]\\n' % value
'''
# one kind of fraud, of breach or of waste per line
WRONG = r'''
f = lambda x: type("E", (), dict(__eq__=yes, __hash__=None))()
f = lambda x: type("E", (int,), dict(__eq__=yes, __ne__=yes, __bool__=yes))(0)
f = lambda x: type("E", (list,), dict(__eq__=yes, __iter__=lambda s: iter(int, 1)))()
f = lambda x: write_all(b"...111")
write_all(reply(2) + reply(6) + reply(-8)); f = lambda x: 0
def f(x): write_all(b'["", 2, \xff\n'); time.sleep(9)
def f(x): write_all(b'["", ' + b"[" * 20000 + b"\n"); return 0
__main__.pack = lambda *values: reply(2); f = lambda x: 0
def f(x): __main__.main(); return 0
builtins.len = builtins.isinstance = builtins.all = builtins.any = yes; f = lambda x: 0
def f(x): raise SystemExit(0)
os._exit(0)
f = lambda x: bytearray(600 << 20) and 2 * x
def f(x): y = []; y.append(y); return y
f = lambda x: re.match("(a+)+$", "a" * 60 + "b")
time.time = time.monotonic = time.perf_counter = lambda: 0; time.sleep(99)
f = lambda x: [print("x" * 10 ** 6) for _ in iter(int, 1)]
sys.setrecursionlimit(10 ** 9); f = lambda x: f(x + 1)
'''
BLOCKS = r'''
# swallows everything, memory bombs too
def f(x):
    y = []
    while True:
        try:
            while True: y.append(bytearray(1 << 24))
        except BaseException: pass
# reads the tests in frames
def f(x):
    fr = sys._getframe()
    while fr:
        for v in [*fr.f_locals.values(), *fr.f_globals.values()]:
            if isinstance(v, str) and "assert" + " f(" in v: return 2 * x
        fr = fr.f_back
# reads the tests from every descriptor
import select
def f(x):
    for fd in range(64):
        try:
            if select.select([fd], [], [], 0)[0] and b"assert" in os.read(fd, 999): return 2 * x
        except OSError: pass
# keeps the tests' process busy where no alarm comes through: colliding hashes
numbers = b", ".join(b"%d" % (i * (2 ** 61 - 1)) for i in range(100_000))
__main__.pack = lambda *values: b'["", {"set": [' + numbers + b']}, {"tuple": []}, {"dict": []}]\n'
def f(x): return 0
'''
# TARGET: a folder with a file victim.txt; VICTIM: the id of a process; PORT: one that listens here;
# ASSETS: the judge's folder, whose neighbours hold problems with their solutions
FORBIDDEN = r'''
open("TARGET/new", "w").write("x")
open("new", "w").write("in its own folder")
open("TARGET/victim.txt", "r+").truncate(0)
os.write(os.open("TARGET/new", os.O_CREAT | os.O_WRONLY), b"x")
S = type("S", (str,), dict(startswith=lambda *a: True)); open(S("/etc/passwd"))
os.remove("TARGET/victim.txt")
import subprocess; subprocess.run(["touch", "TARGET/new"])
while True: os.fork()
import socket; socket.create_connection(("127.0.0.1", PORT), 1).sendall(b"hi")
import ctypes; ctypes.CDLL(None).system(b"touch TARGET/new")
os.kill(VICTIM, 9)
open("/proc/self/maps").read()
open(os.__file__ + "/../../../../../../etc/passwd")
open("ASSETS/judge.py").read()
import gc; gc.get_objects()
import __main__, builtins; __main__.os = None; builtins.type = print; open("TARGET/new", "w")
'''
# no audit event tells of these: the kernel stops them
KERNEL = r'''
import threading; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
os.mkfifo("TARGET/new")
os.setsid()
import signal; signal.setitimer(signal.ITIMER_REAL, 0)
os.memfd_create("x")
'''
NO_CODE = ['', 'def f(x:', HONEST + '\0', 'x = "\ud800"', '(' * 50_000, 'f' + '()' * 40_000,
           '\n'.join(f'{" " * i}try:\n{" " * i} f\n{" " * i}finally:' for i in range(25)) + '\nf']


def tried(act):
    """A right answer by a function that first tries something and hides the exception."""
    return ('import os, sys, time\ndef f(x):\n    try:\n' + textwrap.indent(act, 8 * ' ')
            + '\n    except BaseException:\n        pass\n    return 2 * x')


PROGRAMS = WRONG.strip().splitlines() + re.split('\n(?=# )', BLOCKS.strip())
ACTS = FORBIDDEN.strip().splitlines() + SECCOMP * KERNEL.strip().splitlines()
ATTACKS = [*(PRELUDE + program for program in PROGRAMS), *map(tried, ACTS), *NO_CODE]
NAMES = [ascii(attack[:40]) for attack in PROGRAMS + ACTS + NO_CODE]


def state(folder):
    """Each path in a folder with its mode and the time of its last change."""
    paths = sorted(glob.glob(f'{folder}/**', recursive=True))
    return [(path, os.lstat(path).st_mode, os.lstat(path).st_mtime_ns) for path in paths]


def living_in(folder):
    """The processes that work in a folder, deleted or not: children keep the working folder."""
    found = []
    for link in glob.glob('/proc/[0-9]*/cwd'):
        with contextlib.suppress(OSError):           # gone in the meantime
            if os.readlink(link).startswith(str(folder)):
                found.append(link)
    return found


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A place to attack, checked afterwards: files, a process, a port, the temporary folder."""
    target, temp = tmp_path / 'target', tmp_path / 'temp'
    target.mkdir()
    temp.mkdir()
    (target / 'victim.txt').write_text('untouched')
    monkeypatch.setattr(tempfile, 'tempdir', str(temp))
    server = socket.create_server(('127.0.0.1', 0))
    server.setblocking(False)
    victim = subprocess.Popen(['sleep', '600'])
    before = state(target)
    try:
        yield dict(TARGET=target, VICTIM=victim.pid, PORT=server.getsockname()[1],
                   ASSETS=os.path.dirname(rewards.JUDGE))
        assert state(target) == before
        for _ in range(100):                     # a busy machine takes a while to bury the killed
            if not os.listdir(temp) and not living_in(tmp_path):
                break
            time.sleep(0.1)
        assert os.listdir(temp) == [] and living_in(tmp_path) == []
        assert victim.poll() is None
        with pytest.raises(BlockingIOError):
            server.accept()
    finally:
        victim.kill()
        victim.wait()
        server.close()


@pytest.mark.parametrize('code', ATTACKS, ids=NAMES)
def test_cheating_and_escaping_score_zero_in_time_and_leave_nothing(code, trap):
    for word, value in trap.items():
        code = code.replace(word, str(value))
    start = time.monotonic()
    assert run_tests(code, TESTS, timeout=0.5) == 0
    assert time.monotonic() - start < 10     # about 1 on an idle machine


def test_the_attacks_would_pass_but_for_what_they_try():
    assert run_tests(tried('pass'), TESTS) == run_tests(PRELUDE + HONEST, TESTS) == 1
    for program in PROGRAMS:
        compile(PRELUDE + program, 'an attack', 'exec')


def status(lock, act):
    """How a process with one of the two locks ends that does something: 0 if nothing hinders it."""
    code = (f'import sys; sys.path.insert(0, {os.path.dirname(rewards.JUDGE)!r})\n'
            f'import judge, os\nsys.path.pop(0)\njudge.{lock}()\n'
            f'try: {act}\nexcept OSError: os._exit(7)\nos._exit(0)')
    return subprocess.run([sys.executable, '-S', '-B', '-c', code],
                          stderr=subprocess.DEVNULL).returncode


@needs_seccomp
def test_the_kernel_alone_refuses_all_but_computing_and_reading(tmp_path):
    assert status('lock_kernel', 'os.listdir("/"), open("/etc/passwd").read()') == 0
    for act in (f'open("{tmp_path}/new", "w")', f'os.mkdir("{tmp_path}/new")', 'os.fork()',
                'os.kill(os.getppid(), 0)', '__import__("socket").socket()',
                'os.execv("/bin/true", ["true"])', 'os.setsid()', 'open("/etc/passwd", "r+")'):
        assert status('lock_kernel', act) in (-31, 7), act       # SIGSYS, or no such call


def test_the_audit_hook_alone_ends_whoever_opens_starts_or_connects(tmp_path):
    assert status('add_audit_hook', 'open(os.__file__).read(), os.listdir("/"), sum([1])') == 0
    for act in ('open("/etc/passwd")', f'open("{tmp_path}/new", "w")', f'os.mkdir("{tmp_path}/a")',
                'os.fork()', 'os.kill(os.getppid(), 0)', 'os.system("true")', 'import ctypes',
                'import socket; socket.socket()', 'import gc; gc.get_objects()',
                'open(os.__file__.replace("os.py", "site-packages/x"))',
                'sys.audit("import", "x", "/dist-packages/x.so", None, None, None)'):
        assert status('add_audit_hook', act) == 1, act


# ---- what crosses between the processes ----

def forged(line):
    """A program that answers every call by `line`, except the last, which it answers rightly."""
    return (f'import __main__\nhonest = __main__.pack\ndef f(x): return 0\n'
            f'def pack(error, value, *changed):\n'
            f'    if type(value) is bytes: return honest(error, value, *changed)\n'
            f'    return {line!r}\n__main__.pack = pack\n')


@pytest.mark.parametrize('error, raised', [
    ('ValueError', 'ValueError'), ('SystemExit', 'SystemExit'), ('exit', 'RuntimeError'),
    ('UnicodeDecodeError', 'UnicodeDecodeError'), ('exec', 'TypeError'), (5, 'TypeError')])
def test_the_name_of_an_exception_makes_an_exception_and_runs_nothing(error, raised):
    value = 'import os\nfor fd in range(9): os.write(fd, b"111")\nos._exit(0)'
    code = forged(json.dumps([error, value]).encode() + b'\n')
    sees = f'try: f(1)\nexcept BaseException as e: assert type(e) is {raised}\nelse: 1 / 0'
    assert run_tests(code, [sees, *TESTS]) == 1 / 4


@pytest.mark.parametrize('line', [
    b'["", {"tuple": 2}]', b'["", {"eval": "1"}]', b'["", {"set": [], "tuple": []}]', b'["", 2]',
    b'["", 2, 3, 4]', b'{}', b'', b'[' * 20_000, b'["", "\xff"]', b'["", 2 #' + b' ' * 9],
    ids=lambda line: repr(line[:30]))
def test_a_line_that_breaks_the_protocol_voids_every_test(line):
    code = forged(line + b'\n').replace('#', "' + b' ' * (1 << 24) + b'")    # without an end
    assert run_tests(code, ['pass', 'pass', 'f(1)']) == 0


VALUES = [
    'None', 'True', '-1', '10 ** 5000', '-0.0', 'inf', 'nan', 'complex(nan, inf)',
    '"a b\\nc\\0\\u00e9\\ud800"', 'b"\\0\\xff"', '[[]]', '(1,)', 'set()', 'frozenset({(1, 2)})',
    '{"a": [1, (None, {2: b"x"})], (3, "k"): {4}, None: {"dict": {"tuple": []}}}']


def same(a, b):
    """Equal and of one type throughout; repr cannot write a large integer, == knows no nan."""
    return type(a) is type(b) and (a == b if type(a) is int else repr(a) == repr(b))


def test_plain_data_crosses_both_ways_unchanged(tmp_path):
    setup = f'from math import inf, nan\n{inspect.getsource(same)}'
    tests = [f'v = {text}\nassert same(f(v), v) and same(f(x=v), v)' for text in VALUES]
    assert run_tests('def f(x): return x', tests, setup=setup) == 1
    with open(tmp_path / 'wire', 'wb') as file:      # the same functions, in this process
        file.write(judge.pack({1: (2.5, {math.inf})}, b'a'))
    with open(tmp_path / 'wire', 'rb') as file:
        assert judge.receive(file) == [{1: (2.5, {math.inf})}, b'a']
    assert run_tests('from collections import Counter\ndef f(): return Counter("aab")',
                     ['assert f() == {"a": 2, "b": 1} and type(f()) is dict']) == 1
    for unplain in (object(), print, int, range(3), iter([]), bytearray(b'a')):
        with pytest.raises(TypeError):
            judge.to_plain([unplain])


def test_exceptions_cross_by_their_builtin_type():
    code = ('class E(ValueError): pass\n'
            'def f(x):\n    if x: raise E("bad")\n    return {}["k"]')
    raises = 'try: f({})\nexcept {} as e: assert "{}" in str(e)\nelse: 1 / 0'
    tests = [raises.format(1, 'ValueError', 'bad'), raises.format(0, 'KeyError', 'k'),
             raises.format('0, y=1', 'TypeError', 'y'), 'try: g()\nexcept NameError: pass']
    assert run_tests(code, tests) == 1
    assert run_tests('def f(x): return {}["k"]', ['try: f(0)\nexcept KeyError as e: e.args[0][1]',
                                                  'try: f(0)\nexcept KeyError as e: e.args[0][0]']
                     ) == 1 / 2, 'k, without quotes'
    assert run_tests('def f(x): raise type("SystemExit", (Exception,), {})', TESTS) == 0
    loop = ['for y in map(f, [1, 2]): assert y == 7']
    assert run_tests('def f(x): raise StopIteration', loop) == 0


@pytest.mark.parametrize('change, before, after', [
    ('x.append(1)', '[]', '[1]'), ('x.clear()', '[1, 2]', '[]'), ('x.add(2)', '{1}', '{1, 2}'),
    ('x["b"] = x["a"].pop()', '{"a": [1]}', '{"a": [], "b": 1}'),
    ('x[0].append(1)', '([],)', '([1],)'),
    ('del x[0], x[0]["k"]', '[0, {"k": 1}, [2]]', '[{}, [2]]'), ('x = [3]', '[1]', '[1]')])
def test_what_a_function_does_to_its_arguments_is_done_in_the_tests(change, before, after):
    code = f'def f(x):\n    {change}\n    return 7'
    tests = [f'x = {before}\nassert f(x) == 7 and x == {after}',
             f'x = {before}\ny = [x]\nassert f(x=x) == 7 and y[0] is x and x == {after}']
    assert run_tests(code, tests) == 1


def test_parts_and_kinds_of_changed_arguments_stay_the_tests_own():
    test = ('from collections import OrderedDict, namedtuple\nP = namedtuple("P", "a b")\n'
            'row, d, p = [0], OrderedDict(a=1), P(1, 2)\nx = [row, d, p]\nf(x)\n'
            'assert row == [1] and x[0] is row and x[2].a == 1 and len(x) == 4\n'
            'assert type(d) is OrderedDict and d == dict(a=1, b=2)')
    assert run_tests('def f(x): x[0][0] = 1; x[1]["b"] = 2; x.append(None)', [test]) == 1


# ---- scores ----

def test_the_score_is_the_share_of_tests_passed():
    assert run_tests(HONEST, TESTS) == 1
    assert run_tests('def f(x): return 2', TESTS) == 1 / 3
    assert run_tests('def f(x):\n    if x < 0: input()\n    return 2 * x', TESTS) == 2 / 3
    assert run_tests(HONEST, []) == 0


def test_running_out_of_time_keeps_what_was_passed_and_a_breach_does_not():
    code = 'import os, sys\ndef f(x):\n    while x < 0: ACT\n    return 2 * x'
    assert run_tests(code.replace('ACT', 'pass'), TESTS, timeout=1.0) == 2 / 3
    for act in ('sys.exit(0)', 'os._exit(0)', 'open("/etc/passwd")', 'os.closerange(3, 64)'):
        assert run_tests(code.replace('ACT', act), TESTS, timeout=1.0) == 0, act


def test_each_function_and_case_of_a_test_file_counts():
    file = '''import pytest
import unittest
from solution import f as g, h
def test_plain(): assert g(1) == 2
def test_raises():
    with pytest.raises(ValueError): h("x")
@pytest.mark.parametrize("x, y", [(1, 2), (2, 4), pytest.param(3, 0)])
def test_cases(y, x): assert g(x) == y
@pytest.mark.parametrize("x", [1, 2])
def test_one(x): assert g(x) == pytest.approx(2 * x)
@pytest.mark.parametrize(argnames=("x",), argvalues=[(1,)])
def testRow(x): assert g(x) == 2
class Base:
    def test_method(self): assert g(5) == 10
@pytest.mark.parametrize("y", [0])
class TestF(Base):
    def test_method(self, y): super().test_method()
    def test_other(self, y): assert g(y) == 0
class TestInherited(Base): pass
class UnitTests(unittest.TestCase):
    def setUp(self): self.x = 1
    def test_unit(self): self.assertEqual(g(self.x), 2)
def helper(): 1 / 0
if __name__ == "__main__": unittest.main()
'''
    assert run_tests(HONEST + 'h = int', [file]) == 11 / 12
    assert run_tests(HONEST, [file]) == 10 / 12
    assert run_tests(HONEST, [file, 'assert f(1) == 2', '1 / 0']) == 11 / 14
    assert run_tests(HONEST, ['import solution\nassert solution.f(1) == 2',
                              'from solution import *\nassert f(1) == 2']) == 1


def test_tests_do_not_see_what_another_test_defined():
    tests = ['f = g = 1\nassert f == 1', 'assert f(1) == 2 and g(1) == 3', 'assert callable(g)']
    assert run_tests(HONEST + 'def g(x): return 3', tests) == 1


def test_setup_helpers_and_entry_point():
    setup = ('import math\ndef f(x):\n    """the prompt, without a body"""\n'
             'def twice(x): return x + x\ndef via(x): return f(x)')
    check = ('def check(candidate):\n    assert candidate(2) == twice(2)\n'
             '    assert math.isclose(candidate(.1), .2)\ncheck(f)')
    assert run_tests(HONEST, [check, 'assert via(4) == 8'], 'f', setup) == 1
    assert run_tests('from __future__ import annotations\n' + HONEST, [check], 'f', setup) == 1
    assert run_tests('def f(x): pass', [check], 'f', setup) == 0
    assert run_tests(HONEST, [check], 'g', setup) == 0


def test_packages_are_for_the_tests_and_not_for_the_program():
    tests = ['import numpy as np\nassert np.allclose(f(np.float64(1)), 2)']
    assert run_tests(HONEST, tests, timeout=10) == 1
    assert run_tests(HONEST, tests, setup='import numpy', timeout=10) == 1
    for code in ('import numpy\n' + HONEST, 'import judge\n' + HONEST, 'import nano\n' + HONEST):
        assert run_tests(code, TESTS) == 0, code


def test_the_same_completion_gets_the_same_score():
    """The order of a set of strings and the random numbers are those of a fixed seed."""
    code = 'import random\ndef f(): return list(set("abcdef")), random.random()'
    tests = [f'assert f()[0][0] < "{c}"' for c in 'bcdef']
    tests += [f'import random\nassert random.random() < {k / 20}' for k in range(20)]
    tests += [f'assert f()[1] < {k / 20}' for k in range(20)]
    assert len({run_tests(code, tests) for _ in range(3)}) == 1


def test_the_library_can_be_imported():
    names = '''abc array ast bisect calendar collections.abc contextlib copy csv dataclasses
        datetime decimal difflib enum fractions functools hashlib heapq inspect io itertools json
        logging math operator os pathlib pprint queue random re secrets statistics string struct sys
        textwrap threading time traceback types typing unicodedata unittest uuid warnings zlib'''
    code = f'import {", ".join(names.split())}' + '''
@dataclasses.dataclass
class P:
    x: int
def f(x):
    assert hashlib.md5(b"a").hexdigest() and datetime.date(2020, 1, 1).strftime("%A")
    random.shuffle([1, 2]); warnings.warn("w"); print(P(1)); sys.stdout.flush(); time.sleep(.001)
    copy.deepcopy([P(1)]); inspect.signature(f); eval("1 + 1"); sys.setrecursionlimit(5000)
    return 2 * functools.lru_cache(None)(P)(x).x'''
    assert run_tests(code, TESTS, timeout=5) == 1


def test_secrets_of_the_environment_are_not_passed_on(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'secret')
    assert run_tests('import os\ndef f(): return [*os.environ]',
                     ['assert "HF_TOKEN" not in f()']) == 1


def test_many_at_once_from_threads(trap):
    codes = [HONEST, 'def f(x): return 0', tried('os.fork()'), 'def f(x):\n    while True: pass']
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda code: run_tests(code, TESTS, timeout=1.5), codes * 3))
    assert scores == [1, 0, 0, 0] * 3 and threading.active_count() < 20
