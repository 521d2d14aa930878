"""How many slots have room, and what makes room for more: the same questions of whatever plans the memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lora_capacity.memory.plan import MemoryPlan
from lora_capacity.status import Status

Plan = Callable[[Mapping[str, Any]], MemoryPlan]
"""Plans the memory of servers that differ from the one at hand in some settings, by vLLM's names."""

_SEARCHED = 24
"""Numbers of slots that are tried at once: a search of a thousand slots takes two rounds."""

_LIKELY = 0.6
"""Share of the slots by their tensors alone from which on the most slots are looked for first: the allocator rounds
hardly any slot up by more."""

_STEPS = 16
"""Parts of a setting in which it is lowered."""

_MOST_UTILIZATION = 0.98
"""Highest ``gpu_memory_utilization`` that is advised: what is left is taken by the driver and by other processes."""


@dataclass(frozen=True)
class Remedy:
    """A setting that makes room.

    Attributes:
        flag: Its name.
        value: Its value.
        room_bytes: How much more the KV cache of a GPU holds beyond one request of ``max_model_len``.
        kv_cache_tokens: Tokens that the KV cache then holds.
        starts: Whether the server then starts.
    """

    flag: str
    value: Any
    room_bytes: float
    kv_cache_tokens: int
    starts: bool


def most_slots(plans: Sequence[Plan], ranks: Sequence[int], slot_bytes: Sequence[float]) -> list[list[int]]:
    """Return the most slots with which a server starts, by plan and rank; 0 where one does not.

    Args:
        plans: Each plans the memory of the same servers with other ``max_loras`` and ``max_lora_rank``, under other
            assumptions of what is uncertain.
        ranks: Values of ``max_lora_rank``.
        slot_bytes: About the bytes of a slot of each rank on a GPU.
    """
    rank = np.asarray(ranks, np.int64)
    low = _starts(plans, rank, np.ones((1, len(plans), rank.size), np.int64))[0].astype(np.int64)
    # Slots come off what is left without them, and hardly ever take less than their tensors.
    bare = [plan({"max_loras": np.zeros_like(rank), "max_lora_rank": rank}) for plan in plans]
    spare = np.maximum(np.stack([each.headroom_no_kv_cache_bytes for each in bare]), 0)
    high = np.where(low > 0, 2 + spare // np.asarray(slot_bytes), 1).astype(np.int64)
    tried = np.concatenate([low[None], np.linspace(_LIKELY * high, high, _SEARCHED - 1).astype(np.int64)])
    while (high - low > 1).any():
        tried = np.maximum(tried, low)
        starts = _starts(plans, rank, tried) | (tried == low)
        starts[-1] = False  # too many by their tensors alone, or found so before
        # Memory is a stepped function of slots: beyond some that do not start more may.
        last = _SEARCHED - 1 - starts[::-1].argmax(axis=0)[None]
        low, high = np.take_along_axis(tried, last, 0)[0], np.take_along_axis(tried, last + 1, 0)[0]
        tried = np.linspace(low, high, _SEARCHED, dtype=np.int64)
    found: list[list[int]] = low.tolist()
    return found


def _starts(
    plans: Sequence[Plan], rank: Int[np.ndarray, " ranks"], slots: Int[np.ndarray, "tried plans ranks"]
) -> Bool[np.ndarray, "tried plans ranks"]:
    """Return whether servers of so many slots start, each by its plan."""
    pairs = {"max_loras": np.maximum(slots, 1), "max_lora_rank": np.broadcast_to(rank, slots.shape)}
    plans[0]({name: each.ravel() for name, each in pairs.items()})  # replays the allocation of all at once
    found = [
        plan({name: each[:, place].ravel() for name, each in pairs.items()}).status.reshape(len(slots), -1)
        for place, plan in enumerate(plans)
    ]
    return np.asarray(np.stack(found, axis=1) == Status.OK)


def remedies(plan: Plan, given: Mapping[str, Any]) -> list[Remedy]:
    """Return what makes room, one value of each setting, those first with which the server starts.

    The value is the mildest with which it starts; where there is none the most drastic one, which tells how much it
    brings.

    Args:
        plan: Plans the memory with other settings.
        given: The numbers that may be changed, by vLLM's names, with their values; ``max_lora_ranks`` are the allowed
            ranks, ``choices`` other settings with a value that takes less. What is not given is let be.
    """
    now = plan({})
    starts_now, room_now = int(now.status[0]) == Status.OK, float(now.headroom_no_kv_cache_bytes[0])
    found = []
    for flag, values in _candidates(given):
        if isinstance(values, np.ndarray):
            tried = plan({flag: values})
            plans = [(value, tried, place) for place, value in enumerate(values.tolist())]
        else:
            plans = [(value, plan({flag: value}), 0) for value in values]
        each = [
            Remedy(
                flag,
                value,
                float(tried.headroom_no_kv_cache_bytes[place]) - room_now,
                int(tried.kv_cache_tokens[place]),
                int(tried.status[place]) == Status.OK,
            )
            for value, tried, place in plans
        ]
        helping = [remedy for remedy in each if remedy.room_bytes > 0 or (remedy.starts and not starts_now)]
        if helping:
            starting = [remedy for remedy in helping if remedy.starts]
            found.append(helping[0] if starts_now else (starting or helping[-1:])[0])
    return sorted(found, key=lambda remedy: (not remedy.starts, -remedy.room_bytes))


def _candidates(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield values of each setting that take less memory than the one given, the mildest first."""
    slots, utilization = given.get("max_loras", 0), given.get("gpu_memory_utilization", 1.0)
    ranks = [rank for rank in given.get("max_lora_ranks", ()) if rank < given.get("max_lora_rank", 0)]
    hundredths = np.arange(round(100 * utilization) + 1, round(100 * _MOST_UTILIZATION) + 1)
    lowered = np.arange(_STEPS - 1, 0, -1)
    numbers = {
        "max_loras": np.linspace(slots - 1, 1, min(_SEARCHED, max(slots - 1, 0)), dtype=np.int64),
        "max_lora_rank": np.array(ranks[::-1], np.int64),
        "gpu_memory_utilization": hundredths / 100,
        "max_model_len": given.get("max_model_len", 0) * lowered // _STEPS,
        "max_num_batched_tokens": given.get("max_num_batched_tokens", 0) * lowered // _STEPS,
        "max_num_seqs": given.get("max_num_seqs", 0) * lowered // _STEPS,
    }
    # vLLM takes no fewer tokens in a step than requests.
    least = {"max_num_batched_tokens": given.get("max_num_seqs", 1)}
    for flag, values in numbers.items():
        allowed = values[values >= least.get(flag, 0.01)]
        if allowed.size:
            yield flag, allowed
    yield from ((flag, [value]) for flag, value in given.get("choices", {}).items())
