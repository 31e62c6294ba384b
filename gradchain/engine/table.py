"""What is known of torch's operations: which are fast in which form. It holds for the operations of any function."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradchain._norms import norm, norms

FOREACH = frozenset(
    """
    abs neg exp expm1 log log1p log2 log10 sqrt rsqrt reciprocal sign sigmoid tanh tan sin cos sinh cosh asin acos
    atan erf erfc lgamma floor ceil round trunc frac add sub mul div pow maximum minimum clamp_min clamp_max lerp
    addcmul addcdiv
    """.split()  # noqa: SIM905 # a list would take a line for each
)
"""Operations that ``torch._foreach_*`` has for lists, in place too."""

COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})

VIEWS = frozenset(
    """
    view _unsafe_view unsqueeze squeeze expand select slice permute transpose t alias diagonal
    """.split()  # noqa: SIM905 # a list would take a line for each
)
"""Operations whose result is in the memory of their first argument."""

NUMBERS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "divide({0}, {1})",
    "pow": "power({0}, {1})",
    "neg": "-{0}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "clamp_min": "max({0}, {1})",
    "clamp_max": "min({0}, {1})",
    "reciprocal": "divide(1, {0})",
    "_to_copy": "{0}",
    "scalar_tensor": "{0}",
}
"""Operations on plain numbers, such as a hyperparameter, which Python does."""

TAKES_SCALARS = frozenset({"add", "mul", "div"})
"""Operations that ``torch._foreach_*`` has with one tensor without dimensions for the whole list, too."""

NUMBERS_ARE_SLOW = frozenset({"add", "sub", "mul", "div"})
"""Operations for which torch makes a tensor of a number in each call, which takes longer than a small operation."""

TAKES_NUMBERS = frozenset({"where", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_or", "bitwise_and"})
"""Functions of torch that take a number in place of a tensor, unlike the operation of the same name."""

RENAMED = {"sgn": "sign", "linalg_vector_norm": "norm"}
"""Operations that have another name in ``torch._foreach_*`` or in the generated code."""

WORTH_A_RECIPROCAL = 2**14
"""From this size on, a product with reciprocals is faster than a quotient, if there are few of them."""


def divide(a: Any, b: Any) -> Any:
    """``a / b``, by zero too, as torch does it."""
    return _as_torch_does(operator.truediv, a, b)


def power(a: Any, b: Any) -> Any:
    """``a ** b``, NaN where it is no real number, as torch does it."""
    return _as_torch_does(math.pow, a, b)


def scalar(number: Any, like: Tensor) -> Any:
    """``number`` as a tensor of the dtype of ``like``. Given a number, torch would make such a tensor in every call."""
    # To a compiler both are the same, but it would fix a number that changes. Fake tensors take no real ones.
    if type(like) not in (Tensor, Parameter) or torch.compiler.is_compiling():
        return number
    # A cache cannot tell 0.0 from -0.0.
    return _scalar(number, like.dtype) if number else _scalar.__wrapped__(number, like.dtype)


def scalars(number: Any, tensors: Sequence[Tensor]) -> Any:
    """``number`` as a tensor for each of ``tensors``, in a list. Of a single one, torch would make a number again."""
    value = scalar(number, tensors[0])
    return [value] * len(tensors) if isinstance(value, Tensor) else value


@functools.lru_cache(maxsize=256)
def _scalar(number: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(number, dtype=dtype, device="cpu")


def _as_torch_does(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    try:
        return function(a, b)
    except (ArithmeticError, ValueError):  # a program must not raise when it has begun to write
        same = torch.pow if function is math.pow else torch.div
        return float(same(torch.tensor(float(a), dtype=torch.float64, device="cpu"), b))


NAMES: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan, "divide": divide, "power": power}
NAMES |= {"scalar": scalar, "scalars": scalars, "norm": norm, "norms": norms, "vector_norm": torch.linalg.vector_norm}
"""What the generated code can refer to."""
