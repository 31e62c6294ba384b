"""The exponential moving average that several families share."""

import torch
from torch import Tensor

from gradchain.contract import State


def start_average(average: Tensor, debias: bool) -> State:
    """The state of a moving average that begins at ``average``, which weighs nothing where it is debiased."""
    return {"average": average, **({"weight": average.new_zeros(())} if debias else {})}


def move_average(state: State, tensor: Tensor, decay: float | Tensor, debias: bool) -> State:
    """The state after one more ``tensor``.

    Debiased, it is the average over what came since the start: the share of a tensor is 1 - decay, over the sum of all
    shares so far, 1 - decay^t. Dividing at once, and not at the end, loses no digits and lets ``decay`` change.
    """
    average: Tensor = state["average"]
    if not debias:
        return {"average": torch.lerp(average, tensor, 1 - decay)}
    weight = torch.lerp(state["weight"], torch.ones_like(state["weight"]), 1 - decay)
    return {"average": torch.lerp(average, tensor, (1 - decay) / weight), "weight": weight}
