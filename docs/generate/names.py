"""The public names of gradchain, read from its source: what modules list in ``__all__``, with what docstrings say."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Name:
    """A public name.

    Attributes:
        name: The name.
        module: The module that exports it.
        source: The module that defines it.
        doc: Its docstring.
    """

    name: str
    module: str
    source: str
    doc: str

    @property
    def summary(self) -> str:
        """The first sentence of the docstring, without its last dot."""
        return " ".join(self.doc.split("\n\n")[0].split()).removesuffix(".")


def prose(text: str) -> str:
    """Text of a docstring as Markdown, where ``<a, x>`` outside of code would be a tag."""
    return re.sub(r"``.*?``|<(?=\w)", lambda match: "&lt;" if match[0] == "<" else match[0], text)


@cache
def public_names() -> dict[str, Name]:
    """Each public name of ``gradchain`` and of its modules with an ``__all__``, and each module of integrations."""
    names: dict[str, Name] = {}
    for path in sorted((ROOT / "gradchain").rglob("*.py"), key=lambda path: (len(path.parts), path)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        if module.startswith("gradchain.integrations."):
            name = module.removeprefix("gradchain.")
            names[name] = Name(name, "gradchain", "gradchain", ast.get_docstring(_parse(module)) or "")
        for name in _exports(module):
            names.setdefault(name, Name(name, module, *_find(module, name)))
    return names


def _exports(module: str) -> list[str]:
    for names, node in _assignments(module):
        if "__all__" in names and node.value:
            return list(ast.literal_eval(node.value))
    return []


def _find(module: str, name: str) -> tuple[str, str]:
    """The module that defines a name, and its docstring there."""
    body = _parse(module).body
    for node in reversed(body):  # what overloads stand for comes last
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return _find(node.module, name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return module, ast.get_docstring(node) or ""
    for names, assignment in _assignments(module):
        following = body[body.index(assignment) + 1 :][:1]
        if name in names and following and isinstance(following[0], ast.Expr):
            return module, inspect.cleandoc(ast.literal_eval(following[0].value))
    return module, ""


def _assignments(module: str) -> list[tuple[set[str], ast.Assign | ast.AnnAssign]]:
    """What a module assigns to, and with what, at its top level."""
    found: list[tuple[set[str], ast.Assign | ast.AnnAssign]] = []
    for node in _parse(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.append(({target.id for target in targets if isinstance(target, ast.Name)}, node))
    return found


@cache
def _parse(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(source.read_text(encoding="utf-8"))
