"""``signal``: values from outside, for one step, without a new trace."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.optim import LBFGS, SGD

import gradchain as gc
from gradchain import Group, ParamTransformingOptimizer, attach
from gradchain.engine import traced


def divide(tensor: Tensor, group: Group) -> Tensor:
    loss: Tensor = group["loss"]
    return tensor / loss


def divide_as_it_is(tensor: Tensor, group: Group) -> Tensor:
    return tensor / float(group["loss"])


def make(pre: Any = divide, **options: Any) -> tuple[nn.Parameter, ParamTransformingOptimizer]:
    x = nn.Parameter(torch.zeros(2))
    x.grad = torch.ones(2)
    return x, ParamTransformingOptimizer([x], pre=pre, lr=1.0, **options)


@pytest.mark.parametrize("pre", [divide, divide_as_it_is, gc.masked(divide, tensor(True)), gc.broadcast(divide, 0)])
@pytest.mark.parametrize("loss", [2, 2.0, tensor(2.0), tensor(2.0).bfloat16()])
def test_transforms_read_it(pre: Any, loss: Any) -> None:
    x, optimizer = make(pre)
    optimizer.signal(loss=loss)
    optimizer.step()
    assert x.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("slot", ["pre", "update", "post"])
def test_it_is_for_one_step(slot: str) -> None:
    x, optimizer = make(**{"pre": None, slot: divide})
    optimizer.signal(loss=2.0)
    optimizer.step()
    before = x.detach().clone()
    for _ in range(2):
        x.grad = torch.ones(2)
        with pytest.raises(KeyError, match=r"optimizer\.signal\(loss=\.\.\.\)"):
            optimizer.step()
        assert torch.equal(x, before) or slot != "pre"
    optimizer.signal(loss=2.0)
    optimizer.step()
    assert not torch.equal(x, before)


def test_other_values_need_no_other_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    x, optimizer = make()
    traces: list[Any] = []
    original = traced._trace

    def trace(*arguments: Any) -> Any:
        traces.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(traced, "_trace", trace)
    for loss in (1.5, 3.0, 6.0):
        x.grad = torch.ones(2)
        optimizer.signal(loss=tensor(loss))
        optimizer.step()
        torch.testing.assert_close(x.grad, torch.ones(2) / loss)
        if loss == 1.5:
            traces.clear()
    assert not traces
    assert "traced" in repr(_explained(optimizer))


def _explained(optimizer: ParamTransformingOptimizer) -> Any:
    optimizer.signal(loss=2.0)
    optimizer.explain()
    return optimizer.explain()  # which consumes nothing


def test_a_transform_may_do_without_it() -> None:
    def maybe(tensor: Tensor, group: Group) -> Tensor:
        return tensor / group["loss"] if "loss" in group else tensor

    x, optimizer = make(maybe)
    for loss, expected in ((None, 1.0), (2.0, 0.5), (None, 1.0)):
        x.grad = torch.ones(2)
        if loss is not None:
            optimizer.signal(loss=loss)
        optimizer.step()
        assert x.grad.tolist() == [expected] * 2


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"lr": 1.0}, ValueError, "another name"),
        ({"param": 1.0}, ValueError, "another name"),
        ({"loss": "high"}, TypeError, "number or a tensor, got str"),
        ({"loss": True}, TypeError, "number or a tensor, got bool"),
        ({"loss": 1.0, "reduce": "median"}, ValueError, "reduce must be one of"),
    ],
)
def test_errors(values: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()[1].signal(**values)


def test_an_error_uses_it_up() -> None:
    def fail(tensor: Tensor, group: Group) -> Tensor:
        raise RuntimeError(f"at {float(group['loss'])}")

    _, optimizer = make(fail)
    optimizer.signal(loss=2.0)
    with pytest.raises(RuntimeError, match=r"at 2\.0"):
        optimizer.step()
    with pytest.raises(KeyError, match="signal"):
        optimizer.step()


def test_within_a_closure() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = ParamTransformingOptimizer([x], LBFGS, pre=lambda t, g: t / (1 + g["loss"]), max_iter=2)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        optimizer.signal(loss=loss)
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert len(losses) > 1


def test_attached() -> None:
    x = nn.Parameter(torch.zeros(2))
    optimizer = SGD([x], lr=1.0)
    attached = attach(optimizer, pre=divide)
    x.grad = torch.ones(2)
    attached.signal(loss=2.0)
    optimizer.step()
    assert x.tolist() == [-0.5, -0.5]
    with pytest.raises(KeyError, match="signal"):
        optimizer.step()
    attached.remove()
    with pytest.raises(RuntimeError, match="removed"):
        attached.signal(loss=2.0)


def test_in_backward_all_parameters_get_it() -> None:
    x, y = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = ParamTransformingOptimizer([x, y], pre=divide, lr=1.0)
    with gc.step_in_backward(optimizer):
        for _ in range(2):
            loss = (x + y).sum()
            optimizer.signal(loss=2.0)
            loss.backward()
        assert (x.item(), y.item()) == (-1.0, -1.0)
        with pytest.raises(KeyError, match="signal"):
            (x + y).sum().backward()


@pytest.mark.parametrize(("loss", "moves"), [(1.0, True), (3.0, False), (float("nan"), False)])
def test_skip_large_by_the_loss(loss: float, moves: bool) -> None:
    x, optimizer = make(gc.skip_large(2.0, by="loss"))
    optimizer.signal(loss=tensor(loss))
    optimizer.step()
    assert bool(x.any()) == moves
    assert optimizer.metrics()["pre/skip_large/total"] == (not moves)


def test_skip_large_says_what_it_misses() -> None:
    with pytest.raises(ValueError, match=r"signal\(loss=\.\.\.\) before each step"):
        make(gc.skip_large(2.0, by="loss"))[1].step()
