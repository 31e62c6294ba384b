"""What the suites of the adapters share: parameters, steps, adapters, and chains that do something in every slot."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    State,
    accumulate,
    attach,
    chain,
    clamp,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_zscore,
    ema,
    param_ema,
    project_l2_ball,
    scale,
    sign,
    trace,
    transform,
)
from tests.cases import CASES

INNER: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.1),
    "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9),
    "SGD with momentum and decay": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD, fused": partial(SGD, lr=0.1, weight_decay=0.1, fused=True),  # momentum would need all gradients at once
    "Adagrad": partial(Adagrad, lr=0.1, weight_decay=0.1),
    "Adam": partial(Adam, lr=0.1, weight_decay=0.1),
    "AdamW, foreach": partial(AdamW, lr=0.1, foreach=True),
    "AdamW, fused": partial(AdamW, lr=0.1, fused=True),
    "RMSprop": partial(RMSprop, lr=0.01, momentum=0.9, weight_decay=0.1),
    "LBFGS": partial(LBFGS, lr=0.1, max_iter=5),
    "LBFGS with a line search": partial(LBFGS, max_iter=5, line_search_fn="strong_wolfe"),
}
LBFGS_LIKE = [InnerOpt for name, InnerOpt in INNER.items() if "LBFGS" in name]
WITHOUT_CLOSURE = [InnerOpt for InnerOpt in INNER.values() if InnerOpt not in LBFGS_LIKE]


def zero(tensor: Tensor, group: Group) -> State:
    return {"mean": torch.zeros_like(tensor), "count": torch.zeros((), dtype=torch.int64)}


@transform(init=zero, acts_on="element")
def average(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
    """A running mean, which counts."""
    mean = 0.9 * state["mean"] + 0.1 * tensor
    return mean, {"mean": mean, "count": state["count"] + 1}


@transform(init=lambda tensor, group: {"start": tensor.clone()})
def stay_near_start(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
    """Half-way to where it started."""
    return (tensor + state["start"]) / 2, state


EVERYWHERE: dict[str, Any] = {
    "pre": chain(ema(0.9), clip_by_global_norm(0.5)),
    "update": chain(scale(0.5), trace(0.5)),
    "post": chain(clamp(-1, 1), param_ema(0.9)),
}
OWN: dict[str, Any] = {
    "pre": chain(sign(), average()),
    "update": average(),
    "post": chain(average(), stay_near_start()),
}
CHAINS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "rule": {"pre": clip_by_norm(0.5)},
    "function": {"pre": lambda t, group: t / (1 + t.abs())},
    "update": {"update": lambda t, group: 0.5 * t},
    "post": {"post": project_l2_ball(1.0), "param_ndim": None},
    "shared state": {"pre": chain(clip_by_zscore(2.5, warmup=2), accumulate(2))},
    "everywhere": EVERYWHERE,
    "own": OWN,
}
STATEFUL: dict[str, dict[str, Any]] = {
    repr(t): {
        "post" if repr(t).startswith(("param_ema", "lookahead", "project_ball")) else "pre": t,
        "param_ndim": None,
    }
    for t in (case.transform for case in CASES)
    if t.stateful
}


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 2), (4,), (2,))]


def backward(params: list[nn.Parameter], step: int, factor: float = 1.0) -> Tensor:
    """Gradients that depend on the step and the parameters; the last parameter gets its first one at step 4."""
    generator = torch.Generator().manual_seed(step)
    loss = torch.zeros(())
    for param in params[: 3 if step >= 4 else 2]:
        param.grad = None
        target = torch.randn(param.shape, generator=generator).to(param.dtype)
        loss = loss + factor * (param - target).square().sum()
    loss.backward()
    return loss.detach()


def train(optimizer: Any, params: list[nn.Parameter], steps: range, *, bad: range = range(0)) -> list[Any]:
    """Steps, with a closure where the optimizer needs one; ``bad`` ones have no finite gradient."""
    with_closure = isinstance(getattr(optimizer, "inner_opt", optimizer), LBFGS)
    losses = []
    for k in steps:
        factor = float("inf") if k in bad else 1.0
        if with_closure:
            losses.append(optimizer.step(lambda k=k, factor=factor: backward(params, k, factor)))
        else:
            backward(params, k, factor)
            losses.append(optimizer.step())
    return losses


def wrapped(inner: Optimizer, **chains: Any) -> Optimizer:
    return ParamTransformingOptimizer(InnerOpt=inner, **chains)


def attached(inner: Optimizer, **chains: Any) -> Optimizer:
    attach(inner, **chains)
    return inner


def run(
    adapt: Callable[..., Optimizer], InnerOpt: Any, chains: dict[str, Any], steps: int = 6, bad: range = range(0)
) -> Any:
    """All that there is to see after some steps."""
    params = make_params()
    optimizer = adapt(InnerOpt(params[:1] if InnerOpt in LBFGS_LIKE else params), **chains)
    losses = train(optimizer, params[: len(optimizer.param_groups[0]["params"])], range(steps), bad=bad)
    return losses, params, [p.grad for p in params], optimizer.state_dict()["state"]


def assert_equal(actual: Any, expected: Any, *, equal_nan: bool = False) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=equal_nan)
