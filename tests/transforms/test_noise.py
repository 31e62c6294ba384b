import re
import subprocess
import sys
from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.testing import assert_close

from gradchain import Group, ParamTransformingOptimizer, add_noise, chain, dropout
from gradchain.transform import Stage
from tests.transforms.stateful import (
    CUTS,
    INNER,
    Training,
    assert_goes_on,
    assert_owns_its_state,
    assert_pure,
    assert_wide_state,
    leaves,
    run,
)

NOISES: list[Stage] = [add_noise(0.1), dropout(0.4)]
each_noise = pytest.mark.parametrize("t", NOISES, ids=repr)
ONES = torch.ones(100)


def draw(t: Stage, steps: int = 3, **group: Any) -> Tensor:
    return torch.stack(run(t, [ONES] * steps, **group))


@pytest.mark.parametrize(
    ("t", "group", "variances"),
    [
        (add_noise(4.0, 1.0), {}, [4, 2, 4 / 3, 1]),
        (add_noise(0.01), {}, [0.01, 0.01 / 2**0.55, 0.01 / 3**0.55]),
        (add_noise(0.01, 0), {}, [0.01] * 3),
        (add_noise(0.01), {"add_noise.eta": 1.0, "add_noise.gamma": 2.0}, [1, 1 / 4, 1 / 9]),
        (add_noise(0), {}, [0] * 3),
    ],
)
def test_add_noise_has_the_variance_of_its_step(t: Stage, group: Group, variances: list[float]) -> None:
    n = 200_000
    start = torch.linspace(-1, 1, n)
    for result, variance in zip(run(t, [start] * len(variances), **group), variances, strict=True):
        noise = (result - start).double()
        assert abs(noise.mean()) <= 5 * sqrt(variance / n)
        assert_close(noise.var().item(), float(variance), rtol=5 * sqrt(2 / n), atol=1e-12)
        within = ((noise.abs() <= sqrt(variance)).double().mean()).item()
        assert variance == 0 or abs(within - 0.6827) < 0.006  # normal, not just of the right variance


def test_add_noise_is_independent_between_steps_parameters_and_seeds() -> None:
    x = torch.zeros(100_000)
    draws = [*run(add_noise(1, 0), [x] * 3), *run(add_noise(1, 0), [x] * 2, index=1)]
    draws += [*run(add_noise(1, 0, seed=1), [x] * 2), dropout(0.5).update(x + 1, {}, dropout(0.5).init(x, {}))[0] - 1]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlations.abs().max() < 0.02


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p: float) -> None:
    n = 200_000
    for result in run(dropout(p), [torch.full((n,), 3.0)] * 3):
        assert result.unique().tolist() == pytest.approx([0, 3 / (1 - p)] if p else [3])
        assert abs((result == 0).double().mean().item() - p) <= 5 * sqrt(p * (1 - p) / n)


def test_dropout_reads_the_probability_of_the_group() -> None:
    groups: list[Group] = [{"dropout.p": 0.25}, {"dropout.p": tensor(0.25)}]
    for group in groups:
        assert torch.equal(draw(dropout(0.5), **group), draw(dropout(0.25)))


def test_dropout_does_not_hide_nonfinite_elements() -> None:
    result = run(dropout(0.5), [torch.full((100,), torch.nan), torch.full((100,), torch.inf)])
    assert result[0].isnan().all()
    assert not result[1].isfinite().any()


@each_noise
def test_the_seed_and_the_parameter_decide(t: Stage) -> None:
    torch.manual_seed(0)
    first = draw(t)
    torch.manual_seed(1)
    assert torch.equal(draw(t), first)
    assert torch.equal(draw(t, index=0), first)
    other_seed = add_noise(0.1, seed=1) if t == add_noise(0.1) else dropout(0.4, seed=1)
    others = [draw(t, index=1), draw(t, index=2), draw(other_seed), draw(other_seed, index=1), first.roll(1, 0)]
    for i, a in enumerate([first, *others]):
        assert all(not torch.equal(a, b) for b in others[i:])


@each_noise
def test_the_default_generator_is_left_alone(t: Stage) -> None:
    before = torch.get_rng_state()
    draw(t)
    assert torch.equal(torch.get_rng_state(), before)


@each_noise
def test_dtypes_and_layouts_see_one_stream(t: Stage) -> None:
    x = torch.ones(8, 6)
    (expected,) = run(t, [x])
    assert torch.equal(run(t, [x.bfloat16()])[0], expected.bfloat16())
    assert torch.equal(run(t, [torch.ones(6, 8).T])[0], expected)
    assert run(t, [x.to(torch.complex64)])[0].dtype == torch.complex64


@each_noise
def test_is_pure_and_owns_its_state(t: Stage) -> None:
    assert_pure(t)
    assert_owns_its_state(t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_noise
def test_half_precision_draws_in_float32(t: Stage, dtype: torch.dtype) -> None:
    assert_wide_state(t, dtype)
    state = t.init(torch.ones(2, dtype=dtype), {})
    assert {key: value.dtype for key, value in state.items()} == {"generator": torch.uint8, "step": torch.int64}


REPLICA = """
import sys, torch
from torch.optim import Adam
from gradchain import add_noise, chain, dropout
from tests.transforms.stateful import Training

torch.manual_seed(int(sys.argv[1]))
torch.rand(int(sys.argv[1]))
training = Training(Adam, pre=chain(dropout(0.4), add_noise(0.1, seed=3)))
training.go(range(5))
print([p.tolist() for p in training.params])
"""


def test_replicas_in_two_processes_are_the_same() -> None:
    outputs = [
        subprocess.run([sys.executable, "-c", REPLICA, seed], capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 100


def test_parameters_of_one_shape_get_noise_of_their_own() -> None:
    params = [torch.zeros(50, requires_grad=True) for _ in range(3)]
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}]
    optim = ParamTransformingOptimizer(groups, pre=add_noise(1.0), lr=1.0)
    for param in params:
        param.grad = torch.zeros(50)
    optim.step()
    assert all(not torch.equal(a, b) for i, a in enumerate(params) for b in params[:i])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("InnerOpt", INNER)
def test_a_training_goes_on_where_it_was_cut(cut: Any, dtype: torch.dtype, InnerOpt: type[Optimizer]) -> None:
    assert_goes_on(cut, lambda: Training(InnerOpt, dtype, pre=chain(dropout(0.4), add_noise(0.1))))
    assert_goes_on(cut, lambda: Training(InnerOpt, dtype, update=add_noise(1e-4), post=dropout(0.1)), at=2)


def test_evaluations_in_one_step_of_lbfgs_see_the_same_noise() -> None:
    x = torch.zeros(3, requires_grad=True)
    optim = ParamTransformingOptimizer([x], LBFGS, pre=add_noise(1.0), max_iter=4, lr=1e-3)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        if x.grad is not None:
            seen.append(x.grad.clone())
        x.grad = torch.zeros_like(x)
        return x.sum()

    for step in range(1, 4):
        optim.step(closure)
        assert leaves(optim.state_dict()["state"][0])["transforms.pre.add_noise.step"] == step
    assert seen


@pytest.mark.parametrize("InnerOpt", [SGD, Adam])
def test_a_late_parameter_starts_its_own_count(InnerOpt: type[Optimizer]) -> None:
    training = Training(InnerOpt, pre=add_noise(0.1))
    training.go(range(5), late=3)
    assert [int(state["transforms.pre.add_noise.step"]) for state in training.states()] == [5, 2, 5]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: add_noise(-1), ValueError, "add_noise.eta must be >= 0, got -1"),
        (lambda: add_noise(1, -0.5), ValueError, "add_noise.gamma must be >= 0, got -0.5"),
        (lambda: add_noise(1, seed=0.5), TypeError, "add_noise.seed must be an integer, got 0.5"),  # type: ignore[arg-type]
        (lambda: dropout(1), ValueError, "dropout.p must be < 1, got 1"),
        (lambda: dropout(-0.1), ValueError, "dropout.p must be >= 0, got -0.1"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
