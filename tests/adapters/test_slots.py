"""The whole step: the update slot, states, and what they survive."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, RMSprop

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    State,
    Transform,
    add,
    attach,
    broadcast,
    chain,
    clamp,
    clip_by_norm,
    ema,
    keep_top_q,
    lookahead,
    masked,
    param_ema,
    partition,
    project_l2_ball,
    scale,
    sign,
    trace,
    transform,
    with_error_feedback,
)
from tests.adapters.common import (
    assert_equal,
    average,
    make_params,
    stay_near_start,
    train,
)

INNER = [partial(SGD, lr=0.1), partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.1), partial(RMSprop, lr=0.01)]


def everywhere(params: Any, InnerOpt: Any) -> ParamTransformingOptimizer:
    return ParamTransformingOptimizer(
        params, InnerOpt, pre=chain(sign(), average()), update=average(), post=chain(average(), stay_near_start())
    )


# The update slot


@pytest.mark.parametrize("InnerOpt", INNER)
def test_update_sees_and_changes_the_displacement(InnerOpt: Any) -> None:
    params, plain = make_params(torch.float64), make_params(torch.float64)
    seen: list[Group] = []

    def spy(tensor: Tensor, group: Group) -> Tensor:
        seen.append({"update": tensor.clone(), "param": group["param"].clone(), "grad": group["grad"].clone()})
        return 0.5 * tensor

    optim = ParamTransformingOptimizer(params, InnerOpt, update=spy, param_ndim=None)
    inner = InnerOpt(plain)
    for step in range(3):
        seen.clear()
        for ours, theirs in zip(params, plain, strict=True):
            theirs.data.copy_(ours.data)
        starts = [param.detach().clone() for param in params]
        train(optim, params, range(step, step + 1))
        train(inner, plain, range(step, step + 1))
        for start, ours, theirs, call in zip(starts, params, plain, seen, strict=False):
            torch.testing.assert_close(ours.detach(), start + 0.5 * (theirs.detach() - start))
            assert_equal(call["param"], start)
            assert_equal(call["grad"], ours.grad)
            torch.testing.assert_close(call["update"], theirs.detach() - start)
        assert len(seen) == 2


# found: 42
@pytest.mark.parametrize("update", [clip_by_norm(9.0), scale(1.0), lambda tensor, group: tensor, clamp(-1, 1)])
def test_infinite_parameters_that_do_not_move_stay(update: Transform) -> None:
    inf, nan = float("inf"), float("nan")
    x, finite = nn.Parameter(torch.tensor([-inf, inf, 2.0, inf])), nn.Parameter(torch.tensor([1.0]))
    optim = ParamTransformingOptimizer([x, finite], update=update, param_ndim=None, lr=1.0)
    for _ in range(2):
        x.grad, finite.grad = torch.tensor([0.0, 0.0, 0.5, 0.0]), torch.tensor([0.5])
        optim.step()
    assert x.tolist() == [-inf, inf, 1.0, inf]
    assert finite.item() == 0.0
    x.grad = torch.tensor([0.0, 0.0, nan, inf])
    optim.step()
    assert x[2:].isnan().all()


def test_update_that_changes_nothing_is_exact() -> None:
    params, plain = make_params(), make_params()
    train(ParamTransformingOptimizer(params, Adam, update=lambda u, group: u, param_ndim=None), params, range(5))
    train(Adam(plain), plain, range(5))
    assert_equal(params, plain)


def test_update_without_any_gradient() -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    ParamTransformingOptimizer(params, update=lambda u, group: 2 * u, lr=1.0).step()
    assert_equal([param.detach() for param in params], before)


def test_all_slots_in_order() -> None:
    x = nn.Parameter(torch.tensor([1.0, -1.0]))
    x.grad = torch.tensor([4.0, -8.0])
    optim = ParamTransformingOptimizer([x], pre=sign(), update=scale(3.0), post=clamp(-1.5, 9), lr=1.0)
    optim.step()
    assert x.tolist() == [-1.5, 2.0]
    assert optim.update == chain(scale(3.0))


# States


def test_states_by_hand() -> None:
    x = torch.tensor([1.0, 2.0])
    group: Group = {}
    t = chain(sign(), average())
    state = t.init(x, group)
    assert set(state) == {"average.mean", "average.count"}
    out, new_state = t.update(x, group, state)
    torch.testing.assert_close(out, torch.tensor([0.1, 0.1]))
    assert state["average.count"].item() == 0
    assert new_state["average.count"].item() == 1
    with pytest.raises(
        TypeError, match=r"chain\(sign\(\), average\(\)\) has a state.*state = t.init\(tensor, group\); tens"
    ):
        t(x, group)


def test_states_by_sub_tensor() -> None:
    @transform(init=lambda tensor, group: {"largest": torch.zeros(())})
    def divide_by_record(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        largest = state["largest"].maximum(tensor.abs().amax())
        return tensor / largest, {"largest": largest}

    rows = broadcast(divide_by_record(), 1)
    state = rows.init(torch.zeros(2, 2), {})
    for values, expected in (
        ([[1.0, 2.0], [4.0, 8.0]], [[0.5, 1.0], [0.5, 1.0]]),
        ([[1.0, 1.0]] * 2, [[0.5, 0.5], [0.125, 0.125]]),
    ):
        out, state = rows.update(torch.tensor(values), {}, state)
        assert out.tolist() == expected
    assert state["largest"].tolist() == [2.0, 8.0]


@pytest.mark.parametrize("InnerOpt", INNER)
def test_states_live_beside_those_of_the_inner_optimizer(InnerOpt: Any) -> None:
    params, plain = make_params(), make_params()
    optim = everywhere(params, InnerOpt)
    train(optim, params, range(3))
    inner = InnerOpt(plain)
    train(inner, plain, range(3))
    for ours, theirs in zip(params, plain, strict=True):
        kept = optim.state.get(ours, {})
        assert kept.keys() - {"transforms"} == inner.state.get(theirs, {}).keys()
        assert ("transforms" in kept) == (ours.grad is not None)
    assert counts(optim, "post") == [3, 3, 3]
    assert counts(optim, "pre") == [3, 3]


def counts(optim: ParamTransformingOptimizer, slot: str) -> list[int]:
    """What the ``average`` of a slot has counted, where there is a state."""
    key, states = f"{slot}.average.count", optim._engine.states.by_param.values()
    return [int(state[key]) for state in states if key in state]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_in_the_middle(copied: Callable[[Any], Any]) -> None:
    params = make_params()
    optim = everywhere(params, Adam)
    train(optim, params, range(3))
    other_params, other = copied((params, optim))
    train(optim, params, range(3, 6))
    train(other, other_params, range(3, 6))
    assert_equal(other_params, params)
    assert_equal(other.state_dict(), optim.state_dict())


def test_a_bare_inner_optimizer_can_load_it() -> None:
    params = make_params()
    optim = everywhere(params, Adam)
    train(optim, params, range(3))
    bare = Adam(params)
    bare.load_state_dict(
        {**optim.state_dict(), "state": {k: v for k, v in optim.state_dict()["state"].items() if k < 2}}
    )
    train(bare, params, range(3, 5))


def test_states_advance_once_a_step_however_often_the_closure_is_called() -> None:
    x = nn.Parameter(torch.tensor([4.0, 3.0]))
    optim = ParamTransformingOptimizer([x], partial(LBFGS, max_iter=5), pre=average(), post=average(), lr=0.5)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optim.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    optim.step(closure)
    assert evaluations > 2
    assert [optim.state[x]["transforms"][f"{slot}.average.count"].item() for slot in ("pre", "post")] == [1, 1]


def test_post_starts_at_the_parameters_before_the_first_step() -> None:
    x = nn.Parameter(torch.tensor([4.0]))
    optim = ParamTransformingOptimizer([x], post=stay_near_start(), lr=1.0)
    x.grad = torch.tensor([2.0])
    optim.step()
    assert x.item() == 3.0


# Rehearsals, as torch.distributed.checkpoint makes them


@pytest.mark.parametrize("InnerOpt", INNER)
def test_step_without_lr_and_gradients_moves_nothing(InnerOpt: Any) -> None:
    params = make_params()
    optim = everywhere(params, InnerOpt)
    before = [param.detach().clone() for param in params]
    for group in optim.param_groups:
        group["lr"] = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    optim.step()
    assert_equal([param.detach() for param in params], before)
    assert set(counts(optim, "pre")) == {0}


# Instances that others touch too


def test_wrapping_an_instance_again_replaces_the_earlier_wrapper() -> None:
    x = nn.Parameter(torch.tensor([3.0]))
    inner = SGD([x], lr=1.0)
    ParamTransformingOptimizer(InnerOpt=inner, pre=clip_by_norm(1.0), defaults={"epsilon": 1})
    inner.param_groups[0]["grad_bias"] = 0.5
    optim = ParamTransformingOptimizer(InnerOpt=inner, pre=clip_by_norm(2.0))
    assert optim.param_groups[0]["clip_by_norm.max_norm"] == 2.0
    assert optim.param_groups[0]["grad_bias"] == 0.5
    assert "epsilon" not in {**optim.param_groups[0], **optim.defaults}


def test_loading_into_the_inner_optimizer() -> None:
    x = nn.Parameter(torch.tensor([3.0]))
    optim = ParamTransformingOptimizer([x], pre=clip_by_norm(1.0), lr=1.0)
    optim.inner_opt.load_state_dict(SGD([x], lr=2.0).state_dict())
    x.grad = torch.tensor([5.0])
    optim.step()
    assert x.item() == 1.0


def test_sparse_gradient_is_no_context() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optim = ParamTransformingOptimizer(embedding.parameters(), post=project_l2_ball(0.1), lr=0.1)
    optim.step()
    assert embedding.weight.norm(dim=1).max() <= 0.1 + 1e-6


def test_hook_that_fails_after_it_moved_a_parameter() -> None:
    class Failing(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
            param.add_(1)
            if param.numel() == 2:
                raise ArithmeticError("no")

    params = make_params()
    before = [param.detach().clone() for param in params]
    with pytest.raises(ArithmeticError):
        train(Failing(params), params, range(4, 5))
    assert_equal([param.detach() for param in params], before)


def test_transform_that_writes_to_its_context() -> None:
    def writes(tensor: Tensor, group: Group) -> Tensor:
        group["param"].zero_()
        return tensor

    params = make_params()
    with pytest.raises(ValueError, match=r'pre, group 0, .*: writes wrote to group\["param"\]; return a new tensor'):
        train(ParamTransformingOptimizer(params, pre=writes, param_ndim=None), params, range(1))


# Chains that are replaced


def with_chains(params: Any, chains: dict[str, Any]) -> ParamTransformingOptimizer:
    return ParamTransformingOptimizer(params, **chains)


# found: 22
@pytest.mark.parametrize("slot", ["pre", "update", "post"])
def test_a_chain_with_other_states_in_place_of_one(slot: str) -> None:
    params, plain = make_params(), make_params()
    kept = average() if slot == "post" else masked(average(), lambda group: True)
    optim = with_chains(params, {slot: chain(kept, ema(0.9), with_error_feedback(sign()))})
    train(optim, params, range(2))
    states = copy.deepcopy(optim._engine.states.by_param[params[0]])
    setattr(optim, slot, chain(trace(0.9), ema(0.5), average()))
    now, kept_paths = optim._engine.states.by_param[params[0]], (f"{slot}.average.", f"{slot}.ema.")
    assert_equal(now, {key: value for key, value in states.items() if key.startswith(kept_paths)})
    other = with_chains(plain, {slot: chain(trace(0.9), ema(0.5), average())})
    other.load_state_dict(copy.deepcopy(optim.state_dict()))
    for theirs, ours in zip(plain, params, strict=True):
        theirs.data.copy_(ours.data)
    train(optim, params, range(2, 5))
    train(other, plain, range(2, 5))
    assert_equal(params, plain)
    assert_equal(optim.state_dict(), other.state_dict())


# found: 22
def test_a_transform_of_the_same_name_with_another_state() -> None:
    def cumulate(**first: Tensor) -> Any:
        @transform(init=lambda tensor, group: dict(first))
        def cumulate(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
            return tensor + sum(state.values()), state

        return cumulate()

    x = nn.Parameter(torch.ones(2))
    optim = ParamTransformingOptimizer([x], post=cumulate(a=torch.ones(2)), param_ndim=None)
    optim.step()
    optim.post = cumulate(b=2 * torch.ones(2))
    optim.step()
    assert x.tolist() == [4.0, 4.0]


# found: 43
def test_defaults_of_a_chain_in_place_of_one() -> None:
    x, y = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [x]}, {"params": [y], "clip_by_norm.max_norm": 2.0}]
    optim = ParamTransformingOptimizer(
        groups, pre=chain(clip_by_norm(1.0), ema(0.9)), lr=1.0, param_ndim=None, defaults={"epsilon": 3.0}
    )
    optim.pre = chain(clip_by_norm(5.0), add(0.0))
    for param in (x, y):
        param.grad = torch.full((4,), 10.0)
    optim.step()
    assert [param.norm().item() for param in (x, y)] == [5.0, 2.0]
    assert [(group["clip_by_norm.max_norm"], group["epsilon"]) for group in optim.param_groups] == [(5, 3), (2, 3)]
    assert not any("ema.decay" in known for known in (optim.defaults, *optim.param_groups))
    assert (optim.defaults["clip_by_norm.max_norm"], optim.defaults["add.bias"]) == (5.0, 0.0)
    optim.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert optim.param_groups[2]["clip_by_norm.max_norm"] == 5.0
    optim.pre = clip_by_norm(6.0)  # type: ignore[assignment]
    assert optim.pre == chain(clip_by_norm(6.0))
    optim.pre = None  # type: ignore[assignment]
    assert optim.pre == chain()
    assert not any("clip_by_norm.max_norm" in group for group in optim.param_groups)


# found: 43
def test_a_default_given_beside_a_chain_outlives_it() -> None:
    x = nn.Parameter(torch.zeros(4))
    optim = ParamTransformingOptimizer([x], pre=clip_by_norm(1.0), defaults={"clip_by_norm.max_norm": 3.0})
    optim = copy.deepcopy(optim)
    optim.pre = chain(clip_by_norm(5.0))
    assert (optim.param_groups[0]["clip_by_norm.max_norm"], optim.defaults["clip_by_norm.max_norm"]) == (3.0, 3.0)


# found: 43
@pytest.mark.parametrize(
    ("pre", "error"),
    [(clip_by_norm, "is the factory"), (3, "must be a callable"), (chain(clamp(0.0, 1.0)), "group 0: stage 0, clamp")],
)
def test_a_chain_that_cannot_replace_one(pre: Any, error: str) -> None:
    optim = ParamTransformingOptimizer([{"params": make_params(), "clamp.max": -1.0}], pre=clamp(-2.0, 1.0))
    before, groups = optim.pre, copy.deepcopy(optim.param_groups)
    with pytest.raises((TypeError, ValueError), match=error):
        optim.pre = pre
    assert optim.pre is before
    assert_equal(optim.param_groups, groups)


# found: 43
@pytest.mark.filterwarnings("ignore:.*partition has the kind")
@pytest.mark.parametrize("average", [param_ema(0.5, debias=False), lookahead(9, 0.5)])
@pytest.mark.parametrize("deeper", [False, True])
def test_averages_of_the_selected_entries(average: Any, deeper: bool) -> None:
    x = nn.Parameter(torch.tensor([[4.0, 8.0]]))
    mask = torch.tensor([True, False])
    inner = masked(chain(average, scale(1.0)), torch.tensor([[True, True]])) if deeper else average
    optim = ParamTransformingOptimizer([("x", x)], post=partition({"y": chain(), "*": masked(inner, mask)}), lr=1.0)
    x.grad = torch.tensor([[2.0, 2.0]])
    optim.step()
    start = 4.0 if "lookahead" in repr(average) else 3.0
    with optim.averaged():
        assert x.tolist() == [[start, 6.0]]
    assert x.tolist() == [[2.0, 6.0]]


# found: 43
def test_grad_scale_of_a_sparse_gradient() -> None:
    embedding, other = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    optim = ParamTransformingOptimizer([embedding.weight, other], grad_scale=2.0, lr=1.0)
    nn.init.zeros_(embedding.weight)  # so that the differences are exact
    (embedding(torch.tensor([1, 1, 3])).sum() + other.sum()).backward()
    optim.step()
    assert embedding.weight.tolist() == [[0.0, 0.0], [-4.0, -4.0], [0.0, 0.0], [-2.0, -2.0]]
    assert other.tolist() == [-1.0, -1.0]
    optim.param_groups[0]["grad_bias"] = 1.0
    with pytest.raises(
        TypeError, match=r"group 0, parameter 0 of shape .*grad_bias .* needs a dense .*sparse_coo; use"
    ):
        optim.step()


# found: 20
@pytest.mark.parametrize("attaches", [False, True])
def test_numbers_of_numpy_are_saved_as_those_of_python(attaches: bool) -> None:
    np = pytest.importorskip("numpy")
    params = make_params()
    groups: list[dict[str, Any]] = [
        {"params": params[:1], "clip_by_norm.max_norm": np.float32(0.5), "param_ndim": np.int64(0)},
        {"params": params[1:], "epsilon": np.float16(2.0)},
    ]
    arguments: dict[str, Any] = {
        "pre": chain(clip_by_norm(np.float64(1.0)), keep_top_q(np.float32(0.5)), broadcast(scale(2), np.int64(1))),
        "post": lookahead(np.int64(2), np.float64(0.5)),
        "param_ndim": np.int64(-1),
        "defaults": {"epsilon": np.float64(3.0)},
    }
    optim: Any = SGD(groups) if attaches else ParamTransformingOptimizer(groups, grad_scale=np.float64(2), **arguments)
    if attaches:
        attach(optim, **arguments)
    optim.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lookahead.k": np.int32(3)})

    def save() -> Any:
        file = io.BytesIO()
        torch.save(optim.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)["param_groups"]

    saved = save()
    kinds = {type(value) for group in [*saved, optim.defaults] for key, value in group.items() if "." in key}
    assert kinds == {int, float}
    assert [group["lookahead.k"] for group in saved] == [2, 2, 3]
    assert [group["param_ndim"] for group in saved] == [0, -1, -1]
    optim.param_groups[0]["clip_by_norm.max_norm"] = np.float64(0.25)
    assert save()[0]["clip_by_norm.max_norm"] == 0.25
    train(optim, params, range(2))
    assert type(optim.param_groups[0]["clip_by_norm.max_norm"]) is float
    optim.load_state_dict({**optim.state_dict(), "param_groups": [{**g, "epsilon": np.float64(9)} for g in saved]})
    assert save()[0]["epsilon"] == 9.0


# found: 20
def test_options_and_hyperparameters_that_are_numbers_of_numpy() -> None:
    np = pytest.importorskip("numpy")
    ours = chain(clip_by_norm(np.float64(2.0), ord=np.int64(1)), broadcast(scale(np.int32(2)), np.int64(0)))
    assert repr(ours) == "chain(clip_by_norm(max_norm=2.0, ord=1), broadcast(scale(factor=2), param_ndim=0))"
    with pytest.raises(TypeError, match=r"clip_by_norm.max_norm must be a number, got array"):
        clip_by_norm(np.ones(2))
