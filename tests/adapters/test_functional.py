"""``apply``: what an optimizer does with a chain, as a pure function of trees of tensors."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.testing import assert_close

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    State,
    Transform,
    accumulate,
    apply,
    broadcast,
    cautious,
    chain,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_zscore,
    decay_to_init,
    decay_weights,
    ema,
    init_state,
    masked,
    normalize,
    param_ema,
    partition,
    project_l2_ball,
    scale,
    sign,
    skip_nonfinite,
    transform,
    trust_ratio,
)
from tests.cases import CASES, Case, each
from tests.versions import needs_compiled_apply

SHAPES = {"first.weight": (4, 3), "first.bias": (4,), "last.weight": (2, 4)}


class Pair(NamedTuple):
    weight: Any
    bias: Any


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make(*batch: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.randn(*batch, *shape, dtype=dtype) for name, shape in SHAPES.items()}


def move(params: Any, updates: Any, lr: Any = 0.1) -> dict[str, Tensor]:
    return {name: param - lr * updates[name] for name, param in params.items()}


@transform(init=lambda tensor, group: {"calls": torch.tensor(0)})
def count_calls(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
    """The identity, which counts."""
    return tensor, {"calls": state["calls"] + 1}


def spy(seen: list[Group]) -> Transform:
    def note(tensor: Tensor, group: Group) -> Tensor:
        seen.append(group)
        return tensor

    return note


# Wrapped equals unwrapped


@each([case for case in CASES if "deterministic" not in case.skip])
def test_one_tensor_is_a_plain_call(case: Case) -> None:
    tensor, param, gradient = torch.randn(3, 4, 3).unbind()
    t, group = broadcast(case.transform), {"param": param, "grad": gradient, "param_ndim": -1}
    state = init_state(case.transform, param)
    assert_close(state, t.init(param, group) if t.stateful else {}, rtol=0, atol=0)
    actual = apply(case.transform, tensor, param=param, grad=gradient, state=state)
    assert_close(actual, t.update(tensor, group, state), rtol=0, atol=0, equal_nan=True)
    if not t.stateful:
        assert torch.equal(apply(case.transform, tensor, group), actual[0])


def test_a_transform_without_a_state_has_an_empty_one() -> None:
    tensors = make()
    state = init_state(normalize(), tensors)
    assert state == {name: {} for name in tensors}
    out, after = apply(normalize(), tensors, state=state)
    assert after == state
    assert_close(out, apply(normalize(), tensors))


def optimizer_steps(slot: str, t: Transform, params: dict[str, Tensor], grads: list[dict[str, Any]]) -> Any:
    """What ``ParamTransformingOptimizer`` makes of the parameters, around plain SGD."""
    copies = {name: nn.Parameter(param.clone()) for name, param in params.items()}
    slots: dict[str, Any] = {slot: t}
    optim = ParamTransformingOptimizer(list(copies.items()), lr=0.1, **slots)
    for gradient in grads:
        for name, param in copies.items():
            value = gradient[name]
            param.grad = None if value is None else value.clone()
        optim.step()
    return optim, {name: param.detach() for name, param in copies.items()}


@pytest.mark.parametrize(
    "t",
    [
        chain(clip_by_global_norm(1.0), ema(0.9)),
        chain(clip_by_zscore(1.0, warmup=2), normalize()),
        chain(decay_to_init(0.1), trust_ratio(lr_included=False)),
        chain(masked(accumulate(2), "*.bias"), partition({"first.*": sign(), "*": ema(0.5)})),
    ],
    ids=repr,
)
def test_pre_of_an_optimizer(t: Transform) -> None:
    params, grads = make(), [make() for _ in range(5)]
    grads[3] = {name: 9 * gradient for name, gradient in grads[3].items()}
    optim, expected = optimizer_steps("pre", t, params, grads)
    state = init_state(t, params)
    for gradient in grads:
        updates, state = apply(t, gradient, param=params, state=state)
        params = move(params, updates)
    assert_close(params, expected)
    for kept, (name, _) in zip(optim.state_dict()["state"].values(), params.items(), strict=True):
        assert_close({f"pre.{key}": value for key, value in state[name].items()}, kept["transforms"])


def test_update_and_post_of_an_optimizer() -> None:
    update, post = chain(cautious(), ema(0.5)), chain(clip_by_norm(1.0), param_ema(0.9))
    params, gradient = make(), make()
    _, expected = optimizer_steps("update", update, params, [gradient])
    steps = {name: -0.1 * g for name, g in gradient.items()}
    steps, _ = apply(update, steps, param=params, grad=gradient, state=init_state(update, params))
    assert_close(move(params, steps, -1), expected)

    _, expected = optimizer_steps("post", post, params, [gradient])
    moved, _ = apply(post, move(params, gradient), grad=gradient, state=init_state(post, params))
    assert_close(moved, expected)


def test_param_ndim_is_read_as_in_an_optimizer() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    rows, whole = torch.tensor([[0.6, 0.8], [0.0, 1.0]]), x / x.norm()
    assert_close(apply(normalize(), [x]), [rows])
    assert_close(apply(normalize(), [x], param_ndim=None), [whole])
    assert_close(apply(normalize(), [x], {"param_ndim": None}, param_ndim=0), [whole])
    assert_close(apply(broadcast(normalize(), 1), [x], param_ndim=None), [rows])


# Trees


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: {"a": x, "b": y},
        lambda x, y: [x, y],
        lambda x, y: (x, y),
        lambda x, y: Pair(x, y),
        lambda x, y: OrderedDict(a=x, b=y),
        lambda x, y: defaultdict(list, a=x, b=y),
        lambda x, y: {"layers": [{"pair": Pair(x, None)}, ({}, y)], "empty": []},
    ],
)
def test_structures(wrap: Callable[..., Any]) -> None:
    x, y = torch.randn(3, 2), torch.randn(2)
    t = chain(clip_by_global_norm(0.1), broadcast(count_calls(), None))
    length = torch.stack([x.norm(), y.norm()]).norm()
    out, state = apply(t, wrap(x, y), state=init_state(t, wrap(x, y)))
    assert_same(out, wrap(0.1 * x / length, 0.1 * y / length))
    assert_same(state, wrap({"count_calls.calls": torch.tensor(1)}, {"count_calls.calls": torch.tensor(1)}))
    assert_same(apply(scale(2.0), wrap(x, y)), wrap(2 * x, 2 * y))


def assert_same(actual: Any, expected: Any) -> None:
    """The same values in the same containers."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    else:
        assert_close(actual, expected)


def test_what_a_transform_finds_in_its_group() -> None:
    seen: list[Group] = []
    x, y, z = torch.randn(2, 3), torch.randn(3), torch.randn(1)
    tree: dict[Any, Any] = {"layers": [{"weight": x}, None, Pair(y, None)], 7: z}
    params = {7: 3 * z, "layers": ({"weight": 2 * x}, None, Pair(2 * y, z))}
    apply(broadcast(spy(seen), None), tree, {"lr": 0.1, "name": "?"}, param=params, grad=tree)
    names = ["layers.0.weight", "layers.2.weight", "7"]
    assert [(group["name"], group["index"]) for group in seen] == list(zip(names, [0, 2, 4], strict=True))
    assert [group["shape"] for group in seen] == [(2, 3), (3,), (1,)]
    assert_close([group["param"] for group in seen], [2 * x, 2 * y, 3 * z])
    assert_close([group["grad"] for group in seen], [x, y, z])
    assert all(group["lr"] == 0.1 for group in seen)


def test_a_single_tensor_has_the_name_in_the_group() -> None:
    x = torch.randn(2)
    assert_close(apply(masked(scale(2.0), "*.bias"), x, {"name": "first.bias"}), 2 * x)


def test_names_select() -> None:
    params = {"first": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "last": {"bias": torch.ones(1)}}
    out = apply(masked(scale(3.0), "*.bias"), params)
    assert [x.max().item() for x in (out["first"]["weight"], out["first"]["bias"], out["last"]["bias"])] == [1, 3, 3]


def test_none_stays_none_and_keeps_its_state() -> None:
    t, params = chain(clip_by_global_norm(1.0), ema(0.9)), make()
    first = init_state(t, params)
    out, state = apply(t, {**params, "first.bias": None}, state=first)
    assert out["first.bias"] is None
    assert_close(state["first.bias"], first["first.bias"], rtol=0, atol=0)
    some = {name: param for name, param in params.items() if name != "first.bias"}
    assert_close({name: out[name] for name in some}, apply(t, some, state={name: first[name] for name in some})[0])


def test_a_parameter_that_is_none_has_no_state() -> None:
    for t in (ema(0.9), clip_by_zscore(2.0)):
        params = [torch.ones(2), None]
        state = init_state(t, params)
        assert state[1] is None
        out, state = apply(t, params, param=params, state=state)
        assert out[1] is None
        assert state[1] is None


def test_a_state_for_all_advances_for_none_too() -> None:
    t, params, grads = clip_by_zscore(1.0, warmup=2), make(), [make() for _ in range(4)]
    late: list[dict[str, Any]] = [{**gradient, "first.weight": None} for gradient in grads[:3]] + [grads[3]]
    state = init_state(t, params)
    for gradient in late:
        _, state = apply(t, gradient, param=params, state=state)
        assert_close(state["first.weight"], state["last.weight"])
    optim, _ = optimizer_steps("pre", t, params, late)
    kept = optim.state_dict()["state"][0]["transforms"]
    assert_close({f"pre.clip_by_zscore.{key}": value for key, value in state["first.weight"].items()}, kept)


def test_empty_trees() -> None:
    assert apply(clip_by_global_norm(1.0), {}) == {}
    assert apply(sign(), None) is None
    assert apply(clip_by_zscore(1.0), [], state=init_state(clip_by_zscore(1.0), [])) == ([], [])


def test_skipped_steps_are_zeros_and_flags() -> None:
    bad = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}
    out, state = apply(skip_nonfinite(), bad, state=init_state(skip_nonfinite(), bad))
    assert not out["a"].any()
    assert state["a"]["skip_step"]


# Derivatives, ensembles and graphs

INNER = chain(clip_by_global_norm(1.0), normalize(), decay_weights(0.1))


def test_derivatives_of_an_inner_step() -> None:
    data = torch.randn(2, 5, 3, dtype=torch.float64)

    def loss(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return (x @ weight + bias).tanh().square().mean()

    def after_a_step(weight: Tensor, bias: Tensor, bound: Tensor) -> Tensor:
        params = {"weight": weight, "bias": bias}
        grads = grad(lambda p: loss(**p, x=data[0]))(params)
        updates = apply(INNER, grads, {"clip_by_global_norm.max_norm": bound}, param=params, param_ndim=None)
        return loss(**move(params, updates, 0.5), x=data[1])

    weight, bias = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (weight, bias, torch.tensor(0.05, dtype=torch.float64))]
    assert gradcheck(after_a_step, inputs)


def test_maml_gradient_by_hand() -> None:
    # |w|^2 / 2 has the gradient w, shortened to u = w / |w|: w' = w - r u, and <c, w'> has the gradient
    # c - r (c - <c, u> u) / |w|. Without the derivative of the inner step it would be c.
    w = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    c = {"a": torch.tensor([1.0]), "b": torch.tensor([[2.0]])}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return params["a"].square().sum() / 2 + params["b"].square().sum() / 2

    def after_a_step(params: dict[str, Tensor]) -> Tensor:
        moved = move(params, apply(clip_by_global_norm(1.0), grad(loss)(params)), 0.5)
        return (c["a"] * moved["a"]).sum() + (c["b"] * moved["b"]).sum()

    u, along = {"a": 0.6, "b": 0.8}, 1 * 0.6 + 2 * 0.8
    assert_close(grad(after_a_step)(w), {name: c[name] - 0.5 * (c[name] - along * u[name]) / 5 for name in w})


def test_derivatives_through_a_state() -> None:
    t, params = chain(ema(0.5), clip_by_global_norm(1.0)), make()

    def twice(first: Tensor, second: Tensor) -> Any:
        _, state = apply(t, {"w": first}, state=init_state(t, {"w": first}))
        return apply(t, {"w": second}, state=state)[0]["w"]

    inputs = params["first.weight"].requires_grad_(), torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(twice, inputs)


def test_jacobian() -> None:
    x = {"a": torch.randn(3, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    jacobian: Any = jacrev(lambda p: apply(broadcast(normalize(), None), p))(x)
    unit = x["a"] / x["a"].norm()
    assert_close(jacobian["a"]["a"], (torch.eye(3, dtype=torch.float64) - torch.outer(unit, unit)) / x["a"].norm())
    assert not jacobian["a"]["b"].any()


def test_ensemble_equals_a_loop() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(3)]
    base = copy.deepcopy(models[0]).to("meta")
    x, t = torch.randn(7, 3, dtype=torch.float64), chain(clip_by_global_norm(0.1), ema(0.9), normalize())

    def loss(params: Any) -> Tensor:
        out: Tensor = functional_call(base, params, (x,))
        return out.square().mean()

    def step(params: Any, state: Any) -> Any:
        updates, state = apply(t, grad(loss)(params), param=params, state=state)
        return move(params, updates), state

    stacked, _ = stack_module_state(models)
    params = {name: param.detach() for name, param in stacked.items()}
    state = vmap(lambda p: init_state(t, p))(params)
    for _ in range(2):
        params, state = vmap(step)(params, state)

    for number, model in enumerate(models):
        own = {name: param.detach() for name, param in model.named_parameters()}
        own_state = init_state(t, own)
        for _ in range(2):
            own, own_state = step(own, own_state)
        assert_close({name: param[number] for name, param in params.items()}, own)
        assert_close({name: s["ema.average"][number] for name, s in state.items()}, averages(own_state))


def averages(state: Any) -> dict[str, Tensor]:
    return {name: s["ema.average"] for name, s in state.items()}


@needs_compiled_apply
def test_compiles_to_one_graph() -> None:
    t, params, grads = chain(clip_by_global_norm(0.1), ema(0.9), normalize()), make(), make()
    state = init_state(t, params)

    def step(params: Any, grads: Any, state: Any) -> Any:
        return apply(t, grads, {"clip_by_global_norm.max_norm": 0.2}, param=params, state=state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, grads, state), step(params, grads, state))


def test_nothing_is_written_to() -> None:
    t, params, grads = chain(INNER, ema(0.9)), make(), make()
    group: Group = {"clip_by_global_norm.max_norm": 0.2}
    state = init_state(t, params, group)
    given = params, grads, state, group
    before = copy.deepcopy(given)
    apply(t, grads, group, param=params, state=state)
    assert_close(given, before, rtol=0, atol=0)


# Errors

X = torch.ones(2)
TREE = {"layer1": {"weight": torch.ones(2, 2), "bias": X}, "last": [X]}


def test_keys_without_a_prefix() -> None:
    ball = project_l2_ball(1.0).named(radius="epsilon")
    result = apply(ball, torch.tensor([3.0, 4.0]), {"epsilon": 0.5, "lr": 0.1, "param_ndim": None})
    torch.testing.assert_close(result, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: apply(ema(0.9), TREE),
            TypeError,
            r"ema\(decay=0.9\) has a state, so apply needs and returns it: state = init_state\(t, params\); tensors, ",
        ),
        (lambda: apply(sign, TREE), TypeError, r"transform is the factory sign, .* call it: sign\(...\)"),  # type: ignore[call-overload]
        (lambda: apply(sign(), TREE, [X]), TypeError, "group must be a dict or None, got list; give trees as param="),  # type: ignore[call-overload]
        (
            lambda: apply(sign(), iter([X])),
            TypeError,
            "tensors must be a Tensor or None, got list_iterator; trees are made of dicts, lists and tuples",
        ),
        (lambda: apply(sign(), {"a": [X, 1.0]}), TypeError, "tensors at 'a.1' must be a Tensor or None, got float"),
        (lambda: init_state(sign(), {"a": 1.0}), TypeError, "params at 'a' must be a Tensor or None, got float"),
        (lambda: apply(sign(), [X], grad=[1.0]), TypeError, "grad at '0' must be a Tensor or None, got float"),
        (lambda: apply(ema(0.9), [X], state=[X]), TypeError, "state at '0' must be a dict or None, got Tensor"),
        (
            lambda: apply(sign(), TREE, param={"layer1": {"weight": X}, "last": [X]}),
            ValueError,
            "param must have the structure of tensors; 'layer1.bias' is only in tensors",
        ),
        (
            lambda: apply(sign(), TREE, grad={**TREE, "more": X}),
            ValueError,
            "grad must have the structure of tensors; 'more' is only in grad",
        ),
        (
            lambda: apply(sign(), TREE, param={**TREE, "last": X}),
            ValueError,
            "param at 'last' must be a list, as in tensors, got Tensor",
        ),
        (lambda: apply(sign(), [X], param=[[X]]), ValueError, "param at '0' must be a Tensor or None, got list"),
        (
            lambda: apply(sign(), {"a": X}, param={"a": torch.ones(2, 1)}),
            ValueError,
            r"param at 'a' must have the shape \(2,\) of tensors, got \(2, 1\)",
        ),
        (
            lambda: apply(chain(sign(), clip_by_norm(1.0)), TREE, {"clip_by_norm.max_norm": -1.0}),
            ValueError,
            r"stage 1, .*: 'layer1.weight' of shape \(2, 2\), torch.float32: .* must be > 0, got -1.0",
        ),
        (
            lambda: apply(clip_by_norm(1.0), TREE, {"clip_by_norm.max": 1.0}),
            ValueError,
            r".clip_by_norm.max. is no hyperparameter; there are \['clip_by_norm.max_norm'\]",
        ),
        (
            lambda: apply(normalize(), {"a": X, "scale": torch.tensor(1.0)}),
            ValueError,
            r"'scale' of shape \(\), torch.float32: param_ndim=-1 needs a tensor of at least 1 dimensions, got 0; ",
        ),
        (
            lambda: init_state(chain(count_calls()), [X], param_ndim=2),
            ValueError,
            r"'0' of shape \(2,\), torch.float32: param_ndim=2 needs a tensor of at least 2 dimensions, got 1; ",
        ),
        (
            lambda: apply(trust_ratio(), X),
            ValueError,
            r"a tensor of shape \(2,\), torch.float32: trust_ratio\(\) needs group\[.param.\]",
        ),
        (
            lambda: apply(ema(0.9), [X], state=init_state(ema(0.9), [None])),
            ValueError,
            r"'0' of shape \(2,\), torch.float32 has None for a state; init_state needs a tensor in its place",
        ),
        (
            lambda: apply(clip_by_zscore(2.0), [X, None], state=init_state(clip_by_zscore(2.0), [X, X])),
            ValueError,
            r"'1' is None, but its state advances with that of the others; pass param=",
        ),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()
