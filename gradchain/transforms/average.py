"""Averages of a parameter over the steps, for the slot ``post``.

What to evaluate with is in the state, under ``"average"``: ``ParamTransformingOptimizer.averaged`` swaps it in. Before
the first step, it is the parameter.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from gradchain.contract import Group, State
from gradchain.transform import transform
from gradchain.transforms._averages import move_average, start_average


def _at_parameter(tensor: Tensor, group: Group, *, debias: bool, **_: Any) -> State:
    return start_average(tensor.clone(), debias)


@transform(init=_at_parameter, acts_on="element", average="average")
def param_ema(
    tensor: Tensor, group: Group, state: State, decay: Annotated[float, Ge(0), Lt(1)], *, debias: bool = True
) -> tuple[Tensor, State]:
    r"""Leave the parameter as it is, and keep its exponential moving average to evaluate with.

    .. math:: a_t = \beta a_{t-1} + (1 - \beta) p_t, \quad a_0 = p_0; \quad
        \text{debiased, } a_0 = 0 \text{ and } a_t / (1 - \beta^t)

    Acts on each element, in the slot ``post``, at its end: it averages what the transforms before it return. The state
    holds the average. That of points of a set that is not convex, such as a sphere, can lie outside of it.

    Args:
        decay: The factor by which the weight of a step shrinks with each later step; at least 0 and below 1.
        debias: Average over what the steps made alone; else the parameter before the first step counts, too.

    Raises:
        ValueError: ``decay`` is not in [0, 1).

    Example:
        >>> from gradchain import ParamTransformingOptimizer
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> optim = ParamTransformingOptimizer([x], post=param_ema(0.5), lr=1.0)
        >>> for _ in range(2):
        ...     x.grad = torch.tensor([3.0])
        ...     optim.step()
        >>> with optim.averaged():  # of -2 and -5
        ...     print(x.item())
        -4.0
        >>> x.item()
        -5.0

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, https://doi.org/10.1137/0330046,
        1992; torch ``optim.swa_utils.get_ema_multi_avg_fn``; optax ``ema``, of parameters.
    """
    return tensor, move_average(state, tensor, decay, debias)


def _at_slow(tensor: Tensor, group: Group, **_: Any) -> State:
    return {"average": tensor.clone(), "count": tensor.new_zeros((), dtype=torch.int64)}


@transform(init=_at_slow, acts_on="element", average="average")
def lookahead(
    tensor: Tensor,
    group: Group,
    state: State,
    k: Annotated[int, Ge(1)],
    alpha: Annotated[float, Gt(0), Le(1)],
) -> tuple[Tensor, State]:
    r"""Every ``k`` steps, go a part of the way back to where the parameter was ``k`` steps before.

    .. math:: s_t = s_{t-1} + \alpha (p_t - s_{t-1}), \; p_t \leftarrow s_t \text{ if } k \text{ divides } t,
        \text{ else } s_t = s_{t-1}; \quad s_0 = p_0

    Acts on each element, in the slot ``post``. The state holds the slow weights s, which are what to evaluate with.

    Args:
        k: The number of steps from one such step to the next; an integer, at least 1.
        alpha: The share of the way that the slow weights go; above 0 and at most 1, which changes nothing.

    Raises:
        ValueError: ``k`` is below 1, or ``alpha`` is not in (0, 1].

    Example:
        >>> slow, start = lookahead(2, 0.5), torch.tensor([0.0])
        >>> state = slow.init(start, {})
        >>> first, state = slow.update(start + 1, {}, state)
        >>> second, state = slow.update(first + 1, {}, state)
        >>> first, second
        (tensor([1.]), tensor([1.]))

    References:
        Zhang et al., Lookahead Optimizer: k steps forward, 1 step back, https://arxiv.org/abs/1907.08610, 2019; optax
        ``lookahead``.
    """
    count = state["count"] + 1
    meets = count >= k
    slow = torch.where(meets, torch.lerp(state["average"], tensor, alpha), state["average"])
    return torch.where(meets, slow, tensor), {"average": slow, "count": torch.where(meets, 0, count)}
