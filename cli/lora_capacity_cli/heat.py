"""A map of throughput over adapters and slots in a terminal: colours where there are any, shades of grey elsewhere."""

from typing import TYPE_CHECKING

import click

from lora_capacity.words import shown, spoken
from lora_capacity_cli.output import terminal

if TYPE_CHECKING:
    from lora_capacity.reports import PlanGrid

_SHADES = " ░▒▓█"
"""No throughput to the most of the map."""

_SIGNS = {"starved": "·", "falls_behind": "·", "risky": ":", "misses_bounds": "'", "no_kv_cache": "x", "oom": "x"}
_LEGEND = {sign: spoken(verdict) for verdict, sign in _SIGNS.items()} | {"x": "does not start", "o": "recommended"}
_CELL = 2
"""Characters of a cell, which make it about square."""

_DARK_INK, _LIGHT_INK = "#15171c", "#ffffff"


def print_map(grid: "PlanGrid") -> None:
    """Print throughput in colour, one cell per configuration, more slots higher up."""
    import numpy as np
    from rich.text import Text

    from lora_capacity.reports.colours import ramp

    console = terminal()
    colours = ramp(dark=True, steps=16) if console.color_system in ("256", "truecolor") and not console.no_color else []
    throughput = grid.values["throughput_tokens_per_s"]
    most = float(np.nanmax(throughput)) if np.isfinite(throughput).any() else 0.0
    signs = np.array([[_SIGNS.get(verdict, " ") for verdict in row] for row in grid.verdict])
    signs[grid.best[::-1]] = "o"
    console.print(Text("Throughput by adapters (across) and slots (up)", style="bold"))
    for row in reversed(range(grid.slots.size)):
        line = Text(f"{grid.slots[row]:>7,} ")
        for sign, value in zip(signs[row].tolist(), throughput[row].tolist(), strict=True):
            line.append(*_cell(sign, value / max(most, 1e-9), colours))
        console.print(line)
    console.print(Text(f"{'':8}{_ruler(grid)}  adapters"))
    scale = f"{'dark to bright' if colours else '░▒▓█'} 0 to {shown(most)} tokens/s"
    legend = [f"{sign} {words}" for sign, words in _LEGEND.items() if sign in signs]
    console.print(Text(f"{'':8}{scale};  {',  '.join(legend)}"))
    click.echo()


def _cell(sign: str, share: float, colours: list[str]) -> tuple[str, str]:
    """Return a configuration's characters and style: its throughput as a colour or a shade, its verdict as a sign."""
    if not share >= 0:  # without a throughput
        return sign * _CELL, ""
    if colours:
        step = min(int(share * len(colours)), len(colours) - 1)
        ink = _LIGHT_INK if step < len(colours) // 2 else _DARK_INK
        return sign.center(_CELL) if sign == "o" else sign * _CELL, f"{ink} on {colours[step]}"
    if sign == " ":
        return _SHADES[1 + min(int(share * 4), 3)] * _CELL, ""
    return sign.ljust(_CELL) if sign == "o" else sign * _CELL, ""


def _ruler(grid: "PlanGrid") -> str:
    """Return numbers of adapters below their columns, a few of them."""
    ruler = ""
    for column in range(0, grid.adapters.size, 5):
        ruler = ruler.ljust(_CELL * column)
        ruler += f"{grid.adapters[column]:,}"
    return ruler
