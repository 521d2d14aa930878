import dataclasses

import numpy as np
import pytest

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.errors import InputError
from lora_capacity.run import simulate
from lora_capacity.scenarios import WorkloadBatch, build_scenarios
from lora_capacity.surrogate import Space
from lora_capacity.surrogate.closed_form import full_batches
from lora_capacity.surrogate.simulation import simulate_workloads
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import Workload

LENGTHS = {
    "input_tokens": {"mean": 223, "std": 248, "min": 4, "max": 1024},
    "output_tokens": {"mean": 200, "std": 200, "min": 1, "max": 1600},
}
MIX = {
    "adapters": {"mix": {"rates_per_s": [0.4, 0.05], "ranks": [8, 16, 32]}},
    "requests": LENGTHS,
    "max_pending": 26000,
}
SAME = 2e-4  # the law of the lengths is tabulated at another mean


@pytest.fixture(scope="module")
def calibration():
    return load_calibration("llama-3.1-8b-instruct-h100-64gb")


@pytest.fixture
def mix():
    return Workload.from_mapping(MIX)


def test_a_workload_and_its_question_mean_the_same(mix, calibration):
    adapters, slots = np.array([5, 40, 120, 200]), np.array([5, 20, 60, 30])
    question = WorkloadBatch.of(mix, calibration).take(np.zeros(4, np.int64))
    ours = simulate_workloads(calibration, question, adapters, slots)
    theirs = simulate(
        calibration, build_scenarios(mix, calibration, adapters, slots), ResidenceTime.of_lengths(mix.output_tokens)
    )
    np.testing.assert_allclose(ours.throughput_tokens_per_s, theirs.throughput_tokens_per_s, SAME)
    np.testing.assert_allclose(ours.offered_tokens_per_s, theirs.offered_tokens_per_s, 1e-5)


def test_adapters_of_a_turn_are_counted_back_from_their_load():
    workloads = Space(base_tokens_per_s=(100, 3000)).sample(20, seed=1)
    adapters = np.arange(1, 21)
    load = workloads.offered_per_s(adapters)
    rates = [np.tile(row, 7)[:a].sum() for row, a in zip(workloads.rates_per_s, adapters, strict=True)]
    np.testing.assert_allclose(load, workloads.base_rate_per_s + rates)
    assert workloads.adapters_at(load).tolist() == adapters.tolist()
    assert workloads.adapters_at(load * (1 - 1e-6)).tolist() == (adapters - 1).tolist()
    assert workloads.adapters_at(load[:, np.newaxis] * [1.0, 1e-9]).tolist() == [[a, 0] for a in adapters]


def test_a_list_has_no_more_adapters_than_it_names(calibration):
    rates = np.geomspace(0.01, 1.0, 40)
    listed = {"adapters": {"mix": {"rates_per_s": rates.tolist(), "ranks": [8]}}, "requests": LENGTHS}
    question = dataclasses.replace(
        WorkloadBatch.of(Workload.from_mapping(listed), calibration), most_adapters=np.array([40.0])
    )
    assert question.adapters_at(np.array([1e6])).tolist() == [40]
    merged = question.scenarios(calibration, np.array([40]), np.array([4]))
    assert merged.class_count.shape == (1, 16)
    np.testing.assert_allclose((merged.class_count * merged.class_rate_per_s).sum(), rates.sum(), 1e-6)


def test_fractions_of_adapters_lie_between_whole_ones(mix, calibration):
    question = WorkloadBatch.of(mix, calibration).take(np.zeros(3, np.int64))
    slots = np.full(3, 16)
    found = simulate_workloads(calibration, question, np.array([60.0, 63.0, 66.0]), slots).throughput_tokens_per_s
    assert found[0] < found[1] < found[2]


def test_most_slots_start_and_one_more_does_not(calibration):
    workloads = Space().sample(16, seed=2)
    most = workloads.most_slots(calibration)
    rank = workloads.max_lora_rank(np.full(16, 3), calibration)
    assert np.all(workloads.plan(calibration, most, rank)[1] == 0)
    assert np.all(workloads.plan(calibration, most + 1, rank)[1] != 0)


def test_a_server_at_its_limit_completes_more_with_more_memory_and_less_with_more_slots(calibration):
    question = Space(base_tokens_per_s=(0, 0)).sample(1, seed=5)
    slots = np.array([[1, 8, 32]])
    more = dataclasses.replace(question, gpu_memory_bytes=question.gpu_memory_bytes * 1.5)
    load, load_with_more = (full_batches(calibration, each, slots).load_per_s[0] for each in (question, more))
    assert np.all(np.diff(load) < 0)
    assert np.all(load_with_more >= load)


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("max_lora_rank", 64, 32),
        ("max_model_len", 8192, 131072),
        ("block_size", 32, 16),
    ],
)
def test_settings_that_no_column_tells_are_refused_unless_at_their_default(mix, calibration, name, value, default):
    plain = WorkloadBatch.of(mix, calibration)
    again = WorkloadBatch.of(mix, calibration, **{name: default})
    for key, column in vars(plain).items():
        np.testing.assert_array_equal(getattr(again, key), column)
    with pytest.raises(InputError, match=rf"{name}: {value} .* {default}, which surrogates .* use `optimize`"):
        WorkloadBatch.of(mix, calibration, **{name: value})


def test_requests_longer_than_the_model_takes_are_refused(mix, calibration):
    model = calibration.model.to_json() | {"max_position_embeddings": 2048}
    short = Calibration.from_json(calibration.to_json() | {"model": model})
    with pytest.raises(InputError, match=r"max_model_len: 2048 .* >= 2624"):
        WorkloadBatch.of(mix, short)
