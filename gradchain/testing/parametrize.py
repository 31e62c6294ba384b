"""One test of pytest for each law: ``parametrize_with_laws``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from gradchain.contract import show
from gradchain.testing import optimizer_laws, transform_laws

if TYPE_CHECKING:  # pytest is needed by those who call it alone
    import pytest

_LAWS: dict[Callable[..., None], Iterable[str]] = {
    transform_laws.check_transform: transform_laws.LAWS,
    transform_laws.check_projection: transform_laws.PROJECTION_LAWS,
    optimizer_laws.check_optimizer: optimizer_laws.LAWS,
}


def parametrize_with_laws(
    subjects: Iterable[Any],
    check: Callable[..., None] = transform_laws.check_transform,
    *,
    expected_failed: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None = None,
    **options: Any,
) -> pytest.MarkDecorator:
    """Make a test of pytest for each law and each of ``subjects``: a decorator for a test that takes and calls ``law``.

    Each test has an id such as ``clip_by_norm(max_norm=1.0)-half_precision``, so ``pytest -k half_precision`` runs that
    law for all subjects. The interface is that of scikit-learn's ``parametrize_with_checks``.

    Args:
        subjects: What ``check`` takes: transforms, or types of optimizers and functions that make one.
        check: ``check_transform``, ``check_projection`` or ``check_optimizer``.
        expected_failed: Laws that a subject breaks, each with the reason, or a function of the subject that gives
            them. Their tests are expected to fail (``pytest.mark.xfail``), and one that passes is a failure.
        options: More arguments of ``check``, such as ``shapes`` and ``group``.

    Raises:
        ValueError: ``expected_failed`` names a law that there is not.

    Example:
        >>> import torch
        >>> from gradchain import clip_by_norm, scale
        >>> from gradchain.testing import check_optimizer
        >>> @parametrize_with_laws([clip_by_norm(1.0), scale(2.0)])
        ... def test_transforms(law):
        ...     law()
        >>> half = lambda tensor, group: tensor / 2
        >>> @parametrize_with_laws([half], expected_failed={"copies": "a lambda cannot be pickled"})
        ... def test_a_lambda(law):
        ...     law()
        >>> @parametrize_with_laws([torch.optim.AdamW, torch.optim.Adam], check_optimizer)
        ... def test_optimizers(law):
        ...     law()

    References:
        scikit-learn, ``sklearn.utils.estimator_checks.parametrize_with_checks``,
        https://scikit-learn.org/stable/modules/generated/sklearn.utils.estimator_checks.parametrize_with_checks.html
    """
    import pytest

    names = [*_LAWS[check]]
    params = []
    for subject in subjects:
        reasons = expected_failed(subject) if callable(expected_failed) else expected_failed or {}
        if unknown := set(reasons) - set(names):
            raise ValueError(f"expected_failed of {show(subject)} names the laws {names}, got {sorted(unknown)}")
        for name in names:
            law = partial(check, subject, skip=set(names) - {name}, **options)
            marks = [
                pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)
                for broken, reason in reasons.items()
                if broken == name
            ]
            params.append(pytest.param(law, id=f"{show(subject)}-{name}", marks=marks))
    return pytest.mark.parametrize("law", params)
