"""How fast the samplers and the log-probs are, beside the textbook's way: a markdown table.

    python tests/tools/bench.py                          on an idle machine
    python tests/tools/bench.py --only rollout --repeats 5
    python tests/tools/bench.py --quick                  tiny sizes: does it run?
On the CPU, with a random model. The cases of a piece take turns, and the median of their seconds
counts. A rollout is timed over its first block, whose work is that of every block, times their
number.
"""
import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))     # the folder of the seven modules

from grpo import grpo_loss                                                   # noqa: E402
from loglik import completion_logps, random_prompt_mask                      # noqa: E402
from model import Config, LLaDA                                              # noqa: E402
from sample import generate                                                  # noqa: E402

MODEL = dict(d_model=512, n_heads=8, n_kv_heads=8, n_layers=8, mlp_hidden_size=1536)
SMALL_MODEL = dict(d_model=64, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=192)


# ---- the textbook's way, as plain as it gets ----

@torch.no_grad()
def textbook_generate(model, prompt_ids, gen_length, block_length, steps, temperature=0.0):
    """LLaDA's published loop: logits and noise of all tokens at every step, to the last block.

    It knows no padding, and wants steps that divide gen_length.
    """
    P, mask_id = prompt_ids.size(1), model.config.mask_id
    ids = F.pad(prompt_ids, (0, gen_length), value=mask_id)                  # (B, T)
    count = gen_length // steps                  # tokens that a step commits
    for block_end in range(P + block_length, P + gen_length + 1, block_length):
        for _ in range(block_length // count):
            logits = model(ids)                                              # (B, T, V)
            logits[..., mask_id] = -torch.inf
            scores = logits
            if temperature > 0:
                noise = torch.rand(logits.shape, dtype=torch.float64)
                scores = logits.double() - temperature * (-noise.log()).log()
            tokens = scores.argmax(-1)                                       # (B, T)
            confidence = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
            confidence[ids != mask_id] = -torch.inf
            confidence[:, block_end:] = -torch.inf
            surest = confidence.topk(count).indices                          # (B, count)
            ids.scatter_(1, surest, tokens.gather(1, surest))
    return ids[:, P:]


def textbook_logps(model, prompt_ids, completion_ids, prompt_mask):
    """completion_logps by all logits, their log-softmax, and of that the completion's tokens."""
    prompt = prompt_ids.masked_fill(prompt_mask, model.config.mask_id)
    masks = torch.full_like(completion_ids, model.config.mask_id)
    logps = model(torch.cat((prompt, masks), dim=1)).log_softmax(-1)         # (B, T, V)
    completion_logps = logps[:, -completion_ids.size(1):]
    return completion_logps.gather(-1, completion_ids[..., None])[..., 0]


# ---- pieces of work: {case: function that does it}, the textbook's first ----
# Each function returns numbers, to be compared with the textbook's.

class BlockFilled(Exception):
    """Ends a rollout after its first block."""


def first_block(model, prompt_ids, block_length, sample):
    """The ids (B, block_length) of the first block, in the middle of the rollout sample()."""
    P = prompt_ids.size(1)
    block = None

    def stop(module, inputs):                    # before each forward pass
        nonlocal block
        ids = inputs[0]
        if ids.size(1) == block_length:          # with a cache: not the first pass of a block
            return
        block = ids[:, P:P + block_length]
        if (block != model.config.mask_id).all():
            raise BlockFilled
    hook = model.register_forward_pre_hook(stop)
    try:
        sample()
    except BlockFilled:
        pass
    finally:
        hook.remove()
    return block.flatten()


def rollout_cases(model, prompt_ids, completion_ids, block_length):
    """A rollout of two tokens per step; greedy, so that tokens can be compared."""
    L = completion_ids.size(1)
    knobs = dict(gen_length=L, block_length=block_length, steps=L // 2)

    def textbook():
        textbook_generate(model, prompt_ids, **knobs)

    def exact():
        generate(model, prompt_ids, **knobs)

    def cached():
        generate(model, prompt_ids, **knobs, cache=True)
    samplers = dict(textbook=textbook, exact=exact, cache=cached)

    return {case: partial(first_block, model, prompt_ids, block_length, sample)
            for case, sample in samplers.items()}


def logps_cases(model, prompt_ids, completion_ids, block_length):
    """Old log-probs under the prompt masks of four updates."""
    g = torch.Generator().manual_seed(1)
    prompt_masks = [random_prompt_mask(prompt_ids, 0.15, g) for _ in range(4)]

    @torch.no_grad()
    def textbook():                              # all four in one batch
        logps = textbook_logps(model, prompt_ids.repeat(4, 1), completion_ids.repeat(4, 1),
                               torch.cat(prompt_masks))
        return logps.flatten()

    @torch.no_grad()
    def ours():
        logps = [completion_logps(model, prompt_ids, completion_ids, prompt_mask)
                 for prompt_mask in prompt_masks]
        return torch.cat(logps).flatten()
    return dict(textbook=textbook, ours=ours)


def backward_cases(model, prompt_ids, completion_ids, block_length):
    """The diffu-GRPO loss of a micro-batch and its gradient."""
    prompt_mask = random_prompt_mask(prompt_ids, 0.15, torch.Generator().manual_seed(1))
    advantages = torch.linspace(-1, 1, len(prompt_ids))
    everything = torch.ones_like(completion_ids, dtype=torch.bool)

    def backward(logps_of):
        model.zero_grad()
        logps = logps_of(model, prompt_ids, completion_ids, prompt_mask)     # (B, L)
        old_logps, ref_logps = logps.detach() + 0.1, logps.detach() - 0.1
        loss, _ = grpo_loss(logps, old_logps, ref_logps, advantages, everything)
        loss.backward()
        norms = [p.grad.norm() for p in model.parameters()]
        return torch.stack([loss.detach(), *norms])

    def textbook():
        return backward(textbook_logps)

    def ours():
        return backward(completion_logps)
    return dict(textbook=textbook, ours=ours)


PIECES = dict(rollout=rollout_cases, logps=logps_cases, backward=backward_cases)


# ---- the table ----

def build(V, L, quick):
    """A random model, prompt_ids (B, P), completion_ids (B, L)."""
    B, P, size = (2, 8, SMALL_MODEL) if quick else (4, 64, MODEL)
    model = LLaDA(Config(**size, embedding_size=V, mask_id=V - 1, eos_id=V - 2)).eval()
    model.config.end_ids = (-1,)                 # no completion ends: every block is filled
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:                         # large weights, so that it has opinions
            p.data.normal_(0, 1.4 / size['d_model'] ** 0.5, generator=g)
    prompt_ids = torch.randint(V - 2, (B, P), generator=g)
    completion_ids = torch.randint(V - 2, (B, L), generator=g)
    return model, prompt_ids, completion_ids


def measure(piece, V, L, repeats, quick):
    """Prints the rows of a piece of work at one vocabulary and length."""
    block_length = 8 if quick else 32
    blocks = L // block_length if piece == 'rollout' else 1
    cases = PIECES[piece](*build(V, L, quick), block_length)
    seconds, numbers = {case: [] for case in cases}, {}
    for _ in range(repeats):
        for case, work in cases.items():
            began = time.perf_counter()
            numbers[case] = work()
            seconds[case].append(blocks * (time.perf_counter() - began))
    textbook = statistics.median(seconds['textbook'])
    for case in cases:
        median = statistics.median(seconds[case])
        agreement = compared(numbers[case], numbers['textbook'])
        print(f'| {piece} | {case} | {V:,} | {L} | {median:.3g} | {textbook / median:.2f} | '
              f'{agreement} |', flush=True)


def compared(ours, theirs):
    """How far numbers are the textbook's: of ids the share, else the largest relative gap."""
    if not ours.is_floating_point():
        return f'{(ours == theirs).float().mean():.0%} of ids'
    gaps = (ours - theirs).abs() / theirs.abs().clamp(min=1e-3)
    return f'within {gaps.max():.0e}'


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', default=list(PIECES), choices=PIECES)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--quick', action='store_true', help='tiny sizes: does it run?')
    args = p.parse_args(argv)
    print('| piece | case | vocabulary | tokens | seconds | x textbook | agrees with the textbook '
          '|\n' + '| --- ' * 7 + '|')
    sizes = [(32000, 128), (32000, 512), (126464, 128), (126464, 512)]
    if args.quick:
        sizes = [(1000, 16)]
    for piece in args.only:
        for V, L in sizes:
            if piece == 'rollout' or L < 512:    # the others only grow with it
                measure(piece, V, L, args.repeats, args.quick)


if __name__ == '__main__':
    main()
