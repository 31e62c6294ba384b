"""``explain``: what each stage of a chain makes of a tensor, or of all tensors of a step, as a table and a plot."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradchain._html import Html, element
from gradchain._sharding import gather
from gradchain.chain import Chain, chain
from gradchain.transform import Combinator, Group, State, Transform, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gradchain.adapters.optimizer import ParamTransformingOptimizer

HEADER = ("stage", "2-norm", "rms", "min", "max", "mean", "zero", "non-finite", "cosine", "changed")

BINS = 50

INPUTS = {"pre": "gradient", "update": "update", "post": "parameter"}
"""What the stages of a slot act on."""


@torch.no_grad()
def explain(
    transform: Transform, tensor: Tensor, group: Group | None = None, *, state: State | None = None
) -> Explanation:
    """Show what each stage of a transform makes of a tensor.

    Nothing is modified: neither tensor, group and state, nor the generators that a transform draws from.

    Args:
        transform: Any transform. Each member of a chain is a stage; what is no chain is one.
        tensor: What it acts on.
        group: Hyperparameters by key, and the context that the transform reads, such as ``"param"``.
        state: Of a stateful transform, from the step before; left out, it is the first step.

    Returns:
        An ``Explanation``, which prints as a table, in a notebook too, and can ``plot()`` histograms.

    Raises:
        Exception: What a stage raises, with its place in the chain.

    Example:
        >>> from gradchain import chain, clip_by_norm, keep_top_q, zero_nonfinite
        >>> x = torch.tensor([3.0, -4.0, 1.0, float("nan")])
        >>> explanation = explain(chain(zero_nonfinite(), keep_top_q(0.5), clip_by_norm(1.0)), x)
        >>> explanation
        stage                         2-norm    rms   min  max    mean  zero  non-finite  cosine  changed
        input                          5.099  2.944    -4    3       0    0%         25%       1
          zero_nonfinite()             5.099   2.55    -4    3       0   25%          0%       1      25%
          keep_top_q(q=0.5)                5    2.5    -4    3   -0.25   50%          0%  0.9806      25%
          clip_by_norm(max_norm=1.0)       1    0.5  -0.8  0.6   -0.05   50%          0%  0.9806      50%
        >>> explanation.rows[-1].max
        0.6000000238418579
    """
    if state is not None and not isinstance(transform, Chain):
        state = dict.fromkeys(chain(transform).keys.values(), state)
    # Copies, since a transform can hold a generator, and what breaks the rules can write to anything.
    stages, state = copy.deepcopy((chain(transform), state))
    tensor, group = tensor.detach().clone(), dict(group or {})
    record = _Record()
    record.start("input", [tensor], [group])
    with _forked_rng([tensor]):
        if state is None:
            state = stages.init(group.get("param", tensor), group)
        record.watch(stages, "input").run([tensor], [group], [state])
    return record.explanation()


@torch.no_grad()
def explain_step(optimizer: ParamTransformingOptimizer) -> Explanation:
    """Show what each stage does in the next step of an optimizer: a copy of it makes that step, and is all that moves.

    See ``ParamTransformingOptimizer.explain``.
    """
    trial = copy.deepcopy(optimizer)
    params, copies = ([p for group in each.param_groups for p in group["params"]] for each in (optimizer, trial))
    for param, copied in zip(params, copies, strict=True):  # a copy of a parameter has no gradient
        copied.grad = None if param.grad is None else param.grad.detach().clone()
    record = _Record()
    for slot, name in INPUTS.items():
        setattr(trial, slot, record.watch(getattr(trial, slot), name))
    with _forked_rng(params):
        trial.step()
    return record.explanation()


@dataclass(frozen=True)
class Row:
    """Statistics of what a stage returns, or of its input, over the finite elements; the shares are of all elements.

    A complex element counts as two, its real and its imaginary part. What is not defined, such as the mean of nothing,
    is NaN.

    Attributes:
        stage: How the stage prints, or the name of the input.
        norm: The 2-norm.
        rms: The root mean square.
        min: The smallest element.
        max: The largest element.
        mean: The mean.
        zero: The share of zeros.
        nonfinite: The share of NaN and infinite elements.
        cosine: Of the angle to the input, with zero for what is not finite.
        changed: The share of elements that the stage has changed; None for an input.
        histogram: Counts and the edges between them, as ``numpy.histogram`` returns them.
    """

    stage: str
    norm: float
    rms: float
    min: float
    max: float
    mean: float
    zero: float
    nonfinite: float
    cosine: float
    changed: float | None
    histogram: tuple[tuple[int, ...], tuple[float, ...]] = field(repr=False)

    def cells(self) -> list[str]:
        """The statistics as they print."""
        numbers = (self.norm, self.rms, self.min, self.max, self.mean)
        shares = (self.zero, self.nonfinite)
        changed = "" if self.changed is None else _percent(self.changed)
        return [*map(_number, numbers), *map(_percent, shares), _number(self.cosine), changed]


@dataclass(frozen=True, repr=False)
class Explanation:
    """What each stage makes of its input, as a table. Made by ``explain`` and by the ``explain()`` of an optimizer.

    That of an optimizer is over all parameters together; ``explanation["fc.weight"]``, by name, and ``explanation[0]``,
    by number, are those of single parameters.

    Attributes:
        rows: The input, and then each stage; in an optimizer, this for each slot.
        parameters: The same for each parameter of an optimizer.
        number: The number of the parameter, if it is one.
        name: The name of the parameter, if it has one.
    """

    rows: tuple[Row, ...]
    parameters: tuple[Explanation, ...] = ()
    number: int | None = None
    name: str | None = None

    def __getitem__(self, key: int | str) -> Explanation:
        for parameter in self.parameters:
            if key in (parameter.number, parameter.name):
                return parameter
        known = [parameter.name or parameter.number for parameter in self.parameters]
        raise KeyError(f"no parameter {key!r} here; there are {known}")

    def __repr__(self) -> str:
        stages = [row.stage if row.changed is None else f"  {_shorten(row.stage)}" for row in self.rows]
        lines = [HEADER, *((stage, *row.cells()) for stage, row in zip(stages, self.rows, strict=True))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = (
            "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
            for first, *cells in lines
        )
        return "\n".join(line.rstrip() for line in aligned)

    def _repr_html_(self) -> str:
        header = element("tr", *(element("th", name, scope="col") for name in HEADER))
        rows = (
            element("tr", _html_stage(row), *(element("td", cell, style="text-align: right") for cell in row.cells()))
            for row in self.rows
        )
        return element("table", element("thead", header), element("tbody", *rows))

    def plot(self) -> Figure:
        """Draw the histogram of each row, below one another: how many elements there are, by value.

        Returns:
            A figure of ``matplotlib.pyplot``, to show, to save, or to close.

        Raises:
            ImportError: Matplotlib is not installed.

        Example:
            >>> from gradchain import sign
            >>> figure = explain(sign(), torch.tensor([1.0, -2.0, 5.0])).plot()
            >>> [axes.get_title("left") for axes in figure.axes]
            ['input', 'sign()']
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError('plot() needs matplotlib: pip install "gradchain[examples]"') from error
        count = max(len(self.rows), 1)
        figure, grid = pyplot.subplots(count, squeeze=False, figsize=(6.4, 1.4 * count), layout="constrained")
        for axes, row in zip(grid.flat, self.rows, strict=False):
            counts, edges = row.histogram
            axes.stairs(counts, edges, fill=True)
            axes.set_yscale("symlog", linthresh=1)  # many zeros do not hide the rest, and no elements are no error
            axes.set_ylim(bottom=0)
            axes.set_title(_shorten(row.stage), loc="left", fontsize="medium", parse_math=False)
        figure.supylabel("elements", fontsize="medium")
        return figure


class _Record:
    """The rows of an explanation, as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.parameters: dict[int, Explanation] = {}
        self.input = ""
        self.inputs: Sequence[Tensor] = ()

    def watch(self, transform: Chain, input: str) -> Chain:
        """The same chain, of which this learns what each stage makes of the ``input``."""
        return Chain([_Watched(member, show(member), input, self) for member in transform])

    def start(self, input: str, tensors: Sequence[Tensor], groups: Sequence[Group]) -> None:
        """Note the ``input``, unless its stages have started already."""
        if input != self.input:
            self.input, self.inputs = input, [tensor.clone() for tensor in tensors]  # an optimizer writes to them
            self.note(input, tensors, None, groups)

    def note(
        self, stage: str, tensors: Sequence[Tensor], before: Sequence[Tensor] | None, groups: Sequence[Group]
    ) -> None:
        """Add the row of a stage, or of an input, where there is nothing ``before``; and those of its parameters."""
        triples = zip(tensors, self.inputs, tensors if before is None else before, strict=True)
        parts = [[_measure(*pieces) for pieces in zip(*map(_pieces, triple), strict=True)] for triple in triples]
        self.rows.append(_make_row(stage, tensors, [*itertools.chain.from_iterable(parts)], is_input=before is None))
        for tensor, own_parts, group in zip(tensors, parts, groups, strict=True):
            if "index" in group and tensor.numel():
                number = group["index"]
                known = self.parameters.get(number, Explanation((), (), number, group.get("name")))
                row = _make_row(stage, [tensor], own_parts, is_input=before is None)
                self.parameters[number] = replace(known, rows=(*known.rows, row))

    def explanation(self) -> Explanation:
        """All that was noted."""
        return Explanation(tuple(self.rows), tuple(self.parameters[number] for number in sorted(self.parameters)))


class _Watched(Combinator):
    """A stage that tells a record what it makes of the tensors, and prints as ``label``."""

    name = "explain"

    def __init__(self, member: Transform, label: str, input: str, record: _Record) -> None:
        super().__init__([member])
        self.label = label
        self.input = input
        self.record = record

    @property
    def state_name(self) -> str:
        return self.stages[0].state_name

    def init(self, tensor: Tensor, group: Group) -> State:
        return self.stages[0].init(tensor, group)

    def run(
        self, tensors: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        results, new_states = self.stages[0].run(tensors, groups, states if self.stateful else [{} for _ in tensors])
        if tensors:
            self.record.start(self.input, tensors, groups)
            self.record.note(self.label, results, tensors, groups)
        return results, new_states

    def rebuild(self, members: Sequence[Transform]) -> _Watched:
        return _Watched(members[0], self.label, self.input, self.record)

    def __repr__(self) -> str:
        return self.label


class _Part(NamedTuple):
    """Of a piece of a tensor: what adds up over all pieces, and the range of the finite elements."""

    sums: list[float]
    low: float
    high: float


def _measure(values: Tensor, inputs: Tensor, before: Tensor) -> _Part:
    finite = values.isfinite()
    changed = (values != before) & ~(values.isnan() & before.isnan())
    x, x0 = (v.where(v.isfinite(), 0) for v in (values, inputs))
    counted = (torch.ones_like(finite), finite, values == 0, changed)
    sums = torch.stack([each.sum(dtype=torch.float64) for each in (*counted, x, x * x, x * x0, x0 * x0)])
    known = values.masked_select(finite)
    low, high = known.aminmax() if known.numel() else (math.inf, -math.inf)
    return _Part(sums.tolist(), float(low), float(high))


def _make_row(stage: str, tensors: Sequence[Tensor], parts: Sequence[_Part], *, is_input: bool) -> Row:
    columns = zip(*(part.sums for part in parts), strict=True)
    elements, finite, zeros, changed, total, squares, product, input_squares = map(sum, columns)
    low, high = min(part.low for part in parts), max(part.high for part in parts)
    return Row(
        stage,
        norm=math.sqrt(squares),
        rms=math.sqrt(_ratio(squares, finite)),
        min=low if finite else math.nan,
        max=high if finite else math.nan,
        mean=_ratio(total, finite),
        zero=_ratio(zeros, elements),
        nonfinite=_ratio(elements - finite, elements),
        cosine=_ratio(product, math.sqrt(squares) * math.sqrt(input_squares)),
        changed=None if is_input else _ratio(changed, elements),
        histogram=_histogram(tensors, low, high),
    )


def _histogram(tensors: Sequence[Tensor], low: float, high: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if low >= high:  # one value, which gets a bar that can be seen; or none
        low, high = (low - (abs(low) or 1), low + (abs(low) or 1)) if low == high else (0, 1)
    total = torch.zeros(BINS, dtype=torch.int64)
    for values in (piece for tensor in tensors for piece in _pieces(tensor)):
        places = (values.masked_select(values.isfinite()) - low) / (high - low) * BINS
        total += places.long().clamp(0, BINS - 1).bincount(minlength=BINS).cpu()
    return tuple(total.tolist()), tuple(torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist())


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in double precision, a cache full at a time; complex ones as their real and imaginary parts."""
    whole = gather(tensor.detach())
    real = torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole
    on_device = real.cpu() if real.device.type == "mps" else real  # which has no double precision
    size = 2**15 if on_device.is_cpu else 2**24
    return (piece.double() for piece in on_device.reshape(-1).split(size))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _forked_rng(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Give the default generators, of the CPU and of the devices of ``tensors``, back their state in the end."""
    return torch.random.fork_rng({tensor.device for tensor in tensors if tensor.device.type != "cpu"})


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value + 0.0:.4g}"  # + 0.0, for -0.0


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.3g}%"


def _shorten(text: str, length: int = 50) -> str:
    """``text`` on one line: the repr of a tensor has several."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _html_stage(row: Row) -> Html:
    left = "text-align: left"
    if row.changed is None:
        return element("th", row.stage, scope="row", style=left)
    return element("td", element("code", row.stage), style=f"{left}; padding-left: 2em")
