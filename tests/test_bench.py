"""What bench.py claims to compare computes the same, and its table comes out; times are not tested."""
import json
import os
import subprocess
import sys

import pytest

import bench
import grpo
import train
from model import load


@pytest.mark.parametrize('section, case, tolerance', [('rollout', 'exact', 0), ('logps', 'ours', 1e-5), ('backward', 'ours', 1e-5),
                                                      ('pretrain', 'ours', 1e-5)])
def test_ours_and_the_textbooks_numbers_agree(section, case, tolerance):
    ours, theirs = (bench.build(section, kind, 60, 16, quick=True, whole=True)[0]() for kind in (case, 'textbook'))
    assert section == 'pretrain' or len(set(theirs)) > 3, 'a model without opinions would prove nothing'
    assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def test_behind_the_ends_of_completions_no_logps_are_made():
    ended, all_of_them = (bench.build('logps', kind, 60, 16, quick=True)[0]() for kind in ('ended', 'ours'))
    assert all(a == pytest.approx(b, rel=1e-5) or a == 0 for a, b in zip(ended, all_of_them, strict=True))
    assert ended.count(0) == len(ended) // 4


@pytest.mark.parametrize('case', ['cache', 'threshold', 'both'])
def test_first_block_of_the_faster_modes_is_filled(case):
    once, share = bench.build('rollout', case, 60, 16, quick=True)
    assert share == 0.5 and len(once()) == 2 * 8 and 59 not in once()


@pytest.mark.parametrize('case', bench.SECTIONS['grpo'])
def test_every_version_of_an_outer_iteration_runs(monkeypatch, case):
    for module, name in ((grpo, 'generate'), (grpo, 'completion_logps'), (train, 'completion_logps')):
        monkeypatch.setattr(module, name, getattr(module, name))  # the textbook version replaces them
    assert bench.build('grpo', case, 0, 0, quick=True)[0]() == []


def test_table_of_a_trained_model(tmp_path, monkeypatch, capsys):
    train.save_model(str(tmp_path / 'model'), *load('nano'))
    (tmp_path / 'config.json').write_text(json.dumps(dict(task='gsm8k')))
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--nano', str(tmp_path), '--n', '2', '--length', '16', '--thresholds', '0.5', '1'])
    bench.main()
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ['exact', 'cache', 'threshold 0.5', 'cache, threshold 0.5', 'threshold 1.0', 'cache, threshold 1.0']
    assert [row[4] for row in rows[:2] + rows[4:]] == ['8.0', '8.0', '16.0', '16.0'], 'a new model is never sure'
    bench.nano_table([str(tmp_path)], 2, 16, [], [8, 16], 'train')
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == [f'blocks of {b}, {mode}' for b in (8, 16) for mode in ('exact', 'cache')]


def test_one_command_prints_the_table():
    done = subprocess.run([sys.executable, bench.__file__, '--quick', '--repeats', '1', '--only', 'backward'],
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines() if line.startswith('| backward')]
    assert [row[1:4] for row in cells] == [[case, V, '16'] for V in ('1,000', '2,000') for case in ('textbook', 'ours')]
    assert all(float(row[4]) > 0 and float(row[7]) > 0 for row in cells)
