"""What figures show as tables, and what they rest on, in words; the page itself has the tables of plain numbers."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.reports.load_curve import LoadCurve
from lora_capacity.reports.plan_grid import Curve, PlanGrid
from lora_capacity.reports.quantities import (
    ATTAINMENT,
    GOODPUT,
    ITL,
    SLOT_WAIT,
    THROUGHPUT,
    TTFT,
    TTFT_HALF,
    TTFT_TAIL,
    WAIT,
)
from lora_capacity.search import Recommendation
from lora_capacity.search.objective import KEPT_UP
from lora_capacity.words import REFUSALS, duration, percent, shown, spoken
from lora_capacity.workload import Goodput, LengthDistribution, Workload
from lora_capacity.workload.adapters import AdapterMix

_MOST = 12
"""Rows and columns of a table that is read on a page without scrolling."""

LOAD_COLUMNS = (GOODPUT, ATTAINMENT, TTFT_HALF, TTFT_TAIL, ITL, WAIT, SLOT_WAIT)
"""Columns of the table of the load curve."""


def map_table(grid: PlanGrid) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of throughput over a part of the grid; a word for each that does not simply keep up."""
    column, row = grid.best
    columns, rows = _thinned(grid.adapters.size, column), _thinned(grid.slots.size, row)

    def told(r: int, c: int) -> str:
        verdict = grid.verdict[r, c]
        if verdict == "impossible":
            return spoken("")
        if verdict in REFUSALS:
            return spoken(verdict)
        value = shown(float(grid.values["throughput_tokens_per_s"][r, c]))
        return value if verdict == "acceptable" else f"{value} {spoken(verdict)}"

    names = ["slots", *(f"{grid.adapters[c]} adapters" for c in columns)]
    return names, [[shown(int(grid.slots[r])), *(told(r, c) for c in columns)] for r in reversed(rows)]


def curve_rows(curve: Curve) -> list[list[str]]:
    """Return some points of the curves: adapters, three quantities with their intervals, the chance of failing."""

    def told(i: int, key: str, scale: float) -> str:
        value, low, high = (shown(scale * float(each[key][i])) for each in (curve.values, curve.low, curve.high))
        return f"{value} ({low} to {high})"

    return [
        [
            shown(int(curve.adapters[i])),
            *(told(i, each.key, each.scale) for each in (THROUGHPUT, ITL, TTFT)),
            percent(float(curve.values["starving_probability"][i])),
        ]
        for i in _thinned(curve.adapters.size, 0)
    ]


def load_rows(curve: LoadCurve) -> list[list[str]]:
    """Return points of the load curve by the steady twin, and with the event twin's means where it played that load."""
    found = []
    for i, load in enumerate(curve.load.tolist()):
        played = np.flatnonzero(np.isclose(curve.played_load, load)).tolist() if curve.played is not None else []
        if not played and i % 2:
            continue
        row = [f"{load:.2f}"]
        for each in LOAD_COLUMNS:
            told = each.tell(float(curve.values[each.key][i]))
            if curve.played is not None and played and each.key in curve.played:
                told += f" (played: {each.tell(float(np.mean(curve.played[each.key][played])))})"
            row.append(told)
        found.append(row)
    return found


def check_rows(curve: LoadCurve, found: Recommendation) -> list[list[str]]:
    """Return what each seed of the event twin says at the load asked for, then the steady twin, then what is asked."""
    latencies = [f"{name}_p95_s" for name in ("ttft", "tpot", "e2e")]
    rows, played, steady = [], curve.asked_played, curve.asked
    if found.played is not None and played is not None:
        for i, seed in enumerate(found.played.seeds):
            shares = [percent(float(played[name][i])) for name in ("attainment", "served")]
            rows.append([f"seed {seed}", *shares, *(duration(float(played[name][i])) for name in latencies)])
    shares = [percent(float(steady[name])) for name in ("attainment", "served")]
    rows.append(["steady twin", *shares, duration(float(steady["ttft_p95_s"])), spoken(""), spoken("")])
    if found.objective.goal != "throughput":
        asked = found.goodput
        bounds = (f"≤ {duration(each)}" if math.isfinite(each) else spoken("") for each in _bounds_s(asked))
        rows.append(["asked", f"≥ {percent(asked.attainment)}", f"≥ {percent(KEPT_UP)}", *bounds])
    return rows


def quantile_rows(curve: LoadCurve, found: Recommendation) -> list[list[str]]:
    """Return quantiles of latencies at the load asked for, and their bounds: means over seeds of the event twin.

    Of an answer that was not played only the time to first token is known.
    """
    told = curve.asked if curve.asked_played is None else curve.asked_played
    names = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end to end"}
    return [
        [
            words,
            *(duration(float(np.mean(told[f"{name}_{quantile}_s"]))) for quantile in ("p50", "p95", "p99")),
            duration(bound_s) if math.isfinite(bound_s) else spoken(""),
        ]
        for (name, words), bound_s in zip(names.items(), _bounds_s(found.goodput), strict=True)
        if f"{name}_p50_s" in told
    ]


def _bounds_s(asked: Goodput) -> tuple[float, float, float]:
    return asked.ttft_s, asked.tpot_s, asked.e2el_s


def adapter_words(workload: Workload) -> str:
    """Return which adapters were asked for."""
    adapters = workload.adapters
    if not isinstance(adapters, AdapterMix):
        return f"a list of {adapters.max_count:,}, in its order"
    rates = ", ".join(shown(float(rate)) for rate in adapters.rates_per_s)
    return f"a mix of rates {rates} per s and ranks {', '.join(map(str, adapters.ranks.tolist()))}, round-robin"


def error_words(known: Calibration) -> dict[str, str]:
    """Return how far off the calibration was on runs that it was not fitted to, as far as it tells."""
    errors = known.accuracy.get("held_back_by_scenario", {})
    scored = {"throughput, held out": "throughput_smape", "inter-token latency, held out": "itl_smape"}
    return {
        name: f"{shown(float(errors[key]))} % SMAPE over {errors['runs']} runs"
        for name, key in scored.items()
        if key in errors and "runs" in errors
    }


def length_words(lengths: LengthDistribution) -> str:
    """Return mean, standard deviation and range of lengths."""
    return f"{shown(lengths.mean)} ± {shown(lengths.std)} tokens, {lengths.min:,} to {lengths.max:,}"


def provenance_words(value: Any) -> str:
    """Return a value of a calibration's provenance."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {provenance_words(each)}" for name, each in value.items())
    return str(value)


def signed(value: float) -> str:
    """Return a difference with its sign, a dash for none."""
    if not math.isfinite(value):
        return spoken("")
    return "0" if abs(value) < 5e-4 else f"{'+' if value > 0 else '−'}{shown(abs(value))}"


def _thinned(size: int, kept: int) -> list[int]:
    """Return indices at equal distances, about `_MOST` of them, the kept one among them."""
    step = max(1, -(-size // _MOST))
    return list(range(kept % step, size, step))
