"""What a plan is made for changes in mid-run: which gradients there are, and what parameters are like."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

import gradchain.engine.traced
from gradchain import (
    ParamTransformingOptimizer,
    Transform,
    attach,
    chain,
    clamp,
    clip_by_global_norm,
    clip_by_norm,
    ema,
    freeze,
    masked,
    normalize,
    partition,
    project_l2_ball,
    scale,
    sign,
)


def wrapped(params: Any, **arguments: Any) -> Any:
    return ParamTransformingOptimizer(params, **{"lr": 0.1, "param_ndim": None, **arguments})


def attached(params: Any, **arguments: Any) -> Any:
    optimizer = SGD(params, lr=arguments.pop("lr", 0.1))
    attach(optimizer, **{"param_ndim": None, **arguments})
    return optimizer


def set_grad(param: Tensor, value: Tensor | float) -> None:
    param.grad = (
        torch.as_tensor(value, dtype=param.dtype)
        .expand(param.shape)
        .clone(memory_format=torch.preserve_format if isinstance(value, Tensor) else torch.contiguous_format)
    )


# Which parameters have a gradient


class TwoHeads(nn.Module):
    """A convolution, whose gradient is not contiguous, and two heads of equal shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 5)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(self, task: str) -> Tensor:
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        out: Tensor = getattr(self, task)(self.conv(x).amax((2, 3)))
        return 100 * out.square().sum()


# found: 1
@pytest.mark.parametrize("make", [wrapped, attached])
@pytest.mark.parametrize("pre", [masked(clip_by_norm(1e-3), "b.*"), clip_by_norm(1e-3), clip_by_global_norm(1e-3)])
def test_another_task_in_each_step(make: Callable[..., Any], pre: Transform) -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    optim = make(model.named_parameters(), pre=pre)
    for task in ("a", "b", "b", "a", "b"):
        optim.zero_grad()
        model.loss(task).backward()
        assert model.conv.weight.grad is not None
        assert not model.conv.weight.grad.is_contiguous()
        optim.step()
        if task == "b":
            assert model.b.weight.grad is not None
            assert model.b.weight.grad.norm() <= 1.0001e-3


# What parameters are like

LARGE = 2**20  # of more than one block


def as_new(values: Tensor, **arguments: Any) -> Tensor:
    """What a step of a new optimizer makes of a parameter."""
    param = nn.Parameter(values.clone())
    set_grad(param, 7.0)
    wrapped([param], **arguments).step()
    return param.detach()


@pytest.mark.parametrize("make", [wrapped, attached])
@pytest.mark.parametrize(
    "arguments",
    [
        {"pre": clip_by_norm(1.0)},
        {"pre": chain(clip_by_norm(1.0), sign()), "post": chain(clamp(-0.5, 0.5), scale(0.5))},
        {"update": chain(scale(0.5), sign()), "post": project_l2_ball(1.0)},
        {"pre": chain(normalize(), lambda tensor, group: 2 * tensor), "param_ndim": 1},
    ],
)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        # found: 1
        (torch.ones(4, 3), torch.ones(6)),
        (torch.ones(4, 3), torch.ones(6, 3)),
        (torch.ones(6), torch.ones(2, 3, 2)),
        (torch.ones(4, 3), torch.ones(4, 3, dtype=torch.float64)),
        (torch.ones(LARGE // 4, 4), torch.ones(4, LARGE // 4).t()),
        (torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8).to(memory_format=torch.channels_last)),
        # found: 2
        (torch.ones(4, 3), torch.full((4, 3), 1.0, dtype=torch.float16)),
        (torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(4, 3)),
    ],
)
def test_parameter_of_another_form(make: Any, arguments: dict[str, Any], before: Tensor, after: Tensor) -> None:
    param, other = nn.Parameter(before.clone()), nn.Parameter(torch.ones(3))
    optim = make([param, other], **arguments)
    set_grad(param, 7.0)
    set_grad(other, 7.0)
    optim.step()
    param.grad = None
    param.data = after.clone()
    set_grad(param, 7.0)
    optim.step()
    assert param.dtype == after.dtype
    assert_close(param.detach(), as_new(after, **arguments), rtol=0, atol=0)


# found: 2
@pytest.mark.parametrize("make", [wrapped, attached])
@pytest.mark.parametrize("part", ["", "1"])
def test_half_precision_in_mid_run(make: Callable[..., Any], part: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optim = make(model.parameters(), pre=clip_by_norm(1.0))
    for param in model.parameters():
        set_grad(param, 1.0)
    optim.step()
    model.get_submodule(part).half()
    for param in model.parameters():
        set_grad(param, 6e4)
    optim.step()
    for param in model.parameters():
        assert param.grad is not None
        assert param.grad.float().norm() == pytest.approx(1.0, rel=1e-3)


# found: 1
def test_gradient_of_another_layout() -> None:
    param = nn.Parameter(torch.ones(LARGE // 4, 4))
    optim = wrapped([param], pre=chain(clamp(-1, 1), scale(0.5)))
    for grad in (torch.full((LARGE // 4, 4), 3.0), torch.full((4, LARGE // 4), 3.0).t()):
        param.grad = grad
        optim.step()
        assert param.grad.unique().tolist() == [0.5]


# found: 1
def test_mask_that_reads_a_hyperparameter() -> None:
    param = nn.Parameter(torch.ones(2))
    late = masked(clip_by_norm(1.0), lambda group: group["lr"] < 0.05 and "stop" not in group)
    optim, norms = wrapped([param], pre=late), []
    for change in ({}, {"lr": 0.01}, {"stop": True}):
        optim.param_groups[0].update(change)
        set_grad(param, torch.tensor([3.0, 4.0]))
        optim.step()
        assert param.grad is not None
        norms.append(param.grad.norm().item())
    assert norms == pytest.approx([5.0, 1.0, 5.0])


def test_each_stage_checks_what_changes_in_mid_run() -> None:
    param = nn.Parameter(torch.ones(2))
    optim = wrapped([param], pre=chain(clip_by_norm(1.0), scale(2.0), clip_by_norm(2.0)))
    for key in ("clip_by_norm.max_norm", "clip_by_norm_2.max_norm"):
        set_grad(param, 1.0)
        optim.step()
        good, optim.param_groups[0][key] = optim.param_groups[0][key], -2.0
        with pytest.raises(ValueError, match=key):
            optim.step()
        optim.param_groups[0][key] = good


# found: 1
def test_a_plan_is_kept() -> None:
    model, rest = TwoHeads(), nn.Parameter(torch.ones(3))
    optim = wrapped([*model.parameters(), rest], pre=clip_by_norm(1.0), post=clamp(-1, 1))
    plans = set()
    for _ in range(3):
        optim.zero_grad()
        model.loss("a").backward()
        optim.step()
        plans.add(id(optim._engine._plans))
    assert len(plans) == 1


@pytest.mark.parametrize("make", [wrapped, attached])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_parameter_that_takes_the_place_of_an_equal_one(make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    old, new = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    optim = make([old], pre=scale(0.5), lr=1.0)
    set_grad(old, 1.0)
    optim.step()
    old.data.fill_(1.0)
    optim.param_groups[0]["params"][0] = new
    set_grad(new, 1.0)
    optim.step()
    assert_close(old.detach(), torch.ones(shape))
    assert_close(new.detach(), torch.full(shape, 0.5))


@pytest.mark.parametrize("make", [wrapped, attached])
def test_a_closure_that_changes_the_groups(make: Callable[..., Any]) -> None:
    param = nn.Parameter(torch.zeros(3))
    optim = make([param], pre=scale(0.5), lr=1.0)

    def closure() -> Tensor:
        optim.param_groups[0]["scale.factor"] *= 2
        set_grad(param, 1.0)
        return param.sum()

    expected = torch.zeros(3)
    for factor in (1.0, 2.0):
        optim.step(closure)
        expected -= factor
        assert_close(param.detach(), expected)
    optim.param_groups[0]["scale.factor"] = "1.0"
    with pytest.raises(TypeError, match=r"scale\.factor"):
        optim.step(lambda: set_grad(param, 1.0))
    assert_close(param.detach(), expected)


def test_a_closure_that_is_not_called() -> None:
    class Stubborn(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if closure is not None:
                self.param_groups[0]["level"] = 3

    param = nn.Parameter(torch.zeros(3))
    post = chain(lambda tensor, group: 0 * tensor + group["level"])
    optim = wrapped([param], InnerOpt=Stubborn, post=post, defaults={"level": 2})
    for closure, level in ((None, 2.0), (None, 2.0), (lambda: None, 3.0)):
        optim.step(closure)
        assert_close(param.detach(), torch.full((3,), level))


@pytest.mark.parametrize("make", [wrapped, attached])
@pytest.mark.parametrize(("key", "value"), [("scale.factor", 3), ("param_ndim", 1)])
def test_values_that_come_back_after_a_step_that_failed(make: Callable[..., Any], key: str, value: Any) -> None:
    param = nn.Parameter(torch.zeros(3, 3))
    optim = make([param], pre=chain(scale(0.5), clip_by_norm(1.0)), lr=1.0)
    group = optim.param_groups[0]
    good = dict(group)
    for _ in range(3):
        set_grad(param, 2.0)
        before = param.detach().clone()
        optim.step()
        assert_close(before - param.detach(), torch.full((3, 3), 1 / 3))
        group |= {key: value, "clip_by_norm.max_norm": -1.0}
        with pytest.raises(ValueError, match="max_norm"):
            optim.step()
        group |= good


@pytest.mark.parametrize("make", [wrapped, attached])
def test_a_step_that_only_makes_states_completes_the_groups(make: Callable[..., Any]) -> None:
    param, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optim = make([param], pre=chain(ema(0.9), clip_by_norm(1.0)), lr=0.0)
    optim.param_groups.append(SGD([other], lr=0.0).param_groups[0])
    for each in (param, other):
        set_grad(each, 0.0)
    optim.step()
    assert optim.param_groups[1].items() >= {"ema.decay": 0.9, "clip_by_norm.max_norm": 1.0, "param_ndim": None}.items()


# Gradients that transforms have nothing to do with


def make_words() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"emb": nn.Embedding(5, 3, sparse=True), "lin": nn.Linear(3, 2)})


# found: 38
@pytest.mark.parametrize("make", [wrapped, attached])
@pytest.mark.parametrize(
    "arguments",
    [
        {"pre": masked(clip_by_norm(1e-3), "lin*")},
        {"pre": masked(chain(clip_by_norm(1e-3), clip_by_global_norm(1.0)), lambda group: len(group["shape"]) != 2)},
        {"pre": partition({"emb*": chain(), "*": clip_by_norm(1e-3)})},
        {"pre": masked(clip_by_norm(1e-3), "lin*"), "lr": 0.0},
        {"update": freeze("lin*")},
        {"update": freeze("emb*")},
        {"post": masked(clamp(-0.01, 0.01), "lin*")},
    ],
)
def test_sparse_gradient_that_is_left_alone(make: Callable[..., Any], arguments: dict[str, Any]) -> None:
    model, plain = make_words(), make_words()
    optim = make(model.named_parameters(), **arguments)
    bare = SGD(plain.parameters(), lr=optim.param_groups[0]["lr"])
    for each, step in ((model, optim.step), (plain, bare.step)):
        each["lin"](each["emb"](torch.tensor([1, 1, 4]))).square().sum().backward()
        assert each["emb"].weight.grad.is_sparse
        step()
    frozen = arguments.get("update") == freeze("emb*")
    expected = make_words() if frozen else plain
    assert_close(model["emb"].weight, expected["emb"].weight)
    if "pre" in arguments:
        assert model["lin"].bias.grad.norm() <= 1.001e-3


# found: 38
def test_sparse_gradient_that_is_asked_for() -> None:
    model = make_words()
    optim = wrapped(model.named_parameters(), pre=masked(clip_by_norm(1.0), "emb*"))
    model["lin"](model["emb"](torch.tensor([1]))).sum().backward()
    where = r"^pre, group 0, parameter 0 'emb.weight' of shape \(5, 3\), torch.float32: "
    with pytest.raises(
        TypeError, match=where + r"stage 0, .*transforms need a dense gradient, got the layout torch.sparse_coo"
    ):
        optim.step()


def test_a_function_of_the_group_may_read_a_tensor_that_is_replaced() -> None:
    x = nn.Parameter(torch.ones(2))
    groups = [{"params": [x], "switch": torch.tensor([True, True])}]
    optimizer = ParamTransformingOptimizer(groups, pre=masked(scale(2.0), lambda group: bool(group["switch"].all())))
    for switch, expected in (([True, True], 2.0), ([False, True], 1.0), ([True, True], 2.0)):
        optimizer.param_groups[0]["switch"] = torch.tensor(switch)
        x.grad = torch.ones(2)
        optimizer.step()
        assert_close(x.grad, torch.full((2,), expected))


def test_a_function_may_compute_with_complex_numbers() -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = wrapped(params, pre=lambda tensor, group: (tensor * complex(1, 2)).imag)
    for param in params:
        set_grad(param, 2.0)
    optimizer.step()
    for param in params:
        assert_close(param.grad, torch.full((3,), 4.0))


def test_the_last_of_many_equal_tensors_can_be_alone_in_its_block() -> None:
    params = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2**21 // (4 * 64 * 64) + 1)]
    optimizer = wrapped(params, pre=normalize(), param_ndim=1)
    for number, param in enumerate(params):
        set_grad(param, 1.0 + number)
    optimizer.step()
    for param in params:
        assert_close(param.grad, torch.full((64, 64), 1 / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param_ndim", [None, 0, 1])
@pytest.mark.parametrize(
    "pre", [clip_by_norm(1.0), lambda t, group: t / t.norm().clamp_min(1), chain(scale(0.5), sign())]
)
def test_equal_tensors_share_a_trace(
    monkeypatch: pytest.MonkeyPatch, pre: Transform, param_ndim: int | None, dtype: torch.dtype
) -> None:
    traced = []
    trace = gradchain.engine.traced._trace
    monkeypatch.setattr(gradchain.engine.traced, "_trace", lambda *args: traced.append(args) or trace(*args))  # type: ignore[func-returns-value]
    monkeypatch.setattr(gradchain.engine.traced, "_KNOWN", {})
    params = [nn.Parameter(torch.ones(4, 4, dtype=dtype)) for _ in range(20)]
    optimizer = wrapped([{"params": params[:10]}, {"params": params[10:]}], pre=pre, param_ndim=param_ndim)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert 0 < len(traced) <= 2  # one of a tensor, and one of many that are stacked
