"""``lora-capacity label``: optima by the thousand, for models to be trained on."""

from pathlib import Path
from typing import Any

import click

from lora_capacity.errors import LARGEST_WHOLE
from lora_capacity.words import duration, shown
from lora_capacity_cli.files import check_output, writing
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, CalibrationChoice, calibration_options, examples, format_option, ray_option
from lora_capacity_cli.output import print_facts, print_json
from lora_capacity_cli.runtime import prepare, progress_bar
from lora_capacity_cli.tables import parts_folder


@command(
    epilog=examples(
        "lora-capacity label -o labels.parquet",
        "lora-capacity label --space space.yaml --workloads 4096 --played 0 -o labels.parquet",
    )
)
@calibration_options
@click.option(
    "--space",
    type=FILE,
    metavar="FILE",
    help="YAML or JSON file of the ranges that workloads and servers are drawn from. [default: built-in]",
)
@click.option(
    "--workloads",
    type=click.IntRange(min=1, max=1_000_000),
    default=2048,
    show_default=True,
    help="Number of workloads.",
)
@click.option(
    "--played",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Workloads for which the event twin simulates configurations near the best, to correct all labels; 0: none.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=LARGEST_WHOLE),
    default=0,
    show_default=True,
    help="Seed of the workloads.",
)
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE.parquet", help="Table to write.")
@ray_option
@format_option
def label(
    calibration: CalibrationChoice,
    space: Path | None,
    workloads: int,
    played: int,
    seed: int,
    output: Path,
    ray: str | None,
    output_format: str,
) -> None:
    """Find the best adapters and slots for many workloads, as training data for `train`.

    Workloads and servers are drawn uniformly from a space. For each one the steady twin predicts a grid of 20 × 20
    configurations and refines it around the best. The event twin simulates some of them; a model of the difference
    corrects all labels.

    Results are kept in FILE.parquet.parts until the file is written: after an interruption the same command resumes.
    """
    check_output("--output", output, (".parquet",))
    prepare(ray=ray)
    from lora_capacity.surrogate import Space
    from lora_capacity.surrogate import label as find_labels

    known = calibration.load()
    drawn_from = Space() if space is None else Space.from_file(space)
    with parts_folder(output) as parts:
        with progress_bar("workloads") as progress:
            labels = find_labels(
                known,
                drawn_from,
                workloads,
                seed=seed,
                played=min(played, workloads),
                checkpoint_dir=parts,
                progress=progress,
            )
        with writing("--output", output):
            labels.write(output)
    summary = {
        "file": str(output),
        "calibration": known.name,
        "workloads": len(labels),
        "feasible": int((labels.optima.max_loras > 0).sum()),
        "seconds": labels.about["seconds"],
        "plays": labels.about["plays"],
    }
    if output_format == "json":
        print_json(summary)
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:
    facts = {name: f"{summary[name]:,}" for name in ("workloads", "feasible")}
    facts |= {name.replace("_", " "): duration(value) for name, value in summary["seconds"].items()}
    plays = summary["plays"]
    if plays:
        facts["simulated by the event twin"] = (
            f"{plays['configurations']} configurations; logarithm of its throughput over the steady twin's: mean "
            f"{shown(plays['mean_log_ratio'])}, spread {shown(plays['spread'])}, "
            f"{shown(plays['left_held_back'])} left by the model on held-out workloads"
        )
    print_facts(summary["file"], facts)
