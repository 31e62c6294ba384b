"""``docs/scoreboard.md`` is what the laws give, for the optimizers of torch and those of others."""

from tests.frameworks.scoreboard import ALL, PAGE, outcomes, page


def test_page() -> None:
    found = page({name: outcomes(name) for name in ALL})
    assert found == PAGE.read_text(encoding="utf-8"), "if that is right, run make scoreboard"
