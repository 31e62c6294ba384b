"""What ``docs/coming-from/keras.md`` says is the same in Keras is the same in numbers."""

import os
from typing import Any

import pytest
import torch
from torch import nn

from gradchain import (
    ParamTransformingOptimizer,
    Transform,
    broadcast,
    chain,
    clamp,
    clip_by_global_norm,
    clip_by_norm,
    param_ema,
    project_l2_ball,
    project_l2_sphere,
    project_nonnegative,
)

os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras")
pytestmark = pytest.mark.filterwarnings("default")

SHAPES = {"Dense": (3, 4), "Conv2D": (3, 4, 2, 2), "Embedding": (3, 4)}
AXES: dict[str, Any] = {"Dense": 0, "Conv2D": [0, 1, 2], "Embedding": 1}
KERNELS = {"Dense": (1, 0), "Conv2D": (2, 3, 1, 0), "Embedding": (0, 1)}
"""The dimensions of a weight of torch, in the order in which Keras has them."""


@pytest.mark.parametrize(
    ("name", "given", "ours"),
    [
        ("MaxNorm", [1.5], project_l2_ball(1.5)),
        ("UnitNorm", [], project_l2_sphere(1.0)),
        ("NonNeg", [], project_nonnegative()),
    ],
)
@pytest.mark.parametrize("layer", SHAPES)
def test_constraints(name: str, given: list[float], ours: Transform, layer: str) -> None:
    axis = {} if name == "NonNeg" else {"axis": AXES[layer]}
    constraint = getattr(keras.constraints, name)(*given, **axis)
    weight, order = torch.randn(SHAPES[layer], generator=torch.Generator().manual_seed(0)), KERNELS[layer]
    torch.testing.assert_close(broadcast(ours, -1)(weight, {}).permute(order), constraint(weight.permute(order)))


class Pair:
    """The same parameters in an optimizer of Keras and in one of ours."""

    def __init__(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        self.params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))]
        self.optimizer = ParamTransformingOptimizer(self.params, lr=0.1, **ours)
        self.variables = [keras.Variable(param.detach().clone()) for param in self.params]
        self.keras_optimizer = keras.optimizers.SGD(0.1, **theirs)
        self.keras_optimizer.build(self.variables)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        grads = [3 * torch.randn(param.shape, generator=self.generator) for param in self.params]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.clone()
        self.optimizer.step()
        self.keras_optimizer.apply(grads, self.variables)

    def assert_same(self) -> None:
        for param, variable in zip(self.params, self.variables, strict=True):
            torch.testing.assert_close(param.detach(), variable.value.detach())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"clipnorm": 1.0}, {"pre": clip_by_norm(1.0), "param_ndim": None}),
        ({"clipvalue": 0.5}, {"pre": clamp(-0.5, 0.5)}),
        ({"global_clipnorm": 1.0}, {"pre": clip_by_global_norm(1.0)}),
    ],
)
def test_arguments_of_an_optimizer(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    pair = Pair(theirs, ours)
    pair.step()
    pair.step()
    pair.assert_same()


def test_averages_from_the_first_step_on() -> None:
    pair = Pair({"use_ema": True, "ema_momentum": 0.6}, {})
    pair.step()
    pair.optimizer.post = chain(param_ema(0.6, debias=False))  # which starts here, as the averages of Keras do
    pair.step()
    pair.step()
    pair.assert_same()
    pair.keras_optimizer.finalize_variable_values(pair.variables)
    with pair.optimizer.averaged():
        pair.assert_same()
