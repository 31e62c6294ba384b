"""What is published: links of the README, and files that name things of the project."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\((.*?)\)|(?:src|href)=\"(.*?)\"")


def links(text: str) -> list[str]:
    """The targets of links and images, outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [a or b for a, b in LINK.findall(prose)]


def test_links_of_the_readme_are_absolute_where_it_is_published() -> None:
    published = README
    for substitution in SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        published = re.sub(substitution["pattern"], substitution["replacement"], published)
    assert links(published)
    assert [link for link in links(published) if not link.startswith(("https://", "#"))] == []
    code = re.compile(r"```.*?```", re.DOTALL)
    assert code.findall(published) == code.findall(README)


def test_links_of_the_readme_lead_to_files() -> None:
    targets = [link.partition("#")[0] for link in links(README) if "://" not in link]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_ci_makes_what_there_is() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    rows = workflow["jobs"]["make"]["strategy"]["matrix"]["include"]
    assert {row["make"] for row in rows} <= {*targets.split()}
    assert all(f"\n{target}:" in makefile for target in targets.split())
    tested = {row.get("with", "").removeprefix("TORCH=") for row in rows if row["make"] == "test-torch"}
    (floor,) = re.findall(r"torch>=([\d.]+)", str(SETTINGS["project"]["dependencies"]))
    assert any(f"{version}.".startswith(f"{floor}.") for version in tested)
    pythons = {row["python"] for row in rows}
    assert f">={min(pythons, key=lambda v: int(v[2:]))}" == SETTINGS["project"]["requires-python"]


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["license"] == SETTINGS["project"]["license"]
    assert citation["repository-code"] == SETTINGS["project"]["urls"]["Repository"]
    assert "version" not in citation  # it is said in one place


@pytest.mark.parametrize("extra", SETTINGS["project"]["optional-dependencies"])
def test_extras_are_pinned(extra: str) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for requirement in SETTINGS["project"]["optional-dependencies"][extra]:
        name = re.split(r"[\[<>=]", requirement)[0]
        assert name == "gradchain" or f"\n{name}==" in pins, f"constraints.txt does not pin {name}"
