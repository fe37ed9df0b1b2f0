"""The recipe end to end, in miniature: it runs, resumes to the same numbers, and says what is wrong in one line."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import grpo
import rewards
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


@pytest.mark.parametrize('stage, step', [('sft', 0), ('sft', 1), ('grpo', 0), ('grpo', 1), ('grpo', 2)])
def test_stopped_run_resumes_to_the_same_numbers(whole, monkeypatch, stage, step):
    name = f'stopped-{stage}-{step}'
    end_step = train.Run.end_step
    def stop_at(self, args, at_stage, at_step, *rest):
        self.stop = (at_stage, at_step) == (stage, step)
        end_step(self, args, at_stage, at_step, *rest)
    monkeypatch.setattr(train.Run, 'end_step', stop_at)
    with pytest.raises(KeyboardInterrupt):
        run(whole, '--name', name)
    monkeypatch.undo()
    run(whole, '--name', name, '--resume')
    assert rows(whole / name / 'log.jsonl') == rows(whole / 'whole' / 'log.jsonl')
    assert rows(whole / name / 'samples.jsonl') == rows(whole / 'whole' / 'samples.jsonl')
    ours, theirs = weights(whole / name / 'grpo.pt'), weights(whole / 'whole' / 'grpo.pt')
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_killed_run_resumes_to_the_same_numbers(whole):
    name, command = 'killed', [sys.executable, 'train.py', *SMALL, '--out', str(whole), '--name', 'killed']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    log = whole / name / 'log.jsonl'
    for kills in range(3):
        process = subprocess.Popen([*command, *(['--resume'] if kills else [])], cwd=ROOT, env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(rows(log)) if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.read_text().count('\n') > before):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, '--resume'], cwd=ROOT, env=environment, check=True, capture_output=True)
    subprocess.run([*command[:-1], 'unkilled'], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert rows(log) == rows(whole / 'unkilled' / 'log.jsonl')
    ours, theirs = weights(whole / name / 'grpo.pt'), weights(whole / 'unkilled' / 'grpo.pt')
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


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
    asked = {train: set(), grpo: set()}
    def spy(module, generate):
        def spied(*tensors, **keys):
            asked[module].add((keys['cache'], keys['refresh'], keys['threshold']))
            return generate(*tensors, **keys)
        monkeypatch.setattr(module, 'generate', spied)
    for module in asked:
        spy(module, module.generate)
    run(whole, '--name', tmp_path.name, '--stages', 'grpo', '--grpo_steps', '1', *flags.split())
    assert asked == {train: {knobs}, grpo: {knobs}}


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
    assert steps * mu == updates, 'gradient steps (FACTS): 7700, 6600, 5000, 3800'
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


def test_gradients_that_are_not_finite_are_skipped_and_end_the_run(whole, monkeypatch):
    loss = train.grpo_loss
    def broken(*tensors):
        value, stats = loss(*tensors)
        return value * float('nan'), stats
    monkeypatch.setattr(train, 'grpo_loss', broken)
    monkeypatch.setattr(train, 'MAX_BAD_UPDATES', 4)
    with pytest.raises(ValueError, match='4 updates in a row'):
        run(whole, '--name', 'broken')
    before, kept = weights(whole / 'broken' / 'sft.pt'), weights(whole / 'broken' / 'checkpoint.pt')
    assert all(torch.equal(before[key], kept[key]) for key in before)
