"""Keep an object as it is while something runs that changes it: for a step that is made only to be looked at."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradchain.engine.operations import is_expanded

_UNCHANGING = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, str, bytes, int, float, type(None))

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@contextmanager
def preserved(roots: Iterable[object], *, apart: Iterable[object] = ()) -> Iterator[None]:
    """Give all that ``roots`` hold its value back in the end, in place, so that who else holds it sees no change.

    That is what a search through attributes and containers finds: tensors, dicts, lists, sets and generators. A copy of
    the object would not do. The copies of many optimizers lack attributes, some know their parameters by address, and
    shards of FSDP2 cannot be copied.

    Within, neither the step hooks of these optimizers run, nor those that are registered for all: what they do cannot
    be taken back.

    Args:
        roots: An optimizer, and what else its step changes.
        apart: What the search leaves out.
    """
    snapshot = _Snapshot(apart)
    snapshot.take(roots)
    try:
        with ExitStack() as versions:
            # Autograd would take a parameter with its old value for a changed one. Torch 2.6 takes them one by one.
            for tensor in snapshot.tensors:
                versions.enter_context(_unsafe_preserve_version_counter(tensor))
            try:
                snapshot.hide_hooks()
                yield
            finally:
                snapshot.restore()
    finally:
        snapshot.undo.clear()


class _Snapshot:
    def __init__(self, apart: Iterable[object]) -> None:
        self.undo: list[Callable[[], None]] = []
        self.tensors: list[Tensor] = []
        self._optimizers: list[Optimizer] = []
        self._found: dict[int, object] = {id(value): value for value in apart}

    @torch.no_grad()
    def take(self, roots: Iterable[object]) -> None:
        """Keep what ``roots`` hold."""
        waiting = [*roots]
        while waiting:
            value = waiting.pop()
            if id(value) not in self._found and not isinstance(value, _UNCHANGING):
                self._found[id(value)] = value
                waiting += self._keep(value)

    def hide_hooks(self) -> None:
        """Leave the optimizers without step hooks; before, their attributes were kept."""
        for optimizer in self._optimizers:
            optimizer.__dict__.update({name: OrderedDict() for name in _STEP_HOOKS})
        for hooks in _GLOBAL_HOOKS:
            self._keep(hooks)
            hooks.clear()

    @torch.no_grad()
    def restore(self) -> None:
        """Write all values back."""
        for undo in self.undo:
            undo()

    def _keep(self, value: Any) -> Iterable[object]:
        """Keep one object, and return what it holds."""
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if isinstance(value, dict):
            self._restore_by(_restore_dict, value, dict(value))
            return [*value, *value.values()]
        if isinstance(value, list | deque | set):
            self._restore_by(_restore_items, value, list(value))
            return list(value)
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, Generator):
            self._restore_by(Generator.set_state, value, value.get_state())
        if isinstance(value, random.Random):
            self._restore_by(random.Random.setstate, value, value.getstate())
        if isinstance(value, Optimizer):
            self._optimizers.append(value)
        return [getattr(value, "__dict__", None)]

    def _restore_by(self, restore: Callable[[Any, Any], Any], value: object, kept: object) -> None:
        self.undo.append(functools.partial(restore, value, kept))

    def _keep_tensor(self, tensor: Tensor) -> Iterable[object]:
        if not tensor.is_inference():
            self.tensors.append(tensor)
        if hasattr(type(tensor), "__tensor_flatten__"):  # one that others make up, as a shard does a DTensor
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            return [getattr(tensor, name) for name in names]
        if tensor.layout is torch.strided:
            memory = tensor.detach()
            # Elements that share memory can be replaced, but not written.
            kept = memory if is_expanded(memory) else memory.clone()
            self._restore_by(_restore_tensor, tensor, (memory, kept))
        else:
            self._restore_by(Tensor.copy_, tensor.detach(), tensor.detach().clone())
        return ()


def _restore_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    if not _holds(_flat(value), _flat(kept)):
        value.clear()
        value.update(kept)


def _flat(value: dict[Any, Any]) -> list[Any]:
    return [each for item in value.items() for each in item]


def _restore_items(value: Any, kept: list[Any]) -> None:
    if not _holds(list(value), kept):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(kept)


def _holds(values: list[Any], kept: list[Any]) -> bool:
    return len(values) == len(kept) and all(a is b for a, b in zip(values, kept, strict=True))


def _restore_tensor(tensor: Tensor, kept: tuple[Tensor, Tensor]) -> None:
    memory, value = kept
    if (tensor.data_ptr(), tensor.dtype, tensor.shape) != (memory.data_ptr(), memory.dtype, memory.shape):
        tensor.data = memory  # it was rebound
    if value is not memory:
        memory.copy_(value)
