"""What holds for all shapes and optimizers: the adapter equals a loop, and without chains the inner optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from gradchain import Group, ParamTransformingOptimizer, clip_adaptive, normalize, project_l1_ball
from tests.adapters.common import assert_equal
from tests.test_broadcast import loop, subtract_max

OPTIMIZERS: list[Callable[..., Optimizer]] = [
    partial(SGD, lr=0.1, momentum=0.9),
    partial(Adam, lr=0.1),
    partial(AdamW, lr=0.1),
    partial(RMSprop, lr=0.01),
    partial(Adagrad, lr=0.1),
    partial(LBFGS, lr=0.5, max_iter=4),
]


def name_of(value: Any) -> str | None:
    return value.func.__name__ if isinstance(value, partial) else None


def reduced_max(tensor: Tensor, group: Group) -> Tensor:
    return 0.1 * subtract_max(tensor, group)


@given(
    shape=st.lists(st.integers(0, 3), max_size=4),
    InnerOpt=st.sampled_from([partial(SGD, lr=0.3, momentum=0.9), partial(Adam, lr=0.1)]),
    pre=st.sampled_from([None, normalize(), clip_adaptive(0.1), reduced_max]),
    post=st.sampled_from([None, project_l1_ball(0.5), lambda p, group: p - 0.1 * p.amax()]),
    data=st.data(),
)
def test_equals_a_loop_followed_by_the_inner_step(
    shape: list[int], InnerOpt: Any, pre: Any, post: Any, data: st.DataObject
) -> None:
    param_ndim = data.draw(st.one_of(st.none(), st.integers(-len(shape), len(shape))))
    ndim = len(shape) if param_ndim is None else param_ndim % len(shape) if param_ndim < 0 else param_ndim
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    ours, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    optim = ParamTransformingOptimizer(
        [ours], InnerOpt, pre=pre, post=post, param_ndim=param_ndim, grad_scale=2.0, grad_bias=0.1
    )
    inner = InnerOpt([plain])
    for grad in grads:
        ours.grad, plain.grad = grad.clone(), grad.clone()
        optim.step()
        with torch.no_grad():
            if pre is not None:
                plain.grad = loop(pre, plain.grad, {"param": plain.detach()}, ndim)
            plain.grad.mul_(2.0).add_(0.1)
            inner.step()
            if post is not None:
                plain.copy_(loop(post, plain.detach(), {}, ndim))
        torch.testing.assert_close(ours.grad, plain.grad)
        torch.testing.assert_close(ours, plain)


def train(
    make: Callable[[Any], Optimizer],
    *,
    state_dict: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    steps: int = 3,
) -> tuple[nn.Module, Optimizer]:
    """A few steps on a fixed problem, with a closure."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    optim = make(model.parameters())
    if state_dict is not None:
        optim.load_state_dict(state_dict)

    def closure() -> float:
        optim.zero_grad()
        loss: Tensor = model(inputs).square().mean()
        loss.backward()
        return loss.item()

    for _ in range(steps):
        optim.step(closure)
    return model, optim


def without_own_keys(state_dict: dict[str, Any]) -> dict[str, Any]:
    own = {"param_ndim", "grad_scale", "grad_bias"}
    groups = [{key: value for key, value in group.items() if key not in own} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.parametrize("InnerOpt", OPTIMIZERS, ids=name_of)
def test_without_chains_is_the_inner_optimizer(InnerOpt: Any) -> None:
    plain_model, plain = train(InnerOpt)
    model, optim = train(lambda params: ParamTransformingOptimizer(params, InnerOpt))
    assert_equal(list(model.parameters()), list(plain_model.parameters()))
    assert_equal(without_own_keys(optim.state_dict()), plain.state_dict())


@pytest.mark.parametrize("InnerOpt", OPTIMIZERS, ids=name_of)
def test_state_dicts_are_interchangeable(InnerOpt: Any) -> None:
    def wrapped(params: Any) -> ParamTransformingOptimizer:
        return ParamTransformingOptimizer(params, InnerOpt)

    whole_model, whole = train(InnerOpt, steps=5)
    for first, second in ((InnerOpt, wrapped), (wrapped, InnerOpt), (wrapped, wrapped)):
        model, optim = train(first, steps=3)
        model, optim = train(second, state_dict=optim.state_dict(), model=model, steps=2)
        assert_equal(list(model.parameters()), list(whole_model.parameters()))
        assert_equal(without_own_keys(optim.state_dict()), whole.state_dict())
