"""Laws of what a step makes of parameters and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradchain.engine.combined import needs_closure
from gradchain.testing._problem import InapplicableError, Make, Problem, Shapes, finite, go, run, same, step_with


def lowers_loss(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes)
    before = problem.closure().item()
    run(make, problem, 20)
    after = problem.closure().item()
    assert after < before, f"the loss is {after:.6g} after 20 steps, and was {before:.6g}"


def deterministic(make: Make, shapes: Shapes) -> None:
    same(run(make, Problem(shapes)), run(make, Problem(shapes)), "the same steps give other numbers", exact=True)


def in_place(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes)
    places = [p.data_ptr() for p in problem.params]
    optimizer = make(problem.parameters())
    go(optimizer, problem)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [*map(id, held)] == [*map(id, problem.params)], "the groups have other parameters than it was given"
    assert [p.data_ptr() for p in problem.params] == places, "a parameter has moved in memory"
    assert all(p.is_leaf and p.requires_grad for p in problem.params), "a parameter is no leaf that requires gradients"
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert not any(value.requires_grad for value in states), "a state requires gradients, and so keeps graphs"


def keeps_gradients(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes)
    optimizer = make(list(problem.parameters()))
    if needs_closure(optimizer):
        raise InapplicableError("its closure computes gradients within the step")
    problem.closure()
    before = [p.grad for p in problem.params]
    copies = [grad.clone() for grad in before if grad is not None]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(problem.params, before, strict=True)), "a step replaced a gradient"
    same([grad for grad in before if grad is not None], copies, "a step changed the gradients", exact=True)


def closure(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes)
    optimizer = make(list(problem.parameters()))
    losses: list[float] = []

    def evaluate() -> Any:
        assert torch.is_grad_enabled(), "the closure was evaluated without gradients"
        loss = problem.closure()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        losses.clear()
        returned: Any = optimizer.step(evaluate)
        assert losses, "step(closure) did not evaluate the closure"
        assert returned is not None, "step(closure) returned None and not the loss"
        assert float(returned.detach()) in losses, "step(closure) returned something else than the loss"
    if not needs_closure(optimizer):
        same(problem.values(), run(make, Problem(shapes)), "step(closure) is another step than backward() and step()")


def no_gradients(make: Make, shapes: Shapes) -> None:
    problem = Problem([shapes[0], *shapes])
    optimizer = make(list(problem.parameters()))
    before = problem.values()
    step_with(optimizer)
    same(problem.values(), before, "a step without any gradient changed parameters", exact=True)
    problem.params[0].requires_grad_(False)
    go(optimizer, problem)
    same(problem.values()[:1], before[:1], "a parameter without a gradient has changed", exact=True)
    assert not torch.equal(problem.params[1], before[1]), "beside a parameter without a gradient, others stand still"


def zero_gradients(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes)
    optimizer = make(list(problem.parameters()))
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        step_with(optimizer)
        finite(problem.params, "zero gradients give parameters that are not finite")
    finite(go(optimizer, problem), "the steps after zero gradients give parameters that are not finite")


def zero_grad(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes)
    optimizer = make(list(problem.parameters()))
    problem.closure()
    optimizer.zero_grad(set_to_none=False)
    grads = [p.grad for p in problem.params]
    assert all(grad is not None and not grad.any() for grad in grads), "zero_grad(set_to_none=False) leaves no zeros"
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.params), "zero_grad() leaves gradients that are not None"


def any_shape(make: Make, shapes: Shapes) -> None:
    finite(run(make, Problem([(), (0,), (3,), (2, 3, 2, 2)])), "a parameter is not finite")


def any_layout(make: Make, shapes: Shapes) -> None:
    matrices = [shape for shape in shapes if len(shape) > 1]
    if not matrices:
        raise InapplicableError("its parameters have one dimension")
    problem = Problem(matrices)
    for p in problem.params:
        p.data = p.data.transpose(0, -1).contiguous().transpose(0, -1)
    same(run(make, problem), run(make, Problem(matrices)), "transposed parameters get other numbers")


def half_precision(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes, torch.bfloat16)
    finite(run(make, problem), "a bfloat16 parameter is not finite")
    assert all(p.dtype == torch.bfloat16 for p in problem.params), "a bfloat16 parameter has another dtype"


def groups(make: Make, shapes: Shapes) -> None:
    one, two, late = (Problem([*shapes, *shapes]) for _ in range(3))
    first, second = two.params[: len(shapes)], two.params[len(shapes) :]
    found = go(make([{"params": list(first)}, {"params": list(second)}]), two)
    same(found, run(make, one), "two groups give other numbers than one")
    optimizer = make(list(late.params[: len(shapes)]))
    before = go(optimizer, late)
    optimizer.add_param_group({"params": list(late.params[len(shapes) :])})
    after = go(optimizer, late)
    stand_still = any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not stand_still, "after add_param_group, a parameter stands still"


def named_parameters(make: Make, shapes: Shapes) -> None:
    named, plain = Problem(shapes), Problem(shapes)
    optimizer = make(named.named_parameters())
    same(go(optimizer, named), run(make, plain), "named parameters get other numbers", exact=True)
    groups = optimizer.state_dict()["param_groups"]
    assert all("param_names" in group for group in groups), "the state dict lacks the names of the parameters"


def foreach(make: Make, shapes: Shapes) -> None:
    found = []
    for choice in (False, True):
        problem = Problem(shapes)
        optimizer = make(list(problem.parameters()))
        if not all("foreach" in group for group in optimizer.param_groups):
            raise InapplicableError("its groups have no foreach")
        for group in optimizer.param_groups:
            group["foreach"] = choice
        found.append(go(optimizer, problem))
    same(found[1], found[0], "foreach=True gives other numbers than foreach=False")
