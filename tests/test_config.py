"""Chains and optimizers as data: a config gives back what it was written of, and nothing that was not asked for."""

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import pytest
import torch
from annotated_types import Gt
from torch import Tensor, nn, tensor
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import gradchain
from gradchain import (
    FROM_GROUP,
    Group,
    ParamTransformingOptimizer,
    Transform,
    attach,
    broadcast,
    chain,
    clamp,
    clip_by_norm,
    ema,
    freeze,
    from_config,
    keep_top_q,
    masked,
    normalize,
    partition,
    project_box,
    project_l2_ball,
    project_linf_ball,
    scale,
    sign,
    to_config,
    transform,
    with_error_feedback,
)
from tests.cases import CASES
from tests.differential import case as vocabulary
from tests.differential import make_case


@transform
def damp(tensor: Tensor, group: Group, rate: Annotated[float, Gt(0)], *, twice: bool = False) -> Tensor:
    return tensor / (1 + rate * tensor.abs()) ** (1 + twice)


def double(tensor: Tensor, group: Group) -> Tensor:
    return 2 * tensor


def is_wide(group: Group) -> bool:
    return bool(group["param"].ndim > 1)


class OwnOptimizer(ParamTransformingOptimizer):
    """An optimizer of one's own, as it can be written."""


OWN = [__name__]
COMBINED = [
    chain(),
    chain(scale(0.9), sign(), scale(1.1).named("last"), scale(2.0).named("scale")),
    broadcast(chain(normalize(), broadcast(clip_by_norm(1.0), None), freeze("*.bias")), 1),
    broadcast(normalize()),
    masked(chain(sign(), scale(2.0)), "*.weight"),
    masked(scale(2.0), tensor([True, False])),
    partition({"*.bias": chain(), "*": chain(sign(), scale(2.0))}),
    partition({0: sign(), None: scale(2.0)}, by="kind"),
    partition({"a": project_l2_ball(FROM_GROUP).named(radius="epsilon"), 0.5: clamp(-1, 1).named("own", min="low")}),
    with_error_feedback(chain(keep_top_q(0.5), with_error_feedback(broadcast(keep_top_q(0.5), 1)))),
    project_box(tensor([[1 / 3, 1e-7], [-torch.inf, 0.1]]), tensor([0.7, 1e30], dtype=torch.float64)),
    project_box(tensor(-1), tensor(0.1, dtype=torch.bfloat16)),
]
WITH_OWN = [
    damp(1.0),
    chain(double, damp(0.5, twice=True).named("a"), broadcast(double, None)),
    masked(damp(1.0), is_wide),
    with_error_feedback(double),
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def through_json(config: object) -> Any:
    return json.loads(json.dumps(config, sort_keys=True))


def assert_same_steps(*makers: Callable[[nn.Module], Optimizer]) -> None:
    results = []
    for make in makers:
        net = model()
        optimizer = make(net)
        for step in range(3):
            optimizer.zero_grad()
            net(torch.full((5, 3), 0.1 * step + 0.5)).square().sum().backward()
            optimizer.step()
        results.append(net.state_dict())
    for result in results[1:]:
        assert all(torch.equal(value, result[name]) for name, value in results[0].items())


@pytest.mark.parametrize("value", [*(case.transform for case in CASES), *COMBINED], ids=repr)
def test_chains_return(value: Transform) -> None:
    config = through_json(to_config(value))
    assert from_config(config) == value
    assert to_config(from_config(config)) == to_config(value)


@pytest.mark.parametrize("value", WITH_OWN, ids=repr)
def test_chains_with_functions_of_ones_own_return(value: Transform) -> None:
    config = through_json(to_config(value))
    assert from_config(config, allow=OWN) == value
    with pytest.raises(ValueError, match=rf"{__name__}\.\w+ is not allowed; .* allow=\['{__name__}'\]"):
        from_config(config)


@pytest.mark.parametrize("value", COMBINED, ids=repr)
def test_prints_as_what_evaluates_to_it(value: Transform) -> None:
    again = eval(repr(value), vars(gradchain))
    assert again == value
    assert hash(again) == hash(value)


@pytest.mark.parametrize("seed", range(100))
def test_random_chains_return(seed: int) -> None:
    case = make_case(seed)
    for text in (case.pre, case.update, case.post):
        value = eval(text, vocabulary.LIBRARY)
        assert eval(repr(value), vars(gradchain) | vocabulary.OWN) == value
        assert from_config(through_json(to_config(value)), allow=[vocabulary.__name__]) == value


def test_is_short() -> None:
    assert to_config(chain(sign(), masked(clamp(max=0.5).named("top"), "*.bias"))) == {
        "_target_": "gradchain.chain",
        "_args_": [
            {"_target_": "gradchain.sign"},
            {
                "_target_": "gradchain.masked",
                "transform": {
                    "_target_": "gradchain.bound.BoundTransform.named",
                    "_args_": [{"_target_": "gradchain.clamp", "max": 0.5}, "top"],
                },
                "where": "*.bias",
            },
        ],
    }
    assert to_config(double) == {"_target_": "hydra.utils.get_object", "path": f"{__name__}.double"}
    assert to_config(project_box(tensor([0.1]), 1.0))["lower"] == {"_target_": "torch.tensor", "data": [0.1]}


def test_large_tensors_are_written_whole() -> None:
    box = project_box(torch.randn(40, 50), 5.0)
    assert "..." in repr(box)
    assert from_config(through_json(to_config(box))) == box


TEXT = """
{
  "_target_": "gradchain.ParamTransformingOptimizer",
  "InnerOpt": {"_target_": "torch.optim.AdamW", "_partial_": true, "lr": 0.01, "betas": [0.9, 0.95]},
  "pre": {
    "_target_": "gradchain.chain",
    "_args_": [
      {"_target_": "gradchain.zero_nonfinite"},
      {"_target_": "gradchain.masked",
       "transform": {"_target_": "tests.test_config.damp", "rate": 0.5}, "where": "2.*"},
      {"_target_": "gradchain.clip_by_global_norm", "max_norm": 0.5}
    ]
  },
  "update": {"_target_": "gradchain.freeze", "where": "0.bias"},
  "post": {"_target_": "gradchain.project_l2_ball", "radius": 0.9},
  "param_ndim": null,
  "defaults": {"project_l2_ball.radius": 0.8, "note": "from a file"}
}
"""


def by_code(net: nn.Module) -> ParamTransformingOptimizer:
    return ParamTransformingOptimizer(
        net.named_parameters(),
        partial(AdamW, lr=0.01, betas=(0.9, 0.95)),
        pre=chain(gradchain.zero_nonfinite(), masked(damp(0.5), "2.*"), gradchain.clip_by_global_norm(0.5)),
        update=freeze("0.bias"),
        post=project_l2_ball(0.9),
        param_ndim=None,
        defaults={"project_l2_ball.radius": 0.8, "note": "from a file"},
    )


def by_text(net: nn.Module) -> Any:
    return from_config(json.loads(TEXT), net.named_parameters(), allow=["torch.optim", *OWN])


def test_a_text_makes_the_optimizer_that_code_makes() -> None:
    assert_same_steps(by_code, by_text)


def test_optimizers_return() -> None:
    config = to_config(by_code(model()))
    assert config["InnerOpt"] == {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.01, "betas": [0.9, 0.95]}
    assert config["defaults"] == {"project_l2_ball.radius": 0.8, "note": "from a file"}
    again = from_config(through_json(config), model().named_parameters(), allow=["torch.optim", *OWN])
    assert to_config(again) == config
    assert_same_steps(by_code, lambda net: from_config(config, net.named_parameters(), allow=["torch.optim", *OWN]))


def test_several_optimizers_return() -> None:
    def by_code(net: nn.Module) -> ParamTransformingOptimizer:
        inner: Any = {"*.weight": partial(Adagrad, lr=0.02), "*": partial(AdamW, lr=3e-4)}
        groups = {"2.*": {"weight_decay": 0.5}, "*.bias": {"lr": 0.01}}
        return ParamTransformingOptimizer(net.named_parameters(), inner, groups=groups, pre=clip_by_norm(0.1))

    config = to_config(by_code(model()))
    assert config["groups"] == {
        "_target_": "builtins.dict",  # of pairs: the order counts
        "_args_": [[["2.*", {"weight_decay": 0.5}], ["*.bias", {"lr": 0.01}]]],
    }
    again = from_config(through_json(config), model().named_parameters(), allow=["torch.optim"])
    assert to_config(again) == config
    assert_same_steps(by_code, lambda net: from_config(config, net.named_parameters(), allow=["torch.optim"]))


def test_optimizers_write_their_chains_as_they_are_now() -> None:
    optimizer = OwnOptimizer(model().parameters(), pre=clip_by_norm(1.0), lr=0.1, momentum=0.9)
    optimizer.pre = chain(scale(2.0), scale(3.0))
    assert to_config(optimizer) == {
        "_target_": f"{__name__}.OwnOptimizer",
        "InnerOpt": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "momentum": 0.9},
        "pre": to_config(chain(scale(2.0), scale(3.0))),
    }


def test_attached_returns() -> None:
    def first(net: nn.Module) -> Optimizer:
        optimizer = SGD(net.parameters(), lr=0.1)
        attach(optimizer, pre=scale(0.5))
        return optimizer

    chains: dict[str, Any] = {"pre": chain(scale(2.0), ema(0.5)), "post": project_linf_ball(0.4)}
    config = to_config(attach(first(model()), **chains, defaults={"a": 1}))
    assert config == {
        "_target_": "gradchain.attach",
        "pre": to_config(chains["pre"]),
        "post": {"_target_": "gradchain.project_linf_ball", "radius": 0.4},
        "defaults": {"a": 1},
    }

    def by_code(net: nn.Module) -> Optimizer:
        optimizer = first(net)
        attach(optimizer, **chains)
        return optimizer

    def by_config(net: nn.Module) -> Optimizer:
        optimizer = first(net)
        from_config(config, optimizer)
        return optimizer

    assert_same_steps(by_code, by_config)


def test_follows_the_rules_of_hydra() -> None:
    half = {"_target_": "gradchain.scale", "factor": 0.5}
    assert from_config({"pre": half, "post": [half, 1]}) == {"pre": scale(0.5), "post": [scale(0.5), 1]}
    assert from_config({**half, "_convert_": "all"}, factor=2.0) == scale(2.0)
    assert from_config({"_target_": "gradchain.scale", "_args_": [0.5]}, 2.0) == scale(2.0)
    assert from_config({"_target_": "gradchain.chain", "_args_": [half]}, sign()) == chain(sign())
    assert from_config({**half, "_partial_": True})() == scale(0.5)
    raw = from_config({"_target_": "builtins.dict", "a": half, "b": [half], "_recursive_": False})
    assert raw == {"a": half, "b": [half]}


def test_kinds_of_parameters_get_what_is_partial() -> None:
    config = {"*.weight": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.02}}
    made = from_config(config, allow=["torch.optim"])["*.weight"]
    assert (made.func, made.keywords) == (AdamW, {"lr": 0.02})


def call(target: object, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


ADAMW = "torch.optim.AdamW"


@pytest.mark.parametrize(
    ("config", "allow", "kind", "message"),
    [
        (call("gradchain.clip_by_nrm"), [], ValueError, "_target_: gradchain has no 'clip_by_nrm' .*'clip_by_norm'"),
        ({"pre": [call("scal")]}, [], ValueError, r"^pre\[0\]._target_: scal is not allowed"),
        (call("gradchain.chain", _args_=[call("gradchain.clip_by_norm", max_nrm=1.0)]), [], TypeError,
         r"^_args_\[0\].max_nrm: clip_by_norm has no argument 'max_nrm'; did you mean 'max_norm'\?$"),
        (call("gradchain.scale", by=2), [], TypeError, r"^by: scale has no argument 'by'; there are \['factor'\]$"),
        ({"pre": call("gradchain.chain", _args_=[call("gradchain.clip_by_norm", max_norm=-1.0)])}, [], ValueError,
         r"^pre._args_\[0\]: clip_by_norm.max_norm must be > 0, got -1.0$"),
        (call("gradchain.clip_by_norm", max_norm="1"), [], TypeError, "^clip_by_norm.max_norm must be a number"),
        ({"InnerOpt": {"*.weight": call(ADAMW, _partial_=True, lrr=1)}}, ["torch.optim"], TypeError,
         r'^InnerOpt\["\*.weight"\].lrr: AdamW has no argument .* \'lr\''),
        (call(ADAMW), [], ValueError, r"torch.optim.AdamW is not allowed; .* allow=\['torch.optim'\]\)$"),
        (call("torch.optim.Adm"), ["torch.optim"], ValueError, "torch.optim.Adm cannot be imported"),
        (call("torch.optim.Adam.stp"), ["torch.optim"], ValueError, "torch.optim.Adam has no 'stp'"),
        (call("gradchain.FROM_GROUP"), [], TypeError, "is nothing to call, but FROM_GROUP; .*get_object"),
        (call("gradchain.chain", _args_="ab"), [], TypeError, "^_args_ must be a list, got 'ab'"),
        (call(3), [], TypeError, "^_target_ must be a name, such as gradchain.chain, got 3"),
        (call("hydra.utils.get_object"), [], TypeError, "^path must be a name"),
        ("_target_: gradchain.sign", [], TypeError, "yaml.safe_load"),
        (call("gradchain.sign"), "torch.optim", TypeError, r"allow must be a sequence of names"),
    ],
)  # fmt: skip
def test_errors(config: Any, allow: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        from_config(config, allow=allow)


def test_what_gets_arguments_has_to_be_named() -> None:
    with pytest.raises(TypeError, match="config has no _target_"):
        from_config({"pre": {"_target_": "gradchain.sign"}}, model().parameters())


@pytest.mark.parametrize(
    ("name", "allow"),
    [
        ("os.system", []),
        ("builtins.eval", []),
        ("gradchain", []),
        ("gradchain.torch.os.system", []),
        ("gradchain.broadcast.os.system", []),
        ("gradchain.contract.show", []),
        ("gradchain.__builtins__.eval", []),
        ("gradchain.from_config", []),  # which could allow more
        ("torch.optimizer", ["torch.optim"]),
        ("torch.optim.adam.torch.os.system", ["torch.optim"]),
        ("torch.optim.optimizer.deepcopy", ["torch.optim"]),
        ("torch.optim.Adam.__init__.__globals__.get", ["torch.optim"]),
        (f"{__name__}.json.loads", OWN),
        (f"{__name__}.partial", OWN),
    ],
)
@pytest.mark.parametrize("form", [lambda name: call(name), lambda name: call("hydra.utils.get_object", path=name)])
def test_what_is_not_allowed_is_refused(name: str, allow: list[str], form: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"(not allowed|gradchain has no|keeps to itself)"):
        from_config(form(name), allow=allow)


def test_what_is_allowed_by_itself_is_found() -> None:
    assert from_config(call("torch.optim.optimizer.deepcopy", x=[1]), allow=["torch.optim.optimizer.deepcopy"]) == [1]


def local(tensor: Tensor, group: Group) -> Tensor:
    return tensor


def make_local() -> Transform:
    def local(tensor: Tensor, group: Group) -> Tensor:
        return tensor

    return local


class Bare(Optimizer):
    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: chain(sign(), lambda tensor, group: tensor), r"^_args_\[1\]: <lambda> has no import path; define it"),
        (lambda: masked(make_local(), "a"), "^transform: local has no import path"),
        (lambda: transform(make_local())(), "^the value: local has no import path"),
        (lambda: keep_top_q(0.5, dq=0.1, generator=torch.Generator()), "^generator: Generator is no plain data"),
        (lambda: SGD(model().parameters()), "^to_config needs a transform, .* got SGD$"),
        (lambda: ParamTransformingOptimizer(model().parameters(), pre=make_local()), "^pre: local has no import path"),
        (lambda: ParamTransformingOptimizer(InnerOpt=Bare(model().parameters(), 1.0)),
         r"^InnerOpt: Bare does not tell its arguments \['rate'\]"),
        (lambda: ParamTransformingOptimizer(InnerOpt=[SGD(model().parameters())]),
         "^InnerOpt: several optimizers must say which parameters each takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(value: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        to_config(value())
