"""Global norms of sharded tensors are those of the whole, also where a process holds nothing of one."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gradchain import chain, clip_by_global_norm, normalize_by_global_norm, skip_large, skip_nonfinite

PROCESSES = 2
TRANSFORMS = [
    clip_by_global_norm(1.0),
    clip_by_global_norm(0.5, ord=1),
    clip_by_global_norm(0.5, ord=float("inf")),
    normalize_by_global_norm(),
    chain(skip_nonfinite(), skip_large(100.0), clip_by_global_norm(2.0)),
]


def compare(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(shape, generator=generator) for shape in ((5, 3), (1, 4), (6,))]
        shards = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in whole]
        for transform in TRANSFORMS:
            states = [transform.init(tensor, {}) for tensor in whole]
            expected, _ = transform.run(whole, [{}] * 3, states)
            actual, _ = transform.run(shards, [{}] * 3, states)
            for ours, theirs in zip(actual, expected, strict=True):
                assert isinstance(ours, DTensor)
                torch.testing.assert_close(ours.full_tensor(), theirs)
        dist.barrier()  # a process that leaves early breaks the connections of the others
    finally:
        dist.destroy_process_group()


def test_sharded_over_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(compare, (str(tmp_path),), nprocs=PROCESSES)  # type: ignore[attr-defined,no-untyped-call]
