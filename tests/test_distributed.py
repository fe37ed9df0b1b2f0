"""Two processes compute what one computes: gloo on the CPU, adapters and all weights.

torchrun starts this file as two processes, then pytest's own process does the same alone.
"""
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import rewards
import train
from model import load
from test_train import (ROOT, SMALL, results, rows, saved_model, stop, varied_grade, varied_reward,
                        weights)

KINDS = {'lora': ['--lora_rank', '4'], 'all': []}
# Shares that are not even: 3 test problems one at a time; forward passes of 2 sequences and 1.
FLAGS = [*SMALL, '--eval_lengths', '8,16', '--eval_batch', '1', '--sft_batch', '6',
         '--micro_batch', '2', '--num_generations', '4']


def run(out, name, kind, *flags):
    """A run that keeps its summed gradients, except the base's, and counts what it evaluates."""
    clip, gradients = train.clip_grad_norm_, []
    complete, evaluated = train.complete, []

    def keep(parameters, limit):
        parameters = [p for p in parameters if p.grad is not None]
        gradients.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    def count(model, tokenizer, prompts, *rest, **keys):
        evaluated.extend(prompts)
        return complete(model, tokenizer, prompts, *rest, **keys)
    train.clip_grad_norm_, train.complete = keep, count
    try:
        train.main([*FLAGS, '--out', str(out), '--name', name, *KINDS[kind], *flags])
    finally:
        train.clip_grad_norm_, train.complete = clip, complete
    evaluated = sorted(train.gather(evaluated))
    if train.rank() == 0:
        kept = gradients[-9:], evaluated                             # 3 of SFT, 6 of diffu-GRPO
        torch.save(kept, out / name / 'kept.pt')


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """The folder of what two processes did: both kinds whole, both stopped within diffu-GRPO."""
    for _ in range(2):
        folder = tmp_path_factory.mktemp('out')
        done = two_processes(folder)
        # seen once in ten starts, the cause not found: one of the processes aborts
        if 'terminate called without an active exception' not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('pretraining a nano base') == 1
    return folder


def two_processes(folder):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node',
               '2', __file__, str(folder)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def assert_same_run(one, two):
    log = rows(one / 'log.jsonl')
    assert [row['stage'] for row in log] == ['sft'] * 3 + ['grpo'] * 3
    for a, b in zip(log, rows(two / 'log.jsonl'), strict=True):
        assert a.pop('stage') == b.pop('stage')
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert rows(one / 'samples.jsonl') == rows(two / 'samples.jsonl')
    assert results(one) == results(two)
    for stage in ('sft', 'grpo'):
        close(weights(one / f'{stage}.pt'), weights(two / f'{stage}.pt'))


@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_equal_one(out, kind):
    run(out, f'one-{kind}', kind)
    assert_same_run(out / f'one-{kind}', out / f'two-{kind}')
    one, prompts = torch.load(out / f'one-{kind}' / 'kept.pt')
    two, shared_prompts = torch.load(out / f'two-{kind}' / 'kept.pt')
    close(one, two)
    assert prompts == shared_prompts, 'no prompt is evaluated twice'
    for update in one:
        assert max(g.abs().max() for g in update) > 1e-3, 'or 1e-5 would say nothing'


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_of_two_processes_is_finished_by_one(out, kind):
    name = f'stopped-{kind}'
    assert len(rows(out / name / 'log.jsonl')) == 5 and not (out / name / 'grpo.pt').exists()
    run(out, name, kind, '--resume')
    assert_same_run(out / name, out / f'two-{kind}')


def test_two_processes_pretrain_the_base_that_one_does(out, tmp_path):
    run(tmp_path, 'one', 'all', '--eval_only')
    ours, theirs = saved_model(tmp_path / 'base-0'), saved_model(out / 'base-0')
    for name in ours:                            # Muon rounds to bfloat16: the last digits differ
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=0)
    new = load('nano')[0].state_dict()
    assert not any(torch.equal(ours[name], new[name]) for name in ours)


if __name__ == '__main__':
    from pathlib import Path
    dist.init_process_group('gloo')
    rewards.TASKS['gsm8k'] = rewards.TASKS['gsm8k']._replace(grade=varied_grade)
    for kind, flags in KINDS.items():
        run(Path(sys.argv[1]), f'two-{kind}', kind)
        # in the checkpoint of diffu-GRPO's second iteration, after SFT's three
        stop(Path(sys.argv[1]), f'stopped-{kind}', 'save_checkpoint', 5, *FLAGS, *flags)
    dist.barrier()                               # neither ends while the other is at work
    dist.destroy_process_group()
