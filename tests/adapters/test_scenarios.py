"""What holds in the same way where chains are around an optimizer and where they are attached to it."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Adam, Optimizer

from gradchain import Group, chain, ema, normalize, project_l2_ball
from tests.adapters.common import (
    CHAINS,
    EVERYWHERE,
    INNER,
    LBFGS_LIKE,
    OWN,
    STATEFUL,
    WITHOUT_CLOSURE,
    assert_equal,
    attached,
    average,
    make_params,
    run,
    train,
    wrapped,
)

each_adapter = pytest.mark.parametrize("adapt", [wrapped, attached])


@pytest.mark.parametrize("InnerOpt", INNER.values(), ids=INNER)
@pytest.mark.parametrize("chains", CHAINS.values(), ids=CHAINS)
def test_same_numbers(InnerOpt: Any, chains: dict[str, Any]) -> None:
    assert_equal(run(attached, InnerOpt, chains), run(wrapped, InnerOpt, chains))


@pytest.mark.parametrize("chains", STATEFUL.values(), ids=STATEFUL)
def test_same_numbers_with_every_state(chains: dict[str, Any]) -> None:
    assert_equal(run(attached, INNER["Adam"], chains), run(wrapped, INNER["Adam"], chains))


def stop_and_go_on(
    save: Callable[..., Optimizer], load: Callable[..., Optimizer], make: Callable[..., Optimizer], stop: int, **kw: Any
) -> Optimizer:
    """The optimizer after a stop, compared with one that has not stopped."""
    dtype = kw.pop("dtype", torch.float32)
    whole, params = make_params(dtype), make_params(dtype)
    expected = load(make(whole), **kw)
    train(expected, whole, range(8))
    first = save(make(params), **kw)
    train(first, params, range(stop))
    file = io.BytesIO()
    torch.save({"params": params, "optim": first.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = [nn.Parameter(param.detach()) for param in loaded["params"]]
    second = load(make(fresh), **kw)
    second.load_state_dict(loaded["optim"])
    train(second, fresh, range(stop, 8))
    assert_equal(fresh, whole)
    assert_equal(second.state_dict()["state"], expected.state_dict()["state"])
    if save is load:
        assert_equal(second.state_dict(), expected.state_dict())
    return second


def tensors(state: Any) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors(value)
        else:
            yield value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("InnerOpt", WITHOUT_CLOSURE)
@pytest.mark.parametrize(
    ("chains", "save", "load", "stop"),
    [
        (OWN, wrapped, wrapped, 3),
        (OWN, wrapped, wrapped, 5),
        (OWN, attached, attached, 5),
        (EVERYWHERE, attached, attached, 3),
        (EVERYWHERE, attached, wrapped, 3),
        (EVERYWHERE, wrapped, attached, 3),
    ],
)
def test_stop_save_load_go_on(
    InnerOpt: Any, dtype: torch.dtype, chains: dict[str, Any], save: Any, load: Any, stop: int
) -> None:
    optimizer = stop_and_go_on(save, load, InnerOpt, stop, dtype=dtype, **chains)
    states = [each for state in optimizer.state_dict()["state"].values() for each in tensors(state["transforms"])]
    assert {state.dtype for state in states if state.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("adapt", "inner"),
    [*((wrapped, name) for name in ("SGD", "SGD with momentum", "Adam", "RMSprop")), (attached, "Adam")],
)
@pytest.mark.parametrize("chains", STATEFUL.values(), ids=STATEFUL)
def test_every_stateful_transform_of_the_catalogue_goes_on(chains: dict[str, Any], adapt: Any, inner: str) -> None:
    stop_and_go_on(adapt, adapt, INNER[inner], 3, **chains)  # the last parameter has had no gradient yet


@each_adapter
def test_distributed_checkpoint(adapt: Any) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        chains = {"pre": chain(normalize(), ema(0.9), average()), "post": project_l2_ball(0.1)}
        return model, adapt(Adam(model.parameters(), lr=0.1), **chains)

    model, optimizer = make()
    train(optimizer, list(model.parameters()), range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model, other = make()
    before = copy.deepcopy(other_model.state_dict())
    get_optimizer_state_dict(other_model, other)  # which makes a step, to see the state
    assert_equal(other_model.state_dict(), before)
    set_optimizer_state_dict(other_model, other, saved)
    other_model.load_state_dict(model.state_dict())
    train(optimizer, list(model.parameters()), range(3, 5))
    train(other, list(other_model.parameters()), range(3, 5))
    assert_equal([other_model.state_dict(), other.state_dict()], [model.state_dict(), optimizer.state_dict()])


@each_adapter
@pytest.mark.parametrize("slot", ["pre", "update", "post"])
@pytest.mark.parametrize("InnerOpt", INNER.values(), ids=INNER)
def test_a_failing_transform_changes_no_parameter(adapt: Any, InnerOpt: Any, slot: str) -> None:
    params = make_params()[: 1 if InnerOpt in LBFGS_LIKE else 3]
    fails = False

    def fail_sometimes(tensor: Tensor, group: Group) -> Tensor:
        if fails:
            raise ArithmeticError("no")
        return tensor

    named = [(f"p{number}", param) for number, param in enumerate(params)]
    param_ndim = None if adapt is wrapped else -1
    chains = {**EVERYWHERE, slot: chain(EVERYWHERE[slot], fail_sometimes), "param_ndim": param_ndim}
    optimizer = adapt(InnerOpt(named), **chains)
    train(optimizer, params, range(2))
    before, states = copy.deepcopy(([p.detach() for p in params], transform_states(optimizer)))
    fails = True
    where = rf"{slot}, group 0, parameter 0 'p0' of shape \(3, 2\), .*: stage \d, .*: no"
    with pytest.raises(ArithmeticError, match=where):
        train(optimizer, params, range(2, 3))
    assert_equal([p.detach() for p in params], before)
    assert_equal(transform_states(optimizer), states)
    fails = False
    train(optimizer, params, range(2, 5))


def transform_states(optimizer: Optimizer) -> dict[Any, Any]:
    return {key: state["transforms"] for key, state in optimizer.state_dict()["state"].items()}
