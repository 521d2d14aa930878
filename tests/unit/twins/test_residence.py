import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import LengthDistribution
from tests.reference.infinite_server import mean_and_error, time_until_empty

LAWS = {
    "constant": LengthDistribution.from_histogram([200], [1]),
    "uniform": LengthDistribution.from_histogram(np.arange(1, 401), np.ones(400)),
    "exponential": LengthDistribution.from_moments(200, 200, 1, 2000),
    "chat": LengthDistribution.from_moments(197, 207, 4, 1024),
    "long tail": LengthDistribution.from_moments(197, 400, 4, 8000),
    "narrow": LengthDistribution.from_moments(200, 20, 1, 400),
    "two lengths": LengthDistribution.from_histogram([4, 1024], [1, 1]),
}
LOADS = np.array([0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0])
QUADRATURE = 0.01
"""Relative error allowed for eight quadrature nodes."""

ROUGH = 0.03
"""The same where the law is narrow or has steps and requests are waiting: a node lies on one side of a step."""

laws = pytest.mark.parametrize("lengths", LAWS.values(), ids=list(LAWS))


@laws
def test_a_busy_period_from_one_request_is_the_same_for_every_law(lengths: LengthDistribution) -> None:
    """From the long run: a queue is empty for a share e^-load of the time, and 1/rate at a time."""
    found = ResidenceTime.of_lengths(lengths).busy_period(jnp.asarray(LOADS))
    np.testing.assert_allclose(found, np.expm1(LOADS) / LOADS, rtol=QUADRATURE)


@laws
@pytest.mark.parametrize("backlog", [0.5, 3.0, 20.0])
def test_a_backlog_lengthens_the_busy_period_as_integrated_step_by_step(
    lengths: LengthDistribution, backlog: float
) -> None:
    found = ResidenceTime.of_lengths(lengths).busy_period(jnp.asarray(LOADS), jnp.full(LOADS.shape, backlog))
    stay = lengths.tokens / lengths.mean
    # Between two possible stays the share finished is constant and the remaining time falls along a line.
    expected = np.zeros(LOADS.size)
    begin, finished, remaining = 0.0, 0.0, 1.0
    for end, share in zip(stay, lengths.probability, strict=True):
        left = remaining - (1.0 - finished) * (end - begin)
        busy = 1.0 - finished * math.exp(-backlog * (1.0 - finished))
        expected += busy * (np.exp(LOADS * remaining) - np.exp(LOADS * left)) / (LOADS * (1.0 - finished))
        begin, finished, remaining = end, finished + share, left
    np.testing.assert_allclose(found, expected, rtol=ROUGH)


def test_with_a_short_tail_the_law_of_exponential_stays_is_that_of_m_m_infinity() -> None:
    """Birth and death: from ``n`` to ``n - 1`` requests it takes ``Σ_k load^k (n-1)! / (n+k)!`` stays."""
    law = ResidenceTime.of_lengths(LengthDistribution.from_moments(500.0, 500.0, 1, 6000))
    load, backlog = 1.5, 2.0
    down = [sum(load**k * math.factorial(n - 1) / math.factorial(n + k) for k in range(60)) for n in range(1, 40)]
    poisson = [math.exp(-backlog) * backlog**k / math.factorial(k) for k in range(39)]
    expected = sum(chance * sum(down[: k + 1]) for k, chance in enumerate(poisson))
    assert float(law.busy_period(jnp.asarray(load), jnp.asarray(backlog))) == pytest.approx(expected, rel=QUADRATURE)


@pytest.mark.parametrize(
    ("name", "load", "backlog", "seed"),
    [("chat", 1.0, 0.0, 1), ("chat", 2.0, 5.0, 2), ("chat", 0.3, 40.0, 3), ("uniform", 1.5, 3.0, 4)],
)
def test_a_busy_period_is_what_playing_it_gives(name: str, load: float, backlog: float, seed: int) -> None:
    """6000 periods; four standard errors (99.99 %) beside the error of the quadrature."""
    lengths = LAWS[name]
    rng = random.Random(seed)
    stays = (lengths.sample(np.random.default_rng(seed), 100_000) / lengths.mean).tolist()
    mean, error = mean_and_error([time_until_empty(rng, load, backlog, stays) for _ in range(6000)])
    found = float(ResidenceTime.of_lengths(lengths).busy_period(jnp.asarray(load), jnp.asarray(backlog)))
    assert abs(found - mean) < 4.0 * error + QUADRATURE * mean
    assert error < 0.02 * mean


@laws
def test_draining_is_a_busy_period_that_nobody_joins(lengths: LengthDistribution) -> None:
    law, backlog = ResidenceTime.of_lengths(lengths), jnp.asarray([0.0, 0.1, 1.0, 10.0, 100.0])
    np.testing.assert_allclose(law.drain(backlog), law.busy_period(jnp.zeros(5), backlog), rtol=1e-6)


def test_a_drain_lasts_as_long_as_the_longest_of_the_stays() -> None:
    """For exponential stays the mean longest of n is the n-th harmonic number."""
    law = ResidenceTime.of_lengths(LengthDistribution.from_moments(500.0, 500.0, 1, 6000))
    for backlog in (0.0, 1.0, 8.0):
        poisson = [math.exp(-backlog) * backlog**k / math.factorial(k) for k in range(60)]
        expected = sum(chance * sum(1 / n for n in range(1, k + 2)) for k, chance in enumerate(poisson))
        assert float(law.drain(jnp.asarray(backlog))) == pytest.approx(expected, rel=QUADRATURE)


@laws
def test_no_backlog_given_is_a_backlog_of_none_and_small_ones_change_little(lengths: LengthDistribution) -> None:
    law, loads = ResidenceTime.of_lengths(lengths), jnp.asarray(LOADS)
    np.testing.assert_allclose(law.busy_period(loads), law.busy_period(loads, jnp.zeros(LOADS.size)), rtol=1e-5)
    near = law.busy_period(loads * (1 + 1e-4), jnp.full(LOADS.size, 1e-4))
    np.testing.assert_allclose(near, law.busy_period(loads), rtol=1e-2)


@laws
def test_more_load_or_backlog_never_shortens_a_busy_period(lengths: LengthDistribution) -> None:
    law = ResidenceTime.of_lengths(lengths)
    load, backlog = jnp.meshgrid(jnp.linspace(0.0, 30.0, 31), jnp.linspace(0.0, 300.0, 31))
    period = np.asarray(law.busy_period(load, backlog))
    assert np.all(np.isfinite(period))
    assert np.all(np.diff(period, axis=0) >= -1e-5 * period[1:])
    assert np.all(np.diff(period, axis=1) >= -1e-5 * period[:, 1:])


def test_gradients_are_those_of_the_integral() -> None:
    with jax.enable_x64(True):
        law = ResidenceTime.of_lengths(LAWS["chat"])
        slope = jax.grad(lambda load: law.busy_period(load, jnp.asarray(3.0)))(jnp.asarray(1.5))
        near = [float(law.busy_period(jnp.asarray(1.5 + step), jnp.asarray(3.0))) for step in (-1e-4, 1e-4)]
    assert float(slope) == pytest.approx((near[1] - near[0]) / 2e-4, rel=1e-4)
