"""One server between two steps: numbers in a record, the rest in arrays that are changed in place.

A request that is running, or was preempted and waits, has an *entry*; one that has not been admitted yet is known by
its number alone, in order of arrival. Adapters are numbered in the order in which a step touches them; the base model
comes last.

No running request is looked at while it decodes. One that gets its first token in step ``t`` and its last in step ``f``
gains a token in every step between: it stands in the calendar at ``f``, and the count of its phase (steps modulo the
tokens of a block) tells when it needs a KV block.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_capacity.twins.events.state import BINS

NEVER = -1
"""Last use of an adapter that has not been used, steps counting from 1, and its place in no list."""

GONE = -(2**60)
"""Place of a block that has never been freed: before any other."""

GPU, HOST = range(2)
"""Tiers that adapters are loaded on; host memory has those of the GPU too."""

NOT_LOOKED, NOBODY, STOPPED = range(3)
"""How admission ended: it has not looked at the queue, nobody who waits has a slot, or it stopped at a request."""

SUMS = (
    "computing_s",
    "loading_s",
    "running_s",
    "waiting_s",
    "kv_blocks_s",
    "adapters_s",
    "streaming_s",
    "scheduling_s",
    "ttft_s",
    "tpot_s",
)
"""Integrals over time and sums of times, seconds, in the order in which results have them."""

COUNTS = ("requests", "tokens", "next_tokens", "steps", "host_loads", "disk_loads", "preemptions")
"""What happened within the horizon, likewise."""

_OTHERS = (
    "unanswered",
    "answered",
    "in_time",
    "ended_in_time",
    "good",
    "max_running",
    "max_adapters",
    "max_kv_blocks",
    "bottleneck",
    "iterations",
)


def _record(whole: Sequence[str], seconds: Sequence[str] = (), narrow: Sequence[str] = ()) -> np.dtype[np.void]:
    """Return the type of a record of whole numbers, of seconds, and of whole numbers below 2^31."""
    kinds = ((seconds, np.float64), (whole, np.int64), (narrow, np.int32))
    return np.dtype([(name, kind) for names, kind in kinds for name in names])


TOTALS = _record((*COUNTS, *_OTHERS), (*SUMS, "unanswered_s"))
"""What is reported: integrals over time and sums of times, and what happened within the horizon.

``unanswered`` requests were sent and have no first token, and have waited ``unanswered_s`` together; ``answered``
counts first tokens, ``in_time`` those within their bound; ``ended_in_time`` requests that have ended and had it in
time, ``good`` those of them that kept all bounds.
"""

ROW = _record(
    (
        "tokens",
        "prefill_tokens",
        "kv_tokens",
        "running",
        "waiting",
        "skipped",
        "blocks",
        "adapters",
        "host_loads",
        "disk_loads",
        "preempted",
        "finished",
    ),
    ("end_s",),
)
"""A step as it is written down for comparison with vLLM's scheduler."""

NUMBERS = _record(
    (
        # limits
        "max_num_batched_tokens",
        "max_num_seqs",
        "kv_blocks",
        "block_size",
        "watermark_blocks",
        "long_prefill_token_threshold",
        "max_loras",
        "max_cpu_loras",
        "max_pending",
        # rules, 0 or 1
        "full_prompt_must_fit",
        "async_scheduling",
        "running_adapters_in_use",
        "skipped_first",
        "uncached_blocks_first",
        "uncut_if_alone",
        "prefix_caching",
        # the server
        "sent",
        "unanswered",
        "waiting",
        "eligible",
        "first_fresh",
        "preempted",
        "boundary_fresh",
        "boundary_preempted",
        "running",
        "decoding",
        "first",
        "last",
        "partial",
        "streaming",
        "free",
        "kv_tokens",
        "appended",
        "front",
        "active",
        "held",
        "free_entry",
        "in_flight",
        "settled",
        "out_of_entries",
        # the step being put together
        "step",
        "budget",
        "most_tokens",
        "prefill_tokens",
        "started",
        "rejoined",
        "preempted_now",
        "stop",
        "stop_fresh",
        "stop_preempted",
        "newcomers",
        "rows",
    ),
    (
        "warmup_s",
        "horizon_s",
        "max_ttft_s",
        "max_tpot_s",
        "max_e2el_s",
        "prompt_token_s",
        "kv_token_s",
        "skipped_request_s",
        "queued_request_s",
        "host_to_gpu_load_s",
        "now",
        "room_since",
        "end",
    ),
)
"""The numbers of a server: limits by vLLM's names, `SchedulerRules`, what is observed, linear terms of the step time.

``sent`` requests have entered, ``unanswered`` of them are under way, ``waiting`` in the queue, ``eligible`` of those
have a slot; no fresh one before ``first_fresh`` waits, ``preempted`` ones do, and the queue has been skipped up to
``boundary``. ``first`` and ``last`` are the entries at the ends of the batch, ``decoding`` of its ``running`` ones get
a token in the step, the prompts of ``partial`` others are computed in part; ``streaming`` requests have a first and no
last token. ``free`` are KV blocks, which hold ``kv_tokens`` once the step has run; ``appended`` and
``front`` belong to the prefix cache. ``active`` adapters are needed by the step, ``held`` ones only by the step in
flight, which ends at ``end``. ``settled`` says that admission would find what it found before.

A request may get ``most_tokens``; ``stop`` tells how admission ended, and where; ``started`` requests get their first
token, ``rejoined`` ones are recomputed; ``room_since`` is when the latest answers came.
"""

ENTRY = _record(
    (
        "finish",
        "own_place",
        "request",
        "adapter",
        "prompt",
        "output",
        "shared",
        "sampled",
        "computed",
        "chunk",
        "total",
        "joined_tokens",
        "phase",
        "own_number",
        "before",
        "behind",
        "leaving",
        "undisturbed",
        "started",
        "partial",
        "queued",
        "queued_before",
    ),
    ("sent_s", "first_end_s"),
)
"""A request that is running or was preempted.

``finish`` is the step of its last token, ``sampled`` counts the tokens that it had when it was preempted, ``shared``
the blocks of its adapter's prefix; ``computed`` are of ``total`` tokens, a ``chunk`` of them in this step, ``total``
being 0 once it decodes; ``joined_tokens`` those in the KV cache as it began to decode; ``own_number`` blocks
from ``own_place`` on are its own in the prefix cache while it is preempted, -1 if it will not come back; ``before`` and
``behind`` are its neighbours in the batch, ``leaving`` the next one that leaves in the same step, or the next free
entry.

The last four are lists of entries besides: those that get their first token in the step; those whose prompts are
computed in part, in order of admission; and those that wait after a preemption, in order, with the number of the fresh
request before which each stands.
"""

REQUEST = _record((), ("sent_s",), ("adapter", "prompt", "output", "following", "shared", "cached", "admitted"))
"""A request: when it arrives, or was sent once it is; its adapter and tokens; the next one of its adapter, beyond the
last request if there is none; whole blocks at its start that are those of its adapter's prefix; tokens that need not be
computed whatever the KV cache holds; and a node of the binary indexed tree that counts the admitted ones."""

ADAPTER = _record(
    (
        "head",
        "queued",
        "need",
        "last_use",
        "since",
        "held_at",
        "place",
        "completed",
        "active",
        "held",
        "to_touch",
    ),
    ("disk_s", "worst_wait_s", "grids"),
)
"""An adapter; the base model comes last.

``head`` is its first request not yet admitted, ``queued`` counts those that wait, the preempted ones included, ``need``
entries of the step being put together; ``last_use`` is the latest step that needed it, if this one does not, ``since``
the one from which on it has been needed, ``held_at`` the one in flight if no other needs it; the places say where it
stands in the lists below, -1 if it does not.

The five last whole numbers are lists of adapters besides: those that the step needs, those that only the step in flight
does, those on the GPU, in host memory, and those that the step may have to load. ``grids`` are those that the LoRA
kernels launch for so many adapters.
"""

MEMBER = _record(("adapter", "place"))
"""A list of the adapters on a tier, in any order; and where each adapter stands in it, -1 if it is not there."""

STEP = _record((), ("fixed_s", "grid_s", "adapter_s"))
"""What a step of so many tokens costs: fixed, for each grid of LoRA blocks, and for each different adapter."""

CELL = _record(("first", "last"))
"""The first and the last entry that leave in a step, -1 for none."""

BLOCK = _record(("users", "place"))
"""A block of an adapter's prefix: entries that hold it, and its place if it is free."""


class Server(NamedTuple):
    """One server; records are `numpy.recarray` of the types above.

    Attributes:
        numbers: Its numbers, ``[1]``.
        totals: What is reported, ``[1]``.
        adapters: ``[adapters + 1]``.
        tiers: Members of the GPU and of host memory, ``[2, adapters + 1]``.
        loaded: How many each has, int64 ``[2]``.
        requests: In order of arrival, ``[requests]``.
        steps: Costs by tokens, ``[max_num_batched_tokens + 1]``.
        entries: ``[entries]``.
        calendar: By step modulo its length, a power of two, ``[steps]``.
        phase: Decoding requests that need a block, by step modulo the tokens of a block, int64 ``[block_size]``.
        blocks: Of the prefixes, ``[adapters + 1, blocks]``.
        histograms: Requests by time to the first token, time of each later one, time to the last, and by what those
            without a first token have waited, ``[4, BINS]``.
        series: Time and sums at the last step of each part of the horizon, float64 ``[samples, 7]``.
        rows: The first steps, ``[rows]``.
    """

    numbers: Any
    totals: Any
    adapters: Any
    tiers: Any
    loaded: NDArray[np.int64]
    requests: Any
    steps: Any
    entries: Any
    calendar: Any
    phase: NDArray[np.int64]
    blocks: Any
    histograms: NDArray[np.int64]
    series: NDArray[np.float64]
    rows: Any

    @classmethod
    def empty(
        cls,
        numbers: Mapping[str, float],
        adapters: Any,
        requests: Any,
        steps: Any,
        *,
        entries: int,
        samples: int = 0,
        rows: int = 0,
    ) -> "Server":
        """Return a server that has not begun.

        Args:
            numbers: Limits, rules, what is observed and linear terms of the step time, by the names in `NUMBERS`.
            adapters: With ``head``, ``disk_s`` and ``grids``.
            requests: The requests; changed by the simulation.
            steps: Costs.
            entries: Requests that can run or wait preempted.
            samples: Parts of the horizon in a series.
            rows: Steps to write down.
        """
        own, free = records(1, NUMBERS), records(entries, ENTRY)
        for name, value in numbers.items():
            own[name] = value
        for name in ("first", "last"):
            own[name] = -1
        own["step"], own["free"] = 1, own["kv_blocks"]
        free["leaving"] = np.append(np.arange(1, entries), -1)
        for name in ("held_at", "last_use"):
            adapters[name] = NEVER
        longest = int(requests["output"].max(initial=1)) + 2
        prefix = int(requests["shared"].max(initial=0)) if own["prefix_caching"][0] else 0
        calendar, blocks = records(1 << longest.bit_length(), CELL), records((adapters.size, max(prefix, 1)), BLOCK)
        calendar["first"], calendar["last"], blocks["place"] = -1, -1, GONE
        tiers = records((2, adapters.size), MEMBER)
        tiers["place"] = NEVER
        return cls(
            numbers=own,
            totals=records(1, TOTALS),
            adapters=adapters,
            tiers=tiers,
            loaded=np.zeros(2, np.int64),
            requests=requests,
            steps=steps,
            entries=free,
            calendar=calendar,
            phase=np.zeros(int(own["block_size"][0]), np.int64),
            blocks=blocks,
            histograms=np.zeros((4, BINS), np.int64),
            series=np.zeros((samples, 7)),
            rows=records(rows, ROW),
        )

    def load_all(self, order: NDArray[np.int64]) -> None:
        """Load adapters one after the other before the first request comes; the later ones make room for themselves.

        Args:
            order: The adapters.
        """
        self.adapters["last_use"][order] = np.arange(-order.size, 0)
        for tier, limit in ((GPU, "max_loras"), (HOST, "max_cpu_loras")):
            kept = order[-int(self.numbers[limit][0]) :]
            members, self.loaded[tier] = self.tiers[tier], kept.size
            members["adapter"][: kept.size], members["place"][kept] = kept, np.arange(kept.size)


def records(shape: int | tuple[int, ...], kind: np.dtype[np.void]) -> Any:
    """Return records of zeros."""
    return np.zeros(shape, kind)
