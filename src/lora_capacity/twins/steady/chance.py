"""What chance adds to the balance: how often all places of a server are taken, and how many wait then.

Places are slots, taken by adapters, or those of the batch, taken by requests. How many would be taken without a limit
has a mean and a *peakedness*, its variance over its mean: 1 for Poisson numbers, less where few adapters share the
load, more where arrivals come in bursts or a longer step brings a larger batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lora_capacity.twins.steady.problem import TINY

_LEAST, _MOST = 1e-6, 1e6
"""Bounds of peakedness, ratios and curvatures: keep quotients and logarithms finite."""

_LEAST_MEAN = 0.02
"""Mean below which nobody waits, ``e^{-50}`` of a person: keeps exponentials finite."""


class Overflow(NamedTuple):
    """What stands beyond a limit by chance.

    Attributes:
        full_share: Share of the time in which all places are taken.
        beyond: Mean number beyond them.
        by_chance: The part of it above what the mean load alone leaves over.
    """

    full_share: Float[Array, " configs"]
    beyond: Float[Array, " configs"]
    by_chance: Float[Array, " configs"]


def overflow(
    mean: Float[Array, " configs"],
    peakedness: Float[Array, " configs"],
    places: Float[Array, " configs"],
    ratio: Float[Array, " configs"],
    curvature: Float[Array, " configs"],
    variability: Float[Array, " configs"],
) -> Overflow:
    """Return how often places are all taken, and the mean number that waits then.

    Up to the limit the number has the chances of the unlimited one (Hayward's approximation). From there on they go
    like ``e^{a·j − curvature·j²/2}`` in the number beyond it, ``a = ln(ratio)``, a geometric law cut off by a normal
    one: sources that wait send nothing, and a queue has had only so much time to grow.

    Args:
        mean: Places taken on average without a limit.
        peakedness: Variance of that number over its mean.
        places: The limit.
        ratio: Rate of arrivals over that of departures where all places are taken.
        curvature: How fast that ratio falls with the number beyond, or how little time there was.
        variability: Mean of the squared coefficients of variation of gaps and of times in a place.

    Source: peakedness by Fredericks, Congestion in blocking systems: a simple approximation technique (BSTJ, 1980);
        variability by Allen and Cunneen (Allen, Probability, Statistics and Queueing Theory, 1990); a queue that
        starts empty as reflected Brownian motion by Abate and Whitt (Advances in Applied Probability, 1987).
    """
    # One place is 1/peakedness of those of the equivalent Poisson number; for a single one the quotient is known.
    last = 1.0 + (mean - places + jnp.maximum(1.0 - peakedness, 0.0)) / (peakedness * places)
    last = jnp.maximum(last, ratio)
    blocked = jnp.minimum(erlang_b(places / peakedness, mean / peakedness) / peakedness, last / (1.0 + last))
    slope = jnp.log(jnp.clip(ratio, _LEAST, _MOST))
    mean_beyond = _whole(_truncated_normal_mean(slope, curvature), 1.0)
    odds = blocked * (1.0 + mean_beyond)
    full_share = odds / (1.0 - blocked + odds)
    slope, curvature = slope / variability, curvature / variability
    expected = _whole(_truncated_normal_mean(slope, curvature), variability)
    left_over = jnp.where(slope > 0.0, _whole(slope / curvature, variability), 0.0)
    return Overflow(full_share, full_share * expected, full_share * jnp.maximum(expected - left_over, 0.0))


def erlang_b(places: Float[Array, "*shape"], load: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Chance that a Poisson number is ``places``, given that it is no more: Erlang's loss formula, places not whole.

    ``P(N > n) = P(Γ(n + 1) < load)`` by `gamma_deviate`, ``P(N = n)`` by Stirling's formula: within 2 % where it is
    above 1 % (unit test).
    """
    places, load = jnp.maximum(places, _LEAST), jnp.maximum(load, TINY)
    log_equal = places - load - places * jnp.log(places / load)
    equal = jnp.exp(log_equal) / jnp.sqrt(2.0 * jnp.pi * (places + 1.0 / 6.0))
    shape = places + 1.0
    no_more = jax.scipy.stats.norm.cdf(-gamma_deviate(load / shape, shape))
    # At least what is lost were all places always taken, at most what a single place of their rate loses.
    at_least, at_most = jnp.maximum(1.0 - places / load, TINY), load / (load + places)
    return jnp.clip(equal / jnp.maximum(no_more, TINY), at_least, at_most)


def gamma_deviate(value: Float[Array, "*shape"], shape: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Standard normal deviate as likely to be exceeded as a value of the gamma law of a shape and of mean 1.

    Source: the cube root is nearly normal, by Wilson and Hilferty, The distribution of chi-square (PNAS, 1931).
    """
    return (jnp.cbrt(value) - 1.0 + 1.0 / (9.0 * shape)) * 3.0 * jnp.sqrt(shape)


def _truncated_normal_mean(slope: Float[Array, "*shape"], curvature: Float[Array, "*shape"]) -> Array:
    """Mean of a variable above 0 whose density goes like ``e^{slope·x − curvature·x²/2}``.

    Source: inverse Mills ratio by Boyd, Inequalities for Mills' ratio (1959), within 1 %.
    """
    width = jnp.sqrt(curvature)
    below = -slope / width
    far = jnp.abs(below)
    root = jnp.sqrt(far**2 + 2.0 * jnp.pi)
    mills = jnp.pi / ((jnp.pi - 1.0) * far + root)
    density = jax.scipy.stats.norm.pdf(below)
    return jnp.where(below > 0.0, 2.0 / (root + far), far + density / (1.0 - mills * density)) / width


def _whole(mean: Float[Array, "*shape"], unit: Float[Array, "*shape"] | float) -> Float[Array, "*shape"]:
    """Mean of the geometric law of whole numbers in place of an exponential one, in units of a given size."""
    return unit / jnp.expm1(unit / jnp.maximum(mean, unit * _LEAST_MEAN))
