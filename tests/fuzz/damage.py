"""Ways to damage content: of documents, of tables, of bytes."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (0, -1, -0.5, 0.5, 1, 7, 2**31, 2**53 + 1, 10**20, 10**400, 1e39, 1e-46, 1e300, -1e300, 1e9, 0.1 + 0.2)
TEXTS = (
    *("", " ", "none", "nan", "inf", "-inf", "1:30", "0600", "1_0", "1,5", "١٢", "1e3", "0x10", "true", "null"),
    *("\x1b[2J\x1b]0;title\x07", "a\x00b", "\u202eabc", "[bold]x[/bold]", "<script>alert(1)</script>", "../../x"),
    *("é", "\ud800", "x" * 5000, "'", '"', "{{7*7}}", "=1+1", "\r\n", "ok"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1], {"a": 1}, [None], {"value": "x"}, [1, 2, 3])
ROOTS: tuple[Any, ...] = ([], None, 7, "text", {}, [{}], True)


def deep(levels: int) -> Any:
    """Return a list within a list, so many levels down."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def anything(rng: random.Random) -> Any:
    """Return some value that does not belong."""
    kind = rng.randrange(8)
    if kind == 0:
        return deep(rng.choice((5, 50, 300)))
    if kind == 1:
        return float(rng.choice(("nan", "inf", "-inf")))
    # A copy: what is put into a document is changed there.
    return copy.deepcopy(rng.choice((NUMBERS, TEXTS, OTHERS)[kind % 3]))


def document(content: Any, rng: random.Random) -> Any:
    """Return content with one to three places changed: values, keys, whole parts."""
    if rng.random() < 0.03:
        return copy.deepcopy(rng.choice(ROOTS))
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            return content
        parent, key = rng.choice(places)
        _change(parent, key, rng)
    return content


def _places(value: Any, levels: int = 12) -> Any:
    """Yield the places of a document: what it is in, and where; of long lists a few."""
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))[:3]
    else:
        return
    for key, each in inner:
        yield value, key
        if levels:
            yield from _places(each, levels - 1)


def _change(parent: Any, key: Any, rng: random.Random) -> None:
    value, kind = parent[key], rng.randrange(9)
    if kind <= 1:
        del parent[key]
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice((f"{key}s", str(key)[:-1], rng.choice(TEXTS)))] = parent.pop(key)
    elif kind == 3 and isinstance(value, list) and value:
        parent[key] = rng.choice((value[:-1], value + value[-1:], value * 3, [value]))
    elif kind == 4 and isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = rng.choice((-value, value * 10**6, str(value)[::-1], str(value), [value], [value, value]))
    elif kind == 5 and isinstance(value, str):
        parent[key] = value + rng.choice(TEXTS)
    else:
        parent[key] = anything(rng)


def as_json(content: Any) -> bytes:
    """Return JSON as a careless program writes it: NaN and infinity as they are."""
    return json.dumps(content).encode()


def text(content: bytes, rng: random.Random) -> bytes:
    """Return bytes cut, repeated, overwritten, or with one word in place of another."""
    kind = rng.randrange(8)
    place = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 40)))) + content[place:]
    if kind == 2:
        return content[:place] + content[place // 2 :]
    if kind == 3:
        return b"\xef\xbb\xbf" * rng.choice((1, 2)) + content
    if kind == 4:
        return content.decode(errors="replace").encode(rng.choice(("utf-16", "utf-32")))
    if kind == 5:
        return rng.choice(
            (b"", b"\x00", b"\n" * 50, b"[" * 100_000, b"{" * 100_000, b"&a [*a]", b"- " * 5000, b"a: " * 300)
        )
    words = content.split()
    if not words:
        return content
    word = rng.choice(words)
    other = rng.choice([*TEXTS, *map(str, NUMBERS)]).encode(errors="surrogatepass")
    return content.replace(word, other, 1)


def table(content: bytes, rng: random.Random) -> bytes:
    """Return a CSV table with a cell, a column or a row changed."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    row, kind = rng.randrange(len(rows)), rng.randrange(9)
    column = rng.randrange(len(rows[row]))
    if kind <= 3:
        rows[row][column] = rng.choice([*TEXTS, *map(str, NUMBERS), "1;5", "-", "1e-3", "3 4", "8 x"])
    elif kind == 4:
        rows[row].insert(column, rng.choice(("", "5")))
    elif kind == 5:
        del rows[row][column]
    elif kind == 6:
        for each in rows:
            each.append(each[min(column, len(each) - 1)])
    elif kind == 7:
        for each in rows:
            del each[min(column, len(each) - 1)]
    else:
        rows = rng.choice((rows[:1], rows[1:], rows + rows[1:], [], [*rows, []]))
    return "\n".join(map(",".join, rows)).encode(errors="surrogatepass") + rng.choice((b"\n", b"", b"\r\n"))


Damage = Callable[[bytes, random.Random], bytes]
