"""``as_lr``: torch's schedulers drive any hyperparameter as they drive the learning rate."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers

from gradchain import ParamTransformingOptimizer, as_lr, scale


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
        lambda o: schedulers.SequentialLR(o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], [2]),
        lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]),
    ],
)
def test_every_scheduler_of_torch(make_scheduler: Callable[[Any], Any]) -> None:
    by_key: dict[str, list[list[float]]] = {}
    for key in ("lr", "scale.factor"):
        optim = make()
        scheduler = make_scheduler(optim if key == "lr" else as_lr(optim, key))
        values = by_key.setdefault(key, [])
        for _ in range(6):
            optim.step()
            scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
            values.append([group[key] for group in optim.param_groups])
    assert by_key["scale.factor"] == by_key["lr"]
    assert len({tuple(values) for values in by_key["lr"]}) > 1


def test_beside_a_learning_rate_schedule() -> None:
    optim = make()
    both = [schedulers.ExponentialLR(optim, 0.5), schedulers.ExponentialLR(as_lr(optim, "scale.factor"), 0.1)]
    optim.step()
    for scheduler in both:
        scheduler.step()
    assert [group["lr"] for group in optim.param_groups] == [0.5, 0.25]
    assert [group["scale.factor"] for group in optim.param_groups] == pytest.approx([0.1, 0.05])


def test_save_and_load() -> None:
    def go_on(optim: Any, scheduler: Any) -> list[float]:
        values = []
        for _ in range(3):
            optim.step()
            scheduler.step()
            values.append(optim.param_groups[1]["scale.factor"])
        return values

    optim = make()
    scheduler = schedulers.CosineAnnealingLR(as_lr(optim, "scale.factor"), 10)
    go_on(optim, scheduler)
    saved = copy.deepcopy((optim.state_dict(), scheduler.state_dict()))
    other = make()
    other_scheduler = schedulers.CosineAnnealingLR(as_lr(other, "scale.factor"), 10)
    other.load_state_dict(saved[0])
    other_scheduler.load_state_dict(saved[1])
    assert go_on(other, other_scheduler) == go_on(optim, scheduler)


def test_any_optimizer_and_group_that_is_added() -> None:
    optim = SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.8)
    view = as_lr(optim, "momentum")
    schedulers.ExponentialLR(view, 0.5).step()
    assert optim.param_groups[0]["momentum"] == pytest.approx(0.4)
    optim.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    assert [group["lr"] for group in view.param_groups] == pytest.approx([0.4, 0.8])


def test_errors() -> None:
    with pytest.raises(ValueError, match=r'needs the key "scale.factr" in every param group; group 0 has \['):
        as_lr(make(), "scale.factr")
    with pytest.raises(TypeError, match="as_lr needs a torch.optim.Optimizer, got 3"):
        as_lr(3, "lr")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step the optimizer itself"):
        as_lr(make(), "lr").step()


def test_copies_and_momentum() -> None:
    optim = make()
    scheduler = schedulers.ExponentialLR(as_lr(optim, "scale.factor"), 0.5)
    copied_optim, copied = copy.deepcopy((optim, scheduler))
    copied_optim.step()
    copied.step()
    assert copied_optim.param_groups[0]["scale.factor"] == 0.5
    assert optim.param_groups[0]["scale.factor"] == 1.0
    with pytest.raises(ValueError, match="momentum"):
        schedulers.OneCycleLR(as_lr(optim, "scale.factor"), max_lr=1.0, total_steps=5)
