"""What model.py claims: the published LLaDA, folders that load or say why not, LoRA, nano."""
import json
import random
import re
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_module
from model import (ARCHITECTURE, PREFIX, TAGS, Config, LLaDA, add_lora, load, load_tokenizer,
                   lora_layers, lora_off, merge_lora)
from tiny import GOLDEN, SHARED, V, assert_same, gradients, left_pad, needs_shared, tiny, tokens


# ---- the network ----

@needs_shared
def test_logits_match_the_official_model():
    model = LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    golden = load_file(SHARED / 'golden/logits.safetensors')
    for case in ('case0', 'case1'):
        logits = model(golden[f'{case}.input_ids'])
        torch.testing.assert_close(logits, golden[f'{case}.logits_f32'], atol=2e-4, rtol=0)
    ids, real = golden['padded.input_ids'], golden['padded.attention_mask'].bool()
    masked, unmasked = model(ids, real), model(ids)
    torch.testing.assert_close(masked[real], golden['padded.logits_masked_f32'][real], atol=2e-4, rtol=0)
    torch.testing.assert_close(unmasked, golden['padded.logits_unmasked_f32'], atol=2e-4, rtol=0)


LLAMA_NAMES = dict(attn_norm='input_layernorm', ff_norm='post_attention_layernorm', q_proj='self_attn.q_proj',
                   k_proj='self_attn.k_proj', v_proj='self_attn.v_proj', attn_out='self_attn.o_proj',
                   ff_proj='mlp.gate_proj', up_proj='mlp.up_proj', ff_out='mlp.down_proj')


def llama_twin(model):
    """transformers' Llama with our model's weights, and its logits under a full mask."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.config
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.embedding_size, hidden_size=c.d_model, intermediate_size=c.mlp_hidden_size,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta, max_position_embeddings=c.max_sequence_length,
        tie_word_embeddings=False, attn_implementation='eager')).eval()
    names = {'wte.weight': 'model.embed_tokens.weight', 'ln_f.weight': 'model.norm.weight',
             'ff_out.weight': 'lm_head.weight'}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name not in names:
            _, layer, part, _ = name.split('.')
            name = f'model.layers.{layer}.{LLAMA_NAMES[part]}.weight'
        weights[names.get(name, name)] = tensor
    llama.load_state_dict(weights, strict=True)

    def logits(ids, real):
        hidden_keys = torch.zeros(len(ids), 1, ids.size(1), ids.size(1)).masked_fill(~real[:, None, None], -1e9)
        return llama(ids, attention_mask=hidden_keys).logits
    return logits


@pytest.mark.parametrize('n_kv_heads', [4, 2, 1])
def test_logits_equal_llama_with_a_full_mask(n_kv_heads):
    model = tiny(n_kv_heads=n_kv_heads, n_layers=3, rope_theta=500.0)
    llama = llama_twin(model)
    ids, real = left_pad([tokens(14), tokens(9, seed=1), tokens(3, seed=2)])
    with torch.no_grad():
        everywhere = torch.ones_like(real)
        torch.testing.assert_close(model(ids), llama(ids, everywhere), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids, real)[real], llama(ids, real)[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing_whatever_stands_in_it():
    model, prompts = tiny(), [tokens(12), tokens(5, seed=1)]
    ids, real = left_pad(prompts)
    for mask in (real, real.long()):  # True or 1 = real token
        logits = model(ids, mask)
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(logits[row, -len(prompt):], model(prompt[None])[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_position_sees_every_other():
    model, ids = tiny(), tokens(1, 8)
    for changed in (0, 7):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % V
        assert ((model(ids) - model(other)).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_asking_for_positions_equals_slicing_all_logits():
    model, ids = tiny(), tokens(3, 11)
    real = torch.arange(11) >= torch.tensor([[0], [4], [2]])
    logits = model(ids, real)
    positions = torch.tensor([[5, 9], [10, 6], [8, 8]])
    torch.testing.assert_close(model(ids, real, positions), logits[torch.arange(3)[:, None], positions])


@torch.no_grad()
def test_cached_passes_equal_whole_ones_while_nothing_outside_has_changed():
    model, ids = tiny(), tokens(3, 11)
    real = torch.arange(11) >= torch.tensor([[0], [4], [2]])
    cache, positions = model.new_cache(3, 11), torch.tensor([[5, 9], [10, 6], [8, 8]])
    expected = model(ids, real, positions)
    torch.testing.assert_close(model.cached_logits(ids, positions, cache, 0, real), expected)
    kept = [keys.clone() for keys, _ in cache]
    part = model.cached_logits(ids[:, 5:], positions - 5, cache, 5, real)    # tokens 5 to 10
    torch.testing.assert_close(part, expected)
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % V
    first_layer = LLaDA(tiny(n_layers=1).config)
    first_layer.load_state_dict(tiny(n_layers=1).state_dict())
    one = first_layer.new_cache(3, 11)
    first_layer.cached_logits(ids, positions, one, 0, real)
    torch.testing.assert_close(first_layer.cached_logits(changed[:, 5:], positions - 5, one, 5, real),
                               first_layer(changed, real, positions))        # one layer: exact
    model.cached_logits(changed[:, 5:9], positions.clamp(max=8) - 5, cache, 5, real)
    for before, (keys, _) in zip(kept, cache):
        same = torch.isclose(before, keys, atol=1e-6).all(-1).all(1)         # (B, T)
        assert same[:, :5].all() and same[:, 9:].all() and not same[:, 7].any()


@pytest.mark.parametrize('at_once', [2 ** 25, 3 * V, 1])    # all positions, three, one at a time
@pytest.mark.parametrize('share', [None, 1.0, 0.5, 0.0])     # of the targets that are scored
def test_token_logps_and_gradients_equal_the_plain_softmax(monkeypatch, at_once, share):
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', at_once)
    model, ids, targets = tiny(), tokens(2, 9), tokens(2, 5, seed=3)
    real = torch.arange(9) >= torch.tensor([[0], [3]])
    g = torch.Generator().manual_seed(4)
    weights = torch.randn(2, 5, generator=g)
    scored = torch.rand(2, 5, generator=g) < (1 if share is None else share)

    plain = model(ids, real)[:, 4:].log_softmax(-1).gather(-1, targets[..., None])[..., 0] * scored
    (plain * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    rows = []
    model.ff_out.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    logps = model.token_logps(ids, targets, None if share is None else scored, real)
    assert sum(rows) == scored.sum() and max(rows, default=0) <= max(1, at_once // V)
    (logps * weights).sum().backward()

    assert logps.dtype == torch.float32 and logps.shape == (2, 5)
    torch.testing.assert_close(logps, plain, atol=1e-5, rtol=1e-5)
    assert_same(gradients(model), expected, 1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids, targets = tiny(), tokens(2, 9), tokens(2, 9, seed=3)
    forwards = []
    model.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    model.token_logps(ids, targets).sum().backward()
    expected, plain_forwards = gradients(model), len(forwards)
    model.zero_grad()
    model.gradient_checkpointing = True
    model.token_logps(ids, targets).sum().backward()
    assert_same(gradients(model), expected, 1e-6)
    assert len(forwards) == 3 * plain_forwards, 'the block runs again in the backward pass'


@torch.no_grad()
def test_float32_weights_in_bfloat16_arithmetic_equal_bfloat16_weights(tmp_path):
    model, half, ids = tiny(), tiny().to(torch.bfloat16), tokens(2, 9)
    exact = model(ids)
    model.compute_dtype = torch.bfloat16
    assert torch.equal(model(ids), half(ids)) and not torch.equal(model(ids).float(), exact)
    for a, b in zip(model.new_cache(2, 9), half.new_cache(2, 9), strict=True):
        assert a[0].dtype == b[0].dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for name, tensor in LLaDA.from_pretrained(tmp_path, torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, half.state_dict()[name])
    assert {t.dtype for t in load_file(tmp_path / 'model.safetensors').values()} == {torch.bfloat16}


@pytest.mark.parametrize('dtype, noticed', [(torch.float32, True), (torch.bfloat16, False)])
def test_steps_of_3e_6_are_lost_to_bfloat16_weights_only(dtype, noticed):
    model, ids = tiny().to(dtype), tokens(4, 9)
    model.compute_dtype = torch.bfloat16
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-6, weight_decay=0.0)
    for _ in range(20):
        model.token_logps(ids, ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = torch.cat([(p.detach() != before[name]).flatten() for name, p in model.named_parameters()]).float().mean()
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
    assert sum(p.numel() for p in model.parameters()) == published['n_params'] == 8_015_581_184
    assert (config.mask_id, config.eos_id) == (126336, 126081)


# ---- folders ----

def saved(folder, dtype=torch.float32, **keys):
    model = tiny().to(dtype)
    model.config.rest = dict(flash_attention=False, precision='amp_bf16',
                             auto_map={'AutoConfig': 'modeling.X', 'AutoModel': 'other/repo--modeling.X'})
    model.save_pretrained(folder, **keys)
    return model


def test_round_trip_is_exact_and_keeps_the_config(tmp_path):
    model = saved(tmp_path / 'a')
    again = LLaDA.from_pretrained(tmp_path / 'a')
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    again.save_pretrained(tmp_path / 'b')
    first, second = (json.loads((tmp_path / f / 'config.json').read_text()) for f in 'ab')
    assert first == second
    assert ARCHITECTURE.items() <= first.items(), 'what other LLaDA software must know'
    assert first['precision'] == 'amp_bf16' and first['n_kv_heads'] == 2
    assert first['auto_map'] == {'AutoConfig': 'GSAI-ML/LLaDA-8B-Instruct--modeling.X',
                                 'AutoModel': 'other/repo--modeling.X'}
    assert set(load_file(tmp_path / 'a/model.safetensors')) == {PREFIX + name for name in model.state_dict()}


@needs_shared
def test_config_of_the_real_8b_survives_a_round_trip():
    keys = json.loads((SHARED / 'llada-8b/config.json').read_text())
    ours = Config.from_dict(keys).to_dict()
    auto_map = {name: f'GSAI-ML/LLaDA-8B-Instruct--{value}' for name, value in keys['auto_map'].items()}
    assert {name: ours[name] for name in keys} == {**keys, 'auto_map': auto_map}


def test_transformers_looks_for_the_code_of_a_saved_folder_where_it_is(tmp_path, monkeypatch):
    from transformers import AutoConfig, dynamic_module_utils
    saved(tmp_path)
    asked = []
    monkeypatch.setattr(dynamic_module_utils, 'get_cached_module_file', lambda *args, **keys: asked.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert asked == [('GSAI-ML/LLaDA-8B-Instruct', 'modeling.py')]


def test_bfloat16_shards_equal_the_single_file(tmp_path):
    model = saved(tmp_path / 'shards', torch.bfloat16, max_shard_size='15KB')
    saved(tmp_path / 'one', torch.bfloat16)
    assert len(list((tmp_path / 'shards').glob('model-*.safetensors'))) >= 3
    assert (tmp_path / 'shards/model.safetensors.index.json').exists()
    for dtype in (torch.bfloat16, torch.float32):
        shards, one = (LLaDA.from_pretrained(tmp_path / name, dtype).state_dict() for name in ('shards', 'one'))
        for name, tensor in model.state_dict().items():
            assert shards[name].dtype == one[name].dtype == dtype
            assert torch.equal(shards[name], one[name]) and torch.equal(one[name], tensor.to(dtype)), name


def edit(folder, change):
    file = folder / 'model.safetensors'
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def edit_config(folder, **keys):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **keys}))


Q = PREFIX + 'blocks.1.q_proj.weight'
BROKEN = {  # what was done to the folder: (how, what the one line must name)
    'a missing tensor': (lambda f: edit(f, lambda w: w.pop(Q)), Q),
    'an extra tensor': (lambda f: edit(f, lambda w: w.update({PREFIX + 'wpe.weight': torch.ones(2)})), 'wpe.weight'),
    'a bias': (lambda f: edit(f, lambda w: w.update({Q.replace('weight', 'bias'): torch.ones(32)})), 'q_proj.bias'),
    'a misshapen tensor': (lambda f: edit(f, lambda w: w.update({Q: torch.ones(32, 31)})), Q + ' is'),
    'a transposed tensor': (lambda f: edit(f, lambda w: w.update({PREFIX + 'ff_out.weight': torch.ones(32, V)})),
                            'ff_out.weight'),
    'a truncated file': (lambda f: cut(f / 'model.safetensors', 0.9), 'model.safetensors'),
    'a file cut in its header': (lambda f: cut(f / 'model.safetensors', 0.001), 'model.safetensors'),
    'an empty file': (lambda f: cut(f / 'model.safetensors', 0), 'model.safetensors'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'model.safetensors is missing'),
    'no config': (lambda f: (f / 'config.json').unlink(), 'config.json'),
    'a cut config': (lambda f: cut(f / 'config.json', 0.5), 'config.json'),
    'another layer count': (lambda f: edit_config(f, n_layers=1), 'blocks.1.'),
    'another model': (lambda f: (f / 'config.json').write_text('{"model_type": "llada"}'), 'd_model'),
    'a foreign model type': (lambda f: edit_config(f, model_type='llama'), "model_type='llama'"),
    'tied weights': (lambda f: edit_config(f, weight_tying=True), 'weight_tying=True'),
    'no rotary angles': (lambda f: edit_config(f, rope=False), 'rope=False'),
    'biases': (lambda f: edit_config(f, include_bias=True), 'include_bias=True'),
    'another activation': (lambda f: edit_config(f, activation_type='swiglu'), "activation_type='swiglu'"),
    'a size in quotes': (lambda f: edit_config(f, d_model='32'), "d_model='32'"),
    'a config that is a list': (lambda f: (f / 'config.json').write_text('[]'), 'config.json'),
}


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[:int(share * len(content))])


@pytest.mark.parametrize('what', BROKEN)
def test_broken_folder_is_named_in_one_line(tmp_path, what):
    saved(tmp_path)
    breaking, named = BROKEN[what]
    breaking(tmp_path)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        LLaDA.from_pretrained(tmp_path)
    assert '\n' not in str(error.value)


def test_missing_shard_is_named_in_one_line(tmp_path):
    saved(tmp_path, max_shard_size='15KB')
    shard = sorted(tmp_path.glob('model-*.safetensors'))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name) as error:
        LLaDA.from_pretrained(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('switch', ARCHITECTURE)
def test_every_switch_is_refused_when_it_means_another_network(switch):
    keys = tiny().config.to_dict()
    Config.from_dict(keys)
    with pytest.raises(ValueError, match=switch):
        Config.from_dict({**keys, switch: 'other'})


def test_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **keys):
        raise OSError('a long\nstory')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', unreachable)
    with pytest.raises(ValueError, match='no/such-model') as error:
        load('no/such-model')
    assert '\n' not in str(error.value)


# ---- the nano model and its tokenizer ----

@pytest.fixture(scope='module')
def nano():
    return load('nano')


def random_text(rng):
    """Any characters that UTF-8 can write, often the ones that the tokenizer treats in its own way."""
    pools = ['0123456789', ' \n\t\r\x0b\xa0\u3000', '+-*/=().,?$', '\x00\x01\x7f', 'éßÄЖ中日한ع', '²½٣३',
             '🙂👩\u200d🔬🇫🇷', 'e\u0301\ufeff']
    words = TAGS + ['the', ' the', 'Ann', ' .', "n't", '<', '<answer', '07', '100', '<|endoftext|>', '<|mask|>']
    anything = lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    return ''.join(rng.choice([lambda: rng.choice(rng.choice(pools)), lambda: rng.choice(words), anything])()
                   for _ in range(rng.randrange(40)))


def test_any_utf8_text_round_trips(nano):
    _, tokenizer = nano
    rng = random.Random(0)
    fixed = ['', '\x00', ' ', '  a  b ', 'a , b . do n\'t !', '🙂', '\ud7ff\ue000\U0010ffff', '1,234.50\n\n07 007']
    for text in fixed + [random_text(rng) for _ in range(400)]:
        ids = tokenizer(text)['input_ids']
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < len(tokenizer) for i in ids)


def test_tags_numbers_and_words_are_single_tokens(nano):
    _, tokenizer = nano
    for text in TAGS + [str(n) for n in range(100)] + ['07', ' apples', 'How']:
        assert len(tokenizer(text)['input_ids']) == 1, text
    ids = tokenizer('<reasoning>\n3*4=12\n</reasoning>\n<answer>\n12\n</answer>')['input_ids']
    assert [tokenizer.decode([i]) for i in ids] == ['<reasoning>\n', '3', '*', '4', '=', '12', '\n</reasoning>\n',
                                                    '<answer>\n', '12', '\n</answer>']


def test_special_ids_agree_with_the_config(nano):
    model, tokenizer = nano
    c = model.config
    assert tokenizer.mask_token_id == c.mask_id and tokenizer.eos_token_id == tokenizer.pad_token_id == c.eos_id
    assert c.mask_id != c.eos_id and c.end_ids == (c.eos_id,)
    assert c.embedding_size == len(tokenizer) == len(set(tokenizer.get_vocab().values()))
    assert tokenizer.decode([c.eos_id, c.mask_id], skip_special_tokens=True) == ''
    assert 5e5 < sum(p.numel() for p in model.parameters()) < 2e6, 'about a million weights'


def test_nano_chat_template_drops_the_instructions_and_opens_the_answer_once(nano):
    _, tokenizer = nano
    message = [dict(role='user', content='Think first.\n\nAnn has 3 apples.\n\nHow many?')]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == 'Ann has 3 apples.\n\nHow many?<|assistant|>'
    assert tokenizer.apply_chat_template(message, return_dict=False) == ids[:-1]


def test_nano_weights_depend_on_the_seed_only(nano):
    model, _ = nano
    same, other = load('nano')[0].state_dict(), load('nano', seed=1)[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same[name]), name
    assert not torch.equal(model.blocks[0].q_proj.weight, other['blocks.0.q_proj.weight'])


def test_nano_numbers_start_as_neighbours(nano):
    model, tokenizer = nano
    for table in (model.wte.weight, model.ff_out.weight):
        wave = lambda n: table[tokenizer.convert_tokens_to_ids(str(n))].detach()
        for n in (5, 40, 90):
            assert (wave(n) - wave(n + 1)).norm() < (wave(n) - wave((n + 30) % 100)).norm()


@pytest.fixture
def asked(monkeypatch):
    """Everything that was asked of a user or of the network: nothing may be."""
    questions = []

    def refuse(*question):
        questions.append(question)
        raise OSError('no network, no user')
    monkeypatch.setattr('builtins.input', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    return questions


def test_nano_folder_loads_again(nano, tmp_path, asked):
    model, tokenizer = nano
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load(str(tmp_path))
    rng = random.Random(1)
    for text in [random_text(rng) for _ in range(50)]:
        ids = tokenizer(text)['input_ids']
        assert tokenizer_again(text)['input_ids'] == ids and tokenizer_again.decode(ids) == text
    assert tokenizer_again.chat_template == tokenizer.chat_template
    assert tokenizer_again.mask_token_id == again.config.mask_id and tokenizer_again.eos_token_id == again.config.eos_id
    ids = tokens(1, 6)
    assert torch.equal(model(ids), again(ids)) and not asked


# ---- LLaDA's own tokenizer and template ----

def llada_folder(folder, dtype=torch.float32, max_shard_size='5GB'):
    """A small model in LLaDA-8B's real layout: its config keys, its tokenizer files, a stand-in for tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(spell.alphabet()))}, merges=[]))
    t.pre_tokenizer, t.decoder = spell, decoders.ByteLevel()
    added = json.loads((SHARED / 'llada-8b/tokenizer_config.json').read_text())['added_tokens_decoder']
    t.add_special_tokens([AddedToken(added[i]['content'], special=True) for i in sorted(added, key=int)])
    folder.mkdir()
    t.save(str(folder / 'tokenizer.json'))
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        shutil.copyfile(SHARED / 'llada-8b' / name, folder / name)
    size, eos = t.get_vocab_size(), t.token_to_id('<|endoftext|>')
    keys = json.loads((SHARED / 'llada-8b/config.json').read_text())
    keys |= dict(d_model=16, n_heads=2, n_kv_heads=2, n_layers=1, mlp_hidden_size=16, embedding_size=size,
                 vocab_size=size, eos_token_id=eos, pad_token_id=eos, mask_token_id=t.token_to_id('<|mdm_mask|>'))
    LLaDA(Config.from_dict(keys)).init_weights().to(dtype).save_pretrained(folder, max_shard_size)
    return folder


@needs_shared
def test_llada_folder_loads_with_both_ends_and_asks_nothing(tmp_path, asked):
    model, tokenizer = load(str(llada_folder(tmp_path / 'llada')))
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ('<|endoftext|>', '<|eot_id|>')}
    assert set(model.config.end_ids) == ends and len(ends) == 2
    assert model.config.eos_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert not asked, 'remote code must neither be run nor offered'


@needs_shared
def test_llada_template_opens_the_answer_once(tmp_path, asked):
    folder = llada_folder(tmp_path / 'llada')
    tokenizer = load_tokenizer(str(folder), LLaDA.from_pretrained(folder).config)
    message = [dict(role='user', content=' 2+3? ')]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == ('<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n2+3?<|eot_id|>'
                                     '<|start_header_id|>assistant<|end_header_id|>\n\n')
    assert ids.count(tokenizer.convert_tokens_to_ids('<|startoftext|>')) == 1


@pytest.mark.parametrize('keys', [dict(mask_token_id=7), dict(eos_token_id=7),
                                  dict(embedding_size=40)])
def test_config_and_tokenizer_that_contradict_are_refused(nano, tmp_path, keys):
    size = keys.get('embedding_size', nano[0].config.embedding_size)
    LLaDA(Config.from_dict({**nano[0].config.to_dict(), **keys})).save_pretrained(tmp_path)
    nano[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f'contradicts itself.*{size}') as error:
        load(str(tmp_path))
    assert '\n' not in str(error.value)


@needs_shared
def test_llada_tokenizer_of_another_mask_is_refused(tmp_path):
    folder = llada_folder(tmp_path / 'llada')
    edit_config(folder, mask_token_id=7)
    with pytest.raises(ValueError, match='contradicts itself'):
        load(str(folder))


@pytest.mark.parametrize('template', [None, '{% if %}', '{{ raise_exception("a\nb") }}'])
def test_a_tokenizer_without_a_chat_template_that_works_is_refused(nano, tmp_path, template):
    nano[0].save_pretrained(tmp_path)
    nano[1].save_pretrained(tmp_path)
    (tmp_path / 'chat_template.jinja').unlink()
    if template:
        (tmp_path / 'chat_template.jinja').write_text(template)
    with pytest.raises(ValueError, match='no usable tokenizer with a chat template') as error:
        load(str(tmp_path))
    assert '\n' not in str(error.value)


def test_folder_without_tokenizer_is_one_line(tmp_path, asked):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='no usable tokenizer') as error:
        load(str(tmp_path))
    assert '\n' not in str(error.value)


# ---- LoRA ----

TARGETS = ('q_proj', 'v_proj', 'up_proj')


def adapted(**keys):
    """A tiny model, its logits without adapters, and the same model with adapters that change it."""
    model, ids = tiny(), tokens(2, 7)
    base = model(ids).detach()
    add_lora(model, 4, 8, targets=TARGETS, **keys)
    for layer in lora_layers(model):
        layer.lora_b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    return model, ids, base


def test_fresh_adapters_change_nothing():
    model, ids = tiny(), tokens(2, 7)
    base = model(ids)
    torch.testing.assert_close(add_lora(model, 4, 8)(ids), base)
    assert all(layer.lora_a.abs().sum() > 0 for layer in lora_layers(model)), 'or nothing can be learnt'


def test_lora_off_equals_base():
    model, ids, base = adapted()
    on = model(ids)
    assert (on - base).abs().max() > 0.1
    with lora_off(model):
        torch.testing.assert_close(model(ids), base)
    assert torch.equal(model(ids), on), 'and on again after it'
    with pytest.raises(KeyError), lora_off(model):
        raise KeyError
    assert torch.equal(model(ids), on), 'even when something failed inside'
    plain = tiny()
    with lora_off(plain):                        # a model without adapters does not mind
        torch.testing.assert_close(plain(ids), base)


def test_adapter_adds_alpha_over_rank_b_a():
    model, _, _ = adapted()
    layer, x = model.blocks[1].v_proj, torch.randn(3, 32)
    expected = x @ layer.weight.T + 8 / 4 * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_merge_equals_the_adapted_model(tmp_path):
    model, ids, base = adapted()
    on = model(ids)
    model.save_pretrained(tmp_path / 'without')
    torch.testing.assert_close(LLaDA.from_pretrained(tmp_path / 'without')(ids), base)
    weights = model.blocks[0].q_proj.weight
    merge_lora(model)
    torch.testing.assert_close(model(ids), on, atol=1e-4, rtol=1e-4)
    assert model.blocks[0].q_proj.weight is weights, 'in place'
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / 'merged')
    torch.testing.assert_close(LLaDA.from_pretrained(tmp_path / 'merged')(ids), on, atol=1e-4, rtol=1e-4)


def test_only_adapters_are_trained():
    model, ids, _ = adapted()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f'blocks.{i}.{t}.lora_{x}' for i in range(2) for t in TARGETS for x in 'ab'}
    model(ids).square().mean().backward()
    grads = gradients(model)
    assert grads.keys() == trainable and all(grad.abs().sum() > 0 for grad in grads.values())


def test_adapters_are_float32_beside_bfloat16_weights():
    model = add_lora(tiny().to(torch.bfloat16), 4, 8)
    ids = tokens(2, 7)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    logps = model.token_logps(ids, ids)
    logps.sum().backward()
    assert logps.dtype == torch.float32 and model(ids).dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model).values())
    assert {p.dtype for p in merge_lora(model).parameters()} == {torch.bfloat16}
