"""The pages that are generated: one for each public name, and the lists of them. Paths are relative to ``docs/``."""

from __future__ import annotations

import ast
import re
from html import escape
from typing import Any

import gradchain
from docs.generate.catalogue import ANY, CAPTIONS, CATALOGUE, FAMILIES, Row
from docs.generate.names import ROOT, Name, prose, public_names
from gradchain.testing import check_transform

ACTS_ON = {
    "unit": "each unit: the sub-tensor that `param_ndim` chooses",
    "tensor": "the whole tensor, whatever `param_ndim` is",
    "element": "each element",
    "all": "all tensors of the optimizer together",
    "theirs": "what the transforms in it act on",
}
OTHERS = "Others"
OPTAX = "coming-from/optax.md"
"""The table of the names of optax."""


def transforms() -> dict[str, Row]:
    """The row of each transform; one that the catalogue lacks gets a row without a picture."""
    made = {name for name in gradchain.__all__ if hasattr(getattr(gradchain, name), "definition")}
    names = sorted(name for name in public_names() if name in made or name in CATALOGUE)
    return {name: CATALOGUE.get(name, Row(OTHERS, ANY, "", ())) for name in names}


def path(name: str) -> str:
    """The page of a public name."""
    return f"{'transforms' if name in transforms() else 'reference'}/{name}.md"


def pages() -> dict[str, str]:
    """All generated pages, by path."""
    made = {path(name.name): page(name) for name in public_names().values()}
    lists = {"transforms/index.md": chooser(), "transforms/gallery.md": gallery(), "reference/index.md": reference()}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return {**made, **lists, "changelog.md": changelog}


def navigation() -> list[dict[str, list[str]]]:
    """The pages of transforms by family, and those of the other names."""
    rows = transforms()
    families = {family: [path(name) for name, row in rows.items() if row.family == family] for family in FAMILIES}
    families[OTHERS] = [path(name) for name, row in rows.items() if row.family == OTHERS]
    others = sorted((name for name in public_names() if name not in rows), key=str.lower)
    overview: list[Any] = ["transforms/index.md", "transforms/gallery.md"]
    return [
        {"Transforms": [*overview, *({family: paths} for family, paths in families.items() if paths)]},
        {"Reference": ["reference/index.md", *map(path, others)]},
    ]


def page(name: Name) -> str:
    """The page of a public name: facts, picture, docstring, laws."""
    rows = transforms()
    facts = {} if name.name not in rows else facts_of(name.name, rows[name.name])
    facts |= elsewhere(name.name)
    table = "\n".join(["| | |", "|---|---|", *(f"| **{key}** | {value} |" for key, value in facts.items())])
    parts = [
        f"# `{name.name}` {{: .name }}",
        table if facts else "",
        f"<!-- figure {name.name} -->" if name.name in rows and rows[name.name].kind else "",
        f"::: {name.source}.{name.name}",
        laws(name.name) if name.name in rows else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def facts_of(name: str, row: Row) -> dict[str, str]:
    """What a table says of a transform."""
    slots = " or ".join(f"`{slot}`" for slot in row.slots)
    usual = f"; most often `{row.slots[0]}`" if row.slots == ("pre", "update") else ""
    return {
        "Slot": "any: `pre`, `update` or `post`" if row.slots == ANY else slots + usual,
        "Acts on": ACTS_ON[unit(name)],
        "Remembers": "a state, from step to step" if has_state(name) else "nothing",
        **{f"In {library}": names for library, names in row.elsewhere.items()},
    }


def unit(name: str) -> str:
    """A key of ``ACTS_ON``."""
    definition = getattr(getattr(gradchain, name), "definition", None)
    if definition is None:
        return transforms()[name].acts_on
    return "all" if definition.measure is not None else str(definition.acts_on)


def has_state(name: str) -> bool:
    """Whether a transform remembers something from step to step."""
    definition = getattr(getattr(gradchain, name), "definition", None)
    return definition.init is not None if definition else transforms()[name].has_state


def elsewhere(name: str) -> dict[str, str]:
    """The names of optax for it."""
    found = []
    for line in (ROOT / "docs" / OPTAX).read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            theirs, ours = (cell.strip() for cell in line.split("|")[1:3])
            for code in re.findall("`([^`]+)`", ours):
                tree = ast.parse(code, mode="eval").body
                calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
                if name in {ast.unparse(each) for each in calls or [tree]}:
                    found.append(theirs if isinstance(tree, ast.Name) else f"{theirs}, which is `{code}`")
    return {f"In [optax](../{OPTAX})": "; ".join(found)} if found else {}


def laws(name: str) -> str:
    """The laws that a transform is tested for."""
    from tests.cases import CASES

    cases = [case for case in CASES if re.match(rf"{name}\(", repr(case.transform))]
    if not cases:
        return ""
    skipped = set.intersection(*(set(case.skip) for case in cases))
    sometimes = set.union(*(set(case.skip) for case in cases)) - skipped
    lines = [
        "## Laws",
        "[`check_transform`](../reference/check_transform.md) tests these laws of it, for every change of the code:",
    ]
    for law, says in law_table().items():
        if law not in skipped:
            exception = " (not with every argument)" if law in sometimes else ""
            lines.append(f"- `{law}`: {says}{exception}")
    if any(case.contains for case in cases):
        says = "the result is in the set, a second application changes nothing, and no point of the set is nearer."
        lines.append(f"- [`check_projection`](../reference/check_projection.md): {says}")
    if skipped:
        lines.append(f"\nIt is exempt from {', '.join(f'`{law}`' for law in sorted(skipped))}.")
    return f"{lines[0]}\n\n{lines[1]}\n\n" + "\n".join(lines[2:])


def law_table() -> dict[str, str]:
    """The laws and what they say, from the docstring that defines them."""
    return dict(re.findall(r"^\s*``(\w+)``\s{2,}(.+)$", check_transform.__doc__ or "", flags=re.MULTILINE))


def chooser() -> str:
    """A table of all transforms, which a script filters."""
    units = dict(zip(ACTS_ON, ("a unit", "a tensor", "an element", "all tensors", "its parts"), strict=True))
    lines = []
    for name, row in transforms().items():
        slots, state = " ".join(row.slots), "yes" if has_state(name) else "no"
        cells = [
            f'<a href="{name}.html"><code>{name}</code></a>',
            escape(public_names()[name].summary).replace("``", ""),
            ", ".join(row.slots),
            units[unit(name)],
            state,
        ]
        given = f'data-slot="{slots}" data-unit="{unit(name)}" data-state="{state}"'
        lines.append(f"<tr {given}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    options = {
        "slot": ("Slot", {"pre": "pre: a gradient", "update": "update: a step", "post": "post: a parameter"}),
        "unit": ("Acts on", units),
        "state": ("State", {"no": "without", "yes": "with"}),
    }
    selects = "".join(
        f'<label>{label} <select name="{key}"><option value="">any</option>'
        + "".join(f'<option value="{value}">{text}</option>' for value, text in choices.items())
        + "</select></label>"
        for key, (label, choices) in options.items()
    )
    head = "".join(f"<th>{title}</th>" for title in ("transform", "what it does", "slot", "acts on", "state"))
    return f"""---
hide: [toc]
search: {{exclude: true}}
---

# Choose a transform

{len(lines)} transforms, each with a page that has its formula, a picture and an example. The
[gallery](gallery.md) shows all pictures. A *unit* is the sub-tensor that `param_ndim` chooses: a row, a matrix, or the
whole tensor.

<form id="chooser" data-search-exclude>{selects}<output></output></form>

<table id="choices"><thead><tr>{head}</tr></thead><tbody>
{chr(10).join(lines)}
</tbody></table>
"""


def gallery() -> str:
    """The pictures of all transforms."""
    parts = [
        "---\nsearch: {exclude: true}\n---",
        "# Gallery",
        "What each transform does, drawn by the transform itself while these pages were built:",
        "\n".join(f"- {caption}" for caption in CAPTIONS.values()),
    ]
    rows = transforms()
    for family in FAMILIES:
        parts.append(f"## {family}")
        for name in (name for name, row in rows.items() if row.family == family and row.kind):
            parts += [
                f"### [`{name}`]({name}.md)",
                f"{prose(public_names()[name].summary)}.",
                f"<!-- picture {name} -->",
            ]
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """The public names that are no transforms."""
    lines = ["# Reference", "What is public beside the [transforms](../transforms/index.md)."]
    lines.append("| name | what it is |\n|---|---|")
    for name in sorted(public_names().values(), key=lambda name: name.name.lower()):
        if name.name not in transforms():
            module = "" if name.module == "gradchain" else f", of `{name.module}`"
            lines[-1] += f"\n| [`{name.name}`]({name.name}.md){module} | {prose(name.summary)} |"
    return "\n\n".join(lines) + "\n"
