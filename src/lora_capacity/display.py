"""How results show themselves in a shell and in a notebook: a title, facts, a table, a command, warnings."""

import abc
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_capacity.text import printable
from lora_capacity.words import shown


@dataclass(frozen=True)
class Display:
    """What is shown of a result.

    Attributes:
        title: What it comes to, in a line.
        facts: Words by what they are about.
        rows: Rows of a table, all with the same keys, which head its columns.
        command: A command to run.
        warnings: What to keep in mind, a sentence each.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    warnings: Sequence[str] = ()

    def text(self) -> str:
        """Return it as lines of text."""
        width = max(map(len, self.facts), default=0)
        lines = [self.title, *(f"  {name:{width}}  {fact}" for name, fact in self.facts.items())]
        if self.rows:
            table = [list(self.rows[0]), *self._cells()]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += ["  " + "  ".join(map(str.rjust, row, widths)) for row in table]
        warnings = [f"  warning: {sentence}" for sentence in self.warnings]
        return "\n".join(map(printable, [*lines, *warnings, *([self.command] if self.command else [])]))

    def html(self) -> str:
        """Return it as a piece of HTML, with the style that notebooks have for tables."""
        parts = [f"<p><strong>{_escaped(self.title)}</strong></p>"]
        if self.facts:
            rows = [f"<tr><th>{_escaped(name)}</th><td>{_escaped(fact)}</td></tr>" for name, fact in self.facts.items()]
            parts.append(f"<table>{''.join(rows)}</table>")
        if self.rows:
            head = "".join(f"<th>{_escaped(name)}</th>" for name in self.rows[0])
            body = ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in self._cells()]
            parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>")
        parts += [f"<p>Warning: {_escaped(sentence)}</p>" for sentence in self.warnings]
        if self.command:
            parts.append(f"<pre>{_escaped(self.command)}</pre>")
        return f"<div>{''.join(parts)}</div>"

    def _cells(self) -> list[list[str]]:
        return [[shown(value) for value in row.values()] for row in self.rows]


class Displayed(abc.ABC):
    """Base of results that show themselves."""

    @abc.abstractmethod
    def _display(self) -> Display:
        """Return what is shown."""

    def __repr__(self) -> str:
        return self._display().text()

    def _repr_html_(self) -> str:
        return self._display().html()


def _escaped(text: str) -> str:
    return html.escape(printable(text))
