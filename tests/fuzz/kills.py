"""Kills long commands at some moment and runs them again: ``python -m tests.fuzz.kills``; 1 if anything is lost."""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lora_capacity_profiling.folder import ProfileFolder
from lora_capacity_profiling.material import write_model
from pyarrow import parquet

from tests.cli.fake_site import WORKLOAD
from tests.cli.test_profile import CAMPAIGN
from tests.fuzz.readers import NAME, PROFILE, RUNS
from tests.fuzz.trial import record
from tests.unit.profiling.conftest import write_packages
from tests.unit.profiling.test_server import command_lines, wait_until

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST_S = 600
"""Seconds that a command may take on a busy machine."""

_COMPILED = 0.7
"""Share of the time of the first run that later ones take, which find compiled code: kills come before they end."""

OLD = b"what was there before"
# Interrupts are heard from the first line of ours on: what Python says while it starts is its own.
START = (
    "from lora_capacity_cli.main import main\n"
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); main()"
)
POOL = {"name": "h100", "calibration": NAME, "most_servers": 2}
ADAPTERS = [{"adapter": f"a{i}", "rank": 16, "rate_per_s": 0.5} for i in range(4)]


def _bytes(path: Path) -> Any:
    return path.read_bytes()


def _labels(path: Path) -> Any:
    """Return labels, but for how long they took."""
    table = parquet.read_table(path)
    about = {key: json.loads(value) for key, value in (table.schema.metadata or {}).items()}
    told = {key: {**value, "seconds": None} for key, value in about.items()}
    return repr((table.to_pydict(), told))  # as text: what is no number equals nothing


def _points(path: Path) -> Any:
    """Return a profile's points, with what failed, and the rows of its tables; what was measured is never the same."""
    points = {each.id: each.failure for each in ProfileFolder(path).finished.values()}
    return sorted(points.items()), {file.name: file.read_text("utf-8").count("\n") for file in path.glob("*.csv")}


@dataclasses.dataclass(frozen=True)
class Long:
    """A command that takes its time.

    Attributes:
        words: The command, which prints its answer as JSON or writes it to the last of them.
        read: Reads what it wrote, as far as that is the same every time; None where it prints.
    """

    words: tuple[str, ...]
    read: Callable[[Path], Any] | None = None


STEADY = ("--engine", "steady")
COMMANDS = {
    "sweep": Long(
        (
            "sweep",
            "w.yaml",
            "--adapters",
            "4,8",
            "--max-loras",
            "2,4",
            "--seeds",
            "3",
            "--engine",
            "event",
            "-o",
            "g.csv",
        ),
        _bytes,
    ),
    "label": Long(("label", "--workloads", "256", "--played", "0", "-o", "labels.parquet"), _labels),
    "fit": Long(("fit", "measured", "-o", "fitted.json"), _bytes),
    "report": Long(("report", "w.yaml", "--adapters", "4,8", "--max-loras", "2,4", *STEADY, "-o", "page.html"), _bytes),
    "validate": Long(("validate", "runs.csv", "--engine", "event", "--format", "json")),
    "place": Long(("place", "fleet.yaml", "--seeds", "1", "--format", "json", "--emit", "servers")),
    "profile": Long(
        ("profile", "tiny", "--campaign", "small.yaml", "--python", sys.executable, "-o", "profile"), _points
    ),
}


@dataclasses.dataclass
class Trials:
    """Commands killed in folders of their own, with one cache of compiled code.

    Attributes:
        root: Where.
        packages: PYTHONPATH of an environment with a vLLM that is none.
        right: What each does when it is left alone: its answer, the names of its files, and how long it takes.
    """

    root: Path
    packages: str
    right: dict[str, tuple[Any, set[str], float]] = dataclasses.field(default_factory=dict)

    def kill(self, name: str, number: signal.Signals, rng: random.Random) -> str:
        """Kill a command at some moment, look, and run it again; return what is wrong, empty if nothing."""
        command = COMMANDS[name]
        if name not in self.right:
            folder, began_s = self._lay_out("right"), time.monotonic()
            answer = self._answer(command, folder, self._run(command, folder))
            self.right[name] = answer, _names(folder), _COMPILED * (time.monotonic() - began_s)
        answer, names, took_s = self.right[name]
        folder = self._lay_out("killed")
        output = folder / command.words[-1]
        holds_file = command.read is not None and name != "profile"
        if holds_file:
            output.write_bytes(OLD)
        with self._start(command, folder) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.0, took_s))
            process.send_signal(number)
            _, said = process.communicate(timeout=LONGEST_S)
        if "Traceback" in said:
            return f"a traceback: {said[-500:]}"
        if holds_file and output.read_bytes() != OLD and command.read and command.read(output) != answer:
            return "the output is neither the old one nor the new one"
        if not wait_until(lambda: not any(f" serve {folder}" in line for line in command_lines().values())):
            return "a server is left"
        finished = _finished(output)
        again = self._answer(command, folder, self._run(command, folder))
        if again != answer:
            return f"another answer when it is run again: {again!r:.2000}, not {answer!r:.2000}"
        if not finished <= _finished(output):
            return "points that were measured are lost"
        return f"other files are left: {_names(folder) ^ names}" if _names(folder) != names else ""

    def _lay_out(self, name: str) -> Path:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "w.yaml").write_text(WORKLOAD, encoding="utf-8")
        (folder / "runs.csv").write_text(RUNS, encoding="utf-8")
        (folder / "small.yaml").write_text(CAMPAIGN, encoding="utf-8")
        requests = yaml.safe_load(WORKLOAD)["requests"]
        fleet = {"adapters": ADAPTERS, "pools": [POOL], "requests": requests, "horizon_s": 60}
        (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet), encoding="utf-8")
        shutil.copytree(PROFILE, folder / "measured")
        write_model(folder / "tiny", num_hidden_layers=1)
        return folder

    def _start(self, command: Long, folder: Path) -> "subprocess.Popen[str]":
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.root / "cache"), "FAKE_VLLM_STEP_S": "0.002"}
        environment["PYTHONPATH"] = os.pathsep.join([self.packages, *sys.path])
        words = [str(folder / word) if word == "tiny" else word for word in command.words]
        return subprocess.Popen(
            ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", START, *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _run(self, command: Long, folder: Path) -> str:
        with self._start(command, folder) as process:
            printed, said = process.communicate(timeout=LONGEST_S)
        assert process.returncode == 0, said
        return printed

    def _answer(self, command: Long, folder: Path, printed: str) -> Any:
        if command.read is not None:
            return command.read(folder / command.words[-1])
        return json.loads(printed) | {"seconds": None}


def _names(folder: Path) -> set[str]:
    """Return the files of a folder, but for logs and what Python keeps."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(each) for each in files if not {"logs", "__pycache__"}.intersection(each.parts)}


def _finished(profile: Path) -> set[str]:
    journal = profile / "points.jsonl"
    return set(journal.read_text("utf-8").splitlines()[:-1]) if journal.exists() else set()


def run(kills: int, seed: int, names: tuple[str, ...] = tuple(COMMANDS)) -> Iterator[tuple[str, str, str]]:
    """Yield the command, the signal and what was wrong of so many kills, spread evenly over commands and signals."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        trials = Trials(Path(root), write_packages(Path(root)))
        for number in range(kills):
            name, chosen = names[number % len(names)], SIGNALS[number // len(names) % len(SIGNALS)]
            yield name, chosen.name, trials.kill(name, chosen, rng)


def main() -> None:
    """Kill commands and tell how that went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=42)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="result file of the Trust page to keep the counts in")
    asked = parser.parse_args()
    outcomes = collections.Counter[str]()
    of_commands: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, number, fault in run(asked.kills, asked.seed):
        outcomes["lost something" if fault else "lost nothing"] += 1
        of_commands[name].update([number, "lost"] if fault else [number])
        if asked.record is not None:  # at once: a machine that has no more time has tried these
            record(asked.record, "kills", {"seed": asked.seed, "commands": of_commands})
        if fault:
            sys.stdout.write(f"{name}, {number}: {fault}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{asked.kills} kills: {dict(outcomes)}\n")
    sys.exit(1 if outcomes["lost something"] else 0)


if __name__ == "__main__":
    main()
