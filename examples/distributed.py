"""A network in shards: ``fully_shard``, a chain in each slot, and the numbers of a single process.

Each process holds a part of every parameter, of every state, and of the batch. What acts on rows or elements acts on
that part; a global norm is one of the whole; a trust ratio gathers one parameter after the other.

Run ``torchrun --nproc-per-node 2 examples/distributed.py``: a few seconds on two cores, no downloads.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from gradchain import (
    ParamTransformingOptimizer,
    chain,
    clip_by_global_norm,
    ema,
    param_ema,
    project_l2_ball,
    trust_ratio,
)

STEPS = 50
CHAINS: dict[str, Any] = {
    "pre": chain(clip_by_global_norm(1.0), ema(0.9)),
    "update": trust_ratio(),
    "post": chain(project_l2_ball(3.0), param_ema(0.9)),  # of each row
}


def load() -> tuple[Tensor, Tensor]:
    """Points around ten centres, (1024, 32), and the centre of each."""
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(10, 32, generator=generator), torch.randint(10, (1024,), generator=generator)
    return centres[labels] + 0.5 * torch.randn(1024, 32, generator=generator), labels


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 63), nn.ReLU(), nn.Linear(63, 10))


def train(model: nn.Sequential, x: Tensor, labels: Tensor) -> ParamTransformingOptimizer:
    optim = ParamTransformingOptimizer(model.parameters(), Adam, lr=0.01, **CHAINS)
    for _ in range(STEPS):
        optim.zero_grad()
        cross_entropy(model(x), labels).backward()
        optim.step()
    return optim


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    x, labels = load()

    sharded = make()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer)
    optim = train(sharded, x[rank::size], labels[rank::size])
    with optim.averaged():
        averages = [param.full_tensor() for param in sharded.parameters()]  # type: ignore[attr-defined]
        parts = [param.to_local().numel() for param in sharded.parameters()]  # type: ignore[attr-defined]

    whole = make()
    with train(whole, x, labels).averaged():
        accuracy = (whole(x).argmax(1) == labels).float().mean().item()
        difference = max((a - b).abs().max().item() for a, b in zip(averages, whole.parameters(), strict=True))
        total = sum(param.numel() for param in whole.parameters())
    print(
        f"process {rank} of {size}: {sum(parts)} of {total} elements, largest difference {difference:.1e}", flush=True
    )
    dist.barrier()
    if rank == 0:
        print(f"accuracy {accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
