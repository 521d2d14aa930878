"""Margin to failing: the same server under scaled loads, against the calibration's error."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from lora_capacity.calibration import Calibration
from lora_capacity.run import simulate
from lora_capacity.run.runner import Traffic
from lora_capacity.scenarios import Bottleneck, Results, Scenarios, table
from lora_capacity.search.extrapolation import extrapolation_error
from lora_capacity.search.objective import Needed
from lora_capacity.twins.steady.slots import burst_width

SWING_ERROR = 1.5
"""What the steady twin may be off when more adapters contend for the slots than there are, per squared variance of the
logarithm of the requests that the adapters in the slots want to run.

Source: the event twin near capacity, which serves 14 % less than the steady twin with 9 slots, 8 % with 12, 4 % with
15, 2 % with 20."""

_SMALLEST_STEP = 0.01
"""Least logarithm between two loads tried, lest a calibration without error tries one load only."""


def assess(
    calibration: Calibration,
    scenarios: Scenarios,
    traffic: Traffic,
    *,
    needed: Needed | None = None,
    risk: float = 0.05,
    loads: int = 3,
) -> dict[str, NDArray[Any]]:
    """Predict configurations and their margin to failing.

    The first two loads are the offered one and the one at which a configuration must not fail for its chance of failing
    to be below ``risk``; the others go on from there in equal steps of the logarithm.

    Args:
        calibration: Coefficients and the error of the capacity.
        scenarios: The configurations, ``[configs]``.
        traffic: The workload, or the distribution of its output lengths.
        needed: What does not fail; not to starve where it is not given.
        risk: Highest acceptable probability of failing, above 0, at most 0.5.
        loads: Loads to try, at least 2.

    Returns:
        The columns of `table`; ``served``, the share of arriving requests that are served by the end or in service;
        ``goodput_per_s``, requests within their bounds per second; ``critical_load`` (see `load_headroom`),
        ``starving_probability`` (see the function of this name); ``limit_beyond``: the bottleneck at the lowest load
        tried at which it fails (label, empty if it fails at none); and `extrapolation_error`.
    """
    needed = needed or Needed()
    if needed.attainment:  # which counts the chance of few slots itself
        error = np.full(scenarios.status.shape, calibration.capacity_error)
    else:
        error = capacity_error(calibration, scenarios)
    found = simulate(calibration, scenarios, traffic)
    told = judged_columns(scenarios, found)
    beyond = extrapolation_error(calibration, scenarios, told, traffic)
    error = np.hypot(error, beyond)
    factors = load_factors(error, risk, loads)
    reached, limits = np.full(factors.shape, np.nan), np.full(factors.shape, Bottleneck.NONE)
    reached[:, 0], limits[:, 0] = needed.reached(told), found.limit
    rows = np.flatnonzero(reached[:, 0] >= 1.0)  # of what fails already higher loads tell nothing
    if rows.size:
        each = scenarios.take(np.repeat(rows, loads - 1)).scaled(factors[rows, 1:].ravel())
        found = simulate(calibration, each, traffic)
        reached[rows, 1:] = needed.reached(judged_columns(each, found)).reshape(-1, loads - 1)
        limits[rows, 1:] = np.reshape(found.limit, (-1, loads - 1))
    critical = load_headroom(reached, factors)
    return told | {
        "critical_load": critical,
        "starving_probability": starving_probability(critical, error),
        "limit_beyond": limit_beyond(reached, limits),
        "extrapolation_error": beyond,
    }


def judged_columns(scenarios: Scenarios, results: Results) -> dict[str, NDArray[Any]]:
    """Return the columns of `table` with ``served`` and ``goodput_per_s``, see `assess`.

    An engine of steps counts the requests that still wait at the end; how many arrive is chance.
    """
    columns = table(scenarios, results)
    arriving_per_s = np.asarray(scenarios.requests_per_s)
    arriving = arriving_per_s * np.asarray(scenarios.horizon_s)
    served = columns["service"] + columns["mean_running"] / arriving
    if results.events is not None:
        served = 1.0 - columns["unanswered"] / arriving
    return columns | {
        "served": np.where(np.isnan(columns["service"]), np.nan, np.clip(served, 0.0, 1.0)),
        "goodput_per_s": columns["attainment"] * arriving_per_s,
    }


def limit_beyond(reached: Float[np.ndarray, "configs loads"], limits: Int[np.ndarray, "configs loads"]) -> NDArray[Any]:
    """Return the label of the bottleneck at the lowest load at which each configuration fails, empty if at none.

    Args:
        reached: What is reached of what is needed.
        limits: Codes of the bottlenecks.
    """
    fails: NDArray[np.bool_] = np.asarray(reached < 1.0)
    ever: NDArray[np.bool_] = np.asarray(fails.any(axis=1))
    first = limits[np.arange(len(limits)), np.argmax(fails, axis=1)]
    labels = [Bottleneck(code).label if some else "" for code, some in zip(first, ever, strict=True)]
    return np.array(labels, dtype=object)


def capacity_error(calibration: Calibration, scenarios: Scenarios) -> Float[np.ndarray, " configs"]:
    """Return the standard deviation of the logarithm of each configuration's capacity.

    The calibration's error, and in quadrature what the swings of few contended slots add.
    """
    contended = np.asarray(scenarios.class_count).sum(axis=1) > np.asarray(scenarios.max_loras)
    swings = SWING_ERROR * np.asarray(burst_width(scenarios.max_loras), np.float64) ** 4
    return np.asarray(np.hypot(calibration.capacity_error, np.where(contended, swings, 0.0)))


def load_factors(error: Float[np.ndarray, " configs"], risk: float, loads: int) -> Float[np.ndarray, "configs loads"]:
    """Return the factors of the offered load that `assess` tries, ascending from 1."""
    safe = ndtri(1.0 - risk) * error[:, np.newaxis]
    later = safe + np.maximum(safe, _SMALLEST_STEP) * np.arange(loads - 1)
    factors: Float[np.ndarray, "configs loads"] = np.exp(np.concatenate([np.zeros_like(safe), later], axis=1))
    return factors


def load_headroom(reached: ArrayLike, factors: ArrayLike) -> NDArray[np.float64]:
    """Return the load headroom: the factor of the offered load at which a configuration fails.

    Between the last factor at which it does not fail and the first at which it does, what is reached falls linearly in
    the factor's logarithm. If it fails at the smallest factor already, the share reached is taken for the capacity.

    Args:
        reached: What is reached of what is needed at each factor, see `Needed.reached`, ``[configs, factors]``.
        factors: Factors, ascending, ``[factors]`` or ``[configs, factors]``.

    Returns:
        ``[configs]``: the factor; the largest one where none fails, NaN where there are no numbers.
    """
    reached = np.asarray(reached, np.float64)
    log_factors = np.broadcast_to(np.log(np.asarray(factors, np.float64)), reached.shape)
    fails = reached < 1.0
    first = np.argmax(fails, axis=1)
    row = np.arange(len(reached))
    low, high = reached[row, np.maximum(first - 1, 0)], reached[row, first]
    step = log_factors[row, first] - log_factors[row, np.maximum(first - 1, 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossed = log_factors[row, first] - step * (1.0 - high) / (low - high)
        already = log_factors[:, 0] + np.log(reached[:, 0])
    log_load = np.select([~fails.any(axis=1), first == 0], [log_factors[:, -1], already], crossed)
    return np.where(np.isnan(reached[:, 0]), np.nan, np.exp(log_load))


def starving_probability(critical: ArrayLike, error: ArrayLike) -> NDArray[np.float64]:
    """Return the chance that a configuration fails when its true capacity is lognormal around the predicted one.

    ``Φ(−log(critical) / error)``: a server of ``1/f`` the predicted capacity fares under its load as predicted
    for ``f`` times the load. It leaves out that a smaller capacity need not be smaller in every respect alike.

    Args:
        critical: Factors from `load_headroom`, ``[configs]``.
        error: Standard deviation of the logarithm of the capacity, one or ``[configs]``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_critical = np.log(np.asarray(critical, np.float64))
        margin, error = np.broadcast_arrays(log_critical, np.asarray(error, np.float64))
        probability = ndtr(-margin / error)
    certain = np.where(np.isnan(margin), np.nan, margin <= 0)
    return np.asarray(np.where(error == 0, certain, probability), np.float64)
