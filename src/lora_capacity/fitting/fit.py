"""Fitting a calibration: robust least squares on microbenchmarks and, if given, serving runs, with held-back errors."""

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares

from lora_capacity._tables import Column, read_table
from lora_capacity.calibration import Calibration, RunLengths
from lora_capacity.costs import Costs, LoraKernels
from lora_capacity.errors import InputError
from lora_capacity.fitting.profile import FloatArray, Profile, read_profile
from lora_capacity.fitting.residuals import (
    NAMES,
    MeasuredRuns,
    benchmark_residuals,
    build_costs,
    run_residuals,
)
from lora_capacity.memory import MemoryModel, fit_memory
from lora_capacity.twin import Results, simulate_steady
from lora_capacity.validation import RUN_LENGTHS, Runs, lay_out_runs, read_runs, smape

Progress = Callable[[int, int], None]

# Where coefficients are believed to lie before anything is measured, and how firmly: centre and standard deviation of
# the logarithm. They decide only what the measurements leave open, such as the rank's share when all adapters had one
# rank.
_PRIORS: dict[str, tuple[float, float]] = {
    "base_s": (12e-3, 0.5),
    "lora_s": (1.5e-3, 0.7),
    "token_s": (30e-6, 0.5),
    "expand_block_s": (1.5e-9, 0.5),
    "shrink_block_s": (0.3e-9, 0.7),
    "adapter_s": (0.15e-3, 0.7),
    "adapter_rank_s": (4e-6, 0.5),
    "small_step_factor": (0.8, 0.4),
    "passed_over_s": (0.35e-6, 0.3),
}
# A large data-centre GPU: memory bandwidth, and matrix products as far as serving reaches.
_BANDWIDTH_BYTES_PER_S = 2.0e12
_COMPUTE_FLOP_PER_S = 3.5e14
_PREFILL_SHARE_ON_TOP = 0.4
_HOST_PRIOR_SPREAD = 0.4
_MAX_EVALUATIONS = 50
# Runs whose service lies between these tell how well the onset of starvation is predicted.
_NEAR_CAPACITY = (0.5, 0.98)
_RECORDED = {
    "mean_running": Column(required=False, blank=True, minimum=0),
    "output_throughput": Column(blank=True, minimum=0),
    "mean_kv_usage": Column(required=False, blank=True, minimum=0),
}


@dataclass(frozen=True)
class FitReport:
    """A fitted calibration and how good it is.

    Attributes:
        calibration: The calibration; ``accuracy`` and ``provenance`` hold what this report tells.
        held_back: Predicted throughput of each run with its scenario held back, tokens/s ``[runs]``; empty without
            runs.
    """

    calibration: Calibration
    held_back: FloatArray

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

    All coefficients are fitted at once by their logarithms, so that none is negative, with a soft-L1 loss and weak
    priors. With runs, every scenario is also held back in turn: fitted on the others and predicted.

    Args:
        profile_dir: Folder with the tables of a profile.
        model: Model to fit where the tables hold several.
        runs: Table of serving runs; rows of other models are left out.
        name: Name of the calibration; by default model and GPU.
        progress: Called with the fits done and to do.

    Returns:
        The calibration with its errors on fitted and held-back data.

    Raises:
        InputError: If a table is missing or malformed, or holds nothing of the model.
    """
    profile = read_profile(profile_dir, model)
    memory, memory_report = fit_memory(profile.model, profile.gpu, profile.kv_capacity)
    measured = None if runs is None else _read_measured(Path(runs), profile, memory)
    problem = _Problem(profile, measured)
    held_back_groups = [] if measured is None else sorted(set(measured.runs.scenario))
    steps, done = 2 + len(held_back_groups), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    alone, _ = problem.solve(np.zeros(problem.run_count))
    advance()
    best, errors = problem.solve(np.ones(problem.run_count))
    advance()
    ranges = _fitted_ranges(profile, measured)
    calibration = Calibration(
        name=name or f"{profile.model.name}-{profile.gpu.name}".lower(),
        model=profile.model,
        gpu=profile.gpu,
        vllm_version=str(profile.server["vllm_version"]),
        costs=problem.costs(best),
        memory=memory,
        fitted_ranges=ranges,
        capacity_error=0.05,
        runs=None if measured is None else measured.lengths,
        provenance=_provenance(profile, measured),
    )
    accuracy: dict[str, Any] = {
        "coefficient_errors": {key: round(float(error), 4) for key, error in zip(NAMES, errors, strict=True)},
        "kv_capacity": {
            "rows": memory_report.started_rows,
            "mean_error": round(memory_report.kv_mean_error, 6),
            "max_error": round(memory_report.kv_max_error, 6),
        },
    }
    held_back = np.array([])
    if measured is not None:
        held_back, held_itl = np.full((2, problem.run_count), np.nan)
        for scenario in held_back_groups:
            out = measured.runs.scenario == scenario
            fitted, _ = problem.solve(np.where(out, 0.0, 1.0))
            predicted = measured.predict(problem.costs(fitted))
            held_back[out], held_itl[out] = predicted.throughput_tokens_per_s[out], predicted.itl_s[out]
            advance()
        in_sample = measured.predict(problem.costs(best))
        bare = measured.predict(problem.costs(alone))
        accuracy |= {
            "fitted": measured.errors(in_sample.throughput_tokens_per_s, in_sample.itl_s),
            "held_back_by_scenario": measured.errors(held_back, held_itl),
            "microbenchmarks_alone": measured.errors(bare.throughput_tokens_per_s, bare.itl_s),
        }
        calibration = replace(calibration, capacity_error=measured.capacity_error(held_back))
    return FitReport(replace(calibration, accuracy=accuracy), held_back)


class _Problem:
    """The least-squares problem of one profile; compiled once, solved for any weighting of the runs."""

    def __init__(self, profile: Profile, measured: "_Measured | None") -> None:
        self._model = profile.model
        loads = profile.loading
        ranks = np.stack([np.ones_like(loads["rank"]), loads["rank"]], axis=1)
        slope = np.linalg.lstsq(ranks, loads["disk_s"], rcond=None)[0]
        self._disk = (max(float(slope[0]), 0.0), max(float(slope[1]), 0.0))
        host_s = float(np.median(loads["host_s"]))
        priors = _PRIORS | _first_principles(profile) | {"host_s": (host_s, _HOST_PRIOR_SPREAD)}
        self._centre = np.log([priors[name][0] for name in NAMES])
        self._spread = np.array([priors[name][1] for name in NAMES])
        benchmarks = benchmark_residuals(profile)
        of_runs = None if measured is None else run_residuals(measured.targets)
        self.run_count = 0 if measured is None else len(measured.runs)

        def residuals(log_coefficients: jax.Array) -> jax.Array:
            costs = build_costs(self._model, log_coefficients, self._disk)
            parts = [benchmarks(costs)]
            if of_runs is not None:
                parts.append(of_runs(costs).ravel())
            return jnp.concatenate(parts)

        self._residuals = jax.jit(residuals)
        self._jacobian = jax.jit(jax.jacfwd(residuals))

    def costs(self, log_coefficients: FloatArray) -> Costs:
        """Costs as plain floats, to the digits that a fit can tell."""
        costs = build_costs(self._model, jnp.asarray(log_coefficients), self._disk)
        rounded = jax.tree.map(lambda value: float(f"{float(value):.5g}"), costs)
        return replace(rounded, kernels=LoraKernels.of_model(self._model))

    def solve(self, run_weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the coefficients' logarithms and their standard errors."""
        weights: FloatArray | None = None

        def weighted(values: jax.Array) -> FloatArray:
            nonlocal weights
            dense = np.asarray(values, dtype=np.float64)
            if weights is None:
                runs = np.tile(run_weights, 3)
                weights = np.concatenate([np.ones(dense.shape[0] - runs.size), runs])
            return np.asarray(np.nan_to_num(dense) * weights.reshape(-1, *[1] * (dense.ndim - 1)))

        def residuals(x: FloatArray) -> FloatArray:
            return np.concatenate([weighted(self._residuals(jnp.asarray(x))), (x - self._centre) / self._spread])

        def jacobian(x: FloatArray) -> FloatArray:
            return np.concatenate([weighted(self._jacobian(jnp.asarray(x))), np.diag(1.0 / self._spread)])

        found = least_squares(residuals, self._centre, jac=jacobian, loss="soft_l1", max_nfev=_MAX_EVALUATIONS)
        covariance = np.linalg.inv(found.jac.T @ found.jac)
        return found.x, np.sqrt(np.diag(covariance))


def _first_principles(profile: Profile) -> dict[str, tuple[float, float]]:
    """Priors that follow from shapes: reading the KV cache, computing a prompt, moving activations to LoRA kernels."""
    model = profile.model
    moved = sum(module.input_size + 2 * sum(module.output_sizes) for module in model.linear_modules)
    activation_bytes = model.num_layers * model.dtype_bytes * moved
    prompt_s = 2.0 * model.weight_bytes / model.dtype_bytes / _COMPUTE_FLOP_PER_S
    return {
        "kv_token_s": (model.kv_bytes_per_token / _BANDWIDTH_BYTES_PER_S, 0.3),
        "prefill_token_s": (_PREFILL_SHARE_ON_TOP * prompt_s, 1.0 if profile.tells_prefill else 0.3),
        "lora_token_s": (activation_bytes / _BANDWIDTH_BYTES_PER_S, 0.3),
    }


_simulate = jax.jit(simulate_steady)


@dataclass(frozen=True)
class _Measured:
    """Serving runs of one model that started."""

    runs: Runs
    targets: MeasuredRuns
    lengths: RunLengths

    def predict(self, costs: Costs) -> Results:
        results: Results = _simulate(costs, self.targets.scenarios, self.targets.stays)
        return results

    def errors(self, throughput: FloatArray, itl_s: FloatArray) -> dict[str, Any]:
        """Errors over all runs and by scenario, percent."""
        runs = self.runs
        measured = runs.throughput_tokens_per_s
        offered = self.offered_tokens_per_s
        right = (throughput <= 0.9 * offered) == (measured <= 0.9 * offered)
        groups = {
            scenario: {
                "runs": int((runs.scenario == scenario).sum()),
                "throughput_smape": round(smape(throughput[out], measured[out]), 3),
                "itl_smape": round(smape(itl_s[out], runs.itl_s[out]), 3),
            }
            for scenario in sorted(set(runs.scenario))
            for out in [runs.scenario == scenario]
        }
        return {
            "runs": len(runs),
            "throughput_smape": round(smape(throughput, measured), 3),
            "itl_smape": round(smape(itl_s, runs.itl_s), 3),
            "starved_right": round(float(right.mean()), 4),
            "scenarios": groups,
        }

    @property
    def offered_tokens_per_s(self) -> FloatArray:
        per_request = self.runs.mean_input_tokens + self.runs.mean_output_tokens
        return self.runs.arrival_rate_per_s(self.lengths.max_pending) * per_request

    def capacity_error(self, throughput: FloatArray) -> float:
        """Spread of the log error over runs near the onset of starvation."""
        measured = self.runs.throughput_tokens_per_s
        service = measured / self.offered_tokens_per_s
        near = (service > _NEAR_CAPACITY[0]) & (service < _NEAR_CAPACITY[1])
        return round(float(np.sqrt(np.mean(np.log(throughput[near] / measured[near]) ** 2))), 4)


def _read_measured(path: Path, profile: Profile, memory: MemoryModel) -> _Measured:
    every = read_runs(path)
    chosen = np.flatnonzero((every.model == profile.model.name) & every.started)
    if not chosen.size:
        raise InputError(f"{path}, model", profile.model.name, "a model with runs that started")
    recorded = {name: values[chosen] for name, values in read_table(path, _RECORDED).items()}
    runs = every.take(chosen)
    output_per_s = recorded["output_throughput"]
    draft = Calibration(
        name="draft",
        model=profile.model,
        gpu=profile.gpu,
        vllm_version=str(profile.server["vllm_version"]),
        costs=build_costs(profile.model, jnp.zeros(len(NAMES)), (0.0, 0.0)),
        memory=memory,
        fitted_ranges={},
        capacity_error=0.0,
    )
    asked = runs.mean_output_tokens * runs.completed / runs.duration_s
    share = float(np.median(output_per_s / asked))
    lengths = replace(RUN_LENGTHS, output_share=round(share, 4))
    scenarios, stays = lay_out_runs(runs, np.arange(len(runs)), draft, lengths)
    held = recorded["mean_kv_usage"] * np.asarray(scenarios.kv_cache_tokens) / recorded["mean_running"]
    if np.isfinite(held).any():
        busy = recorded["mean_running"] > 20
        lengths = replace(lengths, kv_tokens_per_request=round(float(np.nanmedian(held[busy])), 1))
        scenarios, stays = lay_out_runs(runs, np.arange(len(runs)), draft, lengths)
    targets = MeasuredRuns(
        scenarios=scenarios,
        stays=stays,
        throughput_tokens_per_s=runs.throughput_tokens_per_s,
        itl_s=runs.itl_s,
        step_s=recorded["mean_running"] / output_per_s,
    )
    return _Measured(runs, targets, lengths)


def _fitted_ranges(profile: Profile, measured: _Measured | None) -> dict[str, tuple[float, float]]:
    """Smallest and largest settings that the coefficients were fitted over."""
    if measured is None:
        ranks, slots = profile.adapters["max_lora_rank"], profile.adapters["max_loras"]
        columns: Mapping[str, Any] = {"max_loras": slots, "max_lora_rank": ranks}
    else:
        runs = measured.runs
        columns = {
            "adapters": runs.max_cpu_loras,
            "max_loras": runs.max_loras,
            "max_lora_rank": runs.max_lora_rank,
        }
    return {name: (float(values.min()), float(values.max())) for name, values in columns.items()}


def _provenance(profile: Profile, measured: _Measured | None) -> dict[str, Any]:
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
