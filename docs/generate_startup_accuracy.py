"""Write what the Accuracy page tells of the memory of any model on any GPU.

``python docs/generate_startup_accuracy.py STARTUPS.csv MODELS.csv`` asks ``lora-capacity validate --startup``, keeps
its scores in ``docs/data/startup_accuracy.json`` and writes the page's table from them; without the tables it only
writes that.
"""

import json
import subprocess
import sys
from typing import Any

from generated import fill, read_data, row, table, write_data

_FITS = {
    "bundled": ("the bundled terms", ()),
    "gpu": ("the GPU's kind held out", ("--leave-out", "gpu")),
    "family": ("the model's family held out", ("--leave-out", "family")),
}
_TITLES = ("KV tokens, median error", "within 5 %", "within 15 %", "in the interval", "outcome right")
_KINDS = {"by_tensor_parallel_size": "TP {}", "by_lora": "{}"}


def measure(startups: str, models: str) -> dict[str, Any]:
    """Ask the command for the scores of each fit; single starts are left out."""
    command = [sys.executable, "-m", "lora_capacity_cli", "validate", "--startup", startups, "--models", models]
    scores = {}
    for name, (_, words) in _FITS.items():
        answer = subprocess.run([*command, *words, "--format", "json"], check=True, capture_output=True, text=True)
        scores[name] = json.loads(answer.stdout)["summary"]
    return scores


def accuracy(data: dict[str, Any]) -> str:
    """Render the scores of each fit, and of the bundled one by kind."""
    lines = table("terms", "starts", "answered", *_TITLES)
    lines += [_row(words, data[name]) for name, (words, _) in _FITS.items()]
    bundled = data["bundled"]
    for by, words in _KINDS.items():
        lines += [_row(f"the bundled terms, {words.format(kind)}", scores) for kind, scores in bundled[by].items()]
    quantized = [scores for kind, scores in bundled["by_quantization"].items() if kind != "none" and scores["kv_rows"]]
    close = sum(scores["kv_within_15_percent"] * scores["kv_rows"] for scores in quantized)
    total = sum(scores["kv_rows"] for scores in quantized)
    kinds = sum(scores["kv_rows"] > 0 for scores in bundled["by_gpu"].values())
    load = 100 * bundled["load_median_error"]
    told = f"The answered starts ran on {kinds} kinds of GPUs. Of the {total} with quantized weights {round(close)} are"
    lines += ["", f"{told} within 15 %. Weights and slots are off by {load:.2f} % in the median."]
    return "\n".join(lines)


def _row(words: str, scores: dict[str, Any]) -> str:
    shares = (scores[name] for name in ("kv_within_5_percent", "kv_within_15_percent", "kv_inside_interval"))
    told = ("–" if share is None else f"{100 * share:.0f} %" for share in shares)
    median = scores["kv_median_error"]
    return row(
        words,
        scores["rows"],
        scores["answered"],
        "–" if median is None else f"{100 * median:.1f} %",
        *told,
        f"{scores['outcomes_right']} of {scores['outcomes']}",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_data("startup_accuracy", measure(*sys.argv[1:]))
    fill("accuracy.md", startups=accuracy(read_data("startup_accuracy")))
