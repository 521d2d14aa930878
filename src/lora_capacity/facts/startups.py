"""Starts of servers predicted by the memory model, against what vLLM logged."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import InputError
from lora_capacity.measurements import Startup
from lora_capacity.memory import QUANTILES, MemoryPlan, MemoryTerms, plan_memory, resident_memory
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB

_CLOSE, _NEAR = 0.05, 0.15  # relative errors of the KV tokens by which scores count rows
_OUTCOMES = tuple(status.label for status in (Status.OK, Status.NO_KV_CACHE, Status.OOM))
_UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class StartupPrediction:
    """What is predicted of one start.

    Attributes:
        id: The start's name.
        status: ``ok``, ``no_kv_cache``, ``oom`` or ``unsupported``.
        reason: Why it does not start, or is not answered; empty otherwise.
        model_load_gib: Weights and slots on the first GPU, NaN where not answered.
        kv_cache_tokens: KV cache as vLLM logs it.
        low: What nine of ten servers reach, with `high`.
        high: What nine of ten servers do not exceed.
        kv_cache_gib: KV cache of a GPU.
    """

    id: str
    status: str
    reason: str = ""
    model_load_gib: float = math.nan
    kv_cache_tokens: float = math.nan
    low: float = math.nan
    high: float = math.nan
    kv_cache_gib: float = math.nan

    @property
    def answered(self) -> bool:
        """Whether there is a prediction."""
        return self.status != _UNSUPPORTED

    def to_json(self) -> dict[str, Any]:
        """Return the row of `validate --startup`; what is not known is null."""
        names = ("model_load_gib", "kv_cache_tokens", "low", "high")
        numbers = {name: getattr(self, name) for name in names}
        shown = {name: None if math.isnan(value) else round(value, 3) for name, value in numbers.items()}
        return {"id": self.id, "status": self.status, "reason": self.reason, **shown}


def predict_startup(startup: Startup, terms: MemoryTerms) -> StartupPrediction:
    """Predict one start; what is not supported is told as the reason.

    Args:
        startup: The start.
        terms: The memory that shapes do not tell.
    """
    try:
        shape, gpu = startup.shape, startup.gpu
        settings = startup.plan_settings(shape, gpu)
        plans = {name: plan_memory(shape, gpu, terms, **settings, quantile=each) for name, each in QUANTILES.items()}
    except InputError as error:
        return StartupPrediction(startup.id, _UNSUPPORTED, str(error))
    plan = plans["expected"]
    slots, rank = (np.array([settings[name]], np.int64) for name in ("max_loras", "max_lora_rank"))
    # What the first GPU logs: the plan counts the whole segments of the tightest.
    loaded = resident_memory(startup.first_shard(shape), settings["behaviour"], slots, rank)
    status = Status(plan.status.item())
    tokens = float(plan.kv_cache_tokens.item())
    if status == Status.NO_KV_CACHE and "max_model_len" not in startup.settings and tokens:
        status = Status.OK  # of a length that is not known
    return StartupPrediction(
        startup.id,
        status.label,
        _reason(plan, status),
        loaded.allocated_bytes.item() / BYTES_PER_GIB,
        tokens,
        float(plans["low"].kv_cache_tokens.item()),
        float(plans["high"].kv_cache_tokens.item()),
        plan.kv_cache_bytes.item() / BYTES_PER_GIB,
    )


def _reason(plan: MemoryPlan, status: Status) -> str:
    if status == Status.OOM:
        return f"{-plan.headroom_oom_bytes.item() / BYTES_PER_GIB:.2f} GiB of GPU memory are missing"
    if status == Status.NO_KV_CACHE:
        missing = -plan.headroom_no_kv_cache_bytes.item() / BYTES_PER_GIB
        return f"{missing:.2f} GiB are missing for one request of max_model_len"
    return ""


def kv_error(startup: Startup, predicted: StartupPrediction) -> float:
    """Return the relative error of the KV cache, of its tokens where they were logged; NaN where nothing was."""
    told = logged_tokens(startup)
    if not math.isnan(told):
        return predicted.kv_cache_tokens / told - 1
    return predicted.kv_cache_gib / startup.logged["kv_cache_gib"] - 1


def logged_tokens(startup: Startup) -> float:
    """Return the tokens of the KV cache as logged, or as blocks tell; NaN where neither was."""
    tokens, blocks, block = (startup.logged[name] for name in ("kv_cache_tokens", "num_gpu_blocks", "block_size"))
    return blocks * (startup.behaviour.block_size if math.isnan(block) else block) if math.isnan(tokens) else tokens


def score_startups(startups: Sequence[Startup], predicted: Sequence[StartupPrediction]) -> dict[str, Any]:
    """Return how well starts are predicted, over all and by kind.

    Args:
        startups: The starts.
        predicted: What is predicted of each, in the same order.
    """
    rows = list(zip(startups, predicted, strict=True))
    kinds: Mapping[str, Callable[[Startup], str]] = {
        "by_gpu": lambda each: each.gpu_kind,
        "by_quantization": lambda each: each.quantization or "none",
        "by_tensor_parallel_size": lambda each: str(each.deployment.tensor_parallel_size),
        "by_lora": lambda each: "LoRA" if each.lora else "no LoRA",
    }
    scores: dict[str, Any] = _score(rows)
    for name, kind in kinds.items():
        groups: dict[str, list[tuple[Startup, StartupPrediction]]] = {}
        for row in rows:
            groups.setdefault(kind(row[0]), []).append(row)
        scores[name] = {key: _score(groups[key]) for key in sorted(groups)}
    return scores


def _score(rows: Sequence[tuple[Startup, StartupPrediction]]) -> dict[str, Any]:
    answered = [(startup, each) for startup, each in rows if each.answered]
    errors = [(kv_error(startup, each), startup, each) for startup, each in answered]
    known = [(abs(error), startup, each) for error, startup, each in errors if not math.isnan(error)]
    size = np.array([error for error, _, _ in known])
    loads = [each.model_load_gib / startup.logged["model_load_gib"] - 1 for startup, each in answered]
    weights = np.abs([error for error in loads if not math.isnan(error)])
    judged = [(startup.outcome, each.status) for startup, each in answered if startup.outcome in _OUTCOMES]
    inside = [_is_inside(startup, each) for _, startup, each in known]
    return {
        "rows": len(rows),
        "answered": len(answered),
        "kv_rows": len(known),
        "kv_median_error": _rounded(np.median, size),
        "kv_within_5_percent": _rounded(np.mean, size <= _CLOSE),
        "kv_within_15_percent": _rounded(np.mean, size <= _NEAR),
        "kv_inside_interval": _rounded(np.mean, np.array(inside)),
        "load_median_error": _rounded(np.median, weights),
        "outcomes": len(judged),
        "outcomes_right": sum(told == status for told, status in judged),
    }


def _is_inside(startup: Startup, predicted: StartupPrediction) -> bool:
    told = logged_tokens(startup)
    if math.isnan(told):
        # The tokens of the GiB that were logged, at as many as those predicted hold.
        told = startup.logged["kv_cache_gib"] / predicted.kv_cache_gib * predicted.kv_cache_tokens
    return predicted.low <= told <= predicted.high


def _rounded(mean: Callable[[NDArray[Any]], Any], values: NDArray[Any]) -> float | None:
    return round(float(mean(values)), 4) if values.size else None
