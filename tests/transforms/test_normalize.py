import re
from collections.abc import Callable
from math import inf, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.linalg import vector_norm
from torch.testing import assert_close

import gradchain as gc
from gradchain import Group, Transform, broadcast, centralize, normalize, standardize
from tests.strategies import tensors

Z = tensor([[3 + 4j, 0], [-1j, 2 - 2j]])


@pytest.mark.parametrize(
    ("transform", "group", "values", "expected"),
    [
        (normalize(), {}, [3.0, 0.0, -4.0], [0.6, 0.0, -0.8]),
        (normalize(1), {}, [3.0, 0.0, -1.0], [0.75, 0.0, -0.25]),
        (normalize(), {"normalize.ord": inf}, [3.0, 0.0, -4.0], [0.75, 0.0, -1.0]),
        (centralize(), {}, [[1.0, 5.0], [2.0, 0.0]], [[-2.0, 2.0], [1.0, -1.0]]),
        (centralize(), {}, [1.0, 5.0], [1.0, 5.0]),
        (standardize(), {}, [[1.0, 1.0], [5.0, 5.0]], [[-1.0, -1.0], [1.0, 1.0]]),
    ],
)
def test_by_hand(transform: Transform, group: Group, values: list[float], expected: list[float]) -> None:
    assert_close(transform(tensor(values), group), tensor(expected))


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (normalize(), Z / sqrt(25 + 1 + 8)),
        (normalize(1), Z / (5 + 1 + sqrt(8))),
        (centralize(), tensor([[1.5 + 2j, -1.5 - 2j], [-1 + 0.5j, 1 - 0.5j]])),
        (standardize(), (Z - Z.sum() / 4) / ((Z - Z.sum() / 4).abs().square().sum() / 4).sqrt()),
    ],
)
def test_complex(transform: Transform, expected: Tensor) -> None:
    assert_close(transform(Z, {}), expected)


@given(tensors(), st.sampled_from([0.5, 1, 2, 3, inf]))
def test_normalize_fixes_the_norm_and_keeps_the_direction(t: Tensor, ord: float) -> None:
    result, norm = normalize(ord)(t, {}), vector_norm(t, ord)
    assert_close(vector_norm(result, ord), norm.sign())
    assert_close(norm * result, t)


@given(tensors())
def test_centralize_takes_one_number_from_each_output(t: Tensor) -> None:
    result = centralize()(t, {})
    if t.ndim < 2:
        assert torch.equal(result, t)
    else:
        removed = (t - result).flatten(1)
        assert_close(result.flatten(1).sum(1), torch.zeros_like(removed[:, 0]))
        assert_close(removed, removed[:, :1].expand_as(removed))


def test_centralize_has_its_own_dimensions_unless_told_otherwise() -> None:
    t = torch.randn(2, 3, 4)
    for param_ndim in (0, 1, 2, -1, None):
        assert torch.equal(broadcast(centralize())(t, {"param_ndim": param_ndim}), t - t.mean((1, 2), keepdim=True))
    assert_close(broadcast(centralize(), 2)(t, {"param_ndim": None}), t - t.mean(2, keepdim=True))
    assert torch.equal(broadcast(centralize(), 1)(t, {}), t)


@given(tensors(), st.integers(1, 100), st.integers(-100, 100))
def test_standardize_fixes_mean_and_deviation(t: Tensor, factor: int, shift: int) -> None:
    result = standardize()(t, {})
    spread = (t != t.flatten()[0]).any().double()
    assert_close(result.sum(), torch.zeros_like(spread), rtol=0, atol=1e-4)
    assert_close(result.square().mean(), spread)
    assert_close(standardize()(factor * t + shift, {}), result, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 5000), st.floats(-1e3, 1e3, width=32), st.sampled_from([torch.float32, torch.bfloat16]))
def test_standardize_makes_equal_elements_zero(n: int, value: float, dtype: torch.dtype) -> None:
    assert not standardize()(torch.full((n,), value, dtype=dtype), {}).any()


def test_half_precision_norms_neither_overflow_nor_lose_digits() -> None:
    t = torch.full((17_500,), 600.0, dtype=torch.float16)  # of norm 79373; the largest float16 is 65504
    assert_close(vector_norm(normalize()(t, {}).double()).item(), 1.0, rtol=1e-3, atol=0)
    assert_close(normalize(1)(t, {}), torch.full_like(t, 1 / 17_500))
    t[0] = -600
    assert_close(standardize()(t, {})[0].item(), -sqrt(17_499), rtol=1e-3, atol=0)
    ones = torch.ones(7110, dtype=torch.bfloat16)  # of norm 84.32, in bfloat16 84.5
    assert torch.equal(
        normalize()(torch.cat([ones, 84 * ones[:1]]), {})[-1], tensor(84 / sqrt(7110 + 84**2)).bfloat16()
    )


@pytest.mark.parametrize("size", [1e-15, 1e15])
@pytest.mark.parametrize("ord", [1, 2, inf])
def test_small_and_large_gradients_have_norm_1(size: float, ord: float) -> None:
    assert_close(vector_norm(normalize(ord)(size * torch.randn(100), {}), ord), tensor(1.0))


@pytest.mark.parametrize("value", [1e-25, 1e-38, 1e-45])
@pytest.mark.parametrize("transform", [normalize(), normalize(1), normalize(inf), centralize(), standardize()])
def test_tiny_gradients_stay_short(transform: Transform, value: float) -> None:
    t = value * torch.randn(10, 100)
    result = transform(t, {})
    assert result.isfinite().all()
    limit = sqrt(t.numel()) if transform in (normalize(inf), standardize()) else 1
    assert vector_norm(result) <= limit * (1 + 1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normalize(0), ValueError, "normalize.ord must be > 0, got 0"),
        (lambda: normalize("fro"), TypeError, "normalize.ord must be a number, got 'fro'"),  # type: ignore[arg-type]
        (lambda: normalize()(Z, {"normalize.ord": -1}), ValueError, "normalize.ord must be > 0, got -1"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_norms_of_two_orders_in_one_program() -> None:
    params = [torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2)]
    kinds = gc.partition({"a": gc.normalize(inf), "b": gc.lmo_l2()})
    named = zip("ab", params, strict=True)
    optimizer = gc.ParamTransformingOptimizer(named, post=gc.chain(kinds), param_ndim=None, lr=1.0)
    for _ in range(2):
        optimizer.step()
    assert_close(params[0].data, torch.tensor([0.75, 1.0]))
    assert_close(params[1].data, torch.tensor([0.6, 0.8]))
