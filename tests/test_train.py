"""The recipe end to end, in miniature: what it leaves, how it goes on, that it is the paper's."""
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import grpo
import rewards
import train
from model import add_lora, nano_tokenizer
from tiny import SHARED, needs_shared, tiny

ROOT = os.path.join(os.path.dirname(__file__), '..')
SMALL = ('--base_seed 0 --base_steps 2 --sft_steps 3 --sft_batch 4 --grpo_steps 3 --num_prompts 2 '
         '--num_generations 2 --num_iterations 2 --gen_length 16 --block_length 8 --steps 8 '
         '--eval_n 3 --eval_lengths 8,16 --save_every 1 --beta 0.04').split()


def rows(path):
    """The rows of a log without their timings."""
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if 'seconds' not in k} for row in lines]


def results(folder):
    return json.loads((folder / 'results.json').read_text())


def weights(path):
    return torch.load(path, weights_only=True)['weights']


def saved_model(folder):
    tensors = load_file(folder / 'model' / 'model.safetensors')
    return {name.removeprefix('model.transformer.'): tensor for name, tensor in tensors.items()}


def run(out, name, *flags):
    train.main([*SMALL, '--out', str(out), '--name', name, *flags])
    return out / name


def varied_grade(text, example):
    """A reward that even an untrained model's completions earn in different amounts."""
    return len(set(text)) / 10, len(text) % 2 == 0


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """The folder of all runs, with the base and 'whole', an uninterrupted run."""
    folder = tmp_path_factory.mktemp('out')
    run(folder, 'whole')
    return folder


@pytest.fixture(scope='module', autouse=True)
def varied_reward():
    with pytest.MonkeyPatch.context() as patch:
        task = rewards.TASKS['gsm8k']._replace(grade=varied_grade)
        patch.setitem(rewards.TASKS, 'gsm8k', task)
        yield


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(ours, theirs):
    for name in ('log.jsonl', 'samples.jsonl'):
        assert rows(ours / name) == rows(theirs / name)
    assert results(ours) == results(theirs)
    for name in ('sft.pt', 'grpo.pt'):
        assert equal(weights(ours / name), weights(theirs / name))


# ---- what a run leaves ----

def test_the_recipe_leaves_all_its_files(out):
    log = rows(out / 'whole' / 'log.jsonl')
    stages = ['sft'] * 3 + ['grpo'] * 3
    assert [(row['stage'], row['step']) for row in log] == list(zip(stages, [0, 1, 2] * 2))
    assert all(row['first_ratio'] == 1 and row['bad_updates'] == 0 for row in log[3:])
    samples = rows(out / 'whole' / 'samples.jsonl')
    assert [row['step'] for row in samples] == [0, 1, 2]
    assert len({row['question'] for row in samples}) == 3, 'new problems in each iteration'
    assert list(results(out / 'whole')) == ['constant', 'base', 'sft', 'grpo']
    assert results(out / 'whole')['grpo']['gsm8k']['16']['n'] == 3
    assert equal(saved_model(out / 'whole'), weights(out / 'whole' / 'grpo.pt'))
    with pytest.raises(ValueError, match='--resume goes on with it'):
        run(out, 'whole')


def test_the_seed_makes_the_run_and_one_base_serves_all_seeds(out, monkeypatch):
    monkeypatch.setattr(train, 'Corpus', None)                   # no other base is made
    assert_same_run(run(out, 'again', '--gradient_checkpointing'), out / 'whole')
    other = run(out, 'other', '--seed', '1')
    for a, b in zip(rows(other / 'log.jsonl'), rows(out / 'whole' / 'log.jsonl'), strict=True):
        assert a['loss'] != b['loss']
    for a, b in zip(rows(other / 'samples.jsonl'), rows(out / 'whole' / 'samples.jsonl')):
        assert a['question'] != b['question']


def test_a_base_serves_every_task(out, monkeypatch):
    monkeypatch.setattr(train, 'Corpus', None)                   # no other base is made
    folder = run(out, 'math', '--task', 'math', '--eval_only')
    assert results(folder)['base'].keys() == {'math'}


def test_fixed_mask_changes_the_losses_and_not_the_rollouts(out):
    first = rows(out / 'whole' / 'log.jsonl')[3]
    fixed = rows(run(out, 'fixed', '--fixed_mask') / 'log.jsonl')[3]
    assert fixed['reward'] == first['reward'] and fixed['loss'] != first['loss']


@pytest.mark.parametrize('stage', ['sft', 'grpo'])
def test_one_stage_can_be_trained_alone(out, stage):
    alone = run(out, f'only-{stage}', '--stages', stage)
    assert list(results(alone)) == ['constant', 'base', stage]
    both = [row for row in rows(out / 'whole' / 'log.jsonl') if row['stage'] == stage]
    same = rows(alone / 'log.jsonl') == both
    assert same == (stage == 'sft'), 'in the whole run diffu-GRPO goes on from SFT'


def test_a_saved_model_is_evaluated_to_the_numbers_of_its_training_run(out):
    again = run(out, 'evaluated', '--model', str(out / 'whole' / 'model'), '--eval_only')
    assert results(again)['base'] == results(out / 'whole')['grpo']
    assert not (again / 'log.jsonl').exists() and not (again / 'model').exists()


@pytest.mark.parametrize('stage, loss', [('sft', 'masked_loss'), ('grpo', 'policy_loss')])
def test_an_update_that_is_not_finite_is_skipped_and_counted(out, monkeypatch, stage, loss):
    calls, original = [], getattr(train, loss)

    def spoilt(logps, *rest):
        calls.append(1)
        return original(logps * float('nan') if len(calls) == 2 else logps, *rest)
    monkeypatch.setattr(train, loss, spoilt)
    folder = run(out, f'skipped-{stage}', '--stages', stage)
    log = rows(folder / 'log.jsonl')
    is_bad = [row['grad_norm'] != row['grad_norm'] for row in log]           # nan
    assert is_bad == [stage == 'grpo', stage == 'sft', False]
    if stage == 'grpo':
        assert [row['bad_updates'] for row in log] == [1, 0, 0]
    trained = weights(folder / f'{stage}.pt')
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert not equal(trained, saved_model(out / 'base-0')), 'the other updates were made'


def test_lora_trains_adapters_only_and_the_saved_model_has_them_merged(out):
    folder = run(out, 'lora', '--lora_rank', '4', '--lora_targets', 'q_proj,up_proj',
                 '--sft_lora_targets', 'q_proj,up_proj')
    for stage in ('sft', 'grpo'):
        layers = {name.rpartition('.')[0] for name in weights(folder / f'{stage}.pt')}
        assert layers == {f'blocks.{i}.{name}' for i in range(3) for name in ('q_proj', 'up_proj')}
        assert all('.lora_' in name for name in weights(folder / f'{stage}.pt'))
    base, merged = saved_model(out / 'base-0'), saved_model(folder)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {f'{layer}.weight' for layer in layers}


def test_compiled_blocks_give_the_same_numbers(out, monkeypatch, capsys):
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile',              # no C compiler is needed
                        lambda block, **keys: original(block, backend='eager', **keys))
    compiled = run(out, 'compiled', '--compile', '--stages', 'grpo', '--grpo_steps', '1')
    assert re.search('[1-9][0-9]* graphs were compiled for 3 blocks', capsys.readouterr().out)
    ours, theirs = (rows(folder / 'log.jsonl')[-1] for folder in (
        compiled, run(out, 'not-compiled', '--stages', 'grpo', '--grpo_steps', '1')))
    assert ours['reward'] == theirs['reward']
    assert ours['grad_norm'] == pytest.approx(theirs['grad_norm'], rel=1e-4)


def test_bfloat16_trains_float32_weights_and_saves_bfloat16_ones(out):
    folder = run(out, 'half', '--dtype', 'bfloat16', '--stages', 'grpo', '--num_iterations', '1',
                 '--grpo_steps', '1')
    trained = weights(folder / 'grpo.pt')
    halved = {name: tensor.bfloat16() for name, tensor in trained.items()}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert any(not torch.equal(trained[name], halved[name].float()) for name in trained)
    assert equal(saved_model(folder), halved)
    [row] = rows(folder / 'log.jsonl')
    assert row['first_ratio'] == 1 and row['kl'] == 0, 'the reference computes as the policy does'


# ---- a run that ends on the way, and goes on ----

class Stopped(Exception):
    pass


def stop(out, name, function, number, *flags):
    """A run that ends when call `number` of a function of train.py begins."""
    calls, original = [], getattr(train, function)

    def stopping(*args):
        calls.append(1)
        if len(calls) == number:
            raise Stopped
        return original(*args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, function, stopping)
        run(out, name, *flags)
    return out / name


@pytest.mark.parametrize('flags', ['', '--lora_rank 2 --save_every 2 --eval_every 1'])
@pytest.mark.parametrize('function, stride', [('write', 5), ('append', 2)])
def test_a_run_stopped_again_and_again_gives_the_same_numbers(out, tmp_path, flags, function,
                                                              stride):
    """Start number i ends `stride` calls later than the one before, until one ends by itself."""
    whole = run(out, f'whole-{function}', *flags.split()) if flags else out / 'whole'
    resume, stops = [], 0
    while not (tmp_path / 'run' / 'model').exists():
        try:
            stop(tmp_path, 'run', function, 1 + stride * stops, *flags.split(), *resume)
            stops += 1
        except pytest.fail.Exception:                            # nothing stopped it
            pass
        if (tmp_path / 'run' / 'config.json').exists():
            resume = ['--resume']
    assert stops >= 3
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kill.py forks')
def test_killed_runs_resume_to_the_same_numbers():
    """tests/kill.py 20 is the long version."""
    done = subprocess.run([sys.executable, 'tests/kill.py', '1'], cwd=ROOT, capture_output=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True)
    assert done.returncode == 0, done.stderr
    assert 'every file of every run equals' in done.stdout


def test_what_is_finished_is_not_repeated(out, monkeypatch):
    stop(out, 'stopped', 'answers', 4)                           # after sft, at the second length
    answers, labels = train.answers, []

    def spied(*args):
        labels.append(args[-1])
        return answers(*args)
    monkeypatch.setattr(train, 'answers', spied)
    monkeypatch.setattr(train, 'train_sft', None)
    run(out, 'stopped', '--resume')
    assert labels == ['sft: gsm8k, 16 tokens', 'grpo: gsm8k, 8 tokens', 'grpo: gsm8k, 16 tokens']
    assert_same_run(out / 'stopped', out / 'whole')


def test_checkpoints_are_at_least_save_minutes_apart(out, monkeypatch):
    saved = []

    def spied(args, name, content):
        saved.append((name, content['step'])) if name == 'checkpoint.pt' else None
        return write(args, name, content)
    write = train.write
    monkeypatch.setattr(train, 'write', spied)
    run(out, 'seldom', '--save_minutes', '5')
    assert [step for _, step in saved] == [1, 3, 3], 'the first, and each stage when it is finished'


def test_an_adapter_of_the_base_in_assets_names_it_as_the_flag_does(tmp_path):
    args = train.parse(['--lora_rank', '4'])
    args.folder = str(tmp_path)
    train.keep_adapter(args, add_lora(tiny(), 4, 4), 'adapter')
    config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == 'nano'


def test_reading_a_log_that_is_not_there_makes_none(tmp_path):
    args = train.parse([])
    args.folder = str(tmp_path)
    assert train.read_log(args, 'log.jsonl') == [] and not list(tmp_path.iterdir())


def test_evaluations_on_the_way_keep_the_adapter_of_each(out):
    folder = run(out, 'watched', '--eval_every', '2', '--lora_rank', '4', '--learning_rate', '3e-2')
    assert list(results(folder)) == ['constant', 'base', 'sft', 'grpo-2', 'grpo']
    config = json.loads((folder / 'adapter-2' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == str(out / 'base-0' / 'model')
    scored = run(out, 'step-2', '--eval_only', '--adapter', str(folder / 'adapter-2'))
    assert results(scored)['base'] == results(folder)['grpo-2']
    assert results(folder)['grpo-2'] != results(folder)['sft']


def test_a_learning_rate_given_with_resume_counts(out):
    folder = stop(out, 'slower', 'save_checkpoint', 5)           # diffu-GRPO's second
    before = weights(folder / 'checkpoint.pt')
    run(out, 'slower', '--resume', '--learning_rate', '0')
    assert equal(weights(folder / 'grpo.pt'), before)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(out):
    folder = stop(out, 'full', 'save_checkpoint', 5)
    kept = (folder / 'checkpoint.pt').read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))         # bytes per file
    try:
        with pytest.raises(SystemExit, match='checkpoint.pt.new cannot be written.*--resume'):
            train.run([*SMALL, '--out', str(out), '--name', 'full', '--resume'])
        with pytest.raises(OSError, match='model.new cannot be written'):
            train.save_model(str(folder / 'model'), *train.load('nano'), 'nano')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (folder / 'checkpoint.pt').read_bytes() == kept and not (folder / 'model').exists()
    assert_same_run(run(out, 'full', '--resume'), out / 'whole')


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_is_data_of_this_model_or_one_line(out, tmp_path):
    folder = stop(out, 'spoilt', 'save_checkpoint', 5)
    good = torch.load(folder / 'checkpoint.pt', weights_only=True)
    shapes = {**good['weights'], 'ln_f.weight': torch.ones(1)}               # would broadcast
    names = {'model.' + name: tensor for name, tensor in good['weights'].items()}
    bomb = Bomb(str(tmp_path / 'exploded'))
    for spoilt, says in ((shapes, 'another model'), (names, 'another model'),
                         (bomb, 'checkpoint.pt is no checkpoint')):
        torch.save(dict(good, weights=spoilt), folder / 'checkpoint.pt')
        with pytest.raises(ValueError, match=says):
            run(out, 'spoilt', '--resume')
    assert not (tmp_path / 'exploded').exists()


# ---- sampling and evaluation ----

def test_the_sampling_knobs_reach_rollouts_and_evaluation(out, monkeypatch):
    asked, generate = [], grpo.generate

    def spied(*tensors, attention_mask, generators, order, **knobs):
        if knobs not in asked:
            asked.append(knobs)
        return generate(*tensors, attention_mask=attention_mask, generators=generators,
                        order=order, **knobs)
    monkeypatch.setattr(grpo, 'generate', spied)
    run(out, 'knobs', '--stages', 'grpo', '--grpo_steps', '1', '--cache', '--threshold', '0.5',
        '--cfg_scale', '1', '--remasking', 'random', '--temperature', '0.7', '--eval_lengths', '8')
    shared = dict(block_length=8, cache=True, threshold=0.5, cfg_scale=1.0)
    rollouts = dict(shared, gen_length=16, steps=8, temperature=0.7, remasking='random')
    assert asked == [dict(shared, gen_length=8, steps=4), rollouts]


def test_every_answer_stands_with_its_own_problem(files, monkeypatch):
    """A model that repeats its prompt: prompts go in by length, answers come out in order."""
    args = nano_args('--eval_data', files['mixed'], '--max_prompt', '200', '--eval_batch', '2')
    tokenizer = nano_tokenizer()
    [problems] = train.test_sets(args, tokenizer).values()
    sizes = []

    def repeat(model, tokenizer, prompts, sampling, prefill):
        sizes.append([len(prompt) for prompt in prompts])
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        return None, torch.ones(len(prompts), 5), None, texts
    monkeypatch.setattr(train, 'complete', repeat)
    items = train.answers(args, None, tokenizer, problems, 8, 'label')
    lengths = [len(prompt) for _, prompt, _ in problems]
    assert sum(sizes, []) == sorted(lengths) != lengths and max(map(len, sizes)) == 2
    for (_, prompt, example), item in zip(problems, items, strict=True):
        text = tokenizer.decode(prompt)
        reward, correct = varied_grade(text, example)
        assert item == dict(question=example['question'], generations=text, reward=reward,
                            correct=correct, ground_truth=example['answer'], effective_tokens=5)


def test_code_is_evaluated_on_human_eval_and_mbpp_apart(monkeypatch):
    human = dict(prompt='def f(x):\n', entry_point='f', test='def check(f):\n    assert f(1) == 1')
    mbpp = dict(text='Double it.', test_list=['assert f(1) == 2'], test_setup_code='')
    hub = {'openai/openai_humaneval': [human], 'google-research-datasets/mbpp': [mbpp, mbpp]}

    def read_rows(source, config, split):
        return hub[source] if split == 'test' else None
    monkeypatch.setattr(rewards, 'read_rows', read_rows)
    args, tokenizer = llada_args('--task', 'code', '--eval_lengths', '32'), nano_tokenizer()
    sets = train.test_sets(args, tokenizer)
    assert {name: len(sets[name]) for name in sets} == {'code-openai_humaneval': 1, 'code-mbpp': 2}
    constant = train.constant_scores(args, tokenizer, sets)
    accuracy = [constant[name]['32']['accuracy'] for name in sets]
    assert accuracy == [1.0, 0.0], 'the constant answer returns x, which is right once'
    assert all(f'{name}: accuracy' in train.table(args, dict(constant=constant)) for name in sets)


# ---- settings ----

def nano_args(*flags):
    return train.parse(['--gen_length', '16', '--steps', '8', *flags])


def llada_args(*flags):
    return train.parse(['--model', 'x/y', *flags])


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
    assert (args.learning_rate, args.max_grad_norm, args.sft_learning_rate) == (3e-6, 0.2, 1e-5)
    assert (args.gen_length, args.steps, args.block_length) == (256, 128, 32)
    assert (args.remasking, args.eval_lengths) == ('low_confidence', [128, 256, 512])


def test_given_flags_come_before_presets():
    assert llada_args('--task', 'sudoku', '--num_iterations', '2').num_iterations == 2
    assert llada_args('--task', 'gsm8k,sudoku').num_iterations == 12, 'a preset is of one task'
    files = ['--data', 'a', '--eval_data', 'b']
    assert train.parse(files).gen_length == 48, 'real text is longer'
    assert train.parse([*files, '--gen_length', '16']).gen_length == 16
    assert train.parse([]).device == 'cpu', 'also where there is a GPU'
    assert train.parse([]).folder == os.path.join('out', 'nano-gsm8k-sft+grpo-seed0')


# ---- problems ----

@needs_shared
def test_sudoku_is_evaluated_on_the_256_puzzles_that_d1_drew():
    file = str(SHARED / 'data/sudoku_test.csv')
    args = llada_args('--task', 'sudoku', '--eval_data', file)
    [problems] = train.test_sets(args, nano_tokenizer()).values()
    theirs = []
    for part in (SHARED / 'data/llada_generations').glob('sudoku*'):
        theirs += [item['question'] for item in json.loads(part.read_text())['generations']]
    ours = [example['question'] for _, _, example in problems]

    def grids(questions):
        return sorted(re.search('[0-4]{16}', question)[0] for question in questions)
    assert grids(ours) == grids(theirs)


@pytest.fixture
def files(tmp_path):
    """A Sudoku, eight word problems, and six of which four are long."""
    def problem(question):
        return dict(question=question, answer='#### 2')
    contents = dict(
        puzzle=[dict(Puzzle='4320004330100004', Solution='4321124334122134')],
        numbers=[problem(str(i)) for i in range(8)],
        mixed=[problem('1+1?' + 'x' * 99 * (i % 3 > 0)) for i in range(6)])
    for name, rows in contents.items():
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return {name: str(tmp_path / f'{name}.jsonl') for name in contents}


def test_tasks_take_turns_and_each_may_have_its_own_file(files):
    for data in (files['numbers'] + ',' + files['puzzle'], ',' + files['puzzle']):
        args = nano_args('--task', 'gsm8k,sudoku', '--data', data, '--eval_data',
                         files['numbers'] + ',' + files['puzzle'])
        tests = train.test_sets(args, nano_tokenizer())
        assert [len(tests[task]) for task in ('gsm8k', 'sudoku')] == [8, 1]
        problems = train.Problems(args, nano_tokenizer())
        drawn = [problems.draw(i) for i in range(16)]
        assert [task for task, _, _ in drawn] == ['gsm8k', 'sudoku'] * 8
        assert {example['answer'] for _, _, example in drawn[1::2]} == {'4321124334122134'}
        questions = {example['question'] for _, _, example in drawn[::2]}
        assert len(questions) == 8, 'another each time, of the file or built in'
        assert (questions == set('01234567')) == (not data.startswith(','))


def test_each_epoch_of_a_file_has_an_order_of_its_own(files):
    orders = []
    for seed in ('0', '1'):
        args = nano_args('--data', files['numbers'], '--eval_data', files['mixed'], '--seed', seed)
        problems = train.Problems(args, nano_tokenizer())
        order = [problems.draw(i)[2]['question'] for i in range(16)]
        assert sorted(order[:8]) == sorted(order[8:]) == list('01234567')
        orders += [order[:8], order[8:]]
    assert all(orders.count(order) == 1 for order in orders)


def test_too_long_prompts_are_replaced_in_training_and_left_out_of_tests(files, capsys):
    args = nano_args('--data', files['mixed'], '--eval_data', files['mixed'], '--max_prompt', '64')
    problems = train.Problems(args, nano_tokenizer())
    drawn = [problems.draw(i) for i in range(20)]
    assert {example['question'] for _, _, example in drawn} == {'1+1?'}
    assert drawn == [train.Problems(args, nano_tokenizer()).draw(i) for i in range(20)]
    [tests] = train.test_sets(args, nano_tokenizer()).values()
    assert [example['question'] for _, _, example in tests] == ['1+1?'] * 2
    assert '4 of 6 test prompts' in capsys.readouterr().out
    args.max_prompt = 1
    with pytest.raises(ValueError, match='--max_prompt 1: raise it'):
        problems.draw(0)


# ---- another beginning: instructions, prefill ----

def test_prefill_is_prompt_that_is_never_masked_and_text_that_is_rewarded(out, monkeypatch):
    seen, groups = [], []
    grade_all, fixed_logps = rewards.grade_all, train.fixed_logps

    def graded(task, texts, examples):
        seen.extend(texts)
        return grade_all(task, texts, examples)

    def kept(model, reference, group, *rest):
        groups.append(group)
        return fixed_logps(model, reference, group, *rest)
    monkeypatch.setattr(rewards, 'grade_all', graded)
    monkeypatch.setattr(train, 'fixed_logps', kept)
    folder = run(out, 'prefilled', '--stages', 'grpo', '--prefill', '<reasoning>',
                 '--p_mask_prompt', '0.9')
    prefill = nano_tokenizer()('<reasoning>')['input_ids']
    texts = [text for text in seen if not text.startswith('<answer>\n12')]      # a constant answer
    assert texts and all(text.startswith('<reasoning>') for text in texts)
    for group in groups:
        assert group.prompt_ids[0, -len(prefill):].tolist() == prefill
        for mask in group.prompt_masks:
            assert not mask[:, -len(prefill):].any() and mask.any()
    assert rows(folder / 'samples.jsonl')[0]['completion'].startswith('<reasoning>')


def test_instructions_of_a_file_replace_those_of_every_task(tmp_path):
    (tmp_path / 'i.txt').write_text('Answer in tags.\n')
    args = llada_args('--instructions', str(tmp_path / 'i.txt'))
    tokenizer = nano_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    ids = train.encode(args, tokenizer, 'gsm8k', dict(question='1+1?'))
    assert tokenizer.decode(ids) == 'Answer in tags.\n\n1+1?'
