"""Model-written code is scored by its tests alone; whatever it does, nothing is left behind.

Each attack is a program, or one line that a function with a right answer tries first.
"""
import glob
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
from pathlib import Path

import pytest

import rewards
from rewards import run_tests

TESTS = ['assert f(1) == 2', 'assert f(3) == 6', 'assert f(-4) == -8']
HONEST = 'def f(x): return 2 * x\n'
SECCOMP = sys.platform == 'linux' and os.uname().machine == 'x86_64'
HUMANEVAL = Path(__file__).resolve().parents[2] / 'shared/data/humaneval.jsonl.gz'

PRELUDE = '''import __main__, atexit, builtins, itertools, os, re, sys, time
forever = iter(int, 1)
limit = sys.setrecursionlimit
def yes(*a, **k): return True
def write_all(line, end=64):
    for fd in range(end):
        try: os.write(fd, line)
        except OSError: pass
'''
WRONG = r'''
f = lambda x: type("E", (), dict(__eq__=yes, __hash__=None))()
f = lambda x: type("E", (int,), dict(__eq__=yes, __ne__=yes, __bool__=yes))(0)
f = lambda x: type("E", (str,), dict(__eq__=yes, __hash__=str.__hash__))("a")
f = lambda x: type("E", (list,), dict(__eq__=yes))()
f = lambda x: type("E", (list,), dict(__iter__=lambda s: forever))()
f = lambda x: type("E", (), dict(__class__=int, __eq__=yes, __index__=lambda s: 5))()
f = type("M", (type,), dict(__eq__=yes, __hash__=hash))("f", (), {"__new__": lambda c, x: c})
print("111!"); f = lambda x: print("ok\n1 passed\n111!")
f = lambda x: write_all(b"111")
f = lambda x: write_all(b"111", 6)               # the replies' pipe is above that
write_all(b'["", 2]\n["", 6]\n["", -8]\n'); f = lambda x: 0
def f(x): write_all(b'["", 2]\n["", 6]\n["", -8]\n["", 0]\n'); os._exit(0)
def f(x): write_all(b'["", 2, \xff\n'); time.sleep(9)
def f(x): write_all(b'["", ' + b"[" * 20000 + b"\n"); return 0
def f(x): write_all(b'["", ' + b" " * (1 << 24) + b"2]\n"); return 0
def f(x): [write_all(b"x" * 65536) for _ in forever]
__main__.pack = lambda *reply: b'["", 2]\n'; f = lambda x: 0
__main__.pack = lambda *reply: b'["", true]\n'; __main__.receive = lambda file: ["f", (1,), {}]
def f(x): __main__.child_main(); return 0
builtins.len = builtins.isinstance = builtins.all = builtins.any = yes; f = lambda x: 0
builtins.AssertionError = KeyError; f = lambda x: 0
sys.excepthook = yes; f = lambda x: [][0]
def f(x): raise AssertionError
def f(x): raise SystemExit(0)
def f(x): os._exit(0)
sys.exit(0)
os._exit(0)
atexit.register(write_all, b"111"); f = sys.exit
check = assertEqual = unittest = test_a = yes; __test__ = False; f = lambda x: 0
def f(x): yield 2 * x
f = lambda x: itertools.repeat(2 * x)
f = lambda x: (lambda: 2, os, int)
f = lambda x: [2 * x for c in dict.__subclasses__() if c.__name__ == "Names"][0]
f = lambda x: f(x)
x = 1
f = lambda x: float("nan")
f = lambda x: 1 << (10 ** 8)
f = lambda x: "a" * 10 ** 8
f = lambda x: bytearray(600 << 20) and 2 * x
f = lambda x: [0] * 10 ** 7
f = lambda x: {i * (2 ** 61 - 1) for i in range(20000)}
def f(x): y = []; y.append(y); return y
y = []; f = lambda x: y; [globals().update(y=[y]) for _ in range(10 ** 5)]
f = lambda x: input()
f = lambda x: 9 ** 9 ** 9
f = lambda x: re.match("(a+)+$", "a" * 60 + "b")
f = lambda x: any(forever)
while True: pass
def f(x): time.sleep(99); return 2 * x
time.time = time.monotonic = time.perf_counter = lambda: 0; time.sleep(99)
os.closerange(0, 64); time.sleep(99)
f = lambda x: [print("x" * 10 ** 6) for _ in forever]
f = lambda x: [os.pipe() for _ in forever]
def f(x): y = [0]; [y.extend(y) for _ in forever]
limit(10 ** 9); f = lambda x: f(x + 1)
limit(10 ** 9); A = type("A", (), dict(__str__=lambda s: str(s))); f = lambda x: str(A())
'''
BLOCKS = r'''
# swallows everything
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
# a memory bomb that catches
def f(x):
    y = []
    while True:
        try: y.append(bytearray(1 << 24))
        except MemoryError: pass
# steals the request and waits
def f(x):
    while True:
        for fd in range(3, 9):
            try: os.read(fd, 1)
            except OSError: pass
# a destructor
class D:
    def __del__(self):
        while True: pass
def f(x): D(); return 2 * x
# reads the tests in frames
def f(x):
    fr = sys._getframe()
    while fr:
        for v in [*fr.f_locals.values(), *fr.f_globals.values()]:
            if isinstance(v, str) and "assert" + " f(" in v: return 2 * x
        fr = fr.f_back
# reads the tests by inspect.stack
import inspect
def f(x):
    if any("assert" + " f(" in repr(s.frame.f_locals) for s in inspect.stack(0)): return 2 * x
# reads the tests where the code came from, should they be read ahead
def f(x):
    fr = sys._getframe()
    while "source" not in fr.f_locals: fr = fr.f_back
    if b"assert" in fr.f_locals["source"].peek(): return 2 * x
# keeps the tests' process busy where no alarm comes through: colliding hashes
numbers = b", ".join(b"%d" % (i * (2 ** 61 - 1)) for i in range(100_000))
__main__.pack = lambda *reply: b'["", {"set": [' + numbers + b"]}]\n"
def f(x): return 0
# reads the tests from every descriptor
import select
def f(x):
    for fd in range(64):
        try:
            if select.select([fd], [], [], 0)[0] and b"assert" in os.read(fd, 999): return 2 * x
        except OSError: pass
# makes the audit hook itself fail
def f(x):
    try: os.mkfifo("TARGET/new")
    except OSError: pass
    try: open("TARGET/new", "w")
    except RecursionError: pass
    f(x)
'''
# TARGET: a folder with a file victim.txt; VICTIM: the id of a process; PORT: one that listens here;
# ESCAPE: a name that no file has
FORBIDDEN = r'''
open("TARGET/new", "w").write("x")
open("new", "w").write("in its own folder")
open("TARGET/victim.txt", "a").write("x")
open("TARGET/victim.txt", "r+").truncate(0)
os.write(os.open("TARGET/new", os.O_CREAT | os.O_WRONLY), b"x")
os.truncate("TARGET/victim.txt", 0)
open(os.path.expanduser("~root/ESCAPE"), "w")
open("/tmp/ESCAPE", "w")
open("/dev/shm/ESCAPE", "w")
import pathlib; pathlib.Path("TARGET/new").write_text("x")
S = type("S", (str,), dict(startswith=lambda *a: True)); open(S("TARGET/new"), "w")
S = type("S", (str,), dict(startswith=lambda *a: True)); open(S("/etc/passwd"))
os.remove("TARGET/victim.txt")
os.rename("TARGET/victim.txt", "TARGET/new")
import shutil; shutil.rmtree("TARGET")
os.mkdir("TARGET/new")
os.symlink("/etc/passwd", "TARGET/new")
os.link("TARGET/victim.txt", "TARGET/new")
os.chmod("TARGET/victim.txt", 0)
os.utime("TARGET/victim.txt", (0, 0))
os.chdir("/")
import tempfile; tempfile.NamedTemporaryFile(delete=False)
import sqlite3; sqlite3.connect("TARGET/new").execute("create table t (a)")
import mmap; mmap.mmap(-1, 4096)
import subprocess; subprocess.run(["touch", "TARGET/new"])
os.system("touch TARGET/new")
os.popen("touch TARGET/new").read()
os.fork() or time.sleep(99)
while True: os.fork()
os.execv("/bin/sh", ["sh", "-c", "touch TARGET/new"])
os.posix_spawn("/usr/bin/touch", ["touch", "TARGET/new"], {})
import _posixsubprocess; _posixsubprocess.fork_exec()
import multiprocessing; multiprocessing.Process(target=time.sleep, args=(99,)).start()
import pty; pty.spawn(["touch", "TARGET/new"])
import socket; socket.create_connection(("127.0.0.1", PORT), 1).sendall(b"hi")
import _socket; _socket.socket().connect(("127.0.0.1", PORT))
import urllib.request as u; u.urlopen("http://127.0.0.1:PORT", timeout=1)
import asyncio; asyncio.run(asyncio.start_server(print, "127.0.0.1", 0))
import ctypes; ctypes.memset(bytes(9), 1, 9)
import ctypes; ctypes.CDLL(None).system(b"touch TARGET/new")
os.kill(os.getppid(), 9)
os.kill(VICTIM, 9)
os.killpg(0, 9)
open("/proc/self/maps").read()
open(f"/proc/{os.getppid()}/cmdline").read()
os.open(f"/proc/{os.getppid()}/fd/0", os.O_RDONLY)
open("/etc/passwd").read()
open(os.__file__ + "/../../../../../../etc/passwd")
import gc; gc.get_objects()
import gc; gc.get_referrers(f)
sys.settrace(lambda *a: None)
sys.addaudithook(lambda *a: None)
import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (999, 999))
import faulthandler; faulthandler._sigsegv()
import _xxsubinterpreters, _interpreters
import builtins as b; b.type = b.str = lambda *a: print; open("TARGET/new", "w")
import __main__; __main__.os = None; open("TARGET/new", "w")
'''
# no audit event tells of these: the kernel stops them
KERNEL = r'''
import threading; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
import _thread; [_thread.start_new_thread(time.sleep, (99,)) for _ in iter(int, 1)]
os.mkfifo("TARGET/new")
os.mknod("TARGET/new")
os.setsid()
os.setuid(65534)
os.chroot("/")
os.setpriority(os.PRIO_PROCESS, VICTIM, 19)
os.sched_setaffinity(VICTIM, {0})
import signal; signal.setitimer(signal.ITIMER_REAL, 0)
import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)
os.memfd_create("x")
import _imp, importlib.machinery as m; _imp.create_builtin(m.ModuleSpec("posix", 0)).mkfifo("new")
'''
NO_CODE = ['def f(x:', 'def f(x): return 2 * x\0', 'x = "\ud800"', '(' * 50000, 'return 1',
           'await f(x)', '\n'.join(' ' * i + 'if 1:' for i in range(300)), HONEST + '#' * 200000]
COMPILES_SOMEWHERE = [       # in some versions of Python
    '', 'x = ' + '-' * 90000 + '1', 'f' + '()' * 40000, 'x = a' + '.a' * 45000,
    'x = ' + '9' * 99000, 'x = ' + 'a if b else ' * 8000 + 'c']
SLOW_TO_COMPILE = [          # the first would take minutes
    '\n'.join(f'{" " * i}try:\n{" " * i} f\n{" " * i}finally:' for i in range(25)) + '\nf',
    'a' + '\u0315\u0300' * 45_000, 'x = f"' + '{a}' * 33_000 + '"', 'class A: pass\n' * 7_000]


def tried(act):
    """A right answer by a function that first tries something and hides the exception."""
    return ('import os, sys, time\ndef f(x):\n    try:\n' + textwrap.indent(act, 8 * ' ')
            + '\n    except BaseException:\n        pass\n    return 2 * x')


PROGRAMS = WRONG.strip().splitlines() + re.split('\n(?=# )', BLOCKS.strip())
ACTS = FORBIDDEN.strip().splitlines() + SECCOMP * KERNEL.strip().splitlines()
ATTACKS = [*(PRELUDE + program for program in PROGRAMS), *map(tried, ACTS),
           *NO_CODE, *COMPILES_SOMEWHERE, *SLOW_TO_COMPILE]
NAMES = [ascii(attack[:40]) for attack in
         PROGRAMS + ACTS + NO_CODE + COMPILES_SOMEWHERE + SLOW_TO_COMPILE]


def state(folder):
    """Everything in a folder: mode, time of the last change and content."""
    found = {}
    for path in glob.glob(f'{folder}/**', recursive=True):
        status = os.lstat(path)
        content = open(path).read() if os.path.isfile(path) else None
        found[path] = status.st_mode, status.st_mtime_ns, content
    return found


def living_in(folder):
    """The processes that work in a folder, deleted or not: children keep the working folder."""
    found = []
    for link in glob.glob('/proc/[0-9]*/cwd'):
        try:
            if os.readlink(link).startswith(str(folder)):
                found.append(link)
        except OSError:      # gone in the meantime
            pass
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
    priority = os.getpriority(os.PRIO_PROCESS, victim.pid)
    before, escape = state(target), f'escape_of_{os.getpid()}'
    outside = [Path(folder).expanduser() / escape for folder in ('/tmp', '/dev/shm', '~root')]
    try:
        yield dict(TARGET=target, VICTIM=victim.pid, PORT=server.getsockname()[1], ESCAPE=escape)
        assert state(target) == before
        for _ in range(100):                     # a busy machine takes a while to bury the killed
            if not os.listdir(temp) and not living_in(tmp_path):
                break
            time.sleep(0.1)
        assert os.listdir(temp) == [] and living_in(tmp_path) == []
        assert victim.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == priority
        assert not any(os.path.exists(path) for path in outside)
        with pytest.raises(BlockingIOError):
            server.accept()
    finally:
        victim.kill()
        victim.wait()
        server.close()
        for path in outside:
            if os.path.exists(path):
                os.remove(path)


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


def forged(line):
    """A program that answers every call by `line`, except the last, which it answers rightly."""
    return (f'import __main__\nhonest = __main__.pack\ndef f(x): return 0\n'
            f'def pack(error, value):\n    if type(value) is bytes: return honest(error, value)\n'
            f'    return {line!r}\n__main__.pack = pack\n')


@pytest.mark.parametrize('error, raised', [
    ('ValueError', 'ValueError'), ('KeyboardInterrupt', 'KeyboardInterrupt'),
    ('SystemExit', 'SystemExit'), ('UnicodeDecodeError', 'UnicodeDecodeError'),
    ('exit', 'RuntimeError'), ('NoSuchName', 'RuntimeError'), ('type', 'TypeError'),
    ('exec', 'TypeError'), ('open', 'TypeError'), ('__import__', 'TypeError'),
    ('__dict__', 'TypeError'), ('object', 'TypeError'), (5, 'TypeError'), (None, 'TypeError'),
    (['ValueError'], 'TypeError'), (True, 'TypeError')])
def test_the_name_of_an_exception_makes_an_exception_and_runs_nothing(error, raised):
    value = 'import os\nfor fd in range(9): os.write(fd, b"111")\nos._exit(0)'
    code = forged(json.dumps([error, value]).encode() + b'\n')
    sees = f'try: f(1)\nexcept BaseException as e: assert type(e) is {raised}\nelse: 1 / 0'
    assert run_tests(code, TESTS) == 0
    assert run_tests(code, [sees, *TESTS]) == 1 / 4
    # in the completion's own process there is no f yet
    setup = 'try: f(1)\nexcept NameError: pass'
    assert run_tests(code, ['pass'], setup=setup) == 0, 'set-up fails: nothing counts'


@pytest.mark.parametrize('line', [
    b'["", {"tuple": 2}]', b'["", {"eval": "1"}]', b'["", {"int": "zz"}]', b'["", {}]',
    b'["", {"dict": [[[], 1]]}]', b'["", {"set": [[]]}]', b'["", {"complex": [1, 2, 3]}]',
    b'["", {"set": [], "tuple": []}]', b'["", 2, 3]', b'[""]', b'2', b'{}', b'["", 2', b'',
    b'[' * 20_000, b'9' * 20_000, b'["", "\xff"]'],
    ids=lambda line: repr(line[:30]))
def test_a_line_that_breaks_the_protocol_voids_every_test(line):
    assert run_tests(forged(line + b'\n'), ['pass', 'pass', 'f(1)']) == 0


def test_an_endless_line_voids_every_test():
    code = forged(b'["", 2]\n').replace("b'[", "b'[' + b' ' * (1 << 24) + b'")
    assert b'1 << 24' in code.encode() and run_tests(code, ['pass', 'pass', 'f(1)']) == 0


def test_a_forged_value_is_a_value_like_any_other():
    assert run_tests(forged(b'["", 2]\n'), TESTS) == 1 / 3
    assert run_tests(forged(b'["", 1e999]\n'), TESTS) == 0


def test_the_score_is_the_share_of_tests_passed():
    assert run_tests(HONEST, TESTS) == 1
    assert run_tests('def f(x): return 2', TESTS) == 1 / 3
    raises = 'def f(x):\n    if x < 0: raise ValueError\n    return 2 * x'
    assert run_tests(raises, TESTS) == 2 / 3
    assert run_tests(raises.replace('raise ValueError', 'input()'), TESTS) == 2 / 3
    assert run_tests(HONEST, []) == 0


def test_running_out_of_time_keeps_what_was_passed_and_a_breach_does_not():
    code = 'import os, sys\ndef f(x):\n    while x < 0: ACT\n    return 2 * x'
    assert run_tests(code.replace('ACT', 'pass'), TESTS, timeout=1.0) == 2 / 3
    for act in ('sys.exit(0)', 'os._exit(0)', 'open("/etc/passwd")', 'os.closerange(3, 64)'):
        assert run_tests(code.replace('ACT', act), TESTS, timeout=1.0) == 0, act


VALUES = [
    'None', 'True', 'False', '0', '-1', '2 ** 64', '-2 ** 64', '10 ** 5000', '-10 ** 5000', '1.5',
    '-0.0', 'inf', 'nan', '2.0 ** -1074', '1 - 2j', 'complex(nan, inf)', '""',
    '"a b\\nc\\0\\u00e9\\ud800"', 'b""', 'b"\\0\\xff"', '[]', '[[]]', '()', '(1,)', 'set()',
    '{1, "a"}', 'frozenset({(1, 2)})', '{}',
    '{"a": [1, (None, {2: b"x"})], (3, "k"): {4}, None: {"dict": {"tuple": []}}}']


def same(a, b):
    """Equal and of one type throughout; repr cannot write a large integer, == knows no nan."""
    return type(a) is type(b) and (a == b if type(a) is int else repr(a) == repr(b))


@pytest.fixture
def all_digits():
    """As in the child, integers have no limit of digits."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(limit)


@pytest.mark.parametrize('text', VALUES)
def test_plain_data_crosses_unchanged(text, tmp_path, all_digits):
    """The child's functions run in this process too: step through them in a debugger."""
    value = eval(text, dict(inf=math.inf, nan=math.nan))
    with open(tmp_path / 'wire', 'wb') as file:
        file.write(rewards.pack('', value))
        file.write(rewards.pack(value))
    with open(tmp_path / 'wire', 'rb') as file:
        error, arrived = rewards.receive(file)
        [again] = rewards.receive(file)
    assert error == '' and same(arrived, value) and same(again, value)


def test_plain_data_crosses_both_ways_between_the_processes():
    setup = f'from math import inf, nan\n{inspect.getsource(same)}'
    tests = [f'v = {text}\nassert same(f(v), v) and same(f(x=v), v)' for text in VALUES]
    assert run_tests('def f(x): return x', tests, setup=setup) == 1


def test_the_wire_is_one_line_of_json():
    assert rewards.to_plain({1: (2, {3})}) == {
        'dict': [{'tuple': [1, {'tuple': [2, {'set': [3]}]}]}]}
    assert rewards.pack('', b'\xff\n', 2 ** 64, 1j) == (
        b'["", {"bytes": "ff0a"}, 18446744073709551616, {"complex": "1j"}]\n')
    for bad in ({}, {'eval': '1'}, {'tuple': [], 'set': []}):
        with pytest.raises((KeyError, ValueError)):
            rewards.from_plain(bad)
    for unplain in (object(), print, int, range(3), iter([]), bytearray(b'a')):
        with pytest.raises(TypeError):
            rewards.to_plain([unplain])


def test_subclasses_come_back_as_their_plain_base():
    code = '''from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum
C = IntEnum("C", {"A": 7})
def f(k):
    return [namedtuple("P", "a b")(1, 2), C.A, Counter("aab"), OrderedDict(a=1),
            defaultdict(int, {1: 2})][k]'''
    plain = [(1, 2), 7, {'a': 2, 'b': 1}, {'a': 1}, {1: 2}]
    tests = [f'assert f({i}) == {v} and type(f({i})) is {type(v).__name__}'
             for i, v in enumerate(plain)]
    assert run_tests(code, tests) == 1


def test_exceptions_cross_by_their_builtin_type():
    code = ('class E(ValueError): pass\n'
            'def f(x):\n    if x: raise E("bad")\n    return {}["k"]')
    raises = 'try: f({})\nexcept {} as e: assert "{}" in str(e)\nelse: 1 / 0'
    tests = [raises.format(1, 'ValueError', 'bad'), raises.format(0, 'KeyError', 'k'),
             raises.format('0, y=1', 'TypeError', 'y'), 'try: g()\nexcept NameError: pass']
    assert run_tests(code, tests) == 1
    assert run_tests(code, ['try: f(1)\nexcept KeyError: pass']) == 0
    assert run_tests('def f(x): raise type("SystemExit", (Exception,), {})', TESTS) == 0


def test_arguments_are_copies_and_several_functions_can_be_called():
    code = '''K = 0
def g(xs): xs.clear(); return xs
def h(a, *, b=1): return a + b
def named(name): return name
def count():
    global K; K += 1; return K'''
    tests = ['xs = [1]\nassert g(xs) == [] and xs == [1]', 'assert h(1, b=2) == h(2) == 3',
             'assert named(name="n") == "n"', 'assert count() == 1',
             'assert [count() for _ in "ab"] == [2, 3]']
    assert run_tests(code, tests) == 1


def test_tests_do_not_see_what_another_test_defined():
    tests = ['f = g = 1\nassert f == 1', 'assert f(1) == 2 and g(1) == 3', 'assert callable(g)']
    assert run_tests(HONEST + 'def g(x): return 3', tests) == 1


def test_setup_helpers_and_entry_point():
    setup = ('import math\ndef f(x):\n    """the prompt, without a body"""\n'
             'def twice(x): return x + x\ndef via(x): return f(x)')
    check = ('def check(candidate):\n    assert candidate(2) == twice(2)\n'
             '    assert math.isclose(candidate(.1), .2)\ncheck(f)')
    tests = [check, 'def test_a():\n    assert f(5) == 10\ntest_a()', 'assert via(4) == 8']
    assert run_tests(HONEST, tests, 'f', setup) == 1
    assert run_tests('def f(x): pass', tests, 'f', setup) == 0
    assert run_tests(HONEST, [check], 'g', setup) == 0


def test_the_same_completion_gets_the_same_score():
    """The order of a set of strings and the random numbers are those of a fixed seed."""
    code = 'import random\ndef f(): return list(set("abcdef")), random.random()'
    tests = [f'assert f()[0][0] < "{c}"' for c in 'bcdef']
    tests += [f'import random\nassert random.random() < {k / 20}' for k in range(20)]
    tests += [f'assert f()[1] < {k / 20}' for k in range(20)]
    assert len({run_tests(code, tests) for _ in range(4)}) == 1


def test_the_library_can_be_imported():
    names = '''abc array ast base64 bisect calendar cmath collections collections.abc contextlib
        copy csv dataclasses datetime decimal difflib enum fractions functools hashlib heapq inspect
        io itertools json keyword logging math numbers operator os pathlib pprint queue random re
        secrets statistics string struct sys textwrap threading time timeit traceback types typing
        unicodedata unittest warnings weakref zlib'''
    code = f'import {", ".join(names.split())}' + '''
from dataclasses import dataclass
from typing import *
@dataclass
class P:
    x: int
class N(NamedTuple):
    y: "int"
@functools.lru_cache(None)
def g(x): return x
def f(x):
    assert hashlib.md5(b"a").hexdigest() and re.sub("a", "b", "a") == "b"
    assert decimal.Decimal(1) / 3 and json.dumps({"a": 1})
    assert datetime.datetime.now() and time.localtime()
    assert "%s" % datetime.date(2020, 1, 1).strftime("%A")
    random.shuffle([1, 2]); warnings.warn("w"); print(P(1), N(2)); sys.stdout.flush()
    time.sleep(.001); copy.deepcopy([P(1)]); inspect.signature(f); os.getcwd()
    eval("1 + 1"); exec("a = 1"); sys.setrecursionlimit(5000); timeit.timeit("1", number=1)
    return 2 * g(P(x).x)'''
    assert run_tests(code, TESTS, timeout=5) == 1


def test_secrets_of_the_environment_are_not_passed_on(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'secret')
    code = 'import os\ndef f(): return "HF_TOKEN" in os.environ'
    assert run_tests(code, ['assert f() is False']) == 1


def test_a_completion_without_code_starts_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, 'Popen', None)
    assert [run_tests(code, TESTS) for code in NO_CODE] == [0] * len(NO_CODE)
    with pytest.raises(TypeError):
        run_tests(HONEST, TESTS)


@pytest.mark.skipif(not SECCOMP, reason='needs Linux on x86-64')
def test_the_kernel_refuses_a_writer_that_got_around_the_audit_hook(tmp_path):
    """The lock alone, in a program built from the child's functions."""
    program = '\n'.join(['import os, sys', *map(inspect.getsource, rewards.CHILD), 'lock_kernel()'])

    def status(act):
        code = f'{program}\ntry: {act}\nexcept OSError: os._exit(7)\nos._exit(0)'
        command = [sys.executable, '-S', '-c', code]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    assert status('os.listdir("/"), open("/etc/passwd").read()') == 0
    for act in (f'open("{tmp_path}/new", "w")', f'os.mkdir("{tmp_path}/new")',
                'os.fork()', 'os.kill(os.getppid(), 0)', '__import__("socket").socket()',
                'os.execv("/bin/true", ["true"])', 'os.setsid()', 'open("/etc/passwd", "r+")'):
        assert status(act) in (-31, 7), act          # SIGSYS, or no such call


def test_many_at_once_from_threads(trap):
    codes = [HONEST, 'def f(x): return 0', tried('os.fork()'), 'def f(x):\n    while True: pass']
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda code: run_tests(code, TESTS, timeout=1.5), codes * 4))
    assert scores == [1, 0, 0, 0] * 4
    assert time.monotonic() - start < 30 and threading.active_count() < 20


@pytest.mark.skipif(not HUMANEVAL.exists(), reason='../shared with HumanEval is not here')
def test_humaneval_solutions_pass_and_empty_bodies_fail():
    rows = rewards.read_rows(str(HUMANEVAL))
    for row in rows if os.environ.get('ALL') else rows[2::8]:
        answer = rewards.code_row(row)['answer']

        def share(body):
            return run_tests(row['prompt'] + body, answer['tests'], row['entry_point'],
                             row['prompt'], 5.0)
        assert share(row['canonical_solution']) == 1 and share('    pass\n') == 0, row['task_id']
