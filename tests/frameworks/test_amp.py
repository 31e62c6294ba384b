"""Mixed precision: ``GradScaler``, half-precision parameters, and master weights."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW, Optimizer

from gradchain import clip_by_global_norm, project_linf_ball
from tests.frameworks.common import (
    CHAINS,
    Adapt,
    ByHand,
    assert_same,
    batches,
    make_adamw,
    make_model,
    make_scaler,
    train_amp,
    unwrapped,
    values,
)

pytestmark = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))],
)


@pytest.mark.parametrize("overflow_at", [None, 0, 3])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("fused", [False, True])
def test_without_chains_it_is_the_bare_optimizer(
    adapt: Adapt, device: str, fused: bool, max_norm: float | None, overflow_at: int | None
) -> None:
    bare, ours = make_model().to(device), make_model().to(device)
    inner, optimizer = AdamW(bare.parameters(), fused=fused), adapt(AdamW(ours.parameters(), fused=fused))
    # Fused, the bare optimizer unscales within the step, where rounding differs.
    close = torch.testing.assert_close if fused else assert_same
    kwargs: dict[str, Any] = {"max_norm": max_norm, "overflow_at": overflow_at}
    close(
        train_amp(ours, optimizer, make_scaler(device), **kwargs), train_amp(bare, inner, make_scaler(device), **kwargs)
    )


@pytest.mark.parametrize("overflow_at", [None, 0, 3])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("fused", [False, True])
def test_transforms_see_unscaled_gradients(
    adapt: Adapt, device: str, fused: bool, max_norm: float | None, overflow_at: int | None
) -> None:
    model, ours = make_model().to(device), make_model().to(device)
    by_hand = ByHand(AdamW(model.parameters(), lr=0.05))
    optimizer = adapt(AdamW(ours.parameters(), lr=0.05, fused=fused), **CHAINS)
    kwargs: dict[str, Any] = {"max_norm": max_norm, "overflow_at": overflow_at}
    expected = train_amp(model, by_hand, make_scaler(device), **kwargs)
    torch.testing.assert_close(train_amp(ours, optimizer, make_scaler(device), **kwargs), expected)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_changes_nothing(adapt: Adapt, device: str, fused: bool, unscale: bool) -> None:
    model = make_model().to(device)
    optimizer = adapt(AdamW(model.parameters(), lr=0.05, fused=fused), **CHAINS)
    scaler = make_scaler(device)
    train_amp(model, optimizer, scaler)
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    if unscale:
        scaler.unscale_(optimizer)
    assert scaler.step(optimizer) is None
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(values(model), before)
    assert_same(optimizer.state_dict()["state"], state["state"])
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]


def test_unscaling_twice_is_an_error(adapt: Adapt, device: str) -> None:
    model = make_model().to(device)
    optimizer, scaler = adapt(make_adamw(model), **CHAINS), make_scaler(device)
    scaler.scale(model(torch.ones(1, 4, device=device)).sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"already been called on this optimizer"):
        scaler.unscale_(optimizer)


# Half-precision parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_without_chains(adapt: Adapt, device: str, dtype: torch.dtype) -> None:
    def run(wrap: Any) -> list[Tensor]:
        model = make_model().to(device, dtype)
        optimizer = wrap(AdamW(model.parameters(), lr=0.05, eps=1e-4))
        for x, y in batches():
            optimizer.zero_grad()
            mse_loss(model(x.to(device, dtype)), y.to(device, dtype)).backward()
            optimizer.step()
        return values(model)

    assert_same(run(adapt), run(unwrapped))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.one_optimizer
def test_half_parameters_are_transformed_in_float32(adapt: Adapt, device: str, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(300, dtype=dtype, device=device))
    optimizer = adapt(SGD([p], lr=1.0), pre=clip_by_global_norm(10.0), post=project_linf_ball(0.5), param_ndim=None)
    p.grad = torch.full_like(p, 6e4)  # a norm of a million
    optimizer.step()
    assert_same(p.grad, torch.full_like(p, 10 / 300**0.5))
    assert_same(p.detach(), torch.full_like(p, -0.5))


def test_the_state_of_bfloat16_parameters_survives_a_checkpoint(adapt: Adapt, device: str) -> None:
    def start() -> tuple[nn.Module, Optimizer]:
        model = make_model().to(device, torch.bfloat16)
        return model, adapt(make_adamw(model), **CHAINS, param_ndim=None)

    def go_on(model: nn.Module, optimizer: Optimizer, part: slice) -> list[Tensor]:
        for x, y in batches()[part]:
            optimizer.zero_grad()
            mse_loss(model(x.to(device).bfloat16()), y.to(device).bfloat16()).backward()
            optimizer.step()
        return values(model)

    whole, first, second = start(), start(), start()
    expected = go_on(*whole, slice(0, 8))
    go_on(*first, slice(0, 4))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    assert_same(go_on(*second, slice(4, 8)), expected)
    assert_same(second[1].state_dict()["state"], whole[1].state_dict()["state"])


# Master weights


def test_master_weights(adapt: Adapt, device: str) -> None:
    def run(wrap: Any) -> tuple[list[Tensor], list[Tensor]]:
        model = make_model().to(device, torch.bfloat16)
        masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
        optimizer = wrap(AdamW(masters, lr=0.05))
        for x, y in batches():
            model.zero_grad()
            mse_loss(model(x.to(device).bfloat16()), y.to(device).bfloat16()).backward()
            for p, master in zip(model.parameters(), masters, strict=True):
                assert p.grad is not None
                master.grad = p.grad.float()
            optimizer.step()
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
        return [m.detach() for m in masters], values(model)

    masters, weights = run(partial(adapt, **CHAINS))
    expected, _ = run(ByHand)
    torch.testing.assert_close(masters, expected)
    assert_same([m.bfloat16() for m in masters], weights)
