"""What makes a function run as it is, and that a trace does not outlive what the function reads."""

import math
import random
from collections.abc import Callable
from enum import Enum
from time import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from gradchain import Group, ParamTransformingOptimizer, chain, clip_by_global_norm, scale

NUMBER, PAIR, TENSOR, LIST, DICT = 2.0, (1.0, 2.0), torch.tensor(2.0), [2.0], {"factor": 2.0}
OBJECT, MODULE, FIRST = SimpleNamespace(factor=2.0), nn.PReLU(), LIST.__getitem__
COUNT = 0
DRAW = random.Random(0).random


class Settings:
    factor = 2.0


class Kind(Enum):
    TWICE = 2.0


def twice(tensor: Tensor) -> Tensor:
    return NUMBER * tensor


def by_list(tensor: Tensor, group: Group) -> Tensor:
    return tensor * LIST[0]


def counts(tensor: Tensor, group: Group) -> Tensor:
    global COUNT
    COUNT += 1
    return tensor


def counts_by_itself(tensor: Tensor, group: Group) -> Tensor:
    counts_by_itself.__dict__.setdefault("calls", 0)
    counts_by_itself.calls += 1  # type: ignore[attr-defined]
    return tensor


def imports(tensor: Tensor, group: Group) -> Tensor:
    from tests.engine import test_dependencies

    return tensor * test_dependencies.LIST[0]


def prints(tensor: Tensor, group: Group) -> Tensor:
    print(end="")
    return tensor


NESTED = chain(by_list)
MEASURING = clip_by_global_norm(1.0)


def runs(function: Any) -> str | None:
    x = nn.Parameter(torch.ones(2, 3))
    x.grad = torch.ones(2, 3)
    return ParamTransformingOptimizer([x], pre=function, param_ndim=None).explain().rows[1].runs


@pytest.mark.parametrize(
    "function",
    [
        lambda t, g: t * NUMBER,
        lambda t, g: t * PAIR[1],
        lambda t, g: t * TENSOR,
        lambda t, g: t * Kind.TWICE.value,
        lambda t, g, factor=NUMBER, function=twice: function(t) * factor,
        lambda t, g: twice(t),
        lambda t, g: relu(t).exp() + torch.ops.aten.abs(t),
        lambda t, g: t * torch.tensor(2.0),
        lambda t, g: t * math.sqrt(g["lr"]),
        lambda t, g: t if g["lr"] > 0 else -t,
        lambda t, g: scale(2.0)(t, g),
    ],
)
def test_traced(function: Any) -> None:
    assert runs(function) == "traced"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda t, g: t * t.sum().item(), "reads a value (line "),
        (lambda t, g: t * float(t.sum()), "reads a value (line "),
        (lambda t, g: t if t.sum() > 0 else -t, "reads a value (line "),
        (lambda t, g: t + torch.randn_like(t), "draws random numbers"),
        (lambda t, g: t.abs().clamp_(max=1), "writes in place, with aten.clamp_"),
        (lambda t, g: t * t.new_tensor(2.0), "makes a tensor of numbers on the device of its input"),
        (lambda t, g: t * torch.ones(()), "makes a tensor on cpu, without device=tensor.device"),
        (by_list, "reads LIST, a list, which can change without notice"),
        (lambda t, g: t * DICT["factor"], "reads DICT, a dict, which can change without notice"),
        (lambda t, g: t * OBJECT.factor, "reads OBJECT, a SimpleNamespace, which can change without notice"),
        (lambda t, g: t * Settings.factor, "reads Settings, a type, which can change without notice"),
        (lambda t, g, factors=LIST: t * factors[0], "reads factors, a list, which can change without notice"),
        (lambda t, g: t * np.sqrt(2.0), "reads np, a module, which can change without notice"),
        (lambda t, g: MODULE(t), "calls a PReLU, whose code is not known or can change without notice"),
        (lambda t, g: t * FIRST(0), "calls list.__getitem__, whose code is not known or can change without notice"),
        (lambda t, g: t * DRAW(), "calls Random.random, whose code is not known or can change without notice"),
        (lambda t, g: t * (time() > 0), "calls time, whose code is not known or can change without notice"),
        (lambda t, g: NESTED(t, g), "reads LIST, a list, which can change without notice"),
        (lambda t, g: MEASURING(t, g), "calls clip_by_global_norm(max_norm=1.0), which measures"),
        (counts, "writes to the variable COUNT from outside"),
        (counts_by_itself, "writes to the attribute calls"),
        (imports, "imports tests.engine, which can change without notice"),
        (prints, "calls print"),
    ],
)
def test_as_it_is(function: Any, reason: str) -> None:
    assert f"as it is: {reason}" in str(runs(function))


def given(function: Callable[..., Any]) -> Callable[[], list[float]]:
    """What makes a step and returns what a gradient of ones has become."""
    x = nn.Parameter(torch.zeros(2))
    optimizer = ParamTransformingOptimizer([x], pre=function, param_ndim=None)

    def step() -> list[float]:
        x.grad = torch.ones(2)
        optimizer.step()
        values: list[float] = x.grad.tolist()
        return values

    return step


def test_a_variable_that_changes() -> None:
    factor = 2.0
    inner = chain(lambda tensor, group: tensor * factor)
    step = given(lambda tensor, group: tensor * factor)
    step_within = given(lambda tensor, group: inner(tensor, group))
    assert step() == step_within() == [2, 2]
    factor = 3.0
    assert step() == step_within() == [3, 3]


def test_an_object_that_changes() -> None:
    factors, module = [2.0], nn.PReLU(init=2.0).requires_grad_(False)
    inner = chain(lambda tensor, group: tensor * factors[0])
    steps = [given(lambda tensor, group: inner(tensor, group)), given(lambda tensor, group: -module(-tensor))]
    assert [step() for step in steps] == [[2, 2], [2, 2]]
    factors[0], module.weight = 3.0, nn.Parameter(torch.tensor([3.0]), requires_grad=False)
    assert [step() for step in steps] == [[3, 3], [3, 3]]
