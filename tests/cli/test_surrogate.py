import json
from pathlib import Path

import pytest

from lora_capacity.surrogate import Labels
from tests.cli.conftest import Run

SPACE = "rates_per_s: {min: 0.1, max: 0.4}\nranks: [8, 16]\n"


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return path


def test_label_writes_labels_of_the_space(run: Run, space: Path, tmp_path: Path) -> None:
    done = run("label", "--space", space, "--workloads", 8, "--played", 0, "-o", "l.parquet", "--format", "json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {key: told[key] for key in ("workloads", "feasible")} == {"workloads": 8, "feasible": 8}
    labels = Labels.read(tmp_path / "l.parquet")
    assert labels.questions.rates_per_s.min() >= 0.1
    assert not (tmp_path / "l.parquet.parts").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["label", "-o", "l.csv"], "--output: 'l.csv' is not allowed; allowed: a name that ends in .parquet"),
        (["label", "-o", "l.parquet", "--space", "none.yaml"], "none.yaml: 'no such file'"),
        (["label", "-o", "l.parquet", "--calibration", "none"], "calibration: 'none'"),
        (["label", "-o", "l.parquet", "--workloads", 0], "--workloads"),
    ],
)
def test_complaints(run: Run, arguments: list[object], complaint: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
