"""What a case of the differential test consists of, and the vocabulary of its chains."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

import torch
from torch import Tensor, tensor
from torch.optim import Optimizer

import gradchain as gc
from gradchain import Group, State, transform

ADAPTERS = ("optimizer", "attach", "backward")
SLOTS = ("pre", "update", "post")
EVENTS = ("save", "copy", "pickle", "layout", "swap")
DTYPES = ("float64", "float32", "bfloat16", "float16")


class Call:
    """A dataclass whose repr is the call that makes it, without the defaults."""

    def __repr__(self) -> str:
        values = [(each, getattr(self, each.name)) for each in fields(self)]  # type: ignore[arg-type]
        given = [f"{each.name}={value!r}" for each, value in values if value not in (each.default, [])]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Param(Call):
    """A parameter: its values are drawn from its name and the seed of the case."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float64"
    layout: str = "contiguous"


@dataclass(frozen=True, repr=False)
class ParamGroup(Call):
    """A param group, with its keys, that joins the optimizer before the step ``joins``."""

    params: list[Param]
    options: dict[str, Any]
    joins: int = 0


@dataclass(frozen=True, repr=False)
class Step(Call):
    """A step: the layouts of the gradients of the parameters that have one, and what happens before it."""

    grads: dict[str, str]
    event: str = ""
    """One of ``EVENTS``, the name of a dtype that all parameters take from then on, or nothing."""
    changes: list[tuple[int, str, Any]] = field(default_factory=list)
    """Values for keys of groups, by the number of the group."""
    closure: bool = False
    nan: str = ""
    """The parameter whose gradient has a NaN."""
    fails: str = ""
    """The parameter at which ``may_fail`` raises."""
    wrong: tuple[int, str] | None = None
    """The number of a group and a key that has a wrong value in a step that is tried before."""


@dataclass(frozen=True, repr=False)
class Case(Call):
    """An optimizer and its steps. Chains are Python expressions, which the library and the loops read each its way."""

    seed: int
    pre: str
    update: str
    post: str
    inner: str
    groups: list[ParamGroup]
    steps: list[Step]
    named: bool = True

    def params(self) -> dict[str, Param]:
        return {param.name: param for group in self.groups for param in group.params}

    def is_local(self) -> bool:
        """Whether each tensor is transformed by itself, as ``step_in_backward`` needs it."""
        return not any(re.search(rf"\b{name}\(", self.pre + self.update + self.post) for name in MEASURES)

    def keeps_inner_state(self) -> bool:
        """Whether the inner optimizer gets a state for each parameter in its step, beside those of transforms."""
        # Adagrad has its own from the start, where there are none of transforms yet.
        return "Adagrad" not in self.inner and ("SGD" not in self.inner or "momentum" in self.inner)

    def dtypes(self, step: int) -> str:
        """The dtype that all parameters have in a step, if they have been given one."""
        return next((step.event for step in self.steps[step::-1] if step.event in DTYPES), "")

    def value(self, name: str, step: int = -1) -> Tensor:
        """The first value of a parameter, or its gradient in a step."""
        param = self.params()[name]
        at = step if step >= 0 else next(group.joins for group in self.groups if param in group.params)
        generator = torch.Generator().manual_seed(hash_of(self.seed, name, step))
        value = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        value = value.to(getattr(torch, self.dtypes(at) or param.dtype))
        if step >= 0 and self.steps[step].nan == name:
            value.view(-1)[:1] = float("nan")
        if step >= 0 and self.steps[step].grads[name] == "expanded" and param.shape:
            value = value[:1].expand_as(value).contiguous()
        return value


class Mismatch(AssertionError):  # noqa: N818 # it says what it is
    """An adapter and the loops differ."""


# What chains are made of, beside the catalogue


def soft_sign(tensor: Tensor, group: Group) -> Tensor:
    return tensor / (tensor.abs() + 1)


def subtract_mean(tensor: Tensor, group: Group) -> Tensor:
    return tensor - 0.5 * tensor.mean()


def reverse(tensor: Tensor, group: Group) -> Tensor:
    return tensor.flatten().flip(0).reshape(tensor.shape)


def identity(tensor: Tensor, group: Group) -> Tensor:
    return tensor


def by_lr(tensor: Tensor, group: Group) -> Tensor:
    return tensor.mul(0.5 + group["lr"])


def towards_param(tensor: Tensor, group: Group) -> Tensor:
    param: Tensor = group["param"]
    return tensor - 0.1 * param * param.abs().amax()


def along_grad(tensor: Tensor, group: Group) -> Tensor:
    return tensor + 0.1 * soft_sign(group["grad"], group) if "grad" in group else tensor


class Failure(Exception):  # noqa: N818
    """What ``may_fail`` raises."""


ARMED: list[int] = []
"""The number of the parameter at which ``may_fail`` raises."""


def may_fail(tensor: Tensor, group: Group) -> Tensor:
    if group["index"] in ARMED:
        raise Failure
    return 0.9 * tensor


def _no_past(tensor: Tensor, group: Group, **_: Any) -> State:
    return {"sum": torch.zeros_like(tensor), "largest": tensor.new_zeros(())}


@transform(init=_no_past)
def remember(tensor: Tensor, group: Group, state: State, decay: float) -> tuple[Tensor, State]:
    """A state of two levels, whose entries have two shapes."""
    total = decay * state["sum"] + tensor
    largest = torch.maximum(state["largest"], tensor.abs().amax())
    return total / (1 + largest), {"sum": total, "largest": largest}


def is_matrix(group: Group) -> bool:
    return len(group["shape"]) >= 2


def is_even(group: Group) -> bool:
    return bool(group["index"] % 2 == 0)


def is_x(group: Group) -> bool:
    return bool(group["kind"] == "x")


OWN = {
    function.__name__: function
    for function in (
        *(soft_sign, subtract_mean, reverse, identity, by_lr, towards_param, along_grad, may_fail),
        *(remember, is_matrix, is_even, is_x),
    )
}
LIBRARY = {**{name: getattr(gc, name) for name in gc.__all__}, **OWN, "tensor": tensor, "inf": inf}
MEASURES = (
    *("clip_by_global_norm", "normalize_by_global_norm", "clip_by_history", "clip_by_zscore"),
    *("skip_nonfinite", "skip_large"),
)
WHOLE = ("centralize", "cautious", "trust_ratio", "scale_by_param_norm", "scale_by_param_rms", "reject_from_param")
DRAWS = ("add_noise", "dropout")


def hash_of(*values: object) -> int:
    return random.Random(repr(values)).getrandbits(32)


def make_inner(case: Case) -> Callable[[Any], Optimizer]:
    name, options = eval(case.inner)
    return lambda groups: getattr(torch.optim, name)(groups, **options)
