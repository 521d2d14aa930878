"""Results kept in a folder as they come, so that long work that was interrupted goes on where it was.

A folder is for one question, told by a digest of all that decides the answer; its files are whole or absent.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from numpy.typing import NDArray

from lora_capacity.errors import InputError
from lora_capacity.files import write_whole
from lora_capacity.scenarios import ClientView, EventDetails, Results, Series

_MANIFEST = "parts.json"
_SUFFIX = ".msgpack"

Part = tuple[NDArray[np.int64], Results]
"""Configurations, by number, and what happened in each."""


class Checkpoint:
    """The batches of one set of configurations, a file each, written whole or not at all."""

    def __init__(self, folder: Path, question: Any) -> None:
        """Open the folder, which is made if absent.

        Args:
            folder: Where the files are.
            question: All that decides what is run, a pytree; the folder is for one question alone.

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
        """Return the batches that are there; files that are damaged are removed, with a warning."""
        found = []
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                found.append(_part(path.read_bytes()))
            except (ValueError, KeyError, TypeError, AttributeError):
                discard(path)
        return found

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


def discard(path: Path) -> None:
    """Remove a damaged part, and warn that it is computed anew."""
    path.unlink(missing_ok=True)
    warnings.warn(f"{path} is damaged: what was in it is computed anew", RuntimeWarning, stacklevel=3)


def _part(content: bytes) -> Part:
    """Return a batch; raises ValueError if it holds something else."""
    nothing = _nothing(Results, client=_nothing(ClientView), events=_nothing(EventDetails, series=_nothing(Series)))
    part = serialization.from_bytes({"rows": None, "results": nothing}, content)
    rows, results = part["rows"], part["results"]
    leaves = jax.tree.leaves(results)
    if rows.ndim != 1 or not leaves or any(len(leaf) != rows.size for leaf in leaves):
        raise ValueError("arrays of other lengths")
    return rows, results


def _nothing(cls: Any, **groups: Any) -> Any:
    return cls(**{field.name: None for field in dataclasses.fields(cls)} | groups)


def open_folder(
    folder: Path, manifest: str, identity: Mapping[str, Any], *, parts: str, other: str, allowed: str, remedy: str
) -> None:
    """Make a folder, or see that it holds the parts of the same work.

    Args:
        folder: The folder.
        manifest: Name of the file in it that tells whose parts they are.
        identity: What tells this work from others, as JSON has it.
        parts: What the folder is for.
        other: What is found where the parts are of other work.
        allowed: What is allowed there.
        remedy: What to do about it.

    Raises:
        InputError: If it holds the parts of other work, or cannot be used.
    """
    path, wanted = folder / manifest, json.loads(json.dumps(dict(identity)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, json.dumps(wanted).encode())
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(folder), str(error), f"a folder of {parts}") from None
    if found != wanted:
        raise InputError(str(folder), other, allowed, remedy)


def package_version() -> str:
    """Return the version of lora-capacity."""
    try:
        return version("lora-capacity")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
