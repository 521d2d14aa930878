"""The event twin against the reference scheduler through the runner, under the costs of a calibration."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.run import LengthSample, simulate
from lora_capacity.scenarios import Results, build_scenarios, table
from lora_capacity.status import Status
from lora_capacity.workload import Goodput, Workload
from tests.examples import make_calibration

pytestmark = pytest.mark.slow

SAME_TIMES = 2e-4
"""Relative: the event twin's clock ticks, and its sums are float32."""

COUNTS = (
    "unanswered",
    "steps",
    "preemptions",
    "disk_loads",
    "max_running",
    "max_adapters",
    "adapter_arrived",
    "adapter_completed",
)
TIMES = (
    *("throughput_tokens_per_s", "offered_tokens_per_s", "completed_per_s", "class_service", "mean_running"),
    *("mean_waiting", "step_time_s", "itl_s", "ttft_s", "answered_ttft_s", "active_adapters", "kv_usage"),
    "loads_per_s",
)
SHARES = ("adapter_worst_wait_s", "max_kv_usage", "compute_share", "scheduling_share", "load_share")
WORKLOAD = Workload.from_mapping(
    {
        "adapters": {"mix": {"rates_per_s": [0.8, 0.2, 0.4], "ranks": [8, 16]}},
        "base_model": {"rate_per_s": 0.5},
        "requests": {
            "input_tokens": {"mean": 100, "std": 80, "min": 4, "max": 300},
            "output_tokens": {"mean": 50, "std": 40, "min": 1, "max": 200},
        },
        "goodput": {"ttft": 80, "e2el": 1000},
        "horizon_s": 20,
        "max_pending": 40,
    }
)


def both(
    block_size: int,
    version: str = "0.8.5",
    workload: Workload = WORKLOAD,
    *,
    specialized: bool = False,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> tuple[Results, Results]:
    """A server short of slots and of KV blocks."""
    calibration = make_calibration(vllm_version=version)
    if specialized:
        calibration = calibration.specialized()
    scenarios = build_scenarios(workload, calibration, adapters=[12], max_loras=[4], block_size=block_size, **settings)
    tight = dataclasses.replace(scenarios, kv_cache_tokens=np.full(1, 4096.0, np.float32))
    event, reference = (
        simulate(calibration, tight, workload, engine=engine, seed=3, **options) for engine in ("event", "reference")
    )
    assert list(table(tight, event)) == list(table(tight, reference))
    return event, reference


@pytest.mark.parametrize(
    ("block_size", "version", "settings"),
    [
        (16, "0.8.5", {}),
        (32, "0.8.5", {}),
        (128, "0.8.5", {}),
        (16, "0.33", {}),
        (16, "0.33", {"watermark": 0.001, "max_num_active_seqs": 12, "long_prefill_token_threshold": 64}),
    ],
)
def test_event_twin_and_reference_agree_through_the_runner(
    block_size: int, version: str, settings: dict[str, Any]
) -> None:
    event, reference = both(block_size, version, settings=settings)
    for name in COUNTS:
        told, expected = getattr(event.events, name), getattr(reference.events, name)
        width = expected.shape[-1] if expected.ndim > 1 else None
        np.testing.assert_array_equal(told[..., :width], expected, err_msg=name)
    assert int(reference.events.steps[0]) > 100
    for name in TIMES:
        np.testing.assert_allclose(getattr(event, name), getattr(reference, name), rtol=SAME_TIMES, err_msg=name)
    for name in SHARES:
        told, expected = getattr(event.events, name), getattr(reference.events, name)
        width = expected.shape[-1] if expected.ndim > 1 else None
        np.testing.assert_allclose(told[..., :width], expected, rtol=SAME_TIMES, atol=1e-6, err_msg=name)
    assert int(event.limit[0]) == int(reference.limit[0])

    # First tokens are counted one by one, whole answers of a quarter of the requests.
    assert float(event.attainment[0]) == pytest.approx(float(reference.attainment[0]), abs=0.1)
    assert 0.1 < float(reference.attainment[0]) < 0.9
    np.testing.assert_allclose(event.events.ttft_quantiles_s, reference.events.ttft_quantiles_s, rtol=0.05)
    np.testing.assert_array_equal(event.events.ttft_at_least, reference.events.ttft_at_least)


def test_share_within_a_bound_on_first_tokens_is_counted_exactly() -> None:
    bounded = dataclasses.replace(WORKLOAD, goodput=Goodput(ttft_s=0.05))
    event, reference = both(16, workload=bounded)
    np.testing.assert_allclose(event.attainment, reference.attainment, atol=0.01)


def test_drained_servers_answer_every_request_that_came() -> None:
    event, reference = both(16, drain=True, load=3.0)
    cut, _ = both(16, load=3.0)
    assert int(cut.events.unanswered[0]) > 0
    for told in (event, reference):
        assert int(told.events.unanswered[0]) == 0
        assert not told.events.ttft_at_least.any()
        # Nobody's wait is cut off any more; what is told of the time observed stays.
        assert float(told.ttft_s[0]) > float(cut.ttft_s[0])
        np.testing.assert_allclose(told.throughput_tokens_per_s, cut.throughput_tokens_per_s, rtol=SAME_TIMES)
    np.testing.assert_allclose(event.ttft_s, reference.ttft_s, rtol=SAME_TIMES)
    np.testing.assert_array_equal(event.events.quantile_requests[:, 0], reference.events.quantile_requests[:, 0])


def test_reference_refuses_what_it_cannot_tell_and_blanks_what_does_not_start() -> None:
    calibration, lengths = make_calibration(), LengthSample(np.array([40]), np.array([60]))
    scenarios = build_scenarios(
        WORKLOAD, calibration, adapters=[12, 4], max_loras=[4, 4], gpu_memory_utilization=[0.2, 0.9]
    )
    results = simulate(calibration, scenarios, lengths, engine="reference", seed=3, warmup_s=1.0)
    assert int(results.status[0]) == Status.NO_KV_CACHE
    assert np.isnan(results.throughput_tokens_per_s).tolist() == [True, False]
    assert int(results.events.steps[0]) == 0 < int(results.events.steps[1])
    for options in ({"samples": 2}, {"checkpoint_dir": "parts"}):
        with pytest.raises(InputError, match="with the reference engine"):
            simulate(calibration, scenarios, lengths, engine="reference", **options)


@pytest.mark.parametrize("given", [{"shared_prefix_tokens": 60}, {"cached_share": 0.4}])
@pytest.mark.parametrize("version", ["0.8.5", "0.33"])
def test_event_twin_and_reference_agree_on_what_is_cached(version: str, given: dict[str, Any]) -> None:
    """In 0.33 with kernels that cover the adapters of a step, so that times tell how many there are."""
    workload, specialized = dataclasses.replace(WORKLOAD, **given), version == "0.33"
    event, reference = both(16, version, workload, specialized=specialized)
    for name in COUNTS:
        told, expected = getattr(event.events, name), getattr(reference.events, name)
        width = expected.shape[-1] if expected.ndim > 1 else None
        np.testing.assert_array_equal(told[..., :width], expected, err_msg=name)
    for name in TIMES:
        np.testing.assert_allclose(getattr(event, name), getattr(reference, name), rtol=SAME_TIMES, err_msg=name)
    plain, _ = both(16, version, specialized=specialized)
    assert float(event.ttft_s[0]) < float(plain.ttft_s[0])


def test_nothing_is_cached_where_prefix_caching_is_off() -> None:
    calibration = make_calibration()
    for given in ({"shared_prefix_tokens": 60}, {"cached_share": 0.4}):
        workload = dataclasses.replace(WORKLOAD, **given)
        for engine in ("steady", "event"):
            off, plain = (
                simulate(
                    calibration,
                    build_scenarios(each, calibration, adapters=[12], max_loras=[4], enable_prefix_caching=caching),
                    each,
                    engine=engine,
                )
                for each, caching in ((workload, False), (WORKLOAD, None))
            )
            assert float(off.ttft_s[0]) == float(plain.ttft_s[0])
            assert float(off.step_time_s[0]) == float(plain.step_time_s[0])
