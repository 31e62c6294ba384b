"""``check_optimizer``: each law catches what breaks it."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from gradchain import ParamTransformingOptimizer, clip_by_norm
from gradchain.testing import check_optimizer, parametrize_with_laws
from gradchain.testing.optimizer_laws import LAWS
from tests.versions import needs_shards


class Plain(SGD):
    """SGD that calls ``change`` for each parameter after each step."""

    change: Callable[[Tensor, dict[str, Any]], Any] = staticmethod(lambda p, group: None)

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.change(p, group)
        return loss


def changing(change: Callable[[Tensor, dict[str, Any]], Any]) -> type[Optimizer]:
    return type("Changing", (Plain,), {"change": staticmethod(change)})


def replace(p: Tensor, group: Any) -> None:
    p.data = p.data.clone()


def widen(p: Tensor, group: Any) -> None:
    p.data = p.data.float()


def grow_gradient(p: Tensor, group: Any) -> None:
    if p.grad is not None:
        p.grad.mul_(2)


def normalize(p: Tensor, group: Any) -> None:
    if p.grad is not None:
        p.sub_(p.grad / p.grad.norm())


def write_numbers(p: Tensor, group: Any) -> None:
    p.view(-1)[:1] += 0.0


class Silent(Plain):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class KeepsZeros(Plain):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


class FirstGroup(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad)


class Counts(Plain):
    """It counts in an attribute, which neither state dicts nor copies have."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.count = 1

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        self.count += 1
        return super().step(closure)


class OwnLr(Plain):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.1
        return super().step(closure)


class WithFraction(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.param_groups[0]["share"] = Fraction(1, 2)


class WithLambda(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.param_groups[0]["share"] = lambda: 0.5


class SaysThatItUnscales(FirstGroup):
    _step_supports_amp_scaling = True


def sizes_first(params: Any) -> Optimizer:
    params = list(params)
    assert [p.numel() for p in params]
    return Plain(params)


def inherited(params: Any) -> Optimizer:
    SGD([torch.zeros(1)], lr=0.1)  # from its first object on, its step runs the hooks, which then run twice in Plain
    return Plain(params)


@pytest.mark.parametrize(
    ("law", "broken", "cause"),
    [
        ("lowers_loss", partial(SGD, lr=0.1, maximize=True), "the loss is .* after 20 steps, and was "),
        ("deterministic", changing(lambda p, group: p.add_(torch.randn(()))), "the same steps give other numbers"),
        ("in_place", changing(replace), "a parameter has moved in memory"),
        ("keeps_gradients", changing(grow_gradient), "a step changed the gradients"),
        ("closure", Silent, "returned None"),
        ("no_gradients", changing(lambda p, group: p.mul_(0.9)), "a step without any gradient changed parameters"),
        ("zero_gradients", changing(normalize), "zero gradients give parameters that are not finite"),
        ("zero_grad", KeepsZeros, "leaves gradients that are not None"),
        ("any_shape", changing(lambda p, group: p.sub_(0 * p[:1])), "IndexError: "),
        ("any_layout", changing(write_numbers), "RuntimeError: view size is not compatible"),
        ("half_precision", changing(widen), "a bfloat16 parameter has another dtype"),
        ("groups", FirstGroup, "two groups give other numbers than one"),
        ("named_parameters", sizes_first, "AttributeError: 'tuple' object has no attribute 'numel'"),
        ("foreach", changing(lambda p, group: p.mul_(0.9 if group["foreach"] else 1.0)), "foreach=True gives other"),
        ("schedulers", OwnLr, "after the first step, another value of .* changes nothing"),
        ("hooks", inherited, "ran the hooks .'step pre-hook', 'step pre-hook', 'step post-hook', 'step post-hook', "),
        ("state_dict", Counts, "after loading, the steps go on with other numbers"),
        ("torch_save", WithFraction, "UnpicklingError: "),
        ("pickles", WithLambda, "(PicklingError|AttributeError): "),
        ("deepcopies", Counts, "AttributeError: 'Counts' object has no attribute 'count'"),
        ("grad_scaler", SaysThatItUnscales, "an overflow changed parameters"),
        ("distributed_state", changing(lambda p, group: p.add_(0.1)), "setting the state changed parameters"),
        pytest.param(
            "dtensor",
            changing(lambda p, group: p.add_(torch.ones(p.shape))),
            "RuntimeError: .*DTensor",
            marks=needs_shards,
        ),
    ],
)
def test_law_catches(law: str, broken: Any, cause: str) -> None:
    with pytest.raises(AssertionError, match=rf'breaks the law "{law}"\n  cause: .*{cause}'):
        check_optimizer(broken, skip=LAWS.keys() - {law})


def test_every_law_catches_something() -> None:
    (rows,) = (mark for mark in test_law_catches.pytestmark if mark.name == "parametrize")
    assert {getattr(row, "values", row)[0] for row in rows.args[1]} == LAWS.keys()


# found: ours writes the transformed gradients, as clip_grad_norm_ does
@parametrize_with_laws(
    [torch.optim.AdamW, partial(ParamTransformingOptimizer, pre=clip_by_norm(1.0), param_ndim=None, lr=0.1)],
    check_optimizer,
    expected_failed=lambda make: {} if make is torch.optim.AdamW else {"keeps_gradients": "pre acts on gradients"},
)
def test_laws(law: Callable[[], None]) -> None:
    law()


def test_laws_of_what_it_lacks_are_not_tried() -> None:
    class NoForeach(Plain):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            for group in self.param_groups:
                del group["foreach"]

    check_optimizer(NoForeach, skip=LAWS.keys() - {"foreach"})


def test_unknown_law() -> None:
    with pytest.raises(ValueError, match=r"skip names the laws \['any_layout', .*, got \['copys'\]"):
        check_optimizer(SGD, skip={"copys"})
