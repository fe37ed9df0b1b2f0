"""What sample.py claims: LLaDA's loop, its distribution at a temperature, and no idle work."""
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rewards
import sample
from loglik import completion_logps
from model import LLaDA, load, save_tokenizer
from sample import choose, commit_counts, generate
from tiny import EOS, GOLDEN, MASK, V, bias, left_pad, says, tiny, tokens

NEVER = {EOS: -1e4}                              # completions that never end
# gen_length, block_length, steps: even, one block, steps that do not divide the block, one token
# per step, one step per block, more steps than tokens, blocks of one
LENGTHS = [(16, 8, 8), (12, 12, 4), (16, 8, 6), (14, 7, 6), (12, 6, 12), (12, 4, 3), (12, 6, 20),
           (5, 1, 5), (6, 6, 13)]


def streams(rows, seed=0):
    """A generator per row, of the seed and the row's number."""
    return [torch.Generator().manual_seed(1000 * seed + row) for row in rows]


def record(module, what):
    """A list that grows by what(input) at each forward pass of the module."""
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(what(inputs[0])))
    return seen


def assert_equal(ours, expected):
    """Two pairs of ids and commit steps are the same."""
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


# ---- choose and commit_counts ----

def test_confidence_is_the_probability_at_temperature_1_of_the_chosen_token():
    logits = torch.randn(3, 4, V, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 0.3, 3.0):
        chosen, confidence = choose(logits, temperature, streams(range(3)))
        expected = logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]
        torch.testing.assert_close(confidence, expected)
    greedy, _ = choose(logits)                   # by default, without a generator
    assert torch.equal(greedy, logits.argmax(-1)) and not torch.equal(greedy, chosen)


def test_noise_is_float32_for_a_bfloat16_model():
    """Of 50,000 equal logits bfloat16 noise would choose among a few ties, the first of them."""
    logits = torch.zeros(100, 1, 50000, dtype=torch.bfloat16)
    chosen, confidence = choose(logits, 1.0, streams(range(100)))
    assert chosen.unique().numel() > 95
    assert abs(chosen.float().mean() / 50000 - 0.5) < 0.15
    assert confidence.dtype == torch.float32


def test_commit_counts():
    assert commit_counts(8, 4) == [2, 2, 2, 2]
    assert commit_counts(8, 3) == [3, 3, 2]
    assert commit_counts(7, 5) == [2, 2, 1, 1, 1]
    assert commit_counts(3, 8) == [1, 1, 1]
    assert commit_counts(5, 1) == [5]


# ---- generate: the same tokens, at the same steps, as LLaDA's own loop ----

@pytest.mark.parametrize('gen_length, block_length, steps, cfg_scale',
                         [(32, 8, 16, 0.0), (32, 8, 16, 1.5), (64, 32, 64, 0.0)])
def test_ids_match_the_official_sampler(gen_length, block_length, steps, cfg_scale):
    golden = load_file(GOLDEN / 'sampler.safetensors')
    model, prompt_ids = LLaDA.from_pretrained(GOLDEN / 'tiny-llada'), golden['prompts']
    ids, _ = generate(model, prompt_ids, gen_length, block_length, steps, cfg_scale=cfg_scale)
    case = f'g{gen_length}_b{block_length}_s{steps}_cfg{cfg_scale}'
    for kind in ('llada', 'llada_banmask'):
        assert torch.equal(ids, golden[f'{case}.{kind}.output'][:, prompt_ids.size(1):])


@torch.no_grad()
def llada_loop(model, prompt, gen_length, block_length, steps, temperature, cfg_scale, generator):
    """LLaDA's sampler for one prompt (P,), in plain lines: ids (L,), commit_steps (L,)."""
    P, end_ids = len(prompt), model.config.end_ids
    ids = torch.cat((prompt, torch.full((gen_length,), MASK)))
    commit_steps = torch.full_like(ids, -1)
    steps_per_block = steps * block_length // gen_length
    number = 0
    for first in range(P, P + gen_length, block_length):
        block = range(first, first + block_length)
        for step in range(steps_per_block):
            count = block_length // steps_per_block + (step < block_length % steps_per_block)
            if count == 0:
                break                            # more steps than tokens
            logits = model(ids[None])[0]
            if cfg_scale:
                unprompted = ids.clone()
                unprompted[:P] = MASK
                unconditional = model(unprompted[None])[0]
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            logits[:, MASK] = -torch.inf
            masks = [k for k in block if ids[k] == MASK]
            scores = logits[masks]
            if temperature:
                uniform = torch.empty_like(scores).exponential_(generator=generator)
                scores = scores / temperature - uniform.log()
            drawn = dict(zip(masks, scores.argmax(-1)))
            probabilities = logits.softmax(-1)
            masks.sort(key=lambda k: -probabilities[k, drawn[k]])
            for k in masks[:count]:
                ids[k] = drawn[k]
                commit_steps[k] = number
            number += 1
        if any(ids[k] in end_ids for k in block):
            ids[block.stop:] = EOS
            commit_steps[block.stop:] = number - 1
            break
    return ids[P:], commit_steps[P:]


@pytest.mark.parametrize('lengths', LENGTHS)
def test_generate_is_llada_s_loop(lengths):
    model = bias(tiny(seed=2, end_ids=(EOS, 7, 9)), {EOS: 0.5, 7: 0.5})
    prompt_ids, filled_up = tokens(6, 6), set()
    for temperature, cfg_scale in ((0.0, 0.0), (0.0, 1.5), (0.8, 0.0), (0.8, 1.5)):
        ids, commit_steps = generate(model, prompt_ids, *lengths, temperature, cfg_scale,
                                     generators=streams(range(6)))
        for row, generator in enumerate(streams(range(6))):
            expected = llada_loop(model, prompt_ids[row], *lengths, temperature, cfg_scale,
                                  generator)
            assert_equal((ids[row], commit_steps[row]), expected)
            filled_up.add(int(commit_steps[row].max()))
    assert len(filled_up) > 1 or lengths[0] == lengths[1], 'rows must end in several blocks'
    assert ids.unique().numel() > 3, 'a model without opinions would prove nothing'


def test_steps_are_numbered_through_the_completion_and_commit_their_counts():
    _, commit_steps = generate(bias(tiny(), NEVER), tokens(4, 6), 14, 7, 6, 0.8)
    for row in commit_steps:
        assert row.bincount().tolist() == [3, 2, 2] * 2
        assert row[:7].max() < 3 <= row[7:].min(), 'each step within its block'


KNOBS = dict(exact=dict(), guided=dict(cfg_scale=1.5), cache=dict(cache=True),
             threshold=dict(threshold=0.15), both=dict(cache=True, threshold=0.15))


@pytest.mark.parametrize('knobs', KNOBS.values(), ids=KNOBS)
def test_a_completion_depends_neither_on_padding_nor_on_the_rows_beside_it(knobs):
    model = bias(tiny(seed=1), {EOS: 0.5})
    prompts = [tokens(n, seed=n) for n in (1, 6, 4, 9, 5, 7)]
    prompt_ids, attention_mask = left_pad(prompts)
    knobs = dict(gen_length=12, block_length=4, steps=6, temperature=0.7, **knobs)
    together = generate(model, prompt_ids, attention_mask=attention_mask,
                        generators=streams(range(6)), **knobs)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], generators=streams([row]), **knobs)
        assert_equal(alone, [both[[row]] for both in together])
    order = torch.tensor([3, 0, 5, 1])
    some = generate(model, prompt_ids[order], attention_mask=attention_mask[order].long(),
                    generators=streams(order.tolist()), **knobs)
    assert_equal(some, [both[order] for both in together])
    seen, _ = generate(model, prompt_ids, generators=streams(range(6)), **knobs)
    assert not torch.equal(seen, together[0]), 'padding that nobody hides must matter'


@pytest.mark.parametrize('knobs', KNOBS.values(), ids=KNOBS)
def test_the_mask_is_never_drawn_and_none_is_left(knobs):
    model, prompt_ids = bias(tiny(), {MASK: 50.0}), tokens(3, 5)
    for temperature in (0.0, 0.9):
        assert (generate(model, prompt_ids, 8, 4, 4, temperature, **knobs)[0] != MASK).all()


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    logits = torch.linspace(-2.0, 1.0, 10)
    without_mask = logits.where(torch.arange(10) != MASK, -torch.inf)
    expected = 20000 * (without_mask / temperature).softmax(-1)
    torch.manual_seed(0)                         # the global generator is used if none is given
    ids, _ = generate(says(logits.tolist()), tokens(20000, 1, high=10), 1, 1, 1, temperature)
    counts = ids.flatten().bincount(minlength=10)
    kept = expected > 0
    chi2 = ((counts - expected) ** 2 / expected)[kept].sum()
    assert kept.sum() == 9 and counts[MASK] == 0 and expected[kept].min() > 5
    assert chi2 < 31.8, f'99.99 % of draws with 8 degrees of freedom are below: {counts.tolist()}'


def test_the_head_runs_at_masks_only_and_no_step_is_idle():
    model = bias(tiny(), NEVER)
    positions = record(model.ff_out, lambda h: h.shape[:-1].numel())
    generate(model, tokens(3, 10), 8, 4, 20)     # more steps than tokens
    assert positions == [3 * masks for masks in (4, 3, 2, 1)] * 2


@pytest.mark.parametrize('knobs', [dict(), dict(cache=True)])
def test_rows_that_have_ended_cost_nothing(knobs):
    model = bias(tiny(seed=2), {EOS: 2.0})
    sizes = record(model.wte, len)
    ids, _ = generate(model, tokens(24, 6), 16, 4, 8, **knobs)
    active = [24]
    for stop in (4, 8, 12):
        active.append(int((ids[:, :stop] != EOS).all(1).sum()))
    assert sizes == [n for n in active for _ in range(2)] and 0 < active[-1] < active[1] < 24
    sizes.clear()
    ids, commit_steps = generate(bias(model, {EOS: 1e4}), tokens(5, 6), 16, 4, 8, **knobs)
    assert sizes == [5, 5] and (ids == EOS).all(), 'all ended in the first block'
    assert commit_steps.max() == 1 and (commit_steps[:, 4:] == 1).all()


@pytest.mark.parametrize('lengths', [(10, 4, 5), (8, 16, 8), (8, 4, 3), (8, 4, 0), (0, 4, 4),
                                     (8, 0, 4)])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError):
        generate(tiny(), tokens(1, 3), *lengths)


def test_completions_can_be_trained_on():
    model, prompt_ids = tiny(), tokens(2, 5)
    kept = prompt_ids.clone()
    ids, _ = generate(model, prompt_ids, 8, 4, 4)
    assert ids.shape == (2, 8) and torch.equal(prompt_ids, kept)
    prompt_mask = torch.zeros_like(prompt_ids, dtype=torch.bool)
    completion_logps(model, prompt_ids, ids, prompt_mask).sum().backward()
    model(ids).sum().backward()                  # both would raise on an inference tensor


def test_the_defaults_are_llada_s():
    knobs = {name: knob.default for name, knob in inspect.signature(generate).parameters.items()}
    expected = dict(gen_length=256, block_length=32, steps=128, temperature=0.0, cfg_scale=0.0,
                    cache=False, threshold=0.0)
    assert {name: knobs[name] for name in expected} == expected


# ---- cache and threshold ----

@pytest.mark.parametrize('threshold', [0.0, 0.2])
@pytest.mark.parametrize('eos_bias', [-1e4, 0.5])
def test_cache_is_exact_in_one_layer(threshold, eos_bias):
    """A first layer's keys and values depend on their own token only, so none can be stale."""
    model = bias(tiny(n_layers=1), {EOS: eos_bias})
    prompt_ids, attention_mask = left_pad([tokens(n, seed=n) for n in (5, 8, 3, 7)])
    exact, cached = (generate(model, prompt_ids, 16, 4, 12, attention_mask=attention_mask,
                              cache=cache, threshold=threshold) for cache in (False, True))
    assert_equal(cached, exact)


def test_cached_keys_are_new_in_the_first_step_of_every_block_and_old_in_the_others():
    model, prompt_ids = bias(tiny(seed=3), NEVER), tokens(30, 10)
    widths = record(model.wte, lambda ids: ids.size(1))
    cached, cached_steps = generate(model, prompt_ids, 8, 4, 8, cache=True)
    assert widths == [18, 4, 4, 4] * 2
    exact, exact_steps = generate(model, prompt_ids, 8, 4, 8)
    first = exact_steps == 0
    assert torch.equal(cached_steps == 0, first) and torch.equal(cached[first], exact[first])
    # the second block begins as after a prompt that ends in the first one
    again, again_steps = generate(model, torch.cat((prompt_ids, cached[:, :4]), 1), 4, 4, 4)
    first = again_steps == 0
    assert torch.equal(cached_steps[:, 4:] == 4, first)
    assert torch.equal(cached[:, 4:][first], again[first])
    assert not torch.equal(cached, exact), 'a cache that changes nothing would prove nothing'


@torch.no_grad()
def test_a_threshold_commits_what_passes_and_always_one_block_after_block():
    model, numbers = bias(tiny(), NEVER), set()
    forwards = record(model.wte, len)
    for prompt in tokens(6, 5):
        forwards.clear()
        [ids], [commit_steps] = generate(model, prompt[None], 16, 8, 8, threshold=0.2)
        assert len(forwards) == commit_steps.max() + 1, 'no step is idle'
        for step in range(int(commit_steps.max()) + 1):
            before = ids.masked_fill(commit_steps >= step, MASK)
            logits = model(torch.cat((prompt, before))[None])[0, 5:]
            logits[:, MASK] = -torch.inf
            confidence, masked = logits.softmax(-1).amax(-1), before == MASK
            if masked[:8].any():
                masked[8:] = False               # the second block waits for the first
            passed = (confidence >= 0.2) & masked
            surest = confidence.where(masked, -1).argmax()
            expected = passed if passed.any() else torch.arange(16) == surest
            assert torch.equal(commit_steps == step, expected)
            numbers.add(int(expected.sum()))
    assert {1, 2} < numbers, 'a threshold that always does the same would prove nothing'


@pytest.mark.parametrize('cache', [False, True])
def test_rows_that_have_filled_their_block_are_left_out(cache):
    """A batch costs as many rows as its prompts one by one."""
    model = bias(tiny(), NEVER)
    sizes, prompt_ids = record(model.wte, len), tokens(5, 6)
    knobs = dict(gen_length=16, block_length=8, steps=8, threshold=0.15, cache=cache)
    generate(model, prompt_ids, **knobs)
    assert len(set(sizes)) > 2, f'rows must fill their block at different steps: {sizes}'
    together = sum(sizes)
    sizes.clear()
    for prompt in prompt_ids:
        generate(model, prompt[None], **knobs)
    assert sum(sizes) == together


# ---- random streams and prompts ----

def test_streams_are_those_of_their_key():
    def numbers(*key):
        return sample.random_stream(*key).random(), sample.torch_stream('cpu', *key).initial_seed()
    assert numbers(0, 'mask', 3) == numbers(0, 'mask', 3)
    keys = [(0, 'mask', 3), (1, 'mask', 3), (0, 'rollout', 3), (0, 'mask', 4), (0, 'mask')]
    for found in zip(*[numbers(*key) for key in keys]):
        assert len(set(found)) == len(keys)


def test_shuffled_gives_all_once_in_an_order_of_the_epoch_and_the_key():
    def epoch(number, *key):
        return [sample.shuffled('abcdefgh', 8 * number + i, *key) for i in range(8)]
    epochs = [epoch(0, 0), epoch(1, 0), epoch(0, 1)]
    assert all(sorted(items) == list('abcdefgh') for items in epochs)
    assert len(set(map(tuple, epochs))) == 3 and epoch(0, 0) == epochs[0]


def test_prompts_are_padded_on_the_left():
    ids, attention_mask = sample.left_pad([[5, 6, 7], [8]], EOS, 'cpu')
    assert ids.tolist() == [[5, 6, 7], [EOS, EOS, 8]]
    assert attention_mask.tolist() == [[True] * 3, [False, False, True]]
    assert sample.left_pad([[5, 6], [7, 8]], EOS, 'cpu')[1] is None


# ---- python sample.py ----


def test_the_script_shows_a_completion_of_the_newest_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.newest_model() == 'nano'
    for name, seconds in (('mine/b', 1000), ('a', 500)):         # --name mine/b
        folder = Path('out', name, 'model')
        load('nano')[0].save_pretrained(folder)
        save_tokenizer(folder, 'nano')
        os.utime(folder, (seconds, seconds))
    assert sample.newest_model() == Path('out/mine/b/model')

    def examples(*source):
        return [dict(question=f'{source} {i}?') for i in range(3)]
    monkeypatch.setattr(rewards, 'load_examples', examples)

    def shown(*flags):
        monkeypatch.setattr(sys, 'argv', ['sample.py', '--temperature', '1', *flags])
        sample.main()
        return capsys.readouterr().out
    first = shown('--prompt', 'How many?')
    assert 'How many?' in first and '\n   2 ' in first
    assert shown('--prompt', 'How many?') == first != shown('--prompt', 'How many?', '--seed', '1')
    asked = shown('--task', 'sudoku', '--seed', '4', '--gen_length', '8')
    assert "('sudoku', 'nano', 'test') 1?" in asked
    dots = [line.count('.') for line in asked.splitlines() if line.startswith('   ')]
    assert dots == [7, 6, 5, 4, 3, 2, 1, 0], 'masks are dots; Sudoku has a token per step'
