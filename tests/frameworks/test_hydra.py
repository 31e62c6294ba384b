"""Configs through YAML, and what Hydra itself makes of them."""

from typing import Any

import pytest
from torch.optim import Optimizer

from gradchain import ParamTransformingOptimizer, Transform, from_config, to_config
from tests.cases import CASES
from tests.test_config import COMBINED, OWN, WITH_OWN, assert_same_steps, by_code, model

yaml = pytest.importorskip("yaml")
hydra = pytest.importorskip("hydra.utils")

TEXT = """
_target_: gradchain.ParamTransformingOptimizer
InnerOpt:
  _target_: torch.optim.AdamW
  _partial_: true
  lr: 0.01
  betas: [0.9, 0.95]
pre:
  _target_: gradchain.chain
  _args_:
  - _target_: gradchain.zero_nonfinite
  - {_target_: gradchain.masked, transform: {_target_: tests.test_config.damp, rate: 0.5}, where: 2.*}
  - {_target_: gradchain.clip_by_global_norm, max_norm: 0.5}
update: {_target_: gradchain.freeze, where: 0.bias}
post: {_target_: gradchain.project_l2_ball, radius: 0.9}
param_ndim: null
defaults: {project_l2_ball.radius: 0.8, note: from a file}
"""


def through_yaml(config: object) -> Any:
    return yaml.safe_load(yaml.safe_dump(config))


@pytest.mark.parametrize("value", [*(case.transform for case in CASES), *COMBINED, *WITH_OWN], ids=repr)
def test_chains_return(value: Transform) -> None:
    config = through_yaml(to_config(value))
    assert from_config(config, allow=OWN) == value
    assert hydra.instantiate(config) == value


def test_a_text_makes_the_optimizer_that_code_makes() -> None:
    def by_text(net: Any) -> Optimizer:
        made: Optimizer = from_config(yaml.safe_load(TEXT), net.named_parameters(), allow=["torch.optim", *OWN])
        return made

    def by_hydra(net: Any) -> ParamTransformingOptimizer:
        made: ParamTransformingOptimizer = hydra.instantiate(yaml.safe_load(TEXT), list(net.named_parameters()))
        return made

    assert_same_steps(by_code, by_text, by_hydra)
    assert to_config(by_hydra(model())) == to_config(by_code(model())) == through_yaml(to_config(by_code(model())))
