"""Interleaved times, and peaks of memory."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.sides import Ours, Side
from benchmarks.workloads import alike

SHORTEST_SAMPLE = 2e-3  # seconds: a faster step is repeated within a sample
ROUNDS = 6  # in each of which both sides are made anew; slow cases have two
LONGEST_ROUND = 0.5  # seconds: a slow case has fewer repetitions in each round
LONGEST_CASE = 6.0  # seconds, after which no more rounds begin
FEWEST_REPETITIONS = 3

MEMORY_WORKLOAD = alike(16, 2048, 2048)


@dataclass(frozen=True)
class Times:
    """Seconds a step."""

    fastest: float
    median: float
    slowest: float

    @staticmethod
    def of(samples: list[float]) -> Times:
        """The summary of samples."""
        return Times(min(samples), statistics.median(samples), max(samples))


def compare(
    make_ours: Callable[[], Side], make_theirs: Callable[[], Side], repetitions: int, device: str, *, same_numbers: bool
) -> tuple[Times, Times]:
    """Time both, in turns, after a check that they do the same and a warm-up.

    Gradients are fresh in each step; copying them is not timed. Where tensors are in memory can change the time of a
    step by 5 %. So both sides are made anew in several rounds, in the one order and the other, and elsewhere in memory.
    """
    samples: tuple[list[float], list[float]] = ([], [])
    elsewhere = []
    start = time.perf_counter()
    for number in range(ROUNDS):
        if number >= 2 and number % 2 == 0 and time.perf_counter() - start > LONGEST_CASE:
            break
        gc.collect()
        elsewhere.append(torch.empty(1000 * (number + 1)))
        made = {index: (make_ours, make_theirs)[index]() for index in ((0, 1) if number % 2 else (1, 0))}
        for side in made.values():
            side.step()
        if same_numbers and number == 0:
            _require_equal(made[0], made[1])
        _interleave((made.pop(0), made.pop(1)), samples, math.ceil(repetitions / ROUNDS), device)
    return Times.of(samples[0]), Times.of(samples[1])


def _interleave(
    sides: tuple[Side, Side], samples: tuple[list[float], list[float]], repetitions: int, device: str
) -> None:
    for side in sides:
        _sample(side, 2, device)
    steps = math.ceil(SHORTEST_SAMPLE / min(_sample(side, 1, device) for side in sides))
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for repetition in range(repetitions):
        if time.perf_counter() - start > LONGEST_ROUND and repetition >= FEWEST_REPETITIONS:
            break
        for index in (0, 1) if repetition % 2 else (1, 0):
            samples[index].append(_sample(sides[index], steps, device))
    gc.enable()


def _sample(side: Side, steps: int, device: str) -> float:
    """The mean time of some steps."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    total = 0.0
    for _ in range(steps):
        side.refresh()
        synchronize()
        start = time.perf_counter()
        side.step()
        synchronize()
        total += time.perf_counter() - start
    return total / steps


def _require_equal(ours: Side, theirs: Side) -> None:
    # Parameters start at zero, so that after a step they are the step, and no rounding hides a difference.
    for our_value, their_value in zip(ours.values(), theirs.values(), strict=False):  # optax shows no gradients
        largest = float(their_value.abs().max())
        torch.testing.assert_close(
            our_value.cpu(), their_value.cpu(), rtol=5e-3, atol=1e-5 * largest
        )  # torch's norm of 4e7 elements is off by 3e-3


def memory_above_inner(ours: Ours, device: str) -> int:
    """The bytes by which the peak of some steps is above that of the inner optimizer, both in a fresh process."""
    peaks = []
    for is_bare in (False, True):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            peaks.append(process.submit(_peak, ours, device, is_bare).result())
    return peaks[0] - peaks[1]


def parameter_bytes() -> int:
    """The size of the parameters that ``memory_above_inner`` steps."""
    return sum(4 * math.prod(shape) for shape in MEMORY_WORKLOAD.shapes)


def _peak(ours: Ours, device: str, is_bare: bool) -> int:
    """The largest memory of a process that makes the state of the inner optimizer, and then some steps.

    Steps of a small parameter come first, so that either process has loaded all code that steps with transforms need.
    """
    small = _with_grad(torch.zeros(64, 64, device=device))
    warm_up = ours.wrap(ours.inner([small]))
    for _ in range(2):
        warm_up.step()
    params = [_with_grad(torch.zeros(shape, device=device)) for shape in MEMORY_WORKLOAD.shapes]
    inner = ours.inner(params)
    for _ in range(2):
        inner.step()
    optimizer = inner if is_bare else ours.wrap(inner)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Of this process alone; getrusage would count the one that it was forked from.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def _with_grad(param: Tensor) -> Tensor:
    param.fill_(1.0).requires_grad_().grad = torch.full_like(param, 1e-3)
    return param
