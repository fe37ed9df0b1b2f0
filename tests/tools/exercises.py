"""Exercises for a course: the project with ten functions emptied, and a grader for each.

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

import torch

HERE = Path(__file__).resolve()
# (file, function, background, hint), in the order in which they are solved
EXERCISES = [
    ('grpo.py', 'group_advantages', 'd1, equation 2: what earned more than its group is made '
     'likelier.', 'view(-1, num_generations), and keepdim.'),
    ('grpo.py', 'up_to_end', 'A completion is over at its first end token, which counts: the '
     'model has to learn to stop.', 'How many ends stand before a position? cumsum.'),
    ('sft.py', 'draw_masks', 'LLaDA masks each token of an answer with a probability t of its own '
     'answer (d1, Algorithm 2).', 'One random start; t of row i is i/B further on, modulo 1.'),
    ('sft.py', 'masked_loss', 'The cross-entropy of the masked tokens, weighed by 1/t, so that '
     'every token counts the same in expectation.', 'One line.'),
    ('loglik.py', 'random_prompt_mask', 'd1, section 3.1: holes in the prompt make another view of '
     'the same completion.', 'The prefill must stay in sight.'),
    ('loglik.py', 'completion_logps', 'The mean field: one forward pass, the whole completion '
     'masked, every token scored on its own.', 'Without views there is one, with all masked.'),
    ('grpo.py', 'grpo_loss', 'd1, equation 4: PPO\'s clip with a ratio per token, and the k3 '
     'estimate of the KL.', 'Start with mu = 1, where the ratio is 1. min is the pessimist.'),
    ('sample.py', 'commit_counts', 'The masks of a block are shared out over its steps.', 'divmod'),
    ('sample.py', 'generate', 'LLaDA\'s sampler: blocks from left to right, and in a block the '
     'predictions first of which the model is surest.', 'choose, pad_mask, guide and has_end are '
     'given. Begin with one row, without an end, padding or guidance.'),
    ('model.py', 'last_adapter_off', 'The reference policy is the policy without the adapter in '
     'training.', 'try, yield, finally: switch it on again after an error, too.'),
]
QUESTIONS = '''
## Open questions, from an evening to a project

Each can be compared with a measured result in the README or in assets/notebook.md.

1. **Does the prompt mask earn its keep?** It costs half of the gradient's direction (README), and
   yet random masks beat fixed ones when a rollout serves many updates (mu 24: 80 against 59 %).
   What happens at `--num_iterations 24 --p_mask_prompt 0`?
2. **Fixed or random masks.** Where between mu 2, at which they are equal, and mu 24 do they part?
   Look at clip_high and at the ratio in log.jsonl: what do fixed masks overfit?
3. **The KL term.** `--beta 0.04` ends at 70.9 % where none ends at 83.4 (five tasks, five bases).
   Is it the groups without a gradient? Leave the KL out of those (`grpo_loss`).
4. **Choice and skill.** From the base coupled views end at 45.5 % and d1's at 82.8, from SFT
   models at 76.4 and 76.8: they do not see the choice that the first step makes (README). Both
   at half weight (assets/forks/estimator.patch) end at 77.0 from the base. Which weights are
   best, and should they change while it learns?
5. **Blocks.** Train with `--block_length 8` and evaluate with 4, 16 and 32. What does a policy
   learn about its sampler?
6. **A reward of your own.** Give half of the points for short completions (`grade_gsm8k` in
   rewards.py). Does the policy find a way to be paid without thinking?
7. **SFT that spoils nothing.** On base 2 SFT takes Countdown from 59 to 0 %, and no reward is left
   for diffu-GRPO (README). Which dose (`--sft_learning_rate`, `--sft_steps`) keeps it, and can
   you tell without looking at the tasks?
8. **A task of your own.** Add one in a section of rewards.py and in assets/nano/make.py, make a
   base that knows it (`python assets/nano/make.py --out FOLDER`), and see whether diffu-GRPO
   finds thinking there.
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
    sheet = ['# Exercises', '', 'Ten functions have lost their bodies; their docstrings say what '
             'they do. Solve them in this order; after the last one `python train.py --task gsm8k` '
             'works.', '']
    for number, (file, function, background, hint) in enumerate(EXERCISES, 1):
        sheet += [f'{number}. **`{function}` in {file}.** {background} *Hint: {hint}*  ',
                  f'   `python -m pytest -q exercises.py -k test_{function}`']
    (folder / 'EXERCISES.md').write_text('\n'.join(sheet) + '\n' + QUESTIONS)


# ---- graders ----

def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_group_advantages():
    from grpo import group_advantages
    found = group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    found = group_advantages(torch.tensor([1.0, 3.0]), 2, divide_by_std=True)
    assert (found - torch.tensor([-1.0, 1.0]) / 2 ** 0.5).abs().max() < 1e-3


def test_up_to_end():
    from grpo import up_to_end
    found = up_to_end(torch.tensor([[5, 0, 7, 0], [5, 6, 7, 8], [9, 5, 0, 1]]), (0, 9))
    assert found.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]


def test_draw_masks():
    from sft import draw_masks
    answers = torch.full((8, 5000), 7)
    masked, t = draw_masks(answers, torch.Generator().manual_seed(0))
    assert masked.shape == answers.shape and masked.dtype == torch.bool
    assert t.shape == (8, 1) and (masked.float().mean(1, keepdim=True) - t).abs().max() < 0.03
    gaps = t.flatten().sort().values.diff()
    close(gaps, torch.full((7,), 1 / 8))         # evenly spread
    low = draw_masks(answers, torch.Generator().manual_seed(0), t_min=0.5)[1]
    assert low.min() >= 0.5 and low.max() <= 1


def test_masked_loss():
    from sft import masked_loss
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -torch.inf]])
    masked = torch.tensor([[True, True], [True, False]])
    found = masked_loss(logps, masked, torch.tensor([[0.5], [0.25]]), 4)
    close(found, torch.tensor((1 / 0.5 + 2 / 0.5 + 3 / 0.25) / 4))


def test_random_prompt_mask():
    from loglik import random_prompt_mask
    ids, g = torch.full((100, 50), 5), torch.Generator().manual_seed(0)
    found = random_prompt_mask(ids, 0.3, g, num_prefill=2)
    assert found.shape == ids.shape and not found[:, 48:].any()
    assert abs(found[:, :48].float().mean() - 0.3) < 0.03
    assert not torch.equal(found, random_prompt_mask(ids, 0.3, g))


class Counting:
    """A model whose favourite at place i is the token 2 + (tokens in sight), more sure at some."""
    strength = torch.tensor([0.0, 0.0, 1.0, 3.0, 2.0, 4.0])      # 2 of a prompt, 4 of a completion
    config = SimpleNamespace(mask_id=1, eos_id=0, end_ids=(0,))
    device = torch.device('cpu')

    def __call__(self, ids, attention_mask=None, positions=None):
        seen = (ids[:, 2:] != 1).sum(1)                          # (B,)
        logits = torch.zeros(*ids.shape, 10)
        logits[torch.arange(len(ids)), :, 2 + seen] = self.strength
        if positions is not None:
            logits = logits.take_along_dim(positions[..., None], dim=1)
        return logits

    def token_logps(self, ids, targets, scored):
        logps = self(ids)[:, -targets.size(1):].log_softmax(-1)
        return logps.gather(-1, targets[..., None])[..., 0] * scored


def test_completion_logps():
    from loglik import View, completion_logps
    prompt, completion = torch.tensor([[5, 6]]), torch.tensor([[2, 3, 2, 4]])
    holes = torch.tensor([[True, False]])
    z = [math.log(math.exp(s) + 9) for s in (1, 3, 2, 4)]        # all masked: 2 is the favourite
    expected = torch.tensor([[1 - z[0], -z[1], 2 - z[2], -z[3]]])
    close(completion_logps(Counting(), prompt, completion, holes), expected)
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
    by_row, _ = grpo_loss(logps, torch.zeros(2, 2), None, A, mask, 0.5, 0.0, 'sequence')
    close(by_row, torch.tensor(-((1.5 + 0.25) / 2 - 2.0) / 2))
    same = torch.zeros(1, 1)
    loss, stats = grpo_loss(same, same, same + math.log(2), torch.zeros(1), same == 0, beta=0.1)
    close(loss, torch.tensor(0.1 * (2 - math.log(2) - 1)))


def test_commit_counts():
    from sample import commit_counts
    assert commit_counts(8, 3) == [3, 3, 2] and commit_counts(8, 4) == [2] * 4
    assert sum(commit_counts(3, 5)) == 3


class LovesMasks(Counting):
    def __call__(self, ids, attention_mask=None, positions=None):
        logits = super().__call__(ids, attention_mask, positions)
        logits[..., self.config.mask_id] = 9.0                   # which may never be drawn
        return logits


def test_generate():
    from sample import generate
    prompt = torch.tensor([[5, 6], [7, 8]])
    ids, steps = generate(LovesMasks(), prompt, 4, 2, 4)
    assert ids.tolist() == [[3, 2, 5, 4]] * 2, 'each token tells how many stood before it'
    assert steps.tolist() == [[1, 0, 3, 2]] * 2
    ids, steps = generate(LovesMasks(), prompt, 4, 2, 2)
    assert ids.tolist() == [[2, 2, 4, 4]] * 2 and steps.tolist() == [[0, 0, 1, 1]] * 2
    assert generate(LovesMasks(), prompt, 4, 4, 4)[0].tolist() == [[5, 3, 4, 2]] * 2
    ends = LovesMasks()
    ends.config = SimpleNamespace(mask_id=1, eos_id=0, end_ids=(0, 3))
    ids, steps = generate(ends, prompt, 4, 2, 4)
    assert ids.tolist() == [[3, 2, 0, 0]] * 2, 'the first block holds an end, 3'
    assert steps.tolist() == [[1, 0, 1, 1]] * 2


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
    assert not torch.equal(trained, outputs[1]) and not torch.equal(*outputs)


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(sys.argv[1])
