"""What the event twin adds: how much of the steady twin's sustained load a server near its best really sustains.

Playing every workload would take hours, and tell of each no more than one draw of requests does. So the workloads of an
evenly spread part are played, each with a few numbers of slots about its best and at the load that it should sustain,
and a smooth law is fitted to the ratio of throughputs: the law holds for all, and the draws average out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.playing import play
from lora_capacity.surrogate.optima import Optima, Surfaces
from lora_capacity.surrogate.questions import FloatArray, IntArray, Questions
from lora_capacity.surrogate.steady import limits, simulate_questions
from lora_capacity.sweep import Progress
from lora_capacity.workload import LengthDistribution

_ABOUT = (1.0, 1.4, 2.0)
_LENGTHS, _INPUT_SPREAD = 512, 1.1
_RIDGE = 3.0
_LARGEST = 0.35


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
    played = play(calibration, scenarios, inputs, outputs, seed=seed, parts=parts, progress=progress).settled
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


@dataclass(frozen=True, eq=False)
class Law:
    """A linear law of the logarithm of what the event twin's servers sustain over what the steady twin's do.

    Attributes:
        weights: Of the terms, ``[terms]``.
        mean: Mean of each term over the plays, ``[terms]``.
        scale: Standard deviation of each term over the plays, ``[terms]``.
        intercept: The correction at the means.
    """

    weights: FloatArray
    mean: FloatArray
    scale: FloatArray
    intercept: float

    @classmethod
    def none(cls) -> Self:
        """Return the law that corrects nothing."""
        return cls(np.zeros(0), np.zeros(0), np.ones(0), 0.0)

    def at(self, terms: FloatArray) -> FloatArray:
        """Return the correction of terms ``[…, terms]``."""
        if not self.weights.size:
            return np.zeros(terms.shape[:-1])
        # Beyond the plays the law is held where it was last known.
        standard = np.clip((terms - self.mean) / self.scale, -2.5, 2.5)
        return np.asarray(np.clip(self.intercept + standard @ self.weights, -_LARGEST, _LARGEST))

    def correction(self, calibration: Calibration, questions: Questions, surfaces: Surfaces) -> FloatArray:
        """Return the correction of each number of slots of the surfaces, ``[questions, known]``."""
        if not self.weights.size:
            return np.zeros(surfaces.slots.shape)
        load = np.where(
            np.isnan(surfaces.sustained_by_slots), questions.offered_per_s(surfaces.slots), surfaces.sustained_by_slots
        )
        return self.at(terms(calibration, questions, surfaces.slots, load))

    def to_json(self) -> dict[str, Any]:
        """Return the law as a JSON object."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}


def terms(calibration: Calibration, questions: Questions, slots: IntArray, load_per_s: FloatArray) -> FloatArray:
    """Return what the law is linear in, of some numbers of slots per question.

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

    adapters = np.maximum(
        (load_per_s - column(questions.base_rate_per_s)) / column(questions.rates_per_s.mean(axis=1)), 1.0
    )
    log_slots, log_adapters = np.log(slots), np.log(adapters)
    per_slot = np.log(limit.running / slots)
    stay = np.log(limit.step_s * column(questions.mean_output_tokens))
    spread = column(np.log(questions.rates_per_s.max(axis=1) / questions.rates_per_s.mean(axis=1)))
    first = [
        log_slots,
        1.0 / slots,
        log_adapters,
        slots / adapters,
        per_slot,
        stay,
        spread,
        np.log(np.maximum(limit.busy_adapters, 0.1) / slots),
        np.log(limit.kv_share),
        column(questions.output_spread),
        column(questions.base_rate_per_s) / load_per_s,
        load_per_s / limit.load_per_s,
    ]
    products = [
        first[i] * first[j] for i, j in ((0, 2), (0, 4), (2, 4), (7, 7), (4, 4), (2, 2), (3, 4), (3, 5), (7, 0))
    ]
    return np.stack([*first, *products], axis=-1).astype(np.float64)


def fit_law(calibration: Calibration, questions: Questions, plays: Plays) -> tuple[Law, dict[str, Any]]:
    """Fit the law to plays by ridge regression.

    Returns:
        The law, and how well it holds: plays, the spread of their ratios, and that of what the law leaves, with every
        workload in turn held back in one of five groups.
    """
    asked = questions.take(plays.question)
    slots, adapters = plays.max_loras[:, np.newaxis], plays.max_cpu_loras[:, np.newaxis]
    given = terms(calibration, asked, slots, asked.offered_per_s(adapters))[:, 0]
    law = _ridge(given, plays.log_ratio)
    left = np.zeros(plays.log_ratio.size)
    for fold in range(5):
        held = plays.question % 5 == fold
        left[held] = plays.log_ratio[held] - _ridge(given[~held], plays.log_ratio[~held]).at(given[held])
    report = {
        "configurations": int(plays.log_ratio.size),
        "mean_log_ratio": float(plays.log_ratio.mean()),
        "spread": float(plays.log_ratio.std()),
        "left_held_back": float(np.sqrt(np.mean(left**2))),
    }
    return law, report


def _ridge(given: FloatArray, wanted: FloatArray) -> Law:
    mean, scale = given.mean(axis=0), given.std(axis=0) + 1e-9
    standard, intercept = (given - mean) / scale, float(wanted.mean())
    gram = standard.T @ standard + _RIDGE * np.eye(given.shape[1])
    return Law(np.linalg.solve(gram, standard.T @ (wanted - intercept)), mean, scale, intercept)
