"""Runs of the example ``nano_gpt``, which train with the same losses in every way to train."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"

LARGEST_DIFFERENCE = {"Muon": 2e-3, "AdamW": 1e-5}
"""Between two ways to train, by the optimizer of the hidden matrices: Muon computes in bfloat16."""


def config_of(hidden: str, folder: Path) -> Path:
    """The config of the example, with another optimizer for the hidden matrices."""
    text, muon = (EXAMPLES / "nano_gpt.yaml").read_text(), "Muon, _partial_: true, lr: 0.02"
    assert muon in text
    config = folder / "nano_gpt.yaml"
    config.write_text(text if hidden == "Muon" else text.replace(muon, f"{hidden}, _partial_: true, lr: 0.003"))
    return config


def run_nano_gpt(command: Sequence[str], config: Path) -> str:
    """What the example prints."""
    *start, name = command
    done = subprocess.run(
        [sys.executable, *start, EXAMPLES / name, "--config", config],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses_of(said: str) -> list[float]:
    """The losses, of a run that goes on bit for bit where it stopped, and shows the norm of the gradients."""
    assert "stopped and resumed, the losses are the same: True" in said
    norm = re.search(r"pre/monitor/norm: (\S+)", said)
    assert norm is not None
    assert 0 < float(norm[1]) < 10
    found = re.search(r"losses: (.*)", said)
    assert found is not None
    losses = [float(loss) for loss in found[1].split()]
    assert losses[-1] < losses[0] - 1
    return losses
