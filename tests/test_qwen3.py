"""The second layout: Qwen3 without its causal mask (dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1)."""
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import rewards
import train
from model import LLaDA, load
from test_llada import lines, problem
from test_train import rows
from tiny import left_pad, tokens

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
            "{% endif %}{% endif %}")


def qwen3_folder(folder, tied, head_file=None, dtype=torch.float32):
    """A random checkpoint written by transformers, a byte tokenizer with Qwen3's special tokens.

    head_file: also store the LM head of a tied model, as some conversions do.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(spell.alphabet()))}, merges=[]))
    t.pre_tokenizer, t.decoder = spell, decoders.ByteLevel()
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|mask|>']
    t.add_special_tokens([AddedToken(s, special=True) for s in special])
    PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|im_end|>', pad_token='<|endoftext|>',
                            chat_template=TEMPLATE).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=t.get_vocab_size() + 8, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rope_parameters=dict(rope_type='default', rope_theta=1e6), tie_word_embeddings=tied,
        max_position_embeddings=4096, eos_token_id=t.token_to_id('<|im_end|>'),
        mask_token_id=t.token_to_id('<|mask|>'), attn_implementation='eager',
        initializer_range=0.2)
    qwen = Qwen3ForCausalLM(config).eval()
    for name, p in qwen.named_parameters():
        if p.dim() == 1:                         # norms start at 1: move them
            p.data += 0.1 * torch.randn(p.shape)
    qwen.to(dtype).save_pretrained(folder)
    keys = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**keys, 'model_type': 'a2d-qwen3'}))
    if head_file:
        from safetensors.torch import save_file
        weights = load_file(folder / 'model.safetensors')
        weights['lm_head.weight'] = weights['model.embed_tokens.weight'] + 1
        save_file(weights, folder / 'model.safetensors')
    return qwen


def full_mask_logits(qwen, ids, real):
    hidden = torch.zeros(len(ids), 1, ids.size(1), ids.size(1))
    return qwen(ids, attention_mask=hidden.masked_fill(~real[:, None, None], -1e9)).logits


@pytest.mark.parametrize('tied', [True, False])
@torch.no_grad()
def test_logits_equal_transformers_qwen3_under_a_full_mask(tmp_path, tied):
    qwen = qwen3_folder(tmp_path, tied)
    model, _ = load(str(tmp_path))
    ids, real = left_pad([tokens(14, high=200), tokens(9, seed=1, high=200)])
    torch.testing.assert_close(model(ids), full_mask_logits(qwen, ids, torch.ones_like(real)),
                               atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids, real)[real], full_mask_logits(qwen, ids, real)[real],
                               atol=1e-4, rtol=1e-4)
    assert (model.ff_out.weight is model.wte.weight) == tied


@torch.no_grad()
def test_a_stored_head_is_read_whatever_the_config_says(tmp_path):
    qwen3_folder(tmp_path, tied=True, head_file=True)
    model = LLaDA.from_pretrained(tmp_path)
    assert torch.equal(model.ff_out.weight, model.wte.weight + 1)


def test_the_template_opens_the_answer_without_thinking_and_ends_are_known(tmp_path):
    qwen3_folder(tmp_path, tied=True)
    model, tokenizer = load(str(tmp_path))
    text = tokenizer.decode(train.chat(tokenizer, 'How many?'))
    assert text.endswith('<|im_start|>assistant\n<think>\n\n</think>\n\n')
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ('<|im_end|>', '<|endoftext|>')]
    assert list(model.config.end_ids) == ends and model.config.eos_id == ends[0]
    assert model.config.mask_id == tokenizer.convert_tokens_to_ids('<|mask|>')


@pytest.mark.parametrize('tied', [True, False])
def test_a_saved_folder_has_the_same_layout(tmp_path, tied):
    qwen3_folder(tmp_path / 'a', tied)
    model = LLaDA.from_pretrained(tmp_path / 'a')
    model.save_pretrained(tmp_path / 'b')
    a, b = (load_file(tmp_path / f / 'model.safetensors') for f in 'ab')
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    keys = [json.loads((tmp_path / f / 'config.json').read_text()) for f in 'ab']
    assert keys[0] == keys[1]


def test_the_whole_recipe_runs_with_adapters(tmp_path, monkeypatch):
    qwen3_folder(tmp_path / 'base', tied=True)
    questions = lines(tmp_path / 'q.jsonl', *map(problem, range(2, 8)))
    trace = dict(question='1+1?', thinking_trajectories=['One and one.'], attempt='2.')

    def grade(text, example):
        return len(set(text)) / 10, False
    task = rewards.TASKS['gsm8k']._replace(grade=grade)
    monkeypatch.setitem(rewards.TASKS, 'gsm8k', task)
    train.main(['--model', str(tmp_path / 'base'), '--out', str(tmp_path / 'out'), '--name', 'run',
                '--dtype', 'float32', '--data', questions, '--eval_data', questions,
                '--sft_data', lines(tmp_path / 's.jsonl', trace), '--sft_steps', '1',
                '--sft_batch', '2', '--sft_length', '32', '--grpo_steps', '1', '--num_prompts', '2',
                '--num_generations', '2', '--num_iterations', '2', '--gen_length', '16',
                '--block_length', '8', '--steps', '4', '--eval_lengths', '16', '--lora_rank', '4'])
    run = tmp_path / 'out/run'
    assert [row['stage'] for row in rows(run / 'log.jsonl')] == ['sft', 'grpo']
    saved, base = (load_file(f / 'model.safetensors') for f in (run / 'model', tmp_path / 'base'))
    changed = {name.split('.')[-2] for name in saved if not torch.equal(saved[name], base[name])}
    assert saved.keys() == base.keys()
    assert changed == {'q_proj', 'k_proj', 'v_proj', 'up_proj'}
    for file in ('tokenizer.json', 'tokenizer_config.json'):
        assert (run / 'model' / file).read_bytes() == (tmp_path / 'base' / file).read_bytes()
