"""``attach``: chains around the steps of an optimizer that exists, in place, through its hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradchain._ranges import as_number
from gradchain._units import print_slots
from gradchain.adapters._trial import explain_step
from gradchain.adapters.optimizer import ParamTransformingOptimizer
from gradchain.chain import Chain, chain
from gradchain.contract import Group, Transform, is_same
from gradchain.engine.engine import Engine, Weak
from gradchain.engine.groups import (
    ATTACHED,
    check_group,
    complete_groups,
    hyperparameters,
    make_chains,
    number_chains,
    prefixes,
    require_new,
    warn_of_short,
)
from gradchain.engine.metrics import read_metrics
from gradchain.engine.operations import SkippedStep
from gradchain.engine.reach import check_reach
from gradchain.engine.signals import make_signals
from gradchain.engine.states import KEY, SLOTS, ParamEntry, ParamTable, TransformStates
from gradchain.engine.step import Step, is_dry_run, rescales
from gradchain.explain import Explanation
from gradchain.stage import below, beneath

UNSCALES = "_step_supports_amp_scaling"
"""The attribute by which a ``GradScaler`` knows that a step unscales gradients."""


def attach(
    optimizer: Optimizer,
    *,
    pre: Transform | None = None,
    update: Transform | None = None,
    post: Transform | None = None,
    param_ndim: int | None = -1,
    defaults: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> Attached:
    """Put transforms around every step of an optimizer that exists, from now on.

    The optimizer stays the object that schedulers, a ``GradScaler``, Lightning or a Trainer know, and its ``step``
    makes the numbers that ``ParamTransformingOptimizer`` makes with the same chains: with a closure too, which is
    transformed after every evaluation. Hyperparameters and ``param_ndim`` join the param groups; ``state_dict`` and
    ``load_state_dict`` carry the states of the transforms, uncast, in the form that ``ParamTransformingOptimizer`` has.

    Attaching twice composes: what was attached later comes later in each slot, as in ``chain(first, second)``, and the
    second ``update`` comes before the first ``post``. Keys go on counting from what is attached already, so that a
    second ``scale`` has ``"scale_2.factor"``, which it keeps when the first one is removed.

    If the optimizer has loaded a checkpoint before, as in a callback at the start of training, the next step takes up
    the states of transforms in it. It warns of those that do not fit, and of those that the optimizer has rounded to
    the dtype of half-precision parameters.

    If a transform raises, parameters and the states of transforms are as they were before the step. What differs from
    ``ParamTransformingOptimizer`` comes from being inside of the step: if the optimizer itself raises, it leaves what
    it has done; and when a transform skips the step, the optimizer makes one without gradients, of which parameters and
    param groups, and with a closure its state too, are restored.

    A fused optimizer leaves it to a ``GradScaler`` to unscale gradients as long as something is attached, and so waits
    for the device once a step. Copies and pickles of an optimizer have no hooks, and so no transforms: attach to the
    copy, and then load a copy of the state dict of the original. In a step that ``torch.compile`` compiles, what is
    attached runs as it does elsewhere, between two graphs.

    Args:
        optimizer: Any optimizer. Of one that a framework has wrapped, the one inside.
        pre: The transform of each gradient.
        update: The transform of each displacement. It needs a copy of the parameters; ``post`` needs one only where a
            stage cannot be traced.
        post: The transform of each parameter.
        param_ndim: What the transforms act on, where a group does not say it; see ``broadcast``. The default, -1, is
            each entry along the first dimension: each row of weights, but each element of a bias.
        defaults: Further keys of the groups, with the values for those that lack them.
        model: The model that has the parameters, by which they get names; see ``ParamTransformingOptimizer``. Most code
            makes optimizers without names, which patterns such as ``masked(t, "*lora_B*")`` need.

    Returns:
        What ends it: by ``remove()``, or at the end of a ``with`` block. It does not keep the optimizer alive.

    Raises:
        TypeError: Something is of the wrong type, or ``optimizer`` has chains already, in another way.
        ValueError: A value is out of range, ``param_ndim`` does not fit a parameter, a key has two defaults, or no
            parameter has a name that matches a pattern of ``masked`` or ``freeze``.
        UserWarning: A kind of ``partition`` matches no parameter, or a key of a group is the last part of the key of a
            hyperparameter.
        RuntimeError: In a step: gradients are still scaled, which the optimizer would undo after the transforms.

    Example:
        >>> import torch
        >>> from gradchain import clip_by_norm
        >>> x = torch.tensor([0.0, 0.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([x], lr=1.0)
        >>> attached = attach(optimizer, pre=clip_by_norm(1.0), param_ndim=None)
        >>> optimizer.param_groups[0]["clip_by_norm.max_norm"] = 0.5
        >>> (x * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> x
        tensor([-0.3000, -0.4000], requires_grad=True)
        >>> attached.remove()
        >>> optimizer.step()
        >>> "clip_by_norm.max_norm" in optimizer.param_groups[0]
        False
    """
    hooks = _hooks_of(optimizer)
    chains = make_chains(pre=pre, update=update, post=post)
    numbered = number_chains(chains, prefixes(getattr(hooks, slot) for slot in SLOTS))
    require_new(hyperparameters(numbered), optimizer, hooks.defaults)
    own_defaults = {"param_ndim": param_ndim, **hyperparameters(numbered), **(defaults or {})}
    own_defaults = {key: as_number(value) for key, value in own_defaults.items()}
    known = sorted((defaults or {}).keys() & (optimizer.defaults.keys() - hooks.defaults.keys() | {"params"}))
    if known:
        raise ValueError(f"defaults has the keys {known} of {type(optimizer).__name__}; set them in its param groups")
    attached = Attached(hooks, chains, own_defaults)
    hooks.add(attached, numbered, model)
    return attached


class Attached:
    """Transforms around the steps of an optimizer, as long as they are not removed. Made by ``attach``.

    Attributes:
        defaults: The keys that joined the param groups, with the values for those that lacked them.
    """

    def __init__(self, hooks: _Hooks, chains: Mapping[str, Chain], defaults: Mapping[str, Any]) -> None:
        self._hooks = Weak(hooks)
        self._optimizer = Weak(hooks.inner_opt)
        self._name = type(hooks.inner_opt).__name__
        self._chains = dict(chains)
        self.defaults = dict(defaults)

    @property
    def pre(self) -> Chain:
        """The chain of each gradient. To replace one, ``remove()``, and attach another."""
        return self._chains["pre"]

    @property
    def update(self) -> Chain:
        """The chain of each displacement."""
        return self._chains["update"]

    @property
    def post(self) -> Chain:
        """The chain of each parameter."""
        return self._chains["post"]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; a ``ReferenceError`` if it no longer exists."""
        return self._optimizer()

    def remove(self) -> None:
        """Take the transforms, their hyperparameters and their states out of the optimizer; a second time, nothing."""
        if self._hooks.exists:
            self._hooks().remove(self)

    def explain(self) -> Explanation:
        """Show what each stage of all that is attached would do in the next step.

        See ``ParamTransformingOptimizer.explain``.

        Example:
            >>> import torch
            >>> from gradchain import clip_by_norm
            >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
            >>> optimizer = torch.optim.SGD([x])
            >>> attached = attach(optimizer, pre=clip_by_norm(1.0), param_ndim=None)
            >>> x.square().sum().backward()
            >>> [round(row.norm, 3) for row in attached.explain().rows]
            [10.0, 1.0]
        """
        if not self._hooks.exists:
            raise RuntimeError(f"{self!r} is removed, so there is nothing to explain; call explain() before remove()")
        hooks = self._hooks()
        return explain_step(hooks.engine, hooks.defaults)

    def metrics(self, *, per_parameter: bool = False) -> dict[str, float]:
        """What ``monitor``, clips and skips have seen, of all that is attached; see ``ParamTransformingOptimizer``."""
        if not self._hooks.exists:
            raise RuntimeError(f"{self!r} is removed, so there are no metrics; call metrics() before remove()")
        return read_metrics(self._hooks().engine, per_parameter=per_parameter)

    def signal(self, *, reduce: str | None = "mean", **values: float | Tensor) -> None:
        """Give transforms values for the next step, such as the loss; see ``ParamTransformingOptimizer.signal``."""
        if not self._hooks.exists:
            raise RuntimeError(f"{self!r} is removed, so there is nothing to signal to; call signal() before remove()")
        hooks = self._hooks()
        hooks.engine.signals |= make_signals(values, hooks.param_groups, reduce)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the ``with`` block, parameters have their averages; see ``ParamTransformingOptimizer.averaged``.

        Example:
            >>> import torch
            >>> from gradchain import param_ema
            >>> x = torch.tensor([1.0], requires_grad=True)
            >>> optimizer = torch.optim.SGD([x], lr=1.0)
            >>> attached = attach(optimizer, post=param_ema(0.5, debias=False))
            >>> x.grad = torch.tensor([1.0])
            >>> optimizer.step()
            >>> with attached.averaged():
            ...     print(x.item())
            0.5
            >>> x.item()
            0.0
        """
        if not self._hooks.exists:
            raise RuntimeError(f"{self!r} is removed, and its averages with it; call averaged() before remove()")
        with self._hooks().engine.averaged():
            yield

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        chains = {slot: members for slot in SLOTS if (members := getattr(self, slot))}
        if not (self._hooks.exists and self in self._hooks().attached):
            return f"attach({self._name}{''.join(f', {slot}={members}' for slot, members in chains.items())})"
        return f"attach(\n  {self._name},\n{print_slots(self._hooks().engine.list_stages(chains))})"


class _Hooks:
    """All that is attached to an optimizer, as one chain a slot, and the hooks that run it."""

    _hooked_slots: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = Weak(optimizer)
        self.pre = self.update = self.post = chain()
        self.engine = Engine(self, TransformStates())
        self.attached: list[Attached] = []
        self._numbered: list[Mapping[str, Chain]] = []
        """The chains of each, with the keys that they keep when others are removed."""
        self.defaults: dict[str, Any] = {}
        self._own_keys: list[set[str]] = []
        """The keys that each group had by itself."""
        self._handles: list[RemovableHandle] = []
        self._own_flag: dict[str, Any] = {}
        """What the optimizer itself had of ``UNSCALES``."""
        self._running: _Running | None = None
        self._loaded: TransformStates | None = None
        """What is being loaded, until the optimizer has loaded its own."""
        self._has_saved = False
        self._loads_by_own_code = False

    @property
    def inner_opt(self) -> Optimizer:
        """The optimizer."""
        return self._optimizer()

    @property
    def param_groups(self) -> list[Group]:
        """The param groups of the optimizer."""
        return self.inner_opt.param_groups

    def _run_hook(self, slot: str, entry: ParamEntry) -> None:
        """There are none."""

    def add(self, attached: Attached, numbered: Mapping[str, Chain], model: nn.Module | None) -> None:
        """Let it act after all others."""
        chains = {slot: chain(getattr(self, slot), numbered[slot]) for slot in SLOTS}
        hyperparameters(chains)  # raises where two have one key
        for key, value in attached.defaults.items():
            if key in self.defaults and not is_same(value, self.defaults[key]):
                raise ValueError(
                    f'"{key}" is {self.defaults[key]!r} by what is attached already, and cannot be {value!r} too; give '
                    "the same, with broadcast(t, n) around a transform that needs another param_ndim"
                )
        groups = [{**attached.defaults, **group} for group in self.param_groups]
        for index, group in enumerate(groups):
            check_group(index, group, chains)
        names = self.engine.names.joined_by(model, self.engine.param_table.params)
        check_reach(numbered, ParamTable(groups, names).entries)
        optimizer = self.inner_opt
        for index, group in enumerate(groups):
            warn_of_short(index, group.keys() - (optimizer.defaults.keys() - self.defaults.keys()), numbered)
        new = attached.defaults.keys() - self.defaults.keys() - optimizer.defaults.keys()
        self._own_keys += [set() for _ in self.param_groups[len(self._own_keys) :]]
        for group, own_keys in zip(self.param_groups, self._own_keys, strict=True):
            own_keys |= new & group.keys()
        if not self.attached:
            self.engine.adopt(TransformStates.taken_out_of(optimizer))
            self._register()
        self.attached.append(attached)
        self._numbered.append(numbered)
        self.defaults.update(attached.defaults)
        optimizer.defaults.update(attached.defaults)
        complete_groups(self.param_groups, self.defaults)
        self.engine.note_keys()
        self.engine.set_names(names)
        self.pre, self.update, self.post = (chains[slot] for slot in SLOTS)
        try:
            self.engine.begin()
        except Exception:
            self.remove(attached)
            raise

    def remove(self, attached: Attached) -> None:
        """Leave the optimizer as if it had never been there."""
        if attached not in self.attached:
            return
        index = self.attached.index(attached)
        before, after = self.attached[:index], self.attached[index + 1 :]
        paths: dict[str, str] = {}
        del self._numbered[index]
        for slot in SLOTS:
            start = sum(len(getattr(each, slot)) for each in before)
            gap = range(start, start + len(getattr(attached, slot)))
            old = [key for i, key in getattr(self, slot).keys.items() if i not in gap]
            new = chain(*(each[slot] for each in self._numbered))
            paths |= {f"{slot}.{a}.": f"{slot}.{b}." for a, b in zip(old, new.keys.values(), strict=True)}
            setattr(self, slot, new)
        self._rename_states(paths)
        self.attached = before + after
        self.defaults = {key: value for each in self.attached for key, value in each.defaults.items()}
        for key in attached.defaults.keys() - self.defaults.keys():
            self.inner_opt.defaults.pop(key, None)
            for number, group in enumerate(self.param_groups):
                if number >= len(self._own_keys) or key not in self._own_keys[number]:
                    group.pop(key, None)
        if not self.attached:
            self._unregister()

    def _rename_states(self, paths: Mapping[str, str]) -> None:
        """Keep the states whose keys begin with one of ``paths``, under the new one."""
        state, by_param = self.inner_opt.state, {}
        for param, states in self.engine.synced_states().by_param.items():
            kept = [beneath(below(states, old), new) for old, new in paths.items()]
            by_param[param] = {key: value for each in kept for key, value in each.items()}
        shown = self._shown()
        for param in shown:
            del state[param][KEY]
        self.engine.reset(TransformStates({param: states for param, states in by_param.items() if states}))
        self.engine.states.share_with(self.inner_opt, shown)
        for param in shown:
            if not state[param]:
                del state[param]

    def _shown(self) -> list[Tensor]:
        """The parameters that have states of transforms in the optimizer."""
        return [param for param, state in self.inner_opt.state.items() if isinstance(state, dict) and KEY in state]

    def _register(self) -> None:
        optimizer = self.inner_opt
        optimizer.__dict__[ATTACHED] = self
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Code of an optimizer's own may call none of the hooks, or go on after them with the state dict as it was.
        for name, method in (("state_dict", self._save), ("load_state_dict", self._load)):
            if getattr(type(optimizer), name) is not getattr(Optimizer, name):
                optimizer.__dict__[name] = method
        if "_optimizer_state_dict_post_hooks" in optimizer.__dict__:
            self._handles += [
                optimizer.register_state_dict_post_hook(self._after_saving),
                optimizer.register_load_state_dict_pre_hook(self._before_loading),
                optimizer.register_load_state_dict_post_hook(self._after_loading),
            ]
        self._own_flag = {key: value for key, value in optimizer.__dict__.items() if key == UNSCALES}
        if getattr(optimizer, UNSCALES, False):
            # Or a GradScaler would leave the gradients scaled, for a fused kernel, which comes after the hooks.
            optimizer.__dict__[UNSCALES] = False

    def _unregister(self) -> None:
        for handle in self._handles:
            handle.remove()
        attributes = self.inner_opt.__dict__
        for name, method in (("state_dict", self._save), ("load_state_dict", self._load)):
            if attributes.get(name) == method:
                del attributes[name]
        attributes.pop(UNSCALES, None)
        attributes.update(self._own_flag)
        attributes.pop(ATTACHED)

    # The hooks

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._running is not None and self._running.goes_on():
            self._running.within += 1
            return None  # step calls super().step(), which calls the same hooks
        self._running = None
        return self._begin(_caller(), args, kwargs)

    @_disable_dynamo
    def _begin(self, frame: FrameType | None, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        complete_groups(self.param_groups, self.defaults)
        if not (self.pre or self.update or self.post or any(map(rescales, self.param_groups))):
            return None
        _require_unscaled(self.inner_opt)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None and is_dry_run(self.param_groups):
            self._running = _Running(frame, self.engine.start)
            return None
        step = _HookedStep(self.engine, closure)
        if closure is None:
            step.transform_grads()
        elif "closure" in kwargs:
            kwargs = {**kwargs, "closure": step.evaluate}
        else:
            args = (args[0], step.evaluate, *args[2:])
        self._running = _Running(frame, step.finish)
        return args, kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._running is not None and self._running.within:
            self._running.within -= 1
        elif self._running is not None:
            self._end(self._running)

    @_disable_dynamo
    def _end(self, running: _Running) -> None:
        self._running = None
        running.finish()

    def _after_saving(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.engine.complete(state_dict, self.defaults)
        self._has_saved = True

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        if self._loads_by_own_code:
            return None
        self._loaded, bare = self.engine.read_state_dict(state_dict, self.defaults)
        return bare

    def _after_loading(self, optimizer: Optimizer) -> None:
        if self._loaded is not None and not self._loads_by_own_code:
            complete_groups(self.param_groups, self.defaults)
            self.engine.load_states(self._loaded)
            self._loaded = None

    # In place of the methods of an optimizer that has its own

    @torch.no_grad()
    def _save(self, *args: Any, **kwargs: Any) -> Any:
        self._has_saved = False
        state_dict = type(self.inner_opt).state_dict(self.inner_opt, *args, **kwargs)
        if not self._has_saved:
            self._after_saving(self.inner_opt, state_dict)
        return state_dict

    @torch.no_grad()
    def _load(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._loaded, bare = self.engine.read_state_dict(state_dict, self.defaults)
        self._loads_by_own_code = True
        try:
            type(self.inner_opt).load_state_dict(self.inner_opt, bare, *args, **kwargs)
        finally:
            self._loads_by_own_code = False
        self._after_loading(self.inner_opt)


@dataclass
class _Running:
    """A step that has begun."""

    frame: FrameType | None
    """The one that calls the hooks."""
    finish: Callable[[], Any]
    within: int = 0
    """How many steps have begun in it that belong to it."""

    def goes_on(self) -> bool:
        """Whether it has not ended, as it does without notice when the optimizer raises."""
        frame = inspect.currentframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


class _HookedStep:
    """A step from the inside, where it can be changed but not called off."""

    def __init__(self, engine: Engine, closure: Callable[[], Any] | None) -> None:
        self.engine = engine
        self.closure = closure
        self.step = Step(engine, with_closure=closure is not None)
        self.skipped: SkippedStep | None = None
        self.grads: list[Tensor | None] = []
        self.groups: list[Group] = []

    def transform_grads(self) -> None:
        """Do all that precedes the step of the optimizer, if it has no closure."""
        self._run(self.step.transform_grads)

    def evaluate(self) -> Any:
        """Call the closure and transform the gradients, unless the step is skipped."""
        assert self.closure is not None
        return self._run(self.step.transforming(self.closure)) if self.skipped is None else self.skipped.loss

    def finish(self) -> None:
        """Do all that comes after the step of the optimizer."""
        if self.skipped is None:
            self._run(self.step.finish)
            return
        param_table = self.step.param_table
        for param, grad in zip(param_table.params, self.grads, strict=True):
            param.grad = grad
        for group, values in zip(param_table.groups, self.groups, strict=True):
            group.clear()
            group.update(values)
        self.step.skip(self.skipped)

    def _run(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except SkippedStep as skipped:
            self._skip(skipped)
            return skipped.loss
        except BaseException:
            self.step.undo()
            raise

    def _skip(self, skipped: SkippedStep) -> None:
        """Hide the gradients: a hook cannot end the step, but without them there is nothing to do in it."""
        step, param_table = self.step, self.step.param_table
        self.skipped = skipped.with_traceback(None)  # whose frames hold this step
        step.undo()
        if self.closure is not None and step.inner_state is None:
            step.inner_state = self.engine.states.copy_beside(self.engine.owner.inner_opt.state)
        self.grads = [param.grad for param in param_table.params]
        self.groups = [dict(group) for group in param_table.groups]
        for param in param_table.params:
            param.grad = None


def _hooks_of(optimizer: Optimizer) -> _Hooks:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"attach needs a torch.optim.Optimizer, got {optimizer!r}")
    if isinstance(optimizer, ParamTransformingOptimizer):
        raise TypeError(f"{name} has chains already; put its transforms and yours in one chain(...)")
    if "_gradchain_defaults" in optimizer.__dict__:
        raise TypeError(
            f"{name} is inside of a ParamTransformingOptimizer, which has chains already; put its transforms and yours "
            "in one chain(...)"
        )
    if "_optimizer_step_pre_hooks" not in optimizer.__dict__:
        raise TypeError(
            f"{name} has no step hooks, since it is around another optimizer; attach to that, its .optimizer"
        )
    if not getattr(type(optimizer).step, "hooked", False):  # Optimizer.__init__ has not been called
        if "step" in optimizer.__dict__:
            raise RuntimeError(f"{name}.step calls no hooks since a scheduler has wrapped it; attach before that")
        optimizer._patch_step_function()
    hooks: _Hooks = optimizer.__dict__.get(ATTACHED) or _Hooks(optimizer)
    return hooks


def _require_unscaled(optimizer: Optimizer) -> None:
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            f"gradients are still scaled, and {type(optimizer).__name__}.grad_scale undoes it after the transforms; "
            "call scaler.unscale_(optimizer) before step(), or take ParamTransformingOptimizer"
        )


def _caller() -> FrameType | None:
    """The frame that calls the function that calls this one; in a graph there is none."""
    frame = None if torch.compiler.is_compiling() else inspect.currentframe()
    for _ in range(2):
        frame = None if frame is None else frame.f_back
    return frame
