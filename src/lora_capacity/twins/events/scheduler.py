"""An iteration of the scheduler: who arrives, who is kept, who is admitted or preempted.

An *iteration* moves at most one request: it admits one, goes on with a prompt that was cut, or preempts one. Once
nobody else can be admitted, the next iteration begins by letting the step run.

Source: the behaviour of vLLM 0.8.5, as in ``vllm/v1/core/sched/scheduler.py``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_capacity.twins.events.adapter_slots import note_use
from lora_capacity.twins.events.arrays import add, apart, least, put, seldom, total, when_any
from lora_capacity.twins.events.asynchronous import preempt_finished
from lora_capacity.twins.events.prefix_cache import Found
from lora_capacity.twins.events.queue import Candidate, dequeue, first_with_slot, requeue, stopped
from lora_capacity.twins.events.server import Server
from lora_capacity.twins.events.shared_blocks import find, free_finished, move_blocks
from lora_capacity.twins.events.state import (
    ADMIT,
    DONE,
    FAR,
    KEEP,
    LAST_BLOCK,
    RUN,
    SEND,
    WINDOW,
    ChunkedPrefill,
    Flag,
    Move,
    Number,
    PendingStep,
    State,
)
from lora_capacity.twins.events.statistics import expect_first_token, record_move, trace


class Choice(NamedTuple):
    """What an iteration finds before it looks at the request that it is about.

    Attributes:
        decoding: Decoding requests that this iteration keeps.
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
        front: Those of them that nobody will look for in front of all others; None without prefix caching.
        grown: Blocks that decoding requests have got in a step in which one finds none; None likewise.
        admitting: Whether a request may be admitted.
        room: Whether there is room for it in budget and batch.
        candidate: The first that waits and has a slot.
        found: Whether there is one and it may be admitted.
        request: The request that the iteration is about.
    """

    decoding: Number
    chunk: Number
    kept: Flag
    go_on: Flag
    drop: Flag
    pop: Flag
    undo: Flag
    finished: Flag | None
    finish: Number
    before: Number
    lost: Flag
    budget: Number
    free: Number
    front: Number | None
    grown: Number | None
    admitting: Flag
    room: Flag
    candidate: Candidate
    found: Flag
    request: Number


class Outcome(NamedTuple):
    """What an iteration does: a move, new values of the state, and more.

    Attributes:
        admit: Whether the request is admitted, bool.
        preempt: Whether it is preempted, bool.
        started: Whether it gets its first token, bool.
        sampled: Tokens that it had sampled.
        found: Blocks that it finds if it is admitted; None without prefix caching.
        computed: Tokens of it that are computed once the step has run, if it is admitted or goes on; None likewise.
    """

    move: Move
    admit: Flag
    preempt: Flag
    started: Flag
    sampled: Number
    mode: Number
    free: Number
    front: Number | None
    kv_tokens: Number
    pending: PendingStep
    chunked: ChunkedPrefill
    found: Found | None
    computed: Number | None


def send(server: Server, s: State) -> State:
    """Let requests arrive while clients have room; jump to the next arrival if there is nothing to do."""
    c, sending = s.clients, s.mode == SEND
    number = c.sent + jnp.arange(WINDOW, dtype=jnp.int32)
    window = apart(s.step, lambda: jax.lax.dynamic_slice_in_dim(c.sent_at, c.sent, WINDOW))
    target = s.batch.completed + server.max_pending
    enters = (window <= s.now) & (number < target) & sending
    held = enters & (number >= c.room)
    sent_at = seldom(
        held.any(),
        lambda sent_at: jax.lax.dynamic_update_slice_in_dim(sent_at, jnp.where(held, s.now, window), c.sent, 0),
        c.sent_at,
    )
    entered = total(enters)
    more = entered == WINDOW
    clients = c._replace(sent_at=sent_at, sent=c.sent + entered, room=jnp.where(sending & ~more, target, c.room))
    empty = sending & ~more & (s.batch.running == 0) & (s._replace(clients=clients).waiting == 0)
    following = least(jnp.where(enters, FAR, window))
    now = jnp.where(empty, jnp.minimum(following, server.horizon), s.now)
    over = sending & (now >= server.horizon)
    begins = sending & ~more & ~empty
    mode = jnp.where(over, DONE, jnp.where(begins, KEEP, s.mode)).astype(jnp.int32)
    return s._replace(mode=mode, now=now, clients=clients)


def arrange(server: Server, s: State) -> tuple[State, Number]:
    """Keep the running requests, or admit one, or preempt one; say which adapter became active, -1 for none."""
    before = s.batch.chunked.computed
    choice = apart(s.step, lambda: _choose(server, s))
    outcome = apart(s.step, lambda: _decide(server, s, choice))
    move, admit, preempt = outcome.move, outcome.admit, outcome.preempt
    s = s._replace(
        mode=outcome.mode,
        overflow=s.overflow | choice.lost,
        batch=s.batch._replace(running=s.batch.running + admit - preempt, chunked=outcome.chunked),
        kv=s.kv._replace(free=outcome.free, tokens=outcome.kv_tokens),
        prefixes=None if s.prefixes is None or outcome.front is None else s.prefixes._replace(front=outcome.front),
        pending=outcome.pending,
    )

    def moved(carry: tuple[State, Number]) -> tuple[State, Number]:
        s, newcomer, last = note_use(server, carry[0], move, choice.before)
        s = move_blocks(server, s, move, outcome.found, choice.go_on, before, outcome.computed, preempt)
        s = _join_or_leave(server, s, move, choice.pop, outcome.started, last)
        queue, overflow = requeue(s.queue, move, preempt, outcome.sampled)
        s = s._replace(mode=jnp.where(overflow, DONE, s.mode), overflow=s.overflow | overflow, queue=queue)
        preempted = preempt.astype(jnp.int32)
        if choice.finished is not None:
            s = free_finished(server, s, move, choice.finished)
            s, preempted = preempt_finished(s, choice.finished, move.input + move.output), preempted + choice.finished
        fresh = admit & ~choice.candidate.from_preempted
        queue = dequeue(s.queue, move, admit, choice.candidate)
        return s._replace(queue=queue, statistics=record_move(s, move, fresh, preempted)), newcomer

    moves = move.needed | (move.sign != 0) | preempt | choice.pop
    s, newcomer = seldom(moves, moved, (s, jnp.full_like(s.step, -1)))
    return seldom(s.mode == ADMIT, lambda s: _look_ahead(server, s), s), newcomer


def _choose(server: Server, s: State) -> Choice:
    """See whether the running requests can be kept, who waits, and which request the iteration is about."""
    b, kv, batch, part = s.pending, s.kv, s.batch, s.batch.chunked
    keeping, has_chunked = s.mode == KEEP, part.request >= 0
    decoding = batch.running - has_chunked
    if s.in_flight is not None:
        decoding = decoding - s.in_flight.leaving
    left = server.max_num_batched_tokens - decoding
    chunk = jnp.where(has_chunked, jnp.minimum(part.total - part.computed, left), 0)
    of_decoding = kv.of_decoding(s.step) if b.grown is None else kv.of_decoding(s.step) - b.grown
    growth = of_decoding + kv.blocks(part.computed + chunk) - kv.blocks(part.computed)
    short = keeping & (growth > kv.free)
    kept = keeping & ~short
    pop = short & ~has_chunked
    taken, front, grown = jnp.where(kept, growth, 0), None, None
    if s.prefixes is not None and b.grown is not None:
        # Free blocks are taken in order, so those who find some take them before others give theirs back.
        some = jnp.where(short, jnp.minimum(of_decoding, kv.free), 0)
        taken, grown = taken + some, b.grown + some
        front = jnp.maximum(s.prefixes.front - taken, 0)
    entry, entry_finish, before = batch.log[(batch.logged - 1) & (batch.log.shape[0] - 1)]
    # vLLM admits nobody in a step that preempted somebody (``if not preempted_reqs`` in ``schedule``).
    admitting = (kept & ~has_chunked & ~b.preempted) | (s.mode == ADMIT)

    looking = admitting & (s.waiting > 0)
    candidate: Candidate = when_any(looking, lambda: first_with_slot(server, s))
    request = jnp.where(pop, entry, candidate.request)
    request = jnp.where(kept & has_chunked | short & has_chunked, part.request, request)
    budget = jnp.where(kept, left - chunk, b.budget)
    return Choice(
        decoding=jnp.where(kept, decoding, 0),
        chunk=chunk,
        kept=kept,
        go_on=kept & has_chunked,
        drop=short & has_chunked,
        pop=pop,
        undo=pop & (entry_finish >= s.step),
        finished=None if s.in_flight is None else pop & (entry_finish == s.step - 1) & (s.in_flight.leaving > 0),
        finish=entry_finish,
        before=before,
        lost=pop & (batch.logged <= batch.log_lost),
        budget=budget,
        free=kv.free - taken,
        front=front,
        grown=grown,
        admitting=admitting,
        room=admitting & (budget > 0) & (batch.running < server.max_num_seqs),
        candidate=candidate,
        found=looking & candidate.found,
        request=jnp.clip(request, 0, s.clients.sent_at.shape[0] - 1),
    )


def _decide(server: Server, s: State, c: Choice) -> Outcome:
    """See whether the first request that waits fits, and what becomes of the one that the iteration is about."""
    b, kv, part = s.pending, s.kv, s.batch.chunked
    adapter, prompt, output = server.requests.table[c.request].astype(jnp.int32)
    length = prompt + c.candidate.sampled
    found = find(server, s, c.found, c.front, c.free, c.request, adapter)
    cached, in_use = jnp.zeros_like(length), jnp.zeros_like(length)
    if found is not None:
        cached, in_use = found.blocks * kv.block_size, found.blocks - found.freed
    if server.requests.cached_tokens is not None:
        cached = jnp.maximum(cached, server.requests.cached_tokens[c.request])
    tokens = jnp.minimum(length - cached, c.budget)
    needed = kv.blocks(length if server.rules.full_prompt_must_fit else cached + tokens) - in_use
    if server.watermark_blocks is not None:
        needed = needed + jnp.where(s.batch.running > 0, server.watermark_blocks, 0)
    fits = c.found & (needed <= c.free)
    admit = c.room & fits
    blocked = c.room & ~fits
    whole = tokens == length - cached
    new_blocks = jnp.where(admit, kv.blocks(cached + tokens) - in_use, 0)
    budget = c.budget - jnp.where(admit, tokens, 0)
    again = admit & (budget > 0) & (s.batch.running + 1 < server.max_num_seqs) & (s.waiting > 1)

    join = (c.go_on & (c.chunk == part.total - part.computed)) | (admit & whole)
    preempt = c.drop | c.undo
    sampled = jnp.where(c.go_on | c.drop, part.sampled, c.candidate.sampled)
    sampled = jnp.where(c.undo, output - (c.finish - s.step + 1), sampled)
    computed = jnp.where(c.drop, part.computed, prompt + sampled - c.undo.astype(jnp.int32))
    started = join & (sampled == 0)
    prefill = jnp.where(c.go_on, c.chunk, jnp.where(admit, tokens, 0))
    goes_on = (c.go_on & ~join) | (admit & ~whole)
    request = jnp.where(goes_on, c.request, jnp.where(c.go_on | c.drop, -1, part.request))
    so_far = jnp.where(c.go_on, part.computed + c.chunk, jnp.where(admit, cached + tokens, part.computed))
    mode = jnp.where(c.go_on & ~b.preempted, ADMIT, jnp.where(c.kept & b.preempted, RUN, s.mode))
    mode = jnp.where(c.admitting, jnp.where(again, ADMIT, RUN), jnp.where(c.lost, DONE, mode))
    return Outcome(
        move=Move(
            sign=join.astype(jnp.int32) - c.undo.astype(jnp.int32),
            request=c.request,
            adapter=adapter,
            following=server.requests.following[c.request],
            computed=computed,
            input=prompt,
            output=output,
            sent=s.clients.sent_at[c.request],
            finish=jnp.where(c.undo, c.finish, s.step + output - sampled - 1),
            needed=c.go_on | admit,
        ),
        admit=admit,
        preempt=preempt,
        started=started,
        sampled=sampled,
        mode=mode,
        free=c.free - new_blocks + (jnp.where(preempt, kv.blocks(computed), 0) if s.prefixes is None else 0),
        front=_left_in_front(c, new_blocks, admit, found),
        kv_tokens=kv.tokens + c.decoding + prefill + jnp.where(admit, cached, 0) - jnp.where(preempt, computed, 0),
        pending=stopped(b, admit | blocked, blocked & ~c.found, c.candidate)._replace(
            budget=budget,
            grown=c.grown,
            prefill_tokens=b.prefill_tokens + prefill,
            first_tokens=b.first_tokens + started,
            rejoined=b.rejoined + (join & ~started),
            preempted=b.preempted | preempt,
        ),
        chunked=ChunkedPrefill(
            request=request,
            computed=jnp.where(request >= 0, so_far, 0),
            total=jnp.where(admit, length, part.total),
            sampled=jnp.where(admit, sampled, part.sampled),
        ),
        found=found,
        computed=None if found is None else so_far,
    )


def _left_in_front(c: Choice, new_blocks: Number, admit: Flag, found: Found | None) -> Number | None:
    """Return the blocks left in front of all places once a request is admitted, which finds some of its new blocks."""
    if c.front is None or found is None:
        return None
    return jnp.maximum(c.front - new_blocks + jnp.where(admit, found.freed, 0), 0)


def _look_ahead(server: Server, s: State) -> State:
    """Let the step run if nobody else who waits has a slot, which the next iteration would find."""
    candidate = first_with_slot(server, s)
    room = (s.pending.budget > 0) & (s.batch.running < server.max_num_seqs)
    nobody = (s.mode == ADMIT) & room & ~candidate.found
    return s._replace(mode=jnp.where(nobody, RUN, s.mode), pending=stopped(s.pending, nobody, nobody, candidate))


def _join_or_leave(server: Server, s: State, move: Move, pop: Flag, started: Flag, last: Number) -> State:
    """Enter a request into log and calendar or take it out again; ``last`` of its adapter goes into the log."""
    mask, sign, batch = s.calendar.shape[0] - 1, move.sign, s.batch
    tokens = move.input + move.output
    kv, last_block, grows = s.kv.joined(sign, s.step + (sign > 0), move.computed, move.finish)
    leaving = jnp.stack([sign, sign * kv.blocks(tokens - 1), sign * tokens, 0 * sign, 0 * sign])
    calendar = add(s.calendar, sign != 0, (move.finish & mask,), leaving)
    calendar = add(calendar, grows != 0, (last_block & mask, LAST_BLOCK), grows)
    entry = jnp.stack([move.request, move.finish, last])
    log = put(batch.log, sign > 0, (batch.logged & (batch.log.shape[0] - 1),), entry)
    logged = batch.logged + (sign > 0) - pop
    first_tokens, overflow = expect_first_token(s.first_tokens, started, move.sent, s.step)
    return s._replace(
        batch=batch._replace(log=log, logged=logged, log_lost=jnp.maximum(batch.log_lost, logged - log.shape[0])),
        calendar=calendar,
        kv=kv,
        first_tokens=first_tokens,
        traced=trace(server, s.traced, move, started, s.step),
        overflow=s.overflow | overflow,
    )
