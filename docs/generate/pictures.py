"""Pictures of what transforms do, drawn by the transforms themselves. Each function is a kind of ``catalogue.Row``.

A picture is SVG to write into a page. Its colours are variables of the style sheet, for light and for dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

import gradchain
from gradchain.stage import as_stage

# Stand-ins for what the style sheet says, since matplotlib knows no variables.
INK, BEFORE, AFTER = "#010203", "#040506", "#070809"
VARIABLES = {INK: "var(--ink)", BEFORE: "var(--before)", AFTER: "var(--after)"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": BEFORE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "text.color": INK,
    "xtick.color": BEFORE,
    "ytick.color": BEFORE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
SIZE = 2.8


def draw(name: str, kind: str, shown: Sequence[str]) -> str:
    """The SVG of a picture; equal from build to build."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), torch.random.fork_rng():
        torch.manual_seed(0)
        figure = KINDS[kind](shown)
        file = io.StringIO()
        known = {"Date": None, "Creator": None}
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata=known)
    svg = file.getvalue()
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    return re.sub(r'<g id="(?:figure|axes|patch|line2d|xtick|ytick|text|matplotlib|\w+?)_?[\d.]*">', "<g>", svg)


def evaluate(expression: str, **names: Any) -> Any:
    """What an expression in the names of gradchain is."""
    known = {name: getattr(gradchain, name) for name in gradchain.__all__}
    grid = lambda tensor, group: tensor.round()  # noqa: E731
    return eval(expression, {**known, "inf": math.inf, "tensor": torch.tensor, "grid": grid, **names})


def panels(titles: Iterable[str], per_panel: int = 1, ratio: float = 1.0) -> tuple[Figure, list[Axes]]:
    """A figure with a row of ``per_panel`` axes for each title, which is that of the first."""
    titles = list(titles)
    count = len(titles) * per_panel
    figure = Figure(figsize=(SIZE * ratio * count, SIZE), layout="constrained")
    axes = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for axis, title in zip(axes[::per_panel], titles, strict=True):
        axis.set_title(wrap(title, 16 * ratio * per_panel), family="monospace", loc="left", parse_math=False)
    return figure, axes


def wrap(code: str, width: float) -> str:
    """Code in lines that are not much longer than ``width``, broken after commas."""
    lines = [""]
    for part in code.split(", "):
        if lines[-1] and len(lines[-1]) + len(part) > 1.8 * width:
            lines.append("")
        lines[-1] += f"{part}, "
    return "\n".join(lines).removesuffix(", ")


def field(shown: Sequence[str]) -> Figure:
    """Arrows and a deformed grid in the plane."""
    figure, axes = panels(shown)
    param, grad = torch.tensor([1.2, 0.6]), torch.tensor([1.0, -0.5])
    for axis, call in zip(axes, shown, strict=True):
        transform = as_stage(evaluate(call))

        def act(points: Tensor, transform: Any = transform) -> Tensor:
            group = {"param": param, "grad": grad}
            return torch.stack([transform.update(p, group, transform.init(p, group))[0] for p in points])

        ticks = 0.4 * torch.arange(-6, 7)
        fine = torch.linspace(-2.4, 2.4, 145)  # long lines, of which only corners are drawn
        for value in ticks:
            line = torch.stack([fine, value.expand_as(fine)], dim=1)
            for points in map(act, (line, line.flip(1))):
                points[1:][points.diff(dim=0).norm(dim=1) > 0.5] = math.nan  # a jump is no line
                axis.plot(*points.T, color=AFTER, linewidth=0.8, alpha=0.6, solid_capstyle="round")
        starts = torch.cartesian_prod(ticks[::2], ticks[::2])
        steps = act(starts) - starts
        moved = steps.norm(dim=1) > 1e-3
        arrows: Any = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
        axis.quiver(*starts[moved].T, *steps[moved].T, color=INK, alpha=0.55, **arrows)
        axis.plot(*starts[moved].T, ".", color=BEFORE, markersize=2)
        if "param" in call or call.startswith(("trust", "clip_adaptive")):
            axis.plot(*param, "D", color=INK, markersize=5)
            axis.text(1.3, 0.7, "param", weight="bold")
        axis.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[-2, 0, 2], yticks=[-2, 0, 2], aspect="equal")
    return figure


def elements(shown: Sequence[str]) -> Figure:
    """Elements after against before, and histograms of both."""
    figure, axes = panels(shown, 2, 1.15)
    values = 0.6 + 0.8 * torch.randn(400)
    for number, call in enumerate(shown):
        points, histogram = axes[2 * number : 2 * number + 2]
        transform = as_stage(evaluate(call))
        results = transform.update(values, {}, transform.init(values, {}))[0]
        points.axline((0, 0), slope=1, color=BEFORE, linewidth=0.8, linestyle=":")
        points.scatter(values, results, s=5, color=AFTER, alpha=0.7, linewidths=0)
        points.set(xlabel="before", ylabel="after", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        bins = torch.linspace(-3.05, 3.05, 62).tolist()
        histogram.hist(values, bins, color=BEFORE, alpha=0.55)
        histogram.hist(results, bins, histtype="step", color=AFTER, linewidth=1.4)
        histogram.set(xlabel="element", ylabel="elements", yscale="symlog")
    return figure


def series(shown: Sequence[str]) -> Figure:
    """An element over the steps."""
    steps = torch.arange(100)
    values = torch.sin(steps / 12) + 0.4 * torch.randn(100)
    return _over_steps(shown, values, "element")


def norms(shown: Sequence[str]) -> Figure:
    """A norm over the steps."""
    values = 1 + 0.6 * torch.exp(-torch.arange(60) / 15) + 0.25 * torch.randn(60).abs()
    values[[12, 30, 31, 47]] = torch.tensor([6.0, 5.0, 3.0, 7.0])
    if any("nonfinite" in call for call in shown):
        values[[12, 47]] = torch.nan
    return _over_steps(shown, values, "norm")


def _over_steps(shown: Sequence[str], values: Tensor, label: str) -> Figure:
    figure, axes = panels(shown, ratio=1.9)
    for axis, call in zip(axes, shown, strict=True):
        transform = as_stage(evaluate(call))
        state = transform.init(values[:1], {})
        results = []
        for value in values:
            result, state = transform.update(value.reshape(1), {}, state)
            results.append(result.item())
        axis.plot(values, color=BEFORE, linewidth=1, zorder=3)
        for step in values.isnan().nonzero():
            axis.axvline(step.item(), color=BEFORE, linestyle=":")
            axis.text(step.item() + 0.6, axis.get_ylim()[1], "NaN", va="top")
        axis.plot(results, color=AFTER, linewidth=1.8)
        axis.set(xlabel="step", ylabel=label)
    return figure


def matrix(shown: Sequence[str]) -> Figure:
    """A matrix before and after, as colours."""
    x = torch.randn(6, 8) * torch.tensor([0.2, 0.5, 1, 1, 2, 0.3]).unsqueeze(1)
    stops = [(0, "#2f7fd6"), (0.5, "#2f7fd600"), (0.5, "#e8590c00"), (1, "#e8590c")]
    colours = LinearSegmentedColormap.from_list("signed", stops)
    figure, axes = panels(["x", *shown], ratio=1.1)
    for axis, values in zip(axes, [x, *(evaluate(call, x=x) for call in shown)], strict=True):
        largest = values.abs().max().item()
        axis.pcolormesh(values.flip(0), cmap=colours, vmin=-largest, vmax=largest, edgecolors=BEFORE, linewidth=0.3)
        axis.set(xticks=[], yticks=[], aspect="equal", xlabel=f"at most {largest:.2g}")
    return figure


def spectrum(shown: Sequence[str]) -> Figure:
    """Singular values before and after."""
    x = torch.randn(16, 32) + 1.5 * torch.randn(16, 1)
    figure, axes = panels(shown, ratio=1.9)
    for axis, call in zip(axes, shown, strict=True):
        for values, colour in ((x, BEFORE), (evaluate(call)(x, {}), AFTER)):
            axis.plot(range(1, 17), torch.linalg.svdvals(values), ".-", color=colour, linewidth=1.2)
        axis.set(xlabel="number", ylabel="singular value", ylim=(0, None))
    return figure


def path(shown: Sequence[str]) -> Figure:
    """The way of an optimizer, with and without transforms, over the contours of a function."""
    hessian = torch.tensor([[1.2, 0.8], [0.8, 6.0]])
    minimum = torch.tensor([1.0, 0.4])
    figure, axes = panels(shown, ratio=1.4)

    def walk(**settings: Any) -> Tensor:
        point = torch.tensor([-1.3, 1.1], requires_grad=True)
        optimizer = gradchain.ParamTransformingOptimizer([point], param_ndim=None, **settings)
        points = [point.detach().clone()]
        for _ in range(40):
            optimizer.zero_grad()
            way = point - minimum
            (0.5 * way @ hessian @ way).backward()
            optimizer.step()
            with optimizer.averaged() if "post" in settings and settings["post"].keeps_average else nullcontext():
                points.append(point.detach().clone())
        return torch.stack(points)

    for axis, settings in zip(axes, shown, strict=True):
        given = evaluate(f"dict({settings})")
        bare = {key: value for key, value in given.items() if key not in ("pre", "update", "post")}
        x, y = torch.meshgrid(torch.linspace(-2, 2, 80), torch.linspace(-1.6, 1.6, 80), indexing="xy")
        way = torch.stack([x, y], dim=-1) - minimum
        height = 0.5 * ((way @ hessian) * way).sum(-1)
        axis.contour(x, y, height, levels=[0.05, 0.3, 1, 2, 4, 7, 11], colors=BEFORE, linewidths=0.6, alpha=0.6)
        for points, colour in ((walk(**bare), BEFORE), (walk(**given), AFTER)):
            axis.plot(*points.T, ".-", color=colour, linewidth=1.2, markersize=4)
        axis.plot(*points[0], "o", color=INK, zorder=3)
        axis.set(xlim=(-2, 2), ylim=(-1.6, 1.6), xticks=[-2, 0, 2], yticks=[-1, 0, 1], aspect="equal")
    return figure


KINDS = {
    "field": field,
    "elements": elements,
    "series": series,
    "norms": norms,
    "matrix": matrix,
    "spectrum": spectrum,
    "path": path,
}
