"""Programs: generated Python that runs on lists of tensors, in place, and does what the traces of a function say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradchain.engine.trace import Trace, map_leaves
from gradchain.engine.writer import Writer


@dataclass(frozen=True, eq=False)
class Program:
    """Generated code that does to each tensor what the trace for it says.

    Attributes:
        source: The code.
        run: The function. It takes what ``inputs`` names, and then the lists that ``numbers_by_tensor`` returns.
        inputs: The names of the inputs.
        outputs: The names of the inputs that the function overwrites.
        single: Whether the function takes one tensor at a time, without a list.
        differing: Functions that find, in a trace, a number that differs from tensor to tensor.
    """

    source: str
    run: Callable[..., None]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    single: bool
    differing: tuple[Callable[[Trace], Any], ...]

    def numbers_by_tensor(self, traces: Sequence[Trace]) -> list[list[Any]]:
        """Return the numbers that differ from tensor to tensor, as lists."""
        return [[find(trace) for trace in traces] for find in self.differing]


def signature(trace: Trace) -> Any:
    """Return what the traces of one program have in common: everything but sizes and numbers."""
    places: dict[Any, int] = {}
    forms = [
        (places.setdefault((shape, stride), len(places)), len(shape), dtype) for shape, dtype, stride in trace.forms
    ]
    used = [n for call in trace.calls for n in (*call.references(), *call.results)]
    return (
        tuple(trace.inputs.items()),
        tuple(trace.outputs.items()),
        tuple(forms[number] for number in (*trace.inputs.values(), *trace.outputs.values(), *used)),
        tuple(map(id, trace.constants.values())),
        str([(c.target, map_leaves((c.args, c.kwargs), _without_number), c.results, c.stage) for c in trace.calls]),
    )


def _without_number(leaf: Any) -> Any:
    is_number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
    return "a number" if is_number else leaf


def write(traces: tuple[Trace, ...], device: torch.device, *, single: bool) -> Program:
    """Return the program for tensors whose traces have one signature.

    Args:
        traces: The traces of the tensors, each once.
        device: Where the tensors are.
        single: Whether the program takes one tensor at a time, without a list.
    """
    keeps_tensors = any(constant.ndim for trace in traces for constant in trace.constants.values())
    return (_write.__wrapped__ if keeps_tensors else _write)(traces, device, single)  # a cache would keep them alive


@functools.lru_cache(maxsize=1024)
def _write(traces: tuple[Trace, ...], device: torch.device, single: bool) -> Program:
    writer = Writer(traces, device, single=single)
    source, run = writer.write()
    trace = traces[0]
    return Program(source, run, tuple(trace.inputs), tuple(trace.outputs), single, tuple(writer.differing))
