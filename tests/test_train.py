"""The recipe end to end, in miniature: what it leaves, how it goes on, that it is the paper's."""
import json
import os
import re
import resource
import runpy
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
from model import KEYS, LORA_LAYERS, add_lora, load, load_adapter, save_adapter, save_tokenizer
from sample import chat
from tiny import SHARED, needs_shared, tiny, tokens

ROOT = Path(__file__).resolve().parents[1]
SMALL = ('--sft_steps 3 --sft_batch 4 --grpo_steps 3 --num_prompts 2 --num_generations 2 '
         '--num_iterations 2 --gen_length 16 --block_length 8 --steps 8 --eval_n 3 '
         '--eval_lengths 8,16 --save_every 1 --beta 0.04 --temperature 3').split()
LORA = ['--lora_rank', '4']
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='starts processes by os.fork')


def varied_grade(text, example):
    """A reward that completions earn in different amounts, whatever the model has learnt."""
    return len(set(text)) / 10, len(text) % 2 == 0


@pytest.fixture(scope='module', autouse=True)
def varied_reward():
    with pytest.MonkeyPatch.context() as patch:
        task = rewards.TASKS['gsm8k']._replace(grade=varied_grade)
        patch.setitem(rewards.TASKS, 'gsm8k', task)
        yield


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """The folder of all runs, with 'whole', one that nothing has stopped."""
    folder = tmp_path_factory.mktemp('out')
    run(folder, 'whole')
    return folder


def run(out, name, *flags):
    train.main([*SMALL, '--out', str(out), '--name', name, *flags])
    return out / name


def rows(path):
    """The rows of a log without their timings."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if 'seconds' not in k} for row in found]


def log(folder, stage):
    return [row for row in rows(folder / 'log.jsonl') if row['stage'] == stage]


def results(folder):
    return json.loads((folder / 'results.json').read_text())


def stages(folder):
    """Those with any result, in their order."""
    return [stage for stage, scores in results(folder).items() if scores]


def checkpoint(folder):
    return torch.load(folder / 'checkpoint.pt', weights_only=True)           # plain data


def content(folder):
    """All that a run has left but its settings, without timings: {file: what can be compared}."""
    found = {}
    for path in folder.rglob('*.*'):
        name = str(path.relative_to(folder))
        if name == 'checkpoint.pt':
            weights = checkpoint(folder)['weights']
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


def lines(path, *items):
    """A file of JSON lines."""
    path.write_text(''.join(json.dumps(item) + '\n' for item in items))
    return str(path)


def problem(question, answer=2):
    return dict(question=question, answer=f'#### {answer}')


# ---- the recipe: what it trains and what it leaves ----

def test_the_recipe_leaves_all_its_files(out):
    folder = out / 'whole'
    named = {path.name for path in folder.iterdir()}
    generations = {f'{stage}_gsm8k_{length}_generations.json'
                   for stage in ('base', 'sft', 'grpo') for length in (8, 16)}
    assert named == generations | {'config.json', 'log.jsonl', 'samples.jsonl', 'results.json',
                                   'checkpoint.pt', 'model'}
    found = [(row['stage'], row['step']) for row in rows(folder / 'log.jsonl')]
    assert found == [('sft', i) for i in range(3)] + [('grpo', i) for i in range(3)]
    for row in log(folder, 'grpo'):
        assert row['first_ratio'] == 1 and row['bad_updates'] == 0 and row['kl'] >= -1e-6
    samples = rows(folder / 'samples.jsonl')
    assert [row['step'] for row in samples] == [0, 1, 2]
    assert len({row['question'] for row in samples}) == 3, 'new problems in each iteration'
    assert stages(folder) == ['constant', 'base', 'sft', 'grpo']
    scores = results(folder)['grpo']['gsm8k']
    assert list(scores) == ['8', '16']
    saved = json.loads((folder / 'grpo_gsm8k_16_generations.json').read_text())
    assert saved['metrics'] == scores['16'] and scores['16']['n'] == len(saved['generations']) == 3
    assert (saved['gen_length'], saved['diffusion_steps']) == (16, 8)
    model, _ = load(str(folder / 'model'))
    for name, tensor in checkpoint(folder)['weights'].items():
        assert torch.equal(model.get_parameter(name), tensor)


def test_a_saved_model_is_evaluated_to_the_numbers_of_its_run(out):
    again = run(out, 'evaluated', '--model', str(out / 'whole' / 'model'), '--eval_only')
    assert results(again)['base'] == results(out / 'whole')['grpo']
    assert not (again / 'log.jsonl').exists() and not (again / 'model').exists()


def test_the_seed_makes_the_run(out):
    again = run(out, 'again', '--gradient_checkpointing')
    assert content(again) == content(out / 'whole')
    other = run(out, 'other', '--seed', '1')
    for name, column in (('log.jsonl', 'loss'), ('samples.jsonl', 'question')):
        pairs = zip(rows(other / name), rows(again / name), strict=True)
        assert all(a[column] != b[column] for a, b in pairs)


def test_fixed_mask_changes_the_losses_and_not_the_rollouts(out):
    first = log(out / 'whole', 'grpo')[0]
    fixed = log(run(out, 'fixed', '--fixed_mask', '--grpo_steps', '1'), 'grpo')[0]
    assert fixed['reward'] == first['reward'] and fixed['loss'] != first['loss']


@pytest.mark.parametrize('stage', ['sft', 'grpo'])
def test_one_stage_can_be_trained_alone(out, stage):
    alone = run(out, f'only-{stage}', '--stages', stage)
    assert stages(alone) == ['constant', 'base', stage]
    same = rows(alone / 'log.jsonl') == log(out / 'whole', stage)
    assert same == (stage == 'sft'), 'in the whole run diffu-GRPO goes on from SFT'


def test_groups_of_equal_rewards_are_left_out_with_the_same_numbers(out, monkeypatch):
    def grade(text, example):                    # about every second question teaches nothing
        return len(set(text)) * (len(example['question']) % 2), False
    task = rewards.TASKS['gsm8k']._replace(grade=grade)
    monkeypatch.setitem(rewards.TASKS, 'gsm8k', task)
    passes, completion_logps, rollout = [], train.completion_logps, train.rollout

    def counted(*args):
        passes.append(1)
        return completion_logps(*args)

    def never_flat(*args):
        return [group._replace(advantages=group.advantages + 1e-30) for group in rollout(*args)]
    monkeypatch.setattr(train, 'completion_logps', counted)
    flags = '--stages grpo --beta 0 --learning_rate 1e-3 --num_prompts 4 --eval_lengths 8'.split()
    cheap = run(out, 'flat-out', *flags)
    num_passes = len(passes)
    monkeypatch.setattr(train, 'rollout', never_flat)
    whole = run(out, 'flat-in', *flags)
    flat = sum(4 * row['flat_groups'] for row in log(cheap, 'grpo'))
    assert 0 < flat < 12 and len(passes) - num_passes == 3 * 4 * 2
    assert num_passes == (3 * 4 - flat) * 2
    for ours, theirs in zip(log(cheap, 'grpo'), log(whole, 'grpo'), strict=True):
        assert 'kl' not in ours, 'no KL was computed'
        for name in ('reward', 'grad_norm', 'length'):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.mark.parametrize('stage, loss', [('sft', 'masked_loss'), ('grpo', 'policy_loss')])
def test_an_update_that_is_not_finite_is_skipped_and_counted(out, monkeypatch, stage, loss):
    original, losses = getattr(train, loss), []

    def spoilt(*args):
        result = original(*args)
        losses.append(result)
        if len(losses) != 2:
            return result
        return result * torch.nan if stage == 'sft' else (result[0] * torch.nan, result[1])
    monkeypatch.setattr(train, loss, spoilt)
    folder = run(out, f'skipped-{stage}', '--stages', stage)
    is_bad = [row['grad_norm'] != row['grad_norm'] for row in rows(folder / 'log.jsonl')]    # nan
    assert is_bad == [stage == 'grpo', stage == 'sft', False]
    if stage == 'grpo':
        assert [row['bad_updates'] for row in log(folder, 'grpo')] == [1, 0, 0]
    base, _ = load('nano')
    trained = checkpoint(folder)['weights']
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert not torch.equal(trained['wte.weight'], base.wte.weight), 'the others were made'


def test_bfloat16_trains_float32_weights_and_saves_bfloat16_ones(out):
    folder = run(out, 'half', '--dtype', 'bfloat16', '--stages', 'grpo', '--num_iterations', '1',
                 '--grpo_steps', '1')
    trained = checkpoint(folder)['weights']
    saved = load_file(folder / 'model/model.safetensors')
    rounded = 0
    for name, tensor in trained.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(saved['model.transformer.' + name], tensor.bfloat16())
        rounded += not torch.equal(tensor, tensor.bfloat16().float())
    assert rounded
    [row] = rows(folder / 'log.jsonl')
    assert row['first_ratio'] == 1 and row['kl'] == 0, 'the reference computes as the policy does'


# ---- LoRA: from a folder in the layout of a published model to a folder in that layout ----

def published(folder, layout):
    """A small random model in bfloat16, with the nano tokenizer."""
    model = tiny(layout=layout, qk_norm=layout == 'qwen3', embedding_size=907,
                 max_sequence_length=1024)
    if layout == 'qwen3':
        sizes = {theirs: getattr(model.config, ours) for ours, theirs in KEYS['qwen3'].items()}
        model.config.file_keys = dict(sizes, model_type='a2d-qwen3')
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, 'nano')
    return str(folder)


@pytest.fixture(params=['llada', 'qwen3'])
def adapted(request, tmp_path):
    """A base in the layout, the folder of its run with LoRA, and ids."""
    base = published(tmp_path / 'base', request.param)
    folder = run(tmp_path, 'lora', '--model', base, '--device', 'cpu', '--no-compile', *LORA,
                 '--data', 'nano', '--eval_data', 'nano', '--sft_data', 'nano',
                 '--sft_length', '64', '--learning_rate', '1e-2', '--sft_learning_rate', '1e-2')
    return Path(base), folder, tokens(2, 9, high=900)


@torch.no_grad()
def test_adapters_of_both_stages_become_one_and_a_merged_model(adapted):
    base, folder, ids = adapted
    trained = checkpoint(folder)['weights']
    names = {re.sub('blocks.[01].', '', name) for name in trained}
    stage_layers = [('0', 'q_proj k_proj v_proj'), ('1', 'q_proj k_proj v_proj'), ('0', 'up_proj')]
    assert names == {f'{layer}.adapters.{i}.{matrix}' for i, layers in stage_layers
                     for layer in layers.split() for matrix in 'AB'}
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in trained.values())

    policy, _ = load(str(base))
    before = policy(ids)
    add_lora(policy, 4, 8, ('q_proj', 'k_proj', 'v_proj'))       # SFT's
    add_lora(policy, 4, 64, train.parse([]).lora_targets)        # diffu-GRPO's
    policy.load_state_dict(trained, strict=False)
    again, _ = load(str(base))
    load_adapter(folder / 'adapter', again)
    assert len(again.blocks[0].q_proj.adapters) == 1
    torch.testing.assert_close(again(ids), policy(ids), atol=1e-4, rtol=1e-4)
    assert (again(ids) - before).abs().max() > 0.01
    merged, _ = load(str(folder / 'model'))
    assert (merged(ids) - policy(ids)).abs().max() < 0.3 * (policy(ids) - before).abs().max()

    saved, source = (load_file(f / 'model.safetensors') for f in (folder / 'model', base))
    assert saved.keys() == source.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    changed = {name.split('.')[-2] for name in saved if not torch.equal(saved[name], source[name])}
    assert changed == {'q_proj', 'k_proj', 'v_proj', 'up_proj'}
    files = [path.name for path in base.iterdir() if 'model' not in path.name]
    assert {'config.json', 'tokenizer.json', 'chat_template.jinja'} <= set(files)
    for name in files:
        assert (folder / 'model' / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_evaluation_sees_what_was_trained_and_the_base_stays_as_it_is(out, monkeypatch, dtype):
    ids, seen, graded_answers = tokens(2, 9, high=900), {}, train.graded_answers

    @torch.no_grad()
    def spied(args, model, tokenizer, problems, length, label):
        seen[label.partition(':')[0]] = model(ids), model.blocks[0].q_proj.weight.clone()
        return graded_answers(args, model, tokenizer, problems, length, label)
    monkeypatch.setattr(train, 'graded_answers', spied)
    # steps of 2e-5, which bfloat16 weights would not notice
    folder = run(out, f'seen-{dtype}', '--stages', 'grpo', *LORA, '--dtype', dtype,
                 '--eval_every', '2')
    assert stages(folder) == ['constant', 'base', 'grpo-2', 'grpo']
    for label, name in (('grpo-2', 'adapter-2'), ('grpo', 'adapter')):
        model, _ = load('nano', getattr(torch, dtype))
        load_adapter(folder / name, model)
        with torch.no_grad():
            assert torch.equal(model(ids), seen[label][0]) and model.device.type == 'cpu'
        assert torch.equal(model.blocks[0].q_proj.weight, seen[label][1])
        assert not torch.equal(seen['base'][0], seen[label][0])
        scored = run(out, f'scored-{name}-{dtype}', '--eval_only', '--dtype', dtype,
                     '--adapter', str(folder / name))
        assert results(scored)['base'] == results(folder)[label]
    assert not torch.equal(seen['grpo-2'][0], seen['grpo'][0])


# ---- problems ----

def nano_args(*flags):
    return train.parse(['--gen_length', '16', '--block_length', '8', '--steps', '8', *flags])


def llada_args(*flags):
    return train.parse(['--model', 'x/y', '--device', 'cpu', *flags])


@pytest.fixture(scope='module')
def tokenizer():
    return load('nano')[1]


def problems_of(args, tokenizer):
    return train.Problems(args, tokenizer, train.load_test_sets(args, tokenizer))


@pytest.fixture
def files(tmp_path):
    """A Sudoku, eight word problems, and six of which four are long."""
    return dict(
        puzzle=lines(tmp_path / 'puzzle.jsonl',
                     dict(Puzzle='4320004330100004', Solution='4321124334122134')),
        numbers=lines(tmp_path / 'numbers.jsonl', *[problem(str(i)) for i in range(8)]),
        mixed=lines(tmp_path / 'mixed.jsonl',
                    *[problem(f'{i} + 1 =' + ' x' * 99 * (i % 3 > 0)) for i in range(6)]))


def test_tasks_take_turns_and_each_may_have_its_own_source(files, tokenizer):
    args = nano_args('--task', 'gsm8k,sudoku', '--data', files['numbers'] + ',nano')
    tests = train.load_test_sets(args, tokenizer)
    assert [len(tests[task]) for task in ('gsm8k', 'sudoku')] == [256, 256]
    problems = train.Problems(args, tokenizer, tests)
    drawn = [problems.draw(i) for i in range(16)]
    assert [task for task, _, _ in drawn] == ['gsm8k', 'sudoku'] * 8
    assert {example['question'] for _, _, example in drawn[::2]} == set('01234567')
    assert len({example['question'] for _, _, example in drawn[1::2]}) == 8
    tasks = [row['task'] for row in rows(
        run(Path(files['puzzle']).parent, 'two', '--task', 'gsm8k,sudoku', '--stages', 'grpo',
            '--num_prompts', '1', '--grpo_steps', '2') / 'samples.jsonl')]
    assert tasks == ['gsm8k', 'sudoku']


def test_each_epoch_of_a_file_has_an_order_of_its_own(files, tokenizer):
    orders = []
    for seed in ('0', '1'):
        args = nano_args('--data', files['numbers'], '--seed', seed)
        problems = problems_of(args, tokenizer)
        order = [problems.draw(i)[2]['question'] for i in range(16)]
        assert sorted(order[:8]) == sorted(order[8:]) == list('01234567')
        orders += [order[:8], order[8:]]
    assert all(orders.count(order) == 1 for order in orders)


def test_too_long_prompts_are_replaced_in_training_and_left_out_of_tests(files, tokenizer, capsys):
    args = nano_args('--data', files['mixed'], '--eval_data', files['mixed'], '--max_prompt', '64')
    [tests] = train.load_test_sets(args, tokenizer).values()
    assert [example['question'] for _, _, example in tests] == ['0 + 1 =', '3 + 1 =']
    assert '4 of 6' in capsys.readouterr().out
    problems = train.Problems(args, tokenizer, {})
    drawn = [problems.draw(i)[2]['question'] for i in range(20)]
    assert set(drawn) == {'0 + 1 =', '3 + 1 ='}
    assert drawn == [train.Problems(args, tokenizer, {}).draw(i)[2]['question'] for i in range(20)]


def test_training_problems_that_are_test_problems_are_left_out_and_counted(tmp_path, tokenizer,
                                                                           capsys):
    """Whoever asks, in whatever case and order."""
    test = lines(tmp_path / 'test.jsonl', problem('How  many?'), dict(problem('Why?'), asker='Al'))
    data = lines(tmp_path / 'train.jsonl', problem('Which?'), problem('why?'),
                 dict(problem('how many?'), asker='Eve'))
    problems = problems_of(nano_args('--data', data, '--eval_data', test), tokenizer)
    assert [example['question'] for example in problems.examples['gsm8k']] == ['Which?']
    assert '2 of 3' in capsys.readouterr().out
    test = lines(tmp_path / 'test.jsonl', dict(nums=[1, 2, 3], target=6))
    data = lines(tmp_path / 'train.jsonl', dict(nums=[3, 1, 2], target=6),
                 dict(nums=[3, 1, 2], target=5))
    args = nano_args('--task', 'countdown', '--data', data, '--eval_data', test)
    problems = problems_of(args, tokenizer)
    assert [example['answer'][1] for example in problems.examples['countdown']] == [5]
    # a problem of one task is no test problem of another
    args = nano_args('--task', 'gsm8k,math', '--data', 'nano', '--eval_data', 'nano')
    assert [len(problems_of(args, tokenizer).examples[t]) for t in args.tasks] == [2000, 2000]


def test_a_code_problem_that_fails_its_own_solution_is_never_drawn(tmp_path, tokenizer):
    def row(i, code):
        return dict(text=f'{i}', code=code, test_list=[f'assert f({i}) == {i}'])
    data = lines(tmp_path / 'code.jsonl', row(1, 'def f(x): return x'), row(2, 'def f(x): return'),
                 row(3, 'def f(x): return x + 0'))
    problems = train.Problems(nano_args('--task', 'code', '--data', data), tokenizer, {})
    drawn = {problems.draw(i)[2]['answer']['tests'][0] for i in range(9)}
    assert drawn == {'assert f(1) == 1', 'assert f(3) == 3'}


@needs_shared
def test_sudoku_is_evaluated_on_the_256_puzzles_that_d1_drew(tokenizer):
    file = str(SHARED / 'data/sudoku_test.csv')
    args = llada_args('--task', 'sudoku', '--eval_data', file)
    [problems] = train.load_test_sets(args, tokenizer).values()
    theirs = []
    for part in (SHARED / 'data/llada_generations').glob('sudoku*'):
        theirs += [item['question'] for item in json.loads(part.read_text())['generations']]
    ours = [example['question'] for _, _, example in problems]

    def grids(questions):
        return sorted(re.search('[0-4]{16}', question)[0] for question in questions)
    assert grids(ours) == grids(theirs)


def test_prefill_is_prompt_that_is_never_masked_and_text_that_is_rewarded(out, monkeypatch):
    seen, masks = [], []
    grade_all, completion_logps = rewards.grade_all, train.completion_logps

    def graded(task, texts, examples):
        seen.extend(texts)
        return grade_all(task, texts, examples)

    def kept(model, prompt_ids, completion_ids, prompt_mask, *rest):
        masks.append((prompt_ids, prompt_mask))
        return completion_logps(model, prompt_ids, completion_ids, prompt_mask, *rest)
    monkeypatch.setattr(rewards, 'grade_all', graded)
    monkeypatch.setattr(train, 'completion_logps', kept)
    folder = run(out, 'prefilled', '--stages', 'grpo', '--prefill', '<reasoning>\n',
                 '--p_mask_prompt', '0.9')
    prefill = load('nano')[1]('<reasoning>\n')['input_ids']
    constant = rewards.tagged('', rewards.TASKS['gsm8k'].constant_answer)
    texts = set(seen) - {constant}
    assert texts and all(text.startswith('<reasoning>\n') for text in texts)
    for prompt_ids, prompt_mask in masks:
        assert prompt_ids[0, -len(prefill):].tolist() == prefill
        assert not prompt_mask[:, -len(prefill):].any() and prompt_mask.any()
    assert rows(folder / 'samples.jsonl')[0]['completion'].startswith('<reasoning>\n')


def test_instructions_of_a_file_replace_those_of_every_task(tmp_path):
    _, tokenizer = load('nano')
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (tmp_path / 'i.txt').write_text('Answer 5.\n')
    args = llada_args('--instructions', str(tmp_path / 'i.txt'))
    ids = train.encode(args, tokenizer, 'gsm8k', dict(question='1+1?'))
    assert ids == tokenizer('Answer 5.\n\n1+1?')['input_ids']


# ---- evaluation ----

def test_every_answer_stands_with_its_own_problem(files, tokenizer, monkeypatch):
    """A model that repeats its prompt: prompts go in by length, answers come out in order."""
    args = nano_args('--eval_data', files['mixed'], '--max_prompt', '400', '--sample_batch', '2')
    [problems] = train.load_test_sets(args, tokenizer).values()
    sizes = []

    def repeat(model, tokenizer, prompts, sampling, prefill):
        sizes.append([len(prompt) for prompt in prompts])
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        return None, torch.ones(len(prompts), 5), None, texts
    monkeypatch.setattr(train, 'sample_texts', repeat)
    items = train.graded_answers(args, None, tokenizer, problems, 8, 'label')
    lengths = [len(prompt) for _, prompt, _ in problems]
    assert sum(sizes, []) == sorted(lengths) != lengths and max(map(len, sizes)) == 2
    for (_, prompt, example), item in zip(problems, items, strict=True):
        text = tokenizer.decode(prompt)
        reward, correct = varied_grade(text, example)
        assert item == dict(question=example['question'], generations=text, reward=reward,
                            correct=correct, ground_truth=example['answer'], effective_tokens=5)


def test_code_is_evaluated_on_human_eval_and_mbpp_apart(tokenizer, monkeypatch):
    human = dict(prompt='def f(x):\n', entry_point='f', test='def check(f):\n    assert f(1) == 1')
    mbpp = dict(text='Double it.', test_list=['assert f(1) == 2'], test_setup_code='')
    hub = {'openai/openai_humaneval': [human], 'google-research-datasets/mbpp': [mbpp, mbpp]}

    def read_rows(source, config, split):
        return hub[source] if split == 'test' else None
    monkeypatch.setattr(rewards, 'read_rows', read_rows)
    args = llada_args('--task', 'code', '--eval_lengths', '32')
    sets = train.load_test_sets(args, tokenizer)
    assert {name: len(sets[name]) for name in sets} == {'code-openai_humaneval': 1, 'code-mbpp': 2}
    constant = train.scores_without_a_model(args, tokenizer, sets)['constant']
    accuracy = [constant[name]['32']['accuracy'] for name in sets]
    assert accuracy == [1.0, 0.0], 'the constant answer returns x, which is right once'


def test_a_task_with_a_rule_has_a_row_for_it_before_the_base(out, capsys):
    folder = run(out, 'rule', '--task', 'gsm8k,sudoku', '--eval_only', '--eval_lengths', '8')
    assert stages(folder) == ['constant', 'rule', 'base']
    found = results(folder)
    assert found['rule'].keys() == {'sudoku'} and found['base'].keys() == {'gsm8k', 'sudoku'}
    share = found['rule']['sudoku']['8']['share']
    assert share > found['constant']['sudoku']['8']['share']
    assert f'{100 * share:.1f}' in capsys.readouterr().out


def test_the_table_has_a_row_per_stage_and_a_number_per_length():
    def score(accuracy):
        return dict(accuracy=accuracy, low=0.0, high=1.0, share=accuracy, reward=accuracy * 3,
                    effective_tokens=7)
    found = dict(constant=dict(math={'8': score(0.125), '16': score(0.25)}), rule={},
                 base=dict(math={'8': score(0.375), '16': score(0.625)}))
    args = nano_args('--eval_lengths', '8,16')
    text = train.table(args, found)
    numbers = [[float(number) for number in re.findall(r'[0-9]+\.[0-9]+', line)]
               for line in text.splitlines()]
    row = [12.5, 0, 100, 0.38, 7, 25, 0, 100, 0.75, 7]
    assert [found for found in numbers if found] == [row, [37.5, 0, 100, 1.12, 7, 62.5, 0, 100,
                                                           1.88, 7]]


def test_curves_rise_and_fall_with_reward_and_length():
    log = [dict(loss=1.0)] + [dict(reward=i, length=5 - i) for i in range(4)]
    reward, length = train.curves(log).splitlines()
    bars = [re.search('[▁-█]+', line)[0] for line in (reward, length)]
    assert bars[0] == ''.join(sorted(bars[0])) == bars[1][::-1]
    assert bars[0][0] == '▁' and bars[0][-1] == '█' and len(bars[0]) == 4
    assert train.curves([dict(loss=1.0)]) == ''
    long = train.curves([dict(reward=1, length=1)] * 1000)
    assert max(map(len, long.splitlines())) <= 100


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
    save_checkpoint = train.save_checkpoint
    calls = []

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


def half_flat(text, example):
    """Every second question teaches nothing, so that a process may have nothing to do."""
    return len(set(text)) * (len(example['question']) % 2), len(text) % 2 == 0


def assert_close(one, two):
    assert_logs_close(one, two)
    assert rows(one / 'samples.jsonl') == rows(two / 'samples.jsonl')
    assert results(one) == results(two)
    torch.testing.assert_close(checkpoint(one)['weights'], checkpoint(two)['weights'], atol=1e-5,
                               rtol=0)


@needs_fork
@pytest.mark.parametrize('flags', ['--lora_rank 4', '--beta 0'])
def test_two_processes_equal_one_and_one_finishes_what_they_began(tmp_path, monkeypatch, flags):
    """Shares that are not even: 3 test problems, SFT's 3 rows by 2."""
    task = rewards.TASKS['gsm8k']._replace(grade=half_flat)
    monkeypatch.setitem(rewards.TASKS, 'gsm8k', task)
    flags = [*SMALL, '--sft_batch', '6', '--micro_batch', '2', '--num_generations', '4',
             '--sample_batch', '4', '--out', str(tmp_path), *flags.split()]
    train.main([*flags, '--name', 'one'])
    grad_norms = [row['grad_norm'] for row in rows(tmp_path / 'one/log.jsonl')]
    assert max(grad_norms) > 1e-3, 'or 1e-5 would say nothing'
    two_processes(run_until, None, [*flags, '--name', 'two'])
    assert_close(tmp_path / 'one', tmp_path / 'two')
    two_processes(run_until, 5, [*flags, '--name', 'stopped'])
    assert checkpoint(tmp_path / 'stopped')['stage'] == 'grpo'
    assert not (tmp_path / 'stopped/model').exists()
    train.main([*flags, '--name', 'stopped', '--resume'])
    assert_close(tmp_path / 'one', tmp_path / 'stopped')


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
    flags = [*SMALL, '--name', 'run', *flags.split()]
    whole = out / 'whole'
    if len(flags) > len(SMALL) + 2:
        train.main([*flags, '--out', str(tmp_path / 'whole')])
        whole = tmp_path / 'whole/run'
    flags += ['--out', str(tmp_path)]
    deaths, status = 0, None
    while status != 0:
        resume = ['--resume'] if (tmp_path / 'run').exists() else []
        _, status = os.waitpid(in_a_process(die_at, 1 + 6 * deaths, flags + resume), 0)
        assert status in (0, signal.SIGKILL)
        deaths += status != 0
    assert deaths >= 5
    assert content(tmp_path / 'run') == content(whole)


def stop(out, name, number, *flags):
    """The folder of a run that ends when the call `number` of save_checkpoint begins."""
    run_until(number, [*SMALL, '--out', str(out), '--name', name, *flags])
    return out / name


def test_what_is_finished_is_not_repeated(out, monkeypatch):
    folder = run(out, 'finished')
    found = results(folder)
    del found['grpo']['gsm8k']['16']
    (folder / 'results.json').write_text(json.dumps(found))
    labels, graded_answers = [], train.graded_answers

    def spied(*args):
        labels.append(args[-1])
        return graded_answers(*args)
    monkeypatch.setattr(train, 'graded_answers', spied)
    for name in ('masked_loss', 'policy_loss', 'rollout'):
        monkeypatch.setattr(train, name, None)
    run(out, 'finished', '--resume')
    assert len(labels) == 1 and content(folder) == content(out / 'whole')


def test_the_same_command_begins_another_run_and_resume_goes_on_with_the_newest(out, capsys):
    one = ['--stages', 'sft', '--eval_lengths', '8']
    for _ in range(2):
        run(out, 'name', *one)
    stop(out, 'name', 2, *one)
    kept = {name: content(out / name) for name in ('name', 'name-2')}
    assert len(log(out / 'name-3', 'sft')) == 2 and not (out / 'name-3/model').exists()
    capsys.readouterr()
    run(out, 'name', *one, '--resume', '--sft_learning_rate', '0')
    assert '--sft_learning_rate' in capsys.readouterr().out, 'what has changed is said'
    assert not (out / 'name-4').exists()
    assert (out / 'name-3/model').exists()
    assert kept == {name: content(out / name) for name in kept} and kept['name'] == kept['name-2']


@pytest.mark.parametrize('stage', ['sft', 'grpo'])
def test_a_learning_rate_given_with_resume_counts(out, stage):
    rate = dict(sft='--sft_learning_rate', grpo='--learning_rate')[stage]
    flags = ['--stages', stage, '--eval_lengths', '8']
    folder = stop(out, f'slower-{stage}', 3, *flags)
    before = checkpoint(folder)
    assert before['step'] == 2
    run(out, folder.name, *flags, '--resume', rate, '0')
    torch.testing.assert_close(checkpoint(folder)['weights'], before['weights'], atol=0, rtol=0)


def test_a_full_disk_is_one_line_and_loses_nothing(out):
    folder = stop(out, 'full', 5)
    kept = (folder / 'checkpoint.pt').read_bytes()
    model, _ = load('nano')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))         # bytes per file
    try:
        with pytest.raises(SystemExit) as end:
            train.run([*SMALL, '--out', str(out), '--name', 'full', '--resume'])
        with pytest.raises(OSError):
            train.save_model(folder / 'model', model, 'nano')
        add_lora(model, 128, 128, LORA_LAYERS)
        with pytest.raises(OSError):
            save_adapter(out / 'full-adapter', model, 'nano')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 'checkpoint.pt' in end.value.code and '\n' not in end.value.code
    assert (folder / 'checkpoint.pt').read_bytes() == kept and not (folder / 'model').exists()
    assert content(run(out, 'full', '--resume')) == content(out / 'whole')


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_is_data_of_this_model_or_one_line(out, tmp_path):
    folder = stop(out, 'spoilt', 5)
    good = checkpoint(folder)
    shapes = {**good['weights'], 'ln_f.weight': torch.ones(1)}               # would broadcast
    names = {'model.' + name: tensor for name, tensor in good['weights'].items()}
    for weights in (shapes, names, Bomb(str(tmp_path / 'exploded'))):
        torch.save(dict(good, weights=weights), folder / 'checkpoint.pt')
        with pytest.raises(ValueError):
            run(out, 'spoilt', '--resume')
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


def test_given_flags_come_before_presets(out):
    assert llada_args('--task', 'sudoku', '--num_iterations', '2').num_iterations == 2
    assert llada_args('--task', 'gsm8k,sudoku').num_iterations == 12, 'a preset is of one task'
    assert train.parse(['--model', str(out / 'whole/model')]).gen_length == 32, 'nano, trained'
    assert train.parse([]).device == 'cpu', 'also where there is a GPU'


def test_help_has_every_flag_in_its_group_and_its_default_once(capsys):
    with pytest.raises(SystemExit):
        train.parse(['--help'])
    text = capsys.readouterr().out
    names = []
    for heading, flags in train.FLAGS.items():
        _, found, text = text.partition(f'\n{heading}:\n')
        assert found
        names += [name for name, *_ in flags]
        group = '\n' + text.split('\n\n')[0]
        for (name, nano, llada, *_), part in zip(flags, group.split('\n  --')[1:], strict=True):
            assert re.match(rf'{name}\b', part)
            shown = ' '.join(part.split())
            if nano != llada:
                assert shown.count(f'[nano {nano}, LLaDA {llada}]') == shown.count('[') == 1
            elif nano:
                assert shown.count(f'[{nano}]') == shown.count('[') == 1
    assert len(set(names)) == len(names)


# One bad input per kind of mistake, and what the line must name; F is a folder of files.
BAD = [
    ('--stage grpo', '--stage'),                                 # no abbreviations
    ('--beta much', 'beta'),
    ('--norm batch', 'norm'),
    ('--task gsm9k', 'gsm9k'),
    ('--task math,math', 'math'),
    ('--gen_length 20', 'gen_length'),
    ('--eval_lengths 12', 'eval_lengths'),
    ('--eval_lengths half', 'eval_lengths'),
    ('--num_generations 1', 'num_generations'),
    ('--num_prompts 0', 'num_prompts'),
    ('--lora_rank 4 --lora_targets q_projection', 'lora_targets'),
    ('--max_prompt 500', 'max_prompt'),                          # more than the model takes
    ('--max_prompt 5', 'max_prompt'),                            # no prompt is shorter
    ('--device none', 'device'),
    ('--resume', 'resume'),
    ('--out F/good.jsonl', 'good.jsonl'),
    ('--instructions F/nowhere.txt', 'nowhere.txt'),
    ('--data F/nowhere.jsonl', 'nowhere.jsonl'),
    ('--data F/cut.jsonl', 'cut.jsonl'),
    ('--data F/good.jsonl,F/good.jsonl', '--data'),              # for one task
    ('--data F/good.jsonl --eval_data F/good.jsonl', 'data'),    # no training problem is left
    ('--eval_data F/column.jsonl', 'column.jsonl'),
    ('--sft_data F/good.jsonl', 'good.jsonl'),
    ('--device cpu --model nowhere/nothing', 'nowhere/nothing'),
    ('--device cpu --model F', 'config.json'),
    ('--adapter F/nowhere', 'nowhere'),
    ('--adapter F/foreign', 'foreign'),                          # of another model
    ('--name begun --resume', 'begun'),                          # its checkpoint is none
]


@pytest.fixture(scope='module')
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    lines(folder / 'good.jsonl', problem('How many?'))
    lines(folder / 'column.jsonl', dict(question='How many?'))
    (folder / 'cut.jsonl').write_text('{"question": "How')
    save_adapter(folder / 'foreign', add_lora(tiny(), 2, 2), '')
    return folder


@pytest.mark.parametrize('flags, named', BAD)
def test_a_bad_input_is_one_line_and_leaves_nothing(bad_files, tmp_path, monkeypatch, capsys,
                                                    flags, named):
    monkeypatch.chdir(tmp_path)                  # out/ would be here
    if 'begun' in flags:
        (tmp_path / 'out/begun').mkdir(parents=True)
        (tmp_path / 'out/begun/checkpoint.pt').write_bytes(b'text')
    before = sorted([*tmp_path.rglob('*'), *bad_files.rglob('*')])
    with pytest.raises(SystemExit) as end:
        train.run([*SMALL, *re.sub('(^|[ ,])F', rf'\1{bad_files}', flags).split()])
    said = capsys.readouterr().err.splitlines()[-1:] if end.value.code == 2 else [end.value.code]
    assert end.value.code and '\n' not in said[0] and named in said[0], said
    if 'begun' not in flags:
        assert sorted([*tmp_path.rglob('*'), *bad_files.rglob('*')]) == before


# ---- --compile ----

def test_compiled_blocks_give_the_same_numbers_and_nothing_runs_eagerly(out, monkeypatch):
    original = torch.nn.Module.compile

    def cheap(block, **keys):                    # no C compiler is needed
        original(block, backend='eager', **keys)
    monkeypatch.setattr(torch.nn.Module, 'compile', cheap)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(out, 'compiled', '--compile')
    frames = torch._dynamo.utils.counters['frames']
    assert 8 < frames['total'] == frames['ok'], "8 is torch's limit"
    assert results(compiled) == results(out / 'whole')
    assert_logs_close(compiled, out / 'whole')


# ---- python sample.py ----

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
    example = rewards.load_examples('gsm8k', 'nano', 'test')[0]
    text = shown()
    assert text.startswith('nano: ') and example['question'] in text
    base = published(tmp_path / 'base', 'llada')
    _, tokenizer = load(base)
    prompt = tokenizer.decode(chat(tokenizer, 'How many?'))
    assert shown('--model', base, '--prompt', 'How many?').startswith(f'{base}: {prompt}\n')
    assert lengths == [(32, 8, 16), (256, 32, 128)]
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--model', 'nowhere/nothing'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    assert 'nowhere/nothing' in end.value.code and '\n' not in end.value.code
