"""``as_lr``: torch's learning-rate schedulers, for any hyperparameter."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch.optim import Optimizer


def as_lr(optimizer: Optimizer, key: str) -> Optimizer:
    """Show a hyperparameter of an optimizer as its learning rate, for a scheduler.

    Every ``torch.optim.lr_scheduler`` works on it, with its ``state_dict`` and its ways to combine, beside those of the
    learning rate itself; those that can cycle the momentum as well need ``cycle_momentum=False``. The values are in the
    param groups of ``optimizer``, each group's own, so that they are saved and loaded with it.

    Args:
        optimizer: Any optimizer.
        key: A key that all its param groups have, such as ``"clip_by_norm.max_norm"``.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: A group does not have the key.

    Example:
        >>> import torch
        >>> from gradchain import ParamTransformingOptimizer, clip_by_norm
        >>> optim = ParamTransformingOptimizer([torch.ones(2, requires_grad=True)], pre=clip_by_norm(1.0), lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(as_lr(optim, "clip_by_norm.max_norm"), gamma=0.5)
        >>> for _ in range(2):
        ...     optim.step()
        ...     scheduler.step()
        >>> optim.param_groups[0]["clip_by_norm.max_norm"], optim.param_groups[0]["lr"]
        (0.25, 0.1)

    References:
        optax ``inject_hyperparams``, which serves the same purpose.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"as_lr needs a torch.optim.Optimizer, got {optimizer!r}")
    for index, group in enumerate(optimizer.param_groups):
        if key not in group:
            raise ValueError(f'as_lr needs the key "{key}" in every param group; group {index} has {sorted(group)}')
    return _AsLR(optimizer, key)


class _AsLR(Optimizer):
    """An optimizer to the eye of a scheduler: groups with a learning rate, and a step that has been made."""

    _opt_called = True

    def __init__(self, optimizer: Optimizer, key: str) -> None:
        self.optimizer = optimizer
        self.key = key

    @property
    def defaults(self) -> Any:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride]
        """The default of the hyperparameter, as that of the learning rate."""
        return {"lr": self.optimizer.defaults.get(self.key)}

    def state_dict(self) -> Any:
        """That of the optimizer itself."""
        return self.optimizer.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def param_groups(self) -> Any:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride]
        """The groups of the optimizer, now, with the hyperparameter in the place of ``lr``."""
        return [_Group(group, self.key) for group in self.optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        """For the scheduler to find; the optimizer itself is to be stepped."""
        raise TypeError("step the optimizer itself, not what as_lr returned")

    def __repr__(self) -> str:
        return f"as_lr({type(self.optimizer).__name__}, {self.key!r})"


class _Group(MutableMapping[str, Any]):
    """A param group in which ``"lr"`` is another key."""

    def __init__(self, group: dict[str, Any], key: str) -> None:
        self.group = group
        self.names = {"lr": key, "initial_lr": f"initial {key}"}

    def __getitem__(self, key: str) -> Any:
        return self.group[self.names.get(key, key)]

    def __setitem__(self, key: str, value: Any) -> None:
        self.group[self.names.get(key, key)] = value

    def __delitem__(self, key: str) -> None:
        del self.group[self.names.get(key, key)]

    def __iter__(self) -> Iterator[str]:
        shown = {name: key for key, name in self.names.items()}
        return (shown.get(key, key) for key in self.group)

    def __len__(self) -> int:
        return len(self.group)
