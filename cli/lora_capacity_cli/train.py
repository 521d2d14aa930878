"""``lora-capacity train``: models from labels."""

from pathlib import Path
from typing import Any

import click

from lora_capacity.words import shown
from lora_capacity_cli.files import check_output, writing
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, format_option
from lora_capacity_cli.output import print_facts, print_json, print_table, say
from lora_capacity_cli.runtime import prepare, progress_bar


@command(epilog=examples("lora-capacity train labels.parquet -o surrogate.json"))
@click.argument("labels", type=FILE)
@click.option(
    "--calibration",
    metavar="NAME|FILE",
    help="Calibration of the labels. [default: bundled, by the name in the labels]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the training.")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE.json", help="File to write.")
@click.option(
    "--smooth",
    type=FILE,
    metavar="FILE.json",
    help="Also train a neural surrogate, which can be differentiated, for `predict --smooth`.",
)
@format_option
def train(
    labels: Path, calibration: str | None, seed: int, output: Path, smooth: Path | None, output_format: str
) -> None:
    """Train a surrogate (a decision tree and gradient boosting) on labels.

    LABELS is a file written by `label`. A surrogate predicts the best adapters and slots for a workload, the throughput
    there, and whether given adapters and slots starve. It is scored on held-out workloads.
    """
    check_output("--output", output, (".json",))
    if smooth is not None:
        check_output("--smooth", smooth, (".json",))
    prepare()
    from lora_capacity.calibration import load_calibration
    from lora_capacity.surrogate import Dataset, train_neural, train_surrogate

    known = Dataset.read(labels)
    fitted = load_calibration(calibration or known.about["calibration"])
    with progress_bar("models") as progress:
        surrogate = train_surrogate(fitted, known, seed=seed, progress=progress)
    with writing("--output", output):
        surrogate.write(output)
    if smooth is not None:
        with writing("--smooth", smooth):
            train_neural(fitted, known, seed=seed).write(smooth)
    if output_format == "json":
        told = {name: dict(getattr(surrogate, name)) for name in ("best", "scores", "importance", "about")}
        print_json({"file": str(output), "calibration": surrogate.calibration} | told)
    else:
        _print(output, surrogate)


_SCORES = {
    "adapters_smape": "adapters SMAPE %",
    "slots_smape": "slots SMAPE %",
    "throughput_smape": "throughput SMAPE %",
    "starved_macro_f1": "starved macro-F1",
}


def _print(output: Path, surrogate: Any) -> None:
    about, scores = surrogate.about, surrogate.scores
    workloads = f"{about['trained_on']:,} trained on, {about['held_back']:,} held out"
    print_facts(f"{output}", {"calibration": surrogate.calibration, "workloads": workloads})
    rows = [{"model": kind} | {_SCORES[name]: each[name] for name in _SCORES} for kind, each in scores.items()]
    print_table("Held-out workloads", rows)
    coverage = scores["best"]["coverage"]
    rows = [
        {"interval": f"{float(level):.0%}"} | {target: 100.0 * shares[level] for target, shares in coverage.items()}
        for level in next(iter(coverage.values()))
    ]
    print_table("Held-out labels within intervals, %", rows)
    for target, lost in surrogate.importance.items():
        most = ", ".join(f"{name} {shown(value)}" for name, value in list(lost.items())[:4])
        say(f"Most important features for {target}: {most}")
