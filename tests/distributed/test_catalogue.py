"""Every transform of the catalogue gives on shards what it gives in one process."""

import inspect
import itertools
from abc import ABCMeta
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, tensor

import gradchain as gc
from gradchain.bound import BoundTransform
from gradchain.contract import Group
from gradchain.stage import Stage
from tests.cases import CASES
from tests.distributed.common import BATCHES, Parameters, my_batches, sharded, step_gradients, train
from tests.distributed.processes import Processes, join, parts

STEPS = 3
SLOTS = ("pre", "update", "post")


def is_first(group: Group) -> bool:
    return bool(group["index"] == 0)


def halve(tensor: Tensor, group: Group) -> Tensor:
    return tensor / 2


COMBINED: dict[str, list[Stage]] = {
    "broadcast": [gc.broadcast(gc.normalize(), 1), gc.broadcast(halve)],
    "chain": [gc.chain(gc.ema(0.9), gc.skip_large(100.0), gc.clip_by_norm(0.5), gc.clip_by_global_norm(1.0))],
    "freeze": [gc.freeze("1"), gc.freeze(tensor([True, False, True]))],
    "masked": [gc.masked(gc.normalize(), is_first), gc.masked(gc.ema(0.9), tensor([True, False, False]))],
    "monitor": [gc.monitor("all"), gc.masked(gc.monitor(), is_first)],
    "partition": [gc.partition({"0": gc.keep_top_q(0.5), "*": gc.ema(0.9)})],
    "with_error_feedback": [gc.with_error_feedback(gc.chain(gc.keep_top_q(0.25), gc.clip_by_history(50.0)))],
}
ROWS: list[Stage] = [*(case.transform for case in CASES), *(t for rows in COMBINED.values() for t in rows)]


def makes_transforms(name: str) -> bool:
    factory = getattr(gc, name)
    if not inspect.isfunction(factory) or hasattr(factory, "definition"):
        return hasattr(factory, "definition")
    made = get_type_hints(factory).get("return")
    return isinstance(made, ABCMeta) and issubclass(made, Stage)


def test_all_that_is_exported_is_tested() -> None:
    tested = {row.definition.name for row in ROWS if isinstance(row, BoundTransform)} | COMBINED.keys()
    assert {name for name in gc.__all__ if makes_transforms(name)} == tested


def train_all(params: list[Tensor], grads: list[list[Tensor]], trainings: list[dict[str, Any]]) -> list[Any]:
    results = []
    for options in trainings:
        count = options["count"]
        steps = [step[:count] for step in grads[: options["steps"]]]
        chains = {key: value for key, value in options.items() if key not in ("count", "steps")}
        results.append(parts(train(params[:count], steps, **chains)))
    return results


def train_all_sharded(trainings: list[dict[str, Any]]) -> list[Any]:
    module = sharded()
    grads = step_gradients(module, STEPS, my_batches())
    return train_all(list(module.parameters()), grads, trainings)


@lru_cache
def trainings() -> list[dict[str, Any]]:
    """Each transform in all slots that it is for, on rows and on the whole; the last parameter does not fit all."""
    module = Parameters()
    params, (grads,) = list(module.parameters()), step_gradients(module, 1, [0])
    found = []
    for row in ROWS:
        definition = row.definition if isinstance(row, BoundTransform) else None
        depends = definition is None or definition.acts_on == "unit"
        for param_ndim in (-1, None) if depends else (-1,):
            for count in (3, 2):
                chains = {}
                for slot in SLOTS:
                    with suppress(ValueError, RuntimeError):
                        train(params[:count], [grads[:count]], **{slot: row}, param_ndim=param_ndim)
                        chains[slot] = row
                if chains:
                    break
            assert chains, row
            found.append({"count": count, "steps": STEPS if row.stateful else 1, "param_ndim": param_ndim, **chains})
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_sharded(processes: Processes, size: int) -> None:
    module = Parameters()
    grads = step_gradients(module, STEPS, range(BATCHES))
    expected = train_all(list(module.parameters()), grads, trainings())
    chunks = [trainings()[start : start + 40] for start in range(0, len(trainings()), 40)]  # each in limited time
    runs = [processes.run(size, train_all_sharded, chunk) for chunk in chunks]
    results = [list(itertools.chain(*each)) for each in zip(*runs, strict=True)]
    for options, wanted, *actual in zip(trainings(), expected, *results, strict=True):
        torch.testing.assert_close(
            join(actual), join([wanted]), rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, options)
        )
