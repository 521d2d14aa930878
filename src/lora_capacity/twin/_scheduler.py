"""The engine of one server, as pure functions: what happens to its queue, batch, KV blocks, adapters and clock.

A *turn* moves at most one request: it admits one, goes on with a prompt that was cut, or preempts one. Once nobody else
can be admitted, the next turn begins by letting the step run.

No running request is looked at while it decodes. One that gets its first token in step ``t`` and its last in step ``f``
gains a token in every step between, so all that it will do is known as it joins: cell ``f`` of a ring of steps counts
what it gives back when it leaves, and the count of its phase (steps modulo the tokens of a block) tells when it needs a
block. Adapters are numbered in the order in which a step touches them; ``last``, the latest step that needs an adapter,
says both whether it is active and how recently it was used.

All functions take every server at once, ``[configs]``. Arrays that are searched have the servers as their last axis,
arrays of which one element is read as their first.

Source: the behaviour of vLLM 0.8.5, as in ``vllm/v1/core/sched/scheduler.py`` and ``vllm/lora/worker_manager.py``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lora_capacity.twin.results import Limit

Result = TypeVar("Result")

BLOCK_TOKENS = 16
"""Tokens of a KV block."""

NEVER = -1
"""``last`` of an adapter that has not been used; steps count from 1."""

FAR = 2**30
"""Later than any tick, above any number of a request."""

SEND, KEEP, ADMIT, RUN, DONE = range(5)
"""What comes next: requests arrive, running ones are kept, waiting ones admitted, the step runs; or nothing more."""

ADAPTER, INPUT, OUTPUT, NEXT, SENT = range(5)
LAST_BLOCK, LAST_NEEDED = 3, 4
"""Columns of the table of requests."""

COMPUTING, LOADING, RUNNING, WAITING, KV_BLOCKS, ADAPTERS, STREAMING, TTFT = range(8)
"""Places of ``State.sums``."""

REQUESTS, TOKENS, NEXT_TOKENS, STEPS, HOST_LOADS, DISK_LOADS, PREEMPTIONS = range(7)
"""Places of ``State.counts``."""

WINDOW = 4
"""Arrivals that a turn looks at."""

BINS_PER_DOUBLING = 16
"""Bins of the histogram of times to first token per factor of 2, from `SHORTEST_S` on: a resolution of 4 %."""

SHORTEST_S = 2.0**-10
BINS = 24 * BINS_PER_DOUBLING


class Server(NamedTuple):
    """Configurations; int32 ``[configs]`` but for booleans and ``tick_s``. Times are in ticks of so many seconds."""

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
        streaming: Requests with a first but not a last token.
        building: The step being put together.
        partial: The request in the batch that does not decode yet.
        table: Adapter, prompt tokens, answer tokens, next request of the same adapter and, in ticks, when a request is
            sent: later than it arrives if clients hold it back; ``[configs, requests, 5]``.
        head: First request of each adapter not yet admitted, the base model last, ``[adapters + 1, configs]``.
        key: The same, but ``-1 - place`` where a preempted one comes first,
            ``[adapters + 1, configs]``.
        last: Latest step that needs each adapter, as far as is known; `FAR` for the base model,
            ``[adapters + 1, configs]``.
        since: Step that made each adapter active, ``[adapters + 1, configs]``.
        earlier: ``last`` before that, ``[adapters + 1, configs]``.
        distance: For adapters made active by this step, other ones used since their last use,
            ``[adapters + 1, configs]``.
        ring: By step: requests that leave, their blocks, their tokens, requests that got their last block,
            adapters that it needs last, ``[configs, steps, 5]``.
        phase: Decoding requests that need a block, by step modulo `BLOCK_TOKENS`, ``[16, configs]``.
        limit: `Limit` that ended admission in the latest step.
        log: Last admissions: request, step of its last token, ``last`` of its adapter before, ``[configs, log, 3]``.
        logged: Admissions in the log.
        log_lost: Admissions that the log has no room for.
        preempted: Preempted requests in order: request (-1: none any more), adapter, tokens sampled; each
            ``[places, configs]``.
        places: Places in use.
        preempted_waiting: Preempted requests in the queue.
        admitted: Bits of the requests admitted, uint32 ``[configs, requests / 32]``.
        admitted_by_block: Their number by 1,024 requests, ``[requests / 1024, configs]``.
        admitted_by_adapter: Their number by adapter, ``[adapters + 1, configs]``.
        first: First tokens of which the delay is not noted yet: sending time and step, ``[configs, first, 2]``.
        first_put: First tokens so far.
        first_got: Those noted.
        ends: When the latest steps ended, ticks, ``[configs, first]``.
        histogram: Times to first token by bin, ``[configs, bins]``.
        sums: Integrals over time and sums of times, s, float32 ``[8, configs]``.
        sums_lost: What rounding took off them, float32 ``[8, configs]``.
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
    streaming: Array
    building: Building
    partial: Partial
    table: Array
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
    preempted: tuple[Array, Array, Array]
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
    sums: Array
    sums_lost: Array
    counts: Array
    overflow: Array

    @property
    def waiting(self) -> Array:
        """Requests in the queue, int32."""
        return self.sent - self.taken + self.preempted_waiting


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
    load_s: Array


class Choice(NamedTuple):
    """What a turn finds before it looks at the request that it is about; ``[configs]``.

    Attributes:
        decoding: Decoding requests that this turn keeps.
        chunk: Tokens of a prompt that was cut.
        kept: Whether the running requests are kept, bool, as all but the numbers.
        go_on: Whether they are, one with a prompt that was cut among them.
        drop: Whether that one is preempted.
        pop: Whether the last admission is taken from the log.
        undo: Whether its request still runs, and is preempted.
        finish: Step of its last token.
        before: ``last`` of its adapter before its admission.
        lost: Whether the log does not reach that far.
        budget: Tokens left once the running requests have had theirs.
        free: KV blocks left then.
        admitting: Whether a request may be admitted.
        room: Whether there is room for it in budget and batch.
        found: Whether one waits that has a slot.
        key: Its key.
        place: Its place if it was preempted.
        from_preempted: Whether it was.
        sampled: Tokens it had sampled.
        request: The request that the turn is about.
    """

    decoding: Array
    chunk: Array
    kept: Array
    go_on: Array
    drop: Array
    pop: Array
    undo: Array
    finish: Array
    before: Array
    lost: Array
    budget: Array
    free: Array
    admitting: Array
    room: Array
    found: Array
    key: Array
    place: Array
    from_preempted: Array
    sampled: Array
    request: Array


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


class Outcome(NamedTuple):
    """What a turn does: a move, new values of the state, and more; ``[configs]``.

    Attributes:
        admit: Whether the request is admitted, bool.
        preempt: Whether it is preempted, bool.
        started: Whether it gets its first token, bool.
        sampled: Tokens that it had sampled.
    """

    move: Move
    admit: Array
    preempt: Array
    started: Array
    sampled: Array
    mode: Array
    free: Array
    kv_tokens: Array
    building: Building
    partial: Partial


def pick(values: Array, index: Array) -> Array:
    """Return one element of each server: ``values[config, index]``, values ``[configs, n, …]``."""
    configs, size = values.shape[:2]
    row = size * jnp.arange(configs, dtype=jnp.int32)
    return values.reshape(-1, *values.shape[2:]).at[row + index].get(mode="promise_in_bounds")


def pick_across(values: Array, index: Array) -> Array:
    """Return one element of each server: ``values[index, config]``, values ``[n, configs]``."""
    configs = values.shape[1]
    place = configs * index + jnp.arange(configs, dtype=jnp.int32)
    return values.reshape(-1).at[place].get(mode="promise_in_bounds")


def put(values: Array, when: Array, index: Array, new: ArrayLike, column: int | None = None) -> Array:
    """Replace ``values[config, index]`` where ``when`` holds."""
    place, flat = _place(values, when, index, column)
    changed: Array = flat.at[place].set(jnp.asarray(new, values.dtype), **_PLAIN)
    return changed.reshape(values.shape)


def add(values: Array, when: Array, index: Array, more: ArrayLike, column: int | None = None) -> Array:
    """Add to ``values[config, index]`` where ``when`` holds."""
    place, flat = _place(values, when, index, column)
    changed: Array = flat.at[place].add(jnp.asarray(more, values.dtype), **_PLAIN)
    return changed.reshape(values.shape)


def put_across(values: Array, when: Array, index: Array, new: ArrayLike) -> Array:
    """Replace ``values[index, config]`` where ``when`` holds."""
    changed: Array = (
        values.reshape(-1).at[_place_across(values, when, index)].set(jnp.asarray(new, values.dtype), **_PLAIN)
    )
    return changed.reshape(values.shape)


def add_across(values: Array, when: Array, index: Array, more: ArrayLike) -> Array:
    """Add to ``values[index, config]`` where ``when`` holds."""
    changed: Array = (
        values.reshape(-1).at[_place_across(values, when, index)].add(jnp.asarray(more, values.dtype), **_PLAIN)
    )
    return changed.reshape(values.shape)


_PLAIN: dict[str, Any] = {"mode": "drop", "unique_indices": True, "wrap_negative_indices": False}


def _place(values: Array, when: Array, index: Array, column: int | None) -> tuple[Array, Array]:
    configs, size = values.shape[:2]
    place = size * jnp.arange(configs, dtype=jnp.int32) + index
    if column is None:
        return jnp.where(when, place, FAR), values.reshape(-1, *values.shape[2:])
    return jnp.where(when, place * values.shape[2] + column, FAR), values.reshape(-1)


def _place_across(values: Array, when: Array, index: Array) -> Array:
    configs = values.shape[1]
    return jnp.where(when, configs * index + jnp.arange(configs, dtype=jnp.int32), FAR)


def after(read: Array, when: Array) -> Array:
    """Make a write wait for a read of the same array, or else the loop copies the array.

    Args:
        read: What was read, never negative.
        when: Whether to write.
    """
    return when & (read >= 0)


def blocks(tokens: Array) -> Array:
    """Return the KV blocks that hold so many tokens."""
    return (tokens + (BLOCK_TOKENS - 1)) >> 4


def total(values: Array) -> Array:
    """Add up over the first axis in int32."""
    return jnp.sum(values, axis=0, dtype=jnp.int32)


def places(values: Array) -> Array:
    """Number the first axis, ``[places, 1]``."""
    return jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]


def send(server: Server, arrival: Array, s: State) -> State:
    """Let requests arrive while clients have room; jump to the next arrival if there is nothing to do.

    Args:
        server: The configurations.
        arrival: Arrivals, ticks, ``[configs, requests]``.
        s: The state.
    """
    sending = s.mode == SEND
    number = s.sent + jnp.arange(WINDOW, dtype=jnp.int32)[:, None]
    window = pick(arrival, number)
    target = s.completed + server.max_pending
    enters = (window <= s.now) & (number < target) & sending
    held = enters & (number >= s.room)
    entered = total(enters)
    sent = s.sent + entered
    more = entered == WINDOW
    empty = sending & ~more & (s.running == 0) & (sent - s.taken + s.preempted_waiting == 0)
    following = jnp.min(jnp.where(enters, FAR, window), axis=0)
    now = jnp.where(empty, jnp.minimum(following, server.horizon), s.now)
    over = sending & (now >= server.horizon)
    begins = sending & ~more & ~empty
    return s._replace(
        mode=jnp.where(over, DONE, jnp.where(begins, KEEP, s.mode)).astype(jnp.int32),
        now=now,
        sent=sent,
        room=jnp.where(sending & ~more, target, s.room),
        table=put(s.table, held, number, jnp.broadcast_to(s.now, held.shape), SENT),
    )


def apart(function: Callable[..., Result], s: State, *operands: Any) -> Result:
    """Return ``function(s, *operands)``, computed once.

    XLA computes what is cheap again in each place that uses it, and the scheduler is a long chain of cheap things; it
    does not look into a conditional. The condition holds always, which XLA cannot know.
    """
    shapes: Any = jax.eval_shape(function, s, *operands)

    def never(*_: Any) -> Result:
        nothing: Result = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return nothing

    result: Result = jax.lax.cond(s.step[0] > 0, function, never, s, *operands)
    return result


def arrange(server: Server, disk_s: Array, s: State) -> tuple[State, Array]:
    """Keep the running requests, or admit one that waits, or preempt one; say which adapter became active (-1: none).

    Args:
        server: The configurations.
        disk_s: Time to read each adapter from disk, s, ``[configs, adapters]``.
        s: The state.
    """
    choice = apart(lambda s: _choose(server, s), s)
    outcome = apart(lambda s, choice: _decide(server, s, choice), s, choice)
    move = outcome.move
    s = s._replace(
        mode=outcome.mode,
        overflow=s.overflow | choice.lost,
        free=outcome.free,
        running=s.running + outcome.admit - outcome.preempt,
        kv_tokens=outcome.kv_tokens,
        building=outcome.building,
        partial=outcome.partial,
    )
    s, newcomer = _note_adapter(s, move, choice.before, disk_s)
    s = _join_or_leave(s, move, choice.pop, outcome.started)
    s = _requeue(s, move, outcome.preempt, outcome.sampled)
    return _dequeue(s, move, outcome.admit, choice.from_preempted, choice.place), newcomer


def _choose(server: Server, s: State) -> Choice:
    """See whether the running requests can be kept, who waits, and which request the turn is about."""
    b, part = s.building, s.partial
    keeping, has_partial = s.mode == KEEP, part.request >= 0
    decoding = s.running - has_partial
    chunk = jnp.where(has_partial, jnp.minimum(part.total - part.computed, server.max_num_batched_tokens - decoding), 0)
    growth = pick_across(s.phase, s.step & 15) + blocks(part.computed + chunk) - blocks(part.computed)
    short = keeping & (growth > s.free)
    kept = keeping & ~short
    pop = short & ~has_partial
    entry, entry_finish, before = pick(s.log, (s.logged - 1) & (s.log.shape[1] - 1)).T
    admitting = (kept & ~has_partial & ~b.preempted) | (s.mode == ADMIT)

    has_slot = (s.last >= s.step) | (s.active < server.max_loras)
    key = jnp.min(jnp.where(has_slot, s.key, FAR), axis=0)
    place = jnp.clip(-1 - key, 0, s.preempted[0].shape[0] - 1)
    waiting, _, waiting_sampled = (pick_across(column, place) for column in s.preempted)
    from_preempted = key < 0
    request = jnp.where(pop, entry, jnp.where(from_preempted, waiting, key))
    request = jnp.where(kept & has_partial | short & has_partial, part.request, request)
    budget = jnp.where(kept, server.max_num_batched_tokens - decoding - chunk, b.budget)
    return Choice(
        decoding=jnp.where(kept, decoding, 0),
        chunk=chunk,
        kept=kept,
        go_on=kept & has_partial,
        drop=short & has_partial,
        pop=pop,
        undo=pop & (entry_finish >= s.step),
        finish=entry_finish,
        before=before,
        lost=pop & (s.logged <= s.log_lost),
        budget=budget,
        free=s.free - jnp.where(kept, growth, 0),
        admitting=admitting,
        room=admitting & (budget > 0) & (s.running < server.max_num_seqs),
        found=admitting & (key < s.sent),
        key=key,
        place=place,
        from_preempted=from_preempted,
        sampled=jnp.where(from_preempted, waiting_sampled, 0),
        request=jnp.clip(request, 0, s.table.shape[1] - 1),
    )


def _decide(server: Server, s: State, c: Choice) -> Outcome:
    """See whether the first request that waits fits, and what becomes of the one that the turn is about."""
    b, part = s.building, s.partial
    adapter, prompt, output, following, sent = pick(s.table, c.request).T
    length = prompt + c.sampled
    tokens = jnp.minimum(length, c.budget)
    fits = c.found & (blocks(jnp.where(server.full_prompt_must_fit, length, tokens)) <= c.free)
    admit = c.room & fits
    blocked = c.room & ~fits
    whole = tokens == length
    budget = c.budget - jnp.where(admit, tokens, 0)
    again = admit & (budget > 0) & (s.running + 1 < server.max_num_seqs) & (s.waiting > 1)

    join = (c.go_on & (c.chunk == part.total - part.computed)) | (admit & whole)
    preempt = c.drop | c.undo
    sampled = jnp.where(c.go_on | c.drop, part.sampled, c.sampled)
    sampled = jnp.where(c.undo, output - (c.finish - s.step + 1), sampled)
    computed = jnp.where(c.drop, part.computed, prompt + sampled - c.undo.astype(jnp.int32))
    started = join & (sampled == 0)
    prefill = jnp.where(c.go_on, c.chunk, jnp.where(admit, tokens, 0))
    goes_on = (c.go_on & ~join) | (admit & ~whole)
    request = jnp.where(goes_on, c.request, jnp.where(c.go_on | c.drop, -1, part.request))
    so_far = jnp.where(c.go_on, part.computed + c.chunk, jnp.where(admit, tokens, part.computed))
    mode = jnp.where(c.go_on & ~b.preempted, ADMIT, jnp.where(c.kept & b.preempted, RUN, s.mode))
    mode = jnp.where(c.admitting, jnp.where(again, ADMIT, RUN), jnp.where(c.lost, DONE, mode))
    return Outcome(
        move=Move(
            sign=join.astype(jnp.int32) - c.undo.astype(jnp.int32),
            request=c.request,
            adapter=adapter,
            following=following,
            computed=computed,
            input=prompt,
            output=output,
            sent=sent,
            finish=jnp.where(c.undo, c.finish, s.step + output - sampled - 1),
            needed=c.go_on | admit,
        ),
        admit=admit,
        preempt=preempt,
        started=started,
        sampled=sampled,
        mode=mode,
        free=c.free - jnp.where(admit, blocks(tokens), 0) + jnp.where(preempt, blocks(computed), 0),
        kv_tokens=s.kv_tokens + c.decoding + prefill - jnp.where(preempt, computed, 0),
        building=b._replace(
            budget=budget,
            prefill_tokens=b.prefill_tokens + prefill,
            first_tokens=b.first_tokens + started,
            rejoined=b.rejoined + (join & ~started),
            preempted=b.preempted | preempt,
            stop=jnp.where(admit | blocked, jnp.where(blocked & ~c.found, FAR, c.key), b.stop),
        ),
        partial=Partial(
            request=request,
            computed=jnp.where(request >= 0, so_far, 0),
            total=jnp.where(admit, length, part.total),
            sampled=jnp.where(admit, sampled, part.sampled),
        ),
    )


def _note_adapter(s: State, move: Move, before: Array, disk_s: Array) -> tuple[State, Array]:
    """Note how long a request needs its adapter; a preempted one takes its claim back."""
    adapters, mask = s.last.shape[0] - 1, s.ring.shape[1] - 1
    adapter = jnp.minimum(move.adapter, adapters - 1)
    own = move.adapter < adapters
    last = pick_across(s.last, adapter)
    claim = jnp.maximum(last, jnp.where(move.sign > 0, move.finish, s.step))
    value = jnp.where(move.needed, claim, jnp.maximum(before, s.step - 1))
    changes = own & (move.needed | (move.sign < 0))
    was, will = changes & (last >= s.step), changes & (value >= s.step)
    new = own & move.needed & (last < s.step - 1)
    never = new & (last == NEVER)
    ring = add(s.ring, was, last & mask, -1, LAST_NEEDED)
    ring = add(ring, will, value & mask, 1, LAST_NEEDED)
    b = s.building
    s = s._replace(
        active=s.active + will - was,
        ring=ring,
        last=put_across(s.last, changes, adapter, value),
        since=put_across(s.since, new, adapter, s.step),
        earlier=put_across(s.earlier, new, adapter, last),
        building=b._replace(
            newcomers=b.newcomers + new,
            first_touched=b.first_touched + never,
            disk_s=b.disk_s + jnp.where(never, pick(disk_s, adapter), 0.0),
        ),
        log=put(
            s.log, move.sign > 0, s.logged & (s.log.shape[1] - 1), jnp.stack([move.request, move.finish, last], axis=1)
        ),
    )
    return s, jnp.where(new, adapter, -1)


def _join_or_leave(s: State, move: Move, pop: Array, started: Array) -> State:
    """Enter a request into the ring of steps or take it out again."""
    mask, sign = s.ring.shape[1] - 1, move.sign
    begin = s.step + (sign > 0)
    phase = (begin - move.computed) & 15
    last_block = move.finish - ((move.finish - phase) & 15)
    grows = jnp.where(last_block >= begin, sign, 0)
    tokens = move.input + move.output
    leaving = jnp.stack([sign, sign * blocks(tokens - 1), sign * tokens, 0 * sign, 0 * sign], axis=1)
    ring = add(s.ring, sign != 0, move.finish & mask, leaving)
    ring = add(ring, grows != 0, last_block & mask, grows, LAST_BLOCK)
    logged = s.logged + (sign > 0) - pop
    size = s.first.shape[1]
    noted = jnp.stack([move.sent, s.step], axis=1)
    first_put = s.first_put + started
    return s._replace(
        ring=ring,
        phase=s.phase + jnp.where(places(s.phase) == phase, grows, 0),
        logged=logged,
        log_lost=jnp.maximum(s.log_lost, logged - s.log.shape[1]),
        first=put(s.first, started, s.first_put & (size - 1), noted),
        first_put=first_put,
        overflow=s.overflow | (first_put - s.first_got > size),
    )


def _requeue(s: State, move: Move, preempt: Array, sampled: Array) -> State:
    """Put a preempted request in front of the queue."""
    size = s.preempted[0].shape[0]
    overflow = preempt & (s.places == size)
    stored = preempt & ~overflow
    request, adapter, before = s.preempted
    return s._replace(
        mode=jnp.where(overflow, DONE, s.mode),
        overflow=s.overflow | overflow,
        key=put_across(s.key, preempt, move.adapter, -1 - s.places),
        preempted=(
            put_across(request, stored, s.places, move.request),
            put_across(adapter, stored, s.places, move.adapter),
            put_across(before, stored, s.places, sampled),
        ),
        places=s.places + preempt,
        preempted_waiting=s.preempted_waiting + preempt,
        counts=s.counts.at[PREEMPTIONS].add(preempt),
    )


def _dequeue(s: State, move: Move, admit: Array, from_preempted: Array, place: Array) -> State:
    """Take an admitted request out of the queue."""
    fresh, again = admit & ~from_preempted, admit & from_preempted
    request, adapter, sampled = s.preempted
    request = put_across(request, again, place, -1)
    filled = (request >= 0) & (places(request) < s.places)
    next_place = jnp.max(jnp.where(filled & (adapter == move.adapter), places(request), -1), axis=0)
    used = 1 + jnp.max(jnp.where(filled, places(request), -1), axis=0)
    head = jnp.where(fresh, move.following, pick_across(s.head, move.adapter))
    key = jnp.where(again & (next_place >= 0), -1 - next_place, head)
    bit = jnp.left_shift(jnp.uint32(1), (move.request & 31).astype(jnp.uint32))
    return s._replace(
        taken=s.taken + fresh,
        head=put_across(s.head, fresh, move.adapter, head),
        key=put_across(s.key, admit, move.adapter, key),
        preempted=(request, adapter, sampled),
        places=jnp.where(again, used, s.places),
        preempted_waiting=s.preempted_waiting - again,
        admitted=add(s.admitted, fresh, move.request >> 5, bit),
        admitted_by_block=add_across(s.admitted_by_block, fresh, move.request >> 10, 1),
        admitted_by_adapter=add_across(s.admitted_by_adapter, fresh, move.adapter, 1),
    )


def distances(s: State, newcomer: Array) -> Array:
    """Note for an adapter that became active how many others were used since, in the order of touching.

    An adapter is on the GPU if fewer than ``max_loras`` others were used since its last use; here use is counted as it
    will be when the step touches the newcomer. Others that this step made active count if they come before it.
    """
    order = places(s.last)
    own = jnp.maximum(newcomer, 0)
    new = (s.since == s.step) & (order != own)
    used = jnp.where(new, s.earlier, jnp.minimum(s.last, s.step - 1))
    last = pick_across(s.earlier, own)
    later = (used > last) | ((used == last) & (order > own))
    counted = jnp.where(new, later | (order < own), later) & (order != own) & (s.last < FAR)
    distance = s.distance + (new & later & (order > own))
    distance = jnp.where(order == own, total(counted), distance)
    return jnp.where(newcomer >= 0, distance, s.distance)


def loads_of_newcomers(server: Server, s: State) -> Array:
    """Count the adapters that this step made active and that are not on the GPU any more, or never were."""
    new = s.since == s.step
    return total(new & ((s.earlier == NEVER) | (s.distance >= server.max_loras)))


def loads_of_evicted(server: Server, s: State, *, one: bool) -> Array:
    """Count the adapters that stay active but are evicted by newcomers that the step touches first, and loaded again.

    Going through the adapters in the order of touching, each newcomer takes a slot and each adapter that has left since
    the step before gives one; where more are taken than were free, the next active adapter has been evicted.

    Args:
        server: The configurations.
        s: The state.
        one: Whether no step has more than one newcomer: then a comparison of places does.
    """
    order = places(s.last)
    new = s.since == s.step
    stays = (s.last >= s.step) & (s.last < FAR) & ~new
    left = s.last == s.step - 1
    free = server.max_loras - s.active_before
    if one:
        after = jnp.min(jnp.where(new, order, FAR), axis=0)
        until = jnp.min(jnp.where(left, order, FAR), axis=0)
        return jnp.where(free == 0, total(stays & (order > after) & (order < until)), 0)
    return total(stays & (_running_total(new.astype(jnp.float32) - left.astype(jnp.float32)) > free))


def _running_total(values: Array) -> Array:
    """Add up along the first axis, whose size is a multiple of 16, by products with triangular matrices."""
    groups = values.reshape(-1, 16, values.shape[1])
    inside = jnp.einsum("ij,gjc->gic", jnp.tril(jnp.ones((16, 16))), groups)
    number = groups.shape[0]
    before = jnp.tril(jnp.ones((number, number)), -1) @ inside[:, -1]
    return (inside + before[:, None]).reshape(values.shape)


def passed_over(s: State) -> Array:
    """Count the waiting requests that stand before the one at which admission stopped."""
    stop, request = s.building.stop, s.preempted[0]
    in_front = total((request >= 0) & (places(request) < s.places) & (places(request) > -1 - stop))
    block = jnp.clip(stop >> 10, 0, s.admitted_by_block.shape[0] - 1)
    admitted = total(jnp.where(places(s.admitted_by_block) < block, s.admitted_by_block, 0))
    word = jnp.arange(32, dtype=jnp.int32)[:, None]
    words = pick(s.admitted, block * 32 + word)
    room = jnp.clip(stop - block * 1024 - 32 * word, 0, 32)
    mask = jnp.where(room >= 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << room.astype(jnp.uint32)) - 1)
    admitted = admitted + total(jax.lax.population_count(words & mask))
    return jnp.where(stop < 0, in_front, s.preempted_waiting + stop - admitted)


def run(server: Server, s: State, work: Work) -> State:
    """Let the step that was put together run, if it is ready, and take out the requests that it finishes."""
    b = s.building
    runs = s.mode == RUN
    load = jnp.round(work.load_s / server.tick_s).astype(jnp.int32)
    compute = jnp.maximum(jnp.round(work.compute_s / server.tick_s), 1.0).astype(jnp.int32)
    end = jnp.where(runs, s.now + load + compute, s.now)
    observed_s = jnp.maximum(jnp.minimum(end, server.horizon) - s.now, 0) * server.tick_s
    cell = s.step & (s.ring.shape[1] - 1)
    leaving, leaving_blocks, leaving_tokens, last_block, last_needed = (
        jnp.where(runs, value, 0) for value in pick(s.ring, cell).T
    )
    inside = runs & (end <= server.horizon)
    rates = (s.running, s.waiting, server.kv_blocks - s.free, work.adapters, s.streaming)
    loading_s = jnp.minimum(load * server.tick_s, observed_s)
    s, delay_s, noted_end = _note_first_token(server, s)
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
    here = places(s.phase) == s.step & 15
    zero = jnp.zeros_like(s.step)
    fresh = Building(zero, zero, zero, zero, zero > 0, zero - FAR, zero, zero, jnp.zeros_like(b.disk_s))
    return s._replace(
        mode=jnp.where(runs, SEND, s.mode),
        now=end,
        step=s.step + runs,
        completed=s.completed + leaving,
        free=s.free + leaving_blocks,
        running=s.running - leaving,
        active=s.active - last_needed,
        active_before=jnp.where(runs, s.active, s.active_before),
        kv_tokens=s.kv_tokens - (leaving_tokens - leaving),
        streaming=s.streaming + jnp.where(runs, b.first_tokens, 0) - leaving,
        building=jax.tree.map(lambda a, c: jnp.where(runs, a, c), fresh, b),
        ring=put(s.ring, after(leaving, runs), cell, jnp.zeros((cell.shape[0], s.ring.shape[2]))),
        phase=s.phase - jnp.where(here, last_block, 0),
        limit=jnp.where(runs, _limit(server, s), s.limit),
        ends=put(s.ends, after(noted_end, runs), s.step & (s.ends.shape[1] - 1), end),
        sums=sums,
        sums_lost=lost,
        counts=s.counts + jnp.where(inside, jnp.stack([jnp.broadcast_to(event, s.step.shape) for event in events]), 0),
    )


def _limit(server: Server, s: State) -> Array:
    """Why the requests left in the queue were not admitted."""
    b = s.building
    limit = jnp.where(b.stop == FAR, Limit.SLOTS, Limit.KV_CACHE)
    limit = jnp.where(s.running >= server.max_num_seqs, Limit.SEQUENCES, limit)
    limit = jnp.where((b.budget == 0) & ~b.preempted, Limit.TOKEN_BUDGET, limit)
    return jnp.where(s.waiting == 0, Limit.NONE, limit).astype(jnp.int32)


def _note_first_token(server: Server, s: State) -> tuple[State, Array, Array]:
    """Note the delay of one first token whose step has run; there is at most one more in every turn."""
    sent, when = pick(s.first, s.first_got & (s.first.shape[1] - 1)).T
    ready = (s.first_got < s.first_put) & (when < s.step)
    end = pick(s.ends, when & (s.ends.shape[1] - 1))
    counts = ready & (end <= server.horizon)
    delay_s = jnp.where(counts, (end - sent) * server.tick_s, 0.0)
    place = jnp.log2(jnp.maximum(delay_s, SHORTEST_S) / SHORTEST_S) * BINS_PER_DOUBLING
    place = jnp.minimum(place.astype(jnp.int32), BINS - 1)
    histogram = add(s.histogram, counts, place, 1)
    return (
        s._replace(histogram=histogram, first_got=s.first_got + ready, first_put=jnp.where(sent >= 0, s.first_put, 0)),
        delay_s,
        end,
    )


def _add(sums: Array, lost: Array, values: Array) -> tuple[Array, Array]:
    """Compensated summation (Kahan): float32 would lose what a step adds to hours."""
    values = values - lost
    total = sums + values
    return total, (total - sums) - values
