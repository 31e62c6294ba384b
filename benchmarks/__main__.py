"""Print the table: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.cases import Case, MemoryCase
from benchmarks.measure import MEMORY_WORKLOAD, Times, compare, memory_above_inner, parameter_bytes
from benchmarks.peers import NotInstalledError
from benchmarks.workloads import gradients

WIDTHS = (36, 21, 24, 35, 35, 9, 7)
MIB = 2**20
MARK = "<!-- make bench writes what follows -->\n"


def main() -> None:
    """Measure, print each row when it is there, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression that a row has to match")
    parser.add_argument("--repetitions", type=int, default=100, help="of a fast case; slow ones have fewer")
    parser.add_argument("--page", type=Path, help=f"a page whose end, after {MARK.strip()!r}, becomes the table")
    arguments = parser.parse_args()

    lines = []
    for line in table(arguments.device, arguments.only, arguments.repetitions):
        print(line, flush=True)
        lines.append(line)
    if arguments.page:
        start, mark, _ = arguments.page.read_text(encoding="utf-8").partition(MARK)
        arguments.page.write_text("\n".join([start + mark, *lines, ""]), encoding="utf-8")


def table(device: str, only: str, repetitions: int) -> Iterator[str]:
    """Measure, line by line."""
    yield f"{machine(device)}; at most {repetitions} steps a row.\n"
    yield row("case", "workload", "against", "ours: median (min to max)", "theirs", "ratio", "at most")
    yield row(*("-" * width for width in WIDTHS))
    for case in cases.timed(device):
        place = (case.name, case.workload.name, case.against)
        if re.search(only, " | ".join(place)):
            yield row(*place, *timed_cells(case, device, repetitions))
    for memory_case in cases.MEMORY:
        place = (memory_case.name, MEMORY_WORKLOAD.name, "memory of the parameters")
        if re.search(only, " | ".join(place)):
            yield row(*place, *memory_cells(memory_case, device))


def machine(device: str) -> str:
    """What the numbers depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = f" ({torch.cuda.get_device_name()})" if device == "cuda" else ""
    return f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, torch {torch.__version__} on {device}{name}"


def timed_cells(case: Case, device: str, repetitions: int) -> tuple[str, ...]:
    """Both times, their ratio, and what it should be at most."""
    our_gradients = gradients(case.workload, device)
    their_gradients = gradients(case.their_workload or case.workload, device)
    try:
        our_times, their_times = compare(
            lambda: case.ours(our_gradients),
            lambda: case.theirs(their_gradients),
            repetitions,
            device,
            same_numbers=case.same_numbers,
        )
    except NotInstalledError:
        return ("", "not installed", "", "")
    ratio = our_times.median / their_times.median
    return (show(our_times), show(their_times), *verdict(ratio, case.at_most))


def memory_cells(case: MemoryCase, device: str) -> tuple[str, ...]:
    """The memory, that of the parameters, the ratio, and what it should be at most."""
    ours, params = memory_above_inner(case.ours, device), parameter_bytes()
    return (f"{ours / MIB:.1f} MiB", f"{params / MIB:.1f} MiB", *verdict(ours / params, case.at_most))


def show(times: Times) -> str:
    """Milliseconds."""
    fastest, median, slowest = (f"{1000 * seconds:.3f}" for seconds in (times.fastest, times.median, times.slowest))
    return f"{median} ms ({fastest} to {slowest})"


def verdict(ratio: float, at_most: float | None) -> tuple[str, str]:
    """The ratio, in bold where it is above what it should be, and that."""
    if at_most is None:
        return f"{ratio:.3f}", ""
    return f"**{ratio:.3f}**" if ratio > at_most else f"{ratio:.3f}", f"{at_most:.2f}"


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))} |"


if __name__ == "__main__":
    main()
