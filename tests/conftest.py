"""Examples are the same in every run, processes find this checkout, and examples with Muon run where torch has it."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.versions import needs_muon

settings.register_profile("gradchain", deadline=None, derandomize=True)
settings.load_profile("gradchain")

# A checkout need not be installed, and one that is installed need not be this one.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

WITH_MUON = {
    "README.md::README.md",
    "docs/guide/optimizers.md::optimizers.md",
    "docs/how-to/muon-and-adamw.md::muon-and-adamw.md",
    "gradchain/adapters/optimizer.py::gradchain.adapters.optimizer.ParamTransformingOptimizer",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in WITH_MUON:
            item.add_marker(needs_muon)
