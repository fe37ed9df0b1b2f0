"""What sft.py and train.train_sft claim: LLaDA's objective, noise, batches, and s1K's rows."""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

import rewards
import sft
import train
from model import LLaDA
from sft import draw_batch, draw_masks, masked_loss
from tiny import EOS, GOLDEN, MASK, tiny, tokens


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- noise ----

def test_t_is_uniform_in_every_row_never_zero_and_spread_over_the_batch():
    answers, g = torch.zeros(4, 1, dtype=torch.long), generator()
    t = torch.cat([draw_masks(answers, g)[1] for _ in range(2000)], dim=1)      # (4, 2000)
    assert t.min() > 0 and t.max() <= 1
    for row in t:
        counts = (row * 10).clamp(max=9.999).long().bincount(minlength=10)
        chi2 = ((counts - 200.0) ** 2 / 200).sum()
        assert chi2 < 33.7, f'99.99 % of uniform draws are below: {counts.tolist()}'
    late = draw_masks(tokens(1000, 1), g, 0.3)[1]                # t_min
    assert 0.3 < late.min() < 0.301 and late.max() > 0.999 and abs(late.mean() - 0.65) < 1e-3
    quarters = (t * 4).ceil().sort(dim=0).values
    assert torch.equal(quarters, torch.tensor([[1.0], [2.0], [3.0], [4.0]]).expand(4, 2000))


def test_every_token_is_masked_on_its_own_with_probability_t():
    answers = tokens(6, 4000)
    masked, t = draw_masks(answers, generator())
    assert (masked.float().mean(1, keepdim=True) - t).abs().max() < 4 * (0.25 / 4000) ** 0.5
    pairs = (masked[:, 1:] & masked[:, :-1]).float().mean(1, keepdim=True)
    assert (pairs - t ** 2).abs().max() < 4 * 0.5 / 4000 ** 0.5


# ---- the loss ----

def test_loss_and_gradient_match_the_official_code():
    golden = load_file(GOLDEN / 'sft.safetensors')
    model = LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    expected = json.loads((GOLDEN / 'sft.json').read_text())
    labels = golden['train.labels']              # (B, T), -100 where nothing is masked
    masked = labels != -100
    num_tokens = labels.numel() - golden['train.num_prompt_tokens'].item()
    for t in (golden['train.t'], golden['train.t'][:, :1]):      # (B, T) or (B, 1)
        model.zero_grad()
        logps = model.token_logps(golden['train.noisy'], labels.clamp(min=0), masked)
        loss = masked_loss(logps, masked, t, num_tokens)
        loss.backward()
        assert loss.item() == pytest.approx(expected['loss'], rel=1e-5)
        grad_norm = clip_grad_norm_(model.parameters(), math.inf).item()
        assert grad_norm == pytest.approx(expected['grad_norm'], rel=1e-4)


def test_loss_by_hand():
    masked = torch.tensor([[False, True, True], [False, False, True]])
    logps = torch.full((2, 3), -torch.inf)       # what is not masked has no say
    logps[masked] = torch.tensor([0.5, 0.25, 0.25]).log()
    t = torch.tensor([[0.5], [0.25]])
    expected = (math.log(2) / 0.5 + math.log(4) / 0.5 + math.log(4) / 0.25) / 4
    assert masked_loss(logps, masked, t, 4).item() == pytest.approx(expected)


# ---- batches ----

def test_answers_are_padded_with_ends_that_are_learnt():
    answers = sft.right_pad([[5], [6, 7, 8]], 3, EOS, 'cpu')
    assert answers.tolist() == [[5, EOS, EOS], [6, 7, 8]]
    masked, t = draw_masks(torch.full((1, 4000), EOS), generator())
    assert abs(masked.float().mean() - t) < 0.05, 'ends are masked as other tokens are'


def test_batches_hold_every_pair_once_per_epoch():
    pairs = [([i], [i, i]) for i in range(2, 14)]

    def batch(step, seed=0):
        return draw_batch(pairs, step, 4, 3, EOS, seed, 'cpu')
    batches = [batch(step) for step in range(6)]
    order = [prompt[0] for one in batches for prompt in one.prompts]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(2, 14))
    assert order[:12] != order[12:]
    for one in batches:
        assert one.answers.tolist() == [[i, i, EOS] for [i] in one.prompts]
        assert one.masked.shape == (4, 3) and one.masked.any() and one.t.shape == (4, 1)
    again = batch(2)
    assert torch.equal(again.t, batches[2].t) and torch.equal(again.masked, batches[2].masked)
    for unlike in (batch(2, seed=1), batches[1]):
        assert unlike.prompts != batches[2].prompts and not torch.equal(unlike.t, batches[2].t)


# ---- s1K ----

def test_s1k_becomes_tagged_text(tmp_path, capsys):
    row = dict(question='Why?', thinking_trajectories=[' because ', 'x'], attempt=' so ')
    bad = dict(row, thinking_trajectories=[]), dict(row, attempt=5)
    file = tmp_path / 's1k.jsonl'
    file.write_text('\n'.join(json.dumps(some) for some in (row, *bad)))
    assert sft.load_s1k(str(file)) == [(sft.S1K_PROMPT + 'Why?', rewards.tagged('because', 'so'))]
    assert '2 of 3 rows' in capsys.readouterr().err


def test_s1k_is_the_hub_s_or_the_nano_world_s(monkeypatch):
    def sources_only(sources, from_row):
        assert from_row is sft.s1k_row
        return sources
    monkeypatch.setattr(rewards, 'load_rows', sources_only)
    assert sft.load_s1k('hub') == [('simplescaling/s1K', None, 'train')]
    [[nano]] = sft.load_s1k('nano')
    assert Path(nano).resolve() == Path(sft.__file__).resolve().parent / 'assets/nano/sft.jsonl'


class Words:
    """A tokenizer of a token per word, with a chat template that adds two."""
    def __call__(self, text, add_special_tokens=True):
        return dict(input_ids=[len(word) for word in text.split()] + [EOS] * add_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict, **options):
        assert messages[0]['role'] == 'user' and add_generation_prompt and not return_dict
        return [30] + self(messages[0]['content'], False)['input_ids'] + [31]


def test_traces_that_are_too_long_are_dropped_or_cut():
    traces = [('Add them up', '1 22 333'), ('so very many words', '1 2 3'), ('Add', '1 22')]
    pairs = sft.encode_traces(traces, Words(), 5, 2)
    assert pairs == [([30, 3, 4, 2, 31], [1, 2]), ([30, 3, 31], [1, 2])]
    with pytest.raises(ValueError, match='max_prompt'):
        sft.encode_traces(traces, Words(), 2, 2)


# ---- train_sft ----

PAIRS = [(tokens(n, seed=n).tolist(), tokens(m, seed=50 + m).tolist())
         for n, m in ((4, 3), (2, 6), (5, 1), (2, 8), (7, 2), (3, 5))]
L = 8                                            # answer tokens, with the eos padding


class Recorder(torch.optim.SGD):
    """Leaves the weights alone; keeps the gradients and the learning rate of every update."""
    def __init__(self, model, learning_rate):
        super().__init__(model.parameters(), lr=learning_rate)
        self.gradients, self.rates = [], []

    def step(self):
        [group] = self.param_groups
        self.gradients.append([p.grad.clone() for p in group['params'] if p.grad is not None])
        self.rates.append(group['lr'])


def trained(monkeypatch, folder, model, pairs, *flags, record=True):
    """Trains through train.train_sft; returns its optimizer and the log."""
    args = train.parse(['--sft_batch', '6', '--sft_length', str(L), *flags])
    args.folder = str(folder)
    optimizers, adamw = [], train.adamw

    def kept(model, learning_rate):
        optimizers.append((Recorder if record else adamw)(model, learning_rate))
        return optimizers[0]
    with monkeypatch.context() as patch:
        patch.setattr(train, 'adamw', kept)
        train.train_sft(args, model, pairs)
    return optimizers[0], train.read_log(args, 'log.jsonl')


@pytest.mark.parametrize('micro_batch', [1, 2, 4, 64])
def test_the_gradient_is_that_of_the_loss_however_the_batch_is_cut(monkeypatch, tmp_path,
                                                                   micro_batch):
    """Prompts are given whole, one by one: padding has no say, and no token of them is masked."""
    model, loss, sizes = tiny(), 0, []
    hook = model.wte.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    optimizer, log = trained(monkeypatch, tmp_path, model, PAIRS, '--sft_steps', '1',
                             '--micro_batch', str(micro_batch))
    hook.remove()
    assert max(sizes) == min(micro_batch, 6) and sum(sizes) == 6
    for prompt, answer, masked, t in zip(*draw_batch(PAIRS, 0, 6, L, EOS, 0, 'cpu')):
        noisy = answer.masked_fill(masked, MASK)
        logits = model(torch.cat((torch.tensor(prompt), noisy))[None])[0, len(prompt):]
        for k in range(L):                       # Algorithm 2, line 7
            if masked[k]:
                loss = loss - logits[k].log_softmax(-1)[answer[k]] / t / L / 6
    loss.backward()
    grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
    assert grad_norm > 1, 'else it would not be clipped'
    assert log[0]['loss'] == pytest.approx(loss.item(), rel=1e-5)
    assert log[0]['grad_norm'] == pytest.approx(grad_norm, rel=1e-4)
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(optimizer.gradients[0], expected, atol=1e-5, rtol=1e-3)


def test_the_learning_rate_warms_up_in_a_twentieth_and_falls_to_zero(monkeypatch, tmp_path):
    optimizer, _ = trained(monkeypatch, tmp_path, tiny(), PAIRS, '--sft_steps', '40',
                           '--sft_learning_rate', '2')
    assert optimizer.rates[:3] == pytest.approx([2 * 0.5, 2 * 39 / 40, 2 * 38 / 40])
    assert optimizer.rates[20] == pytest.approx(1) and optimizer.rates[39] == pytest.approx(2 / 40)


def test_an_update_that_is_not_finite_is_skipped_and_training_goes_on(monkeypatch, tmp_path):
    def bad_second(pairs, step, *rest):
        batch = draw_batch(pairs, 0, *rest)
        return batch._replace(t=0 * batch.t) if step == 1 else batch
    monkeypatch.setattr(train, 'draw_batch', bad_second)
    optimizer, log = trained(monkeypatch, tmp_path, tiny(), PAIRS, '--sft_steps', '3')
    assert len(log) == 3 and len(optimizer.gradients) == 2
    torch.testing.assert_close(*optimizer.gradients)             # nothing of the bad one is left


def test_answers_are_learnt(monkeypatch, tmp_path):
    _, log = trained(monkeypatch, tmp_path, tiny(), PAIRS, '--sft_steps', '60',
                     '--sft_learning_rate', '1e-2', record=False)
    losses = [line['loss'] for line in log]
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
