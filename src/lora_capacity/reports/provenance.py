"""What a report rests on: the workload, the calibration with its errors, and what is assumed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_capacity.reports.markup import Markup, facts, node, table, tabled
from lora_capacity.words import percent, shown
from lora_capacity.workload import LengthDistribution, Workload
from lora_capacity.workload.adapters import AdapterMix

if TYPE_CHECKING:
    from lora_capacity.reports.report import Report

_ASSUMPTIONS = (
    "Rates and lengths do not change over the time looked at; bursts come through the arrival process alone.",
    "One GPU and one base model; no prefix cache, no speculative decoding, no other load on the machine.",
    "Every adapter is kept in host memory once it has been loaded; each is read from disk once.",
    "Adapters have no priority: requests are tried in the order of arrival, those without a slot passed over.",
    "Means over the time looked at, which begins with an empty server.",
)


def rests_on(report: "Report") -> Markup:
    """Return the section on workload, calibration and assumptions."""
    return node(
        "section",
        node("h2", "What this rests on"),
        node("div", _workload(report.workload), _calibration(report), class_="pairs"),
        node("h3", "Assumed", style="margin-top:28px"),
        node("ul", *(node("li", each) for each in _ASSUMPTIONS)),
        tabled("Coefficients of the calibration", _coefficients(report)),
    )


def _workload(workload: Workload) -> Markup:
    adapters = workload.adapters
    if isinstance(adapters, AdapterMix):
        rates = ", ".join(shown(float(rate)) for rate in adapters.rates_per_s)
        who = f"a mix of rates {rates} per s and ranks {', '.join(map(str, adapters.ranks.tolist()))}, dealt in turn"
    else:
        who = f"a list of {adapters.max_count:,}, in its order"
    pending = "unbounded" if workload.max_pending is None else f"at most {workload.max_pending:,}"
    told = {
        "adapters": who,
        "base model": f"{shown(workload.base_rate_per_s)} requests/s",
        "prompts": _lengths(workload.input_tokens),
        "answers": _lengths(workload.output_tokens),
        "arrivals": f"{workload.arrivals.process}, gaps vary by {shown(workload.arrival_cv)}",
        "time looked at": f"{shown(workload.horizon_s)} s",
        "unanswered requests": pending,
    }
    return facts("Workload", told)


def _lengths(lengths: LengthDistribution) -> str:
    return f"{shown(lengths.mean)} ± {shown(lengths.std)} tokens, {lengths.min:,} to {lengths.max:,}"


def _calibration(report: "Report") -> Markup:
    known = report.calibration
    source = {str(name).replace("_", " "): _told(value) for name, value in known.provenance.items()}
    ranges = "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in known.fitted_ranges.items())
    held = known.accuracy.get("held_back_by_scenario", {})
    errors = {
        "throughput, held back": _smape(held, "throughput_smape"),
        "inter-token latency, held back": _smape(held, "itl_smape"),
    }
    told = {
        "name": known.name,
        "model": known.model.name,
        "GPU": known.gpu.name,
        "vLLM": known.vllm_version,
        "fitted over": ranges or "–",
        "error of the capacity": f"{percent(known.capacity_error)} (standard deviation)",
        **{name: value for name, value in errors.items() if value},
        **source,
    }
    return facts("Calibration", told)


def _smape(held: Mapping[str, Any], key: str) -> str:
    return f"{shown(float(held[key]))} % SMAPE over {held['runs']} runs" if key in held and "runs" in held else ""


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(each)}" for name, each in value.items())
    return str(value)


def _coefficients(report: "Report") -> Markup:
    content = report.calibration.to_json()["coefficients"]
    rows = [
        {"coefficient": f"{section}.{name}", "value": f"{entry['value']:.4g}", "unit": entry["unit"]}
        for section, entries in content.items()
        for name, entry in entries.items()
    ]
    return table("Costs of steps and loads", rows)
