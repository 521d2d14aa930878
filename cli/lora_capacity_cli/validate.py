"""``lora-capacity validate``: predictions against measured runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity_cli.options import FILE, engine_options, examples, format_option, seeds_option
from lora_capacity_cli.output import print_facts, print_json, print_table
from lora_capacity_cli.runtime import prepare, progress_bar

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration

_TITLES = {
    "scenario": "workload",
    "throughput_smape": "throughput",
    "throughput_mape": "MAPE",
    "itl_smape": "ITL",
    "ttft_smape": "TTFT",
    "ttft_smape_keeping_up": "where it keeps up",
    "tpot_smape": "TPOT",
}


@click.command(
    epilog=examples(
        "lora-capacity validate serving_runs.csv --format json",
        "lora-capacity validate serving_runs.csv --engine event --seeds 3",
    )
)
@click.argument("runs", type=FILE)
@click.option(
    "--calibration",
    "given",
    metavar="NAME|FILE",
    multiple=True,
    help="Calibration of the runs' model; once per model. [default: the bundled one of each model]",
)
@engine_options
@seeds_option(1)
@format_option
def validate(runs: Path, given: tuple[str, ...], engine: str, seed: int, seeds: int, output_format: str) -> None:
    """Compare predictions with measured runs.

    RUNS is a CSV file, one serving run a row. Errors are in percent: SMAPE is 100/n · Σ |p − m| / (|p| + |m|).
    Latencies are compared as clients see them; of the time to first token, also over the servers that keep up, those
    that did not starve.
    """
    prepare()
    from lora_capacity.measurements import read_runs
    from lora_capacity.validation import predict_runs, score_runs

    measured = read_runs(runs)
    calibrations = _calibrations(set(measured.model.tolist()), given)
    with progress_bar("runs") as progress:
        predicted = predict_runs(measured, calibrations, engine, seed=seed, seeds=seeds, progress=progress)
    scores = score_runs(measured, predicted, engine)
    if output_format == "json":
        print_json(scores)
    else:
        _print(scores)


def _calibrations(models: set[str], given: tuple[str, ...]) -> dict[str, "Calibration"]:
    """Return a calibration by model: those given, else the bundled ones."""
    from lora_capacity.calibration import bundled_names, load_calibration
    from lora_capacity.errors import InputError

    found = {calibration.model.name: calibration for calibration in map(load_calibration, bundled_names())}
    for name in given:
        calibration = load_calibration(name)
        if calibration.model.name not in models:
            raise InputError(
                "--calibration", calibration.model.name, f"a model of the runs: {', '.join(sorted(models))}"
            )
        found[calibration.model.name] = calibration
    return found


def _print(scores: dict[str, Any]) -> None:
    for by, key in (("model", "models"), ("workload", "groups")):
        rows = [{_TITLES.get(name, name): value for name, value in row.items()} for row in scores[key]]
        print_table(f"SMAPE by {by}, and mean absolute error (MAPE) of the throughput, %", rows)
    starved, startup = scores["starved"], scores["startup"]
    right = starved["tp"] + starved["tn"]
    print_facts(
        "Outcomes",
        {
            "starved or not": f"right on {right} of {sum(starved.values())}; "
            f"{starved['fn']} starved though predicted not to be, {starved['fp']} the reverse",
            "start-up": f"right on {startup['agree']} of {startup['agree'] + startup['disagree']}",
        },
    )
    optima = [
        {
            "model": each["model"],
            "workload": each["scenario"],
            "best A, S": _point(each["measured"]),
            "tokens/s": each["measured"]["throughput"],
            "chosen A, S": _point(each["chosen"]),
            "measured there": each["chosen"]["measured_throughput"],
            "starved": each["chosen"]["starved"],
            "regret %": None if each["regret"] is None else 100.0 * each["regret"],
        }
        for each in scores["optima"]
    ]
    print_table("Best configurations among those measured", optima, empty="no workload with a grid")


def _point(found: dict[str, Any]) -> str:
    return "–" if found["max_loras"] is None else f"{found['max_cpu_loras']}, {found['max_loras']}"
