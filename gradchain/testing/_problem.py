"""What optimizers are tried with: a problem with a minimum, and steps towards it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing import assert_close

from gradchain.engine.combined import needs_closure

Make: TypeAlias = Callable[[Any], Optimizer]
Shapes: TypeAlias = Sequence[tuple[int, ...]]


class InapplicableError(Exception):
    """A law is about something that the optimizer does not have."""


class Problem(nn.Module):
    """Parameters, and a loss that is least somewhere else. Its gradients are the same wherever they are computed."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.params = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        self.targets: Sequence[Tensor] = [torch.randn(p.shape, generator=generator).to(dtype) for p in self.params]

    def closure(self) -> Any:
        """Compute the gradients, and return the loss; not typed, since torch says that it is a float."""
        self.zero_grad()
        squares = [(p - goal).square() for p, goal in zip(self.params, self.targets, strict=True)]
        # The square alone has the same curvature everywhere, and LBFGS is there after one step.
        total = torch.stack([(square + (1 + square).sqrt()).sum() for square in squares]).sum()
        total.backward()
        return total

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def go(optimizer: Optimizer, problem: Problem, steps: int = 3) -> list[Tensor]:
    """Make steps, and return the parameters."""
    for _ in range(steps):
        if needs_closure(optimizer):
            optimizer.step(problem.closure)
        else:
            problem.closure()
            optimizer.step()
    return problem.values()


def run(make: Make, problem: Problem, steps: int = 3) -> list[Tensor]:
    """Make an optimizer of a list, and steps of it; return the parameters."""
    return go(make(list(problem.parameters())), problem, steps)


def step_with(optimizer: Optimizer) -> None:
    """Make a step with the gradients that are there."""
    optimizer.step(lambda: 0.0) if needs_closure(optimizer) else optimizer.step()


def same(actual: list[Tensor], expected: list[Tensor], message: str, *, exact: bool = False) -> None:
    """Raise ``message`` where parameters differ."""
    tolerance = 0.0 if exact else None
    assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{message}\n{text}"
    )


def finite(values: Iterable[Tensor], message: str) -> None:
    """Raise ``message`` where there is NaN or infinity."""
    assert all(value.isfinite().all() for value in values), message
