"""Norms that keep their digits for long tensors, where those of torch lose them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def norm(
    tensor: Tensor,
    ord: float = 2.0,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.linalg.vector_norm``, to the last digits: over all entries, or over the dimensions ``dim``."""
    size = tensor.numel() if dim is None else math.prod([tensor.shape[d] for d in dim])
    if not (tensor.is_cpu and is_long(size, ord)):
        return torch.linalg.vector_norm(tensor, ord, dim, keepdim, dtype=dtype)  # type: ignore[no-any-return]
    over = {d % tensor.ndim for d in (range(tensor.ndim) if dim is None else dim)}
    kept = [d for d in range(tensor.ndim) if d not in over]
    # In the order in which they lie in memory, so that channels_last copies nothing.
    ordered = sorted(over, key=tensor.stride, reverse=True)
    lengths = tensor.permute(*kept, *ordered).flatten(len(kept))
    row = 1024 if ord == 2 else 256  # of the other orders torch loses more digits, and they take longer anyway
    while lengths.shape[-1] > row:
        rest = lengths.shape[-1] % row
        rows = lengths[..., :-rest] if rest else lengths
        shorter = torch.linalg.vector_norm(rows.unflatten(-1, (-1, row)), ord, dim=-1, dtype=dtype)
        if rest:
            end = torch.linalg.vector_norm(lengths[..., -rest:], ord, dim=-1, keepdim=True, dtype=dtype)
            shorter = torch.cat([shorter, end], dim=-1)
        lengths = shorter
    length: Tensor = torch.linalg.vector_norm(lengths, ord, dim=-1)
    return length.reshape([1 if d in over else tensor.shape[d] for d in range(tensor.ndim)]) if keepdim else length


def is_long(size: int, ord: float = 2.0) -> bool:
    """Whether torch would lose digits of the norm of ``size`` elements on the CPU.

    There each thread adds up its elements one after the other: the 2-norm of 1e7 elements in float32 is off by
    4e-4, their 1-norm by 6e-3, and where all elements are equal, 2**14 elements are enough for 1e-5. What is counted
    or compared, as by the orders 0 and inf, loses none.
    """
    return size >= _shortest(ord)


def _shortest(ord: float) -> float:
    return math.inf if ord in (0, math.inf, -math.inf) else 2**14 if ord == 2 else 2**12


def norms(
    tensors: Sequence[Tensor], ord: float = 2.0, *, dtype: torch.dtype | None = None
) -> list[Tensor] | tuple[Tensor, ...]:
    """The norm of all entries of each tensor."""
    shortest = _shortest(ord)
    short = [tensor for tensor in tensors if tensor.numel() < shortest or not tensor.is_cpu]
    rest = torch._foreach_norm(short, ord, dtype=dtype) if short else ()
    if len(rest) == len(tensors):
        return rest
    lengths = iter(rest)
    return [
        norm(tensor, ord, dtype=dtype) if tensor.is_cpu and tensor.numel() >= shortest else next(lengths)
        for tensor in tensors
    ]
