"""JSON files of what is learnt: a schema version, the content, and a digest by which a changed one is found."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.calibration.model import RENAMED_IN_2
from lora_capacity.errors import InputError
from lora_capacity.files import write_whole
from lora_capacity.reading import read_json

SCHEMA_VERSION = 1
"""Version of the files that this code writes and reads."""


def listed(values: Any, digits: int) -> Any:
    """Return an array, or a number, as JSON has it; what is not whole keeps some significant digits."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        array = np.vectorize(lambda number: float(f"{number:.{digits}g}"), otypes=[float])(array)
    return array.tolist()


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


class LearntFile:
    """Base of what is kept in such a file.

    Attributes:
        kind: What it is, for messages.
        key: A key of its content that tells its files from others.
        command: What writes it.
    """

    kind: ClassVar[str]
    key: ClassVar[str]
    command: ClassVar[str]

    def content(self) -> dict[str, Any]:
        """Return what stands in the file besides version and digest."""
        raise NotImplementedError

    @classmethod
    def from_content(cls, content: dict[str, Any], source: str) -> Self:
        """Rebuild what `content` returned.

        Raises:
            InputError: If it does not hold together.
        """
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return what stands in the file."""
        whole = {"schema_version": SCHEMA_VERSION, **self.content()}
        return whole | {"digest": digest(whole)}

    @classmethod
    def from_json(cls, content: object, source: str = "") -> Self:
        """Rebuild what `to_json` returned.

        Raises:
            InputError: If it is another document, of another schema version, was changed since it was made, or does
                not hold together.
        """
        source = source or cls.kind
        if not isinstance(content, Mapping):
            raise InputError(source, type(content).__name__, "a JSON object")
        if cls.key not in content:
            raise InputError(source, "another document", f"a {cls.kind}")
        version = content.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            remedy = "update lora-capacity" if isinstance(version, int) and version > SCHEMA_VERSION else "train again"
            raise InputError(f"{source}: schema_version", version, f"{SCHEMA_VERSION}, of a {cls.kind}", remedy)
        whole = {name: value for name, value in content.items() if name != "digest"}
        known = content.get("digest")
        if known != digest(whole):
            raise InputError(f"{source}: digest", known, "that of its content", "it was changed: train again")
        del whole["schema_version"]
        return cls.from_content(whole, source)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            InputError: If it cannot be read or is no JSON, or as `from_json`.
        """
        content = read_json(path, f"a file written by `lora-capacity {cls.command}`")
        return cls.from_json(content, str(path))

    def write(self, path: str | Path) -> None:
        """Write the file, compact, whole or not at all."""
        write_whole(path, json.dumps(self.to_json(), separators=(",", ":")) + "\n")
