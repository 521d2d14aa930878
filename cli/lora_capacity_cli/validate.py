"""``lora-capacity validate``: predictions against measured runs, and against the starts of servers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
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
        "lora-capacity validate --startup startups.csv --models models.csv --format json",
    )
)
@click.argument("runs", type=FILE, required=False)
@click.option(
    "--calibration",
    "given",
    metavar="NAME|FILE",
    multiple=True,
    help="Calibration of the runs' model; once per model. [default: the bundled one of each model]",
)
@click.option("--startup", type=FILE, metavar="STARTUPS.csv", help="Starts of servers, in place of runs.")
@click.option(
    "--models",
    type=FILE,
    metavar="MODELS.csv",
    help="With --startup: columns model_as_written_in_table and config_file, a file in model_configs beside the table. "
    "[default: bundled shapes]",
)
@click.option(
    "--terms", type=FILE, metavar="FILE.json", help="With --startup: memory terms. [default: the bundled ones]"
)
@click.option(
    "--leave-out",
    type=click.Choice(["gpu", "family"]),
    help="With --startup: predict every kind of GPU, or family of models, by terms fitted to the others.",
)
@engine_options
@seeds_option(1)
@format_option
def validate(
    runs: Path | None,
    given: tuple[str, ...],
    startup: Path | None,
    models: Path | None,
    terms: Path | None,
    leave_out: str | None,
    engine: str,
    seed: int,
    seeds: int,
    output_format: str,
) -> None:
    """Compare predictions with measured runs, or with the starts of servers.

    RUNS is a CSV file, one serving run a row. Errors are in percent: SMAPE is 100/n · Σ |p − m| / (|p| + |m|).
    Latencies are compared as clients see them; of the time to first token, also over the servers that keep up, those
    that did not starve.

    STARTUPS.csv holds one start a row: what a server was told, and the memory that it logged. Its KV cache is predicted
    with an interval that nine of ten servers lie in.
    """
    if startup is not None:
        if runs is not None:
            raise InputError("RUNS", str(runs), "either runs or --startup")
        if terms is not None and leave_out is not None:
            raise InputError("--terms", str(terms), "not together with --leave-out, which fits terms itself")
        prepare()
        _validate_startups(startup, models, terms, leave_out, output_format)
        return
    if runs is None:
        raise InputError("RUNS", None, "a table of runs, or --startup and a table of starts")
    if models or terms or leave_out:
        raise InputError("--startup", None, "a table of starts, which --models, --terms and --leave-out go with")
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


def _validate_startups(
    startup: Path, models: Path | None, terms: Path | None, leave_out: str | None, output_format: str
) -> None:
    from lora_capacity import fitting
    from lora_capacity.measurements import read_startups
    from lora_capacity.memory import EstimatedTerms
    from lora_capacity.validation import predict_startup, score_startups

    startups = read_startups(startup, models)
    if leave_out is None:
        known = EstimatedTerms.bundled() if terms is None else EstimatedTerms.from_file(terms)
        predicted = [predict_startup(each, known) for each in startups]
    else:
        predicted = fitting.leave_out(startups, lambda each: each.gpu_kind if leave_out == "gpu" else each.family)
    scores = score_startups(startups, predicted)
    if output_format == "json":
        print_json({"left_out": leave_out, "rows": [each.to_json() for each in predicted], "summary": scores})
        return
    groups = {"all": scores} | {f"{key} {value}": row for key in _BY for value, row in scores[_BY[key]].items()}
    print_table("Starts of servers, errors of the KV cache", [_startup_row(key, row) for key, row in groups.items()])


_BY = {"GPU": "by_gpu", "quantization": "by_quantization", "TP": "by_tensor_parallel_size", "": "by_lora"}


def _startup_row(what: str, scores: dict[str, Any]) -> dict[str, Any]:
    def share(name: str) -> str | None:
        return None if scores[name] is None else f"{100 * scores[name]:.1f} %"

    return {
        "starts": what.strip(),
        "rows": scores["rows"],
        "answered": scores["answered"],
        "median": share("kv_median_error"),
        "within 5 %": share("kv_within_5_percent"),
        "within 15 %": share("kv_within_15_percent"),
        "in the interval": share("kv_inside_interval"),
        "outcomes right": f"{scores['outcomes_right']} of {scores['outcomes']}",
    }


def _calibrations(models: set[str], given: tuple[str, ...]) -> dict[str, "Calibration"]:
    """Return a calibration by model: those given, else the bundled ones."""
    from lora_capacity.calibration import bundled_names, load_calibration

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
