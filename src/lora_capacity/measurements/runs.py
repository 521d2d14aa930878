"""Measured serving runs: reading their table, strictly, and what was measured in each."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from lora_capacity.errors import InputError, check_path
from lora_capacity.hardware.catalogue import same_gpu
from lora_capacity.measurements.schemas import SERVING_RUNS
from lora_capacity.status import Status
from lora_capacity.text import number_of
from lora_capacity.units import MS_PER_S

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Rows = TypeVar("Rows", bound="DataclassInstance")

MAX_NUM_SEQS = 2048
"""``max_num_seqs`` of runs whose table does not say.

Source: setting of the published H100 runs (arXiv 2508.08343); likewise the next."""

MAX_NUM_BATCHED_TOKENS = 2048
"""``max_num_batched_tokens`` of runs whose table does not say."""

METRICS_INTERVAL_S = 2.0
"""Time between two readings of the metrics in runs whose table does not say: of the published H100 runs."""

CACHED_SHARE = 0.01
"""Share of the prompts' tokens in a prefix cache above which a run is another question than what is predicted.

Predictions of runs compute every prompt; up to here that is at most a hundredth more than the server did."""

LENGTH_COLUMNS = ("std_input_tokens", "std_output_tokens", "max_output_tokens")
"""Columns that tell, beside the means, how long requests were."""

_AS_THEY_STAND = (
    *("run_id", "set", "scenario", "model", "gpu", "max_model_len", "max_pending", *LENGTH_COLUMNS),
    *("mean_input_tokens", "mean_output_tokens", "completed", "arrivals", "duration_s", "mean_running"),
    *("mean_kv_usage", "cached_share"),
)
"""Columns whose names and units are those of `Runs`."""

_STATUSES = {status.label: status for status in (Status.OK, Status.NO_KV_CACHE, Status.OOM)}
_MEASURED = (
    "mean_input_tokens",
    "mean_output_tokens",
    "completed",
    "duration_s",
    "input_throughput",
    "output_throughput",
    "mean_itl_ms",
    "mean_ttft_ms",
)


@dataclass(frozen=True, eq=False)
class Runs:
    """Measured runs; arrays ``[runs]`` unless said otherwise, NaN where a server did not start or nothing was recorded.

    Adapters of one rate form a class; which rank an adapter of some rate has is not recorded, so that all classes have
    the mean rank. Classes that a run lacks have a count of 0.

    Attributes:
        path: Where they were read.
        run_id: Name of the run, object; empty where it has none.
        set: Name of the campaign, object.
        scenario: Name of the workload, object.
        model: Name of the base model, object.
        gpu: Name of the GPU, object; empty where that is not told.
        max_loras: Slots.
        max_cpu_loras: Adapters served.
        max_lora_rank: Rank that slots were reserved for.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_model_len: Longest sequence in tokens; NaN: as long as the model takes.
        base_rate_per_s: Requests per second without an adapter, as asked for.
        max_pending: Most unanswered requests that the clients held.
        metrics_interval_s: Time between two readings of the server's metrics; 0: nobody read them.
        std_input_tokens: Standard deviation of the prompt lengths; NaN: not recorded, as the next two. Where all three
            are recorded, every answer had the length asked for, whatever its prompt's.
        std_output_tokens: Standard deviation of the answer lengths.
        max_output_tokens: Longest answer.
        class_count: Adapters of each class, ``[runs, classes]``.
        class_rate_per_s: Requests per second of one adapter of the class, as asked for, ``[runs, classes]``.
        mean_rank: Mean rank of the adapters.
        mean_input_tokens: Mean prompt length of the requests sent.
        mean_output_tokens: Mean answer length asked for.
        completed: Requests completed.
        arrivals: Requests sent.
        duration_s: Time observed in seconds.
        throughput_tokens_per_s: Input plus output tokens of completed requests per second.
        itl_s: Mean inter-token latency in seconds, as the clients saw it, likewise the next two.
        tpot_s: Mean over requests of their mean time per output token after the first, in seconds; NaN: not recorded.
        ttft_s: Mean time to first token in seconds.
        output_tokens_per_s: Output tokens of completed requests per second.
        mean_running: Requests in the batch, mean over time; NaN: not recorded, as the next.
        mean_kv_usage: Share of the KV cache in use, mean over time.
        cached_share: Share of the prompts' tokens that were found in a prefix cache; NaN: not recorded.
        status: :class:`~lora_capacity.status.Status` of the start, int64.
    """

    path: Path
    run_id: np.ndarray
    set: np.ndarray
    scenario: np.ndarray
    model: np.ndarray
    gpu: np.ndarray
    max_loras: IntArray
    max_cpu_loras: IntArray
    max_lora_rank: IntArray
    max_num_seqs: IntArray
    max_num_batched_tokens: IntArray
    max_model_len: FloatArray
    base_rate_per_s: FloatArray
    max_pending: FloatArray
    metrics_interval_s: FloatArray
    std_input_tokens: FloatArray
    std_output_tokens: FloatArray
    max_output_tokens: FloatArray
    class_count: FloatArray
    class_rate_per_s: FloatArray
    mean_rank: FloatArray
    mean_input_tokens: FloatArray
    mean_output_tokens: FloatArray
    completed: FloatArray
    arrivals: FloatArray
    duration_s: FloatArray
    throughput_tokens_per_s: FloatArray
    itl_s: FloatArray
    tpot_s: FloatArray
    ttft_s: FloatArray
    output_tokens_per_s: FloatArray
    mean_running: FloatArray
    mean_kv_usage: FloatArray
    cached_share: FloatArray
    status: IntArray

    def __len__(self) -> int:
        return int(self.model.size)

    def take(self, rows: IntArray) -> "Runs":
        """Return the runs of these indices."""
        return take_rows(self, rows)

    def completed_of(self, model: str) -> "Runs":
        """Return the runs of a model in which requests were completed.

        Raises:
            InputError: If there is none.
        """
        rows = np.flatnonzero((self.model == model) & self.started & (self.completed > 0))
        if not rows.size:
            raise InputError(f"{self.path}, model", model, "a model with runs that completed requests")
        return self.take(rows)

    def unlike(self, gpu: str) -> np.ndarray:
        """Return why a run cannot be held against a prediction, in words, object ``[runs]``; empty where it can.

        Args:
            gpu: Name of the GPU that is predicted.
        """
        others = {each: f"measured on {each}, not on {gpu}" for each in set(self.gpu) if each}
        others = {each: why for each, why in others.items() if not same_gpu(each, gpu)}
        cached = np.where(self.cached_share > CACHED_SHARE, "measured with prompts from a prefix cache", "")
        return np.array([others.get(each) or why for each, why in zip(self.gpu, cached, strict=True)], dtype=object)

    @property
    def started(self) -> Bool[np.ndarray, " runs"]:
        """Whether the server started, ``[runs]``."""
        return np.asarray(self.status == Status.OK)

    @property
    def nominal_rate_per_s(self) -> Float[np.ndarray, " runs"]:
        """Requests per second asked for, of all adapters and the base model together, ``[runs]``."""
        return np.asarray((self.class_count * self.class_rate_per_s).sum(axis=1) + self.base_rate_per_s)

    @property
    def tells_lengths(self) -> Bool[np.ndarray, " runs"]:
        """Whether the spread of the request lengths is recorded, ``[runs]``."""
        return np.asarray(~np.isnan(np.stack([getattr(self, name) for name in LENGTH_COLUMNS])).any(axis=0))

    def arrival_rate_per_s(self, max_pending: float, share: float = 0.95) -> FloatArray:
        """Requests per second that really came, ``[runs]``.

        As recorded; as asked for where nothing is recorded or the clients had to wait, since a request that a client
        could not send was offered all the same.

        Args:
            max_pending: Most unanswered requests that the clients could hold, where that is not recorded.
            share: Share of it from which on clients count as waiting.
        """
        most = np.where(np.isnan(self.max_pending), max_pending, self.max_pending)
        free = self.arrivals - self.completed < share * most  # False where not recorded
        recorded = np.where(free, self.arrivals, np.nan) / self.duration_s
        return np.where(free, recorded, self.nominal_rate_per_s)


def take_rows(table: Rows, rows: IntArray) -> Rows:
    """Return a dataclass of columns with the rows of these indices; what is no array is one for all rows."""
    values = {entry.name: getattr(table, entry.name) for entry in fields(table)}
    taken: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)}
    return replace(table, **taken)


def read_runs(path: str | Path) -> Runs:
    """Read a table of serving runs, CSV with a header line.

    Needed are ``model, max_loras, max_cpu_loras, max_lora_rank, ranks, rates, mean_input_tokens, mean_output_tokens,
    completed, duration_s, input_throughput, output_throughput, mean_itl_ms, mean_ttft_ms, status``; used where present
    are ``run_id, set, scenario, gpu, rate_values, rate_counts, arrivals, max_num_seqs, max_num_batched_tokens,
    max_model_len, base_rate_per_s, max_pending, cached_share`` and, where the lengths were exact, the three of
    `LENGTH_COLUMNS`. Lists (``rates``, ``ranks``, ``rate_values``, ``rate_counts``) stand in one cell with blanks
    between. Without
    ``rate_values`` and ``rate_counts`` the ``rates`` are dealt in turn to the adapters. Rows of a server that did not
    start (``status`` ``oom`` or ``no_kv_cache``) may leave all measured columns empty.

    Args:
        path: The table.

    Raises:
        InputError: If the file cannot be read, lacks a column, or a cell does not hold what it should or contradicts
            others of its row.
    """
    path = check_path("path", path)
    return runs_of(SERVING_RUNS.read(path), path)


def runs_of(table: Mapping[str, Any], path: Path) -> Runs:
    """Return the runs of a table's columns, as `read_runs` does.

    Args:
        table: The columns, as the schema reads them.
        path: The table, for messages.

    Raises:
        InputError: As of `read_runs`.
    """
    status = np.array([_status(path, row, text) for row, text in enumerate(table["status"])], dtype=np.int64)
    started = status == Status.OK
    for name in _MEASURED:
        for row in np.flatnonzero(started & np.isnan(table[name]))[:1]:
            raise InputError(_cell(path, row, name), "", "a number, since status is ok")
    for row in np.flatnonzero(table["max_loras"] > table["max_cpu_loras"])[:1]:
        allowed = f"1 to max_cpu_loras, {table['max_cpu_loras'][row]:g}"
        raise InputError(_cell(path, row, "max_loras"), int(table["max_loras"][row]), allowed)
    ranks = [_numbers(path, row, "ranks", text) for row, text in enumerate(table["ranks"])]
    for row, each in enumerate(ranks):
        if each.max() > table["max_lora_rank"][row]:
            allowed = f"at most max_lora_rank, {table['max_lora_rank'][row]:g}"
            raise InputError(_cell(path, row, "ranks"), table["ranks"][row], allowed)
    _refuse_contradictions(path, table, started)
    counts, rates = _classes(path, table)
    return Runs(
        path=path,
        **{name: table[name] for name in _AS_THEY_STAND},
        max_loras=table["max_loras"].astype(np.int64),
        max_cpu_loras=table["max_cpu_loras"].astype(np.int64),
        max_lora_rank=table["max_lora_rank"].astype(np.int64),
        max_num_seqs=_with_default(table["max_num_seqs"], MAX_NUM_SEQS),
        max_num_batched_tokens=_with_default(table["max_num_batched_tokens"], MAX_NUM_BATCHED_TOKENS),
        base_rate_per_s=np.nan_to_num(table["base_rate_per_s"]),
        metrics_interval_s=np.nan_to_num(table["metrics_interval_s"], nan=METRICS_INTERVAL_S),
        class_count=counts,
        class_rate_per_s=rates,
        mean_rank=np.array([each.mean() for each in ranks]),
        throughput_tokens_per_s=table["input_throughput"] + table["output_throughput"],
        itl_s=table["mean_itl_ms"] / MS_PER_S,
        tpot_s=table["mean_tpot_ms"] / MS_PER_S,
        ttft_s=table["mean_ttft_ms"] / MS_PER_S,
        output_tokens_per_s=table["output_throughput"],
        status=status,
    )


_COUNTS_OFF = 1.5
"""Factor by which adapters counted by rate may miss ``max_cpu_loras``: two of the published runs do, by a third."""


def _refuse_contradictions(path: Path, table: Mapping[str, Any], started: Bool[np.ndarray, " runs"]) -> None:
    """Refuse rows in which a column says what others rule out, as one in another unit or of another row does."""
    seqs = _with_default(table["max_num_seqs"], MAX_NUM_SEQS)
    none_came = started & (table["arrivals"] == 0) & (table["completed"] > 0)
    for name, wrong, allowed in (
        ("mean_running", table["mean_running"] > seqs, "at most max_num_seqs"),
        ("mean_kv_usage", table["mean_kv_usage"] > 1.0, "a share, at most 1"),
        ("cached_share", table["cached_share"] > 1.0, "a share, at most 1"),
        ("max_output_tokens", table["max_output_tokens"] < table["mean_output_tokens"], "at least mean_output_tokens"),
        ("arrivals", none_came, "the requests sent, since some were completed"),
    ):
        for row in np.flatnonzero(wrong)[:1]:
            raise InputError(_cell(path, row, name), float(table[name][row]), allowed)


def _with_default(column: Float[np.ndarray, " runs"], default: int) -> Int[np.ndarray, " runs"]:
    return np.where(np.isnan(column), default, column).astype(np.int64)


def _classes(
    path: Path, table: Mapping[str, Any]
) -> tuple[Float[np.ndarray, "runs classes"], Float[np.ndarray, "runs classes"]]:
    """Return how many adapters have which rate, ``[runs, classes]`` each, padded with zeros."""
    found = [_rates_of_row(path, row, table) for row in range(table["model"].size)]
    classes = max(rates.size for _, rates in found)
    counts, rates = np.zeros((2, len(found), classes))
    for row, (count, rate) in enumerate(found):
        counts[row, : count.size], rates[row, : rate.size] = count, rate
    return counts, rates


def _rates_of_row(
    path: Path, row: int, table: Mapping[str, Any]
) -> tuple[Float[np.ndarray, " classes"], Float[np.ndarray, " classes"]]:
    adapters = int(table["max_cpu_loras"][row])
    rates = _numbers(path, row, "rates", table["rates"][row])
    values, counts = table["rate_values"][row], table["rate_counts"][row]
    if not values and not counts:
        return (adapters // rates.size + (np.arange(rates.size) < adapters % rates.size)).astype(np.float64), rates
    value, count = _numbers(path, row, "rate_values", values), _numbers(path, row, "rate_counts", counts)
    if value.size != count.size or np.any(count != np.floor(count)):
        allowed = f"a whole number for each of the {value.size} rate_values"
        raise InputError(_cell(path, row, "rate_counts"), counts, allowed)
    if not adapters / _COUNTS_OFF <= count.sum() <= adapters * _COUNTS_OFF:
        allowed = f"numbers that add up to max_cpu_loras, {adapters}"
        raise InputError(_cell(path, row, "rate_counts"), counts, allowed)
    return count, value


def _numbers(path: Path, row: int, name: str, text: str) -> Float[np.ndarray, " numbers"]:
    try:
        numbers = np.array([number_of(word) for word in text.split()])
    except ValueError:
        numbers = np.array([])
    if not numbers.size or not np.all((numbers > 0) & np.isfinite(numbers)):
        raise InputError(_cell(path, row, name), text, "numbers > 0 with blanks between")
    return numbers


def _status(path: Path, row: int, text: str) -> Status:
    if text not in _STATUSES:
        raise InputError(_cell(path, row, "status"), text, ", ".join(_STATUSES))
    return _STATUSES[text]


def _cell(path: Path, row: int, name: str) -> str:
    return f"{path} row {row + 1}, {name}"
