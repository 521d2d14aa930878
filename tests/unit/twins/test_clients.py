"""What clients see, against event loops and servers that are simulated in plain Python."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.costs import FrontEndCosts
from lora_capacity.scenarios import ClientView, Results
from lora_capacity.twins.clients import seen_by_clients
from tests.examples import make_scenarios

HOUR_S = 3600.0
READINGS = FrontEndCosts(adapter_set_s=10e-6, metrics_interval_s=2.0)


def engine(**told: float) -> Results:
    """Results of one server; what is not given is 0."""
    known: Any = {entry.name: jnp.full(1, told.get(entry.name, 0.0)) for entry in dataclasses.fields(Results)}
    return Results(**known | {"events": None, "client": None})


def seen(front_end: FrontEndCosts, adapters: float, rate_per_s: float, **told: float) -> ClientView:
    """What clients see for an hour of a server whose engine times are 0.1 s to the first token and 20 ms after it."""
    scenario = make_scenarios([adapters], [rate_per_s], horizon_s=HOUR_S)
    times = {"answered_ttft_s": 0.1, "tpot_s": 0.02, "itl_s": 0.02, "step_time_s": 0.02}
    completed = {"completed_per_s": adapters * rate_per_s}
    return seen_by_clients(front_end, scenario, engine(**times | completed | told))


def test_nothing_is_added_where_nothing_is_known() -> None:
    view = seen(FrontEndCosts(), 64, 0.05, mean_running=12.0, active_adapters=11.0)
    assert (view.ttft_s[0], view.tpot_s[0], view.itl_s[0]) == pytest.approx((0.1, 0.02, 0.02))


def test_first_token_waits_for_those_of_others_and_first_requests_for_a_tokenizer() -> None:
    front_end = FrontEndCosts(response_s=0.003, adapter_response_s=0.4, streamed_token_s=1e-4)
    view = seen(front_end, 40, 0.01, mean_running=50.0, active_adapters=20.0)
    # 40 first requests of 0.4 requests/s for an hour.
    assert view.ttft_s[0] == pytest.approx(0.1 + 0.003 + 0.4 * 40 / (0.4 * HOUR_S) + 50 * 1e-4)
    assert view.itl_s[0] == pytest.approx(0.02)


def test_nobody_waits_where_nobody_reads_metrics() -> None:
    unread = dataclasses.replace(READINGS, metrics_interval_s=0.0)
    assert seen(unread, 128, 0.05, mean_running=60.0, active_adapters=45.0).ttft_s[0] == pytest.approx(0.1)


@pytest.mark.parametrize(("adapters", "rate_per_s", "stay_s"), [(6, 0.15, 4.0), (12, 0.2, 3.0), (48, 0.1, 4.0)])
def test_an_hour_of_readings_takes_as_long_as_the_combinations_seen(
    adapters: int, rate_per_s: float, stay_s: float
) -> None:
    """A server whose requests run for an exponential time shows so many sets of waiting and running adapters."""
    told = {"mean_running": adapters * rate_per_s * stay_s, "active_adapters": float(adapters)}
    view = seen(READINGS, adapters, rate_per_s, **told)
    reading_s = READINGS.adapter_set_s * combinations(adapters, rate_per_s, stay_s)
    blocked, delays_s = np.minimum(reading_s / 2.0, 1.0), reading_s**2 / 2.0 / 2.0
    assert view.ttft_s[0] - 0.1 == pytest.approx(2.0 * (delays_s / (1.0 - blocked)).mean(), rel=0.25)


def combinations(adapters: int, rate_per_s: float, stay_s: float) -> np.ndarray:
    """Lines of the metrics at the end of each of many parts of an hour, by playing it."""
    rng = np.random.default_rng(5)
    arrivals = np.sort(rng.uniform(0.0, HOUR_S, rng.poisson(adapters * rate_per_s * HOUR_S)))
    owner, leaves = rng.integers(adapters, size=arrivals.size), arrivals + rng.exponential(stay_s, arrivals.size)
    lines: set[tuple[bytes, bytes]] = set()
    grown = []
    for end_s in np.arange(0.02, HOUR_S, 0.02):
        first, last = np.searchsorted(arrivals, [end_s - 0.02, end_s])
        waiting, running = np.zeros((2, adapters), bool)
        waiting[owner[first:last]] = True
        before = slice(max(first - 200, 0), first)
        running[owner[before][leaves[before] > end_s]] = True
        lines.add((waiting.tobytes(), running.tobytes()))
        grown.append(len(lines))
    return np.array(grown)


def test_tokens_that_a_reading_holds_up_leave_as_one() -> None:
    """A stream of a token every 20 ms through a loop that stands still every 2 s, longer and longer."""
    adapters, rate_per_s, stay_s = 64, 0.2, 1.5
    readings_s = READINGS.adapter_set_s * combinations(adapters, rate_per_s, stay_s)[::100]
    made_s = np.arange(0.005, HOUR_S - 4.0, 0.02)
    into_s, held_s = made_s % 2.0, readings_s[(made_s / 2.0).astype(int)]
    sent_s = np.where(into_s < held_s, made_s - into_s + held_s, made_s)
    gap_s = HOUR_S / np.unique(sent_s.round(6)).size
    told = {"mean_running": adapters * rate_per_s * stay_s, "active_adapters": float(adapters)}
    assert gap_s > 0.0205
    assert seen(READINGS, adapters, rate_per_s, **told).itl_s[0] == pytest.approx(gap_s, rel=0.02)
    # The loop turns to its streams after 128 outputs, so that those of larger batches leave one by one.
    crowded = seen(READINGS, adapters, rate_per_s, **told | {"mean_running": 400.0})
    assert crowded.itl_s[0] == pytest.approx(0.02, rel=1e-3)
