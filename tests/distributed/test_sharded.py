"""What optimizers of sharded parameters have to get right besides the numbers of the catalogue."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.functional import mse_loss
from torch.torch_version import TorchVersion

import gradchain as gc
from gradchain import Group, ParamTransformingOptimizer, State, chain, transform
from gradchain._sharding import distribute_like
from tests.distributed.common import BATCHES, Parameters, my_batches, set_gradients, sharded, step_gradients, train
from tests.distributed.processes import Processes, join, parts


def of_zeros(tensor: Tensor, group: Group) -> State:
    return {"sum": torch.zeros_like(tensor), "steps": tensor.new_zeros(())}


@transform(init=of_zeros, acts_on="element")
def average(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
    """Has a state that is no part of a tensor."""
    total: Tensor = state["sum"] + tensor
    steps: Tensor = state["steps"] + 1
    return total / steps, {"sum": total, "steps": steps}


def measure_largest(tensors: list[Tensor]) -> Group:
    return {"largest": torch.stack([tensor.abs().amax() for tensor in tensors]).amax()}


@transform(measure=measure_largest)
def divide_by_largest(tensor: Tensor, group: Group) -> Tensor:
    """Cannot be measured of no elements, and must not leave the other processes waiting."""
    largest: Tensor = group["largest"]
    return tensor / largest


def kept(tensor: Tensor, group: Group) -> State:
    return {"start": tensor}


@transform(init=kept)
def subtract_start(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
    """Keeps a tensor that is written to later."""
    return tensor - state["start"], state


def reverse(tensor: Tensor, group: Group) -> Tensor:
    return tensor.flip(tuple(range(tensor.ndim)))


CHAINS: list[dict[str, Any]] = [
    {"pre": chain(average(), divide_by_largest(), reverse)},
    {"pre": chain(average(), divide_by_largest(), reverse), "param_ndim": None},
    {"pre": gc.clip_by_global_norm(1.0), "grad_scale": 0.5, "grad_bias": 0.25},
    {"pre": gc.scale(2.0), "grad_scale": torch.tensor(0.5), "param_ndim": None},
    {"pre": subtract_start(), "post": chain(subtract_start(), gc.param_ema(0.5))},
    {"pre": gc.normalize(), "update": gc.cautious(), "post": gc.project_simplex(), "InnerOpt": torch.optim.Adam},
]


def train_own(mixed: bool) -> list[Any]:
    grads = step_gradients(sharded(), 3, my_batches())
    params = list(sharded().parameters())
    if mixed:
        params[1] = nn.Parameter(Parameters().params[1].detach())
        for step in grads:
            step[1] = step[1].full_tensor()  # type: ignore[attr-defined]
    return [parts(train(params, grads, **chains)) for chains in CHAINS]


@pytest.mark.parametrize("mixed", [False, True])
def test_functions_of_users(processes: Processes, mixed: bool) -> None:
    grads = step_gradients(Parameters(), 3, range(BATCHES))
    results = processes.run(4, train_own, mixed)
    for chains, *actual in zip(CHAINS, *results, strict=True):
        expected = join([parts(train(list(Parameters().parameters()), grads, **chains))])
        torch.testing.assert_close(join(actual), expected, rtol=1e-6, atol=1e-6)


def skip_steps() -> list[Any]:
    module = sharded()
    pre = chain(gc.ema(0.5), gc.skip_nonfinite(), gc.skip_large(1e3))
    optim = ParamTransformingOptimizer(module.parameters(), pre=pre, lr=0.25)
    seen = []
    for step in range(4):
        set_gradients(module, step, my_batches())
        if step == 1 and dist.get_rank() == 0:  # the only one that knows
            next(iter(module.parameters())).grad.to_local().fill_(torch.nan)  # type: ignore[union-attr]
        if step == 3 and dist.get_rank() == 2:
            next(iter(module.parameters())).grad.to_local().fill_(1e3)  # type: ignore[union-attr]
        optim.step()
        seen.append(parts([param.detach() for param in module.parameters()]))
    states = optim.state_dict()["state"]
    return [seen, [int(states[0]["transforms"][f"pre.{key}.total"]) for key in ("skip_nonfinite", "skip_large")]]


def test_all_processes_skip(processes: Processes) -> None:
    results = processes.run(4, skip_steps)
    assert all(totals == [1, 1] for _, totals in results)
    first, second, third, fourth = join([seen for seen, _ in results])
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, second, third))
    assert all(map(torch.equal, third, fourth))


def warm_up() -> list[Any]:
    """Only the first process has elements of the one parameter that has a gradient."""
    param = nn.Parameter(torch.ones(1, 3))
    if dist.is_initialized():
        param = nn.Parameter(distribute_tensor(torch.ones(1, 3), init_device_mesh("cpu", (4,)), [Shard(0)]))
    optim = ParamTransformingOptimizer([param], pre=chain(gc.normalize(), gc.ema(0.5)), param_ndim=None, lr=0.0)
    for step in range(3):
        param.grad = torch.zeros_like(param) + 1 + step
        optim.step()
        optim.param_groups[0]["lr"] = 0.25
    return [parts(param.detach()), parts(optim.state[param]["transforms"])]


def test_first_step_without_a_learning_rate(processes: Processes) -> None:
    torch.testing.assert_close(join(processes.run(4, warm_up)), join([warm_up()]), rtol=1e-6, atol=1e-6)


def count_collectives() -> list[Any]:
    module = sharded()
    params: list[Any] = list(module.parameters())
    (grads,) = step_gradients(module, 1, my_batches())
    counts = []
    for pre in (chain(gc.normalize(), gc.ema(0.9), gc.project_simplex()), gc.clip_by_global_norm(1.0), gc.centralize()):
        optim = ParamTransformingOptimizer(params, pre=pre, lr=0.1)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        with CommDebugMode() as mode:
            optim.step()
        counts.append(mode.get_total_counts())
    optim = ParamTransformingOptimizer(params, pre=gc.trace(0.9), lr=0.1)
    optim.step()
    traces = [optim.state[param]["transforms"]["pre.trace.trace"] for param in params]
    return [counts, [trace.placements == p.placements for trace, p in zip(traces, params, strict=True)]]


def test_nothing_is_sent_for_rows(processes: Processes) -> None:
    for counts, placed in processes.run(4, count_collectives):
        assert counts == [0, 1, 2]  # centralize leaves a vector alone
        assert all(placed)


def by_size(tensor: Tensor, group: Group) -> Tensor:
    """Acts on each element, but otherwise on a part than on the whole."""
    return tensor * 2 if tensor.numel() > 4 else tensor / 2


def by_last_size(tensor: Tensor, group: Group) -> Tensor:
    """What only some processes have a part for."""
    return tensor * 2 if tensor.shape[0] != 1 else tensor / 2


@transform
def shrink_at_random(tensor: Tensor, group: Group, *, seed: int = 0) -> Tensor:
    """Acts on rows, but draws for all of them together."""
    generator = torch.Generator().manual_seed(seed)
    return tensor * torch.rand((), generator=generator)


def train_with_sizes() -> list[Any]:
    params: list[Any] = list(sharded().parameters() if dist.is_initialized() else Parameters().parameters())
    batches = my_batches() if dist.is_initialized() else range(BATCHES)
    grads = step_gradients(sharded() if dist.is_initialized() else Parameters(), 1, batches)
    options: list[Any] = [(by_size, None), (by_last_size, None), (shrink_at_random(), 1)]
    return [parts(train(params, grads, pre=gc.broadcast(each, ndim))) for each, ndim in options]


def test_what_depends_on_the_size_sees_the_whole(processes: Processes) -> None:
    actual = join(processes.run(4, train_with_sizes))
    torch.testing.assert_close(actual, join([train_with_sizes()]), rtol=1e-6, atol=1e-6)


LAYOUTS: list[Callable[[], list[Any]]] = [
    lambda: [Replicate(), Shard(0)],
    lambda: [Shard(0), Shard(1)],
    lambda: [Shard(1), Replicate()],
    lambda: [_StridedShard(0, split_factor=2), Shard(0)],
    lambda: [Replicate(), Replicate()],
]


def train_on_mesh() -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    (value,), grads = values(1), values(3, seed=1)
    results = []
    for layout in LAYOUTS:
        param = nn.Parameter(distribute_tensor(value, mesh, [Replicate(), Replicate()]).redistribute(mesh, layout()))
        placed = [DTensor.from_local(grad, mesh, [Replicate(), Replicate()]) for grad in grads]
        placed = [grad.redistribute(mesh, layout()) for grad in placed]
        partial = [DTensor.from_local(grad / 2, mesh, [Replicate(), Partial()]) for grad in grads]
        for given in (placed, partial) if layout is LAYOUTS[-1] else (placed,):
            for chains in MESH_CHAINS:
                trained, states = train([param], [[grad] for grad in given], **chains)
                results.append([trained[0].full_tensor(), states[0]["pre.ema.average"].full_tensor()])
    return results


MESH_CHAINS: list[dict[str, Any]] = [
    {"pre": chain(gc.ema(0.5), gc.sign()), "post": gc.project_l2_ball(1.0), "param_ndim": param_ndim}
    for param_ndim in (0, 1, None)
] + [
    {"pre": chain(gc.ema(0.5), gc.clip_by_global_norm(0.5), gc.skip_nonfinite()), "update": gc.trust_ratio()},
    {"pre": chain(gc.sign(), gc.ema(0.5))},
]


def values(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, generator=generator) for _ in range(count)]


# found: 37
def test_meshes_of_two_dimensions(processes: Processes) -> None:
    expected = []
    for chains in MESH_CHAINS:
        trained, states = train([nn.Parameter(values(1)[0])], [[grad] for grad in values(3, seed=1)], **chains)
        expected.append([trained[0], states[0]["pre.ema.average"]])
    for result in processes.run(4, train_on_mesh):
        for actual, wanted in zip(result, itertools.cycle(expected), strict=False):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def distribute_as_partial() -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    whole, results = values(1)[0], []
    for op in ("sum", "avg", "max", "min", "product"):
        for placements in ([Partial(op), Replicate()], [Shard(0), Partial(op)], [Partial(op), Partial(op)]):
            settled = [Replicate() if placement.is_partial() else placement for placement in placements]
            mine = distribute_tensor(whole, mesh, settled).to_local()
            of_whole: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
            like = DTensor.from_local(mine, mesh, placements, run_check=False, **of_whole)
            distributed = distribute_like(whole, like)
            assert distributed.placements == like.placements
            results.append(distributed.full_tensor())
    return results


# found: 37
def test_partial_tensors_are_made_of_whole_ones(processes: Processes) -> None:
    for results in processes.run(4, distribute_as_partial):
        assert len(results) == 15
        for result in results:
            torch.testing.assert_close(result, values(1)[0], rtol=0, atol=0)


def refuse(tensor: Tensor, group: Group) -> Tensor:
    raise RuntimeError("no")


def fail() -> list[Any]:
    module = sharded()
    before = parts([param.detach() for param in module.parameters()])
    set_gradients(module, 0, my_batches())
    optim = ParamTransformingOptimizer(module.named_parameters(), pre=gc.ema(0.9), post=refuse, param_ndim=None, lr=1.0)
    with pytest.raises(RuntimeError) as raised:
        optim.step()
    after = parts([param.detach() for param in module.parameters()])
    state = optim.state_dict()["state"][0]["transforms"]["pre.ema.average"]
    return [str(raised.value), before, after, int(state.to_local().count_nonzero())]


def test_errors(processes: Processes) -> None:
    results = processes.run(2, fail)
    for text, *_, changed in results:
        assert text.startswith("post, group 0, parameter 0 'params.0' of shape (7, 3), torch.float32: stage 0")
        assert not changed
    torch.testing.assert_close(join([r[1] for r in results]), join([r[2] for r in results]), rtol=0, atol=0)


def refusals(use_orig_params: bool) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    network = make_network()
    early = ParamTransformingOptimizer(network.named_parameters(), pre=gc.clip_by_norm(1.0), lr=0.1)
    network(torch.ones(2, 4)).sum().backward()
    early.step()
    early.zero_grad()
    wrapped = FullyShardedDataParallel(network, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    wrapped(torch.ones(2, 4)).sum().backward()
    calls: list[Callable[[], Any]] = [
        lambda: ParamTransformingOptimizer(wrapped.parameters(), pre=gc.clip_by_norm(1.0)),
        lambda: gc.attach(torch.optim.SGD(wrapped.parameters()), pre=gc.clip_by_norm(1.0)),
    ]
    for call in calls + [early.step] * use_orig_params:  # else the parameters that it has are not those of the network
        with pytest.raises(TypeError) as raised:
            call()
        said.append(str(raised.value))
    return said


# found: 6
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters_are_refused(processes: Processes, use_orig_params: bool) -> None:
    for said in processes.run(2, refusals, use_orig_params):
        assert len(said) == 2 + use_orig_params
        for text in said:
            assert text.startswith("group 0, parameter 0")
            assert "shard the model with torch.distributed.fsdp.fully_shard instead" in text


def refused_by_version(version: str) -> str:
    params = list(sharded().parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", TorchVersion(version))
        with pytest.raises(RuntimeError) as raised:
            ParamTransformingOptimizer(params, pre=gc.scale(-0.5))
        ParamTransformingOptimizer(Parameters().parameters(), pre=gc.scale(-0.5))
        patch.setattr(torch, "__version__", TorchVersion("2.12.0"))
        ParamTransformingOptimizer(params, pre=gc.scale(-0.5))
    return str(raised.value)


# found: 37
def test_a_torch_with_wrong_shards_is_refused(processes: Processes) -> None:
    (text,) = processes.run(1, refused_by_version, "2.8.0+cpu")
    assert text.startswith(
        "group 0, parameter 0 of shape (7, 3), torch.float32: distributed parameters (DTensor) need "
    )
    assert "torch 2.12 or later" in text
    assert "got torch 2.8.0+cpu" in text


SLOTS: dict[str, Any] = {
    "pre": chain(gc.clip_by_global_norm(1.0), gc.normalize(), gc.ema(0.5), reverse),
    "update": gc.cautious(),
    "post": chain(gc.project_l2_ball(1.0), gc.param_ema(0.5)),
    "param_ndim": None,
}


def explain_and_average(module: Parameters, batches: Any) -> list[Any]:
    """What ``explain()`` shows, and the parameters, their averages and the states after each step."""
    found: list[Any] = []
    optim = ParamTransformingOptimizer(module.named_parameters(), torch.optim.Adam, lr=0.1, **SLOTS)
    for step in range(2):
        set_gradients(module, step, batches)
        rows = optim.explain().rows
        found.append(torch.tensor([[row.norm, row.min, row.max, row.mean, row.changed or 0] for row in rows]))
        optim.step()
        with optim.averaged():
            found.append([param.detach().clone() for param in module.parameters()])
        found.append([[param.detach().clone(), optim.state[param]["exp_avg"]] for param in module.parameters()])
    return parts(found)  # type: ignore[no-any-return]


def explain_sharded() -> list[Any]:
    return explain_and_average(sharded(), my_batches())


# found: 16
@pytest.mark.parametrize("size", [2, 4])
def test_explain_and_averages(processes: Processes, size: int) -> None:
    expected = join([explain_and_average(Parameters(), range(BATCHES))])
    torch.testing.assert_close(join(processes.run(size, explain_sharded)), expected, rtol=1e-5, atol=1e-6)


def evaluate_often(network: nn.Module, batches: slice) -> list[Any]:
    """The losses of the parameters, of their averages, and of the parameters again, after each step."""
    optim = ParamTransformingOptimizer(network.named_parameters(), torch.optim.SGD, lr=0.5, post=gc.param_ema(0.9))
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.ones(8, 3)
    losses = []
    for _ in range(3):
        optim.zero_grad()
        mse_loss(network(x[batches]), y[batches]).backward()
        optim.step()
        with torch.no_grad():
            losses.append(mse_loss(network(x), y))
            with optim.averaged():
                losses.append(mse_loss(network(x), y))
            losses.append(mse_loss(network(x), y))
    return parts(losses)  # type: ignore[no-any-return]


def evaluate_sharded() -> list[Any]:
    network, rank = make_network(), dist.get_rank()
    fully_shard(network[0])
    fully_shard(network)  # which keeps whole parameters after a forward pass without gradients
    return evaluate_often(network, slice(4 * rank, 4 * rank + 4))


# found: 16
def test_averages_reach_a_forward_pass(processes: Processes) -> None:
    expected = join([evaluate_often(make_network(), slice(None))])
    assert len({round(float(loss), 5) for loss in expected}) > 4
    torch.testing.assert_close(join(processes.run(2, evaluate_sharded)), expected)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def train_network(network: nn.Sequential, batches: slice) -> list[Any]:
    """Through the hooks of ``fully_shard``; returns the averages, too."""
    chains: dict[str, Any] = {
        "pre": chain(gc.zero_nonfinite(), gc.clip_by_global_norm(0.5), gc.add_noise(0.01)),
        "update": chain(gc.cautious(), gc.trust_ratio()),
        "post": chain(gc.project_l2_ball(1.5), gc.param_ema(0.5)),
    }
    optim = ParamTransformingOptimizer(network.named_parameters(), torch.optim.Adam, lr=0.01, **chains)
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.ones(8, 3)
    for _ in range(5):
        optim.zero_grad()
        mse_loss(network(x[batches]), y[batches]).backward()
        optim.step()
    trained = parts([param.detach() for param in network.parameters()])
    with optim.averaged():
        return [trained, parts([param.detach() for param in network.parameters()])]


def train_sharded_network() -> list[Any]:
    network, rank = make_network(), dist.get_rank()
    for layer in (network[0], network[2], network):
        fully_shard(layer)
    return train_network(network, slice(2 * rank, 2 * rank + 2))


def test_network(processes: Processes) -> None:
    actual = join(processes.run(4, train_sharded_network))
    torch.testing.assert_close(actual, join([train_network(make_network(), slice(None))]), rtol=1e-5, atol=1e-5)
