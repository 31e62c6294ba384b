"""Steps that are cut in the middle, by errors, interrupts and the end of the process: what is as before, and where."""

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

import gradchain
from gradchain import (
    Group,
    ParamTransformingOptimizer,
    broadcast,
    cautious,
    chain,
    clip_by_norm,
    ema,
    param_ema,
    project_l2_ball,
    scale,
    transform,
    zero_nonfinite,
)
from gradchain.engine.blocks import Block
from tests.adapters.common import average

SHAPES = [(3, 2), (4,), (2,)]
INNER = {
    "SGD": (partial(SGD, lr=0.1, momentum=0.9), False),
    "Adam": (partial(Adam, lr=0.1), False),
    "SGD with a closure": (partial(SGD, lr=0.1, momentum=0.9), True),
    "LBFGS": (partial(LBFGS, lr=0.5, max_iter=3), True),
}


class Trainer:
    """Parameters, their optimizer, and a loss that depends on the step."""

    def __init__(self, inner: str = "Adam", Wrapper: Any = ParamTransformingOptimizer, **chains: Any) -> None:
        torch.manual_seed(0)
        make_inner, self.with_closure = INNER[inner]
        self.params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        named = [(f"p{number}", param) for number, param in enumerate(self.params)]
        self.optim: ParamTransformingOptimizer = Wrapper(named, make_inner, param_ndim=None, **chains)

    def step(self, number: int) -> None:
        def closure() -> Tensor:
            self.optim.zero_grad()
            loss = torch.stack([(param - number).square().sum() for param in self.params]).sum()
            loss.backward()
            return loss

        if self.with_closure:
            self.optim.step(closure)
        else:
            closure()
            self.optim.step()

    def values(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]

    def states(self) -> dict[int, Any]:
        """Those of the transforms."""
        state = self.optim.state_dict()["state"]
        return {key: copy.deepcopy(value.get("transforms", {})) for key, value in state.items()}

    def checkpoint(self) -> Any:
        return copy.deepcopy({"params": self.values(), "optim": self.optim.state_dict()})

    def load(self, checkpoint: Any) -> None:
        for param, value in zip(self.params, checkpoint["params"], strict=True):
            param.data.copy_(value)
        self.optim.load_state_dict(copy.deepcopy(checkpoint["optim"]))


def is_equal(actual: Any, expected: Any) -> bool:
    """Whether two trees of tensors and values are the same."""
    if isinstance(actual, dict):
        return actual.keys() == expected.keys() and all(is_equal(actual[key], expected[key]) for key in actual)
    if isinstance(actual, list | tuple):
        return len(actual) == len(expected) and all(map(is_equal, actual, expected))
    return torch.equal(actual, expected) if isinstance(actual, Tensor) else bool(actual == expected)


def counts(states: dict[int, Any]) -> list[int]:
    """How often each ``average`` has been asked."""
    return [int(value) for state in states.values() for key, value in state.items() if key.endswith(".count")]


# Errors

calls_left = -1


def trip(tensor: Tensor, group: Group) -> Tensor:
    """The identity, until there are no calls left."""
    global calls_left
    calls_left -= 1
    if calls_left == -1:
        raise ArithmeticError("no")
    return tensor


trips = transform(trip)


class PreHook(ParamTransformingOptimizer):
    def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        assert param.grad is not None
        param.add_(trip(param.grad, optim_group))


class PostHook(ParamTransformingOptimizer):
    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        param.mul_(2)
        trip(param, optim_group)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    ("slot", "Wrapper", "member"),
    [
        *[(slot, ParamTransformingOptimizer, t) for slot in ("pre", "update", "post") for t in (trip, trips())],
        ("pre", PreHook, None),
        ("post", PostHook, None),
    ],
)
def test_error_leaves_parameters_and_states_as_before(
    slot: str, Wrapper: Any, member: Any, inner: str, steps_before: int
) -> None:
    global calls_left
    chains = {each: chain(average()) for each in ("pre", "update", "post")}
    where = ""
    if member is not None:
        chains[slot] = chain(average(), member)
        where = r"stage 1, broadcast\(trip(\(\))?\): "
    trainer = Trainer(inner, Wrapper, **chains)
    calls_left = -1
    for number in range(steps_before):
        trainer.step(number)
    values, states = trainer.values(), trainer.states()
    # At the second parameter; for LBFGS, when its first evaluations have moved the parameters.
    calls_left = 4 if inner == "LBFGS" and slot == "pre" else 1
    where = rf"^{slot}, group 0, parameter 1 'p1' of shape \(4,\), torch.float32: {where}no$"
    with pytest.raises(ArithmeticError, match=where):
        trainer.step(steps_before)
    assert calls_left == -1
    assert is_equal(trainer.values(), values)
    assert set(counts(trainer.states())) == {steps_before}
    if steps_before:
        assert is_equal(trainer.states(), states)


@pytest.mark.parametrize("inner", ["SGD", "Adam"])
def test_step_that_failed_in_pre_can_be_made_again(inner: str) -> None:
    global calls_left
    trainers = [Trainer(inner, pre=chain(ema(0.5), trip), post=param_ema(0.9)) for _ in range(2)]
    for number in range(3):
        calls_left = 1
        with pytest.raises(ArithmeticError):
            trainers[0].step(number)
        for trainer in trainers:
            trainer.step(number)
    assert is_equal(*(trainer.checkpoint() for trainer in trainers))


def test_gradients_are_restored_in_the_first_step() -> None:
    global calls_left
    trainer = Trainer(pre=chain(scale(0.5), trip))
    for steps_before, factor in ((0, 1.0), (1, 0.5)):
        for param in trainer.params:
            param.grad = torch.ones_like(param)
        calls_left = 1
        with pytest.raises(ArithmeticError):
            trainer.optim.step()
        assert {value for p in trainer.params if p.grad is not None for value in p.grad.flatten().tolist()} == {factor}
        trainer.step(steps_before)


def test_state_of_the_inner_optimizer_is_as_far_as_the_step_had_come() -> None:
    global calls_left
    for slot, steps in (("pre", 1), ("update", 2), ("post", 2)):
        trainer = Trainer("Adam", **{slot: trip})
        trainer.step(0)
        calls_left = 1
        with pytest.raises(ArithmeticError):
            trainer.step(1)
        assert {int(trainer.optim.state[param]["step"]) for param in trainer.params} == {steps}


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize("slot", ["pre", "update", "post"])
def test_program_that_runs_out_of_memory(slot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(block: Block, given: list[Any]) -> None:
        if any(name.startswith(f"state:{slot}.") for name in block.program.inputs):
            tensors = given[block.program.inputs.index("tensor")]
            (tensors if isinstance(tensors, Tensor) else tensors[0]).zero_()
            raise OutOfMemoryError("out of memory")
        call(block, given)

    call = Block.call
    chains: dict[str, Any] = {"pre": ema(0.5), slot: chain(ema(0.5), zero_nonfinite())}
    trainer = Trainer(**chains)
    for number in range(2):
        trainer.step(number)
    values, checkpoint = trainer.values(), trainer.checkpoint()
    trainer.step(2)
    after = trainer.checkpoint()
    trainer.load(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(Block, "call", run_out)
        with pytest.raises(OutOfMemoryError, match=rf"^{slot}: out of memory$"):
            trainer.step(2)
    if slot != "post":
        assert is_equal(trainer.values(), values)
    else:  # programs work in place, without copies
        assert not trainer.params[0].any()
    trainer.load(checkpoint)
    trainer.step(2)
    assert is_equal(trainer.checkpoint(), after)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("chains", "is_restored"),
    [
        ({"pre": ema(0.5), "update": cautious()}, True),
        ({"pre": ema(0.5), "post": trip}, True),
        ({"pre": ema(0.5), "post": project_l2_ball(1.0)}, False),
        ({"pre": trip}, False),
    ],
)
def test_inner_optimizer_that_raises(chains: Any, is_restored: bool, error: type[BaseException]) -> None:
    class Failing(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.param_groups[0]["params"][0].data.zero_()
            raise error

    params: list[Tensor] = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optim = ParamTransformingOptimizer(params, Failing, param_ndim=None, **chains)
    torch.stack(params).sum().backward()
    with pytest.raises(error):
        optim.step()
    assert [p.tolist() for p in params] == [[1.0, 1.0] if is_restored else [0.0, 0.0], [1.0, 1.0]]


# Interrupts

PLACES = tuple(str(Path(str(package.__file__)).parent) for package in (gradchain, torch.optim))


def interrupt_at(line: int, call: Callable[[], None]) -> int:
    """Press Ctrl-C when ``call`` has come to a number of lines in gradchain or ``torch.optim``; how many are left."""

    def in_file(frame: FrameType, event: str, argument: Any) -> Any:
        return in_function if frame.f_code.co_filename.startswith(PLACES) else None

    def in_function(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal line
        line -= event == "line"
        if line < 0:
            raise KeyboardInterrupt
        return in_function

    tracer = sys.gettrace()
    sys.settrace(in_file)
    try:
        call()
    except KeyboardInterrupt:
        torch.set_grad_enabled(True)  # a step of torch that is interrupted in its last lines leaves it off
    finally:
        sys.settrace(tracer)
    return line


def interrupt_after(seconds: float, call: Callable[[], None]) -> None:
    """Press Ctrl-C after some time, by a signal."""
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        torch.set_grad_enabled(True)
    finally:
        signal.signal(signal.SIGALRM, handler)


def shrink(tensor: Tensor, group: Group) -> Tensor:
    return 0.9 * tensor


def shrink_untraced(tensor: Tensor, group: Group) -> Tensor:
    return 0.9 * tensor if tensor.sum().isfinite() else tensor


class Hooked(ParamTransformingOptimizer):
    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        param.mul_(0.9)


BUILT_IN: dict[str, Any] = {
    "pre": chain(ema(0.5), clip_by_norm(0.1)),
    "post": chain(project_l2_ball(0.5), param_ema(0.5)),
}
WITH_COPIES: list[Callable[[], Trainer]] = [
    partial(Trainer, **BUILT_IN, update=chain(cautious(), ema(0.5))),
    partial(Trainer, pre=chain(ema(0.5), shrink_untraced), post=param_ema(0.5)),
    partial(Trainer, pre=ema(0.5), update=shrink, post=broadcast(shrink, None)),
    partial(Trainer, Wrapper=Hooked, **BUILT_IN),
    partial(Trainer, "SGD with a closure", **BUILT_IN),
    partial(Trainer, "SGD with a closure", pre=ema(0.5)),
    partial(Trainer, "LBFGS", **BUILT_IN),
]
IN_PLACE: list[Callable[[], Trainer]] = [
    partial(Trainer, **BUILT_IN),
    partial(Trainer, "SGD", **BUILT_IN),
    partial(Trainer, pre=chain(ema(0.5), shrink_untraced)),
    partial(Trainer, pre=chain(ema(0.5), shrink), post=param_ema(0.5)),
]


class Cut:
    """The third step of a training, to be interrupted again and again."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        for number in range(2):
            trainer.step(number)
        self.before = trainer.checkpoint()
        trainer.step(2)
        self.after = trainer.checkpoint()
        trainer.load(self.before)

    def step(self) -> None:
        self.trainer.step(2)

    def is_before_or_after(self) -> bool:
        """Whether each parameter is."""
        return any(is_equal(self.trainer.values(), each["params"]) for each in (self.before, self.after))

    def assert_a_checkpoint_goes_on(self) -> None:
        self.trainer.load(self.before)
        self.step()
        assert is_equal(self.trainer.checkpoint(), self.after)
        self.trainer.load(self.before)


@pytest.mark.parametrize("make", [*WITH_COPIES, *IN_PLACE])
def test_interrupted_at_any_line(make: Callable[[], Trainer]) -> None:
    cut, whole = Cut(make()), True
    cut.assert_a_checkpoint_goes_on()
    lines = 10**6 - interrupt_at(10**6, cut.step)
    cut.assert_a_checkpoint_goes_on()
    # A plan takes most of the lines. It is there before anything moves.
    for line in (*range(0, lines - 400, lines // 30), *range(lines - 400, lines - 13, 13)):
        assert interrupt_at(line, cut.step) < 0
        whole &= cut.is_before_or_after()
        cut.assert_a_checkpoint_goes_on()
    assert whole == (make in WITH_COPIES)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such signals on Windows")
@pytest.mark.parametrize("make", [WITH_COPIES[0], IN_PLACE[0]])
def test_interrupted_by_a_signal(make: Callable[[], Trainer]) -> None:
    cut = Cut(make())
    for tick in range(1, 51):
        interrupt_after(tick * 5e-5, cut.step)
        assert cut.is_before_or_after() or make in IN_PLACE
        cut.assert_a_checkpoint_goes_on()


@pytest.mark.parametrize("slot", ["pre", "update", "post"])
def test_interrupt_within_a_transform(slot: str) -> None:
    def press(tensor: Tensor, group: Group) -> Tensor:
        if pressed and group["index"] == 1:
            raise KeyboardInterrupt
        return tensor

    pressed = False
    trainer = Trainer(**{**BUILT_IN, slot: chain(ema(0.5), press)})
    trainer.step(0)
    values, states, pressed = trainer.values(), trainer.states(), True
    with pytest.raises(KeyboardInterrupt):
        trainer.step(1)
    assert is_equal(trainer.values(), values)
    assert is_equal(trainer.states(), states)


# The end of the process

SAVE_AND_DIE = """
import os, sys, torch
from tests.adapters.test_errors_in_flight import BUILT_IN, Trainer

class DyingFile:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os._exit(9)
    def flush(self):
        pass

def save(checkpoint, path, dies):
    with open(path + ".new", "wb") as file:
        torch.save(checkpoint, DyingFile(file) if dies == "while it writes" else file)
    if dies:
        os._exit(9)
    os.replace(path + ".new", path)

trainer, (path, dies) = Trainer(**BUILT_IN), sys.argv[1:]
trainer.step(0)
trainer.step(1)
save(trainer.checkpoint(), path, "")
trainer.step(2)
save(trainer.checkpoint(), path, dies)
"""


@pytest.mark.parametrize("dies", ["while it writes", "before it renames"])
def test_process_that_dies_while_it_saves(dies: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    arguments = [sys.executable, "-c", SAVE_AND_DIE, str(path), dies]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    assert subprocess.run(arguments, env=environment, cwd=root, check=False).returncode == 9
    assert (tmp_path / "checkpoint.pt.new").exists()
    resumed, whole = Trainer(**BUILT_IN), Trainer(**BUILT_IN)
    resumed.load(torch.load(path))
    for number in range(4):
        whole.step(number)
    for number in range(2, 4):
        resumed.step(number)
    assert is_equal(resumed.checkpoint(), whole.checkpoint())
