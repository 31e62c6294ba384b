"""Laws of what is around an optimizer: schedulers, hooks, checkpoints, copies, scalers and shards."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gradchain._sharding import SHARDS_SINCE
from gradchain.engine.combined import needs_closure
from gradchain.testing._problem import InapplicableError, Make, Problem, Shapes, go, run, same


def schedulers(make: Make, shapes: Shapes) -> None:
    def follow(schedule: Callable[[Optimizer], Callable[[], None]]) -> list[Tensor]:
        """Follow a goal that moves, so that no optimizer is there before the end."""
        problem = Problem(shapes)
        optimizer = make(list(problem.parameters()))
        advance = schedule(optimizer)
        for _ in range(4):
            go(optimizer, problem, 1)
            problem.targets = [goal + 1 for goal in problem.targets]
            advance()
        return problem.values()

    def by_hand(optimizer: Optimizer) -> Callable[[], None]:
        def advance() -> None:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 0.5

        return advance

    expected = follow(by_hand)
    found = follow(lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step).step)
    same(found, expected, 'a scheduler gives other numbers than group["lr"] set by hand')
    constant = follow(lambda optimizer: lambda: None)
    equal = all(torch.equal(a, b) for a, b in zip(constant, expected, strict=True))
    assert not equal, 'after the first step, another value of group["lr"] changes nothing'


def hooks(make: Make, shapes: Shapes) -> None:
    problem = Problem(shapes)
    optimizer = make(list(problem.parameters()))
    calls: list[str] = []

    def counter(name: str) -> Callable[..., None]:
        return lambda *_args: calls.append(name)

    optimizer.register_step_pre_hook(counter("step pre-hook"))
    optimizer.register_step_post_hook(counter("step post-hook"))
    optimizer.register_state_dict_post_hook(counter("state_dict post-hook"))
    optimizer.register_load_state_dict_post_hook(counter("load_state_dict post-hook"))
    go(optimizer, problem, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    expected = ["step pre-hook", "step post-hook", "state_dict post-hook", "load_state_dict post-hook"]
    assert calls == expected, f"a step, a save and a load ran the hooks {calls}"


def goes_on(make: Make, shapes: Shapes, carry: Callable[[Any], Any]) -> None:
    whole, first, second = Problem(shapes), Problem(shapes), Problem(shapes)
    expected = run(make, whole, 6)
    optimizer = make(list(first.parameters()))
    go(optimizer, first)
    second.load_state_dict(first.state_dict())
    other = make(list(second.parameters()))
    other.load_state_dict(carry(optimizer.state_dict()))
    same(go(other, second), expected, "after loading, the steps go on with other numbers", exact=True)


def state_dict(make: Make, shapes: Shapes) -> None:
    goes_on(make, shapes, copy.deepcopy)


def torch_save(make: Make, shapes: Shapes) -> None:
    def carry(state_dict: Any) -> Any:
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        return torch.load(file)

    goes_on(make, shapes, carry)


def _copies(make: Make, shapes: Shapes, copied: Callable[[Any], Any]) -> None:
    problem = Problem(shapes)
    optimizer = make(list(problem.parameters()))
    go(optimizer, problem)
    other_problem, other = copied((problem, optimizer))
    expected = go(optimizer, problem)
    same(go(other, other_problem), expected, "a copy goes on with other numbers", exact=True)


def pickles(make: Make, shapes: Shapes) -> None:
    _copies(make, shapes, lambda pair: pickle.loads(pickle.dumps(pair)))


def deepcopies(make: Make, shapes: Shapes) -> None:
    _copies(make, shapes, copy.deepcopy)


def grad_scaler(make: Make, shapes: Shapes) -> None:
    problem, plain = Problem(shapes), Problem(shapes)
    optimizer = make(list(problem.parameters()))
    if needs_closure(optimizer):
        raise InapplicableError("a GradScaler passes no closure")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for factor in (1024.0, 1024.0, torch.inf, 512.0):
        before = problem.values()
        problem.closure()
        for p in problem.params:
            assert p.grad is not None
            p.grad.mul_(factor)
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            same(problem.values(), before, "an overflow changed parameters", exact=True)
    same(problem.values(), run(make, plain), "a GradScaler gives other numbers")


def distributed_state(make: Make, shapes: Shapes) -> None:
    if not torch.distributed.is_available():
        raise InapplicableError("torch has no distributed package")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    whole, first, second = Problem(shapes), Problem(shapes), Problem(shapes)
    expected = run(make, whole, 6)
    optimizer, other = make(list(first.parameters())), make(list(second.parameters()))
    if needs_closure(optimizer):
        raise InapplicableError("torch.distributed.checkpoint passes no closure")
    go(optimizer, first)
    second.load_state_dict(first.state_dict())
    state = copy.deepcopy(get_optimizer_state_dict(first, optimizer))
    before = second.values()
    set_optimizer_state_dict(second, other, state)
    same(second.values(), before, "setting the state changed parameters", exact=True)
    same(go(other, second), expected, "with the state set, the steps go on with other numbers", exact=True)


@contextmanager
def _mesh_of_one() -> Iterator[Any]:
    """A mesh of this process alone."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        raise InapplicableError("a process group of several processes is there already")
    ours, hook = not distributed.is_initialized(), sys.excepthook
    if ours:
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        if ours:
            distributed.destroy_process_group()
            sys.excepthook = hook  # torch puts the rank before every traceback, and leaves it there


def dtensor(make: Make, shapes: Shapes) -> None:
    if not torch.distributed.is_available():
        raise InapplicableError("torch has no distributed package")
    if torch.__version__ < SHARDS_SINCE:
        raise InapplicableError(f"before torch {SHARDS_SINCE}, DTensor computes wrong numbers")
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    expected, problem = run(make, Problem(shapes)), Problem(shapes)
    with _mesh_of_one() as mesh:
        sharded = [distribute_tensor(p.detach(), mesh, [Shard(0)]) for p in problem.params]
        problem.params = nn.ParameterList(sharded)
        problem.targets = [distribute_tensor(goal, mesh, [Shard(0)]) for goal in problem.targets]
        run(make, problem)
        assert all(isinstance(p.data, DTensor) for p in problem.params), "a sharded parameter is sharded no more"
        found = [p.data.full_tensor() for p in problem.params if isinstance(p.data, DTensor)]
    same(found, expected, "sharded parameters get other numbers than whole ones")
