"""Where the twins differ, and why."""

import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.run import simulate
from lora_capacity.scenarios import build_scenarios
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.validation.twins import COMPARED, compare_twins, summarise_comparison
from lora_capacity.workload import AdapterMix, Workload
from tests.examples import LENGTHS, make_calibration

CALIBRATION = make_calibration()
WORKLOAD = Workload(AdapterMix([2.0, 1.0], [16]), LENGTHS, LENGTHS, horizon_s=120.0, max_pending=2000)


@pytest.fixture(scope="module")
def scenarios():
    utilization = [0.9, 0.9, 0.9, 0.9, 0.2]
    return build_scenarios(
        WORKLOAD, CALIBRATION, [2, 9, 30, 30, 9], [2, 9, 2, 30, 4], gpu_memory_utilization=utilization
    )


@pytest.fixture(scope="module")
def columns(scenarios):
    return compare_twins(CALIBRATION, scenarios, WORKLOAD, seeds=[3, 4])


def test_both_say_what_they_say_alone(scenarios, columns):
    steady = simulate(CALIBRATION, scenarios, ResidenceTime.of_lengths(WORKLOAD.output_tokens))
    events = [simulate(CALIBRATION, scenarios, WORKLOAD, engine="event", seed=seed) for seed in (3, 4)]
    for name in COMPARED:
        mean = np.mean([getattr(each, name) for each in events], axis=0)
        np.testing.assert_allclose(columns[name], mean, rtol=1e-5)
        np.testing.assert_allclose(columns[f"steady_{name}"], getattr(steady, name), rtol=1e-5)
        np.testing.assert_allclose(columns[f"difference_{name}"], getattr(steady, name) / mean - 1.0, atol=1e-4)


def test_regimes(columns):
    assert columns["regime"][0] == "keeps_up"
    assert columns["regime"][2] == "slots"
    assert columns["regime"][4] == "does_not_start"
    assert not columns["differs"][4]


def test_a_difference_has_a_reason_and_none_has_none(columns):
    off = np.abs(columns["difference_throughput_tokens_per_s"]) > 0.02
    assert columns["differs"].tolist() == off.tolist()
    assert [bool(why) for why in columns["why"]] == off.tolist()
    chance = np.abs(columns["difference_throughput_tokens_per_s"]) <= 2 * columns["standard_error"]
    assert (columns["why"][off & chance] == "chance").all()
    assert (columns["why"][off & ~chance] != "chance").all()


def test_one_seed_knows_at_least_the_chance_of_the_draw(scenarios, columns):
    alone = compare_twins(CALIBRATION, scenarios, WORKLOAD, seeds=[3])
    # 3 requests per second over 120 s; mean 200 and spread 200 tokens for prompt and answer.
    expected = np.sqrt((1.0 + 0.5) / 360.0)
    assert alone["standard_error"][0] == pytest.approx(expected, rel=0.02)
    assert columns["standard_error"][0] >= 0.98 * expected / np.sqrt(2.0)


def test_the_summary_counts_every_configuration_once(columns):
    summary = summarise_comparison(columns)
    assert sum(entry["configurations"] for entry in summary) == 5
    assert sum(entry["differ"] for entry in summary) == columns["differs"].sum()
    counts = [entry["configurations"] for entry in summary]
    assert counts == sorted(counts, reverse=True)
    for entry in summary:
        assert sum(entry.get("why", {}).values()) == entry["differ"]
    (refused,) = (entry for entry in summary if entry["regime"] == "does_not_start")
    assert refused == {"regime": "does_not_start", "configurations": 1, "differ": 0}
    (slots,) = (entry for entry in summary if entry["regime"] == "slots")
    rows = columns["regime"] == "slots"
    off = columns["difference_itl_s"][rows]
    assert slots["mean_absolute_difference"]["itl_s"] == pytest.approx(np.abs(off).mean())


def test_a_tolerance_is_above_zero(scenarios):
    with pytest.raises(InputError, match="tolerance"):
        compare_twins(CALIBRATION, scenarios, WORKLOAD, tolerance=0.0)
