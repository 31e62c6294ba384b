"""What every transform of the catalogue must be: lawful, documented, exported and listed."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

import gradchain
from gradchain import transforms
from gradchain.bound import BoundTransform
from gradchain.contract import Group
from gradchain.testing import check_projection, check_transform
from tests.cases import CASES, Case, each

ROOT = Path(__file__).parents[1]


def find_factories() -> dict[str, Any]:
    """All that ``@transform`` has made in the modules of the catalogue, exported or not."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(transforms.__path__, f"{transforms.__name__}.")
    ]
    return {name: f for module in modules for name, f in vars(module).items() if hasattr(f, "definition")}


FACTORIES = find_factories()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def context(dtype: torch.dtype = torch.float32) -> Group:
    return {"param": torch.randn(4, 3, dtype=dtype), "grad": torch.randn(4, 3, dtype=dtype)}


@each(CASES)
def test_laws(case: Case) -> None:
    check_transform(case.transform, shapes=case.shapes, skip=case.skip)


@pytest.mark.parametrize(
    ("case", "law"),
    [pytest.param(case, law, id=f"{case.transform!r}-{law}") for case in CASES for law in sorted(case.skip)],
)
def test_no_law_is_skipped_in_vain(case: Case, law: str) -> None:
    with pytest.raises(AssertionError, match=f'breaks the law "{law}"'):
        check_transform(case.transform, shapes=[(4, 3)], skip=case.skip - {law})


@each([case for case in CASES if case.contains])
def test_projections(case: Case) -> None:
    assert case.contains is not None
    check_projection(case.transform, case.contains, shapes=case.shapes)


@each([case for case in CASES if case.contains])
def test_projections_leave_points_of_the_set_alone(case: Case) -> None:
    assert case.contains is not None
    inside = [x for x in torch.randn(1000, 3, dtype=torch.float64) if case.contains(x)]
    for x in [*inside, case(torch.randn(3, dtype=torch.float64), {})]:
        assert_close(case(x, {}), x)


@pytest.mark.parametrize("factor", [0.1, 3.0])
@each([case for case in CASES if "deterministic" not in case.skip])
def test_derivatives(case: Case, factor: float) -> None:
    tensor = factor * torch.randn(2, 3, dtype=torch.float64)
    param, grad = torch.randn(2, 2, 3, dtype=torch.float64).unbind()
    inputs = tensor.requires_grad_(), param.requires_grad_()
    assert gradcheck(lambda t, p: case(t, {"param": p, "grad": grad}), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each([case for case in CASES if "half_precision" not in case.skip])
def test_half_precision_is_rounded_once(case: Case, dtype: torch.dtype) -> None:
    tensor = torch.linspace(-3, 5, 7110).reshape(-1, 3).to(dtype)
    group = {"param": tensor.roll(1, 0), "grad": tensor.roll(2, 0)}
    expected = case(tensor.float(), {key: value.float() for key, value in group.items()}).to(dtype)
    assert torch.equal(case(tensor, group), expected)


@each([case for case in CASES if "deterministic" not in case.skip and case.transform.hyperparameters])
def test_hyperparameters_can_be_tensors(case: Case) -> None:
    tensor, group = torch.randn(4, 3), context()
    own = {key: torch.as_tensor(value) for key, value in case.transform.hyperparameters.items() if value is not None}
    assert_close(case(tensor, {**group, **own}), case(tensor, group))


@each(CASES)
def test_prints_as_the_call_that_makes_it(case: Case) -> None:
    assert eval(repr(case.transform), vars(gradchain)) == case.transform


def test_rows_differ() -> None:
    rows = [case.transform for case in CASES]
    assert all(a != b for i, a in enumerate(rows) for b in rows[:i])


def test_exports_are_distinct_and_exist() -> None:
    assert len(gradchain.__all__) == len(set(gradchain.__all__))
    assert all(hasattr(gradchain, name) for name in gradchain.__all__)


# found: 33
def test_the_version_is_that_of_the_distribution() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", gradchain.__version__)
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version", ' in settings  # so that it is said in one place
    assert '[tool.hatch.version]\npath = "gradchain/__init__.py"' in settings


def test_catalogue_is_exported() -> None:
    assert FACTORIES
    assert {name: getattr(gradchain, name, None) for name in FACTORIES} == FACTORIES
    exported = {name for name in gradchain.__all__ if hasattr(getattr(gradchain, name), "definition")}
    assert exported == FACTORIES.keys()


def test_catalogue_has_rows() -> None:
    names = {case.transform.definition.name for case in CASES if isinstance(case.transform, BoundTransform)}
    assert names == FACTORIES.keys()


@pytest.mark.parametrize("name", FACTORIES)
def test_catalogue_is_in_the_guide(name: str) -> None:
    assert f"{name}(" in (ROOT / "docs" / "guide" / "catalogue.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FACTORIES)
def test_docstrings_are_complete(name: str) -> None:
    doc = inspect.getdoc(FACTORIES[name]) or ""
    sections = [".. math::", "Acts on", "Example:\n    >>> ", *(["References:\n"] if name != "add" else [])]
    sections += ["Args:\n"] if FACTORIES[name].definition.signature.parameters else []
    places = [doc.find(section) for section in sections]
    assert -1 not in places, f"{name} lacks {sections[places.index(-1)]!r}"
    for parameter in FACTORIES[name].definition.signature.parameters:
        assert f"\n    {parameter}: " in doc
