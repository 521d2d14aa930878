"""``lora-capacity calibrations``: which there are, where they are from, how good they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity_cli.completion import CALIBRATION
from lora_capacity_cli.files import check_output, writing
from lora_capacity_cli.options import FILE, Modules, derivation_options, examples, format_option
from lora_capacity_cli.output import print_facts, print_json, print_table, shown

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration

_ACCURACY = ("runs", "throughput_smape", "itl_smape", "starved_right")


@click.group(
    epilog=examples(
        "lora-capacity calibrations",
        "lora-capacity calibrations show llama-3.1-8b-instruct-h100-64gb --format json",
    ),
    invoke_without_command=True,
)
@format_option
@click.pass_context
def calibrations(ctx: click.Context, output_format: str) -> None:
    """List the calibrations that come with the package.

    `calibrations show NAME` prints one in full.
    """
    if ctx.invoked_subcommand is not None:
        return
    from lora_capacity.calibration import bundled_names, load_calibration

    found = [_summary(load_calibration(name)) for name in bundled_names()]
    if output_format == "json":
        print_json(found)
    else:
        print_table("Calibrations; errors on held-out scenarios", [_row(each) for each in found])


@calibrations.command(
    epilog=examples(
        "lora-capacity calibrations show llama-3.1-8b-instruct-h100-64gb",
    )
)
@click.argument("name", type=CALIBRATION, metavar="NAME|FILE")
@format_option
def show(name: str, output_format: str) -> None:
    """Show a calibration: coefficients, ranges, errors and provenance."""
    from lora_capacity.calibration import load_calibration

    content = load_calibration(name).to_json()
    if output_format == "json":
        print_json(content)
        return
    single = {key: value for key, value in content.items() if not isinstance(value, (dict, list))}
    print_facts(content["name"], {key.replace("_", " "): shown(value) for key, value in single.items()})
    content["accuracy"].pop("coefficient_correlations", None)  # for programs: a triangle of numbers
    for key, value in content.items():
        if isinstance(value, dict) and value:
            print_facts(key.replace("_", " "), dict(_flat(value)))


@calibrations.command(
    epilog=examples(
        "lora-capacity calibrations derive --model Qwen3-8B --gpu L40S -o qwen3-8b-l40s.json",
        "lora-capacity calibrations derive --model Llama-3.3-70B-Instruct --gpu H100 --tensor-parallel-size 4",
    )
)
@derivation_options
@click.option("--enforce-eager", is_flag=True, help="Without CUDA graphs.")
@click.option("--fully-sharded-loras", is_flag=True, help="Shard adapters over the GPUs too.")
@click.option(
    "--target-modules",
    type=Modules(),
    default="all-linear",
    show_default=True,
    help="Adapted modules: all-linear, attention, or names separated by commas. Before vLLM 0.19 kernels run for all.",
)
@click.option(
    "--efficiencies", type=FILE, metavar="FILE.json", help="File written by `fit SPEEDS.csv`. [default: bundled]"
)
@click.option("--name", help="Name of the calibration. [default: model and GPU]")
@click.option("-o", "--output", type=FILE, metavar="FILE.json", help="File to write.")
@format_option
def derive(
    derived: dict[str, Any],
    enforce_eager: bool,
    fully_sharded_loras: bool,
    target_modules: str | tuple[str, ...],
    efficiencies: Path | None,
    name: str | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Derive a calibration from a model's shape and a GPU's data sheet.

    Every coefficient has an error. Measured calibrations of the same GPU reduce it, and a few runs of your own correct
    it (`fit --prior`).
    """
    from lora_capacity.calibration import Efficiencies, derive_calibration
    from lora_capacity.memory import Deployment

    for option in ("model", "gpu"):
        if option not in derived:
            raise InputError(f"--{option}", None, "a model and a GPU")
    if output is not None:
        check_output("--output", output, (".json",))
    of = {
        option: derived.pop(option) for option in ("model", "gpu", "quantization", "vllm_version") if option in derived
    }
    found = derive_calibration(
        **of,
        deployment=Deployment(**derived, enforce_eager=enforce_eager, fully_sharded_loras=fully_sharded_loras),
        target_modules=target_modules,
        name=name,
        efficiencies=None if efficiencies is None else Efficiencies.from_file(efficiencies),
    )
    if output is not None:
        with writing("--output", output):
            found.save(output)
    content = found.to_json()
    if output_format == "json":
        print_json(content)
        return
    errors = found.accuracy["coefficient_errors"]
    rows = [
        {
            "coefficient": name,
            "value": f"{entry['value']:.4g} {entry['unit']}",
            "error": _percent(errors.get(name)),
            "from": found.provenance["rests_on"].get(name, ""),
        }
        for group in content["coefficients"].values()
        for name, entry in group.items()
    ]
    written = f", written to {output}" if output is not None else ""
    print_table(f"{found.name}: step times within ± {100 * found.capacity_error:.0f} %{written}", rows)


def _percent(error: float | None) -> str:
    return "" if error is None else f"± {100 * error:.0f} %"


def _summary(calibration: "Calibration") -> dict[str, Any]:
    held_back = calibration.accuracy.get("held_back_by_scenario", {})
    return {
        "name": calibration.name,
        "model": calibration.model.name,
        "gpu": calibration.gpu.name,
        "vllm_version": calibration.vllm_version,
        "fitted_over": dict(calibration.fitted_ranges),
        "capacity_error": calibration.capacity_error,
        "held_back": {name: held_back.get(name) for name in _ACCURACY},
    }


def _row(summary: dict[str, Any]) -> dict[str, Any]:
    held_back = summary["held_back"]
    return {
        "name": summary["name"],
        "vLLM": summary["vllm_version"],
        "fitted over": ", ".join(f"{name} {low:g}-{high:g}" for name, (low, high) in summary["fitted_over"].items()),
        "throughput SMAPE %": held_back["throughput_smape"],
        "ITL SMAPE %": held_back["itl_smape"],
    }


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values under dotted names; a coefficient with its unit."""
    rows: list[tuple[str, str]] = []
    for key, each in value.items():
        if isinstance(each, dict) and set(each) == {"value", "unit"}:
            rows.append((prefix + key, f"{each['value']:.4g} {each['unit']}"))
        elif isinstance(each, dict):
            rows += _flat(each, f"{prefix}{key}.")
        elif isinstance(each, list):
            rows.append((prefix + key, " to ".join(map(shown, each)) if len(each) == 2 else ", ".join(map(str, each))))
        else:
            rows.append((prefix + key, shown(each)))
    return rows
