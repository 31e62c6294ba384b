"""Run programs on blocks of tensors: small ones in lists or stacked, large ones by themselves or in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from gradchain._sharding import is_distributed, local_part
from gradchain.contract import locate
from gradchain.engine.operations import Operation, Pass, SlotTensor, View, count
from gradchain.engine.program import Program, signature, write
from gradchain.engine.table import FOREACH, RENAMED, VIEWS
from gradchain.engine.trace import CONSTANT, TENSOR, Call, Trace
from gradchain.engine.traced import CONTEXT, COUNT, NUMBER, STATE, VALUE, VIEW, Traced, guards_of, trace_stages
from gradchain.engine.values import KINDS
from gradchain.stage import Part

BLOCK_BYTES = 2**21
"""Tensors go through a program in blocks of about this size, which stay in the cache from one line to the next.

Five stages over the gradients of ResNet-50 take 0.6 of the time that they take one by one, and 0.5 where large
tensors are cut into pieces. Smaller blocks gain nothing, and pieces of less than twice what torch gives to one thread
(2**15 elements) would leave other threads idle.
"""

STACK_BYTES = 2**20
"""Small tensors are stacked in blocks of this size: the copies are in the cache, and there are few calls."""

CLAMP_BYTES = 2**16
"""From this size on, to clamp each tensor by itself, in one pass, is faster than to clamp a list, in two passes."""

BYTES_A_MICROSECOND = 20000
"""How many bytes are copied in a microsecond from outside of the cache."""


class Programs(Operation):
    """Stages that act on each tensor by itself, as programs.

    Args:
        views: What was measured before, by the path of the stage that acts on it.

    Raises:
        UntracedStage: One of the stages cannot be traced.
    """

    cannot_raise = True

    def __init__(
        self, slot: str, parts: Sequence[Part], items: Sequence[SlotTensor], views: Mapping[str, View]
    ) -> None:
        super().__init__(slot, parts, items)
        self.views = views
        self.buffers: dict[Any, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.traced = {number: self._trace(number) for number in self.numbers}
        kinds: dict[Any, list[int]] = {}
        for number, traced in self.traced.items():
            item = items[number]
            form = local_part(item.example)
            kind = signature(traced.trace), id(item.group), form.dtype, form.device
            kinds.setdefault(kind, []).append(number)
        self.blocks = [block for numbers in kinds.values() for block in self._blocks(numbers)]
        self.guards = guards_of((items[number], traced) for number, traced in self.traced.items())
        self.reads_params = any(f"{CONTEXT}param" in traced.trace.inputs for traced in self.traced.values())

    def run(self, work: Pass) -> None:
        keeps_states = work.keeps_states or self.precedes_skip
        try:
            for block in self.blocks:
                block.call(block.inputs(work, keeps_states))
        except Exception as error:  # such as a lack of memory
            locate(error, self.slot)
            raise

    @property
    def how(self) -> str:
        return "traced"

    def describe(self) -> str:
        programs = len(self._users())
        return f"{super().describe()} in {programs} program{'s'[: programs != 1]}"

    def listing(self) -> list[str]:
        lines = super().listing()
        for source, ways in self._users().items():
            lines.append(f"# for {', '.join(f'{count(numbers)} {way}' for way, numbers in ways.items())}")
            lines += source.splitlines()
        return lines

    def _users(self) -> dict[str, dict[str, list[int]]]:
        """Return the code of each program, with the tensors that go through it, by the way in which they do."""
        users: dict[str, dict[str, list[int]]] = {}
        for block in self.blocks:
            users.setdefault(block.program.source, {}).setdefault(block.way, []).extend(block.numbers)
        return users

    def _trace(self, number: int, count: int | None = None) -> Traced:
        parts = [part for part in self.parts if number in part.numbers]
        return trace_stages(parts, self.items[number], self.views, count=count)

    def _blocks(self, numbers: Sequence[int]) -> Iterator[Block]:
        """Yield the blocks of tensors whose traces differ in sizes alone."""
        rest, alike = list(numbers), dict[int, list[int]]()
        for number in numbers:
            alike.setdefault(id(self.traced[number]), []).append(number)
        for same in alike.values():
            if self._pays_to_stack(same):
                stacked = set(same)
                rest = [number for number in rest if number not in stacked]
                for part in _chunks(same, self._bytes, STACK_BYTES):
                    yield self._stacked(part) if len(part) > 1 else self._single(part[0])
        names = [call.name for call in _calls_for_each(self.traced[numbers[0]].trace)]
        is_one_pass = len(names) == 1 and RENAMED.get(names[0], names[0]) in FOREACH
        largest = math.inf if is_one_pass else CLAMP_BYTES if names == ["clamp"] else BLOCK_BYTES
        small = [number for number in rest if self._bytes(number) < largest]
        for chunk in _chunks(small, self._bytes, math.inf if is_one_pass else 2 * BLOCK_BYTES):
            yield self._list(chunk) if len(chunk) > 1 else self._single(chunk[0])
        for number in rest:
            if self._bytes(number) >= largest:
                yield self._single(number)

    def _pays_to_stack(self, numbers: Sequence[int]) -> bool:
        """Whether it is faster to stack tensors of one form, run a program once and copy the results back.

        This compares the microseconds that both take for a tensor, as measured on two CPUs. Without a gain of a fifth,
        lists are better, since they need no memory.
        """
        item, trace = self.items[numbers[0]], self.traced[numbers[0]].trace
        all_forms = [item.example, *item.context.values(), *item.states.values()]
        if len(numbers) < 4 or any(is_distributed(v) or not v.is_contiguous() for v in all_forms):
            return False
        calls, inputs = _calls_for_each(trace), [name for name in trace.inputs if _is_of_each(name)]
        copied = self._bytes(numbers[0]) / BYTES_A_MICROSECOND
        whole = trace.forms[trace.inputs[TENSOR]][0]
        passes = sum(any(trace.forms[n][0] == whole for n in (*call.references(), *call.results)) for call in calls)
        stacked = len(inputs) * (0.3 + copied) + len(trace.outputs) * (0.7 + copied) + passes * 0.5 * copied
        return bool(sum(_cost(call, trace) for call in calls) > 1.2 * stacked)

    def _bytes(self, number: int) -> int:
        form = local_part(self.items[number].example)
        return int(form.numel() * form.element_size())

    def _list(self, numbers: Sequence[int]) -> Block:
        traces = [self.traced[number].trace for number in numbers]
        return Block(self, write(tuple(dict.fromkeys(traces)), self._device(numbers), single=False), numbers, traces)

    def _single(self, number: int) -> Block:
        trace = self.traced[number].trace
        program = write((trace,), self._device([number]), single=True)
        kind = Pieces if self._can_cut(number, trace) else Block
        return kind(self, program, [number], [trace])

    def _stacked(self, numbers: Sequence[int]) -> Block:
        trace = self._trace(numbers[0], count=len(numbers)).trace
        return Stacked(self, write((trace,), self._device(numbers), single=True), numbers, [trace])

    def _device(self, numbers: Sequence[int]) -> torch.device:
        return self.items[numbers[0]].example.device

    def _can_cut(self, number: int, trace: Trace) -> bool:
        """Whether a large tensor can go through the program in pieces, which stay in the cache."""
        item, shape = self.items[number], trace.forms[trace.inputs[TENSOR]][0]
        used = [item.example, *(value for key, value in item.context.items() if CONTEXT + key in trace.inputs)]
        return (
            self._bytes(number) >= 2 * BLOCK_BYTES
            and sum(trace.forms[call.results[0]][0] == shape for call in trace.calls) > 1
            and trace.is_pointwise
            and all(trace.forms[trace.inputs[name]][0] == shape for name in trace.outputs)
            and all(local_part(value).is_contiguous() for value in used)
        )

    def reader(self, name: str, numbers: Sequence[int], trace: Trace, *, single: bool) -> Callable[[Pass], Any]:
        """Return what gets the input ``name`` of a program for the tensors ``numbers``."""
        start, _, key = name.partition(":")
        item = self.items[numbers[0]]
        if start + ":" in (NUMBER, VALUE):
            return lambda work: item.value(key)
        if start + ":" == CONSTANT:
            constant = trace.constants[name]
            return lambda work: constant
        if start + ":" == VIEW:
            path, name = next(
                (path, key[len(path) :])
                for path, view in self.views.items()
                if key.startswith(path) and key[len(path) :] in view
            )
            return lambda work: work.views[path][name]
        if start + ":" == COUNT:
            counters = tuple((self.items[number].counts or {})[key] for number in numbers)
            return lambda work: counters[0] if single else counters
        if start + ":" == STATE:
            states = tuple(local_part(self.items[number].states[key]) for number in numbers)
            return lambda work: states[0] if single else states
        return self._picker(None if name == TENSOR else key, numbers, single=single)

    def _picker(self, key: str | None, numbers: Sequence[int], *, single: bool) -> Callable[[Pass], Any]:
        """Return what gets the tensors ``numbers``, or those of the context under ``key``."""
        if any(is_distributed(self.items[number].example) for number in numbers):
            return self._local_picker(key, numbers, single=single)
        if not single and list(numbers) == list(range(len(self.items))):
            return (lambda work: work.tensors) if key is None else (lambda work: work.context[key])
        if single:
            number = numbers[0]
            return (lambda work: work.tensors[number]) if key is None else (lambda work: work.context[key][number])
        pick: Callable[[Sequence[Any]], Any] = itemgetter(*numbers)

        def take(values: Sequence[Any]) -> Any:
            if torch.compiler.is_compiling():  # which does not know itemgetter
                return [values[number] for number in numbers]
            return pick(values)

        return (lambda work: take(work.tensors)) if key is None else (lambda work: take(work.context[key]))

    def _local_picker(self, key: str | None, numbers: Sequence[int], *, single: bool) -> Callable[[Pass], Any]:
        """Return what gets distributed tensors, of which a program takes the part of this process."""

        def read(work: Pass) -> Any:
            values = work.tensors if key is None else work.context[key]
            found = tuple(local_part(values[number], like=work.tensors[number]) for number in numbers)
            return found[0] if single else found

        return read


class Block:
    """A call of a program, on the same tensors in every step."""

    def __init__(self, owner: Programs, program: Program, numbers: Sequence[int], traces: Sequence[Trace]) -> None:
        self.program = program
        self.numbers = numbers
        self.readers = [owner.reader(name, numbers, traces[0], single=self.takes_one(name)) for name in program.inputs]
        self.states = [i for i, name in enumerate(program.inputs) if name.startswith(STATE)]
        self.numbers_by_tensor = program.numbers_by_tensor(traces)
        self.buffers = owner.buffers

    @property
    def way(self) -> str:
        """How tensors go through the program, in words."""
        return "one by one" if self.program.single else "in lists"

    def takes_one(self, name: str) -> bool:
        """Whether the input ``name`` is a tensor, and not a list of them."""
        return self.program.single

    def inputs(self, work: Pass, keeps_states: bool) -> list[Any]:
        """Return the inputs of the program, with copies of states if the old ones are kept until the step is made."""
        given = [read(work) for read in self.readers]
        if keeps_states:
            for i in self.states:
                given[i] = self._copies(given[i], work)
        return given

    def call(self, given: list[Any]) -> None:
        """Transform the tensors: call the program with its inputs."""
        self.program.run(*given, *self.numbers_by_tensor)

    def _copies(self, states: Any, work: Pass) -> Any:
        """Return copies of states, which are written into the originals when the step is done."""
        if isinstance(states, Tensor):
            copy = states.clone()
            work.commits.append(partial(torch._foreach_copy_, [states], [copy]))
            return copy
        copies = [state.clone() for state in states]
        work.commits.append(partial(torch._foreach_copy_, list(states), copies))
        return copies


class Pieces(Block):
    """A large tensor that goes through a program piece by piece, so that a piece stays in the cache."""

    @property
    def way(self) -> str:
        return "in pieces"

    def call(self, given: list[Any]) -> None:
        length = BLOCK_BYTES // given[0].element_size()
        flat = [
            value.view(-1) if _is_of_each(name) else value
            for name, value in zip(self.program.inputs, given, strict=True)
        ]
        for start in range(0, given[0].numel(), length):
            piece = (
                value[start : start + length] if _is_of_each(name) else value
                for name, value in zip(self.program.inputs, flat, strict=True)
            )
            self.program.run(*piece, *self.numbers_by_tensor)


class Stacked(Block):
    """Tensors of one form that go through a program as one tensor."""

    @property
    def way(self) -> str:
        return "stacked"

    def takes_one(self, name: str) -> bool:
        return not _is_of_each(name)

    def call(self, given: list[Any]) -> None:
        stacked, results = list(given), []
        for i, name in enumerate(self.program.inputs):
            if _is_of_each(name):
                stacked[i], views = self._stack(name, given[i])
                if name in self.program.outputs:
                    results.append((given[i], views))
        self.program.run(*stacked, *self.numbers_by_tensor)
        for tensors, views in results:
            torch._foreach_copy_(tensors, views)

    def _stack(self, name: str, tensors: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return ``tensors`` stacked in one, and a view of each in it. Blocks of one form share the memory for it."""
        if torch.compiler.is_compiling():  # which manages the memory of the graph itself
            stacked = torch.stack(tensors)
            return stacked, stacked.unbind()
        first = tensors[0]
        key = name, len(tensors), first.shape, first.dtype
        if key not in self.buffers:
            buffer = first.new_empty((len(tensors), *first.shape))
            self.buffers[key] = buffer, buffer.unbind()
        buffer, views = self.buffers[key]
        return torch.stack(tensors, out=buffer), views


def _is_of_each(name: str) -> bool:
    """Whether an input of a program is one for each tensor."""
    return not name.startswith(tuple(KINDS))


def _chunks(numbers: Sequence[int], size: Callable[[int], int], block: float) -> Iterator[list[int]]:
    """Yield lists of ``numbers`` that are of at least the size of a ``block`` together, but for the last."""
    chunk: list[int] = []
    total = 0
    for number in numbers:
        chunk.append(number)
        total += size(number)
        if total >= block:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _calls_for_each(trace: Trace) -> list[Call]:
    """Return the calls that are made for each tensor, and not once for all of them."""
    of_each = {number for name, number in trace.inputs.items() if _is_of_each(name)}
    calls = []
    for call in trace.calls:
        if not of_each.isdisjoint(call.references()):
            of_each.update(call.results)
            calls.append(call)
    return calls


def _cost(call: Call, trace: Trace) -> float:
    """Return about how many microseconds a call takes for a tensor in a list of small ones."""
    name = RENAMED.get(call.name, call.name)
    shape, dtype, _ = trace.forms[call.results[0]]
    elementwise = 0.6 + math.prod(shape) * dtype.itemsize / BYTES_A_MICROSECOND
    if name in FOREACH:
        return elementwise
    if name == "clamp":  # which takes two calls for a list
        return 2 * elementwise
    return 2.0 if name == "norm" and len(call.args) <= 2 else 1.0 if name in VIEWS else 4.0
