import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.optim import LBFGS, SGD, Adam
from torch.testing import assert_close

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    Transform,
    attach,
    chain,
    masked,
    project_l2_ball,
    skip_large,
    skip_nonfinite,
    transform,
    with_error_feedback,
)
from gradchain.bound import BoundTransform
from gradchain.contract import State

NAN = float("nan")
INF = float("inf")


def no_sum(tensor: Tensor, group: Group) -> State:
    return {"sum": torch.zeros_like(tensor)}


@transform(init=no_sum, acts_on="element")
def remember_sum(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
    return tensor, {"sum": state["sum"] + tensor}


def counts(state: State) -> tuple[int, int]:
    return state["in_a_row"].item(), state["total"].item()


def update_all(skip: BoundTransform, tensors: list[Tensor], group: Group) -> tuple[list[Tensor], list[State]]:
    states = [skip.init(t, group) for t in tensors]
    return skip.run(tensors, [group] * len(tensors), states)


@pytest.mark.parametrize(
    ("skip", "group", "is_good"),
    [
        (skip_nonfinite(), {}, True),
        (skip_large(5.0), {}, True),
        (skip_large(4.9), {}, False),
        (skip_large(6.9, ord=1), {}, False),
        (skip_large(4.0, ord=INF), {}, True),
        (skip_large(4.0), {"skip_large.max_norm": 5.5}, True),
    ],
)
def test_by_hand(skip: BoundTransform, group: Group, is_good: bool) -> None:
    tensors = [tensor([3.0]), tensor(-4.0), torch.ones(0)]
    results, states = update_all(skip, tensors, group)
    assert_close(results, [t * is_good for t in tensors])
    for state in states[:2]:
        assert state["skip_step"] == (not is_good)
        assert counts(state) == (int(not is_good), int(not is_good))
        assert not state["too_many"]


@pytest.mark.parametrize("skip", [skip_nonfinite(), skip_large(1e3)])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_element_skips_all_tensors(skip: BoundTransform, bad: float) -> None:
    results, states = update_all(skip, [tensor([1.0, 2.0]), tensor([0.0, bad])], {})
    assert_close(results, [torch.zeros(2), torch.zeros(2)])
    assert all(state["skip_step"] for state in states)


def test_large_finite_gradients_are_finite() -> None:
    t = torch.full((4,), 3e38)
    assert torch.equal(skip_nonfinite().update(t, {}, skip_nonfinite().init(t, {}))[0], t)


def test_complex_and_half_precision() -> None:
    for t in (tensor([1 + 1j, complex(0, NAN)]), tensor([1.0, INF], dtype=torch.float16)):
        result, state = skip_nonfinite().update(t, {}, skip_nonfinite().init(t, {}))
        assert torch.equal(result, torch.zeros_like(t))
        assert state["skip_step"]


def test_counters() -> None:
    skip, good, bad = skip_nonfinite(1), tensor([1.0]), tensor([NAN])
    state, seen = skip.init(good, {}), []
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in state.values())
    for t in (bad, good, bad, bad, bad, good):
        _, state = skip.update(t, {}, state)
        seen.append((*counts(state), bool(state["skip_step"]), bool(state["too_many"])))
    assert seen == [
        (1, 1, True, False),
        (0, 1, False, False),
        (1, 2, True, False),
        (2, 3, True, True),
        (3, 4, True, True),
        (0, 4, False, False),
    ]


def make_params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]


def make_optim(params: list[nn.Parameter], skip: Transform, **arguments: Any) -> ParamTransformingOptimizer:
    arguments = {"InnerOpt": Adam, "lr": 0.1, "post": chain(remember_sum(), project_l2_ball(2.0)), **arguments}
    return ParamTransformingOptimizer(
        [{"params": params[:1]}, {"params": params[1:]}],
        pre=chain(remember_sum(), skip),
        update=remember_sum(),
        param_ndim=None,
        **arguments,
    )


def set_grads(params: list[nn.Parameter], value: float | None = None) -> None:
    """Random gradients, one element ``value``."""
    for param in params:
        param.grad = torch.randn_like(param)
    if value is not None:
        assert params[1].grad is not None
        params[1].grad[0] = value


def take_counters(states: State) -> State:
    """Take the state of what skips out of ``states``."""
    found = [key for key in states if key.startswith("pre.skip_")]
    return {key.rpartition(".")[2]: states.pop(key) for key in found}


def snapshot(optim: ParamTransformingOptimizer) -> tuple[list[Tensor], dict[int, Any], list[State]]:
    """The parameters, the state without the counters, and the counters."""
    state = copy.deepcopy(optim.state_dict()["state"])
    counters = [take_counters(state[key]["transforms"]) for key in sorted(state)]
    return [p.detach().clone() for group in optim.param_groups for p in group["params"]], state, counters


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, list) and isinstance(b, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(("skip", "bad"), [(skip_nonfinite(), NAN), (skip_nonfinite(), INF), (skip_large(50.0), 60.0)])
def test_a_skipped_step_leaves_all_but_the_counters(skip: Transform, bad: float) -> None:
    params = make_params()
    optim = make_optim(params, skip)
    for _ in range(3):
        set_grads(params)
        optim.step()
    values, state, _ = snapshot(optim)
    set_grads(params, bad)
    optim.step()
    values_after, state_after, counters = snapshot(optim)
    assert_same(values_after, values)
    assert_same(state_after, state)
    assert [counts(c) for c in counters] == [(1, 1), (1, 1)]
    set_grads(params)
    optim.step()
    values_then, _, counters = snapshot(optim)
    assert not torch.equal(values_then[0], values[0])
    assert [counts(c) for c in counters] == [(0, 1), (0, 1)]


def test_steps_around_a_skipped_one_are_those_without_it() -> None:
    runs = []
    for bad_steps in ([], [0, 2, 5]):
        params = make_params()
        optim = make_optim(params, skip_nonfinite())
        for step in range(6):
            if step in bad_steps:
                generator = torch.get_rng_state()
                set_grads(params, NAN)
                torch.set_rng_state(generator)
                optim.step()
            set_grads(params)
            optim.step()
        runs.append(snapshot(optim)[:2])
    assert_same(list(runs[0]), list(runs[1]))


def test_the_first_step_ever_can_be_skipped() -> None:
    params = make_params()
    optim = make_optim(params, skip_nonfinite())
    before = [p.detach().clone() for p in params]
    set_grads(params, NAN)
    optim.step()
    assert_same([p.detach() for p in params], before)
    set_grads(params)
    optim.step()
    assert optim.state[params[0]]["step"] == 1
    assert counts(take_counters(dict(optim.state[params[0]]["transforms"]))) == (0, 1)


def test_counters_are_where_the_docs_say() -> None:
    params = make_params()
    optim = ParamTransformingOptimizer(params, Adam, pre=skip_nonfinite())
    for value in (NAN, None, NAN, NAN):
        set_grads(params, value)
        optim.step()
    for state in (optim.state_dict()["state"][0], optim.state[params[0]]):
        counters = state["transforms"]
        assert (counters["pre.skip_nonfinite.in_a_row"], counters["pre.skip_nonfinite.total"]) == (2, 3)


def test_too_many_in_a_row() -> None:
    params = make_params()
    optim = make_optim(params, skip_nonfinite(2))
    set_grads(params)
    optim.step()
    for value in (NAN, NAN, None, NAN, NAN):
        set_grads(params, value)
        optim.step()
    values, state, _ = snapshot(optim)
    set_grads(params, NAN)
    with pytest.raises(RuntimeError, match="3 steps in a row were skipped"):
        optim.step()
    assert_same(snapshot(optim)[0], values)
    assert_same(snapshot(optim)[1], state)


def test_none_allowed() -> None:
    params = make_params()
    optim = make_optim(params, skip_nonfinite(0))
    set_grads(params, NAN)
    with pytest.raises(RuntimeError, match="1 step"):
        optim.step()


def closure_of(params: list[nn.Parameter], factor: Callable[[], float]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        for param in params:
            param.grad = None
        loss = factor() * sum((p.square().sum() for p in params), tensor(0.0))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("InnerOpt", [SGD, Adam])
def test_with_a_closure(InnerOpt: Any) -> None:
    params = make_params()
    optim = make_optim(params, skip_nonfinite(), InnerOpt=InnerOpt)
    optim.step(closure_of(params, lambda: 1.0))
    values, state, _ = snapshot(optim)
    loss = optim.step(closure_of(params, lambda: NAN))
    assert loss.isnan()
    values_after, state_after, counters = snapshot(optim)
    assert_same(values_after, values)
    assert_same(state_after, state)
    assert counts(counters[0]) == (1, 1)


@pytest.mark.parametrize("good_steps", [0, 2])
def test_with_a_closure_that_is_evaluated_often(good_steps: int) -> None:
    def train(*bad: float) -> list[nn.Parameter]:
        params = make_params()
        optim = ParamTransformingOptimizer(params, LBFGS, pre=skip_nonfinite(), lr=0.01, max_iter=5)
        for _ in range(good_steps):
            optim.step(closure_of(params, lambda: 1.0))
        if bad:
            factors = iter(bad)
            optim.step(closure_of(params, lambda: next(factors)))
        optim.step(closure_of(params, lambda: 1.0))
        return params

    assert_same(train(1.0, 1.0, NAN), train())


def test_a_checkpoint_keeps_the_counters() -> None:
    params = make_params()
    optim = make_optim(params, skip_nonfinite(3))
    for value in (None, NAN, None, NAN, NAN):
        set_grads(params, value)
        optim.step()
    file = io.BytesIO()
    torch.save(optim.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = make_optim(others, skip_nonfinite(3))
    loaded.load_state_dict(torch.load(file))
    assert_same(snapshot(loaded)[2], snapshot(optim)[2])
    assert counts(snapshot(loaded)[2][0]) == (2, 3)
    set_grads(others, NAN)
    loaded.step()
    with pytest.raises(RuntimeError, match="4 steps in a row"):
        loaded.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: skip_nonfinite(-1), "skip_nonfinite.max_consecutive must be >= 0, got -1"),
        (lambda: skip_large(0.0), "skip_large.max_norm must be > 0, got 0.0"),
        (lambda: skip_large(1.0, ord=0), "skip_large.ord must be > 0, got 0"),
    ],
)
def test_errors(make: Callable[[], Transform], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def attached(params: Any, InnerOpt: Any, *, lr: float, **arguments: Any) -> Any:
    optimizer = InnerOpt(params, lr=lr)
    attach(optimizer, **arguments)
    return optimizer


# found: 25
@pytest.mark.parametrize("make", [ParamTransformingOptimizer, attached])
@pytest.mark.parametrize(
    "skip",
    [
        masked(masked(skip_nonfinite(), "a"), torch.tensor(True)),
        masked(with_error_feedback(skip_large(1e6)), "a"),
        with_error_feedback(masked(skip_nonfinite(), "a")),
    ],
)
def test_flag_of_a_parameter_without_a_gradient(make: Any, skip: Transform) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optim = make([("a", a), ("b", b)], SGD, pre=skip, lr=1.0)
    a.grad, b.grad = torch.full((2,), NAN), torch.ones(2)
    optim.step()
    assert b.tolist() == [1.0, 1.0]
    for value in (0.0, -1.0):
        a.grad, b.grad = None, torch.ones(2)
        optim.step()
        assert b.tolist() == [value, value]
