"""``lora-capacity optimize``: the best numbers of adapters and slots."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.units import MS_PER_S
from lora_capacity.words import plural
from lora_capacity_cli.files import check_output
from lora_capacity_cli.heat import print_map
from lora_capacity_cli.options import FILE, emit_option, examples, format_option, refuse_given
from lora_capacity_cli.output import (
    duration,
    gibibytes,
    percent,
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


@click.command(
    epilog=examples(
        "lora-capacity optimize examples/few_busy.yaml",
        "lora-capacity optimize examples/many_idle.yaml --goodput ttft:1000 --goodput tpot:60 --format json",
        "lora-capacity optimize examples/few_busy.yaml --objective fewest-slots --engine steady",
    )
)
@search_options
@click.option("--report", "page", type=FILE, metavar="FILE.html", help="Also write the report, see `report`.")
@emit_option
@format_option
def optimize(question: dict[str, Any], page: Path | None, emit: str | None, output_format: str) -> None:
    """Recommend how many adapters to serve, how many slots to reserve and which batch limits to set.

    Among servers that keep up within the bounds of --goodput, the one that answers the most requests. The steady twin
    proposes; the event twin plays what it proposes, and refuses what does not hold.

    WORKLOAD is a YAML or JSON file of adapters and traffic, or a table of recorded requests (CSV, JSONL, Parquet, .gz).
    A GRID is 8, 8,16,32 or 8:384:8 (start:stop:step).
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
    best = found.told
    bounds = ", ".join(f"{key} {shown(bound_ms)} ms" for key, bound_ms in found.goodput.to_ms().items())
    beyond = "only bursts of requests" if best.limit_beyond in ("", "none") else spoken(best.limit_beyond)
    fails = "starves at" if found.objective.goal == "throughput" else "keeps its bounds up to"
    print_facts(
        f"Serve {best.max_cpu_loras:,} adapters (max_cpu_loras) with {best.max_loras:,} slots (max_loras)",
        {
            "model, calibration": f"{found.model}, {found.calibration}",
            "batch limits": f"{best.max_num_seqs:,} requests (max_num_seqs), {best.max_num_batched_tokens:,} tokens "
            "(max_num_batched_tokens)",
            "goodput": f"{shown(best.goodput_per_s)} requests/s, {percent(best.attainment)} of those that arrive "
            f"({bounds}; {percent(found.goodput.attainment)} asked)",
            "throughput": f"{shown(best.throughput_tokens_per_s)} tokens/s",
            "offered load": f"{shown(best.offered_tokens_per_s)} tokens/s",
            "inter-token latency": duration(best.itl_s),
            "time to first token": duration(best.ttft_s),
            "requests running, waiting": f"{shown(best.mean_running)}, {shown(best.mean_waiting)}",
            "adapters in a batch": shown(best.active_adapters),
            "KV cache in use": f"{percent(best.kv_usage)} of {best.kv_cache_tokens:,} tokens",
            "headroom": f"{fails} {shown(best.critical_load)} times this load; "
            f"probability of failing {percent(best.starving_probability)}, {percent(found.risk)} allowed",
            "memory to spare": f"{gibibytes(found.memory.spare_bytes)}; "
            f"{found.memory.spare_kv_cache_tokens:,} KV tokens beyond the longest request",
            "bottleneck": f"now {spoken(best.limit)}; where it fails {beyond}",
            "predicted by": "the steady twin alone: nothing was played"
            if found.played is None
            else f"the event twin, mean of {plural(len(found.played.seeds), 'seed')}",
        },
    )
    for sentence in found.explanation:
        say(sentence)
    click.echo()
    print_map(grid)
    print_table("Runners-up by the steady twin, each with other slots", [_row(each) for each in found.runners_up])
    print_warnings(found.warnings)
    say(found.serve_command)


def _row(candidate: "Candidate") -> dict[str, Any]:
    return {
        "A": candidate.max_cpu_loras,
        "S": candidate.max_loras,
        "rank": candidate.max_lora_rank,
        "seqs": candidate.max_num_seqs,
        "budget": candidate.max_num_batched_tokens,
        "tokens/s": candidate.throughput_tokens_per_s,
        "ITL ms": candidate.itl_s * MS_PER_S,
        "TTFT s": candidate.ttft_s,
        "in bounds %": candidate.attainment * 100.0,
        "KV %": candidate.kv_usage * 100.0,
        "fails with %": candidate.starving_probability * 100.0,
    }
