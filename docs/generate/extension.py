"""What docstrings and signatures become on their way to a page: an extension of griffe, which reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

from docs.generate.names import prose

CONTEXT = ("tensor", "group", "state")


class Transforms(griffe.Extension):
    """Shows factories as they are called, and formulas, tables and examples in a way that Markdown knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring."""
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Leave out of a transform what the factory is not given."""
        func.overloads = None  # the docstring is that of all
        decorators = [str(decorator.value) for decorator in func.decorators]
        if any(re.match(r"transform\b", decorator) for decorator in decorators):
            func.parameters = griffe.Parameters(*(p for p in func.parameters if p.name not in CONTEXT))
            func.returns = griffe.ExprName("Transform", parent=func.module)
            func.decorators.clear()


def rewrite(text: str) -> str:
    """A docstring as Markdown: formulas, references and tables are written in another way there."""
    before, example, after = text.partition("\nExample:\n")
    text = prose(before) + example + after
    text = re.sub(r"\.\. math:: (.+?)(?=\n\n|\Z)", lambda match: f"$$\n{match[1]}\n$$", text, flags=re.DOTALL)
    text = re.sub(r"^References:\n((?: {4}.+\n?)+)", _references, text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r"^(=+ +=+)\n(.+?)\n\1\n(.+?)\n\1$", _table, text, flags=re.DOTALL | re.MULTILINE)


def _references(match: re.Match[str]) -> str:
    return f"**References:** {' '.join(match[1].split())}\n"


def _table(match: re.Match[str]) -> str:
    """A table of two columns."""
    width = match[1].index(" ")
    head, *rows = [(line[:width].strip(), line[width:].strip()) for line in (match[2] + "\n" + match[3]).split("\n")]
    return "\n".join(f"| {a} | {b} |" for a, b in [head, ("---", "---"), *rows])
