"""What a user of the wheel writes: ``.ci/dist`` runs it, and checks its types, outside of the repository."""

import importlib
import pkgutil

import torch
from torch import Tensor
from typing_extensions import assert_type

import gradchain
from gradchain import Group, ParamTransformingOptimizer, attach, chain, clip_by_norm, ema, transform
from gradchain.testing import check_optimizer


@transform
def damp(tensor: Tensor, group: Group, rate: float) -> Tensor:
    """Divide by more, the larger an element is."""
    return tensor / (1 + rate * tensor.abs())


def main() -> None:
    """Import everything, and make a step of everything."""
    # The integrations import frameworks that are not there, and the rest of the package needs none of them.
    for module in pkgutil.walk_packages(gradchain.__path__, "gradchain."):
        if not module.name.startswith("gradchain.integrations."):
            importlib.import_module(module.name)
    assert_type(damp(0.5)(torch.ones(3), {}), Tensor)
    model = torch.nn.Linear(3, 2)
    optimizer = ParamTransformingOptimizer(model.parameters(), pre=chain(damp(0.5), ema(0.9)), param_ndim=None, lr=0.1)
    attached = attach(torch.optim.AdamW(model.parameters()), post=clip_by_norm(1.0))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    attached.remove()
    check_optimizer(torch.optim.AdamW)


if __name__ == "__main__":
    main()
