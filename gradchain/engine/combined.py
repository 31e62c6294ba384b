"""Several optimizers, each with parameters of its own, as one."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradchain.contract import Group
from gradchain.engine.select import Key, distribute


class CombinedOptimizer(Optimizer):
    """Optimizers that step one after another, with the interface of one.

    ``ParamTransformingOptimizer`` makes it when it is given several inner optimizers. ``param_groups`` lists the groups
    of all, in their order, and ``state`` finds the state of a parameter wherever it is. ``defaults`` has the keys that
    all optimizers share.

    Attributes:
        optimizers: The optimizers, in the order in which they step.
        keys: What chooses the parameters of each, or None where the optimizers were given with their parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer], keys: Sequence[Key] | None = None) -> None:
        """Combine ``optimizers``; ``keys`` says which of them takes a parameter that joins later."""
        for optimizer in optimizers:
            if needs_closure(optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__} evaluates its closure several times in a step, between which the "
                    "other optimizers would have to step; let it step by itself"
                )
        require_disjoint(optimizers)
        # Not Optimizer.__init__: it would make groups, state and defaults apart from those of the optimizers.
        self.__setstate__({"optimizers": optimizers, "keys": keys})

    optimizers: Sequence[Optimizer]
    keys: Sequence[Key] | None

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride]
        """The param groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride]
        """The states of all optimizers, by parameter."""
        return self._state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride]
        """The defaults that all optimizers have, so that a scheduler of another key says that it does not fit."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {key: value for key, value in first.items() if all(key in each for each in others)}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure once, if there is one, and let each optimizer make its step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the parameters of a group to the optimizers whose keys they match."""
        if self.keys is None:
            raise ValueError(
                "a new group does not say which of several optimizers takes it; call add_param_group of that one, "
                "optimizer.inner_opt.optimizers[i]"
            )
        for index, group in distribute(param_group, self.keys, {}).items():
            self.optimizers[index].add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The state dict that one optimizer with the groups of all would have."""
        state: dict[Any, Any] = {}
        groups: list[Group] = []
        count = itertools.count()
        for index, optimizer in enumerate(self.optimizers):
            saved = optimizer.state_dict()
            if saved.keys() != {"state", "param_groups"}:
                raise ValueError(
                    f"the state dict of {type(optimizer).__name__} must have the keys 'state' and 'param_groups' to be "
                    f"saved with others, got {list(saved)}; save it by itself"
                )
            numbers = {key: next(count) for group in saved["param_groups"] for key in group["params"]}
            groups += [
                {**group, "params": [numbers[key] for key in group["params"]]} for group in saved["param_groups"]
            ]
            # What is not of a parameter says whose it is.
            state |= {numbers.get(key, f"{index}.{key}"): value for key, value in saved["state"].items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or what one optimizer with the groups of all has saved."""
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != saved_sizes:
            raise ValueError(
                f"the loaded state dict must have groups of {sizes} parameters, got groups of {saved_sizes}; load it "
                "into an optimizer with the same groups, or give both named_parameters(), by which it loads any groups"
            )
        waiting = iter(state_dict["param_groups"])
        of_params = {key for group in state_dict["param_groups"] for key in group["params"]}
        others = [key for key in state_dict["state"] if key not in of_params]
        for index, optimizer in enumerate(self.optimizers):
            groups = list(itertools.islice(waiting, len(optimizer.param_groups)))
            own = {key: key for group in groups for key in group["params"]}
            own |= {key: str(key).removeprefix(f"{index}.") for key in others if str(key).startswith(f"{index}.")}
            state = {own[key]: value for key, value in state_dict["state"].items() if key in own}
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "keys": self.keys}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._state = _StatesOfAll(state["optimizers"])
        super().__setstate__(state)

    def __getattr__(self, name: str) -> Any:
        # Some optimizers have a mode, and frameworks ask for it with hasattr.
        if name in ("train", "eval") and "optimizers" in self.__dict__:
            methods = [getattr(optimizer, name) for optimizer in self.optimizers if hasattr(optimizer, name)]
            if methods:
                return lambda: [method() for method in methods] and None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self.optimizers))}]"


class _StatesOfAll(MutableMapping[Tensor, Any]):
    """The states of several optimizers, by parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self._owners: dict[Tensor, int] = {}
        """The position of the optimizer that has a parameter, or that has kept a state of it."""

    def _state_with(self, param: Tensor) -> Any:
        if param not in self._owners:
            self._owners = {
                each: index
                for index, optimizer in enumerate(self.optimizers)
                for each in itertools.chain(optimizer.state, *(group["params"] for group in optimizer.param_groups))
            }
        return self.optimizers[self._owners[param]].state

    def __getitem__(self, param: Tensor) -> Any:
        return self._state_with(param)[param]

    def __setitem__(self, param: Tensor, value: Any) -> None:
        self._state_with(param)[param] = value

    def __delitem__(self, param: Tensor) -> None:
        del self._state_with(param)[param]

    def get(self, param: Tensor, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The state of ``param``, or ``default``: the states of optimizers would make one where there is none."""
        try:
            return self._state_with(param).get(param, default)
        except KeyError:
            return default

    def __contains__(self, param: object) -> bool:
        return any(param in optimizer.state for optimizer in self.optimizers)

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(optimizer.state for optimizer in self.optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self.optimizers)


def parts(optimizer: Optimizer) -> Sequence[Optimizer]:
    """The optimizers of which ``optimizer`` is made, which is itself where it is one."""
    return optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else [optimizer]


def name_of(*optimizers: Optimizer) -> str:
    """The types of optimizers and of their parts, in words."""
    return " and ".join(type(part).__name__ for optimizer in optimizers for part in parts(optimizer))


def defaults_of_any(optimizer: Optimizer) -> dict[str, Any]:
    """The defaults of all its parts."""
    return {key: value for part in reversed(parts(optimizer)) for key, value in part.defaults.items()}


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step of ``optimizer`` evaluates a closure, as often as it likes."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def require_disjoint(optimizers: Sequence[Optimizer]) -> None:
    """Raise where two optimizers have the same parameter."""
    owners: dict[Tensor, int] = {}
    for index, optimizer in enumerate(optimizers):
        for group_index, group in enumerate(optimizer.param_groups):
            for number, param in enumerate(group["params"]):
                if owners.setdefault(param, index) != index:
                    name = group["param_names"][number] if "param_names" in group else f"parameter {number}"
                    raise ValueError(
                        f"optimizers {owners[param]} and {index}, {type(optimizer).__name__}, must not share "
                        f"parameters, and both have {name} of group {group_index}; leave it to one of them"
                    )
