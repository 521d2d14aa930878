"""A differentiable surrogate: throughput and margin to starvation as smooth functions of workload, server, A and S.

The closed form of the server at its limit (`closed.at_limit`) carries the physics; two small networks learn what it
leaves out: how much of that load is sustained, and what becomes of it beyond. Throughput is a smooth minimum of the
offered load and the capacity, so that its derivatives are right on either side of the bend between them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jax import Array

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs
from lora_capacity.errors import InputError
from lora_capacity.memory import slot_bytes
from lora_capacity.surrogate.closed import at_limit
from lora_capacity.surrogate.dataset import Labels, digest
from lora_capacity.surrogate.questions import Questions
from lora_capacity.surrogate.targets import sustained_by_slots

SCHEMA_VERSION = 1
_TRAVERSE: Any = traverse_util  # untyped
_HIDDEN = 48
_STEPS, _BATCH, _RATE, _DECAY = 4000, 1024, 4e-3, 1e-5
_POINTS = 48
_BEND_START = 12.0
_NEEDED = 0.9


@struct.dataclass
class SmoothInputs:
    """What the smooth surrogate is a function of; leaves ``[…]`` that broadcast, but for ``rates_per_s``.

    Attributes:
        rates_per_s: Requests per second of the adapters of a turn, largest first, ``[turn, …]``.
        base_rate_per_s: Requests per second without an adapter.
        mean_input_tokens: Mean prompt length.
        mean_output_tokens: Mean answer length.
        output_spread: Standard deviation of the answer length over its mean.
        kv_tokens_per_request: Tokens that a running request holds.
        kv_cache_tokens: Tokens that the KV cache would hold beside no slots.
        slot_tokens_per_rank: KV tokens that a slot takes the place of, per unit of ``max_lora_rank``.
        max_lora_rank: Rank that slots are reserved for.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_pending: Most unanswered requests.
        adapters: Adapters, A.
        max_loras: Slots, S.
    """

    rates_per_s: Array
    base_rate_per_s: Array
    mean_input_tokens: Array
    mean_output_tokens: Array
    output_spread: Array
    kv_tokens_per_request: Array
    kv_cache_tokens: Array
    slot_tokens_per_rank: Array
    max_lora_rank: Array
    max_num_seqs: Array
    max_num_batched_tokens: Array
    max_pending: Array
    adapters: Array
    max_loras: Array

    @classmethod
    def of(cls, calibration: Calibration, questions: Questions, adapters: Any, max_loras: Any) -> Self:
        """Return the inputs of questions with numbers of adapters and slots, ``[questions]`` each."""
        count = np.ones(len(questions), np.int64)
        rank = questions.max_lora_rank(np.full(len(questions), questions.ranks.shape[1]), calibration)
        with_one, _ = questions.plan(calibration, count, rank)
        per_rank = (
            slot_bytes(calibration.model, calibration.behaviour, rank) / rank / calibration.model.kv_bytes_per_token
        )
        names = ("base_rate_per_s", "mean_input_tokens", "mean_output_tokens", "output_spread", "kv_tokens_per_request")
        columns = {name: getattr(questions, name) for name in (*names, "max_num_seqs", "max_num_batched_tokens")}
        columns |= {
            "rates_per_s": -np.sort(-questions.rates_per_s, axis=1).T,
            "max_pending": np.minimum(questions.max_pending, 1e9),
            "kv_cache_tokens": with_one + per_rank * rank,
            "slot_tokens_per_rank": per_rank,
            "max_lora_rank": rank,
            "adapters": adapters,
            "max_loras": max_loras,
        }
        leaves: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in columns.items()}
        return cls(**leaves)


@struct.dataclass
class SmoothOutputs:
    """What the smooth surrogate says; leaves ``[…]``.

    Attributes:
        throughput_tokens_per_s: Tokens per second of completed requests.
        offered_tokens_per_s: Tokens per second that arrive.
        margin: Logarithm of the factor of the load at which the server starves; negative where it does.
    """

    throughput_tokens_per_s: Array
    offered_tokens_per_s: Array
    margin: Array


class _Network(nn.Module):
    """Two hidden layers; what it says is 0 to begin with."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        for _ in range(2):
            z = nn.tanh(nn.Dense(_HIDDEN)(z))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(z)[..., 0]


def _said(params: Any, z: Array) -> Array:
    said: Any = _Network().apply(params, z)
    return jnp.asarray(said)


def _physics(costs: Costs, inputs: SmoothInputs) -> tuple[Array, Array]:
    """Load at the limit, and the terms that the corrections depend on, ``[…, terms]``."""
    left = inputs.kv_cache_tokens - inputs.max_loras * inputs.max_lora_rank * inputs.slot_tokens_per_rank
    limit = at_limit(
        costs,
        rates_per_s=inputs.rates_per_s,
        base_rate_per_s=inputs.base_rate_per_s,
        mean_input_tokens=inputs.mean_input_tokens,
        mean_output_tokens=inputs.mean_output_tokens,
        kv_tokens_per_request=inputs.kv_tokens_per_request,
        kv_cache_tokens=jnp.maximum(left, inputs.kv_tokens_per_request),
        max_num_seqs=inputs.max_num_seqs,
        max_num_batched_tokens=inputs.max_num_batched_tokens,
        max_pending=inputs.max_pending,
        max_loras=inputs.max_loras,
        max_lora_rank=inputs.max_lora_rank,
    )
    stay_s = limit.step_s * inputs.mean_output_tokens
    mean_rate = inputs.rates_per_s.mean(axis=0)
    slots = inputs.max_loras
    terms = [
        slots,
        limit.busy_adapters / slots,
        limit.running / slots,
        limit.running,
        stay_s,
        limit.kv_share,
        *(rate * stay_s for rate in inputs.rates_per_s),
        (limit.load_per_s - jnp.minimum(inputs.base_rate_per_s, 0.9 * limit.load_per_s)) / mean_rate,
        limit.load_per_s,
        inputs.mean_output_tokens,
        inputs.mean_input_tokens,
        inputs.max_lora_rank,
        1.0 + inputs.base_rate_per_s / limit.load_per_s,
        1.0 + inputs.output_spread,
    ]
    shape = jnp.broadcast_shapes(*(jnp.shape(term) for term in terms))
    logs = [jnp.broadcast_to(jnp.log(jnp.maximum(term, 1e-6)), shape) for term in terms]
    return limit.load_per_s, jnp.stack(logs, axis=-1)


@dataclass(frozen=True, eq=False)
class Smooth:
    """A trained smooth surrogate.

    Attributes:
        calibration: Name of the calibration.
        params: Networks' weights, a pytree: ``sustained``, ``beyond`` and ``bend``.
        mean: Mean of each term over the training, ``[terms]``.
        scale: Standard deviation of each, ``[terms]``.
        scores: On held-back workloads: mean absolute log errors of throughput and margin.
    """

    calibration: str
    params: Any
    mean: Array
    scale: Array
    scores: Mapping[str, float]

    def predict(self, costs: Costs, inputs: SmoothInputs) -> SmoothOutputs:
        """Predict; pure, smooth in every floating-point input, to be jitted and differentiated.

        Args:
            costs: The calibration's.
            inputs: Workloads, servers, adapters and slots.
        """
        return _predict(self.params, self.mean, self.scale, costs, inputs)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        flat = _TRAVERSE.flatten_dict(self.params, sep="/")
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "smooth": self.calibration,
            "params": {name: _listed(value) for name, value in flat.items()},
            "mean": _listed(self.mean),
            "scale": _listed(self.scale),
            "scores": dict(self.scores),
        }
        return content | {"digest": digest(content)}

    @classmethod
    def from_json(cls, content: object, source: str = "smooth surrogate") -> Self:
        """Rebuild what `to_json` wrote.

        Raises:
            InputError: If it is no smooth surrogate of this schema, or was changed since it was written.
        """
        if not isinstance(content, Mapping) or "smooth" not in content:
            raise InputError(source, "another document", "a smooth surrogate")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{source}: schema_version", content.get("schema_version"), f"{SCHEMA_VERSION}", "train again"
            )
        whole = {name: value for name, value in content.items() if name != "digest"}
        if content.get("digest") != digest(whole):
            raise InputError(
                f"{source}: digest", content.get("digest"), "that of its content", "it was changed: train again"
            )
        arrays = {name: jnp.asarray(np.array(value, np.float32)) for name, value in whole["params"].items()}
        params = _TRAVERSE.unflatten_dict(arrays, sep="/")
        mean, scale = (jnp.asarray(np.array(whole[name], np.float32)) for name in ("mean", "scale"))
        return cls(whole["smooth"], params, mean, scale, whole["scores"])

    def write(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_text(json.dumps(self.to_json(), separators=(",", ":")) + "\n", encoding="utf-8")


def _listed(values: Any) -> Any:
    return np.vectorize(lambda number: float(f"{number:.6g}"), otypes=[float])(np.asarray(values)).tolist()


def _predict(params: Any, mean: Array, scale: Array, costs: Costs, inputs: SmoothInputs) -> SmoothOutputs:
    reach, terms = _physics(costs, inputs)
    z = (terms - mean) / scale
    log_sustained = jnp.log(reach) + _said(params["sustained"], z)
    offered = inputs.adapters * inputs.rates_per_s.mean(axis=0) + inputs.base_rate_per_s
    margin = log_sustained - jnp.log(offered)
    over = jnp.concatenate([z, jnp.tanh(-margin)[..., jnp.newaxis]], axis=-1)
    log_capacity = log_sustained + jnp.log(_NEEDED) + _said(params["beyond"], over)
    bend = 1.0 + jax.nn.softplus(params["bend"])
    # (offered^-p + capacity^-p)^(-1/p), without overflow
    log_throughput = jnp.log(offered) - jax.nn.softplus(bend * (jnp.log(offered) - log_capacity)) / bend
    tokens = inputs.mean_input_tokens + inputs.mean_output_tokens
    return SmoothOutputs(jnp.exp(log_throughput) * tokens, offered * tokens, margin)


def train_smooth(calibration: Calibration, labels: Labels, *, seed: int = 0, steps: int = _STEPS) -> Smooth:
    """Train a smooth surrogate on the surfaces of labels; 15 % of the workloads are held back for the scores.

    Args:
        calibration: The labels' own.
        labels: Labels of feasible workloads.
        seed: Decides weights, points and what is held back.
        steps: Steps of the optimizer.
    """
    labels = labels.take(np.flatnonzero(labels.optima.max_loras > 0))
    rng = np.random.default_rng(seed)
    inputs, throughput, margin, question = _points(calibration, labels, rng)
    held = np.isin(question, rng.permutation(len(labels))[: max(int(0.15 * len(labels)), 1)])
    costs = calibration.costs
    _, terms = jax.jit(_physics)(costs, inputs)
    mean, scale = terms[~held].mean(axis=0), terms[~held].std(axis=0) + 1e-3
    width = mean.size
    first, second = jax.random.split(jax.random.PRNGKey(seed))
    params: Any = {
        "sustained": _Network().init(first, jnp.zeros((1, width))),
        "beyond": _Network().init(second, jnp.zeros((1, width + 1))),
        "bend": jnp.asarray(_BEND_START),
    }
    schedule = optax.cosine_decay_schedule(_RATE, steps)
    optimizer = optax.adamw(schedule, weight_decay=_DECAY)

    def loss(params: Any, batch: SmoothInputs, log_t: Array, log_margin: Array) -> Array:
        found = _predict(params, mean, scale, costs, batch)
        off = jnp.log(found.throughput_tokens_per_s) - log_t
        near = jnp.isfinite(log_margin)
        missed = jnp.where(near, found.margin - jnp.where(near, log_margin, 0.0), 0.0)
        return jnp.mean(_robust(off)) + jnp.mean(_robust(missed))

    @jax.jit
    def step(params: Any, state: Any, rows: Array) -> tuple[Any, Any]:
        batch, log_t, log_margin = jax.tree.map(lambda values: values[..., rows], (inputs, throughput, margin))
        updates, state = optimizer.update(jax.grad(loss)(params, batch, log_t, log_margin), state, params)
        return optax.apply_updates(params, updates), state

    state, kept = optimizer.init(params), np.flatnonzero(~held)
    inputs, throughput, margin = jax.tree.map(jnp.asarray, (inputs, throughput, margin))
    for _ in range(steps):
        params, state = step(params, state, jnp.asarray(rng.choice(kept, _BATCH)))
    rows = np.flatnonzero(held)
    batch, log_t, log_margin = jax.tree.map(lambda values: values[..., rows], (inputs, throughput, margin))
    found = jax.jit(_predict)(params, mean, scale, costs, batch)
    scores = {
        "throughput_log_error": float(jnp.mean(jnp.abs(jnp.log(found.throughput_tokens_per_s) - log_t))),
        "margin_log_error": float(
            jnp.nanmean(jnp.abs(jnp.where(jnp.isfinite(log_margin), found.margin - log_margin, jnp.nan)))
        ),
    }
    return Smooth(calibration.name, params, mean, scale, scores)


def _robust(off: Array) -> Array:
    """Square of small errors, size of large ones: the twin's few jumps are not worth bending everything for."""
    return jnp.asarray(optax.losses.huber_loss(off, delta=0.05)) / 0.05


def _points(calibration: Calibration, labels: Labels, rng: np.random.Generator) -> Any:
    """Configurations of the surfaces: inputs, log throughput, log margin (the steady twin's), and whose they are."""
    around = labels.surfaces
    question, row, column = np.nonzero(~np.isnan(around.grid_throughput))
    order = rng.permutation(question.size)[: _POINTS * len(labels)]
    question, row, column = question[order], row[order], column[order]
    adapters, slots = around.grid_adapters[question, row], around.grid_slots[question, column]
    inputs = SmoothInputs.of(calibration, labels.questions.take(question), adapters, slots)
    sustained = sustained_by_slots(labels, around.grid_slots)[question, column]
    corrected = np.take_along_axis(labels.correction, _place(around.slots, around.grid_slots), axis=1)[question, column]
    offered = np.log(labels.questions.take(question).offered_per_s(adapters))
    throughput = np.log(around.grid_throughput[question, row, column]).astype(np.float32)
    return inputs, throughput, (sustained - corrected - offered).astype(np.float32), question


def _place(known: Any, wanted: Any) -> Any:
    place = np.stack([np.searchsorted(row, each) for row, each in zip(known, wanted, strict=True)])
    return np.minimum(place, known.shape[1] - 1)
