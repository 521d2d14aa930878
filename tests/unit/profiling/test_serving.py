from collections.abc import Callable

import pytest
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.server import Server
from lora_capacity_profiling.serving import Served, serve_workload, warm_up

from lora_capacity.errors import InputError
from lora_capacity.workload import Workload
from tests.unit.profiling.conftest import fake_state


def workload(**changes: object) -> Workload:
    return Workload.from_mapping(
        {
            "adapters": {"mix": {"rates_per_s": [20.0, 5.0], "ranks": [8, 4]}},
            "requests": {
                "input_tokens": {"mean": 20, "std": 5, "min": 4, "max": 40},
                "output_tokens": {"mean": 6, "std": 2, "min": 2, "max": 12},
            },
            "horizon_s": 2.0,
            **changes,
        }
    )


def test_run_is_a_row_about_its_traffic(launch: Callable[..., Server]) -> None:
    few = workload(adapters={"mix": {"rates_per_s": [2.0, 0.5], "ranks": [8, 4]}}, horizon_s=3.0)
    requests = few.sample_requests(2, seed=24)
    assert requests.arrival_s.max() < 1.0  # the last has time to be answered on a busy machine too
    serving = serve_workload(Served(launch().endpoint, ["a0", "a1"], "fake"), few, seed=24)
    row = serving.row({"run_id": "1", "model": "fake", "max_loras": 2, "max_lora_rank": 8})
    assert (row["arrivals"], row["completed"]) == (len(requests), len(requests))
    assert row["duration_s"] == pytest.approx(3.0, abs=0.5)
    assert (row["rates"], row["rate_values"], row["rate_counts"]) == ("2 0.5", "0.5 2", "1 1")
    assert (row["ranks"], row["max_cpu_loras"], row["status"]) == ("8 4", 2, "ok")
    assert row["std_output_tokens"] == pytest.approx(requests.output_tokens.std())
    assert row["max_output_tokens"] == requests.output_tokens.max()


def test_run_answered_early_lasts_its_horizon(launch: Callable[..., Server]) -> None:
    few = workload(adapters={"mix": {"rates_per_s": [1.0], "ranks": [8]}}, horizon_s=3.0)
    assert few.sample_requests(1, seed=1).arrival_s.max() < 2.5
    serving = serve_workload(Served(launch().endpoint, ["a0"], "fake"), few, seed=1)
    assert serving.result.completed.all()
    assert serving.result.duration_s == 3.0


def test_run_without_a_request_is_refused(launch: Callable[..., Server]) -> None:
    rare = workload(adapters={"mix": {"rates_per_s": [1e-9], "ranks": [8]}})
    with pytest.raises(InputError, match="horizon_s"):
        serve_workload(Served(launch().endpoint, ["a0"], "fake"), rare)


def test_warm_up_asks_every_adapter_before_anything_else(launch: Callable[..., Server]) -> None:
    server = launch()
    warm_up(Served(server.endpoint, ["a0", "a1"], "fake"))
    assert sorted(body["model"] for body in fake_state(server.endpoint)["bodies"]) == ["a0", "a0", "a1", "a1"]
    with pytest.raises(ServerError, match="does not exist"):
        warm_up(Served(server.endpoint, ["a0", "gone"], "fake"))
