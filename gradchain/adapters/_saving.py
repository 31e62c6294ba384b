"""How what is attached to an optimizer is saved and loaded with it, and known to a ``GradScaler``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradchain.engine.states import TransformStates
from gradchain.engine.weak import Weak

if TYPE_CHECKING:
    from gradchain.adapters._hooks import Hooks

UNSCALES = "_step_supports_amp_scaling"
"""The attribute by which a ``GradScaler`` knows that a step unscales gradients."""


class Saving:
    """The hooks of one optimizer by which its state dict has the states of what is attached."""

    def __init__(self, hooks: Hooks, optimizer: Optimizer) -> None:
        self._hooks = Weak(hooks)
        self._optimizer = Weak(optimizer)
        self._handles: list[RemovableHandle] = []
        self._own_flag: dict[str, Any] = {}
        """What the optimizer itself had of ``UNSCALES``."""
        self._loaded: TransformStates | None = None
        """What is being loaded, until the optimizer has loaded its own."""
        self._has_saved = False
        self._loads_by_own_code = False

    def register(self) -> None:
        """Begin to save and load."""
        optimizer = self._optimizer()
        # Code of an optimizer's own may call none of the hooks, or go on after them with the state dict as it was.
        for name, method in (("state_dict", self._save), ("load_state_dict", self._load)):
            if getattr(type(optimizer), name) is not getattr(Optimizer, name):
                optimizer.__dict__[name] = method
        if "_optimizer_state_dict_post_hooks" in optimizer.__dict__:
            self._handles = [
                optimizer.register_state_dict_post_hook(self._after_saving),
                optimizer.register_load_state_dict_pre_hook(self._before_loading),
                optimizer.register_load_state_dict_post_hook(self._after_loading),
            ]
        self._own_flag = {key: value for key, value in optimizer.__dict__.items() if key == UNSCALES}
        if getattr(optimizer, UNSCALES, False):
            # Or a GradScaler would leave the gradients scaled, for a fused kernel, which comes after the hooks.
            optimizer.__dict__[UNSCALES] = False

    def unregister(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        attributes = self._optimizer().__dict__
        for name, method in (("state_dict", self._save), ("load_state_dict", self._load)):
            if attributes.get(name) == method:
                del attributes[name]
        attributes.pop(UNSCALES, None)
        attributes.update(self._own_flag)

    def _after_saving(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        hooks = self._hooks()
        hooks.engine.complete(state_dict, optimizer)
        self._has_saved = True

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        return None if self._loads_by_own_code else self._read(state_dict)

    def _after_loading(self, optimizer: Optimizer) -> None:
        if self._loaded is not None and not self._loads_by_own_code:
            hooks = self._hooks()
            hooks.engine.complete_groups()
            hooks.engine.load_states(self._loaded, optimizer)
            self._loaded = None

    # In place of the methods of an optimizer that has its own

    @torch.no_grad()
    def _save(self, *args: Any, **kwargs: Any) -> Any:
        self._has_saved = False
        optimizer = self._optimizer()
        state_dict = type(optimizer).state_dict(optimizer, *args, **kwargs)
        if not self._has_saved:
            self._after_saving(optimizer, state_dict)
        return state_dict

    @torch.no_grad()
    def _load(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        optimizer, bare = self._optimizer(), self._read(state_dict)
        self._loads_by_own_code = True
        try:
            type(optimizer).load_state_dict(optimizer, bare, *args, **kwargs)
        finally:
            self._loads_by_own_code = False
        self._after_loading(optimizer)

    def _read(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the states out of a state dict, and keep them."""
        hooks = self._hooks()
        self._loaded, bare = hooks.engine.read_state_dict(state_dict, self._optimizer())
        return bare
