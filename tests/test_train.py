"""The recipe end to end, in miniature: it runs, resumes to the same numbers, and says what is wrong in one line."""
import argparse
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import grpo
import rewards
import sft
import train
from model import nano_tokenizer
from tiny import SHARED, needs_shared

ROOT = os.path.join(os.path.dirname(__file__), '..')
SMALL = ('--base_steps 3 --base_batch 4 --sft_steps 3 --sft_batch 4 --sft_problems 4 --grpo_steps 3 --num_prompts 2 '
         '--num_generations 2 --num_iterations 2 --gen_length 16 --block_length 8 --steps 8 --sft_length 32 --eval_n 3 '
         '--eval_lengths 8,16 --save_every 1').split()


def rows(path):
    """The rows of a log without their timings."""
    with open(path) as f:
        return [{k: v for k, v in json.loads(line).items() if 'seconds' not in k} for line in f]


def weights(path):
    return torch.load(path, weights_only=True)['weights']


def run(out, *flags):
    train.main([*SMALL, '--out', str(out), *flags])


@pytest.fixture(scope='module', autouse=True)
def varied_reward():
    """A reward that even an untrained model's completions earn in different amounts."""
    task = rewards.TASKS['gsm8k']
    rewards.TASKS['gsm8k'] = task._replace(reward=lambda text, example: len(set(text)) / 10)
    yield
    rewards.TASKS['gsm8k'] = task


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run, from the base to the table."""
    out = tmp_path_factory.mktemp('out')
    run(out, '--name', 'whole')
    return out


def test_the_recipe_leaves_all_its_files(whole):
    files = os.listdir(whole / 'whole')
    for name in ('config.json', 'log.jsonl', 'samples.jsonl', 'results.json', 'model', 'sft.pt', 'grpo.pt'):
        assert name in files
    results = json.load(open(whole / 'whole' / 'results.json'))
    assert set(results) == {'constant', 'base', 'sft', 'grpo'}
    assert results['grpo']['gsm8k']['16']['n'] == 3
    assert [row['stage'] for row in rows(whole / 'whole' / 'log.jsonl')] == ['sft'] * 3 + ['grpo'] * 3


def test_same_seed_gives_the_same_log(whole):
    run(whole, '--name', 'again')
    assert rows(whole / 'again' / 'log.jsonl') == rows(whole / 'whole' / 'log.jsonl')
    run(whole, '--name', 'other', '--seed', '1')
    assert rows(whole / 'other' / 'log.jsonl') != rows(whole / 'whole' / 'log.jsonl')


def test_first_ratio_is_one_and_masks_differ_between_updates(whole):
    log = [row for row in rows(whole / 'whole' / 'log.jsonl') if row['stage'] == 'grpo']
    assert all(row['first_ratio'] == 1 for row in log)
    run(whole, '--name', 'fixed', '--fixed_mask')
    fixed = [row for row in rows(whole / 'fixed' / 'log.jsonl') if row['stage'] == 'grpo']
    assert fixed[0]['reward'] == log[0]['reward'] and fixed[0]['loss'] != log[0]['loss']


def interrupt(monkeypatch, stage, step):
    """Ctrl-C during a step."""
    end_step = train.Run.end_step
    def struck(self, args, at_stage, at_step, *rest):
        if (at_stage, at_step) == (stage, step):
            signal.raise_signal(signal.SIGINT)
        end_step(self, args, at_stage, at_step, *rest)
    monkeypatch.setattr(train.Run, 'end_step', struck)


def ends(capsys, status, out, *flags):
    """The one line on stderr, progress bars aside, that a run ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.run([*SMALL, '--out', str(out), *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line and '%|' not in line and 'it/s]' not in line]
    assert end.value.code == status and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize('stage, step', [('base', 1), ('sft', 1), ('grpo', 0), ('grpo', 2)])
def test_ctrl_c_saves_and_the_resumed_run_gives_the_same_numbers(whole, tmp_path, monkeypatch, capsys, stage, step):
    out, name = tmp_path if stage == 'base' else whole, f'stopped-{stage}-{step}'
    interrupt(monkeypatch, stage, step)
    line = ends(capsys, 130, out, '--name', name, '--save_every', '9')
    assert line == 'stopped; the same command with --resume goes on'
    monkeypatch.undo()
    run(out, '--name', name, '--resume')
    for log in ('log.jsonl', 'samples.jsonl'):
        assert rows(out / name / log) == rows(whole / 'whole' / log)
    ours, theirs = weights(out / name / 'grpo.pt'), weights(whole / 'whole' / 'grpo.pt')
    assert theirs and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_second_ctrl_c_ends_at_once():
    run = train.Run(argparse.Namespace(out='out', name='name'))
    try:
        run.interrupt()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert run.stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(sys.platform != 'linux', reason='kill.py reads /proc')
def test_killed_runs_resume_to_the_same_numbers():
    """SIGKILL in each stage and in the middle of a write; tests/kill.py 20 is the long version."""
    done = subprocess.run([sys.executable, 'tests/kill.py', '1'], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'every file of every run equals' in done.stdout


def test_a_base_is_made_again_for_other_settings_but_not_for_another_seed(tmp_path):
    base = lambda *flags: train.nano_base(train.check(train.parse(
        ['--base_steps', '1', '--base_batch', '1', '--gen_length', '8', '--steps', '4', '--out', str(tmp_path), *flags])))
    first = base()
    assert base('--seed', '1', '--grpo_steps', '3') == first
    others = [base('--thinkers', '0.43'), base('--textbook', '0.6'), base('--base_learning_rate', '0.001')]
    assert len({first, *others}) == 4


@pytest.fixture
def stopped(whole, tmp_path, monkeypatch, capsys):
    """The folder of a run that Ctrl-C ended in the first step of diffu-GRPO."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, ignore=lambda top, names: [] if 'base-' in top else
                    [name for name in names if top == str(whole) and not name.startswith('base-')])
    interrupt(monkeypatch, 'grpo', 0)
    ends(capsys, 130, tmp_path, '--name', 'run')
    monkeypatch.undo()
    return tmp_path / 'run'


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(stopped, whole, capsys):
    kept = (stopped / 'checkpoint.pt').read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # bytes a file; a checkpoint has ten times as many
    try:
        line = ends(capsys, 2, stopped.parent, '--name', 'run', '--resume')
        with pytest.raises(OSError, match='model.new cannot be written'):  # safetensors has errors of its own
            train.save_model(str(stopped / 'model'), *train.load('nano'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'checkpoint.pt.new' in line and line.endswith('mend that; a run that has begun goes on with --resume')
    assert (stopped / 'checkpoint.pt').read_bytes() == kept and not (stopped / 'model').exists()
    run(stopped.parent, '--name', 'run', '--resume')
    assert rows(stopped / 'log.jsonl') == rows(whole / 'whole' / 'log.jsonl')


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize('file', ['checkpoint.pt', 'sft.pt'])
def test_a_checkpoint_is_data_of_this_model_or_one_line(stopped, capsys, file):
    good = torch.load(stopped / file, weights_only=True)
    shapes = {**good, 'weights': {name: tensor[:1] for name, tensor in good['weights'].items()}}
    names = {**good, 'weights': {f'model.{name}': tensor for name, tensor in good['weights'].items()}}
    for content in (dict(good, weights=Bomb(str(stopped / 'exploded'))), [1], {}, shapes, names):
        torch.save(content, stopped / file)
        line = ends(capsys, 2, stopped.parent, '--name', 'run', '--resume')
        assert f'{file} is no checkpoint' in line and not (stopped / 'exploded').exists()
    for data in (b'', b'nonsense', pickle.dumps(Bomb(str(stopped / 'exploded'))), (stopped / file).read_bytes()[:1000]):
        (stopped / file).write_bytes(data)
        line = ends(capsys, 2, stopped.parent, '--name', 'run', '--resume')
        assert f'{file} is no checkpoint' in line and not (stopped / 'exploded').exists()


def test_a_learning_rate_given_with_resume_counts(stopped, whole):
    before = weights(stopped / 'checkpoint.pt')
    run(stopped.parent, '--name', 'run', '--resume', '--learning_rate', '1e-12')
    after, whole = weights(stopped / 'grpo.pt'), weights(whole / 'whole' / 'grpo.pt')
    moved = lambda weights: max((weights[name] - before[name]).abs().max() for name in before)
    assert moved(after) < 1e-3 * moved(whole)


def test_lora_trains_adapters_only_and_the_saved_model_has_them_merged(whole):
    run(whole, '--name', 'lora', '--lora_rank', '4', '--lora_alpha', '8')
    assert all('.lora_' in key for key in weights(whole / 'lora' / 'grpo.pt'))
    merged = train.LLaDA.from_pretrained(str(whole / 'lora' / 'model')).state_dict()
    base = train.LLaDA.from_pretrained(str(next(whole.glob('base-*')) / 'model')).state_dict()
    adapted = [f'blocks.{i}.{name}.weight' for i in range(3) for name in ('q_proj', 'k_proj', 'v_proj', 'up_proj')]
    assert merged.keys() == base.keys()
    assert [name for name in base if not torch.equal(merged[name], base[name])] == [n for n in base if n in adapted]


@pytest.mark.parametrize('flags, knobs', [('', (False, 0, 0.0)), ('--cache --refresh 3 --threshold 0.5', (True, 3, 0.5))])
def test_faster_sampling_reaches_rollouts_and_evaluation(whole, tmp_path, monkeypatch, flags, knobs):
    asked, generate = set(), grpo.generate
    def spied(*tensors, **keys):
        asked.add(('temperature' in keys, keys['cache'], keys['refresh'], keys['threshold']))  # rollouts have a temperature
        return generate(*tensors, **keys)
    monkeypatch.setattr(grpo, 'generate', spied)
    run(whole, '--name', tmp_path.name, '--stages', 'grpo', '--grpo_steps', '1', *flags.split())
    assert asked == {(True, *knobs), (False, *knobs)}


def test_bfloat16_trains_float32_weights_and_saves_bfloat16_ones(whole):
    run(whole, '--name', 'half', '--dtype', 'bfloat16', '--stages', 'grpo', '--grpo_steps', '1', '--num_iterations', '1')
    masters = weights(whole / 'half' / 'grpo.pt')
    assert {p.dtype for p in masters.values()} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in masters.values())
    [row] = rows(whole / 'half' / 'log.jsonl')
    assert row['first_ratio'] == 1 and row['kl'] == 0, 'the frozen reference computes as the policy does'
    saved = load_file(whole / 'half' / 'model' / 'model.safetensors')
    for name, tensor in masters.items():
        assert torch.equal(saved['model.transformer.' + name], tensor.bfloat16())


# --- the settings and test sets of LLaDA ---

@pytest.mark.parametrize('task, steps, mu, updates, temperature, eval_n', [
    ('gsm8k', 640, 12, 7680, 0.9, 0), ('math', 550, 12, 6600, 0.9, 0), ('countdown', 625, 8, 5000, 0.9, 0),
    ('sudoku', 475, 8, 3800, 0.3, 256)])
def test_llada_has_the_papers_settings(task, steps, mu, updates, temperature, eval_n):
    args = train.check(train.parse(['--task', task, '--model', 'GSAI-ML/LLaDA-8B-Instruct']))
    assert (args.grpo_steps, args.num_iterations, args.temperature, args.eval_n) == (steps, mu, temperature, eval_n)
    assert steps * mu == updates, 'gradient steps of the paper: 7700, 6600, 5000, 3800'
    assert args.num_prompts * args.num_generations == 6 * 2 * 8, 'completions an update: 6 a GPU, accumulated twice, 8 GPUs'
    assert args.sft_steps * args.sft_batch == 20 * 1000, '20 epochs of s1K'
    assert (args.lora_rank, args.lora_alpha, args.beta, args.epsilon, args.p_mask_prompt) == (128, 64, 0.04, 0.5, 0.15)
    assert (args.learning_rate, args.max_grad_norm, args.sft_learning_rate) == (3e-6, 0.2, 1e-5)
    assert (args.gen_length, args.steps, args.block_length, args.remasking) == (256, 128, 32, 'low_confidence')
    assert args.eval_lengths == [128, 256, 512] and args.max_prompt + args.sft_length == 4096
    assert train.parse(['--task', task, '--model', 'x/y', '--num_iterations', '2']).num_iterations == 2


def llada_args(*flags):
    return train.check(train.parse(['--model', 'x/y', *flags]))


@needs_shared
def test_sudoku_is_evaluated_on_the_256_puzzles_that_d1_drew():
    file = str(SHARED / 'data/sudoku_test.csv')
    [(name, pairs)] = train.test_sets(llada_args('--task', 'sudoku', '--eval_data', file), nano_tokenizer()).items()
    theirs = [item['question'] for part in (SHARED / 'data/llada_generations').glob('sudoku*')
              for item in json.loads(part.read_text())['generations']]
    digits = lambda questions: sorted(re.search('[0-4]{16}', question)[0] for question in questions)
    assert name == 'sudoku' and digits(example['question'] for _, example in pairs) == digits(theirs)


def test_each_task_may_have_its_own_file(tmp_path):
    puzzle, problem = dict(Puzzle='4320004330100004', Solution='4321124334122134'), dict(question='1+1?', answer='#### 2')
    for name, row in (('puzzle', puzzle), ('problem', problem)):
        (tmp_path / f'{name}.jsonl').write_text(json.dumps(row))
    files = f"{tmp_path / 'problem.jsonl'},{tmp_path / 'puzzle.jsonl'}"
    args = llada_args('--task', 'gsm8k,sudoku', '--data', files, '--eval_data', files)
    sets = train.test_sets(args, nano_tokenizer())
    assert {name: pairs[0][1]['answer'] for name, pairs in sets.items()} == dict(gsm8k=2.0, sudoku='4321124334122134')
    assert train.Problems(args, nano_tokenizer(), 'sudoku', 'train').draw(0)[1]['answer'] == '4321124334122134'


def test_dropout_is_the_same_again_and_after_a_stop(whole, monkeypatch):
    flags = '--lora_rank 4 --lora_dropout 0.5 --stages grpo --learning_rate 1e-2'.split()
    run(whole, '--name', 'dropout', *flags)
    end_step = train.Run.end_step
    def stop(self, args, stage, step, *rest):
        self.stop = step == 1
        end_step(self, args, stage, step, *rest)
    monkeypatch.setattr(train.Run, 'end_step', stop)
    with pytest.raises(KeyboardInterrupt):
        run(whole, '--name', 'dropout-again', *flags)
    monkeypatch.undo()
    run(whole, '--name', 'dropout-again', *flags, '--resume')
    log = rows(whole / 'dropout' / 'log.jsonl')
    assert rows(whole / 'dropout-again' / 'log.jsonl') == log and log[1]['first_ratio'] != 1, 'there was dropout'


def test_code_is_evaluated_on_human_eval_and_mbpp_apart(monkeypatch):
    human = dict(prompt='def f(x):\n', entry_point='f', test='def check(f):\n    assert f(1) == 1')
    mbpp = dict(text='Double it.', test_list=['assert f(1) == 2'], test_setup_code='')
    hub = {'openai/openai_humaneval': [human], 'google-research-datasets/mbpp': [mbpp, mbpp]}
    monkeypatch.setattr(rewards, 'read_rows', lambda source, config, split: split == 'test' and hub[source])
    tokenizer, args = nano_tokenizer(), llada_args('--task', 'code', '--eval_lengths', '32')
    sets = train.test_sets(args, tokenizer)
    assert {name: len(pairs) for name, pairs in sets.items()} == {'code-openai_humaneval': 1, 'code-mbpp': 2}
    results = dict(constant=train.constant_scores(args, tokenizer, sets))
    assert [results['constant'][name]['32']['accuracy'] for name in sets] == [1.0, 0.0]  # x for x, but not twice x
    assert all(f'{name}: accuracy' in train.table(args, results) for name in sets)


def test_a_run_is_never_overwritten(whole):
    with pytest.raises(ValueError, match='--resume goes on with it'):
        run(whole, '--name', 'whole')


def spoil(monkeypatch, module, name, calls, how):
    """Lets some calls of a loss, counted from 1, return a spoilt one."""
    loss, count = getattr(module, name), itertools.count(1)
    def spoilt(*tensors):
        value = loss(*tensors)
        if next(count) not in calls:
            return value
        return (how(value[0]), *value[1:]) if isinstance(value, tuple) else how(value)
    monkeypatch.setattr(module, name, spoilt)


@pytest.mark.parametrize('how', [lambda loss: loss * float('nan'), lambda loss: loss + float('inf')])  # its gradient is finite
@pytest.mark.parametrize('stage, module, name', [('sft', sft, 'masked_loss'), ('grpo', train, 'grpo_loss')])
def test_a_loss_that_is_not_finite_skips_one_update_and_is_counted(whole, monkeypatch, stage, module, name, how):
    run_name = f'skipped-{stage}-{how(torch.tensor(1.0))}'
    spoil(monkeypatch, module, name, {2}, how)
    run(whole, '--name', run_name, '--stages', stage)
    log = [json.loads(line, parse_constant=pytest.fail) for line in (whole / run_name / 'log.jsonl').read_text().splitlines()]
    assert [row['bad_updates'] for row in log] == ([0, 1, 0] if stage == 'sft' else [1, 0, 0])
    assert all(tensor.isfinite().all() for tensor in weights(whole / run_name / f'{stage}.pt').values())


def test_too_many_bad_updates_end_the_run_and_keep_the_last_good_checkpoint(whole, monkeypatch):
    spoil(monkeypatch, train, 'grpo_loss', range(1, 99), lambda loss: loss * float('nan'))
    monkeypatch.setattr(train, 'MAX_BAD_UPDATES', 4)
    with pytest.raises(ValueError, match='grpo step 1: 4 updates in a row .* lower the learning rate and --resume'):
        run(whole, '--name', 'broken')
    before, kept = weights(whole / 'broken' / 'sft.pt'), weights(whole / 'broken' / 'checkpoint.pt')
    assert all(torch.equal(before[key], kept[key]) for key in before)
    monkeypatch.undo()
    run(whole, '--name', 'broken', '--resume', '--learning_rate', '1e-5')
    assert [row['bad_updates'] for row in rows(whole / 'broken' / 'log.jsonl')] == [0] * 6


def test_a_base_that_breaks_names_its_own_learning_rate(tmp_path, monkeypatch):
    spoil(monkeypatch, sft, 'masked_loss', range(1, 99), lambda loss: loss * float('nan'))
    with pytest.raises(ValueError, match='base step 4: 5 updates in a row .* none was good: lower --base_learning_rate'):
        run(tmp_path, '--base_steps', '8')


def test_a_trained_nano_model_is_evaluated_on_the_same_problems(whole):
    run(whole, '--model', str(whole / 'whole' / 'model'), '--eval_only', '--name', 'evaluated')
    results = [json.loads((whole / name / 'results.json').read_text()) for name in ('evaluated', 'whole')]
    assert results[0]['base'] == results[1]['grpo']
    with pytest.raises(ValueError, match='no run to go on with'):  # without --name it is not the training run's
        run(whole, '--eval_only', '--resume')


@needs_shared
@pytest.mark.parametrize('task, file', [('countdown', 'countdown_test.jsonl'), ('sudoku', 'sudoku_test.csv')])
def test_nano_trains_on_files_without_solutions(tmp_path, task, file):
    path = str(SHARED / 'data' / file)
    run(tmp_path, '--task', task, '--data', path, '--eval_data', path, '--max_prompt', '64', '--name', 'x')
    assert (tmp_path / 'x' / 'results.json').exists()


def test_two_runs_that_need_one_base_make_it_once(tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *SMALL, '--eval_only', '--out', str(tmp_path), '--name']
    both = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in 'ab']
    texts = [process.communicate()[0] for process in both]
    assert all(process.returncode == 0 for process in both) and ''.join(texts).count('pretraining a nano base') == 1


def test_a_memory_that_is_too_small_is_one_line(monkeypatch, capsys):
    def full(*_): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(train, 'main', full)
    with pytest.raises(SystemExit) as e:
        train.run([])
    assert e.value.code == 2 and capsys.readouterr().err.startswith('train.py: the memory is too small: lower ')
