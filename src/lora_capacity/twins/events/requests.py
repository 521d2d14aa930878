"""The requests of many servers as tables of one shape."""

from dataclasses import field

from flax import struct
from jax import Array

from lora_capacity.twins.events.state import FAR

TICKS = FAR
"""Ticks of a horizon; an hour's are of 3.4 µs. Durations are rounded to them, without bias."""


@struct.dataclass
class RequestTables:
    """The requests of each configuration in order of arrival, and its adapters in order of touching.

    Attributes:
        arrival: Arrival in ticks of the configuration's horizon, int32 ``[configs, requests]``.
        table: Adapter, prompt tokens, output tokens, ``[configs, requests, 3]``; int16 if that holds them, else int32.
        following: Next request of the same adapter, int32 ``[configs, requests]``.
        head: First request of each adapter, the base model last, int32 ``[configs, adapters + 1]``.
        rank: Rank of each adapter, ``[configs, adapters]``; padding has 0.
        class_of: Class of each adapter in the scenarios, int32 ``[configs, adapters]``; padding has -1.
        arrived: Requests of each adapter, int32 ``[configs, adapters]``.
        longest_output: Longest output of all, tokens; fixes the size of arrays.
        shared_blocks: Whole blocks at the start of each prompt that are those of its adapter's shared prefix, int32
            ``[configs, requests]``; at most all but the one that holds its last token. None: no prefix caching.
        cached_tokens: Tokens of each prompt that need not be computed whatever the KV cache holds, int32
            ``[configs, requests]``; None: of none.
        longest_prefix: Most shared blocks of all; fixes the size of arrays.
    """

    arrival: Array
    table: Array
    following: Array
    head: Array
    rank: Array
    class_of: Array
    arrived: Array
    longest_output: int = field(metadata={"pytree_node": False})
    shared_blocks: Array | None = None
    cached_tokens: Array | None = None
    longest_prefix: int = field(default=0, metadata={"pytree_node": False})
