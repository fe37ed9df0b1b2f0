"""The tools of tests/tools run, at tiny sizes, and do what they say; the forks of assets/forks."""
import html.parser
import json
import math
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests/tools'))

import bench                                                                 # noqa: E402
import draw                                                                  # noqa: E402
import exercises                                                             # noqa: E402
import experiments                                                           # noqa: E402
import gpu                                                                   # noqa: E402
import microscope                                                            # noqa: E402
import train                                                                 # noqa: E402

torch.set_num_threads(1)     # matrices this small are slower with more
SMALL_RUN = ('--stages grpo --grpo_steps 1 --num_prompts 1 --num_generations 4 --num_iterations 2 '
             '--eval_n 2 --eval_lengths 32')


def table_rows(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def test_bench_compares_what_computes_the_same(capsys):
    bench.main(['--quick', '--repeats', '1'])
    rows = {(row[0], row[1]): row for row in table_rows(capsys)}
    assert rows['rollout', 'exact'][-1] == '100% of ids'
    for piece in ('logps', 'backward'):
        assert float(rows[piece, 'ours'][-1].removeprefix('within ')) < 1e-3
    assert all(float(row[4]) > 0 for row in rows.values() if row[0] in bench.PIECES)
    ids = bench.rollout_cases(*bench.build(60, 16, True), 8)['textbook']()
    assert len(ids.unique()) > 4, 'a model without opinions would prove nothing'


def test_gpu_counts_memory_and_runs_all_that_it_times(monkeypatch, capsys):
    computed, compute = {}, gpu.computed_memory

    def remembered(config, rank, sizes):
        computed[rank] = compute(config, rank, sizes)
        return computed[rank]
    monkeypatch.setattr(gpu, 'computed_memory', remembered)
    gpu.main(['--tiny'])
    pieces = [row[1] for row in table_rows(capsys) if row[0] == 'tiny']
    assert len(pieces) == 10 and 'rollout, 4 x 2 completions, cache' in pieces
    lora, full = computed[4], computed[0]
    with torch.device('meta'):
        weights = sum(p.numel() for p in gpu.LLaDA(gpu.Config(**gpu.TINY)).parameters())
    assert full['weights, and the reference policy'] == 6 * weights          # float32, bfloat16
    for piece in lora:
        assert lora[piece] < full[piece]
        if ' with ' in piece:
            assert lora[piece] < lora[piece.replace(' with ', ' without ')]


def test_draw_shows_each_token_from_its_step_on(tmp_path):
    path = tmp_path / 'denoise.svg'
    draw.main(['--task', 'math', '--seed', '3', '--out', str(path)])
    svg = xml.etree.ElementTree.parse(path).getroot()
    title, *texts = svg.findall('{*}text')
    assert 'Solve' in title.text
    example = draw.rewards.load_examples('math', 'nano', 'test')[3]
    pieces, steps = draw.denoised('nano', 'math', example)
    shown = [(part, step) for piece, step in zip(pieces, steps) for part in piece.split('\n')
             if part]
    assert [text.text for text in texts] == [part for part, _ in shown]
    begins = {}                                  # step -> when its tokens appear
    for text, (_, step) in zip(texts, shown):
        begins.setdefault(step, set()).add(text.find('{*}animate').get('keyTimes'))
    times = [begins[step] for step in sorted(begins)]
    assert len(times) > 1 and times == [{time} for time in sorted(set().union(*times))]


def idea(path):
    """The drawing's elements by class, after it has been drawn."""
    draw.main(['--idea', '--out', str(path)])
    svg = xml.etree.ElementTree.parse(path).getroot()
    found = {}
    for element in svg.iter():
        kind = element.tag.rpartition('}')[2], element.get('class')
        found.setdefault(kind, []).append(element)
    return found


def test_the_drawing_of_the_idea_has_the_numbers_of_the_code(tmp_path, monkeypatch):
    def shown(kind):
        return [float(element.text) for element in found['text', kind]]

    def lengths(kind, side):
        return torch.tensor([float(element.get(side)) for element in found['rect', kind]])
    found = idea(tmp_path / 'first.svg')
    task = draw.rewards.TASKS['gsm8k']
    scores = [task.reward(completion, draw.PROBLEM) for completion in draw.GROUP]
    assert shown('reward') == scores and len(set(scores)) == 4
    mean = sum(scores) / 4
    assert shown('advantage') == [pytest.approx(score - mean, abs=0.006) for score in scores]
    bars = lengths('advantage', 'width')
    ratios = torch.tensor([abs(score - mean) for score in scores]) / (max(scores) - mean)
    assert (bars / bars[0] - ratios).abs().max() < 0.01

    _, holes, _, logps = draw.one_step('nano', draw.GROUP[0], seed=0)
    p = torch.tensor(logps).exp()
    assert (lengths('probability', 'height') - (40 * p).clamp(min=1)).abs().max() < 0.06
    assert (torch.tensor(shown('percent')) - 100 * p).abs().max() < 0.51
    texts = [element.text for element in found['text', '']]
    assert texts.count('\u2592') == sum(holes) + len(logps)

    right = float(idea(tmp_path / 'again.svg')['svg', None][0].get('viewBox').split()[2])
    for box in found['rect', 'frame']:
        assert float(box.get('x')) + float(box.get('width')) < right
    starts = [(element, element.text) for element in found['text', 'completion']]
    ends = [float(element.get('x')) - draw.CHAR * 4 for element in found['text', 'reward']]
    for (element, words), end in zip(starts, ends):
        assert float(element.get('x')) + draw.CHAR * len(words) < end

    def grade(completion, example):              # pays for nothing but the guess
        return float('15' in completion), False
    monkeypatch.setitem(draw.rewards.TASKS, 'gsm8k', task._replace(grade=grade))
    found = idea(tmp_path / 'other.svg')
    assert shown('reward') == [0, 0, 1, 0]
    assert shown('advantage') == [-0.25, -0.25, 0.75, -0.25]


class Page(html.parser.HTMLParser):
    """The attributes of a page's elements, and the JSON that it holds."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.json, self.in_json = set(), '', False
        self.feed(text)
        self.data = json.loads(self.json)

    def handle_starttag(self, tag, attributes):
        self.attributes |= {name for name, _ in attributes}
        self.in_json = ('type', 'application/json') in attributes

    def handle_endtag(self, tag):
        self.in_json = False

    def handle_data(self, text):
        if self.in_json:
            self.json += text


def test_microscope_shows_the_updates_of_a_mixed_and_a_flat_group(tmp_path, monkeypatch):
    path = tmp_path / 'microscope.html'
    loaded = microscope.load('nano')
    before = {name: p.clone() for name, p in loaded[0].named_parameters()}
    monkeypatch.setattr(microscope, 'load', lambda *_, **__: loaded)
    epsilon = 0.02                               # so narrow that three updates are clipped
    microscope.main(['--out', str(path), '--num_generations', '4', '--num_iterations', '3',
                     '--epsilon', str(epsilon)])
    for name, p in loaded[0].named_parameters():                 # each group begins with these
        assert p.equal(before[name])
    page = Page(path.read_text())
    assert path.stat().st_size < 500_000
    assert not page.attributes & {'src', 'href'}
    template = microscope.TEMPLATE.read_text()
    for outside in ('://', 'url(', '@import', 'fetch', 'innerHTML', 'eval'):
        assert outside not in template
    mixed, flat = page.data['groups']
    assert flat['flat'] and not mixed['flat']
    assert page.data['settings']['epsilon'] == epsilon

    defaults = train.defaults('nano', 'countdown')
    for group in (mixed, flat):
        lengths = torch.tensor(group['lengths'])
        counts = torch.arange(defaults['gen_length']) < lengths[:, None]     # (G, L)
        rewards = torch.tensor(group['rewards'])
        assert torch.tensor(group['advantages']).allclose(rewards - rewards.mean(), atol=1e-3)
        for name in ('tokens', 'commit_steps'):
            assert all(len(row) == defaults['gen_length'] for row in group[name])
        assert torch.tensor(group['commit_steps']).max() < defaults['steps']
        # the sampler's confidence by its own code, and by StepMerge with a view per step
        confidence = torch.tensor(group['confidence'])
        along_rollout = torch.tensor(group['along_rollout'])
        assert (confidence - along_rollout.exp())[counts].abs().max() < 1e-3
        one_step = torch.tensor(group['one_step'])
        assert one_step.shape == counts.shape and not one_step[~counts].any()

        assert len(group['updates']) == 3
        for update in group['updates']:
            for row in update['prompt_mask']:
                assert len(row) == len(group['prompt'])
            # what the page marks as cut is what the loss has counted
            clip = torch.tensor(update['clip'])
            cut = update['stats']['clip_high'] + update['stats']['clip_low']
            assert clip[counts].float().mean().item() == pytest.approx(cut, abs=1e-3)
            ratio = torch.tensor(update['ratio'])
            assert ratio[counts].mean().item() == pytest.approx(update['stats']['ratio'], abs=1e-3)
            assert (ratio[~counts] == 1).all() and not clip[~counts].any()
        first, second, _ = group['updates']
        assert first['prompt_mask'] != second['prompt_mask']
        assert (torch.tensor(first['ratio']) == 1).all()         # no step has been made
        assert first['old'] != second['old']

    for update in flat['updates']:               # and none is ever made
        assert (torch.tensor(update['ratio_after']) == 1).all() and update['grad_norm'] == 0
    assert any(map(any, mixed['updates'][1]['clip']))
    # a step raises its own objective
    gain = torch.tensor(mixed['updates'][0]['ratio_after']) - 1              # 0 after the end
    assert (torch.tensor(mixed['advantages'])[:, None] * gain).mean() > 0


def test_microscope_is_safe_from_what_a_model_writes():
    groups = [dict(tokens=[['</script><script>alert(1)</script>', '<!--', '$DATA']])]
    assert Page(microscope.page({}, groups)).data['groups'] == groups


def test_experiments_runs_a_cell_once_and_the_study(tmp_path, monkeypatch, capsys):
    runs = []

    def python(script, *flags):                  # in this process, which is faster
        runs.append(script)
        train.main([str(flag) for flag in flags])
    monkeypatch.setattr(experiments, 'python', python)
    monkeypatch.setattr(experiments, 'learning_figure', lambda *_: None)
    monkeypatch.setattr(experiments, 'results_figure', lambda *_: None)
    monkeypatch.setattr(experiments, 'ESTIMATORS', {
        'one_step, p_mask 0': ('one_step', 1, 0), 'coupled': ('coupled', 2, 0.15),
        'one_step, p_mask 0.15': ('one_step', 1, 0.15)})
    flags = ['--quick', '--out', str(tmp_path), '--kinds', 'grpo', '--tasks', 'gsm8k']
    for _ in range(2):
        experiments.main([*flags, '--flags', SMALL_RUN])
    assert runs == ['train.py']
    [row] = experiments.rows_of(tmp_path / 'quick/nano.jsonl')
    assert list(row['results']) == ['constant', 'base', 'grpo']
    assert len(row['curve']['reward']) == 1

    experiments.methods_table([row | dict(kind='sft-wd1', tasks='countdown', results={})], [])
    assert '| wd1 | - | - | - |  |' in capsys.readouterr().out, 'no run from the base yet'

    args = experiments.argparse.Namespace(out=tmp_path, truth=tmp_path / 'truth.jsonl')
    experiments.truth(args, 0, 'gsm8k', 'base', num_groups=1, draws=2)
    [row] = experiments.rows_of(args.truth)
    assert row['exact_logp'] < 0
    for values in row['estimators'].values():
        assert all(math.isfinite(value) for value in values.values())

    args.parts = tmp_path / 'parts.jsonl'
    experiments.parts_of_bias(args, 0, 'gsm8k', 'base', num_prompts=1, num_samples=16)
    [row] = experiments.rows_of(args.parts)
    assert row['d1'] < row['one_step'] < row['own'] < 0 and row['exact'] < 0
    row.update(exact=-3.0, own=-5.0, one_step=-9.0, d1=-17.0)
    experiments.parts_table([row])
    assert capsys.readouterr().out.endswith('| -3.0 | -2.0 | -4.0 | -8.0 | -14.0 |\n')

    monkeypatch.setattr(experiments, 'NOISY', ('one_step, p_mask 0',))
    args.noise = tmp_path / 'noise.jsonl'
    experiments.gradient_noise(args, 0, 'gsm8k', 'base', num_groups=3)
    [row] = experiments.rows_of(args.noise)
    assert row['people']['groups'] == 3
    assert abs(row['nobody']['exact']['cosine']) == pytest.approx(1, abs=1e-3)
    experiments.noise_table([row])
    assert '| people |' in capsys.readouterr().out

    args.drift = tmp_path / 'drift.jsonl'
    monkeypatch.setattr(experiments, 'trained_model', lambda *_: tmp_path / 'changed')
    model, _ = experiments.load('nano')
    for scale in (1, 0.8):                       # of the head: all tokens become less sure
        model.ff_out.weight.data *= scale
        train.save_model(tmp_path / 'changed', model, 'nano')
        experiments.drift(args, 0, 'countdown', 'grpo', num_prompts=2, num_samples=2)
    same, other = experiments.rows_of(args.drift)
    assert same['kl'] == 0 < other['kl']


def test_signal_is_told_from_noise():
    """Noise of norm 2 on a signal of norm 1; the truth's signal is at 60 degrees from it."""
    noise = 2 * torch.randn(2, 400, 1000, generator=torch.Generator().manual_seed(0)) / 1000 ** 0.5
    signals = torch.zeros(2, 1000)
    signals[0, 0], signals[1, :2] = 1, torch.tensor([0.5, 0.75 ** 0.5])
    found = experiments.signal_and_noise(signals[0] + noise[0], signals[1] + noise[1])
    assert abs(found['share'] - 1 / 5) < 3 * found['share_error'] < 0.05
    assert abs(found['cosine'] - 1 / 2) < 3 * found['cosine_error'] < 0.15


def test_what_the_places_of_rollouts_say_by_themselves():
    """A fair coin, then a token that is always the same, and in half of the rows another coin."""
    ids = torch.tensor([[0, 5, 2], [1, 5, 2], [0, 5, 3], [1, 5, 3]] * 25)
    mask = torch.ones(100, 3, dtype=torch.bool)
    corrections = 2 / (2 * 100)                  # one for each coin
    assert experiments.own_places(ids, mask) == pytest.approx(-2 * math.log(2) - corrections)
    mask[::2, 2] = False                         # the rows have ended
    assert experiments.own_places(ids, mask) == pytest.approx(-1.5 * math.log(2) - corrections)


def test_every_stub_of_the_exercises_fails_and_says_how_it_is_graded(tmp_path):
    exercises.write(tmp_path / 'copy')
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'exercises.py']
    done = subprocess.run(command, cwd=tmp_path / 'copy', capture_output=True, text=True)
    number = len(exercises.EXERCISES)
    assert 10 <= number <= 12
    assert f'{number} failed' in done.stdout and 'passed' not in done.stdout, done.stdout
    sheet = (tmp_path / 'copy/EXERCISES.md').read_text()
    for _, function, *_ in exercises.EXERCISES:
        assert f'-k test_{function}`' in sheet and hasattr(exercises, f'test_{function}')
    for command in sheet.split('`'):             # whatever flags it names exist
        flags = command.replace('\n', ' ').replace('"', '').split()
        if flags and flags[0].startswith('--'):
            known = dict(train.defaults('nano'))
            assert {flag.removeprefix('--') for flag in flags if flag.startswith('--')} <= {*known}


def test_a_grader_needs_only_the_exercises_before_it(monkeypatch):
    """And our own code passes it, without what comes later."""
    def empty(*_, **__):
        raise NotImplementedError
    functions = [function for _, function, *_ in exercises.EXERCISES]
    modules = [sys.modules[name] for name in ('model', 'sample', 'loglik', 'grpo', 'sft', 'train')]
    for number, function in enumerate(functions, 1):
        with monkeypatch.context() as patches:
            for later in functions[number:]:
                for module in modules:
                    if hasattr(module, later):
                        patches.setattr(module, later, empty)
            getattr(exercises, f'test_{function}')()


FORKS = dict(                                    # patch -> flags that only it knows
    task='--task counting', loss='--loss regression', estimator='--estimator both',
    decay='')


@pytest.mark.parametrize('fork', FORKS)
def test_a_fork_applies_is_short_and_changes_the_run(tmp_path, monkeypatch, fork):
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / 'assets/nano', tmp_path / 'assets/nano')
    patch = ROOT / f'assets/forks/{fork}.patch'
    added = [line for line in patch.read_text().split('\n') if line[:1] == '+']
    assert 0 < len(added) <= 45
    subprocess.run(['git', 'apply', patch], cwd=tmp_path, check=True)

    # the patched modules in place of ours, for as long as this test lasts
    for path in tmp_path.glob('*.py'):
        monkeypatch.delitem(sys.modules, path.stem)
    monkeypatch.syspath_prepend(tmp_path)
    import train as patched_train
    assert Path(patched_train.__file__).parent == tmp_path
    # with a KL term groups of equal rewards have passes, too
    flags = f'{SMALL_RUN} {FORKS[fork]} --beta 0.04 --grpo_steps 2 --out {tmp_path} --name run'
    patched_train.main(flags.split())
    log = experiments.rows_of(tmp_path / 'run/log.jsonl')
    assert [row['stage'] for row in log] == ['grpo', 'grpo'] and log[0]['grad_norm'] > 0

    if fork == 'decay':                          # the rate of the last of two iterations
        optimizer = torch.load(tmp_path / 'run/grpo.pt')['optimizer']
        assert optimizer['param_groups'][0]['lr'] == 1e-5
    else:                                        # our code knows no such flag's value
        with pytest.raises((SystemExit, ValueError)):
            train.parse(FORKS[fork].split())
