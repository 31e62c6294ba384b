"""Four optimizers on handwritten digits: Adam and SGD, each bare and with a chain around its step.

Adam's step is masked where it opposes the gradient and scaled to the norm of its parameter, in ``update``; SGD's
gradients are clipped together and averaged, in ``pre``. They differ in what ``CONTESTANTS`` says, and in nothing else.

Run ``python examples/whole_step.py --output whole_step.png``: under half a minute on two cores, no downloads.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from gradchain import ParamTransformingOptimizer, cautious, chain, clip_by_global_norm, ema, trust_ratio

matplotlib.use("Agg")

HELD_OUT = 500
EPOCHS = 15

CONTESTANTS: dict[str, dict[str, Any]] = {
    "Adam": {"InnerOpt": Adam, "lr": 1e-3},
    "Adam, update=chain(cautious(), trust_ratio())": {
        "InnerOpt": Adam,
        "lr": 2e-2,  # a share of the norm of each parameter, with the trust ratio
        "update": chain(cautious(), trust_ratio()),
    },
    "SGD": {"InnerOpt": SGD, "lr": 0.1},
    "SGD, pre=chain(clip_by_global_norm(1.0), ema(0.9))": {
        "InnerOpt": SGD,
        "lr": 0.1,
        "pre": chain(clip_by_global_norm(1.0), ema(0.9)),
    },
}


def load() -> tuple[TensorDataset, Tensor, Tensor]:
    """The digits to train on; the held-out pixels (N, 64) in [0, 1] and their labels."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]
    return TensorDataset(images[HELD_OUT:], labels[HELD_OUT:]), images[:HELD_OUT], labels[:HELD_OUT]


def train(name: str, data: TensorDataset, images: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """The training loss after each step, and the held-out accuracy at the end, from the same start and batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optim = ParamTransformingOptimizer(model.parameters(), **CONTESTANTS[name])
    losses = []
    for _ in tqdm(range(EPOCHS), desc=name):
        for x, y in DataLoader(data, batch_size=64, shuffle=True):
            optim.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optim.step()
            losses.append(loss.item())
    return losses, (model(images).argmax(1) == labels).float().mean().item()


def smooth(losses: list[float], width: int = 20) -> Tensor:
    return torch.tensor(losses).unfold(0, width, 1).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare optimizers with and without transforms around their step.")
    parser.add_argument("--output", type=Path, default=Path("whole_step.png"), help="where the figure goes")
    output: Path = parser.parse_args().output

    runs = {name: train(name, *load()) for name in CONTESTANTS}
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), dpi=120, layout="constrained", sharey=True)
    for (name, (losses, accuracy)), style in zip(runs.items(), ("--", "-", "--", "-"), strict=True):
        print(f"{name:>50}: loss {smooth(losses)[-1]:.4f}, held-out accuracy {accuracy:.1%}")
        axes[int(name.startswith("SGD"))].plot(
            smooth(losses), style, label=f"{name}\nlr={CONTESTANTS[name]['lr']}, {accuracy:.1%} of held-out digits"
        )
    for ax in axes:
        ax.set(xlabel="step", yscale="log", yticks=[0.05, 0.1, 0.2, 0.5, 1, 2], ylim=(0.03, 9))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9, loc="upper right")
    axes[0].set_ylabel("training loss, mean of 20 steps")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    main()
