"""Checkpoints by the names of parameters, which survive another order of parameters and other groups."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice, permutations
from typing import Any

from gradchain.contract import Group, is_same
from gradchain.engine.states import KEY, ParamEntry


def add_names(state_dict: Group, entries: Sequence[ParamEntry]) -> None:
    """Put the names of the parameters into the groups of a state dict, if all have one."""
    names = iter([entry.name for entry in entries])
    if all(entry.name is not None for entry in entries):
        for group in state_dict["param_groups"]:
            group["param_names"] = list(islice(names, len(group["params"])))


def arrange_by_name(state_dict: Group, param_groups: Sequence[Group], entries: Sequence[ParamEntry]) -> Group:
    """A state dict as an optimizer with these groups would have saved it.

    Parameters are found by name where both know names. Where none of the saved names is known here, as when a wrapper
    has changed all of them, parameters are taken in their order, as torch takes them.
    """
    saved = [dict(group) for group in state_dict["param_groups"]]
    by_name = {name: (group, key) for group in saved for name, key in _named_keys(group)}
    names = [entry.name for entry in entries]
    state = state_dict["state"]
    if sum(len(group["params"]) for group in saved) == len(by_name) and not by_name.keys().isdisjoint(names):
        if by_name.keys() != set(names):
            missing, unknown = ([n for n in a if n not in b] for a, b in ((names, by_name), (by_name, names)))
            raise ValueError(
                "the loaded state dict must have the parameters of the optimizer; it "
                + " and ".join(
                    f"{verb} {which[:3]}{' and more' * (len(which) > 3)}"
                    for verb, which in (("lacks", missing), ("has other ones,", unknown))
                    if which
                )
            )
        arrangement = [[entry.name for entry in entries if entry.group is group] for group in param_groups]
        if arrangement != [group["param_names"] for group in saved]:
            moved = _keys_of_other_kinds(entries, by_name)
            state = {key: _without_own(value) if key in moved else value for key, value in state.items()}
            saved = [
                _regrouped(index, group, [by_name[name] for name in own if name is not None], moved)
                for index, (group, own) in enumerate(zip(param_groups, arrangement, strict=True))
            ]
    for group, saved_group in zip(param_groups, saved, strict=False):
        saved_group.pop("param_names", None)
        if "param_names" in group:
            saved_group["param_names"] = group["param_names"]
    return {**state_dict, "state": state, "param_groups": saved}


def _named_keys(group: Group) -> list[tuple[str, Any]]:
    names = group.get("param_names", ())
    return list(zip(names, group["params"], strict=True)) if len(names) == len(group["params"]) else []


def _keys_of_other_kinds(entries: Sequence[ParamEntry], by_name: dict[Any, tuple[Group, Any]]) -> set[Any]:
    """The keys of the parameters that another kind of optimizer has saved, whose groups have other keys."""
    moved = {}
    for entry in entries:
        source, key = by_name[entry.name]
        lacking, unknown = (a.keys() - b.keys() - {"param_names"} for a, b in permutations((entry.group, source)))
        if lacking and unknown:
            moved[key] = entry.name
    if moved:
        warnings.warn(
            f"another kind of optimizer has saved the parameters {list(moved.values())}, so that this one starts anew "
            "with them; the states of their transforms are loaded",
            stacklevel=4,
        )
    return set(moved)


def _regrouped(index: int, group: Group, sources: Sequence[tuple[Group, Any]], moved: set[Any]) -> Group:
    """The group that would have been saved: with the values that its parameters had, where they had the same."""
    values = {key: value for key, value in group.items() if key != "params"}
    saved = [source for source, key in sources if key not in moved]
    differing = []
    for key in [key for key in saved[0] if key not in ("params", "param_names")] if saved else ():
        if all(key in each and is_same(each[key], saved[0][key]) for each in saved):
            values[key] = saved[0][key]
        else:
            differing.append(key)
    if differing:
        warnings.warn(
            f"group {index} has parameters that were saved with different values of {differing}, and keeps its own",
            stacklevel=4,
        )
    return {**values, "params": [key for _, key in sources]}


def _without_own(state: Any) -> Any:
    """The states of transforms alone."""
    return {key: value for key, value in state.items() if key == KEY} if isinstance(state, dict) else state
