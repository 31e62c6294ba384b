"""Transforms of the update, for the slot ``update``: of what the inner optimizer adds to a parameter.

There ``group["param"]`` is the parameter before the step, and ``group["grad"]`` the gradient that the step was made
with. The update has the learning rate, and a minus sign, in it.
"""

import math
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from gradchain._norms import norm
from gradchain.contract import Group, State
from gradchain.transform import transform


@transform(acts_on="tensor")
def cautious(tensor: Tensor, group: Group) -> Tensor:
    r"""Zero the elements of an update that do not go down the gradient, and scale up the others in proportion.

    .. math:: u \odot \frac{m}{\max(\operatorname{mean}(m), 0.001)}, \quad m_i = [u_i g_i < 0]

    Acts on the whole tensor, of any shape, whatever the ``param_ndim`` of the group, and reads ``group["grad"]``: in
    the slot ``update``, the gradient after ``pre``. Where ``group["maximize"]`` is set, elements go up the gradient.

    It masks all of an update, and so the weight decay that AdamW has in it, too. The paper decays all elements: take
    Adam, and ``chain(cautious(), decay_weights(lr * weight_decay))``.

    Raises:
        ValueError: There is no ``group["grad"]``.

    Example:
        >>> cautious()(torch.tensor([-0.1, 0.2]), {"grad": torch.tensor([1.0, 1.0])})
        tensor([-0.2000,  0.0000])

    References:
        Liang et al., Cautious Optimizers: Improving Training with One Line of Code, https://arxiv.org/abs/2411.16085,
        2024.
    """
    # Of signs, since a product of small numbers can be lost to underflow.
    agreement = _agreement(tensor, group["grad"])
    mask = (agreement > 0 if group.get("maximize", False) else agreement < 0).to(tensor.real.dtype)
    return tensor * (mask / mask.mean().clamp_min(1e-3))


@transform(acts_on="tensor")
def trust_ratio(
    tensor: Tensor,
    group: Group,
    min: Annotated[float, Ge(0)] = 0.0,
    max: Annotated[float, Ge(0)] = math.inf,
    *,
    lr_included: bool = True,
) -> Tensor:
    r"""Scale the update to the norm of the parameter, layer by layer.

    .. math:: u \cdot \operatorname{clamp}(\eta \|p\|_2 / \|u\|_2, r_{min}, r_{max})

    Acts on the whole tensor, of any shape, whatever the ``param_ndim`` of the group, and reads ``group["param"]``. The
    ratio is 1 where either norm is 0.

    An update has the learning rate in it already, and u / ||u|| would lose it: the ratio is that of the parameter to
    the update without its learning rate, ``group["lr"]``, which is 1 where there is none. With Adam inside this is
    LAMB. For LARS in ``pre``, where the learning rate is still to come, say ``lr_included=False``. The ratio of LARS is
    that of a gradient with the weight decay in it: put ``lambda tensor, group: tensor + rate * group["param"]`` before.
    The ``weight_decay`` of ``SGD`` would come after the ratio.

    Args:
        min: The smallest ratio; at least 0.
        max: The largest ratio; at least ``min``, and infinite for no limit. The LAMB of the paper's authors has 10.
        lr_included: Whether the tensor has the learning rate in it; else eta is 1.

    Raises:
        ValueError: ``min`` is below 0 or above ``max``, or there is no ``group["param"]``.

    Example:
        >>> update, param = torch.tensor([0.0, -0.1]), torch.tensor([3.0, 4.0])
        >>> trust_ratio()(update, {"param": param, "lr": 0.01})
        tensor([ 0.0000, -0.0500])
        >>> trust_ratio(max=10.0)(update, {"param": param})
        tensor([ 0., -1.])

    References:
        You et al., Large Batch Optimization for Deep Learning (LAMB), https://arxiv.org/abs/1904.00962, 2019; You et
        al., Large Batch Training of Convolutional Networks (LARS), https://arxiv.org/abs/1708.03888, 2017; optax
        ``scale_by_trust_ratio``.
    """
    lr = group.get("lr", 1.0) if lr_included else 1.0
    return tensor * _ratio(norm(group["param"]), norm(tensor), lr, min, max)


def _ratio(param_norm: Tensor, update_norm: Tensor, lr: float | Tensor, min: float, max: float) -> Tensor:
    defined = (param_norm > 0) & (update_norm > 0)
    ratio = (lr * param_norm).to(update_norm.dtype) / torch.where(defined, update_norm, 1)
    return torch.where(defined, ratio.clamp_min(min).clamp_max(max), 1)


@trust_ratio.check
def _ratios(min: float, max: float, **arguments: Any) -> None:
    if not min <= max:
        raise ValueError(f"needs min <= max, got min={min!r} and max={max!r}")


@transform(acts_on="tensor")
def scale_by_param_norm(tensor: Tensor, group: Group, min: Annotated[float, Ge(0)] = 1e-3) -> Tensor:
    r"""Multiply by the 2-norm of the parameter.

    .. math:: u \cdot \max(\|p\|_2, c)

    Acts on the whole tensor, of any shape, whatever the ``param_ndim`` of the group, and reads ``group["param"]``.

    Args:
        min: The least norm that a parameter counts as, so that zero parameters can learn; at least 0.

    Raises:
        ValueError: ``min`` is below 0, or there is no ``group["param"]``.

    Example:
        >>> scale_by_param_norm()(torch.tensor([0.0, -0.1]), {"param": torch.tensor([3.0, 4.0])})
        tensor([ 0.0000, -0.5000])

    References:
        optax ``scale_by_param_block_norm``.
    """
    return tensor * norm(group["param"]).clamp_min(min)


@transform(acts_on="tensor")
def scale_by_param_rms(tensor: Tensor, group: Group, min: Annotated[float, Ge(0)] = 1e-3) -> Tensor:
    r"""Multiply by the root mean square of the parameter.

    .. math:: u \cdot \max(\operatorname{rms}(p), c)

    Acts on the whole tensor, of any shape, whatever the ``param_ndim`` of the group, and reads ``group["param"]``.

    Args:
        min: The least root mean square that a parameter counts as, so that zero parameters can learn; at least 0.

    Raises:
        ValueError: ``min`` is below 0, or there is no ``group["param"]``.

    Example:
        >>> scale_by_param_rms()(torch.tensor([0.0, -0.1]), {"param": torch.tensor([3.0, -3.0])})
        tensor([ 0.0000, -0.3000])

    References:
        Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost,
        https://arxiv.org/abs/1804.04235, 2018; optax ``scale_by_param_block_rms``.
    """
    return tensor * (norm(group["param"]) / math.sqrt(tensor.numel())).clamp_min(min)


@transform(acts_on="element")
def decay_weights(
    tensor: Tensor, group: Group, rate: Annotated[float, Ge(0)], *, ord: Literal[1, 2] = 2, cautious: bool = False
) -> Tensor:
    r"""Add a step towards zero to the update: weight decay, decoupled from the inner optimizer.

    .. math:: u - \rho \, p \quad (ord = 2), \qquad u - \rho \operatorname{sign}(p) \quad (ord = 1)

    Acts on each element, and reads ``group["param"]``. The learning rate is no factor of it: the ``weight_decay`` of
    AdamW is this with the rate ``lr * weight_decay``.

    Args:
        rate: The share of a parameter (``ord=2``), or the amount (``ord=1``), that one step takes away; at least 0.
        ord: 2 for the gradient of half the squared 2-norm, 1 for that of the 1-norm.
        cautious: Decay only the elements that the update does not move away from zero.

    Raises:
        TypeError: ``ord`` is neither 1 nor 2.
        ValueError: ``rate`` is below 0, or there is no ``group["param"]``.

    Example:
        >>> update, group = torch.tensor([-1.0, 1.0]), {"param": torch.tensor([2.0, 2.0])}
        >>> decay_weights(0.1)(update, group), decay_weights(0.1, cautious=True)(update, group)
        (tensor([-1.2000,  0.8000]), tensor([-1.2000,  1.0000]))

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101, 2017; Chen et
        al., Cautious Weight Decay, https://arxiv.org/abs/2510.12402, 2025; optax ``add_decayed_weights``.
    """
    param: Tensor = group["param"]
    decay = rate * (param if ord == 2 else param.sgn())
    if cautious:
        decay = torch.where(_agreement(tensor, param) <= 0, decay, 0)
    return tensor - decay


def _remember(tensor: Tensor, group: Group, **arguments: Any) -> State:
    return {"init": tensor.clone()}


@transform(acts_on="element", init=_remember)
def decay_to_init(tensor: Tensor, group: Group, state: State, rate: Annotated[float, Ge(0)]) -> tuple[Tensor, State]:
    r"""Add a step towards the first parameter to the update: weight decay for fine-tuning, L2-SP.

    .. math:: u - \rho \, (p - p_0)

    Acts on each element, reads ``group["param"]``, and remembers the parameter that ``init`` saw, p_0. The learning
    rate is no factor of it.

    Args:
        rate: The share of the way back that one step makes; at least 0.

    Raises:
        ValueError: ``rate`` is below 0, or there is no ``group["param"]``.

    Example:
        >>> decay = decay_to_init(0.1)
        >>> state = decay.init(torch.tensor([1.0, 1.0]), {})
        >>> decay.update(torch.tensor([0.0, 0.0]), {"param": torch.tensor([1.0, 3.0])}, state)[0]
        tensor([ 0.0000, -0.2000])

    References:
        Li et al., Explicit Inductive Bias for Transfer Learning with Convolutional Networks (L2-SP),
        https://arxiv.org/abs/1802.01483, 2018.
    """
    return tensor - rate * (group["param"] - state["init"]), state


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise, 1 where the signs are equal, -1 where they are opposite, and 0 where either is 0."""
    return (a.sgn().conj() * b.sgn()).real
