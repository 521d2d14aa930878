import dataclasses
import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.run import simulate, steady
from lora_capacity.run.steady import enable_compilation_cache, grid, with_classes
from lora_capacity.scenarios import Bottleneck, table
from lora_capacity.status import Status
from lora_capacity.twins.steady import simulate_steady
from tests.examples import COSTS, STAYS, make_calibration, make_scenarios

CALIBRATION = make_calibration()
at_once = jax.jit(simulate_steady)
SAME = 1e-5  # chunks are compiled for another shape, so that float32 sums may come out in another order
MERGED = 1e-3

SWEEP_ON_TWO_DEVICES = """
import sys, jax, numpy as np
from lora_capacity.run import simulate
from lora_capacity.run.steady import enable_compilation_cache
from tests import examples
enable_compilation_cache(sys.argv[1])
scenarios = examples.make_scenarios(np.arange(3, 1503).reshape(-1, 3), [0.4, 0.05, 0.0125], max_loras=4)
together = simulate(examples.make_calibration(), scenarios, examples.STAYS)
print(len(jax.local_devices()), *together.throughput_tokens_per_s.tolist())
"""


def make_sweep(configs: int):
    adapters = np.arange(configs) % 97 + 4
    return make_scenarios(
        np.stack([adapters, adapters // 2, adapters // 4], axis=1),
        [0.4, 0.05, 0.0125],
        max_loras=np.arange(configs) % 13 + 1,
        kv_cache_tokens=2e5,
        horizon_s=3600.0,
        max_pending=2000.0,
        status=np.where(np.arange(configs) % 5 == 0, Status.NO_KV_CACHE, Status.OK),
    )


def test_a_grid_is_every_combination_with_no_more_slots_than_adapters():
    found = grid([4, 2, 8], [8, 1, 4], max_num_seqs=[16, 32], max_lora_rank=None)
    expected = [row for row in itertools.product([4, 2, 8], [8, 1, 4], [16, 32]) if row[1] <= row[0]]
    assert list(found) == ["adapters", "max_loras", "max_num_seqs"]
    assert list(zip(*(column.tolist() for column in found.values()), strict=True)) == expected


def test_a_grid_without_a_combination_is_refused():
    with pytest.raises(InputError, match=r"max_loras: 8 is not allowed; allowed: at most .* 4"):
        grid([2, 4], [8, 16])
    with pytest.raises(InputError, match="max_num_seqs: 'none'"):
        grid([2], [1], max_num_seqs=[])


def test_chunks_say_what_the_twin_says_of_all_at_once():
    scenarios = make_sweep(2 * steady.CHUNK_CPU + 3)
    found, expected = simulate(CALIBRATION, scenarios, STAYS), at_once(COSTS, scenarios, STAYS)
    found = dataclasses.replace(found, scenarios=None)  # as given
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, SAME, SAME), found, expected)


def test_a_sweep_compiles_once_whatever_its_size():
    simulate(CALIBRATION, make_sweep(1), STAYS)
    compiled = steady._simulate_chunk._cache_size()
    for configs in (2, 700, 1500):
        simulate(CALIBRATION, make_sweep(configs), STAYS)
    simulate(CALIBRATION, make_scenarios([3, 4, 5, 6], [1.0, 0.5, 0.2, 0.1]), STAYS)  # as many classes when rounded up
    assert steady._simulate_chunk._cache_size() == compiled


def test_progress_rises_to_the_total():
    calls = []
    configs = 2 * steady.CHUNK_CPU + 3
    simulate(CALIBRATION, make_sweep(configs), STAYS, progress=lambda *call: calls.append(call))
    assert calls[-1] == (configs, configs)
    assert calls == sorted(set(calls))
    assert len(calls) == 3


def test_the_table_has_units_labels_and_what_is_starved():
    scenarios = make_sweep(200)
    results = simulate(CALIBRATION, scenarios, STAYS)
    found = table(scenarios, results, threshold=0.3)
    assert all(column.shape == (200,) for column in found.values())
    started = found["status"] == "ok"
    assert started.tolist() == (results.status == Status.OK).tolist()
    assert set(found["status"][~started]) == {"no_kv_cache"}
    assert np.isnan(found["throughput_tokens_per_s"]).tolist() == (~started).tolist()
    assert set(found["limit"][~started]) == {""}
    assert found["limit"][started].tolist() == [Bottleneck(code).label for code in results.limit[started]]
    share = found["throughput_tokens_per_s"] / found["offered_tokens_per_s"]
    assert found["starved"].tolist() == (share <= 0.7).tolist()
    assert 0 < found["starved"].sum() < started.sum()
    assert found["max_cpu_loras"][:2].tolist() == [4 + 2 + 1, 5 + 2 + 1]
    assert found["max_loras"].dtype == np.int64


def test_classes_without_adapters_change_nothing():
    scenarios = make_sweep(20)
    wider = with_classes(scenarios, 8)
    assert wider.class_count.shape == (20, 8)
    plain, padded = (simulate(CALIBRATION, each, STAYS) for each in (scenarios, wider))
    np.testing.assert_allclose(padded.throughput_tokens_per_s, plain.throughput_tokens_per_s, SAME)


def test_merged_classes_keep_adapters_load_and_throughput():
    rates = np.geomspace(0.02, 1.0, 16)
    served = np.arange(16) >= np.array([[0], [5], [12], [14]])
    scenarios = make_scenarios(
        served.astype(float),
        rates,
        class_rank=np.where(np.arange(16) % 3, 8.0, 32.0),
        max_loras=[4, 8, 2, 2],
        kv_cache_tokens=1e5,
        horizon_s=3600.0,
    )
    merged = with_classes(scenarios, 8)
    assert merged.class_count.shape == (4, 8)
    for weight in (1.0, "class_rate_per_s", "class_rank"):
        before, after = (
            (each.class_count * (weight if weight == 1.0 else getattr(each, weight))).sum(axis=1)
            for each in (scenarios, merged)
        )
        np.testing.assert_allclose(after, before, SAME)
    exact, found = (simulate(CALIBRATION, each, STAYS) for each in (scenarios, merged))
    np.testing.assert_allclose(found.throughput_tokens_per_s, exact.throughput_tokens_per_s, MERGED)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "new"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", SWEEP_ON_TWO_DEVICES, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_sweep_is_shared_among_devices(two_devices):
    devices, *shared = map(float, two_devices[1].split())
    assert devices == 2
    scenarios = make_scenarios(np.arange(3, 1503).reshape(-1, 3), [0.4, 0.05, 0.0125], max_loras=4)
    np.testing.assert_allclose(shared, simulate(CALIBRATION, scenarios, STAYS).throughput_tokens_per_s, SAME)


@pytest.mark.slow
def test_what_is_compiled_is_kept(two_devices):
    assert any("simulate_steady" in entry.name for entry in two_devices[0].iterdir())


def test_a_cache_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a folder that can be written to"):
        enable_compilation_cache(tmp_path / "file" / "cache")
