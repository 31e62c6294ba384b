"""Run a stage on all tensors of a slot at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from gradchain._sharding import gather, local
from gradchain.contract import CONTEXT, PLACE, State
from gradchain.engine.operations import (
    Operation,
    Pass,
    SlotTensor,
    count,
    located,
    put,
    put_states,
    storages_of,
    without_storages,
)
from gradchain.stage import Part


class Jointly(Operation):
    """A stage that gets all tensors at once, as it is, since it measures them or looks at them."""

    def __init__(self, slot: str, part: Part, items: Sequence[SlotTensor]) -> None:
        # A state that all tensors share advances for all of them. Those that take no part are given without elements.
        numbers = [i for i in part.numbers if items[i].is_transformed or part.stage.shares_state]
        super().__init__(slot, [part._replace(numbers=numbers)], items)
        self.part = part
        self.skips = bool(part.stage.skip_keys)
        self.cannot_raise = part.stage.is_identity

    def run(self, work: Pass) -> None:
        if work.step > 1 and work.step % self.part.stage.every:
            return
        see: Callable[[Any], Any] = (lambda value: value) if self.part.stage.is_identity else gather
        tensors, groups, states = [], [], []
        for number in self.numbers:
            item = self.items[number]
            given, form = work.tensors[number], local(item.example)
            tensors.append(see(given).detach() if item.is_transformed else form.new_empty((0,) * max(form.ndim, 1)))
            keys = item.context if item.is_transformed else ()
            context = {key: see(work.context[key][number]).detach() for key in keys}
            # Masks inside the stage read the parameter in ``post``, too, and also if its tensor takes no part.
            param = tensors[-1] if item.is_transformed else item.param.detach()
            groups.append({**item.full_group(), PLACE: item.place, "param": param, **context})
            states.append({key: gather(value) for key, value in self.part.states_of(item.states).items()})
        try:
            results, new_states = self.part.stage.run(tensors, groups, states)
        except Exception as error:
            located(error, self.slot, self.part)
            raise
        olds = [self.part.states_of(self.items[number].states) for number in self.numbers]
        if self.part.stage.is_identity:
            work.commits.append(partial(_put_all, olds, new_states))
            return
        inputs = [*tensors, *(group[key] for group in groups for key in CONTEXT if key in group)]
        storages = storages_of(inputs)
        pairs = [(old, without_storages(new, storages)) for old, new in zip(olds, new_states, strict=True)]
        self.raise_if_skipped(self.part.stage, pairs)
        work.commits += [partial(put_states, old, new) for old, new in pairs]
        for number, tensor, result in zip(self.numbers, tensors, results, strict=True):
            if result is not tensor and tensor.numel():
                put(result, work.tensors[number])

    @property
    def how(self) -> str:
        return f"as it is: {'looks at' if self.part.stage.is_identity else 'measures'} all together"

    def describe(self) -> str:
        does = "looks at" if self.part.stage.is_identity else "measures"
        return f"as it is, {count(self.numbers)} together: {does} them"


def _put_all(olds: Sequence[State], news: Sequence[State]) -> None:
    """Write new states, which are plain tensors, into the tensors of the old ones."""
    pairs = [(old[key], new[key]) for old, new in zip(olds, news, strict=True) for key in new]
    torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
