"""Who may import what, and what is loaded when nobody needs it."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SLOW_TO_LOAD = ("jax", "jaxlib", "flax", "optax", "scipy", "pyarrow", "pydantic", "torch", "vllm")


def test_import_rules_hold() -> None:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run(
        [sys.executable, "-c", command], check=False, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import lora_capacity_profiling",
        "import lora_capacity.engines, lora_capacity.workload",
        "from lora_capacity_cli.main import main",
    ],
)
def test_import_loads_no_jax(statement: str) -> None:
    assert _loaded_after(statement) & {"jax", "jaxlib", "flax", "optax", "torch", "vllm"} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["optimize", "--help"]])
def test_help_loads_nothing_slow(arguments: list[str]) -> None:
    code = f"sys.argv[1:] = {arguments}; from lora_capacity_cli.main import main; main()"
    assert _loaded_after(code) & set(SLOW_TO_LOAD) == set()


def test_import_of_the_library_loads_nothing_slow() -> None:
    assert _loaded_after("import lora_capacity") & set(SLOW_TO_LOAD) == set()


def _loaded_after(statement: str) -> set[str]:
    # At exit, since a command ends the process itself.
    code = f"""
import atexit, sys
atexit.register(lambda: print("\\n", *{{name.split(".")[0] for name in sys.modules}}))
{statement}
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())
