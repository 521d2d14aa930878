"""``lora-capacity fit``: a calibration from measurements, or memory terms from the starts of servers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lora_capacity.errors import InputError
from lora_capacity_cli.options import FILE, examples, format_option
from lora_capacity_cli.output import print_facts, print_json, print_table
from lora_capacity_cli.runtime import prepare, progress_bar


@click.command(
    epilog=examples(
        "lora-capacity fit my_profile -o calibration.json",
        "lora-capacity fit my_profile --runs my_profile/serving_runs.csv -o calibration.json",
        "lora-capacity fit startups.csv --models models.csv -o terms.json",
    )
)
@click.argument("measured", type=FILE, metavar="PROFILE_DIR|STARTUPS.csv")
@click.option("--model", metavar="NAME", help="Model to fit, where the tables hold several.")
@click.option(
    "--runs",
    type=FILE,
    metavar="RUNS.csv",
    help="Serving runs to fit to as well, each workload also held back in turn. [default: microbenchmarks alone]",
)
@click.option("--name", help="Name of the calibration. [default: model and GPU]")
@click.option(
    "--models",
    type=FILE,
    metavar="MODELS.csv",
    help="Where the config.json of each model of STARTUPS.csv is (see `validate`). [default: bundled shapes]",
)
@click.option(
    "--from-nothing", is_flag=True, help="Fit memory terms to STARTUPS.csv alone. [default: correct the bundled ones]"
)
@click.option("--source", default="", metavar="TEXT", help="Where the starts are from, for the file of terms.")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE.json", help="File to write.")
@format_option
def fit(
    measured: Path,
    model: str | None,
    runs: Path | None,
    name: str | None,
    models: Path | None,
    from_nothing: bool,
    source: str,
    output: Path,
    output_format: str,
) -> None:
    """Estimate the coefficients of a calibration from measured tables, or memory terms from starts of servers.

    PROFILE_DIR holds kv_capacity.csv, backbone_latency.csv, adapter_latency.csv, adapter_loading.csv and profile.json,
    which tells model, GPU and vLLM version. STARTUPS.csv holds a start a row, as `observe --startup-log` makes them;
    the terms fitted to them tell the memory that shapes do not.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise InputError("--output", str(output), "a file in a folder that exists")
    prepare()
    of_profiles = {"--model": model, "--runs": runs, "--name": name}
    of_starts = {"--models": models, "--from-nothing": from_nothing, "--source": source}
    beside, allowed = (
        (of_profiles, "together with a PROFILE_DIR")
        if measured.is_file()
        else (of_starts, "together with STARTUPS.csv in place of a PROFILE_DIR")
    )
    for option, value in beside.items():
        if value:
            raise InputError(option, str(value), allowed)
    if measured.is_file():
        _fit_terms(measured, models, output, output_format, from_nothing=from_nothing, source=source)
        return
    from lora_capacity.fitting import fit_calibration

    with progress_bar("fitting") as progress:
        report = fit_calibration(measured, model=model, runs=runs, name=name, progress=progress)
    try:
        report.calibration.save(output)
    except OSError as error:
        raise InputError("--output", str(output), f"a file that can be written ({error.strerror})") from None
    if output_format == "json":
        print_json(report.to_json())
    else:
        print_table(f"{report.calibration.name}, written to {output}", report.table())
        _print_accuracy(report.calibration.accuracy)


def _fit_terms(
    startups: Path, models: Path | None, output: Path, output_format: str, *, from_nothing: bool, source: str
) -> None:
    from lora_capacity.fitting import FIRST_GUESS, fit_terms
    from lora_capacity.measurements import read_startups
    from lora_capacity.memory import EstimatedTerms

    begin = FIRST_GUESS if from_nothing else EstimatedTerms.bundled()
    terms = fit_terms(read_startups(startups, models), begin, source)
    try:
        terms.save(output)
    except OSError as error:
        raise InputError("--output", str(output), f"a file that can be written ({error.strerror})") from None
    if output_format == "json":
        print_json(terms.to_json())
    else:
        print_facts(
            f"Memory terms, written to {output}", {name: f"{value:.4g}" for name, value in _numbers(terms.to_json())}
        )


def _numbers(content: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in content.items() if not isinstance(value, str)]


def _print_accuracy(accuracy: Mapping[str, Any]) -> None:
    """Print how well runs are predicted: those fitted to, scenarios held out, and from microbenchmarks alone."""
    scored = {key: value for key, value in accuracy.items() if "throughput_smape" in value}
    print_table(
        "Errors on serving runs",
        [_errors(key.replace("_", " "), value) for key, value in scored.items()],
        empty="no runs given",
    )
    if "held_back_by_scenario" in scored:
        scenarios = scored["held_back_by_scenario"]["scenarios"]
        print_table("Each scenario held out", [_errors(key, value) for key, value in scenarios.items()])


def _errors(what: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    names = {"runs": "runs", "throughput_smape": "throughput SMAPE %", "itl_smape": "ITL SMAPE %"}
    return {"data": what} | {title: scores[name] for name, title in names.items()}
