"""Batches of configurations: which go together, how many fit into memory, and how one is run.

On a CPU each core runs one configuration after the other, by the twin for processors. On an accelerator a batch is run
at once, and its loop goes on until its last server is done: servers with about as much to do go together. Sizes are
rounded up, so that batches share what was compiled.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs, LoadCosts, LoraKernels, StepCosts
from lora_capacity.engines import SchedulerRules
from lora_capacity.errors import InputError, check_number
from lora_capacity.run.compile import compiled_twin
from lora_capacity.run.drawn import Drawn
from lora_capacity.run.requests import pack_requests
from lora_capacity.run.resources import available_cores, available_memory_bytes
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.events import RequestTables
from lora_capacity.twins.events.fast_forward import MOST_SKIPPED
from lora_capacity.twins.events.kv_cache import BLOCK_SIZE
from lora_capacity.twins.events.requests import TICKS
from lora_capacity.twins.events.server import build_server
from lora_capacity.twins.events.simulation import initial_state
from lora_capacity.twins.events.state import WINDOW
from lora_capacity.workload import Requests

WIDTH_ACCELERATOR = 4096
"""Most configurations that an accelerator runs at once: fewer use less of its vector units."""

LONGEST_BATCH, BATCHES = 16, 256
"""Most configurations in a batch on a CPU; and batches that there should be at least, for an even end on many cores.
How many cores there are changes no batch: results are the same to the bit on any number of machines."""

WORTH_COMPILING, MOST_SIZES = 64, 4
"""Configurations for which tables of a size of their own are compiled, which saves memory; and most such sizes."""

MOST_SAMPLES = 100_000
"""Most parts of a series: an hour has about as many engine steps, and none ends in further parts."""

MEMORY_SHARE = 0.5
"""Share of the free memory that batches may take."""

_LAYOUT_STEP = 1024
"""Requests that tables are laid out in steps of."""

_COMPILED: set[Any] = set()
_COMPILING = threading.Lock()
"""What has been compiled, and whoever compiles: one at a time, since a compilation takes seconds of all cores."""

_CLASSES = 64
"""Classes that configurations are laid out in steps of, more than most workloads have, so that few shapes are compiled:
they only serve to tell results apart."""

_MOST_LAID_OUT = 2**20
"""Requests that clients may hold back and that tables show all the same: drawing them takes about a second."""

_SUMMARY_BYTES = 20
"""Bytes per request that results are made with: who waits at the end, how long, and in which bins of the histogram.

Source: what XLA plans for tables of 3,000 and 14,000 requests beyond tables and state."""

_REQUEST_BYTES = 128
"""Bytes per request on a CPU: as it is drawn, in the tables, and in the server; the rest of a server is small."""

_COSTS: tuple[Any, ...] = (StepCosts, LoadCosts, LoraKernels)

_OF_ADAPTERS = ("adapter_arrived", "adapter_completed", "adapter_worst_wait_s")

_MARGIN = 1.25
"""Requests laid out per request that the steady twin sees completed, where clients hold requests back."""


@dataclass(frozen=True)
class Batch:
    """Configurations that are run together.

    Attributes:
        rows: Which, ``[rows]``.
        width: How many are run at a time; on an accelerator fewer rows are filled up to it.
        requests: Requests that each has room for.
        adapters: Adapters that each has room for.
        block_size: Tokens of a KV block, of all.
    """

    rows: NDArray[np.int64]
    width: int
    requests: int
    adapters: int
    block_size: int


@dataclass(frozen=True)
class Observation:
    """What is told of the time served.

    Attributes:
        warmup_s: Time at the beginning that is left out.
        samples: Parts of the horizon in a series.
    """

    warmup_s: float = 0.0
    samples: int = 0

    def check(self, horizon_s: NDArray[np.floating[Any]]) -> None:
        """Raise `InputError` if nothing is left to observe."""
        check_number("samples", self.samples, minimum=0, maximum=MOST_SAMPLES, integer=True)
        check_number("warmup_s", self.warmup_s, minimum=0)
        if self.warmup_s >= horizon_s.min():
            raise InputError("warmup_s", self.warmup_s, f"less than the horizon, {horizon_s.min():g} s")


@dataclass(frozen=True)
class Batches:
    """How configurations are cut into batches and run.

    Attributes:
        calibration: Whose costs and vLLM version hold.
        most: Most requests in the table of each configuration, ``[configs]``: about what it needs.
        work: What each takes, against the others: about its iterations, or the requests that arrive, ``[configs]``.
        adapters: Adapters of each, rounded, ``[configs]``.
        block_size: Tokens of a KV block of each, ``[configs]``.
        longest_output: Longest answer, tokens.
        at_once: Batches that run at the same time.
        memory_bytes: What they may take together.
        observation: What is told.
        longest_prefix: Blocks of the longest prefix that requests share.
        processors: Whether cores run them, not an accelerator.
    """

    calibration: Calibration
    most: NDArray[np.int64]
    work: NDArray[np.float64]
    adapters: NDArray[np.int64]
    block_size: NDArray[np.int64]
    longest_output: int
    at_once: int
    memory_bytes: float
    observation: Observation = Observation()
    longest_prefix: int = 0
    processors: bool = True

    @classmethod
    def plan(
        cls, calibration: Calibration, host: Any, steady: Results | None, longest_output: int, observation: Observation
    ) -> Self:
        """Size configurations by what the steady twin says of them, or where it is not asked by what arrives."""
        on_cpu = _runs_on_cpu()
        return cls(
            calibration,
            _most_requests(host, steady),
            _arriving(host) if steady is None else expected_turns(host, steady),
            np.array([_rounded(int(count) + 1) - 1 for count in host.class_count.sum(axis=1)]),
            np.asarray(host.block_size, dtype=np.int64),
            (1 << longest_output.bit_length()) - 1,
            available_cores() if on_cpu else 1,
            MEMORY_SHARE * free_memory_bytes(),
            observation,
            processors=on_cpu,
        )

    @property
    def configs(self) -> int:
        """Number of configurations."""
        return self.most.size

    @property
    def rules(self) -> SchedulerRules:
        """Rules of this vLLM's scheduler."""
        return self.calibration.behaviour.scheduler

    def cut(self, wanted: NDArray[np.bool_] | None = None) -> list[Batch]:
        """Return batches of the configurations wanted, ``[configs]``, or of all; the longest first, for an even end.

        Raises:
            InputError: If a configuration alone needs more memory than there is.
        """
        if wanted is None:
            wanted = np.ones(self.configs, dtype=bool)
        widest = self._widest(int(wanted.sum()))
        batches = [
            batch
            for size in np.unique(self.block_size[wanted])  # a static setting of what is compiled
            for rows in self._alike(wanted & (self.block_size == size), max(WORTH_COMPILING, widest))
            for batch in self._cut_alike(rows, widest)
        ]
        return sorted(batches, key=lambda batch: -self.work[batch.rows].max())

    def _cut_alike(self, order: NDArray[np.int64], widest: int) -> list[Batch]:
        adapters, common, batches = int(self.adapters[order].max()), self._room(order), []
        while order.size:
            width, room = widest, common  # one shape is compiled once
            while not self._fits(width, room, adapters):
                if width == self._devices:
                    raise self._too_large(order[:width], adapters)
                width = max(width // 2, self._devices)
                room = self._room(order[:width])
            batches.append(Batch(order[:width], width, room, adapters, int(self.block_size[order[0]])))
            order = order[width:]
        return batches

    def _alike(self, wanted: NDArray[np.bool_], least: int) -> list[NDArray[np.int64]]:
        """Group configurations by the requests that they need, at least so many if there are; the longest first.

        Requests take most of the memory. Adapters take little of it, and little time: they share the largest size.
        """
        rows = np.flatnonzero(wanted)
        rows = rows[np.argsort(self.most[rows], kind="stable")]
        groups = np.array_split(rows, np.clip(rows.size // least, 1, MOST_SIZES))
        return [group[np.argsort(-self.work[group], kind="stable")] for group in groups if group.size]

    def _fits(self, width: int, requests: int, adapters: int) -> bool:
        return width * self._bytes(requests, adapters) <= self.memory_bytes / self.at_once

    def _widest(self, configs: int) -> int:
        """Return how many configurations to put into a batch."""
        if self.processors:
            return min(_power(self.configs / BATCHES), LONGEST_BATCH)
        return self._devices * min(_power(configs / self._devices), WIDTH_ACCELERATOR)

    @property
    def _devices(self) -> int:
        """Devices that share a batch."""
        return 1 if self.processors else jax.local_device_count()

    def _room(self, rows: NDArray[np.int64]) -> int:
        """Return a power of two of requests that all have room in, so that few shapes are compiled."""
        return max(_LAYOUT_STEP, 1 << int(self.most[rows].max(initial=0)).bit_length())

    def _bytes(self, requests: int, adapters: int) -> float:
        if self.processors:
            return _REQUEST_BYTES * requests
        return bytes_per_configuration(requests, adapters, self.longest_output, self.longest_prefix)

    def _too_large(self, rows: NDArray[np.int64], adapters: int) -> InputError:
        needed = int(self.most[rows].max())
        allowed = int(needed * self.memory_bytes / self.at_once / (rows.size * self._bytes(self._room(rows), adapters)))
        return InputError(
            "horizon_s",
            f"one in which up to {needed} requests arrive",
            f"at most about {allowed} requests, which fill the memory",
            "simulate a shorter time, or set max_pending",
        )

    def with_longer_tables(self, wanted: NDArray[np.bool_]) -> Self:
        """Return the same with twice the requests for some configurations, ``[configs]``."""
        return dataclasses.replace(self, most=np.where(wanted, 2 * self.most, self.most))

    def run(self, batch: Batch, part: Scenarios, drawn: Drawn) -> tuple[Results, NDArray[np.bool_]]:
        """Run a batch.

        Args:
            batch: The batch.
            part: Its configurations.
            drawn: Their requests.

        Returns:
            Their results, adapters in the order of their classes, and whether more requests were wanted than the
            tables hold, which makes a result worthless, ``[rows]``.
        """
        tables = drawn.tables
        told, sent = (
            self._run_on_cores(batch, part, drawn) if self.processors else self._run_at_once(batch, part, tables)
        )
        too_few = drawn.too_few(told, sent)
        results: Any = drawn.of_all_arrivals(told)
        class_of = np.asarray(tables.class_of)
        class_of = np.pad(class_of, [(0, 0), (0, batch.adapters - class_of.shape[1])], constant_values=-1)
        by_class = np.argsort(np.where(class_of < 0, np.iinfo(np.int32).max, class_of), axis=1, kind="stable")
        results = dataclasses.replace(results, class_service=results.class_service[:, : part.class_count.shape[1]])
        details = dataclasses.replace(
            results.events,
            **{name: self._by_adapter(getattr(results.events, name), by_class) for name in _OF_ADAPTERS},
        )
        return dataclasses.replace(results, events=details), too_few

    def _run_on_cores(self, batch: Batch, part: Scenarios, drawn: Drawn) -> tuple[Any, NDArray[np.int32]]:
        from lora_capacity.run.compiled import run_compiled  # Numba takes half a second to load

        seen = self.observation
        return run_compiled(
            self.calibration.costs,
            _with_room_for_classes(part),
            _padded(drawn.tables, batch.adapters, drawn.tables.arrival.shape[1], self.longest_output),
            drawn.keys,
            self.rules,
            warmup_s=seen.warmup_s,
            samples=seen.samples,
        )

    def _run_at_once(self, batch: Batch, part: Scenarios, tables: RequestTables) -> tuple[Any, NDArray[np.int32]]:
        padded = _edge(
            _padded(tables, batch.adapters, batch.requests, self.longest_output), batch.width - len(part.status)
        )
        caching = tables.longest_prefix, tables.cached_tokens is not None
        simulate = compiled_twin(self.rules, batch.block_size, self.observation.samples)
        warmup_s = np.float32(self.observation.warmup_s)
        filled = _with_room_for_classes(part.filled_up(batch.width))
        shape = self.rules, self.observation.samples, self.longest_output, filled.class_count.shape, padded.table.shape
        with _compiled_once((*shape, *caching, batch.adapters, batch.block_size)):
            found: Any = simulate(self.calibration.costs, warmup_s, filled, padded)
        told, sent = jax.tree.map(lambda values: np.asarray(values)[: len(part.status)], found)
        return told, sent

    def _by_adapter(self, values: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
        """Return values of adapters in another order, as wide as for the configuration with the most."""
        missing = int(self.adapters.max()) - values.shape[1]
        return np.pad(np.take_along_axis(values, order, axis=1), [(0, 0), (0, missing)])


@contextlib.contextmanager
def _compiled_once(shape: Any) -> Iterator[None]:
    """Let others wait while the first call of a shape compiles it, who would else compile it too."""
    if shape in _COMPILED:
        yield
        return
    with _COMPILING:
        yield
        _COMPILED.add(shape)


def _with_room_for_classes(part: Scenarios) -> Scenarios:
    """Return configurations with classes of no adapters up to a multiple of `_CLASSES`."""
    missing = -part.class_count.shape[1] % _CLASSES
    columns: Any = {
        name: np.pad(np.asarray(getattr(part, name)), [(0, 0), (0, missing)])
        for name in ("class_count", "class_rate_per_s", "class_rank")
    }
    wider: Scenarios = dataclasses.replace(part, **columns)
    return wider


def free_memory_bytes() -> float:
    """Return the memory that is free: of the devices together, or of this machine."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in each for each in stats):
        return float(sum(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats))
    return float(available_memory_bytes())


@functools.cache
def bytes_per_configuration(requests: int, adapters: int, longest_output: int, longest_prefix: int = 0) -> int:
    """Return what a configuration takes on the device: its tables and its state, which iterations change in place.

    Args:
        requests: Requests that it has room for.
        adapters: Adapters that it has room for.
        longest_output: Longest answer, tokens.
        longest_prefix: Blocks of the longest prefix that requests share.
    """
    columns: Any = {
        field.name: np.ones((1, 1) if field.name.startswith("class_") else 1, np.float32)
        for field in dataclasses.fields(Scenarios)
        if field.name != "bounds"
    }
    scenario = Scenarios(**columns)
    none = np.zeros(0, dtype=int)
    nobody = [Requests(none, none, none, none)]
    tables = pack_requests(scenario, nobody, [none], seed=None, longest_prefix=longest_prefix)
    tables = _padded(tables, adapters, requests, longest_output)
    nothing: list[Any] = [kind(**{field.name: 0.0 for field in dataclasses.fields(kind)}) for kind in _COSTS]
    costs = Costs(step=nothing[0], loads=nothing[1], kernels=nothing[2])
    scenario, one = jax.tree.map(lambda leaf: leaf[0], (scenario, tables))

    def start(scenario: Scenarios, tables: RequestTables) -> Any:
        server = build_server(costs, scenario, tables, rules=SchedulerRules(), block_size=BLOCK_SIZE)
        return initial_state(server, scenario.status)

    state = jax.eval_shape(start, scenario, one)
    every: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((tables, state)))
    # The times of sending take the place of the arrivals.
    return every - int(tables.arrival.nbytes) + _SUMMARY_BYTES * requests


def _runs_on_cpu() -> bool:
    return bool(jax.local_devices()[0].platform == "cpu")


def needs_steady_twin(host: Any) -> bool:
    """Whether configurations are sized by what the steady twin says of them, which takes seconds to compile.

    Without it tables hold all that arrives, even where clients hold it back. A batch on an accelerator lasts as long as
    its longest server, which the steady twin has to tell.
    """
    held_back = np.isfinite(host.max_pending) * _arriving(host)
    return bool(held_back.sum() > _MOST_LAID_OUT) or not _runs_on_cpu()


def _arriving(host: Any) -> NDArray[np.float64]:
    """Return the requests that arrive on average at each server that starts, ``[configs]``."""
    arriving: NDArray[np.float64] = np.where(host.starts, host.requests_per_s * host.horizon_s, 0.0)
    return arriving


def _most_requests(host: Any, steady: Results | None) -> NDArray[np.int64]:
    """Return the most requests that each configuration can need."""
    starts, arriving = host.starts, _arriving(host)
    most = arriving + 6.0 * np.sqrt(arriving) + 1.0  # beyond six standard deviations is never
    if steady is not None:
        # Tables that turn out too short are doubled, so that a first guess need only be a number.
        completed = np.where(starts, np.fmax(steady.completed_per_s, 0.0) * host.horizon_s, 0.0)
        most = np.minimum(most, _MARGIN * completed + host.max_pending + 1.0)
    return np.ceil(most / _LAYOUT_STEP).astype(np.int64) * _LAYOUT_STEP


def expected_turns(host: Any, steady: Results) -> NDArray[np.float64]:
    """Return about how many iterations each configuration takes, ``[configs]``: steps, admissions, arrivals in bulk.

    A step that ends with nothing but a token for each request is skipped with the one before it, up to `MOST_SKIPPED`
    in a row; arrivals, completions and last blocks, which come as often, prevent it. Most admissions take an
    iteration, and so do each `WINDOW` of the requests that come to wait.

    Source: iterations of configurations of the published scenarios, of which it predicts the logarithm to 0.2.
    """
    steps = host.horizon_s / steady.step_time_s
    quiet = np.exp(-3.0 * steady.completed_per_s * steady.step_time_s)
    run = steps * (1.0 - quiet) / (1.0 - quiet ** (MOST_SKIPPED + 1))
    admitted = 0.85 * steady.completed_per_s * host.horizon_s
    iterations: NDArray[np.float64] = np.nan_to_num(run + admitted + steady.mean_waiting / WINDOW)
    return iterations


def _padded(tables: RequestTables, adapters: int, requests: int, longest_output: int) -> RequestTables:
    """Widen tables to so many adapters and requests, the base model behind the adapters."""
    host: Any = jax.tree.map(np.asarray, tables)
    more, longer = adapters - host.rank.shape[1], requests - host.arrival.shape[1]
    far = np.iinfo(np.int32).max

    def wide(values: NDArray[Any], fill: int, columns: int = more) -> NDArray[Any]:
        return np.pad(values, [(0, 0), (0, columns)], constant_values=fill)

    table = np.pad(host.table, [(0, 0), (0, longer), (0, 0)])
    adapter = table[..., 0]
    adapter[adapter == host.rank.shape[1]] = adapters
    padded: Any = dataclasses.replace(
        host,
        arrival=wide(host.arrival, far, longer),
        table=table,
        following=wide(host.following, 0, longer),
        head=np.concatenate([wide(host.head[:, :-1], int(TICKS)), host.head[:, -1:]], axis=1),
        rank=wide(host.rank, 0),
        class_of=wide(host.class_of, -1),
        arrived=wide(host.arrived, 0),
        longest_output=longest_output,
    )
    for name in ("shared_blocks", "cached_tokens"):
        if getattr(host, name) is not None:
            padded = dataclasses.replace(padded, **{name: wide(getattr(host, name), 0, longer)})
    rows: RequestTables = padded
    return rows


def _edge(tree: Any, more: int) -> Any:
    """Repeat the last configuration."""
    return jax.tree.map(lambda v: np.pad(v, [(0, more)] + [(0, 0)] * (v.ndim - 1), mode="edge"), tree)


def _power(size: float) -> int:
    """Return the next power of two."""
    return 1 << int(np.ceil(np.log2(max(size, 1.0))))


def _rounded(size: int) -> int:
    """Return the next of some odd multiples of 16, an eighth apart; even ones compete for the same lines of a cache."""
    units = -(-size // 16)
    step = max(2, _power(units) // 8)
    return 16 * (1 + step * -(-(units - 1) // step))
