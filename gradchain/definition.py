"""What is known about a decorated function before it is called, and the factory that ``@transform`` makes of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, Protocol, TypeAlias, cast, get_type_hints

from torch import Tensor

from gradchain._ranges import as_number, validate
from gradchain.bound import BoundTransform
from gradchain.contract import FROM_GROUP, State, locate, show

ActsOn: TypeAlias = Literal["unit", "tensor", "element"]
"""What a function is written for: see ``transform``."""


P = ParamSpec("P")


class TransformFactory(Protocol[P]):
    """What ``@transform`` makes of a function: called with the hyperparameters, it returns the transform."""

    __name__: str
    definition: Definition

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> BoundTransform: ...

    def check(self, function: Callable[..., None], /) -> Callable[..., None]:
        """Register ``function(**arguments)``, which raises where arguments in their ranges do not fit together."""
        ...

    def on_skip(self, function: Callable[..., None], /) -> Callable[..., None]:
        """Register ``function(state, **arguments)``, called when the transform has called a step off; it may raise."""
        ...


class Definition:
    """A decorated function, with everything that is known about it before it is called."""

    def __init__(
        self,
        function: Callable[..., Any],
        init: Callable[..., State] | None,
        start: Callable[..., Tensor] | None,
        acts_on: ActsOn,
        measure: Callable[..., Any] | None,
        measures_shards: bool,
        average: str | None,
        skip: str | None,
    ) -> None:
        given = 2 if init is None or measure is not None else 3
        try:
            signature = inspect.signature(function)
        except ValueError:  # as those of torch
            raise TypeError(
                f"@transform needs a Python function, got {show(function)}, which does not tell its signature; write "
                f"def {show(function)}(tensor, group): ..."
            ) from None
        parameters = list(signature.parameters.values())
        by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if (
            len(parameters) < given
            or not parameters[1].name.startswith(("group", "_"))
            or any(p.kind not in by_keyword for p in parameters[given:])
        ):
            first = ("tensor, group", "tensor, group, state")[given - 2]
            raise TypeError(
                f"{show(function)} must be a function of ({first}), hyperparameters that can be given by keyword, "
                f"and options after *; got {signature}"
            )
        parameters = parameters[given:]
        names = [p.name for p in parameters]
        _require_arguments(init, "init", ["tensor", "group"], names, function)
        _require_arguments(start, "start", ["tensor", "group"], names, function)
        _require_arguments(measure, "measure", ["tensors", "state"][: 2 if init else 1], names, function)
        self.function = function
        self.init = init
        self.start = start
        self.acts_on: ActsOn = acts_on
        self.measure = measure
        self.measures_shards = measures_shards
        self.average = average
        self.skip = skip
        self.measures_group = measure is not None and "group" in inspect.signature(measure).parameters
        self.counts = False
        self.name = function.__name__
        self.signature = inspect.Signature(parameters, return_annotation=BoundTransform)
        self.hyperparameters = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.check: Callable[..., None] = lambda **arguments: None
        self.after_skip: Callable[..., None] = lambda state, **arguments: None
        self.factory = self._make_factory()
        self._hints: dict[str, Any] | None = None

    def _make_factory(self) -> TransformFactory[...]:
        @functools.wraps(self.function)
        def factory(*args: Any, **kwargs: Any) -> BoundTransform:
            try:
                arguments = self._bind(args, kwargs)
            except TypeError as error:
                if args and isinstance(args[0], Tensor):
                    locate(
                        error, f"{self.name} makes a transform, {self.name}(...), which is then called with a tensor"
                    )
                raise
            return BoundTransform(self, arguments, self.name)

        def register(name: str, function: Callable[..., None]) -> Callable[..., None]:
            setattr(self, name, function)
            return function

        factory.__signature__ = self.signature  # type: ignore[attr-defined]
        factory.check = functools.partial(register, "check")  # type: ignore[attr-defined]
        factory.on_skip = functools.partial(register, "after_skip")  # type: ignore[attr-defined]
        factory.definition = self  # type: ignore[attr-defined]
        return cast("TransformFactory[...]", factory)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the factory, defaults included."""
        try:
            call = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            locate(error, self.name)
            raise
        call.apply_defaults()
        arguments = {name: as_number(value) for name, value in call.arguments.items()}
        self.validate(arguments, self.name, {})
        return arguments

    def read_annotations(self) -> None:
        """Do what has to wait for the first call, since annotations may name what is defined later."""
        if self._hints is None:
            self._hints = get_type_hints(self.function, include_extras=True)

    def validate(
        self, arguments: Mapping[str, Any], prefix: str, keys: Mapping[str, str], *, read_tensors: bool = True
    ) -> None:
        """Raise where an argument has the wrong type, is out of range, or does not fit the others.

        Errors call a parameter by its key, ``"<prefix>.<parameter>"`` where there is none in ``keys``.
        """
        self.read_annotations()
        assert self._hints is not None
        unread = {
            name
            for name, value in arguments.items()
            if (value is FROM_GROUP and name in self.hyperparameters)
            or (isinstance(value, Tensor) and not read_tensors)
        }
        for name in arguments.keys() - unread:
            validate(keys.get(name, f"{prefix}.{name}"), self._hints.get(name, Any), arguments[name])
        try:
            if not unread:
                self.check(**arguments)
        except (TypeError, ValueError) as error:
            locate(error, prefix)
            raise


def _require_arguments(
    helper: Callable[..., Any] | None, role: str, given: list[str], names: list[str], function: Callable[..., Any]
) -> None:
    """Raise where ``helper`` cannot be called with the arguments of the function that it belongs to."""
    if helper is None:
        return
    try:
        signature = inspect.signature(helper)
    except ValueError:  # as those of torch
        return
    group = ["group"] if role == "measure" and "group" in signature.parameters else []
    try:
        signature.bind(*given, **dict.fromkeys(names + group))
    except TypeError:
        raise TypeError(
            f"{role}={show(helper)} must be a function of ({', '.join(given + names)}), since {role} also "
            f"gets the hyperparameters and options of {show(function)}; got {signature}. **arguments can stand for "
            "those that it does not need"
        ) from None


def counted(factory: TransformFactory[P]) -> TransformFactory[P]:
    """Declare that the function calls ``note_acting``."""
    factory.definition.counts = True
    return factory
