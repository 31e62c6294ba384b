r"""Euclidean projections: each returns the point of a set that is nearest to the tensor.

They act on the whole (sub-)tensor, of any shape, unless they are elementwise.
"""

import math
from typing import Annotated, Any

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from gradchain.transform import Group, transform
from gradchain.transforms._numerics import floor, inner, norm


@transform(elementwise=True, real_only=True)
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


@transform(elementwise=True, real_only=True)
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


@transform(elementwise=True, real_only=True)
def project_linf_ball(tensor: Tensor, group: Group, radius: Annotated[float, Gt(0)]) -> Tensor:
    r"""Move each element into [``-radius``, ``radius``].

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_\infty \le r

    Acts on each element.

    Args:
        radius: The radius of the ball, in units of the tensor; above 0, and infinite for no limit.

    Raises:
        ValueError: ``radius`` is not above 0.
        TypeError: The tensor is complex.

    Example:
        >>> project_linf_ball(1.0)(torch.tensor([-2.0, 0.5]), {})
        tensor([-1.0000,  0.5000])

    References:
        optax ``projection_linf_ball``.
    """
    return tensor.clamp(-radius, radius)


@transform
def project_l2_ball(tensor: Tensor, group: Group, radius: Annotated[float, Gt(0)]) -> Tensor:
    r"""Scale down so that the 2-norm is at most ``radius``.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_2 \le r

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        radius: The radius of the ball, in units of the tensor; above 0, and infinite for no limit.

    Raises:
        ValueError: ``radius`` is not above 0.

    Example:
        >>> project_l2_ball(1.0)(torch.tensor([3.0, 4.0]), {})
        tensor([0.6000, 0.8000])

    References:
        optax ``projection_l2_ball``.
    """
    return tensor / (norm(tensor) / radius).clamp_min(1)


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
def project_l1_ball(tensor: Tensor, group: Group, radius: Annotated[float, Gt(0)]) -> Tensor:
    r"""Shrink the magnitudes, all by the same amount, so that the 1-norm is at most ``radius``.

    .. math:: \operatorname{argmin}_x \|x - t\|_2 \text{ subject to } \|x\|_1 \le r

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        radius: The radius of the ball, in units of the tensor; above 0, and infinite for no limit.

    Raises:
        ValueError: ``radius`` is not above 0.

    Example:
        >>> project_l1_ball(1.0)(torch.tensor([2.0, -1.5, 0.1]), {})
        tensor([ 0.7500, -0.2500,  0.0000])

    References:
        Duchi et al., Efficient Projections onto the l1-Ball, https://doi.org/10.1145/1390156.1390191, 2008; optax
        ``projection_l1_ball``.
    """
    magnitude = tensor.abs()
    return tensor.sgn() * (magnitude - _simplex_threshold(magnitude, radius).clamp_min(0)).clamp_min(0)


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
    magnitude = tensor.abs()
    sign = torch.where(magnitude > 0, tensor.sgn(), 1)
    return sign * (magnitude - _simplex_threshold(magnitude, radius)).clamp_min(0)


@transform(real_only=True)
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
    return (tensor - _simplex_threshold(tensor, scale)).clamp_min(0)


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


def _simplex_threshold(tensor: Tensor, total: float) -> Tensor:
    """The amount to subtract from all elements so that the positive ones that are left sum to ``total``.

    It is the largest of the candidates (s_k - total) / k, where s_k is the sum of the k largest elements.
    """
    descending = tensor.flatten().sort(descending=True).values
    count = torch.arange(1, descending.numel() + 1, device=tensor.device)
    return ((descending.cumsum(0) - total) / count).amax()


def _like(value: float | Tensor, tensor: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
