"""What the event twin adds: how much of the steady twin's sustained load a server near its best really sustains.

Playing every workload would take hours, and tell of each no more than one draw of requests does. So the workloads of an
evenly spread part are played, each with a few numbers of slots about its best and at the load that it should sustain,
and a smooth law is fitted to the ratio of throughputs: the law holds for all, and the draws average out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.run import play
from lora_capacity.run.steady import Progress
from lora_capacity.surrogate.optima import Optima, Surfaces
from lora_capacity.surrogate.questions import FloatArray, IntArray, Questions
from lora_capacity.surrogate.steady import limits, simulate_questions
from lora_capacity.twins.steady.slots import burst_width
from lora_capacity.workload import LengthDistribution

_ABOUT = (1.0, 1.4, 2.0)
_LENGTHS, _INPUT_SPREAD = 512, 1.1
_TREES, _FOLDS = 300, 8
_SMOOTH = 0.5


@dataclass(frozen=True, eq=False)
class Plays:
    """Configurations played; arrays ``[plays]``.

    Attributes:
        question: Index of the question.
        max_cpu_loras: Adapters.
        max_loras: Slots.
        log_ratio: Logarithm of the throughput played over the steady twin's.
    """

    question: IntArray
    max_cpu_loras: IntArray
    max_loras: IntArray
    log_ratio: FloatArray


def play_near_best(
    calibration: Calibration,
    questions: Questions,
    optima: Optima,
    surfaces: Surfaces,
    *,
    seed: int = 0,
    parts: Path | None = None,
    progress: Progress | None = None,
) -> Plays:
    """Play each question with a few numbers of slots from its best upwards, at the load that the steady twin sustains.

    Args:
        calibration: Whose costs and vLLM version hold.
        questions: The workloads and servers to play.
        optima: Their optima by the steady twin.
        surfaces: Their surfaces.
        seed: Whole number >= 0 that decides requests and lengths.
        parts: Folder for what is finished, as `play` has it.
        progress: Called with the configurations played and their total.
    """
    feasible = np.flatnonzero(optima.max_loras > 0)
    points = [
        (row, *point) for row in feasible.tolist() for point in _points(questions.take([row]), optima, surfaces, row)
    ]
    row, adapters, slots = np.array(points, np.int64).reshape(-1, 3).T
    asked = questions.take(row)
    rng = np.random.default_rng(seed)
    pairs = [_length_pairs(questions.take([each]), rng) for each in feasible.tolist()]
    place = np.searchsorted(feasible, row)
    inputs, outputs = (np.stack(column)[place] for column in zip(*pairs, strict=True))
    scenarios = asked.lay_out(calibration, adapters, slots)
    played = play(calibration, scenarios, inputs, outputs, seed=seed, parts=parts, progress=progress)
    predicted = simulate_questions(calibration, asked, adapters, slots)
    share = played.service / predicted.service
    known = np.isfinite(share) & (share > 0)
    return Plays(row[known], adapters[known], slots[known], np.log(share[known]).astype(np.float64))


def _points(question: Questions, optima: Optima, surfaces: Surfaces, row: int) -> list[tuple[int, int]]:
    """Adapters and slots to play."""
    known = ~np.isnan(surfaces.sustained_by_slots[row])
    wanted = np.unique(np.rint(optima.max_loras[row] * np.array(_ABOUT)).astype(int))
    load = np.interp(wanted, surfaces.slots[row][known], surfaces.sustained_by_slots[row][known])
    adapters = question.adapters_at(load[np.newaxis])[0]
    sound = (wanted <= adapters) & (wanted <= surfaces.slots[row][known].max())
    return list(zip(adapters[sound].tolist(), wanted[sound].tolist(), strict=True))


def _length_pairs(question: Questions, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Prompt and answer lengths with the question's means, whose pairs hold as many KV tokens as it says.

    As many pairs as needed join long prompts to short answers; the others are independent.
    """

    def lengths(mean: float, spread: float) -> FloatArray:
        law = LengthDistribution.from_moments(mean, spread * mean, 1, int(8 * mean))
        at = (np.arange(_LENGTHS) + 0.5) / _LENGTHS
        found = law.tokens[np.searchsorted(np.cumsum(law.probability), at)].astype(np.float64)
        return np.asarray(np.maximum(np.rint(found * mean / found.mean()), 1.0))

    inputs = lengths(float(question.mean_input_tokens[0]), _INPUT_SPREAD)
    outputs = lengths(float(question.mean_output_tokens[0]), float(question.output_spread[0]))
    held = float(question.kv_tokens_per_request[0]) - 8.0
    wanted = held * outputs.mean() - 0.5 * np.mean(outputs**2)
    free, opposed = inputs.mean() * outputs.mean(), np.mean(inputs * outputs[::-1])
    share = float(np.clip((free - wanted) / (free - opposed), 0.0, 1.0))
    chosen = rng.permutation(_LENGTHS) < share * _LENGTHS
    order = np.empty(_LENGTHS, np.int64)
    order[chosen] = np.flatnonzero(chosen)[::-1]
    order[~chosen] = rng.permutation(np.flatnonzero(~chosen))
    return inputs.astype(np.int64), outputs[order].astype(np.int64)


class Law:
    """A law of the logarithm of what the event twin's servers sustain over what the steady twin's do.

    An average of many randomized trees: where adapters that are never idle hold all slots and yet do not fill the
    batch, the event twin's server is stuck with them, and that sets in abruptly.
    """

    def __init__(self, calibration: Calibration, questions: Questions, plays: Plays) -> None:
        """Fit it to what was played of the questions."""
        from sklearn.model_selection import GroupKFold, cross_val_predict

        self.calibration = calibration
        asked = questions.take(plays.question)
        slots, adapters = plays.max_loras[:, np.newaxis], plays.max_cpu_loras[:, np.newaxis]
        given = terms(calibration, asked, slots, asked.offered_per_s(adapters))[:, 0]
        self._trees = _trees().fit(given, plays.log_ratio)
        folds = min(_FOLDS, np.unique(plays.question).size)
        left = np.full(plays.log_ratio.shape, np.nan)
        if folds > 1:
            found = cross_val_predict(_trees(), given, plays.log_ratio, groups=plays.question, cv=GroupKFold(folds))
            left = plays.log_ratio - found
        self.report = {
            "configurations": int(plays.log_ratio.size),
            "mean_log_ratio": float(plays.log_ratio.mean()),
            "spread": float(plays.log_ratio.std()),
            "left_held_back": float(np.sqrt(np.mean(left**2))),
        }

    def correction(self, questions: Questions, surfaces: Surfaces) -> FloatArray:
        """Return the correction of each number of slots of the surfaces, ``[questions, known]``."""
        known = ~np.isnan(surfaces.sustained_by_slots)
        load = np.where(known, surfaces.sustained_by_slots, questions.offered_per_s(surfaces.slots))
        given = terms(self.calibration, questions, surfaces.slots, load)
        raw = self._trees.predict(given.reshape(-1, given.shape[-1])).reshape(known.shape)
        return _smoothed(np.log(surfaces.slots), raw, known)


def _smoothed(place: FloatArray, values: FloatArray, known: NDArray[np.bool_]) -> FloatArray:
    """Average over neighbours: trees jump, and the choice of slots would follow every jump."""
    near = np.exp(-0.5 * ((place[:, :, np.newaxis] - place[:, np.newaxis]) / _SMOOTH) ** 2) * known[:, np.newaxis]
    return np.asarray((near * values[:, np.newaxis]).sum(axis=2) / np.maximum(near.sum(axis=2), 1e-9))


def _trees() -> Any:
    from sklearn.ensemble import ExtraTreesRegressor  # takes seconds to load, which answers need not wait for

    return ExtraTreesRegressor(_TREES, min_samples_leaf=3, max_features=0.5, random_state=0)


def terms(calibration: Calibration, questions: Questions, slots: IntArray, load_per_s: FloatArray) -> FloatArray:
    """Return what the law depends on, for some numbers of slots per question.

    Args:
        calibration: Whose servers they are.
        questions: The workloads and servers.
        slots: Numbers of slots, ``[questions, n]``.
        load_per_s: The load that each sustains, ``[questions, n]``.

    Returns:
        ``[questions, n, terms]``.
    """
    limit = limits(calibration, questions, slots)

    def column(values: FloatArray) -> FloatArray:
        return np.broadcast_to(values[:, np.newaxis], slots.shape)

    base = column(questions.base_rate_per_s)
    stay_s = limit.step_s * column(questions.mean_output_tokens)
    rates = -np.sort(-questions.rates_per_s, axis=1)[:, np.newaxis]
    turn = rates.shape[-1]
    adapters = np.maximum((load_per_s - base) / rates.mean(axis=-1), 1.0)
    running = rates * stay_s[..., np.newaxis]
    of_kind = (adapters / turn)[..., np.newaxis] * np.ones(turn)
    held = np.diff(np.minimum(np.cumsum(of_kind, axis=-1), slots[..., np.newaxis]), axis=-1, prepend=0.0)
    held_load = (held * rates).sum(axis=-1) + base
    last = np.take_along_axis(running, np.maximum((held > 0).sum(axis=-1, keepdims=True) - 1, 0), axis=-1)[..., 0]
    found = [
        np.log(slots),
        np.log(adapters),
        np.log(held_load / load_per_s),  # what the busiest adapters send, if they hold all slots
        np.log(held_load * stay_s / limit.running),  # the batch that they fill
        np.log((of_kind * (running > 1.0)).sum(axis=-1) / slots + 0.1),
        np.log((of_kind * -np.expm1(-running)).sum(axis=-1) / slots),
        np.log(running[..., 0]),
        np.log(running[..., turn // 2]),
        np.log(running[..., -1]),
        np.log(last),
        np.asarray(burst_width(jnp.asarray(slots))) ** 4,
        np.log(limit.running),
        np.log(limit.running / slots),
        np.log(stay_s),
        np.log(limit.kv_share),
        base / load_per_s,
        column(questions.output_spread),
        np.log(load_per_s / limit.load_per_s),
    ]
    return np.stack(found, axis=-1).astype(np.float64)
