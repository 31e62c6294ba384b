"""The method of Frank and Wolfe: linear minimisation oracles, and the step that they are for.

The oracles ``lmo_l1``, ``lmo_l2`` and ``lmo_linf`` belong into ``pre``. Each returns minus the minimiser of <t, s> over
the unit ball of a norm, so that a descent step goes towards the minimiser. ``frank_wolfe`` in ``post`` makes the step
of ``SGD`` a step of Frank-Wolfe, p <- (1 - gamma) p + gamma s, on the ball whose radius ``scale`` sets:

    >>> from gradchain import ParamTransformingOptimizer, chain, frank_wolfe, lmo_l2, scale
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> optim = ParamTransformingOptimizer(
    ...     [x], pre=chain(lmo_l2(), scale(0.5)), post=frank_wolfe(), param_ndim=None, lr=1.0
    ... )
    >>> schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: 2 / (2 + k))
    >>> x.sum().backward()
    >>> optim.step()
    >>> x
    tensor([-0.3536, -0.3536], requires_grad=True)

Source of all: Jaggi, Revisiting Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, 2013.
"""

import torch
from torch import Tensor

from gradchain.contract import Group
from gradchain.transform import transform
from gradchain.transforms._numerics import unit


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


@transform(acts_on="element")
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


_NOT_PLAIN = ("momentum", "weight_decay", "betas", "eps")
"""Keys with which the step of an optimizer is not its learning rate times the gradient."""


@transform(acts_on="element")
def frank_wolfe(tensor: Tensor, group: Group) -> Tensor:
    r"""Turn a step of ``SGD`` into a step of Frank-Wolfe: to a convex combination of the parameter and a point s.

    .. math:: (1 - \gamma) t + \gamma^2 s = (1 - \gamma) p + \gamma s, \quad t = p + \gamma s, \; s = -g

    Acts on each element, in the slot ``post``, around plain ``torch.optim.SGD``, which makes t of the parameter p. In
    ``group["grad"]`` is what ``pre`` has made of the gradient: minus the point s, as from ``lmo_l2``. The step size
    gamma is ``group["lr"]``, from 0 to 1, and 1 where there is none.

    A parameter of a convex set that holds s stays in it, up to rounding, and with gamma = 1 it is s exactly, from
    wherever it came. ``SGD(lr=gamma, weight_decay=1)`` is the same formula, but it loses the digits of s in a
    difference of large numbers.

    Where ``group["maximize"]`` is set, s is the gradient itself. A parameter without a gradient stays as it is.

    Raises:
        ValueError: The group has momentum, weight decay or a key of another optimizer than ``SGD``, so that t is not
            p + gamma s.

    Example:
        >>> p, s = torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0])
        >>> frank_wolfe()(p + 0.5 * s, {"grad": -s, "lr": 0.5})
        tensor([1.5000, 0.0000])

    References:
        Jaggi, Revisiting Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, 2013.
    """
    if "grad" not in group:
        return tensor.clone()
    grad: Tensor = group["grad"]
    for key in _NOT_PLAIN:
        if group.get(key):
            raise ValueError(
                f'frank_wolfe needs the step of plain SGD, got group["{key}"]={group[key]!r}; use '
                "torch.optim.SGD without momentum and weight_decay"
            )
    gamma: float | Tensor = group.get("lr", 1.0)
    return (1 - gamma) * tensor + (gamma**2 if group.get("maximize", False) else -(gamma**2)) * grad
