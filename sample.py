"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, appendix; d1, section 2.1).

A completion starts as gen_length masks. Blocks are filled from left to right; within a block every step
predicts all masks at once and commits the predictions the model is surest of.
    python sample.py --task gsm8k       shows a text being denoised by the last checkpoint in out/
    python sample.py --model GSAI-ML/LLaDA-8B-Instruct --prompt "How many legs do 3 cats have?"
"""
import argparse
import glob
import os
import sys

import torch
import torch.nn.functional as F


def commit_counts(block_length, steps):
    """How many tokens each of a block's steps commits: equal shares, the first steps take one more."""
    return [block_length // steps + (i < block_length % steps) for i in range(min(steps, block_length))]


def check_lengths(gen_length, block_length, steps, where=''):
    """Raises ValueError unless blocks divide the completion and every block gets the same number of steps."""
    if min(gen_length, block_length, steps) < 1:
        raise ValueError(f'{where}gen_length {gen_length}, block_length {block_length} and steps {steps} must be at least 1')
    blocks, rest = divmod(gen_length, block_length)
    if rest:
        raise ValueError(f'{where}gen_length {gen_length} is not a multiple of block_length {block_length}: '
                         'choose a block_length that divides it')
    if steps % blocks:
        raise ValueError(f'{where}steps {steps} is not a multiple of the {blocks} blocks: choose a multiple of {blocks}')


def check_speed(cache, refresh, threshold, remasking):
    """Raises ValueError on faster modes that cannot work."""
    if refresh < 0 or refresh and not cache:
        raise ValueError(f'refresh {refresh} counts the steps between refreshes of a cache, 0 = never: '
                         'it takes --cache and is not negative')
    if not 0 <= threshold <= 1:
        raise ValueError(f'threshold {threshold} is no probability: choose one from 0 (off) to 1')
    if threshold and remasking == 'random':
        raise ValueError(f"threshold {threshold} asks how sure the model is, which remasking 'random' does not: drop one")


def choose(logits, mask_id, temperature, remasking, generator):
    """logits (R, n, V) -> tokens (R, n) and how sure the model is of each (R, n), float32.

    The token is the argmax of logits + temperature * Gumbel noise; the noise is -log of an exponential
    draw, in float32, since bfloat16 noise makes sampling nearly greedy. The mask is never chosen.
    """
    logits = logits.float()
    logits[..., mask_id] = -torch.inf
    scores = logits
    if temperature > 0:
        scores = logits / temperature - torch.empty_like(logits).exponential_(generator=generator).log_()
    tokens = scores.argmax(-1)
    if remasking == 'random':
        return tokens, torch.rand(tokens.shape, device=tokens.device, generator=generator)
    return tokens, (logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).exp()


@torch.inference_mode()
def denoise(model, prompt_ids, gen_length=256, block_length=32, steps=128, temperature=0.0, cfg_scale=0.0,
            remasking='low_confidence', attention_mask=None, generator=None, cache=False, refresh=0, threshold=0.0):
    """Yields the ids (B, P + L), some still masks, after every step; arguments as in generate."""
    check_lengths(gen_length, block_length, steps)
    if remasking not in ('low_confidence', 'random'):
        raise ValueError(f"remasking is 'low_confidence' or 'random', not {remasking!r}")
    (B, P), config, device = prompt_ids.shape, model.config, prompt_ids.device
    end_ids = torch.tensor(config.end_ids, device=device)
    ids = F.pad(prompt_ids, (0, gen_length), value=config.mask_id)  # (B, T)
    seen = None if attention_mask is None else F.pad(attention_mask.bool(), (0, gen_length), value=True)
    rows = torch.arange(B, device=device)  # the rows that have not ended: R of them

    for first in range(P, P + gen_length, block_length):
        block = slice(first, first + block_length)
        live, row_mask = rows, None if seen is None else seen[rows]  # live: the rows with masks in this block
        copies = 2 if cfg_scale > 0 else 1  # with guidance each row goes in twice, once without its prompt
        kv = model.new_cache(copies * len(rows), ids.size(1)) if cache else None
        counts = commit_counts(block_length, steps * block_length // gen_length)
        step, left = 0, block_length  # left: the most masks in a live row's block
        while left:
            masked = ids[live, block] == config.mask_id  # (R, block_length)
            columns = masked.byte().argsort(dim=1, descending=True, stable=True)[:, :left]
            # with a cache, only its first step (and every refresh) sees more than the block
            whole = kv is None or step == 0 or (refresh and step % refresh == 0)
            start = 0 if whole else first
            logits = predict(model, ids[live], P, slice(None) if whole else block, row_mask,
                             columns + first - start, kv, start, cfg_scale)  # (R, left, V)
            tokens, sure = choose(logits, config.mask_id, temperature, remasking, generator)
            here = (live[:, None], first + columns)
            if not threshold:
                commit = torch.zeros_like(sure, dtype=torch.bool)
                commit.scatter_(1, sure.topk(counts[step]).indices, True)
                left -= counts[step]
            else:
                masked = masked.gather(1, columns)
                sure = sure.masked_fill(~masked, -1)
                commit = (sure >= threshold).scatter_(1, sure.argmax(1, keepdim=True), True)
                masks = (masked & ~commit).sum(1)
                left, going = int(masks.max()), masks > 0  # rows that have filled their block wait for the others
                live, row_mask = live[going], None if row_mask is None else row_mask[going]
                kv = kv and [(k[going.repeat(copies)], v[going.repeat(copies)]) for k, v in kv]
            ids[here] = torch.where(commit, tokens, ids[here])
            step += 1
            yield ids
        # Later blocks cannot change this one, so a row with an end in it is finished.
        ended = torch.isin(ids[rows, block], end_ids).any(1)
        ids[rows[ended], block.stop:] = config.eos_id
        rows = rows[~ended]
        if len(rows) == 0:
            break
    yield ids


def predict(model, ids, P, part, attention_mask, columns, kv, start, cfg_scale):
    """Logits (R, n, V) at columns (R, n) of ids[:, part], guided away from the model without prompt."""
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    if cfg_scale == 0:
        return model(ids[:, part], attention_mask, at=(rows, columns), cache=kv, start=start)
    blind = ids.clone()
    blind[:, :P] = model.config.mask_id
    both = torch.cat((ids, blind))[:, part]
    attention_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    at = (torch.cat((rows, rows + len(ids))), columns.repeat(2, 1))
    logits, blind_logits = model(both, attention_mask, at=at, cache=kv, start=start).chunk(2)
    return blind_logits + (cfg_scale + 1) * (logits - blind_logits)


def generate(model, prompt_ids, gen_length=256, block_length=32, steps=128, temperature=0.0, cfg_scale=0.0,
             remasking='low_confidence', attention_mask=None, generator=None, cache=False, refresh=0, threshold=0.0):
    """Completions (B, L = gen_length) of prompt_ids (B, P), int64; everything behind a finished block with an end is eos.

    steps: over the whole completion; block_length and steps must fit gen_length, else ValueError.
    attention_mask (B, P): True or 1 = real token, for prompts padded on the left.
    cache: keys and values outside the block are computed in its first step, then every `refresh` steps (0 = never);
    faster, not exact. threshold: commit all tokens at least this sure, and always one, instead of a fixed number; 0 = off.
    """
    for ids in denoise(model, prompt_ids, gen_length, block_length, steps, temperature, cfg_scale, remasking,
                       attention_mask, generator, cache, refresh, threshold):
        pass
    return ids[:, prompt_ids.size(1):].clone()  # a clone is no inference tensor, so that gradients can use it


def parser(description):
    """An argparse.ArgumentParser that raises ValueError, in one line, where argparse would print all flags and exit."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    def fail(message): raise ValueError(f'{message} (--help lists all flags)')
    p.error = fail
    return p


def last_model(out):
    """The newest model that a run has left in the folder `out`; ValueError when there is none."""
    folders = sorted(glob.glob(os.path.join(out, '*', 'model')), key=os.path.getmtime)
    if not folders:
        raise ValueError(f'no model in {out}/: run python train.py first, or give --model FOLDER')
    return folders[-1]


def chat(tokenizer, text):
    """One user message as token ids, chat template and generation prompt included."""
    return tokenizer.apply_chat_template([dict(role='user', content=text)], add_generation_prompt=True, return_dict=False)


def show(model, tokenizer, text, **sampling):
    """Prints a chat prompt's completion after every step: masks as dots, new tokens highlighted on a terminal."""
    prompt = chat(tokenizer, text)
    if len(prompt) + sampling['gen_length'] > model.config.max_sequence_length:
        raise ValueError(f'the prompt has {len(prompt)} tokens: with gen_length they are more than the '
                         f'{model.config.max_sequence_length} of the model')
    prompt_ids = torch.tensor([prompt], device=model.device)
    new, old = ('\033[1;32m', '\033[0m') if sys.stdout.isatty() else ('', '')
    before = [model.config.mask_id] * sampling['gen_length']
    print(tokenizer.decode(prompt))
    for step, ids in enumerate(denoise(model, prompt_ids, **sampling)):
        ids = ids[0, len(prompt):].tolist()
        if ids == before:
            continue  # the last yield: nothing new
        line = ''
        for token, token_before in zip(ids, before):
            if token == model.config.mask_id:
                line += '.'
            elif token not in model.config.end_ids:
                piece = tokenizer.decode([token]).replace('\n', '\\n')
                line += piece if token == token_before else f'{new}{piece}{old}'
        print(f'{step + 1:4} {line}', flush=True)
        before = ids
    print(tokenizer.decode(before, skip_special_tokens=True))


if __name__ == '__main__':
    import random

    import rewards
    from model import load

    p = parser(__doc__)
    p.add_argument('--model', default='', help='a folder or hub id [the newest model in out/]')
    p.add_argument('--out', default='out', help='where runs are kept')
    p.add_argument('--task', default='gsm8k', help='show a built-in problem of this task')
    p.add_argument('--prompt', default='', help='show this question instead')
    p.add_argument('--gen_length', type=int, default=32)
    p.add_argument('--block_length', type=int, default=8)
    p.add_argument('--steps', type=int, default=0, help='[gen_length / 2]')
    p.add_argument('--temperature', type=float, default=0.0)
    p.add_argument('--cache', action='store_true', help='keys and values outside the block are kept within it; not exact')
    p.add_argument('--refresh', type=int, default=0, help='steps between refreshes of the cache (0 = once a block)')
    p.add_argument('--threshold', type=float, default=0.0, help='commit every token this sure, instead of a fixed number')
    p.add_argument('--seed', type=int, default=0, help='of the built-in problem and of the noise')
    try:
        a = p.parse_args()
        a.steps = a.steps or a.gen_length // 2
        if not 0 <= a.temperature < float('inf'):
            raise ValueError(f'--temperature {a.temperature} is out of range: give a number from 0')
        if a.task not in rewards.TASKS:
            raise ValueError(f'--task {a.task} is unknown: choose from {", ".join(rewards.TASKS)}')
        check_lengths(a.gen_length, a.block_length, a.steps)
        check_speed(a.cache, a.refresh, a.threshold, 'low_confidence')
        place = (torch.bfloat16, 'cuda') if torch.cuda.is_available() else (torch.float32, 'cpu')
        model, tokenizer = load(a.model or last_model(a.out), *place)
        generator = torch.Generator(model.device).manual_seed(a.seed)
        example = dict(question=a.prompt) if a.prompt else rewards.make(a.task, random.Random(a.seed), 'test')
        show(model.eval(), tokenizer, rewards.prompt(a.task, example), gen_length=a.gen_length,
             block_length=a.block_length, steps=a.steps, temperature=a.temperature, cache=a.cache,
             refresh=a.refresh, threshold=a.threshold, generator=generator)
    except (ValueError, OSError) as e:
        sys.exit(print(f'sample.py: {e}', file=sys.stderr) or 2)
