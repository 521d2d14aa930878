"""Errors of predictions: SMAPE, MAPE, and whether a run is starved."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.status import STARVED_SHORTFALL


def smape(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Symmetric mean absolute percentage error, ``100/n · Σ |p − m| / (|p| + |m|)``; NaN of nothing.

    It lies between 0 and 100: without the factor 2 that other definitions have. 0 against 0 is no error; a pair of
    which one is NaN, unknown, takes no part.

    Args:
        predicted: Predictions, ``[rows]``.
        measured: Measurements, ``[rows]``.

    Source: arXiv 2508.08343.
    """
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    return _mean_percent(np.abs(p - m), np.abs(p) + np.abs(m))


def mape(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Mean absolute percentage error, ``100/n · Σ |p − m| / |m|``; NaN of nothing, and as `smape` of 0 and of NaN.

    Args:
        predicted: Predictions, ``[rows]``.
        measured: Measurements, ``[rows]``.
    """
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    return _mean_percent(np.abs(p - m), np.abs(m))


def is_starved(throughput: ArrayLike, offered: ArrayLike) -> NDArray[np.bool_]:
    """Whether throughput is 10 % or more below the offered load; False where either is NaN.

    Args:
        throughput: Tokens of completed requests per second, ``[rows]``.
        offered: Arriving tokens per second, ``[rows]``.
    """
    return np.asarray(np.asarray(throughput) <= (1.0 - STARVED_SHORTFALL) * np.asarray(offered))


def _mean_percent(error: NDArray[np.float64], scale: NDArray[np.float64]) -> float:
    """Return the mean of error over scale in percent."""
    known = ~np.isnan(error)
    error, scale = error[known], np.broadcast_to(scale, known.shape)[known]
    if not error.size:
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(100.0 * np.mean(np.where(error == 0, 0.0, error / scale)))
