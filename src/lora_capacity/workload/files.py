"""Reading a YAML or JSON file into plain data, strictly: nothing is guessed, nothing overwritten."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_capacity.errors import InputError


def load_mapping(path: Path) -> Mapping[str, Any]:
    """Read a file that holds one mapping; ``.json`` is JSON, any other name YAML.

    Args:
        path: The file.

    Returns:
        What it holds: mappings, lists, text, numbers, booleans, None.

    Raises:
        InputError: If it cannot be read, is not YAML or JSON, repeats a key, or holds something else than a mapping.
    """
    form = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "a YAML or JSON file") from None
    except UnicodeDecodeError:
        raise InputError(str(path), "bytes that are no text", f"a {form} file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(str(path), getattr(error, "strerror", None) or str(error), f"a readable {form} file") from None
    data = _parse(path, text, form)
    if not isinstance(data, Mapping):
        found = {list: "a list", type(None): "nothing"}.get(type(data), f"a single value ({str(data)[:40]})")
        raise InputError(str(path), found, "a mapping (lines of 'key: value')")
    return data


def _parse(path: Path, text: str, form: str) -> object:
    try:
        if form == "JSON":
            return json.loads(text, object_pairs_hook=_distinct_pairs)
        return yaml.load(text, Loader=_StrictLoader)
    except InputError as error:
        raise InputError(f"{path}, {error.field}", error.value, error.allowed) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}", error.msg, "valid JSON") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise InputError(where, error.problem or "not understood", "valid YAML") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path} line {line}", f"character {error.character!r}", "printable text") from None
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(str(path), problem, f"valid {form}") from None


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML without repeated keys, and with 1e-3 read as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise InputError(f"line {key.start_mark.line + 1}", key.value, "every key once")
            seen.add((key.tag, str(key.value)))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# YAML 1.1 takes an exponent without a dot before it, or without a sign, for text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _distinct_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"key {repeated}", repeated, "every key once")
    return mapping
