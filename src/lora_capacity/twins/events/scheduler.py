"""A turn of the scheduler: who arrives, who is kept, who is admitted or preempted.

A *turn* moves at most one request of each server: it admits one, goes on with a prompt that was cut, or preempts one.
Once nobody else can be admitted, the next turn begins by letting the step run.

Source: the behaviour of vLLM 0.8.5, as in ``vllm/v1/core/sched/scheduler.py``.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from lora_capacity.twins.events.arrays import (
    add,
    apart,
    least,
    pick,
    pick_across,
    places,
    put,
    put_across,
    read,
    seldom,
    total,
    when_any,
)
from lora_capacity.twins.events.asynchronous import keep_in_use, preempt_finished, slots_in_use
from lora_capacity.twins.events.queue import Waiting, dequeue, first_waiting, requeue, stopped
from lora_capacity.twins.events.requests import RequestTables
from lora_capacity.twins.events.state import (
    ADMIT,
    DONE,
    FAR,
    FOLLOWED,
    FOLLOWED_ONE_IN,
    KEEP,
    LAST_BLOCK,
    LAST_NEEDED,
    NEVER,
    RUN,
    SEND,
    WINDOW,
    Building,
    Followed,
    Move,
    Partial,
    Server,
    State,
    blocks,
)


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
        finished: Whether its last token is in flight: it is preempted all the same. None if no step is in flight.
        finish: Step of its last token.
        before: ``last`` of its adapter before its admission.
        lost: Whether the log does not reach that far.
        budget: Tokens left once the running requests have had theirs.
        free: KV blocks left then.
        admitting: Whether a request may be admitted.
        room: Whether there is room for it in budget and batch.
        waiting: The first that waits and has a slot.
        found: Whether there is one and it may be admitted.
        request: The request that the turn is about.
    """

    decoding: Array
    chunk: Array
    kept: Array
    go_on: Array
    drop: Array
    pop: Array
    undo: Array
    finished: Array | None
    finish: Array
    before: Array
    lost: Array
    budget: Array
    free: Array
    admitting: Array
    room: Array
    waiting: Waiting
    found: Array
    request: Array


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


def send(server: Server, s: State) -> State:
    """Let requests arrive while clients have room; jump to the next arrival if there is nothing to do.

    Args:
        server: The configurations.
        s: The state.
    """
    sending = s.mode == SEND
    number = s.sent + jnp.arange(WINDOW, dtype=jnp.int32)[:, None]
    window = read(s, s.sent_at, number)
    target = s.completed + server.max_pending
    enters = (window <= s.now) & (number < target) & sending
    held = enters & (number >= s.room)
    sent_at = s.sent_at
    for i in range(WINDOW):
        sent_at = put(sent_at, held[i], number[i], s.now)
    entered = total(enters)
    sent = s.sent + entered
    more = entered == WINDOW
    empty = sending & ~more & (s.running == 0) & (s._replace(sent=sent).waiting == 0)
    following = least(jnp.where(enters, FAR, window))
    now = jnp.where(empty, jnp.minimum(following, server.horizon), s.now)
    over = sending & (now >= server.horizon)
    begins = sending & ~more & ~empty
    return s._replace(
        mode=jnp.where(over, DONE, jnp.where(begins, KEEP, s.mode)).astype(jnp.int32),
        now=now,
        sent=sent,
        room=jnp.where(sending & ~more, target, s.room),
        sent_at=sent_at,
    )


def arrange(server: Server, requests: RequestTables, disk_s: Array, s: State) -> tuple[State, Array]:
    """Keep the running requests, or admit one that waits, or preempt one; say which adapter became active (-1: none).

    Args:
        server: The configurations.
        requests: The requests of each.
        disk_s: Time to read each adapter from disk, s, ``[configs, adapters]``.
        s: The state.
    """
    choice = apart(lambda s: _choose(server, s), s)
    outcome = apart(lambda s, choice: _decide(server, requests, s, choice), s, choice)
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

    def moved(carry: tuple[State, Array]) -> tuple[State, Array]:
        s, newcomer = _note_adapter(carry[0], move, choice.before, disk_s)
        s = _join_or_leave(s, move, choice.pop, outcome.started)
        s = requeue(s, move, outcome.preempt, outcome.sampled)
        if choice.finished is not None:
            s = preempt_finished(s, choice.finished, move.input + move.output)
        return dequeue(s, move, outcome.admit, choice.waiting.from_preempted, choice.waiting.place), newcomer

    moves = move.needed | (move.sign != 0) | outcome.preempt | choice.pop
    s, newcomer = seldom(moves, moved, (s, jnp.full_like(s.step, -1)))
    return seldom(s.mode == ADMIT, lambda s: _look_on(server, s), s), newcomer


def _choose(server: Server, s: State) -> Choice:
    """See whether the running requests can be kept, who waits, and which request the turn is about."""
    b, part = s.building, s.partial
    keeping, has_partial = s.mode == KEEP, part.request >= 0
    decoding = s.running - has_partial
    if s.flight is not None:
        decoding = decoding - s.flight.leaving
    chunk = jnp.where(has_partial, jnp.minimum(part.total - part.computed, server.max_num_batched_tokens - decoding), 0)
    growth = pick_across(s.phase, s.step & 15) + blocks(part.computed + chunk) - blocks(part.computed)
    short = keeping & (growth > s.free)
    kept = keeping & ~short
    pop = short & ~has_partial
    entry, entry_finish, before = pick(s.log, (s.logged - 1) & (s.log.shape[1] - 1)).T
    admitting = (kept & ~has_partial & ~b.preempted) | (s.mode == ADMIT)

    slots, since = slots_in_use(server, s)
    looking = admitting & (s.waiting > 0)
    waiting: Waiting = when_any(looking, lambda: first_waiting(s, since, slots < server.max_loras))
    request = jnp.where(pop, entry, waiting.request)
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
        finished=None if s.flight is None else pop & (entry_finish == s.step - 1) & (s.flight.leaving > 0),
        finish=entry_finish,
        before=before,
        lost=pop & (s.logged <= s.log_lost),
        budget=budget,
        free=s.free - jnp.where(kept, growth, 0),
        admitting=admitting,
        room=admitting & (budget > 0) & (s.running < server.max_num_seqs),
        waiting=waiting,
        found=looking & waiting.found,
        request=jnp.clip(request, 0, s.sent_at.shape[1] - 1),
    )


def _decide(server: Server, requests: RequestTables, s: State, c: Choice) -> Outcome:
    """See whether the first request that waits fits, and what becomes of the one that the turn is about."""
    b, part = s.building, s.partial
    adapter, prompt, output = pick(requests.table, c.request).astype(jnp.int32).T
    following, sent = pick(requests.following, c.request), pick(s.sent_at, c.request)
    length = prompt + c.waiting.sampled
    tokens = jnp.minimum(length, c.budget)
    fits = c.found & (blocks(length if server.rules.full_prompt_must_fit else tokens) <= c.free)
    admit = c.room & fits
    blocked = c.room & ~fits
    whole = tokens == length
    budget = c.budget - jnp.where(admit, tokens, 0)
    again = admit & (budget > 0) & (s.running + 1 < server.max_num_seqs) & (s.waiting > 1)

    join = (c.go_on & (c.chunk == part.total - part.computed)) | (admit & whole)
    preempt = c.drop | c.undo
    sampled = jnp.where(c.go_on | c.drop, part.sampled, c.waiting.sampled)
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
        building=stopped(b, admit | blocked, blocked & ~c.found, c.waiting)._replace(
            budget=budget,
            prefill_tokens=b.prefill_tokens + prefill,
            first_tokens=b.first_tokens + started,
            rejoined=b.rejoined + (join & ~started),
            preempted=b.preempted | preempt,
        ),
        partial=Partial(
            request=request,
            computed=jnp.where(request >= 0, so_far, 0),
            total=jnp.where(admit, length, part.total),
            sampled=jnp.where(admit, sampled, part.sampled),
        ),
    )


def _look_on(server: Server, s: State) -> State:
    """Let the step run if nobody else who waits has a slot, which the next turn would find."""
    slots, since = slots_in_use(server, s)
    waiting = first_waiting(s, since, slots < server.max_loras)
    room = (s.building.budget > 0) & (s.running < server.max_num_seqs)
    nobody = (s.mode == ADMIT) & room & ~waiting.found
    return s._replace(
        mode=jnp.where(nobody, RUN, s.mode),
        building=stopped(s.building, nobody, nobody, waiting),
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
    s = keep_in_use(s, last, own & move.needed)
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
        followed=_follow(s, move, started),
        phase=s.phase + jnp.where(places(s.phase) == phase, grows, 0),
        logged=logged,
        log_lost=jnp.maximum(s.log_lost, logged - s.log.shape[1]),
        first=put(s.first, started, s.first_put & (size - 1), noted),
        first_put=first_put,
        overflow=s.overflow | (first_put - s.first_got > size),
    )


def _follow(s: State, move: Move, started: Array) -> Followed:
    """Begin to follow a request that starts, if there is a place; one that is followed may be preempted and rejoin."""
    f, sign = s.followed, move.sign
    own = (f.request == move.request) & (sign != 0)
    row = places(f.request)
    place = least(jnp.where(f.request < 0, row, FOLLOWED))
    drawn = (move.request.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)) >> 16
    begins = (row == place) & started & (drawn % FOLLOWED_ONE_IN == 0)
    return Followed(
        request=jnp.where(begins, move.request, f.request),
        sent=jnp.where(begins, move.sent, f.sent),
        first_step=jnp.where(begins, s.step, f.first_step),
        first_end=f.first_end,
        finish=jnp.where(begins | (own & (sign > 0)), move.finish, jnp.where(own, FAR, f.finish)),
        later_tokens=jnp.where(begins, move.output - 1, f.later_tokens),
        undisturbed=begins | (f.undisturbed & ~(own & (sign < 0))),
    )
