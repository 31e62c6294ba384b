"""Hypothesis draws the same examples in every run, and processes that tests start find this checkout."""

import os
from pathlib import Path

from hypothesis import settings

settings.register_profile("gradchain", deadline=None, derandomize=True)
settings.load_profile("gradchain")

# A checkout need not be installed, and one that is installed need not be this one.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
