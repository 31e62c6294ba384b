"""Norms and guards that several families share: for one tensor, and for the lists of in-place rules."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradchain.transform import Dim


def norm(tensor: Tensor, ord: float = 2.0, dtype: torch.dtype | None = None) -> Tensor:
    """The ``ord``-norm of all entries of ``tensor``."""
    if is_long(tensor, tensor.numel(), ord):
        return _norm_of_norms(tensor, ord, 0, dtype)
    length: Tensor = torch.linalg.vector_norm(tensor, ord, dtype=dtype)
    return length


def is_long(tensor: Tensor, size: int, ord: float = 2.0) -> bool:
    """Whether torch would lose digits of the norm of ``size`` elements.

    On the CPU each thread adds up its elements one after the other: the 2-norm of 1e7 elements in float32 is off by
    4e-4, their 1-norm by 6e-3, and where all elements are equal, 2**14 elements are enough for 1e-5.
    """
    return size >= (2**14 if ord == 2 else 2**12) and tensor.is_cpu and ord != math.inf


def _norm_of_norms(tensor: Tensor, ord: float, split: int, dtype: torch.dtype | None = None) -> Tensor:
    """The ``ord``-norm over the dimensions from ``split`` on, as the norm of the norms of rows: in the same time."""
    if not tensor.is_contiguous():  # in the order in which they lie in memory, so that channels_last copies nothing
        dims = sorted(range(split, tensor.ndim), key=lambda dim: tensor.stride(dim), reverse=True)
        tensor = tensor.permute(*range(split), *dims)
    row = 1024 if ord == 2 else 256  # of the other orders torch loses more digits, and they take longer anyway
    lengths = tensor.flatten(split)
    while lengths.shape[-1] > row:
        rest = lengths.shape[-1] % row
        rows = lengths[..., :-rest] if rest else lengths
        shorter = torch.linalg.vector_norm(rows.reshape(*rows.shape[:-1], -1, row), ord, dim=-1, dtype=dtype)
        if rest:
            end = torch.linalg.vector_norm(lengths[..., -rest:], ord, dim=-1, keepdim=True, dtype=dtype)
            shorter = torch.cat([shorter, end], dim=-1)
        lengths = shorter
    length: Tensor = torch.linalg.vector_norm(lengths, ord, dim=-1)
    return length


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product of all entries: that of the real and imaginary parts where they are complex."""
    return (a.conj() * b).real.sum()


def floor(tensor: Tensor, ord: float = 2.0) -> float:
    """The smallest norm to divide by: below it, the powers under an ``ord``-norm are lost to underflow."""
    tiny = torch.finfo(tensor.dtype).tiny
    return float(tiny ** (1 / ord)) if 1 < ord < math.inf else tiny


def unit(tensor: Tensor, ord: float = 2.0) -> Tensor:
    """``tensor`` over its ``ord``-norm; zero for zero."""
    return tensor / norm(tensor, ord).clamp_min(floor(tensor, ord))


def shorten(tensor: Tensor, length: Tensor, limit: float | Tensor) -> Tensor:
    """``tensor``, scaled down by as much as ``length`` is above ``limit``."""
    return tensor * shrinkage(length, limit)


def shrinkage(length: Tensor, limit: float | Tensor) -> Tensor:
    """The factor that makes ``limit`` of a ``length`` above it, else 1; the limit is at least 0.

    An infinite limit leaves everything as it is: lengths that overflow, or are NaN, too.
    """
    if not isinstance(limit, Tensor) and 0 < limit < math.inf:
        return 1 / (length / limit).clamp_min(1)  # the same, in fewer operations
    inside = (length <= limit) | (limit == math.inf)
    return torch.where(inside, 1, limit / torch.where(inside, 1, length))


def norms(tensors: list[Tensor], dim: Dim, ord: float = 2.0) -> list[Tensor]:
    """The ``ord``-norm of each unit of each tensor, over its dimensions ``dim``: numbers, or so that they broadcast."""
    if dim is None:
        return whole_norms(tensors, ord)
    if dim == ():
        return list(torch._foreach_abs(tensors))
    return [
        _norm_of_norms(tensor, ord, tensor.ndim - len(dim)).reshape(*tensor.shape[: -len(dim)], *[1] * len(dim))
        if is_long(tensor, count(tensor, dim), ord)
        else torch.linalg.vector_norm(tensor, ord, dim, keepdim=True)
        for tensor in tensors
    ]


def whole_norms(tensors: list[Tensor], ord: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The ``ord``-norm of all entries of each tensor."""
    if not is_long(tensors[0], max(map(Tensor.numel, tensors)), ord):
        return list(torch._foreach_norm(tensors, ord, dtype=dtype))
    long = [is_long(tensor, tensor.numel(), ord) for tensor in tensors]
    short = [tensor for tensor, is_one in zip(tensors, long, strict=True) if not is_one]
    rest = iter(torch._foreach_norm(short, ord, dtype=dtype) if short else ())
    return [norm(tensor, ord, dtype) if is_one else next(rest) for tensor, is_one in zip(tensors, long, strict=True)]


def rms(tensors: list[Tensor], dim: Dim) -> list[Tensor]:
    """The root mean square of each unit of each tensor; see ``norms``."""
    lengths = norms(tensors, dim)
    torch._foreach_div_(lengths, [math.sqrt(count(tensor, dim)) for tensor in tensors])
    return lengths


def count(tensor: Tensor, dim: Dim) -> int:
    """The number of elements of a unit."""
    return tensor.numel() if dim is None else math.prod([tensor.shape[d] for d in dim])


def combine(function: Callable[..., Tensor], *lengths: list[Tensor]) -> list[Tensor]:
    """``function`` of the first of each list, of the second, ...: elementwise, so that numbers can be stacked."""
    if lengths[0][0].ndim == 0 and len(lengths[0]) > 1:
        return list(function(*map(torch.stack, lengths)).unbind())
    return [function(*each) for each in zip(*lengths, strict=True)]


def shorten_(tensors: list[Tensor], lengths: list[Tensor], limit: float | Tensor) -> None:
    """Scale each tensor down by as much as its length is above ``limit``."""
    if isinstance(limit, Tensor) or limit == 0:
        torch._foreach_mul_(tensors, combine(lambda length: shrinkage(length, limit), lengths))
    elif limit < math.inf:
        torch._foreach_clamp_min_(lengths, limit)
        if limit != 1:
            torch._foreach_div_(lengths, as_operand(limit, lengths))
        divide_(tensors, lengths)


def divide_(tensors: list[Tensor], divisors: list[Tensor]) -> None:
    """Divide each tensor by its divisor, which is overwritten."""
    # A product takes half the time of a quotient, which is worth a pass over divisors that are few.
    if tensors[0].numel() >= max(2**14, 64 * divisors[0].numel()):
        torch._foreach_reciprocal_(divisors)
        torch._foreach_mul_(tensors, divisors)
    else:
        torch._foreach_div_(tensors, divisors)


def normalize_(tensors: list[Tensor], dim: Dim, ord: float = 2.0) -> None:
    """Divide each unit of each tensor by its ``ord``-norm."""
    lengths = norms(tensors, dim, ord)
    torch._foreach_clamp_min_(lengths, floor(tensors[0], ord))
    divide_(tensors, lengths)


def clamp_(tensors: list[Tensor], min: float | None, max: float | None) -> None:
    """Move each element into [``min``, ``max``]."""
    if len(tensors) == 1 or isinstance(min, Tensor) or isinstance(max, Tensor):
        for tensor in tensors:
            tensor.clamp_(min, max)  # one pass over what may be large
        return
    if min is not None:
        torch._foreach_clamp_min_(tensors, min)
    if max is not None:
        torch._foreach_clamp_max_(tensors, max)


def as_operand(value: float | Tensor, tensors: list[Tensor]) -> float | Tensor:
    """``value`` for a ``_foreach`` function; on the CPU as a tensor, where each tensor would have one made of it."""
    is_worth_it = len(tensors) > 4 and tensors[0].is_cpu
    return torch.as_tensor(value, dtype=tensors[0].dtype) if is_worth_it else value


def inner_units(a: Tensor, b: Tensor, dim: Dim) -> Tensor:
    """The inner product of each unit of ``a`` with that of ``b``: a number, or so that it broadcasts."""
    product = a * b
    return product if dim == () else product.sum(dim, keepdim=dim is not None)


def rewrite_units(tensors: list[Tensor], dim: Dim, function: Callable[[Tensor], Tensor]) -> None:
    """Overwrite each tensor by ``function`` of its units, flattened and stacked: of shape (N, n)."""
    for tensor in tensors:
        size = count(tensor, dim)
        tensor.copy_(function(tensor.reshape(tensor.numel() // size, size)).reshape(tensor.shape))
