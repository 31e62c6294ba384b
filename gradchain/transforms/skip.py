"""Transforms that skip a whole step, and count how often they do.

They belong in ``pre``. When one says that the step must not be made, ``ParamTransformingOptimizer`` leaves parameters,
the state of the inner optimizer and the states of all other transforms as they were, and keeps the counters only. To
know, the host reads one flag a step, so a GPU is waited for once a step, as ``GradScaler`` does it.

The counters are in the state, for parameter 0 in ``optimizer.state_dict()["state"][0]["transforms"]``, or, once the
inner optimizer has made a step, in ``optimizer.state[p]["transforms"]``. Their keys begin with the slot and the name of
the transform, such as ``"pre.skip_nonfinite.total"``:

==============  ======================================================================================================
``in_a_row``    how many of the last steps were skipped, without a good one between
``total``       how many steps were skipped
``skip_step``   whether the last step was skipped
``too_many``    whether ``in_a_row`` is above ``max_consecutive``, which the optimizer makes a ``RuntimeError``
==============  ======================================================================================================

An inner optimizer that evaluates its closure often in a step (LBFGS) can meet a bad gradient after it has written to
its own memory. So that it can be given back, a step with a closure copies that memory.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from gradchain._sharding import by_kind, collect, is_distributed, local
from gradchain.contract import Group, State
from gradchain.transform import transform
from gradchain.transforms.global_norm import measure_global_norm


def _measure_finite(tensors: Sequence[Tensor], state: State, max_consecutive: int) -> tuple[Group, State]:
    flags = []
    for same in by_kind(tensors):
        flag = torch.stack([local(tensor).isfinite().all() for tensor in same]).all()
        flag = collect(flag, same[0]).all() if is_distributed(same[0]) else flag
        flags.append(flag.to(tensors[0].device))
    return _count(~torch.stack(flags).all(), state, max_consecutive)


def _measure_length(
    tensors: Sequence[Tensor],
    state: State,
    max_norm: float,
    max_consecutive: int,
    *,
    ord: float,
    by: str | None,
    group: Group,
) -> tuple[Group, State]:
    if by is not None and by not in group:
        raise ValueError(
            f'skip_large reads group["{by}"], which is not there; call optimizer.signal({by}=...) before each step'
        )
    length = measure_global_norm(tensors, ord=ord)["global_norm"] if by is None else group[by]
    return _count(~(length <= max_norm), state, max_consecutive)  # not length > max_norm, which is false for NaN


def _count_nothing(tensor: Tensor, group: Group, **arguments: Any) -> State:
    flags = {key: torch.zeros((), dtype=torch.bool, device=tensor.device) for key in ("skip_step", "too_many")}
    counters = {key: torch.zeros((), dtype=torch.int64, device=tensor.device) for key in ("in_a_row", "total")}
    return {**flags, **counters}


def _count(is_bad: Tensor, state: State, max_consecutive: int) -> tuple[Group, State]:
    is_bad = is_bad.to(state["total"].device)
    in_a_row = torch.where(is_bad, state["in_a_row"] + 1, 0)
    counted = {"in_a_row": in_a_row, "total": state["total"] + is_bad, "too_many": in_a_row > max_consecutive}
    return {"is_bad": is_bad}, {"skip_step": is_bad, **counted}


@transform(init=_count_nothing, acts_on="element", measure=_measure_finite, measures_shards=True, skip="skip_step")
def skip_nonfinite(tensor: Tensor, group: Group, max_consecutive: Annotated[int, Ge(0)] = 10) -> Tensor:
    r"""Skip the whole step if an element of any tensor is NaN or infinite.

    .. math:: t \text{ if all elements of } T = (t_1, t_2, \dots) \text{ are finite, else the step is not made}

    Acts on each element, by a decision that all tensors share. Use it in ``pre``; see the module
    ``gradchain.transforms.skip`` for what a skipped step leaves alone and how to read the counters. Called by hand, it
    sees one tensor and returns zeros for a bad one.

    Args:
        max_consecutive: How many steps in a row may be skipped; at least 0. One more is an error.

    Raises:
        ValueError: ``max_consecutive`` is below 0.
        RuntimeError: By the optimizer: more than ``max_consecutive`` steps in a row were skipped.

    Example:
        >>> x, skip = torch.tensor([1.0, float("nan")]), skip_nonfinite()
        >>> result, state = skip.update(x, {}, skip.init(x, {}))
        >>> result, state["skip_step"], state["total"]
        (tensor([0., 0.]), tensor(True), tensor(1))

    References:
        Micikevicius et al., Mixed Precision Training, https://arxiv.org/abs/1710.03740, 2017; optax
        ``apply_if_finite``, which makes the step after too many, and ``skip_not_finite`` for ``MultiSteps``.
    """
    return torch.where(group["is_bad"].to(tensor.device), 0, tensor)


@transform(init=_count_nothing, acts_on="element", measure=_measure_length, measures_shards=True, skip="skip_step")
def skip_large(
    tensor: Tensor,
    group: Group,
    max_norm: Annotated[float, Gt(0)],
    max_consecutive: Annotated[int, Ge(0)] = 10,
    *,
    ord: Annotated[float, Gt(0)] = 2.0,
    by: str | None = None,
) -> Tensor:
    r"""Skip the whole step if the ``ord``-norm of all tensors together, or the loss, is above ``max_norm``, or NaN.

    .. math:: t \text{ if } \|T\|_{ord} \le c, \; T = (t_1, t_2, \dots), \text{ else the step is not made}

    Acts on each element, by a decision that all tensors share. Use it in ``pre``; see the module
    ``gradchain.transforms.skip`` for what a skipped step leaves alone and how to read the counters. Called by hand, it
    sees one tensor and returns zeros for a long one.

    Args:
        max_norm: The largest norm to make a step with, in units of the tensors; above 0, and infinite to skip only NaN.
        max_consecutive: How many steps in a row may be skipped; at least 0. One more is an error.
        ord: The order of the norm, as in ``torch.linalg.vector_norm``; above 0.
        by: The key of a signal to compare in place of the norm, a number: ``skip_large(8.0, by="loss")``, with
            ``optimizer.signal(loss=loss)`` before each step.

    Raises:
        ValueError: ``max_norm`` or ``ord`` is not above 0, or ``max_consecutive`` is below 0; or the signal is missing.
        RuntimeError: By the optimizer: more than ``max_consecutive`` steps in a row were skipped.

    Example:
        >>> x, skip = torch.tensor([3.0, 4.0]), skip_large(4.5)
        >>> result, state = skip.update(x, {}, skip.init(x, {}))
        >>> result, state["skip_step"], state["in_a_row"]
        (tensor([0., 0.]), tensor(True), tensor(1))

    References:
        Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, https://arxiv.org/abs/2204.02311, 2022, which
        skips around loss spikes; optax ``skip_large_updates`` for ``MultiSteps``, which takes the square of the norm.
    """
    return torch.where(group["is_bad"].to(tensor.device), 0, tensor)


@skip_nonfinite.on_skip
@skip_large.on_skip
def _require_few_in_a_row(state: State, **arguments: Any) -> None:
    if state["too_many"]:
        raise RuntimeError(
            f"{int(state['in_a_row'])} steps in a row were skipped, more than allowed; look at the gradients, lower "
            "the learning rate, or raise the limit of the transform that skips"
        )
