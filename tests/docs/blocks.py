"""Runs the code blocks of a page in the order in which they stand, and compares what they print with what is shown.

A ``python`` block shares its names with those before it; a ``text`` block right below one is what it prints. In a
``console`` block, lines after ``$`` are commands and the lines below one are what it prints, if any are shown; ``...``
stands for anything. A workload in a ``yaml`` block is ``my_workload.yaml`` from there on. ``<!--- skip: next -->``
above a block leaves it out: commands that another stage of continuous integration runs, as tests/contracts makes sure.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent

import yaml
from lora_capacity_profiling.campaign import Campaign
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from lora_capacity.fleet import Fleet
from lora_capacity.workload import Workload
from tests.cli.test_bad_input import RUN
from tests.docs.servers import PYTHON, servers, write_material

EXAMPLES = Path(__file__).parents[2] / "examples"

# Short requests: servers are sent some of them, for seconds.
WORKLOAD = """
adapters:
  mix: {rates_per_s: [0.4, 0.2], ranks: [8, 16]}
requests:
  input_tokens: {mean: 30, std: 10, min: 4, max: 60}
  output_tokens: {mean: 12, std: 5, min: 2, max: 30}
"""
TABLES = {
    "adapters.csv": "adapter,rank,rate_per_s\na,8,0.5\nb,16,0.1\n",
    "requests.csv": "arrival_s,adapter,input_tokens,output_tokens\n0,a,10,20\n1,b,30,40\n2,,50,60\n3,a,70,80\n",
    "serving_runs.csv": f"{','.join(RUN)}\n{','.join(RUN.values())}\n",
    "my_workload.yaml": WORKLOAD,
    "space.yaml": "rates_per_s: {min: 0.05, max: 0.8}\nranks: [8, 16]\n",
}
UPDATE = os.environ.get("LORA_CAPACITY_UPDATE_DOCS", "") not in ("", "0")
_COMMAND = re.compile(r"^\$ (.*(?:\n> .*)*)\n?", re.MULTILINE)


def run_page(page: Path, folder: Path) -> None:
    """Run every block of a page.

    Args:
        page: The page; where `UPDATE` is set, what its blocks print is written into it.
        folder: Where the blocks run.
    """
    updates: list[tuple[int, int, str]] = []
    evaluate = PythonEvaluator()

    def python(example: Example) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            evaluate(example)
        example.namespace["_printed"] = printed.getvalue()

    def text(example: Example) -> None:
        printed = _compare(example.parsed, example.namespace.pop("_printed", example.parsed))
        updates.append((example.start, example.end, f"```text\n{printed}```"))

    def console(example: Example) -> None:
        shown = re.split(_COMMAND, example.parsed)
        whole = "```console\n"
        for command, output in zip(shown[1::2], shown[2::2], strict=True):
            whole += f"$ {command}\n" + _compare(output, _run(command.replace("\n> ", "\n"), folder))
        updates.append((example.start, example.end, f"{whole}```"))

    evaluators = {"python": python, "text": text, "console": console, "yaml": partial(_read, folder)}
    parsers = [CodeBlockParser(language, evaluator) for language, evaluator in evaluators.items()]
    examples = list(Document.parse(str(page), SkipParser(), *parsers).examples())
    content = page.read_text(encoding="utf-8")
    blocks = re.findall(rf"^```(?:{'|'.join(evaluators)})$", content, re.MULTILINE)
    assert sum(isinstance(example.parsed, str) for example in examples) == len(blocks), "a block is not recognised"
    for example in examples:
        example.evaluate()
    if UPDATE:
        for start, end, block in sorted(updates, reverse=True):
            content = content[:start] + block + content[end:]
        page.write_text(content, encoding="utf-8")


def _run(command: str, folder: Path) -> str:
    """Run a command as a shell does and return what it prints; it must succeed."""
    environment = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment["LORA_CAPACITY_VLLM_PYTHON"] = str(folder / PYTHON)
    words = ["bash", "-ec", command]
    with servers(command, folder):
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout


def _compare(shown: str, printed: str) -> str:
    """Compare what is shown with what was printed, but for blanks around it and before lines; return what to show."""
    wanted, got = (
        dedent("\n".join(line.rstrip() for line in words.splitlines())).strip() for words in (shown, printed)
    )
    pattern = re.escape(wanted).replace(re.escape("..."), ".*?")
    if not wanted or re.fullmatch(pattern, got, re.DOTALL):
        return shown
    if UPDATE and "..." not in wanted:
        return f"{got}\n"
    raise AssertionError(f"shown:\n{wanted}\n\nprinted:\n{got}")


def make_folder(folder: Path, repository: Path, page: Path) -> None:
    """Lay out what a reader of a page has in a clone: the examples, the command, files that the page speaks of."""
    (folder / "examples").symlink_to(repository / "examples")
    commands = folder / "bin"
    commands.mkdir()
    script = commands / "lora-capacity"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_capacity_cli "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    for name, content in TABLES.items():
        (folder / name).write_text(content, encoding="utf-8")
    write_material(folder, page.read_text(encoding="utf-8"))
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(commands)


def _read(folder: Path, example: Example) -> None:
    """Check a campaign, a fleet, or a workload, which blocks further down find in the folder."""
    content = yaml.safe_load(example.parsed)
    if "server" in content:
        assert Campaign.from_mapping(content, example.path).points
    elif "pools" in content:
        assert Fleet.from_mapping(content, EXAMPLES).pools
    else:
        assert Workload.from_mapping(content, folder).horizon_s > 0
        (folder / "my_workload.yaml").write_text(example.parsed, encoding="utf-8")
