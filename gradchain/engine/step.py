"""One step of an optimizer, with its chains around it, which either happens as a whole or not at all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradchain._sharding import gather, is_distributed, local
from gradchain.contract import Group, locate
from gradchain.engine.combined import parts
from gradchain.engine.engine import Engine
from gradchain.engine.groups import describe
from gradchain.engine.operations import Pass, SkippedStep, is_expanded
from gradchain.engine.plan import Plan, SlotPlans, needs_dense


class Step:
    """One step: its plans, what it has to undo if it fails, and the states to keep if it does not."""

    def __init__(self, engine: Engine, *, with_closure: bool = False) -> None:
        self.engine = engine
        self.owner = engine.owner
        self.param_table, self.same_groups = engine.check_groups()
        engine.synced_states()
        self.number = engine.steps + 1
        self.passes: list[Pass] = []
        self.plans: dict[str, Plan] | None = None
        self.inner_states: list[Any] | None = None
        self.cannot_raise = not with_closure and self.make_plans().cannot_raise and not self.owner._hooked_slots
        self.before: list[Tensor] = []
        if "update" in (self.plans or ()) or (not self.cannot_raise and self._can_fail_late(with_closure)):
            self.before = [param.detach().clone() for param in self.param_table.params]

    @property
    def skips(self) -> bool:
        """Whether a transform can say that the step must not be made."""
        return any(plan.skips for plan in (self.plans or {}).values())

    @property
    def is_familiar(self) -> bool:
        """Whether a step like this one has been made, so that nothing is left to do that is done only once."""
        plans = (self.plans or {}).values()
        return self.engine.states.are_shown and all(plan.cannot_raise or plan.has_run for plan in plans)

    def make_plans(self) -> SlotPlans:
        """Return the plans of the step. All errors of a plan with ``cannot_raise`` are raised here, and not later."""
        self.grads = [param.grad for param in self.param_table.params]
        plans = self.engine.plans(self.param_table, self.grads, same_groups=self.same_groups)
        self.plans = plans.of
        if plans.has_unusual_grads:
            self._make_grads_writable()
        return plans

    def _make_plans_anew(self) -> None:
        """Make the plans after the closure or the inner step, which can have changed the groups."""
        _, self.same_groups = self.engine.check_groups()
        self.make_plans()

    @torch.no_grad()
    def _make_grads_writable(self) -> None:
        hooked, pre = "pre" in self.owner._hooked_slots, self.plans.get("pre") if self.plans else None
        touched = set(pre.touched if pre else ())
        rescaled = {id(group) for group in self.param_table.groups if rescales(group)}
        for i, (entry, grad) in enumerate(zip(self.param_table.entries, self.grads, strict=True)):
            if grad is None or not (hooked or i in touched or id(entry.group) in rescaled):
                continue
            if hooked and grad.layout is not torch.strided:
                raise TypeError(f"pre, {entry.place()}: {needs_dense(grad)}")
            self.grads[i] = entry.param.grad = _writable(grad)

    def transform_grads(self) -> None:
        """Transform and rescale the gradients, which is all that precedes the inner step."""
        assert self.plans is not None
        plan, hooked = self.plans.get("pre"), "pre" in self.owner._hooked_slots
        with _NoGrad():
            # A function that raises mostly does so in the first step, so later ones need no copies of the gradients.
            is_safe = not hooked and (plan is None or plan.cannot_raise or plan.has_run)
            saved = [] if is_safe else [(grad, grad.clone()) for grad in self.grads if grad is not None]
            try:
                if plan is not None:
                    self._run(plan, self.grads, {"param": self.param_table.params})
                if hooked:
                    self._run_hooks("pre")
            except BaseException:
                for grad, value in saved:
                    grad.copy_(value)
                raise
            for index, group in enumerate(self.param_table.groups):
                if rescales(group):
                    _rescale_grads(index, group)

    def transforming(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``closure``, with gradients transformed after every evaluation."""

        @functools.wraps(closure)
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.passes.clear()  # each evaluation starts from the states before the step, which advance once a step
            self._make_plans_anew()
            try:
                self.transform_grads()
            except SkippedStep as skipped:
                skipped.loss = loss
                raise
            plan = None if self.plans is None else self.plans.get("pre")
            if self.inner_states is None and plan is not None and plan.skips:
                self.keep_inner_state()
            return loss

        return evaluate

    def keep_inner_state(self) -> None:
        """Copy the state of the inner optimizer, for the case that a later evaluation calls the step off."""
        self.inner_states = [self.engine.states.copy_beside(part.state) for part in parts(self.owner.inner_opt)]

    def finish(self) -> None:
        """Do all that comes after the inner step, and keep the new states."""
        if self.plans is None:  # the closure was not called
            self._make_plans_anew()
        self.transform_update()
        self.transform_params()
        self.commit()

    def transform_update(self) -> None:
        """Run the plan of ``update``."""
        update = self.plans.get("update") if self.plans else None
        if update is None or not update.touched:
            return
        params = self.param_table.params
        with _NoGrad():
            # The displacement is computed in the memory of its parameter. A parameter that no transform acts on is left
            # out, because subtracting and adding would round it.
            moved, before = ([each[i] for i in update.touched] for each in (params, self.before))
            if not update.is_plain:  # the shards suffice, because what follows is elementwise
                moved, before = list(map(local, moved)), list(map(local, before))
            _subtract(moved, before, checks_sums=update.is_on_cpu and not torch.compiler.is_compiling())
            self._run(update, params, {"param": self.before, "grad": self.grads})
            torch._foreach_add_(moved, before)

    def transform_params(self) -> None:
        """Run the plan and the hook of ``post``."""
        plan, hooked = self.plans.get("post") if self.plans else None, "post" in self.owner._hooked_slots
        if plan is None and not hooked:
            return
        with _NoGrad():
            if plan is not None:
                self._run(plan, self.param_table.params, {"grad": self.grads})
            if hooked:
                self._run_hooks("post")

    def install_states(self) -> None:
        """Put the new states in place of the old ones."""
        for each in self.passes:
            for commit in each.commits:
                commit()
        self.passes = []

    def commit(self) -> None:
        """Keep the new states, and show them to the inner optimizer."""
        self.install_states()
        self.engine.steps += 1
        self.engine.signals.clear()  # a loss of an earlier step must not pass for that of a later one
        self.engine.states.new.clear()
        self.engine.states.share_with(self.owner.inner_opt)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the parameters, if they have been copied, and drop the signals, which were for this step alone."""
        self.engine.signals.clear()
        for param, value in zip(self.param_table.params, self.before, strict=False):
            param.copy_(value)

    def skip(self, skipped: SkippedStep) -> Any:
        """Undo all but the counters of the transform that skips the step, and return the loss."""
        self.undo()
        if self.inner_states is not None:
            for part, kept in zip(parts(self.owner.inner_opt), self.inner_states, strict=True):
                part.state.clear()  # in place, since other objects may refer to it
                part.state.update(kept)
        skipped.keep_counters()
        return skipped.loss

    def _run(self, plan: Plan, tensors: list[Any], context: dict[str, list[Any]]) -> None:
        self.passes.append(plan.run(tensors, context, keeps_states=not self.cannot_raise, step=self.number))

    def _run_hooks(self, slot: str) -> None:
        for entry in self.param_table.entries:
            if slot == "post" or entry.param.grad is not None:
                try:
                    self.owner._run_hook(slot, entry)
                except Exception as error:
                    locate(error, f"{slot}, {entry.place()}")
                    raise

    def _can_fail_late(self, with_closure: bool) -> bool:
        """Whether parameters can have moved when a transform or a hook raises."""
        owner = self.owner
        return bool(owner._hooked_slots or owner.update or owner.post or (with_closure and owner.pre))


class _NoGrad:
    """Like ``torch.no_grad()``, in a third of its time, which would be that of several small operations."""

    def __enter__(self) -> None:
        self._was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self._was_enabled)


def _writable(grad: Tensor) -> Tensor:
    """Return ``grad``, or a copy if it is lazy or its elements share memory, as those of an expanded tensor do."""
    if grad.layout is not torch.strided:
        return grad
    return (grad.contiguous() if is_expanded(grad) else grad).resolve_conj().resolve_neg()


def _subtract(params: list[Tensor], before: list[Tensor], *, checks_sums: bool) -> None:
    """Replace parameters by how far they have moved, in place.

    An element that was infinite and still is has not moved, but inf - inf is NaN, so a mask makes its displacement 0.
    Masks take longer than all else here, so ``checks_sums`` finds out first, from sums, whether any are needed. It is
    for the CPU alone, because reading sums from another device waits for the device.
    """
    stays = [] if checks_sums and _are_finite(before) else list(map(torch.eq, params, before))
    torch._foreach_sub_(params, before)
    for tensor, same in zip(params, stays, strict=False):
        tensor.masked_fill_(same, 0)


def _are_finite(tensors: list[Tensor]) -> bool:
    large = [tensor for tensor in tensors if tensor.numel() >= 2**14]
    small = [tensor for tensor in tensors if tensor.numel() < 2**14] if large else tensors
    sums = [tensor.sum().item() for tensor in ([_flatten_dense_tensors(small)] if small else []) + large]
    return math.isfinite(sum(sums))


def rescales(group: Group) -> bool:
    """Whether gradients of the group are scaled or shifted after ``pre``. A tensor counts, without being read."""
    factor, bias = group.get("grad_scale", 1.0), group.get("grad_bias", 0.0)
    return isinstance(factor, Tensor) or isinstance(bias, Tensor) or factor != 1.0 or bias != 0.0


def _rescale_grads(group_index: int, group: Group) -> None:
    factor, bias = group.get("grad_scale", 1.0), group.get("grad_bias", 0.0)
    shifts = isinstance(bias, Tensor) or bias != 0.0
    plain: list[Tensor] = []
    others: list[Tensor] = []
    for index, param in enumerate(group["params"]):
        if (grad := param.grad) is None:
            continue
        if grad.layout is not torch.strided and shifts:
            raise TypeError(
                f"{describe(group_index, group, index)}: grad_bias is added to every element, and so needs a dense "
                f"gradient, got the layout {grad.layout}; use grad.to_dense(), or the number 0 for grad_bias"
            )
        is_plain = grad.layout is torch.strided and not is_distributed(grad)  # others cannot be in the same list
        (plain if is_plain else others).append(grad)
    if plain:
        torch._foreach_mul_(plain, factor)
    if plain and shifts:
        torch._foreach_add_(plain, bias)
    for grad in others:
        grad.mul_(factor)
        if shifts:
            grad.add_(bias)


def is_dry_run(param_groups: Sequence[Group]) -> bool:
    """Whether the step is only to make states and to move nothing, as in ``torch.distributed.checkpoint``."""
    for group in param_groups:
        lr = group.get("lr")
        if (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0.0:
            return False
    grads = [param.grad for group in param_groups for param in group["params"] if param.grad is not None]
    # Whole tensors are asked, because all processes must decide alike.
    return bool(grads) and not any(gather(grad.any()) for grad in grads)
