"""What a vLLM server says of itself at /metrics, as plain numbers, once or sampled over a window.

Sample sparingly. vLLM keeps a line of ``vllm:lora_requests_info`` for every combination of running and waiting adapters
that it has seen, for ever; on a server whose adapters come and go the answer grows to megabytes, is put together by the
process that also hands out tokens, and stalls them: what is measured then is the measuring.
"""

import contextlib
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import lora_capacity.engines.vllm.metrics as names_of
from lora_capacity.errors import InputError, check_number
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.errors import ServerError

FloatArray = NDArray[np.float64]

SAMPLE_INTERVAL_S = 10.0
"""Default time between samples, seconds: an hour gives 360, and a busy server hardly feels them."""

_WANTED = (
    *(name for names in names_of.TOTALS.values() for name in names),
    *names_of.KV_USAGE,
    *(
        f"{name}_{part}"
        for names in names_of.HISTOGRAMS.values()
        for name in names
        for part in ("bucket", "sum", "count")
    ),
    names_of.FINISHED,
    names_of.CACHE_CONFIG,
    names_of.WAITING_BY_REASON,
)
_TOLD_BY_ALL = (*names_of.TOTALS["running"], *names_of.TOTALS["prompt_tokens"], names_of.FINISHED)
"""Metrics that every engine of every model has."""

# There may be a megabyte of these lines, which are searched and not parsed.
_MAX_LORA = re.compile(rf'^[ \t]*{names_of.LORA_REQUESTS}[ \t]*\{{[^\n]*?\bmax_lora="(\d+)"', re.MULTILINE)

_LINE = re.compile(r'\s*(?P<name>[\w:]+)\s*(?:\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(?P<value>\S+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

_TIMEOUT_S = 30.0
"""For an answer of /metrics: a busy server may take seconds to put megabytes together."""

Series = tuple[Mapping[str, str], float]
"""One series of a metric: its labels and its value."""


def metrics_text(endpoint: Endpoint, *, timeout_s: float = _TIMEOUT_S) -> str:
    """Return what a server answers to /metrics.

    Raises:
        ServerError: If it does not answer in time, or with a failure.
    """
    status, body = endpoint.get("/metrics", timeout_s=timeout_s)
    if status != 200:
        raise ServerError(f"{endpoint.url}/metrics answers with status {status}")
    return body.decode(errors="replace")


def of_one_server(text: str, model: str, model_name: str | None = None, engine: int | None = None) -> str:
    """Return the lines of /metrics that are about one engine of one model.

    Lines that tell of no model, or no engine, are kept, but for those of adapters where there are several models.

    Args:
        text: What /metrics answered, or several servers did.
        model: Whose metrics are wanted where they tell of several models.
        model_name: What the metrics call it, if not so.
        engine: Number of the engine that is wanted; None: the only one.

    Raises:
        InputError: If they tell of several models or engines and not of the one wanted, or of other numbers of slots.
        ServerError: If they are of the V0 engine.
    """
    found = parse_prometheus(text, (*_TOLD_BY_ALL, *names_of.ONLY_V0))
    if any(name in found for name in names_of.ONLY_V0):
        raise ServerError(
            "the metrics are of vLLM's V0 engine, which schedules otherwise than what is predicted here; observe a "
            "server of 0.8 or later without VLLM_USE_V1=0"
        )
    labels = [labels for name in _TOLD_BY_ALL for labels, _ in found.get(name, [])]
    models = sorted({each["model_name"] for each in labels if "model_name" in each})
    wanted = {}
    if model_name is not None or len(models) > 1:
        asked = model if model_name is None else model_name
        if asked not in models:
            raise InputError("--model-name", asked, ", ".join(models) or "nothing, as the metrics name no model")
        wanted["model_name"] = asked
    labels = [each for each in labels if each.get("model_name") in (None, wanted.get("model_name"))] or labels
    engines = sorted({each["engine"] for each in labels if "engine" in each})
    if engine is not None or len(engines) > 1:
        if str(engine) not in engines:
            told = "none" if engine is None else engine
            raise InputError("--engine-index", told, ", ".join(engines) or "nothing, as the metrics tell no engines")
        wanted["engine"] = str(engine)
    return "\n".join(line for line in text.splitlines() if _is_about(line, wanted, several=len(models) > 1))


def _is_about(line: str, wanted: Mapping[str, str], *, several: bool) -> bool:
    labels = dict(_LABEL.findall(line)) if wanted else {}
    if several and "model_name" not in labels and names_of.LORA_REQUESTS in line:
        return False
    return all(labels.get(name, value) == value for name, value in wanted.items())


def since_start(text: str) -> str:
    """Return the answer of /metrics that the same server gave at its start: all counts are 0."""
    lines = []
    for line in text.splitlines():
        match = _LINE.match(line)
        lines.append(line if match is None else f"{line[: match.start('value')]}0")
    return "\n".join(lines)


def parse_prometheus(text: str, names: Iterable[str]) -> dict[str, list[Series]]:
    """Return the series of some metrics in Prometheus' text format; others and broken lines are skipped.

    Args:
        text: What /metrics answered.
        names: The metrics wanted, by their full names (``..._bucket`` and so on).

    Returns:
        The series of each name found.

    Source: https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    wanted = frozenset(names)
    found: dict[str, list[Series]] = {}
    for line in text.splitlines():
        # Most lines are not wanted, and of those the longest ones: names first, the rest only where it matters.
        name = line.partition("{")[0].split(maxsplit=1)[:1]  # blanks and tabs may stand around it
        if not wanted.intersection(name) or (match := _LINE.match(line)) is None:
            continue
        with contextlib.suppress(ValueError):
            value = float(match["value"])
            labels = {
                name: re.sub(r"\\.", lambda escape: _ESCAPES.get(escape[0], escape[0]), content)
                for name, content in _LABEL.findall(match["labels"] or "")
            }
            found.setdefault(match["name"], []).append((labels, value))
    return found


@dataclass(frozen=True, eq=False)
class Histogram:
    """Times that a server counted by how long they were, over all its engines; or lengths, then in tokens throughout.

    Attributes:
        bounds_s: Upper bounds of the buckets, ascending, the last infinite, seconds ``[buckets]``.
        counts: Times at most as long as each bound, ``[buckets]``.
        sum_s: Sum of all times, seconds.
        count: How many there were.
    """

    bounds_s: FloatArray
    counts: FloatArray
    sum_s: float
    count: float

    @property
    def mean_s(self) -> float:
        """Mean in seconds; NaN if there was none."""
        return self.sum_s / self.count if self.count > 0 else float("nan")

    def quantile_s(self, share: float) -> float:
        """Return the time that a share of the times does not exceed, evenly spread within its bucket; NaN if none.

        Beyond the last finite bound nothing is known: that bound is then the answer, and too small.

        Args:
            share: From 0 to 1.
        """
        check_number("share", share, minimum=0, maximum=1)
        finite = np.isfinite(self.bounds_s)
        if self.count <= 0 or not finite.any():
            return float("nan")
        bounds_s = np.concatenate([[0.0], self.bounds_s[finite]])
        counts = np.concatenate([[0.0], self.counts[finite]])
        place = int(np.searchsorted(counts, share * self.count))
        if place == 0 or place >= counts.size:
            return float(bounds_s[min(place, counts.size - 1)])
        within = (share * self.count - counts[place - 1]) / (counts[place] - counts[place - 1])
        return float(bounds_s[place - 1] + within * (bounds_s[place] - bounds_s[place - 1]))

    def since(self, earlier: "Histogram") -> "Histogram":
        """Return the times that were added after an earlier reading of the same server."""
        counts = self.counts - earlier.counts if earlier.counts.size == self.counts.size else self.counts
        return Histogram(self.bounds_s, counts, self.sum_s - earlier.sum_s, self.count - earlier.count)


@dataclass(frozen=True)
class Snapshot:
    """A server's metrics at one time; NaN where it does not tell.

    Attributes:
        running: Requests in the batch.
        waiting: Requests not in the batch.
        kv_usage: Share of the KV cache in use, 0 to 1; the mean over engines.
        preemptions: Preemptions since the server started; likewise the next four.
        prompt_tokens: Prompt tokens processed.
        generation_tokens: Tokens generated.
        completed: Requests that ended with all of their output.
        broken_off: Requests that ended in another way.
        skipped: Those waiting that the scheduler skips, as for want of an adapter slot.
        prefix_queries: Prompt tokens, or blocks, that were looked up in the prefix cache since the server started.
        prefix_hits: Those of them that were there.
        external_prefix_hits: Those that came from other servers' caches.
        ttft: Times to first token, from arrival at the server.
        itl: Times between tokens.
        e2e: Times from arrival to the last token.
        queued: Times that requests that ended had waited for their place in the batch.
        served: Times that they had it.
        input_tokens: Prompt lengths of requests that ended; what are seconds of a `Histogram` are tokens here.
        output_tokens: Their outputs' lengths; likewise.
        kv_cache_tokens: Tokens that the KV cache holds, over all engines; NaN where the process that answers does not
            know, as in 0.8.5: its log does.
        max_loras: Adapter slots; None where the server has not said so, as before its first request.
    """

    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    prompt_tokens: float
    generation_tokens: float
    completed: float
    broken_off: float
    skipped: float
    prefix_queries: float
    prefix_hits: float
    external_prefix_hits: float
    ttft: Histogram
    itl: Histogram
    e2e: Histogram
    queued: Histogram
    served: Histogram
    input_tokens: Histogram
    output_tokens: Histogram
    kv_cache_tokens: float
    max_loras: int | None = None

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what /metrics answered.

        Raises:
            ServerError: If there is no metric of vLLM, one is no number, or the number of slots differs.
        """
        found = parse_prometheus(text, _WANTED)
        if not found:
            raise ServerError("/metrics has no metric of vLLM; was the server started with --disable-log-stats?")
        for name, series in found.items():
            for _, value in series:
                if not math.isfinite(value):
                    raise ServerError(f"/metrics has no number for {name}, but {value}")
        slots = sorted({int(each) for each in _MAX_LORA.findall(text)})
        if len(slots) > 1:
            each = " and ".join(map(str, slots))
            raise ServerError(
                f"/metrics tells of {each} adapter slots: of several servers, which have to be told apart"
            )
        told: dict[str, Any] = {name: _total(found, names) for name, names in names_of.TOTALS.items()}
        told |= {name: _histogram(found, names) for name, names in names_of.HISTOGRAMS.items()}
        return cls(
            **told,
            kv_usage=_mean(found, names_of.KV_USAGE),
            completed=_finished(found, whole=True),
            broken_off=_finished(found, whole=False),
            skipped=_skipped(found),
            kv_cache_tokens=_kv_cache_tokens(found),
            max_loras=slots[0] if slots else None,
        )

    @classmethod
    def of(cls, endpoint: Endpoint, *, timeout_s: float = _TIMEOUT_S) -> Self:
        """Ask a server for its metrics.

        Raises:
            ServerError: If it does not answer in time, or not with metrics of vLLM.
        """
        return cls.from_text(metrics_text(endpoint, timeout_s=timeout_s))


def _total(found: Mapping[str, list[Series]], names: tuple[str, ...]) -> float:
    """Return the sum over engines and labels, of the newest name: a version between has both, which count the same."""
    values = next(([value for _, value in found[name]] for name in names if name in found), None)
    return sum(values) if values else float("nan")


def _skipped(found: Mapping[str, list[Series]]) -> float:
    values = [
        value for labels, value in found.get(names_of.WAITING_BY_REASON, []) if labels.get("reason") == names_of.SKIPPED
    ]
    return sum(values) if values else float("nan")


def _finished(found: Mapping[str, list[Series]], *, whole: bool) -> float:
    """Return how many requests ended with all of their output, or without."""
    series = found.get(names_of.FINISHED)
    if not series:
        return float("nan")
    return sum(value for labels, value in series if (labels.get("finished_reason") not in names_of.BROKEN_OFF) == whole)


def _mean(found: Mapping[str, list[Series]], names: tuple[str, ...]) -> float:
    values = [value for name in names for _, value in found.get(name, [])]
    return sum(values) / len(values) if values else float("nan")


def _histogram(found: Mapping[str, list[Series]], names: tuple[str, ...]) -> Histogram:
    name = next((name for name in names if f"{name}_bucket" in found), names[0])
    counts: dict[float, float] = {}
    for labels, value in found.get(f"{name}_bucket", []):
        with contextlib.suppress(ValueError):
            bound_s = float(labels.get("le", ""))
            counts[bound_s] = counts.get(bound_s, 0.0) + value
    bounds_s = sorted(counts)
    return Histogram(
        np.array(bounds_s),
        np.array([counts[bound_s] for bound_s in bounds_s]),
        _total(found, (f"{name}_sum",)),
        _total(found, (f"{name}_count",)),
    )


def _kv_cache_tokens(found: Mapping[str, list[Series]]) -> float:
    tokens = 0.0
    for labels, _ in found.get(names_of.CACHE_CONFIG, []):
        try:
            tokens += int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        except (KeyError, ValueError):  # "None" where the process that answers is not the engine's
            return float("nan")
    return tokens or float("nan")


@dataclass(frozen=True, eq=False)
class Window:
    """Samples of a server over a time; arrays ``[samples]``.

    Attributes:
        at_s: When each was taken, seconds from the first.
        running: Requests in the batch.
        waiting: Requests not in the batch.
        skipped: Those of them that the scheduler skips.
        kv_usage: Share of the KV cache in use.
        preemptions: Preemptions since the server started.
        prompt_tokens: Prompt tokens processed since the server started.
        generation_tokens: Tokens generated since the server started.
        completed: Requests completed since the server started.
        first: The first sample in full.
        last: The last sample in full.
        missed: Samples that the server did not answer.
    """

    at_s: FloatArray
    running: FloatArray
    waiting: FloatArray
    skipped: FloatArray
    kv_usage: FloatArray
    preemptions: FloatArray
    prompt_tokens: FloatArray
    generation_tokens: FloatArray
    completed: FloatArray
    first: Snapshot
    last: Snapshot
    missed: int = 0

    @classmethod
    def of(cls, samples: Sequence[tuple[float, Snapshot]], missed: int = 0) -> Self:
        """Gather samples.

        Args:
            samples: When each was taken, seconds of any origin, ascending, and what it said; one at least.
            missed: Samples that the server did not answer.
        """
        arrays = {name: np.array([getattr(each, name) for _, each in samples], dtype=np.float64) for name in _SAMPLED}
        at_s = np.array([at_s for at_s, _ in samples]) - samples[0][0]
        return cls(at_s=at_s, first=samples[0][1], last=samples[-1][1], missed=missed, **arrays)

    def summary(self) -> dict[str, float]:
        """Return means and largest values by the column names of a table of serving runs; NaN where unknown."""
        late = self.at_s >= self.at_s[-1] / 2
        return {
            "mean_running": float(self.running.mean()),
            "mean_waiting": float(self.waiting.mean()),
            "mean_skipped": float(self.skipped.mean()),
            "mean_running_2nd_half": float(self.running[late].mean()),
            "mean_waiting_2nd_half": float(self.waiting[late].mean()),
            "max_running": float(self.running.max()),
            "max_waiting": float(self.waiting.max()),
            "mean_kv_usage": float(self.kv_usage.mean()),
            "max_kv_usage": float(self.kv_usage.max()),
            "preemptions": float(self.preemptions[-1] - self.preemptions[0]),
            "cached_share": self.cached_share,
        }

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens that were found in a prefix cache, of those looked up; NaN where unknown."""
        first, last = self.first, self.last
        queries, hits = (getattr(last, name) - getattr(first, name) for name in ("prefix_queries", "prefix_hits"))
        external = last.external_prefix_hits - first.external_prefix_hits
        return (hits + (external if external > 0 else 0.0)) / queries if queries > 0 else float("nan")


_SAMPLED = tuple(entry.name for entry in fields(Window) if entry.name in Snapshot.__dataclass_fields__)


@dataclass(eq=False)
class Sampler:
    """Samples a server in a thread of its own, as a context manager, from entering to leaving it.

    One sample is taken on entering, one on leaving, and others between; one that fails is skipped and counted.

    Attributes:
        endpoint: The server.
        interval_s: Seconds between samples; see the module's warning before making it short.
        timeout_s: Most seconds that a sample may take.
    """

    endpoint: Endpoint
    interval_s: float = SAMPLE_INTERVAL_S
    timeout_s: float = _TIMEOUT_S
    _samples: list[tuple[float, Snapshot]] = field(default_factory=list, repr=False)
    _missed: int = field(default=0, repr=False)
    _leaving: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_number("interval_s", self.interval_s, minimum=0, exclusive=True)
        check_number("timeout_s", self.timeout_s, minimum=0, exclusive=True)

    def __enter__(self) -> Self:
        self._take()
        self._thread = threading.Thread(target=self._run, name="metrics sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self._take()

    @property
    def window(self) -> Window:
        """The samples so far.

        Raises:
            ServerError: If the server answered none.
        """
        samples = list(self._samples)
        if not samples:
            raise ServerError(f"{self.endpoint.url}/metrics answered none of {self._missed} samples")
        return Window.of(samples, self._missed)

    def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self.interval_s, time.monotonic())  # after a slow answer: no samples in a rush
            if self._leaving.wait(due_s - time.monotonic()):
                return
            self._take()

    def _take(self) -> None:
        try:
            snapshot = Snapshot.of(self.endpoint, timeout_s=self.timeout_s)
        except ServerError:
            self._missed += 1
        else:
            self._samples.append((time.monotonic(), snapshot))
