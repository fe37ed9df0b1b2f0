"""What sample.py claims: LLaDA's sampler, its distribution at a temperature, and no idle work.

generate is held against generate_plain, and both against the official sampler's numbers.
"""
import inspect
import sys
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

import sample
from loglik import completion_logps
from model import LLaDA, load
from sample import choose, commit_counts, denoise, draw, generate, generate_plain
from tiny import EOS, GOLDEN, MASK, V, bias, left_pad, says, tiny, tokens

NEVER = {EOS: -1e4}                              # completions that never end
# gen_length, block_length, steps: even, one block, steps that do not divide the block, one token
# per step, one step per block, more steps than tokens, blocks of one
LENGTHS = [(16, 8, 8), (12, 12, 4), (16, 8, 6), (14, 7, 6), (12, 6, 12), (12, 4, 3), (12, 6, 20),
           (5, 1, 5), (6, 6, 13)]


def streams(rows, seed=0):
    """A generator per row, of the seed and the row's number."""
    return [torch.Generator().manual_seed(1000 * seed + row) for row in rows]


def states(model, prompt_ids, *args, **knobs):
    """The completions before the first step and after every step."""
    P = prompt_ids.size(1)
    found = [ids[:, P:].clone() for ids in denoise(model, prompt_ids, *args, **knobs)]
    return [torch.full_like(found[0], MASK)] + found[:-1]        # the last is repeated


def record(module, what):
    """A list that grows by what(input) at each forward pass of the module."""
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(what(inputs[0])))
    return seen


@torch.no_grad()
def guided_loop(model, prompt, gen_length, block_length, steps, cfg_scale):
    """LLaDA's sampler with guidance at temperature 0, for one prompt (P,), token by token."""
    P = len(prompt)
    ids = torch.cat((prompt, torch.full((gen_length,), MASK)))
    steps_per_block = steps * block_length // gen_length
    for first in range(P, P + gen_length, block_length):
        for step in range(steps_per_block):
            unconditional = ids.clone()
            unconditional[:P] = MASK
            given = model(ids[None])[0].double()
            blank = model(unconditional[None])[0].double()
            logits = blank + (cfg_scale + 1) * (given - blank)
            logits[:, MASK] = -torch.inf
            confidence, best = logits.softmax(-1).max(-1)
            masks = [k for k in range(first, first + block_length) if ids[k] == MASK]
            masks.sort(key=lambda k: -confidence[k])
            count = block_length // steps_per_block + (step < block_length % steps_per_block)
            for k in masks[:count]:
                ids[k] = best[k]
    return ids[P:]


# ---- the same tokens as LLaDA's own loop ----

@pytest.mark.parametrize('gen_length, block_length, steps, cfg_scale',
                         [(32, 8, 16, 0.0), (32, 8, 16, 1.5), (64, 32, 64, 0.0)])
def test_ids_match_the_official_sampler(gen_length, block_length, steps, cfg_scale):
    golden = load_file(GOLDEN / 'sampler.safetensors')
    model, prompt_ids = LLaDA.from_pretrained(GOLDEN / 'tiny-llada'), golden['prompts']
    case = f'g{gen_length}_b{block_length}_s{steps}_cfg{cfg_scale}'
    lengths = gen_length, block_length, steps
    for kind in ('llada', 'llada_banmask'):
        expected = golden[f'{case}.{kind}.output'][:, prompt_ids.size(1):]
        assert torch.equal(generate(model, prompt_ids, *lengths, cfg_scale=cfg_scale), expected)
        if not cfg_scale:
            assert torch.equal(generate_plain(model, prompt_ids, *lengths), expected)


@pytest.mark.parametrize('lengths', LENGTHS)
def test_guidance_equals_a_loop_by_hand(lengths):
    model, prompt_ids = bias(tiny(), NEVER), tokens(3, 7)
    for cfg_scale in (0.0, 1.5):
        expected = [guided_loop(model, prompt, *lengths, cfg_scale) for prompt in prompt_ids]
        ours = generate(model, prompt_ids, *lengths, cfg_scale=cfg_scale)
        assert torch.equal(ours, torch.stack(expected))
    assert ours.unique().numel() > 3, 'a model without opinions would prove nothing'


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('temperature', [0.0, 0.8])
@pytest.mark.parametrize('remasking', ['low_confidence', 'random'])
def test_generate_equals_the_plain_loop(lengths, temperature, remasking):
    """Up to the block in which a completion ends; after it there is eos."""
    model, prompt_ids = tiny(seed=2, end_ids=(EOS, 7, 9)), tokens(40, 6)
    arguments = bias(model, {EOS: 0.5, 7: 0.5}), prompt_ids, *lengths, temperature
    plain = generate_plain(*arguments, remasking, streams(range(40)))
    ours = generate(*arguments, remasking=remasking, generators=streams(range(40)))
    gen_length, block_length, _ = lengths
    blocks = set()
    for expected, completion in zip(plain, ours):
        ends = [k for k in range(gen_length) if expected[k] in (EOS, 7, 9)]
        block = (ends + [gen_length])[0] // block_length
        stop = block_length * (block + 1)
        assert torch.equal(completion[:stop], expected[:stop])
        assert (completion[stop:] == EOS).all()
        blocks.add(block)
    assert len(blocks) > 1, 'rows must end in several blocks, or some not at all'


@pytest.mark.parametrize('knobs', [dict(), dict(cfg_scale=1.5), dict(remasking='random'),
                                   dict(threshold=0.15), dict(remasking='random', threshold=0.6),
                                   dict(cache=True, threshold=0.15),
                                   dict(cache=True, cfg_scale=1.5, threshold=0.15)])
def test_a_row_depends_neither_on_padding_nor_on_the_rows_beside_it(knobs):
    model = bias(tiny(seed=1), {EOS: 0.5})
    prompts = [tokens(n, seed=n) for n in (1, 6, 4, 9, 5, 7)]
    prompt_ids, attention_mask = left_pad(prompts)
    knobs = dict(gen_length=12, block_length=4, steps=6, temperature=0.7, **knobs)
    together = generate(model, prompt_ids, attention_mask=attention_mask,
                        generators=streams(range(6)), **knobs)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], generators=streams([row]), **knobs)
        assert torch.equal(together[[row]], alone)
    order = torch.tensor([3, 0, 5, 1])
    some = generate(model, prompt_ids[order], attention_mask=attention_mask[order].long(),
                    generators=streams(order.tolist()), **knobs)
    assert torch.equal(some, together[order])
    seen = generate(model, prompt_ids, generators=streams(range(6)), **knobs)
    assert not torch.equal(seen, together), 'padding that nobody hides must matter'


# ---- what is drawn and what is committed ----

def test_commit_counts():
    assert commit_counts(8, 4) == [2, 2, 2, 2]
    assert commit_counts(8, 3) == [3, 3, 2]
    assert commit_counts(7, 5) == [2, 2, 1, 1, 1]
    assert commit_counts(3, 8) == [1, 1, 1]
    assert commit_counts(5, 1) == [5]


def test_confidence_is_the_unscaled_probability_of_the_chosen_token():
    logits = torch.randn(3, 4, V, generator=torch.Generator().manual_seed(0))
    without_mask = logits.clone()
    without_mask[..., MASK] = -torch.inf
    for temperature in (0.0, 0.3, 3.0):
        chosen, confidence = choose(logits.clone(), MASK, temperature, generators=streams(range(3)))
        expected = without_mask.softmax(-1).gather(-1, chosen[..., None])[..., 0]
        torch.testing.assert_close(confidence, expected)
    greedy, _ = choose(logits, MASK)             # by default, without a generator
    assert torch.equal(greedy, without_mask.argmax(-1))


def test_random_confidence_is_uniform_and_the_token_still_the_best():
    logits = torch.zeros(2, 5000, 10)
    logits[..., 7] = 9.0
    chosen, confidence = choose(logits, MASK, 0.0, 'random', streams(range(2)))
    assert (chosen == 7).all() and not torch.equal(confidence[0], confidence[1])
    counts = (confidence * 10).long().flatten().bincount(minlength=10)
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 33.7, '99.99 % of uniform draws are below'


@pytest.mark.parametrize('knobs', [dict(), dict(cfg_scale=1.5), dict(remasking='random'),
                                   dict(threshold=0.5), dict(cache=True)])
def test_the_mask_is_never_sampled(knobs):
    model, prompt_ids = bias(tiny(), {MASK: 50.0}), tokens(3, 5)
    for temperature in (0.0, 0.9):
        assert (generate(model, prompt_ids, 8, 4, 4, temperature, **knobs) != MASK).all()
        assert (generate_plain(model, prompt_ids, 8, 4, 4, temperature) != MASK).all()


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    logits = torch.linspace(-2.0, 1.0, 10)
    without_mask = logits.where(torch.arange(10) != MASK, -torch.inf)
    expected = 20000 * (without_mask / temperature).softmax(-1)
    torch.manual_seed(0)                         # the global generator is used if none is given
    prompt_ids = tokens(20000, 1, high=10)
    completion_ids = generate(says(logits.tolist()), prompt_ids, 1, 1, 1, temperature)
    counts = completion_ids.flatten().bincount(minlength=10)
    kept = expected > 0
    chi2 = ((counts - expected) ** 2 / expected)[kept].sum()
    assert kept.sum() == 9 and counts[MASK] == 0 and expected[kept].min() > 5
    assert chi2 < 31.8, f'99.99 % of draws with 8 degrees of freedom are below: {counts.tolist()}'


def test_noise_is_float32_for_a_bfloat16_model():
    """Of 50,000 equal logits bfloat16 noise would choose among a few ties, the first of them."""
    logits = torch.zeros(100, 1, 50000, dtype=torch.bfloat16)
    chosen, confidence = choose(logits, MASK, 1.0, generators=streams(range(100)))
    assert chosen.unique().numel() > 95
    assert abs(chosen.float().mean() / 50000 - 0.5) < 0.15
    assert confidence.dtype == torch.float32


@pytest.mark.parametrize('remasking', ['low_confidence', 'random'])
def test_all_that_is_random_comes_from_the_generators(remasking):
    model = tiny()

    def completions(seed):
        return generate(model, tokens(4, 5), 8, 4, 4, 1.0, remasking=remasking,
                        generators=streams(range(4), seed))
    state = torch.random.get_rng_state()
    first, same, other = completions(0), completions(0), completions(1)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- cache and threshold ----

@pytest.mark.parametrize('knobs', [dict(), dict(cfg_scale=1.5), dict(threshold=0.2),
                                   dict(threshold=0.2, cfg_scale=1.5)])
@pytest.mark.parametrize('eos_bias', [-1e4, 0.5])
def test_cache_is_exact_in_one_layer(knobs, eos_bias):
    """A first layer's keys and values depend on their own token only, so none can be stale."""
    model = bias(tiny(n_layers=1), {EOS: eos_bias})
    prompt_ids, attention_mask = left_pad([tokens(n, seed=n) for n in (5, 8, 3, 7)])
    exact, cached = (generate(model, prompt_ids, 16, 4, 16, attention_mask=attention_mask,
                              cache=cache, **knobs) for cache in (False, True))
    assert torch.equal(exact, cached)


@pytest.mark.parametrize('knobs', [dict(), dict(threshold=0.3)])
def test_cache_is_exact_where_the_block_is_the_whole_sequence(knobs):
    model, no_prompt = bias(tiny(), NEVER), torch.zeros(3, 0, dtype=torch.long)
    exact, cached = (generate(model, no_prompt, 8, 8, 8, 0.8, generators=streams(range(3)),
                              cache=cache, **knobs) for cache in (False, True))
    assert torch.equal(exact, cached)


def test_cached_keys_are_new_in_the_first_step_of_every_block_and_old_in_the_others():
    model, prompt_ids = bias(tiny(seed=3), NEVER), tokens(30, 10)
    widths = record(model.wte, lambda ids: ids.size(1))
    cached = states(model, prompt_ids, 8, 4, 8, cache=True)
    assert widths == [18, 4, 4, 4] * 2
    exact = states(model, prompt_ids, 8, 4, 8)
    assert torch.equal(cached[1], exact[1])
    after_first_block = torch.cat((prompt_ids, cached[4][:, :4]), dim=1)
    again = states(model, after_first_block, 4, 4, 4)
    assert torch.equal(cached[5][:, 4:], again[1])
    assert not torch.equal(cached[8], exact[8]), 'a cache that changes nothing would prove nothing'


def test_threshold_commits_what_passes_and_always_one_block_after_block():
    model, prompt_ids = bias(tiny(), NEVER), tokens(6, 5)
    seen, numbers = states(model, prompt_ids, 16, 8, 8, threshold=0.2), set()
    for before, after in zip(seen, seen[1:]):
        logits = model(torch.cat((prompt_ids, before), 1))[:, 5:].detach()
        logits[..., MASK] = -torch.inf
        confidence, masked = logits.softmax(-1).amax(-1), before == MASK
        if masked[:, :8].any():
            masked[:, 8:] = False                # the second block waits for the first
        for row in masked.any(1).nonzero().flatten():
            passed = (confidence[row] >= 0.2) & masked[row]
            surest = confidence[row].where(masked[row], -1).argmax()
            expected = passed if passed.any() else torch.arange(16) == surest
            committed = (before != after)[row]
            assert torch.equal(committed, expected)
            numbers.add(int(committed.sum()))
    assert {1, 2} < numbers, 'a threshold that always does the same would prove nothing'
    assert (seen[-1] != MASK).all()


@pytest.mark.parametrize('cache', [False, True])
def test_low_thresholds_need_fewer_forwards(cache):
    model, prompt_ids, forwards = bias(tiny(), NEVER), tokens(3, 5), []
    calls = record(model.wte, len)
    for threshold in (1.0, 0.15, 1e-9):
        calls.clear()
        generate(model, prompt_ids, 16, 8, 4, cache=cache, threshold=threshold)
        forwards.append(len(calls))
    assert forwards == sorted(set(forwards), reverse=True), forwards
    assert (forwards[0], forwards[-1]) == (16, 2), 'one token per forward, and one block'


@pytest.mark.parametrize('knobs', [dict(), dict(cache=True), dict(cache=True, cfg_scale=1.5)])
def test_rows_that_have_filled_their_block_are_left_out(knobs):
    """A batch costs as many rows as its prompts one by one."""
    model = bias(tiny(), NEVER)
    sizes = record(model.wte, len)
    prompt_ids, attention_mask = left_pad([tokens(n, seed=n) for n in (5, 8, 3, 7, 6)])
    knobs = dict(gen_length=16, block_length=8, steps=8, threshold=0.15, **knobs)
    generate(model, prompt_ids, attention_mask=attention_mask, **knobs)
    assert len(set(sizes)) > 2, f'rows must fill their block at different steps: {sizes}'
    together = sum(sizes)
    sizes.clear()
    for ids, real in zip(prompt_ids, attention_mask):
        generate(model, ids[None], attention_mask=real[None], **knobs)
    assert sum(sizes) == together


# ---- no work that cannot matter ----

def test_the_head_runs_at_masks_only_and_no_step_is_idle():
    model = bias(tiny(), NEVER)
    positions = record(model.ff_out, lambda h: h.shape[:-1].numel())
    generate(model, tokens(3, 10), 8, 4, 20)     # more steps than tokens
    assert positions == [3 * masks for masks in (4, 3, 2, 1)] * 2


def test_rows_that_have_ended_cost_nothing():
    model = bias(tiny(seed=2), {EOS: 2.0})
    sizes = record(model.wte, len)
    completion_ids = generate(model, tokens(24, 6), 16, 4, 8)
    active = [24]
    for stop in (4, 8, 12):
        active.append(int((completion_ids[:, :stop] != EOS).all(1).sum()))
    assert sizes == [n for n in active for _ in range(2)] and 0 < active[-1] < active[1] < 24
    sizes.clear()
    completion_ids = generate(bias(model, {EOS: 1e4}), tokens(5, 6), 16, 4, 8)
    assert sizes == [5, 5] and (completion_ids == EOS).all(), 'all ended in the first block'
    order = torch.empty_like(completion_ids)
    generate(model, tokens(5, 6), 16, 4, 8, order=order)
    assert order.max() == 1, 'what is filled in after the end counts as of the last step'


# ---- around it ----

@pytest.mark.parametrize('lengths', [(10, 4, 5), (8, 16, 8), (8, 4, 3), (8, 4, 0), (0, 4, 4)])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError):
        generate(tiny(), tokens(1, 3), *lengths)


def test_completions_can_be_trained_on():
    model, prompt_ids = tiny(), tokens(2, 5)
    kept = prompt_ids.clone()
    completion_ids = generate(model, prompt_ids, 8, 4, 4)
    assert completion_ids.shape == (2, 8) and torch.equal(prompt_ids, kept)
    prompt_mask = torch.zeros_like(prompt_ids, dtype=torch.bool)
    completion_logps(model, prompt_ids, completion_ids, prompt_mask).sum().backward()
    model(completion_ids).sum().backward()       # both would raise on an inference tensor


def test_prompts_are_padded_on_the_left():
    ids, attention_mask = sample.left_pad([[5, 6, 7], [8]], EOS, 'cpu')
    assert ids.tolist() == [[5, 6, 7], [EOS, EOS, 8]]
    assert attention_mask.tolist() == [[True] * 3, [False, False, True]]
    assert sample.left_pad([[5, 6], [7, 8]], EOS, 'cpu')[1] is None


def test_shuffled_gives_all_once_in_an_order_of_the_epoch_and_the_key():
    def epoch(number, *key):
        return [sample.shuffled('abcdefgh', 8 * number + i, *key) for i in range(8)]
    epochs = [epoch(0, 0), epoch(1, 0), epoch(0, 1)]
    assert all(sorted(items) == list('abcdefgh') for items in epochs)
    assert len(set(map(tuple, epochs))) == 3 and epoch(0, 0) == epochs[0]


def test_the_script_shows_a_completion_of_the_newest_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        sample.newest_model()
    for part in load('nano'):
        part.save_pretrained(tmp_path / 'out/run/model')

    def shown(*flags):
        monkeypatch.setattr(sys, 'argv', ['sample.py', '--temperature', '1', *flags])
        sample.main()
        return capsys.readouterr().out
    first = shown('--prompt', 'How many?')
    assert 'How many?' in first and '\n  16 ' in first
    assert shown('--prompt', 'How many?') == first != shown('--prompt', 'How many?', '--seed', '1')
    assert shown('--task', 'sudoku', '--cache') != shown('--task', 'sudoku', '--seed', '1')


# ---- the moving picture ----

def test_a_picture_shows_every_token_when_it_was_committed(tmp_path):
    path = tmp_path / 'a.svg'
    draw(str(path), [('a < b', ['<x>', '\n', '12', ''], [1, 0, 2, 3])], seconds=1)
    root = ElementTree.parse(path).getroot()
    name = '{http://www.w3.org/2000/svg}'
    title, *texts = root.iter(name + 'text')
    assert title.text == 'a < b' and [text.text for text in texts] == ['<x>', '12']
    begins = [text.find(name + 'animate').get('keyTimes') for text in texts]
    assert begins == [f'0;{2 / 9:.4f}', f'0;{3 / 9:.4f}']
    assert float(texts[1].get('y')) > float(texts[0].get('y')), 'a line of its own'
    assert [rect.find(name + 'animate').get('values') for rect in root.iter(name + 'rect')] == [
        '1;0', '1;0'], 'a mask stands there until then'


@pytest.mark.parametrize('function', [generate_plain, generate])
def test_the_defaults_are_llada_s(function):
    knobs = {name: knob.default for name, knob in inspect.signature(function).parameters.items()}
    expected = dict(gen_length=256, block_length=32, steps=128, temperature=0.0,
                    remasking='low_confidence')
    assert {name: knobs[name] for name in expected} == expected
    assert not any(knobs.get(name) for name in ('cfg_scale', 'cache', 'threshold'))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_top_prob_is_the_highest_probability_whatever_was_drawn(temperature):
    logits = torch.randn(1, 5, V, generator=torch.Generator().manual_seed(0))
    _, confidence = choose(logits.clone(), MASK, temperature, 'top_prob')
    logits[..., MASK] = -torch.inf
    torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1))
