"""Draws completions being denoised, one below the other, as an animated SVG.

    python tests/tools/draw.py --model nano out/NAME/model --out FILE.svg
The models answer the same test problem, greedily.
"""
import argparse
import html
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))     # the folder of the seven modules

import rewards                                                               # noqa: E402
import train                                                                 # noqa: E402
from model import load                                                       # noqa: E402
from sample import chat, generate                                            # noqa: E402

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
                                f'height="15" rx="3">{vanish}</rect>')
                elements.append(f'<text x="{x:.1f}" y="{y}" opacity="0">{html.escape(part)}'
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


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', nargs='+', default=['nano'], help='folders or hub ids [nano]')
    p.add_argument('--titles', nargs='+', help='of the models [their names]')
    p.add_argument('--task', default='gsm8k', choices=rewards.TASKS, help='whose problem')
    p.add_argument('--seed', type=int, default=0, help='which of its test problems')
    p.add_argument('--out', default='denoise.svg', help='the file [denoise.svg]')
    args = p.parse_args(argv)
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
