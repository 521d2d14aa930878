"""How close predictions come to measured runs: every measure defined once."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray

from lora_capacity.errors import check_type
from lora_capacity.measurements.runs import Runs
from lora_capacity.measurements.scores import is_starved, mape, smape
from lora_capacity.search import Needed, Objective, choose
from lora_capacity.status import Status
from lora_capacity.validation.predict import Predictions

OPTIMUM_SET = "optimum"
"""Name of the ``set`` whose runs are grids made to read the best configuration off.

Source: the published tables of arXiv 2508.08343."""

_Rows = NDArray[np.bool_]


def score_runs(runs: Runs, predictions: Predictions, engine: str = "steady") -> dict[str, Any]:
    """Compare predictions with what was measured.

    Errors, in percent, are over the runs that started and were predicted to; latencies are those that clients see.
    ``ttft_smape_keeping_up`` is over those of them that did not starve: in the others a time to first token tells how
    long the run was. ``starved`` counts those too (positive: starved). ``startup`` is over all runs.

    ``optima`` is per workload whose runs form a grid: those of the set ``optimum`` if there is any, else all with two
    slot counts and two numbers of adapters or more. Its ``regret`` is the share of the best measured throughput that
    the twin's choice gave up; a choice that did not start counts as starved with a throughput of 0. Without a choice,
    or without a measured optimum, the entries are None.

    Args:
        runs: The runs.
        predictions: Predictions of these runs.
        engine: Name of the twin, which is passed on.

    Returns:
        A JSON document: ``engine``, ``groups``, ``models``, ``starved``, ``startup``, ``optima``; NaN where there is
        nothing to average.
    """
    check_type("runs", runs, Runs, "a table as read_runs returns it")
    check_type("predictions", predictions, Predictions, "what predict_runs returns of these runs")
    check_type("engine", engine, str, "a name")
    compared = runs.started & predictions.starts & ~np.isnan(predictions.throughput_tokens_per_s)
    told = np.where(predictions.starts, Status.OK.label, predictions.status)
    agree = int(np.count_nonzero(told == np.array([Status(code).label for code in runs.status])))
    return {
        "engine": engine,
        "groups": [
            key | _errors(runs, predictions, rows & compared) for key, rows in _groups(runs, "model", "set", "scenario")
        ],
        "models": [key | _errors(runs, predictions, rows & compared) for key, rows in _groups(runs, "model")],
        "starved": _confusion(runs, predictions, compared),
        "startup": {"agree": agree, "disagree": len(runs) - agree},
        "optima": [
            key | _optimum(runs, predictions, np.flatnonzero(rows))
            for key, rows in _groups(runs, "model", "scenario", where=_in_grid(runs))
        ],
    }


def _groups(runs: Runs, *keys: str, where: _Rows | None = None) -> Iterator[tuple[dict[str, str], _Rows]]:
    """Yield the distinct values of some columns, in order of appearance, and the rows that have them."""
    columns = [getattr(runs, key) for key in keys]
    chosen = np.ones(len(runs), dtype=bool) if where is None else where
    for values in dict.fromkeys(zip(*(column[chosen].tolist() for column in columns), strict=True)):
        rows = chosen & np.logical_and.reduce([column == value for column, value in zip(columns, values, strict=True)])
        yield dict(zip(keys, values, strict=True)), rows


def _errors(runs: Runs, predictions: Predictions, rows: Bool[np.ndarray, " runs"]) -> dict[str, Any]:
    keep_up = rows & ~is_starved(runs.throughput_tokens_per_s, predictions.offered_tokens_per_s)

    def error(measure: Callable[[ArrayLike, ArrayLike], float], name: str, which: _Rows = rows) -> float:
        return measure(getattr(predictions, name)[which], getattr(runs, name)[which])

    return {
        "runs": int(np.count_nonzero(rows)),
        "throughput_smape": error(smape, "throughput_tokens_per_s"),
        "throughput_mape": error(mape, "throughput_tokens_per_s"),
        "itl_smape": error(smape, "itl_s"),
        "ttft_smape": error(smape, "ttft_s"),
        "ttft_smape_keeping_up": error(smape, "ttft_s", keep_up),
        "tpot_smape": error(smape, "tpot_s"),
    }


def _confusion(runs: Runs, predictions: Predictions, rows: Bool[np.ndarray, " runs"]) -> dict[str, int]:
    offered = predictions.offered_tokens_per_s[rows]
    told = is_starved(predictions.throughput_tokens_per_s[rows], offered)
    measured = is_starved(runs.throughput_tokens_per_s[rows], offered)
    pairs = {"tp": told & measured, "fp": told & ~measured, "fn": ~told & measured, "tn": ~told & ~measured}
    return {name: int(np.count_nonzero(which)) for name, which in pairs.items()}


def _in_grid(runs: Runs) -> Bool[np.ndarray, " runs"]:
    """Whether a row belongs to a workload whose optimum is asked for."""
    if np.any(runs.set == OPTIMUM_SET):
        return np.asarray(runs.set == OPTIMUM_SET)
    wide = np.zeros(len(runs), dtype=bool)
    for _, rows in _groups(runs, "model", "scenario"):
        wide |= rows & (min(np.unique(axis[rows]).size for axis in (runs.max_loras, runs.max_cpu_loras)) >= 2)
    return wide


def _optimum(runs: Runs, predictions: Predictions, rows: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    """Return the best configuration that was measured, the one that the twin would take, and what that loses."""
    offered = predictions.offered_tokens_per_s
    starved = ~runs.started | is_starved(runs.throughput_tokens_per_s, offered)
    throughput = np.where(runs.started, runs.throughput_tokens_per_s, 0.0)
    best, chosen = _measured_optimum(runs, starved, throughput, rows), _chosen(runs, predictions, rows)
    return {
        "measured": _place(runs, best) | {"throughput": None if best is None else float(throughput[best])},
        "chosen": _place(runs, chosen)
        | {
            "measured_throughput": None if chosen is None else float(throughput[chosen]),
            "starved": None if chosen is None else bool(starved[chosen]),
        },
        "regret": None if best is None or chosen is None else float(1.0 - throughput[chosen] / throughput[best]),
    }


def _measured_optimum(
    runs: Runs,
    starved: Bool[np.ndarray, " runs"],
    throughput: Float[np.ndarray, " runs"],
    rows: Int[np.ndarray, " rows"],
) -> int | None:
    """Return the best run: of each slot count the last A before the first starved one, of those the highest throughput.

    Source: definition of arXiv 2508.08343.
    """
    last = []
    for slots in np.unique(runs.max_loras[rows]):
        upwards = rows[runs.max_loras[rows] == slots]
        upwards = upwards[np.argsort(runs.max_cpu_loras[upwards], kind="stable")]
        unstarved = int(np.argmax(np.append(starved[upwards], True)))
        last += upwards[:unstarved][-1:].tolist()
    return max(last, key=lambda row: throughput[row], default=None)


def _chosen(runs: Runs, predictions: Predictions, rows: Int[np.ndarray, " rows"]) -> int | None:
    """Return the run that the optimizer would take, from predictions alone."""
    columns = {field.name: getattr(predictions, field.name)[rows] for field in fields(predictions)}
    settings = ("max_cpu_loras", "max_loras", "max_num_seqs", "max_num_batched_tokens")
    columns |= {name: getattr(runs, name)[rows] for name in settings}
    found = choose(columns, Objective("throughput"), Needed())
    return None if found is None else int(rows[found])


def _place(runs: Runs, row: int | None) -> dict[str, int | None]:
    return {name: None if row is None else int(getattr(runs, name)[row]) for name in ("max_cpu_loras", "max_loras")}
