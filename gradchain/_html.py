"""HTML for notebooks. Text is escaped wherever it goes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape


class Html(str):
    """What is HTML already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Html:
    """An element; children that are no ``Html`` are text.

    Example:
        >>> element("p", "1 < 2, ", element("b", "always"), title='"<"')
        '<p title="&quot;&lt;&quot;">1 &lt; 2, <b>always</b></p>'
    """
    given = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    content = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{tag}{given}>{content}</{tag}>")


def show_chain(stages: Iterable[str]) -> Html:
    """A chain, given how its stages print: a list that numbers them as errors and states do."""
    return element("div", element("code", "chain"), _stages((stage, "") for stage in stages))


def show_optimizer(name: str, slots: Mapping[str, Iterable[tuple[str, str]]], inner_opt: object) -> Html:
    """An optimizer with the stages of its slots and what each acts on, and the inner one, folded."""
    inner = element("details", element("summary", type(inner_opt).__name__), element("pre", repr(inner_opt)))
    cells = {**{slot: _stages(stages) for slot, stages in slots.items()}, "inner_opt": inner}
    rows = (element("tr", element("th", key), element("td", cell, style=_LEFT)) for key, cell in cells.items())
    return element("table", element("caption", element("code", name)), *rows)


_LEFT = "text-align: left"


def _stages(stages: Iterable[tuple[str, str]]) -> Html:
    items = (
        element("li", element("code", stage), *([" ", element("small", acts_on)] if acts_on else []))
        for stage, acts_on in stages
    )
    return element("ol", *items, start="0", style="margin: 0")
