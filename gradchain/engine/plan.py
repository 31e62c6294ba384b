"""What the transforms of a slot do in a step, worked out once: what runs on which tensors, in which order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor

from gradchain._sharding import has_whole_units, is_distributed, is_partial, is_placed_like, shapes_of_parts
from gradchain.chain import Chain
from gradchain.contract import Group, locate
from gradchain.engine.blocks import Programs
from gradchain.engine.forms import Forms
from gradchain.engine.jointly import Jointly
from gradchain.engine.operations import AsItIs, Gathering, Measure, Operation, Pass, SlotTensor, View, located
from gradchain.engine.states import ParamTable
from gradchain.engine.traced import ABSENT, Guards, NotedGroup, Traced, UntracedStage, still_has, trace_stages
from gradchain.stage import Part, Stage


class Plan:
    """What a stage does with the tensors of a slot.

    Args:
        slot: The name of the slot, for errors.
        stage: The stage, which is the chain of the slot.
        items: The tensors.
        fused: Whether stages can share a program. If not, each has its own, so that one can look at tensors in between.

    Attributes:
        operations: What runs, in order.
        touched: The numbers of the tensors that a stage acts on.
        cannot_raise: Whether a step can no longer raise, because making the plan has already tried all that could.
        guards: What the plan depends on besides the tensors.
        skips: Whether a stage can call the step off.
        reads_params: Whether a stage can read ``group["param"]``.
    """

    def __init__(self, slot: str, stage: Stage, items: Sequence[SlotTensor], *, fused: bool = True) -> None:
        self.slot = slot
        self.items = items
        self.has_run = False
        groups: list[Group] = [item.group | item.own_keys | {"param": item.param} for item in items]
        noted = list(map(NotedGroup, groups))
        try:
            self.parts = list(stage.split(noted, range(len(items)), f"{slot}."))
        except Exception as error:
            locate(error, slot)
            raise
        for part in self.parts:
            if part.stage.shares_state:
                self._share_states(part)
        self.operations = list(self._make_operations(fused))
        selected_by = {
            (id(item.group), key): partial(still_has, item.group, key, value)
            for item, group in zip(items, noted, strict=True)
            for key, value in group.reads.items()
            if key not in item.own_keys and key != "param"
        }
        self.guards = Guards(tuple(selected_by.values()))
        for operation in self.operations:
            self.guards += operation.guards
        self.touched = sorted({number for operation in self.operations for number in operation.numbers})
        forms = [items[number].example for number in self.touched]
        self.is_plain = not any(map(is_distributed, forms))
        self.is_on_cpu = self.is_plain and all(form.is_cpu for form in forms)
        self.cannot_raise = all(operation.cannot_raise for operation in self.operations)
        self.skips = any(operation.skips for operation in self.operations)
        self.reads_params = any(operation.reads_params for operation in self.operations)
        for index, operation in enumerate(self.operations, 1):
            operation.precedes_skip = any(later.skips for later in self.operations[index:])
        self._checks = [
            (part, items[number], key)
            for part in self.parts
            for number in {id(items[i].group): i for i in reversed(part.numbers)}.values()
            for key in part.stage.hyperparameters
        ]
        self._values: list[Any] = []

    def _share_states(self, part: Part) -> None:
        """Give parameters that share a state the same tensors, if possible those that have been in a step before."""
        by_age = sorted((self.items[number] for number in part.numbers), key=lambda item: item.is_new)
        for item in by_age:
            for key in part.states_of(item.states):
                if part.stage.shares(key):
                    first = next(each.states for each in by_age if part.path + key in each.states)
                    item.states[part.path + key] = first[part.path + key]

    def prepare(self) -> None:
        """Raise where a hyperparameter has the wrong type or is out of range."""
        values = [item.group.get(key) for _, item, key in self._checks]
        if len(values) == len(self._values) and all(map(is_, values, self._values)):
            return
        for part, item in {(part.path, id(item.group)): (part, item) for part, item, _ in self._checks}.values():
            try:
                part.stage.check(item.group)
            except Exception as error:
                located(error, self.slot, part, item)
                raise
        self._values = values

    def run(
        self, tensors: Sequence[Any], context: Mapping[str, Sequence[Any]], *, keeps_states: bool, step: int
    ) -> Pass:
        """Transform all tensors in place."""
        work = Pass(tensors, context, keeps_states, step)
        for operation in self.operations:
            operation.run(work)
        self.has_run = True
        return work

    def ways(self, place: str, number: int) -> list[str]:
        """Return how the stage of the chain that is at ``place`` runs on a tensor, in a few words."""
        return [
            operation.how
            for operation in self.operations
            if any(part.places[0] == place and number in part.numbers for part in operation.parts)
        ]

    def listing(self) -> str:
        """Return what runs, as comments and code."""
        return "\n".join(line for operation in self.operations for line in operation.listing())

    def run_stage(self, place: str, work: Pass) -> None:
        """Run the stage of the chain that is at ``place``, if stages are not fused."""
        for operation in self.operations:
            if operation.parts[0].places[0] == place:
                operation.run(work)

    def _make_operations(self, fused: bool) -> Iterator[Operation]:
        """Yield the operations in order. Stages in a row share programs, unless one needs all tensors or whole ones."""
        stretch: list[Part] = []
        views: dict[str, View] = {}
        for part in self.parts:
            acting = [i for i in part.numbers if self.items[i].is_transformed and self.items[i].example.numel()]
            for i in acting:
                if self.items[i].example.layout is not torch.strided:
                    raise located(TypeError(needs_dense(self.items[i].example)), self.slot, part, self.items[i])
            if not acting:
                continue
            if part.stage.measures or not part.stage.acts_on_each:
                yield from self._programs(stretch, views)
                stretch = []
                if not part.stage.acts_on_each:
                    yield Jointly(self.slot, part, self.items)
                    continue
                measure = Measure(self.slot, part, self.items)
                views[part.path] = measure.view
                yield measure
            gathered = self._gathered(part, acting, views)
            if gathered:
                yield from self._programs(stretch, views)
                stretch = []
                yield Gathering(self.slot, part, self.items, gathered)
            if rest := [i for i in acting if i not in gathered]:
                stretch.append(part._replace(numbers=rest))
            if not fused:
                yield from self._programs(stretch, views)
                stretch = []
        yield from self._programs(stretch, views)

    def _gathered(self, part: Part, numbers: Sequence[int], views: Mapping[str, View]) -> dict[int, Traced | None]:
        """Return the distributed tensors of which a stage needs the whole, each with the trace for it, if there is one.

        All processes must decide alike, because gathering waits for all. So the decision uses the whole tensor, its
        units, which have one shape in all processes, or every shape that a shard can have, never the local shard alone.
        """
        found: dict[int, Traced | None] = {}
        for number in numbers:
            item = self.items[number]
            if not is_distributed(item.example):
                continue
            try:
                if _has_units_of(part, item):
                    trace_stages([part], item, views)
                    continue
                whole = trace_stages([part], item.of_shape(tuple(item.example.shape)), views)
            except UntracedStage:  # it may draw random numbers, which differ between the whole and a part
                found[number] = None
            else:
                if not _is_for_each_element(part, item, whole, views):
                    found[number] = whole
        return found

    def _programs(self, parts: Sequence[Part], views: Mapping[str, View]) -> Iterator[Operation]:
        """Yield the programs of ``parts``. A stage that cannot be traced runs as it is, between two programs."""
        if not parts:
            return
        try:
            yield Programs(self.slot, parts, self.items, views)
        except UntracedStage as untraced:
            part = parts[untraced.position]
            yield from self._programs(parts[: untraced.position], views)
            yield AsItIs(self.slot, part, self.items, untraced.reason)
            yield from self._programs(parts[untraced.position + 1 :], views)


def _states(part: Part, item: SlotTensor) -> Collection[Any]:
    return part.states_of(item.states).values() if not part.stage.shares_state else ()


def _has_units_of(part: Part, item: SlotTensor) -> bool:
    """Whether each process has whole units of a distributed tensor, and the states that belong to them."""
    form, unit_ndim = item.example, part.stage.unit_ndim(item.example.ndim, item.full_group())
    split = 0 if unit_ndim is None else form.ndim - unit_ndim
    return has_whole_units(form, split) and all(is_placed_like(state, form, split) for state in _states(part, item))


def _is_for_each_element(part: Part, item: SlotTensor, whole: Traced, views: Mapping[str, View]) -> bool:
    """Whether a stage does to each element of a distributed tensor the same in the whole and in any part."""
    form = item.example
    if is_partial(form) or not all(is_placed_like(state, form, form.ndim) for state in _states(part, item)):
        return False
    try:
        parts = (trace_stages([part], item.of_shape(shape), views) for shape in shapes_of_parts(form))
        return whole.trace.is_pointwise and all(each.trace.calls_alike(whole.trace) for each in parts)
    except UntracedStage:
        return False


def needs_dense(grad: Tensor) -> str:
    """Return what is wrong with a sparse gradient, in words."""
    return f"transforms need a dense gradient, got the layout {grad.layout}; use grad.to_dense()"


class SlotPlans:
    """The plans of the slots that have a chain, and what the plans depend on."""

    def __init__(
        self, plans: dict[str, Plan], chains: tuple[Chain, ...], param_table: ParamTable, grads: list[Any]
    ) -> None:
        self.of = plans
        self.chains = chains
        self.param_table = param_table
        self.have_grads = [grad is not None for grad in grads]
        self.grad_forms = Forms(grads)
        reads_params = plans.keys() - {"pre"} or any(plan.reads_params for plan in plans.values())
        self.param_forms = Forms(param_table.params) if reads_params else None
        # Lists of tensors do not allow elements that are yet to be negated or conjugated.
        self.has_unusual_grads = any(
            grad is not None and (grad.is_neg() or grad.is_conj() or not grad.is_contiguous()) for grad in grads
        )
        self.cannot_raise = all(plan.cannot_raise for plan in plans.values())
        self.guards = Guards(
            tuple(
                partial(still_has, group, key, group.get(key, ABSENT))
                for group in param_table.groups
                for key in ("param_names", "differentiable")
            )
        )
        for plan in plans.values():
            self.guards += plan.guards
        # A gradient of another shape than its parameter is from before the parameter was replaced. Plans for it are not
        # kept, because the next gradient has the new shape.
        self.can_be_kept = all(
            grad is None or grad.shape == param.shape for param, grad in zip(param_table.params, grads, strict=True)
        )

    def are_for(
        self, chains: tuple[Chain, ...], param_table: ParamTable, grads: list[Any], *, same_groups: bool
    ) -> bool:
        """Whether all that the plans depend on is unchanged, the groups too unless ``same_groups`` says so already."""
        return (
            all(map(is_, self.chains, chains))
            and self.param_table is param_table
            and self.grad_forms.are_of(grads)
            and (self.param_forms is None or self.param_forms.are_of(param_table.params))
            and self.guards.hold(same_groups=same_groups)
        )
