"""The forks of assets/forks: each applies to the code as it is, is small, and does what it says."""
import glob
import json
import os
import shutil
import subprocess
import sys

import pytest

from test_train import ROOT, SMALL

FORKS = dict(                                    # patch -> flags that need it
    task=['--task', 'counting'], loss=['--loss', 'regression'], schedule=['--p_mask_prompt', '0.5'],
    estimator=['--estimator', 'both'])


def run_in(folder, name, flags):
    command = [sys.executable, 'train.py', *SMALL, '--stages', 'grpo', '--grpo_steps', '1',
               '--name', name, *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def row_rates(folder):
    """The spread of the rows' shares of masked tokens, at p_mask_prompt 0.5."""
    code = ('import torch; from loglik import random_prompt_mask as f; '
            'print(f(torch.zeros(400, 200), 0.5).float().mean(1).std().item())')
    return float(subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True,
                                text=True, check=True).stdout)


@pytest.mark.parametrize('fork', FORKS)
def test_a_fork_applies_is_short_and_changes_the_run(tmp_path, fork):
    patch = os.path.abspath(os.path.join(ROOT, 'assets', 'forks', f'{fork}.patch'))
    with open(patch) as file:
        added = [line for line in file if line.startswith('+') and not line.startswith('+++')]
    assert 0 < len([line for line in added if line.strip('+\n ')]) <= 40
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, tmp_path)
    before = row_rates(tmp_path), run_in(tmp_path, 'before', FORKS[fork])
    subprocess.run(['git', 'apply', patch], cwd=tmp_path, check=True)
    after = row_rates(tmp_path), run_in(tmp_path, 'after', FORKS[fork])
    assert after[1].returncode == 0, after[1].stderr
    results = json.loads((tmp_path / 'out/after/results.json').read_text())
    assert list(results) == ['constant', 'base', 'grpo']
    if fork == 'schedule':                       # rates of rows from 0 to 1, not all near 0.5
        assert before[0] < 0.1 and 0.2 < after[0] < 0.4
    else:
        assert before[1].returncode, 'the code without the fork knows no such flag'
