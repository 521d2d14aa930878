"""A server that answers as vLLM does, without a model; run in place of vLLM by putting the folder on PYTHONPATH.

FAKE_VLLM says how it behaves: ok, no_kv_cache, oom, killed, dies (after FAKE_VLLM_DIES_S), stubborn (ignores SIGTERM,
and so do its two children, one in a session of its own), sick (answers 500), slow (never healthy), breaks (ends an
answer midway), odd (answers no JSON), closes (connections after each answer). A step takes FAKE_VLLM_STEP_S.
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

MODE = os.environ.get("FAKE_VLLM", "ok")
STEP_S = float(os.environ.get("FAKE_VLLM_STEP_S", "0"))

REFUSALS = {
    "no_kv_cache": "(EngineCore pid=7) ERROR 11-24 18:25:09 [core.py:1] ValueError: To serve at least one request with "
    "the model's max seq len (131072), (16.0 GiB KV cache is needed, which is larger than the available KV cache "
    "memory (2.1 GiB). Try increasing `gpu_memory_utilization`",
    "oom": "(EngineCore pid=7) ERROR 11-24 18:25:09 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to "
    "allocate 1.00 GiB.",
}
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"

state = {"running": 0, "completed": 0, "prompt": 0, "generated": 0, "most_running": 0, "connections": 0}
bodies: list[dict] = []


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
    lines.append(f'vllm:request_success_total{{engine="0",finished_reason="length"}} {state["completed"]}')
    lines.append('vllm:cache_config_info{block_size="16",num_gpu_blocks="100",engine="0"} 1.0')
    return "\n".join(lines) + "\n"


def answer(status: int, body: str, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


TOKEN = chunk(f"data: {json.dumps({'id': 'cmpl-0', 'choices': [{'index': 0, 'text': ' w5', 'stop': None}]})}\n\n")


async def complete(body: dict, writer: asyncio.StreamWriter, models: list[str]) -> bool:
    """Stream an answer; return whether the connection stays open."""
    bodies.append({**body, "prompt": len(body["prompt"]), "least": min(body["prompt"]), "most": max(body["prompt"])})
    if body["model"] not in models:
        writer.write(answer(404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})))
        return True
    state["running"] += 1
    state["most_running"] = max(state["running"], state["most_running"])
    try:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for index in range(body["max_tokens"]):
            if STEP_S or index % 16 == 0:
                await asyncio.sleep(STEP_S)
            if MODE == "breaks" and index == 2:
                return False
            writer.write(TOKEN)
            await writer.drain()
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        writer.write(chunk(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"))
        writer.write(chunk("data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
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
                writer.write(answer(200, json.dumps({"data": [{"id": name} for name in models]})))
            elif path == "/metrics":
                writer.write(answer(200, metrics(), "text/plain"))
            elif path == "/fake/state":
                writer.write(answer(200, json.dumps({**state, "bodies": bodies})))
            elif path == "/v1/completions":
                if MODE == "sick":
                    writer.write(answer(500, "Internal Server Error", "text/plain"))
                else:
                    keep = await complete(body, writer, models)
            else:
                writer.write(answer(404, "{}"))
            await writer.drain()
            keep = keep and MODE != "closes"
    writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "served-model-name", "host"):
        parser.add_argument(f"--{name}")
    for name in ("loras", "cpu-loras", "lora-rank", "num-seqs", "num-batched-tokens"):
        parser.add_argument(f"--max-{name}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--enable-lora", action="store_true")
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
    models = ["fake", *(each.partition("=")[0] for each in options.lora_modules)]
    server = await asyncio.start_server(
        lambda reader, writer: serve(reader, writer, models), options.host, options.port, backlog=2048
    )
    if MODE == "dies":
        await asyncio.sleep(float(os.environ["FAKE_VLLM_DIES_S"]))
        sys.stderr.write("RuntimeError: the engine fell over\n")
        os._exit(3)
    async with server:
        await server.serve_forever()


asyncio.run(main())
