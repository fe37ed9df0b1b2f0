"""Runs a program that a model wrote against its tests. rewards.run_tests starts this file.

    echo '["", "def twice(x): return 2 * x", 2.0]
    ["", ["assert twice(1) == 2", "assert twice(3) == 5"], "twice", []]' | python -S assets/judge.py
prints ..1 and, on stderr, why the second test fails: a dot per test, a 1 per test passed, a ! if
the program broke the rules. Of the two lines that it reads the first is for the program's process:
set-up, program, seconds. The second is for the tests' process: set-up, tests, entry point, folders
of packages. A test is a source; one with functions test... counts as so many tests.

Tests and program never share a memory. This process reads the program's line and forks; the fork
locks itself in and runs the program; only after the fork does the first process, the trusted one,
read the tests. It may import installed packages, for it never runs the program: a function that the
tests call is called over a pipe. Only plain data, None to dict, cross; results are copies, and
lists, dicts and sets that a function was given are changed in the tests as the function changed
them. Verdicts go over a pipe that the program's process never had.

What locks the program in:
- Resource limits: memory 512 MiB, no byte written to a file, no process started, CPU time.
- The audit hook, everywhere: ends the process at any event of the interpreter that a function of
  plain data has no need of: processes, network, files outside Python's own library or for
  writing, ctypes, tracing, garbage collection. Names in folders may be listed. What raises no event
  (mkfifo, signals) it misses.
- seccomp, on Linux x86-64: the kernel lets the process compute and read files, no more. Reading is
  the hook's to stop. Elsewhere hook and limits stand alone.
This stops cheats and accidents, not a determined attacker who knows a hole in CPython: use a
container. An edit of this file reaches a run that goes on.
"""
import builtins
import contextlib
import functools
import json
import os
import random
import signal
import sys


# ---- plain data over the pipes, one line of JSON each ----

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


# ---- the program's process: the two locks, then its code, then calls of its functions ----

# Linux x86-64's numbers of the calls that compute, read and wait
ALLOWED_CALLS = dict(
    read=0, write=1, close=3, stat=4, fstat=5, lstat=6, poll=7, lseek=8, mmap=9, mprotect=10,
    munmap=11, brk=12, rt_sigreturn=15, pread64=17, access=21, select=23, sched_yield=24, mremap=25,
    madvise=28, nanosleep=35, getpid=39, exit=60, uname=63, getcwd=79, readlink=89, gettimeofday=96,
    getrlimit=97, getrusage=98, sysinfo=99, times=100, getuid=102, getgid=104, geteuid=107,
    getegid=108, getppid=110, gettid=186, time=201, futex=202, sched_getaffinity=204,
    getdents64=217, clock_gettime=228, clock_getres=229, clock_nanosleep=230, exit_group=231,
    newfstatat=262, readlinkat=267, faccessat=269, pselect6=270, getrandom=318)
# Python's library tries these and goes on without them: they fail, all other calls kill
MISSING_CALLS = dict(ioctl=16, fcntl=72, prctl=157, epoll_create1=291)
FIRST_NEW_CALL = 332         # from here on, too: libraries try new calls and fall back to old ones
OPEN_CALLS = {257: 2, 2: 1}  # openat and open: which argument holds the flags
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
X86_64 = 0xC000003E          # AUDIT_ARCH_X86_64


def lock_kernel():
    """seccomp: from now on the kernel lets this process compute and read, or kills it.

    The kernel runs a small program at each call of its own. Loads read the call's description: its
    number at byte 0, the machine at 4, argument i at 16 + 8 i. Jumps say how many rules to skip.
    """
    if sys.platform != 'linux' or os.uname().machine != 'x86_64':
        return
    import ctypes
    import struct
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06       # linux/filter.h
    kill, allow, no_such_call = 0x80000000, 0x7FFF0000, 0x50026              # linux/seccomp.h

    def rule(operation, value, if_true=0, if_false=0):
        return struct.pack('HBBI', operation, if_true, if_false, value)

    def only_for(call, *then):
        return [rule(equal, call, 0, len(then)), *then]
    program = [rule(load, 4), rule(equal, X86_64, 1, 0), rule(end, kill)]    # 64-bit calls only
    program += [rule(load, 0), rule(at_least, FIRST_NEW_CALL, 0, 1), rule(end, no_such_call)]
    for call in MISSING_CALLS.values():
        program += only_for(call, rule(end, no_such_call))
    for call in ALLOWED_CALLS.values():
        program += only_for(call, rule(end, allow))
    for call, argument in OPEN_CALLS.items():
        program += only_for(call, rule(load, 16 + 8 * argument), rule(any_bit, WRITING, 1, 0),
                            rule(end, allow), rule(end, kill))
    program = b''.join([*program, rule(end, kill)])
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack('HQ', len(program) // 8, ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None).prctl
    prctl(1, signal.SIGKILL)                         # PR_SET_PDEATHSIG: it dies with the judge
    prctl(38, 1, 0, 0, 0)                            # PR_SET_NO_NEW_PRIVS
    prctl(22, 2, header)                             # PR_SET_SECCOMP; a refusal is not insisted on


def add_audit_hook(die=os._exit, kind=type, text=str, integer=int, writing=WRITING):
    """Ends the process at any event that a function of plain data has no need of.

    What the hook uses are closure variables: the program can patch builtins.
    """
    fine = frozenset('''compile exec marshal.loads code.__new__ function.__new__ object.__getattr__
        object.__setattr__ object.__delattr__ sys._getframe sys._getframemodulename
        sys.unraisablehook builtins.id array.__new__ time.sleep pickle.find_class os.listdir
        os.scandir os.putenv os.unsetenv builtins.input builtins.input/result'''.split())
    banned = frozenset('''ctypes _ctypes _posixsubprocess _interpreters _xxsubinterpreters
        _testcapi'''.split())
    library = tuple(folder + '/' for folder in sys.path if folder)           # '' would be all files

    def hook(event, args):   # exact types only: a method of the program's would run in here
        if event in fine:
            return
        name = args[0] if args else None
        is_text = kind(name) is text
        if event == 'import' and is_text and name.rpartition('.')[2] not in banned:
            file = args[1]       # of a module in C; site-packages/ lies in the library's folder
            if kind(file) is not text or '-packages/' not in file:
                return
        if event == 'open' and is_text and name.startswith(library) and '/..' not in name:
            if '-packages/' not in name and kind(args[2]) is integer and not args[2] & writing:
                return
        die(1)               # at once, so that catching the exception is no use
    sys.addaudithook(hook)


def limit_resources(seconds):
    import resource
    limits = dict(AS=512 << 20, CPU=int(seconds) + 2, NOFILE=32,     # bytes, seconds, files
                  FSIZE=0, CORE=0, NPROC=0)
    for name, most in limits.items():
        try:
            resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (most, most))
        except (AttributeError, ValueError, OSError):
            pass                                     # not on this system


def run_program(setup, code, seconds, calls, replies):
    """Locks this process in, runs the program, then answers calls of its functions.

    A call is [name, args, kwargs]. A reply is ['', result, args, kwargs], the arguments as the
    function left them, or [name of an exception, its text].
    """
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)    # should the others die, this one ends too
    limit_resources(seconds)
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
    with contextlib.suppress(ImportError):           # packages are the tests' alone
        exec(setup, names)
    exec(compile(code, '<completion>', 'exec'), names)
    while True:
        name, args, kwargs = receive(calls)
        try:
            if name not in names:
                raise NameError(name)
            result = names[name](*args, **kwargs)
            reply = pack('', result, args, kwargs)
        except Exception as e:
            kinds = type(e).__mro__                  # an own exception arrives as its base
            known = [kind.__name__ for kind in kinds if kind.__module__ == 'builtins']
            text = str(e)
            if len(e.args) == 1 and isinstance(e.args[0], str):
                text = e.args[0]     # without the quotes that str puts around a KeyError's
            reply = pack(known[0], text)
        os.write(replies, reply)


# ---- the tests' process ----

def change_in_place(old, new):
    """Makes `old`, which the tests hold, equal to `new`, what the function made of its copy.

    -> old, or new where the two are of different kinds.
    """
    if old == new:
        return old
    if isinstance(old, list) and isinstance(new, list):
        old[:] = [*map(change_in_place, old, new), *new[len(old):]]
    elif isinstance(old, dict) and isinstance(new, dict):
        items = {key: change_in_place(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(old, tuple) and isinstance(new, tuple):
        list(map(change_in_place, old, new))         # what it holds may change
    return old if old == new else new


def cases_of(scope):
    """What pytest would run: functions test..., once per case, and methods test... of classes.

    Those are Test..., and unittest's of any name.
    """
    cases = []
    for name, value in scope.items():
        if isinstance(value, type):
            is_unittest = hasattr(value, 'debug')    # which runs a test and lets it raise
            for method in dir(value):                # inherited ones, too
                if method.startswith('test') and is_unittest:
                    cases.append(value(method).debug)
                elif method.startswith('test') and name.startswith('Test'):
                    marks = getattr(value, 'pytestmark', [])
                    cases += parametrized(getattr(value(), method), marks)
        elif name.startswith('test') and callable(value):
            cases += parametrized(value)
    return cases


def parametrized(function, marks=()):
    """[function], or one function per case of its, and its class', @pytest.mark.parametrize."""
    cases = [{}]
    for mark in [*getattr(function, 'pytestmark', []), *marks]:
        if mark.name == 'parametrize':
            arguments = dict(zip(('argnames', 'argvalues'), mark.args)) | mark.kwargs
            names, single = arguments['argnames'], False
            if isinstance(names, str):
                names = names.replace(',', ' ').split()
                single = len(names) == 1             # then a value is no row
            rows = []
            for value in arguments['argvalues']:
                if type(value).__name__ == 'ParameterSet':           # pytest.param(...)
                    rows.append(value.values)
                else:
                    rows.append([value] if single else value)
            cases = [case | dict(zip(names, row)) for case in cases for row in rows]
    return [functools.partial(function, **case) for case in cases]


class Tests:
    """Runs tests. Writes a dot per test there is, a 1 per test passed, a ! for a breach."""

    def __init__(self, program, calls, replies, verdicts):
        self.program = program       # the id of its process
        self.calls = calls           # where calls are written
        self.replies = replies       # the file that its replies are read from
        self.verdicts = verdicts     # where verdicts are written

    def end(self, *_):
        """Ends both processes, also in the middle of a test; tests without a verdict have failed.

        The alarm calls it, too.
        """
        signal.setitimer(signal.ITIMER_REAL, 0)      # no alarm in the middle of this
        os.kill(self.program, signal.SIGKILL)
        os.waitpid(self.program, 0)
        os._exit(0)

    def void(self):
        """The program ended, was killed or wrote garbage: no test counts."""
        os.write(self.verdicts, b'!')
        self.end()

    def call(self, name, /, *args, **kwargs):
        """The result of the program's function of that name; raises what it raised."""
        message = pack(name, args, kwargs)
        try:
            os.write(self.calls, message)
            error, value, *after = receive(self.replies)
            if error == '':
                new_args, new_kwargs = after
                list(map(change_in_place, args, new_args))
                change_in_place(kwargs, new_kwargs)
        except BaseException:
            self.void()
        if error == '':
            return value
        kind = getattr(builtins, error, RuntimeError)
        if kind is StopIteration:    # would end the tests' loops in silence (PEP 479)
            kind = RuntimeError
        raise kind.__new__(kind, value)              # some kinds take more to __init__

    def function(self, name):
        return functools.partial(self.call, name)

    def run(self, setup, tests, entry_point):
        """Names that neither tests nor set-up define are functions of the program."""
        function = self.function

        class Names(dict):
            def __missing__(self, name):
                if name.startswith('__') or hasattr(builtins, name):
                    raise KeyError(name)
                return function(name)

        def from_solution(name):
            if name.startswith('__'):
                raise AttributeError(name)
            return function(name)

        sys.modules['solution'] = solution = type(sys)('solution')   # for tests that import from it
        solution.__getattr__ = from_solution
        random.seed(0)
        # not __main__: a file's own unittest.main() would look for its tests here
        names = Names(__name__='tests', __builtins__=builtins)
        exec(setup, names)
        if entry_point:
            names[entry_point] = function(entry_point)
        os.write(self.verdicts, b'.' * len(tests))
        for test in tests:
            scope = Names(names)
            try:
                exec(test, scope)
                cases = cases_of({name: scope[name] for name in scope if name not in names})
            except BaseException:
                sys.excepthook(*sys.exc_info())
                continue
            if not cases:                            # it was run just now
                os.write(self.verdicts, b'1')
                continue
            os.write(self.verdicts, b'.' * (len(cases) - 1))
            for case in cases:
                try:
                    case()
                    os.write(self.verdicts, b'1')
                except BaseException:
                    sys.excepthook(*sys.exc_info())
        nonce = os.urandom(8)
        assert self.call('', nonce) == nonce


def main():
    """Forks off the program, then runs the tests against it.

    Two pipes join the processes: one for calls of the program's functions, one for their replies.
    """
    sys.path.pop(0)          # this file's folder, whose neighbours are nobody's library
    source = open(os.dup(0), 'rb', buffering=0)      # reads nothing ahead: the tests come second
    verdicts = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):        # what either process reads and prints
        os.dup2(nowhere, fd)
    setup, code, seconds = receive(source)
    with contextlib.suppress(AttributeError):        # before Python 3.10.7 there is no limit
        sys.set_int_max_str_digits(0)
    calls_out, calls_in = os.pipe()
    replies_out, replies_in = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            for fd in (source.fileno(), verdicts, calls_in, replies_out, nowhere):
                os.close(fd)
            run_program(setup, code, seconds, open(calls_out, 'rb'), replies_in)
        finally:
            os._exit(1)
    os.close(calls_out)
    os.close(replies_in)
    judge = Tests(program, calls_in, open(replies_out, 'rb'), verdicts)
    signal.signal(signal.SIGALRM, judge.end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        setup, tests, entry_point, packages = json.loads(source.read())
        sys.path += packages
        judge.run(setup, tests, entry_point)
    except BaseException:
        judge.void()
    judge.end()


if __name__ == '__main__':
    main()
