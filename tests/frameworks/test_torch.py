"""What torch.optim has: every optimizer inside, every scheduler outside, and ``swa_utils``."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset

from gradchain import project_linf_ball, scale, sign
from tests.frameworks.common import (
    CHAINS,
    Adapt,
    ByHand,
    assert_same,
    batches,
    make_adamw,
    make_data,
    make_model,
    train,
    unwrapped,
    values,
)

pytestmark = pytest.mark.one_optimizer


def classes(module: Any, base: type) -> set[Any]:
    """The classes of a module that derive from ``base``."""
    return {c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base)} - {base}


# Optimizers

OPTIMIZERS = sorted(classes(optim, Optimizer), key=lambda c: c.__name__)
OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "centered": {"centered": True},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
    "nesterov": {"nesterov": True, "momentum": 0.9},
}


def model_for(InnerOpt: Any, seed: int = 0) -> nn.Module:
    """A small network, of what the optimizer takes."""
    torch.manual_seed(seed)
    if InnerOpt is optim.SparseAdam:
        return nn.Embedding(32, 2, sparse=True)
    return nn.Sequential(nn.Linear(4, 8, bias=InnerOpt is not optim.Muon), nn.Tanh(), nn.Linear(8, 2, bias=False))


def go(model: nn.Module, optimizer: Any, with_closure: bool, steps: range = range(6)) -> list[Tensor]:
    """Make steps, and return the parameters."""
    x, y = (t.to(next(model.parameters()).dtype) for t in make_data())
    for k in steps:
        rows = slice(4 * k, 4 * k + 8)
        inputs = torch.arange(32)[rows] if isinstance(model, nn.Embedding) else x[rows]

        def closure(inputs: Tensor = inputs, rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), y[rows])
            loss.backward()
            return loss

        if with_closure:
            assert optimizer.step(closure).requires_grad
        else:
            closure()
            assert optimizer.step() is None
    return values(model)


def variants() -> list[Any]:
    """Each optimizer by itself, with a closure, and with each of its options."""
    found = []
    for cls in OPTIMIZERS:
        ways: list[tuple[str, dict[str, Any], bool]] = [("closure", {}, True)]
        if cls is not optim.LBFGS:
            parameters = inspect.signature(cls).parameters
            ways += [("", {}, False)]
            ways += [(name, kwargs, False) for name, kwargs in OPTIONS.items() if name in parameters]
        found += [pytest.param(cls, *way, id=f"{cls.__name__}-{name}") for name, *way in ways]
    return found


@pytest.mark.parametrize(("InnerOpt", "kwargs", "with_closure"), variants())
def test_an_optimizer_without_chains(
    adapt: Adapt, InnerOpt: type[Optimizer], kwargs: dict[str, Any], with_closure: bool
) -> None:
    bare, ours = model_for(InnerOpt), model_for(InnerOpt)
    expected = go(bare, InnerOpt(bare.parameters(), **kwargs), with_closure)
    assert_same(go(ours, adapt(InnerOpt(ours.parameters(), **kwargs)), with_closure), expected)


DENSE = [
    partial(c, max_iter=4, line_search_fn="strong_wolfe") if c is optim.LBFGS else partial(c)
    for c in OPTIMIZERS
    if c is not optim.SparseAdam
]


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("InnerOpt", DENSE, ids=lambda p: p.func.__name__)
def test_an_optimizer_with_chains(adapt: Adapt, InnerOpt: partial[Optimizer], with_closure: bool) -> None:
    with_closure |= InnerOpt.func is optim.LBFGS
    model, ours = model_for(InnerOpt.func).double(), model_for(InnerOpt.func).double()
    expected = go(model, ByHand(InnerOpt(model.parameters())), with_closure)
    torch.testing.assert_close(go(ours, adapt(InnerOpt(ours.parameters()), **CHAINS), with_closure), expected)


@pytest.mark.parametrize("InnerOpt", DENSE, ids=lambda p: p.func.__name__)
def test_an_optimizer_and_its_checkpoint(adapt: Adapt, InnerOpt: partial[Optimizer]) -> None:
    models = [model_for(InnerOpt.func, seed) for seed in (0, 0, 1)]
    whole, first, second = (adapt(InnerOpt(model.parameters()), **CHAINS) for model in models)
    expected = go(models[0], whole, True)
    go(models[1], first, True, range(3))
    models[2].load_state_dict(models[1].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(go(models[2], second, True, range(3, 6)), expected)
    assert_transforms_same(second, whole)


def assert_transforms_same(actual: Optimizer, expected: Optimizer) -> None:
    a, b = ({k: v["transforms"] for k, v in o.state_dict()["state"].items()} for o in (actual, expected))
    assert a
    assert_same(a, b)


def test_sparse_gradients(adapt: Adapt) -> None:
    model, ours = model_for(optim.SparseAdam), model_for(optim.SparseAdam)
    inner = optim.SparseAdam(model.parameters(), lr=0.5)
    optimizer = adapt(optim.SparseAdam(ours.parameters(), lr=0.5), update=scale(0.5), post=project_linf_ball(0.3))
    for k in range(3):
        before = values(model)[0]
        go(model, inner, False, range(k, k + 1))
        (p,) = model.parameters()
        p.data = (before + (p.detach() - before) * 0.5).clamp(-0.3, 0.3)
        torch.testing.assert_close(go(ours, optimizer, False, range(k, k + 1)), [p.detach()])
    optimizer = adapt(optim.SparseAdam(ours.parameters()), pre=sign())
    with pytest.raises(TypeError, match=r"dense gradient.*torch.sparse_coo.*to_dense"):
        go(ours, optimizer, False)


def test_muon_beside_adamw(adapt: Adapt) -> None:
    def split(model: nn.Module) -> tuple[Optimizer, Optimizer]:
        weights, biases = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (2, 1))
        return optim.Muon(weights, lr=0.05), AdamW(biases, lr=0.05)

    model, ours = make_model(), make_model()
    by_hand = [ByHand(inner) for inner in split(model)]
    optimizers = [adapt(inner, **CHAINS) for inner in split(ours)]
    for x, y in batches():
        for net, steppers in ((model, by_hand), (ours, optimizers)):
            net.zero_grad()
            mse_loss(net(x), y).backward()
            for stepper in steppers:
                stepper.step()
    torch.testing.assert_close(values(ours), values(model))


# Schedulers


def sgd_with_a_tensor(params: Any) -> Optimizer:
    return SGD(params, lr=torch.tensor(0.1), momentum=0.9)


INNER = {"SGD": partial(SGD, lr=0.1, momentum=0.9), "Adam": partial(Adam, lr=0.1), "tensor": sgd_with_a_tensor}
SCHEDULERS: dict[type[lr_scheduler.LRScheduler], list[Callable[[Optimizer], Any]]] = {
    lr_scheduler.ChainedScheduler: [
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)])
    ],
    lr_scheduler.ConstantLR: [lr_scheduler.ConstantLR],
    lr_scheduler.CosineAnnealingLR: [lambda o: lr_scheduler.CosineAnnealingLR(o, 5)],
    lr_scheduler.CosineAnnealingWarmRestarts: [lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3)],
    lr_scheduler.CyclicLR: [
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False, mode="exp_range"),
    ],
    lr_scheduler.ExponentialLR: [lambda o: lr_scheduler.ExponentialLR(o, 0.9)],
    lr_scheduler.LambdaLR: [lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k))],
    lr_scheduler.LinearLR: [lr_scheduler.LinearLR],
    lr_scheduler.MultiStepLR: [lambda o: lr_scheduler.MultiStepLR(o, [1, 3])],
    lr_scheduler.MultiplicativeLR: [lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9)],
    lr_scheduler.OneCycleLR: [lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=9)],
    lr_scheduler.PolynomialLR: [lr_scheduler.PolynomialLR],
    lr_scheduler.ReduceLROnPlateau: [lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)],
    lr_scheduler.SequentialLR: [
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2])
    ],
    lr_scheduler.StepLR: [lambda o: lr_scheduler.StepLR(o, 2)],
    swa_utils.SWALR: [lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3)],
}
ROWS = [
    pytest.param(make, InnerOpt, id=f"{Scheduler.__name__}-{name}")
    for Scheduler, row in SCHEDULERS.items()
    for make in row
    for name, InnerOpt in INNER.items()
]


def test_no_scheduler_is_forgotten() -> None:
    found = {c for module in (lr_scheduler, swa_utils) for c in classes(module, lr_scheduler.LRScheduler)}
    assert SCHEDULERS.keys() == found - {getattr(lr_scheduler, "_LRScheduler", None)}


def go_with(scheduler: Any, model: nn.Module, optimizer: Any, steps: range = range(8)) -> list[list[float]]:
    """Make steps of both, and return what a scheduler can change, after each."""
    seen = []
    for k in steps:
        go(model, optimizer, False, range(k % 6, k % 6 + 1))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        (group,) = optimizer.param_groups
        seen.append([float(group["lr"]), group.get("momentum", 0.0), *group.get("betas", ())])
    return seen


@pytest.mark.parametrize(("make", "InnerOpt"), ROWS)
def test_a_scheduler(adapt: Adapt, make: Callable[[Optimizer], Any], InnerOpt: Callable[..., Optimizer]) -> None:
    bare, ours, by_inner = (make_model() for _ in range(3))
    optimizer = InnerOpt(bare.parameters())
    expected = go_with(make(optimizer), bare, optimizer)
    optimizer = adapt(InnerOpt(ours.parameters()))
    assert go_with(make(optimizer), ours, optimizer) == expected
    inner = InnerOpt(by_inner.parameters())
    assert go_with(make(inner), by_inner, adapt(inner)) == expected
    assert_same([values(ours), values(by_inner)], [values(bare)] * 2)


@pytest.mark.parametrize(("make", "InnerOpt"), ROWS)
def test_a_scheduler_and_its_checkpoint(
    adapt: Adapt, make: Callable[[Optimizer], Any], InnerOpt: Callable[..., Optimizer]
) -> None:
    models = [make_model(seed) for seed in (0, 0, 1)]
    optimizers = [adapt(InnerOpt(model.parameters()), **CHAINS) for model in models]
    schedulers = [make(optimizer) for optimizer in optimizers]
    whole, first, second = zip(schedulers, models, optimizers, strict=True)
    expected = go_with(*whole)
    go_with(*first, range(4))
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert go_with(*second, range(4, 8)) == expected[4:]
    assert_same(values(models[2]), values(models[0]))


# swa_utils


def test_averaged_model(adapt: Adapt) -> None:
    ours, model = make_model(), make_model()
    optimizer, by_hand = adapt(make_adamw(ours), **CHAINS), ByHand(make_adamw(model))
    averages = [swa_utils.AveragedModel(m, use_buffers=True) for m in (ours, model)]
    schedules = [swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=2) for o in (optimizer, by_hand.inner)]
    for batch in batches():
        train(ours, optimizer, data=[batch], schedulers=schedules[:1])
        train(model, by_hand, data=[batch], schedulers=schedules[1:])
        for average, net in zip(averages, (ours, model), strict=True):
            average.update_parameters(net)
    torch.testing.assert_close(values(averages[0]), values(averages[1]))
    assert int(averages[0].n_averaged) == 8


def test_averaged_model_with_the_average_of_param_ema(adapt: Adapt) -> None:
    model = make_model()
    optimizer = adapt(make_adamw(model), **CHAINS)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    for batch in batches():
        train(model, optimizer, data=[batch])
        average.update_parameters(model)
    kept = [state["transforms"]["post.param_ema.average"] for state in optimizer.state_dict()["state"].values()]
    torch.testing.assert_close(kept, values(average.module))


def test_update_bn(adapt: Adapt) -> None:
    def run(wrap: Callable[[Optimizer], Any]) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        optimizer, average = wrap(make_adamw(model)), swa_utils.AveragedModel(model)
        for batch in batches():
            train(model, optimizer, data=[batch])
            average.update_parameters(model)
        swa_utils.update_bn(DataLoader(TensorDataset(make_data()[0]), batch_size=8), average)
        return average.state_dict()

    assert_same(run(adapt), run(unwrapped))
