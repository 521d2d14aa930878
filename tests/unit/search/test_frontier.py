"""Brackets around the first point that fails."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_capacity.search.frontier import Bracket, spread


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 61)), min_size=1, max_size=6), st.integers(2, 9))
def test_brackets_close_around_the_first_that_fails_of_every_problem(problems, count):
    size, first = (np.array(column) for column in zip(*problems, strict=True))
    first = np.minimum(first, size)  # as many as there are points: none fails
    bracket = Bracket.between(np.full(size.shape, -1), size)
    while (tried := spread(bracket, count)).size:
        assert np.all(np.isnan(tried) | ((tried > bracket.low[:, None]) & (tried < bracket.high[:, None])))
        bracket = bracket.narrowed(tried, np.where(np.isnan(tried), np.nan, tried >= first[:, None]))
    assert bracket.high.tolist() == first.tolist()
    assert bracket.low.tolist() == (first - 1).tolist()


def test_ends_carry_by_how_much_they_fail():
    bracket = Bracket.between(np.array([1.0, 1.0]), np.array([9.0, 9.0]))
    assert np.isneginf(bracket.excess_low).all()
    found = bracket.narrowed(
        np.array([[2.0, 4.0, 6.0], [3.0, np.nan, np.nan]]), np.array([[-0.2, 0.1, 0.3], [-0.5, 0, 0]])
    )
    assert found.low.tolist() == [2.0, 3.0]
    assert found.high.tolist() == [4.0, 9.0]
    assert found.excess_low.tolist() == [-0.2, -0.5]
    assert found.excess_high.tolist() == [0.1, np.inf]


@pytest.mark.parametrize("count", [2, 6, 24])
def test_spread_holds_the_first_and_the_last_and_no_more_than_asked_for(count):
    (row,) = spread(Bracket.between(np.array([4]), np.array([400])), count)
    assert (row[0], row[-1]) == (5, 399)
    assert len(row) <= count
