"""``schedule``: torch's learning-rate schedulers, for any hyperparameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradchain.contract import Group

P = ParamSpec("P")
S = TypeVar("S", bound=LRScheduler)


def schedule(
    optimizer: Optimizer,
    key: str,
    make: Callable[Concatenate[Optimizer, P], S],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> S:
    """Make a scheduler of the learning rate drive another hyperparameter of an optimizer.

    Every ``torch.optim.lr_scheduler`` works, and every function that returns one for an optimizer. The scheduler
    belongs to ``optimizer`` like those of the learning rate: it can be beside them in a ``ChainedScheduler``, and
    Lightning, Trainer and Accelerate step it, save it and load it. While it is made, and while it steps, param groups
    have the hyperparameter in place of ``"lr"``; ``get_last_lr()`` returns the values of the hyperparameter. What a
    scheduler keeps in param groups, such as ``"initial_lr"``, gets a key of its own, such as
    ``"initial clip_by_norm.max_norm"``.

    A ``SequentialLR`` or a ``ChainedScheduler`` of one hyperparameter is made by a function, as in the second example.
    Where a value of 0 is out of range, as for ``clip_by_norm``, stop above it: ``eta_min=1e-3``.

    Args:
        optimizer: Any optimizer.
        key: A key that all its param groups have, such as ``"clip_by_norm.max_norm"``.
        make: A type of scheduler, or a function that takes an optimizer and returns a scheduler.
        *args: Further arguments of ``make``.
        **kwargs: Further arguments of ``make``.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is no optimizer, ``make`` is an instance, or it returns no scheduler.
        ValueError: A group does not have the key, or the scheduler writes to other hyperparameters too, as those that
            cycle the momentum do; they need ``cycle_momentum=False``. Param groups are then as before.

    Example:
        >>> import torch
        >>> from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, SequentialLR
        >>> from gradchain import ParamTransformingOptimizer, clip_by_norm
        >>> optim = ParamTransformingOptimizer([torch.ones(2, requires_grad=True)], pre=clip_by_norm(1.0), lr=0.1)
        >>> scheduler = schedule(optim, "clip_by_norm.max_norm", ExponentialLR, gamma=0.5)
        >>> for _ in range(2):
        ...     optim.step()
        ...     scheduler.step()
        >>> optim.param_groups[0]["clip_by_norm.max_norm"], optim.param_groups[0]["lr"]
        (0.25, 0.1)

        >>> def make(optimizer: torch.optim.Optimizer) -> SequentialLR:
        ...     phases = [ConstantLR(optimizer, factor=0.1, total_iters=5), ExponentialLR(optimizer, gamma=0.9)]
        ...     return SequentialLR(optimizer, phases, milestones=[5])
        >>> scheduler = schedule(optim, "grad_scale", make)
        >>> optim.param_groups[0]["grad_scale"]
        0.1

    References:
        optax ``inject_hyperparams``, which serves the same purpose.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"schedule needs a torch.optim.Optimizer, got {optimizer!r}")
    if not callable(make):
        name = type(make).__name__
        raise TypeError(
            f"schedule makes the scheduler itself, and needs its type and arguments, not an instance of {name}: "
            f'schedule(optimizer, "{key}", {name}, ...)'
        )
    if key == "lr":
        return make(optimizer, *args, **kwargs)
    before = [(group, dict(group), _tensors(group)) for group in optimizer.param_groups]
    try:
        with _as_lr(optimizer, key):
            scheduler = make(optimizer, *args, **kwargs)
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(f"schedule needs a function that returns an LRScheduler; {make!r} returned {scheduler!r}")
        written = {name for group, old, _ in before for name in group if group[name] is not old.get(name)}
        others = sorted(name for name in written if name != key and not name.endswith(f" {key}"))
        if others:
            raise ValueError(
                f'{type(scheduler).__name__} writes to {others} too, and may drive nothing but "{key}"; pass '
                "cycle_momentum=False"
            )
    except BaseException:
        for group, old, values in before:
            group.clear()
            group.update(old)
            for name, value in values.items():
                group[name].copy_(value)
        raise
    scheduler.__class__ = _of_key(type(scheduler), key)
    return scheduler


class _OfKey(LRScheduler):
    """What a type of scheduler becomes, that it may drive a hyperparameter."""

    key: ClassVar[str]
    _made_from: ClassVar[type[LRScheduler]]

    def step(self, *args: Any, **kwargs: Any) -> None:
        with _as_lr(self.optimizer, self.key):
            super().step(*args, **kwargs)

    def get_lr(self) -> list[float | Tensor]:
        with _as_lr(self.optimizer, self.key):
            return super().get_lr()

    def _update_lr(self, *args: Any, **kwargs: Any) -> None:  # which SequentialLR calls
        with _as_lr(self.optimizer, self.key):
            super()._update_lr(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "key": self.key}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("key", "lr")
        if saved != self.key:
            raise ValueError(
                f'the loaded state is of a scheduler of "{saved}", and this one drives "{self.key}"; load the '
                "schedulers in the order in which they were saved"
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "key"})

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts: Any = super().__reduce_ex__(protocol)
        return _make_empty, (self._made_from, self.key), *parts[2:]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.key!r}>"


def _of_key(made_from: Any, key: str) -> type[Any]:
    """The type of a scheduler of a hyperparameter."""
    return type(made_from.__name__, (_OfKey, made_from), {"key": key, "_made_from": made_from})


def _make_empty(made_from: type[LRScheduler], key: str) -> Any:
    return object.__new__(_of_key(made_from, key))


_SHOWN: set[tuple[int, str]] = set()
"""The optimizers whose param groups have a hyperparameter in place of the learning rate at the moment."""


@contextmanager
def _as_lr(optimizer: Optimizer, key: str) -> Iterator[None]:
    """Within the ``with`` block, have a hyperparameter in place of the learning rate in the param groups."""
    if (id(optimizer), key) in _SHOWN:
        yield
        return
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        if key not in group:
            raise ValueError(f'schedule needs the key "{key}" in every param group; group {index} has {sorted(group)}')
    hidden = [dict(group) for group in groups]
    try:
        _SHOWN.add((id(optimizer), key))
        for group, all_keys in zip(groups, hidden, strict=True):
            group.clear()
            group.update(_shown(all_keys, key))
        yield
    finally:
        _SHOWN.discard((id(optimizer), key))
        for group, all_keys in zip(groups, hidden, strict=True):
            if key not in group:  # as it is in a group that an interrupt has spared
                shown = {_own_name(name, key): value for name, value in group.items()}
                group.clear()
                group.update({**all_keys, **shown})  # in the order that they had


def _shown(group: Group, key: str) -> Group:
    """``group`` with ``key`` as ``"lr"``, and with what the schedulers of ``key`` keep under the names they know."""
    others = {name: value for name, value in group.items() if name != "lr" and not name.endswith("_lr")}
    own = {name: others.pop(name) for name in list(others) if name.endswith(f" {key}")}
    others.pop(key, None)
    return {**others, "lr": group[key], **{f"{name.removesuffix(f' {key}')}_lr": own[name] for name in own}}


def _own_name(name: str, key: str) -> str:
    """``"clip_by_norm.max_norm"`` for ``"lr"``, and ``"initial clip_by_norm.max_norm"`` for ``"initial_lr"``."""
    if name == "lr":
        return key
    return f"{name.removesuffix('_lr')} {key}" if name.endswith("_lr") else name


def _tensors(group: Group) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in group.items() if isinstance(value, Tensor)}
