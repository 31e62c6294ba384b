"""The examples are started as their docstrings say, and show that shards make no difference."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nano_gpt import LARGEST_DIFFERENCE, losses_of, run_nano_gpt

EXAMPLES = Path(__file__).parents[2] / "examples"
IN_TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_distributed() -> None:
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # so that lines, if not their ends, are whole
    command = [sys.executable, *IN_TWO, str(EXAMPLES / "distributed.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=buffered)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"process \d of 2: (\d+) of (\d+) elements, largest difference ([\d.e+-]+)", done.stdout)
    assert len(said) == 2
    (total,) = {int(total) for _, total, _ in said}
    assert sum(int(part) for part, *_ in said) == total
    assert all(float(difference) < 1e-5 for *_, difference in said)
    accuracy = re.search(r"accuracy ([\d.]+)%", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 95


@pytest.mark.parametrize("options", LARGEST_DIFFERENCE)
def test_nano_gpt(options: tuple[str, ...]) -> None:
    whole = losses_of(run_nano_gpt("nano_gpt.py", *options))
    sharded = losses_of(run_nano_gpt(*IN_TWO, "nano_gpt.py", *options))
    assert sharded == pytest.approx(whole, rel=0, abs=LARGEST_DIFFERENCE[options])
