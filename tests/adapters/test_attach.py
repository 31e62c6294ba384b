"""``attach``: the numbers of ``ParamTransformingOptimizer``, from the inside of a step that belongs to others."""

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    accumulate,
    attach,
    broadcast,
    chain,
    clamp,
    clip_by_norm,
    ema,
    masked,
    normalize,
    param_ema,
    project_l2_ball,
    scale,
    schedule,
    sign,
    skip_large,
    skip_nonfinite,
    trace,
)
from tests.adapters.common import (
    EVERYWHERE,
    INNER,
    WITHOUT_CLOSURE,
    assert_equal,
    attached,
    backward,
    make_params,
    run,
    train,
    wrapped,
)

# The same numbers


@pytest.mark.parametrize("pass_closure", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
@pytest.mark.parametrize("InnerOpt", INNER.values(), ids=INNER)
def test_a_closure(InnerOpt: Any, pass_closure: Callable[..., Any]) -> None:
    found = []
    for adapt in (attached, wrapped):
        params = make_params()[:1]
        optimizer = adapt(InnerOpt(params), **EVERYWHERE)
        losses = [pass_closure(optimizer, lambda k=k, params=params: backward(params, k)) for k in range(4)]
        found.append((losses, params, optimizer.state_dict()["state"]))
    assert_equal(*found)


def test_group_keys_of_the_wrapper_act_here_too() -> None:
    x = nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [x], "grad_scale": 3.0}], lr=1.0)
    x.grad = torch.ones(1)
    attach(optimizer, pre=scale(2.0))
    optimizer.step()
    assert x.item() == -6.0


# Skipped steps


@pytest.mark.parametrize("InnerOpt", INNER.values(), ids=INNER)
@pytest.mark.parametrize("bad", [range(2), range(3, 4)])
def test_a_skipped_step_moves_nothing(InnerOpt: Any, bad: range) -> None:
    chains = {"pre": chain(ema(0.9), skip_nonfinite(5)), "update": scale(0.5), "post": param_ema(0.9)}
    for steps in range(bad.stop, 6):
        _, params, grads, state = run(attached, InnerOpt, chains, steps, bad)
        _, expected_params, expected_grads, expected_state = run(wrapped, InnerOpt, chains, steps, bad)
        expected = [expected_params, expected_grads, expected_state]
        assert_equal([params, grads, state], expected, equal_nan=True)


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_an_evaluation_in_the_middle_skips_the_step(line_search_fn: Any) -> None:
    params = make_params(torch.float64)[:1]
    optimizer = LBFGS(params, max_iter=8, line_search_fn=line_search_fn)
    handle = attach(optimizer, pre=skip_nonfinite(0), post=scale(0.5))
    calls = 0

    def closure(bad: int = -1) -> Tensor:
        nonlocal calls
        calls += 1
        return backward(params, calls, float("inf") if calls == bad else 1.0)

    optimizer.step(closure)
    assert calls > 4
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    calls = 0
    with pytest.raises(RuntimeError, match="pre: 1 steps in a row were skipped"):
        optimizer.step(partial(closure, 3))
    assert calls == 3
    assert_equal([p.detach() for p in params], before)
    now = optimizer.state_dict()["state"]
    counters = now[0].pop("transforms"), state[0].pop("transforms")
    assert [c["pre.skip_nonfinite.total"].item() for c in counters] == [1, 0]
    assert_equal(now, state)
    handle.remove()


def test_group_counters_do_not_advance_in_a_skipped_step() -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1

    x = nn.Parameter(torch.ones(2))
    optimizer = Counting([x])
    attach(optimizer, pre=skip_large(1.0, 5))
    for value in (0.1, 9.0, 0.1):
        x.grad = torch.full_like(x, value)
        optimizer.step()
        assert_equal(x.grad, torch.full_like(x, value))
    assert optimizer.param_groups[0]["count"] == 2


def test_too_many_skipped_steps() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = Adam([x])
    attach(optimizer, pre=skip_nonfinite(1))
    x.grad = torch.full_like(x, torch.nan)
    optimizer.step()
    with pytest.raises(RuntimeError, match="2 steps in a row were skipped"):
        optimizer.step()
    assert x.tolist() == [1.0, 1.0]
    assert x.grad is not None
    assert optimizer.state_dict()["state"][0].keys() == {"transforms"}


# Composition


@pytest.mark.parametrize("InnerOpt", INNER.values(), ids=INNER)
def test_twice_is_a_chain(InnerOpt: Any) -> None:
    second: dict[str, Any] = {"pre": trace(0.5).named("second"), "update": clamp(-0.1, 0.1).named("short")}
    second["post"] = chain(lambda t, group: 0.9 * t, project_l2_ball(1.5))

    def attach_both(inner: Optimizer) -> Optimizer:
        return attached(attached(inner, **EVERYWHERE), **second)

    both = {slot: chain(EVERYWHERE[slot], second[slot]) for slot in EVERYWHERE}
    assert_equal(run(attach_both, InnerOpt, {}), run(wrapped, InnerOpt, both))


def slots_of(states: dict[str, Tensor]) -> set[str]:
    return {key.partition(".")[0] for key in states}


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_states_stay_with_those_that_stay(removed: int) -> None:
    params, others = make_params(), make_params()
    optimizer, expected = Adam(params), Adam(others)
    parts: list[dict[str, Any]] = [
        {"pre": chain(sign(), ema(0.9)), "post": param_ema(0.9)},
        {"pre": trace(0.5), "update": ema(0.8).named("late")},
        {"pre": chain(accumulate(2), ema(0.5).named("third")), "post": project_l2_ball(1.0)},
    ]
    handles = [attach(optimizer, **part) for part in parts]
    train(optimizer, params, range(5))
    states = optimizer.state_dict()["state"]
    count = copy.deepcopy(states[0]["transforms"])
    handles[removed].remove()
    for part in parts[:removed] + parts[removed + 1 :]:
        attach(expected, **part)
    keys = [["ema"], ["trace"], ["accumulate", "ema_2"]]
    kept = tuple(f"pre.{key}." for part, names in enumerate(keys) if part != removed for key in names)
    new = optimizer.state_dict()["state"][0]["transforms"]
    assert_equal(
        [value for key, value in new.items() if key.startswith("pre.")],
        [value for key, value in count.items() if key.startswith(kept)],
    )
    assert ("update" in slots_of(new), "post" in slots_of(new)) == (removed != 1, removed != 0)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(params, others, strict=True):
        theirs.data.copy_(ours.data)
    train(optimizer, params, range(5, 8))
    train(expected, others, range(5, 8))
    assert_equal([params, optimizer.state_dict()], [others, expected.state_dict()])


# found: 27
def test_what_is_attached_later_goes_on_counting_and_keeps_its_keys() -> None:
    x = nn.Parameter(torch.zeros(1))
    optimizer = SGD([x], lr=1.0)
    group = optimizer.param_groups[0]

    def factors() -> dict[str, float]:
        return {key: value for key, value in group.items() if key.endswith(".factor")}

    first = attach(optimizer, post=scale(2.0))
    second = attach(optimizer, pre=chain(scale(3.0), masked(scale(4.0), is_any)))
    assert factors() == {"scale.factor": 2.0, "scale_2.factor": 3.0, "scale_3.factor": 4.0}
    group["scale_2.factor"] = 5.0
    first.remove()
    assert factors() == {"scale_2.factor": 5.0, "scale_3.factor": 4.0}
    x.grad = torch.ones(1)
    optimizer.step()
    assert x.item() == -20.0
    third = attach(optimizer, pre=chain(scale(1.0), scale(1.0)))
    assert factors() == {"scale.factor": 1.0, "scale_2.factor": 5.0, "scale_3.factor": 4.0, "scale_4.factor": 1.0}
    saved = copy.deepcopy(optimizer.state_dict())
    group["scale_2.factor"] = 0.0
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert factors()["scale_2.factor"] == 5.0
    second.remove()
    third.remove()
    assert factors() == {}


def is_any(group: Group) -> bool:
    return True


def test_one_attached_in_the_middle_starts_there() -> None:
    x = nn.Parameter(torch.tensor([8.0]))
    optimizer = SGD([x], lr=1.0)
    attach(optimizer, post=param_ema(0.5, debias=False))
    x.grad = torch.tensor([2.0])
    optimizer.step()
    handle = attach(optimizer, pre=ema(0.5, debias=False), post=param_ema(0.5, debias=False))
    with torch.no_grad():
        x.fill_(4.0)  # such as a model that is loaded
    optimizer.step()
    states = optimizer.state[x]["transforms"]
    assert [states[f"post.{key}.average"].item() for key in ("param_ema", "param_ema_2")] == [5.0, 3.5]
    with pytest.raises(ValueError, match="post keeps two averages"), handle.averaged():
        pass


# Groups, and what remove leaves


def look(optimizer: Optimizer) -> Any:
    hooks = [len(v) for k, v in vars(optimizer).items() if k.startswith("_optimizer_")]
    apart = ("_optimizer_", "_need_device", "param_groups", "state", "defaults")
    attributes = {k: v for k, v in vars(optimizer).items() if not k.startswith(apart)}
    return copy.deepcopy((optimizer.param_groups, optimizer.defaults)), hooks, attributes


@pytest.mark.parametrize("InnerOpt", WITHOUT_CLOSURE)
def test_remove_restores_the_optimizer(InnerOpt: Any) -> None:
    params, others = make_params(), make_params()
    optimizer, bare = InnerOpt(params), InnerOpt(others)
    optimizer.param_groups[0]["clamp.max"] = bare.param_groups[0]["clamp.max"] = 0.5
    with attach(optimizer, pre=trace(0.5), defaults={"epsilon": 1.0}), attach(optimizer, **EVERYWHERE) as handle:
        train(optimizer, params, range(3))
        assert optimizer.param_groups[0]["epsilon"] == 1.0
        handle.remove()
        handle.remove()
        assert "ema.decay" not in optimizer.param_groups[0]
        assert optimizer.param_groups[0]["trace.decay"] == 0.5
    for ours, theirs in zip(params, others, strict=True):
        theirs.data.copy_(ours.data)
    assert str(look(optimizer)) == str(look(bare)).replace(str(others), str(params))
    assert not any("transforms" in state for state in optimizer.state.values())
    assert all(optimizer.state.values())
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(3, 6))
    train(bare, others, range(3, 6))
    assert_equal(params, others)


def test_remove_of_one_that_never_made_a_step() -> None:
    optimizer = AdamW(make_params(), fused=True)
    before = look(optimizer)
    attach(optimizer, **EVERYWHERE).remove()
    assert str(look(optimizer)) == str(before)


def test_groups_and_their_hyperparameters() -> None:
    xs = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups: list[dict[str, Any]] = [{"params": xs[:1]}, {"params": xs[1:2], "scale.factor": 5.0}]
    optimizer = SGD(groups, lr=1.0)
    handle = attach(optimizer, pre=scale(2.0))
    optimizer.add_param_group({"params": xs[2:]})
    optimizer.param_groups[0]["scale.factor"] = 3.0
    for x in xs:
        x.grad = torch.ones(1)
    optimizer.step()
    assert [x.item() for x in xs] == [-3.0, -5.0, -2.0]
    handle.remove()
    assert [group.get("scale.factor") for group in optimizer.param_groups] == [None, 5.0, None]


def test_schedulers() -> None:
    x = nn.Parameter(torch.zeros(1))
    optimizer = SGD([x], lr=1.0)
    before = StepLR(optimizer, 1, gamma=0.5)  # which patches step
    attach(optimizer, pre=scale(8.0))
    after = schedule(optimizer, "scale.factor", ExponentialLR, gamma=0.5)
    for _ in range(2):
        x.grad = torch.ones(1)
        optimizer.step()
        before.step()
        after.step()
    assert x.item() == -(8.0 + 0.5 * 4.0)
    assert optimizer.param_groups[0]["scale.factor"] == 2.0


def test_it_prints_as_the_call() -> None:
    optimizer = SGD(make_params())
    handle = attach(optimizer, pre=clip_by_norm(1.0), post=chain(clamp(max=1), sign()))
    stages = {"pre": ["clip_by_norm(max_norm=1.0)"], "post": ["clamp(max=1)", "sign()"]}
    lines = [line.partition("  #")[0] for line in repr(handle).splitlines()]
    slots = [
        line for slot, each in stages.items() for line in (f"  {slot}=chain(", *(f"    {s}," for s in each), "  ),")
    ]
    assert lines == ["attach(", "  SGD,", *slots, ")"]
    assert (handle.optimizers, handle.pre, handle.update) == ([optimizer], chain(clip_by_norm(1.0)), chain())
    assert handle.defaults == {"param_ndim": -1, "clip_by_norm.max_norm": 1.0, "clamp.min": None, "clamp.max": 1}
    handle.remove()
    assert repr(handle) == "attach(SGD, pre=chain(clip_by_norm(max_norm=1.0)), post=chain(clamp(max=1), sign()))"


# Checkpoints and copies


def test_a_bare_checkpoint_gets_the_defaults() -> None:
    x = nn.Parameter(torch.ones(1))
    optimizer = SGD([x], lr=0.1)
    attach(optimizer, pre=clip_by_norm(2.0))
    optimizer.load_state_dict(SGD([x], lr=0.5).state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["clip_by_norm.max_norm"]) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["param_groups"][0].update({"ema.decay": 3.0}), "pre, group 0: stage 0, ema.*must be <"),
        (lambda saved: saved["state"][0]["transforms"].pop("pre.ema.average"), "loaded state is not one of chain"),
        (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "different number of parameter groups"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    params = make_params()
    optimizer = Adam(params)
    attach(optimizer, **EVERYWHERE)
    train(optimizer, params, range(3))
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_equal(optimizer.state_dict(), before)


def test_hooks_of_others_on_state_dicts() -> None:
    params = make_params()
    optimizer = Adam(params)
    optimizer.register_load_state_dict_pre_hook(lambda o, state_dict: {k: v for k, v in state_dict.items() if k != "x"})
    attach(optimizer, **EVERYWHERE)
    optimizer.register_state_dict_post_hook(lambda o, state_dict: {**state_dict, "x": 1})
    train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    assert saved["x"] == 1
    assert slots_of(saved["state"][0]["transforms"]) == {"pre", "update", "post"}
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_have_no_transforms_until_they_are_attached(copied: Callable[[Any], Any]) -> None:
    params = make_params()
    optimizer = Adam(params)
    attach(optimizer, **EVERYWHERE)
    train(optimizer, params, range(3))
    others, other = copied((params, optimizer))
    handle = attach(other, **EVERYWHERE)
    assert all("transforms" not in state for state in other.state.values())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(3, 6))
    train(other, others, range(3, 6))
    assert_equal([others, other.state_dict()], [params, optimizer.state_dict()])
    handle.remove()
    assert other.param_groups[0].keys() == Adam(make_params()).param_groups[0].keys()
    assert optimizer.param_groups[0]["ema.decay"] == 0.9


def test_a_state_that_others_reset() -> None:
    x = nn.Parameter(torch.ones(1))
    optimizer = Adam([x])
    attach(optimizer, pre=ema(0.9, debias=False))
    for _ in range(3):
        x.grad = torch.ones(1)
        optimizer.step()
    optimizer.state.clear()
    x.grad = torch.ones(1)
    optimizer.step()
    assert x.grad.item() == pytest.approx(0.1)


# Gradient scaling


@pytest.mark.parametrize("unscale", [False, True])
def test_a_fused_optimizer_leaves_unscaling_to_the_scaler(unscale: bool) -> None:
    x = nn.Parameter(torch.zeros(1))
    seen: list[float] = []

    def spy(tensor: Tensor, group: Group) -> Tensor:
        seen.append(tensor.item())
        return tensor

    optimizer: Any = Adam([x], fused=True)
    handle = attach(optimizer, pre=spy, post=scale(0.5), param_ndim=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (3.0, float("inf"), 2.0):
        before = x.item()
        optimizer.zero_grad()
        scaler.scale(factor * x.sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert (x.item() == before) == (factor == float("inf"))
    assert seen == [3.0, 2.0]
    assert optimizer._step_supports_amp_scaling is False
    handle.remove()
    assert vars(optimizer)["_step_supports_amp_scaling"] is True


def test_a_class_that_unscales() -> None:
    class Unscaling(SGD):
        _step_supports_amp_scaling = True

    optimizer = Unscaling(make_params())
    with attach(optimizer, pre=sign()):
        assert not optimizer._step_supports_amp_scaling
    assert optimizer._step_supports_amp_scaling
    assert "_step_supports_amp_scaling" not in vars(optimizer)


def test_gradients_that_are_still_scaled() -> None:
    params = make_params()
    optimizer: Any = Adam(params, fused=True)
    attach(optimizer, pre=sign())
    backward(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match=r"gradients are still scaled, .*scaler.unscale_\(optimizer\)"):
        optimizer.step()
    assert_equal([p.detach() for p in params], before)


# Steps that fail, and steps within steps


def fail() -> Tensor:
    raise ArithmeticError("no")


def test_a_closure_that_fails_on_the_way_moves_nothing() -> None:
    params = make_params()[:1]
    before = params[0].detach().clone()
    optimizer = LBFGS(params)
    attach(optimizer, pre=clip_by_norm(1.0))
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return backward(params, calls) if calls < 4 else fail()

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert_equal(params[0].detach(), before)


def test_an_optimizer_that_fails_does_not_spoil_the_next_step() -> None:
    class Failing(SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise ArithmeticError("no")
            return super().step(closure)

    params, others = make_params(), make_params()
    optimizer, expected = Failing(params, lr=0.1), SGD(others, lr=0.1)
    attach(optimizer, pre=clip_by_norm(0.5), post=project_l2_ball(1.0))
    attach(expected, pre=clip_by_norm(0.5), post=project_l2_ball(1.0))
    backward(params, 0)
    with pytest.raises(ArithmeticError) as caught:  # whose traceback keeps the frames
        optimizer.step()
    optimizer.fails = False
    train(optimizer, params, range(3))
    train(expected, others, range(3))
    assert_equal(params, others)
    assert caught.traceback


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_a_hooked_step(with_closure: bool) -> None:
    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return super().step()

    SGD(make_params())  # hooks the step of the base class
    chains: dict[str, Any] = {"pre": chain(scale(0.5), trace(0.9)), "update": scale(0.5), "post": param_ema(0.5)}
    found = []
    for adapt in (attached, wrapped):
        params = make_params()
        optimizer: Any = adapt(Twice(params, lr=0.1), **chains)
        for k in range(3):
            closure = partial(backward, params, k)
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append((params, optimizer.state_dict()["state"]))
    assert_equal(*found)


def test_hooks_of_others_around_it() -> None:
    x = nn.Parameter(torch.ones(1))
    optimizer = SGD([x], lr=1.0)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", x.grad.item())))  # type: ignore[union-attr]
    attach(optimizer, pre=scale(2.0), post=scale(0.5).named("half"))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("between", x.grad.item())))  # type: ignore[union-attr]
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", x.item())))
    x.grad = torch.ones(1)
    optimizer.step()
    assert seen == [("before", 1.0), ("between", 2.0), ("after", -0.5)]


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_a_compiled_step() -> None:
    def compiled(inner: Any, **chains: Any) -> Any:
        optimizer: Any = attached(inner, **chains)
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer

    torch.compiler.reset()
    assert_equal(run(compiled, INNER["SGD"], EVERYWHERE), run(attached, INNER["SGD"], EVERYWHERE))


def test_averages() -> None:
    x = nn.Parameter(torch.tensor([4.0]))
    optimizer = SGD([x], lr=1.0)
    handle = attach(optimizer, post=param_ema(0.5, debias=False))
    x.grad = torch.tensor([2.0])
    optimizer.step()
    with handle.averaged():
        assert x.item() == 3.0
    assert x.item() == 2.0


# Errors at the start


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pre": 3}, TypeError, "pre must be a callable .tensor, group. -> tensor, got 3"),
        ({"post": sign}, TypeError, "post is the factory sign, not a transform; call it"),
        (
            {"param_ndim": 2, "pre": normalize()},
            ValueError,
            "pre: stage 0, normalize.*: group 0, parameter 1 of shape .4,., torch.float32: param_ndim=2 needs",
        ),
        ({"param_ndim": 1.0}, TypeError, "group 0: param_ndim must be an int or None, got 1.0"),
        (
            {"defaults": {"lr": 0.1}},
            ValueError,
            r"defaults has the keys \['lr'\] of SGD; give them to the opt",
        ),
        ({"defaults": {"clamp.max": -2}, "post": clamp(-1, 1)}, ValueError, "post, group 0: stage 0, clamp"),
        (
            {"pre": clamp(-1, 1).named("a"), "post": clamp(0, 1).named("a")},
            ValueError,
            r'"a.min" has two defaults: -1 \(pre stage 0, clamp.*\) and 0 \(post stage 0, clamp.*\.named\(',
        ),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = SGD(make_params())
    before = look(optimizer)
    with pytest.raises(error, match=message):
        attach(optimizer, **arguments)
    assert str(look(optimizer)) == str(before)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"pre": clip_by_norm(2.0).named("clip_by_norm")},
            r'"clip_by_norm.max_norm" has two defaults: 1.0 .* and 2.0 .*\.named\(',
        ),
        (
            {"post": clip_by_norm(2.0).named("clip_by_norm")},
            r'"clip_by_norm.max_norm" has two defaults: 1.0 .* and 2.0 .*\.named\(',
        ),
        ({"param_ndim": None}, r'"param_ndim" is -1 by what is attached already, .* be None too; .*broadcast\(t, n\)'),
        ({"defaults": {"epsilon": 2.0}}, '"epsilon" is 1.0 by what is attached already, and cannot be 2.0'),
    ],
)
def test_a_second_that_does_not_fit_changes_nothing(second: dict[str, Any], message: str) -> None:
    optimizer = SGD(make_params())
    attach(optimizer, pre=clip_by_norm(1.0), defaults={"epsilon": 1.0})
    before = look(optimizer)
    with pytest.raises(ValueError, match=message):
        attach(optimizer, **second)
    assert str(look(optimizer)) == str(before)
    attach(optimizer, pre=broadcast(clip_by_norm(1.0), None), defaults={"epsilon": 1.0})


def test_optimizers_that_have_chains() -> None:
    wrapper = ParamTransformingOptimizer(make_params(), pre=sign())
    with pytest.raises(TypeError, match=r"ParamTransformingOptimizer has chains already; .*one chain\(\.\.\.\)"):
        attach(wrapper, pre=sign())
    with pytest.raises(TypeError, match="SGD is inside of a ParamTransformingOptimizer"):
        attach(wrapper.inner_opt, pre=sign())
    optimizer = SGD(make_params())
    handle = attach(optimizer, pre=sign())
    with pytest.raises(TypeError, match=r"InnerOpt, SGD, has attached transforms; call remove\(\)"):
        ParamTransformingOptimizer(InnerOpt=optimizer)
    handle.remove()
    ParamTransformingOptimizer(InnerOpt=optimizer)


def test_what_is_no_optimizer_or_only_looks_like_one() -> None:
    class Around(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    with pytest.raises(TypeError, match=r"attach needs a torch.optim.Optimizer, got Linear; give the optimizer of"):
        attach(nn.Linear(2, 2), pre=sign())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Around has no step hooks, .*attach to that, its .optimizer"):
        attach(Around(SGD(make_params())), pre=sign())


# found: 43
def test_chains_of_what_is_attached_cannot_be_replaced() -> None:
    handle: Any = attach(SGD(make_params()), pre=sign())
    with pytest.raises(AttributeError):
        handle.pre = chain()
    assert handle.pre == chain(sign())


# Optimizers that save and load by code of their own


class SlowWeights(Optimizer):
    """An optimizer around another, without ``Optimizer.__init__``, like the lookahead of timm."""

    def __init__(self, base: Optimizer) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> Any:
        loss = self._base.step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                slow = self._base.state[param].setdefault("slow", param.detach().clone())
                slow.lerp_(param.detach(), 0.5)
                param.data.copy_(slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self._base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base.load_state_dict(state_dict)
        self.param_groups = self._base.param_groups


class ReadsAllAgain(SGD):
    """One that looks up all of the state dict once more when it has loaded it, like those of pytorch-optimizer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for param, (key, saved) in zip(self.param_groups[0]["params"], state_dict["state"].items(), strict=False):
            assert key in range(2)
            self.state[param] = {name: self.state[param][name] for name in saved}


# found: 40
@pytest.mark.parametrize(
    "make", [lambda params: SlowWeights(Adam(params, lr=0.1)), lambda ps: ReadsAllAgain(ps, lr=0.1)]
)
def test_optimizers_that_save_and_load_by_code_of_their_own(make: Any) -> None:
    params, copies, plain = make_params(), make_params(), make_params()
    bare = make(plain)
    train(bare, plain, range(4))
    optimizer: Any = make(params)
    handle = attach(optimizer, **EVERYWHERE)
    train(optimizer, params, range(4))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(params, plain, strict=True))
    saved = copy.deepcopy(optimizer.state_dict())
    assert slots_of(saved["state"][0]["transforms"]) == {"pre", "update", "post"}
    for ours, theirs in zip(params, copies, strict=True):
        theirs.data.copy_(ours.data)
    resumed = make(copies)
    attach(resumed, **EVERYWHERE)
    resumed.load_state_dict(saved)
    train(optimizer, params, range(4, 8))
    train(resumed, copies, range(4, 8))
    assert_equal([copies, resumed.state_dict()], [params, optimizer.state_dict()])
    handle.remove()
    assert not {"state_dict", "load_state_dict"} & optimizer.__dict__.keys()
    assert "transforms" not in optimizer.state_dict()["state"].get(0, {})
    optimizer.load_state_dict(bare.state_dict())


# found: 40
def test_an_optimizer_whose_step_a_scheduler_has_wrapped_without_hooks() -> None:
    class Unhooked(SlowWeights):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    optimizer = Unhooked(SGD(make_params(), lr=0.1))
    StepLR(optimizer, 1)
    with pytest.raises(RuntimeError, match=r"Unhooked.step calls no hooks since a scheduler has wrapped it; attach"):
        attach(optimizer, pre=sign())
