import dataclasses

import numpy as np
import pytest

from lora_capacity.engines import ServerConfig, VllmBehaviour
from lora_capacity.hardware import Gpu
from lora_capacity.memory import Deployment, MemoryModel, MemoryQuestion, most_slots, remedies
from lora_capacity.models import find_shape
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB

SHAPE = find_shape("Qwen2.5-1.5B-Instruct")
GPU = Gpu("gpu", 12 * BYTES_PER_GIB)
BEHAVIOUR = VllmBehaviour.for_version("0.33.0")
SERVER = ServerConfig.with_defaults(BEHAVIOUR, GPU, SHAPE, max_loras=4, max_lora_rank=64, max_model_len=8192)
MEMORY = MemoryModel(700e6, 200e6, 14.0, 250e6, 30e6)
QUESTION = MemoryQuestion(SHAPE, GPU, MEMORY, SERVER, Deployment())


@pytest.mark.parametrize("memory_gib", [6, 12, 24])
def test_the_most_slots_are_those_that_a_look_at_all_finds(memory_gib):
    question = dataclasses.replace(QUESTION, gpu=Gpu("gpu", memory_gib * BYTES_PER_GIB))
    ranks = (8, 64, 256)
    [found] = most_slots([question.plan], ranks, [question.slot_bytes(rank) for rank in ranks])
    for rank, most in zip(ranks, found, strict=True):
        slots = np.arange(1, 2 * most + 20)
        status = question.plan({"max_loras": slots, "max_lora_rank": np.full(slots.size, rank)}).status
        starting = slots[status == Status.OK]
        assert most == (starting.max() if starting.size else 0)


def test_remedies_name_the_mildest_value_that_starts_and_what_it_brings():
    question = dataclasses.replace(QUESTION, gpu=Gpu("gpu", 5 * BYTES_PER_GIB))
    before = question.plan()
    assert before.status[0] != Status.OK
    found = {each.flag: each for each in remedies(question.plan, question.changeable)}
    assert {"max_loras", "max_lora_rank", "max_model_len", "gpu_memory_utilization", "enforce_eager"} <= set(found)
    for flag, remedy in found.items():
        after = question.plan({flag: remedy.value})
        gained = after.headroom_no_kv_cache_bytes[0] - before.headroom_no_kv_cache_bytes[0]
        assert remedy.room_bytes == gained
        assert remedy.starts == (after.status[0] == Status.OK)
    assert [each.starts for each in remedies(question.plan, question.changeable)] == sorted(
        (each.starts for each in found.values()), reverse=True
    )
    assert remedies(question.plan, {}) == []
