"""How transforms compose: ``chain(f, g)(tensor, group)`` is ``g(f(tensor, group), group)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch import Tensor

from gradchain.transform import (
    Group,
    Transform,
    call_checked,
    check_hyperparameters,
    locate,
    merge_hyperparameters,
    require_transform,
    show,
)


def chain(*transforms: Transform) -> Chain:
    """Compose transforms, applied from left to right.

    Args:
        transforms: Any callables ``(tensor, group) -> tensor``. A chain among them is taken apart into its members,
            and no transforms at all make the identity.

    Raises:
        TypeError: A member is not callable, or is a factory that was not called.
        ValueError: Two members have one hyperparameter key with two defaults; ``.named(prefix)`` tells them apart.

    Example:
        >>> import torch
        >>> from gradchain import clip_by_norm, sign
        >>> signed_and_short = chain(sign(), clip_by_norm(1.0))
        >>> signed_and_short
        chain(sign(), clip_by_norm(max_norm=1.0))
        >>> signed_and_short(torch.tensor([3.0, 0.0, -2.0]), {})
        tensor([ 0.7071,  0.0000, -0.7071])
        >>> chain(signed_and_short, lambda tensor, group: 2 * tensor)(torch.tensor([1.0, 0.0]), {})
        tensor([2., 0.])
    """
    members: list[Transform] = []
    for index, member in enumerate(transforms):
        if isinstance(member, Chain):
            members.extend(member)
        else:
            members.append(require_transform(member, f"member {index} of a chain"))
    return Chain(tuple(members))


class Chain(Sequence[Transform]):
    """Transforms in order: itself a transform, and an immutable sequence of its members. Made by ``chain``."""

    def __init__(self, members: tuple[Transform, ...]) -> None:
        self._members = members
        self.hyperparameters = merge_hyperparameters(self.places())

    def __call__(self, tensor: Tensor, group: Group, /) -> Tensor:
        for index, member in enumerate(self._members):
            try:
                tensor = call_checked(member, tensor, group)
            except Exception as error:
                locate(error, self._place(index))
                raise
        return tensor

    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""
        for index, member in enumerate(self._members):
            try:
                check_hyperparameters(member, group)
            except (TypeError, ValueError) as error:
                locate(error, self._place(index))
                raise

    def places(self) -> list[tuple[str, Transform]]:
        """The members, each with the words that say where it is."""
        return [(self._place(index), member) for index, member in enumerate(self._members)]

    def _place(self, index: int) -> str:
        return f"stage {index}, {show(self._members[index])}"

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> Transform: ...
    @overload
    def __getitem__(self, index: slice) -> Chain: ...
    def __getitem__(self, index: int | slice) -> Transform | Chain:
        return Chain(self._members[index]) if isinstance(index, slice) else self._members[index]

    def __iter__(self) -> Iterator[Transform]:
        return iter(self._members)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(show, self._members))})"

    def __eq__(self, other: object) -> bool:
        return self._members == other._members if isinstance(other, Chain) else NotImplemented

    def __hash__(self) -> int:
        return hash(("chain", self._members))

    def __reduce__(self) -> tuple[Any, ...]:
        return chain, self._members
