"""``lora-capacity optimize``: the best numbers of adapters and slots."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.units import MS_PER_S
from lora_capacity_cli.options import (
    GRID,
    calibration_option,
    examples,
    format_option,
    server_options,
    workload_argument,
)
from lora_capacity_cli.output import (
    bound_words,
    duration,
    gibibytes,
    percent,
    print_facts,
    print_json,
    print_table,
    print_warnings,
    shown,
)
from lora_capacity_cli.runtime import prepare, progress_bar

if TYPE_CHECKING:
    from lora_capacity.optimize import Candidate, Recommendation


@click.command(
    epilog=examples(
        "lora-capacity optimize examples/few_busy.yaml",
        "lora-capacity optimize examples/many_idle.yaml --objective fewest-slots --max-itl-ms 60 --format json",
    )
)
@workload_argument
@calibration_option
@click.option("--adapters", type=GRID, help="Numbers of adapters to consider. [default: all that can make sense]")
@click.option("--max-loras", type=GRID, help="Numbers of slots to consider. [default: all that can make sense]")
@click.option(
    "--objective",
    "goal",
    type=click.Choice(["throughput", "fewest-slots", "most-adapters"]),
    default="throughput",
    show_default=True,
    help="What to look for among the configurations that are unlikely to starve.",
)
@click.option(
    "--within",
    type=float,
    default=0.01,
    show_default=True,
    help="Share of the best throughput that fewest-slots may give up.",
)
@click.option("--max-itl-ms", type=float, help="Longest mean inter-token latency allowed.")
@click.option("--max-ttft-ms", type=float, help="Longest mean time to first token allowed.")
@click.option(
    "--starvation-threshold",
    type=float,
    default=0.1,
    show_default=True,
    help="Share below the offered load from which on throughput counts as starved.",
)
@click.option("--risk", type=float, default=0.05, show_default=True, help="Highest acceptable probability of starving.")
@server_options(grids=True)
@format_option
def optimize(
    workload: Path,
    calibration: str,
    adapters: tuple[int, ...] | None,
    max_loras: tuple[int, ...] | None,
    goal: str,
    within: float,
    max_itl_ms: float | None,
    max_ttft_ms: float | None,
    starvation_threshold: float,
    risk: float,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Recommend how many adapters to serve and how many slots to reserve.

    WORKLOAD is a YAML or JSON file of adapters and traffic. A GRID is 8, 8,16,32 or 8:384:8 (start:stop:step).
    """
    prepare()
    from lora_capacity.calibration import load_calibration
    from lora_capacity.optimize import Objective
    from lora_capacity.optimize import optimize as search
    from lora_capacity.workload import Workload

    objective = Objective(
        goal=goal,
        within=within,
        max_itl_s=None if max_itl_ms is None else max_itl_ms / MS_PER_S,
        max_ttft_s=None if max_ttft_ms is None else max_ttft_ms / MS_PER_S,
    )
    asked = Workload.from_file(workload)
    known = load_calibration(calibration)
    axes = {name: settings.pop(name, None) for name in ("max_num_batched_tokens", "max_num_seqs")}
    with progress_bar("configurations") as progress:
        found = search(
            asked,
            known,
            adapters=adapters,
            max_loras=max_loras,
            **axes,
            objective=objective,
            settings=settings,
            starvation_threshold=starvation_threshold,
            risk=risk,
            progress=progress,
        )
    if output_format == "json":
        print_json(found.to_json())
    else:
        _print_recommendation(found)


def _print_recommendation(found: "Recommendation") -> None:
    best = found.best
    print_facts(
        f"Serve {best.max_cpu_loras:,} adapters (max_cpu_loras) with {best.max_loras:,} slots (max_loras)",
        {
            "model, calibration": f"{found.model}, {found.calibration}",
            "throughput": f"{shown(best.throughput_tokens_per_s)} tokens/s",
            "offered load": f"{shown(best.offered_tokens_per_s)} tokens/s",
            "inter-token latency": duration(best.itl_s),
            "time to first token": duration(best.ttft_s),
            "requests running, waiting": f"{shown(best.mean_running)}, {shown(best.mean_waiting)}",
            "adapters in a batch": shown(best.active_adapters),
            "KV cache in use": f"{percent(best.kv_usage)} of {best.kv_cache_tokens:,} tokens",
            "margin to starvation": f"starves at {shown(best.critical_load)} times this load; "
            f"probability {percent(best.starving_probability)}, {percent(found.risk)} allowed",
            "memory to spare": f"{gibibytes(found.memory.spare_bytes)}; "
            f"{found.memory.spare_kv_cache_tokens:,} KV tokens beyond the longest request",
            "bound": f"now {bound_words(best.limit)}; where it starves {bound_words(best.limit_beyond)}",
        },
    )
    for sentence in found.explanation:
        click.echo(sentence)
    click.echo()
    print_table("Runners-up, each with other slots", [_row(each) for each in found.runners_up])
    print_warnings(found.warnings)
    click.echo(found.server.serve_command(found.model))


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
        "KV %": candidate.kv_usage * 100.0,
        "starves with %": candidate.starving_probability * 100.0,
    }
