"""The recipe of d1 (arXiv 2504.12216): a base model, masked SFT, then diffu-GRPO, evaluated after each stage.

    python train.py                                   nano model, grade-school word problems, a laptop
    python train.py --task sudoku --stages grpo       diffu-GRPO from the base, without SFT
    python train.py --task gsm8k,math                 one model for several tasks
    python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct
    torchrun --nproc_per_node 8 train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct

Where we differ from the paper and the official code: see "Differences" in README.md.
A run's files are in out/NAME/: config.json, log.jsonl, samples.jsonl, results.json, model/, curves.png.
"""
import argparse
import contextlib
import hashlib
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import rewards
from grpo import complete, fixed_logps, group_advantages, grpo_loss, rollout
from loglik import completion_logps, random_prompt_mask
from model import LLaDA, add_lora, load, lora_off, merge_lora, read_json
from sample import chat, check_lengths, check_speed, parser
from sft import Muon, add_base_noise, add_noise, pad, sft_backward

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Every flag, its default for the nano model and for LLaDA, and what it is (with the paper's symbol).
FLAGS = [
    # flag                 nano         LLaDA        meaning
    ('What to run',),
    ('task',               'gsm8k',     'gsm8k',     'one task or a comma list: ' + ', '.join(rewards.TASKS)),
    ('model',              'nano',      'nano',      "'nano', a hub id such as GSAI-ML/LLaDA-8B-Instruct, or a folder"),
    ('stages',             'sft,grpo',  'sft,grpo',  'sft,grpo is d1; grpo alone is diffu-GRPO from the base; sft alone'),
    ('name',               '',          '',          'the run is kept in out/NAME (default: model-task-stages-seed)'),
    ('out',                'out',       'out',       'the folder of all runs and bases'),
    ('seed',               0,           0,           'of everything random but the base'),
    ('device',             '',          '',          'default: cuda, else mps, else cpu'),
    ('dtype',              'float32',   'bfloat16',  'of arithmetic and frozen weights; what is trained, and the optimizer, is float32'),
    ('resume',             False,       False,       'go on with the run of this name'),
    ('eval_only',          False,       False,       'evaluate the model, train nothing'),
    ('Data',),
    ('data',               '',          '',          'training problems: a .jsonl, .json or .csv file, or one a task: a.jsonl,,c.csv'),
    ('eval_data',          '',          '',          'test problems: a file'),
    ('sft_data',           '',          '',          'a file of question, thinking_trajectories, attempt, as s1K'),
    ('max_prompt',         64,          512,         'tokens; longer prompts are dropped and counted'),
    ('diffu-GRPO',),
    ('grpo_steps',         40,          640,         'outer iterations, each num_prompts new prompts; the paper counts updates, mu times as many'),
    ('num_prompts',        8,           16,          'prompts an outer iteration; their groups share each update'),
    ('num_generations',    8,           6,           'completions a prompt (G)'),
    ('num_iterations',     4,           12,          'updates an outer iteration (mu)'),
    ('p_mask_prompt',      0.15,        0.15,        'probability to mask a prompt token (p_mask)'),
    ('fixed_mask',         False,       False,       'one prompt mask for all mu updates, for the ablation'),
    ('epsilon',            0.5,         0.5,         'clip range of the ratio (epsilon)'),
    ('beta',               0.04,        0.04,        'weight of the KL term (beta)'),
    ('norm',               'token',     'token',     "'token': mean over all tokens; 'sequence': per sequence, then over them"),
    ('learning_rate',      5e-5,        3e-6,        'AdamW, constant'),
    ('weight_decay',       0.1,         0.1,         'AdamW'),
    ('max_grad_norm',      0.2,         0.2,         'gradient clipping'),
    ('Sampling',),
    ('gen_length',         32,          256,         'tokens of a completion (L)'),
    ('block_length',       8,           32,          'tokens of a block, filled from left to right'),
    ('steps',              16,          128,         'denoising steps of a rollout'),
    ('temperature',        0.9,         0.9,         'of the rollouts; evaluation is greedy'),
    ('remasking',          'low_confidence', 'low_confidence', "of the rollouts; 'random' commits tokens in random order"),
    ('cfg_scale',          0.0,         0.0,         'classifier-free guidance, in rollouts and evaluation'),
    ('cache',              False,       False,       'reuse keys and values outside the block, in rollouts and evaluation; not exact'),
    ('refresh',            0,           0,           'steps of a block between refreshes of the cache (0 = never)'),
    ('threshold',          0.0,         0.0,         'commit every token this sure, at least one a step, in rollouts and evaluation (0 = off)'),
    ('SFT',),
    ('sft_problems',       100,         0,           'built-in traces a task (nano)'),
    ('sft_steps',          20,          2500,        'updates'),
    ('sft_batch',          32,          8,           'sequences an update'),
    ('sft_length',         32,          3584,        'answer tokens; longer answers are cut and counted'),
    ('sft_learning_rate',  3e-6,        1e-5,        'AdamW, warmed up, then falling linearly to 0'),
    ('sft_max_grad_norm',  1.0,         1.0,         'gradient clipping'),
    ('Nano base',),
    ('base_steps',         2000,        0,           'pretraining updates'),
    ('base_batch',         64,          0,           'sequences an update'),
    ('base_learning_rate', 4e-3,        0.0,         'AdamW, warmed up, then falling linearly to 0'),
    ('textbook',           0.7,         0.0,         'share of the updates that come first and see worked solutions only'),
    ('thinkers',           0.35,        0.0,         'share of the texts after that which write their steps down; the rest guesses'),
    ('LoRA and memory',),
    ('lora_rank',          0,           128,         '0 = train all weights'),
    ('lora_alpha',         64,          64,          'adapters are scaled by alpha/rank'),
    ('lora_dropout',       0.0,         0.0,         'in the policy pass only; above 0 the first ratio is not 1'),
    ('lora_targets',       'q_proj,k_proj,v_proj,up_proj', 'q_proj,k_proj,v_proj,up_proj', 'linear layers with an adapter'),
    ('gradient_checkpointing', False,   True,        'recompute activations in the backward pass'),
    ('micro_batch',        64,          1,           'SFT sequences a forward pass'),
    ('Evaluation and logs',),
    ('eval_n',             512,         0,           'test problems (0 = all)'),
    ('eval_lengths',       '16,32,64',  '128,256,512', 'generation lengths; steps = half of it'),
    ('eval_batch',         128,         8,           'prompts a batch'),
    ('save_every',         10,          10,          'updates (SFT) or outer iterations (GRPO) between checkpoints'),
    ('sample_every',       10,          10,          'outer iterations between printed completions'),
]
# Settings that one task has of its own, and the nano model on real text, which is longer.
NANO_DATA_PRESET = dict(gen_length=48, steps=24, sft_length=48, eval_lengths='24,48,96', max_prompt=128, base_steps=300,
                        grpo_steps=40, learning_rate=1e-4)
TASK_PRESETS = {
    # gsm8k: what it needs, for a short first run; thinkers: so many that some rollouts of the base think
    'nano': {'gsm8k': dict(base_steps=1400, grpo_steps=20, thinkers=0.42), 'math': dict(thinkers=0.42)},
    'LLaDA': {'math': dict(grpo_steps=550), 'countdown': dict(num_iterations=8, grpo_steps=625),
              'sudoku': dict(num_iterations=8, grpo_steps=475, temperature=0.3, eval_n=256)},
}
MAX_BAD_UPDATES = 5  # in a row without a finite loss and gradient
# Numbers have to be positive, except these and the flags that are 0 for nano; SHARES end at 1.
ZERO_TOO = ('temperature', 'beta', 'weight_decay', 'p_mask_prompt', 'textbook', 'thinkers', 'eval_n', 'base_steps')
SHARES = ('p_mask_prompt', 'textbook', 'thinkers', 'lora_dropout')
# What a resumed run may be given anew; all else would make it another run.
FREE_ON_RESUME = ('resume', 'out', 'name', 'device', 'learning_rate', 'sft_learning_rate', 'micro_batch', 'eval_batch',
                  'gradient_checkpointing', 'save_every', 'sample_every')


def parse(argv):
    """The settings of a run: flags as given, else the task's, else the model's defaults of FLAGS; ValueError on nonsense."""
    p = parser(__doc__)
    for name, *row in FLAGS:
        if not row:
            group = p.add_argument_group(name)
            continue
        nano, llada, text = row
        default = f'{nano}' if nano == llada else f'nano {nano}, LLaDA {llada}'
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(nano, bool) else dict(type=type(nano))
        group.add_argument(f'--{name}', default=None, help=f'{text} [{default}]'.replace('%', '%%'), **kind)
    given = {name: value for name, value in vars(p.parse_args(argv)).items() if value is not None}
    model = given.get('model', 'nano')  # a folder of ours may hold a trained nano model
    nano = model == 'nano' or os.path.isdir(model) and 'nano' in read_json(model, 'config.json')
    world = 'nano' if nano else 'LLaDA'
    settings = {row[0]: row[1] if world == 'nano' else row[2] for row in FLAGS if len(row) > 1}
    for name, value in given.items():
        most = 1 if name in SHARES else math.inf
        zero = name in ZERO_TOO or settings[name] == 0
        if type(value) in (int, float) and not (0 <= value <= most and value < math.inf and (value or zero)):
            raise ValueError(f'--{name} {value} is out of range: give a number {"from" if zero else "above"} 0'
                             + (' to 1' if most == 1 else ''))
    settings.update(TASK_PRESETS[world].get(given.get('task', settings['task']), {}))
    if world == 'nano' and given.get('data'):
        settings.update(NANO_DATA_PRESET)
    return argparse.Namespace(**{**settings, **given}, world=world)


def check(args):
    """Raises ValueError, in one line, on settings that cannot work."""
    linears = ('q_proj', 'k_proj', 'v_proj', 'attn_out', 'ff_proj', 'up_proj', 'ff_out')
    for name, known in dict(task=rewards.TASKS, stages=('sft', 'grpo'), lora_targets=linears, norm=('token', 'sequence'),
                            remasking=('low_confidence', 'random'), dtype=('float32', 'bfloat16')).items():
        value = getattr(args, name)
        for choice in value.split(',') if name in ('task', 'stages', 'lora_targets') else [value]:
            if choice not in known:
                raise ValueError(f'--{name} {choice!r} is unknown: choose from {", ".join(known)}')
    args.tasks, args.stages = args.task.split(','), args.stages.split(',')
    if args.stages == ['grpo', 'sft'] or any(len(set(names)) < len(names) for names in (args.tasks, args.stages)):
        raise ValueError(f'--task {args.task} --stages {",".join(args.stages)}: name each once, sft before grpo')
    check_lengths(args.gen_length, args.block_length, args.steps)
    check_speed(args.cache, args.refresh, args.threshold, args.remasking)
    if not re.fullmatch('[0-9]{1,6}(,[0-9]{1,6})*', args.eval_lengths):
        raise ValueError(f'--eval_lengths {args.eval_lengths!r} is no list of lengths such as 128,256')
    args.eval_lengths = [int(n) for n in args.eval_lengths.split(',')]
    for length in args.eval_lengths:
        check_lengths(length, args.block_length, length // 2, f'--eval_lengths {length}, in {length // 2} steps: ')
    for name in ('num_prompts', 'sft_batch', 'base_batch'):  # else some would wait for others' gradients for ever
        if getattr(args, name) % world_size():
            raise ValueError(f'--{name} {getattr(args, name)} is not a multiple of the {world_size()} processes')
    if args.num_generations < 2:
        raise ValueError('--num_generations must be at least 2: an advantage compares completions of one prompt')
    for name in ('data', 'eval_data'):
        files = getattr(args, name).split(',')
        if files != [''] and len(files) != len(args.tasks):
            raise ValueError(f'--{name} names {len(files)} files for {len(args.tasks)} tasks: give one for each, in the '
                             "tasks' order, such as a.jsonl,,c.csv (empty: the task's own data)")
    if args.world == 'nano' and args.data and not args.eval_data:
        raise ValueError('--data without --eval_data would test on the built-in problems: give both')
    if args.world == 'nano' and not args.eval_n and not args.eval_data:
        raise ValueError('--eval_n 0 means all test problems, and built-in ones have no end: give a number')
    args.device = args.device or ('cuda' if torch.cuda.is_available() else
                                  'mps' if torch.backends.mps.is_available() else 'cpu')
    dtype = getattr(torch, args.dtype)
    try:
        torch.ones(1, device=args.device, dtype=dtype).item()
        if args.device.startswith('cuda') and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
            raise RuntimeError('it has no bfloat16: give --dtype float32')
    except (RuntimeError, AssertionError, TypeError) as e:
        raise ValueError(f'--device {args.device} is not usable here ({str(e).splitlines()[0]}): try --device cpu') from None
    args.name = args.name or '-'.join([os.path.basename(args.model.rstrip('/')), args.task.replace(',', '+'),
                                       'eval' if args.eval_only else '+'.join(args.stages), f'seed{args.seed}'])
    if args.name != os.path.basename(args.name) or args.name in ('.', '..'):
        raise ValueError(f'--name {args.name} is no name of a folder in --out')
    parents = os.path.abspath(args.out)
    while not os.path.exists(parents):
        parents = os.path.dirname(parents)
    if not (os.path.isdir(parents) and os.access(parents, os.W_OK)):
        raise ValueError(f'--out {args.out}: {parents} is no folder that can be written')
    return args


# ---- many processes (torchrun); one process never notices ----

def world_size(): return dist.get_world_size() if dist.is_initialized() else 1
def rank(): return dist.get_rank() if dist.is_initialized() else 0


def gather(items):
    """A list of every process' items, those of process 0 first."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def replicated(model):
    """What averages the gradients of the processes: FSDP2's model itself, else DDP around it; one process needs neither."""
    return model if world_size() == 1 or isinstance(model, FSDPModule) else DistributedDataParallel(model)


def shard(model):
    """Splits all weights over the processes (FSDP2), for full fine-tuning; one block is whole at a time."""
    policy = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)  # the rotary angles stay float32
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def full(tensor): return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor  # FSDP2 shards tensors


def frozen_copy(model):
    """A copy with all weights in one place, in the dtype that the model computes in; every process takes part."""
    with torch.device('meta'):
        copy = LLaDA(model.config)
    copy.load_state_dict({name: full(tensor).to(model.compute_dtype or tensor.dtype, copy=True)  # one whole at a time
                          for name, tensor in model.state_dict().items()}, assign=True)
    return copy.requires_grad_(False).eval()


def unsharded(model):
    """The model, or a copy of it that is whole on every process, so that each can sample at its own pace."""
    return frozen_copy(model) if isinstance(model, FSDPModule) else model


def reference_policy(args, model):
    """A function that gives a context in which there is the reference policy: the model as it is now."""
    if args.lora_rank or not args.beta:  # without its adapters; with beta 0 nobody asks
        return lambda: lora_off(model)
    frozen = frozen_copy(model)
    if isinstance(model, FSDPModule):
        shard(frozen)
    return lambda: contextlib.nullcontext(frozen)


# ---- random streams ----

def random_stream(*key):
    """A random.Random that depends on the key only, so that a resumed run, on any number of processes, draws the same."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


def torch_stream(device, *key):
    return torch.Generator(device).manual_seed(random_stream(*key).getrandbits(63))


def endless(items, *key):
    """A function that gives item number i of an endless stream: every item once, in random order, before any again."""
    order = functools.lru_cache(2)(lambda epoch: random_stream(*key, epoch).sample(items, len(items)))
    return lambda i: order(i // len(items))[i % len(items)]


# ---- problems and demonstrations ----

class Problems:
    """A task's problems as (prompt ids, example): from the built-in generator, or the rows of a file or hub data set."""

    def __init__(self, args, tokenizer, task, part, source=None):
        self.task, self.part, self.seed, self.tokenizer = task, part, args.seed, tokenizer
        path = file_of(args, task, part)
        self.rows = None
        if args.world != 'nano' or path:
            pairs = [(self.encode(row), row) for row in rewards.load_examples(task, path or source, part)]
            self.rows = [pair for pair in pairs if len(pair[0]) <= args.max_prompt]
            if len(self.rows) < len(pairs):
                say(f'{task}, {part}: {len(pairs) - len(self.rows)} of {len(pairs)} prompts are longer than '
                    f'--max_prompt {args.max_prompt} and dropped')
            if not self.rows:
                raise ValueError(f'{task}: no prompt fits --max_prompt {args.max_prompt}: raise it')
            self.row = endless(self.rows, args.seed, task)
        elif (longest := max(len(self.draw(i)[0]) for i in range(100))) > args.max_prompt:
            raise ValueError(f'{task}: built-in prompts have up to {longest} tokens, --max_prompt {args.max_prompt}: '
                             'raise it')

    def encode(self, example):
        return chat(self.tokenizer, rewards.prompt(self.task, example))

    def draw(self, index):
        """Problem number `index` of an endless stream; every row of a file comes once before any comes again."""
        if self.rows is None:
            example = rewards.make(self.task, random_stream(self.seed, self.task, self.part, index), self.part)
            return self.encode(example), example
        return self.row(index)

    def first(self, n):
        """The first n problems (0 = all rows), in the file's order; of a Sudoku file the n that d1 drew (256 of its 500)."""
        if self.rows is None:
            return [self.draw(i) for i in range(n)]
        if self.task == 'sudoku' and 0 < n < len(self.rows):
            return [self.rows[i] for i in np.random.RandomState(42).choice(len(self.rows), n, replace=False)]
        return self.rows[:n or None]


def file_of(args, task, part):
    return dict(zip(args.tasks, (args.data if part == 'train' else args.eval_data).split(','))).get(task)


def test_sets(args, tokenizer):
    """{name: [(prompt ids, example)]}: for each task one set of its name; code has two on the hub, code-ID each."""
    sets = {}
    for task in args.tasks:
        hub, named = rewards.TASKS[task].datasets[1], {task: None}
        if args.world != 'nano' and not file_of(args, task, 'test') and len(hub) > 1:
            named = {f'{task}-{os.path.basename(source[0])}': source for source in hub}
        for name, source in named.items():
            sets[name] = Problems(args, tokenizer, task, 'test', source).first(args.eval_n)
    return sets


def base_batch(args, tokenizer, sources, step):
    """One pretraining batch [(prompt ids, answer ids)]: first worked solutions, then what thinkers and guessers write."""
    pairs = []
    for i in range(args.base_batch):
        prompt_ids, example = sources[i % len(sources)].draw(step * args.base_batch + i)
        textbook = step < args.textbook * args.base_steps
        text = rewards.tagged(example['solution'], example['reply']) if textbook else \
            rewards.demonstration(example, random_stream('base', step, i), args.thinkers)
        pairs.append((prompt_ids, tokenizer(text)['input_ids'][:args.gen_length]))
    return pairs


def sft_pairs(args, tokenizer):
    """All SFT pairs [(prompt ids, answer ids)]: clean traces of small built-in problems, or s1K."""
    if args.world == 'nano' and not args.sft_data:
        traces = [rewards.clean_trace(task, random_stream('sft', task, i))
                  for i in range(args.sft_problems) for task in args.tasks]
    else:
        traces = rewards.load_s1k(args.sft_data or None)
    pairs = [(chat(tokenizer, text), tokenizer(answer, add_special_tokens=False)['input_ids']) for text, answer in traces]
    kept = [(prompt, answer[:args.sft_length]) for prompt, answer in pairs if len(prompt) <= args.max_prompt]
    cut = sum(len(answer) > args.sft_length for _, answer in pairs)
    say(f'SFT: {len(kept)} traces, {len(pairs) - len(kept)} dropped for a prompt over --max_prompt, '
        f'{cut} cut to --sft_length')
    if not kept:
        raise ValueError(f'SFT has no trace whose prompt fits --max_prompt {args.max_prompt}: raise it')
    return kept


# ---- evaluation ----

def answers(args, model, tokenizer, name, pairs, length, label=None):
    """The greedy answers to a test set at one length, graded, in the set's order; every process makes its share."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))[rank()::world_size()]  # alike lengths pad little
    done = []
    for first in progress_bar(range(0, len(order), args.eval_batch), label, leave=False):
        batch = order[first:first + args.eval_batch]
        examples = [pairs[i][1] for i in batch]
        ids, attention_mask, _ = pad([(pairs[i][0], []) for i in batch], 0, model.config.eos_id, model.device)
        _, mask, texts = complete(model, tokenizer, ids, gen_length=length, block_length=args.block_length,
                                  steps=length // 2, cfg_scale=args.cfg_scale, attention_mask=attention_mask,
                                  cache=args.cache, refresh=args.refresh, threshold=args.threshold)
        items = [dict(question=example['question'], generations=text, ground_truth=example['answer'],
                      effective_tokens=n, **grade)
                 for example, text, n, grade in zip(examples, texts, mask.sum(1).tolist(), grades(name, texts, examples))]
        done += zip(batch, items)
    done = dict(gather(done))
    return [done[i] for i in range(len(pairs))]


def evaluate(args, run, model, tokenizer, tests, stage):
    """{test set: {generation length: scores}} of greedy answers, which are written to the run's folder."""
    scores, model = {name: {} for name in tests}, unsharded(model)
    for name, pairs in tests.items():
        for length in args.eval_lengths:
            done = answers(args, model, tokenizer, name, pairs, length, f'{stage}: {name}, {length} tokens')
            metrics = scores[name][str(length)] = rewards.summary(done)
            write_json(os.path.join(run.folder, f'{stage}_{name}_{length}_generations.json'),
                       dict(generations=done, metrics=metrics, model_path=args.model, gen_length=length,
                            diffusion_steps=length // 2, block_length=args.block_length))
    return scores


def constant_scores(args, tokenizer, tests):
    """What one answer scores that does not read the problem, in the form that evaluate returns."""
    scores = {}
    for name, pairs in tests.items():
        text = rewards.tagged('', task_of(name).trivial)
        graded = grades(name, [text] * len(pairs), [example for _, example in pairs])
        tokens = len(tokenizer(text, add_special_tokens=False)['input_ids']) + 1  # the end counts
        row = rewards.summary([dict(effective_tokens=tokens, **grade) for grade in graded])
        scores[name] = {str(length): row for length in args.eval_lengths}
    return scores


def task_of(name): return rewards.TASKS[name.partition('-')[0]]  # of a test set: see test_sets


def grades(name, texts, examples):
    """Reward and correctness of each text for its example; in a pool, since code runs in processes."""
    t = task_of(name)
    grade = lambda text, example: dict(reward=t.reward(text, example), correct=t.correct(text, example))
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return list(pool.map(grade, texts, examples))


# ---- files of a run: process 0 writes, the others pass by ----

def say(text):
    if rank() == 0:
        tqdm.write(text)


def progress_bar(items, label, **more):
    return tqdm(items, label, disable=None if rank() == 0 else True, **more)  # None: no bar in a file


def write(path, fill):
    """Has fill(file) write a file so that, whatever happens, either the old or the new content is there, whole."""
    if rank():
        return
    try:
        with open(path + '.new', 'wb') as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # a full disk does not say where; torch.save has errors of its own
        raise OSError(f'{path}.new cannot be written ({e})') from None
    os.replace(path + '.new', path)


def write_json(path, value): write(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def append(path, row):
    if rank():
        return
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no NaN
    with open(path, 'a') as f:
        f.write(json.dumps(row) + '\n')
        f.flush()
        os.fsync(f.fileno())  # a checkpoint that counts on it may follow


def save(path, model, optimizers=(), **progress):
    """Trainable weights, optimizer states and progress into one file; every process takes part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, states = get_state_dict(model, optimizers, options=options)
    write(path, lambda f: torch.save(dict(weights=weights, states=states, progress=progress), f))


def restore(path, model, optimizers=(), stage=None):
    """Puts a checkpoint (of this stage, if one is named) into model and optimizers; returns its progress."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)  # a pickle that would run code is refused
        weights, states, progress = saved['weights'], saved['states'], saved['progress']
    except Exception as e:  # a cut or foreign file raises whatever it likes
        raise ValueError(f'{path} is no checkpoint ({type(e).__name__}): '
                         'remove it to begin again at the one before') from None
    if stage and stage != progress['stage']:
        return progress
    try:
        own = {name for name, p in model.named_parameters() if p.requires_grad}
        if strangers := weights.keys() ^ own:
            raise KeyError(f'{min(strangers)} is not in both')
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=states,
                       options=StateDictOptions(full_state_dict=True, strict=False))
    except (RuntimeError, KeyError, AttributeError) as e:
        line = ' '.join(str(e).split())[:200]
        raise ValueError(f'{path} is no checkpoint of this model and these settings ({line})') from None
    return progress


# ---- training ----

class Run:
    """What a run keeps between steps: where its files are, how much of the logs counts, bad updates in a row."""

    def __init__(self, args):
        self.folder, self.bad, self.stop = os.path.join(args.out, args.name), 0, False
        self.checkpoint = os.path.join(self.folder, 'checkpoint.pt')
        self.logs = [os.path.join(self.folder, name) for name in ('log.jsonl', 'samples.jsonl')]

    def begin(self, stage, model, optimizers):
        """The step to begin a stage with: 0, or where its checkpoint was written; the logs are cut back to it."""
        progress = dict(stage='', step=0, sizes=[0, 0], bad=0)
        if os.path.exists(self.checkpoint):
            progress = restore(self.checkpoint, model, optimizers, stage)
        for path, size in zip(self.logs, progress['sizes']):
            if rank() == 0 and os.path.exists(path):
                os.truncate(path, size)
        signal.signal(signal.SIGINT, self.interrupt)
        if progress['stage'] != stage:
            return 0
        say(f'going on with {stage} at step {progress["step"]}')
        self.bad = progress['bad']
        return progress['step']

    def interrupt(self, *_):
        """Ctrl-C: the run ends after this step; the next Ctrl-C ends it at once."""
        self.stop = True
        say('stopping after this step; Ctrl-C again stops at once, without saving')
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def end_step(self, args, stage, step, steps, model, optimizers):
        """Writes the checkpoint when it is time; ends the run on Ctrl-C or after too many bad updates."""
        if self.bad >= MAX_BAD_UPDATES:
            kept = f'{self.checkpoint} holds the last good state' if os.path.exists(self.checkpoint) else 'none was good'
            raise ValueError(f'{stage} step {step}: {self.bad} updates in a row had no finite loss and gradient; {kept}: '
                             + ('lower --base_learning_rate in a run of another --name' if stage == 'base' else
                                'lower the learning rate and --resume'))
        stop = any(gather([self.stop]))
        if stop or (self.bad == 0 and ((step + 1) % args.save_every == 0 or step + 1 == steps)):
            sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path in self.logs]
            save(self.checkpoint, model, optimizers, stage=stage, step=step + 1, sizes=sizes, bad=self.bad)
        if stop:
            raise KeyboardInterrupt
        if step + 1 == steps:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing to save until the next stage


def update(model, optimizers, max_grad_norm, run, loss):
    """Clips and steps; a loss (of all processes) or gradient that is not finite skips that. Returns the gradient's norm."""
    norm = full(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm))
    run.bad = 0 if norm.isfinite() and math.isfinite(loss) else run.bad + 1
    if run.bad:
        say(f'an update was skipped: loss {loss}, norm of the gradient {norm.item()}')
    for optimizer in optimizers:
        if run.bad == 0:
            optimizer.step()
        optimizer.zero_grad()
    return norm.item()


def train_sft(args, run, stage, model, optimizers, draw, steps, length, max_grad_norm):
    """Masked SFT (Algorithm 2), also the base's pretraining; draw(step): the step's pairs, the same on every process."""
    net = replicated(model)
    rates = [optimizer.param_groups[0]['lr'] for optimizer in optimizers]  # before a checkpoint brings its own
    start = run.begin(stage, model, optimizers)
    bar = progress_bar(range(start, steps), stage, initial=start, total=steps)
    for step in bar:
        began = time.time()
        for optimizer, rate in zip(optimizers, rates):  # up in the first twentieth, then down to 0
            optimizer.param_groups[0]['lr'] = rate * min(1, 20 * (step + 1) / steps) * (1 - step / steps)
        torch.manual_seed(random_stream(args.seed, stage, step, rank()).getrandbits(63))  # of LoRA's dropout
        model.train()
        loss = sft_backward(net, draw(step), length, model.config, torch_stream(model.device, args.seed, stage, step),
                            args.micro_batch, rank(), world_size(), add_base_noise if stage == 'base' else add_noise)
        loss = sum(gather([loss])) / world_size()
        norm = update(model, optimizers, max_grad_norm, run, loss)
        bar.set_postfix(loss=f'{loss:.3f}')
        if stage != 'base':
            append(run.logs[0], dict(stage=stage, step=step, loss=loss, grad_norm=norm, bad_updates=int(run.bad > 0),
                                     seconds=time.time() - began))
        run.end_step(args, stage, step, steps, model, optimizers)


def train_grpo(args, run, model, tokenizer, sources):
    """diffu-GRPO; the numbers are the lines of the paper's Algorithm 1."""
    device = model.device
    reference = reference_policy(args, model)                                                               # 1
    net, optimizers = replicated(model), [adamw(model, args.learning_rate, args.weight_decay)]
    start = run.begin('grpo', model, optimizers)
    optimizers[0].param_groups[0]['lr'] = args.learning_rate  # the checkpoint may have had another
    for step in progress_bar(range(start, args.grpo_steps), 'grpo', initial=start, total=args.grpo_steps):  # 2
        began, rollouts = time.time(), []
        torch.manual_seed(random_stream(args.seed, 'grpo', step, rank()).getrandbits(63))  # of LoRA's dropout
        old_policy = unsharded(model)                                                                       # 3
        for k in range(rank(), args.num_prompts, world_size()):  # one prompt's group is one micro-batch
            turn, place = divmod(step * args.num_prompts + k, len(sources))  # the tasks take turns
            task = sources[place].task
            prompt_ids, example = sources[place].draw(turn)                                                 # 4
            group = rollout(old_policy, tokenizer, prompt_ids, num_generations=args.num_generations,        # 5
                            reward=lambda texts: [g['reward'] for g in grades(task, texts, [example] * len(texts))],
                            generator=torch_stream(device, args.seed, 'rollout', step, k),
                            gen_length=args.gen_length, block_length=args.block_length, steps=args.steps,
                            temperature=args.temperature, remasking=args.remasking, cfg_scale=args.cfg_scale,
                            cache=args.cache, refresh=args.refresh, threshold=args.threshold)
            advantages = group_advantages(group.rewards, args.num_generations)                              # 6
            rollouts.append((k, task, example, group, advantages))
        del old_policy  # a copy needs its memory no longer
        views = {}  # line 8: for each update and group a prompt mask, and the log-probs under it that stay fixed
        for n in range(args.num_iterations):
            for k, _, _, group, _ in rollouts:
                stream = torch_stream(device, args.seed, 'mask', step, 0 if args.fixed_mask else n, k)
                prompt_mask = random_prompt_mask(group.prompt_ids, args.p_mask_prompt, stream)
                views[n, k] = prompt_mask, *fixed_logps(model, reference, group, prompt_mask, args.beta)
        stats, sampled = [], time.time() - began
        for n in range(args.num_iterations):                                                                # 7
            for k, _, _, group, advantages in rollouts:
                prompt_mask, old_logps, ref_logps = views[n, k]                                             # 8
                model.train()
                logps = completion_logps(net, group.prompt_ids, group.completion_ids, prompt_mask, group.mask)  # 9
                loss, stat = grpo_loss(logps, old_logps, ref_logps, advantages, group.mask, args.epsilon,
                                       args.beta, args.norm)                                                # 10
                (loss / len(rollouts)).backward()
                stats.append(dict(loss=loss.item(), **stat))
            loss = sum(gather([stat['loss'] for stat in stats[-len(rollouts):]]))
            stats[-1] |= dict(grad_norm=update(model, optimizers, args.max_grad_norm, run, loss), bad=run.bad > 0)
        report(args, run, step, rollouts, stats, time.time() - began, sampled)
        run.end_step(args, 'grpo', step, args.grpo_steps, model, optimizers)


def adamw(model, lr, weight_decay):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr, betas=(0.9, 0.99), weight_decay=weight_decay)


def report(args, run, step, rollouts, stats, seconds, sampled):
    """One line a step on the screen and in log.jsonl, means over all groups and updates; now and then a completion."""
    groups = gather([dict(k=k, task=task, question=example['question'], completion=group.texts[0],
                          answer=example['answer'], rewards=group.rewards.tolist(), lengths=group.mask.sum(1).tolist())
                     for k, task, example, group, _ in rollouts])
    groups.sort(key=lambda group: group['k'])
    stats = gather(stats)
    mean = lambda values: sum(values) / len(values)
    line = dict(stage='grpo', step=step, reward=mean([reward for group in groups for reward in group['rewards']]),
                flat_groups=mean([len(set(group['rewards'])) == 1 for group in groups]))
    for name in ('loss', 'kl', 'ratio', 'clip_high', 'clip_low', 'grad_norm'):
        line[name] = mean([stat[name] for stat in stats if name in stat])
    line |= dict(first_ratio=stats[0]['ratio'], bad_updates=sum(stat.get('bad', 0) for stat in stats) // world_size(),
                 length=mean([n for group in groups for n in group['lengths']]), seconds=seconds, rollout_seconds=sampled)
    append(run.logs[0], line)
    say(f'grpo {step + 1}/{args.grpo_steps}: ' + ', '.join(
        f'{name} {line[name]:.3f}' for name in ('reward', 'kl', 'ratio', 'clip_high', 'clip_low', 'length', 'seconds')))
    shown = groups[step % len(groups)]
    sample = {name: shown[name] for name in ('task', 'question', 'completion', 'answer')}
    append(run.logs[1], dict(step=step, **sample, reward=shown['rewards'][0], effective_tokens=shown['lengths'][0]))
    if step % args.sample_every == 0:
        say(f"  {shown['question']!r}\n  {shown['completion']!r} -> reward {shown['rewards'][0]:.3f}")


# ---- a run, from the base to the table ----

def nano_base(args):
    """The folder of the nano base: pretrained once by thinkers and guessers, then kept in out/ for all seeds."""
    model, tokenizer = load('nano', device=args.device)
    corpus = argparse.Namespace(**{**vars(args), 'seed': 0, 'eval_data': ''})
    sources = [Problems(corpus, tokenizer, task, 'train') for task in args.tasks]
    for source in sources:
        if source.rows and 'wrong' not in source.rows[0][1]:  # a file that shows no solutions and no guesses
            source.rows = None  # the built-in problems do
    draw = lambda step: base_batch(corpus, tokenizer, sources, step)
    settings = [(k, v) for k, v in vars(args).items()
                if k.startswith('base_') or k in ('gen_length', 'textbook', 'thinkers')]
    made_of = [draw(0), draw(args.base_steps - 1), str(model), settings]  # of the data, too, for files may change
    corpus.name = f"base-{'+'.join(args.tasks)}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]}"
    run = Run(corpus)
    folder = os.path.join(run.folder, 'model')
    os.makedirs(run.folder, exist_ok=True)
    with open(os.path.join(run.folder, 'lock'), 'w') as lock:
        if rank() == 0 and fcntl:  # a second run that needs this base waits for the first; freed when a process ends
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(gather([os.path.exists(folder)])):  # then all processes train it together
            say(f'pretraining a nano base of {sum(p.numel() for p in model.parameters()):,} weights, kept in {folder}')
            matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
            rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
            adam = torch.optim.AdamW(rest, args.base_learning_rate, (0.9, 0.95), weight_decay=0.0)
            train_sft(corpus, run, 'base', model, [Muon(matrices), adam], draw, args.base_steps, args.gen_length, 1.0)
            save_model(folder, model, tokenizer)
    gather([])  # all wait for process 0
    return folder


def save_model(folder, model, tokenizer):
    """The model and tokenizer in the Hugging Face layout; the folder appears only when it is whole."""
    model = unsharded(model)
    if rank():
        return
    shutil.rmtree(folder + '.new', ignore_errors=True)
    try:
        model.save_pretrained(folder + '.new')
        tokenizer.save_pretrained(folder + '.new')
    except Exception as e:  # safetensors and tokenizers have error types of their own for a full disk
        raise OSError(f'{folder}.new cannot be written ({e})') from None
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(folder + '.new', folder)


def train_stage(args, run, stage, model, tokenizer, sources, pairs):
    """One stage from the weights before it to the weights after it, kept in out/NAME/STAGE.pt."""
    after = os.path.join(run.folder, f'{stage}.pt')
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets.split(','),
                 random_stream(args.seed, 'lora', stage).getrandbits(63))
    if os.path.exists(after):
        restore(after, model)
    else:
        if stage == 'sft':
            pair = endless(pairs, args.seed, 'sft')
            draw = lambda step: [pair(i) for i in range(step * args.sft_batch, (step + 1) * args.sft_batch)]
            train_sft(args, run, 'sft', model, [adamw(model, args.sft_learning_rate, args.weight_decay)],
                      draw, args.sft_steps, args.sft_length, args.sft_max_grad_norm)
        else:
            train_grpo(args, run, model, tokenizer, sources)
        save(after, model)
    if args.lora_rank:
        merge_lora(model)


def check_resume(args, folder):
    """Raises ValueError unless the folder is new or --resume goes on with what it holds."""
    if not os.path.exists(os.path.join(folder, 'config.json')):  # written when all has been checked
        if args.resume:
            raise ValueError(f'{folder} holds no run to go on with: leave out --resume, or give the --name that it has')
        return
    if not args.resume:
        raise ValueError(f'{folder} exists: --resume goes on with it, --name NAME begins another')
    before = read_json(folder, 'config.json')
    for name, now in vars(args).items():
        if name not in FREE_ON_RESUME and before.get(name, now) != now:
            raise ValueError(f'--{name} is {now!r}, but {folder} was begun with {before[name]!r}: --resume with that, '
                             'or begin another run with --name NAME')


def main(argv=None):
    args = check(parse(argv))
    run = Run(args)
    check_resume(args, run.folder)
    dtype = getattr(torch, args.dtype)
    weights_dtype = dtype if args.lora_rank or args.eval_only else torch.float32
    model, tokenizer = load(args.model, weights_dtype, args.device)
    trained = [] if args.eval_only else [args.gen_length] + [args.sft_length] * ('sft' in args.stages)
    longest = args.max_prompt + max(args.eval_lengths + trained)
    if longest > model.config.max_sequence_length:
        raise ValueError(f'--max_prompt and the longest completion make {longest} tokens, the model ends at '
                         f'{model.config.max_sequence_length}: lower --max_prompt, --gen_length, --eval_lengths or '
                         '--sft_length')
    tests = test_sets(args, tokenizer)
    sources = [] if args.eval_only else [Problems(args, tokenizer, task, 'train') for task in args.tasks]
    pairs = sft_pairs(args, tokenizer) if sources and 'sft' in args.stages else []
    gather([])  # every process has looked before one writes
    os.makedirs(run.folder, exist_ok=True)
    write_json(os.path.join(run.folder, 'config.json'), vars(args))
    if args.model == 'nano':
        model, tokenizer = load(nano_base(args), weights_dtype, args.device)
    model.compute_dtype = dtype  # of float32 weights: a bfloat16 weight would not notice steps of 3e-6
    model.gradient_checkpointing = args.gradient_checkpointing
    if world_size() > 1 and not args.lora_rank:
        shard(model)
    results_file = os.path.join(run.folder, 'results.json')
    results = read_json(run.folder, 'results.json') if os.path.exists(results_file) else {}
    results['constant'] = constant_scores(args, tokenizer, tests)
    for stage in ['base', *([] if args.eval_only else args.stages)]:
        if stage != 'base':
            train_stage(args, run, stage, model, tokenizer, sources, pairs)
        if stage not in results:
            results[stage] = evaluate(args, run, model, tokenizer, tests, stage)
            write_json(results_file, results)
    if not args.eval_only:
        save_model(os.path.join(run.folder, 'model'), model, tokenizer)
    if rank() == 0:
        if 'grpo' in results:
            curves(run)
        print(table(args, results))


def table(args, results):
    """The results as text: a row a stage, at each generation length accuracy with its 95 % interval, reward, tokens."""
    names = {'constant': 'one constant answer', 'base': 'base', 'sft': '+ SFT',
             'grpo': 'd1 (SFT + diffu-GRPO)' if 'sft' in results else '+ diffu-GRPO'}
    lines = []
    for name in results['constant']:
        lines += ['', f'{name}: accuracy % [95 % interval], mean reward, effective tokens, at generation length',
                  f'{"":24}' + ''.join(f'{length:<38}' for length in args.eval_lengths)]
        for stage, scores in results.items():
            line = f'{names[stage]:24}'
            for length in args.eval_lengths:
                c = scores[name][str(length)]
                cell = f'{100 * c["accuracy"]:5.1f} [{100 * c["low"]:.1f}, {100 * c["high"]:.1f}] {c["reward"]:5.2f}'
                share = f'cells {100 * c["share"]:.1f}' if name == 'sudoku' else ''
                line += f'{cell} {c["effective_tokens"]:5.1f}'.ljust(30) + share.ljust(12)
            lines.append(line)
    return '\n'.join(lines)


def curves(run):
    """Draws reward, KL and completion length over the steps of log.jsonl into curves.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say('no curves.png: pip install matplotlib to have one')
    with open(run.logs[0]) as f:
        rows = [row for row in map(json.loads, f) if row['stage'] == 'grpo']
    figure = Figure(figsize=(12, 3))
    for axis, name in zip(figure.subplots(1, 3), ('reward', 'length', 'kl')):
        axis.plot([row['step'] for row in rows], [row[name] for row in rows])
        axis.set(title=name, xlabel='outer iteration')
    figure.tight_layout()
    figure.savefig(os.path.join(run.folder, 'curves.png'), dpi=100)


def run(argv=None):
    """main, with one clear line and status 2 for what the user can mend, and 130 after Ctrl-C."""
    try:
        if 'RANK' in os.environ:
            join_processes()
        main(argv)
    except (ValueError, OSError) as e:
        time.sleep(10 * (rank() > 0))  # when process 0 says it too, torchrun ends the others meanwhile: one line, not eight
        hint = ': mend that; a run that has begun goes on with --resume' if isinstance(e, OSError) else ''  # a full disk
        sys.exit(print(f'train.py: {e}{hint}', file=sys.stderr) or 2)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError) and 'allocate memory' not in str(e):
            raise
        sys.exit(print('train.py: the memory is too small: lower --num_generations, --micro_batch or --eval_batch, or give '
                       '--gradient_checkpointing', file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print('stopped; the same command with --resume goes on', file=sys.stderr) or 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join_processes():
    """Joins the processes that torchrun started."""
    try:
        if not 0 <= int(os.environ['RANK']) < int(os.environ['WORLD_SIZE']):
            raise ValueError('RANK is not below WORLD_SIZE')  # it would wait for others for half an hour
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group()
    except (ValueError, KeyError, RuntimeError) as e:  # torch's errors are RuntimeErrors with a stack in them
        names = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
        settings = ' '.join(f'{name}={os.environ.get(name)}' for name in names)
        raise ValueError(f'the processes cannot meet ({str(e).splitlines()[0]}; {settings}): start them with torchrun, '
                         'and give --master_port another number if that one is taken') from None


if __name__ == '__main__':
    run()
