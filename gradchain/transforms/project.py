r"""Euclidean projections: each returns the point of a set that is nearest to the tensor.

They act on the whole (sub-)tensor, of any shape, unless they act on each element.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from gradchain._norms import norm
from gradchain.contract import Group, State, compute_dtype
from gradchain.transform import transform
from gradchain.transforms._numerics import floor, inner, shorten


@transform(acts_on="element")
def project_nonnegative(tensor: Tensor, group: Group) -> Tensor:
    r"""Replace negative elements by zero.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } x \ge 0

    Acts on each element.

    Raises:
        TypeError: The tensor is complex.

    Example:
        >>> project_nonnegative()(torch.tensor([-1.0, 2.0]), {})
        tensor([0., 2.])

    References:
        optax ``projection_non_negative``.
    """
    return tensor.clamp_min(0)


@transform(acts_on="element")
def project_box(tensor: Tensor, group: Group, lower: float | Tensor, upper: float | Tensor) -> Tensor:
    r"""Move each element into [``lower``, ``upper``].

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } l \le x \le u

    Acts on each element.

    Args:
        lower: The lower bounds, in units of the tensor: a number, or a tensor that broadcasts to the whole tensor, as
            bounds are matched with elements whatever the ``param_ndim``.
        upper: The upper bounds, likewise; at least ``lower``.

    Raises:
        ValueError: ``lower > upper`` somewhere.
        TypeError: The tensor is complex.

    Example:
        >>> project_box(torch.tensor([0.0, -1.0]), 1.0)(torch.tensor([-2.0, -0.5]), {})
        tensor([ 0.0000, -0.5000])

    References:
        optax ``projection_box``.
    """
    return torch.clamp(tensor, _like(lower, tensor), _like(upper, tensor))


@project_box.check
def _box(lower: float | Tensor, upper: float | Tensor) -> None:
    if torch.any(torch.as_tensor(lower) > torch.as_tensor(upper)):
        raise ValueError(f"needs lower <= upper, got lower={lower!r} and upper={upper!r}")


@transform(acts_on="element")
def project_linf_ball(tensor: Tensor, group: Group, radius: Annotated[float, Ge(0)]) -> Tensor:
    r"""Move each element into [``-radius``, ``radius``].

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_\infty \le r

    Acts on each element.

    Args:
        radius: The radius of the ball, in units of the tensor; at least 0, and infinite for no limit. That of
            radius 0 is the point 0.

    Raises:
        ValueError: ``radius`` is below 0.
        TypeError: The tensor is complex.

    Example:
        >>> project_linf_ball(1.0)(torch.tensor([-2.0, 0.5]), {})
        tensor([-1.0000,  0.5000])

    References:
        optax ``projection_linf_ball``.
    """
    return tensor.clamp(-radius, radius)


@transform
def project_l2_ball(tensor: Tensor, group: Group, radius: Annotated[float, Ge(0)]) -> Tensor:
    r"""Scale down so that the 2-norm is at most ``radius``.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_2 \le r

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        radius: The radius of the ball, in units of the tensor; at least 0, and infinite for no limit. That of
            radius 0 is the point 0.

    Raises:
        ValueError: ``radius`` is below 0.

    Example:
        >>> project_l2_ball(1.0)(torch.tensor([3.0, 4.0]), {})
        tensor([0.6000, 0.8000])

    References:
        optax ``projection_l2_ball``.
    """
    return shorten(tensor, norm(tensor), radius)


@transform
def project_l2_sphere(tensor: Tensor, group: Group, radius: Annotated[float, Gt(0), Lt(math.inf)]) -> Tensor:
    r"""Scale so that the 2-norm is ``radius``.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_2 = r

    Acts on the whole (sub-)tensor, of any shape. All points are nearest to zero; it goes to the one of equal elements.

    Args:
        radius: The radius of the sphere, in units of the tensor; above 0 and finite.

    Raises:
        ValueError: ``radius`` is not above 0 and finite.

    Example:
        >>> project_l2_sphere(1.0)(torch.tensor([0.0, 0.5]), {})
        tensor([0., 1.])

    References:
        optax ``projection_l2_sphere``.
    """
    length = norm(tensor)
    least = floor(tensor)
    return radius * torch.where(length < least, tensor.numel() ** -0.5, tensor / length.clamp_min(least))


@transform
def project_l1_ball(tensor: Tensor, group: Group, radius: Annotated[float, Ge(0)]) -> Tensor:
    r"""Shrink the magnitudes, all by the same amount, so that the 1-norm is at most ``radius``.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_1 \le r

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        radius: The radius of the ball, in units of the tensor; at least 0, and infinite for no limit. That of
            radius 0 is the point 0.

    Raises:
        ValueError: ``radius`` is below 0.

    Example:
        >>> project_l1_ball(1.0)(torch.tensor([2.0, -1.5, 0.1]), {})
        tensor([ 0.7500, -0.2500,  0.0000])

    References:
        Duchi et al., Efficient Projections onto the l1-Ball, https://doi.org/10.1145/1390156.1390191, 2008; optax
        ``projection_l1_ball``.
    """
    return _onto_l1_ball(tensor.flatten(), radius).reshape(tensor.shape)


@transform
def project_l1_sphere(tensor: Tensor, group: Group, radius: Annotated[float, Gt(0), Lt(math.inf)]) -> Tensor:
    r"""Shift the magnitudes, all by the same amount, so that the 1-norm is ``radius``.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_1 = r

    Acts on the whole (sub-)tensor, of any shape. An element that is zero counts as positive.

    Args:
        radius: The radius of the sphere, in units of the tensor; above 0 and finite.

    Raises:
        ValueError: ``radius`` is not above 0 and finite.

    Example:
        >>> project_l1_sphere(1.0)(torch.tensor([0.3, -0.1]), {})
        tensor([ 0.6000, -0.4000])

    References:
        Duchi et al., Efficient Projections onto the l1-Ball, https://doi.org/10.1145/1390156.1390191, 2008; optax
        ``projection_l1_sphere``.
    """
    return _onto_l1_sphere(tensor.flatten(), radius).reshape(tensor.shape)


@transform
def project_simplex(tensor: Tensor, group: Group, scale: Annotated[float, Gt(0), Lt(math.inf)] = 1.0) -> Tensor:
    r"""Shift all elements by the same amount and cut at zero, so that they are weights that sum to ``scale``.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } x \ge 0, \; \textstyle\sum_i x_i = s

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        scale: The sum of the elements of the result, in units of the tensor; above 0 and finite.

    Raises:
        ValueError: ``scale`` is not above 0 and finite.
        TypeError: The tensor is complex.

    Example:
        >>> project_simplex()(torch.tensor([0.5, 1.0, -1.0]), {})
        tensor([0.2500, 0.7500, 0.0000])

    References:
        Duchi et al., Efficient Projections onto the l1-Ball, https://doi.org/10.1145/1390156.1390191, 2008; optax
        ``projection_simplex``.
    """
    return _onto_simplex(tensor.flatten(), scale).reshape(tensor.shape)


@transform
def project_hyperplane(tensor: Tensor, group: Group, a: float | Tensor, b: float) -> Tensor:
    r"""Move along ``a`` onto the hyperplane <a, x> = b.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \langle a, x \rangle = b

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        a: The normal of the hyperplane: a number, or a tensor that broadcasts to the (sub-)tensor; not zero.
        b: The offset, in units of <a, tensor>.

    Raises:
        ValueError: ``a`` is zero.

    Example:
        >>> project_hyperplane(1.0, 0.0)(torch.tensor([1.0, 3.0]), {})
        tensor([-1.,  1.])

    References:
        optax ``projection_hyperplane``.
    """
    normal = _like(a, tensor).expand(tensor.shape)
    return tensor - (inner(normal, tensor) - b) / inner(normal, normal) * normal


@transform
def project_halfspace(tensor: Tensor, group: Group, a: float | Tensor, b: float) -> Tensor:
    r"""Move along ``a`` into the halfspace <a, x> <= b, if outside.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \langle a, x \rangle \le b

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        a: The outward normal of the halfspace: a number, or a tensor that broadcasts to the (sub-)tensor; not zero.
        b: The offset, in units of <a, tensor>.

    Raises:
        ValueError: ``a`` is zero.

    Example:
        >>> below = project_halfspace(torch.tensor([0.0, 1.0]), 2.0)
        >>> below(torch.tensor([1.0, 3.0]), {}), below(torch.tensor([1.0, 1.0]), {})
        (tensor([1., 2.]), tensor([1., 1.]))

    References:
        optax ``projection_halfspace``.
    """
    normal = _like(a, tensor).expand(tensor.shape)
    return tensor - (inner(normal, tensor) - b).clamp_min(0) / inner(normal, normal) * normal


@project_hyperplane.check
@project_halfspace.check
def _normal(a: float | Tensor, **arguments: Any) -> None:
    if not torch.as_tensor(a).any():
        raise ValueError(f"needs a normal that is not zero, got a={a!r}")


def _at_reference(
    tensor: Tensor, group: Group, *, reference: Tensor | Sequence[Tensor] | None, **arguments: Any
) -> Tensor:
    if reference is None:
        return tensor
    if isinstance(reference, Tensor):
        chosen = reference
    else:
        index = group.get("index")
        if index is None or index >= len(reference):
            raise ValueError(
                f"project_ball_around_reference has a reference for each of {len(reference)} parameters, and none for "
                f"{'a tensor without a number' if index is None else f'number {index}'}; give one for each parameter"
            )
        chosen = reference[index]
    try:
        return chosen.detach().to(tensor.device, compute_dtype(tensor.dtype)).expand(tensor.shape)
    except RuntimeError:
        raise ValueError(
            f"project_ball_around_reference needs a reference that broadcasts to its parameter of shape "
            f"{tuple(tensor.shape)}, got shape {tuple(chosen.shape)}"
        ) from None


def _remember(tensor: Tensor, group: Group, **arguments: Any) -> State:
    return {"reference": tensor.clone()}


@transform(init=_remember, start=_at_reference)
def project_ball_around_reference(
    tensor: Tensor,
    group: Group,
    state: State,
    radius: Annotated[float, Ge(0)],
    *,
    reference: Tensor | Sequence[Tensor] | None = None,
    ord: float = 2,
    lower: float | None = None,
    upper: float | None = None,
) -> tuple[Tensor, State]:
    r"""Move into the ball of ``radius`` around a reference, and then into a box.

    .. math:: \operatorname{clamp}(\operatorname{argmin}_x \|x - t\|_2 \text{ subject to }
        \|x - x_0\|_{ord} \le r, \; l, u)

    Acts on the whole (sub-)tensor, of any shape; the state holds the reference, x_0. What attacks need: the parameter
    is the image that is attacked, and the box holds the legal pixels. A box that has x_0 inside never leads out of a
    ball; the result is the nearest point of both where the ball is a box too, ``ord=inf``.

    Args:
        radius: The radius of the ball, in units of the tensor; at least 0, and infinite for no limit.
        reference: x_0: a tensor that broadcasts to the parameter, or a sequence of one for each parameter, in their
            order. None for what the parameter is when the optimizer is constructed, ``attach`` is called or a group is
            added, so before a random start; by hand, for what ``init`` is given. A loaded state brings its own.
        ord: The order of the norm: 1, 2 or inf.
        lower: The lower bound of each element, in units of the tensor; None for no bound.
        upper: The upper bound of each element, at least ``lower``; None for no bound.

    Raises:
        ValueError: ``radius`` is below 0, ``ord`` is none of 1, 2 and inf, ``lower > upper``, or ``reference`` does
            not fit the parameters.
        TypeError: The tensor is complex, and ``ord`` is not 2 or there are bounds.

    Example:
        >>> project = project_ball_around_reference(1.0, upper=2.0)
        >>> state = project.init(torch.tensor([1.0, 1.5]), {})
        >>> project.update(torch.tensor([4.0, 5.5]), {}, state)[0]
        tensor([1.6000, 2.0000])

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, https://arxiv.org/abs/1706.06083,
        2017.
    """
    way = tensor - state["reference"]
    if ord == 1:
        short = _onto_l1_ball(way.flatten(), radius).reshape(way.shape)
    elif ord == 2:
        short = shorten(way, norm(way), radius)
    else:
        short = way.clamp(-radius, radius)
    projected = torch.where(short == way, tensor, state["reference"] + short)  # exactly as it was where it was inside
    if lower is not None:
        projected = projected.clamp_min(lower)
    return projected if upper is None else projected.clamp_max(upper), state


@project_ball_around_reference.check
def _ball_and_box(ord: float, lower: float | None, upper: float | None, reference: Any, **arguments: Any) -> None:
    if isinstance(reference, Sequence) and not all(isinstance(each, Tensor) for each in reference):
        raise TypeError(f"needs tensors as references, got reference={reference!r}")
    if ord not in (1, 2, math.inf):
        raise ValueError(f"needs ord 1, 2 or inf, got ord={ord!r}")
    if lower is not None and upper is not None and not lower <= upper:
        raise ValueError(f"needs lower <= upper, got lower={lower!r} and upper={upper!r}")


def _onto_l1_ball(units: Tensor, radius: float) -> Tensor:
    magnitude = units.abs()
    length = magnitude.sum(-1, keepdim=True)
    return units.sgn() * torch.where(length > radius, _onto_simplex(magnitude, radius), magnitude)


def _onto_l1_sphere(units: Tensor, radius: float) -> Tensor:
    magnitude = units.abs()
    sign = torch.where(magnitude > 0, units.sgn(), 1)
    return sign * _onto_simplex(magnitude, radius)


def _onto_simplex(units: Tensor, total: float) -> Tensor:
    """Subtract, along the last dimension, what makes the positive elements that are left sum to ``total``.

    That is the largest of the candidates (s_k - total) / k, where s_k is the sum of the k largest elements.
    """
    shifted = units - units.amax(-1, keepdim=True)  # the same projection, without the rounding of large numbers
    descending = shifted.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, units.shape[-1] + 1, device=units.device)
    return (shifted - ((descending.cumsum(-1) - total) / ranks).amax(-1, keepdim=True)).clamp_min(0)


def _like(value: float | Tensor, tensor: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
