"""``ParamTransformingOptimizer``: construction, steps, groups, copies, checkpoints, and errors that change nothing."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from gradchain import (
    FROM_GROUP,
    Group,
    ParamTransformingOptimizer,
    Transform,
    attach,
    broadcast,
    cautious,
    chain,
    clamp,
    clip_adaptive,
    clip_by_global_norm,
    clip_by_norm,
    ema,
    masked,
    normalize,
    param_ema,
    partition,
    project_l2_ball,
    reject_from_param,
    scale,
    schedule,
    sign,
    step_in_backward,
    transform,
    with_error_feedback,
)


def param(*values: float, grad: list[float] | None = None) -> nn.Parameter:
    x = nn.Parameter(torch.tensor(values))
    if grad is not None:
        x.grad = torch.tensor(grad)
    return x


# Construction


@pytest.mark.parametrize("InnerOpt", [Adam, partial(Adam, betas=(0.5, 0.9))])
def test_inner_optimizer_from_a_type_or_partial(InnerOpt: Any) -> None:
    optim = ParamTransformingOptimizer([param(1.0)], InnerOpt, lr=0.5)
    assert type(optim.inner_opt) is Adam
    assert optim.param_groups[0]["lr"] == 0.5
    assert optim.param_groups[0]["betas"] == ((0.5, 0.9) if isinstance(InnerOpt, partial) else (0.9, 0.999))


def test_inner_optimizer_from_an_instance() -> None:
    x = param(1.0, grad=[-3.0])
    inner = SGD([x], lr=1.0)
    optim = ParamTransformingOptimizer(InnerOpt=inner, pre=sign())
    assert optim.inner_opt is inner
    optim.step()
    assert x.item() == 2.0


def test_chains_and_own_keys() -> None:
    optim = ParamTransformingOptimizer(
        [{"params": [param(1.0)], "grad_scale": 3.0}, {"params": [param(2.0)], "clip_by_norm.max_norm": 9.0}],
        pre=clip_by_norm(1.0),
        post=chain(clamp(-1, 1)),
        defaults={"epsilon": 0.1, "clamp.max": 2},
        lr=0.1,
    )
    assert optim.pre == chain(clip_by_norm(1.0))
    assert optim.post == chain(clamp(-1, 1))
    own = {"param_ndim": -1, "grad_bias": 0.0, "clamp.min": -1, "clamp.max": 2, "epsilon": 0.1}
    expected = [{"grad_scale": 3.0, "clip_by_norm.max_norm": 1.0}, {"grad_scale": 1.0, "clip_by_norm.max_norm": 9.0}]
    for group, different in zip(optim.param_groups, expected, strict=True):
        assert {**own, **different}.items() <= group.items()


def test_groups_state_and_defaults_are_those_of_the_inner_optimizer() -> None:
    optim = ParamTransformingOptimizer([param(1.0, grad=[1.0])], Adam, lr=0.1)
    optim.step()
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optim, name) is getattr(optim.inner_opt, name)
    optim.load_state_dict(optim.state_dict())
    copied = copy.deepcopy(optim)
    assert copied.param_groups is copied.inner_opt.param_groups is not optim.param_groups
    optim.param_groups = optim.param_groups[:]
    assert optim.inner_opt.param_groups is optim.param_groups


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"InnerOpt": nn.Linear}, TypeError, "InnerOpt must be a torch.optim.Optimizer type, .* got <class .*Linear"),
        ({"InnerOpt": partial(nn.Linear, 3)}, TypeError, "InnerOpt must be a torch.optim.Optimizer type"),
        ({"InnerOpt": "SGD"}, TypeError, "InnerOpt must be a torch.optim.Optimizer type, .* got 'SGD'"),
        ({"params": None}, ValueError, "params are needed to make the inner optimizer, SGD; got None"),
        ({"params": []}, ValueError, "empty parameter list"),
        # found: 32
        (
            {"params": SGD([nn.Parameter(torch.ones(1))])},
            TypeError,
            r"got an optimizer, SGD; .*\(InnerOpt=...\)",
        ),
        ({"params": nn.Linear(1, 1)}, TypeError, r"got a module, Linear; give named_parameters\(\)"),
        ({"pre": 3}, TypeError, "pre must be a callable .tensor, group. -> tensor, got 3"),
        ({"post": sign}, TypeError, "post is the factory sign, not a transform; call it"),
        ({"post": Adam}, TypeError, "post must be a callable .tensor, group. -> tensor, got the class Adam"),
        ({"pre": nn.ReLU()}, TypeError, r"got ReLU.*to act on the tensor alone, write lambda tensor, group: ReLU"),
        ({"pre": param_ema(0.9)}, ValueError, "pre: .*param_ema.* keeps an average .*; it belongs in post"),
        ({"param_dim": 1}, TypeError, "optimizer, SGD, has an argument 'param_dim'; did you mean 'param_ndim'"),
        ({"weight_decy": 1, "groups": {}}, TypeError, "argument 'weight_decy'; did you mean 'weight_decay'"),
        (
            {"param_ndim": 2, "pre": normalize()},
            ValueError,
            "pre: stage 0, normalize.*: group 0, parameter 0 'x' of shape .2,., torch.float32: param_ndim=2 needs",
        ),
        (
            {"param_ndim": -2, "pre": normalize()},
            ValueError,
            "param_ndim=-2 needs a tensor of at least 2 dimensions, got 1; set param_ndim=",
        ),
        ({"param_ndim": 1.0}, TypeError, "group 0: param_ndim must be an int or None, got 1.0"),
        ({"param_ndim": True}, TypeError, "group 0: param_ndim must be an int or None, got True"),
        ({"grad_scale": "2"}, TypeError, "group 0: grad_scale must be a number, got '2'"),
        ({"grad_bias": None}, TypeError, "group 0: grad_bias must be a number, got None"),
        (
            {"defaults": {"lr": 0.1}},
            ValueError,
            r"defaults has the keys \['lr'\] of SGD; give them to the opt",
        ),
        ({"defaults": {"clamp.min": "a"}, "post": clamp(-1, 1)}, TypeError, "post, group 0: stage 0, clamp.*clamp.min"),
        (
            {"pre": clamp(-1, 1).named("a"), "post": chain(sign(), clamp(0, 1).named("a"))},
            ValueError,
            r'"a.min" has two defaults: -1 \(pre stage 0, clamp.*\) and 0 \(post stage 1, clamp.*\.named\(',
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ParamTransformingOptimizer(**{"params": [("x", param(1.0, 2.0))], "lr": 0.1, **arguments})


def test_bad_group() -> None:
    for group, message in (
        ({"clip_by_norm.max_norm": 0.0}, r"pre, group 1: stage 0, clip_by_norm.*: clip_by_norm.max_norm must be > 0"),
        ({"clamp.min": 5}, "post, group 1: stage 0, clamp.*: needs min <= max, got min=5 and max=1"),
        (
            {"clamp.mim": 0},
            r"group 1: \"clamp.mim\" is no hyperparameter; there are \['clamp.max', 'clamp.min', ",
        ),
        ({"param_ndim": 7}, "group 1, parameter 0 of shape .1,., torch.float32: param_ndim=7 needs"),
    ):
        groups: list[dict[str, Any]] = [{"params": [param(1.0)]}, {"params": [param(2.0)], **group}]
        with pytest.raises(ValueError, match=message):
            ParamTransformingOptimizer(groups, pre=clip_by_norm(1.0), post=clamp(-1, 1))


# found: 9
@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda inner: ParamTransformingOptimizer(InnerOpt=inner, pre=scale(2.0)),
        lambda inner: attach(inner, pre=scale(2.0)).optimizers[0],
    ],
)
def test_differentiable_inner_optimizer(make: Callable[[Optimizer], Optimizer], in_group: bool) -> None:
    message = r"differentiable must be False, .* call apply\(transform, grads, group, param=params\)"
    params = [param(1.0), param(2.0, grad=[1.0])]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "differentiable": True}]
    with pytest.raises(ValueError, match="group [01]: " + message):
        make(SGD(groups, lr=0.5) if in_group else SGD(params, lr=0.5, differentiable=True))
    optim = make(SGD(params, lr=0.5))
    optim.step()
    assert params[1].item() == 1.0
    optim.param_groups[0]["differentiable"] = True
    with pytest.raises(ValueError, match="group 0: " + message):
        optim.step()
    assert params[1].item() == 1.0


def test_bad_arguments_beside_an_instance_change_nothing() -> None:
    inner = SGD([param(1.0)], lr=1.0)
    before, defaults_before = copy.deepcopy(inner.param_groups), dict(inner.defaults)
    with pytest.raises(TypeError, match="InnerOpt is an instance of SGD already; leave out params, lr"):
        ParamTransformingOptimizer([param(1.0)], inner, lr=0.1)
    with pytest.raises(ValueError, match="param_ndim=3"):
        ParamTransformingOptimizer(InnerOpt=inner, pre=normalize(), param_ndim=3)
    assert inner.param_groups == before
    assert inner.defaults == defaults_before


def test_wrapping_twice() -> None:
    optim = ParamTransformingOptimizer([param(1.0)], pre=sign())
    with pytest.raises(TypeError, match="is a ParamTransformingOptimizer already; put its transforms and yours in one"):
        ParamTransformingOptimizer(InnerOpt=optim)


# found: 12
@pytest.mark.parametrize(
    "needs_units",
    [
        {"pre": normalize()},
        {"post": chain(sign(), lambda tensor, group: tensor)},
        {"update": masked(normalize(), "logit_*")},
        {"update": partition({"*.bias": sign(), "*": with_error_feedback(normalize())})},
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:.*partition has the kind")
def test_a_parameter_without_dimensions_names_itself_where_units_matter(needs_units: dict[str, Any]) -> None:
    scale_of_clip = nn.Parameter(torch.tensor(1.0))
    message = r"0, .*'logit_scale' of shape \(\), .*set param_ndim=None .* or 0 .* group of its own"
    with pytest.raises(ValueError, match=message):
        ParamTransformingOptimizer([("logit_scale", scale_of_clip)], **needs_units)
    with pytest.raises(ValueError, match=message):
        attach(SGD([("logit_scale", scale_of_clip)]), **needs_units)
    optim = ParamTransformingOptimizer([{"params": [("logit_scale", scale_of_clip)], "param_ndim": 0}], **needs_units)
    with pytest.raises(ValueError, match=r"group 1, parameter 0 'logit_bias' of shape \(\)"):
        optim.add_param_group({"params": [("logit_bias", nn.Parameter(torch.tensor(1.0)))]})
    assert len(optim.param_groups) == 1


# found: 12
def test_a_parameter_without_dimensions_where_units_do_not_matter() -> None:
    x, y = nn.Parameter(torch.tensor(1.0)), param(1.0, 2.0, grad=[3.0, 4.0])
    x.grad = torch.tensor(-12.0)
    names = zip(["logit_scale", "weight"], [x, y], strict=True)
    pre = chain(clip_by_global_norm(1.0), sign(), masked(normalize(), "weight"))
    ParamTransformingOptimizer(names, pre=pre, update=broadcast(normalize(), None), post=clamp(max=1.5), lr=1.0).step()
    assert x.item() == 1.5
    torch.testing.assert_close(y, torch.tensor([1.0, 2.0]) - 0.5**0.5)

    class Hooked(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None: ...

    with pytest.raises(ValueError, match="pre: group 0, parameter 0 of shape ()"):
        Hooked([x])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_duplicate_parameter() -> None:
    x = param(1.0)
    with pytest.raises(ValueError, match="^group 0: a parameter appears twice; give it once"):
        ParamTransformingOptimizer([x, x])


# Steps


def test_step_applies_pre_scale_bias_inner_and_post_in_this_order() -> None:
    x = param(10.0, -10.0, grad=[-8.0, 4.0])
    ParamTransformingOptimizer([x], pre=sign(), post=clamp(-10, 20), grad_scale=3.0, grad_bias=1.0, lr=1.0).step()
    assert x.grad is not None
    assert x.grad.tolist() == [-2.0, 4.0]
    assert x.tolist() == [12.0, -10.0]


def test_scale_and_bias_per_group() -> None:
    xs = [param(0.0, grad=[1.0]) for _ in range(3)]
    groups: list[dict[str, Any]] = [
        {"params": [xs[0]]},
        {"params": [xs[1]], "grad_scale": 2.0},
        {"params": [xs[2]], "grad_bias": 5.0},
    ]
    ParamTransformingOptimizer(groups, lr=1.0).step()
    assert [x.item() for x in xs] == [-1.0, -2.0, -6.0]


def test_hyperparameters_per_group_and_by_scheduler() -> None:
    xs = [param(0.0, grad=[1.0]) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [xs[0]]}, {"params": [xs[1]], "scale.factor": 5.0}]
    optim = ParamTransformingOptimizer(groups, pre=scale(2.0), lr=1.0)
    optim.step()
    optim.param_groups[0]["scale.factor"] = 0.0
    optim.step()
    assert [x.item() for x in xs] == [-2.0, -30.0]


# found: 27
def test_transforms_of_a_kind_are_counted_through_the_slots() -> None:
    def make() -> tuple[nn.Parameter, ParamTransformingOptimizer]:
        x = param(0.0, grad=[1.0])
        post = masked(scale(1.0), "x")
        pre = chain(scale(2.0), broadcast(scale(3.0), 0))
        return x, ParamTransformingOptimizer([("x", x)], pre=pre, update=scale(5.0), post=post, lr=1.0)

    x, optim = make()
    (group,) = optim.param_groups
    keys = [key for key in group if key.endswith(".factor")]
    assert keys == ["scale.factor", "scale_2.factor", "scale_3.factor", "scale_4.factor"]
    assert optim.update == chain(scale(5.0))
    optim.step()
    assert x.item() == -30.0
    group["scale_3.factor"] = 7.0
    group["scale_4.factor"] = 0.5
    schedule(optim, "scale_2.factor", LambdaLR, lambda step: 10.0)
    x.grad = torch.ones(1)
    optim.step()
    assert x.item() == (-30.0 - 2 * 30 * 7) / 2
    for copied in (copy.deepcopy(optim), pickle.loads(pickle.dumps(optim)), make()[1]):
        copied.load_state_dict(copy.deepcopy(optim.state_dict()))
        y = copied.param_groups[0]["params"][0]
        with torch.no_grad():
            y.zero_()
        y.grad = torch.ones(1)
        copied.step()
        assert y.item() == -2 * 30 * 7 / 2
    with pytest.raises(ValueError, match=r"clip_by_norm_2.max_norm must be > 0"):
        ParamTransformingOptimizer(
            [x], pre=clip_by_norm(1.0), post=clip_by_norm(1.0), defaults={"clip_by_norm_2.max_norm": 0.0}
        )


# found: 27
def test_the_keys_of_a_slot_stay_when_another_gets_a_new_chain() -> None:
    x = param(0.0, grad=[1.0])
    optim = ParamTransformingOptimizer([x], pre=scale(2.0), update=scale(3.0), lr=1.0)
    optim.param_groups[0]["scale_2.factor"] = 5.0
    optim.pre = chain()
    for trained in (optim, copy.deepcopy(optim)):
        y = trained.param_groups[0]["params"][0]
        y.grad = torch.ones(1)
        trained.step()
        assert y.item() == -5.0


# found: 30
def test_a_key_of_ones_own() -> None:
    x = param(3.0, grad=[0.0])
    ball = project_l2_ball(2.0).named(radius="epsilon")
    optim = ParamTransformingOptimizer([x], post=ball, lr=1.0)
    optim.step()
    assert x.item() == 2.0
    scheduler = schedule(optim, "epsilon", LambdaLR, lambda step: 1 / (1 + step))
    optim.step()
    scheduler.step()
    optim.step()
    assert x.item() == 1.0
    other = ParamTransformingOptimizer([x], post=ball, lr=1.0)
    other.load_state_dict(optim.state_dict())
    assert other.param_groups[0]["epsilon"] == 1.0
    with pytest.raises(ValueError, match="post, group 0: stage 0, project_l2_ball.*: epsilon must be >= 0, got -1"):
        ParamTransformingOptimizer([x], post=ball, defaults={"epsilon": -1})
    with pytest.raises(ValueError, match='the key "lr" of a hyperparameter is one of SGD already; choose another'):
        ParamTransformingOptimizer([x], post=project_l2_ball(2.0).named(radius="lr"), lr=1.0)
    with pytest.raises(ValueError, match='the key "lr" of a hyperparameter is one of SGD already; choose another'):
        attach(SGD([x]), post=project_l2_ball(2.0).named(radius="lr"))


# found: 30
def test_a_hyperparameter_that_every_group_gives() -> None:
    xs = [param(3.0, grad=[1.0]), param(3.0, grad=[1.0])]
    groups: list[dict[str, Any]] = [{"params": [xs[0]], "epsilon": 2.0}, {"params": [xs[1]], "epsilon": 1.0}]
    ball = project_l2_ball(FROM_GROUP).named(radius="epsilon")
    optim = ParamTransformingOptimizer(groups, pre=scale(FROM_GROUP).named(factor="lr"), post=ball, lr=0.5)
    optim.step()
    assert [x.item() for x in xs] == [2.0, 1.0]
    assert [x.grad for x in xs] == [torch.tensor([0.5])] * 2
    assert "epsilon" not in optim.defaults
    torch.load(io.BytesIO(saved(optim)), weights_only=True)
    message = (
        r'post, group 0: stage 0, .*no default for radius and reads group\["epsilon"\], which is not there; give it'
    )
    with pytest.raises(ValueError, match=message):
        ParamTransformingOptimizer([param(1.0)], post=ball)
    with pytest.raises(ValueError, match="post, group 2: .*reads"):
        optim.add_param_group({"params": [param(1.0)]})
    attached = SGD([{**group, "params": [param(3.0, grad=[1.0])]} for group in groups], lr=1.0)
    attach(attached, post=ball)
    attached.step()
    assert [group["params"][0].item() for group in attached.param_groups] == [2.0, 1.0]
    with pytest.raises(ValueError, match="post, group 0: .*reads"):
        attach(SGD([param(1.0)]), post=ball)
    ParamTransformingOptimizer([param(1.0)], post=ball, defaults={"epsilon": 1.0})


def saved(optim: Optimizer) -> bytes:
    file = io.BytesIO()
    torch.save(optim.state_dict(), file)
    return file.getvalue()


# found: 8
@pytest.mark.parametrize("adapter", ["wrapper", "attach", "backward"])
def test_a_mistyped_key_in_the_middle_of_training(adapter: str) -> None:
    x = param(1.0, 1.0)
    optim: Any = SGD([x], lr=0.5)
    if adapter == "attach":
        attach(optim, pre=clip_by_norm(1.0))
    else:
        optim = ParamTransformingOptimizer(InnerOpt=optim, pre=clip_by_norm(1.0))
    if adapter == "backward":
        step_in_backward(optim)

    def step() -> None:
        x.sum().backward()
        if adapter != "backward":
            optim.step()

    step()
    group, before = optim.param_groups[0], x.detach().clone()
    for mistyped in ("clip_by_norm.maxnorm", "clip_by_norm.max", "clip_by_norm.ord"):
        group[mistyped] = 0.5
        for _ in range(2):  # as long as it is there
            x.grad = None
            with pytest.raises(ValueError, match=f'group 0: "{mistyped}" is no hyperparameter; there are .*.max_norm'):
                step()
            assert torch.equal(x, before)
        del group[mistyped]
    group["clip_by_norm.max_norm"] = group["of others"] = group["other.key"] = 0.5
    step()
    assert not torch.equal(x, before)
    group["max_norm"] = 1
    with pytest.raises(UserWarning, match=r'group 0 has the key "max_norm", .* "clip_by_norm.max_norm", set that'):
        step()


# found: 32
def test_a_short_key_in_a_group() -> None:
    message = r'group 0 has the key "max_norm", which no .*"clip_by_norm.max_norm".*named\(max_norm="max_norm"\)'
    x, clip = param(1.0, 2.0, grad=[1.0, 1.0]), clip_by_norm(1.0)
    pre = chain(clip, scale(2.0), clamp(-1, 1), scale(3.0))
    group: dict[str, Any] = {"params": [x], "max_norm": 1}
    with pytest.warns(UserWarning, match=message):
        optim = ParamTransformingOptimizer([group], pre=pre, lr=1.0)
    with pytest.warns(UserWarning, match=message):
        ParamTransformingOptimizer([x], pre=pre, defaults={"max_norm": 1})
    attached = SGD([group], lr=1.0)
    with pytest.warns(UserWarning, match=message):
        attach(attached, pre=pre)
    for warned in (optim, attached, copy.deepcopy(optim)):  # once
        warned.step()
        warned.load_state_dict(warned.state_dict())
        warned.step()
    optim = ParamTransformingOptimizer([{"params": [x], "factor": 1, "lr": 0.1}], pre=pre)  # which of the two?
    with pytest.warns(UserWarning, match='group 1 has the key "max"'):
        optim.add_param_group({"params": [param(1.0)], "max": 1})
    ParamTransformingOptimizer([{"params": [x], "eps": 0.1}], Adam, pre=clip_adaptive(0.1))  # which is that of Adam
    assert ParamTransformingOptimizer([group], pre=clip.named(max_norm="max_norm")).param_groups[0]["max_norm"] == 1


def test_value_that_a_schedule_moves_out_of_range() -> None:
    x = param(3.0, grad=[1.0])
    optim = ParamTransformingOptimizer([x], post=project_l2_ball(2.0), lr=1.0)
    optim.param_groups[0]["project_l2_ball.radius"] = -1.0
    with pytest.raises(ValueError, match="post, group 0, .*project_l2_ball.radius must be >= 0, got -1.0"):
        optim.step()
    assert x.item() == 3.0


def test_context() -> None:
    seen: dict[str, Any] = {}

    def record(slot: str) -> Transform:
        def transform(tensor: Tensor, group: Group) -> Tensor:
            seen[slot] = {key: group[key].tolist() for key in ("param", "grad") if key in group}, group["epsilon"]
            return tensor

        return transform

    x = param(1.0, 2.0, grad=[3.0, 4.0])
    ParamTransformingOptimizer(
        [x], pre=record("pre"), post=record("post"), param_ndim=None, defaults={"epsilon": 0.5}, lr=1.0
    ).step()
    assert seen["pre"] == ({"param": [1.0, 2.0]}, 0.5)
    assert seen["post"] == ({"grad": [3.0, 4.0]}, 0.5)


def test_param_ndim_per_group() -> None:
    grad = [[3.0, 4.0], [0.0, 2.0]]
    xs = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    for x in xs:
        x.grad = torch.tensor(grad)
    groups = [{"params": [x], "param_ndim": n} for x, n in zip(xs, (0, 1, None), strict=True)]
    ParamTransformingOptimizer(groups, pre=normalize(), lr=1.0).step()
    expected = torch.tensor(grad)
    torch.testing.assert_close(xs[0].grad, expected.sgn())
    torch.testing.assert_close(xs[1].grad, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    torch.testing.assert_close(xs[2].grad, expected / expected.norm())


def test_parameters_without_gradient_get_post_but_not_pre() -> None:
    x, y = param(5.0), param(5.0, grad=[-3.0])
    ParamTransformingOptimizer([x, y], pre=sign(), post=clamp(max=4), grad_bias=1.0, lr=1.0).step()
    assert x.grad is None
    assert (x.item(), y.item()) == (4.0, 4.0)


def test_gradients_and_parameters_are_written_in_place() -> None:
    x = param(1.0, grad=[-3.0])
    grad, data = x.grad, x.data_ptr()
    ParamTransformingOptimizer([x], pre=sign(), post=clamp(max=1), lr=1.0).step()
    assert x.grad is grad
    assert x.data_ptr() == data


def test_expanded_and_strided_gradients() -> None:
    for grad in (torch.tensor([3.0]).expand(4, 1).mT.squeeze(0), torch.full((4, 2), 3.0)[:, 0]):
        x = nn.Parameter(torch.zeros(4))
        x.grad = grad
        ParamTransformingOptimizer([x], pre=normalize(), param_ndim=None, lr=1.0).step()
        torch.testing.assert_close(x.detach(), torch.full((4,), -0.5))


def test_channels_last() -> None:
    x = nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    start, stride = x.detach().clone(), x.stride()
    x.grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    expected = broadcast(project_l2_ball(1.0), 3)(start - broadcast(normalize(), 3)(x.grad, {}), {})
    ParamTransformingOptimizer([x], pre=normalize(), post=project_l2_ball(1.0), param_ndim=3, lr=1.0).step()
    torch.testing.assert_close(x.detach(), expected)
    assert x.stride() == stride


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    x = param(3.0)
    optim = ParamTransformingOptimizer([x], pre=sign(), lr=1.0)

    def closure() -> Tensor:
        optim.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optim.step(closure).item() == 9.0
    assert x.item() == 2.0
    assert optim.step(closure=closure).item() == 4.0
    assert x.item() == 1.0


def test_lbfgs_transforms_every_evaluation_and_the_parameter_once() -> None:
    x = param(4.0, 3.0)
    evaluations, posts = 0, 0

    def count_post(tensor: Tensor, group: Group) -> Tensor:
        nonlocal posts
        posts += 1
        return tensor

    optim = ParamTransformingOptimizer(
        [x], LBFGS, pre=clip_by_norm(1.0), post=chain(count_post, project_l2_ball(2.0)), param_ndim=None, lr=0.5
    )

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optim.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    optim.step(closure)
    assert evaluations > 2
    assert posts == 1
    assert x.grad is not None
    assert x.grad.norm() <= 1.0 + 1e-6
    assert x.norm() <= 2.0 + 1e-6


def test_hooks_of_torch_see_the_wrapper_once() -> None:
    optim = ParamTransformingOptimizer([param(1.0, grad=[1.0])])
    calls: list[str] = []
    optim.register_step_pre_hook(lambda o, args, kwargs: calls.append(f"pre {type(o).__name__}"))
    optim.register_step_post_hook(lambda o, args, kwargs: calls.append(f"post {type(o).__name__}"))
    optim.step()
    assert calls == ["pre ParamTransformingOptimizer", "post ParamTransformingOptimizer"]


# Subclasses


class Recorder(ParamTransformingOptimizer):
    def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        assert param.grad is not None
        self.shapes = [*getattr(self, "shapes", []), ("pre", tuple(param.shape), tuple(param.grad.shape))]
        param.grad += optim_group["param_ndim"]

    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        self.shapes = [*self.shapes, ("post", tuple(param.shape), optim_group["lr"])]
        param.mul_(2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_hooks_edit_the_batch_form(memory_format: torch.memory_format) -> None:
    x = nn.Parameter(torch.ones(2, 3, 4, 5).contiguous(memory_format=memory_format))
    x.grad = torch.ones_like(x)
    optim = Recorder([x], pre=scale(3.0), param_ndim=2, grad_scale=2.0, lr=0.25)
    optim.step()
    assert optim.shapes == [("pre", (6, 4, 5), (6, 4, 5)), ("post", (6, 4, 5), 0.25)]
    assert x.grad.unique().item() == (3 + 2) * 2
    assert x.unique().item() == (1 - 0.25 * 10) * 2


class DivideByNorm(ParamTransformingOptimizer):
    def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        assert param.grad is not None
        param.grad /= param.grad.flatten(1).norm(dim=1)[:, None].reshape(-1, *[1] * (param.ndim - 1))


# found: 28
@pytest.mark.parametrize("param_ndim", [0, None])
def test_hooks_that_flatten_the_batch_form_of_a_number(param_ndim: int | None) -> None:
    x = nn.Parameter(torch.tensor(1.0))
    x.grad = torch.tensor(-4.0)
    DivideByNorm([x], param_ndim=param_ndim, lr=1.0).step()
    assert (x.item(), x.grad.item()) == (2.0, -1.0)


def test_hooks_run_by_themselves() -> None:
    x = nn.Parameter(torch.ones(2))
    x.grad = torch.ones(2)
    optim = Recorder([x], pre=scale(3.0), post=scale(0.5).named("half"), param_ndim=1, grad_bias=1.0)
    optim._apply_pre_step_transform_()
    assert x.grad.tolist() == [5.0, 5.0]
    optim._apply_post_step_transform_()
    assert x.tolist() == [1.0, 1.0]


def test_hook_that_rebinds_the_gradient() -> None:
    class Rebinding(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
            param.grad = torch.zeros_like(param)

    x = param(1.0, 2.0, grad=[3.0, 4.0])
    message = (
        r"pre, group 0, parameter 0 of shape \(2,\).*Rebinding._pre_step_transform_ rebinds param.grad; edit it in"
    )
    with pytest.raises(ValueError, match=message):
        Rebinding([x], lr=1.0).step()
    assert x.tolist() == [1.0, 2.0]
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 4.0]


def test_hook_that_rebinds_the_data() -> None:
    class Rebinding(ParamTransformingOptimizer):
        def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
            param.data = param + 1

    x = param(1.0, grad=[0.0])
    Rebinding([x]).step()
    assert x.item() == 2.0


# Groups, copies, checkpoints


def test_add_param_group() -> None:
    optim = ParamTransformingOptimizer([param(1.0)], Adam, pre=clip_by_norm(1.0), lr=0.1)
    optim.add_param_group({"params": [param(2.0)], "clip_by_norm.max_norm": 3.0})
    optim.inner_opt.add_param_group({"params": [param(3.0)]})
    assert [group["clip_by_norm.max_norm"] for group in optim.param_groups] == [1.0, 3.0, 1.0]
    assert [group["param_ndim"] for group in optim.param_groups] == [-1, -1, -1]


@pytest.mark.parametrize(
    "extra", [{"clip_by_norm.max_norm": -1.0}, {"param_ndim": 5}, {"param_ndim": "1"}, {"grad_scale": None}]
)
def test_bad_added_group_changes_nothing(extra: dict[str, Any]) -> None:
    optim = ParamTransformingOptimizer([param(1.0)], pre=clip_by_norm(1.0))
    before = copy.deepcopy(optim.param_groups)
    with pytest.raises((TypeError, ValueError), match="group 1"):
        optim.add_param_group({"params": [param(2.0)], **extra})
    assert optim.param_groups == before


def test_old_checkpoint_gets_the_defaults() -> None:
    x = param(1.0)
    optim = ParamTransformingOptimizer([x], pre=clip_by_norm(2.0), lr=0.1)
    optim.load_state_dict(SGD([x], lr=0.5).state_dict())
    assert optim.param_groups[0]["lr"] == 0.5
    assert optim.param_groups[0]["clip_by_norm.max_norm"] == 2.0


def test_state_dict_is_safe_to_load() -> None:
    optim = ParamTransformingOptimizer([param(1.0, grad=[1.0])], Adam, pre=clip_by_norm(1.0), post=lambda t, g: t)
    optim.step()
    state_dict = optim.state_dict()
    assert sorted(state_dict) == ["param_groups", "state"]
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    optim.load_state_dict(torch.load(file, weights_only=True))
    assert optim.state_dict() == state_dict


def test_state_dict_hooks() -> None:
    optim = ParamTransformingOptimizer([param(1.0)], lr=0.1)
    calls: list[str] = []
    optim.register_state_dict_pre_hook(lambda o: calls.append("before save"))
    optim.register_state_dict_post_hook(lambda o, state_dict: {**state_dict, "extra": 1})
    optim.register_load_state_dict_pre_hook(lambda o, state_dict: state_dict.pop("extra") and None)
    optim.register_load_state_dict_post_hook(lambda o: calls.append("after load"))
    state_dict = optim.state_dict()
    assert state_dict["extra"] == 1
    optim.load_state_dict(state_dict)
    assert state_dict["extra"] == 1
    assert calls == ["before save", "after load"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optim: pickle.loads(pickle.dumps(optim))])
def test_copies_go_on_alike(copied: Callable[[Any], Any]) -> None:
    optim = ParamTransformingOptimizer(
        [param(1.0, 2.0, grad=[1.0, 3.0])], Adam, pre=clip_by_norm(0.5), post=clamp(-1, 1)
    )
    scheduler = StepLR(optim, 1)
    optim.step()
    scheduler.step()
    other = copied(optim)
    assert (other.pre, other.post) == (optim.pre, optim.post)
    for each in (optim, other):
        each.param_groups[0]["params"][0].grad = torch.tensor([3.0, 1.0])
        each.step()
    assert torch.equal(optim.param_groups[0]["params"][0], other.param_groups[0]["params"][0])
    assert str(other) == str(optim)


def test_copies_of_subclasses_keep_their_attributes() -> None:
    optim = Recorder([param(1.0, grad=[1.0])], param_ndim=1)
    optim.step()
    assert pickle.loads(pickle.dumps(optim)).shapes == optim.shapes


def test_scheduler_drives_both() -> None:
    x = param(0.0, grad=[1.0])
    optim = ParamTransformingOptimizer([x], lr=1.0)
    scheduler = LambdaLR(optim, lambda k: 2 / (2 + k))
    for _ in range(3):
        optim.step()
        scheduler.step()
    assert x.item() == pytest.approx(-(1 + 2 / 3 + 1 / 2))
    assert optim.inner_opt.param_groups[0]["lr"] == pytest.approx(2 / 5)


def test_scheduler_on_the_inner_optimizer() -> None:
    inner = SGD([param(0.0, grad=[1.0])], lr=1.0)
    scheduler = StepLR(inner, 1)
    optim = ParamTransformingOptimizer(InnerOpt=inner, pre=sign())
    optim.step()
    scheduler.step()
    assert optim.param_groups[0]["lr"] == pytest.approx(0.1)


def test_grad_scaler_unscales_before_the_transforms() -> None:
    x = param(0.0)
    seen: list[float] = []

    def spy(tensor: Tensor, group: Group) -> Tensor:
        seen.append(tensor.item())
        return tensor

    optim = ParamTransformingOptimizer([x], partial(Adam, fused=True), pre=spy, param_ndim=None, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for unscale_first in (False, True):
        optim.zero_grad()
        scaler.scale(3 * x.sum()).backward()
        if unscale_first:
            scaler.unscale_(optim)
        scaler.step(optim)
        scaler.update()
    assert seen == [3.0, 3.0]
    optim.zero_grad()
    before = x.item()
    scaler.scale(float("inf") * x.sum()).backward()
    scaler.step(optim)
    assert seen == [3.0, 3.0]
    assert x.item() == before


def test_prints_chains_inner_optimizer_and_groups() -> None:
    assert repr(ParamTransformingOptimizer([param(1.0)], pre=clip_by_norm(1.0), post=clamp(max=1), lr=0.1)) == (
        """\
ParamTransformingOptimizer(
  pre=chain(
    clip_by_norm(max_norm=1.0),  # the only element
  ),
  update=chain(),
  post=chain(
    clamp(max=1),  # the only element
  ),
  inner_opt=SGD (
  Parameter Group 0
      clamp.max: 1
      clamp.min: None
      clip_by_norm.max_norm: 1.0
      dampening: 0
      differentiable: False
      foreach: None
      fused: None
      grad_bias: 0.0
      grad_scale: 1.0
      lr: 0.1
      maximize: False
      momentum: 0
      nesterov: False
      param_ndim: -1
      weight_decay: 0
  )
)"""
    )


# Errors in a step


def fail() -> Tensor:
    raise ArithmeticError("no")


@pytest.mark.parametrize("slot", ["pre", "post"])
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda t, g: t[0], ValueError, r"<lambda> must keep the shape of its input, \(2,\), got \(\)"),
        (lambda t, g: t.double(), ValueError, "<lambda> must keep the dtype of its input"),
        (lambda t, g: None, TypeError, "<lambda> must return a tensor like its input, got NoneType"),
        (lambda t, g: t.mul_(2), ValueError, "wrote to its input"),
        (lambda t, g: fail(), ArithmeticError, "no"),
        (lambda t, g: t * g["rate"], KeyError, "rate"),
    ],
)
def test_failed_transform_is_located_and_changes_nothing(
    slot: str, broken: Any, error: type[Exception], message: str
) -> None:
    xs = {"first": param(1.0, 2.0, grad=[5.0, 6.0]), "second": param(3.0, 4.0, grad=[7.0, 8.0])}
    arguments: dict[str, Any] = {slot: chain(scale(0.5), broken)}
    optim = ParamTransformingOptimizer([{"params": list(xs.items())}], lr=1.0, param_ndim=None, **arguments)
    where = rf"{slot}, group 0, parameter \d '(first|second)' of shape \(2,\), torch.float32: stage 1, broadcast\(.*"
    with pytest.raises(error, match=where + message):
        optim.step()
    assert [x.tolist() for x in xs.values()] == [[1.0, 2.0], [3.0, 4.0]]
    assert [x.grad.tolist() for x in xs.values() if x.grad is not None] == [[5.0, 6.0], [7.0, 8.0]]


# found: 32
@pytest.mark.parametrize("slot", ["pre", "post"])
@pytest.mark.parametrize("param_ndim", [0, 1, None])
def test_writing_to_an_input_is_an_error_for_sub_tensors_too(slot: str, param_ndim: int | None) -> None:
    x = nn.Parameter(torch.ones(2, 2))
    x.grad = torch.ones(2, 2)
    arguments: dict[str, Any] = {slot: lambda t, g: t.mul_(2)}
    optim = ParamTransformingOptimizer([x], lr=1.0, param_ndim=param_ndim, **arguments)
    with pytest.raises(
        ValueError, match=rf"{slot}, group 0, parameter 0 .*: <lambda> wrote to its input; return a new"
    ):
        optim.step()
    assert torch.equal(x, torch.ones(2, 2))
    assert torch.equal(x.grad, torch.ones(2, 2))


@transform
def transpose(tensor: Tensor, group: Group) -> Tensor:
    return tensor.T


VIEWS: list[Any] = [
    lambda t, g: t.T,
    transpose(),
    lambda t, g: t[1:2].expand(2, 2),
    lambda t, g: t.reshape(-1)[1:3].expand(2, 2),
    lambda t, g: t.diagonal().expand(2, 2).T,
    lambda t, g: t,
]


# found: 19
@pytest.mark.parametrize("slot", ["pre", "update", "post"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("together", [False, True])
def test_a_function_may_return_a_view_of_its_input(slot: str, view: Any, together: bool) -> None:
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = view(-grad if slot == "update" else grad, {}).clone()
    x = torch.zeros(2, 2, requires_grad=True)
    x.grad = grad.clone()
    if slot == "post":
        with torch.no_grad():
            x.add_(2 * grad)  # what the step leaves of it is grad
    arguments: dict[str, Any] = {slot: masked(view, torch.tensor(True)) if together else view}
    ParamTransformingOptimizer([x], lr=1.0, param_ndim=None, **arguments).step()
    assert torch.equal(x.detach(), -expected if slot == "pre" else expected)


def negated() -> Tensor:
    return torch.complex(torch.zeros(2, 3), torch.arange(6.0).reshape(2, 3)).conj().imag


def conjugated() -> Tensor:
    return torch.complex(torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)).conj()


def expanded() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0]).expand(2, 3)


LAZY: list[dict[str, Any]] = [
    {},
    {"pre": scale(0.5)},
    {"pre": clip_by_norm(1.0)},
    {"pre": chain(ema(0.9), lambda t, g: 2 * t)},
    {"update": cautious(), "post": scale(0.5)},
]


# found: 19
@pytest.mark.parametrize("factors", [{}, {"grad_scale": 3.0}, {"grad_scale": 3.0, "grad_bias": 1.0}], ids=str)
@pytest.mark.parametrize("slots", LAZY, ids=str)
@pytest.mark.parametrize("make", [negated, conjugated, expanded])
def test_gradients_that_are_views(make: Callable[[], Tensor], slots: dict[str, Any], factors: dict[str, Any]) -> None:
    if make is conjugated and "update" in slots:
        return  # cautious acts on real tensors
    xs = []
    for grad in (make(), make().resolve_conj().resolve_neg().contiguous()):
        x = nn.Parameter(torch.zeros(2, 3, dtype=grad.dtype))
        x.grad = grad
        optim = ParamTransformingOptimizer([x], lr=1.0, **slots, **factors)
        optim.step()
        x.grad = make().resolve_conj().resolve_neg().contiguous()  # the plan is of use for another layout, too
        optim.step()
        xs.append(x.detach())
    assert torch.equal(*xs)


def test_failed_evaluation_of_lbfgs_restores_the_parameters() -> None:
    x = param(4.0, 3.0)
    start = x.detach().clone()
    optim = ParamTransformingOptimizer(
        [x], LBFGS, pre=lambda t, g: t if g["param"].equal(start) else fail(), param_ndim=None, lr=0.5
    )

    def closure() -> Tensor:
        optim.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    with pytest.raises(ArithmeticError, match="pre, group 0, parameter 0"):
        optim.step(closure)
    assert x.tolist() == [4.0, 3.0]


def test_sparse_gradient() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1])).sum().backward()
    optim = ParamTransformingOptimizer(embedding.named_parameters(), pre=sign(), lr=1.0)
    with pytest.raises(
        TypeError, match=r"pre, group 0, parameter 0 'weight' .* need a dense gradient, got .*sparse_coo"
    ):
        optim.step()
    assert torch.equal(embedding.weight, before)
    ParamTransformingOptimizer(embedding.parameters(), post=clamp(-1, 1), lr=1.0).step()


def test_missing_context_says_which_slot_has_it() -> None:
    optim = ParamTransformingOptimizer([param(1.0, 2.0)], post=reject_from_param())
    with pytest.raises(ValueError, match=r'post, .*reject_from_param\(\) needs group\["param"\]'):
        optim.step()


def read_grad(tensor: Tensor, group: Group) -> Tensor:
    grad: Tensor = group["grad"]
    return tensor - grad


# found: 21
@pytest.mark.parametrize("param_ndim", [-1, None])
@pytest.mark.parametrize(
    "reads",
    [read_grad, transform(read_grad)(), masked(read_grad, torch.tensor(True))],
    ids=["function", "transform", "masked"],
)
def test_a_parameter_without_a_gradient_has_none_as_context(reads: Any, param_ndim: int | None) -> None:
    xs = [param(1.0, 2.0, grad=[5.0, 6.0]), param(3.0, 4.0)]
    optim = ParamTransformingOptimizer(xs, post=reads, param_ndim=param_ndim)
    missing = r'needs group\["grad"\].*, and in post where there is a gradient'
    with pytest.raises(ValueError, match=f"post, group 0, parameter 1 .*stage 0, .*{missing}"):
        optim.step()
    assert [x.tolist() for x in xs] == [[1.0, 2.0], [3.0, 4.0]]


# found: 21
def test_a_gradient_that_moves_from_one_parameter_to_another() -> None:
    conv = torch.ones(1, 2, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    xs = {"conv": conv, "a": param(1.0, grad=[5.0]), "b": param(3.0)}
    optim = ParamTransformingOptimizer(xs.items(), post=masked(read_grad, "a"), param_ndim=None, lr=1.0)
    conv.grad = torch.ones_like(conv)
    optim.step()
    xs["a"].grad, xs["b"].grad = None, torch.tensor([1.0])
    with pytest.raises(ValueError, match=r"parameter 1 'a' .* in post where there is a gradient"):
        optim.step()


def test_is_an_optimizer_also_when_its_class_is_replaced() -> None:
    x = param(1.0, grad=[-3.0])
    optim = ParamTransformingOptimizer([x], pre=sign(), lr=1.0)

    class Wrapped(ParamTransformingOptimizer):
        pass

    other = object.__new__(Wrapped)
    other.__dict__.update(optim.__dict__)
    other.step()
    assert isinstance(other, Optimizer)
    assert x.item() == 2.0
