"""One server as the event twin sees it: limits as whole numbers, costs, and the requests that it gets."""

from dataclasses import field

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from lora_capacity.costs import Costs, step_time_s
from lora_capacity.engines import SchedulerRules
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.twins.events.kv_cache import usable_blocks
from lora_capacity.twins.events.requests import TICKS, RequestTables
from lora_capacity.twins.events.state import FAR, TRACED_ONE_IN, TRACED_WANTED, Flag, Number, Seconds, State


@struct.dataclass
class Server:
    """What does not change while a server runs; int32 scalars unless said otherwise.

    Attributes:
        costs: What steps and loads cost.
        requests: The requests, one server's part of the tables.
        adapters: Adapters served.
        disk_s: Time to read each adapter from disk, s, float32 ``[adapters]``.
        max_num_batched_tokens: Most tokens of a step.
        max_num_seqs: Most running requests.
        kv_blocks: KV blocks that requests can have.
        watermark_blocks: Those of them that an admission leaves free unless nothing runs; None: none.
        max_loras: Adapter slots.
        max_lora_rank: Rank that they are reserved for.
        max_pending: Most in-flight requests of all clients.
        warmup: Ticks at the beginning that means and counts leave out.
        horizon: Ticks observed.
        max_ttft_s: Longest time to first token that is good, s, float32, as the next two.
        max_tpot_s: Longest mean time per further token.
        max_e2el_s: Longest time to the last token.
        traced_one_in: Of how many requests one is traced.
        tick_s: Seconds of a tick, float32.
        rules: What the scheduler of this vLLM version does; static.
    """

    costs: Costs
    requests: RequestTables
    adapters: Array
    disk_s: Array
    max_num_batched_tokens: Array
    max_num_seqs: Array
    kv_blocks: Array
    watermark_blocks: Array | None
    max_loras: Array
    max_lora_rank: Array
    max_pending: Array
    warmup: Array
    horizon: Array
    max_ttft_s: Array
    max_tpot_s: Array
    max_e2el_s: Array
    traced_one_in: Array
    tick_s: Array
    rules: SchedulerRules = field(metadata={"pytree_node": False})

    @property
    def crowded(self) -> Flag:
        """Whether there are more adapters than slots."""
        return self.adapters > self.max_loras

    def ticks(self, seconds: Array) -> Array:
        """Return seconds in whole ticks."""
        return jnp.round(seconds / self.tick_s).astype(jnp.int32)


def build_server(
    costs: Costs,
    scenario: Scenarios,
    requests: RequestTables,
    *,
    rules: SchedulerRules,
    block_size: int,
    warmup_s: ArrayLike = 0.0,
) -> Server:
    """Return one configuration as a server; ``scenario`` and ``requests`` without their axis of configurations."""

    def whole(value: Array) -> Number:
        return jnp.minimum(value, FAR).astype(jnp.int32)

    bounds = scenario.bounds
    unbounded = jnp.asarray(jnp.inf, jnp.float32)
    arriving = requests.arrived.sum() + scenario.base_rate_per_s * scenario.horizon_s
    return Server(
        costs=costs,
        requests=requests,
        adapters=jnp.asarray(scenario.class_count.sum(), jnp.int32),
        disk_s=jnp.asarray(costs.loads.disk_s + costs.loads.disk_rank_s * requests.rank, jnp.float32),
        max_num_batched_tokens=whole(scenario.max_num_batched_tokens),
        # Each running request needs a token of every step, so there are never more of them than tokens in a step.
        max_num_seqs=whole(jnp.minimum(scenario.most_active_seqs, scenario.max_num_batched_tokens)),
        kv_blocks=usable_blocks(whole(scenario.kv_cache_tokens), block_size),
        watermark_blocks=scenario.watermark_blocks,
        max_loras=whole(scenario.max_loras),
        max_lora_rank=whole(scenario.max_lora_rank),
        max_pending=whole(scenario.max_pending),
        warmup=jnp.round(jnp.asarray(warmup_s) / scenario.horizon_s * TICKS).astype(jnp.int32),
        horizon=jnp.asarray(TICKS, jnp.int32),
        max_ttft_s=unbounded if bounds is None else bounds.ttft_s,
        max_tpot_s=unbounded if bounds is None else bounds.tpot_s,
        max_e2el_s=unbounded if bounds is None else bounds.e2el_s,
        traced_one_in=jnp.clip(arriving // TRACED_WANTED, *TRACED_ONE_IN).astype(jnp.uint32),
        tick_s=jnp.asarray(scenario.horizon_s / TICKS, jnp.float32),
        rules=rules,
    )


def compute_time_s(
    server: Server, s: State, *, tokens: Number, prefill_tokens: ArrayLike, kv_tokens: Array, skipped: Number
) -> Float[Array, "*steps"]:
    """Return what steps take with the adapters and the queue as they are, float32 seconds.

    Args:
        server: The server.
        s: Its state.
        tokens: Tokens of a step.
        prefill_tokens: Those of prompts.
        kv_tokens: Tokens in the KV cache, ``[*steps]``.
        skipped: Waiting requests that admission has skipped.
    """
    seconds = step_time_s(
        server.costs,
        tokens=tokens.astype(jnp.float32),
        prefill_tokens=prefill_tokens,
        kv_tokens=kv_tokens,
        adapters=s.adapters.active,
        skipped=skipped,
        queued=s.waiting,
        loaded=server.adapters,
        max_loras=server.max_loras,
        max_lora_rank=server.max_lora_rank,
    )
    return seconds.astype(jnp.float32)


def compute_ticks(server: Server, compute_s: Array) -> Array:
    """Return what a step takes in ticks, one at least: time has to go on."""
    return jnp.maximum(jnp.round(compute_s / server.tick_s), 1.0).astype(jnp.int32)


__all__ = ["Seconds", "Server", "build_server", "compute_ticks", "compute_time_s"]
