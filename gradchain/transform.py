"""What a transform is, a pure function ``(tensor, group) -> tensor``, and ``@transform``, which makes factories."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import annotated_types
import torch
from torch import Tensor

P = ParamSpec("P")

Group: TypeAlias = dict[str, Any]
"""A param group: hyperparameters by key and, as context, ``"param"`` and ``"grad"``, shaped like the tensor."""

CONTEXT = ("param", "grad")

# Half-precision sums overflow (float16) or lose digits (bfloat16): compute in float32, round once at the end.
_COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class Transform(Protocol):
    """Any callable of this shape is a transform: it returns a tensor like its input and never writes to it."""

    def __call__(self, tensor: Tensor, group: Group, /) -> Tensor: ...


class TransformFactory(Protocol[P]):
    """What ``@transform`` makes of a function: called with the hyperparameters, it returns the transform."""

    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> BoundTransform: ...

    def check(self, rule: Callable[..., None], /) -> Callable[..., None]:
        """Register ``rule(**arguments)``, which raises where arguments that are each in range do not fit together."""
        ...


@overload
def transform(function: Callable[Concatenate[Tensor, Group, P], Tensor], /) -> TransformFactory[P]: ...
@overload
def transform(
    *, elementwise: bool = False, whole: bool = False, real_only: bool = False
) -> Callable[[Callable[Concatenate[Tensor, Group, P], Tensor]], TransformFactory[P]]: ...
def transform(
    function: Callable[..., Tensor] | None = None,
    /,
    *,
    elementwise: bool = False,
    whole: bool = False,
    real_only: bool = False,
) -> Any:
    """Turn a pure function ``(tensor, group, ...) -> tensor`` into a factory of transforms.

    The function is written for one tensor, with the meaning that the mathematics has; ``broadcast`` maps it over
    sub-tensors. Parameters before ``*`` are hyperparameters: the value given to the factory is the default, and the
    key ``"<function>.<parameter>"`` of the group wins. Parameters after ``*`` are options, fixed when the factory is
    called. Both are checked against their annotations, ranges (``Annotated[float, Gt(0)]``) included.

    A half-precision tensor and its context reach the function as float32, and the result is rounded back. A tensor
    without elements never reaches it: the result is empty too.

    Args:
        elementwise: Each element of the result depends on that element alone, so that no reshaping is needed.
        whole: The formula itself says which dimensions it acts on. The ``param_ndim`` of a group is not for it; an
            explicit ``broadcast(t, param_ndim)`` is.
        real_only: Complex tensors are a ``TypeError``.

    Example:
        >>> from annotated_types import Gt
        >>> @transform
        ... def soft_sign(tensor: Tensor, group: Group, softness: Annotated[float, Gt(0)]) -> Tensor:
        ...     return tensor / (tensor.abs() + softness)
        >>> soft = soft_sign(1.0)
        >>> soft
        soft_sign(softness=1.0)
        >>> soft(torch.tensor([-1.0, 3.0]), {})
        tensor([-0.5000,  0.7500])
        >>> soft(torch.tensor([-1.0, 3.0]), {"soft_sign.softness": 3.0})
        tensor([-0.2500,  0.5000])
    """

    def decorate(function: Callable[..., Tensor]) -> TransformFactory[...]:
        return _Definition(function, elementwise, whole, real_only).factory

    return decorate if function is None else decorate(function)


class _Definition:
    """A decorated function, with everything that is known about it before it is called."""

    def __init__(self, function: Callable[..., Tensor], elementwise: bool, whole: bool, real_only: bool) -> None:
        parameters = list(inspect.signature(function).parameters.values())[2:]
        self.function = function
        self.elementwise = elementwise
        self.whole = whole
        self.real_only = real_only
        self.name = function.__name__
        self.signature = inspect.Signature(parameters, return_annotation=BoundTransform)
        self.hyperparameters = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.check: Callable[..., None] = lambda **arguments: None
        self.factory = self._make_factory()
        self._hints: dict[str, Any] | None = None  # not before the first call: annotations may name what comes later

    def _make_factory(self) -> TransformFactory[...]:
        @functools.wraps(self.function)
        def factory(*args: Any, **kwargs: Any) -> BoundTransform:
            try:
                call = self.signature.bind(*args, **kwargs)
            except TypeError as error:
                locate(error, self.name)
                raise
            call.apply_defaults()
            self.validate(call.arguments, self.name)
            return BoundTransform(self, call.arguments, self.name)

        def register_check(rule: Callable[..., None]) -> Callable[..., None]:
            self.check = rule
            return rule

        factory.__signature__ = self.signature  # type: ignore[attr-defined]
        factory.check = register_check  # type: ignore[attr-defined]
        factory.definition = self  # type: ignore[attr-defined]
        return cast("TransformFactory[...]", factory)

    def validate(self, arguments: Mapping[str, Any], prefix: str) -> None:
        """Raise where an argument has the wrong type, is out of range, or does not fit the others."""
        if self._hints is None:
            self._hints = get_type_hints(self.function, include_extras=True)
        for name, value in arguments.items():
            _validate(f"{prefix}.{name}", self._hints.get(name, Any), value)
        try:
            self.check(**arguments)
        except (TypeError, ValueError) as error:
            locate(error, prefix)
            raise


@dataclass(frozen=True, eq=False, repr=False)
class BoundTransform:
    """A transform made by a factory: a value that compares, hashes, pickles and prints as the call that made it."""

    definition: _Definition
    arguments: Mapping[str, Any]
    prefix: str
    hyperparameters: Mapping[str, Any] = field(init=False)
    """The default of every hyperparameter, by its key in a group."""

    def __post_init__(self) -> None:
        defaults = {f"{self.prefix}.{name}": self.arguments[name] for name in self.definition.hyperparameters}
        object.__setattr__(self, "hyperparameters", defaults)

    def __call__(self, tensor: Tensor, group: Group, /) -> Tensor:
        if self.definition.real_only and tensor.is_complex():
            raise TypeError(
                f"{self!r} acts on real tensors, got {tensor.dtype}; apply it to torch.view_as_real(tensor)"
            )
        call = functools.partial(self.definition.function, **self._read(group))
        dtype = _COMPUTE_DTYPE.get(tensor.dtype)
        if dtype is None:
            return call_checked(call, tensor, group, name=self)
        context = {key: group[key].to(dtype) for key in CONTEXT if key in group}
        return call_checked(call, tensor.to(dtype), {**group, **context}, name=self).to(tensor.dtype)

    def named(self, prefix: str) -> BoundTransform:
        """Keep the hyperparameters under ``"<prefix>.<parameter>"``, apart from those of another such transform.

        Example:
            >>> from gradchain import clamp
            >>> clamp(-1, 1).named("grad").hyperparameters
            {'grad.min': -1, 'grad.max': 1}
        """
        if not (isinstance(prefix, str) and prefix):
            raise TypeError(f"{self!r}.named(prefix) needs a non-empty string, got {prefix!r}")
        return replace(self, prefix=prefix)

    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""
        self.definition.validate({**self.arguments, **self._overrides(group)}, self.prefix)

    def _overrides(self, group: Group) -> dict[str, Any]:
        # Names and keys are in the same order. Identity suffices: in an optimizer, groups hold the defaults themselves.
        named = zip(self.definition.hyperparameters, self.hyperparameters.items(), strict=True)
        return {name: group[key] for name, (key, default) in named if group.get(key, default) is not default}

    def _read(self, group: Group) -> Mapping[str, Any]:
        overrides = self._overrides(group)
        if not overrides:
            return self.arguments
        arguments = {**self.arguments, **overrides}
        # Reading a tensor's value would synchronise the device and break graphs; factory and adapter have checked it.
        if not any(isinstance(value, Tensor) for value in arguments.values()):
            self.definition.validate(arguments, self.prefix)
        return arguments

    def __repr__(self) -> str:
        parameters = self.definition.signature.parameters
        given = [f"{n}={v!r}" for n, v in self.arguments.items() if not _same(v, parameters[n].default)]
        suffix = "" if self.prefix == self.definition.name else f".named({self.prefix!r})"
        return f"{self.definition.name}({', '.join(given)}){suffix}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoundTransform):
            return NotImplemented
        return (
            self.definition is other.definition
            and self.prefix == other.prefix
            and all(_same(value, other.arguments[name]) for name, value in self.arguments.items())
        )

    def __hash__(self) -> int:
        values = ((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in self.arguments.values())
        return hash((self.definition.name, self.prefix, *values))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.definition.factory, dict(self.arguments), self.prefix)


def _rebuild(factory: Any, arguments: dict[str, Any], prefix: str) -> BoundTransform:
    return BoundTransform(factory.definition, arguments, prefix)


def require_transform(value: object, place: str) -> Transform:
    """Return ``value`` if it can be a transform; ``place`` says where it was given."""
    if not callable(value):
        raise TypeError(f"{place} must be a callable (tensor, group) -> tensor, got {value!r}")
    if hasattr(value, "definition") and not isinstance(value, BoundTransform):
        name = getattr(value, "__name__", "it")
        raise TypeError(f"{place} is the factory {name}, not a transform; call it: {name}(...)")
    return cast("Transform", value)


def call_checked(transform: Transform, tensor: Tensor, group: Group, *, name: object = None) -> Tensor:
    """Return ``transform(tensor, group)``, or raise where the call breaks the contract of a transform."""
    if tensor.numel() == 0:
        return tensor.clone()
    name = show(transform if name is None else name)
    version = _version(tensor)
    try:
        result = transform(tensor, group)
    except KeyError as error:
        key = error.args[0] if error.args else None
        if key not in CONTEXT or key in group:
            raise
        raise ValueError(
            f'{name} needs group["{key}"], a tensor of the shape {_short(tensor.shape)} of its input; the group has '
            f'the keys {sorted(map(str, group))}. Pass {{"{key}": ...}}, or use it in a slot that sets "{key}".'
        ) from None
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must return a tensor like its input, got {type(result).__name__}")
    for attribute in ("shape", "dtype", "device"):
        expected, received = getattr(tensor, attribute), getattr(result, attribute)
        if received != expected:
            raise ValueError(
                f"{name} must keep the {attribute} of its input, {_short(expected)}, got {_short(received)}"
            )
    if _version(tensor) != version:
        raise ValueError(f"{name} wrote to its input; return a new tensor instead (mul for mul_, clamp for clamp_)")
    return result


def hyperparameters(transform: Transform) -> Mapping[str, Any]:
    """The default of every hyperparameter of ``transform``, by key; none for a plain callable."""
    return cast("Mapping[str, Any]", getattr(transform, "hyperparameters", {}))


def check_hyperparameters(transform: Transform, group: Group) -> None:
    """Raise where a hyperparameter of ``transform`` has, in ``group``, the wrong type or is out of range."""
    check = getattr(transform, "check", None)
    if check is not None:
        check(group)


def merge_hyperparameters(places: Iterable[tuple[str, Transform]]) -> dict[str, Any]:
    """The hyperparameters of all transforms; one key with two defaults is an error that names both places."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, member in places:
        for key, value in hyperparameters(member).items():
            if not _same(value, merged.setdefault(key, value)):
                raise ValueError(
                    f'the hyperparameter "{key}" has two defaults: {merged[key]!r} ({origin[key]}) and {value!r} '
                    f'({place}). Give one of them keys of its own, for example with .named("grad").'
                )
            origin.setdefault(key, place)
    return merged


def locate(error: Exception, place: str) -> None:
    """Say in the message of ``error`` where it happened; its type stays, so that it can be caught as what it is."""
    detail = error.args[0] if len(error.args) == 1 else error  # str(KeyError) would quote the message
    error.args = (f"{place}: {detail}",)


def show(transform: object) -> str:
    """How a transform prints: a plain function by its name, which stays the same from run to run."""
    return transform.__name__ if inspect.isfunction(transform) else repr(transform)


def _version(tensor: Tensor) -> int:
    # Neither graphs nor inference tensors count writes.
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _short(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return not (isinstance(a, Tensor) or isinstance(b, Tensor)) and bool(a == b)


_COMPARISONS: dict[type, tuple[str, str, Callable[[Any, Any], Any]]] = {
    annotated_types.Gt: ("gt", ">", operator.gt),
    annotated_types.Ge: ("ge", ">=", operator.ge),
    annotated_types.Lt: ("lt", "<", operator.lt),
    annotated_types.Le: ("le", "<=", operator.le),
}


def _validate(key: str, hint: Any, value: Any) -> None:
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
    names: dict[Any, str] = {float: "a number", int: "an integer", NoneType: "None", Tensor: "a tensor"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))
