"""What loglik.py claims: d1's one-step estimate, the completion masked, some of the prompt."""
import pytest
import torch
from safetensors.torch import load_file

from loglik import completion_logps, one_step_view, random_prompt_mask
from model import LLaDA
from tiny import GOLDEN, MASK, V, says, tiny, tokens

PROMPT_MASK = torch.tensor([[True, False, False, True], [False, False, False, False]])


def other_token(ids, k):
    """ids (1, n) with another token at k."""
    ids = ids.clone()
    ids[0, k] = 2 + (ids[0, k] - 1) % (V - 2)
    return ids


@torch.no_grad()
def test_logps_match_the_official_code():
    golden = load_file(GOLDEN / 'logps.safetensors')
    model = LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    prompt_ids, completion_ids = golden['input_ids'].split((24, 20), dim=1)
    for prompt_mask, expected in zip(golden['prompt_masks'], golden['logps']):
        logps = completion_logps(model, prompt_ids, completion_ids, prompt_mask)
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logps_match_a_softmax_by_hand():
    model, prompt_ids, completion_ids = tiny(), tokens(2, 4), tokens(2, 3, seed=1)
    logps = completion_logps(model, prompt_ids, completion_ids, PROMPT_MASK)
    assert logps.shape == (2, 3) and logps.dtype == torch.float32
    for row in range(2):
        seen = prompt_ids[row].tolist() + [MASK] * 3
        if row == 0:
            seen[0] = seen[3] = MASK
        logits = model(torch.tensor([seen]))[0, 4:].double()
        for k, token in enumerate(completion_ids[row].tolist()):
            probability = logits[k, token].exp() / logits[k].exp().sum()
            assert logps[row, k].item() == pytest.approx(probability.log().item(), abs=1e-5)


def test_a_constant_model_gives_its_own_logps():
    logits = torch.linspace(-1, 2, V)
    prompt_ids, completion_ids = tokens(3, 5), tokens(3, 4, seed=1)
    prompt_mask = random_prompt_mask(prompt_ids, 0.5)
    logps = completion_logps(says(logits.tolist()), prompt_ids, completion_ids, prompt_mask)
    torch.testing.assert_close(logps, logits.log_softmax(-1)[completion_ids])


@torch.no_grad()
def test_a_token_is_hidden_from_the_others_unless_it_is_an_unmasked_prompt_token():
    model, prompt_ids, completion_ids = tiny(), tokens(1, 4), tokens(1, 6, seed=1)
    logps = completion_logps(model, prompt_ids, completion_ids, PROMPT_MASK[:1])
    for k in range(4):
        changed = completion_logps(model, other_token(prompt_ids, k), completion_ids,
                                   PROMPT_MASK[:1])
        assert torch.equal(changed, logps) == PROMPT_MASK[0, k].item()
    for k in range(6):
        changed = completion_logps(model, prompt_ids, other_token(completion_ids, k),
                                   PROMPT_MASK[:1])
        gap = (changed - logps)[0].abs() > 1e-6
        assert gap.nonzero().flatten().tolist() == [k]


def test_tokens_outside_the_completion_mask_get_zero_and_no_gradient():
    model, prompt_ids, completion_ids = tiny(), tokens(2, 4), tokens(2, 3, seed=1)
    completion_mask = torch.tensor([[True, True, False], [True, False, False]])
    arguments = model, prompt_ids, completion_ids, PROMPT_MASK
    some = completion_logps(*arguments, completion_mask)
    torch.testing.assert_close(some, completion_logps(*arguments) * completion_mask)
    gradients = []
    for logps in (some, completion_logps(*arguments)[completion_mask]):
        gradients.append(torch.autograd.grad(logps.sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_the_view_leaves_its_inputs_alone():
    prompt_ids, completion_ids = tokens(2, 4), tokens(2, 3, seed=1)
    kept = prompt_ids.clone(), completion_ids.clone()
    view = one_step_view(prompt_ids, completion_ids, PROMPT_MASK, MASK)
    assert torch.equal(view == MASK, torch.nn.functional.pad(PROMPT_MASK, (0, 3), value=True))
    assert torch.equal(view[:, :4][~PROMPT_MASK], prompt_ids[~PROMPT_MASK])
    assert torch.equal(prompt_ids, kept[0]) and torch.equal(completion_ids, kept[1])


def test_every_prompt_token_is_masked_on_its_own_with_p():
    prompt_ids, g = tokens(200, 100), torch.Generator().manual_seed(0)
    for p in (0.0, 0.15, 0.7, 1.0):
        prompt_mask = random_prompt_mask(prompt_ids, p, g)
        assert prompt_mask.shape == prompt_ids.shape and prompt_mask.dtype == torch.bool
        assert abs(prompt_mask.float().mean() - p) <= 4 * (p * (1 - p) / 20000) ** 0.5
        for axis in (0, 1):                      # neither rows nor columns share their fate
            spread = prompt_mask.float().mean(axis).var() * prompt_mask.size(axis)
            assert abs(spread - p * (1 - p)) <= 0.5 * p * (1 - p)


def test_the_prompt_mask_comes_from_its_generator_only():
    def masked(seed):
        return random_prompt_mask(tokens(4, 50), 0.3, torch.Generator().manual_seed(seed))
    state = torch.random.get_rng_state()
    assert torch.equal(masked(0), masked(0)) and not torch.equal(masked(0), masked(1))
    assert torch.equal(torch.random.get_rng_state(), state), 'the official code reseeds everybody'


def test_the_given_beginning_of_an_answer_is_never_masked():
    prompt_ids, g = tokens(50, 20), torch.Generator().manual_seed(0)
    prompt_mask = random_prompt_mask(prompt_ids, 1.0, g, num_prefill=3)
    assert prompt_mask[:, :17].all() and not prompt_mask[:, 17:].any()
    assert random_prompt_mask(prompt_ids, 1.0, g).all()
