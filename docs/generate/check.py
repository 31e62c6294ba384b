"""The check of the built site: every link and every source is a file of the site, and nothing is fetched elsewhere."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

log = logging.getLogger("mkdocs.hooks.check")

LOADS = {**dict.fromkeys(("img", "script", "iframe", "source", "audio", "video"), "src"), "link": "href"}
"""Elements that fetch what an attribute names, whether or not somebody clicks."""


class Reader(HTMLParser):
    """Notes the anchors of a page, what it links to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = {"__top"}
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element has."""
        given = {key: value for key, value in attrs if value is not None}
        self.anchors.update(given[key] for key in ("id", "name") if key in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if given.get(LOADS.get(tag, ""), "") and given.get("rel") != "canonical":
            self.loads.append(given[LOADS[tag]])


def check(site: Path) -> None:
    """Warn of each broken link, and of all that a page would load from elsewhere."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
    for path, reader in pages.items():
        for link in reader.loads:
            if urlsplit(link).scheme not in ("", "data") or link.startswith("//"):
                log.warning(f"{path.relative_to(site.resolve())} loads {link} from elsewhere")
        for link in [*reader.links, *reader.loads]:
            target, anchor = urldefrag(link)
            if urlsplit(link).scheme or path.name == "404.html":
                continue
            file = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                log.warning(f"{path.relative_to(site.resolve())} links to {link}, which is not there")
            elif anchor and file in pages and unquote(anchor) not in pages[file].anchors:
                log.warning(f"{path.relative_to(site.resolve())} links to {link}, which has no such anchor")
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        for link in re.findall(r"""(?:url\(|@import )["']?((?:https?:)?//[^"')]+)""", text):
            log.warning(f"{style.relative_to(site)} loads {link} from elsewhere")
