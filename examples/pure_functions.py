"""A transform of one's own: written as a pure function, tested as one, then put around an optimizer."""

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from gradchain import Group, ParamTransformingOptimizer, chain, sign, transform
from gradchain.testing import check_transform


@transform
def first_try(tensor: Tensor, group: Group, threshold: Annotated[float, Gt(0)]) -> Tensor:
    """Clamp to ``threshold`` root mean squares."""
    bound = threshold * tensor.square().mean().sqrt()
    return tensor.clamp(-bound, bound)


@transform
def clamp_outliers(tensor: Tensor, group: Group, threshold: Annotated[float, Gt(0)]) -> Tensor:
    """Clamp to ``threshold`` root mean squares, with a derivative at zero too."""
    bound = threshold * torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())
    return tensor.clamp(-bound, bound)


def main() -> None:
    gradient = torch.tensor([1.0, -1.0, 7.0, -1.0])

    print("A transform is a function of a tensor and a param group:")
    print("  ", clamp_outliers(1.0)(gradient, {}))
    print("   the group's value wins:", clamp_outliers(1.0)(gradient, {"clamp_outliers.threshold": 0.5}))

    print("\ncheck_transform finds what is wrong with the first try, by the smallest input that shows it:")
    try:
        check_transform(first_try(1.0))
    except AssertionError as error:
        print("  ", str(error).replace("\n", "\n   "))

    check_transform(clamp_outliers(1.0))
    check_transform(chain(clamp_outliers(2.0), sign()), skip={"propagates_nan"})  # the sign of NaN is 0
    print(f"\n{clamp_outliers(1.0)} keeps all laws, and so does a chain with it.")

    param = torch.zeros(4, requires_grad=True)
    optimizer = ParamTransformingOptimizer([param], pre=clamp_outliers(1.0), param_ndim=None, lr=1.0)
    param.grad = gradient
    optimizer.step()
    print("\nAround SGD, a step moves the parameter by minus the transformed gradient:")
    print("  ", param.detach())
    assert torch.equal(param, -clamp_outliers(1.0)(torch.tensor([1.0, -1.0, 7.0, -1.0]), {}))


if __name__ == "__main__":
    main()
