"""Take handwritten digits apart into strokes: matrix factorisation with both factors constrained to simplices.

Each digit is approximated by a mixture of 16 parts. The weights of a mixture are non-negative and sum to 1, and a part
is a non-negative image with as much ink as a digit. Adam knows nothing of that: a projection after each of its steps
sees to it. Without the projection the error is lower, and the parts are blurs with negative ink.

Run ``python examples/constrained.py --output constrained.png``: a few seconds, no downloads.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim import Adam
from tqdm import tqdm

from gradchain import ParamTransformingOptimizer, Transform, project_simplex

matplotlib.use("Agg")

PARTS = 16
INK = 20.0
COLOURS = {"projected": "tab:blue", "free": "tab:orange"}


class Run(NamedTuple):
    """The factors that were found, and the two measures of them after each step."""

    weights: Tensor
    parts: Tensor
    errors: list[float]
    violations: list[float]


def load() -> Tensor:
    """The digits, (1797, 64), each scaled to the same total of ink."""
    pixels, _ = load_digits(return_X_y=True)
    digits = torch.tensor(pixels, dtype=torch.float32)
    return INK * digits / digits.sum(1, keepdim=True)


def factorise(digits: Tensor, post: Transform | None, name: str, steps: int = 600) -> Run:
    """Minimise the squared error of ``weights @ parts``, always from the same start, with ``post`` after each step."""
    torch.manual_seed(0)
    weights = torch.full((len(digits), PARTS), 1 / PARTS, requires_grad=True)
    parts = (INK * torch.rand(PARTS, digits.shape[1]).softmax(1)).requires_grad_()
    optim = ParamTransformingOptimizer(
        [{"params": [weights], "lr": 0.02}, {"params": [parts], "lr": 0.05, "project_simplex.scale": INK}],
        Adam,
        post=post,
        param_ndim=1,
    )
    errors = []
    violations = []
    for _ in tqdm(range(steps), desc=name):
        optim.zero_grad()
        error = (weights @ parts - digits).square().sum(1).mean()
        error.backward()
        optim.step()
        errors.append(error.item())
        violations.append(max(violation(weights, 1.0), violation(parts, INK)))
    return Run(weights.detach(), parts.detach(), errors, violations)


def violation(rows: Tensor, total: float) -> float:
    """The largest negative element or error of a sum, as a share of what the rows should sum to."""
    return torch.maximum(-rows.min(), (rows.sum(1) - total).abs().max()).item() / total


def draw_measures(figure: SubFigure, runs: dict[str, Run]) -> None:
    above, below = figure.subplots(2, sharex=True)
    rounding = torch.finfo(torch.float32).eps
    for name, run in runs.items():
        above.plot(run.errors, color=COLOURS[name], label=name)
        below.plot(torch.tensor(run.violations).clamp_min(rounding / 10).numpy(), color=COLOURS[name])
    above.set(title="squared error per digit", yscale="log")
    above.legend()
    below.axhline(rounding, color="gray", linestyle=":")
    below.text(0, rounding / 1.5, "float32 rounding", color="gray", va="top")
    below.set(title="constraint violation", yscale="log", xlabel="step", ylim=(rounding / 10, 10))


def draw_ink(ax: Axes, image: Tensor) -> None:
    """Ink in red, negative ink in blue."""
    scale = image.abs().max().item()
    ax.imshow(image.reshape(8, 8).numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
    ax.set(xticks=[], yticks=[])


def draw_parts(figure: SubFigure, parts: Tensor, name: str) -> None:
    figure.suptitle(f"parts, {name}", color=COLOURS[name])
    for ax, part in zip(figure.subplots(4, PARTS // 4).flat, parts, strict=True):
        draw_ink(ax, part)


def draw_mixture(figure: SubFigure, digit: Tensor, weights: Tensor, parts: Tensor, terms: int = 5) -> None:
    """A digit, its mixture, and the parts of the largest weights."""
    largest = weights.topk(terms)
    titles = ("digit", "mixture", *(f"{weight:.0%} of" for weight in largest.values))
    images = (digit, weights @ parts, *parts[largest.indices])
    for ax, title, image in zip(figure.subplots(1, len(images)), titles, images, strict=True):
        draw_ink(ax, image)
        ax.set_title(title, fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take handwritten digits apart into strokes.")
    parser.add_argument("--output", type=Path, default=Path("constrained.png"), help="where the figure goes")
    output: Path = parser.parse_args().output

    digits = load()
    runs = {name: factorise(digits, post, name) for name, post in (("projected", project_simplex()), ("free", None))}
    for name, run in runs.items():
        print(f"{name:>9}: squared error {run.errors[-1]:.2f}, constraint violation {run.violations[-1]:.0e}")
    assert max(runs["projected"].violations) < 1e-5

    figure = plt.figure(figsize=(10.5, 5.4), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(4, 3, 3), height_ratios=(3, 1))
    draw_measures(figure.add_subfigure(grid[:, 0]), runs)
    for column, (name, run) in enumerate(runs.items(), start=1):
        draw_parts(figure.add_subfigure(grid[0, column]), run.parts, name)
    draw_mixture(figure.add_subfigure(grid[1, 1:]), digits[0], runs["projected"].weights[0], runs["projected"].parts)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    main()
