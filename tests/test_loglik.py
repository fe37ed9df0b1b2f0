"""What loglik.py claims: d1's one-step estimate, all of the completion masked and some of the prompt."""
import pytest
import torch
from safetensors.torch import load_file

from loglik import completion_logps, one_step_view, random_prompt_mask
from model import LLaDA, add_lora, lora_off
from tiny import GOLDEN, MASK, V, left_pad, needs_shared, says, tiny, tokens


def nothing_masked(prompt_ids):
    return torch.zeros_like(prompt_ids, dtype=torch.bool)


@needs_shared
@torch.no_grad()
def test_logps_match_the_official_code():
    golden, model = load_file(GOLDEN / 'logps.safetensors'), LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    prompt_ids, completion_ids = golden['input_ids'].split((24, 20), dim=1)
    for prompt_mask, expected in zip(golden['prompt_masks'], golden['logps']):
        logps = completion_logps(model, prompt_ids, completion_ids, prompt_mask)
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logps_match_a_hand_computed_softmax():
    model, prompt_ids, completion_ids = tiny(), tokens(2, 4), tokens(2, 3, seed=1)
    prompt_mask = torch.tensor([[True, False, False, True], [False, False, False, False]])
    logps = completion_logps(model, prompt_ids, completion_ids, prompt_mask)
    for row in range(2):
        seen = [MASK if hidden else i for i, hidden in zip(prompt_ids[row].tolist(), prompt_mask[row].tolist())]
        logits = model(torch.tensor([seen + [MASK] * 3]))[0, 4:].double()
        for k, token in enumerate(completion_ids[row].tolist()):
            probability = logits[k, token].exp() / logits[k].exp().sum()
            assert logps[row, k].item() == pytest.approx(probability.log().item(), abs=1e-5)


def test_constant_model_gives_its_own_logps():
    logits = torch.linspace(-1, 2, V)
    prompt_ids, completion_ids = tokens(3, 5), tokens(3, 4, seed=1)
    logps = completion_logps(says(logits.tolist()), prompt_ids, completion_ids, random_prompt_mask(prompt_ids, 0.5))
    torch.testing.assert_close(logps, logits.log_softmax(-1)[completion_ids])


@torch.no_grad()
def test_a_tokens_logp_ignores_the_completions_other_tokens():
    model, prompt_ids, completion_ids = tiny(), tokens(1, 5), tokens(1, 6, seed=1)
    logps = completion_logps(model, prompt_ids, completion_ids, nothing_masked(prompt_ids))
    for changed in range(6):
        other = completion_ids.clone()
        other[0, changed] = 2 + (other[0, changed] - 1) % (V - 2)
        gap = (completion_logps(model, prompt_ids, other, nothing_masked(prompt_ids)) - logps)[0].abs() > 1e-6
        assert gap.nonzero().flatten().tolist() == [changed]


@torch.no_grad()
def test_masked_prompt_tokens_are_hidden_and_the_others_seen():
    model, prompt_ids, completion_ids = tiny(), tokens(1, 5), tokens(1, 4, seed=1)
    prompt_mask = torch.tensor([[False, True, False, False, True]])
    logps = completion_logps(model, prompt_ids, completion_ids, prompt_mask)
    for changed in range(5):
        other = prompt_ids.clone()
        other[0, changed] = 2 + (other[0, changed] - 1) % (V - 2)
        same = torch.equal(completion_logps(model, other, completion_ids, prompt_mask), logps)
        assert same == prompt_mask[0, changed].item()


def test_view_leaves_its_inputs_alone():
    prompt_ids, completion_ids = tokens(2, 3), tokens(2, 4, seed=1)
    kept = prompt_ids.clone(), completion_ids.clone()
    view = one_step_view(prompt_ids, completion_ids, torch.tensor([[True, False, False]] * 2), MASK)
    assert (view[:, 0] == MASK).all() and torch.equal(view[:, 1:3], prompt_ids[:, 1:]) and (view[:, 3:] == MASK).all()
    assert torch.equal(prompt_ids, kept[0]) and torch.equal(completion_ids, kept[1])


def test_prompt_mask_rate_is_p():
    prompt_ids, g = tokens(200, 100), torch.Generator().manual_seed(0)
    for p in (0.0, 0.15, 0.7, 1.0):
        prompt_mask = random_prompt_mask(prompt_ids, p, g)
        assert prompt_mask.shape == prompt_ids.shape and prompt_mask.dtype == torch.bool
        assert abs(prompt_mask.float().mean() - p) <= 4 * (p * (1 - p) / 20000) ** 0.5
        # each token on its own: neither rows nor columns share their fate
        for axis in (0, 1):
            spread = prompt_mask.float().mean(axis).var() * prompt_mask.size(axis)
            assert abs(spread - p * (1 - p)) <= 0.5 * p * (1 - p)


def test_prompt_mask_comes_from_its_generator_only():
    draw = lambda seed: random_prompt_mask(tokens(4, 50), 0.3, torch.Generator().manual_seed(seed))
    state = torch.random.get_rng_state()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.random.get_rng_state(), state), 'the official code reseeds everybody here'


@torch.no_grad()
def test_batch_of_padded_prompts_equals_one_by_one():
    model, prompts, completion_ids = tiny(), [tokens(n, seed=n) for n in (7, 3, 5)], tokens(3, 6, seed=1)
    prompt_ids, real = left_pad(prompts)
    prompt_mask = random_prompt_mask(prompt_ids, 0.4, torch.Generator().manual_seed(0))
    attention_mask = torch.cat((real, torch.ones(3, 6, dtype=torch.bool)), 1)
    together = completion_logps(model, prompt_ids, completion_ids, prompt_mask, attention_mask=attention_mask)
    for row, prompt in enumerate(prompts):
        alone = completion_logps(model, prompt[None], completion_ids[[row]], prompt_mask[[row], -len(prompt):])
        torch.testing.assert_close(together[[row]], alone, atol=1e-4, rtol=1e-4)


def test_wrapped_model_gives_the_same_logps():
    class Wrapped(torch.nn.Module):  # as DistributedDataParallel keeps it
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **keys):
            return self.module(*args, **keys)
    model, prompt_ids, completion_ids = tiny(), tokens(2, 4), tokens(2, 3, seed=1)
    arguments = prompt_ids, completion_ids, nothing_masked(prompt_ids)
    assert torch.equal(completion_logps(Wrapped(model), *arguments), completion_logps(model, *arguments))


@torch.no_grad()
def test_reference_logps_are_those_of_the_model_before_its_adapters():
    model, prompt_ids, completion_ids = tiny(), tokens(2, 4), tokens(2, 3, seed=1)
    arguments = prompt_ids, completion_ids, nothing_masked(prompt_ids)
    before = completion_logps(model, *arguments)
    add_lora(model, 2, 4)
    for name, p in model.named_parameters():
        if name.endswith('lora_b'):
            torch.nn.init.constant_(p, 0.1)
    assert (completion_logps(model, *arguments) - before).abs().max() > 0.01
    with lora_off(model):
        torch.testing.assert_close(completion_logps(model, *arguments), before)
