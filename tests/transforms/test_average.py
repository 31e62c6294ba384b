import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    chain,
    lookahead,
    param_ema,
    project_l2_ball,
    with_error_feedback,
)
from gradchain.stage import Stage
from tests.transforms.stateful import (
    CUTS,
    INNER,
    Training,
    assert_goes_on,
    assert_owns_its_state,
    assert_pure,
    assert_wide_state,
    gradients,
    leaves,
    values,
)

AVERAGES: list[Stage] = [param_ema(0.9), param_ema(0.9, debias=False), lookahead(3, 0.4)]
each_average = pytest.mark.parametrize("t", AVERAGES, ids=repr)


def trajectory(t: Stage, start: Tensor, steps: Sequence[Tensor], **group: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The parameter, and what to evaluate with, after each of ``steps``, which are added one after the other."""
    param, state = start, t.init(start, group)
    params, averages = [], []
    for step in steps:
        param, state = t.update(param + step, group, state)
        params.append(param)
        averages.append(state["average"])
    return params, averages


@pytest.mark.parametrize(
    ("t", "group", "params", "averages"),
    [
        (param_ema(0.5), {}, [2, 4, 0], [2, 2.5 / 0.75 + 0, (1.25 + 0) / 0.875]),
        (param_ema(0.5, debias=False), {}, [2, 4, 0], [6, 5, 2.5]),
        (param_ema(0.9), {"param_ema.decay": 0.0}, [2, 4, 0], [2, 4, 0]),
    ],
)
def test_param_ema_by_hand(t: Stage, group: Group, params: Sequence[float], averages: Sequence[float]) -> None:
    start = tensor([10.0], dtype=torch.float64)
    state = t.init(start, group)
    assert state["average"] == 10
    for param, average in zip(params, averages, strict=True):
        result, state = t.update(0 * start + param, group, state)
        assert result.item() == param
        assert state["average"].item() == pytest.approx(average, rel=1e-14)


@pytest.mark.parametrize(
    ("t", "group", "params", "averages"),
    [
        (lookahead(2, 0.5), {}, [11, 11, 12, 12], [10, 11, 11, 12]),
        (lookahead(3, 0.25), {}, [11, 12, 10.75, 11.75], [10, 10, 10.75, 10.75]),
        (lookahead(1, 0.5), {}, [10.5, 11, 11.5, 12], [10.5, 11, 11.5, 12]),
        (lookahead(2, 1), {}, [11, 12, 13, 14], [10, 12, 12, 14]),
        (lookahead(5, 1), {"lookahead.k": 2, "lookahead.alpha": 0.5}, [11, 11, 12, 12], [10, 11, 11, 12]),
    ],
)
def test_lookahead_by_hand(t: Stage, group: Group, params: Sequence[float], averages: Sequence[float]) -> None:
    start = tensor([10.0])
    actual, slow = trajectory(t, start, [torch.ones(1)] * 4, **group)
    assert values(actual) == list(params)
    assert values(slow) == list(averages)


def test_param_ema_equals_a_plain_loop() -> None:
    start, *given = gradients(21)
    decay, biased, sum_, weight = 0.97, start, torch.zeros_like(start), 0.0
    state, biased_state = param_ema(decay).init(start, {}), param_ema(decay, debias=False).init(start, {})
    for param in given:
        result, state = param_ema(decay).update(param, {}, state)
        _, biased_state = param_ema(decay, debias=False).update(param, {}, biased_state)
        assert torch.equal(result, param)
        biased = decay * biased + (1 - decay) * param
        sum_, weight = decay * sum_ + (1 - decay) * param, decay * weight + (1 - decay)
        assert_close(state["average"], sum_ / weight, rtol=1e-12, atol=1e-12)
        assert_close(biased_state["average"], biased, rtol=1e-12, atol=1e-12)


def test_lookahead_equals_two_nested_loops() -> None:
    k, alpha = 4, 0.3
    start, *steps = gradients(21)
    slow, expected, expected_slow = start, [], []
    for outer in range(5):
        fast = slow
        for inner in range(k):
            fast = fast + steps[k * outer + inner]
            if inner == k - 1:
                slow = slow + alpha * (fast - slow)
                fast = slow
            expected.append(fast)
            expected_slow.append(slow)
    params, averages = trajectory(lookahead(k, alpha), start, steps)
    assert_close(torch.stack(params), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert_close(torch.stack(averages), torch.stack(expected_slow), rtol=1e-12, atol=1e-12)


def test_param_ema_equals_that_of_torch() -> None:
    model = torch.nn.Linear(3, 2)
    # AveragedModel starts at the parameters of its first update.
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    optim = ParamTransformingOptimizer(model.parameters(), post=param_ema(0.9, debias=False), param_ndim=None, lr=0.1)
    for _ in range(10):
        optim.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optim.step()
        averaged.update_parameters(model)
    with optim.averaged():
        for param, expected in zip(model.parameters(), averaged.module.parameters(), strict=True):
            assert_close(param, expected)


@each_average
def test_is_pure_and_owns_its_state(t: Stage) -> None:
    assert_pure(t)
    assert_owns_its_state(t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_average
def test_half_precision_has_a_state_in_float32(t: Stage, dtype: torch.dtype) -> None:
    assert_wide_state(t, dtype)


def test_a_half_precision_average_sees_small_changes() -> None:
    start = tensor([256.0], dtype=torch.bfloat16)
    _, averages = trajectory(param_ema(0.999, debias=False), start, [tensor([2.0], dtype=torch.bfloat16), 0 * start])
    assert_close(averages[-1], tensor([256 + 2 * (1 - 0.999**2)]))


def test_an_average_of_equal_parameters_is_that_parameter() -> None:
    x = tensor([0.1, 1e6, -3e-7])
    for t in (param_ema(0.9999), param_ema(0.9999, debias=False)):
        assert all(torch.equal(average, x) for average in trajectory(t, x, [0 * x] * 500)[1])


def test_complex() -> None:
    start, step = tensor([1 + 1j]), tensor([2 - 2j])
    assert_close(trajectory(param_ema(0.5, debias=False), start, [step])[1][0], tensor([2 + 0j]))
    assert_close(trajectory(param_ema(0.5), start, [step])[1][0], tensor([3 - 1j]))
    assert_close(trajectory(lookahead(1, 0.5), start, [step])[0][0], tensor([2 + 0j]))


@pytest.mark.parametrize("InnerOpt", INNER)
def test_param_ema_leaves_the_training_alone(InnerOpt: type[Optimizer]) -> None:
    training, plain = Training(InnerOpt, post=param_ema(0.9)), Training(InnerOpt)
    sums, weight = [torch.zeros_like(p) for p in plain.params], 0.0
    for step in range(8):
        training.go(range(step, step + 1))
        plain.go(range(step, step + 1))
        sums = [0.9 * s + 0.1 * p.detach() for s, p in zip(sums, plain.params, strict=True)]
        weight = 0.9 * weight + 0.1
        assert all(map(torch.equal, training.params, plain.params))
        with training.optim.averaged():
            for param, total in zip(training.params, sums, strict=True):
                assert_close(param.detach(), total / weight)


@pytest.mark.parametrize("InnerOpt", INNER)
def test_lookahead_around_an_optimizer(InnerOpt: type[Optimizer]) -> None:
    training, plain = Training(InnerOpt, post=lookahead(3, 0.4)), Training(InnerOpt)
    slow = [p.detach().clone() for p in plain.params]
    for step in range(8):
        training.go(range(step, step + 1))
        plain.go(range(step, step + 1))
        if step % 3 == 2:
            for index, param in enumerate(plain.params):
                slow[index] = slow[index] + 0.4 * (param.detach() - slow[index])
                with torch.no_grad():
                    param.copy_(slow[index])
        for param, expected in zip(training.params, plain.params, strict=True):
            assert_close(param, expected)
        with training.optim.averaged():
            for param, value in zip(training.params, slow, strict=True):
                assert_close(param.detach(), value)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("InnerOpt", INNER)
def test_a_training_goes_on_where_it_was_cut(cut: Any, dtype: torch.dtype, InnerOpt: type[Optimizer]) -> None:
    for t in (*AVERAGES, chain(lookahead(3, 0.4), project_l2_ball(1.0))):
        for at in (2, 5):
            assert_goes_on(cut, lambda t=t: Training(InnerOpt, dtype, post=t), at)  # type: ignore[misc]


@each_average
def test_averages_advance_once_a_step_of_lbfgs(t: Stage) -> None:
    x = torch.tensor([3.0, -2.0], requires_grad=True)
    optim = ParamTransformingOptimizer([x], LBFGS, post=t, max_iter=5, lr=0.1)
    start, results = x.detach().clone(), []

    def closure() -> Tensor:
        optim.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    if t == lookahead(3, 0.4):
        for count in (1, 2, 0, 1):
            optim.step(closure)
            assert leaves(optim.state_dict()["state"][0])["transforms.post.lookahead.count"] == count
        return
    for _ in range(3):
        optim.step(closure)
        results.append(x.detach().clone())
    state = t.init(start, {})
    for result in results:
        state = t.update(result, {}, state)[1]
    with optim.averaged():
        assert torch.equal(x, state["average"])


@each_average
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_restores_the_parameters(t: Stage, dtype: torch.dtype) -> None:
    training = Training(SGD, dtype, post=chain(project_l2_ball(100.0), t))
    start = [p.detach().clone() for p in training.params]
    with training.optim.averaged():
        assert all(map(torch.equal, training.params, start))
    training.go(range(5))
    before = [p.detach().clone() for p in training.params]
    states = training.states()
    name = t.state_name

    def evaluate() -> None:
        with training.optim.averaged():
            for param, state, value in zip(training.params, states, before, strict=True):
                assert torch.equal(param, state[f"transforms.post.{name}.average"].to(dtype))
                assert not torch.equal(param, value)
            raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        evaluate()
    assert all(map(torch.equal, training.params, before))
    for state, expected in zip(training.states(), states, strict=True):
        assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_lookahead_can_end_in_a_set() -> None:
    training = Training(SGD, post=chain(lookahead(2, 0.5), project_l2_ball(0.1)))
    training.go(range(5))
    assert all(
        row.norm() <= 0.1 + 1e-6 for param in training.params for row in param.flatten(1 if param.ndim > 1 else 0)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: param_ema(1), ValueError, "param_ema.decay must be < 1, got 1"),
        (lambda: param_ema(-1), ValueError, "param_ema.decay must be >= 0, got -1"),
        (lambda: lookahead(0, 0.5), ValueError, "lookahead.k must be >= 1, got 0"),
        (lambda: lookahead(1.5, 0.5), TypeError, "lookahead.k must be an integer, got 1.5"),  # type: ignore[arg-type]
        (lambda: lookahead(5, 0), ValueError, "lookahead.alpha must be > 0, got 0"),
        (lambda: lookahead(5, 1.5), ValueError, "lookahead.alpha must be <= 1, got 1.5"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_averaged_finds_the_average_inside_of_error_feedback() -> None:
    x = tensor([1.0], requires_grad=True)
    optim = ParamTransformingOptimizer([x], post=with_error_feedback(param_ema(0.5, debias=False)), lr=1.0)
    x.grad = tensor([1.0])
    optim.step()
    with optim.averaged():
        assert x.item() == 0.5
