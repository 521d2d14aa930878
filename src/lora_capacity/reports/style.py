"""Style sheets: colours in light and dark, how figures look, and the page."""

import functools
import importlib.resources

from lora_capacity.reports.colours import ramp

_LIGHT = {
    "page": "#fcfcfa",
    "panel": "#f4f4ef",
    "ink": "#1d1f24",
    "soft": "#565a63",
    "faint": "#d9d9d2",
    "accent": "#2d4a8a",
    "band": "#2d4a8a2e",
    "wash": "#8a5a2d1c",
    "warm": "#9a4d14",
    "starved-line": "#6e3a10",
    "b-none": "#dfe9dc",
    "b-slots": "#9cc3e0",
    "b-sequences": "#e2b56b",
    "b-kv_cache": "#b79bd0",
    "b-token_budget": "#8fc9b0",
    "b-dead": "#c3bfb8",
}
_DARK = {
    "page": "#15171c",
    "panel": "#1e2128",
    "ink": "#ecebe6",
    "soft": "#b0b3ba",
    "faint": "#3a3e47",
    "accent": "#9dbcf5",
    "band": "#9dbcf538",
    "wash": "#e0a05a22",
    "warm": "#eea76a",
    "starved-line": "#f2c08e",
    "b-none": "#2c3b31",
    "b-slots": "#2f5f85",
    "b-sequences": "#86601f",
    "b-kv_cache": "#634a80",
    "b-token_budget": "#2a6a55",
    "b-dead": "#4a4844",
}


def palette_css(scope: str, *, dark: bool = False) -> str:
    """Return the colours as custom properties of whatever a selector selects."""
    named = _DARK if dark else _LIGHT
    properties = {f"--{name}": colour for name, colour in named.items()}
    properties |= {f"--c{step}": colour for step, colour in enumerate(ramp(dark=dark))}
    return scope + "{" + ";".join(f"{name}:{value}" for name, value in properties.items()) + "}"


def figure_css() -> str:
    """Return how figures look, in those colours."""
    steps = "".join(f".c{step}{{fill:var(--c{step})}}" for step in range(len(ramp())))
    return steps + resource("figure.css")


@functools.cache
def resource(name: str) -> str:
    """Return a file that comes with this package."""
    return (importlib.resources.files("lora_capacity.reports") / name).read_text(encoding="utf-8")
