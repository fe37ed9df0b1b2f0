"""What model.py claims: the published networks, log-probs, LoRA as in peft, folders."""
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model as model_module
from model import (PREFIX, SWITCHES, LLaDA, add_lora, last_adapter_off, load, load_adapter,
                   read_config, save_adapter, save_tokenizer)
from sample import chat
from tiny import (GOLDEN, SHARED, V, assert_same, edit_json, gradients, left_pad, llada_folder,
                  needs_shared, qwen3_folder, tiny, tokens)


# ---- the network ----

@torch.no_grad()
def test_logits_match_the_official_model():
    model = LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    golden = load_file(GOLDEN / 'logits.safetensors')        # of every 16th token
    for case in ('case0', 'case1'):
        logits = model(golden[f'{case}.input_ids'])[..., ::16]
        assert_close(logits, golden[f'{case}.logits_f32'], atol=2e-4, rtol=0)
    ids, real = golden['padded.input_ids'], golden['padded.attention_mask'].bool()
    masked, unmasked = model(ids, real)[..., ::16], model(ids)[..., ::16]
    assert_close(masked[real], golden['padded.logits_masked_f32'][real], atol=2e-4, rtol=0)
    assert_close(unmasked, golden['padded.logits_unmasked_f32'], atol=2e-4, rtol=0)


def full_mask_logits(causal, ids, real):
    """Those of a causal model of transformers that may look ahead."""
    added = torch.zeros(len(ids), 1, ids.size(1), ids.size(1))               # to the scores
    return causal(ids, attention_mask=added.masked_fill(~real[:, None, None], -1e9)).logits


@torch.no_grad()
@pytest.mark.parametrize('tied', [True, False])
def test_logits_equal_qwen3_with_a_full_mask(tmp_path, tied):
    qwen = qwen3_folder(tmp_path, tied)
    edit_json(tmp_path / 'config.json', model_type='a2d-qwen3')      # as dllm calls it
    model = LLaDA.from_pretrained(tmp_path)
    ids, real = left_pad([tokens(14, high=200), tokens(9, seed=1, high=200)])
    for mask in (torch.ones_like(real), real):
        theirs = full_mask_logits(qwen, ids, mask)
        for ours in (mask, mask.long()):         # True or 1 = real token
            assert_close(model(ids, ours)[mask], theirs[mask], atol=1e-4, rtol=1e-4)
    assert (model.ff_out.weight is model.wte.weight) == tied


REAL = torch.arange(11) >= torch.tensor([[0], [4], [2]])     # three rows padded on the left
POSITIONS = torch.tensor([[5, 9], [10, 6], [8, 8]])


@torch.no_grad()
def test_logits_at_positions_are_those_of_all_positions():
    model, ids = tiny(), tokens(3, 11)
    assert_close(model(ids, REAL, POSITIONS), model(ids, REAL)[torch.arange(3)[:, None], POSITIONS])


@torch.no_grad()
def test_cached_passes_equal_whole_ones_while_nothing_has_changed():
    model, ids = tiny(), tokens(3, 11)
    cache, expected = model.new_cache(3, 11), model(ids, REAL, POSITIONS)
    assert_close(model(ids, REAL, POSITIONS, cache), expected)
    for _ in range(2):                           # the second time from what the first has written
        part = model(ids[:, 5:], REAL, POSITIONS - 5, cache, 5)
        assert_close(part, expected)


@torch.no_grad()
def test_a_cached_pass_renews_its_own_tokens_and_remembers_the_others():
    model, ids = tiny(n_layers=1), tokens(3, 11)     # keys of layer 1 depend on their token only
    cache = model.new_cache(3, 11)
    model(ids, REAL, POSITIONS, cache)
    others = ids.clone()
    others[:, 5:10] = tokens(3, 5, seed=1)           # 10 stays as it was
    positions = POSITIONS.clamp(max=9)
    part = model(others[:, 5:10], REAL, positions - 5, cache, 5)
    assert_close(part, model(others, REAL, positions))
    assert not torch.allclose(part, model(ids, REAL, positions))


@needs_shared
def test_8b_has_exactly_the_published_tensors():
    published = json.loads((SHARED / 'llada-8b/parameters.json').read_text())
    config = read_config(SHARED / 'llada-8b')
    with torch.device('meta'):
        model = LLaDA(config)
    ours = {PREFIX + name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: entry['shape'] for name, entry in published['tensors'].items()}
    assert len(ours) == 291
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184
    assert (config.mask_id, config.eos_id) == (126336, 126081)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = tiny(), tokens(2, 9)
    passes = []
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    model.token_logps(ids, ids, ids >= 0).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing = True
    model.token_logps(ids, ids, ids >= 0).sum().backward()
    assert_same(gradients(model), expected, 1e-6)
    assert len(passes) == 1 + 2, 'a block runs again in the backward pass'


@torch.no_grad()
def test_float32_weights_in_bfloat16_arithmetic_equal_bfloat16_weights(tmp_path):
    model, half, ids = tiny(), tiny().to(torch.bfloat16), tokens(2, 9)
    exact = model(ids)
    model.compute_dtype = torch.bfloat16
    assert torch.equal(model(ids), half(ids))
    assert not torch.equal(model(ids).float(), exact)
    logps = model.token_logps(ids, ids, ids >= 0)
    assert not torch.equal(logps, logps.bfloat16().float()), 'log-probs are finer'
    for (keys, values), (half_keys, _) in zip(model.new_cache(2, 9), half.new_cache(2, 9)):
        assert keys.dtype == values.dtype == half_keys.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / 'model.safetensors')
    for name, tensor in half.state_dict().items():
        assert torch.equal(saved[PREFIX + name], tensor)     # bfloat16, too


# ---- log-probs of given tokens ----

@pytest.mark.parametrize('at_once', [2 ** 25, 3 * V, V])     # all tokens, three, one at a time
@pytest.mark.parametrize('share', [1, 0.5, 0.0])             # of the targets that are scored
def test_token_logps_and_gradients_are_those_of_log_softmax(monkeypatch, at_once, share):
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', at_once)
    model, ids, targets = tiny(), tokens(3, 11), tokens(3, 5, seed=3)
    g = torch.Generator().manual_seed(4)
    weights = torch.randn(3, 5, generator=g)
    scored = torch.rand(3, 5, generator=g) < share

    logits = model(ids, REAL)[:, 6:]
    plain = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * scored
    (plain * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    sizes = []                                   # what the LM head sees in each of its calls
    model.ff_out.register_forward_hook(lambda layer, inputs, logits: sizes.append(len(logits)))
    logps = model.token_logps(ids, targets, scored, REAL)
    assert sum(sizes) == scored.sum() and max(sizes) <= at_once // V
    (logps * weights).sum().backward()

    assert logps.dtype == torch.float32
    assert_close(logps, plain, atol=1e-5, rtol=1e-5)
    assert_same(gradients(model), expected, 1e-5)


def test_nothing_as_large_as_the_logits_of_all_tokens_waits_for_the_backward_pass(monkeypatch):
    size, n = 4096, 64
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', 4 * size)
    model = tiny(d_model=8, n_layers=1, embedding_size=size)
    ids = tokens(1, n)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = model.token_logps(ids, ids, ids >= 0)
    assert 0 < sum(kept.values()) < n * size
    logps.sum().backward()


# ---- LoRA ----

IDS = tokens(2, 7)


def adapted(model, rank=4, alpha=8, targets=('q_proj', 'v_proj', 'up_proj')):
    """The model with one more adapter, which changes it."""
    add_lora(model, rank, alpha, targets, seed=rank)
    g = torch.Generator().manual_seed(rank)
    for p in model.parameters():
        if p.requires_grad and not p.any():      # B, which starts at zero
            p.data.normal_(0, 0.3, generator=g)
    return model


def adapted_twice(model):
    return adapted(adapted(model), 2, 3, ('q_proj', 'ff_out'))


def test_new_adapters_change_nothing_and_are_a_function_of_their_seed():
    model, again, other = (add_lora(tiny(), 4, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(model(IDS), tiny()(IDS))
    assert_same(again.state_dict(), model.state_dict(), 0)
    name = 'blocks.1.q_proj.adapters.0.A'
    assert not torch.equal(other.state_dict()[name], model.state_dict()[name])


def test_each_adapter_adds_alpha_over_rank_b_a():
    layer, x = adapted_twice(tiny()).blocks[1].q_proj, torch.randn(3, 32)
    first, second = layer.adapters
    expected = x @ layer.weight.T
    expected = expected + 8 / 4 * x @ first.A.T @ first.B.T
    expected = expected + 3 / 2 * x @ second.A.T @ second.B.T
    assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_only_the_last_adapter_is_trained():
    model = adapted_twice(tiny())
    model(IDS).square().mean().backward()
    expected = {f'blocks.{i}.{place}.{x}' for i in range(2) for x in 'AB'
                for place in ('q_proj.adapters.1', 'ff_out.adapters.0')}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert gradients(model).keys() == expected
    assert all(grad.abs().sum() > 0 for grad in gradients(model).values())


def test_inside_last_adapter_off_there_is_no_last_adapter_but_the_others():
    model, on, before = adapted_twice(tiny()), adapted_twice(tiny())(IDS), adapted(tiny())(IDS)
    assert (on - before).abs().max() > 0.1
    with last_adapter_off(model):
        assert torch.equal(model(IDS), before), 'layers that only the first one has keep it'
    assert torch.equal(model(IDS), on), 'and on again after it'
    with pytest.raises(KeyError), last_adapter_off(model):
        raise KeyError
    assert torch.equal(model(IDS), on), 'even when something failed inside'
    for frozen in (tiny(), adapted_twice(tiny()).requires_grad_(False)):
        expected = frozen(IDS)
        with last_adapter_off(frozen):
            assert torch.equal(frozen(IDS), expected), 'where none is trained nothing changes'


def test_adapters_are_float32_beside_bfloat16_weights():
    model = adapted_twice(tiny().to(torch.bfloat16))
    adapters = [p for name, p in model.named_parameters() if 'adapters' in name]
    assert {p.dtype for p in adapters} == {torch.float32}
    model.token_logps(IDS, IDS, IDS >= 0).sum().backward()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}
    assert model(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_saved_model_has_all_adapters_merged_in_float32_and_the_model_keeps_them(tmp_path, dtype):
    model = adapted_twice(tiny().to(dtype))
    before, on = {k: t.clone() for k, t in model.state_dict().items()}, model(IDS)
    model.save_pretrained(tmp_path)
    again = LLaDA.from_pretrained(tmp_path, dtype)
    for i in range(2):
        layer = model.blocks[i].q_proj
        first, second = layer.adapters
        delta = 2 * first.B @ first.A + 1.5 * second.B @ second.A
        expected = (layer.weight.float() + delta).to(dtype)
        assert_close(again.blocks[i].q_proj.weight, expected, atol=1e-6, rtol=0)
    if dtype == torch.float32:
        assert_close(again(IDS), on, atol=1e-4, rtol=1e-4)
    assert_same(model.state_dict(), before, 0)
    assert torch.equal(model(IDS), on)


# ---- adapters in peft's layout ----

@pytest.mark.parametrize('keys', [{}, dict(layout='qwen3', qk_norm=True)])
def test_a_written_adapter_on_the_first_model_is_the_trained_model(tmp_path, keys):
    model = adapted_twice(tiny(**keys))
    save_adapter(tmp_path / 'both', model, 'base/name')
    again = tiny(**keys)
    load_adapter(tmp_path / 'both', again)
    assert_close(again(IDS), model(IDS), atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for name, p in again.named_parameters() if 'adapters' in name)
    adapted(again, 3, 9, ('v_proj', 'ff_proj'))              # trained on top of what was read
    save_adapter(tmp_path / 'more', again, '')
    last = tiny(**keys)
    load_adapter(tmp_path / 'more', last)
    assert_close(last(IDS), again(IDS), atol=1e-4, rtol=1e-4)


def test_names_and_ranks_are_those_of_peft_also_where_layers_differ(tmp_path):
    model = adapted_twice(tiny())
    del model.blocks[0].q_proj.adapters[0]
    save_adapter(tmp_path, model, 'base/name')
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    named = [config[key] for key in ('peft_type', 'task_type', 'base_model_name_or_path')]
    assert named == ['LORA', 'CAUSAL_LM', 'base/name']
    ranks = dict(dict.fromkeys(config['target_modules'], config['r']), **config['rank_pattern'])
    alphas = dict.fromkeys(config['target_modules'], config['lora_alpha']) | config['alpha_pattern']
    places = dict(v_proj=(4, 4), up_proj=(4, 4), ff_out=(2, 2), q_proj=(2, 6))   # per block
    assert ranks == alphas == {f'model.transformer.blocks.{i}.{layer}': rank[i]
                               for layer, rank in places.items() for i in range(2)}
    tensors = load_file(tmp_path / 'adapter_model.safetensors')
    assert {name: len(t) for name, t in tensors.items() if 'lora_A' in name} == {
        f'base_model.model.{path}.lora_A.weight': rank for path, rank in ranks.items()}


def adapter_folder(folder, rank=4, tensors=None, **keys):
    """A folder with an adapter of q_proj and v_proj of tiny(), and what its config says."""
    save_adapter(folder, adapted(tiny(), rank, 8, ('q_proj', 'v_proj')), '')
    config = dict(peft_type='LORA', r=rank, lora_alpha=8) | keys
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    file = folder / 'adapter_model.safetensors'
    half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file({**half, **(tensors or {})}, file)
    return folder


@pytest.mark.parametrize('keys, scales', [     # of q_proj and v_proj in block 0, then in block 1
    ({}, [2, 2, 2, 2]),
    (dict(use_rslora=True), [4, 4, 4, 4]),
    (dict(alpha_pattern={'blocks.0.q_proj': 40}), [10, 2, 2, 2]),
    (dict(alpha_pattern={'k_proj': 40, '_proj': 40}), [2, 2, 2, 2]),             # fit no layer
    (dict(alpha_pattern={'model.transformer.blocks.1.v_proj': 4}), [2, 2, 2, 1]),
    (dict(alpha_pattern={'v_proj': 4, '^model.*q_proj': 12}), [3, 1, 3, 1]),
    (dict(alpha_pattern={r'blocks\.0\..*': 4, 'q_proj': 40}), [1, 1, 10, 2]),    # the first counts
    (dict(r=7, rank_pattern={'q_proj|v_proj': 4}, alpha_pattern={'v_proj': 4}), [2, 1, 2, 1])])
def test_ranks_and_alphas_are_read_as_peft_reads_them(tmp_path, keys, scales):
    model = tiny()
    load_adapter(adapter_folder(tmp_path, **keys), model)
    layers = [layer for block in model.blocks for layer in (block.q_proj, block.v_proj)]
    assert [layer.adapters[0].scale for layer in layers] == scales
    assert model.blocks[0].q_proj.adapters[0].A.dtype == torch.float32


STRAY = 'base_model.model.model.transformer.blocks.0.k_proj.lora_A.weight'


@pytest.mark.parametrize('named, keys', [
    *[(kind, dict(init_lora_weights=kind)) for kind in (
        'pissa', 'pissa_niter_4', 'olora', 'corda', 'loftq', 'lora_ga')],
    *[(kind, dict(peft_type=kind)) for kind in ('IA3', 'LOHA', 'ADALORA')],
    ('alora_invocation_tokens', dict(alora_invocation_tokens=[3, 4])),
    ('use_dora', dict(use_dora=True)), ('bias', dict(bias='all')),
    ('modules_to_save', dict(modules_to_save=['norm'])),
    ('rank', dict(r=3)), ('rank', dict(rank_pattern={'blocks.1.v_proj': 3})),
    ('blocks.0.k_proj', dict(tensors={STRAY: torch.ones(4, 32)})),               # without its B
    ('lm_head', dict(tensors={'base_model.model.lm_head.weight': torch.ones(2, 2)})),
    ('blocks.0.q_proj', dict(tensors={STRAY.replace('k_proj', 'q_proj'): torch.ones(4, 31)}))])
def test_another_kind_of_adapter_is_refused_by_name_before_the_model_changes(tmp_path, named, keys):
    model = tiny()
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        load_adapter(adapter_folder(tmp_path, **keys), model)
    assert '\n' not in str(error.value)
    assert model.state_dict().keys() == tiny().state_dict().keys()


def test_adapters_of_another_model_or_of_no_tensors_are_refused(tmp_path):
    adapter_folder(tmp_path)
    for model in (tiny(n_layers=1), tiny(layout='qwen3'), tiny(d_model=16)):
        with pytest.raises(ValueError, match='another model'):
            load_adapter(tmp_path, model)
    file = tmp_path / 'adapter_model.safetensors'
    head = {f'base_model.model.lm_head.lora_{x}.weight': torch.ones(shape)
            for x, shape in dict(A=(4, 32), B=(V, 4)).items()}
    save_file(head, file)
    load_adapter(tmp_path, tiny(layout='qwen3'))
    with pytest.raises(ValueError, match='lm_head'):             # it would change the embedding
        load_adapter(tmp_path, tiny(layout='qwen3', weight_tying=True))
    save_file({}, file)
    with pytest.raises(ValueError, match='no tensor'):
        load_adapter(tmp_path, tiny())
    file.unlink()
    with pytest.raises(ValueError, match='safetensors'):
        load_adapter(tmp_path, tiny())


@torch.no_grad()
@pytest.mark.parametrize('keys', [
    {}, dict(use_rslora=True), dict(layers_to_transform=[1]), dict(init_lora_weights='orthogonal'),
    dict(alpha_pattern={'layers.0.self_attn.q_proj': 40, r'layers\.[01]\..*_proj': 1, 'o_proj': 9}),
    dict(rank_pattern={'^model.layers.1.self_attn.q_proj': 7, 'o_proj': 2})])
def test_peft_and_we_read_each_others_adapters_alike(tmp_path, keys):
    peft = pytest.importorskip('peft')
    base = qwen3_folder(tmp_path / 'base')
    ids = tokens(2, 9, high=200)
    real = torch.ones_like(ids).bool()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'o_proj'], **keys)
    theirs = peft.get_peft_model(base, config).eval()
    for name, p in theirs.named_parameters():
        if 'lora_' in name:
            p.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / 'theirs')
    model = LLaDA.from_pretrained(tmp_path / 'base')
    load_adapter(tmp_path / 'theirs', model)
    assert_close(model(ids), full_mask_logits(theirs, ids, real), atol=1e-4, rtol=1e-4)
    save_adapter(tmp_path / 'ours', adapted_twice(model), str(tmp_path / 'base'))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / 'ours', attn_implementation='eager').eval()
    assert_close(full_mask_logits(again, ids, real), model(ids), atol=1e-4, rtol=1e-4)


def test_a_full_disk_ends_in_one_line(tmp_path):
    resource = pytest.importorskip('resource')
    model, (soft, hard) = adapted(tiny()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))          # bytes of a file
    try:
        with pytest.raises(OSError, match='cannot be written'):
            save_adapter(tmp_path, model, '')
        with pytest.raises(OSError, match='cannot be written'):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- folders ----

def read(folder, name='config.json'):
    return json.loads((folder / name).read_text())


def test_a_saved_folder_keeps_weights_and_config(tmp_path):
    model = tiny(file_keys=dict(precision='amp_bf16'))
    model.save_pretrained(tmp_path / 'a')
    again = LLaDA.from_pretrained(tmp_path / 'a')
    again.save_pretrained(tmp_path / 'b')
    assert_same(again.state_dict(), model.state_dict(), 0)
    keys = read(tmp_path / 'a')
    assert keys == read(tmp_path / 'b')
    assert keys['precision'] == 'amp_bf16' and keys['n_kv_heads'] == 2


@pytest.mark.parametrize('tied, stored_head', [(True, False), (True, True), (False, True)])
def test_a_saved_qwen3_folder_keeps_weights_and_config(tmp_path, tied, stored_head):
    qwen3_folder(tmp_path / 'a', tied)
    file = tmp_path / 'a/model.safetensors'
    weights = load_file(file)
    if tied and stored_head:         # some conversions do so: what is stored counts
        weights['lm_head.weight'] = weights['model.embed_tokens.weight'] + 1
        save_file(weights, file)
    model = LLaDA.from_pretrained(tmp_path / 'a')
    assert torch.equal(model.ff_out.weight, weights['lm_head.weight' if stored_head else
                                                    'model.embed_tokens.weight'])
    model.save_pretrained(tmp_path / 'b')
    assert_same(load_file(tmp_path / 'b/model.safetensors'), weights, 0)
    before, after = (read(tmp_path / f) for f in 'ab')
    before['tie_word_embeddings'] = not stored_head
    assert {name: after[name] for name in before} == before


@needs_shared
def test_the_config_of_the_real_8b_survives():
    ours = model_module.config_keys(read_config(SHARED / 'llada-8b'), torch.bfloat16)
    assert ours == read(SHARED / 'llada-8b')


def test_a_source_with_code_of_its_own_hands_it_on(tmp_path):
    tiny().save_pretrained(tmp_path / 'a')
    auto_map = dict(AutoConfig='configuration_x.X', AutoModel='other/repo--modeling_x.X')
    edit_json(tmp_path / 'a/config.json', auto_map=auto_map)
    (tmp_path / 'a/configuration_x.py').write_text('X = 1')
    LLaDA.from_pretrained(tmp_path / 'a').save_pretrained(tmp_path / 'b')
    save_tokenizer(tmp_path / 'b', tmp_path / 'a')
    assert read(tmp_path / 'b')['auto_map'] == auto_map
    assert (tmp_path / 'b/configuration_x.py').exists()


def test_the_config_says_the_dtype_of_the_weights(tmp_path):
    from transformers import Qwen3ForCausalLM
    qwen3_folder(tmp_path / 'a', dtype=torch.float32)
    edit_json(tmp_path / 'a/config.json', torch_dtype='float32')
    model = LLaDA.from_pretrained(tmp_path / 'a')
    model.compute_dtype = torch.bfloat16
    model.save_pretrained(tmp_path / 'b')
    assert read(tmp_path / 'b')['dtype'] == read(tmp_path / 'b')['torch_dtype'] == 'bfloat16'
    assert Qwen3ForCausalLM.from_pretrained(tmp_path / 'b').dtype == torch.bfloat16


def shards(model, folder):
    """Writes the model's folder in files of 15 KB."""
    from huggingface_hub import save_torch_state_dict
    model.save_pretrained(folder)
    weights = load_file(folder / 'model.safetensors')
    save_torch_state_dict(weights, folder, max_shard_size='15KB')    # it deletes the single file
    assert len(list(folder.glob('model-*.safetensors'))) >= 3


def test_of_several_weight_files_those_count_that_transformers_takes(tmp_path):
    from transformers import Qwen3ForCausalLM
    qwen3_folder(tmp_path / 'a', tied=False)
    model = LLaDA.from_pretrained(tmp_path / 'a')
    model.ff_out.weight.data += 1
    shards(model, tmp_path / 'b')
    save_file({'lm_head.weight': model.wte.weight + 5}, tmp_path / 'b/model-stale.safetensors')
    for merged in (False, True):     # later also a single file beside the shards
        if merged:
            shutil.copy(tmp_path / 'a/model.safetensors', tmp_path / 'b')
        theirs = Qwen3ForCausalLM.from_pretrained(tmp_path / 'b').lm_head.weight
        assert torch.equal(LLaDA.from_pretrained(tmp_path / 'b').ff_out.weight, theirs)
        assert torch.equal(theirs, model.ff_out.weight) != merged


Q = 'blocks.1.q_proj.weight'


def edit_weights(folder, name, tensor=None):
    weights = load_file(folder / 'model.safetensors')
    weights.pop(PREFIX + name, None)
    if tensor is not None:
        weights[PREFIX + name] = tensor
    save_file(weights, folder / 'model.safetensors')


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])


def break_folder(folder, mistake):
    match mistake:
        case 'missing tensor': edit_weights(folder, Q)
        case 'extra tensor': edit_weights(folder, 'blocks.1.q_proj.bias', torch.ones(32))
        case 'misshapen tensor': edit_weights(folder, Q, torch.ones(32, 31))
        case 'cut weights': cut(folder / 'model.safetensors')
        case 'missing shard': next(folder.glob('model-*.safetensors')).unlink()
        case 'bin': (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
        case 'cut config': cut(folder / 'config.json')
        case 'foreign config': (folder / 'config.json').write_text('{"model_type": "llada"}')
        case 'size in quotes': edit_json(folder / 'config.json', n_layers='2')


@pytest.mark.parametrize('mistake, named', [
    ('missing tensor', Q), ('extra tensor', 'q_proj.bias'), ('misshapen tensor', Q),
    ('cut weights', 'model.safetensors'), ('missing shard', 'model-0'), ('bin', 'safetensors'),
    ('cut config', 'config.json'), ('foreign config', 'd_model'), ('size in quotes', 'n_layers')])
def test_a_broken_folder_is_refused_in_one_line_that_names_the_mistake(tmp_path, mistake, named):
    model = tiny()
    shards(model, tmp_path) if mistake == 'missing shard' else model.save_pretrained(tmp_path)
    LLaDA.from_pretrained(tmp_path)
    break_folder(tmp_path, mistake)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        LLaDA.from_pretrained(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('switch', SWITCHES['llada'])
def test_a_switch_that_means_another_network_is_refused(tmp_path, switch):
    tiny().save_pretrained(tmp_path)
    edit_json(tmp_path / 'config.json', **{switch: 'other'})
    with pytest.raises(ValueError, match=switch):
        read_config(tmp_path)


YARN = dict(rope_type='yarn', factor=4.0, rope_theta=1e6)


@pytest.mark.parametrize('named, keys', [
    ('hidden_act', dict(hidden_act='gelu')), ('attention_bias', dict(attention_bias=True)),
    ('yarn', dict(rope_parameters=YARN)), ('yarn', dict(rope_scaling=YARN)),
    ('linear', dict(rope_scaling=dict(type='linear', factor=2.0))),      # as it was once written
    ('use_sliding_window', dict(use_sliding_window=True))])
def test_a_switch_of_qwen3_that_means_another_network_is_refused(tmp_path, named, keys):
    qwen3_folder(tmp_path)
    edit_json(tmp_path / 'config.json', rope_scaling=None)
    read_config(tmp_path)
    edit_json(tmp_path / 'config.json', **keys)
    with pytest.raises(ValueError, match=named):
        read_config(tmp_path)


def test_the_published_qwen3_names_neither_mask_nor_end(tmp_path):
    qwen3_folder(tmp_path)
    keys = read(tmp_path)
    del keys['mask_token_id'], keys['eos_token_id']
    (tmp_path / 'config.json').write_text(json.dumps(keys))
    config = read_config(tmp_path)
    assert (config.mask_id, config.eos_id) == (151669, 151645)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def unreachable(*args, **keys):
        raise OSError('a long\nstory')
    monkeypatch.setattr('huggingface_hub.snapshot_download', unreachable)
    with pytest.raises(ValueError, match='no/such-model') as error:
        load('no/such-model')
    assert '\n' not in str(error.value)


# ---- with a tokenizer ----

@pytest.fixture
def offline(monkeypatch):
    """Fails when a user or the network is asked: remote code must not even be offered."""
    def refuse(*question):
        pytest.fail(f'asked {question}')
    monkeypatch.setattr('builtins.input', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)


def test_nano_is_the_shipped_folder_wherever_we_are(tmp_path, monkeypatch, offline):
    (tmp_path / 'nano').mkdir()
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load('nano')
    c = model.config
    assert c.file_keys['nano'] is True and c.embedding_size == len(tokenizer)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (c.mask_id, c.eos_id)
    assert c.end_ids == (c.eos_id,)
    model.save_pretrained(tmp_path / 'saved')
    save_tokenizer(tmp_path / 'saved', 'nano')
    again, same = load(tmp_path / 'saved')
    assert_same(again.state_dict(), model.state_dict(), 0)
    assert chat(same, 'How many?\n\n2+3=') == chat(tokenizer, 'How many?\n\n2+3=')
    for file in Path(model_module.__file__).parent.glob('assets/nano/model/*'):
        assert file.suffix == '.safetensors' or (
            (tmp_path / 'saved' / file.name).read_text() == file.read_text())


@needs_shared
def test_a_llada_folder_loads_with_both_ends_and_its_template(tmp_path, offline):
    model, tokenizer = load(str(llada_folder(tmp_path / 'llada')))
    ends = tokenizer.convert_tokens_to_ids(['<|endoftext|>', '<|eot_id|>'])
    assert list(model.config.end_ids) == ends
    assert model.config.eos_id == tokenizer.eos_token_id == ends[0] != ends[1]
    assert tokenizer.decode(chat(tokenizer, ' 2+3? ')) == (
        '<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n2+3?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n')


def test_a_qwen3_folder_loads_with_both_ends_and_answers_without_thinking(tmp_path, offline):
    qwen3_folder(tmp_path)
    model, tokenizer = load(str(tmp_path))
    text = tokenizer.decode(chat(tokenizer, 'How many?'))
    assert text.endswith('<|im_start|>assistant\n<think>\n\n</think>\n\n')
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ('<|im_end|>', '<|endoftext|>')]
    assert list(model.config.end_ids) == ends and model.config.eos_id == ends[0]
    assert model.config.mask_id == tokenizer.convert_tokens_to_ids('<|mask|>')


@pytest.mark.parametrize('keys', [{'mask_token_id': 7}, {'eos_token_id': 7}, {'vocab_size': 100}])
def test_a_config_and_a_tokenizer_that_contradict_are_refused(tmp_path, keys):
    qwen3_folder(tmp_path)
    edit_json(tmp_path / 'config.json', **keys)
    with pytest.raises(ValueError, match='contradicts itself'):
        model_module.load_tokenizer(tmp_path, read_config(tmp_path))


@pytest.mark.parametrize('spoilt', ['tokenizer.json', 'chat_template.jinja'])
def test_a_folder_without_a_chat_tokenizer_is_refused_in_one_line(tmp_path, spoilt):
    qwen3_folder(tmp_path)
    (tmp_path / spoilt).write_text('{{ raise_exception("a\nb") }}')
    with pytest.raises(ValueError, match='chat template') as error:
        load(str(tmp_path))
    assert '\n' not in str(error.value)
