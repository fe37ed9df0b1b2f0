"""Kills a small run at random moments, resumes it, and compares what it leaves with a whole run's.

    python tests/kill.py 20     20 kills each in pretraining, SFT, diffu-GRPO and within a write
Everything has to agree bit for bit, timings aside. Minutes on a CPU; needs os.fork.
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

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import torch

import rewards
import train

FLAGS = ('--base_seed 0 --base_steps 6 --sft_steps 10 --sft_batch 8 --grpo_steps 6 --num_prompts 2 '
         '--num_generations 4 --num_iterations 2 --gen_length 16 --block_length 8 --steps 8 '
         '--sft_length 32 --eval_n 4 --eval_lengths 8,16 --save_every 2 --beta 0.04 '
         '--name run').split()
KINDS = ('base', 'sft', 'grpo', 'write')


def start(out, kind, seed):
    """Runs or resumes the recipe in a process of its own; whether it was killed, in `kind`."""
    pid = os.fork()                              # a fork, to save the imports
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if 'SHOW' not in os.environ:
                os.dup2(null, 2)
            rng = random.Random(seed)
            if kind == 'write':
                die_in_a_write(rng)
            elif kind:
                die_in_a_stage(kind, rng)
            begun = os.path.exists(os.path.join(out, 'run', 'config.json'))
            train.run([*FLAGS, '--out', out, *(['--resume'] if begun else [])])
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
    assert killed or status == 0, f'{out}: status {status}; SHOW=1 shows why'
    return killed


def die_in_a_stage(kind, rng):
    """Sets a clock when the stage begins; an alarm that nobody catches kills as SIGKILL does."""
    def dying(train_stage):
        def wrapped(args, *rest):
            if kind == (rest[0] if isinstance(rest[0], str) else 'grpo'):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, seconds[kind]))
            train_stage(args, *rest)
            signal.setitimer(signal.ITIMER_REAL, 0)
        return wrapped
    train.train_sft = dying(train.train_sft)
    train.train_grpo = dying(train.train_grpo)


def die_in_a_write(rng):
    """Kills at one of the first writes: the new file is cut, or whole without its name."""
    calls_left = rng.randrange(1, 30)

    def dying(call, spoil):
        def wrapped(*args):
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                spoil(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)
        return wrapped

    def cut_file(fd):
        os.ftruncate(fd, rng.randrange(os.fstat(fd).st_size + 1))

    def cut_row(args, name, row):
        with open(os.path.join(args.folder, name), 'a') as file:
            line = json.dumps(row) + '\n'
            file.write(line[:rng.randrange(len(line) + 1)])

    def leave(source, target):
        pass
    os.fsync = dying(os.fsync, cut_file)
    os.replace = dying(os.replace, leave)
    train.append = dying(train.append, cut_row)


def content(out):
    """All that a finished run has left, but times and places: {file: bytes, rows or weights}."""
    found = {}
    for folder, _, names in os.walk(out):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, 'rb') as file:
                data = file.read()
            if name.endswith('.pt'):
                data = torch.load(path, weights_only=True)
            elif name.endswith('.jsonl'):
                data = [timeless(line) for line in data.splitlines()]
            elif name == 'config.json' and not folder.endswith('model'):
                data = timeless(data)
            if '.new' not in path:               # else a kill left it half written
                found[os.path.relpath(path, out)] = data
    return found


def timeless(text):
    left_out = ('seconds', 'rollout_seconds', 'out', 'folder', 'resume')
    return {key: value for key, value in json.loads(text).items() if key not in left_out}


def same(a, b):
    """Whether two trees of plain data and tensors are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):             # torch.load returns some tuples as lists
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(n=20):
    torch.set_num_threads(1)                     # forks must not share a pool of threads
    rng = random.Random(0)
    top = tempfile.mkdtemp()
    # a reward that an untrained model's completions earn in different amounts
    rewards.TASKS['gsm8k'] = rewards.TASKS['gsm8k']._replace(
        grade=lambda text, example: (len(set(text)) / 10, len(text) % 2 == 0))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.run([*FLAGS, '--out', os.path.join(top, 'whole')])
    whole = content(os.path.join(top, 'whole'))
    log = whole['run/log.jsonl']
    assert len({row['loss'] for row in log}) == 16, 'the run that all are compared with must move'
    for folder in ('base-0', 'run'):
        with open(os.path.join(top, 'whole', folder, 'log.jsonl')) as file:
            for row in map(json.loads, file):
                seconds[row['stage']] = seconds.get(row['stage'], 0) + row['seconds']

    kills, rounds = dict.fromkeys(KINDS, 0), 0
    while min(kills.values()) < n:
        out = os.path.join(top, str(rounds))
        kinds = list(KINDS[:3])
        kinds.insert(rng.randrange(4), 'write')
        for kind in kinds:
            kills[kind] += start(out, kind, rng.random())
        start(out, None, 0)
        left = content(out)
        for name in whole.keys() | left.keys():
            assert same(left.get(name), whole.get(name)), f'{out}: {name} is not the whole run\'s'
        shutil.rmtree(out)
        rounds += 1
    shutil.rmtree(top)
    print(', '.join(f'{kind} {count}' for kind, count in kills.items())
          + f' kills in {rounds} runs: every file of every run equals the uninterrupted one\'s')


seconds = {}                                     # of each stage, in the whole run

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
