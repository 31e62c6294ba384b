"""The operations of which a plan is made, beside programs: functions that run as they are, and measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from gradchain._sharding import distribute_like, gather, is_distributed, local, local_part
from gradchain.contract import ACTED, Group, State, locate
from gradchain.engine.trace import META, without_data
from gradchain.engine.traced import Guards, Traced, count_units, guards_of, seen_by
from gradchain.stage import Part, Stage, below

COUNTED = ("acted", "units")
"""What a stage counts: the units on which it acted, and all units."""

View: TypeAlias = dict[str, Any]
"""What a transform has measured of all tensors, by key."""


class SlotTensor(NamedTuple):
    """A tensor of a slot, and what belongs to it."""

    example: Tensor
    """The tensor itself, or one of the same shape, dtype, device and layout."""
    group: Group
    own_keys: Group
    """The keys that only this parameter has, such as its name."""
    param: Tensor
    """The parameter that the tensor is, or belongs to."""
    context: Mapping[str, Tensor]
    """The tensors of ``CONTEXT`` that there are, each shaped like ``example``."""
    states: State
    """The states of all stages, which a step overwrites."""
    is_transformed: bool
    is_new: bool
    """Whether the states have not been in a step yet."""
    place: str
    """The words that say which parameter it is."""
    signals: Mapping[str, Tensor]
    """The values from outside for this step, always in the same dict."""
    counts: State | None
    """What stages count, if they are asked to, by the path of the stage; a step overwrites the numbers."""

    def full_group(self) -> Group:
        """Return the group, with the keys of the parameter and the signals."""
        return {**self.group, **self.own_keys, **self.signals}

    def value(self, key: str) -> Any:
        """Return the value of ``key`` in the group, or else among the signals."""
        return self.group[key] if key in self.group else self.signals[key]

    def counts_of(self, part: Part) -> State:
        """Return what ``part`` counts, if it is asked to: on how many units it acted, and how many there were."""
        if self.counts is None or not part.stage.counts:
            return {}
        for key in COUNTED:
            zero = torch.zeros((), dtype=torch.int64, device=self.param.device)
            self.counts.setdefault(part.path + key, zero)
        return below(self.counts, part.path)

    def of_shape(self, shape: tuple[int, ...]) -> SlotTensor:
        """Return the same with plain tensors without data, where those shaped like ``example`` have ``shape``."""
        of_example = self.example.shape

        def plain(value: Tensor) -> Tensor:
            if value.shape != of_example:
                return whole_without_data(value)
            return torch.empty(shape, dtype=value.dtype, device=META)

        context = {key: plain(value) for key, value in self.context.items()}
        states = {key: plain(value) for key, value in self.states.items()}
        return self._replace(example=plain(self.example), context=context, states=states)


def whole_without_data(value: Tensor) -> Tensor:
    """Return a plain tensor without data, in the shape that a distributed tensor has in all processes together."""
    return torch.empty(value.shape, dtype=value.dtype, device=META) if is_distributed(value) else without_data(value)


@dataclass
class Pass:
    """One run of a plan over the tensors of a slot."""

    tensors: Sequence[Any]
    context: Mapping[str, Sequence[Any]]
    keeps_states: bool
    """Whether the old states stay as they are until ``commits`` are called."""
    step: int = 1
    """The number of the step, from 1 on; it stays 1 in a compiled graph."""
    commits: list[Callable[[], None]] = field(default_factory=list)
    views: dict[str, View] = field(default_factory=dict)
    """What was measured, by the path of the stage that measures."""


class SkippedStep(Exception):  # noqa: N818 # not an error: it ends the inner step
    """Raised when a transform says that the step must not be made."""

    def __init__(self, keep_counters: Callable[[], None]) -> None:
        self.keep_counters = keep_counters
        self.loss: Any = None


class Operation(ABC):
    """One or several stages, and the tensors that they act on."""

    cannot_raise = False
    """Whether a step can no longer raise, because making the plan has already tried all that could."""
    skips = False
    precedes_skip = False
    reads_params = True
    """Whether a stage can read ``group["param"]``."""
    guards = Guards()
    """What the operation depends on besides the tensors."""

    def __init__(self, slot: str, parts: Sequence[Part], items: Sequence[SlotTensor]) -> None:
        self.slot = slot
        self.parts = parts
        self.items = items
        self.numbers = sorted({number for part in parts for number in part.numbers})

    @abstractmethod
    def run(self, work: Pass) -> None:
        """Transform the tensors in place."""

    @property
    @abstractmethod
    def how(self) -> str:
        """How the operation runs, in a few words."""

    def describe(self) -> str:
        """Return how the operation runs, and on how many tensors, in words."""
        return f"{self.how}, {count(self.numbers)}"

    def listing(self) -> list[str]:
        """Return what runs, as lines of comments and of code."""
        places = "; ".join(": ".join(part.places) for part in self.parts)
        return [" ".join(f"# {self.slot}: {places}: {self.describe()}".split())]

    def raise_if_skipped(self, stage: Stage, states: Sequence[tuple[State, State]]) -> None:
        """Raise ``SkippedStep`` if one of ``states``, pairs of old and new ones, says not to make the step."""
        # A flag that is still the old tensor is from an earlier step, because this step had nothing to measure.
        flags = {
            id(new[key]): new[key] for old, new in states for key in stage.skip_keys if new.get(key) is not old.get(key)
        }
        # Flags are read together, those that tensors share once, so that the host waits for the device only once.
        if not flags or not bool(torch.stack(list(flags.values())).any()):
            return

        def keep_counters() -> None:
            for old, new in states:
                for key in stage.skip_keys:
                    path = key[: key.rfind(".") + 1]  # the transform that skips keeps all its state
                    put_states(old, {name: value for name, value in new.items() if name.startswith(path)})
            try:
                for _, new in states:
                    stage.after_skip(new)
            except Exception as error:
                locate(error, self.slot)
                raise

        raise SkippedStep(keep_counters)


def located(error: Exception, slot: str, part: Part, item: SlotTensor | None = None) -> Exception:
    """Say in ``error`` in which slot, for which parameter and in which stage it was raised, and return it.

    It is not raised here: the frame of this function and the error would refer to each other, and be freed late.
    """
    for place in reversed(part.places):
        locate(error, place)
    locate(error, slot if item is None else f"{slot}, {item.place}")
    return error


class AsItIs(Operation):
    """A function that runs as it is, on one tensor after the other; its result is written back.

    Args:
        reason: Why the function is no program.
    """

    gathers = False

    def __init__(self, slot: str, part: Part, items: Sequence[SlotTensor], reason: str) -> None:
        super().__init__(slot, [part], items)
        self.part = part
        self.reason = reason

    def run(self, work: Pass) -> None:
        for number in self.numbers:
            try:
                self._run_one(work, number)
            except Exception as error:
                located(error, self.slot, self.part, self.items[number])
                raise

    def _run_one(self, work: Pass, number: int) -> None:
        part, item, given = self.part, self.items[number], work.tensors[number]
        see = gather if self.gathers else partial(local_part, like=given)
        tensor = see(given).detach()
        context = {key: see(work.context[key][number]).detach() for key in self.context_of(number)}
        states = part.states_of(item.states) if part.stage.stateful and not part.stage.shares_state else {}
        state = {key: see(value) for key, value in states.items()}
        group = {**item.full_group(), **work.views.get(part.path, {}), **seen_by(part.stage, tensor, context)}
        counts = item.counts_of(part)
        result, new_state = part.stage.act(tensor, {**group, ACTED: True} if counts else group, state)
        if counts:
            put_states(counts, count_units(counts, new_state))
        if states:
            owned = without_aliases(new_state, tensor, *context.values())
            work.commits.append(partial(put_states, states, owned, gathered=self.gathers))
        if self.gathers:
            put(result, given)
        elif result is not tensor:
            # A result that is a view of the tensor, such as its transpose, must be read before the tensor is written.
            tensor.copy_(result.clone() if _storage(result) == _storage(tensor) else result)

    def context_of(self, number: int) -> Iterable[str]:
        """Return the keys of the context that the function gets."""
        return self.items[number].context

    @property
    def how(self) -> str:
        return f"as it is: {self.reason}"

    def describe(self) -> str:
        return f"as it is, {count(self.numbers)}: {self.reason}"


class Gathering(AsItIs):
    """A function that needs the whole of distributed tensors, which all processes gather.

    Args:
        traced: The trace of the function for each whole tensor, or None if it cannot be traced.
    """

    gathers = True

    def __init__(self, slot: str, part: Part, items: Sequence[SlotTensor], traced: Mapping[int, Traced | None]) -> None:
        super().__init__(slot, part._replace(numbers=list(traced)), items, "needs the whole of sharded tensors")
        self.traced = traced
        self.guards = guards_of((items[number], each) for number, each in traced.items() if each is not None)

    def context_of(self, number: int) -> Iterable[str]:
        traced = self.traced[number]
        return [key for key in self.items[number].context if traced is None or traced.reads(key)]


class Measure(Operation):
    """What a transform measures of all tensors, for the stage that then acts on each.

    Attributes:
        view: Tensors without data, of the form of what is measured.
    """

    def __init__(self, slot: str, part: Part, items: Sequence[SlotTensor]) -> None:
        super().__init__(slot, [part], items)
        self.part = part
        self.acting = [i for i in self.numbers if items[i].is_transformed and items[i].example.numel()]
        self.states = [part.states_of(items[i].states) for i in self.numbers] if part.stage.shares_state else []
        self.skips = bool(part.stage.skip_keys)
        self.reads_params = False
        self.gathers = not part.stage.measures_shards and any(is_distributed(items[i].example) for i in self.acting)
        self.view: View = {}
        self.cannot_raise = self._measures_without_error()

    def _measures_without_error(self) -> bool:
        """Measure tensors without data, so that what comes after can be traced, and return whether that was possible.

        The tensors have the shapes of the whole, because a process can have no elements, of which some things, such as
        the largest one, cannot be measured.
        """
        tensors = [whole_without_data(self.items[i].example) for i in self.acting]
        state = {key: whole_without_data(value) for key, value in (self.states or [{}])[0].items()}
        try:
            view, _ = self.part.stage.measure(tensors, self.items[self.acting[0]].full_group(), state)
        except Exception:  # measuring needs the data, so the stage that reads the result runs as it is
            return False
        self.view.update(view)
        return True

    def run(self, work: Pass) -> None:
        see = gather if self.gathers else (lambda value: value)
        given = [work.tensors[i] for i in self.acting]
        tensors = [see(tensor.detach() if tensor.requires_grad else tensor) for tensor in given]
        old = self.states[0] if self.states else {}
        state = {key: see(value) for key, value in old.items()}
        try:
            view, new_state = self.part.stage.measure(tensors, self.items[self.acting[0]].full_group(), state)
        except Exception as error:
            located(error, self.slot, self.part)
            raise
        work.views[self.part.path] = view
        if self.states:
            self.raise_if_skipped(self.part.stage, [(old, new_state)])
            work.commits.append(partial(put_states, old, new_state))

    @property
    def how(self) -> str:
        return "measures all"

    def describe(self) -> str:
        return f"measures {count(self.acting)}"


def count(numbers: Sequence[int]) -> str:
    """Return how many tensors there are, in words."""
    return f"{len(numbers)} tensor{'s'[: len(numbers) != 1]}"


def put(result: Tensor, tensor: Any) -> None:
    """Write ``result`` into ``tensor``. Of a distributed tensor, each process writes its own part."""
    tensor.copy_(distribute_like(result, tensor) if is_distributed(tensor) else result)


def put_states(old: State, new: State, *, gathered: bool = True) -> None:
    """Write a new state into the tensors of the old one."""
    for key, value in new.items():
        if gathered:
            put(value, old[key])
        elif (mine := local(old[key])).numel():
            mine.copy_(value)


def without_aliases(state: State, *inputs: Tensor) -> State:
    """Return ``state`` without memory shared with ``inputs`` or among its elements, since steps write in place."""
    return without_storages(state, storages_of(inputs))


def storages_of(tensors: Iterable[Tensor]) -> set[int | None]:
    """Return the addresses of the memory of ``tensors``."""
    return set(map(_storage, tensors)) - {None}


def without_storages(state: State, storages: set[int | None]) -> State:
    """Return ``state``, with copies of tensors that are in ``storages`` or whose elements share memory."""
    return {key: v.clone() if _storage(v) in storages or is_expanded(v) else v for key, v in state.items()}


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share their memory, as in what ``torch.func.vmap`` makes of a new ``torch.zeros(())``."""
    return tensor.layout is torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _storage(tensor: Tensor) -> int | None:
    if torch.compiler.is_compiling():  # storages have no address there, and needless copies are left out
        return 0
    tensor = local(tensor)
    is_known = tensor.layout is torch.strided and type(tensor) in (Tensor, Parameter)
    return tensor.untyped_storage().data_ptr() if is_known else None
