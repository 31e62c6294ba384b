"""The chains of the slots of an optimizer, their states, and the plans that the adapters run in steps."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from operator import eq
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradchain._units import list_stages
from gradchain.broadcast import broadcast
from gradchain.chain import Chain
from gradchain.contract import Group
from gradchain.engine.by_name import add_names, arrange_by_name
from gradchain.engine.combined import defaults_of_any, name_of
from gradchain.engine.forms import like_without_memory
from gradchain.engine.groups import (
    check_group,
    check_support,
    complete_groups,
    number_chains,
    prefixes,
    require_known,
    warn_of_short,
    warn_of_unread,
)
from gradchain.engine.names import Names
from gradchain.engine.operations import SlotTensor
from gradchain.engine.plan import Plan, SlotPlans
from gradchain.engine.reach import check_reach
from gradchain.engine.states import SLOTS, ByParam, ParamEntry, ParamTable, TransformStates
from gradchain.engine.weak import Weak

Numbered: TypeAlias = tuple[dict[str, Chain], dict[str, Chain]]
"""The chain of each slot as it was given, and as it is once its transforms have keys of their own."""


class Owner(Protocol):
    """The object that the chains belong to, such as an optimizer."""

    pre: Chain
    update: Chain
    post: Chain

    @property
    def inner_opt(self) -> Optimizer: ...

    @property
    def param_groups(self) -> list[Group]: ...

    @property
    def _own_defaults(self) -> Group:
        """The keys that join the groups, with the values for groups that lack them."""
        ...

    _hooked_slots: ClassVar[frozenset[str]]
    """The slots for which ``_run_hook`` does anything."""

    def _run_hook(self, slot: str, entry: ParamEntry) -> None:
        """Do, for one parameter, what follows the chain of ``pre`` or ``post``."""
        ...


class Engine:
    """The chains of an owner, their states, and plans, which are kept as long as what they depend on stays the same."""

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
        self.signals: dict[str, Tensor] = {}
        """The values from outside for the next step."""
        self._had_grads: Sequence[bool] = ()
        self.steps = 0
        """How many steps have been made."""
        self.counts: ByParam | None = None
        """What stages count, or None before ``start_counting``."""
        self.chains()
        self.note_keys()

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes without the plans and the table of parameters, which a copy makes anew."""
        return self.__dict__ | {"_plans": None, "_param_table": None}

    @property
    def owner(self) -> Owner:
        """The object that the chains belong to."""
        return self._owner()

    def trial(self, *, fused: bool = True) -> Engine:
        """Return an engine that does the same with copies of the states."""
        engine = Engine(self.owner, self.states.copy(), self.numbered, self.names, fused=fused)
        engine.signals = dict(self.signals)
        return engine

    def start_counting(self) -> None:
        """Let the stages count from now on how often they act."""
        if self.counts is None:
            self.counts, self._plans = {}, None

    def have_grads(self) -> Sequence[bool]:
        """Return which parameters had a gradient in the last step, or True for all if that is not known."""
        count = len(self.param_table.params)
        return self._had_grads if len(self._had_grads) == count else [True] * count

    def reset(self, states: TransformStates) -> None:
        """Go on with other states."""
        self.states = states
        self._plans = None
        self._is_settled = True

    def adopt(self, states: TransformStates) -> None:
        """Go on with states that the inner optimizer has loaded. Those that do not fit are dropped at the first use."""
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
        loaded = f"{name_of(inner_opt)} has loaded states of transforms among its own"
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
        self._share_loaded()

    def synced_states(self) -> TransformStates:
        """Return the states, after taking over what others have done to them in the inner optimizer."""
        if not self._is_settled:
            self._settle()
        if self.states.by_param:
            if self.states.take_over_from(self.owner.inner_opt):
                self._plans = None
            _ = self.param_table  # this adopts the states that new parameters have brought along
        return self.states

    @property
    def param_table(self) -> ParamTable:
        """The table of parameters, which is made anew when others are in the groups."""
        known = self._param_table
        if known is None or not known.is_of(self.owner.param_groups):
            known = ParamTable(self.owner.param_groups, self.names)
            self.states.adopt(self.owner.inner_opt, known.params)
            self._param_table = known
        return known

    def stage(self, slot: str) -> Chain:
        """Return the chain of a slot, broadcast."""
        self.chains()
        return self._stages[slot]

    def chains(self) -> dict[str, Chain]:
        """Return the chain of each slot, with the keys that its transforms have in the optimizer.

        If the chain of a slot is replaced, the transforms of the other slots keep their keys.
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
        """Return ``given``, the chain of each slot. New chains get keys that unchanged chains do not have."""
        known, numbered = self.numbered
        kept = {slot: numbered[slot] for slot in SLOTS if given[slot] is known.get(slot)}
        new = {slot: each for slot, each in given.items() if slot not in kept}
        return {**given, **kept, **number_chains(new, prefixes(kept.values()))}

    def list_stages(self, chains: Mapping[str, Chain]) -> dict[str, list[tuple[str, str]]]:
        """Return the stages of ``chains``, which are by slot, each with what it acts on."""
        entries = self.param_table.entries
        params = [entry.param.detach() for entry in entries]
        return {
            slot: list_stages(transforms, params, [entry.context(slot) for entry in entries])
            for slot, transforms in chains.items()
        }

    def entries_of(self, optimizer: Optimizer) -> list[ParamEntry]:
        """Return the parameters that an optimizer has, which is the inner one, or one of several."""
        groups = set(map(id, optimizer.param_groups))
        return [entry for entry in self.param_table.entries if id(entry.group) in groups]

    def read_state_dict(self, state_dict: Group, optimizer: Optimizer) -> tuple[TransformStates, Group]:
        """Return the states in a state dict, and the state dict without them; raise if either does not fit."""
        owner, entries = self.owner, self.entries_of(optimizer)
        defaults = owner._own_defaults
        if "param_groups" in state_dict:
            state_dict = arrange_by_name(state_dict, optimizer.param_groups, entries)
        states, bare = TransformStates.split(state_dict, entries)
        loaded = {id(group): group for group in owner.param_groups}
        for group, saved in zip(optimizer.param_groups, bare.get("param_groups", ()), strict=False):
            loaded[id(group)] = {**defaults, **saved, "params": group["params"]}
        for index, group in enumerate(loaded.values()):
            check_group(index, group, self.chains())
        entries = [entry._replace(group=loaded[id(entry.group)]) for entry in entries]
        check_reach(self.chains(), entries, owner._hooked_slots, are_all=False)
        states.require_fit({slot: self.stage(slot) for slot in SLOTS}, entries)
        warn_of_unread(optimizer.param_groups, bare.get("param_groups", ()), defaults)
        return states, bare

    def note_keys(self) -> None:
        """Remember the keys of the groups, which have been checked."""
        self._keys = [set(group) for group in self.owner.param_groups]

    def complete_groups(self) -> None:
        """Give the groups the keys that they lack."""
        complete_groups(self.owner.param_groups, self.owner._own_defaults)

    def check_groups(self) -> tuple[ParamTable, bool]:
        """Complete the groups and check their keys. Return the table of parameters, and whether nothing has changed.

        If the groups hold the very objects that they held in the last step, the checks are skipped, and plans need not
        look at the groups either.
        """
        known = self._param_table
        if known is not None and known.is_of(self.owner.inner_opt.param_groups) and known.has_same_contents():
            return known, True
        self.complete_groups()
        self.check_keys()
        return self.param_table, False

    def check_keys(self) -> None:
        """Raise or warn if a group has got a mistyped key. While no key is new, this only compares sets."""
        groups = self.owner.param_groups
        if len(groups) == len(self._keys) and all(map(eq, map(dict.keys, groups), self._keys)):
            return
        for index, (group, known) in enumerate(itertools.zip_longest(groups, self._keys[: len(groups)], fillvalue=())):
            new = set(group).difference(known)
            require_known(new, self.chains().values(), f"group {index}: ")
            warn_of_short(index, new - defaults_of_any(self.owner.inner_opt).keys(), self.chains())
        self.note_keys()

    def set_names(self, names: Names) -> None:
        """Use ``names`` for the parameters from now on."""
        self.names = names
        self._param_table = self._plans = None

    def load_states(self, states: TransformStates, optimizer: Optimizer) -> None:
        """Go on with states that were loaded, after the optimizer that they belong to has loaded its own."""
        own = {entry.param for entry in self.entries_of(optimizer)}
        others = {param: state for param, state in self.states.by_param.items() if param not in own}
        self.reset(TransformStates({**others, **states.by_param}))
        self.begin()
        self._share_loaded()

    def _share_loaded(self) -> None:
        """Put the states into the inner optimizer, for the parameters of which it has a state of its own."""
        inner_opt = self.owner.inner_opt
        self.states.share_with(inner_opt, [param for param, state in inner_opt.state.items() if state])

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context manager, within which the parameters have the averages that ``post`` keeps of them."""
        return self.synced_states().averaged(self.stage("post"))

    def complete(self, state_dict: Group, optimizer: Optimizer) -> None:
        """Put the states into a state dict of an optimizer, and the keys that its groups lack."""
        complete_groups(state_dict.get("param_groups", ()), self.owner._own_defaults)
        states, entries = self.synced_states(), self.entries_of(optimizer)
        for slot in SLOTS:  # a transform that has joined the chain since the last step has no state yet
            stage = self.stage(slot)
            begun = [m for m in entries if any(key.startswith(f"{slot}.") for key in states.of(m))]
            states.start(slot, stage, begun)
        states.add_to(state_dict, entries)
        if "param_groups" in state_dict:
            add_names(state_dict, entries)

    @torch.no_grad()
    def begin(self) -> None:
        """Make the states that depend on where the parameters start, from the present values of the parameters."""
        for slot in SLOTS:
            stage = self.stage(slot)
            if stage.starts_early:
                self.states.begin(slot, stage, self.param_table.entries)

    @torch.no_grad()
    def start(self) -> None:
        """Make the first states of all parameters."""
        self.complete_groups()
        for slot in SLOTS:
            self.states.start(slot, self.stage(slot), self.param_table.entries)
        self.states.share_with(self.owner.inner_opt)

    def plans(self, param_table: ParamTable, grads: list[Any], *, same_groups: bool) -> SlotPlans:
        """Return the plans, which are made anew when anything that they depend on has changed.

        Args:
            param_table: The parameters.
            grads: Their gradients.
            same_groups: Whether nothing in the groups has changed; see ``check_groups``.
        """
        owner, known = self._owner(), self._plans
        chains = owner.pre, owner.update, owner.post
        if known is None or not known.are_for(chains, param_table, grads, same_groups=same_groups):
            known, same_groups = self._make_plans(chains, param_table, grads), False
        if not same_groups:
            for plan in known.of.values():
                plan.prepare()
            # Not before all checks have passed: else the plans would be taken for those of the last contents.
            self._plans = known if known.can_be_kept else None
            param_table.note_contents()
        self._had_grads = known.have_grads
        return known

    @torch.no_grad()
    def _make_plans(self, chains: tuple[Chain, ...], param_table: ParamTable, grads: list[Any]) -> SlotPlans:
        for index, group in enumerate(param_table.groups):
            check_support(index, group)  # which can have changed since construction
        plans = {
            slot: self._make_plan(slot, param_table, grads)
            for slot, stages in zip(SLOTS, chains, strict=True)
            if stages
        }
        return SlotPlans(plans, chains, param_table, grads)

    def _make_plan(self, slot: str, param_table: ParamTable, grads: list[Any]) -> Plan:
        stage = self.stage(slot)
        is_transformed = [slot == "post" or grad is not None for grad in grads]
        # If all parameters share a state, those without a gradient have it, too.
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
                    signals=self.signals,
                    counts=None if self.counts is None else self.counts.setdefault(entry.param, {}),
                )
            )
        plan = Plan(slot, stage, items, fused=self.fused)
        if plan.skips and slot != "pre":
            raise ValueError(f"{slot}: {getattr(self.owner, slot)} has a transform that skips steps; it belongs in pre")
        return plan
