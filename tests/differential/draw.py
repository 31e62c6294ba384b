"""Draws cases."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import tensor

from tests.differential.case import DTYPES, EVENTS, MEASURES, SLOTS, Case, Param, ParamGroup, Step


@dataclass(frozen=True)
class Template:
    """An expression of a transform; fields in braces are hyperparameters, with the range that they are drawn from."""

    code: str
    slots: tuple[str, ...] = SLOTS
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def _t(code: str, slots: str = "pre update post", **ranges: tuple[float, float]) -> Template:
    return Template(code, tuple(slots.split()), ranges)


TEMPLATES = [
    *map(_t, ("sign()", "normalize()", "normalize(1)", "normalize(inf)", "centralize()", "standardize()")),
    *map(_t, ("soft_sign", "subtract_mean", "reverse", "identity", "by_lr", "lmo_l1()", "lmo_l2()", "lmo_linf()")),
    _t("scale({factor})", factor=(-1.5, 1.5)),
    _t("add({bias})", bias=(-0.5, 0.5)),
    _t("clamp({min}, {max})", min=(-1, 0), max=(0.1, 1)),
    _t("clamp(max={max})", max=(0.1, 1)),
    _t("clip_by_norm({max_norm})", max_norm=(0.3, 2)),
    _t("clip_by_norm({max_norm}, ord=inf)", max_norm=(0.3, 2)),
    _t("clip_by_norm({max_norm}, ord=1)", max_norm=(0.3, 2)),
    _t("clip_by_rms({threshold})", threshold=(0.3, 2)),
    _t("clip_adaptive({clipping})", "pre update", clipping=(0.05, 1)),
    _t("keep_top_q({q})", q=(0.2, 0.8)),
    _t("reject_from_param()", "pre update"),
    _t("towards_param", "pre update"),
    _t("along_grad", "update post"),
    _t("ema({decay})", decay=(0.3, 0.9)),
    _t("ema({decay}, debias=False)", decay=(0.3, 0.9)),
    _t("trace({decay})", decay=(0.3, 0.9)),
    _t("trace({decay}, nesterov=True)", decay=(0.3, 0.9)),
    _t("amplify_slow({alpha}, {decay})", alpha=(0.5, 2), decay=(0.3, 0.9)),
    _t("extrapolate({weight})", weight=(0.3, 1)),
    _t("remember({decay})", decay=(0.3, 0.9)),
    _t("accumulate(2)", "pre"),
    _t("add_noise({eta}, seed=3)", "pre", eta=(0.01, 0.1)),
    _t("dropout({p}, seed=5)", "pre update", p=(0.2, 0.6)),
    _t("cautious()", "update"),
    _t("trust_ratio()", "update"),
    _t("scale_by_param_norm()", "update"),
    _t("scale_by_param_rms()", "update"),
    _t("decay_weights({rate})", "update", rate=(0.01, 0.2)),
    _t("decay_weights({rate}, cautious=True)", "update", rate=(0.01, 0.2)),
    _t("decay_to_init({rate})", "update", rate=(0.01, 0.2)),
    _t("project_nonnegative()", "post"),
    _t("project_box({lower}, {upper})", "post", lower=(-1, 0), upper=(0.1, 1)),
    _t("project_linf_ball({radius})", "post", radius=(0.3, 2)),
    _t("project_l2_ball({radius})", "pre post", radius=(0.3, 2)),
    _t("project_l2_sphere({radius})", "post", radius=(0.3, 2)),
    _t("project_l1_ball({radius})", "pre post", radius=(0.3, 2)),
    _t("project_l1_sphere({radius})", "post", radius=(0.3, 2)),
    _t("project_simplex({scale})", "post", scale=(0.3, 2)),
    _t("project_hyperplane({a}, {b})", "post", a=(0.3, 2), b=(-1, 1)),
    _t("project_halfspace({a}, {b})", "post", a=(0.3, 2), b=(-1, 1)),
    _t("project_ball_around_reference({radius})", "post", radius=(0.05, 0.5)),
    _t("param_ema({decay})", "post", decay=(0.3, 0.9)),
    _t("param_ema({decay}, debias=False)", "post", decay=(0.3, 0.9)),
    _t("lookahead(2, {alpha})", "post", alpha=(0.3, 0.9)),
    *(_t("clip_by_global_norm({max_norm})", max_norm=(0.5, 4)),) * 3,
    _t("clip_by_global_norm({max_norm}, ord=inf)", max_norm=(0.5, 4)),
    _t("normalize_by_global_norm()"),
    _t("clip_by_history({percentile}, window=3)", "pre update", percentile=(20, 80)),
    _t("clip_by_zscore({threshold}, decay=0.8, warmup=2)", "pre update", threshold=(0.1, 1)),
    *(_t("skip_large({max_norm}, 1)", "pre", max_norm=(3, 8)),) * 2,
    _t("skip_nonfinite(50)", "pre"),
]

GUARDS = (
    *("skip_nonfinite(1)", "zero_nonfinite()", "masked(skip_nonfinite(50), tensor(True))"),
    *("with_error_feedback(skip_nonfinite(50))", "masked(masked(skip_nonfinite(50), is_even), tensor(True))"),
)

INNER: tuple[str, ...] = (
    *("('SGD', {'lr': 0.1})", "('SGD', {'lr': 0.1, 'momentum': 0.9, 'nesterov': True})"),
    *("('SGD', {'lr': 0.1, 'weight_decay': 0.1, 'maximize': True})", "('Adam', {'lr': 0.1, 'eps': 0.01})"),
    *("('AdamW', {'lr': 0.1, 'eps': 0.01, 'weight_decay': 0.1})", "('RMSprop', {'lr': 0.03, 'eps': 0.1})"),
    *("('Adagrad', {'lr': 0.1, 'eps': 0.01})", "('Adamax', {'lr': 0.05, 'eps': 0.01})"),
)
if torch.__version__ < "2.12":  # whose Adagrad takes no parameters later on
    INNER = tuple(inner for inner in INNER if "Adagrad" not in inner)


class Draw:
    """Draws one case."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.is_local = self.rng.random() < 0.5
        self.named = self.rng.random() < 0.6
        self.has_scalars = self.rng.random() < 0.3
        self.is_calm = self.rng.random() < 0.4
        """Whether nothing but gradients changes from step to step, so that plans get old."""
        self.layouts: dict[str, str] = {}
        self.kinds: dict[str, int] = {}
        self.own = 0
        self.ranges: dict[str, tuple[float, float]] = {}
        self.templates = [t for t in TEMPLATES if not (self.is_local and t.code.split("(")[0] in MEASURES)]
        dtypes = {"float64": 14, "float32": 2, "mixed": 2, "bfloat16": 1, "float16": 1}
        self.dtype = self.rng.choices(list(dtypes), list(dtypes.values()))[0]

    def case(self) -> Case:
        rng = self.rng
        guard = rng.choice(GUARDS) if not self.is_local and rng.random() < 0.2 else ""
        self.kinds["skip_nonfinite"] = "skip_nonfinite" in guard
        pre, update, post = (self.chain(slot, 0, rng.choice(n)) for slot, n in zip(SLOTS, COUNTS, strict=True))
        if guard:
            pre = f"chain({guard}, {pre})"
        fails = rng.random() < 0.35
        if fails:
            slot = rng.randrange(3)
            chains = [pre, update, post]
            before, _, after = chains[slot].partition("chain(")
            bomb = self.wrap("may_fail", 1) if rng.random() < 0.4 else "may_fail"
            chains[slot] = f"{before}chain({bomb}, {after}" if rng.random() < 0.5 else f"chain({chains[slot]}, {bomb})"
            pre, update, post = chains
        count = rng.choice((3, 4, 5)) + 2 * self.is_calm
        groups = self.groups()
        steps: list[Step] = []
        for number in range(count):
            steps.append(self.step(number, groups, guard, steps))
        if fails:
            at = rng.randrange(count)
            present = list(steps[at].grads)
            if present:
                steps[at] = replace(steps[at], fails=rng.choice(present))
        return Case(self.seed, pre, update, post, rng.choice(INNER), groups, steps, self.named)

    # Chains

    def chain(self, slot: str, depth: int, count: int) -> str:
        return f"chain({', '.join(self.stage(slot, depth) for _ in range(count))})"

    def stage(self, slot: str, depth: int) -> str:
        if depth > 2 or self.rng.random() < 0.6:
            return self.leaf(slot)
        if self.rng.random() < 0.25:
            return self.partition(slot, depth)
        inner = self.chain(slot, depth + 1, 2) if self.rng.random() < 0.35 else self.stage(slot, depth + 1)
        return self.wrap(inner, depth)

    def wrap(self, inner: str, depth: int) -> str:
        kind = self.rng.choice(("masked", "masked", "entries", "broadcast", "feedback", "chain"))
        if kind == "masked":
            return f"masked({inner}, {self.where()})"
        if kind == "entries":
            masks = ["tensor(True)", "tensor(False)"]
            masks += [] if self.has_scalars else ["tensor([True, False, True])"] * 3
            return f"masked({inner}, {self.rng.choice(masks)})"
        if kind == "broadcast":
            ndims = ("", ", None", ", 0") if self.has_scalars else ("", ", None", ", 0", ", 1", ", -1")
            return f"broadcast({inner}{self.rng.choice(ndims)})"
        return f"with_error_feedback({inner})" if kind == "feedback" else f"chain({inner})"

    def where(self) -> str:
        names = ["'a*'", "'*0.*'"] if self.named else []
        return self.rng.choice([*names, "is_matrix", "is_even", "is_x"])

    def partition(self, slot: str, depth: int) -> str:
        first, second = (self.stage(slot, depth + 1) for _ in range(2))
        if self.named and self.rng.random() < 0.5:
            return f"partition({{'*0.*': {first}, '*': {second}}})"
        return f"partition({{'x': {first}, 'y': {second}}}, by='kind')"

    def leaf(self, slot: str) -> str:
        template = self.rng.choice([t for t in self.templates if slot in t.slots])
        values = {key: self.number(bounds) for key, bounds in template.ranges.items()}
        code = template.code.format(**values)
        kind, is_call, _ = code.partition("(")
        if not is_call:
            return code
        if self.rng.random() < 0.2:
            self.own += 1
            prefix = f"own{self.own}"
            code += f".named({prefix!r})"
        else:
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            prefix = kind if self.kinds[kind] == 1 else f"{kind}_{self.kinds[kind]}"
        self.ranges.update({f"{prefix}.{key}": bounds for key, bounds in template.ranges.items()})
        return code

    def number(self, bounds: tuple[float, float]) -> float:
        return round(self.rng.uniform(*bounds), 2)

    # Groups

    def groups(self) -> list[ParamGroup]:
        letters = "abcd"[: self.rng.choice((1, 2, 2, 3))]
        joins = sorted(0 if letter == "a" else self.rng.choice((0, 0, 1, 2)) for letter in letters)
        return [self.group(letter, at) for letter, at in zip(letters, joins, strict=True)]

    def group(self, letter: str, joins: int) -> ParamGroup:
        rng = self.rng
        shapes = [(3,), (2, 3), (3, 3), (2, 2, 3), (1, 2, 2, 3), (1, 3), (0, 3)] + [()] * (3 * self.has_scalars)
        params = []
        for number in range(rng.choice((1, 2, 3))):
            shape = rng.choice(shapes)
            name = f"{letter}{number}.{'bias' if len(shape) < 2 else 'weight'}"
            dtype = rng.choice(("float64", "float32")) if self.dtype == "mixed" else self.dtype
            layout = rng.choice(("contiguous", "contiguous", "channels_last", "transposed", "strided"))
            params.append(Param(name, shape, dtype, layout))
        least = min(len(param.shape) for param in params)
        options: dict[str, Any] = {
            "param_ndim": rng.choice([None, *range(-least, least + 1)]),
            "kind": rng.choice("xy"),
        }
        if rng.random() < 0.4:
            options["lr"] = self.number((0.02, 0.2))
        for key in self.ranges:
            if rng.random() < 0.25:
                options[key] = self.value(key)
        if rng.random() < 0.3:
            options["grad_scale"] = self.number((0.5, 2))
        if rng.random() < 0.2:
            options["grad_bias"] = self.number((-0.5, 0.5))
        return ParamGroup(params, options, joins)

    def value(self, key: str) -> Any:
        value = self.number(self.ranges[key])
        return tensor(value) if self.rng.random() < 0.4 else value

    def step(self, number: int, groups: list[ParamGroup], guard: str, before: list[Step]) -> Step:
        rng = self.rng
        share = rng.choice((1.0, 1.0, 0.7, 0.4, 0.0))
        present = [param.name for group in groups if group.joins <= number for param in group.params]
        grads = {name: self.layout(name) for name in present if rng.random() < share}
        if before and before[-1].nan and rng.random() < 0.7:
            grads.pop(before[-1].nan, None)  # a flag that it has raised must not count again
        changes: list[tuple[int, str, Any]] = []
        if number and rng.random() < 0.3:
            index = rng.choice([i for i, group in enumerate(groups) if group.joins <= number])
            key = rng.choice(["lr", *self.ranges])
            changes = [(index, key, self.number((0.02, 0.2)) if key == "lr" else self.value(key))]
        event = rng.choice(EVENTS) if not self.is_calm and rng.random() < 0.4 else ""
        if rng.random() < 0.04:
            event = rng.choice(DTYPES)
        wrong = None
        if self.ranges and rng.random() < 0.05:
            wrong = (
                rng.choice([i for i, group in enumerate(groups) if group.joins <= number]),
                rng.choice([*self.ranges]),
            )
        nan = ""
        if guard and rng.random() < 0.4:
            every = [param.name for group in groups for param in group.params]
            nan = rng.choice([name for name in every[::2] if name in grads] or [""])
        return Step(grads, event if number else "", changes, rng.random() < 0.2, nan, wrong=wrong)

    def layout(self, name: str) -> str:
        """The layout of a gradient; in a calm case mostly the one that it had before."""
        layouts = ("contiguous", "contiguous", "channels_last", "transposed", "strided", "expanded")
        known = self.layouts.setdefault(name, "negated" if self.rng.random() < 0.05 else self.rng.choice(layouts))
        # One that is negated only now and then is an error, which torch raises.
        stays = known == "negated" or (self.is_calm and self.rng.random() < 0.9)
        return known if stays else self.rng.choice(layouts)


COUNTS = ((0, 1, 2, 2, 3), (0, 0, 1, 2), (0, 1, 1, 2))


def make_case(seed: int) -> Case:
    """The case of a seed."""
    return Draw(seed).case()
