"""``lora-capacity compare``: the steady twin against the event twin."""

import contextlib
from pathlib import Path
from typing import Any

import click

from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import (
    FILE,
    GRID,
    CalibrationChoice,
    calibration_options,
    examples,
    format_option,
    seed_option,
    seeds_option,
    server_options,
    workload_argument,
)
from lora_capacity_cli.output import print_facts, print_json, print_table, spoken
from lora_capacity_cli.runtime import prepare, progress_bar
from lora_capacity_cli.tables import check_output, parts_folder, write_table

_WORST = 12
"""Most configurations that are told one by one: what is read on a screen."""


@command(
    epilog=examples(
        "lora-capacity compare examples/few_busy.yaml --adapters 8:40:4 --max-loras 4,8,16",
        "lora-capacity compare examples/many_idle.yaml --adapters 32:256:32 --max-loras 8,32 -o comparison.parquet",
    )
)
@workload_argument
@calibration_options
@click.option("--adapters", type=GRID, required=True, help="Numbers of adapters.")
@click.option(
    "--max-loras",
    type=GRID,
    required=True,
    help="Numbers of slots; combinations with more slots than adapters are left out.",
)
@click.option(
    "--tolerance",
    type=float,
    default=0.02,
    show_default=True,
    help="Relative difference of throughput from which the twins count as different.",
)
@click.option(
    "-o", "--output", type=FILE, metavar="FILE", help="Also write all configurations to a table: .parquet or .csv."
)
@seed_option
@seeds_option(2)
@server_options(grids=True)
@format_option
def compare(
    workload: Path,
    calibration: CalibrationChoice,
    adapters: tuple[int, ...],
    max_loras: tuple[int, ...],
    tolerance: float,
    output: Path | None,
    seed: int,
    seeds: int,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Show where the steady and the event twin differ, and why.

    WORKLOAD is a YAML or JSON file. A GRID is 8, 8,16,32 or 8:384:8 (start:stop:step).

    With --output, results are kept in FILE.parts until the table is written: after an interruption the same command
    resumes.
    """
    if output is not None:
        check_output(output)
    prepare()
    from lora_capacity.run.steady import grid
    from lora_capacity.scenarios import build_scenarios
    from lora_capacity.validation.twins import compare_twins, summarise_comparison
    from lora_capacity.workload import Workload

    asked = Workload.from_file(workload)
    known = calibration.load()
    axes = {name: settings.pop(name) for name in ("max_num_seqs", "max_num_batched_tokens") if name in settings}
    scenarios = build_scenarios(asked, known, **grid(adapters, max_loras, **axes), **settings)
    numbers = range(seed, seed + seeds)
    with contextlib.nullcontext() if output is None else parts_folder(output) as parts:
        with progress_bar("configurations") as progress:
            columns = compare_twins(
                known, scenarios, asked, seeds=numbers, tolerance=tolerance, parts=parts, progress=progress
            )
        if output is not None:
            write_table(output, columns)
    started = columns["regime"] != "does_not_start"
    document = {
        "calibration": known.name,
        "tolerance": tolerance,
        "seeds": list(numbers),
        "configurations": len(started),
        "compared": int(started.sum()),
        "differ": int(columns["differs"].sum()),
        "regimes": summarise_comparison(columns),
        "worst": _worst(columns),
    }
    if output_format == "json":
        print_json(document)
    else:
        _print(document)


def _worst(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configurations that differ most in throughput."""
    import numpy as np

    off = np.nan_to_num(np.abs(columns["difference_throughput_tokens_per_s"]))
    order = [row for row in np.argsort(-off, kind="stable")[:_WORST].tolist() if columns["differs"][row]]
    return [{name: column[row] for name, column in columns.items()} for row in order]


def _print(document: dict[str, Any]) -> None:
    print_facts(
        f"Steady against event, {len(document['seeds'])} seeds",
        {
            "configurations": f"{document['configurations']:,}, of which {document['compared']:,} start",
            f"throughput differs by over {100 * document['tolerance']:g} %": f"{document['differ']:,}",
        },
    )
    regimes = [
        {
            "regime": spoken(each["regime"]),
            "configurations": each["configurations"],
            "differ": each["differ"],
            "throughput %": 100.0 * each["mean_difference"]["throughput_tokens_per_s"],
            "± %": 100.0 * each["mean_absolute_difference"]["throughput_tokens_per_s"],
            "ITL ± %": 100.0 * each["mean_absolute_difference"]["itl_s"],
            "TTFT ± %": 100.0 * each["mean_absolute_difference"]["ttft_s"],
            "why": ", ".join(f"{count} {spoken(reason)}" for reason, count in each["why"].items()),
        }
        for each in document["regimes"]
        if "why" in each
    ]
    print_table("By regime: steady over event less 1, mean and mean absolute (±)", regimes)
    rows = [
        {
            "A": each["max_cpu_loras"],
            "S": each["max_loras"],
            "steady tokens/s": each["steady_throughput_tokens_per_s"],
            "event tokens/s": each["throughput_tokens_per_s"],
            "difference %": 100.0 * each["difference_throughput_tokens_per_s"],
            "regime": spoken(each["regime"]),
            "why": spoken(each["why"]),
        }
        for each in document["worst"]
    ]
    print_table("Where they differ most", rows)
