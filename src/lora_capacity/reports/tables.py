"""What the figures show as tables, and what they rest on: captions and rows of texts by column heading."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.reports.bars import points
from lora_capacity.reports.data import ClassService
from lora_capacity.reports.plan_grid import Curve, PlanGrid
from lora_capacity.reports.sensitivity import Change
from lora_capacity.search import Candidate, Recommendation
from lora_capacity.units import MS_PER_S
from lora_capacity.words import REFUSALS, duration, percent, shown, spoken
from lora_capacity.workload import LengthDistribution, Workload
from lora_capacity.workload.adapters import AdapterMix

Table = tuple[str, list[dict[str, str]]]

_MOST = 12
"""Rows and columns of a table that is read on a page without scrolling."""


def map_table(grid: PlanGrid) -> Table:
    """Return throughput over a part of the grid, with a word for each that does not simply keep up."""
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

    return "Throughput in tokens/s by slots (down) and adapters (across), a part of the map", [
        {"slots": shown(int(grid.slots[r]))} | {f"{grid.adapters[c]} adapters": told(r, c) for c in columns}
        for r in reversed(rows)
    ]


def curve_table(curve: Curve) -> Table:
    """Return some points of the curves with their intervals."""
    quantities = {
        "throughput, tokens/s": ("throughput_tokens_per_s", 1.0),
        "inter-token latency, ms": ("itl_s", MS_PER_S),
        "time to first token, s": ("ttft_s", 1.0),
    }

    def told(i: int, key: str, scale: float) -> str:
        value, low, high = (shown(scale * float(each[key][i])) for each in (curve.values, curve.low, curve.high))
        return f"{value} ({low} to {high})"

    return "Predictions by number of adapters, with 90 % intervals", [
        {
            "adapters": shown(int(curve.adapters[i])),
            **{name: told(i, *quantity) for name, quantity in quantities.items()},
            "chance of starving": percent(float(curve.values["starving_probability"][i])),
        }
        for i in _thinned(curve.adapters.size, 0)
    ]


def class_table(classes: tuple[ClassService, ...]) -> Table:
    """Return the service of adapters of each rate and rank."""
    return "Share of requests served by rate and rank", [
        {
            "requests/s each": shown(each.rate_per_s),
            "rank": f"{each.rank:.0f}",
            "adapters": shown(each.adapters),
            "at this load": percent(each.service),
            "where it starves": percent(each.service_beyond),
        }
        for each in classes
    ]


def change_table(changes: tuple[Change, ...]) -> Table:
    """Return what each change does."""
    return "Differences from the recommendation", [
        {
            "change": each.words,
            "margin, points": points(each.margin) if np.isfinite(each.margin) else "does not start",
            "tokens/s": _signed(each.throughput_tokens_per_s),
            "inter-token ms": _signed(each.itl_s * MS_PER_S),
            "first token s": _signed(each.ttft_s),
        }
        for each in changes
    ]


def runner_up_table(found: Recommendation) -> Table:
    """Return the recommendation and what comes next."""

    def row(name: str, each: Candidate) -> dict[str, str]:
        return {
            "choice": name,
            "adapters": shown(each.max_cpu_loras),
            "slots": shown(each.max_loras),
            "rank": shown(each.max_lora_rank),
            "tokens/s": shown(each.throughput_tokens_per_s),
            "inter-token": duration(each.itl_s),
            "first token": duration(each.ttft_s),
            "KV cache": percent(each.kv_usage),
            "starves with": percent(each.starving_probability),
        }

    others = [row(f"runner-up {i}", each) for i, each in enumerate(found.runners_up, start=1)]
    return "The recommendation and its runners-up", [row("recommended", found.best), *others]


def coefficient_table(calibration: Calibration) -> Table:
    """Return the coefficients of the costs."""
    return "Costs of steps and loads", [
        {"coefficient": f"{section}.{name}", "value": f"{entry['value']:.4g}", "unit": entry["unit"]}
        for section, entries in calibration.to_json()["coefficients"].items()
        for name, entry in entries.items()
    ]


def workload_facts(workload: Workload) -> dict[str, str]:
    """Return what was asked for."""
    adapters = workload.adapters
    if isinstance(adapters, AdapterMix):
        rates = ", ".join(shown(float(rate)) for rate in adapters.rates_per_s)
        who = f"a mix of rates {rates} per s and ranks {', '.join(map(str, adapters.ranks.tolist()))}, round-robin"
    else:
        who = f"a list of {adapters.max_count:,}, in its order"
    return {
        "adapters": who,
        "base model": f"{shown(workload.base_rate_per_s)} requests/s",
        "prompts": _lengths(workload.input_tokens),
        "outputs": _lengths(workload.output_tokens),
        "arrivals": f"{workload.arrivals.process}, gaps vary by {shown(workload.arrival_cv)}",
        "time looked at": f"{shown(workload.horizon_s)} s",
        "in-flight requests": "unbounded" if workload.max_pending is None else f"at most {workload.max_pending:,}",
    }


def calibration_facts(known: Calibration) -> dict[str, str]:
    """Return where the calibration is from and how good it is."""
    ranges = "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in known.fitted_ranges.items())
    errors = known.accuracy.get("held_back_by_scenario", {})
    scored = {"throughput, held out": "throughput_smape", "inter-token latency, held out": "itl_smape"}
    return {
        "name": known.name,
        "model": known.model.name,
        "GPU": known.gpu.name,
        "vLLM": known.vllm_version,
        "fitted over": ranges or spoken(""),
        "error of the capacity": f"{percent(known.capacity_error)} (standard deviation)",
        **{
            name: f"{shown(float(errors[key]))} % SMAPE over {errors['runs']} runs"
            for name, key in scored.items()
            if key in errors and "runs" in errors
        },
        **{spoken(name): _told(value) for name, value in known.provenance.items()},
    }


def _lengths(lengths: LengthDistribution) -> str:
    return f"{shown(lengths.mean)} ± {shown(lengths.std)} tokens, {lengths.min:,} to {lengths.max:,}"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(each)}" for name, each in value.items())
    return str(value)


def _signed(value: float) -> str:
    if not np.isfinite(value):
        return spoken("")
    return "0" if abs(value) < 5e-4 else f"{'+' if value > 0 else '−'}{shown(abs(value))}"


def _thinned(size: int, kept: int) -> list[int]:
    """Return indices at equal distances, about `_MOST` of them, the kept one among them."""
    step = max(1, -(-size // _MOST))
    return list(range(kept % step, size, step))
