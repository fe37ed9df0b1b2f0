"""Scores saved generations, ours or the official code's: accuracy, mean reward, mean length.

    python tests/tools/score.py gsm8k FILE.json ...
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from rewards import TASKS, summary, visible  # noqa: E402


def graded(task, path):
    """One dict of reward, correct and effective_tokens per generation of a file."""
    items = []
    for item in json.loads(Path(path).read_text())['generations']:
        text, answer = item['generations'], item['ground_truth']
        if task == 'gsm8k' and isinstance(answer, str):
            answer = float(answer.replace(',', ''))
        reward, correct = TASKS[task].grade(text, {**item, 'answer': answer})
        words = len(visible(text).split())           # where a file has no tokens
        items.append(dict(generations=text, reward=reward, correct=correct,
                          effective_tokens=item.get('effective_tokens', words)))
    return items


def score(task, paths):
    """The two lines that the command prints."""
    s = summary([item for path in paths for item in graded(task, path)])
    name = f"cells {s['share']:.1%}, solved" if task == 'sudoku' else 'accuracy'
    right = round(s['accuracy'] * s['n'])
    return (f"{task}: {name} {s['accuracy']:.1%} ({right} of n = {s['n']}), 95 % interval "
            f"{s['low']:.1%} to {s['high']:.1%}\nmean reward {s['reward']:.3f}, mean length "
            f"{s['effective_tokens']:.1f} tokens (words, where a file has no effective_tokens)")


if __name__ == '__main__':
    if len(sys.argv) < 3 or sys.argv[1] not in TASKS:
        sys.exit(f'usage: python tests/tools/score.py {"|".join(TASKS)} FILE.json ...')
    print(score(sys.argv[1], sys.argv[2:]))
