"""Formulas that several families share."""

import math

import torch
from torch import Tensor

from gradchain._norms import norm
from gradchain.contract import note_acting


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
    note_acting(length > limit)
    if not isinstance(limit, Tensor) and limit == 0:
        return torch.zeros_like(length)  # which has a derivative
    is_finite = limit < math.inf
    power = -is_finite.to(length.dtype) if isinstance(is_finite, Tensor) else -1.0 if is_finite else 0.0
    excess = length.clamp_min(torch.finfo(length.dtype).tiny) / limit  # of zero over zero too
    return excess.clamp_min(1) ** power  # and any number to the power of 0 is 1, NaN too
