"""How transforms compose: ``chain(f, g)(tensor, group)`` is ``g(f(tensor, group), group)``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from torch import Tensor

from gradchain._html import show_chain
from gradchain.contract import Group, State, Transform, locate, show
from gradchain.stage import Combinator, Part, below, beneath


def chain(*transforms: Transform) -> Chain:
    """Compose transforms, applied from left to right.

    A chain with stateful members is stateful: its state holds those of its members, by their names, such as ``"ema"``
    and, for the second one, ``"ema_2"``. Likewise the second transform of a kind has hyperparameter keys of its own,
    ``"scale_2.factor"``; in an optimizer the count goes through ``pre``, ``update`` and ``post``.

    Args:
        transforms: Any callables ``(tensor, group) -> tensor``. A chain among them is taken apart into its members,
            and no transforms at all make the identity.

    Raises:
        TypeError: A member is not callable, or is a factory that was not called.
        ValueError: Two members have the same name, given by ``.named``, and different defaults.

    Example:
        >>> import torch
        >>> from gradchain import clip_by_norm, scale, sign
        >>> signed_and_short = chain(sign(), clip_by_norm(1.0))
        >>> signed_and_short
        chain(sign(), clip_by_norm(max_norm=1.0))
        >>> signed_and_short(torch.tensor([3.0, 0.0, -2.0]), {})
        tensor([ 0.7071,  0.0000, -0.7071])
        >>> chain(signed_and_short, lambda tensor, group: 2 * tensor)(torch.tensor([1.0, 0.0]), {})
        tensor([2., 0.])
        >>> chain(scale(0.9), sign(), scale(1.1)).hyperparameters
        {'scale.factor': 0.9, 'scale_2.factor': 1.1}
    """
    members: list[Transform] = []
    for member in transforms:
        members.extend(member if isinstance(member, Chain) else [member])
    return Chain(members)


class Chain(Combinator, Sequence[Transform]):
    """Transforms in order: itself a transform, and an immutable sequence of its members. Made by ``chain``."""

    name = "a chain"

    @property
    def state_name(self) -> str:
        """``"chain"``, which names the state if another combinator has a chain inside."""
        return "chain"

    def init(self, tensor: Tensor, group: Group) -> State:
        """Return the first states of the stateful members. Their keys begin with the names of the members."""
        state: State = {}
        for index in self.keys:
            state.update(beneath(self.stages[index].init(tensor, group), self.path(index)))
        return state

    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Run all tensors through one stage after the other, so that each stage can measure all of them."""
        new_states: list[State] = [{} for _ in tensors]
        results = tensors
        for results in self.run_stages(tensors, groups, states, new_states):  # noqa: B007 # the last ones count
            pass
        return list(results), new_states

    def run_stages(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[Group],
        states: Sequence[State],
        new_states: Sequence[State],
    ) -> Iterator[Sequence[Tensor]]:
        """Yield the tensors after each stage, and put the next states into ``new_states``."""
        for index, stage in enumerate(self.stages):
            path = self.path(index)
            try:
                tensors, stage_states = stage.run(tensors, groups, [below(state, path) for state in states])
            except Exception as error:
                locate(error, self.place(index))
                raise
            for new_state, stage_state in zip(new_states, stage_states, strict=True):
                new_state.update(beneath(stage_state, path))
            yield tensors

    def split(
        self, groups: Sequence[Group], numbers: Sequence[int], path: str = "", places: tuple[str, ...] = ()
    ) -> Iterator[Part]:
        """Yield the stages of the members, in order."""
        for index, stage in enumerate(self.stages):
            try:
                parts = list(stage.split(groups, numbers, path + self.path(index), (*places, self.place(index))))
            except Exception as error:
                locate(error, self.place(index))
                raise
            yield from parts

    def rebuild(self, members: Iterable[Transform]) -> Chain:
        """Return a chain of other members."""
        return chain(*members)

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> Transform: ...
    @overload
    def __getitem__(self, index: slice) -> Chain: ...
    def __getitem__(self, index: int | slice) -> Transform | Chain:
        return Chain(self.members[index]) if isinstance(index, slice) else self.members[index]

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.members)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(show, self.members))})"

    def _repr_html_(self) -> str:
        return show_chain(map(show, self.members))

    def __reduce__(self) -> tuple[Any, ...]:
        return chain, self.members
