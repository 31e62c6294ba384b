"""``torch.compile(optimizer.step)``: what the eager step does, in one graph, as that of the inner optimizer alone."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.testing import assert_close

import gradchain as gc
from gradchain import ParamTransformingOptimizer
from gradchain.contract import Group

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,), (2, 3, 3))]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def compile_steps(step: Callable[[], Any], before: Callable[[int], None] = lambda number: None) -> tuple[set[str], int]:
    """Make a few compiled steps, and return the reasons of graph breaks and how many graphs there are."""
    torch.compiler.reset()
    counters.clear()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter)
    for number in range(4):
        before(number)
        compiled()
    return {reason.split("\n")[0] for reason in counters["graph_break"]}, counter.frame_count


def compare(
    make: Callable[[list[nn.Parameter]], Optimizer],
    before: Callable[[Optimizer, int], None] = lambda optimizer, i: None,
) -> tuple[set[str], int]:
    """Compare compiled with eager steps, and return the reasons of graph breaks and how many graphs there are."""
    expected, actual = make_params(), make_params()
    optimizer, compiled_optimizer = make(expected), make(actual)
    for number in range(4):
        before(optimizer, number)
        optimizer.step()
    seen = compile_steps(compiled_optimizer.step, lambda number: before(compiled_optimizer, number))
    for eager, compiled in zip(expected, actual, strict=True):
        assert_close(compiled, eager)
        assert_close(compiled.grad, eager.grad)
    for state, compiled_state in zip(optimizer.state.values(), compiled_optimizer.state.values(), strict=True):
        assert_close(compiled_state, state)
    return seen


@cache
def compile_bare(InnerOpt: Any) -> tuple[set[str], int]:
    return compile_steps(InnerOpt(make_params(), lr=0.1).step)


CHAINS: list[dict[str, Any]] = [
    {},
    {"pre": gc.sign()},
    {"pre": gc.chain(gc.zero_nonfinite(), gc.clip_by_global_norm(1.0), gc.ema(0.9))},
    {"pre": gc.normalize(), "post": gc.project_l2_ball(1.0)},
    {"pre": gc.masked(gc.scale(2.0), lambda group: len(group["shape"]) == 1)},
    {"pre": gc.partition({1: gc.sign(), 2: gc.scale(0.5)}, by="kind"), "defaults": {"kind": 2}},
    {"update": gc.chain(gc.cautious(), gc.decay_weights(0.1)), "post": gc.param_ema(0.9)},
    {"pre": gc.chain(lambda tensor, group: tensor / (1 + tensor.abs())), "grad_scale": 0.5},
    {"post": gc.masked(lambda tensor, group: tensor / 2, torch.tensor(True))},
    # found: 39
    {"pre": gc.chain(gc.add_noise(0.1), gc.dropout(0.5)), "update": gc.add_noise(0.1, seed=1)},
    {"pre": gc.chain(gc.monitor(), gc.clip_by_norm(0.5)), "update": gc.monitor(), "post": gc.monitor()},
    {"pre": gc.amplify_slow(2.0, 0.9), "update": gc.with_error_feedback(gc.sign()), "post": gc.lookahead(2, 0.5)},
]


# found: 13
def test_names_of_a_model_break_no_graph() -> None:
    model = nn.ParameterList(make_params())
    params = [*model.parameters()]
    optimizer = ParamTransformingOptimizer(params, Adam, lr=0.1, pre=gc.masked(gc.scale(2.0), "0"), model=model)
    breaks, graphs = compile_steps(optimizer.step)
    assert breaks <= compile_bare(Adam)[0]
    assert graphs == 1
    for index, (param, before) in enumerate(zip(params, make_params(), strict=True)):
        assert param.grad is not None
        assert before.grad is not None
        assert_close(param.grad, before.grad * (2**4 if index == 0 else 1))


# found: 24
@pytest.mark.parametrize(
    ("chains", "InnerOpt"), [*((chains, Adam) for chains in CHAINS), (CHAINS[2], SGD), (CHAINS[-1], RMSprop)], ids=str
)
def test_one_graph_as_of_the_inner_optimizer(chains: dict[str, Any], InnerOpt: Any) -> None:
    breaks, graphs = compare(lambda params: ParamTransformingOptimizer(params, InnerOpt, lr=0.1, **chains))
    assert breaks <= compile_bare(InnerOpt)[0]
    assert graphs == compile_bare(InnerOpt)[1] == 1


def test_signals_and_counts_need_one_graph() -> None:
    def signal(optimizer: Any, number: int) -> None:
        optimizer.metrics()
        optimizer.signal(loss=torch.tensor(float(number)))

    pre = gc.chain(lambda tensor, group: tensor * group["loss"], gc.clip_by_norm(0.5), gc.clip_by_global_norm(0.5))
    breaks, graphs = compare(lambda params: ParamTransformingOptimizer(params, Adam, lr=0.1, pre=pre), signal)
    assert breaks <= compile_bare(Adam)[0]
    assert graphs == 1


def test_one_graph_of_several_optimizers() -> None:
    def make(params: list[nn.Parameter]) -> Optimizer:
        inner = [RMSprop(params[:1], lr=0.1), Adam(params[1:], lr=0.1)]
        return ParamTransformingOptimizer(InnerOpt=inner, pre=gc.clip_by_global_norm(0.5), post=gc.clamp(-1, 1))

    breaks, graphs = compare(make)
    assert breaks <= compile_bare(Adam)[0]
    assert graphs == 1


def test_what_is_read_on_the_host_runs_before_the_graph() -> None:
    def spoil(optimizer: Optimizer, number: int) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad.fill_(torch.nan if number == 2 else 1 + number)

    _, graphs = compare(
        lambda params: ParamTransformingOptimizer(params, Adam, pre=gc.chain(gc.skip_nonfinite(), gc.scale(0.5))), spoil
    )
    assert graphs == 1


def no_gradient(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"][0].grad = None


def another_gradient(optimizer: Optimizer) -> None:
    first, *_, last = optimizer.param_groups[0]["params"]
    first.grad, last.grad = torch.ones_like(first), None


def another_layout(optimizer: Optimizer) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param).mT.contiguous().mT if param.ndim > 1 else param.grad


def loaded(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def hyperparameters(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["clip_by_norm.max_norm"] *= 0.5
    optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.param_groups[0]["param_ndim"] = 0


def another_group(optimizer: Optimizer) -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer.add_param_group({"params": [param], "param_ndim": None})


def a_hook(optimizer: Optimizer) -> None:
    optimizer.inner_opt.register_step_post_hook(lambda inner, args, kwargs: halve(inner))  # type: ignore[attr-defined]


@torch.no_grad()
def halve(optimizer: Optimizer) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.mul_(0.5)


CHANGES = [
    (no_gradient, another_gradient),
    (another_layout, hyperparameters),
    (loaded, another_group),
    (hyperparameters, a_hook),
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(each.__name__ for each in changes))
def test_what_changes_between_steps_counts(changes: Sequence[Callable[[Optimizer], None]]) -> None:
    compare(
        lambda params: ParamTransformingOptimizer(
            params, Adam, pre=gc.chain(gc.clip_by_norm(1.0), gc.ema(0.9)), post=gc.project_l2_ball(1.0), lr=0.1
        ),
        lambda optimizer, number: changes[number - 2](optimizer) if number >= 2 else None,
    )


def test_a_compiled_step_with_a_closure() -> None:
    def make(params: list[nn.Parameter]) -> ParamTransformingOptimizer:
        return ParamTransformingOptimizer(params, SGD, pre=gc.ema(0.9), lr=0.1)

    def closure(params: list[nn.Parameter]) -> Tensor:
        for param in params:
            param.grad = None
        loss = sum((param.square().sum() for param in params), torch.zeros(()))
        loss.backward()
        return loss

    expected, actual = make_params(), make_params()
    step, compiled = make(expected).step, torch.compile(make(actual).step, backend="eager")
    for _ in range(3):
        assert_close(compiled(partial(closure, actual)), step(partial(closure, expected)))
    assert_close(actual, expected)


def test_a_compiled_step_that_fails_leaves_parameters_and_states() -> None:
    def fail(tensor: Tensor, group: Group) -> Tensor:
        if group["fails"]:
            raise ValueError("no")
        return tensor

    params = make_params()
    optimizer = ParamTransformingOptimizer(
        params, SGD, pre=gc.ema(0.9), post=fail, param_ndim=None, lr=0.1, defaults={"fails": False}
    )
    step = torch.compile(optimizer.step, backend="eager")
    step()
    step()
    before = copy.deepcopy([params, *optimizer.state.values()])
    optimizer.param_groups[0]["fails"] = True
    with pytest.raises(ValueError, match="no"):
        step()
    assert_close([params, *optimizer.state.values()], before)


def test_a_changing_tensor_does_not_recompile() -> None:
    params = make_params()
    optimizer = ParamTransformingOptimizer(
        params, pre=gc.chain(gc.clip_by_norm(1.0), gc.scale(1.0)), post=gc.project_linf_ball(1.0), lr=0.1
    )
    values = {"clip_by_norm.max_norm": 0.5, "scale.factor": 2.0, "project_linf_ball.radius": 0.25, "lr": 0.1}
    optimizer.param_groups[0].update({key: torch.tensor(value) for key, value in values.items()})
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    step()
    step()
    graphs = counter.frame_count
    for factor in (0.5, 0.25, 0.125):
        for key in values:
            optimizer.param_groups[0][key].mul_(factor)
        step()
    assert counter.frame_count == graphs
    radius = optimizer.param_groups[0]["project_linf_ball.radius"]
    assert all(param.detach().abs().max() <= radius for param in params)


def test_a_compiled_function_of_ones_own() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def halve(tensor: Tensor, group: Group) -> Tensor:
        return tensor / 2

    x = torch.tensor([1.0], requires_grad=True)
    x.sum().backward()
    ParamTransformingOptimizer([x], pre=halve, lr=1.0).step()
    assert x.item() == 0.5
