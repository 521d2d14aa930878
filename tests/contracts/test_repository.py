"""What is committed holds for every machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# In parts, so that this file does not hold what it forbids.
MACHINE_PATHS = ["/" + "/".join(parts) + "/" for parts in (["work"], ["root"], ["opt", "lc"], ["home"], ["Users"])]
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ["pypi", "org"],
        ["pythonhosted", "org"],
        ["npmjs", "org"],
        ["debian", "org"],
        ["proxy", "golang", "org"],
    )
]
MEASURED_TABLES = ["serving_runs", "serving_timeseries", "kv_capacity", "_latency", "adapter_loading", "scheduler_"]


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    if not shutil.which("git") or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [path for name in listing.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_no_path_of_one_machine_nor_registry_host(committed: list[Path]) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}: {text}"
        for path in committed
        for text in MACHINE_PATHS + REGISTRY_HOSTS
        if text.encode() in path.read_bytes()
    ]
    assert committed
    assert found == []


def test_no_measured_table_is_committed(committed: list[Path]) -> None:
    ours = REPOSITORY / "tests" / "data"  # recorded by the project's own command
    tables = [path for path in committed if path.suffix in (".csv", ".parquet") and ours not in path.parents]
    assert [path.name for path in tables if any(part in path.stem for part in MEASURED_TABLES)] == []
