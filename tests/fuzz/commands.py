"""Commands with one option damaged, run in this process."""

import random
import shutil
from pathlib import Path

import yaml
from click import Option
from click.testing import CliRunner, Result
from lora_capacity_cli.main import main

from tests.fuzz import damage
from tests.fuzz.readers import METRICS, NAME, RUNS, WORKLOAD

BASES: dict[str, tuple[str, ...]] = {
    "memory": ("--model", "Qwen3-8B", "--gpu", "L40S", "--max-loras", "8", "--max-lora-rank", "16"),
    "simulate": ("w.yaml", "--adapters", "4", "--max-loras", "2"),
    "predict": ("w.yaml",),
    "rules": ("--target", "slots"),
    "validate": ("runs.csv",),
    "calibrations show": (NAME,),
    "observe": (
        *("0.txt", "2.txt", "--workload", "w.yaml", "--model", "m", "--adapters", "4", "--max-lora-rank", "16"),
        *("--max-num-seqs", "16", "--max-num-batched-tokens", "2048", "--window", "50s", "-o", "observed.csv"),
    ),
}
"""A right line of each command that answers at once."""

VALUES = (
    *("0", "-1", "1", "2", "1e9", "1000000000", "99999999999999999999", "1e39", "nan", "inf", "0.5", "-0.5", "", " "),
    *(
        "x",
        "ttft:1e400",
        "ttft:nan",
        "1,2",
        "1:1000000000",
        "8:4",
        "1:2:0",
        "\x1b[2J",
        "\u202e",
        "no/such/file",
        "/dev/zero",
    ),
    *("no/such/file", "/dev/zero", "folder", "w.yaml", "runs.csv", "none", "--help", "[bold]", "é", "1_0", "١"),
)

SETTLED = (0, 1, 2)
"""Exit codes of an answer, of nothing feasible, and of bad input."""


def lay_out(folder: Path) -> None:
    """Write the files that the commands read."""
    (folder / "w.yaml").write_text(yaml.safe_dump(WORKLOAD | {"arrivals": {"process": "poisson"}}), encoding="utf-8")
    (folder / "runs.csv").write_text(RUNS, encoding="utf-8")
    for number in (0, 2):
        shutil.copy(METRICS / f"metrics-0.32.0-{number}.txt", folder / f"{number}.txt")
    (folder / "folder").mkdir()


def line(rng: random.Random) -> list[str]:
    """Return a command of which one or two options have another value, or an argument is another."""
    name = rng.choice(list(BASES))
    words = list(BASES[name])
    command = main
    for word in name.split():
        command = command.commands[word]  # type: ignore[attr-defined,assignment]
    options = [each for each in command.params if isinstance(each, Option)]
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.2:
            words[rng.randrange(len(words))] = rng.choice(VALUES)
            continue
        option = rng.choice(options)
        flag = option.opts[-1]
        words += [flag] if option.is_flag else [flag, rng.choice((*VALUES, *map(str, damage.TEXTS[:12])))]
    return [*name.split(), *words]


def run(words: list[str]) -> Result:
    """Run a command."""
    return CliRunner().invoke(main, words)


def fault(result: Result) -> str:
    """Say what is wrong with what a command did; nothing if it answered, or refused in one printable line."""
    if result.exit_code not in SETTLED:
        return f"exit code {result.exit_code}: {result.stderr[-300:]}"
    if not result.output.replace("\n", "").isprintable():
        return "characters that a terminal acts upon"
    errors = [each for each in result.stderr.splitlines() if each.startswith("error: ")]
    if result.exit_code and len(errors) != 1:
        return f"{len(errors)} lines of errors: {result.stderr[-300:]}"
    return ""
