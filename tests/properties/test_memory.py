import bisect

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_capacity.engines import VllmBehaviour
from lora_capacity.hardware import Gpu
from lora_capacity.memory import MemoryModel, allocate, plan_memory, slot_bytes
from lora_capacity.models import ModelShape
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB, BYTES_PER_MIB

MODEL = ModelShape("model", 4, 2048, 8192, 32, 8, 64, 50000, True, False, 8192, "LlamaForCausalLM")
MEMORY = MemoryModel(700e6, 200e6, 14.0, 250e6, 100e6)
BEHAVIOURS = [VllmBehaviour.for_version(version) for version in ("0.8.5", "0.32.0")]

buffer_sizes = st.lists(st.integers(1, 40 * BYTES_PER_MIB), min_size=1, max_size=40)


def allocate_one_by_one(sizes):
    """The caching allocator as plainly as it can be said."""
    holes, small_free, allocated, reserved = [], 0, 0, 0
    for raw in sizes:
        size = -(-raw // 512) * 512
        if size <= BYTES_PER_MIB:
            if size > small_free:
                small_free, reserved = 2 * BYTES_PER_MIB, reserved + 2 * BYTES_PER_MIB
            small_free, allocated = small_free - size, allocated + size
            continue
        place = bisect.bisect_left(holes, size)
        if place < len(holes):
            piece = holes.pop(place)
        else:
            own = -(-size // (2 * BYTES_PER_MIB)) * 2 * BYTES_PER_MIB
            piece = 20 * BYTES_PER_MIB if size < 10 * BYTES_PER_MIB else own
            reserved += piece
        if piece - size > BYTES_PER_MIB:
            bisect.insort(holes, piece - size)
            piece = size
        allocated += piece
    return allocated, reserved


# At most 30 buffers leave at most 30 holes, all of which are remembered.
@given(st.lists(buffer_sizes.map(lambda sizes: sizes[:30]), min_size=1, max_size=4))
def test_many_configurations_at_once_are_the_plain_allocator_for_each(configs):
    longest = max(map(len, configs))
    padded = np.array([sizes + [0] * (longest - len(sizes)) for sizes in configs])
    found = allocate(list(padded.T))
    expected = [allocate_one_by_one(sizes) for sizes in configs]
    assert list(zip(found.allocated_bytes.tolist(), found.reserved_bytes.tolist(), strict=True)) == expected


@given(buffer_sizes)
def test_reserved_covers_allocated_covers_the_buffers(sizes):
    found = allocate([np.array([size]) for size in sizes])
    assert found.reserved_bytes >= found.allocated_bytes >= sum(sizes)


settings = st.fixed_dictionaries(
    {
        "behaviour": st.sampled_from(BEHAVIOURS),
        "max_loras": st.integers(0, 600),
        "max_lora_rank": st.sampled_from([8, 16, 64]),
        "max_num_seqs": st.integers(1, 2048),
        "max_num_batched_tokens": st.integers(1, 16384),
        "gpu_memory_utilization": st.floats(0.3, 1.0),
        "max_model_len": st.integers(1, 200_000),
        "target_modules": st.sampled_from(["all-linear", "attention", ("down_proj",)]),
        "block_size": st.sampled_from([1, 16, 32]),
    }
)


@given(settings, st.integers(4, 64))
def test_status_follows_the_headrooms(given_settings, memory_gib):
    found = plan_memory(MODEL, Gpu("gpu", memory_gib * BYTES_PER_GIB), MEMORY, **given_settings)
    if found.headroom_oom_bytes < 0:
        expected = Status.OOM
    else:
        expected = Status.NO_KV_CACHE if found.headroom_no_kv_cache_bytes < 0 else Status.OK
    assert found.status == expected
    if expected == Status.OK:
        assert found.kv_cache_tokens >= given_settings["max_model_len"]


@given(settings, st.integers(4, 64))
def test_the_cache_fits_its_bytes(given_settings, memory_gib):
    found = plan_memory(MODEL, Gpu("gpu", memory_gib * BYTES_PER_GIB), MEMORY, **given_settings)
    block = given_settings["block_size"]
    assert found.kv_cache_tokens % block == 0
    left = found.kv_cache_bytes - found.kv_cache_tokens * MODEL.kv_bytes_per_token
    assert found.kv_cache_tokens == 0 or 0 <= left < block * MODEL.kv_bytes_per_token


@given(settings)
def test_more_of_anything_leaves_less_cache(given_settings):
    gpu = Gpu("gpu", 64 * BYTES_PER_GIB)

    def left_bytes(**settings):
        """What is left for the cache but for the steps in which the allocator hands out slots."""
        found = plan_memory(MODEL, gpu, MEMORY, **settings)
        slot = slot_bytes(MODEL, settings["behaviour"], settings["max_lora_rank"], settings["target_modules"])
        return found.kv_cache_bytes + found.slot_bytes - settings["max_loras"] * slot

    base = left_bytes(**given_settings)
    for name in ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        more = given_settings | {name: given_settings[name] * 2 + 1}
        assert left_bytes(**more) <= base


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from([8, 32]), st.integers(1, 1024)), min_size=1, max_size=6))
def test_a_batch_of_configurations_is_each_of_them(configs):
    gpu = Gpu("gpu", 64 * BYTES_PER_GIB)

    def plan(slots, rank, seqs):
        return plan_memory(
            MODEL,
            gpu,
            MEMORY,
            behaviour=BEHAVIOURS[0],
            max_loras=slots,
            max_lora_rank=rank,
            max_num_seqs=seqs,
            max_num_batched_tokens=2048,
            gpu_memory_utilization=0.9,
            max_model_len=8192,
        )

    together = plan(*map(list, zip(*configs, strict=True)))
    alone = [plan(*config) for config in configs]
    for name in ("kv_cache_tokens", "kv_cache_bytes", "slot_bytes", "activation_bytes", "status"):
        assert getattr(together, name).tolist() == [getattr(one, name).item() for one in alone]
