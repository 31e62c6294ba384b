"""Four processes for all tests of this folder, most of which need a torch whose shards are not refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import Processes
from tests.versions import needs_shards

WITHOUT_SHARDS = ("test_replicated.py", "test_flat_parameters_are_refused", "test_a_torch_with_wrong_shards_is_refused")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and not any(name in item.nodeid for name in WITHOUT_SHARDS):
            item.add_marker(needs_shards)


@pytest.fixture(scope="package")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("rendezvous"))
    yield started
    started.stop()
