"""Several devices of a process, and several processes, answer as one does alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SHARED = """
import sys, jax, numpy as np
address, number, every, result, parts = sys.argv[1:]
if int(every) > 1:
    jax.distributed.initialize(address, int(every), int(number))
from lora_capacity.run import LengthSample, simulate
from tests.examples import STAYS, make_calibration, make_scenarios
calibration = make_calibration()
many = make_scenarios(np.arange(3, 4503).reshape(-1, 3), [0.4, 0.05, 0.0125], max_loras=4)
steady = simulate(calibration, many, STAYS)
few = make_scenarios(np.arange(3, 66).reshape(-1, 3), [0.4, 0.05, 0.0125], max_loras=4, horizon_s=30.0)
seen = []
note = lambda *done: seen.append(done)
drawn = LengthSample([40, 80, 160], [60, 10, 190])
events = simulate(calibration, few, drawn, engine="event", checkpoint_dir=parts or None, progress=note)
assert seen[-1] == (21, 21)
leaves = jax.tree.leaves((steady, events))
np.savez(result, *leaves)
print(jax.process_count(), jax.local_device_count(), len(seen))
"""


def start(
    number: int, every: int, address: str, result: Path, parts: object = "", devices: int = 1
) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", SHARED, address, str(number), str(every), str(result), str(parts)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    return stdout.splitlines()[-1]


def leaves(path: Path) -> list[np.ndarray]:
    with np.load(path) as content:
        return list(content.values())


def assert_same(one: Path, other: Path) -> None:
    for left, right in zip(leaves(one), leaves(other), strict=True):
        # Other shapes, other order of sums in single precision, which the iteration of a few servers amplifies.
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("alone") / "result.npz"
    assert finish(start(0, 1, "", result)).startswith("1 1 ")
    return result


def test_four_devices(alone: Path, tmp_path: Path) -> None:
    assert finish(start(0, 1, "", tmp_path / "four.npz", devices=4)).startswith("1 4 ")
    assert_same(tmp_path / "four.npz", alone)


def test_two_processes_and_again_from_what_they_kept(alone: Path, tmp_path: Path) -> None:
    for again in (False, True):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        results = [tmp_path / f"{number}.npz" for number in (0, 1)]
        running = [start(number, 2, address, results[number], tmp_path / "parts") for number in (0, 1)]
        told = [finish(process) for process in running]
        assert told == ["2 1 1"] * 2 if again else all(each.startswith("2 1 ") for each in told)
        for result in results:
            assert_same(result, alone)
            result.unlink()
    assert len(list((tmp_path / "parts").glob("*.msgpack"))) >= 2
