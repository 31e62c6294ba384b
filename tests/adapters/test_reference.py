"""The numbers of rai-toolbox's documentation of ``ParamTransformingOptimizer``, by subclass and by chain."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from gradchain import Group, ParamTransformingOptimizer, Transform, clamp, sign, transform


class SignedGradientOptim(ParamTransformingOptimizer):
    def _pre_step_transform_(self, param: Tensor, **_kwds: Any) -> None:  # type: ignore[override]
        if param.grad is None:
            return
        torch.sign(param.grad, out=param.grad)


class MaxNormedGradientOptim(ParamTransformingOptimizer):
    def _pre_step_transform_(self, param: Tensor, **_kwds: Any) -> None:  # type: ignore[override]
        if param.grad is None:
            return
        g = param.grad.flatten(1)
        max_norms = torch.max(g, dim=1).values
        max_norms = max_norms.view(-1, *([1] * (param.ndim - 1)))
        param.grad /= torch.clamp(max_norms, 1e-20, None)


class ClampedParamOptim(ParamTransformingOptimizer):
    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        param.clamp_(min=-1.0, max=1.0)


@transform
def divide_by_max(tensor: Tensor, group: Group) -> Tensor:
    return tensor / tensor.amax().clamp_min(1e-20)


@pytest.mark.parametrize(("Optim", "pre"), [(SignedGradientOptim, None), (ParamTransformingOptimizer, sign())])
@pytest.mark.parametrize(("lr", "expected"), [(1.0, [-10.9, 8.9]), (0.1, [-10.09, 9.89])])
def test_sign_and_adamw(
    Optim: type[ParamTransformingOptimizer], pre: Transform | None, lr: float, expected: list[float]
) -> None:
    # The documentation prints the result of lr=1.0, weight decay 0.01 included, beside a call with lr=0.1.
    x = torch.tensor([-10.0, 10.0], requires_grad=True)
    optim = Optim([x], InnerOpt=AdamW, pre=pre, lr=lr)
    (10_000 * x).sum().backward()
    optim.step()
    torch.testing.assert_close(x.detach(), torch.tensor(expected))


@pytest.mark.parametrize(
    ("Optim", "pre"), [(MaxNormedGradientOptim, None), (ParamTransformingOptimizer, divide_by_max())]
)
@pytest.mark.parametrize(
    ("param_ndim", "expected"),
    [
        (0, [[1.0, 1.0], [1.0, 1.0]]),
        (1, [[0.5, 1.0], [1.0, 0.5]]),
        (2, [[0.05, 0.1], [1.0, 0.5]]),
    ],
)
def test_max_norm(
    Optim: type[ParamTransformingOptimizer], pre: Transform | None, param_ndim: int, expected: list[list[float]]
) -> None:
    x = torch.tensor([[1.0, 2.0], [20.0, 10.0]], requires_grad=True)
    optim = Optim([x], param_ndim=param_ndim, InnerOpt=SGD, pre=pre, lr=0.0)
    (x * x).sum().backward()
    optim.step()
    torch.testing.assert_close(x.grad, torch.tensor(expected))


@pytest.mark.parametrize(("Optim", "post"), [(ClampedParamOptim, None), (ParamTransformingOptimizer, clamp(-1, 1))])
def test_clamped_parameter(Optim: type[ParamTransformingOptimizer], post: Transform | None) -> None:
    x = torch.tensor([-10.0, 1.0], requires_grad=True)
    optim = Optim([x], post=post, lr=0.1)
    x.backward(gradient=torch.tensor([-1.0, 1.0]))
    optim.step()
    torch.testing.assert_close(x.detach(), torch.tensor([-1.0, 0.9]))
