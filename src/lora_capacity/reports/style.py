"""Style sheets: colours in light and dark, how figures look, and the page."""

import functools
import importlib.resources

from lora_capacity.reports.colours import ramp

_COLOURS = {
    "page": ("#fcfcfa", "#15171c"),
    "panel": ("#f4f4ef", "#1e2128"),
    "ink": ("#1d1f24", "#ecebe6"),
    "soft": ("#565a63", "#b0b3ba"),
    "faint": ("#d9d9d2", "#3a3e47"),
    "accent": ("#2d4a8a", "#9dbcf5"),
    "band": ("#2d4a8a2e", "#9dbcf538"),
    "wash": ("#8a5a2d1c", "#e0a05a22"),
    "warm": ("#9a4d14", "#eea76a"),
    "b-none": ("#dfe9dc", "#2c3b31"),
    "b-slots": ("#9cc3e0", "#2f5f85"),
    "b-sequences": ("#e2b56b", "#86601f"),
    "b-kv_cache": ("#b79bd0", "#634a80"),
    "b-token_budget": ("#8fc9b0", "#2a6a55"),
    "b-dead": ("#c3bfb8", "#4a4844"),
}
"""Named colours, light and dark; text on each has a contrast of at least 4.5, as tests of the page in a browser see."""


def palette_css(scope: str, *, dark: bool = False) -> str:
    """Return the colours as custom properties of whatever a selector selects."""
    properties = {f"--{name}": both[dark] for name, both in _COLOURS.items()}
    properties |= {f"--c{step}": colour for step, colour in enumerate(ramp(dark=dark))}
    return scope + "{" + ";".join(f"{name}:{value}" for name, value in properties.items()) + "}"


def figure_css() -> str:
    """Return how figures look, in those colours."""
    steps = "".join(f".c{step}{{fill:var(--c{step})}}" for step in range(len(ramp())))
    return steps + resource("figure.css")


def page_css() -> str:
    """Return how the page looks: dark where the system or the reader asks for it, light on paper."""
    dark = palette_css(":root:not([data-theme=light])", dark=True)
    return "".join(
        (
            palette_css(":root"),
            f"@media screen and (prefers-color-scheme: dark){{{dark}}}",
            f"@media screen{{{palette_css(':root[data-theme=dark]', dark=True)}}}",
            ":root[data-theme=light]{color-scheme:light}:root[data-theme=dark]{color-scheme:dark}",
            resource("page.css"),
            figure_css(),
        )
    )


@functools.cache
def resource(name: str) -> str:
    """Return a file that comes with this package."""
    return (importlib.resources.files("lora_capacity.reports") / name).read_text(encoding="utf-8")
