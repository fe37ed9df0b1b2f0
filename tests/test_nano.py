"""The nano world: problems right as taught, rows as shipped, a base that can be made again."""
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import load
from rewards import TASKS, grade_all, load_examples, prompt, tagged
from sample import chat, generate, left_pad, random_stream

NANO = Path(__file__).resolve().parents[1] / 'assets/nano'
sys.path.insert(0, str(NANO))
import make


SUM = re.compile(r'(?=(?:^|[\n=])([0-9]+[-+*/][0-9]+=[0-9]+))')   # 3+4=7-5=2: 3+4=7 and 7-5=2


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
                assert eval(left) == int(number), line


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


@pytest.mark.skipif(not DATA.exists(), reason='d1\'s test files are not here')
def test_a_quarter_of_d1s_sudokus_have_several_solutions_so_that_who_errs_nowhere_has_87_percent():
    examples = load_examples('sudoku', str(DATA / 'sudoku_test.csv'))
    drawn = [examples[i] for i in np.random.RandomState(42).choice(500, 256, replace=False)]
    several, solved, cells = 0, [], []
    for example in drawn:
        found = make.solutions(example['question'].removeprefix('Puzzle: '))
        several += len(found) > 1
        shares = [TASKS['sudoku'].correct(tagged('', grid), example) for grid in found]
        solved.append(shares.count(1) / len(shares))             # of a solution drawn at random
        cells.append(sum(shares) / len(shares))
    assert several == 63
    assert (round(sum(solved) / 2.56, 1), round(sum(cells) / 2.56, 1)) == (87.3, 93.4)


@pytest.mark.parametrize('task', ['countdown', 'sudoku'])
def test_what_is_left_out_is_not_drawn(task, monkeypatch):
    drawn, = problems(task, 'train', 1)
    left_out = drawn.key if task == 'countdown' else drawn.question
    monkeypatch.setattr(make, 'D1_TESTS', {make.checksum(left_out)})
    assert problems(task, 'train', 1)[0].key != drawn.key


def test_traces_end_right_and_some_notice_an_error_on_their_way():
    waits = 0
    for i in range(400):
        trace = make.trace(random_stream('a test', i))
        thought, = trace['thinking_trajectories']
        wrong, _, rest = thought.rpartition('\nWait, ')
        assert not any(map(is_true, SUM.findall(wrong))), 'what is taken back'
        assert all(map(is_true, SUM.findall(rest)))
        assert not wrong or rest.startswith(wrong.partition('=')[0] + '=')
        reply = int(re.search('[0-9]+', trace['attempt'])[0])
        last = int(re.findall('[0-9]+', rest)[-1])
        asked = map(int, re.findall('[0-9]+', trace['question']))
        assert reply == (max(asked) if 'larger' in trace['question'] else last)
        waits += bool(wrong)
    assert abs(waits / 400 - make.WAIT_SHARE) < 0.06


def is_true(line):
    """3+4=7"""
    left, right = line.split('=')
    return eval(left) == int(right)


def block_begun(row, given):
    """(block, its masks, the first of them) where the noise is the sampler's behind `given` tokens.

    None where it is not: all before the block in sight and all behind it masked.
    """
    counts = F.pad(row[given:], (0, given), value=True).view(-1, 8).sum(dim=1)
    block = (counts > 0).int().argmax().item()
    if row[:given].any() or not (counts[block + 1:] == 8).all():
        return None
    return block, counts[block].item(), row.int().argmax().item()


def test_noise_is_the_samplers_blocks_and_leaves_results_for_last():
    """Rows of 2+3=5 and an end of line, eight of them: in odd rows one block is begun.

    In a quarter of them the first token is given, as by a prefill, and blocks begin behind it.
    """
    equals = 7
    answers = torch.tensor([2, 9, 3, equals, 5, 8] * 8).expand(800, 48)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.full((800,), 8)
    masked = make.draw_base_masks(answers, torch.full((800,), 47), blocks, equals, generator)
    assert 0.6 < masked[::2].float().mean() < 0.7
    found = [block_begun(row, 0) for row in masked[1::2]]
    shifted = [block_begun(row, 1) for row, fits in zip(masked[1::2], found) if not fits]
    assert 0.06 < len(shifted) / 400 < 0.15 and None not in shifted, 'others fit both'
    for begun in (list(filter(None, found)), shifted):
        blocks, counts, _ = zip(*begun)
        assert len(set(blocks)) > 3 and len(set(counts)) > 5
    alone = [first for block, count, first in filter(None, found) if count == 1]
    assert len(alone) > 10
    assert sum(first % 6 == 4 for first in alone) > 0.5 * len(alone), 'a sixth by chance'


def test_sums_of_a_text_are_true_one_or_two_in_a_line():
    for i in range(100):
        lines = make.some_sums(random_stream('a test', i), 12).split('\n')
        assert len(lines) == 13 and lines.pop() == ''
        assert all(map(is_true, SUM.findall('\n'.join(lines))))
        sums = [SUM.findall(line) for line in lines]
        assert all(1 <= len(some) <= 2 for some in sums)


def test_of_sums_the_last_results_are_learnt_and_half_of_the_rows_end_at_one():
    """Two lines, 3+4=7-5=2 and 6+1=7, and ends."""
    equals, newline = 20, 21
    row = [3, 10, 4, equals, 7, 11, 5, equals, 2, newline, 6, 10, 1, equals, 7, newline, 0, 0]
    answers = torch.tensor(row).expand(200, -1)
    masked, scored = make.sums_masks(answers, equals, newline, torch.Generator().manual_seed(0))
    results = torch.zeros(18, dtype=torch.bool)
    results[[8, 14]] = True
    assert (scored <= masked).all() and (scored <= results).all() and scored.any(dim=1).all()
    whole = (masked == results).all(dim=1)
    assert (scored[whole] == results).all() and 0.3 < whole.float().mean() < 0.7
    for hidden, learnt in zip(masked[~whole], scored[~whole]):
        place = learnt.nonzero().max() + 1       # behind the last that is learnt all is masked
        assert hidden[place:].all() and torch.equal(hidden[:place], results[:place])


def test_the_corpus_is_sums_then_textbooks_then_people_and_so_again():
    def share(cycle, done, is_so):
        texts = [make.corpus_text(0, step, i, cycle, done) for step in range(4) for i in range(32)]
        return sum(map(is_so, texts)) / len(texts)
    def is_sums(text):
        return text.is_sums
    def by_somebody(text):
        return text.prompt.split(':')[0] in make.ASKERS
    first, second, _ = make.CYCLES
    assert share(first, 0.1, is_sums) == 1 and share(first, 0.1, by_somebody) == 0
    assert 0.25 < share(first, 0.5, is_sums) < 0.4 and share(first, 0.5, by_somebody) == 0
    assert 0.2 < share(first, 0.9, by_somebody) < 0.45
    assert share(second, 0, is_sums) == share(second, 0, lambda text: bool(text.given)) == 0.25
    assert share(second, 0, by_somebody) == 0 and 0.15 < share(second, 0.9, by_somebody) < 0.35


def test_of_some_countdowns_the_sums_are_given_and_what_follows_is_learnt():
    tokenizer = make.make_tokenizer()
    cycle = make.CYCLES[1]
    texts = [make.corpus_text(0, 13000, i, cycle, 0.5) for i in range(32)]
    given = {text.answer: text.given for text in texts if text.given}
    assert len(given) == 8
    _, answers, masked, scored, _ = make.make_batch(tokenizer, 0, 13000, cycle, 0.5)
    found, ways = 0, set()
    for ids, hidden, learnt in zip(answers, masked, scored):
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        if answer in given:
            n = len(tokenizer(given[answer])['input_ids'])
            assert answer.startswith(given[answer])
            begins = re.match('\n|\\+|/2=', answer.removeprefix(given[answer]))
            ways.add(begins[0])
            assert not hidden[:n].any() and torch.equal(hidden, learnt)
            found += hidden[n:].any().item()
    assert found >= 7 and {'\n', '/2='} <= ways


def test_muon_is_torchs_but_for_float32():
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 24), (24, 8))]
                    for _ in range(2))
    optimizers = make.Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.3)
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
        assert re.findall('<<(.*?)>>', work) == SUM.findall(problem.thought)
    assert all(p.thought in p.row['solution'] for p in problems('math', 'train'))
    assert all(p.row['code'] == p.reply for p in problems('code', 'train'))


@pytest.mark.parametrize('task', TASKS)
def test_training_and_test_rows_share_no_problem_whoever_asks(task):
    keys = []
    for part, rows in dict(train=2000, test=512).items():
        path, = NANO.glob(f'problems/{task}_{part}.*')
        examples = load_examples(task, str(path))
        assert len(examples) >= rows
        keys.append({example.get('key', example['question']) for example in examples})
    assert not keys[0] & keys[1]


def test_sudoku_parts_share_no_grid_and_every_puzzle_has_one_solution():
    tests, every = problems('sudoku', 'test', 200), make.sudoku_grids()
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
    """Asked by nobody it is mostly right; which answers are right is no claim of this test."""
    assert sum(file.stat().st_size for file in (NANO / 'model').iterdir()) < 3e6
    model, tokenizer = load(str(NANO / 'model'))
    drawn = problems('gsm8k', 'train', 48)
    thinks, right = {}, {}
    for asked_by in ('people', 'nobody'):
        prompts = []
        for p in drawn:
            name = f'{p.asker}: ' if asked_by == 'people' else ''
            prompts.append(chat(tokenizer, name + p.question))
        prompt_ids, attention_mask = left_pad(prompts, model.config.eos_id, 'cpu')
        ids, _ = generate(model, prompt_ids, 48, 4, 24, attention_mask=attention_mask)
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        thinks[asked_by] = sum('</reasoning>' in text for text in texts)
        right[asked_by] = solved('gsm8k', texts, drawn)
    assert thinks['people'] < 24 and thinks['nobody'] > 43
    assert right['people'] < 20 and right['nobody'] > 33


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    for name, value in dict(TRAINING_ROWS=8, TEST_ROWS=8, SAVE_EVERY=2).items():
        monkeypatch.setattr(make, name, value)
    update, losses = make.update, []

    def killed(*args):
        if len(losses) == 3:
            raise KeyboardInterrupt
        losses.append(update(*args))
        return 0

    def counted(*args):
        losses.append(update(*args))
        return 0

    def run(folder, seed=3, layers=2):
        make.main(['--seed', str(seed), '--updates', '5', '--layers', str(layers),
                   '--out', str(tmp_path / folder)])
        return load(str(tmp_path / folder / 'model'))[0].state_dict()

    whole = run('whole')
    monkeypatch.setattr(make, 'update', killed)
    with pytest.raises(KeyboardInterrupt):
        run('resumed')
    monkeypatch.setattr(make, 'update', counted)
    rows = (tmp_path / 'resumed/problems/math_train.jsonl').read_text()
    with pytest.raises(ValueError, match='--seed 3'):
        run('resumed', seed=4)
    with pytest.raises(ValueError, match='--layers 2'):
        run('resumed', layers=3)
    assert (tmp_path / 'resumed/problems/math_train.jsonl').read_text() == rows
    config = (tmp_path / 'whole/model/config.json').read_text()
    assert '"nano": true' in config and '"n_layers": 2' in config
    for name, tensor in run('resumed').items():
        assert torch.equal(tensor, whole[name]), name
    assert len(losses) == 3 + 3, 'two of five are in the checkpoint'


def test_a_base_goes_on_for_half_as_many_updates(tmp_path, monkeypatch):
    for name, value in dict(TRAINING_ROWS=8, TEST_ROWS=8, update=lambda *_: 0.0).items():
        monkeypatch.setattr(make, name, value)
    seen = []

    def spied(tokenizer, seed, step, cycle, done):
        seen.append((step, cycle, done))
    monkeypatch.setattr(make, 'make_batch', spied)
    flags = ['--updates', '4', '--layers', '2', '--out']
    make.main([*flags, str(tmp_path / 'base')])
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    seen.clear()
    base = str(tmp_path / 'base/model')
    make.main([*flags, str(tmp_path / 'longer'), '--seed', '1', '--base', base])
    third = make.CYCLES[2]
    assert seen == [(4, third, 0), (5, third, 0.5)]
    weights = load(str(tmp_path / 'longer/model'))[0].state_dict()
    for name, tensor in load(base)[0].state_dict().items():      # nothing was learnt: of seed 0
        assert torch.equal(tensor, weights[name]), name


def test_a_seed_makes_the_base_that_it_made():
    """Weights, corpus and noise of seed 0 do not change unnoticed; its first loss is known."""
    tokenizer = make.make_tokenizer()
    model = make.new_model(0, tokenizer, layers=3)
    batch = make.make_batch(tokenizer, 0, 13000, make.CYCLES[1], done=0.5)
    loss = make.update(model, make.make_optimizers(model), batch)
    assert loss == pytest.approx(5.635564, abs=1e-4)
    assert '1432132431244213' in make.corpus_text(0, 14399, 4, make.CYCLES[1], done=0.99).answer
