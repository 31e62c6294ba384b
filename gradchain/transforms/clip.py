"""Transforms that shorten a tensor that is too long, and keep its direction."""

import math
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from gradchain._norms import norm
from gradchain.contract import Group
from gradchain.definition import counted
from gradchain.transform import transform
from gradchain.transforms._numerics import shorten


@counted
@transform
def clip_by_norm(
    tensor: Tensor, group: Group, max_norm: Annotated[float, Gt(0)], *, ord: Annotated[float, Gt(0)] = 2.0
) -> Tensor:
    r"""Scale down so that the ``ord``-norm is at most ``max_norm``.

    .. math:: t \cdot \min(1, c / \|t\|_{ord}) = t / \max(1, \|t\|_{ord} / c)

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        max_norm: The largest norm that is left alone, in units of the tensor; above 0, and infinite for no limit.
        ord: The order of the norm, as in ``torch.linalg.vector_norm``; above 0.

    Raises:
        ValueError: ``max_norm`` or ``ord`` is not above 0.

    Example:
        >>> import torch
        >>> clip_by_norm(1.0)(torch.tensor([3.0, 4.0]), {})
        tensor([0.6000, 0.8000])
        >>> clip_by_norm(10.0)(torch.tensor([3.0, 4.0]), {})
        tensor([3., 4.])

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, https://arxiv.org/abs/1211.5063, 2012.
    """
    return shorten(tensor, norm(tensor, ord), max_norm)


@counted
@transform
def clip_by_rms(tensor: Tensor, group: Group, threshold: Annotated[float, Gt(0)]) -> Tensor:
    r"""Scale down so that the root mean square is at most ``threshold``.

    .. math:: t / \max(1, \operatorname{rms}(t) / c)

    Acts on the whole (sub-)tensor, of any shape.

    Args:
        threshold: The largest root mean square that is left alone, in units of the tensor; above 0, and infinite for no
            limit.

    Raises:
        ValueError: ``threshold`` is not above 0.

    Example:
        >>> import torch
        >>> clip_by_rms(1.0)(torch.tensor([2.0, -2.0, 2.0, -2.0]), {})
        tensor([ 1., -1.,  1., -1.])

    References:
        Shazeer and Stern, Adafactor, https://arxiv.org/abs/1804.04235, 2018; optax ``clip_by_block_rms``.
    """
    return shorten(tensor, norm(tensor) / math.sqrt(tensor.numel()), threshold)


@counted
@transform
def clip_adaptive(
    tensor: Tensor, group: Group, clipping: Annotated[float, Gt(0)], eps: Annotated[float, Gt(0)] = 1e-3
) -> Tensor:
    r"""Scale down a gradient that is long in proportion to its parameter.

    .. math:: t \cdot \min(1, \lambda \max(\|p\|_2, \epsilon) / \|t\|_2)

    Acts on the whole (sub-)tensor, of any shape, and reads ``group["param"]``. The units in the paper are the outputs
    of a layer, which ``param_ndim=-1`` chooses in weights.

    Args:
        clipping: The largest ratio of the tensor's norm to the parameter's norm that is left alone; above 0, and
            infinite for no limit.
        eps: The least value that counts as the norm of a parameter, so that parameters of zeros can learn; above 0.

    Raises:
        ValueError: ``clipping`` or ``eps`` is not above 0, or there is no ``group["param"]``.

    Example:
        >>> import torch
        >>> clip_adaptive(0.1)(torch.tensor([3.0, 4.0]), {"param": torch.tensor([0.0, 10.0])})
        tensor([0.6000, 0.8000])

    References:
        Brock et al., High-Performance Large-Scale Image Recognition Without Normalization,
        https://arxiv.org/abs/2102.06171, 2021; optax ``adaptive_grad_clip``.
    """
    max_norm = clipping * norm(group["param"]).clamp_min(eps)
    return shorten(tensor, norm(tensor), max_norm)
