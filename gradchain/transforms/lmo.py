"""Linear minimisation oracles, the directions of the Frank-Wolfe method.

Each returns minus the minimiser of <t, s> over the unit ball of a norm, so that a descent step goes towards the
minimiser: with ``chain(lmo_l2(), scale(radius))`` in ``pre`` and ``SGD(lr=gamma, weight_decay=1)``, a step is the
Frank-Wolfe step p <- (1 - gamma) p + gamma s on the ball of that radius. Source of all three: Jaggi, Revisiting
Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, 2013.
"""

import torch
from torch import Tensor

from gradchain.transform import Group, transform
from gradchain.transforms._numerics import normalize_, rewrite_units, unit


@transform
def lmo_l1(tensor: Tensor, group: Group) -> Tensor:
    r"""Keep only the sign of the element of largest magnitude.

    .. math:: -\operatorname{argmin}_{\|s\|_1 \le 1} \langle t, s \rangle = \operatorname{sign}(t_i) e_i,
        \quad i = \operatorname{argmax}_j |t_j|

    Acts on the whole (sub-)tensor, of any shape; of equal magnitudes, the first counts. NaN counts as the largest,
    and has the sign 0.

    Example:
        >>> lmo_l1()(torch.tensor([1.0, -3.0, 3.0]), {})
        tensor([ 0., -1.,  0.])

    References:
        Jaggi, Revisiting Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, 2013.
    """
    flat = tensor.flatten()
    largest = torch.arange(flat.numel(), device=flat.device) == flat.abs().argmax()
    return torch.where(largest, flat.sgn(), 0).reshape(tensor.shape)


@lmo_l1.in_place
def _lmo_l1(tensors: list[Tensor], group: Group) -> None:
    def keep_largest(units: Tensor) -> Tensor:
        largest = units.abs().argmax(dim=1, keepdim=True)
        return torch.zeros_like(units).scatter_(1, largest, units.gather(1, largest).sgn())

    rewrite_units(tensors, group["dim"], keep_largest)


@transform
def lmo_l2(tensor: Tensor, group: Group) -> Tensor:
    r"""Divide by the 2-norm.

    .. math:: -\operatorname{argmin}_{\|s\|_2 \le 1} \langle t, s \rangle = t / \|t\|_2

    Acts on the whole (sub-)tensor, of any shape; zero stays zero. The same as ``normalize()``.

    Example:
        >>> lmo_l2()(torch.tensor([3.0, -4.0]), {})
        tensor([ 0.6000, -0.8000])

    References:
        Jaggi, Revisiting Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, 2013.
    """
    return unit(tensor)


@lmo_l2.in_place
def _lmo_l2(tensors: list[Tensor], group: Group) -> None:
    normalize_(tensors, group["dim"])


@transform(elementwise=True)
def lmo_linf(tensor: Tensor, group: Group) -> Tensor:
    r"""Replace each element by its sign.

    .. math:: -\operatorname{argmin}_{\|s\|_\infty \le 1} \langle t, s \rangle = \operatorname{sign}(t)

    Acts on each element. The same as ``sign()``; NaN becomes 0.

    Example:
        >>> lmo_linf()(torch.tensor([3.0, 0.0, -4.0]), {})
        tensor([ 1.,  0., -1.])

    References:
        Jaggi, Revisiting Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, 2013.
    """
    return tensor.sgn()


@lmo_linf.in_place
def _lmo_linf(tensors: list[Tensor], group: Group) -> None:
    torch._foreach_sign_(tensors)
