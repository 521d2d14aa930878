"""A few kills, the same ones every time; ``make kills`` tries all long commands with all signals."""

import pytest

from tests.fuzz.kills import run


@pytest.mark.slow
def test_commands_that_are_killed_lose_nothing() -> None:
    assert [trial for trial in run(4, 1, ("label", "fit")) if trial[-1]] == []
