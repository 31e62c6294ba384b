"""Train a small net on handwritten digits, then attack it, with one tool: transforms around ``torch.optim`` steps.

Training is Adam with cleaned, clipped gradients and a bound on the weights of each neuron. The attack is projected
gradient ascent on the loss, over a perturbation of each digit that stays within a small ball.

Run ``python examples/quickstart.py --output quickstart.png``: under half a minute on two cores, no downloads.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import SubFigure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from gradchain import (
    ParamTransformingOptimizer,
    Transform,
    broadcast,
    centralize,
    chain,
    clip_by_norm,
    normalize,
    project_box,
    project_l2_ball,
    project_linf_ball,
    sign,
    to_batch,
    zero_nonfinite,
)

matplotlib.use("Agg")

HELD_OUT = 500
MAX_NORM = 2.0
SHOWN_RADIUS = 0.75


class Threat(NamedTuple):
    """What an attacker may do: steps along ``direction``, within the ``ball`` of a radius in the ``ord``-norm."""

    name: str
    ord: float
    direction: Transform
    ball: Callable[[float], Transform]
    radii: tuple[float, ...]


L2 = Threat("L2", 2, normalize(), project_l2_ball, (0.25, 0.5, 0.75, 1.0, 1.5))
LINF = Threat("Linf", math.inf, sign(), project_linf_ball, (0.05, 0.1, 0.15, 0.2, 0.3))


def load() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) with pixels in [0, 1] and their labels, in random order."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits))
    return torch.tensor(pixels, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)[order]


def train(images: Tensor, labels: Tensor, epochs: int = 30) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    # A transform acts on each entry along the first dimension unless told otherwise: `post` bounds the weights into
    # each neuron, and each bias. With None, the clipping in `pre` acts on the gradient of a whole parameter.
    optim = ParamTransformingOptimizer(
        model.parameters(),
        Adam,
        pre=chain(zero_nonfinite(), centralize(), broadcast(clip_by_norm(1.0), None)),
        post=project_l2_ball(MAX_NORM),
        lr=2e-3,
    )
    batches = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    for _ in tqdm(range(epochs), desc="train"):
        for x, y in batches:
            optim.zero_grad()
            cross_entropy(model(x), y).backward()
            optim.step()
    assert all(to_batch(p, -1).flatten(1).norm(dim=1).max() <= MAX_NORM * (1 + 1e-5) for p in model.parameters())
    return model.requires_grad_(False)


def attack(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, radius: float, steps: int = 30) -> Tensor:
    """A perturbation of each image, within the ball, that makes the loss large."""
    delta = torch.zeros_like(images, requires_grad=True)
    # The box keeps the pixels of images + delta in [0, 1]. It moves each pixel of delta towards 0: not out of the ball.
    valid_pixels = project_box(-images, 1 - images)
    optim = ParamTransformingOptimizer(
        [delta],
        SGD,
        pre=threat.direction,
        post=chain(threat.ball(radius), valid_pixels),
        lr=2.5 * radius / steps,
        maximize=True,
    )
    for _ in range(steps):
        optim.zero_grad()
        cross_entropy(model(images + delta), labels, reduction="sum").backward()
        optim.step()
    delta = delta.detach()
    assert torch.linalg.vector_norm(delta, threat.ord, dim=(1, 2, 3)).max() <= radius * (1 + 1e-5)
    assert ((images + delta) - 0.5).abs().max() <= 0.5 + 1e-6
    return delta


def predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.argmax(model(images), 1)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (predict(model, images) == labels).float().mean().item()


def draw_digits(figure: SubFigure, model: nn.Module, images: Tensor, delta: Tensor, labels: Tensor) -> None:
    """One column for each digit: clean, perturbation, attacked."""
    axes = figure.subplots(3, len(images))
    for ax, name in zip(axes[:, 0], ("clean", "perturbation", "attacked"), strict=True):
        ax.set_ylabel(name, fontsize=13)
    for row, shown in ((axes[0], images), (axes[2], images + delta)):
        for ax, image, predicted, label in zip(row, shown, predict(model, shown), labels, strict=True):
            ax.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set_title(f"reads {predicted}", color="green" if predicted == label else "red", fontsize=13)
    largest = delta.abs().max().item()
    for ax, change in zip(axes[1], delta, strict=True):
        ax.imshow(change[0].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        ax.set_title(f"L2 norm {change.norm():.2f}", fontsize=11)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])


def draw_curves(figure: SubFigure, curves: dict[Threat, list[float]]) -> None:
    """Held-out accuracy against radius, one panel for each threat."""
    for ax, (threat, accuracies) in zip(figure.subplots(len(curves)), curves.items(), strict=True):
        ax.plot((0, *threat.radii), accuracies, "o-", color="black")
        ax.set(title="held-out accuracy", xlabel=f"{threat.name} radius", ylim=(-0.04, 1.04))
        ax.yaxis.set_major_formatter("{x:.0%}")
        ax.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small net on handwritten digits, then attack it.")
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where the figure goes")
    output: Path = parser.parse_args().output

    torch.manual_seed(0)
    images, labels = load()
    model = train(images[HELD_OUT:], labels[HELD_OUT:])
    images, labels = images[:HELD_OUT], labels[:HELD_OUT]
    clean = accuracy(model, images, labels)
    print(f"held-out accuracy: {clean:.1%}")

    attacks = [(threat, radius) for threat in (L2, LINF) for radius in threat.radii]
    deltas = {(t, radius): attack(model, images, labels, t, radius) for t, radius in tqdm(attacks, desc="attack")}
    curves = {t: [clean, *(accuracy(model, images + deltas[t, r], labels) for r in t.radii)] for t in (L2, LINF)}
    for threat, accuracies in curves.items():
        print(f"{threat.name:>4} radius", *(f"{radius:7.2f}" for radius in (0, *threat.radii)))
        print("   accuracy", *(f"{share:7.1%}" for share in accuracies))

    delta = deltas[L2, SHOWN_RADIUS]
    fooled = (predict(model, images) == labels) & (predict(model, images + delta) != labels)
    first_of_each_class = [int(i) for digit in range(10) for i in (fooled & (labels == digit)).nonzero()[:1]]
    chosen = first_of_each_class[:6]
    figure = plt.figure(figsize=(10.5, 5.4), dpi=120, layout="constrained")
    figure.suptitle(
        f"{clean:.1%} of held-out digits are read right; "
        f"after a change of L2 norm at most {SHOWN_RADIUS}, {accuracy(model, images + delta, labels):.1%} are",
        fontsize=13,
    )
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 1))
    draw_digits(figure.add_subfigure(grid[0]), model, images[chosen], delta[chosen], labels[chosen])
    draw_curves(figure.add_subfigure(grid[1]), curves)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    main()
