"""A server that answers as vLLM does, without a model; run in place of vLLM by putting the folder on PYTHONPATH.

FAKE_VLLM says how it behaves: ok, no_kv_cache, oom, killed, dies (of request number
FAKE_VLLM_DIES_AT), stubborn (ignores SIGTERM, and so do its two children, one in a session of its own), sick (answers
500), slow (never healthy), breaks (ends an answer midway), odd (answers no JSON), closes (connections after each
answer). A step takes FAKE_VLLM_STEP_S.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MODE = os.environ.get("FAKE_VLLM", "ok")
STEP_S = float(os.environ.get("FAKE_VLLM_STEP_S", "0"))
DIES_AT = int(os.environ.get("FAKE_VLLM_DIES_AT", "0"))

REFUSALS = {
    "no_kv_cache": "(EngineCore pid=7) ERROR 11-24 18:25:09 [core.py:1] ValueError: To serve at least one request with "
    "the model's max seq len (131072), (16.0 GiB KV cache is needed, which is larger than the available KV cache "
    "memory (2.1 GiB). Try increasing `gpu_memory_utilization`",
    "oom": "(EngineCore pid=7) ERROR 11-24 18:25:09 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to "
    "allocate 1.00 GiB.",
}
LIMITS = ("max-num-seqs", "max-num-batched-tokens", "max-model-len")
MEMORY = ("gpu-memory-utilization", "kv-cache-memory-bytes", "block-size")
TIMES = ("time_to_first_token", "inter_token_latency", "request_queue_time", "request_inference_time")
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"

state = {"running": 0, "completed": 0, "prompt": 0, "generated": 0, "most_running": 0, "connections": 0, "slots": 1}
bodies: list[dict] = []
fatal = asyncio.Event()
asked_s: dict[str, float] = {}
times: dict[str, list[float]] = {name: [] for name in TIMES}
lengths: dict[str, list[float]] = {name: [] for name in ("request_prompt_tokens", "request_generation_tokens")}


def metrics() -> str:
    values = {
        "num_requests_running": state["running"],
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0.25,
        "num_preemptions_total": 0,
        "prompt_tokens_total": state["prompt"],
        "generation_tokens_total": state["generated"],
    }
    lines = [f'vllm:{name}{{engine="0",model_name="fake"}} {value}' for name, value in values.items()]
    lines.append('vllm:num_requests_waiting_by_reason{engine="0",model_name="fake",reason="deferred"} 0')
    lines.append(f'vllm:request_success_total{{engine="0",finished_reason="length"}} {state["completed"]}')
    lines.append('vllm:cache_config_info{block_size="16",num_gpu_blocks="100",engine="0"} 1.0')
    for name, seen_s in asked_s.items():
        labels = f'max_lora="{state["slots"]}",running_lora_adapters="{name}",waiting_lora_adapters=""'
        lines.append(f"vllm:lora_requests_info{{{labels}}} {seen_s}")
    for name, numbers in {**{f"{name}_seconds": each for name, each in times.items()}, **lengths}.items():
        for bound in ("0.01", "0.1", "10", "100", "+Inf"):
            count = sum(number <= float(bound) for number in numbers)
            lines.append(f'vllm:{name}_bucket{{le="{bound}"}} {count}')
        lines += [f"vllm:{name}_sum {sum(numbers)}", f"vllm:{name}_count {len(numbers)}"]
    return "\n".join(lines) + "\n"


def answer(status: int, body: str, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def card(name: str, base: str) -> dict[str, str | None]:
    return {"id": name, "parent": None if name == base else base}


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


TOKEN = chunk(f"data: {json.dumps({'id': 'cmpl-0', 'choices': [{'index': 0, 'text': ' w5', 'stop': None}]})}\n\n")


async def complete(body: dict, writer: asyncio.StreamWriter, models: list[str]) -> bool:
    """Stream an answer; return whether the connection stays open."""
    prompt = body["prompt"]
    bodies.append({**body, "prompt": len(prompt), "begin": prompt[:5], "least": min(prompt), "most": max(prompt)})
    if len(bodies) == DIES_AT:
        fatal.set()
    if body["model"] not in models:
        writer.write(answer(404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})))
        return True
    if body["model"] != models[0]:
        asked_s[body["model"]] = time.time()
    began_s, first_s = time.monotonic(), 0.0
    state["running"] += 1
    state["most_running"] = max(state["running"], state["most_running"])
    try:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for index in range(body["max_tokens"]):
            if STEP_S or index % 16 == 0:
                await asyncio.sleep(STEP_S)
            if MODE == "breaks" and index == 2:
                return False
            first_s = first_s or time.monotonic()
            writer.write(TOKEN)
            await writer.drain()
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        writer.write(chunk(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"))
        writer.write(chunk("data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
        times["time_to_first_token"].append(first_s - began_s)
        times["request_queue_time"].append(0.0)
        times["request_inference_time"].append(time.monotonic() - began_s)
        more = body["max_tokens"] - 1
        times["inter_token_latency"] += [(time.monotonic() - first_s) / max(more, 1)] * more
        lengths["request_prompt_tokens"].append(len(body["prompt"]))
        lengths["request_generation_tokens"].append(body["max_tokens"])
        state["completed"] += 1
        state["prompt"] += len(body["prompt"])
        state["generated"] += body["max_tokens"]
        return True
    finally:
        state["running"] -= 1


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, models: list[str]) -> None:
    state["connections"] += 1
    keep = True
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while keep:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            lines = [line.partition(":") for line in head.lower().split("\r\n")]
            length = next((int(value) for name, _, value in lines if name == "content-length"), 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            if path == "/health":
                writer.write(answer(500 if MODE == "sick" else 200, ""))
            elif path == "/version":
                writer.write(answer(200, "odd" if MODE == "odd" else '{"version": "0.32.0"}'))
            elif path == "/v1/models":
                writer.write(answer(200, json.dumps({"data": [card(name, models[0]) for name in models]})))
            elif path == "/metrics":
                writer.write(answer(200, metrics(), "text/plain"))
            elif path == "/fake/state":
                writer.write(answer(200, json.dumps({**state, "bodies": bodies})))
            elif path == "/v1/completions":
                if MODE == "mute":
                    await asyncio.sleep(3600)
                if MODE in ("sick", "failing"):
                    writer.write(answer(500, "Internal Server Error", "text/plain"))
                else:
                    keep = await complete(body, writer, models)
            else:
                writer.write(answer(404, "{}"))
            await writer.drain()
            keep = keep and MODE != "closes"
    writer.close()


def check_ranks(options: argparse.Namespace) -> None:
    """Refuse adapters of too large a rank in vLLM's words."""
    for module in options.lora_modules:
        config = Path(module.partition("=")[2]) / "adapter_config.json"
        if config.exists() and (rank := json.loads(config.read_text())["r"]) > int(options.max_lora_rank):
            sys.exit(f"ValueError: LoRA rank {rank} is greater than max_lora_rank {options.max_lora_rank}.")


async def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model", nargs="?")
    names = ("host", "dtype", "max-loras", "max-cpu-loras", "max-lora-rank", "served-model-name")
    for name in (*names, *LIMITS, *MEMORY):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    for name in ("enable-lora", "no-enable-prefix-caching"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    options = parser.parse_args()
    sys.stderr.write("INFO 11-24 18:25:09 [launcher.py:1] vLLM API server version 0.32.0\n")
    if MODE in REFUSALS:
        sys.exit(f"{REFUSALS[MODE]}\nRuntimeError: Engine core initialization failed. See root cause above.")
    if MODE == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for own_session in (False, True):
            child = subprocess.Popen(
                [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=own_session
            )
            assert child.stdout is not None
            child.stdout.readline()
    if MODE == "slow":
        time.sleep(60)
    check_ranks(options)
    state["slots"] = int(options.max_loras or 1)
    models = [options.served_model_name or "fake", *(each.partition("=")[0] for each in options.lora_modules)]
    server = await asyncio.start_server(
        lambda reader, writer: serve(reader, writer, models), options.host, options.port, backlog=2048
    )
    if MODE == "dies":
        await fatal.wait()
        sys.stderr.write("RuntimeError: the engine fell over\n")
        os._exit(3)
    async with server:
        await server.serve_forever()


asyncio.run(main())
