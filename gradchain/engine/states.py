"""The states of the transforms of an optimizer, and the parameters that they belong to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradchain._sharding import gather_anew
from gradchain.chain import Chain
from gradchain.contract import Group, State, locate, show
from gradchain.engine.groups import describe
from gradchain.engine.names import Names
from gradchain.engine.operations import without_aliases
from gradchain.stage import Stage, below, beneath

ByParam: TypeAlias = dict[Tensor, State]

SLOTS = ("pre", "update", "post")

KEY = "transforms"
"""The key under which the state of a parameter has those of the transforms, whose own keys begin with the slot."""


class ParamEntry(NamedTuple):
    """A parameter of an optimizer, with its group and where it is in it."""

    param: Tensor
    group: Group
    position: tuple[int, int]
    number: int
    model_name: str | None = None
    """The name of the parameter in the model that the optimizer knows."""

    def own_keys(self, slot: str) -> Group:
        """Return the keys that tell a transform where it acts, and on which parameter."""
        name = {} if self.name is None else {"name": self.name}
        return {"slot": slot, "index": self.number, "shape": tuple(self.param.shape), **name}

    def context(self, slot: str) -> Group:
        """Return the group of the parameter, with the keys that tell a transform where it acts."""
        return {**self.group, **self.own_keys(slot)}

    @property
    def name(self) -> str | None:
        """The name of the parameter in the model, or else the one given to the optimizer, if there is one."""
        names = self.group.get("param_names")
        return self.model_name or (names[self.position[1]] if names else None)

    def place(self) -> str:
        """Return the words that say where the parameter is."""
        return describe(self.position[0], self.group, self.position[1], self.name)


class ParamTable:
    """The parameters of an optimizer, as long as they are the same, and what its groups held in the last step."""

    def __init__(self, param_groups: Sequence[Group], names: Names) -> None:
        self.groups = list(param_groups)
        self._lists = [list(group["params"]) for group in param_groups]
        self._contents: list[tuple[list[str], list[Any]]] = []
        """The keys and the values of each group, as last noted."""
        located = [(p, group, (g, i)) for g, group in enumerate(param_groups) for i, p in enumerate(group["params"])]
        self.params = [param for param, _, _ in located]
        known = names.of(self.params)
        self.entries = [
            ParamEntry(param, group, position, number, known.get(param))
            for number, (param, group, position) in enumerate(located)
        ]

    def is_of(self, param_groups: Sequence[Group]) -> bool:
        """Whether the table lists the parameters in ``param_groups``."""
        if len(param_groups) != len(self.groups):
            return False
        for group, known, params in zip(param_groups, self.groups, self._lists, strict=True):
            now = group["params"]
            if group is not known or len(now) != len(params) or not all(map(is_, now, params)):
                return False
        return True

    def note_contents(self) -> None:
        """Remember what the groups hold."""
        self._contents = [(list(group), list(group.values())) for group in self.groups]

    def has_same_contents(self) -> bool:
        """Whether the groups hold the very objects, under the very keys, as at the last ``note_contents``."""
        if not self._contents:
            return False
        for group, (keys, values) in zip(self.groups, self._contents, strict=True):
            if list(group) != keys or not all(map(is_, group.values(), values)):
                return False
        return True


class TransformStates:
    """The state of each slot, for each parameter."""

    def __init__(self, by_param: ByParam | None = None) -> None:
        self.by_param: ByParam = {} if by_param is None else by_param
        self.new: dict[Tensor, None] = {}
        """The parameters whose states have not been in a step yet."""
        self._shown: dict[Tensor, None] = {}
        self._fitted: dict[Tensor, dict[str, Any]] = {}
        """What a parameter was like when its state of a slot was made, or found to fit."""
        self._seen: tuple[list[Tensor], list[State | None]] = [], []
        """The parameters that the inner optimizer has a state of, and the states of transforms in it, as last shown."""

    def copy(self) -> TransformStates:
        """Return the same states in other tensors, to go on with apart from the optimizer."""
        return TransformStates({param: _map(state, Tensor.clone) for param, state in self.by_param.items()})

    def start(self, slot: str, stage: Chain, entries: Iterable[ParamEntry]) -> None:
        """Make the first states of parameters that have none, and of stages that have joined the chain since.

        If a parameter has got another dtype, its states get the dtypes with which they would be made now.
        """
        if not stage.stateful:
            return
        for entry in entries:
            param, states = entry.param, self.by_param.setdefault(entry.param, {})
            form = param.shape, param.dtype, entry.group.get("param_ndim"), stage
            if self._fitted.get(param, {}).get(slot) == form:
                continue
            first = without_aliases(first_state(slot, stage, entry), param.detach())
            known = {key: value for key, value in states.items() if key in first}
            if not known:
                self.new[param] = None
            if any(value.shape != first[key].shape for key, value in known.items()):
                raise ValueError(
                    f"{slot}, {entry.place()}: the state of {show(stage)} is for a parameter of another shape; change "
                    f'the tensors in state[param]["{KEY}"] too, or del state[param]["{KEY}"] to start anew'
                )
            states |= {key: known[key].to(value.dtype) if key in known else value for key, value in first.items()}
            self._fitted.setdefault(param, {})[slot] = form

    def begin(self, slot: str, stage: Chain, entries: Iterable[ParamEntry]) -> None:
        """Make the first states that depend on where a parameter starts, for parameters that have none of these."""
        early = tuple(f"{slot}.{stage.path(index)}" for index in stage.keys if stage.stages[index].starts_early)
        for entry in entries if early else ():
            states = self.by_param.setdefault(entry.param, {})
            if any(key.startswith(early) for key in states):
                continue
            try:
                first = without_aliases(first_state(slot, stage, entry), entry.param.detach())
            except Exception as error:
                locate(error, f"{slot}, {entry.place()}")
                raise
            if not states:
                self.new[entry.param] = None
            states |= {key: value for key, value in first.items() if key.startswith(early)}

    def share_with(self, inner_opt: Optimizer, params: Iterable[Tensor] | None = None) -> None:
        """Put states into the state of the inner optimizer, too: of ``params``, or of all parameters with a gradient.

        States wait for a gradient, because many optimizers make their own state only if the parameter has none yet.
        """
        if params is None and (not self.by_param or self._is_as_seen(inner_opt)):
            return
        known = [param for param in self.by_param if param.grad is not None] if params is None else params
        for param in known:
            # ZeroRedundancyOptimizer has None for what other processes have.
            if param in self.by_param and inner_opt.state.get(param, {}) is not None:
                inner_opt.state[param][KEY] = self.by_param[param]
                self._shown[param] = None
        if params is None and all(isinstance(state, dict) for state in inner_opt.state.values()):
            self._seen = list(inner_opt.state), [state.get(KEY) for state in inner_opt.state.values()]

    def _is_as_seen(self, inner_opt: Optimizer) -> bool:
        """Whether the inner optimizer still has all states as shown, without the time of a look-up for each."""
        params, own = self._seen
        known = inner_opt.state
        if len(self._shown) != len(self.by_param) or len(known) != len(params) or not all(map(is_, known, params)):
            return False
        try:
            return all(map(is_, map(dict.get, known.values(), repeat(KEY)), own))
        except TypeError:  # a state that is no dict
            return False

    @property
    def are_shown(self) -> bool:
        """Whether the inner optimizer has the states of all parameters that have a gradient."""
        return all(param in self._shown for param in self.by_param if param.grad is not None)

    def take_over_from(self, inner_opt: Optimizer) -> bool:
        """Take over states that others have replaced or removed in the inner optimizer; return whether any were."""
        if self._is_as_seen(inner_opt):
            return False
        found = {param: inner_opt.state.get(param, {}).get(KEY) for param in self._shown}
        changed = {param: state for param, state in found.items() if state is not self.by_param.get(param)}
        for param, state in changed.items():
            self._fitted.pop(param, None)
            if state is None:
                self.by_param.pop(param, None)
                del self._shown[param]
            else:
                self.by_param[param] = state
        return bool(changed)

    def adopt(self, inner_opt: Optimizer, params: Iterable[Tensor]) -> None:
        """Take up states that the inner optimizer has for ``params``, moved there from parameters that they replace."""
        for param in params:
            state = inner_opt.state.get(param) if param not in self.by_param else None
            if isinstance(state, dict) and KEY in state:
                self.by_param[param] = state[KEY]
                self._fitted.pop(param, None)
                self._shown[param] = None

    def add_to(self, state_dict: dict[str, Any], entries: Sequence[ParamEntry]) -> None:
        """Put the states into a state dict of the inner optimizer."""
        if "param_groups" not in state_dict:  # a state dict with a form of its own
            state_dict[KEY] = {m.number: self.by_param[m.param] for m in entries if m.param in self.by_param}
            return
        for key, param in _keyed_params(state_dict, entries):
            if param in self.by_param:
                state_dict["state"][key] = {**state_dict["state"].get(key, {}), KEY: self.by_param[param]}

    @staticmethod
    def split(state_dict: dict[str, Any], entries: Sequence[ParamEntry]) -> tuple[TransformStates, dict[str, Any]]:
        """Take the states out of a state dict, since the inner optimizer would cast them to the parameter's dtype."""
        by_param, bare = {}, {}
        if "param_groups" not in state_dict:
            by_param = {m.param: state_dict[KEY][m.number] for m in entries if m.number in state_dict.get(KEY, {})}
            by_param = {param: _copy_to(state, param.device) for param, state in by_param.items()}
            return TransformStates(by_param), {key: value for key, value in state_dict.items() if key != KEY}
        params = dict(_keyed_params(state_dict, entries))
        for key, state in state_dict["state"].items():
            has_own = isinstance(state, dict) and KEY in state
            if has_own and key in params:
                by_param[params[key]] = _copy_to(state[KEY], params[key].device)
                state = {name: value for name, value in state.items() if name != KEY}
            if state or not has_own:
                bare[key] = state
        return TransformStates(by_param), {**state_dict, "state": bare}

    @contextmanager
    def averaged(self, post: Chain) -> Iterator[None]:
        """Give the parameters, within the ``with`` block, the averages that ``post`` keeps of them."""
        averages = {}
        for param, states in self.by_param.items():
            found = post.averages(below(states, "post."), param.detach())
            if len(found) > 1:
                raise ValueError("post keeps two averages of a parameter; leave one of param_ema and lookahead")
            if found:
                averages[param] = found[0]
        if not averages and not post.keeps_average:
            raise ValueError(f"post keeps no average; put param_ema or lookahead into it, got post={show(post)}")
        current = {param: param.detach().clone() for param in averages}
        try:
            _write(averages)
            yield
        finally:
            _write(current)

    def of(self, entry: ParamEntry) -> State:
        """Return the states of a parameter, which are empty if it has none."""
        return self.by_param.get(entry.param, {})

    def require_fit(self, stages: Mapping[str, Stage], entries: Iterable[ParamEntry]) -> None:
        """Raise if a state does not belong to the transforms in ``stages``, which are by slot."""
        for entry in entries:
            states = self.by_param.get(entry.param, {})
            slots = {str(key).partition(".")[0] for key in states} if isinstance(states, dict) else set()
            if not isinstance(states, dict) or not slots <= stages.keys():
                raise ValueError(
                    f"{entry.place()}: the loaded states must be a dict with keys that begin with the slots "
                    f"{list(stages)}, got {list(states) if isinstance(states, dict) else states!r}"
                )
            for slot in sorted(slots):
                try:
                    _require_like(below(states, f"{slot}."), below(first_state(slot, stages[slot], entry), f"{slot}."))
                except ValueError as error:
                    locate(error, f"{slot}, {entry.place()}: the loaded state is not one of {show(stages[slot])}")
                    raise

    @staticmethod
    def taken_out_of(inner_opt: Optimizer) -> TransformStates:
        """Remove the states that an optimizer has loaded among its own, and return them."""
        by_param: ByParam = {}
        for param, state in list(inner_opt.state.items()):
            if isinstance(state, dict) and KEY in state:
                by_param[param] = state.pop(KEY)
                if not state:
                    del inner_opt.state[param]
        return TransformStates(by_param)

    @torch.no_grad()
    def keep_fitting(self, slot: str, stage: Chain, entries: Iterable[ParamEntry]) -> tuple[set[str], set[str]]:
        """Keep the states of a slot that belong to a transform of the chain, in the dtypes that it gives them.

        Return how the keys begin of states that are dropped, and of states that have lost digits in another dtype.
        """
        dropped, rounded = set(), set()
        for entry in entries:
            states = self.by_param.get(entry.param, {})
            known = {key: value for key, value in states.items() if key.startswith(f"{slot}.")}
            first = first_state(slot, stage, entry) if known else {}
            for path in {key.rpartition(".")[0] for key in known}:
                mine, wanted = below(known, f"{path}."), below(first, f"{path}.")
                if mine.keys() != wanted.keys() or not all(_has_shape(mine[key], wanted[key].shape) for key in wanted):
                    dropped.add(path)
                    for key in mine:
                        del states[f"{path}.{key}"]
                    continue
                if any(_is_rounded(mine[key], wanted[key]) for key in wanted):
                    rounded.add(path)
                states |= beneath({key: value.to(wanted[key].dtype) for key, value in mine.items()}, f"{path}.")
        return dropped, rounded

    def copy_beside(self, inner_state: Any) -> Any:
        """Return a copy of the inner optimizer's state, with the very same parameters and states of transforms."""
        kept = [*inner_state, *self.by_param, *self.by_param.values()]
        return copy.deepcopy(inner_state, {id(value): value for value in kept})


def first_state(slot: str, stage: Stage, entry: ParamEntry) -> State:
    """Return the first states of a slot for a parameter."""
    param = entry.param.detach()
    return beneath(stage.init(param, {**entry.group, **entry.own_keys(slot), "param": param}), f"{slot}.")


def _keyed_params(state_dict: Mapping[str, Any], entries: Sequence[ParamEntry]) -> list[tuple[Any, Tensor]]:
    """Return the key of each parameter in ``state_dict``, which lists them in the same order, with the parameter."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return list(zip(keys, (entry.param for entry in entries), strict=False))


@torch.no_grad()
def _write(values: Mapping[Tensor, Tensor]) -> None:
    for param, value in values.items():
        param.copy_(value)
    gather_anew(values)


def _require_like(state: State, expected: State) -> None:
    """Raise if ``state`` has other keys than ``expected``, or tensors of other shapes or kinds."""
    if state.keys() != expected.keys():
        raise ValueError(
            f"it needs the keys {sorted(expected)}, got {sorted(state)}; load it into an optimizer with the chain that "
            "it was saved from"
        )
    for key, first in expected.items():
        value: Any = state[key]
        # The dtype may differ, since a state that all parameters share has the dtype of the first.
        if not isinstance(value, Tensor) or _kind(value) != _kind(first):
            got = f"one of shape {_kind(value)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{key!r} must be a tensor of shape {_kind(first)}, got {got}")


def _has_shape(value: object, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _is_rounded(value: Tensor, expected: Tensor) -> bool:
    """Whether ``value``, in a dtype with fewer digits, can have lost some."""
    exact = expected.dtype if expected.is_floating_point() else torch.float32  # whole numbers up to 2**24
    return value.is_floating_point() and torch.finfo(value.dtype).eps > torch.finfo(exact).eps


def _kind(tensor: Tensor) -> str:
    kind = "floating-point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"
    return f"{tuple(tensor.shape)}, {kind}"


def _map(state: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return ``state`` with ``function(tensor)`` for each tensor, or itself if it is no dict, as in a damaged file."""
    if not isinstance(state, dict):
        return state
    return {key: function(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def _copy_to(state: Any, device: torch.device) -> Any:
    """Return a copy of ``state`` on ``device``, each tensor with its dtype."""
    return _map(state, lambda value: value.to(device, copy=True))
