"""Norms and guards that several families share."""

import torch
from torch import Tensor


def norm(tensor: Tensor, ord: float = 2.0) -> Tensor:
    """The ``ord``-norm of all entries of ``tensor``."""
    length: Tensor = torch.linalg.vector_norm(tensor, ord)
    return length


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product of all entries: that of the real and imaginary parts where they are complex."""
    return (a.conj() * b).real.sum()


def floor(tensor: Tensor) -> float:
    """The smallest norm to divide by: below it, the squares under a 2-norm are lost to underflow."""
    return float(torch.finfo(tensor.dtype).tiny ** 0.5)
