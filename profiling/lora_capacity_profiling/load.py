"""Requests sent to a server at given times or a given number at once, and what became of each.

Open loop: a request is sent when it arrives, however many wait already, up to ``max_pending``; from then on one enters
as another ends, in order of arrival. Closed loop is the same with all arriving at once (:func:`at_once`): then
``max_pending`` are always in flight.
"""

import array
import asyncio
import contextlib
import enum
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.errors import InputError, check_number
from lora_capacity.units import MS_PER_S
from lora_capacity.workload.goodput import Goodput
from lora_capacity.workload.requests import BASE_MODEL, Requests
from lora_capacity_profiling.client import Client, RequestFailed, Response
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.errors import ServerError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Progress = Callable[[float, int, int], None]
"""Told once a second: seconds since the start, requests sent, requests ended."""

_FIRST_WORD = 3
"""Token numbers before it are special in most vocabularies: beginning, end, unknown."""

_POOL_TOKENS = 1 << 16
"""Prompts begin at random places of a random text this long: no two are likely to be alike."""

_FAILURES_IN_A_ROW = 20
"""Then the server is taken for dead: one that works fails now and then, not twenty times without a success."""

_SPARE_FILES = 64
"""Descriptors beside the connections: standard streams, logs, the event loop, Python's modules."""

_PROGRESS_S = 1.0
"""How often progress is told: as often as a reader can follow, and no work for the client."""


class RequestOutcome(enum.IntEnum):
    """What became of a request."""

    NOT_SENT = 0
    """Its time had not come, or no place was free, before the run was over."""
    UNFINISHED = 1
    """Sent, and cancelled when the run was over."""
    COMPLETED = 2
    """Its output came in full."""
    FAILED = 3
    """Its output did not come, or not in full."""


@dataclass(frozen=True, eq=False)
class LoadResult:
    """What became of the requests; arrays ``[requests]``, times in seconds from the start, NaN where it did not happen.

    Attributes:
        requests: The requests as they were to be sent.
        outcome: :class:`RequestOutcome` of each, int64.
        due_s: When it should have been sent: at its arrival, or when a place became free.
        sent_s: When it was.
        first_token_s: When its first token came.
        last_token_s: When its last token so far came.
        piece_s: When each piece of it came, ``[pieces]`` each; most pieces are one token. Empty unless asked for.
        duration_s: Length of the run in seconds.
        cpu_s: Processor time that this process took meanwhile: near ``duration_s``, it was the client that was slow.
        failures: How many requests failed for which reason.
    """

    requests: Requests
    outcome: IntArray
    due_s: FloatArray
    sent_s: FloatArray
    first_token_s: FloatArray
    last_token_s: FloatArray
    piece_s: tuple[FloatArray, ...]
    duration_s: float
    cpu_s: float
    failures: Mapping[str, int] = field(default_factory=dict)

    @property
    def completed(self) -> NDArray[np.bool_]:
        """Which requests got their output in full, ``[requests]``."""
        return np.asarray(self.outcome == RequestOutcome.COMPLETED)

    @property
    def sent(self) -> NDArray[np.bool_]:
        """Which requests were sent, ``[requests]``."""
        return np.asarray(self.outcome != RequestOutcome.NOT_SENT)

    @property
    def lag_s(self) -> FloatArray:
        """By how much each request was sent late, connecting included, seconds ``[requests]``."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> FloatArray:
        """Time from sending to the first token, seconds ``[completed]``."""
        return np.asarray((self.first_token_s - self.sent_s)[self.completed])

    @property
    def tpot_s(self) -> FloatArray:
        """Mean time of a token after the first, seconds ``[completed with two tokens or more]``."""
        many = self.completed & (self.requests.output_tokens > 1)
        return np.asarray((self.last_token_s - self.first_token_s)[many] / (self.requests.output_tokens[many] - 1))

    @property
    def itl_s(self) -> FloatArray:
        """Times between pieces of one output, seconds ``[pieces after the first of completed requests]``."""
        gaps_s = [np.diff(each) for each, completed in zip(self.piece_s, self.completed, strict=False) if completed]
        return np.concatenate(gaps_s) if gaps_s else np.empty(0)

    def attainment(self, goodput: Goodput) -> float:
        """Return the share of the requests that arrived within the run that kept all bounds; NaN if none arrived.

        One that was not sent, failed, or had no first token at the end has missed them. Of the requests under way then,
        as many are taken to keep the other bounds as of those that were completed.
        """
        arrived = self.requests.arrival_s <= self.duration_s
        failed = self.outcome == RequestOutcome.FAILED
        in_time = arrived & ~failed & (self.first_token_s - self.sent_s <= goodput.ttft_s)
        later_tokens = np.maximum(self.requests.output_tokens - 1, 1)
        ended = in_time & self.completed
        good = ended & ((self.last_token_s - self.first_token_s) / later_tokens <= goodput.tpot_s)
        good &= self.last_token_s - self.sent_s <= goodput.e2el_s
        if not arrived.any():
            return float("nan")
        return float(in_time.sum() / arrived.sum() * (good.sum() / ended.sum() if ended.any() else 1.0))

    def summary(self) -> dict[str, float]:
        """Return counts, throughput and latencies by the column names of a table of serving runs; NaN where unknown.

        Throughput and latencies are of completed requests. ``mean_itl_ms`` is the mean over tokens after the first, and
        does not depend on how the server bundles them; its median and 99th percentile are those of the times between
        pieces, known only where they were recorded.
        """
        requests, completed = self.requests, self.completed
        input_tokens = int(requests.input_tokens[completed].sum())
        output_tokens = int(requests.output_tokens[completed].sum())
        later_tokens = output_tokens - int(np.count_nonzero(completed))
        after_first_s = float((self.last_token_s - self.first_token_s)[completed].sum())
        return {
            "mean_input_tokens": float(requests.input_tokens.mean()),
            "mean_output_tokens": float(requests.output_tokens.mean()),
            "std_input_tokens": float(requests.input_tokens.std()),
            "std_output_tokens": float(requests.output_tokens.std()),
            "max_output_tokens": int(requests.output_tokens.max()),
            "arrivals": int(np.count_nonzero(self.sent)),
            "completed": int(np.count_nonzero(completed)),
            "duration_s": self.duration_s,
            "completed_input_tokens": input_tokens,
            "completed_output_tokens": output_tokens,
            "input_throughput": input_tokens / self.duration_s,
            "output_throughput": output_tokens / self.duration_s,
            **_latency_columns("ttft", self.ttft_s),
            **_latency_columns("tpot", self.tpot_s),
            **_latency_columns("itl", self.itl_s),
            "mean_itl_ms": MS_PER_S * after_first_s / later_tokens if later_tokens else float("nan"),
        }


def _latency_columns(name: str, times_s: FloatArray) -> dict[str, float]:
    known = times_s.size > 0
    return {
        f"mean_{name}_ms": MS_PER_S * float(times_s.mean()) if known else float("nan"),
        f"median_{name}_ms": MS_PER_S * float(np.median(times_s)) if known else float("nan"),
        f"p99_{name}_ms": MS_PER_S * float(np.percentile(times_s, 99)) if known else float("nan"),
    }


def at_once(adapter: ArrayLike, input_tokens: ArrayLike, output_tokens: ArrayLike) -> Requests:
    """Return requests that all arrive at time 0, for a closed loop.

    Args:
        adapter: Index of the adapter, ``BASE_MODEL`` (-1) for none, ``[requests]``.
        input_tokens: Prompt lengths, ``[requests]``.
        output_tokens: Output lengths, ``[requests]``.
    """
    adapter = np.asarray(adapter)
    return Requests(
        np.zeros(adapter.size),
        adapter.astype(np.int32),
        np.asarray(input_tokens, dtype=np.int32),
        np.asarray(output_tokens, dtype=np.int32),
    )


def run_load(
    endpoint: Endpoint,
    requests: Requests,
    models: Sequence[str],
    *,
    base_model: str,
    duration_s: float,
    max_pending: int | None = None,
    vocab_size: int = 1000,
    record_pieces: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> LoadResult:
    """Send requests to a server and wait until all have ended or the time is up; what still runs then is cancelled.

    Args:
        endpoint: The server.
        requests: What to send and when; lengths are exact, prompts random token numbers but for the
            prefixes that they share.
        models: The server's names of the adapters, by the index that requests have.
        base_model: The server's name of the model, for requests without an adapter.
        duration_s: Most seconds that this takes.
        max_pending: Most in-flight requests; None: as many as there are.
        vocab_size: Prompts hold token numbers below it.
        record_pieces: Whether to keep the time of every piece: 8 bytes a token.
        seed: Seed of the prompts.
        on_progress: Called once a second.

    Raises:
        InputError: If an adapter has no name, or so many connections cannot be opened.
        ServerError: If twenty requests in a row fail.
    """
    check_number("duration_s", duration_s, minimum=0, exclusive=True)
    check_number("vocab_size", vocab_size, minimum=_FIRST_WORD + 1, integer=True)
    if len(requests) == 0:
        raise InputError("requests", "none", "at least one request")
    for index in np.unique(requests.adapter):
        if not BASE_MODEL <= index < len(models):
            raise InputError("requests.adapter", int(index), f"-1 to {len(models) - 1}: there are {len(models)} names")
    limit = len(requests)
    if max_pending is not None:
        limit = min(limit, int(check_number("max_pending", max_pending, minimum=1, integer=True)))
    _allow_connections(limit)
    run = _Run(endpoint, requests, [*models, base_model], limit, vocab_size, record_pieces, seed)
    asyncio.run(run.drive(duration_s, on_progress))
    return run.result()


class _Run:
    """One run of load; lives in one event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        requests: Requests,
        names: list[str],
        max_pending: int,
        vocab_size: int,
        record_pieces: bool,
        seed: int,
    ) -> None:
        self.requests, self.names, self.max_pending, self.record_pieces = requests, names, max_pending, record_pieces
        self.client = Client(endpoint)
        self.outcome = np.zeros(len(requests), dtype=np.int64)
        self.due_s = np.full(len(requests), np.nan)
        self.responses: list[Response | None] = [None] * len(requests)
        self.failures: Counter[str] = Counter()
        self.failed_in_a_row = self.sent = self.ended = 0
        self.started_s = self.duration_s = self.cpu_s = 0.0
        random = np.random.default_rng(seed)
        longest = int(requests.input_tokens.max())
        self.words = random.integers(_FIRST_WORD, vocab_size, _POOL_TOKENS + longest).astype(str).tolist()
        self.begins = random.integers(0, _POOL_TOKENS, len(requests)).tolist()

    async def drive(self, duration_s: float, on_progress: Progress | None) -> None:
        """Send all requests in time and wait for their ends."""
        cpu_s = time.process_time()
        self.started_s = time.perf_counter()
        watcher = asyncio.create_task(self._tell(on_progress)) if on_progress else None
        try:
            # Being timed out is how an overloaded run ends.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(duration_s), asyncio.TaskGroup() as group:
                    await self._feed(group)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self.duration_s = time.perf_counter() - self.started_s
            self.cpu_s = time.process_time() - cpu_s
            self.client.close()
            if watcher is not None:
                watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher
            await asyncio.sleep(0)  # for connections to learn that they are closed

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        places = asyncio.Semaphore(self.max_pending)
        held_until_s = 0.0  # those that arrived while no place was free are due from then on
        for index, arrival_s in enumerate(self.requests.arrival_s.tolist()):
            request = self._request(index)  # ahead of its time, which is when it should only be written
            wait_s = self.started_s + arrival_s - time.perf_counter()
            # Without a wait, responses must still be read between two requests.
            await asyncio.sleep(max(wait_s, 0.0))
            if places.locked():
                await places.acquire()
                held_until_s = time.perf_counter() - self.started_s
            else:
                await places.acquire()
            self.due_s[index] = max(arrival_s, held_until_s)
            group.create_task(self._send(index, request, places))

    def _request(self, index: int) -> bytes:
        begin, shared = self.begins[index], int(self.requests.shared_prefix_tokens[index])
        # What adapters share with each other is no use to a prefix cache, which keeps them apart.
        own = self.words[begin + shared : begin + int(self.requests.input_tokens[index])]
        prompt = ",".join(self.words[:shared] + own)
        name = self.names[int(self.requests.adapter[index])]  # -1 is the last: the base model
        return self.client.completion_request(name, prompt, int(self.requests.output_tokens[index]))

    async def _send(self, index: int, request: bytes, places: asyncio.Semaphore) -> None:
        response = Response(piece_s=array.array("d") if self.record_pieces else None)
        self.responses[index] = response
        self.outcome[index] = RequestOutcome.UNFINISHED
        self.sent += 1
        try:
            await self.client.complete(request, response)
            self._check_length(index, response)
        except RequestFailed as failure:
            self.outcome[index] = RequestOutcome.FAILED
            self.failures[str(failure)] += 1
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= _FAILURES_IN_A_ROW:
                raise ServerError(f"{self.failed_in_a_row} requests in a row failed; the last: {failure}") from None
        else:
            self.outcome[index] = RequestOutcome.COMPLETED
            self.failed_in_a_row = 0
        finally:
            self.ended += 1
            places.release()

    def _check_length(self, index: int, response: Response) -> None:
        asked = (int(self.requests.input_tokens[index]), int(self.requests.output_tokens[index]))
        if (response.prompt_tokens, response.output_tokens) != asked:
            got = f"{response.prompt_tokens} + {response.output_tokens} tokens"
            raise RequestFailed(f"the server counts {got} where {asked[0]} + {asked[1]} were asked for")

    async def _tell(self, on_progress: Progress) -> None:
        while True:
            on_progress(time.perf_counter() - self.started_s, self.sent, self.ended)
            await asyncio.sleep(_PROGRESS_S)

    def result(self) -> LoadResult:
        """Return what became of the requests."""
        nan = float("nan")
        sent_s, first_s, last_s = (
            np.array([nan if each is None else getattr(each, name) for each in self.responses]) - self.started_s
            for name in ("sent_s", "first_s", "last_s")
        )
        pieces = self.responses if self.record_pieces else []
        return LoadResult(
            requests=self.requests,
            outcome=self.outcome,
            due_s=self.due_s,
            sent_s=sent_s,
            first_token_s=first_s,
            last_token_s=last_s,
            piece_s=tuple(
                np.array([] if each is None or each.piece_s is None else each.piece_s) - self.started_s
                for each in pieces
            ),
            duration_s=self.duration_s,
            cpu_s=self.cpu_s,
            failures=dict(self.failures),
        )


def _allow_connections(count: int) -> None:
    """Raise this process's limit of open files as far as so many connections need and the system allows."""
    needed = count + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        most = hard - _SPARE_FILES
        raise InputError("max_pending", count, f"at most {most}, for this system opens no more files", "see ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
