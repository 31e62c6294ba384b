"""Transforms as values: a function that was decorated, bound to its hyperparameters and options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor

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
    notes,
    show_value,
    widen,
)
from gradchain.stage import Each

if TYPE_CHECKING:
    from gradchain.definition import Definition


@dataclass(frozen=True, eq=False, repr=False)
class BoundTransform(Each):
    """A transform made by a factory: a value that compares, hashes, pickles and prints as the call that made it."""

    definition: Definition
    arguments: Mapping[str, Any]
    prefix: str
    is_named: bool = False
    """Whether ``named`` or ``numbered`` has given the prefix, and not the factory."""
    own_keys: Mapping[str, str] = field(default_factory=dict)
    """The keys of hyperparameters that have no prefix, by the name of the hyperparameter."""
    is_numbered: bool = False
    """Whether the prefix was given to it for its number among its kind."""
    needed: tuple[str, ...] = field(init=False)
    """The names of the hyperparameters without a default."""

    def __post_init__(self) -> None:
        definition, defaults = self.definition, self.arguments
        is_stateful, measures = definition.init is not None, definition.measure is not None
        attributes: Group = {
            "hyperparameters": {self.key(name): defaults[name] for name in definition.hyperparameters},
            "needed": tuple(name for name in definition.hyperparameters if defaults[name] is FROM_GROUP),
            "stateful": is_stateful,
            "measures": measures,
            "measures_shards": definition.measures_shards,
            "shares_state": is_stateful and measures,
            "skip_keys": () if definition.skip is None else (definition.skip,),
            "reports": () if definition.skip is None else ("in_a_row", "total"),
            "counts": definition.counts,
            "keeps_average": definition.average is not None,
            "starts_early": definition.start is not None,
        }
        for name, value in attributes.items():
            object.__setattr__(self, name, value)  # since it is frozen
        definition.read_annotations()

    def key(self, name: str) -> str:
        """Return the key of a hyperparameter in a group."""
        return self.own_keys.get(name, f"{self.prefix}.{name}")

    def report(self, states: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, float]:
        """Return the counters, which are the same for all parameters."""
        return dict(states[0])

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """Return what ``state`` has under the key that was declared for the average."""
        key = self.definition.average
        return [state[key]] if key in state else []

    def shares(self, key: str) -> bool:
        """Whether the state is the same for all tensors, because it depends on what is measured of all."""
        return self.shares_state

    def functions(self) -> Iterable[Callable[..., Any]]:
        """Return the function that was decorated."""
        return [self.definition.function]

    def after_skip(self, state: State) -> None:
        """Call the function that was registered with ``on_skip``."""
        if state:  # it is empty if the parameter is not selected
            self.definition.after_skip(state, **self.arguments)

    @property
    def state_name(self) -> str:
        """The name of the factory, whatever prefix the hyperparameters have."""
        return self.definition.name

    def named(self, prefix: str | None = None, /, **keys: str) -> BoundTransform:
        """Keep the hyperparameters under ``"<prefix>.<parameter>"``, or under keys of your own.

        Without a name, transforms of the same kind have keys by their number: ``"clamp_2.min"``. With a name the
        keys stay the same when another transform joins the chain, and transforms of the same name share them.

        Args:
            prefix: What stands before the dot.
            **keys: The whole key of a hyperparameter, by the name of the parameter.

        Raises:
            TypeError: Neither is given, a name is no string or empty, or the transform has no such hyperparameter.
            ValueError: A key is one that an optimizer sets for other purposes, or two hyperparameters have one key.

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
        """Return the same under the prefix of its number among its kind, as in ``"scale_2.factor"``."""
        named = self.named(prefix)
        return BoundTransform(self.definition, self.arguments, prefix, named.is_named, named.own_keys, is_numbered=True)

    def replaced(self, change: Callable[[BoundTransform], BoundTransform]) -> BoundTransform:
        """Return ``change(self)``."""
        return change(self)

    def start(self, tensor: Tensor, group: Group) -> Tensor:
        """Return the tensor from which ``begin`` makes the first state of a parameter ``tensor``."""
        return tensor if self.definition.start is None else self.definition.start(tensor, group, **self._read(group))

    def begin(self, tensor: Tensor, group: Group) -> State:
        """Return the first state, made from ``tensor``, which is empty if there is nothing to keep."""
        if self.definition.init is None:
            return {}
        state = self.definition.init(*widen(tensor, group), **self._read(group))
        if not is_state(state):
            raise TypeError(f"{self!r}: init must return a dict of tensors, got {state!r}")
        return state

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """Return what the transform acts on; see ``Stage.units``."""
        if self.definition.measure is not None:
            return (None,)
        return (0 if self.definition.acts_on == "element" else tensor.ndim,)

    def measure(self, tensors: Sequence[Tensor], group: Group, state: State) -> tuple[Group, State]:
        """Return what ``act`` finds in its group about all tensors, and the next state, if all tensors share one."""
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
        """Call the function that was decorated."""
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
            if not torch.compiler.is_compiling() and result[1].keys() != state.keys():
                raise ValueError(
                    f"{self!r} must return a state with the keys that init has made, {sorted(state)}, got "
                    f"{sorted(result[1])}"
                )
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
        """Return the arguments with the values in ``group``, and convert tensors without dimensions to ``dtype``."""
        arguments = self._read(group)
        if not any(isinstance(value, Tensor) for value in arguments.values()):
            return arguments
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.ndim == 0 else value
            for name, value in arguments.items()
        }

    def _require_key_of(self, state: State, error: KeyError) -> None:
        """Raise if ``error`` is for lack of a key of ``state``. It is no ``with``, which torch 2.6 cannot compile."""
        if not state and error.args and error.args[0] not in CONTEXT:
            raise ValueError(
                f"{self!r}: the state has no {error.args[0]!r}; it comes from state = t.init(tensor, group), "
                "or from the step before"
            ) from None

    def _overrides(self, group: Group) -> dict[str, Any]:
        # Names and keys are in the same order. Identity suffices, since the groups of an optimizer hold the defaults.
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


# Hydra takes an instance of a dataclass for a config, and would pass on the fields instead of the instance.
del BoundTransform.__dataclass_fields__


def _rebuild(factory: Any, arguments: dict[str, Any], *names: Any) -> BoundTransform:
    return BoundTransform(factory.definition, arguments, *names)
