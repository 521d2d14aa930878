"""HTML as text: elements, figures and tables, with everything that is not markup escaped."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

_VOID = {"input", "br", "hr"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(words: str) -> Markup:
    """Return text as markup."""
    return Markup(words if isinstance(words, Markup) else html.escape(words))


def joined(*parts: str) -> Markup:
    """Return parts one after the other, those that are no `Markup` escaped."""
    return Markup("".join(map(escape, parts)))


def node(name: str, /, *content: str, **attributes: Any) -> Markup:
    """Return an element; content that is no `Markup` is escaped, attributes that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = joined(*content)
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{inside}</{name}>")


def figure(drawing: str, caption: str, *more: str) -> Markup:
    """Return a drawing with its caption, if any."""
    below = node("figcaption", caption, *more) if caption else ""
    return node("figure", Markup(drawing), below)


def table(caption: str, rows: Sequence[Mapping[str, str]], *, words: int = 1) -> Markup:
    """Return a table of texts; the first columns, which are words, stand to the left, numbers to the right.

    Args:
        caption: What it shows.
        rows: Texts by column heading; the first is the row's heading.
        words: How many columns are words.
    """
    names = list(rows[0]) if rows else []
    kinds = [None if i < words else "n" for i in range(len(names))]
    head = node("tr", *(node("th", name, scope="col", class_=kind) for name, kind in zip(names, kinds, strict=True)))
    body = [
        node(
            "tr",
            node("th", row[names[0]], scope="row"),
            *(node("td", row[name], class_=kind) for name, kind in zip(names[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    whole = node("table", node("caption", caption), node("thead", head), node("tbody", *body))
    return node("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(caption: str, told: Mapping[str, str]) -> Markup:
    """Return named facts as a table."""
    rows = [node("tr", node("th", name, scope="row"), node("td", value)) for name, value in told.items()]
    return node("table", node("caption", caption), node("tbody", *rows), class_="facts")


def tabled(summary: str, content: Markup) -> Markup:
    """Return what stays closed until it is asked for: the values of a figure as a table."""
    return node("details", node("summary", summary), content)
