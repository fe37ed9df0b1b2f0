"""Several processes compute what one computes: DDP for adapters, FSDP2 for all weights, gloo on the CPU.

Two processes run all of it once (this file, started by torchrun), then pytest's own process does the same alone.
"""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import rewards
import train
from test_train import ROOT, SMALL, rows, weights

KINDS = {'DDP': ['--lora_rank', '4'], 'FSDP2': []}
HALF = ['--dtype', 'bfloat16', '--stages', 'grpo', '--grpo_steps', '1', '--num_iterations', '1', '--eval_n', '1',
        '--gradient_checkpointing']
# 3 test problems one at a time: the two processes evaluate 2 batches and 1.
FLAGS = [*SMALL, '--eval_lengths', '8', '--eval_batch', '1', '--num_prompts', '4', '--num_generations', '4', '--device', 'cpu']
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']


def run(out, name, kind, *flags, stop_at=None):
    """A run whose rewards vary; it keeps its first diffu-GRPO update's gradients, and may be stopped after a step."""
    task, update, end_step = rewards.TASKS['gsm8k'], train.update, train.Run.end_step

    def keep_gradients(model, *rest):
        file = os.path.join(out, name, 'gradients.pt')
        if os.path.exists(os.path.join(out, name, 'sft.pt')) and not os.path.exists(file):
            whole = {key: p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad
                     for key, p in model.named_parameters() if p.requires_grad}
            if train.world_size() > 1:
                dist.barrier()  # both have seen that there is no file
            if train.rank() == 0:
                torch.save(dict(weights=whole), file)
        return update(model, *rest)

    def stop(self, args, stage, step, *rest):
        self.stop = (stage, step) == stop_at
        end_step(self, args, stage, step, *rest)
    rewards.TASKS['gsm8k'] = task._replace(reward=lambda text, example: len(set(text)) / 10)
    train.update, train.Run.end_step = keep_gradients, stop
    try:
        train.main([*FLAGS, '--out', str(out), '--name', name, *KINDS[kind], *flags])
    except KeyboardInterrupt:
        assert stop_at
    finally:
        rewards.TASKS['gsm8k'], train.update, train.Run.end_step = task, update, end_step


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """The folder of what two processes did: both kinds whole, both kinds stopped within diffu-GRPO."""
    out = tmp_path_factory.mktemp('out')
    done = subprocess.run([*TORCHRUN, __file__, str(out)], capture_output=True, text=True, timeout=200,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count('pretraining a nano base') + done.stdout.count('pretraining a nano base') == 1
    return out


def assert_same_run(one, two, files):
    log = rows(one / 'log.jsonl')
    assert [row['stage'] for row in log] == ['sft'] * 3 + ['grpo'] * 3
    for a, b in zip(log, rows(two / 'log.jsonl'), strict=True):
        assert a == {key: b[key] if key == 'stage' else pytest.approx(b[key], rel=1e-5, abs=1e-5) for key in b}
    assert rows(one / 'samples.jsonl') == rows(two / 'samples.jsonl')
    for file in files:
        a, b = weights(one / file), weights(two / file)
        assert a.keys() == b.keys() and a
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=0, msg=lambda m: f'{file}, {key}: {m}')
    results = [json.loads((folder / 'results.json').read_text()) for folder in (one, two)]
    assert results[0] == results[1]


@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_equal_one(out, kind):
    run(out, f'one-{kind}', kind)
    assert_same_run(out / f'one-{kind}', out / f'two-{kind}', ['gradients.pt', 'sft.pt', 'grpo.pt'])
    gradients = weights(out / f'one-{kind}' / 'gradients.pt')
    assert max(g.abs().max() for g in gradients.values()) > 1e-3, 'or 1e-5 would say nothing'


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_of_two_processes_is_finished_by_one(out, kind):
    name = f'stopped-{kind}'
    assert len(rows(out / name / 'log.jsonl')) == 5 and not (out / name / 'grpo.pt').exists()
    run(out, name, kind, '--resume')
    assert_same_run(out / name, out / f'two-{kind}', ['sft.pt', 'grpo.pt'])


@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_in_bfloat16_with_checkpointing_equal_one(out, kind):
    run(out, f'one-half-{kind}', kind, *HALF)
    [one], [two] = (rows(out / f'{name}-half-{kind}' / 'log.jsonl') for name in ('one', 'two'))
    assert one == {key: b if key == 'stage' else pytest.approx(b, rel=0.01, abs=1e-4) for key, b in two.items()}
    start = train.LLaDA.from_pretrained(next(out.glob('base-*')) / 'model').state_dict()
    one, two = (weights(out / f'{name}-half-{kind}' / 'grpo.pt') for name in ('one', 'two'))
    for key in two:
        assert two[key].dtype == torch.float32
        if not key.endswith('lora_a'):  # moves first when B is no longer 0
            moves = [(w[key] - start.get(key, 0)).flatten() for w in (one, two)]  # of at most 1e-4
            assert torch.cosine_similarity(*moves, dim=0) > 0.95, key


def test_two_processes_pretrain_the_base_that_one_does(out, tmp_path):
    [folder] = out.glob('base-*')
    args = train.check(train.parse([*FLAGS, '--out', str(tmp_path)]))
    ours = train.LLaDA.from_pretrained(train.nano_base(args)).state_dict()
    theirs = train.LLaDA.from_pretrained(folder / 'model').state_dict()
    new = train.load('nano')[0].state_dict()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=0)
        assert not torch.equal(ours[key], new[key])


def test_an_error_of_all_processes_is_printed_once(tmp_path):
    done = subprocess.run([*TORCHRUN, 'train.py', '--num_prompts', '3', '--out', str(tmp_path)], cwd=ROOT, timeout=100,
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode and 'exitcode  : 2' in done.stderr
    assert done.stderr.count('train.py: --num_prompts 3 is not a multiple of the 2 processes') == 1, done.stderr
    assert 'train.py", line' not in done.stderr, 'only the launcher has a traceback'


if __name__ == '__main__':
    dist.init_process_group('gloo')
    for kind in KINDS:
        run(sys.argv[1], f'two-{kind}', kind)
        run(sys.argv[1], f'stopped-{kind}', kind, stop_at=('grpo', 1))
        run(sys.argv[1], f'two-half-{kind}', kind, *HALF)
    dist.destroy_process_group()
