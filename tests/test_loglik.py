"""What loglik.py claims: d1's one-step estimate, its siblings, and an exact likelihood.

The exact one is held against all joint draws of a small random model, enumerated.
"""
import itertools

import pytest
import torch
from safetensors.torch import load_file

from grpo import up_to_end
from loglik import (View, completion_logps, draw_views, exact_logps, random_prompt_mask,
                    stepmerge_views)
from model import LLaDA
from sample import commit_counts, generate
from tiny import EOS, GOLDEN, MASK, bias, tiny, tokens

PROMPT_MASK = torch.tensor([[True, False, False, True], [False, False, False, False]])


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


# ---- other estimators ----

def test_noise_comes_from_its_generator_only():
    def noise(seed):
        g, ids = torch.Generator().manual_seed(seed), tokens(4, 50)
        views = draw_views('coupled', 1, ids, None, g) + draw_views('elbo', 2, ids, None, g)
        return [random_prompt_mask(ids, 0.3, g)] + [view.masked for view in views]
    state = torch.random.get_rng_state()
    for first, again, other in zip(noise(0), noise(0), noise(1)):
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state), 'the official code reseeds everybody'


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
    views = stepmerge_views(COMMIT_STEPS, 2)
    assert scored_in(views) == [[[0], [1], [0], [1]], [[1], [0], [0], [1]]]
    assert len(stepmerge_views(COMMIT_STEPS, 99)) == int(COMMIT_STEPS.max()) + 1
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


@torch.no_grad()
def test_log_probs_are_the_weighted_sum_over_views_and_0_outside_the_completion_mask():
    model, prompt_ids = tiny(), tokens(2, 4)
    kept = prompt_ids.clone(), COMPLETION_IDS.clone()
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    everything = torch.ones(2, 4).bool()
    elbo = draw_views('elbo', 3, COMPLETION_IDS, None, torch.Generator().manual_seed(1))
    for views in ([View(everything, everything)], elbo):
        expected = torch.zeros(2, 4)
        for view in views:
            prompt = prompt_ids.masked_fill(PROMPT_MASK, MASK)
            ids = torch.cat((prompt, COMPLETION_IDS.masked_fill(view.masked, MASK)), 1)
            logps = model(ids)[:, 4:].log_softmax(-1).gather(-1, COMPLETION_IDS[..., None])[..., 0]
            expected += view.weight * logps * view.scored
        arguments = model, prompt_ids, COMPLETION_IDS, PROMPT_MASK
        found = completion_logps(*arguments, mask, views)
        torch.testing.assert_close(found, expected * mask)
        torch.testing.assert_close(completion_logps(*arguments, views=views), expected)
    assert torch.equal(prompt_ids, kept[0]) and torch.equal(COMPLETION_IDS, kept[1])


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
    completion_mask = up_to_end(ids, model.config.end_ids)
    return exact_logps(model, PROMPT.expand(len(ids), -1), ids, completion_mask, commit_steps,
                       block_length, temperature)


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
        return self.logits[positions - len(PROMPT)]


@pytest.mark.parametrize('p, chance', [(0.599, 0.6), (0.6, 0.6), (0.601, 0.6 * 0.399)])
def test_a_jump_is_where_a_token_elsewhere_becomes_surer_than_what_was_committed(p, chance):
    """The first of two positions is committed at 0.6; in the other one 3 has probability p.

    Below 0.6, or in a tie, that one may have drawn anything; above it, only its unsure token. The
    gradient holds this set fixed.
    """
    model = Table([[0, 0, 0.6, 0.4], [0, 0, 1 - p, p]])
    ids, commit_steps = torch.tensor([[2, 2]]), torch.tensor([[0, 1]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    logps = exact_logps(model, PROMPT[None], ids, everything, commit_steps, 2, 1.0)
    torch.testing.assert_close(logps[0].exp(), torch.tensor([chance, 1 - p]))
    logps[0, 0].backward()
    # d log p / d logit = 1 - p for the token itself, -p for the other one
    slope = p if chance < 0.5 else 0.0
    expected = torch.tensor([[0, 0, 0.4, -0.4], [0, 0, slope, -slope]])
    torch.testing.assert_close(model.logits.grad, expected)


@pytest.mark.parametrize('length', [1, 2])
def test_an_impossible_rollout_has_probability_0(length):
    """The first token, or what was drawn after it if it is the end (length 1), has p = 0."""
    rows = [[0, 0, 1.0, 0], [0, 0, 0.5, 0.5]]
    model = Table(rows if length == 2 else rows[::-1])
    mask = torch.arange(2)[None] < length
    logps = exact_logps(model, PROMPT[None], torch.tensor([[3, 3]]), mask, torch.tensor([[0, 1]]),
                        2, 1.0)
    assert logps.sum() == -torch.inf


def test_ties_of_a_sure_model_are_finite():
    model = Table([[0, 0, 1.0, 0], [0, 0, 1.0, 0]])
    ids, commit_steps = torch.tensor([[2, 2]]), torch.tensor([[1, 0]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    logps = exact_logps(model, PROMPT[None], ids, everything, commit_steps, 2, 0.9)
    logps.sum().backward()
    assert torch.equal(logps, torch.zeros(1, 2)) and (model.logits.grad == 0).all()


def test_what_a_sure_model_drew_is_sure():
    """Of p = 1 - 1e-6 float32 keeps little: the sampler may commit the less sure token first."""
    g = torch.Generator().manual_seed(0)
    everything = torch.ones(1, 2, dtype=torch.bool)
    for _ in range(100):
        model = Table([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
        model.logits.data[:, 2] += 30 + 20 * torch.rand(2, generator=g)
        model.logits.data[:, 3] = model.logits.data[:, 2] - 13 - 2 * torch.rand(2, generator=g)
        ids, commit_steps = generate(model, PROMPT[None], 2, 2, 2, 0.9, generators=[g])
        with torch.no_grad():
            logps = exact_logps(model, PROMPT[None], ids, everything, commit_steps, 2, 0.9)
        assert (ids == 2).all() and logps.sum() > -1e-3


def test_a_step_shares_its_second_product_equally():
    model = bias(tiny(), {EOS: -1e4, MASK: -1e4})
    prompt_ids = tokens(6, 5)
    unmasked, everything = torch.zeros(6, 5).bool(), torch.ones(6, 8).bool()
    ids, commit_steps = generate(model, prompt_ids, 8, 4, 4, 1.0)
    own = completion_logps(model, prompt_ids, ids, unmasked, views=stepmerge_views(commit_steps, 4))
    shares = exact_logps(model, prompt_ids, ids, everything, commit_steps, 4, 1.0) - own
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
    found = exact_logps(model, prompt_ids, ids, everything, commit_steps, 1, 1.0)
    torch.testing.assert_close(found, expected)
