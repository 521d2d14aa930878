"""Fitting a calibration: robust least squares on microbenchmarks and, if given, serving runs, with held-out errors."""

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs, FrontEndCosts, LoraKernels
from lora_capacity.errors import check_path, check_type
from lora_capacity.fitting.front_end import fit_front_end
from lora_capacity.fitting.measured import MeasuredRuns, Predicted, read_measured
from lora_capacity.fitting.memory import fit_memory
from lora_capacity.fitting.priors import fitted_names, priors
from lora_capacity.fitting.residuals import RunTargets, benchmark_residuals, run_residuals
from lora_capacity.measurements import Profile, read_profile, read_runs
from lora_capacity.measurements.runs import FloatArray
from lora_capacity.run.steady import check_progress

Progress = Callable[[int, int], None]
C = TypeVar("C", Costs, FrontEndCosts)

_MAX_EVALUATIONS = 50
"""Steps of the solver; the published tables take 10 to 20."""

_DIGITS = 5
"""Digits of a coefficient that are kept: standard errors are 1 % and more."""

# The published runs predicted from microbenchmarks alone were off by 0.036; allow for more where nothing was checked.
_CAPACITY_ERROR_WITHOUT_RUNS = 0.05


@dataclass(frozen=True)
class FitReport:
    """A fitted calibration and how good it is.

    Attributes:
        calibration: The calibration; ``accuracy`` and ``provenance`` hold what this report tells.
        held_back: Predicted throughput of each run with its scenario held out, tokens/s ``[runs]``; empty without
            runs.
        without: The calibration that each scenario's runs had no part in, by scenario: its coefficients and lengths
            are from the others. Empty without runs.
    """

    calibration: Calibration
    held_back: FloatArray
    without: dict[str, Calibration]

    def table(self) -> list[dict[str, Any]]:
        """One row per coefficient: name, value, unit, standard error relative to the value."""
        content = self.calibration.to_json()["coefficients"]
        errors = self.calibration.accuracy["coefficient_errors"]
        return [
            {"coefficient": name, **entry, "relative_error": errors.get(name)}
            for group in content.values()
            for name, entry in group.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """The calibration file's content."""
        return self.calibration.to_json()


def fit_calibration(
    profile_dir: str | Path,
    *,
    model: str | None = None,
    runs: str | Path | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> FitReport:
    """Estimate a calibration from a profile folder and, if given, serving runs.

    The engine's coefficients are fitted at once by their logarithms, so that none is negative, with a soft-L1 loss and
    weak priors; then the front end's, to the latencies that clients saw. With runs, every scenario is also held out,
    one after the other: fitted on the others and predicted.

    Args:
        profile_dir: Folder with the tables of a profile.
        model: Model to fit where the tables hold several.
        runs: Table of serving runs; rows of other models are left out.
        name: Name of the calibration; by default model and GPU.
        progress: Called with the fits done and to do.

    Returns:
        The calibration with its errors on fitted and held-out data.

    Raises:
        InputError: If a table is missing or malformed, or holds nothing of the model.
    """
    check_path("profile_dir", profile_dir)
    for field, text in (("model", model), ("name", name)):
        check_type(field, text, (str, type(None)), "a name")
    check_progress(progress)
    if runs is not None:
        check_path("runs", runs)
    profile = read_profile(profile_dir, model)
    if runs is not None:
        read_runs(runs)  # what is wrong with them is told before anything is fitted
    given = profile.device == "cpu" or "kv_cache_memory_bytes" in profile.server
    memory, memory_report = fit_memory(profile.model, profile.gpu, profile.kv_capacity, kv_cache_is_given=given)
    draft = Calibration(
        name=name or f"{profile.model.name}-{profile.gpu.name}".lower(),
        model=profile.model,
        gpu=profile.gpu,
        vllm_version=str(profile.server["vllm_version"]),
        device=profile.device,
        costs=Costs.of_model(profile.model, {}),
        memory=memory,
        fitted_ranges={},
        capacity_error=_CAPACITY_ERROR_WITHOUT_RUNS,
    )
    kernels = LoraKernels.of_server(profile.model, draft.deployment, draft.behaviour)
    draft = replace(draft, costs=replace(draft.costs, kernels=kernels))
    measured = None if runs is None else read_measured(Path(runs), draft)
    problem = _Problem(profile, measured, draft.costs)
    steps, done = 2 + len(_scenarios(measured)), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    alone, _ = _fit(profile, problem, measured, np.zeros(problem.run_count))
    advance()
    best, errors = _fit(profile, problem, measured, np.ones(problem.run_count))
    advance()
    accuracy: dict[str, Any] = {
        "coefficient_errors": {name: round(error, 4) for name, error in errors.items()},
        "kv_capacity": {
            "rows": memory_report.started_rows,
            "mean_error": round(memory_report.kv_mean_error, 6),
            "max_error": round(memory_report.kv_max_error, 6),
        },
    }
    held_back, capacity_error = np.array([]), draft.capacity_error
    apart: dict[str, dict[str, Any]] = {}
    if measured is not None:
        costs = _hold_back(profile, problem, measured, advance)
        apart = {name: {"costs": costs[name], "runs": measured.lengths_without(name)} for name in costs}
        predicted = _predict_held_back(measured, costs)
        held_back = predicted.throughput_tokens_per_s
        accuracy |= {
            "fitted": measured.errors(Predicted.of(measured.simulate(best))),
            "held_back_by_scenario": measured.errors(predicted),
            "microbenchmarks_alone": measured.errors(Predicted.of(measured.simulate(alone))),
        }
        capacity_error = measured.capacity_error(held_back, capacity_error)
    calibration = replace(
        draft,
        costs=best,
        fitted_ranges=_fitted_ranges(profile, measured),
        capacity_error=capacity_error,
        runs=None if measured is None else measured.lengths,
        accuracy=accuracy,
        provenance=_provenance(profile, measured),
    )
    without = {scenario: replace(calibration, **fitted) for scenario, fitted in apart.items()}
    return FitReport(calibration, held_back, without)


def _fit(
    profile: Profile, problem: "_Problem", measured: MeasuredRuns | None, run_weights: Float[np.ndarray, " runs"]
) -> tuple[Costs, dict[str, float]]:
    """Fit the engine's coefficients, then the front end's to what clients saw beyond them; costs and errors by name."""
    logs, errors = problem.solve(run_weights)
    costs = problem.costs(logs)
    results = None if measured is None else measured.simulate(costs)
    front_end, client_errors = fit_front_end(profile, measured, results, run_weights > 0)
    every = dict(zip(problem.names, errors.tolist(), strict=True)) | client_errors
    return replace(costs, front_end=_rounded(front_end)), every


def _hold_back(
    profile: Profile, problem: "_Problem", measured: MeasuredRuns, advance: Callable[[], None]
) -> dict[str, Costs]:
    """Fit with the runs of every scenario held out, one after the other; the costs by scenario."""
    costs = {}
    for scenario in _scenarios(measured):
        costs[scenario], _ = _fit(profile, problem, measured, np.where(measured.runs.scenario == scenario, 0.0, 1.0))
        advance()
    return costs


def _predict_held_back(measured: MeasuredRuns, costs: Mapping[str, Costs]) -> Predicted:
    """Predict the runs of every scenario by the costs fitted without it."""
    together = np.full((len(Predicted._fields), len(measured.runs)), np.nan)
    for scenario, fitted in costs.items():
        out = measured.runs.scenario == scenario
        together[:, out] = np.stack(Predicted.of(measured.simulate(fitted)))[:, out]
    return Predicted(*together)


def _scenarios(measured: MeasuredRuns | None) -> list[str]:
    return [] if measured is None else sorted(set(measured.runs.scenario))


def _residuals_of(measured: MeasuredRuns) -> Callable[[Costs], jax.Array]:
    targets = RunTargets.of(measured)
    return lambda costs: run_residuals(costs, measured.scenarios, measured.stays, targets)


class _Problem:
    """The least-squares problem of one profile; compiled once, solved for any weighting of the runs."""

    def __init__(self, profile: Profile, measured: MeasuredRuns | None, costs: Costs) -> None:
        self._kernels, self._experts = costs.kernels, costs.experts
        self.names = fitted_names(profile.device)
        loads = profile.loading
        ranks = np.stack([np.ones_like(loads["rank"]), loads["rank"]], axis=1)
        slope = np.linalg.lstsq(ranks, loads["disk_s"], rcond=None)[0]
        self._disk = {"disk_s": max(float(slope[0]), 0.0), "disk_rank_s": max(float(slope[1]), 0.0)}
        believed = priors(profile)
        self._centre = np.log([believed[name].centre for name in self.names])
        self._spread = np.array([believed[name].spread for name in self.names])
        benchmarks = benchmark_residuals(profile)
        of_runs = None if measured is None else _residuals_of(measured)
        self.run_count = 0 if measured is None else len(measured.runs)

        def residuals(log_coefficients: Float[jax.Array, " coefficients"]) -> Float[jax.Array, " residuals"]:
            costs = self._place(log_coefficients)
            parts = [benchmarks(costs)]
            if of_runs is not None:
                parts.append(of_runs(costs).ravel())
            return jnp.concatenate(parts)

        self._residuals = jax.jit(residuals)
        self._jacobian = jax.jit(jax.jacfwd(residuals))

    def costs(self, log_coefficients: Float[np.ndarray, " coefficients"]) -> Costs:
        """Costs as plain floats, to the digits that a fit can tell."""
        costs = self._place(jnp.asarray(log_coefficients))
        return replace(_rounded(costs), kernels=costs.kernels)

    def _place(self, log_coefficients: Float[jax.Array, " coefficients"]) -> Costs:
        """Put coefficients, given by their logarithms in the order of ``names``, into place."""
        values = dict(zip(self.names, jnp.exp(log_coefficients), strict=True)) | self._disk
        return Costs.of_values(values, self._kernels, self._experts)

    def solve(
        self, run_weights: Float[np.ndarray, " runs"]
    ) -> tuple[Float[np.ndarray, " coefficients"], Float[np.ndarray, " coefficients"]]:
        """Return the coefficients' logarithms and their standard errors."""
        weights: FloatArray | None = None

        def weighted(values: Float[jax.Array, "residuals ..."]) -> Float[np.ndarray, "residuals ..."]:
            nonlocal weights
            dense = np.asarray(values, dtype=np.float64)
            if weights is None:
                runs = np.tile(run_weights, 3)
                weights = np.concatenate([np.ones(dense.shape[0] - runs.size), runs])
            return np.asarray(np.nan_to_num(dense) * weights.reshape(-1, *[1] * (dense.ndim - 1)))

        def residuals(x: Float[np.ndarray, " coefficients"]) -> Float[np.ndarray, " residuals"]:
            return np.concatenate([weighted(self._residuals(jnp.asarray(x))), (x - self._centre) / self._spread])

        def jacobian(x: Float[np.ndarray, " coefficients"]) -> Float[np.ndarray, "residuals coefficients"]:
            return np.concatenate([weighted(self._jacobian(jnp.asarray(x))), np.diag(1.0 / self._spread)])

        found = least_squares(residuals, self._centre, jac=jacobian, loss="soft_l1", max_nfev=_MAX_EVALUATIONS)
        covariance = np.linalg.inv(found.jac.T @ found.jac)
        return found.x, np.sqrt(np.diag(covariance))


def _rounded(coefficients: C) -> C:
    """Plain floats to the digits that are kept."""
    rounded: C = jax.tree.map(lambda value: float(f"{float(value):.{_DIGITS}g}"), coefficients)
    return rounded


def _fitted_ranges(profile: Profile, measured: MeasuredRuns | None) -> dict[str, tuple[float, float]]:
    """Smallest and largest settings that the coefficients were fitted over.

    Lengths, loads and batch limits only have an upper end: steps are sums of what is in them, and smaller ones are
    among those measured. Prompts are taken to be as long as the longest answer where runs do not record them.
    """
    prompts = profile.prefill["input_tokens"]
    if measured is None:
        ranks, slots = profile.adapters["max_lora_rank"], profile.adapters["max_loras"]
        columns: Mapping[str, Any] = {"max_loras": slots, "max_lora_rank": ranks}
        starts: Any = profile.kv_capacity
        most = {"input_tokens": prompts.max()} if prompts.size else {}
    else:
        runs = starts = measured.runs
        columns = {
            "adapters": runs.max_cpu_loras,
            "max_loras": runs.max_loras,
            "max_lora_rank": runs.max_lora_rank,
        }
        longest = measured.lengths.max_output_tokens
        most = {
            "input_tokens": prompts.max(initial=longest),
            "output_tokens": longest,
            "offered_tokens_per_s": measured.offered_tokens_per_s.max(),
        }
    most |= {name: getattr(starts, name).max() for name in ("max_num_seqs", "max_num_batched_tokens")}
    ends = {name: (float(values.min()), float(values.max())) for name, values in columns.items()}
    return ends | {name: (0.0, float(value)) for name, value in most.items()}


def _provenance(profile: Profile, measured: MeasuredRuns | None) -> dict[str, Any]:
    source = (
        "profile" if (profile.folder / "profile.json").exists() else "published H100 measurements, arXiv 2508.08343"
    )
    return {
        "source": source,
        "fitted_on": datetime.date.today().isoformat(),
        "rows": {
            "kv_capacity": int(profile.kv_capacity.max_loras.size),
            "backbone_latency": int(profile.decode["batch"].size + profile.prefill["prompts"].size),
            "adapter_latency": int(profile.adapters["running"].size),
            "adapter_loading": int(profile.loading["rank"].size),
            "serving_runs": 0 if measured is None else len(measured.runs),
        },
    }
