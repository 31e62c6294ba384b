"""Replicas stay the same, and ``ZeroRedundancyOptimizer`` can be inside or around."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

import gradchain as gc
from gradchain import ParamTransformingOptimizer, chain
from tests.distributed.processes import Processes, join, parts

CHAINS: dict[str, Any] = {
    "pre": chain(gc.skip_nonfinite(), gc.add_noise(0.01), gc.dropout(0.1), gc.clip_by_global_norm(0.5), gc.ema(0.9)),
    "update": chain(gc.cautious(), gc.trust_ratio()),
    "post": chain(gc.project_l2_ball(1.5), gc.param_ema(0.5)),
}
X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.ones(8, 3)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def my_share() -> slice:
    size = len(X) // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def train(network: nn.Module, optim: Any, rows: slice = slice(None), steps: int = 4) -> list[Tensor]:
    for _ in range(steps):
        optim.zero_grad(set_to_none=False)
        mse_loss(network(X[rows]), Y[rows]).backward()
        optim.step()
    return [param.detach() for param in network.parameters()]


def wrapped(network: nn.Module, **chains: Any) -> ParamTransformingOptimizer:
    return ParamTransformingOptimizer(network.parameters(), Adam, lr=0.01, **chains)


def train_replica() -> list[Any]:
    torch.manual_seed(dist.get_rank())  # nothing depends on the default generator
    network = DistributedDataParallel(make_network(), gradient_as_bucket_view=True)
    optim = wrapped(network, **CHAINS)
    train(network, optim, my_share(), steps=2)  # after the first step, the buckets are made anew
    views = [param.grad.data_ptr() for param in network.parameters() if param.grad is not None]
    trained = train(network, optim, my_share(), steps=2)
    same = [param.grad.data_ptr() for param in network.parameters() if param.grad is not None] == views
    states = [optim.state[param]["transforms"] for param in network.parameters()]
    return [parts([trained, states]), same]


@pytest.mark.parametrize("size", [2, 4])
def test_replicas(processes: Processes, size: int) -> None:
    network = make_network()
    expected = train(network, wrapped(network, **CHAINS))
    results = processes.run(size, train_replica)
    assert all(same for _, same in results)
    trained, _ = join([result for result, _ in results])  # where all must be equal, bit for bit
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)


def zero(*args: Any, **kwargs: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # where it was imported before: that warns

    return ZeroRedundancyOptimizer(*args, **kwargs)


def train_with_zero_inside(file: str, is_cut: bool) -> list[Any]:
    network = DistributedDataParallel(make_network())
    inner = zero(network.parameters(), Adam, lr=0.01)
    optim = ParamTransformingOptimizer(InnerOpt=inner, **CHAINS)
    train(network, optim, my_share(), steps=2)
    if is_cut:
        inner.consolidate_state_dict()
        if dist.get_rank() == 0:
            torch.save(optim.state_dict(), file)
        dist.barrier()
        optim = ParamTransformingOptimizer(InnerOpt=zero(network.parameters(), Adam, lr=0.01), **CHAINS)
        optim.load_state_dict(torch.load(file))
    return [parts(train(network, optim, my_share(), steps=2))]


@pytest.mark.parametrize("is_cut", [False, True])
def test_zero_inside(processes: Processes, tmp_path: Path, is_cut: bool) -> None:
    network = make_network()
    expected = train(network, wrapped(network, **CHAINS))
    (trained,) = join(processes.run(2, train_with_zero_inside, str(tmp_path / "state"), is_cut))
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)


AROUND: dict[str, Any] = {
    "pre": chain(gc.clip_by_norm(0.1), gc.ema(0.9)),
    "update": chain(gc.cautious(), gc.trust_ratio()),
    "post": gc.project_l2_ball(1.5),
}


def train_with_zero_around() -> list[Any]:
    network = DistributedDataParallel(make_network())
    make = partial(ParamTransformingOptimizer, InnerOpt=Adam, **AROUND)
    optim = zero(network.parameters(), make, lr=0.01)
    return [parts(train(network, optim, my_share()))]


def test_zero_around(processes: Processes) -> None:
    network = make_network()
    expected = train(network, wrapped(network, **AROUND))
    (trained,) = join(processes.run(2, train_with_zero_around))
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)
