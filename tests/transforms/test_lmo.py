from math import inf, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, tensor
from torch.linalg import vector_norm
from torch.optim import SGD, Adam
from torch.testing import assert_close

from gradchain import ParamTransformingOptimizer, Transform, chain, frank_wolfe, lmo_l1, lmo_l2, lmo_linf, scale
from tests.strategies import pairs

# Each with the order of its ball, and that of the dual norm: the largest <t, s> over the ball.
ORACLES = [(lmo_l1(), 1, inf), (lmo_l2(), 2, 2), (lmo_linf(), inf, 1)]
each_oracle = pytest.mark.parametrize(("lmo", "ord", "dual"), ORACLES, ids=lambda value: repr(value))


@pytest.mark.parametrize(
    ("lmo", "expected"),
    [(lmo_l1(), [0.0, -1.0, 0.0]), (lmo_l2(), [0.0, -sqrt(0.5), sqrt(0.5)]), (lmo_linf(), [0.0, -1.0, 1.0])],
)
def test_by_hand(lmo: Transform, expected: list[float]) -> None:
    assert_close(lmo(tensor([0.0, -3.0, 3.0]), {}), tensor(expected))


@each_oracle
@given(pair=pairs())
def test_no_point_of_the_ball_is_further_along(
    lmo: Transform, ord: float, dual: float, pair: tuple[Tensor, Tensor]
) -> None:
    t, point = pair
    s = lmo(t, {})
    assert vector_norm(s, ord) <= 1 + 1e-9
    assert_close((t * s).sum(), vector_norm(t, dual))
    point = point / vector_norm(point, ord).clamp_min(1)
    assert (t * point).sum() <= (t * s).sum() * (1 + 1e-9)


@each_oracle
def test_complex(lmo: Transform, ord: float, dual: float) -> None:
    z = tensor([1j, 3 - 4j, 0, 1 + 1j])
    s = lmo(z, {})
    assert_close(vector_norm(s, ord), tensor(1.0))
    assert_close((z.conj() * s).sum(), vector_norm(z, dual) + 0j)


@each_oracle
def test_half_precision_and_tiny_gradients(lmo: Transform, ord: float, dual: float) -> None:
    t = torch.full((17_500,), 600.0, dtype=torch.float16)  # of norm 79373; the largest float16 is 65504
    assert_close(vector_norm(lmo(t, {}).double(), ord).item(), 1.0, rtol=1e-3, atol=0)
    assert vector_norm(lmo(1e-25 * torch.randn(100), {}), ord) <= 1 + 1e-6


RADIUS = 0.1
SCHEDULES = {"1": lambda k: 1.0, "2 / (2 + k)": lambda k: 2 / (2 + k), "0.25": lambda k: 0.25}


def optimizer(params: list[Tensor], lmo: Transform, **kwargs: Any) -> ParamTransformingOptimizer:
    pre = chain(lmo, scale(RADIUS))
    return ParamTransformingOptimizer(params, pre=pre, post=frank_wolfe(), param_ndim=None, **{"lr": 1.0, **kwargs})


# found: 18
@each_oracle
@pytest.mark.parametrize("start", [0.0, -33.0, 1e8, -3e30])
def test_a_full_step_lands_on_the_minimiser(lmo: Transform, ord: float, dual: float, start: float) -> None:
    for lr in (1.0, tensor(1.0)):
        params = [torch.full((2, 3), start, requires_grad=True) for _ in range(2)]
        grads = [torch.randn(2, 3) for _ in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer(params, lmo, lr=lr).step()
        for param, grad in zip(params, grads, strict=True):
            assert torch.equal(param, -RADIUS * lmo(grad, {}))


# found: 18
@each_oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_iterates_are_convex_combinations(
    lmo: Transform, ord: float, dual: float, dtype: torch.dtype, schedule: str
) -> None:
    param = torch.full((5,), -33.0, dtype=dtype, requires_grad=True)
    optim = optimizer([param], lmo)
    steps = torch.optim.lr_scheduler.LambdaLR(optim, SCHEDULES[schedule])
    for _ in range(20):
        start, gamma = param.detach().double(), optim.param_groups[0]["lr"]
        param.grad = torch.randn(5).to(dtype)
        s = -(RADIUS * lmo(param.grad, {})).double()
        optim.step()
        steps.step()
        error = (param.detach().double() - ((1 - gamma) * start + gamma * s)).abs()
        rounding = 4 * torch.finfo(dtype).eps * ((1 - gamma) * start.abs() + gamma * s.abs())
        assert (error <= rounding).all()
        if schedule != "0.25":  # the first step is a full one
            assert vector_norm(param.detach().double(), ord) <= RADIUS * (1 + 4 * torch.finfo(dtype).eps)


@each_oracle
def test_it_goes_up_where_the_optimizer_maximizes(lmo: Transform, ord: float, dual: float) -> None:
    start, grad = torch.randn(5), torch.randn(5)
    param = start.clone().requires_grad_()
    param.grad = grad.clone()
    optimizer([param], lmo, lr=0.25, maximize=True).step()
    assert_close(param.detach(), 0.75 * start + 0.25 * RADIUS * lmo(grad, {}))


def test_a_parameter_without_gradient_stays() -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    params[0].grad = torch.ones(2)
    optimizer(params, lmo_linf(), lr=0.5).step()
    assert torch.equal(params[1], torch.ones(2))
    assert_close(params[0].detach(), tensor([0.45, 0.45]))
    assert torch.equal(frank_wolfe()(torch.ones(2), {"lr": 0.5}), torch.ones(2))


@pytest.mark.parametrize(
    ("InnerOpt", "kwargs", "key"),
    [(SGD, {"momentum": 0.9}, "momentum"), (SGD, {"weight_decay": 1.0}, "weight_decay"), (Adam, {}, "betas")],
)
def test_it_refuses_another_step_than_that_of_plain_sgd(InnerOpt: Any, kwargs: dict[str, Any], key: str) -> None:
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    optim = ParamTransformingOptimizer([param], InnerOpt, post=frank_wolfe(), lr=0.5, **kwargs)
    with pytest.raises(ValueError, match=f'frank_wolfe needs the step of plain SGD, got group."{key}".='):
        optim.step()
    assert torch.equal(param, torch.ones(2))
