"""What an adapter checks before it touches anything."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from gradchain._keys import merge_hyperparameters, number_keys
from gradchain._ranges import as_number
from gradchain._sharding import require_shards
from gradchain.broadcast import require_param_ndim
from gradchain.chain import Chain, chain
from gradchain.contract import FROM_GROUP, Group, Transform, is_same, locate, show
from gradchain.engine.combined import defaults_of_any, name_of
from gradchain.stage import Stage, require_transform

ATTACHED = "_gradchain_attached"
"""The attribute by which an optimizer knows what is attached to it."""

DEFAULTS = "_gradchain_defaults"
"""The attribute by which an inner optimizer knows which keys joined its groups."""

OF_OTHERS = {"params", "param_names", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""Keys of groups that are no hyperparameters of transforms: torch and its schedulers add them."""

OF_ANY = {"param_ndim", "grad_scale", "grad_bias"}
"""Keys that an adapter adds for all transforms, or beside them."""


def make_chains(**slots: Transform | None) -> dict[str, Chain]:
    """Return the chain of each slot."""
    chains = {slot: chain() if t is None else chain(require_transform(t, slot)) for slot, t in slots.items()}
    for slot, members in chains.items():
        if members.keeps_average and slot != "post":
            raise ValueError(f"{slot}: {show(members)} keeps an average of the parameters; it belongs in post")
    return chains


def number_chains(chains: Mapping[str, Chain], taken: Collection[str] = ()) -> dict[str, Chain]:
    """Return the chains of all slots, in which no two transforms share keys, unless a common name says so."""
    stages = number_keys(chains.values(), taken)
    return {slot: cast("Chain", stage) for slot, stage in zip(chains, stages, strict=True)}


def prefixes(stages: Iterable[Stage]) -> set[str]:
    """Return the prefixes of the keys of all hyperparameters."""
    return {key.rpartition(".")[0] for stage in stages for key in stage.hyperparameters}


def hyperparameters(chains: Mapping[str, Chain]) -> dict[str, Any]:
    """Return the hyperparameters of all slots that have a default."""
    places = ((f"{slot} {at}", t) for slot, members in chains.items() for at, t in members.places())
    return {key: value for key, value in merge_hyperparameters(places).items() if value is not FROM_GROUP}


def require_new(values: Mapping[str, Any], optimizer: Optimizer, own: Mapping[str, Any]) -> None:
    """Raise if a hyperparameter has a key of ``optimizer`` that is not among ``own``, which adapters gave it."""
    defaults = defaults_of_any(optimizer)
    for key, value in values.items():
        # Keys with a dot are ours, and so are equal values in a copy of an optimizer that has transforms attached.
        known = "." not in key and key in defaults and key not in own
        if known and not is_same(value, defaults[key]):
            raise ValueError(
                f'the key "{key}" of a hyperparameter is one of {name_of(optimizer)} already; choose another '
                "with .named, or give FROM_GROUP in place of the default, to read what the group has"
            )


def own_defaults(
    chains: Mapping[str, Chain],
    optimizer: Optimizer,
    own: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    **options: Any,
) -> dict[str, Any]:
    """Return the keys that join the groups of ``optimizer``: ``options``, hyperparameters and what is ``given``.

    Raise if one of them is a key of ``optimizer`` already, other than ``own``, which adapters gave it before.
    """
    require_new(hyperparameters(chains), optimizer, own)
    known = sorted((given or {}).keys() & (defaults_of_any(optimizer).keys() - own.keys() | {"params"}))
    if known:
        raise ValueError(
            f"defaults has the keys {known} of {name_of(optimizer)}; give them to the optimizer itself, as keyword "
            "arguments or in its param groups"
        )
    joining = {**options, **hyperparameters(chains), **(given or {})}
    return {key: as_number(value) for key, value in joining.items()}


def complete_groups(param_groups: Iterable[Group], defaults: Mapping[str, Any]) -> None:
    """Give each group the keys that it lacks, and turn numbers of other libraries into Python numbers."""
    for group in param_groups:
        for key, default in defaults.items():
            value = group.setdefault(key, default)
            if value is not default and type(value) is not float:
                group[key] = as_number(value)


def replace_defaults(group: Group, old: Mapping[str, Any], new: Mapping[str, Any]) -> Group:
    """Return a copy of ``group`` with the ``new`` defaults in place of the ``old`` ones, without keys that are gone."""
    own = {
        key: value for key, value in group.items() if key not in old or (key in new and not is_same(value, old[key]))
    }
    return {**new, **own}


def check_group(group_index: int, group: Group, chains: Mapping[str, Chain]) -> None:
    """Raise where a value in ``group`` is of the wrong type or out of range."""
    place = f"group {group_index}"
    require_known(group.keys(), chains.values(), f"{place}: ")
    try:
        if len(set(map(id, group["params"]))) < len(group["params"]):
            raise ValueError("a parameter appears twice; give it once")
        require_param_ndim(as_number(group["param_ndim"]))
        for key in ("grad_scale", "grad_bias"):
            value = group.get(key, 1.0)
            if not isinstance(value, Real | Tensor) or isinstance(value, bool):
                raise TypeError(f"{key} must be a number, got {value!r}")
        for slot, members in chains.items():
            place = f"{slot}, group {group_index}"
            members.check(group)
    except (TypeError, ValueError) as error:
        locate(error, place)
        raise
    check_support(group_index, group)


def require_known(keys: Iterable[str], stages: Collection[Stage], place: str = "") -> None:
    """Raise if one of ``keys`` has the prefix of a transform that has no such hyperparameter."""
    known = {key for stage in stages for key in stage.hyperparameters}
    taken = prefixes(stages)
    for key in keys:
        prefix, dot, _ = key.rpartition(".")
        if dot and prefix in taken and key not in known:
            raise ValueError(f'{place}"{key}" is no hyperparameter; there are {sorted(known)}')


def warn_of_short(group_index: int, keys: Iterable[str], chains: Mapping[str, Chain]) -> None:
    """Warn where one of ``keys`` is the last part of the key of just one hyperparameter, which may be meant."""
    by_last: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for members in chains.values() for key in members.hyperparameters):
        by_last.setdefault(key.rpartition(".")[2], []).append(key)
    for key in keys:
        meant = by_last.get(key, [])
        if len(meant) == 1 and meant != [key]:
            warnings.warn(
                f'group {group_index} has the key "{key}", which no transform reads; if it is meant for the '
                f'hyperparameter "{meant[0]}", set that, or give it the short key with .named({key}="{key}")',
                stacklevel=4,
            )


def check_support(group_index: int, group: Group) -> None:
    """Raise where no step of ``group`` can be right, whatever the chains are."""
    place = f"group {group_index}"
    try:
        if group.get("differentiable"):
            raise ValueError(
                "differentiable must be False, since transforms write in place and no gradient flows through them; for "
                "steps that are differentiated, call apply(transform, grads, group, param=params) in a functional loop"
            )
        for index, param in enumerate(group["params"]):
            place = describe(group_index, group, index)
            require_shards(param)
    except Exception as error:
        locate(error, place)
        raise


def warn_of_unread(param_groups: Iterable[Group], saved_groups: Iterable[Group], defaults: Mapping[str, Any]) -> None:
    """Warn if saved groups have hyperparameters that no transform has, and lack some that a transform has."""
    unread: dict[str, None] = {}
    lacking: dict[str, None] = {}
    for group, saved in zip(param_groups, saved_groups, strict=False):
        if "param_ndim" in saved:  # else the group was saved without transforms
            known = group.keys() | defaults.keys() | OF_OTHERS | OF_ANY
            unread |= dict.fromkeys(key for key in saved if key not in known and not key.startswith("initial"))
            lacking |= dict.fromkeys(sorted(defaults.keys() - saved.keys() - OF_ANY))
    if unread and lacking:
        warnings.warn(
            f"the loaded param groups have the keys {list(unread)}, which nothing reads here, and lack the keys "
            f"{list(lacking)}, which get their defaults; if these are the same hyperparameters, rename them in the "
            "state dict, or name the transform as it was when it was saved, with .named",
            stacklevel=4,
        )


def describe(group_index: int, group: Group, index: int, name: str | None = None) -> str:
    """Return, in words, which parameter is meant, with ``name`` or the name in the group, if there is one."""
    param = group["params"][index]
    name = name or (group["param_names"][index] if "param_names" in group else None)
    words = "" if name is None else f" {name!r}"
    return f"group {group_index}, parameter {index}{words} of shape {tuple(param.shape)}, {param.dtype}"
