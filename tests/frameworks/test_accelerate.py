"""Hugging Face Accelerate: its optimizer, accumulation, clipping, schedulers, loss scaling and checkpoints."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from gradchain import schedule
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
    train_with_closure,
    unwrapped,
    values,
)

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def run(model: nn.Module, optimizer: Any, *, max_norm: float | None = None, **kwargs: Any) -> list[Tensor]:
    """The loop of the documentation of Accelerate."""
    accelerator = accelerate.Accelerator(cpu=True, **kwargs)
    scheduler = StepLR(optimizer, 3, gamma=0.1)
    loader = DataLoader(TensorDataset(*make_data()), batch_size=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(mse_loss(model(x), y))
                if max_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return values(accelerator.unwrap_model(model))


@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}])
def test_without_chains_it_is_the_bare_optimizer(adapt: Adapt, kwargs: dict[str, Any]) -> None:
    bare, ours = make_model(), make_model()
    assert_same(run(ours, adapt(make_adamw(ours)), **kwargs), run(bare, make_adamw(bare), **kwargs))


@pytest.mark.parametrize(
    ("kwargs", "in_loop"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
        ({"max_norm": 0.5}, {"max_norm": 0.5}),
    ],
)
def test_chains(adapt: Adapt, kwargs: dict[str, Any], in_loop: dict[str, Any]) -> None:
    ours, model = make_model(), make_model()
    inner = make_adamw(model)
    expected = train(model, ByHand(inner), schedulers=[StepLR(inner, 3, gamma=0.1)], **in_loop)
    torch.testing.assert_close(run(ours, adapt(make_adamw(ours), **CHAINS), **kwargs), expected)


def test_a_closure_is_passed_by_position(adapt: Adapt) -> None:
    models = make_model(), make_model()
    for model, wrap in zip(models, (unwrapped, adapt), strict=True):
        accelerator = accelerate.Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(model, wrap(LBFGS(model.parameters(), max_iter=4)))
        train_with_closure(prepared, optimizer, accelerator.backward)
    assert_same(values(models[1]), values(models[0]))


@pytest.mark.one_optimizer
def test_its_optimizer_shows_ours(adapt: Adapt) -> None:
    model, plain = make_model(), make_model()
    ours = adapt(make_adamw(model), **CHAINS)
    train(model, ours, data=batches()[:4])
    optimizer = accelerate.Accelerator(cpu=True).prepare(ours)  # which loads a copy of the state
    train(model, optimizer, data=batches()[4:])
    torch.testing.assert_close(values(model), train(plain, ByHand(make_adamw(plain))))
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(ours, name)
    assert_same(optimizer.state_dict()["state"], ours.state_dict()["state"])
    assert all("transforms" in optimizer.state[p] for p in model.parameters())
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert ours.param_groups[1]["params"] == [extra]
    assert ours.param_groups[1]["clip_by_global_norm.max_norm"] == 0.1


# found: 15
def test_a_checkpoint_continues_where_it_was_saved(adapt: Adapt, tmp_path: Path) -> None:
    def start(seed: int) -> tuple[Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = make_model(seed)
        optimizer = adapt(make_adamw(model), **CHAINS)
        of_norm = schedule(optimizer, "clip_by_global_norm.max_norm", ExponentialLR, gamma=0.9)
        return accelerator, accelerator.prepare(model, optimizer, StepLR(optimizer, 3, gamma=0.1), of_norm)

    def go_on(prepared: Any, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        model, optimizer, *schedulers = prepared
        return train(model, optimizer, schedulers=schedulers, data=data)

    _, whole = start(0)
    expected = go_on(whole, batches())
    accelerator, first = start(0)
    go_on(first, batches()[:4])
    accelerator.save_state(tmp_path)
    accelerator, second = start(1)
    accelerator.load_state(tmp_path)
    assert_same(go_on(second, batches()[4:]), expected)
    assert_same(second[1].state_dict()["state"], whole[1].state_dict()["state"])
    for _, optimizer, *_ in (whole, second):
        assert optimizer.param_groups[0]["clip_by_global_norm.max_norm"] == pytest.approx(0.1 * 0.9**8)


def test_its_gradient_scaler_skips_an_overflow(adapt: Adapt) -> None:
    accelerate.Accelerator(cpu=True)
    model = make_model()
    ours = adapt(make_adamw(model), **CHAINS)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(ours, scaler=scaler)
    for overflows in (False, True, False):
        before, state = values(model), copy.deepcopy(ours.state_dict()["state"])
        for p in model.parameters():
            p.grad = scaler.scale(torch.full_like(p, torch.inf if overflows else 1.0))
        optimizer.step()
        assert optimizer.step_was_skipped is overflows
        if overflows:
            assert_same(values(model), before)
            assert_same(ours.state_dict()["state"], state)
    by_hand = make_model()
    loop = ByHand(make_adamw(by_hand))
    for _ in range(2):
        for p in by_hand.parameters():
            p.grad = torch.ones_like(p)
        loop.step()
    torch.testing.assert_close(values(model), values(by_hand))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_float16_on_cuda(adapt: Adapt) -> None:
    results = []
    for wrap in (unwrapped, adapt):
        accelerator = accelerate.Accelerator(mixed_precision="fp16")
        model = make_model()
        prepared, optimizer = accelerator.prepare(model, wrap(make_adamw(model)))
        for x, y in batches():
            accelerator.backward(mse_loss(prepared(x.to(accelerator.device)), y.to(accelerator.device)))
            accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append(values(model))
    assert_same(results[1], results[0])
