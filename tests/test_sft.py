"""What sft.py and train.train_sft claim: LLaDA's objective, noise and batches, the corpus, Muon."""
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

import rewards
import sft
import train
from model import LLaDA, nano_tokenizer
from sft import Batch, Corpus, Muon, Traces, add_base_noise, add_noise, masked_loss, sft_loss
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
    masked = labels != -100
    logps = torch.full((2, 3), -torch.inf)       # what is not masked has no say
    logps[masked] = torch.tensor([0.5, 0.25, 0.25]).log()
    assert masked_loss(logps, masked, t, 4).item() == pytest.approx(expected)


# ---- noise ----

def test_t_is_uniform_in_every_row_never_zero_and_spread_over_the_batch():
    answers, g = torch.zeros(4, 1, dtype=torch.long), generator()
    t = torch.cat([add_noise(answers, MASK, g)[2] for _ in range(2000)], dim=1)      # (4, 2000)
    assert t.min() > 0 and t.max() <= 1
    for row in t:
        counts = (row * 10).clamp(max=9.999).long().bincount(minlength=10)
        chi2 = ((counts - 200.0) ** 2 / 200).sum()
        assert chi2 < 33.7, f'99.99 % of uniform draws are below: {counts.tolist()}'
    quarters = (t * 4).ceil().sort(dim=0).values
    assert torch.equal(quarters, torch.tensor([[1.0], [2.0], [3.0], [4.0]]).expand(4, 2000))


def test_every_token_is_masked_on_its_own_with_probability_t():
    answers = tokens(6, 4000)
    noisy, masked, t = add_noise(answers, MASK, generator())
    assert torch.equal(noisy, answers.where(~masked, torch.tensor(MASK)))
    assert (answers != MASK).all(), 'the answers themselves stay'
    assert (masked.float().mean(1, keepdim=True) - t).abs().max() < 4 * (0.25 / 4000) ** 0.5
    pairs = (masked[:, 1:] & masked[:, :-1]).float().mean(1, keepdim=True)
    assert (pairs - t ** 2).abs().max() < 4 * 0.5 / 4000 ** 0.5


def test_noise_comes_from_its_generator_only():
    state = torch.random.get_rng_state()
    first, same, other = (add_noise(tokens(3, 50), MASK, generator(seed))[0] for seed in (0, 0, 1))
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
                         *add_noise(answers, MASK, generator()))

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
    for prompt, answer, noisy, masked, t in zip(*data.one):
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
        assert torch.equal(batch.noisy, batch.answers.masked_fill(batch.masked, MASK))
    assert torch.equal(traces.batch(2).t, batches[2].t)
    other = Traces(pairs, 4, 3, config, 1, 'cpu').batch(2)
    for unlike in (other, batches[1]):
        assert unlike.prompts != batches[2].prompts and not torch.equal(unlike.t, batches[2].t)


def test_traces_that_are_too_long_are_dropped_or_cut_and_counted():
    traces = [('x\n\nSolve 1', '1 2 3'), ('x\n\n' + 'Solve ' * 50, '1'), ('x\n\nSolve 2', '1')]
    pairs, dropped, cut = sft.encode_traces(traces, nano_tokenizer(), 10, 2)
    assert (dropped, cut) == (1, 1)
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

def test_a_minority_of_the_corpus_thinks():
    example = rewards.make('gsm8k', random.Random(0), 'train')
    rng = random.Random(0)
    texts = [sft.demonstration(example, rng, 0.35) for _ in range(1000)]
    assert 0.3 < sum(example['solution'] in text for text in texts) / 1000 < 0.4


def test_the_corpus_has_all_tasks_worked_solutions_first_and_no_weights():
    corpus = Corpus(dict.fromkeys(rewards.TASKS), nano_tokenizer(), 0, 100, 0.35, 32,
                    tiny().config, 20)
    early = [corpus.text(0, i) for i in range(20)]
    assert all('<reasoning>' in answer for _, answer in early)
    assert not all('<reasoning>' in corpus.text(99, i)[1] for i in range(20))
    assert len({prompt.partition('\n\n')[0] for prompt, _ in early}) == len(rewards.TASKS)
    batch = corpus.batch(0)
    assert batch.answers.shape == (20, 32) and (batch.t == 1).all()
    assert torch.equal(batch.noisy, corpus.batch(0).noisy)


def test_base_noise_is_half_sfts_and_half_what_the_sampler_sees():
    noisy, masked = add_base_noise(torch.zeros(4000, 32, dtype=torch.long), MASK, generator())
    assert torch.equal(noisy == MASK, masked)
    even, odd = masked[::2], masked[1::2]
    assert even.float().mean(1).min() > 0.05                     # t ~ U(0.3, 1)
    assert abs(even.float().mean() - 0.65) < 0.02 and abs(even[:, 0].float().mean() - 0.65) < 0.03
    for row in odd:              # none before some place, all from 8 tokens after it
        first = row.long().argmax().item() if row.any() else 32
        assert row[first + 8:].all()
    assert odd.all(1).any() and odd[:, 31].float().mean() > 0.8


# ---- Muon ----

@pytest.mark.parametrize('shape', [(24, 24), (48, 16), (16, 48)])
def test_muon_steps_along_the_orthogonal_part_of_the_gradient(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=generator()) * 1e-3
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    Muon([p], lr=0.1).step()
    step = -p.detach() / (0.1 * max(1, shape[0] / shape[1]) ** 0.5)
    assert F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
    values = torch.linalg.svdvals(step)
    most = values[:len(values) * 3 // 4]         # tiny directions may lag
    assert most.min() > 0.6 and values.max() < 1.3


def test_muon_keeps_momentum_which_checkpoints_save():
    p, fresh = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    optimizer = Muon([p, torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)      # one has no gradient
    p.grad = torch.randn(8, 8, generator=generator(0))
    optimizer.step()
    before = p.detach().clone()
    p.grad = fresh.grad = torch.randn(8, 8, generator=generator(1))
    optimizer.step()
    Muon([fresh], lr=0.1).step()
    assert not torch.allclose(fresh, p - before, atol=1e-3), 'the past must have a say'
    assert 'momentum' in optimizer.state_dict()['state'][0]
