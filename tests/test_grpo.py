"""What grpo.py claims: d1's advantages, masks and loss, and that its updates make rewarded completions likelier."""
import contextlib
import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from grpo import completion_mask, fixed_logps, group_advantages, grpo_loss, rollout
from loglik import completion_logps, random_prompt_mask
from model import LLaDA, add_lora, load, lora_off
from sample import generate
from tiny import EOS, GOLDEN, MASK, V, bias, grad_norm, needs_shared, tiny, tokens


# --- the official numbers ---

@needs_shared
@pytest.mark.parametrize('case, norm, beta', [('token_norm.beta0.04', 'token', 0.04),
                                              ('token_norm.beta0.0', 'token', 0.0),
                                              ('seq_norm.beta0.04', 'sequence', 0.04)])
def test_loss_and_gradient_match_the_official_code(case, norm, beta):
    golden, model = load_file(GOLDEN / 'logps.safetensors'), LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    expected = json.loads((GOLDEN / 'loss.json').read_text())[f'{case}.iter0']
    prompt_ids, completion_ids = golden['input_ids'].split((24, 20), dim=1)
    logps = completion_logps(model, prompt_ids, completion_ids, golden['prompt_masks'][0])
    loss, stats = grpo_loss(logps, golden['old_logps'][0], golden['ref_logps'][0], golden['advantages'],
                            golden['completion_mask'], 0.5, beta, norm)
    loss.backward()
    assert loss.item() == pytest.approx(expected['loss'], rel=1e-5, abs=2e-6)
    assert grad_norm(model) == pytest.approx(expected['grad_norm'], rel=1e-4)
    if norm == 'token' and beta:
        assert stats['kl'] == pytest.approx(expected['kl'], rel=1e-4)


@needs_shared
def test_advantages_match_the_official_code():
    golden = load_file(GOLDEN / 'logps.safetensors')
    torch.testing.assert_close(group_advantages(golden['rewards'], 3), golden['advantages'])


# --- advantages ---

def test_group_advantages_by_hand():
    rewards = torch.tensor([3.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert group_advantages(rewards, 3).tolist() == [2.0, -1.0, -1.0, 0.0, 0.0, 0.0]
    assert group_advantages(rewards, 2).tolist() == [1.5, -1.5, -0.5, 0.5, 0.0, 0.0]
    assert rewards.tolist() == [3.0, 0.0, 0.0, 1.0, 1.0, 1.0], 'a reward never becomes an advantage'


def test_group_advantages_are_not_divided_by_the_spread():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    torch.testing.assert_close(group_advantages(10 * rewards, 4), 10 * group_advantages(rewards, 4))


# --- completion mask ---

@pytest.mark.parametrize('row, scored', [([5, 6, 7, 8], 4), ([0, 6, 7, 8], 1), ([5, 0, 7, 0], 2), ([5, 6, 7, 0], 4),
                                         ([0, 0, 0, 0], 1), ([5, 9, 0, 8], 2), ([9, 0, 0, 0], 1), ([5, 0, 9, 9], 2)])
def test_completion_counts_through_its_first_end(row, scored):
    mask = completion_mask(torch.tensor([[5, 5, 5, 5], row]), (0, 9))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * 4, [True] * scored + [False] * (4 - scored)]


def test_mask_without_end_ids_in_use_keeps_all():
    assert completion_mask(tokens(3, 6), (0, 1)).all()
    assert completion_mask(torch.zeros(2, 0, dtype=torch.long), (0,)).shape == (2, 0)


# --- the loss ---

def case(seed=0, B=3, L=5):
    """Log-probs that ask for a gradient, old and reference ones, advantages, a ragged mask."""
    g = torch.Generator().manual_seed(seed)
    logps, old_logps, ref_logps = (-3 * torch.rand(B, L, generator=g) for _ in range(3))
    mask = torch.arange(L) < torch.tensor([[L], [2], [1]])
    return logps.requires_grad_(), old_logps, ref_logps, torch.tensor([1.0, -2.0, 0.5]), mask


def test_loss_by_hand_on_ragged_masks():
    logps, old_logps, ref_logps, advantages, mask = case()
    rows = []
    for i in range(3):
        rows.append([])
        for k in range(int(mask[i].sum())):
            new, old, ref, A = (x.item() for x in (logps[i, k], old_logps[i, k], ref_logps[i, k], advantages[i]))
            ratio = math.exp(new - old)
            objective = min(ratio * A, max(0.7, min(1.3, ratio)) * A)
            kl = math.exp(ref - new) - (ref - new) - 1
            rows[-1].append(0.1 * kl - objective)
    assert [len(row) for row in rows] == [5, 2, 1]
    arguments = logps, old_logps, ref_logps, advantages, mask, 0.3, 0.1
    token, sequence = (grpo_loss(*arguments, norm)[0].item() for norm in ('token', 'sequence'))
    assert token == pytest.approx(sum(map(sum, rows)) / 8, rel=1e-5)
    assert sequence == pytest.approx(sum(sum(row) / len(row) for row in rows) / 3, rel=1e-5)
    assert token != pytest.approx(sequence, rel=1e-2)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match='tokens'):
        grpo_loss(*case(), norm='tokens')


# advantage, ratio, is the gradient cut? (epsilon 0.5)
CLIPPING = [(1.0, 1.6, True), (1.0, 1.4, False), (1.0, 0.4, False), (1.0, 1.0, False),
            (-1.0, 0.4, True), (-1.0, 0.6, False), (-1.0, 1.6, False), (-1.0, 1.0, False)]


@pytest.mark.parametrize('advantage, ratio, cut', CLIPPING)
def test_loss_clips_both_signs(advantage, ratio, cut):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = grpo_loss(logps, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.ones(1, 1), 0.5, 0.0)
    loss.backward()
    bound = 1.5 if advantage > 0 else 0.5
    assert loss.item() == pytest.approx(-advantage * (bound if cut else ratio), rel=1e-6)
    assert logps.grad.item() == pytest.approx(0.0 if cut else -advantage * ratio, rel=1e-6, abs=1e-12)
    assert stats['ratio'] == pytest.approx(ratio, rel=1e-6)
    assert (stats['clip_high'], stats['clip_low']) == (float(cut and advantage > 0), float(cut and advantage < 0))


def test_kl_is_zero_at_the_reference_and_never_negative():
    logps, old_logps, _, advantages, mask = case()
    assert grpo_loss(logps, old_logps, logps.detach(), advantages, mask)[1]['kl'] == 0.0
    for gap in (-8.0, -1.0, -0.01, 0.01, 1.0, 8.0):
        stats = grpo_loss(logps, old_logps, logps.detach() + gap, advantages, mask)[1]
        assert stats['kl'] == pytest.approx(math.exp(gap) - gap - 1, rel=1e-2) and stats['kl'] > 0


def test_kl_pulls_towards_the_reference():
    logps, _, ref_logps, _, mask = case()
    grpo_loss(logps, logps.detach(), ref_logps, torch.zeros(3), mask)[0].backward()
    towards = (ref_logps - logps.detach()).sign()
    assert torch.equal(-logps.grad.sign()[mask], towards[mask]), 'a step down the gradient is a step to the reference'


def test_beta_scales_the_kl_term_alone():
    arguments = case()
    without, stats = grpo_loss(*arguments, beta=0.0)
    assert stats['kl'] == 0.0
    for beta in (0.04, 1.0):
        loss, stats = grpo_loss(*arguments, beta=beta)
        assert loss.item() == pytest.approx(without.item() + beta * stats['kl'], rel=1e-5)


def test_beta_zero_needs_no_reference():
    logps, old_logps, ref_logps, advantages, mask = case()
    loss = grpo_loss(logps, old_logps, None, advantages, mask, beta=0.0)[0]
    assert loss.item() == grpo_loss(logps, old_logps, ref_logps, advantages, mask, beta=0.0)[0].item()


def test_gradient_raises_good_completions_and_lowers_bad_ones():
    logps, _, _, advantages, mask = case()
    grpo_loss(logps, logps.detach(), None, advantages, mask, beta=0.0)[0].backward()
    expected = -advantages[:, None] * mask / mask.sum()
    torch.testing.assert_close(logps.grad, expected.expand_as(logps))


def test_equal_rewards_give_no_gradient():
    logps, old_logps, _, _, mask = case()
    grpo_loss(logps, old_logps, None, group_advantages(torch.ones(3), 3), mask, beta=0.0)[0].backward()
    assert (logps.grad == 0).all()


@pytest.mark.parametrize('norm', ['token', 'sequence'])
def test_nothing_behind_the_end_counts(norm):
    logps, old_logps, ref_logps, advantages, mask = case()
    loss, stats = grpo_loss(logps, old_logps, ref_logps, advantages, mask, norm=norm)
    loss.backward()
    assert (logps.grad[~mask] == 0).all() and (logps.grad[mask] != 0).any()
    old_logps, ref_logps = (x.where(mask, torch.tensor(-1.5)) for x in (old_logps, ref_logps))
    again = grpo_loss(logps, old_logps, ref_logps, advantages, mask, norm=norm)
    assert again[0].item() == loss.item() and again[1] == stats


@pytest.mark.parametrize('old, ref', [(-200.0, 0.0), (0.0, 200.0)])
def test_infinite_ratio_behind_the_end_does_not_spoil_the_loss(old, ref):
    logps, old_logps, ref_logps, advantages, mask = case()
    expected = grpo_loss(logps, old_logps, ref_logps, advantages, mask)[0].item()
    old_logps[1, 3], ref_logps[1, 3] = old, ref
    loss, _ = grpo_loss(logps, old_logps, ref_logps, advantages, mask)
    loss.backward()
    assert loss.item() == expected and logps.grad.isfinite().all()


@pytest.mark.parametrize('norm', ['token', 'sequence'])
def test_empty_completions_give_a_finite_loss(norm):
    logps, old_logps, ref_logps, advantages, mask = case()
    for rows in ([1], [0, 1, 2]):  # one row without a scored token, then all
        mask[rows] = False
        logps.grad = None
        loss, stats = grpo_loss(logps, old_logps, ref_logps, advantages, mask, norm=norm)
        loss.backward()
        assert loss.isfinite() and logps.grad.isfinite().all() and all(map(math.isfinite, stats.values()))
        assert (logps.grad[rows] == 0).all()
    assert loss.item() == 0.0
    none = torch.zeros(3, 0, requires_grad=True)
    loss, _ = grpo_loss(none, none, none, advantages, torch.zeros(3, 0, dtype=torch.bool), norm=norm)
    loss.backward()
    assert loss.item() == 0.0


# --- the rollout and what stays fixed in its updates ---

class Letters:
    """A tokenizer of one letter a token."""
    def decode(self, ids, skip_special_tokens=False):
        return ''.join(chr(ord('a') + i) for i in ids.tolist() if not (skip_special_tokens and i in (EOS, MASK)))


def sampled(model, reward=lambda texts: [0.0] * len(texts), seed=0, num_generations=4, **sampling):
    sampling = dict(gen_length=8, block_length=4, steps=4, temperature=1.0) | sampling
    g = torch.Generator().manual_seed(seed)
    return rollout(model, Letters(), [5, 6, 7], reward, num_generations, g, **sampling)


def test_rollout_is_one_prompts_group():
    model = bias(tiny(), {EOS: 1.0})
    group = sampled(model.train(), lambda texts: [len(text) for text in texts], num_generations=6)
    assert group.prompt_ids.tolist() == [[5, 6, 7]] * 6 and group.completion_ids.shape == group.mask.shape == (6, 8)
    assert torch.equal(group.mask, completion_mask(group.completion_ids, (EOS,)))
    for ids, mask, text, reward in zip(group.completion_ids, group.mask, group.texts, group.rewards):
        assert text == Letters().decode(ids[mask], skip_special_tokens=True) and reward == len(text)
    ended = (group.completion_ids == EOS).any(1)
    assert ended.any() and not ended.all() and group.rewards.dtype == torch.float32
    assert not model.training, 'no dropout in rollouts'
    assert torch.equal(group.completion_ids, generate(model, group.prompt_ids, 8, 4, 4, 1.0,
                                                      generator=torch.Generator().manual_seed(0)))


def test_rollout_decodes_the_nano_model():
    model, tokenizer = load('nano')
    prompt_ids = tokenizer('Ann has 3 apples.')['input_ids']
    seen = []
    group = rollout(model, tokenizer, prompt_ids, lambda texts: seen.extend(texts) or [1.0] * 3, 3,
                    torch.Generator().manual_seed(0), gen_length=8, block_length=8, steps=8, temperature=1.0)
    assert group.texts == seen and len(seen) == 3 and len(set(seen)) == 3
    assert not any('<|' in text for text in seen), 'the reward sees no special tokens'


def policies(kind, dropout=0.0, targets=('q_proj', 'k_proj', 'v_proj')):
    """A model that is being trained and its reference(), as train.py makes them."""
    model = tiny()
    if kind == 'lora':
        add_lora(model, 4, 8, dropout, targets)
        return model, lambda: lora_off(model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    return model, lambda: contextlib.nullcontext(frozen)


@pytest.mark.parametrize('kind', ['full', 'lora'])
def test_ratio_is_one_before_the_first_update_and_not_behind_it(kind):
    model, reference = policies(kind)
    group = sampled(model)
    prompt_mask = random_prompt_mask(group.prompt_ids, 0.3, torch.Generator().manual_seed(0))
    old_logps, ref_logps = fixed_logps(model, reference, group, prompt_mask, 0.04)
    assert not old_logps.requires_grad and not ref_logps.requires_grad
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0])
    for update in range(2):
        model.train()
        logps = completion_logps(model, group.prompt_ids, group.completion_ids, prompt_mask, group.mask)
        loss, stats = grpo_loss(logps, old_logps, ref_logps, advantages, group.mask)
        if update == 0:
            torch.testing.assert_close(logps, old_logps)
            torch.testing.assert_close(logps, ref_logps)
            assert stats['ratio'] == pytest.approx(1, abs=1e-6) and stats['kl'] == pytest.approx(0, abs=1e-6)
            assert stats['clip_high'] == stats['clip_low'] == 0
        else:
            assert (logps - old_logps).abs().max() > 0.01 and stats['kl'] > 1e-4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    new_old_logps, same_ref_logps = fixed_logps(model, reference, group, prompt_mask, 0.04)
    torch.testing.assert_close(same_ref_logps, ref_logps)  # the reference stays where training began
    assert (new_old_logps - old_logps).abs().max() > 0.01


def test_fixed_logps_are_taken_without_dropout():
    model, reference = policies('lora', dropout=0.5)
    for p in (p for name, p in model.named_parameters() if name.endswith('lora_b')):
        torch.nn.init.constant_(p, 0.1)
    group = sampled(model)
    prompt_mask = torch.zeros_like(group.prompt_ids, dtype=torch.bool)
    old_logps, _ = fixed_logps(model.train(), reference, group, prompt_mask, 0.04)
    assert torch.equal(old_logps, fixed_logps(model.train(), reference, group, prompt_mask, 0.04)[0])
    assert torch.equal(old_logps, completion_logps(model.eval(), group.prompt_ids, group.completion_ids, prompt_mask, group.mask))


def test_beta_zero_asks_for_no_reference():
    model, _ = policies('full')
    group = sampled(model)
    assert fixed_logps(model, None, group, torch.zeros_like(group.prompt_ids, dtype=torch.bool), 0.0)[1] is None


# --- the learning is real ---

LIKED = 12  # the letter m
PROMPT = torch.tensor([[5, 6, 7]] * 64)


def counts(model):
    """How often each token stands in 64 sampled completions of 8."""
    completion_ids = generate(model, PROMPT, 8, 4, 4, 1.0, generator=torch.Generator().manual_seed(99))
    return completion_ids.flatten().bincount(minlength=V)


def train(model, reference, reward, steps, lr=3e-3, beta=0.04, num_generations=16, num_iterations=2):
    """diffu-GRPO in miniature: rollout, advantages, then updates that each have their own prompt mask."""
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    for _ in range(steps):
        group = rollout(model, Letters(), [5, 6, 7], reward, num_generations, g,
                        gen_length=8, block_length=4, steps=4, temperature=1.0)
        advantages = group_advantages(group.rewards, num_generations)
        prompt_masks = [random_prompt_mask(group.prompt_ids, 0.15, g) for _ in range(num_iterations)]
        fixed = [fixed_logps(model, reference, group, prompt_mask, beta) for prompt_mask in prompt_masks]
        for prompt_mask, (old_logps, ref_logps) in zip(prompt_masks, fixed):
            model.train()
            logps = completion_logps(model, group.prompt_ids, group.completion_ids, prompt_mask, group.mask)
            loss, _ = grpo_loss(logps, old_logps, ref_logps, advantages, group.mask, beta=beta)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def likes(token, weight):
    """A reward that gives `weight` to a completion of nothing but this token."""
    return lambda texts: [weight * text.count(chr(ord('a') + token)) / 8 for text in texts]


@pytest.mark.parametrize('kind, lr', [('full', 3e-3), ('lora', 1e-2)])
def test_a_rewarded_token_becomes_common(kind, lr):
    model, reference = policies(kind, targets=('v_proj', 'up_proj', 'ff_out'))
    before = counts(model)
    train(model, reference, likes(LIKED, 1.0), 15, lr)
    assert before[LIKED] < 0.1 * 512 and counts(model)[LIKED] > 0.4 * 512
    with reference() as base:
        assert torch.equal(counts(base), before), 'the reference has not moved'


def test_a_punished_token_becomes_rare():
    model, reference = policies('full')
    before = counts(model)
    common = before.argmax()
    train(model, reference, likes(common, -1.0), 10)
    assert counts(model)[common] < before[common] / 3


def test_a_reward_that_is_always_the_same_teaches_nothing():
    model, reference = policies('full')
    weights = copy.deepcopy(model.state_dict())
    train(model, reference, lambda texts: [1.0] * len(texts), 2, beta=0.0)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize('old, advantage', [(-200.0, 1.0), (-200.0, 0.0), (200.0, -1.0)])
def test_a_ratio_beyond_float32_leaves_the_gradient_finite(old, advantage):
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, _ = grpo_loss(logps, torch.tensor([[old, -2.0]]), torch.tensor([[-old, -2.0]]), torch.tensor([advantage]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
