import dataclasses
import io
import pickle

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lora_capacity.errors import InputError
from lora_capacity.run.tasks import ELSEWHERE
from lora_capacity.surrogate import Dataset, Space, label
from lora_capacity.surrogate import dataset as module
from lora_capacity.surrogate.simulation import simulate_workloads

LITTLE = 0.002  # the sustained load is interpolated between loads tried, and adapters are dealt in turn


def test_an_optimum_does_not_starve_and_one_more_adapter_would(labels, calibration):
    found = np.flatnonzero(labels.optima.max_loras > 0)
    assert found.size == len(labels)
    adapters, slots = labels.optima.max_cpu_loras, labels.optima.max_loras
    here = simulate_workloads(calibration, labels.workloads, adapters, slots)
    beyond = simulate_workloads(calibration, labels.workloads, np.ceil(adapters * 1.02).astype(int) + 1, slots)
    # The steady twin's fixed point jumps now and then, of one workload in some fifty near its optimum.
    assert np.mean(here.service > 0.9 - LITTLE) > 0.95
    assert np.mean(beyond.service < 0.9 + LITTLE) > 0.95
    offered = labels.workloads.offered_per_s(adapters) * labels.workloads.tokens_per_request
    expected = np.maximum(here.throughput_tokens_per_s, 0.9 * offered)
    np.testing.assert_allclose(labels.optima.throughput_tokens_per_s, expected, 1e-5)


def test_no_configuration_of_the_surface_beats_the_optimum(labels):
    throughput = labels.surfaces.grid_throughput
    load = labels.workloads.offered_per_s(labels.surfaces.grid_adapters) * labels.workloads.tokens_per_request[:, None]
    starved = throughput < 0.9 * load[..., None]
    before = np.cumsum(starved, axis=1) == 0
    best = np.nanmax(np.where(before, throughput, np.nan), axis=(1, 2))
    per_adapter = labels.workloads.rates_per_s.max(axis=1) * labels.workloads.tokens_per_request
    # Throughput of whole adapters jumps; the load that is sustained does not.
    assert np.mean(best <= labels.optima.throughput_tokens_per_s * 1.01 + per_adapter) > 0.95


def test_equal_seeds_give_equal_labels_and_a_file_gives_them_back(labels, calibration, tmp_path):
    again = label(calibration, Space(), 48, seed=3)
    labels.write(tmp_path / "a.parquet")
    read = Dataset.read(tmp_path / "a.parquet")
    for name in ("workloads", "optima", "surfaces"):
        for key, values in vars(getattr(labels, name)).items():
            np.testing.assert_array_equal(getattr(getattr(again, name), key), values)
            np.testing.assert_allclose(getattr(getattr(read, name), key), values, 1e-6)
    assert read.about["calibration"] == calibration.name
    assert read.about["space"] == Space().to_json()
    assert read.take(np.array([3, 1])).optima.max_loras.tolist() == labels.optima.max_loras[[3, 1]].tolist()


def test_interrupted_labels_go_on(calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)
    calls = []

    def survey(calibration, workloads, **more):
        calls.append(len(workloads))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return surveyed(calibration, workloads, **more)

    surveyed = module.survey
    monkeypatch.setattr(module, "survey", survey)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        label(calibration, Space(), 8, checkpoint_dir=parts)
    told = []
    found = label(calibration, Space(), 8, checkpoint_dir=parts, progress=lambda *done: told.append(done))
    assert calls == [4, 4, 4]
    assert told == [(4, 8), (8, 8)]
    monkeypatch.setattr(module, "survey", surveyed)
    whole = label(calibration, Space(), 8)
    assert found.optima.max_loras.tolist() == whole.optima.max_loras.tolist()
    shards = sorted(parts.glob("*.npz"))
    others = io.BytesIO()
    np.savez(others, slots=np.zeros(4))
    for content in (b"", shards[0].read_bytes()[:300], others.getvalue()):
        shards[0].write_bytes(content)
        with pytest.warns(RuntimeWarning, match=r"shard-0000000.npz is damaged: what was in it is computed anew"):
            again = label(calibration, Space(), 8, checkpoint_dir=parts)
        assert again.optima.max_loras.tolist() == whole.optima.max_loras.tolist()
    with pytest.raises(InputError, match="what is left of other labels"):
        label(calibration, Space(), 8, seed=1, checkpoint_dir=parts)


def test_shards_made_elsewhere_in_any_order_are_the_same(calibration, tmp_path, monkeypatch):
    def elsewhere(task, items, finished, together):
        answers = [pickle.loads(pickle.dumps(task))(item) for item in reversed(items)]
        for answer in answers:
            finished(answer)
        return answers

    monkeypatch.setattr(module, "SHARD", 4)
    here = label(calibration, Space(), 10)
    token = ELSEWHERE.set(elsewhere)
    found = label(calibration, Space(), 10, checkpoint_dir=tmp_path / "parts")
    ELSEWHERE.reset(token)
    for name in ("optima", "surfaces"):
        for key, values in vars(getattr(here, name)).items():
            np.testing.assert_array_equal(getattr(getattr(found, name), key), values)
    assert len(list((tmp_path / "parts").glob("*.npz"))) == 3


def test_a_server_without_room_for_a_slot_has_no_optimum(calibration):
    small = label(calibration, Space(gpu_memory_gib=(24,)), 2)
    assert small.optima.max_loras.tolist() == [0, 0]
    assert np.isnan(small.optima.throughput_tokens_per_s).all()


@pytest.mark.slow
def test_what_the_event_twin_plays_changes_the_labels(calibration):
    space = dataclasses.replace(Space(), horizon_s=120.0, rates_per_s=(0.2, 3.0))
    steady, played = (label(calibration, space, 6, played=each) for each in (0, 3))
    assert played.about["plays"]["configurations"] >= 1
    assert not np.any(steady.correction)
    assert np.any(played.correction)
    np.testing.assert_array_equal(steady.surfaces.slots, played.surfaces.slots)


@pytest.mark.slow
def test_where_nothing_can_be_played_the_steady_twin_stands(calibration):
    space = dataclasses.replace(Space(), horizon_s=60.0, rates_per_s=(0.2, 3.0))
    labels = label(calibration, space, 12, played=2)
    assert labels.about["plays"] == {}
    assert not np.any(labels.correction)


def test_complaints_about_files(tmp_path):
    path = tmp_path / "other.parquet"
    with pytest.raises(InputError, match=r"other.parquet: .* a Parquet file of labels"):
        Dataset.read(path)
    parquet.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(InputError, match="another table"):
        Dataset.read(path)
    table = pyarrow.table({"a": [1]}).replace_schema_metadata({b"lora_capacity": b'{"schema_version": 99}'})
    parquet.write_table(table, path)
    with pytest.raises(InputError, match=r"schema_version: 99 .* label again"):
        Dataset.read(path)
