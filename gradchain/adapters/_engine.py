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
from gradchain.adapters._construction import (
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
from gradchain.adapters._names import Names
from gradchain.adapters._plan import Item, Plan, SkippedStep, Work, needs_dense
from gradchain.adapters._reach import check_reach
from gradchain.adapters._states import Member, Roster, Tensors, TransformStates
from gradchain.broadcast import broadcast
from gradchain.chain import Chain
from gradchain.transform import Group, locate

SLOTS = ("pre", "update", "post")

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

    def _run_hook(self, slot: str, member: Member) -> None:
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
        self, owner: Owner, states: TransformStates, numbered: Numbered | None = None, names: Names | None = None
    ) -> None:
        self._owner = Weak(owner)
        self.states = states
        self.names = Names() if names is None else names
        self._keys: list[Set[str]] = []
        self.numbered: Numbered = ({}, {}) if numbered is None else numbered
        self._stages: dict[str, Chain] = {slot: broadcast(each) for slot, each in self.numbered[1].items()}
        self._plans: Plans | None = None
        self._roster: Roster | None = None
        self._is_settled = True
        """Whether the states are known to fit the chains."""
        self.chains()
        self.note_keys()

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
            found = self.states.keep_fitting(slot, self.stage(slot), self.roster.members)
            for keys, known in zip((dropped, rounded), found, strict=True):
                keys += [f"{slot} {key}" for key in sorted(known)]
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
        self.states.show_in(inner_opt, [param for param, state in inner_opt.state.items() if state])

    def follow(self) -> TransformStates:
        """The states, as others have left them in the inner optimizer."""
        if not self._is_settled:
            self._settle()
        if self.states.by_param:
            if self.states.follow(self.owner.inner_opt):
                self._plans = None
            _ = self.roster  # new parameters may have brought theirs along
        return self.states

    @property
    def roster(self) -> Roster:
        """The parameters."""
        known = self._roster
        if known is None or not known.is_of(self.owner.param_groups):
            known = Roster(self.owner.param_groups, self.names)
            self.states.adopt(self.owner.inner_opt, known.params)
            self._roster = known
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
        members = self.roster.members
        params = [member.param.detach() for member in members]
        return {
            slot: list_stages(transforms, params, [member.context(slot) for member in members])
            for slot, transforms in chains.items()
        }

    def take_states(self, state_dict: Group, defaults: Group) -> tuple[TransformStates, Group]:
        """The states in a state dict, and the state dict without them; or raise where either does not fit."""
        owner, members = self.owner, self.roster.members
        states, bare = TransformStates.split(state_dict, members)
        groups = dict(enumerate(owner.param_groups))
        for index, saved in zip(groups, bare.get("param_groups", ()), strict=False):
            groups[index] = {**defaults, **saved, "params": groups[index]["params"]}
            check_group(index, groups[index], self.chains())
        members = [member._replace(group=groups[member.position[0]]) for member in members]
        check_reach(self.chains(), members, owner._hooked_slots, are_all=False)
        states.require_fit({slot: self.stage(slot) for slot in SLOTS}, members)
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

    def take_names(self, names: Names) -> None:
        """Name parameters so from now on."""
        self.names = names
        self._roster = self._plans = None

    def give_states(self, states: TransformStates) -> None:
        """Go on with states that were loaded, after the inner optimizer has loaded its own."""
        self.reset(states)
        self.begin()
        inner_opt = self.owner.inner_opt
        states.show_in(inner_opt, [param for param, state in inner_opt.state.items() if state])

    def averaged(self) -> AbstractContextManager[None]:
        """Within the ``with`` block, the parameters have the averages that ``post`` keeps of them."""
        return self.follow().averaged(self.stage("post"), self.roster.members)

    def complete(self, state_dict: Group, defaults: Group) -> None:
        """Put the states into a state dict of the inner optimizer, and the keys that its groups lack."""
        complete_groups(state_dict.get("param_groups", ()), defaults)
        members, states = self.roster.members, self.follow()
        for slot in SLOTS:  # a transform that has joined the chain since the last step has no state yet
            stage = self.stage(slot)
            begun = [m for m in members if set() < states.of(slot, m).keys() < set(stage.keys.values())]
            states.start(slot, stage, begun)
        states.add_to(state_dict, members)

    def drop_states_of_others(self, slot: str) -> None:
        """Keep the states that the chain of ``slot`` has a transform for, when it has been replaced."""
        self.states.keep_fitting(slot, self.stage(slot), self.roster.members)

    @torch.no_grad()
    def begin(self) -> None:
        """Make the states that depend on where the parameters start: on what they are now."""
        for slot in SLOTS:
            stage = self.stage(slot)
            if stage.starts_early:
                self.states.begin(slot, stage, self.roster.members)

    @torch.no_grad()
    def start(self) -> None:
        """Make the first states of all parameters."""
        for slot in SLOTS:
            self.states.start(slot, self.stage(slot), self.roster.members)
        self.states.show_in(self.owner.inner_opt)

    def plans(self, roster: Roster, tensors: Tensors) -> Plans:
        """What there is to do, made anew when anything that it depends on is not as it was."""
        owner, known = self.owner, self._plans
        chains = owner.pre, owner.update, owner.post
        if known is None or not known.are_for(chains, roster, tensors):
            for index, group in enumerate(roster.groups):
                check_support(index, group)  # which can have changed since construction
            known = Plans(chains, roster, tensors)
            for slot, members in zip(SLOTS, chains, strict=True):
                if members:
                    try:
                        known.of[slot] = self._make_plan(slot, known, tensors)
                    except Exception as error:
                        say_where(error, slot, roster)
                        raise
            known.finish()
            self._plans = known if known.can_be_kept else None
        for slot, plan in known.of.items():
            try:
                plan.prepare()
            except Exception as error:
                say_where(error, slot, roster)
                raise
        return known

    def _make_plan(self, slot: str, plans: Plans, tensors: Tensors) -> Plan:
        roster = plans.roster
        stage = self.stage(slot)
        takes_part = [slot == "post" or grad is not None for grad in tensors.grads]
        # Where a state is one for all parameters, those without a gradient keep up.
        stateful = [m for m, takes in zip(roster.members, takes_part, strict=True) if takes or stage.shares_state]
        self.states.start(slot, stage, stateful)
        context = {"pre": ("param",), "update": ("param", "grad"), "post": ("grad",)}[slot]
        items = []
        for member, grad in zip(roster.members, tensors.grads, strict=True):
            has_grad = grad is not None and grad.layout is torch.strided
            items.append(
                Item(
                    form=grad if slot == "pre" and grad is not None else member.param.detach(),
                    group=member.group,
                    identity=member.identity(slot),
                    param=member.param,
                    context=tuple(key for key in context if key != "grad" or has_grad),
                    state=self.states.of(slot, member),
                    takes_part=slot == "post" or grad is not None,
                    is_contiguous=member.param.is_contiguous() and (grad is None or grad.is_contiguous()),
                    is_new=member.param in self.states.new,
                    watched=plans.watched,
                )
            )
        plan = Plan(stage, items)
        if plan.skips and slot != "pre":
            raise ValueError(f"{getattr(self.owner, slot)} has a transform that skips steps; it belongs in pre")
        return plan


class Plans:
    """The plan of each slot that has a chain, and what they depend on."""

    def __init__(self, chains: tuple[Chain, ...], roster: Roster, tensors: Tensors) -> None:
        self.chains = chains
        self.roster = roster
        self.form = tensors.form
        self.of: dict[str, Plan] = {}
        self.has_lazy_grads = any(map(_is_lazy, tensors.grads))
        self.watched = {"param_ndim", "param_names", "differentiable"}
        """The keys of the groups that they depend on."""
        # A gradient that its parameter would not take any more is one of before the parameter was replaced.
        self.can_be_kept = all(
            grad is None or grad.shape == param.shape for param, grad in zip(roster.params, tensors.grads, strict=True)
        )

    def are_for(self, chains: tuple[Chain, ...], roster: Roster, tensors: Tensors) -> bool:
        """Whether all that they depend on is as it was."""
        return (
            all(map(is_, self.chains, chains))
            and self.roster is roster
            and self.form == tensors.form
            and all(map(_is_unchanged, self.seen, self.look()))
        )

    def finish(self) -> None:
        """Sum up, when all are there."""
        self.is_trusted = all(plan.is_trusted for plan in self.of.values())
        self.seen = self.look()

    def look(self) -> list[Any]:
        """The values in the groups that say which tensor is to be treated how."""
        values = [group.get(key) for group in self.roster.groups for key in self.watched]
        return values + [value._version for value in values if isinstance(value, Tensor)]


def _is_unchanged(old: Any, new: Any) -> bool:
    return old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and bool(old == new))


class Step:
    """One step: its plans, what it has to undo if it fails, and the states to keep if it does not."""

    def __init__(self, engine: Engine, *, with_closure: bool = False) -> None:
        self.engine = engine
        self.owner = engine.owner
        engine.check_keys()
        engine.follow()
        self.roster = engine.roster
        self.works: list[Work] = []
        self.plans: dict[str, Plan] | None = None
        self.inner_state: Any = None
        self.is_trusted = not with_closure and self.look().is_trusted and not self.owner._hooked_slots
        self.before: list[Tensor] = []
        if self.owner.update or (not self.is_trusted and self._can_fail_late(with_closure)):
            self.before = [param.detach().clone() for param in self.roster.params]

    @property
    def skips(self) -> bool:
        """Whether a transform can say that the step must not be made."""
        return any(plan.skips for plan in (self.plans or {}).values())

    @property
    def is_familiar(self) -> bool:
        """Whether a step like it has been made: nothing is left that is done once."""
        plans = (self.plans or {}).values()
        return self.engine.states.are_shown and all(plan.is_trusted or plan.has_run for plan in plans)

    def look(self) -> Plans:
        """Find out what there is to do. All that can be wrong with a trusted plan shows here."""
        with torch.no_grad():
            tensors = Tensors(self.roster.params)
            plans = self.engine.plans(self.roster, tensors)
            self.plans, self.grads = plans.of, tensors.grads
            if plans.has_lazy_grads or not tensors.has_usual_grads:
                self._make_grads_writable()
            return plans

    def _make_grads_writable(self) -> None:
        hooked, pre = "pre" in self.owner._hooked_slots, self.plans.get("pre") if self.plans else None
        touched = set(pre.touched if pre else ())
        rescaled = {id(group) for group in self.roster.groups if rescales(group)}
        for i, (member, grad) in enumerate(zip(self.roster.members, self.grads, strict=True)):
            if grad is None or not (hooked or i in touched or id(member.group) in rescaled):
                continue
            if hooked and grad.layout is not torch.strided:
                raise TypeError(f"pre, {member.place()}: {needs_dense(grad)}")
            self.grads[i] = member.param.grad = _writable(grad)

    def transform_grads(self) -> None:
        """Do all that precedes the inner step."""
        with torch.no_grad():
            assert self.plans is not None
            plan = self.plans.get("pre")
            # What is wrong with a function mostly shows in the first step.
            is_safe = "pre" not in self.owner._hooked_slots and (plan is None or plan.is_trusted or plan.has_run)
            saved = [] if is_safe else [(grad, grad.clone()) for grad in self.grads if grad is not None]
            try:
                self._run("pre", self.grads, {"param": self.roster.params})
                self._run_hooks("pre")
            except BaseException:
                for grad, value in saved:
                    grad.copy_(value)
                raise
            for index, group in enumerate(self.roster.groups):
                if rescales(group):
                    _rescale_grads(index, group)

    def transforming(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, with gradients transformed after every evaluation."""

        @functools.wraps(closure)
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.works.clear()  # each evaluation starts from the states before the step, which advance once a step
            self.look()
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
                self.plans = self.look().of
            params, update = self.roster.params, self.plans.get("update")
            if update is not None and update.touched:
                # A displacement is where its parameter was. What no transform acts on stays as it is, without rounding.
                moved, before = ([each[i] for i in update.touched] for each in (params, self.before))
                if not update.is_plain:  # elementwise, so that shards do
                    moved, before = list(map(local, moved)), list(map(local, before))
                _subtract(moved, before, looks=update.is_on_cpu and not torch.compiler.is_compiling())
                self._run("update", params, {"param": self.before, "grad": self.grads})
                torch._foreach_add_(moved, before)
            self.transform_params()

    def transform_params(self) -> None:
        """Do what ``post`` does."""
        with torch.no_grad():
            self._run("post", self.roster.params, {"grad": self.grads})
            self._run_hooks("post")

    def keep_states(self) -> None:
        """Put the new states in place of the old ones."""
        for work in self.works:
            work.commit()
        self.works = []

    def commit(self) -> None:
        """Keep the new states, and show them to the inner optimizer."""
        self.keep_states()
        self.engine.states.new.clear()
        self.engine.states.show_in(self.owner.inner_opt)

    @torch.no_grad()
    def undo(self) -> None:
        """Give the parameters back the values that they had, where they can have moved."""
        for param, value in zip(self.roster.params, self.before, strict=False):
            param.copy_(value)

    def skip(self, skipped: SkippedStep) -> Any:
        """Undo all but the counters."""
        self.undo()
        if self.inner_state is not None:
            self.owner.inner_opt.state.clear()  # in place: others may hold it
            self.owner.inner_opt.state.update(self.inner_state)
        skipped.count()
        return skipped.loss

    def _run(self, slot: str, tensors: list[Any], context: dict[str, list[Any]]) -> None:
        plan = self.plans.get(slot) if self.plans else None
        if plan is None:
            return
        self.works.append(Work(tensors, context, keeps_states=not self.is_trusted))
        try:
            plan.run(self.works[-1])
        except Exception as error:
            say_where(error, slot, self.roster)
            raise

    def _run_hooks(self, slot: str) -> None:
        for member in self.roster.members if slot in self.owner._hooked_slots else ():
            if slot == "post" or member.param.grad is not None:
                try:
                    self.owner._run_hook(slot, member)
                except Exception as error:
                    locate(error, f"{slot}, {member.place()}")
                    raise

    def _can_fail_late(self, with_closure: bool) -> bool:
        """Whether parameters can have moved when a transform or a hook raises."""
        return bool(self.owner._hooked_slots or self.owner.post or (with_closure and self.owner.pre))


def say_where(error: Exception, slot: str, roster: Roster) -> None:
    """Say in the message of ``error`` in which slot it happened, and for which parameter, if that is known."""
    # Not raised in here: the traceback would hold the frame, and this its own ``error``, with all tensors of the step.
    failed = getattr(error, "failed_item", None)
    if not isinstance(error, SkippedStep):
        locate(error, slot if failed is None else f"{slot}, {roster.members[failed].place()}")


def _is_lazy(grad: Tensor | None) -> bool:
    """Whether the elements in memory are yet to be negated or conjugated, which lists of tensors do not allow."""
    return grad is not None and (grad.is_neg() or grad.is_conj())


def _writable(grad: Tensor) -> Tensor:
    """``grad``, or a copy where it is lazy or its elements share memory, as those of an expanded tensor do."""
    if grad.layout is not torch.strided:
        return grad
    shares = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
    return (grad.contiguous() if shares else grad).resolve_conj().resolve_neg()


def _subtract(params: list[Tensor], before: list[Tensor], *, looks: bool) -> None:
    """Replace parameters by how far they have moved: where they are infinite as before, not at all.

    There, inf - inf would be NaN. Masks take longer than all else here; ``looks`` is to find out first, from sums,
    whether any are needed, which on devices other than the CPU would be to wait.
    """
    stays = [] if looks and _are_finite(before) else list(map(torch.eq, params, before))
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


def is_rehearsal(param_groups: Sequence[Group]) -> bool:
    """Whether the step is meant to make state and move nothing, as ``torch.distributed.checkpoint`` does it."""
    for group in param_groups:
        lr = group.get("lr")
        if (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0.0:
            return False
    grads = [param.grad for group in param_groups for param in group["params"] if param.grad is not None]
    # Of whole tensors: all processes must make the same step.
    return bool(grads) and not any(gather(grad.any()) for grad in grads)
