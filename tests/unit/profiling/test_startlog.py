import pytest
from lora_capacity_profiling.startlog import StartOutcome, StartReport, plain

GENERIC = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"

REFUSED = {
    "0.8.5 nothing left": (
        "ERROR 11-24 17:01:02 [core.py:396] ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when initializing the engine.",
        StartOutcome.NO_KV_CACHE,
    ),
    "0.8.5 too little left": (
        "ERROR 11-24 17:01:02 [core.py:396] ValueError: To serve at least one request with the models's max seq len "
        "(131072), (16.00 GiB KV cache is needed, which is larger than the available KV cache memory (3.10 GiB).",
        StartOutcome.NO_KV_CACHE,
    ),
    "0.8.5 on a CPU": (
        "ValueError: The model's max seq len (9000) is larger than the maximum number of tokens that can be stored in "
        "KV cache (8192). Try increasing `VLLM_CPU_KVCACHE_SPACE`",
        StartOutcome.NO_KV_CACHE,
    ),
    "0.32 too little left": (
        "(EngineCore pid=512) ERROR 11-24 18:29:03 [core.py:1750] ValueError: To serve at least one request with the "
        "model's max seq len (131072), (16.0 GiB KV cache is needed, which is larger than the available KV cache "
        "memory (3.1 GiB). Based on the available memory, the estimated maximum model length is 25344.",
        StartOutcome.NO_KV_CACHE,
    ),
    "PyTorch": (
        "ERROR 11-24 17:01:02 [core.py:396] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB.",
        StartOutcome.OOM,
    ),
    "0.32 weights": (
        "(EngineCore pid=5) ERROR 11-24 18:29:03 [gpu_model_runner.py:5150] Failed to load model - not enough GPU "
        "memory. Try lowering --gpu-memory-utilization to free memory for weights",
        StartOutcome.OOM,
    ),
    "host memory": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 4294967296000 bytes.",
        StartOutcome.OOM,
    ),
    "memory of others": (
        "(EngineCore pid=5) ERROR 11-24 18:29:03 [core.py:1750] ValueError: Free memory on device cuda:0 (20.1/79.1 "
        "GiB) on startup is less than desired GPU memory utilization (0.92, 72.8 GiB).",
        StartOutcome.FAILED,
    ),
    "rank": (
        "(Worker pid=31861) ERROR 11-24 18:29:03 [multiproc_executor.py:1063] ValueError: LoRA rank 16 is greater than "
        "max_lora_rank 8.",
        StartOutcome.FAILED,
    ),
    "worker": (
        "(EngineCore pid=7521) ERROR 11-24 18:50:41 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
        "unexpectedly (exit code: -4), shutting down executor.",
        StartOutcome.FAILED,
    ),
    "worker killed": (
        "(EngineCore pid=7521) ERROR 11-24 18:50:41 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
        "unexpectedly (exit code: -9), shutting down executor.",
        StartOutcome.OOM,
    ),
    "flag": ("api_server.py: error: unrecognized arguments: --bogus-flag 3", StartOutcome.FAILED),
}


@pytest.mark.parametrize(("line", "outcome"), REFUSED.values(), ids=REFUSED)
def test_reason_is_the_line_that_says_why(line: str, outcome: StartOutcome) -> None:
    log = f"INFO 11-24 17:00:00 [api.py:1] vLLM API server version x\n\n{line}\n  File 'x'\n{GENERIC}\n"
    report = StartReport.from_log(log, started=False, exit_code=1)
    assert report.outcome is outcome
    assert report.reason == plain(line)


@pytest.mark.parametrize(
    ("log", "exit_code", "outcome", "reason"),
    [
        ("", 1, StartOutcome.FAILED, "it wrote no log"),
        ("Loading weights\nAlmost there\n", 1, StartOutcome.FAILED, "Almost there"),
        (GENERIC, 1, StartOutcome.FAILED, GENERIC),
        ("Loading weights\n", -9, StartOutcome.OOM, "killed from outside, as the kernel does when memory runs out"),
        ("Loading weights\n", 137, StartOutcome.OOM, "killed from outside, as the kernel does when memory runs out"),
        ("Loading weights\n", None, StartOutcome.FAILED, "Loading weights"),
    ],
)
def test_start_that_fails_without_saying_why(
    log: str, exit_code: int | None, outcome: StartOutcome, reason: str
) -> None:
    report = StartReport.from_log(log, started=False, exit_code=exit_code)
    assert (report.outcome, report.reason) == (outcome, reason)


def test_memory_is_read_off_the_log() -> None:
    log = """
INFO 11-24 17:01:02 [gpu_model_runner.py:1347] Model loading took 15.3885 GiB and 3.141593 seconds
INFO 11-24 17:01:02 [kv_cache_utils.py:634] GPU KV cache size: 305,104 tokens
INFO 11-24 17:01:02 [gpu_model_runner.py:1686] Graph capturing finished in 20 secs, took 3.32 GiB
"""
    report = StartReport.from_log(log, started=True)
    assert report == StartReport(StartOutcome.OK, "", 305_104, 15.3885, 3.32)


def test_log_of_a_server_that_came_up_may_speak_of_memory() -> None:
    log = "WARNING 11-24 17:01:02 [x.py:1] CUDA out of memory may follow\n"
    assert StartReport.from_log(log, started=True) == StartReport(StartOutcome.OK)
