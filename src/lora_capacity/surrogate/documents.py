"""JSON documents of surrogates: a schema version, the content, and a digest by which a changed one is found."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_capacity.calibration import Calibration
from lora_capacity.calibration.model import RENAMED_IN_2
from lora_capacity.errors import InputError

SCHEMA_VERSION = 1
"""Version of the files that this code writes and reads."""


def digest(content: Any) -> str:
    """Return a digest of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=float).encode()).hexdigest()


def calibration_digest(calibration: Calibration) -> str:
    """Return a digest of a calibration's content, by which labels and surrogates know theirs.

    Names are those of schema version 1 of its file, so that what was made before a renaming still holds.
    """
    return digest(_as_version_1(calibration.to_json() | {"schema_version": 1}))


def _as_version_1(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    old = {new: old for old, new in RENAMED_IN_2.items()}
    return {old.get(name, name): _as_version_1(value) for name, value in content.items()}


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of some content: with schema version and digest."""
    whole = {"schema_version": SCHEMA_VERSION, **content}
    return whole | {"digest": digest(whole)}


def verified(content: object, source: str, key: str, kind: str) -> dict[str, Any]:
    """Return the content of a document that `signed` made.

    Args:
        content: The document.
        source: Where it comes from, for messages.
        key: A key that tells such documents from others.
        kind: What such a document is.

    Raises:
        InputError: If it is another document, of another schema version, or was changed since it was made.
    """
    if not isinstance(content, Mapping):
        raise InputError(source, type(content).__name__, "a JSON object")
    if key not in content:
        raise InputError(source, "another document", kind)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        remedy = "update lora-capacity" if isinstance(version, int) and version > SCHEMA_VERSION else "train again"
        raise InputError(f"{source}: schema_version", version, f"{SCHEMA_VERSION}, of {kind}", remedy)
    whole = {name: value for name, value in content.items() if name != "digest"}
    if content.get("digest") != digest(whole):
        raise InputError(
            f"{source}: digest", content.get("digest"), "that of its content", "it was changed: train again"
        )
    del whole["schema_version"]
    return whole


def read_document(path: str | Path, allowed: str) -> Any:
    """Read a JSON file.

    Raises:
        InputError: If it cannot be read or is no JSON; says what is allowed.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(str(path), error.strerror or "unreadable", allowed) from None
    except ValueError as error:
        raise InputError(str(path), f"no JSON: {error}", allowed) from None


def write_document(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write a document, compact."""
    Path(path).write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
