"""A step of an optimizer with its chains as one graph, for ``torch.compile(optimizer.step)``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradchain.engine.combined import parts
from gradchain.engine.operations import SkippedStep
from gradchain.engine.step import Step, is_dry_run

if TYPE_CHECKING:
    from gradchain.adapters.optimizer import ParamTransformingOptimizer

_WRAPS_STEPS = inspect.getfile(Optimizer)


def step_compiled(optimizer: ParamTransformingOptimizer, closure: Callable[[], Any] | None) -> Any:
    """Make one step, of which ``_graph`` is what is compiled."""
    step = None
    try:
        # As in torch's own steps: what breaks in a try statement is not compiled, but what it calls is. And a graph
        # writes in place only if no gradients are recorded from its start on.
        torch._dynamo.graph_break()
        step, result = _begin(optimizer, closure)
        if step is not None:
            with torch.no_grad():
                result = _graph(step, result)
            _end(step)
    except BaseException:
        if step is not None:
            step.undo()
        raise
    return result


@_disable_dynamo
def _begin(optimizer: ParamTransformingOptimizer, closure: Callable[[], Any] | None) -> tuple[Step | None, Any]:
    """A step to be made as a graph, and the inner steps; or None and the result of one that is made.

    What happens once, such as making states, is left out of graphs, and so is what depends on values.
    """
    if closure is not None or is_dry_run(optimizer.param_groups):
        return None, optimizer._step(closure)
    step = Step(optimizer._engine)
    if not step.is_familiar:
        return None, optimizer._step(closure)
    if step.skips:
        try:
            step.transform_grads()
        except SkippedStep as skipped:
            return None, step.skip(skipped)
    step.number = 1  # a graph would keep the number as a constant, and be compiled anew in each step
    return step, [(_traceable_step(part), part) for part in parts(optimizer.inner_opt)]


def _graph(step: Step, inner_steps: list[tuple[Callable[..., Any], Optimizer]]) -> Any:
    with torch.no_grad():  # a frame without a word of torch would not be compiled
        # First of all: what torch knows as tensors of an optimizer needs no guards of its own.
        groups = [group for _, part in inner_steps for group in part.param_groups]
        step.grads = [param.grad for group in groups for param in group["params"]]
        if not step.skips:
            step.transform_grads()
        results = [inner_step(part) for inner_step, part in inner_steps]
        step.transform_update()
        step.transform_params()
        step.install_states()
    return results[0] if len(results) == 1 else None


@_disable_dynamo
def _end(step: Step) -> None:
    step.commit()


def _traceable_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The step of ``optimizer``, if possible without what torch has around it, which ends the graph.

    It serves hooks and the profiler, and switches the recording of gradients off, which has been done by then.
    """
    hooks = (
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
        optimizer.__dict__.get("_optimizer_step_pre_hooks"),
        optimizer.__dict__.get("_optimizer_step_post_hooks"),
    )
    step: Any = type(optimizer).step
    if any(hooks) or profiler._is_profiler_enabled or "step" in optimizer.__dict__:
        return operator.methodcaller("step")
    while hasattr(step, "__wrapped__") and step.__code__.co_filename == _WRAPS_STEPS:
        step = step.__wrapped__
    unwrapped: Callable[..., Any] = step
    return unwrapped
