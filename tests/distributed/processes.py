"""Processes that stay, so that torch is imported once, and that tests give something to do together."""

import io
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

TIMEOUT = 60.0
"""Seconds after which the processes hang."""

PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.distributed.optim"]


class Processes:
    """``run`` calls a function in some processes, which can talk to each other, and returns what each returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOADED, "tests.cases"])
        self.workers: list[tuple[Any, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self.runs += 1
        while len(self.workers) < size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:size])}
        for pipe, rank in ranks.items():
            pipe.send((rank, size, str(self.folder / str(self.runs)), function, arguments))
        results: dict[int, Any] = {}
        while len(results) < size:
            ready = wait([pipe for pipe, rank in ranks.items() if rank not in results], timeout=TIMEOUT)
            failed = "" if ready else f"only {sorted(results)} of {size} processes are done after {TIMEOUT} s"
            for rank in [rank for pipe, rank in ranks.items() if pipe in ready]:
                error, value = self.workers[rank][1].recv()
                failed = failed or (error and f"process {rank}: {error}")
                results[rank] = None if error else torch.load(io.BytesIO(value), weights_only=False)
            if failed:
                self.stop()  # the others can wait for it
                raise AssertionError(failed)
        return [results[rank] for rank in range(size)]

    def stop(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers.clear()


def serve(pipe: Connection) -> None:
    """What each process does, until it is stopped."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    while True:
        rank, size, file, function, arguments = pipe.recv()
        limit = timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=limit)
        try:
            value = io.BytesIO()
            torch.save(function(*arguments), value)
            dist.barrier()  # a process that leaves early breaks the connections of the others
            pipe.send(("", value.getvalue()))
        except Exception:
            pipe.send((traceback.format_exc(), b""))
        finally:
            dist.destroy_process_group()


def parts(value: Any) -> Any:
    """What this process has of all tensors in dicts and lists, to be sent to ``join``."""
    if isinstance(value, dict):
        return {key: parts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [parts(each) for each in value]
    if isinstance(value, DTensor):
        sharded = [placement for placement in value.placements if not placement.is_replicate()]
        assert all(placement.is_shard(0) for placement in sharded)
        return value.to_local().detach().clone(), bool(sharded)
    return value.detach().clone(), False


def join(values: list[Any]) -> Any:
    """The whole tensors, from the parts of all processes. What is no part must be the same in all of them."""
    first = values[0]
    if isinstance(first, dict):
        return {key: join([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [join(list(each)) for each in zip(*values, strict=True)]
    (tensor, is_part), *others = values
    if is_part:
        return torch.cat([tensor, *(other for other, _ in others)])
    assert all(torch.equal(tensor, other) for other, _ in others)
    return tensor
