"""The recipe of d1 (arXiv 2504.12216): a base model, masked SFT, diffu-GRPO, an evaluation of each.

    python train.py --task gsm8k                      nano model, built-in problems, a laptop
    python train.py --task sudoku --stages grpo       diffu-GRPO from the base, without SFT
    python train.py --task gsm8k,math                 one model for several tasks
    python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct
    torchrun --nproc_per_node 8 train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct

A run leaves out/NAME/{config.json, log.jsonl, samples.jsonl, results.json, model/} and more.
Departures from the paper (P) and the official code (C), on purpose:
 1. Every group has a prompt mask of its own for each of the mu updates. C's mask index counts
    micro-batches: with two of them per update each sees every second mask, twice.
 2. Random numbers come from generators keyed by seed, step, prompt and row. C's masking seeds the
    global generator with one of 4096 numbers: its rollouts have no more different noises.
 3. The noise of the sampler is float32, not bfloat16, and the mask can never be sampled.
 4. There is no LoRA dropout. C's is on while old log-probs are taken: its first ratio is not 1.
 5. beta > 0 works with mu = 1. Prompts padded on the left are masked out of the attention.
 6. Training and evaluation share one prompt. Prompts that are too long are skipped, not cut.
 7. norm 'token' is C's loss, norm 'sequence' is P's equation 4.
"""
import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import rewards
from grpo import complete, fixed_logps, policy_loss, rollout
from loglik import completion_logps, draw_views, random_prompt_mask
from model import (LORA_LAYERS, add_lora, load, load_adapter, merge_lora, read_json, save_adapter,
                   save_tokenizer)
from sample import chat, check_lengths, left_pad, random_stream, shuffled, torch_stream
from sft import Corpus, Traces, clean_trace, encode_traces, load_s1k, masked_loss

# Every flag, its default for the nano model and for LLaDA, and what it is (the paper's symbol).
FLAGS = [
    # What to run
    ('task', 'gsm8k', 'gsm8k', 'one task or a comma list: ' + ', '.join(rewards.TASKS)),
    ('model', 'nano', 'nano', "'nano', a hub id such as GSAI-ML/LLaDA-8B-Instruct, or a folder"),
    ('stages', 'sft,grpo', 'sft,grpo', 'sft,grpo is d1; grpo: diffu-GRPO from the base; or sft'),
    ('name', '', '', 'the run is kept in out/NAME [model-task-stages-seed]'),
    ('out', 'out', 'out', 'the folder of all runs'),
    ('adapter', '', '', "an adapter in PEFT's layout, merged into the model before all else"),
    ('seed', 0, 0, 'of everything random but the base and the test problems'),
    ('device', 'cpu', 'cuda', 'a nano model is faster on the CPU'),
    ('dtype', 'float32', 'bfloat16', 'of arithmetic and frozen weights; trained ones are float32'),
    ('resume', False, False, 'go on with the run of this name'),
    ('eval_only', False, False, 'evaluate the model, train nothing'),
    # Data
    ('data', '', '', 'training problems: .jsonl, .json or .csv; one per task: a.jsonl,,c.csv'),
    ('eval_data', '', '', 'test problems: likewise'),
    ('sft_data', '', '', 'a file with question, thinking_trajectories, attempt, as s1K'),
    ('max_prompt', 64, 512, 'tokens; longer prompts are skipped'),
    ('instructions', '', '', 'a file with other instructions than rewards.py has'),
    ('prefill', '', '', "what every completion begins with, such as '<reasoning>'"),
    # diffu-GRPO
    ('grpo_steps', 40, 640, 'outer iterations of num_prompts new prompts and mu updates'),
    ('num_prompts', 8, 16, 'prompts per outer iteration; their groups share each update'),
    ('num_generations', 8, 6, 'completions per prompt (G)'),
    ('num_iterations', 4, 12, 'updates per outer iteration (mu)'),
    ('p_mask_prompt', 0.15, 0.15, 'probability to mask a prompt token (p_mask)'),
    ('fixed_mask', False, False, 'the same prompt mask and views in all mu updates'),
    ('epsilon', 0.5, 0.5, 'clip range of the ratio (epsilon)'),
    ('beta', 0.0, 0.04, 'weight of the KL term (beta)'),
    ('kl', 'k3', 'k3', 'estimate of the KL term'),
    ('norm', 'token', 'token', 'mean over all tokens, or per sequence and then over them'),
    ('divide_by_std', False, False, "divide advantages by their group's standard deviation"),
    ('estimator', 'one_step', 'one_step', 'of the log-probs; loglik.py has the others'),
    ('num_views', 4, 4, 'forward passes of the estimators stepmerge and elbo'),
    ('loss', 'grpo', 'grpo', 'of the policy; grpo.py has the others'),
    ('learning_rate', 2e-5, 3e-6, 'AdamW, constant'),
    ('weight_decay', 0.1, 0.1, 'AdamW'),
    ('max_grad_norm', 0.2, 0.2, 'gradient clipping'),
    # Sampling
    ('gen_length', 32, 256, 'tokens of a completion (L)'),
    ('block_length', 8, 32, 'tokens of a block; blocks are filled from left to right'),
    ('steps', 16, 128, 'denoising steps of a completion'),
    ('temperature', 0.9, 0.9, 'of the rollouts; evaluation is greedy'),
    ('remasking', 'low_confidence', 'low_confidence', 'which tokens a step of rollouts commits'),
    ('cfg_scale', 0.0, 0.0, 'classifier-free guidance'),
    ('cache', False, False, 'keep keys and values outside the block; faster, not exact'),
    ('threshold', 0.0, 0.0, 'commit every token of this confidence, at least one (0 = off)'),
    ('rollout_batch', 64, 6, 'completions per forward pass, at least one group'),
    # SFT
    ('sft_steps', 60, 2500, 'updates'),
    ('sft_batch', 32, 8, 'sequences per update'),
    ('sft_length', 32, 3584, 'answer tokens; longer answers are cut'),
    ('sft_learning_rate', 3e-4, 1e-5, 'AdamW, warmed up, then falling linearly to 0'),
    ('sft_lora_alpha', 64, 256, 'the scale is alpha/rank; 2 in d1'),
    ('sft_lora_targets', 'q_proj,k_proj,v_proj', 'q_proj,k_proj,v_proj', 'layers'),
    ('micro_batch', 64, 1, 'sequences per forward pass'),
    # LoRA and memory
    ('lora_rank', 0, 128, '0 = train all weights'),
    ('lora_alpha', 64, 64, 'adapters are scaled by alpha/rank'),
    ('lora_targets', 'q_proj,k_proj,v_proj,up_proj', 'q_proj,k_proj,v_proj,up_proj', 'layers'),
    ('gradient_checkpointing', False, None,
     'recompute activations in the backward pass; None = unless a GPU has room for them'),
    ('compile', False, None, 'torch.compile the blocks, which takes minutes; None = on a GPU'),
    # Evaluation and logs
    ('eval_n', 256, 0, 'test problems (0 = all)'),
    ('eval_lengths', '32,64', '128,256,512', 'completion lengths; steps = half of it'),
    ('eval_batch', 128, 8, 'prompts per batch'),
    ('eval_every', 0, 0, 'outer iterations between evaluations, whose adapters are kept (0 = off)'),
    ('save_every', 10, 1, 'updates (SFT) or outer iterations between checkpoints'),
    ('save_minutes', 0, 10, 'at least this long between checkpoints'),
    ('sample_every', 10, 10, 'outer iterations between printed completions'),
    # Nano base
    ('base_seed', -1, -1, 'pretrain a base with this seed, kept in out/; else the one in assets/'),
    ('base_steps', 3000, 0, 'its updates'),
]


def train_grpo(args, model, tokenizer, problems, tests):
    """diffu-GRPO; the numbers are the lines of the paper's Algorithm 1."""
    reference = reference_policy(args, model)                                                  # 1
    optimizer = adamw(model, args.learning_rate, args.weight_decay)
    sampling = dict(sampling_knobs(args), gen_length=args.gen_length, steps=args.steps,
                    temperature=args.temperature, remasking=args.remasking)
    prompts_per_call = max(1, args.rollout_batch // args.num_generations)
    num_prefill = len(prefill_ids(args, tokenizer))
    start = load_checkpoint(args, 'grpo', model, [optimizer])
    for part in optimizer.param_groups:          # a resumed run may have been given another rate
        part['lr'] = args.learning_rate
    for step in progress_bar('grpo', start, args.grpo_steps):                                  # 2
        # before the step and not after it, so that a resumed run makes up for a killed evaluation
        if args.eval_every and step and step % args.eval_every == 0:
            evaluate(args, model, tokenizer, tests, f'grpo-{step}')
            keep_adapter(args, model, f'adapter-{step}')
        began = time.time()
        drawn = []                               # (k, task, prompt ids, example)
        for k in my_share(args.num_prompts):
            drawn.append((k, *problems.draw(step * args.num_prompts + k)))                     # 4

        # G completions of every prompt, their rewards and advantages                          5, 6
        groups = []
        for first in range(0, len(drawn), prompts_per_call):
            groups += rollout(model, tokenizer, drawn[first:first + prompts_per_call],
                              args.num_generations, sampling, args.seed, step, args.prefill,
                              args.divide_by_std)

        # the prompt masks of all mu updates, now, since the old policy exists only here
        for group in groups:
            for n in range(args.num_iterations):
                stream = torch_stream(args.device, args.seed, 'mask', step,
                                      0 if args.fixed_mask else n, group.k)
                group.prompt_masks.append(random_prompt_mask(                                  # 8
                    group.prompt_ids, args.p_mask_prompt, stream, num_prefill))
                group.views.append(draw_views(args.estimator, args.num_views, group.order, stream))
            group.old_logps, group.ref_logps = fixed_logps(model, reference, group, args.loss,
                                                           args.beta)                          # 3
        rollout_seconds = time.time() - began

        stats, grad_norms = [], []
        for n in range(args.num_iterations):                                                   # 7
            for group in groups:
                logps = completion_logps(model, group.prompt_ids, group.completion_ids,
                                         group.prompt_masks[n], group.completion_mask,
                                         group.views[n])     # at temperature 1, as d1         # 9
                loss, stat = policy_loss(logps, group.old_logps[n], group.ref_logps[n],
                                         group.advantages, group.completion_mask, args.loss,
                                         args.epsilon, args.beta, args.norm, args.kl)          # 10
                (loss / args.num_prompts).backward()             # of all processes' prompts
                stats.append(dict(stat, loss=loss.item()))
            sum_gradients(model)                 # over the processes, if there are several
            grad_norm = clip_grad_norm_(model.parameters(), args.max_grad_norm)
            if grad_norm.isfinite():             # else this update is skipped, and counted
                optimizer.step()
            optimizer.zero_grad()
            grad_norms.append(grad_norm.item())
        report(args, step, groups, stats, grad_norms, rollout_seconds, time.time() - began)
        save_checkpoint(args, 'grpo', step + 1, args.grpo_steps, model, [optimizer])


def train_sft(args, stage, model, optimizers, data, steps):
    """Masked SFT (d1, Algorithm 2); the pretraining of the nano base has other data and noise.

    data.batch(step) is the same Batch on every process; each takes its share of the rows.
    """
    start = load_checkpoint(args, stage, model, optimizers)
    for step in progress_bar(stage, start, steps):
        began = time.time()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                warm_up = min(1, 20 * (step + 1) / steps)        # over the first 5 % of the steps
                group['lr'] = optimizer.defaults['lr'] * warm_up * (1 - step / steps)
        batch = data.batch(step)
        B, L = batch.answers.shape
        loss = 0.0
        for rows in torch.tensor(my_share(B)).split(args.micro_batch):
            prompts = [batch.prompts[row] for row in rows]
            prompt_ids, attention_mask = left_pad(prompts, model.config.eos_id, args.device)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, L), value=True)   # (rows, T)
            answers, masked = batch.answers[rows], batch.masked[rows]        # (rows, L)
            noisy = answers.masked_fill(masked, model.config.mask_id)
            ids = torch.cat((prompt_ids, noisy), dim=1)                      # (rows, T)
            logps = model.token_logps(ids, answers, masked, attention_mask)
            part = masked_loss(logps, masked, batch.t[rows], B * L)
            part.backward()
            loss += part.item()
        sum_gradients(model)
        grad_norm = clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            if grad_norm.isfinite():
                optimizer.step()
            optimizer.zero_grad()
        loss = sum(gather([loss]))               # over the processes
        append(args, 'log.jsonl', dict(stage=stage, step=step, loss=loss,
                                       grad_norm=grad_norm.item(), seconds=time.time() - began))
        save_checkpoint(args, stage, step + 1, steps, model, optimizers)


def adamw(model, learning_rate, weight_decay):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.99),
                             weight_decay=weight_decay)


def reference_policy(args, model):
    """The reference: the policy itself, whose adapters can be switched off, or a frozen copy.

    They are those of diffu-GRPO alone: SFT's have been merged into the weights.
    """
    if args.lora_rank or not args.beta:
        return model
    frozen = copy.deepcopy(model).requires_grad_(False)
    return frozen.to(model.compute_dtype)        # None: as it is


def sampling_knobs(args):
    """generate's knobs that rollouts and evaluation share."""
    return dict(block_length=args.block_length, cfg_scale=args.cfg_scale, cache=args.cache,
                threshold=args.threshold)


def report(args, step, groups, stats, grad_norms, rollout_seconds, seconds):
    """A line per iteration, on the screen and in log.jsonl; a completion in samples.jsonl."""
    rows = []
    for group in groups:
        flat = group.rewards.min() == group.rewards.max()        # it has no gradient
        lengths = group.completion_mask.sum(1).float()
        rows.append(dict(reward=group.rewards.mean().item(), flat_groups=float(flat),
                         length=lengths.mean().item()))
    line = dict(stage='grpo', step=step)
    for some in (gather(rows), gather(stats)):
        for name in some[0]:
            line[name] = mean([row[name] for row in some])
    line['first_ratio'] = stats[0]['ratio']      # 1 if the old log-probs are the policy's
    line['grad_norm'] = mean(grad_norms)
    line['bad_updates'] = sum(not math.isfinite(norm) for norm in grad_norms)
    line.update(rollout_seconds=rollout_seconds, seconds=seconds)
    append(args, 'log.jsonl', line)
    shown = ('reward', 'kl', 'ratio', 'clip_high', 'clip_low', 'length', 'seconds')
    print0(f'grpo {step + 1}/{args.grpo_steps}: '
           + ', '.join(f'{name} {line[name]:.3f}' for name in shown))

    group = groups[0]                            # prompt 0 of the iteration is process 0's
    question, text = group.example['question'], group.texts[0]
    reward = group.rewards[0].item()
    tokens = group.completion_mask[0].sum().item()
    append(args, 'samples.jsonl', dict(stage='grpo', step=step, task=group.task, question=question,
                                       completion=text, answer=group.example['answer'],
                                       reward=reward, effective_tokens=tokens))
    if step % args.sample_every == 0:
        print0(f'  {question!r}\n  {text!r} -> reward {reward:.3f}')


def mean(values):
    return sum(values) / len(values)


# ---- problems ----

class Problems:
    """The training problems of all tasks, as one endless stream in which the tasks take turns."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.rows = {}                           # task -> the examples of its file; else built-in
        for task, file in args.data.items():
            if file or args.world != 'nano':
                self.rows[task] = rewards.load_examples(task, file, 'train')

    def draw(self, index):
        """Problem number index: task, prompt ids, example; another for one that is too long."""
        problem_index, task_index = divmod(index, len(self.args.tasks))
        task = self.args.tasks[task_index]
        for attempt in range(1000):
            i = problem_index + attempt * 10 ** 9                # far along the stream
            if task in self.rows:
                example = shuffled(self.rows[task], i, self.args.seed, task)
            else:
                stream = random_stream(self.args.seed, task, 'train', i)
                example = rewards.make(task, stream, 'train')
            prompt_ids = encode(self.args, self.tokenizer, task, example)
            if len(prompt_ids) <= self.args.max_prompt:
                return task, prompt_ids, example
        raise ValueError(f'{task}: no prompt fits --max_prompt {self.args.max_prompt}: raise it')


def encode(args, tokenizer, task, example):
    """The ids of an example's prompt, and of the text that its completion begins with."""
    text = rewards.prompt(task, example, args.instructions)
    return chat(tokenizer, text) + prefill_ids(args, tokenizer)


def prefill_ids(args, tokenizer):
    return tokenizer(args.prefill, add_special_tokens=False)['input_ids']


def test_sets(args, tokenizer):
    """{name: [(task, prompt ids, example)]}: a set per task; code has two on the hub, code-ID."""
    sets = {}
    for task, file in args.eval_data.items():
        hub = rewards.TASKS[task].datasets[1]
        if args.world == 'nano' and not file:
            streams = [random_stream(task, 'test', i) for i in range(args.eval_n)]
            sets[task] = [rewards.make(task, stream, 'test') for stream in streams]
        elif file or len(hub) < 2:
            sets[task] = rewards.load_examples(task, file, 'test')
        else:
            for source in hub:
                name = f'{task}-{Path(source[0]).name}'
                sets[name] = rewards.load_examples(task, source, 'test')
    for name, examples in sets.items():
        sets[name] = test_set(args, tokenizer, name, examples)
    return sets


def test_set(args, tokenizer, name, examples):
    """The first eval_n (0 = all) whose prompts fit; of d1's 500 Sudokus the 256 that d1 drew."""
    task = name.partition('-')[0]
    if task == 'sudoku' and 0 < args.eval_n < len(examples):
        generator = np.random.RandomState(42)
        drawn = generator.choice(len(examples), args.eval_n, replace=False)
        examples = [examples[i] for i in drawn]
    problems = []
    for example in examples:
        prompt_ids = encode(args, tokenizer, task, example)
        if len(prompt_ids) <= args.max_prompt:
            problems.append((task, prompt_ids, example))
    too_long = len(examples) - len(problems)
    if too_long:
        print0(f'{name}: {too_long} of {len(examples)} test prompts are longer '
               f'than --max_prompt {args.max_prompt} and left out')
    if not problems:
        raise ValueError(f'{name}: no test prompt fits --max_prompt {args.max_prompt}: raise it')
    return problems[:args.eval_n or None]


# ---- evaluation ----

def evaluate(args, model, tokenizer, tests, stage):
    """Greedy answers to every test set at every length; results.json grows by each as it ends."""
    results = read_results(args)
    scores = results.setdefault(stage, {})
    for name, problems in tests.items():
        for length in args.eval_lengths:
            if str(length) in scores.setdefault(name, {}):
                continue                         # a resumed run has it
            label = f'{stage}: {name}, {length} tokens'
            items = answers(args, model, tokenizer, problems, length, label)
            score = rewards.summary(items)
            print0(f'{label}: accuracy {score["accuracy"]:.1%}, reward {score["reward"]:.2f}')
            saved = dict(generations=items, metrics=score, model_path=args.model,
                         gen_length=length, diffusion_steps=length // 2,
                         block_length=args.block_length)
            write_json(args, f'{stage}_{name}_{length}_generations.json', saved)
            scores[name][str(length)] = score
            write_json(args, 'results.json', results)


def read_results(args):
    if Path(args.folder, 'results.json').exists():
        return read_json(args.folder, 'results.json')
    return {}


def answers(args, model, tokenizer, problems, length, label):
    """The graded greedy answers to problems, in their order; every process makes its share."""
    lengths = [len(prompt) for _, prompt, _ in problems]
    by_length = sorted(range(len(problems)), key=lengths.__getitem__)        # alike: little padding
    mine = by_length[rank()::world_size()]
    sampling = dict(sampling_knobs(args), gen_length=length, steps=length // 2)
    found = []
    for first in progress_bar(label, 0, len(mine), args.eval_batch):
        batch = [problems[i] for i in mine[first:first + args.eval_batch]]
        tasks, prompts, examples = zip(*batch)   # of one task
        _, mask, _, texts = complete(model, tokenizer, prompts, sampling, prefill=args.prefill)
        grades = rewards.grade_all(tasks[0], texts, examples)
        tokens = mask.sum(1).tolist()
        for i, (reward, correct) in enumerate(grades):
            found.append(dict(question=examples[i]['question'], generations=texts[i],
                              ground_truth=examples[i]['answer'], reward=reward, correct=correct,
                              effective_tokens=tokens[i]))
    found = dict(gather(list(zip(mine, found))))
    return [found[i] for i in range(len(problems))]


def constant_scores(args, tokenizer, tests):
    """What one answer scores that does not read the problem, in the form of results[stage]."""
    scores = {}
    for name, problems in tests.items():
        task = problems[0][0]
        text = rewards.tagged('', rewards.TASKS[task].constant_answer)
        examples = [example for _, _, example in problems]
        tokens = len(tokenizer(text, add_special_tokens=False)['input_ids']) + 1   # the end counts
        grades = rewards.grade_all(task, [text] * len(examples), examples)
        items = [dict(reward=reward, correct=correct, effective_tokens=tokens)
                 for reward, correct in grades]
        score = rewards.summary(items)
        scores[name] = {str(length): score for length in args.eval_lengths}
    return scores


def table(args, results):
    """The results as text: a row per stage; at each length accuracy with its interval, ..."""
    names = dict(constant='one constant answer', base='base', sft='+ SFT', grpo='+ diffu-GRPO')
    if 'sft' in results:
        names['grpo'] = 'd1 (SFT + diffu-GRPO)'
    if args.prefill:
        names['base'] = f'base, given {args.prefill}'
    lines = []
    for name in results['constant']:
        lines.append(f'\n{name}: accuracy % [95 % interval], mean reward, effective tokens, '
                     'at completion length')
        heads = [f'{length:<32}' for length in args.eval_lengths]
        lines.append(' ' * 24 + ''.join(heads))
        for stage, scores in results.items():
            line = f'{names.get(stage, stage):24}'
            for length in args.eval_lengths:
                score = scores[name][str(length)]
                low, high = 100 * score['low'], 100 * score['high']
                cell = f'{100 * score["accuracy"]:5.1f} [{low:.1f}, {high:.1f}]'
                cell += f' {score["reward"]:5.2f} {score["effective_tokens"]:5.1f}'
                line += f'{cell:32}'
            lines.append(line)
            if name == 'sudoku':
                line = '  cells right, %'.ljust(24)
                for length in args.eval_lengths:
                    line += f'{100 * scores[name][str(length)]["share"]:5.1f}'.ljust(32)
                lines.append(line)
    return '\n'.join(lines)


# ---- many processes (torchrun): each takes a share, gradients are summed ----

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def my_share(n):
    """The numbers below n that are this process' own."""
    return range(rank(), n, world_size())


def sum_gradients(model):
    """Adds up the gradients of all processes; one process has nothing to do."""
    if world_size() == 1:
        return
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.grad)


def gather(items):
    """A list of every process' items, those of process 0 first."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier():
    """Waits until every process is here."""
    gather([])


def print0(text):
    if rank() == 0:
        tqdm.write(text)


def progress_bar(label, start, stop, stride=1):
    steps = range(start, stop, stride)
    hidden = True if rank() else None            # None: no bar where there is no terminal
    return tqdm(steps, label, disable=hidden, leave=False)


# ---- files: written whole or not at all, so that a run can be killed at any moment ----

def write(args, name, content):
    """Writes bytes, or has torch.save write anything else; process 0 only."""
    if rank():
        return
    path = Path(args.folder, name)
    new = Path(args.folder, name + '.new')
    try:
        with open(new, 'wb') as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as e:         # a full disk; torch.save has errors of its own
        raise OSError(f'{new} cannot be written ({e}); --resume goes on from the last '
                      'checkpoint') from None
    new.replace(path)


def write_json(args, name, value):
    text = json.dumps(value, indent=1)
    write(args, name, text.encode())


def append(args, name, row):
    """Adds a row to a log."""
    if rank() == 0:
        with open(Path(args.folder, name), 'a') as file:
            file.write(json.dumps(row) + '\n')


def read_log(args, name):
    """The rows of a log; a kill may have cut the last one short."""
    path = Path(args.folder, name)
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith('\n')]


def save_checkpoint(args, stage, step, steps, model, optimizers):
    """Trained weights and optimizers after `step` of `steps`, when it is time."""
    path = Path(args.folder, 'checkpoint.pt')
    last = path.stat().st_mtime if path.exists() else 0          # seconds
    long_ago = time.time() - last >= 60 * args.save_minutes
    if (step % args.save_every == 0 and long_ago) or step == steps:
        states = [optimizer.state_dict() for optimizer in optimizers]
        write(args, 'checkpoint.pt', dict(stage=stage, step=step, weights=trained_weights(model),
                                          optimizers=states))


def load_checkpoint(args, stage, model, optimizers):
    """The step to begin a stage with: 0, or its checkpoint's, whose content is put in place.

    The logs are cut back to that step.
    """
    checkpoint = read_checkpoint(args, 'checkpoint.pt')
    start = 0
    if checkpoint and checkpoint['stage'] == stage:
        start = checkpoint['step']
        put_weights(args, model, checkpoint['weights'])
        for optimizer, state in zip(optimizers, checkpoint['optimizers']):
            optimizer.load_state_dict(state)
        print0(f'going on with {stage} at step {start}')
    for name in ('log.jsonl', 'samples.jsonl'):
        lines = [json.dumps(row) + '\n' for row in read_log(args, name)
                 if row['stage'] != stage or row['step'] < start]
        write(args, name, ''.join(lines).encode())
    return start


def read_checkpoint(args, name):
    """The content of a checkpoint, plain data only, or None where there is no such file."""
    path = Path(args.folder, name)
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location='cpu', mmap=True, weights_only=True)
    except Exception as e:                       # a cut or foreign file raises whatever it likes
        raise ValueError(f'{path} is no checkpoint ({type(e).__name__}): remove it, and --resume '
                         'goes on from the one before') from None


def trained_weights(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def put_weights(args, model, weights):
    own = trained_weights(model)
    shapes = {name: p.shape for name, p in own.items()}
    if shapes != {name: p.shape for name, p in weights.items()}:
        raise ValueError(f'{args.folder} holds a checkpoint of another model: --name begins a run')
    for name in own:
        own[name].copy_(weights[name])


def keep_adapter(args, model, name):
    """The adapters of all stages so far, in the layout of the peft library."""
    if args.lora_rank and rank() == 0:
        base = args.model
        if base == 'nano':
            folder, settings = base_of(args)
            base = f'{folder}/model' if settings else 'nano'     # the one in assets/
        save_adapter(Path(args.folder, name), model, base)


def save_model(folder, model, tokenizer, source):
    """Model and tokenizer in the layout of their source; the folder appears only when whole."""
    if rank():
        return
    new = Path(f'{folder}.new')
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
        save_tokenizer(new, tokenizer, source)
    except Exception as e:                       # safetensors and tokenizers have error types too
        raise OSError(f'{new} cannot be written ({e})') from None
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)


# ---- a run, from its flags to the table ----

TASK_PRESETS = {
    'nano': {'gsm8k': dict(grpo_steps=20)},      # a short first run
    'LLaDA': {'math': dict(grpo_steps=550),
              'countdown': dict(num_iterations=8, grpo_steps=625),
              'sudoku': dict(num_iterations=8, grpo_steps=475, temperature=0.3, eval_n=256)},
}
# Real text is longer than the built-in problems.
NANO_DATA_PRESET = dict(gen_length=48, steps=24, sft_length=48, eval_lengths='24,48,96',
                        max_prompt=128, base_steps=1500, learning_rate=1e-4)
CHOICES = dict(norm=('token', 'sequence'), kl=('k3', 'k2'), dtype=('float32', 'bfloat16'),
               estimator=('one_step', 'coupled', 'stepmerge', 'ar', 'elbo'),
               loss=('grpo', 'espo', 'stable', 'wd1'), stages=('sft,grpo', 'grpo', 'sft'),
               remasking=('low_confidence', 'random', 'top_prob'))
SHARES = ('p_mask_prompt', 'threshold')
# What a resumed run may be given anew; all else would make it another run.
FREE_ON_RESUME = ('resume', 'out', 'name', 'folder', 'device', 'compile', 'learning_rate',
                  'micro_batch', 'eval_batch', 'eval_every', 'gradient_checkpointing',
                  'save_every', 'save_minutes', 'sample_every')


def parse(argv=None):
    """The settings of a run: flags as given, else the task's, else the model's defaults."""
    p = argparse.ArgumentParser(usage='python train.py [flags]; --help lists them',
                                description=__doc__, argument_default=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, nano, llada, text in FLAGS:
        default = nano if nano == llada else f'nano {nano}, LLaDA {llada}'
        kind = dict(type=type(nano), choices=CHOICES.get(name))
        if isinstance(nano, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif not isinstance(nano, str):
            kind = dict(type=in_range(name, type(nano), nano > 0 and llada > 0))
        p.add_argument(f'--{name}', help=f'{text} [{default}]'.replace('%', '%%'), **kind)
    given = vars(p.parse_args(argv))
    world = 'nano' if is_nano(given.get('model', 'nano')) else 'LLaDA'
    settings = {name: nano if world == 'nano' else llada for name, nano, llada, _ in FLAGS}
    task = given.get('task', settings['task'])
    settings.update(TASK_PRESETS[world].get(task, {}))
    if world == 'nano' and given.get('data'):
        settings.update(NANO_DATA_PRESET)
    args = argparse.Namespace(**{**settings, **given}, world=world)
    return check(args)


def in_range(name, kind, positive):
    """argparse's type of a number: from 0 (a count that is never 0: from 1), shares up to 1."""
    low = 1 if kind is int and positive else 0
    high = 1 if name in SHARES else 10 ** 9

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not from {low} to {high}')
        return value
    return number


def is_nano(model):
    """Whether it is the nano model, or a folder that a run of it has left."""
    if Path(model).is_dir():
        return 'nano' in read_json(model, 'config.json')
    return model == 'nano'


def check(args):
    """Splits lists, reads --instructions, settles device and folder; ValueError on nonsense."""
    args.tasks = args.task.split(',')
    args.stages = args.stages.split(',')
    for task in args.tasks:
        if task not in rewards.TASKS or args.tasks.count(task) > 1:
            raise ValueError(f'--task {task}: choose from {", ".join(rewards.TASKS)}, each once')
    check_lengths(args.gen_length, args.block_length, args.steps)
    try:
        args.eval_lengths = [int(length) for length in args.eval_lengths.split(',')]
        for length in args.eval_lengths:
            check_lengths(length, args.block_length, length // 2)
    except ValueError as e:
        raise ValueError(f'--eval_lengths: {e}; give lengths such as 128,256') from None
    for name in ('lora_targets', 'sft_lora_targets'):
        for target in getattr(args, name).split(','):
            if target not in LORA_LAYERS:
                raise ValueError(f'--{name} {target}: choose from {", ".join(LORA_LAYERS)}')
    if args.num_generations < 2:
        raise ValueError('--num_generations must be at least 2: an advantage compares completions')
    for name in ('num_prompts', 'sft_batch'):    # else some would wait for others' gradients
        if getattr(args, name) % world_size():
            raise ValueError(f'--{name} is no multiple of the {world_size()} processes')
    if args.instructions:
        with open(args.instructions) as file:
            args.instructions = file.read().strip()
    args.data = files_of(args.tasks, args.data)
    args.eval_data = files_of(args.tasks, args.eval_data)
    for task in args.tasks:
        built_in = args.world == 'nano' and not args.eval_data[task]
        if built_in and (args.data[task] or not args.eval_n):
            raise ValueError(f'{task} would be tested on built-in problems, which have no end and '
                             'are not those of --data: give --eval_data, or --eval_n')
    if args.device == 'cuda' and not torch.cuda.is_available():
        args.device = 'cpu'
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):       # torch's kinds of refusal
        raise ValueError(f'--device {args.device} is not usable here: try --device cpu') from None
    if args.compile is None:
        args.compile = args.device == 'cuda'
    model = Path(args.model).name
    kind = 'eval' if args.eval_only else '+'.join(args.stages)
    args.name = args.name or f'{model}-{"+".join(args.tasks)}-{kind}-seed{args.seed}'
    args.folder = str(Path(args.out, args.name))
    if args.eval_only:
        args.stages = []
    return args


def files_of(tasks, files):
    """'a.jsonl,,c.csv' -> {task: file}; '' is the task's own data."""
    files = files.split(',') if files else [''] * len(tasks)
    if len(files) != len(tasks):
        raise ValueError(f'--data and --eval_data take one file for each of {len(tasks)} tasks, '
                         'such as a.jsonl,,c.csv')
    return dict(zip(tasks, files))


def check_resume(args):
    """Raises ValueError unless the folder is new, or --resume goes on with what it holds."""
    if not Path(args.folder, 'config.json').exists():
        if args.resume:
            raise ValueError(f'{args.folder} holds no run to go on with: leave out --resume')
        return
    if not args.resume:
        raise ValueError(f'{args.folder} exists: --resume goes on with it, --name begins another')
    before = read_json(args.folder, 'config.json')
    for name, now in vars(args).items():
        if name not in FREE_ON_RESUME and before.get(name, now) != now:
            raise ValueError(f'--{name} is {now!r}, but {args.folder} was begun with '
                             f'{before[name]!r}: give that, or begin another run with --name')


def base_of(args):
    """The nano base's folder, and what makes it: None for the one in assets/.

    Raises ValueError if the folder holds a base that was made otherwise.
    """
    on_text = {task: file for task, file in args.data.items() if file}
    if args.base_seed < 0 and not on_text:
        return Path(__file__).resolve().parent / 'assets/nano', None
    seed = max(0, args.base_seed)
    settings = dict(seed=seed, steps=args.base_steps, length=args.gen_length, data=on_text)
    folder = Path(args.out, f'base-{seed}')
    if on_text:
        folder = Path(args.out, f'base-{seed}-text-{"-".join(args.tasks)}')
    if (folder / 'base.json').exists() and read_json(folder, 'base.json') != settings:
        raise ValueError(f'{folder} is a base of other settings: remove it, or give --out')
    return folder, settings


def nano_base(args, tokenizer):
    """The folder of the nano base, pretrained if need be and then kept."""
    folder, settings = base_of(args)
    if not settings:
        return folder
    base = copy.copy(args)
    base.folder = folder
    base.device = 'cpu'                          # the fastest for it
    # with text: the run's tasks, built-in problems where one has none; else built-in ones of all
    rows = dict.fromkeys(args.tasks if settings['data'] else rewards.TASKS)
    for task, file in settings['data'].items():  # text that shows no steps is of no use here
        examples = rewards.load_examples(task, file, 'train')
        rows[task] = [example for example in examples if 'wrong' in example]
    barrier()                                    # every process has looked before one writes
    finished = folder / 'model'
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(base, 'base.json', settings)
        model, _ = load('nano', seed=settings['seed'])
        num_weights = sum(p.numel() for p in model.parameters())
        print0(f'pretraining a nano base of {num_weights:,} weights, kept in {finished}')
        matrices, others = [], []    # Muon is for matrices inside; embeddings, head, norms: AdamW
        for name, p in model.named_parameters():
            if 'blocks' in name and p.dim() == 2:
                matrices.append(p)
            else:
                others.append(p)
        optimizers = [torch.optim.Muon(matrices, 0.01, weight_decay=0.1, momentum=0.95),
                      torch.optim.AdamW(others, 1e-3, (0.9, 0.95), weight_decay=0.0)]
        corpus = Corpus(rows, tokenizer, settings['seed'], args.base_steps, args.gen_length,
                        model.config)
        train_sft(base, 'base', model, optimizers, corpus, args.base_steps)
        save_model(finished, model, tokenizer, 'nano')           # the tokenizer is ours
    barrier()                                    # all wait for process 0
    return finished


def activations_fit(args, config):
    """Whether a GPU, with the model on it, has room for the activations of a micro-batch.

    Never without LoRA: gradients and AdamW's moments of all weights are still to come. Each token,
    block and unit of d_model costs about 40 bytes (LLaDA-8B) to 60 (Qwen3-0.6B), as tests/memory.py
    computes.
    """
    if args.device != 'cuda' or not args.lora_rank:
        return False
    tokens = max(args.num_generations * (args.max_prompt + args.gen_length),
                 args.micro_batch * (args.max_prompt + args.sft_length))
    free, _ = torch.cuda.mem_get_info()                          # bytes
    return 60 * tokens * config.n_layers * config.d_model < 0.8 * free


def sft_data(args, tokenizer, config):
    """The SFT set as train_sft takes it."""
    if args.world == 'nano' and not args.sft_data:
        traces = [clean_trace(random_stream('sft', i)) for i in range(100)]
    else:
        traces = load_s1k(args.sft_data)
    pairs, cut = encode_traces(traces, tokenizer, args.max_prompt, args.sft_length)
    dropped = len(traces) - len(pairs)
    print0(f'SFT: {len(pairs)} traces, {dropped} dropped for a prompt over --max_prompt, '
           f'{cut} cut to --sft_length')
    if not pairs:
        raise ValueError('SFT has no trace whose prompt fits --max_prompt: raise it')
    return Traces(pairs, args.sft_batch, args.sft_length, config, args.seed, args.device)


def train_stage(args, stage, model, tokenizer, problems, traces, tests):
    """One stage, from the weights before it to the weights after it, kept in STAGE.pt."""
    if args.lora_rank:
        seed = random_stream(args.seed, 'lora', stage).getrandbits(63)
        alpha, targets = args.lora_alpha, args.lora_targets
        if stage == 'sft':
            alpha, targets = args.sft_lora_alpha, args.sft_lora_targets
        add_lora(model, args.lora_rank, alpha, targets.split(','), seed)
    finished = read_checkpoint(args, f'{stage}.pt')
    if finished:
        put_weights(args, model, finished['weights'])
    else:
        if stage == 'sft':
            optimizer = adamw(model, args.sft_learning_rate, args.weight_decay)
            train_sft(args, 'sft', model, [optimizer], traces, args.sft_steps)
        else:
            train_grpo(args, model, tokenizer, problems, tests)
        write(args, f'{stage}.pt', dict(weights=trained_weights(model)))
    merge_lora(model)


def main(argv=None):
    args = parse(argv)
    check_resume(args)
    dtype = getattr(torch, args.dtype)
    # trained weights are float32, for bfloat16 ones would not notice steps of 3e-6
    weights_dtype = torch.float32 if args.stages and not args.lora_rank else dtype
    model, tokenizer = load(args.model, weights_dtype, args.device)
    answer_length = dict(sft=args.sft_length, grpo=args.gen_length)
    lengths = [answer_length[stage] for stage in args.stages]
    longest = args.max_prompt + max(args.eval_lengths + lengths)
    if longest > model.config.max_sequence_length:
        raise ValueError(f'--max_prompt and the longest completion make {longest} tokens, but the '
                         f'model takes {model.config.max_sequence_length}: lower one of them')
    if args.world == 'nano' and not any(args.eval_data.values()):
        print0(f'built-in problems in the manner of {", ".join(args.tasks)}; '
               '--data FILE --eval_data FILE takes real ones')
    tests = test_sets(args, tokenizer)
    problems = Problems(args, tokenizer) if 'grpo' in args.stages else None
    traces = sft_data(args, tokenizer, model.config) if 'sft' in args.stages else None
    if args.model == 'nano':
        base_of(args)                            # complains, if it must, before we write
    barrier()                                    # every process has looked before one writes
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    write_json(args, 'config.json', vars(args))
    if args.model == 'nano':
        model, tokenizer = load(nano_base(args, tokenizer), weights_dtype, args.device)
    if args.adapter:
        load_adapter(args.adapter, model)
    model.compute_dtype = dtype                  # of arithmetic
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.gradient_checkpointing is None:
        model.gradient_checkpointing = not activations_fit(args, model.config)
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=True)

    constant = constant_scores(args, tokenizer, tests)
    write_json(args, 'results.json', dict(constant=constant) | read_results(args))
    evaluate(args, model, tokenizer, tests, 'base')
    for stage in args.stages:
        train_stage(args, stage, model, tokenizer, problems, traces, tests)
        evaluate(args, model, tokenizer, tests, stage)
    if args.stages:
        save_model(Path(args.folder, 'model'), model, tokenizer, args.model)
        keep_adapter(args, model, 'adapter')
    barrier()                                    # process 0 has written its files
    if args.compile:
        graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
        print0(f'{graphs} graphs were compiled for {len(model.blocks)} blocks')
    print0(table(args, read_results(args)))


def run(argv=None):
    """main, with one clear line for what the user can mend."""
    try:
        if 'RANK' in os.environ:                 # torchrun has started us
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
            # lists and numbers go through gloo, on the CPU; gradients through NCCL
            dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')
        main(argv)
    except (ValueError, OSError) as e:
        sys.exit(f'train.py: {e}')
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit('train.py: the memory is too small: lower --num_generations, --rollout_batch, '
                 '--micro_batch or --eval_batch, or give --gradient_checkpointing')
    except KeyboardInterrupt:
        sys.exit('stopped; the same command with --resume goes on from the last checkpoint')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    run()
