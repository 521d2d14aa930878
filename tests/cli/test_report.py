"""What ``report``, ``optimize --report`` and the map of a terminal write."""

import json
from pathlib import Path

import pytest

from lora_capacity.reports.load_curve import PLAYED
from lora_capacity.reports.quantities import LOADED
from tests.cli.conftest import STEADY, Run

LIMITED = ("--max-num-seqs", 256, "--max-num-batched-tokens", 2048)
"""One combination of batch limits, of the ten or so that are searched otherwise."""

FEW = ("--adapters", "8:32:8", "--max-loras", "4,8", *LIMITED)
"""Candidates that are soon played."""


def test_report_is_a_page_and_names_the_choice(run: Run, workload: Path) -> None:
    result = run("report", workload, *FEW, "-o", "page.html", "--figures", "figures", "--format", "json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    page = Path("page.html").read_text(encoding="utf-8")
    assert told["serve_command"] in page
    assert "workload.yaml, 20" in page
    assert all(
        f'<th scope="row">{row}</th>' in page for row in ("seed 0", "seed 3", "steady twin", "asked", "end to end")
    )
    assert page.count('class="whisker"') == (len(LOADED) - 1) * len(PLAYED)  # all but the wait for a slot
    assert sorted(told["figures"]) == sorted(str(path) for path in Path("figures").iterdir())
    assert all(path.read_text(encoding="utf-8").startswith("<?xml") for path in Path("figures").glob("*.svg"))
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_report_in_words(run: Run, workload: Path) -> None:
    result = run("report", workload, *STEADY, *LIMITED)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("report.html\n  recommended  ")
    assert Path("report.html").stat().st_size < 2_000_000


def test_optimize_writes_the_same_page_and_answers_as_ever(run: Run, workload: Path) -> None:
    asked = (workload, *STEADY, *LIMITED)
    alone = run("optimize", *asked, "--format", "json").stdout
    assert run("optimize", *asked, "--format", "json", "--report", "page.html").stdout == alone
    assert run("report", *asked, "-o", "other.html").exit_code == 0
    assert Path("page.html").read_bytes() == Path("other.html").read_bytes()


def test_an_overloaded_server_is_warned_of_on_the_terminal_in_json_and_on_the_page(run: Run, workload: Path) -> None:
    alike = ("optimize", workload, *STEADY, *LIMITED)
    asked = (*alike, "--objective", "throughput")
    warnings = json.loads(run(*asked, "--format", "json", "--report", "page.html").stdout)["warnings"]
    (warning,) = (each for each in warnings if "overloaded" in each)
    assert f"warning: {warning}" in run(*asked).stdout.splitlines()
    assert warning in Path("page.html").read_text(encoding="utf-8")
    bound = run(*alike, "--goodput", "ttft:1000", "--format", "json")
    assert not any("overloaded" in each for each in json.loads(bound.stdout)["warnings"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("report", "-o", "page.pdf"), "--output: 'page.pdf' is not allowed"),
        (("report", "-o", "nowhere/page.html"), "a file in a folder that exists"),
        (("optimize", "--report", "page"), "--report: 'page' is not allowed"),
        (("report", "--figures", "no-folder/inside"), "--figures: 'no-folder/inside' is not allowed"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    run: Run, workload: Path, arguments: tuple[str, ...], told: str
) -> None:
    command, *options = arguments
    result = run(command, workload, *options)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_optimize_draws_a_map_without_colours_where_there_is_no_terminal(run: Run, workload: Path) -> None:
    asked = ("optimize", workload, *STEADY, *LIMITED)
    found = json.loads(run(*asked, "--format", "json").stdout)
    lines = run(*asked).stdout.splitlines()
    start = lines.index("Throughput by adapters (across) and slots (up)")
    end = next(i for i in range(start, len(lines)) if "tokens/s;" in lines[i])
    rows = {int(line[:8].replace(",", "")): line[8:] for line in lines[start + 1 : end - 1]}
    assert list(rows) == sorted(rows, reverse=True)
    assert [slots for slots, row in rows.items() if "o" in row] == [found["max_loras"]]
    assert len(set("".join(rows.values())) & set(" ·'.:░▒▓█")) >= 3  # shades of several throughputs
    assert "o recommended" in lines[end]
    assert "\x1b" not in "".join(lines)
