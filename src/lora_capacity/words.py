"""Words for people: what labels in files and JSON mean, and quantities with their units; each written once here."""

import math
from typing import Any

from lora_capacity.units import BYTES_PER_GIB, MS_PER_S

_LONG_S = 1.0
"""Times from here on are told in seconds."""

_SMALLEST = 0.001
"""Size below which a number is only told to be smaller: its digits would mean nothing to a reader."""

_LEAST_PERCENT = 0.01
"""The same for a percentage."""

_DASH = "–"

LABELS = {
    "": _DASH,
    # Bottlenecks
    "none": "none",
    "slots": "slots",
    "sequences": "batch limit",
    "kv_cache": "KV cache",
    "token_budget": "token budget",
    # Statuses in which a server does not start, which are verdicts too
    "no_kv_cache": "no room for a KV cache",
    "oom": "out of memory",
    # Verdicts of a search
    "acceptable": "keeps up",
    "risky": "risky",
    "starved": "starved",
    "falls_behind": "falls behind",
    "misses_bounds": "misses bounds",
    "impossible": "more slots than adapters",
}
"""Labels that are not simply words with underscores, and what they mean."""

REFUSALS = {
    "oom": "the server runs out of GPU memory while it starts",
    "no_kv_cache": "the server does not start: its KV cache is smaller than one request of max_model_len",
}
"""Statuses in which the server does not start, as sentences."""

FAILURES = REFUSALS | {"step_limit": "the simulation stopped: more preempted requests wait than it has room for"}
"""Statuses without numbers, as sentences."""

_FLAGS = {"slots": "max_loras", "sequences": "max_num_seqs", "token_budget": "max_num_batched_tokens"}
"""vLLM's flags that set a bottleneck."""


def spoken(label: str) -> str:
    """Return a label of a status, verdict, bottleneck or anything else in words; a dash where it is empty."""
    return LABELS.get(label, label.replace("_", " "))


def bottleneck(label: str) -> str:
    """Return a bottleneck with its article and the flag that sets it: ``the batch limit (max_num_seqs)``."""
    if label == "none":
        return spoken(label)
    return f"the {spoken(label)} ({_FLAGS[label]})" if label in _FLAGS else f"the {spoken(label)}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 slot``, ``1,024 slots``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def shown(value: Any) -> str:
    """Return a value with three significant digits and thousands with commas, a dash for no number.

    Never in powers of ten: what is smaller than 0.001 is told to be.
    """
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if 0 < abs(value) < _SMALLEST:
            return f"< {_SMALLEST:g}" if value > 0 else f"> -{_SMALLEST:g}"
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value)


def duration(value_s: float) -> str:
    """Return a time in milliseconds, from one second on in seconds."""
    if math.isnan(value_s):
        return _DASH
    return f"{shown(value_s)} s" if value_s >= _LONG_S else f"{shown(value_s * MS_PER_S)} ms"


def percent(share: float) -> str:
    """Return a share in percent."""
    if 0 < share < _LEAST_PERCENT / 100.0:
        return f"< {_LEAST_PERCENT:g} %"
    return _DASH if math.isnan(share) else f"{shown(100.0 * share)} %"


def gibibytes(value_bytes: float, digits: int = 2) -> str:
    """Return an amount of memory, with so many digits after the point."""
    return _DASH if math.isnan(value_bytes) else f"{value_bytes / BYTES_PER_GIB:.{digits}f} GiB"
