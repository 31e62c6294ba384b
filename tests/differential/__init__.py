"""Random optimizers, and the plain loops that say what each of their steps must give.

``make_case(seed)`` draws a case: a chain for each slot, as Python expressions, with the param groups, the inner
optimizer, and what happens in each step. ``check(case)`` runs it through the adapters of the library and through
``Loops``, and raises a ``Mismatch`` where they differ. ``Loops`` knows the transforms only as functions of one tensor:
it cuts tensors into sub-tensors, calls the function on each in a Python loop, and steps with a plain optimizer.

``python -m tests.differential SEED COUNT`` checks many cases and prints the ones that fail, made as small as possible.
"""

from tests.differential.case import Case, Mismatch, Param, ParamGroup, Step
from tests.differential.draw import make_case
from tests.differential.run import check

__all__ = ["Case", "Mismatch", "Param", "ParamGroup", "Step", "check", "make_case"]
