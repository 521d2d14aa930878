from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_capacity.search.objective import Objective
from lora_capacity.search.play import Plays, _fewer_slots, _Frontier
from lora_capacity.search.problem import Problem
from lora_capacity.workload import AdapterMix, Workload
from tests.examples import LENGTHS, make_calibration

WORKLOAD = Workload(AdapterMix([0.1], [16]), LENGTHS, LENGTHS)
STEADY = {
    "max_cpu_loras": np.array([100, 200, 200]),
    "max_loras": np.array([50, 50, 100]),
    "max_num_batched_tokens": np.array([2048, 2048, 2048]),
    "max_num_seqs": np.array([256, 256, 256]),
    "extrapolation_error": np.array([0.0, 0.05, 0.1]),
}


def of(within: float = 0.05) -> Problem:
    objective = Objective("fewest-slots", within=within)
    return Problem(WORKLOAD, make_calibration(), objective, {}, {}, range(1, 401), None, 0.1, 0.05)


@pytest.mark.parametrize("within", [0.05, 0.1])
def test_fewest_slots_lie_between_those_that_were_proposed(within: float) -> None:
    """Servers hold 1.3 adapters a slot, at most 200: within 5 % are 190, on 147 slots."""
    asked: list[Any] = []

    def hold(points: list[Any]) -> list[bool]:
        asked.extend(points)
        return [adapters <= min(1.3 * slots, 200) for adapters, slots, *_ in points]

    screened = [(200, 164, 2048, 256), (162, 125, 2048, 256)]
    plays: Any = SimpleNamespace(hold=hold)
    ((adapters, slots, *limits),) = _fewer_slots(of(within), screened, plays)
    fewest = np.ceil((1.0 - within) * 200 / 1.3)
    assert adapters == pytest.approx((1.0 - within) * 200, abs=1)
    assert fewest <= slots <= 1.05 * fewest
    assert limits == [2048, 256]
    assert len(asked) < 6


def test_fewest_slots_stay_where_no_fewer_hold() -> None:
    plays: Any = SimpleNamespace(hold=lambda points: [False] * len(points))
    assert _fewer_slots(of(), [(200, 164, 2048, 256)], plays) == []


def test_a_server_whose_adapters_all_have_slots_gives_up_both() -> None:
    """41 adapters hold, on as many slots; 42 do not, however many slots."""
    frontier = _Frontier(of(), (42, 42, 2048, 256))
    tried = []
    while (point := frontier.next()) is not None:
        tried.append(point)
        frontier.narrow(point, point[0] <= 41)
    assert tried[0] == (42, 42, 2048, 256)
    assert all(slots == min(adapters, 42) for adapters, slots, *_ in tried)
    assert frontier.held == (41, 41, 2048, 256)


def test_a_play_takes_the_error_of_the_nearest_configuration() -> None:
    """Of its batch limits; a margin of 5 % risk is 1.645 standard deviations of what errors there are."""
    plays = Plays(of(), STEADY, 0, 2, None)
    for point, error in (((105, 55), 0.0), ((190, 52), 0.05), ((180, 90), 0.1)):
        expected = np.exp(1.6449 * np.hypot(plays.problem.calibration.capacity_error, error))
        assert plays._margin((*point, 2048, 256)) == pytest.approx(expected, rel=1e-4)
