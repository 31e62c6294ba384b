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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip pages of what is not installed, and let frameworks warn of what is not ours."""
    needs = {Path(__file__).parent / page: modules for page, modules in NEEDS.items()}
    for item in items:
        if item.path in needs:
            missing = [module for module in needs[item.path] if find_spec(module) is None]
            item.add_marker(pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"))
            item.add_marker(pytest.mark.filterwarnings("default"))
