import copy
import itertools
import pickle
import re
from collections.abc import Callable, Iterable
from math import inf, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn, tensor
from torch.linalg import vector_norm
from torch.testing import assert_close

import gradchain as gc
from gradchain import Group, Transform, broadcast, chain
from gradchain.bound import BoundTransform
from tests.strategies import pairs, tensors

T = tensor([-2.0, 0.5, 3.0])


@pytest.mark.parametrize(
    ("transform", "group", "expected"),
    [
        (gc.project_nonnegative(), {}, [0.0, 0.5, 3.0]),
        (gc.project_box(-1, 2), {}, [-1.0, 0.5, 2.0]),
        (gc.project_box(-1, tensor([0.0, 0.0, 4.0])), {}, [-1.0, 0.0, 3.0]),
        (gc.project_box(-1, 2), {"project_box.lower": tensor([0.0, 1.0, 2.0])}, [0.0, 1.0, 2.0]),
        (gc.project_linf_ball(1.0), {}, [-1.0, 0.5, 1.0]),
        (gc.project_linf_ball(1.0), {"project_linf_ball.radius": 2.5}, [-2.0, 0.5, 2.5]),
        (gc.project_l2_ball(sqrt(13.25) / 2), {}, [-1.0, 0.25, 1.5]),
        (gc.project_l2_ball(1.0), {"project_l2_ball.radius": 4}, [-2.0, 0.5, 3.0]),
        (gc.project_l2_sphere(2 * sqrt(13.25)), {}, [-4.0, 1.0, 6.0]),
        (gc.project_l1_ball(2.0), {}, [-0.5, 0.0, 1.5]),
        (gc.project_l1_ball(1.0), {"project_l1_ball.radius": 6}, [-2.0, 0.5, 3.0]),
        (gc.project_l1_sphere(8.5), {}, [-3.0, 1.5, 4.0]),
        (gc.project_simplex(3.5), {}, [0.0, 0.5, 3.0]),
        (gc.project_simplex(), {}, [0.0, 0.0, 1.0]),
        (gc.project_hyperplane(1.0, 0.0), {}, [-2.5, 0.0, 2.5]),
        (gc.project_hyperplane(tensor([0.0, 0.0, 2.0]), 2.0), {}, [-2.0, 0.5, 1.0]),
        (gc.project_halfspace(1.0, 0.0), {}, [-2.5, 0.0, 2.5]),
        (gc.project_halfspace(1.0, 0.0), {"project_halfspace.b": 2}, [-2.0, 0.5, 3.0]),
    ],
)
def test_by_hand(transform: Transform, group: Group, expected: list[float]) -> None:
    assert_close(transform(T, group), tensor(expected))


def cone(normal: Tensor, b: float, direction: Tensor, least: float) -> Tensor:
    """The support of {x: <normal, x> <= b}: infinite but for the multiples of its normal from ``least`` on."""
    factor = (direction * normal).sum() / normal.square().sum()
    is_multiple = vector_norm(direction - factor * normal) <= 1e-9 * (1 + vector_norm(direction)) and factor >= least
    return factor * b if is_multiple else tensor(inf)


# Each convex set C, by its support function: the largest <d, x> of all x in C.
SUPPORTS: list[tuple[Transform, Callable[[Tensor], Tensor]]] = [
    (gc.project_nonnegative(), lambda d: tensor(inf if (d > 0).any() else 0.0)),
    (gc.project_box(-0.5, 2.0), lambda d: torch.maximum(-0.5 * d, 2 * d).sum()),
    (gc.project_linf_ball(2.0), lambda d: 2 * vector_norm(d, 1)),
    (gc.project_l2_ball(2.0), lambda d: 2 * vector_norm(d)),
    (gc.project_l1_ball(2.0), lambda d: 2 * vector_norm(d, inf)),
    (gc.project_simplex(2.0), lambda d: 2 * d.amax()),
    (gc.project_hyperplane(-2.0, 0.5), lambda d: cone(-2 * torch.ones_like(d), 0.5, d, -inf)),
    (gc.project_halfspace(-2.0, 0.5), lambda d: cone(-2 * torch.ones_like(d), 0.5, d, 0)),
]


@pytest.mark.parametrize(("transform", "support"), SUPPORTS, ids=[repr(transform) for transform, _ in SUPPORTS])
@given(t=tensors())
def test_the_way_to_a_convex_set_is_normal_to_it(
    transform: Transform, support: Callable[[Tensor], Tensor], t: Tensor
) -> None:
    """A point p of C is the nearest to t if, and only if, no x in C has <t - p, x> above <t - p, p>."""
    projected = transform(t, {})
    assert support(t - projected) <= ((t - projected) * projected).sum() + 1e-9 * (1 + t.square().sum())


def on_simplex(t: Tensor, total: float) -> Tensor:
    """The projection onto the simplex, by bisection for the amount to subtract."""
    low, high = t.max() - total, t.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (t - middle).clamp_min(0).sum() > total else (low, middle)
    return (t - low).clamp_min(0)


@given(tensors())
def test_simplex_and_l1_ball_agree_with_bisection(t: Tensor) -> None:
    assert_close(gc.project_simplex(2.0)(t, {}), on_simplex(t, 2.0))
    ball = t if vector_norm(t, 1) <= 2 else t.sign() * on_simplex(t.abs(), 2.0)
    assert_close(gc.project_l1_ball(2.0)(t, {}), ball)


@given(tensors(max_dims=1))
def test_l1_sphere_is_as_near_as_its_nearest_face(t: Tensor) -> None:
    signs = map(tensor, itertools.product([1.0, -1.0], repeat=t.numel()))
    faces = [s.reshape(t.shape).double() for s in signs]
    nearest = min(vector_norm(s * on_simplex(s * t, 2.0) - t).item() for s in faces)
    projected = gc.project_l1_sphere(2.0)(t, {})
    assert_close(vector_norm(projected, 1).item(), 2.0)
    assert_close(vector_norm(projected - t).item(), nearest)


@given(tensors())
def test_l2_sphere_is_as_near_as_the_triangle_inequality_allows(t: Tensor) -> None:
    projected = gc.project_l2_sphere(2.0)(t, {})
    assert_close(vector_norm(projected).item(), 2.0)
    assert_close(vector_norm(projected - t), (vector_norm(t) - 2).abs())


def test_bounds_and_normals_broadcast_to_sub_tensors() -> None:
    t, a = torch.randn(4, 3), tensor([1.0, -2.0, 0.5])
    transforms = gc.project_box(-a.abs(), 0.0), gc.project_hyperplane(a, 1.0), gc.project_halfspace(a, 1.0)
    for transform in transforms:
        rows = torch.stack([transform(row, {}) for row in t])
        assert_close(broadcast(transform, 1)(t, {}), rows)
    assert_close(gc.project_hyperplane(a, 1.0)(t, {}), gc.project_hyperplane(a.expand(4, 3), 1.0)(t, {}))


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (gc.project_l2_ball(1.0), [0.6 + 0j, 0.8j]),
        (gc.project_l2_sphere(10.0), [6 + 0j, 8j]),
        (gc.project_l1_ball(2.0), [0.5 + 0j, 1.5j]),
        (gc.project_l1_sphere(9.0), [4 + 0j, 5j]),
        (gc.project_hyperplane(1.0, 0.0), [1.5 + 0j, -1.5 + 4j]),
    ],
)
def test_complex(transform: Transform, expected: list[complex]) -> None:
    assert_close(transform(tensor([3 + 0j, 4j]), {}), tensor(expected))


@pytest.mark.parametrize("transform", [gc.project_l2_ball(1.0), gc.project_l2_sphere(1.0)])
def test_half_precision_norms_neither_overflow_nor_lose_digits(transform: BoundTransform) -> None:
    t = torch.full((17_500,), 600.0, dtype=torch.float16)  # of norm 79373; the largest float16 is 65504
    assert_close(vector_norm(transform(t, {}).double()).item(), 1.0, rtol=1e-3, atol=0)
    ones = torch.ones(7110, dtype=torch.bfloat16)  # of norm 84.32, in bfloat16 84.5, which would make 0.9922
    radius = next(iter(transform.hyperparameters))
    assert torch.equal(transform(ones, {radius: 84.0}), 0.99609375 * ones)


@pytest.mark.parametrize("transform", [gc.project_simplex(), gc.project_l1_ball(1.0), gc.project_l1_sphere(1.0)])
def test_sums_are_right_far_from_zero(transform: Transform) -> None:
    t = 1e4 + torch.rand(100_000)
    assert_close(transform(t, {}).double().sum().item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("transform", [gc.project_l2_ball(inf), gc.project_linf_ball(inf), gc.project_l1_ball(inf)])
def test_a_ball_of_infinite_radius_holds_everything(transform: Transform) -> None:
    assert torch.equal(transform(T, {}), T)


Z = tensor([1j])
REAL_ONLY: list[Any] = [gc.project_nonnegative(), gc.project_box(0, 1), gc.project_linf_ball(1), gc.project_simplex()]


@pytest.mark.parametrize("transform", REAL_ONLY, ids=repr)
def test_real_only(transform: Transform) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{transform!r} acts on real tensors, got torch.complex64")):
        transform(Z, {})


BALLS = [gc.project_linf_ball, gc.project_l2_ball, gc.project_l1_ball, gc.project_ball_around_reference]
SPHERES = [gc.project_l2_sphere, gc.project_l1_sphere]
by_name: Any = {"ids": lambda factory: factory.__name__}


@pytest.mark.parametrize("factory", BALLS, **by_name)
def test_the_radius_of_a_ball_is_at_least_zero(factory: Any) -> None:
    name = factory.__name__
    with pytest.raises(ValueError, match=re.escape(f"{name}.radius must be >= 0, got -1")):
        factory(-1)
    transform = factory(1)
    with pytest.raises(ValueError, match=re.escape(f"{name}.radius must be >= 0, got -1")):
        transform.update(T, {f"{name}.radius": -1}, transform.init(T, {}))


@pytest.mark.parametrize("factory", SPHERES, **by_name)
def test_the_radius_of_a_sphere_is_above_zero(factory: Any) -> None:
    name = factory.__name__
    with pytest.raises(ValueError, match=re.escape(f"{name}.radius must be > 0, got 0")):
        factory(0)
    with pytest.raises(ValueError, match=re.escape(f"{name}.radius must be > 0, got -1")):
        factory(1)(T, {f"{name}.radius": -1})


# found: 17
@pytest.mark.parametrize("radius", [0, 0.0, tensor(0.0)], ids=["int", "float", "tensor"])
@pytest.mark.parametrize("factory", BALLS, **by_name)
def test_a_ball_of_radius_zero_is_a_point(factory: Any, radius: Any) -> None:
    name = factory.__name__
    for t in (T, torch.zeros(3), 1e-15 * T, 1e30 * T):  # a norm whose squares are lost counts as 0
        for transform, group in ((factory(radius), {}), (factory(1.0), {f"{name}.radius": radius})):
            is_around = factory is gc.project_ball_around_reference
            start = torch.ones(3) if is_around else torch.zeros(3)
            assert torch.equal(transform.update(t, group, transform.init(start, group))[0], start)
            params = [nn.Parameter(start.clone()) for _ in range(2)]
            optim = gc.ParamTransformingOptimizer(
                [{"params": params, **group}], post=transform, param_ndim=None, lr=1.0
            )
            for _ in range(2):
                for param in params:
                    param.grad = -t
                optim.step()
                assert all(torch.equal(param, start) for param in params)


# found: 17
@pytest.mark.parametrize("factory", [gc.project_l2_ball, gc.project_l1_ball, gc.project_linf_ball], **by_name)
def test_a_ball_of_radius_zero_has_a_derivative(factory: Any) -> None:
    for t in (T, torch.zeros(3)):
        gradient = torch.func.grad(lambda x: factory(0.0)(x, {}).sum())(t)
        assert gradient.isfinite().all()


def around(project: Transform, reference: Tensor, t: Tensor, param_ndim: int | None = None) -> Tensor:
    stage = broadcast(chain(project), param_ndim)
    return stage.update(t, {}, stage.init(reference, {}))[0]


@pytest.mark.parametrize(
    ("project", "expected"),
    [
        (gc.project_ball_around_reference(2.5), [2.5, 3.0, 1.0]),
        (gc.project_ball_around_reference(5.0), [4.0, 5.0, 1.0]),
        (gc.project_ball_around_reference(3.0, ord=1), [2.0, 3.0, 1.0]),
        (gc.project_ball_around_reference(2.0, ord=inf), [3.0, 3.0, 1.0]),
        (gc.project_ball_around_reference(2.5, upper=2.75), [2.5, 2.75, 1.0]),
        (gc.project_ball_around_reference(2.5, lower=1.5), [2.5, 3.0, 1.5]),
        (gc.project_ball_around_reference(inf, lower=0, upper=2), [2.0, 2.0, 1.0]),
    ],
)
def test_ball_around_reference_by_hand(project: Transform, expected: list[float]) -> None:
    assert_close(around(project, tensor([1.0, 1.0, 1.0]), tensor([4.0, 5.0, 1.0])), tensor(expected))


@given(pairs())
def test_ball_around_reference_is_a_ball_that_is_moved(pair: tuple[Tensor, Tensor]) -> None:
    reference, t = pair
    balls = {1: gc.project_l1_ball, 2: gc.project_l2_ball, inf: gc.project_linf_ball}
    for ord, ball in balls.items():
        projected = around(gc.project_ball_around_reference(2.0, ord=ord), reference, t)
        assert_close(projected, reference + ball(2.0)(t - reference, {}), rtol=0, atol=1e-9)
        boxed = gc.project_ball_around_reference(2.0, ord=ord, lower=-1.0, upper=0.5)
        assert_close(around(boxed, reference, t), projected.clamp(-1.0, 0.5))
        if vector_norm(t - reference, ord) <= 2:
            assert torch.equal(projected, t)  # without the rounding of t - reference + reference


def test_ball_around_reference_projects_each_unit() -> None:
    reference, t = torch.randn(4, 3), torch.randn(4, 3)
    project = gc.project_ball_around_reference(0.5)
    rows = [around(project, reference[i], t[i]) for i in range(4)]
    assert_close(around(project, reference, t, 1), torch.stack(rows))


def test_ball_around_reference_bounds_an_attack() -> None:
    images = torch.rand(5, 3, 4, 4)
    attacked = nn.Parameter(images.clone())
    post = gc.project_ball_around_reference(0.5, lower=0.0, upper=1.0)
    attack = gc.ParamTransformingOptimizer([attacked], pre=gc.normalize(), post=post, lr=0.2, maximize=True)
    for _ in range(10):
        attack.zero_grad()
        (attacked - 0.5).pow(3).sum().backward()
        attack.step()
    sizes = (attacked.detach() - images).flatten(1).norm(dim=1)
    assert (sizes <= 0.5 * (1 + 1e-5)).all()
    assert (sizes > 0.4).any()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


each_adapter = pytest.mark.parametrize("adapt", ["wrapped", "attached"])


def optimize(adapt: str, params: Any, post: Transform, param_ndim: int | None = -1) -> torch.optim.Optimizer:
    if adapt == "wrapped":
        return gc.ParamTransformingOptimizer(params, post=post, param_ndim=param_ndim, lr=1.0)
    optimizer = torch.optim.SGD(params, lr=1.0)
    gc.attach(optimizer, post=post, param_ndim=param_ndim)
    return optimizer


def move(params: Iterable[Tensor]) -> None:
    """A random start, far outside of any ball."""
    with torch.no_grad():
        for param in params:
            param += 10 * torch.randn_like(param)


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()


def assert_around(params: Any, centres: list[Tensor], radius: float = 0.5, units: int | None = 1) -> None:
    for param, centre in zip(params, centres, strict=True):
        way = param.detach() - centre
        sizes = way.norm()[None] if units is None else way.flatten(1).norm(dim=1)
        assert_close(sizes, torch.full_like(sizes, radius), rtol=1e-4, atol=0)


# found: 34
@each_adapter
@pytest.mark.parametrize("param_ndim", [-1, None])
@pytest.mark.parametrize("given", [None, "tensor", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_is_that_before_the_random_start(
    adapt: str, param_ndim: int | None, given: str | None, dtype: torch.dtype
) -> None:
    images = [torch.rand(5, 3, 4, 4).to(dtype), torch.rand(2, 3, 4, 4).to(dtype)]
    params = [nn.Parameter(image.clone()) for image in images]
    reference: Any = {None: None, "tensor": torch.full((3, 1, 1), 7.0), "tensors": [image + 3 for image in images]}[
        given
    ]
    optimizer = optimize(adapt, params, gc.project_ball_around_reference(0.5, reference=reference), param_ndim)
    move(params)
    centres = {None: images, "tensor": [torch.full_like(image, 7.0) for image in images], "tensors": reference}[given]
    for _ in range(2):
        step(optimizer)
        assert_around(params, centres, units=param_ndim)


# found: 34
@each_adapter
@pytest.mark.parametrize("steps", [0, 2])
def test_the_reference_is_in_the_state_dict(adapt: str, steps: int) -> None:
    image = torch.rand(5, 3)
    params, others = [nn.Parameter(image.clone())], [nn.Parameter(torch.zeros(5, 3))]
    post = chain(gc.clamp(-100, 100), gc.project_ball_around_reference(0.5))
    optimizer, other = optimize(adapt, params, post), optimize(adapt, others, post)
    move(params)
    for _ in range(steps):
        step(optimizer)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    move(others)
    step(other)
    assert_around(others, [image])
    bare = torch.optim.SGD(params).state_dict()
    optimizer.load_state_dict(bare)  # which has no reference
    step(optimizer)


# found: 34
def test_copies_keep_the_reference() -> None:
    image = torch.rand(5, 3)
    params = [nn.Parameter(image.clone())]
    optimizer = optimize("wrapped", params, gc.project_ball_around_reference(0.5))
    move(params)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        step(copied)
        assert_around(copied.param_groups[0]["params"], [image])


# found: 34
def test_a_parameter_that_is_added_has_its_reference_from_then_on() -> None:
    images = [torch.rand(5, 3), torch.rand(4, 3)]
    params = [nn.Parameter(image.clone()) for image in images]
    optimizer = optimize("wrapped", params[:1], chain(gc.param_ema(0.9), gc.project_ball_around_reference(0.5)))
    move(params[:1])
    step(optimizer)
    optimizer.add_param_group({"params": params[1:]})
    move(params[1:])
    step(optimizer)
    assert_around(params, images)
    with optimizer.averaged():  # type: ignore[attr-defined]  # of what each step left, from the first one on
        assert (params[0].detach() - images[0]).norm() < 100


# found: 34
@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        (torch.zeros(4, 3), ValueError, "needs a reference that broadcasts to its parameter of shape (2, 3), got"),
        ([torch.zeros(2, 3)], ValueError, "has a reference for each of 1 parameters, and none for number 1; give one"),
        ([1.0], TypeError, "project_ball_around_reference: needs tensors as references, got reference=[1.0]"),
        (1.0, TypeError, "project_ball_around_reference.reference must be a tensor or a sequence or None, got 1.0"),
    ],
)
def test_references_that_do_not_fit(reference: Any, error: type[Exception], message: str) -> None:
    params = [nn.Parameter(torch.zeros(2, 3)) for _ in range(2)]
    for adapt in ("wrapped", "attached"):
        with pytest.raises(error, match=re.escape(message)):
            optimize(adapt, params, gc.project_ball_around_reference(0.5, reference=reference))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(params, lr=1.0)
    with pytest.raises(error, match=re.escape(message)):
        gc.attach(optimizer, post=gc.project_ball_around_reference(0.5, reference=reference))
    step(optimizer)  # nothing is attached
    assert "param_ndim" not in optimizer.param_groups[0]
    optimizer = optimize("wrapped", params[:1], gc.project_ball_around_reference(0.5, reference=[torch.zeros(2, 3)]))
    with pytest.raises(ValueError, match="post, group 1, parameter 0 of shape .2, 3., .*none for number 1"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


def test_ball_around_reference_keeps_its_centre_in_float32() -> None:
    reference = torch.rand(3).to(torch.bfloat16)
    state = gc.project_ball_around_reference(1.0).init(reference, {})
    assert state["reference"].dtype == torch.float32
    assert torch.equal(around(gc.project_ball_around_reference(1e-9), reference, reference + 1), reference)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gc.project_simplex(-1), ValueError, "project_simplex.scale must be > 0, got -1"),
        (lambda: gc.project_l2_ball([1]), TypeError, "project_l2_ball.radius must be a number, got [1]"),  # type: ignore[arg-type]
        (lambda: gc.project_box(1, 0), ValueError, "project_box: needs lower <= upper, got lower=1 and upper=0"),
        (
            lambda: gc.project_box(tensor([0.0, 2.0]), 1),
            ValueError,
            "project_box: needs lower <= upper, got lower=tensor([0., 2.]) and upper=1",
        ),
        (
            lambda: gc.project_box(0, 1)(T, {"project_box.upper": -1}),
            ValueError,
            "project_box: needs lower <= upper, got lower=0 and upper=-1",
        ),
        (
            lambda: gc.project_hyperplane(0.0, 1),
            ValueError,
            "project_hyperplane: needs a normal that is not zero, got a=0.0",
        ),
        (
            lambda: gc.project_halfspace(tensor([0.0, 0.0]), 1),
            ValueError,
            "project_halfspace: needs a normal that is not zero, got a=tensor([0., 0.])",
        ),
        (
            lambda: gc.project_halfspace("x", 1),  # type: ignore[arg-type]
            TypeError,
            "project_halfspace.a must be a number or a tensor, got 'x'",
        ),
        (
            lambda: gc.project_ball_around_reference(1.0, ord=3),
            ValueError,
            "project_ball_around_reference: needs ord 1, 2 or inf, got ord=3",
        ),
        (
            lambda: gc.project_ball_around_reference(1.0, lower=1, upper=0),
            ValueError,
            "project_ball_around_reference: needs lower <= upper, got lower=1 and upper=0",
        ),
        (
            lambda: around(gc.project_ball_around_reference(1.0, ord=inf), torch.zeros(1), tensor([1j])),
            TypeError,
            "project_ball_around_reference(radius=1.0, ord=torch.inf) acts on real tensors, got torch.complex64",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "bounds", [(-1.0, tensor([0.0, 0.0, 4.0])), (tensor([0.0, -1.0, 0.0]), 1.0), (-T.abs(), T.abs())]
)
@pytest.mark.parametrize("slot", ["pre", "post"])
def test_a_number_and_a_tensor_as_bounds(count: int, bounds: tuple[Any, Any], slot: str) -> None:
    params = [nn.Parameter(T.clone()) for _ in range(count)]
    for param in params:
        param.grad = T.clone()
    chains: Any = {slot: chain(gc.project_box(*bounds), lambda tensor, group: 2 * tensor)}
    gc.ParamTransformingOptimizer(params, **chains, param_ndim=None, lr=0.0 if slot == "post" else 1.0).step()
    expected = 2 * gc.project_box(*bounds)(T, {})
    for param in params:
        assert_close(param.data if slot == "post" else param.grad, expected)


def test_several_without_dimensions_after_a_state() -> None:
    """Where what is written back is a view of the tensor by its operation, and a stack in the program."""
    params = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(())
    pre = chain(gc.ema(0.5, debias=False), gc.normalize(), gc.project_l1_ball(0.25))
    gc.ParamTransformingOptimizer(params, pre=pre, param_ndim=0, lr=1.0).step()
    assert [param.item() for param in params] == [-0.25, -0.25]
