"""Every example runs, without warnings, and shows what it promises."""

import re
import subprocess
import sys
from pathlib import Path

from tests.versions import OF_PYTHON_3_13_0

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-W", "error", "-W", OF_PYTHON_3_13_0, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_quickstart(tmp_path: Path) -> None:
    output = tmp_path / "new" / "quickstart.png"
    said = run("quickstart.py", "--output", output)
    assert is_png(output)
    rows = [[float(share) for share in re.findall(r"([\d.]+)%", line)] for line in said.splitlines()]
    tables = [row for row in rows if len(row) > 2]
    assert len(tables) == 2
    for accuracies in tables:
        assert accuracies[0] > 95
        assert accuracies[-1] < 5
        assert accuracies == sorted(accuracies, reverse=True)


def test_constrained(tmp_path: Path) -> None:
    output = tmp_path / "constrained.png"
    said = run("constrained.py", "--output", output)
    assert is_png(output)
    violation = {name: float(value) for name, value in re.findall(r"(\w+): .*violation (\S+)", said)}
    assert violation["projected"] < 1e-5 < 0.1 < violation["free"]


def test_whole_step(tmp_path: Path) -> None:
    output = tmp_path / "whole_step.png"
    said = run("whole_step.py", "--output", output)
    assert is_png(output)
    accuracies = [float(share) for share in re.findall(r"accuracy ([\d.]+)%", said)]
    assert len(accuracies) == 4
    assert min(accuracies) > 75


def test_qk_clip() -> None:
    said = run("qk_clip.py")
    free, clipped = map(float, re.findall(r"(?:free|clipped) ([\d.]+)", said))
    assert clipped < 10 < 30 < free
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < 1.05 * losses[3]
    assert "pre/monitor/norm" in said


def test_maml() -> None:
    said = run("maml.py")
    plain, adapted = ([float(error) for error in row.split()] for row in re.findall(r"inner step: (.*)", said))
    assert len(plain) == len(adapted) == 3
    assert adapted[1] < 0.5 < 2 < min(plain[1], adapted[0])


def test_pure_functions() -> None:
    assert 'breaks the law "differentiable"' in run("pure_functions.py")
