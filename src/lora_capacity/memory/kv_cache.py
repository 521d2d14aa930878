"""How vLLM shares the KV cache out among layers that keep different things of a sequence."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lora_capacity.engines import VllmBehaviour
from lora_capacity.models import KvLayers, ModelShard

_STATE_BLOCK_TOKENS = 16
"""Tokens that blocks of attention are a multiple of beside layers with a state (``HybridAttentionMambaModelConfig`` in
``model_executor/models/config.py`` of 0.11.0)."""

_MOST_PADDING = 1.5
"""Up to this ratio of the most to the fewest layers of a kind, the smaller group is padded to the larger
(``_get_kv_cache_groups_uniform_page_size`` in ``v1/core/kv_cache_utils.py`` of 0.32.0)."""


@dataclass(frozen=True)
class KvGroup:
    """Groups of layers that share a table of blocks.

    Attributes:
        kind: As in `KvLayers`.
        tables: Tables of blocks.
        block_tokens: Tokens of a block.
        window: Tokens that are kept, where there is a window.
    """

    kind: str
    tables: int
    block_tokens: int
    window: int = 0


@dataclass(frozen=True)
class KvCacheLayout:
    """How a GPU's KV cache is cut into blocks.

    Attributes:
        groups: Groups of layers, which all draw on one pool of blocks.
        block_bytes: Bytes of a block of the pool.
        by_concurrency: Whether the tokens are counted by requests of ``max_model_len``.
    """

    groups: tuple[KvGroup, ...]
    block_bytes: int
    by_concurrency: bool

    @property
    def _counts_every_token(self) -> bool:
        return len(self.groups) == 1 and self.groups[0].tables == 1 and self.groups[0].kind in ("full", "latent")

    def request_blocks(
        self, max_model_len: Int[np.ndarray, " configs"], step_tokens: Int[np.ndarray, " configs"]
    ) -> Int[np.ndarray, " configs"]:
        """Return the blocks that one request of ``max_model_len`` takes.

        Source: ``max_memory_usage_bytes`` of the specs in vLLM 0.32.0, ``v1/kv_cache_interface.py``.
        """
        blocks = np.zeros(max_model_len.shape, np.int64)
        for group in self.groups:
            if group.kind == "state":
                blocks += group.tables
                continue
            tokens, beside = max_model_len, 0
            if group.window:
                # While a step is computed its tokens are kept besides the window, which begins anywhere in a block.
                tokens, beside = np.minimum(group.window - 1 + step_tokens, max_model_len), 1
            blocks += group.tables * (-(-tokens // group.block_tokens) + beside)
        return blocks

    def bytes_per_token(
        self, max_model_len: Int[np.ndarray, " configs"], step_tokens: Int[np.ndarray, " configs"]
    ) -> Float[np.ndarray, " configs"]:
        """Return the bytes of a token; where layers keep only a part of a sequence, of one of ``max_model_len``."""
        if self._counts_every_token:
            return np.full(max_model_len.shape, self.block_bytes / self.groups[0].block_tokens)
        return np.asarray(self.request_blocks(max_model_len, step_tokens) * self.block_bytes / max_model_len)

    def tokens(
        self,
        pool_bytes: Float[np.ndarray, " configs"],
        max_model_len: Int[np.ndarray, " configs"],
        step_tokens: Int[np.ndarray, " configs"],
    ) -> Int[np.ndarray, " configs"]:
        """Return the tokens that vLLM says the cache holds; 0 where nothing is left."""
        blocks = np.maximum(pool_bytes // self.block_bytes, 0).astype(np.int64)
        if self._counts_every_token:
            return np.asarray(blocks * self.groups[0].block_tokens, np.int64)
        if self.by_concurrency:
            return np.asarray(blocks * max_model_len // self.request_blocks(max_model_len, step_tokens), np.int64)
        tables = sum(group.tables for group in self.groups)
        return np.asarray(blocks // tables * min(group.block_tokens for group in self.groups), np.int64)


def kv_cache_layout(shard: ModelShard, behaviour: VllmBehaviour, element_bytes: int, block_size: int) -> KvCacheLayout:
    """Return how vLLM cuts the KV cache of a GPU into blocks.

    Layers that keep the same form one group. Those that keep every token, if in different sizes, form one too. Others
    are dealt into groups of as many layers as the rarest kind has, all with blocks of the same bytes: a kind that keeps
    less of a token has more tokens to a block, and beside a state the attention's blocks are as large as the state.

    Args:
        shard: What the GPU holds of the model.
        behaviour: The vLLM version.
        element_bytes: Bytes of a cached element.
        block_size: Tokens of a block, where the layers keep the same.

    Source: ``get_kv_cache_groups`` in vLLM 0.32.0, ``v1/core/kv_cache_utils.py``; ``unify_hybrid_kv_cache_specs`` there
    for versions without groups.
    """
    layers = shard.kv_layers
    kinds = {each.kind for each in layers}
    if len(layers) > 1 and "sliding" in kinds and not behaviour.hybrid_kv_cache:
        layers = tuple(each._replace(kind="full", window=0) if each.kind == "sliding" else each for each in layers)
        kinds = {each.kind for each in layers}
    by_concurrency = behaviour.logs_kv_tokens_as_concurrency
    if len(layers) == 1 or kinds <= {"full", "latent"}:
        group = KvGroup(layers[0].kind, 1, block_size, layers[0].window)
        pages = [each.state_bytes or each.token_elements * element_bytes * block_size for each in layers]
        block_bytes = sum(each.layers * page for each, page in zip(layers, pages, strict=True))
        return KvCacheLayout((group,), block_bytes, by_concurrency)
    token_bytes = max(each.token_elements for each in layers) * element_bytes
    state_bytes = max(each.state_bytes for each in layers)
    if state_bytes:
        step = _STATE_BLOCK_TOKENS * token_bytes
        block_size = max(block_size, -(-state_bytes // step) * _STATE_BLOCK_TOKENS)
    page = token_bytes * block_size
    most, fewest = max(each.layers for each in layers), min(each.layers for each in layers)
    per_table = most if most < _MOST_PADDING * fewest else fewest
    groups = tuple(_group(each, page, per_table, element_bytes, block_size) for each in layers)
    return KvCacheLayout(groups, page * per_table, by_concurrency)


def _group(layers: KvLayers, page: int, per_table: int, element_bytes: int, block_size: int) -> KvGroup:
    tables = -(-layers.layers // per_table)
    if layers.kind == "state":
        return KvGroup("state", tables, block_size)
    own_page = layers.token_elements * element_bytes * block_size
    # A page that does not fit in evenly is padded.
    tokens = block_size * (page // own_page) if page % own_page == 0 else block_size
    return KvGroup(layers.kind, tables, tokens, layers.window)
