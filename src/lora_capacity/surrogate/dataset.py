"""Labels by the thousand: made in shards that can be taken up again, kept as Parquet with where they come from."""

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from lora_capacity.calibration import Calibration
from lora_capacity.errors import InputError, check_number
from lora_capacity.run.checkpoint import open_folder, package_version, write_whole
from lora_capacity.run.steady import Progress
from lora_capacity.surrogate.discrepancy import Law, play_near_best
from lora_capacity.surrogate.optima import THRESHOLD, Optima, Surfaces, choose, survey
from lora_capacity.surrogate.questions import Questions
from lora_capacity.surrogate.space import Space

SCHEMA_VERSION = 1
SHARD = 128
"""Workloads of a shard."""

_ABOUT = b"lora_capacity"
_MANIFEST = "labels.json"


@dataclass(frozen=True, eq=False)
class Labels:
    """Workloads with their optimum and the surface around it.

    Attributes:
        questions: The workloads and servers.
        optima: The optimum of each, by the steady twin corrected by the event twin.
        surfaces: What the steady twin says around them.
        correction: Logarithm of what the event twin's servers sustain over what the steady twin's do, for each of
            ``surfaces.slots``, ``[workloads, known]``; zeros where nothing was played.
        about: Where they come from: calibration, space, seed, versions, what was played, seconds by part.
    """

    questions: Questions
    optima: Optima
    surfaces: Surfaces
    correction: NDArray[np.float64]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Return the labels of these indices."""
        taken = {name: _rows(getattr(self, name), rows) for name in ("questions", "optima", "surfaces")}
        return dataclasses.replace(self, **taken, correction=self.correction[rows])

    def write(self, path: str | Path) -> None:
        """Write a Parquet file, a row per workload; what it is about stands in the file's metadata.

        Args:
            path: The file.
        """
        columns = {name: column for part in _PARTS for name, column in vars(getattr(self, part)).items()}
        columns["correction"] = self.correction
        table = pyarrow.table({name: _arrow(column) for name, column in columns.items()})
        about = json.dumps(dict(self.about)).encode()
        parquet.write_table(table.replace_schema_metadata({_ABOUT: about}), path, row_group_size=SHARD)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote.

        Raises:
            InputError: If it cannot be read or is no file of labels of this schema.
        """
        try:
            table = parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(str(path), str(error).splitlines()[0], "a Parquet file of labels") from None
        metadata = table.schema.metadata or {}
        if _ABOUT not in metadata:
            raise InputError(str(path), "another table", "labels, as `lora-capacity label` writes them")
        about = json.loads(metadata[_ABOUT])
        if about.get("schema_version") != SCHEMA_VERSION:
            raise InputError(f"{path}: schema_version", about.get("schema_version"), f"{SCHEMA_VERSION}", "label again")
        columns = {name: _numpy(table[name], table.num_rows) for name in table.column_names}
        rows, grid = columns["grid_adapters"].shape
        columns["grid_throughput"] = columns["grid_throughput"].reshape(rows, grid, -1).astype(np.float64)
        parts = {
            name: kind(**{entry.name: columns[entry.name] for entry in fields(kind)}) for name, kind in _PARTS.items()
        }
        return cls(**parts, correction=columns["correction"], about=about)


_PARTS: dict[str, Any] = {"questions": Questions, "optima": Optima, "surfaces": Surfaces}


def make_labels(
    calibration: Calibration,
    space: Space,
    count: int,
    *,
    seed: int = 0,
    played: int = 0,
    parts: Path | None = None,
    progress: Progress | None = None,
) -> Labels:
    """Sample workloads, find the optimum of each by the steady twin, and settle it by the event twin.

    Args:
        calibration: Whose servers they are.
        space: What they are drawn from.
        count: Workloads.
        seed: Whole number >= 0; equal seeds give equal labels.
        played: Of how many, the first ones, the event twin plays configurations near the best; see
            `lora_capacity.surrogate.discrepancy`. 0: the steady twin's word stands.
        parts: Folder for finished shards: the same call goes on from what is there. It stays until deleted.
        progress: Called with the workloads done (a played one counts as done once more), and their total.

    Raises:
        InputError: If a number is not allowed, or ``parts`` holds shards of other labels.
    """
    questions = space.sample(count, seed)
    played = int(check_number("played", played, minimum=0, maximum=count, integer=True))
    about = {
        "schema_version": SCHEMA_VERSION,
        "version": package_version(),
        "calibration": calibration.name,
        "calibration_digest": digest(calibration.to_json()),
        "space": space.to_json(),
        "workloads": count,
        "seed": seed,
        "played": played,
        "threshold": THRESHOLD,
    }
    folder = None if parts is None else _opened(parts, about)
    done = progress or (lambda done, total: None)
    began = time.perf_counter()
    surfaces = _surveyed(calibration, questions, folder, lambda finished: done(finished, count + played))
    by_steady = choose(calibration, questions, surfaces)
    surveyed = time.perf_counter()
    law = _law(calibration, questions, by_steady, surfaces, about, folder, done)
    settled = time.perf_counter()
    correction = np.zeros(surfaces.slots.shape) if law is None else law.correction(questions, surfaces)
    optima = by_steady if law is None else choose(calibration, questions, surfaces, correction)
    seconds = {
        "steady_twin": surveyed - began,
        "event_twin": settled - surveyed,
        "choosing": time.perf_counter() - settled,
    }
    about["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    about["plays"] = {} if law is None else law.report
    return Labels(questions, optima, surfaces, correction, about)


def _surveyed(calibration: Calibration, questions: Questions, folder: Path | None, done: Any) -> Surfaces:
    """Survey shard by shard, but for those that are there."""
    found = []
    for start in range(0, len(questions), SHARD):
        path = None if folder is None else folder / f"shard-{start:07d}.npz"
        rows = slice(start, start + SHARD)
        if path is not None and path.exists():
            with np.load(path) as kept:
                shard = Surfaces(**dict(kept))
        else:
            shard = survey(calibration, questions.take(rows))
            if path is not None:
                write_whole(path, _packed(vars(shard)))
        found.append(shard)
        done(min(start + SHARD, len(questions)))
    return Surfaces(
        **{entry.name: np.concatenate([getattr(shard, entry.name) for shard in found]) for entry in fields(Surfaces)}
    )


def _law(
    calibration: Calibration,
    questions: Questions,
    optima: Optima,
    surfaces: Surfaces,
    about: Mapping[str, Any],
    folder: Path | None,
    done: Progress,
) -> Law | None:
    """Play a part of the workloads and fit the law; none where nothing is to be played."""
    played, count = about["played"], len(questions)
    if not np.any(optima.max_loras[:played]):
        return None
    rows = np.arange(played)
    first, best, around = questions.take(rows), _rows(optima, rows), _rows(surfaces, rows)
    plays = play_near_best(
        calibration,
        first,
        best,
        around,
        seed=about["seed"],
        parts=None if folder is None else folder / "played",
        progress=lambda finished, total: done(count + played * finished // total, count + played),
    )
    return Law(calibration, first, plays)


def _opened(folder: Path, about: Mapping[str, Any]) -> Path:
    """Make the folder, or see that it holds shards of the same labels."""
    open_folder(
        folder,
        _MANIFEST,
        about,
        parts="finished shards",
        other="what is left of other labels",
        allowed="what is left of these: same calibration, space, workloads, seed and version",
        remedy="finish those as they were begun, or delete the folder",
    )
    return folder


def _packed(arrays: Mapping[str, Any]) -> bytes:
    """Return arrays as NumPy keeps several in a file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def digest(content: Any) -> str:
    """Return a digest of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=float).encode()).hexdigest()


def _rows(columns: Any, rows: Any) -> Any:
    return dataclasses.replace(columns, **{name: values[rows] for name, values in vars(columns).items()})


def _arrow(column: NDArray[Any]) -> Any:
    """Return a column, or a column of lists of one length, surfaces in single precision."""
    if column.ndim == 3:
        column = column.reshape(len(column), -1).astype(np.float32)
    if column.ndim == 1:
        return pyarrow.array(column)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.ascontiguousarray(column).ravel()), column.shape[1])


def _numpy(column: Any, rows: int) -> NDArray[Any]:
    if not pyarrow.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy())
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(rows, column.type.list_size))
