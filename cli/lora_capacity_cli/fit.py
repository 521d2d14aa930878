"""``lora-capacity fit``: a calibration from measurements."""

from pathlib import Path

import click

from lora_capacity.errors import InputError
from lora_capacity_cli.options import FILE, examples, format_option
from lora_capacity_cli.output import print_json, print_table
from lora_capacity_cli.runtime import prepare, progress_bar


@click.command(
    epilog=examples(
        "lora-capacity fit my_profile -o calibration.json",
        "lora-capacity fit my_profile --runs my_profile/serving_runs.csv -o calibration.json",
    )
)
@click.argument("profile_dir", type=FILE)
@click.option("--model", metavar="NAME", help="Model to fit, where the tables hold several.")
@click.option(
    "--runs", type=FILE, metavar="RUNS.csv", help="Serving runs to fit to as well. [default: microbenchmarks alone]"
)
@click.option("--name", help="Name of the calibration. [default: model and GPU]")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE.json", help="Calibration file to write.")
@format_option
def fit(
    profile_dir: Path, model: str | None, runs: Path | None, name: str | None, output: Path, output_format: str
) -> None:
    """Estimate the coefficients of a calibration from measured tables.

    PROFILE_DIR holds kv_capacity.csv, backbone_latency.csv, adapter_latency.csv, adapter_loading.csv and profile.json,
    which tells model, GPU and vLLM version.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise InputError("--output", str(output), "a file in a folder that exists")
    prepare()
    from lora_capacity.fitting import fit_calibration

    with progress_bar("fitting") as progress:
        report = fit_calibration(profile_dir, model=model, runs=runs, name=name, progress=progress)
    try:
        report.calibration.save(output)
    except OSError as error:
        raise InputError("--output", str(output), f"a file that can be written ({error.strerror})") from None
    if output_format == "json":
        print_json(report.to_json())
    else:
        print_table(f"{report.calibration.name}, written to {output}", report.table())
