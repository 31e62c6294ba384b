from math import inf, sqrt

import pytest
import torch
from hypothesis import given
from torch import Tensor, tensor
from torch.linalg import vector_norm
from torch.testing import assert_close

from gradchain import ParamTransformingOptimizer, Transform, chain, lmo_l1, lmo_l2, lmo_linf, scale
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


@each_oracle
def test_inside_sgd_it_is_the_step_of_frank_wolfe(lmo: Transform, ord: float, dual: float) -> None:
    radius, gamma = 3.0, 0.25
    start, grad = torch.randn(5), torch.randn(5)
    param = start.clone().requires_grad_()
    param.grad = grad.clone()
    pre = chain(lmo, scale(radius))
    ParamTransformingOptimizer([param], pre=pre, param_ndim=None, lr=gamma, weight_decay=1.0).step()
    assert_close(param.detach(), (1 - gamma) * start - gamma * radius * lmo(grad, {}))
