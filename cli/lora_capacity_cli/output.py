"""How results are printed: JSON documents, and tables for people."""

import codecs
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.text import printable, printable_lines
from lora_capacity.words import duration, gibibytes, percent, shown, spoken

__all__ = [
    "duration",
    "gibibytes",
    "percent",
    "print_facts",
    "print_json",
    "print_table",
    "print_warnings",
    "say",
    "shown",
    "speak_any_encoding",
    "spoken",
    "stacked_bar",
    "terminal",
]

if TYPE_CHECKING:
    from rich.console import Console

_BAR_WIDTH = 72
"""Characters of a bar: it fits a terminal of 80."""

_PIECES = (("█", "blue"), ("▓", "magenta"), ("▒", "cyan"), ("░", "yellow"), ("▚", "white"), ("▞", "green"))
"""Characters and colours of a bar's pieces, told apart without colours too."""

_SPELT = {
    **dict.fromkeys("–—−", "-"),
    "±": "+-",
    "·": "*",
    "×": "x",
    "≥": ">=",
    "≤": "<=",
    "…": "...",
    "²": "2",
    "∞": "inf",
    "→": "->",
}
"""Characters that encodings may lack, in ASCII; others become escapes."""

_PLAIN_WIDTH = 132
"""Columns of a table in a file or pipe: room for the widest one without folding."""


def speak_any_encoding() -> None:
    """Let stdout and stderr spell what their encoding has no character for, in place of failing.

    Files are named to `click.echo` then: it would write UTF-8 to those that it opens itself in place of ASCII ones.
    """
    codecs.register_error("spell", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spell")


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    blocks = dict(zip((piece for piece, _ in _PIECES), "#%+=@*", strict=True))
    spelt = (blocks.get(each) or _SPELT.get(each) or ascii(each)[1:-1] for each in missing)
    return "".join(spelt), error.end


def say(text: str, *, err: bool = False) -> None:
    """Print lines of text; what a terminal would act upon is shown as an escape.

    Args:
        text: The lines.
        err: Whether to stderr.
    """
    click.echo(printable_lines(text), file=sys.stderr if err else sys.stdout)


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
        say(f"{title}: {empty}\n")
        return
    table = Table(title=printable(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(rows[0]):
        numeric = all(isinstance(row[name], (int, float)) or row[name] is None for row in rows)
        table.add_column(printable(name), justify="right" if numeric else "left", overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(printable(shown(value)) for value in row.values()))
    _print(table)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print named values one a line."""
    from rich.table import Table
    from rich.text import Text

    _print(Text(printable(title), style="bold"))
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"  {printable(name)}", printable_lines(value))
    _print(table)
    click.echo()


def stacked_bar(title: str, shares: Mapping[str, float], limit: float) -> None:
    """Print parts of a whole as one bar, and what each piece of it is.

    Args:
        title: What is above it.
        shares: Share of the whole by name.
        limit: Share up to which the parts may reach; it is marked.
    """
    from rich.text import Text

    bar, legend, end = Text("  "), Text("  "), 0.0
    for place, (name, share) in enumerate(shares.items()):
        letter, colour = _PIECES[place % len(_PIECES)]
        width = round((end + share) * _BAR_WIDTH) - round(end * _BAR_WIDTH)
        bar.append(letter * width, style=colour)
        legend.append(f"{letter} ", style=colour)
        legend.append(f"{printable(name)} {share:.0%}  ")
        end += share
    bar.append("·" * (_BAR_WIDTH - round(end * _BAR_WIDTH)), style="dim")
    mark = Text(" " * (2 + round(limit * _BAR_WIDTH)) + f"^ {limit:.0%}", style="dim")
    for line in (Text(title, style="bold"), bar, mark, legend):
        _print(line)
    click.echo()


def print_warnings(sentences: Iterable[str]) -> None:
    """Print what the user should know, a line each."""
    for sentence in sentences:
        click.echo(click.style("warning: ", fg="yellow") + printable(sentence), file=sys.stdout)


def terminal() -> "Console":
    """Return where tables go: stdout, without colours where that is no terminal."""
    from rich.console import Console as RichConsole

    class Console(RichConsole):
        """A console that leaves it to the command to end where its reader has gone; rich would end with 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # A pipe has no width of its own; rich would cut at 80 columns.
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, emoji=False, markup=False)


def _print(renderable: Any) -> None:
    terminal().print(renderable)
