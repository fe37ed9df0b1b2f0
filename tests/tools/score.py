"""Scores saved generations, ours or the official code's: accuracy, mean reward, mean length.

    python tests/tools/score.py gsm8k FILE.json ...
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'assets/nano')]
from make import solutions                                                   # noqa: E402
from rewards import PUZZLE, TASKS, grid_of, stray_grid, summary, visible     # noqa: E402


def graded(task, path):
    """One dict of reward, correct and effective_tokens per generation of a file."""
    items = []
    for item in json.loads(Path(path).read_text())['generations']:
        text, answer = item['generations'], item['ground_truth']
        if task == 'gsm8k' and isinstance(answer, str):
            answer = float(answer.replace(',', ''))
        reward, correct = TASKS[task].grade(text, {**item, 'answer': answer})
        words = len(visible(text).split())           # where a file has no tokens
        items.append(dict(question=item['question'], generations=text, reward=reward,
                          correct=correct, effective_tokens=item.get('effective_tokens', words)))
    return items


def score(task, paths):
    """The lines that the command prints."""
    items = [item for path in paths for item in graded(task, path)]
    s = summary(items)
    name = f"cells {s['share']:.1%}, solved" if task == 'sudoku' else 'accuracy'
    right = round(s['accuracy'] * s['n'])
    text = (f"{task}: {name} {s['accuracy']:.1%} ({right} of n = {s['n']}), 95 % interval "
            f"{s['low']:.1%} to {s['high']:.1%}\nmean reward {s['reward']:.3f}, mean length "
            f"{s['effective_tokens']:.1f} tokens (words, where a file has no effective_tokens)")
    return f'{text}\n{solutions_found(items)}' if task == 'sudoku' else text


def solutions_found(items):
    """The line for Sudokus: how many have several solutions, how many answers are one of them."""
    several = found = 0
    for item in items:
        puzzle = PUZZLE.search(item['question'])[0]
        grid = grid_of(stray_grid(visible(item['generations'])))
        # like the reward it looks at empty cells alone
        filled = ''.join(digit if clue == '0' else clue for clue, digit in zip(puzzle, grid))
        several += len(solutions(puzzle)) > 1
        found += filled in solutions(puzzle)
    return (f'{several} of the puzzles have several solutions, of which one is paid; '
            f'{found} answers are a solution')


if __name__ == '__main__':
    if len(sys.argv) < 3 or sys.argv[1] not in TASKS:
        sys.exit(f'usage: python tests/tools/score.py {"|".join(TASKS)} FILE.json ...')
    print(score(sys.argv[1], sys.argv[2:]))
