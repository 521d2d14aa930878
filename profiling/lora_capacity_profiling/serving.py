"""One serving run: a workload sent to a server, with the server's metrics sampled meanwhile."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_capacity.errors import InputError
from lora_capacity.workload import Workload
from lora_capacity.workload.requests import BASE_MODEL, Requests
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.load import LoadResult, Progress, at_once, run_load
from lora_capacity_profiling.metrics import SAMPLE_INTERVAL_S, Sampler, Snapshot, Window
from lora_capacity_profiling.runs import run_row

_SAMPLES, _LEAST_INTERVAL_S = 30, 1.0
"""Samples of the metrics in a short run, enough for means, and the shortest time between them."""

_WARM_UP_S = 300.0
"""A server that compiles kernels at its first requests, and loads every adapter, is done by then."""

_DRAIN_S = 30.0
"""vLLM aborts a request within a step of its client's leaving; what runs on for so long belongs to others."""

_DRAIN_POLL_S = 0.5  # seconds; each look is a request for the metrics

_WARM_UP_INPUT_TOKENS, _WARM_UP_OUTPUT_TOKENS = 32, 8
"""Two KV blocks of prefill and some decode steps: all that a request goes through, at little cost."""


@dataclass(frozen=True)
class Served:
    """Server with the names that requests to it carry.

    Attributes:
        endpoint: Where it is.
        adapters: Its names of the adapters, ``[adapters]``; none where it serves the base model alone.
        base_model: Its name of the model.
        vocab_size: Prompts hold token numbers below it.
    """

    endpoint: Endpoint
    adapters: Sequence[str]
    base_model: str
    vocab_size: int = 1000

    def load(self, requests: Requests, duration_s: float, **options: Any) -> LoadResult:
        """Send requests, see :func:`~lora_capacity_profiling.load.run_load` for options and failures."""
        names: dict[str, Any] = {"base_model": self.base_model, "vocab_size": self.vocab_size}
        return run_load(self.endpoint, requests, self.adapters, duration_s=duration_s, **names, **options)


@dataclass(frozen=True, eq=False)
class Serving:
    """What became of one serving run.

    Attributes:
        workload: The traffic.
        adapters: Adapters served.
        result: What the client saw.
        window: What the server's metrics said meanwhile.
    """

    workload: Workload
    adapters: int
    result: LoadResult
    window: Window

    def row(self, about: Mapping[str, object]) -> dict[str, object]:
        """Return the run as a row of a table of serving runs.

        Args:
            about: What is not known from the workload: ``run_id``, ``model`` and the server's settings; see
                :data:`~lora_capacity.measurements.schemas.RUN_COLUMNS`.
        """
        columns = traffic_columns(self.workload, self.adapters)
        columns["metrics_interval_s"] = metrics_interval_s(self.workload)
        measured = self.result.summary() | self.window.summary()
        return run_row({**columns, "status": "ok", **about}, measured)


def traffic_columns(workload: Workload, adapters: int) -> dict[str, object]:
    """Return what a table of serving runs says of the traffic: adapters, rates, ranks, and what clients hold.

    Args:
        workload: The traffic.
        adapters: Adapters served.
    """
    rates_per_s, ranks = workload.adapters.deal(adapters)
    values, counts = np.unique(rates_per_s, return_counts=True)
    return {
        "max_cpu_loras": adapters,
        "rates": _words(rates_per_s),
        "ranks": _words(ranks),
        "rate_values": _words(values),
        "rate_counts": _words(counts),
        "base_rate_per_s": workload.base_rate_per_s,
        "max_pending": "" if workload.max_pending is None else workload.max_pending,
    }


def serve_workload(
    served: Served, workload: Workload, *, seed: int = 0, on_progress: Progress | None = None
) -> Serving:
    """Send a workload's requests to a server over its horizon; what still runs at its end is cancelled.

    The server's metrics are sampled meanwhile, see :func:`metrics_interval_s`.

    Args:
        served: The server; see :func:`warm_up`.
        workload: The traffic; its first adapters are those served.
        seed: Seed of arrivals, lengths and prompts.
        on_progress: Called once a second.

    Raises:
        InputError: If the workload has not so many adapters, or there would be too many in-flight requests.
        ServerError: If the server stops answering.
    """
    requests = workload.sample_requests(len(served.adapters), seed)
    if not len(requests):
        raise InputError("horizon_s", workload.horizon_s, "a time in which a request arrives", "lengthen it")
    with Sampler(served.endpoint, interval_s=metrics_interval_s(workload)) as sampler:
        result = served.load(
            requests,
            workload.horizon_s,
            max_pending=workload.max_pending,
            record_pieces=True,
            seed=seed,
            on_progress=on_progress,
        )
    # All may have been completed before the horizon; nothing would have happened in the rest of it.
    result = replace(result, duration_s=max(result.duration_s, workload.horizon_s))
    return Serving(workload, len(served.adapters), result, sampler.window)


def metrics_interval_s(workload: Workload) -> float:
    """Return the time between two samples of the metrics: a thirtieth of the horizon, but from 1 to 10 seconds."""
    return min(max(workload.horizon_s / _SAMPLES, _LEAST_INTERVAL_S), SAMPLE_INTERVAL_S)


def warm_up(served: Served) -> None:
    """Ask every adapter twice, so that all that a server does only once is done.

    The first requests go to adapters: vLLM 0.32.0 for CPUs dies where the first goes to the base model.

    Raises:
        ServerError: If a request is not completed.
    """
    each = np.arange(len(served.adapters)) if served.adapters else np.array([BASE_MODEL])
    sizes = np.ones(each.size, dtype=np.int64)
    requests = at_once(each, sizes * _WARM_UP_INPUT_TOKENS, sizes * _WARM_UP_OUTPUT_TOKENS)
    for _ in range(2):
        result = served.load(requests, _WARM_UP_S)
        if not result.completed.all():
            why = next(iter(result.failures), f"no answer within {_WARM_UP_S:g} s")
            raise ServerError(f"{served.endpoint.url} does not answer for every adapter: {why}")


def rehearse(
    served: Served, workload: Workload, duration_s: float, *, seed: int = 0, on_progress: Progress | None = None
) -> None:
    """Send a workload's requests for a while, drop what is unfinished then, and wait until the server is idle.

    A server that has just been asked for batches of such sizes does not meet them for the first time in a run.

    Args:
        served: The server, warmed up by :func:`warm_up`.
        workload: The traffic.
        duration_s: Seconds of traffic; none: nothing is sent.
        seed: Seed of the requests; another one than the run's.
        on_progress: Called once a second.

    Raises:
        ServerError: If the server stops answering, or still has requests half a minute later.
    """
    if duration_s > 0:
        for_a_while = replace(workload, horizon_s=duration_s) if workload.trace is None else workload
        requests = for_a_while.sample_requests(len(served.adapters), seed)
        if len(requests):
            served.load(requests, duration_s, max_pending=workload.max_pending, seed=seed, on_progress=on_progress)
    until_s = time.monotonic() + _DRAIN_S
    while (left := _pending(served.endpoint)) > 0:
        if time.monotonic() > until_s:
            raise ServerError(
                f"{served.endpoint.url} still has {left:g} requests of others; verify on a server without traffic"
            )
        time.sleep(_DRAIN_POLL_S)


def _pending(endpoint: Endpoint) -> float:
    snapshot = Snapshot.of(endpoint)
    return snapshot.running + snapshot.waiting


def _words(numbers: np.ndarray) -> str:
    return " ".join(f"{number:g}" for number in numbers.tolist())
