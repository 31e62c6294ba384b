"""What a transform is, a pure function ``(tensor, group) -> tensor``, and ``@transform``, which makes factories."""

from __future__ import annotations

import enum
import functools
import inspect
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, Protocol, TypeAlias, cast, get_type_hints, overload

import torch
from torch import Generator, Tensor

from gradchain._ranges import as_number, validate

P = ParamSpec("P")

Group: TypeAlias = dict[str, Any]
"""A param group: hyperparameters by key and, as context, ``"param"`` and ``"grad"``, shaped like the tensor."""

State: TypeAlias = dict[str, Any]
"""What a stateful transform remembers from step to step: a dict of tensors.

In the state of a chain, the keys begin with the names of the transforms: ``"ema.average"``.
"""

CONTEXT = ("param", "grad")

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

ActsOn: TypeAlias = Literal["unit", "tensor", "element"]
"""What a function is written for: see ``transform``."""

PLACE = "place"
"""The key of the words that say which tensor it is, for errors, in the groups of tensors that run together."""

# Half-precision sums overflow (float16) or lose digits (bfloat16): compute in float32, round once at the end.
_COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class Transform(Protocol):
    """Any callable of this shape is a transform: it returns a tensor like its input and never writes to it."""

    def __call__(self, tensor: Tensor, group: Group, /) -> Tensor: ...


class TransformFactory(Protocol[P]):
    """What ``@transform`` makes of a function: called with the hyperparameters, it returns the transform."""

    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> BoundTransform: ...

    def check(self, function: Callable[..., None], /) -> Callable[..., None]:
        """Register ``function(**arguments)``, which raises where arguments that are each in range do not fit together."""
        ...

    def on_skip(self, function: Callable[..., None], /) -> Callable[..., None]:
        """Register ``function(state, **arguments)``, called when the transform has called a step off; it may raise."""
        ...


@overload
def transform(function: Callable[Concatenate[Tensor, Group, P], Tensor], /) -> TransformFactory[P]: ...
@overload
def transform(
    *, acts_on: ActsOn = "unit", measure: Callable[..., Group] | None = None, measures_shards: bool = False
) -> Callable[[Callable[Concatenate[Tensor, Group, P], Tensor]], TransformFactory[P]]: ...
@overload
def transform(
    *,
    init: Callable[..., State],
    start: Callable[..., Tensor] | None = None,
    acts_on: ActsOn = "unit",
    average: str | None = None,
) -> Callable[[Callable[Concatenate[Tensor, Group, State, P], tuple[Tensor, State]]], TransformFactory[P]]: ...
@overload
def transform(
    *,
    init: Callable[..., State],
    measure: Callable[..., tuple[Group, State]],
    measures_shards: bool = False,
    acts_on: ActsOn = "unit",
    skip: str | None = None,
) -> Callable[[Callable[Concatenate[Tensor, Group, P], Tensor]], TransformFactory[P]]: ...
def transform(
    function: Callable[..., Any] | None = None,
    /,
    *,
    init: Callable[..., State] | None = None,
    start: Callable[..., Tensor] | None = None,
    acts_on: ActsOn = "unit",
    measure: Callable[..., Any] | None = None,
    measures_shards: bool = False,
    average: str | None = None,
    skip: str | None = None,
) -> Any:
    """Turn a pure function ``(tensor, group, ...) -> tensor`` into a factory of transforms.

    The function is written for one tensor, with the meaning that the mathematics has; ``broadcast`` maps it over
    sub-tensors. Parameters before ``*`` are hyperparameters: the value given to the factory is the default, and the
    key ``"<function>.<parameter>"`` of the group wins. Parameters after ``*`` are options, fixed when the factory is
    called. Both are checked against their annotations, ranges (``Annotated[float, Gt(0)]``) included. The factory takes
    ``FROM_GROUP`` for a hyperparameter that has no default, since every group gives its own.

    A half-precision tensor and its context reach the function as float32, and the result is rounded back. A tensor
    without elements never reaches it: the result is empty too.

    Args:
        init: Makes the transform stateful. ``init(tensor, group, **arguments)`` returns the first state, a dict of
            tensors, for a parameter ``tensor``; the function is ``(tensor, group, state, ...) -> (tensor, state)`` and
            returns a new state. ``clone()`` what is kept of an input: an optimizer writes to it later.
        start: Says where the state starts, for one that depends on it. ``start(tensor, group, **arguments)`` returns
            what ``init`` sees in place of a parameter ``tensor``, which is the whole one whatever ``param_ndim`` is. An
            optimizer makes such a state when it is constructed, or when the parameter is added; others wait for the
            first step.
        acts_on: What the function is written for. ``"unit"`` is a tensor that ``broadcast`` and the ``param_ndim`` of a
            group choose. ``"tensor"`` is the whole tensor, whatever the ``param_ndim`` of a group; an explicit
            ``broadcast(t, param_ndim)`` counts. ``"element"`` is each element, so that no ``broadcast`` is needed.
        measure: Gives the transform a view over all tensors of the optimizer. ``measure(tensors, **arguments)`` returns
            a dict that the function finds in its group. The tensors are as they are, half precision included, and the
            arguments those of the first group. With ``init`` too, the state is that of the measure, one for all
            tensors: ``measure(tensors, state, **arguments)`` returns the dict and a new state, and the function is
            ``(tensor, group, ...) -> tensor``.
        measures_shards: Whether ``measure`` can deal with distributed tensors (``DTensor``). If not, it gets them whole.
        average: The key of the state under which there is an average of the parameter, to evaluate with.
        skip: The key of the state that says whether to call the step off.

    Example:
        >>> from typing import Annotated
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

        >>> def zero(tensor: Tensor, group: Group) -> dict[str, Tensor]:
        ...     return {"total": torch.zeros_like(tensor)}
        >>> @transform(init=zero)
        ... def cumulate(tensor: Tensor, group: Group, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ...     total = state["total"] + tensor
        ...     return total, {"total": total}
        >>> x, group = torch.tensor([1.0, 2.0]), {}
        >>> state = cumulate().init(x, group)
        >>> _, state = cumulate().update(x, group, state)
        >>> cumulate().update(x, group, state)[0]
        tensor([2., 4.])

        >>> def largest(tensors: list[Tensor]) -> dict[str, Tensor]:
        ...     return {"largest": torch.stack([tensor.abs().max() for tensor in tensors]).max()}
        >>> @transform(measure=largest)
        ... def divide_by_largest(tensor: Tensor, group: Group) -> Tensor:
        ...     return tensor / group["largest"]
        >>> divide_by_largest().run([torch.tensor([1.0]), torch.tensor([-4.0])], [{}, {}], [{}, {}])[0]
        [tensor([0.2500]), tensor([-1.])]
    """

    def decorate(function: Callable[..., Any]) -> TransformFactory[...]:
        return _Definition(function, init, start, acts_on, measure, measures_shards, average, skip).factory

    return decorate if function is None else decorate(function)


class Part(NamedTuple):
    """A stage within a chain, and the tensors that it is for."""

    stage: Stage
    path: str
    """How the keys of its states begin."""
    numbers: Sequence[int]
    """Which of the tensors it is for."""
    places: tuple[str, ...]
    """The words that say where it is, from the outside in."""

    def states_of(self, states: State) -> State:
        """Its own among all ``states`` of a tensor."""
        return below(states, self.path)


class Stage(ABC):
    """What chains are made of: a transform with hyperparameters and, maybe, with state."""

    hyperparameters: Mapping[str, Any]
    """The default of every hyperparameter, by its key in a group."""

    stateful: bool = False

    shares_state: bool = False
    """Whether there is state that depends on the view over all tensors alone, so that it is one for all of them."""

    starts_early: bool = False
    """Whether there is state that is to be made when an optimizer is constructed, and not in its first step."""

    measures: bool = False
    """Whether it has to see all tensors of the optimizer together."""

    measures_shards: bool = False
    """Whether it can measure distributed tensors."""

    acts_on_each: bool = True
    """Whether it acts on each tensor by itself, once all are measured."""

    skip_keys: tuple[str, ...] = ()
    """The keys of its state that say whether to call the step off."""

    keeps_average: bool = False
    """Whether its state holds an average of the parameter, to evaluate with."""

    @property
    @abstractmethod
    def state_name(self) -> str:
        """What its state is called within that of a chain, in checkpoints too."""

    @abstractmethod
    def init(self, tensor: Tensor, group: Group) -> State:
        """The first state for a parameter ``tensor``; empty where there is none to keep."""

    @abstractmethod
    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Transform all tensors of an optimizer, each with its group and state; nothing is written to."""

    @abstractmethod
    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""

    @abstractmethod
    def functions(self) -> Iterable[Callable[..., Any]]:
        """The functions that it calls for each tensor."""

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """How many dimensions the parts of ``tensor`` have on which it acts, each by itself.

        These are 0 for each element, and ``tensor.ndim`` for the whole tensor. None says that it acts on all tensors of
        an optimizer together. It is empty where it leaves the tensor alone, and a combinator can have several.
        """
        return (tensor.ndim,)

    def __call__(self, tensor: Tensor, group: Group | None = None, /) -> Tensor:
        if self.stateful:
            raise TypeError(
                f"{show(self)} has a state, so a call needs and returns it: "
                "state = t.init(tensor, group); tensor, state = t.update(tensor, group, state)"
            )
        return self.update(tensor, {} if group is None else group, {})[0]

    def update(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Transform one tensor, and return the result with the next state."""
        (result,), (new_state,) = self.run([tensor], [group], [state])
        return result, new_state

    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Transform one tensor, given what was measured of all."""
        return self.update(tensor, group, state)

    def unit_ndim(self, ndim: int, group: Group) -> int | None:
        """How many dimensions the sub-tensors have that it acts on, of a tensor of ``ndim``; None for the whole."""
        return None

    def split(
        self, groups: Sequence[Group], numbers: Sequence[int], path: str = "", places: tuple[str, ...] = ()
    ) -> Iterator[Part]:
        """The stages that it is made of, in order, each with those of the tensors ``numbers`` that it is for."""
        yield Part(self, path, numbers, places)

    def shares(self, key: str) -> bool:
        """Whether what its state has under ``key`` is one for all tensors."""
        return False

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """The averages of ``param`` in its state, to evaluate with."""
        return []

    def after_skip(self, state: State) -> None:  # noqa: B027 # most skip nothing
        """Raise where a step was called off that should not have been, given the state after it."""

    def replaced(self, change: Callable[[BoundTransform], BoundTransform]) -> Stage:
        """The stage with ``change(transform)`` for each transform that a factory made; itself if nothing changes."""
        return self


class Each(Stage):
    """A stage that measures all tensors at most, and then acts on each by itself."""

    def init(self, tensor: Tensor, group: Group) -> State:
        """The first state for a parameter ``tensor``; empty where there is none to keep."""
        return self.begin(self.start(tensor, group), group)

    def start(self, tensor: Tensor, group: Group) -> Tensor:
        """Where the state of a parameter ``tensor`` starts."""
        return tensor

    @abstractmethod
    def begin(self, tensor: Tensor, group: Group) -> State:
        """The first state that starts at ``tensor``."""

    @abstractmethod
    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Transform one tensor, given what was measured."""

    def measure(self, tensors: Sequence[Tensor], group: Group, state: State) -> tuple[Group, State]:
        """What ``act`` finds in its group about all tensors, and the next state, if it is one for all of them."""
        return {}, state

    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Transform all tensors, one after the other."""
        full = [(tensor, group) for tensor, group in zip(tensors, groups, strict=True) if tensor.numel()]
        view: Group = {}
        if full and self.measures:
            view, state = self.measure([tensor for tensor, _ in full], full[0][1], states[0])
            states = [state] * len(states) if self.shares_state else states
        results, new_states = [], []
        for tensor, group, state in zip(tensors, groups, states, strict=True):
            try:
                result, new_state = self.act(tensor, group | view, state)
            except Exception as error:
                if PLACE in group:
                    locate(error, group[PLACE])
                raise
            results.append(result)
            new_states.append(new_state)
        return results, new_states


class Function(Each):
    """A plain callable, as a stage."""

    def __init__(self, function: Transform) -> None:
        self.function = function
        self.hyperparameters = {}

    @property
    def state_name(self) -> str:
        """There is no state to be named."""
        return "function"

    def begin(self, tensor: Tensor, group: Group) -> State:
        """There is no state."""
        return {}

    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Call the function."""
        return _call_checked(self.function, lambda: self.function(tensor, group), tensor, group), state

    def check(self, group: Group) -> None:
        """There are no hyperparameters."""

    def functions(self) -> Iterable[Callable[..., Any]]:
        """The function."""
        return [self.function]

    def __eq__(self, other: object) -> bool:
        return self.function == other.function if isinstance(other, Function) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.function)


@dataclass(frozen=True, eq=False, repr=False)
class BoundTransform(Each):
    """A transform made by a factory: a value that compares, hashes, pickles and prints as the call that made it."""

    definition: _Definition
    arguments: Mapping[str, Any]
    prefix: str
    is_named: bool = False
    """Whether the prefix was given to it, and is not that of all transforms of its kind."""
    own_keys: Mapping[str, str] = field(default_factory=dict)
    """The keys of hyperparameters that have no prefix, by the name of the parameter."""
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
        named = replace(
            self,
            prefix=self.prefix if prefix is None else prefix,
            is_named=self.is_named or prefix is not None,
            own_keys={**self.own_keys, **keys},
        )
        if len(named.hyperparameters) < len(known):
            raise ValueError(f"{self!r}.named: two hyperparameters cannot have the same key, got {keys}")
        return named

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
        if not _is_state(state):
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
        if not self.shares_state:
            return self.definition.measure(tensors, **self._read(group)), state
        with self._explaining_keys_of(state):
            view, new_state = self.definition.measure(tensors, state, **self._read(group))
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
            with self._explaining_keys_of(state):
                result = function(wide, wide_group, state, **arguments)
            if not (isinstance(result, tuple) and len(result) == 2 and _is_state(result[1])):
                raise TypeError(f"{self!r} must return (tensor, state), got {type(result).__name__}")
            new_state = result[1]
            return cast("Tensor", result[0])

        return _call_checked(self, call, wide, wide_group).to(tensor.dtype), new_state

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

    @contextmanager
    def _explaining_keys_of(self, state: State) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            if state or not error.args or error.args[0] in CONTEXT:
                raise
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
        given = [f"{n}={_show_value(v)}" for n, v in self.arguments.items() if not is_same(v, parameters[n].default)]
        names = [] if self.prefix == self.definition.name else [repr(self.prefix)]
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
        return _rebuild, (self.definition.factory, dict(self.arguments), self.prefix, self.is_named, self.own_keys)


def _rebuild(factory: Any, arguments: dict[str, Any], *names: Any) -> BoundTransform:
    return BoundTransform(factory.definition, arguments, *names)


class _Definition:
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
        self.acts_on = acts_on
        self.measure = measure
        self.measures_shards = measures_shards
        self.average = average
        self.skip = skip
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


class Combinator(Stage):
    """A stage made of others, its members."""

    def __init__(self, members: Iterable[Transform]) -> None:
        self.members = tuple(require_transform(m, f"member {i} of {self.name}") for i, m in enumerate(members))
        self.stages: tuple[Stage, ...] = tuple(number_keys(map(as_stage, self.members)))
        self.hyperparameters = merge_hyperparameters(self.places())
        self.stateful = any(stage.stateful for stage in self.stages)
        self.shares_state = any(stage.shares_state for stage in self.stages)
        self.starts_early = any(stage.starts_early for stage in self.stages)
        self.keeps_average = any(stage.keeps_average for stage in self.stages)
        self.measures = any(stage.measures for stage in self.stages)
        self.acts_on_each = not self.measures
        self.keys = _state_keys(self.stages)
        """Under which key the state of each stateful member is, by its index: its name, and a number if it recurs."""

    name = "a combinator"

    @property
    def skip_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of its members."""
        return tuple(self.path(i) + key for i in self.keys for key in self.stages[i].skip_keys)

    def shares(self, key: str) -> bool:
        """Whether the member shares it whose state it is of."""
        members = [(self.stages[index], self.path(index)) for index in self.keys]
        return any(key.startswith(path) and stage.shares(key[len(path) :]) for stage, path in members)

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """Those of its members."""
        members = [(self.stages[index], below(state, self.path(index))) for index in self.keys]
        return [average for stage, own in members for average in stage.averages(own, param)]

    def path(self, index: int) -> str:
        """How the keys of the state of a member begin."""
        return f"{self.keys.get(index, f'#{index}')}."

    def functions(self) -> Iterable[Callable[..., Any]]:
        """Those of its members."""
        return [function for stage in self.stages for function in stage.functions()]

    def after_skip(self, state: State) -> None:
        """Ask the members."""
        for index in self.keys:
            self.stages[index].after_skip(below(state, self.path(index)))

    @property
    def state_name(self) -> str:
        """The name of the kind of combinator."""
        return self.name

    @abstractmethod
    def rebuild(self, members: Sequence[Transform]) -> Combinator:
        """The same with other members."""

    def replaced(self, change: Callable[[BoundTransform], BoundTransform]) -> Stage:
        """The same with other members; itself if nothing changes."""
        members = [member.replaced(change) if isinstance(member, Stage) else member for member in self.members]
        return self if all(map(is_, members, self.members)) else self.rebuild(members)

    def place(self, index: int) -> str:
        """The words that say where a member is."""
        return f"stage {index}, {show(self.members[index])}"

    def places(self) -> list[tuple[str, Stage]]:
        """The members, each with the words that say where it is."""
        return [(self.place(index), stage) for index, stage in enumerate(self.stages)]

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """What its members act on; see ``Stage.units``."""
        return tuple(dict.fromkeys(unit for stage in self.stages for unit in stage.units(tensor, group)))

    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""
        for place, stage in self.places():
            try:
                stage.check(group)
            except (TypeError, ValueError) as error:
                locate(error, place)
                raise


def _state_keys(stages: Iterable[Stage]) -> dict[int, str]:
    keys: dict[int, str] = {}
    for index, stage in enumerate(stages):
        if stage.stateful:
            numbered = (f"{stage.state_name}_{number}" for number in itertools.count(2))
            names = itertools.chain([stage.state_name], numbered)
            keys[index] = next(name for name in names if name not in keys.values())
    return keys


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which functions see tensors of ``dtype``."""
    return _COMPUTE_DTYPE.get(dtype, dtype)


def widen(tensor: Tensor, group: Group) -> tuple[Tensor, Group]:
    """A half-precision tensor and its context as float32; others as they are."""
    dtype = compute_dtype(tensor.dtype)
    if dtype == tensor.dtype:
        return tensor, group
    return tensor.to(dtype), group | {key: group[key].to(dtype) for key in CONTEXT if key in group}


def below(state: State, path: str) -> State:
    """The part of a state whose keys begin with ``path``, without it."""
    return {key[len(path) :]: value for key, value in state.items() if key.startswith(path)}


def beneath(state: State, path: str) -> State:
    """``state`` as a part of another one, whose keys begin with ``path``."""
    return {path + key: value for key, value in state.items()}


def as_stage(transform: Transform) -> Stage:
    """``transform`` itself, or a plain callable as a stage."""
    return transform if isinstance(transform, Stage) else Function(transform)


def require_transform(value: object, place: str) -> Transform:
    """Return ``value`` if it can be a transform; ``place`` says where it was given."""
    if isinstance(value, list | tuple):
        members = ", ".join(map(show, value))
        raise TypeError(
            f"{place} must be one transform, got a {type(value).__name__}; write chain({members}), without brackets"
        )
    if not callable(value):
        raise TypeError(f"{place} must be a callable (tensor, group) -> tensor, got {value!r}")
    definition = getattr(value, "definition", None)
    if isinstance(definition, _Definition) and not isinstance(value, BoundTransform):
        raise TypeError(f"{place} is the factory {definition.name}, not a transform; call it: {definition.name}(...)")
    if not isinstance(value, Stage):
        _require_signature(value, place)
    return cast("Transform", value)


def _require_signature(function: Callable[..., Any], place: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # torch's own functions tell none; a call of it says what is wrong
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(
            f"{place} must be a callable (tensor, group) -> tensor, got {show(function)}{signature}; "
            f"{_remedy(function)}"
        ) from None


def _remedy(function: object) -> str:
    return f"if it is to act on the tensor alone, write lambda tensor, group: {show(function)}(tensor)"


def number_keys(stages: Iterable[Stage], taken: Collection[str] = ()) -> list[Stage]:
    """The stages, in which no two transforms share the keys of their hyperparameters, unless a common name says so.

    The first transform of a kind keeps its prefix, ``"scale"``, the second one gets ``"scale_2"``, and so on, without
    the prefixes that are ``taken``. Those with a name of their own keep it.
    """
    stages, used = list(stages), set(taken)

    def note(transform: BoundTransform) -> BoundTransform:
        used.update({transform.prefix} if transform.is_named else ())
        return transform

    def number(transform: BoundTransform) -> BoundTransform:
        if transform.is_named or transform.own_keys.keys() >= set(transform.definition.hyperparameters):
            return transform
        prefixes = (f"{transform.prefix}_{n}" if n > 1 else transform.prefix for n in itertools.count(1))
        free = next(prefix for prefix in prefixes if prefix not in used)
        used.add(free)
        return transform.named(free)

    for stage in stages:
        stage.replaced(note)
    return [stage.replaced(number) for stage in stages]


def merge_hyperparameters(places: Iterable[tuple[str, Stage]]) -> dict[str, Any]:
    """The hyperparameters of all stages; one key with two defaults is an error that names both places."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, stage in places:
        for key, value in stage.hyperparameters.items():
            known = merged.setdefault(key, value)
            if value is not known and not is_same(value, known):
                raise ValueError(
                    f'the hyperparameter "{key}" has two defaults: {merged[key]!r} ({origin[key]}) and {value!r} '
                    f"({place}). Give one of the two another name with .named(prefix)."
                )
            origin.setdefault(key, place)
    return merged


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


def _call_checked(owner: object, call: Callable[[], Tensor], tensor: Tensor, group: Group) -> Tensor:
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
            error.args = (f"{show(owner)}: {key!r}; the group has no such key, defaults={{{key!r}: ...}} would set it",)
            raise
        absent = "; in post, a parameter without a gradient has none, which group.get tells" if key == "grad" else ""
        raise ValueError(
            f'{show(owner)} needs group["{key}"], a tensor of the shape {tuple(tensor.shape)} of its input; the group '
            f'has the keys {sorted(map(str, group))}. Pass {{"{key}": ...}}, or use it in a slot that sets '
            f'"{key}"{absent}.'
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


def _is_state(value: object) -> bool:
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


def _show_value(value: object) -> str:
    return f"Generator({value.initial_seed()})" if isinstance(value, Generator) else repr(value)
