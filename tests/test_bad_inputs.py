"""One bad input per kind of mistake: one line says what to do, and nothing is written."""
import json
import os
import re
import runpy
import shutil
import sys

import pytest

import train
from model import load
from test_train import ROOT, SMALL

ROW = dict(question='How many?', answer='2+2=4\n#### 4')
TRACE = dict(question='How many?', thinking_trajectories=['2+2'], attempt='4')
ITEM = dict(question='How many?', generations=5, ground_truth='4')
FILES = {
    'good.jsonl': ROW,
    'trace.jsonl': TRACE,
    'cut.jsonl': json.dumps(ROW) + '\n{"question": "How',
    'cut.json': '[{"question": ',
    'column.jsonl': dict(question='How many?'),
    'type.jsonl': {**ROW, 'question': 5},
    'marker.jsonl': {**ROW, 'answer': '4'},
    'empty.jsonl': '',
    'table.txt': 'x',
    'long.jsonl': {**ROW, 'question': 'x' * 500},
    'notrace.jsonl': {**TRACE, 'thinking_trajectories': []},
    'longtrace.jsonl': {**TRACE, 'question': 'x' * 500},
    'nums.jsonl': dict(nums=[1, 'x', 3], target=4),
    'grid.csv': 'Puzzle,Solution\n1,2\n',
    'item.json': dict(generations=[ITEM]),
    'begun/config.json': dict(beta=0.04, seed=0),
    'spoilt/config.json': '{',
    'base-0/base.json': dict(base_seed=9, base_steps=1),
}
MODELS = {                   # a file of a whole model's folder, and what is put in its place
    'whole': None,
    'no_weights': ('model.safetensors', None),
    'cut_weights': ('model.safetensors', '\x10\0\0\0'),
    'bert': ('config.json', '{"model_type": "bert", "hidden_size": 8}'),
    'no_json': ('config.json', '{'),
    'no_tokenizer': ('tokenizer.json', None),
}
# F is the folder of the files, M that of the models, O an empty one
LLADA = ('train.py --data F/good.jsonl --eval_data F/good.jsonl --sft_data F/trace.jsonl '
         '--device cpu --dtype float32 --model')
BAD = [
    # flags
    ('train.py --nonsense 1', 'nonsense'),
    ('train.py --beta', 'beta'),
    ('train.py --beta much', 'beta.*much'),
    ('train.py --grpo_steps 1.5', 'grpo_steps.*1.5'),
    ('train.py --num_prompts=-1', 'num_prompts.*from 1'),
    ('train.py --p_mask_prompt 1.5', 'p_mask_prompt.*from 0 to 1'),
    ('train.py --learning_rate nan', 'learning_rate.*nan'),
    ('train.py --norm batch', 'norm.*token.*sequence'),
    ('train.py --task gsm9k', 'task gsm9k.*choose from gsm8k'),
    ('train.py --lora_rank 4 --lora_targets q_projection', 'lora_targets.*q_proj'),
    ('train.py --gen_length 20', 'gen_length 20.*block_length 8'),
    ('train.py --steps 3', 'steps 3'),
    ('train.py --eval_lengths 12', 'eval_lengths.*12'),
    ('train.py --eval_lengths half', 'eval_lengths.*half'),
    ('train.py --num_generations 1', 'num_generations.*at least 2'),
    ('train.py --task math,math', 'math.*each once'),
    ('train.py --eval_n 0', 'give --eval_data, or --eval_n'),
    ('train.py --max_prompt 5', 'max_prompt 5: raise it'),
    ('train.py --max_prompt 500', 'max_prompt.*lower'),
    ('train.py --device none', 'device'),
    # folders
    ('train.py --out F/good.jsonl', 'good.jsonl'),
    ('train.py --resume', 'leave out --resume'),
    ('train.py --out F --name begun', 'begun exists: --resume.*--name'),
    ('train.py --out F --name begun --resume --beta 0.1', '--beta is 0.1.*0.04.*--name'),
    ('train.py --out F --name spoilt --resume', 'spoilt/config.json'),
    ('train.py --out F --name new', 'base-0.*remove it'),
    # data
    ('train.py --data F/good.jsonl', 'give --eval_data'),
    ('train.py --task gsm8k,math --eval_data F/good.jsonl', 'one file for each of 2 tasks'),
    ('train.py --eval_data F/nowhere.jsonl', 'nowhere.jsonl'),
    ('train.py --eval_data F/table.txt', 'table.txt.*jsonl'),
    ('train.py --eval_data F/cut.jsonl', 'cut.jsonl'),
    ('train.py --eval_data F/cut.json', 'cut.json'),
    ('train.py --eval_data F/column.jsonl', "column.jsonl, row 1.*answer"),
    ('train.py --eval_data F/type.jsonl', "type.jsonl, row 1.*question"),
    ('train.py --eval_data F/marker.jsonl', "marker.jsonl, row 1.*####"),
    ('train.py --eval_data F/empty.jsonl', 'empty.jsonl'),
    ('train.py --eval_data F/long.jsonl', 'max_prompt 64: raise it'),
    ('train.py --task countdown --eval_data F/nums.jsonl', 'nums.jsonl, row 1'),
    ('train.py --task sudoku --eval_data F/grid.csv', 'grid.csv, row 1'),
    ('train.py --task code --eval_data F/good.jsonl', 'good.jsonl, row 1.*test'),
    ('train.py --sft_data F/notrace.jsonl', 'notrace.jsonl, row 1.*thinking_trajectories'),
    ('train.py --sft_data F/longtrace.jsonl', 'max_prompt.*raise it'),
    # models
    ('train.py --model nowhere/nothing', 'nowhere/nothing'),
    (f'{LLADA} M/no_json', 'no_json.config.json'),
    (f'{LLADA} M/bert', 'bert.*llada'),
    (f'{LLADA} M/no_weights', 'safetensors'),
    (f'{LLADA} M/cut_weights', 'model.safetensors'),
    (f'{LLADA} M/no_tokenizer', 'tokenizer'),
    (f'{LLADA} M/whole', 'lower'),
    # the other scripts
    ('sample.py --task chess', 'task.*gsm8k'),
    ('sample.py --model nano --gen_length 20', 'gen_length 20.*block_length 8'),
    ('sample.py', 'run python train.py first, or give --model'),
    ('sample.py --model nowhere/nothing', 'nowhere/nothing'),
    ('rewards.py', 'rewards.py gsm8k'),
    ('rewards.py chess F/item.json', 'gsm8k'),
    ('rewards.py gsm8k F/nowhere.json', 'nowhere.json'),
    ('rewards.py gsm8k F/cut.json', 'cut.json'),
    ('rewards.py gsm8k F/item.json', 'item.json, item 1'),
]


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """The folders F of the files and M of the models."""
    files, models = tmp_path_factory.mktemp('files'), tmp_path_factory.mktemp('models')
    for name, content in FILES.items():
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text(content if isinstance(content, str) else json.dumps(content))
    model, tokenizer = load('nano')
    del model.config.rest['nano']                                # a LLaDA, small
    train.save_model(str(models / 'whole'), model, tokenizer, 'nano')
    for name, change in MODELS.items():
        if not change:
            continue
        shutil.copytree(models / 'whole', models / name)
        file, content = change
        if content is None:
            (models / name / file).unlink()
        else:
            (models / name / file).write_text(content)
    return files, models


@pytest.mark.parametrize('command, says', BAD)
def test_a_bad_input_is_one_line_and_writes_nothing(places, tmp_path, monkeypatch, capsys, command,
                                                    says):
    letters = dict(zip('FM', map(str, places)))
    script, *flags = [re.sub('^[FM](?=/|$)', lambda found: letters[found[0]], word)
                      for word in command.split()]
    if script == 'train.py' and '--model' not in flags:
        flags = SMALL + flags
    monkeypatch.chdir(tmp_path)                                  # out/ would be here
    monkeypatch.setattr(sys, 'argv', [script, *flags])
    before = listing(tmp_path, *places)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and 'Generating' not in line]    # a progress bar
    if isinstance(end.value.code, str):                          # Python prints it, status 1
        lines += end.value.code.splitlines()
    if len(lines) == 2 and lines[0].startswith('usage: '):       # argparse
        del lines[0]
    assert end.value.code and len(lines) == 1, lines
    assert re.search(says, lines[0]), lines[0]
    assert listing(tmp_path, *places) == before


def listing(*folders):
    return sorted(os.path.join(folder, name) for top in folders for folder, _, names in os.walk(top)
                  for name in ['', *names])
