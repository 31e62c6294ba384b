"""The figures of ``explain().plot()``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradchain.explain import Explanation, Row

MOST_NAMES = 48
"""So many names of parameters can be read beside one another; of more, each n-th is shown."""


def plot_histograms(rows: Sequence[Row]) -> Figure:
    """The histogram of each row, below one another: how many elements there are, by value."""
    from matplotlib import pyplot

    count = max(len(rows), 1)
    figure, grid = pyplot.subplots(count, squeeze=False, figsize=(6.4, 1.4 * count), layout="constrained")
    for axes, row in zip(grid.flat, rows, strict=False):
        counts, edges = row.histogram
        axes.stairs(counts, edges, fill=True)
        axes.set_yscale("symlog", linthresh=1)  # many zeros do not hide the rest, and no elements are no error
        axes.set_ylim(bottom=0)
        axes.set_title(shorten(row.stage), loc="left", fontsize="medium", parse_math=False)
    figure.supylabel("elements", fontsize="medium")
    return figure


def plot_norms(parameters: Sequence[Explanation], slots: Sequence[str]) -> Figure:
    """The 2-norm of each parameter, from top to bottom, before and after each stage: a column for each slot."""
    from matplotlib import pyplot

    names = [str(each.number) if each.name is None else each.name for each in parameters]
    size = 3.2 * len(slots) + 0.075 * max(map(len, names)) + 0.6, 1.6 + 0.2 * min(len(names), MOST_NAMES)
    figure, grid = pyplot.subplots(1, len(slots), sharey=True, squeeze=False, figsize=size, layout="constrained")
    for axes, slot in zip(grid.flat, slots, strict=True):
        _plot_slot(axes, [_rows_of(each.rows, slot) for each in parameters])
        axes.set_xlabel(f"2-norm of the {slot}")
    step = math.ceil(len(names) / MOST_NAMES)
    grid[0, 0].set_yticks(range(0, len(names), step), names[::step], fontsize="small", parse_math=False)
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _rows_of(rows: Sequence[Row], slot: str) -> list[Row]:
    """Those of a slot: its input, and each stage."""
    starts = [i for i, row in enumerate(rows) if row.changed is None]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        if rows[start].stage == slot:
            return list(rows[start:end])
    return []


def _plot_slot(axes: Axes, columns: Sequence[Sequence[Row]]) -> None:
    """What the stages of a slot make of the norms of the parameters, each with its rows."""
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    stages = [row.stage for row in max(columns, key=len)]
    found = [row.norm for rows in columns for row in rows if 0 < row.norm < math.inf]
    least = min(found, default=1.0) / 2  # where zero is drawn
    for i, rows in enumerate(columns):
        if rows:
            norms = [max(row.norm, least) for row in rows]
            axes.hlines(i, min(norms), max(norms), color="0.85", linewidth=1, zorder=1)
    is_dense = len(columns) > MOST_NAMES
    for number, stage in enumerate(stages):
        shown = [(max(rows[number].norm, least), i) for i, rows in enumerate(columns) if number < len(rows)]
        colour = "0.6" if number == 0 else colormaps["viridis"](0.9 * (number - 1) / max(len(stages) - 2, 1))
        # The input as a ring around what the stages make of it, so that what no stage changes can be seen.
        size = (9.0 if is_dense else 28.0) * (1.8 if number == 0 else 1.0)
        face = "none" if number == 0 else colour
        x, y = zip(*shown, strict=True)
        axes.scatter(x, y, s=size, label=shorten(stage, 36), zorder=2, facecolors=face, edgecolors=colour)
    bad = [(max(row.norm, least), i) for i, rows in enumerate(columns) for row in rows[:1] if row.nonfinite > 0]
    if bad:
        x, y = zip(*bad, strict=True)
        axes.scatter(x, y, marker="x", color="red", label="has NaN or infinity", zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(least)), 10 ** math.ceil(math.log10(max(found, default=1.0) * 1.01)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="0.92")
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize="small", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def shorten(text: str, length: int = 50) -> str:
    """``text`` on one line: the repr of a tensor has several."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
