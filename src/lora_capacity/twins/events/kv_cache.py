"""The KV cache: its blocks are counted here and nowhere else.

A decoding request gains a token a step, so that it needs a block every ``block_size`` steps, always in the same *phase*
(step modulo ``block_size``). How many requests have each phase is enough to know what a step needs.

Source: ``allocate_slots`` and ``free`` in ``vllm/v1/core/kv_cache_manager.py``, vLLM 0.8.5.
"""

from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from lora_capacity.twins.events.arrays import indices

BLOCK_SIZE = 16
"""Tokens of a KV block unless said otherwise: vLLM's default on GPUs (``CacheConfig.block_size``)."""

Blocks = TypeVar("Blocks", Array, np.ndarray)


class KvCache(NamedTuple):
    """The KV cache of one server.

    Attributes:
        free: Free blocks.
        tokens: Tokens held once the step being put together has run.
        phase: Decoding requests that need a block, by step modulo the tokens of a block, ``[block_size]``.
    """

    free: Int[Array, ""]
    tokens: Int[Array, ""]
    phase: Int[Array, " block_size"]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.phase.shape[0]

    def blocks(self, tokens: Array) -> Array:
        """Return the blocks that hold so many tokens."""
        return blocks_of(tokens, self.block_size)

    def phase_of(self, step: Array) -> Array:
        """Return a step modulo the tokens of a block, >= 0."""
        size = self.block_size
        return step & (size - 1) if size & (size - 1) == 0 else jnp.remainder(step, size)

    def of_decoding(self, step: Array) -> Array:
        """Return the blocks that the decoding requests need in a step."""
        return self.phase[self.phase_of(step)]

    def joined(
        self, sign: Array, begin: Array, computed: Array, finish: Array
    ) -> tuple["KvCache", Int[Array, ""], Int[Array, ""]]:
        """Let a request begin to decode, or stop early.

        Args:
            sign: 1 if it begins, -1 if it stops, else 0.
            begin: First step that gives it a token, or would have.
            computed: Tokens that it has in the cache before that.
            finish: Step of its last token.

        Returns:
            The cache; the step in which it gets its last block; and how many requests to count or discount there.
        """
        phase = self.phase_of(begin - computed)
        last_block = finish - self.phase_of(finish - phase)
        grows = jnp.where(last_block >= begin, sign, 0)
        counted = self.phase + jnp.where(indices(self.phase) == phase, grows, 0)
        return self._replace(phase=counted), last_block, grows

    def stepped(self, step: Array, freed: Array, last_block: Array, left_tokens: Array) -> "KvCache":
        """Let a step run.

        Args:
            step: Its number.
            freed: Blocks that come back.
            last_block: Requests that got their last block in it, and are not counted any more.
            left_tokens: Tokens in the cache of those that leave.
        """
        here = indices(self.phase) == self.phase_of(step)
        return KvCache(
            free=self.free + freed, tokens=self.tokens - left_tokens, phase=self.phase - jnp.where(here, last_block, 0)
        )


def blocks_of(tokens: Array, block_size: int) -> Array:
    """Return the blocks that hold so many tokens, tokens >= 0."""
    if block_size & (block_size - 1) == 0:
        return (tokens + (block_size - 1)) >> (block_size.bit_length() - 1)
    return (tokens + (block_size - 1)) // block_size


def usable_blocks(kv_cache_tokens: Blocks, block_size: int | Blocks) -> Blocks:
    """Return the blocks that requests can have: vLLM keeps one for itself, to point at where nothing is."""
    return kv_cache_tokens // block_size - 1
