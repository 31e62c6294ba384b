"""``@transform``: hyperparameters, ranges, and transforms as values."""

import copy
import functools
import inspect
import pickle
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Gt, Interval
from torch import Tensor

from gradchain import (
    FROM_GROUP,
    Group,
    ParamTransformingOptimizer,
    State,
    broadcast,
    chain,
    clamp,
    clip_by_norm,
    ema,
    keep_top_q,
    normalize,
    project_box,
    project_hyperplane,
    project_l2_ball,
    scale,
    sign,
)
from gradchain import transform as make_transform


@make_transform
def power(
    tensor: Tensor,
    group: Group,
    exponent: Annotated[float, Gt(0)],
    offset: Annotated[float, Interval(ge=-1, le=1)] = 0.0,
    *,
    mode: Literal["odd", "even"] = "odd",
    times: int = 1,
) -> Tensor:
    """Raise to a power."""
    result = tensor.abs() ** exponent + offset
    return times * (result * tensor.sgn() if mode == "odd" else result)


X = torch.tensor([-2.0, 3.0])


def test_group_key_wins_over_default() -> None:
    squared = power(2.0)
    assert squared(X, {}).tolist() == [-4.0, 9.0]
    assert squared(X, {"power.exponent": 1.0}).tolist() == [-2.0, 3.0]
    assert squared(X, {"power.exponent": 1.0, "power.offset": 1.0, "other": 0}).tolist() == [-3.0, 4.0]


def test_options_are_not_read_from_the_group() -> None:
    assert power(2.0, mode="even")(X, {"power.mode": "odd", "power.times": 3}).tolist() == [4.0, 9.0]


def test_factory_keeps_the_name_doc_and_signature_of_its_function() -> None:
    assert power.__name__ == "power"
    assert power.__doc__ == "Raise to a power."
    assert list(inspect.signature(power).parameters) == ["exponent", "offset", "mode", "times"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent": 0.0}, "power.exponent must be > 0, got 0.0"),
        ({"exponent": float("nan")}, "power.exponent must be > 0, got nan"),
        ({"exponent": 1, "offset": 2}, "power.offset must be <= 1, got 2"),
        ({"exponent": torch.tensor(-1.0)}, "power.exponent must be > 0, got tensor"),
    ],
)
def test_value_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        power(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent": "2"}, "power.exponent must be a number, got '2'"),
        ({"exponent": True}, "power.exponent must be a number, got True"),
        ({"exponent": None}, "power.exponent must be a number, got None"),
        ({"exponent": 1, "times": 1.5}, r"power.times must be an integer, got 1.5"),
        ({"exponent": 1, "mode": "both"}, "power.mode must be 'odd' or 'even', got 'both'"),
        ({}, "power: missing a required argument: 'exponent'"),
        ({"exponent": 1, "base": 2}, "power: got an unexpected keyword argument 'base'"),
    ],
)
def test_argument_of_wrong_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        power(**arguments)


@pytest.mark.parametrize("role", ["init", "start", "measure"])
def test_what_helps_a_function_gets_its_arguments(role: str) -> None:
    def first(tensor: Tensor, group: Group) -> dict[str, Tensor]:
        return {"sum": torch.zeros_like(tensor)}

    def total(tensor: Tensor, group: Group, state: State, decay: float, *, eps: float = 0.0) -> tuple[Tensor, State]:
        return tensor, state

    def scaled(tensor: Tensor, group: Group, decay: float, *, eps: float = 0.0) -> Tensor:
        return tensor

    options: dict[str, Any] = {"start": {"init": lambda tensor, group, **arguments: {}}}.get(role, {})
    given = "tensors" if role == "measure" else "tensor, group"
    message = rf"{role}=first must be a function of \({given}, decay, eps\), .*; got \(tensor.*, group.*\*\*arguments"
    with pytest.raises(TypeError, match=message):
        make_transform(**{role: first}, **options)(  # type: ignore[call-overload]
            scaled if role == "measure" else total
        )


@pytest.mark.parametrize(("factory", "given"), [(sign, (X, {})), (clip_by_norm, (X,)), (clip_by_norm, (X, 1.0))])
def test_a_factory_called_with_a_tensor(factory: Any, given: Any) -> None:
    with pytest.raises(
        TypeError, match=r"makes a transform, (sign|clip_by_norm)\(...\), which is then called with a t"
    ):
        factory(*given)


@pytest.mark.parametrize("keys", [[], ["b"], ["a", "b"]])
def test_a_state_keeps_its_keys(keys: list[str]) -> None:
    @make_transform(init=lambda tensor, group: {"a": tensor})
    def forgetful(tensor: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        return tensor, dict.fromkeys(keys, state["a"])

    with pytest.raises(ValueError, match=r"must return a state with the keys that init has made, \['a'\], got \["):
        forgetful().update(X, {}, forgetful().init(X, {}))


def test_group_value_out_of_range() -> None:
    with pytest.raises(ValueError, match="clip_by_norm.max_norm must be > 0, got -1"):
        clip_by_norm(1.0)(X, {"clip_by_norm.max_norm": -1})
    with pytest.raises(ValueError, match="clamp: needs min <= max, got min=2 and max=1"):
        clamp(-1, 1)(X, {"clamp.min": 2})


def test_tensor_hyperparameters_are_used_as_they_are() -> None:
    clip = clip_by_norm(1.0)
    assert torch.allclose(clip(X, {"clip_by_norm.max_norm": torch.tensor(2.0)}).norm(), torch.tensor(2.0))


def test_named_moves_the_keys() -> None:
    clip = clip_by_norm(1.0).named("short")
    assert clip.hyperparameters == {"short.max_norm": 1.0}
    assert clip(X, {"clip_by_norm.max_norm": 0.1, "short.max_norm": 2.0}).norm().item() == pytest.approx(2.0)
    assert repr(clip) == "clip_by_norm(max_norm=1.0).named('short')"
    assert clip != clip_by_norm(1.0)
    with pytest.raises(TypeError, match="needs a non-empty string, got ''"):
        clip.named("")


# found: 30
def test_named_gives_a_hyperparameter_a_key_without_a_prefix() -> None:
    ball = project_l2_ball(1.0).named(radius="epsilon")
    assert ball.hyperparameters == {"epsilon": 1.0}
    assert ball(X, {"epsilon": 0.5}).norm().item() == pytest.approx(0.5)
    assert repr(ball) == "project_l2_ball(radius=1.0).named(radius='epsilon')"
    assert ball != project_l2_ball(1.0)
    assert clamp(-1, 1).named("grad", max="top").hyperparameters == {"grad.min": -1, "top": 1}
    assert repr(clamp(-1, 1).named("a").named(max="top")) == "clamp(min=-1, max=1).named('a', max='top')"
    assert chain(ball, project_l2_ball(2.0)).hyperparameters == {"epsilon": 1.0, "project_l2_ball.radius": 2.0}
    with pytest.raises(ValueError, match="^epsilon must be >= 0, got -1.0"):
        ball(X, {"epsilon": -1.0})
    with pytest.raises(ValueError, match='"epsilon" has two defaults: 1.0 .* and 2.0'):
        chain(ball, project_l2_ball(2.0).named(radius="epsilon"))


# found: 30
@pytest.mark.parametrize(
    ("arguments", "keys", "error", "message"),
    [
        ((), {}, TypeError, r"named needs a prefix, or the key of a hyperparameter: .named\(min=...\)"),
        ((), {"max": ""}, TypeError, r"named\(max\) needs a non-empty string, got ''"),
        ((), {"top": "a"}, TypeError, r"there is no hyperparameter 'top'; there are \['min', 'max'\]"),
        (
            (),
            {"max": "param_ndim"},
            ValueError,
            "max cannot have the key 'param_ndim', which optimizers set themselves",
        ),
        ((), {"min": "a", "max": "a"}, ValueError, "two hyperparameters cannot have the same key"),
    ],
)
def test_named_with_keys_that_cannot_be(arguments: Any, keys: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clamp(-1, 1).named(*arguments, **keys)


# found: 30
def test_a_hyperparameter_without_a_default() -> None:
    ball = project_l2_ball(FROM_GROUP).named(radius="epsilon")
    assert repr(ball) == "project_l2_ball(radius=FROM_GROUP).named(radius='epsilon')"
    assert ball(X, {"epsilon": 0.5}).norm().item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r'no default for radius and reads group\["epsilon"\], which is not there; .*'):
        ball(X)
    with pytest.raises(ValueError, match="epsilon must be >= 0"):
        ball(X, {"epsilon": -0.5})
    with pytest.raises(ValueError, match="clamp: needs min <= max"):
        clamp(FROM_GROUP, 1.0)(X, {"clamp.min": 2.0})
    with pytest.raises(TypeError, match="keep_top_q.generator must be"):
        keep_top_q(0.5, generator=FROM_GROUP)


# found: 32
def test_a_call_by_hand_needs_no_group() -> None:
    assert torch.equal(sign()(X), X.sign())
    assert torch.equal(chain(sign(), broadcast(scale(2.0), 0))(X), 2 * X.sign())
    with pytest.raises(TypeError, match="has a state"):
        ema(0.9)(X)


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (sign(), "sign()"),
        (clip_by_norm(1.0), "clip_by_norm(max_norm=1.0)"),
        (clip_by_norm(1.0, ord=1), "clip_by_norm(max_norm=1.0, ord=1)"),
        (normalize(2.0), "normalize()"),
        (clamp(max=2), "clamp(max=2)"),
        (project_box(torch.tensor([0.0, 1.0]), 2.0), "project_box(lower=torch.tensor([0.0, 1.0]), upper=2.0)"),
    ],
)
def test_prints_as_the_call_that_made_it(value: object, printed: str) -> None:
    assert repr(value) == printed


def test_transforms_are_values() -> None:
    assert clip_by_norm(1.0) == clip_by_norm(1) != clip_by_norm(2.0)
    assert clip_by_norm(1.0) != clip_by_norm(1.0, ord=1)
    assert scale(1.0) != clip_by_norm(1.0)
    assert len({clip_by_norm(1.0), clip_by_norm(1), sign(), sign()}) == 2
    planes = [project_hyperplane(torch.tensor(a), 0.0) for a in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
    assert planes[0] == planes[1] != planes[2]
    assert len(set(planes)) == 2
    generator = torch.Generator()
    assert keep_top_q(0.5, generator=generator) == keep_top_q(0.5, generator=generator)


@pytest.mark.parametrize(
    "value",
    [
        sign(),
        clip_by_norm(1.0).named("a"),
        clamp(FROM_GROUP, 1.0).named("a", max="top"),
        project_hyperplane(torch.ones(3), 1.0),
    ],
)
def test_copies_are_equal(value: object) -> None:
    for copied in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert copied == value
        assert hash(copied) == hash(value)


def test_transforms_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot assign to field 'prefix'"):
        clip_by_norm(1.0).prefix = "a"  # type: ignore[misc]


def test_half_precision_reaches_the_function_as_float32() -> None:
    seen = []

    @make_transform
    def spy(tensor: Tensor, group: Group) -> Tensor:
        seen.append((tensor.dtype, group["param"].dtype))
        param: Tensor = group["param"]
        return tensor + param

    half = torch.ones(2, dtype=torch.bfloat16)
    assert spy()(half, {"param": half}).dtype is torch.bfloat16
    assert spy()(half.double(), {"param": half.double()}).dtype is torch.float64
    assert seen == [(torch.float32, torch.float32), (torch.float64, torch.float64)]


def test_empty_tensors_do_not_reach_the_function() -> None:
    @make_transform
    def largest(tensor: Tensor, group: Group) -> Tensor:
        return tensor - tensor.amax()

    assert largest()(torch.zeros(2, 0), {}).shape == (2, 0)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        assert sign()(torch.tensor([-2.0]), {}).item() == -1.0


def halve(tensor: Tensor) -> Tensor:
    return tensor / 2


class Halve:
    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor / 2


# found: 36
@pytest.mark.parametrize(
    ("function", "got"),
    [
        (halve, "halve(tensor: torch.Tensor) -> torch.Tensor"),
        (lambda tensor: tensor, "<lambda>(tensor)"),
        (Halve(), "Halve(tensor: torch.Tensor) -> torch.Tensor"),
        (functools.partial(torch.nn.functional.softmax, dim=0, dtype=None), "partial(softmax, dim=0, dtype=None)("),
    ],
)
def test_a_function_of_the_tensor_alone_is_no_transform(function: Any, got: str) -> None:
    for place, compose in (("pre", make_pre), ("member 0 of a chain", chain)):
        with pytest.raises(TypeError) as error:
            compose(function)
        text = str(error.value)
        assert text.startswith(f"{place} must be a callable (tensor, group) -> tensor, got {got}")
        name = got.rpartition("(")[0] if got.startswith("partial") else got.partition("(")[0]
        assert text.endswith(f"; if it is to act on the tensor alone, write lambda tensor, group: {name}(tensor)")
        assert "0x" not in text


def make_pre(function: Any) -> ParamTransformingOptimizer:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.ones(2)
    return ParamTransformingOptimizer([x], pre=function)


# found: 36
def test_a_function_of_torch_says_in_the_call_what_it_lacks() -> None:
    sign: Any = torch.sign
    optimizer = make_pre(sign)
    assert "pre=chain(\n    sign,  #" in repr(optimizer)
    for call in (optimizer.step, lambda: chain(sign)(torch.ones(2), {})):
        with pytest.raises(TypeError) as error:
            call()
        text = str(error.value)
        assert "stage 0, " in text
        assert "sign is called with (tensor, group): " in text
        assert text.endswith("; if it is to act on the tensor alone, write lambda tensor, group: sign(tensor)")
        assert "0x" not in text


def test_a_method_of_torch() -> None:
    with pytest.raises(TypeError, match=r"on the tensor alone, write lambda tensor, group: sign\(tensor\)"):
        make_pre(torch.Tensor.sign).step()  # from Python 3.13 on, it tells its arguments before


def test_type_errors_within_a_function_stay_as_they_are() -> None:
    def add_name(tensor: Tensor, group: Group) -> Tensor:
        return tensor + "name"  # type: ignore[operator]

    with pytest.raises(TypeError, match=r"^stage 0, add_name: unsupported operand"):
        chain(add_name)(torch.ones(2), {})


# found: 36
@pytest.mark.parametrize(
    ("function", "text"),
    [
        (halve, r"halve must be a function of \(tensor, group\), .*; got \(tensor: torch.Tensor\) -> "),
        (lambda tensor, factor: tensor * factor, r"<lambda> must be a function of \(tensor, group\), .*factor\)$"),
        (torch.sign, r"@transform needs a Python function, got sign, .*; write def sign\(tensor, group\)"),
    ],
)
def test_decorating_what_has_no_group(function: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text) as error:
        make_transform(function)
    assert "0x" not in str(error.value)
