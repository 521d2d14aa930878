"""What a simulation needs to know of a workload on a server, as arrays over configurations."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import Array
from numpy.typing import ArrayLike

from lora_capacity.calibration import Calibration, CalibrationLike, load_calibration
from lora_capacity.engines import ServerConfig
from lora_capacity.errors import InputError, check_number
from lora_capacity.schema import check_numeric
from lora_capacity.status import Status
from lora_capacity.workload import AdapterClasses, Goodput, Workload, WorkloadLike, load_workload

_VARYING = ("max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
_BLOCK_TOKENS = 16
"""Tokens of a KV block where none are asked for: vLLM's default on a GPU (``CacheConfig.block_size``)."""

_OF_LORA = ("adapters", "max_loras", "max_lora_rank")
"""Ranges of calibrations that say nothing of a server without LoRA."""

_FRACTIONS = ("gpu_memory_utilization",)


@struct.dataclass
class LatencyBounds:
    """Latencies that a request must keep to count as good, as clients see them; infinite where not bounded.

    Attributes:
        ttft_s: Longest time to first token, ``[configs]``.
        tpot_s: Longest mean time per output token after the first, ``[configs]``.
        e2el_s: Longest time to the last token, ``[configs]``.
    """

    ttft_s: Array
    tpot_s: Array
    e2el_s: Array

    def earlier(self, lead_s: Array) -> "LatencyBounds":
        """Return the bounds of what ends so much earlier than clients see it, ``[configs]``."""
        return LatencyBounds(self.ttft_s - lead_s, self.tpot_s, self.e2el_s - lead_s)

    @classmethod
    def of(cls, goodput: Goodput, configs: int) -> "LatencyBounds":
        """Return the same bounds for so many configurations."""
        bounds_s = (goodput.ttft_s, goodput.tpot_s, goodput.e2el_s)
        return cls(*(_leaf(np.full(configs, bound_s)) for bound_s in bounds_s))


@struct.dataclass
class Scenarios:
    """Configurations to simulate, each a server under a workload.

    Adapters of the same rate and rank form a class; requests to the base model need no slot. Padding classes have a
    count of 0.

    Attributes:
        class_count: Adapters of each class, ``[configs, classes]``.
        class_rate_per_s: Requests per second of one adapter of the class, ``[configs, classes]``.
        class_rank: Rank of the class's adapters, ``[configs, classes]``.
        base_rate_per_s: Requests per second to the base model, ``[configs]``.
        mean_input_tokens: Mean prompt length, ``[configs]``.
        mean_output_tokens: Mean tokens generated per request, ``[configs]``.
        kv_tokens_per_request: Mean tokens that a running request holds in the KV cache, over its stay in the batch,
            ``[configs]``.
        horizon_s: Time observed, from an empty server, ``[configs]``.
        max_pending: Most unanswered requests that the clients hold; infinite if unbounded, ``[configs]``.
        max_loras: Adapter slots, ``[configs]``; 0: a server without LoRA.
        max_lora_rank: Rank that the slots are reserved for, ``[configs]``.
        max_num_seqs: Most running requests, ``[configs]``.
        max_num_batched_tokens: Most tokens in a step, ``[configs]``.
        kv_cache_tokens: Tokens that the KV cache holds, ``[configs]``.
        block_size: Tokens of a KV block, int32 ``[configs]``.
        status: `Status` of the start-up, int32 ``[configs]``.
        bounds: Latencies that requests should keep; None: no bounds.
        arrival_cv: Coefficient of variation of the gaps between an adapter's requests, ``[configs]``; None: 1, as of
            Poisson arrivals.
        input_cv: That of the prompt lengths, ``[configs]``; None: 1, as of exponential lengths.
        class_shared_tokens: Mean tokens of a prompt to an adapter of each class that stand in whole blocks which its
            other prompts begin with too, ``[configs, classes]``; None: no prefix caching, or nothing to share.
        base_shared_tokens: The same of a prompt to the base model, ``[configs]``; None likewise.
        cached_share: Share of the prompts' tokens that the prefix cache is taken to hold, ``[configs]``; None: of none.
        max_cpu_loras: Adapters that host memory holds, those on the GPU included, ``[configs]``; None: all that are
            served.
        loaded_at_start: Whether all adapters were loaded once before the first request, in their order, bool
            ``[configs]``; None: each is as its first request comes.
        long_prefill_token_threshold: Most tokens that a prompt gets in a step, ``[configs]``; None: as many as the step
            has room for.
        max_num_active_seqs: Most running requests, where those may be fewer than ``max_num_seqs``, ``[configs]``; None:
            as many.
        watermark_blocks: KV blocks that an admission leaves free unless nothing runs, int32 ``[configs]``; None: none.
    """

    class_count: Array
    class_rate_per_s: Array
    class_rank: Array
    base_rate_per_s: Array
    mean_input_tokens: Array
    mean_output_tokens: Array
    kv_tokens_per_request: Array
    horizon_s: Array
    max_pending: Array
    max_loras: Array
    max_lora_rank: Array
    max_num_seqs: Array
    max_num_batched_tokens: Array
    kv_cache_tokens: Array
    block_size: Array
    status: Array
    bounds: LatencyBounds | None = None
    arrival_cv: Array | None = None
    input_cv: Array | None = None
    class_shared_tokens: Array | None = None
    base_shared_tokens: Array | None = None
    cached_share: Array | None = None
    max_cpu_loras: Array | None = None
    loaded_at_start: Array | None = None
    long_prefill_token_threshold: Array | None = None
    max_num_active_seqs: Array | None = None
    watermark_blocks: Array | None = None

    @property
    def starts(self) -> Array:
        """Whether each server starts, ``[configs]``."""
        return self.status <= Status.OUTSIDE_CALIBRATION

    @property
    def most_active_seqs(self) -> Array:
        """Most running requests, ``[configs]``."""
        return self.max_num_seqs if self.max_num_active_seqs is None else self.max_num_active_seqs

    @property
    def requests_per_s(self) -> Array:
        """Requests that arrive per second, ``[configs]``."""
        return (self.class_count * self.class_rate_per_s).sum(axis=-1) + self.base_rate_per_s

    def take(self, rows: np.ndarray | slice) -> "Scenarios":
        """Return the configurations of these indices, which may repeat, with NumPy leaves."""
        taken: Scenarios = jax.tree.map(lambda values: np.asarray(values)[rows], self)
        return taken

    def scaled(self, load: np.ndarray, shorter: ArrayLike = 1.0) -> "Scenarios":
        """Return the configurations under so many times their load, with NumPy leaves.

        Args:
            load: Factors of all request rates, ``[configs]``.
            shorter: Factors by which the horizon is shorter, one or ``[configs]``.
        """
        host: Any = self.take(slice(None))
        changed: Scenarios = dataclasses.replace(
            host,
            class_rate_per_s=(host.class_rate_per_s * load[:, np.newaxis]).astype(host.class_rate_per_s.dtype),
            base_rate_per_s=(host.base_rate_per_s * load).astype(host.base_rate_per_s.dtype),
            horizon_s=(host.horizon_s / shorter).astype(host.horizon_s.dtype),
        )
        return changed

    def without_cache(self) -> "Scenarios":
        """Return the configurations without what a prefix cache can hold."""
        plain: Scenarios = dataclasses.replace(
            self, class_shared_tokens=None, base_shared_tokens=None, cached_share=None
        )
        return plain

    def filled_up(self, configs: int) -> "Scenarios":
        """Return as many configurations, those added being servers that do not start, with NumPy leaves."""
        count = len(self.status)
        filled = self.take(np.minimum(np.arange(configs), count - 1))
        status: Any = np.where(np.arange(configs) < count, filled.status, Status.OOM).astype(np.int32)
        return dataclasses.replace(filled, status=status)


def build_scenarios(
    workload: WorkloadLike,
    calibration: CalibrationLike,
    adapters: ArrayLike,
    max_loras: ArrayLike,
    **settings: Any,
) -> Scenarios:
    """Lay out configurations of one workload on one calibrated server.

    Args:
        workload: Adapters and traffic, as `load_workload` takes them.
        calibration: Model, GPU and coefficients, or their name or file.
        adapters: Adapters served, A; this and the next broadcast to ``[configs]``. With 0 there is only the traffic of
            the base model.
        max_loras: Slots, S; 0 for a server without LoRA, where A is 0. Slots beyond A stay empty.
        **settings: Other server settings by vLLM's names, None for vLLM's default, and ``loaded_at_start`` (see
            `Scenarios`). ``max_cpu_loras``, ``max_lora_rank``, ``max_num_seqs``, ``max_num_batched_tokens``,
            ``gpu_memory_utilization`` and ``loaded_at_start`` may be arrays. ``max_cpu_loras`` is by default A or S,
            whichever is more, so that host memory holds all adapters; ``max_lora_rank`` the smallest that vLLM allows
            for the adapters served.

    Returns:
        The configurations, with the KV cache and the start-up outcome of each.

    Raises:
        InputError: If a setting is not allowed, adapters are served without a slot, there are fewer than asked for, or
            requests are longer than ``max_model_len``.
    """
    workload, calibration = load_workload(workload), load_calibration(calibration)
    served = np.atleast_1d(check_numeric("adapters", adapters)).ravel()
    none = served == 0
    counted = np.where(none, 1, served)  # no workload is without adapters; those of such a server are taken out again
    classes = workload.classes(counted)
    classes = dataclasses.replace(classes, count=np.where(none[:, np.newaxis], 0, classes.count))
    rank_needed = np.where(none, 1, workload.adapters.max_rank(counted))
    if settings.get("max_lora_rank") is None:
        allowed = {rank: calibration.smallest_max_lora_rank(int(rank)) for rank in np.unique(rank_needed)}
        settings["max_lora_rank"] = np.array([allowed[rank] for rank in rank_needed])
    elif np.any(rank_needed > np.asarray(settings["max_lora_rank"])):
        rank = int(rank_needed.max())
        remedy = f"use at least {calibration.smallest_max_lora_rank(rank)}"
        raise InputError(
            "max_lora_rank", settings["max_lora_rank"], f">= {rank}, the largest adapter rank served", remedy
        )
    scenarios = lay_out(workload, calibration, classes, adapters=adapters, max_loras=max_loras, **settings)
    if settings.get("enable_prefix_caching") is False:
        return scenarios
    cached: Scenarios = dataclasses.replace(scenarios, **_cached(workload, scenarios, adapters))
    return cached


def lay_out(
    workload: Workload,
    calibration: Calibration,
    classes: AdapterClasses,
    *,
    arrival_cv: ArrayLike | None = None,
    **settings: Any,
) -> Scenarios:
    """Lay out servers whose adapters are counted by class, under a workload's traffic.

    Args:
        workload: Lengths, bounds, base model and horizon; its own adapters do not matter.
        calibration: Model, GPU and coefficients.
        classes: The adapters of every server.
        arrival_cv: Coefficient of variation of the gaps between an adapter's requests, one or ``[configs]``; the
            workload's if not given.
        **settings: ``adapters`` (A), ``max_loras`` (S) and ``max_lora_rank``, ``[configs]``, and other settings as in
            `build_scenarios`.

    Returns:
        The configurations, with the KV cache and the start-up outcome of each.

    Raises:
        InputError: If a setting is not allowed, adapters are served without a slot, or requests are longer than
            ``max_model_len``.
    """
    scenarios = pack_scenarios(
        calibration,
        class_count=classes.count,
        class_rate_per_s=classes.rate_per_s,
        class_rank=classes.rank,
        base_rate_per_s=workload.base_rate_per_s,
        mean_input_tokens=workload.mean_input_tokens,
        mean_output_tokens=workload.mean_output_tokens,
        kv_tokens_per_request=kv_tokens_per_request(workload, settings.get("block_size") or _BLOCK_TOKENS),
        horizon_s=workload.horizon_s,
        max_pending=np.inf if workload.max_pending is None else workload.max_pending,
        **settings,
    )
    check_lengths(workload, calibration, settings.get("max_model_len"))
    status = np.asarray(scenarios.status)
    beyond = calibration.outside(**_asked(workload, scenarios.requests_per_s)) & (status == Status.OK)
    configs = status.size
    input_cv = np.sqrt(max(workload.second_moment_input_tokens / workload.mean_input_tokens**2 - 1.0, 0.0))
    gaps_cv = workload.arrival_cv if arrival_cv is None else arrival_cv
    completed: Scenarios = dataclasses.replace(
        scenarios,
        bounds=LatencyBounds.of(workload.goodput, configs),
        arrival_cv=_leaf(np.broadcast_to(gaps_cv, (configs,))),
        input_cv=_leaf(np.full(configs, input_cv)),
        status=_leaf(np.where(beyond, Status.OUTSIDE_CALIBRATION, status), np.int32),
    )
    return completed


def _cached(workload: Workload, scenarios: Scenarios, adapters: ArrayLike) -> dict[str, Any]:
    """Return the fields that say what a prefix cache can hold of a workload's prompts."""
    configs = scenarios.status.shape[0]
    if workload.cached_share > 0:
        return {"cached_share": _leaf(np.full(configs, workload.cached_share))}
    if not workload.shares_prefix:
        return {}
    if scenarios.long_prefill_token_threshold is not None:
        # Several prompts of an adapter would then be in work, each with a copy of the same blocks.
        threshold, remedy = int(scenarios.long_prefill_token_threshold[0]), "give requests.cached_share"
        raise InputError("long_prefill_token_threshold", threshold, "0 where prompts share a prefix", remedy)
    counts = np.broadcast_to(np.asarray(adapters).ravel(), (configs,)).astype(int)
    block_size, lengths = int(np.asarray(scenarios.block_size)[0]), workload.input_tokens
    most = max(int(counts.max()), 1)
    prefixes = workload.shared_prefixes(most)
    distinct, place = np.unique(prefixes, return_inverse=True)
    whole = np.minimum(distinct[:, np.newaxis], lengths.tokens - 1) // block_size * block_size
    tokens = (whole @ lengths.probability)[place]
    rates, ranks = workload.adapters.deal(most)
    pairs = np.stack([rates, ranks], axis=1)
    classes = np.stack([scenarios.class_rate_per_s[0], scenarios.class_rank[0]], axis=1)
    member = (pairs[:, np.newaxis].astype(classes.dtype) == classes).all(axis=2)
    served = (np.arange(rates.size) < counts[:, np.newaxis]).astype(float)
    total = (served * tokens[:-1]) @ member
    return {
        "class_shared_tokens": _leaf(total / np.maximum(served @ member, 1)),
        "base_shared_tokens": _leaf(np.full(configs, tokens[-1])),
    }


def pack_scenarios(
    calibration: Calibration,
    *,
    class_count: ArrayLike,
    class_rate_per_s: ArrayLike,
    class_rank: ArrayLike,
    base_rate_per_s: ArrayLike,
    mean_input_tokens: ArrayLike,
    mean_output_tokens: ArrayLike,
    kv_tokens_per_request: ArrayLike,
    horizon_s: ArrayLike,
    max_pending: ArrayLike,
    adapters: ArrayLike,
    max_loras: ArrayLike,
    **settings: Any,
) -> Scenarios:
    """Lay out configurations from plain numbers, each with a workload of its own.

    Args:
        calibration: Model, GPU and coefficients.
        class_count: ``[configs, classes]``; this and the other fields of `Scenarios` broadcast.
        class_rate_per_s: ``[classes]`` or ``[configs, classes]``.
        class_rank: ``[classes]`` or ``[configs, classes]``.
        base_rate_per_s: One value or ``[configs]``, as the following.
        mean_input_tokens: Mean prompt length.
        mean_output_tokens: Mean tokens generated.
        kv_tokens_per_request: Mean tokens that a running request holds.
        horizon_s: Time observed.
        max_pending: Unanswered requests that clients hold.
        adapters: Adapters served.
        max_loras: Slots.
        **settings: As in `build_scenarios`, ``max_lora_rank`` included.

    Raises:
        InputError: If a setting is not allowed, or adapters are served without a slot.
    """
    check_numeric("max_loras", max_loras)
    held, loaded = settings.pop("max_cpu_loras", None), settings.pop("loaded_at_start", None)
    per_config = {
        "base_rate_per_s": base_rate_per_s,
        "mean_input_tokens": mean_input_tokens,
        "mean_output_tokens": mean_output_tokens,
        "kv_tokens_per_request": kv_tokens_per_request,
        "horizon_s": horizon_s,
        "max_pending": max_pending,
        "adapters": adapters,
        "max_loras": max_loras,
        "max_cpu_loras": np.maximum(adapters, max_loras) if held is None else held,
        "loaded_at_start": False if loaded is None else loaded,
    }
    varying = {name: settings.pop(name) for name in _VARYING if settings.get(name) is not None}
    for name, values in {"max_cpu_loras": per_config["max_cpu_loras"], **varying}.items():
        check_numeric(name, values)
    columns = dict(
        zip(
            (*per_config, *varying),
            np.broadcast_arrays(*map(np.atleast_1d, (*per_config.values(), *varying.values()))),
            strict=True,
        )
    )
    _check_slots(columns["adapters"], columns["max_loras"], columns["max_cpu_loras"])
    batch, config = _resolve(calibration, {name: columns.pop(name) for name in varying}, settings)
    plan = calibration.plan_memory(config, max_loras=columns["max_loras"], **batch)
    served, held, loaded = (columns.pop(name) for name in ("adapters", "max_cpu_loras", "loaded_at_start"))
    outside = calibration.outside(
        max_num_seqs=batch["max_num_seqs"], max_num_batched_tokens=batch["max_num_batched_tokens"]
    ) | (columns["max_loras"] > 0) & calibration.outside(
        adapters=served, max_loras=columns["max_loras"], max_lora_rank=batch["max_lora_rank"]
    )
    status = np.where((plan.status == Status.OK) & outside, Status.OUTSIDE_CALIBRATION, plan.status)
    batch.pop("gpu_memory_utilization")
    shape = np.broadcast_shapes(np.shape(class_count), (served.shape[0], 1))
    classes = {"class_count": class_count, "class_rate_per_s": class_rate_per_s, "class_rank": class_rank}
    numbers = {name: np.broadcast_to(values, shape) for name, values in classes.items()} | columns | batch
    # Of all blocks, that which vLLM keeps for itself among them (``KVCacheManager`` in ``v1/core``).
    watermark_blocks = config.watermark * np.nan_to_num(plan.kv_cache_tokens // config.block_size)
    return Scenarios(
        **{name: _leaf(values) for name, values in numbers.items()},
        kv_cache_tokens=_leaf(plan.kv_cache_tokens),
        block_size=_leaf(np.full(served.shape, config.block_size), np.int32),
        status=_leaf(status, np.int32),
        max_cpu_loras=_leaf(held) if np.any(held < served) else None,
        loaded_at_start=_leaf(loaded, bool) if np.any(loaded) else None,
        long_prefill_token_threshold=_leaf(np.full(served.shape, cut))
        if (cut := config.long_prefill_token_threshold)
        else None,
        max_num_active_seqs=_leaf(np.full(served.shape, active)) if (active := config.max_num_active_seqs) else None,
        watermark_blocks=_leaf(watermark_blocks, np.int32) if config.watermark else None,
    )


def _leaf(values: ArrayLike, kind: Any = float) -> Any:
    """Return an array of what JAX would make of it, by NumPy: JAX compiles something for every new shape."""
    return np.asarray(values, dtype=jax.dtypes.canonicalize_dtype(kind))


def extrapolations(
    workload: Workload, calibration: Calibration, server: ServerConfig, adapters: int | None = None
) -> list[str]:
    """Say in a sentence each in what a workload on a server lies beyond what the calibration was fitted over.

    Args:
        workload: Adapters and traffic.
        calibration: Whose ranges hold.
        server: The server.
        adapters: Adapters that it serves; None: ``max_cpu_loras`` of them.
    """
    served = server.max_cpu_loras if adapters is None else adapters
    rates_per_s, _ = workload.adapters.deal(served)
    requests_per_s = float(rates_per_s.sum() + workload.base_rate_per_s)
    settings = {name: getattr(server, name) for name in ("max_loras", *_VARYING)} | {"adapters": served}
    if not server.enable_lora:
        settings = {name: value for name, value in settings.items() if name not in _OF_LORA}
    return calibration.extrapolations(**_asked(workload, requests_per_s), **settings)


def _asked(workload: Workload, requests_per_s: Any) -> dict[str, Any]:
    """Return what a workload asks for, by the names of the ranges that calibrations are fitted over."""
    tokens = workload.mean_input_tokens + workload.mean_output_tokens
    return {
        "input_tokens": workload.input_tokens.max,
        "output_tokens": workload.output_tokens.max,
        "offered_tokens_per_s": requests_per_s * tokens,
    }


def kv_tokens_per_request(workload: Workload, block_size: int = _BLOCK_TOKENS) -> float:
    """Mean tokens that a running request holds in the KV cache over its stay.

    ``(E[input · output] + E[output²]/2) / E[output]``: the prompt and on average half of the output, weighted by the
    steps that a request stays; plus half a block that is reserved but not filled.
    """
    held = workload.mean_input_output_tokens + 0.5 * workload.second_moment_output_tokens
    return held / workload.mean_output_tokens + 0.5 * block_size


def _check_slots(adapters: np.ndarray, max_loras: np.ndarray, max_cpu_loras: np.ndarray) -> None:
    """Refuse slots that no server has, adapters without one, and a host memory smaller than the slots."""
    for name, values, least, which in (
        ("max_loras", max_loras, 0 * max_loras, ""),
        ("max_cpu_loras", max_cpu_loras, max_loras, "max_loras "),
    ):
        wrong = (values < least) | (values != np.floor(values))
        if np.any(wrong):
            allowed = f"a whole number >= {which}{least[wrong][0].item()}"
            raise InputError(name, values[wrong][0].item(), allowed)
    without = (max_loras == 0) & (adapters > 0)
    if np.any(without):
        allowed = f">= 1 for a server of {adapters[without][0].item()} adapters"
        raise InputError("max_loras", 0, allowed, "without LoRA only the base model is served: use 0 adapters")


def _resolve(
    calibration: Calibration, varying: dict[str, np.ndarray], fixed: dict[str, Any]
) -> tuple[dict[str, np.ndarray], ServerConfig]:
    """Check every distinct combination of settings and fill in vLLM's defaults."""
    rows, inverse = np.unique(np.stack(list(varying.values()), axis=1), axis=0, return_inverse=True)
    configs = []
    for row in rows:
        given = {
            name: value.item() if name in _FRACTIONS else _whole(name, value.item())
            for name, value in zip(varying, row, strict=True)
        }
        configs.append(calibration.server(**given, **fixed))
    batch = {name: np.array([getattr(config, name) for config in configs])[inverse.ravel()] for name in _VARYING}
    return batch, configs[0]


def _whole(name: str, value: float) -> int:
    return int(check_number(name, value, integer=True))


def check_lengths(workload: Workload, calibration: Calibration, max_model_len: int | None = None) -> None:
    """Refuse a workload with requests longer than the server takes: vLLM would refuse those."""
    longest = workload.input_tokens.max + workload.output_tokens.max
    limit = max_model_len or calibration.model.max_position_embeddings
    if longest > limit:
        raise InputError(
            "max_model_len",
            limit,
            f">= {longest}, the longest prompt plus the longest output",
            "shorten input_tokens.max or output_tokens.max",
        )
