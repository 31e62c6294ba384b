"""The recipe of ``docs/how-to/train-new-rows.md``, on shards: rows that are masked stay as they are, bit for bit."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from gradchain import ParamTransformingOptimizer, freeze, masked
from tests.distributed.common import BATCHES
from tests.distributed.processes import Processes, join, parts

OLD, NEW = 5, 2  # rows that no number of processes divides


def train() -> list[Any]:
    """The rows before and after, and the other layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(OLD + NEW, 4), nn.Linear(4, 3))
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    is_old = torch.arange(OLD + NEW)[:, None] < OLD
    update = masked(freeze(is_old), "0.weight")
    optimizer = ParamTransformingOptimizer(model.named_parameters(), AdamW, update=update, lr=0.1, weight_decay=0.1)
    before: Any = model[0].weight
    start = parts(before.detach().clone())
    for step in range(4):
        tokens = torch.randint(OLD + NEW, (2 * BATCHES,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens[rank::size]).square().mean().backward()
        optimizer.step()
    return [start, *(parts(param.detach()) for param in model.parameters())]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_old_rows_stay(processes: Processes, size: int) -> None:
    start, rows, *others = join(processes.run(size, train))
    torch.testing.assert_close(rows[:OLD], start[:OLD], rtol=0, atol=0)
    assert bool((rows[OLD:] != start[OLD:]).all())
    _, *expected = join([train()])
    torch.testing.assert_close([rows, *others], expected, rtol=1e-5, atol=1e-6)
