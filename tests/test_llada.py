"""The LLaDA path of train.py: from a folder in the 8B's layout to a folder in that layout."""
import json

import pytest
import torch
from safetensors.torch import load_file

import rewards
import train
from model import PREFIX, load
from test_model import llada_folder
from test_train import rows, weights
from tiny import needs_shared, tokens

pytestmark = needs_shared    # LLaDA's config and chat template
FLAGS = ('--task gsm8k --sft_steps 2 --sft_batch 2 --sft_length 96 --grpo_steps 2 --num_prompts 2 '
         '--num_generations 3 --num_iterations 2 --gen_length 32 --block_length 16 --steps 8 '
         '--save_every 1 --learning_rate 1e-2 --device cpu').split()


def lines(path, *items):
    path.write_text(''.join(json.dumps(item) + '\n' for item in items))
    return str(path)


def problem(n, text=''):
    question = f'{text}Ann has {n} eggs and eats one. How many are left?'
    return dict(question=question, answer=f'#### {n - 1}')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of base, data and out/, the run's flags, and what it said.

    The stand-in tokenizer's tokens are bytes: a prompt has some 220.
    """
    folder = tmp_path_factory.mktemp('llada')
    model = llada_folder(folder / 'base', torch.bfloat16, max_shard_size='15KB')
    trace = dict(question='1+1?', thinking_trajectories=['One and one\n\nare two.'], attempt='2.')
    traces = [trace, {**trace, 'attempt': 'two ' * 50}, {**trace, 'question': 'q' * 600}]
    train_rows = [*map(problem, range(4, 9)), problem(9, 'long ' * 100)]
    flags = ['--model', str(model), '--out', str(folder / 'out'),
             '--data', lines(folder / 'train.jsonl', *train_rows),
             '--eval_data', lines(folder / 'test.jsonl', problem(2), problem(3, 'Today ')),
             '--sft_data', lines(folder / 's1k.jsonl', *traces)]
    said = []

    def grade(text, example):
        return len(set(text)) / 10, False        # every completion earns something
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'print0', said.append)
        patch.setitem(rewards.TASKS, 'gsm8k', rewards.TASKS['gsm8k']._replace(grade=grade))
        train.main([*FLAGS, *flags, '--name', 'run'])
        yield folder, flags, said


def test_a_bfloat16_folder_of_shards_goes_through_the_whole_recipe(whole):
    folder, _, said = whole
    assert len(list((folder / 'base').glob('model-*.safetensors'))) >= 3
    log = rows(folder / 'out/run/log.jsonl')
    assert [row['stage'] for row in log] == ['sft'] * 2 + ['grpo'] * 2
    for stage, layers in (('sft', 3), ('grpo', 4)):          # diffu-GRPO adapts up_proj, too
        adapters = weights(folder / f'out/run/{stage}.pt')
        assert {p.dtype for p in adapters.values()} == {torch.float32}
        assert all('.lora_' in name for name in adapters)
        assert len(adapters) == 2 * layers and all(p.abs().sum() > 0 for p in adapters.values())
    assert any(text.startswith('SFT: 2 traces, 1 dropped') and '1 cut' in text for text in said)
    results = json.loads((folder / 'out/run/results.json').read_text())
    assert set(results) == {'constant', 'base', 'sft', 'grpo'}
    assert all(list(scores['gsm8k']) == ['128', '256', '512'] for scores in results.values())


def test_the_saved_folder_is_the_base_with_its_adapters_merged(whole):
    folder, _, _ = whole
    base, saved = folder / 'base', folder / 'out/run/model'
    keys, saved_keys = (json.loads((f / 'config.json').read_text()) for f in (base, saved))
    assert keys == saved_keys
    before = {}
    for file in base.glob('*.safetensors'):
        before.update(load_file(file))
    after = load_file(saved / 'model.safetensors')
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    changed = {name.removeprefix(PREFIX + 'blocks.0.') for name in before
               if not torch.equal(before[name], after[name])}
    assert changed == {f'{name}.weight' for name in ('q_proj', 'k_proj', 'v_proj', 'up_proj')}


def test_the_saved_folder_loads_again_and_evaluates_the_same(whole):
    folder, flags, _ = whole
    saved = str(folder / 'out/run/model')
    train.main([*FLAGS, *flags, '--model', saved, '--name', 'again', '--eval_only',
                '--eval_lengths', '128'])
    ours, theirs = (json.loads((folder / f'out/{name}_gsm8k_128_generations.json').read_text())
                    for name in ('again/base', 'run/grpo'))
    assert ours['generations'] == theirs['generations']
    (_, one), (_, two) = load(str(folder / 'base')), load(saved)
    assert train.chat(one, 'How?') == train.chat(two, 'How?')
    assert one.decode(tokens(20)) == two.decode(tokens(20))


def test_what_the_run_saved_is_scored_by_rewards(whole, capsys):
    folder, _, _ = whole
    saved = folder / 'out/run/grpo_gsm8k_512_generations.json'
    rewards.score('gsm8k', [str(saved)])
    printed = capsys.readouterr().out
    results = json.loads((folder / 'out/run/results.json').read_text())
    score = results['grpo']['gsm8k']['512']
    assert 'n = 2' in printed and f"reward {score['reward']:.3f}, " in printed
    assert f"length {score['effective_tokens']:.1f}" in printed
    official = json.loads(saved.read_text())
    assert {'metrics', 'model_path', 'block_length'} < official.keys()
    assert (official['gen_length'], official['diffusion_steps']) == (512, 256)
