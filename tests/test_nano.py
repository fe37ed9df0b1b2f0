"""The built-in problems: solvable, right as taught, split without overlap, and short enough for the nano model."""
import random

import pytest

import rewards
from model import nano_tokenizer

TASKS = list(rewards.TASKS)


def problems(task, part, n=40):
    return [rewards.make(task, random.Random(i), part) for i in range(n)]


@pytest.mark.parametrize('task', TASKS)
def test_the_worked_solution_is_right_and_the_wrong_reply_is_not_all_right(task):
    examples = problems(task, 'train', 10 if task == 'code' else 60)
    correct = lambda key: sum(float(rewards.TASKS[task].correct(rewards.tagged('', e[key]), e)) == 1 for e in examples)
    assert correct('reply') == len(examples)
    assert correct('wrong') < len(examples) / 2


@pytest.mark.parametrize('task', TASKS)
def test_parts_share_no_problem(task):
    keys = {'train': set(), 'test': set(), 'sft': set()}
    rng = random.Random(0)
    for _ in range(200):
        key, small, example = rewards.TASKS[task].draw(rng)
        keys[rewards.part_of(key, small)].add(key if task == 'sudoku' else example['question'])
    assert all(keys.values())
    assert not keys['train'] & keys['test'] and not keys['sft'] & keys['test']


def test_sudoku_parts_share_no_solution_grid_with_test_and_puzzles_have_one_solution():
    grids = {part: {e['answer'] for e in problems('sudoku', part)} for part in ('train', 'test', 'sft')}
    assert not (grids['train'] | grids['sft']) & grids['test']
    assert len(rewards.sudoku_grids().split()) == 288
    for example in problems('sudoku', 'test', 20):
        puzzle = example['question'][-16:]
        fits = [g for g in rewards.sudoku_grids().split() if all(p in ('0', d) for p, d in zip(puzzle, g))]
        assert fits == [example['answer']]


@pytest.mark.parametrize('task', TASKS)
def test_everything_fits_32_tokens_and_has_its_end(task):
    tokenizer = nano_tokenizer()
    for example in problems(task, 'train'):
        assert len(tokenizer(rewards.tagged(example['solution'], example['reply']))['input_ids']) < 32


@pytest.mark.parametrize('task', TASKS)
def test_there_are_500_different_test_problems(task):
    rng = random.Random(0)
    assert len({rewards.make(task, rng, 'test')['question'] for _ in range(3000)}) >= 500


def test_a_minority_of_the_corpus_thinks():
    example, rng = problems('gsm8k', 'train', 1)[0], random.Random(0)
    texts = [rewards.demonstration(example, rng, 0.35) for _ in range(1000)]
    assert 0.3 < sum(example['solution'] in text for text in texts) / 1000 < 0.4
    assert all(0.7 < sum(tag in text for text in texts) / 1000 < 0.9 for tag in ('<answer>', '</answer>'))


@pytest.mark.parametrize('task', TASKS)
def test_a_constant_answer_scores_little(task):
    examples = problems(task, 'test', 10 if task == 'code' else 60)
    text = rewards.tagged('', rewards.TASKS[task].trivial)
    assert sum(float(rewards.TASKS[task].correct(text, e)) == 1 for e in examples) <= 0.2 * len(examples)
