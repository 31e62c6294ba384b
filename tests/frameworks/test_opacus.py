"""DP-SGD, by the recipe of ``docs/how-to/dp-sgd.md`` and by Opacus."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from gradchain import ParamTransformingOptimizer, clip_by_norm, scale
from tests.frameworks.common import code_of

opacus = pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("default")  # of Opacus, and of torch about how Opacus uses it


def make_problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(6, 4), torch.arange(6) % 3


def backward(optimizer: Any) -> list[Tensor]:
    """What is in the parameters after one step of a private optimizer."""
    model, inputs, targets = make_problem()
    private = opacus.GradSampleModule(model)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, "expected_batch_size": 6}
    private_optimizer = opacus.optimizers.DPOptimizer(optimizer(model), **options)
    cross_entropy(private(inputs), targets).backward()
    private_optimizer.step()
    return [param.detach() for param in model.parameters()]


def test_the_recipe_is_dp_sgd() -> None:
    model, inputs, targets = make_problem()
    options = {"max_norm": 0.3, "noise_multiplier": 0.0, "batch_size": 6}
    grads = code_of("how-to/dp-sgd.md")["private_gradients"](model, cross_entropy, inputs, targets, **options)
    optimizer = SGD(model.parameters(), lr=1.0)
    for name, param in model.named_parameters():
        param.grad = grads[name]
    optimizer.step()
    expected = backward(lambda model: SGD(model.parameters(), lr=1.0))
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-4, atol=1e-5)  # Opacus adds 1e-6 to norms


def test_chains_see_private_gradients() -> None:
    start = [param.detach().clone() for param in make_problem()[0].parameters()]
    plain = backward(lambda model: SGD(model.parameters(), lr=1.0))

    def make(model: nn.Module) -> ParamTransformingOptimizer:
        options: Any = {"pre": clip_by_norm(0.01), "update": scale(0.5), "param_ndim": None}
        return ParamTransformingOptimizer(model.parameters(), **options, lr=1.0)

    for before, after, ours in zip(start, plain, backward(make), strict=True):
        step = after - before
        torch.testing.assert_close(ours, before + 0.5 * step * min(1, 0.01 / step.norm().item()))
