"""Answer of a surrogate for one workload: with intervals, warnings where it was not trained, and the twin's check."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from lora_capacity.calibration import Calibration, CalibrationLike, load_calibration
from lora_capacity.errors import InfeasibleError, InputError, check_choice, check_type
from lora_capacity.scenarios import build_scenarios
from lora_capacity.scenarios.workload_batch import WorkloadBatch
from lora_capacity.schema import briefly, whole_numbers
from lora_capacity.search import assess
from lora_capacity.surrogate.documents import calibration_digest
from lora_capacity.surrogate.features import FEATURES, Described, describe, with_slots
from lora_capacity.surrogate.model import LEVELS, Surrogate, load_surrogate
from lora_capacity.surrogate.neural import NeuralSurrogate
from lora_capacity.surrogate.targets import OPTIMUM, adapters_of
from lora_capacity.surrogate.trees import KINDS
from lora_capacity.workload import Workload, WorkloadLike, load_workload

_TOLERATED = 0.02
"""Share of a feature's range by which it may lie outside before that is worth a warning."""


def _two(field: str, given: object) -> tuple[int, int]:
    """Return adapters and slots."""
    numbers = whole_numbers(field, given)
    if len(numbers) != 2:
        raise InputError(field, briefly(given), "two whole numbers, of adapters and of slots")
    return numbers[0], numbers[1]


@dataclass(frozen=True)
class Answer:
    """A surrogate's prediction for one workload.

    Attributes:
        max_cpu_loras: Adapters, A.
        max_loras: Slots, S.
        throughput_tokens_per_s: Tokens per second of completed requests.
        offered_tokens_per_s: Tokens per second that arrive.
        level: Chance with which the intervals hold.
        twin_intervals: Where the twin's own answers lie: by name of the three, smallest and largest.
        intervals: The same of a real server, whose capacity the calibration may miss, too.
        kind: Kind of ensemble that answered, by target.
        given: Of A and S that were given: both, whether they are ``starved``, and ``critical_load``, the factor of the
            load at which they are; empty if none were.
        check: What the steady twin says of the answer, or of what was given: ``throughput_tokens_per_s``, ``starved``,
            ``starving_probability``, ``status``; empty unless asked for.
        smooth: What a neural surrogate says of the answer, or of what was given, see `NeuralSurrogate.assess`; empty
            unless one is given.
        warnings: What to keep in mind, a sentence each.
    """

    max_cpu_loras: int
    max_loras: int
    throughput_tokens_per_s: float
    offered_tokens_per_s: float
    level: float
    twin_intervals: Mapping[str, tuple[float, float]]
    intervals: Mapping[str, tuple[float, float]]
    kind: Mapping[str, str]
    given: Mapping[str, Any] = field(default_factory=dict)
    check: Mapping[str, Any] = field(default_factory=dict)
    smooth: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as ``predict --format json`` prints it."""
        return asdict(self)


def predict_workload(
    surrogate: Surrogate | str | Path,
    calibration: CalibrationLike,
    workload: WorkloadLike,
    *,
    kind: str = "best",
    level: float = 0.9,
    given: tuple[int, int] | None = None,
    check: bool = False,
    smooth: NeuralSurrogate | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Answer:
    """Answer for one workload on one server.

    Args:
        surrogate: What was trained for the calibration, or its name or file.
        calibration: Model, GPU and coefficients, or their name or file.
        workload: Adapters and traffic, as `load_workload` takes them.
        kind: ``tree``, ``boosting``, or ``best``: of each target the best.
        level: Chance with which intervals hold: 0.5, 0.8, 0.9 or 0.95.
        given: Adapters and slots to say of whether they starve.
        check: Whether to ask the steady twin too.
        smooth: A neural surrogate to ask for throughput, margin and sensitivities.
        settings: Other server settings by vLLM's names; those that surrogates were not trained for only at their
            defaults.

    Raises:
        InputError: If a value is not allowed.
        InfeasibleError: If the server does not start with a slot, or the base model's traffic alone is too much.
    """
    if isinstance(surrogate, str | Path):
        surrogate = load_surrogate(surrogate)
    check_type("surrogate", surrogate, Surrogate, "a Surrogate, or its name or file")
    calibration, workload = load_calibration(calibration), load_workload(workload)
    check_type("check", check, bool, "True or False")
    check_type("smooth", smooth, (NeuralSurrogate, type(None)), "a NeuralSurrogate")
    check_type("settings", settings, (Mapping, type(None)), "a mapping of settings by vLLM's names")
    if given is not None:
        given = _two("given", given)
    check_choice("kind", kind, ("best", *KINDS))
    if level not in LEVELS:
        raise InputError("level", level, ", ".join(f"{each:g}" for each in LEVELS))
    settings = dict(settings or {})
    batch = WorkloadBatch.of(workload, calibration, **settings)
    described = describe(calibration, batch)
    if described.most_slots[0] < 1:
        raise InfeasibleError("the server does not start with one adapter slot: its GPU memory is too small")
    logs = {name: float(surrogate.of(name, kind).predict(described.values)[0]) for name in OPTIMUM}
    full, tokens = float(described.full_per_s[0]), float(batch.tokens_per_request[0])
    if batch.adapters_at(np.array([full * np.exp(logs["adapters"])]))[0] < 1:
        raise InfeasibleError("not one adapter fits beside the base model's traffic, as the surrogate has it")

    def spread(extra: float) -> dict[str, tuple[float, float]]:
        found = {}
        for name, scale in (("adapters", full), ("slots", 1.0), ("throughput", full * tokens)):
            width = float(np.hypot(surrogate.width(name, level, kind), extra * (name != "slots")))
            low, high = (_ended(name, batch, scale * np.exp(logs[name] + side * width), side) for side in (-1, 1))
            found[name] = low, high
        return found

    adapters = int(adapters_of(batch, np.array([full * np.exp(logs["adapters"])]))[0])
    slots = int(np.clip(np.rint(np.exp(logs["slots"])), 1, min(adapters, int(described.most_slots[0]))))
    offered = float(batch.offered_per_s(np.array([adapters]))[0] * tokens)
    point = given or (adapters, slots)
    return Answer(
        max_cpu_loras=adapters,
        max_loras=slots,
        throughput_tokens_per_s=min(full * tokens * float(np.exp(logs["throughput"])), offered),
        offered_tokens_per_s=offered,
        level=level,
        twin_intervals=spread(0.0),
        intervals=spread(float(norm.ppf(0.5 + 0.5 * level)) * calibration.capacity_error),
        kind={name: surrogate.best[name] if kind == "best" else kind for name in surrogate.best},
        given={} if given is None else _judged(surrogate, described, batch, given, kind),
        check=_checked(calibration, workload, point, settings) if check else {},
        smooth={} if smooth is None else smooth.assess(calibration, batch, *point),
        warnings=tuple(_warnings(surrogate, calibration, described)),
    )


def _ended(name: str, batch: WorkloadBatch, value: float, side: int) -> float:
    """End of an interval: whole adapters and slots."""
    if name == "adapters":
        return int(adapters_of(batch, np.array([value]))[0])
    if name == "slots":
        return max(int(np.floor(value) if side < 0 else np.ceil(value)), 1)
    return float(value)


def _judged(
    surrogate: Surrogate, described: Described, batch: WorkloadBatch, given: tuple[int, int], kind: str
) -> dict[str, Any]:
    """Whether given adapters and slots starve."""
    adapters, slots = given
    if not 1 <= slots <= adapters:
        raise InputError("max_loras", slots, f"1 to the number of adapters served, {adapters}")
    values = with_slots(described.values, np.array([[slots]]))[:, 0]
    sustained = float(described.full_per_s[0] * np.exp(surrogate.of("starved", kind).predict(values)[0]))
    critical = sustained / float(batch.offered_per_s(np.array([adapters]))[0])
    starts = slots <= int(described.most_slots[0])
    return {
        "max_cpu_loras": adapters,
        "max_loras": slots,
        "starts": starts,
        "starved": critical < 1.0,
        "critical_load": critical,
    }


def _checked(
    calibration: Calibration, workload: Workload, point: tuple[int, int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the steady twin says of adapters and slots."""
    scenarios = build_scenarios(workload, calibration, *point, **settings)
    found = assess(calibration, scenarios, workload)
    names = ("throughput_tokens_per_s", "offered_tokens_per_s", "starved", "starving_probability", "status")
    return {name: found[name].tolist()[0] for name in names}


def _warnings(surrogate: Surrogate, calibration: Calibration, described: Described) -> list[str]:
    found = []
    if surrogate.calibration_digest != calibration_digest(calibration):
        found.append(
            f"the surrogate was trained for another version of {surrogate.calibration}, not for {calibration.name} "
            "as it is now: label and train again"
        )
    for feature, value, low, high in zip(
        FEATURES, described.values[0], surrogate.lowest, surrogate.highest, strict=True
    ):
        slack = _TOLERATED * (high - low)
        if not low - slack <= value <= high + slack:
            found.append(
                f"{feature.name} ({feature.meaning}) is {value:.3g}, outside the trained range {low:.3g} to "
                f"{high:.3g}: check with the steady twin (--check)"
            )
    return found
