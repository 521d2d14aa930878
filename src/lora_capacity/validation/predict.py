"""What a twin says of measured runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from lora_capacity.calibration import Calibration, CalibrationLike, load_calibration
from lora_capacity.errors import InputError, check_number, check_type
from lora_capacity.measurements.lengths import HALF_BLOCK_TOKENS, INPUT_STD_TOKENS, length_pairs
from lora_capacity.measurements.runs import FloatArray, IntArray, Runs
from lora_capacity.run import TWINS, LengthSample, engine_named, simulate
from lora_capacity.run.steady import Progress, check_progress
from lora_capacity.scenarios import Scenarios, pack_scenarios
from lora_capacity.search import Needed, assess
from lora_capacity.status import STARVED_SHORTFALL, Status
from lora_capacity.workload import LengthDistribution, RunLengths

RUN_LENGTHS = RunLengths(
    output_share=1.0,
    output_std_tokens=207.0,
    max_output_tokens=1024,
    kv_tokens_per_request=358.0,
    max_pending=26000.0,
)
"""Request lengths of runs for which the calibration tells none: ShareGPT as the published H100 runs drew from it.

Source: arXiv 2508.08343 and its logs; ``kv_tokens_per_request`` is the mean, over its runs of more than 50 running
requests, of KV use times KV capacity over running requests."""

_INPUT_TOKENS, _OUTPUT_TOKENS, _DURATION_S = 223.0, 197.0, 3600.0
"""Mean lengths and duration of the published runs: for models of which no server started, where only the start is
predicted."""

_OF_SERVERS = ("throughput_tokens_per_s", "mean_running", "kv_usage")
_OF_CLIENTS = ("ttft_s", "tpot_s", "itl_s")
"""Latencies stand in tables of runs as clients measured them."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a twin says of runs, latencies as clients see them; arrays ``[runs]``, NaN where it says: does not start.

    Attributes:
        throughput_tokens_per_s: Input plus output tokens of completed requests per second.
        itl_s: Mean inter-token latency.
        tpot_s: Mean over requests of their mean time per output token after the first.
        ttft_s: Mean time to first token of the requests that get one.
        mean_running: Requests in the batch, mean over time.
        kv_usage: Share of the KV cache in use, mean over time.
        status: Labels of :class:`~lora_capacity.status.Status`, object.
        starving_probability: Chance that the run starves, given the calibration's error.
        offered_tokens_per_s: Offered load of the run itself, its arrivals per second times the mean lengths asked for:
            what both predicted and measured throughput are held against.
    """

    throughput_tokens_per_s: FloatArray
    itl_s: FloatArray
    tpot_s: FloatArray
    ttft_s: FloatArray
    mean_running: FloatArray
    kv_usage: FloatArray
    status: np.ndarray
    starving_probability: FloatArray
    offered_tokens_per_s: FloatArray

    @property
    def starts(self) -> Bool[np.ndarray, " runs"]:
        """Whether the server is said to start, ``[runs]``."""
        return ~np.isin(self.status, (Status.OOM.label, Status.NO_KV_CACHE.label))


def comparable_runs(runs: Runs, calibrations: Mapping[str, Calibration]) -> tuple[Runs, list[str]]:
    """Return the runs that calibrations can be held against, and what is left out and why, in sentences.

    Args:
        runs: The runs.
        calibrations: The calibration of each model, by its name; runs of other models stay.

    Raises:
        InputError: If none is left.
    """
    why = np.full(len(runs), "", dtype=object)
    for model, calibration in calibrations.items():
        of_model = runs.model == model
        why[of_model] = runs.unlike(calibration.gpu.name)[of_model]
    found = [
        f"{np.count_nonzero(why == each)} of {len(runs)} runs left out: {each}" for each in sorted(set(why)) if each
    ]
    if not np.any(why == ""):
        raise InputError(str(runs.path), "; ".join(found), "at least one run that a calibration predicts")
    return runs.take(np.flatnonzero(why == "")), found


def predict_runs(
    runs: Runs,
    calibrations: Mapping[str, CalibrationLike],
    engine: str = "steady",
    *,
    seed: int = 0,
    seeds: int = 1,
    progress: Progress | None = None,
) -> Predictions:
    """Predict every run from its settings and traffic.

    Rates are scaled to the arrivals that were recorded, unless the clients had to wait. The answer lengths are those
    asked for times the share that the model produced (``calibration.runs``). Runs of servers that did not start are
    predicted with the mean lengths and the mean duration of the model's other runs.

    The event twin runs Poisson arrivals with lengths as `length_pairs` has them. One draw of them is not the run's
    own: with several seeds every prediction is the mean over them. ``starving_probability`` is the steady twin's with
    either engine.

    Args:
        runs: The runs.
        calibrations: The calibration of every model that occurs, or its name or file, by model name.
        engine: Which twin, ``steady`` or ``event``.
        seed: Whole number >= 0, the first of the event twin.
        seeds: How many the event twin takes, from ``seed`` upwards.
        progress: Called with the runs predicted, or simulated, and their total.

    Raises:
        InputError: If a model has no calibration, a setting is not allowed, or the engine is unknown.
    """
    check_type("runs", runs, Runs, "a table as read_runs returns it")
    check_type("calibrations", calibrations, Mapping, "a mapping of models to calibrations")
    check_progress(progress)
    draws = engine_named(engine, TWINS).draws_requests
    seed = int(check_number("seed", seed, minimum=0, integer=True))
    seeds = int(check_number("seeds", seeds, minimum=1, integer=True)) if draws else 1
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Predictions)}
    places: list[IntArray] = []
    for model in dict.fromkeys(runs.model.tolist()):
        if model not in calibrations:
            known = ", ".join(calibrations) or "none"
            raise InputError(f"{runs.path}, model", model, f"a model with a calibration: {known}", "give a calibration")
        calibration = load_calibration(calibrations[model])
        for rows in _alike(runs, np.flatnonzero(runs.model == model)):
            found = _predict(runs, rows, calibration)
            if draws:
                told = _from(progress, seeds * sum(map(len, places)), seeds * len(runs))
                found |= _simulate(runs, rows, calibration, range(seed, seed + seeds), told)
            for name, parts in columns.items():
                parts.append(found[name])
            places.append(rows)
            if progress is not None:
                progress(seeds * sum(map(len, places)), seeds * len(runs))
    order = np.argsort(np.concatenate(places))
    return Predictions(**{name: np.concatenate(parts)[order] for name, parts in columns.items()})


def _alike(runs: Runs, rows: Int[np.ndarray, " rows"]) -> list[Int[np.ndarray, "..."]]:
    """Split rows by what is one for all configurations that are laid out together: ``max_model_len`` and lengths.

    Recorded lengths are those of one workload; where none are recorded, the model's other runs help out.
    """
    _, workload = np.unique(runs.scenario[rows].astype(str), return_inverse=True)
    workload = np.where(runs.scenario[rows] == "", -2 - np.arange(rows.size), workload)
    limit = np.nan_to_num(runs.max_model_len[rows], nan=-1)  # to `unique`, no two NaN are the same
    keys = [limit, np.where(runs.tells_lengths[rows], workload, -1)]
    _, group = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
    return [rows[group.reshape(-1) == i] for i in range(int(group.max()) + 1)]


def _from(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return what tells of a part of the runs as of all."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _predict(runs: Runs, rows: Int[np.ndarray, " rows"], calibration: Calibration) -> dict[str, np.ndarray]:
    lengths = run_lengths(runs, rows, calibration.runs or RUN_LENGTHS)
    scenarios, output_lengths = pack_runs(runs, rows, calibration, lengths)
    asked = runs.mean_input_tokens[rows] + runs.mean_output_tokens[rows]
    produced = runs.mean_input_tokens[rows] + runs.mean_output_tokens[rows] * lengths.output_share
    # Models that stop early fall short of the offered load even when every request is completed.
    share = _filled(produced / asked, 1.0).mean()
    columns = assess(calibration, scenarios, output_lengths, needed=Needed((1.0 - STARVED_SHORTFALL) / share))
    columns |= {name: columns[f"client_{name}"] for name in _OF_CLIENTS}
    return columns | {"offered_tokens_per_s": runs.arrival_rate_per_s(lengths.max_pending)[rows] * asked}


def _simulate(
    runs: Runs, rows: IntArray, calibration: Calibration, seeds: Sequence[int], progress: Progress | None
) -> dict[str, np.ndarray]:
    """Return what the event twin sees in runs, on average over seeds."""
    lengths = run_lengths(runs, rows, calibration.runs or RUN_LENGTHS)
    scenarios, _ = pack_runs(runs, rows, calibration, lengths)
    means = np.stack([scenarios.mean_input_tokens, scenarios.mean_output_tokens], axis=1)
    told = runs.tells_lengths[rows].all()
    input_std_tokens = float(runs.std_input_tokens[rows].mean()) if told else INPUT_STD_TOKENS
    pairs = []
    for input_mean, output_mean in np.round(means, 1).tolist():
        try:
            pairs.append(length_pairs(input_mean, output_mean, lengths, input_std_tokens))
        except InputError as error:
            raise InputError(f"{runs.path}, mean_output_tokens", output_mean, error.allowed) from None
    inputs, outputs = (np.stack(column) for column in zip(*pairs, strict=True))
    total = len(seeds) * rows.size
    simulated = [
        simulate(
            calibration,
            scenarios,
            LengthSample(inputs, outputs),
            engine="event",
            seed=seed,
            progress=_from(progress, i * rows.size, total),
        )
        for i, seed in enumerate(seeds)
    ]
    found = {name: mean_of_known([getattr(each, name) for each in simulated]) for name in _OF_SERVERS}
    found |= {name: mean_of_known([getattr(each.client, name) for each in simulated]) for name in _OF_CLIENTS}
    status = np.max([each.status for each in simulated], axis=0)
    return found | {"status": np.array([Status(code).label for code in status], dtype=object)}


def mean_of_known(of_seeds: Sequence[FloatArray]) -> FloatArray:
    """Return the mean over seeds, of those that tell: one in which no request came has no latency, ``[runs]``."""
    values = np.asarray(of_seeds, dtype=np.float64)
    known = ~np.isnan(values)
    return np.where(
        known.any(axis=0), np.where(known, values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan
    )


def run_lengths(runs: Runs, rows: Int[np.ndarray, " rows"], otherwise: RunLengths) -> RunLengths:
    """Return what is known of the request lengths of some runs.

    Where all of them tell the spread, answers had the length asked for, independently of the prompts; a running request
    then holds ``E[input] + E[output²] / (2 · E[output])`` tokens and half a block. Servers that did not start have no
    means and take no part in them.

    Args:
        runs: The runs.
        rows: Which of them.
        otherwise: What holds where the runs do not tell.
    """
    if not (rows.size and runs.tells_lengths[rows].all()):
        return otherwise
    known = rows[~np.isnan(runs.mean_input_tokens[rows] + runs.mean_output_tokens[rows])]
    if not known.size:
        return otherwise
    inputs, outputs, std = (
        float(getattr(runs, name)[known].mean())
        for name in ("mean_input_tokens", "mean_output_tokens", "std_output_tokens")
    )
    held = inputs + (outputs**2 + std**2) / (2.0 * outputs) + HALF_BLOCK_TOKENS
    return RunLengths(
        output_share=1.0,
        output_std_tokens=std,
        max_output_tokens=int(runs.max_output_tokens[rows].max()),
        kv_tokens_per_request=held,
        max_pending=otherwise.max_pending,
    )


def pack_runs(
    runs: Runs, rows: Int[np.ndarray, " rows"], calibration: Calibration, lengths: RunLengths
) -> tuple[Scenarios, LengthDistribution]:
    """Lay runs out as configurations, each with the traffic it really had, and the law of their answer lengths.

    Args:
        runs: The runs.
        rows: Which of them: of one model and one ``max_model_len``.
        calibration: The model's calibration.
        lengths: What is known of their request lengths.

    Raises:
        InputError: If a setting is not allowed.
    """
    arriving_per_s = runs.arrival_rate_per_s(lengths.max_pending)[rows]
    scale = (arriving_per_s / runs.nominal_rate_per_s[rows])[:, np.newaxis]
    output_tokens = _filled(runs.mean_output_tokens[rows], _OUTPUT_TOKENS) * lengths.output_share
    limit = runs.max_model_len[rows[0]]
    scenarios = pack_scenarios(
        calibration,
        class_count=runs.class_count[rows],
        class_rate_per_s=runs.class_rate_per_s[rows] * scale,
        class_rank=runs.mean_rank[rows, np.newaxis],
        base_rate_per_s=runs.base_rate_per_s[rows] * scale[:, 0],
        mean_input_tokens=_filled(runs.mean_input_tokens[rows], _INPUT_TOKENS),
        mean_output_tokens=output_tokens,
        kv_tokens_per_request=lengths.kv_tokens_per_request,
        horizon_s=_filled(runs.duration_s[rows], _DURATION_S),
        max_pending=np.where(np.isnan(runs.max_pending[rows]), lengths.max_pending, runs.max_pending[rows]),
        adapters=runs.max_cpu_loras[rows],
        max_loras=runs.max_loras[rows],
        max_lora_rank=runs.max_lora_rank[rows],
        max_num_seqs=runs.max_num_seqs[rows],
        max_num_batched_tokens=runs.max_num_batched_tokens[rows],
        max_model_len=None if np.isnan(limit) else int(limit),
    )
    mean_tokens = float(output_tokens.mean())
    try:
        return scenarios, lengths.output_lengths(mean_tokens)
    except InputError as error:
        raise InputError(f"{runs.path}, mean_output_tokens", round(mean_tokens, 1), error.allowed) from None


def _filled(values: Float[np.ndarray, " rows"], otherwise: float) -> Float[np.ndarray, " rows"]:
    """Replace what is missing by the mean of the rest, or by ``otherwise`` if all is missing."""
    missing = np.isnan(values)
    return np.where(missing, otherwise if missing.all() else np.nanmean(values), values)
