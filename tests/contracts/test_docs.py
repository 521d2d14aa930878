"""The documentation leaves nothing out: every command, every page, every number from a file."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from lora_capacity_cli.main import main

from lora_capacity.calibration import bundled_names, derive_calibration
from lora_capacity.hardware import catalogue
from lora_capacity.memory import Deployment
from lora_capacity.models import find_shape
from lora_capacity.status import Status

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
COMMANDS = sorted(main.commands)
GENERATED = re.compile(r"<!-- generated: .*? -->\n(.*?)<!-- end generated -->", re.DOTALL)
# Code, addresses of links, and names that have digits in them tell no result.
NO_RESULT = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|vLLM \d+(?:\.\d+)+|\bH\d+\b", re.DOTALL)
WORDS = """percent percentage points tenth twice two three four five six seven eight nine ten eleven twelve dozen twenty
thirty forty fifty sixty seventy eighty ninety hundred thousand"""
RESULT = re.compile(rf"\d[\d.,]*|%|\b(?:{'|'.join(WORDS.split())})s?\b", re.IGNORECASE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_section_with_an_example(name: str) -> None:
    sections = re.split(r"^## ", (DOCS / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next((each for each in sections if each.startswith(f"{name}\n")), None)
    assert section is not None, f"docs/cli.md has no section {name}"
    assert re.search(rf"^\$ lora-capacity {name}\b", section, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    options = [each for each in main.commands[name].params if isinstance(each, click.Option)]
    assert [each.name for each in options if not each.help] == []


def test_options_page_holds_the_whole_command() -> None:
    page = (DOCS / "cli-reference.md").read_text(encoding="utf-8")
    assert "::: mkdocs-click" in page
    assert ":command: main" in page


def test_every_page_is_in_the_navigation() -> None:
    class Lenient(yaml.SafeLoader):
        """Knows no tags of mkdocs."""

    content = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), Lenient)
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(_leaves(content["nav"])) == pages


def test_every_figure_is_drawn_by_the_script_and_shown() -> None:
    script = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("generate_*.py"))
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    figures = sorted((DOCS / "assets" / "figures").glob("*.svg"))
    assert figures
    for figure in figures:
        # Those by workload are drawn again in the next test.
        by_workload = figure.stem.startswith("running-")
        assert by_workload or f'"{figure.stem}"' in script or f'"{figure.name}"' in script
        assert f"figures/{figure.name})" in pages


@pytest.mark.parametrize(
    "name",
    [
        *("accuracy", "benchmarks", "coverage", "derived_accuracy", "event_accuracy", "startup_accuracy"),
        *("surrogate_accuracy", "trust"),
    ],
)
def test_generated_pages_are_what_their_result_files_say(name: str, tmp_path: Path) -> None:
    for path in DOCS.rglob("*"):
        if path.is_file() and path.suffix in (".md", ".py", ".json"):
            copy = tmp_path / path.relative_to(DOCS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    subprocess.run([sys.executable, tmp_path / f"generate_{name}.py"], check=True, cwd=tmp_path)
    for page in DOCS.rglob("*.md"):
        assert (tmp_path / page.relative_to(DOCS)).read_text("utf-8") == page.read_text("utf-8"), page.name
    for figure in (tmp_path / "assets").rglob("*.svg"):
        assert figure.read_text("utf-8") == (DOCS / figure.relative_to(tmp_path)).read_text("utf-8")


@pytest.mark.parametrize(
    ("model", "gpu"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "L4"),
        ("meta-llama/Llama-3.3-70B-Instruct", "H100-80GB"),
        ("Qwen/Qwen3-30B-A3B", "RTX 5090"),
    ],
)
def test_coverage_is_what_the_library_derives_now(model: str, gpu: str) -> None:
    told = json.loads((DOCS / "data" / "coverage.json").read_text("utf-8"))
    kind, gpus, error = told["models"][model][list(told["gpus"]).index(gpu)]
    derived = derive_calibration(find_shape(model), gpu, deployment=Deployment(tensor_parallel_size=gpus))
    assert (kind, error) == ("derived", derived.capacity_error)
    server = derived.server(max_loras=1, max_lora_rank=16, max_model_len=4096)
    assert derived.plan_memory(server).status.item() == Status.OK
    if gpus > 1:
        fewer = derive_calibration(find_shape(model), gpu, deployment=Deployment(tensor_parallel_size=gpus // 2))
        assert fewer.plan_memory(server).status.item() != Status.OK


def test_coverage_names_every_gpu_and_every_bundled_calibration() -> None:
    told = json.loads((DOCS / "data" / "coverage.json").read_text("utf-8"))
    assert list(told["gpus"]) == list(catalogue())
    cells = [cell for cells in told["models"].values() for cell in cells]
    assert sum(kind == "measured" for kind, _, _ in cells) == len(bundled_names())
    assert {kind for kind, _, _ in cells} <= {"measured", "derived", "memory only", "does not fit"}


@pytest.mark.parametrize("name", ["accuracy.md", "event-accuracy.md", "surrogate-accuracy.md", "benchmarks.md"])
def test_pages_of_results_tell_no_result_that_no_command_wrote(name: str) -> None:
    text = (DOCS / name).read_text("utf-8")
    assert all(part.strip() for part in GENERATED.findall(text))
    assert _results(text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("off by 15 % at most", ["15", "%"]),
        ("eight workloads, [ten](a.md#b1) times", ["eight", "ten"]),
        ("about a tenth of a percent", ["tenth", "percent"]),
        ("up to forty times", ["forty"]),
        ("\n<!-- generated: a -->\n3 %\n<!-- end generated -->\nvLLM 0.8.5, `8`, nearly empty, many", []),
    ],
)
def test_a_result_in_prose_is_noticed(text: str, found: list[str]) -> None:
    assert _results(text) == found


def test_every_benchmark_tells_where_and_when() -> None:
    files = [*sorted((DOCS / "data").glob("*benchmark.json")), DOCS / "data" / "event_clock.json"]
    for path in [*files, DOCS / "data" / "first_recommendation.json"]:
        told = json.loads(path.read_text("utf-8"))["environment"]
        for name in ("date", "processor", "cores", "python", "versions", "commit"):
            assert name in told, f"{path.name}: {name}"


def test_links_to_elsewhere_are_well_formed() -> None:
    """Whether they lead anywhere is not checked: a build needs no network."""
    pages = [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")]
    links = [link for page in pages for link in re.findall(r"\]\((\w+:[^)]*)\)", page.read_text("utf-8"))]
    assert links
    for link in links:
        assert re.fullmatch(r"https://[\w-]+(?:\.[\w-]+)+(?:/[\w.~%/-]*)?(?:#[\w-]+)?", link), link


def _results(text: str) -> list[str]:
    """What looks like a result in the parts of a page that no script writes."""
    return RESULT.findall(NO_RESULT.sub(" ", GENERATED.sub(" ", text)))


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for each in (nav.values() if isinstance(nav, dict) else nav) for leaf in _leaves(each)]
