"""Batches kept in a folder as they are played, so that what was interrupted goes on where it was."""

import dataclasses
import hashlib
import json
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from numpy.typing import NDArray

from lora_capacity.errors import InputError
from lora_capacity.twin import Results
from lora_capacity.twin.events import EventResults, Series

_MANIFEST = "parts.json"
_SUFFIX = ".msgpack"

Part = tuple[NDArray[np.int64], EventResults]
"""Configurations, by number, and what happened in each."""


class Parts:
    """The batches of one set of configurations, a file each, written whole or not at all."""

    def __init__(self, folder: Path, question: Any) -> None:
        """Open the folder, which is made if absent.

        Args:
            folder: Where the files are.
            question: All that decides what is played, a pytree; the folder is for one question alone.

        Raises:
            InputError: If the folder holds the batches of another question, or cannot be used.
        """
        self.folder = folder
        identity = {"version": _version(), "question": fingerprint(question)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            manifest = folder / _MANIFEST
            if not manifest.exists():
                _write(manifest, json.dumps(identity).encode())
            if json.loads(manifest.read_text(encoding="utf-8")) != identity:
                raise InputError(
                    str(folder),
                    "what is left of another sweep",
                    "what is left of this one: same workload, calibration, settings, seed and version",
                    "finish that one as it was begun, or delete the folder",
                )
        except (OSError, ValueError) as error:
            raise InputError(str(folder), str(error), "a folder of finished batches") from None

    def load(self) -> list[Part]:
        """Return the batches that are there."""
        nothing = dataclasses.replace(_nothing(EventResults), settled=_nothing(Results), series=_nothing(Series))
        template = {"rows": None, "results": nothing}
        found = [
            serialization.from_bytes(template, path.read_bytes()) for path in sorted(self.folder.glob(f"*{_SUFFIX}"))
        ]
        return [(part["rows"], part["results"]) for part in found]

    def save(self, rows: NDArray[np.int64], results: EventResults) -> None:
        """Keep a batch."""
        content = serialization.to_bytes({"rows": rows, "results": results})
        _write(self.folder / f"{int(rows.min()):09d}{_SUFFIX}", content)


def fingerprint(question: Any) -> str:
    """Return a digest of the leaves of a pytree, their shapes and their places in it."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(question):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def _nothing(cls: Any) -> Any:
    return cls(**{field.name: None for field in dataclasses.fields(cls)})


def _version() -> str:
    try:
        return version("lora-capacity")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
