"""A Ray cluster answers as this machine alone, whichever nodes go; what is lost is told, and gone on from."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity.calibration import load_calibration
from lora_capacity.errors import ImpossibleResultError, InputError
from lora_capacity.fleet import Fleet
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.plays import Plays, Server
from lora_capacity.measurements import read_runs
from lora_capacity.run import LengthSample, on_ray, simulate
from lora_capacity.run.cache import keep_compiled_code
from lora_capacity.run.tasks import ELSEWHERE, Remembered, run_tasks
from lora_capacity.validation import predict_runs
from tests.cli.test_bad_input import RUN
from tests.examples import STAYS, make_calibration, make_scenarios

LLAMA = "llama-3.1-8b-instruct-h100-64gb"
LENGTHS = {"mean": 100, "std": 80, "min": 4, "max": 500}
REQUESTS = {"input_tokens": LENGTHS, "output_tokens": LENGTHS}
FLEET = {
    "adapters": [{"adapter": "a", "rank": 8, "rate_per_s": 3.0}, {"adapter": "b", "rank": 8, "rate_per_s": 2.0}],
    "pools": [{"calibration": LLAMA}],
    "requests": REQUESTS,
    "horizon_s": 30,
}
WORKLOAD = f"""
adapters: {{mix: {{rates_per_s: [0.4], ranks: [8]}}}}
requests: {REQUESTS}
horizon_s: 600
"""
SWEEP = ["sweep", "w.yaml", "--engine", "event", "--adapters", "8:64:4", "--max-loras", "2,4,8", "-o", "grid.csv"]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "allowed: local, auto, or HOST:PORT.*; no head of a cluster answers there"),
        ("nowhere.invalid:6379", "no head of a cluster answers there"),
        ("6379", "allowed: local, auto, or HOST:PORT"),
        ("host:port", "allowed: local, auto, or HOST:PORT"),
    ],
)
def test_an_address_where_nothing_answers_is_told_at_once(address: str, told: str) -> None:
    began_s = time.monotonic()
    with pytest.raises(InputError, match=rf"^ray: '{address}' .*{told}"), on_ray(address):
        pass
    assert time.monotonic() - began_s < 30  # Ray itself waits for two minutes


def test_a_server_of_another_kind_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        other = threading.Thread(target=refuse)
        other.start()
        with pytest.raises(InputError, match="no head of a cluster answers there"):
            on_ray(f"127.0.0.1:{server.getsockname()[1]}").__enter__()
        other.join()


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"with Ray installed; pip install 'lora-capacity\[ray\]'"), on_ray("local"):
        pass


def test_tasks_of_an_interrupted_run_that_are_under_way_are_kept() -> None:
    both, kept = threading.Barrier(2), []

    def task(item: int) -> int:
        if item < 2:
            both.wait()
        return item

    def finished(item: int) -> None:
        kept.append(item)
        if len(kept) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(task, range(2), finished, threads=2)
    assert sorted(kept) == [0, 1]
    assert run_tasks(abs, [-3, 2, -1], lambda item: None, threads=2) == [3, 2, 1]


def test_few_items_stay_here_and_many_go_together() -> None:
    def elsewhere(task: Any, items: Any, finished: Any, together: int) -> list[Any]:
        return ["elsewhere", *items, together]

    token = ELSEWHERE.set(elsewhere)
    try:
        assert run_tasks(abs, [-1, -2], lambda item: None, threads=1, together=2) == [1, 2]
        assert run_tasks(abs, [-1, -2, 3], lambda item: None, threads=1, together=2) == ["elsewhere", -1, -2, 3, 2]
    finally:
        ELSEWHERE.reset(token)


def test_what_travels_between_processes_arrives_whole() -> None:
    error = InputError("rate", -1, "a number > 0", "give another")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    fault = ImpossibleResultError("kv_usage 2")
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault)
    remembered = Remembered(abs, 2)
    assert pickle.loads(pickle.dumps(remembered))(-3) == remembered(-3) == 3


def test_requests_of_a_fleet_are_drawn_elsewhere_as_here() -> None:
    class Sent(Exception):
        """What was to be done arrived."""

    def elsewhere(task: Any, items: Any, finished: Any, together: int) -> list[Any]:
        batches, host, draw = task.args
        arrived = pickle.loads(pickle.dumps(draw))
        for rows in (batch.rows for batch in items):
            one, other = (each(host.take(rows), rows.tolist(), batches.most[rows]) for each in (draw, arrived))
            for left, right in zip(jax.tree.leaves(one.tables), jax.tree.leaves(other.tables), strict=True):
                np.testing.assert_array_equal(left, right)
        raise Sent

    fleet = Fleet.from_mapping(FLEET)
    items = Items.of_fleet(fleet, np.ones(len(fleet.names), int))
    token = ELSEWHERE.set(elsewhere)
    try:
        with pytest.raises(Sent):
            Plays(fleet, items).columns([Server(0, 0, [0, 1])], [1.0, 1.5], [0, 1])
    finally:
        ELSEWHERE.reset(token)


def answers(runs: Path, progress: Any = None) -> list[Any]:
    """What all that a cluster helps with answers: the twins, also of a workload and of measured runs."""
    calibration, known = make_calibration(), load_calibration(LLAMA)
    many = make_scenarios(np.arange(3, 30_003).reshape(-1, 3) % 500 + 3, [0.4, 0.05, 0.0125], max_loras=4)
    few = make_scenarios(np.arange(3, 183).reshape(-1, 3), [0.4, 0.05, 0.0125], max_loras=4, horizon_s=60.0)
    drawn = LengthSample([40, 80, 160], [60, 10, 190])
    events = simulate(calibration, few, drawn, engine="event", progress=progress)
    predicted = predict_runs(read_runs(runs), {known.model.name: known}, "event", seeds=2)
    return [simulate(calibration, many, STAYS), events, vars(predicted)]


IN_A_PROCESS = """
import os, sys, warnings
from pathlib import Path
import jax, numpy as np
from lora_capacity.run import on_ray
from tests.unit.run.test_cluster import answers, compiled_here
address, pid, runs = sys.argv[1:]
warnings.simplefilter("ignore")
kept = compiled_here()
alone = answers(Path(runs))
compiled = compiled_here()
assert kept == set() != compiled
victims = [int(pid)]
def kill_a_node(done, total):
    if victims and 0 < done < total:
        os.kill(victims.pop(), 9)
with on_ray(address):
    together = answers(Path(runs), kill_a_node)
assert not victims
assert compiled_here() == compiled
for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
    np.testing.assert_array_equal(one, other)
print("the same")
"""


def compiled_here() -> set[str]:
    """Return what of the twins the user's folder of compiled code holds, which this process uses from now on."""
    keep_compiled_code()
    config: Any = jax.config
    folder = Path(config.jax_compilation_cache_dir)
    return {path.name for path in folder.rglob("*") if path.match("*.nbc") or path.match("*simulate_steady*-cache")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # other tests run beside this one
    }


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Any]:
    """Three nodes on this machine, of a core each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        nodes = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        found = Cluster(initialize_head=True, head_node_args=nodes | {"include_dashboard": False})
        try:
            for _ in range(2):
                found.add_node(**nodes)
            yield found
        finally:
            found.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray, which starts processes
def test_a_cluster_that_loses_a_node_answers_as_this_machine_to_the_bit(
    cluster: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    rows = [RUN | {"max_loras": str(slots), "duration_s": "60"} for slots in (4, 8, 16)]
    lines = [",".join(each.values()) for each in rows]
    (tmp_path / "runs.csv").write_text("\n".join([",".join(RUN), *lines]), encoding="utf-8")
    raylet = next(iter(cluster.worker_nodes)).all_processes["raylet"][0].process.pid
    command = [sys.executable, "-c", IN_A_PROCESS, cluster.address, str(raylet), str(tmp_path / "runs.csv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


def workers_of(cluster: Any) -> list[int]:
    """Return the processes that nodes have started."""
    raylets = [str(node.all_processes["raylet"][0].process.pid) for node in cluster.list_all_nodes()]
    found = subprocess.run(["pgrep", "-P", ",".join(raylets)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lost_cluster_is_told_in_a_line_and_gone_on_from(
    cluster: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "w.yaml").write_text(WORKLOAD, encoding="utf-8")
    command = [sys.executable, "-m", "lora_capacity_cli", *SWEEP]
    begun = subprocess.Popen(
        [*command, "--ray", cluster.address], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    parts = tmp_path / "grid.csv.parts"
    while not list(parts.glob("*.msgpack")):
        assert begun.poll() is None
        time.sleep(0.1)
    workers = workers_of(cluster)
    assert workers
    for pid in workers:  # else they may end before the loss is noticed
        os.kill(pid, signal.SIGSTOP)
    os.kill(cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
    _, stderr = begun.communicate(timeout=120)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    kept = {path.name for path in parts.glob("*.msgpack")}
    assert begun.returncode == 2
    interrupted, error = stderr.splitlines()
    assert interrupted == "interrupted; the same command goes on from what is in grid.csv.parts"
    assert error.startswith("error: the Ray cluster is lost: its head at ")
    assert 0 < len(kept) < 43
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    gone_on = (tmp_path / "grid.csv").read_bytes()
    assert not parts.exists()
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "grid.csv").read_bytes() == gone_on
