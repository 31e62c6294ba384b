"""Model-agnostic meta-learning: a start from which one clipped gradient step fits a sine wave that was never seen.

The derivative goes through the inner step, clipping included, so that the outer loop learns where to start and, as it
is a value in a group like any other, how far the inner step may go. A network trained on the same waves without that
derivative starts from their mean, which is zero.

Run ``python examples/maml.py``: about ten seconds.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import mse_loss

from gradchain import ParamTransformingOptimizer, clip_by_global_norm
from gradchain.adapters.functional import apply

Params = dict[str, Tensor]

TASKS, SHOTS, STEPS, LR = 25, 10, 800, 0.05
MODEL = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def draw_waves(count: int) -> tuple[Tensor, Tensor]:
    """Points of ``count`` sine waves, (count, 2, SHOTS, 1) each: some to adapt to and others to judge by."""
    amplitude, phase = torch.rand(2, count, 1, 1, 1)
    x = 10 * torch.rand(count, 2, SHOTS, 1) - 5
    return x, (0.1 + 4.9 * amplitude) * torch.sin(x + torch.pi * phase)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(functional_call(MODEL, params, (x,)), y)


def adapt(params: Params, bound: Tensor, x: Tensor, y: Tensor) -> Params:
    grads = grad(loss)(params, x, y)
    updates = apply(clip_by_global_norm(1.0), grads, {"clip_by_global_norm.max_norm": bound})
    return {name: param - LR * updates[name] for name, param in params.items()}


def loss_after(params: Params, bound: Tensor, x: Tensor, y: Tensor, inner_steps: int) -> Tensor:
    """The loss on the second half of the points of a wave, when the network has adapted to the first half."""
    for _ in range(inner_steps):
        params = adapt(params, bound, x[0], y[0])
    return loss(params, x[1], y[1])


def mean_loss_after(params: Params, bound: Tensor, waves: tuple[Tensor, Tensor], inner_steps: int) -> Tensor:
    losses: Tensor = vmap(loss_after, in_dims=(None, None, 0, 0, None))(params, bound, *waves, inner_steps)
    return losses.mean()


def train(inner_steps: int) -> tuple[Params, Tensor]:
    """The start, and the largest norm of an inner gradient, with the least loss after ``inner_steps``."""
    torch.manual_seed(0)
    params = {name: param.detach().clone().requires_grad_() for name, param in MODEL.named_parameters()}
    log_bound = torch.tensor(10.0).log().requires_grad_()
    optim = ParamTransformingOptimizer(
        [*params.values(), log_bound], torch.optim.Adam, pre=clip_by_global_norm(10.0), param_ndim=None, lr=1e-2
    )
    for _ in range(STEPS):
        optim.zero_grad()
        mean_loss_after(params, log_bound.exp(), draw_waves(TASKS), inner_steps).backward()
        optim.step()
    return params, log_bound.detach().exp()


def main() -> None:
    torch.set_num_threads(1)  # the tensors are small
    starts = {"without an inner step": train(0), "through an inner step": train(1)}
    torch.manual_seed(1)
    waves = draw_waves(1000)
    print("Mean squared error on 1000 new waves, after 0, 1 and 5 inner steps:")
    for name, start in starts.items():
        errors = [mean_loss_after(*start, waves, inner_steps).item() for inner_steps in (0, 1, 5)]
        print(f"   trained {name}:", *(f"{error:.2f}" for error in errors))
    _, bound = starts["through an inner step"]
    print(f"Inner gradients are clipped to the norm {bound:.1f}, which was learned with the start.")


if __name__ == "__main__":
    main()
