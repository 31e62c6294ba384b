"""What ``torch.compile(optimizer.step)`` gives: ``python -m benchmarks.compiled``; on a CPU it needs a C++ compiler."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.__main__ import machine
from benchmarks.workloads import alike, gradients
from gradchain import (
    Group,
    ParamTransformingOptimizer,
    add_noise,
    cautious,
    clip_by_global_norm,
    clip_by_norm,
    ema,
    project_l2_ball,
)

FEW = alike(40, 64, 64)


def soft_sign(tensor: Tensor, group: Group) -> Tensor:
    """A function of one's own."""
    return tensor / (1 + tensor.abs())


def wrap(slots: dict[str, Any]) -> Callable[[list[nn.Parameter]], Optimizer]:
    """What makes AdamW with transforms."""
    return partial(ParamTransformingOptimizer, InnerOpt=AdamW, **slots)


CASES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": AdamW,
    "AdamW, fused": partial(AdamW, fused=True),
    "clip_by_norm(1), AdamW, project_l2_ball(10)": wrap({"pre": clip_by_norm(1.0), "post": project_l2_ball(10.0)}),
    "clip_by_global_norm(1), AdamW": wrap({"pre": clip_by_global_norm(1.0)}),
    "ema(0.9), AdamW": wrap({"pre": ema(0.9)}),
    "AdamW, cautious()": wrap({"update": cautious()}),
    "add_noise(0.01), AdamW": wrap({"pre": add_noise(0.01)}),
    "a function of rows of one's own, AdamW": wrap({"pre": soft_sign}),
}


def main() -> None:
    """Measure, and print each row when it is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=200, help="of which the fastest counts")
    arguments = parser.parse_args()
    print(f"{machine(arguments.device)}, {torch.get_num_threads()} threads, {FEW.name}", end="\n\n")
    print("| step | eager | compiled | first calls |", "| --- | --- | --- | --- |", sep="\n")
    for name, make in CASES.items():
        torch.compiler.reset()
        eager, compiled = (make_step(make, arguments.device) for _ in range(2))
        compiled = torch.compile(compiled)
        first = sum(seconds(compiled, arguments.device) for _ in range(3))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.repetitions):
            for samples, step in zip(times, (eager, compiled), strict=True):
                samples.append(seconds(step, arguments.device))
        print(f"| {name} |", *(f"{min(t) * 1e3:.2f} ms |" for t in times), f"{first:.1f} s |", flush=True)


def make_step(make: Callable[[list[nn.Parameter]], Optimizer], device: str) -> Callable[[], Any]:
    """The step of an optimizer of parameters with gradients."""
    params = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients(FEW, device)]
    for param, gradient in zip(params, gradients(FEW, device), strict=True):
        param.grad = gradient.clone()
    return make(params).step


def seconds(step: Callable[[], Any], device: str) -> float:
    """How long a step takes."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
