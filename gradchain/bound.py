"""Transforms as values: a function that was decorated, bound to its hyperparameters and options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    cast,
    get_type_hints,
)

import torch
from torch import Generator, Tensor

from gradchain._ranges import as_number, validate
from gradchain.contract import (
    ACTED,
    CONTEXT,
    FROM_GROUP,
    GIVEN,
    Group,
    State,
    call_checked,
    is_same,
    is_state,
    locate,
    notes,
    show,
    show_value,
    widen,
)
from gradchain.stage import Each

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


@dataclass(frozen=True, eq=False, repr=False)
class BoundTransform(Each):
    """A transform made by a factory: a value that compares, hashes, pickles and prints as the call that made it."""

    definition: Definition
    arguments: Mapping[str, Any]
    prefix: str
    is_named: bool = False
    """Whether the prefix was given to it, and is not that of all transforms of its kind."""
    own_keys: Mapping[str, str] = field(default_factory=dict)
    """The keys of hyperparameters that have no prefix, by the name of the parameter."""
    is_numbered: bool = False
    """Whether the prefix was given to it for its number among its kind."""
    hyperparameters: Mapping[str, Any] = field(init=False)
    needed: tuple[str, ...] = field(init=False)
    """The names of the hyperparameters without a default."""

    def __post_init__(self) -> None:
        defaults = {self.key(name): self.arguments[name] for name in self.definition.hyperparameters}
        needed = tuple(name for name in self.definition.hyperparameters if self.arguments[name] is FROM_GROUP)
        object.__setattr__(self, "hyperparameters", defaults)
        object.__setattr__(self, "needed", needed)
        self.definition.read_annotations()

    def key(self, name: str) -> str:
        """The key of a parameter in a group."""
        return self.own_keys.get(name, f"{self.prefix}.{name}")

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        """Whether it remembers something from step to step."""
        return self.definition.init is not None

    @property
    def measures(self) -> bool:  # type: ignore[override]
        """Whether it measures all tensors."""
        return self.definition.measure is not None

    @property
    def measures_shards(self) -> bool:  # type: ignore[override]
        """Whether it can measure distributed tensors."""
        return self.definition.measures_shards

    @property
    def shares_state(self) -> bool:  # type: ignore[override]
        """Whether its state is one for all tensors of an optimizer."""
        return self.stateful and self.measures

    @property
    def skip_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        """The key of its state that says whether to call the step off."""
        return () if self.definition.skip is None else (self.definition.skip,)

    @property
    def counts(self) -> bool:  # type: ignore[override]
        """Whether it was declared to be ``counted``."""
        return self.definition.counts

    @property
    def reports(self) -> tuple[str, ...]:  # type: ignore[override]
        """How often a transform skips."""
        return () if self.definition.skip is None else ("in_a_row", "total")

    def report(self, states: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, float]:
        """The counters, which are the same for all parameters."""
        return dict(states[0])

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """What its state has under the key that was declared for it."""
        key = self.definition.average
        return [state[key]] if key in state else []

    @property
    def keeps_average(self) -> bool:  # type: ignore[override]
        """Whether its state holds an average."""
        return self.definition.average is not None

    @property
    def acts_on(self) -> ActsOn:
        """What the function is written for."""
        return self.definition.acts_on

    def shares(self, key: str) -> bool:
        """Whether its state depends on the view over all tensors."""
        return self.shares_state

    def functions(self) -> Iterable[Callable[..., Any]]:
        """The function that was decorated."""
        return [self.definition.function]

    def after_skip(self, state: State) -> None:
        """Call the function that was registered with ``on_skip``."""
        if state:  # or the parameter is not selected
            self.definition.after_skip(state, **self.arguments)

    @property
    def starts_early(self) -> bool:  # type: ignore[override]
        """Whether its state depends on where a parameter starts."""
        return self.definition.start is not None

    @property
    def state_name(self) -> str:
        """The name of the factory, whatever its hyperparameters are called."""
        return self.definition.name

    def named(self, prefix: str | None = None, /, **keys: str) -> BoundTransform:
        """Keep the hyperparameters under ``"<prefix>.<parameter>"``, or under keys of your own.

        Transforms of the same kind have keys of their own without it, by their number: ``"clamp_2.min"``. With it the
        keys stay the same when another transform joins the chain, and transforms of the same name share them.

        Args:
            prefix: What stands before the dot.
            **keys: The whole key of a hyperparameter, by the name of the parameter.

        Raises:
            TypeError: Neither is given, a name is no string or empty, or the transform has no such hyperparameter.
            ValueError: A key is one that an optimizer sets for other purposes, or two hyperparameters have the same.

        Example:
            >>> from gradchain import clamp, project_l2_ball
            >>> clamp(-1, 1).named("grad").hyperparameters
            {'grad.min': -1, 'grad.max': 1}
            >>> project_l2_ball(1.0).named(radius="epsilon")(torch.tensor([3.0, 4.0]), {"epsilon": 0.5})
            tensor([0.3000, 0.4000])
        """
        known = self.definition.hyperparameters
        if prefix is None and not keys:
            raise TypeError(f"{self!r}.named needs a prefix, or the key of a hyperparameter: .named({known[0]}=...)")
        for name, value in {"prefix": prefix, **keys}.items():
            if not (isinstance(value, str) and value) and not (name == "prefix" and value is None):
                raise TypeError(f"{self!r}.named({name}) needs a non-empty string, got {value!r}")
        for name, key in keys.items():
            if name not in known:
                raise TypeError(f"{self!r}.named: there is no hyperparameter {name!r}; there are {list(known)}")
            if key in GIVEN:
                raise ValueError(f"{self!r}.named: {name} cannot have the key {key!r}, which optimizers set themselves")
        named = BoundTransform(
            self.definition,
            self.arguments,
            self.prefix if prefix is None else prefix,
            self.is_named or prefix is not None,
            {**self.own_keys, **keys},
        )
        if len(named.hyperparameters) < len(known):
            raise ValueError(f"{self!r}.named: two hyperparameters cannot have the same key, got {keys}")
        return named

    def numbered(self, prefix: str) -> BoundTransform:
        """The same under the prefix of its number among its kind, as in ``"scale_2.factor"``."""
        named = self.named(prefix)
        return BoundTransform(self.definition, self.arguments, prefix, named.is_named, named.own_keys, is_numbered=True)

    def replaced(self, change: Callable[[BoundTransform], BoundTransform]) -> BoundTransform:
        """``change(self)``."""
        return change(self)

    def start(self, tensor: Tensor, group: Group) -> Tensor:
        """Where the state of a parameter ``tensor`` starts."""
        return tensor if self.definition.start is None else self.definition.start(tensor, group, **self._read(group))

    def begin(self, tensor: Tensor, group: Group) -> State:
        """The first state that starts at ``tensor``; empty where there is none to keep."""
        if self.definition.init is None:
            return {}
        state = self.definition.init(*widen(tensor, group), **self._read(group))
        if not is_state(state):
            raise TypeError(f"{self!r}: init must return a dict of tensors, got {state!r}")
        return state

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """What it acts on; see ``Stage.units``."""
        if self.definition.measure is not None:
            return (None,)
        return (0 if self.acts_on == "element" else tensor.ndim,)

    def measure(self, tensors: Sequence[Tensor], group: Group, state: State) -> tuple[Group, State]:
        """What ``act`` finds in its group about all tensors, and the next state, if it is one for all of them."""
        if self.definition.measure is None:
            return {}, state
        arguments = {**self._read(group), "group": group} if self.definition.measures_group else self._read(group)
        if not self.shares_state:
            return self.definition.measure(tensors, **arguments), state
        try:
            view, new_state = self.definition.measure(tensors, state, **arguments)
        except KeyError as error:
            self._require_key_of(state, error)
            raise
        return view, new_state

    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Call the function."""
        wide, wide_group = widen(tensor, group)
        function = self.definition.function
        arguments = self._read_in(group, wide.real.dtype)
        new_state = state

        def call() -> Tensor:
            nonlocal new_state
            if not self.stateful or self.shares_state:
                return cast("Tensor", function(wide, wide_group, **arguments))
            try:
                result = function(wide, wide_group, state, **arguments)
            except KeyError as error:
                self._require_key_of(state, error)
                raise
            if not (isinstance(result, tuple) and len(result) == 2 and is_state(result[1])):
                raise TypeError(f"{self!r} must return (tensor, state), got {type(result).__name__}")
            new_state = result[1]
            return cast("Tensor", result[0])

        if not (self.counts and group.get(ACTED)):
            return call_checked(self, call, wide, wide_group).to(tensor.dtype), new_state
        with notes() as noted:
            result = call_checked(self, call, wide, wide_group).to(tensor.dtype)
        return result, {**new_state, ACTED: noted[0]}

    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""
        overrides = self._overrides(group)
        self._require_needed(overrides)
        self.definition.validate({**self.arguments, **overrides}, self.prefix, self.own_keys)

    def _read_in(self, group: Group, dtype: torch.dtype) -> Mapping[str, Any]:
        """The arguments, with the hyperparameters in ``group``; tensors without dimensions in ``dtype``."""
        arguments = self._read(group)
        if not any(isinstance(value, Tensor) for value in arguments.values()):
            return arguments
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.ndim == 0 else value
            for name, value in arguments.items()
        }

    def _require_key_of(self, state: State, error: KeyError) -> None:
        """Raise where ``error`` is for lack of a key of ``state``; not a ``with``, which torch 2.6 cannot compile."""
        if not state and error.args and error.args[0] not in CONTEXT:
            raise ValueError(
                f"{self!r}: the state has no {error.args[0]!r}; it comes from state = t.init(tensor, group), "
                "or from the step before"
            ) from None

    def _overrides(self, group: Group) -> dict[str, Any]:
        # Names and keys are in the same order. Identity suffices: in an optimizer, groups hold the defaults themselves.
        named = zip(self.definition.hyperparameters, self.hyperparameters.items(), strict=True)
        return {name: group[key] for name, (key, default) in named if group.get(key, default) is not default}

    def _read(self, group: Group) -> Mapping[str, Any]:
        overrides = self._overrides(group)
        if not overrides and not self.needed:
            return self.arguments
        self._require_needed(overrides)
        arguments = {**self.arguments, **overrides}
        # Reading a tensor's value would synchronise the device and break graphs; factory and adapter have checked it.
        self.definition.validate(arguments, self.prefix, self.own_keys, read_tensors=False)
        return arguments

    def _require_needed(self, overrides: Mapping[str, Any]) -> None:
        for name in self.needed:
            if name not in overrides:
                key = self.key(name)
                raise ValueError(
                    f'{self!r} has no default for {name} and reads group["{key}"], which is not there; give it in each '
                    f'param group, {{"params": ..., "{key}": ...}}, or for all in defaults'
                )

    def __repr__(self) -> str:
        parameters = self.definition.signature.parameters
        given = [f"{n}={show_value(v)}" for n, v in self.arguments.items() if not is_same(v, parameters[n].default)]
        is_first = self.is_numbered and self.prefix == self.definition.name
        names = [repr(self.prefix)] if self.is_named and not is_first else []
        names += [f"{name}={key!r}" for name, key in self.own_keys.items()]
        suffix = f".named({', '.join(names)})" if names else ""
        return f"{self.definition.name}({', '.join(given)}){suffix}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoundTransform):
            return NotImplemented
        return (
            self.definition is other.definition
            and (self.prefix, self.is_named, self.own_keys) == (other.prefix, other.is_named, other.own_keys)
            and all(is_same(value, other.arguments[name]) for name, value in self.arguments.items())
        )

    def __hash__(self) -> int:
        values = (None if isinstance(v, Tensor | Generator | list | tuple) else v for v in self.arguments.values())
        return hash((self.definition.name, self.prefix, *values))

    def __reduce__(self) -> tuple[Any, ...]:
        names = self.prefix, self.is_named, self.own_keys, self.is_numbered
        return _rebuild, (self.definition.factory, dict(self.arguments), *names)


# Hydra takes an instance of a dataclass for a config, and would hand on its fields in its place.
del BoundTransform.__dataclass_fields__


def counted(factory: TransformFactory[P]) -> TransformFactory[P]:
    """Declare that the function calls ``note_acting``."""
    factory.definition.counts = True
    return factory


def _rebuild(factory: Any, arguments: dict[str, Any], *names: Any) -> BoundTransform:
    return BoundTransform(factory.definition, arguments, *names)


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
                call = self.signature.bind(*args, **kwargs)
            except TypeError as error:
                locate(error, self.name)
                raise
            call.apply_defaults()
            arguments = {name: as_number(value) for name, value in call.arguments.items()}
            self.validate(arguments, self.name, {})
            return BoundTransform(self, arguments, self.name)

        def register_check(check: Callable[..., None]) -> Callable[..., None]:
            self.check = check
            return check

        def register_after_skip(after_skip: Callable[..., None]) -> Callable[..., None]:
            self.after_skip = after_skip
            return after_skip

        factory.__signature__ = self.signature  # type: ignore[attr-defined]
        factory.check = register_check  # type: ignore[attr-defined]
        factory.on_skip = register_after_skip  # type: ignore[attr-defined]
        factory.definition = self  # type: ignore[attr-defined]
        return cast("TransformFactory[...]", factory)

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
