"""Callbacks for training frameworks: ``gradchain.integrations.lightning`` and ``gradchain.integrations.transformers``.

Each module has the same four callbacks. ``AttachTransforms`` puts chains around the optimizer of a run,
``EvaluateAverages`` evaluates with the averages that ``param_ema`` or ``lookahead`` keep, ``LogMetrics`` logs what
``metrics()`` returns and the hyperparameters, and ``ScheduleHyperparameters`` lets schedulers drive hyperparameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradchain.adapters.attach import Attached
from gradchain.adapters.optimizer import ParamTransformingOptimizer
from gradchain.engine.groups import ATTACHED


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer that a framework has wrapped, or ``optimizer`` itself."""
    while not isinstance(optimizer, ParamTransformingOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found


def handle_of(optimizer: Any) -> ParamTransformingOptimizer | Attached:
    """What has ``averaged`` and ``metrics`` of an optimizer that a framework has."""
    found = innermost(optimizer)
    if isinstance(found, ParamTransformingOptimizer):
        return found
    hooks = found.__dict__.get(ATTACHED)
    if hooks is None:
        raise RuntimeError(
            f"{type(found).__name__} has no transforms; make it a ParamTransformingOptimizer, or put AttachTransforms "
            "before this callback"
        )
    attached: Attached = hooks.attached[-1]
    return attached


def hyperparameters_of(optimizer: Any) -> dict[str, float]:
    """The numbers in the param groups under keys that name a transform, and the learning rate, by key.

    Where there are several groups, the keys have the number of the group too, such as ``"lr/1"``.
    """
    groups = innermost(optimizer).param_groups
    return {
        key if len(groups) == 1 else f"{key}/{index}": float(value)
        for index, group in enumerate(groups)
        for key, value in _numbers(group).items()
    }


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """What names a transform before a dot, and the learning rate; not what schedulers keep under ``"initial ..."``."""
    named = {key: value for key, value in group.items() if "." in key and not key.startswith("initial ")}
    found = {"lr": group.get("lr"), **named}
    return {key: value for key, value in found.items() if isinstance(value, int | float) or _is_scalar(value)}


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0
