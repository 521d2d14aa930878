"""Discrepancy of the twins: how much of the steady twin's sustained load the event twin's server sustains.

Simulating every workload would take hours, and tell of each no more than one draw of requests does. So the workloads of
an evenly spread part are simulated, each with a few numbers of slots from its best upwards and at the load that it
should sustain, and a smooth model is fitted to the ratio of throughputs: it holds for all, and the draws average out.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from lora_capacity.calibration import Calibration
from lora_capacity.run import LengthSample, simulate
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios.workload_batch import FloatArray, IntArray, WorkloadBatch
from lora_capacity.surrogate.closed_form import full_batches
from lora_capacity.surrogate.optima import Optima, Surfaces
from lora_capacity.surrogate.simulation import simulate_workloads
from lora_capacity.surrogate.space import BLOCK_TOKENS
from lora_capacity.twins.steady.slots import burst_width
from lora_capacity.workload import LengthDistribution

_SLOTS_OVER_BEST = (1.0, 1.4, 2.0)
"""Slots simulated over the steady twin's best: where the event twin falls short, its best lies above."""

_LENGTHS = 512
"""Pairs of lengths that stand for a workload's; requests draw from them."""

_INPUT_SPREAD = 1.1
"""Standard deviation of the prompt length over its mean: that of ShareGPT, 248 over 223 tokens (arXiv 2508.08343)."""

_LONGEST = 8
"""Longest length over the mean: beyond it a gamma distribution of the default space's widest spread, 1.3, has 0.3 %."""

_TREES, _LEAF = 300, 3
"""Randomized trees of the average, and fewest simulations in a leaf: enough for the draws to average out."""

_FOLDS = 8
"""Parts of the workloads that are held out in turn, for the error that is told."""

_SMOOTHING = 0.5
"""Width of the average over neighbouring slots, in their logarithm: about that between two slots simulated."""


def corrections(
    calibration: Calibration,
    workloads: WorkloadBatch,
    optima: Optima,
    surfaces: Surfaces,
    simulated: int,
    *,
    seed: int = 0,
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Float[np.ndarray, "workloads known"], dict[str, Any]]:
    """Simulate some workloads by both twins, and predict for all what the event twin's servers really sustain.

    The regression is an average of many randomized trees: where adapters that are never idle hold all slots and yet do
    not fill the batch, the event twin's server is stuck with them, and that sets in abruptly.

    Args:
        calibration: Whose costs and vLLM version hold.
        workloads: Workloads on servers.
        optima: Their optima by the steady twin.
        surfaces: Their surfaces.
        simulated: Of how many workloads, the first ones, both twins simulate a few configurations.
        seed: Whole number >= 0 that decides requests and lengths.
        checkpoint_dir: Folder for what is finished, as `simulate` has it.
        progress: Called with the configurations simulated and their total.

    Returns:
        Logarithm of the load that the event twin's servers sustain over that of the steady twin's, for each of
        ``surfaces.slots``; and of the ``configurations`` simulated, their number, the mean and spread of the logarithm,
        and what the regression leaves of it on workloads that it was not fitted to. Zeros and an empty report where
        nothing is to be simulated.
    """
    feasible = np.flatnonzero(optima.max_loras[:simulated] > 0)
    points = [(row, *point) for row in feasible.tolist() for point in _points(workloads, optima, surfaces, row)]
    if not points:
        return np.zeros(surfaces.slots.shape), {}
    row, adapters, slots = np.array(points, np.int64).reshape(-1, 3).T
    lengths = _lengths(workloads, feasible, row, np.random.default_rng(seed))
    asked = workloads.take(row)
    scenarios = asked.scenarios(calibration, adapters, slots)
    found = simulate(
        calibration, scenarios, lengths, engine="event", seed=seed, checkpoint_dir=checkpoint_dir, progress=progress
    )
    share = found.service / simulate_workloads(calibration, asked, adapters, slots).service
    told = np.flatnonzero(np.isfinite(share) & (share > 0))
    log_ratio = np.log(share[told]).astype(np.float64)
    load = asked.offered_per_s(adapters)
    given = _terms(calibration, asked.take(told), slots[told, np.newaxis], load[told, np.newaxis])[:, 0]
    known = ~np.isnan(surfaces.sustained_by_slots)
    load = np.where(known, surfaces.sustained_by_slots, workloads.offered_per_s(surfaces.slots))
    wanted = _terms(calibration, workloads, surfaces.slots, load)
    raw = _trees().fit(given, log_ratio).predict(wanted.reshape(-1, wanted.shape[-1])).reshape(known.shape)
    report = {
        "configurations": log_ratio.size,
        "mean_log_ratio": float(log_ratio.mean()),
        "spread": float(log_ratio.std()),
        "left_held_back": _left_held_out(given, log_ratio, row[told]),
    }
    return _smoothed(np.log(surfaces.slots), raw, known), report


def _points(workloads: WorkloadBatch, optima: Optima, surfaces: Surfaces, row: int) -> list[tuple[int, int]]:
    """Adapters and slots to simulate: a few numbers of slots from the best upwards, at the load they should sustain."""
    known = ~np.isnan(surfaces.sustained_by_slots[row])
    slots, sustained = surfaces.slots[row][known], surfaces.sustained_by_slots[row][known]
    wanted = np.unique(np.rint(optima.max_loras[row] * np.array(_SLOTS_OVER_BEST)).astype(int))
    adapters = workloads.take([row]).adapters_at(np.interp(wanted, slots, sustained)[np.newaxis])[0]
    sound = (wanted <= adapters) & (wanted <= slots.max())
    return list(zip(adapters[sound].tolist(), wanted[sound].tolist(), strict=True))


def _lengths(workloads: WorkloadBatch, feasible: IntArray, row: IntArray, rng: np.random.Generator) -> LengthSample:
    """Lengths of the requests of some rows, of each feasible workload drawn once."""
    pairs = [_length_pairs(workloads.take([each]), rng) for each in feasible.tolist()]
    inputs, outputs = (np.stack(column)[np.searchsorted(feasible, row)] for column in zip(*pairs, strict=True))
    return LengthSample(inputs, outputs)


def _length_pairs(
    workload: WorkloadBatch, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Prompt and output lengths with the workload's means, whose pairs hold as many KV tokens as it says.

    As many pairs as needed join long prompts to short outputs; the others are independent.
    """

    def lengths(mean: float, spread: float) -> FloatArray:
        distribution = LengthDistribution.from_moments(mean, spread * mean, 1, int(_LONGEST * mean))
        at = (np.arange(_LENGTHS) + 0.5) / _LENGTHS
        found = distribution.tokens[np.searchsorted(np.cumsum(distribution.probability), at)].astype(np.float64)
        return np.asarray(np.maximum(np.rint(found * mean / found.mean()), 1.0))

    inputs = lengths(float(workload.mean_input_tokens[0]), _INPUT_SPREAD)
    outputs = lengths(float(workload.mean_output_tokens[0]), float(workload.output_spread[0]))
    held = float(workload.kv_tokens_per_request[0]) - 0.5 * BLOCK_TOKENS
    wanted = held * outputs.mean() - 0.5 * np.mean(outputs**2)
    free, opposed = inputs.mean() * outputs.mean(), np.mean(inputs * outputs[::-1])
    share = float(np.clip((free - wanted) / (free - opposed), 0.0, 1.0))
    chosen = rng.permutation(_LENGTHS) < share * _LENGTHS
    order = np.empty(_LENGTHS, np.int64)
    order[chosen] = np.flatnonzero(chosen)[::-1]
    order[~chosen] = rng.permutation(np.flatnonzero(~chosen))
    return inputs.astype(np.int64), outputs[order].astype(np.int64)


def _left_held_out(
    given: Float[np.ndarray, "runs terms"], log_ratio: Float[np.ndarray, " runs"], workload: Int[np.ndarray, " runs"]
) -> float:
    """Root mean square of what the regression leaves of workloads that it was not fitted to; NaN of a single one."""
    from sklearn.model_selection import GroupKFold, cross_val_predict

    folds = min(_FOLDS, np.unique(workload).size)
    if folds < 2:
        return float("nan")
    found = cross_val_predict(_trees(), given, log_ratio, groups=workload, cv=GroupKFold(folds))
    return float(np.sqrt(np.mean((log_ratio - found) ** 2)))


def _smoothed(
    place: Float[np.ndarray, "workloads known"],
    values: Float[np.ndarray, "workloads known"],
    known: Bool[np.ndarray, "workloads known"],
) -> Float[np.ndarray, "workloads known"]:
    """Average over neighbours ``[workloads, known]``: trees jump, and the choice of slots would follow every jump."""
    near = np.exp(-0.5 * ((place[:, :, np.newaxis] - place[:, np.newaxis]) / _SMOOTHING) ** 2) * known[:, np.newaxis]
    return np.asarray((near * values[:, np.newaxis]).sum(axis=2) / np.maximum(near.sum(axis=2), 1e-9))


def _trees() -> Any:
    from sklearn.ensemble import ExtraTreesRegressor  # takes seconds to load, which answers need not wait for

    return ExtraTreesRegressor(_TREES, min_samples_leaf=_LEAF, max_features=0.5, random_state=0)


def _terms(
    calibration: Calibration,
    workloads: WorkloadBatch,
    slots: Int[np.ndarray, "workloads n"],
    load_per_s: Float[np.ndarray, "workloads n"],
) -> Float[np.ndarray, "workloads n terms"]:
    """Return what the model depends on, for some numbers of slots per workload.

    Args:
        calibration: Whose servers they are.
        workloads: The workloads and servers.
        slots: Numbers of slots.
        load_per_s: The load that each sustains.
    """
    full = full_batches(calibration, workloads, slots)

    def column(values: FloatArray) -> FloatArray:
        return np.broadcast_to(values[:, np.newaxis], slots.shape)

    base = column(workloads.base_rate_per_s)
    residence_s = full.step_s * column(workloads.mean_output_tokens)
    rates = -np.sort(-workloads.rates_per_s, axis=1)[:, np.newaxis]
    size = rates.shape[-1]
    adapters = np.maximum((load_per_s - base) / rates.mean(axis=-1), 1.0)
    running = rates * residence_s[..., np.newaxis]
    of_kind = (adapters / size)[..., np.newaxis] * np.ones(size)
    held = np.diff(np.minimum(np.cumsum(of_kind, axis=-1), slots[..., np.newaxis]), axis=-1, prepend=0.0)
    held_load = (held * rates).sum(axis=-1) + base
    last = np.take_along_axis(running, np.maximum((held > 0).sum(axis=-1, keepdims=True) - 1, 0), axis=-1)[..., 0]
    found = [
        np.log(slots),
        np.log(adapters),
        np.log(held_load / load_per_s),  # what the busiest adapters send, if they hold all slots
        np.log(held_load * residence_s / full.running),  # the batch that they fill
        np.log((of_kind * (running > 1.0)).sum(axis=-1) / slots + 0.1),
        np.log((of_kind * -np.expm1(-running)).sum(axis=-1) / slots),
        np.log(running[..., 0]),
        np.log(running[..., size // 2]),
        np.log(running[..., -1]),
        np.log(last),
        np.asarray(burst_width(jnp.asarray(slots))) ** 4,
        np.log(full.running),
        np.log(full.running / slots),
        np.log(residence_s),
        np.log(full.kv_share),
        base / load_per_s,
        column(workloads.output_spread),
        np.log(load_per_s / full.load_per_s),
    ]
    return np.stack(found, axis=-1).astype(np.float64)
