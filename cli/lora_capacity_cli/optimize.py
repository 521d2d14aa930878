"""``lora-capacity optimize``: the best numbers of adapters and slots."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.units import MS_PER_S
from lora_capacity.words import bottleneck, plural
from lora_capacity_cli.files import check_output
from lora_capacity_cli.grouping import command
from lora_capacity_cli.heat import print_map
from lora_capacity_cli.options import FILE, emit_option, examples, format_option, refuse_given
from lora_capacity_cli.output import (
    duration,
    gibibytes,
    percent,
    print_command,
    print_facts,
    print_json,
    print_table,
    print_warnings,
    say,
    shown,
    spoken,
)
from lora_capacity_cli.report import SUFFIXES, write_report
from lora_capacity_cli.search import recommend, search_options

if TYPE_CHECKING:
    from lora_capacity.reports import PlanGrid
    from lora_capacity.search import Candidate, Recommendation


_SHOWN = 3
"""Most runners-up that are told."""

_CHANGES = {"one more adapter": "+1 adapter", "one more slot": "+1 slot", "one slot fewer": "−1 slot"}
"""Neighbours of the recommendation, as the table calls them."""


@command(
    epilog=examples(
        "lora-capacity optimize examples/few_busy.yaml",
        "lora-capacity optimize workload.yaml --model Qwen3-8B --gpu L40S",
        "lora-capacity optimize workload.yaml --goodput ttft:1000 --goodput tpot:60",
        "lora-capacity optimize workload.yaml --objective fewest-slots",
    )
)
@search_options
@click.option("--report", "page", type=FILE, metavar="FILE.html", help="Also write a report page; see `report`.")
@emit_option
@format_option
def optimize(question: dict[str, Any], page: Path | None, emit: str | None, output_format: str) -> None:
    """Recommend how many adapters to serve, how many slots to reserve and which batch limits to set.

    The answer is the server with the highest goodput among those that keep up. The steady twin searches; the event twin
    simulates the best candidates and rejects those that do not hold.

    WORKLOAD is a YAML or JSON file, or a table of recorded requests (CSV, JSONL, Parquet, .gz). A GRID is 8, 8,16,32 or
    8:384:8 (start:stop:step).
    """
    if emit is not None:
        refuse_given(("output_format",), "--emit", "it is for the recommendation itself")
    if page is not None:
        check_output("--report", page, SUFFIXES)
    workload, calibration, found = recommend(question)
    if page is not None:
        write_report("--report", page, question, workload, calibration, found)
    if emit is not None:
        from lora_capacity.engines import emitted

        say(emitted(found.server, found.served_as, emit))
    elif output_format == "json":
        print_json(found.to_dict())
    else:
        from lora_capacity.reports import survey

        _print_recommendation(found, survey(workload, calibration, found, settings=question["settings"]))


def _print_recommendation(found: "Recommendation", grid: "PlanGrid") -> None:
    best, goodput = found.told, found.goodput
    bounds = ", ".join(f"{key.upper()} {duration(bound_ms / MS_PER_S)}" for key, bound_ms in goodput.to_ms().items())
    at = f"at {shown(best.critical_load)}× this load"
    fails = "starves" if found.objective.goal == "throughput" else "saturates"
    holds = f"{fails} {at}" if best.limit_beyond else f"holds up to {shown(best.critical_load)}× this load"
    then = "" if best.limit_beyond in ("", "none") else f"; {bottleneck(best.limit_beyond)} {at}"
    twin = "steady twin; not checked by the event twin"
    if found.played is not None:
        twin = f"event twin, mean of {plural(len(found.played.seeds), 'seed')}"
    memory = found.memory
    print_facts(
        f"Serve {plural(best.max_cpu_loras, 'adapter')} with {plural(best.max_loras, 'slot')}: {found.model}",
        {
            "goodput": f"{shown(best.goodput_per_s)} requests/s; {percent(best.attainment)} within {bounds} "
            f"({percent(goodput.attainment)} asked)",
            "headroom": f"{holds}; P(overload) {percent(best.starving_probability)}, {percent(found.risk)} allowed",
            "bottleneck": f"{spoken(best.limit)} now{then}",
            "throughput": f"{shown(best.throughput_tokens_per_s)} of {shown(best.offered_tokens_per_s)} tokens/s "
            "offered (input + output)",
            "TTFT, ITL": f"{duration(best.ttft_s)}, {duration(best.itl_s)} (means)",
            "requests": f"{shown(best.mean_running)} running, {shown(best.mean_waiting)} waiting (means)",
            "KV cache": f"{percent(best.kv_usage)} of {best.kv_cache_tokens:,} tokens in use",
            "GPU memory": f"{gibibytes(memory.spare_bytes)} free",
            "batch limits": f"max_num_seqs {best.max_num_seqs:,}, "
            f"max_num_batched_tokens {best.max_num_batched_tokens:,}",
            "calibration": found.calibration,
            "predicted by": twin,
        },
    )
    if found.over_time is not None:
        say(f"{found.over_time.words}\n", wrap=True)
    print_map(grid)
    changes = [(_CHANGES[each.change], each.candidate, each.verdict) for each in found.neighbours]
    others = [("next best", each, "acceptable") for each in found.runners_up[:_SHOWN]]
    print_table("Alternatives, by the steady twin", [_row(*each) for each in (*changes, *others)])
    print_warnings(found.warnings)
    print_command(found.serve_command)


def _row(name: str, candidate: "Candidate", verdict: str) -> dict[str, Any]:
    return {
        "": name,
        "A": candidate.max_cpu_loras,
        "S": candidate.max_loras,
        "rank": candidate.max_lora_rank,
        "seqs": candidate.max_num_seqs,
        "budget": candidate.max_num_batched_tokens,
        "goodput /s": candidate.goodput_per_s,
        "risk %": candidate.starving_probability * 100.0,
        "verdict": spoken(verdict),
    }
