"""Help in sections, and tables of a terminal of 80 columns."""

import shlex

import click
import pytest
from click.testing import CliRunner
from lora_capacity_cli import output
from lora_capacity_cli.grouping import title_of
from lora_capacity_cli.main import main

NAMES = sorted(main.commands)
LONG = {f"a long column {letter}": 123456.0 for letter in "abcdefghij"}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_PLAIN_WIDTH", 80)


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_a_terminal(name: str) -> None:
    lines = CliRunner().invoke(main, [name, "--help"], terminal_width=80).stdout.splitlines()
    assert max(map(len, lines)) <= 80


def test_options_stand_in_sections() -> None:
    text = CliRunner().invoke(main, ["optimize", "--help"]).stdout
    titles = (
        "Workload (recorded requests):",
        "Model and GPU:",
        "Server:",
        "Bounds:",
        "Search:",
        "Prediction:",
        "Output:",
    )
    assert all(f"\n{title}\n" in text for title in titles)
    assert "\nOptions:\n" not in text  # nothing is left over
    options = [each for each in main.commands["optimize"].params if isinstance(each, click.Option)]
    assert {title_of(each.name or "") for each in options} == {title.removesuffix(":") for title in titles}


def test_a_wide_table_is_told_in_parts(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table("Wide", [{"name": "first"} | LONG, {"name": "second"} | dict.fromkeys(LONG, 7.0)])
    text = capsys.readouterr().out
    assert text.count("123,456") == text.count(" 7 ") == len(LONG)  # no number is broken
    assert text.count("second") > 1  # each part begins with the name
    assert max(map(len, text.splitlines())) <= 80


def test_what_is_equal_in_every_row_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table("Ranks", [{"name": "a", "rank": 16, "rate": 1.0}, {"name": "b", "rank": 16, "rate": 2.0}])
    text = capsys.readouterr().out
    assert text.count("rank") == text.count("16") == 1
    assert "In every row: rank 16" in text


def test_a_long_command_is_the_same_to_a_shell() -> None:
    line = "vllm serve org/model --enable-lora " + " ".join(f"--option-{i} 'some value'" for i in range(9))
    folded = output.folded(line)
    assert max(map(len, folded.splitlines())) <= 80
    assert shlex.split(folded.replace("\\\n", "")) == shlex.split(line)
