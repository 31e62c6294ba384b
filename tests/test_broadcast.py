"""``broadcast`` and ``to_batch``: sub-tensors, context, layouts."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradchain import Group, Transform, broadcast, centralize, chain, normalize, reject_from_param, sign, to_batch


def subtract_max(tensor: Tensor, group: Group) -> Tensor:
    """Depends on the whole sub-tensor, and on its context."""
    return tensor - tensor.amax() + 2 * group["param"].sum() if "param" in group else tensor - tensor.amax()


def loop(transform: Transform, tensor: Tensor, group: Group, ndim: int) -> Tensor:
    """The definition of broadcasting to ``ndim`` dimensions, without reshaping."""
    if tensor.numel() == 0:
        return tensor.clone()
    result = torch.empty_like(tensor)
    for index in itertools.product(*(range(size) for size in tensor.shape[: tensor.ndim - ndim])):
        context = {key: value[index] for key, value in group.items() if isinstance(value, Tensor)}
        result[index] = transform(tensor[index], {**group, **context})
    return result


@pytest.mark.parametrize(
    ("param_ndim", "shape"),
    [
        (0, (120, 1)),
        (1, (24, 5)),
        (-3, (24, 5)),
        (2, (6, 4, 5)),
        (-2, (6, 4, 5)),
        (3, (2, 3, 4, 5)),
        (-1, (2, 3, 4, 5)),
        (4, (1, 2, 3, 4, 5)),
        (-4, (120, 1)),
        (None, (1, 2, 3, 4, 5)),
    ],
)
def test_batch_form(param_ndim: int | None, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(2, 3, 4, 5)
    batch = to_batch(tensor, param_ndim)
    assert batch.shape == shape
    assert batch.data_ptr() == tensor.data_ptr()
    assert torch.equal(batch.flatten(), tensor.flatten())


@pytest.mark.parametrize(
    ("shape", "param_ndim", "batch"),
    [
        # found: 28
        ((), 0, (1, 1)),
        ((), None, (1, 1)),
        ((0,), 0, (0, 1)),
        ((0, 3), 1, (0, 3)),
        ((2, 0), 1, (2, 0)),
        ((2, 0), 0, (0, 1)),
    ],
)
def test_batch_form_of_small_tensors(shape: tuple[int, ...], param_ndim: int | None, batch: tuple[int, ...]) -> None:
    assert to_batch(torch.zeros(shape), param_ndim).shape == batch


@given(shape=st.lists(st.integers(0, 3), max_size=4), data=st.data())
def test_equals_a_loop_over_sub_tensors(shape: list[int], data: st.DataObject) -> None:
    param_ndim = data.draw(st.one_of(st.none(), st.integers(-len(shape), len(shape))))
    tensor, param = torch.randn(2, *shape, generator=torch.Generator().manual_seed(len(shape))).unbind()
    ndim = len(shape) if param_ndim is None else param_ndim % len(shape) if param_ndim < 0 else param_ndim
    for transform, group in ((normalize(), {}), (subtract_max, {}), (subtract_max, {"param": param, "lr": 0.1})):
        expected = loop(transform, tensor, group, ndim)
        torch.testing.assert_close(broadcast(transform, param_ndim)(tensor, group), expected)
        torch.testing.assert_close(broadcast(transform)(tensor, {**group, "param_ndim": param_ndim}), expected)


def test_any_layout() -> None:
    tensor = torch.randn(2, 3, 4, 5)
    for layout in (tensor.contiguous(memory_format=torch.channels_last), tensor.mT.contiguous().mT, tensor[..., ::2]):
        torch.testing.assert_close(
            broadcast(normalize(), 2)(layout, {}), broadcast(normalize(), 2)(layout.contiguous(), {})
        )


def test_distributes_over_a_chain_and_leaves_broadcast_members_alone() -> None:
    whole = broadcast(chain(normalize(), broadcast(sign(), None)), 1)
    assert whole == chain(broadcast(normalize(), 1), broadcast(sign(), None))
    assert broadcast(whole, 2) == whole
    assert broadcast(broadcast(normalize(), 1), 2) == broadcast(normalize(), 1)
    assert repr(broadcast(normalize())) == "broadcast(normalize())"
    assert repr(whole) == "chain(broadcast(normalize(), param_ndim=1), broadcast(sign(), param_ndim=None))"


def test_broadcast_of_the_whole_is_the_plain_call() -> None:
    tensor = torch.randn(3, 4)
    assert torch.equal(broadcast(normalize(), None)(tensor, {}), normalize()(tensor, {}))
    assert torch.equal(broadcast(lambda t, g: t * t.sum().item(), 2)(tensor, {}), tensor * tensor.sum())


def test_is_a_value() -> None:
    rows = broadcast(normalize(), 1)
    for copied in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert copied == rows
        assert hash(copied) == hash(rows)
    assert rows != broadcast(normalize(), 2)
    assert pickle.loads(pickle.dumps(broadcast(normalize()))) == broadcast(normalize()) != broadcast(normalize(), None)


def test_whole_transforms_are_not_for_the_param_ndim_of_the_group() -> None:
    tensor, param = torch.randn(2, 4, 3, 3)
    group: Group = {"param": param, "param_ndim": 1}
    for transform in (centralize(), reject_from_param()):
        assert torch.equal(broadcast(transform)(tensor, group), transform(tensor, group))
        assert not torch.allclose(broadcast(transform, 1)(tensor, group), transform(tensor, group))


@pytest.mark.parametrize("param_ndim", [3, -3])
def test_param_ndim_larger_than_the_tensor(param_ndim: int) -> None:
    for transform in (normalize(), sign()):
        with pytest.raises(
            ValueError, match=rf"param_ndim={param_ndim} needs a tensor of at least 3 dimensions, got 2"
        ):
            broadcast(transform, param_ndim)(torch.ones(2, 2), {})


@pytest.mark.parametrize("param_ndim", [1.0, "1", True])
def test_param_ndim_that_is_no_int(param_ndim: Any) -> None:
    with pytest.raises(TypeError, match="param_ndim must be an int or None, got"):
        broadcast(normalize(), param_ndim)
    with pytest.raises(TypeError, match="param_ndim must be an int or None, got"):
        broadcast(normalize())(torch.ones(2), {"param_ndim": param_ndim})


def test_param_ndim_missing_from_the_group() -> None:
    with pytest.raises(ValueError, match=r'broadcast\(normalize\(\)\) reads group\["param_ndim"\]'):
        broadcast(normalize())(torch.ones(2), {})


def test_context_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r'group\["param"\] must have the shape \(2, 3\) of the tensor, got \(3,\)'):
        broadcast(reject_from_param(), 1)(torch.ones(2, 3), {"param": torch.ones(3)})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda t, g: t.sum(), r"<lambda> must keep the shape of its input, \(3,\), got \(\)"),
        # found: 32
        (lambda t, g: t.mul_(2), "<lambda> wrote to its input; return a new tensor instead"),
        (lambda t, g: g["param"].mul_(2), r'<lambda> wrote to group\["param"\]'),
        (lambda t, g: None, "<lambda> must return a tensor like its input, got NoneType"),
        (lambda t, g: t * t.sum().item(), "We don't support vmap over calling .item()"),
    ],
)
def test_broken_function(broken: Callable[[Tensor, Group], Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        broadcast(broken, 1)(torch.ones(2, 3), {"param": torch.ones(2, 3)})
