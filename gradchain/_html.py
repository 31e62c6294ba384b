"""HTML for notebooks. Text is escaped wherever it goes in.

Cells have distances and lines of their own, since only Jupyter has a style sheet for tables. The one colour is the grey
of lines, which can be seen on light and on dark pages.
"""

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


def cell(*children: str, tag: str = "td", align: str = "left", indent: bool = False, **attributes: str) -> Html:
    """A cell of a table."""
    left = "2em" if indent else "0.7em"
    style = f"text-align: {align}; vertical-align: top; padding: 0.2em 0.7em 0.2em {left}; {_LINE}"
    return element(tag, *children, style=style, **attributes)


def table(*rows: Html) -> Html:
    """A table of rows, or of a head and a body."""
    return element("table", *rows, style="border-collapse: collapse; border: 0")


def show_chain(stages: Iterable[str]) -> Html:
    """A chain, given how its stages print: a list that numbers them as errors and states do."""
    return element("div", element("code", "chain"), _stages((stage, "") for stage in stages))


def show_optimizer(name: str, slots: Mapping[str, Iterable[tuple[str, str]]], inner_opt: object) -> Html:
    """An optimizer with the stages of its slots and what each acts on, and the inner one, folded."""
    settings = element("pre", repr(inner_opt), style="margin: 0; background: none")
    inner = element("details", element("summary", type(inner_opt).__name__), settings)
    cells = {**{slot: _stages(stages) for slot, stages in slots.items()}, "inner_opt": inner}
    rows = (element("tr", cell(key, tag="th"), cell(content)) for key, content in cells.items())
    return table(element("caption", element("code", name), style="text-align: left"), *rows)


_LINE = "border: 0; border-bottom: 1px solid rgba(128, 128, 128, 0.35)"


def _stages(stages: Iterable[tuple[str, str]]) -> Html:
    items = (
        element("li", element("code", stage), *([" ", element("small", acts_on)] if acts_on else []))
        for stage, acts_on in stages
    )
    return element("ol", *items, start="0", style="margin: 0; padding-left: 1.5em")
