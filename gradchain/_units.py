"""What a stage acts on, in words: each element, each row, the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from gradchain.broadcast import broadcast
from gradchain.contract import Group, Transform, show
from gradchain.stage import Stage, as_stage

_KINDS = ("whole tensor", "sub-tensor", "row", "element")


def show_units(stage: Stage, tensors: Sequence[Tensor], groups: Sequence[Group]) -> str:
    """What ``stage`` acts on: of one tensor with the count, ``"each of 64 rows"``, of several in short.

    Example:
        >>> import torch
        >>> from gradchain import broadcast, normalize
        >>> weight, bias = torch.zeros(64, 10), torch.zeros(10)
        >>> entries = broadcast(normalize(), -1)
        >>> show_units(entries, [weight], [{}]), show_units(entries, [bias], [{}])
        ('each of 64 rows', 'each of 10 elements')
        >>> show_units(entries, [weight, bias, bias], [{}, {}, {}])
        'each row or element'
    """
    found = [(tensor.shape, _units(stage, tensor, group)) for tensor, group in zip(tensors, groups, strict=True)]
    if len(found) == 1:
        ((shape, units),) = found
        return ", ".join(_count(shape, unit) for unit in units) or "nothing"
    acting = [(shape, units) for shape, units in found if units]
    kinds = {_kind(shape, unit) for shape, units in acting for unit in units}
    *others, last = [kind for kind in _KINDS if kind in kinds] or [""]
    texts = ["all tensors"] if "all tensors" in kinds else []
    texts += [f"each {', '.join(others)}{' or ' if others else ''}{last}"] if last else []
    share = f" ({len(acting)} of {len(found)} tensors)" if 0 < len(acting) < len(found) else ""
    return (", ".join(texts) or "nothing") + share


def list_stages(
    transforms: Iterable[Transform], tensors: Sequence[Tensor], groups: Sequence[Group]
) -> list[tuple[str, str]]:
    """How the stages of a slot print, and what each acts on."""
    return [(show(each), show_units(as_stage(broadcast(each)), tensors, groups)) for each in transforms]


def print_slots(slots: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The slots as keyword arguments, one stage a line, and what it acts on as a comment."""
    return "".join(f"  {slot}={_print_chain(stages)},\n" for slot, stages in slots.items())


def _print_chain(stages: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"    {stage},  # {units}\n".replace("\n", "\n    ", stage.count("\n")) for stage, units in stages)
    return f"chain(\n{lines}  )" if stages else "chain()"


def _units(stage: Stage, tensor: Tensor, group: Group) -> Sequence[int | None]:
    try:
        return stage.units(tensor, group)
    except Exception:  # a step says what is wrong; what prints must not fail
        return ()


def _kind(shape: Sequence[int], unit: int | None) -> str:
    if unit is None:
        return "all tensors"
    return "element" if unit == 0 else "whole tensor" if unit == len(shape) else "row" if unit == 1 else "sub-tensor"


def _count(shape: Sequence[int], unit: int | None) -> str:
    kind = _kind(shape, unit)
    if unit is None:
        return kind
    count = math.prod(shape[: len(shape) - unit])
    of = f" of shape {tuple(shape[-unit:])}" if kind == "sub-tensor" else ""
    if kind == "whole tensor" or count == 1:
        return f"the {kind if kind == 'whole tensor' else f'only {kind}'}{of}"
    return f"each of {count} {kind}s{of}"
