"""Configurations played in batches come out as each alone, in the order given."""

from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity import playing as module
from lora_capacity.errors import InputError
from lora_capacity.playing import play, play_workload
from lora_capacity.status import Status
from lora_capacity.twin import Scenarios, build_scenarios
from lora_capacity.twin.events import draw_requests, simulate_events
from lora_capacity.workload import Workload
from tests.examples import make_calibration

CALIBRATION = make_calibration()
WORKLOAD = {
    "adapters": {"mix": {"rates_per_s": [0.4, 0.1, 0.2], "ranks": [8, 16]}},
    "requests": {
        "input_tokens": {"mean": 100, "std": 80, "min": 4, "max": 500},
        "output_tokens": {"mean": 50, "std": 40, "min": 1, "max": 200},
    },
    "horizon_s": 60,
    "max_pending": 100,
}
INPUTS, OUTPUTS = np.array([40, 80, 160]), np.array([60, 10, 190])


def workload(**changes: Any) -> Workload:
    return Workload.from_mapping(WORKLOAD | changes)


def scenarios(adapters: list[int], max_loras: list[int], **settings: Any) -> Scenarios:
    return build_scenarios(workload(), CALIBRATION, adapters=adapters, max_loras=max_loras, **settings)


def test_batches_play_each_configuration_as_it_plays_alone_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    many = scenarios([4, 12, 8, 5, 2], [2, 3, 1, 5, 2], gpu_memory_utilization=[0.9, 0.9, 0.9, 0.2, 0.9])
    seen: list[tuple[int, int]] = []
    together = play(CALIBRATION, many, INPUTS, OUTPUTS, seed=3, progress=lambda *done: seen.append(done))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert int(together.settled.status[3]) == Status.NO_KV_CACHE
    assert np.isnan(together.settled.throughput_tokens_per_s[3])
    again, other = (play(CALIBRATION, many, INPUTS, OUTPUTS, seed=seed) for seed in (3, 4))
    for one, two in zip(jax.tree.leaves(together), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(together.adapter_arrived.sum()) != int(other.adapter_arrived.sum())
    alone = jax.jit(simulate_events)
    for i in (0, 1, 2, 4):
        one = jax.tree.map(lambda values, i=i: values[i : i + 1], many)
        expected = alone(CALIBRATION.costs, one, draw_requests(one, INPUTS, OUTPUTS, seed=3, indices=[i]))
        assert int(together.steps[i]) == int(expected.steps[0]) > 0
        assert int(together.adapter_arrived[i].sum()) == int(expected.adapter_arrived.sum())
        for name in ("throughput_tokens_per_s", "itl_s", "ttft_s", "mean_running", "class_service"):
            np.testing.assert_allclose(
                getattr(together.settled, name)[i], getattr(expected.settled, name)[0], rtol=1e-5, err_msg=name
            )


def test_a_workload_is_played_with_its_own_requests_class_by_class() -> None:
    given = scenarios([5, 7], [4, 4])
    results = play_workload(CALIBRATION, given, workload(), seed=5)
    requests = workload().sample_requests(7, 5)
    rates, ranks = workload().adapters.deal(7)
    by_class = np.lexsort((ranks, rates))
    counts = np.bincount(requests.adapter, minlength=7)
    classes = np.repeat(np.arange(given.class_count.shape[1]), np.asarray(given.class_count[1], int))
    arrived = np.asarray(results.adapter_arrived[1])
    assert not arrived[7:].any()
    for one in np.unique(classes):  # within a class the order is that of touching
        assert sorted(arrived[:7][classes == one]) == sorted(counts[by_class][classes == one])


def test_what_would_not_fit_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_REQUESTS", 10)
    with pytest.raises(InputError, match=r"horizon_s.*at most 10 requests"):
        play(CALIBRATION, scenarios([4], [2]), INPUTS, OUTPUTS)


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(InputError, match="seed"):
        play(CALIBRATION, scenarios([4], [2]), INPUTS, OUTPUTS, seed=-1)
