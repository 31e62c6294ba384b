"""The methods by which a subclass of ``ParamTransformingOptimizer`` edits gradients and parameters itself."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from gradchain.broadcast import to_batch
from gradchain.contract import Group
from gradchain.engine.engine import Engine
from gradchain.engine.operations import SkippedStep
from gradchain.engine.states import ParamEntry
from gradchain.engine.step import Step


class SubclassHooks:
    """Two methods that a subclass can override, which run after the chains of their slots."""

    _engine: Engine
    _hooked_slots: ClassVar[frozenset[str]] = frozenset()
    """The slots whose method is overridden."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks = {slot: f"_{slot}_step_transform_" for slot in ("pre", "post")}
        base = SubclassHooks
        cls._hooked_slots = frozenset(
            slot for slot, hook in hooks.items() if getattr(cls, hook) is not getattr(base, hook)
        )

    def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Edit ``param.grad`` (or ``param``) in place before the inner step; for subclasses, does nothing here.

        Args:
            param: A parameter that has a gradient, in batch form (N, d0, ...), as is ``param.grad``: see ``to_batch``.
            optim_group: The param group of the parameter.
        """

    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Edit ``param`` (or ``param.grad``) in place after the inner step; for subclasses, does nothing here.

        Args:
            param: A parameter in batch form (N, d0, ...), as is ``param.grad``, which can be None: see ``to_batch``.
            optim_group: The param group of the parameter.
        """

    def _apply_pre_step_transform_(self) -> None:
        """Do all that precedes the inner step: ``pre``, ``_pre_step_transform_``, ``grad_scale`` and ``grad_bias``."""
        step = Step(self._engine)
        try:
            step.transform_grads()
        except SkippedStep as skipped:
            skipped.keep_counters()
        except BaseException:
            step.undo()
            raise
        else:
            step.commit()

    def _apply_post_step_transform_(self) -> None:
        """Do all that comes after the inner step: ``post`` and ``_post_step_transform_``."""
        step = Step(self._engine)
        try:
            step.transform_params()
        except BaseException:
            step.undo()
            raise
        step.commit()

    def _run_hook(self, slot: str, entry: ParamEntry) -> None:
        """Call the hook of a slot on a parameter in batch form, and carry over what it writes."""
        hook = self._pre_step_transform_ if slot == "pre" else self._post_step_transform_
        param, param_ndim = entry.param, entry.group["param_ndim"]
        batch = to_batch(param.detach(), param_ndim)
        originals = [(param, batch)]
        if param.grad is not None:
            batch_grad = batch.grad = to_batch(param.grad.detach(), param_ndim)
            originals.append((param.grad, batch_grad))
        before = batch.grad
        hook(batch, optim_group=entry.group)
        if batch.grad is not before:
            raise ValueError(
                f"{hook.__qualname__} rebinds param.grad; edit it in place: param.grad.copy_(...), param.grad.mul_(...)"
            )
        for original, batched in originals:
            if batched.data_ptr() != original.data_ptr():  # no view could be made
                original.copy_(batched.reshape(original.shape))
