"""``lora-capacity predict``: a surrogate's answer for one workload."""

import math
from pathlib import Path
from typing import Any

import click

from lora_capacity.errors import InputError
from lora_capacity.words import percent, shown
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, format_option, server_options, workload_argument
from lora_capacity_cli.output import print_facts, print_json, print_table, print_warnings
from lora_capacity_cli.runtime import prepare
from lora_capacity_cli.surrogates import calibration_of_option, load_both, surrogate_option


@command(
    epilog=examples(
        "lora-capacity predict examples/few_busy.yaml",
        "lora-capacity predict examples/few_busy.yaml --adapters 24 --max-loras 12 --check --format json",
    )
)
@workload_argument
@surrogate_option
@calibration_of_option
@click.option(
    "--kind",
    type=click.Choice(["best", "tree", "boosting"]),
    default="best",
    show_default=True,
    help="Model that answers; best: the best in cross-validation, for each target.",
)
@click.option(
    "--level",
    type=click.Choice(["0.5", "0.8", "0.9", "0.95"]),
    default="0.9",
    show_default=True,
    help="Level of the intervals.",
)
@click.option("--adapters", type=click.IntRange(min=1), help="Adapters to check for starvation, with --max-loras.")
@click.option("--max-loras", type=click.IntRange(min=1), help="Slots to check for starvation, with --adapters.")
@click.option("--check", is_flag=True, help="Also ask the steady twin about the same configuration.")
@click.option(
    "--smooth",
    type=FILE,
    metavar="FILE.json",
    help="Also ask a neural surrogate, written by `train --smooth`, for throughput, headroom and sensitivities.",
)
@server_options(grids=False, caches=False)
@format_option
def predict(
    workload: Path,
    surrogate: str,
    calibration: str | None,
    kind: str,
    level: str,
    adapters: int | None,
    max_loras: int | None,
    check: bool,
    smooth: Path | None,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Predict the best adapters and slots in microseconds, with a surrogate.

    WORKLOAD is a YAML or JSON file. With --adapters and --max-loras the answer also says whether these starve.

    Surrogates are trained for vLLM's default --max-lora-rank, --max-model-len, --block-size and --target-modules; other
    values are refused.
    """
    if (adapters is None) != (max_loras is None):
        raise InputError("--adapters" if adapters is None else "--max-loras", "none", "both or neither")
    prepare()
    from lora_capacity.surrogate import NeuralSurrogate, predict_workload
    from lora_capacity.workload import Workload

    asked = Workload.from_file(workload)
    model, known = load_both(surrogate, calibration)
    given = None if adapters is None or max_loras is None else (adapters, max_loras)
    answer = predict_workload(
        model,
        known,
        asked,
        kind=kind,
        level=float(level),
        given=given,
        check=check,
        smooth=None if smooth is None else NeuralSurrogate.from_file(smooth),
        settings=settings,
    )
    if output_format == "json":
        print_json(answer.to_dict())
    else:
        _print(answer)


def _print(answer: Any) -> None:
    def within(name: str, value: float) -> str:
        (low, high), (least, most) = answer.twin_intervals[name], answer.intervals[name]
        return f"{shown(value)}; twin {shown(low)} to {shown(high)}, server {shown(least)} to {shown(most)}"

    facts = {
        "adapters (max_cpu_loras)": within("adapters", answer.max_cpu_loras),
        "slots (max_loras)": within("slots", answer.max_loras),
        "throughput (input + output tokens/s)": within("throughput", answer.throughput_tokens_per_s),
    }
    facts["offered load (tokens/s)"] = shown(answer.offered_tokens_per_s)
    if answer.given:
        verdict = "starves" if answer.given["starved"] else "keeps up"
        verdict = verdict if answer.given["starts"] else "does not start"
        facts[f"{answer.given['max_cpu_loras']} adapters, {answer.given['max_loras']} slots"] = (
            f"{verdict}; starves at {shown(answer.given['critical_load'])}× this load"
        )
    if answer.check:
        check = answer.check
        facts["steady twin"] = (
            f"{check['status']}, {shown(check['throughput_tokens_per_s'])} of {shown(check['offered_tokens_per_s'])} "
            f"tokens/s, {'starved' if check['starved'] else 'not starved'}; "
            f"P(starved) {percent(check['starving_probability'])}"
        )
    if answer.smooth:
        smooth = answer.smooth
        facts[f"neural, {smooth['max_cpu_loras']} adapters, {smooth['max_loras']} slots"] = (
            f"{shown(smooth['throughput_tokens_per_s'])} of {shown(smooth['offered_tokens_per_s'])} tokens/s; "
            f"starves at {shown(math.exp(smooth['margin']))}× this load"
        )
    print_facts(f"Surrogate's answer, with {answer.level:.0%} intervals", facts)
    if answer.smooth:
        rows = [
            {"1 % more": name.replace("_", " "), "throughput, %": each["log_throughput"], "headroom, %": each["margin"]}
            for name, each in answer.smooth["sensitivities"].items()
        ]
        print_table("Sensitivity: what 1 % more of a quantity changes", rows)
    print_warnings(answer.warnings)
