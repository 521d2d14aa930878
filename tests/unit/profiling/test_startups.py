import csv

import pytest
from lora_capacity_profiling.startups import append_startup, startup_row

from lora_capacity.errors import InputError

# Lines in the wording of these versions, with numbers made up.
NEW = """\
INFO 09-12 10:00:00 [api_server.py:1896] vLLM API server version 0.11.0
INFO 09-12 10:00:00 [utils.py:233] non-default args: {'max_model_len': 8192, 'enable_lora': True, 'max_loras': 4, \
'max_lora_rank': 32, 'max_num_seqs': 64}
INFO 09-12 10:00:01 [scheduler.py:205] Chunked prefill is enabled with max_num_batched_tokens=2048.
(EngineCore_DP0 pid=1) INFO 09-12 10:00:05 [core.py:77] Initializing a V1 LLM engine (v0.11.0) with config: \
model='org/model', speculative_config=None, tokenizer='org/model', dtype=torch.bfloat16, max_seq_len=8192, \
tensor_parallel_size=2, pipeline_parallel_size=1, quantization=fp8, enforce_eager=False, kv_cache_dtype=auto, seed=0
(EngineCore_DP0 pid=1) INFO 09-12 10:00:20 [gpu_model_runner.py:2653] Model loading took 15.4321 GiB and 5.1 seconds
(EngineCore_DP0 pid=1) INFO 09-12 10:00:50 [gpu_worker.py:298] Available KV cache memory: 2.17 GiB
(EngineCore_DP0 pid=1) INFO 09-12 10:00:50 [kv_cache_utils.py:1087] GPU KV cache size: 17,776 tokens
(EngineCore_DP0 pid=1) INFO 09-12 10:01:05 [gpu_model_runner.py:3480] Graph capturing finished in 12 secs, took 0.91 GiB
(EngineCore_DP0 pid=1) DEBUG 09-12 10:01:05 [gpu_worker.py:391] Free memory on device (21.80/22.06 GiB) on startup. \
Desired GPU memory utilization is (0.85, 18.75 GiB). Actual usage is 15.43 GiB for weight, 1.19 GiB for peak \
activation, 0.05 GiB for non-torch memory, and 0.91 GiB for CUDAGraph memory.
"""
OLD = """\
INFO 03-01 10:00:00 llm_engine.py:234] Initializing a V0 LLM engine (v0.8.2) with config: model='org/model', \
speculative_config=None, tokenizer='org/model', dtype=torch.float16, max_seq_len=2048, tensor_parallel_size=1, \
pipeline_parallel_size=1, quantization=None, enforce_eager=True, kv_cache_dtype=auto,
INFO 03-01 10:00:20 worker.py:267] the current vLLM instance can use total_gpu_memory (14.74GiB) x \
gpu_memory_utilization (0.60) = 8.84GiB
INFO 03-01 10:00:20 worker.py:267] model weights take 5.35GiB; non_torch_memory takes 0.05GiB; PyTorch activation peak \
memory takes 0.74GiB; the rest of the memory reserved for KV Cache is 2.64GiB.
INFO 03-01 10:00:21 executor_base.py:111] # cuda blocks: 1353, # CPU blocks: 0
"""


def test_a_log_of_the_v1_engine():
    row = startup_row(NEW, "mine")
    assert row == {
        "id": "mine",
        "vllm_version": "0.11.0",
        "engine": "V1",
        "model": "org/model",
        "dtype": "bfloat16",
        "max_model_len": "8192",
        "num_gpus_tp": "2",
        "pp": "1",
        "quantization": "fp8",
        "enforce_eager": "False",
        "kv_cache_dtype": "auto",
        "max_num_seqs": "64",
        "enable_lora": "True",
        "max_loras": "4",
        "max_lora_rank": "32",
        "gpu_memory_gib": "22.06",
        "gpu_memory_utilization": "0.85",
        "model_load_gib": "15.4321",
        "activation_peak_gib": "1.19",
        "non_torch_gib": "0.05",
        "cuda_graph_gib": "0.91",
        "kv_cache_gib": "2.17",
        "kv_cache_tokens": "17776",
        "max_num_batched_tokens": "2048",
        "outcome": "ok",
    }


def test_a_log_of_the_v0_engine():
    row = startup_row(OLD, "old")
    expected = {"engine": "V0", "vllm_version": "0.8.2", "gpu_memory_gib": "14.74", "gpu_memory_utilization": "0.60"}
    expected |= {"model_load_gib": "5.35", "activation_peak_gib": "0.74", "non_torch_gib": "0.05", "outcome": "ok"}
    expected |= {"kv_cache_gib": "2.64", "num_gpu_blocks": "1353", "enforce_eager": "True"}
    assert {name: row.get(name) for name in expected} == expected
    assert "quantization" not in row


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 MiB", "oom"),
        ("ValueError: No available memory for the cache blocks.", "no_kv_cache"),
        ("INFO: Application startup complete.\nrequest 1: CUDA out of memory", "ok"),
    ],
)
def test_what_became_of_the_start(end, outcome):
    text = NEW if outcome != "no_kv_cache" else NEW.split("(EngineCore_DP0 pid=1) INFO 09-12 10:00:50")[0]
    assert startup_row(f"{text}{end}\n", "mine")["outcome"] == outcome


def test_starts_are_added_to_a_table(tmp_path):
    for name in ("one", "two"):
        append_startup(tmp_path / "facts.csv", startup_row(NEW, name))
    with (tmp_path / "facts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["one", "two"]
    assert rows[0]["kv_cache_tokens"] == "17776"
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="a table of starts"):
        append_startup(tmp_path / "other.csv", startup_row(NEW, "three"))
