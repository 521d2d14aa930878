"""A map of throughput over adapters and slots in a terminal: colours where there are any, shades of grey elsewhere."""

from typing import TYPE_CHECKING

import click

from lora_capacity.words import shown, spoken
from lora_capacity_cli.output import terminal

if TYPE_CHECKING:
    from rich.text import Text

    from lora_capacity.reports import PlanGrid

_SHADES = " ░▒▓█"
"""No throughput to the most of the map."""

_SIGNS = {"starved": "·", "risky": ":", "too_slow": "'", "no_kv_cache": "x", "oom": "x"}
_LEGEND = {sign: spoken(verdict) for verdict, sign in _SIGNS.items()} | {"x": "does not start", "o": "recommended"}
_CELL = 2
"""Characters of a cell, which make it about square."""

_DARK_INK, _LIGHT_INK = "#15171c", "#ffffff"


def print_map(grid: "PlanGrid") -> None:
    """Print throughput in colour, one cell per configuration, more slots higher up."""
    from rich.text import Text

    from lora_capacity.reports.colours import ramp

    console = terminal()
    colours = ramp(dark=True, steps=16) if console.color_system in ("256", "truecolor") and not console.no_color else []
    console.print(Text("Throughput by adapters, across, and slots, up", style="bold"))
    used: set[str] = set()
    for row in reversed(range(grid.slots.size)):
        line = Text(f"{grid.slots[row]:>7,} ")
        for column in range(grid.adapters.size):
            _add_cell(line, grid, row, column, colours, used)
        console.print(line)
    console.print(Text(f"{'':8}{_ruler(grid)}  adapters"))
    scale = f"{'dark to bright' if colours else '░▒▓█'} 0 to {shown(_most(grid))} tokens/s"
    legend = [f"{sign} {words}" for sign, words in _LEGEND.items() if sign in used]
    console.print(Text(f"{'':8}{scale};  {',  '.join(legend)}"))
    click.echo()


def _add_cell(line: "Text", grid: "PlanGrid", row: int, column: int, colours: list[str], used: set[str]) -> None:
    """Append one configuration: its throughput as a colour or a shade, its verdict as a sign."""
    verdict = grid.verdict[row, column]
    sign = "o" if (column, row) == grid.best else _SIGNS.get(verdict, " ")
    used.add(sign)
    share = float(grid.values["throughput_tokens_per_s"][row, column]) / max(_most(grid), 1e-9)
    if verdict == "impossible" or not share >= 0:
        line.append(sign * _CELL)
    elif colours:
        step = min(int(share * len(colours)), len(colours) - 1)
        ink = _LIGHT_INK if step < len(colours) // 2 else _DARK_INK
        line.append(sign.center(_CELL) if sign == "o" else sign * _CELL, style=f"{ink} on {colours[step]}")
    elif sign == " ":
        line.append(_SHADES[1 + min(int(share * 4), 3)] * _CELL)
    else:
        line.append(sign.ljust(_CELL) if sign == "o" else sign * _CELL)


def _most(grid: "PlanGrid") -> float:
    import numpy as np

    throughput = grid.values["throughput_tokens_per_s"]
    return float(np.nanmax(throughput)) if np.isfinite(throughput).any() else 0.0


def _ruler(grid: "PlanGrid") -> str:
    """Return numbers of adapters below their columns, a few of them."""
    ruler = ""
    for column in range(0, grid.adapters.size, 5):
        ruler = ruler.ljust(_CELL * column)
        ruler += f"{grid.adapters[column]:,}"
    return ruler
