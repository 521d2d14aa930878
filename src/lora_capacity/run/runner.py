"""One way to simulate configurations, whichever engine does it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration import Calibration, CalibrationLike, load_calibration
from lora_capacity.errors import InputError, check_choice, check_type
from lora_capacity.run.batches import Observation
from lora_capacity.run.bursts import with_bursts
from lora_capacity.run.events import LengthSample, run_events, source_of
from lora_capacity.run.invariants import check_results
from lora_capacity.run.over_time import steady_over_time, windows_in_series, windows_played
from lora_capacity.run.reference import run_reference
from lora_capacity.run.steady import Progress, check_progress, run_steady
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import WORKLOAD_TYPES, LengthDistribution, Workload, WorkloadLike, load_workload

TWINS = ("steady", "event")
"""What predicts fast enough to search with: the steady twin, from averages, or the event twin, every engine step."""


class Engine(NamedTuple):
    """What can be asked of an engine.

    Attributes:
        draws_requests: Whether it runs requests, so that seeds, loads and a warm-up change its answer.
        keeps_batches: Whether it tells series, and keeps finished batches in a folder.
    """

    draws_requests: bool
    keeps_batches: bool


ENGINES = {"steady": Engine(False, False), "event": Engine(True, True), "reference": Engine(True, False)}
"""What can run configurations: the twins, or the plain-Python scheduler that the event twin is checked with."""

Traffic = Workload | LengthSample | LengthDistribution | ResidenceTime
"""Where requests come from: a workload or lengths to draw from; or, all that the steady twin asks, the distribution of
the output lengths or how long requests stay in the batch, for this library's own use."""

_KNOWN = (Workload, LengthSample, LengthDistribution, ResidenceTime)


_LATENCIES = ("tpot_s", "ttft_s", "answered_ttft_s", "attainment")
_LATENCY_DETAILS = (
    *("ttft_quantiles_s", "tpot_quantiles_s", "e2e_quantiles_s", "quantile_requests", "unanswered"),
    *("ttft_at_least", "e2e_at_least", "adapter_worst_wait_s"),
)
"""What `Results` and their events tell of requests rather than of the time observed."""

_DOUBLINGS = 6
"""How often the time is doubled for requests to be answered in: to 64 horizons, beyond which nobody waits."""


def simulate(
    calibration: CalibrationLike,
    scenarios: Scenarios,
    traffic: Traffic | WorkloadLike,
    *,
    engine: str = "steady",
    seed: ArrayLike = 0,
    load: ArrayLike = 1.0,
    warmup_s: float = 0.0,
    samples: int = 0,
    drain: bool = False,
    checkpoint_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Run configurations, as many at once as the cores or devices at hand allow.

    The steady twin solves a model of averages. The event twin runs every engine step of a server whose requests are
    those of the workload (a trace is replayed), or have Poisson arrivals and lengths from a sample. What happens there
    in a configuration of a workload depends on its own settings, seed and load alone; with a sample, on its place too.
    Within `lora_capacity.run.on_ray` the machines of a cluster do it, with the same answers.

    Args:
        calibration: Whose costs and vLLM version hold, or its name or file.
        scenarios: The configurations as `build_scenarios` lays them out, ``[configs]``.
        traffic: Their workload, as `load_workload` takes it, or a sample of request lengths.
        engine: ``steady``, ``event`` or ``reference``: what the event twin does, in plain Python, some hundred times
            slower. The options below but the last are the event twin's; the steady one refuses them, the reference
            the series and the folder.
        seed: Whole numbers >= 0 of `Workload.sample_requests`, one or ``[configs]``: configurations of equal seeds
            share the requests of shared adapters. With a sample: one number.
        load: Times the workload's rates, > 0, one or ``[configs]``. Arrivals are drawn over so many times the horizon
            and pressed together; those of a trace then end earlier, and so does the time observed. Not with a sample.
        warmup_s: Time at the beginning that is left out of all but what is told by adapter or class.
        samples: Parts of the horizon whose means make a series; 0 for none, or one for each window of traffic over
            time.
        drain: Whether latencies and attainment are those of all requests that arrive within the horizon, however long
            it takes after it to answer them. Everything else is still told of the horizon.
        checkpoint_dir: Folder for finished batches: the same call goes on from what is there. It stays until deleted.
        progress: Called with the configurations done, in proportion to the work, and their total.

    Returns:
        Predictions with NumPy leaves, ``[configs]``; with ``events`` from the event twin and the reference.

    Raises:
        InputError: If the engine is unknown, an option is not one of its own or not allowed, the warm-up is not shorter
            than every horizon, a request needs more KV blocks than its server has, a configuration needs more memory
            than there is, or the checkpoints are those of another call.
        ImpossibleResultError: If an engine says of a configuration what no server can do.
    """
    calibration = load_calibration(calibration)
    check_type("scenarios", scenarios, Scenarios, "configurations as build_scenarios lays them out")
    check_type("traffic", traffic, (*_KNOWN, *WORKLOAD_TYPES), "a workload as load_workload takes it, or lengths")
    traffic = traffic if isinstance(traffic, _KNOWN) else load_workload(traffic)
    check_type("drain", drain, bool, "True or False")
    check_type("checkpoint_dir", checkpoint_dir, (str, Path, type(None)), "a path")
    check_progress(progress)
    can = engine_named(engine)
    options = {"seed": seed, "load": load, "warmup_s": warmup_s, "drain": drain, "samples": samples}
    _refuse_unheard(engine, can, options, checkpoint_dir)
    if not can.draws_requests:
        return _solved(calibration, scenarios, traffic, progress)
    if isinstance(traffic, LengthDistribution | ResidenceTime):
        allowed = f"a workload or a sample of lengths for the {engine} engine"
        raise InputError("traffic", "output lengths", allowed)
    if can.keeps_batches:
        samples = samples or windows_in_series(traffic)
    observation = Observation(warmup_s, samples)
    source, loaded = source_of(scenarios, traffic, seed, load, warmup_s)

    def run(asked: Scenarios, name: str) -> Results:
        if not can.keeps_batches:
            return run_reference(calibration, asked, source, observation, progress)
        folder = None if checkpoint_dir is None else Path(checkpoint_dir) / name
        return run_events(calibration, asked, source, observation, folder, progress)

    results = run(loaded, "")
    check_results(loaded, results)
    if isinstance(traffic, Workload):
        results = dataclasses.replace(results, windows=windows_played(loaded, results, traffic, load))
    return _of(loaded, _drained(run, loaded, results) if drain else results)


def _solved(calibration: Calibration, scenarios: Scenarios, traffic: Traffic, progress: Progress | None) -> Results:
    """Return what the steady twin says, over all windows where traffic changes over time."""

    def solve(asked: Scenarios) -> Results:
        return run_steady(calibration.costs, asked, _residence_time(traffic), progress=progress)

    if isinstance(traffic, Workload) and traffic.over_time is not None:
        results = steady_over_time(scenarios, traffic, solve)
    else:
        results = solve(scenarios)
        if isinstance(traffic, Workload) and traffic.trace is not None:
            results = with_bursts(scenarios, traffic.trace, float(traffic.horizon_s), results, solve)
    check_results(scenarios, results)
    return _of(scenarios, results)


def _of(scenarios: Scenarios, results: Results) -> Results:
    """Return results that know their configurations."""
    known: Results = dataclasses.replace(results, scenarios=scenarios)
    return known


def _refuse_unheard(
    engine: str, can: Engine, options: Mapping[str, ArrayLike], checkpoint_dir: str | Path | None
) -> None:
    """Refuse options that would change nothing with an engine; those that are as if not given are let be."""
    heard = {"samples"} if can.keeps_batches else set()
    if can.draws_requests:
        heard |= options.keys() - {"samples"}
    for name in [name for name in options if name not in heard]:
        otherwise = 1.0 if name == "load" else 0.0
        if np.any(np.asarray(options[name]) != otherwise):
            raise InputError(name, options[name], f"{otherwise:g} with the {engine} engine", "ask the event engine")
    if checkpoint_dir is not None and not can.keeps_batches:
        allowed = f"none with the {engine} engine"
        raise InputError("checkpoint_dir", str(checkpoint_dir), allowed, "ask the event engine")


def engine_named(name: str, known: Collection[str] = ENGINES) -> Engine:
    """Return what can be asked of an engine.

    Raises:
        InputError: If it is none of those known.
    """
    check_choice("engine", name, known)
    return ENGINES[name]


def _drained(run: Callable[[Scenarios, str], Results], scenarios: Scenarios, results: Results) -> Results:
    """Put in latencies of runs that go on until every server that starts has answered all its requests."""
    longer, told = scenarios, results
    for doubling in range(_DOUBLINGS):
        if told.events is None or not np.any(_unfinished(longer, told)):
            break
        horizon_s: Any = 2.0 * np.asarray(longer.horizon_s)
        longer = dataclasses.replace(longer, horizon_s=horizon_s)
        told = run(longer, f"drain-{doubling}")
    events: Any = results.events
    details: Any = dataclasses.replace(events, **{name: getattr(told.events, name) for name in _LATENCY_DETAILS})
    latencies: Any = {name: getattr(told, name) for name in _LATENCIES}
    drained: Results = dataclasses.replace(results, **latencies, events=details)
    return drained


def _unfinished(scenarios: Scenarios, results: Results) -> NDArray[np.bool_]:
    """Whether a server has requests left; those that clients hold back wait for others of theirs."""
    events: Any = results.events
    completed = np.rint(np.asarray(results.completed_per_s) * np.asarray(scenarios.horizon_s))
    left = (events.unanswered > 0) | (completed < events.quantile_requests[:, 0])
    return np.asarray(left & np.asarray(scenarios.starts))


def _residence_time(traffic: Traffic) -> ResidenceTime:
    return ResidenceTime.of(traffic.output_lengths if isinstance(traffic, LengthSample) else traffic)
