import re
from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from gradchain import Group, Transform, add, chain, clamp, scale, set_to_zero, sign, zero_nonfinite
from tests.strategies import pairs, tensors


@pytest.mark.parametrize(
    ("transform", "group", "values", "expected"),
    [
        (sign(), {}, [-3.0, 0.0, 0.5, nan, -inf], [-1.0, 0.0, 1.0, 0.0, -1.0]),
        (scale(-2.0), {}, [1.0, -3.0], [-2.0, 6.0]),
        (scale(-2.0), {"scale.factor": 0.5}, [1.0, -3.0], [0.5, -1.5]),
        (add(0.5), {}, [1.0, -3.0], [1.5, -2.5]),
        (add(0.5), {"add.bias": -1}, [1.0, -3.0], [0.0, -4.0]),
        (clamp(-1, 2), {}, [-5.0, 0.5, nan, inf], [-1.0, 0.5, nan, 2.0]),
        (clamp(-1), {}, [-5.0, 0.5, 5.0], [-1.0, 0.5, 5.0]),
        (clamp(max=-1), {}, [-5.0, 0.5, 5.0], [-5.0, -1.0, -1.0]),
        (clamp(-1, 2).named("grad"), {"grad.max": 0, "clamp.max": 1}, [-5.0, 5.0], [-1.0, 0.0]),
        (set_to_zero(), {}, [nan, -1.5, inf], [0.0, 0.0, 0.0]),
        (zero_nonfinite(), {}, [nan, -1.5, inf, -inf], [0.0, -1.5, 0.0, 0.0]),
    ],
)
def test_by_hand(transform: Transform, group: Group, values: list[float], expected: list[float]) -> None:
    assert_close(transform(tensor(values), group), tensor(expected), rtol=0, atol=0, equal_nan=True)


Z = tensor([3 + 4j, 0, -2j])


@pytest.mark.parametrize(
    ("transform", "values", "expected"),
    [
        (sign(), Z, tensor([0.6 + 0.8j, 0, -1j])),
        (scale(-0.5), Z, tensor([-1.5 - 2j, 0, 1j])),
        (zero_nonfinite(), tensor([complex(nan, 1), complex(1, inf), 2j]), tensor([0, 0, 2j])),
    ],
)
def test_complex(transform: Transform, values: Tensor, expected: Tensor) -> None:
    assert_close(transform(values, {}), expected)


@given(tensors())
def test_sign_and_magnitude_make_the_tensor(t: Tensor) -> None:
    result = sign()(t, {})
    assert torch.equal(result * t.abs(), t)
    assert torch.equal(result.abs(), (t != 0).double())


@given(tensors(), st.integers(1, 100), st.integers(-100, 100))
def test_scale_and_add_are_undone_by_their_inverses(t: Tensor, factor: int, bias: int) -> None:
    there = chain(scale(factor), add(bias))
    back = chain(add(-bias), scale(1 / factor))
    assert_close(back(there(t, {}), {}), t)
    assert_close(there(t, {}), chain(add(bias / factor), scale(factor))(t, {}))


@given(tensors(), st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_clamp_moves_only_what_is_out_of_bounds(t: Tensor, low: float, width: float) -> None:
    high = low + width
    result = clamp(low, high)(t, {})
    below, above = t < low, t > high
    assert (result[below] == low).all()
    assert (result[above] == high).all()
    assert torch.equal(result[~below & ~above], t[~below & ~above])


@given(pairs(), st.sampled_from([nan, inf, -inf]))
def test_zero_nonfinite_keeps_what_is_finite(pair: tuple[Tensor, Tensor], value: float) -> None:
    t, bad = pair[0], pair[1] > 0
    assert torch.equal(zero_nonfinite()(t.masked_fill(bad, value), {}), t.masked_fill(bad, 0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clamp(), ValueError, "clamp: needs at least one bound, got min=None and max=None"),
        (lambda: clamp(2, 1), ValueError, "clamp: needs min <= max, got min=2 and max=1"),
        (lambda: clamp(0, 1)(Z.real, {"clamp.min": 2}), ValueError, "clamp: needs min <= max, got min=2 and max=1"),
        (lambda: clamp("0"), TypeError, "clamp.min must be a number or None, got '0'"),  # type: ignore[arg-type]
        (lambda: clamp(0)(Z, {}), TypeError, "clamp(min=0) acts on real tensors, got torch.complex64; apply it to"),
        (lambda: scale(), TypeError, "scale: missing a required argument: 'factor'"),  # type: ignore[call-arg]
        (lambda: scale(True), TypeError, "scale.factor must be a number, got True"),
        (lambda: scale(1)(Z, {"scale.factor": None}), TypeError, "scale.factor must be a number, got None"),
        (lambda: add(1j), TypeError, "add.bias must be a number, got 1j"),  # type: ignore[arg-type]
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
