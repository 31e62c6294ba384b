"""What a function reads besides its arguments: a trace of it holds only as long as these values stay the same."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from gradchain.contract import show
from gradchain.engine.trace import NotTraceable
from gradchain.stage import Stage

_MISSING = object()
_CONSTANTS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum, type, Tensor)
_WRITES = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}
_TALKS = ("print", "breakpoint", "input", "open")
_TRUSTED = ("torch", "gradchain", "math", "operator", "typing", "builtins", "annotated_types")


class Reading(NamedTuple):
    """A variable that a function reads, and the value that it had."""

    read: Callable[[], Any]
    value: Any

    def holds(self) -> bool:
        """Whether the variable still has this value."""
        return self.read() is self.value


def readings(function: Callable[..., Any]) -> list[Reading]:
    """The variables from outside that ``function``, and what it calls, reads.

    Raises:
        NotTraceable: One of them is an object that can change without notice, or the function writes to one.
    """
    found: list[Reading] = []
    open_, seen = [function], set()
    while open_:
        each = open_.pop()
        while isinstance(each, functools.partial):
            for value in (*each.args, *each.keywords.values()):
                _require_constant("an argument of a partial", value)
            each = each.func
        if id(each) in seen or _is_trusted(each):
            continue
        seen.add(id(each))
        if isinstance(each, Stage):
            if each.measures:
                raise NotTraceable(f"calls {show(each)}, which measures")
            open_ += each.functions()
            continue
        if not inspect.isfunction(each):
            raise NotTraceable(f"calls {_name(each)}, whose code is not known or can change without notice")
        if effect := _effect(each.__code__):
            raise NotTraceable(effect)
        for name, read in (*_variables(each), *_defaults(each)):
            value = read()
            if value is _MISSING:
                continue
            if callable(value) and not isinstance(value, type | Tensor):
                open_.append(value)
            else:
                _require_constant(name, value)
            found.append(Reading(read, value))
    return found


def _is_trusted(value: Any) -> bool:
    """Whether it is code that has no variables that users change."""
    if not (inspect.isroutine(value) or isinstance(value, type | OpOverload | OpOverloadPacket)):
        return False  # an object, such as a module of torch, or a transform around a function of the user
    if not isinstance(getattr(value, "__self__", None), ModuleType | type | None):
        return False  # a method of an object
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.partition(".")[0] in _TRUSTED


def _is_constant_class(value: type) -> bool:
    return issubclass(value, Enum) or _is_trusted(value)


def _name(value: Any) -> str:
    """How a callable prints, without its address."""
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else f"a {type(value).__name__}"


def _require_constant(name: str, value: Any) -> None:
    if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in _TRUSTED:
        return
    if isinstance(value, tuple | frozenset):
        for each in value:
            _require_constant(name, each)
    elif not isinstance(value, _CONSTANTS) or (isinstance(value, type) and not _is_constant_class(value)):
        raise NotTraceable(f"reads {name}, a {type(value).__name__}, which can change without notice")


@functools.lru_cache(maxsize=1024)
def _effect(code: CodeType, own: frozenset[str] = frozenset()) -> str | None:
    """What code does besides to return something, in words: a program of its operations would not do it."""
    own |= {*code.co_varnames, *code.co_cellvars}
    for instruction in dis.get_instructions(code):
        name, operation = instruction.argval, instruction.opname
        if operation in _WRITES and not (operation.endswith("_DEREF") and name in own):
            return f"writes to the variable {name} from outside"
        if operation == "LOAD_GLOBAL" and name in _TALKS:
            return f"calls {name}"
    inner = (_effect(constant, own) for constant in code.co_consts if isinstance(constant, CodeType))
    return next(filter(None, inner), None)


def _variables(function: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The free and the global variables of a function, by name, each with what reads it."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, functools.partial(_read_cell, cell)
    for name in sorted(_names(function.__code__) & function.__globals__.keys()):
        yield name, functools.partial(function.__globals__.get, name, _MISSING)


def _defaults(function: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The defaults of the parameters of a function, in the same way."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty:
            yield name, functools.partial(getattr, parameter, "default")


def _read_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not assigned yet
        return _MISSING


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
