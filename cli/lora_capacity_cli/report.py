"""``lora-capacity report``: the recommendation as a page to read, and its figures."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity_cli.files import check_output, write_file
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, format_option
from lora_capacity_cli.output import print_facts, print_json
from lora_capacity_cli.runtime import progress_bar
from lora_capacity_cli.search import recommend, search_options

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.search import Recommendation
    from lora_capacity.workload import Workload

SUFFIXES = (".html",)


@command(
    epilog=examples(
        "lora-capacity report examples/many_idle.yaml -o many_idle.html",
        "lora-capacity report examples/few_busy.yaml --goodput ttft:500 -o few_busy.html --figures figures",
    )
)
@search_options
@click.option(
    "-o", "--output", type=FILE, default="report.html", show_default=True, metavar="FILE.html", help="Page to write."
)
@click.option(
    "--figures",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Also write every figure as an SVG file to this folder.",
)
@format_option
def report(question: dict[str, Any], output: Path, figures: Path | None, output_format: str) -> None:
    """Write the recommendation as one HTML page.

    The page needs no other files. It shows the recommendation and its launch command, maps over adapters and slots,
    latencies with intervals, the bottleneck of each configuration, what small changes would do, and the assumptions.

    WORKLOAD is a YAML or JSON file. A GRID is 8, 8,16,32 or 8:384:8 (start:stop:step).
    """
    check_output("--output", output, SUFFIXES)
    if figures is not None:
        _make_folder(figures)
    workload, calibration, found = recommend(question)
    written = write_report("--output", output, question, workload, calibration, found, figures)
    summary = {
        "file": str(output),
        "figures": [str(path) for path in written],
        "max_cpu_loras": found.best.max_cpu_loras,
        "max_loras": found.best.max_loras,
        "serve_command": found.serve_command,
    }
    if output_format == "json":
        print_json(summary)
        return
    facts = {"recommended": f"{found.best.max_cpu_loras:,} adapters, {found.best.max_loras:,} slots"}
    print_facts(str(output), facts | ({"figures": f"{len(written)} in {figures}"} if written else {}))


def write_report(
    option: str,
    output: Path,
    question: dict[str, Any],
    workload: "Workload",
    calibration: "Calibration",
    found: "Recommendation",
    figures: Path | None = None,
) -> list[Path]:
    """Write the page of a recommendation, and its figures if a folder is given for them.

    Args:
        option: The option that names the page, for messages.
        output: The page.
        question: What `search_options` gathered.
        workload: The workload.
        calibration: The calibration.
        found: The recommendation.
        figures: Folder of the figures.

    Returns:
        The figures written.

    Raises:
        InputError: If something cannot be written.
    """
    from lora_capacity.reports import build_report

    with progress_bar("parts of the report") as progress:
        built = build_report(workload, calibration, found, settings=question["settings"], progress=progress)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_file(option, output, built.html(note=f"{question['workload'].name}, {today}"))
    return [] if figures is None else _write_figures(figures, built.figures())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--figures", str(folder), f"a folder that can be made ({error.strerror})") from None


def _write_figures(folder: Path, drawings: dict[str, str]) -> list[Path]:
    for name, drawing in drawings.items():
        write_file("--figures", folder / f"{name}.svg", drawing)
    return [folder / f"{name}.svg" for name in drawings]
