"""Several processes compute what one computes: DDP for adapters, FSDP2 for all weights, gloo on the CPU."""
import json
import os
import subprocess
import sys

import pytest
import torch

from test_train import ROOT, SMALL, rows

# 5 test problems one at a time: the two processes evaluate 3 and 2 batches.
FLAGS = [*SMALL, '--base_steps', '40', '--base_batch', '16', '--textbook', '0', '--eval_n', '5', '--eval_batch', '1', '--num_prompts', '4', '--num_generations', '4']


def launch(out, processes, name, *flags):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    done = subprocess.run([*(command if processes > 1 else [sys.executable]), 'train.py', *FLAGS, '--out', str(out),
                           '--name', name, '--device', 'cpu', *flags], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def same(out, one, two, files):
    for a, b in zip(rows(out / one / 'log.jsonl'), rows(out / two / 'log.jsonl'), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            close = a[key] == (b[key] if key == 'stage' else pytest.approx(b[key], rel=1e-3, abs=1e-5))
            assert close, (key, a, b)
    for file in files:
        a, b = (torch.load(out / name / file, weights_only=True)['weights'] for name in (one, two))
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


@pytest.mark.parametrize('kind, flags', [('DDP', ['--lora_rank', '4']), ('FSDP2', [])])
def test_two_processes_equal_one(tmp_path, kind, flags):
    launch(tmp_path, 1, 'one', *flags)
    launch(tmp_path, 2, 'two', *flags)
    same(tmp_path, 'one', 'two', ['sft.pt', 'grpo.pt'])
    results = [json.load(open(tmp_path / name / 'results.json')) for name in ('one', 'two')]
    assert results[0] == results[1]
