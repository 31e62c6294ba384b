"""Makes a case that fails as small as possible, and shows it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from tests.differential.case import ADAPTERS, SLOTS, Case
from tests.differential.draw import INNER
from tests.differential.run import check

T = TypeVar("T")


def shrink(case: Case, adapter: str) -> Case:
    """A smaller case that fails in the same way: by the same kind of error in the same adapter."""
    kind = type(_problem(case, adapter))
    while True:
        smaller = next((each for each in _smaller(case) if type(_problem(each, adapter)) is kind), None)
        if smaller is None:
            return case
        case = smaller


def report(case: Case, problem: Exception) -> str:
    """What a developer can read and paste."""
    adapter = str(problem.args[0] if problem.args else "").partition(",")[0]
    if adapter not in ADAPTERS:
        return f"seed {case.seed}: {_show(problem)}\n    {case!r}"
    small = shrink(case, adapter)
    return (
        f"seed {case.seed}: {_show(problem)}\n"
        f"made small: {_show(_problem(small, adapter))}\n"
        "    from torch import tensor\n"
        "    from tests.differential import Case, Param, ParamGroup, Step, check\n"
        f"    check({small!r}, {adapter!r})\n"
    )


def _show(problem: Exception | None) -> str:
    return f"{type(problem).__name__}: {problem}"


def _problem(case: Case, adapter: str) -> Exception | None:
    try:
        check(case, adapter)
    except Exception as error:
        return error
    return None


def _smaller(case: Case) -> Iterator[Case]:
    for slot in SLOTS:
        for code in _smaller_codes(getattr(case, slot)):
            yield _replace(case, slot, code)
    if len(case.groups) > 1:
        for index in range(1, len(case.groups)):
            if not any(change[0] >= index for step in case.steps for change in step.changes):
                yield _only(replace(case, groups=case.groups[:index] + case.groups[index + 1 :]))
    for index, group in enumerate(case.groups):
        for number in range(len(group.params)) if len(group.params) > 1 else ():
            params = group.params[:number] + group.params[number + 1 :]
            yield _only(_replace_at(case, "groups", index, replace(group, params=params)))
        for key in group.options:
            if key not in ("param_ndim", "kind"):
                options = {other: value for other, value in group.options.items() if other != key}
                yield _replace_at(case, "groups", index, replace(group, options=options))
    if len(case.steps) > 1:
        yield replace(case, steps=case.steps[:-1])
    for index, step in enumerate(case.steps):
        for key, plain in (
            ("event", ""),
            ("changes", []),
            ("closure", False),
            ("nan", ""),
            ("fails", ""),
            ("wrong", None),
        ):
            if getattr(step, key) != plain:
                yield _replace_at(case, "steps", index, _replace(step, key, plain))
        for name, layout in step.grads.items():
            if layout != "contiguous":
                grads = {**step.grads, name: "contiguous"}
                yield _replace_at(case, "steps", index, replace(step, grads=grads))
    if case.inner != INNER[0]:
        yield replace(case, inner=INNER[0])
    for index, group in enumerate(case.groups):
        for number, param in enumerate(group.params):
            if param.layout != "contiguous":
                params = [*group.params[:number], replace(param, layout="contiguous"), *group.params[number + 1 :]]
                yield _replace_at(case, "groups", index, replace(group, params=params))


def _replace_at(case: Case, attribute: str, index: int, value: Any) -> Case:
    values = list(getattr(case, attribute))
    values[index] = value
    return _replace(case, attribute, values)


def _replace(instance: T, attribute: str, value: Any) -> T:
    changes: dict[str, Any] = {attribute: value}
    return replace(instance, **changes)  # type: ignore[type-var]


def _only(case: Case) -> Case:
    """The case without what speaks of parameters that it has no longer."""
    known = case.params()
    steps = [
        replace(
            step,
            grads={name: layout for name, layout in step.grads.items() if name in known},
            nan=step.nan if step.nan in known else "",
            fails=step.fails if step.fails in known else "",
        )
        for step in case.steps
    ]
    return replace(case, steps=steps)


def _smaller_codes(code: str) -> Iterator[str]:
    """The expression without one of its parts, or with a part in place of what is around it."""
    tree = ast.parse(code, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            is_chain = isinstance(node.func, ast.Name) and node.func.id == "chain"
            for index, argument in enumerate(node.args):
                if is_chain:
                    rest = node.args[:index] + node.args[index + 1 :]
                    old, node.args = node.args, rest
                    yield ast.unparse(tree)
                    node.args = old
                for inner in ast.walk(argument):
                    if is_chain and inner is not argument and isinstance(inner, ast.Call):
                        old = node.args
                        node.args = [*node.args[:index], inner, *node.args[index + 1 :]]
                        yield ast.unparse(tree)
                        node.args = old
