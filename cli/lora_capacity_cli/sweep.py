"""``lora-capacity sweep``: a grid of configurations into a table."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity_cli.options import (
    FILE,
    GRID,
    calibration_option,
    examples,
    format_option,
    server_options,
    workload_argument,
)
from lora_capacity_cli.output import print_facts, print_json
from lora_capacity_cli.runtime import prepare, progress_bar

if TYPE_CHECKING:
    import pyarrow

_SUFFIXES = (".parquet", ".csv")


@click.command(
    epilog=examples(
        "lora-capacity sweep examples/many_idle.yaml --adapters 8:384:8 --max-loras 8:384:8 -o grid.parquet",
    )
)
@workload_argument
@calibration_option
@click.option("--adapters", type=GRID, required=True, help="Numbers of adapters (max_cpu_loras).")
@click.option("--max-loras", type=GRID, required=True, help="Numbers of slots; those above the adapters are left out.")
@click.option(
    "-o", "--output", type=FILE, required=True, metavar="FILE", help="Table to write, .parquet or .csv by its name."
)
@server_options(grids=True)
@format_option
def sweep(
    workload: Path,
    calibration: str,
    adapters: tuple[int, ...],
    max_loras: tuple[int, ...],
    output: Path,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Predict every configuration of a grid.

    WORKLOAD is a YAML or JSON file of adapters and traffic. A GRID is 8, 8,16,32 or 8:384:8 (start:stop:step).
    """
    _check_output(output)
    prepare()
    from lora_capacity.calibration import load_calibration
    from lora_capacity.sweep import grid, simulate, table
    from lora_capacity.twin import StayLaw, build_scenarios
    from lora_capacity.workload import Workload

    asked = Workload.from_file(workload)
    known = load_calibration(calibration)
    axes = {name: values for name, values in settings.items() if name in ("max_num_seqs", "max_num_batched_tokens")}
    fixed = {name: value for name, value in settings.items() if name not in axes}
    scenarios = build_scenarios(asked, known, **grid(adapters, max_loras, **axes), **fixed)
    with progress_bar("configurations") as progress:
        results = simulate(known, scenarios, StayLaw.of_lengths(asked.output_tokens), progress=progress)
    columns = table(scenarios, results)
    _write(output, columns)
    started = [status not in ("oom", "no_kv_cache") for status in columns["status"].tolist()]
    summary = {
        "file": str(output),
        "calibration": known.name,
        "configurations": len(started),
        "started": sum(started),
        "starved": int(columns["starved"].sum()),
        "columns": list(columns),
    }
    if output_format == "json":
        print_json(summary)
    else:
        print_facts(
            f"{output}",
            {name: f"{summary[name]:,}" for name in ("configurations", "started", "starved")},
        )


def _check_output(output: Path) -> None:
    """Refuse a table that cannot be written before anything is computed."""
    if output.suffix.lower() not in _SUFFIXES:
        raise InputError("--output", str(output), f"a name that ends in {' or '.join(_SUFFIXES)}")
    if not output.parent.is_dir():
        raise InputError("--output", str(output), "a file in a folder that exists")
    if output.is_dir():
        raise InputError("--output", str(output), "a file, not a folder")


def _write(output: Path, columns: dict[str, Any]) -> None:
    """Write a table whole or not at all: a reader never sees half of it."""
    import pyarrow

    content = pyarrow.table(columns)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(handle)
        try:
            _write_as(output.suffix.lower(), content, name)
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(output)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise InputError("--output", str(output), f"a file that can be written ({error.strerror})") from None


def _write_as(suffix: str, content: "pyarrow.Table", name: str) -> None:
    if suffix == ".csv":
        from pyarrow import csv

        csv.write_csv(content, name)
    else:
        from pyarrow import parquet

        parquet.write_table(content, name)


def _umask() -> int:
    """Return the mask that new files get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
