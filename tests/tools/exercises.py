"""Exercises for a course: the project with twelve functions emptied, and a grader for each.

    python tests/tools/exercises.py FOLDER    writes the copy, its sheet EXERCISES.md and this file
    python -m pytest -q exercises.py          in the copy: grades all; -k NAME grades one
A grader needs only the exercises before it. Expected values are worked out by hand.
"""
import ast
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).resolve()
# (file, function, minutes, background, hint), in the order in which they are solved
EXERCISES = [
    ('grpo.py', 'group_advantages', 10, 'd1, equation 2: what earned more than its group is made '
     'likelier.', 'A row per group makes the means easy.'),
    ('grpo.py', 'up_to_end', 15, 'A completion is over at its first end token, which counts: the '
     'model has to learn to stop.', 'How many ends stand before a position? cumsum.'),
    ('sft.py', 'draw_masks', 20, 'LLaDA masks each token of an answer with a probability t of its '
     'own answer (d1, Algorithm 2).', 'One random start; t of row i is i/B further on, modulo 1.'),
    ('sft.py', 'masked_loss', 10, 'The cross-entropy of the masked tokens, weighed by 1/t, so that '
     'every token counts the same in expectation.', 'One line.'),
    ('loglik.py', 'random_prompt_mask', 10, 'd1, section 3.1: holes in the prompt make another '
     'view of the same completion.', 'The prefill must stay in sight.'),
    ('loglik.py', 'completion_logps', 45, 'The mean field: one forward pass, the whole completion '
     'masked, every token scored on its own.', 'Without views there is one, with all masked.'),
    ('grpo.py', 'grpo_loss', 45, 'd1, equation 4: PPO\'s clip with a ratio per token, and the k3 '
     'estimate of the KL.', 'Start with mu = 1, where the ratio is 1. min is the pessimist.'),
    ('sample.py', 'generate', 60, 'LLaDA\'s sampler: blocks from left to right, and in a block '
     'the predictions first of which the model is surest.', 'choose, commit_counts, pad_mask, '
     'guide and has_end are given; with cache or threshold '
     'it calls generate_fast, which is empty here and no exercise, for it would tell too much. '
     'Begin with one row, without an end, padding or guidance.'),
    ('loglik.py', 'stepmerge_views', 20, 'The mean field scores a token without its neighbours; '
     'the sampler saw those that it had committed. So let the estimate see them, too. Then try '
     '`--estimator stepmerge`.', 'Which part does step s belong to? In the first one nothing is '
     'in sight.'),
    ('grpo.py', 'rejection_loss', 15, 'The rival of RL: SFT on what came out right. Then try '
     '`--loss rejection --estimator elbo --num_views 1 --p_mask_prompt 0`.',
     'A group may have no right one.'),
    ('loglik.py', 'exact_logps', 90, 'The sampler draws at every mask but commits only the surest '
     'draws, so that even what it threw away tells something: it was less sure. Then try '
     '`--estimator exact --p_mask_prompt 0`.', 'drawn_tokens is given. Begin with one block, '
     'temperature 1 and one token per step; then c as a minimum and the equal shares, then '
     'blocks, and what follows an end last. The second sum is over p_j(v) < c + TIE: what is as '
     'sure as c may have lost the tie.'),
    ('model.py', 'last_adapter_off', 20, 'The reference policy is the policy without the adapter '
     'in training. Then try `--lora_rank 8 --beta 0.04`.',
     'try, yield, finally: switch it on again after an error, too.'),
]
CORE = 8     # with so many of them solved, train.py runs
INTRODUCTION = '''# Exercises

For the teacher:
- `python tests/tools/exercises.py FOLDER`, in the project, has written this folder. Hand it out as
  it is; the solutions are the project itself.
- Students install (`pip install -r requirements.txt`), fill in one function after another, and run
  the line below it. A laptop's CPU is enough.
- All at once: `python -m pytest -q exercises.py`, ten seconds. Copy your own exercises.py over
  theirs first, for it holds the graders.
- Time, an estimate for somebody who knows what follows: {core} minutes for the first {CORE},
  {rest} for the others, and an evening to weeks for each open question.
- To know before: Python, tensors and autograd in PyTorch, cross-entropy, the policy gradient.

For the student: {number} functions have lost their bodies; their docstrings say what they do, and
the paper is d1 (arXiv 2504.12216). Solve them in this order. After number {CORE}
`python train.py --task gsm8k` works. Its base should have 20.3 % at 48 tokens, SFT about 42 and d1
about 95: a few points off where a solution draws its random numbers in another order. Each
of the others adds something, and what it says to try goes behind
`python train.py --task countdown --stages grpo`.
'''
QUESTIONS = '''
## Open questions, from an evening to a project

Flags go behind `python train.py --task countdown --stages grpo`. A run takes some minutes, with
`--estimator exact` about seven times as long and with `ar` twenty times or more: give it fewer
prompts (`--num_prompts`). No difference is to be believed before three seeds agree. What we
measured stands in assets/findings.md of the project, which your teacher has: look there last. The
first three are debates that the field has not settled.

1. **Which tokens should a view hide?** Those that come later and are easy (IM, arXiv 2609.25927),
   or those of which the model is unsure (EGSPO, arXiv 2603.12554)? Write both as views
   (`draw_views` in loglik.py; a first pass of `completion_logps` tells how sure it is) and set them
   against `--estimator coupled`, which hides at random, and `--estimator stepmerge --num_views 2`.
   `train_grpo` has to give `draw_views` the model then; `FLAGS` in train.py holds the names.
2. **Is RL needed at all?** Masked SFT on one's own right rollouts never learns from a wrong one:
   `--loss rejection --estimator elbo --num_views 1 --p_mask_prompt 0` against the default. Compare
   at equal forward passes, not iterations: a completion costs 24 for its rollout and per update 2,
   or 1 with this loss, which has no old log-probs. Does the rival find thinking where the base
   seldom thinks?
3. **The flexibility trap.** JustGRPO (arXiv 2601.15165) says that any order lets a model avoid the
   hard tokens, and trains left to right: `--block_length 1 --steps 48 --estimator ar
   --p_mask_prompt 0`, 96 passes per update. Does the base, too, solve more problems in k tries left
   to right (`sample_texts` in grpo.py, temperature 0.9, k = 1 to 64)? And after RL, for as much
   compute?
4. **Prompt masks when a rollout serves many updates.** `--num_iterations 24` with
   `--p_mask_prompt 0.15`, with 0, and with `--fixed_mask`. Look at ratio and clip_high in
   out/NAME/log.jsonl: what does a policy overfit that always sees the same view?
5. **What is the exact gradient worth?** `--estimator exact --p_mask_prompt 0` knows the sampler's
   own likelihood, for up to 24 times the passes. Is it ahead of `--p_mask_prompt 0` at
   equal iterations, at equal passes, and when every completion thinks from the start
   (`--askers nobody`)?
6. **SFT that spoils nothing.** Find a dose (`--stages sft`, `--sft_steps`, `--sft_learning_rate`)
   that teaches the form and leaves Countdown alone. A fifth of the traces go wrong, say Wait and go
   on right: does the model say it where it errs, and does diffu-GRPO make it say so more often?
7. **Blocks at evaluation.** Train with the default, blocks of 4; then evaluate with other ones:
   `--model out/NAME/model --eval_only --block_length 48`, 16, 8 (the policy's row is then called
   base; `--name` tells the runs apart). What has a policy learnt about its sampler?
8. **A reward, or a task, of your own.** Pay for short completions (`--task gsm8k`; `grade_gsm8k`
   in rewards.py): is it paid without thinking? Or add a section to rewards.py and rows to
   `--data`: what does the base need to know for RL to find the rest?
9. **How much of what RL spoils is noise?** AdamW's steps are as long along noise as along signal.
   Let the rate fall to 0 (SFT's does, in `train_sft`), or average the weights over iterations.
   Count the sums in the answers (out/NAME/grpo_countdown_48_generations.json) that are one too
   large or too small: do they all err the same way, and for how many iterations?
'''


def emptied(source, functions):
    """The source with the bodies of some functions replaced by their docstring and a raise."""
    lines = source.split('\n')
    found = [node for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.FunctionDef) and node.name in functions]
    assert len(found) == len(functions), functions
    for node in sorted(found, key=lambda node: -node.lineno):
        first = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        lines[first:node.end_lineno] = [' ' * node.body[0].col_offset + 'raise NotImplementedError']
    return '\n'.join(lines)


def write(folder):
    """The copy: seven modules, their data, this file and a sheet; nothing that solves anything."""
    root, folder = HERE.parents[2], Path(folder)
    folder.mkdir(parents=True)                   # complains where it exists
    for name in ('model', 'sample', 'loglik', 'grpo', 'sft', 'rewards', 'train'):
        source = (root / f'{name}.py').read_text()
        mine = [function for file, function, *_ in EXERCISES if file == f'{name}.py']
        if name == 'sample':
            mine.append('generate_fast')         # it would give generate away
        (folder / f'{name}.py').write_text(emptied(source, mine))
    for name in ('requirements.txt', 'LICENSE'):
        shutil.copy(root / name, folder)
    shutil.copytree(root / 'assets/nano', folder / 'assets/nano')
    shutil.copy(root / 'assets/judge.py', folder / 'assets')
    shutil.copy(HERE, folder)
    (folder / 'EXERCISES.md').write_text(sheet())


def sheet():
    minutes = [exercise[2] for exercise in EXERCISES]
    text = INTRODUCTION.format(core=sum(minutes[:CORE]), rest=sum(minutes[CORE:]), CORE=CORE,
                               number=len(EXERCISES))
    for number, (file, function, about, background, hint) in enumerate(EXERCISES, 1):
        text += (f'\n{number}. **`{function}` in {file}**, {about} minutes. {background} '
                 f'*Hint: {hint}*  \n   `python -m pytest -q exercises.py -k test_{function}`')
    return text + '\n' + QUESTIONS


# ---- graders ----

def close(a, b, what=''):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text: f'{what}\n{text}')


def test_group_advantages():
    from grpo import group_advantages
    found = group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    found = group_advantages(torch.tensor([1.0, 2, 6, 0, 0, 3]), 3)
    close(found, torch.tensor([-2.0, -1, 3, -1, -1, 2]))
    flat = group_advantages(torch.tensor([2.0, 2.0]), 2, divide_by_std=True)
    assert flat.tolist() == [0, 0], 'a flat group has no standard deviation'
    found = group_advantages(torch.tensor([1.0, 3.0]), 2, divide_by_std=True)
    assert (found - torch.tensor([-1.0, 1.0]) / 2 ** 0.5).abs().max() < 1e-3


def test_up_to_end():
    from grpo import up_to_end
    found = up_to_end(torch.tensor([[5, 0, 7, 0], [5, 6, 7, 8], [9, 5, 0, 1]]), (0, 9))
    assert found.dtype == torch.bool, 'as an index, numbers would pick tokens'
    assert found.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]


def test_draw_masks():
    from sft import draw_masks
    answers = torch.full((8, 5000), 7)
    masked, t = draw_masks(answers, torch.Generator().manual_seed(0))
    assert masked.shape == answers.shape and masked.dtype == torch.bool
    assert t.shape == (8, 1) and (masked.float().mean(1, keepdim=True) - t).abs().max() < 0.03
    gaps = t.flatten().sort().values.diff()
    close(gaps, torch.full((7,), 1 / 8))         # evenly spread
    again, other = (draw_masks(answers, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(again[0], masked) and torch.equal(again[1], t), 'the generator decides'
    assert not torch.equal(other[1], t), 'the start is random'
    low = draw_masks(answers, torch.Generator().manual_seed(0), t_min=0.5)[1]
    assert low.min() > 0.5 and low.max() <= 1
    close(low.flatten().sort().values.diff(), torch.full((7,), 0.5 / 8), 'evenly, from t_min to 1')


def test_masked_loss():
    from sft import masked_loss
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -7.0]])
    masked = torch.tensor([[True, True], [True, False]])
    found = masked_loss(logps, masked, torch.tensor([[0.5], [0.25]]), 4)
    close(found, torch.tensor((1 / 0.5 + 2 / 0.5 + 3 / 0.25) / 4))


def test_random_prompt_mask():
    from loglik import random_prompt_mask
    ids, g = torch.full((100, 50), 5), torch.Generator().manual_seed(0)
    found = random_prompt_mask(ids, 0.3, g, num_prefill=2)
    assert found.shape == ids.shape and not found[:, 48:].any()
    assert abs(found[:, :48].float().mean() - 0.3) < 0.03
    without = random_prompt_mask(ids, 0.3, g)
    assert abs(without.float().mean() - 0.3) < 0.03, 'there may be no prefill'
    assert not torch.equal(found, without), 'another mask each time'
    again = random_prompt_mask(ids, 0.3, torch.Generator().manual_seed(0), num_prefill=2)
    assert torch.equal(found, again), 'of the generator alone'


class Counting:
    """A model whose favourite at place i is the token 2 + (tokens in sight), more sure at some."""
    strength = torch.tensor([0.0, 0.0, 1.0, 3.0, 2.0, 4.0])      # 2 of a prompt, 4 of a completion
    config = SimpleNamespace(mask_id=1, eos_id=0, end_ids=(0,))
    device = torch.device('cpu')

    def __call__(self, ids, attention_mask=None, positions=None):
        self.ids, self.attention_mask = ids, attention_mask      # for the graders
        seen = (ids[:, 2:] != 1).sum(1)                          # (B,)
        logits = torch.zeros(*ids.shape, 10)
        logits[torch.arange(len(ids)), :, 2 + seen] = self.strength
        if positions is not None:
            logits = logits.take_along_dim(positions[..., None], dim=1)
        return logits

    def token_logps(self, ids, targets, scored=None, attention_mask=None):
        logps = self(ids)[:, -targets.size(1):].log_softmax(-1)
        return logps.gather(-1, targets[..., None])[..., 0] * (1 if scored is None else scored)


def test_completion_logps():
    from loglik import View, completion_logps
    prompt, completion = torch.tensor([[5, 6]]), torch.tensor([[2, 3, 2, 4]])
    holes = torch.tensor([[True, False]])
    z = [math.log(math.exp(s) + 9) for s in (1, 3, 2, 4)]        # all masked: 2 is the favourite
    expected = torch.tensor([[1 - z[0], -z[1], 2 - z[2], -z[3]]])
    model = Counting()
    close(completion_logps(model, prompt, completion, holes), expected)
    assert model.ids.tolist() == [[1, 6, 1, 1, 1, 1]], "what the model sees: q', and masks"
    some = torch.tensor([[True, True, False, False]])
    close(completion_logps(Counting(), prompt, completion, holes, some), expected * some)
    half = View(~some, ~some, torch.tensor([[2.0]]))             # two in sight: 4 is the favourite
    found = completion_logps(Counting(), prompt, completion, holes, None, [half])
    close(found, 2 * torch.tensor([[0, 0, -z[2], 4 - z[3]]]))


def test_grpo_loss():
    from grpo import grpo_loss
    ratio = torch.tensor([[2.0, 0.25], [2.0, 0.25]])
    logps = ratio.log().requires_grad_()
    A, mask = torch.tensor([1.0, -1.0]), torch.tensor([[True, True], [True, False]])
    loss, stats = grpo_loss(logps, torch.zeros(2, 2), None, A, mask, epsilon=0.5, beta=0.0)
    close(loss, torch.tensor(-(1.5 + 0.25 - 2.0) / 3))           # 2 is clipped only where A > 0
    loss.backward()
    assert (logps.grad != 0).tolist() == [[False, True], [True, False]]
    assert abs(stats['clip_high'] - 1 / 3) < 1e-6 and stats['clip_low'] == 0
    assert abs(stats['ratio'] - (2 + 0.25 + 2) / 3) < 1e-6 and 'kl' not in stats
    loss, stats = grpo_loss(logps, torch.zeros(2, 2), None, -A, mask, epsilon=0.5, beta=0.0)
    close(loss, torch.tensor((2.0 + 0.5 - 1.5) / 3), 'where A < 0 a ratio of 0.25 counts as 0.5')
    assert abs(stats['clip_low'] - 1 / 3) < 1e-6
    by_row, _ = grpo_loss(logps, torch.zeros(2, 2), None, A, mask, 0.5, 0.0, 'sequence')
    close(by_row, torch.tensor(-((1.5 + 0.25) / 2 - 2.0) / 2))
    same = torch.zeros(1, 1)
    loss, stats = grpo_loss(same, same, same + math.log(2), torch.zeros(1), same == 0, beta=0.1)
    close(loss, torch.tensor(0.1 * (2 - math.log(2) - 1)), 'k3: exp(d) - d - 1, d = ref - new')
    assert abs(stats['kl'] - (2 - math.log(2) - 1)) < 1e-6


class LovesMasks(Counting):
    looks = False              # at the prompt: after a 7 its favourites are two higher

    def __call__(self, ids, attention_mask=None, positions=None):
        logits = super().__call__(ids, attention_mask, positions)
        begins_with_7 = (ids[:, 0] == 7)[:, None, None]
        logits = torch.where(begins_with_7 & self.looks, logits.roll(2, -1), logits)
        logits[..., self.config.mask_id] = 9.0                   # which may never be drawn
        return logits


def test_generate():
    from sample import generate
    prompt = torch.tensor([[5, 6], [7, 8]])
    ids, steps = generate(LovesMasks(), prompt, 4, 2, 4)
    assert ids.tolist() == [[3, 2, 5, 4]] * 2, '2 + how many stood before it; 1, the mask, never'
    assert steps.tolist() == [[1, 0, 3, 2]] * 2
    ids, steps = generate(LovesMasks(), prompt, 4, 2, 2)
    assert ids.tolist() == [[2, 2, 4, 4]] * 2 and steps.tolist() == [[0, 0, 1, 1]] * 2
    assert generate(LovesMasks(), prompt, 4, 4, 4)[0].tolist() == [[5, 3, 4, 2]] * 2
    ends = LovesMasks()
    ends.config = SimpleNamespace(mask_id=1, eos_id=0, end_ids=(0, 3))
    ids, steps = generate(ends, prompt, 4, 2, 4)
    assert ids.tolist() == [[3, 2, 0, 0]] * 2, 'the first block holds an end, 3'
    assert steps.tolist() == [[1, 0, 1, 1]] * 2
    ends.looks, ends.config.end_ids = True, (0, 5)
    for order in ([0, 1], [1, 0]):
        ids, steps = generate(ends, prompt[order], 4, 2, 4)
        assert ids[order].tolist() == [[3, 2, 5, 4], [5, 4, 0, 0]], 'one row ends, one goes on'
        assert steps[order].tolist() == [[1, 0, 3, 2], [1, 0, 1, 1]]
    streams = [torch.Generator().manual_seed(seed) for seed in range(16)]
    rows, _ = generate(ends, prompt.repeat(8, 1), 4, 2, 4, 1.0, generators=streams)
    for seed in range(16):
        stream = torch.Generator().manual_seed(seed)
        alone, _ = generate(ends, prompt[seed % 2:][:1], 4, 2, 4, 1.0, generators=[stream])
        close(rows[seed:seed + 1], alone, 'a row depends on no row beside it')
    hot, _ = generate(LovesMasks(), prompt.repeat(8, 1), 4, 2, 4, 5.0)
    assert len({tuple(row) for row in hot.tolist()}) > 8, 'a temperature makes rows differ'
    model = LovesMasks()
    generate(model, prompt[:1], 4, 2, 4, attention_mask=torch.tensor([[0, 1]]))
    assert model.attention_mask.tolist() == [[False] + [True] * 5]
    generate(model, prompt, 4, 2, 4, cfg_scale=1.0)
    assert (model.ids[:, :2] == 1).all(), 'guide calls the model without the prompt'
    with pytest.raises(ValueError):
        generate(model, prompt, 5, 2, 5)


def test_stepmerge_views():
    from loglik import completion_logps, stepmerge_views
    commit_steps = torch.tensor([[1, 0, 3, 2]])
    [whole] = stepmerge_views(commit_steps, 1)
    assert whole.masked.all() and whole.scored.all(), 'one part is the mean field'
    first, second = stepmerge_views(commit_steps, 2)
    assert first.masked.all() and first.scored.tolist() == [[True, True, False, False]]
    assert second.masked.tolist() == second.scored.tolist() == [[False, False, True, True]]
    first, second = stepmerge_views(torch.tensor([[0, 2, 1]]), 2)        # three steps
    assert first.scored.tolist() == [[True, False, True]]
    assert second.masked.tolist() == second.scored.tolist() == [[False, True, False]]
    [first, *_] = stepmerge_views(torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]]), 3)     # 4 steps
    assert first.scored.tolist() == [[True, True, False, False], [True] * 4]
    # a view per step: each token is the model's favourite, as when it was sampled
    views = stepmerge_views(commit_steps, 4)
    prompt, completion = torch.tensor([[5, 6]]), torch.tensor([[3, 2, 5, 4]])
    found = completion_logps(Counting(), prompt, completion, prompt == 0, None, views)
    close(found, torch.tensor([[s - math.log(math.exp(s) + 9) for s in (1, 3, 2, 4)]]))


def test_rejection_loss():
    from grpo import rejection_loss
    from sft import masked_loss
    logps = torch.tensor([[-1.0, -9.0], [-3.0, -2.0], [-4.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    loss, _ = rejection_loss(logps, torch.tensor([1.0, 1.0, 0.0]), mask)
    close(loss, torch.tensor((1 + 3 + 2) / 3))   # three tokens are right, the others do not count
    loss.backward()
    close(logps.grad, torch.tensor([[-1, 0], [-1, -1], [0, 0]]) / 3)
    assert rejection_loss(logps, torch.zeros(3), mask)[0] == 0, 'none is right: nothing to learn'
    # of one noise level per completion, with all right, it is the loss of SFT
    masked, t = torch.tensor([[True, False], [True, True]]), torch.tensor([[0.5], [0.25]])
    logps = torch.tensor([[-1.0, 0.0], [-3.0, -2.0]])
    close(rejection_loss(logps / t, torch.ones(2), torch.ones(2, 2, dtype=torch.bool))[0],
          masked_loss(logps, masked, t, 4))


class Table:
    """A model that never looks: of position k the tokens 0 to 4 have probabilities[k]."""
    config = SimpleNamespace(mask_id=1, eos_id=0, end_ids=(0,))
    device = torch.device('cpu')

    def __init__(self, probabilities):
        self.logits = torch.tensor(probabilities).log()          # (L, V)

    def __call__(self, ids, attention_mask=None, positions=None):
        if positions is None:
            prompt = torch.zeros(ids.size(1) - len(self.logits), self.logits.size(1))
            return torch.cat((prompt, self.logits)).expand(len(ids), -1, -1)
        return self.logits[positions - 2]                        # after a prompt of two


def test_exact_logps():
    from loglik import Exact, completion_logps, exact_logps

    def found(probabilities, completion, commit_steps, block_length, temperature=1.0, length=None):
        completion = torch.tensor([completion])
        mask = torch.arange(completion.size(1))[None] < (length or completion.size(1))
        return exact_logps(Table(probabilities), torch.tensor([[5, 6]]), completion, mask,
                           torch.tensor([commit_steps]), block_length, temperature)[0].exp()

    # two positions, tokens 2 and 3, a step for each
    two = [[0, 0, 0.6, 0.4, 0], [0, 0, 0.3, 0.7, 0]]
    # step 0 commits the first at 0.6, so the other one had drawn 2, for 3 would have been surer
    close(found(two, [2, 2], [0, 1], 2), torch.tensor([0.6 * 0.3, 0.3]))
    close(found(two, [2, 3], [0, 1], 2), torch.tensor([0.6 * 0.3, 0.7]))
    close(found(two, [3, 2], [0, 1], 2), torch.tensor([0.4 * 0.3, 0.3]))
    # step 0 commits the second: at 0.7, whatever the first one drew
    close(found(two, [2, 3], [1, 0], 2), torch.tensor([0.6, 0.7]))
    close(found(two, [3, 3], [1, 0], 2), torch.tensor([0.4, 0.7]))
    # both in one step, or each in a block of its own: nothing is passed over
    close(found(two, [2, 2], [0, 0], 2), torch.tensor([0.6, 0.3]))
    close(found(two, [2, 2], [0, 1], 1), torch.tensor([0.6, 0.3]))
    # 0.6 and 0.5 are committed, so the third was below 0.5, the lower one: 0.45, in equal shares
    three = [[0, 0, 0.6, 0.4, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0.55, 0.45, 0]]
    close(found(three, [2, 2, 2], [0, 0, 1], 3),
          torch.tensor([0.6 * 0.45 ** 0.5, 0.5 * 0.45 ** 0.5, 0.55]))
    # a tie: the second may have drawn 2, as sure as the first one's, or 3
    close(found([two[0], two[0]], [2, 2], [0, 1], 2), torch.tensor([0.6, 0.6]), 'a tie')
    # temperature 0.5 draws with squares, 1/2 and 4/7, but compares the plain 0.5 and 0.4
    plain = [[0, 0, 0.5, 0.5, 0], [0.2, 0, 0.4, 0.2, 0.2]]
    close(found(plain, [2, 3], [0, 1], 2, 0.5), torch.tensor([1 / 2, 1 / 7]))
    # and the second product is of draws: 0.5 at most, so 0.4, which is 4/13 at temperature 0.5
    halves = [[0, 0, 0.5, 0.5, 0], [0, 0, 0.6, 0.4, 0]]
    close(found(halves, [2, 3], [0, 1], 2, 0.5), torch.tensor([0.5 * 4 / 13, 4 / 13]))
    # the mask, however likely, is never drawn: 0.3 and 0.2 are 0.6 and 0.4
    masks = [[0, 0.5, 0.3, 0.2, 0], two[1]]
    close(found(masks, [2, 2], [0, 1], 2), torch.tensor([0.6 * 0.3, 0.3]))
    # 0 ends it: what was drawn after it in its block is the end's, the next block was never drawn
    other = [0.05, 0, 0.3, 0.65, 0]
    ends = [[0.6, 0, 0.4, 0, 0], other, other, other]
    close(found(ends, [0, 2, 0, 0], [0, 1, 1, 1], 2, length=1),
          torch.tensor([0.6 * 0.35 * 0.3, 1, 1, 1]))
    # rows of a batch do not meet, though the first is over after two steps
    rows = torch.tensor([[0, 2, 0, 0], [2, 2, 2, 2]])
    steps = torch.tensor([[0, 1, 1, 1], [0, 1, 2, 3]])
    mask = torch.arange(4) < torch.tensor([[1], [4]])            # the lengths
    prompt = torch.tensor([[5, 6], [5, 6]])
    both = exact_logps(Table(ends), prompt, rows, mask, steps, 2, 1.0)
    for i in (0, 1):
        row = slice(i, i + 1)
        one = exact_logps(Table(ends), prompt[row], rows[row], mask[row], steps[row], 2, 1.0)
        close(both[row], one, 'a row alone')
    # both products have a gradient: 0.3 stands in each, so twice 1 - 0.3
    table = Table(two)
    table.logits = table.logits.clamp(min=-50).requires_grad_()
    rows = torch.tensor([[2, 2]])
    exact_logps(table, prompt[:1], rows, rows > 0, torch.tensor([[0, 1]]), 2, 1.0).sum().backward()
    close(table.logits.grad[1, 2], torch.tensor(2 * 0.7), 'the gradient')
    # a step sees what earlier ones have committed: each token is the favourite, of nine
    completion = torch.tensor([[3, 2, 5, 4]])
    logps = exact_logps(Counting(), torch.tensor([[5, 6]]), completion, completion > 0,
                        torch.tensor([[1, 0, 3, 2]]), 2, 1.0)
    close(logps, torch.tensor([[s - math.log(math.exp(s) + 8) for s in (1, 3, 2, 4)]]))
    # in the place of views it is given the prompt with its holes
    model, holes = Counting(), torch.tensor([[True, False]])
    views = Exact(torch.tensor([[1, 0, 3, 2]]), 2, 1.0)
    close(completion_logps(model, torch.tensor([[5, 6]]), completion, holes, completion > 0, views),
          logps)
    assert model.ids[0, :2].tolist() == [1, 6]


def test_last_adapter_off():
    from model import Config, LLaDA, add_lora, last_adapter_off
    torch.manual_seed(0)
    model = LLaDA(Config(d_model=16, n_layers=1, mlp_hidden_size=16, embedding_size=16))
    ids = torch.arange(8)[None]
    outputs = []
    with torch.no_grad():
        for seed in range(2):
            outputs.append(model(ids))
            add_lora(model, rank=2, alpha=6, targets=('q_proj',), seed=seed)
            for p in model.parameters():
                if p.requires_grad:
                    p.fill_(0.5 + seed)
        trained = model(ids)
        try:
            with last_adapter_off(model):
                close(model(ids), outputs[1])    # the first adapter stays
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        close(model(ids), trained)
        model.requires_grad_(False)
        with last_adapter_off(model):
            close(model(ids), trained, 'no adapter is in training: nothing is switched off')
    assert not torch.equal(trained, outputs[1]) and not torch.equal(*outputs)


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(sys.argv[1])
    print(f'Written. Next: {sys.argv[1]}/EXERCISES.md, whose first lines are for the teacher')
