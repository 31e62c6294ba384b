"""``step_in_backward``: the numbers of ``step``, with one gradient at a time."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    Transform,
    add_noise,
    broadcast,
    cautious,
    chain,
    clip_by_global_norm,
    clip_by_history,
    clip_by_norm,
    clip_by_zscore,
    decay_weights,
    ema,
    keep_top_q,
    masked,
    param_ema,
    partition,
    project_l2_ball,
    scale,
    schedule,
    sign,
    skip_large,
    skip_nonfinite,
    trust_ratio,
    with_error_feedback,
)
from gradchain.adapters.in_backward import step_in_backward
from tests.adapters.common import average

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


ADAM = partial(Adam, lr=0.1)


def make(model: nn.Module, InnerOpt: Any = ADAM, **chains: Any) -> ParamTransformingOptimizer:
    """Two groups, whose hyperparameters differ."""
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [{"params": named[:2], "lr": 0.02, "param_ndim": None, "grad_scale": 2.0}]
    return ParamTransformingOptimizer([*groups, {"params": named[2:]}], InnerOpt, **chains)


def everywhere() -> dict[str, Transform]:
    return {
        "pre": chain(clip_by_norm(1.0), masked(scale(0.5), "*bias"), add_noise(0.01), with_error_feedback(sign())),
        "update": chain(cautious(), ema(0.9), lambda tensor, group: tensor / (1 + group["index"])),
        "post": chain(project_l2_ball(2.0), param_ema(0.9)),
    }


def train(model: nn.Module, steps: range, finish: Callable[[], None] = lambda: None) -> None:
    for step in steps:
        model(X + step).square().sum().backward()
        finish()


def train_plainly(model: nn.Module, optim: ParamTransformingOptimizer, steps: range) -> None:
    def finish() -> None:
        optim.step()
        optim.zero_grad()

    train(model, steps, finish)


def assert_same(models: list[nn.Module], optims: list[ParamTransformingOptimizer]) -> None:
    assert_close(*(list(model.parameters()) for model in models), rtol=0, atol=0)
    assert_close(*(optim.state_dict()["state"] for optim in optims), rtol=0, atol=0)


# The same numbers


@pytest.mark.parametrize("InnerOpt", [partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1), partial(Adam, lr=0.1)])
@pytest.mark.parametrize(
    "chains",
    [
        {},
        {"pre": keep_top_q(0.5)},
        {"update": trust_ratio(), "post": partition({"*bias": chain(), "*": project_l2_ball(1.0)})},
        everywhere(),
        {"pre": chain(average(), lambda tensor, group: tensor.sign()), "post": average()},
    ],
)
def test_equals_a_step(InnerOpt: Any, chains: Any) -> None:
    models = [make_model(), make_model()]
    optims = [make(model, InnerOpt, **chains) for model in models]
    train_plainly(models[0], optims[0], range(4))
    with step_in_backward(optims[1]):
        train(models[1], range(4))
    assert_same([*models], optims)
    if "post" in chains and chains["post"] == everywhere()["post"]:
        with optims[0].averaged(), optims[1].averaged():
            assert_same([*models], optims)


@pytest.mark.parametrize(
    "InnerOpt",
    # SparseAdam takes sparse gradients only.
    [
        each
        for each in vars(torch.optim).values()
        if isinstance(each, type) and each not in (Optimizer, LBFGS, SparseAdam)
    ],
)
def test_every_optimizer_of_torch(InnerOpt: Any) -> None:
    models = [nn.Linear(3, 2, bias=False) for _ in range(2)]  # Muon takes matrices only
    models[1].load_state_dict(models[0].state_dict())
    optims = [ParamTransformingOptimizer(model.parameters(), InnerOpt, pre=ema(0.5), lr=0.1) for model in models]
    train_plainly(models[0], optims[0], range(3))
    with step_in_backward(optims[1]):
        train(models[1], range(3))
    assert_same([*models], optims)


def test_checkpoints_are_interchangeable() -> None:
    models = [make_model() for _ in range(3)]
    optims = [make(model, **everywhere()) for model in models]
    train_plainly(models[0], optims[0], range(4))
    with step_in_backward(optims[1]):
        train(models[1], range(2))
    with step_in_backward(optims[2]):
        train(models[2], range(1))  # what it has made is replaced
        models[2].load_state_dict(models[1].state_dict())
        optims[2].load_state_dict(copy.deepcopy(optims[1].state_dict()))
        train(models[2], range(2, 4))
    assert_same([models[0], models[2]], [optims[0], optims[2]])
    models[2].load_state_dict(models[1].state_dict())
    optims[2].load_state_dict(optims[1].state_dict())
    train_plainly(models[2], optims[2], range(2, 4))
    assert_same([models[0], models[2]], [optims[0], optims[2]])


def test_schedulers() -> None:
    def warm_up(step: int) -> float:
        return step / 4  # from zero

    models = [make_model(), make_model()]
    optims = [make(model, **everywhere()) for model in models]
    schedulers = [
        [LambdaLR(o, warm_up), schedule(o, "clip_by_norm.max_norm", LambdaLR, lr_lambda=lambda step: 1 / (1 + step))]
        for o in optims
    ]

    def finish(number: int) -> None:
        if number == 0:
            optims[0].step()
            optims[0].zero_grad()
        for scheduler in schedulers[number]:
            scheduler.step()

    with step_in_backward(optims[1]):
        for number, model in enumerate(models):
            train(model, range(5), partial(finish, number))
    assert_same([*models], optims)


# found: 42
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_step_with_neither_lr_nor_gradient_moves_nothing(lr: Any) -> None:
    x = nn.Parameter(torch.full((2,), 3.0))
    optim = ParamTransformingOptimizer([x], pre=add_noise(1.0), post=chain(average(), project_l2_ball(1.0)), lr=lr)
    with step_in_backward(optim):
        x.mul(0).sum().backward()
        assert x.tolist() == [3.0, 3.0]
        assert optim.state_dict()["state"][0]["transforms"]["post.average.count"] == 0
        x.sum().backward()
    assert x.norm() < 1.001


# found: 42
def test_groups_that_are_removed_or_put_first() -> None:
    def change(optim: ParamTransformingOptimizer, step: int) -> None:
        if step == 1:
            kept.append(optim.param_groups.pop(0))
        elif step == 2:
            optim.param_groups.append(kept.pop())
        elif step == 3:
            optim.param_groups.reverse()
            kept.append(optim.param_groups[0]["params"].pop(0))
            del optim.state[kept[0]]

    models = [make_model(), make_model()]
    optims = [make(model, pre=add_noise(0.1), post=param_ema(0.9)) for model in models]
    kept: list[Any] = []
    for step in range(4):
        change(optims[0], step)
        optims[0].zero_grad()
        train_plainly(models[0], optims[0], range(step, step + 1))
    kept.clear()
    with step_in_backward(optims[1]):
        for step in range(4):
            change(optims[1], step)
            models[1].zero_grad()
            train(models[1], range(step, step + 1))
            if step in (1, 3):
                for param in models[1].parameters():
                    removed = kept[0]["params"] if step == 1 else kept
                    assert (param.grad is not None) == any(param is each for each in removed)
    assert_same([*models], optims)


def test_tied_parameters_make_one_step() -> None:
    models = [nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model[2].weight = model[0].weight
    optims = [make(model, pre=chain(ema(0.5), clip_by_norm(0.1))) for model in models]
    train_plainly(models[0], optims[0], range(3))
    with step_in_backward(optims[1]):
        train(models[1], range(3))
    assert_same([*models], optims)


def test_hooks_of_subclasses() -> None:
    class Halving(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
            assert param.grad is not None
            param.grad.mul_(0.5)

        def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
            param.clamp_(-0.4, 0.4)

    models = [make_model(), make_model()]
    optims = [Halving(model.parameters(), pre=sign(), lr=0.1) for model in models]
    train_plainly(models[0], optims[0], range(3))
    with step_in_backward(optims[1]):
        train(models[1], range(3))
    assert_same([*models], [*optims])


def test_inner_optimizer_with_counters_of_its_own() -> None:
    class Counting(SGD):
        calls = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.calls += 1
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.data.sub_(param.grad / self.calls)

    models = [make_model(), make_model()]
    optims = [ParamTransformingOptimizer(model.parameters(), Counting, pre=sign()) for model in models]
    train_plainly(models[0], optims[0], range(3))
    with step_in_backward(optims[1]):
        train(models[1], range(3))
    assert_same([*models], optims)


# One gradient at a time


def test_at_most_one_gradient_lives() -> None:
    model, most = make_model(), 0
    alive: set[int] = set()

    def watch(param: Tensor) -> None:
        nonlocal most
        assert param.grad is not None
        grad = param.grad.untyped_storage()
        alive.add(id(param))
        weakref.finalize(grad, alive.discard, id(param))
        most = max(most, len(alive), sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(watch)
    optim = make(model, **everywhere())
    with step_in_backward(optim):
        train(model, range(3))
    gc.collect()
    assert most == 1
    assert not alive
    assert all(param.grad is None for param in model.parameters())
    train(model, range(1))
    assert most == 6


def test_removal() -> None:
    model = make_model()
    handle = step_in_backward(make(model))
    handle.remove()
    handle.remove()
    before = copy.deepcopy(model.state_dict())
    train(model, range(1))
    assert_close(model.state_dict(), before)
    assert all(param.grad is not None for param in model.parameters())


def test_calling_it_again_replaces_what_it_did() -> None:
    models = [make_model(), make_model()]
    optims = [make(model, post=scale(0.9)) for model in models]
    earlier = step_in_backward(make(models[1], post=scale(0.5)))
    with step_in_backward(optims[1]):
        earlier.remove()
        train(models[1], range(2))
    train_plainly(models[0], optims[0], range(2))
    assert_same([*models], optims)


def test_frozen_parameters_are_left_out() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    with step_in_backward(make(model, post=scale(0.0))):
        train(model, range(1))
    assert [bool(param.any()) for param in model.parameters()] == [True, True, False, False, False, False]


# Errors


@pytest.mark.parametrize("slot", ["pre", "update", "post"])
@pytest.mark.parametrize(
    ("member", "where"),
    [
        (clip_by_global_norm(1.0), r"stage 1, clip_by_global_norm\(max_norm=1.0\)"),
        (clip_by_history(50.0), r"stage 1, clip_by_history\(percentile=50.0\)"),
        (clip_by_zscore(2.0), r"stage 1, clip_by_zscore\(threshold=2.0\)"),
        (skip_nonfinite(), r"stage 1, skip_nonfinite\(\)"),
        (skip_large(1.0), r"stage 1, skip_large\(max_norm=1.0\)"),
        (broadcast(skip_nonfinite(), None), r"stage 1, broadcast\(skip_nonfinite\(\), param_ndim=None\)"),
        (masked(chain(sign(), skip_nonfinite()), "*"), r"stage 2, masked\(skip_nonfinite.*: stage 0, skip_nonfinite"),
        (partition({"*": clip_by_global_norm(1.0)}), r"stage 1, partition.*: stage 0, clip_by_global_norm"),
        (with_error_feedback(clip_by_global_norm(1.0)), r"stage 1, with_error_feedback.*: clip_by_global_norm"),
    ],
)
def test_a_view_over_all_tensors_is_refused(slot: str, member: Transform, where: str) -> None:
    model = make_model()
    optim = make(model, **{slot: chain(sign(), member)})
    message = f"^{slot}: {where}.*: it measures all tensors, of which a backward pass has one at a time; take one that"
    with pytest.raises(ValueError, match=message):
        step_in_backward(optim)
    train(model, range(1))
    assert all(param.grad is not None for param in model.parameters())


def test_other_refusals() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="needs a ParamTransformingOptimizer, got SGD; wrap it"):
        step_in_backward(SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LBFGS evaluates a closure, .* call optimizer.step\(closure\)"):
        step_in_backward(ParamTransformingOptimizer(model.parameters(), LBFGS))


def test_a_view_over_all_tensors_that_comes_later_is_refused() -> None:
    model = make_model()
    optim = make(model)
    with step_in_backward(optim):
        train(model, range(1))
        optim.pre = chain(clip_by_global_norm(1.0))
        for _ in range(2):
            with pytest.raises(ValueError, match="it measures all tensors"):
                train(model, range(1))


def test_inner_optimizer_that_writes_to_its_group() -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    model = make_model()
    groups = [{"params": list(model.named_parameters()), "k": 0}]
    optim = ParamTransformingOptimizer(groups, Counting, pre=decay_weights(0.1))
    message = r"group 0, parameter \d '4\..*: Counting wrote \['k'\] to its param group, for all parameters together"
    with step_in_backward(optim), pytest.raises(ValueError, match=message):
        train(model, range(1))


@pytest.mark.parametrize("slot", ["pre", "update", "post"])
def test_failed_transform_is_located_and_its_parameter_is_as_before(slot: str) -> None:
    def fail_in_the_middle(tensor: Tensor, group: Group) -> Tensor:
        if fails and group["index"] == 3:
            raise ArithmeticError("no")
        return tensor

    model = make_model()
    chains: dict[str, Any] = {"pre": ema(0.5), slot: chain(ema(0.5), broadcast(fail_in_the_middle, None))}
    optim = make(model, **chains)
    fails = False
    with step_in_backward(optim):
        train(model, range(2))
        params, state = copy.deepcopy(list(model.parameters())), copy.deepcopy(optim.state_dict()["state"])
        fails = True
        where = rf"^{slot}, group 1, parameter 1 '2.bias' of shape \(4,\), torch.float32: stage 1, .*: no$"
        with pytest.raises(ArithmeticError, match=where):
            train(model, range(1))
    moved = [not torch.equal(p, before) for p, before in zip(model.parameters(), params, strict=True)]
    assert moved[3:] == [False, True, True]
    assert not any(moved[:2])
    assert_close(optim.state_dict()["state"][3]["transforms"], state[3]["transforms"], rtol=0, atol=0)
    assert all(param.grad is None for param in model.parameters())
