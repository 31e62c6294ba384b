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

from gradchain import Group, Transform, broadcast, clip_adaptive, clip_by_norm, clip_by_rms
from tests.strategies import pairs, tensors

T = tensor([3.0, -4.0])
P = tensor([0.0, 10.0])
BOUNDS = st.floats(1e-3, 1e3)


@pytest.mark.parametrize(
    ("transform", "group", "expected"),
    [
        (clip_by_norm(1.0), {}, [0.6, -0.8]),
        (clip_by_norm(3.5, ord=1), {}, [1.5, -2.0]),
        (clip_by_norm(1.0), {"clip_by_norm.max_norm": 6}, [3.0, -4.0]),
        (clip_by_rms(sqrt(0.5)), {}, [0.6, -0.8]),
        (clip_by_rms(1), {"clip_by_rms.threshold": 4}, [3.0, -4.0]),
        (clip_adaptive(0.1), {"param": P}, [0.6, -0.8]),
        (clip_adaptive(0.1), {"param": P, "clip_adaptive.clipping": 1}, [3.0, -4.0]),
        (clip_adaptive(0.1), {"param": 0 * P}, [6e-5, -8e-5]),
        (clip_adaptive(0.1), {"param": 0 * P, "clip_adaptive.eps": 10}, [0.6, -0.8]),
    ],
)
def test_by_hand(transform: Transform, group: Group, expected: list[float]) -> None:
    assert_close(transform(T, group), tensor(expected))


@pytest.mark.parametrize(
    ("transform", "factor"),
    [
        (clip_by_norm(1.0), 1 / sqrt(30)),
        (clip_by_norm(1.0, ord=1), 1 / (5 + sqrt(5))),
        (clip_by_rms(1.0), 1 / sqrt(15)),
    ],
)
def test_complex(transform: Transform, factor: float) -> None:
    z = tensor([3 + 4j, 1 - 2j])
    assert_close(transform(z, {}), factor * z)


def assert_clipped(result: Tensor, t: Tensor, bound: float, ord: float = 2) -> None:
    """``result`` is ``t`` if that is short enough, else as long as the bound allows and in the direction of ``t``."""
    norm = vector_norm(t, ord)
    if norm <= bound * (1 - 1e-9):
        assert torch.equal(result, t)
    else:
        assert_close(result * (norm / bound), t)


@given(tensors(), BOUNDS, st.sampled_from([0.5, 1, 2, 3, inf]))
def test_clip_by_norm_bounds_the_norm(t: Tensor, max_norm: float, ord: float) -> None:
    assert_clipped(clip_by_norm(max_norm, ord=ord)(t, {}), t, max_norm, ord)


@given(tensors(), BOUNDS)
def test_clip_by_rms_bounds_the_root_mean_square(t: Tensor, threshold: float) -> None:
    assert_clipped(clip_by_rms(threshold)(t, {}), t, threshold * sqrt(t.numel()))


@given(pairs(), BOUNDS, BOUNDS)
def test_clip_adaptive_bounds_the_norm_by_that_of_the_parameter(
    pair: tuple[Tensor, Tensor], clipping: float, eps: float
) -> None:
    t, param = pair
    bound = clipping * max(vector_norm(param).item(), eps)
    assert_clipped(clip_adaptive(clipping, eps)(t, {"param": param}), t, bound)


def test_clip_adaptive_reads_the_parameter_of_each_unit() -> None:
    t, param = tensor([[3.0, 4.0], [3.0, 4.0]]), tensor([[0.0, 10.0], [0.0, 100.0]])
    assert_close(broadcast(clip_adaptive(0.1), -1)(t, {"param": param}), tensor([[0.6, 0.8], [3.0, 4.0]]))


@pytest.mark.parametrize("transform", [clip_by_norm(inf), clip_by_rms(inf), clip_adaptive(inf)])
def test_an_infinite_bound_clips_nothing(transform: Transform) -> None:
    assert torch.equal(transform(T, {"param": P}), T)


@pytest.mark.parametrize("transform", [clip_by_norm(1.0), clip_by_rms(17_500**-0.5), clip_adaptive(1.0)])
def test_float16_norms_do_not_overflow(transform: Transform) -> None:
    t = torch.full((17_500,), 600.0, dtype=torch.float16)  # of norm 79373; the largest float16 is 65504
    result = transform(t, {"param": torch.eye(1, 17_500, dtype=torch.float16)[0]})
    assert_close(vector_norm(result.double()).item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("transform", [clip_by_norm(84.0), clip_adaptive(84.0)])
def test_bfloat16_norms_keep_their_digits(transform: Transform) -> None:
    t = torch.ones(7110, dtype=torch.bfloat16)  # of norm 84.32, in bfloat16 84.5, which would make 0.9922
    assert torch.equal(transform(t, {"param": torch.eye(1, 7110, dtype=torch.bfloat16)[0]}), 0.99609375 * t)


@pytest.mark.parametrize("transform", [clip_by_norm(1e-3), clip_by_rms(1e-3), clip_adaptive(1e-3)])
def test_tiny_gradients_stay_as_they_are(transform: Transform) -> None:
    t = 1e-25 * torch.randn(100)
    assert torch.equal(transform(t, {"param": torch.ones(100)}), t)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clip_by_norm(0), ValueError, "clip_by_norm.max_norm must be > 0, got 0"),
        (lambda: clip_by_norm(1, ord=-1), ValueError, "clip_by_norm.ord must be > 0, got -1"),
        (lambda: clip_by_norm("1"), TypeError, "clip_by_norm.max_norm must be a number, got '1'"),  # type: ignore[arg-type]
        (
            lambda: clip_by_norm(1)(T, {"clip_by_norm.max_norm": -1}),
            ValueError,
            "clip_by_norm.max_norm must be > 0, got -1",
        ),
        (lambda: clip_by_rms(-2), ValueError, "clip_by_rms.threshold must be > 0, got -2"),
        (lambda: clip_adaptive(1, eps=0), ValueError, "clip_adaptive.eps must be > 0, got 0"),
        (
            lambda: clip_adaptive(1)(T, {"lr": 0.1}),
            ValueError,
            'clip_adaptive(clipping=1) needs group["param"], a tensor of the shape (2,) of its input. An optimizer '
            'sets it in pre and update (in post, the tensor is the parameter); in a call by hand, pass {"param": ...}. '
            "The group has the keys ['lr']",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
