"""Fitting what the front end adds to the engine's times, to what clients measured of servers that keep up."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float
from scipy.optimize import least_squares

from lora_capacity.costs import FrontEndCosts
from lora_capacity.fitting.measured import MeasuredRuns
from lora_capacity.fitting.priors import fitted_names, priors
from lora_capacity.measurements import Profile
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.clients import seen_by_clients

_TTFT_SPREAD, _ITL_SPREAD = 0.1, 0.03
"""Relative errors that a front end of a few coefficients is granted in the mean latencies of a run."""

_HARDLY_WAITING = 0.5
"""Queued requests up to which a run's time to first token tells of the front end: beyond, it tells of the queue."""


def fit_front_end(
    profile: Profile, measured: MeasuredRuns | None, results: Results | None, chosen: Bool[np.ndarray, " runs"]
) -> tuple[FrontEndCosts, dict[str, float]]:
    """Estimate the front end's coefficients from mean latencies of runs in which hardly any request is queued.

    Args:
        profile: The server's profile: its device decides on priors.
        measured: The runs; None where there are none, and priors are all that is known.
        results: What the engine does in them, ``[runs]``.
        chosen: Runs to fit to.

    Returns:
        The coefficients, and their relative standard errors by name.
    """
    names = fitted_names(profile.device, of_front_end=True)
    centre, spread = np.array([priors(profile)[name] for name in names]).T
    if measured is None or results is None:
        return _place(names, centre.tolist(), 0.0), dict(zip(names, spread.tolist(), strict=True))
    runs = measured.runs
    told = np.asarray(results.mean_waiting < _HARDLY_WAITING) & ~np.isnan(runs.ttft_s + runs.itl_s)
    rows = np.flatnonzero(chosen & told)
    scenarios: Scenarios = measured.scenarios.take(rows)
    engine: Results = jax.tree.map(lambda values: np.asarray(values)[rows], results)

    def residuals(logs: Float[jax.Array, " coefficients"]) -> Float[jax.Array, " residuals"]:
        seen = seen_by_clients(_place(names, tuple(jnp.exp(logs)), runs.metrics_interval_s[rows]), scenarios, engine)
        ttft = jnp.log(seen.ttft_s / runs.ttft_s[rows]) / _TTFT_SPREAD
        itl = jnp.log(seen.itl_s / runs.itl_s[rows]) / _ITL_SPREAD
        return jnp.concatenate([ttft, itl, (logs - np.log(centre)) / spread])

    found = least_squares(jax.jit(residuals), np.log(centre), jac=jax.jit(jax.jacfwd(residuals)), loss="soft_l1")
    errors = np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))
    fitted = _place(names, np.exp(found.x).tolist(), float(np.median(runs.metrics_interval_s)))
    return fitted, dict(zip(names, errors.tolist(), strict=True))


def _place(names: Iterable[str], values: Iterable[ArrayLike], interval_s: ArrayLike) -> FrontEndCosts:
    return FrontEndCosts(**dict(zip(names, values, strict=True)), metrics_interval_s=interval_s)
