import io
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from gradchain import ParamTransformingOptimizer, Transform, chain, clip_by_global_norm, clip_by_history, clip_by_zscore
from gradchain.bound import BoundTransform
from gradchain.contract import State


def clipped_norms(clip: BoundTransform, norms: list[float]) -> list[float]:
    """The norms that come out where ``norms`` go in, one a step."""
    direction = tensor([0.6, -0.8], dtype=torch.float64)
    state, results = clip.init(direction, {}), []
    for norm in norms:
        result, state = clip.update(norm * direction, {}, state)
        results.append(torch.linalg.vector_norm(result).item())
        assert_close(result, results[-1] * direction)
    return results


def check(clip: BoundTransform, norms: list[float], expected: list[float]) -> None:
    assert_close(tensor(clipped_norms(clip, norms)), tensor(expected, dtype=torch.float32))


def z_clipped_norms(norms: list[float], threshold: float, decay: float, warmup: int) -> list[float]:
    """ZClip, written as in the paper."""
    mean, variance, results = 0.0, 0.0, []
    for step, norm in enumerate(norms):
        result = norm
        if step >= warmup:
            deviation = variance**0.5
            z = (norm - mean) / deviation
            if z > threshold:
                result = mean + threshold**2 / z * deviation
            mean = decay * mean + (1 - decay) * result
            variance = decay * variance + (1 - decay) * (result - mean) ** 2
        elif step == warmup - 1:
            mean, variance = np.mean(norms[:warmup]).item(), np.var(norms[:warmup]).item()
        results.append(result)
    return results


# found: 11
def test_a_bound_comes_after_zscore() -> None:
    norms, x = [1.0, 1.2, 0.8, 1.1, 0.9, 9.0, 1.0, 1.3], tensor([1.0], dtype=torch.float64)
    both = chain(clip_by_zscore(2.5, warmup=5), clip_by_global_norm(0.95))
    state, results = both.init(x, {}), []
    for norm in norms:
        result, state = both.update(norm * x, {}, state)
        results.append(result.item())
    assert_close(results, [min(norm, 0.95) for norm in z_clipped_norms(norms, 2.5, 0.97, 5)])
    assert "``clip_by_global_norm`` after it for a bound" in str(clip_by_zscore.__doc__)


def norms_of(steps: int) -> list[float]:
    norms = torch.distributions.LogNormal(0.0, 1.0).sample((steps,)).double()
    return [float(norm) for norm in norms]


def test_history_by_hand() -> None:
    check(clip_by_history(50), [1, 3, 9, 2, 2.5], [1, 2, 3, 2, 2.5])
    check(clip_by_history(0), [2, 3, 1, 5], [2.0, 2, 1, 1])
    check(clip_by_history(100), [2, 3, 1, 5], [2.0, 3, 1, 5])
    check(clip_by_history(0, window=2), [1, 4, 5, 6], [1.0, 1, 4, 5])
    check(clip_by_history(0, window=1), [1, 4, 5], [1.0, 4, 5])


@pytest.mark.parametrize("percentile", [0, 10, 33.3, 50, 99, 100])
@pytest.mark.parametrize("window", [7, 1000])
def test_history_against_numpy(percentile: float, window: int) -> None:
    norms = norms_of(20)
    expected = [min(norms[i], np.percentile(norms[max(0, i + 1 - window) : i + 1], percentile)) for i in range(20)]
    assert_close(clipped_norms(clip_by_history(percentile, window=window), norms), expected)


def test_zscore_by_hand() -> None:
    # Norms 1 and 3: mean 2, deviation 1. Then z = 8 above 2 gives 2 + 4 / 8, and z = 1.9 below it gives 3.9.
    check(clip_by_zscore(2.0, warmup=2), [1, 3, 10], [1, 3, 2.5])
    check(clip_by_zscore(2.0, warmup=2), [1, 3, 3.9], [1, 3, 3.9])
    check(clip_by_zscore(2.0, decay=0, warmup=1), [1, 1, 5], [1.0, 1, 1])
    check(clip_by_zscore(2.0), [1, 1000, 1, 1e6], [1, 1000, 1, 1e6])


@pytest.mark.parametrize("threshold", [0.5, 2.5])
@pytest.mark.parametrize("decay", [0.5, 0.97])
@pytest.mark.parametrize("warmup", [2, 10])
def test_zscore_against_the_paper(threshold: float, decay: float, warmup: int) -> None:
    norms = norms_of(40)
    expected = z_clipped_norms(norms, threshold, decay, warmup)
    clip = clip_by_zscore(threshold, decay=decay, warmup=warmup)
    assert_close(clipped_norms(clip, norms), expected)
    assert expected != norms


@pytest.mark.parametrize("clip", [clip_by_history(50), clip_by_zscore(1.0, warmup=2)])
@given(st.lists(st.floats(0, 1e3, allow_subnormal=False, width=16), min_size=1, max_size=12))
def test_never_lengthens(clip: BoundTransform, norms: list[float]) -> None:
    for norm, result in zip(norms, clipped_norms(clip, norms), strict=True):
        assert 0 <= result <= norm * (1 + 1e-9)


@pytest.mark.parametrize("clip", [clip_by_history(50), clip_by_zscore(1.0, warmup=2)])
@pytest.mark.parametrize("bad", [nan, inf])
def test_one_bad_step_does_not_spoil_the_later_ones(clip: BoundTransform, bad: float) -> None:
    norms = norms_of(10)
    direction = tensor([1.0], dtype=torch.float64)

    def run(values: list[float]) -> tuple[Tensor, State]:
        state = clip.init(direction, {})
        for value in values:
            result, state = clip.update(value * direction, {}, state)
        return result, state

    result, state = run([*norms, bad])
    assert not result.isfinite().any() or bad == inf
    good = run(norms)[1]
    for key in good.keys() - {"norms"}:
        assert_close(state[key], good[key])
    finite = [s["norms"][s["norms"].isfinite()] for s in (state, good) if "norms" in s]
    assert not finite or torch.equal(*finite)
    assert_close(run([*norms, bad, 0.5])[0], run([*norms, 0.5])[0])


@pytest.mark.parametrize("clip", [clip_by_history(50), clip_by_zscore(1.0, warmup=2)])
def test_zeros(clip: BoundTransform) -> None:
    assert clipped_norms(clip, [0.0, 0.0, 0.0, 0.0]) == [0.0] * 4
    assert all(norm >= 0 for norm in clipped_norms(clip, [0.0, 0.0, 0.0, 1.0]))


def make_params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), nn.Parameter(torch.randn(3, dtype=torch.float64))]


def make_optim(params: list[nn.Parameter], clip: Transform, InnerOpt: Any = torch.optim.SGD) -> Any:
    return ParamTransformingOptimizer([{"params": [p]} for p in params], InnerOpt, pre=clip, lr=0.1)


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    size = torch.rand((), generator=generator).mul(4).exp()
    for param in params:
        param.grad = size * torch.randn(param.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["history", "zscore"])
def test_clips_the_norm_of_all_parameters(name: str) -> None:
    clip = clip_by_history(30, window=5) if name == "history" else clip_by_zscore(1.5, decay=0.9, warmup=4)
    params, reference = make_params(), make_params()
    optim = make_optim(params, clip)
    norms: list[float] = []
    for step in range(20):
        set_grads(params, step)
        set_grads(reference, step)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in reference if p.grad is not None]).item())
        if name == "history":
            limit = min(norms[-1], np.percentile(norms[-5:], 30))
        else:
            limit = z_clipped_norms(norms, 1.5, 0.9, 4)[-1]
        optim.step()
        for param, expected in zip(params, reference, strict=True):
            assert expected.grad is not None
            expected.data -= 0.1 * limit / norms[-1] * expected.grad
            assert_close(param, expected)


@pytest.mark.parametrize("clip", [clip_by_history(30, window=5), clip_by_zscore(1.5, decay=0.9, warmup=4)])
def test_a_checkpoint_continues_bit_for_bit(clip: Transform) -> None:
    params = make_params()
    optim = make_optim(params, clip, torch.optim.Adam)
    for step in range(7):
        set_grads(params, step)
        optim.step()
    file = io.BytesIO()
    torch.save(optim.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = make_optim(others, clip, torch.optim.Adam)
    loaded.load_state_dict(torch.load(file))
    for step in range(7, 14):
        for some, optimizer in ((params, optim), (others, loaded)):
            set_grads(some, step)
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (clip_by_history, {"percentile": 101}, "clip_by_history.percentile must be <= 100, got 101"),
        (clip_by_history, {"percentile": 10, "window": 0}, "clip_by_history.window must be > 0, got 0"),
        (clip_by_zscore, {"threshold": 0}, "clip_by_zscore.threshold must be > 0, got 0"),
        (clip_by_zscore, {"threshold": 2.5, "decay": 1.0}, "clip_by_zscore.decay must be < 1, got 1.0"),
        (clip_by_zscore, {"threshold": 2.5, "warmup": 0}, "clip_by_zscore.warmup must be > 0, got 0"),
    ],
)
def test_errors(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
