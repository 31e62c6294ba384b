"""Transforms that combine a gradient with those of earlier steps, or with what was left of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor

from gradchain.contract import Group, State, Transform, locate, show, widen
from gradchain.stage import Combinator, below, beneath, require_transform
from gradchain.transform import transform
from gradchain.transforms._averages import move_average, start_average


def _no_average(tensor: Tensor, group: Group, *, debias: bool, **_: Any) -> State:
    return start_average(torch.zeros_like(tensor), debias)


@transform(init=_no_average, acts_on="element")
def ema(
    tensor: Tensor, group: Group, state: State, decay: Annotated[float, Ge(0), Lt(1)], *, debias: bool = True
) -> tuple[Tensor, State]:
    r"""Replace by the exponential moving average over the steps.

    .. math:: m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad m_0 = 0; \quad m_t / (1 - \beta^t) \text{ if debiased}

    Acts on each element. The state holds the average.

    Args:
        decay: The factor by which the weight of a step shrinks with each later step; at least 0 and below 1.
        debias: Divide by the sum of the weights, so that equal inputs are their own average from the first step on.

    Raises:
        ValueError: ``decay`` is not in [0, 1).

    Example:
        >>> smooth, x = ema(0.5, debias=False), torch.tensor([4.0])
        >>> state = smooth.init(x, {})
        >>> first, state = smooth.update(x, {}, state)
        >>> second, state = smooth.update(x, {}, state)
        >>> first, second
        (tensor([2.]), tensor([3.]))
        >>> ema(0.5).update(x, {}, ema(0.5).init(x, {}))[0]
        tensor([4.])

    References:
        Kingma and Ba, Adam, https://arxiv.org/abs/1412.6980, 2014; optax ``ema``.
    """
    new_state = move_average(state, tensor, decay, debias)
    return new_state["average"], new_state


def _no_trace(tensor: Tensor, group: Group, **_: Any) -> State:
    return {"trace": torch.zeros_like(tensor)}


@transform(init=_no_trace, acts_on="element")
def trace(
    tensor: Tensor, group: Group, state: State, decay: Annotated[float, Ge(0), Le(1)], *, nesterov: bool = False
) -> tuple[Tensor, State]:
    r"""Add up the steps, with weights that decay: the heavy ball.

    .. math:: m_t = g_t + \beta m_{t-1}, \quad m_0 = 0; \quad g_t + \beta m_t \text{ for Nesterov}

    Acts on each element. The state holds the sum.

    Args:
        decay: The factor by which the weight of a step shrinks with each later step; between 0 and 1.
        nesterov: Look one step ahead.

    Raises:
        ValueError: ``decay`` is not between 0 and 1.

    Example:
        >>> ball, x = trace(0.5), torch.tensor([4.0])
        >>> state = ball.init(x, {})
        >>> first, state = ball.update(x, {}, state)
        >>> second, state = ball.update(x, {}, state)
        >>> first, second
        (tensor([4.]), tensor([6.]))

    References:
        Polyak, Some methods of speeding up the convergence of iteration methods,
        https://doi.org/10.1016/0041-5553(64)90137-5, 1964; Sutskever et al., On the importance of initialization and
        momentum in deep learning, https://proceedings.mlr.press/v28/sutskever13.html, 2013; optax ``trace``.
    """
    new_trace = tensor + decay * state["trace"]
    return tensor + decay * new_trace if nesterov else new_trace, {"trace": new_trace}


def _nothing_before(tensor: Tensor, group: Group, **_: Any) -> State:
    return {"previous": torch.zeros_like(tensor), "started": tensor.new_zeros((), dtype=torch.bool)}


def _previous(state: State, tensor: Tensor) -> Tensor:
    """What the step before left; ``tensor`` in the first step."""
    return torch.where(state["started"], state["previous"], tensor)


@transform(init=_nothing_before, acts_on="element")
def amplify_slow(
    tensor: Tensor,
    group: Group,
    state: State,
    alpha: Annotated[float, Ge(0)],
    decay: Annotated[float, Ge(0), Lt(1)],
) -> tuple[Tensor, State]:
    r"""Amplify what changes slowly from step to step, by adding a multiple of the moving average.

    .. math:: g_t + \alpha m_t, \quad m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad m_0 = g_1

    Acts on each element. The state holds the average, which begins at the first gradient.

    Args:
        alpha: The factor of the moving average (the paper's lambda, there 2); at least 0, which changes nothing.
        decay: The decay of the moving average (the paper's alpha, there 0.98); at least 0 and below 1.

    Raises:
        ValueError: ``alpha`` is below 0 or ``decay`` is not in [0, 1).

    Example:
        >>> grok, x = amplify_slow(2.0, 0.5), torch.tensor([1.0])
        >>> state = grok.init(x, {})
        >>> first, state = grok.update(x, {}, state)
        >>> second, state = grok.update(-x, {}, state)
        >>> first, second
        (tensor([3.]), tensor([-1.]))

    References:
        Lee et al., Grokfast: Accelerated Grokking by Amplifying Slow Gradients, https://arxiv.org/abs/2405.20233, 2024.
    """
    average = torch.lerp(_previous(state, tensor), tensor, 1 - decay)
    return tensor + alpha * average, {"previous": average, "started": torch.ones_like(state["started"])}


@transform(init=_nothing_before, acts_on="element")
def extrapolate(tensor: Tensor, group: Group, state: State, weight: float = 1.0) -> tuple[Tensor, State]:
    r"""Go on in the direction in which the tensor has changed since the step before.

    .. math:: g_t + w (g_t - g_{t-1}), \quad g_0 = g_1

    Acts on each element. The state holds the tensor of the step before; the first step changes nothing. So it is in the
    paper of MARS, whose first two parameters are one; the code of its authors has g_0 = 0 instead.

    Args:
        weight: The share of the last change that is added: 1 for the optimistic gradient, and gamma beta / (1 - beta)
            for MARS with the scale gamma and the momentum beta (0.475 for the paper's 0.025 and 0.95). Any number.

    Example:
        >>> optimistic, x = extrapolate(), torch.tensor([1.0])
        >>> state = optimistic.init(x, {})
        >>> first, state = optimistic.update(x, {}, state)
        >>> second, state = optimistic.update(3 * x, {}, state)
        >>> first, second
        (tensor([1.]), tensor([5.]))

    References:
        Daskalakis et al., Training GANs with Optimism, https://arxiv.org/abs/1711.00141, 2017; Yuan et al., MARS:
        Unleashing the Power of Variance Reduction for Training Large Models, https://arxiv.org/abs/2411.10438, 2024,
        in its approximate form, before it clips; optax ``scale_by_optimistic_gradient``.
    """
    # A copy, because an optimizer writes the result over the gradient.
    new_state = {"previous": tensor.clone(), "started": torch.ones_like(state["started"])}
    return tensor + weight * (tensor - _previous(state, tensor)), new_state


def _nothing_accumulated(tensor: Tensor, group: Group, **_: Any) -> State:
    return {"mean": torch.zeros_like(tensor), "count": tensor.new_zeros((), dtype=torch.int64)}


@transform(init=_nothing_accumulated, acts_on="element")
def accumulate(tensor: Tensor, group: Group, state: State, k: Annotated[int, Ge(1)]) -> tuple[Tensor, State]:
    r"""Return the mean over ``k`` steps in the last of them, and zero in the others.

    .. math:: \tfrac{1}{k} \textstyle\sum_{i=0}^{k-1} g_{t-i} \text{ if } k \text{ divides } t, \text{ else } 0

    Acts on each element. The state holds the mean so far. The inner optimizer makes a step with each zero, too:
    momentum and weight decay go on, which they do not in a plain loop that steps once for ``k`` backward passes.

    Args:
        k: The number of steps; an integer, at least 1, which changes nothing.

    Raises:
        ValueError: ``k`` is below 1.

    Example:
        >>> pair, x = accumulate(2), torch.tensor([1.0])
        >>> state = pair.init(x, {})
        >>> first, state = pair.update(x, {}, state)
        >>> second, state = pair.update(3 * x, {}, state)
        >>> first, second
        (tensor([0.]), tensor([2.]))

    References:
        optax ``MultiSteps``, which keeps its inner optimizer from stepping with zeros.
    """
    count = state["count"] + 1
    mean = state["mean"] + (tensor - state["mean"]) / count
    full = count >= k
    return torch.where(full, mean, 0), {"mean": torch.where(full, 0, mean), "count": torch.where(full, 0, count)}


def with_error_feedback(transform: Transform) -> ErrorFeedback:
    r"""Add to each gradient what the transform has left out of the ones before.

    .. math:: r_t = T(g_t + e_{t-1}), \quad e_t = g_t + e_{t-1} - r_t, \quad e_0 = 0

    Acts on what ``transform`` acts on. Over the steps, the results sum up to the gradients but for the last error,
    however much T drops in one step; the rounding of half precision counts as dropped. The state holds the error, and
    the state of ``transform`` if it has one. NaN or infinity would stay in the error: ``zero_nonfinite`` before helps.

    Args:
        transform: T: any callable ``(tensor, group) -> tensor``, such as ``keep_top_q(0.99)``.

    Raises:
        TypeError: ``transform`` is not callable, or is a factory that was not called.

    Example:
        >>> from gradchain import keep_top_q
        >>> sparse, x = with_error_feedback(keep_top_q(0.5)), torch.tensor([3.0, 2.0])
        >>> sparse
        with_error_feedback(keep_top_q(q=0.5))
        >>> state = sparse.init(x, {})
        >>> first, state = sparse.update(x, {}, state)
        >>> second, state = sparse.update(x, {}, state)
        >>> first, second
        (tensor([3., 0.]), tensor([0., 4.]))

    References:
        Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression Schemes,
        https://arxiv.org/abs/1901.09847, 2019.
    """
    return ErrorFeedback([require_transform(transform, "the argument of with_error_feedback")])


class ErrorFeedback(Combinator):
    """A transform that gets back what it has left out. Made by ``with_error_feedback``."""

    name = "with_error_feedback"

    def __init__(self, members: Sequence[Transform]) -> None:
        super().__init__(members)
        self.stateful = True

    def init(self, tensor: Tensor, group: Group) -> State:
        """No error, and the first state of the transform."""
        tensor, group = widen(tensor, group)
        return {"error": torch.zeros_like(tensor), **beneath(self.stages[0].init(tensor, group), self.path(0))}

    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Run all tensors through the transform at once, so that it can measure all of them."""
        (stage,) = self.stages
        wide = [widen(tensor, group) for tensor, group in zip(tensors, groups, strict=True)]
        # A tensor that takes no part in a step is given as one without elements.
        totals = [
            tensor + state["error"] if tensor.numel() else tensor
            for (tensor, _), state in zip(wide, states, strict=True)
        ]
        try:
            inner = [below(state, self.path(0)) for state in states]
            results, inner = stage.run(totals, [group for _, group in wide], inner)
        except Exception as error:
            locate(error, self.place(0))
            raise
        results = [result.to(tensor.dtype) for result, tensor in zip(results, tensors, strict=True)]
        new_states: list[State] = [
            {"error": total - result if total.numel() else old["error"], **beneath(new, self.path(0))}
            for total, result, old, new in zip(totals, results, states, inner, strict=True)
        ]
        return results, new_states

    def place(self, index: int) -> str:
        """The words that say where the transform is: there is but one."""
        return show(self.members[index])

    def rebuild(self, members: Sequence[Transform]) -> ErrorFeedback:
        """The same around another transform."""
        return ErrorFeedback(members)

    def __repr__(self) -> str:
        return f"with_error_feedback({show(self.members[0])})"

    def __reduce__(self) -> tuple[Any, ...]:
        return with_error_feedback, self.members
