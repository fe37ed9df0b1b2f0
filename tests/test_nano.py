"""The built-in problems: right as taught, split without overlap, short enough for nano."""
import pathlib
import random
import re

import pytest

import rewards
import train
from grpo import complete
from model import load, nano_tokenizer
from rewards import TASKS


def problems(task, part, n=40):
    return [rewards.make(task, random.Random(i), part) for i in range(n)]


def solved(task, texts, examples):
    """How many of the examples the texts solve, each its own."""
    return sum(correct == 1 for _, correct in rewards.grade_all(task, texts, examples))


@pytest.mark.parametrize('task', TASKS)
def test_the_reply_is_right_the_guess_seldom_and_the_constant_answer_hardly_ever(task):
    examples = problems(task, 'test', 10 if task == 'code' else 60)
    n = len(examples)
    constant = rewards.tagged('', TASKS[task].constant_answer)
    right = [rewards.tagged(e['solution'], e['reply']) for e in examples]
    guesses = [rewards.tagged('', e['wrong']) for e in examples]
    assert solved(task, right, examples) == n
    assert solved(task, guesses, examples) < n / 2
    assert solved(task, [constant] * n, examples) <= n / 5


@pytest.mark.parametrize('task', TASKS)
def test_every_step_of_a_worked_solution_is_true(task):
    """3+4=7-5=2: what stands before a = is equal to the number after it."""
    for example in problems(task, 'train'):
        for line in example['solution'].split('\n'):
            parts = line.split('=')
            for left, right in zip(parts, parts[1:]):
                number = re.match('-?[0-9]+', right)[0]
                assert eval(left.replace('/', '//')) == int(number), line


@pytest.mark.parametrize('task', ['gsm8k', 'math'])
def test_a_worked_solution_ends_in_the_answer(task):
    for example in problems(task, 'train'):
        assert float(example['solution'].rpartition('=')[2]) == float(example['answer'])


@pytest.mark.parametrize('task', TASKS)
def test_training_and_test_share_no_problem_whoever_asks(task):
    parts = {}
    for part in ('train', 'test'):
        examples = problems(task, part, 300)
        parts[part] = {e['question'].removeprefix(f"{e['asker']}: ") for e in examples}
        assert {e['asker'] for e in examples} == set(rewards.ASKERS)
        assert all(e['question'].startswith(e['asker'] + ': ') for e in examples)
    assert not parts['train'] & parts['test']


def test_sudoku_parts_share_no_grid_and_every_puzzle_has_one_solution():
    tests = problems('sudoku', 'test', 200)
    assert not {e['answer'] for e in problems('sudoku', 'train')} & {e['answer'] for e in tests}
    every = set(rewards.sudoku_grids().split())
    assert len(every) == 288
    for example in tests:
        puzzle = example['question'][-16:]
        fits = [grid for grid in every if re.fullmatch(puzzle.replace('0', '.'), grid)]
        assert fits == [example['answer']] and 4 <= puzzle.count('0') <= 6


@pytest.mark.parametrize('task', TASKS)
def test_everything_fits_32_tokens_with_its_end(task):
    tokenizer = nano_tokenizer()
    for example in problems(task, 'train'):
        text = rewards.tagged(example['solution'], example['reply'])
        assert len(tokenizer(text)['input_ids']) < 32


@pytest.mark.parametrize('task', TASKS)
def test_there_are_500_different_test_problems(task):
    rng = random.Random(0)
    questions = {rewards.make(task, rng, 'test')['question'] for _ in range(3000)}
    assert len(questions) >= 500


# ---- the base in assets/ ----

def test_the_shipped_base_is_the_default_and_small(tmp_path):
    folder, settings = train.base_of(train.parse([]))
    assert settings is None and folder.name == 'nano'
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    model, tokenizer = load(folder)
    assert tokenizer.get_vocab() == nano_tokenizer().get_vocab()
    assert model.config.embedding_size == len(tokenizer)
    other, settings = train.base_of(train.parse(['--base_seed', '7', '--out', str(tmp_path)]))
    assert other == tmp_path / 'base-7' and settings['seed'] == 7


def test_the_shipped_base_can_think_and_seldom_does():
    """`--prefill <reasoning>` makes it think; which answers are right is no claim of this test."""
    model, tokenizer = load(train.base_of(train.parse([]))[0])
    examples = problems('gsm8k', 'train', 48)
    shares = []
    for prefill in ('', '<reasoning>'):
        args = train.parse(['--prefill', prefill])
        prompts = [train.encode(args, tokenizer, 'gsm8k', example) for example in examples]
        sampling = dict(gen_length=32, steps=16, block_length=8)
        *_, texts = complete(model, tokenizer, prompts, sampling, prefill=prefill)
        shares.append((sum('</reasoning>' in text for text in texts) / 48,
                       solved('gsm8k', texts, examples) / 48))
    (thinks, right), (made, made_right) = shares
    assert thinks < 0.6 and made > 0.9 and right < 0.7 and made_right > 0.8
