"""Transforms that remove a direction from a tensor."""

from torch import Tensor

from gradchain.contract import Group
from gradchain.transform import transform
from gradchain.transforms._numerics import floor, inner


@transform(acts_on="tensor")
def reject_from_param(tensor: Tensor, group: Group) -> Tensor:
    r"""Remove the component along the parameter, so that a small step keeps the parameter's norm.

    .. math:: t - \frac{\langle t, p \rangle}{\|p\|_2^2} p

    Acts on the whole tensor, of any shape, whatever the ``param_ndim`` of the group, and reads ``group["param"]``. A
    zero parameter removes nothing.

    Raises:
        ValueError: There is no ``group["param"]``.

    Example:
        >>> import torch
        >>> reject_from_param()(torch.tensor([1.0, 2.0]), {"param": torch.tensor([0.0, 5.0])})
        tensor([1., 0.])

    References:
        Prieto et al., Grokking at the Edge of Numerical Stability (OrthoGrad), https://arxiv.org/abs/2501.04697, 2025;
        Heo et al., AdamP, https://arxiv.org/abs/2006.08217, 2020.
    """
    param: Tensor = group["param"]
    return tensor - inner(param, tensor) / inner(param, param).clamp_min(floor(tensor) ** 2) * param
