"""Would a test notice? Changes the code, one place at a time, and runs the tests that concern it.

    python tests/mutants.py                          all of TARGETS; hours
    python tests/mutants.py --only grpo.py:grpo_loss --workers 2
    python tests/mutants.py --sample 50              that many changes, drawn at random
A change whose tests all pass survives: it needs a test, or changes nothing. Tests that take too
long have found it. --results keeps what is done: the same change of the same function is not run
again, a survivor is when a test file has changed. It needs fork: not for Windows.
"""
import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# file: (its functions and classes, or None for all; the tests, those that notice most first)
TARGETS = {
    'loglik.py': (None, ['test_loglik.py', 'test_grpo.py']),
    'grpo.py': (None, ['test_grpo.py', 'test_train.py', 'test_distributed.py']),
    'sft.py': (['draw_masks', 'masked_loss', 'sft_loss', 'draw_base_masks'],
               ['test_sft.py', 'test_train.py']),
    'sample.py': (['choose', 'commit_counts', 'generate_plain', 'generate', 'denoise', 'to_commit',
                   'predict', 'leave_out'],
                  ['test_sample.py', 'test_loglik.py', 'test_grpo.py', 'test_train.py']),
    'train.py': (['train_grpo', 'train_sft'],
                 ['test_grpo.py', 'test_sft.py', 'test_train.py', 'test_distributed.py']),
}
# Imported once; each mutant's tests run in a fork, which has them already.
PRELOAD = ['pytest', 'torch', 'torch.distributed', 'torch._dynamo', 'torch.utils.checkpoint',
           'safetensors.torch', 'tokenizers', 'transformers', 'huggingface_hub', 'jinja2']
PATIENCE = 20                                    # seconds, beside 4 times what the tests take


# ---- the changes ----

OTHER_OPERATORS = {                              # of numbers, tensors and conditions
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.And: [ast.Or], ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn], ast.NotIn: [ast.In],
}
OTHER_NAMES = {'min': 'max', 'minimum': 'maximum', 'argmin': 'argmax', 'any': 'all', 'sum': 'mean'}
OTHER_NAMES |= {other: name for name, other in OTHER_NAMES.items()}
OTHER_FIELDS = dict(advantages='rewards', old_logps='ref_logps', ref_logps='old_logps')
SYMMETRIC = ('min', 'max', 'minimum', 'maximum')
SIMPLE_STATEMENTS = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Assert,
                     ast.Delete, ast.Continue, ast.Break)


def counting_nodes(node):
    """The nodes of a tree without docstrings, annotations, messages and what is printed."""
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ('print', 'print0'):
            return
    yield node
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
        return
    for name, field in ast.iter_fields(node):
        if name in ('annotation', 'returns'):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from counting_nodes(child)


def with_fields(node, **fields):
    """The text of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    text = ast.unparse(changed)
    return f'({text})' if isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare)) else text


def head(node, last):
    """A stand-in for a statement's text from its first character to the end of `last`."""
    return ast.expr(lineno=node.lineno, col_offset=node.col_offset,
                    end_lineno=last.end_lineno, end_col_offset=last.end_col_offset)


def changes(node):
    """Yields (the node to replace, its new text) for every change of one node."""
    if isinstance(node, SIMPLE_STATEMENTS):
        yield node, 'pass'
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        for other in OTHER_OPERATORS.get(type(node.op), []):
            yield node, with_fields(node, op=other())
    if isinstance(node, ast.Compare):
        for other in OTHER_OPERATORS[type(node.ops[0])]:
            yield node, with_fields(node, ops=[other(), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp):
        yield node, f'({ast.unparse(node.operand)})'
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        if not isinstance(node.test, (ast.Compare, ast.UnaryOp)):            # these have their own
            yield node.test, f'(not ({ast.unparse(node.test)}))'
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield node, str(not node.value)
        elif isinstance(node.value, (int, float)):
            step = 1 if node.value in (0, int(node.value)) else node.value   # 0.5 -> 1.0
            yield node, str(node.value + step)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name):
        yield node.slice, '0'
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        if ast.unparse(node.value) == 'args':
            yield node, '0'                      # a flag is ignored
        elif node.attr in OTHER_FIELDS:
            yield node, with_fields(node, attr=OTHER_FIELDS[node.attr])
    if isinstance(node, ast.FunctionDef):
        for decorator in node.decorator_list:
            yield decorator, '(lambda function: function)'                   # does nothing
    if isinstance(node, ast.With) and not any(item.optional_vars for item in node.items):
        yield head(node, node.items[-1].context_expr), 'if True'
    if isinstance(node, ast.Call):
        yield from changed_calls(node)


def changed_calls(call):
    name = ast.unparse(call.func).split('.')[-1]
    if name in OTHER_NAMES:
        if isinstance(call.func, ast.Name):
            yield call.func, OTHER_NAMES[name]
        else:
            yield call.func, with_fields(call.func, attr=OTHER_NAMES[name])
    args, keywords = call.args, call.keywords
    if any(isinstance(arg, ast.Starred) for arg in args):
        return
    for i in range(len(args) - 1):
        if name not in SYMMETRIC:
            swapped = [*args[:i], args[i + 1], args[i], *args[i + 2:]]
            yield call, with_fields(call, args=swapped)
    if len(args) > 1:
        yield call, with_fields(call, args=args[:-1])
    for i in range(len(keywords)):
        if keywords[i].arg != 'device':          # all tests are on the CPU
            yield call, with_fields(call, keywords=keywords[:i] + keywords[i + 1:])


def mutants(file, source, names=None):
    """[dict] of every change to the functions `names` (None: all) of a file's source.

    Each has file, name, line, the lines before (old) and after (new), the whole new source, and a
    key, the same for the same change of the same function.
    """
    code = source.encode()                       # ast counts columns in bytes
    starts = [0]                                 # of the lines
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}                                   # by new source: some changes come out the same
    for top in ast.parse(source).body:
        if not isinstance(top, (ast.FunctionDef, ast.ClassDef)) or names and top.name not in names:
            continue
        for node in counting_nodes(top):
            for part, text in changes(node):
                begin = starts[part.lineno - 1] + part.col_offset
                end = starts[part.end_lineno - 1] + part.end_col_offset
                first = starts[part.lineno - 1]
                last = starts[part.end_lineno]
                new = (code[:begin] + text.encode() + code[end:]).decode()
                place = f'{part.lineno - top.lineno}:{part.col_offset}'
                found[new] = dict(
                    key=digest(file, ast.unparse(top), place, text), file=file, name=top.name,
                    line=part.lineno, old=one_line(code[first:last]),
                    new=one_line(code[first:begin] + text.encode() + code[end:last]), source=new)
    return list(found.values())


def digest(*texts):
    return hashlib.sha256('\0'.join(texts).encode()).hexdigest()[:16]


def one_line(code):
    return ' '.join(code.decode().split())


# ---- running their tests ----

def start_tests(folder, tests):
    """The process id of a fork that runs these tests in the folder, until the first that fails."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()                              # so that what the tests start can be ended, too
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, resource.RLIM_INFINITY))
        log = os.open(os.path.join(folder, 'tests.log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.path[:] = [path for path in sys.path if not path.startswith(ROOT)]
        pytest = importlib.import_module('pytest')
        options = ['-x', '-q', '-p', 'no:cacheprovider', '--basetemp', os.path.join(folder, 'tmp')]
        status = pytest.main(options + [os.path.join('tests', test) for test in tests])
    except BaseException:
        status = 99
    os._exit(int(status))


def end(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run_mutants(todo, folders, limits, finished):
    """Runs each mutant's tests in a free folder; calls finished(mutant, outcome, seconds)."""
    originals = {file: read(os.path.join(folders[0], file)) for file in limits}
    todo, free, running = list(reversed(todo)), list(folders), {}
    mtime = time.time()
    try:
        while todo or running:
            while todo and free:
                mutant, folder = todo.pop(), free.pop()
                mtime += 1                       # else Python may take an older mutant's bytecode
                write(os.path.join(folder, mutant['file']), mutant['source'], mtime)
                pid = start_tests(folder, TARGETS[mutant['file']][1])
                running[pid] = mutant, folder, time.time()
            time.sleep(0.02)
            for pid, (mutant, folder, began) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                seconds = time.time() - began
                outcome = 'found' if status else 'survived'
                if not ended and seconds < limits[mutant['file']]:
                    continue
                end(pid)
                if not ended:
                    os.waitpid(pid, 0)
                    outcome = 'timed out'
                del running[pid]
                mtime += 1
                write(os.path.join(folder, mutant['file']), originals[mutant['file']], mtime)
                free.append(folder)
                finished(mutant, outcome, seconds)
    finally:
        for pid in running:
            end(pid)


def read(path):
    with open(path) as file:
        return file.read()


def write(path, text, mtime):
    with open(path, 'w') as file:
        file.write(text)
    os.utime(path, (mtime, mtime))


def baseline(folder, file):
    """The seconds that the tests of an unchanged file take; they must pass."""
    began = time.time()
    _, status = os.waitpid(start_tests(folder, TARGETS[file][1]), 0)
    if status:
        sys.exit(read(os.path.join(folder, 'tests.log'))
                 + f'mutants.py: the tests of {file} fail without any change')
    return time.time() - began


def all_tests(root):
    """What tells whether a test file has changed."""
    folder = os.path.join(root, 'tests')
    names = sorted(name for name in os.listdir(folder) if name.endswith('.py'))
    return digest(*(read(os.path.join(folder, name)) for name in names))


def run_and_keep(todo, results, log, root, workers):
    """Runs mutants in copies of the project; each result goes into results and the open log."""
    os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1',               # before torch comes
                      PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
    for name in PRELOAD:
        importlib.import_module(name)
    tests = all_tests(root)
    tqdm.monitor_interval = 0                    # its thread would have to survive a fork
    with tempfile.TemporaryDirectory() as top:
        folders = [os.path.join(top, str(i), 'main') for i in range(workers)]
        for folder in folders:
            shutil.copytree(root, folder, ignore=shutil.ignore_patterns('.*', 'out', '__pycache__'))
        limits = {}
        for file in sorted({mutant['file'] for mutant in todo}):
            seconds = baseline(folders[0], file)
            limits[file] = 4 * seconds + PATIENCE
            print(f'{file}: its tests take {seconds:.0f} s')
        with tqdm(total=len(todo), desc='mutants') as bar:
            def finished(mutant, outcome, seconds):
                row = dict(mutant, outcome=outcome, seconds=round(seconds, 1), tests=tests)
                del row['source']
                results[row['key']] = row
                log.write(json.dumps(row) + '\n')
                log.flush()
                bar.update()
            run_mutants(todo, folders, limits, finished)


def main(argv=None, root=ROOT):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', metavar='FILE[:FUNCTION]', default=list(TARGETS))
    p.add_argument('--sample', type=int, default=0, help='how many changes [all]')
    p.add_argument('--workers', type=int, default=os.cpu_count(), help='processes at once')
    p.add_argument('--results', default=os.path.join(root, 'out', 'mutants.jsonl'))
    p.add_argument('--list', action='store_true', help='print the changes, run nothing')
    args = p.parse_args(argv)

    chosen = []
    for name in args.only:
        file, _, function = name.partition(':')
        names = [function] if function else TARGETS[file][0]
        chosen += mutants(file, read(os.path.join(root, file)), names)
    if args.sample:
        chosen = random.Random(0).sample(chosen, min(args.sample, len(chosen)))
    if args.list:
        show(chosen)
        return print(f'{len(chosen)} changes')

    os.makedirs(os.path.dirname(os.path.abspath(args.results)), exist_ok=True)
    with open(args.results, 'a+') as log:
        log.seek(0)
        results = {row['key']: row for row in map(json.loads, log)}          # the last of each
        tests, todo = all_tests(root), []
        for mutant in chosen:
            known = results.get(mutant['key'])
            if not known or known['outcome'] == 'survived' and known['tests'] != tests:
                todo.append(mutant)
        if todo:
            run_and_keep(todo, results, log, root, args.workers)

    outcomes = [results[mutant['key']]['outcome'] for mutant in chosen]
    show([mutant for mutant, outcome in zip(chosen, outcomes) if outcome == 'survived'])
    survived, timed_out = outcomes.count('survived'), outcomes.count('timed out')
    print(f'{len(chosen)} changes, {len(chosen) - survived} found ({timed_out} by taking too '
          f'long), {survived} survived')


def show(mutants):
    for mutant in mutants:
        print(f'{mutant["file"]}:{mutant["line"]} ({mutant["name"]})')
        print(f'  - {mutant["old"]}\n  + {mutant["new"]}')


if __name__ == '__main__':
    main()
