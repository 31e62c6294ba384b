"""What a transform is, any callable ``(tensor, group) -> tensor``, and the checks that it keeps to its contract."""

from __future__ import annotations

import enum
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Generator, Tensor
from torch.nn import Parameter

Group: TypeAlias = dict[str, Any]
"""A param group: hyperparameters by key and, as context, ``"param"`` and ``"grad"``, shaped like the tensor."""


State: TypeAlias = dict[str, Any]
"""What a stateful transform remembers from step to step: a dict of tensors.

In the state of a chain, the keys begin with the names of the transforms: ``"ema.average"``.
"""


CONTEXT = {
    "param": "pre and update (in post, the tensor is the parameter)",
    "grad": "update, and in post where there is a gradient",
}
"""Keys of the tensors that go with a tensor, and where an optimizer sets them."""


GIVEN = frozenset({*CONTEXT, "params", "param_names", "name", "index", "shape", "slot"})
GIVEN |= {"param_ndim", "grad_scale", "grad_bias"}
"""Keys to which adapters give a meaning, so that no hyperparameter can have them."""


class FromGroup(enum.Enum):
    """The type of ``FROM_GROUP``."""

    FROM_GROUP = enum.auto()

    def __repr__(self) -> str:
        return self.name


FROM_GROUP: Any = FromGroup.FROM_GROUP
"""In place of a hyperparameter: there is no default, and every group has to give the value."""


ACTED = "gradchain.acted"
"""The key by which a group asks for, and a state then tells, whether a transform has acted on a unit."""


PLACE = "gradchain.place"
"""The key of the words that say which tensor it is, for errors, in the groups of tensors that run together."""


_PRINTED = 1000
"""How many elements of a tensor torch prints without ``...``."""


# Half-precision sums overflow (float16) or lose digits (bfloat16): compute in float32, round once at the end.
_COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class Transform(Protocol):
    """Any callable of this shape is a transform: it returns a tensor like its input and never writes to it."""

    def __call__(self, tensor: Tensor, group: Group, /) -> Tensor: ...


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which functions see tensors of ``dtype``."""
    return _COMPUTE_DTYPE.get(dtype, dtype)


def widen(tensor: Tensor, group: Group) -> tuple[Tensor, Group]:
    """A half-precision tensor and its context as float32; others as they are."""
    dtype = compute_dtype(tensor.dtype)
    if dtype == tensor.dtype:
        return tensor, group
    return tensor.to(dtype), with_keys(group, {key: group[key].to(dtype) for key in CONTEXT if key in group})


def with_keys(group: Group, more: Group) -> Group:
    """``group | more``, which torch 2.6 cannot compile for dicts; a group that is traced has a union of its own."""
    return {**group, **more} if type(group) is dict else group | more


def require_signature(function: Callable[..., Any], place: str) -> None:
    """Raise where a function cannot be called with a tensor and a group."""
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        signature = inspect.signature(called)
    except ValueError:  # torch's own functions tell none; a call of it says what is wrong
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(
            f"{place} must be a callable (tensor, group) -> tensor, got {show(function)}{signature}; {remedy(function)}"
        ) from None


def remedy(function: object) -> str:
    """What to write in place of a function of the tensor alone."""
    return f"if it is to act on the tensor alone, write lambda tensor, group: {show(function)}(tensor)"


def locate(error: Exception, place: str) -> None:
    """Say in the message of ``error`` where it happened; its type stays, so that it can be caught as what it is."""
    detail = error.args[0] if len(error.args) == 1 else error  # str(KeyError) would quote the message
    args = error.args
    error.args = (f"{place}: {detail}",)
    if place not in str(error):  # the class makes its message of something else
        error.args = args
        if sys.version_info >= (3, 11):
            error.add_note(place)


def show(transform: object) -> str:
    """How a transform prints: what has a name by its name, so that it stays the same from run to run."""
    if isinstance(transform, functools.partial):
        given = [*map(repr, transform.args), *(f"{key}={value!r}" for key, value in transform.keywords.items())]
        return f"partial({', '.join([show(transform.func), *given])})"
    name = getattr(transform, "__name__", None)
    if isinstance(name, str):
        return name
    return type(transform).__name__ if type(transform).__repr__ is object.__repr__ else repr(transform)


def call_checked(owner: object, call: Callable[[], Tensor], tensor: Tensor, group: Group) -> Tensor:
    """Return ``call()``, what ``owner`` makes of ``tensor``, or raise where that breaks the contract of a transform."""
    if tensor.numel() == 0:
        return tensor.clone()
    inputs = look_at(tensor, group)
    try:
        result = call()
    except (NotImplementedError, RuntimeError) as error:
        if not tensor.is_complex():
            raise
        raise TypeError(
            f"{show(owner)} acts on real tensors, got {tensor.dtype}; apply it to torch.view_as_real(tensor)"
        ) from error
    except KeyError as error:
        key = error.args[0] if error.args else None
        if not isinstance(key, str) or key in group:
            raise
        if key not in CONTEXT:
            error.args = (
                f"{show(owner)}: {key!r}; the group has no such key. defaults={{{key!r}: ...}} would set it, and, for "
                f"the next step alone, optimizer.signal({key}=...)",
            )
            raise
        raise ValueError(
            f'{show(owner)} needs group["{key}"], a tensor of the shape {tuple(tensor.shape)} of its input. '
            f'An optimizer sets it in {CONTEXT[key]}; in a call by hand, pass {{"{key}": ...}}. The group has the keys '
            f"{sorted(map(str, group))}"
        ) from None
    if not isinstance(result, Tensor):
        raise TypeError(f"{show(owner)} must return a tensor like its input, got {type(result).__name__}")
    for attribute in ("shape", "dtype", "device"):
        expected, received = getattr(tensor, attribute), getattr(result, attribute)
        if received != expected:
            received, expected = (tuple(v) if isinstance(v, torch.Size) else v for v in (received, expected))
            raise ValueError(f"{show(owner)} must keep the {attribute} of its input, {expected}, got {received}")
    require_unwritten(owner, inputs)
    return result


def look_at(tensor: Tensor, group: Group) -> list[tuple[str, Tensor, int]]:
    """What must not be written to, each with how often it has been."""
    inputs = {"its input": tensor, **{f'group["{key}"]': group[key] for key in CONTEXT if key in group}}
    return [(name, value, _version(value)) for name, value in inputs.items()]


def require_unwritten(owner: object, inputs: Iterable[tuple[str, Tensor, int]]) -> None:
    """Raise where ``owner`` has written to one of ``inputs`` since ``look_at``."""
    for name, value, version in inputs:
        if _version(value) != version:
            raise ValueError(
                f"{show(owner)} wrote to {name}; return a new tensor instead (mul for mul_, clamp for clamp_)"
            )


_NOTES: list[list[Tensor]] = []
"""What transforms that are asked for it have noted, from the outermost call to the innermost."""


def note_acting(flag: Tensor) -> None:
    """Say, from within a transform, whether it acts on the unit that it was called with."""
    if _NOTES:
        _NOTES[-1].append(flag.detach())


@contextmanager
def notes() -> Iterator[list[Tensor]]:
    """Within the ``with`` block, what ``note_acting`` notes."""
    _NOTES.append([])
    try:
        yield _NOTES[-1]
    finally:
        _NOTES.pop()


def is_state(value: object) -> bool:
    """Whether it is a dict of tensors."""
    return isinstance(value, dict) and all(isinstance(each, Tensor) for each in value.values())


def _version(tensor: Tensor) -> int:
    # Neither graphs nor inference tensors count writes.
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def is_same(a: object, b: object) -> bool:
    """Whether two values of a hyperparameter are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, Generator) and isinstance(b, Generator):
        return a.device == b.device and torch.equal(a.get_state(), b.get_state())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return not (isinstance(a, Tensor) or isinstance(b, Tensor)) and bool(a == b)


def show_value(value: object) -> str:
    """How the value of a hyperparameter or option prints: as what makes it, with the names of torch.

    A tensor of more elements than torch prints itself is abbreviated, as torch does it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "torch.nan" if math.isnan(value) else "torch.inf" if value > 0 else "-torch.inf"
    if isinstance(value, list):
        return f"[{', '.join(map(show_value, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(show_value, value))}{',' * (len(value) == 1)})"
    if isinstance(value, Generator):
        device = "" if value.device.type == "cpu" else repr(str(value.device))
        return f"torch.Generator({device}).manual_seed({value.initial_seed()})"
    if isinstance(value, Tensor) and type(value) in (Tensor, Parameter) and value.numel() <= _PRINTED:
        try:
            numbers, options = as_numbers(value)
        except RuntimeError:  # it has no numbers, as in vmap
            return repr(value)
        return f"torch.tensor({show_value(numbers)}{''.join(f', {key}={option!r}' for key, option in options.items())})"
    return repr(value)


def as_numbers(tensor: Tensor) -> tuple[Any, dict[str, Any]]:
    """The numbers and the options of the call of ``torch.tensor`` that gives ``tensor``, in as few digits as do it."""
    value = tensor.detach().cpu()
    numbers = value.tolist()
    by_itself = torch.tensor(numbers, device="cpu").dtype
    options: dict[str, Any] = {} if by_itself == tensor.dtype else {"dtype": tensor.dtype}
    if tensor.device.type != "cpu":
        options["device"] = str(tensor.device)
    if value.is_floating_point():
        for digits in range(4, 10):
            short = _round(numbers, digits)
            if torch.equal(torch.tensor(short, dtype=value.dtype, device="cpu"), value):
                return short, options
    return numbers, options


def _round(numbers: Any, digits: int) -> Any:
    return [_round(each, digits) for each in numbers] if isinstance(numbers, list) else float(f"{numbers:.{digits}g}")
