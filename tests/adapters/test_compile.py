"""``torch.compile(optimizer.step)``: what the eager step does, with the graph breaks of the inner optimizer alone."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.optim import Adam, Optimizer
from torch.testing import assert_close

import gradchain as gc
from gradchain import ParamTransformingOptimizer
from gradchain.contract import Group

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,), (2, 3, 3))]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def breaks(step: Callable[[], Any], steps: int = 3) -> set[str]:
    """The reasons of graph breaks in a few steps."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(step, backend="eager")
    for _ in range(steps):
        compiled()
    return {reason.split("\n")[0] for reason in counters["graph_break"]}


def compare(make: Callable[[list[nn.Parameter]], Optimizer]) -> set[str]:
    """Compare compiled with eager steps, and return the reasons of graph breaks."""
    expected, actual = make_params(), make_params()
    optimizer = make(expected)
    for _ in range(3):
        optimizer.step()
    reasons = breaks(make(actual).step)
    for eager, compiled in zip(expected, actual, strict=True):
        assert_close(compiled, eager)
        assert_close(compiled.grad, eager.grad)
    return reasons


CHAINS: list[dict[str, Any]] = [
    {},
    {"pre": gc.sign()},
    {"pre": gc.chain(gc.zero_nonfinite(), gc.clip_by_global_norm(1.0), gc.ema(0.9))},
    {"pre": gc.normalize(), "post": gc.project_l2_ball(1.0)},
    {"pre": gc.masked(gc.scale(2.0), lambda group: len(group["shape"]) == 1)},
    {"update": gc.chain(gc.cautious(), gc.decay_weights(0.1)), "post": gc.param_ema(0.9)},
    {"pre": lambda tensor, group: tensor / (1 + tensor.abs())},
]


# found: 13
def test_names_of_a_model_break_no_graph() -> None:
    model = nn.ParameterList(make_params())
    chains: dict[str, Any] = {"pre": gc.masked(gc.scale(2.0), "0"), "model": model}
    bare = breaks(Adam(make_params(), lr=0.1).step)
    params = [*model.parameters()]
    optimizer = ParamTransformingOptimizer(params, Adam, lr=0.1, **chains)
    grads = [None if param.grad is None else param.grad.clone() for param in params]
    assert breaks(optimizer.step, 1) <= bare
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        assert grad is None or torch.equal(param.grad, grad * (2 if index == 0 else 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("chains", CHAINS, ids=str)
def test_breaks_where_the_inner_optimizer_does(chains: dict[str, Any]) -> None:
    bare = breaks(Adam(make_params(), lr=0.1).step)
    assert compare(lambda params: ParamTransformingOptimizer(params, Adam, lr=0.1, **chains)) <= bare


def test_a_changing_tensor_does_not_recompile() -> None:
    params = make_params()
    optimizer = ParamTransformingOptimizer(
        params, pre=gc.chain(gc.clip_by_norm(1.0), gc.scale(1.0)), post=gc.project_linf_ball(1.0), lr=0.1
    )
    values = {"clip_by_norm.max_norm": 0.5, "scale.factor": 2.0, "project_linf_ball.radius": 0.25, "lr": 0.1}
    optimizer.param_groups[0].update({key: torch.tensor(value) for key, value in values.items()})
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    step()
    step()
    graphs = counter.frame_count
    for factor in (0.5, 0.25, 0.125):
        for key in values:
            optimizer.param_groups[0][key].mul_(factor)
        step()
    assert counter.frame_count == graphs
    radius = optimizer.param_groups[0]["project_linf_ball.radius"]
    assert all(param.detach().abs().max() <= radius for param in params)


def test_a_compiled_function_of_ones_own() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def halve(tensor: Tensor, group: Group) -> Tensor:
        return tensor / 2

    compare(lambda params: ParamTransformingOptimizer(params, pre=lambda t, g: t / 2, lr=0.1))
    x = torch.tensor([1.0], requires_grad=True)
    x.sum().backward()
    ParamTransformingOptimizer([x], pre=halve, lr=1.0).step()
    assert x.item() == 0.5
