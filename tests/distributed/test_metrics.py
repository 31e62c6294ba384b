"""Figures of shards are those of the whole, and signals are reduced over the processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import gradchain as gc
from gradchain import Group, ParamTransformingOptimizer
from tests.distributed.common import BATCHES, Parameters, copy_of, my_batches, sharded, step_gradients
from tests.distributed.processes import Processes

CHAINS: dict[str, Any] = {
    "pre": gc.chain(gc.monitor(), gc.clip_by_global_norm(0.5), gc.monitor()),
    "update": gc.monitor(),
    "post": gc.monitor(),
}


def read(params: list[Any], grads: list[list[Any]]) -> dict[str, float]:
    optimizer = ParamTransformingOptimizer(params, lr=0.1, **CHAINS)
    optimizer.metrics()
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = copy_of(grad)
        optimizer.step()
    return optimizer.metrics(per_parameter=True)


def read_sharded() -> dict[str, Any]:
    module = sharded()
    figures = read(list(module.parameters()), step_gradients(module, 2, my_batches()))
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in figures.items()}


# With 4 processes, one of them has nothing of the second parameter.
@pytest.mark.parametrize("size", [2, 4])
def test_figures_are_those_of_the_whole(processes: Processes, size: int) -> None:
    module = Parameters()
    expected = read(list(module.parameters()), step_gradients(module, 2, range(BATCHES)))
    assert {"pre/monitor_2/norm/0", "pre/clip_by_global_norm/share_clipped", "post/monitor/rms"} <= expected.keys()
    for actual in processes.run(size, read_sharded):
        assert {key: float(value) for key, value in actual.items()} == pytest.approx(expected, rel=1e-5)


def add_signals(tensor: Tensor, group: Group) -> Tensor:
    total: Tensor = group["loss"] + 100 * group["heads"].amax()
    return tensor + total


def reduced(reduce: str | None) -> Tensor:
    rank = dist.get_rank()
    x = torch.zeros(1, requires_grad=True)
    x.grad = torch.zeros(1)
    optimizer = ParamTransformingOptimizer([x], pre=add_signals, lr=1.0)
    optimizer.signal(loss=float(rank), heads=torch.tensor([1, 2 + rank]), reduce=reduce)
    optimizer.step()
    return x.grad


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", [250.5, 250.5]),
        ("sum", [501.0, 501.0]),
        ("max", [301.0] * 2),
        ("min", [200.0] * 2),
        (None, [200.0, 301.0]),
    ],
)
def test_signals_are_reduced(processes: Processes, reduce: str | None, expected: list[float]) -> None:
    assert [float(grad) for grad in processes.run(2, reduced, reduce)] == expected
