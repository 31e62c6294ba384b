"""The code of the pages runs as doctests; a page of a framework runs where that is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS = {
    "coming-from/pytorch-optimizer.md": ("pytorch_optimizer",),
    "how-to/accelerate.md": ("accelerate",),
    "how-to/lightning.md": ("pytorch_lightning",),
    "how-to/opacus.md": ("opacus",),
    "how-to/trainer-and-peft.md": ("transformers", "peft"),
}
collect_ignore = [page for page, modules in NEEDS.items() if not all(map(find_spec, modules))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let frameworks warn of what is not ours."""
    for item in items:
        if any(item.path == Path(__file__).parent / page for page in NEEDS):
            item.add_marker(pytest.mark.filterwarnings("default"))
