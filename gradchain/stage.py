"""What chains are made of: stages, with hyperparameters and, maybe, with state, for the tensors of an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor

from gradchain._keys import free_name, merge_hyperparameters, number_keys
from gradchain.contract import (
    PLACE,
    Group,
    State,
    Transform,
    call_checked,
    is_same,
    locate,
    remedy,
    require_signature,
    show,
    with_keys,
)

if TYPE_CHECKING:
    from gradchain.bound import BoundTransform


class Part(NamedTuple):
    """A stage within a chain, and the tensors that it is for."""

    stage: Stage
    path: str
    """How the keys of the stage's states begin."""
    numbers: Sequence[int]
    """The numbers of the tensors that the stage is for."""
    places: tuple[str, ...]
    """The words that say where the stage is, from the outermost combinator to the innermost."""

    def states_of(self, states: State) -> State:
        """Return the states of this stage among all ``states`` of a tensor."""
        return below(states, self.path)


class Stage(ABC):
    """What chains are made of: a transform with hyperparameters and, maybe, with state."""

    hyperparameters: Mapping[str, Any]
    """The default of every hyperparameter, by its key in a group."""

    stateful: bool = False

    shares_state: bool = False
    """Whether some of the state depends only on what is measured of all tensors, so that all tensors share it."""

    starts_early: bool = False
    """Whether some of the state has to be made when an optimizer is constructed, and not in its first step."""

    measures: bool = False
    """Whether the stage has to see all tensors of the optimizer together."""

    measures_shards: bool = False
    """Whether the stage can measure distributed tensors."""

    acts_on_each: bool = True
    """Whether the stage acts on each tensor by itself, once all are measured. If not, it gets all of them at once."""

    is_identity: bool = False
    """Whether the stage only looks at tensors, sharded or not: it returns them as they are, and never raises."""

    every: int = 1
    """A stage that is the identity runs in the first step, and in each step whose number is a multiple of ``every``."""

    counts: bool = False
    """Whether the stage counts how often it acts, once it is asked to."""

    reports: tuple[str, ...] = ()
    """The keys of the state from which ``report`` makes figures."""

    skip_keys: tuple[str, ...] = ()
    """The keys of the state that say whether to call the step off."""

    keeps_average: bool = False
    """Whether the state holds an average of the parameter, which serves for evaluation."""

    @property
    @abstractmethod
    def state_name(self) -> str:
        """The name of the stage's state within the state of a chain, and so in checkpoints."""

    @abstractmethod
    def init(self, tensor: Tensor, group: Group) -> State:
        """Return the first state for a parameter ``tensor``, which is empty if there is nothing to keep."""

    @abstractmethod
    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Transform all tensors of an optimizer, each with its group and state, without writing to any of them."""

    @abstractmethod
    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""

    @abstractmethod
    def functions(self) -> Iterable[Callable[..., Any]]:
        """Return the functions that the stage calls for each tensor."""

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """Return the numbers of dimensions of the parts of ``tensor`` on which the stage acts, each by itself.

        The number is 0 for each element, and ``tensor.ndim`` for the whole tensor. None says that the stage acts on all
        tensors of an optimizer together. The tuple is empty if the stage leaves the tensor alone, and a combinator can
        have several numbers.
        """
        return (tensor.ndim,)

    def __call__(self, tensor: Tensor, group: Group | None = None, /) -> Tensor:
        if self.stateful:
            raise TypeError(
                f"{show(self)} has a state, so a call needs and returns it: "
                "state = t.init(tensor, group); tensor, state = t.update(tensor, group, state)"
            )
        return self.update(tensor, {} if group is None else group, {})[0]

    def __eq__(self, other: object) -> bool:
        return is_same(self.__reduce__(), other.__reduce__()) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        call: Any = self.__reduce__()  # by which it is made
        return hash((call[0], *(None if isinstance(each, Tensor) else each for each in call[1])))

    def update(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Transform one tensor, and return the result with the next state."""
        (result,), (new_state,) = self.run([tensor], [group], [state])
        return result, new_state

    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Transform one tensor, whose group has what was measured of all tensors."""
        return self.update(tensor, group, state)

    def measure(self, tensors: Sequence[Tensor], group: Group, state: State) -> tuple[Group, State]:
        """Return what ``act`` finds in its group about all tensors, and the next state, if all tensors share one."""
        return {}, state

    def unit_ndim(self, ndim: int, group: Group) -> int | None:
        """Return how many dimensions the sub-tensors of a tensor of ``ndim`` dimensions have; None for the whole."""
        return None

    def split(
        self, groups: Sequence[Group], numbers: Sequence[int], path: str = "", places: tuple[str, ...] = ()
    ) -> Iterator[Part]:
        """Yield the stages inside this stage, in order, each with those of the tensors ``numbers`` that it gets."""
        yield Part(self, path, numbers, places)

    def shares(self, key: str) -> bool:
        """Whether the value under ``key`` of the state is the same for all tensors."""
        return False

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """Return the averages of ``param`` that ``state`` has, which serve for evaluation."""
        return []

    def report(self, states: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, float]:
        """Return figures for people, made of the values under ``reports`` in the states of parameters of ``sizes``."""
        return {}

    def after_skip(self, state: State) -> None:  # noqa: B027 # most skip nothing
        """Raise if the step that has ended in ``state`` should not have been called off."""

    def replaced(self, change: Callable[[BoundTransform], BoundTransform]) -> Stage:
        """Return the stage with ``change(transform)`` for each transform of a factory, or itself if nothing changes."""
        return self


class Each(Stage):
    """A stage that acts on each tensor by itself, and can measure all tensors before."""

    def init(self, tensor: Tensor, group: Group) -> State:
        """Return the first state for a parameter ``tensor``, which is empty if there is nothing to keep."""
        return self.begin(self.start(tensor, group), group)

    def start(self, tensor: Tensor, group: Group) -> Tensor:
        """Return the tensor from which ``begin`` makes the first state of a parameter ``tensor``."""
        return tensor

    @abstractmethod
    def begin(self, tensor: Tensor, group: Group) -> State:
        """Return the first state, made from the tensor that ``start`` has returned."""

    @abstractmethod
    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Transform one tensor, whose group has what was measured of all tensors."""

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
                result, new_state = self.act(tensor, with_keys(group, view), state)
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
        """A placeholder, because a plain callable has no state to be named."""
        return "function"

    def begin(self, tensor: Tensor, group: Group) -> State:
        """Return an empty state, because a plain callable has none."""
        return {}

    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Call the function."""

        def call() -> Tensor:
            try:
                return self.function(tensor, group)
            except TypeError as error:
                # The call itself failed, and not something in the function.
                if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                    text = f"{show(self.function)} is called with (tensor, group): {error}; {remedy(self.function)}"
                    error.args = (text,)
                raise

        return call_checked(self.function, call, tensor, group), state

    def check(self, group: Group) -> None:
        """Do nothing, because a plain callable has no hyperparameters."""

    def functions(self) -> Iterable[Callable[..., Any]]:
        """Return the function."""
        return [self.function]

    def __eq__(self, other: object) -> bool:
        return self.function == other.function if isinstance(other, Function) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.function)


class Combinator(Stage):
    """A stage made of other stages, its members."""

    def __init__(self, members: Iterable[Transform]) -> None:
        self.members = tuple(require_transform(m, f"member {i} of {self.name}") for i, m in enumerate(members))
        self.stages: tuple[Stage, ...] = tuple(number_keys(map(as_stage, self.members)))
        self.hyperparameters = merge_hyperparameters(self.places())
        self.stateful = any(stage.stateful for stage in self.stages)
        self.shares_state = any(stage.shares_state for stage in self.stages)
        self.starts_early = any(stage.starts_early for stage in self.stages)
        self.keeps_average = any(stage.keeps_average for stage in self.stages)
        self.measures = any(stage.measures for stage in self.stages)
        self.acts_on_each = not self.measures and all(stage.acts_on_each for stage in self.stages)
        self.keys = _state_keys(self.stages)
        """The key of the state of each stateful member, by its index: its state name, and a number if that recurs."""

    name = "a combinator"

    @property
    def skip_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        """The keys of the members' states that say whether to call the step off."""
        return tuple(self.path(i) + key for i in self.keys for key in self.stages[i].skip_keys)

    def shares(self, key: str) -> bool:
        """Whether the value under ``key`` is the same for all tensors, which the member that has the key says."""
        members = [(self.stages[index], self.path(index)) for index in self.keys]
        return any(key.startswith(path) and stage.shares(key[len(path) :]) for stage, path in members)

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """Return the averages of ``param`` that the members keep in ``state``."""
        members = [(self.stages[index], below(state, self.path(index))) for index in self.keys]
        return [average for stage, own in members for average in stage.averages(own, param)]

    def path(self, index: int) -> str:
        """Return how the keys of a member's state begin."""
        return f"{self.keys.get(index, f'#{index}')}."

    def functions(self) -> Iterable[Callable[..., Any]]:
        """Return the functions of all members."""
        return [function for stage in self.stages for function in stage.functions()]

    def after_skip(self, state: State) -> None:
        """Let each member raise if the step should not have been called off."""
        for index in self.keys:
            self.stages[index].after_skip(below(state, self.path(index)))

    @property
    def state_name(self) -> str:
        """The name of the kind of combinator."""
        return self.name

    @abstractmethod
    def rebuild(self, members: Sequence[Transform]) -> Combinator:
        """Return the same combinator with other members."""

    def replaced(self, change: Callable[[BoundTransform], BoundTransform]) -> Stage:
        """Return the same combinator with changed members, or itself if nothing changes."""
        members = [member.replaced(change) if isinstance(member, Stage) else member for member in self.members]
        return self if all(map(is_, members, self.members)) else self.rebuild(members)

    def place(self, index: int) -> str:
        """Return the words that say where a member is."""
        return f"stage {index}, {show(self.members[index])}"

    def places(self) -> list[tuple[str, Stage]]:
        """Return the members, each with the words that say where it is."""
        return [(self.place(index), stage) for index, stage in enumerate(self.stages)]

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """Return what the members act on; see ``Stage.units``."""
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
            keys[index] = free_name(stage.state_name, keys.values())
    return keys


def below(state: State, path: str) -> State:
    """Return the part of a state whose keys begin with ``path``, under keys without ``path``."""
    return {key[len(path) :]: value for key, value in state.items() if key.startswith(path)}


def beneath(state: State, path: str) -> State:
    """Return ``state`` as a part of another state: under keys that begin with ``path``."""
    return {path + key: value for key, value in state.items()}


def as_stage(transform: Transform) -> Stage:
    """Return ``transform`` itself, or a plain callable as a stage."""
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
    if isinstance(value, type):
        raise TypeError(f"{place} must be a callable (tensor, group) -> tensor, got the class {show(value)}")
    if not isinstance(value, Stage):
        if hasattr(value, "definition"):
            raise TypeError(f"{place} is the factory {show(value)}, not a transform; call it: {show(value)}(...)")
        require_signature(value, place)
    return cast("Transform", value)
