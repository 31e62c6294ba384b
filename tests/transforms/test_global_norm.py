from math import inf, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    Transform,
    broadcast,
    chain,
    clip_by_global_norm,
    clip_by_norm,
    normalize,
    normalize_by_global_norm,
    scale,
)
from gradchain.transforms.global_norm import measure_global_norm
from tests.strategies import tensors

T = tensor([3.0, -4.0])


@pytest.mark.parametrize(
    ("transform", "group", "expected"),
    [
        (clip_by_global_norm(1.0), {}, [0.6, -0.8]),
        (clip_by_global_norm(3.5, ord=1), {}, [1.5, -2.0]),
        (clip_by_global_norm(2.0, ord=inf), {}, [1.5, -2.0]),
        (clip_by_global_norm(5.0), {}, [3.0, -4.0]),
        (clip_by_global_norm(1.0), {"clip_by_global_norm.max_norm": 6}, [3.0, -4.0]),
        (normalize_by_global_norm(), {}, [0.6, -0.8]),
    ],
)
def test_by_hand(transform: Transform, group: Group, expected: list[float]) -> None:
    assert_close(transform(T, group), tensor(expected))


@pytest.mark.parametrize("ord", [0.5, 1, 2, 3, inf])
def test_measures_all_tensors_as_one(ord: float) -> None:
    parts = [torch.randn(4, 3), torch.randn(()), torch.randn(0, 3), torch.randn(5)]
    together = torch.cat([part.flatten() for part in parts])
    assert_close(measure_global_norm(parts, ord=ord)["global_norm"], torch.linalg.vector_norm(together, ord))


@pytest.mark.parametrize("ord", [2, inf])
def test_measures_nothing_as_zero(ord: float) -> None:
    assert measure_global_norm([torch.ones(0), torch.ones(2, 0)], ord=ord)["global_norm"] == 0


def test_measures_complex_and_half_precision() -> None:
    parts = [tensor([3 + 4j]), torch.full((17_500,), 600.0, dtype=torch.float16), torch.ones(1, dtype=torch.float64)]
    expected = sqrt(25 + 17_500 * 600**2 + 1)
    assert_close(measure_global_norm(parts)["global_norm"].item(), expected, rtol=1e-6, atol=0)
    assert measure_global_norm(parts[:2])["global_norm"].dtype == torch.float32


@given(tensors(), st.floats(1e-3, 1e3), st.sampled_from([0.5, 1, 2, 3, inf]))
def test_one_tensor_is_clipped_as_by_clip_by_norm(t: Tensor, max_norm: float, ord: float) -> None:
    assert_close(clip_by_global_norm(max_norm, ord=ord)(t, {}), clip_by_norm(max_norm, ord=ord)(t, {}))
    assert_close(normalize_by_global_norm()(t, {}), normalize()(t, {}))


def test_broadcast_changes_nothing() -> None:
    t = torch.randn(4, 3)
    assert torch.equal(broadcast(clip_by_global_norm(1.0), 1)(t, {}), clip_by_global_norm(1.0)(t, {}))


def test_nan_reaches_all_and_zero_stays_zero() -> None:
    groups: list[Group] = [{}, {}]
    for transform in (clip_by_global_norm(1.0), normalize_by_global_norm()):
        results, _ = chain(transform).run([tensor([1.0]), tensor([torch.nan])], groups, [{}, {}])
        assert all(result.isnan().all() for result in results)
        results, _ = chain(transform).run([torch.zeros(2), torch.zeros(3)], groups, [{}, {}])
        assert all(torch.equal(result, torch.zeros_like(result)) for result in results)


def test_each_stage_measures_what_it_is_given() -> None:
    parts = [tensor([3.0]), tensor([4.0])]
    twice = chain(clip_by_global_norm(1.0), scale(10.0), clip_by_global_norm(5.0).named("second"))
    results, _ = twice.run(parts, [{}, {}], [{}, {}])
    assert_close(results, [tensor([3.0]), tensor([4.0])])


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def groups_of(net: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": net[0].parameters(), "lr": 0.2}, {"params": net[2].parameters()}]


@pytest.mark.parametrize("ord", [1, 2, inf])
def test_steps_like_torch_clip_grad_norm(ord: float) -> None:
    ours, theirs = make_net(), make_net()
    clip = clip_by_global_norm(0.3, ord=ord)
    optim = ParamTransformingOptimizer(groups_of(ours), torch.optim.Adam, pre=clip, lr=0.1)
    reference = torch.optim.Adam(groups_of(theirs), lr=0.1)
    x = torch.randn(20, 5, 3)
    for batch in x:
        for net, optimizer in ((ours, optim), (theirs, reference)):
            optimizer.zero_grad()
            net(batch).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3, ord)
        optim.step()
        reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_torch_clip_grad_norm() -> None:
    grads = [torch.randn(4, 3), torch.randn(5)]
    ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in grads] for _ in range(2))
    for param, grad in zip([*ours, *theirs], grads * 2, strict=True):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    ParamTransformingOptimizer([{"params": [p]} for p in ours], pre=clip_by_global_norm(0.5), lr=1.0).step()
    for p, q in zip(ours, theirs, strict=True):
        assert_close(-p.detach(), q.grad, rtol=1e-5, atol=0)


def test_a_group_can_have_a_limit_of_its_own() -> None:
    x, y = nn.Parameter(tensor([0.0])), nn.Parameter(tensor([0.0]))
    x.grad, y.grad = tensor([3.0]), tensor([4.0])
    groups: list[dict[str, Any]] = [{"params": [x]}, {"params": [y], "clip_by_global_norm.max_norm": 10.0}]
    ParamTransformingOptimizer(groups, pre=clip_by_global_norm(1.0), lr=1.0).step()
    assert_close(tensor([x.item(), y.item()]), tensor([-0.6, -4.0]))


def test_a_parameter_without_gradient_does_not_count() -> None:
    x, y = nn.Parameter(tensor([0.0])), nn.Parameter(tensor([7.0]))
    x.grad = tensor([3.0])
    ParamTransformingOptimizer([x, y], pre=normalize_by_global_norm(), lr=1.0).step()
    assert (x.item(), y.item()) == (-1.0, 7.0)


@pytest.mark.parametrize("arguments", [{"max_norm": 0.0}, {"max_norm": 1.0, "ord": 0}])
def test_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="clip_by_global_norm.* must be > 0, got 0"):
        clip_by_global_norm(**arguments)
