import json
import sys
from pathlib import Path

import pytest
from lora_capacity_profiling.deployment import Deployment, Profiled, adapter_names, served_names
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.server import Server

from lora_capacity.engines import ServerConfig, VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.hardware import Gpu
from lora_capacity.models import ModelShape
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.workload import Workload
from tests.unit.profiling.conftest import WAIT_S, fake_environment

REQUESTS = {
    "input_tokens": {"mean": 20, "std": 5, "min": 4, "max": 40},
    "output_tokens": {"mean": 6, "std": 2, "min": 2, "max": 12},
}


@pytest.fixture
def mix() -> Workload:
    return Workload.from_mapping({"adapters": {"mix": {"rates_per_s": [1], "ranks": [8, 4]}}, "requests": REQUESTS})


@pytest.fixture
def listed(tmp_path: Path) -> Workload:
    (tmp_path / "list.csv").write_text("adapter,rank,rate_per_s\nx,8,1\ny,8,1\n")
    return Workload.from_mapping({"adapters": {"list": "list.csv"}, "requests": REQUESTS}, tmp_path)


def config(model: Path, **settings: object) -> ServerConfig:
    shape = ModelShape.from_file(model)
    behaviour = VllmBehaviour.for_version("0.32.0")
    given = {"max_cpu_loras": 3, "max_loras": 2, "max_lora_rank": 8, "max_model_len": 512, **settings}
    return ServerConfig.with_defaults(behaviour, Gpu("cpu", BYTES_PER_GIB), shape, **given)


def test_server_is_started_with_its_settings_and_adapters(model_dir: Path, tmp_path: Path, mix: Workload) -> None:
    site = Deployment(
        str(model_dir),
        ModelShape.from_file(model_dir),
        tmp_path / "site",
        sys.executable,
        flags={"dtype": "bfloat16"},
        environment=fake_environment(),
        timeout_s=WAIT_S,
    )
    with site.start(config(model_dir, gpu_memory_utilization=0.5, enable_prefix_caching=False), mix) as server:
        flags = server.flags
        assert server.models[0] == "fake"
        assert server.adapters == ("a0", "a1", "a2")
    assert (flags["max_loras"], flags["max_cpu_loras"], flags["max_model_len"]) == (2, 3, 512)
    assert (flags["gpu_memory_utilization"], flags["enable_prefix_caching"], flags["dtype"]) == (0.5, False, "bfloat16")
    assert flags["block_size"] == 16  # what the prediction rests on, though it may be vLLM's own
    modules = flags["lora_modules"]
    assert isinstance(modules, list)
    folders = [Path(module.partition("=")[2]) for module in modules]
    assert [json.loads((folder / "adapter_config.json").read_text())["r"] for folder in folders] == [8, 4, 8]
    assert folders[0] == folders[2]
    assert server.environment["HF_HUB_OFFLINE"] == "1"


def test_names_are_those_of_the_list(mix: Workload, listed: Workload) -> None:
    assert adapter_names(mix, 3) == ("a0", "a1", "a2")
    assert adapter_names(listed, 1) == ("x",)


def test_names_of_a_running_server(mix: Workload, listed: Workload) -> None:
    server = Server(Endpoint("127.0.0.1", 1), models=("m", "z", "y", "x"), adapters=("z", "y", "x"))
    assert served_names(server, listed, 2) == ("x", "y")
    assert served_names(server, mix, 2) == ("z", "y")
    with pytest.raises(InputError, match="adapters: 4 is not allowed; allowed: 1 to 3"):
        served_names(server, mix, 4)


def test_profile_tells_how_its_servers_were_started(tmp_path: Path) -> None:
    content = {
        "model": "m",
        "flags": {"dtype": "bfloat16", "max_num_seqs": 64, "block_size": 128},
        "servers": [{"environment": {"OMP_NUM_THREADS": "1", "HF_TOKEN": "(secret)"}}],
    }
    (tmp_path / "profile.json").write_text(json.dumps(content))
    found = Profiled.read(tmp_path)
    assert (found.model, found.settings) == ("m", {"max_num_seqs": 64, "block_size": 128})
    assert (found.flags, found.environment) == ({"dtype": "bfloat16"}, {"OMP_NUM_THREADS": "1"})
    with pytest.raises(InputError, match="file not found"):
        Profiled.read(tmp_path / "none")
