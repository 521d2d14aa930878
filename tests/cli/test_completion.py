"""What shells complete, asked as they ask; and the scripts that they load."""

import pytest
from click.testing import CliRunner
from lora_capacity_cli.main import main


def completed(*words: str) -> list[str]:
    """Return what bash is offered for the last word, files as ``file``."""
    line = " ".join(("lora-capacity", *words))
    variables = {"_LORA_CAPACITY_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    output = CliRunner().invoke(main, [], env=variables, prog_name="lora-capacity").stdout
    kinds = (each.split(",", 1) for each in output.split())
    return [kind if kind == "file" else name for kind, name in kinds]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str) -> None:
    variables = {"_LORA_CAPACITY_COMPLETE": f"{shell}_source"}
    script = CliRunner().invoke(main, [], env=variables, prog_name="lora-capacity").stdout
    assert f"_LORA_CAPACITY_COMPLETE={shell}_complete" in script
    assert "lora-capacity" in script


def test_commands_and_options_are_completed() -> None:
    assert completed("op") == ["optimize"]
    assert completed("optimize", "w.yaml", "--obj") == ["--objective"]
    assert "fewest-slots" in completed("optimize", "w.yaml", "--objective", "f")


def test_names_are_completed_and_files_beside_them() -> None:
    assert completed("optimize", "w.yaml", "--calibration", "llama") == ["llama-3.1-8b-instruct-h100-64gb", "file"]
    assert completed("optimize", "w.yaml", "--gpu", "l40s") == ["L40S"]
    assert "Qwen/Qwen3-8B" in completed("memory", "--model", "qwen/qwen3")
    assert "Qwen3-8B" in completed("memory", "--model", "Qwen3-8")
