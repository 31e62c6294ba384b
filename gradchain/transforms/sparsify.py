"""Transforms that keep some elements and zero the others."""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Generator, Tensor

from gradchain.contract import Group
from gradchain.transform import transform


@transform
def keep_top_q(
    tensor: Tensor,
    group: Group,
    q: Annotated[float, Ge(0), Le(1)],
    dq: Annotated[float, Ge(0), Le(1)] = 0.0,
    *,
    generator: Generator | None = None,
) -> Tensor:
    r"""Zero all but the largest elements in magnitude.

    .. math:: t_i \text{ if } |t_i| \text{ is among the } \operatorname{round}((1 - q) n) \text{ largest, else } 0

    Acts on the whole (sub-)tensor, of n elements and any shape. Of equal magnitudes, the first are kept.

    Args:
        q: The share of elements that become zero; between 0 and 1.
        dq: Draw q anew for each (sub-)tensor, uniformly from the part of [q - dq, q + dq] that is inside [0, 1];
            between 0 and 1.
        generator: What q is drawn from; None for the default generator of torch.

    Raises:
        ValueError: ``q`` or ``dq`` is not between 0 and 1.

    Example:
        >>> keep_top_q(0.5)(torch.tensor([1.0, -4.0, 3.0, 2.0]), {})
        tensor([ 0., -4.,  3.,  0.])
        >>> keep_top_q(0.5, dq=0.5, generator=Generator().manual_seed(0))(torch.tensor([1.0, -4.0, 3.0, 2.0]), {})
        tensor([ 0., -4.,  3.,  0.])

    References:
        Tramèr and Boneh, Adversarial Training and Robustness for Multiple Perturbations,
        https://arxiv.org/abs/1904.13000, 2019.
    """
    flat = tensor.flatten()
    order = flat.abs().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order).scatter(0, order, torch.arange(flat.numel(), device=tensor.device))
    largest = ranks < _count_kept(flat.unsqueeze(0), q, dq, generator)
    return torch.where(largest, flat, 0).reshape(tensor.shape)


def _count_kept(units: Tensor, q: float, dq: float, generator: Generator | None) -> float | Tensor:
    """How many elements of each of ``units``, of shape (N, n), are kept; where it is drawn, of shape (N, 1)."""
    share: float | Tensor = q
    if isinstance(dq, Tensor) or dq > 0:
        device = units.device if generator is None else generator.device
        uniform = torch.rand((len(units), 1), device=device, generator=generator).to(units.device)
        low, high = (torch.as_tensor(edge).clamp(0, 1) for edge in (q - dq, q + dq))
        share = low + (high - low) * uniform
    kept = (1 - share) * units.shape[1]
    return kept.round() if isinstance(kept, Tensor) else round(kept)
