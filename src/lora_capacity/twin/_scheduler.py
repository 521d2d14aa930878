"""The engine of one server, as pure functions: what happens to its queue, batch, KV blocks, adapters and clock.

A *turn* moves at most one request: it admits one, goes on with a prompt that was cut, or preempts one. Once nobody else
can be admitted, the next turn begins by letting the step run. Each function here sees one server; the event twin
batches them.

No running request is looked at while it decodes. One that gets its first token in step ``t`` and its last in step ``f``
gains a token in every step between, so all that it will do is known as it joins: cell ``f`` of a ring of steps counts
what it gives back when it leaves, and the count of its phase (steps modulo the tokens of a block) tells when it needs a
block. Adapters are numbered in the order in which a step touches them; ``last``, the latest step that needs an adapter,
says both whether it is active and how recently it was used.

Source: the behaviour of vLLM 0.8.5, as in ``vllm/v1/core/sched/scheduler.py`` and ``vllm/lora/worker_manager.py``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_capacity.twin.results import Limit

BLOCK_TOKENS = 16
"""Tokens of a KV block."""

NEVER = -1
"""``last`` of an adapter that has not been used; steps count from 1."""

FAR = 2**30
"""Later than any tick, above any number of a request."""

SEND, KEEP, ADMIT, RUN, DONE = range(5)
"""What comes next: requests arrive, running ones are kept, waiting ones admitted, the step runs; or nothing more."""

ADAPTER, INPUT, OUTPUT, NEXT = range(4)
"""Columns of the table of requests."""

COMPUTING, LOADING, RUNNING, WAITING, KV_BLOCKS, ADAPTERS, STREAMING, TTFT = range(8)
"""Places of ``State.sums``."""

REQUESTS, TOKENS, NEXT_TOKENS, STEPS, HOST_LOADS, DISK_LOADS, PREEMPTIONS = range(7)
"""Places of ``State.counts``."""

WINDOW = 8
"""Arrivals that a turn looks at."""

BINS_PER_DOUBLING = 16
"""Bins of the histogram of times to first token per factor of 2, from `SHORTEST_S` on: a resolution of 4 %."""

SHORTEST_S = 2.0**-10
BINS = 24 * BINS_PER_DOUBLING


class Server(NamedTuple):
    """A configuration; scalars, int32 unless said otherwise. Times are in ticks of ``tick_s`` seconds (float32)."""

    max_num_batched_tokens: Array
    max_num_seqs: Array
    kv_blocks: Array
    max_loras: Array
    max_lora_rank: Array
    max_pending: Array
    horizon: Array
    tick_s: Array
    full_prompt_must_fit: Array


class Building(NamedTuple):
    """The step being put together; scalars, int32 unless said otherwise.

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


class Partial(NamedTuple):
    """The request of which a part of the prompt is computed, always the last one admitted; scalars.

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


class State(NamedTuple):
    """A server between two turns; int32 scalars unless said otherwise.

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
        kv_tokens: Tokens in the KV cache once the step has run.
        streaming: Requests with a first but not a last token.
        building: The step being put together.
        partial: The request in the batch that does not decode yet.
        arrival: When requests are sent, ticks; later than they arrive if clients hold them back, ``[requests]``.
        head: First request of each adapter not yet admitted, the base model last, ``[adapters + 1]``.
        key: The same, but ``-1 - place`` where a preempted one comes first, ``[adapters + 1]``.
        last: Latest step that needs each adapter, as far as is known, ``[adapters]``.
        since: Step that made each adapter active, ``[adapters]``.
        earlier: ``last`` before that, ``[adapters]``.
        distance: For adapters made active by this step, other ones used since their last use, ``[adapters]``.
        ring: By step: requests that leave, their blocks, their tokens, requests that got their last block,
            ``[steps, 4]``.
        phase: Decoding requests that need a block, by step modulo `BLOCK_TOKENS`, ``[16]``.
        limit: `Limit` that ended admission in the latest step.
        log: Last admissions: request, step of its last token, ``last`` of its adapter before, ``[log, 3]``.
        logged: Admissions in the log.
        log_lost: Admissions that the log has no room for.
        preempted: Preempted requests in order: request (-1: none any more), adapter, tokens sampled; ``[places, 3]``.
        places: Places in use.
        preempted_waiting: Preempted requests in the queue.
        admitted: Bits of the requests admitted, uint32 ``[requests / 32]``.
        admitted_by_block: Their number by 1,024 requests, ``[requests / 1024]``.
        first: First tokens of which the delay is not noted yet: sending time and step, ``[first, 2]``.
        first_put: First tokens so far.
        first_got: Those noted.
        ends: When the latest steps ended, ticks, ``[first]``.
        histogram: Times to first token by bin, ``[bins]``.
        sums: Integrals over time and sums of times, s, float32 ``[8]``.
        sums_lost: What rounding took off them, float32 ``[8]``.
        counts: What happened within the horizon, ``[7]``.
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
    kv_tokens: Array
    streaming: Array
    building: Building
    partial: Partial
    arrival: Array
    head: Array
    key: Array
    last: Array
    since: Array
    earlier: Array
    distance: Array
    ring: Array
    phase: Array
    limit: Array
    log: Array
    logged: Array
    log_lost: Array
    preempted: Array
    places: Array
    preempted_waiting: Array
    admitted: Array
    admitted_by_block: Array
    first: Array
    first_put: Array
    first_got: Array
    ends: Array
    histogram: Array
    sums: Array
    sums_lost: Array
    counts: Array
    overflow: Array

    @property
    def waiting(self) -> Array:
        """Requests in the queue, int32."""
        return self.sent - self.taken + self.preempted_waiting


class Work(NamedTuple):
    """A step ready to run; int32 scalars but for the times, float32 seconds."""

    tokens: Array
    prefill_tokens: Array
    kv_tokens: Array
    adapters: Array
    passed_over: Array
    host_loads: Array
    disk_loads: Array
    compute_s: Array
    load_s: Array


class Move(NamedTuple):
    """The request that a turn moves; scalars. ``sign`` is 1 as it joins the decoding ones, -1 as it leaves them early.

    Attributes:
        sign: 1, -1 or, if it does neither, 0.
        request: Its number.
        adapter: Its adapter.
        computed: Tokens in the KV cache: as it joins, once the step has run.
        input: Tokens of the prompt.
        output: Tokens of the answer.
        finish: Step of its last token.
        needed: Whether the step needs its adapter, bool.
    """

    sign: Array
    request: Array
    adapter: Array
    computed: Array
    input: Array
    output: Array
    finish: Array
    needed: Array


def blocks(tokens: Array) -> Array:
    """Return the KV blocks that hold so many tokens."""
    return (tokens + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS


def total(values: Array) -> Array:
    """Add up in int32."""
    return jnp.sum(values, dtype=jnp.int32)


def send(server: Server, s: State) -> State:
    """Let requests arrive while clients have room; jump to the next arrival if there is nothing to do."""
    sending = s.mode == SEND
    window = jax.lax.dynamic_slice(s.arrival, (s.sent,), (WINDOW,))
    number = s.sent + jnp.arange(WINDOW, dtype=jnp.int32)
    target = s.completed + server.max_pending
    enters = (window <= s.now) & (number < target) & sending
    window_sent = jnp.where(enters & (number >= s.room), s.now, window)
    entered = total(enters)
    sent = s.sent + entered
    more = entered == WINDOW
    empty = sending & ~more & (s.running == 0) & (sent - s.taken + s.preempted_waiting == 0)
    following = window[jnp.minimum(entered, WINDOW - 1)]
    now = jnp.where(empty, jnp.minimum(following, server.horizon), s.now)
    over = sending & (now >= server.horizon)
    begins = sending & ~more & ~empty
    return s._replace(
        mode=jnp.where(over, DONE, jnp.where(begins, KEEP, s.mode)).astype(jnp.int32),
        now=now,
        sent=sent,
        room=jnp.where(sending & ~more, target, s.room),
        arrival=jax.lax.dynamic_update_slice(s.arrival, window_sent, (s.sent,)),
    )


def arrange(server: Server, table: Array, disk_s: Array, s: State) -> tuple[State, Array]:
    """Keep the running requests, or admit one that waits, or preempt one; say which adapter became active (-1: none).

    Args:
        server: The configuration.
        table: Adapter, prompt and answer tokens, next request of the same adapter, ``[requests, 4]``.
        disk_s: Time to read each adapter from disk, s, ``[adapters]``.
        s: The state.
    """
    adapters, b, part = s.last.shape[0], s.building, s.partial
    # What the running requests need.
    keeping, has_partial = s.mode == KEEP, part.request >= 0
    decoding = s.running - has_partial
    chunk = jnp.where(has_partial, jnp.minimum(part.total - part.computed, server.max_num_batched_tokens - decoding), 0)
    growth = s.phase[s.step % BLOCK_TOKENS] + blocks(part.computed + chunk) - blocks(part.computed)
    short = keeping & (growth > s.free)
    kept = keeping & ~short
    drop = short & has_partial
    entry = s.log[(s.logged - 1) % s.log.shape[0]]
    pop = short & ~has_partial
    left = pop & (entry[1] < s.step)
    undo = pop & ~left
    lost = pop & (s.logged <= s.log_lost)
    go_on = kept & has_partial

    budget = jnp.where(kept, server.max_num_batched_tokens - decoding - chunk, b.budget)
    free = s.free - jnp.where(kept, growth, 0)
    admitting = (kept & ~has_partial & ~b.preempted) | (s.mode == ADMIT)

    # Who waits.
    active = s.last >= s.step
    in_use = total(active)
    key_active = jnp.minimum(jnp.min(jnp.where(active, s.key[:adapters], FAR)), s.key[adapters])
    key = jnp.where(in_use < server.max_loras, jnp.min(s.key), key_active)
    found = admitting & (key < s.sent)
    place = jnp.clip(-1 - key, 0, s.preempted.shape[0] - 1)
    from_preempted = key < 0
    waiting = s.preempted[place]
    room = admitting & (budget > 0) & (s.running < server.max_num_seqs)

    request = jnp.where(
        go_on | drop, part.request, jnp.where(pop, entry[0], jnp.where(from_preempted, waiting[0], key))
    )
    request = jnp.clip(request, 0, table.shape[0] - 1)
    row = table[request]
    adapter = row[ADAPTER]

    # Does the first that waits fit?
    sampled = jnp.where(from_preempted, waiting[2], 0)
    prompt = row[INPUT] + sampled
    tokens = jnp.minimum(prompt, budget)
    fits = blocks(jnp.where(server.full_prompt_must_fit, prompt, tokens)) <= free
    admit = room & found & fits
    whole = tokens == prompt
    blocked = room & ~(found & fits)
    free = free - jnp.where(admit, blocks(tokens), 0)
    budget = budget - jnp.where(admit, tokens, 0)
    running = s.running + admit
    waits = s.waiting - admit
    again = admit & (budget > 0) & (running < server.max_num_seqs) & (waits > 0)

    # What becomes of it.
    sampled = jnp.where(go_on | drop, part.sampled, sampled)
    join = (go_on & (chunk == part.total - part.computed)) | (admit & whole)
    sampled = jnp.where(undo, row[OUTPUT] - (entry[1] - s.step + 1), sampled)
    preempt = drop | undo
    computed = jnp.where(drop, part.computed, row[INPUT] + sampled - undo.astype(jnp.int32))
    finish = jnp.where(undo, entry[1], s.step + row[OUTPUT] - sampled - 1)
    free = free + jnp.where(preempt, blocks(computed), 0)
    prefill = jnp.where(go_on, chunk, jnp.where(admit, tokens, 0))
    move = Move(
        sign=join.astype(jnp.int32) - undo.astype(jnp.int32),
        request=request,
        adapter=adapter,
        computed=computed,
        input=row[INPUT],
        output=row[OUTPUT],
        finish=finish,
        needed=go_on | admit,
    )
    started = join & (sampled == 0)
    building = b._replace(
        budget=budget,
        prefill_tokens=b.prefill_tokens + prefill,
        first_tokens=b.first_tokens + started,
        rejoined=b.rejoined + (join & ~started),
        preempted=b.preempted | preempt,
        stop=jnp.where(admitting & (admit | blocked), jnp.where(blocked & ~found, FAR, key), b.stop),
    )
    goes_on_partial = (go_on & ~join) | (admit & ~whole)
    partial = Partial(
        request=jnp.where(goes_on_partial, request, jnp.where(join & go_on | drop, -1, part.request)),
        computed=jnp.where(go_on, part.computed + chunk, jnp.where(admit, tokens, part.computed)),
        total=jnp.where(admit, prompt, part.total),
        sampled=jnp.where(admit, sampled, part.sampled),
    )
    partial = partial._replace(computed=jnp.where(partial.request >= 0, partial.computed, 0))
    mode = jnp.where(go_on & ~b.preempted, ADMIT, jnp.where(kept & b.preempted, RUN, s.mode))
    mode = jnp.where(admitting, jnp.where(again, ADMIT, RUN), mode)
    s, newcomer = _note_adapter(
        s._replace(
            mode=jnp.where(lost, DONE, mode),
            overflow=s.overflow | lost,
            free=free,
            running=running - preempt,
            kv_tokens=s.kv_tokens + jnp.where(kept, decoding, 0) + prefill - jnp.where(preempt, computed, 0),
            building=building,
            partial=partial,
        ),
        move,
        entry[2],
        disk_s,
    )
    s = _join_or_leave(s, move, pop, started)
    s = _requeue(s, move, preempt, sampled)
    return _dequeue(s, move, admit, from_preempted, place, row[NEXT]), newcomer


def _note_adapter(s: State, move: Move, before: Array, disk_s: Array) -> tuple[State, Array]:
    """Note how long a request needs its adapter; a preempted one takes its claim back."""
    adapters = s.last.shape[0]
    adapter = jnp.minimum(move.adapter, adapters - 1)
    own = move.adapter < adapters
    last = s.last[adapter]
    claim = jnp.maximum(last, jnp.where(move.sign > 0, move.finish, s.step))
    value = jnp.where(move.needed, claim, jnp.maximum(before, s.step - 1))
    changes = own & (move.needed | (move.sign < 0))
    new = own & move.needed & (last < s.step - 1)
    never = new & (last == NEVER)
    where_new = jnp.where(new, adapter, adapters)
    b = s.building
    s = s._replace(
        last=s.last.at[jnp.where(changes, adapter, adapters)].set(value, mode="drop"),
        since=s.since.at[where_new].set(s.step, mode="drop"),
        earlier=s.earlier.at[where_new].set(last, mode="drop"),
        building=b._replace(
            newcomers=b.newcomers + new,
            first_touched=b.first_touched + never,
            disk_s=b.disk_s + jnp.where(never, disk_s[adapter], 0.0),
        ),
        log=_log(s, move, last),
    )
    return s, jnp.where(new, adapter, -1)


def _log(s: State, move: Move, before: Array) -> Array:
    size = s.log.shape[0]
    place = jnp.where(move.sign > 0, s.logged % size, size)
    return s.log.at[place].set(jnp.stack([move.request, move.finish, before]), mode="drop")


def _join_or_leave(s: State, move: Move, pop: Array, started: Array) -> State:
    """Enter a request into the ring of steps or take it out again."""
    size, sign = s.ring.shape[0], move.sign
    begin = s.step + (sign > 0)
    phase = (begin - move.computed) % BLOCK_TOKENS
    last_block = move.finish - (move.finish - phase) % BLOCK_TOKENS
    grows = jnp.where(last_block >= begin, sign, 0)
    leaving = jnp.stack(
        [sign, sign * blocks(move.input + move.output - 1), sign * (move.input + move.output), 0 * sign]
    )
    ring = s.ring.at[jnp.where(sign != 0, move.finish % size, size)].add(leaving, mode="drop")
    ring = ring.at[jnp.where(grows != 0, last_block % size, size), 3].add(grows, mode="drop")
    here = jnp.arange(BLOCK_TOKENS, dtype=jnp.int32) == phase
    logged = s.logged + (sign > 0) - pop
    size = s.first.shape[0]
    sent = s.arrival[move.request]
    first = s.first.at[jnp.where(started, s.first_put % size, size)].set(jnp.stack([sent, s.step]), mode="drop")
    put = s.first_put + started
    overflow = s.overflow | (put - s.first_got > size)
    return s._replace(
        ring=ring,
        phase=s.phase + jnp.where(here, grows, 0),
        logged=logged,
        log_lost=jnp.maximum(s.log_lost, logged - s.log.shape[0]),
        first=first,
        first_put=put,
        overflow=overflow,
    )


def _requeue(s: State, move: Move, preempt: Array, sampled: Array) -> State:
    """Put a preempted request in front of the queue."""
    size = s.preempted.shape[0]
    overflow = preempt & (s.places == size)
    row = jnp.stack([move.request, move.adapter, sampled])
    key = s.key.at[jnp.where(preempt, move.adapter, s.key.shape[0])].set(-1 - s.places, mode="drop")
    return s._replace(
        mode=jnp.where(overflow, DONE, s.mode),
        overflow=s.overflow | overflow,
        key=key,
        preempted=s.preempted.at[jnp.where(preempt, s.places, size)].set(row, mode="drop"),
        places=s.places + preempt,
        preempted_waiting=s.preempted_waiting + preempt,
        counts=s.counts.at[PREEMPTIONS].add(preempt),
    )


def _dequeue(s: State, move: Move, admit: Array, from_preempted: Array, place: Array, following: Array) -> State:
    """Take an admitted request out of the queue."""
    fresh, again = admit & ~from_preempted, admit & from_preempted
    size, keys = s.preempted.shape[0], s.key.shape[0]
    preempted = s.preempted.at[jnp.where(again, place, size), 0].set(-1, mode="drop")
    places = jnp.arange(size, dtype=jnp.int32)
    filled = (preempted[:, 0] >= 0) & (places < s.places)
    next_place = jnp.max(jnp.where(filled & (preempted[:, 1] == move.adapter), places, -1))
    head = jnp.where(fresh, following, s.head[move.adapter])
    key = jnp.where(again & (next_place >= 0), -1 - next_place, head)
    bit = jnp.left_shift(jnp.uint32(1), (move.request % 32).astype(jnp.uint32))
    word = jnp.where(fresh, move.request // 32, s.admitted.shape[0])
    block = jnp.where(fresh, move.request // 1024, s.admitted_by_block.shape[0])
    return s._replace(
        taken=s.taken + fresh,
        head=s.head.at[jnp.where(fresh, move.adapter, keys)].set(head, mode="drop"),
        key=s.key.at[jnp.where(admit, move.adapter, keys)].set(key, mode="drop"),
        preempted=preempted,
        places=jnp.where(again, 1 + jnp.max(jnp.where(filled, places, -1)), s.places),
        preempted_waiting=s.preempted_waiting - again,
        admitted=s.admitted.at[word].add(bit, mode="drop"),
        admitted_by_block=s.admitted_by_block.at[block].add(1, mode="drop"),
    )


def distances(s: State, newcomer: Array) -> Array:
    """Note for an adapter that became active how many others were used since, in the order of touching.

    An adapter is on the GPU if fewer than ``max_loras`` others were used since its last use; here use is counted as it
    will be when the step touches the newcomer. Others that this step made active count if they come before it.
    """
    order = jnp.arange(s.last.shape[0], dtype=jnp.int32)
    own = jnp.maximum(newcomer, 0)
    new = (s.since == s.step) & (order != own)
    used = jnp.where(new, s.earlier, jnp.minimum(s.last, s.step - 1))
    last = s.earlier[own]
    later = (used > last) | ((used == last) & (order > own))
    counted = jnp.where(new, later | (order < own), later) & (order != own)
    distance = s.distance + (new & later & (order > own))
    distance = jnp.where(order == own, total(counted), distance)
    return jnp.where(newcomer >= 0, distance, s.distance)


def loads_of_newcomers(server: Server, s: State) -> Array:
    """Count the adapters that this step made active and that are not on the GPU any more, or never were."""
    new = s.since == s.step
    return total(new & ((s.earlier == NEVER) | (s.distance >= server.max_loras)))


def loads_of_evicted(server: Server, s: State) -> Array:
    """Count the adapters that stay active but are evicted by newcomers that the step touches first, and loaded again.

    Going through the adapters in the order of touching, each newcomer takes a slot and each adapter that has left since
    the step before gives one; where more are taken than were free, the next active adapter has been evicted.
    """
    new = s.since == s.step
    stays = (s.last >= s.step) & ~new
    left = s.last == s.step - 1
    balance = jnp.cumsum(new.astype(jnp.int32) - left.astype(jnp.int32), dtype=jnp.int32)
    free = server.max_loras - total(stays) - total(left)
    return total(stays & (balance > free))


def passed_over(s: State) -> Array:
    """Count the waiting requests that stand before the one at which admission stopped."""
    stop = s.building.stop
    places = jnp.arange(s.preempted.shape[0], dtype=jnp.int32)
    in_front = total((s.preempted[:, 0] >= 0) & (places < s.places) & (places > -1 - stop))
    block = jnp.clip(stop // 1024, 0, s.admitted_by_block.shape[0] - 1)
    by_block = jnp.arange(s.admitted_by_block.shape[0], dtype=jnp.int32)
    admitted = total(jnp.where(by_block < block, s.admitted_by_block, 0))
    words = jax.lax.dynamic_slice(s.admitted, (block * 32,), (32,))
    room = jnp.clip(stop - block * 1024 - 32 * jnp.arange(32, dtype=jnp.int32), 0, 32)
    mask = jnp.where(room >= 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << room.astype(jnp.uint32)) - 1)
    admitted = admitted + total(jax.lax.population_count(words & mask))
    passed = jnp.where(stop < 0, in_front, s.preempted_waiting + stop - admitted)
    return jnp.where(stop == -FAR, 0, jnp.where(stop == FAR, s.waiting, passed))


def run(server: Server, s: State, work: Work) -> State:
    """Let the step that was put together run, if it is ready, and take out the requests that it finishes."""
    b = s.building
    runs = s.mode == RUN
    load = jnp.round(work.load_s / server.tick_s).astype(jnp.int32)
    compute = jnp.maximum(jnp.round(work.compute_s / server.tick_s), 1.0).astype(jnp.int32)
    end = jnp.where(runs, s.now + load + compute, s.now)
    observed_s = jnp.maximum(jnp.minimum(end, server.horizon) - s.now, 0) * server.tick_s
    leaving, leaving_blocks, leaving_tokens, last_block = (
        jnp.where(runs, value, 0) for value in s.ring[s.step % s.ring.shape[0]]
    )
    inside = runs & (end <= server.horizon)
    rates = (s.running, s.waiting, server.kv_blocks - s.free, work.adapters, s.streaming)
    loading_s = jnp.minimum(load * server.tick_s, observed_s)
    s, delay_s = _note_first_token(server, s)
    sums, lost = _add(
        s.sums,
        s.sums_lost,
        jnp.stack([observed_s - loading_s, loading_s, *(rate * observed_s for rate in rates), delay_s]),
    )
    events = (
        leaving,
        leaving_tokens,
        work.tokens - work.prefill_tokens + b.rejoined,
        1,
        work.host_loads,
        work.disk_loads,
        0,
    )
    here = jnp.arange(BLOCK_TOKENS, dtype=jnp.int32) == s.step % BLOCK_TOKENS
    place = jnp.where(runs, s.step % s.ring.shape[0], s.ring.shape[0])
    ends = jnp.where(runs, s.step % s.ends.shape[0], s.ends.shape[0])
    zero = jnp.zeros_like(s.step)
    fresh = Building(zero, zero, zero, zero, zero > 0, zero - FAR, zero, zero, jnp.zeros_like(b.disk_s))
    return s._replace(
        mode=jnp.where(runs, SEND, s.mode),
        now=end,
        step=s.step + runs,
        completed=s.completed + leaving,
        free=s.free + leaving_blocks,
        running=s.running - leaving,
        kv_tokens=s.kv_tokens - (leaving_tokens - leaving),
        streaming=s.streaming + jnp.where(runs, b.first_tokens, 0) - leaving,
        building=jax.tree.map(lambda a, c: jnp.where(runs, a, c), fresh, b),
        ring=s.ring.at[place].set(0, mode="drop"),
        phase=s.phase - jnp.where(here, last_block, 0),
        limit=jnp.where(runs, _limit(server, s), s.limit),
        ends=s.ends.at[ends].set(end, mode="drop"),
        sums=sums,
        sums_lost=lost,
        counts=s.counts + jnp.where(inside, jnp.stack([jnp.asarray(event, jnp.int32) for event in events]), 0),
    )


def _limit(server: Server, s: State) -> Array:
    """Why the requests left in the queue were not admitted."""
    b = s.building
    limit = jnp.where(b.stop == FAR, Limit.SLOTS, Limit.KV_CACHE)
    limit = jnp.where(s.running >= server.max_num_seqs, Limit.SEQUENCES, limit)
    limit = jnp.where((b.budget == 0) & ~b.preempted, Limit.TOKEN_BUDGET, limit)
    return jnp.where(s.waiting == 0, Limit.NONE, limit).astype(jnp.int32)


def _note_first_token(server: Server, s: State) -> tuple[State, Array]:
    """Note the delay of one first token whose step has run; there is at most one more in every turn."""
    sent, when = s.first[s.first_got % s.first.shape[0]]
    ready = (s.first_got < s.first_put) & (when < s.step)
    end = s.ends[when % s.ends.shape[0]]
    counts = ready & (end <= server.horizon)
    delay_s = jnp.where(counts, (end - sent) * server.tick_s, 0.0)
    place = jnp.log2(jnp.maximum(delay_s, SHORTEST_S) / SHORTEST_S) * BINS_PER_DOUBLING
    place = jnp.where(counts, jnp.minimum(place.astype(jnp.int32), BINS - 1), BINS)
    histogram = s.histogram.at[place].add(1, mode="drop")
    return s._replace(histogram=histogram, first_got=s.first_got + ready), delay_s


def _add(sums: Array, lost: Array, values: Array) -> tuple[Array, Array]:
    """Compensated summation (Kahan): float32 would lose what a step adds to hours."""
    values = values - lost
    total = sums + values
    return total, (total - sums) - values
