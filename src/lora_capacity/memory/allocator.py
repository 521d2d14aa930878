"""What PyTorch's caching allocator sets aside for buffers that are allocated once and kept."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from lora_capacity.units import BYTES_PER_MIB

# As in ``c10/cuda/CUDACachingAllocator``: kMinBlockSize, kSmallSize, kSmallBuffer, kMinLargeAlloc, kLargeBuffer and
# kRoundLarge.
_ROUND_BYTES = 512
_SMALL_BYTES = 1 * BYTES_PER_MIB
_SMALL_SEGMENT_BYTES = 2 * BYTES_PER_MIB
_MEDIUM_BYTES = 10 * BYTES_PER_MIB
_MEDIUM_SEGMENT_BYTES = 20 * BYTES_PER_MIB
_LARGE_ROUND_BYTES = 2 * BYTES_PER_MIB
# Free pieces remembered per configuration. The smallest are forgotten first: hardly any later buffer fits into them.
_MAX_HOLES = 32


@dataclass(frozen=True)
class AllocatedMemory:
    """Memory that a sequence of buffers takes.

    Attributes:
        allocated_bytes: Bytes of the pieces handed out, ``[configs]``; what vLLM logs as the model's size.
        reserved_bytes: Bytes of the segments taken from the GPU, ``[configs]``; no longer free for anything else.
    """

    allocated_bytes: NDArray[np.int64]
    reserved_bytes: NDArray[np.int64]


def allocate(buffers: list[Int[np.ndarray, "..."]]) -> AllocatedMemory:
    """Replay the allocation of buffers that are all kept.

    A buffer of up to 1 MiB comes from 2 MiB segments, one below 10 MiB from a 20 MiB segment, a larger one gets a
    segment of its own, rounded up to 2 MiB. Above 1 MiB the smallest free piece that fits is used; what is left of a
    piece stays free only if it is larger than 1 MiB, and belongs to the buffer otherwise. That makes memory a stepped
    function of buffer sizes: 7 MiB buffers, two to a 20 MiB segment, waste 30 %.

    Args:
        buffers: Sizes in bytes in order of allocation, one array ``[configs]`` per buffer; a size of 0 is no buffer.

    Returns:
        What the buffers take, per configuration.

    Valid for: buffers that live as long as the server; others that come and go in between may move the gaps.

    Source: PyTorch, ``c10/cuda/CUDACachingAllocator.cpp`` (``get_allocation_size``, ``should_split``), defaults.
    """
    configs = np.broadcast_shapes(*(size.shape for size in buffers))
    count = math.prod(configs)
    holes, rows = np.zeros((count, _MAX_HOLES), np.int64), np.arange(count)
    small_free, small_reserved, small_allocated, allocated, reserved = np.zeros((5, count), np.int64)
    for raw in buffers:
        size = np.broadcast_to(-(-raw // _ROUND_BYTES) * _ROUND_BYTES, configs).reshape(-1)
        is_small = size <= _SMALL_BYTES
        if is_small.any():
            small = np.where(is_small, size, 0)
            opens = small > small_free
            small_free = np.where(opens, _SMALL_SEGMENT_BYTES, small_free) - small
            small_reserved += opens * _SMALL_SEGMENT_BYTES
            small_allocated += small
        if not is_small.all():
            taken, opened = _take(np.where(is_small, 0, size), holes, rows)
            allocated += taken
            reserved += opened
    return AllocatedMemory((allocated + small_allocated).reshape(configs), (reserved + small_reserved).reshape(configs))


def _take(
    size: Int[np.ndarray, " configs"], holes: Int[np.ndarray, "configs holes"], rows: Int[np.ndarray, " configs"]
) -> tuple[Int[np.ndarray, " configs"], Int[np.ndarray, " configs"]]:
    """Place one buffer above 1 MiB (or none, where 0) per configuration; updates ``holes`` in place.

    Args:
        size: Bytes of the buffer.
        holes: Free pieces.
        rows: The number of each configuration.

    Returns:
        Bytes handed out and bytes newly taken from the GPU, each ``[configs]``.
    """
    own_segment = -(-size // _LARGE_ROUND_BYTES) * _LARGE_ROUND_BYTES
    segment = np.where(size < _MEDIUM_BYTES, _MEDIUM_SEGMENT_BYTES, own_segment)
    best = np.where(holes >= size[:, None], holes, np.iinfo(np.int64).max).argmin(axis=1)
    hole = holes[rows, best]
    reuses = hole >= size
    piece = np.where(reuses, hole, segment)
    remainder = np.where(piece - size > _SMALL_BYTES, piece - size, 0)
    # The remainder takes the place of the hole used up, or else of the smallest hole, if it is larger than that one.
    place = np.where(reuses, best, holes.argmin(axis=1))
    old = holes[rows, place]
    kept = np.where(reuses, remainder, np.maximum(remainder, old))
    placed = size > 0
    holes[rows, place] = np.where(placed, kept, old)
    return np.where(placed, piece - remainder, 0), np.where(placed & ~reuses, segment, 0)
