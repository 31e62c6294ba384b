"""``@transform``, which turns a pure function ``(tensor, group, ...) -> tensor`` into a factory of transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, overload

from torch import Tensor

from gradchain.contract import Group, State
from gradchain.definition import ActsOn, Definition, TransformFactory

P = ParamSpec("P")


@overload
def transform(function: Callable[Concatenate[Tensor, Group, P], Tensor], /) -> TransformFactory[P]: ...


@overload
def transform(
    *, acts_on: ActsOn = "unit", measure: Callable[..., Group] | None = None, measures_shards: bool = False
) -> Callable[[Callable[Concatenate[Tensor, Group, P], Tensor]], TransformFactory[P]]: ...


@overload
def transform(
    *,
    init: Callable[..., State],
    start: Callable[..., Tensor] | None = None,
    acts_on: ActsOn = "unit",
    average: str | None = None,
) -> Callable[[Callable[Concatenate[Tensor, Group, State, P], tuple[Tensor, State]]], TransformFactory[P]]: ...


@overload
def transform(
    *,
    init: Callable[..., State],
    measure: Callable[..., tuple[Group, State]],
    measures_shards: bool = False,
    acts_on: ActsOn = "unit",
    skip: str | None = None,
) -> Callable[[Callable[Concatenate[Tensor, Group, P], Tensor]], TransformFactory[P]]: ...


def transform(
    function: Callable[..., Any] | None = None,
    /,
    *,
    init: Callable[..., State] | None = None,
    start: Callable[..., Tensor] | None = None,
    acts_on: ActsOn = "unit",
    measure: Callable[..., Any] | None = None,
    measures_shards: bool = False,
    average: str | None = None,
    skip: str | None = None,
) -> Any:
    """Turn a pure function ``(tensor, group, ...) -> tensor`` into a factory of transforms.

    The function is written for one tensor, with the meaning that the mathematics has; ``broadcast`` maps it over
    sub-tensors. Parameters before ``*`` are hyperparameters: the value given to the factory is the default, and the
    key ``"<function>.<parameter>"`` of the group wins. Parameters after ``*`` are options, fixed when the factory is
    called. Both are checked against their annotations, ranges (``Annotated[float, Gt(0)]``) included. The factory takes
    ``FROM_GROUP`` for a hyperparameter that has no default, since every group gives its own.

    A half-precision tensor and its context reach the function as float32, and the result is rounded back. A tensor
    without elements never reaches it: the result is empty too.

    Args:
        init: Makes the transform stateful. ``init(tensor, group, **arguments)`` returns the first state, a dict of
            tensors, for a parameter ``tensor``; the arguments are the hyperparameters and options. The function is
            ``(tensor, group, state, ...) -> (tensor, state)`` and returns a new state. ``clone()`` what is kept of an
            input: an optimizer writes to it later.
        start: Says where the state starts, for one that depends on it. ``start(tensor, group, **arguments)`` returns
            what ``init`` sees in place of a parameter ``tensor``, which is the whole one whatever ``param_ndim`` is. An
            optimizer makes such a state when it is constructed, or when the parameter is added; others wait for the
            first step.
        acts_on: What the function is written for. ``"unit"`` is a tensor that ``broadcast`` and the ``param_ndim`` of a
            group choose. ``"tensor"`` is the whole tensor, whatever the ``param_ndim`` of a group; an explicit
            ``broadcast(t, param_ndim)`` counts. ``"element"`` is each element, so that no ``broadcast`` is needed.
        measure: Gives the transform a view over all tensors of the optimizer. ``measure(tensors, **arguments)`` returns
            a dict that the function finds in its group. The tensors are as they are, half precision included, and the
            arguments those of the first group, which a parameter ``group`` of ``measure`` gets as a whole, with the
            signals in it. With ``init`` too, the state is that of the measure, one for all
            tensors: ``measure(tensors, state, **arguments)`` returns the dict and a new state, and the function is
            ``(tensor, group, ...) -> tensor``.
        measures_shards: Whether ``measure`` can deal with distributed tensors (``DTensor``); if not, it gets them
            whole.
        average: The key of the state under which there is an average of the parameter, to evaluate with.
        skip: The key of the state that says whether to call the step off.

    Raises:
        TypeError: The function, or ``init``, ``start`` or ``measure``, does not take the arguments that it gets.

    Example:
        >>> import torch
        >>> from typing import Annotated
        >>> from annotated_types import Gt
        >>> @transform
        ... def soft_sign(tensor: Tensor, group: Group, softness: Annotated[float, Gt(0)]) -> Tensor:
        ...     return tensor / (tensor.abs() + softness)
        >>> soft = soft_sign(1.0)
        >>> soft
        soft_sign(softness=1.0)
        >>> soft(torch.tensor([-1.0, 3.0]), {})
        tensor([-0.5000,  0.7500])
        >>> soft(torch.tensor([-1.0, 3.0]), {"soft_sign.softness": 3.0})
        tensor([-0.2500,  0.5000])

        >>> def zero(tensor: Tensor, group: Group) -> dict[str, Tensor]:
        ...     return {"total": torch.zeros_like(tensor)}
        >>> @transform(init=zero)
        ... def cumulate(tensor: Tensor, group: Group, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ...     total = state["total"] + tensor
        ...     return total, {"total": total}
        >>> x, group = torch.tensor([1.0, 2.0]), {}
        >>> state = cumulate().init(x, group)
        >>> _, state = cumulate().update(x, group, state)
        >>> cumulate().update(x, group, state)[0]
        tensor([2., 4.])

        >>> def largest(tensors: list[Tensor]) -> dict[str, Tensor]:
        ...     return {"largest": torch.stack([tensor.abs().max() for tensor in tensors]).max()}
        >>> @transform(measure=largest)
        ... def divide_by_largest(tensor: Tensor, group: Group) -> Tensor:
        ...     return tensor / group["largest"]
        >>> divide_by_largest().run([torch.tensor([1.0]), torch.tensor([-4.0])], [{}, {}], [{}, {}])[0]
        [tensor([0.2500]), tensor([-1.])]
    """

    def decorate(function: Callable[..., Any]) -> TransformFactory[...]:
        return Definition(function, init, start, acts_on, measure, measures_shards, average, skip).factory

    return decorate if function is None else decorate(function)
