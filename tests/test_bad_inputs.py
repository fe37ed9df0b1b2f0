"""What a user can get wrong, and the one line that each mistake ends in: exit status 2, no traceback, nothing written."""
import json
import os
import re
import runpy
import shutil
import socket
import sys

import pytest
import torch

import train
from model import load
from test_train import ROOT, SMALL

ROW = dict(question='How many?', answer='2+2=4\n#### 4')
TRACE = dict(question='How many?', thinking_trajectories=['2+2'], attempt='4')
FILES = {
    'good.jsonl': json.dumps(ROW) + '\n',
    'trace.jsonl': json.dumps(TRACE) + '\n',
    'cut.jsonl': json.dumps(ROW) + '\n{"question": "How',
    'list.jsonl': '[1, 2]\n',
    'column.jsonl': json.dumps(dict(question='q')) + '\n',
    'type.jsonl': json.dumps(ROW) + '\n' + json.dumps({**ROW, 'question': 5}) + '\n',
    'marker.jsonl': json.dumps({**ROW, 'answer': '4'}) + '\n',
    'mbpp.jsonl': json.dumps(dict(text='q', test_list=[1])) + '\n',
    'mbpp_imports.jsonl': json.dumps(dict(text='q', test_list=['assert f(1)'], test_imports=5)) + '\n',
    'surrogate.jsonl': json.dumps({**ROW, 'question': '\ud800'}) + '\n',
    'empty.jsonl': '',
    'empty.csv': '',
    'column.csv': 'a,b\n1,2\n',
    'cut.json': '[{"question": ',
    'table.txt': 'x',
    'zip.jsonl.gz': 'no gzip',
    'long.jsonl': json.dumps({**ROW, 'question': 'x' * 500}) + '\n',
    'notrace.jsonl': json.dumps({**TRACE, 'thinking_trajectories': []}) + '\n',
    'longtrace.jsonl': json.dumps({**TRACE, 'question': 'x' * 500}) + '\n',
    'nums.jsonl': json.dumps(dict(nums=[1, 'x', 3], target=4)) + '\n',
    'grid.csv': 'Puzzle,Solution\n1,2\n',
    'begun/config.json': json.dumps(dict(beta=0.04, seed=0)),
    'spoilt/config.json': '{',
}
CODE = dict(tests=['assert f(1)'], entry_point='f', setup='')
GOOD = dict(gsm8k=18.0, math='1', countdown=[[1, 2, 3], 6], sudoku='4321124334122134', code=CODE)
ITEMS = [  # saved generations that cannot be scored, each behind one that can: task, what is changed, what the line says
    ('gsm8k', dict(ground_truth='six'), '"six" is no answer of the task gsm8k'),
    ('gsm8k', dict(ground_truth=[18]), 'is no answer'),
    ('gsm8k', dict(effective_tokens='x'), "column 'effective_tokens' holds 'x', not int"),
    ('gsm8k', dict(question=5), "column 'question' holds '5', not str"),
    ('gsm8k', dict(generations=None), "column 'completion' holds 'None', not str"),
    ('math', dict(ground_truth=5), '5 is no answer'),
    ('math', dict(ground_truth=None), 'null is no answer'),
    ('countdown', dict(ground_truth='[[1, 2, 3], 6]'), 'is no answer'),
    ('sudoku', dict(ground_truth=4321124334122134), 'is no answer'),
    ('sudoku', dict(question='Solve it'), "column 'question' holds no 4x4 puzzle"),
    ('sudoku', dict(question=GOOD['sudoku']), "column 'question' holds no 4x4 puzzle"),
    ('code', dict(ground_truth=str(CODE)), 'is no answer'),
    ('code', dict(ground_truth=dict(tests=CODE['tests'], setup='')), 'is no answer'),
    ('code', dict(ground_truth={**CODE, 'tests': 5}), 'is no answer'),
    ('code', dict(ground_truth={**CODE, 'tests': [5]}), 'is no answer'),
    ('code', dict(ground_truth={**CODE, 'setup': None}), 'is no answer'),
]
for i, (task, change, _) in enumerate(ITEMS):
    item = dict(question='4320004330100004', generations='', ground_truth=GOOD[task])
    FILES[f'item{i}.json'] = json.dumps(dict(generations=[item, {**item, **change}]))
DATA = '--data F/good.jsonl --eval_data F/good.jsonl'  # F: the folder of FILES, M: one with the models of MODELS
LLADA = f'{DATA} --sft_data F/trace.jsonl --device cpu --dtype float32 --model'
MODELS = {  # what is changed in a folder that holds a whole model: a file and its new content, None = removed
    'no_weights': ('model.safetensors', None),
    'cut_weights': ('model.safetensors', b'\x10\0\0\0'),
    'bert': ('config.json', b'{"model_type": "bert", "hidden_size": 8}'),
    'other_switch': ('config.json', lambda text: text.replace(b'"rope": true', b'"rope": false')),
    'other_shape': ('config.json', lambda text: text.replace(b'"mlp_hidden_size": 384', b'"mlp_hidden_size": 383')),
    'no_json': ('config.json', b'{'),
    'no_tokenizer': ('tokenizer.json', None),
    'list_index': ('model.safetensors.index.json', b'{"weight_map": ["model.safetensors"]}'),
    'bad_template': ('chat_template.jinja', b'{% if %}'),
    'text_width': ('config.json', lambda text: text.replace(b'"d_model": 128', b'"d_model": "128"')),
    'no_shard': ('model.safetensors.index.json', b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
}
NUMBERS = [row[0] for row in train.FLAGS if len(row) > 1 and type(row[1]) in (int, float)]
BAD = [
    # flags, what the line says
    ('--nonsense 1', 'unrecognized arguments: --nonsense'),
    ('--beta', 'argument --beta: expected one argument'),
    ('--beta much', "argument --beta: invalid float value: 'much'"),
    ('--grpo_steps 1.5', "argument --grpo_steps: invalid int value: '1.5'"),
    ('--task gsm9k', "--task 'gsm9k' is unknown: choose from gsm8k, math"),
    ('--task=', "--task '' is unknown: choose from"),
    ('--task gsm8k,', "--task '' is unknown: choose from"),
    ('--stages rl', "--stages 'rl' is unknown: choose from sft, grpo"),
    ('--stages=', "--stages '' is unknown: choose from"),
    ('--norm batch', "--norm 'batch' is unknown: choose from token, sequence"),
    ('--remasking high', "--remasking 'high' is unknown: choose from low_confidence, random"),
    ('--dtype float8', "--dtype 'float8' is unknown: choose from float32, bfloat16"),
    ('--lora_rank 4 --lora_targets q_projection', "--lora_targets 'q_projection' is unknown: choose from q_proj"),
    ('--gen_length 20', 'gen_length 20 is not a multiple of block_length 8'),
    ('--steps 3', 'steps 3 is not a multiple of the 2 blocks'),
    ('--steps 1', 'steps 1 is not a multiple of the 2 blocks'),
    ('--eval_lengths 12', '--eval_lengths 12.* not a multiple of block_length'),
    ('--eval_lengths half', "--eval_lengths 'half' is no list of lengths such as 128,256"),
    ('--eval_lengths=', "--eval_lengths '' is no list"),
    ('--eval_lengths 0', '--eval_lengths 0.* at least 1'),
    ('--block_length 1 --steps 16', '--eval_lengths 8, in 4 steps: steps 4 is not a multiple of the 8 blocks'),
    ('--stages grpo,sft', 'name each once, sft before grpo'),
    ('--stages sft,sft', 'name each once'),
    ('--task math,math', 'name each once'),
    ('--eval_n 0', 'built-in ones have no end: give a number'),
    ('--max_prompt 5', 'gsm8k: built-in prompts have up to [0-9]+ tokens, --max_prompt 5: raise it'),
    ('--max_prompt 500', 'the longest completion make 532 tokens, the model ends at 512: lower --max_prompt'),
    ('--eval_lengths 4096', 'make 4160 tokens, the model ends at 512'),
    ('--num_generations 1', '--num_generations must be at least 2'),
    ('--p_mask_prompt 1.5', '--p_mask_prompt 1.5 is out of range: give a number from 0 to 1'),
    ('--beta nan', '--beta nan is out of range'),
    ('--learning_rate inf', '--learning_rate inf is out of range'),
    *[(f'--{name}=-1', rf'--{name} -1(\.0)? is out of range: give a number (from|above) 0') for name in NUMBERS],
    *[(f'--{name} 0', rf'--{name} 0(\.0)? is out of range: give a number above 0') for name in NUMBERS
      if name not in train.ZERO_TOO and dict((row[0], row[1]) for row in train.FLAGS if len(row) > 1)[name] != 0],
    ('--refresh 2', 'takes --cache'),
    ('--threshold 1.5', 'threshold 1.5 is no probability'),
    ('--device none', '--device none is not usable here .*: try --device cpu'),
    ('--device meta', '--device meta is not usable here .*: try --device cpu'),
    *([] if torch.cuda.is_available() else [('--device cuda', '--device cuda is not usable here .*: try --device cpu')]),
    ('--name a/b', '--name a/b is no name of a folder'),
    ('--name ..', '--name .. is no name of a folder'),
    ('--out F/good.jsonl', 'good.jsonl is no folder that can be written'),
    ('--out F/good.jsonl/deeper', 'good.jsonl is no folder that can be written'),
    ('--resume', 'holds no run to go on with: leave out --resume'),
    ('--out F --name begun', 'begun exists: --resume goes on with it, --name NAME begins another'),
    ('--out F --name begun --resume --beta 0.1', r'--beta is 0.1, but .*begun was begun with 0.04'),
    ('--out F --name begun --resume --seed 1', '--seed is 1, but .*begun was begun with 0: --resume with that'),
    ('--out F --name spoilt --resume', 'config.json cannot be read'),
    # data
    ('--data F/good.jsonl', '--data without --eval_data would test on the built-in problems: give both'),
    (f'{DATA} --task gsm8k,math', 'names 1 files for 2 tasks'),
    ('--eval_data F/nowhere.jsonl', 'nowhere.jsonl: no such .jsonl, .json or .csv file'),
    ('--eval_data F', 'no such .jsonl, .json or .csv file'),
    ('--eval_data F/table.txt', 'table.txt: no such .jsonl, .json or .csv file'),
    ('--eval_data F/cut.jsonl', 'cut.jsonl, line 2: no JSON .*; mend or remove it'),
    ('--eval_data F/list.jsonl', 'list.jsonl, line 1: no JSON object'),
    ('--eval_data F/column.jsonl', r"column.jsonl, row 1: no column 'answer' \(there are question\)"),
    ('--eval_data F/column.csv', "column.csv, row 1: no column 'question'"),
    ('--eval_data F/type.jsonl', "type.jsonl, row 2: column 'question' holds '5', not str"),
    ('--eval_data F/marker.jsonl', "row 1: column 'answer' does not end in #### and a number"),
    ('--eval_data F/surrogate.jsonl', "surrogate.jsonl, row 1: column 'question' holds .* no valid text"),
    ('--eval_data F/empty.jsonl', 'empty.jsonl: no rows to use'),
    ('--eval_data F/empty.csv', r'empty.csv: not loaded \(No columns to parse from file\); mend the file'),
    ('--eval_data F/cut.json', 'cut.json: not loaded .*position 13.*; mend the file'),
    ('--eval_data F/zip.jsonl.gz', 'zip.jsonl.gz: not loaded'),
    ('--eval_data F/long.jsonl', 'no prompt fits --max_prompt 64: raise it'),
    ('--task countdown --eval_data F/nums.jsonl', 'row 1: .* is no list of whole numbers and a target'),
    ('--task sudoku --eval_data F/grid.csv', 'row 1: .* are no 4x4 puzzle'),
    ('--task code --eval_data F/good.jsonl', "row 1: no column 'test'"),
    ('--task code --eval_data F/mbpp.jsonl', 'row 1: .* expected str instance, int found; expected Code'),
    ('--task code --eval_data F/mbpp_imports.jsonl', 'row 1: .* must be an iterable, not int; expected Code'),
    ('--sft_data F/notrace.jsonl', "notrace.jsonl, row 1: column 'thinking_trajectories' holds no text"),
    ('--sft_data F/longtrace.jsonl', 'SFT has no trace whose prompt fits --max_prompt 64: raise it'),
    # models
    ('--model nowhere/nothing', 'nowhere/nothing is no folder, and no model of that name came from the hub'),
    ('--model=', 'check the name and the network'),
    (f'{LLADA} F', 'config.json cannot be read'),
    (f'{LLADA} M/no_json', 'config.json cannot be read'),
    (f'{LLADA} M/bert', "config.json has model_type='bert': only 'llada' is implemented"),
    (f'{LLADA} M/other_switch', 'config.json has rope=False: only True is implemented'),
    (f'{LLADA} M/other_shape', 'config.json asks for'),
    (f'{LLADA} M/no_weights', 'model.safetensors is missing'),
    (f'{LLADA} M/no_shard', 'model-00001-of-00002.safetensors is missing'),
    (f'{LLADA} M/list_index', 'has no weight_map from tensors to files'),
    (f'{LLADA} M/text_width', "config.json has d_model='128': it must be a positive int"),
    (f'{LLADA} M/bad_template', 'the chat_template of .* does not work .TemplateSyntaxError'),
    (f'{LLADA} M/cut_weights', 'is no whole safetensors file'),
    (f'{LLADA} M/no_tokenizer', 'has no readable tokenizer'),
    (f'{LLADA} M/whole', 'make .* tokens, the model ends at 512'),
    (f'--model M/whole --device cpu {DATA} --stages sft --max_prompt 64 --gen_length 64 --eval_lengths 64 --sft_length 64',
     'simplescaling/s1K: not loaded .* check the network'),
    ('--model M/whole --task sudoku --device cpu --max_prompt 64 --gen_length 64 --eval_lengths 64 --sft_length 64',
     'sudoku has no test data on the hub: give a file'),
]


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """The folders F of the files and M of the models."""
    files, models = tmp_path_factory.mktemp('files'), tmp_path_factory.mktemp('models')
    for name, content in FILES.items():
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text(content)
    model, tokenizer = load('nano')
    del model.config.rest['nano']  # a LLaDA, small
    train.save_model(str(models / 'whole'), model, tokenizer)
    for name, (file, change) in MODELS.items():
        shutil.copytree(models / 'whole', models / name)
        if change is None:
            (models / name / file).unlink()
        else:
            path = models / name / file
            path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return files, models


def listing(*folders):
    return sorted(os.path.join(folder, name) for top in folders for folder, _, names in os.walk(top)
                  for name in ['', *names])


def last_words(capsys, argv, start=train.run):
    """The one line that a start with these flags ends in."""
    with pytest.raises(SystemExit) as end:
        start(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line and 'Generating' not in line]  # a progress bar
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize('flags, says', BAD)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(places, tmp_path, capsys, flags, says):
    flags = [re.sub('^F(?=/|$)', str(places[0]), re.sub('^M(?=/)', str(places[1]), flag)) for flag in flags.split()]
    before = listing(tmp_path, *places)
    line = last_words(capsys, [*(SMALL if '--model' not in flags else []), '--out', str(tmp_path), *flags])
    assert line.startswith('train.py: ') and re.search(says, line), line
    assert listing(tmp_path, *places) == before


SCRIPTS = [  # O: an empty folder
    ('sample.py --task chess', '--task chess is unknown: choose from gsm8k'),
    ('sample.py --steps many', "argument --steps: invalid int value: 'many'"),
    ('sample.py --gen_length 20', 'gen_length 20 is not a multiple of block_length 8'),
    ('sample.py --gen_length 0', 'must be at least 1'),
    ('sample.py --temperature=-1', '--temperature -1.0 is out of range'),
    ('sample.py --temperature nan', '--temperature nan is out of range'),
    ('sample.py --out O', 'no model in .*: run python train.py first, or give --model FOLDER'),
    ('sample.py --model nowhere/nothing', 'nowhere/nothing is no folder, and no model of that name came from the hub'),
    ('sample.py --model M/bert', "model_type='bert'"),
    (f'sample.py --model M/whole --prompt {"x" * 500}', 'tokens: with gen_length they are more than the 512 of the model'),
    ('sft.py --out O --task chess', "--task 'chess' is unknown"),
    ('sft.py --out O --sft_data F/notrace.jsonl', "row 1: column 'thinking_trajectories' holds no text"),
    ('rewards.py', 'usage: python rewards.py gsm8k|'),
    ('rewards.py chess F/good.jsonl', 'usage: python rewards.py gsm8k|'),
    ('rewards.py gsm8k F/nowhere.json', 'No such file'),
    ('rewards.py gsm8k F', 'no such .jsonl, .json or .csv file'),
    ('rewards.py gsm8k F/cut.json', 'cut.json: neither the official JSON layout nor our samples.jsonl'),
    ('rewards.py gsm8k F/cut.jsonl', 'cut.jsonl, line 2: no JSON'),
    ('rewards.py gsm8k F/column.jsonl', r"column.jsonl, item 1: no column 'answer' \(there are question\)"),
    ('rewards.py sudoku F/good.jsonl', "is no answer of the task sudoku"),
    ('rewards.py gsm8k F/empty.jsonl', 'no generations'),
    *[(f'rewards.py {task} F/item{i}.json', f'item{i}.json, item 2: .*{says}') for i, (task, _, says) in enumerate(ITEMS)],
]


@pytest.mark.parametrize('command, says', SCRIPTS)
def test_bad_input_of_a_script_is_one_line_and_status_2_and_writes_nothing(places, tmp_path, monkeypatch, capsys, command,
                                                                           says):
    parts = {'F': str(places[0]), 'M': str(places[1]), 'O': str(tmp_path)}
    script, *flags = (re.sub('^[FMO](?=/|$)', lambda found: parts[found[0]], word) for word in command.split())
    monkeypatch.setattr(sys, 'argv', [script, *flags])
    before = listing(tmp_path, *places)
    line = last_words(capsys, os.path.join(ROOT, script), lambda path: runpy.run_path(path, run_name='__main__'))
    assert re.search(says, line), line
    assert listing(tmp_path, *places) == before


@pytest.mark.parametrize('settings, says', [
    ('RANK=0', 'the processes cannot meet .*WORLD_SIZE=None.* start them with torchrun'),
    ('RANK=one WORLD_SIZE=2', "invalid literal .*RANK=one"),
    ('RANK=2 WORLD_SIZE=2', 'RANK is not below WORLD_SIZE'),
    ('RANK=0 WORLD_SIZE=0', 'RANK is not below WORLD_SIZE'),
    ('RANK=0 WORLD_SIZE=1', 'MASTER_ADDR'),
    ('RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1', 'MASTER_PORT'),
    ('RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999', 'MASTER_PORT=99999'),
    ('RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=TAKEN', 'give --master_port another number'),
])
def test_wrong_ranks_and_ports_are_one_line(tmp_path, monkeypatch, capsys, settings, says):
    with socket.create_server(('', 0)) as server:
        for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
            monkeypatch.delenv(name, raising=False)
        for setting in settings.replace('TAKEN', str(server.getsockname()[1])).split():
            monkeypatch.setenv(*setting.split('='))
        line = last_words(capsys, [*SMALL, '--out', str(tmp_path)])
    assert line.startswith('train.py: the processes cannot meet') and re.search(says, line), line
    assert os.listdir(tmp_path) == []


def test_a_gpu_without_bfloat16_is_named(tmp_path, monkeypatch, capsys):
    ones = torch.ones
    monkeypatch.setattr(torch, 'ones', lambda *size, device, dtype: ones(*size, dtype=dtype))  # a stand-in for a GPU
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda emulated: False)
    line = last_words(capsys, [*SMALL, '--out', str(tmp_path), '--device', 'cuda', '--dtype', 'bfloat16'])
    assert line == ('train.py: --device cuda is not usable here (it has no bfloat16: give --dtype float32): '
                    'try --device cpu')
