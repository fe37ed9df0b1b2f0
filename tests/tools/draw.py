"""Draws completions being denoised, one below the other, as an animated SVG; or the idea of d1.

    python tests/tools/draw.py --model nano out/NAME/model --out FILE.svg
    python tests/tools/draw.py --idea --out assets/onestep.svg
The models answer the same test problem, greedily. --idea draws the one-step estimate of a
completion, by the first model, and the advantages of a group; all its numbers are the code's.
"""
import argparse
import html
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))     # the folder of the seven modules

import rewards                                                               # noqa: E402
import train                                                                 # noqa: E402
from grpo import group_advantages                                            # noqa: E402
from loglik import completion_logps, random_prompt_mask                      # noqa: E402
from model import load                                                       # noqa: E402
from sample import chat, generate                                            # noqa: E402
from sft import right_pad                                                    # noqa: E402

WIDTH = 8.4                # of a character at 14px
LINE = 20                  # pixels from line to line
MARGIN = 12
SECONDS = 0.5              # per denoising step
PAUSE = 5                  # steps for which the end stays
STYLE = ('text { font: 14px monospace; fill: #1f6feb; white-space: pre } '
         '.title { fill: #7d8590 } rect { fill: #8b949e; fill-opacity: 0.35 }')


def denoised(name, task, example):
    """The pieces of a model's answer, decoded, and the step that committed each."""
    model, tokenizer = load(name)
    defaults = train.defaults(name, task)
    prompt = chat(tokenizer, rewards.prompt(task, example))
    completion_ids, commit_steps = generate(
        model, torch.tensor([prompt]), defaults['gen_length'], defaults['block_length'],
        defaults['steps'])
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in completion_ids[0]]
    return pieces, commit_steps[0].tolist()


def panel(pieces, commit_steps, total, y):
    """SVG elements of a completion whose first line is at y, and the y of its last line.

    Each token is a box until its step, and text from then on; total: seconds until all repeats.
    Where nothing moves, all is text.
    """
    elements, x = [], MARGIN
    for piece, step in zip(pieces, commit_steps):
        begin = (step + 1) * SECONDS / total                     # share of the time, 0 to 1
        appear = (f'<animate attributeName="opacity" dur="{total}s" values="0;1" '
                  f'calcMode="discrete" repeatCount="indefinite" keyTimes="0;{begin:.4f}"/>')
        vanish = appear.replace('"0;1"', '"1;0"')
        for line_number, part in enumerate(piece.split('\n')):
            if line_number:
                x, y = MARGIN, y + LINE
            if part:
                width = WIDTH * len(part)
                elements.append(f'<rect x="{x:.1f}" y="{y - 12}" width="{width - 1:.1f}" '
                                f'height="15" rx="3" opacity="0">{vanish}</rect>')
                elements.append(f'<text x="{x:.1f}" y="{y}">{html.escape(part)}'
                                f'{appear}</text>')
                x += width
    return elements, y


def draw(panels):
    """The SVG of panels [(title, pieces, commit_steps)], as text."""
    last_step = max(max(commit_steps) for _, _, commit_steps in panels)
    total = SECONDS * (last_step + 1 + PAUSE)
    body, y = [], 32
    for title, pieces, commit_steps in panels:
        body.append(f'<text class="title" x="{MARGIN}" y="{y}">{html.escape(title)}</text>')
        elements, y = panel(pieces, commit_steps, total, y + LINE + 4)
        body += elements
        y += 36
    lines = [title for title, _, _ in panels]
    for _, pieces, _ in panels:
        lines += ''.join(pieces).split('\n')
    right = 2 * MARGIN + WIDTH * max(map(len, lines))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:.0f} {y - 22}">'
            f'<style>{STYLE}</style>\n' + '\n'.join(body) + '\n</svg>\n')


# ---- the idea: a completion in one forward pass, and its group ----

PROBLEM = dict(question='Mia has 10 cards, sells 3, eats 1 and buys 5. How many cards are left?',
               answer=11.0)
GROUP = [rewards.tagged('10-3=7-1=6+5=11', '11'), rewards.tagged('10-3=7-1=6+5=12', '12'),
         rewards.tagged('', '15'), 'I think so.']
CHAR = 7.3                 # width at 12px
GREEN, RED, BLUE, GREY = '#10b981', '#ef4444', '#3b82f6', '#8b949e'
IDEA_STYLE = ('text { font: 12px monospace; fill: #6e7f94; white-space: pre } '
              '.label { font: 12px sans-serif; fill: #7d8590 } '
              '.percent { font: 9px sans-serif; fill: #7d8590 }')


def one_step(name, completion, seed):
    """What d1's pass sees and says: prompt pieces, holes, completion pieces, their log-probs."""
    model, tokenizer = load(name)
    defaults = train.defaults(name)
    prompt_ids = torch.tensor([chat(tokenizer, rewards.prompt('gsm8k', PROBLEM))])       # (1, P)
    answer = tokenizer(completion, add_special_tokens=False)['input_ids']
    completion_ids = right_pad([answer], defaults['gen_length'], model.config.eos_id, 'cpu')
    generator = torch.Generator().manual_seed(seed)
    prompt_mask = random_prompt_mask(prompt_ids, defaults['p_mask_prompt'], generator)
    with torch.no_grad():
        logps = completion_logps(model, prompt_ids, completion_ids, prompt_mask)         # (1, L)
    prompt, pieces = [[tokenizer.decode([token]) for token in ids]
                      for ids in (prompt_ids[0], answer)]
    pieces.append('end')
    return prompt, prompt_mask[0].tolist(), pieces, logps[0].tolist()[:len(pieces)]


def text(x, y, words, kind='', anchor='middle'):
    return (f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">'
            f'{html.escape(words)}</text>')


def rect(x, y, width, height, colour, kind=''):
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'class="{kind}" fill="{colour}" fill-opacity="0.6"/>')


def frame(x, y, width, colour, opacity=0.25):
    return (f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" rx="4" class="frame" '
            f'fill="{colour}" fill-opacity="{opacity}" stroke="{colour}"/>')


def label(piece):
    """A token without the blanks around it; if it is nothing else, a sign for it."""
    return piece.strip() or ('\u21b5' if '\n' in piece else '\u00b7')


def boxes(pieces, masked, y):
    """SVG elements of a row of tokens, masked or in sight, and their (middle, width)."""
    elements, places, x = [], [], MARGIN
    for piece, is_masked in zip(map(label, pieces), masked):
        width = max(20, CHAR * len(piece) + 6)
        elements.append(frame(x, y, width, GREY if is_masked else BLUE))
        elements.append(text(x + width / 2, y + 15, '\u2592' if is_masked else piece))
        places.append((x + width / 2, width))
        x += width + 2
    return elements, places


def draw_idea(name, seed=0):
    """The SVG, as text: the one-step estimate of the first completion of GROUP, and all of it."""
    prompt, holes, pieces, logps = one_step(name, GROUP[0], seed)
    defaults = train.defaults(name)
    body, places = boxes(prompt, holes, 30)
    more, completion_places = boxes(pieces, [True] * len(pieces), 82)
    body += more
    right = max(x + width / 2 for x, width in places + completion_places)
    right = max(right, MARGIN + CHAR * max(map(len, GROUP)) + 270)           # columns of the group
    middle = (MARGIN + right) / 2
    body += [
        text(MARGIN, 22, "prompt q': each token is masked with probability "
             f"{defaults['p_mask_prompt']:g}", 'label', 'start'),
        text(MARGIN, 74, f'completion o: all of its {defaults["gen_length"]} tokens are masked; '
             'here up to its end', 'label', 'start'),
        frame(MARGIN, 116, right - MARGIN, GREY, 0),
        text(middle, 131, 'one forward pass of the masked diffusion model, over both', 'label')]
    for (x, _), piece, logp in zip(completion_places, pieces, logps):
        p = math.exp(logp)
        height = max(1, 40 * p)
        body += [f'<path d="M{x:.1f} 104V116M{x:.1f} 138V146" stroke="{GREY}"/>',
                 text(x, 200 - height, f'{100 * p:.0f}', 'percent'),
                 rect(x - 8, 204 - height, 16, height, GREEN, 'probability'),
                 text(x, 220, label(piece))]
    body.append(text(MARGIN, 242, "p(o_k | q') of every token in %, all at once; the sum of their "
                     f'logs, {sum(logps):.1f}, is taken for log p(o | q)', 'label', 'start'))

    scores = [rewards.TASKS['gsm8k'].reward(completion, PROBLEM) for completion in GROUP]
    advantages = group_advantages(torch.tensor(scores), len(scores)).tolist()
    zero = right - 85                            # where the bars of the advantages begin
    body += [text(MARGIN, 276, 'a group: completions of one prompt', 'label', 'start'),
             text(zero - 170, 276, 'reward', 'label', 'end'),
             text(zero, 276, 'advantage = reward - mean', 'label')]
    scale = 80 / max(1e-6, *map(abs, advantages))
    for i, (completion, score, advantage) in enumerate(zip(GROUP, scores, advantages)):
        y, width = 298 + 22 * i, scale * abs(advantage)
        left = zero if advantage > 0 else zero - width
        body += [text(MARGIN, y, completion.replace('\n', ' '), 'completion', 'start'),
                 text(zero - 170, y, f'{score:g}', 'reward', 'end'),
                 text(zero - 90, y, f'{advantage:+.2f}', 'advantage', 'end'),
                 rect(left, y - 10, width, 12, GREEN if advantage > 0 else RED, 'advantage')]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + MARGIN:.0f} {y + 14}">'
            f'<style>{IDEA_STYLE}</style>\n' + '\n'.join(body) + '\n</svg>\n')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', nargs='+', default=['nano'], help='folders or hub ids [nano]')
    p.add_argument('--titles', nargs='+', help='of the models [their names]')
    p.add_argument('--task', default='gsm8k', choices=rewards.TASKS, help='whose problem')
    p.add_argument('--seed', type=int, default=0, help='which of its test problems; of the holes')
    p.add_argument('--idea', action='store_true', help='draw the one-step estimate and a group')
    p.add_argument('--out', default='denoise.svg', help='the file [denoise.svg]')
    args = p.parse_args(argv)
    if args.idea:
        Path(args.out).write_text(draw_idea(args.model[0], args.seed))
        return
    titles = args.titles or args.model
    if len(titles) != len(args.model):
        p.error('--titles are as many as --model are')
    examples = rewards.load_examples(args.task, 'nano', 'test')
    example = examples[args.seed % len(examples)]
    panels = []
    for name, title in zip(args.model, titles):
        panels.append((f'{title}: {example["question"]}', *denoised(name, args.task, example)))
    Path(args.out).write_text(draw(panels))


if __name__ == '__main__':
    main()
