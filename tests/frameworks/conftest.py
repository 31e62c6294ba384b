"""The ways to put chains around an optimizer, each of which passes every test of this folder."""

from typing import Any

import pytest
from torch.optim import Optimizer

from gradchain import ParamTransformingOptimizer, attach
from tests.frameworks.common import Adapt


def wrap(optimizer: Optimizer, **chains: Any) -> Optimizer:
    return ParamTransformingOptimizer(InnerOpt=optimizer, **chains)


def attached(optimizer: Optimizer, **chains: Any) -> Optimizer:
    attach(optimizer, **chains)
    return optimizer


@pytest.fixture(params=[wrap, attached])
def adapt(request: pytest.FixtureRequest) -> Adapt:
    adapter: Adapt = request.param
    return adapter
