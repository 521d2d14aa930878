"""A server from its first request to the horizon: what a step consists of, when it runs, what it leaves behind.

Source: ``vllm/v1/core/sched/scheduler.py``, vLLM 0.8.5 to 0.33, and of asynchronous scheduling
``step_with_batch_queue`` in ``vllm/v1/engine/core.py``.
"""

from typing import Any

import numpy as np

from lora_capacity.scenarios import Bottleneck
from lora_capacity.twins.compiled.adapters import hold_slot, load, need, need_no_more, release_held
from lora_capacity.twins.compiled.jit import compiled, entry_point
from lora_capacity.twins.compiled.prefixes import close_gaps, give_back, hold, look_up, take
from lora_capacity.twins.compiled.queue import (
    count_skipped,
    first_with_slot,
    is_admitted,
    note_skipped,
    put_back,
    send,
    take_fresh,
    take_preempted,
)
from lora_capacity.twins.compiled.state import NOBODY, NOT_LOOKED, STOPPED, Server
from lora_capacity.twins.events.state import BINS, BINS_PER_DOUBLING, SHORTEST_S

_LEAST_STEP_S = 1e-9
"""What a step takes at least: time has to go on, whatever costs nothing."""

_NO_LIMIT, _SLOTS, _KV_CACHE, _TOKEN_BUDGET, _SEQUENCES = (int(each) for each in Bottleneck)


@entry_point
def simulate_server(s: Server) -> bool:
    """Serve requests until a step would begin at the horizon or later; what happens is written into the server.

    Returns:
        Whether that is all; False if more requests ran or were preempted than there are entries.
    """
    n, horizon_s = s.numbers[0], s.numbers[0].horizon_s
    while n.out_of_entries == 0:
        s.totals[0].iterations += 1
        send(s, n.now)
        if n.running + n.waiting > 0 and n.now < horizon_s:
            if n.settled and _forward(s):
                continue
            _schedule(s)
            if _run(s):
                continue
        if n.in_flight:
            n.now = max(n.now, n.end)
            send(s, n.now)
            _hand_back(s, n.step - 1)
            n.in_flight = 0
            continue
        coming = s.requests[n.sent].sent_s if n.sent < s.requests.size else np.inf
        n.now = max(n.now, coming)
        if n.now >= horizon_s:
            break
    _record_waiting(s)
    return bool(n.out_of_entries == 0)


@compiled
def _blocks(s: Server, tokens: int) -> int:
    """Return the KV blocks that hold so many tokens."""
    return int((tokens + s.numbers[0].block_size - 1) // s.numbers[0].block_size)


@compiled
def _schedule(s: Server) -> None:
    """Put a step together: running requests first, then, if nobody was preempted, those that wait."""
    n = s.numbers[0]
    n.prefill_tokens, n.rejoined, n.preempted_now, n.newcomers, n.started = 0, 0, 0, 0, 0
    n.stop, n.stop_fresh, n.stop_preempted, n.settled = NOT_LOOKED, 0, -1, 0
    n.most_tokens = n.max_num_batched_tokens
    if n.long_prefill_token_threshold > 0 and (n.running + n.waiting > 1 or not n.uncut_if_alone):
        n.most_tokens = n.long_prefill_token_threshold
    _keep_running(s)
    if n.preempted_now == 0:
        _admit(s)


@compiled
def _keep_running(s: Server) -> None:
    """Give every running request a token or the next chunk of its prompt, preempting the last ones for want of blocks.

    Those before the one that finds no block have taken theirs by then; with prefix caching that matters, since blocks
    are taken in the order in which they were freed.
    """
    n, grown = s.numbers[0], 0
    phase = n.step % n.block_size
    while True:
        growth = s.phase[phase] - grown
        chunks, chunk_blocks = _cut(s) if n.partial > 0 else (0, 0)
        if growth + chunk_blocks <= n.free:
            break
        some = min(growth, n.free)
        take(s, some)
        grown += some
        _preempt_last(s)
    take(s, growth + chunk_blocks)
    n.kv_tokens += n.decoding + chunks
    n.budget = n.max_num_batched_tokens - n.decoding - chunks
    n.prefill_tokens += chunks
    if n.partial > 0:
        _go_on(s)


@compiled
def _cut(s: Server) -> tuple[int, int]:
    """Cut the next chunks of prompts that are computed in part; return their tokens and the KV blocks that these need.

    Only the last running request may get less than it could: another one has never left less to those behind it.
    """
    n, tokens, blocks = s.numbers[0], 0, 0
    for i in range(n.partial):
        e = s.entries[s.entries[i].partial]
        e.chunk = min(e.total - e.computed, n.most_tokens, n.max_num_batched_tokens - n.decoding - tokens)
        tokens += e.chunk
        blocks += _blocks(s, e.computed + e.chunk) - _blocks(s, e.computed)
    return tokens, blocks


@compiled
def _go_on(s: Server) -> None:
    """Compute the chunks; whose prompt is whole then begins to decode."""
    n, size, partial = s.numbers[0], s.numbers[0].block_size, s.numbers[0].partial
    n.partial = 0
    for i in range(partial):
        entry = s.entries[i].partial
        e, before = s.entries[entry], s.entries[entry].computed
        e.computed += e.chunk
        if n.prefix_caching:
            hold(s, e.adapter, min(before // size, e.shared), min(e.computed // size, e.shared))
        if e.computed == e.total:
            _begin_to_decode(s, entry, e.computed)
        else:
            s.entries[n.partial].partial = entry
            n.partial += 1


@compiled
def _preempt_last(s: Server) -> None:
    """Let the request admitted last give up its blocks and wait again."""
    n, entry = s.numbers[0], s.numbers[0].last
    e = s.entries[entry]
    n.preempted_now += 1
    if n.async_scheduling and e.total == 0 and e.finish == n.step - 1:
        # Its last token is in flight: it waits until that arrives.
        held = e.prompt + e.output - 1
        _free_blocks(s, entry, held, max(held - 1, e.joined_tokens))
        _leave_batch(s, entry)
        n.waiting += 1
        e.own_number = -1
        return
    if e.total == 0:
        e.sampled = e.output - (e.finish - n.step + 1)
        computed = e.prompt + e.sampled - 1
        # A token in flight fills no block yet; only those of the prompt are known before they are computed.
        full = max(computed - 1, e.joined_tokens) if n.async_scheduling else computed
        _take_off_calendar(s, entry)
        s.phase[e.phase] -= 1
        n.decoding -= 1
    else:
        computed = full = e.computed
        n.partial -= 1
    n.kv_tokens -= computed
    e.undisturbed = 0
    _free_blocks(s, entry, computed, full)
    _leave_batch(s, entry)
    if need_no_more(s, e.adapter, n.step - 1):
        n.eligible -= s.adapters[e.adapter].queued
    put_back(s, entry)


@compiled
def _take_off_calendar(s: Server, entry: int) -> None:
    """Take an entry off the calendar."""
    e = s.entries[entry]
    cell = s.calendar[e.finish & (s.calendar.shape[0] - 1)]
    before = -1
    if cell.first == entry:
        cell.first = e.leaving
    else:
        before = cell.first
        while s.entries[before].leaving != entry:
            before = s.entries[before].leaving
        s.entries[before].leaving = e.leaving
    if cell.last == entry:
        cell.last = before


@compiled
def _leave_batch(s: Server, entry: int) -> None:
    """Take an entry out of the batch."""
    n, e = s.numbers[0], s.entries[entry]
    if e.before >= 0:
        s.entries[e.before].behind = e.behind
    else:
        n.first = e.behind
    if e.behind >= 0:
        s.entries[e.behind].before = e.before
    else:
        n.last = e.before
    n.running -= 1


@compiled
def _free_blocks(s: Server, entry: int, computed: int, full: int) -> None:
    """Free the blocks of a request that hold so many computed tokens, of which so many are known to fill theirs."""
    if not s.numbers[0].prefix_caching:
        s.numbers[0].free += _blocks(s, computed)
        return
    give_back(s, entry, full // s.numbers[0].block_size, _blocks(s, computed))


@compiled
def _admit(s: Server) -> None:
    """Schedule waiting requests as long as tokens and places last."""
    n, nobody = s.numbers[0], s.requests.size
    while n.budget > 0 and n.running < n.max_num_seqs and n.waiting > 0 and n.out_of_entries == 0:
        fresh, place = first_with_slot(s)
        if place < 0 and fresh == nobody:
            n.stop = NOBODY
            return
        n.stop, n.stop_fresh, n.stop_preempted = STOPPED, fresh, place
        if not _admit_one(s, fresh, place):
            return


@compiled
def _admit_one(s: Server, fresh: int, place: int) -> bool:
    """Admit a request if it finds its KV blocks; say whether it does."""
    n = s.numbers[0]
    entry = s.entries[place].queued if place >= 0 else -1
    if place >= 0:
        e = s.entries[entry]
        number, adapter, length, shared = e.request, e.adapter, e.prompt + e.sampled, e.shared
    else:
        r = s.requests[fresh]
        number, adapter, length, shared = fresh, np.int64(r.adapter), np.int64(r.prompt), np.int64(r.shared)
    found, free, own = 0, 0, 0
    if n.prefix_caching:
        found, free, own = look_up(s, adapter, shared, entry)
    cached = (found + own) * n.block_size
    cached = max(cached, np.int64(s.requests[number].cached))
    tokens = min(length - cached, n.most_tokens, n.budget)
    held = found - free
    reserve = n.watermark_blocks if n.running > 0 else 0
    if _blocks(s, length if n.full_prompt_must_fit else cached + tokens) - held + reserve > n.free:
        return False
    if place < 0:
        entry = n.free_entry
        if entry < 0:
            n.out_of_entries = 1
            return False
        n.free_entry = s.entries[entry].leaving
        take_fresh(s, fresh)
        _enter(s, entry, fresh)
    else:
        take_preempted(s, place)
    if n.prefix_caching:
        close_gaps(s, adapter, found, free, own, entry)
        hold(s, adapter, np.int64(0), min((cached + tokens) // n.block_size, shared))
        s.entries[entry].own_number = 0
        # What it finds free does not come off the blocks in front.
        n.front += free + own
    take(s, _blocks(s, cached + tokens) - held)
    _append_to_batch(s, entry)
    need(s, adapter)
    n.kv_tokens += cached + tokens
    n.budget -= tokens
    n.prefill_tokens += tokens
    if cached + tokens == length:
        _begin_to_decode(s, entry, length)
    else:
        s.entries[entry].computed, s.entries[entry].total = cached + tokens, length
        s.entries[n.partial].partial = entry
        n.partial += 1
    return True


@compiled
def _enter(s: Server, entry: int, number: int) -> None:
    """Make the entry of a request that is admitted for the first time."""
    n, e = s.numbers[0], s.entries[entry]
    r = s.requests[number]
    e.request, e.adapter, e.prompt, e.output, e.shared = number, r.adapter, r.prompt, r.output, r.shared
    e.sent_s, e.sampled, e.undisturbed, e.own_number = r.sent_s, 0, 1, 0
    waited = s.adapters[e.adapter]
    waited.worst_wait_s = max(waited.worst_wait_s, n.now - e.sent_s)


@compiled
def _append_to_batch(s: Server, entry: int) -> None:
    """Make an entry the last one of the batch."""
    n, e = s.numbers[0], s.entries[entry]
    e.before, e.behind = n.last, -1
    if n.last >= 0:
        s.entries[n.last].behind = entry
    else:
        n.first = entry
    n.last = entry
    n.running += 1


@compiled
def _begin_to_decode(s: Server, entry: int, length: int) -> None:
    """Note what will become of a request whose prompt is computed in this step."""
    n, e = s.numbers[0], s.entries[entry]
    e.joined_tokens, e.total = length, 0
    e.finish = n.step + e.output - e.sampled - 1
    e.phase = (n.step + 1 - length) % n.block_size
    cell = s.calendar[e.finish & (s.calendar.shape[0] - 1)]
    e.leaving = -1
    if cell.first < 0:
        cell.first = entry
    else:
        s.entries[cell.last].leaving = entry
    cell.last = entry
    s.phase[e.phase] += 1
    n.decoding += 1
    if e.sampled == 0:
        s.entries[n.started].started = entry
        n.started += 1
    else:
        n.rejoined += 1


@compiled
def _step_time(s: Server, tokens: int, prefill_tokens: int, skipped: int) -> float:
    """Return what a step takes, skipping included and loads not, seconds."""
    n, t = s.numbers[0], s.steps[tokens]
    seconds = t.fixed_s + t.grid_s * s.adapters[n.active].grids + t.adapter_s * n.active
    seconds += n.prompt_token_s * prefill_tokens + n.kv_token_s * n.kv_tokens
    seconds += n.skipped_request_s * skipped + n.queued_request_s * n.waiting
    return float(max(seconds, _LEAST_STEP_S))


@compiled
def _run(s: Server) -> bool:
    """Let the step that was put together run, unless it is empty; say whether it does."""
    n, sync = s.numbers[0], not s.numbers[0].async_scheduling
    tokens, skipped = n.max_num_batched_tokens - n.budget, count_skipped(s)
    note_skipped(s)
    scheduling_s = n.skipped_request_s * skipped
    if tokens == 0:
        n.now += scheduling_s
        release_held(s)
        return False
    host_loads, disk_loads, disk_s = load(s)
    load_s = n.host_to_gpu_load_s * host_loads + disk_s
    compute_s = _step_time(s, tokens, n.prefill_tokens, skipped)
    begin = n.now if sync else max(n.now, n.end)
    start = max(n.now + scheduling_s, begin)
    end = start + load_s + max(compute_s - scheduling_s, _LEAST_STEP_S)
    _record(s, tokens, skipped, host_loads, disk_loads, begin, end, load_s, start - begin)
    for i in range(n.started):
        _record_first_token(s, s.entries[i].started, end)
    n.streaming += n.started
    release_held(s)
    step, leaves = n.step, s.calendar[n.step & (s.calendar.shape[0] - 1)].first >= 0
    _finish(s, begin, end)
    _sample(s, end)
    n.step += 1
    n.settled = int(not leaves and n.prefill_tokens + n.rejoined + n.preempted_now == 0)
    n.now = end if sync else start
    send(s, n.now)  # before answers make room
    if sync:
        _hand_back(s, step)
    elif n.in_flight:
        _hand_back(s, step - 1)
    n.in_flight = int(not sync)
    n.end = end
    return True


@compiled
def _finish(s: Server, begin: float, end: float) -> None:
    """Tell of the requests that get their last token in the step; the next one needs them no more."""
    n = s.numbers[0]
    held = n.async_scheduling and n.running_adapters_in_use
    entry = s.calendar[n.step & (s.calendar.shape[0] - 1)].first
    while entry >= 0:
        e = s.entries[entry]
        _record_finished(s, entry, begin, end)
        n.kv_tokens -= e.prompt + e.output - 1
        n.decoding -= 1
        n.streaming -= 1
        s.phase[e.phase] -= 1
        if need_no_more(s, e.adapter, n.step):
            if held:
                hold_slot(s, e.adapter)
            else:
                n.eligible -= s.adapters[e.adapter].queued
        entry = e.leaving


@compiled
def _hand_back(s: Server, step: int) -> None:
    """Have back what the requests that a step finished held."""
    n = s.numbers[0]
    cell = s.calendar[step & (s.calendar.shape[0] - 1)]
    entry = cell.first
    while entry >= 0:
        e = s.entries[entry]
        following = e.leaving
        if e.own_number < 0:  # preempted meanwhile
            n.waiting -= 1
        else:
            computed = e.prompt + e.output - 1
            _free_blocks(s, entry, computed, computed)
            _leave_batch(s, entry)
        e.leaving, n.free_entry = n.free_entry, entry
        n.unanswered -= 1
        n.settled = 0
        entry = following
    cell.first, cell.last = -1, -1
    n.room_since = n.now


@compiled
def _bin(time_s: float) -> int:
    """Return the bin of a time."""
    return min(int(np.log2(max(time_s, SHORTEST_S) / SHORTEST_S) * BINS_PER_DOUBLING), BINS - 1)


@compiled
def _record(
    s: Server,
    tokens: int,
    skipped: int,
    host_loads: int,
    disk_loads: int,
    begin: float,
    end: float,
    load_s: float,
    waited_s: float,
) -> None:
    """Record a step."""
    n, c = s.numbers[0], s.totals[0]
    used = n.kv_blocks - n.free
    c.preemptions += n.preempted_now
    if n.waiting == 0:
        c.bottleneck = _NO_LIMIT
    elif n.budget == 0 and n.preempted_now == 0:
        c.bottleneck = _TOKEN_BUDGET
    elif n.running >= n.max_num_seqs:
        c.bottleneck = _SEQUENCES
    else:
        c.bottleneck = _SLOTS if n.stop == NOBODY else _KV_CACHE
    if s.rows.size > 0:
        _write_row(s, tokens, skipped, host_loads, disk_loads, end)
    observed_s = max(min(end, n.horizon_s) - max(begin, n.warmup_s), 0.0)
    if end <= n.horizon_s and begin >= n.warmup_s:
        c.steps += 1
        c.next_tokens += tokens - n.prefill_tokens + n.rejoined
        c.host_loads += host_loads
        c.disk_loads += disk_loads
        c.max_running = max(c.max_running, n.running)
        c.max_adapters = max(c.max_adapters, n.active)
        c.max_kv_blocks = max(c.max_kv_blocks, used)
    loading_s = min(load_s, observed_s)
    c.computing_s += observed_s - loading_s
    c.loading_s += loading_s
    c.running_s += n.running * observed_s
    c.waiting_s += n.waiting * observed_s
    c.kv_blocks_s += used * observed_s
    c.adapters_s += n.active * observed_s
    c.streaming_s += n.streaming * observed_s
    c.scheduling_s += min(waited_s, observed_s - loading_s)


@compiled
def _write_row(s: Server, tokens: int, skipped: int, host_loads: int, disk_loads: int, end: float) -> None:
    n: Any = s.numbers[0]
    if n.rows == s.rows.size:
        return
    row = s.rows[n.rows]
    n.rows += 1
    row.end_s, row.tokens, row.prefill_tokens, row.kv_tokens = end, tokens, n.prefill_tokens, n.kv_tokens
    row.running, row.waiting, row.skipped, row.adapters = n.running, n.waiting, skipped, n.active
    row.blocks, row.host_loads, row.disk_loads = n.kv_blocks - n.free, host_loads, disk_loads
    row.preempted, row.finished = n.preempted_now, 0
    entry = s.calendar[n.step & (s.calendar.shape[0] - 1)].first
    while entry >= 0:
        row.finished += 1
        entry = s.entries[entry].leaving


@compiled
def _record_first_token(s: Server, entry: int, end: float) -> None:
    """Record a first token."""
    e, c = s.entries[entry], s.totals[0]
    e.first_end_s = end
    if end > s.numbers[0].horizon_s:
        return
    c.answered += 1
    if end > s.numbers[0].warmup_s:
        delay_s = end - e.sent_s
        s.histograms[0, _bin(delay_s)] += 1
        c.ttft_s += delay_s
        c.in_time += delay_s <= s.numbers[0].max_ttft_s


@compiled
def _record_finished(s: Server, entry: int, begin: float, end: float) -> None:
    """Record a last token."""
    e, c = s.entries[entry], s.totals[0]
    s.adapters[e.adapter].completed += 1
    if end > s.numbers[0].horizon_s or begin < s.numbers[0].warmup_s:
        return
    c.requests += 1
    c.tokens += e.prompt + e.output
    first_s, whole_s = e.first_end_s - e.sent_s, end - e.sent_s
    later_s = (whole_s - first_s) / max(e.output - 1, 1)
    s.histograms[2, _bin(whole_s)] += 1
    if e.undisturbed and e.output > 1:
        s.histograms[1, _bin(later_s)] += 1
        c.tpot_s += later_s
    if first_s <= s.numbers[0].max_ttft_s:
        c.ended_in_time += 1
        c.good += later_s <= s.numbers[0].max_tpot_s and whole_s <= s.numbers[0].max_e2el_s


@compiled
def _record_waiting(s: Server) -> None:
    """Record who was sent before the horizon and has no first token by then.

    The few in whose step the horizon falls count as just sent.
    """
    n, c, waiting, sent = s.numbers[0], s.totals[0], 0, 0
    for number in range(n.sent):
        r = s.requests[number]
        waited_s = n.horizon_s - r.sent_s
        if waited_s <= 0.0:
            continue
        sent += 1
        if not is_admitted(s, number):
            waiting += 1
            s.histograms[3, _bin(waited_s)] += 1
            c.unanswered_s += waited_s
            adapter = s.adapters[np.int64(r.adapter)]
            adapter.worst_wait_s = max(adapter.worst_wait_s, waited_s)
    c.unanswered = max(sent - c.answered, 0)
    s.histograms[3, 0] += max(c.unanswered - waiting, 0)


@compiled
def _sample(s: Server, end: float) -> None:
    """Overwrite the sample of the part of the horizon in which a step ends."""
    samples, c = s.series.shape[0], s.totals[0]
    if samples == 0 or end > s.numbers[0].horizon_s:
        return
    row = s.series[min(int(end / s.numbers[0].horizon_s * samples), samples - 1)]
    row[0], row[1], row[2], row[3] = end, c.running_s, c.waiting_s, c.kv_blocks_s
    row[4], row[5], row[6] = c.adapters_s, c.requests, c.tokens


@compiled
def _forward(s: Server) -> bool:
    """Let steps run in which every running request gets a token and nothing else happens; say whether there were any.

    Nobody arrives or leaves, and admission finds what it found in the step before, since blocks only become fewer.
    """
    n = s.numbers[0]
    if n.decoding == 0 or n.now < n.warmup_s or s.series.shape[0] > 0 or s.rows.size > 0:
        return False
    sync, mask, size = not n.async_scheduling, s.calendar.shape[0] - 1, n.block_size
    coming = np.inf
    if n.sent < s.requests.size and n.unanswered < n.max_pending:
        coming = s.requests[n.sent].sent_s
    skipped = count_skipped(s)
    scheduling_s = n.skipped_request_s * skipped
    kv_s, step_s = n.kv_token_s, _step_time(s, n.decoding, n.prefill_tokens, skipped) - n.kv_token_s * n.kv_tokens
    now, end_before, steps, free, kv_tokens = n.now, n.end, 0, n.free, n.kv_tokens
    block_s, observed_s, waited_s = 0.0, 0.0, 0.0
    while now < coming and s.calendar[(n.step + steps) & mask].first < 0:
        growth = s.phase[(n.step + steps) % size]
        begin = now if sync else max(now, end_before)
        start = max(now + scheduling_s, begin)
        end = start + max(step_s + kv_s * (kv_tokens + n.decoding) - scheduling_s, _LEAST_STEP_S)
        if growth > free or end >= n.horizon_s:
            break
        free -= growth
        kv_tokens += n.decoding
        steps += 1
        observed_s += end - begin
        block_s += (n.kv_blocks - free) * (end - begin)
        waited_s += start - begin
        n.room_since = now  # what arrives in the last of them is sent before the next answers
        now = end if sync else start
        end_before = end
    if steps == 0:
        return False
    c = s.totals[0]
    c.steps += steps
    c.next_tokens += steps * n.decoding
    c.max_kv_blocks = max(c.max_kv_blocks, n.kv_blocks - free)
    c.computing_s += observed_s
    c.running_s += n.running * observed_s
    c.waiting_s += n.waiting * observed_s
    c.kv_blocks_s += block_s
    c.adapters_s += n.active * observed_s
    c.streaming_s += n.streaming * observed_s
    c.scheduling_s += waited_s
    take(s, n.free - free)
    n.now, n.end, n.kv_tokens = now, end_before, kv_tokens
    n.step += steps
    return True
