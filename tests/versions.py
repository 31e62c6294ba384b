"""What only newer versions of torch have, and older ones are tested without."""

from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from gradchain._sharding import SHARDS_SINCE

OF_PYTHON_3_13_0 = "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"
"""The filter of a warning that torch gives with this version of Python, for processes that know none of pytest's."""

Muon: Any = getattr(torch.optim, "Muon", Optimizer)  # where there is none, what uses it is skipped
needs_muon = pytest.mark.skipif(torch.__version__ < "2.9", reason="torch.optim.Muon came with torch 2.9")
needs_shards = pytest.mark.skipif(torch.__version__ < SHARDS_SINCE, reason=f"DTensor is refused before {SHARDS_SINCE}")
needs_compiled_apply = pytest.mark.skipif(torch.__version__ < "2.10", reason="torch before 2.10 cannot compile apply")
