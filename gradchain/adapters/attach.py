"""``attach``: chains around the steps of an optimizer that exists, in place, through its hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradchain._units import print_slots
from gradchain.adapters._hooks import Hooks
from gradchain.adapters._views import Views
from gradchain.adapters.optimizer import ParamTransformingOptimizer
from gradchain.chain import Chain
from gradchain.contract import Transform
from gradchain.engine.combined import name_of, require_disjoint
from gradchain.engine.engine import Engine
from gradchain.engine.groups import ATTACHED, DEFAULTS, make_chains, number_chains, own_defaults, prefixes
from gradchain.engine.states import SLOTS
from gradchain.engine.weak import Weak


def attach(
    optimizer: Optimizer | Sequence[Optimizer],
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

    Several optimizers, in a list, keep their own steps, and what is attached acts on all of them as on one: ``pre`` on
    the gradients of all, before the first of them steps, ``update`` and ``post`` after the last. So each must step once
    in turn, in any order and without a closure, and the state dict of each has the states of its own parameters. What
    is to be one object, as for a ``GradScaler``, which can leave out the step of one, is
    ``ParamTransformingOptimizer(InnerOpt=[...])``.

    A fused optimizer leaves it to a ``GradScaler`` to unscale gradients as long as something is attached, and so waits
    for the device once a step. Copies and pickles of an optimizer have no hooks, and so no transforms: attach to the
    copy, and then load a copy of the state dict of the original. In a step that ``torch.compile`` compiles, what is
    attached runs as it does elsewhere, between two graphs.

    Args:
        optimizer: Any optimizer, or a list of several. Of one that a framework has wrapped, the one inside.
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
        RuntimeError: In a step: gradients are still scaled, which the optimizer would undo after the transforms; or one
            of several steps a second time before the others, or after its gradients have changed since they stepped.

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
    hooks = _hooks_of(list(optimizer) if isinstance(optimizer, Sequence) else [optimizer])
    chains = make_chains(pre=pre, update=update, post=post)
    numbered = number_chains(chains, prefixes(getattr(hooks, slot) for slot in SLOTS))
    joining = own_defaults(numbered, hooks.inner_opt, hooks._own_defaults, defaults, param_ndim=param_ndim)
    attached = Attached(hooks, chains, joining, defaults or {})
    hooks.add(attached, numbered, model)
    return attached


class Attached(Views):
    """Transforms around the steps of an optimizer, as long as they are not removed. Made by ``attach``.

    Attributes:
        defaults: The keys that joined the param groups, with the values for those that lacked them.
    """

    def __init__(
        self, hooks: Hooks, chains: Mapping[str, Chain], defaults: Mapping[str, Any], given: Mapping[str, Any]
    ) -> None:
        self._hooks = Weak(hooks)
        self._optimizers = hooks.optimizers
        self._name = _show(hooks.optimizers)
        self._chains = dict(chains)
        self.defaults = dict(defaults)
        self._given = dict(given)

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
    def optimizers(self) -> list[Optimizer]:
        """The optimizers, or the only one; a ``ReferenceError`` if one no longer exists."""
        return list(self._optimizers)

    def remove(self) -> None:
        """Take the transforms, their hyperparameters and their states out of the optimizer; a second time, nothing."""
        if self._hooks.exists:
            self._hooks().remove(self)

    def _see(self, method: str) -> Engine:
        if not self._hooks.exists:
            raise RuntimeError(f"{self!r} is removed, and its states with it; call {method}() before remove()")
        return self._hooks().engine

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        chains = {slot: members for slot in SLOTS if (members := getattr(self, slot))}
        if not (self._hooks.exists and self in self._hooks().attached):
            return f"attach({self._name}{''.join(f', {slot}={members}' for slot, members in chains.items())})"
        return f"attach(\n  {self._name},\n{print_slots(self._hooks().engine.list_stages(chains))})"


def _hooks_of(optimizers: Sequence[Optimizer]) -> Hooks:
    """The hooks that the optimizers have in common, which are new where they have none."""
    if not optimizers:
        raise ValueError("attach needs at least one optimizer, got an empty list")
    for optimizer in optimizers:
        _require_hookable(optimizer)
    if len(optimizers) > 1:
        require_disjoint(optimizers)
    known: list[Hooks | None] = [optimizer.__dict__.get(ATTACHED) for optimizer in optimizers]
    if not any(known):
        return Hooks(optimizers)
    hooks = next(filter(None, known))
    if not all(each is hooks for each in known) or len(hooks.optimizers) != len(optimizers):
        raise ValueError(
            f"what is attached already belongs to {name_of(*hooks.optimizers)}, and cannot be composed with what is "
            f"attached to {name_of(*optimizers)}; attach to the same optimizers, or remove() it first"
        )
    return hooks


def _show(optimizers: Sequence[Optimizer]) -> str:
    names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
    return names if len(optimizers) == 1 else f"[{names}]"


def _require_hookable(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        remedy = (
            "; give the optimizer of its parameters, and the module as model="
            if isinstance(optimizer, nn.Module)
            else ""
        )
        raise TypeError(f"attach needs a torch.optim.Optimizer, got {name}{remedy}")
    if isinstance(optimizer, ParamTransformingOptimizer):
        raise TypeError(f"{name} has chains already; put its transforms and yours in one chain(...)")
    if DEFAULTS in optimizer.__dict__:
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
