"""The states of the transforms of an optimizer, and the parameters that they belong to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradchain._sharding import gather_anew
from gradchain.adapters._construction import describe
from gradchain.adapters._names import Names
from gradchain.adapters._plan import map_state, own
from gradchain.broadcast import Broadcast
from gradchain.chain import Chain
from gradchain.masked import Masked
from gradchain.transform import Combinator, Each, Group, Stage, State, locate, show

ByParam: TypeAlias = dict[Tensor, State]

KEY = "transforms"
"""Where, in the state of a parameter, the states of the transforms are, by slot."""


class Member(NamedTuple):
    """A parameter, in its place."""

    param: Tensor
    group: Group
    position: tuple[int, int]
    number: int
    model_name: str | None = None
    """Its name in the model that the optimizer knows."""

    @property
    def grad(self) -> Tensor:
        """The gradient, where there is one."""
        assert self.param.grad is not None
        return self.param.grad

    def identity(self, slot: str) -> Group:
        """What tells a transform where it acts, and on which parameter."""
        name = {} if self.name is None else {"name": self.name}
        return {"slot": slot, "index": self.number, "shape": tuple(self.param.shape), **name}

    def context(self, slot: str) -> Group:
        """Its group, and what tells a transform where it acts."""
        return {**self.group, **self.identity(slot)}

    @property
    def name(self) -> str | None:
        """Its name in the model, or else the one with which it was given to the optimizer, if there is one."""
        names = self.group.get("param_names")
        return self.model_name or (names[self.position[1]] if names else None)

    def place(self) -> str:
        """The words that say where the parameter is."""
        return describe(self.position[0], self.group, self.position[1], self.name)


class Roster:
    """The parameters of an optimizer, as long as they are the same."""

    def __init__(self, param_groups: Sequence[Group], names: Names) -> None:
        self.groups = list(param_groups)
        self._lists = [(group, list(group["params"])) for group in param_groups]
        located = [(p, group, (g, i)) for g, group in enumerate(param_groups) for i, p in enumerate(group["params"])]
        self.params = [param for param, _, _ in located]
        known = names.of(self.params)
        self.members = [
            Member(param, group, position, number, known.get(param))
            for number, (param, group, position) in enumerate(located)
        ]

    def is_of(self, param_groups: Sequence[Group]) -> bool:
        """Whether these are the parameters in ``param_groups``."""
        return len(param_groups) == len(self._lists) and all(
            group is known and len(group["params"]) == len(params) and all(map(is_, group["params"], params))
            for group, (known, params) in zip(param_groups, self._lists, strict=True)
        )


class Tensors:
    """The parameters and their gradients, as they are at one moment of a step."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.grads = [param.grad for param in params]
        self.has_usual_grads = _are_usual(self.grads)
        self.form = self._look()

    def _look(self) -> Any:
        """All of them that a plan depends on. It is asked for in every step, and so by calls that take no frame."""
        grads = (
            list(map(_DTYPE, self.grads))
            if self.has_usual_grads
            else [None if g is None else (g.layout, g.dtype, g.is_contiguous()) for g in self.grads]
        )
        # A gradient that its parameter would not take any more is that of before ``param.data`` was replaced.
        params = self.params
        return (
            list(map(_SHAPE, params)),
            list(map(_DTYPE, params)),
            list(map(Tensor.get_device, params)),
            list(map(Tensor.is_contiguous, params)),
            list(map(type, params)),
            grads,
        )


_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


def _are_usual(grads: Sequence[Any]) -> bool:
    """Whether there are all, contiguous; so written that each is then looked at once."""
    try:
        return all(map(Tensor.is_contiguous, grads))  # which sparse ones never are
    except TypeError:
        return False


class TransformStates:
    """The state of each slot, for each parameter."""

    def __init__(self, by_param: ByParam | None = None) -> None:
        self.by_param: ByParam = {} if by_param is None else by_param
        self.new: dict[Tensor, None] = {}
        """The parameters whose states have not been in a step yet."""
        self._shown: dict[Tensor, None] = {}
        self._fitted: dict[tuple[Tensor, str], Any] = {}
        """What a parameter was like when its state of a slot was made, or found to fit."""

    def copy(self) -> TransformStates:
        """The same states in other tensors, to go on with apart from the optimizer."""
        return TransformStates({param: map_state(state, Tensor.clone) for param, state in self.by_param.items()})

    def start(self, slot: str, stage: Chain, members: Iterable[Member]) -> None:
        """Make the first states of those that have none, or none of stages that the chain has got since.

        The states of a parameter that has another dtype than they were made for get the dtypes that they would be made
        with now.
        """
        if not stage.stateful:
            return
        needed = set(stage.keys.values())
        for member in members:
            param, states = member.param, self.by_param.setdefault(member.param, {})
            known = states.get(slot, {})
            form = param.shape, param.dtype, member.group.get("param_ndim")
            if needed <= known.keys() and self._fitted.get((param, slot)) == form:
                continue
            first = own(first_state(slot, stage, member), param.detach())
            if not known:
                self.new[param] = None
            elif _shapes({**first, **known}) != _shapes({**known, **first}):
                raise ValueError(
                    f"{slot}, {member.place()}: the state of {show(stage)} is for a parameter of another shape; change "
                    f'the tensors in state[param]["{KEY}"] too, or del state[param]["{KEY}"] to start anew'
                )
            states[slot] = {**first, **_cast(known, first)}
            self._fitted[param, slot] = form

    def begin(self, slot: str, stage: Chain, members: Iterable[Member]) -> None:
        """Make the first states of the stages that depend on where a parameter starts, of those that have none."""
        early = {key for index, key in stage.keys.items() if stage.stages[index].starts_early}
        for member in members:
            states = self.by_param.setdefault(member.param, {})
            known = states.get(slot, {})
            if not early <= known.keys():
                try:
                    first = own(first_state(slot, stage, member), member.param.detach())
                except Exception as error:
                    locate(error, f"{slot}, {member.place()}")
                    raise
                if not known:
                    self.new[member.param] = None
                states[slot] = {**{key: first[key] for key in early}, **known}

    def show_in(self, inner_opt: Optimizer, params: Iterable[Tensor] | None = None) -> None:
        """Put the states into those of the inner optimizer too: of ``params``, or of all that have a gradient.

        Not before the inner optimizer has seen a gradient: many make their own state only where there is none.
        """
        known = [param for param in self.by_param if param.grad is not None] if params is None else params
        for param in known:
            # ZeroRedundancyOptimizer has None for what other processes have.
            if param in self.by_param and inner_opt.state.get(param, {}) is not None:
                inner_opt.state[param][KEY] = self.by_param[param]
                self._shown[param] = None

    @property
    def are_shown(self) -> bool:
        """Whether the inner optimizer has those of all parameters that have a gradient."""
        return all(param in self._shown for param in self.by_param if param.grad is not None)

    def follow(self, inner_opt: Optimizer) -> bool:
        """Take over what others made of the states that are shown: moved, or reset. Whether there was any."""
        found = {param: inner_opt.state.get(param, {}).get(KEY) for param in self._shown}
        changed = {param: state for param, state in found.items() if state is not self.by_param.get(param)}
        for param, state in changed.items():
            if state is None:
                self._drop(param)
            else:
                self._take(param, state)
        return bool(changed)

    def adopt(self, inner_opt: Optimizer, params: Iterable[Tensor]) -> None:
        """Take up the states that ``params`` have in the inner optimizer: moved there from those that they replace."""
        for param in params:
            state = inner_opt.state.get(param) if param not in self.by_param else None
            if isinstance(state, dict) and KEY in state:
                self._take(param, state[KEY])
                self._shown[param] = None

    def _drop(self, param: Tensor) -> None:
        for slot in self.by_param.pop(param, {}):
            self._fitted.pop((param, slot), None)
        self._shown.pop(param, None)

    def _take(self, param: Tensor, state: State) -> None:
        self.by_param[param] = state
        for slot in state:
            self._fitted.pop((param, slot), None)

    def add_to(self, state_dict: dict[str, Any], members: Sequence[Member]) -> None:
        """Put the states into a state dict of the inner optimizer."""
        if "param_groups" not in state_dict:  # it has a form of its own
            state_dict[KEY] = {m.number: self.by_param[m.param] for m in members if m.param in self.by_param}
            return
        for key, param in _keyed_params(state_dict, members):
            if param in self.by_param:
                state_dict["state"][key] = {**state_dict["state"].get(key, {}), KEY: self.by_param[param]}

    @staticmethod
    def split(state_dict: dict[str, Any], members: Sequence[Member]) -> tuple[TransformStates, dict[str, Any]]:
        """Take the states out of a state dict, which the inner optimizer would cast to the dtype of the parameter."""
        by_param, bare = {}, {}
        if "param_groups" not in state_dict:
            by_param = {m.param: state_dict[KEY][m.number] for m in members if m.number in state_dict.get(KEY, {})}
            by_param = {param: _copy_to(state, param.device) for param, state in by_param.items()}
            return TransformStates(by_param), {key: value for key, value in state_dict.items() if key != KEY}
        params = dict(_keyed_params(state_dict, members))
        for key, state in state_dict["state"].items():
            has_own = isinstance(state, dict) and KEY in state
            if has_own and key in params:
                by_param[params[key]] = _copy_to(state[KEY], params[key].device)
                state = {name: value for name, value in state.items() if name != KEY}
            if state or not has_own:
                bare[key] = state
        return TransformStates(by_param), {**state_dict, "state": bare}

    @contextmanager
    def averaged(self, post: Chain, members: Iterable[Member]) -> Iterator[None]:
        """Within the ``with`` block, give the parameters the averages that ``post`` keeps of them."""
        found = {param: _averages(post, states.get("post", {}), param) for param, states in self.by_param.items()}
        if any(len(averages) > 1 for averages in found.values()):
            raise ValueError("post keeps two averages of a parameter; leave one of param_ema and lookahead")
        averages = {param: each[0] for param, each in found.items() if each}
        if not averages and not any(_keeps_average(post, member.group) for member in members):
            raise ValueError(f"post keeps no average; put param_ema or lookahead into it, got post={show(post)}")
        current = {param: param.detach().clone() for param in averages}
        try:
            _write(averages)
            yield
        finally:
            _write(current)

    def of(self, slot: str, member: Member) -> State:
        """The state of a slot; empty for one without any."""
        state: State = self.by_param.get(member.param, {}).get(slot, {})
        return state

    def require_fit(self, stages: Mapping[str, Stage], members: Iterable[Member]) -> None:
        """Raise where a state is not one of the transforms in ``stages``, by slot."""
        for member in members:
            states = self.by_param.get(member.param, {})
            if not isinstance(states, dict) or not states.keys() <= stages.keys():
                raise ValueError(
                    f"{member.place()}: the loaded states must be a dict with the slots {list(stages)}, "
                    f"got {list(states) if isinstance(states, dict) else states!r}"
                )
            for slot, state in states.items():
                try:
                    _require_like(state, first_state(slot, stages[slot], member))
                except ValueError as error:
                    locate(error, f"{slot}, {member.place()}: the loaded state is not one of {show(stages[slot])}")
                    raise

    @staticmethod
    def taken_out_of(inner_opt: Optimizer) -> TransformStates:
        """The states that an optimizer has loaded among its own, where they are no more."""
        by_param: ByParam = {}
        for param, state in list(inner_opt.state.items()):
            if isinstance(state, dict) and KEY in state:
                by_param[param] = state.pop(KEY)
                if not state:
                    del inner_opt.state[param]
        return TransformStates(by_param)

    @torch.no_grad()
    def keep_fitting(self, slot: str, stage: Chain, members: Iterable[Member]) -> tuple[set[str], set[str]]:
        """Keep those states of a slot that the chain has a transform for, in the dtypes that it gives them.

        Returns the keys of states that are dropped, and of those that have lost digits in another dtype.
        """
        dropped, rounded = set(), set()
        for member in members:
            states = self.by_param.get(member.param, {})
            if slot not in states:
                continue
            first, known = first_state(slot, stage, member), states[slot]
            states[slot] = {key: _cast(state, first[key]) for key, state in known.items() if key in first}
            misfits = {key for key, state in states[slot].items() if not _is_like(state, first[key])}
            rounded |= {key for key in states[slot].keys() - misfits if _is_rounded(known[key], first[key])}
            for key in misfits:
                del states[slot][key]
            dropped |= known.keys() - states[slot].keys()
            if not states[slot]:
                del states[slot]
        return dropped, rounded

    def copy_beside(self, inner_state: Any) -> Any:
        """A copy of the state of the inner optimizer, with the same parameters and these states."""
        kept = [*inner_state, *self.by_param, *self.by_param.values()]
        return copy.deepcopy(inner_state, {id(value): value for value in kept})


def first_state(slot: str, stage: Stage, member: Member) -> State:
    """The state of a parameter before its first step."""
    param = member.param.detach()
    return stage.init(param, {**member.group, **member.identity(slot), "param": param})


def _keyed_params(state_dict: Mapping[str, Any], members: Sequence[Member]) -> list[tuple[Any, Tensor]]:
    """The key of each parameter in ``state_dict``, which lists them in the same order."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return list(zip(keys, (member.param for member in members), strict=False))


@torch.no_grad()
def _write(values: Mapping[Tensor, Tensor]) -> None:
    for param, value in values.items():
        param.copy_(value)
    gather_anew(values)


@torch.no_grad()
def _averages(stage: Stage, state: State, param: Tensor) -> list[Tensor]:
    """The averages of ``param`` that ``stage`` keeps, with the values of ``param`` where a mask selects nothing."""
    if isinstance(stage, Masked):
        averages = _averages(stage.stages[0], state, param)
        return [stage.mix(average, param) for average in averages]
    if isinstance(stage, Combinator):
        state = {**state, **state.get("inner", {})}  # where with_error_feedback has that of its transform
        below = [(stage.stages[index], state[key]) for index, key in stage.keys.items() if key in state]
        return [average for member, of_it in below for average in _averages(member, of_it, param)]
    return [state["average"]] if "average" in state else []


def _keeps_average(stage: Stage, group: Group) -> bool:
    """Whether there is a transform in ``stage`` that keeps averages, for whatever parameters."""
    if isinstance(stage, Combinator):
        return any(_keeps_average(member, group) for member in stage.stages)
    each = stage.stage if isinstance(stage, Broadcast) else stage
    like = torch.zeros(1)
    identity = {"slot": "post", "index": 0, "shape": (1,)}
    return isinstance(each, Each) and "average" in each.begin(like, {**group, **identity, "param": like})


def _require_like(state: Any, expected: State, *path: str) -> None:
    """Raise where ``state`` does not have the keys of ``expected``, which name transforms too, or such tensors."""
    place = ": ".join([*path, ""])
    if not isinstance(state, dict) or state.keys() != expected.keys():
        raise ValueError(
            f"{place}it needs a dict with the keys {sorted(expected)}, "
            f"got {sorted(map(str, state)) if isinstance(state, dict) else repr(state)}; "
            "load it into an optimizer with the chain that it was saved from"
        )
    for key, first in expected.items():
        value = state[key]
        if isinstance(first, dict):
            _require_like(value, first, *path, key)
        # A state that is one for all parameters has the dtype of the first.
        elif not isinstance(value, Tensor) or _kind(value) != _kind(first):
            got = f"one of shape {_kind(value)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{place}{key!r} must be a tensor of shape {_kind(first)}, got {got}")


def _is_like(state: Any, expected: State) -> bool:
    try:
        _require_like(state, expected)
    except ValueError:
        return False
    return True


def _is_rounded(state: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return any(_is_rounded(state[key], value) for key, value in expected.items())
    exact = expected.dtype if expected.is_floating_point() else torch.float32  # whole numbers up to 2**24
    return bool(state.is_floating_point() and torch.finfo(state.dtype).eps > torch.finfo(exact).eps)


def _kind(tensor: Tensor) -> str:
    kind = "floating-point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"
    return f"{tuple(tensor.shape)}, {kind}"


def _shapes(state: State) -> Any:
    return map_state(state, lambda value: tuple(value.shape))


def _cast(state: Any, like: Any) -> Any:
    """``state``, with each tensor in the dtype that it has in ``like``; itself where it has them already."""
    if not (isinstance(state, dict) and isinstance(like, dict)):
        return state.to(like.dtype) if isinstance(state, Tensor) and isinstance(like, Tensor) else state
    cast = {key: _cast(value, like[key]) if key in like else value for key, value in state.items()}
    return state if all(cast[key] is value for key, value in state.items()) else cast


def _copy_to(state: Any, device: torch.device) -> Any:
    """A copy of ``state`` on ``device``, each tensor with its dtype."""
    return map_state(state, lambda value: value.to(device, copy=True) if isinstance(value, Tensor) else value)
