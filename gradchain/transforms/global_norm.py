"""Transforms by the norm of all tensors of the optimizer together."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor

from gradchain._norms import norm, norms
from gradchain._sharding import by_kind, collect, is_distributed, local
from gradchain.contract import Group
from gradchain.definition import counted
from gradchain.transform import transform
from gradchain.transforms._numerics import floor, shorten


def measure_global_norm(tensors: Sequence[Tensor], *, ord: float = 2.0, **arguments: Any) -> Group:
    """The ``ord``-norm of all elements of all tensors, as ``group["global_norm"]``."""
    device = tensors[0].device
    lengths = [torch.stack(_norms(same, ord)).to(device) for same in by_kind(tensors)]
    if not lengths:
        return {"global_norm": torch.zeros((), device=device)}
    return {"global_norm": norm(torch.cat(lengths), ord)}


def _norms(tensors: list[Tensor], ord: float) -> list[Tensor] | tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if torch._C._are_functorch_transforms_active():  # functorch does not know functions of lists
        return [norm(tensor, ord, dtype=dtype) for tensor in tensors]
    if is_distributed(tensors[0]):
        # In one go, and also where this process has no elements: the others wait for it.
        lengths = [length for same in by_kind(map(local, tensors)) for length in _norms(same, ord)]
        mine = torch.stack(lengths) if lengths else torch.zeros(1, dtype=dtype.to_real(), device=tensors[0].device)
        return [norm(collect(norm(mine, ord), tensors[0]), ord)]
    return norms(tensors, ord, dtype=dtype)


def global_norm(tensor: Tensor, group: Group) -> Tensor:
    """What was measured, with the device and the real dtype of ``tensor``."""
    length: Tensor = group["global_norm"].to(tensor.device, tensor.real.dtype)
    return length


@counted
@transform(acts_on="element", measure=measure_global_norm, measures_shards=True)
def clip_by_global_norm(
    tensor: Tensor, group: Group, max_norm: Annotated[float, Gt(0)], *, ord: Annotated[float, Gt(0)] = 2.0
) -> Tensor:
    r"""Scale down so that the ``ord``-norm of all tensors together is at most ``max_norm``.

    .. math:: t \cdot \min(1, c / \|T\|_{ord}), \quad T = (t_1, t_2, \dots) \text{ all tensors of the optimizer}

    Acts on each element, by a factor that all tensors share, those of all groups. Called by hand, it sees one tensor.
    With different ``max_norm`` in different groups, each group gets a factor of its own from the one norm.

    Args:
        max_norm: The largest norm that is left alone, in units of the tensors; above 0, and infinite for no limit.
        ord: The order of the norm, as in ``torch.linalg.vector_norm``; above 0.

    Raises:
        ValueError: ``max_norm`` or ``ord`` is not above 0.

    Example:
        >>> clip_by_global_norm(1.0)(torch.tensor([3.0, 4.0]), {})
        tensor([0.6000, 0.8000])
        >>> from gradchain import ParamTransformingOptimizer
        >>> x, y = torch.tensor([0.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
        >>> (3 * x + 4 * y).backward()
        >>> ParamTransformingOptimizer([x, y], pre=clip_by_global_norm(1.0), lr=1.0).step()
        >>> x.item(), y.item()
        (-0.6000..., -0.8000...)

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, https://arxiv.org/abs/1211.5063, 2012;
        ``torch.nn.utils.clip_grad_norm_``, which divides by the norm plus 1e-6; optax ``clip_by_global_norm``.
    """
    return shorten(tensor, global_norm(tensor, group), max_norm)


@transform(acts_on="element", measure=measure_global_norm, measures_shards=True)
def normalize_by_global_norm(tensor: Tensor, group: Group) -> Tensor:
    r"""Divide by the 2-norm of all tensors together.

    .. math:: t / \|T\|_2, \quad T = (t_1, t_2, \dots) \text{ all tensors of the optimizer}

    Acts on each element, by a factor that all tensors share. Called by hand, it sees one tensor. Zero stays zero, as in
    ``normalize``.

    Example:
        >>> normalize_by_global_norm()(torch.tensor([3.0, -4.0]), {})
        tensor([ 0.6000, -0.8000])

    References:
        Hazan et al., Beyond Convexity: Stochastic Quasi-Convex Optimization, https://arxiv.org/abs/1507.02030, 2015;
        optax ``normalize_by_update_norm``, which adds 1e-6 to the norm.
    """
    return tensor / global_norm(tensor, group).clamp_min(floor(tensor))
