import re

import pytest
import torch
from hypothesis import given
from torch import Tensor, tensor
from torch.linalg import vector_norm
from torch.testing import assert_close

from gradchain import broadcast, reject_from_param
from tests.strategies import pairs

reject = reject_from_param()


def test_by_hand() -> None:
    assert_close(reject(tensor([1.0, 2.0]), {"param": tensor([3.0, 4.0])}), tensor([-0.32, 0.24]))
    assert_close(reject(tensor([1.0, 2.0]), {"param": tensor([0.0, 0.0])}), tensor([1.0, 2.0]))


@given(pairs())
def test_what_is_left_is_orthogonal_and_what_is_removed_parallel(pair: tuple[Tensor, Tensor]) -> None:
    t, param = pair
    result, square = reject(t, {"param": param}), param.square().sum()
    assert (result * param).sum().abs() <= 1e-12 * vector_norm(t) * vector_norm(param)
    assert_close(square * (t - result), (t * param).sum() * param, rtol=1e-7, atol=1e-7 * (1 + square.item()))


def test_complex_tensors_are_pairs_of_reals() -> None:
    t, param = torch.randn(2, 5, dtype=torch.complex64)
    expected = reject(torch.view_as_real(t), {"param": torch.view_as_real(param)})
    assert_close(torch.view_as_real(reject(t, {"param": param})), expected)


def test_it_acts_on_the_whole_unless_told_otherwise() -> None:
    t, param = torch.randn(2, 2, 3)
    for param_ndim in (0, 1, -1, None):
        assert torch.equal(
            broadcast(reject)(t, {"param": param, "param_ndim": param_ndim}), reject(t, {"param": param})
        )
    rows = torch.stack([reject(row, {"param": p}) for row, p in zip(t, param, strict=True)])
    assert_close(broadcast(reject, 1)(t, {"param": param, "param_ndim": None}), rows)
    assert not torch.allclose(rows, reject(t, {"param": param}))


@pytest.mark.parametrize("size", [1e-45, 1e-25, 1e-19, 1e-18])
def test_tiny_parameters_do_not_blow_up(size: float) -> None:
    t, param = torch.randn(2, 100)
    assert vector_norm(reject(t, {"param": size * param})) <= vector_norm(t) * (1 + 1e-6)


def test_float16_products_do_not_overflow() -> None:
    t = torch.full((100,), 6e4, dtype=torch.float16)
    assert_close(reject(t, {"param": t}), torch.zeros_like(t), rtol=0, atol=0.1)


def test_missing_parameter() -> None:
    message = 'reject_from_param() needs group["param"], a tensor of the shape (2,) of its input'
    with pytest.raises(ValueError, match=re.escape(message)):
        reject(tensor([1.0, 2.0]), {})
