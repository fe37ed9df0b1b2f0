"""What rewards.py claims: verdicts as the official evaluation's, rewards as the paper's, no harm from any text."""
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rewards
from rewards import TASKS, load_examples, load_s1k, prompt, wilson

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
GENERATIONS = SHARED / 'data/llada_generations'
needs_shared = pytest.mark.skipif(not GENERATIONS.is_dir(), reason='../shared with real generations is not here')

GSM8K = {'question': 'How many?', 'answer': 18.0}
MATH = {'question': 'What?', 'answer': '\\frac{1}{2}'}
COUNTDOWN = {'question': 'Numbers: [3, 4, 5]\nTarget: 17', 'answer': [[3, 4, 5], 17]}
SUDOKU = {'question': 'Puzzle: 4320004330100004', 'answer': '4321124334122134'}
EXAMPLES = {'gsm8k': GSM8K, 'math': MATH, 'countdown': COUNTDOWN, 'sudoku': SUDOKU}


def tagged(answer, steps='steps'):
    return f'<reasoning>\n{steps}\n</reasoning>\n<answer>\n{answer}\n</answer>'


# --- agreement with the official evaluation on 2142 completions of LLaDA-8B-Instruct ---

# (file, item): why we judge otherwise on purpose
CORRECTIONS = {
    ('countdown_instruct_128_64_5', 9): 'right expression in the answer tags, with two blanks and without a box',
    ('gsm8k_instruct_128_64_1', 79): '43,500 was read as 43',
    ('gsm8k_instruct_128_64_6', 33): r'385\,000 was read as 385',
    ('gsm8k_instruct_128_64_5', 17): 'the box was not found because a newline stands in it',
    ('math500_instruct_128_64_0', 202): r'36.00 is \$36',
    ('math500_instruct_128_64_0', 238): '58500 is 58,500',
    ('sudoku_instruct_128_64_2', 21): 'the answer tag never closes: no answer, not one cell by luck',
    ('sudoku_instruct_128_64_5', 0): 'a doubled <answer> tag was read as two cells of the grid',
}


@pytest.fixture(scope='module')
def verdicts():
    """(file, item) -> (task, official, ours); sudoku in cells."""
    found = {}
    for name, official in json.loads((SHARED / 'golden/parse_verdicts_128.json').read_text()).items():
        task = name.split('_')[0].replace('500', '')
        items = json.loads((GENERATIONS / name).read_text())['generations']
        assert len(items) == len(official)
        for i, (item, verdict) in enumerate(zip(items, official)):
            ours = TASKS[task].correct(item['generations'], {**item, 'answer': item['ground_truth']})
            if task == 'sudoku':
                verdict, ours = verdict[0], round(ours * verdict[1])
            found[name.removesuffix('_generations.json'), i] = task, verdict, ours
    return found


@needs_shared
def test_verdicts_differ_from_the_official_ones_only_where_we_mean_them_to(verdicts):
    assert len(verdicts) == 2142
    assert {key for key, (_, official, ours) in verdicts.items() if official != ours} == set(CORRECTIONS)
    assert len(CORRECTIONS) <= 0.005 * 2142


@needs_shared
@pytest.mark.parametrize('task, total, n', [('countdown', 53, 256), ('gsm8k', 783, 1130), ('math', 130, 500),
                                            ('sudoku', 240, 2048)])
def test_totals_are_within_half_a_point_of_the_official_ones(verdicts, task, total, n):
    assert sum(official for name, official, _ in verdicts.values() if name == task) == total
    ours = sum(verdict for name, _, verdict in verdicts.values() if name == task)
    assert abs(ours - total) / n <= 0.005


# --- gsm8k ---

def test_a_perfect_gsm8k_completion_earns_four():
    assert TASKS['gsm8k'].reward(tagged(18), GSM8K) == 4.0
    assert TASKS['gsm8k'].reward(tagged(18) + '\n<|eot_id|><|endoftext|>', GSM8K) == 4.0
    assert TASKS['gsm8k'].reward('', GSM8K) == 0.0


def test_each_tag_that_occurs_once_earns_an_eighth():
    assert rewards.tag_count(tagged(1)) == 0.5
    assert rewards.tag_count('<reasoning> 1 </reasoning>') == 0.25
    assert rewards.tag_count('<answer><answer>') == 0.0


def test_text_behind_the_answer_costs_a_thousandth_a_character_down_to_zero():
    assert rewards.tag_count(tagged(1) + 'x' * 100) == pytest.approx(0.4)
    assert rewards.tag_count(tagged(1) + '\n') == 0.5
    assert rewards.tag_count(tagged(1) + 'x' * 10000) == 0.0


def test_soft_format_allows_one_line_and_strict_format_does_not():
    one_line = '<reasoning>a</reasoning><answer>1</answer>'
    assert (rewards.soft_format(one_line), rewards.strict_format(one_line)) == (0.5, 0.0)
    assert rewards.soft_format('so ' + one_line) == rewards.soft_format(one_line[:-1]) == 0.0
    assert rewards.soft_format('<answer>1</answer><reasoning>a</reasoning>') == 0.0
    assert rewards.soft_format('<reasoning>a</reasoning> so <answer>1</answer>') == 0.0


def test_strict_format_takes_many_lines_and_one_last_newline_only():
    text = tagged(1, 'one\ntwo\n\nthree')
    assert rewards.strict_format(text) == rewards.strict_format(text + '\n') == 0.5
    assert rewards.strict_format(text + '\n\n') == rewards.strict_format(' ' + text) == 0.0
    assert rewards.strict_format(text.replace('</reasoning>\n', '</reasoning>\n\n')) == 0.0


@pytest.mark.parametrize('answer, whole', [('18', 1), ('-18', 1), ('1,200', 1), ('\\boxed{18}', 1), ('18.0', 0), ('', 0),
                                           ('18 eggs', 0), ('1,20', 0), ('١٨', 0), ('²', 0)])
def test_the_integer_part_wants_a_whole_ascii_number(answer, whole):
    assert rewards.integer_answer(tagged(answer)) == 0.5 * whole


@pytest.mark.parametrize('answer, value', [
    ('18', 18), ('$18', 18), ('\\boxed{18}', 18), ('\\boxed{18\\text{ eggs}}', 18), ('1,200 dollars', 1200), ('-3.5', -3.5),
    ('1{,}200', 1200), ('\\boxed{}18', 18), ('.5', 0.5), ('18.', 18), ('1,2', 1), ('nan', None),
    ('inf', None), ('١٨', None)])
def test_the_first_number_of_the_answer_counts(answer, value):
    assert rewards.number(rewards.final_answer(tagged(answer))) == value


def test_the_answer_stands_in_the_tags_or_else_in_the_last_box():
    assert rewards.final_answer('\\boxed{1} ' + tagged('2')) == '2'
    assert rewards.final_answer('\\boxed{1} and \\boxed{ {3} }') == '{3}'
    assert rewards.final_answer('<answer>\\boxed{3') == ''
    assert rewards.final_answer('\\boxed{803\n}') == '803'
    assert rewards.final_answer('the answer is 18') == ''
    assert rewards.final_answer(tagged('1') + '<|endoftext|>' + tagged('2')) == '1'


def test_an_unknown_truth_is_never_right():
    for text in ('', tagged(''), tagged('None'), tagged('18')):
        assert TASKS['gsm8k'].correct(text, {**GSM8K, 'answer': None}) is False


# --- math ---

@pytest.mark.parametrize('truth, same', [
    ('\\frac{1}{2}', ['\\dfrac{1}{2}', '\\tfrac12', '\\frac{1}2', '1/2', '0.5', '.50', ' \\frac { 1 } { 2 } ', 'x = 1/2']),
    ('\\sqrt{3}', ['\\sqrt3', '$\\sqrt{3}$', '\\sqrt{3}\\text{ cm}', '\\sqrt{3}\\mbox{ inches}^2']),
    ('\\left( 3, \\frac{\\pi}{2} \\right)', ['(3,\\frac{\\pi}{2})', '(3{,}\\frac{\\pi}{2})', '(3, \\dfrac{\\pi}{2})']),
    ('90^\\circ', ['90', '90^{\\circ}', '90°']), ('58,500', ['58500', '58{,}500', '58,\\!500']),
    ('\\text{Evelyn}', ['Evelyn', '\\mathrm{Evelyn}']), ('5.4 \\text{ cents}', ['5.4', '5.40']),
    ('36', ['36.00', '\\$36', '36.', '36\\%']),
])
def test_spellings_of_one_answer_are_equal(truth, same):
    assert {rewards.latex_key(text) for text in same} == {rewards.latex_key(truth)}


@pytest.mark.parametrize('one, other', [('1', '2'), ('\\frac{1}{2}', '\\frac{2}{4}'), ('12', '1,2'), ('(1,2)', '(2,1)'),
                                        ('x', 'y'), ('2 \\text{ or } 3', '2'), ('-5', '5'), ('10', '1'), ('100', '1')])
def test_different_answers_differ(one, other):
    assert rewards.latex_key(one) != rewards.latex_key(other)


def test_math_format_has_four_levels_and_right_adds_two():
    reward = TASKS['math'].reward
    assert reward(tagged('\\boxed{1}'), MATH) == 1.0
    assert reward(tagged('1'), MATH) == 0.75
    assert reward('so \\boxed{1}', MATH) == 0.5
    assert reward('1', MATH) == reward('', MATH) == 0.25
    assert reward(tagged('\\boxed{1/2}'), MATH) == 3.0
    assert TASKS['math'].correct(tagged('1/2'), MATH) is False  # no box, as in the official evaluation


# --- countdown ---

@pytest.mark.parametrize('equation, reward', [
    ('3 * 4 + 5', 1), ('5 + 3*4 = 17', 1), ('\\boxed{(3 \\times 4) + 5}', 1), ('--5+3*4', 1), ('5-(-3)*4', 1),
    ('3 + 4 + 5', 0.1), ('3 - 4 / 5', 0.1), ('3 * 4', 0), ('3 * 4 + 5 + 0', 0), ('3 * 4 + 5 + 3 - 3', 0),
    ('3 * 4 +' + ' ' * 200 + '5', 0), ('17', 0), ('12 + 5', 0),
    ('3 * 4 + 5.0', 0), ('3 ** 4 * 5', 0), ('3 // 4 + 5', 0), ('3.4 + 5', 0), ('3 / (4 - 4) + 5', 0), ('4 % 3 + 5', 0),
    ('', 0), ('x', 0), ('3 *', 0), ('(3 * 4 + 5', 0), ('3(4)5', 0), ('9**9**9', 0), ('+3*4+5', 0), ('(3, 4, 5)', 0),
    ('٣*4+5', 0)])
def test_countdown_wants_each_number_once_and_the_target(equation, reward):
    assert TASKS['countdown'].reward(tagged(equation), COUNTDOWN) == reward
    assert TASKS['countdown'].correct(tagged(equation), COUNTDOWN) is (reward == 1)


def test_countdown_is_exact():
    thirds = {'question': '', 'answer': [[1, 3, 3], 1]}
    assert TASKS['countdown'].correct(tagged('1 / 3 * 3'), thirds)
    near = {'question': '', 'answer': [[1, 300000, 300001], 1]}  # 3e-6 off
    assert TASKS['countdown'].reward(tagged('300000 / 300001 * 1'), near) == 0.1
    huge = {'question': '', 'answer': [[10 ** 17 + 1, 1, 1], 10 ** 17]}
    assert not TASKS['countdown'].correct(tagged(f'{10 ** 17 + 1} + 1 - 1'), huge)


# --- sudoku ---

def test_sudoku_counts_the_empty_cells_only():
    cells = TASKS['sudoku'].correct
    assert TASKS['sudoku'].reward is cells
    assert cells(tagged('4321124334122134'), SUDOKU) == 1.0
    assert cells(tagged('4321\n1243\n3412\n2134'), SUDOKU) == 1.0
    assert cells(tagged('4320004330100004'), SUDOKU) == 0.0
    assert cells(tagged('4321'), SUDOKU) == 1 / 8
    assert cells(tagged('٤٣٢١١٢٤٣٣٤١٢٢١٣٤'), SUDOKU) == cells('4321124334122134', SUDOKU) == 0.0


# --- code ---

CODE = {'question': 'f', 'answer': {'tests': ['assert f(1) == 2', 'assert f(2) == 4'], 'entry_point': 'f', 'setup': ''}}


def test_code_stands_in_the_answer_or_in_the_last_fence():
    body = 'def f(x):\n    return 2 * x'
    for text in (tagged(body), tagged(f'```python\n{body}\n```'), f'So:\n```\nold\n```\n```python\n{body}\n```',
                 tagged(f'Here:\n```py\n{body}\n```'), f'```python\n{body}'):
        assert rewards.code_of(text).strip() == body, text
    assert rewards.code_of('f = 1') == ''


def test_code_earns_the_share_of_tests_and_the_format_part():
    right, half, wrong = ('def f(x):\n    return ' + value for value in ('2 * x', '2', 'None'))
    reward, correct = TASKS['code'].reward, TASKS['code'].correct
    assert [reward(tagged(code), CODE) for code in (right, half, wrong)] == [1.5, 1.0, 0.5]
    assert reward(f'```\n{right}\n```', CODE) == 1.0 and reward('', CODE) == 0.0
    assert [correct(tagged(code), CODE) for code in (right, half, wrong)] == [True, False, False]


@needs_shared
def test_human_eval_solutions_pass_and_empty_bodies_fail():
    path = str(SHARED / 'data/humaneval.jsonl.gz')
    rows, examples = rewards.json_lines(path), load_examples('code', path)
    assert len(examples) == 164
    for i in (0, 10, 32, 38, 50):  # all but the first need a helper function of the prompt
        name = rows[i]['entry_point']
        written = rows[i]['prompt'][rows[i]['prompt'].index(f'def {name}('):] + rows[i]['canonical_solution']
        assert TASKS['code'].correct(tagged(written), examples[i]), name
        assert not TASKS['code'].correct(tagged(f'def {name}(*given): pass'), examples[i]), name


# --- hostile text ---

HOSTILE = {
    'empty': '', 'blanks': ' \n' * 50_000, 'NUL': '\0' * 1000 + tagged('\0'), 'surrogate': tagged('\ud800'),
    'opened': '<reasoning>' * 9_000, 'answers opened': '<answer>' * 12_500, 'answers closed': '</answer>' * 11_000,
    'tags repeated': tagged(1) * 2_000, 'tags nested': '<answer>' * 20_000 + '1' + '</answer>' * 20_000,
    'boxes opened': '\\boxed{' * 14_000, 'boxes nested': '\\boxed{' * 12_000 + '1' + '}' * 12_000,
    'braces opened': '\\boxed{' + '{' * 99_000, 'braces closed': tagged('}' * 99_000),
    'braces': tagged('\\boxed{' + '{}' * 49_000),
    'parentheses': tagged('(' * 99_000), 'few parentheses': tagged('(' * 99 + '3' + ')' * 99),
    'minuses': tagged('-' * 199 + '3'),
    'brackets': tagged('[' * 99_000), 'powers': tagged('9**9**9**9'), 'products': tagged('*'.join(['99'] * 66)),
    'digits': tagged('9' * 99_999), 'box of digits': tagged('\\boxed{' + '9' * 99_000 + '}'), 'exponent': tagged('1e400'),
    'commas': tagged('1' + ',111' * 24_000), 'dots': tagged('.' * 99_000), 'long fraction': tagged('1/' * 499),
    'nan': tagged('nan'), 'inf': tagged('-inf'), 'unicode digits': tagged('١٢٣٤' * 4), 'superscript': tagged('²³'),
    'fractions': tagged('\\boxed{' + '\\frac{' * 160 + '}'), 'zero': tagged('\\boxed{\\frac{1}{0}}'),
    'text': tagged('\\boxed{' + '\\text{' * 160 + '}'),
    'blanks in a box': tagged('\\boxed{' + ' ' * 990 + 'x}'), 'ends': '<|endoftext|>' * 7_000, 'fences': '```\n' * 25_000,
}


@pytest.mark.parametrize('task', EXAMPLES)
@pytest.mark.parametrize('name', HOSTILE)
def test_no_text_hangs_or_breaks_a_reward(task, name):
    start = time.perf_counter()
    reward = TASKS[task].reward(HOSTILE[name], EXAMPLES[task])
    verdict = TASKS[task].correct(HOSTILE[name], EXAMPLES[task])
    rewards.code_of(HOSTILE[name])
    assert time.perf_counter() - start < 1
    assert isinstance(reward, float) and 0 <= reward < 2.5 and float(verdict) < 1


@pytest.mark.parametrize('task', EXAMPLES)
def test_mutated_completions_are_scored_without_an_exception(task):
    from fuzz_rewards import completions
    for text in completions(task, 200, random.Random(0)):
        assert 0.0 <= TASKS[task].reward(text, EXAMPLES[task]) <= 4.0
        assert isinstance(TASKS[task].correct(text, EXAMPLES[task]), (bool, float))


# --- data ---

def write(tmp_path, name, *rows):
    path = tmp_path / name
    path.write_text('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding='utf-8')
    return str(path)


def test_rows_of_the_known_layouts_become_examples():
    row = {task: TASKS[task].from_row for task in TASKS}
    gsm8k = row['gsm8k']({'question': 'q', 'answer': 'It is <<2*600=1200>>1200.\n#### 1,200'})
    assert (gsm8k['question'], gsm8k['answer'], gsm8k['solution'], gsm8k['reply']) == ('q', 1200.0, '2*600=1200', '1,200')
    assert row['math']({'problem': 'p', 'solution': 'so \\boxed{\\frac{1}{2}}.'})['answer'] == '\\frac{1}{2}'
    assert row['math']({'problem': 'p', 'solution': 'so', 'answer': '7'})['answer'] == '7'
    assert row['countdown']({'input': '30,100,93', 'output': '23'})['answer'] == [[30, 100, 93], 23]
    assert row['countdown']({'nums': [3, 4, 5], 'target': 17}) == COUNTDOWN
    assert row['countdown']({'nums': [3, 4, 5, 6], 'target': 17}) is None
    assert row['sudoku']({'Puzzle': 21124334122134, 'Solution': 4321124334122134})['question'].endswith('0021124334122134')


def test_code_rows_of_three_data_sets_become_tests():
    right = tagged('def double(x):\n    return 2 * x')
    mbpp = {'text': 'Double it.', 'test_list': ['assert double(1) == 2', 'assert double(ONE) == 2'],
            'test_setup_code': 'ONE = 1'}
    clean = {**mbpp, 'test_setup_code': None, 'test_imports': ['ONE = 1']}
    kodcode = {'question': 'Double it.',
               'test': 'import pytest\nfrom solution import double\n\nONE = 1\n\ndef test_one():\n'
                       '    assert double(ONE) == 2\n\ndef test_two():\n    assert double(2) == 4\n'}
    human = {'prompt': 'import math\n\ndef double(x):\n    """Twice x."""\n', 'entry_point': 'double',
             'test': 'def check(candidate):\n    assert candidate(math.e) == 2 * math.e\n'}
    for row, tests in ((mbpp, 2), (clean, 2), (kodcode, 2), (human, 1)):
        example = TASKS['code'].from_row(row)
        assert len(example['answer']['tests']) == tests
        assert TASKS['code'].reward(right, example) == 1.5 and TASKS['code'].reward(right.replace('2', '3'), example) == 0.5
    assert 'double' in TASKS['code'].from_row(kodcode)['question']
    assert TASKS['code'].from_row({**kodcode, 'test': kodcode['test'] + '    pytest.raises(ValueError)'}) is None


@pytest.mark.parametrize('task, row, message', [
    ('gsm8k', {'question': 'q'}, "no column 'answer'"),
    ('gsm8k', {'question': 5, 'answer': '#### 1'}, "'question' holds '5'"),
    ('gsm8k', {'question': 'q', 'answer': '18'}, '####'), ('math', {'problem': 'p', 'solution': '18'}, 'boxed'),
    ('countdown', {'nums': [1, 2, 3]}, "no column 'target'"),
    ('countdown', {'input': '1,x,3', 'output': '4'}, 'whole numbers'),
    ('sudoku', {'Puzzle': '1', 'Solution': '2'}, 'no 4x4'), ('code', {'question': 'q', 'test': 'def ('}, 'line 1'),
    ('sudoku', {'Puzzle': '1320004330100004', 'Solution': '4321124334122134'}, 'does not fit'),
    ('code', {'prompt': 'p'}, "no column 'question'"), ('code', {'text': 't', 'test_list': [1]}, 'expected str'),
    ('code', {'text': 't', 'test_list': ['x'], 'test_imports': 5}, 'not int'),
    ('code', {'text': 't', 'test_list': ['x'], 'test_setup_code': 5}, 'expected str'),
])
def test_a_malformed_row_is_named_with_its_file_and_row(task, row, message, tmp_path):
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        TASKS[task].from_row(row)
    path = write(tmp_path, 'data.jsonl', row)
    with pytest.raises(ValueError, match=f'data.jsonl, row 1: .*{message}') as error:
        load_examples(task, path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, content, message', [
    ('none.jsonl', None, 'no such'), ('data.txt', 'x', 'no such .jsonl, .json or .csv'),
    ('empty.jsonl', '', 'no rows'), ('empty.csv', '', 'empty.csv'),
    ('empty.json', '[]', 'empty.json'), ('bad.jsonl', '{"question": "q", "answer": "#### 1"}\n{"question":\n', 'line 2'),
    ('number.jsonl', '5\n', 'line 1'), ('bad.json', '[{', 'bad.json'), ('deep.jsonl', '[' * 100_000, 'line 1'),
    ('zip.jsonl.gz', 'plain', 'zip.jsonl.gz'),
    ('column.csv', 'a,b\n1,2\n', "row 1: no column 'question'")])
def test_a_bad_file_is_one_line(name, content, message, tmp_path):
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_examples('gsm8k', str(tmp_path / name))
    assert '\n' not in str(error.value) and len(str(error.value)) < 600


def test_csv_and_json_files_load_and_keep_leading_zeros(tmp_path):
    grid = 'Puzzle,Solution\n0021124334122134,4321124334122134\n'
    assert load_examples('sudoku', write(tmp_path, 'grid.csv', grid))[0]['question'].endswith(' 0021124334122134')
    rows = [{'question': 'q', 'answer': '#### 1'}, {'question': 'r', 'answer': '#### -2'}]
    assert [e['answer'] for e in load_examples('gsm8k', write(tmp_path, 'rows.json', json.dumps(rows)))] == [1.0, -2.0]


@pytest.mark.parametrize('name', ['rows.jsonl', 'rows.json', 'rows.csv'])
def test_files_with_a_byte_order_mark_load(name, tmp_path):
    row = '{"question": "q", "answer": "#### 1"}'
    content = 'question,answer\nq,#### 1\n' if name.endswith('csv') else row
    assert load_examples('gsm8k', write(tmp_path, name, '\ufeff' + content))[0]['answer'] == 1.0


def test_tasks_without_a_hub_data_set_ask_for_a_file():
    for task, split in (('sudoku', 'train'), ('sudoku', 'test'), ('countdown', 'test')):
        with pytest.raises(ValueError, match='give a file'):
            load_examples(task, None, split)


@needs_shared
def test_the_real_files_load_whole():
    assert len(load_examples('gsm8k', str(SHARED / 'data/gsm8k/test.jsonl'))) == 1319
    assert len(load_examples('gsm8k', str(SHARED / 'data/gsm8k/train.jsonl'))) == 7473
    assert len(load_examples('countdown', str(SHARED / 'data/countdown_test.jsonl'))) == 256
    assert len(load_examples('sudoku', str(SHARED / 'data/sudoku_test.csv'))) == 500


def test_s1k_becomes_tagged_completions(tmp_path):
    row = {'question': 'q', 'thinking_trajectories': ['think\n\nmore'], 'attempt': ' 42 '}
    [(asked, completion)] = load_s1k(write(tmp_path, 's1k.jsonl', row))
    assert asked.endswith('\n\nq') and all(asked.count(tag) == 1 for tag in rewards.TAGS), 'as every task asks'
    assert completion == tagged('42', 'think\n\nmore') and rewards.strict_format(completion)
    with pytest.raises(ValueError, match='row 1: .*thinking_trajectories'):
        load_s1k(write(tmp_path, 'bad.jsonl', {**row, 'thinking_trajectories': []}))


@pytest.mark.parametrize('task', TASKS)
def test_a_prompt_is_one_paragraph_with_the_tags_and_the_question(task):
    text = prompt(task, {'question': 'Q?'})
    assert text.endswith('\n\nQ?') and text.count('\n\n') == 1
    assert [text.count(tag) for tag in rewards.TAGS] == [1, 1, 1, 1]


# --- scoring files ---

def test_wilson_interval_is_the_textbook_one():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def run(*args):
    return subprocess.run([sys.executable, str(ROOT / 'rewards.py'), *map(str, args)], capture_output=True, text=True)


def test_the_command_scores_our_samples_and_the_official_layout(tmp_path):
    ours = [{'question': 'q', 'completion': tagged(a), 'answer': 18.0, 'effective_tokens': 20 + a} for a in (18, 18, 18, 10)]
    result = run('gsm8k', write(tmp_path, 'samples.jsonl', *ours))
    assert 'accuracy 75.0% (3 of n = 4), 95 % interval 30.1% to 95.4%' in result.stdout, result.stderr
    assert 'mean reward 3.500, mean length 36.0 effective tokens' in result.stdout
    grid = {**SUDOKU, 'generations': tagged(SUDOKU['answer']), 'ground_truth': SUDOKU['answer']}
    half = {**grid, 'generations': tagged('0' * 16)}
    result = run('sudoku', write(tmp_path, 'official.json', {'generations': [grid, half]}))
    assert 'cells 50.0%, solved 50.0% (1 of n = 2)' in result.stdout and 'words' in result.stdout, result.stderr


@needs_shared
@pytest.mark.parametrize('task, says', [  # the official verdicts and CORRECTIONS
    ('countdown', 'accuracy 21.1% (54 of n = 256)'), ('gsm8k', 'accuracy 69.6% (786 of n = 1130)'),
    ('math', 'accuracy 26.4% (132 of n = 500)'), ('sudoku', 'cells 11.7%, solved 0.4% (1 of n = 256)')])
def test_all_real_generations_are_scored(task, says, capsys):
    rewards.score(task, sorted(map(str, GENERATIONS.glob(f'{task}*.json'))))
    printed = capsys.readouterr().out
    assert says in printed and 'words (effective_tokens is not in the file)' in printed, printed


def test_rows_of_other_tasks_are_left_out_and_a_truth_may_be_text(tmp_path, capsys):
    ours = [dict(task='gsm8k', question='q', completion=tagged(18), answer=answer) for answer in ('18', '1,800', None)]
    other = dict(task='math', question='q', completion=tagged('\\boxed{x}'), answer='x')
    path = write(tmp_path, 'samples.jsonl', '\ufeff' + json.dumps(other), *ours)
    rewards.score('gsm8k', [path])
    rewards.score('math', [path])
    assert re.findall(r'\(.* of n = .\)', capsys.readouterr().out) == ['(1 of n = 3)', '(1 of n = 1)']
    with pytest.raises(ValueError, match='no generations of the task sudoku'):
        rewards.score('sudoku', [path])


def test_the_command_ends_bad_input_in_one_line_and_status_2(tmp_path):
    wrong = write(tmp_path, 'wrong.json', {'generations': [{'question': 'q', 'generations': 'x', 'ground_truth': 1.0}]})
    for args in (['gsm8k'], ['chess', wrong], ['gsm8k', tmp_path / 'none.json'], ['gsm8k', write(tmp_path, 'a.json', '{}')],
                 ['sudoku', wrong], ['gsm8k', write(tmp_path, 'b.json', {'generations': []})],
                 ['gsm8k', write(tmp_path, 'c.jsonl', {'question': 'q', 'answer': 1.0})]):
        result = run(*args)
        assert result.returncode == 2 and result.stdout == '' and len(result.stderr.splitlines()) == 1, result.stderr
