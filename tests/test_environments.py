"""``docs/environments.md`` names tests that exist, and quotes what the code or the guide says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradchain

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "test"), sorted(set(re.findall(r"`(tests/\S+\.py)::(\w+)`", TABLE))))
def test_cells_are_tests(file: str, test: str) -> None:
    assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("words", sorted(set(re.findall(r'not supported: "(.*?)"', TABLE))))
def test_limits_are_what_is_said(words: str) -> None:
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "gradchain").rglob("*.py")]
    assert any(words in " ".join(source.read_text(encoding="utf-8").split()) for source in sources)


# found: 26
def test_processes_find_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('gradchain').origin)"
    command = [sys.executable, "-S", "-c", code]  # without the packages that are installed
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert found.strip() == gradchain.__file__
