"""Which parameters a pattern of names or a function chooses, as inner optimizers and overrides of groups ask for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from gradchain.contract import Group, show
from gradchain.masked import matches

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

Key: TypeAlias = str | Callable[[Tensor], bool]
"""A pattern of names, such as ``"*.weight"``, or a function that says whether it chooses a parameter."""


def list_groups(params: Params) -> list[Group]:
    """The param groups that ``params`` are for a torch optimizer."""
    given: list[Any] = list(params)
    if not given:
        raise ValueError("params must have at least one parameter, got none")
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    return [{**group, "params": _as_list(group["params"])} for group in groups]


def name_and_param(item: Any, names: Mapping[Tensor, str]) -> tuple[str | None, Tensor]:
    """A parameter as an optimizer gets it, alone or in a pair with its name; a name in ``names`` takes its place."""
    name, param = item if isinstance(item, tuple) else (None, item)
    if not isinstance(param, Tensor):
        raise TypeError(f"params must be tensors, pairs of a name and a tensor, or dicts; got {param!r}")
    return names.get(param, name), param


def split_group(
    group: Group, keys: Sequence[Key], names: Mapping[Tensor, str], subject: str
) -> dict[int | None, Group]:
    """The groups that ``group`` becomes, by the position of the first key that chooses a parameter.

    Args:
        group: A param group as it is given to an optimizer, with parameters or with pairs of a name and a parameter.
        keys: The keys, in the order in which they are asked.
        names: The names of parameters that are given without one.
        subject: What has the keys, for errors.

    Returns:
        The groups in the order of the keys; what no key chooses has the position None and comes first.
    """
    chosen: dict[int | None, list[Any]] = {index: [] for index in (None, *range(len(keys)))}
    for item in _as_list(group["params"]):
        name, param = name_and_param(item, names)
        choosing = (index for index, key in enumerate(keys) if _chooses(key, name, param, subject))
        chosen[next(choosing, None)].append(item)
    return {index: {**group, "params": params} for index, params in chosen.items() if params}


def distribute(group: Group, keys: Sequence[Key], names: Mapping[Tensor, str]) -> dict[int, Group]:
    """The groups that ``group`` becomes, by the position of the inner optimizer that takes them; raise if none does."""
    split = split_group(group, keys, names, "InnerOpt")
    for item in split[None]["params"] if None in split else ():
        name, param = name_and_param(item, names)
        which = f"{'' if name is None else f'{name!r}, '}of shape {tuple(param.shape)}"
        raise ValueError(
            f"each parameter needs an inner optimizer, and none of the keys {[show(key) for key in keys]} chooses the "
            f'parameter {which}; add a key for it, or "*" as the last one, for all others'
        )
    return {index: each for index, each in split.items() if index is not None}


def override_groups(
    groups: Iterable[Group], overrides: Mapping[Any, Mapping[str, Any]] | None, names: Mapping[Tensor, str]
) -> list[Group]:
    """``groups``, in which the parameters that a key of ``overrides`` chooses have groups with values of their own."""
    keys = list(overrides or ())
    split = [split_group(group, keys, names, "groups") for group in groups]
    for index, key in enumerate(keys):
        if not any(index in each for each in split):
            warnings.warn(
                f"groups has the key {show(key)}, which chooses no parameter: none matches it, or earlier keys have "
                "chosen all that do",
                stacklevel=4,
            )
    values = list((overrides or {}).values())
    return [group if index is None else {**group, **values[index]} for each in split for index, group in each.items()]


def _chooses(key: Key, name: str | None, param: Tensor, subject: str) -> bool:
    if not isinstance(key, str):
        return bool(key(param))
    if name is None and key != "*":
        raise ValueError(
            f"{subject} has the pattern {key!r}, which needs the names of parameters; give the optimizer "
            "model.named_parameters(), or model=model"
        )
    return key == "*" or (name is not None and matches(name, key))


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)
