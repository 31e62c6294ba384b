"""Runs a case through the adapters of the library, and compares them with the loops."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, tensor

import gradchain as gc
from gradchain import Group
from tests.differential.case import (
    ADAPTERS,
    ARMED,
    DTYPES,
    LIBRARY,
    SLOTS,
    Case,
    Failure,
    Mismatch,
    ParamGroup,
    Step,
    make_inner,
)
from tests.differential.loops import Loops, Tensors


def lay_out(value: Tensor, layout: str) -> Tensor:
    """The same values in memory of another layout, where the shape has it."""
    if layout == "channels_last" and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and value.ndim >= 2:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([value, value], -1)[..., 0]
    if layout == "negated":
        return torch._neg_view(-value)
    if layout == "expanded" and value.ndim and value.numel():
        return value[:1].expand_as(value)
    return value.clone()


class Run:
    """Makes the steps of a case by an adapter of the library."""

    def __init__(self, case: Case, adapter: str) -> None:
        self.case = case
        self.adapter = adapter
        self.params: Tensors = {}
        self.joined = 0
        self.optimizer: Any = None
        self.attached: Any = None
        self.failed = False

    def make(self) -> None:
        """Make the optimizer, of the groups that have joined."""
        groups = [self.group(spec) for spec in self.case.groups[: self.joined]]
        if self.adapter == "attach":
            self.optimizer = make_inner(self.case)(groups)
        else:
            name, options = eval(self.case.inner)
            inner = getattr(torch.optim, name)
            self.optimizer = gc.ParamTransformingOptimizer(groups, inner, **self.chains(), **options)
        self.trigger()

    def trigger(self) -> None:
        """Do what the adapter needs to act on the optimizer as it is now."""
        if self.adapter == "attach":
            self.attached = gc.attach(self.optimizer, **self.chains())
        elif self.adapter == "backward":
            gc.step_in_backward(self.optimizer)

    def chains(self) -> dict[str, Any]:
        return {slot: eval(getattr(self.case, slot), LIBRARY) for slot in SLOTS}

    def group(self, spec: ParamGroup) -> Group:
        params = [(p.name, self.params[p.name]) if self.case.named else self.params[p.name] for p in spec.params]
        return {"params": params, **copy.deepcopy(spec.options)}

    def join(self, number: int) -> None:
        for spec in self.case.groups[self.joined :]:
            if spec.joins <= number:
                for param in spec.params:
                    value = lay_out(self.case.value(param.name), param.layout)
                    self.params[param.name] = torch.nn.Parameter(value)
                self.joined += 1
                if number > 0:
                    self.optimizer.add_param_group(self.group(spec))
        if number == 0:
            self.make()
        elif self.adapter == "backward":
            self.trigger()

    def step(self, number: int) -> None:
        step = self.case.steps[number]
        for param in self.params.values():
            param.grad = None
        self.happen(step.event)
        self.join(number)
        for index, key, value in step.changes:
            self.optimizer.param_groups[index][key] = value
        self.failed = False
        before = copy.deepcopy(self.optimizer.state_dict()) if step.fails or step.wrong else None
        values = {name: param.detach().clone() for name, param in self.params.items()}
        if step.wrong and self.adapter != "backward":
            self.try_with_a_wrong_value(number, step, before, values)
        try:
            with armed(list(self.params).index(step.fails) if step.fails else None):
                self.trigger_step(number, step)
        except Exception as error:
            self.failed = True
            if isinstance(error, RuntimeError) and "were skipped, more than allowed" in str(error):
                return
            if not isinstance(error, Failure):
                raise
            self.require_unmoved(step, before, values)
            if self.adapter != "backward":
                self.optimizer.load_state_dict(
                    copy.deepcopy(before)
                )  # of the inner optimizer, which may have made its step

    def try_with_a_wrong_value(self, number: int, step: Step, before: Any, values: Tensors) -> None:
        """Make a step that raises if any transform reads the value, and take it back."""
        assert step.wrong is not None
        index, key = step.wrong
        group = self.optimizer.param_groups[index]
        kept, group[key] = group[key], "wrong"
        try:
            self.trigger_step(number, step)
        except (TypeError, RuntimeError) as error:
            if key not in str(error) and "were skipped, more than allowed" not in str(error):
                raise
            self.require_unmoved(step, before, values)
        group[key] = kept
        with torch.no_grad():
            for name, value in values.items():
                self.params[name].copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(before))

    def trigger_step(self, number: int, step: Step) -> None:
        grads = {
            name: lay_out(self.case.value(name, number), layout)
            for name, layout in step.grads.items()
            if name in self.params
        }
        if self.adapter == "backward":
            terms = [(self.params[name] * grad).sum() for name, grad in grads.items()]
            if terms:
                torch.stack([term.double() for term in terms]).sum().backward()
            return

        def closure() -> Tensor:
            for name, param in self.params.items():
                param.grad = grads.get(name)
            return tensor(0.0)

        if step.closure:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def happen(self, event: str) -> None:
        if event == "save":
            file = io.BytesIO()
            torch.save(self.optimizer.state_dict(), file)
            file.seek(0)
            self.make()
            self.optimizer.load_state_dict(torch.load(file))
        elif event in ("copy", "pickle"):
            state_dict = copy.deepcopy(self.optimizer.state_dict())
            both = (self.params, self.optimizer)
            self.params, self.optimizer = (
                copy.deepcopy(both) if event == "copy" or self.adapter == "attach" else pickle.loads(pickle.dumps(both))
            )
            self.trigger()
            if self.adapter == "attach":
                self.optimizer.load_state_dict(state_dict)
        elif event == "swap" and self.case.keeps_inner_state():
            for group in self.optimizer.param_groups:
                for index, old in enumerate(group["params"]):
                    name = next(name for name, param in self.params.items() if param is old)
                    new = group["params"][index] = self.params[name] = torch.nn.Parameter(old.detach().clone())
                    if old in self.optimizer.state:
                        self.optimizer.state[new] = self.optimizer.state.pop(old)
            if self.adapter == "backward":
                self.trigger()
        elif event in DTYPES:
            for param in self.params.values():
                param.data = param.data.to(getattr(torch, event))
            state_dict = self.optimizer.state_dict()
            self.make()
            self.optimizer.load_state_dict(state_dict)
        elif event == "layout":
            for param in self.params.values():
                param.data = lay_out(param.data, "contiguous" if not param.is_contiguous() else "transposed")

    def require_unmoved(self, step: Step, before: Any, values: Tensors) -> None:
        """A step that failed has left parameters and states as they were; in the backward pass, those that failed."""
        names = [step.fails] if self.adapter == "backward" else list(values)
        for name in names:
            if not same(self.params[name], values[name]):
                raise Mismatch(f"the parameter {name} has moved in a step that failed")
        after = self.optimizer.state_dict()["state"]
        numbers = {name: number for number, name in enumerate(self.params)}
        for name in names:
            old, new = (states.get(numbers[name], {}).get("transforms", {}) for states in (before["state"], after))
            require_kept(old, new, name)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, 12345), torch.nan_to_num(b, 12345))


def require_kept(old: Any, new: Any, place: str) -> None:
    if isinstance(old, dict):
        for key, value in old.items():
            require_kept(value, new[key], f"{place}.{key}")
    elif not same(old.to(new.dtype), new):  # states take the dtype that their parameter has got
        raise Mismatch(f"the state {place} has moved in a step that failed")


TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def check(case: Case, *adapters: str) -> bool:
    """Compare adapters, or all, with the loops after every step.

    Returns:
        Whether the case says something: False where rounding alone leads the loops as far astray.

    Raises:
        Mismatch: They differ.
    """
    if not case.is_local():
        adapters = tuple(adapter for adapter in adapters or ADAPTERS if adapter != "backward")
    results: dict[bool, list[Result]] = {}
    says_something = True
    for adapter in adapters or ADAPTERS:
        alone = adapter == "backward"
        if alone not in results:
            results[alone] = play(case, alone=alone)
        says_something &= _check(case, adapter, results[alone])
    return says_something


@dataclass
class Result:
    """What a step must leave."""

    values: Tensors
    """Parameters and, as ``"grad of ..."``, gradients where they are known."""
    failed: bool
    averages: Tensors


def play(case: Case, *, alone: bool = False, jitter: float = 0.0, seed: int = 0) -> list[Result]:
    """The steps of a case, by the loops."""
    loops, results = Loops(case, alone=alone, jitter=jitter, seed=seed), []
    for number, step in enumerate(case.steps):
        with armed(list(case.params()).index(step.fails) if step.fails else None):
            loops.step(number)
        values = {name: param.detach().clone() for name, param in loops.params.items()}
        if not (alone or loops.failed or loops.skipped):
            grads = {name: param.grad for name, param in loops.params.items()}
            values |= {f"grad of {name}": grad for name, grad in grads.items() if grad is not None}
        results.append(Result(values, loops.failed, loops.averages()))
    return results


@contextmanager
def armed(index: int | None) -> Iterator[None]:
    """Let ``may_fail`` raise at a parameter."""
    ARMED[:] = [] if index is None else [index]
    try:
        yield
    finally:
        ARMED.clear()


def _check(case: Case, adapter: str, results: list[Result]) -> bool:
    dtypes = {param.dtype for param in case.params().values()} | {step.event for step in case.steps}
    tolerance = max(TOLERANCES[dtype] for dtype in dtypes if dtype in DTYPES)
    run = Run(case, adapter)

    def differs(number: int, expected: Tensors, kind: str = "") -> str:
        """The first value that differs, in words; empty if none does, and ``"?"`` if rounding can be the reason."""
        for key, value in expected.items():
            param = run.params[key.rpartition(" ")[2]]
            actual = param.grad if key.startswith("grad of ") else param.detach()
            difference = _difference(actual, value)
            if difference > tolerance:
                first = replace(case, steps=case.steps[: number + 1])
                for seed in range(3):
                    shaken = play(first, alone=adapter == "backward", jitter=tolerance / 100, seed=seed)[-1]
                    other = (shaken.averages if kind else shaken.values).get(key)
                    if 10 * _difference(other, value) > difference:
                        return "?"
                return f"{adapter}, step {number}: {kind}{key} is {actual}, expected {value}"
        return ""

    for number, result in enumerate(results):
        try:
            run.step(number)
        except Exception as error:
            error.args = (f"{adapter}, step {number}: {error}",)
            raise
        if run.failed != result.failed:
            raise Mismatch(f"{adapter}, step {number}: failed {run.failed}, expected {result.failed}")
        if run.failed and adapter == "backward":
            return True  # which of the others have made their step depends on the order of the backward pass
        problem = differs(number, result.values)
        if not problem and number == len(results) - 1 and len(re.findall(r"param_ema\(|lookahead\(", case.post)) == 1:
            with (run.attached or run.optimizer).averaged():
                problem = differs(number, result.averages, "the average of ")
        if problem == "?":
            return False
        if problem:
            raise Mismatch(problem)
    return True


def _difference(actual: Tensor | None, expected: Tensor) -> float:
    """The largest difference, in units of the largest entry, or of one."""
    if actual is None or actual.shape != expected.shape or actual.dtype != expected.dtype:
        return inf
    if not expected.numel():
        return 0.0
    a, b = actual.detach().double(), expected.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0, (a - b).abs().nan_to_num(inf, inf))
    return float(difference.amax() / b.nan_to_num(0, 0, 0).abs().amax().clamp_min(1))
