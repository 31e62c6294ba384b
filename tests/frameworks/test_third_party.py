"""Optimizers of other packages, inside and around."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer

from gradchain import ParamTransformingOptimizer
from tests.frameworks.common import (
    CHAINS,
    Adapt,
    ByHand,
    assert_same,
    batches,
    make_model,
    train,
    train_with_closure,
    unwrapped,
    values,
)

pytestmark = pytest.mark.one_optimizer

others = pytest.importorskip("pytorch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

MakeOptimizer = Callable[[Any], Optimizer]


def lookahead(params: Any) -> Optimizer:
    optimizer: Optimizer = others.Lookahead(Adam(params, lr=0.05), k=3)
    return optimizer


OTHERS = {name: getattr(others, name) for name in ("AdaBelief", "Adan", "Lamb", "Lion", "Prodigy", "StableAdamW")}
ALL = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name) for name, make in {**OTHERS, "Lookahead": lookahead}.items()]
)


@ALL
def test_without_chains_it_is_the_bare_optimizer(adapt: Adapt, make: MakeOptimizer) -> None:
    bare, ours = make_model(), make_model()
    expected = train(bare, make(bare.parameters()))
    assert_same(train(ours, adapt(make(ours.parameters()))), expected)


@ALL
def test_chains(adapt: Adapt, make: MakeOptimizer) -> None:
    model, ours = make_model(), make_model()
    expected = train(model, ByHand(make(model.parameters())))
    torch.testing.assert_close(train(ours, adapt(make(ours.parameters()), **CHAINS)), expected)


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, make in OTHERS.items()),
        pytest.param(
            lookahead,
            id="Lookahead",
        ),
    ],
)
def test_a_checkpoint_continues_where_it_was_saved(adapt: Adapt, make: MakeOptimizer) -> None:
    models = [make_model(seed) for seed in (0, 0, 1)]
    whole, first, second = (adapt(make(model.parameters()), **CHAINS) for model in models)
    expected = train(models[0], whole)
    train(models[1], first, data=batches()[:4])
    models[2].load_state_dict(models[1].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(train(models[2], second, data=batches()[4:]), expected)


# found: 16
@pytest.mark.parametrize("slots", [("pre",), ("pre", "update", "post")])
@pytest.mark.parametrize(
    "make", [getattr(others, name) for name in ("AdaBelief", "Adan", "AdamP", "Muon")] + [lookahead]
)
def test_explain_changes_nothing(adapt: Adapt, make: Any, slots: tuple[str, ...]) -> None:
    bare, explained = make_model(), make_model()
    chains = {slot: CHAINS[slot] for slot in slots}
    expected = train(bare, adapt(make_any(make, bare), **chains))
    inner = make_any(make, explained)
    optimizer: Any = adapt(inner, **chains)
    for batch in batches():
        optimizer.zero_grad()
        mse_loss(explained(batch[0]), batch[1]).backward()
        explanation = explain(optimizer)
        optimizer.step()
        found = torch.cat([p.detach().flatten() for p in explained.parameters()])
        if "post" in slots:
            assert explanation.rows[-1].norm == pytest.approx(float(found.norm()))
    assert_same(values(explained), expected)


def make_any(make: Any, model: nn.Module) -> Optimizer:
    if make is not others.Muon:
        return make(model.parameters())  # type: ignore[no-any-return]
    kinds = [
        (True, [p for p in model.parameters() if p.ndim > 1]),
        (False, [p for p in model.parameters() if p.ndim < 2]),
    ]
    muon: Optimizer = make([{"params": params, "use_muon": use_muon} for use_muon, params in kinds])
    return muon


def explain(optimizer: Any) -> Any:
    attached = optimizer.__dict__.get("_gradchain_attached")
    return optimizer.explain() if attached is None else attached.attached[0].explain()


# found: 40
@pytest.mark.parametrize("name", ["ASGD", "Fromage", "PID", "SGDW"])
def test_optimizers_that_load_by_code_of_their_own(adapt: Adapt, name: str) -> None:
    test_a_checkpoint_continues_where_it_was_saved(adapt, getattr(others, name))


def test_sam_evaluates_twice(adapt: Adapt) -> None:
    def make(model: nn.Module) -> Optimizer:
        optimizer: Optimizer = others.SAM(model.parameters(), Adam, lr=0.05)
        return optimizer

    bare, ours, model, chained = (make_model() for _ in range(4))
    assert_same(train_with_closure(ours, adapt(make(ours))), train_with_closure(bare, make(bare)))
    expected = train_with_closure(model, ByHand(make(model)))
    torch.testing.assert_close(train_with_closure(chained, adapt(make(chained), **CHAINS)), expected)


@pytest.mark.parametrize(
    "around",
    [
        lambda params, InnerOpt: others.SAM(params, InnerOpt, lr=0.05),
        lambda params, InnerOpt: others.Lookahead(InnerOpt(params, lr=0.05), k=3),
    ],
)
def test_ours_inside(around: Callable[[Any, Any], Any]) -> None:
    bare, ours, chained = (make_model() for _ in range(3))
    expected = train_with_closure(bare, around(bare.parameters(), Adam))
    wrapped = partial(ParamTransformingOptimizer, InnerOpt=Adam)
    assert_same(train_with_closure(ours, around(ours.parameters(), wrapped)), expected)
    train_with_closure(chained, around(chained.parameters(), partial(wrapped, **CHAINS)))
    assert all(p.abs().max() <= 0.3 for p in chained.parameters())


def test_gradients_with_a_graph(adapt: Adapt) -> None:
    def run(wrap: Any) -> list[Tensor]:
        model = make_model()
        optimizer = wrap(others.AdaHessian(model.parameters(), lr=0.05))
        torch.manual_seed(0)
        for x, y in batches():
            params = list(model.parameters())
            grads = torch.autograd.grad(mse_loss(model(x), y), params, create_graph=True)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
            optimizer.zero_grad()
        return values(model)

    assert_same(run(adapt), run(unwrapped))


# schedulefree: optimizers with a mode


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_schedulefree(adapt: Adapt, name: str) -> None:
    def run(wrap: Any) -> list[list[Tensor]]:
        model = make_model()
        inner = getattr(schedulefree, name)(model.parameters(), lr=0.05)
        optimizer = wrap(inner)
        found = []
        for epoch in (batches()[:4], batches()[4:]):
            inner.train()
            train(model, optimizer, data=epoch)
            inner.eval()
            found.append(values(model))
        return found

    assert_same(run(adapt), run(unwrapped))
    torch.testing.assert_close(run(partial(adapt, **CHAINS)), run(ByHand))


def test_schedulefree_by_its_methods_as_trainer_and_accelerate_call_them(adapt: Adapt) -> None:
    model = make_model()
    optimizer: Any = adapt(schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05))
    optimizer.train()
    train(model, optimizer)
    trained = values(model)
    optimizer.eval()
    assert not torch.equal(values(model)[0], trained[0])


def test_other_optimizers_have_no_mode(adapt: Adapt) -> None:
    assert not hasattr(adapt(Adam(make_model().parameters())), "train")
