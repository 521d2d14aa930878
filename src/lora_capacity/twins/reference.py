"""What vLLM's engine does, step by step: plain Python, obvious and slow, for other simulations to be compared with.

A *scheduler* decides who gets how many tokens in a step, an *engine* lets time pass between its decisions. One step is

1. every running request in order of admission: one token, or the next chunk of its prompt. One that finds no KV block
   makes the last running request give up its blocks and go to the front of the queue, until there is room or the last
   one was itself;
2. unless somebody was preempted: waiting requests in order, while tokens and places last. One whose adapter is not in
   use while `max_loras` others are is skipped and keeps its place; one that finds no KV blocks ends the admission.
   With prefix caching, the blocks in which a request's first tokens stand already are found, all but its last token;
3. the adapters of the step, in a fixed order, are brought into host memory and onto the GPU, the least recently used
   ones making room;
4. the step runs; every request whose tokens are all computed gains one, and leaves when it has all it wants.

Left out: priorities, speculative tokens, several engines, requests that exceed ``max_model_len``.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lora_capacity.engines import SchedulerRules
from lora_capacity.twins.block_pool import Block, BlockPool, Key
from lora_capacity.workload import BASE_MODEL, Requests


@dataclass(frozen=True)
class Behaviour:
    """In what the versions of vLLM differ.

    Attributes:
        running_adapters_in_use: An adapter is in use while any of its requests runs, not only when one is in this step.
            The two differ under asynchronous scheduling only: without it every running request is in every step that
            admits others.
        full_prompt_must_fit: A request is admitted only if blocks are free for all its tokens, not just for those of
            its first chunk.
        async_scheduling: A step is scheduled as the one before it starts to run. Requests that get their last token
            there keep place and blocks for one step more, and one that arrives meanwhile waits for one step more.
        skipped: What becomes of the requests skipped in a step: they go back to the front of the queue in order
            ("keep") or in reverse ("reverse"), or to a queue of their own, tried before that of the others, to whose
            front the preempted go ("ahead").
        uncached_first: With prefix caching, freed blocks that are not full are the next to be taken; otherwise they
            wait behind those freed earlier, as full ones do.
        uncut_if_alone: A request that is alone in the server gets what the step has room for, whatever
            `long_prefill_token_threshold`.
    """

    running_adapters_in_use: bool = False
    full_prompt_must_fit: bool = False
    async_scheduling: bool = False
    skipped: Literal["keep", "reverse", "ahead"] = "keep"
    uncached_first: bool = False
    uncut_if_alone: bool = False

    @classmethod
    def of(cls, rules: SchedulerRules) -> "Behaviour":
        """Return what the library's rules of a version are called here."""
        return cls(
            running_adapters_in_use=rules.running_adapters_in_use,
            full_prompt_must_fit=rules.full_prompt_must_fit,
            async_scheduling=rules.async_scheduling,
            skipped="ahead" if rules.skipped_first else "keep",
            uncached_first=rules.uncached_blocks_first,
            uncut_if_alone=rules.uncut_if_alone,
        )


@dataclass(frozen=True)
class Config:
    """A server: limits by vLLM's names, and its behaviour.

    Attributes:
        max_num_seqs: Most running requests.
        max_num_batched_tokens: Most tokens in a step.
        max_loras: Adapter slots on the GPU.
        max_cpu_loras: Adapters in host memory, those on the GPU included.
        kv_blocks: Blocks that requests can have. vLLM keeps one block for itself: its ``num_gpu_blocks`` is one more.
        block_size: Tokens of a block.
        watermark_blocks: Blocks that an admission leaves free unless nothing runs.
        long_prefill_token_threshold: Most tokens of a request in a step; 0: no such limit.
        prefix_caching: Whether blocks are found again that hold a request's first tokens.
        loaded_at_start: Adapters that are loaded before the first request, in that order.
        touch_order: Adapters in the order in which a step touches them; ascending if not given. In vLLM it is that of a
            set of adapter names, hence arbitrary, nearly the same in all steps of a run, and another in the next run.
        behaviour: What depends on the version.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_loras: int
    max_cpu_loras: int
    kv_blocks: int
    block_size: int = 16
    watermark_blocks: int = 0
    long_prefill_token_threshold: int = 0
    prefix_caching: bool = False
    loaded_at_start: tuple[int, ...] = ()
    touch_order: tuple[int, ...] | None = None
    behaviour: Behaviour = Behaviour()

    def blocks(self, tokens: int) -> int:
        """Return the blocks that hold so many tokens."""
        return -(-tokens // self.block_size)


@dataclass(eq=False)
class Request:
    """A request in the server; `sampled` counts its output tokens as they are scheduled, `output` as they come out.

    `shared_tokens` are those of its prompt with which others of its adapter begin too, `cached_tokens` those that need
    not be computed whatever the pool holds, `kept` its blocks with a key.
    """

    number: int
    adapter: int
    input_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    cached_tokens: int = 0
    computed: int = 0
    sampled: int = 0
    output: int = 0
    blocks: list[Block] = field(default_factory=list)
    kept: int = 0

    @property
    def uncomputed(self) -> int:
        """Tokens known that are not computed yet."""
        return self.input_tokens + self.sampled - self.computed

    def key(self, place: int, block_size: int) -> Key:
        """Return the key of one of its blocks."""
        if (place + 1) * block_size <= self.shared_tokens:
            return "adapter", self.adapter, place
        return "request", self.number, place


@dataclass(frozen=True)
class StepState:
    """One step as scheduled: all that its duration can depend on. Requests and adapters are given by number.

    Attributes:
        scheduled: Tokens by request, in order of scheduling.
        found: Tokens found in the KV cache, by request admitted, those that found none left out.
        preempted: Requests preempted, in that order.
        sampling: Requests that gain an output token.
        running: Running requests after scheduling, scheduled or not.
        waiting: Requests that wait in the server after scheduling.
        skipped: Waiting requests looked at and skipped for their adapter.
        blocks_used: KV blocks held after scheduling.
        kv_tokens: Tokens in the KV cache, of the scheduled requests, once the step has run.
        adapters: Different adapters in the step, ascending.
        host_loads: Adapters copied from host memory to the GPU, in that order; one may come twice.
        disk_loads: Adapters read from disk into host memory; each is copied to the GPU too.
    """

    scheduled: dict[int, int]
    found: dict[int, int]
    preempted: tuple[int, ...]
    sampling: tuple[int, ...]
    running: int
    waiting: int
    skipped: int
    blocks_used: int
    kv_tokens: int
    adapters: tuple[int, ...]
    host_loads: tuple[int, ...]
    disk_loads: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return sum(self.scheduled.values())


@dataclass(frozen=True)
class StepRecord:
    """A step, when it was scheduled and when it ran, in seconds; ``finished`` are the requests that it completes."""

    state: StepState
    scheduled_s: float
    start_s: float
    end_s: float
    finished: tuple[int, ...]


class AdapterTiers:
    """The adapters on the GPU and in host memory, least recently used first; host memory has those of the GPU too."""

    def __init__(self, max_loras: int, max_cpu_loras: int) -> None:
        self.max_loras, self.max_cpu_loras = max_loras, max_cpu_loras
        self.gpu: list[int] = []
        self.host: list[int] = []

    def touch(self, adapter: int) -> tuple[bool, bool]:
        """Make an adapter the most recently used on both tiers; say if it came from host memory and if from disk."""
        from_disk = adapter not in self.host
        if from_disk:
            if len(self.host) == self.max_cpu_loras:
                evicted = self.host.pop(0)
                if evicted in self.gpu:
                    self.gpu.remove(evicted)
        else:
            self.host.remove(adapter)
        self.host.append(adapter)
        to_gpu = adapter not in self.gpu
        if to_gpu:
            if len(self.gpu) == self.max_loras:
                self.gpu.pop(0)
        else:
            self.gpu.remove(adapter)
        self.gpu.append(adapter)
        return to_gpu, from_disk


class Scheduler:
    """Queue, batch, KV blocks and adapters of one server: `schedule` makes a step of them, `update` ends one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.waiting: deque[Request] = deque()
        self.skipped: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests: dict[int, Request] = {}
        self.pool = BlockPool(
            config.kv_blocks, caching=config.prefix_caching, uncached_first=config.behaviour.uncached_first
        )
        self.tiers = AdapterTiers(config.max_loras, config.max_cpu_loras)
        for adapter in config.loaded_at_start:
            self.tiers.touch(adapter)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if it would never fit."""
        most = self.config.blocks(request.input_tokens + request.output_tokens - 1)
        if most > self.config.kv_blocks:
            raise ValueError(
                f"request {request.number} needs {most} KV blocks, more than the {self.config.kv_blocks} there are"
            )
        self.requests[request.number] = request
        self.waiting.append(request)

    def schedule(self) -> StepState:
        """Put a step together."""
        scheduled: dict[int, int] = {}
        found: dict[int, int] = {}
        most = self._most_tokens()
        preempted = self._keep_running(scheduled, most)
        skipped = 0 if preempted else self._admit(scheduled, found, most)
        sampling = []
        for number, tokens in scheduled.items():
            request = self.requests[number]
            request.computed += tokens
            if request.uncomputed == 0:
                request.sampled += 1
                sampling.append(number)
        batch = [self.requests[number] for number in scheduled]
        adapters = {request.adapter for request in batch} - {BASE_MODEL}
        host_loads, disk_loads = self._load(adapters)
        return StepState(
            scheduled=scheduled,
            found=found,
            preempted=tuple(preempted),
            sampling=tuple(sampling),
            running=len(self.running),
            waiting=len(self.waiting) + len(self.skipped),
            skipped=skipped,
            blocks_used=self.config.kv_blocks - self.pool.free,
            kv_tokens=sum(request.computed for request in batch),
            adapters=tuple(sorted(adapters)),
            host_loads=tuple(host_loads),
            disk_loads=tuple(disk_loads),
        )

    def update(self, step: StepState) -> tuple[int, ...]:
        """Hand the tokens of a step out; return the requests that are finished, whose blocks are free from now on."""
        finished = []
        for number in step.sampling:
            request = self.requests[number]
            request.output += 1
            # Tokens that are scheduled but have not come out fill no block; a preempted request has none.
            self._keep(request, request.computed - request.sampled + request.output)
            if request.output == request.output_tokens:
                self._free(request)
                # Under asynchronous scheduling its last token may have been on its way when it was preempted.
                (self.running if request in self.running else self.waiting).remove(request)
                del self.requests[number]
                finished.append(number)
        return tuple(finished)

    def _most_tokens(self) -> int:
        """Return the most tokens that a request may get in the step."""
        alone = len(self.running) + len(self.waiting) + len(self.skipped) <= 1
        threshold = self.config.long_prefill_token_threshold
        uncut = threshold == 0 or (alone and self.config.behaviour.uncut_if_alone)
        return self.config.max_num_batched_tokens if uncut else threshold

    def _keep_running(self, scheduled: dict[int, int], most: int) -> list[int]:
        """Schedule the running requests; return those preempted."""
        preempted: list[int] = []
        budget = self.config.max_num_batched_tokens
        for request in list(self.running):
            if budget == 0 or request.number in preempted:
                break
            if request.sampled == request.output_tokens:
                continue
            tokens = min(request.uncomputed, most, budget)
            while not self._allocate(request, tokens):
                last = self.running.pop()
                self._free(last)
                last.computed = 0
                self.waiting.appendleft(last)
                preempted.append(last.number)
                if last is request:
                    return preempted
            scheduled[request.number] = tokens
            budget -= tokens
        return preempted

    def _admit(self, scheduled: dict[int, int], found: dict[int, int], most: int) -> int:
        """Schedule waiting requests, and tell what they found; return how many were skipped."""
        config = self.config
        budget = config.max_num_batched_tokens - sum(scheduled.values())
        in_use = {
            request.adapter
            for request in self.running
            if config.behaviour.running_adapters_in_use or request.number in scheduled
        } - {BASE_MODEL}
        skipped: list[Request] = []
        while (queue := self.skipped or self.waiting) and budget > 0 and len(self.running) < config.max_num_seqs:
            request = queue[0]
            if request.adapter not in in_use | {BASE_MODEL} and len(in_use) >= config.max_loras:
                skipped.append(queue.popleft())
                continue
            hits = self._find(request)
            computed = max(len(hits) * config.block_size, request.cached_tokens)
            tokens = min(request.uncomputed - computed, most, budget)
            needed = config.blocks(request.uncomputed if config.behaviour.full_prompt_must_fit else computed + tokens)
            held = sum(block.users > 0 for block in hits)
            reserve = config.watermark_blocks if self.running else 0
            if needed - held + reserve > self.pool.free:
                break
            self.pool.hold(hits)
            request.blocks, request.kept, request.computed = list(hits), len(hits), computed
            self._allocate(request, tokens)
            if computed:
                found[request.number] = computed
            self.running.append(queue.popleft())
            scheduled[request.number] = tokens
            budget -= tokens
            in_use |= {request.adapter} - {BASE_MODEL}
        back = self.skipped if config.behaviour.skipped == "ahead" else self.waiting
        back.extendleft(skipped if config.behaviour.skipped == "reverse" else reversed(skipped))
        return len(skipped)

    def _load(self, adapters: set[int]) -> tuple[list[int], list[int]]:
        """Touch the adapters of a step; a newcomer may push out one that is yet to come, which then is loaded again."""
        host_loads, disk_loads = [], []
        for adapter in self.config.touch_order or sorted(adapters):
            if adapter in adapters:
                to_gpu, from_disk = self.tiers.touch(adapter)
                host_loads += [adapter] * to_gpu
                disk_loads += [adapter] * from_disk
        return host_loads, disk_loads

    def _allocate(self, request: Request, tokens: int) -> bool:
        """Give a request the blocks that its next tokens need, if there are as many."""
        needed = self.config.blocks(request.computed + tokens) - len(request.blocks)
        if needed > self.pool.free:
            return False
        request.blocks += self.pool.take(needed)
        self._keep(request, min(request.computed + tokens, request.input_tokens + request.output))
        return True

    def _find(self, request: Request) -> list[Block]:
        """Return the blocks that hold a waiting request's first tokens; the last token is always computed."""
        most = (request.uncomputed - 1) // self.config.block_size
        return self.pool.find(request.key(place, self.config.block_size) for place in range(most))

    def _keep(self, request: Request, tokens: int) -> None:
        """Give keys to the blocks that so many of a request's tokens fill."""
        for place in range(request.kept, tokens // self.config.block_size):
            self.pool.keep(request.blocks[place], request.key(place, self.config.block_size))
            request.kept = place + 1

    def _free(self, request: Request) -> None:
        self.pool.give_back(request.blocks)
        request.blocks, request.kept = [], 0


@dataclass
class Simulation:
    """The steps in order, and when each request was sent, got its first token and finished: seconds, NaN if never."""

    steps: list[StepRecord]
    sent_s: np.ndarray
    first_token_s: np.ndarray
    finished_s: np.ndarray


@dataclass
class Clients:
    """Requests on their way to the server: in order of arrival, at most `max_pending` of them unanswered."""

    requests: Requests
    max_pending: int | None
    sent: int = 0
    unanswered: int = 0
    room_since_s: float = 0.0
    sent_s: list[float] = field(default_factory=list)

    @property
    def next_arrival_s(self) -> float:
        """When the next request arrives, or did."""
        return float(self.requests.arrival_s[self.sent]) if self.sent < len(self.requests) else np.inf

    def send(self, scheduler: Scheduler, now_s: float) -> None:
        """Send what has arrived by now; one that found no room counts as sent when the latest answer came."""
        while self.next_arrival_s <= now_s and (self.max_pending is None or self.unanswered < self.max_pending):
            number = self.sent
            self.sent_s.append(max(self.next_arrival_s, self.room_since_s))
            rows = self.requests
            tokens = (rows.input_tokens, rows.output_tokens, rows.shared_prefix_tokens, rows.cached_tokens)
            prompt, output, shared, cached = (int(column[number]) for column in tokens)
            scheduler.add(Request(number, int(rows.adapter[number]), prompt, output, shared, cached))
            self.sent += 1
            self.unanswered += 1

    def answered(self, count: int, now_s: float) -> None:
        """Take note of requests that are finished."""
        self.unanswered -= count
        self.room_since_s = now_s


def simulate(
    requests: Requests,
    config: Config,
    step_time_s: Callable[[StepState], float],
    *,
    scheduling_time_s: Callable[[StepState], float] = lambda _: 0.0,
    max_pending: int | None = None,
    horizon_s: float = np.inf,
) -> Simulation:
    """Serve requests until all are finished, or until a step would be scheduled at the horizon or later.

    Under asynchronous scheduling the engine looks at what a step gave once it has scheduled the next one, but the
    tokens count as given when the step ends.

    Args:
        requests: In order of arrival.
        config: The server.
        step_time_s: Duration of a step on the device, adapter loads included, in seconds.
        scheduling_time_s: What the engine needs to schedule a step, in seconds. The device waits for it, unless it
            still runs another one.
        max_pending: Most unanswered requests that the clients hold; None: unbounded.
        horizon_s: No step is scheduled from then on; those under way still end.
    """
    scheduler, clients = Scheduler(config), Clients(requests, max_pending)
    result = Simulation([], *(np.full(len(requests), np.nan) for _ in range(3)))
    in_flight: deque[tuple[StepState, float, float, float]] = deque()
    depth = 2 if config.behaviour.async_scheduling else 1
    now_s = device_free_s = 0.0
    while True:
        clients.send(scheduler, now_s)
        if scheduler.requests and now_s < horizon_s:
            state, scheduled_s = scheduler.schedule(), now_s
            now_s += scheduling_time_s(state)
            if state.scheduled:
                start_s = max(now_s, device_free_s)
                device_free_s = start_s + step_time_s(state)
                in_flight.append((state, scheduled_s, start_s, device_free_s))
                if len(in_flight) < depth:
                    continue
        if not in_flight:
            now_s = max(now_s, clients.next_arrival_s)
            if now_s >= horizon_s:
                break
            continue
        state, scheduled_s, start_s, end_s = in_flight.popleft()
        now_s = max(now_s, end_s)
        clients.send(scheduler, now_s)
        finished = scheduler.update(state)
        clients.answered(len(finished), now_s)
        result.steps.append(StepRecord(state, scheduled_s, start_s, end_s, finished))
        for number in state.sampling:
            result.first_token_s[number] = np.fmin(result.first_token_s[number], end_s)
        result.finished_s[list(finished)] = end_s
    result.sent_s[: clients.sent] = clients.sent_s
    return result
