"""Which parameters the transforms of an optimizer reach, as far as it is known before the first step."""

from __future__ import annotations

import difflib
import heapq
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from gradchain._ranges import as_number
from gradchain.broadcast import Broadcast, broadcast, sub_ndim
from gradchain.chain import Chain
from gradchain.contract import Group, locate
from gradchain.engine.groups import check_group, warn_of_short
from gradchain.engine.names import Names
from gradchain.engine.states import ParamEntry, ParamTable
from gradchain.masked import Masked, Partition, matches
from gradchain.stage import Combinator, Stage

T = TypeVar("T")


def check_reach(
    chains: Mapping[str, Chain], entries: Sequence[ParamEntry], hooked: Collection[str] = (), *, are_all: bool = True
) -> None:
    """Raise where a pattern matches no name, or where ``param_ndim`` does not fit a parameter that needs it.

    A kind of ``partition`` without a parameter is only a warning, because the same kinds can serve several models.

    Args:
        chains: The chain of each slot.
        entries: Parameters of the optimizer.
        hooked: The slots that have a hook, which needs ``param_ndim`` too.
        are_all: Whether these are all parameters, and not those of a group that joins others.
    """
    reach = _Reach([entry.name for entry in entries if entry.name is not None] if are_all else [])
    for slot, stages in chains.items():
        try:
            reach.check(stages, slot, entries)
            for entry in entries if slot in hooked else ():
                _require_fit(entry)
        except Exception as error:
            locate(error, slot)
            raise
    if reach.unmatched:
        warnings.warn("; ".join(reach.unmatched), stacklevel=3)


def check_setup(
    groups: Sequence[Group],
    chains: Mapping[str, Chain],
    new: Mapping[str, Chain],
    names: Names,
    own_keys: Collection[str],
    hooked: Collection[str] = (),
) -> None:
    """Raise or warn where groups, as they are about to become, do not fit the chains.

    Args:
        groups: The groups, with all keys.
        chains: The chain of each slot.
        new: The chains, or the parts of them, that were not there before.
        names: The names of the parameters.
        own_keys: The keys of the inner optimizer.
        hooked: The slots that have a hook.
    """
    for index, group in enumerate(groups):
        check_group(index, group, chains)
    check_reach(new, ParamTable(groups, names).entries, hooked)
    for index, group in enumerate(groups):
        warn_of_short(index, group.keys() - own_keys, new)


class _Reach:
    """A walk through the stages of chains, with the parameters that each acts on."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        """The names of all parameters; empty if not all parameters are checked."""
        self.unmatched: list[str] = []

    def check(self, stage: Stage, slot: str, entries: Sequence[ParamEntry]) -> None:
        """Raise if something does not fit. What a function selects is not checked, because only a step can know it."""
        if isinstance(stage, Masked):
            if isinstance(stage.where, str):
                entries = [m for m in entries if _ask(m, stage.selects, slot)]
                if not self._is_matched(stage.where):
                    raise ValueError(
                        f"no parameter has a name that matches {stage.where!r}; {self._similar(stage.where)}. For "
                        "parameters that join the optimizer later, or that another process has, give a function of "
                        "the group in place of the pattern"
                    )
            if isinstance(stage.where, str | Tensor):
                self.check(stage.stages[0], slot, entries)
        elif isinstance(stage, Partition):
            if stage.by == "name":
                self._check_kinds(stage, slot, entries)
        elif isinstance(stage, Combinator):
            for index, each in enumerate(stage.stages):
                try:
                    self.check(each, slot, entries)
                except Exception as error:
                    locate(error, stage.place(index))
                    raise
        else:
            for entry in entries:
                _require_fit(entry, broadcast(stage))

    def _check_kinds(self, stage: Partition, slot: str, entries: Sequence[ParamEntry]) -> None:
        kinds = [_ask(entry, stage.kind, slot) for entry in entries]
        for index, (kind, each) in enumerate(zip(stage.kinds, stage.stages, strict=True)):
            if isinstance(kind, str) and not self._is_matched(kind):
                similar = self._similar(kind)
                self.unmatched.append(f"{slot}: partition has the kind {kind!r}, which no name matches; {similar}")
            self.check(each, slot, [entry for entry, at in zip(entries, kinds, strict=True) if at == index])

    def _is_matched(self, pattern: str) -> bool:
        return not self.names or any(matches(name, pattern) for name in self.names)

    def _similar(self, pattern: str) -> str:
        """Return the names that are most like a pattern, in words."""
        matcher = difflib.SequenceMatcher(b=pattern)

        def likeness(name: str) -> int:
            matcher.set_seq1(name)
            return sum(block.size**2 for block in matcher.get_matching_blocks())  # only what matches counts

        close = heapq.nlargest(3, self.names, key=likeness)
        return (
            f"there {'is' if len(close) == 1 else 'are'} {', '.join(map(repr, close))}{', ...' * (len(self.names) > 3)}"
        )


def _ask(entry: ParamEntry, which: Callable[[Group], T], slot: str) -> T:
    try:
        return which(entry.context(slot))
    except ValueError as error:
        locate(error, entry.place())
        raise


def _require_fit(entry: ParamEntry, stage: Stage | None = None) -> None:
    """Raise if ``param_ndim`` does not fit the parameter. A given ``stage`` has to need ``param_ndim``, too."""
    param_ndim = as_number(entry.group["param_ndim"])
    try:
        if isinstance(stage, Broadcast):
            stage.unit_ndim(entry.param.ndim, {**entry.group, "param_ndim": param_ndim})
        elif stage is None:
            sub_ndim(entry.param.ndim, param_ndim)
    except ValueError as error:
        locate(error, entry.place())
        raise
