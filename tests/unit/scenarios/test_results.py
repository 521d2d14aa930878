import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.hardware import Gpu
from lora_capacity.run import simulate as run
from lora_capacity.scenarios import Bottleneck, Results, build_scenarios, table
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.workload import AdapterMix, Workload
from tests.examples import LENGTHS, make_calibration, make_scenarios, simulate

WORKLOAD = Workload(AdapterMix([0.1], [8]), LENGTHS, LENGTHS, horizon_s=60.0)


def results(throughput_tokens_per_s: list[float], offered_tokens_per_s: list[float]) -> Results:
    any_results = simulate(make_scenarios([[10, 20, 30]], [0.2, 0.1, 0.04]))
    return replace(
        any_results,
        throughput_tokens_per_s=jnp.asarray(throughput_tokens_per_s),
        offered_tokens_per_s=jnp.asarray(offered_tokens_per_s),
    )


def test_service_is_the_share_of_the_offered_load_that_is_served() -> None:
    found = results([90.0, 100.0, np.nan], [100.0, 100.0, 100.0]).service
    np.testing.assert_allclose(found, [0.9, 1.0, np.nan], rtol=1e-6)


def test_starved_is_a_tenth_below_the_offered_load_or_what_is_asked_for() -> None:
    found = results([85.0, 95.0, 100.0, np.nan], [100.0] * 4)
    assert found.starved().tolist() == [True, False, False, False]
    assert found.starved(0.02).tolist() == [True, True, False, False]
    assert found.starved(0.5).tolist() == [False, False, False, False]


def test_a_table_has_a_row_for_each_configuration_with_words_for_codes() -> None:
    calibration = make_calibration(gpu=Gpu("small", 32 * BYTES_PER_GIB))
    scenarios = build_scenarios(WORKLOAD, calibration, [4, 400], [4, 400], max_model_len=4096)
    found = run(calibration, scenarios, WORKLOAD)
    frame = found.to_pandas()
    assert frame.max_loras.tolist() == [4, 400]
    assert frame.status.tolist() == ["outside_calibration", "oom"]
    assert frame.limit.tolist() == ["none", ""]
    assert frame.throughput_tokens_per_s.isna().tolist() == [False, True]
    columns = table(scenarios, found)
    assert found.to_arrow().column_names == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(frame[name].to_numpy(), values)


def test_a_table_needs_the_configurations() -> None:
    with pytest.raises(InputError, match="scenarios: missing"):
        results([1.0] * 3, [1.0] * 3).to_arrow()


def test_without_pandas_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install pandas.*to_arrow does without"):
        results([1.0] * 3, [1.0] * 3).to_pandas()


@pytest.mark.parametrize(("limit", "label"), [(Bottleneck.NONE, "none"), (Bottleneck.KV_CACHE, "kv_cache")])
def test_a_limit_has_the_name_that_stands_in_files(limit: Bottleneck, label: str) -> None:
    assert limit.label == label
