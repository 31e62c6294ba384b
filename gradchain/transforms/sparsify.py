"""Transforms that keep some elements and zero the others."""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Generator, Tensor

from gradchain.transform import Group, transform


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
        dq: Draw q anew for each (sub-)tensor, uniformly from [q - dq, q + dq], cut to [0, 1]; between 0 and 1.
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
    share: float | Tensor = q
    if isinstance(dq, Tensor) or dq > 0:
        device = tensor.device if generator is None else generator.device
        uniform = torch.rand((), device=device, generator=generator).to(tensor.device)
        share = torch.clamp(q + dq * (2 * uniform - 1), 0, 1)
    kept = (1 - share) * tensor.numel()
    flat = tensor.flatten()
    order = flat.abs().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order).scatter(0, order, torch.arange(flat.numel(), device=tensor.device))
    largest = ranks < (kept.round() if isinstance(kept, Tensor) else round(kept))
    return torch.where(largest, flat, 0).reshape(tensor.shape)
