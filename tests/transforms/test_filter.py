import copy
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.testing import assert_close

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    accumulate,
    amplify_slow,
    broadcast,
    chain,
    clip_by_norm,
    ema,
    extrapolate,
    keep_top_q,
    normalize,
    scale,
    sign,
    trace,
    transform,
    with_error_feedback,
)
from gradchain.stage import Stage
from gradchain.testing import check_transform
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
    run,
    values,
)

X = tensor([1.0], dtype=torch.float64)
HALVES = (torch.float16, torch.bfloat16)

FILTERS: list[Stage] = [
    ema(0.9),
    ema(0.9, debias=False),
    trace(0.9),
    trace(0.9, nesterov=True),
    amplify_slow(2.0, 0.98),
    extrapolate(0.475),
    accumulate(3),
    with_error_feedback(keep_top_q(0.6)),
    with_error_feedback(trace(0.5)),
    chain(with_error_feedback(broadcast(sign(), None)), ema(0.5)),
]
each_filter = pytest.mark.parametrize("t", FILTERS, ids=repr)


@pytest.mark.parametrize(
    ("t", "group", "given", "expected"),
    [
        (ema(0.5, debias=False), {}, [4, 8, 0], [2, 5, 2.5]),
        (ema(0.5), {}, [4, 8, 0], [4, 5 / 0.75, 2.5 / 0.875]),
        (ema(0.9), {"ema.decay": 0.5}, [4, 8, 0], [4, 5 / 0.75, 2.5 / 0.875]),
        (ema(0), {}, [4, 8, 0], [4, 8, 0]),
        (trace(0.5), {}, [4, 8, 0], [4, 10, 5]),
        (trace(0.5, nesterov=True), {}, [4, 8, 0], [6, 13, 2.5]),
        (trace(1), {}, [4, 8, 0], [4, 12, 12]),
        (trace(0), {}, [4, 8, 0], [4, 8, 0]),
        (amplify_slow(2, 0.5), {}, [4, 8, 0], [12, 20, 6]),
        (amplify_slow(0, 0.5), {}, [4, 8, 0], [4, 8, 0]),
        (extrapolate(), {}, [4, 8, 0], [4, 12, -8]),
        (extrapolate(0.25), {}, [4, 8, 0], [4, 9, -2]),
        (extrapolate(), {"extrapolate.weight": 0}, [4, 8, 0], [4, 8, 0]),
        (accumulate(3), {}, [4, 8, 0, 1, 2, 3, 7], [0, 0, 4, 0, 0, 2, 0]),
        (accumulate(1), {}, [4, 8, 0], [4, 8, 0]),
        (accumulate(1), {"accumulate.k": 2}, [4, 8, 0, 2], [0, 6, 0, 1]),
        (with_error_feedback(scale(0.5)), {}, [4, 8, 0], [2, 5, 2.5]),
        (with_error_feedback(sign()), {}, [4, 8, 0, -20], [1, 1, 1, -1]),
        (with_error_feedback(trace(0.5)), {}, [4, 8, 0], [4, 10, 3]),
        (with_error_feedback(scale(1)), {}, [4, 8, 0], [4, 8, 0]),
    ],
)
def test_by_hand(t: Stage, group: Group, given: Sequence[float], expected: Sequence[float]) -> None:
    assert values(run(t, [x * X for x in given], **group)) == pytest.approx(expected, rel=1e-14)


def plain_ema(g: Sequence[float], decay: float, debias: bool) -> list[float]:
    m, results = 0.0, []
    for t, x in enumerate(g, 1):
        m = decay * m + (1 - decay) * x
        results.append(m / (1 - decay**t) if debias else m)
    return results


def plain_trace(g: Sequence[float], decay: float, nesterov: bool) -> list[float]:
    m, results = 0.0, []
    for x in g:
        m = x + decay * m
        results.append(x + decay * m if nesterov else m)
    return results


def plain_grokfast(g: Sequence[float], alpha: float, lamb: float) -> list[float]:
    m, results = g[0], []  # gradfilter_ema of the paper's repository
    for x in g:
        m = m * alpha + x * (1 - alpha)
        results.append(x + m * lamb)
    return results


def plain_mars(g: Sequence[float], gamma: float, beta: float) -> list[float]:
    return [x + gamma * beta / (1 - beta) * (x - before) for x, before in zip(g, [g[0], *g], strict=False)]


def plain_accumulate(g: Sequence[float], k: int) -> list[float]:
    return [sum(g[t - k : t]) / k if t % k == 0 else 0.0 for t in range(1, len(g) + 1)]


def plain_error_feedback(g: Sequence[float], factor: float) -> list[float]:
    e, results = 0.0, []
    for x in g:
        results.append(factor * (x + e))
        e = x + e - results[-1]
    return results


@pytest.mark.parametrize(
    ("t", "reference"),
    [
        (ema(0.9), lambda g: plain_ema(g, 0.9, True)),
        (ema(0.999), lambda g: plain_ema(g, 0.999, True)),
        (ema(0.9, debias=False), lambda g: plain_ema(g, 0.9, False)),
        (trace(0.9), lambda g: plain_trace(g, 0.9, False)),
        (trace(0.9, nesterov=True), lambda g: plain_trace(g, 0.9, True)),
        (amplify_slow(2.0, 0.98), lambda g: plain_grokfast(g, 0.98, 2.0)),
        (extrapolate(0.025 * 0.95 / (1 - 0.95)), lambda g: plain_mars(g, 0.025, 0.95)),
        (accumulate(4), lambda g: plain_accumulate(g, 4)),
        (with_error_feedback(scale(0.3)), lambda g: plain_error_feedback(g, 0.3)),
    ],
)
def test_equals_a_plain_loop(t: Stage, reference: Callable[[list[float]], list[float]]) -> None:
    given = gradients(20)
    actual = torch.stack(run(t, given))
    flat = torch.stack(given).flatten(1)
    expected = tensor([reference(column.tolist()) for column in flat.T], dtype=torch.float64).T
    assert_close(actual.flatten(1), expected, rtol=1e-12, atol=1e-12)


@each_filter
def test_is_pure_and_owns_its_state(t: Stage) -> None:
    assert_pure(t)
    assert_owns_its_state(t)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("t", [t for t in FILTERS if not repr(t).startswith(("with", "chain"))], ids=repr)
def test_half_precision_has_a_state_in_float32(t: Stage, dtype: torch.dtype) -> None:
    assert_wide_state(t, dtype)


@pytest.mark.parametrize("t", [ema(0.999), ema(0.9), amplify_slow(1.0, 0.999)], ids=repr)
def test_equal_gradients_are_their_own_average(t: Stage) -> None:
    results = run(t, [tensor([0.1])] * 2000)
    assert_close(torch.stack(results), results[0].expand(2000, 1), rtol=5e-6, atol=0)


def test_a_debiased_average_stays_one_when_the_decay_changes() -> None:
    group: Group = {}
    state = ema(0.9).init(X, group)
    for decay in (0.1, 0.9, 0.99, 0.5):
        group["ema.decay"] = decay
        result, state = ema(0.9).update(X, group, state)
        assert_close(result, X)


def test_complex() -> None:
    z = [tensor([1 + 2j]), tensor([3 - 2j])]
    assert_close(run(ema(0.5, debias=False), z)[1], tensor([1.75 - 0.5j]))
    assert_close(run(ema(0.5), z)[1], tensor([1.75 - 0.5j]) / 0.75)
    assert_close(run(extrapolate(), z)[1], tensor([5 - 6j]))
    assert_close(run(accumulate(2), z)[1], tensor([2 + 0j]))
    assert_close(run(with_error_feedback(scale(0.5)), z)[1], tensor([1.75 - 0.5j]))


@pytest.mark.parametrize("InnerOpt", INNER)
@each_filter
def test_an_optimizer_steps_with_what_a_loop_gives(t: Stage, InnerOpt: type[Optimizer]) -> None:
    late = 3
    training = Training(InnerOpt, pre=broadcast(t, None))
    plain = Training(InnerOpt)
    states: dict[int, Any] = {}
    for step in range(8):
        training.go(range(step, step + 1), late)
        generator = torch.Generator().manual_seed(100 + step)
        for index, param in enumerate(plain.params):
            grad = torch.randn(param.shape, generator=generator)
            if index == 1 and step < late:
                continue
            group = {"param_ndim": None, "index": index}
            if index not in states:
                states[index] = broadcast(t, None).init(param, group)
            param.grad, states[index] = broadcast(t, None).update(grad, group, states[index])
        plain.optim.step()
        for param, expected in zip(training.params, plain.params, strict=True):
            assert torch.equal(param, expected)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("InnerOpt", INNER)
def test_a_training_goes_on_where_it_was_cut(cut: Any, dtype: torch.dtype, InnerOpt: type[Optimizer]) -> None:
    for t in FILTERS:
        assert_goes_on(cut, lambda t=t: Training(InnerOpt, dtype, pre=t))  # type: ignore[misc]
    pre = chain(ema(0.9), with_error_feedback(sign()), accumulate(3))
    assert_goes_on(cut, lambda: Training(InnerOpt, dtype, pre=pre, update=trace(0.5)), at=2)


def test_states_advance_once_a_step_of_lbfgs() -> None:
    x = torch.tensor([3.0, -2.0], requires_grad=True)
    optim = ParamTransformingOptimizer([x], LBFGS, pre=chain(ema(0.5), accumulate(1000)), max_iter=5, lr=0.1)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        x.grad = torch.ones_like(x)
        return x.sum()

    for step in range(1, 4):
        optim.step(closure)
        weight, count = (
            leaves(optim.state_dict()["state"][0])[f"transforms.pre.{k}"] for k in ("ema.weight", "accumulate.count")
        )
        assert_close(weight.item(), 1 - 0.5**step)
        assert count == step
    assert evaluations >= 3


def test_accumulated_steps_are_those_of_the_mean() -> None:
    given = gradients(6, torch.float32)
    x, y = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    optim, plain = ParamTransformingOptimizer([x], SGD, pre=accumulate(3), lr=0.1), SGD([y], lr=0.1)
    for step, grad in enumerate(given):
        x.grad = grad.clone()
        optim.step()
        if step % 3 == 2:
            y.grad = torch.stack(given[step - 2 : step + 1]).mean(0)
            plain.step()
        assert_close(x, y)


# with_error_feedback


@pytest.mark.parametrize(
    "t", [sign(), keep_top_q(0.7), normalize(), clip_by_norm(0.1), chain(keep_top_q(0.5), sign()), ema(0.9)], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
def test_with_error_feedback_nothing_is_lost(t: Stage, dtype: torch.dtype) -> None:
    feedback = with_error_feedback(t)
    given = gradients(20, dtype)
    state = feedback.init(given[0], {})
    total = torch.zeros(2, 3, dtype=torch.float64)
    for grad in given:
        result, state = feedback.update(grad, {}, state)
        assert result.dtype == dtype
        total += result.double()
    sums = torch.stack(given).double().sum(0)
    digits = 1e-12 if dtype == torch.float64 else 1e-5
    assert state["error"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(total + state["error"].double(), sums, rtol=digits, atol=digits)


def test_with_error_feedback_rounding_is_not_lost() -> None:
    step = tensor([1 + 2**-7], dtype=torch.bfloat16)
    results = run(with_error_feedback(scale(1 + 2**-10)), [step] * 64)
    exact = 64 * (1 + 2**-7)
    assert abs(sum(values(results)) - exact) < 2**-6
    assert abs(sum(values(run(chain(scale(1 + 2**-10), trace(0)), [step] * 64))) - exact) < 2**-6


@pytest.mark.parametrize("t", [normalize(), ema(0.9), chain(clip_by_norm(1.0), trace(0.5))], ids=repr)
def test_with_error_feedback_keeps_the_laws(t: Stage) -> None:
    check_transform(with_error_feedback(t), shapes=[(), (0,), (3,), (2, 3)])


def all_norms(tensors: Sequence[Tensor], **_: Any) -> Group:
    return {"total": torch.stack([t.norm() for t in tensors]).norm()}


@transform(measure=all_norms)
def over_total(tensor: Tensor, group: Group) -> Tensor:
    result: Tensor = tensor / group["total"]
    return result


def test_with_error_feedback_the_transform_sees_all_tensors() -> None:
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optim = ParamTransformingOptimizer([x, y], pre=with_error_feedback(over_total()), lr=1.0)
    x.grad, y.grad = tensor([3.0]), tensor([4.0])
    optim.step()
    assert_close(torch.cat([x, y]).detach(), tensor([-0.6, -0.8]))
    x.grad, y.grad = tensor([0.6]), tensor([0.8])
    optim.step()  # the errors, 2.4 and 3.2, with the new gradients: of norm 5
    assert_close(torch.cat([x, y]).detach(), tensor([-1.2, -1.6]))


def test_with_error_feedback_is_broadcast_within() -> None:
    feedback = with_error_feedback(normalize())
    assert broadcast(feedback, 1) == with_error_feedback(broadcast(normalize(), 1))
    rows = broadcast(feedback, 1)
    assert isinstance(rows, Stage)
    given = gradients(5)
    expected = torch.stack([torch.stack(run(feedback, [g[row] for g in given])) for row in range(2)], dim=1)
    assert_close(torch.stack(run(rows, given)), expected)


def test_with_error_feedback_is_a_value() -> None:
    feedback = with_error_feedback(keep_top_q(0.5))
    assert repr(feedback) == "with_error_feedback(keep_top_q(q=0.5))"
    assert feedback.hyperparameters == {"keep_top_q.q": 0.5, "keep_top_q.dq": 0.0}
    assert feedback != with_error_feedback(keep_top_q(0.6))
    assert feedback != keep_top_q(0.5)
    for copied in (copy.deepcopy(feedback), pickle.loads(pickle.dumps(feedback))):
        assert copied == feedback
        assert hash(copied) == hash(feedback)


def test_with_error_feedback_reads_the_hyperparameters_of_the_group() -> None:
    given = [tensor([4.0]), tensor([8.0])]
    group: Group = {"scale.factor": 0.5}
    assert values(run(with_error_feedback(scale(1)), given, **group)) == [2, 5]
    x = torch.zeros(1, requires_grad=True)
    optim = ParamTransformingOptimizer([x], pre=with_error_feedback(scale(0.5)), lr=1.0)
    assert optim.param_groups[0]["scale.factor"] == 0.5


def broken(tensor: Tensor, group: Group) -> Tensor:
    raise RuntimeError("broken")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_error_feedback_errors_say_where(dtype: torch.dtype) -> None:
    x = torch.zeros(2, dtype=dtype, requires_grad=True)
    x.grad = torch.ones_like(x)
    optim = ParamTransformingOptimizer([x], pre=with_error_feedback(broken), lr=1.0)
    with pytest.raises(RuntimeError, match="pre, group 0, parameter 0 .*with_error_feedback.*: broken"):
        optim.step()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ema(1), ValueError, "ema.decay must be < 1, got 1"),
        (lambda: ema(-0.1), ValueError, "ema.decay must be >= 0, got -0.1"),
        (lambda: trace(1.5), ValueError, "trace.decay must be <= 1, got 1.5"),
        (lambda: amplify_slow(-1, 0.9), ValueError, "amplify_slow.alpha must be >= 0, got -1"),
        (lambda: amplify_slow(1, 1.0), ValueError, "amplify_slow.decay must be < 1, got 1.0"),
        (lambda: extrapolate("1"), TypeError, "extrapolate.weight must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: accumulate(0), ValueError, "accumulate.k must be >= 1, got 0"),
        (lambda: accumulate(2.5), TypeError, "accumulate.k must be an integer, got 2.5"),  # type: ignore[arg-type]
        (
            lambda: with_error_feedback(3),  # type: ignore[arg-type]
            TypeError,
            "the argument of with_error_feedback must be a callable (tensor, group) -> tensor, got 3",
        ),
        (
            lambda: with_error_feedback(sign),  # type: ignore[arg-type]
            TypeError,
            "the argument of with_error_feedback is the factory sign, not a transform; call it: sign(...)",
        ),
        (lambda: ema(0.9)(X, {}), TypeError, "ema(decay=0.9) has a state"),
        (lambda: with_error_feedback(sign())(X, {}), TypeError, "with_error_feedback(sign()) has a state"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
