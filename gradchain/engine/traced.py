"""Trace the stages that act on each tensor by itself, several stages together."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.func import vmap

from gradchain._sharding import local_part
from gradchain.contract import ACTED, GIVEN, Group, State, compute_dtype, is_same, show
from gradchain.engine.dependencies import Reading, readings
from gradchain.engine.trace import META, TENSOR, NotTraceable, Recorder, Trace
from gradchain.stage import Combinator, Function, Part, Stage

if TYPE_CHECKING:
    from gradchain.engine.operations import SlotTensor, View

NUMBER, VALUE, CONTEXT, STATE, VIEW, COUNT = "number:", "value:", "context:", "state:", "view:", "count:"
"""How the names of inputs begin: numbers and tensors of the group, then context, states, views and counters."""

ABSENT = object()


@dataclass(frozen=True, eq=False)
class Traced:
    """A trace of several stages, and what it depends on besides its inputs."""

    trace: Trace
    readings: tuple[Reading, ...]
    keys: Mapping[str, Any]
    """The keys of the group that were read, each with its value, or with its kind if the value is an input."""

    def holds(self, group: Group) -> bool:
        """Whether the trace is one for ``group``, too."""
        return all(reading.holds() for reading in self.readings) and all(
            still_has(group, key, value) for key, value in self.keys.items()
        )

    def reads(self, key: str) -> bool:
        """Whether the stages read ``key`` of the context."""
        return CONTEXT + key in self.trace.inputs


class AnyOfKind(NamedTuple):
    """What a trace depends on of a value that is one of its inputs."""

    of: Any


def kind_of(value: Any) -> AnyOfKind:
    """Return the form of a tensor, or the type of anything else."""
    return AnyOfKind(form_of(value) if isinstance(value, Tensor) else type(value))


class UntracedStage(Exception):  # noqa: N818
    """Raised with the position of the stage that cannot be traced, and with the reason."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


class NotedGroup(dict[str, Any]):
    """A group that notes each value that is read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.reads: dict[str, Any] = {}
        """The values that were read, by their keys; ABSENT for keys that are not there."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        self.reads[key] = value
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default`` if the group has no such key."""
        return self[key] if key in self else default  # noqa: SIM401 # self.get would call this method

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        self.reads[str(key)] = ABSENT
        return False

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in super().__iter__() if self[key] is not ABSENT])

    def keys(self) -> Any:
        """Return a view of all keys. Going through the keys counts as reading the value of each."""
        return KeysView(self)

    def values(self) -> Any:
        """Return a view of all values."""
        return ValuesView(self)

    def items(self) -> Any:
        """Return a view of all pairs of a key and its value."""
        return ItemsView(self)

    def copy(self) -> dict[str, Any]:
        """Return a plain dict of all values, in which reading is not noted."""
        return {**self}

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {**other, **self}


class TracedGroup(NotedGroup):
    """A group for a trace. Numbers that can change are given as tensors without data.

    Args:
        values: The values.
        recorder: The recorder of the trace.
        dtype: The dtype for numbers.
        fixed: The keys of numbers that are given as they are.
    """

    def __init__(
        self, values: Mapping[str, Any], recorder: Recorder, dtype: torch.dtype, fixed: frozenset[str]
    ) -> None:
        super().__init__(values)
        self.recorder = recorder
        self.number = torch.empty((), dtype=dtype, device=META)
        self.fixed = fixed
        self.numbers: set[str] = set()
        """The keys of the numbers that the stage has read as tensors."""
        self.given: frozenset[str] = frozenset()
        """The keys that were added to the group, with tensors that are values of the trace already."""

    def __getitem__(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        if key in self.given:
            return value
        self.reads[key] = value
        if isinstance(value, Tensor):
            self.reads[key] = kind_of(value)
            return self.recorder.input(VALUE + key, value)
        if isinstance(value, float) and key not in self.fixed:
            self.reads[key] = kind_of(value)
            self.numbers.add(key)
            return self.recorder.input(NUMBER + key, self.number)
        return value

    def __or__(self, other: Mapping[str, Any]) -> TracedGroup:  # type: ignore[override]
        merged = TracedGroup.__new__(TracedGroup)  # with the same notes, and without reading anything
        merged.__dict__.update(self.__dict__, given=self.given | other.keys())
        dict.update(merged, dict.items(self))
        dict.update(merged, other)
        return merged


def trace_stages(
    parts: Sequence[Part], item: SlotTensor, views: Mapping[str, View], *, count: int | None = None
) -> Traced:
    """Trace what ``parts`` do, one after the other, to a tensor like that of ``item``.

    Args:
        parts: The stages.
        item: The tensor, with its group, its context and its states.
        views: What was measured before, by the path of the stage that measures.
        count: Trace the stages for this many such tensors, stacked along a new first dimension.

    Raises:
        UntracedStage: One of the stages cannot be traced.
    """
    watched: list[Reading] = []
    for position, part in enumerate(parts):
        try:
            for function in part.stage.functions():
                watched += readings(function)
        except NotTraceable as error:
            raise UntracedStage(position, str(error)) from None
    key = (
        tuple((part.stage, part.path) for part in parts),
        form_of(item.example),
        tuple((name, form_of(value)) for name, value in item.context.items()),
        tuple((name, form_of(value)) for name, value in item.states.items()),
        tuple((path, name, form_of(value)) for path, view in views.items() for name, value in view.items()),
        tuple(key for part in parts for key in item.counts_of(part)),
        count,
    )
    group = item.full_group()
    has_tensors = any(map(_has_tensors, (*(part.stage for part in parts), *(reading.value for reading in watched))))
    traces = _OF_TENSORS if has_tensors else _KNOWN
    known = traces.get(key)
    if known is None or not known.holds(group):
        known = _trace(parts, item, group, views, count, watched)
        if len(traces) >= 4096:
            traces.clear()
        traces[key] = known
    return known


_KNOWN: dict[Any, Traced] = {}

_OF_TENSORS: WeakValueDictionary[Any, Traced] = WeakValueDictionary()
"""Traces that keep tensors alive, such as the bounds of a batch of images. They go when no optimizer uses them."""


def _has_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor with dimensions, or contains one, as the arguments of a stage can."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    if isinstance(value, Stage) and not isinstance(value, Function):
        value = value.__reduce__()[1]
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_tensors, members))


def _trace(
    parts: Sequence[Part],
    item: SlotTensor,
    group: Group,
    views: Mapping[str, View],
    count: int | None,
    watched: list[Reading],
) -> Traced:
    """Trace with the numbers of the group as tensors, so that other values need no other trace.

    If a stage cannot be traced so, since Python needs the numbers that it reads, it gets these numbers as they are.
    """
    fixed: frozenset[str] = frozenset()
    while True:
        attempt = _Attempt(parts, item, group, views, count, fixed)
        try:
            return attempt.traced(watched)
        except UntracedStage:
            more = fixed | attempt.group.numbers
            if more == fixed:
                raise
            fixed = more


class _Attempt:
    """One attempt to trace stages."""

    def __init__(
        self,
        parts: Sequence[Part],
        item: SlotTensor,
        group: Group,
        views: Mapping[str, View],
        count: int | None,
        fixed: frozenset[str],
    ) -> None:
        self.parts = parts
        self.count = count
        self.position = 0
        form = local_part(item.example)
        self.inputs = {TENSOR: self._empty(form)}
        self.inputs |= {CONTEXT + key: self._empty(local_part(value)) for key, value in item.context.items()}
        for part in parts:
            if part.stage.stateful and not part.stage.shares_state:
                for key in part.states_of(item.states):
                    self.inputs[STATE + part.path + key] = self._empty(local_part(item.states[part.path + key]))
            for key, counter in item.counts_of(part).items():
                self.inputs[COUNT + part.path + key] = self._empty(counter)
        self.recorder = Recorder(self.inputs)
        self.group = TracedGroup(group, self.recorder, compute_dtype(form.dtype).to_real(), fixed)
        self.views = {
            part.path: {
                key: self.recorder.input(f"{VIEW}{part.path}{key}", value)
                for key, value in views.get(part.path, {}).items()
            }
            for part in parts
        }

    def traced(self, watched: list[Reading]) -> Traced:
        run = self._run if self.count is None else vmap(self._run)
        try:
            with torch.no_grad(), self.recorder:
                outputs = run(dict(self.inputs))
            self._require_form(outputs)
            return Traced(self.recorder.trace(outputs), tuple(watched), self.group.reads)
        except Exception as error:
            raise UntracedStage(self.position, _reason(error)) from error

    def _run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensor = values[TENSOR]
        context = {name[len(CONTEXT) :]: value for name, value in values.items() if name.startswith(CONTEXT)}
        outputs: dict[str, Tensor] = {}
        for position, part in enumerate(self.parts):
            self.position = position
            self.recorder.stage = " ".join(part.places[-1].split()) if part.places else show(part.stage)
            self.group.numbers.clear()
            start = STATE + part.path
            state = {name[len(start) :]: value for name, value in values.items() if name.startswith(start)}
            group = self.group | seen_by(part.stage, tensor, context) | self.views[part.path]
            counter = COUNT + part.path
            counts = {name[len(counter) :]: value for name, value in values.items() if name.startswith(counter)}
            tensor, new_state = part.stage.act(tensor, group | {ACTED: True} if counts else group, state)
            if counts:
                outputs |= {counter + key: value for key, value in count_units(counts, new_state).items()}
            outputs |= {start + key: value for key, value in new_state.items()}
        return {TENSOR: tensor, **outputs}

    def _require_form(self, outputs: Mapping[str, Tensor]) -> None:
        for name, value in outputs.items():
            old = self.inputs.get(name)
            if old is None or (old.shape, old.dtype) != (value.shape, value.dtype):
                raise NotTraceable(f"changes the form of its state {name.removeprefix(STATE)!r}")

    def _empty(self, value: Tensor) -> Tensor:
        shape, stride = tuple(value.shape), value.stride()
        if self.count is not None:
            shape, stride = (self.count, *shape), (value.numel(), *stride)
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=META)


def seen_by(stage: Stage, tensor: Tensor, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the context for a stage. A combinator gets ``param`` in ``post``, too, because masks in it may read it."""
    return {"param": tensor, **context} if isinstance(stage, Combinator) else dict(context)


def count_units(counts: State, told: State) -> State:
    """Return ``counts`` with the units of one more step, whose flags are taken out of ``told``, the new states."""
    flags = told.pop(ACTED).to(torch.int64)
    return {"acted": counts["acted"] + (flags.sum() if flags.ndim else flags), "units": counts["units"] + flags.numel()}


class Guards(NamedTuple):
    """Conditions under which a plan stays valid: functions that tell whether something is as it was."""

    groups: tuple[Callable[[], bool], ...] = ()
    """Of values in param groups."""
    others: tuple[Callable[[], bool], ...] = ()
    """Of signals, and of variables that functions read."""

    def __add__(self, more: Guards) -> Guards:  # type: ignore[override] # field by field
        return Guards(self.groups + more.groups, self.others + more.others)

    def hold(self, *, same_groups: bool) -> bool:
        """Whether all is as it was; ``same_groups`` says that the groups are known to be."""
        return all(holds() for holds in (self.others if same_groups else self.others + self.groups))


def guards_of(traced: Iterable[tuple[SlotTensor, Traced]]) -> Guards:
    """Return the conditions under which traces stay valid, given pairs of an item and its trace."""
    groups: dict[Any, Callable[[], bool]] = {}
    others: dict[Any, Callable[[], bool]] = {}
    for item, each in traced:
        for reading in each.readings:
            others[id(reading.read), id(reading.value)] = reading.holds
        for key, value in each.keys.items():
            if key not in item.own_keys:
                can_be_signal = key not in item.group and key not in GIVEN
                found = others if can_be_signal else groups
                found[id(item.group), key, id(value)] = partial(still_has, item.group, key, value, item.signals)
    return Guards(tuple(groups.values()), tuple(others.values()))


def still_has(group: Group, key: str, value: Any, signals: Mapping[str, Tensor] = MappingProxyType({})) -> bool:
    """Whether a group or a signal still has ``value`` under ``key``, or a value of that kind if it is ``AnyOfKind``."""
    now = group.get(key, signals.get(key, ABSENT))
    if type(value) is AnyOfKind:
        return kind_of(now) == value
    return now is value or (type(now) is type(value) and is_same(now, value))


def form_of(value: Any) -> Any:
    """Return what a trace depends on of a tensor. That leaves out the device, since tensors in a trace have no data."""
    value = local_part(value)
    return tuple(value.shape), value.stride(), value.dtype


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0].partition(". ")[0]  # torch adds sentences of advice to some errors
    if "meta tensor" in text or "data-dependent" in text or "vmap: It looks like you're" in text:
        return f"reads a value{_line_of(error)}"
    return text if isinstance(error, NotTraceable) else f"{type(error).__name__}: {text}"


def _line_of(error: Exception) -> str:
    """Return, in words, the line of the function outside of this library and torch that was running."""
    traceback, line = error.__traceback__, ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("gradchain", "torch"):
            line = f" (line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return line
