"""Configurations with their requests, drawn or given, run by the event twin."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.errors import InputError, check_number
from lora_capacity.run.batches import Batch, Batches, Observation, needs_steady_twin
from lora_capacity.run.checkpoint import Checkpoint, Part
from lora_capacity.run.drawn import Drawn
from lora_capacity.run.requests import draw_requests, pack_first
from lora_capacity.run.steady import Progress, run_steady, with_classes
from lora_capacity.run.tasks import Remembered, run_tasks
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import LengthDistribution, Requests, Workload

_CACHED_REQUESTS = 2**23
"""Requests kept of the samples drawn last: about 200 MB at 24 bytes each."""

_MOST_CLASSES = 16
"""Classes that the steady twin tells apart to say how much there is to do: every other number is compiled anew."""

_Draw = Callable[[Scenarios, Sequence[int], NDArray[np.int64]], Drawn]
"""Returns the requests of some configurations, given their indices and the most requests in the table of each."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where requests come from: how they are drawn, all that decides them, how long requests stay, what they share."""

    draw: _Draw
    question: Any
    stays: ResidenceTime
    longest_output: int
    longest_prefix: int = 0

    @classmethod
    def drawing(cls, draw: _Draw, question: Any, lengths: LengthDistribution, longest_prefix: int = 0) -> Self:
        """Return a source whose requests have outputs of these lengths, and share prefixes of up to so many blocks."""
        return cls(draw, question, ResidenceTime.of_lengths(lengths), int(lengths.max), longest_prefix)


@dataclasses.dataclass(frozen=True, eq=False)
class LengthSample:
    """Request lengths to draw from, in pairs, for requests with Poisson arrivals.

    Attributes:
        input_tokens: Prompt lengths, ``[sample]`` or ``[configs, sample]``.
        output_tokens: Output lengths, likewise.
    """

    input_tokens: ArrayLike
    output_tokens: ArrayLike

    @property
    def output_lengths(self) -> LengthDistribution:
        """Distribution of the output lengths, over all configurations."""
        return LengthDistribution.from_histogram(*np.unique(np.asarray(self.output_tokens), return_counts=True))


def source_of(
    scenarios: Scenarios, traffic: Workload | LengthSample, seed: ArrayLike, load: ArrayLike, warmup_s: float = 0.0
) -> tuple[Source, Scenarios]:
    """Return where the requests of configurations come from, and the configurations under their load."""
    if isinstance(traffic, LengthSample):
        return _sample_source(scenarios, traffic, seed, load, warmup_s), scenarios
    configs = scenarios.status.shape[0]
    seeds = [int(check_number("seed", each, minimum=0, integer=True)) for each in _spread(seed, configs)]
    loads = [check_number("load", each, minimum=0, exclusive=True) for each in _spread(load, configs)]
    # A trace is pressed together: it ends earlier, and so does the time observed.
    shorter = 1.0 if traffic.trace is None else np.array(loads)
    return _workload_source(scenarios, traffic, seeds, loads, warmup_s), scenarios.scaled(np.array(loads), shorter)


def _sample_source(
    scenarios: Scenarios, sample: LengthSample, seed: ArrayLike, load: ArrayLike, warmup_s: float
) -> Source:
    """Return Poisson arrivals; those of a configuration depend on the seed and its index alone."""
    if np.ndim(seed) or np.any(np.asarray(load) != 1.0):
        name, given = ("seed", seed) if np.ndim(seed) else ("load", load)
        raise InputError(name, given, f"{'one number' if np.ndim(seed) else '1'} with a sample of lengths")
    number = int(check_number("seed", seed, minimum=0, integer=True))
    configs = scenarios.status.shape[0]
    inputs, outputs = (
        np.broadcast_to(column, (configs, np.shape(column)[-1]))
        for column in (sample.input_tokens, sample.output_tokens)
    )

    return Source(
        functools.partial(_draw_of_sample, number, inputs, outputs, warmup_s),
        (number, np.asarray(sample.input_tokens), np.asarray(sample.output_tokens)),
        ResidenceTime.of_lengths(sample.output_lengths),
        int(np.max(sample.output_tokens)),
    )


def _draw_of_sample(
    seed: int,
    inputs: NDArray[Any],
    outputs: NDArray[Any],
    warmup_s: float,
    part: Scenarios,
    indices: Sequence[int],
    most: NDArray[np.int64],
) -> Drawn:
    lengths = inputs[indices], outputs[indices]
    return draw_requests(part, *lengths, seed=seed, indices=indices, most=most, warmup_s=warmup_s)


def _workload_source(
    scenarios: Scenarios, workload: Workload, seeds: Sequence[int], loads: Sequence[float], warmup_s: float
) -> Source:
    """Return the workload's own arrivals; those of a configuration depend on its adapters, seed and load alone."""
    served = np.asarray(scenarios.class_count).sum(axis=1).astype(int)
    rates, ranks = workload.adapters.deal(max(int(served.max()), 1))
    _, class_of = np.unique(np.stack([rates, ranks], axis=1), axis=0, return_inverse=True)
    most = (rates.sum() + workload.base_rate_per_s) * workload.horizon_s * max(loads)
    sample = Remembered(functools.partial(_sampled, workload), int(np.clip(_CACHED_REQUESTS / most, 1, 256)))
    longest_prefix = _longest_prefix(scenarios, workload)
    caching = {"longest_prefix": longest_prefix, "cached": scenarios.cached_share is not None}
    packed: dict[str, Any] = {"seed": 0, "warmup_s": warmup_s, **caching}
    asked = list(zip(served.tolist(), seeds, loads, strict=True))
    draw = functools.partial(_draw_of_workload, sample, asked, class_of.reshape(-1), packed)
    question = seeds, loads, vars(sample(int(served.max()), seeds[0], loads[0]))
    return Source.drawing(draw, question, workload.output_tokens, longest_prefix)


def _draw_of_workload(
    sample: Callable[[int, int, float], Requests],
    asked: Sequence[tuple[int, int, float]],
    class_of: NDArray[Any],
    packed: Mapping[str, Any],
    part: Scenarios,
    indices: Sequence[int],
    most: NDArray[np.int64],
) -> Drawn:
    own = [asked[i] for i in indices]
    requests = [sample(*each) for each in own]
    classes, seeds = [class_of[:served] for served, _, _ in own], [seed for _, seed, _ in own]
    return pack_first(part, requests, classes, most.tolist(), indices=seeds, **packed)


def _sampled(workload: Workload, adapters: int, seed: int, load: float) -> Requests:
    """Return the requests of a workload under a load; those of a trace are pressed together."""
    longer = workload if workload.trace is not None else workload.lasting(load)
    requests = longer.sample_requests(adapters, seed)
    return dataclasses.replace(requests, arrival_s=requests.arrival_s / load)


def _longest_prefix(scenarios: Scenarios, workload: Workload) -> int:
    """Return a power of two of blocks that every shared prefix has room in, 0 without prefix caching."""
    if scenarios.class_shared_tokens is None:
        return 0
    prefixes = workload.shared_prefixes(int(np.asarray(scenarios.class_count).sum(axis=1).max()))
    tokens = min(int(prefixes.max()), int(workload.input_tokens.max) - 1)
    return 1 << (tokens // int(np.asarray(scenarios.block_size).min())).bit_length()


def _spread(values: ArrayLike, configs: int) -> list[Any]:
    spread: list[Any] = np.broadcast_to(np.asarray(values), (configs,)).tolist()
    return spread


def run_events(
    calibration: Calibration,
    scenarios: Scenarios,
    source: Source,
    observation: Observation,
    checkpoint_dir: str | Path | None,
    progress: Progress | None,
) -> Results:
    """Run by the event twin what is not in the checkpoints yet, and return all configurations in the order given.

    Args:
        calibration: Whose costs and vLLM version hold.
        scenarios: The configurations, ``[configs]``.
        source: Where their requests come from, as `source_of` returns it.
        observation: What is told.
        checkpoint_dir: As of `lora_capacity.run.simulate`, as the next.
        progress: See there.
    """
    host: Any = jax.tree.map(np.asarray, scenarios)
    observation.check(host.horizon_s)
    classes = min(host.class_count.shape[1], _MOST_CLASSES)
    asked = needs_steady_twin(host)
    steady = run_steady(calibration.costs, with_classes(host, classes), source.stays) if asked else None
    # The tables tell what is shared, request by request.
    host = host.without_cache()
    plan = Batches.plan(calibration, host, steady, source.longest_output, observation)
    batches = dataclasses.replace(plan, longest_prefix=source.longest_prefix)
    if not batches.processors:
        _check_accelerator(host)
    question = (
        calibration.costs,
        dataclasses.astuple(batches.rules),
        host,
        source.question,
        dataclasses.astuple(observation),
    )
    folder = None if checkpoint_dir is None else Checkpoint(Path(checkpoint_dir), question)
    kept = folder.load() if folder else []
    done = np.zeros(batches.configs, dtype=bool)
    for rows, _ in kept:
        done[rows] = True
    # All are cut, whatever is done already: a configuration is always in the same batch, which rounding depends on.
    left = [batch for batch in batches.cut() if not done[batch.rows].all()]
    before = sum(batches.work[rows].sum() for rows, _ in kept)
    total = max(before + sum(batches.work[batch.rows].sum() for batch in left), 1.0)  # 0 if no server starts
    told = 0

    def finished(part: Part) -> None:
        nonlocal before, told
        if folder:
            folder.save(*part)
        before += batches.work[part[0]].sum()
        told += 1
        if progress is not None:
            share = 1.0 if told == len(left) else min(before / total, 1.0)
            progress(int(batches.configs * share), batches.configs)

    if progress is not None and kept:
        progress(int(batches.configs * before / total), batches.configs)
    run = functools.partial(_run_batch, batches, host, source.draw)
    known = kept + run_tasks(run, left, finished, threads=batches.at_once)
    return _in_order(np.arange(batches.configs), known)


def _check_accelerator(host: Any) -> None:
    """Refuse what the event twin in JAX does not know: a threshold of long prompts, and host memory that is small."""
    remedy = "run it on a CPU, or ask the steady twin"
    if host.max_cpu_loras is not None:
        adapters = host.class_count.sum(axis=1)
        row = int(np.argmax(host.max_cpu_loras < adapters))
        allowed = f">= {adapters[row]:.0f}, the adapters served, with the event twin on an accelerator"
        raise InputError("max_cpu_loras", int(host.max_cpu_loras[row]), allowed, remedy)
    if host.loaded_at_start is not None:
        raise InputError("loaded_at_start", True, "False with the event twin on an accelerator", remedy)
    if host.long_prefill_token_threshold is not None:
        threshold = int(host.long_prefill_token_threshold[0])
        raise InputError("long_prefill_token_threshold", threshold, "0 with the event twin on an accelerator", remedy)


def _run_batch(batches: Batches, host: Any, draw: _Draw, batch: Batch) -> Part:
    """Run a batch; where clients had sent all requests of a table before the horizon, again with a longer one.

    How many requests tables hold rests on what the steady twin sees completed, and that can be too few.
    """
    rows = batch.rows
    part = host.take(rows)
    results, again = batches.run(batch, part, draw(part, rows.tolist(), batches.most[rows]))
    if not again.any():
        return rows, results
    wanted = np.isin(np.arange(batches.configs), rows[again])
    longer = batches.with_longer_tables(wanted)
    parts = [_run_batch(longer, host, draw, each) for each in longer.cut(wanted)]
    if not again.all():
        parts.append((rows[~again], jax.tree.map(lambda leaf: leaf[~again], results)))
    return rows, _in_order(rows, parts)


def _in_order(rows: NDArray[np.int64], parts: Sequence[Part]) -> Results:
    """Return the results of parts together, in the order of the rows; one that stands in two parts is taken once."""
    known, first = np.unique(np.concatenate([each for each, _ in parts]), return_index=True)
    place = first[np.searchsorted(known, rows)]
    results: Results = jax.tree.map(lambda *leaves: np.concatenate(leaves)[place], *(part for _, part in parts))
    return results
