import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_capacity.calibration import load_calibration
from lora_capacity.surrogate import Space, describe, label, train_surrogate
from lora_capacity.surrogate.trees import KINDS

pytestmark = pytest.mark.slow

CALIBRATION = load_calibration("llama-3.1-8b-instruct-h100-64gb")


@pytest.fixture(scope="module")
def surrogate():
    return train_surrogate(CALIBRATION, label(CALIBRATION, Space(), 40, seed=7))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**16), more=st.floats(1.0, 2.5))
@settings(max_examples=8)
def test_more_gpu_memory_never_lowers_the_predicted_throughput(surrogate, kind, seed, more):
    few = Space().sample(16, seed)
    many = dataclasses.replace(few, gpu_memory_bytes=np.rint(few.gpu_memory_bytes * more))
    before, after = (describe(CALIBRATION, each) for each in (few, many))
    starts = before.most_slots > 0
    low, high = (
        each.full_per_s * np.exp(surrogate.of("throughput", kind).predict(each.values)) for each in (before, after)
    )
    assert np.all(high[starts] >= low[starts] * (1.0 - 1e-6))


@given(seed=st.integers(0, 2**32 - 1), adapters=st.integers(1, 10**5))
@settings(max_examples=50)
def test_adapters_are_counted_back_from_their_load(seed, adapters):
    workloads = Space().sample(4, seed)
    counts = np.full(4, adapters)
    assert workloads.adapters_at(workloads.offered_per_s(counts)).tolist() == counts.tolist()
