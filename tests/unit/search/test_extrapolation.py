import math
from typing import Any

import numpy as np
import pytest

from lora_capacity.calibration import Calibration
from lora_capacity.calibration.extrapolation import GROWING_WITH
from lora_capacity.costs import COEFFICIENTS
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search import Needed, assess, recommend
from lora_capacity.search.extrapolation import extrapolation_error
from lora_capacity.workload import AdapterMix, LengthDistribution, Workload
from tests.examples import LENGTHS, make_calibration, make_costs

WORKLOAD = Workload(AdapterMix([0.5, 0.2], [16]), LENGTHS, LENGTHS)
ERRORS = {"prefill_token_s": 0.1, "kv_token_s": 0.2, "expand_block_s": 0.06}
PREDICTED = {name: np.array([20.0]) for name in ("mean_running", "mean_waiting", "active_adapters")}


def of(calibration: Calibration, workload: Workload = WORKLOAD, adapters: int = 20, slots: int = 10) -> float:
    scenarios = build_scenarios(workload, calibration, [adapters], slots)
    return float(extrapolation_error(calibration, scenarios, PREDICTED, workload)[0])


def calibrated(ranges: dict[str, tuple[float, float]], **costs: float) -> Calibration:
    more: dict[str, Any] = {"costs": make_costs(**costs)} if costs else {}
    return make_calibration(fitted_ranges=ranges, accuracy={"coefficient_errors": ERRORS}, **more)


def test_every_range_has_terms_that_grow_with_it() -> None:
    assert {term for terms in GROWING_WITH.values() for term in terms} < {each.name for each in COEFFICIENTS}
    ranges = make_calibration().fitted_ranges
    assert set(ranges) <= set(GROWING_WITH)


def test_within_the_ranges_nothing_is_added() -> None:
    assert of(calibrated({"adapters": (1.0, 20.0), "max_loras": (10.0, 10.0), "input_tokens": (0.0, 1024.0)})) == 0.0


def test_a_step_of_one_term_is_off_by_its_error_times_the_logarithm_of_how_far() -> None:
    """All of the step grows with prompts, four times as long as any that was fitted over."""
    long = LengthDistribution.from_histogram([4096], [1])
    prompts = Workload(AdapterMix([0.5], [16]), long, LENGTHS)
    calibration = calibrated({"input_tokens": (0.0, 1024.0)}, prefill_token_s=1e-4)
    assert of(calibration, prompts) == pytest.approx(0.1 * math.log(4.0), rel=1e-4)


def test_below_the_range_is_outside_too_and_an_error_that_is_not_reported_is_that_of_a_prior() -> None:
    calibration = calibrated({"max_loras": (40.0, 80.0)}, shrink_block_s=1e-9)
    assert of(calibration) == pytest.approx(0.5 * math.log(4.0), rel=1e-4)


def test_terms_err_apart_each_by_its_share() -> None:
    """Prompts as long as answers: 40 tokens a step, of which 20 are prompts; 20 requests hold 450 tokens each."""
    same = LengthDistribution.from_histogram([300], [1])
    workload = Workload(AdapterMix([0.5], [16]), same, same)
    costs = {"base_s": 0.01, "prefill_token_s": 1e-4, "kv_token_s": 1e-6}
    held = 20.0 * (300.0 + 150.0 + 8.0)
    step = 0.01 + 20.0 * 1e-4 + held * 1e-6
    own, cache = 0.1 * 20.0 * 1e-4 / step, 0.2 * held * 1e-6 / step
    found = of(calibrated({"input_tokens": (0.0, 100.0)}, **costs), workload)
    assert found == pytest.approx(math.hypot(own, cache) * math.log(3.0), rel=1e-4)


def test_only_the_tokens_of_longer_requests_count() -> None:
    """One prompt in five is twice as long as the range: a third of the tokens."""
    prompts = LengthDistribution.from_histogram([1000, 2000], [4, 1])
    workload = Workload(AdapterMix([0.5], [16]), prompts, LENGTHS)
    calibration = calibrated({"input_tokens": (0.0, 1000.0)}, prefill_token_s=1e-4)
    assert of(calibration, workload) == pytest.approx(0.1 * math.log(2.0) / 3.0, rel=1e-4)


def test_an_answer_outside_is_less_certain_than_the_same_one_inside() -> None:
    """The figures are the same, the chance of failing is not; nor the margin that a recommendation keeps."""
    wide, narrow = ({"adapters": (1.0, 500.0), "input_tokens": (0.0, most)} for most in (1024.0, 50.0))
    inside, outside = calibrated(wide), calibrated(narrow)
    limits: dict[str, Any] = {"max_num_batched_tokens": [2048], "max_num_seqs": [256], "engine": "steady"}
    safe, wary = (recommend(WORKLOAD, each, **limits) for each in (inside, outside))
    assert safe.best.extrapolation_error == 0.0 < wary.best.extrapolation_error
    assert wary.best.max_cpu_loras < safe.best.max_cpu_loras
    assert any("the headroom allows for it" in warning for warning in wary.warnings)
    assert not any("the headroom allows for it" in warning for warning in safe.warnings)
    best = safe.best
    settings: dict[str, Any] = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
    scenarios = build_scenarios(WORKLOAD, outside, [best.max_cpu_loras], best.max_loras, **settings)
    same = assess(outside, scenarios, WORKLOAD, needed=Needed.within(WORKLOAD.goodput))
    assert same["throughput_tokens_per_s"] == best.throughput_tokens_per_s
    assert same["starving_probability"] > best.starving_probability
