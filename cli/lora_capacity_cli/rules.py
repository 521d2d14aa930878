"""``lora-capacity rules``: the tree of a surrogate, to be read."""

from pathlib import Path
from typing import Any

import click

from lora_capacity.words import shown
from lora_capacity_cli.files import check_output, write_file
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, format_option, refuse_given, server_options
from lora_capacity_cli.output import print_json, print_table, say
from lora_capacity_cli.runtime import prepare
from lora_capacity_cli.surrogates import calibration_of_option, load_both, surrogate_option


@command(
    epilog=examples(
        "lora-capacity rules --target slots",
        "lora-capacity rules --target adapters --workload examples/few_busy.yaml --figure rules.svg",
    )
)
@surrogate_option
@calibration_of_option
@click.option(
    "--target",
    type=click.Choice(["adapters", "slots", "throughput", "starved"]),
    default="adapters",
    show_default=True,
    help="What the rules predict.",
)
@click.option("--workload", type=FILE, metavar="FILE", help="Also show the path to the answer for this workload.")
@click.option("--figure", type=FILE, metavar="FILE.svg", help="Also draw the tree.")
@server_options(grids=False, caches=False)
@format_option
def rules(
    surrogate: str,
    calibration: str | None,
    target: str,
    workload: Path | None,
    figure: Path | None,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Print the decision tree of a surrogate as rules, and the most important features.

    Numbers are rounded to two digits; the accuracy lost is shown. Server settings apply to --workload.
    """
    if figure is not None:
        check_output("--figure", figure, (".svg",))
    if workload is None:
        refuse_given(("calibration", *settings), "rules without --workload", "it is for the workload's path")
    prepare()
    from lora_capacity.surrogate import load_surrogate, rules_of

    path: list[dict[str, Any]] = []
    if workload is None:
        model = load_surrogate(surrogate)
    else:
        model, known = load_both(surrogate, calibration)
        path = _path(model, known, target, workload, settings)
    found = rules_of(model, target)
    if figure is not None:
        from lora_capacity.reports.rules import draw_rules

        write_file("--figure", figure, draw_rules(found.to_json()))
    importance = dict(model.importance[target])
    if output_format == "json":
        print_json(found.to_json() | {"importance": importance, "path": path})
        return
    say(found.text())
    if path:
        rows = [
            {
                "feature": each["feature"],
                "is": shown(each["value"]),
                "": ">" if each["above"] else "<=",
                "threshold": shown(each["threshold"]),
                "meaning": each["meaning"],
            }
            for each in path
        ]
        print_table("Path to the answer for this workload", rows)
    what = "macro-F1 lost" if target == "starved" else "SMAPE gained"
    rows = [{"feature": name, f"{what} when shuffled": value} for name, value in list(importance.items())[:8]]
    print_table("Most important features of the best model", rows)


def _path(model: Any, known: Any, target: str, workload: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    import numpy as np

    from lora_capacity.scenarios.workload_batch import WorkloadBatch
    from lora_capacity.surrogate import describe, path_of, with_slots
    from lora_capacity.workload import Workload

    described = describe(known, WorkloadBatch.of(Workload.from_file(workload), known, **settings))
    values = described.values
    if target == "starved":
        best = np.rint(np.exp(model.of("slots").predict(values))).astype(int)
        values = with_slots(values, best[:, np.newaxis])[:, 0]
    return path_of(model, target, values[0])
