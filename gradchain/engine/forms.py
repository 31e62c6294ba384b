"""Find out in every step, in little time, whether tensors are of the forms that a plan was made for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradchain._sharding import is_distributed, local

TensorGuards: Any = None
"""The check that ``torch.compile`` makes in every call. It takes 0.1 microseconds for a tensor, and is not public."""
with contextlib.suppress(ImportError):
    from torch._C._dynamo.guards import TensorGuards


class Forms:
    """The types, shapes, strides, dtypes and devices of tensors, of which some can be None."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        self._count = len(tensors)
        self._absent = [tensor is None for tensor in tensors] if len(present) < len(tensors) else None
        is_plain = all(type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided for tensor in present)
        self._guards = _guards(present) if TensorGuards is not None and is_plain else None
        self._forms = None if self._guards is not None else list(map(_form, present))

    def are_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether ``tensors`` have these forms, too."""
        if len(tensors) != self._count:
            return False
        present: Sequence[Any] = tensors
        if self._absent is not None:
            if [tensor is None for tensor in tensors] != self._absent:
                return False
            present = [tensor for tensor in tensors if tensor is not None]
        if self._guards is not None:
            return bool(self._guards.check(*present))  # False too where one of them is None
        return all(tensor is not None for tensor in present) and list(map(_form, present)) == self._forms


def like_without_memory(grad: Any, param: Any) -> Any:
    """Return a tensor of the form of ``grad`` that keeps none of its memory, because a plan outlives a gradient."""
    alike = [local(each).stride() for each in (grad, param)] + [(each.shape, each.dtype) for each in (grad, param)]
    if alike[0] == alike[1] and alike[2] == alike[3] and _placements(grad) == _placements(param):
        return param
    if type(grad) is not Tensor or torch.compiler.is_compiling():
        return grad
    empty = torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device=grad.device)
    empty.untyped_storage().resize_(0)
    return empty


def _placements(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_distributed(tensor) else None


def _guards(tensors: Sequence[Tensor]) -> Any:
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _form(tensor: Tensor) -> Any:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return (
        type(tensor),
        tensor.shape,
        strides,
        tensor.dtype,
        tensor.device,
        tensor.layout,
        tensor.is_neg(),
        tensor.is_conj(),
    )
