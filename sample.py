"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, appendix; d1, section 2.1).

A completion starts as gen_length masks. Blocks are filled from left to right; within a block every
step predicts all masks at once and commits the predictions of which the model is surest.
    python sample.py --task gsm8k       shows a text being denoised by the newest model in out/
    python sample.py --model GSAI-ML/LLaDA-8B-Instruct --prompt "How many legs do 3 cats have?"
"""
import argparse
import functools
import hashlib
import html
import os
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


def choose(logits, mask_id, temperature=0.0, remasking='low_confidence', generators=None,
           num_masks=None):
    """A token for every mask, and the model's confidence in it: logits (B, n, V) -> 2 x (B, n).

    The token is the argmax of logits + temperature * Gumbel noise (float32: bfloat16 noise acts
    like a lower temperature). The mask itself is never chosen. generators: one per row, so that
    a completion does not depend on the rows beside it; None = torch's global one. num_masks: how
    many of the n positions of each row are masks, the first ones; None = all.
    """
    B, n, _ = logits.shape
    logits = logits.float()
    logits[..., mask_id] = -torch.inf            # in the caller's tensor, too, if it is float32
    generators = generators or [None] * B
    num_masks = num_masks or [n] * B
    scores = logits
    if temperature > 0:
        noise = torch.ones_like(logits)
        for row, masks, generator in zip(noise, num_masks, generators):
            row[:masks].exponential_(generator=generator)
        scores = logits / temperature - noise.log_()             # -log of an exponential is Gumbel
    tokens = scores.argmax(dim=-1)                               # (B, n)
    if remasking == 'random':
        confidence = torch.zeros(B, n, device=tokens.device)
        for row, masks, generator in zip(confidence, num_masks, generators):
            row[:masks].uniform_(generator=generator)
        return tokens, confidence
    if remasking == 'top_prob':                                  # whatever token was drawn
        chosen = logits.amax(dim=-1)
    else:
        chosen = logits.gather(-1, tokens[..., None])[..., 0]    # (B, n)
    return tokens, (chosen - logits.logsumexp(dim=-1)).exp()


def commit_counts(block_length, steps):
    """How many tokens each step commits: equal shares, the first take one more: 8, 3 -> 3 3 2."""
    share, rest = divmod(block_length, steps)
    return [share + 1] * rest + [share] * (steps - rest if share else 0)


@torch.no_grad()
def generate_plain(model, prompt_ids, gen_length=256, block_length=32, steps=128, temperature=0.0,
                   remasking='low_confidence', generators=None):
    """LLaDA's loop, to read: prompt_ids (B, P) -> completion_ids (B, L = gen_length).

    generate below gives the same tokens up to each completion's end, sooner.
    """
    B, P = prompt_ids.shape
    mask_id = model.config.mask_id
    ids = F.pad(prompt_ids, (0, gen_length), value=mask_id)      # (B, T): masks after the prompt
    steps_per_block = steps * block_length // gen_length
    for start in range(P, P + gen_length, block_length):
        block = ids[:, start:start + block_length]               # a view: writing it writes ids
        for count in commit_counts(block_length, steps_per_block):
            masks = (block == mask_id).nonzero()[:, 1].view(B, -1)           # (B, n) positions
            logits = model(ids)[:, start:start + block_length]               # (B, block_length, V)
            logits = logits[torch.arange(B)[:, None], masks]                 # (B, n, V)
            tokens, confidence = choose(logits, mask_id, temperature, remasking, generators)
            surest = confidence.topk(count).indices                          # (B, count)
            block.scatter_(1, masks.gather(1, surest), tokens.gather(1, surest))
    return ids[:, P:]


# ---- the same, fast: what training and evaluation use ----

def generate(model, prompt_ids, gen_length=256, block_length=32, steps=128, temperature=0.0,
             cfg_scale=0.0, remasking='low_confidence', attention_mask=None, generators=None,
             cache=False, threshold=0.0, order=None):
    """Completions (B, L = gen_length) of prompt_ids (B, P) int64; eos after the block of an end.

    steps: over the whole completion; block_length and steps must fit gen_length, else ValueError.
    attention_mask (B, P): True or 1 = real token, for prompts padded on the left.
    generators: one torch.Generator per row. cfg_scale: classifier-free guidance (LLaDA, app.).
    cache: keys and values outside the block are computed in its first step only; not exact.
    threshold: commit every token of at least this confidence, and always one, instead of a fixed
    number; 0 = off (Fast-dLLM, arXiv 2505.22618, has both).
    order: a tensor (B, L) to be filled with the number of the step that committed each token.
    """
    if order is None:
        order = prompt_ids.new_empty(len(prompt_ids), gen_length)
    order.fill_(-1)
    for step, ids in enumerate(denoise(
            model, prompt_ids, gen_length, block_length, steps, temperature, cfg_scale, remasking,
            attention_mask, generators, cache, threshold)):
        completion_ids = ids[:, prompt_ids.size(1):]
        order.masked_fill_((order < 0) & (completion_ids != model.config.mask_id), step)
    order.clamp_(max=step - 1)                   # the last state adds eos only, and is no step
    return completion_ids.clone()                # no inference tensor, so that gradients can use it


@torch.inference_mode()
def denoise(model, prompt_ids, gen_length, block_length, steps, temperature=0.0, cfg_scale=0.0,
            remasking='low_confidence', attention_mask=None, generators=None, cache=False,
            threshold=0.0):
    """Yields the ids (B, T), some still masks, after every step; arguments as in generate.

    Beside the plain loop: the LM head and the noise see the block's masks only; rows that have
    ended are left out; with a cache or a threshold a step costs less, or fewer are needed.
    """
    check_lengths(gen_length, block_length, steps)
    B, P = prompt_ids.shape
    mask_id, device = model.config.mask_id, prompt_ids.device
    end_ids = torch.tensor(model.config.end_ids, device=device)
    counts = commit_counts(block_length, steps * block_length // gen_length)
    ids = F.pad(prompt_ids, (0, gen_length), value=mask_id)                  # (B, T)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask.bool(), (0, gen_length), value=True)
    generators = generators or [None] * B
    unfinished = torch.arange(B, device=device)                  # rows without an end so far

    for block_start in range(P, P + gen_length, block_length):
        block = slice(block_start, block_start + block_length)
        active = unfinished                                      # (R,) rows with masks in the block
        masks_left = block_length                                # the most of any active row
        step, kv = 0, None
        if cache:
            copies = 2 if cfg_scale else 1                       # see predict
            kv = model.new_cache(copies * len(active), ids.size(1))
        while masks_left:
            is_mask = ids[active, block] == mask_id                          # (R, block_length)
            masks_first = is_mask.byte().argsort(dim=1, descending=True, stable=True)
            positions = masks_first[:, :masks_left]              # from left to right
            is_mask = is_mask.gather(1, positions)                           # (R, n)
            # with a cache the first step of a block sees all tokens, the others only the block
            seen = block if cache and step else slice(0, ids.size(1))
            logits = predict(model, ids[active, seen], positions + block_start - seen.start,
                             None if attention_mask is None else attention_mask[active],
                             kv, seen.start, P, cfg_scale)                   # (R, n, V)
            num_masks = is_mask.sum(1).tolist()                  # with a threshold rows may differ
            row_generators = [generators[row] for row in active.tolist()]
            tokens, confidence = choose(logits, mask_id, temperature, remasking, row_generators,
                                        num_masks)
            commit = to_commit(confidence, is_mask, counts, step, threshold)
            rows, columns = active[:, None], positions + block_start
            ids[rows, columns] = tokens.where(commit, ids[rows, columns])
            yield ids
            step += 1
            still_masks = (is_mask & ~commit).sum(1)                         # (R,)
            masks_left = int(still_masks.max())
            active, kv = leave_out(still_masks == 0, active, kv)
        # later blocks cannot change this one, so a row with an end in it is finished
        ended = torch.isin(ids[unfinished, block], end_ids).any(1)
        finished = unfinished[ended]                             # row numbers
        ids[finished, block.stop:] = model.config.eos_id
        unfinished = unfinished[~ended]
        if len(unfinished) == 0:
            break
    yield ids


def to_commit(confidence, is_mask, counts, step, threshold):
    """Which predictions a step commits, (R, n) bool: the counts[step] surest.

    With a threshold all that are this sure, at least one. is_mask (R, n): False where a row has
    fewer masks than others.
    """
    if threshold:
        confidence = confidence.masked_fill(~is_mask, -1)
        surest = confidence.argmax(dim=1, keepdim=True)          # at least one
        return (confidence >= threshold).scatter(1, surest, True)
    surest = confidence.topk(counts[step]).indices
    return torch.zeros_like(is_mask).scatter(1, surest, True)


def predict(model, ids, positions, attention_mask, kv, start, num_prompt_tokens, cfg_scale):
    """Logits (R, n, V) at positions of ids, which begin at place `start` of the sequence.

    With guidance each row goes in twice, once with its prompt masked, and is pushed away from that.
    """
    if cfg_scale:
        unconditional = ids.clone()
        unconditional[:, :max(num_prompt_tokens - start, 0)] = model.config.mask_id
        ids = torch.cat((ids, unconditional))
        positions = positions.repeat(2, 1)
        attention_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    logits = model(ids, attention_mask, positions, kv, start)
    if not cfg_scale:
        return logits
    logits, unconditional = logits.chunk(2)
    return unconditional + (cfg_scale + 1) * (logits - unconditional)


def leave_out(finished, active, kv):
    """The active rows and their cache without those that have filled their block."""
    if not finished.any():
        return active, kv
    if kv is not None:
        copies = len(kv[0][0]) // len(active)                    # 2 with guidance
        keep = ~finished.repeat(copies)
        kv = [(keys[keep], values[keep]) for keys, values in kv]
    return active[~finished], kv


def check_lengths(gen_length, block_length, steps):
    """Raises ValueError unless blocks fill the completion and share the steps equally."""
    if block_length < 1 or gen_length < 1 or gen_length % block_length:
        raise ValueError(f'gen_length {gen_length} is no multiple of block_length {block_length}')
    blocks = gen_length // block_length
    if steps % blocks or steps == 0:
        raise ValueError(f'steps {steps} is no multiple of the {blocks} blocks of a completion')


# ---- random streams and prompts, for all that draws or pads ----

def random_stream(*key):
    """A random.Random of the key alone: a resumed run, on any number of processes, draws alike."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


def torch_stream(device, *key):
    return torch.Generator(device).manual_seed(random_stream(*key).getrandbits(63))


@functools.lru_cache(maxsize=16)                 # shuffled asks for it once per item
def epoch_order(n, *key):
    """A permutation of range(n), of the key alone."""
    return random_stream(*key).sample(range(n), n)


def shuffled(items, index, *key):
    """Item number index of an endless stream: each once, in random order, before any again."""
    epoch, i = divmod(index, len(items))
    return items[epoch_order(len(items), *key, epoch)[i]]


def left_pad(prompts, pad_id, device):
    """[list of ids] -> ids (B, P), attention_mask (B, P) bool, True = real; None if all are."""
    lengths = [len(prompt) for prompt in prompts]
    P = max(lengths)
    ids = [[pad_id] * (P - len(prompt)) + prompt for prompt in prompts]
    real = torch.arange(P) >= P - torch.tensor(lengths)[:, None]             # (B, P)
    ids = torch.tensor(ids, device=device)
    if real.all():
        return ids, None
    return ids, real.to(device)


def chat(tokenizer, text):
    """One user message as token ids, with the chat template and its opening of the answer."""
    message = [dict(role='user', content=text)]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=False)


# ---- python sample.py: watch a text being denoised ----

def show(model, tokenizer, prompt, generators, sampling):
    """Prints a prompt's completion after every step, masks as dots; returns its ids and steps."""
    mask = tokenizer.decode([model.config.mask_id])
    end = tokenizer.decode([model.config.eos_id])
    print(tokenizer.decode(prompt))
    prompt_ids = torch.tensor([prompt], device=model.device)
    order = [None] * sampling['gen_length']                      # the step of each token
    completion = []
    for step, ids in enumerate(denoise(model, prompt_ids, generators=generators, **sampling)):
        if ids[0, len(prompt):].tolist() == completion:          # the last state may come twice
            break
        completion = ids[0, len(prompt):].tolist()
        for k, token in enumerate(completion):
            if token != model.config.mask_id and order[k] is None:
                order[k] = step
        text = tokenizer.decode(completion)
        line = text.replace(mask, '.').replace(end, '').replace('\n', '\\n')
        print(f'{step + 1:4} {line}', flush=True)
    print(tokenizer.decode(completion, skip_special_tokens=True))
    return completion, order


def draw(path, panels, seconds=0.5):
    """Writes an animated SVG of completions being denoised, one panel below the other.

    panels: [(title, pieces, order)]: the decoded tokens of a completion, and the step of each.
    """
    body, y = [], 10
    last = max(step for _, _, order in panels for step in order)
    total = seconds * (last + 6)                                 # the end stays for a while
    # a sign is 8.4 wide at 14px; the titles are taken to be the longest lines
    right = 24 + 8.4 * max(len(title) for title, _, _ in panels)
    for title, pieces, order in panels:
        y += 22
        body.append(f'<text class="title" x="12" y="{y}">{html.escape(title)}</text>')
        x, y = 12, y + 24
        for piece, step in zip(pieces, order):
            begin = (step + 1) * seconds / total                 # share of the time, 0 to 1
            for line_number, part in enumerate(piece.split('\n')):
                if line_number:
                    x, y = 12, y + 20
                if not part:
                    continue
                width = 8.4 * len(part)
                appear = (f'<animate attributeName="opacity" dur="{total}s" values="0;1" '
                          f'calcMode="discrete" repeatCount="indefinite" '
                          f'keyTimes="0;{begin:.4f}"/>')
                vanish = appear.replace('"0;1"', '"1;0"')
                body.append(f'<rect x="{x:.1f}" y="{y - 12}" width="{width - 1:.1f}" height="15" '
                            f'rx="3">{vanish}</rect>')
                body.append(f'<text x="{x:.1f}" y="{y}" opacity="0">{html.escape(part)}'
                            f'{appear}</text>')
                x += width
        y += 14
    style = ('text { font: 14px monospace; fill: #1f6feb; white-space: pre } '
             '.title { fill: #7d8590 } rect { fill: #8b949e; fill-opacity: 0.35 }')
    with open(path, 'w') as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:.0f} {y}">'
                   f'<style>{style}</style>\n' + '\n'.join(body) + '\n</svg>\n')


def newest_model():
    """The newest model that a run has left in out/; ValueError when there is none."""
    folders = list(Path('out').glob('*/model'))
    if not folders:
        raise ValueError('no model in out/: run python train.py first, or give --model FOLDER')
    return max(folders, key=os.path.getmtime)


def main():
    import rewards
    from model import load

    p = argparse.ArgumentParser(usage='python sample.py [flags]; --help lists them',
                                description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', nargs='*', default=[],
                   help='folders or hub ids [the newest model in out/]')
    p.add_argument('--task', default='gsm8k', choices=rewards.TASKS, help='whose problem to show')
    p.add_argument('--prompt', default='', help='show this question instead')
    p.add_argument('--gen_length', type=int, default=32)
    p.add_argument('--block_length', type=int, default=8)
    p.add_argument('--temperature', type=float, default=0.0)
    p.add_argument('--cache', action='store_true', help='keep keys and values; not exact')
    p.add_argument('--threshold', type=float, default=0.0, help='commit all tokens this sure')
    p.add_argument('--seed', type=int, default=0, help='of the problem and of the noise')
    p.add_argument('--svg', default='', help='draw a moving picture into this file, too')
    args = p.parse_args()
    sampling = dict(gen_length=args.gen_length, block_length=args.block_length,
                    steps=args.gen_length // 2, temperature=args.temperature, cache=args.cache,
                    threshold=args.threshold)
    dtype, device = torch.float32, 'cpu'
    if torch.cuda.is_available():
        dtype, device = torch.bfloat16, 'cuda'
    panels = []
    for name in args.model or [newest_model()]:
        model, tokenizer = load(name, dtype, device)
        generators = [torch.Generator(model.device).manual_seed(args.seed)]
        example = rewards.make(args.task, random.Random(args.seed), 'test')
        if args.prompt:
            example = dict(question=args.prompt)
        prompt = chat(tokenizer, rewards.prompt(args.task, example))
        ids, order = show(model, tokenizer, prompt, generators, sampling)
        pieces = [tokenizer.decode([i], skip_special_tokens=True) for i in ids]
        panels.append((f"{name}: {example['question']}", pieces, order))
    if args.svg:
        draw(args.svg, panels)


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f'sample.py: {e}')
