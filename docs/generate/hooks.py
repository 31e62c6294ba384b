"""What MkDocs calls while it builds the site: generated pages, navigation, formulas, pictures, links, and the check."""

from __future__ import annotations

import re
import sys
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

from docs.generate import pages, pictures, programs
from docs.generate.catalogue import CAPTIONS
from docs.generate.check import check
from docs.generate.names import ROOT, public_names


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation, of the files that there are and of those that are generated."""
    guide = [f"guide/{name}.md" for name in ("transforms", "catalogue", "optimizers", "speed")]
    config.nav = [
        {"Home": "index.md"},
        {"Guide": [*guide, "how-it-works.md"]},
        {"How do I ...?": _folder("how-to", "How do I ")},
        *pages.navigation(),
        {"Coming from": _folder("coming-from", "Coming from ")},
        {"About": ["environments.md", "benchmarks.md", "scoreboard.md", "limits.md", "changelog.md"]},
    ]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, content in pages.pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the code that is generated for a chain where a page asks for it."""
    return re.sub(r"<!-- program (\w+) -->", lambda match: programs.show(match[1]), markdown)


def on_page_content(html: str, *, page: Page, **_: Any) -> str:
    """Render formulas, and link names of the interface, in code, to their pages."""
    html = re.sub(r'<(div|span) class="arithmatex">\\[\[(](.+?)\\[\])]</\1>', _formula, html, flags=re.DOTALL)
    names = "|".join(map(re.escape, public_names()))
    code = rf"<code>(?:gradchain\.)?(?:testing\.)?(?P<name>{names})(?:\([^<]*\))?</code>"
    skipped = r"<(?P<tag>a|pre|h\d|svg|math)\b.*?</(?P=tag)>"
    if page.file.src_uri.startswith("coming-from"):
        skipped += r"|<tr>\s*<td>.*?</td>"  # names of others, which can be ours too

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        target = name and f"{pages.path(name).removesuffix('.md')}.html"
        if not name or target == page.file.dest_uri:
            return match[0]
        return f'<a class="code" href="{get_relative_url(target, page.url)}">{match[0]}</a>'

    return re.sub(f"{skipped}|{code}", link, html, flags=re.DOTALL)


def on_post_page(output: str, **_: Any) -> str:
    """Put the pictures in, where the index of the search does not see them."""
    return re.sub(r"<!-- (picture|figure) (\w+) -->", lambda match: _picture(match[2], match[1] == "figure"), output)


def on_post_build(config: MkDocsConfig) -> None:
    """Check what was built."""
    check(Path(config.site_dir))


def _folder(folder: str, prefix: str) -> list[Any]:
    """The pages of a folder in the order of its list, with their titles without what all of them begin with."""
    contents = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / folder).glob("*.md")}
    listed = re.findall(r"\((\S+\.md)\)", contents.pop("index.md"))
    found: list[Any] = [f"{folder}/index.md"]
    for name in sorted(contents, key=lambda name: (listed.index(name) if name in listed else len(listed), name)):
        title = re.findall("^# (.+)$", contents[name], flags=re.MULTILINE)[0].removeprefix(prefix).removesuffix("?")
        found.append({(title[0].upper() + title[1:]).replace("`", ""): f"{folder}/{name}"})
    return found


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    latex = re.sub(r"\\operatorname\{(\w+)\}", r"\\mathrm{\1}", unescape(match[2]).strip())
    return f'<{match[1]} class="formula" data-search-exclude>{convert(latex, display=display)}</{match[1]}>'


def _picture(name: str, has_caption: bool) -> str:
    row = pages.transforms()[name]
    caption = CAPTIONS[row.kind]
    below = f"<figcaption>{caption}</figcaption>" if has_caption else ""
    label = escape(f"What {', '.join(row.shown)} does. {caption}")
    return f'<figure class="picture" role="img" aria-label="{label}">{_svg(name)}{below}</figure>'


@cache
def _svg(name: str) -> str:
    row = pages.transforms()[name]
    return pictures.draw(name, row.kind, row.shown)
