"""``lora-capacity cost``: what LoRA costs a server, step by step."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_capacity.units import MS_PER_S
from lora_capacity.words import FAILURES, plural
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import (
    CalibrationChoice,
    adapter_options,
    calibration_options,
    examples,
    format_option,
    recording_options,
    server_options,
    workload_argument,
)
from lora_capacity_cli.output import print_json, print_table, print_warnings, shown
from lora_capacity_cli.runtime import prepare, read_workload

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.workload import Workload

_COLUMNS = {
    "step_time_s": ("step ms", MS_PER_S),
    "itl_s": ("ITL ms", MS_PER_S),
    "ttft_s": ("TTFT ms", MS_PER_S),
    "throughput_tokens_per_s": ("tokens/s", 1.0),
    "saturates_at_tokens_per_s": ("saturates at", 1.0),
    "kv_cache_tokens": ("KV tokens", 1.0),
}
"""Heads of the table and factors by figure; the time per token of a request is that between tokens here."""

_NOTHING = 1e-4
"""Share of a figure below which a difference is rounding."""

_NO_BOUNDS: dict[str, Any] = {"goodput": (), "attainment": None}


@command(
    epilog=examples(
        "lora-capacity cost examples/few_busy.yaml --adapters 24 --max-loras 8",
        "lora-capacity cost examples/many_idle.yaml --model Qwen3-8B --gpu L40S",
    )
)
@workload_argument
@recording_options
@calibration_options
@adapter_options(recommended=True)
@server_options(grids=False)
@format_option
def cost(
    workload: Path,
    recording: dict[str, Any],
    calibration: CalibrationChoice,
    adapters: int | None,
    max_loras: int | None,
    tiers: dict[str, Any],
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Show what LoRA costs: base model, one adapter, idle slots, all adapters, one more of each.

    WORKLOAD is a YAML or JSON file. All servers get the same requests; each is compared with the server before it in
    the chain, which lacks one thing.
    """
    prepare()
    from lora_capacity.scenarios import extrapolations
    from lora_capacity.search.lora_cost import lora_cost

    asked = read_workload(workload, _NO_BOUNDS, recording)
    known = calibration.load()
    if adapters is None or max_loras is None:
        adapters, max_loras, settings = _recommended(asked, known, adapters, max_loras, settings)
    costs = lora_cost(asked, known, adapters, max_loras, **settings, **tiers)
    whole = next(each for each in costs if each.server == "adapters")
    room = {"max_loras": max_loras, "max_cpu_loras": tiers.get("max_cpu_loras", max(adapters, max_loras))}
    server = known.server(**settings | room | {"max_lora_rank": whole.max_lora_rank})
    document = {
        "calibration": known.name,
        "model": known.model.name,
        "adapters": adapters,
        **room,
        **{name: getattr(server, name) for name in ("max_lora_rank", "max_num_seqs", "max_num_batched_tokens")},
        "servers": [
            {
                "server": each.server,
                "adapters": each.adapters,
                "max_loras": each.max_loras,
                **each.figures,
                "compared_with": each.compared_with,
                "difference": dict(each.difference),
                "status": each.status,
            }
            for each in costs
        ],
        "warnings": [*asked.assumptions, *extrapolations(asked, known, server, adapters)],
    }
    if output_format == "json":
        print_json(document)
    else:
        _print(document)


def _recommended(
    workload: "Workload",
    calibration: "Calibration",
    adapters: int | None,
    max_loras: int | None,
    settings: dict[str, Any],
) -> tuple[int, int, dict[str, Any]]:
    """Return adapters, slots and settings with those that were not given as the steady twin recommends them."""
    from lora_capacity.search import recommend

    names = ("max_num_seqs", "max_num_batched_tokens")
    limits: dict[str, Any] = {name: [settings[name]] if name in settings else None for name in names}
    found = recommend(
        workload,
        calibration,
        adapters=None if adapters is None else [adapters],
        max_loras=None if max_loras is None else [max_loras],
        settings={name: value for name, value in settings.items() if name not in limits},
        engine="steady",
        **limits,
    )
    best = found.best
    return best.max_cpu_loras, best.max_loras, settings | {name: getattr(best, name) for name in limits}


def _print(document: dict[str, Any]) -> None:
    rows = []
    for each in document["servers"]:
        row = {"server": _spoken(each)}
        for name, (head, factor) in _COLUMNS.items():
            row[head] = _with_difference(each[name] * factor, each["difference"].get(name), factor)
        rows.append(row)
    print_table(f"Cost of LoRA, {document['model']} (in brackets: change from the server that lacks one thing)", rows)
    failed = [
        f"{_spoken(each)}: {FAILURES[each['status']]}" for each in document["servers"] if each["status"] in FAILURES
    ]
    print_warnings([*document["warnings"], *failed])


def _spoken(each: dict[str, Any]) -> str:
    adapters, slots = plural(each["adapters"], "adapter"), plural(each["max_loras"], "slot")
    return {
        "base_model": "base model, without LoRA",
        "idle_slots": f"{adapters}, {slots}",
        "next_adapter": f"one more adapter: {each['adapters']:,}",
        "next_slot": f"one more slot: {each['max_loras']:,}",
    }.get(each["server"], f"{adapters}, {slots}")


def _with_difference(value: float, difference: float | None, factor: float) -> str:
    if difference is None:
        return shown(value)
    more = 0.0 if abs(difference * factor) < _NOTHING * abs(value) else difference * factor
    return f"{shown(value)} ({'−' if more < 0 else '+'}{shown(abs(more))})"
