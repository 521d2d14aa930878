import dataclasses

import numpy as np
import pytest

from lora_capacity.run.steady import simulate
from lora_capacity.scenarios import build_scenarios
from lora_capacity.surrogate import Questions, Space
from lora_capacity.surrogate.steady import limits, simulate_questions
from lora_capacity.twins.steady import StayLaw
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


@pytest.fixture
def mix():
    return Workload.from_mapping(MIX)


def test_a_workload_and_its_question_mean_the_same(mix, calibration):
    adapters, slots = np.array([5, 40, 120, 200]), np.array([5, 20, 60, 30])
    question = Questions.of(mix, calibration).take(np.zeros(4, np.int64))
    ours = simulate_questions(calibration, question, adapters, slots)
    theirs = simulate(
        calibration, build_scenarios(mix, calibration, adapters, slots), StayLaw.of_lengths(mix.output_tokens)
    )
    np.testing.assert_allclose(ours.throughput_tokens_per_s, theirs.throughput_tokens_per_s, SAME)
    np.testing.assert_allclose(ours.offered_tokens_per_s, theirs.offered_tokens_per_s, 1e-5)


def test_adapters_of_a_turn_are_counted_back_from_their_load():
    questions = Space(base_tokens_per_s=(100, 3000)).sample(20, seed=1)
    adapters = np.arange(1, 21)
    load = questions.offered_per_s(adapters)
    rates = [np.tile(row, 7)[:a].sum() for row, a in zip(questions.rates_per_s, adapters, strict=True)]
    np.testing.assert_allclose(load, questions.base_rate_per_s + rates)
    assert questions.adapters_at(load).tolist() == adapters.tolist()
    assert questions.adapters_at(load * (1 - 1e-6)).tolist() == (adapters - 1).tolist()
    assert questions.adapters_at(load[:, np.newaxis] * [1.0, 1e-9]).tolist() == [[a, 0] for a in adapters]


def test_a_list_has_no_more_adapters_than_it_names(calibration):
    rates = np.geomspace(0.01, 1.0, 40)
    listed = {"adapters": {"mix": {"rates_per_s": rates.tolist(), "ranks": [8]}}, "requests": LENGTHS}
    question = dataclasses.replace(
        Questions.of(Workload.from_mapping(listed), calibration), most_adapters=np.array([40.0])
    )
    assert question.adapters_at(np.array([1e6])).tolist() == [40]
    merged = question.lay_out(calibration, np.array([40]), np.array([4]))
    assert merged.class_count.shape == (1, 16)
    np.testing.assert_allclose((merged.class_count * merged.class_rate_per_s).sum(), rates.sum(), 1e-6)


def test_fractions_of_adapters_lie_between_whole_ones(mix, calibration):
    question = Questions.of(mix, calibration).take(np.zeros(3, np.int64))
    slots = np.full(3, 16)
    found = simulate_questions(calibration, question, np.array([60.0, 63.0, 66.0]), slots).throughput_tokens_per_s
    assert found[0] < found[1] < found[2]


def test_most_slots_start_and_one_more_does_not(calibration):
    questions = Space().sample(16, seed=2)
    most = questions.most_slots(calibration)
    rank = questions.max_lora_rank(np.full(16, 3), calibration)
    assert np.all(questions.plan(calibration, most, rank)[1] == 0)
    assert np.all(questions.plan(calibration, most + 1, rank)[1] != 0)


def test_a_server_at_its_limit_completes_more_with_more_memory_and_less_with_more_slots(calibration):
    question = Space(base_tokens_per_s=(0, 0)).sample(1, seed=5)
    slots = np.array([[1, 8, 32]])
    more = dataclasses.replace(question, gpu_memory_bytes=question.gpu_memory_bytes * 1.5)
    load, load_with_more = (limits(calibration, each, slots).load_per_s[0] for each in (question, more))
    assert np.all(np.diff(load) < 0)
    assert np.all(load_with_more >= load)
