"""How programs are written, and in which blocks tensors go through them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from gradchain import Group, ParamTransformingOptimizer, Transform, add, chain, clamp, clip_by_norm, scale
from gradchain.engine.table import scalar, scalars
from tests.engine.test_functions import SHAPES


def make_optimizer(shapes: list[tuple[int, ...]], pre: Transform, **arguments: Any) -> ParamTransformingOptimizer:
    generator = torch.Generator("cpu").manual_seed(0)
    params = [torch.zeros(shape, requires_grad=True, device="cpu") for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, device="cpu")
    return ParamTransformingOptimizer(params, pre=pre, lr=1.0, **{"param_ndim": None, **arguments})


def updates(optimizer: ParamTransformingOptimizer) -> list[Tensor]:
    optimizer.step()
    return [-param.detach() for group in optimizer.param_groups for param in group["params"]]


def mixed(tensor: Tensor, group: Group) -> Tensor:
    result: Tensor = (0.5 + 3 * (tensor * 0.3 + 2) / 1.7 - 0.4) * -0.0 - 0.0 + tensor
    return result


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_keep_the_sign_of_zero(dtype: torch.dtype) -> None:
    like = torch.ones(2, dtype=dtype)
    for number in (0.0, -0.0, 0.0):
        assert torch.equal(scalar(number, like).signbit(), torch.tensor(number).signbit())
    assert scalar(0.3, like) is scalar(0.3, like)
    assert [value.dtype for value in scalars(2, [like, like])] == [dtype, dtype]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numbers_give_the_same_result_as_by_hand(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    optimizer = make_optimizer(shapes, mixed)
    params = optimizer.param_groups[0]["params"]
    for param in params:
        grad, param.grad = param.grad, None
        param.data, param.grad = param.data.to(dtype), grad.to(dtype)
    expected = [mixed(param.grad.clone(), {}) for param in params]
    for result, by_hand in zip(updates(optimizer), expected, strict=True):
        assert torch.equal(result, by_hand)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_default_device_has_no_influence(shapes: list[tuple[int, ...]]) -> None:
    pre = chain(scale(0.9), add(0.1), mixed, clip_by_norm(1.0))
    expected = updates(make_optimizer(shapes, pre))
    optimizer = make_optimizer(shapes, pre)
    with torch.device("meta"):
        optimizer.signal(loss=1.0)
        assert optimizer.explain().rows
        results = updates(optimizer)
    assert_close(results, expected)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_fake_tensors_before_and_after_real_ones(shapes: list[tuple[int, ...]]) -> None:
    pre = chain(scale(0.7), add(0.1))
    expected = updates(make_optimizer(shapes, pre))
    with FakeTensorMode():
        updates(make_optimizer(shapes, pre))
    assert_close(updates(make_optimizer(shapes, pre)), expected)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_fake_tensors_outside_of_their_mode(shapes: list[tuple[int, ...]]) -> None:
    with FakeTensorMode():
        optimizer = make_optimizer(shapes, chain(scale(0.7), lambda tensor, group: 2 * tensor))
    updates(optimizer)


@pytest.mark.parametrize("shapes", [[(3,), (4,)], [(3, 1), (4, 2)], [(5,)]])
def test_numbers_that_differ_from_tensor_to_tensor(shapes: list[tuple[int, ...]]) -> None:
    def by_size(tensor: Tensor, group: Group) -> Tensor:
        result: Tensor = tensor * (group["k"] * tensor.numel()) + (tensor.numel() + group["k"])
        return result

    optimizer = make_optimizer(shapes, by_size, defaults={"k": 0.5})
    expected = [by_size(param.grad.clone(), {"k": 0.5}) for param in optimizer.param_groups[0]["params"]]
    assert_close(updates(optimizer), expected)


@pytest.mark.parametrize("param_ndim", [None, 1])
def test_a_quotient_by_one_is_left_out(param_ndim: int | None) -> None:
    def clip(tensor: Tensor, group: Group) -> Tensor:
        length: Tensor = tensor.norm() / 1.0
        return tensor / length.clamp_min(1)

    program = str(make_optimizer([(4, 3)], clip, param_ndim=param_ndim).explain().program)
    assert program.count("div") + program.count("mul") == 1


# Blocks


@pytest.mark.parametrize(
    ("pre", "shapes", "ways"),
    [
        (clamp(-0.5, 0.5), [(16, 16)] * 9, "9 tensors in lists"),
        (clamp(-0.5, 0.5), [(16, 16), (256, 256), (2, 2)], "2 tensors in lists, 1 tensor one by one"),
        (scale(0.5), [(16, 16), (1024, 1024), (2, 2)], "3 tensors in lists"),
        (clip_by_norm(1.0), [(16, 16)] * 9, "9 tensors stacked"),
        (clip_by_norm(1.0), [(64, 64)] * 9, "9 tensors stacked"),
        (lambda tensor, group: tensor / tensor.norm(), [(64, 64)] * 9, "9 tensors in lists"),
        (lambda tensor, group: tensor / (tensor.abs() + 1), [(16, 16)] * 9, "9 tensors stacked"),
        (chain(scale(0.5), add(0.1)), [(16, 16)] * 9, "9 tensors in lists"),
    ],
)
def test_tensors_go_through_programs_in_the_fastest_way(
    pre: Transform, shapes: list[tuple[int, ...]], ways: str
) -> None:
    optimizer = make_optimizer(shapes, pre)
    grads: list[Tensor] = [param.grad.clone() for param in optimizer.param_groups[0]["params"]]
    lines = [line for line in str(optimizer.explain().program).splitlines() if line.startswith("# for ")]
    assert ", ".join(line.removeprefix("# for ") for line in lines) == ways
    expected = [pre(grad, {}) for grad in grads]
    assert_close(updates(optimizer), expected)
