from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import (
    BASE_MODEL,
    AdapterList,
    AdapterMix,
    Arrivals,
    LengthDistribution,
    Requests,
    Workload,
)

EXAMPLES = Path(__file__).parents[3] / "examples"
WORKLOAD = Workload(
    AdapterMix([0.5, 0.2], [8]),
    LengthDistribution.from_moments(223, 248, 4, 1024),
    LengthDistribution.from_moments(197, 207, 4, 1024),
    base_rate_per_s=0.3,
    horizon_s=600,
)


def columns(requests: Requests, of: np.ndarray | slice = slice(None)) -> list[list[float]]:
    rows = requests.select(of)
    return [part.tolist() for part in (rows.arrival_s, rows.adapter, rows.input_tokens, rows.output_tokens)]


def test_moments() -> None:
    assert WORKLOAD.mean_input_tokens == pytest.approx(223)
    assert WORKLOAD.mean_output_tokens == pytest.approx(197)
    assert WORKLOAD.second_moment_input_tokens == pytest.approx(223**2 + 248**2)
    assert WORKLOAD.second_moment_output_tokens == pytest.approx(197**2 + 207**2)
    assert WORKLOAD.mean_input_output_tokens == pytest.approx(223 * 197)


@pytest.mark.parametrize("arrivals", [Arrivals(), Arrivals("gamma", 3.0)])
def test_more_adapters_change_no_request_of_the_others(arrivals: Arrivals) -> None:
    workload = replace(WORKLOAD, arrivals=arrivals)
    few, many = workload.sample_requests(3, seed=4), workload.sample_requests(10, seed=4)
    assert columns(few) == columns(many, many.adapter < 3)
    assert set(many.adapter.tolist()) == {BASE_MODEL, *range(10)}


def test_equal_seeds_give_equal_requests_and_others_do_not() -> None:
    assert columns(WORKLOAD.sample_requests(5, seed=1)) == columns(WORKLOAD.sample_requests(5, seed=1))
    assert columns(WORKLOAD.sample_requests(5, seed=1)) != columns(WORKLOAD.sample_requests(5, seed=2))


def test_streams_of_adapters_are_unlike() -> None:
    requests = replace(WORKLOAD, adapters=AdapterMix([0.3], [8])).sample_requests(2, seed=1)
    first = [requests.arrival_s[requests.adapter == adapter][0] for adapter in (BASE_MODEL, 0, 1)]
    assert len(set(first)) == 3


def test_rates_and_lengths_are_those_asked_for() -> None:
    requests = WORKLOAD.sample_requests(40, seed=7)
    expected = 600 * (20 * 0.5 + 20 * 0.2 + 0.3)
    assert len(requests) == pytest.approx(expected, abs=4 * expected**0.5)
    base = int(np.count_nonzero(requests.adapter == BASE_MODEL))
    assert base == pytest.approx(180, abs=4 * 180**0.5)
    assert requests.input_tokens.mean() == pytest.approx(223, abs=4 * 248 / expected**0.5)
    assert requests.output_tokens.mean() == pytest.approx(197, abs=4 * 207 / expected**0.5)
    correlation = np.corrcoef(requests.input_tokens, requests.output_tokens)[0, 1]
    assert correlation == pytest.approx(0, abs=4 / expected**0.5)


def test_a_workload_of_one_adapter() -> None:
    one = replace(WORKLOAD, adapters=AdapterList(["only"], [2.0], [8]), base_rate_per_s=0)
    assert set(one.sample_requests(1).adapter.tolist()) == {0}
    assert one.classes([1]).count.tolist() == [[1]]
    with pytest.raises(InputError, match=r"adapters: 2 is not allowed; allowed: 1 to 1 \(the adapter list has 1\)"):
        one.sample_requests(2)


def test_no_request_at_all_is_no_error() -> None:
    quiet = replace(WORKLOAD, adapters=AdapterMix([1e-9], [8]), base_rate_per_s=0)
    assert len(quiet.sample_requests(2)) == 0


def test_a_trace_is_replayed_for_the_first_adapters() -> None:
    trace = Requests(np.array([0.0, 1, 2, 3]), np.array([1, 0, -1, 1]), np.array([10, 20, 30, 40]), np.full(4, 5))
    workload = replace(
        WORKLOAD,
        adapters=AdapterList(["a", "b"], [1 / 3, 2 / 3], [8, 8]),
        arrivals=Arrivals("trace", 0.7),
        trace=trace,
    )
    assert columns(workload.sample_requests(2, seed=9)) == columns(trace)
    assert workload.sample_requests(1).adapter.tolist() == [0, -1]
    assert workload.arrival_cv == 0.7
    assert workload.mean_input_output_tokens == 125


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("base_rate_per_s", -1, "base_model.rate_per_s: -1 is not allowed; allowed: a number >= 0"),
        ("horizon_s", 0, r"horizon_s: 0 is not allowed; allowed: a number >= 0.1 and <= 2.592e\+06"),
        ("max_pending", 0, "max_pending: 0 is not allowed; allowed: a whole number >= 1"),
        (
            "arrivals",
            Arrivals("trace"),
            "arrivals.process: 'trace' is not allowed; allowed: poisson, gamma; trace goes",
        ),
        (
            "trace",
            WORKLOAD.sample_requests(1),
            "arrivals.process: 'poisson' is not allowed; allowed: trace; trace goes",
        ),
    ],
)
def test_bad_fields_are_told(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(WORKLOAD, **{field: value})


@pytest.mark.parametrize("seed", [-1, 0.5, "x", None])
def test_bad_seeds_are_told(seed: object) -> None:
    with pytest.raises(InputError, match=r"seed: .* allowed: a whole number >= 0"):
        WORKLOAD.sample_requests(1, seed=seed)


def test_too_many_requests_are_told() -> None:
    with pytest.raises(
        InputError, match=r"horizon_s: 600 is not allowed; allowed: a number <= 22.2 \(20000000 requests"
    ):
        replace(WORKLOAD, adapters=AdapterMix([9e5], [8])).sample_requests(1)


@pytest.mark.parametrize("name", ["few_busy", "many_idle", "mixed_ranks"])
def test_examples_go_from_idle_to_overload(name: str) -> None:
    workload = Workload.from_file(EXAMPLES / f"{name}.yaml")
    counts = np.array([1, min(workload.adapters.max_count or 384, 384)])
    classes = workload.classes(counts)
    tokens = workload.mean_input_tokens + workload.mean_output_tokens
    one, all_of_them = (classes.count @ classes.rate_per_s + workload.base_rate_per_s) * tokens
    # An 8B model on an H100 completes some 7,000 to 13,000 tokens per second.
    assert one < 1_000
    assert all_of_them > 11_000


def test_tables_are_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workload = Workload.from_file(str(EXAMPLES / "mixed_ranks.yaml"))
    assert workload.adapters.max_count == 200
    assert workload.adapters.max_rank([1, 200]).tolist() == [8, 32]
    assert np.all(np.diff(workload.adapters.deal(200)[0]) < 0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file not found"):
        Workload.from_file(tmp_path / "gone.yaml")
