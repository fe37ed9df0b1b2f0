"""What sft.py claims: LLaDA's masked objective, the same gradient however the batch is cut, Muon."""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model import LLaDA
from sft import add_base_noise, add_noise, masked_loss, Muon, pad, sft_backward, sft_loss
from tiny import EOS, GOLDEN, MASK, V, assert_same, grad_norm, gradients, needs_shared, says, tiny, tokens


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_pairs(n=6, prompts=(4, 2, 5), answers=(3, 6, 1)):
    """[(prompt ids, answer ids)] of uneven lengths."""
    return [(tokens(prompts[i % 3], seed=i).tolist(), tokens(answers[i % 3], seed=100 + i).tolist()) for i in range(n)]


# --- the loss ---

@needs_shared
def test_loss_and_gradient_match_the_official_code():
    golden, model = load_file(GOLDEN / 'sft.safetensors'), LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    expected = json.loads((GOLDEN / 'sft.json').read_text())
    num_prompt_tokens = golden['train.num_prompt_tokens'].item()
    for t in (golden['train.t'], golden['train.t'][:, :1]):  # (B, T) or (B, 1)
        model.zero_grad()
        loss = sft_loss(model(golden['train.noisy']), golden['train.labels'], t, num_prompt_tokens)
        loss.backward()
        assert loss.item() == pytest.approx(expected['loss'], rel=1e-5)
        assert grad_norm(model) == pytest.approx(expected['grad_norm'], rel=1e-4)


def test_loss_by_hand():
    logits = torch.zeros(2, 3, 4)
    logits[0, 1, 0] = torch.tensor(3.0).log()  # probabilities 1/2, 1/6, 1/6, 1/6
    labels = torch.tensor([[-100, 0, 2], [-100, -100, 3]])
    t = torch.tensor([[0.5], [0.25]])
    two, four = torch.tensor([2.0, 4.0]).log()
    expected = (two / 0.5 + four / 0.5 + four / 0.25) / (6 - 2)
    torch.testing.assert_close(sft_loss(logits, labels, t, 2), expected)


def test_unscored_positions_give_no_gradient():
    logits = torch.randn(2, 4, 5, generator=generator()).requires_grad_()
    labels = torch.tensor([[-100, 1, -100, 2], [-100, -100, -100, 0]])
    sft_loss(logits, labels, torch.tensor([[0.3], [0.6]])).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, labels != -100)


# --- noise ---

def test_t_is_uniform_in_every_row_and_never_zero():
    answers, g = torch.zeros(4, 1, dtype=torch.long), generator()
    t = torch.cat([add_noise(answers, MASK, g)[2] for _ in range(2000)], 1)  # (4, 2000)
    assert t.min() > 0 and t.max() <= 1
    for row in t:
        counts = (row * 10).clamp(max=9.999).long().bincount(minlength=10)
        chi2 = ((counts - 200.0) ** 2 / 200).sum()
        assert chi2 < 33.7, f'99.99 % of uniform draws are below: {counts.tolist()}'


def test_t_of_a_batch_is_spread_evenly():
    for seed in range(20):
        t = add_noise(torch.zeros(8, 1, dtype=torch.long), MASK, generator(seed))[2].flatten()
        assert sorted((t * 8).ceil().int().tolist()) == [1, 2, 3, 4, 5, 6, 7, 8], 'one in every eighth of (0, 1]'


def test_mask_rate_is_t_and_each_token_has_its_own_fate():
    answers = tokens(6, 4000)
    noisy, masked, t = add_noise(answers, MASK, generator())
    assert torch.equal(noisy, answers.where(~masked, torch.tensor(MASK))) and t.shape == (6, 1)
    for row in range(6):
        rate, error = t[row].item(), 4 * (t[row] * (1 - t[row]) / 4000).sqrt().item()
        assert abs(masked[row].float().mean().item() - rate) <= error
        pairs = (masked[row, 1:] & masked[row, :-1]).float().mean().item()
        assert abs(pairs - rate ** 2) <= 4 * 0.5 / 4000 ** 0.5
    assert (answers != MASK).all(), 'the answers themselves stay'


def test_noise_comes_from_its_generator_only():
    state = torch.random.get_rng_state()
    first, same, other = (add_noise(tokens(3, 50), MASK, generator(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- batches ---

def test_pad_puts_prompts_left_and_answers_right():
    ids, attention_mask, P = pad([([5, 6, 7], [8]), ([9], [3, 4])], 3, EOS)
    assert P == 3 and ids.tolist() == [[5, 6, 7, 8, EOS, EOS], [EOS, EOS, 9, 3, 4, EOS]]
    assert attention_mask.tolist() == [[True] * 6, [False, False, True, True, True, True]]
    assert pad([([5, 6], [8]), ([9, 4], [])], 2, EOS)[1] is None, 'nothing is padded, nothing needs hiding'


def test_prompts_are_never_masked_and_answers_are_with_their_padding():
    model, pairs, seen = tiny(), make_pairs(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids, attention_mask, P = pad(pairs, 8, EOS)
    hidden = torch.zeros(6, 8)
    for seed in range(30):
        sft_backward(model, pairs, 8, model.config, generator(seed), 6)
        assert torch.equal(seen[-1][:, :P], ids[:, :P])
        changed = seen[-1][:, P:] != ids[:, P:]
        assert (seen[-1][:, P:][changed] == MASK).all()
        hidden += changed
    assert len(seen) == 30 and hidden.min() >= 3 and hidden.max() <= 27, 'answers and padding alike, half the time'


def test_expected_loss_is_the_mean_cross_entropy():
    """1/t undoes the mask rate: over the noise, every answer token counts once, eos padding included."""
    logits = torch.linspace(-1.0, 2.0, V)
    pairs = [(tokens(2).tolist(), [3, 30, 7])] * 3000
    losses = [sft_backward(says(logits.tolist(), n_layers=1), pairs, 8, tiny().config, generator(seed), 3000)
              for seed in range(2)]
    expected = -logits.log_softmax(-1)[torch.tensor([3, 30, 7] + [EOS] * 5)].mean().item()
    assert sum(losses) / 2 == pytest.approx(expected, rel=0.04)


def test_backward_is_the_gradient_of_sft_loss():
    model, pairs = tiny(), make_pairs()
    returned = sft_backward(model, pairs, 8, model.config, generator(), 6)
    ours = gradients(model)
    model.zero_grad()
    ids, attention_mask, P = pad(pairs, 8, EOS)
    noisy, masked, t = add_noise(ids[:, P:], MASK, generator())
    labels = torch.cat((torch.full((6, P), -100), ids[:, P:].where(masked, torch.tensor(-100))), 1)
    loss = sft_loss(model(torch.cat((ids[:, :P], noisy), 1), attention_mask), labels, t, 6 * P)
    loss.backward()
    assert returned == pytest.approx(loss.item(), rel=1e-5)
    assert_same(ours, gradients(model), 1e-4)


@pytest.mark.parametrize('micro_batch', [1, 2, 4, 100])
def test_micro_batches_equal_one_batch(micro_batch):
    model, pairs = tiny(), make_pairs()
    loss = sft_backward(model, pairs, 8, model.config, generator(), 6)
    expected = gradients(model)
    model.zero_grad()
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    assert sft_backward(model, pairs, 8, model.config, generator(), micro_batch) == pytest.approx(loss, rel=1e-5)
    assert max(calls) == min(micro_batch, 6) and sum(calls) == 6
    assert_same(gradients(model), expected, 1e-4)


@pytest.mark.parametrize('n', [6, 7])  # 7 rows do not divide by 2
def test_two_processes_average_to_the_same_gradient(n):
    model, pairs = tiny(), make_pairs(n)
    loss = sft_backward(model, pairs, 8, model.config, generator(), 4)
    expected, parts, losses = gradients(model), [], []
    for rank in range(2):
        model.zero_grad()
        losses.append(sft_backward(model, pairs, 8, model.config, generator(), 4, rank, 2))
        parts.append(gradients(model))
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-5)
    assert_same({name: (parts[0][name] + parts[1][name]) / 2 for name in expected}, expected, 1e-4)
    assert abs(losses[0] - losses[1]) > 1e-3 * abs(loss), 'each process must have rows of its own'


def test_gradients_add_up_over_calls():
    model, pairs = tiny(), make_pairs()
    sft_backward(model, pairs, 8, model.config, generator(), 6)
    once = gradients(model)
    sft_backward(model, pairs, 8, model.config, generator(), 6)
    assert_same(gradients(model), {name: 2 * grad for name, grad in once.items()}, 1e-5)


def test_masked_loss_ignores_what_is_not_masked():
    logps = torch.tensor([[-1.0, -2.0, -torch.inf]])
    masked = torch.tensor([[True, True, False]])
    assert masked_loss(logps, masked, torch.tensor([[0.5, 0.5, 0.5]]), 3).item() == 2.0
    assert masked_loss(logps, torch.zeros_like(masked), torch.ones(1, 3), 3).item() == 0.0


# --- Muon ---

@pytest.mark.parametrize('shape', [(24, 24), (48, 16), (16, 48)])
def test_muon_steps_along_the_orthogonal_part_of_the_gradient(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=generator()) * 1e-3
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    Muon([p], lr=0.1).step()
    step = -p.detach() / (0.1 * max(1, shape[0] / shape[1]) ** 0.5)
    assert F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
    values = torch.linalg.svdvals(step)
    spread = torch.linalg.svdvals(p.grad)
    assert values[:len(values) * 3 // 4].min() > 0.6 and values.max() < 1.3, 'near-orthogonal but for tiny directions'
    assert values.max() / values.median() < 1.7 < spread.max() / spread.min()


def test_muon_ignores_the_gradients_size_and_keeps_momentum():
    steps = []
    for scale in (1.0, 1e-4):
        p = torch.nn.Parameter(torch.zeros(8, 8))
        optimizer, g = Muon([p], lr=0.1), generator()
        for _ in range(3):
            p.grad = scale * torch.randn(8, 8, generator=g)
            optimizer.step()
        assert 'momentum' in optimizer.state_dict()['state'][0], 'it must be saved with the checkpoint'
        steps.append(p.detach().clone())
    torch.testing.assert_close(*steps, atol=1e-3, rtol=1e-2)
    fresh = torch.nn.Parameter(torch.zeros(8, 8))
    fresh.grad = p.grad.clone()
    before = p.detach().clone()
    Muon([fresh], lr=0.1).step()
    optimizer.step()
    assert not torch.allclose(fresh, p - before, atol=1e-3), 'the past must have a say'


def test_muon_skips_weights_without_gradient():
    p = torch.nn.Parameter(torch.ones(4, 4))
    Muon([p]).step()
    assert torch.equal(p, torch.ones(4, 4))


def test_muon_trains():
    model, pairs, g = tiny(), make_pairs(3), generator()
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    optimizers = [Muon(matrices, lr=0.02),
                  torch.optim.AdamW([p for p in model.parameters() if all(p is not m for m in matrices)], 3e-3)]
    losses = []
    for _ in range(80):
        losses.append(sft_backward(model, pairs, 8, model.config, g, 3))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert sum(losses[-20:]) < sum(losses[:20]) / 3


def test_base_noise_is_half_sfts_and_half_what_the_sampler_sees():
    answers = torch.zeros(4000, 32, dtype=torch.long)
    noisy, masked, t = add_base_noise(answers, 1, torch.Generator().manual_seed(0))
    assert (t == 1).all() and torch.equal(noisy, masked.long())
    shares = masked[::2].float().mean(1)
    assert shares.min() > 0.05 and abs(shares.mean() - 0.65) < 0.02  # t ~ U(0.3, 1), wherever in the text
    assert abs(masked[::2, 0].float().mean() - 0.65) < 0.03
    for row in masked[1::2]:  # nothing is masked in front of some place, all from `width` tokens behind it
        first = row.long().argmax().item() if row.any() else 32
        assert row[first + 8:].all()
    assert masked[1::2].all(1).any() and masked[1::2, 31].float().mean() > 0.8


def test_base_noise_is_not_weighed():
    model, pairs = tiny(), [([5, 6], [7, 8, 9]), ([6, 7], [8])]
    loss = sft_backward(model, pairs, 4, model.config, torch.Generator().manual_seed(1), 2, noise=add_base_noise)
    ids, _, P = pad(pairs, 4, model.config.eos_id)
    noisy, masked, _ = add_base_noise(ids[:, P:], model.config.mask_id, torch.Generator().manual_seed(1))
    logits = model(torch.cat((ids[:, :P], noisy), 1))[:, P:]
    assert loss == pytest.approx(F.cross_entropy(logits[masked], ids[:, P:][masked], reduction='sum').item() / 8, rel=1e-5)
