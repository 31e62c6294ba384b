"""What ``torch.distributed.checkpoint`` saves on two processes goes on, on any number of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Adam

import gradchain as gc
from gradchain import ParamTransformingOptimizer, chain
from tests.distributed.common import BATCHES, Parameters, my_batches, set_gradients, sharded
from tests.distributed.processes import Processes, join, parts

CUT, END = 2, 5
CHAINS: dict[str, Any] = {
    "pre": chain(gc.skip_nonfinite(), gc.ema(0.9), gc.add_noise(0.01), gc.clip_by_history(50.0)),
    "update": gc.with_error_feedback(gc.keep_top_q(0.5)),
    "post": chain(gc.project_ball_around_reference(0.3), gc.lookahead(2, 0.5)),
}


def make(module: nn.Module) -> ParamTransformingOptimizer:
    return ParamTransformingOptimizer(module.parameters(), Adam, lr=0.1, **CHAINS)


def train(module: nn.Module, optim: ParamTransformingOptimizer, steps: range, batches: range) -> list[Any]:
    for step in steps:
        set_gradients(module, step, batches)
        optim.step()
    states = [optim.state[param]["transforms"] for param in module.parameters()]
    return [parts([param.detach() for param in module.parameters()]), parts(states)]


def state(module: nn.Module, optim: ParamTransformingOptimizer) -> dict[str, Any]:
    model_state, optim_state = get_state_dict(module, optim)
    return {"model": model_state, "optim": optim_state}


def save(folder: str) -> None:
    module = sharded()
    optim = make(module)
    train(module, optim, range(CUT), my_batches())
    checkpoint.save(state(module, optim), checkpoint_id=folder)  # type: ignore[attr-defined]


def go_on(folder: str) -> list[Any]:
    is_one = not dist.is_initialized()
    module = Parameters() if is_one else sharded()
    with torch.no_grad():
        for param in module.parameters():
            param.zero_()
    optim = make(module)
    loaded = state(module, optim)
    checkpoint.load(loaded, checkpoint_id=folder)  # type: ignore[attr-defined]
    set_state_dict(module, optim, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    return train(module, optim, range(CUT, END), range(BATCHES) if is_one else my_batches())


@pytest.fixture(scope="module")
def saved(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    processes.run(2, save, str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_checkpoints_go_on(processes: Processes, saved: Path, size: int) -> None:
    module = Parameters()
    expected = join([train(module, make(module), range(END), range(BATCHES))])
    results = [go_on(str(saved))] if size == 1 else processes.run(size, go_on, str(saved))
    torch.testing.assert_close(join(results), expected, rtol=1e-6, atol=1e-6)


def reload() -> list[Tensor]:
    module = sharded()
    optim = make(module)
    train(module, optim, range(CUT), my_batches())
    again = make(module)
    again.load_state_dict(optim.state_dict())
    return train(module, again, range(CUT, END), my_batches())


def test_state_dicts_of_each_process(processes: Processes) -> None:
    module = Parameters()
    expected = join([train(module, make(module), range(END), range(BATCHES))])
    torch.testing.assert_close(join(processes.run(2, reload)), expected, rtol=1e-6, atol=1e-6)
