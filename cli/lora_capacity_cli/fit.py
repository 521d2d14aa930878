"""``lora-capacity fit``: a calibration from measurements, or memory terms from the starts of servers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity_cli.files import check_output, writing
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, format_option
from lora_capacity_cli.output import print_facts, print_json, print_table
from lora_capacity_cli.runtime import prepare, progress_bar

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration, Efficiencies
    from lora_capacity.memory import EstimatedTerms


@command(
    epilog=examples(
        "lora-capacity fit my_profile -o calibration.json",
        "lora-capacity fit my_profile --runs my_profile/serving_runs.csv -o calibration.json",
        "lora-capacity fit --prior derived.json --runs five_runs.csv -o calibration.json",
        "lora-capacity fit startups.csv --models models.csv -o terms.json",
        "lora-capacity fit speeds.csv --models models.csv -o efficiencies.json",
    )
)
@click.argument("measured", type=FILE, required=False, metavar="PROFILE_DIR|STARTUPS.csv|SPEEDS.csv")
@click.option(
    "--prior",
    type=click.STRING,
    metavar="NAME|FILE",
    help="Calibration to correct with a few --runs instead of a profile, such as one from `calibrations derive`.",
)
@click.option("--model", metavar="NAME", help="Model to fit, if the tables have several.")
@click.option(
    "--runs",
    type=FILE,
    metavar="RUNS.csv",
    help="Serving runs to fit as well; errors hold out each workload in turn. [default: microbenchmarks only]",
)
@click.option("--name", help="Name of the calibration. [default: model and GPU]")
@click.option(
    "--models",
    type=FILE,
    metavar="MODELS.csv",
    help="Table of the models' config.json files; see `validate`. [default: bundled shapes]",
)
@click.option(
    "--from-nothing", is_flag=True, help="Fit memory terms to STARTUPS.csv only. [default: correct the bundled ones]"
)
@click.option("--source", default="", metavar="TEXT", help="Source of the table, recorded in the file.")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE.json", help="File to write.")
@format_option
def fit(
    measured: Path | None,
    prior: str | None,
    model: str | None,
    runs: Path | None,
    name: str | None,
    models: Path | None,
    from_nothing: bool,
    source: str,
    output: Path,
    output_format: str,
) -> None:
    """Fit a calibration, memory terms or GPU efficiencies to measured tables.

    \b
    PROFILE_DIR   written by `profile`: gives a calibration
    STARTUPS.csv  written by `observe --startup-log`: gives memory terms
    SPEEDS.csv    one measured speed per row: gives GPU efficiencies

    With --prior a few runs are enough to correct a calibration.
    """  # noqa: D301 - click's mark of lines that stay as they are is the character itself
    check_output("--output", output, (".json",))
    prepare()
    if prior is not None:
        _refuse({"PROFILE_DIR": measured, "--model": model, "--models": models, "--from-nothing": from_nothing,
                 "--source": source}, "nothing beside --prior")  # fmt: skip
        if runs is None:
            raise InputError("--runs", None, "a table of runs, to correct --prior by")
        _update(prior, runs, name, output, output_format)
        return
    if measured is None:
        raise InputError("PROFILE_DIR", None, "a profile, STARTUPS.csv, SPEEDS.csv, or --prior with --runs")
    if measured.is_file():
        _refuse({"--model": model, "--runs": runs, "--name": name}, "together with a PROFILE_DIR")
        if _tells_speeds(measured):
            _refuse({"--from-nothing": from_nothing}, "together with STARTUPS.csv")
            _fit_efficiencies(measured, models, output, output_format, source=source)
        else:
            _fit_terms(measured, models, output, output_format, from_nothing=from_nothing, source=source)
        return
    _refuse(
        {"--models": models, "--from-nothing": from_nothing, "--source": source},
        "together with STARTUPS.csv or SPEEDS.csv in place of a PROFILE_DIR",
    )
    from lora_capacity.fitting import fit_calibration

    with progress_bar("fitting") as progress:
        report = fit_calibration(measured, model=model, runs=runs, name=name, progress=progress)
    _save(report.calibration, output)
    if output_format == "json":
        print_json(report.to_json())
    else:
        print_table(f"{report.calibration.name}, written to {output}", report.table())
        _print_accuracy(report.calibration.accuracy)


def _refuse(options: Mapping[str, Any], allowed: str) -> None:
    for option, value in options.items():
        if value:
            raise InputError(option, str(value), allowed)


def _save(found: "Calibration | EstimatedTerms | Efficiencies", output: Path) -> None:
    with writing("--output", output):
        found.save(output)


def _tells_speeds(table: Path) -> bool:
    """Whether a table's columns are those of speeds."""
    from lora_capacity.measurements import SPEED_COLUMNS, STARTUP_COLUMNS

    try:
        header = table.read_text(encoding="utf-8-sig").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return False  # which is told where the table is read
    return bool(set(SPEED_COLUMNS).difference(STARTUP_COLUMNS).intersection(header.strip().split(",")))


def _update(prior: str, runs: Path, name: str | None, output: Path, output_format: str) -> None:
    from lora_capacity.calibration import load_calibration
    from lora_capacity.fitting import update_calibration

    known = load_calibration(prior)
    found = update_calibration(known, runs, name)
    _save(found, output)
    if output_format == "json":
        print_json(found.to_json())
        return
    before, after = (each.accuracy["coefficient_errors"] for each in (known, found))
    rows = [
        {
            "coefficient": each,
            "before": f"{known.coefficients[each]:.4g} ± {100 * before[each]:.0f} %",
            "now": f"{found.coefficients[each]:.4g} ± {100 * error:.0f} %",
        }
        for each, error in after.items()
    ]
    print_table(f"{found.name}: step times within ± {100 * found.capacity_error:.1f} %, written to {output}", rows)


def _fit_efficiencies(speeds: Path, models: Path | None, output: Path, output_format: str, *, source: str) -> None:
    from lora_capacity.calibration.efficiencies import FIRST_GUESSES
    from lora_capacity.fitting import contradictions, fit_efficiencies
    from lora_capacity.measurements import read_speeds

    read = read_speeds(speeds, models)
    found = fit_efficiencies(read, source)
    _save(found, output)
    if output_format == "json":
        print_json(
            {"values": dict(found.values), "step_spread": found.step_spread, "contradictions": contradictions(read)}
        )
    else:
        rows = [
            {"efficiency": name, "value": f"{value:.4g}", "error": f"± {100 * spread:.0f} %", "what": what}
            for (name, value), spread, (_, what) in zip(
                found.values.items(), found.spreads, FIRST_GUESSES.values(), strict=True
            )
        ]
        print_table(f"Efficiencies, written to {output}", rows)


def _fit_terms(
    startups: Path, models: Path | None, output: Path, output_format: str, *, from_nothing: bool, source: str
) -> None:
    from lora_capacity.fitting import FIRST_GUESS, fit_terms
    from lora_capacity.measurements import read_startups
    from lora_capacity.memory import EstimatedTerms

    begin = FIRST_GUESS if from_nothing else EstimatedTerms.bundled()
    terms = fit_terms(read_startups(startups, models), begin, source)
    _save(terms, output)
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
