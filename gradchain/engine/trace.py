"""Write down what a pure function does to a tensor: its torch operations, found by one call without any data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")

Form: TypeAlias = tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]
"""The shape, the dtype and the strides of a value."""

TENSOR = "tensor"
"""The name of the tensor that a function transforms, and of its result."""

CONSTANT = "constant:"
"""The beginning of the name of an input that is a tensor from outside the function, such as a mask."""


class Ref(NamedTuple):
    """An argument that is a value of the trace: an input, or the result of an earlier call."""

    number: int


ALSO_POINTWISE = frozenset({"zeros_like", "ones_like", "full_like", "scalar_tensor", "_to_copy"})
"""Operations that torch does not tag as pointwise, although no element depends on elements in other places."""


DEVICE = object()
"""Stands for the device of the tensors, since a trace has no device of its own."""


class Call(NamedTuple):
    """One torch operation."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]
    stage: str
    """The stage of the chain that the operation belongs to."""

    @property
    def name(self) -> str:
        """The name of the operation, without its overload."""
        return self.target._schema.name.partition("::")[2]

    @property
    def is_pointwise(self) -> bool:
        """Whether each element of the result depends on the elements in the same place alone."""
        return torch.Tag.pointwise in self.target.tags

    def references(self) -> list[int]:
        """Return the numbers of the values that the operation takes."""
        found: list[int] = []
        map_leaves((self.args, self.kwargs), lambda leaf: found.append(leaf.number) if isinstance(leaf, Ref) else None)
        return found


@dataclass(frozen=True, eq=False)
class Trace:
    """The operations of a function, for inputs of known shapes and dtypes. Values are numbered, inputs first."""

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    """The numbers of the result, and of the new states under the names of the old ones."""
    calls: tuple[Call, ...]
    forms: tuple[Form, ...]
    """The shape, the dtype and the strides of each value."""
    constants: Mapping[str, Tensor]
    """The tensors from outside, by the names of their inputs."""

    @property
    def is_pointwise(self) -> bool:
        """Whether each element of the results depends on the elements of the inputs in the same place alone."""
        shape = self.forms[self.inputs[TENSOR]][0]
        shapes = (self.forms[n][0] for n in (*self.inputs.values(), *self.outputs.values()))
        return all(call.is_pointwise or call.name in ALSO_POINTWISE for call in self.calls) and all(
            each in ((), shape) for each in shapes
        )

    def calls_alike(self, other: Trace) -> bool:
        """Whether ``other`` has the same calls, with the same numbers in them."""
        return str((self.calls, self.outputs)) == str((other.calls, other.outputs))


class NotTraceable(Exception):  # noqa: N818 # not an error: the function runs as it is
    """Raised with the reason why a function cannot be traced."""


class Recorder(TorchDispatchMode):
    """Writes down the operations that torch runs while it is active.

    Args:
        inputs: Tensors without data, by their names.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stage = ""
        self._values: list[Tensor] = []  # kept alive, so that no other tensor gets the id of one of these
        self._numbers: dict[int, int] = {}
        self._calls: list[Call] = []
        self._inputs = {name: self._number(value) for name, value in inputs.items()}
        self._outside: dict[int, tuple[str, Tensor]] = {}
        self._makes_input = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would make torch import its compiler, to keep it from compiling the next method

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._makes_input:
            return func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            raise NotTraceable(f"writes in place, with {func}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotTraceable("draws random numbers")
        args, kwargs = map_leaves((args, kwargs or {}), self._without_data)
        given = map_leaves((args, kwargs), self._refer)
        result = func(*args, **kwargs)
        if func.name() in ("aten::detach", "aten::lift_fresh", "aten::lift_fresh_copy"):
            self._values.append(result)
            self._numbers[id(result)] = self._numbers[id(args[0])]
        else:
            results = result if isinstance(result, tuple | list) else (result,)
            given_args, given_kwargs = given
            self._calls.append(Call(func, given_args, given_kwargs, tuple(map(self._number, results)), self.stage))
        return result

    def input(self, name: str, value: Tensor) -> Tensor:
        """Return the stand-in for ``value``, an input that is known only when the function asks for it."""
        if name not in self._inputs:
            self._makes_input = True
            self._inputs[name] = self._number(without_data(value))
            self._makes_input = False
        return self._values[self._inputs[name]]

    def trace(self, outputs: Mapping[str, Tensor]) -> Trace:
        """Return what was written down, without the calls that the outputs do not need."""
        numbers = {name: self._refer(self._without_data(value)).number for name, value in outputs.items()}
        forms = tuple((tuple(value.shape), value.dtype, value.stride()) for value in self._values)
        constants = dict(self._outside.values())
        trace = Trace(self._inputs, numbers, tuple(self._calls), forms, constants)
        return _keep_dimensions(_without_waste(trace))

    def _number(self, value: Tensor) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._values)
            self._values.append(value)
        return self._numbers[id(value)]

    def _without_data(self, leaf: Any) -> Any:
        """Return ``leaf``, or the stand-in for it if it is a tensor from outside."""
        if not isinstance(leaf, Tensor) or id(leaf) in self._numbers:
            return leaf
        if leaf.device == META:
            raise NotTraceable("makes a tensor of numbers on the device of its input")
        name, _ = self._outside.setdefault(id(leaf), (f"{CONSTANT}{len(self._outside)}", leaf))
        return self.input(name, leaf)

    def _refer(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return Ref(self._numbers[id(leaf)])
        if isinstance(leaf, torch.device) and leaf != META:
            raise NotTraceable(f"makes a tensor on {leaf}, without device=tensor.device")
        return DEVICE if leaf == META else leaf


def without_data(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and dtype, without data."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return ``value``, with ``function(leaf)`` for each leaf of its tuples, lists and dicts."""
    if isinstance(value, tuple | list) and not isinstance(value, Ref):
        return tuple(map_leaves(each, function) for each in value)
    if isinstance(value, dict):
        return {key: map_leaves(each, function) for key, each in value.items()}
    return function(value)


def _without_waste(trace: Trace) -> Trace:
    """Return the same trace without calls that do nothing, repeat an earlier call, or have unused results."""
    same: dict[int, int] = {}
    known: dict[Any, Call] = {}
    calls: list[Call] = []
    used = {number for call in trace.calls for number in call.references()}
    # Under torch.func.vmap, a number is a tensor that is made of it.
    plain = {Ref(call.results[0]): call.args[0] for call in trace.calls if call.name == "_to_copy"}
    for call in trace.calls:
        call = _with_same(call, same)
        key = call.target, str((call.args, call.kwargs))
        source = call.args[0].number if call.args and isinstance(call.args[0], Ref) else None
        keeps_form = source is not None and trace.forms[source] == trace.forms[call.results[0]]
        is_by_one = call.name in ("mul", "div") and len(call.args) == 2 and plain.get(call.args[1], call.args[1]) == 1
        is_copy = call.name == "clone" and (keeps_form or call.results[0] not in used)
        if source is not None and (
            is_copy or (keeps_form and (is_by_one or call.name in ("view", "_to_copy", "expand")))
        ):
            same[call.results[0]] = source
        elif key in known:
            same.update(zip(call.results, known[key].results, strict=True))
        else:
            known[key] = call
            calls.append(call)
    outputs = {name: same.get(number, number) for name, number in trace.outputs.items()}
    makers = {number: call for call in calls for number in call.results}
    for name, number in outputs.items():
        maker = makers.get(number)
        if maker is not None and maker.name == "_to_copy" and maker.kwargs.keys() == {"dtype"}:
            outputs[name] = maker.args[0].number  # writing the result into the tensor converts it anyway
    needed = set(outputs.values())
    kept: list[Call] = []
    for call in reversed(calls):
        if needed.intersection(call.results):
            needed.update(call.references())
            kept.append(call)
    inputs = {name: number for name, number in trace.inputs.items() if number in needed or name in trace.outputs}
    return replace(trace, inputs=inputs, outputs=outputs, calls=tuple(reversed(kept)))


def _with_same(call: Call, same: Mapping[int, int]) -> Call:
    """Return the call with other values in place of those that ``same`` lists as equal to them."""

    def refer(leaf: Any) -> Any:
        return Ref(same.get(leaf.number, leaf.number)) if isinstance(leaf, Ref) else leaf

    return call._replace(args=map_leaves(call.args, refer), kwargs=map_leaves(call.kwargs, refer))


_KEEPDIM = {"linalg_vector_norm": 3, "sum": 2, "mean": 2, "amax": 2, "amin": 2, "norm": 3}
"""The position of the argument ``keepdim`` of each reduction; the argument before it has the dimensions."""


def _keep_dimensions(trace: Trace) -> Trace:
    """Let reductions keep the dimensions that a later view puts back, so that the view is not needed."""
    makers = {number: call for call in trace.calls for number in call.results}
    takers: dict[int, list[Call]] = {}
    for call in trace.calls:
        for number in call.references():
            takers.setdefault(number, []).append(call)
    calls, forms, same = list(trace.calls), list(trace.forms), {}
    for view in trace.calls:
        if view.name not in ("view", "unsqueeze") or view not in calls:
            continue
        source, shape = view.args[0].number, forms[view.results[0]][0]
        found = _reduced(source, makers, forms)
        if found is None:
            continue
        calls_of = [makers[number] for number in found]
        ends = [call for n in found for call in takers.get(n, []) if call not in calls_of]
        fits = all(_reduction_shape(call, forms) in (None, shape) for call in calls_of)
        if (
            not fits
            or found & set(trace.outputs.values())
            or any(end.name not in ("view", "unsqueeze") or forms[end.results[0]][0] != shape for end in ends)
        ):
            continue
        for number in found:
            forms[number] = shape, forms[number][1], torch.empty(shape, device=META).stride()
            call = makers[number]
            if call.name in _KEEPDIM and _reduction_shape(call, trace.forms) is not None:
                position = _KEEPDIM[call.name]
                args = (*call.args[:position], True, *call.args[position + 1 :])
                calls[calls.index(call)] = makers[number] = call._replace(args=args)
        for end in ends:
            if end in calls:
                calls.remove(end)
                same[end.results[0]] = end.args[0].number
    if not same:
        return trace
    calls = [_with_same(call, same) for call in calls]
    outputs = {name: same.get(number, number) for name, number in trace.outputs.items()}
    return replace(trace, calls=tuple(calls), outputs=outputs, forms=tuple(forms))


def _reduction_shape(call: Call, forms: Any) -> tuple[int, ...] | None:
    """Return the shape that a reduction has if it keeps its dimensions; None if the call is no reduction."""
    position = _KEEPDIM.get(call.name)
    if position is None or len(call.args) < position or (len(call.args) > position and call.args[position]):
        return None
    shape, dims = list(forms[call.args[0].number][0]), call.args[position - 1]
    if not isinstance(dims, tuple):
        return None
    for dim in dims:
        shape[dim] = 1
    return tuple(shape)


def _reduced(number: int, makers: Mapping[int, Call], forms: Any) -> set[int] | None:
    """Return the values from which pointwise calls make ``number``, back to reductions of the same shape.

    The result has ``number`` itself and the results of the reductions. It is None if other calls are in between.
    """
    shape, found, open_ = forms[number][0], set(), [number]
    while open_:
        each = open_.pop()
        if each in found or forms[each][0] == ():
            continue
        call = makers.get(each)
        if call is None or forms[each][0] != shape:
            return None
        found.add(each)
        if _reduction_shape(call, forms) is None:
            if not call.is_pointwise:
                return None
            open_ += call.references()
    return found
