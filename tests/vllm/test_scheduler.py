"""The reference scheduler against vLLM's own, step for step, on random workloads that are short of everything."""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_capacity.engines import VllmBehaviour
from lora_capacity.twins.reference import AdapterTiers, Behaviour, Config, StepRecord, StepState, simulate
from lora_capacity.workload import Requests

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
GIVEN_PYTHON = os.environ.get("LORA_CAPACITY_VLLM_PYTHON")
PYTHON = Path(GIVEN_PYTHON or REPOSITORY / ".venv-vllm" / "bin" / "python")
ADAPTERS = 6
CASES = 200
CACHING_CASES = 30  # some 25,000 steps a version
TIMEOUT_S = 600


@dataclass(frozen=True)
class Version:
    """A vLLM to compare with: its number, what it does, if its files lie beside the environment's own."""

    number: str
    behaviour: Behaviour
    beside: bool = True
    has_watermark: bool = True
    has_active_limit: bool = False


def behaviour(version: str, device: str = "gpu") -> Behaviour:
    return Behaviour.of(VllmBehaviour.for_version(version, device).scheduler)


VERSIONS = {
    "0.8.5": Version("0.8.5", behaviour("0.8.5"), has_watermark=False),
    # The one rule that the library leaves out.
    "0.13": Version("0.13.0", replace(behaviour("0.13.0"), skipped="reverse"), has_watermark=False),
    "0.14": Version("0.14.0", behaviour("0.14.0"), has_watermark=False),
    "0.26": Version("0.26.0", behaviour("0.26.0")),
    "0.32-cpu": Version("0.32.0", behaviour("0.32.0", "cpu"), beside=False, has_active_limit=True),
    "0.32": Version("0.32.0", behaviour("0.32.0"), beside=False, has_active_limit=True),
    "0.33": Version("0.33.0", behaviour("0.33.0"), has_active_limit=True),
}


def run_vllm(version: Version, what: str, cases: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Play cases in a process of its own, with the vLLM that is asked for."""
    if not GIVEN_PYTHON and not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: run tests/vllm/make_environment.sh, or set LORA_CAPACITY_VLLM_PYTHON")
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if version.beside:
        environment["PYTHONPATH"] = str(PYTHON.parents[1] / f"vllm-{version.number}")
    script = Path(__file__).with_name("drive_vllm.py")
    command = [str(PYTHON), str(script), what, str(folder / "cases.json"), str(folder / "traces.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((folder / "traces.json").read_text())
    assert result["version"].startswith(version.number)
    return list(result["traces"])


@dataclass(frozen=True)
class Case:
    """A server and its requests; arrivals are whole seconds, a step takes one."""

    requests: Requests
    config: Config
    max_num_seqs: int

    @classmethod
    def random(cls, rng: np.random.Generator, version: Version, caching: bool = False) -> "Case":
        count = int(rng.integers(5, 60))
        max_tokens = int(rng.choice([40, 100, 300] if caching else [8, 40, 100]))
        max_num_seqs = int(rng.integers(1, 17))
        block_size = int(rng.choice([16, 32])) if caching else 16
        longest = -(-2 * max_tokens // block_size)
        kv_blocks = longest + int(rng.integers(0, (8 if caching else 3) * longest))
        watermark = min(int(rng.choice([0, 0, 1, 2])), kv_blocks) if version.has_watermark else 0
        config = Config(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + int(rng.integers(0, 60)),
            max_loras=(max_loras := int(rng.integers(1, 5))),
            max_cpu_loras=max_loras + int(rng.integers(0, 3)),
            kv_blocks=kv_blocks,
            block_size=block_size,
            watermark_blocks=watermark,
            long_prefill_token_threshold=int(rng.choice([0, 0, 1, 7, 16, 50])),
            prefix_caching=caching,
            behaviour=version.behaviour,
        )
        rows = Requests(
            np.cumsum(rng.poisson(rng.choice([0.2, 1, 4]), count)),
            rng.integers(-1, ADAPTERS, count),
            rng.integers(1, max_tokens + 1, count),
            rng.integers(1, max_tokens + 1, count),
        )
        if caching:
            # Of some adapters nothing is shared; of others all that the prompt has room for, or parts of it.
            share = rng.choice([0.0, 0.6, 1.0], ADAPTERS + 1)[rows.adapter]
            most = rng.choice([16, 50, max_tokens])
            rows = replace(rows, shared_prefix_tokens=np.minimum(share * rows.input_tokens, most))
        spare = int(rng.integers(0, 4)) if version.has_active_limit else 0
        return cls(rows, config, min(max_num_seqs + spare, config.max_num_batched_tokens))

    def for_vllm(self) -> dict[str, Any]:
        rows, config = self.requests, self.config
        lengths = (rows.input_tokens, rows.output_tokens, rows.shared_prefix_tokens)
        columns = (rows.arrival_s.astype(int), rows.adapter, *lengths)
        names = ("long_prefill_token_threshold", "max_num_batched_tokens", "block_size", "max_loras", "max_cpu_loras")
        fewer = config.max_num_seqs < self.max_num_seqs
        num_gpu_blocks = config.kv_blocks + 1
        return {name: getattr(config, name) for name in names} | {
            "max_num_seqs": self.max_num_seqs,
            "max_num_active_seqs": config.max_num_seqs if fewer else None,
            "num_gpu_blocks": num_gpu_blocks,
            "watermark": (config.watermark_blocks + 0.5) / num_gpu_blocks if config.watermark_blocks else 0.0,
            "prefix_caching": config.prefix_caching,
            "async_scheduling": config.behaviour.async_scheduling,
            "requests": np.stack(columns, axis=1).tolist(),
        }

    def trace(self) -> list[dict[str, Any]]:
        return [
            {
                "scheduled": [list(item) for item in step.state.scheduled.items()],
                "found": [list(item) for item in step.state.found.items()],
                "preempted": list(step.state.preempted),
                "running": step.state.running,
                "waiting": step.state.waiting,
                "blocks_used": step.state.blocks_used,
                "end_s": step.end_s,
                "finished": list(step.finished),
            }
            for step in self.steps()
        ]

    def steps(self) -> list[StepRecord]:
        return simulate(self.requests, self.config, one_second).steps


def one_second(_: StepState) -> float:
    return 1.0


@cache
def random_cases(name: str, caching: bool) -> list[Case]:
    rng = np.random.default_rng(20251)
    return [Case.random(rng, VERSIONS[name], caching) for _ in range(CACHING_CASES if caching else CASES)]


@pytest.mark.parametrize("caching", [False, True], ids=["", "prefix-caching"])
@pytest.mark.parametrize("name", VERSIONS)
def test_every_step_is_the_one_that_vllm_schedules(name: str, caching: bool, tmp_path: Path) -> None:
    cases = random_cases(name, caching)
    traces = run_vllm(VERSIONS[name], "scheduler", [case.for_vllm() for case in cases], tmp_path)
    assert len(traces) == len(cases)
    for case, trace in zip(cases, traces, strict=True):
        ours = case.trace()
        different = [index for index, pair in enumerate(zip(ours, trace, strict=False)) if pair[0] != pair[1]]
        assert not different, (case, different[0], ours[different[0]], trace[different[0]])
        assert len(ours) == len(trace)


@pytest.mark.parametrize("name", VERSIONS)
def test_random_workloads_reach_every_rule(name: str) -> None:
    states = [step.state for case in random_cases(name, False) for step in case.steps()]
    assert sum(len(state.preempted) for state in states) > 300
    assert sum(len(state.preempted) > 1 for state in states) > 4
    assert sum(state.skipped > 0 for state in states) > 2000
    assert sum(max(state.scheduled.values()) > 1 for state in states) > 2000
    assert sum(state.waiting > state.skipped for state in states) > 1000
    assert sum(len(state.scheduled) > len(state.sampling) + 1 for state in states) > 1000  # several prompts in part


@pytest.mark.parametrize("name", VERSIONS)
def test_random_workloads_find_blocks_of_their_own_and_of_others(name: str) -> None:
    own, others, sizes = 0, 0, set()
    for case in random_cases(name, True):
        preempted: set[int] = set()
        for step in case.steps():
            again = [number for number in step.state.found if number in preempted]
            own += len(again)
            others += len(step.state.found) - len(again)
            preempted |= set(step.state.preempted)
        sizes.add(case.config.block_size)
    assert own > 40
    assert others > 150
    assert sizes == {16, 32}


@pytest.mark.parametrize("name", ["0.8.5", "0.32", "0.33"])
def test_adapters_move_as_in_vllm(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(20252)
    cases: list[dict[str, Any]] = []
    for _ in range(CASES):
        max_loras = int(rng.integers(1, 6))
        adapters = max_loras + int(rng.integers(0, 6))
        order = rng.permutation(adapters)
        sizes = rng.integers(0, max_loras + 1, 60)
        steps = [order[np.sort(rng.permutation(adapters)[:size])].tolist() for size in sizes]
        cases.append({"max_loras": max_loras, "max_cpu_loras": max_loras + int(rng.integers(0, 4)), "steps": steps})
    cascades = 0
    for case, trace in zip(cases, run_vllm(VERSIONS[name], "adapters", cases, tmp_path), strict=True):
        tiers = AdapterTiers(case["max_loras"], case["max_cpu_loras"])
        for adapters, loads in zip(case["steps"], trace, strict=True):
            resident = set(tiers.gpu)
            moved = [(adapter, *tiers.touch(adapter)) for adapter in adapters]
            ours = [[row[0] for row in moved if row[tier]] for tier in (1, 2)]
            assert ours == [loads["host_loads"], loads["disk_loads"]]
            cascades += bool(resident & set(ours[0]))
    assert cascades > 300
