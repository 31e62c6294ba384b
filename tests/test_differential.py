"""Random chains in all adapters, against plain loops over sub-tensors; ``make fuzz`` checks more of them."""

import re

import pytest
import torch

from gradchain import Group
from tests.differential import Mismatch, check, make_case
from tests.differential.case import DTYPES, EVENTS, LIBRARY
from tests.differential.draw import TEMPLATES
from tests.differential.shrink import report

CHUNK, COUNT = 25, 200


@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
def test_adapters_equal_plain_loops(first: int) -> None:
    fragile = []
    for seed in range(first, first + CHUNK):
        case = make_case(seed)
        try:
            if not check(case):
                fragile.append(seed)
        except Exception as error:
            raise AssertionError(report(case, error)) from error
    assert len(fragile) <= 2  # a case that rounding decides says nothing


def test_cases_have_all_transforms_and_all_that_can_happen() -> None:
    cases = [make_case(seed) for seed in range(COUNT)]
    code = " ".join(chain for case in cases for chain in (case.pre, case.update, case.post))
    names = {template.code.split("(")[0] for template in TEMPLATES}
    names |= {"masked", "partition", "broadcast", "with_error_feedback", "may_fail", "is_matrix", "is_even", "is_x"}
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()
    steps = [step for case in cases for step in case.steps]
    assert {step.event for step in steps} == {"", *EVENTS, *DTYPES}
    assert all(any(getattr(step, key) for step in steps) for key in ("changes", "closure", "nan", "fails", "wrong"))
    assert sum(case.is_local() for case in cases) > COUNT / 4
    assert {param.dtype for case in cases for param in case.params().values()} == {
        *("float64", "float32", "bfloat16", "float16")
    }


def test_a_difference_is_shown_by_the_smallest_case_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_a_row(tensor: torch.Tensor, group: Group) -> torch.Tensor:
        return torch.cat([0.5 * tensor[:-1], tensor[-1:]]) if tensor.ndim == 2 else 0.5 * tensor

    monkeypatch.setitem(LIBRARY, "soft_sign", forgets_a_row)
    case = next(case for case in map(make_case, range(COUNT)) if "soft_sign" in case.pre and not case.steps[0].event)
    with pytest.raises(Mismatch) as caught:
        check(case)
    shown = report(case, caught.value)
    assert f"seed {case.seed}: Mismatch: optimizer, step" in shown
    line = next(line for line in shown.splitlines() if line.strip().startswith("check("))
    assert "pre='chain(soft_sign)', update='chain()', post='chain()'" in line
    namespace: dict[str, object] = {}
    with pytest.raises(Mismatch):
        exec("\n".join(line.strip() for line in shown[shown.index("    from torch") :].splitlines()), namespace)
