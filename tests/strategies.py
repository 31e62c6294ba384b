"""What Hypothesis draws: float64 tensors of any shape, ties and zeros included, whose squares are not lost."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

ENTRIES = st.floats(-1e3, 1e3, width=16, allow_subnormal=False)  # 0, or from 6e-5 to 1e3 in magnitude


def shapes(max_dims: int = 4, max_side: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    return array_shapes(min_dims=0, max_dims=max_dims, max_side=max_side)


def of_shape(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    return arrays(np.float16, shape, elements=ENTRIES).map(lambda array: torch.from_numpy(array.astype(np.float64)))


def tensors(max_dims: int = 4, max_side: int = 4) -> st.SearchStrategy[Tensor]:
    return shapes(max_dims, max_side).flatmap(of_shape)


def pairs() -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Two tensors of one shape."""
    return shapes().flatmap(lambda shape: st.tuples(of_shape(shape), of_shape(shape)))
