"""A server like vLLM for these tests: a real process behind a real port, without a model."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.material import write_model
from lora_capacity_profiling.server import Server

FAKE = Path(__file__).parent / "fake"
WAIT_S = 120.0
"""Longest wait for what must come; only a machine on which nothing else gets done takes longer."""


def fake_environment(mode: str = "ok", step_s: float = 0.0, dies_at: int = 0) -> dict[str, str]:
    return {
        "PYTHONPATH": str(FAKE),
        "HF_TOKEN": "hf_x",
        "FAKE_VLLM": mode,
        "FAKE_VLLM_STEP_S": str(step_s),
        "FAKE_VLLM_DIES_AT": str(dies_at),
    }


def write_packages(folder: Path) -> str:
    """Write what an environment tells of an installed vLLM for CPUs; return a PYTHONPATH of that and the fake one."""
    info = folder / "packages" / "vllm-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return f"{info.parent}:{FAKE}"


def fake_state(endpoint: Endpoint) -> dict[str, Any]:
    """Return what the fake server counted."""
    return dict(json.loads(endpoint.get("/fake/state", timeout_s=10)[1]))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("material") / "fake", num_hidden_layers=1)


@pytest.fixture
def launch(model_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start fake servers; all are stopped when the test ends."""
    servers: list[Server] = []

    def start(mode: str = "ok", *, step_s: float = 0.0, dies_at: int = 0, **options: Any) -> Server:
        server = Server.launch(
            model_dir,
            {"enable_lora": True, "max_loras": 2, "lora_modules": ["a0=x", "a1=x"]},
            log=tmp_path / f"server{len(servers)}.log",
            python=sys.executable,
            environment=fake_environment(mode, step_s, dies_at),
            **{"timeout_s": WAIT_S, **options},
        )
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()
