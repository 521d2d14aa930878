"""How long a newcomer waits: the Start page followed to the letter in a fresh clone, from nothing installed.

python benchmarks/first_recommendation.py --json results.json

The clone is of what is committed. Its commands see a home folder of their own, empty, and no variable of this shell but
those that tell pip where packages are.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import REPOSITORY, environment

BLOCK = re.compile(r"^```(console|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WORKLOAD = "my_workload.yaml"


def main() -> None:
    """Follow the page, print what each command took and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        steps = follow(Path(folder))
    for step in steps:
        print(f"{step['seconds']:7.1f} s  {step['command']}\n           {step['first_line']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": where, "steps": steps}, indent=2) + "\n", encoding="utf-8")


def follow(folder: Path) -> list[dict[str, Any]]:
    """Clone, install by `make recommend`, and do what the page says: run its commands, write the file that it shows."""
    clone, home = folder / "lora-capacity", folder / "home"
    home.mkdir()
    variables = {"HOME": str(home), "PATH": PATH} | {
        name: value for name, value in os.environ.items() if name.startswith("PIP_")
    }
    steps = [run(f"git clone --quiet {REPOSITORY} {clone}", folder, variables) | {"command": "git clone"}]
    steps.append(run("make recommend", clone, variables))
    variables["PATH"] = f"{clone}/.venv/bin:{PATH}"
    for kind, content in BLOCK.findall((clone / "docs" / "index.md").read_text(encoding="utf-8")):
        if kind == "yaml":
            (clone / WORKLOAD).write_text(content, encoding="utf-8")
            continue
        commands = [line.removeprefix("$ ") for line in content.splitlines() if line.startswith("$ ")]
        steps += [run(command, clone, variables) for command in commands]
    return steps


def run(command: str, folder: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Run a command as a shell does; it must succeed."""
    start = time.perf_counter()
    done = subprocess.run(["bash", "-ec", command], cwd=folder, env=variables, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    lines = done.stdout.decode().strip().splitlines()
    answers = [line for line in lines if line.startswith("Serve ")] or lines or [""]
    return {"command": command, "seconds": seconds, "first_line": answers[0].strip()}


if __name__ == "__main__":
    main()
