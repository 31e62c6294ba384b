"""``python -m tests.differential SEED COUNT``: check the cases of ``COUNT`` seeds, from ``SEED``."""

from __future__ import annotations

import sys
import time

from tests.differential.draw import make_case
from tests.differential.run import check
from tests.differential.shrink import report


def main(seed: int, count: int) -> int:
    """Check ``count`` cases; how many fail."""
    failures = fragile = 0
    start = time.monotonic()
    for number in range(seed, seed + count):
        case = make_case(number)
        try:
            fragile += not check(case)
        except Exception as error:
            failures += 1
            print(report(case, error), flush=True)
    print(f"{count} cases, {failures} failed, {fragile} say nothing, {time.monotonic() - start:.0f} s")
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
