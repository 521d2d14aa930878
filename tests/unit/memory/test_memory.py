from dataclasses import replace

import numpy as np
import pytest

from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.fitting.memory import fit_memory, plan_rows, score_memory
from lora_capacity.hardware import Gpu
from lora_capacity.measurements import CapacityRows
from lora_capacity.memory import (
    MemoryModel,
    allocate,
    plan_memory,
    resident_memory,
    slot_bytes,
)
from lora_capacity.models import ModelShape
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB, BYTES_PER_MIB

OLD = VllmBehaviour.for_version("0.8.5")
NEW = VllmBehaviour.for_version("0.32.0")
# One layer, widths that tell q, k, gate and down apart.
TINY = ModelShape("tiny", 1, 64, 256, 4, 2, 16, 1000, False, False, 2048, "LlamaForCausalLM")
MODEL = ModelShape("model", 16, 2048, 8192, 32, 8, 64, 128256, False, False, 8192, "Qwen2ForCausalLM")
MEMORY = MemoryModel(700e6, 200e6, 14.0, 250e6, 100e6)
GPU = Gpu("gpu", 40 * BYTES_PER_GIB)
SETTINGS = {
    "behaviour": OLD,
    "max_loras": 8,
    "max_lora_rank": 16,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.9,
    "max_model_len": 8192,
}


def plan(**changes):
    return plan_memory(MODEL, GPU, MEMORY, **(SETTINGS | changes))


@pytest.mark.parametrize(
    ("sizes_mib", "allocated_mib", "reserved_mib"),
    [
        ([0.5, 0.5], 1, 2),
        ([0.75, 1, 0.5], 2.25, 4),
        ([5, 5, 5, 5], 20, 20),
        ([7, 7, 7], 21, 40),
        # 10 MiB gets a segment of its own, and so does 9.99 in what is left of a 20 MiB segment.
        ([10, 11, 31.5], 10 + 12 + 32, 10 + 12 + 32),
        # The 6 MiB left over by two 7 MiB buffers take the 5.5; half a MiB that is left goes with it.
        ([7, 7, 5.5], 14 + 6, 20),
        # Of the pieces left, 13 and 2, the smaller that fits.
        ([18, 5, 2], 18 + 5 + 2, 18 + 20),
    ],
)
def test_buffers_take_what_the_caching_allocator_gives(sizes_mib, allocated_mib, reserved_mib):
    found = allocate([np.array([int(size * BYTES_PER_MIB)]) for size in sizes_mib])
    assert found.allocated_bytes / BYTES_PER_MIB == allocated_mib
    assert found.reserved_bytes / BYTES_PER_MIB == reserved_mib


def test_a_slot_counts_both_matrices_of_every_part_and_the_extra_vocabulary():
    q, k, hidden, wide, vocab = 64, 32, 64, 256, 1000
    linear = 3 * hidden + (q + 2 * k) + q + hidden + 2 * (hidden + wide) + wide + hidden
    embedding = (vocab + 256) + hidden
    head = hidden + 1280
    extra_rows = 3 * 256 * hidden
    expected = 2 * (8 * (linear + embedding + head) + extra_rows)
    assert slot_bytes(TINY, OLD, 8) == expected
    plain = replace(TINY, architecture="Qwen2ForCausalLM")
    assert slot_bytes(plain, OLD, [8, 16]).tolist() == [2 * 8 * linear, 2 * 16 * linear]


def test_newer_versions_reserve_no_extra_vocabulary():
    linear = slot_bytes(replace(TINY, architecture="Qwen2ForCausalLM"), NEW, 8)
    assert slot_bytes(TINY, NEW, 8) == linear + 2 * 8 * (1000 + 64 + 64 + 1000)


def test_attention_only_slots_hold_the_attention_matrices():
    plain = replace(TINY, architecture="Qwen2ForCausalLM")
    assert slot_bytes(plain, OLD, 1, "attention") == 2 * (3 * 64 + 128 + 64 + 64)
    assert slot_bytes(plain, OLD, 1, ("up_proj",)) == 2 * 2 * (64 + 256)


def test_a_server_without_lora_holds_the_weights_only():
    found = resident_memory(MODEL, OLD, np.array([0]), np.array([1]))
    # Besides the weights: the rotary table, and the rounding of each of 98 tensors to at most 1 MiB.
    table = MODEL.max_position_embeddings * MODEL.head_dim * 2
    assert 0 <= found.allocated_bytes - MODEL.weight_bytes - table < 98 * BYTES_PER_MIB
    assert found.reserved_bytes >= found.allocated_bytes


def test_every_byte_of_the_share_is_accounted_for():
    for behaviour, graphs in ((OLD, 0.0), (NEW, 1.6e9)):
        found = plan(behaviour=behaviour, max_loras=[0, 8, 64])
        spent = (
            found.weight_bytes + found.slot_bytes + found.activation_bytes + found.other_bytes + found.kv_cache_bytes
        )
        utilization = {OLD: 0.9, NEW: 0.9}[behaviour]
        np.testing.assert_allclose(spent + graphs, utilization * GPU.memory_bytes, rtol=1e-12)
        assert found.cuda_graph_bytes.tolist() == [1.6e9] * 3


def test_the_sampler_peaks_with_many_requests_and_the_forward_pass_with_few():
    found = plan(max_num_seqs=[8, 16, 1024, 2048])
    forward = 2048 * 3 * (8192 + 2048) * 2 + 250e6
    per_request = 14 * 128256 + 2 * 2048
    np.testing.assert_allclose(found.activation_bytes, [forward, forward, 1024 * per_request, 2048 * per_request])


def test_the_cache_holds_whole_blocks():
    found = plan(block_size=32)
    assert found.kv_cache_tokens == found.kv_cache_bytes // (32 * MODEL.kv_bytes_per_token) * 32


def test_a_server_is_refused_just_below_one_longest_request():
    # The longest sequence widens the table of blocks too, which takes some tokens from the cache.
    length = int(plan().kv_cache_tokens[0]) + np.arange(-20_000, 1000)
    found = plan(max_model_len=length)
    holds_one = found.kv_cache_tokens >= -(-length // 16) * 16
    assert holds_one[0]
    assert not holds_one[-1]
    np.testing.assert_array_equal(found.status, np.where(holds_one, Status.OK, Status.NO_KV_CACHE))
    np.testing.assert_array_equal(found.headroom_no_kv_cache_bytes >= 0, holds_one)


def test_slots_first_leave_no_cache_and_then_no_memory():
    found = plan(max_loras=np.arange(8, 1200, 8), max_lora_rank=64)
    order = [Status.OK, Status.NO_KV_CACHE, Status.OOM]
    changes = np.flatnonzero(np.diff(found.status)) + 1
    assert found.status[[0, *changes]].tolist() == order
    assert (found.headroom_oom_bytes < 0).tolist() == (found.status == Status.OOM).tolist()
    assert found.kv_cache_tokens[-1] == 0


def test_graphs_that_were_not_counted_do_not_fit_beside_a_full_share():
    assert plan(gpu_memory_utilization=[0.95, 0.97]).status.tolist() == [Status.OK, Status.OOM]
    assert plan(gpu_memory_utilization=0.97, behaviour=NEW).status == Status.OK


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_loras": [1, -1]}, "max_loras: -1.0 is not allowed; allowed: a whole number >= 0"),
        ({"max_lora_rank": 0}, "max_lora_rank"),
        ({"max_num_seqs": 1.5}, "max_num_seqs: 1.5"),
        ({"max_model_len": float("nan")}, "max_model_len: nan"),
        ({"gpu_memory_utilization": 90}, "gpu_memory_utilization: 90.0"),
        ({"target_modules": "mlp"}, "target_modules"),
    ],
)
def test_a_setting_out_of_range_is_told(change, words):
    with pytest.raises(InputError) as error:
        plan(**change)
    assert words in str(error.value)


def test_a_memory_model_survives_json():
    assert MemoryModel.from_json(MEMORY.to_json()) == MEMORY


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "memory: 'an empty list' is not allowed; allowed: a mapping with the keys other_bytes"),
        (MEMORY.to_json() | {"other_bites": 1}, "did you mean 'other_bytes'?"),
        ({"other_bytes": 1}, "memory.lora_kernel_bytes: missing"),
        (MEMORY.to_json() | {"other_bytes": -1}, "memory.other_bytes: -1"),
        (MEMORY.to_json() | {"other_bytes": "1 GB"}, "memory.other_bytes: '1 GB'"),
    ],
)
def test_a_bad_memory_model_is_told(content, words):
    with pytest.raises(InputError) as error:
        MemoryModel.from_json(content)
    assert words in str(error.value)


def made_up_rows(memory, kv_cache_tokens=None):
    slots = np.array([0, 0, 0, 0, 8, 16, 32, 64, 8, 64])
    seqs = np.array([8, 200, 1000, 2000, 256, 256, 2000, 2000, 8, 8])
    empty = np.full(slots.size, np.nan)
    rows = CapacityRows(
        slots, np.full_like(slots, 16), seqs, np.full_like(slots, 2048), empty, empty, slots, 0.9, 8192, OLD
    )
    tokens = plan_rows(MODEL, GPU, memory, rows).kv_cache_tokens if kv_cache_tokens is None else kv_cache_tokens
    return replace(rows, kv_cache_tokens=tokens.astype(float), status=np.zeros_like(slots))


def test_the_fit_finds_the_model_that_made_the_rows():
    truth = MemoryModel(900e6, 120e6, 18.0, 400e6, 100 * BYTES_PER_MIB)
    found, report = fit_memory(MODEL, GPU, made_up_rows(truth))
    for name, value in truth.to_json().items():
        assert getattr(found, name) == pytest.approx(value, rel=0.01), name
    assert report.started_rows == report.startup_right == 10
    # Half a block of 300,000 tokens.
    assert report.kv_max_error < 1e-4


def test_the_fit_shrugs_off_an_outlier_and_takes_the_recorded_graphs():
    rows = made_up_rows(MEMORY)
    tokens, graphs = rows.kv_cache_tokens.copy(), rows.cuda_graph_bytes.copy()
    tokens[4] *= 0.8
    graphs[:2] = 16 * 50e6
    found, _ = fit_memory(MODEL, GPU, replace(rows, kv_cache_tokens=tokens, cuda_graph_bytes=graphs))
    # Shared out by plain least squares, the 20 % of one row would move its like by several percent.
    assert score_memory(MODEL, GPU, found, rows).kv_max_error < 0.005
    assert found.cuda_graph_bytes_per_layer == 50e6


def test_no_coefficient_turns_negative():
    rows = made_up_rows(MEMORY)
    found, _ = fit_memory(MODEL, GPU, replace(rows, kv_cache_tokens=rows.kv_cache_tokens * 1.2))
    assert min(found.to_json().values()) >= 0


def test_a_fit_needs_a_started_server():
    rows = made_up_rows(MEMORY)
    with pytest.raises(InputError, match="at least one server that started"):
        fit_memory(MODEL, GPU, replace(rows, kv_cache_tokens=np.full(10, np.nan)))
