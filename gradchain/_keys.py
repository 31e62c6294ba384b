"""The keys of hyperparameters in the param groups, which stages that stand together must not share by accident."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from gradchain.contract import is_same

if TYPE_CHECKING:
    from gradchain.bound import BoundTransform
    from gradchain.stage import Stage


def number_keys(stages: Iterable[Stage], taken: Collection[str] = ()) -> list[Stage]:
    """The stages, in which no two transforms share the keys of their hyperparameters, unless a common name says so.

    The first transform of a kind keeps its prefix, ``"scale"``, the second one gets ``"scale_2"``, and so on, without
    the prefixes that are ``taken``. Those with a name of their own keep it.
    """
    stages, used = list(stages), set(taken)

    def note(transform: BoundTransform) -> BoundTransform:
        used.update({transform.prefix} if transform.is_named else ())
        return transform

    def number(transform: BoundTransform) -> BoundTransform:
        if transform.is_named or all(key in transform.own_keys for key in transform.definition.hyperparameters):
            return transform
        free = free_name(transform.prefix, used)
        used.add(free)
        return transform.numbered(free)

    for stage in stages:
        stage.replaced(note)
    return [stage.replaced(number) for stage in stages]


def free_name(base: str, taken: Collection[str]) -> str:
    """``base``, or the first of ``base_2``, ``base_3`` and so on that is not ``taken``."""
    names = (f"{base}_{n}" if n > 1 else base for n in itertools.count(1))
    return next(name for name in names if name not in taken)


def merge_hyperparameters(places: Iterable[tuple[str, Stage]]) -> dict[str, Any]:
    """The hyperparameters of all stages; one key with two defaults is an error that names both places."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, stage in places:
        for key, value in stage.hyperparameters.items():
            known = merged.setdefault(key, value)
            if value is not known and not is_same(value, known):
                raise ValueError(
                    f'the hyperparameter "{key}" has two defaults: {merged[key]!r} ({origin[key]}) and {value!r} '
                    f"({place}). Give one of the two another name with .named(prefix)."
                )
            origin.setdefault(key, place)
    return merged
