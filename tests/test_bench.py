"""What bench.py compares computes the same, and its tables come out; times are not tested."""
import json
import os
import subprocess
import sys

import pytest

import bench
import train
from model import load

V, L = 60, 16


def numbers(section, case):
    seconds, found = bench.build(section, case, V, L, quick=True)()
    assert seconds > 0
    return found


@pytest.mark.parametrize('section, case, tolerance', [
    ('rollout', 'plain', 0), ('rollout', 'exact', 0), ('logps', 'ours', 1e-5),
    ('backward', 'ours', 1e-5), ('pretrain', 'ours', 1e-3)])        # Muon rounds to bfloat16
def test_our_numbers_are_the_textbooks(section, case, tolerance):
    ours, theirs = numbers(section, case), numbers(section, 'textbook')
    assert len(set(theirs)) > 1, 'a model without opinions would prove nothing'
    assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def test_after_the_ends_of_completions_no_logps_are_made():
    ended, full = numbers('logps', 'ended'), numbers('logps', 'ours')
    assert all(a == pytest.approx(b, rel=1e-5) or a == 0 for a, b in zip(ended, full, strict=True))
    assert ended.count(0) == len(ended) // 4


@pytest.mark.parametrize('case', ['cache', 'threshold', 'both'])
def test_a_faster_rollout_fills_its_first_block(case):
    ids = numbers('rollout', case)
    assert len(ids) == 2 * 8 and V - 1 not in ids, '2 rows of 8 tokens, none a mask'


@pytest.mark.parametrize('case', bench.SECTIONS['grpo'])
def test_every_version_of_an_iteration_runs(case, monkeypatch):
    calls = []
    rollout = bench.textbook_rollout
    monkeypatch.setattr(bench, 'textbook_rollout',
                        lambda *tensors, **knobs: calls.append(1) or rollout(*tensors, **knobs))
    seconds, (rollout_seconds,) = bench.build('grpo', case, V, L, quick=True)()
    assert 0 < rollout_seconds < seconds
    assert bool(calls) == (case == 'textbook')


def test_another_checkout_is_measured_with_its_own_code(tmp_path):
    (tmp_path / 'train.py').write_text('''
import json, os
def train_sft():
    pass
def main(flags):
    train_sft()
    os.mkdir(f'{flags[-1]}/run')
    with open(f'{flags[-1]}/run/log.jsonl', 'w') as file:
        file.write(json.dumps(dict(stage='grpo', seconds=7.5, rollout_seconds=2.5)))
''')
    job = json.dumps(['grpo', 'before', 0, 0, True, str(tmp_path)])
    done = subprocess.run([sys.executable, bench.__file__, '--job', job], input='once\n',
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result['seconds'] == 7.5 and result['numbers'] == [2.5]


def test_the_table_of_a_trained_model(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'a_run'
    train.save_model(str(folder / 'model'), *load('nano'), 'nano')
    (folder / 'config.json').write_text(json.dumps(dict(task='gsm8k')))
    flags = ['--n', '2', '--length', '16', '--blocks', '8', '16', '--thresholds', '1']
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--nano', str(folder), *flags])
    bench.main()
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines()[2:]]
    cases = ['exact', 'cache', 'threshold 1.0', 'cache, threshold 1.0']
    assert [row[2] for row in rows] == [f'blocks of {b}, {case}' for b in (8, 16) for case in cases]
    assert [row[5] for row in rows] == ['8.0', '8.0', '16.0', '16.0'] * 2, 'it is never sure'


def test_one_command_prints_the_table():
    done = subprocess.run([sys.executable, bench.__file__, '--quick', '--repeats', '1',
                           '--only', 'backward'], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('| backward')]
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
    expected = [[case, V, '16'] for V in ('1,000', '2,000') for case in ('textbook', 'ours')]
    assert [row[1:4] for row in rows] == expected
    assert all(float(row[4]) > 0 for row in rows)
