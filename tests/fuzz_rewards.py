"""Grades random and mutated completions of every task and prints the slowest.

    python tests/fuzz_rewards.py [n]      n per task, 10,000 by default
"""
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rewards import TASKS, tagged  # noqa: E402

GENERATIONS = ROOT.parent / 'shared/data/llada_generations'
CODE_TESTS = dict(tests=['assert f(1) == 2', 'assert f(2) == 4'], entry_point='f', setup='')
EXAMPLES = {
    'gsm8k': dict(question='How many?', answer=18.0),
    'math': dict(question='What?', answer='\\frac{1}{2}'),
    'countdown': dict(question='Numbers: [3, 4, 5]\nTarget: 17', answer=[[3, 4, 5], 17]),
    'sudoku': dict(question='Puzzle: 4320004330100004', answer='4321124334122134'),
    'code': dict(question='f', answer=CODE_TESTS)}
ANSWERS = ['18', '\\boxed{1/2}', '3 * 4 + 5', '4321124334122134']
PROGRAMS = ['def f(x):\n    return 2 * x', 'f = lambda x: x + x',
            'def f(x):\n    y = 0\n    while y < 2 * x:\n        y += 1\n    return y']
PIECES = ['<reasoning>', '</reasoning>', '<answer>', '</answer>', '\\boxed{', '}', '{',
          '<|eot_id|>', '<|endoftext|>', '\\frac', '\\text{', '(', ')', '**', '//', '/0', '-',
          '1,200', '.', '9' * 500, '1e400', 'nan', '\0', '\ud800', '٣', '²', '\n', ' ', '=', '```',
          '$', '%']


def mutated(text, other, rng):
    """The text with a part cut, replaced, repeated or moved, or with another text after it."""
    a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    repeats = rng.randrange(1, 400) if rng.random() < 0.2 else 1
    piece = rng.choice(PIECES) * repeats
    letter = chr(rng.randrange(0x3000))
    return rng.choice([
        text[:a] + text[b:], text[:a] + piece + text[a:], text[:a] + text[a:b] * 2 + text[b:],
        text[:a] + letter + text[a + 1:], text[b:] + text[:b], text + other])


def completions(task, n, rng):
    """n texts: mutated answers and, where ../shared is, real completions; some made of pieces."""
    answers = [f'```python\n{program}\n```' for program in PROGRAMS] if task == 'code' else ANSWERS
    seeds = [tagged('steps', answer) for answer in answers]
    for path in sorted(GENERATIONS.glob(f'{task}*_0_generations.json')):
        seeds += [item['generations'] for item in json.loads(path.read_text())['generations']]
    for i in range(n):
        text = rng.choice(seeds)
        if i % 4 == 0:
            text = ''.join(rng.choice(PIECES) for _ in range(rng.randrange(300)))
        for _ in range(rng.randrange(8)):
            text = mutated(text, rng.choice(seeds), rng)
        if i % 100 == 0:
            text *= rng.randrange(1, 50)
        yield text[:100_000]


def main(n=10_000):
    for task, example in EXAMPLES.items():
        limit = 3 if task == 'code' else 1               # seconds; a program may run for 2
        times, longest = [], 0
        for text in completions(task, n, random.Random(task)):
            start = time.perf_counter()
            reward, correct = TASKS[task].grade(text, example)
            times.append(time.perf_counter() - start)
            assert isinstance(reward, float) and isinstance(correct, (bool, float)), text[:200]
            assert times[-1] < limit, ascii(text[:200])
            longest = max(longest, len(text))
        print(f'{task}: {n} completions of up to {longest} characters, no exception, slowest '
              f'{max(times) * 1e3:.1f} ms, mean {sum(times) / n * 1e6:.0f} us')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
