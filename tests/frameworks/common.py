"""What every framework is tried with: a small problem, a chain in each slot, and the same step written by hand."""

import doctest
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW, Optimizer

from gradchain import chain, clip_by_global_norm, ema, param_ema, project_linf_ball, scale

Adapt: TypeAlias = Callable[..., Optimizer]
"""Takes an optimizer and the chains by slot, and returns the optimizer to use."""

CHAINS: dict[str, Any] = {
    "pre": chain(ema(0.9, debias=False), clip_by_global_norm(0.1)),
    "update": scale(0.5),
    "post": chain(project_linf_ball(0.3), param_ema(0.5, debias=False)),
}


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The adapter that adds nothing."""
    return optimizer


class ByHand:
    """The step that ``CHAINS`` make around an optimizer, written out."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.params: list[Tensor] = [p for group in inner.param_groups for p in group["params"]]
        self.means = [torch.zeros_like(p) for p in self.params]
        self.averages = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        before, means = ([x.clone() for x in xs] for xs in (self.params, self.means))

        def evaluate() -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for p, mean, last in zip(self.params, self.means, means, strict=True):
                assert p.grad is not None
                mean.copy_(0.9 * last + 0.1 * p.grad)
            norm = torch.cat([mean.flatten() for mean in self.means]).norm()
            for p, mean in zip(self.params, self.means, strict=True):
                p.grad = mean * min(1.0, 0.1 / norm.item())
            return loss

        if closure is None:
            evaluate()
        loss = self.inner.step() if closure is None else self.inner.step(evaluate)
        for p, start, average in zip(self.params, before, self.averages, strict=True):
            p.copy_((start + (p - start) * 0.5).clamp(-0.3, 0.3))
            average.lerp_(p, 0.5)
        return loss

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def make_adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.05)


def make_data() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return x, 3 * x[:, :2] - x[:, 2:]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two epochs of four batches."""
    x, y = make_data()
    return list(zip(x.split(8), y.split(8), strict=True)) * 2


def train(
    model: nn.Module,
    optimizer: Any,
    *,
    data: Sequence[tuple[Tensor, Tensor]] | None = None,
    accumulate: int = 1,
    max_norm: float | None = None,
    schedulers: Iterable[Any] = (),
) -> list[Tensor]:
    """The plain loop; returns the parameters."""
    for index, (x, y) in enumerate(batches() if data is None else data, 1):
        (mse_loss(model(x), y) / accumulate).backward()
        if index % accumulate == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
    return values(model)


def train_with_closure(model: nn.Module, optimizer: Any, backward: Callable[[Tensor], Any] = Tensor.backward) -> Any:
    """The plain loop for optimizers that evaluate the loss themselves; returns the parameters."""
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            backward(loss)
            return loss

        optimizer.step(closure)
    return values(model)


def make_scaler(device: str = "cpu") -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=1024.0)


def train_amp(
    model: nn.Module,
    optimizer: Any,
    scaler: torch.amp.GradScaler,
    *,
    max_norm: float | None = None,
    overflow_at: int | None = None,
) -> list[Tensor]:
    """The plain loop in float16, as torch documents it; returns the parameters."""
    for index, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype=torch.float16):
            loss = mse_loss(model(x.to(device)), y.to(device))
        scaler.scale(loss * torch.inf if index == overflow_at else loss).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
    return values(model)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit for bit, through dicts and lists."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def code_of(page: str) -> dict[str, Any]:
    """Run the code of a page of ``docs``, and return the names that it defines."""
    names: dict[str, Any] = {}
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    for example in doctest.DocTestParser().get_examples(text):
        exec(compile(example.source, page, "single"), names)
    return names
