"""The reference: what the steps of a case give, by Python loops over sub-tensors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from typing import Any, TypeAlias

import torch
from torch import Tensor, tensor
from torch.optim import Optimizer

import gradchain as gc
from gradchain import Group, State
from tests.differential.case import DRAWS, DTYPES, LIBRARY, MEASURES, OWN, SLOTS, WHOLE, Case, Failure, Step, make_inner


@dataclass(frozen=True)
class Leaf:
    """A transform as a function of one tensor."""

    name: str
    transform: Any
    prefix: str = ""
    """That of the keys of its hyperparameters, if it was given one."""

    def named(self, prefix: str) -> Leaf:
        return replace(self, transform=self.transform.named(prefix), prefix=prefix)


@dataclass(frozen=True)
class Node:
    """A combinator with its members and, maybe, what it takes besides."""

    kind: str
    members: tuple[Any, ...]
    argument: Any = None


def _leaf(name: str) -> Callable[..., Leaf]:
    return lambda *args, **kwargs: Leaf(name, LIBRARY[name](*args, **kwargs))


FROM_GROUP = "from group"
LOOPS: dict[str, Any] = {
    **{name: _leaf(name) for name in gc.__all__ if callable(LIBRARY[name])},
    **OWN,
    **{"tensor": tensor, "inf": inf, "remember": _leaf("remember")},
    "chain": lambda *members: Node("chain", members),
    "masked": lambda member, where: Node("masked", (member,), where),
    "freeze": lambda where: Node("masked", (lambda tensor, group: torch.zeros_like(tensor),), where),
    "partition": lambda members, by="name": Node("partition", tuple(members.values()), (tuple(members), by)),
    "broadcast": lambda member, param_ndim=FROM_GROUP: Node("broadcast", (member,), param_ndim),
    "with_error_feedback": lambda member: Node("feedback", (member,)),
}

Tensors: TypeAlias = dict[str, Tensor]
Place: TypeAlias = tuple[Any, ...]


def prefixes_of(node: Any) -> list[str]:
    """The prefixes that the transforms in a tree were given."""
    if isinstance(node, Node):
        return [prefix for member in node.members for prefix in prefixes_of(member)]
    return [node.prefix] if isinstance(node, Leaf) and node.prefix else []


def number(node: Any, used: list[str]) -> Any:
    """A tree in which the transforms of a kind have the prefixes ``"scale"``, ``"scale_2"``, ... that are not used."""
    if isinstance(node, Node):
        return replace(node, members=tuple([number(member, used) for member in node.members]))
    if not isinstance(node, Leaf) or node.prefix or not node.transform.hyperparameters:
        return node
    prefixes = itertools.chain([node.name], (f"{node.name}_{count}" for count in itertools.count(2)))
    used.append(next(prefix for prefix in prefixes if prefix not in used))
    return node.named(used[-1])


class Skipped(Exception):  # noqa: N818
    """A transform wants no step, and has counted it."""

    def __init__(self, place: Place, state: State) -> None:
        super().__init__(place)
        self.place = place
        self.state = state


class Loops:
    """Makes the steps of a case by loops over sub-tensors and a plain optimizer.

    With ``alone``, each parameter that has a gradient makes a step of its own, as in ``step_in_backward``. With
    ``jitter``, every result is off by about that share, which shows what rounding can do to the case.
    """

    def __init__(self, case: Case, *, alone: bool = False, jitter: float = 0.0, seed: int = 0) -> None:
        self.case = case
        self.alone = alone
        self.jitter = jitter
        self.generator = torch.Generator().manual_seed(seed)
        self.params: Tensors = {}
        self.groups: dict[str, Group] = {}
        self.states: dict[Place, State] = {}
        chains = {slot: eval(getattr(case, slot), LOOPS) for slot in SLOTS}
        used = [prefix for node in chains.values() for prefix in prefixes_of(node)]
        self.chains = {slot: number(node, used) for slot, node in chains.items()}
        self.optimizer: Optimizer | None = None
        self.joined = 0
        self.failed = False
        self.skipped = False

    def join(self, number: int) -> None:
        """Add the groups that join before a step."""
        while self.joined < len(self.case.groups) and self.case.groups[self.joined].joins <= number:
            spec = self.case.groups[self.joined]
            for param in spec.params:
                self.params[param.name] = self.case.value(param.name).requires_grad_()
            group = {"params": [self.params[param.name] for param in spec.params], **copy.deepcopy(spec.options)}
            if self.optimizer is None:
                self.optimizer = make_inner(self.case)([group])
            else:
                self.optimizer.add_param_group(group)
            for param in spec.params:
                self.groups[param.name] = self.optimizer.param_groups[-1]
            self.joined += 1

    def step(self, number: int) -> None:
        """Make a step."""
        step = self.case.steps[number]
        if step.event in DTYPES:
            self.convert(getattr(torch, step.event))
        if step.event == "swap" and self.case.keeps_inner_state():
            self.forget_unseen()
        self.join(number)
        assert self.optimizer is not None
        for index, key, value in step.changes:
            self.optimizer.param_groups[index][key] = value
        grads = {name: self.case.value(name, number) for name in self.params if name in step.grads}
        self.failed = self.skipped = False
        for some in [{name: grad} for name, grad in grads.items()] if self.alone else [grads]:
            self._step(some, step)

    def convert(self, dtype: torch.dtype) -> None:
        """Give all parameters another dtype, the optimizer its state of it, and the transforms what they compute in."""
        for param in self.params.values():
            param.grad = None
            param.data = param.data.to(dtype)
        if self.optimizer is not None:
            self.load(self.optimizer.state_dict())
        wide = widen(torch.empty(0, dtype=dtype)).dtype
        self.states = {place: cast(state, wide) for place, state in self.states.items()}

    def forget_unseen(self) -> None:
        """Drop the states of parameters that the optimizer has none of: so they cannot move to new parameters."""
        assert self.optimizer is not None
        unseen = {name for name, param in self.params.items() if not self.optimizer.state.get(param)}
        self.states = {place: state for place, state in self.states.items() if place[-2] not in unseen}

    def load(self, state_dict: Any) -> None:
        """Load a state dict, which replaces the groups."""
        assert self.optimizer is not None
        self.optimizer.load_state_dict(state_dict)
        for group in self.optimizer.param_groups:
            for name, param in self.params.items():
                if any(param is other for other in group["params"]):
                    self.groups[name] = group

    def _step(self, grads: Tensors, step: Step) -> None:
        assert self.optimizer is not None
        acting = list(grads) if self.alone else list(self.params)
        before = {name: param.detach().clone() for name, param in self.params.items()}
        states, inner_state = dict(self.states), copy.deepcopy(self.optimizer.state_dict()["state"])
        try:
            with torch.no_grad():
                self._start("pre", list(grads))
                self._start("update", list(grads))
                self._start("post", acting)
                started = dict(self.states)
                grads = self._slot("pre", grads, {"param": before})
                for name, param in self.params.items():
                    group = self.groups[name]
                    param.grad = None
                    if name in grads:
                        param.grad = grads[name] * group.get("grad_scale", 1.0) + group.get("grad_bias", 0.0)
                grads = {name: param.grad for name, param in self.params.items() if param.grad is not None}
            self.optimizer.step()
            with torch.no_grad():
                moves = {name: self.params[name].detach() - before[name] for name in grads}
                if self.chains["update"].members:
                    for name, move in self._slot("update", moves, {"param": before, "grad": grads}).items():
                        self.params[name].copy_(before[name] + move)
                after = {name: self.params[name].detach() for name in acting}
                for name, value in self._slot("post", after, {"grad": grads}).items():
                    self.params[name].copy_(value)
        except (Skipped, Failure) as stop:
            self.states = states
            if isinstance(stop, Skipped):
                self.states = {**started, stop.place: stop.state}
                self.skipped = True
                self.failed = bool(stop.state["too_many"])
            else:
                self.failed = True
            with torch.no_grad():
                for name, value in before.items():
                    self.params[name].copy_(value)
            self.load({**self.optimizer.state_dict(), "state": inner_state})

    def averages(self) -> Tensors:
        """What ``averaged()`` must give: the average that ``post`` keeps, if there is exactly one."""
        found: dict[Place, dict[Any, Tensor]] = {}
        for (*place, unit), state in self.states.items():
            if place[0] == "post" and "average" in state:
                found.setdefault(tuple(place), {})[unit] = state["average"]
        averages = {}
        for (_, *path, name), units in found.items():
            param = self.params[name].detach()
            average = torch.stack([units[unit] for unit in sorted(units)]).reshape_as(param).to(param)
            node = self.chains["post"]
            for index in path:
                if node.kind == "masked" and isinstance(node.argument, Tensor):
                    average = torch.where(node.argument.expand(param.shape), average, param)
                node = node.members[index]
            averages[name] = average
        return averages

    # A slot

    def _slot(self, slot: str, tensors: Tensors, context: Mapping[str, Tensors]) -> Tensors:
        groups = {name: self._group(slot, name, context) for name in tensors}
        return self._run(self.chains[slot], (slot,), tensors, groups, FROM_GROUP)

    def _group(self, slot: str, name: str, context: Mapping[str, Tensors]) -> Group:
        param = self.params[name]
        number = list(self.params).index(name)
        identity = {"slot": slot, "index": number, "shape": tuple(param.shape)}
        known = {key: tensors[name] for key, tensors in context.items() if name in tensors}
        group = {key: value for key, value in self.groups[name].items() if key not in ("params", "param_names")}
        return {**group, **identity, **({"name": name} if self.case.named else {}), **known}

    def _start(self, slot: str, names: list[str]) -> None:
        """Make the first states where there are none: what a parameter is now is what they start at."""
        before = {name: self.params[name].detach().clone() for name in names}
        groups = {name: self._group(slot, name, {"param": before}) for name in names}
        self._init(self.chains[slot], (slot,), before, groups, FROM_GROUP)

    def _init(self, node: Any, place: Place, tensors: Tensors, groups: dict[str, Group], ndim: Any) -> None:
        for index, chosen in enumerate(self._choices(node, groups)):
            some = {name: tensors[name] for name in chosen}
            if isinstance(node, Node):
                below = node.argument if node.kind == "broadcast" else ndim
                wide = {name: widen(value) if node.kind == "feedback" else value for name, value in some.items()}
                some_groups = {name: groups[name] for name in chosen}
                self._init(node.members[index], (*place, index), wide, some_groups, below)
                for name, value in wide.items() if node.kind == "feedback" else ():
                    self.states.setdefault((*place, name, ()), {"error": torch.zeros_like(value)})
            elif isinstance(node, Leaf) and node.transform.stateful:
                if node.name in MEASURES:
                    for name in list(some)[:1]:
                        self._init_state(place, node, some[name], groups[name])
                    continue
                for name, value in some.items():
                    for unit in units_of(node, value, groups[name], ndim):
                        self._init_state((*place, name, unit), node, value[unit], cut(groups[name], unit))

    def _init_state(self, place: Place, node: Leaf, value: Tensor, group: Group) -> None:
        if place not in self.states:
            self.states[place] = node.transform.init(value, group)

    def _choices(self, node: Any, groups: dict[str, Group]) -> list[list[str]]:
        """Which tensors are for each member."""
        if not isinstance(node, Node):
            return [list(groups)]
        if node.kind == "partition":
            kinds, by = node.argument
            return [[n for n, g in groups.items() if first_match(kinds, g[by]) == k] for k in range(len(kinds))]
        if node.kind == "masked" and isinstance(node.argument, str):
            return [[name for name, group in groups.items() if fnmatchcase(group["name"], node.argument)]]
        if node.kind == "masked" and not isinstance(node.argument, Tensor):
            return [[name for name, group in groups.items() if node.argument(group)]]
        return [list(groups)] * len(node.members)

    def _run(self, node: Any, place: Place, tensors: Tensors, groups: dict[str, Group], ndim: Any) -> Tensors:
        if not isinstance(node, Node):
            results = self._measured(node, place, tensors, groups) if is_measure(node) else {}
            results = results or {n: self._each(node, place, n, t, groups[n], ndim) for n, t in tensors.items()}
            return {name: self._jittered(result, tensors[name]) for name, result in results.items()}
        results = dict(tensors)
        for index, chosen in enumerate(self._choices(node, groups)):
            some = {name: results[name] for name in chosen}
            if node.kind == "feedback":
                keys = {name: (*place, name, ()) for name in some}
                errors = {name: self.states[key]["error"] for name, key in keys.items()}
                some = {name: widen(value) + errors[name] for name, value in some.items()}
            some_groups = {name: groups[name] for name in chosen}
            below = node.argument if node.kind == "broadcast" else ndim
            new = self._run(node.members[index], (*place, index), some, some_groups, below)
            for name, result in new.items():
                if node.kind == "masked" and isinstance(node.argument, Tensor) and result.numel():
                    result = torch.where(node.argument.expand(result.shape), result, tensors[name])
                results[name] = result.to(tensors[name].dtype)
                if node.kind == "feedback":
                    self.states[keys[name]] = {"error": some[name] - results[name]}
        return results

    def _each(self, node: Any, place: Place, name: str, value: Tensor, group: Group, ndim: Any) -> Tensor:
        """Call the transform on each sub-tensor."""
        result = value.clone()
        for unit in units_of(node, value, group, ndim):
            sub_tensor, sub_group = value[unit].clone(), cut(group, unit)
            if isinstance(node, Leaf):
                key = (*place, name, unit)
                result[unit], new_state = node.transform.update(sub_tensor, sub_group, self.states.get(key, {}))
                self.states[key] = new_state
            else:
                result[unit] = node(sub_tensor, sub_group)
        return result

    def _measured(self, node: Leaf, place: Place, tensors: Tensors, groups: dict[str, Group]) -> Tensors:
        """Call the transform on all tensors as one, with the keys of each group, or of the first where it remembers."""
        full = {name: value for name, value in tensors.items() if value.numel()}
        if not full:
            return tensors
        one = torch.cat([value.reshape(-1) for value in full.values()])
        pieces: dict[str, Tensor] = {}
        for number, (name, value) in enumerate(full.items()):
            if number == 0 or not node.transform.stateful:
                result, new_state = node.transform.update(one, groups[name], self.states.get(place, {}))
            start = sum(other.numel() for other in itertools.islice(full.values(), number))
            pieces[name] = result[start : start + value.numel()].reshape(value.shape).to(value.dtype)
        if new_state.get("skip_step"):
            raise Skipped(place, new_state)
        self.states[place] = new_state
        return {**tensors, **pieces}

    def _jittered(self, value: Tensor, before: Tensor) -> Tensor:
        if not self.jitter or not value.numel():
            return value
        noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
        # What cancels is off by a share of what it was.
        size = value.abs() + before.nan_to_num(0, 0, 0).abs().amax()
        return value + (self.jitter * noise * size).to(value.dtype)


def is_measure(node: Any) -> bool:
    return isinstance(node, Leaf) and node.name in MEASURES


def widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def cast(state: State, dtype: torch.dtype) -> State:
    """The state with its floating point tensors in another dtype."""
    return {
        key: cast(value, dtype) if isinstance(value, dict) else value.to(dtype) if value.is_floating_point() else value
        for key, value in state.items()
    }


def first_match(kinds: Sequence[str], value: str) -> int:
    return next(index for index, kind in enumerate(kinds) if fnmatchcase(value, kind))


def units_of(node: Any, value: Tensor, group: Group, ndim: Any) -> Iterator[tuple[int, ...]]:
    """Where the sub-tensors are that a transform acts on; none in a tensor without elements."""
    if isinstance(node, Leaf) and (node.name in DRAWS or (node.name in WHOLE and ndim == FROM_GROUP)):
        ndim = None
    if ndim == FROM_GROUP:
        ndim = group["param_ndim"]
    outer = 0 if ndim is None else value.ndim - ndim if ndim >= 0 else -ndim
    return itertools.product(*map(range, value.shape[:outer])) if value.numel() else iter(())


def cut(group: Group, unit: tuple[int, ...]) -> Group:
    return {**group, **{key: group[key][unit] for key in ("param", "grad") if key in group}}
