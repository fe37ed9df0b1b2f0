"""Adapters in PEFT's layout: what is written, what it gives on the original model, reading it back.

    PYTHONPATH=. python tests/test_adapter.py     the same with the peft library (pip install peft)
"""
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rewards
import train
from model import LLaDA, add_lora, load_adapter, lora_layers, merge_lora, save_adapter
from test_train import run, saved_model, varied_grade
from tiny import tiny, tokens


def trained_twice(model):
    """The model with two stages' adapters merged, of layers, ranks and scales of their own."""
    for seed, (rank, alpha, targets) in enumerate([(4, 16, ('q_proj', 'v_proj')),
                                                   (2, 3, ('q_proj', 'up_proj'))]):
        add_lora(model, rank, alpha, targets, seed)
        g = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if name.endswith('lora_b'):
                p.data.normal_(0, 0.2, generator=g)
        merge_lora(model)
    return model


@torch.no_grad()
def test_an_adapter_on_the_original_model_is_the_trained_model(tmp_path):
    model, ids = trained_twice(tiny()), tokens(2, 9)
    save_adapter(tmp_path, model, 'base/name')
    assert (model(ids) - tiny()(ids)).abs().max() > 0.1
    again = tiny()
    load_adapter(tmp_path, again)
    torch.testing.assert_close(again(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_names_ranks_and_numbers_are_those_of_peft(tmp_path):
    model = trained_twice(tiny())
    before = tiny().state_dict()
    save_adapter(tmp_path, model, 'base/name')
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    assert config['peft_type'] == 'LORA' and config['base_model_name_or_path'] == 'base/name'
    assert config['target_modules'] == ['q_proj', 'up_proj', 'v_proj']
    assert config['rank_pattern'] == dict(q_proj=6, v_proj=4, up_proj=2), '4 of SFT and 2 of RL'
    tensors = load_file(tmp_path / 'adapter_model.safetensors')
    assert len(tensors) == 2 * 2 * 3
    for layer in ('q_proj', 'v_proj', 'up_proj'):
        place = f'base_model.model.model.transformer.blocks.1.{layer}.lora_'
        scale = config['alpha_pattern'][layer] / config['rank_pattern'][layer]
        delta = scale * tensors[place + 'B.weight'] @ tensors[place + 'A.weight']
        name = f'blocks.1.{layer}.weight'
        after = model.state_dict()[name]
        torch.testing.assert_close(before[name] + delta, after, atol=1e-5, rtol=0)


@torch.no_grad()
def test_qwen3s_adapters_are_read_back_one_after_the_other(tmp_path):
    def model():
        return tiny(layout='qwen3', qk_norm=True)
    ids, first, second, both = tokens(2, 9), model(), model(), model()
    for seed, (trained, rank, targets) in enumerate([(first, 4, ('q_proj', 'ff_proj')),
                                                     (second, 2, ('ff_proj', 'attn_out'))]):
        add_lora(trained, rank, 16, targets, seed)
        for layer in lora_layers(trained):
            layer.lora_b += 0.1
        save_adapter(tmp_path / str(seed), trained, '')
        load_adapter(tmp_path / str(seed), both)
    save_adapter(tmp_path / 'both', both, '')
    again = model()
    load_adapter(tmp_path / 'both', again)
    torch.testing.assert_close(again(ids), both(ids), atol=1e-5, rtol=1e-5)
    alone = model()
    load_adapter(tmp_path / '0', alone)
    torch.testing.assert_close(alone(ids), first(ids), atol=1e-5, rtol=1e-5)
    assert (both(ids) - alone(ids)).abs().max() > 0.01


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(tmp_path, trained_twice(tiny()), '')
    with pytest.raises(ValueError, match='another model'):
        load_adapter(tmp_path, tiny(n_layers=1))


def test_a_run_leaves_an_adapter_that_gives_its_model(tmp_path, monkeypatch):
    task = rewards.TASKS['gsm8k']._replace(grade=varied_grade)
    monkeypatch.setitem(rewards.TASKS, 'gsm8k', task)
    folder = run(tmp_path, 'lora', '--lora_rank', '4', '--learning_rate', '1e-2')
    model = LLaDA.from_pretrained(tmp_path / 'base-0' / 'model')
    load_adapter(folder / 'adapter', model)
    for name, tensor in saved_model(folder).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=0)
    scored = run(tmp_path, 'scored', '--eval_only', '--adapter', str(folder / 'adapter'))
    ours, theirs = (json.loads((f / 'results.json').read_text()) for f in (scored, folder))
    assert ours['base'] == theirs['grpo']
    assert train.read_json(folder / 'adapter', 'adapter_config.json')['rank_pattern']['k_proj'] == 8


def with_peft():
    """A Qwen3 folder, an adapter by us, put on transformers' model by peft: the merged model."""
    import tempfile

    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    from test_qwen3 import qwen3_folder
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        qwen3_folder(folder / 'base', tied=True)
        model = LLaDA.from_pretrained(folder / 'base')
        save_adapter(folder / 'adapter', trained_twice(model), str(folder / 'base'))
        model.save_pretrained(folder / 'merged')
        ids = tokens(2, 9, high=200)
        base = Qwen3ForCausalLM.from_pretrained(folder / 'base')
        plain = base(ids).logits
        ours = Qwen3ForCausalLM.from_pretrained(folder / 'merged')(ids).logits
        theirs = PeftModel.from_pretrained(base, folder / 'adapter')(ids).logits
    gap, effect = (theirs - ours).abs().max().item(), (theirs - plain).abs().max().item()
    print(f'adapter by peft against our merged model: {gap:.1e} (the adapter changes {effect:.1e})')
    assert gap < 1e-4 < effect


if __name__ == '__main__':
    with torch.no_grad():
        with_peft()
    sys.exit()
