"""Runs of the example ``nano_gpt``, which train with the same losses in every way to train."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"

LARGEST_DIFFERENCE = {(): 2e-3, ("--float32",): 1e-5}
"""Between the losses of two ways to train, by the options of the example: without one, Muon rounds to bfloat16."""


def run_nano_gpt(*command: str) -> str:
    """What the example prints."""
    done = subprocess.run(
        [sys.executable, *(EXAMPLES / word if word.endswith(".py") else word for word in command)],
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
