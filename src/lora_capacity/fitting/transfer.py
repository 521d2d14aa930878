"""Measured runs predicted by calibrations that know nothing of their model, and corrected by a few of them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from lora_capacity.calibration import Calibration
from lora_capacity.calibration.derive import LogNormal, capacity_error, derive_calibration
from lora_capacity.calibration.efficiencies import Efficiencies
from lora_capacity.costs import Costs, ExpertRouting, LoraKernels
from lora_capacity.errors import InputError
from lora_capacity.facts.speeds import NINE_OF_TEN
from lora_capacity.fitting.measured import measured_runs, read_measured
from lora_capacity.fitting.residuals import RunTargets, run_residuals
from lora_capacity.measurements import Runs
from lora_capacity.models import ModelShape
from lora_capacity.scenarios import Scenarios
from lora_capacity.twins.steady import ResidenceTime

_DRAWS = 24
"""Draws of the coefficients that intervals are read off: their widths are then known to about 15 %."""

_TWIN_ERROR = 0.015
"""Error of the logarithm of throughput that is left with coefficients fitted to the very runs: that of the bundled
calibrations on them is 0.013."""


_LEAST_EIGENVALUE = 1e-6
"""Of correlations: that of two coefficients whose sum, or difference, is known a thousand times better than each."""


class NewModel(NamedTuple):
    """A model that there is no calibration of.

    Attributes:
        shape: Layer shapes, named as in the table of runs.
        gpu: Name of the GPU.
        vllm_version: The vLLM version.
    """

    shape: ModelShape
    gpu: str
    vllm_version: str


def transferred(
    runs: Runs,
    known: Mapping[str, Calibration],
    new: NewModel | None = None,
    efficiencies: Efficiencies | None = None,
) -> dict[str, Calibration]:
    """Return a calibration of every model of a table, derived from its shape and the calibrations of other models.

    What requests were like, the lengths that the model answered with, is read off the runs: it is the workload, not the
    server.

    Args:
        runs: The runs.
        known: Calibrations by model; a model's own takes no part in its prediction.
        new: A model of the table that has none.
        efficiencies: What GPUs reach of their data sheets; None: the bundled ones.

    Raises:
        InputError: If a model is neither known nor the new one.
    """
    found = {}
    for model in dict.fromkeys(runs.model.tolist()):
        others = [each for name, each in known.items() if name != model]
        if new is not None and new.shape.name == model:
            of = new
        elif model in known:
            own = known[model]
            of = NewModel(own.model, own.gpu.name, own.vllm_version)
        else:
            allowed = f"a model with a calibration, {', '.join(known)}, or the one of --model-config"
            raise InputError(f"{runs.path}, model", model, allowed)
        derived = derive_calibration(
            of.shape, of.gpu, vllm_version=of.vllm_version, efficiencies=efficiencies, measured=others
        )
        if np.any((runs.model == model) & runs.started & (runs.completed > 0)):
            derived = replace(derived, runs=measured_runs(runs.completed_of(model), derived).lengths)
        found[model] = derived
    return found


def interval_coverage(runs: Runs, calibrations: Mapping[str, Calibration], seed: int = 0) -> Float[np.ndarray, " runs"]:
    """Return where the measured throughput lies in the interval that nine of ten should, 1 or 0; NaN: did not start.

    Args:
        runs: The runs.
        calibrations: A calibration of each model, with its distribution.
        seed: Of the draws of coefficients.
    """
    inside = np.full(len(runs), np.nan)
    for model, calibration in calibrations.items():
        rows = np.flatnonzero((runs.model == model) & runs.started & (runs.completed > 0))
        if not rows.size:
            continue
        measured = measured_runs(runs.take(rows), calibration)
        expected = np.log(measured.simulate(calibration.costs).throughput_tokens_per_s)
        generator = np.random.default_rng(seed)
        drawn = [
            np.log(measured.simulate(draw_costs(calibration, generator)).throughput_tokens_per_s) for _ in range(_DRAWS)
        ]
        spread = np.hypot(np.sqrt(np.mean((np.array(drawn) - expected) ** 2, axis=0)), _TWIN_ERROR)
        error = np.abs(np.log(measured.runs.throughput_tokens_per_s) - expected)
        inside[rows] = error <= NINE_OF_TEN * spread
    return inside


def distribution(calibration: Calibration) -> LogNormal:
    """Return a calibration's coefficients with their distribution; those without an error are left out."""
    errors = calibration.accuracy.get("coefficient_errors", {})
    values = calibration.coefficients
    names = tuple(name for name, value in values.items() if errors.get(name) and value > 0)
    spread = np.array([errors[name] for name in names])
    below = calibration.accuracy.get("coefficient_correlations")
    correlation = np.eye(len(names))
    if below is not None and len(below) == len(names):
        for row, column in enumerate(below):
            correlation[row, :row] = correlation[:row, row] = column
    logs = np.log([values[name] for name in names])
    return LogNormal(names, logs, _positive(correlation) * np.outer(spread, spread))


def _positive(correlation: Float[np.ndarray, "rows rows"]) -> Float[np.ndarray, "rows rows"]:
    """Return correlations that some variables have: those of a file are rounded, and may have none."""
    values, vectors = np.linalg.eigh(correlation)
    if values.min(initial=1.0) >= _LEAST_EIGENVALUE:
        return correlation
    nearest = (vectors * np.maximum(values, _LEAST_EIGENVALUE)) @ vectors.T
    scale = np.sqrt(np.diag(nearest))
    return np.asarray(nearest / np.outer(scale, scale))


def draw_costs(calibration: Calibration, generator: np.random.Generator) -> Costs:
    """Return a draw of a calibration's coefficients."""
    known = distribution(calibration)
    logs = generator.multivariate_normal(known.mean, known.covariance, method="eigh")
    costs = calibration.costs
    values = calibration.coefficients | dict(zip(known.names, np.exp(logs).tolist(), strict=True))
    return Costs.of_values(values, costs.kernels, costs.experts)


def update_calibration(prior: Calibration, runs: str | Path | Runs, name: str | None = None) -> Calibration:
    """Correct a calibration by a few serving runs: the most probable coefficients, given both.

    Its own errors say how far it may be moved; throughput and step times of the runs, predicted by the steady twin,
    move it.

    Args:
        prior: The calibration, derived or measured.
        runs: Runs of its model, or their table.
        name: Name of the corrected one; None: the prior's.

    Raises:
        InputError: If the table is malformed or no run of the model completed a request, or the prior tells no errors.
    """
    believed = distribution(prior)
    if not believed.names:
        raise InputError("--prior", prior.name, "a calibration with errors of its coefficients")
    measured = (
        measured_runs(runs.completed_of(prior.model.name), prior)
        if isinstance(runs, Runs)
        else read_measured(Path(runs), prior)
    )
    whiten = np.linalg.inv(np.linalg.cholesky(believed.covariance + 1e-9 * np.eye(len(believed.names))))
    others = {name: value for name, value in prior.coefficients.items() if name not in believed.names}
    kernels, experts = prior.costs.kernels, prior.costs.experts
    asked = (others, kernels, experts, measured.scenarios, measured.stays, RunTargets.of(measured))

    def residuals(logs: Float[np.ndarray, " coefficients"]) -> Float[np.ndarray, " residuals"]:
        of_runs = _run_residuals(jnp.asarray(logs), believed.names, *asked)
        return np.concatenate([np.asarray(of_runs, np.float64), whiten @ (logs - believed.mean)])

    def jacobian(logs: Float[np.ndarray, " coefficients"]) -> Float[np.ndarray, "residuals coefficients"]:
        slopes = _run_slopes(jnp.asarray(logs), believed.names, *asked)
        return np.concatenate([np.nan_to_num(np.asarray(slopes, np.float64)), whiten])

    found = least_squares(residuals, believed.mean, jac=jacobian, loss="soft_l1")
    values = dict(zip(believed.names, np.exp(found.x).tolist(), strict=True))
    fitted = Costs.of_values({**others, **values}, kernels, experts)
    slopes = jacobian(found.x)  # the solver's own are weighted by its loss
    after = LogNormal(believed.names, found.x, np.linalg.inv(slopes.T @ slopes))
    return replace(
        prior,
        name=name or prior.name,
        costs=fitted,
        runs=measured.lengths,
        capacity_error=round(float(np.hypot(capacity_error(fitted, after), _TWIN_ERROR)), 4),
        accuracy=after.accuracy,
        provenance={**prior.provenance, "corrected_by_runs": len(measured.runs)},
    )


def _residuals(
    logs: jax.Array,
    names: tuple[str, ...],
    others: dict[str, Any],
    kernels: LoraKernels,
    experts: ExpertRouting | None,
    scenarios: Scenarios,
    stays: ResidenceTime,
    targets: RunTargets,
) -> jax.Array:
    values = others | dict(zip(names, jnp.exp(logs), strict=True))
    return run_residuals(Costs.of_values(values, kernels, experts), scenarios, stays, targets).ravel()


# Compiled once for all tables of as many runs.
_run_residuals = jax.jit(_residuals, static_argnums=1)
_run_slopes = jax.jit(jax.jacfwd(_residuals), static_argnums=1)
