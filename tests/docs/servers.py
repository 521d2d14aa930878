"""What commands of a page need of vLLM: an environment that has it, and servers at the addresses that they name.

Both are the fake vLLM of the profiling tests. A server runs as long as the command that names it.
"""

import contextlib
import fcntl
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from lora_capacity_profiling.load import at_once, run_load
from lora_capacity_profiling.material import write_model
from lora_capacity_profiling.server import Server
from lora_capacity_profiling.serving import Served, warm_up
from lora_capacity_profiling.startups import append_startup, startup_row

from tests.cli.fake_site import write_site
from tests.unit.fitting.test_fit import write_profile
from tests.unit.measurements.test_startups import LLAMA
from tests.unit.profiling.conftest import fake_environment, write_packages
from tests.unit.profiling.test_observing import DUMPS
from tests.unit.profiling.test_startups import NEW

STEP_S = 0.1  # of servers that are compared with predictions: much longer than a busy machine adds to it
QUICK_STEP_S = 0.003
SLOTS, ADAPTERS = 16, tuple(f"a{number}" for number in range(24))
PYTHON = "vllm-env/bin/python"
FLAGS = {"dtype": "bfloat16", "max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 1024}
_NAMED = re.compile(r"\blora-capacity (\w+)\b.*\bhttp://127\.0\.0\.1:(\d+)", re.DOTALL)


def write_material(folder: Path, page: str) -> None:
    """Write a model, an environment with vLLM, a calibration of its servers, a profile, and answers of /metrics.

    Args:
        folder: Where to.
        page: The page's text; a profile that its commands write is left to them.
    """
    write_model(folder / "Llama-3.1-8B-Instruct", num_hidden_layers=1, max_position_embeddings=1024)
    site = write_site(folder, step_s=STEP_S)
    python = folder / PYTHON
    python.parent.mkdir(parents=True)
    # A profile.json may tell how long a step takes: `verify --profile` starts servers with the variables that it holds.
    python.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{write_packages(folder / "vllm-env")}"\n'
        f'export FAKE_VLLM_STEP_S="${{FAKE_VLLM_STEP_S:-{QUICK_STEP_S}}}"\nexec "{sys.executable}" "$@"\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    if not re.search(r"^\$ lora-capacity profile .*-o my_profile", page, re.MULTILINE):
        profile = folder / "my_profile"
        profile.mkdir()
        write_profile(profile)
        about = json.loads((profile / "profile.json").read_text("utf-8"))
        about |= {"model": site.model.name, "flags": FLAGS}
        about["servers"] = [{"environment": {"FAKE_VLLM_STEP_S": str(STEP_S)}}]
        (profile / "profile.json").write_text(json.dumps(about), encoding="utf-8")
    for name, dump in zip(("at-1200.txt", "at-1210.txt"), (DUMPS[0], DUMPS[-1]), strict=True):
        # Answers as short as those of the pages' workload.
        (folder / name).write_text(dump.read_text("utf-8").replace(" 4523.0", " 2000.0"), encoding="utf-8")
    (folder / "vllm.log").write_text(NEW, encoding="utf-8")
    append_startup(folder / "startups.csv", startup_row(NEW, "first") | {"gpu": "L4"})
    (folder / "models.csv").write_text(
        "model_as_written_in_table,config_file\norg/model,llama.json\n", encoding="utf-8"
    )
    (folder / "model_configs").mkdir()
    (folder / "model_configs" / "llama.json").write_text(json.dumps(LLAMA), encoding="utf-8")


@contextlib.contextmanager
def servers(command: str, folder: Path) -> Iterator[None]:
    """Serve at the address that a command names, if it names one; a server to observe is loaded by others.

    Args:
        command: The command.
        folder: Where it runs.
    """
    named = _NAMED.search(command)
    if named is None:
        yield
        return
    flags = {"enable_lora": True, "max_loras": SLOTS, "lora_modules": [f"{name}=x" for name in ADAPTERS]}
    step_s = STEP_S if named[1] == "verify" else QUICK_STEP_S
    with (
        _one_at_a_time(),
        Server.launch(
            folder / "Llama-3.1-8B-Instruct",
            flags,
            log=folder / "server.log",
            environment=fake_environment(step_s=step_s),
            port=int(named[2]),
            timeout_s=60.0,
        ) as server,
    ):
        warm_up(Served(server.endpoint, ADAPTERS, server.models[0]))  # until it is asked, it does not tell its slots
        with _others(server) if named[1] == "observe" else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait for other processes' servers to end: pages name the same address."""
    with Path(__file__).open(encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _others(server: Server) -> Iterator[None]:
    """Load a server from a thread."""
    over = threading.Event()
    each = at_once(np.arange(len(ADAPTERS)), np.full(len(ADAPTERS), 30), np.full(len(ADAPTERS), 12))

    def load() -> None:
        while not over.is_set():
            run_load(server.endpoint, each, ADAPTERS, base_model=server.models[0], duration_s=60, max_pending=1)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
