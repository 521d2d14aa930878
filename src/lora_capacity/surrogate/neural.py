"""Neural surrogate: throughput and margin to starvation as smooth functions of workload, server, A and S.

The closed form of the full batch (`closed_form.full_batch`) carries the physics; two small networks learn what it
leaves out: how much of that load is sustained, and what becomes of it beyond. Throughput is a smooth minimum of the
offered load and the capacity, so that its derivatives are right on either side of the bend between them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jax import Array
from jaxtyping import Float

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs
from lora_capacity.errors import InputError
from lora_capacity.scenarios.workload_batch import FloatArray, WorkloadBatch
from lora_capacity.schema import JsonModel, Number, Numbers, validated
from lora_capacity.surrogate.closed_form import SurrogateInputs, full_batch
from lora_capacity.surrogate.dataset import Dataset
from lora_capacity.surrogate.documents import LearntFile, listed
from lora_capacity.surrogate.optima import NEEDED
from lora_capacity.surrogate.space import BLOCK_TOKENS

SENSITIVITIES = ("rates", "slots", "adapters", "input_tokens", "output_tokens")
"""Quantities that `NeuralSurrogate.assess` differentiates by: all request rates, S, A, mean lengths."""

_TRAVERSE: Any = traverse_util  # untyped
_HIDDEN = 48
"""Units of a hidden layer: more did not lower the error on held-out workloads."""

STEPS, _BATCH, _RATE, _DECAY = 4000, 1024, 4e-3, 1e-5
"""Steps of AdamW, points of each, its first learning rate (cosine decay follows) and its weight decay."""

_POINTS = 48
"""Points trained on per workload, of the 400 of its surface: neighbours tell much the same."""

_BEND_START = 12.0
"""Sharpness of the smooth minimum to begin with: it differs from the minimum within about a twelfth of the load."""

_ROBUST = 0.05
"""Logarithmic error from which on the size counts instead of the square."""

_HELD_OUT = 0.15
"""Share of the workloads that is held out for the scores."""

_OTHER_TERMS = 13
"""Terms of the networks besides one for each rate of the round."""

_LEAST = 1e-6
"""Floor under the logarithm of a term."""

_MOST_BASE = 0.9
"""Most of the full load that the base model's traffic counts for, lest no adapter be left to speak of."""


@struct.dataclass
class NeuralOutputs:
    """Prediction of the neural surrogate; leaves ``[…]``.

    Attributes:
        throughput_tokens_per_s: Tokens per second of completed requests.
        offered_tokens_per_s: Tokens per second that arrive.
        margin: Logarithm of the factor of the load at which the server starves; negative where it does.
    """

    throughput_tokens_per_s: Array
    offered_tokens_per_s: Array
    margin: Array


class _Network(nn.Module):
    """Two hidden layers; the output is 0 to begin with."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        for _ in range(2):
            z = nn.tanh(nn.Dense(_HIDDEN)(z))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(z)[..., 0]


def _apply(params: Any, z: Float[Array | np.ndarray, "*shape terms"]) -> Float[Array, "*shape"]:
    found: Any = _Network().apply(params, z)
    return jnp.asarray(found)


def _physics(costs: Costs, inputs: SurrogateInputs) -> tuple[Array, Array]:
    """Load of the full batch, and the terms that the corrections depend on, ``[…, terms]``."""
    left = inputs.kv_cache_tokens - inputs.max_loras * inputs.max_lora_rank * inputs.slot_tokens_per_rank
    full = full_batch(costs, inputs, jnp.maximum(left, inputs.kv_tokens_per_request))
    residence_s = full.step_s * inputs.mean_output_tokens
    slots, load = inputs.max_loras, full.load_per_s
    terms = [
        slots,
        full.busy_adapters / slots,
        full.running / slots,
        full.running,
        residence_s,
        full.kv_share,
        *(rate * residence_s for rate in -jnp.sort(-inputs.rates_per_s, axis=0)),  # largest first
        (load - jnp.minimum(inputs.base_rate_per_s, _MOST_BASE * load)) / inputs.rates_per_s.mean(axis=0),
        load,
        inputs.mean_output_tokens,
        inputs.mean_input_tokens,
        inputs.max_lora_rank,
        1.0 + inputs.base_rate_per_s / load,
        1.0 + inputs.output_spread,
    ]
    shape = jnp.broadcast_shapes(*(jnp.shape(term) for term in terms))
    logs = [jnp.broadcast_to(jnp.log(jnp.maximum(term, _LEAST)), shape) for term in terms]
    return jnp.asarray(load), jnp.stack(logs, axis=-1)


@dataclass(frozen=True, eq=False)
class NeuralSurrogate(LearntFile):
    """A trained neural surrogate.

    Attributes:
        calibration: Name of the calibration.
        params: Networks' weights, a pytree: ``sustained``, ``beyond`` and ``bend``.
        mean: Mean of each term over the training, ``[terms]``.
        scale: Standard deviation of each, ``[terms]``.
        scores: On held-out workloads: mean absolute log errors of throughput and margin.
    """

    kind = "smooth surrogate"
    key = "smooth"
    command = "train --smooth"

    calibration: str
    params: Any
    mean: Array
    scale: Array
    scores: Mapping[str, float]

    def predict(self, costs: Costs, inputs: SurrogateInputs) -> NeuralOutputs:
        """Predict; pure, smooth in every floating-point input, to be jitted and differentiated.

        A round of another length than those trained on is told by as many means of its sorted rates.

        Args:
            costs: The calibration's.
            inputs: Workloads, servers, adapters and slots.
        """
        size = self.mean.size - _OTHER_TERMS
        if len(inputs.rates_per_s) != size:
            inputs = inputs.replace(rates_per_s=_resampled(inputs.rates_per_s, size))  # type: ignore[attr-defined]
        return _predict(self.params, self.mean, self.scale, costs, inputs)

    def assess(
        self, calibration: Calibration, workload: WorkloadBatch, adapters: int, max_loras: int
    ) -> dict[str, Any]:
        """Predict one configuration with its sensitivities.

        Args:
            calibration: The surrogate's own.
            workload: One workload on its server.
            adapters: A.
            max_loras: S, from 1 to A.

        Returns:
            ``max_cpu_loras``, ``max_loras``, ``throughput_tokens_per_s``, ``offered_tokens_per_s``, ``margin`` and
            ``sensitivities``: by name of `SENSITIVITIES` the derivatives of the logarithm of the throughput
            (``log_throughput``) and of the margin by the logarithm of the quantity.

        Raises:
            InputError: If the surrogate is of another calibration, or there are more slots than adapters.
        """
        if self.calibration != calibration.name:
            raise InputError("smooth surrogate", f"of {self.calibration}", f"one of {calibration.name}", "train again")
        if not 1 <= max_loras <= adapters:
            raise InputError("max_loras", max_loras, f"1 to the number of adapters served, {adapters}")
        inputs = SurrogateInputs.of(calibration, workload, [adapters], [max_loras])

        def outputs(nudges: dict[str, Array]) -> tuple[Array, NeuralOutputs]:
            found = self.predict(calibration.costs, _nudged(inputs, nudges))
            return jnp.stack([jnp.log(found.throughput_tokens_per_s[0]), found.margin[0]]), found

        none = {name: jnp.zeros(()) for name in SENSITIVITIES}
        slopes, found = jax.jacfwd(outputs, has_aux=True)(none)
        return {
            "max_cpu_loras": adapters,
            "max_loras": max_loras,
            **{name: float(value[0]) for name, value in vars(found).items()},
            "sensitivities": {
                name: dict(zip(("log_throughput", "margin"), slopes[name].tolist(), strict=True))
                for name in SENSITIVITIES
            },
        }

    def content(self) -> dict[str, Any]:
        """Return what stands in the file besides version and digest."""
        flat = _TRAVERSE.flatten_dict(self.params, sep="/")
        return {
            "smooth": self.calibration,
            "params": {name: listed(value, digits=6) for name, value in flat.items()},
            "mean": listed(self.mean, digits=6),
            "scale": listed(self.scale, digits=6),
            "scores": dict(self.scores),
        }

    @classmethod
    def from_content(cls, content: dict[str, Any], source: str) -> Self:
        """Rebuild what `content` returned.

        Raises:
            InputError: If a key is missing or unknown, or arrays do not go together.
        """
        given = validated(_NeuralFile, content, f"{source}:")
        width = given.mean.size
        wanted = jax.eval_shape(lambda: _start(jax.random.PRNGKey(0), width))
        shapes = {name: each.shape for name, each in _TRAVERSE.flatten_dict(wanted, sep="/").items()}
        arrays = {name: _array(f"{source}: params.{name}", value) for name, value in given.params.items()}
        if width <= _OTHER_TERMS or {name: each.shape for name, each in arrays.items()} != shapes:
            raise InputError(f"{source}: params", "arrays of other shapes", "those of one neural surrogate")
        if given.scale.size != width:
            raise InputError(f"{source}: scale", f"{given.scale.size} numbers", f"{width}, one a term")
        params = _TRAVERSE.unflatten_dict({name: jnp.asarray(each) for name, each in arrays.items()}, sep="/")
        mean, scale = (jnp.asarray(each, jnp.float32) for each in (given.mean, given.scale))
        return cls(given.smooth, params, mean, scale, given.scores)


class _NeuralFile(JsonModel):
    """What stands in the file of a neural surrogate besides version and digest."""

    smooth: str
    params: dict[str, Any]
    mean: Annotated[FloatArray, Numbers(Number())]
    scale: Annotated[FloatArray, Numbers(Number(minimum=0, exclusive=True))]
    scores: dict[str, Annotated[float, Number()]]


def _array(field: str, values: object) -> np.ndarray:
    """Return finite numbers as a float32 array."""
    try:
        array = np.array(values, np.float32)
    except (ValueError, TypeError):
        array = np.array(np.nan)
    if not np.all(np.isfinite(array)):
        raise InputError(field, "other values", "an array of finite numbers")
    return array


def _start(key: Array, width: int) -> dict[str, Any]:
    """Return parameters before training, for so many terms."""
    first, second = jax.random.split(key)
    return {
        "sustained": _Network().init(first, jnp.zeros((1, width))),
        "beyond": _Network().init(second, jnp.zeros((1, width + 1))),
        "bend": jnp.asarray(_BEND_START),
    }


def _resampled(rates: Float[Array | np.ndarray, "round ..."], size: int) -> Float[Array, "size ..."]:
    """Means of equal parts of the sorted rates; the mean of all stays."""
    ordered = jnp.repeat(-jnp.sort(-jnp.asarray(rates), axis=0), size, axis=0)
    return ordered.reshape(size, len(rates), *rates.shape[1:]).mean(axis=1)


def _nudged(inputs: SurrogateInputs, nudges: Mapping[str, Array]) -> SurrogateInputs:
    """Scale quantities by the exponentials of nudges; the KV cache that requests hold follows their lengths."""
    factor = {name: jnp.exp(nudge) for name, nudge in nudges.items()}
    unfilled = 0.5 * BLOCK_TOKENS
    of_output = 0.5 * inputs.mean_output_tokens * (1.0 + inputs.output_spread**2)
    of_input = inputs.kv_tokens_per_request - of_output - unfilled
    changed: SurrogateInputs = inputs.replace(  # type: ignore[attr-defined]
        rates_per_s=inputs.rates_per_s * factor["rates"],
        base_rate_per_s=inputs.base_rate_per_s * factor["rates"],
        max_loras=inputs.max_loras * factor["slots"],
        adapters=inputs.adapters * factor["adapters"],
        mean_input_tokens=inputs.mean_input_tokens * factor["input_tokens"],
        mean_output_tokens=inputs.mean_output_tokens * factor["output_tokens"],
        kv_tokens_per_request=of_input * factor["input_tokens"] + of_output * factor["output_tokens"] + unfilled,
    )
    return changed


def _predict(params: Any, mean: Array, scale: Array, costs: Costs, inputs: SurrogateInputs) -> NeuralOutputs:
    reach, terms = _physics(costs, inputs)
    z = (terms - mean) / scale
    log_sustained = jnp.log(reach) + _apply(params["sustained"], z)
    offered = inputs.adapters * inputs.rates_per_s.mean(axis=0) + inputs.base_rate_per_s
    margin = log_sustained - jnp.log(offered)
    over = jnp.concatenate([z, jnp.tanh(-margin)[..., jnp.newaxis]], axis=-1)
    log_capacity = log_sustained + jnp.log(NEEDED) + _apply(params["beyond"], over)
    bend = 1.0 + jax.nn.softplus(params["bend"])
    # (offered^-p + capacity^-p)^(-1/p), without overflow
    log_throughput = jnp.log(offered) - jax.nn.softplus(bend * (jnp.log(offered) - log_capacity)) / bend
    tokens = inputs.mean_input_tokens + inputs.mean_output_tokens
    return NeuralOutputs(jnp.exp(log_throughput) * tokens, offered * tokens, margin)


def train_neural(
    calibration: Calibration, labels: Dataset, *, seed: int = 0, steps: int | None = None
) -> NeuralSurrogate:
    """Train a neural surrogate on the surfaces of labels; 15 % of the workloads are held out for the scores.

    Args:
        calibration: The labels' own.
        labels: Labels; infeasible workloads take no part.
        seed: Decides weights, points and what is held out.
        steps: Steps of the optimizer, `STEPS` if not given.
    """
    steps = STEPS if steps is None else steps
    labels = labels.take(np.flatnonzero(labels.optima.max_loras > 0))
    rng = np.random.default_rng(seed)
    inputs, log_throughput, log_margin, workload = _points(calibration, labels, rng)
    held_out = np.isin(workload, rng.permutation(len(labels))[: max(int(_HELD_OUT * len(labels)), 1)])
    costs = calibration.costs
    _, terms = jax.jit(_physics)(costs, inputs)
    mean, scale = terms[~held_out].mean(axis=0), terms[~held_out].std(axis=0) + 1e-3
    params: Any = _start(jax.random.PRNGKey(seed), mean.size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(_RATE, steps), weight_decay=_DECAY)
    points = jax.tree.map(jnp.asarray, (inputs, log_throughput, log_margin))

    def errors(params: Any, rows: Array) -> tuple[Array, Array]:
        """Logarithmic errors of throughput and margin; NaN where the margin is unknown."""
        batch, log_t, log_m = jax.tree.map(lambda values: values[..., rows], points)
        found = _predict(params, mean, scale, costs, batch)
        near = jnp.isfinite(log_m)
        off = jnp.where(near, found.margin - jnp.where(near, log_m, 0.0), jnp.nan)
        return jnp.log(found.throughput_tokens_per_s) - log_t, off

    def loss(params: Any, rows: Array) -> Array:
        off, off_margin = errors(params, rows)
        return jnp.mean(_robust(off)) + jnp.mean(_robust(jnp.nan_to_num(off_margin)))

    @jax.jit
    def step(params: Any, state: Any, rows: Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    state, kept = optimizer.init(params), np.flatnonzero(~held_out)
    for _ in range(steps):
        params, state = step(params, state, jnp.asarray(rng.choice(kept, _BATCH)))
    off, off_margin = jax.jit(errors)(params, jnp.asarray(np.flatnonzero(held_out)))
    scores = {
        "throughput_log_error": float(jnp.mean(jnp.abs(off))),
        "margin_log_error": float(jnp.nanmean(jnp.abs(off_margin))),
    }
    return NeuralSurrogate(calibration.name, params, mean, scale, scores)


def _robust(off: Float[Array, " points"]) -> Float[Array, " points"]:
    """Square of small errors, size of large ones: the twin's few jumps are not worth bending everything for."""
    return jnp.asarray(optax.losses.huber_loss(off, delta=_ROBUST)) / _ROBUST


def _points(calibration: Calibration, labels: Dataset, rng: np.random.Generator) -> Any:
    """Configurations of the surfaces: inputs, log throughput, log margin (the steady twin's), and whose they are."""
    around = labels.surfaces
    workload, row, column = np.nonzero(~np.isnan(around.grid_throughput))
    order = rng.permutation(workload.size)[: _POINTS * len(labels)]
    workload, row, column = workload[order], row[order], column[order]
    adapters, slots = around.grid_adapters[workload, row], around.grid_slots[workload, column]
    asked = labels.workloads.take(workload)
    # The steady twin's own margin: the throughput beside it is not corrected either.
    sustained = labels.log_sustained(around.grid_slots, corrected=False)[workload, column]
    log_throughput = np.log(around.grid_throughput[workload, row, column]).astype(np.float32)
    log_margin = (sustained - np.log(asked.offered_per_s(adapters))).astype(np.float32)
    return SurrogateInputs.of(calibration, asked, adapters, slots), log_throughput, log_margin, workload
