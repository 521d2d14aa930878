"""What `verify` needs to run against the fake server of the profiling tests: a model, its calibration, a workload."""

import dataclasses
import sys
from pathlib import Path

from lora_capacity_profiling.material import write_model

from lora_capacity.costs import LoraKernels
from lora_capacity.hardware import Gpu
from lora_capacity.models import ModelShape
from lora_capacity.units import BYTES_PER_GIB
from tests.examples import make_calibration, make_costs
from tests.unit.profiling.conftest import fake_environment

STEP_S = 0.005
PATIENT = ("--tolerance", 10, "--itl-tolerance", 0.99)  # a busy machine is slower, which no test is about
WORKLOAD = """
adapters:
  mix: {rates_per_s: [6.0, 3.0], ranks: [8, 4]}
requests:
  input_tokens: {mean: 30, std: 10, min: 4, max: 60}
  output_tokens: {mean: 12, std: 5, min: 2, max: 30}
horizon_s: 600
"""


# Files that may not grow beyond a size: what a program meets on a full disk, for this program alone.
LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("lora_capacity_cli", run_name="__main__")
"""


def command(words: list[str], *, largest_file_bytes: int | None = None) -> list[str]:
    """Return the command line of a `lora-capacity` in a process of its own."""
    if largest_file_bytes is None:
        return [sys.executable, "-m", "lora_capacity_cli", *words]
    return [sys.executable, "-c", LIMITED, str(largest_file_bytes), *words]


@dataclasses.dataclass(frozen=True)
class Site:
    """Files of one test.

    Attributes:
        workload: Workload file: adapters of 6 and 3 requests per second, in turn.
        model: Folder of a small model.
        calibration: Calibration of a server whose steps take as long as the fake one's.
    """

    workload: Path
    model: Path
    calibration: Path

    def verify(self, *options: object, mode: str = "ok", step_s: float = STEP_S, dies_at: int = 0) -> list[str]:
        """Return the words of a `verify` of the fake server; quick unless the options say otherwise."""
        environment = fake_environment(mode, step_s, dies_at)
        settings = [f"--env={name}={value}" for name, value in environment.items()]
        start = ["--model", self.model, "--python", sys.executable, *settings]
        quick = ["--seconds", 3, "--warm-up", 0, "--predict-with", "steady", *PATIENT]
        words = ["verify", self.workload, "--calibration", self.calibration, *start, *quick, *options]
        return [str(word) for word in words]

    def attach(self, url: str, *options: object) -> list[str]:
        """Return the words of a `verify` of a server that runs."""
        quick = ["--seconds", 2, "--warm-up", 0, "--predict-with", "steady", *PATIENT]
        words = ["verify", self.workload, "--calibration", self.calibration, "--url", url, *quick, *options]
        return [str(word) for word in words]


def write_site(folder: Path, *, step_s: float = STEP_S) -> Site:
    """Write model, calibration and workload.

    Args:
        folder: Where to.
        step_s: Step time that the calibration predicts.
    """
    model = write_model(folder / "tiny", num_hidden_layers=1)
    shape = ModelShape.from_file(model)
    costs = dataclasses.replace(make_costs(base_s=step_s), kernels=LoraKernels.of_model(shape))
    calibration = make_calibration(
        name="fake",
        model=shape,
        gpu=Gpu("cpu", BYTES_PER_GIB * 8),
        vllm_version="0.32.0",
        costs=costs,
        fitted_ranges={},
    )
    calibration.save(folder / "calibration.json")
    (folder / "short.yaml").write_text(WORKLOAD, encoding="utf-8")
    return Site(folder / "short.yaml", model, folder / "calibration.json")
