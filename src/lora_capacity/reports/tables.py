"""What the figures show, as tables."""

from typing import TYPE_CHECKING

import numpy as np

from lora_capacity.reports.bars import points
from lora_capacity.reports.markup import Markup, table
from lora_capacity.reports.plan_grid import Curve, Landscape
from lora_capacity.reports.sensitivity import Change
from lora_capacity.search import Candidate, Recommendation
from lora_capacity.units import MS_PER_S
from lora_capacity.words import duration, percent, shown, spoken

if TYPE_CHECKING:
    from lora_capacity.reports.report import ClassService

_MOST = 12


def map_table(land: Landscape) -> Markup:
    """Return throughput over a part of the grid, with a word for each that does not simply keep up."""
    column, row = land.best
    columns, rows = _thinned(land.adapters.size, column), _thinned(land.slots.size, row)

    def told(r: int, c: int) -> str:
        verdict = land.verdict[r, c]
        if verdict in ("impossible", "no_kv_cache", "oom"):
            return "–" if verdict == "impossible" else spoken(verdict)
        value = shown(float(land.values["throughput_tokens_per_s"][r, c]))
        return value if verdict == "acceptable" else f"{value} {spoken(verdict)}"

    body = [
        {"slots": shown(int(land.slots[r]))} | {f"{land.adapters[c]} adapters": told(r, c) for c in columns}
        for r in reversed(rows)
    ]
    return table("Throughput in tokens/s by slots (down) and adapters (across), a part of the map", body)


def curve_table(curve: Curve) -> Markup:
    """Return some points of the curves with their intervals."""
    rows = []
    for i in _thinned(curve.adapters.size, 0):
        rows.append(
            {"adapters": shown(int(curve.adapters[i]))}
            | {
                name: f"{shown(scale * float(curve.values[key][i]))} "
                f"({shown(scale * float(curve.low[key][i]))} to {shown(scale * float(curve.high[key][i]))})"
                for name, key, scale in (
                    ("throughput, tokens/s", "throughput_tokens_per_s", 1.0),
                    ("inter-token latency, ms", "itl_s", MS_PER_S),
                    ("time to first token, s", "ttft_s", 1.0),
                )
            }
            | {"chance of starving": percent(float(curve.values["starving_probability"][i]))}
        )
    return table("Predictions by number of adapters, with 90 % intervals", rows)


def class_table(classes: "tuple[ClassService, ...]") -> Markup:
    """Return the service of adapters of each rate and rank."""
    return table(
        "Share of requests served by rate and rank",
        [
            {
                "requests/s each": shown(each.rate_per_s),
                "rank": f"{each.rank:.0f}",
                "adapters": shown(each.adapters),
                "at this load": percent(each.service),
                "where it starves": percent(each.service_beyond),
            }
            for each in classes
        ],
    )


def change_table(changes: tuple[Change, ...]) -> Markup:
    """Return what each change does."""
    return table(
        "Differences from the recommendation",
        [
            {
                "change": each.words,
                "margin, points": points(each.margin) if np.isfinite(each.margin) else "does not start",
                "tokens/s": _signed(each.throughput_tokens_per_s),
                "inter-token ms": _signed(each.itl_s * MS_PER_S),
                "first token s": _signed(each.ttft_s),
            }
            for each in changes
        ],
    )


def runner_up_table(found: Recommendation) -> Markup:
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

    rows = [row("recommended", found.best)]
    rows += [row(f"runner-up {i}", each) for i, each in enumerate(found.runners_up, start=1)]
    return table("The recommendation and its runners-up", rows)


def _signed(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    return "0" if abs(value) < 5e-4 else f"{'+' if value > 0 else '−'}{shown(abs(value))}"


def _thinned(size: int, kept: int) -> list[int]:
    """Return indices at equal distances, at most so many, the kept one among them."""
    step = max(1, -(-size // _MOST))
    return list(range(kept % step, size, step))
