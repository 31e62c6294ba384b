"""The ways to put chains around an optimizer, each of which passes every test of this folder."""

import inspect
from typing import Any

import pytest
from torch.optim import Optimizer

from gradchain import ParamTransformingOptimizer, attach
from gradchain.engine.combined import needs_closure


def wrap(optimizer: Optimizer, **chains: Any) -> Optimizer:
    return ParamTransformingOptimizer(InnerOpt=optimizer, **chains)


def attached(optimizer: Optimizer, **chains: Any) -> Optimizer:
    attach(optimizer, **chains)
    return optimizer


def in_two(optimizer: Optimizer, **chains: Any) -> Optimizer:
    """Around two optimizers like the given one, the first of which has the first parameter."""
    if needs_closure(optimizer) or len(optimizer.param_groups) > 1:
        return wrap(optimizer, **chains)
    first, *rest = optimizer.param_groups[0]["params"]
    kwargs = {key: optimizer.defaults[key] for key in inspect.signature(type(optimizer)).parameters if key != "params"}
    return ParamTransformingOptimizer(InnerOpt=[type(optimizer)(each, **kwargs) for each in ([first], rest)], **chains)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_optimizer: the test looks at the groups of one inner optimizer")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "adapt" in metafunc.fixturenames:
        is_of_one = metafunc.definition.get_closest_marker("one_optimizer")
        metafunc.parametrize("adapt", [wrap, attached, *([] if is_of_one else [in_two])])
