"""What a step must not do on a GPU."""

import pytest
import torch
from torch.optim import Adam

import gradchain as gc
from gradchain import ParamTransformingOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_host_never_waits() -> None:
    params = [torch.randn(shape, device="cuda", requires_grad=True) for shape in ((64, 32), (32,), (8, 3, 5, 5))]
    optimizer = ParamTransformingOptimizer(
        params,
        Adam,
        pre=gc.chain(
            gc.monitor(),
            gc.zero_nonfinite(),
            gc.clip_by_global_norm(1.0),
            gc.clip_by_norm(0.5),
            gc.scale(0.5),
            gc.ema(0.9),
            lambda tensor, group: tensor / (1 + group["loss"]),
        ),
        update=gc.chain(gc.cautious(), gc.decay_weights(0.01)),
        post=gc.chain(gc.project_l2_ball(1.0), gc.clamp(-1.0, 1.0), gc.param_ema(0.9)),
        lr=0.1,
        fused=True,
    )
    optimizer.metrics()  # from now on, clips count
    loss = torch.ones((), device="cuda")
    for step in range(4):
        for param in params:
            param.grad = torch.randn_like(param)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step makes the plan
        try:
            optimizer.signal(loss=loss)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
