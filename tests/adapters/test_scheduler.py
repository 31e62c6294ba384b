"""``schedule``: torch's schedulers drive any hyperparameter as they drive the learning rate."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from gradchain import ParamTransformingOptimizer, clip_by_norm, scale, schedule


def make() -> ParamTransformingOptimizer:
    xs = [torch.ones(1, requires_grad=True) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [xs[0]]}, {"params": [xs[1]], "lr": 0.5, "scale.factor": 0.5}]
    return ParamTransformingOptimizer(groups, pre=scale(1.0), lr=1.0)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: schedulers.StepLR(o, 2),
        lambda o: schedulers.MultiStepLR(o, [1, 3]),
        lambda o: schedulers.ConstantLR(o),
        lambda o: schedulers.LinearLR(o),
        lambda o: schedulers.ExponentialLR(o, 0.9),
        lambda o: schedulers.CosineAnnealingLR(o, 5),
        lambda o: schedulers.PolynomialLR(o),
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
        lambda o: schedulers.LambdaLR(o, lambda k: 1 / (1 + k)),
        lambda o: schedulers.MultiplicativeLR(o, lambda k: 0.9),
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
        lambda o: schedulers.OneCycleLR(o, max_lr=2.0, total_steps=10, cycle_momentum=False),
        lambda o: schedulers.CyclicLR(o, 0.1, 0.5, cycle_momentum=False),
        lambda o: SWALR(o, 0.5, anneal_epochs=3),
        lambda o: schedulers.SequentialLR(o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], [2]),
        lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]),
    ],
)
def test_every_scheduler_of_torch(make_scheduler: Callable[[Any], Any]) -> None:
    by_key: dict[str, list[list[float]]] = {}
    for key in ("lr", "scale.factor"):
        optim = make()
        scheduler = make_scheduler(optim) if key == "lr" else schedule(optim, key, make_scheduler)
        assert scheduler.optimizer is optim
        values = by_key.setdefault(key, [])
        for _ in range(6):
            optim.step()
            scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
            values.append([group[key] for group in optim.param_groups])
    assert by_key["scale.factor"] == by_key["lr"]
    assert len({tuple(values) for values in by_key["lr"]}) > 1


# found: 15
def test_beside_a_learning_rate_schedule() -> None:
    optim = make()
    both = schedulers.ChainedScheduler(
        [
            schedulers.ExponentialLR(optim, 0.5),
            schedule(optim, "scale.factor", schedulers.ExponentialLR, gamma=0.1),
        ]
    )
    for _ in range(2):
        optim.step()
        both.step()
    assert [group["lr"] for group in optim.param_groups] == both.get_last_lr() == [0.25, 0.125]
    assert [group["scale.factor"] for group in optim.param_groups] == pytest.approx([0.01, 0.005])


# found: 15
def test_after_a_learning_rate_schedule() -> None:
    optim = make()
    phases = [
        schedulers.ExponentialLR(optim, 0.5),
        schedule(optim, "scale.factor", schedulers.LinearLR, start_factor=0.5, total_iters=2),
    ]
    scheduler = schedulers.SequentialLR(optim, phases, [2])
    seen = []
    for _ in range(5):
        seen.append((optim.param_groups[0]["lr"], optim.param_groups[0]["scale.factor"]))
        optim.step()
        scheduler.step()
    assert seen == [(1.0, 0.5), (0.5, 0.5), (0.5, 0.5), (0.5, 0.75), (0.5, 1.0)]


def test_two_that_keep_their_bounds_in_the_groups() -> None:
    optim = make()
    of_lr = schedulers.OneCycleLR(optim, max_lr=1.0, total_steps=5, cycle_momentum=False)
    scheduler = schedule(optim, "scale.factor", schedulers.OneCycleLR, 100.0, total_steps=5, cycle_momentum=False)
    for _ in range(4):
        optim.step()
        of_lr.step()
        scheduler.step()
        lr, factor = (optim.param_groups[0][key] for key in ("lr", "scale.factor"))
        assert factor == pytest.approx(100 * lr)
        assert scheduler.get_last_lr()[0] == factor


def go_on(optim: Any, scheduler: Any) -> list[float]:
    values = []
    for _ in range(3):
        optim.step()
        scheduler.step()
        values.append(optim.param_groups[1]["scale.factor"])
    return values


def test_save_and_load() -> None:
    optim, other = make(), make()
    scheduler, other_scheduler = (
        schedule(each, "scale.factor", schedulers.CosineAnnealingLR, T_max=10) for each in (optim, other)
    )
    go_on(optim, scheduler)
    saved = copy.deepcopy((optim.state_dict(), scheduler.state_dict()))
    other.load_state_dict(saved[0])
    other_scheduler.load_state_dict(saved[1])
    assert go_on(other, other_scheduler) == go_on(optim, scheduler)
    message = 'the loaded state is of a scheduler of "scale.factor", and this one drives "grad_scale"'
    with pytest.raises(ValueError, match=message):
        schedule(other, "grad_scale", schedulers.CosineAnnealingLR, T_max=10).load_state_dict(saved[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(copied: Callable[[Any], Any]) -> None:
    optim = make()
    scheduler = schedule(optim, "scale.factor", schedulers.ExponentialLR, gamma=0.5)
    assert go_on(optim, scheduler) == [0.25, 0.125, 0.0625]
    copied_optim, copied_scheduler = copied((optim, scheduler))
    assert go_on(copied_optim, copied_scheduler) == [0.03125, 0.015625, 0.0078125]
    assert optim.param_groups[1]["scale.factor"] == 0.0625
    assert go_on(optim, scheduler) == [0.03125, 0.015625, 0.0078125]
    assert repr(copied_scheduler) == repr(scheduler) == "<ExponentialLR of 'scale.factor'>"


def test_only_the_hyperparameter_moves() -> None:
    optim = make()
    schedulers.ExponentialLR(optim, 0.5)
    before = [dict(group) for group in optim.param_groups]
    scheduler = schedule(optim, "scale.factor", schedulers.ExponentialLR, gamma=0.5)
    go_on(optim, scheduler)
    for group, old in zip(optim.param_groups, before, strict=True):
        assert list(group) == [*old, "initial scale.factor"]
        assert {key for key in old if group[key] is not old[key]} == {"scale.factor"}


def test_a_tensor_is_written_in_place() -> None:
    optim = SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.8)
    factor = optim.param_groups[0]["factor"] = torch.tensor(1.0)
    scheduler = schedule(optim, "factor", schedulers.ExponentialLR, gamma=0.5)
    optim.step()
    scheduler.step()
    assert optim.param_groups[0]["factor"] is factor
    assert factor.item() == 0.5
    with pytest.raises(ValueError, match="writes to"):
        schedule(optim, "factor", schedulers.OneCycleLR, max_lr=1.0, total_steps=5)
    assert factor.item() == 0.5


def test_the_learning_rate_itself() -> None:
    optim = make()
    scheduler = schedule(optim, "lr", schedulers.ExponentialLR, gamma=0.5)
    optim.step()
    scheduler.step()
    assert [group["lr"] for group in optim.param_groups] == [0.5, 0.25]


def test_a_scheduler_that_fails_leaves_the_groups_as_they_were() -> None:
    class Fails(schedulers.LRScheduler):
        def get_lr(self) -> list[Any]:
            if self.last_epoch == 1:
                raise RuntimeError("no")
            return [group["lr"] for group in self.optimizer.param_groups]

    optim = make()
    scheduler = schedule(optim, "scale.factor", Fails)
    optim.step()
    before = copy.deepcopy(optim.param_groups)
    with pytest.raises(RuntimeError, match="no"):
        scheduler.step()
    assert str(optim.param_groups) == str(before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda o: schedule(o, "scale.factr", schedulers.LinearLR),
            ValueError,
            r'needs the key "scale.factr" in every param group; group 0 has \[',
        ),
        (
            lambda o: schedule(3, "lr", schedulers.LinearLR),  # type: ignore[arg-type]
            TypeError,
            "schedule needs a torch.optim.Optimizer, got 3",
        ),
        (
            lambda o: schedule(o, "scale.factor", schedulers.StepLR(make(), 1)),  # type: ignore[arg-type]
            TypeError,
            r'not an instance of StepLR: schedule\(optimizer, "scale.factor", StepLR, ...\)',
        ),
        (
            lambda o: schedule(o, "scale.factor", lambda o: 3),  # type: ignore[type-var]
            TypeError,
            "schedule needs a function that returns an LRScheduler; <function .* returned 3",
        ),
        (
            lambda o: schedule(o, "scale.factor", schedulers.OneCycleLR, max_lr=1.0, total_steps=5),
            ValueError,
            r"OneCycleLR writes to \['base_momentum', 'max_momentum', 'momentum'\] too, and may drive nothing but "
            '"scale.factor"; pass cycle_momentum=False',
        ),
    ],
)
def test_errors(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    optim = make()
    before = str(optim.param_groups)
    with pytest.raises(error, match=message):
        call(optim)
    assert str(optim.param_groups) == before


def test_a_key_that_is_gone() -> None:
    optim = make()
    scheduler = schedule(optim, "scale.factor", schedulers.ExponentialLR, gamma=0.5)
    optim.step()
    del optim.param_groups[1]["scale.factor"]
    with pytest.raises(ValueError, match='needs the key "scale.factor" in every param group; group 1 has'):
        scheduler.step()
    assert [group["lr"] for group in optim.param_groups] == [1.0, 0.5]


# found: 40
def test_schedule_of_a_limit_ends_above_zero() -> None:
    x = torch.ones(2, requires_grad=True)
    for eta_min in (1e-3, 0.0):
        optim = ParamTransformingOptimizer([x], pre=clip_by_norm(1.0), lr=0.1, param_ndim=None)
        scheduler = schedule(optim, "clip_by_norm.max_norm", schedulers.CosineAnnealingLR, T_max=3, eta_min=eta_min)
        for _ in range(3):
            x.grad = torch.ones(2)
            optim.step()
            scheduler.step()
        x.grad = torch.ones(2)
        with (
            nullcontext() if eta_min else pytest.raises(ValueError, match=r"clip_by_norm.max_norm must be > 0, got 0.0")
        ):
            optim.step()
