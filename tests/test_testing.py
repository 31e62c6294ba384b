"""``check_transform`` and ``check_projection``: each law catches what breaks it, by its smallest input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradchain import Group, broadcast, chain, clamp, normalize, scale
from gradchain.testing import check_projection, check_transform, parametrize_with_laws

calls = 0


def counted(tensor: Tensor, group: Group) -> Tensor:
    global calls
    calls += 1
    return tensor + calls


def writes_group(tensor: Tensor, group: Group) -> Tensor:
    group["seen"] = True
    return tensor


def rounds_in_half(tensor: Tensor, group: Group) -> Tensor:
    return tensor / (tensor.square().sum(dtype=tensor.dtype) + 1)


class Nameless:
    def __call__(self, tensor: Tensor, group: Group) -> Tensor:
        return tensor


@pytest.mark.parametrize(
    ("law", "broken", "input"),
    [
        ("pure", lambda t, g: t.add_(1), r"tensor\(0.\), torch.float32 of shape \(\)"),
        ("pure", writes_group, r"tensor\(\[\]\), torch.float32 of shape \(0,\)"),
        ("pure", lambda t, g: g["param"].mul_(0) + t, r"tensor\(0.\), torch.float32"),
        ("keeps_form", lambda t, g: t.float(), r"tensor\(0., dtype=torch.float64\)"),
        ("keeps_form", lambda t, g: t.sum(), r"tensor\(\[0.\]\), torch.float32 of shape \(1,\)"),
        ("deterministic", counted, r"tensor\(0.\), torch.float32"),
        ("deterministic", lambda t, g: t + torch.rand_like(t), r"tensor\(0.\), torch.float32"),
        ("zeros", lambda t, g: t / t.norm(), r"tensor\(0.\), torch.float32"),
        ("propagates_nan", lambda t, g: t.nan_to_num(), r"tensor\(1.\), torch.float32"),
        ("any_layout", lambda t, g: t.view(-1).view(t.shape), r"torch.float32 of shape \(2, 3\)"),
        ("half_precision", rounds_in_half, r"tensor\(100., dtype=torch.float16\)|torch.float16"),
        ("broadcasts", lambda t, g: t * t.sum().item(), r"tensor\(\[0.\]\), torch.float32 of shape \(1,\)"),
        ("differentiable", lambda t, g: t.sgn() * t.abs().sqrt(), r"tensor\(0.\), torch.float32"),
        ("compiles", lambda t, g: t * (2 if t.sum() > 0 else 3), "torch.float32 of shape"),
        ("copies", lambda t, g: t, r"tensor\(\[\]\)"),
        ("copies", Nameless(), r"tensor\(\[\]\)"),
    ],
)
def test_law_catches(law: str, broken: Any, input: str) -> None:
    skip = {"compiles": {"broadcasts", "vmaps"}}.get(law, set())
    with pytest.raises(AssertionError, match=rf'breaks the law "{law}"\n  input: [\s\S]*{input}[\s\S]*\n  cause: .'):
        check_transform(broken, skip=skip)


def test_laws_hold_for_compositions() -> None:
    check_transform(chain(normalize(), broadcast(scale(2.0), 0)))
    check_transform(broadcast(normalize(), 1), shapes=[(3,), (2, 3)], skip={"broadcasts"})


def test_group_shapes_and_dtypes() -> None:
    seen = set()

    def spy(tensor: Tensor, group: Group) -> Tensor:
        seen.add((tuple(tensor.shape), tensor.dtype, group["rate"]))
        return tensor

    laws = {"copies", "compiles", "vmaps", "broadcasts", "differentiable", "any_layout"}
    check_transform(spy, group={"rate": 2}, shapes=[(3,)], dtypes=[torch.float64], skip=laws)
    assert seen == {((3,), torch.float64, 2)}


def test_unknown_law() -> None:
    with pytest.raises(ValueError, match=r"skip names the laws \['any_layout', .*, got \['copys'\]"):
        check_transform(normalize(), skip={"copys"})


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        ("inside", lambda t, g: t),
        ("idempotent", lambda t, g: t.clamp(-1, 1) / 2),
        ("nearest", lambda t, g: t / t.norm().clamp_min(1)),
    ],
)
def test_projection_law_catches(law: str, broken: Any) -> None:
    with pytest.raises(AssertionError, match=f'breaks the law "{law}"\n  input: '):
        check_projection(broken, lambda x: bool((x.abs() <= 1).all()))


def test_parametrize_with_laws_makes_a_test_of_each_law() -> None:
    half = lambda tensor, group: tensor / 2  # noqa: E731
    mark = parametrize_with_laws([normalize(), half], expected_failed=lambda t: {"copies": "why"} if t is half else {})
    name, params = mark.args
    assert name == "law"
    assert [param.id for param in params[:2]] == ["normalize()-pure", "normalize()-keeps_form"]
    assert {param.id: param.marks[0].kwargs["reason"] for param in params if param.marks} == {"<lambda>-copies": "why"}
    for param in params:
        (law,) = param.values
        if param.marks:
            with pytest.raises(AssertionError, match='<lambda> breaks the law "copies"'):
                law()
        elif not param.id.endswith("compiles"):
            law()


def test_parametrize_with_laws_passes_options_on() -> None:
    seen = set()

    def spy(tensor: Tensor, group: Group) -> Tensor:
        seen.add((tuple(tensor.shape), group["rate"]))
        return tensor

    for param in parametrize_with_laws([spy], shapes=[(3,)], group={"rate": 2}).args[1][:3]:
        param.values[0]()
    assert seen == {((3,), 2)}


def test_parametrize_with_laws_refuses_unknown_laws() -> None:
    with pytest.raises(ValueError, match=r"expected_failed of normalize.* names the laws .*, got \['copys'\]"):
        parametrize_with_laws([normalize()], expected_failed={"copys": "a lambda"})


@parametrize_with_laws([clamp(-1, 1)], check_projection, contains=lambda x: bool((x.abs() <= 1).all()))
def test_laws_of_projections(law: Callable[[], None]) -> None:
    law()
