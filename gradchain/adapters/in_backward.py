"""``step_in_backward``: each parameter steps as soon as its gradient is there, so that one gradient lives at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradchain.adapters.optimizer import ParamTransformingOptimizer
from gradchain.contract import Group, is_same
from gradchain.engine.combined import needs_closure, parts
from gradchain.engine.engine import Engine
from gradchain.engine.states import SLOTS, ParamEntry, ParamTable, TransformStates
from gradchain.engine.step import Step, is_dry_run
from gradchain.stage import Combinator, Stage


def step_in_backward(optimizer: ParamTransformingOptimizer) -> InBackward:
    """Make the step of each parameter within the backward pass, and drop its gradient.

    As soon as the gradient of a parameter is complete, the parameter makes the step that ``optimizer.step()`` would
    make, with the same numbers, and its ``grad`` becomes None: the memory for gradients is that of one parameter. The
    loop calls neither ``step`` nor ``zero_grad``. All else stays with the optimizer: param groups, schedulers, state,
    ``averaged``, checkpoints, which fit one that steps in the usual way.

    Every backward pass is a step: gradients can neither be accumulated over several, nor be clipped, unscaled by a
    ``GradScaler`` or averaged by ``DistributedDataParallel`` before it. A parameter without a gradient gets no ``post``
    either; one that is shared by segments of a reentrant ``torch.utils.checkpoint`` makes a step in each. Step hooks of
    the optimizer do not run; those of the inner optimizer run for each parameter. Parameters that are added or unfrozen
    later are left out until this is called again, which replaces what it did before. Parameters that are removed from
    the optimizer make no step, and keep their gradients.

    If a transform raises, so does the backward pass, and the parameter and the states of its transforms are as they
    were; parameters whose gradients came before have made their step, and the others make none.

    Args:
        optimizer: One whose transforms act on each tensor by itself, around an inner optimizer that does so, too.

    Returns:
        What ends it: by ``remove()``, or at the end of a ``with`` block.

    Raises:
        TypeError: ``optimizer`` is no ``ParamTransformingOptimizer``.
        ValueError: A transform needs a view over all tensors, or the inner optimizer needs a closure. In a backward
            pass: the inner optimizer writes to its param group, which all parameters share.

    Example:
        >>> import torch
        >>> from gradchain import clip_by_norm
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optim = ParamTransformingOptimizer([x], pre=clip_by_norm(1.0), param_ndim=None, lr=0.5)
        >>> with step_in_backward(optim):
        ...     (x * torch.tensor([3.0, 4.0])).sum().backward()
        >>> x, x.grad
        (tensor([0.7000, 0.6000], requires_grad=True), None)

    References:
        Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources (LOMO),
        https://arxiv.org/abs/2306.09782, 2023; the tutorial "How to save memory by fusing the optimizer step into the
        backward pass", https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html.
    """
    if not isinstance(optimizer, ParamTransformingOptimizer):
        raise TypeError(
            f"step_in_backward needs a ParamTransformingOptimizer, got {type(optimizer).__name__}; wrap it: "
            "ParamTransformingOptimizer(InnerOpt=...)"
        )
    for part in parts(optimizer.inner_opt):
        if needs_closure(part):
            raise ValueError(
                f"{type(part).__name__} evaluates a closure, which a backward pass is a part of; "
                "call optimizer.step(closure)"
            )
    hooks = [_OneParameter(optimizer, m) for m in optimizer._engine.param_table.entries if m.param.requires_grad]
    return InBackward(hook.register() for hook in hooks)


class InBackward:
    """Steps in the backward pass, as long as they are not removed. Made by ``step_in_backward``."""

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        """Leave gradients to ``optimizer.step()`` again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> InBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _OneParameter:
    """A hook of a parameter, and the owner of chains that act on it alone, in its place in an optimizer."""

    def __init__(self, optimizer: ParamTransformingOptimizer, entry: ParamEntry) -> None:
        self.optimizer = optimizer
        self.entry = entry
        (self._part,) = (
            part for part in parts(optimizer.inner_opt) if any(group is entry.group for group in part.param_groups)
        )
        self.inner_opt = _copy_for_one(self._part)
        self._seen: dict[str, Tensor] = {}
        """The signals that it has made a step with."""
        self._start()

    def register(self) -> RemovableHandle:
        """Let the parameter call it, in place of an earlier one, as when the cell of a notebook runs again."""
        hooks = self.entry.param._post_accumulate_grad_hooks or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, _OneParameter)]:
            del hooks[key]
        handle: RemovableHandle = self.entry.param.register_post_accumulate_grad_hook(self)
        return handle

    def __call__(self, param: Tensor) -> None:
        """Make the step of the parameter, if the optimizer still has it."""
        if not self._is_in_place():
            found = [entry for entry in self.optimizer._engine.param_table.entries if entry.param is param]
            if not found:
                return
            (self.entry,) = found
            self._start()
        try:
            self._step()
        finally:
            param.grad = None

    def _step(self) -> None:
        if not all(map(is_, self._sources, self._look())):
            self._start()
        self._take_signals()
        group = self.entry.group
        own_group = {**group, "params": [self.entry.param]}
        self.inner_opt.param_groups, self.inner_opt.state = [own_group], self._part.state
        if is_dry_run(self.optimizer.param_groups):
            self.inner_opt.step()
            self._engine.start()
        else:
            self._transform_and_step()
        for outer in (self.optimizer, self._part):
            outer.__dict__["_opt_called"] = True  # or a scheduler would warn that there was no step
        changed = [key for key, value in group.items() if own_group[key] is not value and key != "params"]
        written = [key for key in changed if not is_same(own_group[key], group[key])]
        if written:
            raise ValueError(
                f"{self.entry.place()}: {type(self.inner_opt).__name__} wrote {written} to its param group, for all "
                "parameters together; step_in_backward needs an inner optimizer that acts on each by itself"
            )

    def _transform_and_step(self) -> None:
        step = Step(self._engine)
        try:
            step.transform_grads()
            self.inner_opt.step()
            step.finish()
        except BaseException:
            step.undo()
            raise

    def _take_signals(self) -> None:
        """Take what was signalled since the last step of this parameter; the others make theirs with the same."""
        new = {key: value for key, value in self.optimizer._engine.signals.items() if value is not self._seen.get(key)}
        self._engine.signals.update(new)
        self._seen |= new

    def _is_in_place(self) -> bool:
        """Whether the parameter is where it was, with as many before it."""
        groups, (group, index) = self.optimizer.param_groups, self.entry.position
        params = groups[group]["params"] if group < len(groups) else []
        before = sum(len(each["params"]) for each in groups[:group])
        return index < len(params) and params[index] is self.entry.param and before + index == self.entry.number

    def _look(self) -> list[Any]:
        """What it depends on, which a checkpoint that is loaded replaces."""
        optimizer = self.optimizer
        group = optimizer.param_groups[self.entry.position[0]]
        engine = optimizer._engine
        return [group, engine.states, engine.counts, optimizer.pre, optimizer.update, optimizer.post]

    def _start(self) -> None:
        optimizer = self.optimizer
        self.pre, self.update, self.post = optimizer.pre, optimizer.update, optimizer.post
        for slot in SLOTS:
            _require_local(getattr(self, slot), slot)
        optimizer._engine.complete_groups()
        param_table = copy.copy(optimizer._engine.param_table)
        self.entry = param_table.entries[self.entry.number]
        param_table.entries, param_table.params = [self.entry], [self.entry.param]
        param_table.groups = [self.entry.group]
        self._engine = _EngineOfOne(self, param_table, optimizer._engine)
        self._engine.counts = optimizer._engine.counts
        self._sources = self._look()

    @property
    def param_groups(self) -> list[Group]:
        """The group, with this parameter alone."""
        return self.inner_opt.param_groups

    @property
    def _own_defaults(self) -> Group:
        return self.optimizer._own_defaults

    @property
    def _hooked_slots(self) -> frozenset[str]:
        return self.optimizer._hooked_slots

    def _run_hook(self, slot: str, entry: ParamEntry) -> None:
        self.optimizer._run_hook(slot, entry)


class _EngineOfOne(Engine):
    """Runs chains on one parameter, which has the number and the group that it has among all."""

    def __init__(self, owner: Any, param_table: ParamTable, engine: Engine) -> None:
        self.check_keys = engine.check_keys  # type: ignore[method-assign] # of the groups of the optimizer
        super().__init__(owner, _StatesOfOne(engine.states.by_param), engine.numbered, engine.names)
        self._one = param_table

    @property
    def param_table(self) -> ParamTable:
        """The parameter."""
        return self._one


class _StatesOfOne(TransformStates):
    """The states of all parameters, of which a step changes those of one."""

    def share_with(self, inner_opt: Optimizer, params: Iterable[Tensor] | None = None) -> None:
        super().share_with(inner_opt, [param for group in inner_opt.param_groups for param in group["params"]])


def _copy_for_one(inner_opt: Optimizer) -> Optimizer:
    """A shallow copy. It has its own attributes, such as counters, as if it were made for one parameter."""
    copied = object.__new__(type(inner_opt))
    # Where a scheduler has patched "step", it is that of the original.
    copied.__dict__.update({key: value for key, value in inner_opt.__dict__.items() if key != "step"})
    return copied


def _require_local(stage: Stage, place: str) -> None:
    """Raise where a transform needs a view over all tensors."""
    for inner_place, member in stage.places() if isinstance(stage, Combinator) else ():
        _require_local(member, f"{place}: {inner_place}")
    if stage.measures:
        raise ValueError(
            f"{place}: it measures all tensors, of which a backward pass has one at a time; take one that acts on each "
            "tensor, such as clip_by_norm for clip_by_global_norm, or call optimizer.step() after the backward pass"
        )
