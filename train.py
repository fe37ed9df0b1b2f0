"""The recipe of d1 (arXiv 2504.12216): a base model, masked SFT, diffu-GRPO, an evaluation of each.

    python train.py --task gsm8k                      nano model and problems, a laptop
    python train.py --task gsm8k --stages grpo        diffu-GRPO from the base, without SFT
    python train.py --task gsm8k,math                 one model for several tasks
    python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct
    torchrun --nproc_per_node 8 train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct

A run leaves out/NAME/{config.json, log.jsonl, samples.jsonl, results.json, model/} and more.
Departures from the paper (P) and the official code (C), on purpose:
 1. Every completion has a prompt mask of its own for each of the mu updates. C's mask index counts
    micro-batches: with two of them per update each sees every second mask, twice.
 2. Random numbers come from generators keyed by seed, step, prompt and row. C's masking seeds the
    global generator with one of 4096 numbers: its rollouts have no more different noises.
 3. The noise of the sampler is float32, not bfloat16, and the mask can never be sampled.
 4. There is no LoRA dropout. C's is on while old log-probs are taken: its first ratio is not 1.
 5. beta > 0 works with mu = 1, where C crashes. No token attends to the padding of prompts.
 6. Training and evaluation share one prompt. Prompts that are too long are skipped, not cut.
 7. norm 'token' is C's loss, norm 'sequence' is P's equation 4.
 8. Training problems that are test problems, too, are left out.
 9. Rewards are P's. C pays 0.1 for any closed Countdown answer and MATH boxes outside the tags, and
    takes tags, whole numbers and code only where they are written just as it expects.
10. Frozen weights are bfloat16, C's 4-bit NF4. SFT's rate warms up, and its noise levels are spread
    evenly over a batch.
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
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import rewards
from grpo import old_and_ref_logps, policy_loss, rollout, sample_texts
from loglik import completion_logps, draw_views, random_prompt_mask
from model import (LORA_LAYERS, add_lora, explained, load, load_adapter, read_json, save_adapter,
                   save_tokenizer)
from sample import chat, check_lengths, random_stream, shuffled, torch_stream
from sft import answer_logps, draw_batch, encode_traces, load_s1k, masked_loss

# Every flag: its default for the nano model and for LLaDA, what it is, and its choices if it has.
FLAGS = {
    'what to run': [
        ('task', 'gsm8k', 'gsm8k', ', '.join(rewards.TASKS) + '; or a comma list, then without the '
         'settings of a single one'),
        ('model', 'nano', 'nano', "'nano', a hub id such as GSAI-ML/LLaDA-8B-Instruct, a folder"),
        ('stages', 'sft,grpo', 'sft,grpo', 'sft,grpo is d1; grpo: diffu-GRPO from the base; or sft',
         ['sft,grpo', 'grpo', 'sft']),
        ('name', '', '', 'the run is kept in out/NAME; if empty: model-task-stages-seed'),
        ('out', 'out', 'out', 'the folder of all runs'),
        ('adapter', '', '', "an adapter in PEFT's layout, put on the model before all else"),
        ('seed', 0, 0, 'of everything random'),
        ('device', 'cpu', 'cuda', 'a nano model is faster on the CPU'),
        ('dtype', 'float32', 'bfloat16', 'of arithmetic and of frozen weights; others are float32',
         ['float32', 'bfloat16']),
        ('compile', False, True, 'torch.compile the blocks, which takes minutes'),
        ('resume', False, False, 'go on with the newest run of this name'),
        ('eval_only', False, False, 'evaluate the model, train nothing')],
    'data': [
        ('data', 'nano', 'hub', "training problems: 'nano', 'hub', a file (.jsonl, .json, .csv), a "
         'folder of TASK_train files; one for all tasks, or one for each: a.jsonl,hub'),
        ('eval_data', 'nano', 'hub', 'test problems: likewise'),
        ('askers', '', '', 'names, such as Ann,Ben, where a row has none; nobody: ask without one'),
        ('sft_data', 'nano', 'hub', "traces: 'nano', 'hub' (s1K) or a file with s1K's columns"),
        ('max_prompt', 64, 512, 'tokens; longer prompts are skipped'),
        ('instructions', '', '', "a file of others than rewards.py's; nano sees none of "
         'their first paragraph'),
        ('prefill', '', '', "what every completion begins with, such as '<reasoning>\\n'")],
    'diffu-GRPO': [
        ('grpo_steps', 40, 640, 'iterations of num_prompts prompts and mu updates; nano gsm8k: 20'),
        ('num_prompts', 8, 16, 'prompts per iteration; their groups share each update'),
        ('num_generations', 8, 6, 'completions per prompt (G)'),
        ('num_iterations', 4, 12, 'updates per iteration, on the same rollouts (mu)'),
        ('p_mask_prompt', 0.15, 0.15, 'probability to mask a prompt token (p_mask)'),
        ('fixed_mask', False, False, 'the same prompt mask and views in all mu updates'),
        ('epsilon', 0.5, 0.5, 'clip range of the ratio (epsilon), where the loss has one'),
        ('beta', 0.0, 0.04, 'weight of the KL term (beta); wd1 and rejection have none'),
        ('norm', 'token', 'token', 'of loss grpo: mean over all tokens, or per sequence first',
         ['token', 'sequence']),
        ('divide_by_std', False, False, "divide advantages by their group's standard deviation"),
        ('loss', 'grpo', 'grpo', 'of the policy; grpo.py has the others',
         ['grpo', 'espo', 'stable', 'wd1', 'rejection']),
        ('estimator', 'one_step', 'one_step', 'of the log-probs; loglik.py has the others; ar and '
         'exact keep a pass per token or step in memory: for small models',
         ['one_step', 'coupled', 'stepmerge', 'ar', 'elbo', 'exact']),
        ('num_views', 4, 4, 'forward passes of the estimators stepmerge and elbo'),
        ('learning_rate', 2e-5, 3e-6, 'AdamW, constant')],
    'sampling': [
        ('gen_length', 48, 256, 'tokens of a completion (L)'),
        ('block_length', 4, 32, 'tokens of a block, filled from left to right; nano sudoku: 8'),
        ('steps', 24, 128, 'denoising steps of a completion; nano sudoku: 48'),
        ('temperature', 0.9, 0.9, 'of the rollouts; evaluation is greedy'),
        ('cache', False, False, 'keep keys and values outside the block; faster, not exact'),
        ('threshold', 0.0, 0.0, 'commit every token of this confidence, at least one (0 = off)'),
        ('sample_batch', 64, 6, 'completions per call of the sampler, at least one group')],
    'SFT': [
        ('sft_steps', 60, 2500, 'updates'),
        ('sft_batch', 32, 8, 'sequences per update'),
        ('sft_length', 48, 3584, 'answer tokens; longer answers are cut'),
        ('sft_learning_rate', 3e-5, 1e-5, 'AdamW, warmed up, then falling linearly to 0'),
        ('micro_batch', 64, 1, 'sequences per forward pass')],
    'LoRA and memory': [
        ('lora_rank', 0, 128, '0 = train all weights'),
        ('lora_alpha', 64, 64, 'adapters of diffu-GRPO are scaled by alpha/rank'),
        ('lora_targets', 'q_proj,k_proj,v_proj,up_proj', 'q_proj,k_proj,v_proj,up_proj',
         'layers that diffu-GRPO adapts; SFT has q, k and v'),
        ('gradient_checkpointing', False, True, 'recompute activations in the backward pass')],
    'evaluation and files': [
        ('eval_n', 256, 0, 'test problems (0 = all)'),
        ('eval_lengths', '48,96', '128,256,512', 'completion lengths; steps in proportion'),
        ('eval_every', 0, 0, 'iterations between evaluations and saved adapters (0 = off)'),
        ('save_every', 10, 5, 'updates (SFT) or iterations between checkpoints')],
}
# The smallest number of these is 1, of all others 0; for some check asks for more.
AT_LEAST_ONE = ('num_prompts num_iterations num_views sample_batch sft_batch sft_length '
                'micro_batch save_every').split()
# A resumed run may change other flags; with these its table would mix what cannot be compared.
KEPT_BY_RESUME = ('model adapter dtype stages seed sft_steps lora_alpha eval_n eval_data '
                  'askers prefill instructions max_prompt gen_length block_length steps cache '
                  'threshold').split()
TASK_PRESETS = {
    'nano': {'gsm8k': dict(grpo_steps=20),                       # a short first run
             'sudoku': dict(block_length=8, steps=48)},          # its digits depend on each other
    'LLaDA': {'math': dict(grpo_steps=550),
              'countdown': dict(num_iterations=8, grpo_steps=625),
              'sudoku': dict(num_iterations=8, grpo_steps=475, temperature=0.3, eval_n=256)},
}


def train_grpo(args, model, tokenizer, problems, test_sets):
    """diffu-GRPO; the numbers are the lines of the paper's Algorithm 1.

    They are out of order: old log-probs are taken before the first of the mu updates, so all
    prompt masks are drawn before it. A step here is an iteration, of mu updates.
    """
    reference = reference_policy(args, model)                                                  # 1
    optimizer = adamw(model, args.learning_rate)
    sampling = sampling_knobs(args, args.gen_length, args.steps, args.temperature)
    prompts_per_call = max(1, args.sample_batch // args.num_generations)
    num_prefill = len(prefill_ids(args, tokenizer))
    start = load_checkpoint(args, 'grpo', args.grpo_steps, model, optimizer)
    for param_group in optimizer.param_groups:   # a resumed run may have been given another rate
        param_group['lr'] = args.learning_rate
    for step in progress_bar('grpo', start, args.grpo_steps):                                  # 2
        # before the step and not after it, so that a resumed run makes up for a killed evaluation
        if args.eval_every and step and step % args.eval_every == 0:
            evaluate(args, model, tokenizer, test_sets, f'grpo-{step}')
            keep_adapter(args, model, f'adapter-{step}')
        began = time.time()
        drawn = []                               # (prompt number, task, prompt ids, example)
        for number in my_share(args.num_prompts):
            drawn.append((number, *problems.draw(step * args.num_prompts + number)))           # 4

        # G completions of every prompt, their rewards and advantages                          5, 6
        groups = []
        for first in range(0, len(drawn), prompts_per_call):
            groups += rollout(model, tokenizer, drawn[first:first + prompts_per_call],
                              args.num_generations, sampling, args.seed, step, args.prefill,
                              args.divide_by_std)

        if args.loss == 'rejection':             # the right ones are learnt, the others not
            groups = [group._replace(advantages=(group.correct == 1).float()) for group in groups]
        # without a KL term advantages of 0 have no gradient, and need no passes
        trained = [group for group in groups if args.beta or group.advantages.any()]
        updates = []                             # mu lists of what a group's update needs
        for n in range(1 if args.fixed_mask else args.num_iterations):
            update = []
            for group in trained:
                stream = torch_stream(args.device, args.seed, 'mask', step, n, group.prompt_number)
                prompt_mask = random_prompt_mask(group.prompt_ids, args.p_mask_prompt, stream,
                                                 num_prefill)                                  # 8
                views = draw_views(args.estimator, args.num_views, group.completion_ids,
                                   group.commit_steps, stream, args.block_length,
                                   args.temperature)
                old_logps, ref_logps = old_and_ref_logps(
                    model, reference, group, prompt_mask, views, args.loss, args.beta)         # 3
                update.append((group, prompt_mask, views, old_logps, ref_logps))
            updates.append(update)
        if args.fixed_mask:                      # mu times the same one
            updates *= args.num_iterations
        rollout_seconds = time.time() - began

        stats, grad_norms = [], []
        for update in updates:                                                                 # 7
            for group, prompt_mask, views, old_logps, ref_logps in update:
                logps = completion_logps(model, group.prompt_ids, group.completion_ids,
                                         prompt_mask, group.completion_mask, views)            # 9
                loss, stat = policy_loss(args.loss, logps, old_logps, ref_logps, group.advantages,
                                         group.completion_mask, args.epsilon, args.beta,
                                         args.norm)                                            # 10
                (loss / args.num_prompts).backward()             # of all processes' prompts
                stats.append(dict(stat, loss=loss.item()))
            sum_gradients(model)                 # over the processes, if there are several
            grad_norm = clip_grad_norm_(model.parameters(), 0.2)             # d1's
            if grad_norm.isfinite():             # else this update is skipped, and counted
                optimizer.step()
            optimizer.zero_grad()
            grad_norms.append(grad_norm.item())
        report(args, step, groups, stats, grad_norms, rollout_seconds, time.time() - began)
        save_checkpoint(args, 'grpo', step + 1, args.grpo_steps, model, optimizer)


def train_sft(args, model, pairs):
    """Masked SFT (d1, Algorithm 2) on pairs of (prompt ids, answer ids)."""
    optimizer = adamw(model, args.sft_learning_rate)
    start = load_checkpoint(args, 'sft', args.sft_steps, model, optimizer)
    for step in progress_bar('sft', start, args.sft_steps):
        began = time.time()
        warm_up = min(1, 20 * (step + 1) / args.sft_steps)       # over the first 5 % of the steps
        for param_group in optimizer.param_groups:
            param_group['lr'] = args.sft_learning_rate * warm_up * (1 - step / args.sft_steps)
        # the same batch on every process; each takes its share of the rows
        batch = draw_batch(pairs, step, args.sft_batch, args.sft_length, model.config.eos_id,
                           args.seed, args.device)
        B, L = batch.answers.shape
        loss = 0.0
        for rows in torch.tensor(my_share(B)).split(args.micro_batch):
            prompts = [batch.prompts[row] for row in rows]
            masked = batch.masked[rows]                                      # (rows, L)
            logps = answer_logps(model, prompts, batch.answers[rows], masked)
            part = masked_loss(logps, masked, batch.t[rows], B * L)
            part.backward()
            loss += part.item()
        sum_gradients(model)
        grad_norm = clip_grad_norm_(model.parameters(), 1.0)
        if grad_norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        loss = sum(gather([loss]))               # over the processes
        append(args, 'log.jsonl', dict(stage='sft', step=step, loss=loss,
                                       grad_norm=grad_norm.item(), seconds=time.time() - began))
        save_checkpoint(args, 'sft', step + 1, args.sft_steps, model, optimizer)


def adamw(model, learning_rate):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.99), weight_decay=0.1)


def reference_policy(args, model):
    """The policy itself, whose last adapter can be switched off, or a frozen copy."""
    if args.lora_rank or not args.beta:
        return model
    frozen = copy.deepcopy(model).requires_grad_(False)
    if args.compile:                             # a copy is not
        compile_blocks(frozen)
    return frozen.to(model.compute_dtype)        # which every pass would cast to; None: as it is


def sampling_knobs(args, gen_length, steps, temperature=0.0):
    """generate's knobs, for rollouts and evaluation."""
    return dict(gen_length=gen_length, steps=steps, temperature=temperature,
                block_length=args.block_length, cache=args.cache, threshold=args.threshold)


def report(args, step, groups, stats, grad_norms, rollout_seconds, seconds):
    """A line per iteration, on the screen and in log.jsonl; a completion in samples.jsonl.

    Means: flat_groups, the share of groups of equal rewards; ratio, of tokens (espo: completions);
    clip_high and clip_low, the shares whose gradient grpo's clip cuts; length, in effective tokens.
    """
    rows = [dict(reward=group.rewards.mean().item(),
                 flat_groups=float((group.rewards == group.rewards[0]).all()),
                 length=group.completion_mask.sum(1).float().mean().item()) for group in groups]
    stats = gather(stats)
    line = dict(stage='grpo', step=step) | means(gather(rows)) | means(stats)
    if stats and 'ratio' in stats[0]:            # 1, for nothing had been updated
        line['first_ratio'] = stats[0]['ratio']
    line['grad_norm'] = mean(grad_norms)
    line['bad_updates'] = sum(not math.isfinite(norm) for norm in grad_norms)
    line.update(rollout_seconds=rollout_seconds, seconds=seconds)
    append(args, 'log.jsonl', line)
    names = 'reward flat_groups kl ratio clip_high clip_low length seconds'.split()
    shown = [f'{name} {line[name]:.3f}' for name in names if name in line]
    print0(f'grpo {step + 1}/{args.grpo_steps}: ' + ', '.join(shown))

    group = groups[0]                            # prompt 0 of the iteration is process 0's
    sample = dict(stage='grpo', step=step, task=group.task, question=group.example['question'],
                  completion=group.texts[0], answer=group.example['answer'],
                  reward=group.rewards[0].item(),
                  effective_tokens=group.completion_mask[0].sum().item())
    append(args, 'samples.jsonl', sample)
    if step % 10 == 0:
        print0('  {question!r}\n  {completion!r} -> reward {reward:.3f}'.format(**sample))


def mean(values):
    return sum(values) / len(values)


def means(rows):
    """Dicts of numbers -> one of their means, over the rows that have a name."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean([row[name] for row in rows if name in row]) for name in names}


# ---- problems ----

class Problems:
    """The training problems of all tasks, as one endless stream in which the tasks take turns."""

    def __init__(self, args, tokenizer, tested=()):
        """tested: (task, key) of the problems to leave out."""
        self.args, self.tokenizer = args, tokenizer
        self.examples = {}                       # task -> its training examples
        for task, source in args.data.items():
            loaded = rewards.load_examples(task, source, 'train', args.askers)
            examples = [e for e in loaded if (task, e['key']) not in tested]
            self.examples[task] = examples
            num_tested = len(loaded) - len(examples)
            if num_tested:
                print0(f'{task}: {num_tested} of {len(loaded)} training problems are test '
                       'problems, too, and left out')
            if not examples:
                raise ValueError(f'--data: no training problem of {task} is left')
            first = examples[:1000]              # all of a large file take minutes
            num_long = sum(len(encode(args, tokenizer, task, example)) > args.max_prompt
                           for example in first)
            if num_long:
                print0(f'{task}: {num_long} of the first {len(first)} training prompts are over '
                       f'--max_prompt {args.max_prompt} and passed over')
        for index in range(len(args.tasks)):
            self.draw(index)                     # raises where none of a task can be used

    def draw(self, index):
        """Problem number index: task, prompt ids, example; another for one that cannot be used."""
        problem_index, task_index = divmod(index, len(self.args.tasks))
        task = self.args.tasks[task_index]
        examples = self.examples[task]
        # an unusable one is passed over; 2n draws in a row hold a whole epoch, so every problem
        for i in range(2 * len(examples)):
            example = shuffled(examples, problem_index + i, self.args.seed, task)
            prompt_ids = encode(self.args, self.tokenizer, task, example)
            if len(prompt_ids) <= self.args.max_prompt and rewards.is_sound(example):
                return task, prompt_ids, example
        raise ValueError(f'{task}: no training problem fits --max_prompt {self.args.max_prompt}, '
                         'or none of code is passed by its own solution')


def encode(args, tokenizer, task, example):
    """The ids of an example's prompt, and of the text that its completion begins with."""
    text = rewards.prompt(task, example, args.instructions)
    return chat(tokenizer, text) + prefill_ids(args, tokenizer)


def prefill_ids(args, tokenizer):
    return tokenizer(args.prefill, add_special_tokens=False)['input_ids']


def load_test_sets(args, tokenizer):
    """The test sets, {name: [(task, prompt ids, example)]}, and the keys of all test problems.

    A set per task; on the hub code has two, code-NAME. The keys, {(task, key)}, are those of the
    problems that are not asked, too.
    """
    test_sets, tested = {}, set()
    for task, source in args.eval_data.items():
        hub = rewards.TASKS[task].datasets[1]
        named = {task: source}
        if source == 'hub' and len(hub) > 1:
            named = {f'{task}-{Path(data_set[0]).name}': data_set for data_set in hub}
        for name, one_source in named.items():
            examples = rewards.load_examples(task, one_source, 'test', args.askers)
            tested |= {(task, example['key']) for example in examples}
            test_sets[name] = fitting_problems(args, tokenizer, name, task, examples)
    return test_sets, tested


def fitting_problems(args, tokenizer, name, task, examples):
    """The first eval_n (0 = all) whose prompts fit; of d1's 500 Sudokus the 256 that d1 drew."""
    if task == 'sudoku' and len(examples) == 500 and args.eval_n == 256:
        drawn = np.random.RandomState(42).choice(500, 256, replace=False)
        examples = [examples[i] for i in drawn]
    fitting = []
    for example in examples:
        prompt_ids = encode(args, tokenizer, task, example)
        if len(prompt_ids) <= args.max_prompt:
            fitting.append((task, prompt_ids, example))
    if not fitting:
        raise ValueError(f'{name}: no test prompt fits --max_prompt {args.max_prompt}: raise it')
    if len(fitting) < len(examples):
        print0(f'{name}: {len(fitting)} of {len(examples)} test prompts fit --max_prompt '
               f'{args.max_prompt}, the others are left out')
    return fitting[:args.eval_n or None]


# ---- evaluation ----

def evaluate(args, model, tokenizer, test_sets, stage):
    """Greedy answers to every test set at every length; results.json grows by each as it ends."""
    results = read_results(args)
    scores = results.setdefault(stage, {})
    for name, problems in test_sets.items():
        for length in args.eval_lengths:
            if str(length) in scores.setdefault(name, {}):
                continue                         # a resumed run has it
            label = f'{stage}: {name}, {length} tokens'
            items = graded_answers(args, model, tokenizer, problems, length, label)
            score = rewards.summary(items)
            print0(f'{label}: accuracy {score["accuracy"]:.1%}, reward {score["reward"]:.2f}')
            write_json(args, f'{stage}_{name}_{length}_generations.json',
                       dict(generations=items, metrics=score))
            scores[name][str(length)] = score
            write_json(args, 'results.json', results)


def eval_steps(args, length):
    """As many per token as in rollouts; d1's 256 tokens have 128."""
    return length * args.steps // args.gen_length


def read_results(args):
    return read_if_there(args.folder, 'results.json')


def read_if_there(folder, name):
    """The dict in a JSON file of the folder, or {} where a run has not written it yet."""
    return read_json(folder, name) if Path(folder, name).exists() else {}


def graded_answers(args, model, tokenizer, problems, length, label):
    """The graded greedy answers to problems, in their order; every process makes its share."""
    lengths = [len(prompt) for _, prompt, _ in problems]
    by_length = sorted(range(len(problems)), key=lengths.__getitem__)        # alike: little padding
    mine = by_length[rank()::world_size()]
    sampling = sampling_knobs(args, length, eval_steps(args, length))
    found = []
    for first in progress_bar(label, 0, len(mine), args.sample_batch):
        batch = [problems[i] for i in mine[first:first + args.sample_batch]]
        tasks, prompts, examples = zip(*batch)   # of one task
        _, mask, _, texts = sample_texts(model, tokenizer, prompts, sampling, prefill=args.prefill)
        tokens = mask.sum(1).tolist()
        found += graded_items(tasks[0], texts, examples, tokens)
    by_number = dict(gather(list(zip(mine, found))))
    return [by_number[i] for i in range(len(problems))]


def graded_items(task, texts, examples, tokens):
    """A dict per completion, as results are kept; tokens: how many count, of each."""
    grades = rewards.grade_all(task, texts, examples)
    return [dict(question=example['question'], generations=text, ground_truth=example['answer'],
                 reward=reward, correct=correct, effective_tokens=n)
            for text, example, (reward, correct), n in zip(texts, examples, grades, tokens)]


def scores_without_a_model(args, tokenizer, test_sets):
    """Rows for results.json: one answer to all, and a task's rule, which looks at the problem."""
    results = {}
    for name, problems in test_sets.items():
        task = problems[0][0]
        examples = [example for _, _, example in problems]
        answers = dict(constant=[rewards.TASKS[task].constant_answer] * len(examples))
        rule = rewards.TASKS[task].rule
        if rule:
            answers['rule'] = [rule(example) for example in examples]
        for kind, replies in answers.items():
            texts = [rewards.tagged('', reply) for reply in replies]
            ids = tokenizer(texts, add_special_tokens=False)['input_ids']
            tokens = [len(text_ids) + 1 for text_ids in ids]     # and the end
            score = rewards.summary(graded_items(task, texts, examples, tokens))
            by_length = {str(length): score for length in args.eval_lengths}     # all the same
            results.setdefault(kind, {})[name] = by_length
    return results


def table(args, results):
    """The results as text: a row per stage, a cell per length."""
    names = dict(constant='one constant answer', rule='a rule, no model', base='base', sft='+ SFT',
                 grpo='+ diffu-GRPO')
    if 'sft' in results:
        names['grpo'] = 'd1 (SFT + diffu-GRPO)'
    if args.prefill:
        names['base'] = f'base, given {args.prefill.strip()}'
    lines = []
    for test_set in results['base']:
        lines.append(f'\n{test_set}: accuracy % [95 % interval], mean reward, effective tokens, '
                     'at completion length')
        lines.append(' ' * 24 + ''.join(f'{length:<40}' for length in args.eval_lengths))
        for stage, scores in results.items():
            if test_set in scores:               # not every task has a rule
                cells = [cell(scores[test_set].get(str(length))) for length in args.eval_lengths]
                lines.append(f'{names.get(stage, stage):24}' + ''.join(cells))
    return '\n'.join(lines)


def cell(score):
    if not score:                                # a resumed run was given another length
        return ' ' * 40
    names = ('accuracy', 'low', 'high', 'share')
    accuracy, low, high, share = [100 * score[name] for name in names]
    text = f'{accuracy:5.1f} [{low:.1f}, {high:.1f}]'
    if share != accuracy:                        # Sudoku's other measure
        text += f' cells {share:.1f}'
    text += f' {score["reward"]:5.2f} {score["effective_tokens"]:5.1f}'
    if score['waits']:                           # answers that notice an error on their way
        text += f' Wait {100 * score["waits"]:.0f} %'
    return text.ljust(40)


def curves(log):
    """Reward and length over the iterations, a line of block characters each."""
    lines = []
    for name in ('reward', 'length'):
        values = [row[name] for row in log if name in row]
        if values:
            low, span = min(values), max(values) - min(values) or 1
            levels = [int(7.99 * (value - low) / span)
                      for value in values[::len(values) // 60 + 1]]
            bars = ''.join('▁▂▃▄▅▆▇█'[level] for level in levels)
            lines.append(f'{name:6} {bars} {values[0]:.2f} to {values[-1]:.2f}')
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
    """Adds up the gradients of all processes.

    Where all groups were flat they are 0: AdamW's momentum and weight decay go on.
    """
    for p in model.parameters():
        if p.requires_grad:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if world_size() > 1:
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
    with explained(f'{new} cannot be written; --resume goes on from the last checkpoint'):
        with open(new, 'wb') as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    new.replace(path)


def write_json(args, name, value):
    write(args, name, json.dumps(value, indent=1).encode())


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


def save_checkpoint(args, stage, step, steps, model, optimizer):
    """All that training has made, every save_every steps of a stage and after the last."""
    if step % args.save_every == 0 or step == steps:
        write_json(args, 'config.json', vars(args))              # --resume may have changed some
        write(args, f'{stage}.pt', dict(step=step, weights=trained_weights(args, model),
                                        optimizer=optimizer.state_dict()))


def load_checkpoint(args, stage, steps, model, optimizer):
    """The step to begin a stage with: 0, or its checkpoint's, whose content is put in place.

    The logs are cut back to that step. So are the scores: a run may be given more steps, too.
    """
    path = Path(args.folder, f'{stage}.pt')
    start = 0
    if path.exists():
        with explained(f'{path} is no checkpoint of this model: leave out --resume'):
            checkpoint = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
            for name, p in trained_weights(args, model).items():
                # view, for copy_ alone would take a smaller tensor, too, and repeat it
                p.copy_(checkpoint['weights'][name].view(p.shape))
            optimizer.load_state_dict(checkpoint['optimizer'])
        start = checkpoint['step']
        if start > steps:
            raise ValueError(f'{path} has made {start} steps: give --{stage}_steps {start} or more')
        print0(f'going on with {stage} at step {start}')
    for name in ('log.jsonl', 'samples.jsonl'):
        lines = [json.dumps(row) + '\n' for row in read_log(args, name)
                 if row['stage'] != stage or row['step'] < start]
        write(args, name, ''.join(lines).encode())
    results = read_results(args)
    for name in list(results):
        # grpo-50 was scored after 50 steps, grpo at the end
        head, _, number = name.partition('-')
        scored_after = int(number) if number else steps
        if head == stage and scored_after > start:
            del results[name]
    write_json(args, 'results.json', results)
    return start


def trained_weights(args, model):
    """{name: tensor} of what any stage has trained: all adapters, or without LoRA all weights."""
    return {name: p.detach() for name, p in model.named_parameters()
            if '.adapters.' in name or not args.lora_rank}


def keep_adapter(args, model, name):
    """Writes all adapters as one, in the layout of the peft library; without LoRA nothing."""
    if args.lora_rank and rank() == 0:
        save_adapter(Path(args.folder, name), model, args.model)


def save_model(folder, model, source):
    """Model and tokenizer in the layout of their source; the folder appears only when whole."""
    if rank():
        return
    new = Path(f'{folder}.new')
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    save_tokenizer(new, source)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)


# ---- a run, from its flags to the table ----

def preset(model):
    """Which column of FLAGS a model takes: 'nano' for the nano base and what runs made of it."""
    if model == 'nano':
        return 'nano'
    if Path(model, 'config.json').exists() and 'nano' in read_json(model, 'config.json'):
        return 'nano'                            # make.py writes this key, a run copies it
    if Path(model, 'model', 'config.json').exists():
        raise ValueError(f'--model {model} is the folder of a run: give {model}/model')
    return 'LLaDA'


def defaults(model, task=''):
    """{flag: its default} for a model, a hub id or folder, and a task."""
    column = preset(model)
    settings = {name: nano if column == 'nano' else llada
                for flags in FLAGS.values() for name, nano, llada, *_ in flags}
    return settings | TASK_PRESETS[column].get(task, {})


def parse(argv=None):
    """The settings of a run: flags as given, else the task's, else the model's defaults."""
    p = argparse.ArgumentParser(usage='python train.py [flags]', description=__doc__,
                                argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for heading, flags in FLAGS.items():
        group = p.add_argument_group(heading)
        for name, nano, llada, text, *choices in flags:
            default = nano if nano == llada else f'nano {nano}, LLaDA {llada}'
            kind = dict(type=type(nano), choices=choices[0] if choices else None, metavar='')
            if isinstance(nano, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            text = text if default == '' else f'{text} [{default}]'
            group.add_argument(f'--{name}', help=text.replace('%', '%%'), **kind)
    given = vars(p.parse_args(argv))
    settings = defaults(given.get('model', 'nano'), given.get('task', 'gsm8k'))
    return check(argparse.Namespace(**settings | given))


def check(args):
    """Turns lists, sources and --instructions into values; ValueError or OSError on nonsense."""
    args.tasks = args.task.split(',')
    args.stages = [] if args.eval_only else args.stages.split(',')
    for task in args.tasks:
        if task not in rewards.TASKS or args.tasks.count(task) > 1:
            raise ValueError(f'--task {task}: choose from {", ".join(rewards.TASKS)}, each once')
    check_lengths(args.gen_length, args.block_length, args.steps)
    with explained(f'--eval_lengths {args.eval_lengths}'):
        args.eval_lengths = [int(length) for length in args.eval_lengths.split(',')]
        for length in args.eval_lengths:
            check_lengths(length, args.block_length, eval_steps(args, length))
    if args.estimator == 'exact' and (args.p_mask_prompt or args.cache or args.threshold
                                      or not args.temperature):
        raise ValueError('--estimator exact: give --p_mask_prompt 0, a temperature above 0, and '
                         'neither --cache nor --threshold')
    args.lora_targets = args.lora_targets.split(',')
    for layer in args.lora_targets:
        if layer not in LORA_LAYERS or args.lora_targets.count(layer) > 1:
            raise ValueError(f'--lora_targets: choose from {", ".join(LORA_LAYERS)}, each once')
    if args.loss in ('wd1', 'rejection'):        # which have no KL term
        args.beta = 0.0
    if args.num_generations < 2:
        raise ValueError('--num_generations must be at least 2: an advantage compares completions')
    for name in ('p_mask_prompt', 'threshold'):
        if getattr(args, name) > 1:
            raise ValueError(f'--{name} {getattr(args, name)} is a probability: at most 1')
    for name, value in vars(args).items():
        least = 1 if name in AT_LEAST_ONE else 0
        if isinstance(value, (int, float)) and not least <= value < math.inf:    # nan is not
            raise ValueError(f'--{name} {value} is no number from {least} on')
    for name in ('num_prompts', 'sft_batch'):    # else some would wait for others' gradients
        if getattr(args, name) % world_size():
            raise ValueError(f'--{name} is no multiple of the {world_size()} processes')
    if args.instructions:
        args.instructions = Path(args.instructions).read_text().strip()
    args.prefill = args.prefill.replace('\\n', '\n')             # a shell passes on the two signs
    args.prefill.encode()                        # a lone surrogate: no tokenizer takes it
    args.askers = [name.strip() for name in args.askers.split(',')] if args.askers else []
    if not all(args.askers) or ('nobody' in args.askers and len(args.askers) > 1):
        raise ValueError('--askers takes names, such as Ann,Ben, or nobody alone')
    args.data = sources_of(args.tasks, args.data)
    args.eval_data = sources_of(args.tasks, args.eval_data)
    with explained(f'--device {args.device}, for --model {args.model}, is not usable here: '
                   '--device cpu --no-compile is, and slow for all but small models'):
        torch.empty(1, device=args.device)
    return args


def sources_of(tasks, sources):
    """'a.jsonl,hub' -> {task: source}; a single one is for all tasks."""
    sources = sources.split(',')
    if len(sources) == 1:
        sources = sources * len(tasks)
    if len(sources) != len(tasks):
        raise ValueError(f'--data and --eval_data take one source, or one for each of {len(tasks)} '
                         'tasks, such as a.jsonl,hub')
    return dict(zip(tasks, sources))


def run_folder(args):
    """out/NAME, or NAME-2, NAME-3, ..., after the last there is; with --resume our last."""
    model = Path(args.model).name
    kind = '+'.join(args.stages) or 'eval'
    name = args.name or f'{model}-{"+".join(args.tasks)}-{kind}-seed{args.seed}'
    first = Path(args.out, name)
    taken = {1: first} if first.exists() else {}                 # number -> folder
    for folder in first.parent.glob('*'):
        head, _, number = folder.name.rpartition('-')
        # we give numbers from 2 on: NAME-1 is a run of that very name
        if head == first.name and number.isdecimal() and int(number) > 1:
            taken[int(number)] = folder
    if not args.resume:
        return f'{first}-{max(taken) + 1}' if taken else str(first)
    # NAME-7 may also be the very name of another run
    ours = [number for number, folder in taken.items()
            if read_if_there(folder, 'config.json').get('name', args.name) == args.name]
    if not ours:
        raise ValueError(f'{first} holds no run to go on with: leave out --resume')
    last = taken[max(ours)]
    for flag, before in read_if_there(last, 'config.json').items():
        now = vars(args).get(flag, before)       # a flag that is no more has not changed
        if flag == 'resume' or before == now:
            continue
        if flag in KEPT_BY_RESUME:
            raise ValueError(f'{last} was made with another --{flag}: give the one in its '
                             'config.json, or leave out --resume')
        print0(f'note: {last} was made with another --{flag}: {before}')
    return str(last)


def compile_blocks(model):
    """torch.compile: a graph per kind of call, shared by all blocks."""
    torch._dynamo.config.recompile_limit = 128   # over torch's 8 they run eagerly
    # else kernels with and without gradients round bfloat16 at other places: before any update new
    # and old log-probs would differ
    torch._inductor.config.emulate_precision_casts = True
    for block in model.blocks:
        block.compile(dynamic=True)


def main(argv=None):
    args = parse(argv)
    # whatever the user may have got wrong shows before the run has a folder
    dtype = getattr(torch, args.dtype)
    # trained weights are float32, for bfloat16 ones would not notice steps of 3e-6
    weights_dtype = torch.float32 if args.stages and not args.lora_rank else dtype
    model, tokenizer = load(args.model, weights_dtype, args.device)
    if args.adapter:
        load_adapter(args.adapter, model)
    answer_length = dict(sft=args.sft_length, grpo=args.gen_length)
    answer_lengths = [answer_length[stage] for stage in args.stages]
    longest = args.max_prompt + max(answer_lengths + args.eval_lengths)
    if longest > model.config.max_sequence_length:
        raise ValueError(f'--max_prompt and the longest completion make {longest} tokens, but the '
                         f'model takes {model.config.max_sequence_length}: lower one of them')
    test_sets, tested = load_test_sets(args, tokenizer)
    problems = Problems(args, tokenizer, tested) if 'grpo' in args.stages else None
    if 'sft' in args.stages:
        traces = load_s1k(args.sft_data)
        pairs = encode_traces(traces, tokenizer, args.max_prompt, args.sft_length)
        print0(f'SFT: {len(pairs)} of {len(traces)} traces fit --max_prompt {args.max_prompt}')
    args.folder = run_folder(args)
    barrier()                                    # every process has looked before one writes
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    if not Path(args.folder, 'config.json').exists():
        write_json(args, 'config.json', vars(args))
    print0(f'{args.folder}: if this run is stopped, --resume goes on with it')

    model.compute_dtype = dtype                  # of arithmetic
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        compile_blocks(model)
    results = scores_without_a_model(args, tokenizer, test_sets)
    write_json(args, 'results.json', read_results(args) | results)
    evaluate(args, model, tokenizer, test_sets, 'base')
    for stage in args.stages:
        if args.lora_rank:
            seed = random_stream(args.seed, 'lora', stage).getrandbits(63)
            alpha, targets = args.lora_alpha, args.lora_targets
            if stage == 'sft':                   # as in d1
                alpha, targets = 2 * args.lora_rank, ['q_proj', 'k_proj', 'v_proj']
            add_lora(model, args.lora_rank, alpha, targets, seed)
        if stage == 'sft':
            train_sft(args, model, pairs)
        else:
            train_grpo(args, model, tokenizer, problems, test_sets)
        evaluate(args, model, tokenizer, test_sets, stage)
    if args.stages:
        save_model(Path(args.folder, 'model'), model, args.model)
        keep_adapter(args, model, 'adapter')
    barrier()                                    # process 0 has written its files
    print0(table(args, read_results(args)))
    print0(curves(read_log(args, 'log.jsonl')))
    print0(f'kept in {args.folder}')


def run(argv=None):
    """main, with one clear line for what the user can mend."""
    try:
        if 'RANK' in os.environ:                 # torchrun has started us
            local_rank = int(os.environ['LOCAL_RANK'])
            if local_rank < torch.cuda.device_count():
                torch.cuda.set_device(local_rank)
            # lists and numbers go through gloo, on the CPU; gradients through NCCL
            dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')
        main(argv)
    except (ValueError, OSError) as e:
        sys.exit(f'train.py: {e}')
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit('train.py: the memory is too small: lower --num_generations, --sample_batch or '
                 '--micro_batch, or give --gradient_checkpointing')
    except KeyboardInterrupt:
        sys.exit('stopped; if the run had named its folder, the same command with --resume goes on '
                 'from its last checkpoint')
    except torch._dynamo.exc.TorchDynamoException as e:
        line = str(e).strip().partition('\n')[0]
        sys.exit(f'train.py: torch.compile failed ({line}): give --no-compile, or empty its cache '
                 '(TORCHINDUCTOR_CACHE_DIR), where a kill may have left half a file')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    run()
