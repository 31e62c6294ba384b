"""A small model, and its training on shards or in one process."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradchain import ParamTransformingOptimizer

BATCHES = 4  # so many gradients are averaged, and the mean is the same, bit for bit, for 1, 2 and 4 processes


class Parameters(nn.Module):
    """Rows that no number of processes divides, and for 4 processes, one that has none."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = ((7, 3), (3, 2, 3), (5,))
        self.params = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, coefficients: list[Tensor]) -> Tensor:
        products = [(p * c).sum() for p, c in zip(self.params, coefficients, strict=True)]
        return torch.stack(products).sum()


def coefficients(step: int, batch: int) -> list[Tensor]:
    """The gradients of a batch, of so few digits that their mean has no rounding, whatever the order of the sum."""
    generator = torch.Generator().manual_seed(10 * step + batch)
    return [(8 * torch.randn(p.shape, generator=generator)).round() / 8 for p in Parameters().params]


def set_gradients(module: nn.Module, step: int, batches: Iterable[int]) -> None:
    """Of the mean over some batches."""
    module.zero_grad()
    batches = list(batches)
    for batch in batches:
        (module(coefficients(step, batch)) / len(batches)).backward()


def my_batches() -> range:
    """Those of this process."""
    return range(dist.get_rank(), BATCHES, dist.get_world_size())


def sharded() -> Parameters:
    module = Parameters()
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def step_gradients(module: nn.Module, steps: int, batches: Iterable[int]) -> list[list[Tensor]]:
    """The gradients of each step: the loss is linear, so that they do not depend on the parameters."""
    found = []
    for step in range(steps):
        set_gradients(module, step, batches)
        found.append([param.grad for param in module.parameters() if param.grad is not None])
    return found


def copy_of(grad: Any) -> Any:
    """A copy that is distributed in the same way; ``clone`` would add up a gradient that is partial."""
    if not isinstance(grad, DTensor):
        return grad.clone()
    place: dict[str, Any] = {"shape": grad.shape, "stride": grad.stride(), "run_check": False}
    return DTensor.from_local(grad.to_local().clone(), grad.device_mesh, grad.placements, **place)


def train(params: list[Any], grads: list[list[Any]], **options: Any) -> list[Any]:
    """The parameters, and what the state has for them, after all steps; the parameters stay as they are."""
    torch.manual_seed(0)
    start = [param.detach().clone() for param in params]
    named = [(str(index), param) for index, param in enumerate(params)]
    optim = ParamTransformingOptimizer(named, **{"lr": 0.25, **options})
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = copy_of(grad)
        optim.step()
    trained = [param.detach().clone() for param in params]
    states = [optim.state[param].get("transforms", {}) for param in params]
    with torch.no_grad():
        for param, value in zip(params, start, strict=True):
            param.copy_(value)
    return [trained, states]
