import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_capacity.errors import InputError
from lora_capacity.workload import AdapterList, AdapterMix, Adapters, Arrivals, LengthDistribution, Workload

rates = st.floats(1e-3, 2.0)
ranks = st.sampled_from([1, 8, 16, 32, 64])
mixes = st.builds(AdapterMix, st.lists(rates, min_size=1, max_size=6), st.lists(ranks, min_size=1, max_size=6))
lists = st.lists(st.tuples(rates, ranks), min_size=1, max_size=30).map(
    lambda rows: AdapterList([f"adapter {i}" for i in range(len(rows))], *zip(*rows, strict=True))
)


VALID: dict[str, Any] = {
    "adapters": {"mix": {"rates_per_s": [0.4, 0.05], "ranks": [8, 16]}},
    "base_model": {"rate_per_s": 0.5},
    "requests": {
        "input_tokens": {"mean": 220, "std": 250, "min": 4, "max": 1024},
        "output_tokens": {"mean": 200, "std": 210, "min": 4, "max": 1024},
    },
    "arrivals": {"process": "gamma", "cv": 2.0},
    "horizon_s": 60,
    "max_pending": 100,
}
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def attainable_moments(draw: st.DrawFn) -> tuple[float, float, int, int]:
    """Any mean to three decimals within the bounds, with any std inside the range that distributions there have."""
    low = draw(st.integers(1, 500))
    high = low + draw(st.integers(1, 3000))
    mean = draw(
        st.one_of(st.integers(1000 * low, 1000 * high).map(lambda tokens: tokens / 1000), st.integers(low, high))
    )
    part = mean - math.floor(mean)
    least, most = math.sqrt(part * (1 - part)), math.sqrt((mean - low) * (high - mean))
    share = draw(st.one_of(st.floats(0, 1), st.floats(1e-9, 1e-3), st.floats(1e-9, 1e-3).map(lambda tail: 1 - tail)))
    std = least + share * (most - least)
    return mean, std if std > 1e-30 else 0.0, low, high  # numbers too small for single precision are refused


@given(attainable_moments())
@settings(max_examples=300)
def test_every_attainable_mean_and_std_is_met(moments: tuple[float, float, int, int]) -> None:
    mean, std, low, high = moments
    lengths = LengthDistribution.from_moments(mean, std, low, high)
    assert lengths.mean == pytest.approx(mean, rel=1e-6)
    assert lengths.std == pytest.approx(std, rel=1e-6, abs=1e-4 if std <= 1e-4 else 0)
    assert low <= lengths.min <= lengths.max <= high


@given(attainable_moments(), st.floats(1.001, 10))
def test_a_std_beyond_the_range_is_refused(moments: tuple[float, float, int, int], factor: float) -> None:
    mean, _, low, high = moments
    most = math.sqrt((mean - low) * (high - mean))
    with pytest.raises(InputError, match="std"):
        LengthDistribution.from_moments(mean, (most + 1e-6) * factor, low, high)


@given(st.dictionaries(st.integers(1, 5000), st.floats(1e-3, 1e6), min_size=1, max_size=50), st.integers(0, 2**32))
def test_a_histogram_keeps_its_moments_and_samples_its_lengths(weights: dict[int, float], seed: int) -> None:
    lengths = LengthDistribution.from_histogram(list(weights), list(weights.values()))
    assert lengths.mean == pytest.approx(np.average(list(weights), weights=list(weights.values())))
    assert set(lengths.sample(np.random.default_rng(seed), 100).tolist()) <= set(weights)


@given(st.one_of(mixes, lists), st.data())
def test_classes_are_the_dealt_adapters_counted(adapters: Adapters, data: st.DataObject) -> None:
    most = adapters.max_count or 100
    counts = np.array(data.draw(st.lists(st.integers(1, most), min_size=1, max_size=5)))
    classes = adapters.classes(counts)
    assert classes.count.sum(axis=1).tolist() == counts.tolist()
    for count, row, largest in zip(counts.tolist(), classes.count, adapters.max_rank(counts), strict=True):
        rates_per_s, dealt_ranks = adapters.deal(count)
        assert row @ classes.rate_per_s == pytest.approx(rates_per_s.sum())
        assert row @ classes.rank == dealt_ranks.sum()
        assert largest == dealt_ranks.max()


@given(
    mixes,
    st.floats(0.3, 4.0),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 2**53),
    st.just(0.0) | st.floats(1e-6, 1.0),
)
@settings(max_examples=50)
def test_requests_are_in_order_and_grow_with_the_adapters(
    adapters: AdapterMix, cv: float, few: int, more: int, seed: int, base_rate_per_s: float
) -> None:
    lengths = LengthDistribution.from_histogram([4, 90], [1, 1])
    workload = Workload(adapters, lengths, lengths, base_rate_per_s, Arrivals("gamma", cv), horizon_s=50.0)
    small, large = workload.sample_requests(few, seed), workload.sample_requests(few + more, seed)
    assert np.all(np.diff(large.arrival_s) >= 0)
    assert np.all((large.arrival_s >= 0) & (large.arrival_s < workload.horizon_s))
    kept = large.select(large.adapter < few)
    for name in ("arrival_s", "adapter", "input_tokens", "output_tokens"):
        assert getattr(kept, name).tolist() == getattr(small, name).tolist()


@given(st.data(), anything)
@settings(max_examples=500)
def test_any_value_anywhere_is_taken_or_told_in_one_line(data: st.DataObject, value: object) -> None:
    mapping = copy.deepcopy(VALID)
    place: Any = mapping
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        workload = Workload.from_mapping(mapping)
    except InputError as error:
        told = str(error)
    else:
        told = f"A of 3 is {workload.check_adapters(3)}"
    assert len(told.splitlines()) == 1
