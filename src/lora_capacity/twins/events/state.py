"""What the event twin knows of the servers between two turns, in arrays of fixed size.

No running request is looked at while it decodes. One that gets its first token in step ``t`` and its last in step ``f``
gains a token in every step between, so all that it will do is known as it joins: cell ``f`` of a ring of steps counts
what it gives back when it leaves, and the count of its phase (steps modulo the tokens of a block) tells when it needs a
block. Adapters are numbered in the order in which a step touches them; ``last``, the latest step that needs an adapter,
says both whether it is active and how recently it was used.
"""

from dataclasses import field
from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import Array

from lora_capacity.engines import SchedulerRules

BLOCK_TOKENS = 16
"""Tokens of a KV block."""

NEVER = -1
"""``last`` of an adapter that has not been used; steps count from 1."""

FAR = 2**30
"""Later than any tick, above any number of a request."""

SEND, KEEP, ADMIT, RUN, DONE = range(5)
"""What comes next: requests arrive, running ones are kept, waiting ones admitted, the step runs; or nothing more."""

ADAPTER, INPUT, OUTPUT = range(3)

LAST_BLOCK, LAST_NEEDED = 3, 4
"""Columns of the table of requests."""

COMPUTING, LOADING, RUNNING, WAITING, KV_BLOCKS, ADAPTERS, STREAMING, SCHEDULING, TTFT = range(9)
"""Places of ``State.sums``."""

REQUESTS, TOKENS, NEXT_TOKENS, STEPS, HOST_LOADS, DISK_LOADS, PREEMPTIONS = range(7)
"""Places of ``State.counts``."""

FIRST_TOKEN, LATER_TOKENS, WHOLE_ANSWER = range(3)
"""Places of ``State.histogram``: time to the first token, mean time of each later one, time to the last."""

FOLLOWED, FOLLOWED_ONE_IN = 8, 64
"""Requests that can be followed at a time; of how many one is, by number, so that bursts count as much as others."""

WINDOW = 4
"""Arrivals that a turn looks at."""

BINS_PER_DOUBLING = 16
"""Bins of the histograms of times per factor of 2, from `SHORTEST_S` on: a resolution of 4 %."""

SHORTEST_S = 2.0**-10

BINS = 24 * BINS_PER_DOUBLING


@struct.dataclass
class Server:
    """Configurations; int32 ``[configs]`` but for ``tick_s`` and rules. Times are in ticks of so many seconds."""

    max_num_batched_tokens: Array
    max_num_seqs: Array
    kv_blocks: Array
    max_loras: Array
    max_lora_rank: Array
    max_pending: Array
    warmup: Array
    horizon: Array
    tick_s: Array
    rules: SchedulerRules = field(metadata={"pytree_node": False})


class Building(NamedTuple):
    """The step being put together; ``[configs]``, int32 unless said otherwise.

    Attributes:
        budget: Tokens left.
        prefill_tokens: Tokens of prompts.
        first_tokens: Requests that get their first token.
        rejoined: Preempted requests that have been recomputed and get their next token.
        preempted: Whether a request was preempted, bool.
        stop: Key of the waiting request at which admission stopped: those with smaller keys were passed over.
        newcomers: Adapters that the step before did not need.
        first_touched: Those of them that were never needed before.
        disk_s: Time to read these from disk, float32.
        stop_place: How many preempted requests stood in front of that waiting request; None without `Passed`.
    """

    budget: Array
    prefill_tokens: Array
    first_tokens: Array
    rejoined: Array
    preempted: Array
    stop: Array
    newcomers: Array
    first_touched: Array
    disk_s: Array
    stop_place: Array | None


def new_building(none: Array, places: bool) -> Building:
    """Return a step to which nothing has been added; ``none`` is 0, int32 ``[configs]``."""
    disk_s = jnp.zeros(none.shape, jnp.float32)
    return Building(none, none, none, none, none > 0, none - FAR, none, none, disk_s, none if places else None)


class Partial(NamedTuple):
    """The request of which a part of the prompt is computed, always the last one admitted; ``[configs]``.

    Attributes:
        request: Its number, -1 if there is none.
        computed: Tokens computed.
        total: Tokens of its prompt; after a preemption, of what it had sampled too.
        sampled: Output tokens it had before.
    """

    request: Array
    computed: Array
    total: Array
    sampled: Array


class Followed(NamedTuple):
    """Requests whose times are noted when they end, one in `FOLLOWED_ONE_IN` if there is a place; ``[8, configs]``.

    Attributes:
        request: Its number, -1 if there is none.
        sent: When it was sent, ticks.
        first_step: Step of its first token.
        first_end: When that ended, ticks.
        finish: Step of its last token; `FAR` while it is preempted.
        later_tokens: Tokens after the first.
        undisturbed: Whether it was never preempted, bool.
    """

    request: Array
    sent: Array
    first_step: Array
    first_end: Array
    finish: Array
    later_tokens: Array
    undisturbed: Array


class Flight(NamedTuple):
    """The step that runs while the next one is put together; int32 ``[configs]``, 0 but for `end` if there is none.

    Attributes:
        end: When it ends, ticks.
        leaving: Running requests that it finishes.
        blocks: Their KV blocks.
        requeued: Requests that it finishes though they have been preempted since; they wait until then.
        adapters: Adapters that it needs and that the step being put together does not need so far.
    """

    end: Array
    leaving: Array
    blocks: Array
    requeued: Array
    adapters: Array


class Move(NamedTuple):
    """The request that a turn moves; ``[configs]``.

    Attributes:
        sign: 1 if it joins the decoding ones, -1 if it leaves them early, else 0.
        request: Its number.
        adapter: Its adapter.
        following: The next request of that adapter.
        computed: Tokens in the KV cache: as it joins, once the step has run.
        input: Tokens of the prompt.
        output: Tokens of the answer.
        sent: When it was sent, ticks.
        finish: Step of its last token.
        needed: Whether the step needs its adapter, bool.
    """

    sign: Array
    request: Array
    adapter: Array
    following: Array
    computed: Array
    input: Array
    output: Array
    sent: Array
    finish: Array
    needed: Array


class Preempted(NamedTuple):
    """Preempted requests that wait; int32 ``[places, configs]``.

    By default the last one comes first, and a place is empty once its request is admitted. With `Passed` the first one
    comes first, without empty places between.

    Attributes:
        request: Its number, -1 if there is none.
        adapter: Its adapter.
        sampled: Tokens it had sampled.
    """

    request: Array
    adapter: Array
    sampled: Array


class Passed(NamedTuple):
    """How far the queue has been passed over, where preempted requests go behind that; int32 ``[configs]``.

    Attributes:
        fresh: Number of the first fresh request behind.
        preempted: Preempted requests in front.
        before: Number of the fresh request that each preempted one stands in front of, ``[places, configs]``.
    """

    fresh: Array
    preempted: Array
    before: Array


class State(NamedTuple):
    """Servers between two turns; int32 ``[configs]`` unless said otherwise.

    Attributes:
        mode: What comes next.
        now: Start of the step being put together, ticks.
        step: Its number.
        sent: Requests that have entered, from the table's top.
        room: Requests that could have entered before the latest step ended.
        taken: Requests admitted, whether or not they were preempted later.
        completed: Requests that have left.
        free: Free KV blocks.
        running: Requests in the batch.
        active: Adapters that the step needs.
        active_before: Adapters that the step before needed.
        kv_tokens: Tokens in the KV cache once the step has run.
        flight: The step in flight; None without asynchronous scheduling.
        streaming: Requests with a first but not a last token.
        building: The step being put together.
        partial: The request in the batch that does not decode yet.
        sent_at: When each request is sent, ticks, later than it arrives if clients hold it back; of those that have not
            entered when they arrive; ``[configs, requests]``.
        head: First request of each adapter not yet admitted, the base model last, ``[adapters + 1, configs]``.
        key: The same, but ``-1 - place`` where a preempted one comes first,
            ``[adapters + 1, configs]``; with `Passed` ``[0, configs]``.
        last: Latest step that needs each adapter, as far as is known; `FAR` for the base model,
            ``[adapters + 1, configs]``.
        since: Step that made each adapter active, ``[adapters + 1, configs]``.
        earlier: ``last`` before that, ``[adapters + 1, configs]``.
        distance: For adapters made active by this step, other ones used since their last use,
            ``[adapters + 1, configs]``.
        ring: By step: requests that leave, their blocks, their tokens, requests that got their last block,
            adapters that it needs last, ``[configs, steps, 5]``.
        followed: Some requests followed to their end.
        phase: Decoding requests that need a block, by step modulo `BLOCK_TOKENS`, ``[16, configs]``.
        limit: `Bottleneck` that ended admission in the latest step.
        log: Last admissions: request, step of its last token, ``last`` of its adapter before, ``[configs, log, 3]``.
        logged: Admissions in the log.
        log_lost: Admissions that the log has no room for.
        preempted: Preempted requests in order.
        passed: How far the queue has been passed over; None where that does not matter.
        places: Places in use.
        preempted_waiting: Preempted requests in the queue.
        admitted: Bits of the requests admitted, uint32 ``[configs, requests / 32]``.
        admitted_by_block: Their number by 1,024 requests, ``[requests / 1024, configs]``.
        admitted_by_adapter: Their number by adapter, ``[adapters + 1, configs]``.
        first: First tokens of which the delay is not noted yet: sending time and step, ``[configs, first, 2]``.
        first_put: First tokens so far.
        first_got: Those noted.
        ends: When the latest steps ended, ticks, ``[configs, first]``.
        histogram: Requests by time, ``[configs, 3 · bins]``.
        worst_wait: Longest wait of each adapter's requests for their admission, ticks, ``[adapters + 1, configs]``.
        most: Most running requests, adapters of a step and KV blocks in use, ``[3, configs]``.
        sums: Integrals over time and sums of times, s, float32 ``[9, configs]``.
        sums_lost: What rounding took off them, float32 ``[9, configs]``.
        series: Time and what had added up by then, at the last step to end in each of as many equal parts of the
            horizon, float32 ``[configs, samples, 7]``.
        counts: What happened within the horizon, ``[7, configs]``.
        overflow: Whether an array was too small to go on, bool.
    """

    mode: Array
    now: Array
    step: Array
    sent: Array
    room: Array
    taken: Array
    completed: Array
    free: Array
    running: Array
    active: Array
    active_before: Array
    kv_tokens: Array
    flight: Flight | None
    streaming: Array
    building: Building
    partial: Partial
    sent_at: Array
    head: Array
    key: Array
    last: Array
    since: Array
    earlier: Array
    distance: Array
    ring: Array
    followed: Followed
    phase: Array
    limit: Array
    log: Array
    logged: Array
    log_lost: Array
    preempted: Preempted
    passed: Passed | None
    places: Array
    preempted_waiting: Array
    admitted: Array
    admitted_by_block: Array
    admitted_by_adapter: Array
    first: Array
    first_put: Array
    first_got: Array
    ends: Array
    histogram: Array
    worst_wait: Array
    most: Array
    sums: Array
    sums_lost: Array
    series: Array
    counts: Array
    overflow: Array

    @property
    def waiting(self) -> Array:
        """Requests in the queue, int32."""
        waiting = self.sent - self.taken + self.preempted_waiting
        return waiting if self.flight is None else waiting + self.flight.requeued


class Work(NamedTuple):
    """A step ready to run; int32 ``[configs]`` but for the times, float32 seconds."""

    tokens: Array
    prefill_tokens: Array
    kv_tokens: Array
    adapters: Array
    passed_over: Array
    host_loads: Array
    disk_loads: Array
    compute_s: Array
    scheduling_s: Array
    load_s: Array


def blocks(tokens: Array) -> Array:
    """Return the KV blocks that hold so many tokens."""
    return (tokens + (BLOCK_TOKENS - 1)) >> 4
