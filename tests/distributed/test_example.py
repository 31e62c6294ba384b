"""The example is started as its docstring says, and shows that shards make no difference."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"


def test_example() -> None:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # so that lines, if not their ends, are whole
    done = subprocess.run(
        [sys.executable, *start, EXAMPLE], capture_output=True, text=True, check=False, timeout=60, env=buffered
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"process \d of 2: (\d+) of (\d+) elements, largest difference ([\d.e+-]+)", done.stdout)
    assert len(said) == 2
    (total,) = {int(total) for _, total, _ in said}
    assert sum(int(part) for part, *_ in said) == total
    assert all(float(difference) < 1e-5 for *_, difference in said)
    accuracy = re.search(r"accuracy ([\d.]+)%", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 95
