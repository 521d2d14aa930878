"""A real vLLM of its own environment: LORA_CAPACITY_VLLM_PYTHON names that environment's interpreter."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.load import run_load
from lora_capacity_profiling.material import write_adapter, write_model
from lora_capacity_profiling.metrics import Sampler
from lora_capacity_profiling.server import Server

from lora_capacity.workload.requests import Requests
from tests.unit.profiling.test_server import command_lines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PYTHON = os.environ.get("LORA_CAPACITY_VLLM_PYTHON", "")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
FLAGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enable_lora": True,
    "max_loras": 2,
    "max_cpu_loras": 4,
    "max_lora_rank": 8,
    "max_num_seqs": 16,
    "max_model_len": 512,
    "enable_prefix_caching": False,
}


def start(model: Path, log: Path, flags: Mapping[str, Any]) -> Server:
    if not PYTHON:
        pytest.skip("LORA_CAPACITY_VLLM_PYTHON names no interpreter with vLLM")
    return Server.launch(model, {**FLAGS, **flags}, log=log, python=PYTHON, environment=ENVIRONMENT, timeout_s=300.0)


def left_behind(before: Mapping[int, str], model: Path) -> list[str]:
    """Return the command lines of processes that are new and belong to such a server."""
    new = [line for pid, line in command_lines().items() if pid not in before]
    return [line for line in new if str(model) in line or "VLLM" in line or PYTHON in line]


def test_server_with_two_adapters_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = command_lines()
    model = write_model(tmp_path / "small")
    adapters = [write_adapter(tmp_path / f"a{rank}", model, rank=rank, seed=rank) for rank in (4, 8)]
    modules = [f"{folder.name}={folder}" for folder in adapters]
    # The CPU build of 0.32.0 dies of an illegal instruction when its first request is one without an adapter.
    adapter = (np.arange(20) + 1) % 3 - 1
    requests = Requests(np.arange(20) * 0.1, adapter, np.arange(20) * 5 + 1, np.arange(20) % 7 * 4 + 1)
    with start(model, tmp_path / "vllm.log", {"lora_modules": modules, "served_model_name": "small"}) as server:
        assert server.models == ("small", "a4", "a8")
        assert server.version
        pids = server.processes()
        with Sampler(server.endpoint, interval_s=5) as sampler:
            result = run_load(
                server.endpoint, requests, ["a4", "a8"], base_model="small", duration_s=120, record_pieces=True
            )
        server.check()
        assert server.report().outcome == "ok"
    assert result.failures == {}
    assert result.completed.all()
    assert np.all(result.sent_s < result.first_token_s)
    window = sampler.window
    assert window.last.completed - window.first.completed == 20
    assert window.last.prompt_tokens - window.first.prompt_tokens == requests.input_tokens.sum()
    assert window.last.generation_tokens - window.first.generation_tokens == requests.output_tokens.sum()
    assert window.last.kv_cache_tokens == 1024**3 / (2 * 4 * 4 * 32 * 2)  # bytes given / bytes of a token
    assert window.last.itl.count == (requests.output_tokens - 1).sum()
    assert len(pids) >= 3
    assert not left_behind(before, model)


@pytest.mark.parametrize(
    ("flags", "outcome", "text"),
    [
        ({"max_model_len": 600_000}, "no_kv_cache", "To serve at least one request"),
        ({"lora_modules": "rank"}, "failed", "LoRA rank 16 is greater than max_lora_rank 8"),
    ],
)
def test_server_that_cannot_start_says_why_and_leaves_nothing_behind(
    tmp_path: Path, flags: dict[str, Any], outcome: str, text: str
) -> None:
    before = command_lines()
    model = write_model(tmp_path / "small", max_position_embeddings=1_000_000)
    if "lora_modules" in flags:
        flags = {"lora_modules": [f"a16={write_adapter(tmp_path / 'a16', model, rank=16)}"]}
    with pytest.raises(ServerError) as error:
        start(model, tmp_path / "vllm.log", flags)
    assert (error.value.outcome, text in str(error.value)) == (outcome, True), str(error.value)
    assert not left_behind(before, model)
