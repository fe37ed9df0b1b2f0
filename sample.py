"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, appendix; d1, section 2.1).

A completion starts as gen_length masks. Blocks are filled from left to right; within a block every
step predicts all masks at once and commits the predictions of which the model is surest.
    python sample.py                    shows a text being denoised, by the newest model in out/ or,
                                        before anything has been trained, by the nano base
    python sample.py --model nano out/nano-gsm8k-grpo-seed0/model        before and after
    python sample.py --model GSAI-ML/LLaDA-8B-Instruct --prompt "How many legs do 3 cats have?"
"""
import argparse
import functools
import hashlib
import os
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


def choose(logits, temperature=0.0, generators=None):
    """A token for every position, and the model's confidence in it: logits (B, n, V) -> 2 x (B, n).

    The token is drawn from softmax(logits / temperature), as the argmax after Gumbel noise (in
    float32: bfloat16 noise acts like a lower temperature). The confidence is its probability at
    temperature 1. generators: one per row, so that a completion does not depend on the rows beside
    it; None = torch's global one.
    """
    logits = logits.float()
    scores = logits
    if temperature > 0:
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, generators or [None] * len(noise)):
            row.exponential_(generator=generator)
        scores = logits / temperature - noise.log_()             # -log of an exponential is Gumbel
    tokens = scores.argmax(dim=-1)                               # (B, n)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]        # (B, n)
    return tokens, (chosen - logits.logsumexp(dim=-1)).exp()


def commit_counts(block_length, steps):
    """How many tokens each step commits: equal shares, the first take one more: 8, 3 -> 3 3 2.

    Of more steps than tokens only so many are taken as there are tokens.
    """
    steps = min(steps, block_length)
    share, rest = divmod(block_length, steps)
    return [share + 1] * rest + [share] * (steps - rest)


@torch.no_grad()
def generate(model, prompt_ids, gen_length=256, block_length=32, steps=128, temperature=0.0,
             cfg_scale=0.0, attention_mask=None, generators=None, cache=False, threshold=0.0):
    """prompt_ids (B, P) int64 -> completion_ids (B, L = gen_length), commit_steps (B, L).

    commit_steps: the number of the step, from 0, that committed each token. After the block of its
    first end a completion holds eos only, with the number of its last step. The mask itself is
    never drawn.
    steps: over the whole completion; ValueError if block_length and steps do not fit gen_length.
    attention_mask (B, P): True or 1 = real token, for prompts padded on the left. generators: see
    choose. cfg_scale: guidance (LLaDA, appendix), not with cache or threshold: see generate_fast.
    """
    check_lengths(gen_length, block_length, steps)
    if cache or threshold:
        if cfg_scale:
            raise ValueError('cfg_scale goes with neither cache nor threshold')
        return generate_fast(model, prompt_ids, gen_length, block_length, steps, temperature,
                             attention_mask, generators, cache, threshold)
    B, P = prompt_ids.shape
    mask_id, eos_id = model.config.mask_id, model.config.eos_id
    ids = F.pad(prompt_ids, (0, gen_length), value=mask_id)      # (B, T): masks after the prompt
    attention_mask = pad_mask(attention_mask, gen_length)        # (B, T), or None
    generators = generators or [None] * B
    commit_steps = torch.zeros_like(ids)                         # (B, T)
    step = 0
    rows = torch.arange(B, device=ids.device)                    # (R,): those without an end so far
    for start in range(P, P + gen_length, block_length):
        stop = start + block_length
        for count in commit_counts(block_length, steps * block_length // gen_length):
            is_mask = ids[rows, start:stop] == mask_id                       # (R, block_length)
            # every row has as many masks, n, so that their places fill a rectangle
            positions = start + is_mask.nonzero()[:, 1].view(len(rows), -1)  # (R, n)
            row_mask = None if attention_mask is None else attention_mask[rows]
            logits = model(ids[rows], row_mask, positions)                   # (R, n, V)
            if cfg_scale:
                logits = guide(logits, model, ids[rows], row_mask, positions, P, cfg_scale)
            logits[..., mask_id] = -torch.inf                    # the mask itself is never drawn
            row_generators = [generators[row] for row in rows.tolist()]
            tokens, confidence = choose(logits, temperature, row_generators)     # (R, n) each
            surest = confidence.topk(count).indices                          # (R, count)
            where = rows[:, None], positions.gather(1, surest)
            ids[where] = tokens.gather(1, surest)
            commit_steps[where] = step
            step += 1
        # nothing after an end counts, and later blocks cannot change this one: such a row is done
        ended = has_end(ids[rows, start:stop], model.config)                 # (R,)
        ids[rows[ended], stop:] = eos_id
        commit_steps[rows[ended], stop:] = step - 1
        rows = rows[~ended]
        if len(rows) == 0:
            break
    return ids[:, P:], commit_steps[:, P:]


def pad_mask(attention_mask, gen_length):
    """The prompt's attention mask (B, P), if there is one, with the completion's tokens: (B, T)."""
    if attention_mask is None:
        return None
    return F.pad(attention_mask.bool(), (0, gen_length), value=True)


def has_end(ids, config):
    """ids (R, n) -> (R,) bool: whether a token of the row ends a completion."""
    return torch.isin(ids, torch.tensor(config.end_ids, device=ids.device)).any(dim=1)


def guide(logits, model, ids, attention_mask, positions, num_prompt_tokens, cfg_scale):
    """Logits (R, n, V) pushed away from those without a prompt (guidance; LLaDA, appendix)."""
    unprompted = ids.clone()
    unprompted[:, :num_prompt_tokens] = model.config.mask_id
    unconditional = model(unprompted, attention_mask, positions)
    return unconditional + (cfg_scale + 1) * (logits - unconditional)


def check_lengths(gen_length, block_length, steps):
    """Raises ValueError unless blocks fill the completion and share the steps equally."""
    if block_length < 1 or gen_length < 1 or gen_length % block_length:
        raise ValueError(f'gen_length {gen_length} is no multiple of block_length {block_length}')
    blocks = gen_length // block_length
    if steps % blocks or steps < 1:
        raise ValueError(f'steps {steps} is no multiple of the {blocks} blocks of a completion')


# ---- fewer or cheaper steps, for other tokens: a cache, a threshold ----

def generate_fast(model, prompt_ids, gen_length, block_length, steps, temperature, attention_mask,
                  generators, cache, threshold):
    """generate with the two short cuts of Fast-dLLM (arXiv 2505.22618); neither is exact.

    cache: keys and values outside the block are computed in its first step only. threshold: a step
    commits every token of at least this confidence, and always one, instead of a fixed number.
    """
    B, P = prompt_ids.shape
    mask_id = model.config.mask_id
    ids = F.pad(prompt_ids, (0, gen_length), value=mask_id)                  # (B, T)
    attention_mask = pad_mask(attention_mask, gen_length)
    generators = generators or [None] * B
    counts = commit_counts(block_length, steps * block_length // gen_length)
    commit_steps = torch.zeros_like(ids)
    step = torch.zeros_like(ids[:, :1])              # (B, 1): rows may take more or fewer steps
    rows = torch.arange(B, device=ids.device)                    # (R,): those without an end so far
    for start in range(P, P + gen_length, block_length):
        stop = start + block_length
        active = rows                                # (A,): those with masks left in the block
        kv = model.new_cache(len(rows), ids.size(1)) if cache else None
        block_step = 0
        while len(active):
            is_mask = ids[active, start:stop] == mask_id                     # (A, block_length)
            offsets = torch.arange(block_length, device=ids.device).expand_as(is_mask)
            if not threshold:                        # then every row has as many masks
                offsets = is_mask.nonzero()[:, 1].view(len(active), -1)      # (A, n)
            # with a cache the first step of a block sees all tokens, the others only the block
            left = start if cache and block_step else 0
            right = stop if left else ids.size(1)
            row_mask = None if attention_mask is None else attention_mask[active]
            logits = model(ids[active, left:right], row_mask, start - left + offsets, kv, left)
            logits[..., mask_id] = -torch.inf
            row_generators = [generators[row] for row in active.tolist()]
            tokens, confidence = choose(logits, temperature, row_generators)
            confidence = confidence.masked_fill(~is_mask.gather(1, offsets), -1)
            count = 1 if threshold else counts[block_step]
            surest = confidence.topk(count).indices
            commit = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, surest, True)
            if threshold:
                commit |= confidence >= threshold
            # a list of (row, position) pairs, for rows may commit different numbers of tokens
            where = active[:, None].expand_as(offsets)[commit], (start + offsets)[commit]
            ids[where] = tokens[commit]
            commit_steps[where] = step[active].expand_as(offsets)[commit]
            step[active] += 1
            block_step += 1
            unfilled = (ids[active, start:stop] == mask_id).any(dim=1)       # (A,)
            active = active[unfilled]
            if cache and not unfilled.all():
                kv = [layer[:, unfilled] for layer in kv]
        # as in generate
        ended = has_end(ids[rows, start:stop], model.config)
        ids[rows[ended], stop:] = model.config.eos_id
        commit_steps[rows[ended], stop:] = step[rows[ended]] - 1
        rows = rows[~ended]
        if len(rows) == 0:
            break
    return ids[:, P:], commit_steps[:, P:]


# ---- random streams and prompts, for all that draws or pads ----

def random_stream(*key):
    """A random.Random of the key alone: a resumed run, on any number of processes, draws alike."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


def torch_stream(device, *key):
    """The same as a torch.Generator."""
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

def show(tokenizer, completion, commit_steps):
    """Prints a completion (L,) after every step, masks as dots, then as it reads."""
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in completion]
    for step in range(int(commit_steps.max()) + 1):
        shown = [piece if committed <= step else '.'
                 for piece, committed in zip(pieces, commit_steps)]
        line = ''.join(shown).replace('\n', '\\n')
        print(f'{step + 1:4} {line}')
    print(tokenizer.decode(completion, skip_special_tokens=True))


def newest_model():
    """The newest model that a run has left in out/, or 'nano' when there is none."""
    return max(Path('out').glob('**/model'), key=os.path.getmtime, default='nano')


def main():
    import rewards
    import train
    from grpo import up_to_end
    from model import load

    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', nargs='*', help="folders or hub ids [the newest in out/, or 'nano']")
    p.add_argument('--task', default='gsm8k', choices=rewards.TASKS, help='whose problem to show')
    p.add_argument('--prompt', default='',
                   help='ask this instead; of several paragraphs a nano model never sees the first')
    p.add_argument('--gen_length', type=int, help="tokens [the model's default in train.py]")
    p.add_argument('--temperature', type=float, default=0.0, help='0: greedy')
    p.add_argument('--seed', type=int, default=0, help='of the problem and of the noise')
    args = p.parse_args()
    question = args.prompt
    if not question:
        examples = rewards.load_examples(args.task, 'nano', 'test')
        question = rewards.prompt(args.task, examples[args.seed % len(examples)])
    question.encode()                                # a lone surrogate: no tokenizer takes it
    dtype, device = torch.float32, 'cpu'
    if torch.cuda.is_available():
        dtype, device = torch.bfloat16, 'cuda'
    for name in args.model or [newest_model()]:
        defaults = argparse.Namespace(**train.defaults(name, args.task))
        gen_length = args.gen_length or defaults.gen_length
        steps = train.eval_steps(defaults, gen_length)
        model, tokenizer = load(name, dtype, device)
        prompt = chat(tokenizer, question)
        if len(prompt) + gen_length > model.config.max_sequence_length:
            raise ValueError(f'the prompt, {len(prompt)} tokens, and --gen_length {gen_length} are '
                             f'more than {name} takes: {model.config.max_sequence_length}')
        print(f'{name}: {tokenizer.decode(prompt)}')
        ids, commit_steps = generate(
            model, torch.tensor([prompt], device=device), gen_length, defaults.block_length,
            steps, args.temperature, generators=[torch_stream(device, args.seed)])
        kept = up_to_end(ids, model.config.end_ids)[0]           # all that is graded
        show(tokenizer, ids[0][kept], commit_steps[0][kept])


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f'sample.py: {e}')
