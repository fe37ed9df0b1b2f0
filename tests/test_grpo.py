"""What grpo.py and train.train_grpo claim: d1's advantages, masks, loss and updates, and learning.

The updates are held against Algorithm 1 written down a second time, as plainly as possible.
"""
import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

import rewards
import train
from grpo import (completion_mask, espo_loss, fixed_logps, group_advantages, grpo_loss, policy_loss,
                  rollout, stable_loss, wd1_loss)
from loglik import completion_logps, draw_views, random_prompt_mask
from model import LLaDA, add_lora
from tiny import EOS, GOLDEN, MASK, bias, tiny, tokens

NORMS = ['token', 'sequence']


# ---- the official numbers ----

@pytest.mark.parametrize('case, norm, beta', [('token_norm.beta0.04', 'token', 0.04),
                                              ('token_norm.beta0.0', 'token', 0.0),
                                              ('seq_norm.beta0.04', 'sequence', 0.04)])
def test_loss_and_gradient_match_the_official_code(case, norm, beta):
    golden = load_file(GOLDEN / 'logps.safetensors')
    model = LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    expected = json.loads((GOLDEN / 'loss.json').read_text())[f'{case}.iter0']
    prompt_ids, completion_ids = golden['input_ids'].split((24, 20), dim=1)
    logps = completion_logps(model, prompt_ids, completion_ids, golden['prompt_masks'][0])
    advantages = group_advantages(golden['rewards'], 3)
    torch.testing.assert_close(advantages, golden['advantages'])
    loss, stats = grpo_loss(logps, golden['old_logps'][0], golden['ref_logps'][0], advantages,
                            golden['completion_mask'], 0.5, beta, norm)
    loss.backward()
    assert loss.item() == pytest.approx(expected['loss'], rel=1e-5, abs=2e-6)
    grad_norm = clip_grad_norm_(model.parameters(), math.inf).item()
    assert grad_norm == pytest.approx(expected['grad_norm'], rel=1e-4)
    if norm == 'token' and beta:
        assert stats['kl'] == pytest.approx(expected['kl'], rel=1e-4)


# ---- advantages and the completion mask ----

def test_group_advantages_by_hand():
    given = torch.tensor([3.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert group_advantages(given, 3).tolist() == [2.0, -1.0, -1.0, 0.0, 0.0, 0.0]
    assert group_advantages(given, 2).tolist() == [1.5, -1.5, -0.5, 0.5, 0.0, 0.0]
    assert given.tolist() == [3.0, 0.0, 0.0, 1.0, 1.0, 1.0], 'a reward never becomes an advantage'


@pytest.mark.parametrize('row, length', [([5, 6, 7, 8], 4), ([0, 6, 7, 8], 1), ([5, 0, 7, 0], 2),
                                         ([5, 6, 7, 0], 4), ([9, 0, 0, 0], 1), ([5, 0, 9, 9], 2)])
def test_a_completion_goes_up_to_its_first_end(row, length):
    mask = completion_mask(torch.tensor([[5, 5, 5, 5], row]), (0, 9))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * 4, [True] * length + [False] * (4 - length)]


# ---- the loss ----

def case(B=3, L=5):
    """Log-probs that ask for a gradient, old and reference ones, advantages, a ragged mask."""
    g = torch.Generator().manual_seed(0)
    logps, old_logps, ref_logps = (-3 * torch.rand(B, L, generator=g) for _ in range(3))
    mask = torch.arange(L) < torch.tensor([[L], [2], [1]])
    return logps.requires_grad_(), old_logps, ref_logps, torch.tensor([1.0, -2.0, 0.5]), mask


def test_loss_by_hand_on_ragged_masks():
    logps, old_logps, ref_logps, advantages, mask = case()
    rows = []
    for i, A in enumerate(advantages.tolist()):
        row = []
        for k in range(int(mask[i].sum())):
            new, old, ref = logps[i, k].item(), old_logps[i, k].item(), ref_logps[i, k].item()
            ratio = math.exp(new - old)
            objective = min(ratio * A, max(0.7, min(1.3, ratio)) * A)
            kl = math.exp(ref - new) - (ref - new) - 1
            row.append(0.1 * kl - objective)
        rows.append(row)
    assert [len(row) for row in rows] == [5, 2, 1]
    token, sequence = (grpo_loss(logps, old_logps, ref_logps, advantages, mask, 0.3, 0.1, norm)[0]
                       for norm in NORMS)
    assert token.item() == pytest.approx(sum(map(sum, rows)) / 8, rel=1e-5)
    assert sequence.item() == pytest.approx(sum(sum(row) / len(row) for row in rows) / 3, rel=1e-5)


# advantage, ratio, is the gradient cut? (epsilon 0.5)
CLIPPING = [(1.0, 1.6, True), (1.0, 1.4, False), (1.0, 0.4, False), (1.0, 1.0, False),
            (-1.0, 0.4, True), (-1.0, 0.6, False), (-1.0, 1.6, False), (-1.0, 1.0, False)]


@pytest.mark.parametrize('advantage, ratio, cut', CLIPPING)
def test_loss_clips_both_signs(advantage, ratio, cut):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, stats = grpo_loss(logps, zero, None, torch.tensor([advantage]), one, 0.5, 0.0)
    loss.backward()
    bound = 1.5 if advantage > 0 else 0.5
    assert loss.item() == pytest.approx(-advantage * (bound if cut else ratio), rel=1e-6)
    gradient = 0.0 if cut else -advantage * ratio
    assert logps.grad.item() == pytest.approx(gradient, rel=1e-6, abs=1e-12)
    assert stats['ratio'] == pytest.approx(ratio, rel=1e-6)
    assert stats['clip_high'] == (cut and advantage > 0)
    assert stats['clip_low'] == (cut and advantage < 0)


def test_kl_is_k3():
    logps, old_logps, _, advantages, mask = case()
    for gap in (-8.0, -1.0, 0.0, 1.0, 8.0):
        stats = grpo_loss(logps, old_logps, logps.detach() + gap, advantages, mask)[1]
        assert stats['kl'] == pytest.approx(math.exp(gap) - gap - 1, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize('norm', NORMS)
def test_nothing_after_the_end_counts_not_even_nan(norm):
    logps, old_logps, ref_logps, advantages, mask = case()
    loss, stats = grpo_loss(logps, old_logps, ref_logps, advantages, mask, norm=norm)
    loss.backward()
    gradient = logps.grad.clone()
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
    logps.grad = None
    old_logps = old_logps.where(mask, torch.nan)
    ref_logps = ref_logps.where(mask, torch.nan)
    again = grpo_loss(logps, old_logps, ref_logps, advantages, mask, norm=norm)
    again[0].backward()
    assert again[0].item() == loss.item() and again[1] == stats
    assert torch.equal(logps.grad, gradient)


@pytest.mark.parametrize('old, advantage', [(-200.0, 1.0), (-200.0, 0.0), (200.0, -1.0)])
def test_a_ratio_beyond_float32_leaves_the_gradient_finite(old, advantage):
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old_logps, ref_logps = torch.tensor([[old, -2.0]]), torch.tensor([[-old, -2.0]])
    loss, _ = grpo_loss(logps, old_logps, ref_logps, torch.tensor([advantage]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()


@pytest.mark.parametrize('norm', NORMS)
def test_empty_completions_give_a_finite_loss(norm):
    logps, old_logps, ref_logps, advantages, mask = case()
    for rows in ([1], [0, 1, 2]):                # one row without a token that counts, then all
        mask[rows] = False
        logps.grad = None
        loss, stats = grpo_loss(logps, old_logps, ref_logps, advantages, mask, norm=norm)
        loss.backward()
        assert loss.isfinite() and logps.grad.isfinite().all()
        assert (logps.grad[rows] == 0).all()
    assert loss.item() == 0.0


# ---- a rollout, and what stays fixed in its updates ----

class Letters:
    """A tokenizer of one letter per token."""
    def __call__(self, text, add_special_tokens=False):
        return dict(input_ids=[ord(letter) - ord('a') for letter in text])

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids.tolist() if not (skip_special_tokens and i in (EOS, MASK))]
        return ''.join(chr(ord('a') + i) for i in kept)


def put_reward(monkeypatch, reward, task='gsm8k'):
    """Lets reward(completion, example) be the reward of a task."""
    def grade(completion, example):
        return reward(completion, example), False
    monkeypatch.setitem(rewards.TASKS, task, rewards.TASKS[task]._replace(grade=grade))


def groups_of(model, problems, seed=0, step=0, G=4, **knobs):
    sampling = dict(gen_length=8, block_length=4, steps=4, temperature=1.0)
    return rollout(model, Letters(), problems, G, sampling, seed=seed, step=step, **knobs)


PROBLEMS = [(0, 'gsm8k', [5, 6, 7], dict(bonus=1)), (3, 'math', [8] * 6, dict(bonus=2)),
            (4, 'gsm8k', [9], dict(bonus=3))]


def test_groups_are_the_same_in_one_call_and_one_by_one(monkeypatch):
    model = bias(tiny(), {EOS: 1.0})
    put_reward(monkeypatch, lambda text, example: len(text) + example['bonus'])
    put_reward(monkeypatch, lambda text, example: -text.count('m') - example['bonus'], 'math')
    groups = groups_of(model, PROBLEMS)
    for problem, group in zip(PROBLEMS, groups):
        [alone] = groups_of(model, [problem])
        k, task, prompt, example = problem
        assert (group.k, group.task, group.example) == (k, task, example)
        assert group.prompt_ids.tolist() == [prompt] * 4
        mask = completion_mask(group.completion_ids, (EOS,))
        assert torch.equal(group.completion_mask, mask)
        assert group.texts == [Letters().decode(ids[keep], True)
                               for ids, keep in zip(group.completion_ids, mask)]
        expected = [rewards.TASKS[task].grade(text, example)[0] for text in group.texts]
        assert group.rewards.tolist() == expected
        assert torch.equal(group.advantages, group_advantages(group.rewards, 4))
        for name in ('prompt_ids', 'completion_ids', 'completion_mask', 'rewards', 'advantages',
                     'order'):
            assert torch.equal(getattr(group, name), getattr(alone, name)), name
        assert group.order[:, :4].sort(dim=1).values.tolist() == [[0, 0, 1, 1]] * 4
    ended = torch.cat([~group.completion_mask[:, -1] for group in groups])
    assert ended.any() and not ended.all()


def test_the_prefill_is_rewarded_too_and_advantages_may_be_divided(monkeypatch):
    put_reward(monkeypatch, lambda text, example: len(text))
    [group] = groups_of(bias(tiny(), {EOS: 1.0}), PROBLEMS[:1], prefill='ab', divide_by_std=True)
    assert all(text.startswith('ab') for text in group.texts)
    assert group.rewards.tolist() == [len(text) for text in group.texts]
    assert torch.equal(group.advantages, group_advantages(group.rewards, 4, divide_by_std=True))
    assert not torch.equal(group.advantages, group_advantages(group.rewards, 4))


def test_every_row_has_a_stream_of_seed_step_prompt_and_row(monkeypatch):
    put_reward(monkeypatch, lambda text, example: 0.0)
    model = tiny()

    def completions(k=0, **key):
        return groups_of(model, [(k, 'gsm8k', [5, 6, 7], {})], **key)[0].completion_ids
    first = completions()
    assert torch.equal(completions(), first) and len(first.unique(dim=0)) == 4
    assert torch.equal(completions(G=6)[:4], first)
    for other in (completions(k=1), completions(seed=1), completions(step=1)):
        assert not (other == first).all(1).any()


def policies(kind):
    """A policy that has moved a little from its reference, and the reference as train.py has it."""
    model = bias(tiny(), {EOS: 1.0})
    start = copy.deepcopy(model)
    reference = start
    if kind == 'lora':
        reference = add_lora(model, 4, 8)
    for p in model.parameters():
        p.data += 0.05 * p.requires_grad
    return model, reference, start


@pytest.mark.parametrize('kind', ['full', 'lora'])
def test_fixed_logps_are_those_of_every_mask(monkeypatch, kind):
    put_reward(monkeypatch, lambda text, example: 0.0)
    model, reference, start = policies(kind)
    [group] = groups_of(model, PROBLEMS[:1])
    for seed in range(3):                        # mu = 3
        g = torch.Generator().manual_seed(seed)
        group.prompt_masks.append(random_prompt_mask(group.prompt_ids, 0.5, g))
        group.views.append(draw_views('coupled', 2, group.order, g))
    found = fixed_logps(model, reference, group, 'grpo', 0.04)
    for policy, all_logps in zip((model, start), found):
        assert len(all_logps) == 3
        for logps, prompt_mask, views in zip(all_logps, group.prompt_masks, group.views):
            assert not logps.requires_grad
            expected = completion_logps(policy, group.prompt_ids, group.completion_ids,
                                        prompt_mask, group.completion_mask, views)
            torch.testing.assert_close(logps, expected.detach())
    assert (found[0][0] - found[1][0]).abs().max() > 0.01
    assert fixed_logps(model, None, group, 'grpo', 0.0)[1] == [None] * 3
    assert fixed_logps(None, None, group, 'wd1', 0.04) == ([None] * 3, [None] * 3)


# ---- other losses ----

def a_group():
    """logps that want a gradient, old and reference log-probs, advantages, a mask with an end."""
    g = torch.Generator().manual_seed(0)
    logps, old_logps, ref_logps = (torch.randn(3, 4, generator=g) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    return logps.requires_grad_(), old_logps, ref_logps, torch.tensor([1.0, -2.0, 1.0]), mask


def test_espo_has_one_ratio_per_sequence_of_its_mean_log_probs():
    logps, old_logps, ref_logps, A, mask = a_group()
    expected = 0
    for row in range(3):
        keep = mask[row]
        ratio = (logps - old_logps)[row, keep].mean().exp()
        kl = (logps - ref_logps)[row, keep].mean() ** 2 / 2
        expected += (0.1 * kl - min(ratio * A[row], ratio.clamp(0.8, 1.2) * A[row])) / 3
    loss, stats = espo_loss(logps, old_logps, ref_logps, A, mask, 0.2, 0.1)
    torch.testing.assert_close(loss, expected)
    assert stats['clip_high'] + stats['clip_low'] > 0


def test_stable_drl_bounds_a_ratio_that_grpo_lets_through():
    """A token of negative advantage whose ratio is 1000 because of noise."""
    logps = torch.tensor([[0.0, 0.0]], requires_grad=True)
    arguments = logps, torch.tensor([[-6.9, 0.0]]), None, torch.tensor([-1.0]), torch.ones(1, 2)
    gradients = []
    for loss in (grpo_loss, stable_loss):
        value, _ = loss(*arguments, epsilon=0.2, beta=0.0)
        gradients.append(torch.autograd.grad(value, logps)[0])
    assert gradients[0][0, 0] > 100 and gradients[1].abs().max() < 1
    logps, old_logps, ref_logps, A, mask = a_group()
    ratio = (logps - old_logps).exp().clamp(0.8, 1.2)[mask]
    kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1
    rows = A[:, None].expand(3, 4)[mask]
    expected = 0.1 * kl[mask].mean() - (ratio * rows).sum() / ratio.sum()
    loss, stats = stable_loss(logps, old_logps, ref_logps, A, mask, 0.2, 0.1)
    torch.testing.assert_close(loss, expected)
    assert stats == grpo_loss(logps, old_logps, ref_logps, A, mask, 0.2, 0.1)[1]
    equal, _ = stable_loss(logps, old_logps, ref_logps, 0 * A, mask, 0.2, 0.1)
    torch.testing.assert_close(equal, 0.1 * kl[mask].mean())
    assert stats['clip_high'] > 0 and stats['clip_low'] > 0


def test_wd1_weighs_log_probs_by_softmaxes_of_the_advantages():
    logps, _, _, A, mask = a_group()
    means = torch.stack([logps[row, mask[row]].mean() for row in range(3)])
    e, f = A.exp(), (-A).exp()
    expected = ((f / f.sum() - e / e.sum()) * means).sum()
    loss, stats = wd1_loss(logps, A, mask)
    torch.testing.assert_close(loss, expected)
    assert stats == dict(ratio=1, clip_high=0, clip_low=0, kl=0)


def test_each_kind_of_loss_is_reached_and_its_knobs_with_it():
    arguments = a_group()
    knobs = dict(epsilon=0.3, beta=0.2, norm='sequence', kl_estimate='k2')
    found = {kind: policy_loss(*arguments, kind, **knobs)[0].item()
             for kind in ('grpo', 'espo', 'stable', 'wd1')}
    logps, _, _, A, mask = arguments
    assert found == dict(grpo=grpo_loss(*arguments, 0.3, 0.2, 'sequence', 'k2')[0].item(),
                         espo=espo_loss(*arguments, 0.3, 0.2)[0].item(),
                         stable=stable_loss(*arguments, 0.3, 0.2)[0].item(),
                         wd1=wd1_loss(logps, A, mask)[0].item())
    assert len(set(found.values())) == 4


def test_the_k2_estimate_of_the_kl_is_half_the_squared_difference():
    logps, old_logps, ref_logps, A, mask = a_group()
    stats = grpo_loss(logps, old_logps, ref_logps, A, mask, kl_estimate='k2')[1]
    expected = ((logps - ref_logps)[mask] ** 2 / 2).mean().item()
    assert stats['kl'] == pytest.approx(expected)


def test_advantages_may_be_divided_by_the_std_of_their_group():
    rewards = torch.tensor([0.0, 2.0, 1.0, 1.0])
    found = group_advantages(rewards, 2, divide_by_std=True)
    torch.testing.assert_close(found, torch.tensor([-1, 1, 0, 0]) / 2 ** 0.5, atol=1e-3, rtol=0)
    found = group_advantages(torch.tensor([0.0, 2e-4]), 2, divide_by_std=True)
    torch.testing.assert_close(found, torch.tensor([-1, 1]) / (2 ** 0.5 + 1))    # std + 1e-4


# ---- train_grpo ----

FLAGS = ('--grpo_steps 2 --num_prompts 2 --num_generations 4 --num_iterations 3 --gen_length 8 '
         '--block_length 4 --steps 4 --temperature 1 --p_mask_prompt 0.5 --weight_decay 0 '
         '--beta 0.04 --rollout_batch 4').split()


class Problems:
    """Prompts of six tokens, and which have been drawn."""
    def __init__(self):
        self.drawn = []

    def draw(self, index):
        self.drawn.append(index)
        return 'gsm8k', tokens(6, seed=index).tolist(), dict(question='?', answer='!')


class Recorder(torch.optim.SGD):
    """SGD that keeps the learning rate and the gradients of every update."""
    def step(self):
        [group] = self.param_groups
        self.rates.append(group['lr'])
        self.gradients.append([p.grad.clone() for p in group['params']])
        super().step()


class Trained:
    """A model after train.train_grpo, and what happened on the way."""
    def __init__(self, monkeypatch, folder, *flags, model=None, record=True):
        self.args = train.parse([*FLAGS, *flags])
        self.args.folder = str(folder)
        folder.mkdir(exist_ok=True)
        self.model = model or tiny(end_ids=(EOS, 7, 8, 9))       # some completions end early
        if self.args.lora_rank:
            add_lora(self.model, self.args.lora_rank, 8, ('v_proj', 'up_proj', 'ff_out'))
        self.start, self.problems = copy.deepcopy(self.model), Problems()
        self.groups, self.calls, self.rates, self.gradients = [], [], [], []

        def recorded(model, tokenizer, problems, G, sampling, *rest):
            groups = rollout(model, tokenizer, problems, G, sampling, *rest)
            self.groups += groups
            self.calls.append((len(problems), sampling))
            return groups

        def sgd(model, learning_rate, weight_decay):
            optimizer = Recorder([p for p in model.parameters() if p.requires_grad], learning_rate)
            optimizer.rates, optimizer.gradients = self.rates, self.gradients
            return optimizer
        with monkeypatch.context() as patch:
            patch.setattr(train, 'rollout', recorded)
            if record:
                patch.setattr(train, 'adamw', sgd)
            train.train_grpo(self.args, self.model, Letters(), self.problems, None)
        self.log = train.read_log(self.args, 'log.jsonl')

    def moved(self):
        """How far each weight has moved, at most."""
        return [(p - q).abs().max().item()
                for p, q in zip(self.model.parameters(), self.start.parameters())]


def varied(text, example):
    return 1.0 + len(set(text)) + text.count('m')


def algorithm_1(args, policy, groups):
    """The gradients of all updates, clipped, as d1 writes them; policy moves by plain SGD."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    reference = copy.deepcopy(policy)
    gradients, losses = [], []
    for step in range(args.grpo_steps):
        old = copy.deepcopy(policy)
        own = groups[step * args.num_prompts:(step + 1) * args.num_prompts]
        for n in range(args.num_iterations):
            loss = 0
            for group in own:
                arguments = (group.prompt_ids, group.completion_ids, group.prompt_masks[n],
                             group.completion_mask, group.views[n])
                with torch.no_grad():
                    old_logps = completion_logps(old, *arguments)
                    ref_logps = completion_logps(reference, *arguments)
                advantages = group.rewards - group.rewards.mean()
                if args.divide_by_std:
                    advantages = advantages / (group.rewards.std() + 1e-4)
                part, _ = policy_loss(completion_logps(policy, *arguments), old_logps, ref_logps,
                                      advantages, group.completion_mask, args.loss, args.epsilon,
                                      args.beta, args.norm, args.kl)
                loss = loss + part / len(own)
            losses.append(loss.item())
            found = torch.autograd.grad(loss, trained)
            size = torch.stack([gradient.norm() for gradient in found]).norm().item()
            scale = min(1, args.max_grad_norm / size)
            gradients.append([gradient * scale for gradient in found])
            for p, gradient in zip(trained, gradients[-1]):
                p.data -= args.learning_rate * gradient
    return gradients, losses


@pytest.mark.parametrize('flags', [
    '--learning_rate 0.02 --beta 2 --max_grad_norm 1e6',
    '--learning_rate 0.02 --beta 0 --epsilon 0.05 --max_grad_norm 1e6',
    '--learning_rate 0.1 --beta 2 --max_grad_norm 1 --norm sequence --num_prompts 4',
    '--learning_rate 0.02 --beta 2 --max_grad_norm 1e6 --lora_rank 4 --fixed_mask',
    '--learning_rate 0.02 --beta 2 --max_grad_norm 1e6 --estimator stepmerge --num_views 2 --kl k2',
    '--learning_rate 0.02 --beta 2 --max_grad_norm 1e6 --estimator coupled --loss espo',
    '--learning_rate 0.02 --max_grad_norm 1e6 --loss wd1 --divide_by_std'])
def test_updates_are_those_of_algorithm_1(monkeypatch, tmp_path, flags):
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, *flags.split())
    gradients, losses = algorithm_1(run.args, run.start, run.groups)
    assert len(run.gradients) == len(gradients) == 6
    for ours, expected in zip(run.gradients, gradients):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    for step, line in enumerate(run.log):
        own = losses[3 * step:3 * step + 3]
        assert line['loss'] == pytest.approx(sum(own) / 3, rel=1e-3, abs=1e-4)
        assert line['first_ratio'] == pytest.approx(1, abs=1e-5)
        assert 0 < line['rollout_seconds'] < line['seconds']
    if run.args.beta and run.args.loss == 'grpo':
        assert run.log[1]['kl'] > 1e-3
    for group in run.groups:                     # no pass is made whose log-probs nobody needs
        assert (group.old_logps[0] is None) == (run.args.loss == 'wd1')
        assert (group.ref_logps[0] is None) == (run.args.loss == 'wd1' or not run.args.beta)
    views = dict(one_step=1, coupled=2, stepmerge=2)[run.args.estimator]
    assert all(len(group.views[0]) == views for group in run.groups)


@pytest.mark.parametrize('fixed', [False, True])
def test_every_group_has_prompt_masks_of_its_own_for_every_update(monkeypatch, tmp_path, fixed):
    put_reward(monkeypatch, varied)
    flags = ['--fixed_mask'] if fixed else []
    run = Trained(monkeypatch, tmp_path, '--p_mask_prompt', '0.4', '--estimator', 'coupled', *flags)
    first = [group.prompt_masks[0] for group in run.groups]
    assert len(torch.stack(first).unique(dim=0)) == 4, '2 prompts of 2 steps'
    for group in run.groups:
        assert len(group.prompt_masks) == 3
        assert len(torch.stack(group.prompt_masks).unique(dim=0)) == (1 if fixed else 3)
        masked = [views[0].masked for views in group.views]      # coupled: the masked half
        assert len(torch.stack(masked).unique(dim=0)) == (1 if fixed else 3)
    share = torch.stack(first).float().mean().item()
    assert abs(share - 0.4) < 4 * (0.24 / 96) ** 0.5


def test_the_prefill_is_never_masked(monkeypatch, tmp_path):
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, '--p_mask_prompt', '0.9', '--prefill', 'abc')
    for group in run.groups:
        masks = torch.cat(group.prompt_masks)
        assert masks[:, :3].float().mean() > 0.6 and not masks[:, 3:].any()
        assert all(text.startswith('abc') for text in group.texts)


def test_flags_reach_the_sampler_and_every_problem_is_drawn_once(monkeypatch, tmp_path):
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, '--num_prompts', '3', '--rollout_batch', '9',
                  '--temperature', '0.7', '--remasking', 'random', '--cfg_scale', '0.5', '--cache',
                  '--threshold', '0.3')
    assert run.problems.drawn == [0, 1, 2, 3, 4, 5]
    assert [group.k for group in run.groups] == [0, 1, 2] * 2
    assert [n for n, _ in run.calls] == [2, 1, 2, 1], 'at most 9 completions per call, 4 per group'
    assert run.calls[0][1] == dict(gen_length=8, block_length=4, steps=4, temperature=0.7,
                                   remasking='random', cfg_scale=0.5, cache=True, threshold=0.3)
    for step, line in enumerate(run.log):
        own = torch.cat([group.rewards for group in run.groups[3 * step:3 * step + 3]])
        assert line['reward'] == pytest.approx(own.mean().item())


def share_of_m(text, example):
    return text.count('m') / 8


@pytest.mark.parametrize('flags', ['--learning_rate 3e-3 --grpo_steps 15',
                                   '--learning_rate 2e-2 --grpo_steps 35 --lora_rank 4'])
def test_the_reward_rises(monkeypatch, tmp_path, flags):
    put_reward(monkeypatch, share_of_m)
    run = Trained(monkeypatch, tmp_path, *flags.split(), '--num_generations', '8',
                  '--rollout_batch', '16', record=False, model=tiny())
    earned = [line['reward'] for line in run.log]
    assert sum(earned[:3]) / 3 < 0.1 and sum(earned[-3:]) / 3 > 0.5, earned
    assert all(line['bad_updates'] == 0 for line in run.log)


def test_a_reward_that_is_always_the_same_teaches_nothing(monkeypatch, tmp_path):
    put_reward(monkeypatch, lambda text, example: 1.0)
    run = Trained(monkeypatch, tmp_path, '--beta', '0', record=False)
    assert max(run.moved()) == 0


def test_adamw_moves_by_the_learning_rate_which_a_resumed_run_may_change(monkeypatch, tmp_path):
    put_reward(monkeypatch, varied)
    one_update = ['--grpo_steps', '1', '--num_iterations', '1']
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    run = Trained(monkeypatch, tmp_path / 'a', *one_update, '--learning_rate', '3e-4', record=False)
    assert max(run.moved()) == pytest.approx(3e-4, rel=0.01), "Adam's first step is the sign"
    first = Trained(monkeypatch, tmp_path / 'b', *one_update, '--learning_rate', '0.01')
    again = Trained(monkeypatch, tmp_path / 'b', '--learning_rate', '0.02', model=first.model)
    assert (first.rates, again.rates) == ([0.01], [0.02] * 3)
    assert again.problems.drawn == [2, 3], 'it goes on at the second step'


def test_an_update_that_is_not_finite_is_skipped_and_training_goes_on(monkeypatch, tmp_path):
    rewarded = []

    def reward(text, example):
        rewarded.append(text)
        return math.nan if len(rewarded) <= 8 else varied(text, example)     # the first step
    put_reward(monkeypatch, reward)
    run = Trained(monkeypatch, tmp_path, record=False)
    assert [line['bad_updates'] for line in run.log] == [3, 0]
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert min(run.moved()) > 0


def test_the_defaults_are_d1s():
    arguments = case()
    expected = grpo_loss(*arguments, epsilon=0.5, beta=0.04, norm='token')
    found = grpo_loss(*arguments)
    assert found[0].item() == expected[0].item() and found[1] == expected[1]
    for other in (dict(epsilon=0.3), dict(beta=0.08), dict(norm='sequence')):
        assert grpo_loss(*arguments, **other)[0].item() != expected[0].item(), other


@pytest.mark.parametrize('advantage, high, low', [(0.5, 1, 0), (-0.5, 0, 1), (0.0, 0, 0)])
def test_only_a_cut_gradient_counts_as_clipped(advantage, high, low):
    for ratio, name, expected in ((1.6, 'clip_high', high), (0.4, 'clip_low', low)):
        logps = torch.tensor([[math.log(ratio)]])
        _, stats = grpo_loss(logps, torch.zeros(1, 1), None, torch.tensor([advantage]),
                             torch.ones(1, 1), beta=0)
        assert stats[name] == expected


def test_weight_decay_is_that_of_the_flag(monkeypatch, tmp_path):
    put_reward(monkeypatch, lambda text, example: 1.0)           # no gradient: decay alone
    run = Trained(monkeypatch, tmp_path, '--beta', '0', '--weight_decay', '0.5',
                  '--learning_rate', '0.1', record=False)
    for p, start in zip(run.model.parameters(), run.start.parameters()):
        torch.testing.assert_close(p, start * 0.95 ** 6, atol=1e-6, rtol=1e-5)


def test_the_seed_reaches_rollouts_and_masks(monkeypatch, tmp_path):
    put_reward(monkeypatch, varied)
    first, second = tmp_path / 'a', tmp_path / 'b'
    first.mkdir()
    second.mkdir()
    one = Trained(monkeypatch, first)
    other = Trained(monkeypatch, second, '--seed', '1')
    for a, b in zip(one.groups, other.groups):                   # of the same prompts
        assert torch.equal(a.prompt_ids, b.prompt_ids)
        assert not torch.equal(a.completion_ids, b.completion_ids)
        assert not torch.equal(a.prompt_masks[0], b.prompt_masks[0])


def test_a_call_of_the_sampler_takes_at_least_one_group(monkeypatch, tmp_path):
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, '--rollout_batch', '1')
    assert [n for n, _ in run.calls] == [1, 1, 1, 1]
