"""``metrics()``: which names there are, what is counted since when, and that nothing else changes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradchain as gc
from gradchain import ParamTransformingOptimizer, attach, chain, clip_by_norm, monitor

ROWS = [[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]]


def make(rows: list[list[float]] = ROWS, **options: Any) -> tuple[nn.Parameter, ParamTransformingOptimizer]:
    x = nn.Parameter(torch.zeros(len(rows), 2))
    x.grad = torch.tensor(rows)
    return x, ParamTransformingOptimizer([("x", x)], lr=0.1, **options)


def step(x: nn.Parameter, optimizer: Any, rows: list[list[float]] = ROWS) -> None:
    x.grad = torch.tensor(rows)
    optimizer.step()


@pytest.mark.parametrize(
    ("clip", "param_ndim", "share"),
    [
        (clip_by_norm(2.0), -1, 1 / 3),
        (clip_by_norm(2.0), None, 1.0),
        (clip_by_norm(100.0), None, 0.0),
        (clip_by_norm(float("inf")), None, 0.0),
        (gc.clip_by_rms(0.6), -1, 2 / 3),
        (gc.clip_adaptive(0.1), -1, 1.0),
        (gc.clip_by_global_norm(1.0), -1, 1.0),
        (gc.clip_by_global_norm(10.0), -1, 0.0),
        (gc.clip_by_history(0.0), -1, 0.0),
        (gc.clip_by_zscore(2.0), -1, 0.0),
    ],
    ids=str,
)
def test_share_clipped(clip: Any, param_ndim: int | None, share: float) -> None:
    x, optimizer = make(pre=clip, param_ndim=param_ndim)
    step(x, optimizer)
    assert optimizer.metrics() == {}
    for _ in range(3):
        step(x, optimizer)
    key = f"pre/{clip.state_name}/share_clipped"
    assert optimizer.metrics(per_parameter=True) == pytest.approx({key: share, f"{key}/x": share})


def test_counts_are_those_since_the_last_call() -> None:
    x, optimizer = make(pre=clip_by_norm(2.0), param_ndim=None)
    key = "pre/clip_by_norm/share_clipped"
    assert optimizer.metrics() == {}
    step(x, optimizer, [[3.0, 4.0]] * 3)
    step(x, optimizer, [[0.3, 0.4]] * 3)
    assert optimizer.metrics() == {key: 0.5}
    assert optimizer.metrics() == {}
    step(x, optimizer, [[0.3, 0.4]] * 3)
    assert optimizer.metrics() == {key: 0.0}


def as_it_is(tensor: torch.Tensor, group: gc.Group) -> torch.Tensor:
    return tensor if tensor.sum() < 1e9 else -tensor


@pytest.mark.parametrize("count", [1, 5])
def test_counting_changes_neither_numbers_nor_states(count: int) -> None:
    pre = chain(
        clip_by_norm(2.0), gc.broadcast(as_it_is, None), gc.ema(0.9), clip_by_norm(0.5), gc.clip_by_global_norm(0.3)
    )
    results = []
    for counts in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)) for _ in range(count)]
        optimizer = ParamTransformingOptimizer(params, pre=pre, post=clip_by_norm(0.7), lr=0.1)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            if counts:
                optimizer.metrics()
            optimizer.step()
        results.append((params, optimizer.state_dict()["state"]))
        shares = optimizer.metrics()
    torch.testing.assert_close(results[0], results[1])
    assert list(shares) == [
        "pre/clip_by_norm/share_clipped",
        "pre/clip_by_norm_2/share_clipped",
        "pre/clip_by_global_norm/share_clipped",
        "post/clip_by_norm/share_clipped",
    ]


def test_equal_small_tensors_count_one_by_one() -> None:
    params = [nn.Parameter(torch.zeros(2, 2)) for _ in range(40)]
    optimizer = ParamTransformingOptimizer(params, pre=chain(gc.normalize(), gc.scale(2.0), clip_by_norm(1.5)), lr=0.1)
    optimizer.metrics()
    for i, param in enumerate(params):
        param.grad = torch.ones(2, 2) if i % 4 else torch.zeros(2, 2)
    optimizer.step()
    assert optimizer.metrics() == {"pre/clip_by_norm/share_clipped": 0.75}


def test_skips() -> None:
    x, optimizer = make(pre=gc.skip_nonfinite())
    for value in (1.0, float("nan"), float("nan")):
        step(x, optimizer, [[value, 1.0]] * 3)
    assert optimizer.metrics() == {"pre/skip_nonfinite/in_a_row": 2.0, "pre/skip_nonfinite/total": 2.0}


def test_parameters_without_a_gradient_are_left_out() -> None:
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ParamTransformingOptimizer([x, y], pre=monitor(), lr=0.1)
    x.grad = y.grad = torch.ones(2)
    optimizer.step()
    y.grad = None
    optimizer.step()
    for _ in range(2):
        assert optimizer.metrics()["pre/monitor/norm"] == pytest.approx(2**0.5)
    assert "pre/monitor/norm/0" in optimizer.metrics(per_parameter=True)
    assert "pre/monitor/norm/1" not in optimizer.metrics(per_parameter=True)


def test_several_inner_optimizers() -> None:
    params = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2))]
    inner = [SGD(params[:1], lr=0.1), torch.optim.Adam(params[1:], lr=0.1)]
    optimizer = ParamTransformingOptimizer(InnerOpt=inner, pre=chain(monitor(), gc.clip_by_global_norm(1.0)))
    optimizer.metrics()
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    metrics = optimizer.metrics()
    assert metrics["pre/monitor/norm"] == pytest.approx(8**0.5)
    assert metrics["pre/clip_by_global_norm/share_clipped"] == 1.0


def test_without_anything_to_see() -> None:
    assert make()[1].metrics() == {}
    assert make(pre=monitor())[1].metrics() == {}


def test_one_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    x, optimizer = make(pre=chain(monitor(), clip_by_norm(1.0), gc.skip_nonfinite()))
    optimizer.metrics()
    step(x, optimizer)
    calls = []
    tolist = torch.Tensor.tolist

    def counted(self: torch.Tensor) -> Any:
        calls.append(self)
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    optimizer.metrics(per_parameter=True)
    assert len(calls) == 1


def test_attached_counts_and_copies_start_anew() -> None:
    x = nn.Parameter(torch.zeros(3, 2))
    optimizer = SGD([x], lr=0.1)
    with attach(optimizer, pre=clip_by_norm(2.0)) as attached:
        attached.metrics()
        step(x, optimizer)
        assert attached.metrics() == {"pre/clip_by_norm/share_clipped": pytest.approx(1 / 3)}
    y, wrapper = make(pre=clip_by_norm(2.0))
    wrapper.metrics()
    step(y, wrapper)
    assert copy.deepcopy(wrapper).metrics() == {}


def test_in_backward() -> None:
    x = nn.Parameter(torch.zeros(3, 2))
    optimizer = ParamTransformingOptimizer([x], pre=clip_by_norm(2.0), lr=0.1)
    with gc.step_in_backward(optimizer):
        (x * torch.tensor(ROWS)).sum().backward()
        optimizer.metrics()
        (x * torch.tensor(ROWS)).sum().backward()
    assert optimizer.metrics() == {"pre/clip_by_norm/share_clipped": pytest.approx(1 / 3)}
