"""Configurations played in batches come out as each alone, in the order given, also when taken up again."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import serialization

from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.run import LengthSample, batches, simulate
from lora_capacity.run.requests import draw_requests
from lora_capacity.scenarios import Scenarios, build_scenarios, table
from lora_capacity.status import Status
from lora_capacity.twins.events import simulate_events
from lora_capacity.workload import Workload
from tests.examples import STAYS, compiled_once, make_calibration, make_costs

pytestmark = pytest.mark.slow

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
    monkeypatch.setattr(batches, "BATCHES", 1)
    monkeypatch.setattr(batches, "LONGEST_BATCH", 2)
    many = scenarios([4, 12, 8, 5, 2], [2, 3, 1, 5, 2], gpu_memory_utilization=[0.9, 0.9, 0.9, 0.2, 0.9])
    seen: list[tuple[int, int]] = []
    together = simulate(
        CALIBRATION,
        many,
        LengthSample(INPUTS, OUTPUTS),
        engine="event",
        seed=3,
        progress=lambda *done: seen.append(done),
    )
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert seen[-1] == (5, 5)
    assert int(together.status[3]) == Status.NO_KV_CACHE
    assert np.isnan(together.throughput_tokens_per_s[3])
    again, other = (
        simulate(CALIBRATION, many, LengthSample(INPUTS, OUTPUTS), engine="event", seed=seed) for seed in (3, 4)
    )
    for one, two in zip(jax.tree.leaves(together), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(together.events.adapter_arrived.sum()) != int(other.events.adapter_arrived.sum())
    alone = compiled_once(simulate_events)
    for i in (0, 1, 2, 4):
        one = jax.tree.map(lambda values, i=i: values[i : i + 1], many)
        expected = alone(CALIBRATION.costs, one, draw_requests(one, INPUTS, OUTPUTS, seed=3, indices=[i]).tables)
        assert int(together.events.steps[i]) == int(expected.events.steps[0]) > 0
        assert int(together.events.adapter_arrived[i].sum()) == int(expected.events.adapter_arrived.sum())
        for name in ("throughput_tokens_per_s", "itl_s", "ttft_s", "mean_running", "class_service"):
            np.testing.assert_allclose(getattr(together, name)[i], getattr(expected, name)[0], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("version", "device"), [("0.26.0", "gpu"), ("0.33.0", "gpu"), ("0.33.0", "cpu")])
def test_a_version_is_played_by_its_rules(version: str, device: str) -> None:
    given, calibration = scenarios([12], [2]), make_calibration(vllm_version=version, device=device)
    played, old = (
        simulate(each, given, LengthSample(INPUTS, OUTPUTS), engine="event", seed=3)
        for each in (calibration, CALIBRATION)
    )
    rules = VllmBehaviour.for_version(version, device).scheduler
    tables = draw_requests(given, INPUTS, OUTPUTS, seed=3).tables
    alone = compiled_once(partial(simulate_events, rules=rules))(calibration.costs, given, tables)
    assert int(played.events.steps[0]) == int(alone.events.steps[0])
    assert float(played.ttft_s[0]) == pytest.approx(float(alone.ttft_s[0]), rel=1e-5)
    assert (float(played.ttft_s[0]) != float(old.ttft_s[0])) == rules.async_scheduling


def test_configurations_of_several_block_sizes_come_out_as_each_alone() -> None:
    def full(block_size: int) -> Scenarios:
        """A KV cache of 512 tokens, whatever the block size."""
        given = scenarios([12], [12], block_size=block_size)
        assert given.block_size.tolist() == [block_size]
        return dataclasses.replace(given, kv_cache_tokens=np.full(1, 1024.0, np.float32))

    sizes = [full(block_size) for block_size in (16, 128, 32)]
    together: Any = jax.tree.map(lambda *leaves: np.concatenate(leaves), *sizes)
    found = simulate(CALIBRATION, together, LengthSample(INPUTS, OUTPUTS), engine="event", seed=3)
    for i, (one, block_size) in enumerate(zip(sizes, (16, 128, 32), strict=True)):
        tables = draw_requests(one, INPUTS, OUTPUTS, seed=3, indices=[i]).tables
        alone = compiled_once(partial(simulate_events, block_size=block_size))(CALIBRATION.costs, one, tables)
        assert int(found.events.steps[i]) == int(alone.events.steps[0]) > 0
        assert int(found.events.preemptions[i]) == int(alone.events.preemptions[0])
        assert float(found.ttft_s[i]) == pytest.approx(float(alone.ttft_s[0]), rel=1e-5)
    assert len(set(np.asarray(found.events.preemptions).tolist())) == 3


def test_servers_that_do_not_start_are_done_at_once() -> None:
    refused = scenarios([4, 12], [2, 3], gpu_memory_utilization=0.2)
    seen: list[tuple[int, int]] = []
    played = simulate(
        CALIBRATION, refused, LengthSample(INPUTS, OUTPUTS), engine="event", progress=lambda *done: seen.append(done)
    )
    assert np.all(np.asarray(played.status) == Status.NO_KV_CACHE)
    assert seen[-1] == (2, 2)


def test_a_workload_is_played_with_its_own_requests_class_by_class() -> None:
    given = scenarios([5, 7], [4, 4])
    results = simulate(CALIBRATION, given, workload(), engine="event", seed=5)
    requests = workload().sample_requests(7, 5)
    rates, ranks = workload().adapters.deal(7)
    by_class = np.lexsort((ranks, rates))
    counts = np.bincount(requests.adapter, minlength=7)
    classes = np.repeat(np.arange(given.class_count.shape[1]), np.asarray(given.class_count[1], int))
    arrived = np.asarray(results.events.adapter_arrived[1])
    assert not arrived[7:].any()
    for one in np.unique(classes):  # within a class the order is that of touching
        assert sorted(arrived[:7][classes == one]) == sorted(counts[by_class][classes == one])


@pytest.mark.parametrize("warmup_s", [0.0, 20.0])
def test_answers_rest_on_all_requests_however_many_were_laid_out(
    warmup_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overloaded servers whose clients hold requests back, one that keeps up, and one that does not start."""
    asked = workload(base_model={"rate_per_s": 2.0}, max_pending=20)
    utilization = [0.9, 0.9, 0.9, 0.2]
    given = build_scenarios(
        asked, CALIBRATION, adapters=[60, 40, 4, 8], max_loras=[1, 40, 4, 8], gpu_memory_utilization=utilization
    )
    told = []
    for laid_out in (32, 512, 10**6):
        monkeypatch.setattr(batches, "_most_requests", lambda host, steady, most=laid_out: np.full(4, most))
        told.append(simulate(CALIBRATION, given, asked, engine="event", seed=[0, 1, 2, 3], warmup_s=warmup_s))
    few, some, every = told
    arrived = every.events.adapter_arrived.sum(axis=1)
    assert 500 < arrived[1] < arrived[0]
    assert every.events.adapter_completed[0].sum() + 20 < arrived[0]  # clients hold some back to the end
    for found in (few, some):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(every), strict=True):
            if np.asarray(other).dtype.kind == "f":  # sums of longer tables are rounded otherwise
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("laid_out", [64, 512])
def test_servers_have_work_to_the_end_where_more_arrives_than_they_can_do(
    laid_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_most_requests", lambda host, steady: np.full(1, laid_out))
    given = build_scenarios(workload(max_pending=20), CALIBRATION, adapters=[90], max_loras=[1])
    found = simulate(CALIBRATION, given, LengthSample(INPUTS, OUTPUTS), engine="event", seed=3)
    assert float(found.events.idle_share[0]) < 0.02  # nobody had come before the first arrival
    arriving = float(given.requests_per_s[0] * given.horizon_s[0])
    assert abs(found.events.adapter_arrived.sum() - arriving) < 5 * arriving**0.5  # five standard deviations
    service = float(found.completed_per_s[0] * given.horizon_s[0]) / arriving
    np.testing.assert_allclose(np.average(found.class_service[0], weights=given.class_count[0]), service, rtol=0.2)


def assert_same(one: Any, other: Any, rows: Any = slice(None)) -> None:
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, np.asarray(right)[rows])


def test_neither_order_nor_size_of_batches_changes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    given = scenarios([4, 12, 8, 5, 2, 9], [2, 3, 1, 5, 2, 4])
    expected = simulate(CALIBRATION, given, workload(), engine="event", seed=[0, 1, 0, 1, 0, 1])
    order = np.array([5, 0, 3, 1, 4, 2])
    shuffled = jax.tree.map(lambda values: values[order], given)
    monkeypatch.setattr(batches, "BATCHES", 1)
    monkeypatch.setattr(batches, "LONGEST_BATCH", 4)
    found = simulate(CALIBRATION, shuffled, workload(), engine="event", seed=order % 2)
    assert_same(found, expected, order)


def test_a_load_is_that_of_as_many_times_the_rates() -> None:
    given = scenarios([12, 12, 12], [4, 4, 4])
    found = simulate(CALIBRATION, given, workload(), engine="event", load=[1.0, 1.0, 1.5])
    arrived = found.events.adapter_arrived.sum(axis=1)
    requests = workload(horizon_s=90).sample_requests(12, 0)
    assert arrived[0] == arrived[1] == (requests.arrival_s < 60).sum()
    assert arrived[2] == len(requests)
    np.testing.assert_allclose(found.offered_tokens_per_s / found.offered_tokens_per_s[0], [1, 1, 1.5])


def test_what_was_played_is_not_played_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = scenarios([4, 12, 8, 5, 2, 7] * 4, [2, 3, 1, 5, 2, 3] * 4)
    expected = simulate(CALIBRATION, given, workload(), engine="event")
    monkeypatch.setattr(batches, "BATCHES", 1)
    monkeypatch.setattr(batches, "LONGEST_BATCH", 2)

    def give_up(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(CALIBRATION, given, workload(), engine="event", checkpoint_dir=tmp_path, progress=give_up)
    begun = sorted(tmp_path.glob("*.msgpack"))
    assert begun
    times = [path.stat().st_mtime_ns for path in begun]
    seen: list[tuple[int, int]] = []
    found = simulate(
        CALIBRATION,
        given,
        workload(),
        engine="event",
        checkpoint_dir=tmp_path,
        progress=lambda *done: seen.append(done),
    )
    assert_same(found, expected)
    assert [path.stat().st_mtime_ns for path in begun] == times
    assert 0 < seen[0][0] < 24
    assert seen[-1] == (24, 24)
    torn = sorted(tmp_path.glob("*.msgpack"))[:3]
    for path, content in zip(torn, (b"", torn[1].read_bytes()[:500], serialization.to_bytes({"rows": 1})), strict=True):
        path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="is damaged: what was in it is computed anew"):
        assert_same(simulate(CALIBRATION, given, workload(), engine="event", checkpoint_dir=tmp_path), expected)
    monkeypatch.setattr(batches.Batches, "run", None)
    assert_same(simulate(CALIBRATION, given, workload(), engine="event", checkpoint_dir=tmp_path), expected)


@pytest.mark.parametrize("changed", ["seed", "traffic", "calibration", "scenarios"])
def test_checkpoints_of_another_question_are_refused(changed: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "calibration": CALIBRATION,
        "scenarios": scenarios([4], [2]),
        "traffic": workload(),
        "seed": 0,
    }
    simulate(**asked, checkpoint_dir=tmp_path, engine="event")
    other = {
        "calibration": make_calibration(costs=make_costs(base_s=0.02)),
        "scenarios": scenarios([4], [1]),
        "traffic": workload(arrivals={"process": "gamma", "cv": 1.1}),
        "seed": 1,
    }
    with pytest.raises(InputError, match=r"what is left of another sweep.*delete the folder"):
        simulate(**asked | {changed: other[changed]}, checkpoint_dir=tmp_path, engine="event")


def test_what_would_not_fit_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "free_memory_bytes", lambda: 1e5)
    with pytest.raises(InputError, match=r"horizon_s.*which fill the memory"):
        simulate(CALIBRATION, scenarios([4], [2]), LengthSample(INPUTS, OUTPUTS), engine="event")


def test_the_table_says_what_only_the_event_twin_tells() -> None:
    given = scenarios([12, 5], [3, 5], gpu_memory_utilization=[0.9, 0.2])
    played = simulate(CALIBRATION, given, workload(), engine="event")
    columns = table(given, played)
    assert all(column.shape == (2,) for column in columns.values())
    assert columns["status"].tolist() == ["outside_calibration", "no_kv_cache"]
    assert columns["ttft_p50_s"][0] <= columns["ttft_p95_s"][0] <= columns["ttft_p99_s"][0]
    arrived, completed = (
        np.asarray(c)[0, :12] for c in (played.events.adapter_arrived, played.events.adapter_completed)
    )
    assert columns["worst_service"][0] == pytest.approx((completed / arrived).min())
    assert np.isnan(columns["worst_service"][1])


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(InputError, match="seed"):
        simulate(CALIBRATION, scenarios([4], [2]), LengthSample(INPUTS, OUTPUTS), engine="event", seed=-1)


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("load", 1.5), ("warmup_s", 2.0), ("samples", 3), ("checkpoint_dir", "folder")],
)
def test_the_steady_engine_refuses_what_it_would_not_hear_of(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{option}.*steady engine.*event engine"):
        simulate(CALIBRATION, scenarios([4], [2]), workload(), **{option: value})


@pytest.mark.parametrize(
    ("traffic", "options", "match"),
    [
        (STAYS, {"engine": "event"}, "traffic.*a workload or a sample of lengths"),
        (LengthSample(INPUTS, OUTPUTS), {"engine": "event", "load": 2.0}, "load.*with a sample of lengths"),
        (LengthSample(INPUTS, OUTPUTS), {"engine": "event", "seed": [1]}, "seed.*one number with a sample"),
        (STAYS, {"engine": "stedy"}, "engine.*did you mean 'steady'"),
    ],
)
def test_what_an_engine_cannot_use_is_refused(traffic: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        simulate(CALIBRATION, scenarios([4], [2]), traffic, **options)


def test_the_steady_engine_takes_a_residence_time_of_all_or_of_each() -> None:
    given = scenarios([4, 12, 8], [2, 3, 4])
    expected = simulate(CALIBRATION, given, STAYS)
    each = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[:, np.newaxis], 3, axis=1), STAYS)
    found = simulate(CALIBRATION, given, each)
    np.testing.assert_allclose(found.throughput_tokens_per_s, expected.throughput_tokens_per_s, rtol=1e-6)
    sample = LengthSample([10, 20], [30, 40])
    assert np.isfinite(simulate(CALIBRATION, given, sample).throughput_tokens_per_s).all()
