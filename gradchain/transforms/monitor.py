"""The transform that changes nothing, and keeps figures of what passes by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradchain._norms import norm
from gradchain._sharding import collect, gather, is_distributed, is_partial, local
from gradchain.contract import Group, State
from gradchain.stage import Stage

LONGEST = 2**18
"""So many elements of a tensor on the CPU stay in the cache while they are looked at."""

LONGEST_ON_DEVICE = 2**22
"""So many elements on other devices keep them busy, and need little memory."""

NO_PARAM = -1.0
"""In place of the norm of the parameter where there is no parameter to compare with."""


def monitor(name: str = "monitor", every: int = 1) -> Monitor:
    r"""Leave everything as it is, and keep figures of it, for ``optimizer.metrics()``.

    .. math:: t; \quad \|t\|_2, \; \|t\|_2 / \sqrt{n}, \; \|t\|_2 / \|p\|_2

    Acts on whole tensors, of any shape, whatever the ``param_ndim`` of the group; ``n`` is the number of elements. The
    state of each holds four numbers, on its device: the 2-norm, how many elements are zero, how many are NaN or
    infinite, and the 2-norm of ``group["param"]``. From them ``metrics()`` makes ``norm``, ``rms``, the ``ratio`` to
    the parameter, and the shares ``zero`` and ``nonfinite``. Half precision is computed in float32, figures of
    distributed tensors are those of the whole, and on a GPU the host does not wait. In ``post``, where the tensor is
    the parameter, there is no ratio. A step that is skipped leaves the figures of the step before.

    Args:
        name: What the figures are called, ``"pre/<name>/norm"``; a second one of the same name gets a number,
            ``"pre/<name>_2/norm"``.
        every: An optimizer looks in its first step, and in those whose number is a multiple of this; at least 1. Give
            it the interval at which you log, since to look at all elements takes longer than a step of SGD. A call by
            hand, and a graph of ``torch.compile``, looks each time.

    Raises:
        TypeError: ``name`` is no string, or ``every`` no integer.
        ValueError: ``name`` is empty or has a dot or a slash in it, or ``every`` is below 1.

    Example:
        >>> from gradchain import ParamTransformingOptimizer, chain, clip_by_global_norm
        >>> x = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> pre = chain(monitor("raw"), clip_by_global_norm(1.0), monitor("clipped"))
        >>> optimizer = ParamTransformingOptimizer([x], pre=pre, lr=0.1)
        >>> (3 * x[0]).backward()
        >>> optimizer.step()
        >>> metrics = optimizer.metrics()
        >>> metrics["pre/raw/norm"], metrics["pre/clipped/norm"], metrics["pre/raw/zero"]
        (3.0, 1.0, 0.5)
    """
    if not isinstance(name, str) or isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"monitor needs a string as name and an integer as every, got {name!r} and {every!r}")
    if not name or "." in name or "/" in name:
        raise ValueError(f"monitor.name must be a name without dots and slashes, got {name!r}")
    if every < 1:
        raise ValueError(f"monitor.every must be >= 1, got {every}")
    return Monitor(name, every)


class Monitor(Stage):
    """The identity, which keeps figures. Made by ``monitor``."""

    stateful = True
    acts_on_each = False
    is_identity = True
    reports = ("figures",)

    def __init__(self, name: str, every: int) -> None:
        self.name = name
        self.every = every
        self.hyperparameters: Mapping[str, Any] = {}

    @property
    def state_name(self) -> str:
        """Its name."""
        return self.name

    def init(self, tensor: Tensor, group: Group) -> State:
        """Zeros."""
        return {"figures": torch.zeros(4, device=tensor.device, dtype=_wide(tensor))}

    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Look at all tensors; the figures are new tensors, and the tensors are returned as they are."""
        params = [None if group.get("slot") == "post" else group.get("param") for group in groups]
        figures: list[Any] = [None] * len(tensors)
        pairs = zip(tensors, params, strict=True)
        for places in _alike([(tensor.device, _wide(tensor), param is None) for tensor, param in pairs]):
            table = _look([tensors[i] for i in places])
            if params[places[0]] is None:
                of_param = torch.full_like(table[:, 0], NO_PARAM)
            else:
                of_param = _look([params[i] for i in places], counts=False)[:, 0].to(table)
            rows = torch.cat([table, of_param.unsqueeze(1)], 1).unbind()
            for i, row in zip(places, rows, strict=True):
                figures[i] = row
        return list(tensors), [{"figures": row} for row in figures]

    def report(self, states: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, float]:
        """The figures of some parameters together."""
        lengths, zeros, nonfinite, of_params = zip(*(state["figures"] for state in states), strict=True)
        length, of_param, size = math.hypot(*lengths), math.hypot(*of_params), sum(sizes)
        found = {"norm": length, "rms": _ratio(length, math.sqrt(size)), "ratio": _ratio(length, of_param)}
        if NO_PARAM in of_params:
            del found["ratio"]
        return {**found, "zero": _ratio(sum(zeros), size), "nonfinite": _ratio(sum(nonfinite), size)}

    def check(self, group: Group) -> None:
        """There are no hyperparameters."""

    def functions(self) -> list[Any]:
        """There are none that others could call for each tensor."""
        return []

    def __repr__(self) -> str:
        given = [repr(self.name)] * (self.name != "monitor") + [f"every={self.every}"] * (self.every != 1)
        return f"monitor({', '.join(given)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return monitor, (self.name, self.every)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype of its figures."""
    return torch.promote_types(tensor.real.dtype, torch.float32)


def _alike(keys: Sequence[Any]) -> list[list[int]]:
    """The places of equal keys."""
    found: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return list(found.values())


def _look(tensors: Sequence[Any], *, counts: bool = True) -> Tensor:
    """A row for each tensor, all of one device: its norm and, if it ``counts``, how many are zero and not finite."""
    tensors = [each.detach() for each in tensors]
    tensors = [gather(each) if is_distributed(each) and is_partial(each) else each for each in tensors]
    rows: list[Any] = [None] * len(tensors)
    kinds = [(each.dtype, (each.device_mesh, each.placements) if is_distributed(each) else None) for each in tensors]
    for places in _alike(kinds):
        first = tensors[places[0]]
        table = _look_at_plain([local(tensors[i]) for i in places], counts=counts)
        if is_distributed(first):  # in one go, and also where this process has no elements: the others wait for it
            table = _sum_up(collect(table, first))
        for i, row in zip(places, table.unbind(), strict=True):
            rows[i] = row
    return torch.stack(rows)


def _look_at_plain(tensors: Sequence[Tensor], *, counts: bool) -> Tensor:
    """The same for tensors of one dtype, of which the small ones of one size are stacked."""
    is_graph = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    longest = LONGEST if tensors[0].is_cpu else LONGEST_ON_DEVICE
    longest = min(longest, sum(tensor.numel() for tensor in tensors)) or 1
    dtype, device = _wide(tensors[0]), tensors[0].device
    # One memory for all: to get a new one takes the CPU longer than all else here.
    flags = torch.empty(longest, dtype=dtype, device=device) if counts and not is_graph else None
    rows: list[Any] = [None] * len(tensors)
    for same in _alike([tensor.numel() for tensor in tensors]):
        count = max(longest // max(tensors[same[0]].numel(), 1), 1)
        for start in range(0, len(same), count):
            places = same[start : start + count]
            flat = [_flat(tensors[i]) for i in places]
            batch = torch.stack(flat) if len(flat) > 1 else flat[0].unsqueeze(0)
            pieces = [batch] if is_graph else batch.split(longest, 1)
            tables = [_look_at_piece(piece, flags) if counts else _lengths(piece).unsqueeze(1) for piece in pieces]
            for i, row in zip(places, _sum_up(torch.stack(tables)).unbind(), strict=True):
                rows[i] = row
    return torch.stack(rows)


def _sum_up(parts: Tensor) -> Tensor:
    """The table of whole tensors, from those of their parts, stacked."""
    return parts[0] if len(parts) == 1 else torch.cat([norm(parts[..., :1], dim=[0]), parts[..., 1:].sum(0)], 1)


def _lengths(rows: Tensor) -> Tensor:
    return norm(rows, dim=[1], dtype=torch.promote_types(rows.dtype, torch.float32))


def _look_at_piece(rows: Tensor, flags: Tensor | None) -> Tensor:
    """A row for each of ``rows``; ``flags`` is memory to overwrite, which a graph does not need."""
    lengths = _lengths(rows)
    zeros = rows.shape[1] - _count_nonzero(rows, flags)
    if flags is not None and rows.is_cpu and lengths.isfinite().all():  # the norm has told, without another look
        nonfinite = torch.zeros_like(lengths)
    else:
        nonfinite = _count_nonzero(rows - rows, flags)  # which is NaN for what is not finite
    return torch.stack([lengths, zeros.to(lengths), nonfinite.to(lengths)], 1)


def _count_nonzero(rows: Tensor, flags: Tensor | None) -> Tensor:
    """How many elements of each row are not zero, NaN included."""
    if flags is None or rows.is_complex():
        return (rows != 0).sum(1)
    # On the CPU, flags in floating point take a fifth of the time that booleans take.
    return torch.ne(rows, 0, out=flags[: rows.numel()].view(rows.shape)).sum(1)


def _flat(tensor: Tensor) -> Tensor:
    """Its elements in the order in which they lie in memory, so that nothing is copied."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return tensor.reshape(-1)
