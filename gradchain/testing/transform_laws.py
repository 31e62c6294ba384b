"""The laws of transforms and of projections: ``check_transform`` and ``check_projection``."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.testing import assert_close

from gradchain.broadcast import Broadcast, broadcast, to_batch
from gradchain.chain import chain
from gradchain.contract import CONTEXT, FROM_GROUP, Group, Transform, show
from gradchain.stage import as_stage, require_transform

SHAPES = ((), (0,), (1,), (3,), (0, 3), (2, 3), (2, 3, 2), (2, 3, 2, 2))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PROJECTION_LAWS = ("inside", "idempotent", "nearest")

Law: TypeAlias = Callable[[Transform, Tensor, Group], bool | None]
"""Raises where it is broken; True says that it need not be tried on more samples."""


def check_transform(
    transform: Transform,
    *,
    group: Group | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    skip: Collection[str] = (),
) -> None:
    """Raise an ``AssertionError`` if ``transform`` breaks one of the laws of transforms.

    ==================  ==============================================================================================
    law                 what it says
    ==================  ==============================================================================================
    ``pure``            Neither the input nor the group is written to.
    ``keeps_form``      The result has the shape, dtype and device of the input, 0-d inputs included.
    ``deterministic``   The same input gives the same result.
    ``zeros``           Zeros and a zero parameter give finite numbers.
    ``propagates_nan``  NaN in the input is not hidden, and infinity does not raise.
    ``any_layout``      Strided, expanded and channels_last inputs give the result of contiguous ones.
    ``half_precision``  float16 and bfloat16 give the result of float32, rounded: no sum overflows on the way.
    ``broadcasts``      ``broadcast`` equals a Python loop over sub-tensors, for every legal ``param_ndim``.
    ``vmaps``           ``torch.func.vmap`` equals a Python loop.
    ``differentiable``  ``torch.func.grad`` gives finite numbers, also at zero.
    ``compiles``        ``torch.compile`` makes one graph of it, which gives the same result.
    ``copies``          It pickles, deepcopies, and prints without a memory address; copies are equal to it.
    ==================  ==============================================================================================

    A stateful transform is checked in its first step, which must leave the given state alone and return the next one
    in the same form, neither of them sharing memory with the input.

    It takes about a second, and a few more in the first call of a process, which imports the compiler.
    ``skip={"compiles"}`` leaves that law to CI.

    Args:
        transform: The transform, any callable ``(tensor, group) -> tensor``.
        group: The keys that it reads. ``"param"`` and ``"grad"`` are always there, shaped like the tensor.
        shapes: The shapes to try.
        dtypes: The dtypes to try.
        skip: Names of laws that are not for this transform: ``"copies"`` for a lambda, ``"deterministic"`` for noise.

    Raises:
        AssertionError: A law is broken. It says which, by what input, the smallest of those tried, and how.

    Example:
        >>> from gradchain import clip_by_norm
        >>> check_transform(clip_by_norm(1.0))
        >>> check_transform(lambda tensor, group: tensor / tensor.norm(), skip={"copies"})
        Traceback (most recent call last):
            ...
        AssertionError: <lambda> breaks the law "zeros"
          input: tensor(0.), torch.float32 of shape ()
          cause: the result is not finite: tensor(nan)
    """
    transform = _FirstStep(transform) if as_stage(require_transform(transform, "transform")).stateful else transform
    samples = [sample for shape in sorted(shapes, key=_size) for dtype in dtypes for sample in _samples(shape, dtype)]
    _check(LAWS, transform, samples, group or {}, skip)


def check_projection(
    transform: Transform,
    contains: Callable[[Tensor], bool],
    *,
    group: Group | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    skip: Collection[str] = (),
) -> None:
    """Raise an ``AssertionError`` if ``transform`` is not the Euclidean projection onto a set.

    ==============  ==================================================================================================
    law             what it says
    ==============  ==================================================================================================
    ``inside``      The result is in the set.
    ``idempotent``  A second application changes nothing.
    ``nearest``     No other point of the set, from near and far, is nearer to the input.
    ==============  ==================================================================================================

    Args:
        transform: The projection, any callable ``(tensor, group) -> tensor``. It is tried in float64.
        contains: Whether a tensor is in the set, up to rounding.
        group: The keys that it reads.
        shapes: The shapes to try.
        skip: Names of laws that are not for this transform.

    Raises:
        AssertionError: A law is broken. It says which, by what input, the smallest of those tried, and how.

    Example:
        >>> from gradchain import project_l2_ball
        >>> check_projection(project_l2_ball(2.0), lambda x: x.norm() <= 2.0 + 1e-9)
    """

    def inside(transform: Transform, tensor: Tensor, group: Group) -> None:
        projected = transform(tensor, group)
        assert contains(projected), f"{projected!r} is not in the set"

    def nearest(transform: Transform, tensor: Tensor, group: Group) -> None:
        projected = transform(tensor, group)
        distance = torch.linalg.vector_norm(tensor - projected)
        for seed, size in itertools.product(range(8), (1e-3, 0.1, 1.0, 10.0)):
            around = projected + size * _context(tensor, seed)
            for other in (transform(around, group), around):
                other_distance = torch.linalg.vector_norm(tensor - other)
                assert distance <= other_distance * (1 + 1e-9) + 1e-12 or not contains(other), (
                    f"{other!r}, at the distance {other_distance:.6g}, is nearer than {projected!r}, at {distance:.6g}"
                )

    laws: dict[str, Law] = dict(zip(PROJECTION_LAWS, (inside, _idempotent, nearest), strict=True))
    samples = [sample for shape in sorted(shapes, key=_size) for sample in _samples(shape, torch.float64)]
    _check(laws, transform, [sample for sample in samples if sample.numel()], group or {}, skip)


def _check(
    laws: dict[str, Law], transform: Transform, samples: list[Tensor], group: Group, skip: Collection[str]
) -> None:
    unknown = set(skip) - set(laws)
    if unknown:
        raise ValueError(f"skip names the laws {sorted(laws)}, got {sorted(unknown)}")
    for name, law in laws.items():
        for sample in samples if name not in skip else ():
            tensor = sample.clone()
            context = {key: _context(sample, index) for index, key in enumerate(CONTEXT)}
            try:
                with torch.random.fork_rng(devices=()):
                    torch.default_generator.manual_seed(0)
                    if law(transform, tensor, {**context, **group}):
                        break
            except Exception as error:
                cause = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
                raise AssertionError(
                    f'{show(transform)} breaks the law "{name}"\n'
                    f"  input: {sample!r}, {sample.dtype} of shape {tuple(sample.shape)}\n"
                    f"  cause: {cause}"
                ) from error


class _FirstStep:
    """What a stateful transform makes of a tensor in its first step."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.stage = as_stage(transform)

    def __call__(self, tensor: Tensor, group: Group, /) -> Tensor:
        return self.stage.update(tensor, group, self.stage.init(tensor, group))[0]

    def __repr__(self) -> str:
        return show(self.transform)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FirstStep) and self.transform == other.transform

    def __hash__(self) -> int:
        return hash(self.transform)


def _assert_same_state(state: Any, expected: Any, message: str, *, values: bool) -> None:
    assert type(state) is type(expected), f"{message}: {type(state).__name__} is not {type(expected).__name__}"
    if isinstance(state, dict):
        assert state.keys() == expected.keys(), f"{message}: {sorted(state)} is not {sorted(expected)}"
        for key, value in state.items():
            _assert_same_state(value, expected[key], f'{message}, "{key}"', values=values)
        return
    assert isinstance(state, Tensor), f"{message}: a state is a dict of tensors, got {type(state).__name__}"
    for attribute in ("shape", "dtype", "device"):
        assert getattr(state, attribute) == getattr(expected, attribute), f"{message}: its {attribute} has changed"
    assert not values or torch.equal(state, expected), message


def _leaves(state: Any) -> Iterator[Tensor]:
    for value in state.values():
        yield from _leaves(value) if isinstance(value, dict) else (value,)


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return torch.Size(shape).numel(), len(shape)


def _samples(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Inputs from simple to general."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    yield torch.zeros(shape, dtype=dtype)
    yield torch.ones(shape, dtype=dtype)
    yield noise.to(dtype)
    yield (100 * noise).to(dtype)


def _context(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64) and tensor.numel() > 0


def _keeps_form(transform: Transform, tensor: Tensor, group: Group) -> None:
    chain(transform)(tensor, group)
    if isinstance(transform, _FirstStep):
        state = transform.stage.init(tensor, group)
        new_state = transform.stage.update(tensor, group, state)[1]
        _assert_same_state(new_state, state, "the next state has another form", values=False)


def _pure(transform: Transform, tensor: Tensor, group: Group) -> None:
    before, group_before = tensor.clone(), copy.deepcopy(group)
    if isinstance(transform, _FirstStep):
        state = transform.stage.init(tensor, group)
        state_before = copy.deepcopy(state)
        transform.stage.update(tensor, group, state)
        _assert_same_state(state, state_before, "it wrote to the state that it was given", values=True)
        given = [value for value in (tensor, *group.values()) if isinstance(value, Tensor) and value.numel()]
        for kept in (state, transform.stage.update(tensor, group, state)[1]):
            shared = {value.data_ptr() for value in given} & {value.data_ptr() for value in _leaves(kept)}
            assert not shared, "its state shares memory with its input, which will be written to; clone() what is kept"
    transform(tensor, group)
    assert torch.equal(tensor, before), f"it wrote {tensor!r} to its input"
    assert group.keys() == group_before.keys(), f"it changed the keys of the group to {sorted(group)}"
    for key, value in group_before.items():
        same = torch.equal(group[key], value) if isinstance(value, Tensor) else group[key] == value
        assert same, f'it wrote {group[key]!r} to group["{key}"]'


def _deterministic(transform: Transform, tensor: Tensor, group: Group) -> None:
    _assert_same(transform(tensor, group), transform(tensor, group), "a second call against the first", rtol=0, atol=0)


def _zeros(transform: Transform, tensor: Tensor, group: Group) -> None:
    if tensor.numel() == 0 or tensor.any():
        return
    for context in ({}, {key: torch.zeros_like(tensor) for key in CONTEXT}):
        result = transform(tensor, {**group, **context})
        assert result.isfinite().all(), f"the result is not finite: {result!r}"


def _propagates_nan(transform: Transform, tensor: Tensor, group: Group) -> None:
    if not tensor.any():
        return
    for value in (torch.inf, -torch.inf):
        transform(_with_first(tensor, value), group)
    result = transform(_with_first(tensor, torch.nan), group)
    assert result.isnan().any(), f"NaN as first element is hidden by the result {result!r}"


def _with_first(tensor: Tensor, value: float) -> Tensor:
    return torch.cat([tensor.new_tensor([value]), tensor.flatten()[1:]]).reshape(tensor.shape)


def _any_layout(transform: Transform, tensor: Tensor, group: Group) -> None:
    if not _is_plain(tensor) or tensor.ndim == 0:
        return
    expected = transform(tensor, group)
    strided = torch.stack([tensor, tensor], dim=-1)[..., 0]
    layouts = [strided, tensor.transpose(0, -1).contiguous().transpose(0, -1)]
    if tensor.ndim == 4:
        layouts.append(tensor.contiguous(memory_format=torch.channels_last))
    for layout in layouts:
        _assert_same(transform(layout, group), expected, f"for the strides {layout.stride()}")
    expanded = tensor[:1].expand(tensor.shape)
    _assert_same(transform(expanded, group), transform(expanded.contiguous(), group), "for an expanded input")


def _half_precision(transform: Transform, tensor: Tensor, group: Group) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.numel() == 0:
        return
    wide_group = {k: v.float() if isinstance(v, Tensor) and v.dtype == tensor.dtype else v for k, v in group.items()}
    for sample in (tensor, torch.full_like(tensor, 6e4)):
        expected = transform(sample.float(), wide_group).to(tensor.dtype)
        _assert_same(transform(sample, group), expected, "against float32, rounded")


def _broadcasts(transform: Transform, tensor: Tensor, group: Group) -> None:
    if not _is_plain(tensor) or (isinstance(transform, Broadcast) and transform.param_ndim is not FROM_GROUP):
        return  # what is broadcast already keeps its own param_ndim
    for param_ndim in (*range(-tensor.ndim, tensor.ndim + 1), None):
        batches = {key: to_batch(group[key], param_ndim) for key in CONTEXT}
        expected = torch.stack(
            [
                transform(sub_tensor, {**group, **{key: batch[index] for key, batch in batches.items()}})
                for index, sub_tensor in enumerate(to_batch(tensor, param_ndim))
            ]
        ).reshape(tensor.shape)
        actual = broadcast(transform, param_ndim)(tensor, group)
        _assert_same(actual, expected, f"broadcast(..., {param_ndim}) against a loop")


def _vmaps(transform: Transform, tensor: Tensor, group: Group) -> None:
    if not _is_plain(tensor):
        return
    batch = torch.stack([tensor, 2 * tensor, tensor - 1])
    expected = torch.stack([transform(member, group) for member in batch])
    mapped = torch.func.vmap(lambda member: transform(member, group), randomness="different")(batch)
    _assert_same(mapped, expected, "vmap against a loop")


def _differentiable(transform: Transform, tensor: Tensor, group: Group) -> None:
    if not _is_plain(tensor):
        return
    gradient = torch.func.grad(lambda x: (transform(x, group) * group["grad"]).sum())(tensor)
    assert gradient.isfinite().all(), f"the derivative is not finite: {gradient!r}"


def _compiles(transform: Transform, tensor: Tensor, group: Group) -> bool:
    if tensor.dtype != torch.float32 or tensor.numel() < 2 or tensor.min() == tensor.max():
        return False
    torch.compiler.reset()
    try:
        # The kernels of the default backend need a C++ compiler; that there is one graph, without breaks, does not.
        compiled = torch.compile(lambda x, g: transform(x, g), fullgraph=True, dynamic=False, backend="aot_eager")
        _assert_same(compiled(tensor, group), transform(tensor, group), "compiled against eager")
    finally:
        torch.compiler.reset()
    return True  # compiling takes long


def _copies(transform: Transform, tensor: Tensor, group: Group) -> None:
    printed = show(transform)
    assert " at 0x" not in printed, f"it prints as {printed}"
    for copied in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):
        assert copied == transform, f"its copy {show(copied)} is not equal to it"
        assert hash(copied) == hash(transform), f"its copy {show(copied)} has another hash"
        _assert_same(copied(tensor, group), transform(tensor, group), "a copy against the original")


def _idempotent(transform: Transform, tensor: Tensor, group: Group) -> None:
    once = transform(tensor, group)
    _assert_same(transform(once, group), once, "a second application against the first")


def _assert_same(actual: Tensor, expected: Tensor, message: str, **tolerance: Any) -> None:
    def explain(text: str) -> str:
        return f"{message}: {actual!r} is not {expected!r}. {text}"

    assert_close(actual, expected, equal_nan=True, msg=explain, **tolerance)


LAWS: dict[str, Law] = {
    "pure": _pure,
    "keeps_form": _keeps_form,
    "deterministic": _deterministic,
    "zeros": _zeros,
    "propagates_nan": _propagates_nan,
    "any_layout": _any_layout,
    "half_precision": _half_precision,
    "broadcasts": _broadcasts,
    "vmaps": _vmaps,
    "differentiable": _differentiable,
    "compiles": _compiles,
    "copies": _copies,
}
