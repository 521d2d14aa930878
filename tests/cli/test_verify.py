"""`verify` against a fake server: a real process behind a real port."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_capacity_profiling.server import Server

from lora_capacity.measurements import read_runs
from tests.cli.conftest import Run
from tests.cli.fake_site import PATIENT, STEP_S, Site, write_site
from tests.unit.fitting.test_fit import write_profile
from tests.unit.profiling.conftest import fake_environment
from tests.unit.profiling.test_server import WAIT_S, command_lines, wait_until

pytestmark = pytest.mark.slow

Serve = Callable[..., Server]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path)


@pytest.fixture
def serve(site: Site, tmp_path: Path):
    """Start fake servers that `verify --url` finds."""
    servers = []

    def start(mode: str = "ok", *, adapters: int = 2, step_s: float = STEP_S) -> Server:
        modules = [f"b{index}=x" for index in range(adapters)]
        server = Server.launch(
            site.model,
            {"enable_lora": True, "max_loras": 2, "lora_modules": modules},
            log=tmp_path / "attached.log",
            python=sys.executable,
            environment=fake_environment(mode, step_s),
            timeout_s=WAIT_S,
        )
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def test_configurations_are_tried_and_agree(run: Run, site: Site) -> None:
    before = command_lines().keys()
    result = run(*site.verify("--adapters", 3, "--max-loras", "2,3", "--predict-with", "event", "--format", "json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["agrees"], found["configurations"], found["engine"]) == (True, 2, "event")
    assert [(each["max_cpu_loras"], each["max_loras"], each["max_lora_rank"]) for each in found["points"]] == [
        (3, 2, 8),
        (3, 3, 8),
    ]
    for each in found["points"]:
        predicted, measured = each["predicted"], each["measured"]
        # The very same requests were played and sent.
        assert predicted["offered_tokens_per_s"] == measured["offered_tokens_per_s"] > 0
        assert each["error"]["throughput"] == pytest.approx(
            predicted["throughput_tokens_per_s"] / measured["throughput_tokens_per_s"] - 1
        )
        assert 0 < measured["throughput_tokens_per_s"] <= measured["offered_tokens_per_s"]
        assert measured["itl_s"] >= STEP_S
        assert 0.9 < measured["attainment"] <= 1.0  # of an idle server within two seconds
        assert 0.9 < predicted["attainment"] <= 1.0
        assert (measured["vllm_version"], measured["failed"], measured["kv_cache_tokens"]) == ("0.32.0", 0, 1600)
        assert any("KV cache holds 1,600 tokens" in text for text in each["warnings"])
    assert "A 3 S 2 (1 of 2): measuring" in result.stderr
    assert "left" in result.stderr
    assert wait_until(
        lambda: not any(str(site.model) in line for pid, line in command_lines().items() if pid not in before)
    )


def test_runs_are_added_to_what_validate_reads(run: Run, site: Site) -> None:
    options = ["--adapters", 2, "--max-loras", 2, "--runs", "runs.csv"]
    for _ in range(2):
        assert run(*site.verify(*options)).exit_code == 0
    runs = read_runs("runs.csv")
    assert len(runs) == 2
    assert runs.tells_lengths.all()
    assert (runs.set[0], runs.scenario[0], runs.model[0], runs.max_num_seqs[0]) == ("verify", "short", "tiny", 256)
    for engine in ("steady", "event"):
        result = run("validate", "runs.csv", "--calibration", site.calibration, "--engine", engine, "--format", "json")
        assert result.exit_code == 0, result.output
        (model,) = json.loads(result.stdout)["models"]
        assert model["runs"] == 2
        assert model["throughput_smape"] < 50


def test_calibration_is_fitted_to_the_runs(run: Run, site: Site, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    write_profile(tmp_path / "profile")
    assert run("fit", "profile", "-o", "first.json").exit_code == 0
    words = site.attach(serve().url, "--max-loras", 2, "--max-num-seqs", 64, "--max-num-batched-tokens", 512)
    words[words.index(str(site.calibration))] = "first.json"
    assert run(*words, "--runs", "runs.csv").exit_code in (0, 3)
    result = run("fit", "profile", "--runs", "runs.csv", "-o", "second.json", "--format", "json")
    assert result.exit_code == 0, result.output
    fitted = json.loads(result.stdout)
    assert fitted["provenance"]["rows"]["serving_runs"] == 1
    assert fitted["runs"]["output_share"] == 1.0
    assert fitted["accuracy"]["fitted"]["runs"] == 1


def test_disagreement_has_an_exit_code_of_its_own(run: Run, site: Site) -> None:
    words = site.verify("--adapters", 2, "--max-loras", 2, step_s=4 * STEP_S)
    result = run(*words, "--itl-tolerance", 0.2)
    assert result.exit_code == 3, result.output
    assert "Predicted and measured do not agree" in result.stdout
    assert run(*words, "--seconds", 2).exit_code == 0


def test_recommended_configuration_and_its_neighbours(run: Run, site: Site) -> None:
    words = site.verify("--adapters", "2,4", "--neighbours", "--format", "json", "--seconds", 2, "--traffic-seed", 3)
    result = run(*words)
    found = json.loads(result.stdout)
    best = json.loads(
        run(
            "optimize", site.workload, "--calibration", site.calibration, "--adapters", "2,4", "--format", "json"
        ).stdout
    )
    tried = [(each["max_cpu_loras"], each["max_loras"]) for each in found["points"]]
    beside = [each["candidate"] for each in best["neighbours"]]
    assert tried[0] == (best["max_cpu_loras"], best["max_loras"])
    assert tried[1:] == [(each["max_cpu_loras"], each["max_loras"]) for each in beside]
    assert len(tried) >= 2


def test_server_that_refuses_to_start_is_a_result(run: Run, site: Site) -> None:
    result = run(*site.verify("--adapters", 2, "--max-loras", 1, "--format", "json", mode="no_kv_cache"))
    assert result.exit_code == 3
    (point,) = json.loads(result.stdout)["points"]
    assert (point["predicted"]["status"], point["measured"]["status"]) == ("ok", "no_kv_cache")
    assert point["measured"]["throughput_tokens_per_s"] is None
    with Path("verify/serving_runs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["status"], row["completed"], row["max_loras"]) == ("no_kv_cache", "", "1")
    assert read_runs("verify/serving_runs.csv").started.tolist() == [False]


def test_running_server_is_tried_and_left_running(run: Run, site: Site, serve: Serve) -> None:
    server = serve(adapters=3)
    result = run(*site.attach(server.url, "--max-loras", 2, "--format", "json"))
    assert result.exit_code == 0, result.output
    (point,) = json.loads(result.stdout)["points"]
    assert (point["max_cpu_loras"], point["max_loras"]) == (3, 2)
    server.check()


def test_running_server_with_a_list_of_names_is_asked_for_those(run: Run, site: Site, serve: Serve) -> None:
    server = serve(adapters=4)
    Path("list.csv").write_text("adapter,rank,rate_per_s\nb3,8,6\nb1,8,6\n")
    mix = "mix: {rates_per_s: [6.0, 3.0], ranks: [8, 4]}"
    site.workload.write_text(site.workload.read_text().replace(mix, "list: list.csv"))
    result = run(*site.attach(server.url, "--adapters", 2, "--max-loras", 2))
    assert result.exit_code == 0, result.output
    state = json.loads(server.endpoint.get("/fake/state", timeout_s=10)[1])
    assert {body["model"] for body in state["bodies"]} == {"b1", "b3"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["--max-loras", "the server's number of slots"]),
        (("--max-loras", "2", "--adapters", 5), ["adapters", "5", "1 to 2", "--lora-modules"]),
        (("--max-loras", "1,2"), ["--max-loras", "one value"]),
        (("--max-loras", "2", "--neighbours"), ["--neighbours", "--model"]),
        (("--max-loras", "2", "--model", "x"), ["--url", "one of --url, --model and --profile"]),
        (("--max-loras", "2", "--max-num-seqs", "8,16"), ["--max-num-seqs", "one value"]),
    ],
)
def test_what_does_not_go_with_a_running_server(
    run: Run, site: Site, serve: Serve, options: tuple[object, ...], words: list[str]
) -> None:
    result = run(*site.attach(serve().url, *options))
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_servers_are_started_as_those_of_a_profile(run: Run, site: Site) -> None:
    Path("profile").mkdir()
    content = {
        "model": str(site.model),
        "flags": {"dtype": "bfloat16", "max_num_seqs": 32, "max_num_batched_tokens": 256, "max_model_len": 512},
        "servers": [{"environment": {**fake_environment("ok", STEP_S), "HF_TOKEN": "(secret)"}}],
    }
    Path("profile/profile.json").write_text(json.dumps(content))
    words = ["verify", site.workload, "--calibration", site.calibration, "--profile", "profile", "--max-num-seqs", 16]
    words += ["--adapters", 2, "--max-loras", 1, "--seconds", 2, "--warm-up", 0, "--python", sys.executable, *PATIENT]
    result = run(*words, "--format", "json")
    assert result.exit_code == 0, result.output
    (point,) = json.loads(result.stdout)["points"]
    assert (point["max_num_seqs"], point["max_num_batched_tokens"]) == (16, 256)
    assert read_runs("verify/serving_runs.csv").max_model_len.tolist() == [512]
    Path("profile/profile.json").write_text("{}")
    assert "a profile.json as `profile` writes it" in run(*words).stderr


def test_model_of_another_shape_is_refused(run: Run, site: Site) -> None:
    config = site.model / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    result = run(*site.verify("--adapters", 2, "--max-loras", 1))
    assert result.exit_code == 2
    assert "num_layers: 2 is not allowed; allowed: a model with a num_layers of 1" in result.stderr
