"""Quantities as people read them, in tables, reports and figures."""

import math
from typing import Any

from lora_capacity.units import BYTES_PER_GIB, MS_PER_S

_LONG_S = 10.0
_DASH = "–"


def shown(value: Any) -> str:
    """Return a value with three significant digits and thousands with commas, a dash for no number."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def duration(value_s: float) -> str:
    """Return a time in milliseconds, from ten seconds on in seconds."""
    if math.isnan(value_s):
        return _DASH
    return f"{shown(value_s)} s" if value_s >= _LONG_S else f"{shown(value_s * MS_PER_S)} ms"


def percent(share: float) -> str:
    """Return a share in percent."""
    return _DASH if math.isnan(share) else f"{shown(100.0 * share)} %"


def gibibytes(value_bytes: float) -> str:
    """Return an amount of memory."""
    return _DASH if math.isnan(value_bytes) else f"{value_bytes / BYTES_PER_GIB:.2f} GiB"


def bound_words(limit: str) -> str:
    """Return what holds a server back, in words; a dash where it does not start."""
    return {"": _DASH, "none": "nothing", "kv_cache": "KV cache"}.get(limit, limit.replace("_", " "))
