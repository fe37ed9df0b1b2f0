"""What model.py claims: the published LLaDA, folders that load or say why not, LoRA, nano."""
import json
import random
import re
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import memory
import model as model_module
from model import (ARCHITECTURE, PREFIX, TAG_TOKENS, Config, LLaDA, add_lora, load, lora_layers,
                   lora_off, merge_lora)
from tiny import GOLDEN, SHARED, V, assert_same, gradients, left_pad, needs_shared, tiny, tokens


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


LLAMA_NAMES = dict(wte='model.embed_tokens', ln_f='model.norm', attn_norm='input_layernorm',
                   ff_norm='post_attention_layernorm', q_proj='self_attn.q_proj',
                   k_proj='self_attn.k_proj', v_proj='self_attn.v_proj',
                   attn_out='self_attn.o_proj', ff_proj='mlp.gate_proj', up_proj='mlp.up_proj')


def llama_name(name):
    """Our name of a weight -> the one of transformers' Llama."""
    if not name.startswith('blocks.'):
        part = name.removesuffix('.weight')
        return LLAMA_NAMES.get(part, 'lm_head') + '.weight'
    _, layer, part, _ = name.split('.')
    return f'model.layers.{layer}.{LLAMA_NAMES.get(part, "mlp.down_proj")}.weight'


@torch.no_grad()
@pytest.mark.parametrize('n_kv_heads', [4, 2])
def test_logits_equal_llama_with_a_full_mask(n_kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM
    model = tiny(n_kv_heads=n_kv_heads, n_layers=3, rope_theta=500.0, rms_norm_eps=0.1)
    c = model.config
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=c.d_model, intermediate_size=c.mlp_hidden_size,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta,
        attn_implementation='eager')).eval()
    llama.load_state_dict({llama_name(name): t for name, t in model.state_dict().items()})
    ids, real = left_pad([tokens(14), tokens(9, seed=1), tokens(3, seed=2)])
    for mask in (torch.ones_like(real), real):
        added = torch.zeros(3, 1, 14, 14).masked_fill(~mask[:, None, None], -1e9)    # to scores
        theirs = llama(ids, attention_mask=added).logits
        for ours in (mask, mask.long()):         # True or 1 = real token
            assert_close(model(ids, ours)[mask], theirs[mask], atol=1e-4, rtol=1e-4)


REAL = torch.arange(11) >= torch.tensor([[0], [4], [2]])     # three rows padded on the left
POSITIONS = torch.tensor([[5, 9], [10, 6], [8, 8]])
ROWS = torch.arange(3)[:, None]


@torch.no_grad()
def test_logits_at_positions_are_those_of_all_positions():
    model, ids = tiny(), tokens(3, 11)
    assert_close(model(ids, REAL, POSITIONS), model(ids, REAL)[ROWS, POSITIONS])


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


@pytest.mark.parametrize('at_once', [2 ** 25, 3 * V, 1])     # all rows, three, one at a time
@pytest.mark.parametrize('share', [None, 0.5, 0.0])          # of the targets that are scored
def test_token_logps_and_gradients_are_those_of_log_softmax(monkeypatch, at_once, share):
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', at_once)
    model, ids, targets = tiny(), tokens(3, 11), tokens(3, 5, seed=3)
    g = torch.Generator().manual_seed(4)
    weights = torch.randn(3, 5, generator=g)
    scored = None if share is None else torch.rand(3, 5, generator=g) < share
    counted = torch.ones(3, 5, dtype=torch.bool) if share is None else scored

    logits = model(ids, REAL)[:, 6:]
    plain = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * counted
    (plain * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    rows = []                                    # that the LM head sees in each of its calls
    model.ff_out.register_forward_hook(lambda layer, inputs, logits: rows.append(len(logits)))
    logps = model.token_logps(ids, targets, scored, REAL)
    assert sum(rows) == counted.sum() and max(rows) <= max(1, at_once // V)
    (logps * weights).sum().backward()

    assert logps.dtype == torch.float32
    assert_close(logps, plain, atol=1e-5, rtol=1e-5)
    assert_same(gradients(model), expected, 1e-5)


def test_token_logps_never_hold_the_logits_of_all_tokens(monkeypatch):
    size, n = 4096, 64
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', 4 * size)
    model = tiny(d_model=8, n_layers=1, embedding_size=size)
    ids = tokens(1, n)

    def step():
        model.token_logps(ids, ids).sum().backward()
    assert memory.peak(step) < n * size * 4      # bytes


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = tiny(), tokens(2, 9)
    passes = []
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    model.token_logps(ids, ids).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing = True
    model.token_logps(ids, ids).sum().backward()
    assert_same(gradients(model), expected, 1e-6)
    assert len(passes) == 1 + 2, 'a block runs again in the backward pass'


@torch.no_grad()
def test_float32_weights_in_bfloat16_arithmetic_equal_bfloat16_weights(tmp_path):
    model, half, ids = tiny(), tiny().to(torch.bfloat16), tokens(2, 9)
    exact = model(ids)
    model.compute_dtype = torch.bfloat16
    assert torch.equal(model(ids), half(ids))
    assert not torch.equal(model(ids).float(), exact)
    logps = model.token_logps(ids, ids)
    assert not torch.equal(logps, logps.bfloat16().float()), 'log-probs are finer'
    for (keys, values), (half_keys, _) in zip(model.new_cache(2, 9), half.new_cache(2, 9)):
        assert keys.dtype == values.dtype == half_keys.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / 'model.safetensors')
    for name, tensor in half.state_dict().items():
        assert torch.equal(saved[PREFIX + name], tensor)     # bfloat16, too


@pytest.mark.parametrize('dtype, noticed', [(torch.float32, True), (torch.bfloat16, False)])
def test_steps_of_3e_6_are_lost_to_bfloat16_weights_only(dtype, noticed):
    model, ids = tiny().to(dtype), tokens(4, 9)
    model.compute_dtype = torch.bfloat16
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-6, weight_decay=0.0)
    for _ in range(20):
        model.token_logps(ids, ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    moved = (after != before).float().mean()
    assert moved > 0.9 if noticed else moved < 0.2


@needs_shared
def test_8b_has_exactly_the_published_tensors():
    published = json.loads((SHARED / 'llada-8b/parameters.json').read_text())
    config = Config.from_dict(json.loads((SHARED / 'llada-8b/config.json').read_text()))
    with torch.device('meta'):
        model = LLaDA(config)
    ours = {PREFIX + name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: entry['shape'] for name, entry in published['tensors'].items()}
    assert len(ours) == 291
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184
    assert (config.mask_id, config.eos_id) == (126336, 126081)


# ---- folders ----

def read_config(folder):
    return json.loads((folder / 'config.json').read_text())


def edit_config(folder, **keys):
    (folder / 'config.json').write_text(json.dumps({**read_config(folder), **keys}))


def test_a_saved_folder_keeps_weights_and_config(tmp_path):
    model = tiny()
    model.config.rest = dict(precision='amp_bf16', auto_map=dict(
        AutoConfig='modeling.X', AutoModel='other/repo--modeling.X'))
    model.save_pretrained(tmp_path / 'a')
    again = LLaDA.from_pretrained(tmp_path / 'a')
    again.save_pretrained(tmp_path / 'b')
    assert_same(again.state_dict(), model.state_dict(), 0)
    keys = read_config(tmp_path / 'a')
    assert keys == read_config(tmp_path / 'b')
    assert ARCHITECTURE.items() <= keys.items(), 'what other LLaDA software must know'
    assert keys['precision'] == 'amp_bf16' and keys['n_kv_heads'] == 2
    # the code that auto_map names is not in our folder
    assert keys['auto_map'] == dict(AutoConfig='GSAI-ML/LLaDA-8B-Instruct--modeling.X',
                                    AutoModel='other/repo--modeling.X')


@needs_shared
def test_the_config_of_the_real_8b_survives():
    keys = read_config(SHARED / 'llada-8b')
    ours = Config.from_dict(keys).to_dict()
    for name, file in keys['auto_map'].items():
        keys['auto_map'][name] = f'GSAI-ML/LLaDA-8B-Instruct--{file}'
    assert {name: ours[name] for name in keys} == keys


def test_shards_load_as_the_single_file_does_in_any_dtype(tmp_path):
    model = tiny().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size='15KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) >= 3
    for dtype in (torch.bfloat16, torch.float32):
        for name, tensor in LLaDA.from_pretrained(tmp_path, dtype).state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name].to(dtype)), name


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
        case 'missing shard': next(folder.glob('model*.safetensors')).unlink()
        case 'cut config': cut(folder / 'config.json')
        case 'foreign config': (folder / 'config.json').write_text('{"model_type": "llada"}')
        case 'size in quotes': edit_config(folder, n_layers='2')


@pytest.mark.parametrize('mistake, named', [
    ('missing tensor', Q), ('extra tensor', 'q_proj.bias'), ('misshapen tensor', Q),
    ('cut weights', 'model.safetensors'), ('missing shard', 'is the download complete?'),
    ('cut config', 'config.json'), ('foreign config', 'd_model'), ('size in quotes', 'n_layers')])
def test_a_broken_folder_is_refused_in_one_line_that_names_the_mistake(tmp_path, mistake, named):
    tiny().save_pretrained(tmp_path, '15KB' if mistake == 'missing shard' else '5GB')
    LLaDA.from_pretrained(tmp_path)
    break_folder(tmp_path, mistake)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        LLaDA.from_pretrained(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('switch', ARCHITECTURE)
def test_a_switch_that_means_another_network_is_refused(switch):
    with pytest.raises(ValueError, match=switch):
        Config.from_dict({**tiny().config.to_dict(), switch: 'other'})


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def unreachable(*args, **keys):
        raise OSError('a long\nstory')
    monkeypatch.setattr('huggingface_hub.snapshot_download', unreachable)
    with pytest.raises(ValueError, match='no/such-model') as error:
        load('no/such-model')
    assert '\n' not in str(error.value)


# ---- the nano model and its tokenizer ----

@pytest.fixture(scope='module')
def nano():
    return load('nano')


def random_text(rng):
    """Any characters of UTF-8, often those that the tokenizer treats in its own way."""
    pieces = [*'0123456789 \n\t\r\x0b\xa0\u3000+-*/=().,?$\x00\x7féßÖЖ中日한ع²½٣३🙂', '👩\u200d🔬',
              'e\u0301', *TAG_TOKENS, 'the', ' the', ' .', "n't", '<answer', '07', '100', '<|mask|>']
    text = ''
    for _ in range(rng.randrange(40)):
        text += rng.choice([rng.choice(pieces), chr(rng.randrange(0xD800))])
    return text


def test_any_text_survives_the_nano_tokenizer(nano):
    _, tokenizer = nano
    rng = random.Random(0)
    for text in ['', '\ud7ff\ue000\U0010ffff', *(random_text(rng) for _ in range(300))]:
        ids = tokenizer(text)['input_ids']
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < len(tokenizer) for i in ids)


def test_tags_numbers_and_words_are_single_tokens(nano):
    _, tokenizer = nano
    for text in [*TAG_TOKENS, *map(str, range(100)), '07', ' apples', 'How']:
        assert len(tokenizer(text)['input_ids']) == 1, text
    ids = tokenizer('<reasoning>\n3*4=12\n</reasoning>\n<answer>\n12\n</answer>')['input_ids']
    assert [tokenizer.decode([i]) for i in ids] == [
        '<reasoning>', '\n', '3', '*', '4', '=', '12', '\n</reasoning>\n', '<answer>\n', '12',
        '\n</answer>']


def test_nano_ids_agree_with_its_config(nano):
    model, tokenizer = nano
    c = model.config
    assert tokenizer.mask_token_id == c.mask_id != c.eos_id
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == c.eos_id
    assert c.end_ids == (c.eos_id,)
    assert c.embedding_size == len(tokenizer) == len(set(tokenizer.get_vocab().values()))
    assert tokenizer.decode([c.eos_id, c.mask_id], skip_special_tokens=True) == ''


def test_the_nano_template_drops_the_instructions_and_opens_the_answer_once(nano):
    _, tokenizer = nano
    message = [dict(role='user', content='Think first.\n\nAnn has 3 apples.\n\nHow many?')]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert text == 'Ann has 3 apples.\n\nHow many?<|assistant|>'


def test_nano_weights_depend_on_the_seed_only(nano):
    weights, other = nano[0].state_dict(), load('nano', seed=1)[0].state_dict()
    assert_same(load('nano')[0].state_dict(), weights, 0)
    assert not torch.equal(weights['blocks.0.q_proj.weight'], other['blocks.0.q_proj.weight'])


def test_nano_residual_branches_start_smaller_by_the_root_of_their_number(nano):
    for block in nano[0].blocks:                 # 2 x 3 branches, std 0.02
        assert block.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for layer in (block.attn_out, block.ff_out):
            assert layer.weight.std().item() == pytest.approx(0.02 / 6 ** 0.5, rel=0.02)


def test_nano_numbers_start_as_neighbours(nano):
    model, tokenizer = nano
    ids = tokenizer.convert_tokens_to_ids([str(n) for n in range(100)])
    for table in (model.wte.weight[ids], model.ff_out.weight[ids]):
        for n in (5, 40, 90):
            assert (table[n] - table[n + 1]).norm() < (table[n] - table[(n + 30) % 100]).norm()


@pytest.fixture
def offline(monkeypatch):
    """Fails when a user or the network is asked: remote code must not even be offered."""
    def refuse(*question):
        pytest.fail(f'asked {question}')
    monkeypatch.setattr('builtins.input', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)


def save_nano(nano, folder):
    for part in nano:
        part.save_pretrained(folder)


def test_a_nano_folder_loads_again(nano, tmp_path, offline):
    save_nano(nano, tmp_path)
    model, tokenizer = load(str(tmp_path))
    assert_same(model.state_dict(), nano[0].state_dict(), 0)
    rng = random.Random(1)
    for text in [random_text(rng) for _ in range(50)]:
        assert tokenizer(text)['input_ids'] == nano[1](text)['input_ids']
    assert tokenizer.chat_template == nano[1].chat_template


# ---- LLaDA's own tokenizer and template ----

def llada_folder(folder, dtype=torch.float32, max_shard_size='5GB'):
    """A small model in the 8B's layout: its config and tokenizer files, a byte tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {c: i for i, c in enumerate(sorted(spell.alphabet()))}
    t = Tokenizer(models.BPE(alphabet, merges=[]))
    t.pre_tokenizer = spell
    t.decoder = decoders.ByteLevel()
    source = SHARED / 'llada-8b'
    added = json.loads((source / 'tokenizer_config.json').read_text())['added_tokens_decoder']
    for i in sorted(added, key=int):
        t.add_special_tokens([AddedToken(added[i]['content'], special=True)])
    folder.mkdir()
    t.save(str(folder / 'tokenizer.json'))
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        shutil.copyfile(source / name, folder / name)
    keys = read_config(source)
    keys.update(d_model=16, n_heads=2, n_kv_heads=2, n_layers=1, mlp_hidden_size=16)
    keys['vocab_size'] = keys['embedding_size'] = t.get_vocab_size()
    keys['eos_token_id'] = keys['pad_token_id'] = t.token_to_id('<|endoftext|>')
    keys['mask_token_id'] = t.token_to_id('<|mdm_mask|>')
    model = LLaDA(Config.from_dict(keys)).init_weights().to(dtype)
    model.save_pretrained(folder, max_shard_size)
    return folder


@needs_shared
def test_a_llada_folder_loads_with_both_ends_and_its_template(tmp_path, offline):
    model, tokenizer = load(str(llada_folder(tmp_path / 'llada')))
    ends = tokenizer.convert_tokens_to_ids(['<|endoftext|>', '<|eot_id|>'])
    assert list(model.config.end_ids) == ends
    assert model.config.eos_id == tokenizer.eos_token_id == ends[0] != ends[1]
    message = [dict(role='user', content=' 2+3? ')]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert text == ('<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n2+3?<|eot_id|>'
                    '<|start_header_id|>assistant<|end_header_id|>\n\n')


@pytest.mark.parametrize('keys', [dict(mask_token_id=7), dict(eos_token_id=7), None])
def test_a_config_and_a_tokenizer_that_contradict_are_refused(nano, tmp_path, keys):
    save_nano(nano, tmp_path)
    if keys:
        edit_config(tmp_path, **keys)
    else:
        tiny().save_pretrained(tmp_path)         # it has fewer tokens than the tokenizer
    with pytest.raises(ValueError, match='contradicts itself'):
        load(str(tmp_path))


@pytest.mark.parametrize('spoilt', ['tokenizer.json', 'chat_template.jinja'])
def test_a_folder_without_a_chat_tokenizer_is_refused_in_one_line(nano, tmp_path, spoilt):
    save_nano(nano, tmp_path)
    (tmp_path / spoilt).write_text('{{ raise_exception("a\nb") }}')
    with pytest.raises(ValueError, match='no usable tokenizer') as error:
        load(str(tmp_path))
    assert '\n' not in str(error.value)


# ---- LoRA ----

IDS = tokens(2, 7)
TARGETS = ('q_proj', 'v_proj', 'up_proj')


def adapted(dtype=torch.float32):
    """A tiny model with adapters, rank 4, alpha 8, that change it."""
    model = add_lora(tiny().to(dtype), 4, 8, TARGETS)
    for layer in lora_layers(model):
        layer.lora_b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    return model


def test_new_adapters_change_nothing_and_are_a_function_of_their_seed():
    model, again, other = (add_lora(tiny(), 4, 8, TARGETS, seed) for seed in (0, 0, 1))
    assert torch.equal(model(IDS), tiny()(IDS))
    assert_same(again.state_dict(), model.state_dict(), 0)
    name = 'blocks.1.q_proj.lora_a'
    assert not torch.equal(other.state_dict()[name], model.state_dict()[name])


def test_an_adapter_adds_alpha_over_rank_b_a():
    layer, x = adapted().blocks[1].v_proj, torch.randn(3, 32)
    expected = x @ layer.weight.T + 8 / 4 * x @ layer.lora_a.T @ layer.lora_b.T
    assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_inside_lora_off_there_are_no_adapters():
    model, base = adapted(), tiny()(IDS)
    on = model(IDS)
    assert (on - base).abs().max() > 0.1
    with lora_off(model):
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), on), 'and on again after it'
    with pytest.raises(KeyError), lora_off(model):
        raise KeyError
    assert torch.equal(model(IDS), on), 'even when something failed inside'
    plain = tiny()
    with lora_off(plain):
        pass
    assert torch.equal(plain(IDS), base), 'a model without adapters does not mind'


def test_a_merged_model_says_the_same_without_adapters(tmp_path):
    model = adapted()
    weight, on = model.blocks[0].q_proj.weight, model(IDS)
    model.save_pretrained(tmp_path)              # without the adapters, as they are not merged
    assert torch.equal(LLaDA.from_pretrained(tmp_path)(IDS), tiny()(IDS))
    merge_lora(model)
    assert not lora_layers(model) and model.state_dict().keys() == tiny().state_dict().keys()
    assert model.blocks[0].q_proj.weight is weight, 'in place: an optimizer may hold it'
    assert all(p.requires_grad for p in model.parameters())
    assert_close(model(IDS), on, atol=1e-4, rtol=1e-4)


def test_only_adapters_are_trained():
    model = adapted()
    model(IDS).square().mean().backward()
    expected = {f'blocks.{i}.{t}.lora_{x}' for i in range(2) for t in TARGETS for x in 'ab'}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert gradients(model).keys() == expected
    assert all(grad.abs().sum() > 0 for grad in gradients(model).values())


def test_adapters_are_float32_beside_bfloat16_weights():
    model = adapted(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.token_logps(IDS, IDS).sum().backward()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}
    assert {p.dtype for p in merge_lora(model).parameters()} == {torch.bfloat16}
