"""What the tests of transforms with a state share: runs over steps, and trainings that are cut in the middle."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from gradchain import ParamTransformingOptimizer
from gradchain.contract import Group, State
from gradchain.stage import Stage

INNER: tuple[type[Optimizer], ...] = (SGD, Adam, RMSprop)


def run(transform: Stage, tensors: Iterable[Tensor], start: Tensor | None = None, **group: Any) -> list[Tensor]:
    """The results for ``tensors``, one a step; the state is that of a parameter ``start``, or else of zeros."""
    tensors = list(tensors)
    state = transform.init(torch.zeros_like(tensors[0]) if start is None else start, group)
    results = []
    for tensor in tensors:
        result, state = transform.update(tensor, group, state)
        results.append(result)
    return results


def values(results: Iterable[Tensor]) -> list[float]:
    return [result.item() for result in results]


def gradients(steps: int = 20, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(steps, 2, 3, generator=generator, dtype=torch.float64).to(dtype))


def leaves(state: State) -> dict[str, Tensor]:
    """The tensors of a state, by their path."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        below = leaves(value) if isinstance(value, dict) else {"": value}
        found.update({f"{key}.{path}".rstrip("."): tensor for path, tensor in below.items()})
    return found


def assert_pure(transform: Stage) -> None:
    """``update`` writes to nothing that it is given, and gives the same for the same."""
    start, *tensors = gradients(4)
    group: Group = {"index": 3, "param": start}
    state = transform.init(start, group)
    for tensor in tensors:
        before, inputs = copy.deepcopy(state), [tensor.clone(), start.clone()]
        result, new_state = transform.update(tensor, group, state)
        again, same_state = transform.update(tensor, group, state)
        assert torch.equal(result, again)
        assert_same_state(new_state, same_state)
        assert_same_state(state, before)
        assert torch.equal(tensor, inputs[0])
        assert torch.equal(start, inputs[1])
        assert new_state is not state
        state = new_state


def assert_owns_its_state(transform: Stage) -> None:
    """Neither parameter nor gradient is the state itself: an optimizer writes over both."""
    start, tensor = gradients(2)
    group: Group = {"index": 0}
    state = transform.init(start, group)
    given = {start.untyped_storage().data_ptr(), tensor.untyped_storage().data_ptr()}
    for held in (state, transform.update(tensor, group, state)[1]):
        assert all(value.untyped_storage().data_ptr() not in given for value in leaves(held).values())


def assert_wide_state(transform: Stage, dtype: torch.dtype) -> None:
    """The state of a half-precision parameter is in float32, and the results are those of float32, rounded."""
    start, *tensors = gradients(6, dtype)
    state = transform.init(start, {})
    wide_state = transform.init(start.float(), {})
    for tensor in tensors:
        assert all(v.dtype == torch.float32 for v in leaves(state).values() if v.is_floating_point())
        assert_same_state(state, wide_state)
        result, state = transform.update(tensor, {}, state)
        wide, wide_state = transform.update(tensor.float(), {}, wide_state)
        assert result.dtype == dtype
        assert torch.equal(result, wide.to(dtype))


def assert_same_state(state: State, expected: State) -> None:
    actual, wanted = leaves(state), leaves(expected)
    assert actual.keys() == wanted.keys()
    for path, value in wanted.items():
        assert actual[path].dtype == value.dtype, path
        assert torch.equal(actual[path], value), path


class Training:
    """Three parameters, of which one gets its first gradient late, and an optimizer with ``chains``."""

    def __init__(self, InnerOpt: type[Optimizer], dtype: torch.dtype = torch.float32, **chains: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = ((4, 3), (3,), (2, 2))
        self.params = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
        self.optim = ParamTransformingOptimizer(self.params, InnerOpt, lr=0.05, **chains)

    def go(self, steps: range, late: int = 3) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(100 + step)
            for index, param in enumerate(self.params):
                grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.grad = None if index == 1 and step < late else grad
            self.optim.step()

    def states(self) -> list[dict[str, Tensor]]:
        return [leaves(self.optim.state_dict()["state"].get(i, {})) for i in range(len(self.params))]


def saved_and_loaded(training: Training, fresh: Training) -> Training:
    file = io.BytesIO()
    torch.save({"params": training.params, "optim": training.optim.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file)
    with torch.no_grad():
        for param, value in zip(fresh.params, loaded["params"], strict=True):
            param.copy_(value)
    fresh.optim.load_state_dict(loaded["optim"])
    return fresh


def deepcopied(training: Training, fresh: Training) -> Training:
    return copy.deepcopy(training)


def pickled(training: Training, fresh: Training) -> Training:
    copied: Training = pickle.loads(pickle.dumps(training))
    return copied


CUTS: tuple[Callable[[Training, Training], Training], ...] = (saved_and_loaded, deepcopied, pickled)


def assert_goes_on(cut: Callable[[Training, Training], Training], make: Callable[[], Training], at: int = 5) -> None:
    """A training that is cut after ``at`` steps ends, bit for bit, where one goes that is not."""
    whole, first = make(), make()
    whole.go(range(10))
    first.go(range(at))
    torch.manual_seed(at)  # nothing depends on the default generator
    second = cut(first, make())
    second.go(range(at, 10))
    for param, expected in zip(second.params, whole.params, strict=True):
        assert torch.equal(param, expected)
    for state, wanted in zip(second.states(), whole.states(), strict=True):
        assert_same_state(state, wanted)
