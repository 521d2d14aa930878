"""Write the Coverage page: which models are measured, derived or not covered on which GPU.

``python docs/generate_coverage.py --derive`` derives a calibration of every bundled shape on every GPU of the
catalogue, which takes half a minute, and keeps how sure each is in ``docs/data/coverage.json``; without the option it
only writes the page from that.
"""

import json
import statistics
import sys
from typing import Any

from generated import DATA, fill, read_data, row, table

from lora_capacity import ModelShape, ServerConfig, plan_memory
from lora_capacity.calibration import Calibration, bundled_names, derive_calibration, load_calibration
from lora_capacity.engines import NEWEST, VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.hardware import Processor, catalogue
from lora_capacity.memory import Deployment, EstimatedTerms
from lora_capacity.models import bundled_shapes, find_shape
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB

GPUS_TRIED = (1, 2, 4, 8)
SLOT = {"max_loras": 1, "max_lora_rank": 16}
MAX_MODEL_LEN = 4096
LARGEST_GIB = {
    "under 20 GiB": 20,
    "20 to 35 GiB": 35,
    "35 to 70 GiB": 70,
    "70 to 110 GiB": 110,
    "110 GiB and more": 1e9,
}
"""Tables of the page: GPUs by memory, so that none is wide."""


def derive() -> dict[str, Any]:
    """Ask the library about every pair of model and GPU."""
    measured = [load_calibration(name) for name in bundled_names()]
    gpus = list(catalogue().values())
    return {
        "vllm_version": NEWEST,
        "gpus": {gpu.name: round(gpu.gpu.memory_bytes / BYTES_PER_GIB, 2) for gpu in gpus},
        "models": {name: [covered(find_shape(name), gpu, measured) for gpu in gpus] for name in one_name_each()},
    }


def one_name_each() -> list[str]:
    """Return the names of the bundled shapes, the first of those that share one."""
    first: dict[int, str] = {}
    for name, config in bundled_shapes().items():
        first.setdefault(id(config), name)
    return list(first.values())


def covered(model: ModelShape, gpu: Processor, measured: list[Calibration]) -> list[Any]:
    """Return how a model is covered on a GPU, on how many, and the error of its step times.

    The error is the standard deviation of the logarithm; None where only the memory is known or it does not fit.
    """
    gpus = next((count for count in GPUS_TRIED if fits(model, gpu, count)), None)
    if gpus is None:
        return ["does not fit", None, None]
    for each in measured:
        if gpus == 1 and (each.model.hf_id, each.gpu.name) == (model.hf_id, gpu.name):
            return ["measured", gpus, each.capacity_error]
    try:
        derived = derive_calibration(model, gpu, deployment=Deployment(tensor_parallel_size=gpus), measured=measured)
    except InputError:
        return ["memory only", gpus, None]
    return ["derived", gpus, derived.capacity_error]


def fits(model: ModelShape, gpu: Processor, gpus: int) -> bool:
    """Whether a server starts with one slot on so many GPUs, as far as is expected."""
    behaviour = VllmBehaviour.for_version(NEWEST)
    length = min(MAX_MODEL_LEN, model.max_position_embeddings)
    server = ServerConfig.with_defaults(behaviour, gpu.gpu, model, max_model_len=length, **SLOT)
    deployment = Deployment(tensor_parallel_size=gpus)
    try:
        plan = plan_memory(
            model, gpu.gpu, EstimatedTerms.bundled(), behaviour=behaviour, deployment=deployment, **server.planned
        )
    except InputError:  # so many GPUs do not divide it
        return False
    return plan.status.item() == Status.OK


def write(content: dict[str, Any]) -> None:
    """Write the result file, a line for each model."""
    models = ",\n".join(f"  {json.dumps(name)}: {json.dumps(cells)}" for name, cells in content["models"].items())
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(content[key])}" for key in ("vllm_version", "gpus"))
    text = f'{{\n{head},\n "models": {{\n{models}\n }}\n}}\n'
    (DATA / "coverage.json").write_text(text, encoding="utf-8")


def by_gpu(data: dict[str, Any]) -> str:
    """Render what each GPU holds, and how sure step times on it are."""
    columns = dict(zip(data["gpus"], zip(*data["models"].values(), strict=True), strict=True))
    counts = {kind: sum(cell[0] == kind for cells in columns.values() for cell in cells) for kind in
              ("measured", "derived", "memory only", "does not fit")}  # fmt: skip
    models = len(data["models"])
    lines = [
        f"{models} models on {len(columns)} GPUs, with vLLM {data['vllm_version']}: {counts['measured']} pairs are "
        f"measured, {counts['derived']:,} derived, {counts['memory only']} known by their memory only; "
        f"{counts['does not fit']} do not fit on {GPUS_TRIED[-1]} GPUs.",
        "",
        *table("GPU", "GiB", "models on one", f"on up to {GPUS_TRIED[-1]}", "derived: ± %, median (range)"),
    ]
    for name, cells in columns.items():
        errors = [100 * error for kind, _, error in cells if kind == "derived"]
        told = f"{statistics.median(errors):.0f} ({min(errors):.0f} to {max(errors):.0f})" if errors else "–"
        held = [gpus for _, gpus, _ in cells if gpus is not None]
        lines.append(row(name, f"{data['gpus'][name]:.0f}", held.count(1), len(held), told))
    return "\n".join(lines)


def by_model(data: dict[str, Any]) -> str:
    """Render a table for each range of memory: a row a model, a column a GPU."""
    lines: list[str] = []
    smallest = 0.0
    for title, largest in LARGEST_GIB.items():
        shown = [(at, name) for at, (name, gib) in enumerate(data["gpus"].items()) if smallest <= gib < largest]
        smallest = largest
        lines += [f"### {title}", "", *table("model", *(name for _, name in shown))]
        for model, cells in data["models"].items():
            lines.append(row(model.rpartition("/")[2], *(cell(*cells[at]) for at, _ in shown)))
        lines.append("")
    return "\n".join(lines).rstrip()


def cell(kind: str, gpus: int | None, error: float | None) -> str:
    """Return a cell of the tables by model."""
    if kind == "does not fit":
        return "–"
    told = "memory" if error is None else f"± {100 * error:.0f}"
    told = f"**{told}**" if kind == "measured" else told
    return told if gpus == 1 else f"{gpus}× {told}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--derive"]:
        write(derive())
    data = read_data("coverage")
    fill("coverage.md", by_gpu=by_gpu(data), by_model=by_model(data))
