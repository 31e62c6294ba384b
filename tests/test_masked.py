"""``masked``, ``partition`` and ``freeze``: which parameters, which entries, which kind."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    broadcast,
    chain,
    clamp,
    freeze,
    masked,
    normalize,
    partition,
    scale,
    sign,
    transform,
)


def is_wide(group: Group) -> bool:
    return bool(group["wide"])


def total(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {"total": torch.stack([tensor.sum() for tensor in tensors]).sum()}


@transform(measure=total)
def divide_by_total(tensor: Tensor, group: Group) -> Tensor:
    everything: Tensor = group["total"]
    return tensor / everything


@transform(init=lambda tensor, group: {"count": torch.zeros(())})
def count(tensor: Tensor, group: Group, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return tensor + state["count"], {"count": state["count"] + 1}


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("where", "group", "selected"),
    [
        ("*.bias", {"name": "fc.bias"}, True),
        ("*.bias", {"name": "fc.weight"}, False),
        (is_wide, {"wide": True}, True),
        (is_wide, {"wide": False}, False),
    ],
)
def test_masked_by_parameter(where: Any, group: Group, selected: bool) -> None:
    assert masked(scale(2.0), where)(ONES, group).tolist() == ([2.0] * 3 if selected else [1.0] * 3)
    assert freeze(where)(ONES, group).tolist() == ([0.0] * 3 if selected else [1.0] * 3)


def test_masked_by_entry() -> None:
    where = torch.tensor([True, False, True])
    assert masked(scale(2.0), where)(ONES, {}).tolist() == [2.0, 1.0, 2.0]
    assert masked(scale(2.0), where)(torch.ones(2, 3), {}).tolist() == [[2.0, 1.0, 2.0]] * 2
    assert masked(chain(normalize(), sign()), where)(2 * ONES, {}).tolist() == [1.0, 2.0, 1.0]


def test_partition() -> None:
    by_name = partition({"*.bias": sign(), "fc.*": scale(2.0), "*": chain()})
    results = [by_name(3 * ONES, {"name": name})[0].item() for name in ("fc.bias", "fc.weight", "conv.weight")]
    assert results == [1.0, 6.0, 3.0]
    by_kind = partition({1: sign(), None: scale(2.0)}, by="kind")
    assert [by_kind(3 * ONES, {"kind": kind})[0].item() for kind in (1, None)] == [1.0, 6.0]


def test_view_over_all_tensors_is_one_over_the_selected() -> None:
    tensors = [torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([4.0])]
    groups = [{"name": name} for name in ("a", "b", "a")]
    for selecting in (masked(divide_by_total(), "a"), partition({"a": divide_by_total(), "*": chain()})):
        results, _ = selecting.run(tensors, groups, [{}] * 3)
        torch.testing.assert_close(torch.cat(results), torch.tensor([0.2, 3.0, 0.8]))


def test_state_is_that_of_the_selected() -> None:
    for selecting in (masked(count(), "a"), partition({"a": count(), "*": chain()})):
        for name, expected in (("a", 2.0), ("b", 1.0)):
            state = selecting.init(ONES, {"name": name})
            for _ in range(2):
                result, state = selecting.update(ONES, {"name": name}, state)
            assert result[0].item() == expected


def test_broadcast_reaches_the_members() -> None:
    assert broadcast(masked(normalize(), "a"), 1) == masked(broadcast(normalize(), 1), "a")
    assert broadcast(partition({"*": normalize()}), 1) == partition({"*": broadcast(normalize(), 1)})
    assert masked(chain(sign(), normalize()), "a") == chain(masked(sign(), "a"), masked(normalize(), "a"))


VALUES = [
    masked(scale(2.0), "*.bias"),
    masked(scale(2.0), is_wide),
    masked(scale(2.0), torch.tensor([True, False])),
    partition({"*.bias": scale(2.0), "*": sign()}),
    freeze("*"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_are_values(value: Any) -> None:
    for copied in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert copied == value
        assert hash(copied) == hash(value)
    assert [other for other in VALUES if other == value] == [value]


def test_print() -> None:
    assert [repr(value) for value in VALUES] == [
        "masked(scale(factor=2.0), '*.bias')",
        "masked(scale(factor=2.0), is_wide)",
        "masked(scale(factor=2.0), torch.tensor([True, False]))",
        "partition({'*.bias': scale(factor=2.0), '*': sign()}, by='name')",
        "masked(set_to_zero(), '*')",
    ]


def test_hyperparameters_are_those_of_the_members() -> None:
    assert masked(scale(2.0), "a").hyperparameters == {"scale.factor": 2.0}
    assert partition({"a": scale(2.0), "b": clamp(max=1)}).hyperparameters.keys() == {
        "scale.factor",
        "clamp.min",
        "clamp.max",
    }
    with pytest.raises(ValueError, match="two defaults"):
        partition({"a": scale(2.0).named("c"), "b": scale(3.0).named("c")})
    with pytest.raises(TypeError, match=r"scale.factor must be a number"):
        masked(scale(2.0), "a").check({"scale.factor": "x"})


@pytest.mark.parametrize("where", [3, None, torch.ones(3)])
def test_where_of_the_wrong_type(where: Any) -> None:
    with pytest.raises(TypeError, match="where must be a pattern of names, a function"):
        masked(scale(2.0), where)


def test_several_patterns() -> None:
    with pytest.raises(TypeError, match=r"got \['a', 'b'\]; for several patterns, chain one for each"):
        freeze(["a", "b"])  # type: ignore[arg-type]


def test_no_name_and_no_kind() -> None:
    with pytest.raises(ValueError, match=r'reads group\["name"\], .*give the optimizer model.named_parameters\(\)'):
        masked(scale(2.0), "a")(ONES, {})
    with pytest.raises(ValueError, match=r'has no transform for group\["name"\], \'b\'; add one'):
        partition({"a": sign()})(ONES, {"name": "b"})
    with pytest.raises(ValueError, match=r'reads group\["kind"\], .*set it in the param groups'):
        partition({"a": sign()}, by="kind")(ONES, {})


def test_in_an_optimizer() -> None:
    model = nn.Linear(3, 2)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    optim = ParamTransformingOptimizer(
        model.named_parameters(), torch.optim.AdamW, update=freeze("bias"), pre=masked(sign(), "weight"), lr=0.1
    )
    for _ in range(3):
        optim.zero_grad()
        model(torch.ones(3)).sum().backward()
        optim.step()
    assert torch.equal(model.bias, start["bias"])
    assert not torch.equal(model.weight, start["weight"])
