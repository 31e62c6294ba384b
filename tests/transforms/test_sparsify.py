import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, tensor
from torch.testing import assert_close

from gradchain import broadcast, chain, keep_top_q, normalize, sign
from tests.strategies import tensors

T = tensor([1.0, -4.0, 3.0, 2.0])


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def shares_of_zeros(t: Tensor) -> Tensor:
    return (t == 0).double().mean(-1)


def test_by_hand() -> None:
    assert torch.equal(keep_top_q(0.5)(T, {}), tensor([0.0, -4.0, 3.0, 0.0]))
    assert torch.equal(keep_top_q(0.5)(T, {"keep_top_q.q": 0.75}), tensor([0.0, -4.0, 0.0, 0.0]))
    z = tensor([1 + 1j, -4j, 3.0, 2.0])
    assert torch.equal(keep_top_q(0.5)(z, {}), tensor([0, -4j, 3, 0]))


def test_signed_and_normalized_it_is_the_l1q_direction() -> None:
    assert_close(chain(keep_top_q(0.5), sign(), normalize(1))(T, {}), tensor([0.0, -0.5, 0.5, 0.0]))


@given(st.integers(1, 200), st.floats(0, 1))
def test_of_equal_magnitudes_the_first_are_kept(n: int, q: float) -> None:
    expected = [1.0] * round((1 - q) * n)
    assert keep_top_q(q)(torch.ones(n), {}).tolist() == expected + [0.0] * (n - len(expected))


@given(tensors(), st.floats(0, 1))
def test_what_is_kept_is_largest_and_unchanged(t: Tensor, q: float) -> None:
    result = keep_top_q(q)(t, {})
    k = round((1 - q) * t.numel())
    assert torch.equal(result.abs().flatten().sort(descending=True).values[:k], t.abs().flatten().topk(k).values)
    assert ((result == t) | (result == 0)).all()
    assert result.count_nonzero() <= k


# found: 29
@pytest.mark.parametrize(("q", "dq"), [(0.5, 0.3), (0.9, 0.3), (0.9, 0.5), (0.1, 0.5), (0.5, 1.0), (0.3, 0.0)])
def test_drawn_shares_fill_their_interval(q: float, dq: float) -> None:
    n = 1000
    shares = shares_of_zeros(broadcast(keep_top_q(q, dq, generator=seeded()), 1)(torch.ones(2000, n), {}))
    low, high = max(q - dq, 0), min(q + dq, 1)
    assert low - 1 / n <= shares.min() <= low + 0.01
    assert high - 0.01 <= shares.max() <= high + 1 / n
    # Uniform: the share of draws that are below any level.
    for level in torch.linspace(low, high, 5)[1:-1] if dq else ():
        assert abs((shares < level).double().mean() - (level - low) / (high - low)) < 0.04


def test_draws_repeat_from_the_same_seed() -> None:
    t = torch.rand(1000)
    transform = keep_top_q(0.5, dq=0.4, generator=seeded())
    first, second = transform(t, {}), transform(t, {})
    assert not torch.equal(first, second)
    again = keep_top_q(0.5, dq=0.4, generator=seeded())
    assert torch.equal(again(t, {}), first)
    assert torch.equal(again(t, {}), second)
    torch.manual_seed(1)
    default = keep_top_q(0.5, dq=0.4)(t, {})
    torch.manual_seed(1)
    assert torch.equal(keep_top_q(0.5)(t, {"keep_top_q.dq": 0.4}), default)


@pytest.mark.parametrize("rows", [3, 40])
def test_each_sub_tensor_draws_as_in_a_loop(rows: int) -> None:
    t = torch.rand(rows, 100)
    mapped = broadcast(keep_top_q(0.5, dq=0.4, generator=seeded()), 1)(t, {})
    one_by_one = keep_top_q(0.5, dq=0.4, generator=seeded())
    assert torch.equal(mapped, torch.stack([one_by_one(row, {}) for row in t]))
    assert shares_of_zeros(mapped).unique().numel() > 1


def test_draws_need_no_graph_break() -> None:
    torch.compiler.reset()
    transform = keep_top_q(0.5, dq=0.2)
    compiled = torch.compile(lambda t: transform(t, {}), fullgraph=True, backend="aot_eager")
    assert 0.3 <= shares_of_zeros(compiled(torch.ones(1000))) <= 0.7
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: keep_top_q(-0.1), ValueError, "keep_top_q.q must be >= 0, got -0.1"),
        (lambda: keep_top_q(1.5), ValueError, "keep_top_q.q must be <= 1, got 1.5"),
        (lambda: keep_top_q(0.5, 2), ValueError, "keep_top_q.dq must be <= 1, got 2"),
        (lambda: keep_top_q(0.5)(T, {"keep_top_q.dq": -1}), ValueError, "keep_top_q.dq must be >= 0, got -1"),
        (lambda: keep_top_q("0.5"), TypeError, "keep_top_q.q must be a number, got '0.5'"),  # type: ignore[arg-type]
        (
            lambda: keep_top_q(0.5, generator=0),  # type: ignore[arg-type]
            TypeError,
            "keep_top_q.generator must be Generator or None, got 0",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
