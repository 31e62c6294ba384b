"""What type checkers tell a user: good calls pass, wrong hyperparameter types do not."""

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
import torch
from gradchain import Group, ParamTransformingOptimizer, Transform, broadcast, chain, clamp, clip_by_norm, transform

@transform
def damp(tensor: torch.Tensor, group: Group, rate: float, *, steps: int = 1) -> torch.Tensor:
    return tensor * rate**steps

both: Transform = chain(clip_by_norm(1.0, ord=1), damp(0.5, steps=2), lambda tensor, group: tensor.sign())
result: torch.Tensor = broadcast(both, 1)(torch.ones(2, 3), {})
name: str = repr(clamp(-1, 1).named("grad"))
x = torch.ones(3, requires_grad=True)
ParamTransformingOptimizer([x], torch.optim.Adam, pre=both, lr=0.1).step()
"""

BAD = """
import torch
from gradchain import Group, chain, clip_by_norm, keep_top_q, transform

@transform
def damp(tensor: torch.Tensor, group: Group, rate: float, *, steps: int = 1) -> torch.Tensor:
    return tensor * rate**steps

clip_by_norm("1")  # bad
clip_by_norm()  # bad
clip_by_norm(1.0, 2.0)  # bad
keep_top_q(0.5, generator=3)  # bad
damp("fast")  # bad
damp(0.5, steps=1.5)  # bad
chain(3)  # bad
chain(lambda tensor: tensor)  # bad
"""


def run(checker: str, path: Path) -> str:
    commands = {
        "mypy": ["mypy", "--strict", "--no-error-summary", "--cache-dir", str(path.parent / "cache")],
        "pyright": ["basedpyright", "--pythonpath", sys.executable],
    }
    command, *options = commands[checker]
    executable = Path(sys.executable).parent / command
    done = subprocess.run([executable, *options, path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    settings = '{"typeCheckingMode": "standard", "pythonVersion": "3.10", "include": ["*.py"]}'
    (tmp_path / "pyrightconfig.json").write_text(settings)
    return tmp_path


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_what_a_type_checker_says(checker: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "good.py").write_text(GOOD)
    (folder / "bad.py").write_text(BAD)
    good = run(checker, folder / "good.py")
    assert "error" not in good.replace("0 errors", "")
    said = run(checker, folder / "bad.py")
    lines = {int(line.split(":")[1]) for line in said.splitlines() if "bad.py:" in line and "error" in line}
    assert lines == {number for number, line in enumerate(BAD.splitlines(), 1) if line.endswith("# bad")}
