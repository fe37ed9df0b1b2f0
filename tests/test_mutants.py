"""mutants.py makes the changes that it should, and knows which of them a test notices."""
import json
import subprocess
import sys
from pathlib import Path

import mutants

SOURCE = '''
def area(width: int = 2, height=None) -> int:
    """Not 1, not True."""
    if not width:
        raise ValueError('no width' + str(1))
    print(width + 1)
    total = min(width * args.scale, 0.5)
    return total


def other():
    return 1 + 1
'''


def test_every_change_of_a_small_function():
    found = mutants.mutants('a.py', SOURCE, ['area'])
    changes = [(mutant['line'], mutant['new']) for mutant in found]
    assert sorted(changes) == sorted([
        (2, 'def area(width: int = 3, height=None) -> int:'),
        (4, 'if (width):'),
        (5, 'pass'),
        (7, 'pass'),
        (7, 'total = max(width * args.scale, 0.5)'),
        (7, 'total = min(width * args.scale)'),
        (7, 'total = min((width / args.scale), 0.5)'),
        (7, 'total = min(width * 0, 0.5)'),
        (7, 'total = min(width * args.scale, 1.0)'),
        (8, 'pass')])
    assert {mutant['name'] for mutant in found} == {'area'}
    assert {mutant['old'] for mutant in found if mutant['line'] == 8} == {'return total'}
    assert len({mutant['key'] for mutant in found}) == len(found)
    for mutant in found:
        assert 'return 1 + 1' in mutant['source'] and mutant['source'] != SOURCE


def changes_of(line):
    source = f'def f():\n    {line}\n'
    return [mutant['new'] for mutant in mutants.mutants('a.py', source) if mutant['new'] != 'pass']


def test_changes_of_each_kind():
    assert changes_of('x = a < b') == ['x = (a <= b)', 'x = (a >= b)']
    assert changes_of('x = a and b') == ['x = (a or b)']
    assert changes_of('x = -a') == ['x = (a)']
    assert changes_of('x = True') == ['x = False']
    assert changes_of('x = 0') == ['x = 1']
    assert changes_of('x = a[n]') == ['x = a[0]']
    assert changes_of('x = f(a, b)') == ['x = f(b, a)', 'x = f(a)']
    assert changes_of('x = f(a, k=b, device=c)') == ['x = f(a, device=c)']
    assert changes_of('x += a') == ['x -= a']
    assert changes_of('x = group.advantages') == ['x = group.rewards']
    assert changes_of('with f(): g()') == ['if True: g()', 'with f(): pass']
    assert changes_of('x = y if a else z') == ['x = y if (not (a)) else z']


def test_the_tests_of_a_small_project_find_what_they_can(tmp_path):
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'number.py').write_text('''
def countdown(n):
    while n > 0:
        n -= 1
    return n


def bounded(x):
    if x < 0:
        return 0
    return x
''')
    test = tmp_path / 'tests' / 'test_number.py'
    begin = ('import sys\nsys.path.insert(0, ".")\nfrom number import bounded, countdown\n'
             'def test_it():\n    assert countdown(3) == 0 and countdown(-1) == -1\n')
    test.write_text(begin)

    def run(*flags):
        results = tmp_path / 'results.jsonl'
        script = ('import mutants, sys; mutants.PRELOAD, mutants.PATIENCE = ["pytest"], 2; '
                  'mutants.TARGETS = {"number.py": (None, ["test_number.py"])}; '
                  f'mutants.main(sys.argv[1:], {str(tmp_path)!r})')
        done = subprocess.run([sys.executable, '-c', script, '--results', str(results),
                               '--workers', '2', *flags], cwd=Path(mutants.__file__).parent,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, [json.loads(line) for line in results.read_text().splitlines()]

    printed, rows = run()
    outcomes = {row['new']: row['outcome'] for row in rows}
    assert outcomes == {'while (n >= 0):': 'found', 'while (n <= 0):': 'found',
                        'while n > 1:': 'found', 'n += 1': 'timed out', 'n -= 2': 'found',
                        'pass': 'survived', 'return 1': 'survived', 'if (x <= 0):': 'survived',
                        'if (x >= 0):': 'survived', 'if x < 1:': 'survived'}
    assert '13 changes, 7 found (2 by taking too long), 6 survived' in printed
    assert 'number.py:9 (bounded)\n  - if x < 0:\n  + if x < 1:' in printed

    test.write_text(begin + '    assert bounded(-2) == 0 and bounded(0.5) == 0.5\n')
    printed, again = run()                       # the survivors only, with the better test
    assert len(again) == len(rows) + 6
    assert '13 changes, 12 found (2 by taking too long), 1 survived' in printed
    assert '+ if (x <= 0):' in printed, 'it changes nothing'
    assert run()[1] == again, 'all is done'
    assert (tmp_path / 'number.py').read_text().startswith('\ndef countdown')
