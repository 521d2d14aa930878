"""``lora-capacity sweep``: a grid of configurations into a table."""

from pathlib import Path
from typing import Any

import click

from lora_capacity.words import REFUSALS
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import (
    FILE,
    GRID,
    CalibrationChoice,
    calibration_options,
    engine_options,
    examples,
    format_option,
    goodput_options,
    ray_option,
    seeds_option,
    server_options,
    workload_argument,
)
from lora_capacity_cli.output import print_facts, print_json, spoken
from lora_capacity_cli.runtime import prepare, progress_bar, read_workload
from lora_capacity_cli.tables import check_output, parts_folder, write_table


@command(
    epilog=examples(
        "lora-capacity sweep examples/many_idle.yaml --adapters 8:384:8 --max-loras 8:384:8 -o grid.parquet",
        "lora-capacity sweep examples/few_busy.yaml --adapters 8:40:4 --max-loras 4,8,16 --engine event -o grid.csv",
    )
)
@workload_argument
@calibration_options
@goodput_options
@click.option("--adapters", type=GRID, required=True, help="Numbers of adapters.")
@click.option(
    "--max-loras",
    type=GRID,
    required=True,
    help="Numbers of slots; combinations with more slots than adapters are left out.",
)
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE", help="Table to write: .parquet or .csv.")
@engine_options
@seeds_option(1)
@ray_option
@server_options(grids=True)
@format_option
def sweep(
    workload: Path,
    calibration: CalibrationChoice,
    bounds: dict[str, Any],
    adapters: tuple[int, ...],
    max_loras: tuple[int, ...],
    output: Path,
    engine: str,
    seed: int,
    seeds: int,
    ray: str | None,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Predict every configuration of a grid.

    WORKLOAD is a YAML or JSON file. A GRID is 8, 8,16,32 or 8:384:8 (start:stop:step).

    The event twin takes a fraction of a second per configuration. Its results are kept in FILE.parts until the table is
    written: after an interruption the same command resumes.
    """
    check_output(output)
    prepare(ray=ray)
    import numpy as np

    from lora_capacity.run import engine_named, simulate
    from lora_capacity.run.steady import check_configurations, grid
    from lora_capacity.scenarios import build_scenarios, table

    asked = read_workload(workload, bounds)
    known = calibration.load()
    axes = {name: values for name, values in settings.items() if name in ("max_num_seqs", "max_num_batched_tokens")}
    fixed = {name: value for name, value in settings.items() if name not in axes}
    points = grid(adapters, max_loras, **axes)
    check_configurations("--seeds", points["adapters"].size * seeds)
    rows = {name: column.repeat(seeds) for name, column in points.items()}
    seed_of_row = np.resize(np.arange(seed, seed + seeds), rows["adapters"].size)
    scenarios = build_scenarios(asked, known, **rows, **fixed)
    with parts_folder(output) as parts:
        with progress_bar("configurations") as progress:
            results = simulate(
                known,
                scenarios,
                asked,
                engine=engine,
                seed=seed_of_row,
                checkpoint_dir=parts if engine_named(engine).keeps_batches else None,
                progress=progress,
            )
        columns = table(scenarios, results)
        if results.events is not None:
            columns = {"seed": seed_of_row} | columns
        write_table(output, columns)
    summary = {
        "file": str(output),
        "calibration": known.name,
        "engine": engine,
        "configurations": len(columns["status"]),
        "started": sum(status not in REFUSALS for status in columns["status"].tolist()),
        "starved": int(columns["starved"].sum()),
        "keep_bounds": int((columns["attainment"] >= asked.goodput.attainment).sum()),
        "columns": list(columns),
    }
    if output_format == "json":
        print_json(summary)
    else:
        print_facts(
            f"{output}",
            {spoken(name): f"{summary[name]:,}" for name in ("configurations", "started", "starved", "keep_bounds")},
        )
