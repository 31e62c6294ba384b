"""Values from outside that transforms read in the next step, such as the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gradchain._sharding import gather
from gradchain.contract import GIVEN, Group, compute_dtype

REDUCTIONS = ("mean", "sum", "min", "max", None)


def make_signals(values: Mapping[str, Any], groups: Sequence[Group], reduce: str | None) -> dict[str, Tensor]:
    """``values`` as tensors on the device of the first parameter, reduced over the processes.

    Raises:
        TypeError: A value is neither a number nor a tensor.
        ValueError: There is no such reduction, or a key has another meaning already.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"signal: reduce must be one of {list(REDUCTIONS)}, got {reduce!r}")
    device = next((param.device for group in groups for param in group["params"]), torch.device("cpu"))
    found = {}
    for key, value in values.items():
        if key in GIVEN or any(key in group for group in groups):
            raise ValueError(
                f'signal: group["{key}"] is there already, and would be hidden; give the signal another name'
            )
        if isinstance(value, bool) or not isinstance(value, Real | Tensor):
            raise TypeError(f"signal: {key} must be a number or a tensor, got {type(value).__name__}")
        tensor = gather(value.detach()) if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")
        # A copy, since what made it may write to it before the step.
        found[key] = tensor.to(device, compute_dtype(tensor.dtype), copy=True)
    return found if reduce is None else _reduce(found, reduce)


def _reduce(values: dict[str, Tensor], reduce: str) -> dict[str, Tensor]:
    """What the processes of the default group have together, by one call for each dtype."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    by_dtype: dict[torch.dtype, list[str]] = {}
    for key in sorted(values):  # the same order in all processes
        by_dtype.setdefault(values[key].dtype, []).append(key)
    for _, keys in sorted(by_dtype.items(), key=str):
        joined = torch.cat([values[key].reshape(-1) for key in keys])
        dist.all_reduce(joined, getattr(dist.ReduceOp, "SUM" if reduce == "mean" else reduce.upper()))
        if reduce == "mean":
            joined = joined / dist.get_world_size()
        parts = joined.split([values[key].numel() for key in keys])
        values |= {key: part.view(values[key].shape) for key, part in zip(keys, parts, strict=True)}
    return values
