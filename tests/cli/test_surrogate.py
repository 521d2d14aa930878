import json
from pathlib import Path

import pytest
from lora_capacity_cli.options import DEFAULT_CALIBRATION

from lora_capacity import surrogate
from lora_capacity.surrogate import Dataset, neural
from tests.cli.conftest import Run

pytestmark = pytest.mark.slow

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
    labels = Dataset.read(tmp_path / "l.parquet")
    assert labels.workloads.rates_per_s.min() >= 0.1
    assert not (tmp_path / "l.parquet.parts").exists()


def test_train_rules_and_predict_go_on_from_labels(run: Run, space: Path, workload: Path, tmp_path: Path) -> None:
    made = run("label", "--space", space, "--workloads", 36, "--played", 0, "-o", "l.parquet")
    assert made.exit_code == 0, made.output
    trained = run("train", "l.parquet", "-o", "s.json")
    assert trained.exit_code == 0, trained.output
    assert "Held-out workloads" in trained.stdout
    rules = run("rules", "--surrogate", "s.json", "--target", "slots", "--workload", workload, "--figure", "r.svg")
    assert rules.exit_code == 0, rules.output
    assert rules.stdout.startswith("slots = ")
    assert (tmp_path / "r.svg").read_text("utf-8").startswith("<?xml")
    starved = json.loads(run("rules", "--surrogate", "s.json", "--target", "starved", "--format", "json").stdout)
    assert starved["leaves"] >= 1
    arguments = ("--adapters", 400, "--max-loras", 8, "--check")
    answer = run("predict", workload, "--surrogate", "s.json", *arguments, "--format", "json")
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    assert told["max_loras"] <= told["max_cpu_loras"]
    assert told["given"]["starved"]
    assert told["check"]["starved"]
    table = run("predict", workload, "--surrogate", "s.json", "--kind", "tree", *arguments)
    assert "400 adapters, 8 slots" in table.stdout
    assert "starves" in table.stdout


def test_a_neural_surrogate_tells_sensitivities(
    run: Run, space: Path, workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neural, "STEPS", 60)  # of 4000: it is to be read, not to be good
    assert run("label", "--space", space, "--workloads", 36, "--played", 0, "-o", "l.parquet").exit_code == 0
    monkeypatch.setattr(surrogate, "train_surrogate", lambda *_, **__: surrogate.load_surrogate(DEFAULT_CALIBRATION))
    trained = run("train", "l.parquet", "-o", "s.json", "--smooth", "n.json")
    assert trained.exit_code == 0, trained.output
    given = ("--smooth", "n.json", "--adapters", 400, "--max-loras", 8)
    told = json.loads(run("predict", workload, *given, "--format", "json").stdout)["smooth"]
    assert (told["max_cpu_loras"], told["max_loras"]) == (400, 8)
    assert told["throughput_tokens_per_s"] < told["offered_tokens_per_s"]
    assert told["margin"] < 0
    assert set(told["sensitivities"]) == {"rates", "slots", "adapters", "input_tokens", "output_tokens"}
    assert told["sensitivities"]["adapters"]["margin"] < 0
    table = run("predict", workload, "--smooth", "n.json")
    assert "Sensitivity" in table.stdout


def test_the_bundled_surrogate_answers(run: Run, workload: Path) -> None:
    done = run("predict", workload)
    assert done.exit_code == 0, done.output
    assert "adapters (max_cpu_loras)" in done.stdout
    assert run("predict", workload, "--gpu-memory-utilization", 0.3).exit_code == 1


@pytest.mark.parametrize(
    ("option", "value", "default", "refused"),
    [
        ("--max-lora-rank", 64, 16, True),
        ("--max-model-len", 8192, 131072, True),
        ("--block-size", 32, 16, True),
        ("--target-modules", "attention", "all-linear", True),
        ("--max-num-seqs", 64, 256, False),
        ("--max-num-batched-tokens", 512, 2048, False),
        ("--gpu-memory-utilization", 0.7, 0.9, False),
    ],
)
def test_every_setting_changes_the_answer_or_is_refused(
    run: Run, workload: Path, option: str, value: object, default: object, refused: bool
) -> None:
    plain = run("predict", workload, "--format", "json")
    assert run("predict", workload, "--format", "json", option, default).stdout == plain.stdout
    other = run("predict", workload, "--format", "json", option, value)
    if refused:
        assert other.exit_code == 2
        assert f"{option[2:].replace('-', '_')}: {value!r} is not allowed; allowed: {default}, which surrogates" in (
            other.stderr
        )
        assert "use `optimize` or `simulate`, which take others" in other.stderr
    else:
        assert other.stdout != plain.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["label", "-o", "l.csv"], "--output: 'l.csv' is not allowed; allowed: a name that ends in .parquet"),
        (["label", "-o", "l.parquet", "--space", "none.yaml"], "file not found: none.yaml"),
        (["label", "-o", "l.parquet", "--calibration", "none"], "calibration: 'none'"),
        (["label", "-o", "l.parquet", "--workloads", 0], "--workloads"),
        (["train", "none.parquet", "-o", "s.json"], "none.parquet"),
        (["train", "none.parquet", "-o", "s.txt"], "a name that ends in .json"),
        (["rules", "--surrogate", "none"], "surrogate: 'none'"),
        (["rules", "--figure", "r.png"], "a name that ends in .svg"),
        (["predict", "none.yaml"], "file not found: none.yaml"),
        (["predict", "none.yaml", "--adapters", 8], "--max-loras: 'none' is not allowed; allowed: both or neither"),
    ],
)
def test_complaints(run: Run, arguments: list[object], complaint: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
