"""Both twins and the reference of a mixture of experts, whose step time is no straight line in its tokens."""

import pytest

from lora_capacity.calibration import derive_calibration
from lora_capacity.run import simulate
from lora_capacity.scenarios import build_scenarios
from lora_capacity.workload import Workload

pytestmark = pytest.mark.slow

WORKLOAD = {
    "adapters": {"mix": {"rates_per_s": [0.8], "ranks": [16]}},
    "requests": {
        "input_tokens": {"mean": 220, "std": 250, "min": 4, "max": 1024},
        "output_tokens": {"mean": 200, "std": 210, "min": 4, "max": 1024},
    },
    "horizon_s": 600,
}


def test_twins_agree_on_a_mixture() -> None:
    calibration = derive_calibration("Qwen3-30B-A3B", "H100")
    workload = Workload.from_mapping(WORKLOAD)
    scenarios = build_scenarios(workload, calibration, adapters=[4], max_loras=[4])
    steady, event, plain = (
        simulate(calibration, scenarios, workload, engine=engine) for engine in ("steady", "event", "reference")
    )
    assert event.itl_s[0] == pytest.approx(plain.itl_s[0], rel=1e-3)
    assert steady.itl_s[0] == pytest.approx(event.itl_s[0], rel=0.08)
    assert steady.mean_running[0] == pytest.approx(event.mean_running[0], rel=0.15)  # of one draw of requests
