"""What sft.py and train.train_sft claim: LLaDA's objective, noise and batches, the corpus."""
import json
import math
import random
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

import rewards
import sft
import train
from model import LLaDA, nano_tokenizer
from sft import Batch, Corpus, Traces, draw_base_masks, draw_masks, masked_loss, sft_loss
from tiny import EOS, GOLDEN, MASK, V, says, tiny, tokens


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the loss ----

def test_loss_and_gradient_match_the_official_code():
    golden = load_file(GOLDEN / 'sft.safetensors')
    model = LLaDA.from_pretrained(GOLDEN / 'tiny-llada')
    expected = json.loads((GOLDEN / 'sft.json').read_text())
    num_prompt_tokens = golden['train.num_prompt_tokens'].item()
    for t in (golden['train.t'], golden['train.t'][:, :1]):      # (B, T) or (B, 1)
        model.zero_grad()
        logits = model(golden['train.noisy'])
        loss = sft_loss(logits, golden['train.labels'], t, num_prompt_tokens)
        loss.backward()
        assert loss.item() == pytest.approx(expected['loss'], rel=1e-5)
        grad_norm = clip_grad_norm_(model.parameters(), math.inf).item()
        assert grad_norm == pytest.approx(expected['grad_norm'], rel=1e-4)


def test_loss_by_hand():
    logits = torch.zeros(2, 3, 4)
    logits[0, 1, 0] = math.log(3)                # probabilities 1/2, 1/6, 1/6, 1/6
    labels = torch.tensor([[-100, 0, 2], [-100, -100, 3]])
    t = torch.tensor([[0.5], [0.25]])
    expected = (math.log(2) / 0.5 + math.log(4) / 0.5 + math.log(4) / 0.25) / (6 - 2)
    assert sft_loss(logits, labels, t, 2).item() == pytest.approx(expected)
    assert torch.equal(sft_loss(logits, labels, t), sft_loss(logits, labels, t, 0))
    masked = labels != -100
    logps = torch.full((2, 3), -torch.inf)       # what is not masked has no say
    logps[masked] = torch.tensor([0.5, 0.25, 0.25]).log()
    assert masked_loss(logps, masked, t, 4).item() == pytest.approx(expected)


# ---- noise ----

def test_t_is_uniform_in_every_row_never_zero_and_spread_over_the_batch():
    answers, g = torch.zeros(4, 1, dtype=torch.long), generator()
    t = torch.cat([draw_masks(answers, g)[1] for _ in range(2000)], dim=1)      # (4, 2000)
    assert t.min() > 0 and t.max() <= 1
    for row in t:
        counts = (row * 10).clamp(max=9.999).long().bincount(minlength=10)
        chi2 = ((counts - 200.0) ** 2 / 200).sum()
        assert chi2 < 33.7, f'99.99 % of uniform draws are below: {counts.tolist()}'
    quarters = (t * 4).ceil().sort(dim=0).values
    assert torch.equal(quarters, torch.tensor([[1.0], [2.0], [3.0], [4.0]]).expand(4, 2000))


def test_every_token_is_masked_on_its_own_with_probability_t():
    answers = tokens(6, 4000)
    masked, t = draw_masks(answers, generator())
    assert (masked.float().mean(1, keepdim=True) - t).abs().max() < 4 * (0.25 / 4000) ** 0.5
    pairs = (masked[:, 1:] & masked[:, :-1]).float().mean(1, keepdim=True)
    assert (pairs - t ** 2).abs().max() < 4 * 0.5 / 4000 ** 0.5


def test_noise_comes_from_its_generator_only():
    state = torch.random.get_rng_state()
    first, same, other = (draw_masks(tokens(3, 50), generator(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- train_sft ----

PAIRS = [(tokens(n, seed=n).tolist(), tokens(m, seed=50 + m).tolist())
         for n, m in ((4, 3), (2, 6), (5, 1), (2, 8), (7, 2), (3, 5))]
L = 8                                            # answer tokens, with the eos padding


class Fixed:
    """The same batch at every step, but for the steps in `bad`, whose loss is infinite."""
    def __init__(self, bad=()):
        self.bad = bad
        answers = sft.right_pad([answer for _, answer in PAIRS], L, EOS, 'cpu')
        self.one = Batch([prompt for prompt, _ in PAIRS], answers,
                         *draw_masks(answers, generator()))

    def batch(self, step):
        t = self.one.t
        return self.one._replace(t=torch.zeros_like(t) if step in self.bad else t)


class Recorder(torch.optim.SGD):
    """Leaves the weights alone; keeps the gradients and the learning rate of every update."""
    def __init__(self, model):
        super().__init__(model.parameters(), lr=2.0)
        self.gradients, self.rates = [], []

    def step(self):
        [group] = self.param_groups
        self.gradients.append([p.grad.clone() for p in group['params'] if p.grad is not None])
        self.rates.append(group['lr'])


def trained(folder, model, data, steps, *flags, optimizer=None):
    """Trains through train.train_sft; returns the optimizer and the log."""
    args = train.parse(flags)
    args.folder = str(folder)
    optimizer = optimizer or Recorder(model)
    train.train_sft(args, 'sft', model, [optimizer], data, steps)
    return optimizer, train.read_log(args, 'log.jsonl')


@pytest.mark.parametrize('micro_batch', [1, 2, 4, 64])
def test_the_gradient_is_that_of_sft_loss_however_the_batch_is_cut(tmp_path, micro_batch):
    """Prompts are given whole, one by one: padding has no say, and no token of them is masked."""
    model, data, loss = tiny(), Fixed(), 0
    sizes = []
    hook = model.wte.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    optimizer, log = trained(tmp_path, model, data, 1, '--micro_batch', str(micro_batch))
    hook.remove()
    assert max(sizes) == min(micro_batch, 6) and sum(sizes) == 6
    for prompt, answer, masked, t in zip(*data.one):
        noisy = answer.where(~masked, torch.tensor(MASK))
        ids = torch.cat((torch.tensor(prompt), noisy))[None]
        labels = torch.full_like(ids, -100)
        labels[0, len(prompt):][masked] = answer[masked]
        loss = loss + sft_loss(model(ids), labels, t[None], len(prompt)) / 6
    loss.backward()
    grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
    assert grad_norm > 1, 'else it would not be clipped'
    assert log[0]['loss'] == pytest.approx(loss.item(), rel=1e-5)
    assert log[0]['grad_norm'] == pytest.approx(grad_norm, rel=1e-4)
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(optimizer.gradients[0], expected, atol=1e-5, rtol=1e-3)


def test_the_expected_loss_is_the_mean_cross_entropy_padding_included(tmp_path):
    """1/t undoes the mask rate: over the noise, every answer token counts once."""
    logits = torch.linspace(-1.0, 2.0, V)
    model = says(logits.tolist(), n_layers=1)
    data = Traces([([5, 6], [3, 30, 7])] * 3000, 3000, L, model.config, 0, 'cpu')
    _, log = trained(tmp_path, model, data, 2, '--micro_batch', '3000')
    expected = -logits.log_softmax(-1)[torch.tensor([3, 30, 7] + [EOS] * 5)].mean().item()
    assert sum(line['loss'] for line in log) / 2 == pytest.approx(expected, rel=0.03)


def test_the_learning_rate_warms_up_in_a_twentieth_and_falls_to_zero(tmp_path):
    optimizer, _ = trained(tmp_path, tiny(), Fixed(), 40)
    assert optimizer.rates[:3] == pytest.approx([2 * 0.5, 2 * 39 / 40, 2 * 38 / 40])
    assert optimizer.rates[20] == pytest.approx(1) and optimizer.rates[39] == pytest.approx(2 / 40)


def test_an_update_that_is_not_finite_is_skipped_and_training_goes_on(tmp_path):
    optimizer, log = trained(tmp_path, tiny(), Fixed(bad=[1]), 3)
    assert len(log) == 3 and len(optimizer.gradients) == 2
    torch.testing.assert_close(*optimizer.gradients)             # nothing of the bad one is left


def test_answers_are_learnt(tmp_path):
    model = tiny()
    data = Traces(PAIRS, 6, L, model.config, 0, 'cpu')
    _, log = trained(tmp_path, model, data, 60, optimizer=train.adamw(model, 1e-2, 0.0))
    losses = [line['loss'] for line in log]
    assert sum(losses[-10:]) < sum(losses[:10]) / 2


# ---- the SFT set ----

def test_traces_give_every_pair_once_per_epoch():
    pairs, config = [([i], [i, i]) for i in range(2, 14)], tiny().config
    traces = Traces(pairs, 4, 3, config, 0, 'cpu')
    batches = [traces.batch(step) for step in range(6)]
    order = [prompt[0] for batch in batches for prompt in batch.prompts]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(2, 14))
    assert order[:12] != order[12:]
    for batch in batches:
        assert batch.answers.tolist() == [[i, i, EOS] for [i] in batch.prompts]
        assert batch.masked.shape == batch.answers.shape and batch.masked.any()
    assert torch.equal(traces.batch(2).t, batches[2].t)
    other = Traces(pairs, 4, 3, config, 1, 'cpu').batch(2)
    for unlike in (other, batches[1]):
        assert unlike.prompts != batches[2].prompts and not torch.equal(unlike.t, batches[2].t)


def test_traces_that_are_too_long_are_dropped_or_cut_and_counted():
    traces = [('x\n\nSolve 1', '1 2 3'), ('x\n\n' + 'Solve ' * 50, '1'), ('x\n\nSolve 2', '1')]
    pairs, cut = sft.encode_traces(traces, nano_tokenizer(), 10, 2)
    assert cut == 1
    assert [len(answer) for _, answer in pairs] == [2, 1]


def test_s1k_becomes_tagged_text(tmp_path):
    row = dict(question='Why?', thinking_trajectories=[' because ', 'x'], solution='or')
    file = tmp_path / 's1k.jsonl'
    file.write_text(json.dumps(dict(row, attempt=' so ')) + '\n' + json.dumps(row))
    pairs = sft.load_s1k(str(file))
    assert [answer for _, answer in pairs] == [rewards.tagged('because', reply)
                                               for reply in ('so', 'or')]
    assert all(prompt.endswith('\n\nWhy?') for prompt, _ in pairs)
    for bad in (dict(row, thinking_trajectories=[]), dict(row, attempt=5)):
        with pytest.raises(ValueError):
            sft.s1k_row(bad)


# ---- the nano corpus ----

def test_who_asks_decides_how_many_think():
    example, rng = rewards.make('gsm8k', random.Random(0), 'train'), random.Random(0)
    for asker, share in sft.THINKING_SHARE.items():
        texts = [sft.demonstration(dict(example, asker=asker), rng)[1] for _ in range(2000)]
        thinking = sum(example['solution'] in text for text in texts) / 2000
        assert abs(thinking - share) < 0.04
    assert set(sft.THINKING_SHARE) == set(rewards.ASKERS)
    guesses = [text for text in texts if example['solution'] not in text]
    assert any('<answer>' in text for text in guesses)
    assert any('<answer>' not in text for text in guesses)


def test_a_textbook_shows_its_steps_and_nobody_asks():
    for task in rewards.TASKS:
        example = rewards.make(task, random.Random(0), 'train')
        question, answer = sft.worked(example)
        assert example['question'] == f"{example['asker']}: {question}"
        assert answer == rewards.tagged(example['solution'], example['reply'])


def corpus(steps=100, batch_size=40):
    return Corpus(dict.fromkeys(rewards.TASKS), nano_tokenizer(), 0, steps, 32, tiny().config,
                  batch_size)


def test_the_corpus_has_sums_a_textbook_and_late_people():
    early, late = ([corpus().text(step, i) for i in range(40)] for step in (0, 99))
    for texts in (early, late):
        for prompt, answer in texts[::4]:
            assert prompt == '' and answer.count('\n') == 4
            for line in answer.split('\n'):
                left, right = line.split('=')
                assert eval(left.replace('/', '//')) == int(right)
    asked = [prompt.partition(':')[0] in rewards.ASKERS for prompt, _ in late]
    assert not any(prompt.partition(':')[0] in rewards.ASKERS for prompt, _ in early)
    assert 0.2 < sum(asked) / 30 < 0.8, 'half of the late texts that are no sums'
    assert all('<reasoning>' in answer for prompt, answer in early if prompt)


@pytest.mark.parametrize('tasks', [1, 2, 3, 4, 5])
def test_every_task_has_an_equal_share_of_the_texts(tasks, monkeypatch):
    texts = Corpus(dict.fromkeys('abcde'[:tasks]), None, 0, 100, 32, None)
    seen = []
    monkeypatch.setattr(texts, 'sums', lambda rng: '')
    monkeypatch.setattr(texts, 'example', lambda task, rng: seen.append(task))
    monkeypatch.setattr(sft, 'worked', lambda example: None)
    for i in range(80):
        texts.text(0, i)
    assert [seen.count(task) for task in 'abcde'[:tasks]] == [60 / tasks] * tasks


def test_a_batch_of_the_corpus_has_a_length_of_its_own_and_no_weights():
    lengths = {corpus().batch(step).answers.size(1) for step in range(30)}
    assert lengths == {32, 48, 64}
    batch, equals = corpus().batch(0), nano_tokenizer().convert_tokens_to_ids('=')
    assert (batch.t == 1).all() and torch.equal(batch.masked, corpus().batch(0).masked)
    for row in range(0, 40, 4):                                  # sums: what follows a = is masked
        after = (batch.answers[row] == equals).nonzero().flatten() + 1
        assert batch.masked[row].nonzero().flatten().tolist() == after.tolist()


def test_base_noise_is_half_sfts_and_half_what_the_sampler_sees():
    ends = torch.full((4000,), 20)
    masked = draw_base_masks(torch.zeros(4000, 32, dtype=torch.long), ends, generator())
    even, odd = masked[::2], masked[1::2]
    assert even.float().mean(1).min() > 0.05                     # t ~ U(0.3, 1)
    assert abs(even.float().mean() - 0.65) < 0.02 and abs(even[:, 0].float().mean() - 0.65) < 0.03
    for row in odd:              # all from 8 tokens after the first mask, which is within the text
        first = row.long().argmax().item()
        assert row[first + 8:].all() and row[20 + 8:].all()
    # the place is even over -8 to 20, and half of the 8 tokens after it are masked
    for position, seen in ((0, 24), (10, 14), (19, 5), (26, 1)):
        assert abs((~odd[:, position]).float().mean() - seen / 28) < 0.04
    alone = odd[:, 1:8].all(1) & ~odd[:, 0]
    assert odd.all(1).any() and alone.any(), 'nothing, or only the first token, is in sight'


def test_a_reply_is_hidden_while_a_step_is():
    answers = torch.tensor([[5, 9, 6, 7]] * 3)                   # 9 ends the reasoning
    masked = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    expected = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(sft.hide_replies(answers, masked, 9), expected)


def test_sft_traces_are_true_and_of_no_task():
    traces = [sft.clean_trace(random.Random(i)) for i in range(50)]
    for prompt, answer in traces:
        assert not re.search('Solve|left|Numbers|puzzle|assert', prompt)
        steps = answer.split('<reasoning>\n')[1].split('\n</reasoning>')[0]
        for line in steps.split('\n'):
            parts = line.split('=')
            for left, right in zip(parts, parts[1:]):
                assert eval(left) == int(re.match('[0-9]+', right)[0])
        if 'larger' not in prompt:
            assert parts[-1] == rewards.final_answer(answer)
