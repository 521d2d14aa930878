"""Margin to starvation: the same server under scaled loads, against the calibration's error."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from lora_capacity.calibration import Calibration
from lora_capacity.run import simulate
from lora_capacity.run.runner import Traffic
from lora_capacity.scenarios import STARVED_SHORTFALL, Bottleneck, Scenarios, table
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
    threshold: float = STARVED_SHORTFALL,
    risk: float = 0.05,
    loads: int = 3,
) -> dict[str, NDArray[Any]]:
    """Predict configurations and their margin to starvation.

    The first two loads are the offered one and the one at which a configuration must not starve for its chance of
    starving to be below ``risk``; the others go on from there in equal steps of the logarithm.

    Args:
        calibration: Coefficients and the error of the capacity.
        scenarios: The configurations, ``[configs]``.
        traffic: The workload, or the distribution of its output lengths.
        threshold: Share below the offered load from which throughput counts as starved.
        risk: Highest acceptable probability of starving, above 0, at most 0.5.
        loads: Loads to try, at least 2.

    Returns:
        The columns of `table`, and ``critical_load`` (see `load_headroom`), ``starving_probability`` (see the function
        of this name) and ``limit_beyond``: the bottleneck at the lowest load tried that starves it (label, empty if
        none does).
    """
    error = capacity_error(calibration, scenarios)
    factors = load_factors(error, risk, loads)
    each = scenarios.take(np.repeat(np.arange(len(scenarios.status)), loads))
    results = simulate(calibration, each.scaled(factors.ravel()), traffic)
    service, limits = (np.asarray(values).reshape(-1, loads) for values in (results.service, results.limit))
    critical = load_headroom(service, factors, threshold)
    offered, at_offered = jax.tree.map(lambda values: values[::loads], (each, results))
    return table(offered, at_offered, threshold) | {
        "critical_load": critical,
        "starving_probability": starving_probability(critical, error),
        "limit_beyond": starved_first_by(service, limits, threshold),
    }


def starved_first_by(
    service: Float[np.ndarray, "configs loads"], limits: Int[np.ndarray, "configs loads"], threshold: float
) -> NDArray[Any]:
    """Return the label of the bottleneck at the lowest load that starves each configuration, empty if none does.

    Args:
        service: Throughput as a share of the offered load.
        limits: Codes of the bottlenecks.
        threshold: Share below the offered load from which throughput counts as starved.
    """
    starved: NDArray[np.bool_] = np.asarray(service <= 1.0 - threshold)
    ever = np.asarray(starved.any(axis=1))
    first = limits[np.arange(len(limits)), np.argmax(starved, axis=1)]
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
    safe = norm.ppf(1.0 - risk) * error[:, np.newaxis]
    later = safe + np.maximum(safe, _SMALLEST_STEP) * np.arange(loads - 1)
    factors: Float[np.ndarray, "configs loads"] = np.exp(np.concatenate([np.zeros_like(safe), later], axis=1))
    return factors


def load_headroom(service: ArrayLike, factors: ArrayLike, threshold: float = STARVED_SHORTFALL) -> NDArray[np.float64]:
    """Return the load headroom: the factor of the offered load at which a configuration starves.

    Between the last factor that does not starve and the first that does, the service falls linearly in the factor's
    logarithm. If the smallest factor starves already, its throughput is taken for the capacity.

    Args:
        service: Throughput as a share of the offered load at each factor, ``[configs, factors]``.
        factors: Factors, ascending, ``[factors]`` or ``[configs, factors]``.
        threshold: Share below the offered load from which throughput counts as starved.

    Returns:
        ``[configs]``: the factor; the largest one where none starves, NaN where there are no numbers.
    """
    service = np.asarray(service, np.float64)
    log_factors = np.broadcast_to(np.log(np.asarray(factors, np.float64)), service.shape)
    needed = 1.0 - threshold
    starved = service <= needed
    first = np.argmax(starved, axis=1)
    row = np.arange(len(service))
    low, high = service[row, np.maximum(first - 1, 0)], service[row, first]
    step = log_factors[row, first] - log_factors[row, np.maximum(first - 1, 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossed = log_factors[row, first] - step * (needed - high) / (low - high)
        already = log_factors[:, 0] + np.log(service[:, 0] / needed)
    log_load = np.select([~starved.any(axis=1), first == 0], [log_factors[:, -1], already], crossed)
    return np.where(np.isnan(service[:, 0]), np.nan, np.exp(log_load))


def starving_probability(critical: ArrayLike, error: ArrayLike) -> NDArray[np.float64]:
    """Return the chance that a configuration starves when its true capacity is lognormal around the predicted one.

    ``Φ(−log(critical) / error)``: a server of ``1/f`` the predicted capacity fares under its load as predicted
    for ``f`` times the load. It leaves out that a smaller capacity need not be smaller in every respect alike.

    Args:
        critical: Factors from `load_headroom`, ``[configs]``.
        error: Standard deviation of the logarithm of the capacity, one or ``[configs]``.
    """
    margin, error = np.broadcast_arrays(np.log(np.asarray(critical, np.float64)), np.asarray(error, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        probability = norm.cdf(-margin / error)
    certain = np.where(np.isnan(margin), np.nan, margin <= 0)
    return np.asarray(np.where(error == 0, certain, probability), np.float64)
