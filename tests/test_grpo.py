"""What grpo.py and train.train_grpo claim: d1's advantages, masks, loss and updates, and learning.

algorithm_1 is the specification: Algorithm 1 of the paper a second time, as plainly as possible.
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
from grpo import (espo_loss, group_advantages, grpo_loss, old_and_ref_logps, policy_loss,
                  rejection_loss, rollout, stable_loss, up_to_end, wd1_loss)
from loglik import (completion_logps, draw_views, drawn_tokens, exact_logps,
                    random_prompt_mask)
from model import LLaDA, add_lora
from sample import generate, torch_stream
from sft import masked_loss
from tiny import EOS, GOLDEN, MASK, bias, tiny, tokens


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
    mask = up_to_end(completion_ids, model.config.end_ids)
    assert torch.equal(mask, golden['completion_mask'].bool())
    loss, stats = grpo_loss(logps, golden['old_logps'][0], golden['ref_logps'][0], advantages,
                            mask, 0.5, beta, norm)
    loss.backward()
    assert loss.item() == pytest.approx(expected['loss'], rel=1e-5, abs=2e-6)
    grad_norm = clip_grad_norm_(model.parameters(), math.inf).item()
    assert grad_norm == pytest.approx(expected['grad_norm'], rel=1e-4)
    assert ('kl' in stats) == (beta > 0), 'no KL is shown where none is computed'
    if norm == 'token' and beta:
        assert stats['kl'] == pytest.approx(expected['kl'], rel=1e-4)


# ---- advantages and the completion mask ----

def test_group_advantages_by_hand():
    given = torch.tensor([3.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert group_advantages(given, 3).tolist() == [2.0, -1.0, -1.0, 0.0, 0.0, 0.0]
    assert group_advantages(given, 2).tolist() == [1.5, -1.5, -0.5, 0.5, 0.0, 0.0]
    assert given.tolist() == [3.0, 0.0, 0.0, 1.0, 1.0, 1.0], 'a reward never becomes an advantage'
    for reward in (0.1, 1 / 3, 2 / 3, 3.487):    # of which a mean of eight differs in float32
        for divide_by_std in (False, True):
            assert not group_advantages(torch.full((8,), reward), 8, divide_by_std).any()
    found = group_advantages(torch.tensor([0.0, 2.0, 0.0, 2e-4]), 2, divide_by_std=True)
    torch.testing.assert_close(found[:2], torch.tensor([-1, 1]) / 2 ** 0.5, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[2:], torch.tensor([-1, 1]) / (2 ** 0.5 + 1))    # std + 1e-4


def test_a_completion_goes_up_to_its_first_end():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0], [5, 0, 7, 0], [5, 0, 9, 9], [9, 0, 0, 0]])
    mask = up_to_end(ids, (0, 9))
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0],
                                   [1, 0, 0, 0]]


# ---- the loss ----

def a_group():
    """Log-probs that ask for a gradient, old and reference ones, advantages, a ragged mask."""
    g = torch.Generator().manual_seed(0)
    logps, old_logps, ref_logps = (-3 * torch.rand(3, 5, generator=g) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    return logps.requires_grad_(), old_logps, ref_logps, torch.tensor([1.0, -2.0, 0.5]), mask


def test_loss_by_hand_on_ragged_masks():
    logps, old_logps, ref_logps, advantages, mask = a_group()
    rows, kls = [], []
    for i, length in enumerate((5, 2, 1)):
        A, row = advantages[i].item(), []
        for k in range(length):
            new, old, ref = logps[i, k].item(), old_logps[i, k].item(), ref_logps[i, k].item()
            ratio = math.exp(new - old)
            objective = min(ratio * A, max(0.7, min(1.3, ratio)) * A)
            kls.append(math.exp(ref - new) - (ref - new) - 1)                # k3
            row.append(0.1 * kls[-1] - objective)
        rows.append(row)
    arguments = logps, old_logps, ref_logps, advantages, mask, 0.3, 0.1
    token, stats = grpo_loss(*arguments, 'token')
    sequence, _ = grpo_loss(*arguments, 'sequence')
    assert token.item() == pytest.approx(sum(map(sum, rows)) / 8, rel=1e-5)
    assert sequence.item() == pytest.approx(sum(sum(row) / len(row) for row in rows) / 3, rel=1e-5)
    assert stats['kl'] == pytest.approx(sum(kls) / 8, rel=1e-5)


# advantage, ratio, is the gradient cut? (epsilon 0.5)
CLIPPING = [(1.0, 1.6, True), (1.0, 1.4, False), (1.0, 0.4, False), (1.0, 1.0, False),
            (-1.0, 0.4, True), (-1.0, 0.6, False), (-1.0, 1.6, False), (-1.0, 1.0, False),
            (0.0, 1.6, False), (0.0, 0.4, False)]


@pytest.mark.parametrize('advantage, ratio, cut', CLIPPING)
def test_loss_clips_both_signs_and_counts_what_it_cuts(advantage, ratio, cut):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1).bool()
    loss, stats = grpo_loss(logps, zero, None, torch.tensor([advantage]), one, 0.5, 0.0)
    loss.backward()
    bound = 1.5 if advantage > 0 else 0.5
    assert loss.item() == pytest.approx(-advantage * (bound if cut else ratio), rel=1e-6)
    gradient = 0.0 if cut else -advantage * ratio
    assert logps.grad.item() == pytest.approx(gradient, rel=1e-6, abs=1e-12)
    assert stats == dict(ratio=pytest.approx(ratio), clip_high=cut and advantage > 0,
                         clip_low=cut and advantage < 0)


@pytest.mark.parametrize('norm', ['token', 'sequence'])
def test_nothing_after_the_end_counts_not_even_nan(norm):
    found = []
    for filler in (-1.0, math.nan):
        logps, old_logps, ref_logps, advantages, mask = a_group()
        loss, stats = grpo_loss(logps, old_logps.where(mask, filler), ref_logps.where(mask, filler),
                                advantages, mask, norm=norm)
        loss.backward()
        found.append((loss.item(), stats, logps.grad.tolist()))
        assert (logps.grad[~mask] == 0).all() and (logps.grad[mask] != 0).any()
    assert found[0] == found[1]


@pytest.mark.parametrize('old, advantage', [(-200.0, 1.0), (-200.0, 0.0), (200.0, -1.0)])
def test_a_ratio_beyond_float32_leaves_the_gradient_finite(old, advantage):
    for loss_function in (grpo_loss, stable_loss):
        logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        old_logps, ref_logps = torch.tensor([[old, -2.0]]), torch.tensor([[-old, -2.0]])
        everything = torch.ones(1, 2).bool()
        loss, _ = loss_function(logps, old_logps, ref_logps, torch.tensor([advantage]), everything,
                                0.5, 0.04)
        loss.backward()
        assert loss.isfinite() and logps.grad.isfinite().all()


def test_the_defaults_are_d1s():
    assert grpo_loss.__defaults__ == (0.5, 0.04, 'token')        # epsilon, beta, norm


# ---- a rollout, and what an update needs of the policies that do not change ----

class Letters:
    """A tokenizer of one letter per token."""
    def __call__(self, text, add_special_tokens=False):
        return dict(input_ids=[ord(letter) - ord('a') for letter in text])

    def decode(self, ids, skip_special_tokens=False):
        kept = [int(i) for i in ids if not (skip_special_tokens and i in (EOS, MASK))]
        return ''.join(chr(ord('a') + i) for i in kept)


def put_reward(monkeypatch, reward, task='gsm8k'):
    """Lets reward(completion, example) be the reward of a task."""
    def grade(completion, example):
        return reward(completion, example), False
    monkeypatch.setitem(rewards.TASKS, task, rewards.TASKS[task]._replace(grade=grade))


def varied(text, example):
    return 1.0 + len(set(text)) + text.count('m')


def groups_of(model, problems, seed=0, step=0, G=4, **knobs):
    sampling = dict(gen_length=8, block_length=4, steps=4, temperature=1.0)
    return rollout(model, Letters(), problems, G, sampling, seed, step, **knobs)


PROBLEMS = [(0, 'gsm8k', [5, 6, 7], dict(bonus=1)), (3, 'math', [8] * 6, dict(bonus=2)),
            (4, 'gsm8k', [9], dict(bonus=3))]


def test_groups_are_the_same_in_one_call_and_one_by_one(monkeypatch):
    model = bias(tiny(), {EOS: 1.0})

    def with_bonus(text, example):
        return varied(text, example) + example['bonus']

    def without_bonus(text, example):
        return varied(text, example) - example['bonus']
    put_reward(monkeypatch, with_bonus)
    put_reward(monkeypatch, without_bonus, 'math')
    groups = groups_of(model, PROBLEMS)
    for problem, group in zip(PROBLEMS, groups, strict=True):
        [alone] = groups_of(model, [problem])
        number, task, prompt, example = problem
        assert (group.prompt_number, group.task, group.example) == (number, task, example)
        assert group.prompt_ids.tolist() == [prompt] * 4
        mask = up_to_end(group.completion_ids, (EOS,))
        assert torch.equal(group.completion_mask, mask)
        assert group.texts == [Letters().decode(ids[keep], True)
                               for ids, keep in zip(group.completion_ids, mask)]
        expected = [rewards.TASKS[task].grade(text, example)[0] for text in group.texts]
        assert group.rewards.tolist() == expected
        assert torch.equal(group.advantages, group_advantages(group.rewards, 4))
        for ours, other in zip(group, alone):
            assert torch.equal(ours, other) if isinstance(ours, torch.Tensor) else ours == other
        assert group.commit_steps[:, :4].sort(dim=1).values.tolist() == [[0, 0, 1, 1]] * 4
    ended = torch.cat([~group.completion_mask[:, -1] for group in groups])
    assert ended.any() and not ended.all()


def test_every_row_has_a_stream_of_seed_step_prompt_and_row(monkeypatch):
    put_reward(monkeypatch, varied)
    model = tiny()

    def completions(number=0, **key):
        return groups_of(model, [(number, 'gsm8k', [5, 6, 7], {})], **key)[0].completion_ids
    first = completions()
    assert torch.equal(completions(), first) and len(first.unique(dim=0)) == 4
    assert torch.equal(completions(G=6)[:4], first)
    for other in (completions(number=1), completions(seed=1), completions(step=1)):
        assert not (other == first).all(1).any()


def policies(kind):
    """A policy that has moved a little from its reference, the reference, and what it was."""
    model = bias(tiny(), {EOS: 1.0})
    if kind == 'after SFT':                      # with an adapter of SFT, which the reference has
        add_lora(model, 4, 8, ('v_proj', 'up_proj'), seed=1)
        for p in model.parameters():
            p.data += 0.05 * p.requires_grad
    start = copy.deepcopy(model)
    reference = start.requires_grad_(False)
    if kind != 'full':
        reference = add_lora(model, 4, 8, ('v_proj', 'up_proj'))
    for p in model.parameters():
        p.data += 0.05 * p.requires_grad
    return model, reference, start


@pytest.mark.parametrize('kind', ['full', 'LoRA', 'after SFT'])
def test_old_and_reference_logps_see_what_the_policy_sees(monkeypatch, kind):
    put_reward(monkeypatch, varied)
    model, reference, start = policies(kind)
    [group] = groups_of(model, PROBLEMS[:1])
    g = torch.Generator().manual_seed(0)
    prompt_mask = random_prompt_mask(group.prompt_ids, 0.5, g)
    views = draw_views('coupled', 2, group.completion_ids, group.commit_steps, g)
    arguments = group, prompt_mask, views
    found = old_and_ref_logps(model, reference, *arguments, 'grpo', 0.04)
    for policy, logps in zip((model, start), found, strict=True):
        assert not logps.requires_grad
        expected = completion_logps(policy, group.prompt_ids, group.completion_ids, prompt_mask,
                                    group.completion_mask, views)
        torch.testing.assert_close(logps, expected.detach())
    assert (found[0] - found[1]).abs().max() > 0.01
    # no pass is made whose log-probs nobody needs
    assert old_and_ref_logps(model, None, *arguments, 'grpo', 0.0)[1] is None
    assert old_and_ref_logps(None, None, *arguments, 'wd1', 0.04) == (None, None)


# ---- other losses ----

def test_espo_has_one_ratio_per_sequence_of_its_mean_log_probs():
    logps, old_logps, ref_logps, A, mask = a_group()
    expected, kl = 0, 0
    for row in range(3):
        keep = mask[row]
        ratio = (logps - old_logps)[row, keep].mean().exp()
        kl = kl + (logps - ref_logps)[row, keep].mean() ** 2 / 2 / 3
        expected -= min(ratio * A[row], ratio.clamp(0.8, 1.2) * A[row]) / 3
    loss, stats = espo_loss(logps, old_logps, ref_logps, A, mask, 0.2, 0.1)
    torch.testing.assert_close(loss, expected + 0.1 * kl)
    assert stats['kl'] == pytest.approx(kl.item())
    assert stats['clip_high'] + stats['clip_low'] > 0
    loss, stats = espo_loss(logps, old_logps, None, A, mask, 0.2, 0.0)
    torch.testing.assert_close(loss, expected)
    assert 'kl' not in stats


def test_stable_drl_divides_by_the_sum_of_clipped_ratios():
    logps, old_logps, ref_logps, A, mask = a_group()
    ratio = (logps - old_logps).exp().clamp(0.8, 1.2)[mask]
    kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1
    rows = A[:, None].expand(3, 5)[mask]
    expected = 0.1 * kl[mask].mean() - (ratio * rows).sum() / ratio.sum()
    loss, stats = stable_loss(logps, old_logps, ref_logps, A, mask, 0.2, 0.1)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logps)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert stats == grpo_loss(logps, old_logps, ref_logps, A, mask, 0.2, 0.1)[1]
    equal, _ = stable_loss(logps, old_logps, ref_logps, 0 * A, mask, 0.2, 0.1)
    torch.testing.assert_close(equal, 0.1 * kl[mask].mean())
    assert stats['clip_high'] > 0


def test_wd1_weighs_log_probs_by_softmaxes_of_the_advantages():
    logps, _, _, A, mask = a_group()
    means = torch.stack([logps[row, mask[row]].mean() for row in range(3)])
    e, f = A.exp(), (-A).exp()
    expected = ((f / f.sum() - e / e.sum()) * means).sum()
    loss, stats = wd1_loss(logps, A, mask)
    torch.testing.assert_close(loss, expected)
    assert stats == {}, 'it has no ratio and no KL'


def test_rejection_sampling_is_sfts_loss_on_the_right_completions():
    logps, _, _, _, mask = a_group()
    right = torch.tensor([1.0, 0.0, 1.0])
    loss, stats = rejection_loss(logps, right, mask)
    kept = torch.cat([logps[row, mask[row]] for row in (0, 2)])
    torch.testing.assert_close(loss, -kept.mean())
    assert stats == {} and rejection_loss(logps, 0 * right, mask)[0] == 0
    # under one view of the ELBO it is masked_loss, whose weights 1/t the view has already
    ids, g = torch.randint(0, 9, logps.shape), torch.Generator().manual_seed(0)
    [view] = draw_views('elbo', 1, ids, None, g)
    weighted = view.weight * logps * view.scored
    everything = torch.ones_like(mask)
    found, _ = rejection_loss(weighted, torch.ones(3), everything)
    torch.testing.assert_close(found, masked_loss(logps, view.masked, 1 / view.weight, ids.numel()))


def test_each_loss_is_reached_by_its_name_and_its_knobs_with_it():
    arguments = a_group()
    logps, _, _, A, mask = arguments
    expected = dict(grpo=grpo_loss(*arguments, 0.3, 0.2, 'sequence'),
                    espo=espo_loss(*arguments, 0.3, 0.2),
                    stable=stable_loss(*arguments, 0.3, 0.2), wd1=wd1_loss(logps, A, mask),
                    rejection=rejection_loss(logps, A, mask))
    for name, (loss, stats) in expected.items():
        found = policy_loss(name, *arguments, 0.3, 0.2, 'sequence')
        assert found[0].item() == loss.item() and found[1] == stats
    assert len({loss.item() for loss, _ in expected.values()}) == 5


# ---- train_grpo ----

FLAGS = ('--grpo_steps 2 --num_prompts 2 --num_generations 4 --num_iterations 3 --gen_length 8 '
         '--block_length 4 --steps 4 --temperature 1 --p_mask_prompt 0.5 --beta 0.04 '
         '--sample_batch 4').split()
SPIED = ('rollout', 'random_prompt_mask', 'draw_views', 'old_and_ref_logps', 'completion_logps',
         'policy_loss')


class Problems:
    """Prompts of six tokens, and which have been drawn; all answers to number 2 are worth 1."""
    def __init__(self):
        self.drawn = []

    def draw(self, index):
        self.drawn.append(index)
        example = dict(question='?', answer='!', flat=index == 2)
        return 'gsm8k', tokens(6, seed=index).tolist(), example


def varied_but_for_one(text, example):
    return 1.0 if example['flat'] else varied(text, example)


class Recorder(torch.optim.SGD):
    """SGD that keeps the gradients of every update."""
    def step(self):
        [group] = self.param_groups
        self.gradients.append([p.grad.clone() for p in group['params']])
        super().step()


class Trained:
    """A model after train.train_grpo, and what happened on the way."""
    def __init__(self, monkeypatch, folder, *flags, model=None, plain=False):
        """plain: gradient descent instead of AdamW."""
        self.args = train.parse([*FLAGS, *flags])
        self.args.folder = str(folder)
        folder.mkdir(exist_ok=True)
        self.model = model or tiny(end_ids=(EOS, 7, 8, 9))       # some completions end early
        if self.args.lora_rank:
            add_lora(self.model, self.args.lora_rank, 8, ('v_proj', 'up_proj', 'ff_out'))
        self.start, self.problems = copy.deepcopy(self.model), Problems()
        self.calls = {name: [] for name in SPIED}                # (arguments, result) of each call
        self.gradients = []

        def spied(name):
            function, calls = getattr(train, name), self.calls[name]

            def call(*arguments):
                result = function(*arguments)
                calls.append((arguments, result))
                return result
            return call

        def sgd(model, learning_rate):
            optimizer = Recorder([p for p in model.parameters() if p.requires_grad], learning_rate)
            optimizer.gradients = self.gradients
            return optimizer
        with monkeypatch.context() as patch:
            for name in SPIED:
                patch.setattr(train, name, spied(name))
            if plain:
                patch.setattr(train, 'adamw', sgd)
            train.train_grpo(self.args, self.model, Letters(), self.problems, None)
        self.log = train.read_log(self.args, 'log.jsonl')
        self.groups = [group for _, groups in self.calls['rollout'] for group in groups]
        self.prompt_masks = [mask for _, mask in self.calls['random_prompt_mask']]


def token_logps(model, prompt_ids, completion_ids):
    """log p(o_k | q') (G, L), all completion tokens masked (d1, section 3.1)."""
    masks = torch.full_like(completion_ids, MASK)
    logits = model(torch.cat((prompt_ids, masks), dim=1))[:, prompt_ids.size(1):]
    return logits.log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]


def algorithm_1(args, policy, problems, reward):
    """diffu-GRPO in plain lines, numbered as in the paper.

    Returns (loss, norm of its gradient, the gradients clipped at a norm of 0.2) of each update;
    policy moves by plain gradient descent.
    """
    G, L, end_ids = args.num_generations, args.gen_length, policy.config.end_ids
    trained = [p for p in policy.parameters() if p.requires_grad]
    updates = []
    reference = copy.deepcopy(policy)                                                      # 1
    for step in range(args.grpo_steps):                                                    # 2
        old = copy.deepcopy(policy)                                                        # 3
        groups = []
        for number in range(args.num_prompts):
            _, prompt, example = problems.draw(step * args.num_prompts + number)           # 4
            prompt_ids = torch.tensor([prompt] * G)
            streams = [torch_stream('cpu', args.seed, 'rollout', step, number, row)
                       for row in range(G)]
            completion_ids, _ = generate(old, prompt_ids, L, args.block_length, args.steps,
                                         args.temperature, generators=streams)             # 5
            lengths, earned = [], []
            for completion in completion_ids.tolist():
                ends = [k for k in range(L) if completion[k] in end_ids]
                length = ends[0] + 1 if ends else L
                text = Letters().decode(completion[:length], skip_special_tokens=True)
                lengths.append(length)
                earned.append(reward(text, example))
            earned = torch.tensor(earned)
            advantages = earned - earned.mean()                                            # 6
            if args.divide_by_std:
                advantages = advantages / (earned.std() + 1e-4)
            groups.append((prompt_ids, completion_ids, lengths, advantages))

        for n in range(args.num_iterations):                                               # 7
            loss = 0
            for number, (prompt_ids, completion_ids, lengths, advantages) in enumerate(groups):
                key = 0 if args.fixed_mask else n
                stream = torch_stream('cpu', args.seed, 'mask', step, key, number)
                noise = torch.rand(prompt_ids.shape, generator=stream)
                masked = prompt_ids.masked_fill(noise < args.p_mask_prompt, MASK)          # 8
                new_logps = token_logps(policy, masked, completion_ids)                    # 9
                with torch.no_grad():
                    old_logps = token_logps(old, masked, completion_ids)
                    ref_logps = token_logps(reference, masked, completion_ids)
                rows = []
                for i in range(G):
                    terms = []
                    for k in range(lengths[i]):
                        ratio = (new_logps[i, k] - old_logps[i, k]).exp()
                        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
                        gap = ref_logps[i, k] - new_logps[i, k]
                        kl = gap.exp() - gap - 1
                        term = torch.minimum(ratio * advantages[i], clipped * advantages[i])
                        terms.append(args.beta * kl - term)                                # eq. 4
                    rows.append(torch.stack(terms))
                if args.norm == 'token':
                    group_loss = torch.cat(rows).mean()
                else:
                    group_loss = torch.stack([row.mean() for row in rows]).mean()
                loss = loss + group_loss / args.num_prompts
            gradients = torch.autograd.grad(loss, trained)
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            gradients = [gradient * min(1, 0.2 / norm) for gradient in gradients]
            for p, gradient in zip(trained, gradients):                                    # 10
                p.data -= args.learning_rate * gradient
            updates.append((loss.item(), norm.item(), gradients))
    return updates


@pytest.mark.parametrize('flags', [
    '--learning_rate 0.2 --beta 2 --seed 3',
    '--learning_rate 0.2 --beta 0 --epsilon 0.05',
    '--learning_rate 0.5 --beta 2 --norm sequence --num_prompts 4',
    '--learning_rate 0.5 --beta 2 --lora_rank 4 --fixed_mask',
    '--learning_rate 0.2 --beta 0 --divide_by_std'])
def test_updates_are_those_of_algorithm_1(monkeypatch, tmp_path, flags):
    """Which knows all groups; one of equal rewards has no passes if there is no KL term."""
    put_reward(monkeypatch, varied_but_for_one)
    run = Trained(monkeypatch, tmp_path, *flags.split(), plain=True)
    updates = algorithm_1(run.args, run.start, Problems(), varied_but_for_one)
    assert len(run.gradients) == len(updates) == 6
    passes = sum(bool(run.args.beta or group.advantages.any()) for group in run.groups)
    assert len(run.calls['completion_logps']) == 3 * passes
    masks = 1 if run.args.fixed_mask else 3
    assert len(run.calls['old_and_ref_logps']) == masks * passes
    assert (passes < len(run.groups)) == (run.args.beta == 0)
    for ours, (_, _, expected) in zip(run.gradients, updates):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-3)
    for step, line in enumerate(run.log):
        own = updates[3 * step:3 * step + 3]
        groups = run.groups[step * run.args.num_prompts:][:run.args.num_prompts]
        flat = sum(not group.advantages.any() for group in groups)
        trained = run.args.num_prompts if run.args.beta else run.args.num_prompts - flat
        # the logged loss is the mean over the groups that had passes
        expected = sum(loss for loss, _, _ in own) / 3 * run.args.num_prompts / trained
        assert line['loss'] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert line['grad_norm'] == pytest.approx(sum(norm for _, norm, _ in own) / 3, rel=1e-3)
        assert line['first_ratio'] == pytest.approx(1, abs=1e-5)
        assert line['flat_groups'] == flat / run.args.num_prompts
        assert ('kl' in line) == (run.args.beta > 0)
        if run.args.beta == 0:
            assert line['clip_high'] + line['clip_low'] > 0
    if run.args.beta:
        assert run.log[1]['kl'] > 1e-3


def test_adamw_is_d1s():
    model = add_lora(tiny(), 4, 8)
    [group] = train.adamw(model, 3e-6).param_groups
    assert (group['lr'], group['betas'], group['weight_decay']) == (3e-6, (0.9, 0.99), 0.1)
    assert group['params'] == [p for p in model.parameters() if p.requires_grad]


def test_a_reward_that_is_always_the_same_leaves_weight_decay(monkeypatch, tmp_path):
    def same(text, example):
        return 1.0
    put_reward(monkeypatch, same)
    run = Trained(monkeypatch, tmp_path, '--beta', '0', '--learning_rate', '0.5')
    for p, start in zip(run.model.parameters(), run.start.parameters()):
        torch.testing.assert_close(p, start * 0.95 ** 6, atol=1e-6, rtol=1e-5)       # of 0.1
    assert [line['flat_groups'] for line in run.log] == [1, 1]
    assert not run.calls['completion_logps'] and 'loss' not in run.log[0]


@pytest.mark.parametrize('flags, num_views', [('--estimator stepmerge --num_views 2', 2),
                                              ('--estimator coupled --loss espo', 2),
                                              ('--estimator elbo --num_views 3 --loss stable', 3),
                                              ('--estimator ar --norm sequence', 8),
                                              ('--estimator exact --p_mask_prompt 0', 3),
                                              ('--loss wd1 --epsilon 0.3', 1)])
def test_estimator_and_loss_of_the_flags_make_the_update(monkeypatch, tmp_path, flags, num_views):
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, *flags.split())
    args, calls = run.args, run.calls
    assert len(calls['policy_loss']) == 12, '2 steps of 3 updates of 2 groups'
    for i in range(12):
        (_, _, group, prompt_mask, views, *knobs), (old_logps, ref_logps) = (
            calls['old_and_ref_logps'][i])
        assert knobs == [args.loss, args.beta]
        assert group is run.groups[i // 6 * 2 + i % 2] and prompt_mask is run.prompt_masks[i]
        (estimator, number, ids, commit_steps, _, *sampler), drawn = calls['draw_views'][i]
        assert views is drawn and len(views) == num_views
        assert (estimator, number) == (args.estimator, args.num_views)
        assert sampler == [args.block_length, args.temperature]
        assert ids is group.completion_ids and commit_steps is group.commit_steps
        given, logps = calls['completion_logps'][i]
        assert given == (run.model, group.prompt_ids, group.completion_ids, prompt_mask,
                         group.completion_mask, views)
        given, _ = calls['policy_loss'][i]
        assert given == (args.loss, logps, old_logps, ref_logps, group.advantages,
                         group.completion_mask, args.epsilon, args.beta, args.norm)
        if i % 6 < 2 and old_logps is not None:
            torch.testing.assert_close(logps, old_logps)         # nothing has been updated yet
    for line in run.log:
        assert line.get('first_ratio', 1) == pytest.approx(1, abs=1e-5)
        assert ('first_ratio' in line) == (args.loss != 'wd1'), 'which has no ratio'


def test_the_exact_gradient_is_that_of_the_samplers_own_likelihood(monkeypatch, tmp_path):
    """Every token that was drawn counts, those after an end with it: sum A log p, no clip at 1."""
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, *'--estimator exact --p_mask_prompt 0 --beta 0 '
                  '--num_iterations 1 --grpo_steps 1 --num_prompts 1 --norm token'.split(),
                  plain=True)
    [group] = run.groups
    everything = torch.ones_like(group.completion_mask)
    logps = exact_logps(run.start, group.prompt_ids, group.completion_ids, everything,
                        group.commit_steps, 4, 1.0)
    counted = drawn_tokens(group.completion_mask, 4)
    assert (counted != group.completion_mask).any(), 'or the test shows nothing'
    objective = (group.advantages * (logps * counted).sum(1)).sum() / group.completion_mask.sum()
    expected = torch.autograd.grad(-objective, run.start.parameters())
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    for ours, gradient in zip(run.gradients[0], expected, strict=True):
        torch.testing.assert_close(ours, gradient * min(1, 0.2 / norm), atol=1e-5, rtol=1e-3)


def test_rejection_sampling_learns_what_is_right_and_nothing_else(monkeypatch, tmp_path):
    def grade(text, example):
        return 0.5, text.count('m') > 0          # equal rewards: no RL could learn from them
    graded = rewards.TASKS['gsm8k']._replace(grade=grade)
    monkeypatch.setitem(rewards.TASKS, 'gsm8k', graded)
    run = Trained(monkeypatch, tmp_path, '--loss', 'rejection', '--beta', '0.04')    # no KL here
    for given, _ in run.calls['policy_loss']:
        assert set(given[4].tolist()) == {0, 1}  # groups without a right one are left out
    for group in run.groups:
        assert group.correct.tolist() == [float('m' in text) for text in group.texts]
    assert run.calls['policy_loss'] and 'ratio' not in run.log[0]
    assert run.log[0]['flat_groups'] == 1


def test_the_prefill_is_rewarded_and_never_masked(monkeypatch, tmp_path):
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, '--p_mask_prompt', '0.9', '--prefill', 'abc')
    masks = torch.cat(run.prompt_masks)
    assert masks[:, :3].float().mean() > 0.6 and not masks[:, 3:].any()
    for group in run.groups:
        assert all(text.startswith('abc') for text in group.texts)
        assert group.rewards.tolist() == [varied(text, None) for text in group.texts]


@pytest.mark.parametrize('sample_batch, sizes', [(9, [2, 1] * 2), (1, [1] * 6)])
def test_flags_reach_the_sampler_and_every_problem_is_drawn_once(monkeypatch, tmp_path,
                                                                 sample_batch, sizes):
    """A call of the sampler takes sample_batch completions at most, and at least a group of 4."""
    put_reward(monkeypatch, varied)
    run = Trained(monkeypatch, tmp_path, '--num_prompts', '3', '--sample_batch', str(sample_batch),
                  '--temperature', '0.7', '--cache', '--threshold', '0.3')
    assert run.problems.drawn == [0, 1, 2, 3, 4, 5]
    assert [group.prompt_number for group in run.groups] == [0, 1, 2] * 2
    assert [len(groups) for _, groups in run.calls['rollout']] == sizes
    sampling = run.calls['rollout'][0][0][4]
    assert sampling == dict(gen_length=8, block_length=4, steps=4, temperature=0.7, cache=True,
                            threshold=0.3)
    for step, line in enumerate(run.log):
        own = run.groups[3 * step:3 * step + 3]
        earned = torch.cat([group.rewards for group in own])
        lengths = torch.cat([group.completion_mask.sum(1) for group in own]).float()
        assert line['reward'] == pytest.approx(earned.mean().item())
        assert line['length'] == pytest.approx(lengths.mean().item())
        assert 0 < line['rollout_seconds'] < line['seconds']


def test_an_update_that_is_not_finite_is_skipped_and_training_goes_on(monkeypatch, tmp_path):
    rewarded = []

    def reward(text, example):
        rewarded.append(text)
        return math.nan if len(rewarded) <= 8 else varied(text, example)     # the first step
    put_reward(monkeypatch, reward)
    run = Trained(monkeypatch, tmp_path)
    assert [line['bad_updates'] for line in run.log] == [3, 0]
    for p, start in zip(run.model.parameters(), run.start.parameters()):
        assert p.isfinite().all() and not torch.equal(p, start)


@pytest.mark.parametrize('flags', ['--learning_rate 3e-3 --grpo_steps 15',
                                   '--learning_rate 2e-2 --grpo_steps 35 --lora_rank 4'])
def test_the_reward_rises(monkeypatch, tmp_path, flags):
    def share_of_m(text, example):
        return text.count('m') / 8
    put_reward(monkeypatch, share_of_m)
    run = Trained(monkeypatch, tmp_path, *flags.split(), '--num_generations', '8',
                  '--sample_batch', '16', '--beta', '0', model=tiny())
    earned = [line['reward'] for line in run.log]
    assert sum(earned[:3]) / 3 < 0.1 and sum(earned[-3:]) / 3 > 0.5, earned
    assert all(line['bad_updates'] == 0 for line in run.log)
