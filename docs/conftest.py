"""The code of the pages runs as doctests; a page of a framework runs where that is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HOW_TO = Path(__file__).parent / "how-to"
NEEDS = {
    "accelerate.md": ("accelerate",),
    "lightning.md": ("pytorch_lightning",),
    "opacus.md": ("opacus",),
    "trainer-and-peft.md": ("transformers", "peft"),
}
collect_ignore = [str(HOW_TO / page) for page, modules in NEEDS.items() if not all(map(find_spec, modules))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let frameworks warn of what is not ours."""
    for item in items:
        if item.path.parent == HOW_TO and item.path.name in NEEDS:
            item.add_marker(pytest.mark.filterwarnings("default"))
