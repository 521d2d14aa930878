"""A serving run read off the metrics of a server that nobody here loads, such as one in production.

What vLLM's metrics tell is counted over all requests together. They do not tell which adapters are resident, nor how
often each is asked for, nor the limits that the server was started with: that must come from whoever runs it.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lora_capacity.engines.vllm.metrics as names_of
from lora_capacity.engines.vllm.metrics import LORA_REQUESTS
from lora_capacity.errors import InputError, check_number
from lora_capacity.measurements.runs import CACHED_SHARE
from lora_capacity.reading import read_text
from lora_capacity.units import MS_PER_S
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.metrics import (
    SAMPLE_INTERVAL_S,
    Histogram,
    Snapshot,
    Window,
    metrics_text,
    of_one_server,
    since_start,
)

Progress = Callable[[float], None]
"""Told, with every sample, the seconds since the first."""

_POLL_S = 0.2
"""How often progress is told: it seems to move, and an interrupt is heard at once."""

_LORA = re.compile(rf"^[ \t]*{LORA_REQUESTS}[ \t]*\{{([^\n]*)\}}[ \t]*(\S+)", re.MULTILINE)
_NAMES = re.compile(r'\b(?:running|waiting)_lora_adapters="([^"]*)"')
_COUNTED = ("prompt_tokens", "generation_tokens", "completed", "broken_off")
_METRICS = {name: names[0] for name, names in names_of.TOTALS.items()}
_METRICS |= {"completed": names_of.FINISHED, "broken_off": names_of.FINISHED}
_SETTLED = 20.0
"""Times a request's duration that an observation must last: then at most a tenth are cut off at its ends."""

_FEW_SAMPLES = 10
"""With fewer samples, means and maxima of what fluctuates say little and are left out."""


@dataclass(frozen=True)
class Observed:
    """Which server is observed, of those that metrics may tell of.

    Attributes:
        model: Name of its model.
        max_loras: Its slots; None: as its metrics say.
        model_name: What its metrics call the model, where they tell of several and not of ``model``.
        engine: Number of its engine, where there are several.
    """

    model: str
    max_loras: int | None = None
    model_name: str | None = None
    engine: int | None = None

    def take(self, text: str) -> str:
        """Return what /metrics answered of this server.

        Raises:
            InputError: If they tell of several and not of this one, of other slots, or of a server without LoRA.
            ServerError: If they hold no metric of vLLM's V1 engine, or one that is no number.
        """
        text = of_one_server(text, self.model, self.model_name, self.engine)
        told = Snapshot.from_text(text).max_loras
        if told == 0:
            raise InputError("max_lora of the metrics", 0, "a server started with --enable-lora", "it has LoRA off")
        if told is not None and self.max_loras not in (None, told):
            raise InputError("--max-loras", self.max_loras, f"{told}, which the metrics say", "leave it out")
        return text


@dataclass(frozen=True, eq=False)
class Observation:
    """What a server said over a time.

    Attributes:
        window: Its metrics.
        adapters_seen: Adapters that requests were for; None where the server does not tell.
        max_loras: Its adapter slots; None likewise.
        interrupted: Whether an interrupt ended the time early.
    """

    window: Window
    adapters_seen: frozenset[str] | None
    max_loras: int | None
    interrupted: bool = False

    @property
    def duration_s(self) -> float:
        """Seconds from the first to the last sample."""
        return float(self.window.at_s[-1])

    def measured(self) -> dict[str, float]:
        """Return counts, throughput and latencies by the column names of a table of serving runs.

        Latencies are the server's own: they begin as a request arrives there. Tokens are those of requests that ended
        in the time.

        Raises:
            ServerError: If no request was completed, the server was started anew meanwhile, or a metric is missing.
        """
        first, last = self.window.first, self.window.last
        self._check()
        completed = last.completed - first.completed
        broken_off = _zero_if_unknown(last.broken_off - first.broken_off)
        left = (last.running + last.waiting) - (first.running + first.waiting)
        inputs, outputs = last.input_tokens.since(first.input_tokens), last.output_tokens.since(first.output_tokens)
        mean_input, mean_output = (
            total / completed if math.isnan(lengths.mean_s) else lengths.mean_s
            for lengths, total in (
                (inputs, last.prompt_tokens - first.prompt_tokens),
                (outputs, last.generation_tokens - first.generation_tokens),
            )
        )
        found = {
            "mean_input_tokens": mean_input,
            "mean_output_tokens": mean_output,
            "arrivals": max(round(completed + broken_off + left), 0),
            "completed": completed,
            "duration_s": self.duration_s,
            "completed_input_tokens": completed * mean_input,
            "completed_output_tokens": completed * mean_output,
            "input_throughput": completed * mean_input / self.duration_s,
            "output_throughput": completed * mean_output / self.duration_s,
            **_latencies("ttft", last.ttft.since(first.ttft)),
            **_latencies("itl", last.itl.since(first.itl)),
            **self._occupancy(),
        }
        for name, value in found.items():
            if math.isinf(value) or value < 0:
                raise ServerError(f"what /metrics tells makes a {name} of {value:g}: something else than vLLM answers")
        return found

    def _occupancy(self) -> dict[str, float]:
        """Return how full the server was: of few samples only what was also counted between them."""
        first, last, known = self.window.first, self.window.last, self.window.summary()
        if self.window.at_s.size < _FEW_SAMPLES:
            known = {name: known[name] for name in ("preemptions", "cached_share")}
        # Little's law: requests in a place are the time that each spends there, times how many come.
        for name, before, after in (
            ("mean_running", first.served, last.served),
            ("mean_waiting", first.queued, last.queued),
        ):
            if (times := after.since(before)).count > 0:
                known[name] = times.sum_s / self.duration_s
        return known

    def _check(self) -> None:
        first, last = self.window.first, self.window.last
        check_number("window", self.duration_s, minimum=0, exclusive=True)
        for name in (*_COUNTED, "running", "waiting"):
            for each in (first, last):
                if not math.isfinite(getattr(each, name)):
                    raise ServerError(f"/metrics has no number for {name}: {_METRICS[name]} is missing")
        for name in _COUNTED:
            if getattr(last, name) < getattr(first, name):
                raise ServerError(
                    f"{name} fell from {getattr(first, name):g} to {getattr(last, name):g}: the server was "
                    "started anew in the time observed, or the order is wrong"
                )
        for name in ("ttft", "itl"):
            if not math.isfinite(getattr(last, name).sum_s + getattr(last, name).count):
                missing = " or ".join(names_of.HISTOGRAMS[name])
                raise ServerError(f"/metrics has no number for {name}: {missing} is missing")
        if not last.completed - first.completed > 0:
            raise ServerError("no request was completed in the time observed; observe for longer")
        if not last.itl.since(first.itl).count > 0:
            raise ServerError("no answer of two tokens or more was given in the time observed; observe for longer")

    def doubts(self, adapters: int) -> list[str]:
        """Return, in sentences, what of the metrics does not go with what is said of the server.

        Args:
            adapters: How many it is said to serve.
        """
        found = []
        mean_s = self.window.last.e2e.since(self.window.first.e2e).mean_s
        if self.duration_s < _SETTLED * mean_s:
            found.append(
                f"requests take {mean_s:.3g} s, much of the {self.duration_s:.0f} s observed: many began before or "
                "ended after"
            )
        if self.adapters_seen is not None and len(self.adapters_seen) > adapters:
            found.append(f"requests came for {len(self.adapters_seen)} adapters, more than the {adapters} given")
        if self.window.last.broken_off > self.window.first.broken_off:
            count = self.window.last.broken_off - self.window.first.broken_off
            found.append(f"{count:.0f} requests were broken off; their tokens are counted as those of completed ones")
        if self.window.cached_share > CACHED_SHARE:
            found.append(
                f"{self.window.cached_share:.0%} of the prompt tokens came from the prefix cache: `validate` and `fit` "
                "leave this run out, since their predictions compute all of them"
            )
        if self.window.missed:
            found.append(f"the server did not answer {self.window.missed} times")
        return found


def observe_server(
    url: str, duration_s: float, on_progress: Progress | None = None, *, observed: Observed | None = None
) -> Observation:
    """Sample a server's metrics for a time; an interrupt ends that time early.

    Args:
        url: Address of the server.
        duration_s: Seconds to observe.
        on_progress: Called a few times a second.
        observed: Which server; None: the only one that the metrics tell of.

    Raises:
        InputError: If the address or the time cannot be used, or the metrics do not go with ``observed``.
        ServerError: If it does not answer at the beginning, or never again.
    """
    check_number("window", duration_s, minimum=0, exclusive=True)
    endpoint = Endpoint.from_url(url)
    started_s = time.monotonic()
    observed = observed or Observed("")
    texts, missed, interrupted = [(0.0, observed.take(metrics_text(endpoint)))], 0, False
    interval_s = min(SAMPLE_INTERVAL_S, duration_s / 2)
    try:
        for number in range(1, math.ceil(duration_s / interval_s - 1e-9) + 1):
            due_s = min(number * interval_s, duration_s)
            while (now_s := time.monotonic() - started_s) < due_s:
                if on_progress is not None:
                    on_progress(now_s)
                time.sleep(min(_POLL_S, due_s - now_s))
            try:
                texts.append((time.monotonic() - started_s, observed.take(metrics_text(endpoint))))
            except ServerError:
                missed += 1
    except KeyboardInterrupt:
        if len(texts) < 2:
            raise
        interrupted = True
    if len(texts) < 2:
        raise ServerError(f"{url}/metrics answered at the beginning and never again")
    return replace(_observation(texts, missed), interrupted=interrupted)


def read_dumps(
    paths: Sequence[Path], duration_s: float | None = None, *, observed: Observed | None = None
) -> Observation:
    """Read answers of a server's /metrics, saved to files in order of time.

    Args:
        paths: The files; a single one stands for all since the server's start.
        duration_s: Seconds from the first, or the server's start, to the last, evenly spaced; by default the files' own
            times say.
        observed: Which server; None: the only one that the metrics tell of.

    Raises:
        InputError: If one cannot be read, their times do not ascend, a single one has no time, or the metrics do not go
            with ``observed``.
        ServerError: If one holds no metrics of vLLM's V1 engine.
    """
    if len(paths) == 1 and duration_s is None:
        raise InputError("--window", None, "the time since the server's start, with one file", "or give an earlier one")
    texts: list[tuple[float, str]] = []
    for place, path in enumerate(paths):
        text = (observed or Observed("")).take(read_text(path, "a file with an answer of /metrics", "replace"))
        if len(paths) == 1:
            return _observation([(0.0, since_start(text)), (duration_s or 0.0, text)], 0)
        at_s = path.stat().st_mtime if duration_s is None else duration_s * place / (len(paths) - 1)
        if texts and at_s <= texts[-1][0]:
            raise InputError(str(path), "not later than the one before", "files in order of time", "or give the window")
        texts.append((at_s, text))
    return _observation(texts, 0)


def _observation(texts: Sequence[tuple[float, str]], missed: int) -> Observation:
    window = Window.of([(at_s, Snapshot.from_text(text)) for at_s, text in texts], missed)
    return Observation(window, _seen(texts[0][1], texts[-1][1]), window.last.max_loras)


def _seen(first: str, last: str) -> frozenset[str] | None:
    """Return the adapters of which requests ran or waited meanwhile.

    A series stands for a combination of adapters; its value is when that was last seen, so those that changed were.
    """
    before, after = dict(_LORA.findall(first)), dict(_LORA.findall(last))
    if not after:
        return None
    changed = [labels for labels, value in after.items() if before.get(labels) != value]
    names = (name for labels in changed for group in _NAMES.findall(labels) for name in group.split(","))
    return frozenset(name for name in names if name)


def _latencies(name: str, times: Histogram) -> dict[str, float]:
    return {
        f"mean_{name}_ms": MS_PER_S * times.mean_s,
        f"median_{name}_ms": MS_PER_S * times.quantile_s(0.5),
        f"p99_{name}_ms": MS_PER_S * times.quantile_s(0.99),
    }


def _zero_if_unknown(value: float) -> float:
    return 0.0 if math.isnan(value) else value
