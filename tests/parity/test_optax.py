"""The numbers of optax: each row is a transform of ours and one of optax, which see the same trees for 20 steps.

Errors are relative to the largest element of a tensor: a mean that is subtracted leaves small numbers behind, whose
own digits are rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradchain as gc
from gradchain import Group, ParamTransformingOptimizer, Transform, chain

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
projections = optax.projections

Array = np.ndarray[Any, np.dtype[Any]]
Tree = dict[str, Array]

STEPS = 20
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
SHAPES = {
    "bias": (5,),
    "embed": (6, 2),
    "head": (2, 3, 4),
    "kernel": (3, 2, 3, 2),
    "zero.bias": (3,),  # all zero, as the gradient of what is not used
}


@pytest.fixture(autouse=True)
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """The precision, also of what optax promotes to: some of its functions return float64 for float32 if they can."""
    name = getattr(request, "param", "float64")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", name == "float64")
    yield name
    jax.config.update("jax_enable_x64", before)


def as_it_is(tree: Tree, step: int) -> Tree:
    return tree


def without_zeros(tree: Tree, step: int) -> Tree:
    """Where optax divides zero by zero."""
    return {name: np.where(value == 0, 0.1, value) for name, value in tree.items()}


def with_nans(tree: Tree, step: int) -> Tree:
    return {name: np.where(np.abs(value) > 2, np.nan, value) for name, value in tree.items()}


@dataclass(frozen=True)
class Row:
    """A transform of ours, by its name and as it is made, and what is the same in optax."""

    name: str
    ours: Callable[[], Transform]
    theirs: Callable[[], Any]
    prepare: Callable[[Tree, int], Tree] = as_it_is
    label: str = ""


def each(*transforms: Any) -> Any:
    """A stateless transform of whole trees in optax, for each array by itself."""
    tx = optax.chain(*transforms)
    return optax.stateless_with_tree_map(lambda array, _: tx.update(array, tx.init(array))[0])


def project(projection: Callable[..., Any], *arguments: Any) -> Any:
    """A projection in optax, of each array by itself, as a gradient transformation."""
    return optax.stateless_with_tree_map(lambda array, _: projection(array, *arguments))


def normal(shape: Sequence[int]) -> Array:
    return np.arange(1.0, 1 + np.prod(shape)).reshape(shape) - 2.5


def to_plane(factory: Callable[..., Any], b: float) -> Any:
    return lambda tensor, group: factory(torch.as_tensor(normal(tensor.shape)), b)(tensor, group)


def theirs_to_plane(projection: Callable[..., Any], b: float) -> Any:
    return optax.stateless_with_tree_map(lambda x, _: projection(x, jnp.asarray(normal(x.shape), x.dtype), b))


def moved(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """Where a parameter is after an update."""
    position: Tensor = group["param"] + tensor
    return position


def on_params(tx: Any) -> Any:
    """A transform of updates in optax, as one of parameters that an update has moved."""
    return optax.GradientTransformation(
        tx.init,
        lambda updates, state, params: (optax.apply_updates(params, tx.update(updates, state, params)[0]), state),
    )


IS_BIAS = {name: name.endswith("bias") for name in SHAPES}


ROWS = [
    # Stateless, of gradients.
    Row("sign", lambda: gc.sign(), lambda: optax.scale_by_sign()),
    Row("set_to_zero", lambda: gc.set_to_zero(), lambda: optax.set_to_zero()),
    Row("scale", lambda: gc.scale(-0.3), lambda: optax.scale(-0.3)),
    Row("scale", lambda: gc.scale(-0.3), lambda: optax.scale_by_learning_rate(0.3), label="learning_rate"),
    Row("clamp", lambda: gc.clamp(-0.5, 0.5), lambda: optax.clip(0.5)),
    Row("centralize", lambda: gc.centralize(), lambda: optax.centralize()),
    Row("zero_nonfinite", lambda: gc.zero_nonfinite(), lambda: optax.zero_nans(), with_nans),
    Row("clip_by_rms", lambda: gc.clip_by_rms(0.7), lambda: optax.clip_by_block_rms(0.7)),
    Row("clip_by_norm", lambda: gc.clip_by_norm(1.5), lambda: each(optax.clip_by_global_norm(1.5))),
    Row("normalize", lambda: gc.normalize(), lambda: each(optax.contrib.normalize()), without_zeros),
    Row(
        "normalize",
        lambda: gc.normalize(),
        lambda: each(optax.normalize_by_update_norm(eps=0.0)),
        without_zeros,
        label="update_norm",
    ),
    Row("chain", lambda: chain(gc.sign(), gc.scale(2.0)), lambda: optax.chain(optax.sign_sgd(-2.0))),
    Row("chain", lambda: chain(), lambda: optax.identity(), label="empty"),
    # Stateless, with a view over all tensors.
    Row("clip_by_global_norm", lambda: gc.clip_by_global_norm(3.0), lambda: optax.clip_by_global_norm(3.0)),
    Row(
        "normalize_by_global_norm",
        lambda: gc.normalize_by_global_norm(),
        lambda: optax.normalize_by_update_norm(eps=0.0),
    ),
    Row("normalize_by_global_norm", lambda: gc.normalize_by_global_norm(), optax.contrib.normalize, label="contrib"),
    # Stateful.
    Row("ema", lambda: gc.ema(0.9), lambda: optax.ema(0.9)),
    Row("ema", lambda: gc.ema(0.9, debias=False), lambda: optax.ema(0.9, debias=False), label="biased"),
    Row("trace", lambda: gc.trace(0.9), lambda: optax.trace(0.9)),
    Row("trace", lambda: gc.trace(0.9, nesterov=True), lambda: optax.trace(0.9, nesterov=True), label="nesterov"),
    Row("extrapolate", lambda: gc.extrapolate(), lambda: optax.scale_by_optimistic_gradient()),
    Row(
        "extrapolate",
        lambda: chain(gc.extrapolate(0.25), gc.scale(2.0)),
        lambda: optax.scale_by_optimistic_gradient(alpha=2.0, beta=0.5),
        label="alpha",
    ),
    Row(
        "accumulate",
        lambda: gc.accumulate(3),
        lambda: optax.MultiSteps(optax.identity(), 3, accumulator_dtype=float).gradient_transformation(),
    ),
    Row(
        "accumulate",
        lambda: chain(gc.accumulate(3), gc.scale(3.0)),
        lambda: optax.apply_every(3),
        label="apply_every",
    ),
    # With the parameters.
    Row(
        "clip_adaptive",
        lambda: gc.broadcast(gc.clip_adaptive(0.1), 1),
        lambda: optax.adaptive_grad_clip(0.1, axis=-1),
        label="rows",
    ),
    Row(
        "reject_from_param",
        lambda: gc.reject_from_param(),
        lambda: optax.stateless_with_tree_map(lambda g, p: g - projections.projection_vector(g, p)),
        without_zeros,
    ),
    Row("trust_ratio", lambda: gc.trust_ratio(), lambda: optax.scale_by_trust_ratio()),
    Row("scale_by_param_norm", lambda: gc.scale_by_param_norm(), lambda: optax.scale_by_param_block_norm()),
    Row("scale_by_param_rms", lambda: gc.scale_by_param_rms(), lambda: optax.scale_by_param_block_rms()),
    Row("decay_weights", lambda: gc.decay_weights(0.1), lambda: optax.add_decayed_weights(-0.1)),
    # Of some parameters.
    Row(
        "masked",
        lambda: gc.masked(gc.clip_by_rms(0.1), "*bias"),
        lambda: optax.masked(optax.clip_by_block_rms(0.1), IS_BIAS),
    ),
    Row(
        "masked",
        lambda: gc.masked(gc.ema(0.9), lambda group: group["param"].ndim == 1),
        lambda: optax.masked(optax.ema(0.9), lambda tree: jax.tree.map(lambda x: x.ndim == 1, tree)),
        label="ema",
    ),
    Row(
        "masked",
        lambda: gc.masked(gc.clip_by_global_norm(1.0), "*bias"),
        lambda: optax.masked(optax.clip_by_global_norm(1.0), IS_BIAS),
        label="clip_by_global_norm",
    ),
    Row(
        "partition",
        lambda: gc.partition({"*bias": gc.sign(), "*": gc.trace(0.9)}),
        lambda: optax.partition({True: optax.scale_by_sign(), False: optax.trace(0.9)}, IS_BIAS),
    ),
    Row("freeze", lambda: gc.freeze("*bias"), lambda: optax.freeze(IS_BIAS)),
    Row(
        "partition",
        lambda: gc.partition({"*bias": gc.scale(0.0), "*": gc.trace(0.9)}),
        lambda: optax.selective_transform(optax.trace(0.9), freeze_mask=IS_BIAS),
        label="selective",
    ),
    # Projections.
    Row("project_nonnegative", lambda: gc.project_nonnegative(), lambda: project(projections.projection_non_negative)),
    Row(
        "project_nonnegative",
        lambda: chain(moved, gc.project_nonnegative()),
        lambda: on_params(optax.keep_params_nonnegative()),
        label="keep_params_nonnegative",
    ),
    Row("project_box", lambda: gc.project_box(-0.5, 1.0), lambda: project(projections.projection_box, -0.5, 1.0)),
    Row(
        "project_box",
        lambda: gc.project_box(0.0, 2.0),
        lambda: project(projections.projection_hypercube, 2.0),
        label="cube",
    ),
    Row("project_linf_ball", lambda: gc.project_linf_ball(0.8), lambda: project(projections.projection_linf_ball, 0.8)),
    Row("project_l2_ball", lambda: gc.project_l2_ball(2.0), lambda: project(projections.projection_l2_ball, 2.0)),
    Row(
        "project_l2_sphere",
        lambda: gc.project_l2_sphere(2.0),
        lambda: project(projections.projection_l2_sphere, 2.0),
        without_zeros,
    ),
    Row("project_l1_ball", lambda: gc.project_l1_ball(4.0), lambda: project(projections.projection_l1_ball, 4.0)),
    Row(
        "project_l1_sphere",
        lambda: gc.project_l1_sphere(4.0),
        lambda: project(projections.projection_l1_sphere, 4.0),
        without_zeros,
    ),
    Row("project_simplex", lambda: gc.project_simplex(), lambda: project(projections.projection_simplex)),
    Row(
        "project_simplex",
        lambda: gc.project_simplex(7.0),
        lambda: project(projections.projection_simplex, 7.0),
        label="7",
    ),
    Row(
        "project_hyperplane",
        lambda: to_plane(gc.project_hyperplane, 1.5),
        lambda: theirs_to_plane(projections.projection_hyperplane, 1.5),
    ),
    Row(
        "project_halfspace",
        lambda: to_plane(gc.project_halfspace, 1.5),
        lambda: theirs_to_plane(projections.projection_halfspace, 1.5),
    ),
]


def ids(rows: Sequence[Row | Training]) -> list[str]:
    return ["-".join(filter(None, [row.name, row.label])) for row in rows]


def draw(dtype: str) -> Iterator[tuple[Tree, Tree]]:
    """For each step a gradient, long or short, and the parameters, with zeros in both."""
    rng = np.random.default_rng(0)

    def tree(spread: float) -> Tree:
        values = {name: spread * rng.normal(size=shape) for name, shape in SHAPES.items()}
        sparse = {name: np.where(rng.random(value.shape) < 0.2, 0, value) for name, value in values.items()}
        return {name: np.zeros_like(v) if name.startswith("zero") else v for name, v in sparse.items()}

    for _ in range(STEPS):
        grads, params = tree(10 ** rng.uniform(-1, 1)), tree(1.0)
        yield {k: v.astype(dtype) for k, v in grads.items()}, {k: v.astype(dtype) for k, v in params.items()}


def run_ours(transform: Any, steps: Sequence[tuple[Tree, Tree]]) -> Iterator[Tree]:
    stage, states = chain(transform), None
    for grads, params in steps:
        names = list(grads)
        tensors = [torch.tensor(grads[name]) for name in names]
        groups: list[Group] = [
            {"param": torch.tensor(params[name]), "name": name, "index": index} for index, name in enumerate(names)
        ]
        if states is None:
            states = [stage.init(group["param"], group) for group in groups]
        results, states = stage.run(tensors, groups, states)
        yield {name: result.numpy() for name, result in zip(names, results, strict=True)}


def run_theirs(tx: Any, steps: Sequence[tuple[Tree, Tree]]) -> Iterator[Tree]:
    state, update = None, jax.jit(tx.update)
    for grads, params in steps:
        if state is None:
            state = tx.init(jax.tree.map(jnp.asarray, params))
        updates, state = update(grads, state, params)
        yield jax.tree.map(np.asarray, updates)


def assert_close(ours: Tree, theirs: Tree, tolerance: float, where: object) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        expected = theirs[name]
        assert value.dtype == expected.dtype
        size = np.abs(np.nan_to_num(expected)).max()
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * size, err_msg=f"{where}, {name}")


@pytest.mark.parametrize("dtype", TOLERANCE, indirect=True)
@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_transform(row: Row, dtype: str) -> None:
    steps = [(row.prepare(grads, i), row.prepare(params, i)) for i, (grads, params) in enumerate(draw(dtype))]
    pairs = zip(run_ours(row.ours(), steps), run_theirs(row.theirs(), steps), strict=True)
    for step, (ours, theirs) in enumerate(pairs):
        assert_close(ours, theirs, TOLERANCE[dtype], f"step {step}")


def in_torch_layout(array: Array) -> tuple[Array, int]:
    """``array``, whose units are those of optax, laid out so that they are the sub-tensors of a ``param_ndim``.

    optax's weights are (in, out) and (height, width, in, out), torch's (out, in) and (out, in, height, width).
    """
    if array.ndim in (2, 3):
        return np.moveaxis(array, 0, -1), 1
    return (array, 1) if array.ndim == 1 else (np.moveaxis(array, -1, 0), -1)


@pytest.mark.parametrize("shape", [(5,), (6, 2), (2, 3, 4), (3, 2, 3, 2), (2, 3, 2, 2, 3)])
def test_clip_adaptive_units(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        grad, param = rng.normal(size=shape) * rng.uniform(0, 1, size=shape[-1]), rng.normal(size=shape)
        tx = optax.adaptive_grad_clip(0.5)
        theirs, _ = in_torch_layout(np.asarray(tx.update(jnp.asarray(grad), tx.init(param), jnp.asarray(param))[0]))
        (laid_grad, param_ndim), (laid_param, _) = in_torch_layout(grad), in_torch_layout(param)
        clip = gc.broadcast(gc.clip_adaptive(0.5), param_ndim)
        ours = clip(torch.tensor(laid_grad), {"param": torch.tensor(laid_param)}).numpy()
        assert_close({"": ours}, {"": theirs}, TOLERANCE["float64"], shape)


def test_add_noise_statistics() -> None:
    zeros = np.zeros(200_000)
    steps = [({"x": zeros}, {"x": zeros})] * 4
    ours, theirs = run_ours(gc.add_noise(0.3, 0.55), steps), run_theirs(optax.add_noise(0.3, 0.55, key=0), steps)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["x"].std() == pytest.approx(other["x"].std(), rel=0.01)
        assert abs(mine["x"].mean()) < 0.01


def test_differences() -> None:
    """Where the numbers differ, ours is what the docstrings of both say."""
    x = np.array([np.nan, np.inf, 1.0])
    steps = [({"x": x}, {"x": x})]
    (ours,), (theirs,) = run_ours(gc.zero_nonfinite(), steps), run_theirs(optax.zero_nans(), steps)
    assert ours["x"].tolist() == [0, 0, 1]
    assert theirs["x"].tolist() == [0, np.inf, 1]

    x = np.array([0.5, 0.0])
    assert gc.project_l1_sphere(2.0)(torch.tensor(x), {}).abs().sum() == 2
    assert np.abs(projections.projection_l1_sphere(jnp.asarray(x), 2.0)).sum() == 1.25

    zero = np.zeros(4)
    assert gc.project_l2_sphere(2.0)(torch.tensor(zero), {}).norm() == 2
    assert np.isnan(projections.projection_l2_sphere(jnp.asarray(zero), 2.0)).all()
    assert (gc.normalize()(torch.tensor(zero), {}) == 0).all()
    assert np.isnan(each(optax.contrib.normalize()).update({"x": zero}, optax.EmptyState(), None)[0]["x"]).all()


@dataclass(frozen=True)
class Training:
    """An optimizer of ours, by the transform that makes it, and what is the same in optax."""

    name: str
    ours: Callable[[Any], ParamTransformingOptimizer]
    theirs: Callable[[], Any]
    prepare: Callable[[Tree, int], Tree] = as_it_is
    label: str = ""


LR = 0.05
SGD, Adam = (partial(factory, lr=LR) for factory in (torch.optim.SGD, torch.optim.Adam))
optimizer = partial(ParamTransformingOptimizer, param_ndim=None)


def with_bad_steps(tree: Tree, step: int) -> Tree:
    bad = {3: np.nan, 4: np.inf, 9: -np.inf}.get(step)
    return tree if bad is None else {**tree, "embed": np.full_like(tree["embed"], bad)}


def then(tx: Any, projection: Callable[..., Any], *arguments: Any) -> Any:
    """A transform of gradients in optax, and a projection of each array by itself after the step."""

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        projected = jax.tree.map(lambda p: projection(p, *arguments), optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, projected, params), state

    return optax.GradientTransformation(tx.init, update)


TRAININGS = [
    Training(
        "clip_by_rms",
        lambda p: optimizer(p, Adam, pre=gc.clip_by_rms(0.5)),
        lambda: optax.chain(optax.clip_by_block_rms(0.5), optax.adam(LR)),
    ),
    Training(
        "centralize",
        lambda p: optimizer(p, SGD, momentum=0.9, nesterov=True, pre=gc.centralize()),
        lambda: optax.chain(optax.centralize(), optax.sgd(LR, momentum=0.9, nesterov=True)),
    ),
    Training(
        "project_l1_ball",
        lambda p: optimizer(p, SGD, post=gc.project_l1_ball(2.0)),
        lambda: then(optax.sgd(LR), projections.projection_l1_ball, 2.0),
    ),
    Training(
        "clip_by_global_norm",
        lambda p: optimizer(p, Adam, pre=gc.clip_by_global_norm(1.0)),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LR)),
    ),
    Training("trace", lambda p: optimizer(p, SGD, pre=gc.trace(0.9)), lambda: optax.sgd(LR, momentum=0.9)),
    Training(
        "extrapolate", lambda p: optimizer(p, SGD, pre=gc.extrapolate()), lambda: optax.optimistic_gradient_descent(LR)
    ),
    Training(
        "accumulate",
        lambda p: optimizer(p, SGD, pre=gc.accumulate(3)),
        lambda: optax.MultiSteps(optax.sgd(LR), 3, accumulator_dtype=float).gradient_transformation(),
    ),
    Training(
        "extrapolate",
        lambda p: optimizer(p, Adam, update=gc.extrapolate()),
        lambda: optax.optimistic_adam_v2(LR, nesterov=False),
        label="adam",
    ),
    Training("sign", lambda p: optimizer(p, SGD, pre=chain(gc.ema(0.9), gc.sign())), lambda: optax.signum(LR, 0.9)),
    Training(
        "skip_nonfinite",
        lambda p: optimizer(p, Adam, pre=gc.skip_nonfinite(2)),
        lambda: optax.apply_if_finite(optax.adam(LR), 2),
        with_bad_steps,
    ),
    Training(
        "decay_weights",
        lambda p: optimizer(p, Adam, update=gc.decay_weights(LR * 0.3)),
        lambda: optax.adamw(LR, weight_decay=0.3),
    ),
    Training(
        "trust_ratio",
        lambda p: optimizer(p, Adam, eps=1e-6, update=chain(gc.decay_weights(LR * 0.3), gc.trust_ratio())),
        lambda: optax.lamb(LR, weight_decay=0.3),
        label="lamb",
    ),
    Training(
        "trust_ratio",
        lambda p: optimizer(p, SGD, momentum=0.9, pre=chain(gc.trust_ratio(lr_included=False), gc.scale(0.1))),
        lambda: optax.lars(LR, trust_coefficient=0.1),
        label="lars",
    ),
    Training(  # found: 11
        "trust_ratio",
        lambda p: optimizer(
            p,
            SGD,
            momentum=0.9,
            pre=chain(
                lambda tensor, group: tensor + 0.3 * group["param"], gc.trust_ratio(lr_included=False), gc.scale(0.1)
            ),
        ),
        lambda: optax.lars(LR, weight_decay=0.3, trust_coefficient=0.1),
        label="lars with weight decay",
    ),
    Training(
        "freeze",
        lambda p: optimizer(p, torch.optim.AdamW, lr=LR, weight_decay=0.3, update=gc.freeze("*bias")),
        lambda: optax.chain(optax.adamw(LR, weight_decay=0.3), optax.freeze(IS_BIAS)),
    ),
    Training(
        "partition",
        lambda p: optimizer(p, SGD, pre=gc.partition({"*bias": gc.sign(), "*": gc.trace(0.9)})),
        lambda: optax.partition({True: optax.sign_sgd(LR), False: optax.sgd(LR, momentum=0.9)}, IS_BIAS),
    ),
]

SIZES = [int(np.prod(shape)) for shape in SHAPES.values()]


def gradient(params: Tree) -> Tree:
    """The gradient of a quadratic that couples all parameters."""
    rng = np.random.default_rng(1)
    root, centre = rng.normal(size=(sum(SIZES), sum(SIZES))) / 8, rng.normal(size=sum(SIZES))
    flat = np.concatenate([np.ravel(params[name]) for name in SHAPES])
    parts = np.split(root.T @ (root @ (flat - centre)), np.cumsum(SIZES)[:-1])
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def start() -> Tree:
    return {name: np.random.default_rng(2).normal(size=shape) for name, shape in SHAPES.items()}


def train_ours(
    make: Callable[[Any], ParamTransformingOptimizer],
    prepare: Callable[[Tree, int], Tree] = as_it_is,
    after_step: Callable[[ParamTransformingOptimizer], Callable[[], None]] = lambda optimizer: lambda: None,
) -> Iterator[tuple[Tree, Tree]]:
    """For each step, the parameters after it and what to evaluate with."""
    params = {name: torch.tensor(value, requires_grad=True) for name, value in start().items()}
    optimizer = make(list(params.items()))
    finish = after_step(optimizer)

    def values() -> Tree:
        return {name: param.detach().numpy().copy() for name, param in params.items()}

    for step in range(STEPS):
        for name, grad in prepare(gradient(values()), step).items():
            params[name].grad = torch.tensor(grad)
        optimizer.step()
        finish()
        keeps_average = {"param_ema", "lookahead"} & {getattr(t, "state_name", None) for t in optimizer.post}
        with optimizer.averaged() if keeps_average else nullcontext():
            averages = values()
        yield values(), averages


def train_theirs(tx: Any, prepare: Callable[[Tree, int], Tree] = as_it_is) -> Iterator[Tree]:
    params: Tree = jax.tree.map(jnp.asarray, start())
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(prepare(gradient(params), step), state, params)
        params = optax.apply_updates(params, updates)
        yield jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("row", TRAININGS, ids=ids(TRAININGS))
def test_training(row: Training) -> None:
    pairs = zip(train_ours(row.ours, row.prepare), train_theirs(row.theirs(), row.prepare), strict=True)
    for step, ((ours, _), theirs) in enumerate(pairs):
        assert_close(ours, theirs, TOLERANCE["float64"], f"step {step}")


def test_lookahead() -> None:
    tx = optax.lookahead(optax.adam(LR), sync_period=3, slow_step_size=0.4)
    params = optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, start()))
    state = tx.init(params)
    for step, (ours, averages) in enumerate(train_ours(lambda p: optimizer(p, Adam, post=gc.lookahead(3, 0.4)))):
        updates, state = tx.update(gradient(params.fast), state, params)
        params = optax.apply_updates(params, updates)
        for mine, theirs in [(ours, params.fast), (averages, params.slow)]:
            assert_close(mine, jax.tree.map(np.asarray, theirs), TOLERANCE["float64"], f"step {step}")


@pytest.mark.parametrize("debias", [True, False])
def test_param_ema(debias: bool) -> None:
    tx, average = optax.ema(0.9), start()
    state = tx.init(average)
    steps = train_ours(lambda p: optimizer(p, Adam, post=gc.param_ema(0.9, debias=debias)))
    for step, (params, ours) in enumerate(steps):
        if debias:
            average, state = tx.update(params, state)
        else:
            average = optax.incremental_update(params, average, 0.1)
        assert_close(ours, jax.tree.map(np.asarray, average), TOLERANCE["float64"], f"step {step}")


def test_schedule() -> None:
    def decay(optim: ParamTransformingOptimizer) -> Callable[[], None]:
        scheduler = gc.schedule(optim, "clip_by_rms.threshold", torch.optim.lr_scheduler.ExponentialLR, gamma=0.7)
        return lambda: scheduler.step()

    clip = optax.inject_hyperparams(optax.clip_by_block_rms, hyperparam_dtype=jnp.float64)
    tx = optax.chain(clip(threshold=lambda step: 0.7 ** step.astype(float)), optax.sgd(LR))
    steps = train_ours(lambda p: optimizer(p, SGD, pre=gc.clip_by_rms(1.0)), after_step=decay)
    for step, ((ours, _), theirs) in enumerate(zip(steps, train_theirs(tx), strict=True)):
        assert_close(ours, theirs, TOLERANCE["float64"], f"step {step}")


# found: 11
def test_plateau() -> None:
    tx = optax.contrib.reduce_on_plateau(factor=0.5, patience=5, rtol=1e-4)
    state = tx.init(jnp.ones(1))
    optim = ParamTransformingOptimizer([torch.ones(1, requires_grad=True)], SGD, pre=gc.clip_by_rms(1.0), lr=LR)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    scheduler = gc.schedule(optim, "clip_by_rms.threshold", plateau, factor=0.5, patience=4, threshold=1e-4)
    scales = []
    for step in range(3 * STEPS):
        value = 1.0 if step else 2.0
        _, state = tx.update(jnp.ones(1), state, value=jnp.asarray(value))
        scheduler.step(value)
        scales.append((optim.param_groups[0]["clip_by_rms.threshold"], float(state.scale)))
    assert len({ours for ours, _ in scales}) > 5
    assert all(ours == theirs for ours, theirs in scales)
