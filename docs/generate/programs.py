"""The code that is generated for real chains, to show on pages that say how it works."""

from __future__ import annotations

import inspect
import textwrap

import torch

from gradchain import ParamTransformingOptimizer, chain, clip_by_norm, zero_nonfinite


def clipped() -> ParamTransformingOptimizer:
    """Gradients without NaN, at most 1 long."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    model(torch.ones(5, 64)).sum().backward()
    return ParamTransformingOptimizer(
        model.named_parameters(),
        torch.optim.Adam,
        pre=chain(zero_nonfinite(), clip_by_norm(1.0)),
        param_ndim=None,
        lr=1e-3,
    )


def show(name: str) -> str:
    """Markdown of the code of a function above, and of the program of the optimizer that it makes."""
    function = globals()[name]
    source = inspect.getsource(function).split('"""')[2]
    code = textwrap.dedent(source).strip().replace("return Param", "optimizer = Param")
    program = function().explain().program
    return f"```python\n{code}\nprint(optimizer.explain().program)\n```\n\n```python\n{program}\n```"
