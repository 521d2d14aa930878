"""How results are printed: JSON documents, and tables for people."""

import codecs
import io
import math
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.text import printable, printable_lines
from lora_capacity.words import duration, gibibytes, percent, shown, spoken

__all__ = [
    "duration",
    "gibibytes",
    "percent",
    "print_command",
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

_GAP = 3
"""Blanks between two columns of a table, at most."""

_COMMAND_WIDTH = 76
"""Characters of a line of a command: it and its backslash fit a terminal of 80."""


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


def say(text: str, *, err: bool = False, wrap: bool = False) -> None:
    """Print lines of text; what a terminal would act upon is shown as an escape.

    Args:
        text: The lines.
        err: Whether to stderr.
        wrap: Whether lines longer than a terminal go on in the next one, between words.
    """
    text = printable_lines(text)
    click.echo(_wrapped(text) if wrap else text, file=sys.stderr if err else sys.stdout)


def _wrapped(text: str) -> str:
    if not sys.stdout.isatty():
        return text
    width = terminal().width
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
    )


def print_json(document: Any) -> None:
    """Print a JSON document; what is no number (NaN, infinite) becomes null."""
    import json

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
    """Print rows that share their keys, which head the columns; numbers to the right.

    Columns that say the same in every row are told once, below the table. Where the terminal has no room for all, the
    others follow in further tables that begin with the same first column: no word and no number is broken.
    """
    from rich import box
    from rich.table import Table

    if not rows:
        say(f"{title}: {empty}\n")
        return
    columns = {printable(name): [printable(shown(row[name])) for row in rows] for name in rows[0]}
    numeric = [all(row[name] is None or isinstance(row[name], int | float) for row in rows) for name in rows[0]]
    right = dict(zip(columns, numeric, strict=True))
    first, *others = columns
    same = [name for name in others if len(rows) > 1 and len(set(columns[name])) == 1]
    shown_apart = [name for name in others if name not in same]
    least = {name: _least_width(name, cells, whole=name == first or right[name]) for name, cells in columns.items()}
    roomy = sum(max(map(len, [name, *columns[name]])) + _GAP for name in (first, *shown_apart)) <= terminal().width
    for place, names in enumerate([[first, *shown_apart]] if roomy else _that_fit(least, first, shown_apart)):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
        table.title = None if place else printable(title)
        for name in names:
            # No more than its words need where room is scarce; rich would cut it off where cells may not wrap.
            head = name if roomy else textwrap.fill(name, max(least[name], 1), break_on_hyphens=False)
            whole = name == first or right[name]
            table.add_column(head, justify="right" if right[name] else "left", overflow="fold", no_wrap=whole)
        for cells in zip(*(columns[name] for name in names), strict=True):
            table.add_row(*cells)
        _print(table)
    if same:
        say(f"In every row: {', '.join(f'{name} {columns[name][0]}' for name in same)}\n", wrap=True)


def _least_width(name: str, cells: Sequence[str], *, whole: bool) -> int:
    """Return the characters that a column needs for no word of it to break; ``whole``: for no cell to."""
    words = cells if whole else [word for cell in cells for word in cell.split()]
    return max(map(len, [*name.split(), *words]), default=0)


def _that_fit(least: Mapping[str, int], first: str, others: Sequence[str]) -> list[list[str]]:
    """Share columns out to tables that fit the terminal, each with the first one."""
    room = left = terminal().width - least[first] - _GAP
    tables: list[list[str]] = [[first]]
    for name in others:
        if least[name] + _GAP > left and len(tables[-1]) > 1:
            tables.append([first])
            left = room
        tables[-1].append(name)
        left -= least[name] + _GAP
    return tables


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print named values one a line."""
    from rich.table import Table
    from rich.text import Text

    _print(Text(printable(title), style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in facts.items():
        table.add_row(f"  {printable(name)}", printable_lines(value))
    _print(table)
    click.echo()


def print_command(line: str) -> None:
    """Print a command that a shell takes, over several lines if it is long."""
    say(folded(line))


def folded(line: str, width: int = _COMMAND_WIDTH) -> str:
    """Return a command over as many lines as it needs to be no wider, broken before options."""
    parts: list[str] = []
    for word in map(shlex.quote, shlex.split(line)):
        if word.startswith("-") or not parts:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


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
    bar.truncate(_BAR_WIDTH + 2, overflow="ellipsis")
    mark = Text(" " * (2 + round(limit * _BAR_WIDTH)) + f"^ {limit:.0%}", style="dim")
    for line in (Text(title, style="bold"), bar, mark, legend):
        _print(line)
    click.echo()


def print_warnings(sentences: Iterable[str]) -> None:
    """Print what the user should know, a line each."""
    for sentence in sentences:
        told = _wrapped(f"warning: {printable(sentence)}").removeprefix("warning:")
        click.echo(click.style("warning:", fg="yellow") + told, file=sys.stdout)


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
