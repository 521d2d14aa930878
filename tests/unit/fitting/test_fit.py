"""Fitting against servers whose true coefficients are known, and folders that cannot be fitted to."""

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_capacity.calibration import Calibration
from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.fitting import fit_calibration
from lora_capacity.hardware import Gpu
from lora_capacity.measurements import read_profile
from lora_capacity.memory import MemoryModel, plan_memory
from lora_capacity.models import ModelShape
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB, BYTES_PER_MIB

MODEL = ModelShape("small-llama", 16, 2048, 8192, 32, 8, 64, 32000, False, False, 8192, "LlamaForCausalLM")
GPU = Gpu("test-gpu", 40 * BYTES_PER_GIB)
MEMORY = MemoryModel(700.0 * BYTES_PER_MIB, 200.0 * BYTES_PER_MIB, 14.0, 270.0 * BYTES_PER_MIB, 100.0 * BYTES_PER_MIB)
SERVER = {"vllm_version": "0.8.5", "gpu_memory_utilization": 0.9, "max_num_seqs": 512, "max_num_batched_tokens": 2048}
TRUTH = {
    "base_s": 6e-3,
    "lora_s": 2e-3,
    "token_s": 20e-6,
    "prefill_token_s": 15e-6,
    "kv_token_s": 40e-9,
    "expand_block_s": 2e-9,
    "adapter_s": 200e-6,
    "adapter_rank_s": 6e-6,
    "active_block_factor": 0.7,
    "lora_listing_s": 1e-6,
}
NOISE = 0.005
# Recovered coefficients: noise of half a percent, and priors that pull a little.
TOLERANCE = 0.15


def expand_tiles(model: ModelShape) -> int:
    """Tiles of 128 outputs over q, k, v (as wide as q), o, gate, up and down."""
    width = model.num_attention_heads * model.head_dim
    return sum(math.ceil(outputs / 128) for outputs in (*[width] * 3, model.hidden_size)) + sum(
        math.ceil(outputs / 128) for outputs in (model.intermediate_size, model.intermediate_size, model.hidden_size)
    )


def lora_step_s(batch: int, held: float, adapters: float, slots: int, rank: int) -> float:
    """Step time of a decode batch, written out; shrink blocks cost nothing on this server."""
    grids = slots + 1 + TRUTH["active_block_factor"] * adapters
    expand = MODEL.num_layers * grids * expand_tiles(MODEL) * math.ceil(batch / 64)
    splits = 64 if batch < 128 else 8
    return (
        TRUTH["base_s"]
        + TRUTH["lora_s"]
        + TRUTH["token_s"] * batch
        + TRUTH["kv_token_s"] * held
        + TRUTH["expand_block_s"] * expand
        + (TRUTH["adapter_s"] + TRUTH["adapter_rank_s"] * rank * splits / 64 + TRUTH["lora_listing_s"] * adapters)
        * adapters
    )


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def kv_capacity_rows() -> list[dict[str, Any]]:
    cases = [(slots, rank) for rank in (8, 16, 32) for slots in (1, 8, 32, 64, 128)]
    plan = plan_memory(
        MODEL,
        GPU,
        MEMORY,
        behaviour=VllmBehaviour.for_version("0.8.5"),
        max_loras=np.array([slots for slots, _ in cases]),
        max_lora_rank=np.array([rank for _, rank in cases]),
        max_num_seqs=512,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.9,
        max_model_len=MODEL.max_position_embeddings,
    )
    return [
        {
            "model": MODEL.name,
            "max_loras": slots,
            "max_lora_rank": rank,
            "kv_cache_tokens": int(tokens) if status == Status.OK else "",
            "status": Status(status).label,
        }
        for (slots, rank), tokens, status in zip(cases, plan.kv_cache_tokens, plan.status, strict=True)
    ]


def backbone_rows(noisy: Callable[[float], float]) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 32, 64, 128, 256, 512):
        for output in (100, 400):
            held = batch * (1 + output / 2 + 8)
            step = TRUTH["base_s"] + TRUTH["token_s"] * batch + TRUTH["kv_token_s"] * held
            rows.append((batch, 1, output, noisy(step) * 1e3, 60.0, 4096))
    for prompt in (50, 100, 200, 400):
        token = TRUTH["token_s"] + TRUTH["prefill_token_s"] + TRUTH["base_s"] / 2048
        rows.append((64, prompt, 1, "", noisy(4096 * (1e-3 + prompt * token)), 4096))
    names = ("batch_size", "input_tokens", "output_tokens", "median_step_ms", "duration", "num_prompts")
    return [{"model": MODEL.name, **dict(zip(names, row, strict=True))} for row in rows]


def adapter_rows(noisy: Callable[[float], float]) -> list[dict[str, Any]]:
    return [
        {
            "model": MODEL.name,
            "max_loras": slots,
            "served_adapters": adapters,
            "max_lora_rank": rank,
            "input_tokens": 1,
            "output_tokens": 100,
            "mean_running": batch,
            "median_itl_ms": noisy(lora_step_s(batch, batch * 59.0, adapters, slots, rank)) * 1e3,
            "mean_unique_adapters": adapters,
        }
        for batch in (32, 96, 200, 400, 1600)
        for slots in (8, 64, 256)
        for rank in (8, 32)
        for adapters in sorted({1, min(slots, 24), min(slots, 120)})
        if adapters <= batch
    ]


def write_profile(folder: Path) -> None:
    """Write a profile folder of a made-up server."""
    rng = np.random.default_rng(20)

    def noisy(value: float) -> float:
        return value * float(1 + NOISE * rng.standard_normal())

    write(folder / "kv_capacity.csv", kv_capacity_rows())
    write(folder / "backbone_latency.csv", backbone_rows(noisy))
    write(folder / "adapter_latency.csv", adapter_rows(noisy))
    loads = [(8, 8), (16, 16), (32, 32)]
    names = ("max_lora_rank", "adapter_rank", "mean_disk_load_ms", "mean_memory_load_ms")
    write(
        folder / "adapter_loading.csv",
        ({"model": MODEL.name, **dict(zip(names, (a, b, 10 + 0.5 * b, 4.0), strict=True))} for a, b in loads),
    )
    description = {"model_shape": MODEL.to_json(), "gpu": GPU.to_json(), "server": SERVER}
    (folder / "profile.json").write_text(json.dumps(description))


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    write_profile(tmp_path)
    return tmp_path


def test_true_coefficients_are_recovered(profile: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = fit_calibration(profile, progress=lambda done, total: calls.append((done, total)))
    fitted = report.calibration.costs.step
    for name, truth in TRUTH.items():
        assert float(getattr(fitted, name)) == pytest.approx(truth, rel=TOLERANCE), name
    loads = report.calibration.costs.loads
    assert (loads.disk_s, loads.disk_rank_s) == (pytest.approx(10e-3, rel=1e-3), pytest.approx(0.5e-3, rel=1e-3))
    assert loads.host_to_gpu_load_s == pytest.approx(4e-3, rel=1e-3)
    assert calls == [(1, 2), (2, 2)]


def test_calibration_says_what_it_is(profile: Path, tmp_path: Path) -> None:
    report = fit_calibration(profile, name="mine")
    calibration = report.calibration
    assert (calibration.name, calibration.model, calibration.gpu) == ("mine", MODEL, GPU)
    assert calibration.runs is None
    ranges = calibration.fitted_ranges
    assert (ranges["max_loras"], ranges["max_lora_rank"]) == ((8.0, 256.0), (8.0, 32.0))
    assert set(ranges) == {"max_loras", "max_lora_rank", "input_tokens", "max_num_seqs", "max_num_batched_tokens"}
    assert ranges["input_tokens"] == (0.0, 400.0)
    assert calibration.provenance["rows"]["adapter_latency"] == 74
    assert {row["coefficient"] for row in report.table()} >= set(TRUTH)
    calibration.save(tmp_path / "mine.json")
    again = Calibration.from_file(tmp_path / "mine.json")
    assert again.to_json() == json.loads(json.dumps(calibration.to_json()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "adapter_latency.csv").unlink(), ("adapter_latency.csv", "file not found")),
        (lambda folder: (folder / "profile.json").unlink(), ("model", "profile.json")),
        (lambda folder: (folder / "profile.json").write_text("{}"), ("profile.json", "model_shape", "missing")),
        (lambda folder: (folder / "profile.json").write_text("[]"), ("profile.json", "a list", "a mapping")),
        (lambda folder: (folder / "profile.json").write_text("{"), ("profile.json line 1", "valid JSON")),
        (
            lambda folder: (folder / "adapter_loading.csv").write_text("model,max_lora_rank\nsmall-llama,8\n"),
            ("adapter_loading.csv", "adapter_rank"),
        ),
        (
            lambda folder: (folder / "kv_capacity.csv").write_text(
                "model,max_loras,max_lora_rank,kv_cache_tokens,status\nsmall-llama,8,8,many,ok\n"
            ),
            ("kv_capacity.csv line 2", "kv_cache_tokens", "many"),
        ),
        (
            lambda folder: (folder / "kv_capacity.csv").write_text(
                "model,max_loras,max_lora_rank,kv_cache_tokens,status\nother,8,8,100,ok\n"
            ),
            ("kv_capacity.csv", "small-llama", "other"),
        ),
        (
            lambda folder: (folder / "kv_capacity.csv").write_text(
                "model,max_loras,max_lora_rank,kv_cache_tokens,status\nsmall-llama,8,8,100,fine\n"
            ),
            ("status", "fine", "no_kv_cache"),
        ),
    ],
)
def test_unusable_folder(profile: Path, spoil: Callable[[Path], object], words: tuple[str, ...]) -> None:
    spoil(profile)
    with pytest.raises(InputError) as caught:
        fit_calibration(profile)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_folder_or_model_that_is_not_there(profile: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_profile(tmp_path / "nowhere")
    with pytest.raises(InputError, match="small-llama"):
        read_profile(profile, model="large-llama")
    (profile / "profile.json").unlink()
    with pytest.raises(InputError, match=r"did you mean 'llama-3.1-8b-instruct'"):
        read_profile(profile, model="llama-3.1-8b")
