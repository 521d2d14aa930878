"""Prefix caching: which blocks of each adapter's shared prefix the KV cache holds, and of the requests preempted.

A free block can be found again until it is taken, and free blocks are taken in the order in which they were freed. So
each gets a *place* as it is freed, one more than the block before it, and is still there as long as no fewer blocks are
free than stand behind it. One that is found leaves a gap, which is closed: whatever stands in front moves up by one.
Nothing has to be known of blocks that nobody will look for; ``front`` of them stand in front of all places.

The requests of an adapter share the first blocks of a prefix, the blocks of a request are freed last block first, and
only a request that finds or computes a block holds it; so of a prefix there are always the first blocks, those in use
in front of those that are free.

Source: ``get_computed_blocks`` and ``allocate_slots`` in ``vllm/v1/core/kv_cache_manager.py``, ``free_blocks`` in
``vllm/v1/core/block_pool.py``, vLLM 0.8.5 to 0.33.
"""

from typing import Any

from lora_capacity.twins.compiled.jit import compiled
from lora_capacity.twins.compiled.state import Server


@compiled
def look_up(s: Server, adapter: int, shared: int, entry: int) -> tuple[int, int, int]:
    """Find the blocks that hold the first tokens of a waiting request.

    Args:
        s: The server.
        adapter: The request's adapter.
        shared: Blocks at its start that are those of its adapter's prefix.
        entry: Its entry if it was preempted, else -1.

    Returns:
        Blocks of the prefix; those of them that are free; its own blocks, all free.
    """
    n = s.numbers[0]
    first = n.appended + n.front - n.free
    found, free, own = 0, 0, 0
    for block in range(shared):
        if s.blocks[adapter, block].users > 0:
            found += 1
        elif s.blocks[adapter, block].place >= first:
            found += 1
            free += 1
    if entry >= 0:
        e = s.entries[entry]
        own = min(max(e.own_place - first + 1, 0), e.own_number)
    return found, free, own


@compiled
def close_gaps(s: Server, adapter: int, found: int, free: int, own: int, entry: int) -> None:
    """Let an admitted request take found blocks out of the free ones; blocks in a row leave one gap."""
    row, at = s.blocks[adapter], found - free
    while at < found:
        begin, end = row[at].place, at + 1
        while end < found and row[end].place == begin - (end - at):
            end += 1
        _close(s, begin - (end - at) + 1, end - at)
        at = end
    if own > 0:
        _close(s, s.entries[entry].own_place - own + 1, own)


@compiled
def _close(s: Server, in_front: int, gap: int) -> None:
    """Move up whatever stands in front of a gap."""
    for i in range(s.blocks.shape[0]):
        for j in range(s.blocks.shape[1]):
            block = s.blocks[i, j]
            block.place += gap * (block.place < in_front)
    for i in range(s.numbers[0].preempted):
        e = s.entries[s.entries[i].queued]
        e.own_place += gap * (e.own_place < in_front)


@compiled
def hold(s: Server, adapter: int, begin: Any, end: int) -> None:
    """Let one more request hold blocks of a prefix."""
    for block in range(begin, end):
        s.blocks[adapter, block].users += 1


@compiled
def take(s: Server, blocks: int) -> None:
    """Let requests take free blocks, those in front first."""
    n = s.numbers[0]
    n.free -= blocks
    n.front = max(n.front - blocks, 0)


@compiled
def give_back(s: Server, entry: int, full: int, blocks: int) -> None:
    """Let a request hold its blocks no more; if it was preempted, it will look for its own.

    Args:
        s: The server.
        entry: The request.
        full: Those of its blocks that are full.
        blocks: All of them.
    """
    n, e = s.numbers[0], s.entries[entry]
    shared = min(e.shared, full)
    uncached, others = blocks - full, full - shared
    behind = n.appended + others + (0 if n.uncached_blocks_first else uncached)
    count = 0
    for block in range(shared):
        b = s.blocks[e.adapter, block]
        b.users -= 1
        if b.users == 0:
            b.place = behind + shared - 1 - block
            count += 1
    e.own_place, e.own_number = behind - 1, others
    n.appended = behind + count
    n.front += uncached if n.uncached_blocks_first else 0
    n.free += blocks - shared + count
