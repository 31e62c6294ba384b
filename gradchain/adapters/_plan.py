"""What the transforms of a slot do in a step, worked out once: what runs on which tensors, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from gradchain._sharding import (
    distribute,
    gather,
    goes_along,
    has_whole_units,
    held,
    is_distributed,
    local,
    put_back,
)
from gradchain.broadcast import Broadcast
from gradchain.chain import Chain
from gradchain.masked import Masked, Partition
from gradchain.transform import CONTEXT, BoundTransform, Dim, Group, Stage, State, compute_dtype, locate

# Tensors go through all stages in blocks of about this many bytes, which stay in the cache from one stage to the next:
# many small tensors together, a larger one by itself, or in pieces where all stages are elementwise. Five stages over
# the gradients of ResNet-50 take 0.6 of the time that stage after stage takes, and 0.5 in pieces. Smaller blocks gain
# nothing; pieces of less than twice what torch gives to one thread (2**15 elements) would leave the others idle.
BLOCK_BYTES = 2**21


_Leaves: TypeAlias = dict[int, State]


class Item(NamedTuple):
    """A tensor of a slot, as far as it stays the same from step to step."""

    form: Tensor
    """Has its shape, dtype, device and layout."""
    group: Group
    identity: Group
    param: Tensor
    """The parameter that the tensor is, or belongs to."""
    context: tuple[str, ...]
    """Which of ``CONTEXT`` there is for it."""
    state: State
    takes_part: bool
    is_contiguous: bool
    """In every step that the plan is for, its context included."""
    is_new: bool
    """Whether its state has not been in a step yet."""
    watched: set[str]
    """The keys of the groups that the plan depends on; what ``read`` gives notes there what is read from it."""

    def read(self) -> Group:
        """What says which transform is for it."""
        return _Reading({**self.group, **self.identity, "param": self.param}, self.watched)


class _Reading(Group):
    """A group that notes which of its keys are read."""

    def __init__(self, group: Group, noted: set[str]) -> None:
        super().__init__(group)
        self._noted = noted

    def __getitem__(self, key: str) -> Any:
        self._noted.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._noted.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._noted.add(key)
        return super().get(key, default)


@dataclass
class Work:
    """The tensors of one step, and the states that are to replace the old ones when it is done."""

    tensors: list[Any]
    context: Mapping[str, list[Any]]
    keeps_states: bool
    """Whether to leave the old states alone until then."""
    new_states: list[tuple[State, State]] = field(default_factory=list)
    views: dict[int, Group] = field(default_factory=dict)
    """What was measured of all tensors, by the number of the operation that did."""

    def view_of(self, measure: _Measure | None) -> Group:
        """What ``measure`` has found."""
        return {} if measure is None else self.views[measure.number]

    def commit(self) -> None:
        """Put the new states in place of the old ones."""
        if torch.compiler.is_compiling():  # a graph knows the states of an optimizer by the tensors that they are in
            new_states = [(state, map_state(new_state, Tensor.clone)) for state, new_state in self.new_states]
            for state, new_state in new_states:
                _overwrite(state, new_state)
        else:
            for state, new_state in self.new_states:
                state.update(new_state)


class SkippedStep(Exception):  # noqa: N818 # not an error: it ends the inner step
    """Raised when a transform says that the step must not be made."""

    def __init__(self, counted: list[tuple[State, State]]) -> None:
        self.counted = counted
        self.loss: Any = None
        self.inner_state: Any = None

    def count(self) -> None:
        """Keep the counters, and raise a ``RuntimeError`` if more steps in a row were skipped than allowed."""
        for state, new_state in self.counted:
            _overwrite(state, new_state)
        steps = [int(new_state["in_a_row"]) for _, new_state in self.counted if bool(new_state["too_many"])]
        if steps:
            raise RuntimeError(
                f"pre: {max(steps)} steps in a row were skipped, more than allowed; look at the gradients, lower the "
                "learning rate, or raise the limit of the transform that skips"
            )


class Plan:
    """What a stage does with the tensors of a slot."""

    def __init__(self, stage: Stage, items: Sequence[Item]) -> None:
        self.operations = _operations(stage, items, range(len(items)), ())
        self.touched = sorted({i for operation in self.operations for i in operation.at})
        for i in self.touched:
            if items[i].form.layout is not torch.strided:
                error = TypeError(needs_dense(items[i].form))
                error.failed_item = i  # type: ignore[attr-defined]
                raise error
        self.is_plain = all(_is_plain(items[i].form) for i in self.touched)
        self.is_on_cpu = self.is_plain and all(items[i].form.is_cpu for i in self.touched)
        self.is_trusted = all(operation.is_trusted for operation in self.operations)
        self.skips = any(operation.skips for operation in self.operations)
        self.has_run = False
        for number, operation in enumerate(self.operations):
            operation.number = number
            operation.precedes_skip = any(later.skips for later in self.operations[number + 1 :])
        self._calls = list(_in_order(self.operations, items))
        for operation in self.operations:
            try:
                operation.rehearse(items)
            except Exception as error:
                operation.say_where(error)
                raise

    def prepare(self) -> None:
        """Read the hyperparameters, or raise where they are wrong."""
        for operation in self.operations:
            try:
                operation.prepare()
            except Exception as error:
                operation.say_where(error)
                raise

    def run(self, work: Work) -> None:
        """Transform all tensors in place, and put new states into ``work``."""
        for part, operations in self._calls:
            tensors = part.of(work.tensors)
            for operation in operations:
                try:
                    operation.run(work, part, tensors)
                except Exception as error:
                    operation.say_where(error)
                    raise
        self.has_run = True

    def run_stage(self, index: int, work: Work) -> None:
        """Do what one stage of the chain does, for all tensors."""
        for operation in self.operations:
            if operation.places[-1][1] == index:
                part = _Part(operation.at)
                try:
                    operation.run(work, part, part.of(work.tensors))
                except Exception as error:
                    operation.say_where(error)
                    raise


class _Part:
    """The tensors that a call acts on."""

    def __init__(self, at: Sequence[int]) -> None:
        self.at = list(at)
        self._pick = itemgetter(*self.at)

    def of(self, values: list[Any]) -> list[Any]:
        if len(self.at) == len(values):
            return values
        if torch.compiler.is_compiling():  # where there is no itemgetter
            return [values[i] for i in self.at]
        picked = self._pick(values)
        return [picked] if len(self.at) == 1 else list(picked)


class _Piece(_Part):
    """A part of a tensor."""

    def __init__(self, index: int, start: int, stop: int) -> None:
        super().__init__([index])
        self._piece = slice(start, stop)

    def of(self, values: list[Any]) -> list[Any]:
        return [values[self.at[0]].view(-1)[self._piece]]


class _Operation(ABC):
    """A stage, and the tensors that it acts on."""

    is_trusted = False
    """Whether it cannot fail where it does not in its rehearsal."""
    is_joint = False
    """Whether it acts on all its tensors at once, and not on one after the other."""
    can_cut = False
    """Whether it can act on pieces of a tensor."""
    skips = False
    precedes_skip = False
    number = 0
    """Its position in the plan."""

    def __init__(self, at: Sequence[int]) -> None:
        self.at = list(at)
        self.places: list[tuple[Chain, int]] = []

    def rehearse(self, items: Sequence[Item]) -> None:  # noqa: B027 # most need not
        """Raise what a step would raise, as far as it can be known before."""

    def prepare(self) -> None:  # noqa: B027
        """Read the hyperparameters, or raise where they are wrong."""

    @abstractmethod
    def run(self, work: Work, part: _Part, tensors: list[Any]) -> None:
        """Transform a part of the tensors in place."""

    def say_where(self, error: Exception) -> None:
        """Say in ``error`` which stage it was."""
        for chain, index in self.places if not isinstance(error, SkippedStep) else ():
            locate(error, chain.place(index))


class _InPlace(_Operation):
    """The rule of a transform, for tensors of one group that differ in nothing but their shape."""

    is_trusted = True

    def __init__(
        self,
        bound: BoundTransform,
        items: Sequence[Item],
        at: Sequence[int],
        dim: Dim,
        leaves: _Leaves,
        measure: _Measure | None,
    ) -> None:
        super().__init__(at)
        first = items[self.at[0]]
        self.bound = bound
        self.group = first.group
        self.context = first.context
        self.dtype = compute_dtype(first.form.dtype)
        self.dim: Dim = dim
        self.leaves = leaves
        self.measure = measure
        self.shapes = {items[i].form.shape for i in self.at}
        self.can_cut = bound.definition.elementwise and not leaves and not bound.definition.takes_tensors

    def rehearse(self, items: Sequence[Item]) -> None:
        item = items[self.at[0]]
        try:
            has_shape = any(isinstance(v, Tensor) and v.ndim for v in self.bound.read(self.group, self.dtype).values())
            single = item.form.new_zeros(item.form.shape if has_shape else (1,) * item.form.ndim)
            group = {**self.group, **item.identity, **dict.fromkeys(self.context, single)}
            # The function in place of the rule: its errors say what is wrong.
            self.bound.update(single, group, self.bound.begin(single, {**group, "param": single}))
        except Exception as error:
            error.failed_item = self.at[0]  # type: ignore[attr-defined]
            raise

    def prepare(self) -> None:
        try:
            self.base = {**self.group, "dim": self.dim}
            self.arguments = self.bound.read(self.group, self.dtype)
            for name, value in self.arguments.items():
                for shape in self.shapes if isinstance(value, Tensor) and value.ndim else ():
                    _require_fit(self.bound.key(name), value, shape)
        except Exception as error:
            error.failed_item = self.at[0]  # type: ignore[attr-defined]
            raise

    def run(self, work: Work, part: _Part, tensors: list[Any]) -> None:
        states = [self.leaves[i] for i in part.at] if self.leaves else []
        if work.keeps_states or self.precedes_skip:
            copies = [{key: value.clone() for key, value in state.items()} for state in states]
            work.new_states += zip(states, copies, strict=True)
            states = copies
        group = {**self.base, **work.view_of(self.measure)} if self.measure else self.base
        context = {key: partial(part.of, work.context[key]) for key in self.context}
        self.bound.act_in_place(tensors, group, context, states, self.arguments)


class _Pure(_Operation):
    """A stage that acts on each tensor by its function, whose result is written back."""

    def __init__(
        self, stage: Broadcast, items: Sequence[Item], at: Sequence[int], leaves: _Leaves, measure: _Measure | None
    ) -> None:
        super().__init__(at)
        self.stage = stage
        self.groups = {i: (items[i].group, items[i].identity, items[i].context) for i in self.at}
        self.leaves = leaves
        self.measure = measure

    def run(self, work: Work, part: _Part, tensors: list[Any]) -> None:
        view = work.view_of(self.measure)
        for i in part.at:
            tensor, state = work.tensors[i].detach(), self.leaves.get(i, {})
            group, identity, keys = self.groups[i]
            context = {key: work.context[key][i].detach() for key in keys}
            try:
                result, new_state = self.stage.act(tensor, {**group, **identity, **view, **context}, state)
            except Exception as error:
                error.failed_item = i  # type: ignore[attr-defined]
                raise
            if new_state is not state:
                work.new_states.append((state, own(new_state, tensor, *context.values())))
            _write([tensor], [result])


class _Measure(_Operation):
    """What a transform measures of all tensors, for the operations that act on each."""

    is_joint = True

    def __init__(self, stage: Broadcast, items: Sequence[Item], at: Sequence[int], leaves: _Leaves) -> None:
        super().__init__(at)
        self.stage = stage
        self.group = items[self.at[0]].group
        self.state: State = next(iter(leaves.values()), {})
        self.skips = bool(_flags(self.state))
        bound = stage.transform
        self.is_trusted = isinstance(bound, BoundTransform) and bound.definition.rule is not None
        measure = bound.definition.measure if isinstance(bound, BoundTransform) else None
        is_blind = not getattr(measure, "sees_parts", False)
        self.gathers = is_blind and any(is_distributed(items[i].form) for i in self.at)

    def run(self, work: Work, part: _Part, tensors: list[Any]) -> None:
        state = self.state
        if self.gathers:
            tensors, state = list(map(gather, tensors)), map_state(state, gather)
        view, new_state = self.stage.measure(tensors, self.group, state)
        work.views[self.number] = view
        _raise_if_skipped([(self.state, new_state)])
        if new_state is not state:
            work.new_states.append((self.state, _like(self.state, new_state, distribute)))


class _Together(_Operation):
    """A stage of which nothing is known, run on all tensors at once."""

    is_joint = True

    def __init__(self, stage: Stage, items: Sequence[Item], at: Sequence[int], path: Sequence[str]) -> None:
        # Where a state is one for all, it advances for all. What takes no part is a tensor without elements.
        at = [i for i in at if items[i].takes_part or stage.shares_state]
        super().__init__(_oldest(at, items) if stage.shares_state else at)
        self.stage = stage
        self.items = [items[i]._replace(form=torch.empty(0)) for i in self.at]
        self.leaves: _Leaves = {i: _leaf(items[i].state, path) if stage.stateful else {} for i in self.at}
        self.skips = any(map(_flags, self.leaves.values()))
        self.empty = {i: local(items[i].form).new_empty((0,) * max(items[i].form.ndim, 1)) for i in self.at}

    def run(self, work: Work, part: _Part, tensors: list[Any]) -> None:
        tensors, groups, states = [], [], [self.leaves[i] for i in part.at]
        for i, item in zip(part.at, self.items, strict=True):
            tensors.append(work.tensors[i].detach() if item.takes_part else self.empty[i])
            context = {key: work.context[key][i].detach() for key in item.context if item.takes_part}
            # Masks in it read the parameter in ``post`` too, and that of what takes no part.
            param = tensors[-1] if item.takes_part else item.param.detach()
            groups.append({**item.group, **item.identity, "param": param, **context})
        try:
            results, new_states = self.stage.run(tensors, groups, states)
        except Exception as error:
            failed = getattr(error, "failed_group", None)
            error.failed_item = next(  # type: ignore[attr-defined]
                (i for i, group in zip(part.at, groups, strict=True) if group is failed), None
            )
            raise
        _raise_if_skipped(zip(states, new_states, strict=True))
        inputs = [*tensors, *(group[key] for group in groups for key in CONTEXT if key in group)]
        for state, new_state in zip(states, new_states, strict=True):
            if new_state is not state:
                work.new_states.append((state, own(new_state, *inputs)))
        _write(tensors, results)


class _Distributed(_Operation):
    """An operation on distributed tensors: on the part that this process has of each, or on the gathered ones."""

    def __init__(self, operation: _InPlace | _Pure | _Together, *, gathers: bool) -> None:
        super().__init__(operation.at)
        self.operation = operation
        self.leaves, operation.leaves = operation.leaves, {}
        self.gathers = gathers
        self.is_trusted = operation.is_trusted
        self.is_joint = operation.is_joint
        self.skips = operation.skips

    def rehearse(self, items: Sequence[Item]) -> None:
        # The shape of the whole, in the memory of one element.
        forms = (local(item.form).new_zeros(()).expand(item.form.shape) for item in items)
        self.operation.rehearse([item._replace(form=form) for item, form in zip(items, forms, strict=True)])

    def prepare(self) -> None:
        self.operation.prepare()

    def run(self, work: Work, part: _Part, tensors: list[Any]) -> None:
        context: dict[str, Any] = {k: _Seen(values, self._see, work.tensors) for k, values in work.context.items()}
        seen = Work(
            list(work.tensors),
            context,
            keeps_states=work.keeps_states or self.precedes_skip or self.gathers,
            views=work.views,
        )
        origins = {}
        for i in part.at:
            seen.tensors[i] = self._see(work.tensors[i])
            if i in self.leaves:
                state = self.operation.leaves[i] = _seen(self.leaves[i], self._see)
                origins[id(state)] = self.leaves[i]
        self.operation.run(seen, part, part.of(seen.tensors))
        for i in part.at if self.gathers else ():
            if is_distributed(work.tensors[i]):
                work.tensors[i].copy_(distribute(seen.tensors[i], work.tensors[i]))
        for old, new in seen.new_states:
            if id(old) in origins:
                origin = origins[id(old)]
                work.new_states.append((origin, _like(origin, new, distribute if self.gathers else put_back)))
        self.operation.leaves = {}

    def _see(self, value: Any, like: Any = None) -> Any:
        return gather(value) if self.gathers else held(value, like)


class _Seen(Sequence[Any]):
    """The context of a distributed operation, of which each tensor is gathered when it is asked for."""

    def __init__(self, values: Sequence[Any], see: Callable[..., Any], tensors: Sequence[Any]) -> None:
        self.values = values
        self.see = see
        self.tensors = tensors

    def __getitem__(self, index: Any) -> Any:
        return self.see(self.values[index], self.tensors[index])

    def __len__(self) -> int:
        return len(self.values)


def _seen(state: State, see: Callable[[Any], Any]) -> State:
    """``state`` as an operation is to see it; itself where there is nothing distributed in it."""
    new = {key: _seen(value, see) if isinstance(value, dict) else see(value) for key, value in state.items()}
    return state if all(new[key] is value for key, value in state.items()) else new


def _like(state: State, new_state: State, distribute: Callable[[Tensor, Any], Any]) -> State:
    """``new_state``, with each tensor distributed as that of ``state`` is."""
    return {
        key: _like(state.get(key, {}), value, distribute)
        if isinstance(value, dict)
        else distribute(value, state[key])
        if key in state and is_distributed(state[key])
        else value
        for key, value in new_state.items()
    }


def _must_gather(stage: Broadcast, form: Tensor, ndim: int | None, state: State) -> bool:
    """Whether the parts that the processes have of ``form`` do not suffice."""
    bound = stage.transform if isinstance(stage.transform, BoundTransform) else None
    split = 0 if ndim is None else form.ndim - ndim
    if bound is not None:
        if bound.definition.elementwise:
            split = form.ndim
        if bound.definition.takes_tensors or "generator" in bound.arguments:
            split = 0  # what it takes fits the whole, and what it draws is for the whole
    return not has_whole_units(form, split) or not all(goes_along(leaf, form, split) for leaf in _tensors(state))


def _tensors(state: State) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        else:
            yield value


def _operations(stage: Stage, items: Sequence[Item], at: Sequence[int], path: tuple[str, ...]) -> list[_Operation]:
    """What ``stage`` does with the tensors ``at``, whose states of it are at ``path``."""
    if isinstance(stage, Chain):
        found: list[_Operation] = []
        for index, member in enumerate(stage.stages):
            try:
                below = _operations(member, items, at, (*path, stage.keys[index]) if member.stateful else path)
            except Exception as error:
                locate(error, stage.place(index))
                raise
            for operation in below:
                operation.places.append((stage, index))
            found += below
        return found
    if isinstance(stage, Masked) and not isinstance(stage.where, Tensor):
        chosen = [i for i in at if stage.selects(items[i].read())]
        return _operations(stage.stages[0], items, chosen, path)
    if isinstance(stage, Partition):
        kinds = {i: stage.kind(items[i].read()) for i in at}
        parts = [[i for i in at if kinds[i] == kind] for kind in range(len(stage.stages))]
        paths = [(*path, stage.keys[kind]) if kind in stage.keys else path for kind in range(len(parts))]
        members = zip(stage.stages, parts, paths, strict=True)
        return [operation for member, part, below in members for operation in _operations(member, items, part, below)]
    if isinstance(stage, Broadcast) and stage.shares_state and at:
        shared = _leaf(items[_oldest(at, items)[0]].state, path)
        for i in at:
            _leaf(items[i].state, path[:-1])[path[-1]] = shared
    acting = [i for i in at if items[i].takes_part and items[i].form.numel()]
    if not acting:
        return []
    if isinstance(stage, Broadcast):
        return _operations_on_each(stage, items, acting, at, path)
    together = _Together(stage, items, at, path)
    if any(is_distributed(items[i].form) for i in together.at):
        return [_Distributed(together, gathers=True)]
    return [together]


def _operations_on_each(
    stage: Broadcast, items: Sequence[Item], acting: Sequence[int], at: Sequence[int], path: tuple[str, ...]
) -> list[_Operation]:
    found: list[_Operation] = []
    measure: _Measure | None = None
    stateful = at if stage.shares_state else acting if stage.stateful else []
    leaves: _Leaves = {i: _leaf(items[i].state, path) for i in stateful}
    bound = stage.transform if isinstance(stage.transform, BoundTransform) else None
    if bound is not None and bound.definition.measure is not None:
        measure = _Measure(stage, items, acting, leaves)
        found.append(measure)
    if stage.shares_state:
        leaves = {}
    kinds: dict[Any, list[int]] = {}
    for i in acting:
        item = items[i]
        try:
            ndim = stage.mapped_ndim(item.form, item.group)
        except Exception as error:
            error.failed_item = i  # type: ignore[attr-defined]
            raise
        dim = None if ndim is None else tuple(range(-ndim, 0))
        has_rule = bound is not None and bound.definition.rule is not None and _is_plain(local(item.form))
        kind = (id(item.group), item.form.dtype, item.form.device, item.context, dim) if has_rule else None
        gathers = _must_gather(stage, item.form, ndim, leaves.get(i, {})) if is_distributed(item.form) else None
        kinds.setdefault((gathers, kind), []).append(i)
    for (gathers, kind), same in kinds.items():
        operation: _InPlace | _Pure
        if bound is None or kind is None:
            operation = _Pure(stage, items, same, leaves, measure)
        else:
            operation = _InPlace(bound, items, same, kind[-1], leaves, measure)
        found.append(operation if gathers is None else _Distributed(operation, gathers=gathers))
    return found


def _oldest(at: Sequence[int], items: Sequence[Item]) -> list[int]:
    """First those whose state, if it is one for all of them, is not that of a newcomer."""
    return sorted(at, key=lambda i: items[i].is_new)


def _leaf(state: State, path: Sequence[str]) -> State:
    for key in path:
        state = state[key]
    return state


def _flags(state: State) -> list[State]:
    """The parts of ``state`` that say whether to skip the step."""
    if "skip_step" in state:
        return [state]
    return [found for value in state.values() if isinstance(value, dict) for found in _flags(value)]


def _raise_if_skipped(states: Iterable[tuple[State, State]]) -> None:
    # What is as it was has not been measured: its flag is that of an earlier step.
    flags = [(o, n) for old, new in states for o, n in zip(_flags(old), _flags(new), strict=True) if o is not n]
    # Gathered, so that the host waits once: the flag of a state that is one for all is one tensor.
    distinct = {id(new["skip_step"]): new["skip_step"] for _, new in flags}
    if distinct and bool(torch.stack(list(distinct.values())).any()):
        raise SkippedStep(flags)


def _is_plain(tensor: Tensor) -> bool:
    """Whether rules can deal with it, in one list with others."""
    return type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided and tensor.is_floating_point()


_Call: TypeAlias = tuple[_Part, list[_Operation]]


def _in_order(operations: Sequence[_Operation], items: Sequence[Item]) -> Iterator[_Call]:
    stretch: list[_Operation] = []
    for operation in operations:
        if operation.is_joint:
            yield from _in_blocks(stretch, items)
            yield _Part(operation.at), [operation]
            stretch = []
        else:
            stretch.append(operation)
    yield from _in_blocks(stretch, items)


def _in_blocks(operations: Sequence[_Operation], items: Sequence[Item]) -> Iterator[_Call]:
    # A single stage gains nothing from blocks; but half precision takes memory for all of a block.
    at_once = len(operations) == 1 and not any(
        compute_dtype(items[i].form.dtype) != items[i].form.dtype for i in operations[0].at
    )
    for block in _blocks(sorted({i for operation in operations for i in operation.at}), items, at_once=at_once):
        acting = [(operation, [i for i in operation.at if i in block]) for operation in operations]
        acting = [(operation, at) for operation, at in acting if at]
        index, form = min(block), items[min(block)].form
        length = BLOCK_BYTES // form.element_size()
        if len(block) == 1 < len(acting) and items[index].is_contiguous and all(op.can_cut for op, _ in acting):
            for start in range(0, form.numel(), length):
                yield _Piece(index, start, start + length), [operation for operation, _ in acting]
        else:
            for at, same in groupby(acting, key=itemgetter(1)):
                yield _Part(at), [operation for operation, _ in same]


def _blocks(at: Sequence[int], items: Sequence[Item], *, at_once: bool) -> Iterator[set[int]]:
    block: set[int] = set()
    size = 0
    for i in at:
        here = items[i].form.numel() * items[i].form.element_size()
        if here >= BLOCK_BYTES:
            yield {i}
            continue
        block.add(i)
        size += here
        if size >= BLOCK_BYTES and not at_once:
            yield block
            block, size = set(), 0
    if block:
        yield block


def _require_fit(name: str, value: Tensor, shape: torch.Size) -> None:
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to a tensor of shape {tuple(shape)}, got shape {tuple(value.shape)}")


def needs_dense(grad: Tensor) -> str:
    """What is wrong with a sparse gradient."""
    return f"transforms need a dense gradient, got the layout {grad.layout}; use grad.to_dense()"


def _write(tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Copy each result into its tensor. One that is a view of them, such as ``tensor.T``, must be read before."""
    pairs = [pair for pair in zip(tensors, results, strict=True) if pair[0] is not pair[1] and pair[0].numel()]
    if any(map(_can_be_view, results)):
        values = own({str(i): result for i, (_, result) in enumerate(pairs)}, *(tensor for tensor, _ in pairs))
        pairs = [(tensor, value) for (tensor, _), value in zip(pairs, values.values(), strict=True)]
    for tensor, value in pairs:
        tensor.copy_(value)


def _can_be_view(tensor: Tensor) -> bool:
    # Inference tensors do not note it, and graphs cannot be asked.
    return torch.compiler.is_compiling() or tensor._is_view() or tensor.is_inference()


def own(state: State, *inputs: Tensor) -> State:
    """``state``, without sharing memory with ``inputs``, which are written to in place."""
    owned: State
    if torch.compiler.is_compiling():  # where storages have no address
        owned = map_state(state, lambda v: v.clone() if any(v is tensor for tensor in inputs) else v)
    else:
        storages = set(map(_storage, inputs)) - {None}
        owned = map_state(state, lambda v: v.clone() if _storage(v) in storages else v)
    return owned


def _storage(tensor: Tensor) -> int | None:
    tensor = local(tensor)
    is_known = tensor.layout is torch.strided and type(tensor) in (Tensor, Parameter)
    return tensor.untyped_storage().data_ptr() if is_known else None


def _overwrite(state: State, new_state: State) -> None:
    """Give the tensors of ``state`` the values in ``new_state``."""
    for key, value in new_state.items():
        known = state.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            _overwrite(known, value)
        elif isinstance(known, Tensor) and isinstance(value, Tensor) and _look(known) == _look(value):
            known.copy_(value)
        else:
            state[key] = value


def _look(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device


def map_state(state: Any, function: Callable[[Tensor], Any]) -> Any:
    """``state`` with ``function(tensor)`` for each of its tensors."""
    if isinstance(state, dict):
        return {key: map_state(value, function) for key, value in state.items()}
    return function(state)
