"""What the adapters share: the chains of three slots, run around the steps of an optimizer."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from operator import eq, is_
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.optim import Optimizer

from gradchain._sharding import gather, is_distributed, local
from gradchain._units import list_stages
from gradchain.broadcast import broadcast
from gradchain.chain import Chain
from gradchain.contract import Group, locate
from gradchain.engine.forms import Forms, like_without_memory
from gradchain.engine.groups import (
    check_group,
    check_support,
    complete_groups,
    describe,
    number_chains,
    prefixes,
    require_known,
    warn_of_short,
    warn_of_unread,
)
from gradchain.engine.names import Names
from gradchain.engine.operations import Pass, SkippedStep, SlotTensor
from gradchain.engine.plan import Plan, needs_dense
from gradchain.engine.reach import check_reach
from gradchain.engine.states import SLOTS, ParamEntry, ParamTable, TransformStates

T = TypeVar("T")


Numbered: TypeAlias = tuple[dict[str, Chain], dict[str, Chain]]
"""The chain of each slot as it was given, and as its transforms have keys of their own."""


class Owner(Protocol):
    """What the chains belong to."""

    pre: Chain
    update: Chain
    post: Chain

    @property
    def inner_opt(self) -> Optimizer: ...

    @property
    def param_groups(self) -> list[Group]: ...

    _hooked_slots: ClassVar[frozenset[str]]
    """The slots for which ``_run_hook`` does anything."""

    def _run_hook(self, slot: str, entry: ParamEntry) -> None:
        """Do, for one parameter, what follows the chain of ``pre`` or ``post``."""
        ...


class Weak(Generic[T]):
    """A reference that does not keep alive what it refers to; a copy refers to the copy of that.

    An optimizer and what belongs to it refer to each other. If both references were strong, ``del optimizer`` would
    leave the memory of all states to the garbage collector, which comes late.
    """

    def __init__(self, value: T) -> None:
        self._reference = weakref.ref(value)

    def __call__(self) -> T:
        """The object itself."""
        value = self._reference()
        if value is None:
            raise ReferenceError("the optimizer no longer exists; keep a reference to it as long as it is needed")
        return value

    @property
    def exists(self) -> bool:
        """Whether the object is still there."""
        return self._reference() is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self(),)


class Engine:
    """Runs the chains of its owner. What it works out once is valid as long as the parameters are the same."""

    def __init__(
        self,
        owner: Owner,
        states: TransformStates,
        numbered: Numbered | None = None,
        names: Names | None = None,
        *,
        fused: bool = True,
    ) -> None:
        self._owner = Weak(owner)
        self.fused = fused
        self.states = states
        self.names = Names() if names is None else names
        self._keys: list[Set[str]] = []
        self.numbered: Numbered = ({}, {}) if numbered is None else numbered
        self._stages: dict[str, Chain] = {slot: broadcast(each) for slot, each in self.numbered[1].items()}
        self._plans: SlotPlans | None = None
        self._param_table: ParamTable | None = None
        self._is_settled = True
        """Whether the states are known to fit the chains."""
        self.chains()
        self.note_keys()

    def __getstate__(self) -> dict[str, Any]:
        """All but what is worked out, which is made anew."""
        return self.__dict__ | {"_plans": None, "_param_table": None}

    @property
    def owner(self) -> Owner:
        """What the chains belong to."""
        return self._owner()

    def reset(self, states: TransformStates) -> None:
        """Go on with other states."""
        self.states = states
        self._plans = None
        self._is_settled = True

    def adopt(self, states: TransformStates) -> None:
        """Go on with states that the inner optimizer has loaded, as soon as they are needed, as far as they fit."""
        self.reset(states)
        self._is_settled = not states.by_param

    def _settle(self) -> None:
        self._is_settled = True
        inner_opt = self.owner.inner_opt
        dropped: list[str] = []
        rounded: list[str] = []
        for slot in SLOTS:
            found = self.states.keep_fitting(slot, self.stage(slot), self.param_table.entries)
            for keys, known in zip((dropped, rounded), found, strict=True):
                keys += sorted(known)
        loaded = f"{type(inner_opt).__name__} has loaded states of transforms among its own"
        if dropped:
            warnings.warn(
                f"{loaded}, of which {dropped} do not fit the chains that it has now, and are dropped; transforms "
                "without a state start anew",
                stacklevel=4,
            )
        if rounded:
            warnings.warn(
                f"{loaded}, and has rounded {rounded} to the dtype of the parameters; call load_state_dict when the "
                "transforms are around the optimizer",
                stacklevel=4,
            )
        self.states.share_with(inner_opt, [param for param, state in inner_opt.state.items() if state])

    def synced_states(self) -> TransformStates:
        """The states, as others have left them in the inner optimizer."""
        if not self._is_settled:
            self._settle()
        if self.states.by_param:
            if self.states.take_over_from(self.owner.inner_opt):
                self._plans = None
            _ = self.param_table  # new parameters may have brought theirs along
        return self.states

    @property
    def param_table(self) -> ParamTable:
        """The parameters."""
        known = self._param_table
        if known is None or not known.is_of(self.owner.param_groups):
            known = ParamTable(self.owner.param_groups, self.names)
            self.states.adopt(self.owner.inner_opt, known.params)
            self._param_table = known
        return known

    def stage(self, slot: str) -> Chain:
        """The chain of a slot, broadcast."""
        chains = self.chains()
        return self._stages[slot] if self.numbered[1] is chains else broadcast(chains[slot])

    def chains(self) -> dict[str, Chain]:
        """The chain of each slot, with the keys that its transforms have in the optimizer.

        Where others replace the chain of a slot, those of the other slots keep theirs.
        """
        given: dict[str, Chain] = {slot: getattr(self.owner, slot) for slot in SLOTS}
        known, numbered = self.numbered
        if all(given[slot] is known.get(slot) for slot in SLOTS):
            return numbered
        chains = self.number(given)
        self.numbered = given, chains
        self._stages = {slot: broadcast(each) for slot, each in chains.items()}
        return chains

    def number(self, given: dict[str, Chain]) -> dict[str, Chain]:
        """``given``, a chain for each slot, with keys beside those of the slots that have theirs already."""
        known, numbered = self.numbered
        kept = {slot: numbered[slot] for slot in SLOTS if given[slot] is known.get(slot)}
        new = {slot: each for slot, each in given.items() if slot not in kept}
        return {**given, **kept, **number_chains(new, prefixes(kept.values()))}

    def list_stages(self, chains: Mapping[str, Chain]) -> dict[str, list[tuple[str, str]]]:
        """The stages of ``chains``, which are by slot, each with what it acts on."""
        entries = self.param_table.entries
        params = [entry.param.detach() for entry in entries]
        return {
            slot: list_stages(transforms, params, [entry.context(slot) for entry in entries])
            for slot, transforms in chains.items()
        }

    def read_state_dict(self, state_dict: Group, defaults: Group) -> tuple[TransformStates, Group]:
        """The states in a state dict, and the state dict without them; or raise where either does not fit."""
        owner, entries = self.owner, self.param_table.entries
        states, bare = TransformStates.split(state_dict, entries)
        groups = dict(enumerate(owner.param_groups))
        for index, saved in zip(groups, bare.get("param_groups", ()), strict=False):
            groups[index] = {**defaults, **saved, "params": groups[index]["params"]}
            check_group(index, groups[index], self.chains())
        entries = [entry._replace(group=groups[entry.position[0]]) for entry in entries]
        check_reach(self.chains(), entries, owner._hooked_slots, are_all=False)
        states.require_fit({slot: self.stage(slot) for slot in SLOTS}, entries)
        warn_of_unread(owner.param_groups, bare.get("param_groups", ()), defaults)
        return states, bare

    def note_keys(self) -> None:
        """Remember the keys of the groups, which have been checked."""
        self._keys = [set(group) for group in self.owner.param_groups]

    def check_keys(self) -> None:
        """Raise where a group has got a key that is mistyped; a comparison of sets while there is no other key."""
        groups = self.owner.param_groups
        if len(groups) == len(self._keys) and all(map(eq, map(dict.keys, groups), self._keys)):
            return
        for index, (group, known) in enumerate(itertools.zip_longest(groups, self._keys[: len(groups)], fillvalue=())):
            new = set(group).difference(known)
            require_known(index, new, self.chains())
            warn_of_short(index, new - self.owner.inner_opt.defaults.keys(), self.chains())
        self.note_keys()

    def set_names(self, names: Names) -> None:
        """Name parameters so from now on."""
        self.names = names
        self._param_table = self._plans = None

    def load_states(self, states: TransformStates) -> None:
        """Go on with states that were loaded, after the inner optimizer has loaded its own."""
        self.reset(states)
        self.begin()
        inner_opt = self.owner.inner_opt
        states.share_with(inner_opt, [param for param, state in inner_opt.state.items() if state])

    def averaged(self) -> AbstractContextManager[None]:
        """Within the ``with`` block, the parameters have the averages that ``post`` keeps of them."""
        return self.synced_states().averaged(self.stage("post"), self.param_table.entries)

    def complete(self, state_dict: Group, defaults: Group) -> None:
        """Put the states into a state dict of the inner optimizer, and the keys that its groups lack."""
        complete_groups(state_dict.get("param_groups", ()), defaults)
        entries, states = self.param_table.entries, self.synced_states()
        for slot in SLOTS:  # a transform that has joined the chain since the last step has no state yet
            stage = self.stage(slot)
            begun = [m for m in entries if any(key.startswith(f"{slot}.") for key in states.of(m))]
            states.start(slot, stage, begun)
        states.add_to(state_dict, entries)

    def drop_states_of_others(self, slot: str) -> None:
        """Keep the states that the chain of ``slot`` has a transform for, when it has been replaced."""
        self.states.keep_fitting(slot, self.stage(slot), self.param_table.entries)

    @torch.no_grad()
    def begin(self) -> None:
        """Make the states that depend on where the parameters start: on what they are now."""
        for slot in SLOTS:
            stage = self.stage(slot)
            if stage.starts_early:
                self.states.begin(slot, stage, self.param_table.entries)

    @torch.no_grad()
    def start(self) -> None:
        """Make the first states of all parameters."""
        for slot in SLOTS:
            self.states.start(slot, self.stage(slot), self.param_table.entries)
        self.states.share_with(self.owner.inner_opt)

    def plans(self, param_table: ParamTable, grads: list[Any]) -> SlotPlans:
        """What there is to do, made anew when anything that it depends on is not as it was."""
        owner, known = self.owner, self._plans
        chains = owner.pre, owner.update, owner.post
        if known is None or not known.are_for(chains, param_table, grads):
            for index, group in enumerate(param_table.groups):
                check_support(index, group)  # which can have changed since construction
            known = SlotPlans(chains, param_table, grads)
            known.of = {
                slot: self._make_plan(slot, param_table, grads)
                for slot, stages in zip(SLOTS, chains, strict=True)
                if stages
            }
            known.finish()
            self._plans = known if known.can_be_kept else None
        for plan in known.of.values():
            plan.prepare()
        return known

    def _make_plan(self, slot: str, param_table: ParamTable, grads: list[Any]) -> Plan:
        stage = self.stage(slot)
        is_transformed = [slot == "post" or grad is not None for grad in grads]
        # Where a state is one for all parameters, those without a gradient keep up.
        stateful = [
            m for m, takes in zip(param_table.entries, is_transformed, strict=True) if takes or stage.shares_state
        ]
        self.states.start(slot, stage, stateful)
        context = {"pre": ("param",), "update": ("param", "grad"), "post": ("grad",)}[slot]
        items = []
        for entry, grad, takes in zip(param_table.entries, grads, is_transformed, strict=True):
            given: dict[str, Any] = {"param": entry.param}
            example = entry.param
            if grad is not None and grad.layout is torch.strided:
                given["grad"] = like_without_memory(grad, entry.param)
            if grad is not None and slot == "pre":
                example = given.get("grad", grad)
            items.append(
                SlotTensor(
                    example=example,
                    group=entry.group,
                    own_keys=entry.own_keys(slot),
                    param=entry.param,
                    context={key: given[key] for key in context if key in given},
                    states=self.states.of(entry),
                    is_transformed=takes,
                    is_new=entry.param in self.states.new,
                    place=entry.place(),
                )
            )
        plan = Plan(slot, stage, items, fused=self.fused)
        if plan.skips and slot != "pre":
            raise ValueError(f"{slot}: {getattr(self.owner, slot)} has a transform that skips steps; it belongs in pre")
        return plan


class SlotPlans:
    """The plan of each slot that has a chain, and what they depend on."""

    def __init__(self, chains: tuple[Chain, ...], param_table: ParamTable, grads: list[Any]) -> None:
        self.chains = chains
        self.param_table = param_table
        self.of: dict[str, Plan] = {}
        self.grad_forms = Forms(grads)
        self.param_forms: Forms | None = None
        self.has_unusual_grads = any(
            grad is not None and (_is_lazy(grad) or not grad.is_contiguous()) for grad in grads
        )
        # A gradient that its parameter would not take any more is one of before the parameter was replaced.
        self.can_be_kept = all(
            grad is None or grad.shape == param.shape for param, grad in zip(param_table.params, grads, strict=True)
        )

    def are_for(self, chains: tuple[Chain, ...], param_table: ParamTable, grads: list[Any]) -> bool:
        """Whether all that they depend on is as it was."""
        return (
            all(map(is_, self.chains, chains))
            and self.param_table is param_table
            and self.grad_forms.are_of(grads)
            and (self.param_forms is None or self.param_forms.are_of(param_table.params))
            and all(map(_is_unchanged, self.known_values, self.group_values()))
            and all(plan.holds() for plan in self.of.values())
        )

    def finish(self) -> None:
        """Sum up, when all are there."""
        self.cannot_raise = all(plan.cannot_raise for plan in self.of.values())
        self.known_values = self.group_values()
        if self.of.keys() - {"pre"} or any(plan.reads_params for plan in self.of.values()):
            self.param_forms = Forms(self.param_table.params)

    def group_values(self) -> list[Any]:
        """The values in the groups that all plans depend on."""
        return [group.get(key) for group in self.param_table.groups for key in ("param_names", "differentiable")]


def _is_unchanged(old: Any, new: Any) -> bool:
    return old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and bool(old == new))


class Step:
    """One step: its plans, what it has to undo if it fails, and the states to keep if it does not."""

    def __init__(self, engine: Engine, *, with_closure: bool = False) -> None:
        self.engine = engine
        self.owner = engine.owner
        engine.check_keys()
        engine.synced_states()
        self.param_table = engine.param_table
        self.passes: list[Pass] = []
        self.plans: dict[str, Plan] | None = None
        self.inner_state: Any = None
        self.cannot_raise = not with_closure and self.make_plans().cannot_raise and not self.owner._hooked_slots
        self.before: list[Tensor] = []
        if self.owner.update or (not self.cannot_raise and self._can_fail_late(with_closure)):
            self.before = [param.detach().clone() for param in self.param_table.params]

    @property
    def skips(self) -> bool:
        """Whether a transform can say that the step must not be made."""
        return any(plan.skips for plan in (self.plans or {}).values())

    @property
    def is_familiar(self) -> bool:
        """Whether a step like it has been made: nothing is left that is done once."""
        plans = (self.plans or {}).values()
        return self.engine.states.are_shown and all(plan.cannot_raise or plan.has_run for plan in plans)

    def make_plans(self) -> SlotPlans:
        """Find out what there is to do. All that can be wrong with a trusted plan shows here."""
        with torch.no_grad():
            self.grads = [param.grad for param in self.param_table.params]
            plans = self.engine.plans(self.param_table, self.grads)
            self.plans = plans.of
            if plans.has_unusual_grads:
                self._make_grads_writable()
            return plans

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
        """Do all that precedes the inner step."""
        with torch.no_grad():
            assert self.plans is not None
            plan = self.plans.get("pre")
            # What is wrong with a function mostly shows in the first step.
            is_safe = "pre" not in self.owner._hooked_slots and (plan is None or plan.cannot_raise or plan.has_run)
            saved = [] if is_safe else [(grad, grad.clone()) for grad in self.grads if grad is not None]
            try:
                self._run("pre", self.grads, {"param": self.param_table.params})
                self._run_hooks("pre")
            except BaseException:
                for grad, value in saved:
                    grad.copy_(value)
                raise
            for index, group in enumerate(self.param_table.groups):
                if rescales(group):
                    _rescale_grads(index, group)

    def transforming(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, with gradients transformed after every evaluation."""

        @functools.wraps(closure)
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.passes.clear()  # each evaluation starts from the states before the step, which advance once a step
            self.make_plans()
            try:
                self.transform_grads()
            except SkippedStep as skipped:
                skipped.loss = loss
                raise
            plan = None if self.plans is None else self.plans.get("pre")
            if self.inner_state is None and plan is not None and plan.skips:
                # A later evaluation may be the bad one.
                self.inner_state = self.engine.states.copy_beside(self.owner.inner_opt.state)
            return loss

        return evaluate

    def finish(self) -> None:
        """Do all that comes after the inner step, and keep the new states."""
        self.transform_update()
        self.commit()

    def transform_update(self) -> None:
        """Do what ``update`` and ``post`` do."""
        with torch.no_grad():
            if self.plans is None:  # the closure was not called
                self.plans = self.make_plans().of
            params, update = self.param_table.params, self.plans.get("update")
            if update is not None and update.touched:
                # A displacement is where its parameter was. What no transform acts on stays as it is, without rounding.
                moved, before = ([each[i] for i in update.touched] for each in (params, self.before))
                if not update.is_plain:  # elementwise, so that shards do
                    moved, before = list(map(local, moved)), list(map(local, before))
                _subtract(moved, before, checks_sums=update.is_on_cpu and not torch.compiler.is_compiling())
                self._run("update", params, {"param": self.before, "grad": self.grads})
                torch._foreach_add_(moved, before)
            self.transform_params()

    def transform_params(self) -> None:
        """Do what ``post`` does."""
        with torch.no_grad():
            self._run("post", self.param_table.params, {"grad": self.grads})
            self._run_hooks("post")

    def keep_states(self) -> None:
        """Put the new states in place of the old ones."""
        for each in self.passes:
            each.commit()
        self.passes = []

    def commit(self) -> None:
        """Keep the new states, and show them to the inner optimizer."""
        self.keep_states()
        self.engine.states.new.clear()
        self.engine.states.share_with(self.owner.inner_opt)

    @torch.no_grad()
    def undo(self) -> None:
        """Give the parameters back the values that they had, where they can have moved."""
        for param, value in zip(self.param_table.params, self.before, strict=False):
            param.copy_(value)

    def skip(self, skipped: SkippedStep) -> Any:
        """Undo all but the counters."""
        self.undo()
        if self.inner_state is not None:
            self.owner.inner_opt.state.clear()  # in place: others may hold it
            self.owner.inner_opt.state.update(self.inner_state)
        skipped.keep_counters()
        return skipped.loss

    def _run(self, slot: str, tensors: list[Any], context: dict[str, list[Any]]) -> None:
        plan = self.plans.get(slot) if self.plans else None
        if plan is None:
            return
        self.passes.append(plan.run(tensors, context, keeps_states=not self.cannot_raise))

    def _run_hooks(self, slot: str) -> None:
        for entry in self.param_table.entries if slot in self.owner._hooked_slots else ():
            if slot == "post" or entry.param.grad is not None:
                try:
                    self.owner._run_hook(slot, entry)
                except Exception as error:
                    locate(error, f"{slot}, {entry.place()}")
                    raise

    def _can_fail_late(self, with_closure: bool) -> bool:
        """Whether parameters can have moved when a transform or a hook raises."""
        return bool(self.owner._hooked_slots or self.owner.post or (with_closure and self.owner.pre))


def _is_lazy(grad: Tensor | None) -> bool:
    """Whether the elements in memory are yet to be negated or conjugated, which lists of tensors do not allow."""
    return grad is not None and (grad.is_neg() or grad.is_conj())


def _writable(grad: Tensor) -> Tensor:
    """``grad``, or a copy where it is lazy or its elements share memory, as those of an expanded tensor do."""
    if grad.layout is not torch.strided:
        return grad
    shares = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
    return (grad.contiguous() if shares else grad).resolve_conj().resolve_neg()


def _subtract(params: list[Tensor], before: list[Tensor], *, checks_sums: bool) -> None:
    """Replace parameters by how far they have moved: where they are infinite as before, not at all.

    There, inf - inf would be NaN. Masks take longer than all else here, so ``checks_sums`` finds out first, from sums,
    whether any are needed. On devices other than the CPU, that would be to wait.
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
    """Whether gradients of the group are scaled or shifted after ``pre``. Tensors count, without being read."""
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
        is_plain = grad.layout is torch.strided and not is_distributed(grad)  # which a list cannot have beside others
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
    """Whether the step is meant to make state and move nothing, as ``torch.distributed.checkpoint`` does it."""
    for group in param_groups:
        lr = group.get("lr")
        if (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0.0:
            return False
    grads = [param.grad for group in param_groups for param in group["params"] if param.grad is not None]
    # Of whole tensors: all processes must make the same step.
    return bool(grads) and not any(gather(grad.any()) for grad in grads)
