"""The table of memory.py counts what the code takes: the 8B's weights, and a small case on a CPU."""
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import memory
from model import Config, LLaDA

# so many tokens that the peak is at the logits, not inside the CPU's own attention kernel
SMALL = dict(d_model=64, n_heads=2, n_kv_heads=2, n_layers=3, mlp_hidden_size=192,
             embedding_size=4096)


def allocated(step, *arguments):
    """The peak of what PyTorch's own profiler saw allocated on the CPU while the step ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        step(*arguments)
    events = [e for e in p.profiler.kineto_results.events() if e.name() == '[memory]']
    events.sort(key=lambda e: e.start_ns())
    now = top = 0
    for event in events:
        now += event.nbytes()
        top = max(top, now)
    return top


@pytest.mark.parametrize('lora_rank', [0, 8])
@pytest.mark.parametrize('checkpointing', [True, False])
def test_the_computed_peak_is_what_a_cpu_allocates(lora_rank, checkpointing):
    with memory.fused_attention():
        computed = memory.peak(memory.grpo_pass, memory.build(SMALL, lora_rank, checkpointing), 4, 40, 24)
    on_cpu = memory.build(SMALL, lora_rank, checkpointing, 'cpu')
    with torch.backends.mkldnn.flags(enabled=False):     # it keeps copies of bfloat16 weights (AMX)
        measured = allocated(memory.grpo_pass, on_cpu, 4, 40, 24)
    assert computed == pytest.approx(measured, rel=0.1)


def test_8b_weights_take_two_bytes_each():
    model = memory.build(memory.CONFIG, 0, True)
    assert memory.size(model.to(torch.bfloat16).parameters()) == 2 * 8_015_581_184


def test_checkpointing_and_adapters_save_what_they_should():
    with memory.fused_attention():
        lora, full = (memory.rows(SMALL, rank, (2, 64, 32, 64, 8)) for rank in (4, 0))
    weights = sum(p.numel() for p in LLaDA(Config(**SMALL)).parameters())
    assert full['weights, trained (float32)'] == full['their gradients'] == 4 * weights
    assert lora['weights, frozen (bfloat16)'] == full['reference policy'] == 2 * weights
    for column in (lora, full):
        for name in [name for name in column if ' with ' in name]:
            assert column[name] < column[name.replace(' with ', ' without ')]
