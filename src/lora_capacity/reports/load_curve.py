"""The recommended server under less and more load than asked for."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from lora_capacity.reports.plan_grid import run_at
from lora_capacity.scenarios import Scenarios, build_scenarios
from lora_capacity.search import Recommendation
from lora_capacity.search.margin import judged_columns
from lora_capacity.search.objective import Columns
from lora_capacity.search.play import play
from lora_capacity.search.problem import Problem

LOADS = np.linspace(0.5, 1.6, 23)
PLAYED = np.array([0.6, 0.8, 1.0, 1.2, 1.5])
"""Times the load asked for, of the steady twin's line and of the event twin's points."""

QUANTILES = {"ttft_p50_s": 0.5, "ttft_p95_s": 0.95, "ttft_p99_s": 0.99}
"""Columns of quantiles of the time to first token, and the shares of the requests that have theirs by then."""

_TRIED, _SHORTEST_S = 32, 5e-3
"""Bounds on the time to first token at which the steady twin tells its distribution, and the least of them."""

_SURE = 1e-6
"""Shares closer to 0 or 1 than this are as good as these."""


@dataclass(frozen=True)
class LoadCurve:
    """Predictions of one server against the load. Quantiles are of what clients see.

    Attributes:
        load: Times the load asked for, ``[points]``.
        values: By the steady twin, columns of `judged_columns`, those of `QUANTILES`, NaN where fewer requests get a
            first token, ``requests_per_s``, ``wait_s``, the mean wait for admission, and ``slot_wait_s``, that for a
            slot; each ``[points]``.
        verdict: Labels of `judge`, ``[points]``.
        played: The same columns but the last, and quantiles of other latencies, by the event twin, ``[loads, seeds]``;
            None if the answer was not played.
        played_load: Times the load asked for, ``[loads]``.
        arrived: Requests of each adapter, in the workload's order, at the load asked for over all seeds,
            ``[adapters]``; None if not played, as the next.
        completed: Those completed.
        longest_wait_s: Longest that one of them has waited for its admission.
    """

    load: Float[np.ndarray, " points"]
    values: Columns
    verdict: NDArray[Any]
    played_load: Float[np.ndarray, " loads"]
    played: Columns | None = None
    arrived: NDArray[Any] | None = None
    completed: NDArray[Any] | None = None
    longest_wait_s: NDArray[Any] | None = None

    @classmethod
    def of(cls, problem: Problem, found: Recommendation) -> Self:
        """Predict the recommended server in one batch, and play it if the answer was played."""
        best = found.best
        server = build_scenarios(
            problem.workload, problem.calibration, [best.max_cpu_loras], best.max_loras, **problem.settings
        )
        values = _steady(problem, server)
        verdict = problem.judge({**values, "starving_probability": np.zeros(LOADS.size)})
        curve = cls(LOADS, values, verdict, PLAYED)
        return curve if found.played is None else dataclasses.replace(curve, **_played(problem, found))

    @property
    def asked(self) -> Columns:
        """What the steady twin says at the load asked for, each one number."""
        at = int(np.argmin(np.abs(self.load - 1.0)))
        return {name: column[at] for name, column in self.values.items()}

    @property
    def asked_played(self) -> Columns | None:
        """What the event twin says of each seed at the load asked for, ``[seeds]``; None if it was not played."""
        at = int(np.argmin(np.abs(self.played_load - 1.0)))
        return None if self.played is None else {name: column[at] for name, column in self.played.items()}


def _steady(problem: Problem, server: Scenarios) -> dict[str, NDArray[Any]]:
    """Let the steady twin run a server under all loads: with the bounds asked for, then with bounds on the first token.

    The share that keeps a bound on the first token alone is the distribution of the time to it.
    """
    bounds_s = np.geomspace(_SHORTEST_S, float(problem.workload.horizon_s), _TRIED)
    each: Any = server.take(np.zeros(LOADS.size * (1 + _TRIED), np.int64))
    tried = np.tile(np.append(False, np.ones(_TRIED, bool)), LOADS.size)
    first_s = np.tile(np.append(np.nan, bounds_s), LOADS.size)

    def bounded(asked: Any, otherwise: ArrayLike) -> Any:
        return np.where(tried, otherwise, asked).astype(asked.dtype)

    bounds = dataclasses.replace(
        each.bounds,
        ttft_s=bounded(each.bounds.ttft_s, first_s),
        tpot_s=bounded(each.bounds.tpot_s, np.inf),
        e2el_s=bounded(each.bounds.e2el_s, np.inf),
    )
    results: Any = run_at(problem, dataclasses.replace(each, bounds=bounds), np.repeat(LOADS, 1 + _TRIED))
    columns = _with_waits(judged_columns(results.scenarios, results), results.scenarios)
    columns["slot_wait_s"] = np.asarray(results.slot_wait_s)
    grid = {name: column.reshape(LOADS.size, 1 + _TRIED) for name, column in columns.items()}
    within = grid["attainment"][:, 1:]
    quantiles = {name: _quantile_s(within, bounds_s, share) for name, share in QUANTILES.items()}
    return {name: column[:, 0] for name, column in grid.items()} | quantiles


def _with_waits(columns: dict[str, NDArray[Any]], scenarios: Scenarios) -> dict[str, NDArray[Any]]:
    """Add the requests that arrive, and their mean wait by Little's law."""
    arriving = np.asarray(scenarios.requests_per_s, np.float64).reshape(columns["mean_waiting"].shape)
    return columns | {"requests_per_s": arriving, "wait_s": columns["mean_waiting"] / arriving}


def _quantile_s(
    within: Float[np.ndarray, "loads bounds"], bounds_s: Float[np.ndarray, " bounds"], share: float
) -> Float[np.ndarray, " loads"]:
    """Return the time within which a share of the requests gets the first token, NaN where fewer do.

    Between the bounds that were tried the logarithm is linear in the share's normal deviate.
    """
    deviates = ndtri(np.clip(np.maximum.accumulate(within, axis=1), _SURE, 1.0 - _SURE))
    log_s = np.array([np.interp(ndtri(share), row, np.log(bounds_s)) for row in deviates])
    return np.where(within[:, -1] >= share, np.exp(log_s), np.nan)


def _played(problem: Problem, found: Recommendation) -> dict[str, Any]:
    """Let the event twin run the server with the answer's seeds, and count by adapter at the load asked for."""
    best, seeds = found.best, () if found.played is None else found.played.seeds
    point = best.max_cpu_loras, best.max_loras, best.max_num_batched_tokens, best.max_num_seqs
    columns, results = play(problem, [point], PLAYED[np.newaxis], seeds)
    told = {name: column[0] for name, column in columns.items()}
    scenarios: Any = results.scenarios
    lead_s = told["client_ttft_s"] - told["answered_ttft_s"]
    later = (*QUANTILES, *(name.replace("ttft", "e2e") for name in QUANTILES))
    told = _with_waits(told, scenarios) | {name: told[name] + lead_s for name in later}
    rates, ranks = problem.workload.adapters.deal(best.max_cpu_loras)
    by_class = np.lexsort((ranks, rates))  # the order in which the event twin counts adapters
    asked = np.flatnonzero(np.repeat(PLAYED, len(seeds)) == 1.0)
    counted: Any = results.events

    def by_adapter(column: Any, total: Any) -> NDArray[Any]:
        values = np.empty(rates.size)
        values[by_class] = total(np.asarray(column)[asked, : rates.size], axis=0)
        return values

    return {
        "played": told,
        "arrived": by_adapter(counted.adapter_arrived, np.sum),
        "completed": by_adapter(counted.adapter_completed, np.sum),
        "longest_wait_s": by_adapter(counted.adapter_worst_wait_s, np.max),
    }
