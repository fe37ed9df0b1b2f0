"""What loglik.py claims: d1's one-step estimate, the completion masked, some of the prompt."""
import pytest
import torch
from safetensors.torch import load_file

from grpo import completion_mask
from loglik import (completion_logps, draw_views, exact_logps, random_prompt_mask,
                    segment_views)
from model import LLaDA
from sample import generate
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


def test_the_inputs_are_left_alone():
    prompt_ids, completion_ids = tokens(2, 4), tokens(2, 3, seed=1)
    kept = prompt_ids.clone(), completion_ids.clone()
    completion_logps(tiny(), prompt_ids, completion_ids, PROMPT_MASK)
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


# ---- other estimators ----

ORDER = torch.tensor([[0, 2, 1, 3], [3, 0, 1, 2]])       # the step that committed each token


def scored_in(views):
    """For every token the numbers of the views that score it."""
    found = [[[] for _ in row] for row in ORDER]
    for i, view in enumerate(views):
        assert (view.masked | ~view.scored).all(), 'what is in sight is not scored'
        for row, k in view.scored.nonzero().tolist():
            found[row][k].append(i)
    return found


def test_one_step_is_one_view_with_all_masked():
    model, prompt_ids, completion_ids = tiny(), tokens(2, 4), tokens(2, 4, seed=1)
    [view] = draw_views('one_step', 9, ORDER)
    assert view.masked.all() and view.scored.all()
    arguments = model, prompt_ids, completion_ids, PROMPT_MASK
    assert torch.equal(completion_logps(*arguments, views=[view]), completion_logps(*arguments))


def test_segments_follow_the_order_of_the_rollout():
    assert scored_in(segment_views(ORDER, 2)) == [[[0], [1], [0], [1]], [[1], [0], [0], [1]]]
    views = draw_views('stepmerge', 4, ORDER)
    assert scored_in(views) == [[[k] for k in row] for row in ORDER.tolist()]
    for i, view in enumerate(views):
        assert torch.equal(view.masked, ORDER >= i), 'earlier commits are in sight'


def test_ar_scores_every_token_given_all_before_it():
    views = draw_views('ar', 1, ORDER)
    assert scored_in(views) == [[[0], [1], [2], [3]]] * 2
    assert [view.masked[0].tolist() for view in views[1:3]] == [[False, True, True, True],
                                                                [False, False, True, True]]


def test_coupled_views_are_complements():
    first, second = draw_views('coupled', 1, torch.zeros(50, 40), torch.Generator().manual_seed(0))
    assert torch.equal(first.masked, ~second.masked)
    assert torch.equal(first.scored, first.masked) and torch.equal(second.scored, second.masked)
    assert abs(first.masked.float().mean() - 0.5) < 0.05


def test_an_elbo_counts_every_token_once_on_average():
    views = draw_views('elbo', 4, torch.zeros(2000, 6), torch.Generator().manual_seed(0))
    counts = sum(view.weight * view.scored for view in views)
    assert len(views) == 4 and abs(counts.mean() - 1) < 0.05
    shares = sorted(view.masked.float().mean(1).mean().item() for view in views)
    assert max(shares) - min(shares) < 0.05, 'every view has all noise levels over the rows'
    levels = torch.cat([1 / (4 * view.weight) for view in views], dim=1).sort(dim=1).values
    torch.testing.assert_close(levels.diff(dim=1), torch.full((2000, 3), 0.25))


@pytest.mark.parametrize('estimator', ['coupled', 'elbo'])
def test_views_come_from_their_generator_only(estimator):
    first, again = (draw_views(estimator, 2, torch.zeros(3, 9), torch.Generator().manual_seed(0))
                    for _ in range(2))
    for view, other in zip(first, again):
        assert torch.equal(view.masked, other.masked)


def test_log_probs_are_the_weighted_sum_over_views():
    model, prompt_ids, completion_ids = tiny(), tokens(2, 4), tokens(2, 4, seed=1)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    views = draw_views('elbo', 3, ORDER, torch.Generator().manual_seed(1))
    found = completion_logps(model, prompt_ids, completion_ids, PROMPT_MASK, mask, views)
    expected = torch.zeros(2, 4)
    for view in views:
        prompt = prompt_ids.masked_fill(PROMPT_MASK, MASK)
        ids = torch.cat((prompt, completion_ids.masked_fill(view.masked, MASK)), 1)
        logps = model(ids)[:, 4:].log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]
        expected += view.weight * logps * view.scored * mask
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def drawn(remasking, n=20000, temperature=0.8):
    """{completion: (how often a small model drew it, its exact probability by exact_logps)}."""
    model = tiny(embedding_size=5)                       # mask 1, eos 0, three words
    prompt_ids = torch.tensor([[2, 3]]).expand(n, 2)
    order = torch.zeros(n, 4, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    ids = generate(model, prompt_ids, 4, 2, 4, temperature, remasking=remasking,
                   generators=[g] * n, order=order)
    counts = {}
    for row, key in enumerate(map(tuple, ids.tolist())):
        counts.setdefault(key, [0, row])[0] += 1
    rows = torch.tensor([row for _, row in counts.values()])
    logps = exact_logps(model, prompt_ids[rows], ids[rows], order[rows],
                        completion_mask(ids[rows], (0,)), 2, temperature)
    return {key: (count / n, p) for (key, (count, _)), p
            in zip(counts.items(), logps.sum(1).exp().tolist())}


def test_the_exact_likelihood_sums_to_one_and_is_how_often_the_sampler_draws():
    """All completions of four tokens from four, ends included, that were drawn in 20,000."""
    found = drawn('top_prob')
    assert len(found) > 40
    assert sum(p for _, p in found.values()) == pytest.approx(1, abs=0.01)
    for share, p in found.values():
        assert abs(share - p) <= 5 * (p * (1 - p) / 20000) ** 0.5 + 1e-4


def test_the_product_is_not_the_likelihood_under_llada_s_own_rule():
    gaps = [abs(share - p) / (p * (1 - p) / 20000) ** 0.5 for share, p
            in drawn('low_confidence').values() if p > 0.01]
    assert max(gaps) > 10
