"""Estimating what GPUs reach of their data sheets from the speeds of many servers."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from lora_capacity.calibration import Calibration
from lora_capacity.calibration.derive import Target, log_slopes
from lora_capacity.calibration.efficiencies import FIRST_GUESSES, Efficiencies
from lora_capacity.errors import InputError
from lora_capacity.facts.speeds import Loads, SpeedPrediction, known_target, predict_speeds
from lora_capacity.measurements import Speed

_SPREAD, _UNTOLD_SPREAD = 0.12, 0.4
"""Error of the logarithm of a speed that counts as one, and of one whose load is not told."""

_CONTRADICTS = 0.6
"""Difference of logarithms, of speeds of one server alike in load, from which on one of them must be wrong."""


def fit_efficiencies(speeds: Sequence[Speed], source: str = "") -> Efficiencies:
    """Fit efficiencies to speeds of base models, by robust least squares around the first guesses.

    Speeds of one model on one kind of GPU count together as the square root of their number. Left out are speeds with
    adapters, whose kernels the measured calibrations tell better, of servers that are not known, and those that
    `contradictions` names.

    Args:
        speeds: The speeds.
        source: What they are, for the file.

    Raises:
        InputError: If none can be used.
    """
    doubtful = contradictions(speeds)
    known: list[tuple[Speed, Target]] = []
    for speed in speeds:
        if math.isnan(speed.measured_s) or speed.server.lora or speed.id in doubtful:
            continue
        try:
            known.append((speed, known_target(speed)))
        except InputError:
            continue
    if not known:
        raise InputError("speeds", f"{len(speeds)} rows", "a speed of a base model whose shape and GPU are known")
    loads = Loads(known)
    logs = np.log([speed.measured_s for speed, _ in known])
    kinds = [(speed.server.gpu_kind, target.model.name, target.deployment) for speed, target in known]
    alike = Counter(kinds)
    accepted = np.array([_SPREAD if speed.tells_load else _UNTOLD_SPREAD for speed, _ in known])
    accepted *= np.sqrt([alike[kind] for kind in kinds])
    names = list(FIRST_GUESSES)
    centre = np.log([prior.centre for prior, _ in FIRST_GUESSES.values()])
    spread = np.array([prior.spread for prior, _ in FIRST_GUESSES.values()])

    def errors(values: dict[str, float]) -> Float[np.ndarray, " speeds"]:
        derived = [target.coefficients(values) for target in loads.targets]
        return np.asarray(np.log(loads.token_s(derived, lora=False)) - logs)

    def named(x: Float[np.ndarray, " efficiencies"]) -> dict[str, float]:
        return dict(zip(names, np.exp(x).tolist(), strict=True))

    def residuals(x: Float[np.ndarray, " efficiencies"]) -> Float[np.ndarray, " residuals"]:
        return np.concatenate([errors(named(x)) / accepted, (x - centre) / spread])

    def jacobian(x: Float[np.ndarray, " efficiencies"]) -> Float[np.ndarray, "residuals efficiencies"]:
        return np.concatenate([log_slopes(errors, named(x)) / accepted[:, None], np.diag(1.0 / spread)])

    found = least_squares(residuals, centre, jac=jacobian, loss="soft_l1")
    left = errors(named(found.x))
    told = np.array([speed.tells_load for speed, _ in known])
    return Efficiencies(
        values=named(found.x),
        covariance=np.linalg.inv(found.jac.T @ found.jac),
        step_spread=_robust_spread(left[told]) if told.any() else _SPREAD,
        source=source or f"{len(known)} speeds",
    )


def leave_out_gpus(speeds: Sequence[Speed], measured: Sequence[Calibration] = ()) -> list[SpeedPrediction]:
    """Return what is predicted of every speed by what is known of other kinds of GPU.

    Args:
        speeds: The speeds.
        measured: Calibrations that correct what follows from the efficiencies, those of other kinds.
    """
    kinds = {speed.server.gpu_kind for speed in speeds}
    fitted = {kind: fit_efficiencies([each for each in speeds if each.server.gpu_kind != kind]) for kind in kinds}
    found = {
        each.id: each
        for kind in kinds
        for each in predict_speeds(
            [speed for speed in speeds if speed.server.gpu_kind == kind],
            fitted[kind],
            [each for each in measured if each.gpu.name != kind],
        )
    }
    return [found[speed.id] for speed in speeds]


def contradictions(speeds: Sequence[Speed]) -> dict[str, str]:
    """Return speeds that others of the same server contradict, with what they contradict, by name.

    Two speeds of one server with as many requests in flight differ by lengths at most. Where they differ by more the
    slower one is named: work that is not told lengthens a step, none shortens it.

    Args:
        speeds: The speeds.
    """
    groups: dict[tuple[object, ...], list[Speed]] = {}
    for speed in speeds:
        if not math.isnan(speed.measured_s) and not math.isnan(speed.concurrency) and not speed.server.lora:
            server = speed.server
            groups.setdefault((server.gpu_kind, server.model, server.quantization, server.deployment), []).append(speed)
    found = {}
    for group in groups.values():
        for one in group:
            same = [each for each in group if each is not one and each.concurrency == one.concurrency]
            for other in same:
                if math.log(one.measured_s / other.measured_s) > _CONTRADICTS:
                    found[one.id] = f"{1e3 * one.measured_s:.3g} ms where {other.id} took {1e3 * other.measured_s:.3g}"
    return found


def _robust_spread(errors: Float[np.ndarray, " speeds"]) -> float:
    """Standard deviation by the median of the absolute errors, which a few wild ones do not move."""
    return float(1.4826 * np.median(np.abs(errors)))
