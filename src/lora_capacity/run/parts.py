"""Batches kept in a folder as they are played, so that what was interrupted goes on where it was."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from numpy.typing import NDArray

from lora_capacity.run.checkpoint import open_folder, package_version, write_whole
from lora_capacity.scenarios import EventDetails, Results, Series

_MANIFEST = "parts.json"
_SUFFIX = ".msgpack"

Part = tuple[NDArray[np.int64], Results]
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
        open_folder(
            folder,
            _MANIFEST,
            {"version": package_version(), "question": fingerprint(question)},
            parts="finished batches",
            other="what is left of another sweep",
            allowed="what is left of this one: same workload, calibration, settings, seed and version",
            remedy="finish that one as it was begun, or delete the folder",
        )

    def load(self) -> list[Part]:
        """Return the batches that are there."""
        nothing = _nothing(Results, events=_nothing(EventDetails, series=_nothing(Series)))
        template = {"rows": None, "results": nothing}
        found = [
            serialization.from_bytes(template, path.read_bytes()) for path in sorted(self.folder.glob(f"*{_SUFFIX}"))
        ]
        return [(part["rows"], part["results"]) for part in found]

    def save(self, rows: NDArray[np.int64], results: Results) -> None:
        """Keep a batch."""
        content = serialization.to_bytes({"rows": rows, "results": results})
        write_whole(self.folder / f"{int(rows.min()):09d}{_SUFFIX}", content)


def fingerprint(question: Any) -> str:
    """Return a digest of the leaves of a pytree, their shapes and their places in it."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(question):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _nothing(cls: Any, **groups: Any) -> Any:
    return cls(**{field.name: None for field in dataclasses.fields(cls)} | groups)
