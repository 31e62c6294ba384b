"""The hooks by which optimizers that exist run what is attached to them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradchain.adapters._saving import Saving
from gradchain.chain import Chain, chain
from gradchain.contract import Group, is_same
from gradchain.engine.combined import CombinedOptimizer, defaults_of_any, name_of
from gradchain.engine.engine import Engine
from gradchain.engine.groups import ATTACHED, hyperparameters
from gradchain.engine.operations import SkippedStep
from gradchain.engine.reach import check_setup
from gradchain.engine.states import KEY, SLOTS, ParamEntry, TransformStates
from gradchain.engine.step import Step, is_dry_run, rescales
from gradchain.engine.weak import Weak
from gradchain.stage import below, beneath

if TYPE_CHECKING:
    from gradchain.adapters.attach import Attached


class Hooks:
    """All that is attached to one or several optimizers, as one chain a slot, and the hooks that run it."""

    _hooked_slots: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = _WeakSequence(optimizers)
        self._combined = CombinedOptimizer(self.optimizers) if len(optimizers) > 1 else None
        self.pre = self.update = self.post = chain()
        self.engine = Engine(self, TransformStates())
        self.attached: list[Attached] = []
        self._numbered: list[Mapping[str, Chain]] = []
        """The chains of each, with the keys that they keep when others are removed."""
        self._own_defaults: dict[str, Any] = {}
        self._own_keys: dict[tuple[int, int], set[str]] = {}
        """The keys that each group had by itself, by the optimizer and by the group."""
        self._handles: list[RemovableHandle] = []
        self._saving = [Saving(self, optimizer) for optimizer in optimizers]
        self._running: _Running | None = None
        self._round: _Round | None = None

    @property
    def inner_opt(self) -> Optimizer:
        """The optimizer, or all of them as one."""
        return self._combined or self.optimizers[0]

    @property
    def param_groups(self) -> list[Group]:
        """The param groups of all optimizers."""
        return self.inner_opt.param_groups

    def _run_hook(self, slot: str, entry: ParamEntry) -> None:
        """There are none."""

    def _located_groups(self) -> Iterator[tuple[tuple[int, int], Group]]:
        for number, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                yield (number, index), group

    def add(self, attached: Attached, numbered: Mapping[str, Chain], model: nn.Module | None) -> None:
        """Let it act after all others."""
        chains = {slot: chain(getattr(self, slot), numbered[slot]) for slot in SLOTS}
        hyperparameters(chains)  # raises where two have one key
        for key, value in attached.defaults.items():
            if key in self._own_defaults and not is_same(value, self._own_defaults[key]):
                raise ValueError(
                    f'"{key}" is {self._own_defaults[key]!r} by what is attached already, and cannot be {value!r} too; '
                    "give the same, with broadcast(t, n) around a transform that needs another param_ndim"
                )
        groups = [{**attached.defaults, **group} for group in self.param_groups]
        names = self.engine.names.joined_by(model, self.engine.param_table.params)
        known = defaults_of_any(self.inner_opt).keys()
        check_setup(groups, chains, numbered, names, known - self._own_defaults.keys())
        new = attached.defaults.keys() - self._own_defaults.keys() - known
        for place, group in self._located_groups():
            self._own_keys.setdefault(place, set()).update(new & group.keys())
        if not self.attached:
            self.engine.adopt(TransformStates.taken_out_of(self.inner_opt))
            self._register()
        self.attached.append(attached)
        self._numbered.append(numbered)
        self._own_defaults.update(attached.defaults)
        for optimizer in self.optimizers:
            optimizer.defaults.update(attached.defaults)
        self.engine.complete_groups()
        self.engine.note_keys()
        self.engine.set_names(names)
        self.pre, self.update, self.post = (chains[slot] for slot in SLOTS)
        try:
            self.engine.begin()
        except Exception:
            self.remove(attached)
            raise

    def remove(self, attached: Attached) -> None:
        """Leave the optimizers as if it had never been there."""
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
        self._own_defaults = {key: value for each in self.attached for key, value in each.defaults.items()}
        for key in attached.defaults.keys() - self._own_defaults.keys():
            for optimizer in self.optimizers:
                optimizer.defaults.pop(key, None)
            for place, group in self._located_groups():
                if key not in self._own_keys.get(place, ()):
                    group.pop(key, None)
        if not self.attached:
            self._unregister()

    def _rename_states(self, paths: Mapping[str, str]) -> None:
        """Keep the states whose keys begin with one of ``paths``, under the new one."""
        state, by_param = self.inner_opt.state, {}
        for param, states in self.engine.synced_states().by_param.items():
            kept = [beneath(below(states, old), new) for old, new in paths.items()]
            by_param[param] = {key: value for each in kept for key, value in each.items()}
        shown = [param for param, own in state.items() if isinstance(own, dict) and KEY in own]
        for param in shown:
            del state[param][KEY]
        self.engine.reset(TransformStates({param: states for param, states in by_param.items() if states}))
        self.engine.states.share_with(self.inner_opt, shown)
        for param in shown:
            if not state[param]:
                del state[param]

    def _register(self) -> None:
        for optimizer, saving in zip(self.optimizers, self._saving, strict=True):
            optimizer.__dict__[ATTACHED] = self
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            saving.register()

    def _unregister(self) -> None:
        for handle in self._handles:
            handle.remove()
        for optimizer, saving in zip(self.optimizers, self._saving, strict=True):
            saving.unregister()
            optimizer.__dict__.pop(ATTACHED)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._running is not None and self._running.goes_on():
            self._running.within += 1
            return None  # step calls super().step(), which calls the same hooks
        self._running = None
        return self._begin(optimizer, _caller(), args, kwargs)

    @_disable_dynamo
    def _begin(self, optimizer: Optimizer, frame: FrameType | None, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not (self.pre or self.update or self.post or any(map(rescales, self.param_groups))):
            return None
        _require_unscaled(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None and is_dry_run(optimizer.param_groups):
            self._running = _Running(frame, self.engine.start)
            return None
        if closure is not None and self._combined is not None:
            raise ValueError(
                f"{name_of(optimizer)} got a closure, but what is attached to {name_of(self.inner_opt)} acts on the "
                "gradients of all, before the first of them steps; call backward() first, and step() without a "
                "closure, or take ParamTransformingOptimizer(InnerOpt=[...]), which has one step for all"
            )
        if self._round is None or self._combined is None:
            step = _HookedStep(self.engine, closure)
            if closure is None:
                step.transform_grads()
            elif "closure" in kwargs:
                kwargs = {**kwargs, "closure": step.evaluate}
            else:
                args = (args[0], step.evaluate, *args[2:])
            self._round = _Round(step, self.optimizers)
        try:
            self._round.start(optimizer)
        except RuntimeError:
            self._round = None
            raise
        self._running = _Running(frame, functools.partial(self._finish, optimizer))
        return args, kwargs

    def _finish(self, optimizer: Optimizer) -> None:
        assert self._round is not None
        if self._round.finish(optimizer):
            step, self._round = self._round.step, None
            step.finish()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._running is not None and self._running.within:
            self._running.within -= 1
        elif self._running is not None:
            self._end(self._running)

    @_disable_dynamo
    def _end(self, running: _Running) -> None:
        self._running = None
        running.finish()


class _WeakSequence(Sequence[Optimizer]):
    """Optimizers that it does not keep alive."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._references = [Weak(optimizer) for optimizer in optimizers]

    def __getitem__(self, index: Any) -> Any:
        return self._references[index]()

    def __len__(self) -> int:
        return len(self._references)


@dataclass
class _Running:
    """The step of an optimizer, which has begun."""

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


class _Round:
    """One step of all optimizers, each in its turn, with the transforms before the first and after the last."""

    def __init__(self, step: _HookedStep, optimizers: Sequence[Optimizer]) -> None:
        self.step = step
        self._started: list[Optimizer] = []
        self._waiting = list(optimizers)
        self._grads = {
            optimizer: [(param, param.grad, _version(param.grad)) for param in _params(optimizer)]
            for optimizer in (optimizers if len(optimizers) > 1 else ())
        }

    def start(self, optimizer: Optimizer) -> None:
        """Begin the step of one; or raise where it belongs to another round."""
        if optimizer in self._started:
            others = name_of(*(each for each in self._waiting if each is not optimizer))
            what = f"{type(optimizer).__name__} steps a second time, before {others or 'it has ended its first step'}"
            raise _out_of_turn(what, "let each step once")
        known = self._grads.get(optimizer, ())
        if any(param.grad is not grad or _version(grad) != version for param, grad, version in known):
            what = f"the gradients of {type(optimizer).__name__} have changed since {name_of(*self._started)} stepped"
            raise _out_of_turn(what, "call backward() before that")
        self._started.append(optimizer)

    def finish(self, optimizer: Optimizer) -> bool:
        """End the step of one, and say whether it was the last."""
        self.step.restore(optimizer)
        self._waiting.remove(optimizer)
        return not self._waiting


class _HookedStep:
    """A step from the inside, where it can be changed but not called off."""

    def __init__(self, engine: Engine, closure: Callable[[], Any] | None) -> None:
        self.engine = engine
        self.closure = closure
        self.step = Step(engine, with_closure=closure is not None)
        self.skipped: SkippedStep | None = None
        self._hidden: dict[int, tuple[Group, list[Tensor | None]]] = {}
        """The values and the gradients of each group, while the step is skipped."""

    def transform_grads(self) -> None:
        """Do all that precedes the step of the optimizer, if it has no closure."""
        self._run(self.step.transform_grads)

    def evaluate(self) -> Any:
        """Call the closure and transform the gradients, unless the step is skipped."""
        assert self.closure is not None
        return self._run(self.step.transforming(self.closure)) if self.skipped is None else self.skipped.loss

    def restore(self, optimizer: Optimizer) -> None:
        """Give an optimizer that has made a step without gradients its own back, and its groups as they were."""
        for group in optimizer.param_groups if self.skipped is not None else ():
            values, grads = self._hidden.pop(id(group))
            group.clear()
            group.update(values)
            for param, grad in zip(group["params"], grads, strict=True):
                param.grad = grad

    def finish(self) -> None:
        """Do all that comes after the step of the optimizer."""
        if self.skipped is None:
            self._run(self.step.finish)
        else:
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
        step = self.step
        self.skipped = skipped.with_traceback(None)  # whose frames hold this step
        step.undo()
        if self.closure is not None and step.inner_states is None:
            step.keep_inner_state()
        for group in step.param_table.groups:
            self._hidden[id(group)] = dict(group), [param.grad for param in group["params"]]
            for param in group["params"]:
                param.grad = None


def _out_of_turn(what: str, remedy: str) -> RuntimeError:
    return RuntimeError(
        f"{what}; what is attached to several optimizers acts on the gradients of all, before the first of them steps: "
        f"{remedy}. A GradScaler can leave out the step of one: with it, take "
        "ParamTransformingOptimizer(InnerOpt=[...]), which is one optimizer"
    )


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None or grad.is_inference() else grad._version


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
