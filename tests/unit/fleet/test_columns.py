"""The covering problem, on servers whose capacity is known: against all placements that there are."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_capacity.fleet import Fleet
from lora_capacity.fleet.assign import Tags, assign
from lora_capacity.fleet.columns import Columns
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.master import Question, whole
from lora_capacity.fleet.oracle import Load, Oracle
from lora_capacity.fleet.pricing import generate
from tests.unit.fleet.test_fleet import FILE

LOAD_PER_S, ADAPTERS = 1.0, 4
"""What a server holds in these tests: so many requests per second, and so many adapters."""


class Known(Oracle):
    """Servers that hold a known load and a known number of adapters, if every adapter has a slot."""

    def reached(self, pool: int, load: Load, mode: Any, more: Any = 1.0) -> NDArray[np.float64]:
        fits = (load.total_per_s <= LOAD_PER_S + 1e-9) & (load.adapters <= ADAPTERS)
        return np.where(np.broadcast_to(mode, fits.shape) == 0, fits.astype(float), 0.0)


def setup(rates: list[float]) -> tuple[Fleet, Items, Columns, Question]:
    rows = [{"adapter": f"a{i}", "rank": 8, "rate_per_s": rate} for i, rate in enumerate(rates)]
    fleet = Fleet.from_mapping(FILE | {"adapters": rows, "pools": [{"calibration": FILE["pools"][0]["calibration"]}]})
    items = Items.of_fleet(fleet, np.ones(len(rates), np.int64))
    question = Question.covering_all(items.count, np.ones(1), np.array([np.inf]))
    return fleet, items, Columns(Known(fleet), items), question


def fewest(rates: list[float]) -> int:
    """Return the fewest servers, by looking at every placement."""

    def fits(placement: tuple[int, ...]) -> bool:
        groups = [[rate for rate, at in zip(rates, placement, strict=True) if at == s] for s in set(placement)]
        return all(sum(group) <= LOAD_PER_S + 1e-9 and len(group) <= ADAPTERS for group in groups)

    for servers in range(1, len(rates) + 1):
        if any(fits(placement) for placement in itertools.product(range(servers), repeat=len(rates))):
            return servers
    raise AssertionError


@pytest.mark.parametrize(
    "rates",
    [
        [0.6, 0.6, 0.4, 0.4, 0.3, 0.3, 0.3],
        [0.55, 0.35, 0.35, 0.3, 0.3, 0.15],  # any two of the first fit, never three
        [0.05] * 7 + [0.7],
        [0.9, 0.2, 0.2, 0.2, 0.2, 0.2],
    ],
)
def test_enumerated_servers_give_the_fewest_that_there_are(rates: list[float]) -> None:
    fleet, items, columns, question = setup(rates)
    bound = generate(columns, question, 10, lambda done, total: None)
    assert columns.exact
    assert bound == fewest(rates)
    use, left = whole(question, columns.found)
    assert not left.any()
    servers, waiting = assign(items, Tags(fleet, items), columns.found, use)
    assert waiting == []
    assert sorted(item for server in servers for item in server.items) == list(range(len(rates)))


def test_pricing_finds_a_cover_close_to_a_bound_that_holds() -> None:
    """No cover has fewer servers than the load and the adapters need, and a good one hardly more."""
    rates = np.repeat(np.geomspace(0.02, 0.6, 40), 10).tolist()
    *_, columns, question = setup(rates)
    bound = generate(columns, question, 20, lambda done, total: None)
    assert not columns.exact
    use, left = whole(question, columns.found)
    least = max(sum(rates) / LOAD_PER_S, len(rates) / ADAPTERS)
    assert 0.97 * least <= bound <= use.sum() <= 1.05 * bound + 1
    assert not left.any()
    counts = columns.found.counts
    load = columns.load(counts)
    assert np.all((load.total_per_s <= LOAD_PER_S + 1e-9) & (load.adapters <= ADAPTERS))


def test_servers_of_equal_counts_get_about_equal_loads() -> None:
    rates = np.geomspace(0.05, 0.2, 40).tolist()
    fleet, items, columns, question = setup(rates)
    generate(columns, question, 20, lambda done, total: None)
    use, _ = whole(question, columns.found)
    servers, waiting = assign(items, Tags(fleet, items), columns.found, use)
    load = [items.rate_per_s[server.items].sum() for server in servers]
    assert waiting == []
    assert max(load) <= 1.15 * LOAD_PER_S  # classes span a factor of two; dealt at random some would hold 1.4
