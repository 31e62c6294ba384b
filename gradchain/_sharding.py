"""Tensors that are distributed over processes, ``torch.distributed.tensor.DTensor``, as ``fully_shard`` makes them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

SHARDS_SINCE = "2.12"
"""The first version of torch whose ``DTensor`` passes the tests of ``tests/distributed``; 2.8 has wrong numbers."""


def is_distributed(value: object) -> bool:
    """Whether it is a ``DTensor``; asked like this, since its module takes long to import."""
    return type(value) not in (Tensor, Parameter) and hasattr(value, "full_tensor")


def require_shards(param: Tensor) -> None:
    """Raise where a process has a part of ``param`` from which nothing right can be computed."""
    if getattr(param, "_fsdp_flattened", False):  # as FullyShardedDataParallel marks them, with use_orig_params too
        raise TypeError(
            "a parameter of FullyShardedDataParallel is a flat piece that differs between processes, without the shape "
            "of the whole, so that rows and norms would be wrong; shard the model with "
            "torch.distributed.fsdp.fully_shard instead"
        )
    if is_distributed(param) and torch.__version__ < SHARDS_SINCE:
        raise RuntimeError(
            f"distributed parameters (DTensor) need torch {SHARDS_SINCE} or later, since earlier "
            f"versions compute wrong numbers for them; got torch {torch.__version__}. Update torch, or replicate the "
            "parameters"
        )


def gather(value: Any) -> Any:
    """The whole of a distributed tensor, in every process; anything else as it is."""
    return value.full_tensor() if is_distributed(value) else value


def local(value: Any) -> Any:
    """What this process has of a distributed tensor, in the memory of that; anything else as it is."""
    return value.to_local() if is_distributed(value) else value


def local_part(value: Any, like: Any = None) -> Any:
    """``local`` of ``value``, distributed as ``like`` is.

    A process that has no elements of it gets a tensor of one zero, so that what runs in all processes runs in this one
    too, and counters advance in all of them.
    """
    if not is_distributed(value):
        return value
    if is_distributed(like) and value.placements != like.placements:
        value = value.redistribute(placements=like.placements)
    mine = value.to_local()
    return mine if mine.numel() else mine.new_zeros([max(size, 1) for size in mine.shape])


NEUTRAL = {"sum": 0, "product": 1}
"""What a process has that adds nothing to what the processes make together; for a mean or a maximum, all have all."""


def distribute_like(whole: Tensor, like: Any) -> Any:
    """``whole``, which every process has, distributed like ``like``: nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placed = everywhere.redistribute(placements=[Replicate() if p.is_partial() else p for p in placements])
    if placed.placements == placements:
        return placed
    mine = placed.to_local()  # torch makes partial tensors of sharded ones only
    for dim, placement in enumerate(placements):
        neutral = NEUTRAL.get(placement.reduce_op) if placement.is_partial() else None
        if neutral is not None and mesh.get_local_rank(dim) > 0:
            mine = torch.full_like(mine, neutral)
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def has_whole_units(tensor: Any, split: int) -> bool:
    """Whether no part of ``tensor`` after its first ``split`` dimensions is distributed."""
    sizes = tensor.device_mesh.shape
    return all(
        size == 1 or placement.is_replicate() or getattr(placement, "dim", split) < split
        for size, placement in zip(sizes, tensor.placements, strict=True)
    )


def is_partial(tensor: Any) -> bool:
    """Whether what the processes have of a distributed tensor makes its elements only together, such as by a sum."""
    return any(placement.is_partial() for placement in tensor.placements)


def shapes_of_parts(tensor: Any) -> set[tuple[int, ...]]:
    """The shapes that ``local_part`` of a distributed tensor can have in any process."""
    shapes = {tuple(tensor.shape)}
    for count, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            shapes = {
                (*shape[:dim], length, *shape[dim + 1 :]) for shape in shapes for length in _lengths(shape[dim], count)
            }
    return shapes


def _lengths(length: int, count: int) -> set[int]:
    """The lengths of the parts when ``length`` is cut for ``count`` processes, of which the last can have none."""
    longest = -(-length // count)
    number = -(-length // longest)
    return {longest, length - (number - 1) * longest, 1 if number < count else longest}


def is_placed_like(value: Any, tensor: Any, split: int) -> bool:
    """Whether each process has of ``value`` what belongs to its part of ``tensor``, up to dimension ``split``."""
    if value.ndim == 0:
        return not is_distributed(value) or has_whole_units(value, 0)
    return (
        is_distributed(value)
        and value.device_mesh == tensor.device_mesh
        and value.placements == tensor.placements
        and value.shape[:split] == tensor.shape[:split]
    )


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Lists of those that have elements, one dtype, device and distribution; a sum of processes is added up first."""
    lists: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > 0:
            place: Any = None
            if is_distributed(tensor):
                distributed: Any = tensor
                place = distributed.device_mesh, distributed.placements
                if is_partial(distributed):
                    tensor, place = gather(tensor), None
            lists.setdefault((tensor.dtype, tensor.device, place), []).append(tensor)
    return list(lists.values())


def collect(value: Tensor, like: Any) -> Tensor:
    """What each process has, in one tensor with a new first dimension; one of those that have the same of ``like``."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Replicate() if placement.is_replicate() else Shard(0) for placement in like.placements]
    each = DTensor.from_local(value.unsqueeze(0), like.device_mesh, placements, run_check=False)
    collected: Tensor = each.full_tensor()
    return collected


def gather_anew(params: Iterable[Tensor]) -> None:
    """Let modules of ``fully_shard`` forget the whole parameters that they keep, now that ``params`` have been written.

    After a forward pass without gradients, the outermost module keeps them until the next backward pass.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(map(is_distributed, params)):
        for module in gc.get_objects():  # parameters do not know their modules
            if issubclass(type(module), fsdp.FSDPModule):
                module.reshard()
