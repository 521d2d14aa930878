"""Rates that change over time: read, drawn, and taken at their peak."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import BASE_MODEL, AdapterList, Windows, Workload

LENGTHS = {"mean": 20, "std": 0, "min": 1, "max": 40}
REQUESTS = {"input_tokens": LENGTHS, "output_tokens": LENGTHS}
MIX = {"mix": {"rates_per_s": [0.5, 2.0], "ranks": [8]}}
RATES = "adapter,t_s,rate_per_s,cv\na,100,1,1\nb,100,4,\na,160,3,4\na,220,0,0\nb,220,6,0.5\nidle,100,0,0\n"


def workload(folder: Path = Path(), **keys: Any) -> Workload:
    return Workload.from_mapping({"adapters": MIX, "requests": REQUESTS, "horizon_s": 400} | keys, folder)


def listed(asked: Workload) -> AdapterList:
    assert isinstance(asked.adapters, AdapterList)
    return asked.adapters


def from_rates(folder: Path, text: str = RATES, **keys: Any) -> Workload:
    (folder / "rates.csv").write_text(text, encoding="utf-8")
    mapping = {"adapters": {"rates": "rates.csv", "ranks": [8, 16]}, "requests": REQUESTS} | keys
    return Workload.from_mapping(mapping, folder)


def test_a_profile_multiplies_all_rates_in_equal_parts() -> None:
    found = workload(arrivals={"profile": [0, 1, 4, 1]}, base_model={"rate_per_s": 2})
    assert found.over_time.edges_s.tolist() == [0, 100, 200, 300, 400]
    expected = np.outer([0, 1, 4, 1], [0.5, 2.0, 0.5, 2.0])
    np.testing.assert_allclose(found.rates_over_time(3), np.column_stack([expected[:, :3], [0, 2, 8, 2]]))
    # The mean multiplier is 1.5: rates of adapters are means over the horizon.
    assert found.adapters.deal(2)[0].tolist() == pytest.approx([0.75, 3.0])


@pytest.mark.parametrize("arrivals", [{}, {"process": "gamma", "cv": 0.3}])
def test_as_many_arrive_in_a_window_as_its_rate_says(arrivals: dict[str, Any]) -> None:
    found = workload(arrivals={"profile": [0, 1, 4, 1], **arrivals}, base_model={"rate_per_s": 1})
    requests = found.sample_requests(2, seed=3)
    for adapter, rate in ((0, 0.5), (1, 2.0), (BASE_MODEL, 1.0)):
        times = requests.arrival_s[requests.adapter == adapter]
        counts, _ = np.histogram(times, found.over_time.edges_s)
        expected = rate * 100 * np.array([0, 1, 4, 1])
        assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected))  # four standard deviations of Poisson
    assert (np.diff(requests.arrival_s) >= 0).all()


def test_under_more_load_the_same_windows_hold_more() -> None:
    found = workload(arrivals={"profile": [1, 4]}).lasting(3.0)
    assert found.horizon_s == 1200
    assert found.over_time.edges_s.tolist() == [0, 600, 1200]


def test_rates_hold_until_the_next_row(tmp_path: Path) -> None:
    found = from_rates(tmp_path)
    assert listed(found).names == ("b", "a")
    assert listed(found).ranks.tolist() == [8, 16]
    assert found.horizon_s == 180
    assert found.over_time.edges_s.tolist() == [0, 60, 120, 180]
    np.testing.assert_allclose(found.rates_over_time(2), [[4, 1, 0], [4, 3, 0], [6, 0, 0]])
    np.testing.assert_array_equal(found.over_time.cv, [[np.nan, 1], [np.nan, 4], [0.5, np.nan]])
    assert found.assumptions == ("1 of 3 adapters have no requests in 180 s and are ignored.",)


def test_a_horizon_cuts_rates_off_or_goes_on_with_the_last(tmp_path: Path) -> None:
    assert from_rates(tmp_path, horizon_s=90).over_time.edges_s.tolist() == [0, 60, 90]
    longer = from_rates(tmp_path, horizon_s=500)
    assert longer.over_time.edges_s.tolist() == [0, 60, 120, 500]
    assert longer.adapters.deal(1)[0].tolist() == pytest.approx([(4 * 120 + 6 * 380) / 500])


def test_a_list_gives_ranks_and_order(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("adapter,rank,shared_prefix_tokens\nidle,8,1\na,32,5\nb,64,7\n")
    found = from_rates(tmp_path, adapters={"rates": "rates.csv", "list": "list.csv"})
    assert listed(found).names == ("a", "b")
    assert listed(found).ranks.tolist() == [32, 64]
    assert found.shared_prefixes(2).tolist() == [5, 7, 0]


def test_columns_may_be_those_of_tenants(tmp_path: Path) -> None:
    tenants = RATES.replace("adapter,", "tenant,")
    assert listed(from_rates(tmp_path, tenants)).names == ("b", "a")


def test_windows_have_a_burstiness_of_their_own(tmp_path: Path) -> None:
    found = from_rates(tmp_path, "adapter,t_s,rate_per_s,cv\na,0,5,0.2\na,100,5,3\n")
    counts = np.array([np.histogram(found.sample_requests(1, seed).arrival_s, [0, 100, 200])[0] for seed in range(200)])
    # A renewal process's count has about cv² times its mean for a variance; 200 draws tell it to 10 %.
    np.testing.assert_allclose(counts.var(axis=0) / counts.mean(axis=0), [0.04, 9], rtol=0.5)
    np.testing.assert_allclose(found.over_time.gaps_cv(np.array([5.0]), 1.0), [0.2, 3])


def test_the_peak_lasts_an_hour_or_as_long_as_the_workload(tmp_path: Path) -> None:
    peak = from_rates(tmp_path).at_peak()
    assert peak.over_time is None
    assert peak.adapters.deal(2)[0].tolist() == pytest.approx([4, 3])
    assert peak.horizon_s == 180
    assert peak.arrival_cv == pytest.approx(((4 * 1 + 3 * 16) / 7) ** 0.5)
    day = workload(arrivals={"profile": [1, 3]}, horizon_s=86_400, base_model={"rate_per_s": 1}).at_peak()
    assert (day.horizon_s, day.base_rate_per_s) == (43_200, pytest.approx(3))
    assert day.adapters.deal(2)[0].tolist() == pytest.approx([1.5, 6])
    constant = workload()
    assert constant.at_peak() is constant


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arrivals": {"profile": []}}, "arrivals.profile: "),
        ({"arrivals": {"profile": [0, 0]}}, r"arrivals.profile: \[0.0, 0.0\] .* at least one number > 0"),
        ({"arrivals": {"profile": [1, -1]}}, r"arrivals.profile\[1\]: -1"),
        ({"adapters": {"rates": "rates.csv"}}, "adapters: 'rates' .* rates with a list, or with ranks"),
        ({"adapters": MIX | {"ranks": [8]}}, "adapters: 'mix and ranks' .* one of mix, list and rates"),
        (
            {"adapters": {"rates": "rates.csv", "ranks": [8]}, "arrivals": {"profile": [1, 2]}},
            "arrivals.profile: cannot be combined with adapters.rates",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    (tmp_path / "rates.csv").write_text(RATES, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        workload(tmp_path, **keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RATES.replace("160,3", "100,3"), "row 3, t_s: 'a' is not allowed; allowed: every time of an adapter once"),
        (RATES.replace("160,3", "160,-3"), "row 3, rate_per_s: '-3' is not allowed; allowed: a number >= 0"),
        (RATES.replace("160,3", "160,"), "row 3, rate_per_s: '' is not allowed"),
        (RATES.replace("b,220,6,0.5", "b,220,6,x"), "row 5, cv: 'x' is not allowed"),
        (RATES.replace("t_s", "time"), "a table with a column 't_s'"),
        ("adapter,t_s,rate_per_s\na,0,1\n", "horizon_s: missing; .*rates.csv has one time only"),
        ("adapter,t_s,rate_per_s\na,0,0\na,9,0\n", "rate_per_s: 0 .* an adapter with requests in the first 18 s"),
    ],
)
def test_bad_rates_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_rates(tmp_path, text)


def test_adapters_of_rates_are_those_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("adapter,rank\na,32\n")
    with pytest.raises(InputError, match=r"rates.csv, adapter: 'b' .* a name of adapters.list"):
        from_rates(tmp_path, adapters={"rates": "rates.csv", "list": "list.csv"})


def test_windows_end_with_the_horizon() -> None:
    windows, _ = Windows.from_profile([1, 2], 100.0)
    constant = workload()
    fields = {name: getattr(constant, name) for name in ("adapters", "input_tokens", "output_tokens")}
    with pytest.raises(InputError, match=r"horizon_s: 90.0 .* 100, the end of the traffic over time"):
        Workload(**fields, horizon_s=90.0, over_time=windows)
