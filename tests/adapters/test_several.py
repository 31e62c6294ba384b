"""Several optimizers as one: given as a mapping, as a list, or with transforms attached to all of them."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    attach,
    chain,
    clip_by_global_norm,
    clip_by_norm,
    ema,
    param_ema,
    partition,
    project_l2_ball,
    schedule,
    skip_nonfinite,
    step_in_backward,
)
from tests.adapters.common import CHAINS, INNER, WITHOUT_CLOSURE, assert_equal, backward, make_params, train, wrapped
from tests.versions import Muon, needs_muon

pytestmark = needs_muon

MUON_AND_ADAMW: dict[Any, Any] = {"*.weight": partial(Muon, lr=0.02), "*": partial(AdamW, lr=3e-4)}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def fit(model: nn.Module, optimizer: Any, steps: range, factor: float = 1.0) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        (factor * model(torch.randn(8, 3)).square().sum()).backward()
        optimizer.step()


def in_two(params: list[nn.Parameter], InnerOpt: Any) -> list[Optimizer]:
    return [InnerOpt(params[:1]), InnerOpt(params[1:])]


def as_one(params: list[nn.Parameter], InnerOpt: Any, **chains: Any) -> Any:
    return ParamTransformingOptimizer(InnerOpt=in_two(params, InnerOpt), **chains)


def of_one(params: list[nn.Parameter], InnerOpt: Any, **chains: Any) -> Any:
    return wrapped(InnerOpt([{"params": params[:1]}, {"params": params[1:]}]), **chains)


class InTurn:
    """Optimizers that step in turn, as a loop lets them."""

    def __init__(self, params: list[nn.Parameter], InnerOpt: Any, **chains: Any) -> None:
        self.optimizers = in_two(params, InnerOpt)
        self.attached = attach(self.optimizers, **chains)

    def step(self) -> Any:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        first, second = (optimizer.state_dict()["state"] for optimizer in self.optimizers)
        return {"state": {**first, **{key + 1: value for key, value in second.items()}}}


def run(make: Callable[..., Any], InnerOpt: Any, chains: dict[str, Any], bad: range = range(0)) -> Any:
    params = make_params()
    optimizer = make(params, InnerOpt, **chains)
    train(optimizer, params, range(6), bad=bad)
    return params, [param.grad for param in params], optimizer.state_dict()["state"]


@pytest.mark.parametrize("make", [as_one, InTurn])
@pytest.mark.parametrize("InnerOpt", WITHOUT_CLOSURE, ids=[name for name in INNER if "LBFGS" not in name])
@pytest.mark.parametrize("chains", CHAINS.values(), ids=CHAINS)
def test_two_optimizers_make_the_numbers_of_one_with_two_groups(
    make: Any, InnerOpt: Any, chains: dict[str, Any]
) -> None:
    assert_equal(run(make, InnerOpt, chains), run(of_one, InnerOpt, chains))


@pytest.mark.parametrize("make", [as_one, InTurn])
def test_all_skip_a_step_where_one_has_a_bad_gradient(make: Any) -> None:
    chains = {"pre": chain(skip_nonfinite(), ema(0.9)), "post": param_ema(0.9)}
    assert_equal(run(make, INNER["Adam"], chains, range(2, 3)), run(of_one, INNER["Adam"], chains, range(2, 3)))


def test_a_closure_is_evaluated_once() -> None:
    params, expected = make_params(), make_params()
    evaluations = []

    def closure(step: int) -> Tensor:
        evaluations.append(step)
        return backward(params, step)

    optimizer = as_one(params, INNER["Adam"], pre=clip_by_global_norm(0.5))
    losses = [optimizer.step(partial(closure, step)) for step in range(3)]
    other = of_one(expected, INNER["Adam"], pre=clip_by_global_norm(0.5))
    assert evaluations == [0, 1, 2]
    assert_equal(losses, [other.step(partial(backward, expected, step)) for step in range(3)])
    assert_equal(params, expected)


@pytest.mark.parametrize("make", [as_one, InTurn])
def test_a_failing_transform_changes_no_parameter(make: Any) -> None:
    def fail(tensor: Tensor, group: Group) -> Tensor:
        if tensor.shape == (4,):
            raise ArithmeticError("no")
        return tensor

    params = make_params()
    optimizer = make(params, INNER["Adam"], post=fail, param_ndim=None)
    before = copy.deepcopy(params)
    with pytest.raises(ArithmeticError, match=r"post, group 1, parameter 0 of shape \(4,\)"):
        train(optimizer, params, range(1))
    assert_equal(params, before)


def by_hand(model: nn.Module, steps: range) -> None:
    weights = [param for name, param in model.named_parameters() if name.endswith("weight")]
    others = [param for name, param in model.named_parameters() if not name.endswith("weight")]
    muon, adamw = Muon(weights, lr=0.02), AdamW(others, lr=3e-4)
    for step in steps:
        torch.manual_seed(step)
        model.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        muon.step()
        adamw.step()


@pytest.mark.parametrize(
    "inner", [MUON_AND_ADAMW, {(lambda p: p.ndim == 2): partial(Muon, lr=0.02), "*": partial(AdamW, lr=3e-4)}]
)
def test_muon_and_adamw_under_one_clip(inner: Any) -> None:
    model, expected = make_model(), make_model()
    optimizer = ParamTransformingOptimizer(model.named_parameters(), inner, pre=clip_by_global_norm(0.1))
    fit(model, optimizer, range(4))
    by_hand(expected, range(4))
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=1e-5, atol=1e-7)
    assert [type(each) for each in optimizer.inner_opt.optimizers] == [Muon, AdamW]  # type: ignore[attr-defined]
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "2.bias"],
    ]


def test_names_can_come_from_a_model() -> None:
    model = make_model()
    optimizer = ParamTransformingOptimizer(model.parameters(), MUON_AND_ADAMW, model=model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


def test_groups_override_values_by_pattern() -> None:
    model = make_model()
    optimizer = ParamTransformingOptimizer(
        model.named_parameters(),
        MUON_AND_ADAMW,
        pre=clip_by_norm(1.0),
        groups={"2.*": {"weight_decay": 0.5, "param_ndim": 1}, "*.bias": {"lr": 1.0, "clip_by_norm.max_norm": 2.0}},
    )
    found = [
        (group["param_names"], group["lr"], group["weight_decay"], group["param_ndim"], group["clip_by_norm.max_norm"])
        for group in optimizer.param_groups
    ]
    assert found == [
        (["0.weight"], 0.02, 0.1, -1, 1.0),
        (["2.weight"], 0.02, 0.5, 1, 1.0),
        (["2.bias"], 3e-4, 0.5, 1, 1.0),
        (["0.bias"], 1.0, 0.01, -1, 2.0),
    ]


def test_groups_override_values_of_one_inner_optimizer_and_of_given_groups() -> None:
    model = make_model()
    first, *rest = model.named_parameters()
    given: list[dict[str, Any]] = [{"params": [first], "lr": 0.5}, {"params": rest}]
    optimizer = ParamTransformingOptimizer(
        given,
        SGD,
        groups={(lambda p: p.ndim == 1): {"momentum": 0.9}},
        lr=0.1,
    )
    assert [(group["param_names"], group["lr"], group["momentum"]) for group in optimizer.param_groups] == [
        (["0.weight"], 0.5, 0),
        (["2.weight"], 0.1, 0),
        (["0.bias", "2.bias"], 0.1, 0.9),
    ]


def named() -> Any:
    return make_model().named_parameters()


def shared() -> list[Optimizer]:
    weight = nn.Parameter(torch.ones(2))
    return [SGD([("weight", weight)]), SGD([("weight", weight)])]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: {"params": named(), "InnerOpt": {"*.weight": Muon}}, ValueError, "none of the keys .* '0.bias', of"),
        (
            lambda: {"params": make_params(), "InnerOpt": {"*.weight": SGD}},
            ValueError,
            r"InnerOpt has the pattern '\*.weight', which needs the names of parameters; .*model.named_parameters\(\)",
        ),
        (lambda: {"params": named(), "InnerOpt": {"*": SGD}, "lr": 0.1}, TypeError, r"\['lr'\] could be meant for any"),
        (lambda: {"params": named(), "InnerOpt": {"*": "SGD"}}, TypeError, r"InnerOpt\['\*'\] must be .* got 'SGD'"),
        (lambda: {"InnerOpt": {"*": SGD}}, ValueError, "params are needed to make the inner optimizer, SGD; got None"),
        (lambda: {"params": iter(()), "InnerOpt": {"*": SGD}}, ValueError, "params must have at least one parameter"),
        (lambda: {"params": [1.0], "InnerOpt": {"*": SGD}}, TypeError, "params must be tensors, .*; got 1.0"),
        (lambda: {"InnerOpt": []}, ValueError, "InnerOpt needs at least one optimizer"),
        (lambda: {"InnerOpt": [SGD(make_params()), SGD]}, TypeError, r"InnerOpt\[1\] must be an instance .*give a map"),
        (
            lambda: {"InnerOpt": [SGD(make_params()), LBFGS(make_params()[:1])]},
            ValueError,
            "LBFGS evaluates its closure several times in a step, .*; let it step by itself",
        ),
        (lambda: {"InnerOpt": shared()}, ValueError, "optimizers 0 and 1, SGD, must not share .* both have weight of"),
        (
            lambda: {"InnerOpt": [ParamTransformingOptimizer(make_params(), lr=0.1)]},
            TypeError,
            "InnerOpt is a ParamTransformingOptimizer already",
        ),
        (
            lambda: {"InnerOpt": SGD(make_params()), "groups": {"*": {"lr": 1.0}}},
            TypeError,
            "InnerOpt is an instance of SGD already; leave out groups",
        ),
    ],
)
def test_bad_arguments(arguments: Callable[[], Any], error: type[Exception], message: str) -> None:
    given = arguments()
    with pytest.raises(error, match=message):
        ParamTransformingOptimizer(**given)


def test_a_key_that_chooses_nothing_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"InnerOpt has the key 'conv\*', .* so that there is no Muon"):
        optimizer = ParamTransformingOptimizer(named(), {"conv*": Muon, "*": SGD})
    assert len(optimizer.param_groups) == 1
    with pytest.warns(UserWarning, match=r"groups has the key 'conv\*', which chooses no parameter: none matches"):
        ParamTransformingOptimizer(named(), SGD, groups={"conv*": {"lr": 1.0}})


def test_schedulers_of_all_and_of_one() -> None:
    model = make_model()
    optimizer = ParamTransformingOptimizer(model.named_parameters(), MUON_AND_ADAMW, pre=clip_by_norm(1.0))
    muon, _ = optimizer.inner_opt.optimizers  # type: ignore[attr-defined]
    every, one = ExponentialLR(optimizer, gamma=0.5), ExponentialLR(muon, gamma=0.1)
    norm = schedule(optimizer, "clip_by_norm.max_norm", CosineAnnealingLR, T_max=2, eta_min=0.5)
    fit(model, optimizer, range(1))
    for scheduler in (every, one, norm):
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02 * 0.5 * 0.1, 3e-4 * 0.5])
    assert [group["clip_by_norm.max_norm"] for group in optimizer.param_groups] == pytest.approx([0.75, 0.75])
    with pytest.raises(ValueError, match="must support momentum or beta1"):  # which not all groups have under one key
        OneCycleLR(optimizer, max_lr=0.1, total_steps=4)


def test_hooks_and_zero_grad_are_of_all() -> None:
    params = make_params()
    optimizer = as_one(params, INNER["SGD"], pre=clip_by_norm(1.0))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, params, range(2))
    assert seen == ["before", "after"] * 2
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


def assert_equal_dicts(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_equal(dict(sorted(actual["state"].items())), expected["state"])
    assert actual["param_groups"] == expected["param_groups"]


def make_optimizer(model: nn.Module) -> ParamTransformingOptimizer:
    chains: Any = {"pre": chain(clip_by_global_norm(0.1), ema(0.9)), "post": param_ema(0.9)}
    return ParamTransformingOptimizer(model.named_parameters(), MUON_AND_ADAMW, **chains)


def go_on(model: nn.Module, optimizer: Any, expected: nn.Module) -> None:
    fit(model, optimizer, range(3, 6))
    assert_equal(list(model.parameters()), list(expected.parameters()))


@pytest.fixture
def stopped() -> tuple[nn.Module, ParamTransformingOptimizer, nn.Module]:
    """A model and its optimizer after three steps, and the model after six."""
    model, expected = make_model(), make_model()
    optimizer = make_optimizer(model)
    fit(model, optimizer, range(3))
    fit(expected, make_optimizer(expected), range(6))
    return model, optimizer, expected


def test_save_load_go_on(stopped: Any) -> None:
    model, optimizer, expected = stopped
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    other = make_optimizer(fresh)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_dicts(other.state_dict(), optimizer.state_dict())
    go_on(fresh, other, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies(stopped: Any, copied: Any) -> None:
    model, optimizer, expected = stopped
    other_model, other = copied((model, optimizer))
    go_on(other_model, other, expected)


def test_distributed_checkpoint(stopped: Any) -> None:
    model, optimizer, expected = stopped
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    fresh = make_model()
    other = make_optimizer(fresh)
    set_optimizer_state_dict(fresh, other, saved)
    fresh.load_state_dict(model.state_dict())
    go_on(fresh, other, expected)


def test_around_the_same_instances_again(stopped: Any) -> None:
    model, optimizer, expected = stopped
    inner, saved = optimizer.inner_opt.optimizers, copy.deepcopy(optimizer.state_dict())
    ParamTransformingOptimizer(InnerOpt=inner, pre=clip_by_norm(2.0))
    again = ParamTransformingOptimizer(InnerOpt=inner, pre=optimizer.pre, post=optimizer.post)
    assert "clip_by_norm.max_norm" not in again.param_groups[0]
    again.load_state_dict(saved)
    go_on(model, again, expected)


def test_chains_can_be_replaced(stopped: Any) -> None:
    model, optimizer, _ = stopped
    optimizer.pre = clip_by_global_norm(0.2)
    assert [group["clip_by_global_norm.max_norm"] for group in optimizer.param_groups] == [0.2, 0.2]
    fit(model, optimizer, range(1))


def test_explain_shows_all_and_changes_nothing(stopped: Any) -> None:
    model, optimizer, expected = stopped
    torch.manual_seed(3)
    model(torch.randn(8, 3)).square().sum().backward()
    before = copy.deepcopy(optimizer.state_dict())
    explanation = optimizer.explain()
    assert explanation["0.weight"].rows
    assert explanation["2.bias"].rows
    assert_equal_dicts(optimizer.state_dict(), before)
    go_on(model, optimizer, expected)


def test_step_in_backward() -> None:
    model, expected = make_model(), make_model()
    optimizers = [
        ParamTransformingOptimizer(each.named_parameters(), MUON_AND_ADAMW, pre=chain(clip_by_norm(0.1), ema(0.9)))
        for each in (model, expected)
    ]
    fit(expected, optimizers[1], range(3))
    with step_in_backward(optimizers[0]):
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(8, 3)).square().sum().backward()
    assert_equal(list(model.parameters()), list(expected.parameters()))
    assert_equal_dicts(optimizers[0].state_dict(), optimizers[1].state_dict())


def test_grad_scaler() -> None:
    model, expected = make_model(), make_model()
    optimizer, other = make_optimizer(model), make_optimizer(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 3)).square().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    fit(expected, other, range(3))
    assert_equal(list(model.parameters()), list(expected.parameters()))


def test_add_param_group_goes_to_the_optimizer_whose_key_chooses_it() -> None:
    optimizer = ParamTransformingOptimizer(named(), MUON_AND_ADAMW, pre=clip_by_norm(1.0))
    added = [("new.weight", nn.Parameter(torch.ones(2, 2))), ("new.bias", nn.Parameter(torch.ones(2)))]
    optimizer.add_param_group({"params": added, "clip_by_norm.max_norm": 3.0})
    muon, adamw = optimizer.inner_opt.optimizers  # type: ignore[attr-defined]
    assert [each.param_groups[1]["param_names"] for each in (muon, adamw)] == [["new.weight"], ["new.bias"]]
    assert [group["clip_by_norm.max_norm"] for group in optimizer.param_groups] == [1.0, 3.0, 1.0, 3.0]
    wrong = [("bad.weight", nn.Parameter(torch.ones(2, 2))), ("bad.bias", nn.Parameter(torch.ones(2)))]
    with pytest.raises(TypeError, match="group 1, parameter|max_norm must be"):
        optimizer.add_param_group({"params": wrong, "clip_by_norm.max_norm": "x"})
    assert len(optimizer.param_groups) == 4
    in_a_list = as_one(make_params(), INNER["SGD"])
    with pytest.raises(ValueError, match=r"which of several optimizers takes it; .*inner_opt.optimizers\[i\]"):
        in_a_list.add_param_group({"params": wrong})


# By name


def reordered(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted(model.named_parameters(), key=lambda pair: (pair[1].ndim, pair[0]), reverse=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: reordered(model),
        lambda model: [{"params": [pair]} for pair in reordered(model)],
        lambda model: [{"params": reordered(model)[:3]}, {"params": reordered(model)[3:]}],
    ],
)
@pytest.mark.parametrize("adapt", ["wrapped", "attached"])
def test_a_checkpoint_survives_another_order_and_other_groups(make: Any, adapt: str) -> None:
    def optimizer_of(params: Any) -> Any:
        inner = Adam(params, lr=0.01)
        chains: Any = {"pre": chain(clip_by_norm(0.1), ema(0.9)), "post": param_ema(0.9)}
        if adapt == "wrapped":
            return ParamTransformingOptimizer(InnerOpt=inner, **chains)
        attach(inner, **chains)
        return inner

    model, fresh, expected = make_model(), make_model(), make_model()
    optimizer, other = optimizer_of(model.named_parameters()), optimizer_of(make(fresh))
    optimizer.param_groups[0]["lr"] = 0.5
    fit(model, optimizer, range(3))
    whole = optimizer_of(expected.named_parameters())
    whole.param_groups[0]["lr"] = 0.5
    fit(expected, whole, range(6))
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.5] * len(other.param_groups)
    go_on(fresh, other, expected)


def test_a_group_of_parameters_with_different_values_keeps_its_own() -> None:
    model = make_model()
    groups = [{"params": [pair], "lr": rate} for pair, rate in zip(model.named_parameters(), (1, 2, 3, 4), strict=True)]
    saved = ParamTransformingOptimizer(groups, SGD, lr=0.1, momentum=0.5).state_dict()
    other = ParamTransformingOptimizer(model.named_parameters(), SGD, lr=0.1)
    with pytest.warns(UserWarning, match=r"group 0 has parameters .* different values of \['lr'\], and keeps its own"):
        other.load_state_dict(saved)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["momentum"]) == (0.1, 0.5)


def test_a_parameter_that_another_kind_of_optimizer_takes_starts_anew() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    fit(model, optimizer, range(2))
    inner: Any = {"0.weight": partial(Muon, lr=0.02), "*": partial(AdamW, lr=3e-4)}
    other = ParamTransformingOptimizer(model.named_parameters(), inner, pre=optimizer.pre, post=optimizer.post)
    with pytest.warns(UserWarning, match=r"another kind of optimizer has saved the parameters \['2.weight'\]"):
        other.load_state_dict(optimizer.state_dict())
    states = {name: other.state[param] for name, param in model.named_parameters()}
    assert states["0.weight"].keys() == {"momentum_buffer", "transforms"}
    assert states["0.bias"].keys() == {"step", "exp_avg", "exp_avg_sq", "transforms"}
    assert other.param_groups[1]["lr"] == 3e-4
    fit(model, other, range(2))
    assert states["0.bias"]["transforms"].keys() == optimizer.state[model[0].bias]["transforms"].keys()  # type: ignore[index]


def test_names_that_do_not_fit() -> None:
    model = make_model()
    saved = make_optimizer(model).state_dict()
    other = ParamTransformingOptimizer([*list(model.named_parameters())[:3], ("new", nn.Parameter(torch.ones(2)))], SGD)
    with pytest.raises(ValueError, match=r"it lacks \['new'\] and has other ones, \['2.bias'\]"):
        other.load_state_dict(saved)


def test_without_common_names_the_order_counts() -> None:
    model, fresh, expected = make_model(), make_model(), make_model()
    optimizer = make_optimizer(model)
    fit(model, optimizer, range(3))
    fit(expected, make_optimizer(expected), range(6))
    wrapper = nn.ModuleDict({"wrapper": fresh})
    fresh.load_state_dict(model.state_dict())
    other = make_optimizer(wrapper)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == ["wrapper.0.weight", "wrapper.2.weight"]
    go_on(fresh, other, expected)


def test_groups_of_another_size_do_not_load_without_names() -> None:
    saved = as_one(make_params(), INNER["SGD"]).state_dict()
    other = ParamTransformingOptimizer(InnerOpt=[SGD(make_params()[:2]), SGD(make_params()[2:])])
    with pytest.raises(ValueError, match=r"groups of \[2, 1\] parameters, got groups of \[1, 2\]; .*named_parameters"):
        other.load_state_dict(saved)


# Attached


def attached_to_two(**chains: Any) -> tuple[list[nn.Parameter], list[Optimizer]]:
    params = make_params()
    optimizers = in_two(params, INNER["SGD"])
    attach(optimizers, **chains)
    backward(params, 4)
    return params, optimizers


def test_attached_to_several_twice_and_removed() -> None:
    params, expected = make_params(), make_params()
    optimizers = in_two(params, INNER["Adam"])
    first = attach(optimizers, pre=clip_by_global_norm(0.5))
    second = attach(optimizers, post=project_l2_ball(1.0))
    assert first.optimizers == second.optimizers == optimizers
    assert repr(first).startswith("attach(\n  [Adam, Adam],\n")
    other = of_one(expected, INNER["Adam"], pre=clip_by_global_norm(0.5), post=project_l2_ball(1.0))
    for step in range(3):
        backward(params, step)
        for optimizer in reversed(optimizers):
            optimizer.step()
        backward(expected, step)
        other.step()
    assert_equal(params, expected)
    first.remove()
    second.remove()
    assert all("clip_by_global_norm.max_norm" not in group for each in optimizers for group in each.param_groups)
    assert not any("transforms" in state for each in optimizers for state in each.state.values())


def test_each_of_several_saves_and_loads_its_own() -> None:
    params, expected = make_params(), make_params()
    chains: Any = {"pre": chain(ema(0.9), clip_by_global_norm(0.5)), "post": param_ema(0.9)}
    whole, stopped = InTurn(expected, INNER["Adam"], **chains), InTurn(params, INNER["Adam"], **chains)
    train(whole, expected, range(8))
    train(stopped, params, range(5))
    fresh = [nn.Parameter(param.detach().clone()) for param in params]
    second = InTurn(fresh, INNER["Adam"], **chains)
    for optimizer, other in zip(second.optimizers, stopped.optimizers, strict=True):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(second, fresh, range(5, 8))
    assert_equal(fresh, expected)


@contextmanager
def message(text: str, error: type[Exception] = RuntimeError) -> Iterator[None]:
    with pytest.raises(error, match=text):
        yield


def test_a_step_out_of_turn() -> None:
    params, (first, second) = attached_to_two(pre=clip_by_global_norm(0.5))
    first.step()
    with message("SGD steps a second time, before SGD; .*let each step once.*GradScaler"):
        first.step()
    first.step()
    backward(params, 5)
    with message("the gradients of SGD have changed since SGD stepped; .*call backward"):
        second.step()
    second.step()
    with message("SGD got a closure, .*take ParamTransformingOptimizer", ValueError):
        first.step(lambda: 0.0)


def test_gradients_written_in_place_are_seen() -> None:
    params, (first, second) = attached_to_two(pre=clip_by_global_norm(0.5))
    first.step()
    for param in params[1:]:
        assert param.grad is not None
        param.grad.zero_()
    with message("the gradients of SGD have changed"):
        second.step()


def test_each_may_zero_its_gradients_in_its_turn() -> None:
    params, expected = make_params(), make_params()
    chains: Any = {"pre": chain(skip_nonfinite(), clip_by_global_norm(0.5)), "post": project_l2_ball(1.0)}
    optimizers = in_two(params, INNER["Adam"])
    attach(optimizers, **chains)
    other = of_one(expected, INNER["Adam"], **chains)
    for step in range(4):
        backward(params, step, float("inf") if step == 2 else 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert all(param.grad is None for param in params)
        backward(expected, step, float("inf") if step == 2 else 1.0)
        other.step()
    assert_equal(params, expected)


def test_attached_to_one_and_to_several() -> None:
    optimizers = in_two(make_params(), INNER["SGD"])
    attach(optimizers[0], pre=clip_by_norm(1.0))
    with message("what is attached already belongs to SGD, and cannot .* attached to SGD and SGD", ValueError):
        attach(optimizers, pre=clip_by_norm(1.0))
    with message("attach needs at least one optimizer", ValueError):
        attach([])
    with message("must not share", ValueError):
        attach([SGD([("w", optimizers[0].param_groups[0]["params"][0])]) for _ in range(2)])


def test_partition_serves_the_chains_as_the_mapping_serves_the_optimizers() -> None:
    model = make_model()
    own = partition({"*.weight": clip_by_norm(0.1), "*": clip_by_norm(1.0)})
    optimizer = ParamTransformingOptimizer(model.named_parameters(), MUON_AND_ADAMW, pre=own, param_ndim=None)
    for param in model.parameters():
        param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    norms = [param.grad.norm().item() for param in model.parameters() if param.grad is not None]
    assert norms == pytest.approx([0.1, 1.0, 0.1, 1.0])
