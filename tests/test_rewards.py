"""Verdicts are the official evaluation's, rewards are the paper's, and no text does any harm."""
import gzip
import json
import random
import runpy
import sys
import time
from pathlib import Path

import pytest

import rewards
from fuzz_rewards import EXAMPLES, completions
from rewards import TASKS, load_examples, wilson

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
GENERATIONS = SHARED / 'data/llada_generations'
needs_shared = pytest.mark.skipif(not GENERATIONS.is_dir(), reason='../shared is not here')
GRIDS = '4321124334122134'


def tagged(answer, steps='steps'):
    return f'<reasoning>\n{steps}\n</reasoning>\n<answer>\n{answer}\n</answer>'


def grade(task, answer):
    """(reward, correct) of an answer in its tags to the task's example."""
    return TASKS[task].grade(tagged(answer), EXAMPLES[task])


# ---- agreement with the official evaluation on 2,142 completions of LLaDA-8B-Instruct ----

# (file, item): why we judge otherwise on purpose
CORRECTIONS = {
    ('countdown_instruct_128_64_5', 9): 'right in its tags, with two blanks and without a box',
    ('gsm8k_instruct_128_64_1', 79): '43,500 was read as 43',
    ('gsm8k_instruct_128_64_6', 33): r'385\,000 was read as 385',
    ('gsm8k_instruct_128_64_5', 17): 'the box was not found because a newline stands in it',
    ('math500_instruct_128_64_0', 202): r'36.00 is \$36',
    ('math500_instruct_128_64_0', 238): '58500 is 58,500',
    ('sudoku_instruct_128_64_2', 21): 'the answer tag never closes: not one cell by luck',
    ('sudoku_instruct_128_64_5', 0): 'a doubled <answer> tag was read as two cells'}


@pytest.fixture(scope='module')
def verdicts():
    """{(file, item): (task, official, ours)}; sudoku's in cells."""
    found = {}
    official = json.loads((SHARED / 'golden/parse_verdicts_128.json').read_text())
    for name, expected in official.items():
        task = name.split('_')[0].replace('500', '')
        items = json.loads((GENERATIONS / name).read_text())['generations']
        for i, (item, verdict) in enumerate(zip(items, expected, strict=True)):
            example = {**item, 'answer': item['ground_truth']}
            ours = TASKS[task].correct(item['generations'], example)
            if task == 'sudoku':
                verdict, cells = verdict
                ours = round(ours * cells)
            found[name.removesuffix('_generations.json'), i] = task, verdict, ours
    return found


@needs_shared
def test_verdicts_differ_from_the_official_ones_only_where_we_mean_them_to(verdicts):
    assert len(verdicts) == 2142
    differ = {key for key, (_, official, ours) in verdicts.items() if official != ours}
    assert differ == set(CORRECTIONS)


@needs_shared
@pytest.mark.parametrize('task, official, ours', [
    ('countdown', 53, 54), ('gsm8k', 783, 786), ('math', 130, 132), ('sudoku', 240, 240)])
def test_totals_are_the_official_ones_with_the_corrections(verdicts, task, official, ours):
    assert sum(old for name, old, _ in verdicts.values() if name == task) == official
    assert sum(new for name, _, new in verdicts.values() if name == task) == ours


# ---- gsm8k ----

def test_a_perfect_gsm8k_completion_earns_four_and_one_without_tags_nothing():
    assert grade('gsm8k', 18) == (4.0, True)
    assert grade('gsm8k', 17) == (2.0, False)
    assert TASKS['gsm8k'].reward('18', EXAMPLES['gsm8k']) == 0.0
    assert TASKS['gsm8k'].correct(tagged(18), EXAMPLES['gsm8k']) is True
    ended = tagged(18) + '\n<|eot_id|>x<|endoftext|>' + tagged(17)
    assert TASKS['gsm8k'].grade(ended, EXAMPLES['gsm8k']) == (4.0, True)


def test_each_tag_that_occurs_once_earns_an_eighth():
    assert rewards.tag_count(tagged(1)) == 0.5
    assert rewards.tag_count('<reasoning> 1 </reasoning>') == 0.25
    assert rewards.tag_count('<answer><answer>') == 0.0


def test_text_after_the_answer_costs_a_thousandth_per_character_down_to_zero():
    assert rewards.tag_count(tagged(1) + 'x' * 100) == pytest.approx(0.4)
    assert rewards.tag_count(tagged(1) + '\n') == 0.5
    assert rewards.tag_count(tagged(1) + 'x' * 10000) == 0.0


def test_soft_format_allows_one_line_and_strict_format_does_not():
    one_line = '<reasoning>a</reasoning><answer>1</answer>'
    assert rewards.soft_format(one_line) == 0.5 and rewards.strict_format(one_line) == 0.0
    for wrong in ('so ' + one_line, one_line[:-1], '<answer>1</answer><reasoning>a</reasoning>',
                  '<reasoning>a</reasoning> so <answer>1</answer>'):
        assert rewards.soft_format(wrong) == 0.0, wrong


def test_strict_format_takes_many_lines_and_one_last_newline_only():
    text = tagged(1, 'one\ntwo\n\nthree')
    assert rewards.strict_format(text) == rewards.strict_format(text + '\n') == 0.5
    blank_line = text.replace('</reasoning>\n', '</reasoning>\n\n')
    for wrong in (text + '\n\n', ' ' + text, blank_line, tagged('<answer>'), text[:-9]):
        assert rewards.strict_format(wrong) == 0.0, wrong


@pytest.mark.parametrize('answer, whole', [
    ('18', 1), ('-18', 1), ('1,200', 1), ('\\boxed{18}', 1), ('18.0', 0), ('', 0), ('18 eggs', 0),
    ('1,20', 0), ('١٨', 0), ('²', 0)])
def test_the_integer_part_wants_a_whole_ascii_number(answer, whole):
    assert rewards.integer_answer(tagged(answer)) == 0.5 * whole


@pytest.mark.parametrize('answer, value', [
    ('18', 18), ('$18', 18), ('\\boxed{18}', 18), ('\\boxed{18\\text{ eggs}}', 18), ('.5', 0.5),
    ('1,200 dollars', 1200), ('1{,}200', 1200), ('\\boxed{}18', 18), ('-3.5', -3.5), ('18.', 18),
    ('−4', -4), ('1,2', 1), ('1,2000', 1), ('nan', None), ('inf', None), ('١٨', None)])
def test_the_first_number_of_the_answer_counts(answer, value):
    assert rewards.number(rewards.final_answer(tagged(answer))) == value


def test_the_answer_stands_in_the_tags_or_else_in_the_last_box():
    assert rewards.final_answer('\\boxed{1} ' + tagged('2')) == '2'
    assert rewards.final_answer(tagged('1') + tagged('2')) == '2'
    assert rewards.final_answer('\\boxed{1} and \\boxed{ {3} }') == '{3}'
    assert rewards.final_answer('<answer>\\boxed{3') == ''
    assert rewards.final_answer('\\boxed{803\n}') == '803'
    assert rewards.final_answer('the answer is 18') == ''
    assert rewards.final_answer(tagged('9' * 1000)) == '9' * 1000
    assert rewards.final_answer(tagged('9' * 1001)) == ''


def test_an_unknown_truth_is_never_right():
    for text in ('', tagged(''), tagged('None'), tagged('18')):
        assert TASKS['gsm8k'].correct(text, dict(answer=None)) is False


# ---- math ----

@pytest.mark.parametrize('truth, spellings', [
    ('\\frac{1}{2}', ['\\dfrac{1}{2}', '\\tfrac12', '\\frac{1}2', '1/2', '0.5', '.50', 'x = 1/2',
                      ' \\frac { 1 } { 2 } ']),
    ('\\sqrt{3}', ['\\sqrt3', '$\\sqrt{3}$', '\\sqrt{3}\\text{ cm}', '\\sqrt{3}\\mbox{ in}^2']),
    ('\\left( 3, \\frac{\\pi}{2} \\right)', ['(3,\\frac{\\pi}{2})', '(3{,}\\dfrac{\\pi}{2})']),
    ('90^\\circ', ['90', '90^{\\circ}', '90°']),
    ('58,500', ['58500', '58{,}500', '58,\\!500']),
    ('\\text{Evelyn}', ['Evelyn', '\\mathrm{Evelyn}', '\\textbf{Evelyn}']),
    ('5.4 \\text{ cents}', ['5.4', '5.40']),
    ('36', ['36.00', '\\$36', '36.', '36\\%'])])
def test_spellings_of_one_answer_are_equal(truth, spellings):
    assert {rewards.latex_key(text) for text in spellings} == {rewards.latex_key(truth)}


@pytest.mark.parametrize('one, other', [
    ('1', '2'), ('\\frac{1}{2}', '\\frac{2}{4}'), ('12', '1,2'), ('(1,2)', '(2,1)'), ('x', 'y'),
    ('2 \\text{ or } 3', '2'), ('-5', '5'), ('10', '1'), ('100', '1'), ('\\frac14', '0.25')])
def test_different_answers_differ(one, other):
    assert rewards.latex_key(one) != rewards.latex_key(other)


def test_math_format_has_four_levels_and_right_adds_two():
    assert grade('math', '\\boxed{1}') == (1.0, False)
    assert grade('math', '1/2') == (0.75, False)         # no box: wrong, as official
    assert grade('math', '\\boxed{1/2}') == (3.0, True)
    bare = [TASKS['math'].grade(text, EXAMPLES['math'])
            for text in ('so \\boxed{1}', '1', '', 'so \\boxed{1/2}')]
    assert bare == [(0.5, False), (0.25, False), (0.25, False), (2.5, True)]


# ---- countdown: reach 17 from 3, 4, 5 ----

@pytest.mark.parametrize('reward, equations', [
    (1.0, ['3 * 4 + 5', '5 + 3*4 = 17', '\\boxed{(3 \\times 4) + 5}', '3 \\cdot 4 + 5', '3×4+5',
           '--5+3*4', '5-(-3)*4', '5 − −3*4']),
    (0.1, ['3 + 4 + 5', '3 - 4 / 5', '3 \\div 4 - 5', '3÷4+5', '5+4+3 = 17']),
    (0.0, ['3 * 4', '3 * 4 + 5 + 0', '3 * 4 + 5 + 3 - 3', '17', '12 + 5', '3 * 4 + 5.0', '3.4 + 5',
           '3 ** 4 * 5', '3 // 4 + 5', '3 / (4 - 4) + 5', '4 % 3 + 5', '', 'x', '3 *', '(3 * 4 + 5',
           '3(4)5', '9**9**9', '+3*4+5', '(3, 4, 5)', '٣*4+5', '3 * 4 +' + ' ' * 200 + '5'])])
def test_countdown_wants_each_number_once_and_the_target(reward, equations):
    for equation in equations:
        assert grade('countdown', equation) == (reward, reward == 1.0), equation


@pytest.mark.parametrize('numbers, target, equation, correct', [
    ([1, 3, 3], 1, '1 / 3 * 3', True), ([1, 300000, 300001], 1, '300000 / 300001 * 1', False),
    ([10 ** 17 + 1, 1, 1], 10 ** 17, f'{10 ** 17 + 1} + 1 - 1', False)])
def test_countdown_is_exact(numbers, target, equation, correct):
    assert TASKS['countdown'].correct(tagged(equation), dict(answer=[numbers, target])) is correct


# ---- sudoku: 4320 0043 3010 0004, eight cells empty ----

@pytest.mark.parametrize('answer, share', [
    (GRIDS, 1.0), ('4321\n1243\n3412\n2134', 1.0), (GRIDS + '999', 1.0), ('4320004330100004', 0.0),
    ('4321', 1 / 8), ('4321' + '1' * 12, 3 / 8), ('٤٣٢١١٢٤٣٣٤١٢٢١٣٤', 0.0)])
def test_sudoku_counts_the_empty_cells_only(answer, share):
    assert grade('sudoku', answer) == (share, share)
    assert TASKS['sudoku'].grade(GRIDS, EXAMPLES['sudoku']) == (0.0, 0.0), 'without tags'


# ---- code ----

def test_code_stands_in_the_answer_or_in_the_last_fence():
    body = 'def f(x):\n    return 2 * x'
    for text in (tagged(body), tagged(f'```python\n{body}\n```'),
                 tagged(f'Here:\n```py\n{body}\n```'), f'```python\n{body}',
                 f'So:\n```\nold\n```\n```python\n{body}\n```'):
        assert rewards.code_of(text).strip() == body, text
    assert rewards.code_of('f = 1') == ''


def test_code_earns_the_share_of_tests_and_half_a_point_for_the_form():
    right = 'def f(x):\n    return 2 * x'
    assert grade('code', right) == (1.5, True)
    assert grade('code', right.replace('2 * x', '2')) == (1.0, False)
    assert grade('code', right.replace('2 * x', 'None')) == (0.5, False)
    assert TASKS['code'].grade(f'```\n{right}\n```', EXAMPLES['code']) == (1.0, True)
    assert TASKS['code'].grade('', EXAMPLES['code']) == (0.0, False)


@needs_shared
def test_human_eval_prompts_give_their_helpers_to_the_completion():
    path = str(SHARED / 'data/humaneval.jsonl.gz')
    rows, examples = rewards.read_rows(path), load_examples('code', path)
    assert len(examples) == 164
    for i in (10, 32, 38, 50):                           # they call a helper of the prompt
        row, name = rows[i], rows[i]['entry_point']
        function = row['prompt'][row['prompt'].index(f'def {name}('):] + row['canonical_solution']
        assert TASKS['code'].correct(tagged(function), examples[i]), name
        assert not TASKS['code'].correct(tagged(f'def {name}(*given): pass'), examples[i]), name


# ---- every task ----

@pytest.mark.parametrize('task', TASKS)
def test_a_prompt_is_one_paragraph_with_the_four_tags_and_then_the_question(task):
    text = rewards.prompt(task, dict(question='Q?'))
    assert text.endswith('\n\nQ?') and text.count('\n\n') == 1
    assert [text.count(tag) for tag in rewards.TAGS] == [1, 1, 1, 1]


@pytest.mark.parametrize('task, right, other', [
    ('gsm8k', '18', 17.0),
    ('code', 'def f(x): return 2 * x',
     dict(tests=['assert f(1) == 3'], entry_point='f', setup=''))])
def test_a_batch_is_graded_in_its_order_each_completion_for_its_own_example(task, right, other):
    examples = [EXAMPLES[task], dict(answer=other), EXAMPLES[task]]
    grades = rewards.grade_all(task, [tagged(right), tagged(right), ''], examples)
    assert [correct for _, correct in grades] == [True, False, False]
    assert grades[0] == TASKS[task].grade(tagged(right), EXAMPLES[task])


HOSTILE = {
    'empty': '', 'blanks': ' \n' * 50_000, 'NUL': '\0' * 1000 + tagged('\0'),
    'surrogate': tagged('\ud800'), 'opened': '<reasoning>' * 9_000,
    'answers opened': '<answer>' * 12_500, 'answers closed': '</answer>' * 11_000,
    'tags repeated': tagged(1) * 2_000,
    'tags nested': '<answer>' * 20_000 + '1' + '</answer>' * 20_000,
    'boxes opened': '\\boxed{' * 14_000,
    'boxes nested': '\\boxed{' * 12_000 + '1' + '}' * 12_000,
    'braces opened': '\\boxed{' + '{' * 99_000, 'braces closed': tagged('}' * 99_000),
    'braces': tagged('\\boxed{' + '{}' * 49_000), 'parentheses': tagged('(' * 99_000),
    'few parentheses': tagged('(' * 99 + '3' + ')' * 99), 'minuses': tagged('-' * 199 + '3'),
    'brackets': tagged('[' * 99_000), 'powers': tagged('9**9**9**9'),
    'products': tagged('*'.join(['99'] * 66)), 'digits': tagged('9' * 99_999),
    'box of digits': tagged('\\boxed{' + '9' * 99_000 + '}'), 'exponent': tagged('1e400'),
    'commas': tagged('1' + ',111' * 24_000), 'dots': tagged('.' * 99_000),
    'long fraction': tagged('1/' * 499), 'nan': tagged('nan'), 'inf': tagged('-inf'),
    'unicode digits': tagged('١٢٣٤' * 4), 'superscript': tagged('²³'),
    'fractions': tagged('\\boxed{' + '\\frac{' * 160 + '}'),
    'zero': tagged('\\boxed{\\frac{1}{0}}'), 'text': tagged('\\boxed{' + '\\text{' * 160 + '}'),
    'blanks in a box': tagged('\\boxed{' + ' ' * 990 + 'x}'), 'ends': '<|endoftext|>' * 7_000,
    'fences': '```\n' * 25_000}


@pytest.mark.parametrize('task', EXAMPLES)
@pytest.mark.parametrize('name', HOSTILE)
def test_no_text_hangs_or_breaks_a_reward(task, name):
    start = time.perf_counter()
    reward, correct = TASKS[task].grade(HOSTILE[name], EXAMPLES[task])
    assert time.perf_counter() - start < 10, 'backtracking would take for ever'
    assert isinstance(reward, float) and 0 <= reward < 2.5 and correct < 1


@pytest.mark.parametrize('task', ['gsm8k', 'math', 'countdown', 'sudoku'])
def test_mutated_completions_are_graded_without_an_exception(task):
    for text in completions(task, 200, random.Random(0)):
        reward, correct = TASKS[task].grade(text, EXAMPLES[task])
        assert 0.0 <= reward <= 4.0 and isinstance(correct, (bool, float))


# ---- data ----

def write(tmp_path, name, *rows):
    path = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text('\n'.join(lines), encoding='utf-8')
    return str(path)


def test_rows_of_the_known_layouts_become_examples():
    row = {name: task.from_row for name, task in TASKS.items()}
    work = 'It is <<2*600=1200>>1200, less <<1200-0=1200>>0.\n#### 1,200'
    assert row['gsm8k'](dict(question='2 for 600?', answer=work)) == dict(
        question='2 for 600?', answer=1200.0, solution='2*600=1200\n1200-0=1200', reply='1,200',
        wrong='600')
    math = dict(problem='p', solution='so \\boxed{\\frac{1}{2}}.')
    assert row['math'](math)['answer'] == '\\frac{1}{2}'
    assert row['math']({**math, 'answer': '7'})['answer'] == '7'
    assert row['math'](dict(problem='p', solution='$1+1=\\boxed 2$.'))['answer'] == '2'
    assert row['countdown'](dict(input='30,100,93', output='23'))['answer'] == [[30, 100, 93], 23]
    assert row['countdown'](dict(nums=[3, 4, 5], target=17)) == EXAMPLES['countdown']
    assert row['countdown'](dict(nums=[3, 4, 5, 6], target=17)) is None
    integers = dict(Puzzle=21124334122134, Solution=4321124334122134)
    assert row['sudoku'](integers) == dict(question='Puzzle: 0021124334122134', answer=GRIDS)


DOUBLE = tagged('def double(x):\n    return 2 * x')
MBPP = dict(text='Double it.', test_list=['assert double(1) == 2', 'assert double(ONE) == 2'],
            test_setup_code='ONE = 1')
KODCODE = dict(question='Double it.', test='''import pytest
from solution import double

ONE = 1

def test_one():
    assert double(ONE) == 2

def test_two():
    assert double(2) == 4
''')
HUMANEVAL = dict(prompt='import math\n\ndef double(x):\n    """Twice x."""\n', entry_point='double',
                 test='def check(candidate):\n    assert candidate(math.e) == 2 * math.e\n')


@pytest.mark.parametrize('row, tests', [
    (MBPP, 2), ({**MBPP, 'test_setup_code': None, 'test_imports': ['ONE = 1']}, 2), (KODCODE, 2),
    (HUMANEVAL, 1)])
def test_code_rows_of_three_data_sets_become_tests(row, tests):
    example = TASKS['code'].from_row(row)
    assert len(example['answer']['tests']) == tests
    assert TASKS['code'].grade(DOUBLE, example) == (1.5, True)
    assert TASKS['code'].grade(DOUBLE.replace('2', '3'), example) == (0.5, False)
    assert 'double' in example['question']               # the name that the tests call


def test_a_function_may_be_named_like_one_of_pythons_own():
    row = dict(text='Add.', test_list=['assert sum(1, 2) == 3'], code='def sum(a, b): return a + b')
    example = TASKS['code'].from_row(row)
    assert TASKS['code'].correct(tagged(row['code']), example)
    assert not TASKS['code'].correct(tagged('def sum(a, b): return a'), example)


@pytest.mark.parametrize('change', [
    'def test_three():\n    pytest.raises(ValueError)', 'def test_three(fixture): pass'])
def test_kodcode_tests_that_need_more_of_pytest_are_left_out(change):
    assert TASKS['code'].from_row(dict(KODCODE, test=f"{KODCODE['test']}\n{change}")) is None


GSM8K_ROW = dict(question='q', answer='#### 1')
BAD_ROWS = [
    ('gsm8k', dict(question=5, answer='#### 1')), ('gsm8k', dict(question='q', answer='18')),
    ('gsm8k', dict(question='q', answer='#### six')),
    ('gsm8k', dict(question='\ud800', answer='#### 1')),
    ('math', dict(problem='p', solution='18')), ('math', dict(problem='p', solution='', answer=5)),
    ('countdown', dict(input='1,x,3', output='4')),
    ('countdown', dict(nums=[1.5, 2, 3], target=4)), ('sudoku', dict(Puzzle='1', Solution='2')),
    ('sudoku', dict(Puzzle=GRIDS, Solution=GRIDS)),
    ('sudoku', dict(Puzzle='1320004330100004', Solution=GRIDS)),
    ('code', dict(question='q', test='def (')), ('code', dict(text='t', test_list=[1])),
    ('code', dict(text='t', test_list=['x'], test_imports=5)),
    ('code', dict(text='t', test_list=['x'], test_setup_code=5))]
GOOD_ROWS = dict(
    gsm8k=GSM8K_ROW, math=dict(problem='p', solution='\\boxed{1}'),
    countdown=dict(nums=[1, 2, 3], target=6), code=KODCODE,
    sudoku=dict(Puzzle='4320004330100004', Solution=GRIDS))


@pytest.mark.parametrize('task, bad', BAD_ROWS)
def test_a_bad_row_is_dropped_and_counted_and_refused_only_alone(task, bad, tmp_path, capsys):
    good = GOOD_ROWS[task]
    path = write(tmp_path, 'data.jsonl', good, bad, good)
    assert load_examples(task, path) == [TASKS[task].from_row(good)] * 2
    printed = capsys.readouterr().err
    assert '1 of 3 rows dropped' in printed and f'{path}, row 2: ' in printed
    assert printed.count('\n') == 1
    with pytest.raises(ValueError, match='data.jsonl, row 1: ') as error:
        load_examples(task, write(tmp_path, 'data.jsonl', bad))
    assert '\n' not in str(error.value)


def test_rows_that_no_task_wants_are_left_out_and_not_counted(tmp_path, capsys):
    path = write(tmp_path, 'data.jsonl', dict(nums=[3, 4, 5, 6], target=18), GOOD_ROWS['countdown'])
    assert len(load_examples('countdown', path)) == 1 and capsys.readouterr().err == ''
    with pytest.raises(ValueError, match='data.jsonl: no rows'):
        load_examples('countdown', write(tmp_path, 'data.jsonl', dict(nums=[1, 2], target=3)))


@pytest.mark.parametrize('task, row, name', [
    ('gsm8k', dict(question='q'), 'answer'), ('math', dict(problem='p'), 'solution'),
    ('countdown', dict(nums=[1, 2, 3]), 'target'), ('sudoku', dict(Puzzle='0'), 'Solution'),
    ('code', dict(question='q'), 'test')])
def test_a_missing_column_is_an_error_that_names_it(task, row, name, tmp_path):
    path = write(tmp_path, 'data.jsonl', GOOD_ROWS[task], row)
    with pytest.raises(ValueError, match=f"data.jsonl, row 2: no column '{name}'"):
        load_examples(task, path)


@pytest.mark.parametrize('name, content', [
    ('none.jsonl', None), ('data.txt', 'x'), ('empty.jsonl', ''), ('empty.csv', ''),
    ('empty.json', '[]'), ('number.jsonl', '5\n'), ('bad.json', '[{'), ('zip.jsonl.gz', 'plain'),
    ('deep.jsonl', '[' * 100_000)])
def test_a_bad_file_is_one_line_that_names_it(name, content, tmp_path):
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=name) as error:
        load_examples('gsm8k', str(tmp_path / name))
    assert '\n' not in str(error.value) and len(str(error.value)) < 600


def test_a_broken_line_of_a_jsonl_file_is_named_by_its_number(tmp_path):
    path = write(tmp_path, 'bad.jsonl', GSM8K_ROW, '', '{"question":')
    with pytest.raises(ValueError, match='bad.jsonl .*line 3'):
        load_examples('gsm8k', path)


def test_csv_json_and_zipped_files_load_also_with_a_byte_order_mark(tmp_path):
    grid = write(tmp_path, 'grid.csv', f'\ufeffPuzzle,Solution\n0021124334122134,{GRIDS}\n')
    assert load_examples('sudoku', grid)[0]['question'].endswith(' 0021124334122134')
    rows = [GSM8K_ROW, dict(question='r', answer='#### -2')]
    array = write(tmp_path, 'rows.json', '\ufeff' + json.dumps(rows))
    lines = write(tmp_path, 'rows.jsonl', '\ufeff' + json.dumps(rows[0]), '', rows[1])
    zipped = tmp_path / 'rows.jsonl.gz'
    zipped.write_bytes(gzip.compress(Path(lines).read_bytes()))
    for path in (array, lines, str(zipped)):
        assert [e['answer'] for e in load_examples('gsm8k', path)] == [1.0, -2.0]


@pytest.mark.parametrize('task, split', [
    ('sudoku', 'train'), ('sudoku', 'test'), ('countdown', 'test')])
def test_tasks_without_a_hub_data_set_ask_for_a_file(task, split):
    with pytest.raises(ValueError, match='give a file'):
        load_examples(task, split=split)


def test_hub_data_come_from_the_split_asked_for(monkeypatch):
    asked = []

    def read_rows(*source):
        asked.append(source)
        return [GSM8K_ROW, HUMANEVAL][source[0] != 'openai/gsm8k':][:1]
    monkeypatch.setattr(rewards, 'read_rows', read_rows)
    load_examples('gsm8k', split='train')
    load_examples('gsm8k', split='test')
    load_examples('code', ('some/set', None, 'all'), 'test')
    assert asked == [('openai/gsm8k', 'main', 'train'), ('openai/gsm8k', 'main', 'test'),
                     ('some/set', None, 'all')]
    assert len(load_examples('code', split='test')) == 2         # HumanEval and MBPP


@needs_shared
@pytest.mark.parametrize('task, name, n', [
    ('gsm8k', 'gsm8k/test.jsonl', 1319), ('gsm8k', 'gsm8k/train.jsonl', 7473),
    ('countdown', 'countdown_test.jsonl', 256), ('sudoku', 'sudoku_test.csv', 500)])
def test_the_real_files_load_whole(task, name, n, capsys):
    assert len(load_examples(task, str(SHARED / 'data' / name))) == n
    assert capsys.readouterr().err == ''


# ---- scoring ----

def test_wilson_interval_is_the_textbook_one():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_summary_counts_the_wholly_right_and_averages_the_rest():
    items = [dict(correct=1.0, reward=4.0, effective_tokens=10),
             dict(correct=0.5, reward=1.0, effective_tokens=20)]
    low, high = wilson(1, 2)
    assert rewards.summary(items) == dict(accuracy=0.5, low=low, high=high, n=2, share=0.75,
                                          reward=2.5, effective_tokens=15.0)


def scored(task, *paths):
    """What `python rewards.py task paths` prints."""
    sys.argv = ['rewards.py', task, *paths]
    runpy.run_path(str(ROOT / 'rewards.py'), run_name='__main__')


def test_generations_are_scored_with_and_without_our_token_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [])
    ours = [dict(question='q', generations=tagged(a), ground_truth=18.0, effective_tokens=20 + a)
            for a in (18, 18, 18, 10)]
    scored('gsm8k', write(tmp_path, 'ours.json', dict(generations=ours)))
    printed = capsys.readouterr().out
    for part in ('75.0%', 'n = 4', '30.1% to 95.4%', 'reward 3.500', 'length 36.0'):
        assert part in printed
    saved = [dict(question=EXAMPLES['sudoku']['question'], generations=tagged(answer),
                  ground_truth=GRIDS) for answer in (GRIDS, '0' * 16)]
    scored('sudoku', write(tmp_path, 'official.json', dict(generations=saved)))
    printed = capsys.readouterr().out
    for part in ('cells 50.0%', 'solved 50.0%', 'n = 2', 'length 6.0'):     # words
        assert part in printed


@needs_shared
@pytest.mark.parametrize('task, parts', [
    ('countdown', ['21.1%', 'n = 256']), ('gsm8k', ['69.6%', 'n = 1130']),
    ('math', ['26.4%', 'n = 500']), ('sudoku', ['cells 11.7%', 'solved 0.4%', 'n = 256'])])
def test_all_real_generations_are_scored(task, parts, capsys):
    rewards.score(task, sorted(map(str, GENERATIONS.glob(f'{task}*.json'))))
    printed = capsys.readouterr().out
    assert [part for part in parts if part not in printed] == []


def test_files_are_scored_together_and_a_truth_may_be_text_or_unknown(tmp_path, capsys):
    ours = [dict(question='q', generations=tagged(18), ground_truth=truth)
            for truth in ('18', '1,800', None)]
    path = write(tmp_path, 'saved.json', dict(generations=ours))
    rewards.score('gsm8k', [path, path])
    assert '(2 of n = 6)' in capsys.readouterr().out
    with pytest.raises(ValueError, match='no generations of the task sudoku'):
        rewards.score('sudoku', [write(tmp_path, 'none.json', dict(generations=[]))])


@pytest.mark.parametrize('task, item', [
    ('gsm8k', dict(generations='x', ground_truth='six')), ('gsm8k', dict(generations='x')),
    ('gsm8k', dict(generations=5, ground_truth=1.0)), ('gsm8k', 'text'),
    ('math', dict(generations='\\boxed{1}', ground_truth=1.0)),
    ('countdown', dict(generations='x', ground_truth=5)),
    ('sudoku', dict(question='q', generations='x', ground_truth=GRIDS)),
    ('sudoku', dict(question=EXAMPLES['sudoku']['question'], generations='x', ground_truth='43')),
    ('code', dict(generations=tagged('x = 1'), ground_truth='f'))])
def test_an_item_that_cannot_be_scored_ends_the_command_in_one_line(task, item, tmp_path):
    path = write(tmp_path, 'saved.json', dict(generations=[item]))
    with pytest.raises(ValueError, match='saved.json') as error:
        rewards.score(task, [path])
    assert '\n' not in str(error.value)
