"""The two sides of a comparison: what makes steps, each on parameters and gradients of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from gradchain import ParamTransformingOptimizer, Transform, clip_by_global_norm

LR = 1e-3
MakeOptimizer = Callable[[Sequence[Tensor]], Optimizer]
Step = Callable[[], object]

# The fastest that torch has; the defaults on a CPU are loops in Python.
sgd: MakeOptimizer = functools.partial(SGD, lr=LR, foreach=True)
adam: MakeOptimizer = functools.partial(Adam, lr=LR, fused=True)


class Side(Protocol):
    """Something that makes steps."""

    @property
    def step(self) -> Step:
        """Make a step: what is timed. It returns when it is done, or on CUDA when it is queued."""
        ...

    def refresh(self) -> None:
        """Give the gradients the values that they had before the first step."""
        ...

    def values(self) -> list[Tensor]:
        """The parameters, and the gradients where a step writes them."""
        ...


MakeSide = Callable[[list[Tensor]], Side]
"""Makes a side from the gradients that it steps with, which it copies. Its parameters start at zero."""


class TorchSide:
    """Steps on torch parameters."""

    def __init__(self, gradients: list[Tensor], make_step: Callable[[list[Tensor]], Step]) -> None:
        self.gradients = gradients
        self.params = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient.clone()
        self.step = make_step(self.params)

    def refresh(self) -> None:
        """Copy the first gradients into the current ones."""
        torch._foreach_copy_(grads_of(self.params), self.gradients)

    def values(self) -> list[Tensor]:
        """The parameters, then the gradients."""
        return [param.detach() for param in self.params] + grads_of(self.params)


@dataclass(frozen=True)
class Ours:
    """Chains around an inner optimizer."""

    pre: Transform | None = None
    post: Transform | None = None
    param_ndim: int | None = None
    inner: MakeOptimizer = sgd
    steps: bool = True  # or only transforms gradients
    times: int = 1  # so many steps are timed as one

    def __call__(self, gradients: list[Tensor]) -> TorchSide:
        """The side with these gradients."""
        return TorchSide(gradients, self.make_step)

    def make_step(self, params: list[Tensor]) -> Step:
        """What makes a step of ``params``."""
        optimizer = self.wrap(self.inner(params))
        step: Step = optimizer.step if self.steps else optimizer._apply_pre_step_transform_
        return step if self.times == 1 else lambda: [step() for _ in range(self.times)]

    def wrap(self, inner: Optimizer) -> ParamTransformingOptimizer:
        """The chains around an instance."""
        return ParamTransformingOptimizer(InnerOpt=inner, pre=self.pre, post=self.post, param_ndim=self.param_ndim)


def muon_and_adamw(params: Sequence[Tensor]) -> list[Optimizer]:
    """Muon for matrices, without the first two, which are embeddings in GPT-2, and AdamW for the rest.

    Muon makes one step of its iteration in place of five, so that what is around it counts for more.
    """
    hidden = [param for param in params if param.ndim == 2][2:]
    known = set(map(id, hidden))
    rest = [param for param in params if id(param) not in known]
    return [Muon(hidden, lr=LR, ns_steps=1), AdamW(rest, lr=LR, fused=True)]


def as_one(gradients: list[Tensor]) -> TorchSide:
    """The side of Muon and AdamW as one optimizer, under one global norm."""

    def make_step(params: list[Tensor]) -> Step:
        inner = muon_and_adamw(params)
        return ParamTransformingOptimizer(InnerOpt=inner, pre=clip_by_global_norm(1.0)).step

    return TorchSide(gradients, make_step)


def grads_of(params: list[Tensor]) -> list[Tensor]:
    """The gradients, which all of ``params`` have."""
    return [param.grad for param in params if param.grad is not None]
