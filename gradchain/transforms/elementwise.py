"""Transforms of each element by itself."""

import torch
from torch import Tensor

from gradchain.contract import Group
from gradchain.transform import transform


@transform(acts_on="element")
def sign(tensor: Tensor, group: Group) -> Tensor:
    r"""Replace each element by its sign.

    .. math:: \operatorname{sign}(t) = t / |t|, \quad \operatorname{sign}(0) = 0

    Acts on each element; complex elements keep their phase. NaN becomes 0, as in ``torch.sgn``.

    Example:
        >>> sign()(torch.tensor([-3.0, 0.0, 0.1]), {})
        tensor([-1.,  0.,  1.])

    References:
        Goodfellow et al., Explaining and Harnessing Adversarial Examples, https://arxiv.org/abs/1412.6572, 2014.
    """
    return torch.sgn(tensor)


@transform(acts_on="element")
def scale(tensor: Tensor, group: Group, factor: float) -> Tensor:
    r"""Multiply by ``factor``.

    .. math:: c \, t

    Acts on each element.

    Args:
        factor: The factor, in units of result over input. Any number.

    Example:
        >>> scale(-2.0)(torch.tensor([1.0, -3.0]), {})
        tensor([-2.,  6.])

    References:
        optax ``scale``.
    """
    return tensor * factor


@transform(acts_on="element")
def add(tensor: Tensor, group: Group, bias: float) -> Tensor:
    r"""Add ``bias`` to each element.

    .. math:: t + b

    Acts on each element.

    Args:
        bias: What is added, in units of the tensor. Any number.

    Example:
        >>> add(1.0)(torch.tensor([1.0, -3.0]), {})
        tensor([ 2., -2.])
    """
    return tensor + bias


@transform(acts_on="element")
def clamp(tensor: Tensor, group: Group, min: float | None = None, max: float | None = None) -> Tensor:
    r"""Move each element into [``min``, ``max``].

    .. math:: \max(\min(t, t_{max}), t_{min})

    Acts on each element. NaN stays NaN.

    Args:
        min: The lower bound, in units of the tensor; None for no bound.
        max: The upper bound, at least ``min``; None for no bound.

    Raises:
        ValueError: There is no bound, or ``min > max``.
        TypeError: The tensor is complex.

    Example:
        >>> clamp(-1.0, 1.0)(torch.tensor([-2.0, 0.5, 3.0]), {})
        tensor([-1.0000,  0.5000,  1.0000])

    References:
        torch ``clamp``; optax ``clip``.
    """
    return tensor.clamp(min, max)


@clamp.check
def _bounds(min: float | None, max: float | None) -> None:
    if min is None and max is None:
        raise ValueError("needs at least one bound, got min=None and max=None")
    if min is not None and max is not None and not min <= max:
        raise ValueError(f"needs min <= max, got min={min!r} and max={max!r}")


@transform(acts_on="element")
def set_to_zero(tensor: Tensor, group: Group) -> Tensor:
    r"""Replace each element by zero.

    .. math:: 0

    Acts on each element, NaN and infinity included. In ``update``, a parameter stays where it is: see ``freeze``.

    Example:
        >>> set_to_zero()(torch.tensor([3.0, -1.0]), {})
        tensor([0., 0.])

    References:
        optax ``set_to_zero``.
    """
    return torch.zeros_like(tensor)


@transform(acts_on="element")
def zero_nonfinite(tensor: Tensor, group: Group) -> Tensor:
    r"""Replace NaN and infinite elements by zero.

    .. math:: t \text{ if } t \text{ is finite, else } 0

    Acts on each element.

    Example:
        >>> zero_nonfinite()(torch.tensor([float("nan"), 1.0, float("inf")]), {})
        tensor([0., 1., 0.])

    References:
        optax ``zero_nans``, which keeps infinities.
    """
    return torch.where(tensor.isfinite(), tensor, 0)
