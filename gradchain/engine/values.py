"""What the values of a program are called in its code, and which memory can be overwritten."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from enum import IntEnum

from gradchain._keys import free_name
from gradchain.engine.trace import CONSTANT, Call, Ref, Trace


class Kind(IntEnum):
    """What a name in the generated code stands for."""

    NUMBER = 0
    """A Python number."""
    SHARED = 1
    """A tensor that is the same for all tensors of the program."""
    STACK = 2
    """A number for each tensor of the program, in one tensor."""
    EACH = 3
    """A list with a tensor for each tensor of the program; just that tensor in a program for a single one."""


KINDS = {"number:": Kind.NUMBER, "value:": Kind.SHARED, "view:": Kind.SHARED, CONSTANT: Kind.SHARED}
"""The kinds of the inputs that all tensors share, by the beginning of their names."""


class Values:
    """The values of a program while it is written.

    Args:
        trace: What the program does.
        reserved: Names that mean something else in the code.
        single: Whether the program takes one tensor, and not lists.
    """

    def __init__(self, trace: Trace, reserved: Collection[str], *, single: bool) -> None:
        inputs = trace.inputs
        self.trace = trace
        self.single = single
        self.reserved = reserved
        self.kinds = {
            number: next((kind for start, kind in KINDS.items() if name.startswith(start)), Kind.EACH)
            for name, number in inputs.items()
        }
        self.names: dict[int, str] = {}
        for input_name, number in inputs.items():
            self.names[number] = self._new_name(re.sub(r"\W", "_", input_name.rpartition(":")[2]))
        self.memory = {number: number for number in inputs.values()}
        """For each value, the value in whose memory it is."""
        self.last_use = {n: index for index, call in enumerate(trace.calls) for n in call.references()}
        self.homes = {inputs[name]: number for name, number in trace.outputs.items()}
        """The inputs that are to be overwritten, each with the value that it gets."""
        self.unwritten = dict(self.homes)

    def _new_name(self, base: str) -> str:
        return free_name(base if base.isidentifier() else f"x_{base}", {*self.names.values(), *self.reserved})

    def _shape(self, number: int) -> tuple[int, ...]:
        return self.trace.forms[number][0]

    def _is_dead(self, number: int, index: int) -> bool:
        """Whether the memory of a value can be overwritten after the call at ``index`` has read it."""
        home = self.memory[number]
        if home in self.trace.inputs.values() and home not in self.homes:
            return False
        in_use = self.unwritten.values()
        waiting = self.unwritten.get(home)
        if waiting in self.names and self.memory[waiting] != home:
            return False  # the new value of the home is known, and is written here next
        same = [each for each, memory in self.memory.items() if memory == home]
        return all(self.last_use.get(each, -1) <= index and each not in in_use for each in same)

    def _target(self, index: int, call: Call, arguments: Sequence[tuple[str, Kind]]) -> int | None:
        """Return the position of an argument that the result can overwrite, or None."""
        form = self.trace.forms[call.results[0]]
        for position in range(len(arguments)) if call.is_pointwise else ():
            leaf = call.args[position]
            if (
                isinstance(leaf, Ref)
                and self.kinds[leaf.number] is Kind.EACH
                and self.trace.forms[leaf.number] == form
                and self._is_dead(leaf.number, index)
                and all(self.memory[n] != self.memory[leaf.number] for n in call.references() if n != leaf.number)
            ):
                return position
        return None

    def _spare(self, index: int, call: Call) -> int | None:
        """Return an input whose memory is free for the result, or None."""
        for home in self.homes:
            if (
                home in self.unwritten
                and self.kinds[home] is Kind.EACH
                and self.trace.forms[home] == self.trace.forms[call.results[0]]
                and self._is_dead(home, index)
                and call.is_pointwise
                and all(self.memory[n] != home or (self.single and n == home) for n in call.references())
            ):
                return home
        return None

    def _spare_for_zeros(self, index: int, call: Call) -> int | None:
        homes = [n for n, value in self.unwritten.items() if value == call.results[0]]
        return next((n for n in homes if self._is_dead(n, index)), None)

    def _take(self, result: int, value: int) -> None:
        """Let ``result`` have the name and the memory of ``value``."""
        self.kinds[result], self.names[result], self.memory[result] = Kind.EACH, self.names[value], self.memory[value]
