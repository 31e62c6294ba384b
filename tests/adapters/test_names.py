"""Names of parameters: by a model, through its wrappers, and patterns that match none of them."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import SGD

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    attach,
    chain,
    freeze,
    masked,
    normalize,
    partition,
    scale,
    sign,
    step_in_backward,
    with_error_feedback,
)
from gradchain.engine.names import named_parameters


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]


def train(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


# found: 13
@pytest.mark.parametrize("adapter", ["params", "groups", "instance", "attach"])
def test_a_model_names_the_parameters(adapter: str) -> None:
    def adapt(own: nn.Module, pre: Any, **given: Any) -> Any:
        params: Any = [*own.parameters()]
        if adapter == "groups":
            params = [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}]
        if adapter == "attach":
            attach(optimizer := SGD(params, lr=0.1), pre=pre, **given)
            return optimizer
        if adapter == "instance":
            return ParamTransformingOptimizer(InnerOpt=SGD(params, lr=0.1), pre=pre, **given)
        return ParamTransformingOptimizer(params, pre=pre, lr=0.1, **given)

    def by_index(group: Group) -> bool:
        return group["index"] in (1, 3)

    model, other = make_model(), make_model()
    optimizer = adapt(model, masked(scale(3.0), "*.bias"), model=model)
    expected = train(adapt(other, masked(scale(3.0), by_index)), other)
    torch.testing.assert_close(train(optimizer, model), expected)
    assert "param_names" not in optimizer.param_groups[0]
    message = r'group ., parameter 0 of shape \(1,\).*reads group."name".*model.named_parameters.., or model=model'
    group = {"params": [nn.Parameter(torch.ones(1))]}
    if adapter == "attach":
        optimizer.add_param_group(group)
        with pytest.raises(ValueError, match='pre: .*reads group."name"'):
            optimizer.step()
    else:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)


# found: 13
def test_names_are_found_again_after_copies_and_for_new_groups() -> None:
    model = make_model()
    optimizer = ParamTransformingOptimizer(model[0].parameters(), pre=masked(scale(3.0), "*.bias"), model=model)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [member.name for member in copied._engine.param_table.entries] == NAMES[:2]
    optimizer.add_param_group({"params": [*model[1].parameters()]})
    assert [member.name for member in optimizer._engine.param_table.entries] == NAMES
    model[0].weight = nn.Parameter(torch.ones(2, 3))
    optimizer.param_groups[0]["params"][0] = model[0].weight  # as Accelerate does it
    assert [member.name for member in optimizer._engine.param_table.entries] == NAMES
    train(optimizer, model)
    assert optimizer.explain()["1.bias"].number == 3
    with step_in_backward(optimizer):
        model(torch.ones(4, 3)).sum().backward()


# found: 13
def test_the_model_is_not_kept_alive_and_its_names_stay() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, pre=scale(2.0), model=nn.ModuleDict({"net": model}))
    attach(optimizer, update=freeze("net.0.*"))
    before = next(model.parameters()).detach().clone()
    after = train(optimizer, model)
    assert torch.equal(after["0.weight"], before)
    params = [*model.parameters()]
    del model
    assert [param.shape for param in params] == [(2, 3), (2,), (1, 2), (1,)]


# found: 13
def test_a_shared_parameter_has_its_first_name_and_given_names_stay_where_the_model_has_none() -> None:
    model = make_model()
    tied, weight = nn.Linear(3, 2), next(model.parameters())
    tied.register_parameter("weight", weight)
    model.add_module("tied", tied)
    assert [*named_parameters(model).values()] == [*NAMES, "tied.bias"]
    other = nn.Parameter(torch.ones(1))
    params: list[tuple[str, Tensor]] = [("first", weight), ("other", other)]
    optimizer = ParamTransformingOptimizer(params, pre=masked(sign(), "other"), model=model)
    assert [member.name for member in optimizer._engine.param_table.entries] == ["0.weight", "other"]


# found: 13
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            make_model(),
            ValueError,
            "model, a Sequential, has none of the parameters of the optimizer; give the model",
        ),
        ([nn.Linear(1, 1)], TypeError, "model must be a torch.nn.Module, got list"),
    ],
)
def test_a_model_that_is_not_that_of_the_optimizer(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ParamTransformingOptimizer([nn.Parameter(torch.ones(1))], model=model)
    with pytest.raises(error, match=message):
        attach(SGD([nn.Parameter(torch.ones(1))]), model=model)


# Wrappers


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# found: 13
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")
def test_names_without_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    compiled: Any = torch.compile(make_model())
    partly, compiled_part = make_model(), torch.compile(make_model()[1])
    assert isinstance(compiled_part, nn.Module)
    partly[1] = checkpoint_wrapper(compiled_part)
    sharded: Any = fully_shard(make_model())
    named_so = nn.ModuleDict({"module": make_model()})
    wrapped = [DataParallel(make_model()), DistributedDataParallel(make_model()), compiled, partly, sharded]
    wrapped += [torch.compile(DistributedDataParallel(make_model())), DistributedDataParallel(compiled)]
    for model in wrapped:
        assert [*named_parameters(model).values()] == NAMES
        assert set(named_parameters(model)) == set(model.parameters())
    assert [*named_parameters(named_so).values()] == [f"module.{name}" for name in NAMES]


def of_peft(name: str, **children: nn.Module) -> nn.Module:
    """A module of a class that PEFT could have."""
    module: nn.Module = type(name, (nn.Module,), {"__module__": "peft.tuners"})()
    for key, child in children.items():
        module.add_module(key, child)
    return module


def lora(layer: nn.Module, *adapters: str) -> nn.Module:
    parts = {key: nn.ModuleDict({a: nn.Linear(1, 1, bias=False) for a in adapters}) for key in ("lora_A", "lora_B")}
    return of_peft("Linear", base_layer=layer, **parts)


# found: 13
@pytest.mark.parametrize("adapters", [["default"], ["one", "two"]])
def test_names_without_what_peft_adds(adapters: list[str]) -> None:
    model = make_model()
    saved = of_peft("Saved", original_module=model[1], modules_to_save=nn.ModuleDict(dict.fromkeys(adapters, model[1])))
    model[0], model[1] = lora(model[0], *adapters), saved
    peft = of_peft("PeftModel", base_model=of_peft("LoraModel", model=model))
    names = list(named_parameters(DataParallel(peft)).values())
    suffixes = [""] if len(adapters) == 1 else [f".{adapter}" for adapter in adapters]
    of_adapters = [f"0.{part}{suffix}.weight" for part in ("lora_A", "lora_B") for suffix in suffixes]
    assert names == [*NAMES[:2], *of_adapters, "1.original_module.weight", "1.original_module.bias"]
    own = nn.ModuleDict({"base_model": nn.ModuleDict({"model": make_model()})})
    assert [*named_parameters(own).values()] == [f"base_model.model.{name}" for name in NAMES]


# Patterns that match nothing


def test_a_pattern_is_compared_with_the_parts_of_long_names() -> None:
    model = nn.ModuleDict({"wte": nn.Linear(1, 1), "decoder": nn.ModuleDict({"lora_A": nn.Linear(1, 1, bias=False)})})
    with pytest.raises(ValueError, match=r"matches '\*lora_A.default.weight'; there are 'decoder.lora_A.weight', "):
        ParamTransformingOptimizer(model.named_parameters(), pre=masked(sign(), "*lora_A.default.weight"))


# found: 35
@pytest.mark.parametrize(
    "transform",
    [
        freeze("*baias"),
        masked(scale(2.0), "*baias"),
        chain(sign(), with_error_feedback(masked(sign(), "*baias"))),
        masked(masked(chain(sign(), sign()), torch.tensor(True)), "*baias"),
        partition({"0.*": masked(sign(), "*baias"), "*": chain()}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("slot", ["pre", "update", "post"])
def test_a_pattern_that_matches_no_parameter(transform: Any, slot: str) -> None:
    message = rf"^{slot}: stage ., .*: no parameter has a name that matches '\*baias'; there are .*'0.bias'.*function"
    model = make_model()
    chains = {slot: transform}
    with pytest.raises(ValueError, match=message):
        ParamTransformingOptimizer(model.named_parameters(), **chains)
    optimizer = SGD(model.parameters())
    groups = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=message):
        attach(optimizer, model=model, **chains)
    assert str(optimizer.param_groups) == str(groups)
    replaced = ParamTransformingOptimizer(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        setattr(replaced, slot, transform)


# found: 35
def test_a_kind_of_partition_that_matches_no_parameter() -> None:
    kinds = partition({"*baias": sign(), "*.bias": scale(2.0), "*.weight": normalize(), "*": chain()})
    model = make_model()
    with pytest.warns(UserWarning, match=r"post: partition has the kind '\*baias', which no name matches; there"):
        ParamTransformingOptimizer(model.named_parameters(), post=kinds)
    with pytest.warns(UserWarning, match=r"post: partition has the kind '\*baias'") as caught:
        attach(SGD(model.parameters()), post=kinds, model=model)
    assert len(caught) == 1


# found: 35
def test_patterns_are_for_all_parameters_and_not_for_a_group_that_joins() -> None:
    model = make_model()
    optimizer = ParamTransformingOptimizer(model[:1].named_parameters(), update=freeze("0.*"))
    optimizer.add_param_group({"params": [("1.weight", model[1].weight)]})
    optimizer.load_state_dict(optimizer.state_dict())
    ParamTransformingOptimizer([{"params": []}], update=freeze("0.*"))

    def is_late(group: Group) -> bool:
        return bool(group["name"] == "late")

    ParamTransformingOptimizer(model.named_parameters(), update=freeze(is_late))


# found: 14
@pytest.mark.parametrize("adapter", ["wrapper", "attach"])
@pytest.mark.parametrize("slot", ["pre", "update", "post"])
def test_a_function_of_the_group_finds_the_parameter(adapter: str, slot: str) -> None:
    def is_matrix(group: Group) -> bool:
        param: Tensor = group["param"]
        return param.ndim == 2

    ones = torch.ones(2)
    assert masked(scale(0.0), is_matrix)(ones, {"param": torch.ones(2, 2)}).tolist() == [0.0, 0.0]
    alone = masked(scale(0.0), is_matrix)
    transforms = [alone, masked(alone, torch.tensor(True)), with_error_feedback(alone), chain(sign(), alone)]
    for transform in transforms:
        matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        chains: dict[str, Any] = {slot: transform}
        if adapter == "attach":
            optimizer: Any = SGD([matrix, vector], lr=0.25)
            attach(optimizer, **chains)
        else:
            optimizer = ParamTransformingOptimizer([matrix, vector], lr=0.25, **chains)
        for _ in range(2):
            matrix.grad, vector.grad = torch.ones(2, 2), torch.ones(2)
            optimizer.step()
        assert matrix.unique().tolist() == [0.0 if slot == "post" else 1.0]
        assert vector.unique().tolist() != matrix.unique().tolist()
