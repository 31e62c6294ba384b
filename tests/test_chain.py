"""``chain``: composition, the sequence of members, and errors that say where."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    broadcast,
    chain,
    clamp,
    clip_by_norm,
    freeze,
    masked,
    partition,
    reject_from_param,
    scale,
    sign,
    with_error_feedback,
)

X = torch.tensor([-2.0, 0.0, 3.0])


def halve(tensor: Tensor, group: Group) -> Tensor:
    return tensor / 2


def test_applies_from_left_to_right() -> None:
    assert torch.equal(chain(sign(), halve)(X, {}), torch.tensor([-0.5, 0.0, 0.5]))
    assert torch.equal(chain(halve, sign())(X, {}), sign()(X, {}))


def test_laws_of_composition() -> None:
    f, g, h = sign(), scale(2.0), halve
    assert chain()(X, {}) is X
    assert torch.equal(chain(f)(X, {}), f(X, {}))
    assert chain(f, chain(g, h)) == chain(chain(f, g), h) == chain(f, g, h)
    assert torch.equal(chain(f, g, h)(X, {}), h(g(f(X, {}), {}), {}))


def test_is_an_immutable_sequence_of_its_members() -> None:
    members = sign(), halve, scale(2.0)
    whole = chain(*members)
    assert tuple(whole) == members
    assert whole[1] is halve
    assert whole[1:] == chain(halve, scale(2.0))
    assert len(whole) == 3
    assert not chain()
    assert halve in whole
    with pytest.raises(TypeError):
        whole[0] = sign()  # type: ignore[index]


def test_is_a_value() -> None:
    whole = chain(sign(), halve)
    for copied in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
        assert copied == whole
        assert hash(copied) == hash(whole)
    assert whole != chain(halve, sign())
    assert repr(whole) == "chain(sign(), halve)"
    assert repr(chain()) == "chain()"


def test_merges_hyperparameters() -> None:
    assert chain(clamp(-1, 1), halve, scale(2.0)).hyperparameters == {
        "clamp.min": -1,
        "clamp.max": 1,
        "scale.factor": 2.0,
    }


# found: 27
@pytest.mark.parametrize(
    ("whole", "factors"),
    [
        (chain(scale(0.9), sign(), scale(1.1)), {"scale": 0.9, "scale_2": 1.1}),
        (chain(scale(2.0), halve, scale(2.0)), {"scale": 2.0, "scale_2": 2.0}),
        (chain(chain(scale(1.0), scale(2.0)), scale(3.0)), {"scale": 1.0, "scale_2": 2.0, "scale_3": 3.0}),
        (chain(scale(2.0), broadcast(scale(3.0), 1)), {"scale": 2.0, "scale_2": 3.0}),
        (chain(scale(2.0), masked(scale(3.0), "a")), {"scale": 2.0, "scale_2": 3.0}),
        (
            chain(scale(2.0), freeze("a"), masked(chain(scale(3.0), scale(4.0)), torch.tensor(True))),
            {"scale": 2.0, "scale_2": 3.0, "scale_3": 4.0},
        ),
        (
            chain(partition({"a": scale(1.0), "*": scale(2.0)}), with_error_feedback(chain(scale(3.0), scale(4.0)))),
            {"scale": 1.0, "scale_2": 2.0, "scale_3": 3.0, "scale_4": 4.0},
        ),
        (broadcast(chain(scale(1.0), masked(scale(2.0), "a")), 1), {"scale": 1.0, "scale_2": 2.0}),
        (chain(scale(1.0), scale(2.0).named("second"), scale(3.0)), {"scale": 1.0, "second": 2.0, "scale_2": 3.0}),
        (chain(scale(1.0), scale(2.0).named("scale")), {"scale_2": 1.0, "scale": 2.0}),
        (chain(scale(1.0), scale(2.0), scale(3.0).named("scale_2")), {"scale": 1.0, "scale_3": 2.0, "scale_2": 3.0}),
        (chain(scale(2.0).named("a"), scale(2.0).named("a")), {"a": 2.0}),
    ],
    ids=repr,
)
def test_the_second_of_a_kind_has_keys_of_its_own(whole: Any, factors: dict[str, float]) -> None:
    assert whole.hyperparameters == {f"{prefix}.factor": factor for prefix, factor in factors.items()}


# found: 27
def test_the_members_of_a_chain_with_two_of_a_kind_are_what_was_given() -> None:
    whole = chain(scale(0.9), sign(), scale(1.1))
    assert whole[2] == scale(1.1)
    assert repr(whole) == "chain(scale(factor=0.9), sign(), scale(factor=1.1))"
    assert chain(whole[2]).hyperparameters == {"scale.factor": 1.1}
    for copied in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
        assert copied == whole
        assert copied.hyperparameters == whole.hyperparameters
    assert torch.allclose(whole(X, {}), torch.tensor([-1.1, 0.0, 1.1]))
    assert torch.allclose(whole(X, {"scale.factor": 5.0, "scale_2.factor": 2.0}), torch.tensor([-2.0, 0.0, 2.0]))
    assert torch.allclose(chain(scale(1.0), masked(scale(1.0), "a"))(X, {"name": "a", "scale_2.factor": 2.0}), 2 * X)
    with pytest.raises(ValueError, match=r"stage 1, clip_by_norm\(max_norm=2.0\): clip_by_norm_2.max_norm must be > 0"):
        chain(clip_by_norm(1.0), clip_by_norm(2.0)).check({"clip_by_norm_2.max_norm": 0})


def test_one_name_with_two_defaults() -> None:
    message = (
        r'"a.max" has two defaults: 1 \(stage 0, clamp\(min=-1, max=1\).named\(\'a\'\)\) and 2 '
        r"\(stage 2, clamp\(min=-1, max=2\).named\('a'\)\)\. .*\.named\("
    )
    with pytest.raises(ValueError, match=message):
        chain(clamp(-1, 1).named("a"), sign(), clamp(-1, 2).named("a"))
    with pytest.raises(ValueError, match="two defaults"):
        chain(scale(2.0).named("a"), broadcast(scale(3.0).named("a"), 1))


@pytest.mark.parametrize("member", [3, None, "sign", torch.ones(2)])
def test_member_that_is_not_callable(member: object) -> None:
    with pytest.raises(TypeError, match=r"member 1 of a chain must be a callable \(tensor, group\) -> tensor, got"):
        chain(sign(), member)  # type: ignore[arg-type]


def test_factory_that_was_not_called() -> None:
    with pytest.raises(TypeError, match=r"member 0 of a chain is the factory clip_by_norm.*call it: clip_by_norm\("):
        chain(clip_by_norm)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda t, g: t[:1], ValueError, r"must keep the shape of its input, \(3,\), got \(1,\)"),
        (lambda t, g: t.double(), ValueError, "must keep the dtype of its input, torch.float32, got torch.float64"),
        (lambda t, g: t.to("meta"), ValueError, "must keep the device of its input, cpu, got meta"),
        (lambda t, g: None, TypeError, "must return a tensor like its input, got NoneType"),
        (lambda t, g: t.mul_(2), ValueError, "wrote to its input; return a new tensor instead"),
        (lambda t, g: 1 / 0, ZeroDivisionError, "division by zero"),
        (lambda t, g: t * g["rate"], KeyError, "rate"),
        (reject_from_param(), ValueError, r'needs group\["param"\], .*\(3,\).*the keys \[\'lr\'\]'),
    ],
)
def test_broken_member_is_located(
    broken: Callable[[Tensor, Group], Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"stage 1, (<lambda>|reject_from_param\(\)): .*{message}"):
        chain(sign(), broken)(X.clone(), {"lr": 0.1})


def test_member_out_of_range_is_located() -> None:
    with pytest.raises(ValueError, match=r"stage 1, clip_by_norm\(max_norm=1.0\): clip_by_norm.max_norm must be > 0"):
        chain(sign(), clip_by_norm(1.0)).check({"clip_by_norm.max_norm": 0})


# found: 36
@pytest.mark.parametrize("members", [[sign(), scale(2.0)], (sign(), scale(2.0))])
@pytest.mark.parametrize(
    ("compose", "place"),
    [
        (chain, "member 0 of a chain"),
        (lambda members: masked(members, "a"), "member 0 of masked"),
        (lambda members: broadcast(members, 1), "the argument of broadcast"),
        (lambda members: ParamTransformingOptimizer([torch.ones(1)], pre=members), "pre"),
        (lambda members: ParamTransformingOptimizer([torch.ones(1)], post=members), "post"),
    ],
)
def test_a_list_in_place_of_a_chain(compose: Any, place: str, members: Any) -> None:
    text = rf"{place} must be one transform, got a (list|tuple); write chain\(sign\(\), scale\(factor=2.0\)\), without"
    with pytest.raises(TypeError, match=text):
        compose(members)
