"""The figures of the transforms of an optimizer, read at once, as numbers by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradchain._keys import free_name
from gradchain.engine.engine import Engine
from gradchain.engine.operations import COUNTED
from gradchain.engine.states import SLOTS
from gradchain.stage import Combinator, Stage


class _Source(NamedTuple):
    """A stage that has figures, and the parameters that it has them of."""

    label: str
    path: str
    stage: Stage
    numbers: list[int]


@torch.no_grad()
def read_metrics(engine: Engine, *, per_parameter: bool) -> dict[str, float]:
    """The figures since the last call, which starts new ones; see ``ParamTransformingOptimizer.metrics``."""
    engine.start_counting()
    assert engine.counts is not None
    entries, states = engine.param_table.entries, engine.synced_states()
    for param in engine.counts.keys() - set(engine.param_table.params):
        del engine.counts[param]
    wanted: dict[tuple[str, int], Tensor] = {}
    sources = list(_sources(engine))
    for source in sources:
        for number in source.numbers:
            known = states.of(entries[number])
            wanted |= {(source.path + key, number): known[source.path + key] for key in source.stage.reports}
            counts = engine.counts.get(entries[number].param, {}) if source.stage.counts else {}
            found = {(source.path + key, number): counts.get(source.path + key) for key in COUNTED}
            wanted |= {place: counter for place, counter in found.items() if counter is not None}
    values = dict(zip(wanted, _read(list(wanted.values())), strict=True))
    for counts in engine.counts.values():
        for counter in counts.values():
            counter.zero_()
    names = [entry.name or str(entry.number) for entry in entries]
    sizes = [math.prod(entry.param.shape) for entry in entries]
    metrics: dict[str, float] = {}
    for source in sources:
        metrics |= _figures(source, source.numbers, values, sizes, "")
        is_of_all = source.stage.shares_state and source.stage.reports
        for number in source.numbers if per_parameter and not is_of_all else ():
            metrics |= _figures(source, [number], values, sizes, f"/{names[number]}")
    return metrics


def _sources(engine: Engine) -> Iterator[_Source]:
    """The stages that have figures, in order."""
    entries, states, have_grads = engine.param_table.entries, engine.states, engine.have_grads()
    for slot in SLOTS:
        groups = [{**entry.context(slot), "param": entry.param} for entry in entries]
        labels: set[str] = set()
        for part in engine.stage(slot).split(groups, range(len(entries)), f"{slot}."):
            for path, stage in _within(part.path, part.stage):
                if not (stage.reports or stage.counts):
                    continue
                label = free_name(_label(path, stage), labels)
                labels.add(label)
                known = {path + key for key in stage.reports}
                numbers = [
                    i
                    for i in part.numbers
                    if (slot == "post" or have_grads[i]) and states.of(entries[i]).keys() >= known
                ]
                yield _Source(label, path, stage, numbers)


def _within(path: str, stage: Stage) -> Iterator[tuple[str, Stage]]:
    """The stages that a combinator is made of, each with the beginning of the keys of its states; else itself."""
    if not isinstance(stage, Combinator):
        yield path, stage
        return
    for index, each in enumerate(stage.stages):
        yield from _within(path + stage.path(index), each)


def _label(path: str, stage: Stage) -> str:
    """The path, with a name for a stage that has no state, and so none in it: ``"pre/clip_by_norm"``."""
    *outer, last = path.removesuffix(".").split(".")
    named = [name for name in outer if not name.startswith("#")]
    return "/".join([*named, stage.state_name if last.startswith("#") else last])


def _figures(
    source: _Source, numbers: Sequence[int], values: dict[tuple[str, int], Any], sizes: Sequence[int], suffix: str
) -> dict[str, float]:
    """The figures of some parameters together."""
    found: dict[str, float] = {}
    if source.stage.reports and numbers:
        reported = [{key: values[source.path + key, i] for key in source.stage.reports} for i in numbers]
        found = source.stage.report(reported, [sizes[i] for i in numbers])
    acted, units = (sum(values.get((source.path + key, i), 0.0) for i in numbers) for key in COUNTED)
    if units:
        found["share_clipped"] = acted / units
    return {f"{source.label}/{key}{suffix}": value for key, value in found.items()}


def _read(tensors: Sequence[Tensor]) -> list[Any]:
    """The values of small tensors, as numbers or lists of them, by one copy from each device."""
    values: list[Any] = [None] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        wide = torch.float32 if device.type == "mps" else torch.float64
        places: list[int] = []
        joined: list[Tensor] = []
        mine = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        for dtype in dict.fromkeys(tensors[i].dtype for i in mine):
            same = [i for i in mine if tensors[i].dtype == dtype]
            places += same
            joined.append(torch.cat([tensors[i].reshape(-1) for i in same]).to(wide))
        read = iter(torch.cat(joined).tolist())
        for i in places:
            numbers = [next(read) for _ in range(tensors[i].numel())]
            values[i] = numbers if tensors[i].ndim else numbers[0]
    return values
