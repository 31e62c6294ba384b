"""``ParamTransformingOptimizer``: chains around the step of any ``torch.optim`` optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradchain._html import show_optimizer
from gradchain._units import print_slots
from gradchain.adapters._compiled import step_compiled
from gradchain.adapters._subclass import SubclassHooks
from gradchain.adapters._views import Views
from gradchain.chain import Chain
from gradchain.contract import Transform, is_same
from gradchain.engine.combined import defaults_of_any, parts
from gradchain.engine.engine import Engine
from gradchain.engine.groups import (
    DEFAULTS,
    check_group,
    hyperparameters,
    make_chains,
    number_chains,
    own_defaults,
    replace_defaults,
    require_new,
    warn_of_short,
)
from gradchain.engine.inner import InnerOptimizers, make_inner
from gradchain.engine.names import Names
from gradchain.engine.operations import SkippedStep
from gradchain.engine.reach import check_reach, check_setup
from gradchain.engine.select import Params
from gradchain.engine.states import SLOTS, ParamTable, TransformStates
from gradchain.engine.step import Step, is_dry_run, rescales


def _of_inner(name: str, doc: str) -> Any:
    return property(
        lambda self: getattr(self.inner_opt, name), lambda self, value: setattr(self.inner_opt, name, value), doc=doc
    )


class ParamTransformingOptimizer(Views, SubclassHooks, Optimizer):
    r"""Transform gradients before each step of an inner optimizer, its updates, and parameters after it.

    .. math:: p \leftarrow \mathrm{post}(p + \mathrm{update}(\Delta)), \quad
        \Delta = \mathrm{inner}(p, \; c \cdot \mathrm{pre}(\nabla p) + b) - p

    A step evaluates the closure, if there is one; applies ``pre`` to each gradient, then ``grad_scale`` (c) and
    ``grad_bias`` (b); calls ``inner_opt.step``; applies ``update`` to each displacement that it made; and applies
    ``post`` to each parameter. With a closure, ``pre`` follows every evaluation of it. Gradients and parameters are
    written in place. A parameter without a gradient is skipped by ``pre`` and ``update`` and still gets ``post``.

    In its group a transform finds, besides what the group has, ``"param"`` (in ``pre`` and ``update``, before the
    step), ``"grad"`` (in ``update`` and ``post``), ``"index"``, the number of the parameter, and its ``"name"`` where
    the optimizer was given named parameters or a ``model``.

    ``param_groups``, ``state`` and ``defaults`` are those of the inner optimizer, so schedulers and checkpoints work on
    either. The hyperparameters of the chains, ``param_ndim``, ``grad_scale`` and ``grad_bias`` are keys of the groups.
    The second transform of a kind, counted through ``pre``, ``update`` and ``post``, has keys of its own, such as
    ``"scale_2.factor"``; ``.named(prefix)`` chooses them.
    The states of stateful transforms are in ``state[param]["transforms"]``, under keys such as ``"pre.ema.average"``,
    once the inner optimizer has made its own; save and load them through this optimizer, since others cast them to the
    dtype of the parameter. States that an instance has loaded before are taken up, with a warning where they do not fit
    or were rounded.

    Several inner optimizers step one after another, as one: ``pre`` and its global norms see the gradients of all
    before the first steps, a skipped step is skipped by all, and a closure is evaluated once. ``param_groups`` lists
    the groups of all, of which each belongs to one; ``inner_opt.optimizers`` are the optimizers themselves, and a
    scheduler can drive one of them.

    The state dict is that of one torch optimizer with these groups. Where parameters have names, it has them too, and
    ``load_state_dict`` finds parameters by name, so that a checkpoint survives another order and other groups.

    Parameters may change in mid-run. If one gets another dtype, its states get the dtypes that they would be made with
    now. If another parameter takes its place in a group, ``state[new] = state.pop(old)`` moves the states of its
    transforms, too; where ``new`` has another shape, the tensors in ``state[new]["transforms"]`` need it as well.

    A subclass can also override ``_pre_step_transform_`` and ``_post_step_transform_``, which run after the chains of
    their slots.

    If a transform raises, parameters and the states of transforms are as they were before the step; the same holds for
    hooks. Gradients and the state of the inner optimizer can have changed already; only in the first step,
    gradients on which ``pre`` failed are as before. After Ctrl-C, a lack of memory or an error of the inner optimizer,
    load the last checkpoint.

    The chains can be replaced: ``optimizer.pre = chain(...)``. Transforms of the same name go on with their states, and
    others start anew. Hyperparameters that no group has changed follow the new chain.

    A step with a learning rate of 0 and zero gradients, which ``torch.distributed.checkpoint`` makes to see the state,
    moves nothing.

    Args:
        params: Parameters, named parameters or param groups, as any optimizer takes them. Not with an instance.
        InnerOpt: An optimizer type, a ``functools.partial`` of one, or an instance. Or several inner optimizers: a list
            of instances, or a mapping whose keys choose the parameters of each, and whose values are types or partials.
            A key is a pattern of names, such as ``"*.weight"``, or a function of a parameter that returns a bool; the
            first key that chooses a parameter wins.
        pre: The transform of each gradient.
        update: The transform of each displacement. It needs a copy of the parameters; ``post`` needs one only where a
            stage cannot be traced.
        post: The transform of each parameter.
        param_ndim: What the transforms act on, per group; see ``broadcast``. The default, -1, is each entry along the
            first dimension: each row of weights, but each element of a bias. The ``repr`` says it, stage by stage.
        grad_scale: Factor of each gradient after ``pre``, per group.
        grad_bias: Added to each gradient after the factor, per group.
        defaults: Further keys of the groups, with the values for those that lack them.
        groups: Values of their own for some parameters, by keys like those of ``InnerOpt``, such as ``{"*.bias":
            {"weight_decay": 0.0}}``; the first key that chooses a parameter wins. Not with an instance.
        model: The model that has the parameters, by which they get names where they were given without. The names are
            those without wrappers, such as ``DistributedDataParallel``, ``torch.compile`` or those of PEFT.
        **inner_opt_kwargs: Passed to ``InnerOpt``.

    Raises:
        TypeError: ``InnerOpt`` is no optimizer, or something is of the wrong type.
        ValueError: ``params`` are missing, a value is out of range, ``param_ndim`` does not fit a parameter, or two
            transforms have the same name, given by ``.named``, and different defaults; or no parameter has a
            name that matches a pattern of ``masked`` or ``freeze``. Or no inner optimizer takes a parameter, two take
            the same one, or one of several needs a closure, as LBFGS does.
        UserWarning: A kind of ``partition``, or a key of ``InnerOpt`` or ``groups``, chooses no parameter; or a key of
            a group is the last part of the key of a hyperparameter.

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

        >>> from functools import partial
        >>> from gradchain import clip_by_global_norm
        >>> model = nn.Linear(2, 3)
        >>> inner = {"*weight": partial(torch.optim.Muon, lr=0.02), "*": partial(torch.optim.AdamW, lr=3e-4)}
        >>> optim = ParamTransformingOptimizer(model.named_parameters(), inner, pre=clip_by_global_norm(1.0))
        >>> [(group["param_names"], group["lr"]) for group in optim.param_groups]
        [(['weight'], 0.02), (['bias'], 0.0003)]

    References:
        rai-toolbox ``ParamTransformingOptimizer``, https://mit-ll-responsible-ai.github.io/responsible-ai-toolbox.
    """

    inner_opt: Optimizer
    param_groups = _of_inner("param_groups", "The param groups of the inner optimizer.")
    state = _of_inner("state", "The state of the inner optimizer.")
    defaults = _of_inner("defaults", "The defaults of the inner optimizer, with the keys of this one.")
    pre: Chain
    update: Chain
    post: Chain
    _own_defaults: dict[str, Any]
    _overrides: Mapping[Any, Mapping[str, Any]] | None
    _engine: Engine

    def __init__(
        self,
        params: Params | None = None,
        InnerOpt: InnerOptimizers = SGD,
        *,
        pre: Transform | None = None,
        update: Transform | None = None,
        post: Transform | None = None,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        groups: Mapping[Any, Mapping[str, Any]] | None = None,
        model: nn.Module | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        chains = make_chains(pre=pre, update=update, post=post)
        numbered = number_chains(chains)
        inner_opt = make_inner(params, InnerOpt, inner_opt_kwargs, groups, model, type(self))
        inner = parts(inner_opt)
        if any(isinstance(part, ParamTransformingOptimizer) for part in inner):
            raise TypeError(
                "InnerOpt is a ParamTransformingOptimizer already; put its transforms and yours in one chain(...)"
            )
        # Of an earlier wrapper of the same instance, as when the cell of a notebook runs again.
        earlier = {key: value for part in inner for key, value in part.__dict__.get(DEFAULTS, {}).items()}
        options = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        joining = own_defaults(numbered, inner_opt, earlier, defaults, **options)
        kept_groups = [
            {k: v for k, v in group.items() if k not in earlier or not is_same(v, earlier[k])}
            for group in inner_opt.param_groups
        ]
        names = Names().joined_by(model, [param for group in kept_groups for param in group["params"]])
        own_keys = defaults_of_any(inner_opt).keys() - earlier.keys()
        completed = [{**joining, **group} for group in kept_groups]
        check_setup(completed, numbered, numbered, names, own_keys, self._hooked_slots)
        for group, kept in zip(inner_opt.param_groups, kept_groups, strict=True):
            group.clear()
            group.update(kept)
        for part in inner:
            for key in earlier:
                part.defaults.pop(key, None)
            part.defaults.update(joining)
        loaded = TransformStates.taken_out_of(inner_opt)
        attributes = {
            "inner_opt": inner_opt,
            "_own_defaults": joining,
            "_overrides": groups,
            "_states": TransformStates(),
            "_numbered": (chains, numbered),
            "_names": names,
            **chains,
        }
        # Not Optimizer.__init__: it would make groups, state and defaults of its own, apart from the inner optimizer's.
        # Its __setstate__ sets up all else: hooks, and the patched step.
        ParamTransformingOptimizer.__setstate__(self, attributes)
        if not earlier:
            self._engine.adopt(loaded)
            self._engine.synced_states()
        self._engine.begin()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SLOTS and hasattr(self, "_engine"):
            self._replace_chain(name, value)
        else:
            super().__setattr__(name, value)

    def _replace_chain(self, slot: str, transform: Transform | None) -> None:
        chains = {**self._chains(), **make_chains(**{slot: transform})}
        numbered = self._engine.number(chains)
        old, new = hyperparameters(self._engine.chains()), hyperparameters(numbered)
        require_new(new, self.inner_opt, self._own_defaults)
        # First where ``defaults`` differ from what the chains say, then where groups differ from both.
        defaults = replace_defaults(self._own_defaults, old, new)
        groups = [replace_defaults(group, {**old, **self._own_defaults}, defaults) for group in self.param_groups]
        for index, group in enumerate(groups):
            check_group(index, group, numbered)
        check_reach({slot: numbered[slot]}, ParamTable(groups, self._engine.names).entries)
        inner = parts(self.inner_opt)
        pairs = [*zip(self.param_groups, groups, strict=True), *((part.defaults, defaults) for part in inner)]
        for known, updated in pairs:
            for key in old.keys() - new.keys():
                known.pop(key, None)
            known.update(updated)
        self._own_defaults.clear()  # in place: the inner optimizer knows them too
        self._own_defaults.update(defaults)
        self._engine.owner.__dict__.update(chains)
        if slot in self.__dict__:  # Lightning and Fabric show it by another object, which may have copies
            self.__dict__.update(chains)
        engine = self._engine
        engine.states.keep_fitting(slot, engine.stage(slot), engine.param_table.entries)
        self._engine.begin()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; see the class.

        Args:
            closure: Evaluates the loss, with gradients, and returns it.

        Returns:
            What the inner optimizer returns: the loss of the closure, or None.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled
        ):
            return self._observed_step() if closure is None else self._observed_step(closure)
        return self._step(closure)

    # Else torch would wrap ``step`` in what serves hooks and the profiler, which takes as long as many a small step.
    step.hooked = True  # type: ignore[attr-defined]

    @Optimizer.profile_hook_step
    def _observed_step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if torch.compiler.is_compiling():
            return step_compiled(self, closure)
        groups = self.inner_opt.param_groups
        if not (self.pre or self.update or self.post or self._hooked_slots or any(map(rescales, groups))):
            return self.inner_opt.step() if closure is None else self.inner_opt.step(closure)
        if closure is None and is_dry_run(groups):
            loss = self.inner_opt.step()
            self._engine.start()
            return loss
        step = Step(self._engine, with_closure=closure is not None)
        try:
            if closure is None:
                step.transform_grads()
                loss = self.inner_opt.step()
            else:
                loss = self.inner_opt.step(step.transforming(closure))
            step.finish()
        except SkippedStep as skipped:
            return step.skip(skipped)
        except BaseException:
            step.undo()
            raise
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``torch.optim.Optimizer.add_param_group``."""
        before = {id(group) for group in self.param_groups}
        try:
            self.inner_opt.add_param_group(param_group)
            chains, own_keys = self._engine.chains(), defaults_of_any(self.inner_opt).keys()
            new = [index for index, group in enumerate(self.param_groups) if id(group) not in before]
            for index in new:
                check_group(index, self.param_groups[index], chains)
            entries = [entry for entry in self._engine.param_table.entries if entry.position[0] in new]
            check_reach(chains, entries, self._hooked_slots, are_all=False)
            for index in new:
                warn_of_short(index, self.param_groups[index].keys() - own_keys, chains)
            self._engine.note_keys()
            self._engine.begin()
        except Exception:
            for part in parts(self.inner_opt):
                part.param_groups[:] = [group for group in part.param_groups if id(group) in before]
            raise

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state dict of the inner optimizer, with the states of the transforms under ``"transforms"``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.inner_opt.state_dict()
        self._engine.complete(state_dict, self.inner_opt)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of a bare inner one; group keys that it lacks get the defaults."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        states, bare = self._engine.read_state_dict(state_dict, self.inner_opt)
        self.inner_opt.load_state_dict(bare)
        self._engine.complete_groups()
        self._engine.load_states(states, self.inner_opt)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _see(self, method: str) -> Engine:
        return self._engine

    def _chains(self) -> dict[str, Chain]:
        return {slot: getattr(self, slot) for slot in SLOTS}

    def __getstate__(self) -> dict[str, Any]:
        # Like torch, without hooks; "step" is in the instance only where a scheduler has patched it.
        kept = {k: v for k, v in self.__dict__.items() if k not in ("step", "_engine") and k[:11] != "_optimizer_"}
        engine = self._engine
        return {**kept, "_states": engine.states, "_numbered": engine.numbered, "_names": engine.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        of_engine = ("_states", "_numbered", "_names")
        super().__setstate__({key: value for key, value in state.items() if key not in of_engine})
        self._engine = Engine(self, *map(state.__getitem__, of_engine))
        for part in parts(self.inner_opt):
            part.__dict__[DEFAULTS] = self._own_defaults  # which copies of an optimizer lose
        self._engine.complete_groups()
        self._engine.note_keys()

    def __getattr__(self, name: str) -> Any:
        # Some optimizers have a mode, and frameworks ask for it with hasattr. All else stays hidden: what a GradScaler
        # finds on a fused optimizer must not be found here.
        if name in ("train", "eval") and "inner_opt" in self.__dict__:
            return getattr(self.inner_opt, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        inner = repr(self.inner_opt).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n{print_slots(self._engine.list_stages(self._chains()))}  inner_opt={inner}\n)"

    def _repr_html_(self) -> str:
        return show_optimizer(type(self).__name__, self._engine.list_stages(self._chains()), self.inner_opt)
