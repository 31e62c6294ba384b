"""The laws that transforms and optimizers keep, as tests for yours and ours.

``check_transform``, ``check_projection`` and ``check_optimizer`` test all laws at once, and ``parametrize_with_laws``
makes a test of pytest of each. ``check_transform`` takes seconds, nearly all of them for the law ``compiles``: while
you work, pass ``skip={"compiles"}``, and leave that law to CI.
"""

from gradchain.testing.optimizer_laws import check_optimizer
from gradchain.testing.parametrize import parametrize_with_laws
from gradchain.testing.transform_laws import SHAPES as SHAPES
from gradchain.testing.transform_laws import check_projection, check_transform

__all__ = ["check_optimizer", "check_projection", "check_transform", "parametrize_with_laws"]
