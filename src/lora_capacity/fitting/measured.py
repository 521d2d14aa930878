"""Serving runs to fit to, and how far predictions of them are off."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs
from lora_capacity.errors import InputError
from lora_capacity.measurements import RunLengths, Runs, is_starved, read_runs, smape
from lora_capacity.measurements.runs import FloatArray
from lora_capacity.run.steady import run_steady
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.validation import RUN_LENGTHS, pack_runs, run_lengths

# Runs whose service lies between these tell how well the onset of starvation is predicted.
_NEAR_CAPACITY = (0.5, 0.98)
_FEWEST_NEAR = 5
"""Fewer runs near the onset do not tell a root mean square."""

_BUSY_RUNNING = 20
"""Requests in the batch from which on KV usage over running requests is steady: of fewer, one long request decides."""


class Predicted(NamedTuple):
    """What clients are predicted to see of runs, ``[runs]`` each.

    Attributes:
        throughput_tokens_per_s: Input plus output tokens of completed requests per second.
        itl_s: Mean inter-token latency.
        ttft_s: Mean time to first token.
    """

    throughput_tokens_per_s: FloatArray
    itl_s: FloatArray
    ttft_s: FloatArray

    @classmethod
    def of(cls, results: Results) -> "Predicted":
        """Return what results say of clients."""
        seen = results.client
        values = (results.throughput_tokens_per_s, seen.itl_s, seen.ttft_s)
        return cls(*(np.asarray(each, np.float64) for each in values))


@dataclass(frozen=True)
class MeasuredRuns:
    """Serving runs of one model that started.

    Attributes:
        runs: What was measured, ``[runs]``.
        lengths: What is known of their request lengths.
        scenarios: The runs as configurations, ``[runs]``.
        stays: Law of their output lengths.
        step_s: Mean step time by Little's law, running requests per output token per second, ``[runs]``; NaN where
            that is not recorded.
        output_share: Answer tokens produced per token asked for, ``[runs]``.
        held_tokens: KV cache per running request, ``[runs]``; NaN where too few run to tell.
    """

    runs: Runs
    lengths: RunLengths
    scenarios: Scenarios
    stays: ResidenceTime
    step_s: FloatArray
    output_share: FloatArray
    held_tokens: FloatArray

    def lengths_without(self, scenario: str) -> RunLengths:
        """Return what the runs of all other scenarios tell of the request lengths."""
        rest = self.runs.scenario != scenario
        otherwise = _with_medians(self.lengths, self.output_share[rest], self.held_tokens[rest])
        return run_lengths(self.runs, np.flatnonzero(rest), otherwise)

    @property
    def offered_tokens_per_s(self) -> Float[np.ndarray, " runs"]:
        """Tokens of arriving requests per second, ``[runs]``."""
        per_request = self.runs.mean_input_tokens + self.runs.mean_output_tokens
        return self.runs.arrival_rate_per_s(self.lengths.max_pending) * per_request

    def simulate(self, costs: Costs) -> Results:
        """Run the steady twin on all runs."""
        return run_steady(costs, self.scenarios, self.stays)

    def errors(self, predicted: Predicted) -> dict[str, Any]:
        """Errors over all runs and by scenario in percent; share of runs told right as starved or not.

        Latencies are those of clients.
        """
        runs, offered = self.runs, self.offered_tokens_per_s
        measured, throughput = runs.throughput_tokens_per_s, predicted.throughput_tokens_per_s
        keep_up = ~is_starved(measured, offered)

        def smapes(rows: Any) -> dict[str, Any]:
            return {
                "runs": int(np.arange(len(runs))[rows].size),
                "throughput_smape": round(smape(throughput[rows], measured[rows]), 3),
                "itl_smape": round(smape(predicted.itl_s[rows], runs.itl_s[rows]), 3),
            }

        right = is_starved(throughput, offered) == is_starved(measured, offered)
        scenarios = sorted(set(runs.scenario))
        return {
            **smapes(slice(None)),
            "ttft_smape_keeping_up": round(smape(predicted.ttft_s[keep_up], runs.ttft_s[keep_up]), 3),
            "starved_right": round(float(np.mean(right)), 4),
            "scenarios": {scenario: smapes(runs.scenario == scenario) for scenario in scenarios},
        }

    def capacity_error(self, throughput: Float[np.ndarray, " runs"], otherwise: float) -> float:
        """Root mean square of the log error of throughput over runs near the onset of starvation.

        Args:
            throughput: Predictions in tokens/s, ``[runs]``.
            otherwise: What to return where too few runs are near it to tell.
        """
        measured = self.runs.throughput_tokens_per_s
        service = measured / self.offered_tokens_per_s
        near = (service > _NEAR_CAPACITY[0]) & (service < _NEAR_CAPACITY[1])
        if np.count_nonzero(near) < _FEWEST_NEAR:
            return otherwise
        return round(float(np.sqrt(np.mean(np.log(throughput[near] / measured[near]) ** 2))), 4)


def read_measured(path: Path, server: Calibration) -> MeasuredRuns:
    """Read the runs of a server's model, and what they tell of their request lengths.

    Args:
        path: Table of serving runs.
        server: Model, GPU, version and memory of the server; its costs do not matter.

    Raises:
        InputError: If the table is malformed, no run of the model completed a request, or one was measured on another
            GPU or with prompts from a prefix cache.
    """
    runs = read_runs(path).completed_of(server.model.name)
    for run_id, why in zip(runs.run_id, runs.unlike(server.gpu.name), strict=True):
        if why:
            name = f"{path}, run {run_id}" if run_id else str(path)
            raise InputError(name, f"a run {why}", "runs of the server that is fitted", "take it out of the table")
    return measured_runs(runs, server)


def measured_runs(runs: Runs, server: Calibration) -> MeasuredRuns:
    """Return runs of one model, all of which completed requests, with what they tell of their request lengths.

    Args:
        runs: The runs.
        server: As in `read_measured`.
    """
    running = np.where(runs.mean_running > 0, runs.mean_running, np.nan)
    share = runs.output_tokens_per_s / (runs.mean_output_tokens * runs.completed / runs.duration_s)
    rows = np.arange(len(runs))
    lengths = run_lengths(runs, rows, _with_medians(RUN_LENGTHS, share, np.array([])))
    scenarios, output_lengths = pack_runs(runs, rows, server, lengths)
    held = runs.mean_kv_usage * np.asarray(scenarios.kv_cache_tokens) / running
    held = np.where(running > _BUSY_RUNNING, held, np.nan)
    if np.isfinite(held).any():
        lengths = _with_medians(lengths, np.array([]), held)
        scenarios, output_lengths = pack_runs(runs, rows, server, lengths)
    stays = ResidenceTime.of_lengths(output_lengths)
    return MeasuredRuns(runs, lengths, scenarios, stays, running / runs.output_tokens_per_s, share, held)


def _with_medians(
    lengths: RunLengths, output_share: Float[np.ndarray, " shares"], held_tokens: Float[np.ndarray, " amounts"]
) -> RunLengths:
    """Put medians in place of what is told of lengths, where there is a number to take one of."""
    if output_share.size:
        lengths = replace(lengths, output_share=round(float(np.median(output_share)), 4))
    if np.isfinite(held_tokens).any():
        lengths = replace(lengths, kv_tokens_per_request=round(float(np.nanmedian(held_tokens)), 1))
    return lengths
