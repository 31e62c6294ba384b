"""A transform for some parameters or some entries, or one for each kind of parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradchain._sharding import distribute_like, is_distributed
from gradchain.chain import Chain, chain
from gradchain.contract import PLACE, Group, State, Transform, locate, show, show_value
from gradchain.stage import Combinator, Part, Stage, below, beneath
from gradchain.transforms.elementwise import set_to_zero

Where: TypeAlias = str | Tensor | Callable[[Group], bool]


def masked(transform: Transform, where: Where) -> Combinator:
    """Apply a transform to some parameters, or to some entries, and leave the others as they are.

    Args:
        transform: Any transform. One that measures all tensors, such as their global norm, measures the selected
            parameters; with a mask of entries, it measures all entries.
        where: What to select: a pattern of parameter names, such as ``"*.bias"``, if the optimizer has named
            parameters; a function of the group, ``(group) -> bool``; or a boolean tensor that broadcasts to each
            parameter and selects entries. The function is called for each parameter, and finds in the group the keys of
            the param group, ``"param"``, ``"shape"``, ``"index"`` and, if it is known, ``"name"``. An optimizer asks
            again when other parameters have gradients, and not in every step. The selection must not change while there
            is a state.

    Raises:
        TypeError: ``where`` is none of these.
        ValueError: When called: a pattern is given, and the group has no ``"name"``. In an optimizer, at construction:
            no parameter has a name that matches the pattern.

    Example:
        >>> from gradchain import scale
        >>> only_biases = masked(scale(2.0), "*.bias")
        >>> only_biases(torch.ones(2), {"name": "fc.bias"}), only_biases(torch.ones(2), {"name": "fc.weight"})
        (tensor([2., 2.]), tensor([1., 1.]))
        >>> masked(scale(2.0), torch.tensor([True, False]))(torch.ones(2), {})
        tensor([2., 1.])

    References:
        optax ``masked``.
    """
    is_mask = isinstance(where, Tensor) and where.dtype is torch.bool
    if not (is_mask or isinstance(where, str) or (callable(where) and not isinstance(where, Tensor))):
        several = "; for several patterns, chain one for each" if isinstance(where, list | tuple | set) else ""
        raise TypeError(
            "where must be a pattern of names, a function (group) -> bool or a boolean tensor, "
            f"got {where.dtype if isinstance(where, Tensor) else repr(where)}{several}"
        )
    if isinstance(transform, Chain) and not isinstance(where, Tensor):
        return chain(*(masked(member, where) for member in transform))
    return Masked(transform, where)


def partition(transforms: Mapping[Any, Transform], by: str = "name") -> Partition:
    """Apply to each parameter the transform of its kind.

    Args:
        transforms: A transform for each kind. Kinds that are strings are patterns, such as ``"*.bias"`` and ``"*"`` for
            all others; the first that matches counts.
        by: The key of the group that says what kind a parameter is; ``"name"`` is its name, if the optimizer has named
            parameters.

    Raises:
        TypeError: ``transforms`` is no mapping.
        ValueError: Two transforms have the same name, given by ``.named``, and different defaults.
            When called: the group has no such key, or no transform is for the kind of a parameter.
        UserWarning: In an optimizer, at construction: a pattern matches no name. This is no error, since the same
            kinds can serve several models.

    Example:
        >>> from gradchain import scale, sign
        >>> kinds = partition({"*.bias": sign(), "*": scale(2.0)})
        >>> kinds(torch.tensor([3.0]), {"name": "fc.bias"}), kinds(torch.tensor([3.0]), {"name": "fc.weight"})
        (tensor([1.]), tensor([6.]))

    References:
        optax ``partition``.
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(f"partition needs a dict of transforms, by kind, got {transforms!r}")
    return Partition(transforms, by)


def freeze(where: Where) -> Combinator:
    """Set to zero what is selected: in ``update``, the selected parameters or entries stay where they are.

    Weight decay and momentum do not move them either. Their gradients are computed all the same, and count in the norms
    that ``pre`` measures; ``requires_grad_(False)`` leaves them out.

    Args:
        where: What to freeze, as in ``masked``. For several patterns, ``chain(freeze("a.*"), freeze("b.*"))``.

    Raises:
        TypeError: ``where`` is of the wrong type.

    Example:
        >>> freeze("*.bias")(torch.ones(2), {"name": "fc.bias"})
        tensor([0., 0.])

    References:
        optax ``freeze``.
    """
    return masked(set_to_zero(), where)


class Masked(Combinator):
    """A transform of what is selected. Made by ``masked``."""

    name = "masked"

    def __init__(self, transform: Transform, where: Where) -> None:
        super().__init__([transform])
        self.where = where

    def path(self, index: int) -> str:
        """Return an empty beginning, because the state is that of the wrapped transform."""
        return ""

    @property
    def state_name(self) -> str:
        """The state name of the wrapped transform."""
        return self.stages[0].state_name

    def init(self, tensor: Tensor, group: Group) -> State:
        """Return the first state of the wrapped transform, or an empty one if the parameter is not selected."""
        return self.stages[0].init(tensor, group) if self.selects(group) else {}

    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Transform the selected tensors together."""
        chosen = [i for i, group in enumerate(groups) if self.selects(group)]
        results, new_states = list(tensors), list(states)
        for i, result, new_state in _run_some(self.stages[0], chosen, tensors, groups, states):
            results[i], new_states[i] = self._mix(result, tensors[i], groups[i]), new_state
        return results, new_states

    def split(
        self, groups: Sequence[Group], numbers: Sequence[int], path: str = "", places: tuple[str, ...] = ()
    ) -> Iterator[Part]:
        """Yield the stages of the transform for the selected tensors, or the stage itself if it selects entries."""
        if isinstance(self.where, Tensor):
            yield from super().split(groups, numbers, path, places)
        else:
            chosen = [i for i in numbers if self.selects(groups[i])]
            yield from self.stages[0].split(groups, chosen, path, places)

    def rebuild(self, members: Sequence[Transform]) -> Combinator:
        """Return the same selection for another transform."""
        return masked(members[0], self.where)

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """Return the averages that the transform keeps, with the entries of ``param`` that are not selected."""
        return [self.mix(average, param) for average in super().averages(state, param)]

    def mix(self, result: Tensor, tensor: Tensor) -> Tensor:
        """Return the selected entries of ``result``, and the other entries of ``tensor``."""
        if not isinstance(self.where, Tensor) or not tensor.numel():
            return result
        mask = self.where.to(tensor.device).expand(tensor.shape)
        return torch.where(distribute_like(mask, tensor) if is_distributed(tensor) else mask, result, tensor)

    def _mix(self, result: Tensor, tensor: Tensor, group: Group) -> Tensor:
        try:
            return self.mix(result, tensor)
        except RuntimeError as error:
            shape = tuple(self.where.shape) if isinstance(self.where, Tensor) else ()
            locate(error, f"masked: the mask of shape {shape} does not fit {tuple(tensor.shape)}")
            if PLACE in group:
                locate(error, group[PLACE])
            raise

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """Return what the transform acts on, or nothing if the parameter is not selected; see ``Stage.units``."""
        return super().units(tensor, group) if self.selects(group) else ()

    def selects(self, group: Group) -> bool:
        """Whether the transform is for the parameter of ``group``, at least in part."""
        if isinstance(self.where, Tensor):
            return True
        return matches(_read(group, "name", self), self.where) if isinstance(self.where, str) else self.where(group)

    def __repr__(self) -> str:
        where = show_value(self.where) if isinstance(self.where, str | Tensor) else show(self.where)
        return f"masked({show(self.members[0])}, {where})"

    def __reduce__(self) -> tuple[Any, ...]:
        return masked, (self.members[0], self.where)


class Partition(Combinator):
    """A transform for each kind of parameter. Made by ``partition``."""

    name = "partition"

    def __init__(self, transforms: Mapping[Any, Transform], by: str) -> None:
        super().__init__(transforms.values())
        self.kinds = tuple(transforms)
        self.by = by

    def init(self, tensor: Tensor, group: Group) -> State:
        """Return the first state of the transform for this kind. Its keys begin with the name of the transform."""
        kind = self.kind(group)
        return beneath(self.stages[kind].init(tensor, group), self.path(kind))

    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Transform the tensors of each kind together."""
        kinds = [self.kind(group) for group in groups]
        results, new_states = list(tensors), list(states)
        for kind, stage in enumerate(self.stages):
            chosen, path = [i for i, each in enumerate(kinds) if each == kind], self.path(kind)
            own = [below(state, path) for state in states]
            for i, result, new_state in _run_some(stage, chosen, tensors, groups, own):
                results[i], new_states[i] = result, beneath(new_state, path)
        return results, new_states

    def split(
        self, groups: Sequence[Group], numbers: Sequence[int], path: str = "", places: tuple[str, ...] = ()
    ) -> Iterator[Part]:
        """Yield the stages of each transform, for the tensors of its kind."""
        kinds = {i: self.kind(groups[i]) for i in numbers}
        for kind, stage in enumerate(self.stages):
            yield from stage.split(groups, [i for i in numbers if kinds[i] == kind], path + self.path(kind), places)

    def rebuild(self, members: Sequence[Transform]) -> Partition:
        """Return the same partition with other transforms."""
        return Partition(dict(zip(self.kinds, members, strict=True)), self.by)

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """Return what the transform for this kind acts on; see ``Stage.units``."""
        return self.stages[self.kind(group)].units(tensor, group)

    def kind(self, group: Group) -> int:
        """Return the index of the stage that is for the parameter of ``group``."""
        value = _read(group, self.by, self)
        for index, kind in enumerate(self.kinds):
            if matches(value, kind) if isinstance(kind, str) and isinstance(value, str) else value == kind:
                return index
        raise ValueError(
            f'{self!r} has no transform for group["{self.by}"], {value!r}; add one, or "*": chain() for none'
        )

    def __repr__(self) -> str:
        pairs = ", ".join(f"{kind!r}: {show(member)}" for kind, member in zip(self.kinds, self.members, strict=True))
        return f"partition({{{pairs}}}, by={self.by!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partition):
            return NotImplemented
        return (self.kinds, self.members, self.by) == (other.kinds, other.members, other.by)

    def __hash__(self) -> int:
        return hash(("partition", self.kinds, self.members, self.by))

    def __reduce__(self) -> tuple[Any, ...]:
        return partition, (dict(zip(self.kinds, self.members, strict=True)), self.by)


def _run_some(
    stage: Stage, chosen: list[int], tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
) -> Iterator[tuple[int, Tensor, State]]:
    """Run the chosen tensors together, and yield the position, the result and the next state of each."""
    results, new_states = stage.run(
        [tensors[i] for i in chosen], [groups[i] for i in chosen], [states[i] for i in chosen]
    )
    return zip(chosen, results, new_states, strict=True)


def matches(name: str, pattern: str) -> bool:
    """Whether ``name`` matches ``pattern``."""
    return fnmatchcase(name, pattern)


# This keeps torch.compile from tracing what ``fnmatch`` does. The decorator of torch for it takes a second to import.
matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _read(group: Group, key: str, reader: object) -> Any:
    if key not in group:
        names = "give the optimizer model.named_parameters(), or model=model"
        remedy = names if key == "name" else "set it in the param groups"
        raise ValueError(f'{reader!r} reads group["{key}"], which is not there; {remedy}')
    return group[key]
