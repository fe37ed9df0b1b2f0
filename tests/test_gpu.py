"""gpu.py on the CPU: the same table, of a tiny model; and the shapes that it is for."""
import math

import torch

import gpu
from model import Config, LLaDA


def test_the_table_has_every_piece_and_a_nano_run_ends(capsys):
    gpu.main(['--tiny'])
    out = capsys.readouterr().out
    rows = [line.split(' | ') for line in out.split('\n') if line.startswith('| tiny')]
    pieces = ' '.join(row[1] for row in rows)
    for piece in ('rollout, 4 x 2', 'cache', 'log-probs', 'update, with', 'SFT update, without',
                  'compiled', 'merging', 'writing'):
        assert piece in pieces
    assert all(math.isfinite(float(row[3])) for row in rows)
    [gap] = [float(row[1].split()[-1]) for row in rows if 'differ by' in row[1]]
    assert gap < 1e-4
    assert 'a nano run of 2 iterations' in out


def test_the_small_shape_is_that_of_qwen3_0_6b():
    with torch.device('meta'):
        model = LLaDA(Config(**gpu.QWEN3))
    assert sum(p.numel() for p in model.parameters()) == 596_049_920      # its own count
