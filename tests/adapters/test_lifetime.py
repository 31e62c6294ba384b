"""Optimizers, their states and the tensors of a step are freed as soon as nobody refers to them."""

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import gradchain as g
from gradchain import ParamTransformingOptimizer, attach, step_in_backward
from gradchain.contract import Group

SLOTS: dict[str, Any] = {"pre": g.ema(0.9), "update": g.cautious(), "post": g.project_l2_ball(1.0)}


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    AdamW(make_params()).step()  # torch imports in the first step, which leaves cycles
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_params() -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def wrapped(params: list[nn.Parameter]) -> Optimizer:
    return ParamTransformingOptimizer(params, AdamW, **SLOTS)


def with_closure(params: list[nn.Parameter]) -> Optimizer:
    optimizer = wrapped(params)
    optimizer.step(lambda: 1.0)
    return optimizer


def with_function(params: list[nn.Parameter]) -> Optimizer:
    return ParamTransformingOptimizer(params, AdamW, pre=lambda tensor, group: tensor / 2)


def with_scheduler(params: list[nn.Parameter]) -> Optimizer:
    optimizer = wrapped(params)
    StepLR(optimizer, 1)
    return optimizer


def in_backward(params: list[nn.Parameter]) -> Optimizer:
    optimizer = ParamTransformingOptimizer(params, AdamW, **SLOTS)
    with step_in_backward(optimizer):
        sum(param.sum() for param in params).backward()  # type: ignore[union-attr]
    return optimizer


def attached(params: list[nn.Parameter]) -> Optimizer:
    optimizer = AdamW(params)
    attach(optimizer, **SLOTS)
    return optimizer


def with_handle(params: list[nn.Parameter]) -> Optimizer:
    optimizer = AdamW(params)
    HANDLES.append(attach(optimizer, **SLOTS))
    return optimizer


def removed(params: list[nn.Parameter]) -> Optimizer:
    optimizer = AdamW(params)
    with attach(optimizer, **SLOTS):
        optimizer.step()
    return optimizer


HANDLES: list[Any] = []


# found: 23
@pytest.mark.parametrize(
    "make",
    [wrapped, with_closure, with_function, with_scheduler, in_backward, attached, with_handle, removed],
    ids=lambda make: make.__name__,
)
def test_an_optimizer_is_freed_at_once(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    params = make_params()
    optimizer = make(params)
    for _ in range(2):
        optimizer.step()
    inner = getattr(optimizer, "inner_opt", optimizer)
    state = next(iter(inner.state.values()))
    moment = state["exp_avg"]
    kept = [weakref.ref(value) for value in (optimizer, inner, params[0], moment)]
    del optimizer, inner, params, state, moment
    assert [reference() for reference in kept] == [None] * 4


def test_a_handle_whose_optimizer_is_gone() -> None:
    optimizer = AdamW(make_params())
    handle = attach(optimizer, **SLOTS)
    assert handle.optimizers == [optimizer]
    del optimizer
    with pytest.raises(ReferenceError, match="the optimizer no longer exists; keep a reference"):
        handle.optimizers  # noqa: B018
    assert "attach(AdamW, pre=" in repr(handle)
    handle.remove()


def test_a_removed_handle_has_no_averages() -> None:
    optimizer = AdamW(make_params())
    handle = attach(optimizer, post=g.param_ema(0.9))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"is removed, .*call averaged\(\) before"), handle.averaged():
        pass


class Copied(AdamW):
    """Many optimizers have a ``__getstate__`` that keeps hooks, and so what is attached."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_with_hooks_acts_on_its_own_parameters(copied: Callable[[Any], Any]) -> None:
    params = make_params()
    optimizer = Copied(params, lr=0.0)
    attach(optimizer, post=g.scale(2.0))
    optimizer.step()
    other = copied(optimizer)
    (first, *_) = other.param_groups[0]["params"]
    first.grad = torch.ones_like(first)
    other.step()
    assert first[0, 0].item() == 4.0
    assert params[0][0, 0].item() == 2.0


def fail(tensor: Tensor, group: Group) -> Tensor:
    raise ValueError("no")


def through_closure(optimizer: Optimizer) -> None:
    optimizer.step(lambda: 1.0)


def plainly(optimizer: Optimizer) -> None:
    optimizer.step()


def skipping(optimizer: Optimizer) -> None:
    grad = optimizer.param_groups[0]["params"][0].grad
    grad.fill_(torch.nan)
    optimizer.step()
    grad.fill_(1.0)


def failing(optimizer: Optimizer) -> None:
    with pytest.raises(ValueError, match="no"):
        optimizer.step()


def saving(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def attaching(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, ParamTransformingOptimizer):
        with attach(optimizer, update=g.cautious()):
            optimizer.step()


WHOLE: dict[str, Any] = {"param_ndim": None}  # vmap itself leaves cycles
WAYS = [
    (plainly, {"pre": g.ema(0.9), "post": g.project_l2_ball(1.0)}),
    (through_closure, {"pre": lambda tensor, group: tensor / 2, **WHOLE}),
    (skipping, {"pre": g.skip_nonfinite(1000)}),
    (failing, {"pre": fail, **WHOLE}),
    (failing, {"post": fail, **WHOLE}),
    (saving, {"pre": g.ema(0.9)}),
    (attaching, {"pre": g.ema(0.9)}),
]


# found: 23
@pytest.mark.parametrize("make", [ParamTransformingOptimizer, attach], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("step", "slots"), WAYS, ids=[f"{step.__name__}-{next(iter(slots))}" for step, slots in WAYS])
def test_steps_leave_nothing(make: Any, step: Callable[[Optimizer], None], slots: dict[str, Any]) -> None:
    optimizer: Optimizer
    if make is attach:
        optimizer = AdamW(make_params())
        attach(optimizer, **slots)
    else:
        optimizer = ParamTransformingOptimizer(make_params(), AdamW, **slots)

    def alive() -> Counter[str]:
        kinds = Counter(type(value).__name__ for value in gc.get_objects())
        return Counter({kind: count for kind, count in kinds.items() if kind in watched})

    watched = {
        "Tensor",
        "Step",
        "Pass",
        "Engine",
        "_HookedStep",
        "Plan",
        "SlotPlans",
        "ParamTable",
        "frame",
        "traceback",
    }
    for _ in range(3):
        step(optimizer)
    before = alive()
    for _ in range(20):
        step(optimizer)
    assert not alive() - before


def reference(x: Tensor) -> Any:
    return g.project_ball_around_reference(0.1, reference=x)


def bounds(x: Tensor) -> Any:
    return g.chain(g.sign(), g.project_box(-1.0, x))


def mask(x: Tensor) -> Any:
    return g.with_error_feedback(g.masked(g.scale(2.0), x > 0))


def closure(x: Tensor) -> Any:
    return lambda tensor, group: tensor.clamp(-x, x)


@pytest.mark.parametrize("make", [reference, bounds, mask, closure])
def test_the_tensors_of_transforms(make: Callable[[Tensor], Any]) -> None:
    """As in adversarial training, where each batch has bounds of its own."""
    x = torch.rand(4, 3)
    kept = weakref.ref(x)
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = ParamTransformingOptimizer([param], post=make(x), param_ndim=None)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    del x, optimizer
    gc.collect()
    assert kept() is None
