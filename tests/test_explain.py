"""``explain``: the statistics, how they print and plot, and that nothing moves."""

import copy
import io
import math
import pickle
import random
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradchain import (
    Group,
    ParamTransformingOptimizer,
    attach,
    broadcast,
    cautious,
    centralize,
    chain,
    clamp,
    clip_by_global_norm,
    clip_by_history,
    clip_by_norm,
    ema,
    freeze,
    keep_top_q,
    masked,
    normalize,
    partition,
    project_halfspace,
    scale,
    sign,
    skip_nonfinite,
    trace,
    transform,
    zero_nonfinite,
)
from gradchain._html import element, show_chain, show_optimizer
from gradchain.engine.blocks import Programs
from gradchain.explain import HEADER, Row, explain

matplotlib.use("Agg")

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def test_statistics_by_hand() -> None:
    first, second = explain(clamp(-2.0, 2.0), torch.tensor([3.0, -4.0, 0.0, 1.0, NAN, INF, 0.0, 0.0])).rows
    assert (first.stage, second.stage) == ("input", "clamp(min=-2.0, max=2.0)")
    assert first.norm == pytest.approx(math.sqrt(26))
    assert first.rms == pytest.approx(math.sqrt(26 / 6))
    assert (first.min, first.max, first.mean) == (-4, 3, 0)
    assert (first.zero, first.nonfinite, first.changed) == (3 / 8, 2 / 8, None)
    assert first.cosine == pytest.approx(1)
    # [2, -2, 0, 1, NaN, 2, 0, 0]: the infinite element counts as 0 in the input.
    assert second.norm == pytest.approx(math.sqrt(13))
    assert (second.min, second.max, second.mean) == (-2, 2, 3 / 7)
    assert (second.zero, second.nonfinite, second.changed) == (3 / 8, 1 / 8, 3 / 8)
    assert second.cosine == pytest.approx(15 / math.sqrt(26 * 13))


def test_histogram_counts_finite_elements() -> None:
    counts, edges = explain(chain(), torch.tensor([0.0, 1.0, 1.0, 10.0, NAN])).rows[0].histogram
    assert (edges[0], edges[-1]) == (0, 10)
    assert len(edges) == len(counts) + 1
    assert sum(counts) == 4
    assert (counts[0], counts[5], counts[-1]) == (1, 2, 1)


def test_stages_are_those_of_the_chain() -> None:
    nested = chain(sign(), chain(scale(2.0), broadcast(normalize(), None)), lambda tensor, group: tensor)
    names = [row.stage for row in explain(nested, torch.ones(2, 2)).rows]
    assert names == ["input", "sign()", "scale(factor=2.0)", "broadcast(normalize(), param_ndim=None)", "<lambda>"]
    assert [row.stage for row in explain(chain(), torch.ones(2)).rows] == ["input"]


@pytest.mark.parametrize("t", [sign(), chain(sign()), lambda tensor, group: tensor.sign()])
def test_one_stage(t: Any) -> None:
    assert explain(t, torch.tensor([-3.0, 2.0])).rows[1].norm == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.empty(2, 0, 3)])
def test_nothing(tensor: Tensor) -> None:
    explanation = explain(sign(), tensor)
    row = explanation.rows[1]
    assert row.norm == 0
    assert all(math.isnan(v or 0) for v in (row.min, row.max, row.mean, row.rms, row.zero, row.nonfinite, row.cosine))
    assert repr(explanation).splitlines()[2].split() == ["sign()", "each", "of", "0", "elements", "0", *["-"] * 8]


def test_nothing_finite() -> None:
    row = explain(chain(), torch.tensor([NAN, INF])).rows[0]
    assert (row.norm, row.nonfinite) == (0, 1)
    assert all(map(math.isnan, (row.min, row.max, row.mean)))


def test_nan_is_no_change() -> None:
    assert explain(clamp(-1, 1), torch.tensor([NAN, 1.0])).rows[1].changed == 0
    assert explain(zero_nonfinite(), torch.tensor([NAN, 1.0])).rows[1].changed == 0.5


def test_no_dimensions() -> None:
    row = explain(scale(2.0), torch.tensor(-3.0)).rows[1]
    assert (row.norm, row.min, row.max, row.mean, row.cosine) == (6, -6, -6, -6, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    row = explain(chain(), torch.full((70_000,), 300.0, dtype=dtype)).rows[0]  # the sum of squares is no float16
    assert row.norm == pytest.approx(300 * math.sqrt(70_000))
    assert row.mean == 300
    assert sum(row.histogram[0]) == 70_000


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers(dtype: torch.dtype) -> None:
    row = explain(chain(), torch.tensor([0, 1, 1, 1], dtype=dtype)).rows[0]
    assert (row.min, row.max, row.mean, row.zero) == (0, 1, 0.75, 0.25)


def test_complex_elements_count_as_two() -> None:
    x = torch.tensor([3 + 4j, 0 - 2j])
    assert explain(chain(), x.conj()).rows[0].min == -4
    for as_complex, as_real in zip(
        explain(scale(2.0), x).rows, explain(scale(2.0), torch.view_as_real(x)).rows, strict=True
    ):
        assert replace(as_complex, acts_on=None) == replace(as_real, acts_on=None)


@pytest.mark.parametrize("size", [2**15, 2**15 + 1, 100_000])
def test_large_tensors(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = explain(clamp(-1.0, 1.0), x).rows[1]
    expected = x.clamp(-1, 1)
    assert row.norm == pytest.approx(float(expected.norm()))
    assert row.mean == pytest.approx(float(expected.mean()))
    assert row.changed == pytest.approx(float((x.abs() > 1).double().mean()))
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(x, expected, dim=0)))
    assert sum(row.histogram[0]) == size


def test_strided_tensors() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert explain(sign(), x.t().contiguous().t()) == explain(sign(), x)
    assert explain(sign(), torch.ones(1).expand(4)) == explain(sign(), torch.ones(4))


def test_stateful() -> None:
    x, t = torch.tensor([1.0, -2.0]), chain(sign(), trace(0.5))
    assert explain(t, x).rows[2].norm == pytest.approx(math.sqrt(2))
    _, state = t.update(x, {}, t.init(x, {}))
    before = copy.deepcopy(state)
    assert explain(t, x, state=state).rows[2].norm == pytest.approx(1.5 * math.sqrt(2))
    assert_equal(state, before)
    alone = trace(0.5)
    _, state = alone.update(x, {}, alone.init(x, {}))
    assert explain(alone, x, state=state).rows[1].max == 1.5


def test_first_state_is_that_of_the_parameter() -> None:
    def keep(tensor: Tensor, group: Group) -> dict[str, Tensor]:
        return {"start": tensor.clone()}

    @transform(init=keep)
    def to_start(tensor: Tensor, group: Group, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return state["start"], state

    assert explain(to_start(), torch.tensor([1.0]), {"param": torch.tensor([7.0])}).rows[1].max == 7


def test_measuring() -> None:
    assert explain(clip_by_global_norm(1.0), torch.tensor([3.0, 4.0])).rows[1].norm == pytest.approx(1)


def test_groups() -> None:
    t = chain(masked(scale(2.0), "*.bias"), partition({"*.bias": clip_by_norm(10.0), "*": sign()}))
    _, doubled, clipped = explain(t, torch.ones(4), {"name": "fc.bias", "clip_by_norm.max_norm": 1.0}).rows
    assert (doubled.norm, clipped.norm) == pytest.approx((4, 1))
    assert explain(t, torch.ones(4), {"name": "fc.weight"}).rows[1].changed == 0


def test_errors_say_which_stage() -> None:
    with pytest.raises(TypeError, match=r"stage 1, clamp\(min=-1, max=1\): .* acts on real tensors"):
        explain(chain(scale(2.0), clamp(-1, 1)), torch.tensor([1j]))


def test_nothing_is_modified() -> None:
    def overwrite(tensor: Tensor, group: Group) -> Tensor:
        group["seen"] = True
        return tensor.mul_(2)

    x, group = torch.tensor([1.0, 2.0], requires_grad=True), {"param": torch.ones(2)}
    with pytest.raises(ValueError, match="wrote to its input"):
        explain(overwrite, x, group)
    assert x.tolist() == [1, 2]
    assert group.keys() == {"param"}
    assert x.grad is None


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_what_is_drawn_is_what_the_next_call_draws(generator: torch.Generator | None) -> None:
    t, x = keep_top_q(0.5, dq=0.5, generator=generator), torch.linspace(1, 2, 1000)
    for _ in range(3):
        explained = [explain(t, x).rows[1].zero for _ in range(2)]
        assert explained[0] == explained[1] == pytest.approx(float((t(x, {}) == 0).double().mean()))


def test_prints_as_a_table() -> None:
    def halve(tensor: Tensor, group: Group) -> Tensor:
        return tensor / 2

    explanation = explain(chain(halve, clamp(-0.0, 1e-5)), torch.tensor([-0.5, 0.0, 4.0, NAN]))
    assert repr(explanation).splitlines() == [
        "stage                         acts on             "
        "2-norm        rms    min    max       mean  zero  non-finite  cosine  changed",
        "input                                             "
        " 4.031      2.327   -0.5      4      1.167   25%         25%       1",
        "  halve                       the whole tensor    "
        " 2.016      1.164  -0.25      2     0.5833   25%         25%       1      50%",
        "  clamp(min=-0.0, max=1e-05)  each of 4 elements  "
        " 1e-05  5.774e-06      0  1e-05  3.333e-06   50%         25%  0.9923      50%",
    ]


def test_long_stages_print_on_one_line() -> None:
    text = repr(explain(project_halfspace(torch.ones(6, 6), 1.0), torch.ones(6, 6)))
    assert len(text.splitlines()) == 3
    assert "  project_halfspace(a=torch.tensor([[1.0, 1.0, 1.0,…" in text


def test_is_a_value() -> None:
    explanation, other = (explain(chain(sign(), scale(2.0)), torch.tensor([1.0, -2.0])) for _ in range(2))
    assert pickle.loads(pickle.dumps(explanation)) == explanation == other
    assert hash(explanation) == hash(other)
    with pytest.raises(AttributeError):
        explanation.rows = ()  # type: ignore[misc]
    with pytest.raises(KeyError, match="no parameter 'fc.weight' here"):
        explanation["fc.weight"]


# found: 31
@pytest.mark.parametrize(
    ("t", "shape", "group", "acts_on"),
    [
        (normalize(), (64, 10), {}, "the whole tensor"),
        (broadcast(normalize(), -1), (64, 10), {}, "each of 64 rows"),
        (broadcast(normalize(), -1), (10,), {}, "each of 10 elements"),
        (broadcast(normalize()), (8, 3, 5), {"param_ndim": -1}, "each of 8 sub-tensors of shape (3, 5)"),
        (broadcast(normalize()), (8, 3, 5), {"param_ndim": 1}, "each of 24 rows"),
        (broadcast(normalize()), (1, 5), {"param_ndim": -1}, "the only row"),
        (broadcast(normalize(), None), (10,), {"param_ndim": -1}, "the whole tensor"),
        (broadcast(lambda tensor, group: tensor, 0), (2, 3), {}, "each of 6 elements"),
        (broadcast(sign(), None), (2, 3), {}, "each of 6 elements"),
        (broadcast(centralize()), (2, 3), {"param_ndim": -1}, "the whole tensor"),
        (broadcast(centralize(), -1), (2, 3), {}, "each of 2 rows"),
        (broadcast(clip_by_global_norm(1.0)), (2, 3), {"param_ndim": -1}, "all tensors"),
        (masked(broadcast(normalize(), 1), "a"), (2, 3), {"name": "a"}, "each of 2 rows"),
        (masked(broadcast(normalize(), 1), "a"), (2, 3), {"name": "b"}, "nothing"),
        (partition({"a": sign(), "*": normalize()}), (2, 3), {"name": "b"}, "the whole tensor"),
        (masked(chain(sign(), normalize()), torch.tensor(True)), (2, 3), {}, "each of 6 elements, the whole tensor"),
        (sign(), (), {}, "the only element"),
        (normalize(), (), {}, "the only element"),
    ],
)
def test_what_a_stage_acts_on(t: Any, shape: tuple[int, ...], group: Group, acts_on: str) -> None:
    explanation = explain(t, torch.ones(shape), group)
    assert [row.acts_on for row in explanation.rows] == [None, acts_on]
    assert f"  {acts_on}  " in repr(explanation)
    assert acts_on in texts(explanation._repr_html_())


# found: 31
def test_what_the_stages_of_an_optimizer_act_on(adapt: Any) -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    pre = chain(sign(), normalize(), broadcast(normalize(), None), clip_by_global_norm(1.0))
    post = chain(*(masked(t, "*.bias") for t in (clip_by_norm(1.0), freeze("*.weight"), clip_by_global_norm(1.0))))
    explaining, _ = adapt(SGD(model.named_parameters(), lr=0.1), pre=pre, post=post)
    model(torch.ones(2, 1, 3)).sum().backward()
    explanation = explaining.explain()
    assert [row.acts_on for row in explanation["0.weight"].rows] == [
        *(None, "each of 12 elements", "each of 4 sub-tensors of shape (1, 3)", "the whole tensor", "all tensors"),
        *(None, "nothing", "nothing", "nothing"),
    ]
    assert [row.acts_on for row in explanation["2.bias"].rows][2::4] == ["each of 2 elements", "each of 2 elements"]
    acts_on = ["each element", "each sub-tensor, row or element", "each whole tensor", "all tensors"]
    some = ["each element (2 of 4 tensors)", "nothing", "all tensors (2 of 4 tensors)"]
    assert [row.acts_on for row in explanation.rows] == [None, *acts_on, None, *some]
    comments = [line.split("  # ")[1] for line in repr(explaining).splitlines() if "  # " in line]
    assert comments == [*acts_on, *some]
    if isinstance(explaining, ParamTransformingOptimizer):
        shown = texts(explaining._repr_html_())
        assert [text for text in shown if text in {*acts_on, *some}] == [*acts_on, *some]
    explaining, _ = adapt(SGD([nn.Parameter(torch.ones(64, 10))]), pre=normalize())
    assert "    normalize(),  # each of 64 rows\n" in repr(explaining)


# found: 31
def test_prints_where_a_step_would_fail() -> None:
    def is_first(group: Group) -> bool:
        if not group["name"].startswith("0."):
            raise ValueError("no")
        return True

    _, optimizer = make(pre=masked(sign(), is_first))
    assert "  # each element (2 of 4 tensors)\n" in repr(optimizer)


def texts(html: str) -> list[str]:
    return [text for text in ElementTree.fromstring(html).itertext() if text.strip()]


def test_html() -> None:
    html = explain(chain(lambda tensor, group: tensor * 0), torch.tensor([1.0, 3.0]))._repr_html_()
    assert "<lambda>" not in html
    header, first, second = list(ElementTree.fromstring(html).iter("tr"))
    assert [cell.text for cell in header] == list(HEADER)
    assert list(first.itertext()) == ["input", "3.162", "2.236", "1", "3", "2", "0%", "0%", "1"]
    assert list(second.itertext()) == ["<lambda>", "the whole tensor", *["0"] * 5, "100%", "0%", "-", "100%"]


def test_html_escapes() -> None:
    html = element("p", "</p>&", element("b", "1 < 2"), title='"><script>')
    assert ElementTree.fromstring(html).attrib == {"title": '"><script>'}
    assert texts(html) == ["</p>&", "1 < 2"]


def test_columns_of_tables_do_not_touch() -> None:
    optimizer = ParamTransformingOptimizer([nn.Parameter(torch.ones(2))], lr=0.1)
    for shown in (explain(sign(), torch.ones(2)), optimizer):
        for each in ElementTree.fromstring(shown._repr_html_()).iter():
            assert each.tag not in ("td", "th") or "padding" in each.attrib["style"]


def test_html_of_chains_and_optimizers() -> None:
    stages = ["<lambda>", "clip_by_norm(max_norm=1.0)"]
    assert texts(show_chain(stages)) == ["chain", *stages]
    inner = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    slots = {"pre": [(stage, "each row") for stage in stages], "update": [], "post": [("sign()", "each element")]}
    shown = ["pre", "<lambda>", "each row", stages[1], "each row", "update", "post", "sign()", "each element"]
    assert texts(show_optimizer("Wrapper", slots, inner)) == ["Wrapper", *shown, "inner_opt", "SGD", repr(inner)]


def test_plot_has_axes_for_each_row() -> None:
    explanation = explain(chain(sign(), lambda tensor, group: tensor * NAN), torch.linspace(-1, 2, 100))
    figure = explanation.plot()
    figure.savefig(io.BytesIO())
    assert [axes.get_title("left") for axes in figure.axes] == ["input", "sign()", "<lambda>"]
    drawn = [axes.patches[0].get_data().values for axes in figure.axes]  # type: ignore[attr-defined]
    assert [tuple(values) for values in drawn] == [row.histogram[0] for row in explanation.rows]


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.zeros(3), torch.tensor(5.0), torch.tensor([NAN])])
def test_plot_of_little(tensor: Tensor) -> None:
    figure = explain(chain(), tensor).plot()
    figure.savefig(io.BytesIO())
    assert len(figure.axes) == 1


def test_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = explain(sign(), torch.ones(1))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "gradchain\[examples\]"'):
        explanation.plot()


def make(**slots: Any) -> tuple[nn.Module, ParamTransformingOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ParamTransformingOptimizer(model.named_parameters(), Adam, lr=0.1, **slots)
    backward(model)
    return model, optimizer


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()


def test_explains_a_step() -> None:
    model, optimizer = make(pre=chain(clip_by_global_norm(1.0), ema(0.9)), update=cautious(), post=clamp(-0.3, 0.3))
    for _ in range(2):  # the second step has states
        explanation = optimizer.explain()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        names = [row.stage for row in explanation.rows]
        assert names == [
            *("gradient", "clip_by_global_norm(max_norm=1.0)", "ema(decay=0.9)"),
            *("update", "cautious()"),
            *("parameter", "clamp(min=-0.3, max=0.3)"),
        ]
        assert explanation.rows[1].norm == pytest.approx(1)
        assert explanation.rows[-1].norm == pytest.approx(float(after.norm()))
        assert explanation.rows[-1].mean == pytest.approx(float(after.mean()), abs=1e-7)
        for name, parameter in model.named_parameters():
            assert explanation[name].rows[-1].norm == pytest.approx(float(parameter.detach().norm()))
            assert explanation[name].name == name
        assert explanation[2] is explanation["1.weight"]
        assert explanation[2].number == 2
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        backward(model)


def test_a_row_is_over_all_parameters() -> None:
    model, optimizer = make(pre=sign())
    explanation = optimizer.explain()
    whole = explain(chain(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))  # type: ignore[union-attr]
    assert_close_rows(explanation.rows[0], whole.rows[0])


def assert_close_rows(row: Row, expected: Row) -> None:
    assert row.histogram[0] == expected.histogram[0]
    for name in ("norm", "rms", "min", "max", "mean", "zero", "nonfinite", "cosine"):
        assert getattr(row, name) == pytest.approx(getattr(expected, name)), name


def test_a_step_modifies_nothing() -> None:
    model, optimizer = make(pre=chain(keep_top_q(0.5, dq=0.5), ema(0.9)), post=scale(0.5))
    for _ in range(2):
        rng, before = torch.get_rng_state(), copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        grads = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
        optimizer.explain()
        assert torch.equal(torch.get_rng_state(), rng)
        assert_equal((optimizer.state_dict(), model.state_dict()), before)
        assert_equal([parameter.grad for parameter in model.parameters()], grads)
        optimizer.step()


def test_stages_of_some_parameters() -> None:
    _, optimizer = make(pre=chain(masked(scale(0.0), "*.bias"), partition({"1.*": sign(), "*": chain()})))
    explanation = optimizer.explain()
    assert [row.zero for row in explanation["0.bias"].rows] == [0, 1, 1]
    assert [row.zero for row in explanation["0.weight"].rows] == [0, 0, 0]
    assert explanation["0.weight"].rows[2].changed == 0
    assert explanation["1.weight"].rows[2].max == 1


def test_parameters_without_gradients() -> None:
    model, optimizer = make(pre=clip_by_global_norm(1.0), post=scale(0.5))
    next(model.parameters()).grad = None
    explanation = optimizer.explain()
    assert [row.stage for row in explanation[0].rows] == ["parameter", "scale(factor=0.5)"]
    assert len(explanation[1].rows) == 4


def test_a_skipped_step() -> None:
    model, optimizer = make(pre=skip_nonfinite())
    next(model.parameters()).grad[0, 0] = NAN  # type: ignore[index]
    _, row = optimizer.explain().rows
    assert row.zero == 1


def test_errors_in_a_step_say_where() -> None:
    def fail(tensor: Tensor, group: Group) -> Tensor:
        raise RuntimeError("no")

    _, optimizer = make(pre=chain(sign(), masked(fail, "1.bias")))
    with pytest.raises(
        RuntimeError, match=r"pre, group 0, parameter 3 '1.bias' .*: stage 1, masked\(.*fail.* no"
    ) as error:
        optimizer.explain()
    with pytest.raises(RuntimeError, match=re.escape(str(error.value))):
        optimizer.step()


class Noting(SGD):
    """Keeps what copies lose, and writes to all that it has."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.5)
        self.steps = 0
        self.draws = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        self.largest = torch.zeros(1)
        self.history: list[dict[str, Any]] = [{"seen": set(), "last": deque([0], 3)}]
        self.inside = Adam([nn.Parameter(torch.ones(2))])
        self.by_address = {p.data_ptr(): p for group in self.param_groups for p in group["params"]}

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("defaults", "state", "param_groups")}

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        self.draws.random()
        noise = 1 + torch.rand((), generator=self.generator)
        self.largest.add_(1)
        self.history[0]["seen"].add(self.steps)
        self.history[0]["last"].append(self.steps)
        self.history.append({})
        self.inside.zero_grad()
        self.inside.param_groups[0]["params"][0].sum().backward()
        self.inside.step()
        for group in self.param_groups:
            group["steps"] = self.steps
            for p in group["params"]:
                assert self.by_address[p.data_ptr()] is p
                p.grad.mul_(noise)
        loss = super().step(closure)
        for p in self.by_address.values():
            p.data = p.data + 1.0
        self.by_address = {p.data_ptr(): p for p in self.by_address.values()}
        return loss

    def looks_like(self) -> Any:
        history = [{key: list(value) for key, value in each.items()} for each in self.history]
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        adam = self.inside.state_dict(), self.inside.param_groups[0]["params"]
        random_states = self.draws.getstate(), self.generator.get_state()
        return copy.deepcopy((self.steps, random_states, self.largest, history, groups, self.state_dict(), adam))


@pytest.fixture(params=["wrapper", "attach"])
def adapt(request: pytest.FixtureRequest) -> Any:
    def wrap(inner: Any, **slots: Any) -> tuple[Any, Any]:
        """What explains, and what makes a step."""
        if request.param == "attach":
            return attach(inner, **slots), inner
        wrapper = ParamTransformingOptimizer(InnerOpt=inner, **slots)
        return wrapper, wrapper

    return wrap


# found: 16
# found: 36
@pytest.mark.parametrize("steps", [0, 2])
def test_the_step_is_taken_back(adapt: Any, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inner = Noting(model.named_parameters(), lr=0.1)
    explaining, stepping = adapt(inner, pre=chain(ema(0.5), sign()), update=scale(0.5), post=clamp(-2.0, 1.0))
    scheduler = StepLR(stepping, 1, 0.5)
    calls: list[str] = []
    for optimizer in {id(each): each for each in (inner, stepping)}.values():
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    for step in range(steps + 1):
        backward(model)
        hooks = register_optimizer_step_pre_hook(lambda *_: calls.append("global"))
        before, rng = inner.looks_like(), torch.get_rng_state()
        grads = [parameter.grad for parameter in model.parameters()]
        kept = [(p.detach().clone(), p.data_ptr(), p._version, copy.deepcopy(p.grad)) for p in model.parameters()]
        patched, counted = stepping.__dict__["step"], getattr(stepping, "_opt_called", None)
        calls.clear()
        explanation = explaining.explain()
        assert calls == []
        assert_equal(inner.looks_like(), before)
        assert torch.equal(torch.get_rng_state(), rng)
        assert (stepping.__dict__["step"], getattr(stepping, "_opt_called", None)) == (patched, counted)
        for p, grad, (value, address, version, old_grad) in zip(model.parameters(), grads, kept, strict=True):
            assert torch.equal(p.detach(), value)
            assert (p.data_ptr(), p._version) == (address, version)
            assert p.grad is grad
            assert_equal(grad, old_grad)
        hooks.remove()
        stepping.step()
        scheduler.step()
        assert inner.steps == step + 1
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert explanation.rows[-1].norm == pytest.approx(float(after.norm()))
        assert [row.stage for row in explanation.rows if row.changed is None] == ["gradient", "update", "parameter"]


# found: 36
def test_a_name_where_there_are_none() -> None:
    model, optimizer = make(pre=sign())
    with pytest.raises(
        KeyError, match=r"no parameter 'a' here; there are \['0.weight', '0.bias', '1.weight', '1.bias'\]\""
    ):
        optimizer.explain()["a"]
    unnamed = ParamTransformingOptimizer(model.parameters(), pre=sign())
    for key, remedy in (
        ("0.weight", r", without names; give the optimizer model.named_parameters\(\), or model="),
        (7, ".$"),
    ):
        with pytest.raises(KeyError, match=rf"no parameter {key!r} here; there are \[0, 1, 2, 3\]{remedy}"):
            unnamed.explain()[key]


# found: 36
def test_what_is_removed_explains_nothing() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))])
    attached = attach(optimizer, pre=sign())
    attached.remove()
    with pytest.raises(RuntimeError, match=r"attach\(SGD.* is removed, .*call explain\(\) before remove\(\)"):
        attached.explain()


# found: 16
def test_a_step_that_fails_is_taken_back(adapt: Any) -> None:
    def fail(tensor: Tensor, group: Group) -> Tensor:
        raise RuntimeError("no")

    model = nn.Linear(3, 2)
    inner = Noting(model.parameters(), lr=0.1)
    explaining, _ = adapt(inner, pre=sign(), post=fail)
    backward(model)
    before, grads = inner.looks_like(), [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="post, .*fail.* no"):
        explaining.explain()
    assert_equal(inner.looks_like(), before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


# found: 16
def test_the_graph_of_a_later_backward_stays_valid() -> None:
    model, optimizer = make(pre=sign(), post=clamp(-0.3, 0.3))
    loss = model(torch.ones(5, 3)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.explain()
    loss.backward()


# found: 16
@pytest.mark.parametrize(
    "t", [skip_nonfinite(), clip_by_history(0.5), masked(clip_by_history(0.5), torch.tensor(True))]
)
def test_a_shared_state_where_parameters_have_no_gradient(adapt: Any, t: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    explaining, stepping = adapt(Adam(model.parameters(), lr=0.1), pre=t, post=scale(0.5))
    for frozen in (0, 3, 1):
        backward(model)
        list(model.parameters())[frozen].grad = None
        explanation = explaining.explain()
        assert len(explanation[frozen].rows) == 2
        assert len(explanation[2].rows) == 4
        stepping.step()
        assert explanation[2].rows[-1].norm == pytest.approx(float(list(model.parameters())[2].detach().norm()))


def test_pre_is_explained_without_the_step_of_the_inner_optimizer() -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))
    x.grad = torch.tensor([3.0, 4.0])
    optimizer = ParamTransformingOptimizer([x], LBFGS, pre=clip_by_norm(1.0), param_ndim=None)
    assert optimizer.explain().rows[1].norm == pytest.approx(1)
    optimizer.post = chain(sign())
    with pytest.raises(TypeError, match=r"the step of LBFGS, which explain\(\) makes without a closure: .*'closure'"):
        optimizer.explain()


@pytest.mark.parametrize("rehearsal", [True, False])
def test_a_step_that_moves_nothing_has_no_rows(rehearsal: bool) -> None:
    x = nn.Parameter(torch.tensor([3.0]))
    x.grad = torch.tensor([0.0 if rehearsal else 1.0])
    assert bool(ParamTransformingOptimizer([x], pre=sign(), lr=0.0).explain().rows) is not rehearsal


def test_what_is_not_transformed_is_shown_too() -> None:
    _, optimizer = make(update=masked(scale(0.0), "0.*"))
    assert optimizer.explain()["1.weight"].rows[0].norm == pytest.approx(0.1 * math.sqrt(8))
    assert optimizer.explain()["1.weight"].rows[1].changed == 0
    assert optimizer.explain()["0.weight"].rows[1].zero == 1


def test_how_stages_run() -> None:
    options = {"factor": 2.0}

    def reads_a_value(tensor: Tensor, group: Group) -> Tensor:
        return tensor if tensor.sum() > 0 else tensor * 2

    def reads_a_dict(tensor: Tensor, group: Group) -> Tensor:
        return tensor * options["factor"]

    def halve(tensor: Tensor, group: Group) -> Tensor:
        return tensor / 2

    pre = chain(halve, clip_by_global_norm(1.0), reads_a_value, masked(reads_a_dict, "1.*"), ema(0.9))
    _, optimizer = make(
        pre=pre, param_ndim=None, post=masked(chain(sign(), clip_by_global_norm(1.0)), torch.tensor(True))
    )
    explanation = optimizer.explain()
    value = f"as it is: reads a value (line {reads_a_value.__code__.co_firstlineno + 1})"
    names = "as it is: reads options, a dict, which can change without notice"
    joint = "as it is: measures all together"
    ways = [None, "traced", "measures all, traced", value, names, "traced", None, joint]
    assert [row.runs for row in explanation.rows] == ways
    assert [row.runs for row in explanation["1.bias"].rows] == ways
    assert [row.runs for row in explanation["0.bias"].rows] == [*ways[:4], None, *ways[5:]]
    assert [line.rpartition("  ")[2] for line in repr(explanation).splitlines()[2:7]] == ways[1:6]
    shown = texts(explanation._repr_html_())
    assert [text for text in shown if text in {"runs", *ways}] == ["runs", *filter(None, ways)]


def test_the_program_is_what_runs() -> None:
    def reads_a_value(tensor: Tensor, group: Group) -> Tensor:
        return tensor if tensor.sum() > 0 else tensor * 2

    pre = chain(clip_by_global_norm(1.0), ema(0.9), reads_a_value, masked(sign(), "1.*"))
    model, optimizer = make(pre=pre, update=scale(0.5), param_ndim=None)
    lines = optimizer.explain().program.splitlines()
    assert [line for line in lines if line.startswith(("# pre", "# update", "# post"))] == [
        "# pre: stage 0, broadcast(clip_by_global_norm(max_norm=1.0)): measures 4 tensors",
        "# pre: stage 0, broadcast(clip_by_global_norm(max_norm=1.0)); stage 1, broadcast(ema(decay=0.9)): "
        "traced, 4 tensors in 1 program",
        "# pre: stage 2, broadcast(reads_a_value): as it is, 4 tensors: reads a value "
        f"(line {reads_a_value.__code__.co_firstlineno + 1})",
        "# pre: stage 3, masked(broadcast(sign()), '1.*'): traced, 2 tensors in 1 program",
        "# update: stage 0, broadcast(scale(factor=0.5)): traced, 4 tensors in 1 program",
    ]
    optimizer.step()
    backward(model)
    programs = "\n".join(line for line in optimizer.explain().program.splitlines() if not line.startswith("#"))
    optimizer.step()
    plans = optimizer._engine._plans
    assert plans is not None
    operations = [operation for plan in plans.of.values() for operation in plan.operations]
    blocks = [block for each in operations if isinstance(each, Programs) for block in each.blocks]
    assert programs + "\n" == "".join(dict.fromkeys(block.program.source for block in blocks))


def test_the_program_says_how_tensors_go_through_it() -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in [*[(4, 4)] * 5, (3, 5), (6,), (2**8, 2**10), (2**10, 2**10)]]
    for param in params:
        param.grad = torch.ones_like(param)
    pre = chain(lambda tensor, group: tensor.cosh().tanh() / 2)
    lines = ParamTransformingOptimizer(params, pre=pre, param_ndim=None).explain().program.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# pre: stage 0, broadcast(<lambda>): traced, 9 tensors in 2 programs",
        "# for 5 tensors stacked, 1 tensor in pieces, 1 tensor one by one",
        "# for 2 tensors in lists",
    ]


def test_by_hand_there_is_no_program() -> None:
    explanation = explain(sign(), torch.ones(2))
    assert explanation.program == ""
    assert [row.runs for row in explanation.rows] == [None, None]


def test_without_chains_there_are_no_rows() -> None:
    explanation = make()[1].explain()
    assert repr(explanation) == "  ".join(HEADER)
    assert explanation.plot().axes


def assert_equal(actual: Any, expected: Any) -> None:
    assert repr(numbers(actual)) == repr(numbers(expected))  # where NaN is NaN


def numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(each) for each in value]
    return value.tolist() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("count", [3, 150])
def test_plot_of_a_whole_model(count: int) -> None:
    params = [(f"layer.{i}", nn.Parameter(torch.ones(3))) for i in range(count)]
    optimizer = ParamTransformingOptimizer(params, pre=chain(clip_by_norm(1.0), sign()), post=sign(), lr=0.1)
    for i, (_, param) in enumerate(params):
        param.grad = torch.full((3,), float(i))
    params[1][1].grad = torch.tensor([1.0, NAN, 1.0])
    figure = optimizer.explain().plot()
    figure.savefig(io.BytesIO())
    assert [axes.get_xlabel() for axes in figure.axes] == ["2-norm of the gradient", "2-norm of the parameter"]
    assert all(axes.get_xscale() == "log" for axes in figure.axes)
    gradient = figure.axes[0]
    shown = [text.get_text() for legend in [gradient.get_legend()] if legend for text in legend.get_texts()]
    assert shown == ["gradient", "clip_by_norm(max_norm=1.0)", "sign()", "has NaN or infinity"]
    names = [text.get_text() for text in gradient.get_yticklabels()]
    assert names[0] == "layer.0"
    assert len(names) == min(count, 38)  # each fourth of many
    points = np.asarray(gradient.collections[count].get_offsets())
    assert points.shape == (count, 2)
    width, height = figure.get_size_inches()
    assert max(width, height) < 12
