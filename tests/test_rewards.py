"""Verdicts are the official evaluation's, rewards are the paper's, and no text does any harm."""
import gzip
import json
import os
import random
import runpy
import time
from pathlib import Path

import pytest

import rewards
from rewards import TASKS, is_sound, load_examples, wilson

SHARED = Path(__file__).resolve().parents[2] / 'shared'
DATA = SHARED / 'data'
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason='../shared is not here')
GRID = '4321124334122134'
EXAMPLES = dict(
    gsm8k=dict(question='How many?', answer=18.0),
    math=dict(question='What?', answer='\\frac{1}{2}'),
    countdown=dict(question='Numbers: [3, 4, 5]\nTarget: 17', answer=[[3, 4, 5], 17]),
    sudoku=dict(question='Puzzle: 4320004330100004', answer=GRID),
    code=dict(question='f', answer=dict(tests=['assert f(1) == 2', 'assert f(3) == 6'],
                                        entry_point='f', setup='')))


def tagged(answer, steps='steps'):
    return f'<reasoning>\n{steps}\n</reasoning>\n<answer>\n{answer}\n</answer>'


def grade(task, text, **example):
    return TASKS[task].grade(text, EXAMPLES[task] | example)


# ---- agreement with the official evaluation on 2,142 completions of LLaDA-8B-Instruct ----

# (file, item): why we judge otherwise on purpose. All but the last are right here and wrong there.
BRACE = r'the answer tag and the brace of \boxed{36> never close'
CORRECTIONS = {
    ('countdown_instruct_128_64_5', 9): 'right in its tags, with two blanks and without a box',
    ('gsm8k_instruct_128_64_0', 9): BRACE, ('gsm8k_instruct_128_64_0', 12): BRACE,
    ('gsm8k_instruct_128_64_1', 117): BRACE, ('gsm8k_instruct_128_64_1', 158): BRACE,
    ('gsm8k_instruct_128_64_1', 79): '43,500 was read as 43',
    ('gsm8k_instruct_128_64_4', 86): 'the answer tag ends in </answer}',
    ('gsm8k_instruct_128_64_6', 33): r'385\,000 was read as 385',
    ('gsm8k_instruct_128_64_5', 17): 'the box was not found because a newline stands in it',
    ('math500_instruct_128_64_0', 202): r'36.00 is \$36',
    ('math500_instruct_128_64_0', 238): '58500 is 58,500',
    ('sudoku_instruct_128_64_5', 0): 'a doubled <answer> tag was read as the first eight cells'}


@pytest.fixture(scope='module')
def verdicts():
    """{(file, item): (task, official, ours)}; sudoku's in cells."""
    found = {}
    official = json.loads((SHARED / 'golden/parse_verdicts_128.json').read_text())
    for name, expected in official.items():
        task = name.split('_')[0].replace('500', '')
        items = json.loads((DATA / 'llada_generations' / name).read_text())['generations']
        for i, (item, verdict) in enumerate(zip(items, expected, strict=True)):
            item['answer'] = item['ground_truth']
            ours = TASKS[task].correct(item['generations'], item)
            if task == 'sudoku':
                verdict, cells = verdict
                ours = round(ours * cells)
            found[name.removesuffix('_generations.json'), i] = task, verdict, ours
    return found


@needs_shared
def test_verdicts_differ_from_the_official_ones_only_where_we_mean_them_to(verdicts):
    assert len(verdicts) == 2142
    differ = {key: ours > official for key, (_, official, ours) in verdicts.items()
              if official != ours}
    assert set(differ) == set(CORRECTIONS) and all(differ.values()), 'nothing right is wrong here'
    for task, official, ours in [('countdown', 53, 54), ('gsm8k', 783, 791), ('math', 130, 132),
                                 ('sudoku', 240, 241)]:
        assert sum(old for name, old, _ in verdicts.values() if name == task) == official
        assert sum(new for name, _, new in verdicts.values() if name == task) == ours


@pytest.mark.parametrize('task, text', [
    ('gsm8k', '<answer>\n18'), ('gsm8k', '<answer>\n18\n</ans'), ('gsm8k', '<answer></answer>\n18'),
    ('gsm8k', '<answer></answer> \\boxed{18}'), ('gsm8k', 'so \\boxed{18} \\boxed{}'),
    ('gsm8k', '\\boxed{18\\text{ hours} hours.'), ('gsm8k', '<answer>\n\\boxed{18>'),
    ('gsm8k', '\\boxed{18} <answer>eighteen</answer>'), ('gsm8k', '<answer>2 x 9 = 18</answer>'),
    ('math', 'so \\boxed{\\frac12} <answer>half</answer>'), ('math', 'is $\\boxed 1/2$.'),
    ('countdown', '<answer>3*4+5'), ('countdown', '\\boxed{3*4+5} <answer>See above.</answer>'),
    ('countdown', '<answer>We have \\(3 \\times 4 + 5 = 17\\).</answer>'),
    ('countdown', 'So 12 + 3 = 15 and 3*4+5 = 17.'), ('sudoku', f'<answer>\n{GRID}'),
    ('sudoku', f'<answer></answer>\n{GRID}'), ('sudoku', f'</reasoning>\n{GRID}\n</answer>'),
    ('sudoku', f'The grid is {GRID}.'), ('sudoku', f'<answer>The 4x4:\n```\n{GRID}\n```</answer>'),
    ('sudoku', f'<answer>{GRID}\n```\nDone.</answer>')])
def test_what_the_end_cut_off_or_stands_elsewhere_is_read_as_the_official_evaluation_reads_it(
        task, text):
    assert grade(task, text)[1] == 1


@pytest.mark.parametrize('task, text, paid', [
    ('gsm8k', '<answer>\n18', 0.125), ('gsm8k', '<answer></answer>18', 0.248), ('sudoku', GRID, 0),
    ('math', '\\boxed{1/2} <answer></answer>', 0.75), ('countdown', '<answer>3*4+5', 0.0)])
def test_the_reward_does_not_pay_for_a_broken_form(task, text, paid):
    assert grade(task, text) == (pytest.approx(paid), 1)


def test_an_answer_in_its_tags_is_the_last_word():
    assert grade('gsm8k', 'so \\boxed{18} ' + tagged(17))[1] is False
    assert grade('countdown', '3*4+5 = 17 ' + tagged('3+4+5'))[1] is False
    assert grade('countdown', '3*4+5 = 17 ' + tagged('17'))[1] is False
    assert grade('sudoku', GRID + tagged('1')) == (0, 0)
    assert grade('math', tagged('\\boxed{5' + 1000 * ' ' + '+7}'), answer='5')[1] is False


# ---- gsm8k ----

def test_a_perfect_gsm8k_completion_earns_four_and_one_without_tags_nothing():
    assert grade('gsm8k', tagged(18)) == (4.0, True)
    assert grade('gsm8k', tagged(17)) == (2.0, False)
    assert grade('gsm8k', '18') == (0.0, False)
    ended = tagged(18) + '\n<|eot_id|>x<|endoftext|>' + tagged(17)
    assert grade('gsm8k', ended) == (4.0, True)
    for text in ('', tagged(''), tagged('None'), tagged('18')):
        assert grade('gsm8k', text, answer=None)[1] is False     # two official truths are unknown


def test_tags_earn_an_eighth_each_and_text_after_the_answer_costs():
    assert rewards.tag_count(tagged(1)) == rewards.tag_count(tagged(1) + '\n') == 0.5
    assert rewards.tag_count('<reasoning> 1 </reasoning>') == 0.25
    assert rewards.tag_count('<answer><answer>') == 0.0
    assert rewards.tag_count(tagged(1) + 'x' * 100) == pytest.approx(0.4)
    assert rewards.tag_count(tagged(1) + 'x' * 10000) == 0.0


def test_soft_format_allows_one_line_and_strict_format_does_not():
    one_line = '<reasoning>a</reasoning><answer>1</answer>'
    assert rewards.soft_format(one_line) == 0.5 and rewards.strict_format(one_line) == 0.0
    for wrong in ('so ' + one_line, one_line[:-1], '<answer>1</answer><reasoning>a</reasoning>',
                  '<reasoning>a</reasoning> so <answer>1</answer>'):
        assert rewards.soft_format(wrong) == 0.0, wrong
    text = tagged(1, 'one\ntwo\n\nthree')
    assert rewards.strict_format(text) == rewards.strict_format(text + '\n') == 0.5
    blank_line = text.replace('</reasoning>\n', '</reasoning>\n\n')
    for wrong in (text + '\n\n', ' ' + text, blank_line, tagged('<answer>'), text[:-9]):
        assert rewards.strict_format(wrong) == 0.0, wrong


@pytest.mark.parametrize('answer, whole, value', [
    ('18', 1, 18), ('-18', 1, -18), ('1,200', 1, 1200), ('\\boxed{18}', 1, 18), ('18.0', 0, 18),
    ('18 eggs', 0, 18), ('1,20', 0, 20), ('١٨', 0, None), ('', 0, None), ('$18', 0, 18),
    ('\\boxed{18\\text{ in 2 days}}', 0, 18), ('.5', 0, 0.5), ('1{,}200', 0, 1200), ('−4', 0, -4),
    ('nan', 0, None), ('9' * 1001, 0, None), ('\\boxed{803\n}', 1, 803)])
def test_numbers_are_read_with_commas_and_the_integer_part_wants_a_whole_one(answer, whole, value):
    assert rewards.integer_answer(tagged(answer)) == 0.5 * whole
    assert grade('gsm8k', tagged(answer), answer=value)[1] is (value is not None)


# ---- math ----

@pytest.mark.parametrize('truth, spellings', [
    ('\\frac{1}{2}', ['\\dfrac{1}{2}', '\\tfrac12', '\\frac{1}2', '1/2', '0.5', '.50', 'x = 1/2',
                      ' \\frac { 1 } { 2 } ', '\\(\\frac12\\)', '\\displaystyle \\frac12']),
    ('\\sqrt{3}', ['\\sqrt3', '$\\sqrt{3}$', '\\sqrt{3}\\text{ cm}', '\\sqrt{3}\\mbox{ in}^2',
                   '\\sqrt{3}\\text{ cm}.']),
    ('\\left( 3, \\frac{\\pi}{2} \\right)', ['(3,\\frac{\\pi}{2})', '(3{,}\\dfrac{\\pi}{2})']),
    ('90^\\circ', ['90', '90^{\\circ}', '90°']), ('5', ['AB=5', 'x = 5.']),
    ('58,500', ['58500', '58{,}500', '58,\\!500']), ('5.4 \\text{ cents}', ['5.4', '5.40']),
    ('\\text{Evelyn}', ['Evelyn', '\\mathrm{Evelyn}']), ('36', ['36.00', '\\$36', '36.', '36\\%']),
    ('\\begin{pmatrix} -2 \\\\ -14 \\\\ -7 \\end{pmatrix}',
     ['\\begin{pmatrix}-2\\\\-14\\\\-7\\end{pmatrix}', '\\begin{pmatrix}-2\\\\[4pt]-14\\\\ -7'
      ' \\\\ \\end{pmatrix}', '\\begin{pmatrix} -2\\\\\n-14 \\\\\\,-7\\end{pmatrix}']),
    ('\\begin{bmatrix} 1 & \\frac12 \\\\ \\$3 & 4 \\end{bmatrix}',
     ['\\begin{bmatrix}1&\\dfrac{1}{2}\\\\3&4\\end{bmatrix}'])])
def test_spellings_of_one_answer_are_equal(truth, spellings):
    for text in spellings:
        assert grade('math', tagged(f'\\boxed{{{text}}}'), answer=truth) == (3.0, True), text


@pytest.mark.parametrize('one, other', [
    ('1', '2'), ('\\frac{1}{2}', '\\frac{2}{4}'), ('12', '1,2'), ('(1,2)', '(2,1)'), ('x', 'y'),
    ('2 \\text{ or } 3', '2'), ('-5', '5'), ('100', '1'), ('\\frac14', '0.25'), ('ABC=5', '5'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{pmatrix}12\\end{pmatrix}'),
    ('\\begin{pmatrix}1&2\\end{pmatrix}', '\\begin{pmatrix}1\\\\2\\end{pmatrix}')])
def test_different_answers_differ(one, other):
    assert rewards.latex_key(one) != rewards.latex_key(other)


def test_math_format_has_four_levels_and_right_adds_two():
    assert grade('math', tagged('\\boxed{1}')) == (1.0, False)
    assert grade('math', tagged('1/2')) == (0.75, False), 'no box: wrong, as official'
    bare = [grade('math', text) for text in ('so \\boxed{1}', '', 'so \\boxed{1/2}', '\\boxed 1/2')]
    assert bare == [(0.5, False), (0.25, False), (2.5, True), (2.5, True)]
    assert rewards.last_box('\\boxed{1} and \\boxed{ {3} } \\boxed{}') == '{3}'
    assert rewards.last_box('\\boxed 5 $\\boxed 2x + 1$ of \\boxed{\\frac') == '2x + 1'


# ---- countdown: reach 17 from 3, 4, 5 ----

@pytest.mark.parametrize('reward, equations', [
    (1.0, ['3 * 4 + 5', '5 + 3*4 = 17', '\\boxed{(3 \\times 4) + 5}', '3 \\cdot 4 + 5', '3×4+5',
           '--5+3*4', '+5+3*4', '5 − −3*4', '\\( 3 \\times 4 + 5 \\)', '$3*4+5$', '3*4+5.',
           '\\[3*4+5 = 17\\]', '$$3*4+5$$', '`3*4+5`', '```\n3*4+5\n```',
           '\\boxed{\\left(3*4\\right)+5}']),
    (0.1, ['3 + 4 + 5', '3 - 4 / 5', '3 \\div 4 - 5', '3÷4+5', '5+4+3 = 17']),
    (0.0, ['3 * 4', '3 * 4 + 5 + 0', '17', '12 + 5', '3 * 4 + 5.0', '3.4 + 5', '3 ** 4 * 5',
           '3 // 4 + 5', '3 / (4 - 4) + 5', '4 % 3 + 5', '', 'x', '(3 * 4 + 5', '3(4)5', '9**9**9',
           '(3, 4, 5)', '٣*4+5', '3 * 4 +' + ' ' * 200 + '5'])])
def test_countdown_wants_each_number_once_and_the_target(reward, equations):
    for equation in equations:
        assert grade('countdown', tagged(equation)) == (reward, reward == 1.0), equation


@pytest.mark.parametrize('numbers, target, equation, correct', [
    ([1, 3, 3], 1, '1 / 3 * 3', True), ([1, 300000, 300001], 1, '300000 / 300001 * 1', False),
    ([10 ** 17 + 1, 1, 1], 10 ** 17, f'{10 ** 17 + 1} + 1 - 1', False)])
def test_countdown_is_exact(numbers, target, equation, correct):
    assert grade('countdown', tagged(equation), answer=[numbers, target])[1] is correct


# ---- sudoku: 4320 0043 3010 0004, eight cells empty ----

@pytest.mark.parametrize('answer, share', [
    (GRID, 1.0), ('4321\n1243\n3412\n2134', 1.0), (GRID + '999', 1.0), ('4320004330100004', 0.0),
    ('4321', 1 / 8), ('4321' + '1' * 12, 3 / 8), ('٤٣٢١١٢٤٣٣٤١٢٢١٣٤', 0.0)])
def test_sudoku_counts_the_empty_cells_only(answer, share):
    assert grade('sudoku', tagged(answer)) == (share, share)


@needs_shared
def test_rules_without_a_model_score_as_measured_on_the_papers_test_files():
    def correct(task, file):
        examples = load_examples(task, str(DATA / file))
        return [TASKS[task].correct(tagged(TASKS[task].rule(e)), e) for e in examples]
    countdown = correct('countdown', 'countdown_test.jsonl')
    assert len(countdown) == 256 and sum(countdown) == 113
    cells = correct('sudoku', 'sudoku_test.csv')
    assert len(cells) == 500 and cells.count(1) == 58 and sum(cells) / 500 == pytest.approx(0.77075)
    assert TASKS['sudoku'].rule(EXAMPLES['sudoku']) == '4321114332121134'


# ---- code ----

BODY = 'def f(x):\n    return 2 * x'
FENCE = f'```python\n{BODY}\n```'


@pytest.mark.parametrize('text', [
    FENCE, FENCE + '\nIt doubles x.', FENCE + '\nUsage:\n```python\nprint(f(2))\n```', FENCE[:-3],
    f'```python\ndef g(): pass\n```\nand\n{FENCE}', FENCE + '\n```\n4\n```', f'```py\n{BODY}\n```',
    f'So:\n```\nf = 1\n```\n{FENCE}', f'~~~Python\n{BODY}\n~~~\nok', f'````\n{BODY}\n````\nok',
    '1. Do:\n   ```py\n   def f(x):\n       return 2 * x\n   ```\n2. ok', f'```\n{BODY}```',
    '```{.python}\r\ndef f(x):\r\n    return 2 * x\r\n```', '```python def f(x): return 2 * x```',
    '```\nasync_ = 1\nf = lambda x: 2 * x\n```', f'{FENCE}\n<answer>See above.</answer>',
    f'<answer></answer>{FENCE}', f'<answer>\n{BODY}', f'<answer>\n{FENCE}\n</ans',
    f'<answer>{BODY}\n</answer>Run it:\n```\npython f.py\n```'])
def test_the_program_is_the_block_that_defines_the_function(text):
    assert grade('code', text) == (1.0, True)


def test_code_earns_the_share_of_tests_and_half_a_point_for_the_form():
    for text in (BODY, FENCE, f'Here:\n{FENCE}\nIt doubles x.', f'```\nf(1)\n```{FENCE}'):
        assert grade('code', tagged(text)) == (1.5, True)
    assert grade('code', tagged(BODY.replace('2 * x', '2'))) == (1.0, False)
    assert grade('code', tagged(BODY.replace('2 * x', 'None'))) == (0.5, False)
    assert grade('code', '') == grade('code', BODY) == (0.0, False)


def kodcode(test, solution, question='Double it.'):
    return TASKS['code'].from_row(dict(question=question, test=test, solution=solution))


CALLS_F = 'def test_one():\n    assert {}(1) == 2\ndef test_two():\n    assert {}(2) == 4'
ROWS = dict(
    mbpp=dict(text='Double it.', test_setup_code='TWO = 2', code=BODY,
              test_list=['assert f(1) == TWO', 'assert f(TWO) == 4']),
    sanitized=dict(prompt='Double.', test_list=['assert f(1) == 2'], test_imports=['import math'],
                   code=BODY),
    builtin=dict(text='Add.', test_list=['assert sum(1, 2) == 3'],
                 code='def sum(a, b): return a + b'),
    humaneval=dict(prompt='import math\ndef f(x):\n    """Twice x."""\n', entry_point='f',
                   canonical_solution='    return 2 * x',
                   test='def check(candidate):\n    assert candidate(math.e) == 2 * math.e\n'),
    numpy=dict(prompt='def f(x):\n', entry_point='f', canonical_solution='    return 2 * x',
               test='import numpy as np\ndef check(c):\n    assert np.allclose(c(1), 2)'))
for name, test in dict(
        kodcode='from solution import f\n' + CALLS_F.format('f', 'f'),
        module='"""\nfrom left to right"""\nimport solution\n'
               + CALLS_F.format('solution.f', 'solution.f'),
        star='from solution import *\n' + CALLS_F.format('f', 'f'),
        bare='def own(x): return x\n' + CALLS_F.format('f', 'f') + '\n    own(len([1]))',
        method='from solution import f\nclass TestF:\n    def test_a(self): assert f(1) == 2'
).items():
    ROWS[name] = dict(question='Double it.', test=test, solution=BODY)


@pytest.mark.parametrize('name', ROWS)
def test_rows_of_four_data_sets_become_problems_that_name_the_function(name):
    example = TASKS['code'].from_row(ROWS[name])
    solution = example['solution'] or BODY
    wrong = solution.replace('2 * x', '3 * x').replace('a + b', 'a')
    assert ('sum' if name == 'builtin' else 'f') in example['question'].replace('if', '')
    assert is_sound(example) and grade('code', tagged(solution), **example) == (1.5, True)
    assert grade('code', tagged(wrong), **example) == (0.5, False)


def test_the_name_in_the_prompt_is_what_the_tests_call():
    tree = 'class TreeNode: pass\ndef depth(node): return 0\ndef helper(): pass'
    test = 'from solution import TreeNode, depth\ndef test_a(): assert depth(None) == 0'
    assert kodcode(test, tree)['question'].endswith('\nName it depth.')
    queue = kodcode('from solution import push, pop\ndef test_a():\n    q = []\n    push(q, 1)\n'
                    '    assert q == [1] and pop(q) == 1 and q == []',
                    'def push(q, x): q.append(x)\ndef pop(q): return q.pop()')
    assert queue['question'].endswith('\nName them push and pop.') and is_sound(queue)
    needs_math = 'def test_a(): assert f(1) == math.tau'
    assert is_sound(kodcode(needs_math, f'import math\n{BODY} * math.pi'))


def test_a_problem_that_its_own_solution_does_not_pass_is_not_sound():
    assert not is_sound(kodcode(CALLS_F.format('f', 'f'), 'def f(x): return 2'))
    assert not is_sound(kodcode(CALLS_F.format('f', 'f'), 'import numpy\n' + BODY))
    assert is_sound(kodcode(CALLS_F.format('f', 'f'), BODY))
    assert is_sound(EXAMPLES['gsm8k'])


@needs_shared
def test_humaneval_solutions_pass_and_empty_bodies_fail():
    """ALL=1: of all 164 (25 s); else of some."""
    examples = load_examples('code', str(DATA / 'humaneval.jsonl.gz'))
    assert len(examples) == 164
    for example in examples if os.environ.get('ALL') else examples[2::16]:
        name = example['answer']['entry_point']
        assert is_sound(example), name
        assert not is_sound(example | dict(solution=f'def {name}(*given): pass')), name


# ---- every task ----

@pytest.mark.parametrize('task', TASKS)
def test_a_prompt_is_one_paragraph_with_the_four_tags_and_then_the_question(task):
    text = rewards.prompt(task, dict(question='Q?'))
    assert text.endswith('\n\nQ?') and text.count('\n\n') == 1
    assert [text.count(tag) for tag in rewards.TAGS] == [1, 1, 1, 1]


def test_a_batch_is_graded_in_its_order_each_completion_for_its_own_example():
    examples = [EXAMPLES['gsm8k'], dict(answer=17.0), EXAMPLES['gsm8k']]
    grades = rewards.grade_all('gsm8k', [tagged(18), tagged(18), ''], examples)
    assert grades == [(4.0, True), (2.0, False), (0.0, False)]


HOSTILE = [
    '', tagged(' \n' * 50_000), '\0' * 1000 + tagged('\0'), tagged('\ud800'), '<answer>' * 12_500,
    '</answer>' * 11_000, tagged(1) * 2_000, '<answer>' * 20_000 + '1' + '</answer>' * 20_000,
    '<answer>' + '<' * 99_000, '\\boxed{' * 14_000, '\\boxed{' * 12_000 + '1' + '}' * 12_000,
    '\\boxed{' + '{' * 99_000, '\\boxed ' * 14_000, tagged('\\boxed{' + '{}' * 49_000),
    '\\boxed{' + '{{{{a' * 20_000 + '}' * 9, tagged('(' * 99 + '3' + ')' * 99), tagged('(' * 9999),
    tagged('-' * 199 + '3'), tagged('9**9**9**9'), tagged('9' * 99_999), '9 ' * 50_000,
    '9 + ' * 25_000 + 'x', '3 = ' * 25_000, tagged('1e400'), tagged('1' + ',111' * 24_000),
    tagged('1/' * 499), tagged('nan'), tagged('²³'), tagged('\\boxed{\\frac{1}{0}}'),
    tagged('\\boxed{' + '\\frac{' * 160 + '}'), '```\n' * 25_000, '`' * 100_000, '~~~' * 30_000,
    ' ' * 99_000 + '~', '<|endoftext|>' * 7_000]
PIECES = [
    *rewards.TAGS, '\\boxed{', '}', '{', '<|eot_id|>', '\\frac', '\\text{', '(', ')', '**', '/0',
    '-', '1,200', '.', '9' * 500, 'nan', '\0', '\ud800', '٣', '\n', ' ', '=', '```', '$', '%', '18',
    '3*4+5', GRID, tagged('\\boxed{1/2}')]


@pytest.mark.parametrize('task', EXAMPLES)
def test_no_text_hangs_or_breaks_a_reward(task):
    for text in HOSTILE[::5 if task == 'code' else 1]:       # a program starts a process
        start = time.perf_counter()
        reward, correct = grade(task, text)
        assert time.perf_counter() - start < 10, 'backtracking would take for ever'
        assert isinstance(reward, float) and 0 <= reward < 2.5 and correct < 1, text[:50]


@pytest.mark.parametrize('task', ['gsm8k', 'math', 'countdown', 'sudoku'])
def test_texts_made_of_pieces_are_graded_without_an_exception(task):
    rng = random.Random(0)
    for _ in range(500):
        text = ''.join(rng.choices(PIECES, k=rng.randrange(40)))
        reward, correct = grade(task, text)
        assert 0.0 <= reward <= 4.0 and isinstance(correct, (bool, float)), text


# ---- data ----

def write(tmp_path, name, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / name).write_text('\n'.join(lines), encoding='utf-8')
    return str(tmp_path / name)


def test_rows_of_the_known_layouts_become_examples():
    row = {name: task.from_row for name, task in TASKS.items()}
    work = 'It is <<2*600=1200>>1200.\n#### 1,200'
    assert row['gsm8k'](dict(question='2 for 600?', answer=work))['answer'] == 1200.0
    math = dict(problem='p', solution='so \\boxed{\\frac{1}{2}}.')
    assert row['math'](math) == dict(question='p', answer='\\frac{1}{2}')
    assert row['math']({**math, 'answer': '7'})['answer'] == '7'
    assert row['math'](dict(problem='p', solution='$1+1=\\boxed 2$.'))['answer'] == '2'
    for row_204 in (dict(solution='so $\\boxed{204}$.', answer=204), dict(answer=204.0)):
        truth = row['math'](dict(problem='p', **row_204))
        assert grade('math', '\\boxed{204}', **truth)[1] is True
    assert row['countdown'](dict(input='30,100,93', output='23'))['answer'] == [[30, 100, 93], 23]
    assert row['countdown'](dict(nums=[3, 4, 5], target=17))['answer'] == [[3, 4, 5], 17]
    integers = dict(Puzzle=21124334122134, Solution=4321124334122134)
    assert row['sudoku'](integers) == dict(question='Puzzle: 0021124334122134', answer=GRID)


GSM8K_ROW = dict(question='q', answer='#### 1')
GOOD_ROWS = dict(gsm8k=GSM8K_ROW, math=dict(problem='p', solution='\\boxed{1}'),
                 countdown=dict(nums=[1, 2, 3], target=6), code=ROWS['kodcode'],
                 sudoku=dict(Puzzle='4320004330100004', Solution=GRID))
FIXTURE = 'import pytest\n@pytest.fixture\ndef x(): return 1\ndef test_a(x): assert f(x) == 2'
BAD_ROWS = [
    ('gsm8k', dict(question=5, answer='#### 1')), ('gsm8k', dict(question='q', answer='#### six')),
    ('gsm8k', dict(question='\ud800', answer='#### 1')), ('gsm8k', dict(question='q')),
    ('gsm8k', ['q']), ('math', dict(problem='p', solution='18')), ('math', dict(problem='p')),
    ('gsm8k', dict(question='q', answer='#### 3/4')), ('math', dict(problem='p', answer=' .')),
    ('countdown', dict(input='1,x,3', output='4')), ('countdown', dict(nums=[1, 2, 3])),
    ('countdown', dict(nums=[1.5, 2, 3], target=4)), ('sudoku', dict(Puzzle='1', Solution='2')),
    ('countdown', dict(nums=[3, 4, 5, 6], target=18)), ('sudoku', dict(Puzzle=GRID, Solution=GRID)),
    ('sudoku', dict(Puzzle='1320004330100004', Solution=GRID)), ('code', dict(question='q')),
    ('sudoku', dict(Puzzle=GRID, Solution='')),
    *[('code', dict(question='q', solution=BODY, test=test)) for test in (
        'def (', FIXTURE, 'import os, nowhere_at_all\n' + CALLS_F.format('f', 'f'),
        'async ' + CALLS_F.format('f', 'f'),
        'def setup_method(): 1\n' + CALLS_F.format('f', 'f'),
        'from solution import f as g\n' + CALLS_F.format('g', 'g'))],
    ('code', dict(question='q', test=CALLS_F.format('f', 'f'))),     # what is to be defined?
    ('code', dict(question='q', test='from solution import S\ndef test_a(): assert S().f() == 2',
                  solution='class S:\n    def f(self): return 2')),
    ('code', dict(text='t', code=BODY, test_list=[1])), ('gsm8k', dict(GSM8K_ROW, asker='\ud800')),
    ('code', dict(prompt='p', entry_point='f(', test='def check(f): pass')),
    ('code', dict(prompt='p', entry_point='S().f', test='def check(f): pass')),
    ('code', dict(text='t', code=BODY, test_list=['assert f(1) == ' + '+'.join(9000 * '1')])),
    ('code', dict(text='t', code=BODY, test_list=['f()'], test_imports=5))]


@pytest.mark.parametrize('task, bad', BAD_ROWS)
def test_a_row_that_is_left_out_is_counted_with_the_reason(task, bad, tmp_path, capsys):
    good = GOOD_ROWS[task]
    path = write(tmp_path, 'data.jsonl', good, bad, bad, good)
    assert len(load_examples(task, path)) == 2
    printed = capsys.readouterr().err
    assert '2 of 4 rows' in printed and path in printed and 'row 2: ' in printed
    assert printed.count('\n') == 1
    with pytest.raises(ValueError, match='data.jsonl, row 1: ') as error:
        load_examples(task, write(tmp_path, 'data.jsonl', bad))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, content', [
    ('none.jsonl', None), ('data.txt', 'x'), ('empty.jsonl', ''), ('empty.json', '[]'),
    ('number.jsonl', '5\n'), ('bad.json', '[{'), ('cut.jsonl', '{"question":'),
    ('zip.jsonl.gz', 'plain'), ('deep.jsonl', '[' * 100_000),
    ('quote.csv', 'question,answer\nq,#### 1\n"5 inch, how long?,#### 1\nq,#### 1')])
def test_a_bad_file_is_one_line_that_names_it(name, content, tmp_path):
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=name) as error:
        load_examples('gsm8k', str(tmp_path / name))
    assert '\n' not in str(error.value) and len(str(error.value)) < 600


def test_the_content_tells_lines_from_an_array_and_csv_and_zipped_files_load(tmp_path):
    rows = [GSM8K_ROW, dict(question='r\u2028s', answer='#### -2')]
    lines = '\ufeff' + '\r\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
    files = {'a.json': lines, 'a.jsonl': lines, 'b.json': json.dumps(rows), 'c.txt': lines,
             'b.jsonl': json.dumps(rows, indent=1),
             'd.csv': '\ufeffquestion,answer\n"q\nr",#### 1\ns,#### -2'}
    paths = [write(tmp_path, name, content) for name, content in files.items()]
    paths.append(str(tmp_path / 'e.jsonl.gz'))
    Path(paths[-1]).write_bytes(gzip.compress(lines.encode()))
    for path in paths:
        assert [e['answer'] for e in load_examples('gsm8k', path)] == [1.0, -2.0], path


def test_a_folder_holds_a_file_per_task_and_split(tmp_path, monkeypatch):
    write(tmp_path, 'gsm8k_train.jsonl', GSM8K_ROW, GSM8K_ROW)
    write(tmp_path, 'gsm8k_test.jsonl', GSM8K_ROW)
    write(tmp_path, 'gsm8k_test.jsonl~', GSM8K_ROW)              # an editor's
    write(tmp_path, 'sudoku_test.csv', f'Puzzle,Solution,asker\n0021124334122134,{GRID},\n')
    assert len(load_examples('gsm8k', str(tmp_path))) == 2
    assert len(load_examples('gsm8k', tmp_path, 'test')) == 1
    assert load_examples('sudoku', tmp_path, 'test')[0]['question'] == 'Puzzle: 0021124334122134'
    with pytest.raises(ValueError, match='sudoku_train.jsonl'):
        load_examples('sudoku', tmp_path)
    (tmp_path / 'assets/nano').mkdir(parents=True)
    (tmp_path / 'assets/nano/problems').symlink_to(tmp_path)
    monkeypatch.setattr(rewards, 'FOLDER', tmp_path)
    assert len(load_examples('gsm8k', 'nano')) == 2


def test_equal_problems_have_equal_keys_whoever_asks(tmp_path):
    def keys(task, *rows):
        return [e['key'] for e in load_examples(task, write(tmp_path, 'rows.jsonl', *rows))]
    ann = dict(GSM8K_ROW, question='How  many?\n', asker='Ann')
    a, b, c = keys('gsm8k', ann, dict(GSM8K_ROW, question='how many?'), GSM8K_ROW)
    assert a == b != c
    assert load_examples('gsm8k', write(tmp_path, 'x.jsonl', ann))[0]['question'] == (
        'Ann: How  many?\n')
    names = ['Cat', 'Dan']                       # who ask where a row names nobody
    many = [dict(ann, question=f'{i}?', asker='') for i in range(9)]
    path = write(tmp_path, 'many.jsonl', ann, *many)
    asked = [e['question'].split(': ')[0] for e in load_examples('gsm8k', path, 'test', names)]
    assert asked[0] == 'Ann' and set(asked[1:]) == set(names)
    assert load_examples('gsm8k', path, 'train', names) == load_examples('gsm8k', path, 'test',
                                                                         names)
    asked = [e['question'] for e in load_examples('gsm8k', path, 'test', ['nobody'])]
    assert asked == ['How  many?\n', *[f'{i}?' for i in range(9)]]
    nums = [dict(nums=nums, target=6) for nums in ([3, 1, 2], [1, 2, 3], [1, 1, 4])]
    a, b, c, d = keys('countdown', *nums, dict(nums=[1, 2, 3], target=7, asker='Ben'))
    assert a == b and len({a, c, d}) == 3


def test_hub_data_come_from_the_split_asked_for(monkeypatch):
    asked = []

    def read_rows(*source):
        asked.append(source)
        return [GSM8K_ROW if source[0] == 'openai/gsm8k' else ROWS['humaneval']]
    monkeypatch.setattr(rewards, 'read_rows', read_rows)
    load_examples('gsm8k')
    load_examples('gsm8k', split='test')
    load_examples('code', ('some/set', None, 'all'), 'test')
    assert asked == [('openai/gsm8k', 'main', 'train'), ('openai/gsm8k', 'main', 'test'),
                     ('some/set', None, 'all')]
    assert len(load_examples('code', split='test')) == 2         # HumanEval and MBPP
    for task, split in [('sudoku', 'train'), ('sudoku', 'test'), ('countdown', 'test')]:
        with pytest.raises(ValueError, match='or a file'):
            load_examples(task, split=split)


def test_a_summary_has_wilsons_interval_and_averages():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    items = [dict(correct=1.0, reward=4.0, effective_tokens=10, generations='3+4=8\nWait, 3+4=7'),
             dict(correct=0.5, reward=1.0, effective_tokens=20, generations='7')]
    low, high = wilson(1, 2)
    assert rewards.summary(items) == dict(accuracy=0.5, low=low, high=high, n=2, share=0.75,
                                          waits=0.5, reward=2.5, effective_tokens=15.0)


def test_the_tool_scores_saved_generations(tmp_path):
    saved = [dict(question='q', generations=tagged(a), ground_truth='18', effective_tokens=20 + a)
             for a in (18, 18, 18, 10)]
    path = write(tmp_path, 'saved.json', dict(generations=saved))
    score = runpy.run_path(str(Path(__file__).resolve().parent / 'tools/score.py'))['score']
    printed = score('gsm8k', [path, path])
    for part in ('75.0%', '(6 of n = 8)', '40.9% to 92.9%', 'reward 3.500', 'length 36.0'):
        assert part in printed

    # one is paid, another is a solution too, the third has two 3 in a column
    saved = [dict(question='Puzzle: 4320004330100004', generations=tagged(grid), ground_truth=GRID)
             for grid in (GRID, '4321214334121234', '4321214334123214')]
    printed = score('sudoku', [write(tmp_path, 'saved.json', dict(generations=saved))])
    for part in ('solved 33.3%', '3 of the puzzles have several', '2 answers are a solution'):
        assert part in printed
