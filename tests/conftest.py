"""Examples are the same in every run, processes find this checkout, and pages run where torch has what they need."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.versions import needs_muon, needs_shards

settings.register_profile("gradchain", deadline=None, derandomize=True)
settings.load_profile("gradchain")

# A checkout need not be installed, and one that is installed need not be this one.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

NEEDS = {
    "README.md::README.md": needs_muon,
    "docs/guide/optimizers.md::optimizers.md": needs_muon,
    "docs/how-to/fsdp2.md::fsdp2.md": needs_shards,
    "docs/how-to/muon-and-adamw.md::muon-and-adamw.md": needs_muon,
    "gradchain/adapters/optimizer.py::gradchain.adapters.optimizer.ParamTransformingOptimizer": needs_muon,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in NEEDS:
            item.add_marker(NEEDS[item.nodeid])
