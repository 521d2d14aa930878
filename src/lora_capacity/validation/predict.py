"""What a twin says of measured runs."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from lora_capacity.calibration import Calibration, RunLengths
from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.sweep import simulate
from lora_capacity.twin import Results, Scenarios, StayLaw, lay_out
from lora_capacity.units import S_PER_HOUR
from lora_capacity.validation.runs import FloatArray, IntArray, Runs

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

ENGINES = ("steady",)
"""Twins that can be asked."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a twin says of runs; NumPy arrays ``[runs]``.

    Attributes:
        results: The predictions, of the answer lengths that the model produced.
        offered_tokens_per_s: Offered load of the run itself, its arrivals per second times the mean lengths asked for:
            what both predicted and measured throughput are held against.
        starving_probability: Chance that the run starves, given the calibration's error.
    """

    results: Results
    offered_tokens_per_s: FloatArray
    starving_probability: FloatArray


def predict_runs(runs: Runs, calibrations: Mapping[str, Calibration], engine: str = "steady") -> Predictions:
    """Predict every run from its settings and traffic.

    Rates are scaled to the arrivals that were recorded, unless the clients were held back. The answer lengths are those
    asked for times the share that the model produced (``calibration.runs``). Runs of servers that did not start are
    predicted with the mean lengths and the mean duration of the model's other runs.

    Args:
        runs: The runs.
        calibrations: The calibration of every model that occurs, by model name.
        engine: Which twin; so far ``steady``.

    Raises:
        InputError: If a model has no calibration, a setting is not allowed, or the engine is unknown.
    """
    if engine not in ENGINES:
        raise InputError("engine", engine, ", ".join(ENGINES), nearest_hint(engine, ENGINES))
    parts, places = [], []
    for model in dict.fromkeys(runs.model.tolist()):
        if model not in calibrations:
            known = ", ".join(calibrations) or "none"
            raise InputError(f"{runs.path}, model", model, f"a model with a calibration: {known}", "give a calibration")
        for rows in _same_length_limit(runs, np.flatnonzero(runs.model == model)):
            parts.append(_predict(runs, rows, calibrations[model]))
            places.append(rows)
    order = np.argsort(np.concatenate(places))
    results = jax.tree.map(lambda *columns: np.concatenate(columns)[order], *(part.results for part in parts))
    return Predictions(
        results,
        np.concatenate([part.offered_tokens_per_s for part in parts])[order],
        np.concatenate([part.starving_probability for part in parts])[order],
    )


def _same_length_limit(runs: Runs, rows: IntArray) -> list[IntArray]:
    """Split rows by ``max_model_len``, which is one for all configurations that are laid out together."""
    _, group = np.unique(runs.max_model_len[rows], return_inverse=True)
    return [rows[group == i] for i in range(int(group.max()) + 1)]


def _predict(runs: Runs, rows: IntArray, calibration: Calibration) -> Predictions:
    lengths = calibration.runs or RUN_LENGTHS
    scenarios, stays = lay_out_runs(runs, rows, calibration, lengths)
    tokens_per_request = runs.mean_input_tokens[rows] + runs.mean_output_tokens[rows]
    offered = runs.arrival_rate_per_s(lengths.max_pending)[rows] * tokens_per_request
    return Predictions(simulate(calibration, scenarios, stays), offered, offered * 0)


def lay_out_runs(
    runs: Runs, rows: IntArray, calibration: Calibration, lengths: RunLengths
) -> tuple[Scenarios, StayLaw]:
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
    output_tokens = _filled(runs.mean_output_tokens[rows], 1.0) * lengths.output_share
    limit = runs.max_model_len[rows[0]]
    scenarios = lay_out(
        calibration,
        class_count=runs.class_count[rows],
        class_rate_per_s=runs.class_rate_per_s[rows] * scale,
        class_rank=runs.mean_rank[rows, np.newaxis],
        base_rate_per_s=0.0,
        mean_input_tokens=_filled(runs.mean_input_tokens[rows], 1.0),
        mean_output_tokens=output_tokens,
        kv_tokens_per_request=lengths.kv_tokens_per_request,
        horizon_s=_filled(runs.duration_s[rows], S_PER_HOUR),
        max_pending=lengths.max_pending,
        adapters=runs.max_cpu_loras[rows],
        max_loras=runs.max_loras[rows],
        max_lora_rank=runs.max_lora_rank[rows],
        max_num_seqs=runs.max_num_seqs[rows],
        max_num_batched_tokens=runs.max_num_batched_tokens[rows],
        max_model_len=None if np.isnan(limit) else int(limit),
    )
    return scenarios, StayLaw.of_lengths(lengths.output_lengths(float(output_tokens.mean())))


def _filled(values: FloatArray, otherwise: float) -> FloatArray:
    """Replace what is missing by the mean of the rest, or by ``otherwise`` if all is missing."""
    missing = np.isnan(values)
    return np.where(missing, otherwise if missing.all() else np.nanmean(values), values)
