"""Norms keep their digits however long a tensor is, and infinite limits limit nothing however large a norm is."""

from collections.abc import Callable
from math import inf, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

import gradchain as gc
from gradchain import ParamTransformingOptimizer, Transform, broadcast
from gradchain.contract import Group
from gradchain.transforms.global_norm import measure_global_norm

# Equal elements, and of no power of two: added up one after the other, all roundings go the same way.
LONG = torch.full((2**20 + 77,), 0.1)


def norm(t: Tensor, ord: float = 2) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(t.double(), ord)
    return length


def root_mean_square(t: Tensor) -> Tensor:
    return norm(t) / sqrt(t.numel())


SCALED: list[tuple[Transform, Callable[[Tensor], Tensor]]] = [
    (gc.normalize(), norm),
    (gc.normalize(1), lambda t: norm(t, 1)),
    (gc.normalize(3), lambda t: norm(t, 3)),
    (gc.lmo_l2(), norm),
    (gc.standardize(), root_mean_square),
    (gc.clip_by_norm(1.0), norm),
    (gc.clip_by_norm(1.0, ord=1), lambda t: norm(t, 1)),
    (gc.clip_by_rms(0.01), lambda t: 100 * root_mean_square(t)),
    (gc.clip_by_global_norm(1.0), norm),
    (gc.normalize_by_global_norm(), norm),
    (gc.project_l2_ball(1.0), norm),
    (gc.project_l2_sphere(1.0), norm),
]
each_scaled = pytest.mark.parametrize(
    ("transform", "measure"), SCALED, ids=[repr(transform) for transform, _ in SCALED]
)


def alternating(t: Tensor) -> Tensor:
    """``t`` with a mean of about 0, for what subtracts the mean."""
    signs = torch.ones(t.shape)
    signs.view(-1)[::2] = -1
    return t * signs


# found: 10
@each_scaled
def test_long_tensors_keep_their_digits_by_hand(transform: Transform, measure: Callable[[Tensor], Tensor]) -> None:
    result = transform(alternating(LONG), {})
    assert_close(measure(result).item(), 1.0, rtol=5e-6, atol=0)
    assert_close(result[1].item(), (0.1 / measure(alternating(LONG)) / measure(result)).item(), rtol=2e-5, atol=0)


# found: 10
@each_scaled
def test_long_rows_keep_their_digits(transform: Transform, measure: Callable[[Tensor], Tensor]) -> None:
    rows = torch.stack([alternating(LONG), 2 * alternating(LONG)])
    result = broadcast(transform, 1)(rows, {})
    is_global = "global" in repr(transform)
    for unit in [result] if is_global else result:
        assert_close(measure(unit).item(), 1.0, rtol=5e-6, atol=0)


# found: 10
@each_scaled
@pytest.mark.parametrize("param_ndim", [None, -1])
def test_long_gradients_keep_their_digits(
    transform: Transform, measure: Callable[[Tensor], Tensor], param_ndim: int | None
) -> None:
    grads = [
        alternating(LONG).expand(1, -1).clone(),
        torch.full((3, 64, 51, 53), 0.1).to(memory_format=torch.channels_last),
        torch.full((2, 5), 3.0),
    ]
    grads[1:] = map(alternating, grads[1:])
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone(memory_format=torch.preserve_format)
    ParamTransformingOptimizer(params, pre=transform, param_ndim=param_ndim, lr=1.0).step()
    units = [unit for param in params for unit in (param.detach() if param_ndim else [param.detach()])]
    if "global" in repr(transform):
        units = [torch.cat([param.detach().flatten() for param in params])]
    for unit in units:
        assert_close(measure(unit).item(), 1.0, rtol=5e-6, atol=0)


# found: 10
@pytest.mark.parametrize("ord", [1, 2, 3])
def test_global_norms_keep_their_digits(ord: float) -> None:
    parts = [LONG, LONG[:50_001].bfloat16(), LONG[:5], *LONG[:60_000].split(3)]
    expected = norm(torch.cat([part.float() for part in parts]), ord).item()
    assert_close(measure_global_norm(parts, ord=ord)["global_norm"].item(), expected, rtol=2e-5, atol=0)
    mapped = torch.func.vmap(lambda t: measure_global_norm([t], ord=ord)["global_norm"])(torch.stack([LONG, 2 * LONG]))
    assert_close(mapped.double(), torch.stack([norm(LONG, ord), norm(2 * LONG, ord)]), rtol=2e-5, atol=0)


def test_the_norm_of_a_long_tensor_needs_no_graph_break_and_no_copy() -> None:
    torch.compiler.reset()
    images = torch.rand(4, 3, 64, 64).to(memory_format=torch.channels_last)
    for t, param_ndim in ((LONG, None), (images, -1)):
        transform = broadcast(gc.normalize(), param_ndim)
        compiled = torch.compile(lambda t, transform=transform: transform(t, {}), fullgraph=True, backend="aot_eager")
        assert_close(compiled(t), transform(t, {}))
    torch.compiler.reset()


INFINITE: list[Transform] = [
    gc.clip_by_norm(inf),
    gc.clip_by_norm(inf, ord=1),
    gc.clip_by_rms(inf),
    gc.clip_adaptive(inf),
    gc.clip_by_global_norm(inf),
    gc.project_l2_ball(inf),
    gc.project_l1_ball(inf),
    gc.project_linf_ball(inf),
]


def assert_left_alone(transform: Transform, t: Tensor, group: Group) -> None:
    params = [nn.Parameter(torch.full_like(t, 3.0)) for _ in range(2)]
    for param in params:
        param.grad = t.clone()
    groups = [{"params": params, **group}]
    ParamTransformingOptimizer(groups, pre=transform, param_ndim=None, lr=0.0).step()
    context = {"param": torch.full_like(t, 3.0), **group}
    for result in [transform(t, context), *(param.grad for param in params)]:
        assert result is not None
        assert_close(result, t, rtol=0, atol=0, equal_nan=True)


# found: 41
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("large", [1e25, 3e38, inf, torch.nan])
@pytest.mark.parametrize("transform", INFINITE, ids=repr)
def test_an_infinite_limit_leaves_everything_alone(transform: Any, large: float, as_tensor: bool) -> None:
    values = {key: tensor(value) for key, value in transform.hyperparameters.items() if value == inf}
    assert_left_alone(transform, tensor([large, -1.0, 0.0]), values if as_tensor else {})


# found: 41
@pytest.mark.parametrize("clip", [gc.clip_by_history(50.0), gc.clip_by_zscore(2.0)], ids=repr)
def test_a_norm_that_overflows_before_there_is_a_history_is_left_alone(clip: Any) -> None:
    t = tensor([1e25, -1.0])
    result, _ = clip.update(t, {}, clip.init(t, {}))
    assert torch.equal(result, t)
    param = nn.Parameter(torch.zeros(2))
    param.grad = t.clone()
    ParamTransformingOptimizer([param], pre=clip, lr=0.0).step()
    assert torch.equal(param.grad, t)


@pytest.mark.parametrize(
    "transform", [gc.clip_by_norm(1.0), gc.clip_by_rms(1.0), gc.clip_by_global_norm(1.0), gc.project_l2_ball(0.5)]
)
def test_a_finite_limit_passes_nan_on_to_all_elements(transform: Transform) -> None:
    t = tensor([torch.nan, -1.0, 0.0])
    param = nn.Parameter(torch.zeros(3))
    param.grad = t.clone()
    ParamTransformingOptimizer([param], pre=transform, param_ndim=None, lr=0.0).step()
    assert transform(t, {}).isnan().all()
    assert param.grad.isnan().all()
