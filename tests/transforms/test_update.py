import math
from collections.abc import Callable
from math import inf, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn, tensor
from torch.optim import SGD, Adam, AdamW
from torch.testing import assert_close

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    Transform,
    broadcast,
    cautious,
    chain,
    decay_to_init,
    decay_weights,
    scale,
    scale_by_param_norm,
    scale_by_param_rms,
    trust_ratio,
)
from tests.strategies import pairs

U = tensor([-1.0, 2.0])
P = tensor([3.0, 4.0])
SHORT = sqrt(5)


@pytest.mark.parametrize(
    ("transform", "group", "expected"),
    [
        (cautious(), {"grad": tensor([1.0, 1.0])}, [-2.0, 0.0]),
        (cautious(), {"grad": tensor([1.0, -1e-30])}, [-1.0, 2.0]),
        (cautious(), {"grad": tensor([0.0, 1.0])}, [0.0, 0.0]),
        (cautious(), {"grad": tensor([1.0, 1.0]), "maximize": True}, [0.0, 4.0]),
        (trust_ratio(), {"param": P}, [-SHORT, 2 * SHORT]),
        (trust_ratio(), {"param": P, "lr": 0.1}, [-0.1 * SHORT, 0.2 * SHORT]),
        (trust_ratio(lr_included=False), {"param": P, "lr": 0.1}, [-SHORT, 2 * SHORT]),
        (trust_ratio(), {"param": P, "lr": tensor(0.1, dtype=torch.float64)}, [-0.1 * SHORT, 0.2 * SHORT]),
        (trust_ratio(3.0), {"param": P}, [-3.0, 6.0]),
        (trust_ratio(max=0.5), {"param": P}, [-0.5, 1.0]),
        (trust_ratio(max=0.5), {"param": 0 * P}, [-1.0, 2.0]),
        (trust_ratio(0, 1), {"param": P, "trust_ratio.max": 0.25}, [-0.25, 0.5]),
        (scale_by_param_norm(), {"param": P}, [-5.0, 10.0]),
        (scale_by_param_norm(6.0), {"param": P}, [-6.0, 12.0]),
        (scale_by_param_norm(), {"param": 0 * P}, [-1e-3, 2e-3]),
        (scale_by_param_rms(), {"param": P}, [-5 / sqrt(2), 10 / sqrt(2)]),
        (scale_by_param_rms(), {"param": 0 * P}, [-1e-3, 2e-3]),
        (scale_by_param_rms(), {"param": P, "scale_by_param_rms.min": 4}, [-4.0, 8.0]),
        (decay_weights(0.1), {"param": P}, [-1.3, 1.6]),
        (decay_weights(0.1), {"param": P, "decay_weights.rate": 0}, [-1.0, 2.0]),
        (decay_weights(0.1, ord=1), {"param": P}, [-1.1, 1.9]),
        (decay_weights(0.1, ord=1), {"param": 0 * P}, [-1.0, 2.0]),
        (decay_weights(0.1, cautious=True), {"param": P}, [-1.3, 2.0]),
        (decay_weights(0.1, cautious=True), {"param": -P}, [-1.0, 2.4]),
        (decay_weights(0.1, ord=1, cautious=True), {"param": P}, [-1.1, 2.0]),
    ],
)
def test_by_hand(transform: Transform, group: Group, expected: list[float]) -> None:
    assert_close(transform(U, group), tensor(expected))


# found: 11
def test_cautious_adam_with_decay_after_it_is_that_of_the_paper() -> None:
    lr, decay = 0.1, 0.5
    ours = nn.Parameter(torch.randn(20, dtype=torch.float64))
    theirs = ours.detach().clone()
    update = chain(cautious(), decay_weights(lr * decay))
    optim = ParamTransformingOptimizer([ours], Adam, update=update, lr=lr)
    mean, square = torch.zeros_like(theirs), torch.zeros_like(theirs)
    for step in range(1, 11):
        grad = torch.randn_like(theirs)
        ours.grad = grad.clone()
        optim.step()
        mean.lerp_(grad, 0.1)
        square.lerp_(grad**2, 0.001)
        adam = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        mask = (adam * grad > 0).to(adam.dtype)
        theirs = theirs - lr * decay * theirs - lr * adam * mask / mask.mean().clamp_min(1e-3)
        assert_close(ours.detach(), theirs)


def test_cautious_keeps_a_tenth_of_a_percent_at_least() -> None:
    grad = torch.full((10_000,), -1.0)
    grad[0] = 1.0
    update = torch.full((10_000,), -1.0)
    result = cautious()(update, {"grad": grad})
    assert_close(result[0].item(), -1000.0)
    assert result[1:].count_nonzero() == 0


def test_complex() -> None:
    u, p = tensor([3 + 4j, 1j]), tensor([3j, -4 + 0j])
    assert_close(cautious()(u, {"grad": tensor([-1 + 0j, 1j])}), tensor([6 + 8j, 0]))
    assert_close(trust_ratio()(u, {"param": p}), 5 / sqrt(26) * u)
    assert_close(decay_weights(0.5)(u, {"param": p}), u - 0.5 * p)
    assert_close(decay_weights(0.5, ord=1)(u, {"param": p}), u - 0.5 * tensor([1j, -1 + 0j]))


@given(pairs())
def test_trust_ratio_makes_the_step_as_long_as_the_parameter(pair: tuple[Tensor, Tensor]) -> None:
    u, p = pair
    length = p.norm() if u.any() and p.any() else u.norm()
    assert_close(trust_ratio()(u, {"param": p}).norm(), length)


@given(pairs())
def test_cautious_never_goes_up_the_gradient(pair: tuple[Tensor, Tensor]) -> None:
    u, grad = pair
    assert (cautious()(u, {"grad": grad}) * grad <= 0).all()


@given(pairs())
def test_cautious_decay_never_slows_an_update_down(pair: tuple[Tensor, Tensor]) -> None:
    u, p = pair
    assert (decay_weights(0.1, cautious=True)(u, {"param": p}).abs() >= u.abs()).all()


@pytest.mark.parametrize("transform", [cautious(), trust_ratio(), scale_by_param_norm(), scale_by_param_rms()])
def test_the_whole_parameter_counts_whatever_the_group_says(transform: Transform) -> None:
    t, group = torch.randn(4, 3), {"param": torch.randn(4, 3), "grad": torch.randn(4, 3), "param_ndim": 1}
    assert torch.equal(broadcast(transform)(t, group), transform(t, group))
    assert not torch.allclose(broadcast(transform, 1)(t, group), transform(t, group))


def test_decay_to_init_by_hand() -> None:
    decay = decay_to_init(0.5)
    first = P.clone()
    state = decay.init(first, {})
    first.zero_()  # as an optimizer does it
    for _ in range(2):
        result, state = decay.update(U, {"param": P + 2}, state)
        assert_close(result, U - 1)


# In an optimizer


def make_params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), nn.Parameter(torch.randn(3, dtype=torch.float64))]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)


Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def masked_mean(u: Tensor, p: Tensor, g: Tensor, first: Tensor) -> Tensor:
    mask = (u * g < 0).double()
    return u * mask / max(mask.mean().item(), 1e-3)


FORMULAS: list[tuple[Transform, Formula]] = [
    (cautious(), masked_mean),
    (trust_ratio(), lambda u, p, g, first: u * (0.1 * p.norm() / u.norm())),
    (trust_ratio(0.5, 2.0), lambda u, p, g, first: u * (0.1 * p.norm() / u.norm()).clamp(0.5, 2.0)),
    (scale_by_param_norm(), lambda u, p, g, first: u * p.norm()),
    (scale_by_param_rms(), lambda u, p, g, first: u * p.square().mean().sqrt()),
    (decay_weights(0.02), lambda u, p, g, first: u - 0.02 * p),
    (decay_weights(0.02, ord=1), lambda u, p, g, first: u - 0.02 * p.sign()),
    (decay_weights(0.02, cautious=True), lambda u, p, g, first: u - 0.02 * p * (u * p <= 0)),
    (decay_to_init(0.3), lambda u, p, g, first: u - 0.3 * (p - first)),
    (
        chain(scale_by_param_norm(), decay_weights(0.02), scale(0.5)),
        lambda u, p, g, first: 0.5 * (u * p.norm() - 0.02 * p),
    ),
]


@pytest.mark.parametrize(("transform", "formula"), FORMULAS, ids=[repr(transform) for transform, _ in FORMULAS])
@pytest.mark.parametrize("InnerOpt", [Adam, SGD])
def test_steps_against_a_plain_loop(transform: Transform, formula: Formula, InnerOpt: Any) -> None:
    params, reference = make_params(), make_params()
    first = [p.detach().clone() for p in reference]
    optim = ParamTransformingOptimizer([{"params": [p]} for p in params], InnerOpt, update=transform, lr=0.1)
    inner = InnerOpt(reference, lr=0.1)
    for step in range(20):
        set_grads(params, step)
        set_grads(reference, step)
        before = [p.detach().clone() for p in reference]
        optim.step()
        inner.step()
        for p, q, start, at_first in zip(params, reference, before, first, strict=True):
            assert q.grad is not None
            q.data = start + formula(q.detach() - start, start, q.grad, at_first)
            assert_close(p, q)


def test_decay_weights_is_that_of_adamw() -> None:
    params, reference = make_params(), make_params()
    optim = ParamTransformingOptimizer(params, Adam, update=decay_weights(0.1 * 0.3), lr=0.1)
    adamw = AdamW(reference, lr=0.1, weight_decay=0.3)
    for step in range(20):
        set_grads(params, step)
        set_grads(reference, step)
        optim.step()
        adamw.step()
        for p, q in zip(params, reference, strict=True):
            assert_close(p, q)


def test_lars_in_pre() -> None:
    params, reference = make_params(), make_params()
    optim = ParamTransformingOptimizer(params, SGD, pre=trust_ratio(lr_included=False), lr=0.1)
    set_grads(params, 0)
    set_grads(reference, 0)
    optim.step()
    for p, q in zip(params, reference, strict=True):
        assert q.grad is not None
        assert_close(p.detach(), q.detach() - 0.1 * q.norm() * q.grad / q.grad.norm())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: trust_ratio(2.0, 1.0), ValueError, "trust_ratio: needs min <= max, got min=2.0 and max=1.0"),
        (lambda: trust_ratio(-1.0), ValueError, "trust_ratio.min must be >= 0, got -1.0"),
        (lambda: trust_ratio(max=math.nan), ValueError, "trust_ratio.max must be >= 0, got nan"),
        (lambda: scale_by_param_norm(-1.0), ValueError, "scale_by_param_norm.min must be >= 0"),
        (lambda: scale_by_param_rms(-1.0), ValueError, "scale_by_param_rms.min must be >= 0"),
        (lambda: decay_weights(-1.0), ValueError, "decay_weights.rate must be >= 0"),
        (lambda: decay_weights(0.1, ord=3), TypeError, "decay_weights.ord must be 1 or 2, got 3"),  # type: ignore[arg-type]
        (lambda: decay_weights(0.1, ord=inf), TypeError, "decay_weights.ord must be 1 or 2"),  # type: ignore[arg-type]
        (lambda: decay_to_init(-1.0), ValueError, "decay_to_init.rate must be >= 0"),
    ],
)
def test_errors(make: Callable[[], Transform], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("transform", "key"), [(cautious(), "grad"), (trust_ratio(), "param"), (decay_weights(0.1), "param")]
)
def test_missing_context(transform: Transform, key: str) -> None:
    with pytest.raises(ValueError, match=f'needs group."{key}"'):
        transform(U, {})
