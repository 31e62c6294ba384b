"""Functions of a user's own, one for about each operation of torch, make in a step what they make by hand."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gradchain import Group, ParamTransformingOptimizer, Transform, broadcast

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "in lists": [(4, 3), (3, 4)],
    "stacked": [(3, 3)] * 5,
    "one by one": [(4, 4)],
}


def with_end_of(tensor: Tensor, group: Group) -> Tensor:
    result = tensor.clone()
    result[0] = result[-1]
    return result


def scaled_by_items(tensor: Tensor, group: Group) -> Tensor:
    (lr,) = (value for key, value in group.items() if key == "lr")
    return tensor * float(lr)


ELEMENTWISE: dict[str, Transform] = {
    "addcdiv": lambda t, g: torch.addcdiv(t, t, t.abs() + 1, value=-2),
    "addcmul": lambda t, g: torch.addcmul(t, t, t, value=0.3),
    "atan2": lambda t, g: torch.atan2(t, t + 1),
    "bitwise and": lambda t, g: t * ((t > 0) & (t < 1)),
    "bitwise not": lambda t, g: t * ~(t > 0),
    "bitwise xor": lambda t, g: t * ((t > 0) ^ (t < 1)),
    "bucketize": lambda t, g: torch.bucketize(t, torch.tensor([-1.0, 0.0, 1.0])).float(),
    "clamp between numbers": lambda t, g: t.clamp(-0.1, 0.2),
    "clamp between tensors": lambda t, g: t.clamp(t.mean(), t.amax() * 0.5),
    "complex": lambda t, g: torch.view_as_real(torch.complex(t, t) * 1j)[..., 0],
    "copysign": lambda t, g: torch.copysign(torch.ones(()), t),
    "div, rounded": lambda t, g: torch.div(t, 0.3, rounding_mode="trunc"),
    "elu": lambda t, g: functional.elu(t),
    "floor_divide": lambda t, g: t // 0.3,
    "fmod": lambda t, g: t.fmod(0.3),
    "gelu": lambda t, g: functional.gelu(t),
    "hardtanh": lambda t, g: functional.hardtanh(t),
    "heaviside": lambda t, g: torch.heaviside(t, torch.tensor(0.5)),
    "hypot": lambda t, g: torch.hypot(t, t),
    "in place": lambda t, g: t.clone().mul_(2).add_(1),
    "int": lambda t, g: (t * 10).int().float() / 10,
    "lerp": lambda t, g: t.lerp(-t, 0.3),
    "lerp by a tensor": lambda t, g: t.lerp(torch.ones_like(t), t.sigmoid()),
    "logit": lambda t, g: t.sigmoid().logit(),
    "masked_fill": lambda t, g: t.masked_fill(t < 0, 0.5),
    "nan_to_num": lambda t, g: (t / 0).nan_to_num(1.0, 2.0, 3.0),
    "polar": lambda t, g: torch.polar(t.abs(), t).real,
    "pow": lambda t, g: t.abs() ** 1.5,
    "pow of a number": lambda t, g: 2**t,
    "pow of a tensor": lambda t, g: t.abs() ** t,
    "remainder": lambda t, g: t.remainder(0.3),
    "softplus": lambda t, g: functional.softplus(t, beta=2),
    "softshrink": lambda t, g: functional.softshrink(t, 0.1),
    "sqrt": lambda t, g: t.sign() * t.abs().sqrt(),
    "threshold": lambda t, g: functional.threshold(t, 0.1, 0.0),
    "to another dtype": lambda t, g: t.double().mul(2).to(t.dtype),
    "where": lambda t, g: torch.where(t > 0, t, torch.zeros(())),
    "xlogy": lambda t, g: torch.xlogy(t.abs(), t.abs() + 1),
}
OF_WHOLE: dict[str, Transform] = {
    "addmm": lambda t, g: torch.addmm(t, t @ t.T, t, beta=0.5, alpha=2),
    "all": lambda t, g: torch.where((t > -9).all(), t, 0.0),
    "aminmax": lambda t, g: (t - torch.aminmax(t).min) / torch.aminmax(t).max,
    "any": lambda t, g: t * (t > 1).any(),
    "arange": lambda t, g: t * torch.arange(t.shape[0]).view(-1, 1),
    "argmax": lambda t, g: t * (torch.arange(t.numel()).view_as(t) == t.argmax()),
    "avg_pool": lambda t, g: functional.avg_pool1d(t.reshape(1, 1, -1), 3, 1, 1).view_as(t),
    "cat": lambda t, g: torch.cat([t[:1], t[1:] * 2]),
    "cat of chunks": lambda t, g: torch.cat([part * i for i, part in enumerate(t.chunk(2))]),
    "cat of parts": lambda t, g: torch.cat(t.split(2)[::-1]),
    "cdist": lambda t, g: t * torch.cdist(t, t).sum(),
    "clamp between a number and a tensor": lambda t, g: t.clamp(-0.1, t.amax() * 0.5),
    "conv": lambda t, g: functional.conv1d(t.reshape(1, 1, -1), torch.ones(1, 1, 3), padding=1).view_as(t),
    "count_nonzero": lambda t, g: t * torch.count_nonzero(t > 0),
    "cummax": lambda t, g: t.cummax(0).values,
    "cumprod": lambda t, g: t.cumprod(0),
    "cumsum": lambda t, g: t.cumsum(0),
    "diagonal": lambda t, g: t - torch.diagonal(t).sum(),
    "dist": lambda t, g: t * torch.dist(t, -t),
    "einsum": lambda t, g: t * torch.einsum("ij,ij->i", t, t).unsqueeze(1),
    "expand": lambda t, g: t * t.mean().expand_as(t),
    "eye": lambda t, g: t + torch.eye(*t.shape),
    "fft": lambda t, g: torch.fft.ifft(torch.fft.fft(t) * 0.5).real,
    "flip": lambda t, g: t.flip(0),
    "full_like": lambda t, g: torch.full_like(t, t.ndim) * t,
    "func.grad": lambda t, g: torch.func.grad(lambda x: (x**3).sum())(t),
    "func.vmap": lambda t, g: torch.vmap(lambda row: row / row.norm())(t),
    "gather": lambda t, g: t.gather(-1, t.argsort(-1)),
    "index": lambda t, g: t[torch.arange(t.shape[0] - 1, -1, -1)],
    "index_put": with_end_of,
    "index_select": lambda t, g: t.index_select(0, torch.tensor([0] * t.shape[0])),
    "kthvalue": lambda t, g: t * t.flatten().kthvalue(2).values,
    "layer_norm": lambda t, g: functional.layer_norm(t, t.shape),
    "linalg.pinv": lambda t, g: torch.linalg.pinv(t + 1).T.reshape(t.shape),
    "linalg.qr": lambda t, g: torch.linalg.qr(t)[0] @ torch.linalg.qr(t)[1],
    "linalg.slogdet": lambda t, g: t * torch.linalg.slogdet(t @ t.T + torch.eye(t.shape[0]))[1],
    "linalg.solve": lambda t, g: torch.linalg.solve(t.T @ t + torch.eye(t.shape[1]), t.T).T,
    "linalg.svdvals": lambda t, g: t / torch.linalg.svdvals(t)[0],
    "linspace": lambda t, g: t * torch.linspace(0, 1, t.numel()).view_as(t),
    "logsumexp": lambda t, g: t - t.logsumexp(-1, keepdim=True),
    "matmul": lambda t, g: t @ t.T @ t,
    "matrix_norm": lambda t, g: t / torch.linalg.matrix_norm(t, "nuc"),
    "median": lambda t, g: t - t.median(),
    "median of columns": lambda t, g: t - t.median(0).values,
    "norm of order 0": lambda t, g: t / t.norm(0),
    "norm of order 3": lambda t, g: t / t.norm(3),
    "norm of order inf": lambda t, g: t / t.norm(float("inf")),
    "number of elements": lambda t, g: t * t.numel() / len(t),
    "one_hot": lambda t, g: t * functional.one_hot(t.flatten().argmax(), t.numel()).view_as(t),
    "outer": lambda t, g: torch.outer(t.flatten(), t.flatten()).sum(1).view_as(t),
    "pad": lambda t, g: functional.pad(t, (1, 0))[..., :-1],
    "prod": lambda t, g: t * t.prod(0, keepdim=True),
    "quantile": lambda t, g: t * t.flatten().quantile(0.3),
    "renorm": lambda t, g: t.renorm(2, 0, 1.0),
    "repeat": lambda t, g: t.repeat(2, 1)[: t.shape[0]],
    "repeat_interleave": lambda t, g: t.repeat_interleave(2, 0)[: t.shape[0]],
    "rfft": lambda t, g: torch.fft.irfft(torch.fft.rfft(t.flatten()), n=t.numel()).view_as(t),
    "roll": lambda t, g: t.roll(1, 0),
    "scatter": lambda t, g: torch.zeros_like(t).scatter(0, torch.zeros_like(t, dtype=torch.long), t),
    "softmax": lambda t, g: t.softmax(-1),
    "sort": lambda t, g: t.sort(-1).values,
    "stack": lambda t, g: torch.stack([t, -t]).amax(0),
    "stack of norms": lambda t, g: t * torch.stack([t.norm(), t.norm(1), torch.tensor(2.0)]).amin(),
    "stack of rows": lambda t, g: torch.stack([row * i for i, row in enumerate(t.unbind())]),
    "std": lambda t, g: (t - t.mean()) / t.std(),
    "sum in another dtype": lambda t, g: t / t.sum(dtype=torch.float64),
    "take": lambda t, g: t * t.take(torch.tensor(0)),
    "topk": lambda t, g: t * t.flatten().topk(2).values.sum(),
    "trace": lambda t, g: t * torch.trace(t),
    "transpose": lambda t, g: t.mT.contiguous().mT,
    "trapezoid": lambda t, g: t * torch.trapezoid(t.flatten()),
    "tril": lambda t, g: torch.tril(t),
    "unfold": lambda t, g: t * t.flatten().unfold(0, 2, 1).sum(),
    "unique": lambda t, g: t * t.unique().numel(),
    "var_mean": lambda t, g: t - torch.var_mean(t)[1],
}
OF_GROUP: dict[str, Transform] = {
    "a comparison with the parameter": lambda t, g: t * functional.mse_loss(t, g["param"]),
    "a sum with the parameter": lambda t, g: t + 0.1 * g["param"],
    "all items": scaled_by_items,
    "all values": lambda t, g: t * next(value for value in g.values() if isinstance(value, float)),
    "a copy": lambda t, g: t * g.copy()["lr"],
    "a union": lambda t, g: t * ({"factor": 2} | g | {"lr": g["lr"] + 1})["lr"],
    "an unpacked group": lambda t, g: t * {**g}["lr"],
    "keys": lambda t, g: t * len(g.keys() & {"lr", "momentum"}),
}


def assert_as_by_hand(function: Transform, shapes: Sequence[tuple[int, ...]], param_ndim: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    optimizer = ParamTransformingOptimizer(params, pre=function, param_ndim=param_ndim, lr=1.0)
    by_hand = broadcast(function, param_ndim)
    for lr in (1.0, 0.5):
        (group,) = optimizer.param_groups
        group["lr"] = lr
        before = [param.detach().clone() for param in params]
        transformed = [by_hand(grad, {**group, "param": old}) for grad, old in zip(grads, before, strict=True)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        for param, old, each in zip(params, before, transformed, strict=True):
            torch.testing.assert_close(param.detach(), old - lr * each, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elements(name: str, way: str) -> None:
    assert_as_by_hand(ELEMENTWISE[name], SHAPES[way], -1)


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("name", OF_WHOLE)
def test_whole_tensors(name: str, way: str) -> None:
    assert_as_by_hand(OF_WHOLE[name], SHAPES[way], None)


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("name", OF_GROUP)
def test_groups(name: str, way: str) -> None:
    assert_as_by_hand(OF_GROUP[name], SHAPES[way], None)


@pytest.mark.parametrize("ord", [-float("inf"), 0, 0.5, 1, 2, 3, float("inf")])
def test_norms_of_large_tensors(ord: float) -> None:
    assert_as_by_hand(lambda tensor, group: tensor / tensor.norm(ord), [(40, 500), (30, 400)], None)


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize(
    "function", [OF_WHOLE["cat"], OF_WHOLE["stack"], ELEMENTWISE["complex"], OF_GROUP["all items"]]
)
def test_they_are_traced(function: Transform, way: str) -> None:
    params = [torch.ones(shape, requires_grad=True) for shape in SHAPES[way]]
    for param in params:
        param.grad = torch.ones_like(param)
    program = ParamTransformingOptimizer(params, pre=function, param_ndim=None).explain().program
    assert "traced" in program
    assert "as it is" not in program
