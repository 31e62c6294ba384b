"""``ParamTransformingOptimizer``: chains around the step of any ``torch.optim`` optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from gradchain.adapters._construction import Params, check_group, make_inner
from gradchain.adapters._states import KEY, ByParam, Member, SkippedStep, TransformStates, own
from gradchain.broadcast import broadcast, to_batch
from gradchain.chain import Chain, chain
from gradchain.transform import Group, Stage, Transform, is_same, locate, merge_hyperparameters, require_transform

SLOTS = ("pre", "update", "post")


class ParamTransformingOptimizer(Optimizer):
    r"""Transform gradients before each step of an inner optimizer, its updates, and parameters after it.

    .. math:: p \leftarrow \mathrm{post}(p + \mathrm{update}(\Delta)), \quad
        \Delta = \mathrm{inner}(p, \; c \cdot \mathrm{pre}(\nabla p) + b) - p

    A step evaluates the closure, if there is one; applies ``pre`` to each gradient, then ``grad_scale`` (c) and
    ``grad_bias`` (b); calls ``inner_opt.step``; applies ``update`` to each displacement that it made; and applies
    ``post`` to each parameter. With a closure, ``pre`` follows every evaluation of it. Gradients and parameters are
    written in place. A parameter without a gradient is skipped by ``pre`` and ``update`` and still gets ``post``.

    In its group a transform finds, besides what the group has, ``"param"`` (in ``pre`` and ``update``, before the
    step), ``"grad"`` (in ``update`` and ``post``), ``"index"``, the number of the parameter, and its ``"name"`` where
    the optimizer was given named parameters.

    ``param_groups``, ``state`` and ``defaults`` are those of the inner optimizer, so schedulers and checkpoints work on
    either. The hyperparameters of the chains, ``param_ndim``, ``grad_scale`` and ``grad_bias`` are keys of the groups.
    The states of stateful transforms are in ``state[param]["transforms"]``, by slot, once the inner optimizer has made
    its own; save and load them through this optimizer, since others cast them to the dtype of the parameter.

    A subclass can also override ``_pre_step_transform_`` and ``_post_step_transform_``, which run after the chains of
    their slots.

    If a transform or a hook raises within a step, the parameters and the states of the transforms are as they were
    before it; gradients and the state of the inner optimizer are as far as the step had come, except that a failing
    ``pre`` also restores the gradients. A step with a learning rate of 0 and zero gradients, which
    ``torch.distributed.checkpoint`` makes to see the state, moves nothing.

    Args:
        params: Parameters, named parameters or param groups, as any optimizer takes them. Not with an instance.
        InnerOpt: An optimizer type, a ``functools.partial`` of one, or an instance.
        pre: The transform of each gradient.
        update: The transform of each displacement. It needs a copy of the parameters, which ``post`` needs too.
        post: The transform of each parameter.
        param_ndim: What the transforms act on, per group; see ``broadcast``. The default, -1, is each entry along the
            first dimension: each row of weights, but each element of a bias.
        grad_scale: Factor of each gradient after ``pre``, per group.
        grad_bias: Added to each gradient after the factor, per group.
        defaults: Further keys of the groups, with the values for those that lack them.
        **inner_opt_kwargs: Passed to ``InnerOpt``.

    Raises:
        TypeError: ``InnerOpt`` is no optimizer, or something is of the wrong type.
        ValueError: ``params`` are missing, a value is out of range, ``param_ndim`` does not fit a parameter, or one
            hyperparameter has two defaults.

    Example:
        >>> from gradchain import project_l2_ball, sign
        >>> x = torch.tensor([-10.0, 10.0], requires_grad=True)
        >>> optim = ParamTransformingOptimizer([x], torch.optim.AdamW, pre=sign(), lr=1.0)
        >>> (10_000 * x).sum().backward()
        >>> optim.step()
        >>> x
        tensor([-10.9000,   8.9000], requires_grad=True)

        >>> inner = torch.optim.SGD([x], lr=1.0)
        >>> ParamTransformingOptimizer(InnerOpt=inner, post=project_l2_ball(2.0), param_ndim=None).step()
        >>> x.norm()
        tensor(2., grad_fn=<LinalgVectorNormBackward0>)

    References:
        rai-toolbox ``ParamTransformingOptimizer``, https://mit-ll-responsible-ai.github.io/responsible-ai-toolbox.
    """

    inner_opt: Optimizer
    pre: Chain
    update: Chain
    post: Chain
    _own_defaults: dict[str, Any]
    _states: TransformStates
    _stages: dict[str, tuple[Chain, Stage]]
    _vetted: bool

    def __init__(
        self,
        params: Params | None = None,
        InnerOpt: Optimizer | Callable[..., Optimizer] = SGD,
        *,
        pre: Transform | None = None,
        update: Transform | None = None,
        post: Transform | None = None,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        given = zip(SLOTS, (pre, update, post), strict=True)
        chains = {slot: chain() if t is None else chain(require_transform(t, slot)) for slot, t in given}
        own_defaults = {
            "param_ndim": param_ndim,
            "grad_scale": grad_scale,
            "grad_bias": grad_bias,
            **merge_hyperparameters((f"{slot} {place}", t) for slot in SLOTS for place, t in chains[slot].places()),
            **(defaults or {}),
        }
        inner_opt = make_inner(params, InnerOpt, inner_opt_kwargs)
        if isinstance(inner_opt, ParamTransformingOptimizer):
            raise TypeError(
                "InnerOpt is a ParamTransformingOptimizer already; put its transforms and yours in one chain(...)"
            )
        # Of an earlier wrapper of the same instance, as when the cell of a notebook runs again.
        earlier: dict[str, Any] = inner_opt.__dict__.get("_gradchain_defaults", {})
        known = sorted(own_defaults.keys() & (inner_opt.defaults.keys() - earlier.keys() | {"params"}))
        if known:
            raise ValueError(
                f"defaults has the keys {known} of {type(inner_opt).__name__}; pass them as keyword arguments, "
                f"{', '.join(f'{key}=...' for key in known)}"
            )
        groups = [
            {k: v for k, v in group.items() if k not in earlier or not is_same(v, earlier[k])}
            for group in inner_opt.param_groups
        ]
        for index, group in enumerate(groups):
            check_group(index, {**own_defaults, **group}, chains)
        for group, kept in zip(inner_opt.param_groups, groups, strict=True):
            group.clear()
            group.update(kept)
        for key in earlier:
            inner_opt.defaults.pop(key, None)
        inner_opt.defaults.update(own_defaults)
        for param_state in inner_opt.state.values():
            if isinstance(param_state, dict):
                param_state.pop(KEY, None)
        attributes = {
            "inner_opt": inner_opt,
            "_own_defaults": own_defaults,
            "_states": TransformStates(),
            "_stages": {},
            "_vetted": False,
            **chains,
        }
        # Not Optimizer.__init__: it would make groups, state and defaults of its own, apart from the inner optimizer's.
        # Its __setstate__ sets up all else: hooks, and the patched step.
        ParamTransformingOptimizer.__setstate__(self, attributes)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of the inner optimizer."""
        return self.inner_opt.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner_opt.param_groups = value

    @property
    def state(self) -> Any:
        """The state of the inner optimizer."""
        return self.inner_opt.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner_opt.state = value
        self._states.keep_those_in(value)

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the inner optimizer, with the keys of this one."""
        return self.inner_opt.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner_opt.defaults = value

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; see the class.

        Args:
            closure: Evaluates the loss, with gradients, and returns it.

        Returns:
            What the inner optimizer returns: the loss of the closure, or None.
        """
        self._complete_groups()
        if not any(self._acts(slot) for slot in SLOTS):
            return self.inner_opt.step() if closure is None else self.inner_opt.step(closure)
        members = self._members()
        if closure is None and self._is_rehearsal(members):
            loss = self.inner_opt.step()
            for slot in SLOTS:
                self._states.start(slot, self._stage(slot), members)
            self._states.show_in(self.inner_opt)
            return loss
        new_states: dict[str, ByParam] = {}
        with _restored_on_error([m.param for m in members] if self._moves_params(closure) else []) as before:
            for slot in ("update", "post"):
                stage = self._stage(slot)
                self._states.start(slot, stage, members)  # at the parameters before the first step
                if stage.stateful and self._states.can_skip(self._states.get(slot, members)):
                    raise ValueError(
                        f"{slot}: {getattr(self, slot)} has a transform that skips steps; it belongs in pre"
                    )
            try:
                if closure is None:
                    new_states["pre"] = self._transform_grads(members)
                    loss = self.inner_opt.step()
                else:
                    loss = self.inner_opt.step(self._transforming(closure, members, new_states))
            except SkippedStep as skipped:
                for member, value in zip(members, before, strict=False):
                    member.param.copy_(value)
                if skipped.inner_state is not None:
                    self.inner_opt.state = skipped.inner_state
                self._states.commit({"pre": skipped.states})
                skipped.raise_if_too_many()
                return skipped.loss
            if self.update:
                new_states["update"] = self._transform_updates(members, before)
            new_states["post"] = self._transform_params(members)
        self._states.commit(new_states)
        self._states.show_in(self.inner_opt)
        self._vetted = True
        return loss

    def _transforming(
        self, closure: Callable[[], Any], members: Sequence[Member], new_states: dict[str, ByParam]
    ) -> Callable[[], Any]:
        inner_state = None

        @functools.wraps(closure)
        def evaluate() -> Any:
            nonlocal inner_state
            with torch.enable_grad():
                loss = closure()
            try:
                # Each evaluation starts from the states before the step, so that they advance once a step.
                with torch.no_grad():
                    new_states["pre"] = self._transform_grads(members)
            except SkippedStep as skipped:
                skipped.loss, skipped.inner_state = loss, inner_state
                raise
            if inner_state is None and self._states.can_skip(new_states["pre"].values()):
                inner_state = self._states.copy_beside(self.inner_opt.state)  # a later evaluation may be the bad one
            return loss

        return evaluate

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

    @torch.no_grad()
    def _apply_pre_step_transform_(self) -> None:
        """Do all that precedes the inner step: ``pre``, ``_pre_step_transform_``, ``grad_scale`` and ``grad_bias``."""
        try:
            self._states.commit({"pre": self._transform_grads(self._members())})
        except SkippedStep as skipped:  # the gradients are as they were
            self._states.commit({"pre": skipped.states})
            skipped.raise_if_too_many()

    @torch.no_grad()
    def _apply_post_step_transform_(self) -> None:
        """Do all that comes after the inner step: ``post`` and ``_post_step_transform_``."""
        self._states.commit({"post": self._transform_params(self._members())})

    def _transform_grads(self, members: Sequence[Member]) -> ByParam:
        moved = [member for member in members if member.param.grad is not None]
        if not moved or not self._acts("pre"):
            return {}
        self._for_each(moved, "pre", _make_grad_writable)
        grads = [member.grad for member in moved]
        runs_hook = self._overrides("_pre_step_transform_")
        new_states: ByParam = {}

        def finish(member: Member) -> None:
            if runs_hook:
                _run_hook(self._pre_step_transform_, member.param, member.group)
            if not _is_number(member.group["grad_scale"], 1.0):
                member.grad.mul_(member.group["grad_scale"])
            if not _is_number(member.group["grad_bias"], 0.0):
                member.grad.add_(member.group["grad_bias"])

        # Results are written when all are there. Only hooks, and transforms that break the rules, write before: such a
        # transform does it in the first step.
        with _restored_on_error(grads if runs_hook or not self._vetted else []):
            if self.pre:
                inputs = {member.param: grad.detach() for member, grad in zip(moved, grads, strict=True)}
                results, new_states = self._run("pre", members, inputs, lambda m: {"param": m.param.detach()})
                if self._stage("pre").stateful:
                    self._states.raise_if_skipped(new_states)
                for member in moved:
                    member.grad.copy_(results[member.param])
            self._for_each(moved, "pre", finish)
        return new_states

    def _transform_updates(self, members: Sequence[Member], before: Sequence[Tensor]) -> ByParam:
        starts = {m.param: start for m, start in zip(members, before, strict=True) if m.param.grad is not None}
        updates = {param: param - start for param, start in starts.items()}
        none = torch.empty(0)
        results, new_states = self._run(
            "update", members, updates, lambda m: {"param": starts.get(m.param, none), **m.grad_context()}
        )
        for param, update in updates.items():
            if results[param] is not update:  # else before + (after - before) would be after, but for rounding
                param.copy_(starts[param] + results[param])
        return new_states

    def _transform_params(self, members: Sequence[Member]) -> ByParam:
        new_states: ByParam = {}
        if self.post:
            inputs = {member.param: member.param.detach() for member in members}
            results, new_states = self._run("post", members, inputs, Member.grad_context)
            for param, result in results.items():
                param.copy_(result)
        if self._overrides("_post_step_transform_"):
            self._for_each(members, "post", lambda m: _run_hook(self._post_step_transform_, m.param, m.group))
        return new_states

    def _run(
        self,
        slot: str,
        members: Sequence[Member],
        inputs: Mapping[Tensor, Tensor],
        context: Callable[[Member], Group],
    ) -> tuple[dict[Tensor, Tensor], ByParam]:
        """Run the chain of a slot, and return the results and the new states, by parameter."""
        stage = self._stage(slot)
        # Where a state is one for all, it advances for all. What takes no part is a tensor without elements.
        members = [member for member in members if member.param in inputs or stage.shares_state]
        params = [member.param for member in members]
        tensors = [inputs[p] if p in inputs else p.new_empty((0,) * max(p.ndim, 1)) for p in params]
        groups = [{**member.group, **member.identity(slot), **context(member)} for member in members]
        self._states.start(slot, stage, members)
        try:
            results, new_states = stage.run(tensors, groups, self._states.get(slot, members))
        except Exception as error:
            failed = getattr(error, "failed_group", None)
            places = [member.place() for member, group in zip(members, groups, strict=True) if group is failed]
            locate(error, ", ".join([slot, *places]))
            raise
        by_param = {param: result for param, result in zip(params, results, strict=True) if param in inputs}
        return by_param, {param: own(state, param) for param, state in zip(params, new_states, strict=True)}

    def _for_each(self, members: Sequence[Member], slot: str, act: Callable[[Member], None]) -> None:
        for member in members:
            try:
                act(member)
            except Exception as error:
                locate(error, f"{slot}, {member.place()}")
                raise

    def _stage(self, slot: str) -> Stage:
        members = self._chains()[slot]
        if self._stages.get(slot, (None,))[0] is not members:
            self._stages[slot] = members, broadcast(members)
        return self._stages[slot][1]

    def _members(self) -> list[Member]:
        groups = enumerate(self.param_groups)
        located = [(param, group, (g, i)) for g, group in groups for i, param in enumerate(group["params"])]
        return [Member(param, group, position, number) for number, (param, group, position) in enumerate(located)]

    def _acts(self, slot: str) -> bool:
        """Whether there is anything to do in a slot."""
        if getattr(self, slot) or self._overrides(f"_{slot}_step_transform_"):
            return True
        return slot == "pre" and not all(
            _is_number(group["grad_scale"], 1.0) and _is_number(group["grad_bias"], 0.0) for group in self.param_groups
        )

    def _overrides(self, hook: str) -> bool:
        return getattr(type(self), hook, None) is not getattr(ParamTransformingOptimizer, hook, None)

    def _moves_params(self, closure: Callable[[], Any] | None) -> bool:
        """Whether parameters can have moved when a transform or a hook raises."""
        early = closure is not None or self._overrides("_pre_step_transform_")
        return (early and self._acts("pre")) or any(self._acts(slot) for slot in ("update", "post"))

    def _is_rehearsal(self, members: Sequence[Member]) -> bool:
        """Whether the step is meant to make state and move nothing, as ``torch.distributed.checkpoint`` does it."""
        lrs = [group.get("lr") for group in self.param_groups]
        on_host = [float(lr) if isinstance(lr, Tensor) and lr.device.type == "cpu" else lr for lr in lrs]
        if not all(_is_number(lr, 0.0) for lr in on_host):
            return False
        grads = [member.grad for member in members if member.param.grad is not None]
        return bool(grads) and not any(grad.any() for grad in grads)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the ``with`` block, parameters have their averages, from ``param_ema`` or ``lookahead`` in ``post``.

        Parameters without an average, and all of them before the first step, stay as they are.

        Example:
            >>> from gradchain import param_ema
            >>> x = torch.tensor([1.0], requires_grad=True)
            >>> optim = ParamTransformingOptimizer([x], post=param_ema(0.5, debias=False), lr=1.0)
            >>> x.grad = torch.tensor([1.0])
            >>> optim.step()
            >>> with optim.averaged():
            ...     print(x.item())
            0.5
            >>> x.item()
            0.0
        """
        averages = self._states.averages()
        current = [param.detach().clone() for param, _ in averages]
        with torch.no_grad():
            for param, average in averages:
                param.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (param, _), value in zip(averages, current, strict=True):
                    param.copy_(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``torch.optim.Optimizer.add_param_group``."""
        self.inner_opt.add_param_group(param_group)
        try:
            check_group(len(self.param_groups) - 1, self.param_groups[-1], self._chains())
        except Exception:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state dict of the inner optimizer, with the states of the transforms under ``"transforms"``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.inner_opt.state_dict()
        self._states.add_to(state_dict, self._members())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of a bare inner one; group keys that it lacks get the defaults."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        members = self._members()
        states, bare = TransformStates.split(state_dict, members)
        for slot in SLOTS:
            states.require_form(slot, self._stage(slot), members)
        for index, (saved, group) in enumerate(zip(bare["param_groups"], self.param_groups, strict=False)):
            check_group(index, {**self._own_defaults, **saved, "params": group["params"]}, self._chains())
        self.inner_opt.load_state_dict(bare)
        self._complete_groups()
        self._states = states
        self._states.show_in(self.inner_opt, [param for param, state in self.inner_opt.state.items() if state])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _chains(self) -> dict[str, Chain]:
        return {slot: getattr(self, slot) for slot in SLOTS}

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for key, value in self._own_defaults.items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        # Like torch, without hooks; "step" is in the instance only where a scheduler has patched it.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.inner_opt.__dict__["_gradchain_defaults"] = self._own_defaults  # which copies of an optimizer lose
        self._complete_groups()

    def __repr__(self) -> str:
        slots = "".join(f"  {slot}={members},\n" for slot, members in self._chains().items())
        inner = repr(self.inner_opt).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n{slots}  inner_opt={inner}\n)"


def _make_grad_writable(member: Member) -> None:
    grad = member.grad
    if grad.layout is not torch.strided:
        raise TypeError(f"transforms need a dense gradient, got the layout {grad.layout}; use grad.to_dense()")
    if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
        member.param.grad = grad.contiguous()  # an expanded gradient: its elements share memory


def _run_hook(hook: Callable[..., None], param: Tensor, group: Group) -> None:
    """Call ``hook`` on ``param`` and its gradient in batch form, and carry over what it writes."""
    batch = to_batch(param.detach(), group["param_ndim"])
    originals = [(param, batch)]
    if param.grad is not None:
        batch_grad = batch.grad = to_batch(param.grad.detach(), group["param_ndim"])
        originals.append((param.grad, batch_grad))
    before = batch.grad
    hook(batch, optim_group=group)
    if batch.grad is not before:
        raise ValueError(
            f"{hook.__qualname__} rebinds param.grad; edit it in place: param.grad.copy_(...), param.grad.mul_(...)"
        )
    for original, batched in originals:
        if batched.data_ptr() != original.data_ptr():  # no view could be made
            original.copy_(batched.reshape(original.shape))


@contextmanager
def _restored_on_error(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give ``tensors`` back their values if the body raises; yields the copies."""
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield saved
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        raise


def _is_number(value: Any, number: float) -> bool:
    """Whether ``value`` is ``number``. Tensors are not read: that would synchronise the device."""
    return not isinstance(value, Tensor) and bool(value == number)
