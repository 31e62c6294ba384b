"""Transforms that shorten a gradient that is long in comparison with those of earlier steps.

The length is the 2-norm of all tensors of the optimizer together. What it was in earlier steps is in the state, which
is the same for all parameters, also for those without a gradient. NaN and infinite norms are not kept. So there is one
limit for all: with different hyperparameters in different groups, those of the first group count.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from gradchain.contract import Group, State
from gradchain.definition import counted
from gradchain.transform import transform
from gradchain.transforms._numerics import shrinkage
from gradchain.transforms.global_norm import measure_global_norm


def _no_norms(tensor: Tensor, group: Group, *, window: int, **arguments: object) -> State:
    return {"norms": torch.full((window,), math.inf, device=tensor.device, dtype=tensor.real.dtype)}


def _measure_history(
    tensors: Sequence[Tensor], state: State, percentile: float, **arguments: object
) -> tuple[Group, State]:
    length = measure_global_norm(tensors)["global_norm"].to(state["norms"])
    norms = torch.cat([state["norms"][1:], torch.where(length.isfinite(), length, math.inf).reshape(1)])
    return {"length": length, "limit": _percentile(norms, percentile)}, {"norms": norms}


@counted
@transform(init=_no_norms, acts_on="element", measure=_measure_history, measures_shards=True)
def clip_by_history(
    tensor: Tensor,
    group: Group,
    percentile: Annotated[float, Ge(0), Le(100)],
    *,
    window: Annotated[int, Gt(0)] = 1000,
) -> Tensor:
    r"""Scale down so that the norm of all tensors together is at most a percentile of its history.

    .. math:: t \cdot \min(1, c_k / \|T_k\|_2), \quad c_k = \operatorname{percentile}_q(\|T_{k-w+1}\|_2, \dots,
        \|T_k\|_2), \quad T_k \text{ all tensors of the optimizer in step } k

    Acts on each element, by a factor that all tensors share. Called by hand, it sees one tensor. The norm of this step
    is part of the history, so the first step is never shortened.

    Args:
        percentile: The share of norms, in percent, that are at most the limit; from 0 to 100, with linear interpolation
            between norms. The paper finds 10 good.
        window: How many norms are remembered, the latest; above 0. The paper remembers all.

    Raises:
        ValueError: ``percentile`` is not from 0 to 100, or ``window`` is not above 0.

    Example:
        >>> x, clip = torch.tensor([1.0]), clip_by_history(50)
        >>> state = clip.init(x, {})
        >>> for norm in (1.0, 2.0, 9.0):
        ...     result, state = clip.update(norm * x, {}, state)
        >>> result
        tensor([2.])

    References:
        Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation Networks,
        https://arxiv.org/abs/2007.14469, 2020.
    """
    return tensor * _factor(tensor, group)


def _no_moments(tensor: Tensor, group: Group, **arguments: object) -> State:
    moments = {key: torch.zeros((), device=tensor.device, dtype=tensor.real.dtype) for key in ("mean", "variance")}
    return {**moments, "count": torch.zeros((), device=tensor.device, dtype=torch.int64)}


def _measure_zscore(
    tensors: Sequence[Tensor], state: State, threshold: float, decay: float, warmup: int
) -> tuple[Group, State]:
    mean, variance, count = state["mean"], state["variance"], state["count"]
    length = measure_global_norm(tensors)["global_norm"].to(mean)
    deviation = variance.sqrt()
    z = (length - mean) / _positive(deviation)
    is_spike = (z > threshold) & (count >= warmup)
    limit = torch.where(is_spike, mean + threshold * (threshold / z.clamp_min(threshold)) * deviation, length)

    # The plain moments of n norms are moving averages of the weights 1, 1/2, ..., 1/n, by Welford's update.
    is_warm = count < warmup
    weight = torch.where(is_warm, 1 / (count + 1).to(mean.dtype), 1 - decay)
    difference = limit - mean
    spread = torch.where(is_warm, 1 - weight, (1 - weight) ** 2) * difference**2
    counts = length.isfinite()
    return {"length": length, "limit": limit}, {
        "mean": torch.where(counts, mean + weight * difference, mean),
        "variance": torch.where(counts, (1 - weight) * variance + weight * spread, variance),
        "count": count + counts,
    }


@counted
@transform(init=_no_moments, acts_on="element", measure=_measure_zscore, measures_shards=True)
def clip_by_zscore(
    tensor: Tensor,
    group: Group,
    threshold: Annotated[float, Gt(0), Lt(math.inf)],
    *,
    decay: Annotated[float, Ge(0), Lt(1)] = 0.97,
    warmup: Annotated[int, Gt(0)] = 25,
) -> Tensor:
    r"""Scale down where the norm of all tensors together is many standard deviations above its moving average.

    .. math:: t \cdot \frac{c}{\|T\|_2}, \quad c = \mu + \frac{z_{max}^2}{z} \sigma \text{ if }
        z = \frac{\|T\|_2 - \mu}{\sigma} > z_{max}, \text{ else } \|T\|_2

    Acts on each element, by a factor that all tensors share. Called by hand, it sees one tensor. The mean and the
    variance are exponential moving averages over earlier steps of the shortened norm c. In the first ``warmup`` steps
    nothing is shortened, and they are the plain mean and variance of the norms so far, as in the paper; put
    ``clip_by_global_norm`` after it for a bound there. Before it, the statistics would be those of clipped norms, which
    hardly vary, and what is no spike would be shortened.

    Args:
        threshold: The largest z-score that is left alone, in standard deviations; above 0 and finite. The paper
            finds 2.5 good.
        decay: The factor by which older norms count less each step; at least 0 and below 1.
        warmup: How many steps make the first mean and variance; above 0.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> x, clip = torch.tensor([1.0]), clip_by_zscore(2.0, warmup=2)
        >>> state = clip.init(x, {})
        >>> for norm in (1.0, 3.0, 10.0):  # a mean of 2 and a deviation of 1, and then z = 8: 2 + 2 ** 2 / 8
        ...     result, state = clip.update(norm * x, {}, state)
        >>> result
        tensor([2.5000])

    References:
        Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, https://arxiv.org/abs/2504.02507, 2025.
    """
    return tensor * _factor(tensor, group)


def _factor(tensor: Tensor, group: Group) -> Tensor:
    """What makes the limit of a norm above it, with the device and the dtype of ``tensor``."""
    limit = _positive(group["limit"])  # of zeros, so that the factor has a derivative
    return shrinkage(group["length"], limit).to(tensor.device, tensor.real.dtype)


def _percentile(values: Tensor, percent: float) -> Tensor:
    """The percentile of what is finite; by hand, since ``vmap`` cannot map ``torch.nanquantile``."""
    ordered = values.sort().values  # what is finite first
    place = percent / 100 * (values.isfinite().sum() - 1).clamp_min(0).to(values.dtype)
    below, above = (ordered.gather(0, index.long().reshape(1)).squeeze(0) for index in (place.floor(), place.ceil()))
    # Infinite where none is finite: the difference would be NaN.
    return torch.where(below == above, below, below + (place - place.floor()) * (above - below))


def _positive(value: Tensor) -> Tensor:
    """``value``, and the smallest normal number for 0, so that 0 / 0 is 0."""
    return value.clamp_min(torch.finfo(value.dtype).tiny)
