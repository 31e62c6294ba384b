"""States that are one for all parameters, that do not fit, or that others reset."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    State,
    accumulate,
    add_noise,
    amplify_slow,
    attach,
    chain,
    clip_by_history,
    clip_by_norm,
    clip_by_zscore,
    decay_to_init,
    ema,
    keep_top_q,
    lookahead,
    masked,
    param_ema,
    partition,
    project_l2_ball,
    project_l2_sphere,
    sign,
    skip_nonfinite,
    trace,
    transform,
    with_error_feedback,
)

NAN = float("nan")


def params(n: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(n)]


def step(optim: Any, *values: float | None) -> None:
    members = [param for group in optim.param_groups for param in group["params"]]
    for param, value in zip(members, values, strict=True):
        param.grad = None if value is None else torch.full_like(param, value)
    optim.step()


def attach_to(params: Any, **chains: Any) -> Optimizer:
    optimizer = SGD(params, lr=0.1)
    attach(optimizer, **chains)
    return optimizer


def test_skipped_steps_in_a_row_are_those_of_the_optimizer() -> None:
    optim = ParamTransformingOptimizer(params(), Adam, pre=skip_nonfinite(1))
    step(optim, NAN, 1.0)
    for _ in range(5):
        step(optim, None, 1.0)
    step(optim, NAN, 1.0)
    with pytest.raises(RuntimeError, match="2 steps in a row were skipped"):
        step(optim, None, NAN)
    totals = [states["pre.skip_nonfinite.total"].item() for states in optim._engine.states.by_param.values()]
    assert totals == [3, 3]


@pytest.mark.parametrize("clip", [clip_by_zscore(2.5, warmup=5), clip_by_history(50)])
@pytest.mark.parametrize(
    "around", [lambda t: t, lambda t: masked(t, lambda group: True), lambda t: partition({"*": t})]
)
def test_history_is_that_of_the_optimizer(clip: Any, around: Any) -> None:
    xs = params()
    optim = ParamTransformingOptimizer([("x", xs[0]), ("y", xs[1])], pre=around(clip))
    for _ in range(20):
        step(optim, 1.0, None)
    step(optim, 1e4, 1e4)
    assert xs[0].grad is not None
    assert xs[0].grad[0] < 10
    assert torch.equal(xs[0].grad, xs[1].grad)  # type: ignore[arg-type]


def test_history_of_a_group_that_is_added() -> None:
    xs = params()
    optim = ParamTransformingOptimizer(
        xs[:1], pre=chain(with_error_feedback(clip_by_norm(9.0)), clip_by_zscore(2.5, warmup=5))
    )
    for _ in range(10):
        step(optim, 1.0)
    optim.add_param_group({"params": xs[1:]})
    step(optim, None, 1.0)
    step(optim, 1e4, 1e4)
    assert xs[1].grad is not None
    assert xs[1].grad[0] < 10


def test_history_of_a_group_that_is_added_is_one_before_any_gradient_comes() -> None:
    xs = params()
    optim = ParamTransformingOptimizer(xs[:1], pre=clip_by_history(50, window=2))
    step(optim, 3.0)
    optim.add_param_group({"params": xs[1:]})
    step(optim, None, None)
    norms = [states["transforms"]["pre.clip_by_history.norms"] for states in optim.state_dict()["state"].values()]
    assert len(norms) == 2
    assert torch.equal(*norms)


@pytest.mark.parametrize("slot", ["update", "post"])
def test_skipping_belongs_in_pre(slot: str) -> None:
    xs = params()
    arguments: Any = {slot: skip_nonfinite()}
    with pytest.raises(ValueError, match=f"{slot}: chain.* has a transform that skips steps; it belongs in pre"):
        step(ParamTransformingOptimizer(xs, **arguments), 1.0, NAN)
    assert xs[0].tolist() == [1.0, 1.0]


def test_skipping_without_a_step() -> None:
    optim = ParamTransformingOptimizer(params(1), pre=skip_nonfinite(0))
    param = optim.param_groups[0]["params"][0]
    param.grad = torch.tensor([1.0, NAN])
    with pytest.raises(RuntimeError, match="1 steps in a row were skipped"):
        optim._apply_pre_step_transform_()
    assert param.grad[0] == 1.0


def test_state_that_holds_its_input_is_not_overwritten() -> None:
    @transform(init=lambda tensor, group: {"previous": tensor}, acts_on="element")
    def difference(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        return tensor - state["previous"], {"previous": tensor}

    xs = params(1)
    seen = []
    optim = ParamTransformingOptimizer(xs, pre=difference(), post=difference(), lr=0.0)
    for value in (1.0, 3.0, 6.0):
        step(optim, value)
        assert xs[0].grad is not None
        seen.append(xs[0].grad[0].item())
    assert seen == [0.0, 2.0, 3.0]


@pytest.mark.parametrize("param_ndim", [-1, 0, 1, None])
@pytest.mark.parametrize(
    "init",
    [
        lambda tensor, group: {"steps": torch.zeros(())},
        lambda tensor, group: {"steps": tensor.new_zeros(())},
        lambda tensor, group: {"steps": torch.zeros(()).expand_as(tensor)},
    ],
)
def test_a_state_of_one_number_has_a_place_in_memory_for_each_unit(init: Any, param_ndim: int | None) -> None:
    @transform(init=init)
    def divide_by_step(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        steps = state["steps"] + 1
        return tensor / steps, {"steps": steps}

    xs = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    optim = ParamTransformingOptimizer(xs[: 1 if param_ndim == 1 else 2], pre=divide_by_step(), param_ndim=param_ndim)
    for number in (1, 2, 3):
        step(optim, *[1.0] * len(optim.param_groups[0]["params"]))
        assert xs[0].grad is not None
        assert torch.equal(xs[0].grad, torch.full((4, 3), 1 / number))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_rehearsal_with_any_learning_rate(lr: Any) -> None:
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    optim = ParamTransformingOptimizer(model.parameters(), Adam, pre=add_noise(0.1), post=project_l2_sphere(1.0), lr=lr)
    get_optimizer_state_dict(model, optim)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


AMONG_OTHERS = masked(chain(sign(), trace(0.9)), torch.tensor(True))
OTHERS = masked(chain(sign(), accumulate(2)), torch.tensor(True))


# found: 4
@pytest.mark.filterwarnings("ignore:.*partition has the kind")
@pytest.mark.parametrize(
    ("saved", "loaded", "needed", "got"),
    [
        (ema(0.9), accumulate(2), ["accumulate.count", "accumulate.mean"], ["ema.average", "ema.weight"]),
        (chain(trace(0.9), trace(0.9)), trace(0.9), ["trace.trace"], ["trace.trace", "trace_2.trace"]),
        (trace(0.9), ema(0.9), ["ema.average", "ema.weight"], ["trace.trace"]),
        (
            with_error_feedback(trace(0.5)),
            with_error_feedback(sign()),
            ["with_error_feedback.error"],
            ["with_error_feedback.error", "with_error_feedback.trace.trace"],
        ),
        (
            partition({"*": trace(0.9)}),
            partition({"*": ema(0.9)}),
            ["partition.ema.average", "partition.ema.weight"],
            ["partition.trace.trace"],
        ),
        (
            partition({"x*": trace(0.9), "y*": trace(0.9)}),
            partition({"y*": trace(0.9), "x*": trace(0.9)}),
            ["partition.trace_2.trace"],
            ["partition.trace.trace"],
        ),
        (AMONG_OTHERS, OTHERS, ["chain.accumulate.count", "chain.accumulate.mean"], ["chain.trace.trace"]),
        (trace(0.9), sign(), [], ["trace.trace"]),
    ],
)
def test_checkpoint_of_other_transforms(saved: Any, loaded: Any, needed: list[str], got: list[str]) -> None:
    def make(pre: Any) -> ParamTransformingOptimizer:
        return ParamTransformingOptimizer(zip(["x1", "x2"], params(), strict=True), pre=pre)

    optim, other = make(saved), make(loaded)
    step(optim, 1.0, 1.0)
    step(other, 2.0, 2.0)
    before = copy.deepcopy(other.state_dict())
    words = (
        f"pre, group 0, parameter 0 'x1' .*: the loaded state is not one of .*: it needs the keys {needed}, got {got}"
    )
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        other.load_state_dict(optim.state_dict())
    torch.testing.assert_close(other.state_dict()["state"], before["state"])


# found: 4
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.update({"prex": s.pop("pre.ema.average")}),
            r"must be a dict with keys that begin with the slots \['pre', 'update', 'post'\], got \['pre.ema.weight', ",
        ),
        (lambda s: s.pop("pre.ema.average"), r"pre, group 0, .*: it needs .*'ema.weight'\], got \['ema.weight'\]"),
        (lambda s: s.update({"pre.ema.average": 3}), r"pre, group 0, .*: 'ema.average' must be a tensor .*, got 3"),
        (lambda s: s.update({"pre.ema.average": {}}), r"pre, group 0, .*: 'ema.average' must be a tensor .*, got {}"),
        (
            lambda s: s.update({"pre.ema.average": torch.ones(3)}),
            r"'ema.average' must be a tensor of shape \(2,\), floating-point, got one of shape \(3,\), floating-point",
        ),
        (
            lambda s: s.update({"pre.ema.average": torch.ones(2, dtype=torch.int64)}),
            r"'ema.average' must be a tensor of shape \(2,\), floating-point, got one of shape \(2,\), integer",
        ),
        (
            lambda s: (s.clear(), s.update(pre=None)),
            r"pre, group 0, .*: it needs the keys \['ema.average', 'ema.weight'\], got \[\]",
        ),
    ],
)
def test_corrupt_checkpoint(change: Any, words: str) -> None:
    optim = ParamTransformingOptimizer(params(), pre=ema(0.9))
    step(optim, 1.0, 1.0)
    before, saved = copy.deepcopy(optim.state_dict()), copy.deepcopy(optim.state_dict())
    change(saved["state"][0]["transforms"])
    with pytest.raises(ValueError, match=words):
        optim.load_state_dict(saved)
    torch.testing.assert_close(optim.state_dict(), before)


# found: 4
def test_checkpoint_of_the_same_transforms_among_others() -> None:
    optim = ParamTransformingOptimizer(params(), pre=chain(ema(0.9).named("slow"), ema(0.5).named("fast")))
    step(optim, 1.0, 1.0)
    loaded = copy.deepcopy(optim.state_dict())
    other = ParamTransformingOptimizer(params(), pre=chain(clip_by_norm(1.0), ema(0.9), sign(), ema(0.5).named("fast")))
    with pytest.warns(UserWarning, match=r"'slow.decay'"):
        other.load_state_dict(loaded)
    torch.testing.assert_close(other.state_dict()["state"], loaded["state"])


# found: 30
@pytest.mark.parametrize("wrap", [ParamTransformingOptimizer, attach_to])
def test_checkpoint_with_keys_of_other_names(wrap: Any) -> None:
    saved = ParamTransformingOptimizer(params(), pre=clip_by_norm(1.0).named("limit")).state_dict()
    optim = wrap(params(), pre=clip_by_norm(2.0))
    words = (
        r"have the keys \['limit.max_norm'\], which nothing reads here, and lack the keys \['clip_by_norm.max_norm'\]"
    )
    with pytest.warns(UserWarning, match=words):
        optim.load_state_dict(saved)
    assert optim.param_groups[0]["clip_by_norm.max_norm"] == 2.0


# found: 30
def test_checkpoints_without_a_warning() -> None:
    bare, fewer = SGD(params(), lr=0.1), ParamTransformingOptimizer(params(), pre=chain(clip_by_norm(1.0), sign()))
    for saved in (bare, fewer):
        StepLR(saved, 1)
        other = ParamTransformingOptimizer(params(), pre=chain(clip_by_norm(1.0), ema(0.9)))
        other.load_state_dict(saved.state_dict())
    ParamTransformingOptimizer(params()).load_state_dict(fewer.state_dict())


def test_checkpoint_with_another_param_ndim() -> None:
    def make(param_ndim: int | None) -> ParamTransformingOptimizer:
        return ParamTransformingOptimizer([nn.Parameter(torch.ones(3, 2))], pre=ema(0.9), param_ndim=param_ndim)

    optim, other = make(None), make(-1)
    step(optim, 1.0)
    other.load_state_dict(optim.state_dict())
    torch.testing.assert_close(other.state_dict(), optim.state_dict())


def test_checkpoint_out_of_range_or_of_another_size() -> None:
    optim = ParamTransformingOptimizer(params(), pre=ema(0.9))
    step(optim, 1.0, 1.0)
    saved = copy.deepcopy(optim.state_dict())
    saved["param_groups"][0]["ema.decay"] = 3.0
    with pytest.raises(ValueError, match=r"pre, group 0: stage 0, ema\(decay=0.9\): ema.decay must be <"):
        optim.load_state_dict(saved)
    assert optim.param_groups[0]["ema.decay"] == 0.9
    with pytest.raises(ValueError, match="doesn't match the size"):
        ParamTransformingOptimizer(params(1), pre=ema(0.9)).load_state_dict(optim.state_dict())


def test_state_that_is_missing_by_hand() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"ema\(decay=0.9\): the state has no '\w+'; it comes from state = t.init\("):
        ema(0.9).update(x, {}, {})
    with pytest.raises(
        ValueError, match=r"stage 1, ema\(decay=0.9\): .*the state has no '\w+'; it comes from state = t"
    ):
        chain(clip_by_norm(1.0), ema(0.9)).update(x, {}, {})


@pytest.mark.parametrize("first", [None, {"count": 0}])
def test_first_state_that_is_no_dict_of_tensors(first: Any) -> None:
    @transform(init=lambda tensor, group: first)
    def bad(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        return tensor, state

    with pytest.raises(TypeError, match=r"bad\(\): init must return a dict of tensors"):
        bad().init(torch.ones(2), {})


def test_reset() -> None:
    xs = params(1)
    optim = ParamTransformingOptimizer(xs, Adam, pre=ema(0.9, debias=False))
    for _ in range(3):
        step(optim, 1.0)
    optim.state = type(optim.state)(dict)
    step(optim, 1.0)
    assert xs[0].grad is not None
    assert xs[0].grad[0].item() == pytest.approx(0.1)


def test_wrapping_a_copy_again() -> None:
    optim = ParamTransformingOptimizer(params(1), Adam, pre=ema(0.9))
    step(optim, 1.0)
    inner = copy.deepcopy(optim).inner_opt
    again = ParamTransformingOptimizer(InnerOpt=inner, pre=clip_by_norm(1.0))
    assert "ema.decay" not in again.param_groups[0]
    assert "transforms" not in next(iter(again.state.values()))
    again.load_state_dict(copy.deepcopy(again.state_dict()))
    third = ParamTransformingOptimizer(InnerOpt=inner, pre=clip_by_norm(2.5))
    assert third.param_groups[0]["clip_by_norm.max_norm"] == 2.5


def test_masked_by_shape_in_every_slot() -> None:
    model = nn.Linear(3, 2)
    matrices = masked(project_l2_ball(0.1), lambda group: len(group["shape"]) > 1)
    optim = ParamTransformingOptimizer(model.parameters(), post=chain(matrices, param_ema(0.9)))
    bias = model.bias.detach().clone()
    model(torch.ones(3)).sum().mul(0).backward()
    optim.step()
    assert model.weight.norm(dim=1).max() <= 0.1 + 1e-6
    assert torch.equal(model.bias, bias)


def test_mask_that_does_not_fit() -> None:
    optim = ParamTransformingOptimizer(params(1), pre=masked(clip_by_norm(1.0), torch.ones(3, 2, dtype=torch.bool)))
    with pytest.raises(RuntimeError, match=r"pre, group 0, parameter 0 [\s\S]*the mask of shape \(3, 2\) does not fit"):
        step(optim, 1.0)


def test_noise_differs_between_slots() -> None:
    xs = params(1)
    optim = ParamTransformingOptimizer(xs, SGD, pre=add_noise(1.0), post=add_noise(1.0), lr=0.0)
    step(optim, 0.5)
    assert xs[0].grad is not None
    assert not torch.allclose(xs[0].grad - 0.5, xs[0].detach() - 1.0)


def test_two_averages() -> None:
    optim = ParamTransformingOptimizer(params(1), post=chain(param_ema(0.9), lookahead(2, 0.5)))
    step(optim, 1.0)
    with pytest.raises(ValueError, match="post keeps two averages"), optim.averaged():
        pass


# found: 32
@pytest.mark.parametrize("post", [None, project_l2_ball(1.0), chain(trace(0.9))], ids=repr)
def test_no_average(post: Any) -> None:
    optim = ParamTransformingOptimizer(params(1), SGD, post=post)
    optimizer = SGD(params(1))
    handle = attach(optimizer, post=post)
    for _ in range(2):
        for averaged in (optim.averaged, handle.averaged):
            with (
                pytest.raises(ValueError, match=r"post keeps no average; put param_ema or lookahead into it"),
                averaged(),
            ):
                pass
        step(optim, 1.0)


# found: 32
@pytest.mark.parametrize(
    "post",
    [param_ema(0.9), chain(project_l2_ball(1.0), lookahead(2, 0.5)), masked(param_ema(0.9), lambda group: False)],
    ids=repr,
)
def test_before_the_first_step_the_average_is_the_parameter(post: Any) -> None:
    optim = ParamTransformingOptimizer(params(1), SGD, post=post)
    with optim.averaged():
        assert torch.equal(optim.param_groups[0]["params"][0], params(1)[0])


# States of another dtype

STATEFUL: list[tuple[str, Any]] = [
    ("pre", ema(0.9)),
    ("pre", amplify_slow(2.0, 0.9)),
    ("pre", chain(trace(0.9), with_error_feedback(keep_top_q(0.5)))),
    ("pre", clip_by_zscore(2.5, warmup=2)),
    ("pre", chain(clip_by_history(50), lambda tensor, group: 2 * tensor)),
    ("update", decay_to_init(0.1)),
    ("post", param_ema(0.9)),
    ("post", lookahead(2, 0.5)),
    ("post", chain(lookahead(2, 0.5), lambda tensor, group: 2 * tensor)),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def values_of(optim: Any) -> list[nn.Parameter]:
    return [param for group in optim.param_groups for param in group["params"]]


def dtypes(state: Any) -> Any:
    return {key: value.dtype for key, value in state.items()}


# found: 3
@pytest.mark.parametrize("loads", [True, False], ids=["loaded", "in mid-run"])
@pytest.mark.parametrize(("before", "after"), [(a, b) for a in DTYPES for b in DTYPES if a != b])
@pytest.mark.parametrize(("slot", "member"), STATEFUL)
def test_state_of_another_dtype(slot: str, member: Any, before: torch.dtype, after: torch.dtype, loads: bool) -> None:
    def make(dtype: torch.dtype) -> Any:
        arguments: Any = {slot: member}
        return ParamTransformingOptimizer([nn.Parameter(p.to(dtype)) for p in params()], SGD, lr=0.1, **arguments)

    optim, expected = make(before), make(torch.float64)
    for each in (optim, expected):
        step(each, 1.0, 2.0)
        step(each, 1.0, 2.0)
    if loads:
        saved, old = copy.deepcopy(optim.state_dict()), optim
        optim = make(after)
        for value, other in zip(values_of(optim), values_of(old), strict=True):
            value.data.copy_(other)
        optim.load_state_dict(saved)
    else:
        for param in optim.param_groups[0]["params"]:
            param.grad, param.data = None, param.data.to(after)
    for each in (optim, expected):
        step(each, 3.0, -1.0)
        step(each, 3.0, -1.0)
    coarsest = max(torch.finfo(dtype).eps for dtype in (before, after))
    for value, other in zip(values_of(optim), values_of(expected), strict=True):
        assert value.dtype == after
        torch.testing.assert_close(value.double(), other.double(), rtol=20 * coarsest, atol=20 * coarsest)
    made = make(after)
    step(made, 1.0, 1.0)
    assert dtypes(optim._engine.states.by_param[values_of(optim)[1]]) == dtypes(
        made._engine.states.by_param[values_of(made)[1]]
    )


# Parameters that take the place of others


# found: 5
@pytest.mark.parametrize("attaches", [False, True])
@pytest.mark.parametrize("InnerOpt", [SGD, Adam])
def test_state_that_moves_along_with_a_parameter(InnerOpt: Any, attaches: bool) -> None:
    def make(xs: list[nn.Parameter]) -> Any:
        chains: Any = {"pre": ema(0.9), "post": param_ema(0.5)}
        if not attaches:
            return ParamTransformingOptimizer(xs, InnerOpt, lr=0.1, **chains)
        optimizer = InnerOpt(xs, lr=0.1)
        attach(optimizer, **chains)
        return optimizer

    xs, ys = params(), params()
    optims = [make(xs), make(ys)]
    for optim in optims:
        step(optim, 1.0, 2.0)
    old, new = xs[0], nn.Parameter(xs[0].detach().clone())
    optims[0].param_groups[0]["params"][0] = new
    optims[0].state[new] = optims[0].state.pop(old)
    for optim in optims:
        step(optim, -3.0, 2.0)
        step(optim, -3.0, 2.0)
    assert torch.equal(new, ys[0])
    torch.testing.assert_close(optims[0].state_dict(), optims[1].state_dict(), rtol=0, atol=0)
    if not attaches:
        assert old not in optims[0]._engine.states.by_param
        with optims[0].averaged(), optims[1].averaged():
            assert torch.equal(new, ys[0])


# found: 5
def test_state_that_moves_to_a_parameter_of_another_shape() -> None:
    xs = params(1)
    optim = ParamTransformingOptimizer(xs, Adam, pre=ema(0.9), post=clip_by_norm(9.0), lr=0.1)
    step(optim, 1.0)
    grown = nn.Parameter(torch.ones(3))
    moved = optim.state.pop(xs[0])
    for key in ("exp_avg", "exp_avg_sq"):
        moved[key] = torch.cat([moved[key], torch.zeros(1)])
    optim.param_groups[0]["params"][0] = grown
    optim.state[grown] = moved
    with pytest.raises(
        ValueError,
        match=r"pre, group 0, parameter 0 of shape \(3,\), torch.float32: the state of chain\(broadcast\(ema.* is for "
        r'a parameter of another shape; change the tensors in state\[param\]\["transforms"\] too, or del',
    ):
        step(optim, 1.0)
    assert grown.tolist() == [1.0, 1.0, 1.0]
    state = optim.state[grown]["transforms"]
    state["pre.ema.average"] = torch.cat([state["pre.ema.average"], torch.zeros(1)])
    step(optim, 1.0)
    assert grown[2] < 1.0


# found: 5
@pytest.mark.parametrize("attaches", [False, True])
@pytest.mark.parametrize(
    "clip",
    [
        clip_by_zscore(2.5, warmup=5),
        chain(lambda tensor, group: tensor, clip_by_history(50)),
        with_error_feedback(clip_by_zscore(2.5, warmup=5)),
        masked(clip_by_history(50), torch.tensor(True)),
    ],
)
def test_history_when_a_group_is_put_first(clip: Any, attaches: bool) -> None:
    xs = params()
    optim: Any
    if attaches:
        optim = SGD(xs[:1], lr=0.1)
        attach(optim, pre=clip)
    else:
        optim = ParamTransformingOptimizer(xs[:1], pre=clip, lr=0.1)
    for _ in range(10):
        step(optim, 1.0)
    optim.param_groups.insert(0, {**optim.param_groups[0], "params": xs[1:]})
    step(optim, None, 1.0)
    step(optim, 1e4, 1e4)
    assert xs[0].grad is not None
    assert xs[0].grad[0] < 10


# States that an optimizer has loaded before there were transforms around it


def afterwards(optimizer: Optimizer, *chains: dict[str, Any]) -> Optimizer:
    for each in chains:
        attach(optimizer, **each)
    return optimizer


def around(optimizer: Optimizer, *chains: dict[str, Any]) -> Optimizer:
    return ParamTransformingOptimizer(InnerOpt=optimizer, **chains[0])


def drive(optimizer: Optimizer, members: list[nn.Parameter], steps: range) -> None:
    for index in steps:
        for param in members:
            param.grad = torch.full_like(param, math.sin(index))
        optimizer.step()


FIRST: dict[str, Any] = {
    "pre": chain(ema(0.9), clip_by_zscore(2.0, warmup=2), skip_nonfinite(2)),
    "post": chain(masked(param_ema(0.5), lambda group: group["index"] == 0), project_l2_ball(3.0)),
}
SECOND: dict[str, Any] = {"pre": ema(0.5), "update": trace(0.1)}


def resume(wrap: Any, inner: Any, *chains: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """The parameters and states after a run, and after another, which its inner optimizer has loaded in the middle."""
    members = [nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]
    whole = afterwards(inner(members), *chains)
    drive(whole, members, range(4))
    saved, copies = copy.deepcopy(whole.state_dict()), [nn.Parameter(param.detach().clone()) for param in members]
    drive(whole, members, range(4, 7))
    bare = inner(copies)
    bare.load_state_dict(saved)
    resumed = wrap(bare, *chains)
    drive(resumed, copies, range(4, 7))
    return (members, whole.state_dict()["state"]), (copies, resumed.state_dict()["state"])


# found: 7
@pytest.mark.parametrize("inner", [partial(SGD, lr=0.1), partial(Adam, lr=0.1)])
@pytest.mark.parametrize(("wrap", "chains"), [(afterwards, [FIRST]), (afterwards, [FIRST, SECOND]), (around, [FIRST])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_that_the_optimizer_has_loaded_by_itself(wrap: Any, chains: Any, inner: Any, dtype: torch.dtype) -> None:
    expected, resumed = resume(wrap, inner, *chains, dtype=dtype)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


# found: 7
@pytest.mark.parametrize("wrap", [afterwards, around])
def test_states_that_the_optimizer_has_rounded(wrap: Any) -> None:
    words = r"SGD has loaded .* has rounded \['pre.clip_by_zscore', 'pre.ema', .*'post.param_ema'\] to the dtype of"
    with pytest.warns(UserWarning, match=words):
        expected, resumed = resume(wrap, partial(SGD, lr=0.1), FIRST, dtype=torch.bfloat16)
    torch.testing.assert_close(resumed, expected, rtol=0.02, atol=0.02)


# found: 7
@pytest.mark.parametrize("wrap", [afterwards, around])
@pytest.mark.parametrize(
    "change", [None, lambda state: state.pop("pre.ema.average"), lambda state: state.update({"pre.ema.average": 3})]
)
def test_states_that_the_optimizer_has_loaded_and_nothing_takes_up(wrap: Any, change: Any) -> None:
    optim = ParamTransformingOptimizer(params(), Adam, pre=ema(0.9), post=chain(clip_by_norm(9.0), param_ema(0.5)))
    step(optim, 1.0, 1.0)
    bare, saved = Adam(params()), copy.deepcopy(optim.state_dict())
    if change is not None:
        change(saved["state"][0]["transforms"])
    bare.load_state_dict(saved)
    chains = {"pre": ema(0.9) if change else trace(0.9), "post": param_ema(0.5)}
    words = r"Adam has loaded .*, of which \['pre.ema'\] do not fit the chains .* start anew"
    with pytest.warns(UserWarning, match=words):
        drive(resumed := wrap(bare, chains), bare.param_groups[0]["params"], range(1))
    states = resumed.state_dict()["state"][0]["transforms"]
    assert states["post.param_ema.weight"] == 0.75
    pre = {"pre.ema.average", "pre.ema.weight"} if change else {"pre.trace.trace"}
    assert {key for key in states if key.startswith("pre.")} == pre


# found: 7
def test_attach_to_a_copy_takes_up_its_states() -> None:
    members = params()
    optimizer = afterwards(Adam(members), FIRST)
    drive(optimizer, members, range(3))
    copies, copied = copy.deepcopy((members, optimizer))
    afterwards(copied, FIRST)
    drive(optimizer, members, range(3, 6))
    drive(copied, copies, range(3, 6))
    torch.testing.assert_close((copies, copied.state_dict()), (members, optimizer.state_dict()), rtol=0, atol=0)
