"""``lora-capacity validate``: predictions against measured runs, and against the starts of servers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity_cli.completion import CALIBRATION, GPU
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import (
    FILE,
    engine_options,
    examples,
    format_option,
    ray_option,
    refuse_given,
    seeds_option,
)
from lora_capacity_cli.output import print_facts, print_json, print_table, print_warnings
from lora_capacity_cli.runtime import prepare, progress_bar

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.measurements import Runs

_TITLES = {
    "scenario": "workload",
    "throughput_smape": "tokens/s",
    "throughput_mape": "MAPE",
    "itl_smape": "ITL",
    "ttft_smape": "TTFT",
    "ttft_smape_keeping_up": "TTFT if keeping up",
    "tpot_smape": "TPOT",
}


@command(
    epilog=examples(
        "lora-capacity validate serving_runs.csv --format json",
        "lora-capacity validate serving_runs.csv --engine event --seeds 3",
        "lora-capacity validate --startup startups.csv --models models.csv --format json",
        "lora-capacity validate serving_runs.csv --transfer",
        "lora-capacity validate --speeds speeds.csv --models models.csv --leave-out gpu",
    )
)
@click.argument("runs", type=FILE, required=False)
@click.option(
    "--calibration",
    "given",
    type=CALIBRATION,
    metavar="NAME|FILE",
    multiple=True,
    help="Calibration to check; may be repeated, one per model. [default: bundled]",
)
@click.option(
    "--startup",
    type=FILE,
    metavar="STARTUPS.csv",
    help="Check predicted memory against logged server starts, not RUNS.",
)
@click.option(
    "--models",
    type=FILE,
    metavar="MODELS.csv",
    help="With --startup or --speeds: table with columns model_as_written_in_table and config_file (in the folder "
    "model_configs next to it). [default: bundled shapes]",
)
@click.option("--terms", type=FILE, metavar="FILE.json", help="With --startup: memory terms. [default: bundled]")
@click.option(
    "--leave-out",
    type=click.Choice(["gpu", "family"]),
    help="With --startup or --speeds: hold out each GPU type (or model family, --startup only) and fit to the others.",
)
@click.option(
    "--speeds", type=FILE, metavar="SPEEDS.csv", help="Check predicted speeds against public measurements, not RUNS."
)
@click.option(
    "--efficiencies",
    type=FILE,
    metavar="FILE.json",
    help="With --speeds: file written by `fit SPEEDS.csv`. [default: bundled]",
)
@click.option(
    "--transfer",
    is_flag=True,
    help="Hold out each model: predict it from its shape and the other models' calibrations.",
)
@click.option("--model-config", metavar="DIR|NAME", help="With --transfer: shape of a model that has no calibration.")
@click.option("--gpu", type=GPU, metavar="NAME", help="With --model-config: its GPU. [default: from the runs]")
@click.option(
    "--vllm-version", metavar="VERSION", help="With --model-config: its vLLM version. [default: the calibrations']"
)
@engine_options
@seeds_option(1)
@ray_option
@format_option
def validate(
    runs: Path | None,
    given: tuple[str, ...],
    startup: Path | None,
    models: Path | None,
    terms: Path | None,
    leave_out: str | None,
    speeds: Path | None,
    efficiencies: Path | None,
    transfer: bool,
    model_config: str | None,
    gpu: str | None,
    vllm_version: str | None,
    engine: str,
    seed: int,
    seeds: int,
    ray: str | None,
    output_format: str,
) -> None:
    """Compare predictions with measured serving runs, server starts or public speeds.

    RUNS is a CSV file with one serving run per row. Errors are in percent: SMAPE is 100/n · Σ |p − m| / (|p| + |m|).
    Latencies are the client's. TTFT is also compared over servers that keep up only.

    STARTUPS.csv has one server start per row: its settings and the memory that it logged. SPEEDS.csv has one measured
    speed per row: the load and the time per token.
    """
    given_for: dict[str, dict[str, Any]] = {
        "--startup": {"--terms": terms, "--models": models, "--leave-out": leave_out},
        "--speeds": {"--efficiencies": efficiencies, "--models": models, "--leave-out": leave_out},
        "--transfer": {"--model-config": model_config},
        "--model-config": {"--gpu": gpu, "--vllm-version": vllm_version},
    }
    chosen = {
        "--startup": startup, "--speeds": speeds, "--transfer": transfer and runs, "--model-config": model_config
    }  # fmt: skip
    _check_together(runs, given_for, chosen)
    for option, file in (("--terms", terms), ("--efficiencies", efficiencies)):
        if leave_out is not None and file is not None:
            raise InputError(option, str(file), "not together with --leave-out, which fits them itself")
    if engine == "steady" or runs is None:
        refuse_given(("ray",), "--engine steady" if runs else "no runs", "it is for runs with --engine event")
    prepare(ray=ray)
    if startup is not None:
        _validate_startups(startup, models, terms, leave_out, output_format)
        return
    if speeds is not None:
        _validate_speeds(speeds, models, efficiencies, leave_out, output_format)
        return
    assert runs is not None  # checked together above
    from lora_capacity.measurements import read_runs
    from lora_capacity.validation import comparable_runs, predict_runs, score_runs

    measured = read_runs(runs)
    calibrations = _calibrations(set(measured.model.tolist()), given, strict=not transfer)
    if transfer:
        calibrations = _transferred(measured, calibrations, model_config, gpu, vllm_version)
    measured, left_out = comparable_runs(measured, calibrations)
    with progress_bar("runs") as progress:
        predicted = predict_runs(measured, calibrations, engine, seed=seed, seeds=seeds, progress=progress)
    scores = score_runs(measured, predicted, engine) | {"warnings": left_out}
    if transfer:
        scores["transfer"] = _transfer_scores(measured, calibrations)
    if output_format == "json":
        print_json(scores)
    else:
        _print(scores)


def _check_together(runs: Path | None, given_for: Mapping[str, Mapping[str, Any]], chosen: dict[str, Any]) -> None:
    """Refuse options that change nothing beside the others, and two questions at once."""
    questions = [name for name in ("--startup", "--speeds") if chosen[name]]
    if runs is not None and questions:
        raise InputError("RUNS", str(runs), f"either runs or {questions[0]}")
    if len(questions) > 1:
        raise InputError("--speeds", str(chosen["--speeds"]), "not together with --startup")
    if runs is None and not questions:
        raise InputError("RUNS", None, "a table of runs, --startup or --speeds")
    owners: dict[str, list[str]] = {}
    for owner, options in given_for.items():
        for option in options:
            owners.setdefault(option, []).append(owner)
    for options in given_for.values():
        for option, value in options.items():
            if value and not any(chosen[owner] for owner in owners[option]):
                raise InputError(option, str(value), f"together with {' or '.join(owners[option])}")


def _transferred(
    runs: "Runs",
    known: "dict[str, Calibration]",
    model_config: str | None,
    gpu: str | None,
    vllm_version: str | None,
) -> "dict[str, Calibration]":
    from dataclasses import replace

    from lora_capacity.fitting.transfer import NewModel, transferred
    from lora_capacity.models import find_shape

    new = None
    if model_config is not None:
        unknown = [model for model in dict.fromkeys(runs.model.tolist()) if model not in known]
        if len(unknown) != 1:
            allowed = "one model of the runs without a calibration"
            raise InputError("--model-config", ", ".join(unknown) or "none", allowed)
        measured = list(known.values())
        version = vllm_version or measured[0].vllm_version
        new = NewModel(replace(find_shape(model_config), name=unknown[0]), gpu or measured[0].gpu.name, version)
    return transferred(runs, known, new)


def _transfer_scores(runs: "Runs", derived: "dict[str, Calibration]") -> dict[str, Any]:
    """Return, by model, how wide intervals are and how many runs lie in those that nine of ten should."""
    import numpy as np

    from lora_capacity.fitting.transfer import interval_coverage

    inside = interval_coverage(runs, derived)
    return {
        model: {
            "capacity_error": calibration.capacity_error,
            "in_interval": float(np.mean(known)) if (known := of_model[~np.isnan(of_model)]).size else None,
            "corrected_by": calibration.provenance["corrected_by"],
        }
        for model, calibration in derived.items()
        for of_model in (inside[runs.model == model],)
    }


def _validate_speeds(
    path: Path, models: Path | None, efficiencies: Path | None, leave_out: str | None, output_format: str
) -> None:
    from lora_capacity.calibration import Efficiencies, bundled_names, load_calibration
    from lora_capacity.facts import predict_speeds, score_speeds
    from lora_capacity.fitting import contradictions, leave_out_gpus
    from lora_capacity.measurements import read_speeds

    speeds = read_speeds(path, models)
    measured = [load_calibration(name) for name in bundled_names()]
    if leave_out == "family":
        raise InputError("--leave-out", leave_out, "gpu, with --speeds")
    if leave_out is None:
        known = Efficiencies.bundled() if efficiencies is None else Efficiencies.from_file(efficiencies)
        predicted = predict_speeds(speeds, known, measured)
    else:
        predicted = leave_out_gpus(speeds, measured)
    scores, doubtful = score_speeds(speeds, predicted), contradictions(speeds)
    rows = [each.to_json(speed) for speed, each in zip(speeds, predicted, strict=True)]
    if output_format == "json":
        print_json({"left_out": leave_out, "rows": rows, "contradictions": doubtful, "summary": scores})
        return
    print_table("Time per output token", [_speed_row(name, each) for name, each in scores.items() if each["rows"]])
    if doubtful:
        print_facts("Measured speeds that contradict others", doubtful)


def _speed_row(what: str, scores: dict[str, Any]) -> dict[str, Any]:
    shares = {"within 15 %": "within_15", "within 35 %": "within_35", "in the interval": "in_interval"}
    row = {
        "speeds": what.replace("_", " "),
        "rows": scores["rows"],
        "median error": f"{100 * scores['median_error']:.1f} %",
    }
    return row | {title: f"{100 * scores[name]:.0f} %" for title, name in shares.items()}


def _validate_startups(
    startup: Path, models: Path | None, terms: Path | None, leave_out: str | None, output_format: str
) -> None:
    from lora_capacity import fitting
    from lora_capacity.facts import predict_startup, score_startups
    from lora_capacity.measurements import read_startups
    from lora_capacity.memory import EstimatedTerms

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
    print_table("Server starts: error of the KV cache", [_startup_row(key, row) for key, row in groups.items()])


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


def _calibrations(models: set[str], given: tuple[str, ...], *, strict: bool) -> dict[str, "Calibration"]:
    """Return a calibration by model: those given, else the bundled ones; ``strict``: each given one is of the runs."""
    from lora_capacity.calibration import bundled_names, load_calibration

    found = {calibration.model.name: calibration for calibration in map(load_calibration, bundled_names())}
    for name in given:
        calibration = load_calibration(name)
        if strict and calibration.model.name not in models:
            raise InputError(
                "--calibration", calibration.model.name, f"a model of the runs: {', '.join(sorted(models))}"
            )
        found[calibration.model.name] = calibration
    return found


def _print(scores: dict[str, Any]) -> None:
    print_warnings(scores["warnings"])
    print_table(
        "Errors by model, % (SMAPE; MAPE of the throughput)", [_errors(row, "model") for row in scores["models"]]
    )
    models = [row["model"] for row in scores["models"]]
    for model in models:
        rows = [_errors(row, "scenario") for row in scores["groups"] if row["model"] == model]
        print_table(f"{model}: errors by workload, %", rows)
    starved, startup = scores["starved"], scores["startup"]
    right = starved["tp"] + starved["tn"]
    print_facts(
        "Outcomes",
        {
            "starved or not": f"right for {right} of {sum(starved.values())} runs; {starved['fn']} missed, "
            f"{starved['fp']} false alarms",
            "start-up": f"right for {startup['agree']} of {startup['agree'] + startup['disagree']} servers",
        },
    )
    for model in models:
        optima = [
            {
                "workload": each["scenario"],
                "best A, S": _point(each["measured"]),
                "chosen A, S": _point(each["chosen"]),
                "starved": each["chosen"]["starved"],
                "regret %": None if each["regret"] is None else 100.0 * each["regret"],
            }
            for each in scores["optima"]
            if each["model"] == model
        ]
        print_table(f"{model}: best configuration, measured and chosen", optima, empty="no workload with a grid")
    if "transfer" in scores:
        rows = [
            {
                "model": model,
                "error": f"± {100 * told['capacity_error']:.1f} %",
                "in the interval": "–" if told["in_interval"] is None else f"{100 * told['in_interval']:.0f} %",
                "corrected by": ", ".join(told["corrected_by"]),
            }
            for model, told in scores["transfer"].items()
        ]
        print_table("Derived calibrations (90 % intervals)", rows)


def _errors(scores: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a row of errors, of single workloads only those that fit beside their names."""
    least = ("runs", "throughput_smape", "itl_smape", "ttft_smape", "tpot_smape")
    return {_TITLES.get(what, what): scores[what]} | {
        _TITLES.get(name, name): None if value is None else round(value, 2)
        for name, value in scores.items()
        if name in least or (what == "model" and name in _TITLES and name != "scenario")
    }


def _point(found: dict[str, Any]) -> str:
    return "–" if found["max_loras"] is None else f"{found['max_cpu_loras']}, {found['max_loras']}"
