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

from gradchain._html import Html, cell, element, table
from gradchain._plot import plot_histograms, plot_norms, shorten
from gradchain._sharding import gather
from gradchain._units import show_units
from gradchain.chain import Chain, chain
from gradchain.contract import Group, State, Transform, show
from gradchain.stage import Stage, beneath

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ("stage", "acts on", "2-norm", "rms", "min", "max", "mean", "zero", "non-finite", "cosine", "changed")

RUNS = "runs"
"""The name of one more column, the last, of the stages of an optimizer."""

BINS = 50


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
        >>> from gradchain import chain, keep_top_q, normalize, zero_nonfinite
        >>> x = torch.tensor([3.0, -4.0, 1.0, float("nan")])
        >>> explanation = explain(chain(zero_nonfinite(), keep_top_q(0.5), normalize()), x)
        >>> explanation
        stage                acts on             2-norm    rms   min  max    mean  zero  non-finite  cosine  changed
        input                                     5.099  2.944    -4    3       0    0%         25%       1
          zero_nonfinite()   each of 4 elements   5.099   2.55    -4    3       0   25%          0%       1      25%
          keep_top_q(q=0.5)  the whole tensor         5    2.5    -4    3   -0.25   50%          0%  0.9806      25%
          normalize()        the whole tensor         1    0.5  -0.8  0.6   -0.05   50%          0%  0.9806      50%
        >>> explanation.rows[-1].max
        0.6000000238418579
    """
    # Copies, since a transform can hold a generator, and a function that is not pure can write to anything.
    stages, state = copy.deepcopy((chain(transform), state))
    if state is not None and not isinstance(transform, Chain):
        state = beneath(state, stages.path(0))
    tensor, group = tensor.detach().clone(), dict(group or {})
    record = Record()
    record.start("input", [tensor], [group])
    with forked_rng([tensor]):
        if state is None:
            state = stages.init(group.get("param", tensor), group)
        run = stages.run_stages([tensor], [group], [state], [{}])
        for member, stage, results in zip(stages, stages.stages, run, strict=True):
            record.note(show(member), stage, results)
    return record.explanation()


@dataclass(frozen=True)
class Row:
    """Statistics of what a stage returns, or of its input, over the finite elements; the shares are of all elements.

    A complex element counts as two, its real and its imaginary part. What is not defined, such as the mean of nothing,
    is NaN.

    Attributes:
        stage: How the stage prints, or the name of the input.
        acts_on: The parts that the stage acts on, each by itself, such as ``"each of 64 rows"``; None for an input.
        norm: The 2-norm.
        rms: The root mean square.
        min: The smallest element.
        max: The largest element.
        mean: The mean.
        zero: The share of zeros.
        nonfinite: The share of NaN and infinite elements.
        cosine: Of the angle to the input, with zero for what is not finite.
        changed: The share of elements that the stage has changed; None for an input.
        runs: How the stage runs in an optimizer: ``"traced"``, or ``"as it is"`` and the reason; None where there is no
            optimizer, for an input, and for a stage that acts on nothing.
        histogram: Counts and the edges between them, as ``numpy.histogram`` returns them.
    """

    stage: str
    acts_on: str | None
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
    runs: str | None = None

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
        program: What a step of an optimizer runs, to print: comments that say which stages run how and on how many
            tensors, and the Python code that was generated for them. Empty where there is no optimizer, and for a
            single parameter.
    """

    rows: tuple[Row, ...]
    parameters: tuple[Explanation, ...] = ()
    number: int | None = None
    name: str | None = None
    program: str = field(default="", repr=False)

    def __getitem__(self, key: int | str) -> Explanation:
        for parameter in self.parameters:
            if key in (parameter.number, parameter.name):
                return parameter
        known = [parameter.number if parameter.name is None else parameter.name for parameter in self.parameters]
        has_none = isinstance(key, str) and all(isinstance(each, int) for each in known)
        remedy = ", without names; give the optimizer model.named_parameters(), or model=model" if has_none else ""
        raise KeyError(f"no parameter {key!r} here; there are {known}{remedy if known else ''}")

    def __repr__(self) -> str:
        stages = [row.stage if row.changed is None else f"  {shorten(row.stage)}" for row in self.rows]
        rows = [
            (stage, row.acts_on or "", *row.cells(), shorten(row.runs or "", 80))
            for stage, row in zip(stages, self.rows, strict=True)
        ]
        columns = [list(column) for column in zip((*HEADER, RUNS if self._has_plan() else ""), *rows, strict=True)]
        for number, column in enumerate(columns):
            width = max(map(len, column))
            is_text = number < 2 or number == len(HEADER)
            columns[number] = [cell.ljust(width) if is_text else cell.rjust(width) for cell in column]
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

    def _repr_html_(self) -> str:
        names = (*HEADER, RUNS) if self._has_plan() else HEADER
        aligned = zip(names, ("left", "left", *["right"] * (len(HEADER) - 2), "left"), strict=False)
        header = element("tr", *(cell(name, tag="th", align=align, scope="col") for name, align in aligned))
        rows = (element("tr", *_html_cells(row)[: len(names)]) for row in self.rows)
        return table(element("thead", header), element("tbody", *rows))

    def _has_plan(self) -> bool:
        return any(row.runs is not None for row in self.rows)

    def plot(self) -> Figure:
        """Draw what the stages do.

        That of an optimizer shows the whole model: the 2-norm of each parameter, from top to bottom, before and after
        each stage, with a column for each slot. Red crosses are parameters whose input has NaN or infinite elements; a
        norm of zero is drawn at the left edge. Else it is the histogram of each row, below one another: how many
        elements there are, by value.

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
            import matplotlib as _  # noqa: F401
        except ImportError as error:
            raise ImportError('plot() needs matplotlib: pip install "gradchain[examples]"') from error
        if self.parameters:
            return plot_norms(self.parameters, [row.stage for row in self.rows if row.changed is None])
        return plot_histograms(self.rows)


class Record:
    """The rows of an explanation, as they come."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._parameters: dict[int, Explanation] = {}
        self._inputs: Sequence[Tensor] = ()
        self._before: Sequence[Tensor] = ()
        self._groups: Sequence[Group] = ()

    def start(self, input: str, tensors: Sequence[Tensor], groups: Sequence[Group]) -> None:
        """Note what the first stage of a slot gets, and the groups, with number and name of parameters if there are."""
        self._inputs = self._before = [tensor.clone() for tensor in tensors]  # an optimizer writes to them
        self._groups = groups
        self._add(input, None, tensors)

    def note(
        self, label: str, stage: Stage, tensors: Sequence[Tensor], runs: Sequence[Sequence[str]] | None = None
    ) -> None:
        """Note what the next stage, which prints as ``label``, has made of the tensors, and how it runs on each."""
        self._add(label, stage, tensors, runs)
        self._before = [tensor.clone() for tensor in tensors]

    def _add(
        self, label: str, stage: Stage | None, tensors: Sequence[Tensor], runs: Sequence[Sequence[str]] | None = None
    ) -> None:
        """Add the row of all tensors, and those of their parameters."""
        runs = [()] * len(tensors) if runs is None else runs
        triples = zip(tensors, self._inputs, self._before, strict=True)
        parts = [[_measure(*pieces) for pieces in zip(*map(_pieces, triple), strict=True)] for triple in triples]
        whole = [*itertools.chain.from_iterable(parts)]
        row = _make_row(label, _acts_on(stage, tensors, self._groups), tensors, whole)
        self._rows.append(replace(row, runs=_join(itertools.chain.from_iterable(runs))))
        for tensor, own_parts, group, own_runs in zip(tensors, parts, self._groups, runs, strict=True):
            if "index" in group and tensor.numel():
                number = group["index"]
                known = self._parameters.get(number, Explanation((), (), number, group.get("name")))
                row = _make_row(label, _acts_on(stage, [tensor], [group]), [tensor], own_parts)
                row = replace(row, runs=_join(own_runs))
                self._parameters[number] = replace(known, rows=(*known.rows, row))

    def explanation(self, program: str = "") -> Explanation:
        """All that was noted."""
        parameters = tuple(self._parameters[number] for number in sorted(self._parameters))
        return Explanation(tuple(self._rows), parameters, program=program)


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


def _join(runs: Iterable[str]) -> str | None:
    return ", ".join(dict.fromkeys(runs)) or None


def _acts_on(stage: Stage | None, tensors: Sequence[Tensor], groups: Sequence[Group]) -> str | None:
    return None if stage is None else show_units(stage, tensors, groups)


def _make_row(label: str, acts_on: str | None, tensors: Sequence[Tensor], parts: Sequence[_Part]) -> Row:
    columns = zip(*(part.sums for part in parts), strict=True)
    elements, finite, zeros, changed, total, squares, product, input_squares = map(sum, columns)
    low, high = min(part.low for part in parts), max(part.high for part in parts)
    return Row(
        label,
        acts_on,
        norm=math.sqrt(squares),
        rms=math.sqrt(_ratio(squares, finite)),
        min=low if finite else math.nan,
        max=high if finite else math.nan,
        mean=_ratio(total, finite),
        zero=_ratio(zeros, elements),
        nonfinite=_ratio(elements - finite, elements),
        cosine=_ratio(product, math.sqrt(squares) * math.sqrt(input_squares)),
        changed=None if acts_on is None else _ratio(changed, elements),
        histogram=_histogram(tensors, low, high),
    )


def _histogram(tensors: Sequence[Tensor], low: float, high: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if low >= high:  # one value, which gets a bar that can be seen; or none
        low, high = (low - (abs(low) or 1), low + (abs(low) or 1)) if low == high else (0, 1)
    total = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for values in (piece for tensor in tensors for piece in _pieces(tensor)):
        places = (values.masked_select(values.isfinite()) - low) / (high - low) * BINS
        total += places.long().clamp(0, BINS - 1).bincount(minlength=BINS).cpu()
    return tuple(total.tolist()), tuple(torch.linspace(low, high, BINS + 1, dtype=torch.float64, device="cpu").tolist())


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in double precision, a cache full at a time; complex ones as their real and imaginary parts."""
    whole = gather(tensor.detach())
    real = torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole
    on_device = real.cpu() if real.device.type == "mps" else real  # which has no double precision
    size = 2**15 if on_device.is_cpu else 2**24
    return (piece.double() for piece in on_device.reshape(-1).split(size))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def forked_rng(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Give the default generators, of the CPU and of the devices of ``tensors``, back their state in the end."""
    return torch.random.fork_rng({tensor.device for tensor in tensors if tensor.device.type != "cpu"})


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value + 0.0:.4g}"  # + 0.0, for -0.0


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.3g}%"


def _html_cells(row: Row) -> list[Html]:
    if row.changed is None:
        stage = cell(row.stage, tag="th", scope="row")
    else:
        stage = cell(element("code", row.stage), indent=True)
    return [stage, cell(row.acts_on or ""), *(cell(each, align="right") for each in row.cells()), cell(row.runs or "")]
