"""What part of a tensor a transform acts on: the whole, or each of its sub-tensors of ``param_ndim`` dimensions."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from gradchain.chain import Chain, chain
from gradchain.transform import (
    CONTEXT,
    BoundTransform,
    Group,
    Transform,
    call_checked,
    check_hyperparameters,
    hyperparameters,
    require_transform,
    show,
)


class FromGroup(enum.Enum):
    """The type of ``FROM_GROUP``, the ``param_ndim`` that is read from the group at every call."""

    FROM_GROUP = enum.auto()


FROM_GROUP = FromGroup.FROM_GROUP


@overload
def broadcast(transform: Chain, param_ndim: int | FromGroup | None = FROM_GROUP) -> Chain: ...
@overload
def broadcast(transform: Transform, param_ndim: int | FromGroup | None = FROM_GROUP) -> Transform: ...
def broadcast(transform: Transform, param_ndim: int | FromGroup | None = FROM_GROUP) -> Transform:
    """Map a transform over the sub-tensors of ``param_ndim`` dimensions.

    For a tensor of shape (d0, d1, d2, d3), the transform acts on each

    ===============  =====================
    ``param_ndim``   sub-tensor
    ===============  =====================
    ``0``            element
    ``1`` or ``-3``  (d3,)
    ``2`` or ``-2``  (d2, d3)
    ``3`` or ``-1``  (d1, d2, d3)
    ``4`` or None    (d0, d1, d2, d3)
    ===============  =====================

    The context, ``group["param"]`` and ``group["grad"]``, is mapped along. The result equals that of a Python loop;
    it is computed with ``torch.func.vmap``. A chain is broadcast member by member, and a member that is broadcast
    already keeps its own ``param_ndim``.

    Args:
        transform: Any callable ``(tensor, group) -> tensor``.
        param_ndim: The number of dimensions of a sub-tensor, or, negative, how many fewer they are than the tensor's;
            None for the whole tensor. Read from ``group["param_ndim"]`` when left out.

    Raises:
        TypeError: ``param_ndim`` is neither an int nor None.
        ValueError: When called: ``|param_ndim|`` is larger than the number of dimensions of the tensor.

    Example:
        >>> from gradchain import normalize
        >>> rows = broadcast(normalize(), 1)
        >>> rows(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), {})
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
        >>> broadcast(chain(rows, lambda tensor, group: tensor.cumsum(0)), None)
        chain(broadcast(normalize(), param_ndim=1), broadcast(<lambda>, param_ndim=None))
    """
    if not isinstance(param_ndim, FromGroup):
        require_param_ndim(param_ndim)
    if isinstance(transform, Chain):
        return chain(*(broadcast(member, param_ndim) for member in transform))
    if isinstance(transform, Broadcast):
        return transform
    return Broadcast(require_transform(transform, "the argument of broadcast"), param_ndim)


@dataclass(frozen=True, repr=False)
class Broadcast:
    """A transform, mapped over sub-tensors. Made by ``broadcast``."""

    transform: Transform
    param_ndim: int | FromGroup | None

    def __call__(self, tensor: Tensor, group: Group, /) -> Tensor:
        definition = self.transform.definition if isinstance(self.transform, BoundTransform) else None
        elementwise = definition is not None and definition.elementwise
        if self.param_ndim is FROM_GROUP and definition is not None and (elementwise or definition.whole):
            return call_checked(self.transform, tensor, group)
        param_ndim = self._param_ndim(group)
        if sub_ndim(tensor.ndim, param_ndim) == tensor.ndim or elementwise or tensor.numel() == 0:
            return call_checked(self.transform, tensor, group)
        context = {key: group[key] for key in CONTEXT if key in group}
        for key, value in context.items():
            if value.shape != tensor.shape:
                raise ValueError(
                    f'group["{key}"] must have the shape {tuple(tensor.shape)} of the tensor, got {tuple(value.shape)}'
                )
        batches = {key: to_batch(value, param_ndim) for key, value in context.items()}

        def act(sub_tensor: Tensor, sub_context: Group) -> Tensor:
            return call_checked(self.transform, sub_tensor, {**group, **sub_context})

        mapped = torch.func.vmap(act, randomness="different")(to_batch(tensor, param_ndim), batches)
        return mapped.reshape(tensor.shape)

    def _param_ndim(self, group: Group) -> int | None:
        if not isinstance(self.param_ndim, FromGroup):
            return self.param_ndim
        if "param_ndim" not in group:
            raise ValueError(
                f'{self!r} reads group["param_ndim"], which is not there; give it here: broadcast(..., param_ndim)'
            )
        return require_param_ndim(group["param_ndim"])

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """The default of every hyperparameter, by its key in a group."""
        return hyperparameters(self.transform)

    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""
        check_hyperparameters(self.transform, group)

    def __repr__(self) -> str:
        param_ndim = "" if self.param_ndim is FROM_GROUP else f", param_ndim={self.param_ndim}"
        return f"broadcast({show(self.transform)}{param_ndim})"


def to_batch(tensor: Tensor, param_ndim: int | None) -> Tensor:
    """Reshape to (N, d0, ...), where (d0, ...) are the sub-tensors that ``param_ndim`` chooses.

    This is the batch form that the hooks of ``ParamTransformingOptimizer`` see. It is a view where the layout of
    ``tensor`` allows one, else a copy.

    Raises:
        ValueError: ``|param_ndim|`` is larger than ``tensor.ndim``.

    Example:
        >>> x = torch.zeros(2, 3, 4, 5)
        >>> [tuple(to_batch(x, param_ndim).shape) for param_ndim in (0, 1, 2, -1, None)]
        [(120, 1), (24, 5), (6, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)]
    """
    if param_ndim is None:
        return tensor.unsqueeze(0)
    split = tensor.ndim - sub_ndim(tensor.ndim, param_ndim)
    count = math.prod(tensor.shape[:split])  # reshape(-1, ...) is ambiguous where a dimension is 0
    return tensor.reshape(count, *(tensor.shape[split:] if split < tensor.ndim else (1,)))


def sub_ndim(ndim: int, param_ndim: int | None) -> int:
    """The number of dimensions of the sub-tensors that ``param_ndim`` chooses in a tensor of ``ndim`` dimensions."""
    if param_ndim is None:
        return ndim
    if abs(param_ndim) > ndim:
        raise ValueError(
            f"param_ndim={param_ndim} needs a tensor of at least {abs(param_ndim)} dimensions, got {ndim}; "
            "set param_ndim=None (the whole tensor) or 0 (each element), in an optimizer for a param group of its own"
        )
    return param_ndim if param_ndim >= 0 else ndim + param_ndim


def require_param_ndim(value: object) -> int | None:
    """Return ``value`` if it can be a ``param_ndim``."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise TypeError(f"param_ndim must be an int or None, got {value!r}")
