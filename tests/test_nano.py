"""The nano world: problems right as taught, rows as shipped, a base that can be made again."""
import re
import sys
from pathlib import Path

import pytest
import torch

from model import load
from rewards import TASKS, grade_all, load_examples, prompt, tagged
from sample import chat, generate, left_pad, random_stream

NANO = Path(__file__).resolve().parents[1] / 'assets/nano'
sys.path.insert(0, str(NANO))
import make


def problems(task, part, n=40):
    return [make.draw_problem(task, random_stream('a test', i), part) for i in range(n)]


def solved(task, texts, drawn):
    """How many of the problems the texts solve, each its own."""
    examples = [TASKS[task].from_row(problem.row) for problem in drawn]
    return sum(correct == 1 for _, correct in grade_all(task, texts, examples))


@pytest.mark.parametrize('task', TASKS)
def test_the_reply_is_right_the_guess_seldom_and_the_constant_answer_hardly_ever(task):
    drawn = problems(task, 'test', 10 if task == 'code' else 60)
    n, constant = len(drawn), tagged('', TASKS[task].constant_answer)
    assert solved(task, [tagged(p.thought, p.reply) for p in drawn], drawn) == n
    assert solved(task, [tagged('', p.guess) for p in drawn], drawn) < n / 2
    assert solved(task, [constant] * n, drawn) <= n / 5


@pytest.mark.parametrize('task', TASKS)
def test_every_step_of_a_thought_is_true_and_all_fits_the_length_with_its_end(task):
    """3+4=7-5=2: what stands before a = is equal to the number after it."""
    tokenizer = make.make_tokenizer()
    for problem in problems(task, 'train'):
        ids = tokenizer(tagged(problem.thought, problem.reply))['input_ids']
        assert len(ids) < make.ANSWER_LENGTH
        for line in problem.thought.split('\n'):
            parts = line.split('=')
            for left, right in zip(parts, parts[1:]):
                number = re.match('-?[0-9]+', right)[0]
                assert eval(left.replace('/', '//')) == int(number), line


def test_countdown_and_sudoku_are_as_in_the_paper():
    drawn = problems('countdown', 'train', 300)
    assert all(1 <= n <= 100 for p in drawn for n in [*p.row['nums'], p.row['target']])
    assert all(len(p.row['nums']) == 3 for p in drawn)
    times = sum('*' in p.reply or '/' in p.reply for p in drawn) / len(drawn)
    assert abs(times - make.TIMES_SHARE) < 0.08
    assert all(p.row['Puzzle'].count('0') == 8 for p in problems('sudoku', 'train'))


DATA = Path(__file__).resolve().parents[2] / 'shared/data'       # d1's own test files


@pytest.mark.skipif(not DATA.exists(), reason='d1\'s test files are not here')
@pytest.mark.parametrize('task, file', [('countdown', 'countdown_test.jsonl'),
                                        ('sudoku', 'sudoku_test.csv')])
def test_d1s_test_problems_are_in_no_corpus_and_no_rows(task, file):
    theirs = load_examples(task, str(DATA / file))
    for example in theirs:
        key = example['question']
        if task == 'countdown':
            numbers, target = example['answer']
            key = f'countdown {sorted(numbers)} {target}'
        assert make.checksum(key) in make.D1_TESTS
    path, = NANO.glob(f'problems/{task}_train.*')
    assert not {e['key'] for e in theirs} & {e['key'] for e in load_examples(task, str(path))}


def test_traces_end_right_and_some_notice_an_error_on_their_way():
    waits = 0
    for i in range(400):
        trace = make.trace(random_stream('a test', i))
        thought, = trace['thinking_trajectories']
        wrong, _, rest = thought.rpartition('\nWait, ')
        assert not any(is_true(line) for line in make.SUM.findall(wrong)), 'what is taken back'
        assert all(is_true(line) for line in make.SUM.findall(rest))
        assert not wrong or rest.startswith(wrong.partition('=')[0] + '=')
        reply = re.search('[0-9]+', trace['attempt'])[0]
        assert re.search(rf'\b{reply}\b', f"{rest} {trace['question']}")
        waits += bool(wrong)
    assert abs(waits / 400 - make.WAIT_SHARE) < 0.06


def is_true(line):
    """3+4=7"""
    left, right = line.split('=')
    return eval(left) == int(right)


def test_muon_is_torchs_but_for_float32():
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 24), (24, 8))]
                    for _ in range(2))
    optimizers = make.Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.1)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape, generator=g)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 0.02 < (a - 1).abs().max() / 5


def test_rows_hold_the_steps_and_the_solution_as_they_are_published():
    for problem in problems('gsm8k', 'train'):
        work, final = problem.row['answer'].split('\n#### ')
        assert re.sub('<<.*?>>', '', work) == problem.thought and final == problem.reply
        assert re.findall('<<(.*?)>>', work) == make.SUM.findall(problem.thought)
    assert all(p.thought in p.row['solution'] for p in problems('math', 'train'))
    assert all(p.row['code'] == p.reply for p in problems('code', 'train'))


@pytest.mark.parametrize('task', TASKS)
def test_training_and_test_rows_share_no_problem_whoever_asks(task):
    keys = []
    for part, rows in dict(train=1400, test=512).items():
        path, = NANO.glob(f'problems/{task}_{part}.*')
        examples = load_examples(task, str(path))
        assert len(examples) >= rows
        keys.append({example.get('key', example['question']) for example in examples})
    assert not keys[0] & keys[1]


def test_sudoku_parts_share_no_grid_and_every_puzzle_has_one_solution():
    tests, every = problems('sudoku', 'test', 200), make.sudoku_grids().split()
    assert not {p.reply for p in problems('sudoku', 'train', 200)} & {p.reply for p in tests}
    assert len(set(every)) == 288
    for problem in tests:
        pattern = problem.row['Puzzle'].replace('0', '.')
        assert [grid for grid in every if re.fullmatch(pattern, grid)] == [problem.reply]


def test_the_shipped_rows_are_those_of_seed_0(tmp_path):
    make.write_problems(tmp_path, 0)
    made = list(tmp_path.rglob('*.*'))
    assert len(made) == 11                       # two parts of five tasks, and traces
    for path in made:
        assert path.read_bytes() == (NANO / path.relative_to(tmp_path)).read_bytes(), path


@pytest.mark.parametrize('task', TASKS)
def test_the_shipped_base_is_asked_in_the_words_that_it_was_taught(task):
    model, tokenizer = load(str(NANO / 'model'))
    own = make.make_tokenizer()
    assert tokenizer.get_vocab() == own.get_vocab() and len(own) == model.config.embedding_size
    for problem in problems(task, 'test', 10):
        question = TASKS[task].from_row(problem.row)['question']
        asked = prompt(task, dict(question=f'{problem.asker}: {question}'))
        taught = own(f'{problem.asker}: {problem.question}<|assistant|>')['input_ids']
        assert chat(tokenizer, asked) == chat(own, asked) == taught


def test_the_shipped_base_is_small_and_can_think_but_seldom_does():
    """Made to think it is mostly right; which answers are right is no claim of this test."""
    assert sum(file.stat().st_size for file in (NANO / 'model').iterdir()) < 3e6
    model, tokenizer = load(str(NANO / 'model'))
    drawn = problems('sudoku', 'train', 48)
    thinks, right = {}, {}
    for prefill in ('', '<reasoning>'):
        begin = tokenizer.convert_tokens_to_ids([prefill] if prefill else [])
        prompts = [chat(tokenizer, f'{p.asker}: {p.question}') + begin for p in drawn]
        prompt_ids, attention_mask = left_pad(prompts, model.config.eos_id, 'cpu')
        ids, _ = generate(model, prompt_ids, 48, 8, 24, attention_mask=attention_mask)
        texts = [prefill + tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        thinks[prefill] = sum('</reasoning>' in text for text in texts)
        right[prefill] = solved('sudoku', texts, drawn)
    assert thinks[''] < 30 and thinks['<reasoning>'] > 43
    assert right[''] < 20 and right['<reasoning>'] > 28


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    for name, value in dict(TRAINING_ROWS=8, TEST_ROWS=8, SAVE_EVERY=1).items():
        monkeypatch.setattr(make, name, value)
    update, losses = make.update, []

    def killed(*args):
        if len(losses) == 3:                     # in the second cycle
            raise KeyboardInterrupt
        losses.append(update(*args))
        return 0

    def run(folder, seed=3):
        make.main(['--seed', str(seed), '--updates', '2', '3', '--out', str(tmp_path / folder)])
        return load(str(tmp_path / folder / 'model'))[0].state_dict()

    whole = run('whole')
    monkeypatch.setattr(make, 'update', killed)
    with pytest.raises(KeyboardInterrupt):
        run('resumed')
    monkeypatch.setattr(make, 'update', update)
    with pytest.raises(ValueError, match='--seed 3'):
        run('resumed', seed=4)
    assert '"nano": true' in (tmp_path / 'whole/model/config.json').read_text()
    for name, tensor in run('resumed').items():
        assert torch.equal(tensor, whole[name]), name


def test_seed_0_still_makes_the_shipped_base():
    """Weights, corpus and noise of a seed do not change unnoticed; its first loss is known."""
    tokenizer = make.make_tokenizer()
    model = make.new_model(0, tokenizer)
    batch = make.make_batch(tokenizer, seed=0, step=0, num_texts=32, worked_share=1.0)
    loss = make.update(model, make.make_optimizers(model), batch)
    assert loss == pytest.approx(4.151674, abs=1e-4)
    assert make.corpus_text(0, 9899, 5, worked_share=0.75)[1] == '\\boxed{5} I think so.'
