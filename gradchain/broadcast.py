"""What part of a tensor a transform acts on: the whole, or each of its sub-tensors of ``param_ndim`` dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

from torch import Tensor
from torch.func import vmap

from gradchain._ranges import as_number
from gradchain.bound import BoundTransform
from gradchain.chain import Chain
from gradchain.contract import (
    CONTEXT,
    FROM_GROUP,
    FromGroup,
    Group,
    State,
    Transform,
    look_at,
    require_unwritten,
    show,
    with_keys,
)
from gradchain.stage import Combinator, Each, Stage, as_stage, require_transform


@overload
def broadcast(transform: Chain, param_ndim: int | FromGroup | None = FROM_GROUP) -> Chain: ...
@overload
def broadcast(transform: Transform, param_ndim: int | FromGroup | None = FROM_GROUP) -> Stage: ...
def broadcast(transform: Transform, param_ndim: int | FromGroup | None = FROM_GROUP) -> Stage:
    """Map a transform over the sub-tensors of ``param_ndim`` dimensions.

    For a tensor of shape (d0, d1, d2, d3), the transform acts on each

    ===============  =====================
    ``param_ndim``   sub-tensor
    ===============  =====================
    ``0``            element
    ``1`` or ``-3``  (d3,)
    ``2`` or ``-2``  (d2, d3)
    ``3`` or ``-1``  (d1, d2, d3)
    ``4`` or None    (d0, d1, d2, d3)
    ===============  =====================

    The context, ``group["param"]`` and ``group["grad"]``, is mapped likewise. The result equals that of a Python loop;
    it is computed with ``torch.func.vmap``. A chain is broadcast member by member, and a member that is broadcast
    already keeps its own ``param_ndim``.

    Args:
        transform: Any callable ``(tensor, group) -> tensor``.
        param_ndim: The number of dimensions of a sub-tensor. A negative number says how many fewer dimensions a
            sub-tensor has than the tensor, and None stands for the whole tensor. When left out, ``param_ndim`` is read
            from ``group["param_ndim"]``.

    Raises:
        TypeError: ``param_ndim`` is neither an int nor None.
        ValueError: When called: ``|param_ndim|`` is larger than the number of dimensions of the tensor.

    Example:
        >>> import torch
        >>> from gradchain import chain, normalize
        >>> rows = broadcast(normalize(), 1)
        >>> rows(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), {})
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
        >>> broadcast(chain(rows, lambda tensor, group: tensor.cumsum(0)), None)
        chain(broadcast(normalize(), param_ndim=1), broadcast(<lambda>, param_ndim=None))
    """
    if not isinstance(param_ndim, FromGroup):
        param_ndim = require_param_ndim(as_number(param_ndim))
    if isinstance(transform, Broadcast) or (isinstance(transform, Stage) and transform.is_identity):
        return transform
    if isinstance(transform, Combinator):
        return transform.rebuild([broadcast(member, param_ndim) for member in transform.members])
    return Broadcast(require_transform(transform, "the argument of broadcast"), param_ndim)


_PASSED_ON = (
    "hyperparameters",
    "stateful",
    "shares_state",
    "measures",
    "measures_shards",
    "skip_keys",
    "keeps_average",
    "starts_early",
    "counts",
    "reports",
)
"""The attributes of a transform that hold for it under ``broadcast``, too."""


class Broadcast(Each):
    """A transform, mapped over sub-tensors. Made by ``broadcast``."""

    def __init__(self, transform: Transform, param_ndim: int | FromGroup | None) -> None:
        stage = as_stage(transform)
        assert isinstance(stage, Each)
        self.transform = transform
        self.param_ndim = param_ndim
        self.stage = stage
        for trait in _PASSED_ON:
            setattr(self, trait, getattr(stage, trait))

    @property
    def state_name(self) -> str:
        """The state name of the wrapped transform."""
        return self.stage.state_name

    def functions(self) -> Iterable[Callable[..., Any]]:
        """Return the functions of the wrapped transform."""
        return self.stage.functions()

    def shares(self, key: str) -> bool:
        """Whether the value under ``key`` of the wrapped transform's state is the same for all tensors."""
        return self.stage.shares(key)

    def averages(self, state: State, param: Tensor) -> list[Tensor]:
        """Return the averages of ``param`` that the wrapped transform keeps in ``state``."""
        return self.stage.averages(state, param)

    def report(self, states: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, float]:
        """Return the figures that the wrapped transform makes for people."""
        return self.stage.report(states, sizes)

    def after_skip(self, state: State) -> None:
        """Let the wrapped transform raise if the step should not have been called off."""
        self.stage.after_skip(state)

    def start(self, tensor: Tensor, group: Group) -> Tensor:
        """Return the tensor from which ``begin`` makes the first state of a parameter ``tensor``."""
        return self.stage.start(tensor, group)

    def begin(self, tensor: Tensor, group: Group) -> State:
        """Return the first states of all sub-tensors, stacked, or the one state that all tensors share."""
        if self.shares_state:
            return self.stage.begin(tensor, group)

        def begin(sub_tensor: Tensor, sub_context: Group) -> State:
            return self.stage.begin(sub_tensor, with_keys(group, sub_context))

        state: State = self._map(begin, tensor, group)(tensor, _context(group))
        return state

    def measure(self, tensors: Sequence[Tensor], group: Group, state: State) -> tuple[Group, State]:
        """Return what the wrapped transform measures of the whole tensors, and its next state."""
        return self.stage.measure(tensors, group, state)

    def act(self, tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """Transform each sub-tensor."""
        if self.unit_ndim(tensor.ndim, group) is None or not tensor.numel():
            return self.stage.act(tensor, group, state)
        context = _context(group)
        for key, value in context.items():
            if value.shape != tensor.shape:
                raise ValueError(
                    f'group["{key}"] must have the shape {tuple(tensor.shape)} of the tensor, got {tuple(value.shape)}'
                )

        def act(sub_tensor: Tensor, sub_context: Group, sub_state: State) -> tuple[Tensor, State]:
            return self.stage.act(sub_tensor, with_keys(group, sub_context), sub_state)

        inputs = look_at(tensor, context)  # not in the mapped function, where tensors do not count writes
        try:
            result, new_state = self._map(act, tensor, group)(tensor, context, {} if self.shares_state else state)
        except RuntimeError as error:
            if "vmap:" in str(error):
                error.args = (
                    f"{error} Sub-tensors are mapped with torch.func.vmap: write torch.where for if, and no .item(); "
                    f"or act on the whole tensor, broadcast({show(self.transform)}, None).",
                )
            raise
        require_unwritten(self.transform, inputs)
        return result, state if self.shares_state else new_state

    def _map(self, function: Callable[..., Any], tensor: Tensor, group: Group) -> Callable[..., Any]:
        """Return ``function``, mapped over each dimension of ``tensor`` outside of the sub-tensors."""
        unit_ndim = self.unit_ndim(tensor.ndim, group) if tensor.numel() else None
        for _ in range(0 if unit_ndim is None else tensor.ndim - unit_ndim):
            function = vmap(function, randomness="different")
        return function

    def units(self, tensor: Tensor, group: Group) -> tuple[int | None, ...]:
        """Return what the transform acts on; see ``Stage.units``."""
        units = self.stage.units(tensor, group)
        if units != (tensor.ndim,):
            return units
        ndim = self.unit_ndim(tensor.ndim, group)
        return units if ndim is None else (ndim,)

    def check(self, group: Group) -> None:
        """Raise where a hyperparameter in ``group`` has the wrong type or is out of range."""
        self.stage.check(group)

    def replaced(self, change: Callable[[BoundTransform], BoundTransform]) -> Stage:
        """Return the same broadcast of the changed transform, or itself if nothing changes."""
        stage = self.stage.replaced(change)
        return self if stage is self.stage else Broadcast(stage, self.param_ndim)

    def unit_ndim(self, ndim: int, group: Group) -> int | None:
        """Return the number of dimensions of the sub-tensors, or None if the transform can get the whole tensor."""
        param_ndim = self.param_ndim
        acts_on = self.transform.definition.acts_on if isinstance(self.transform, BoundTransform) else "unit"
        if acts_on != "unit" and isinstance(param_ndim, FromGroup):
            return None
        if isinstance(param_ndim, FromGroup):
            if "param_ndim" not in group:
                raise ValueError(
                    f'{self!r} reads group["param_ndim"], which is not there; give it here: broadcast(..., param_ndim)'
                )
            param_ndim = require_param_ndim(group["param_ndim"])
        unit_ndim = sub_ndim(ndim, param_ndim)
        return None if unit_ndim == ndim or acts_on == "element" else unit_ndim

    def __repr__(self) -> str:
        param_ndim = "" if self.param_ndim is FROM_GROUP else f", param_ndim={self.param_ndim}"
        return f"broadcast({show(self.transform)}{param_ndim})"

    def __reduce__(self) -> tuple[Any, ...]:
        return broadcast, (self.transform, self.param_ndim)


def _context(group: Group) -> Group:
    return {key: group[key] for key in CONTEXT if key in group}


def to_batch(tensor: Tensor, param_ndim: int | None) -> Tensor:
    """Reshape to (N, d0, ...), where (d0, ...) are the sub-tensors that ``param_ndim`` chooses.

    This is the batch form that the hooks of ``ParamTransformingOptimizer`` see. It is a view where the layout of
    ``tensor`` allows one, else a copy.

    Raises:
        ValueError: ``|param_ndim|`` is larger than ``tensor.ndim``.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 3, 4, 5)
        >>> [tuple(to_batch(x, param_ndim).shape) for param_ndim in (0, 1, 2, -1, None)]
        [(120, 1), (24, 5), (6, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)]
        >>> [tuple(to_batch(torch.tensor(7.0), param_ndim).shape) for param_ndim in (0, None)]
        [(1, 1), (1, 1)]
    """
    split = tensor.ndim - sub_ndim(tensor.ndim, param_ndim)
    if tensor.ndim == 0:  # the whole tensor is its one element
        return tensor.reshape(1, 1)
    if param_ndim is None:
        return tensor.unsqueeze(0)
    count = math.prod(tensor.shape[:split])  # reshape(-1, ...) is ambiguous where a dimension is 0
    return tensor.reshape(count, *(tensor.shape[split:] if split < tensor.ndim else (1,)))


def sub_ndim(ndim: int, param_ndim: int | None) -> int:
    """Return how many of the ``ndim`` dimensions of a tensor its sub-tensors have, as ``param_ndim`` says."""
    param_ndim = require_param_ndim(param_ndim)
    if param_ndim is None:
        return ndim
    if abs(param_ndim) > ndim:
        raise ValueError(
            f"param_ndim={param_ndim} needs a tensor of at least {abs(param_ndim)} dimensions, got {ndim}; "
            "set param_ndim=None (the whole tensor) or 0 (each element), in an optimizer for a param group of its own"
        )
    return param_ndim if param_ndim >= 0 else ndim + param_ndim


def require_param_ndim(value: object) -> int | None:
    """Return ``value`` if it can be a ``param_ndim``."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise TypeError(f"param_ndim must be an int or None, got {value!r}")
