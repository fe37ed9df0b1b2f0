"""What sample.py claims: LLaDA's sampler exactly, at temperature its distribution, and no work that cannot matter."""
import os
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file

from loglik import completion_logps
from model import LLaDA, load
from sample import check_speed, choose, commit_counts, denoise, generate
from tiny import EOS, GOLDEN, MASK, V, bias, left_pad, needs_shared, says, tiny, tokens

NEVER = {EOS: -1e4}  # completions that never end


@torch.no_grad()
def textbook(model, prompt, gen_length, block_length, steps, cfg_scale=0.0):
    """LLaDA's sampler at temperature 0 for one prompt (P,), in the plainest way: all logits at every step."""
    P, mask_id = len(prompt), model.config.mask_id
    ids = torch.cat((prompt, torch.full((gen_length,), mask_id)))
    steps_a_block = steps // (gen_length // block_length)
    for first in range(P, P + gen_length, block_length):
        for step in range(steps_a_block):
            logits = model(ids[None])[0].double()
            if cfg_scale > 0:
                blind = ids.clone()
                blind[:P] = mask_id
                blind_logits = model(blind[None])[0].double()
                logits = blind_logits + (cfg_scale + 1) * (logits - blind_logits)
            logits[:, mask_id] = -torch.inf
            sure, best = logits.softmax(-1).max(-1)
            masked = [k for k in range(first, first + block_length) if ids[k] == mask_id]
            count = block_length // steps_a_block + (1 if step < block_length % steps_a_block else 0)
            for k in sorted(masked, key=lambda k: -sure[k])[:count]:
                ids[k] = best[k]
    return ids[P:]


def states(model, prompt_ids, *args, **keys):
    """The completions after every step."""
    return [ids[:, prompt_ids.size(1):].clone() for ids in denoise(model, prompt_ids, *args, **keys)]


# --- the same ids as LLaDA's own loop ---

@needs_shared
@pytest.mark.parametrize('case', ['g32_b8_s16_cfg0.0', 'g32_b8_s16_cfg1.5', 'g64_b32_s64_cfg0.0'])
@pytest.mark.parametrize('kind', ['llada', 'llada_banmask'])
def test_ids_match_the_official_sampler(case, kind):
    golden = load_file(GOLDEN / 'sampler.safetensors')
    gen_length, block_length, steps, cfg_scale = (float(part.lstrip('gbscf')) for part in case.split('_'))
    completion_ids = generate(LLaDA.from_pretrained(GOLDEN / 'tiny-llada'), golden['prompts'], int(gen_length),
                              int(block_length), int(steps), cfg_scale=cfg_scale)
    assert torch.equal(completion_ids, golden[f'{case}.{kind}.output'][:, golden['prompts'].size(1):])


# gen_length, block_length, steps: even, one block, steps that do not divide the block, one token a step, one step a
# block, more steps than tokens, blocks of one
LENGTHS = [(16, 8, 8), (12, 12, 4), (16, 8, 6), (14, 7, 6), (12, 6, 12), (12, 4, 3), (12, 6, 20), (5, 1, 5), (6, 6, 13)]


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('cfg_scale', [0.0, 1.5])
def test_greedy_ids_equal_the_textbook_loop(lengths, cfg_scale):
    model, prompt_ids = bias(tiny(), NEVER), tokens(3, 7)
    expected = torch.stack([textbook(model, prompt, *lengths, cfg_scale) for prompt in prompt_ids])
    assert torch.equal(generate(model, prompt_ids, *lengths, cfg_scale=cfg_scale), expected)
    assert expected.unique().numel() > 3, 'a model without opinions would prove nothing'


def test_ended_rows_equal_the_textbook_up_to_their_block_and_are_eos_behind_it():
    model, prompt_ids = bias(tiny(seed=2, end_ids=(EOS, 7)), {EOS: 0.5, 7: 0.5}), tokens(24, 6)
    completion_ids, blocks = generate(model, prompt_ids, 16, 4, 8), []
    for prompt, completion in zip(prompt_ids, completion_ids):
        expected = textbook(model, prompt, 16, 4, 8)
        ends = [k for k in range(16) if expected[k] in (EOS, 7)]
        blocks.append(ends[0] // 4 if ends else 4)
        stop = min(16, 4 * blocks[-1] + 4)
        assert torch.equal(completion[:stop], expected[:stop])
        assert (completion[stop:] == EOS).all()
    assert set(blocks) == {0, 1, 2, 3, 4}, f'rows must end in every block, and some in none: {blocks}'


@pytest.mark.parametrize('cfg_scale', [0.0, 1.5])
@pytest.mark.parametrize('knobs', [{}, dict(threshold=0.5)])
def test_batch_of_padded_prompts_equals_one_by_one(cfg_scale, knobs):
    model = bias(tiny(seed=1), {EOS: 0.5})
    prompts = [tokens(n, seed=n) for n in (1, 6, 4, 9)]  # the first two end early
    prompt_ids, attention_mask = left_pad(prompts)
    keys = dict(gen_length=12, block_length=4, steps=6, cfg_scale=cfg_scale, **knobs)
    together = generate(model, prompt_ids, attention_mask=attention_mask, **keys)
    assert torch.equal(together, torch.cat([generate(model, prompt[None], **keys) for prompt in prompts]))
    assert torch.equal(together, generate(model, prompt_ids, attention_mask=attention_mask.long(), **keys))
    assert not torch.equal(together, generate(model, prompt_ids, **keys)), 'padding that nobody hides must matter'


def test_order_of_rows_does_not_matter():
    model, prompt_ids = bias(tiny(seed=2), {EOS: 0.5}), tokens(8, 6)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    completion_ids = generate(model, prompt_ids, 16, 4, 8)
    assert torch.equal(generate(model, prompt_ids[order], 16, 4, 8), completion_ids[order])


# --- order of commitment ---

def test_commit_counts():
    assert commit_counts(8, 4) == [2, 2, 2, 2]
    assert commit_counts(8, 3) == [3, 3, 2]
    assert commit_counts(7, 5) == [2, 2, 1, 1, 1]
    assert commit_counts(3, 8) == [1, 1, 1]
    assert commit_counts(5, 1) == [5]


@pytest.mark.parametrize('remasking', ['low_confidence', 'random'])
def test_later_blocks_wait_for_earlier_ones(remasking):
    seen = states(bias(tiny(), NEVER), tokens(4, 5), 12, 4, 6, temperature=1.0, remasking=remasking)
    for before, after in zip(seen, seen[1:]):
        masked = before == MASK
        assert torch.equal(after[~masked], before[~masked]), 'what is committed stays'
        for block in (0, 4):
            late = (after[:, block + 4:] != MASK).any(1)
            assert not (masked[:, block:block + 4].any(1) & late).any()
    assert [int((ids != MASK).sum(1).max()) for ids in seen] == [2, 4, 6, 8, 10, 12, 12]


def test_low_confidence_commits_the_surest_first():
    model, prompt_ids = bias(tiny(), NEVER), tokens(6, 5)
    seen = [torch.full((6, 8), MASK)] + states(model, prompt_ids, 8, 8, 4)[:-1]
    for before, after in zip(seen, seen[1:]):
        logits = model(torch.cat((prompt_ids, before), 1))[:, 5:].detach()
        logits[..., MASK] = -torch.inf
        sure, masked, committed = logits.softmax(-1).amax(-1), before == MASK, before != after
        assert (committed.sum(1) == 2).all()
        assert (sure.where(committed, 2).amin(1) >= sure.where(masked & ~committed, -1).amax(1)).all()


def test_confidence_is_the_unscaled_probability_of_the_chosen_token():
    logits = torch.randn(3, 4, V, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 0.3, 3.0):
        chosen, sure = choose(logits.clone(), MASK, temperature, 'low_confidence', torch.Generator().manual_seed(1))
        without_mask = logits.clone()
        without_mask[..., MASK] = -torch.inf
        torch.testing.assert_close(sure, without_mask.softmax(-1).gather(-1, chosen[..., None])[..., 0])


def test_random_remasking_commits_uniformly():
    model, prompt_ids = bias(tiny(), NEVER), tokens(1, 3).repeat(2000, 1)
    first = {}
    for remasking in ('random', 'low_confidence'):
        ids = next(denoise(model, prompt_ids, 4, 4, 4, remasking=remasking, generator=torch.Generator().manual_seed(0)))
        first[remasking] = (ids[:, 3:] != MASK).sum(0)
    chi2 = ((first['random'] - 500.0) ** 2 / 500).sum()
    assert chi2 < 21.1, f'99.99 % of uniform draws are below: {first["random"].tolist()}'
    assert first['low_confidence'].max() == 2000, 'the model itself has one surest position'


# --- temperature ---

def test_mask_is_never_sampled():
    model, prompt_ids = bias(tiny(), {MASK: 50.0}), tokens(3, 5)
    for temperature in (0.0, 0.9):
        for knobs in ({}, dict(cfg_scale=1.5), dict(remasking='random'), dict(threshold=0.5), dict(cache=True)):
            completion_ids = generate(model, prompt_ids, 8, 4, 4, temperature, **knobs)
            assert (completion_ids != MASK).all()


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    logits = torch.linspace(-2.0, 1.0, 10)
    expected = (logits / temperature).where(torch.arange(10) != MASK, -torch.inf).softmax(-1) * 20000
    completion_ids = generate(says(logits.tolist()), tokens(20000, 1, high=10), 1, 1, 1, temperature,
                              generator=torch.Generator().manual_seed(0))
    counts = completion_ids.flatten().bincount(minlength=10)
    kept = torch.arange(10) != MASK
    chi2 = ((counts - expected) ** 2 / expected)[kept].sum()
    assert counts[MASK] == 0 and expected[kept].min() > 5
    assert chi2 < 31.8, f'99.99 % of draws with 8 degrees of freedom are below: {counts.tolist()}'


def test_noise_is_float32_for_a_bfloat16_model():
    """Of 50,000 equal logits bfloat16 noise would choose among a few ties, the first of them."""
    logits = torch.zeros(100, 1, 50000, dtype=torch.bfloat16)
    chosen, sure = choose(logits, MASK, 1.0, 'low_confidence', torch.Generator().manual_seed(0))
    assert chosen.unique().numel() > 95
    assert abs(chosen.float().mean() / 50000 - 0.5) < 0.15
    assert sure.dtype == torch.float32


def test_same_generator_seed_gives_the_same_ids():
    model, prompt_ids = tiny(), tokens(4, 5)
    draw = lambda seed: generate(model, prompt_ids, 8, 4, 4, 1.0, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)  # the global generator has no say
    assert torch.equal(draw(0), first) and not torch.equal(draw(1), first)
    state = torch.random.get_rng_state()
    draw(0)
    assert torch.equal(torch.random.get_rng_state(), state), 'and is left alone'


# --- cache and threshold ---

@pytest.mark.parametrize('knobs', [{}, dict(cfg_scale=1.5), dict(threshold=0.4), dict(temperature=0.8)])
def test_cache_refreshed_every_step_equals_no_cache(knobs):
    model, prompts = bias(tiny(), {EOS: 0.5}), [tokens(n, seed=n) for n in (5, 8, 3)]
    prompt_ids, attention_mask = left_pad(prompts)
    same = [generate(model, prompt_ids, 12, 4, 6, attention_mask=attention_mask, cache=cache, refresh=1,
                     generator=torch.Generator().manual_seed(0), **knobs) for cache in (False, True)]
    assert torch.equal(*same)


@pytest.mark.parametrize('cfg_scale', [0.0, 1.5])
@pytest.mark.parametrize('eos_bias', [-1e4, 0.5])
def test_cache_is_exact_in_one_layer(cfg_scale, eos_bias):
    """Keys and values of the first layer depend on their own token only, so nothing in the cache can be stale."""
    model, prompts = bias(tiny(n_layers=1), {EOS: eos_bias}), [tokens(n, seed=n) for n in (5, 8, 3, 7)]
    prompt_ids, attention_mask = left_pad(prompts)
    same = [generate(model, prompt_ids, 16, 4, 16, attention_mask=attention_mask, cache=cache, cfg_scale=cfg_scale)
            for cache in (False, True)]
    assert torch.equal(*same)


def test_cached_step_costs_a_block():
    model, seen = bias(tiny(), NEVER), []
    model.wte.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].size(1)))
    generate(model, tokens(2, 10), 8, 4, 8, cache=True)
    assert seen == [18, 4, 4, 4] * 2
    seen.clear()
    generate(model, tokens(2, 10), 8, 4, 8, cache=True, refresh=2)
    assert seen == [18, 4, 18, 4] * 2


@pytest.mark.parametrize('knobs', [dict(threshold=-0.1), dict(threshold=1.5), dict(threshold=float('nan')),
                                   dict(refresh=-1, cache=True), dict(refresh=2),
                                   dict(threshold=0.9, remasking='random')])
def test_impossible_speed_is_refused_in_one_line(knobs):
    check_speed(True, 2, 0.9, 'low_confidence')
    check_speed(False, 0, 0.0, 'random')
    with pytest.raises(ValueError) as error:
        check_speed(**dict(cache=False, refresh=0, threshold=0.0, remasking='low_confidence') | knobs)
    assert '\n' not in str(error.value) and str(list(knobs.values())[0]) in str(error.value)


def test_threshold_above_one_commits_one_token_a_step():
    model, prompt_ids = bias(tiny(), NEVER), tokens(3, 5)
    seen = states(model, prompt_ids, 8, 4, 4, threshold=1.1)
    assert [(ids != MASK).sum(1).tolist() for ids in seen] == [[n] * 3 for n in [1, 2, 3, 4, 5, 6, 7, 8, 8]]
    assert torch.equal(seen[-1], generate(model, prompt_ids, 8, 4, 8))


def test_lowest_threshold_commits_a_block_at_once():
    model, prompt_ids = bias(tiny(), NEVER), tokens(3, 5)
    seen = states(model, prompt_ids, 8, 4, 4, threshold=1e-9)
    assert [(ids != MASK).sum(1).tolist() for ids in seen] == [[4] * 3, [8] * 3, [8] * 3]
    assert torch.equal(seen[-1], generate(model, prompt_ids, 8, 4, 2))


def test_threshold_commits_what_passes_and_always_one():
    model, prompt_ids = bias(tiny(), NEVER), tokens(6, 5)
    seen, numbers = [torch.full((6, 8), MASK)] + states(model, prompt_ids, 8, 8, 8, threshold=0.2)[:-1], set()
    for before, after in zip(seen, seen[1:]):
        logits = model(torch.cat((prompt_ids, before), 1))[:, 5:].detach()
        logits[..., MASK] = -torch.inf
        sure, masked, committed = logits.softmax(-1).amax(-1), before == MASK, before != after
        for row in masked.any(1).nonzero().flatten():
            passed = (sure[row] >= 0.2) & masked[row]
            surest = sure[row].where(masked[row], -1).argmax()
            assert torch.equal(committed[row], passed if passed.any() else torch.arange(8) == surest)
            numbers.add(int(committed[row].sum()))
    assert len(numbers) > 2, 'a threshold that always does the same would prove nothing'


@pytest.mark.parametrize('knobs', [{}, dict(cache=True), dict(cache=True, cfg_scale=1.5), dict(cache=True, refresh=2)])
def test_threshold_drops_rows_with_a_filled_block_and_changes_nothing_for_the_others(knobs):
    model, sizes = bias(tiny(), NEVER), []
    model.wte.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    prompt_ids, attention_mask = left_pad([tokens(n, seed=n) for n in (5, 8, 3, 7, 6)])
    keys = dict(gen_length=16, block_length=8, steps=8, threshold=0.15, **knobs)
    together = generate(model, prompt_ids, attention_mask=attention_mask, **keys)
    assert len(set(sizes)) > 2, f'rows must fill their block at different steps: {sizes}'
    rows = sum(sizes)
    sizes.clear()
    alone = [generate(model, ids[None], attention_mask=real[None], **keys) for ids, real in zip(prompt_ids, attention_mask)]
    assert torch.equal(together, torch.cat(alone)) and sum(sizes) == rows


# --- no work that cannot matter ---

def test_head_runs_only_where_tokens_can_be_committed():
    model, asked = bias(tiny(), NEVER), []
    model.ff_out.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0].shape[:2].numel()))
    generate(model, tokens(3, 10), 8, 4, 8)
    assert asked == [3 * left for left in (4, 3, 2, 1)] * 2


def test_steps_that_commit_nothing_are_skipped():
    model, calls = bias(tiny(), NEVER), []
    model.wte.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(model, tokens(2, 5), 6, 3, 20)
    assert len(calls) == 6


def test_finished_rows_cost_nothing():
    model, sizes = bias(tiny(seed=2), {EOS: 2.0}), []
    model.wte.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    completion_ids = generate(model, tokens(24, 6), 16, 4, 8)
    running = [24] + [int((completion_ids[:, :stop] != EOS).all(1).sum()) for stop in (4, 8, 12)]
    assert sizes == [n for n in running for _ in range(2)] and running[-1] < running[1] < 24
    sizes.clear()
    completion_ids = generate(bias(model, {EOS: 1e4}), tokens(5, 6), 16, 4, 8)
    assert sizes == [5, 5] and (completion_ids == EOS).all(), 'nothing is left to do behind the first block'


# --- around it ---

@pytest.mark.parametrize('keys', [
    dict(gen_length=10, block_length=4, steps=5), dict(gen_length=8, block_length=16, steps=8),
    dict(gen_length=8, block_length=4, steps=3), dict(gen_length=8, block_length=4, steps=1),
    dict(gen_length=0, block_length=4, steps=4), dict(gen_length=8, block_length=0, steps=4),
    dict(gen_length=8, block_length=4, steps=0), dict(gen_length=-8, block_length=4, steps=4),
    dict(gen_length=8, block_length=4, steps=4, remasking='high_confidence')])
def test_impossible_knobs_are_refused_in_one_line(keys):
    with pytest.raises(ValueError) as error:
        generate(tiny(), tokens(1, 3), **keys)
    assert '\n' not in str(error.value) and any(f'{value}' in str(error.value) for value in keys.values())


def test_completions_can_be_trained_on():
    model, prompt_ids = tiny(), tokens(2, 5)
    kept = prompt_ids.clone()
    completion_ids = generate(model, prompt_ids, 8, 4, 4)
    assert not completion_ids.is_inference() and torch.equal(prompt_ids, kept)
    logps = completion_logps(model, prompt_ids, completion_ids, torch.zeros_like(prompt_ids, dtype=torch.bool))
    logps.sum().backward()
    model(completion_ids).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_completion_is_one_block_of_ids():
    completion_ids = generate(tiny(), tokens(3, 5), 8, 4, 4)
    assert completion_ids.shape == (3, 8) and completion_ids.dtype == torch.int64
    assert completion_ids.min() >= 0 and completion_ids.max() < V


def test_the_script_shows_a_completion_that_depends_on_the_seed_only(tmp_path, monkeypatch, capsys):
    model, tokenizer = load('nano')
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / 'run/model')

    def shown(*flags):
        monkeypatch.setattr(sys, 'argv', ['sample.py', '--out', str(tmp_path), '--temperature', '1', *flags])
        runpy.run_path(os.path.join(os.path.dirname(__file__), '..', 'sample.py'), run_name='__main__')
        return capsys.readouterr().out
    first = shown('--prompt', 'How many?')
    assert first.startswith('How many?<|assistant|>\n   1 ') and '\n   4 ' in first
    assert shown('--prompt', 'How many?') == first != shown('--prompt', 'How many?', '--seed', '1')
    problem = shown('--task', 'sudoku', '--cache')
    assert problem.startswith('Solve the puzzle ') and problem[:40] != shown('--task', 'sudoku', '--seed', '1')[:40]
