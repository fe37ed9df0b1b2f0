"""Scores 10,000 random and mutated completions per task and prints the slowest: python tests/fuzz_rewards.py [n]"""
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rewards import TASKS  # noqa: E402

GENERATIONS = ROOT.parent / 'shared/data/llada_generations'
EXAMPLES = {
    'gsm8k': {'question': 'How many?', 'answer': 18.0}, 'math': {'question': 'What?', 'answer': '\\frac{1}{2}'},
    'countdown': {'question': 'Numbers: [3, 4, 5]\nTarget: 17', 'answer': [[3, 4, 5], 17]},
    'sudoku': {'question': 'Puzzle: 4320004330100004', 'answer': '4321124334122134'},
    'code': {'question': 'f', 'answer': {'tests': ['assert f(1) == 2', 'assert f(2) == 4'], 'entry_point': 'f', 'setup': ''}},
}
PIECES = ['<reasoning>', '</reasoning>', '<answer>', '</answer>', '\\boxed{', '}', '{', '<|eot_id|>', '<|endoftext|>', '\\frac', '\\text{',
          '(', ')', '**', '//', '/0', '-', '1,200', '.', '9' * 500, '1e400', 'nan', '\0', '\ud800', '٣', '²', '\n', ' ', '=', '```', '$', '%']


def completions(task, n, rng):
    """Yield n texts: real LLaDA completions of the task, where they are at hand, and made-up ones, cut, spliced and repeated."""
    seeds = [f'<reasoning>\nsteps\n</reasoning>\n<answer>\n{a}\n</answer>' for a in ('18', '\\boxed{1/2}', '3 * 4 + 5', '4321124334122134')]
    if task == 'code':
        seeds = [seeds[0].replace('18', f'```python\n{code}\n```') for code in ('def f(x):\n    return 2 * x', 'f = lambda x: x + x',
                 'def f(x):\n    y = 0\n    while y < 2 * x:\n        y += 1\n    return y')]
    for path in sorted(GENERATIONS.glob(f'{task}*_0_generations.json')):
        seeds += [item['generations'] for item in json.loads(path.read_text())['generations']]
    for i in range(n):
        text = rng.choice(seeds) if i % 4 else ''.join(rng.choice(PIECES) for _ in range(rng.randrange(300)))
        for _ in range(rng.randrange(8)):
            a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
            piece = rng.choice(PIECES) * (rng.randrange(1, 400) if rng.random() < 0.2 else 1)
            text = rng.choice([text[:a] + text[b:], text[:a] + piece + text[a:], text[:a] + text[a:b] * 2 + text[b:],
                               text[:a] + chr(rng.randrange(0x3000)) + text[a + 1:], text[b:] + text[:b], text + rng.choice(seeds)])
        yield text * rng.randrange(1, 50) if i % 100 == 0 else text


def main(n=10_000):
    for task, example in EXAMPLES.items():
        slowest, longest, total = 0.0, 0, 0.0
        for text in completions(task, n, random.Random(task)):
            text = text[:100_000]
            start = time.perf_counter()
            reward, verdict = TASKS[task].reward(text, example), TASKS[task].correct(text, example)
            seconds = time.perf_counter() - start
            assert isinstance(reward, float) and isinstance(verdict, (bool, float)), repr(text[:200])
            assert seconds < (3 if task == 'code' else 1), repr(text[:200])  # code may run for 2 seconds
            slowest, longest, total = max(slowest, seconds), max(longest, len(text)), total + seconds
        print(f'{task}: {n} completions of up to {longest} characters, no exception, slowest {slowest * 1000:.1f} ms, '
              f'mean {total / n * 1e6:.0f} us')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
