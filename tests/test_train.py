"""The recipe end to end, in miniature: what it leaves, how it goes on, that it is the paper's."""
import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rewards
import sample
import train
from model import add_lora, load, load_adapter, save_adapter
from sample import chat
from tiny import (SHARED, assert_same, gradients, llada_folder, needs_shared, qwen3_folder, tiny,
                  tokens)

ROOT = Path(__file__).resolve().parents[1]
SMALL = ('--sft_steps 3 --sft_batch 4 --grpo_steps 3 --num_prompts 2 --num_generations 2 '
         '--num_iterations 2 --gen_length 16 --block_length 8 --steps 8 --eval_n 3 '
         '--eval_lengths 8,16 --save_every 1 --beta 0.04 --temperature 3').split()
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='starts processes by os.fork')


def put_grade(patch, grade):
    patch.setitem(rewards.TASKS, 'gsm8k', rewards.TASKS['gsm8k']._replace(grade=grade))


def varied_grade(text, example):
    """A reward that completions earn in different amounts, whatever the model has learnt."""
    return len(set(text)) / 10, len(text) % 2 == 0


@pytest.fixture(scope='module', autouse=True)
def few_rows():
    """Of the shipped files runs read the first rows only, which is quicker by half a second."""
    read_rows = rewards.read_rows

    def first_rows(source, *rest):
        rows = read_rows(source, *rest)
        return rows[:48] if ROOT in Path(source).parents else rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, 'read_rows', first_rows)
        yield


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """The folder of all runs, with 'whole', one that nothing has stopped."""
    folder = tmp_path_factory.mktemp('out')
    with pytest.MonkeyPatch.context() as patch:
        put_grade(patch, varied_grade)
        run(folder, 'whole')
        yield folder


def run(out, name, *flags):
    train.main([*SMALL, '--out', str(out), '--name', name, *flags])
    return out / name


def rows(path, stage=None):
    """The rows of a log, or of one stage, without their timings."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if 'seconds' not in k} for row in found
            if stage in (None, row['stage'])]


def results(folder):
    return json.loads((folder / 'results.json').read_text())


def stages(folder):
    """Those with any result, in their order."""
    return [stage for stage, scores in results(folder).items() if scores]


def last_checkpoint(folder):
    """The path of the newest stage's."""
    path = folder / 'grpo.pt'
    return path if path.exists() else folder / 'sft.pt'


def checkpoint(folder):
    return torch.load(last_checkpoint(folder), weights_only=True)            # plain data


def content(folder):
    """All that a run has left but its settings, without timings: {file: what can be compared}."""
    found = {}
    for path in folder.rglob('*.*'):
        name = str(path.relative_to(folder))
        if path.suffix == '.pt':
            weights = torch.load(path, weights_only=True)['weights']
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in weights.items()}
        elif path.suffix == '.jsonl':
            found[name] = rows(path)
        elif path.is_file() and name != 'config.json':
            found[name] = path.read_bytes()
    return found


def assert_logs_close(one, two):
    for a, b in zip(rows(one / 'log.jsonl'), rows(two / 'log.jsonl'), strict=True):
        assert a.pop('stage') == b.pop('stage')
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert results(one) == results(two)


def lines(path, *items):
    """A file of JSON lines."""
    path.write_text(''.join(json.dumps(item) + '\n' for item in items))
    return str(path)


def problem(question, **columns):
    return dict(question=question, answer='#### 2', **columns)


# ---- the recipe: what it trains and what it leaves ----

def test_the_recipe_leaves_all_its_files(out):
    folder = out / 'whole'
    generations = {f'{stage}_gsm8k_{length}_generations.json'
                   for stage in ('base', 'sft', 'grpo') for length in (8, 16)}
    assert {path.name for path in folder.iterdir()} == generations | {
        'config.json', 'log.jsonl', 'samples.jsonl', 'results.json', 'sft.pt', 'grpo.pt', 'model'}
    found = [(row['stage'], row['step']) for row in rows(folder / 'log.jsonl')]
    assert found == [('sft', i) for i in range(3)] + [('grpo', i) for i in range(3)]
    assert all(row['first_ratio'] == 1 for row in rows(folder / 'log.jsonl', 'grpo'))
    samples = rows(folder / 'samples.jsonl')
    assert [row['step'] for row in samples] == [0, 1, 2]
    assert len({row['question'] for row in samples}) == 3, 'new problems in each iteration'
    assert stages(folder) == ['constant', 'base', 'sft', 'grpo']
    scores = results(folder)['grpo']['gsm8k']
    saved = json.loads((folder / 'grpo_gsm8k_16_generations.json').read_text())
    assert list(scores) == ['8', '16'] and saved['metrics'] == scores['16']
    assert scores['16']['n'] == len(saved['generations']) == 3
    model, _ = load(str(folder / 'model'))
    for name, tensor in checkpoint(folder)['weights'].items():
        assert torch.equal(model.get_parameter(name), tensor)
    again = run(out, 'evaluated', '--model', str(folder / 'model'), '--eval_only')
    assert results(again)['base'] == results(folder)['grpo']
    assert not (again / 'log.jsonl').exists() and not (again / 'model').exists()


def test_the_seed_makes_the_run(out):
    again = run(out, 'again', '--gradient_checkpointing')
    assert content(again) == content(out / 'whole')
    other = run(out, 'other', '--seed', '1')
    for name, column in (('log.jsonl', 'loss'), ('samples.jsonl', 'question')):
        pairs = zip(rows(other / name), rows(again / name), strict=True)
        assert all(a[column] != b[column] for a, b in pairs)


def test_fixed_mask_changes_the_losses_and_not_the_rollouts(out):
    first, *_ = rows(out / 'whole/log.jsonl', 'grpo')
    [fixed] = rows(run(out, 'fixed', '--fixed_mask', '--grpo_steps', '1') / 'log.jsonl', 'grpo')
    assert fixed['reward'] == first['reward'] and fixed['loss'] != first['loss']


def test_fixed_mask_fixes_views_too(out):
    flags = '--stages grpo --grpo_steps 1 --estimator coupled --p_mask_prompt 0'.split()
    losses = [rows(run(out, name, *flags, *more) / 'log.jsonl')[0]['loss']
              for name, more in (('views', ()), ('fixed-views', ('--fixed_mask',)))]
    assert losses[0] != losses[1]


@pytest.mark.parametrize('stage', ['sft', 'grpo'])
def test_one_stage_can_be_trained_alone(out, stage):
    alone = run(out, f'only-{stage}', '--stages', stage)
    assert stages(alone) == ['constant', 'base', stage]
    same = rows(alone / 'log.jsonl') == rows(out / 'whole/log.jsonl', stage)
    assert same == (stage == 'sft'), 'in the whole run diffu-GRPO goes on from SFT'


def test_bfloat16_trains_float32_weights_and_saves_bfloat16_ones(out):
    folder = run(out, 'half', '--dtype', 'bfloat16', '--stages', 'grpo', '--num_iterations', '1',
                 '--grpo_steps', '1')
    saved, finer = load_file(folder / 'model/model.safetensors'), 0
    for name, tensor in checkpoint(folder)['weights'].items():
        assert torch.equal(saved['model.transformer.' + name], tensor.bfloat16())
        finer += not torch.equal(tensor, tensor.bfloat16().float())
    assert finer
    [row] = rows(folder / 'log.jsonl')
    assert row['first_ratio'] == 1 and row['kl'] == 0, 'the reference computes as the policy does'


@pytest.mark.parametrize('flags, dtype', [('', torch.float32), ('--lora_rank 4', torch.bfloat16),
                                          ('--eval_only', torch.bfloat16)])
def test_weights_are_float32_only_where_they_are_trained(out, monkeypatch, flags, dtype):
    def load(name, weights_dtype, device):
        raise ValueError(str(weights_dtype))
    monkeypatch.setattr(train, 'load', load)
    with pytest.raises(ValueError, match=str(dtype)):
        run(out, 'none', '--dtype', 'bfloat16', *flags.split())


# ---- LoRA: from a folder in a published layout to a folder in that layout ----

@pytest.mark.parametrize('make', [pytest.param(llada_folder, marks=needs_shared), qwen3_folder])
@torch.no_grad()
def test_adapters_of_both_stages_become_one_and_a_merged_model(out, tmp_path, make):
    base, ids = tmp_path / 'base', tokens(2, 9, high=200)
    make(base, dtype=torch.bfloat16)
    flags = ('--device cpu --no-compile --lora_rank 4 --data nano --eval_data nano --sft_data nano '
             '--sft_length 64 --learning_rate 1e-2 --sft_learning_rate 1e-2 --sft_batch 2')
    with torch.enable_grad():
        folder = run(tmp_path, 'lora', '--model', str(base), *flags.split())
    trained = checkpoint(folder)['weights']
    sft, grpo = ('q_proj', 'k_proj', 'v_proj'), ('q_proj', 'k_proj', 'v_proj', 'up_proj')
    policy, _ = load(str(base))
    before = policy(ids)
    add_lora(add_lora(policy, 4, 8, sft), 4, 64, grpo)
    adapters = {name for name, _ in policy.named_parameters() if '.adapters.' in name}
    assert trained.keys() == adapters
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in trained.values())
    policy.load_state_dict(trained, strict=False)
    effect = (policy(ids) - before).abs().max()
    again, _ = load(str(base))
    load_adapter(folder / 'adapter', again)
    assert len(again.blocks[0].q_proj.adapters) == 1 and effect > 0.01
    torch.testing.assert_close(again(ids), policy(ids), atol=1e-4, rtol=1e-4)
    merged, tokenizer = load(str(folder / 'model'))
    assert (merged(ids) - policy(ids)).abs().max() < 0.2 * effect            # bfloat16
    assert chat(tokenizer, 'How?') == chat(load(str(base))[1], 'How?')
    saved, source = (load_file(f / 'model.safetensors') for f in (folder / 'model', base))
    assert saved.keys() == source.keys()
    changed = {name.split('.')[-2] for name in saved if not torch.equal(saved[name], source[name])}
    assert changed == set(grpo)


@torch.no_grad()
def test_evaluation_sees_what_was_trained_and_the_base_stays_as_it_is(out, monkeypatch):
    ids, seen, graded_answers = tokens(2, 9), {}, train.graded_answers

    def spied(args, model, tokenizer, problems, length, label):
        seen[label.partition(':')[0]] = model(ids), model.blocks[0].q_proj.weight.clone()
        return graded_answers(args, model, tokenizer, problems, length, label)
    monkeypatch.setattr(train, 'graded_answers', spied)
    flags = ['--dtype', 'bfloat16', '--eval_lengths', '8']
    with torch.enable_grad():                    # steps of 2e-5, which bfloat16 weights would lose
        folder = run(out, 'seen', '--stages', 'grpo', '--lora_rank', '4', '--eval_every',
                     '2', *flags)
    assert stages(folder) == ['constant', 'base', 'grpo-2', 'grpo']
    for label, name in (('grpo-2', 'adapter-2'), ('grpo', 'adapter')):
        logits, weight = seen[label]
        model, _ = load('nano', torch.bfloat16)
        assert torch.equal(model.blocks[0].q_proj.weight, weight)
        assert not torch.equal(model(ids), logits)
        load_adapter(folder / name, model)
        assert torch.equal(model(ids), logits)
    assert not torch.equal(seen['grpo-2'][0], seen['grpo'][0])
    scored = run(out, 'scored', '--eval_only', '--adapter', str(folder / name), *flags)
    assert results(scored)['base'] == results(folder)['grpo']


# ---- problems ----

def nano_args(*flags):
    return train.parse(['--gen_length', '16', '--block_length', '8', '--steps', '8', *flags])


def llada_args(*flags):
    return train.parse(['--model', 'x/y', '--device', 'cpu', *flags])


@pytest.fixture(scope='module')
def tokenizer():
    return load('nano')[1]


def training_problems(args, tokenizer):
    _, tested = train.load_test_sets(args, tokenizer)
    return train.Problems(args, tokenizer, tested)


@pytest.fixture
def mixed(tmp_path):
    """Six word problems, of which four are long."""
    questions = [f'{i} + 1 =' + ' x' * 99 * (i % 3 > 0) for i in range(6)]
    return lines(tmp_path / 'mixed.jsonl', *map(problem, questions))


def test_tasks_take_turns_and_each_may_have_its_own_source(out, tmp_path, tokenizer):
    numbers = lines(tmp_path / 'numbers.jsonl', *[problem(str(i)) for i in range(8)])
    flags = '--task', 'gsm8k,sudoku', '--data', numbers + ',nano'
    problems = training_problems(nano_args(*flags), tokenizer)
    drawn = [problems.draw(i) for i in range(16)]
    assert [task for task, _, _ in drawn] == ['gsm8k', 'sudoku'] * 8
    assert {example['question'] for _, _, example in drawn[::2]} == set('01234567')
    assert len({example['question'] for _, _, example in drawn[1::2]}) == 8
    folder = run(out, 'two', *flags, '--stages', 'grpo', '--num_prompts', '1', '--eval_lengths',
                 '8', '--prefill', '<reasoning>')
    samples = rows(folder / 'samples.jsonl')
    assert [row['task'] for row in samples] == ['gsm8k', 'sudoku', 'gsm8k']
    assert all(row['completion'].startswith('<reasoning>') for row in samples)
    # a task with a rule has a row for it
    assert stages(folder) == ['constant', 'rule', 'base', 'grpo']
    found = results(folder)
    assert found['rule'].keys() == {'sudoku'} and found['base'].keys() == {'gsm8k', 'sudoku'}
    assert found['rule']['sudoku']['8']['share'] > found['constant']['sudoku']['8']['share']


def test_too_long_prompts_are_replaced_in_training_and_left_out_of_tests(mixed, tokenizer, capsys):
    args = nano_args('--data', mixed, '--eval_data', mixed, '--max_prompt', '64')
    [tests] = train.load_test_sets(args, tokenizer)[0].values()
    assert [example['question'] for _, _, example in tests] == ['0 + 1 =', '3 + 1 =']
    assert '2 of 6' in capsys.readouterr().out
    problems = train.Problems(args, tokenizer)
    assert '4 of the first 6' in capsys.readouterr().out
    assert {problems.draw(i)[2]['question'] for i in range(20)} == {'0 + 1 =', '3 + 1 ='}


def test_the_one_problem_of_many_that_fits_is_found_by_every_draw(tmp_path, tokenizer):
    data = lines(tmp_path / 'one.jsonl', problem('1 + 1 ='), *[problem(f'{i} + 1 =' + 99 * ' 1')
                                                               for i in range(600)])
    problems = train.Problems(nano_args('--data', data), tokenizer)
    assert {problems.draw(i)[2]['question'] for i in range(8)} == {'1 + 1 ='}


def test_training_problems_that_are_test_problems_are_left_out_and_counted(tmp_path, tokenizer,
                                                                           capsys):
    test = lines(tmp_path / 'test.jsonl', problem('How  many?'), problem('Why?', asker='Al'))
    data = lines(tmp_path / 'train.jsonl', problem('Which?'), problem('why?'),
                 problem('how many?', asker='Eve'))
    problems = training_problems(nano_args('--data', data, '--eval_data', test), tokenizer)
    assert [example['question'] for example in problems.examples['gsm8k']] == ['Which?']
    assert '2 of 3' in capsys.readouterr().out


def test_test_problems_that_are_not_asked_are_not_trained_on_either(tmp_path, tokenizer):
    four = lines(tmp_path / 'four.jsonl', *[problem(f'{i} + 1 =') for i in range(4)])
    five = lines(tmp_path / 'five.jsonl', *[problem(f'{i} + 1 =') for i in range(5)])
    args = nano_args('--data', five, '--eval_data', four, '--eval_n', '2')
    examples = training_problems(args, tokenizer).examples['gsm8k']
    assert [example['question'] for example in examples] == ['4 + 1 =']


def test_a_problem_that_fits_is_found_among_thousands_that_do_not(tmp_path, tokenizer):
    long = [problem(f'{i} ' + '+ 1 ' * 40) for i in range(2500)]
    data = lines(tmp_path / 'train.jsonl', problem('1 + 1 ='), *long)
    problems = train.Problems(nano_args('--data', data), tokenizer)
    assert problems.draw(0)[2]['question'] == '1 + 1 ='


def test_a_code_problem_that_fails_its_own_solution_is_never_drawn(tmp_path, tokenizer):
    def row(i, code):
        return dict(text=f'{i}', code=code, test_list=[f'assert f({i}) == {i}'])
    data = lines(tmp_path / 'code.jsonl', row(1, 'def f(x): return x'), row(2, 'def f(x): return'))
    problems = train.Problems(nano_args('--task', 'code', '--data', data), tokenizer)
    assert {problems.draw(i)[2]['answer']['tests'][0] for i in range(6)} == {'assert f(1) == 1'}


def test_instructions_of_a_file_replace_those_of_every_task_and_the_prefill_follows(tmp_path):
    _, tokenizer = load('nano')
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (tmp_path / 'i.txt').write_text('Answer 5.\n')
    args = llada_args('--instructions', str(tmp_path / 'i.txt'), '--prefill', '<answer>')
    ids = train.encode(args, tokenizer, 'gsm8k', dict(question='1+1?'))
    assert ids == tokenizer('Answer 5.\n\n1+1?<answer>')['input_ids']


@needs_shared
def test_sudoku_is_evaluated_on_the_256_puzzles_that_d1_drew(tokenizer):
    def grids(questions):
        return sorted(re.search('[0-4]{16}', question)[0] for question in questions)
    file = str(SHARED / 'data/sudoku_test.csv')
    args = llada_args('--task', 'sudoku', '--eval_data', file)
    [problems] = train.load_test_sets(args, tokenizer)[0].values()
    theirs = []
    for part in (SHARED / 'data/llada_generations').glob('sudoku*'):
        theirs += [item['question'] for item in json.loads(part.read_text())['generations']]
    assert grids(example['question'] for _, _, example in problems) == grids(theirs)


def test_code_is_evaluated_on_human_eval_and_mbpp_apart(tokenizer, monkeypatch):
    human = dict(prompt='def f(x):\n', entry_point='f', test='def check(f):\n    assert f(1) == 1')
    mbpp = dict(text='Double it.', test_list=['assert f(1) == 2'], test_setup_code='',
                code='def f(x): return 2 * x')
    hub = {'openai/openai_humaneval': [human], 'google-research-datasets/mbpp': [mbpp, mbpp]}

    def read_rows(source, config, split):
        return hub[source] if split == 'test' else None
    monkeypatch.setattr(rewards, 'read_rows', read_rows)
    args = llada_args('--task', 'code', '--eval_lengths', '32')
    sets, _ = train.load_test_sets(args, tokenizer)
    assert {name: len(sets[name]) for name in sets} == {'code-openai_humaneval': 1, 'code-mbpp': 2}
    constant = train.scores_without_a_model(args, tokenizer, sets)['constant']
    accuracy = [constant[name]['32']['accuracy'] for name in sets]
    assert accuracy == [1.0, 0.0], 'the constant answer returns x, which is right once'


# ---- evaluation ----

def test_every_answer_stands_with_its_own_problem(mixed, tokenizer, monkeypatch):
    """A model that repeats its prompt: prompts go in by length, answers come out in order."""
    put_grade(monkeypatch, varied_grade)
    args = nano_args('--eval_data', mixed, '--max_prompt', '400', '--sample_batch', '2')
    [problems] = train.load_test_sets(args, tokenizer)[0].values()
    asked = []

    def repeat(model, tokenizer, prompts, sampling, prefill):
        asked.extend(map(len, prompts))
        return None, torch.ones(len(prompts), 5), None, [tokenizer.decode(p) for p in prompts]
    monkeypatch.setattr(train, 'sample_texts', repeat)
    items = train.graded_answers(args, None, tokenizer, problems, 8, 'label')
    assert asked == sorted(asked) != [len(prompt) for _, prompt, _ in problems]
    for (_, prompt, example), item in zip(problems, items, strict=True):
        text = tokenizer.decode(prompt)
        reward, correct = varied_grade(text, example)
        assert item == dict(question=example['question'], generations=text, reward=reward,
                            correct=correct, ground_truth=example['answer'], effective_tokens=5)


def test_the_table_has_a_row_per_stage_and_curves_follow_reward_and_length():
    def score(accuracy):
        return dict(accuracy=accuracy, low=0.0, high=1.0, share=accuracy, reward=accuracy * 3,
                    effective_tokens=7, waits=0.5 * (accuracy == 0.625))
    found = dict(constant=dict(math={'8': score(0.125), '16': score(0.25)}), rule={},
                 base=dict(math={'8': score(0.375), '16': score(0.625)}))
    text = train.table(nano_args('--eval_lengths', '8,16'), found)
    numbers = [[float(number) for number in re.findall(r'[0-9]+\.[0-9]+', line)]
               for line in text.splitlines()]
    assert [row for row in numbers if row] == [[12.5, 0, 100, 0.38, 7, 25, 0, 100, 0.75, 7],
                                               [37.5, 0, 100, 1.12, 7, 62.5, 0, 100, 1.88, 7]]
    assert text.endswith('7.0 Wait 50 %' + text[len(text.rstrip()):]) and text.count('Wait') == 1
    log = [dict(loss=1.0)] + [dict(reward=i, length=5 - i) for i in range(4)]
    rising, falling = (re.search('[▁-█]+', line)[0] for line in train.curves(log).splitlines())
    assert rising == ''.join(sorted(rising)) == falling[::-1] and len(set(rising)) == 4
    assert train.curves(log[:1]) == ''


# ---- one process or two ----

def in_a_process(work, *args, **environment):
    """The id of a fork of this process that does work(*args) and nothing else."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(120)                    # no test waits for ever
            os.environ.update(environment)
            work(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def two_processes(work, *args):
    """As torchrun starts them."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    keys = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    pids = [in_a_process(work, *args, RANK=rank, LOCAL_RANK=rank, **keys) for rank in '01']
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]


class Stopped(BaseException):
    pass


def run_until(number, argv):
    """train.run that ends when the call `number` of save_checkpoint begins."""
    save_checkpoint, calls = train.save_checkpoint, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == number:
            raise Stopped
        save_checkpoint(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'save_checkpoint', stopping)
        patch.setattr(torch.cuda, 'is_available', bool)          # no
        try:
            train.run(argv)
        except Stopped:
            pass


def stop(out, name, number, *flags):
    """The folder of such a run."""
    run_until(number, [*SMALL, '--out', str(out), '--name', name, *flags])
    return out / name


def assert_close(one, two):
    assert_logs_close(one, two)
    assert rows(one / 'samples.jsonl') == rows(two / 'samples.jsonl')
    ours, theirs = checkpoint(one)['weights'], checkpoint(two)['weights']
    for name in ours:
        difference = (ours[name] - theirs[name]).abs()
        # AdamW's first step is as long for a gradient of rounding errors as for any other
        assert (difference > 1e-5).float().mean() < 1e-3 and difference.max() < 2e-4, name


@needs_fork
@pytest.mark.parametrize('flags', ['--lora_rank 4', '--beta 0'])
def test_two_processes_equal_one_and_one_finishes_what_they_began(tmp_path, monkeypatch, flags):
    """Shares that are not even: 3 test problems, SFT's 3 rows by 2, a process of flat groups."""
    def half_flat(text, example):
        return len(set(text)) * (len(example['question']) % 2), len(text) % 2 == 0
    put_grade(monkeypatch, half_flat)
    flags = [*SMALL, '--sft_batch', '6', '--micro_batch', '2', '--num_generations', '4',
             '--sample_batch', '4', '--out', str(tmp_path), *flags.split()]
    train.main([*flags, '--name', 'one'])
    two_processes(run_until, None, [*flags, '--name', 'two'])
    two_processes(run_until, 5, [*flags, '--name', 'stopped'])
    assert checkpoint(tmp_path / 'stopped')['step'] == 1
    assert not (tmp_path / 'stopped/model').exists()
    train.main([*flags, '--name', 'stopped', '--resume'])
    for name in ('two', 'stopped'):
        assert_close(tmp_path / 'one', tmp_path / name)


# ---- a run that is killed, and goes on ----

def die_at(number, argv):
    """Kills its process at the touch `number` of the disk: a file or row is cut, or has no name."""
    def dying(call, spoil):
        def wrapped(*args):
            nonlocal number
            number -= 1
            if number == 0:
                spoil(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)
        return wrapped

    def cut_file(fd):
        os.ftruncate(fd, os.fstat(fd).st_size // 2)

    def cut_row(args, name, row):
        with open(Path(args.folder, name), 'a') as file:
            file.write(json.dumps(row)[:9])

    def leave(*args):
        pass
    os.fsync = dying(os.fsync, cut_file)         # of this process, which is a fork
    Path.replace = dying(Path.replace, leave)
    train.append = dying(train.append, cut_row)
    train.save_adapter = dying(train.save_adapter, leave)
    train.main(argv)


@needs_fork
@pytest.mark.parametrize('flags', ['', '--lora_rank 2 --save_every 2 --eval_every 1'])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(out, tmp_path, flags):
    """Start number i dies 6 touches of the disk later than the one before, until one ends."""
    whole = run(tmp_path, 'whole', *flags.split()) if flags else out / 'whole'
    flags = [*SMALL, '--name', 'run', '--out', str(tmp_path), *flags.split()]
    deaths, status = 0, None
    while status != 0:
        resume = ['--resume'] if (tmp_path / 'run').exists() else []
        _, status = os.waitpid(in_a_process(die_at, 1 + 6 * deaths, flags + resume), 0)
        assert status in (0, signal.SIGKILL)
        deaths += status != 0
    assert deaths >= 5
    assert content(tmp_path / 'run') == content(whole)


def test_the_same_command_begins_another_run_and_resume_goes_on_with_the_newest(out, capsys):
    one = ['--stages', 'sft', '--eval_lengths', '8']
    first, _ = run(out, 'name', *one), run(out, 'name', *one)
    stop(out, 'name', 2, *one)
    kept = content(first)
    assert kept == content(out / 'name-2') and not (out / 'name-3/model').exists()
    capsys.readouterr()
    run(out, 'name', *one, '--resume', '--num_views', '5')
    assert '--num_views' in capsys.readouterr().out, 'what has changed is said'
    assert content(first) == content(out / 'name-2') == content(out / 'name-3') == kept
    assert not (out / 'name-4').exists()
    shutil.rmtree(out / 'name-2')
    run(out, 'name', *one)
    assert (out / 'name-4').exists() and not (out / 'name-2').exists(), 'or it would not be newest'


def test_a_name_with_a_folder_in_it_is_numbered_there(tmp_path):
    args = nano_args('--out', str(tmp_path), '--name', 'mine/run')
    (tmp_path / 'mine/run-1').mkdir(parents=True)                # somebody's own name
    for name in ('run', 'run-2', 'run-3'):
        folder = Path(train.run_folder(args))
        assert folder == tmp_path / 'mine' / name
        folder.mkdir(parents=True)


@pytest.mark.parametrize('stage', ['sft', 'grpo'])
def test_a_learning_rate_given_with_resume_counts(out, stage):
    rate = dict(sft='--sft_learning_rate', grpo='--learning_rate')[stage]
    flags = ['--stages', stage, '--eval_lengths', '8']
    folder = stop(out, f'slower-{stage}', 3, *flags)
    before = checkpoint(folder)['weights']
    run(out, folder.name, *flags, '--resume', rate, '0')
    torch.testing.assert_close(checkpoint(folder)['weights'], before, atol=0, rtol=0)


def test_more_lengths_with_resume_are_evaluated_right_or_refused(out):
    run(out, 'longer', '--eval_lengths', '8')
    try:
        train.run([*SMALL, '--out', str(out), '--name', 'longer', '--resume'])
    except SystemExit:
        return
    assert results(out / 'longer') == results(out / 'whole')


def test_a_run_that_is_given_more_steps_ends_as_one_that_had_them(out):
    flags = ['--stages', 'grpo', '--eval_lengths', '8', '--learning_rate', '0.01']
    longer = content(run(out, 'long', *flags))
    run(out, 'short', *flags, '--grpo_steps', '1')
    assert content(run(out, 'short', *flags, '--resume')) == longer
    with pytest.raises(ValueError, match='--grpo_steps 3'):
        run(out, 'short', *flags, '--resume', '--grpo_steps', '1')


def test_resume_does_not_take_a_run_of_another_name_for_a_later_one(out):
    flags = ['--stages', 'sft', '--eval_lengths', '8']
    run(out, 'exp-3', *flags)
    kept = content(out / 'exp-3')
    with pytest.raises(ValueError, match='exp holds no run'):
        run(out, 'exp', *flags, '--resume')
    stop(out, 'exp', 2, *flags)                  # after exp-3: exp-4
    run(out, 'exp', *flags, '--resume')
    assert content(out / 'exp-4') == kept == content(out / 'exp-3')
    assert not (out / 'exp').exists()


def test_config_has_the_flags_of_the_last_checkpoint(out):
    flags = ['--stages', 'grpo', '--eval_lengths', '8', '--learning_rate', '0.01']
    config = stop(out, 'config', 3, *flags) / 'config.json'
    kept = config.read_text()
    with pytest.raises(ValueError, match='no checkpoint of this model'):
        run(out, 'config', *flags, '--resume', '--lora_rank', '4')
    assert config.read_text() == kept
    run(out, 'config', *flags, '--resume', '--epsilon', '0.2')
    assert json.loads(config.read_text())['epsilon'] == 0.2


@pytest.mark.parametrize('flags', [
    '--eval_n 2', '--askers Ann', '--prefill 1', '--sft_steps 4', '--stages grpo', '--seed 1',
    '--steps 4', '--dtype bfloat16', '--lora_alpha 1', f'--eval_data {ROOT}/assets/nano/problems'])
def test_resume_refuses_what_would_mix_two_runs_in_one_table(out, flags):
    kept = content(out / 'whole')
    with pytest.raises(ValueError, match=flags.split()[0]):
        run(out, 'whole', '--resume', *flags.split())
    assert content(out / 'whole') == kept


def test_what_was_evaluated_on_the_way_stays_as_it_was_with_more_lengths(out, capsys):
    flags = ['--stages', 'grpo', '--eval_every', '1', '--eval_lengths']
    folder = run(out, 'midway', *flags, '8')
    run(out, 'midway', *flags, '8,16', '--resume')
    found = {stage: set(scores['gsm8k']) for stage, scores in results(folder).items()}
    assert found['grpo-1'] == {'8'} and found['grpo'] == {'8', '16'}
    assert 'grpo-1 ' in capsys.readouterr().out
    # a run that was killed after an evaluation and before a checkpoint comes to it again
    scores = results(folder)
    (folder / 'results.json').write_text(json.dumps(scores | {'grpo-9': scores['grpo-1']}))
    run(out, 'midway', *flags, '8,16', '--resume')
    assert results(folder) == scores


def test_a_full_disk_is_one_line_and_loses_nothing(out):
    folder = stop(out, 'full', 5)
    kept = last_checkpoint(folder).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))         # bytes per file
    try:
        with pytest.raises(SystemExit) as end:
            train.run([*SMALL, '--out', str(out), '--name', 'full', '--resume'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 'grpo.pt' in end.value.code and '\n' not in end.value.code
    assert last_checkpoint(folder).read_bytes() == kept
    assert content(run(out, 'full', '--resume')) == content(out / 'whole')


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_is_data_of_this_model_or_one_line(tmp_path):
    folder = stop(tmp_path, 'spoilt', 2, '--stages', 'sft', '--eval_lengths', '8')
    good = checkpoint(folder)
    shapes = {**good['weights'], 'ln_f.weight': torch.ones(1)}               # would broadcast
    names = {'model.' + name: tensor for name, tensor in good['weights'].items()}
    for weights in (shapes, names, Bomb(str(tmp_path / 'exploded'))):
        torch.save(dict(good, weights=weights), last_checkpoint(folder))
        with pytest.raises(ValueError):
            run(tmp_path, 'spoilt', '--stages', 'sft', '--eval_lengths', '8', '--resume')
    assert not (tmp_path / 'exploded').exists()


# ---- settings ----

@pytest.mark.parametrize('task, steps, mu, updates, temperature, eval_n', [
    ('gsm8k', 640, 12, 7680, 0.9, 0), ('math', 550, 12, 6600, 0.9, 0),
    ('countdown', 625, 8, 5000, 0.9, 0), ('sudoku', 475, 8, 3800, 0.3, 256)])
def test_llada_has_the_papers_settings(task, steps, mu, updates, temperature, eval_n):
    args = llada_args('--task', task)
    assert (args.grpo_steps, args.num_iterations) == (steps, mu)
    assert steps * mu == updates, 'gradient steps of the paper: 7700, 6600, 5000, 3800'
    assert (args.temperature, args.eval_n) == (temperature, eval_n)
    # completions per update: 6 per GPU, accumulated twice, 8 GPUs; 20 epochs of s1K's 1000
    assert args.num_prompts * args.num_generations == 6 * 2 * 8
    assert args.sft_steps * args.sft_batch == 20 * 1000
    assert args.max_prompt + args.sft_length == 4096
    assert (args.lora_rank, args.lora_alpha, args.dtype) == (128, 64, 'bfloat16')
    assert (args.beta, args.epsilon, args.p_mask_prompt) == (0.04, 0.5, 0.15)
    assert (args.learning_rate, args.sft_learning_rate) == (3e-6, 1e-5)
    assert (args.gen_length, args.steps, args.block_length) == (256, 128, 32)
    assert (args.norm, args.eval_lengths) == ('token', [128, 256, 512])


def test_given_flags_come_before_the_presets_of_task_and_model(out):
    assert llada_args('--task', 'sudoku', '--num_iterations', '2').num_iterations == 2
    assert llada_args('--task', 'gsm8k,sudoku').num_iterations == 12, 'a preset is of one task'
    assert train.parse(['--model', str(out / 'whole/model')]).gen_length == 48, 'nano, trained'
    assert train.parse([]).device == 'cpu', 'also where there is a GPU'


def test_help_has_every_flag_in_its_group_and_its_default_once(capsys):
    with pytest.raises(SystemExit):
        train.parse(['--help'])
    text = capsys.readouterr().out
    for heading, flags in train.FLAGS.items():
        _, found, text = text.partition(f'\n{heading}:\n')
        assert found
        parts = ('\n' + text.split('\n\n')[0]).split('\n  --')[1:]
        for (name, nano, llada, *_), part in zip(flags, parts, strict=True):
            shown = f'nano {nano}, LLaDA {llada}' if nano != llada else nano
            assert re.match(rf'{name}\b', part)
            if shown:                            # else it is off
                assert ' '.join(part.split()).count(f'[{shown}]') == part.count('[') == 1


# One bad input per kind of mistake, and what the line must name; F is a folder of files.
BAD = [
    ('--stage grpo', '--stage'),                                 # no abbreviations
    ('--beta much', 'beta'),
    ('--temperature nan', 'temperature'),
    ('--temperature inf', 'temperature'),
    ('--task gsm9k', 'gsm9k'),
    ('--gen_length 20', 'gen_length'),
    ('--steps -2', 'steps'),
    ('--eval_lengths 12', 'eval_lengths'),
    ('--num_generations 1', 'num_generations'),
    ('--sft_length 0', 'sft_length'),
    ('--save_every 0', 'save_every'),
    ('--micro_batch 0', 'micro_batch'),
    ('--learning_rate -1', 'learning'),
    ('--lora_rank 4 --lora_targets q_projection', 'lora_targets'),
    ('--lora_rank 4 --lora_targets q_proj,q_proj', 'lora_targets'),
    ('--max_prompt 500', 'max_prompt'),                          # more than the model takes
    ('--sft_length 500', 'max_prompt'),                          # and this with it
    ('--gen_length 512 --steps 64', 'max_prompt'),
    ('--max_prompt 5', 'max_prompt'),                            # no prompt is shorter
    ('--device none', 'device'),
    ('--p_mask_prompt 2', 'p_mask_prompt'),
    ('--threshold 2', 'threshold'),
    ('--estimator exact', 'p_mask_prompt'),                      # or it would not be exact
    ('--askers Ann,,Ben', 'askers'),
    ('--askers Ann,nobody', 'askers'),
    ('--resume', 'resume'),
    ('--out F/good.jsonl', 'good.jsonl'),
    ('--instructions F/nowhere.txt', 'nowhere.txt'),
    ('--data F/good.jsonl,F/good.jsonl', '--data'),              # for one task
    ('--data F/good.jsonl --eval_data F/good.jsonl', 'data'),    # no training problem is left
    ('--data F/long.jsonl', 'max_prompt'),                       # of the training problems, too
    ('--eval_data F/column.jsonl', 'column.jsonl'),
    ('--sft_data F/good.jsonl', 'good.jsonl'),
    ('--device cpu --model nowhere/nothing', 'nowhere/nothing'),
    ('--model F/run', 'run/model'),              # of the run's last model
    ('--adapter F/nowhere', 'nowhere'),
    ('--adapter F/foreign', 'foreign'),                          # of another model
]


@pytest.mark.parametrize('flags, named', BAD)
def test_a_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, flags, named):
    lines(tmp_path / 'good.jsonl', problem('How many?'))
    lines(tmp_path / 'column.jsonl', dict(question='How many?'))
    lines(tmp_path / 'long.jsonl', problem('How many?' * 99))
    save_adapter(tmp_path / 'foreign', add_lora(tiny(), 2, 2), '')
    (tmp_path / 'run/model').mkdir(parents=True)
    lines(tmp_path / 'run/model/config.json', dict(nano=True))
    monkeypatch.chdir(tmp_path)                  # out/ would be here
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as end:
        train.run([*SMALL, *re.sub('(^|[ ,])F', rf'\1{tmp_path}', flags).split()])
    said = end.value.code
    if said == 2:                                # argparse has printed its usage and a line
        said = capsys.readouterr().err.splitlines()[-1]
    assert '\n' not in said and named in said
    assert sorted(tmp_path.rglob('*')) == before


# ---- --compile ----

def test_a_graph_per_kind_of_call_gives_the_same_numbers(monkeypatch):
    compile_module = torch.nn.Module.compile

    def cheap(block, **keys):                    # no C compiler is needed
        compile_module(block, backend='eager', **keys)
    monkeypatch.setattr(torch.nn.Module, 'compile', cheap)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = tiny(), tiny()
    train.compile_blocks(compiled)
    frames = torch._dynamo.utils.counters['frames']

    def outputs(model, B, P):
        prompt = tokens(B, P)
        ids, _ = sample.generate(model, prompt, 8, 4, 4, attention_mask=prompt > 0)
        logps = model.token_logps(tokens(B, P + 8), ids, ids > 0)
        model.zero_grad()
        logps.sum().backward()
        return dict(ids=ids.float(), logps=logps.detach()) | gradients(model)
    counts = []
    for B, P in ((3, 6), (4, 7), (5, 9)):
        assert_same(outputs(compiled, B, P), outputs(plain, B, P), 1e-5)
        counts.append(frames['total'])
    assert counts[0] == counts[1] == counts[2] == frames['ok'], 'sizes share their graphs'
    limit = torch._dynamo.config.recompile_limit
    assert limit > 24, 'frozen weights, a single row and a cache have graphs of their own'
    assert torch._inductor.config.emulate_precision_casts, 'or bfloat16 has first ratios beside 1'


def test_policy_and_reference_are_compiled(out, monkeypatch):
    compiled = []
    monkeypatch.setattr(train, 'compile_blocks', compiled.append)
    run(out, 'compiled', '--compile', *'--stages grpo --grpo_steps 1 --eval_lengths 8'.split())
    policy, reference = compiled
    assert policy.blocks[0].q_proj.weight.requires_grad
    assert not reference.blocks[0].q_proj.weight.requires_grad


def test_a_failed_compilation_is_one_line(monkeypatch):
    def fails(argv):
        raise torch._inductor.exc.InductorError(OSError('no compiler\nand more'), None)
    monkeypatch.setattr(train, 'main', fails)
    with pytest.raises(SystemExit, match='no compiler.*--no-compile') as end:
        train.run([])
    assert '\n' not in end.value.code


# ---- python sample.py, without a run ----

def test_the_sampler_as_a_program_shows_the_shipped_base_or_asks_what_is_asked(
        tmp_path, monkeypatch, capsys):
    lengths, generate = [], sample.generate

    def spied(model, prompt_ids, gen_length, block_length, steps, *rest, **keys):
        lengths.append((gen_length, block_length, steps))
        return generate(model, prompt_ids, gen_length, block_length, steps, *rest, **keys)
    monkeypatch.setattr(sample, 'generate', spied)

    def shown(*flags):
        monkeypatch.setattr(sys, 'argv', ['sample.py', *flags])
        sample.main()
        return capsys.readouterr().out
    monkeypatch.chdir(tmp_path)                  # without out/
    text = shown()
    assert text.startswith('nano: ')
    assert rewards.load_examples('gsm8k', 'nano', 'test')[0]['question'] in text
    qwen3_folder(tmp_path / 'base')
    base = str(tmp_path / 'base')
    _, tokenizer = load(base)
    prompt = tokenizer.decode(chat(tokenizer, 'How many?'))      # and no instructions
    assert shown('--model', base, '--prompt', 'How many?').startswith(f'{base}: {prompt}\n')
    assert lengths == [(48, 4, 24), (256, 32, 128)]
    with pytest.raises(ValueError, match='--gen_length 500'):    # nano takes 512 in all
        shown('--gen_length', '500')
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--model', 'nowhere/nothing'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    assert 'nowhere/nothing' in end.value.code and '\n' not in end.value.code


def test_the_sampler_as_a_program_shows_of_a_completion_what_is_graded(monkeypatch, capsys):
    _, tokenizer = load('nano')
    ids = torch.tensor([tokenizer('7<|endoftext|>8')['input_ids']])
    monkeypatch.setattr(sample, 'generate', lambda *_, **__: (ids, torch.zeros_like(ids)))
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--model', 'nano'])
    sample.main()
    assert capsys.readouterr().out.endswith('   1 7\n7\n')
