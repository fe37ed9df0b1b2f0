"""The table of memory.py counts what the code takes: the 8B's weights, a small case on a CPU."""
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import memory
import train

# so many tokens that the peak is at the logits, not inside the CPU's own attention kernel
SMALL = dict(d_model=64, n_heads=2, n_kv_heads=2, n_layers=3, mlp_hidden_size=192,
             embedding_size=4096)


def allocated(step, *arguments):
    """The peak of what PyTorch's own profiler saw allocated on the CPU while the step ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        # oneDNN keeps a reordered copy of each bfloat16 weight on CPUs with AMX
        with torch.backends.mkldnn.flags(enabled=False):
            step(*arguments)
    events = [e for e in p.profiler.kineto_results.events() if e.name() == '[memory]']
    events.sort(key=lambda e: e.start_ns())
    now = top = 0
    for event in events:
        now += event.nbytes()
        top = max(top, now)
    return top


pytestmark = pytest.mark.filterwarnings('ignore:TF32')     # of those flags
PASS = (memory.grpo_pass, 4, 40, 24)


@pytest.mark.parametrize('lora_rank, checkpointing, step', [
    (0, True, PASS), (0, False, PASS), (8, True, PASS), (8, False, PASS),
    (0, True, (memory.adamw_step,)), (8, True, (memory.adamw_step,)), (8, True, (memory.merge,))])
def test_the_computed_peak_is_what_a_cpu_allocates(lora_rank, checkpointing, step):
    function, *arguments = step
    on_meta, on_cpu = (memory.build(SMALL, lora_rank, device) for device in ('meta', 'cpu'))
    on_meta.gradient_checkpointing = on_cpu.gradient_checkpointing = checkpointing
    with memory.fused_attention():
        computed = memory.peak(function, on_meta, *arguments)
    assert computed == pytest.approx(allocated(function, on_cpu, *arguments), rel=0.1)


def test_8b_weights_take_two_bytes_each():
    model = memory.build(memory.CONFIG, 0)
    assert memory.size(model.to(torch.bfloat16).parameters()) == 2 * 8_015_581_184


def test_checkpointing_and_adapters_save_what_they_should():
    with memory.fused_attention():
        lora, full = (memory.rows(SMALL, rank, (2, 64, 32, 64, 8)) for rank in (4, 0))
    weights = sum(p.numel() for p in memory.build(SMALL, 0).parameters())
    assert full['weights, trained (float32)'] == full['their gradients'] == 4 * weights
    assert lora['weights, frozen (bfloat16)'] == full['reference policy'] == 2 * weights
    assert full["AdamW's two moments"] == 8 * weights
    assert full["AdamW's temporaries"] == pytest.approx(4 * weights, rel=0.01)
    for column in (lora, full):
        for name in [name for name in column if ' with ' in name]:
            assert column[name] < column[name.replace(' with ', ' without ')]


def test_adapters_are_merged_one_layer_at_a_time():
    few, many = (memory.build(dict(SMALL, n_layers=n), 8) for n in (2, 6))
    assert memory.peak(memory.merge, few) == memory.peak(memory.merge, many)


@pytest.mark.parametrize('micro_batch, gen_length', [(1, 32), (8, 32), (1, 256)])
def test_a_gpu_with_room_computes_activations_once(monkeypatch, micro_batch, gen_length):
    shape = f'--max_prompt 64 --sft_length 64 --gen_length {gen_length} --micro_batch {micro_batch}'
    args = train.parse(['--model', 'GSAI-ML/LLaDA-8B-Instruct', *shape.split()])
    small = dict(SMALL, embedding_size=64)       # logits are made for some rows at a time
    config = memory.Config(**small)
    assert args.gradient_checkpointing is None and not train.activations_fit(args, config)
    args.device = 'cuda'
    model = memory.build(small, 8)
    with memory.fused_attention():
        needed = max(memory.peak(memory.grpo_pass, model, 6, 64, gen_length),
                     memory.peak(memory.grpo_pass, model, micro_batch, 64, 64))
    for free, fits in ((needed, False), (3 * needed, True)):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (free, 10 * free))
        assert train.activations_fit(args, config) == fits
    args.lora_rank = 0
    assert not train.activations_fit(args, config), 'the optimizer needs the room'
