"""What the event twin knows of one server between two iterations, in arrays of fixed size.

No running request is looked at while it decodes. One that gets its first token in step ``t`` and its last in step ``f``
gains a token in every step between, so all that it will do is known as it joins: cell ``f`` of the calendar counts what
it gives back when it leaves, and the count of its phase (steps modulo the tokens of a block) tells when it needs a
block. Adapters are numbered in the order in which a step touches them; ``last``, the latest step that needs an adapter,
says both whether it is active and how recently it was used.

All of it describes *one* server; `jax.vmap` puts many side by side. Numbers are int32 scalars unless said otherwise.
"""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from lora_capacity.twins.events.kv_cache import KvCache
from lora_capacity.twins.events.prefix_cache import Prefixes

Number: TypeAlias = Int[Array, ""]
Flag: TypeAlias = Bool[Array, ""]
Seconds: TypeAlias = Float[Array, ""]
Numbers: TypeAlias = Int[Array, "*shape"]

NEVER = -1
"""``last`` of an adapter that has not been used; steps count from 1."""

FAR = 2**30
"""Later than any tick, above any number of a request: the largest power of two of which int32 holds the double."""

SEND, KEEP, ADMIT, RUN, DONE = range(5)
"""What comes next: requests arrive, running ones are kept, waiting ones admitted, the step runs; or nothing more."""

ADAPTER, INPUT, OUTPUT = range(3)
"""Columns of the table of requests."""

LEAVING, BLOCKS, LEAVING_TOKENS, LAST_BLOCK, LAST_NEEDED = range(5)
"""Columns of ``State.calendar``."""

COMPUTING, LOADING, RUNNING, WAITING, KV_BLOCKS, ADAPTERS, STREAMING, SCHEDULING, TTFT, TPOT = range(10)
"""Places of ``Statistics.sums``."""

REQUESTS, TOKENS, NEXT_TOKENS, STEPS, HOST_LOADS, DISK_LOADS, PREEMPTIONS = range(7)
"""Places of ``Statistics.counts``."""

ANSWERED, PROMPT, TRACED_PROMPT, TRACED_GOOD = range(4)
"""Places of ``Statistics.kept_bounds``."""

FIRST_TOKEN, LATER_TOKENS, WHOLE_OUTPUT = range(3)
"""Places of ``Statistics.histogram``: time to the first token, mean time of each later one, time to the last."""

TRACED = 8
"""Requests that can be traced at a time: they fill a 256-bit register."""

TRACED_ONE_IN = (4, 64)
"""Of how many requests one is traced, at least and at most, by number, so that bursts count as much as others.

One in 64 does for some 500 running requests, as many as fit into most KV caches; where all places are taken, the next
one drawn is not traced.
"""

TRACED_WANTED = 512
"""Requests to trace where a server gets fewer than are enough for one in 64: a share of 95 % is then told to 1 %."""

WINDOW = 4
"""Arrivals that an iteration looks at: few, since nearly all iterations see none or one; more than one, since bursts
and clients that were held back send many at once."""

BINS_PER_DOUBLING = 16
"""Bins of the histograms of times per factor of 2, from `SHORTEST_S` on: a resolution of 4 %."""

SHORTEST_S = 2.0**-10
"""Lower end of the histograms, 1 ms: less than any step takes."""

BINS = 24 * BINS_PER_DOUBLING
"""Bins of each histogram: up to 2^14 s, beyond any wait in an hour."""


class Clients(NamedTuple):
    """What clients have sent.

    Attributes:
        sent_at: When each request is sent, ticks, later than it arrives if clients hold it back; of those that have not
            entered when they arrive; ``[requests]``.
        sent: Requests that have entered, from the table's top.
        room: Requests that could have entered before the latest step ended.
    """

    sent_at: Int[Array, " requests"]
    sent: Number
    room: Number


class PreemptedRequests(NamedTuple):
    """Preempted requests that wait; int32 ``[places]``.

    By default the last one comes first, and a place is empty once its request is admitted. With `SkippedQueue` the
    first one comes first, without empty places between.

    Attributes:
        request: Its number, -1 if there is none.
        adapter: Its adapter.
        sampled: Tokens it had sampled.
    """

    request: Int[Array, " places"]
    adapter: Int[Array, " places"]
    sampled: Int[Array, " places"]


class SkippedQueue(NamedTuple):
    """How far admission has skipped through the queue, where preempted requests go behind that.

    Attributes:
        fresh: Number of the first fresh request behind.
        preempted: Preempted requests in front.
        before: Number of the fresh request that each preempted one stands in front of, ``[places]``.
    """

    fresh: Number
    preempted: Number
    before: Int[Array, " places"]


class Queue(NamedTuple):
    """The requests that wait.

    Attributes:
        taken: Fresh requests admitted, whether or not they were preempted later.
        head: First request of each adapter not yet admitted, the base model last, ``[adapters + 1]``.
        key: The same, but ``-1 - place`` where a preempted one comes first, ``[adapters + 1]``; with `SkippedQueue`
            ``[0]``.
        preempted: Preempted requests in order.
        places: Their places in use.
        preempted_waiting: How many of them wait.
        skipped: How far the queue has been skipped; None where that does not matter.
        admitted: Bits of the requests admitted, uint32 ``[requests / 32]``.
        admitted_by_block: Their number by 1,024 requests, ``[requests / 1024]``.
    """

    taken: Number
    head: Int[Array, " adapters+1"]
    key: Int[Array, " keys"]
    preempted: PreemptedRequests
    places: Number
    preempted_waiting: Number
    skipped: SkippedQueue | None
    admitted: Int[Array, " words"]
    admitted_by_block: Int[Array, " blocks"]


class ChunkedPrefill(NamedTuple):
    """The request of which a part of the prompt is computed, always the last one admitted.

    Attributes:
        request: Its number, -1 if there is none.
        computed: Tokens computed.
        total: Tokens of its prompt; after a preemption, of what it had sampled too.
        sampled: Output tokens it had before.
    """

    request: Number
    computed: Number
    total: Number
    sampled: Number


class Batch(NamedTuple):
    """The running requests.

    Attributes:
        running: Requests in the batch.
        completed: Requests that have left.
        streaming: Requests with a first but not a last token.
        chunked: The request in the batch that does not decode yet.
        log: Last admissions: request, step of its last token, ``last`` of its adapter before, ``[log, 3]``.
        logged: Admissions in the log.
        log_lost: Admissions that the log has no room for.
    """

    running: Number
    completed: Number
    streaming: Number
    chunked: ChunkedPrefill
    log: Int[Array, "log 3"]
    logged: Number
    log_lost: Number


class AdapterUse(NamedTuple):
    """Which adapters steps need; int32 ``[adapters + 1]``, the base model last, unless said otherwise.

    Attributes:
        active: Adapters that the step being put together needs, scalar.
        active_before: Adapters that the step before needed, scalar.
        last: Latest step that needs each adapter, as far as is known; `FAR` for the base model.
        since: Step that made each adapter active.
        earlier: ``last`` before that.
        distance: For adapters made active by this step, other ones used since their last use.
    """

    active: Number
    active_before: Number
    last: Int[Array, " adapters+1"]
    since: Int[Array, " adapters+1"]
    earlier: Int[Array, " adapters+1"]
    distance: Int[Array, " adapters+1"]


class PendingStep(NamedTuple):
    """The step being put together.

    Attributes:
        budget: Tokens left.
        prefill_tokens: Tokens of prompts.
        first_tokens: Requests that get their first token.
        rejoined: Preempted requests that have been recomputed and get their next token.
        preempted: Whether a request was preempted, bool.
        stop: Key of the waiting request at which admission stopped: those with smaller keys were skipped. `FAR` if
            nobody who waits has a slot, ``-FAR`` as long as admission has not looked at the queue.
        newcomers: Adapters that the step before did not need.
        first_touched: Those of them that were never needed before.
        disk_s: Time to read these from disk, float32.
        stop_place: How many preempted requests stood in front of that waiting request; None without `SkippedQueue`.
        grown: Blocks that decoding requests got before one found none; None without prefix caching.
    """

    budget: Number
    prefill_tokens: Number
    first_tokens: Number
    rejoined: Number
    preempted: Flag
    stop: Number
    newcomers: Number
    first_touched: Number
    disk_s: Seconds
    stop_place: Number | None
    grown: Number | None

    @classmethod
    def empty(cls, *, with_place: bool, with_growth: bool) -> "PendingStep":
        """Return a step to which nothing has been added."""
        none = jnp.zeros((), jnp.int32)
        disk_s = jnp.zeros((), jnp.float32)
        place, grown = none if with_place else None, none if with_growth else None
        return cls(none, none, none, none, none > 0, none - FAR, none, none, disk_s, place, grown)


class StepInFlight(NamedTuple):
    """The step that runs while the next one is put together; 0 but for `end` if there is none.

    Attributes:
        end: When it ends, ticks.
        leaving: Running requests that it finishes.
        blocks: Their KV blocks.
        requeued: Requests that it finishes though they have been preempted since; they wait until then.
        adapters: Adapters that it needs and that the step being put together does not need so far.
    """

    end: Number
    leaving: Number
    blocks: Number
    requeued: Number
    adapters: Number


class TracedRequests(NamedTuple):
    """Requests whose times are noted when they end, one in `TRACED_ONE_IN` if there is a place; ``[TRACED]``.

    Attributes:
        request: Its number, -1 if there is none.
        sent: When it was sent, ticks.
        first_step: Step of its first token.
        first_end: When that ended, ticks.
        finish: Step of its last token; `FAR` while it is preempted.
        later_tokens: Tokens after the first.
        undisturbed: Whether it was never preempted, bool.
    """

    request: Int[Array, " traced"]
    sent: Int[Array, " traced"]
    first_step: Int[Array, " traced"]
    first_end: Int[Array, " traced"]
    finish: Int[Array, " traced"]
    later_tokens: Int[Array, " traced"]
    undisturbed: Bool[Array, " traced"]


class FirstTokens(NamedTuple):
    """First tokens of which the delay is not noted yet: one an iteration is, once its step has run.

    Attributes:
        pending: When their requests were sent and the step of the token, ``[first, 2]``.
        put: First tokens so far.
        got: Those noted.
        ends: When the latest steps ended, ticks, ``[first]``.
    """

    pending: Int[Array, "first 2"]
    put: Number
    got: Number
    ends: Int[Array, " first"]


class Statistics(NamedTuple):
    """What is reported; nothing that happens depends on it.

    Attributes:
        histogram: Requests by time, ``[3 · BINS]``.
        worst_wait: Longest wait of each adapter's requests for their admission, ticks, ``[adapters + 1]``.
        admitted_by_adapter: Fresh requests admitted, ``[adapters + 1]``.
        most: Most running requests, adapters of a step and KV blocks in use, ``[3]``.
        kept_bounds: First tokens until the horizon, those that came in time; traced requests that have ended and whose
            first token came in time, and those of them that have kept all bounds, ``[4]``.
        sums: Integrals over time and sums of times, s, float32 ``[10]``.
        sums_lost: What rounding took off them, float32 ``[10]``.
        series: Time and what had added up by then, at the last step to end in each of as many equal parts of the
            horizon, float32 ``[samples, 7]``.
        counts: What happened within the horizon, ``[7]``.
        bottleneck: What ended admission in the latest step.
        iterations: Iterations that the server had something to do in.
    """

    histogram: Int[Array, " bins"]
    worst_wait: Int[Array, " adapters+1"]
    admitted_by_adapter: Int[Array, " adapters+1"]
    most: Int[Array, "3"]
    kept_bounds: Int[Array, "4"]
    sums: Float[Array, "10"]
    sums_lost: Float[Array, "10"]
    series: Float[Array, "samples 7"]
    counts: Int[Array, "7"]
    bottleneck: Number
    iterations: Number


class State(NamedTuple):
    """One server between two iterations.

    Attributes:
        mode: What comes next.
        now: Start of the step being put together, ticks.
        step: Its number.
        clients: What clients have sent.
        queue: The requests that wait.
        batch: The running ones.
        calendar: By step modulo its length: requests that leave, their blocks, their tokens, requests that got their
            last block, adapters that it needs last, ``[steps, 5]``.
        kv: The KV cache.
        prefixes: What can be found again of it; None without prefix caching.
        adapters: Which adapters steps need.
        pending: The step being put together.
        in_flight: The step that runs meanwhile; None without asynchronous scheduling.
        first_tokens: First tokens whose delay is not noted yet.
        traced: Some requests traced to their end.
        statistics: What is reported.
        overflow: Whether an array was too small to go on, bool.
    """

    mode: Number
    now: Number
    step: Number
    clients: Clients
    queue: Queue
    batch: Batch
    calendar: Int[Array, "steps 5"]
    kv: KvCache
    prefixes: Prefixes | None
    adapters: AdapterUse
    pending: PendingStep
    in_flight: StepInFlight | None
    first_tokens: FirstTokens
    traced: TracedRequests
    statistics: Statistics
    overflow: Flag

    @property
    def waiting(self) -> Number:
        """Requests in the queue."""
        waiting = self.clients.sent - self.queue.taken + self.queue.preempted_waiting
        return waiting if self.in_flight is None else waiting + self.in_flight.requeued


class StepWork(NamedTuple):
    """A step ready to run: what it consists of, and what it costs, float32 seconds."""

    tokens: Number
    prefill_tokens: Number
    kv_tokens: Number
    adapters: Number
    skipped: Number
    host_loads: Number
    disk_loads: Number
    compute_s: Seconds
    scheduling_s: Seconds
    load_s: Seconds


class Move(NamedTuple):
    """The request that an iteration moves.

    Attributes:
        sign: 1 if it joins the decoding ones, -1 if it leaves them early, else 0.
        request: Its number.
        adapter: Its adapter.
        following: The next request of that adapter.
        computed: Tokens in the KV cache: as it joins, once the step has run.
        input: Tokens of the prompt.
        output: Tokens of the output.
        sent: When it was sent, ticks.
        finish: Step of its last token.
        needed: Whether the step needs its adapter, bool.
    """

    sign: Number
    request: Number
    adapter: Number
    following: Number
    computed: Number
    input: Number
    output: Number
    sent: Number
    finish: Number
    needed: Flag
