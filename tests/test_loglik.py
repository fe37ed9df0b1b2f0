"""What loglik.py claims: d1's one-step estimate, its siblings, and an exact likelihood.

The exact one is held against all joint draws of a small random model, enumerated.
"""
import itertools

import pytest
import torch
from safetensors.torch import load_file

from grpo import up_to_end
from loglik import completion_logps, draw_views, exact_logps, random_prompt_mask, segment_views
from model import LLaDA
from sample import commit_counts, generate
from tiny import EOS, GOLDEN, MASK, V, bias, says, tiny, tokens

PROMPT_MASK = torch.tensor([[True, False, False, True], [False, False, False, False]])


def other_token(ids, k):
    """ids (1, n) with another token at k."""
    ids = ids.clone()
    ids[0, k] = 2 + (ids[0, k] - 1) % (V - 2)
    return ids


# ---- prompt masks ----

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


# ---- d1's estimate ----

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
    kept = prompt_ids.clone(), completion_ids.clone()
    completion_mask = torch.tensor([[True, True, False], [True, False, False]])
    arguments = model, prompt_ids, completion_ids, PROMPT_MASK
    some = completion_logps(*arguments, completion_mask)
    torch.testing.assert_close(some, completion_logps(*arguments) * completion_mask)
    gradients = []
    for logps in (some, completion_logps(*arguments)[completion_mask]):
        gradients.append(torch.autograd.grad(logps.sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert torch.equal(prompt_ids, kept[0]) and torch.equal(completion_ids, kept[1])


# ---- other estimators ----

COMMIT_STEPS = torch.tensor([[0, 2, 1, 3], [3, 0, 1, 2]])
COMPLETION_IDS = tokens(2, 4, seed=1)


def scored_in(views):
    """For every token the numbers of the views that score it."""
    found = [[[] for _ in row] for row in COMMIT_STEPS]
    for i, view in enumerate(views):
        assert (view.masked | ~view.scored).all(), 'what is in sight is not scored'
        for row, k in view.scored.nonzero().tolist():
            found[row][k].append(i)
    return found


def test_one_step_is_one_view_with_all_masked():
    model, prompt_ids = tiny(), tokens(2, 4)
    [view] = draw_views('one_step', 9, COMPLETION_IDS, COMMIT_STEPS)
    assert view.masked.all() and view.scored.all()
    arguments = model, prompt_ids, COMPLETION_IDS, PROMPT_MASK
    assert torch.equal(completion_logps(*arguments, views=[view]), completion_logps(*arguments))


def test_segments_follow_the_steps_of_the_rollout():
    assert scored_in(segment_views(COMMIT_STEPS, 2)) == [[[0], [1], [0], [1]], [[1], [0], [0], [1]]]
    views = draw_views('stepmerge', 4, COMPLETION_IDS, COMMIT_STEPS)
    assert scored_in(views) == [[[k] for k in row] for row in COMMIT_STEPS.tolist()]
    for i, view in enumerate(views):
        assert torch.equal(view.masked, COMMIT_STEPS >= i), 'earlier commits are in sight'


def test_ar_scores_every_token_given_all_before_it():
    views = draw_views('ar', 1, COMPLETION_IDS, COMMIT_STEPS)
    assert scored_in(views) == [[[0], [1], [2], [3]]] * 2
    assert [view.masked[0].tolist() for view in views[1:3]] == [[False, True, True, True],
                                                                [False, False, True, True]]


def test_coupled_views_are_complements():
    first, second = draw_views('coupled', 1, tokens(50, 40), None, torch.Generator().manual_seed(0))
    assert torch.equal(first.masked, ~second.masked)
    assert torch.equal(first.scored, first.masked) and torch.equal(second.scored, second.masked)
    assert abs(first.masked.float().mean() - 0.5) < 0.05


def test_an_elbo_counts_every_token_once_on_average():
    views = draw_views('elbo', 4, tokens(2000, 6), None, torch.Generator().manual_seed(0))
    counts = sum(view.weight * view.scored for view in views)
    assert len(views) == 4 and abs(counts.mean() - 1) < 0.05
    shares = sorted(view.masked.float().mean(1).mean().item() for view in views)
    assert max(shares) - min(shares) < 0.05, 'every view has all noise levels over the rows'
    levels = torch.cat([1 / (4 * view.weight) for view in views], dim=1).sort(dim=1).values
    torch.testing.assert_close(levels.diff(dim=1), torch.full((2000, 3), 0.25))


@pytest.mark.parametrize('estimator', ['coupled', 'elbo'])
def test_views_come_from_their_generator_only(estimator):
    state = torch.random.get_rng_state()
    first, again = (draw_views(estimator, 2, tokens(3, 9), None, torch.Generator().manual_seed(0))
                    for _ in range(2))
    for view, other in zip(first, again):
        assert torch.equal(view.masked, other.masked)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_log_probs_are_the_weighted_sum_over_views():
    model, prompt_ids = tiny(), tokens(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    views = draw_views('elbo', 3, COMPLETION_IDS, None, torch.Generator().manual_seed(1))
    found = completion_logps(model, prompt_ids, COMPLETION_IDS, PROMPT_MASK, mask, views)
    expected = torch.zeros(2, 4)
    for view in views:
        prompt = prompt_ids.masked_fill(PROMPT_MASK, MASK)
        ids = torch.cat((prompt, COMPLETION_IDS.masked_fill(view.masked, MASK)), 1)
        logps = model(ids)[:, 4:].log_softmax(-1).gather(-1, COMPLETION_IDS[..., None])[..., 0]
        expected += view.weight * logps * view.scored * mask
    torch.testing.assert_close(found, expected)


# ---- the exact likelihood of LLaDA's own sampler ----

PROMPT = torch.tensor([2, 3])
# words (with the end, without the mask), gen_length, block_length, steps, temperature
SAMPLERS = [(3, 4, 2, 4, 0.8), (3, 4, 4, 2, 1.3), (3, 6, 3, 4, 0.7), (4, 3, 3, 3, 0.9),
            (4, 4, 2, 2, 1.0), (3, 4, 1, 4, 0.9)]


@torch.no_grad()
def outcomes(model, gen_length, block_length, steps, temperature):
    """{(completion, commit_steps): (its probability, the product of its tokens' alone)}.

    LLaDA's rule, word by word: all joint draws of all steps, one after another, in float64.
    """
    P, cached, finished = len(PROMPT), {}, {}
    counts = commit_counts(block_length, steps * block_length // gen_length)
    start = (MASK,) * gen_length, (None,) * gen_length
    states = {start: (1.0, 1.0)}
    for step in range(len(counts) * gen_length // block_length):
        block, step_in_block = divmod(step, len(counts))
        positions = range(block * block_length, (block + 1) * block_length)
        reached = {}
        for (ids, commit_steps), (p, product) in states.items():
            if ids not in cached:
                logits = model(torch.tensor([PROMPT.tolist() + list(ids)]))[0, P:].double()
                logits[:, MASK] = -torch.inf
                cached[ids] = (logits / temperature).softmax(-1), logits.softmax(-1)
            p_T, confidences = (table.tolist() for table in cached[ids])
            masks = [k for k in positions if ids[k] == MASK]
            words = [v for v in range(model.config.embedding_size) if v != MASK]
            for drawn in itertools.product(words, repeat=len(masks)):
                chance = p
                for k, v in zip(masks, drawn):
                    chance *= p_T[k][v]
                by_confidence = sorted(zip(masks, drawn), key=lambda kv: -confidences[kv[0]][kv[1]])
                new_ids, new_steps, own = list(ids), list(commit_steps), product
                for k, v in by_confidence[:counts[step_in_block]]:
                    new_ids[k], new_steps[k] = v, step
                    own *= p_T[k][v]
                if step_in_block == len(counts) - 1 and EOS in new_ids:
                    new_ids[positions.stop:] = [EOS] * (gen_length - positions.stop)
                    new_steps[positions.stop:] = [step] * (gen_length - positions.stop)
                    into = finished
                else:
                    into = reached
                key = tuple(new_ids), tuple(new_steps)
                into[key] = into.get(key, (0, 0))[0] + chance, own
        states = reached
    return finished | states


def exact(model, keys, block_length, temperature):
    """exact_logps (N, L) of N outcomes."""
    ids, commit_steps = (torch.tensor(rows) for rows in zip(*keys))
    return exact_logps(model, PROMPT.expand(len(ids), -1), ids, commit_steps,
                       up_to_end(ids, model.config.end_ids), block_length, temperature)


@pytest.mark.parametrize('words, gen_length, block_length, steps, temperature', SAMPLERS)
def test_the_exact_likelihood_is_that_of_all_joint_draws(words, gen_length, block_length, steps,
                                                         temperature):
    model = tiny(embedding_size=words + 1, seed=5)
    found = outcomes(model, gen_length, block_length, steps, temperature)
    expected, products = (torch.tensor(numbers) for numbers in zip(*found.values()))
    with torch.no_grad():
        logps = exact(model, found, block_length, temperature)
    assert logps.shape == (len(found), gen_length) and logps.dtype == torch.float32
    torch.testing.assert_close(logps.sum(1).exp(), expected, rtol=1e-4, atol=1e-8)
    assert logps.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    # where a step passes masks over, the product of the tokens' own probabilities is none
    passes_over = steps * block_length > gen_length
    assert (abs(products.sum() - 1) > 0.05) == passes_over
    ids, commit_steps = generate(model, PROMPT.expand(200, 2), gen_length, block_length, steps,
                                 temperature, generators=[torch.Generator().manual_seed(0)] * 200)
    drawn = {(tuple(row), tuple(numbers)) for row, numbers
             in zip(ids.tolist(), commit_steps.tolist())}
    assert drawn <= {key for key, (p, _) in found.items() if p > 0} and len(drawn) > 5


def test_the_exact_gradient_is_that_of_all_joint_draws():
    """Away from the jumps, which are far from these outcomes."""
    lengths, temperature, h = (4, 4, 2), 0.8, 1e-3
    model = tiny(embedding_size=4, seed=5)
    weight = model.ff_out.weight
    keys = list(outcomes(model, *lengths, temperature))[::13]
    logps = exact(model, keys, 4, temperature).sum(1)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    around = []
    for sign in (1, -1):
        moved = tiny(embedding_size=4, seed=5)
        moved.ff_out.weight.data += sign * h * direction
        found = outcomes(moved, *lengths, temperature)
        around.append(torch.tensor([found[key][0] for key in keys]).log())
    expected = (around[0] - around[1]) / (2 * h)
    for logp, slope in zip(logps, expected):
        gradient = torch.autograd.grad(logp, weight, retain_graph=True)[0]
        ours = (gradient * direction).sum().item()
        assert ours == pytest.approx(slope.item(), rel=1e-2, abs=1e-2)
    assert len(keys) > 20 and expected.std() > 0.5


class Table(torch.nn.Module):
    """A model that says the same whatever it sees: probabilities (L, V) of the positions."""
    def __init__(self, probabilities):
        super().__init__()
        self.config = tiny().config
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids, attention_mask, positions):
        return self.logits.expand(len(ids), -1, -1)


@pytest.mark.parametrize('p, chance', [(0.599, 0.6), (0.6, 0.6), (0.601, 0.6 * 0.399)])
def test_a_jump_is_where_a_token_elsewhere_becomes_surer_than_what_was_committed(p, chance):
    """The first of two positions is committed at 0.6; in the other one 3 has probability p.

    Below 0.6, or in a tie, that one may have drawn anything; above it, only its unsure token. The
    gradient holds this set fixed.
    """
    model = Table([[0, 0, 0.6, 0.4], [0, 0, 1 - p, p]])
    ids, commit_steps = torch.tensor([[2, 2]]), torch.tensor([[0, 1]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    logps = exact_logps(model, PROMPT[None], ids, commit_steps, everything, 2, 1.0)
    torch.testing.assert_close(logps[0].exp(), torch.tensor([chance, 1 - p]))
    logps[0, 0].backward()
    # d log p / d logit = 1 - p for the token itself, -p for the other one
    slope = p if chance < 0.5 else 0.0
    expected = torch.tensor([[0, 0, 0.4, -0.4], [0, 0, slope, -slope]])
    torch.testing.assert_close(model.logits.grad, expected)


def test_ties_of_a_sure_model_are_finite():
    model = Table([[0, 0, 1.0, 0], [0, 0, 1.0, 0]])
    ids, commit_steps = torch.tensor([[2, 2]]), torch.tensor([[1, 0]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    logps = exact_logps(model, PROMPT[None], ids, commit_steps, everything, 2, 0.9)
    logps.sum().backward()
    assert torch.equal(logps, torch.zeros(1, 2)) and (model.logits.grad == 0).all()


def test_a_step_shares_its_second_product_equally():
    model = bias(tiny(), {EOS: -1e4, MASK: -1e4})
    prompt_ids = tokens(6, 5)
    unmasked, everything = torch.zeros(6, 5).bool(), torch.ones(6, 8).bool()
    ids, commit_steps = generate(model, prompt_ids, 8, 4, 4, 1.0)
    own = completion_logps(model, prompt_ids, ids, unmasked, views=segment_views(commit_steps, 4))
    shares = exact_logps(model, prompt_ids, ids, commit_steps, everything, 4, 1.0) - own
    for step in range(4):
        of_step = shares[commit_steps == step].view(6, 2)
        torch.testing.assert_close(of_step[:, 0], of_step[:, 1])
        passes_over = step % 2 == 0              # the last step of a block commits all there is
        assert (of_step.min() < -0.1) == passes_over and of_step.max() < 1e-5


def test_blocks_of_one_token_are_scored_from_left_to_right():
    model = bias(tiny(), {EOS: -1e4, MASK: -1e4})
    prompt_ids, unmasked = tokens(6, 5), torch.zeros(6, 5).bool()
    ids, commit_steps = generate(model, prompt_ids, 4, 1, 4, 1.0)
    views = draw_views('ar', 1, ids, commit_steps)
    expected = completion_logps(model, prompt_ids, ids, unmasked, views=views)
    everything = torch.ones(6, 4).bool()
    found = exact_logps(model, prompt_ids, ids, commit_steps, everything, 1, 1.0)
    torch.testing.assert_close(found, expected)
