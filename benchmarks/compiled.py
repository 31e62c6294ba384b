"""Time steps that torch compiles, beside eager ones: ``python -m benchmarks.compiled``. It needs a C++ compiler."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.__main__ import machine, show
from benchmarks.measure import Times
from benchmarks.sides import LR, MakeOptimizer, Step, TorchSide
from benchmarks.workloads import alike, gradients
from gradchain import ParamTransformingOptimizer, clip_by_global_norm, project_l2_ball

WORKLOAD = alike(50, 64, 64)

bare: MakeOptimizer = partial(AdamW, lr=LR)
fused: MakeOptimizer = partial(AdamW, lr=LR, fused=True)


def wrapped(params: Sequence[Tensor], inner: MakeOptimizer) -> Optimizer:
    """Chains in two slots around ``inner``."""
    return ParamTransformingOptimizer(
        InnerOpt=inner(params), pre=clip_by_global_norm(1.0), post=project_l2_ball(1.0), param_ndim=None
    )


ROWS: dict[str, tuple[MakeOptimizer, bool]] = {
    "AdamW": (bare, False),
    "AdamW, fused": (fused, False),
    "AdamW, compiled": (bare, True),
    "clip, AdamW, project": (partial(wrapped, inner=bare), False),
    "clip, fused AdamW, project": (partial(wrapped, inner=fused), False),
    "clip, AdamW, project, compiled": (partial(wrapped, inner=bare), True),
}
"""The optimizers, and whether to compile their steps."""


def main() -> None:
    """Make steps of all rows in turns, and print their times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=300)
    repetitions = parser.parse_args().repetitions

    sides, starts, samples = {}, {}, {name: list[float]() for name in ROWS}
    for name, (make, compiles) in ROWS.items():
        sides[name] = TorchSide(gradients(WORKLOAD, "cpu"), partial(_make_step, make, compiles))
        start = time.perf_counter()
        for _ in range(3):
            sides[name].step()
        starts[name] = time.perf_counter() - start
    _require_equal([sides[name] for name in ROWS if "clip" in name])
    for _ in range(repetitions):
        for name, side in sides.items():
            side.refresh()
            start = time.perf_counter()
            side.step()
            samples[name].append(time.perf_counter() - start)
    print(f"{machine('cpu')}, {torch.get_num_threads()} threads, {WORKLOAD.name}", end="\n\n")
    print("| step | median (min to max) | first three steps |\n| - | - | - |")
    for name in ROWS:
        print(f"| {name} | {show(Times.of(samples[name]))} | {starts[name]:.1f} s |")


def _make_step(make: MakeOptimizer, compiles: bool, params: list[Tensor]) -> Step:
    step = make(params).step
    return torch.compile(step) if compiles else step


def _require_equal(sides: Sequence[TorchSide]) -> None:
    for side in sides[1:]:
        torch.testing.assert_close(side.values(), sides[0].values(), rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    main()
