"""Speeds of servers predicted by derived coefficients, against what people measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from lora_capacity.calibration import Calibration
from lora_capacity.calibration.derive import LogNormal, Target, derive_coefficients
from lora_capacity.calibration.efficiencies import Efficiencies
from lora_capacity.costs import Costs, ExpertRouting, LoraKernels, bare_step_time_s, step_time_s
from lora_capacity.errors import InputError
from lora_capacity.measurements import Speed

_INPUT_TOKENS, _OUTPUT_TOKENS = 223.0, 197.0
"""Lengths where none are told: those of ShareGPT as the published runs (arXiv 2508.08343) drew from it."""

_CONCURRENCY, _LOAD_SPREAD = 10.0, 1.2
"""Requests in flight where no load is told, and the spread of its logarithm: benchmarks of one server mostly send one
to some sixty at once."""

_ROUNDS = 30
"""Of the fixed point between a step's time and the requests that arrive meanwhile; it halves its error in each."""

_ADAPTERS, _SLOTS, _RANK = 1.0, 1.0, 16.0  # where LoRA is on and no more is told

NINE_OF_TEN = 1.645
"""Standard deviations to each side that nine of ten lie within."""

_CLOSE, _NEAR = 0.15, 0.35  # relative errors by which scores count rows


@dataclass(frozen=True)
class SpeedPrediction:
    """What is predicted of one speed, seconds per output token of a request; NaN where not answered.

    Attributes:
        id: The speed's name.
        token_s: As expected.
        low: What nine of ten servers exceed, with `high`.
        high: What nine of ten servers stay below.
        base_s: The same server and load without LoRA.
        reason: Why it is not answered; empty otherwise.
    """

    id: str
    token_s: float = math.nan
    low: float = math.nan
    high: float = math.nan
    base_s: float = math.nan
    reason: str = ""

    def to_json(self, speed: Speed) -> dict[str, Any]:
        """Return the row of `validate --speeds`; what is not known is null."""
        seconds = {"tpot_ms": self.token_s, "measured_tpot_ms": speed.measured_s, "low": self.low, "high": self.high}
        seconds["without_lora_tpot_ms"] = self.base_s
        shown = {name: None if math.isnan(value) else round(1e3 * value, 3) for name, value in seconds.items()}
        return {"id": self.id, **shown, "load_told": speed.tells_load, "reason": self.reason}


class Loads:
    """Speeds whose servers are known, as arrays ``[speeds]``."""

    def __init__(self, speeds: Sequence[tuple[Speed, Target]]) -> None:
        """Lay out speeds with their targets."""
        self.targets = [target for _, target in speeds]
        rows = [_load(speed, target) for speed, target in speeds]
        self.columns = {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}

    def token_s(
        self, coefficients: Iterable[Mapping[str, float]], *, lora: bool, more_running: float = 1.0
    ) -> Float[np.ndarray, " speeds"]:
        """Return the times per output token by coefficients of each target.

        Args:
            coefficients: Of each target, by name.
            lora: With what LoRA adds where it is on; otherwise of the base model alone.
            more_running: Factor of the requests in flight.
        """
        costs = _stacked(self.targets, list(coefficients))
        columns = self.columns | {"concurrency": self.columns["concurrency"] * np.float32(more_running)}
        if not lora:
            columns["lora"] = np.zeros_like(columns["lora"])
        return np.asarray(_token_s(costs, columns), np.float64)


def _load(speed: Speed, target: Target) -> dict[str, float]:
    told = speed.server.settings
    slots = told.get("max_loras", _SLOTS)
    most = told.get("max_num_seqs", target.behaviour.batch_budget(target.processor.gpu).max_num_seqs)
    rate = 0.0 if math.isnan(speed.request_rate_per_s) else speed.request_rate_per_s
    concurrency = speed.concurrency
    if math.isnan(concurrency):
        concurrency = 0.0 if rate else _CONCURRENCY
    return {
        "concurrency": min(concurrency, most),  # 0: by the rate
        "rate": rate,
        "most": most,
        "prompt": _or(speed.input_tokens, _INPUT_TOKENS),
        "answer": _or(speed.output_tokens, _OUTPUT_TOKENS),
        "lora": float(speed.server.lora),
        "adapters": _or(speed.adapters, min(_ADAPTERS, slots)),
        "slots": slots,
        "rank": told.get("max_lora_rank", _RANK),
    }


@jax.jit
def _token_s(costs: Costs, load: Mapping[str, Array]) -> Array:
    """Time between two tokens of a request."""

    def at(running: Array) -> Array:
        held = running * (load["prompt"] + 0.5 * load["answer"])
        bare_s = bare_step_time_s(costs, sequences=running, kv_tokens=held)
        lora_s = step_time_s(
            costs,
            tokens=running,
            prefill_tokens=0.0,
            kv_tokens=held,
            adapters=jnp.minimum(load["adapters"], running),
            skipped=0.0,
            queued=0.0,
            loaded=load["adapters"],
            max_loras=load["slots"],
            max_lora_rank=load["rank"],
        )
        # Meanwhile each of the others answers, and so prefills its next prompt, every so many tokens.
        prompts = jnp.maximum(running - 1.0, 0.0) / load["answer"]
        costs_of_one = bare_step_time_s(costs, sequences=running + load["prompt"], kv_tokens=held) - bare_s
        costs_of_one += load["prompt"] * costs.step.prefill_token_s
        return jnp.where(load["lora"] > 0, lora_s, bare_s) + prompts * costs_of_one

    def by_rate(_: int, running: Array) -> Array:  # Little's law
        return jnp.clip(jnp.sqrt(running * load["rate"] * load["answer"] * at(running)), 1.0, load["most"])

    found = jax.lax.fori_loop(0, _ROUNDS, by_rate, jnp.ones_like(load["rate"]))
    return at(jnp.where(load["concurrency"] > 0, load["concurrency"], found))


def _stacked(targets: Sequence[Target], coefficients: Sequence[Mapping[str, float]]) -> Costs:
    """Return costs whose leaves are ``[targets]``."""
    names = {name for each in coefficients for name in each}
    columns = {name: np.array([each.get(name, 0.0) for each in coefficients], np.float32) for name in names}

    def stack(values: Iterable[Any]) -> Float[np.ndarray, " targets"]:
        return np.array(list(values), np.float32)

    kernels = [target.kernels for target in targets]
    grids = LoraKernels(
        layers=stack(each.layers for each in kernels),
        expand_tiles=stack(each.expand_tiles for each in kernels),
        shrink_slices=stack(each.shrink_slices for each in kernels),
    )
    # One expert that costs nothing where there are none.
    experts = ExpertRouting(
        stack(max(target.model.num_experts, 1) for target in targets),
        stack(target.model.experts_per_token for target in targets),
    )
    return Costs.of_values(columns, grids, experts)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else float(value)


def known_target(speed: Speed) -> Target:
    """Return model, GPU, layout and version of a speed's server.

    Raises:
        InputError: If one of them is not known or supported.
    """
    if not speed.gpus_told:
        raise InputError(f"{speed.id}: num_gpus_tp", None, "the number of GPUs")
    server = speed.server
    target = Target(server.shape, speed.processor, server.deployment, server.behaviour)
    target.coefficients(Efficiencies.first_guess().values)  # what cannot be laid out is refused here
    return target


def predict_speeds(
    speeds: Sequence[Speed], efficiencies: Efficiencies, measured: Sequence[Calibration] = ()
) -> list[SpeedPrediction]:
    """Predict speeds; what is not supported is told as the reason.

    Args:
        speeds: The speeds.
        efficiencies: What GPUs reach of their data sheets.
        measured: Measured calibrations that correct what follows from these.
    """
    answered: list[tuple[Speed, Target]] = []
    reasons: dict[int, str] = {}
    for row, speed in enumerate(speeds):
        try:
            answered.append((speed, known_target(speed)))
        except InputError as error:
            reasons[row] = str(error)
    found = iter(_predicted(answered, efficiencies, measured) if answered else ())
    return [
        SpeedPrediction(speed.id, reason=reasons[row]) if row in reasons else next(found)
        for row, speed in enumerate(speeds)
    ]


def _predicted(
    speeds: Sequence[tuple[Speed, Target]], efficiencies: Efficiencies, measured: Sequence[Calibration]
) -> list[SpeedPrediction]:
    loads = Loads(speeds)
    derived = [derive_coefficients(target, efficiencies, measured) for target in loads.targets]
    token_s = loads.token_s([each.values for each in derived], lora=True)
    base_s = loads.token_s([each.values for each in derived], lora=False)
    variance = _variance(loads, derived, token_s) + efficiencies.step_spread**2
    untold = np.array([not speed.tells_load for speed, _ in speeds])
    spread = NINE_OF_TEN * np.sqrt(variance + np.where(untold, _untold_variance(loads, derived, token_s), 0.0))
    return [
        SpeedPrediction(
            speed.id, token_s[row], token_s[row] * np.exp(-spread[row]), token_s[row] * np.exp(spread[row]), base_s[row]
        )
        for row, (speed, _) in enumerate(speeds)
    ]


def _variance(
    loads: Loads, derived: Sequence[LogNormal], token_s: Float[np.ndarray, " speeds"]
) -> Float[np.ndarray, " speeds"]:
    """Variance of the logarithms by the coefficients' distributions."""
    step = 1e-2  # of a logarithm: single precision tells less of smaller ones
    names = list(dict.fromkeys(name for each in derived for name in each.names))
    slopes = np.zeros((len(derived), len(names)))
    for column, name in enumerate(names):
        moved = [
            {**each.values, name: each.values[name] * math.exp(step)} if name in each.names else each.values
            for each in derived
        ]
        slopes[:, column] = np.log(loads.token_s(moved, lora=True) / token_s) / step
    found = []
    for row, each in zip(slopes, derived, strict=True):
        own = row[[names.index(name) for name in each.names]]
        found.append(own @ each.covariance @ own)
    return np.array(found)


def _untold_variance(
    loads: Loads, derived: Sequence[LogNormal], token_s: Float[np.ndarray, " speeds"]
) -> Float[np.ndarray, " speeds"]:
    """Variance of the logarithms by how many requests may have been in flight."""
    busier_s = loads.token_s([each.values for each in derived], lora=True, more_running=math.exp(_LOAD_SPREAD))
    return np.asarray(np.log(busier_s / token_s) ** 2)


def score_speeds(speeds: Sequence[Speed], predicted: Sequence[SpeedPrediction]) -> dict[str, Any]:
    """Return how well speeds are predicted: over all answered, by whether the load is told, by GPU, with LoRA.

    Args:
        speeds: The speeds.
        predicted: What is predicted of each, in the same order.
    """
    rows = [
        (speed, each)
        for speed, each in zip(speeds, predicted, strict=True)
        if not math.isnan(each.token_s) and not math.isnan(speed.measured_s)
    ]
    kinds = {
        "load_told": [row for row in rows if row[0].tells_load],
        "load_not_told": [row for row in rows if not row[0].tells_load],
        "lora": [row for row in rows if row[0].server.lora],
    }
    gpus = sorted({speed.server.gpu_kind for speed, _ in rows})
    kinds |= {f"gpu {name}": [row for row in rows if row[0].server.gpu_kind == name] for name in gpus}
    return {"all": _score(rows)} | {name: _score(each) for name, each in kinds.items()}


def _score(rows: Sequence[tuple[Speed, SpeedPrediction]]) -> dict[str, Any]:
    if not rows:
        return {"rows": 0}
    error = np.array([abs(each.token_s / speed.measured_s - 1.0) for speed, each in rows])
    inside = [each.low <= speed.measured_s <= each.high for speed, each in rows]
    return {
        "rows": len(rows),
        "median_error": float(np.median(error)),
        "within_15": float(np.mean(error <= _CLOSE)),
        "within_35": float(np.mean(error <= _NEAR)),
        "in_interval": float(np.mean(inside)),
    }
