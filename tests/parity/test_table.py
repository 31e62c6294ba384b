"""``docs/coming-from/optax.md`` lists all of optax, and names of ours and of torch that exist."""

import ast
import importlib
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import pytest
import torch

import gradchain

optax = pytest.importorskip("optax")

TABLE = Path(__file__).parents[2] / "docs" / "coming-from" / "optax.md"
CODE = re.compile(r"`([^`]+)`")


def rows() -> Iterator[tuple[str, str, str]]:
    """The heading above each row, and its first two cells."""
    heading = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| `"):
            _, theirs, ours, *_ = line.split("|")
            yield heading, theirs, ours


def is_listed(value: Any) -> bool:
    """Whether it is a function for users, and not a state, a type or a loss."""
    if isinstance(value, ModuleType | type) or get_origin(value) is not None:
        return value is optax.MultiSteps
    return not getattr(value, "__module__", "").startswith("optax.losses")


@pytest.mark.parametrize("module", ["optax", "optax.projections", "optax.contrib"])
def test_lists_each_name_of_optax_once(module: str) -> None:
    namespace = importlib.import_module(module)
    listed = [
        name
        for heading, theirs, _ in rows()
        if (heading if heading.startswith("optax.") else "optax") == module
        for name in CODE.findall(theirs)
    ]
    public = [name for name in dir(namespace) if not name.startswith("_") and is_listed(getattr(namespace, name))]
    assert sorted(listed) == sorted(public)


def called(code: str) -> list[str]:
    """What a piece of code calls, or the name that it is."""
    tree = ast.parse(code, mode="eval").body
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(node) for node in calls or [tree]]


def exists(name: str) -> bool:
    if name in gradchain.__all__:
        return True
    try:
        attrgetter(name.removeprefix("torch."))(torch)
    except AttributeError:
        return False
    return name.startswith("torch.")


def test_names_of_ours_exist() -> None:
    cells = [ours.strip() for _, _, ours in rows()]
    assert all(cell == "none" or CODE.fullmatch(cell) for cell in cells)
    names = {name for cell in cells for code in CODE.findall(cell) for name in called(code)}
    assert {name for name in names if not exists(name)} == set()
