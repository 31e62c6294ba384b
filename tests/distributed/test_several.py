"""Several optimizers as one, on shards."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim import SGD, AdamW

import gradchain as gc
from gradchain import ParamTransformingOptimizer, chain
from tests.distributed.common import BATCHES
from tests.distributed.processes import Processes, join, parts
from tests.versions import Muon

MUON, MOMENTUM = partial(Muon, lr=0.02), partial(SGD, lr=0.1, momentum=0.9)


def raises_by_hand(params: list[nn.Parameter]) -> bool:
    try:
        nn.utils.clip_grad_norm_(params, 1.0)
    except RuntimeError as error:
        return "mixed torch.Tensor and DTensor" in str(error)
    return False


def clip_on_two_meshes() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((4, 3), (8, 2), (5,))]
    grads = [torch.randn(value.shape, generator=generator) for value in values]
    if dist.is_initialized():
        one = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for each in (values, grads):
            each[:2] = [
                distribute_tensor(each[0], one, [Shard(0)]),
                distribute_tensor(each[1], two, [Replicate(), Shard(0)]),
            ]
    params = [nn.Parameter(value) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    raises = raises_by_hand(params)
    inner = [SGD(params[:1], lr=0.5), SGD(params[1:], lr=0.25)]
    ParamTransformingOptimizer(InnerOpt=inner, pre=gc.clip_by_global_norm(1.0)).step()
    return [raises, [getattr(param, "full_tensor", param.detach)() for param in params]]


def test_the_global_norm_of_two_meshes_and_plain_tensors(processes: Processes) -> None:
    results = processes.run(4, clip_on_two_meshes)
    assert all(raises for raises, _ in results)  # by hand, there is no such norm
    _, expected = clip_on_two_meshes()
    for _, actual in results:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    if dist.is_initialized():
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def make_optimizer(model: nn.Module, of_weights: Any) -> ParamTransformingOptimizer:
    inner: Any = {"*.weight": of_weights, "*": partial(AdamW, lr=0.01)}
    pre = chain(gc.clip_by_global_norm(0.1), gc.ema(0.9))
    return ParamTransformingOptimizer(model.named_parameters(), inner, pre=pre, post=gc.param_ema(0.9))


def train(model: nn.Module, optimizer: Any, steps: range) -> list[Any]:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in steps:
        batch = torch.randn(BATCHES, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch[rank::size]).square().mean().backward()
        optimizer.step()
    states = [optimizer.state[param] for param in model.parameters()]
    return [parts([param.detach() for param in model.parameters()]), parts(states)]


def save(folder: str) -> None:
    model = make_model()
    optimizer = make_optimizer(model, MUON)
    train(model, optimizer, range(2))
    saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(saved, checkpoint_id=folder)  # type: ignore[attr-defined]


def go_on(folder: str) -> list[Any]:
    model = make_model()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = make_optimizer(model, MUON)
    loaded: dict[str, Any] = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(loaded, checkpoint_id=folder)  # type: ignore[attr-defined]
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    return train(model, optimizer, range(2, 5))


def from_the_start(of_weights: Any) -> list[Any]:
    model = make_model()
    return train(model, make_optimizer(model, of_weights), range(5))


def test_the_numbers_of_one_process(processes: Processes) -> None:
    whole, sharded = join([from_the_start(MOMENTUM)]), join(processes.run(2, from_the_start, MOMENTUM))
    torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-6)


def test_muon_and_adamw_go_on(processes: Processes, tmp_path: Path) -> None:
    whole = processes.run(2, from_the_start, MUON)
    processes.run(2, save, str(tmp_path))
    torch.testing.assert_close(processes.run(2, go_on, str(tmp_path)), whole, rtol=0, atol=0)
