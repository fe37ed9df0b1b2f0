"""Kills a small run at random moments, resumes it, and compares all it leaves with what an uninterrupted run leaves.

    python tests/kill.py 20      20 kills in pretraining, SFT and diffu-GRPO each and 20 in the middle of writing a file
SIGKILL every time; weights and logs (timings aside) have to agree bit for bit. Minutes on a CPU; Linux.
"""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import torch
from tqdm import tqdm

import rewards
import train

FLAGS = ('--base_steps 10 --base_batch 8 --sft_steps 10 --sft_batch 8 --sft_problems 8 --grpo_steps 6 --num_prompts 2 '
         '--num_generations 4 --num_iterations 2 --gen_length 16 --block_length 8 --steps 8 --sft_length 32 --eval_n 4 '
         '--eval_lengths 8,16 --save_every 2 --device cpu --name run').split()
STAGES = ('base', 'sft', 'grpo')


def start(out, when, pipe):
    """A process that runs or resumes the recipe in `out`; returns its id. It tells the pipe when a stage begins.

    when: how many files it writes before it kills itself in the middle of one, or None. A fork, to save the imports.
    """
    if pid := os.fork():
        return pid
    try:
        begin, fsync, replace = train.Run.begin, os.fsync, os.replace
        def told(run, stage, *tensors):
            step = begin(run, stage, *tensors)
            os.write(pipe, bytes([STAGES.index(stage)]))
            return step
        def dying(*args):
            nonlocal when
            when -= 1
            if when <= 0:
                if isinstance(args[0], int):  # fsync of a new file: leave a part of it
                    os.ftruncate(args[0], random.randrange(os.fstat(args[0]).st_size + 1))
                os.kill(os.getpid(), signal.SIGKILL)
            return fsync(*args) if isinstance(args[0], int) else replace(*args)
        train.Run.begin = told
        if when is not None:
            random.seed(os.getpid())
            os.replace = dying  # a file or folder that is whole but has not got its name
            os.fsync = lambda fd: (dying if '.new' in os.readlink(f'/proc/self/fd/{fd}') else fsync)(fd)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2) if not os.environ.get('SHOW') else None
        resume = ['--resume'] if os.path.exists(os.path.join(out, 'run', 'config.json')) else []
        train.run([*FLAGS, '--out', out, *resume])
        os._exit(0)
    except SystemExit as e:
        os._exit(e.code)
    finally:
        os._exit(1)


def attempt(out, kind, rng, seconds):
    """One start that may be killed: the stage in which it was, 'write', or None if it came to its end."""
    read, pipe = os.pipe()
    os.set_blocking(read, False)
    child = start(out, rng.randrange(1, 15) if kind == 'write' else None, pipe)
    os.close(pipe)
    stage, deadline = None, None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        try:
            told = os.read(read, 100)
            stage = STAGES[told[-1]] if told else stage
        except BlockingIOError:
            pass
        if stage == kind and deadline is None:
            deadline = time.monotonic() + rng.uniform(0, seconds[kind])
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    os.close(read)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return 'write' if kind == 'write' else stage
    assert status == 0, f'ended with status {status}; SHOW=1 shows why'


def content(out):
    """All that a finished run has left, timings aside: {file: bytes, rows or weights}."""
    found = {}
    for folder, _, names in os.walk(out):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, 'rb') as file:
                data = file.read()
            if name.endswith('.jsonl'):
                data = [{k: v for k, v in json.loads(line).items() if 'seconds' not in k} for line in data.splitlines()]
            elif name.endswith('.pt'):
                data = torch.load(path, weights_only=True)
                data = [(where, value.numpy().tobytes() if torch.is_tensor(value) else value) for where, value in leaves(data) if 'sizes' not in where]  # of the logs: timings have lengths, too
            elif name == 'config.json' and folder.endswith('run'):
                data = {k: v for k, v in json.loads(data).items() if k not in ('out', 'resume')}
            if name != 'curves.png':
                found[os.path.relpath(path, out)] = data
    return found


def leaves(tree, where=''):
    if isinstance(tree, (list, tuple)):  # a tuple comes back from a checkpoint as a list
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key], f'{where}/{key}')]
    return [(where, tree)]


def main(n=20):
    torch.set_num_threads(1)  # forks must not share a pool of threads
    began, rng, kills = time.time(), random.Random(0), dict.fromkeys((*STAGES, 'write'), 0)
    top = tempfile.mkdtemp()
    # a reward that an untrained model earns in different amounts, so that there is an advantage to learn from
    rewards.TASKS['gsm8k'] = rewards.TASKS['gsm8k']._replace(reward=lambda text, example: len(set(text)) / 10)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.run([*FLAGS, '--out', os.path.join(top, 'whole')])  # here, so that the forks find all imports done
    whole, rounds = content(os.path.join(top, 'whole')), 0
    log = whole['run/log.jsonl']
    with open(os.path.join(top, 'whole', 'run', 'log.jsonl')) as file:
        timed = [json.loads(line) for line in file]
    seconds = {stage: sum(row['seconds'] for row in timed if row['stage'] == stage) for stage in ('sft', 'grpo')}
    seconds['base'] = seconds['sft']  # as many updates, of as many texts
    assert len(log) == len({row['loss'] for row in log}) == 16, 'the run that all are compared with must move'
    with tqdm(total=4 * n, disable=None) as bar:
        while min(kills.values()) < n:
            out, rounds, ended, passed = os.path.join(top, str(rounds)), rounds + 1, False, 0
            while not ended:
                wanted = [kind for kind in list(kills)[passed:] if kills[kind] < n]
                kind = wanted[-1 if rng.random() < 0.25 else 0] if wanted else 'none'  # the next stage, now and then a write
                killed = attempt(out, kind, rng, seconds)
                ended, passed = killed is None, STAGES.index(killed) if killed in STAGES else passed
                if killed:
                    kills[killed] += 1
                    bar.update()
            left = content(out)
            for name in whole.keys() | left.keys():
                if not name.endswith('.new'):
                    assert left.get(name) == whole.get(name), f'{out}: {name} is not what the uninterrupted run left'
            shutil.rmtree(out)
    shutil.rmtree(top)
    print(', '.join(f'{kind} {count}' for kind, count in kills.items()) + f' kills in {rounds} runs: every file of every run '
          f'equals the uninterrupted one\'s ({time.time() - began:.0f} s)')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
