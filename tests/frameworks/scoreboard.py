"""Which optimizer keeps which law: ``python -m tests.frameworks.scoreboard`` writes ``docs/scoreboard.md``."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_optimizer as others
import schedulefree
import torch
from torch import optim
from torch.optim import Adam, AdamW, Optimizer

from gradchain import ParamTransformingOptimizer, cautious, chain, clip_by_global_norm, param_ema, zero_nonfinite
from gradchain.testing._problem import InapplicableError
from gradchain.testing.optimizer_laws import LAWS, how_broken

PAGE = Path(__file__).parents[2] / "docs" / "scoreboard.md"
KEPT, BROKEN, INAPPLICABLE = "✓", "✗", "-"

INTRODUCTION = f"""# Which optimizer keeps which law

`gradchain.testing.check_optimizer` tests what those who use an optimizer rely on; its docstring says what each law is.
{KEPT} is a law that is kept, {BROKEN} one that is broken, and {INAPPLICABLE} one about something that the optimizer
does not have. A broken law is not always a bug: it says what not to rely on. `gradchain(AdamW)` is AdamW with
transforms in all three slots, which write gradients as `clip_grad_norm_` does.

`make scoreboard` writes this page, and a test fails if it is not what the code gives: torch {{torch}}, {{others}}.
"""

Make = Callable[[Any], Optimizer]


def with_mode(cls: Callable[[Any], Optimizer], params: Any) -> Optimizer:
    """An optimizer that has to be told that it trains."""
    optimizer: Any = cls(params)
    optimizer.train()
    made: Optimizer = optimizer
    return made


def lookahead(params: Any) -> Optimizer:
    made: Optimizer = others.Lookahead(Adam(params), k=3)
    return made


TORCH: dict[str, Make] = {
    name: value
    for name, value in sorted(vars(optim).items())
    if isinstance(value, type) and value not in (Optimizer, optim.SparseAdam)
}
OTHERS: dict[str, Make] = {
    **{
        f"pytorch_optimizer.{name}": getattr(others, name)
        for name in ("AdaBelief", "Adan", "Lamb", "Lion", "Prodigy", "StableAdamW")
    },
    "pytorch_optimizer.Lookahead(Adam)": lookahead,
    **{
        f"schedulefree.{name}": partial(with_mode, getattr(schedulefree, name))
        for name in ("AdamWScheduleFree", "SGDScheduleFree")
    },
    "gradchain(AdamW)": partial(
        ParamTransformingOptimizer,
        InnerOpt=AdamW,
        pre=chain(zero_nonfinite(), clip_by_global_norm(1.0)),
        update=cautious(),
        post=param_ema(0.9),
    ),
}
ALL = {**TORCH, **OTHERS}


def outcomes(name: str) -> dict[str, tuple[str, str]]:
    """For each law, whether an optimizer keeps it, and the first line of the cause where it does not."""
    # Those that take matrices alone are tried with matrices.
    shapes = [(4, 3), (6, 2)] if name == "Muon" else [(4, 3), (3,)]
    found = {}
    for law in LAWS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                cause = how_broken(law, ALL[name], shapes)
                found[law] = (KEPT, "") if cause is None else (BROKEN, cause.splitlines()[0])
            except InapplicableError as error:
                found[law] = INAPPLICABLE, str(error)
    return found


def page(scores: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """The page, from the outcomes of all optimizers."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("pytorch-optimizer", "schedulefree"))
    return "\n".join(
        [
            INTRODUCTION.format(torch=torch.__version__.split("+")[0], others=versions),
            "## torch.optim",
            "",
            *table({name: scores[name] for name in TORCH}),
            "",
            "## Others",
            "",
            *table({name: scores[name] for name in OTHERS}),
            "",
            "## How they are broken",
            "",
            *(
                f"- `{name}`, `{law}`: {shorten(cause)}"
                for name, score in scores.items()
                for law, (mark, cause) in score.items()
                if mark == BROKEN
            ),
            "",
        ]
    )


def table(scores: Mapping[str, Mapping[str, tuple[str, str]]]) -> Iterator[str]:
    """A row for each optimizer, with a column for each law."""
    yield f"| | {' | '.join(f'`{law}`' for law in LAWS)} |"
    yield f"|---|{'---|' * len(LAWS)}"
    for name, score in scores.items():
        yield f"| `{name}` | {' | '.join(mark for mark, _ in score.values())} |"


def shorten(cause: str) -> str:
    """A cause within a line, since torch's take several."""
    return cause if len(cause) <= 100 else f"{cause[:100].rsplit(' ', 1)[0]} ..."


if __name__ == "__main__":
    PAGE.write_text(page({name: outcomes(name) for name in ALL}), encoding="utf-8")
