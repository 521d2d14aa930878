"""Several devices of a process answer as one does alone."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_capacity.run import LengthSample, simulate
from lora_capacity.scenarios import Results
from tests.examples import STAYS, make_calibration, make_scenarios

ON_FOUR_DEVICES = """
import sys, jax, numpy as np
from tests.unit.run.test_devices import answers
np.savez(sys.argv[1], *jax.tree.leaves(answers()))
print(jax.local_device_count())
"""


def answers() -> tuple[Results, Results]:
    calibration = make_calibration()
    many = make_scenarios(np.arange(3, 4503).reshape(-1, 3), [0.4, 0.05, 0.0125], max_loras=4)
    few = make_scenarios(np.arange(3, 66).reshape(-1, 3), [0.4, 0.05, 0.0125], max_loras=4, horizon_s=30.0)
    drawn = LengthSample([40, 80, 160], [60, 10, 190])
    return simulate(calibration, many, STAYS), simulate(calibration, few, drawn, engine="event")


@pytest.mark.slow
def test_four_devices(tmp_path: Path) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(tmp_path / "four.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
    with np.load(tmp_path / "four.npz") as content:
        for four, one in zip(content.values(), jax.tree.leaves(answers()), strict=True):
            # Other shapes, other order of sums in single precision, which the iteration of a few servers amplifies.
            np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-5)
