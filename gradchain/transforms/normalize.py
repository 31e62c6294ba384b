"""Transforms that fix the norm, the mean or the spread of a tensor."""

import math
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from gradchain._norms import norm
from gradchain.contract import Group
from gradchain.transform import transform
from gradchain.transforms._numerics import floor, unit


@transform
def normalize(tensor: Tensor, group: Group, ord: Annotated[float, Gt(0)] = 2.0) -> Tensor:
    r"""Divide by the norm, so that the ``ord``-norm is 1.

    .. math:: t / \|t\|_{ord}

    Acts on the whole (sub-)tensor, of any shape. Zero stays zero; a norm so small that the powers under it are lost
    to underflow (for the 2-norm, under 1e-19 in float32) counts as that, so that the result is short and not random.

    Args:
        ord: The order of the norm, as in ``torch.linalg.vector_norm``; above 0.

    Raises:
        ValueError: ``ord`` is not above 0.

    Example:
        >>> import torch
        >>> normalize()(torch.tensor([3.0, 4.0]), {})
        tensor([0.6000, 0.8000])
        >>> normalize(1)(torch.tensor([3.0, -1.0]), {})
        tensor([ 0.7500, -0.2500])

    References:
        optax ``normalize_by_update_norm``, for one tensor.
    """
    return unit(tensor, ord)


@transform(acts_on="tensor")
def centralize(tensor: Tensor, group: Group) -> Tensor:
    r"""Subtract, for each output, the mean over its inputs.

    .. math:: t_i - \operatorname{mean}(t_i), \quad i \text{ the index of the first dimension}

    Acts on the whole tensor, (out, ...), whatever the ``param_ndim`` of the group. A tensor of fewer than 2 dimensions,
    such as a bias, stays as it is.

    Example:
        >>> import torch
        >>> centralize()(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), {})
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    References:
        Yong et al., Gradient Centralization, https://arxiv.org/abs/2004.01461, 2020; optax ``centralize``.
    """
    if tensor.ndim < 2:
        return tensor.clone()
    return tensor - tensor.mean(dim=tuple(range(1, tensor.ndim)), keepdim=True)


@transform
def standardize(tensor: Tensor, group: Group) -> Tensor:
    r"""Shift and scale to mean 0 and standard deviation 1.

    .. math:: (t - \operatorname{mean}(t)) / \operatorname{std}(t)

    Acts on the whole (sub-)tensor, of any shape, with the standard deviation of a population (no correction). A tensor
    of equal elements becomes zero.

    Example:
        >>> import torch
        >>> standardize()(torch.tensor([1.0, 3.0]), {})
        tensor([-1.,  1.])

    References:
        jax ``nn.standardize``, without its epsilon.
    """
    shifted = tensor - tensor.flatten()[0]  # so that equal elements, whose mean can be rounded, give exactly zero
    centred = shifted - shifted.mean()
    return centred / (norm(centred) / math.sqrt(tensor.numel())).clamp_min(floor(tensor))
