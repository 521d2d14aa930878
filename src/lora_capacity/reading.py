"""Reading files of unknown origin: text of a known size, and JSON and YAML as plain data, strictly.

Nothing is guessed and nothing overwritten: a key stands once, a number is written in one way, and what refers to
itself or is nested too deeply is refused before anyone walks through it.
"""

import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from lora_capacity.errors import NO_SUCH_FILE, InputError

MAX_TEXT_BYTES = 2**28
"""Largest file that is read as a whole: 256 MiB, ten times the largest table of ours."""

MAX_NODES = 1_000_000
"""Most values in a YAML file: references to others, and references to those, multiply within a few lines."""

MAX_DEPTH = 32
"""Deepest nesting of JSON and YAML; files of ours have 8 levels."""


def read_text(path: Path, allowed: str, errors: Literal["strict", "replace"] = "strict") -> str:
    """Return the text of an ordinary file, without a byte order mark.

    Args:
        path: The file.
        allowed: What it should be, in words.
        errors: What becomes of bytes that are no text: refused, or replaced, as in logs, where they are of no matter.

    Raises:
        InputError: If there is no such file, it is a folder, a device or a pipe, is larger than `MAX_TEXT_BYTES`,
            cannot be read, or is no text.
    """
    size = check_ordinary(path, allowed)
    if size > MAX_TEXT_BYTES:
        shown = f"{size / 2**20:,.0f} MiB"
        raise InputError(str(path), shown, f"{allowed} of at most {MAX_TEXT_BYTES // 2**20} MiB")
    try:
        text = path.read_bytes().decode("utf-8-sig", errors)
    except UnicodeDecodeError:
        raise InputError(str(path), "bytes that are no text", f"{allowed}, in UTF-8") from None
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error), allowed) from None
    if "\0" in text and errors == "strict":
        raise InputError(str(path), "a NUL character", allowed)
    return text


def check_ordinary(path: Path, allowed: str) -> int:
    """Return the bytes of an ordinary file.

    Args:
        path: The file.
        allowed: What it should be, in words.

    Raises:
        InputError: If there is no such file, or it is a folder, a device or a pipe.
    """
    try:
        about = path.stat()
    except FileNotFoundError:
        raise InputError(str(path), NO_SUCH_FILE, allowed) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(str(path), getattr(error, "strerror", None) or str(error), allowed) from None
    if stat.S_ISDIR(about.st_mode):
        raise InputError(str(path), "a folder", allowed)
    if not stat.S_ISREG(about.st_mode):
        raise InputError(str(path), "no ordinary file", allowed)
    return about.st_size


def read_json(path: str | Path, allowed: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        allowed: What it should be, in words.

    Raises:
        InputError: If it cannot be read, or as `parse_json`.
    """
    return parse_json(read_text(Path(path), allowed), str(path), allowed)


def parse_json(text: str, source: str, allowed: str = "valid JSON") -> Any:
    """Return what JSON text holds: mappings, lists, text, finite numbers, booleans, None.

    Args:
        text: The text.
        source: What to call it in messages.
        allowed: What it should be, in words.

    Raises:
        InputError: If it is no JSON, repeats a key, has a number that is none (NaN, Infinity), or is nested too deeply.
    """
    try:
        data = json.loads(text, object_pairs_hook=_distinct_pairs, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise InputError(f"{source} line {error.lineno}", f"not JSON ({error.msg})", allowed) from None
    except InputError as error:
        raise InputError(f"{source}, {error.field}", error.value, error.allowed) from None
    except RecursionError:
        raise InputError(source, "nested too deeply", f"at most {MAX_DEPTH} levels") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(source, f"not JSON ({error})", allowed) from None
    _check_depth(data, source)
    return data


def parse_yaml(text: str, source: str) -> Any:
    """Return what YAML text holds: mappings, lists, text, finite numbers, booleans, None.

    Numbers are written as in JSON: ``1:30`` and ``0600`` are text, not 90 and 384.

    Args:
        text: The text.
        source: What to call it in messages.

    Raises:
        InputError: If it is no YAML, repeats a key, multiplies itself by references, or is nested too deeply.
    """
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except InputError as error:
        raise InputError(f"{source}, {error.field}", error.value, error.allowed, error.remedy) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source} line {mark.line + 1}" if mark else source
        raise InputError(where, error.problem or "not understood", "valid YAML") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{source} line {line}", f"character {error.character!r}", "printable text") from None
    except RecursionError:
        raise InputError(source, "nested too deeply", f"at most {MAX_DEPTH} levels") from None
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:  # PyYAML's own constructors
        raise InputError(source, str(error), "valid YAML") from None
    _check_depth(data, source)
    return data


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Read a file that holds one mapping with names for keys; ``.json`` is JSON, any other name YAML.

    Raises:
        InputError: If it cannot be read, as `parse_json` and `parse_yaml`, or if it holds something else.
    """
    is_json = path.suffix.lower() == ".json"
    text = read_text(path, "a JSON file" if is_json else "a YAML or JSON file")
    data = parse_json(text, str(path)) if is_json else parse_yaml(text, str(path))
    if not isinstance(data, Mapping):
        found = {list: "a list", type(None): "nothing"}.get(type(data), f"a single value ({str(data)[:40]})")
        raise InputError(str(path), found, "a mapping (lines of 'key: value')")
    return data


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML without repeated keys, references, or the numbers of YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in each if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MAX_NODES:
            allowed = f"at most {MAX_NODES:,} values, references (*) written out"
            raise InputError("the file", "more values, or one within itself", allowed)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            where = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(where, "a list or mapping", "names for keys")
            if (key.tag, key.value) in seen:
                raise InputError(where, key.value, "every key once")
            seen.add((key.tag, key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$", re.ASCII), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$", re.ASCII),
    list("-+.0123456789"),
)


def _written_out(node: Any, known: dict[int, float]) -> float:
    """Return how many values a node holds once references are written out; infinite if it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # while it is open
        inner = node.value if isinstance(node.value, list) else ()
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def _distinct_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"key {repeated}", repeated, "every key once")
    return mapping


def _no_number(name: str) -> float:
    raise InputError("a value", name, "finite numbers")


def _check_depth(data: object, source: str) -> None:
    """Refuse what is nested too deeply, level by level."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return
    raise InputError(source, "nested too deeply", f"at most {MAX_DEPTH} levels")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()
