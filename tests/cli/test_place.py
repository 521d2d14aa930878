"""``place``: a fleet placed, exported, and every server played again by itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_capacity.calibration import load_calibration
from lora_capacity.run import simulate
from lora_capacity.scenarios import build_scenarios
from lora_capacity.workload import AdapterList, Workload
from tests.cli.conftest import Run

LLAMA = "llama-3.1-8b-instruct-h100-64gb"
FLEET: dict[str, Any] = {
    "adapters": [
        *({"adapter": f"busy-{i}", "rank": 16, "rate_per_s": 3.0} for i in range(10)),
        *({"adapter": f"idle-{i}", "rank": 8, "rate_per_s": 0.05} for i in range(20)),
        {"adapter": "huge", "rank": 8, "rate_per_s": 40.0},
    ],
    "pools": [{"name": "h100", "calibration": LLAMA, "most_servers": 8, "price_per_hour": 2.0}],
    "requests": {
        "input_tokens": {"mean": 223, "std": 248, "min": 4, "max": 1024},
        "output_tokens": {"mean": 197, "std": 207, "min": 4, "max": 1024},
    },
    "horizon_s": 600,
}


MIX = {"mix": {"rates_per_s": [1.0], "ranks": [8]}}
TRAFFIC = Workload.from_mapping({"adapters": MIX, "requests": FLEET["requests"], "horizon_s": 600})


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    return write(tmp_path, {})


def write(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(FLEET | change), encoding="utf-8")
    return path


@pytest.mark.slow  # plays and prices some thousand servers
def test_every_server_holds_when_it_is_played_by_itself(run: Run, fleet: Path, tmp_path: Path) -> None:
    result = run("place", fleet, "--format", "json", "--emit", "out")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    shares: dict[str, float] = {}
    rates = {each["adapter"]: each for each in FLEET["adapters"]}
    for number, server in enumerate(answer["servers"]):
        names = [each["adapter"] for each in server["adapters"]]
        assert len(set(names)) == len(names)
        own = [rates[each["adapter"]]["rate_per_s"] * each["share"] for each in server["adapters"]]
        for each in server["adapters"]:
            shares[each["adapter"]] = shares.get(each["adapter"], 0.0) + each["share"]
        assert sum(own) == pytest.approx(server["requests_per_s"])
        ranks = [rates[name]["rank"] for name in names]
        workload = dataclasses.replace(TRAFFIC, adapters=AdapterList(names, own, ranks))
        scenarios = build_scenarios(
            workload,
            load_calibration(LLAMA),
            [len(names)],
            [server["max_loras"]],
            max_lora_rank=server["max_lora_rank"],
            max_num_seqs=server["max_num_seqs"],
            max_num_batched_tokens=server["max_num_batched_tokens"],
        )
        played = simulate(load_calibration(LLAMA), scenarios, workload, engine="event", seed=1000 + number)
        assert played.attainment[0] >= 0.95
        assert server["max_cpu_loras"] == len(names)
    assert shares == pytest.approx(dict.fromkeys(rates, 1.0))
    assert answer["gpus"] == len(answer["servers"]) <= answer["lower_bound"] + 1
    assert answer["cost_per_hour"] == 2.0 * answer["gpus"]
    routes = json.loads(Path("out/routes.json").read_text(encoding="utf-8"))
    assert sum(each["share"] for each in routes["adapters"]["huge"]) == pytest.approx(1.0)
    assert len(routes["adapters"]["huge"]) == len({each["server"] for each in routes["adapters"]["huge"]}) >= 2
    deployments = list(yaml.safe_load_all(Path("out/deployments.yaml").read_text(encoding="utf-8")))
    assert [each["metadata"]["name"] for each in deployments] == [each["name"] for each in answer["servers"]]
    first = yaml.safe_load(Path(f"out/{answer['servers'][0]['name']}.yaml").read_text(encoding="utf-8"))
    assert first["max-loras"] == answer["servers"][0]["max_loras"]


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({"goodput": {"tpot": 1}}, 1, "adapter busy-0 (rank 16, 3 requests/s) fits onto no server"),
        (
            {"adapters": [{"adapter": "wide", "rank": 4096, "rate_per_s": 0.1}]},
            1,
            "adapter wide (rank 4096, 0.1 requests/s) fits onto no server of any pool: the largest",
        ),
        (
            {"adapters": [{"adapter": "huge", "rank": 8, "rate_per_s": 60.0, "replicas": 1}]},
            2,
            "replicas of huge: 1 is not allowed; allowed: at least",
        ),
        (
            {"adapters": [{"adapter": "huge", "rank": 8, "rate_per_s": 60.0, "together": "x"}]},
            2,
            "together of huge: 'x' is not allowed; allowed: adapters that fit onto one server",
        ),
    ],
)
def test_what_fits_nowhere_is_told(run: Run, tmp_path: Path, change: dict[str, Any], code: int, told: str) -> None:
    result = run("place", write(tmp_path, change))
    assert (result.exit_code, told in result.stderr) == (code, True), result.output
    assert "Traceback" not in result.output
