"""How answers are printed: JSON documents, and tables for people."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from lora_capacity.units import BYTES_PER_GIB, MS_PER_S

_PLAIN_WIDTH = 132
_LONG_S = 10.0


def print_json(document: Any) -> None:
    """Print a JSON document; what is no number (NaN, infinite) becomes null."""
    click.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return the value in Python's own types, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, rows: Sequence[Mapping[str, Any]], *, empty: str = "none") -> None:
    """Print rows that share their keys, which head the columns; numbers to the right."""
    from rich import box
    from rich.table import Table

    if not rows:
        click.echo(f"{title}: {empty}\n")
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(rows[0]):
        numeric = all(isinstance(row[name], (int, float)) or row[name] is None for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(shown(value) for value in row.values()))
    _print(table)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print named values one a line."""
    from rich.table import Table
    from rich.text import Text

    _print(Text(title, style="bold"))
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"  {name}", value)
    _print(table)
    click.echo()


def print_warnings(sentences: Iterable[str]) -> None:
    """Print what the user should know, a line each."""
    for sentence in sentences:
        click.echo(click.style("warning: ", fg="yellow") + sentence)


def shown(value: Any) -> str:
    """Return a value as tables show it: three significant digits, thousands with commas, a dash for no number."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def duration(value_s: float) -> str:
    """Return a time as tables show it: in milliseconds, from ten seconds on in seconds."""
    if math.isnan(value_s):
        return "–"
    return f"{shown(value_s)} s" if value_s >= _LONG_S else f"{shown(value_s * MS_PER_S)} ms"


def percent(share: float) -> str:
    """Return a share as tables show it."""
    return "–" if math.isnan(share) else f"{shown(100.0 * share)} %"


def gibibytes(value_bytes: float) -> str:
    """Return an amount of memory as tables show it."""
    return "–" if math.isnan(value_bytes) else f"{value_bytes / BYTES_PER_GIB:.2f} GiB"


def bound_words(limit: str) -> str:
    """Return what holds a server back, in words; a dash where it does not start."""
    return {"": "–", "none": "nothing", "kv_cache": "KV cache"}.get(limit, limit.replace("_", " "))


def _print(renderable: Any) -> None:
    from rich.console import Console

    # A pipe has no width of its own; rich would cut at 80 columns.
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(width=width, highlight=False, emoji=False, markup=False).print(renderable)
