"""What a simulation says of each configuration, whichever engine ran it, and as a table."""

import enum
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import struct
from jax import Array
from numpy.typing import NDArray

from lora_capacity.errors import InputError
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import STARVED_SHORTFALL, Status

if TYPE_CHECKING:
    import pandas
    import pyarrow

_LEAST_PER_S = 1e-6
"""Rate below which nothing arrives, for Little's law: a request in eleven days."""


class Bottleneck(enum.IntEnum):
    """What keeps a configuration from serving more, at the end of its horizon."""

    NONE = 0
    """Nothing: the server keeps up with the arrivals."""
    SLOTS = 1
    """More adapters want to run than there are slots."""
    KV_CACHE = 2
    """The KV cache is full."""
    TOKEN_BUDGET = 3
    """Every step carries ``max_num_batched_tokens``."""
    SEQUENCES = 4
    """``max_num_seqs`` requests are running."""

    @property
    def label(self) -> str:
        """Lower-case name as it stands in files and JSON."""
        return self.name.lower()


@struct.dataclass
class Series:
    """Means over equal parts of the horizon, ``[configs, samples]``; NaN where no step ended.

    Attributes:
        end_s: When the last step of each part ended: until then the mean is, and from the one before.
        running: Requests in the batch.
        waiting: Requests in the queue.
        kv_usage: Share of the KV cache in use.
        active_adapters: Different adapters in a step.
        completed_per_s: Requests completed.
        throughput_tokens_per_s: Their prompt and output tokens.
    """

    end_s: Array
    running: Array
    waiting: Array
    kv_usage: Array
    active_adapters: Array
    completed_per_s: Array
    throughput_tokens_per_s: Array


@struct.dataclass
class EventDetails:
    """What only a simulation of every engine step tells; NaN where there is nothing to tell.

    Attributes:
        ttft_quantiles_s: 50, 95 and 99 % quantile of the time to first token, to 4 % as the next two,
            ``[configs, 3]``.
        tpot_quantiles_s: Those of the mean time per further token, of requests that were not preempted.
        e2e_quantiles_s: Those of the time to the last token.
        quantile_requests: Requests that each of the three kinds of quantiles rests on, int32 ``[configs, 3]``.
        unanswered: Requests that wait for their first token at the end, int32 ``[configs]``. They count in quantiles
            with the time they have waited so far.
        ttft_at_least: Whether each quantile of the time to first token is therefore a lower bound, bool
            ``[configs, 3]``.
        e2e_at_least: The same of the time to the last token.
        adapter_worst_wait_s: Longest time that a request of each adapter has waited for its admission,
            ``[configs, adapters]``; adapters class by class, padding last.
        max_running: Most requests in the batch, int32 ``[configs]``.
        max_adapters: Most different adapters in a step, int32 ``[configs]``.
        max_kv_usage: Largest share of the KV cache in use, ``[configs]``.
        adapter_arrived: Requests that arrived for each adapter, int32 ``[configs, adapters]``.
        adapter_completed: Those completed by the end of the last step, int32 ``[configs, adapters]``.
        disk_loads: Adapters read from disk, int32 ``[configs]``.
        preemptions: Preemptions, int32 ``[configs]``.
        steps: Engine steps, int32 ``[configs]``.
        compute_share: Share of the time in which a step ran, scheduling included, ``[configs]``.
        scheduling_share: Part of that which the scheduler spent on requests that it skipped, ``[configs]``.
        load_share: Share of the time in which adapters were loaded, ``[configs]``.
        iterations: Iterations that the simulation's own loop took, int32 ``[configs]``.
        series: Means over parts of the horizon, as many as were asked for.
    """

    ttft_quantiles_s: Array
    tpot_quantiles_s: Array
    e2e_quantiles_s: Array
    quantile_requests: Array
    unanswered: Array
    ttft_at_least: Array
    e2e_at_least: Array
    adapter_worst_wait_s: Array
    max_running: Array
    max_adapters: Array
    max_kv_usage: Array
    adapter_arrived: Array
    adapter_completed: Array
    disk_loads: Array
    preemptions: Array
    steps: Array
    compute_share: Array
    scheduling_share: Array
    load_share: Array
    iterations: Array
    series: Series

    @property
    def idle_share(self) -> Array:
        """Share of the time in which there was nothing to do, ``[configs]``."""
        return (1.0 - self.compute_share - self.load_share).clip(0.0)


@struct.dataclass
class WindowDetails:
    """What traffic over time does, window by window, each ``[configs, windows]``.

    Attributes:
        start_s: Where the window begins.
        end_s: Where it ends.
        requests_per_s: Requests that arrive per second.
        served_per_s: Requests completed per second; from the steady twin, taken up.
        mean_running: Requests in the batch, mean over time.
        mean_waiting: Requests waiting, mean over time, those carried over from earlier windows among them.
        kv_usage: Share of the KV cache in use, mean over time.
        ttft_s: Mean time to first token; NaN from the event twin.
        attainment: Share of the arriving requests that keep their bounds; NaN from the event twin.
    """

    start_s: Array
    end_s: Array
    requests_per_s: Array
    served_per_s: Array
    mean_running: Array
    mean_waiting: Array
    kv_usage: Array
    ttft_s: Array
    attainment: Array

    @property
    def wait_s(self) -> Array:
        """Mean wait for admission by Little's law, 0 where nothing arrives, ``[configs, windows]``."""
        return self.mean_waiting / np.maximum(self.requests_per_s, _LEAST_PER_S)

    @property
    def worst(self) -> NDArray[np.int64]:
        """Number of the worst window of each configuration, ``[configs]``.

        It keeps the fewest bounds, to a thousandth; of equals it has the longest wait, to a millisecond; of equals it
        is the busiest.
        """
        kept = np.round(np.nan_to_num(np.asarray(self.attainment), nan=1.0), 3)
        waits = np.round(np.nan_to_num(np.asarray(self.wait_s)), 3)
        rows = zip(kept, waits, np.asarray(self.requests_per_s), strict=True)
        return np.array([np.lexsort((-rate, -wait, share))[0] for share, wait, rate in rows])


@struct.dataclass
class ClientView:
    """Mean latencies as clients measure them, behind the server's front end, each ``[configs]``.

    Attributes:
        ttft_s: Time to first token of the requests that got one.
        tpot_s: Mean over requests of their mean time per output token after the first.
        itl_s: Time between two chunks of a stream: tokens that leave together are one.
    """

    ttft_s: Array
    tpot_s: Array
    itl_s: Array


@struct.dataclass
class Results:
    """Predictions, each ``[configs]`` unless said otherwise; NaN where the server does not start.

    Attributes:
        throughput_tokens_per_s: Input plus output tokens of requests completed within the horizon, per second.
        offered_tokens_per_s: Tokens of arriving requests per second.
        completed_per_s: Requests completed per second.
        class_service: Share of the arrivals of each class that are completed, ``[configs, classes]``.
        mean_running: Requests in the batch, mean over time.
        mean_waiting: Requests waiting, mean over time.
        step_time_s: Mean time of an engine step.
        itl_s: Mean inter-token latency over the tokens of all requests. The event engine counts the time of unfinished
            requests too.
        tpot_s: Mean over requests of their mean time per output token after the first.
        ttft_s: Mean time to first token of all requests that arrive; those that wait for it at the end count with the
            time that they have waited so far, so that it is a lower bound where there are any.
        answered_ttft_s: The same of those that get their first token within the horizon, which is what clients measure.
        attainment: Share of the arriving requests that keep the bounds of the scenarios as clients see them; those
            that wait for their first token at the end do not.
        active_adapters: Different adapters in the batch, mean over time.
        kv_usage: Share of the KV cache in use, mean over time.
        loads_per_s: Adapter loads into GPU slots per second.
        client: Mean latencies that clients measure; all others are the engine's.
        limit: `Bottleneck` at the end of the horizon, int32.
        status: `Status`, int32.
        slot_wait_s: Mean wait of a request for a slot of its adapter, part of ``ttft_s``; from the steady twin under a
            load that does not change, else None.
        events: What only engine steps tell; None from the steady twin.
        windows: What is told of each window of traffic over time; None without.
        scenarios: The configurations, for `to_arrow`; None where nobody says.
    """

    throughput_tokens_per_s: Array
    offered_tokens_per_s: Array
    completed_per_s: Array
    class_service: Array
    mean_running: Array
    mean_waiting: Array
    step_time_s: Array
    itl_s: Array
    tpot_s: Array
    ttft_s: Array
    answered_ttft_s: Array
    attainment: Array
    active_adapters: Array
    kv_usage: Array
    loads_per_s: Array
    client: ClientView
    limit: Array
    status: Array
    slot_wait_s: Array | None = None
    events: EventDetails | None = None
    windows: WindowDetails | None = None
    scenarios: Scenarios | None = None

    @property
    def service(self) -> Array:
        """Throughput as a share of the offered load, ``[configs]``."""
        return self.throughput_tokens_per_s / self.offered_tokens_per_s

    def starved(self, threshold: float = STARVED_SHORTFALL) -> Array:
        """Whether throughput is at least ``threshold`` below the offered load, ``[configs]``; False if unknown."""
        return self.service <= 1.0 - threshold

    def to_arrow(self) -> "pyarrow.Table":
        """Return a table of `pyarrow`, a row for each configuration, with the columns that ``sweep`` writes.

        Names have units (``throughput_tokens_per_s``, ``ttft_s``); ``status`` and ``limit``, the bottleneck, are words;
        numbers are NaN where the server does not start.

        Raises:
            InputError: If the results do not know their configurations, which those of `simulate` do.
        """
        import pyarrow

        if self.scenarios is None:
            raise InputError("scenarios", None, "configurations beside results", "those of `simulate` have them")
        return pyarrow.table(table(self.scenarios, self))

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the table of `to_arrow` as a ``DataFrame`` of pandas, which has to be installed.

        Raises:
            InputError: As of `to_arrow`.
            ImportError: If pandas is not installed.
        """
        try:
            import pandas  # noqa: F401  # Arrow imports it itself, and says less of what is missing
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: `pip install pandas`; to_arrow does without") from error
        return self.to_arrow().to_pandas()


_SETTINGS = ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens")
_TOLD_APART = (
    "throughput_tokens_per_s",
    "offered_tokens_per_s",
    "class_service",
    "client",
    "limit",
    "status",
    "slot_wait_s",
    "events",
    "windows",
    "scenarios",
)
_PREDICTED = tuple(entry.name for entry in fields(Results) if entry.name not in _TOLD_APART)
_QUANTILES = ("p50", "p95", "p99")
_DETAILS = (
    *("unanswered", "max_running", "max_adapters", "max_kv_usage", "preemptions", "disk_loads", "steps"),
    *("compute_share", "scheduling_share", "load_share", "idle_share"),
)


def table(scenarios: Scenarios, results: Results, threshold: float = STARVED_SHORTFALL) -> dict[str, NDArray[Any]]:
    """Return configurations and predictions as named columns, units in the names, codes as labels.

    Args:
        scenarios: The configurations.
        results: What an engine says of them.
        threshold: Share below the offered load from which throughput counts as starved.

    Returns:
        Columns ``[configs]``: ``max_cpu_loras``, which is the number of adapters served unless host memory holds fewer
        (then ``adapters`` comes first, how many are served), ``max_loras``, ``max_lora_rank``, ``max_num_seqs``,
        ``max_num_batched_tokens``, ``kv_cache_tokens`` (integers), ``throughput_tokens_per_s``,
        ``offered_tokens_per_s``, ``service``, ``starved`` (bool), ``completed_per_s``, ``mean_running``,
        ``mean_waiting``, ``step_time_s``, ``itl_s``, ``tpot_s``, ``ttft_s``, ``answered_ttft_s``, ``attainment``,
        ``active_adapters``, ``kv_usage``, ``loads_per_s``, ``client_ttft_s``, ``client_tpot_s``, ``client_itl_s``,
        ``limit`` and ``status`` (labels).

        Where the results have ``events``, also ``ttft_p50_s``, ``ttft_p95_s``, ``ttft_p99_s`` and the same of ``tpot``
        and ``e2e``; ``ttft_requests``, … , on how many requests each kind rests; ``unanswered``; and because of those
        ``ttft_lower_bound_from`` and ``e2e_lower_bound_from``, from which quantile on they are lower bounds (``p50``,
        ``p95``, ``p99`` or empty); ``max_running``, ``max_adapters``, ``max_kv_usage``, ``preemptions``,
        ``disk_loads``, ``steps``, ``compute_share``, ``scheduling_share``, ``load_share``, ``idle_share``,
        ``worst_service``, the smallest share of an adapter's requests that were completed, and ``worst_wait_s``, the
        longest that a request has waited for its admission.
    """
    adapters, room = np.asarray(scenarios.class_count).sum(axis=1), scenarios.max_cpu_loras
    columns = {"max_cpu_loras": adapters} if room is None else {"adapters": adapters, "max_cpu_loras": np.asarray(room)}
    columns |= {name: np.asarray(getattr(scenarios, name)) for name in _SETTINGS}
    columns = {name: np.rint(column).astype(np.int64) for name, column in columns.items()}
    columns["throughput_tokens_per_s"] = np.asarray(results.throughput_tokens_per_s)
    columns["offered_tokens_per_s"] = np.asarray(results.offered_tokens_per_s)
    columns |= {"service": np.asarray(results.service), "starved": np.asarray(results.starved(threshold))}
    columns |= {name: np.asarray(getattr(results, name)) for name in _PREDICTED}
    columns |= {f"client_{name}": np.asarray(values) for name, values in vars(results.client).items()}
    statuses = [Status(code) for code in np.asarray(results.status)]
    limits = [
        Bottleneck(code).label if status.started else ""
        for code, status in zip(np.asarray(results.limit), statuses, strict=True)
    ]
    columns["limit"] = np.array(limits, dtype=object)
    columns["status"] = np.array([status.label for status in statuses], dtype=object)
    if results.events is not None:
        columns |= _event_columns(results.events, ~np.isnan(columns["throughput_tokens_per_s"]))
    return columns


def _event_columns(events: EventDetails, told: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {}
    for time, requests in zip(("ttft", "tpot", "e2e"), np.asarray(events.quantile_requests).T, strict=True):
        quantiles_s = np.asarray(getattr(events, f"{time}_quantiles_s")).T
        columns |= {f"{time}_{name}_s": values_s for name, values_s in zip(_QUANTILES, quantiles_s, strict=True)}
        columns[f"{time}_requests"] = requests
    for time in ("ttft", "e2e"):
        bounds = np.asarray(getattr(events, f"{time}_at_least"))
        lowest = np.array([*_QUANTILES, ""], dtype=object)[np.where(bounds.any(axis=1), bounds.argmax(axis=1), 3)]
        columns[f"{time}_lower_bound_from"] = lowest
    columns |= {name: np.asarray(getattr(events, name)) for name in _DETAILS}
    arrived, completed = np.asarray(events.adapter_arrived), np.asarray(events.adapter_completed)
    service = np.divide(completed, arrived, out=np.ones(arrived.shape, np.float32), where=arrived > 0).min(axis=1)
    waited_s = np.asarray(events.adapter_worst_wait_s).max(axis=1)
    return columns | {"worst_service": np.where(told, service, np.nan), "worst_wait_s": waited_s}
