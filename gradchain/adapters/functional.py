"""``apply``: a transform over all tensors of a loop that is written with ``torch.func``, without an optimizer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

from torch import Tensor

from gradchain.broadcast import broadcast
from gradchain.contract import PLACE, Group, State, Transform, locate, show
from gradchain.engine.groups import require_known
from gradchain.stage import Stage, require_transform

T = TypeVar("T")

Tree: TypeAlias = Any
"""A tensor, None, or a dict, list, tuple or named tuple of trees. A tree of states has states in place of tensors."""

Path: TypeAlias = tuple[Hashable, ...]
"""The keys, positions and fields that lead to a leaf of a tree."""


@overload
def apply(
    transform: Transform,
    tensors: T,
    group: Group | None = None,
    *,
    param: Tree = None,
    grad: Tree = None,
    state: Tree,
    param_ndim: int | None = -1,
) -> tuple[T, Tree]: ...
@overload
def apply(
    transform: Transform,
    tensors: T,
    group: Group | None = None,
    *,
    param: Tree = None,
    grad: Tree = None,
    param_ndim: int | None = -1,
) -> T: ...
def apply(
    transform: Transform,
    tensors: Tree,
    group: Group | None = None,
    *,
    param: Tree = None,
    grad: Tree = None,
    state: Tree = None,
    param_ndim: int | None = -1,
) -> Tree:
    """Transform all tensors of a dict, list or tuple, or of nested ones, as an optimizer does with its parameters.

    The transform is broadcast by ``param_ndim``, and one with a view over all tensors, such as
    ``clip_by_global_norm``, sees all leaves. Nothing is detached or written to: derivatives go through, and it works
    under ``torch.func.vmap``, for an ensemble of models, and under ``torch.compile``.

    In its group a transform finds, besides what ``group`` has, ``"param"`` and ``"grad"`` where they are given,
    ``"shape"``, ``"index"``, the position of the leaf, and ``"name"``, the keys that lead to it, such as
    ``"layers.0.weight"``. A single tensor has no name but that in ``group``.

    Whether a step is made is up to the loop: a transform that skips steps, such as ``skip_nonfinite``, only returns
    zeros and says ``"skip_step"`` in its state.

    Args:
        transform: Any transform. Each stage of a chain acts on all leaves before the next one does.
        tensors: A tensor, or dicts, lists, tuples and named tuples of tensors, nested as you like. None, as for a
            parameter without a gradient, stays None and keeps its state.
        group: Hyperparameters by key, which win over those of the transform, and whatever else it reads.
        param: The parameters, in the same structure.
        grad: The gradients, in the same structure, where ``tensors`` are updates or parameters.
        state: What ``init_state`` or the step before returned, for a stateful transform.
        param_ndim: What the transform acts on, unless ``group`` says it; see ``broadcast``. The default, -1, is each
            entry along the first dimension: each row of weights, but each element of a bias.

    Returns:
        The transformed tensors, in the same structure; if ``state`` is given, these and the next state.

    Raises:
        TypeError: Something is of the wrong type, or a stateful transform gets no ``state``.
        ValueError: A structure or a shape differs from that of ``tensors``, a hyperparameter in ``group`` is out of
            range or does not exist, or ``param_ndim`` does not fit a leaf.

    Example:
        >>> import torch
        >>> from gradchain import clip_by_global_norm, ema
        >>> def loss(params):
        ...     return 3 * params["w"].sum() + 4 * params["b"].sum()
        >>> params = {"w": torch.tensor([1.0]), "b": torch.tensor([2.0])}
        >>> grads = torch.func.grad(loss)(params)
        >>> apply(clip_by_global_norm(1.0), grads)
        {'w': tensor([0.6000]), 'b': tensor([0.8000])}
        >>> apply(clip_by_global_norm(1.0), grads, {"clip_by_global_norm.max_norm": 2.5})
        {'w': tensor([1.5000]), 'b': tensor([2.])}

        >>> average = ema(0.5, debias=False)
        >>> state = init_state(average, params)
        >>> for _ in range(2):
        ...     updates, state = apply(average, grads, param=params, state=state)
        >>> updates
        {'w': tensor([2.2500]), 'b': tensor([3.])}
    """
    stage = _prepare(transform, group)
    if stage.stateful and state is None:
        raise TypeError(
            f"{show(transform)} has a state, so apply needs and returns it: state = init_state(t, params); "
            "tensors, state = apply(t, tensors, param=params, state=state)"
        )
    leaves = _leaves(tensors, group, param_ndim, param=param, grad=grad)
    states = {path: {} for path in leaves} if state is None else _flatten(state, tensors, "state", dict)
    # Where a state is one for all, it advances for all. What takes no part is a tensor without elements.
    inputs = {
        path: leaf.stand_in(transform) if leaf.tensor is None else leaf.tensor
        for path, leaf in leaves.items()
        if leaf.tensor is not None or (stage.shares_state and states[path] is not None)
    }
    for path in inputs:
        if states[path] is None:
            raise ValueError(f"{leaves[path].place()} has None for a state; init_state needs a tensor in its place")
    groups = [{**leaves[path].group, PLACE: leaves[path].place()} for path in inputs]
    results, new_states = stage.run(list(inputs.values()), groups, [states[path] for path in inputs])
    outputs: dict[Path, Tensor | None] = dict.fromkeys(leaves)
    for path, result, new_state in zip(inputs, results, new_states, strict=True):
        states[path] = new_state
        if leaves[path].tensor is not None:
            outputs[path] = result
    transformed = _unflatten(tensors, outputs)
    return transformed if state is None else (transformed, _unflatten(state, states))


def init_state(transform: Transform, params: Tree, group: Group | None = None, *, param_ndim: int | None = -1) -> Tree:
    """The first state of a transform, for ``apply``.

    Args:
        transform: Any transform; without a state of its own it gets an empty one.
        params: The parameters, in the structure that the tensors have in ``apply``. None has no state.
        group: As in ``apply``.
        param_ndim: As in ``apply``.

    Returns:
        The same structure, with the state of the transform in place of each tensor: a dict of tensors.

    Raises:
        TypeError: Something is of the wrong type.
        ValueError: A hyperparameter in ``group`` is out of range or does not exist, or ``param_ndim`` does not fit a
            leaf.

    Example:
        >>> import torch
        >>> from gradchain import trace
        >>> init_state(trace(0.9), [torch.ones(2), torch.ones(1)])
        [{'trace': tensor([0., 0.])}, {'trace': tensor([0.])}]
    """
    stage = _prepare(transform, group)
    leaves = _leaves(params, group, param_ndim, "params", param=params)
    states: dict[Path, State | None] = dict.fromkeys(leaves)
    for path, leaf in leaves.items():
        if leaf.tensor is not None:
            try:
                states[path] = stage.init(leaf.tensor, leaf.group)
            except Exception as error:
                locate(error, leaf.place())
                raise
    return _unflatten(params, states)


class _Leaf(NamedTuple):
    """A leaf of a tree, with its group."""

    tensor: Tensor | None
    group: Group

    def place(self) -> str:
        """The words that say where the leaf is."""
        name = f"{self.group['name']!r}" if "name" in self.group else "a tensor"
        return name if self.tensor is None else f"{name} of shape {tuple(self.tensor.shape)}, {self.tensor.dtype}"

    def stand_in(self, transform: Transform) -> Tensor:
        """A tensor without elements, for one that takes no part."""
        if "param" not in self.group:
            raise ValueError(
                f"{self.place()} is None, but its state advances with that of the others; pass param=..., so that "
                f"{show(transform)} knows what is missing"
            )
        param: Tensor = self.group["param"]
        return param.new_empty((0,) * max(param.ndim, 1))


def _prepare(transform: Transform, group: Group | None) -> Stage:
    """The transform, broadcast, where it has all hyperparameters in ``group``."""
    stage = broadcast(require_transform(transform, "transform"))
    if group is not None and not isinstance(group, dict):
        raise TypeError(
            f"group must be a dict or None, got {type(group).__name__}; give trees as param=, grad=, state="
        )
    require_known(group or {}, [stage])
    return stage


def _leaves(
    tensors: Tree, group: Group | None, param_ndim: int | None, what: str = "tensors", **context: Tree
) -> dict[Path, _Leaf]:
    """The leaves of ``tensors``, with what a transform finds in their groups."""
    flat = _flatten(tensors, tensors, what)
    trees = {key: _flatten(tree, tensors, key) for key, tree in context.items() if tree is not None}
    leaves = {}
    for index, (path, tensor) in enumerate(flat.items()):
        own = {key: leaf[path] for key, leaf in trees.items() if leaf[path] is not None}
        identity: Group = {"index": index, **({"name": _name(path)} if path else {})}
        for value in (tensor, *own.values()):
            if value is not None:
                identity["shape"] = tuple(value.shape)
        leaves[path] = _Leaf(tensor, {"param_ndim": param_ndim, **(group or {}), **identity, **own})
    return leaves


def _flatten(tree: Tree, like: Tree, what: str, kind: type = Tensor, path: Path = ()) -> dict[Path, Any]:
    """What ``tree`` has in place of each leaf of ``like``, which are the tensors."""
    expected, found = _children(like), _children(tree)
    where = f"{what} at {_name(path)!r}" if path else what
    if expected is None:
        if not (tree is None or isinstance(tree, kind)):
            remedy = "trees are made of dicts, lists and tuples"
            raise (TypeError if found is None else ValueError)(
                f"{where} must be a {kind.__name__} or None, got {type(tree).__name__}; {remedy}"
            )
        if isinstance(tree, Tensor) and isinstance(like, Tensor) and tree.shape != like.shape:
            raise ValueError(f"{where} must have the shape {tuple(like.shape)} of tensors, got {tuple(tree.shape)}")
        return {path: tree}
    if found is None:
        raise ValueError(f"{where} must be a {type(like).__name__}, as in tensors, got {type(tree).__name__}")
    for key in [*expected, *found]:
        if key not in expected or key not in found:
            owner = "tensors" if key in expected else what
            raise ValueError(f"{what} must have the structure of tensors; {_name((*path, key))!r} is only in {owner}")
    return {
        leaf_path: leaf
        for key, child in expected.items()
        for leaf_path, leaf in _flatten(found[key], child, what, kind, (*path, key)).items()
    }


def _unflatten(like: Tree, leaves: Mapping[Path, Any], path: Path = ()) -> Tree:
    """A tree of these leaves, with the containers of ``like``."""
    children = None if path in leaves else _children(like)
    if children is None:
        return leaves[path]
    values = [_unflatten(child, leaves, (*path, key)) for key, child in children.items()]
    if isinstance(like, dict):
        return like | dict(zip(like, values, strict=True))  # of its own type, such as OrderedDict
    return like._make(values) if hasattr(like, "_make") else type(like)(values)


def _children(tree: Tree) -> dict[Any, Tree] | None:
    """What a container has, by key, field or position; None for what is no container."""
    if isinstance(tree, dict):
        return tree
    if isinstance(tree, list | tuple):
        return dict(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    return None


def _name(path: Path) -> str:
    return ".".join(map(str, path))
