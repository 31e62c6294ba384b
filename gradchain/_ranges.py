"""Checks of a value against its annotation, such as ``Annotated[float, Gt(0)]``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from torch import Tensor

_COMPARISONS: dict[type, tuple[str, str, Callable[[Any, Any], Any]]] = {
    annotated_types.Gt: ("gt", ">", operator.gt),
    annotated_types.Ge: ("ge", ">=", operator.ge),
    annotated_types.Lt: ("lt", "<", operator.lt),
    annotated_types.Le: ("le", "<=", operator.le),
}


def as_number(value: Any) -> Any:
    """A number of another library as Python's own, as ``torch.load(weights_only=True)`` needs it; else as is."""
    if type(value) in (int, float, bool) or isinstance(value, Tensor):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def validate(key: str, hint: Any, value: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` where ``value`` is not what the annotation ``hint`` allows."""
    alternatives = _alternatives(hint)
    fitting = [metadata for kind, metadata in alternatives if _is_a(value, kind)]
    if not fitting:
        kinds = " or ".join(_kind_name(kind) for kind, _ in alternatives)
        raise TypeError(f"{key} must be {kinds}, got {value!r}")
    for constraint in fitting[0]:
        if type(constraint) in _COMPARISONS:
            attribute, symbol, compare = _COMPARISONS[type(constraint)]
            bound = getattr(constraint, attribute)
            holds = compare(value, bound)
            if not (bool(holds.all()) if isinstance(holds, Tensor) else holds):
                raise ValueError(f"{key} must be {symbol} {bound}, got {value!r}")


def _alternatives(hint: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The kinds of value that ``hint`` allows, each with its constraints."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *metadata = get_args(hint)
        constraints = tuple(
            constraint
            for item in metadata
            for constraint in (item if isinstance(item, annotated_types.GroupedMetadata) else (item,))
        )
        return [(kind, inner + constraints) for kind, inner in _alternatives(base)]
    if origin in (Union, UnionType):
        return [alternative for member in get_args(hint) for alternative in _alternatives(member)]
    return [(hint, ())]


def _is_a(value: Any, kind: Any) -> bool:
    if kind is Any or kind is inspect.Parameter.empty:
        return True
    if kind in (float, int):
        number = Real if kind is float else Integral
        is_scalar = isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()
        return is_scalar or (isinstance(value, number) and not isinstance(value, bool))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    runtime_type = get_origin(kind) or kind
    return not isinstance(runtime_type, type) or isinstance(value, runtime_type)


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Sequence:
        return "a sequence"
    names: dict[Any, str] = {float: "a number", int: "an integer", NoneType: "None", Tensor: "a tensor"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))
