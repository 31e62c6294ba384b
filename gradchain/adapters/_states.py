"""The states of the transforms of an optimizer, and the parameters that they belong to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gradchain.adapters._construction import describe
from gradchain.transform import Group, Stage, State, show

ByParam: TypeAlias = dict[Tensor, State]

KEY = "transforms"
"""Where, in the state of a parameter, the states of the transforms are, by slot."""


class Member(NamedTuple):
    """A parameter, in its place."""

    param: Tensor
    group: Group
    position: tuple[int, int]
    number: int

    @property
    def grad(self) -> Tensor:
        """The gradient, where there is one."""
        assert self.param.grad is not None
        return self.param.grad

    def grad_context(self) -> Group:
        """The gradient as context for a transform; none where it is missing or sparse."""
        grad = self.param.grad
        return {} if grad is None or grad.layout is not torch.strided else {"grad": grad.detach()}

    def identity(self, slot: str) -> Group:
        """What tells a transform where it acts, and on which parameter."""
        names = self.group.get("param_names")
        name = {"name": names[self.position[1]]} if names else {}
        return {"slot": slot, "index": self.number, "shape": tuple(self.param.shape), **name}

    def place(self) -> str:
        """The words that say where the parameter is."""
        return describe(self.position[0], self.group, self.position[1])


class TransformStates:
    """The state of each slot, for each parameter."""

    def __init__(self, by_param: ByParam | None = None) -> None:
        self.by_param: ByParam = {} if by_param is None else by_param

    def start(self, slot: str, stage: Stage, members: Iterable[Member]) -> None:
        """Make the first states of those that have none."""
        if stage.stateful:
            for member in members:
                states = self.by_param.setdefault(member.param, {})
                if slot not in states:
                    states[slot] = own(first_state(slot, stage, member), member.param)

    def get(self, slot: str, members: Iterable[Member]) -> list[State]:
        """The states of a slot, in the order of ``members``; empty for a slot without any."""
        return [self.by_param.get(member.param, {}).get(slot, {}) for member in members]

    def commit(self, new_states: Mapping[str, ByParam]) -> None:
        """Take over new states, by slot."""
        for slot, by_param in new_states.items():
            for param, state in by_param.items():
                if state:
                    self.by_param[param][slot] = state

    def show_in(self, inner_opt: Optimizer, params: Iterable[Tensor] | None = None) -> None:
        """Put the states into those of the inner optimizer too: of ``params``, or of all that have a gradient.

        Not before the inner optimizer has seen a gradient: many make their own state only where there is none.
        """
        known = [param for param in self.by_param if param.grad is not None] if params is None else params
        for param in known:
            if param in self.by_param:
                inner_opt.state[param][KEY] = self.by_param[param]

    def keep_those_in(self, inner_state: Mapping[Tensor, Any]) -> None:
        """Drop the states of parameters that are not shown in ``inner_state``, such as one that was reset."""
        self.by_param = {p: s for p, s in self.by_param.items() if KEY in inner_state.get(p, {})}

    def add_to(self, state_dict: dict[str, Any], members: Sequence[Member]) -> None:
        """Put the states into a state dict of the inner optimizer."""
        for key, param in _keyed_params(state_dict, members):
            if param in self.by_param:
                state_dict["state"][key] = {**state_dict["state"].get(key, {}), KEY: self.by_param[param]}

    @staticmethod
    def split(state_dict: dict[str, Any], members: Sequence[Member]) -> tuple[TransformStates, dict[str, Any]]:
        """Take the states out of a state dict, which the inner optimizer would cast to the dtype of the parameter."""
        by_param, bare = {}, {}
        params = dict(_keyed_params(state_dict, members))
        for key, state in state_dict["state"].items():
            has_own = isinstance(state, dict) and KEY in state
            if has_own and key in params:
                by_param[params[key]] = _copy_to(state[KEY], params[key].device)
                state = {name: value for name, value in state.items() if name != KEY}
            if state or not has_own:
                bare[key] = state
        return TransformStates(by_param), {**state_dict, "state": bare}

    def averages(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have an average in ``post``, with it."""
        found = [(param, _find(states.get("post", {}), "average")) for param, states in self.by_param.items()]
        if any(len(states) > 1 for _, states in found):
            raise ValueError("post keeps two averages of a parameter; leave one of param_ema and lookahead")
        return [(param, states[0]["average"]) for param, states in found if states]

    def raise_if_skipped(self, new_states: ByParam) -> None:
        """Raise ``SkippedStep`` if a transform of ``pre`` says that this step must not be made."""
        flags = [found for state in new_states.values() for found in _find(state, "skip_step")]
        # Gathered on one device, so that the host waits once, and not for each parameter.
        if flags and bool(torch.stack([f["skip_step"].to(flags[0]["skip_step"].device) for f in flags]).any()):
            kept = {param: _counted(self.by_param[param]["pre"], state) for param, state in new_states.items()}
            raise SkippedStep(kept, flags)

    @staticmethod
    def can_skip(states: Iterable[State]) -> bool:
        """Whether there is a transform that can skip a step."""
        return any(_find(state, "skip_step") for state in states)

    def require_form(self, slot: str, stage: Stage, members: Iterable[Member]) -> None:
        """Raise where a state has not the form that ``stage`` gives it."""
        for member in members:
            state = self.by_param.get(member.param, {}).get(slot)
            if state is not None and _form(state) != _form(first_state(slot, stage, member)):
                raise ValueError(
                    f"{slot}, {member.place()}: the loaded state is not one of {show(stage)}, but of other transforms "
                    "or another shape; load it into an optimizer with the chain that it was saved from"
                )

    def copy_beside(self, inner_state: Any) -> Any:
        """A copy of the state of the inner optimizer, with the same parameters and these states."""
        kept = [*inner_state, *self.by_param, *self.by_param.values()]
        return copy.deepcopy(inner_state, {id(value): value for value in kept})


def first_state(slot: str, stage: Stage, member: Member) -> State:
    """The state of a parameter before its first step."""
    param = member.param.detach()
    return stage.init(param, {**member.group, **member.identity(slot), "param": param})


class SkippedStep(Exception):  # noqa: N818 # not an error: it ends the inner step
    """Raised through the inner step when a transform says that the step must not be made."""

    def __init__(self, states: ByParam, flags: Sequence[State]) -> None:
        self.states = states
        self.flags = flags
        self.loss: Any = None
        self.inner_state: Any = None

    def raise_if_too_many(self) -> None:
        """Raise a ``RuntimeError`` if more steps in a row were skipped than the transform allows."""
        steps = [int(flag["in_a_row"]) for flag in self.flags if bool(flag["too_many"])]
        if steps:
            raise RuntimeError(
                f"pre: {max(steps)} steps in a row were skipped, more than allowed; look at the gradients, lower the "
                "learning rate, or raise the limit of the transform that skips"
            )


def _keyed_params(state_dict: Mapping[str, Any], members: Sequence[Member]) -> list[tuple[Any, Tensor]]:
    """The key of each parameter in ``state_dict``, which lists them in the same order."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return list(zip(keys, (member.param for member in members), strict=False))


def _find(state: State, key: str) -> list[State]:
    """The dicts within ``state`` that have ``key``."""
    if key in state:
        return [state]
    return [found for value in state.values() if isinstance(value, dict) for found in _find(value, key)]


def _counted(old: State, new: State) -> State:
    """``old``, but what counts skipped steps from ``new``."""
    if "skip_step" in new:
        return new
    return {key: _counted(old[key], new[key]) if isinstance(new[key], dict) else old[key] for key in old}


def own(state: State, param: Tensor) -> State:
    """``state``, without sharing memory with the parameter or its gradient, which are written to in place."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (param, param.grad) if _has_storage(tensor)}
    owned: State = _map(
        state, lambda v: v.clone() if _has_storage(v) and v.untyped_storage().data_ptr() in inputs else v
    )
    return owned


def _has_storage(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.layout is torch.strided and type(tensor) in (Tensor, Parameter)


def _form(state: State) -> Any:
    return _map(state, lambda value: (tuple(value.shape), value.dtype))


def _map(state: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(state, dict):
        return {key: _map(value, function) for key, value in state.items()}
    return function(state)


def _copy_to(state: Any, device: torch.device) -> Any:
    """A copy of ``state`` on ``device``, each tensor with its dtype."""
    return _map(state, lambda value: value.to(device, copy=True))
