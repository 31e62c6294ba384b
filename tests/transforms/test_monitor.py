"""``monitor``: the figures by hand, and that it changes nothing, wherever it is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.optim import SGD

import gradchain as gc
from gradchain import ParamTransformingOptimizer, attach, chain, monitor
from gradchain.transforms import monitor as module

INF, NAN = math.inf, math.nan


def look(t: Tensor, **group: Any) -> dict[str, float]:
    stage = monitor()
    result, state = stage.update(t, group, stage.init(t, group))
    assert result is t
    return stage.report([{"figures": state["figures"].tolist()}], [t.numel()])


def test_by_hand() -> None:
    figures = look(tensor([3.0, 0.0, -4.0, 0.0]), param=tensor([0.0, 0.0, 10.0, 0.0]))
    assert figures == {"norm": 5.0, "rms": 2.5, "ratio": 0.5, "zero": 0.5, "nonfinite": 0.0}


def test_what_is_not_finite_is_counted_and_shows_in_the_norm() -> None:
    figures = look(tensor([NAN, INF, -INF, 0.0, 1.0, 3e38, 3e38, 1.0]))
    assert math.isnan(figures["norm"])
    assert (figures["zero"], figures["nonfinite"]) == (1 / 8, 3 / 8)
    overflow = look(torch.full((4,), 3e38))
    assert (overflow["norm"], overflow["nonfinite"]) == (INF, 0.0)


def test_without_a_parameter_there_is_no_ratio() -> None:
    assert "ratio" not in look(tensor([1.0]))
    assert "ratio" not in look(tensor([1.0]), param=tensor([1.0]), slot="post")
    assert math.isnan(look(tensor([1.0]), param=tensor([0.0]))["ratio"])


def test_half_precision_is_computed_in_float32() -> None:
    figures = look(torch.full((70_000,), 300.0, dtype=torch.float16))
    assert figures["norm"] == pytest.approx(300 * math.sqrt(70_000), rel=1e-6)  # above the largest of float16


@pytest.mark.parametrize("longest", [1, 7, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_pieces_and_stacks(monkeypatch: pytest.MonkeyPatch, longest: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "LONGEST", longest)
    shapes = [(5, 3), (), (3, 5), (0, 4), (2, 3, 4, 4), (15,)]
    tensors = [torch.randn(shape, dtype=torch.float64).relu().to(dtype) for shape in shapes]
    tensors[4] = tensors[4].contiguous(memory_format=torch.channels_last)
    tensors[2].view(-1)[0] = NAN
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    stage = monitor()
    groups = [{"param": param} for param in params]
    states = stage.run(tensors, groups, [stage.init(t, {}) for t in tensors])[1]
    for t, param, state in zip(tensors, params, states, strict=True):
        wide = t if t.dtype in (torch.float64, torch.complex64) else t.float()
        expected = [wide.norm(), (t == 0).sum(), (~t.isfinite()).sum(), param.to(wide.dtype).norm()]
        wanted = tensor([float(each) for each in expected], dtype=wide.real.dtype)
        torch.testing.assert_close(state["figures"], wanted, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": 1}, TypeError),
        ({"every": 1.0}, TypeError),
        ({"name": ""}, ValueError),
        ({"name": "a.b"}, ValueError),
        ({"name": "a/b"}, ValueError),
        ({"every": 0}, ValueError),
    ],
)
def test_arguments(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="monitor"):
        monitor(**arguments)


def test_it_prints_and_compares() -> None:
    assert repr(chain(monitor(), monitor("b", every=2))) == "chain(monitor(), monitor('b', every=2))"
    assert monitor("b") != monitor() != monitor(every=2)


def make(**chains: Any) -> tuple[nn.Module, ParamTransformingOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ParamTransformingOptimizer(model.named_parameters(), SGD, lr=0.1, **chains)
    return model, optimizer


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()


def global_norm(tensors: Any) -> float:
    return float(torch.stack([t.detach().norm() for t in tensors]).norm())


@pytest.mark.parametrize("param_ndim", [-1, None])
def test_in_each_slot(param_ndim: int | None) -> None:
    middle = chain(monitor("raw"), gc.scale(0.5), monitor("raw"), gc.clip_by_norm(0.1))
    model, optimizer = make(pre=middle, update=monitor(), post=monitor(), param_ndim=param_ndim)
    bare_model, bare = make(pre=chain(gc.scale(0.5), gc.clip_by_norm(0.1)), param_ndim=param_ndim)
    for _ in range(2):
        backward(model)
        backward(bare_model)
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        bare.step()
    params = list(model.parameters())
    for ours, theirs in zip(params, bare_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    metrics = optimizer.metrics()
    assert metrics["pre/raw/norm"] == pytest.approx(global_norm(grads))
    assert metrics["pre/raw_2/norm"] == pytest.approx(global_norm(grads) / 2)
    assert metrics["pre/raw/ratio"] == pytest.approx(global_norm(grads) / global_norm(before))
    moved = [p.detach() - b for p, b in zip(params, before, strict=True)]
    assert metrics["update/monitor/norm"] == pytest.approx(global_norm(moved), rel=1e-5)
    assert metrics["update/monitor/ratio"] == pytest.approx(global_norm(moved) / global_norm(before), rel=1e-5)
    assert metrics["post/monitor/norm"] == pytest.approx(global_norm(params))
    count = sum(p.numel() for p in params)
    assert metrics["post/monitor/rms"] == pytest.approx(global_norm(params) / math.sqrt(count))


# Masks, kinds, and what runs on all tensors together.
@pytest.mark.parametrize(
    ("pre", "label", "chosen"),
    [
        (gc.masked(monitor(), "*bias"), "monitor", "bias"),
        (gc.partition({"*bias": monitor("b"), "*": chain()}), "partition/b", "bias"),
        (gc.with_error_feedback(monitor()), "with_error_feedback/monitor", ""),
        (gc.masked(monitor(), torch.tensor(True)), "monitor", ""),
        (gc.broadcast(chain(monitor(), gc.sign()), 1), "monitor", ""),
    ],
    ids=str,
)
def test_within_others(pre: Any, label: str, chosen: str) -> None:
    model, optimizer = make(pre=pre, param_ndim=None)
    backward(model)
    grads = [p.grad.clone() for n, p in model.named_parameters() if n.endswith(chosen) and p.grad is not None]
    optimizer.step()
    assert optimizer.metrics()[f"pre/{label}/norm"] == pytest.approx(global_norm(grads))


def test_attached_and_in_backward() -> None:
    model, optimizer = make(pre=monitor())
    backward(model)
    optimizer.step()
    expected = optimizer.metrics()
    model, _ = make()
    sgd = SGD(model.parameters(), lr=0.1)
    attached = attach(sgd, pre=monitor())
    backward(model)
    sgd.step()
    assert attached.metrics() == expected
    model, optimizer = make(pre=monitor())
    with gc.step_in_backward(optimizer):
        backward(model)
    assert optimizer.metrics() == pytest.approx(expected)
    attached.remove()
    with pytest.raises(RuntimeError, match="removed"):
        attached.metrics()


def test_every_looks_in_one_step_of_so_many() -> None:
    x = nn.Parameter(torch.zeros(1))
    optimizer = ParamTransformingOptimizer([x], pre=monitor(every=3), lr=0.1)
    seen = []
    for step in range(6):
        x.grad = torch.full((1,), float(step))
        optimizer.step()
        seen.append(optimizer.metrics()["pre/monitor/norm"])
    assert seen == [0, 0, 2, 2, 2, 5]


def test_the_state_is_four_numbers_and_goes_through_checkpoints() -> None:
    model, optimizer = make(pre=monitor())
    backward(model)
    optimizer.step()
    states = [optimizer.state[p]["transforms"] for p in model.parameters()]
    assert all(state["pre.monitor.figures"].shape == (4,) for state in states)
    _, other = make(pre=monitor())
    other.load_state_dict(optimizer.state_dict())
    assert other.metrics() == optimizer.metrics()


def test_no_copy_of_parameters_is_kept_for_it() -> None:
    model, optimizer = make(pre=monitor(), post=gc.scale(0.5))
    backward(model)
    optimizer.step()
    plans = optimizer._engine._plans
    assert plans is not None
    assert plans.cannot_raise
