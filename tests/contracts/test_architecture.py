"""The shape of the library: its tree as its page tells it, imports without circles, nothing written twice."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LIBRARY = REPOSITORY / "src" / "lora_capacity"
PAGE = REPOSITORY / "docs" / "architecture.md"

MOST_TIED = 0.4
"""Share of the pairs of rooms (folders and modules directly below the library) that may be tied by an import."""

FREE_FOR_ALL = {"errors", "units"}
"""Rooms that any other may know: whatever refuses a value or converts a unit needs them, and they know none."""

SAME_LINES = 6
"""As many equal lines in a row, blank ones, comments, imports and lone punctuation apart, are a copy."""


def test_the_page_tells_the_tree() -> None:
    told = re.findall(
        r"^    (\w+)/? {2,}\S", _block(PAGE.read_text(encoding="utf-8"), "src/lora_capacity/"), re.MULTILINE
    )
    there = sorted(path.stem for path in LIBRARY.iterdir() if _is_room(path))
    assert sorted(told) == there


def test_every_file_that_the_page_names_is_there() -> None:
    named = re.findall(
        r"`([\w./-]+/[\w.-]+\.(?:py|md|toml|json|ya?ml)|(?:src|cli|profiling|tests|docs)/[\w./-]+/)`",
        PAGE.read_text("utf-8"),
    )
    assert len(named) >= 10
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_no_circle_of_imports() -> None:
    imports, done = _imports(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for each in sorted(imports[module]):
                visit(each, (*path, module))
            done.add(module)

    for module in sorted(imports):
        visit(module, ())


def test_few_rooms_are_tied() -> None:
    rooms = {path.stem for path in LIBRARY.iterdir() if _is_room(path)} - FREE_FOR_ALL
    tied = {
        frozenset((_room(module), _room(other)))
        for module, others in _imports().items()
        for other in others
        if _room(module) != _room(other) and {_room(module), _room(other)} <= rooms
    }
    possible = len(rooms) * (len(rooms) - 1) / 2
    assert len(tied) <= MOST_TIED * possible, f"{len(tied)} of {possible:.0f} pairs of {len(rooms)} rooms are tied"


def test_nothing_stands_twice() -> None:
    places = defaultdict(list)
    for path in sorted(LIBRARY.rglob("*.py")):
        lines = [
            (number, " ".join(line.split()))
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if re.search(r"\w", line) and not re.match(r"\s*(#|import |from )", line)
        ]
        for first in range(len(lines) - SAME_LINES + 1):
            key = "\n".join(line for _, line in lines[first : first + SAME_LINES])
            places[key].append(f"{path.relative_to(LIBRARY)}:{lines[first][0]}")
    assert [each for each in places.values() if len(each) > 1] == []


@cache
def _imports() -> dict[str, set[str]]:
    """Return the modules of the library that each imports, imports within functions included."""
    modules = {
        ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in LIBRARY.rglob("*.py")
    }
    del modules["lora_capacity"]  # its public names are loaded as they are first used
    found: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora_capacity."):
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in modules else node.module for name in whole} - {module}
    return found


def _room(module: str) -> str:
    return module.split(".")[1]


def _is_room(path: Path) -> bool:
    return (path.is_dir() and (path / "__init__.py").exists()) or (path.suffix == ".py" and path.stem != "__init__")


def _block(page: str, first: str) -> str:
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if block.lstrip().startswith(first))
