"""A campaign run on fake servers: what is on disk afterwards, and what an interruption or a failure costs."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lora_capacity_profiling.campaign import Campaign
from lora_capacity_profiling.folder import Finished, ProfileFolder
from lora_capacity_profiling.machine import Machine, look_at, this_cpu
from lora_capacity_profiling.profiler import Launch, Profiler, Watcher
from lora_capacity_profiling.server import Server

from lora_capacity.errors import InputError
from lora_capacity.fitting import fit_calibration
from lora_capacity.measurements import read_profile, read_runs
from lora_capacity.models import ModelShape
from lora_capacity.status import Status
from tests.unit.profiling.conftest import WAIT_S, fake_environment
from tests.unit.profiling.test_campaign import small
from tests.unit.profiling.test_server import command_lines

MACHINE = Machine("cpu", this_cpu(), "0.32.0")


class Teller(Watcher):
    """Keeps what it is told, and does something at a given point."""

    def __init__(self, at: str = "", does: Callable[[], None] = lambda: None) -> None:
        self.at, self.does = at, does
        self.started_plans: list[str] = []
        self.points: list[str] = []

    def started(self, plan: Any, start_s: float) -> None:
        self.started_plans.append(plan.name)

    def measuring(self, point: str, left_s: float) -> None:
        assert left_s > 0
        if point == self.at:
            self.does()

    def measured(self, finished: Finished) -> None:
        self.points.append(finished.id)


def profiler(
    folder: Path, model: Path, campaign: Campaign, watcher: Watcher | None = None, mode: str = "ok", **launch: Any
) -> Profiler:
    environment = fake_environment(mode, 0.005, **{"dies_at": launch.pop("dies_at", 0)})
    start = Launch(str(model), sys.executable, environment, timeout_s=WAIT_S, **launch)
    return Profiler(
        ProfileFolder(folder), campaign, ModelShape.from_file(model), MACHINE, start, command="x", watcher=watcher
    )


def left_behind(model: Path) -> list[str]:
    return [line for line in command_lines().values() if f"--model {model} " in line]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_campaign_gives_a_folder_that_fit_reads(tmp_path: Path, model_dir: Path) -> None:
    run = profiler(tmp_path / "p", model_dir, small(), watcher := Teller())
    assert run.estimate_s() > 0
    run.run()
    assert run.estimate_s() == 0
    assert watcher.started_plans[0] == "no-lora"
    assert len(set(watcher.points)) == len(watcher.points) == 14 + 5
    profile = read_profile(tmp_path / "p")
    assert (profile.device, profile.gpu, profile.server["max_num_seqs"]) == ("cpu", MACHINE.gpu, 8)
    assert profile.server["block_size"] == 16
    assert profile.decode["batch"].tolist() == [1, 8]
    # The fake server sleeps 5 ms a step; a client that reads the first token late sees the others come sooner.
    assert (profile.decode["step_s"] >= 0.0025).all()
    assert profile.prefill["input_tokens"].tolist() == [8, 32]
    assert sorted(profile.adapters["max_lora_rank"].tolist()) == [8] * 3 + [16] * 3
    assert sorted(profile.loading["rank"].tolist()) == [8, 8, 16]
    assert set(profile.kv_capacity.status.tolist()) == {Status.OK}
    runs = read_runs(tmp_path / "p" / "serving_runs.csv")
    assert (runs.max_loras.tolist(), runs.max_cpu_loras.tolist(), runs.model[0]) == ([2], [3], profile.model.name)
    content = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert (content["complete"], content["failed"], content["command"]) == (True, [], "x")
    assert len(content["servers"]) == 6
    assert content["servers"][0]["environment"]["HF_TOKEN"] == content["environment"]["HF_TOKEN"] == "(secret)"
    assert content["environment"]["A_VARIABLE"] == "1"
    spreads = [point["spread"] for point in content["points"] if point["id"].startswith("adapters/")]
    assert all(spread is not None for spread in spreads)
    assert not left_behind(model_dir)
    assert fit_calibration(tmp_path / "p").calibration.memory.kv_cache_memory_bytes is not None


def test_interrupted_profile_goes_on_where_it_stopped(tmp_path: Path, model_dir: Path) -> None:
    campaign = small(serving=[], loading=[])
    with pytest.raises(KeyboardInterrupt):
        profiler(tmp_path / "p", model_dir, campaign, Teller("prefill/batch1-tokens8", interrupt)).run()
    assert not left_behind(model_dir)
    assert set(ProfileFolder(tmp_path / "p").finished) == {"decode/batch1", "decode/batch8"}
    assert ProfileFolder(tmp_path / "p").description()["complete"] is False
    watcher = Teller()
    again = profiler(tmp_path / "p", model_dir, campaign, watcher)
    again.run()
    assert watcher.points[:2] == ["prefill/batch1-tokens8", "prefill/batch1-tokens32"]
    assert "decode/batch1" not in watcher.points
    assert again.folder.description()["complete"] is True
    idle = Teller()
    profiler(tmp_path / "p", model_dir, campaign, idle).run()
    assert (idle.started_plans, idle.points) == ([], [])


@pytest.mark.parametrize("mode", ["oom", "no_kv_cache"])
def test_server_without_memory_is_a_measurement(tmp_path: Path, model_dir: Path, mode: str) -> None:
    campaign = replace(small(), points=tuple(p for p in small().points if getattr(p, "max_loras", 0) == 2))
    run = profiler(tmp_path / "p", model_dir, campaign, mode=mode)
    run.run()
    starts = [each for each in run.folder.finished.values() if each.table == "kv_capacity"]
    assert [each.row["status"] for each in starts] == [mode] * 2
    others = [each for each in run.folder.finished.values() if each.table != "kv_capacity"]
    assert all(f"its server did not start ({mode})" in each.failure for each in others)
    assert len(others) == 7


def test_point_that_kills_its_server_is_passed_over(tmp_path: Path, model_dir: Path) -> None:
    # The fake server dies of its sixth request: whichever point that hits, the next gets a new server.
    campaign = small(serving=[], loading=[], adapters=[], kv_capacity=[])
    run = profiler(tmp_path / "p", model_dir, campaign, mode="dies", dies_at=6)
    run.run()
    failures = [each for each in run.folder.finished.values() if each.failure]
    assert failures
    assert len(run.folder.finished) == 4
    assert [each["reason"] for each in run.folder.description()["failed"]] == [each.failure for each in failures]


def test_sick_server_fails_its_points_with_a_reason(tmp_path: Path, model_dir: Path) -> None:
    campaign = small(serving=[], loading=[], adapters=[], kv_capacity=[])
    run = profiler(tmp_path / "p", model_dir, campaign, mode="breaks")
    run.run()
    assert all(
        "were not answered" in each.failure or "does not answer" in each.failure
        for each in run.folder.finished.values()
    )


def test_server_found_running_gives_what_it_can(tmp_path: Path, model_dir: Path, launch: Callable[..., Server]) -> None:
    server = launch(step_s=0.005)
    run = profiler(tmp_path / "p", model_dir, small(), url=server.url, running={"max_loras": 2, "max_lora_rank": 8})
    run.run()
    done = {each.id for each in run.folder.finished.values() if not each.failure}
    assert done == {"start/slots2-rank8"} | {
        f"adapters/slots2-rank8/adapters{served}-batch{batch}" for served, batch in ((1, 1), (1, 4), (2, 4))
    }
    assert server.running


def test_folder_of_another_profile_is_not_added_to(tmp_path: Path, model_dir: Path) -> None:
    run = profiler(tmp_path / "p", model_dir, small())
    run.folder.describe(run._description())
    with pytest.raises(InputError, match=r"flags.*choose another -o"):
        profiler(tmp_path / "p", model_dir, small(server={"max_num_seqs": 9, "max_num_batched_tokens": 64}))


def test_environment_without_vllm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="an interpreter with vLLM"):
        look_at(sys.executable)
    with pytest.raises(InputError, match="a Python interpreter"):
        look_at(tmp_path / "python")
    info = tmp_path / "vllm-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert look_at(sys.executable) == Machine("cpu", this_cpu(), "0.32.0+cpu")
