"""Every notebook runs from top to bottom, without warnings, and holds what its cells show.

After a change of a notebook, ``python -m tests.test_notebooks`` executes all of them and stores what they show.
"""

import base64
import inspect
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from torch.optim import Adam

from tests.versions import OF_PYTHON_3_13_0

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))

NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]\d+)?")


def execute(path: Path, folder: str | Path) -> Any:
    """The notebook, executed in a new kernel and without anything that says when and where."""
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    options: dict[str, Any] = {"kernel_name": "python3", "record_timing": False, "timeout": 60}
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options).execute()
    notebook.metadata = metadata
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> dict[str, str]:
    """What a cell shows, by the name of a stream or the type of the data; pictures without what is in them."""
    texts: dict[str, str] = {}
    for output in cell.outputs:
        for name, text in ({output.name: output.text} if output.output_type == "stream" else output.data).items():
            texts[name] = texts.get(name, "") + ("" if name == "image/png" else text)
    return texts


def words(text: str) -> list[str]:
    """The text between the numbers; how many spaces there are depends on these."""
    return [" ".join(part.split()) for part in NUMBER.split(text)]


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "wrap_an_optimizer" and "decoupled_weight_decay" not in inspect.signature(Adam).parameters:
        pytest.skip("Adam of this torch prints fewer values")
    monkeypatch.setenv("PYTHONWARNINGS", OF_PYTHON_3_13_0)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
    for folder in ("IPYTHONDIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / folder))
    stored = code_cells(nbformat.read(path, as_version=4))
    executed = code_cells(execute(path, tmp_path))
    assert [cell.execution_count for cell in stored] == [*range(1, len(stored) + 1)]
    for before, after in zip(map(shown, stored), map(shown, executed), strict=True):
        assert "stderr" not in after, after["stderr"]
        assert before.keys() == after.keys()
        for name, text in after.items():
            assert words(before[name]) == words(text)
            # Training is not the same to the last digit on all processors.
            assert numbers(before[name]) == pytest.approx(numbers(text), rel=0.05, abs=1e-4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_pictures(path: Path) -> None:
    outputs = [output for cell in code_cells(nbformat.read(path, as_version=4)) for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", ())]
    assert len(pictures) >= 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert path.stat().st_size < 250_000


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with TemporaryDirectory() as folder:
            nbformat.write(execute(path, folder), path)
