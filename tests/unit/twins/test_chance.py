"""What waits beyond a limit by chance, against laws that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.twins.steady.chance import erlang_b, overflow

ROUGH = 0.02
"""Relative error of the cube-root law."""

ENDLESS = 1e-7
"""Curvature of a queue that had time without end."""

FINITE = 0.15
"""Relative error where sources are few: peaked traffic stands for their binomial law."""


def loss_by_recursion(places: int, load: float) -> float:
    lost = 1.0
    for taken in range(1, places + 1):
        lost = load * lost / (taken + load * lost)
    return lost


@pytest.mark.parametrize("places", [1, 2, 10, 50, 200])
@pytest.mark.parametrize("utilization", [0.3, 0.6, 0.8, 0.95, 1.0, 1.2])
def test_what_is_lost_is_erlang_s_formula(places: int, utilization: float) -> None:
    expected = loss_by_recursion(places, utilization * places)
    found = float(erlang_b(jnp.asarray(1.0 * places), jnp.asarray(utilization * places)))
    assert found == pytest.approx(expected, rel=ROUGH, abs=1e-6)


@pytest.mark.parametrize("places", [1, 5, 50, 200])
@pytest.mark.parametrize("utilization", [0.5, 0.8, 0.95])
def test_a_queue_of_many_servers_is_m_m_c(places: int, utilization: float) -> None:
    """Erlang's delay formula and the mean queue ``C · ρ / (1 − ρ)``."""
    lost = loss_by_recursion(places, utilization * places)
    delayed = lost / (1.0 - utilization * (1.0 - lost))
    one = jnp.ones(1)
    found = overflow(one * utilization * places, one, one * places, one * utilization, one * ENDLESS, one)
    assert float(found.full_share[0]) == pytest.approx(delayed, rel=ROUGH, abs=1e-6)
    assert float(found.beyond[0]) == pytest.approx(delayed * utilization / (1.0 - utilization), rel=ROUGH, abs=1e-6)


def test_one_server_is_pollaczek_s_and_khinchine_s() -> None:
    """The queue of M/G/1 is ``ρ² / (1 − ρ) · (1 + cv²) / 2``, near saturation, where it is long."""
    one, load = jnp.ones(1), 0.97
    for cv2 in (0.0, 1.0, 3.0):
        found = overflow(one * load, one, one, one * load, one * ENDLESS, one * (1.0 + cv2) / 2.0)
        expected = load**2 / (1.0 - load) * (1.0 + cv2) / 2.0
        assert float(found.beyond[0]) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("sources", "odds", "places"), [(60, 0.49, 24), (60, 0.49, 20), (20, 0.3, 6), (10, 0.2, 3)])
def test_few_sources_are_the_machine_repair_model(sources: int, odds: float, places: int) -> None:
    """Sources that wait or are served send nothing: a birth and death process with known chances."""
    chances = [1.0]
    for taken in range(sources):
        chances.append(chances[-1] * (sources - taken) * odds / min(taken + 1, places))
    law = np.array(chances) / np.sum(chances)
    one, share = jnp.ones(1), odds / (1.0 + odds)
    mean, peakedness = sources * share, 1.0 - share
    ratio = 1.0 + (mean - places) / (peakedness * places)
    curvature = share / (peakedness * places) * np.log(ratio) / (ratio - 1.0)
    found = overflow(one * mean, one * peakedness, one * places, one * ratio, one * curvature, one)
    assert float(found.full_share[0]) == pytest.approx(law[places:].sum(), rel=FINITE)
    beyond = (law * np.maximum(np.arange(sources + 1) - places, 0)).sum()
    assert float(found.beyond[0]) == pytest.approx(beyond, rel=2 * FINITE)


def test_at_the_limit_a_queue_grows_with_the_root_of_the_time() -> None:
    """Reflected Brownian motion without drift: a mean of ``√(2 · variance · time / π)``."""
    one, variance = jnp.ones(1), 1e6
    found = overflow(one * 5, one, one * 5, one, one / variance, one)
    assert float(found.beyond[0]) == pytest.approx(np.sqrt(2.0 * variance / np.pi), rel=0.02)


def test_beyond_the_limit_chance_adds_little_to_what_is_left_over() -> None:
    one = jnp.ones(1)
    found = overflow(one * 40, one, one * 20, one * 2, one * 0.001, one)
    assert float(found.full_share[0]) > 0.998
    assert float(found.beyond[0]) == pytest.approx(np.log(2.0) / 0.001, rel=0.01)
    assert float(found.by_chance[0]) < 1.0
