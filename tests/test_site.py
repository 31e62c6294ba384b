"""The pages of the site that are generated: each public name has one, and each transform a picture."""

import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import gradchain
from docs.generate import pages, pictures
from docs.generate.catalogue import CAPTIONS, CATALOGUE, FAMILIES
from docs.generate.check import check
from docs.generate.names import ROOT, prose, public_names
from gradchain import testing

NAMES = [*gradchain.__all__, *testing.__all__, "integrations.lightning"]
PAGES = pages.pages()


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_pages(name: str) -> None:
    page = PAGES[pages.path(name)]
    assert page.startswith(f"# `{name}`")
    assert f"::: {public_names()[name].source}.{name}\n" in page
    assert public_names()[name].doc


def test_navigation_lists_all_pages() -> None:
    assert {path for path in PAGES if f"'{path}'" not in str(pages.navigation())} == {"changelog.md"}


def test_transforms_have_rows() -> None:
    missing = pages.transforms().keys() - CATALOGUE.keys()
    assert not missing, f"docs/generate/catalogue.py has no row for {sorted(missing)}"
    assert CATALOGUE.keys() <= {*gradchain.__all__}
    for row in CATALOGUE.values():
        assert row.family in FAMILIES
        assert row.kind in CAPTIONS


def names_in(library: str, pattern: str) -> list[str]:
    """What the pages call transforms in another library."""
    return re.findall(pattern, " ".join(row.elsewhere.get(library, "") for row in CATALOGUE.values()))


def test_names_of_torch_exist() -> None:
    names = names_in("torch", r"`torch\.([^`]+)`")
    assert names
    for name in names:
        attrgetter(name)(torch)


def test_names_of_rai_toolbox_exist() -> None:
    modules = [pytest.importorskip(f"rai_toolbox.{name}") for name in ("optim", "perturbations")]
    names = names_in("rai-toolbox", r"`([A-Z]\w+)`")
    assert names
    for name in names:
        assert any(hasattr(module, name) for module in modules), name


def test_kinds_of_pictures_have_captions() -> None:
    assert CAPTIONS.keys() == pictures.KINDS.keys()


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_pictures_are_equal_from_build_to_build(kind: str) -> None:
    name, row = next((name, row) for name, row in CATALOGUE.items() if row.kind == kind)
    svg = pictures.draw(name, kind, row.shown)
    assert svg == pictures.draw(name, kind, row.shown)
    assert "var(--after)" in svg or kind == "matrix"
    assert "#0" not in svg.replace("#000000", "").replace("url(#", "")


def test_pages_that_are_written_by_hand_are_not_overwritten() -> None:
    assert not [path for path in PAGES if (ROOT / "docs" / path).exists()]


def test_prose_has_no_tags() -> None:
    assert prose("<a, x> < b in ``<a>``") == "&lt;a, x> < b in ``<a>``"


def test_links_and_sources_are_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top"><a href="#top"></a><a href="b.html#c"></a><a href="https://d"></a>')
    (tmp_path / "b.html").write_text('<img src="e.png"><script src="https://f"></script><a href="a.html"></a>')
    (tmp_path / "g.css").write_text("@import url(https://h)")
    check(tmp_path)
    assert caplog.messages == [
        "a.html links to b.html#c, which has no such anchor",
        "b.html loads https://f from elsewhere",
        "b.html links to e.png, which is not there",
        "g.css loads https://h from elsewhere",
    ]
