"""Labels by the thousand: made in shards, so that work goes on where it stopped; a Parquet file with its provenance."""

import contextlib
import dataclasses
import functools
import io
import json
import time
import zipfile
import zlib
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
from lora_capacity.files import write_whole
from lora_capacity.reading import parse_json
from lora_capacity.run.checkpoint import discard, open_folder, package_version
from lora_capacity.run.steady import Progress
from lora_capacity.run.tasks import run_tasks
from lora_capacity.scenarios import STARVED_SHORTFALL
from lora_capacity.scenarios.workload_batch import FloatArray, IntArray, WorkloadBatch
from lora_capacity.surrogate.discrepancy import corrections
from lora_capacity.surrogate.documents import SCHEMA_VERSION, calibration_digest
from lora_capacity.surrogate.optima import Optima, Surfaces, choose, survey
from lora_capacity.surrogate.space import Space

SHARD = 128
"""Workloads of a shard: some seconds of work, which is what an interruption costs."""

_ABOUT = b"lora_capacity"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled workloads: the optimum of each and the surface around it.

    Attributes:
        workloads: The workloads and servers.
        optima: The optimum of each, by the steady twin corrected by the event twin.
        surfaces: What the steady twin says around them.
        correction: Logarithm of what the event twin's servers sustain over what the steady twin's do, for each of
            ``surfaces.slots``, ``[workloads, known]``; zeros where the event twin was not asked.
        about: Provenance: calibration, space, seed, versions, what the event twin simulated, seconds by part.
    """

    workloads: WorkloadBatch
    optima: Optima
    surfaces: Surfaces
    correction: NDArray[np.float64]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.workloads)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Return the labels of some rows."""
        taken = {name: _rows(getattr(self, name), rows) for name in _PARTS}
        return dataclasses.replace(self, **taken, correction=self.correction[rows])

    def log_sustained(self, slots: IntArray, *, corrected: bool = True) -> FloatArray:
        """Return the logarithm of the load that some of the known numbers of slots sustain.

        Args:
            slots: Numbers of slots out of ``surfaces.slots``, ``[workloads, n]``.
            corrected: Whether by the event twin; else it is what the steady twin says.
        """
        known = self.surfaces.slots
        place = np.stack([np.searchsorted(row, each) for row, each in zip(known, slots, strict=True)])
        logs = np.log(self.surfaces.sustained_by_slots) + (self.correction if corrected else 0.0)
        return np.take_along_axis(logs, np.minimum(place, known.shape[1] - 1), axis=1)

    def write(self, path: str | Path) -> None:
        """Write a Parquet file, whole or not at all: a row per workload, and in its metadata what it is about."""
        columns = {name: column for part in _PARTS for name, column in vars(getattr(self, part)).items()}
        columns["correction"] = self.correction
        table = pyarrow.table({name: _arrow(column) for name, column in columns.items()})
        about = json.dumps(dict(self.about)).encode()
        file = io.BytesIO()
        parquet.write_table(table.replace_schema_metadata({_ABOUT: about}), file, row_group_size=SHARD)
        write_whole(path, file.getvalue())

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
        about = parse_json(metadata[_ABOUT].decode(errors="replace"), f"{path}: about", "what `label` wrote of it")
        if not isinstance(about, dict):
            raise InputError(f"{path}: about", type(about).__name__, "a JSON object")
        version = about.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise InputError(f"{path}: schema_version", version, f"{SCHEMA_VERSION}", "label again")
        for name in ("calibration", "calibration_digest"):
            if not isinstance(about.get(name), str):
                raise InputError(f"{path}: about.{name}", about.get(name), "text")
        return cls(**_parts_of(path, table), about=about)


_NAN_ALLOWED = frozenset({"throughput_tokens_per_s", "sustained_per_s", "grid_throughput", "sustained_by_slots"})
"""Columns that are NaN where a question has no answer."""

_INFINITE_ALLOWED = frozenset({"most_adapters", "max_pending"})
"""Columns that are infinite where nothing bounds them."""

_LISTS = {
    "rates_per_s": "round",
    "ranks": "round",
    "grid_adapters": "grid",
    "grid_slots": "grid",
    "grid_throughput": "surface",
    "slots": "known",
    "sustained_by_slots": "known",
    "correction": "known",
}
"""Columns of lists, by what their elements are; those of the same are equally long."""


def _parts_of(path: str | Path, table: Any) -> dict[str, Any]:
    """Return the parts of labels from a table whose columns are all there, go together, and hold numbers."""
    if table.num_rows < 1:
        raise InputError(str(path), "no rows", "at least one workload")
    names = dict.fromkeys(entry.name for kind in _PARTS.values() for entry in fields(kind))
    columns = {name: _column(f"{path}: column {name}", table, name) for name in (*names, "correction")}
    lengths = {what: columns[name].shape[1] for name, what in _LISTS.items()}
    for name, what in _LISTS.items():
        if columns[name].shape[1] != lengths[what] or lengths["surface"] != lengths["grid"] ** 2:
            raise InputError(
                f"{path}: column {name}", f"lists of {columns[name].shape[1]}", "as long as those beside it"
            )
    rows, grid = columns["grid_adapters"].shape
    columns["grid_throughput"] = columns["grid_throughput"].reshape(rows, grid, grid).astype(np.float64)
    parts = {name: kind(**{entry.name: columns[entry.name] for entry in fields(kind)}) for name, kind in _PARTS.items()}
    return parts | {"correction": columns["correction"]}


def _column(where: str, table: Any, name: str) -> NDArray[Any]:
    """Return a column of numbers >= 0; only the correction, a logarithm, has others."""
    if table.column_names.count(name) != 1:
        raise InputError(where, f"{table.column_names.count(name)} of them", "one", "label again")
    column = _numpy(table[name], table.num_rows)
    dimensions = 2 if name in _LISTS else 1
    if column.ndim != dimensions or column.dtype.kind not in "iuf":
        raise InputError(where, f"{column.ndim} dimensions of {column.dtype}", f"{dimensions}, of numbers")
    unfit = ~np.isfinite(column) | ((column < 0) & (name != "correction"))
    if name in _NAN_ALLOWED:
        unfit &= ~np.isnan(column)
    elif name in _INFINITE_ALLOWED:
        unfit &= ~np.isposinf(column)
    if unfit.any():
        raise InputError(where, float(column[unfit][0]), "numbers >= 0")
    return column


_PARTS: dict[str, Any] = {"workloads": WorkloadBatch, "optima": Optima, "surfaces": Surfaces}


def label(
    calibration: Calibration,
    space: Space,
    count: int,
    *,
    seed: int = 0,
    played: int = 0,
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Sample workloads, find the optimum of each by the steady twin, and correct it by the event twin.

    Args:
        calibration: Whose servers they are.
        space: What they are drawn from.
        count: Workloads.
        seed: Whole number >= 0; equal seeds give equal labels.
        played: Of how many, the first ones, the event twin simulates configurations near the best; see
            `lora_capacity.surrogate.discrepancy`. 0: the steady twin's word stands.
        checkpoint_dir: Folder for finished shards: the same call goes on from what is there. It stays until deleted.
        progress: Called with the workloads done (a simulated one counts as done once more), and their total.

    Raises:
        InputError: If a number is not allowed, or ``checkpoint_dir`` holds shards of other labels.
    """
    workloads = space.sample(count, seed)
    played = int(check_number("played", played, minimum=0, maximum=count, integer=True))
    about = {
        "schema_version": SCHEMA_VERSION,
        "version": package_version(),
        "calibration": calibration.name,
        "calibration_digest": calibration_digest(calibration),
        "space": space.to_json(),
        "workloads": count,
        "seed": seed,
        "played": played,
        "threshold": STARVED_SHORTFALL,
    }
    if checkpoint_dir is not None:
        _open(checkpoint_dir, about)
    done = progress or (lambda done, total: None)
    times = [time.perf_counter()]
    surfaces = _surveyed(calibration, workloads, checkpoint_dir, lambda finished: done(finished, count + played))
    optima = choose(calibration, workloads, surfaces)
    times.append(time.perf_counter())
    correction, about["plays"] = corrections(
        calibration,
        workloads,
        optima,
        surfaces,
        played,
        seed=seed,
        checkpoint_dir=None if checkpoint_dir is None else checkpoint_dir / "played",
        progress=lambda finished, total: done(count + played * finished // total, count + played),
    )
    times.append(time.perf_counter())
    if about["plays"]:
        optima = choose(calibration, workloads, surfaces, correction)
    times.append(time.perf_counter())
    seconds = np.diff(times).round(2).tolist()
    about["seconds"] = dict(zip(("steady_twin", "event_twin", "choosing"), seconds, strict=True))
    return Dataset(workloads, optima, surfaces, correction, about)


def _surveyed(calibration: Calibration, workloads: WorkloadBatch, folder: Path | None, done: Any) -> Surfaces:
    """Survey shard by shard, but for those that are there."""
    starts = range(0, len(workloads), SHARD)
    paths = {} if folder is None else {start: folder / f"shard-{start:07d}.npz" for start in starts}
    found = {start: _kept(path, min(SHARD, len(workloads) - start)) for start, path in paths.items()}
    shards = {start: shard for start, shard in found.items() if shard is not None}

    def finished(ended: tuple[int, dict[str, Any]]) -> None:
        start, shard = ended
        if start in paths:
            file = io.BytesIO()
            np.savez(file, **shard)
            write_whole(paths[start], file.getvalue())
        shards[start] = shard
        done(min(SHARD * len(shards), len(workloads)))

    if shards:
        done(min(SHARD * len(shards), len(workloads)))
    left = [slice(start, start + SHARD) for start in starts if start not in shards]
    run_tasks(functools.partial(_survey_shard, calibration, workloads), left, finished, threads=1)
    known = [shards[start] for start in starts]
    return Surfaces(**{name: np.concatenate([shard[name] for shard in known]) for name in known[0]})


def _survey_shard(calibration: Calibration, workloads: WorkloadBatch, shard: slice) -> tuple[int, dict[str, Any]]:
    return shard.start, vars(survey(calibration, workloads.take(shard)))


def _kept(path: Path, workloads: int) -> dict[str, Any] | None:
    """Return a shard; None where there is none, or it is damaged, which is told."""
    if not path.exists():
        return None
    names = {entry.name for entry in fields(Surfaces)}
    damaged = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error
    with contextlib.suppress(*damaged), np.load(io.BytesIO(path.read_bytes())) as kept:
        found = dict(kept)
        if set(found) == names and all(values.ndim and len(values) == workloads for values in found.values()):
            return found
    discard(path)
    return None


def _open(folder: Path, about: Mapping[str, Any]) -> None:
    """Make the folder, or see that it holds shards of the same labels."""
    open_folder(
        folder,
        "labels.json",
        about,
        parts="finished shards",
        other="what is left of other labels",
        allowed="what is left of these: same calibration, space, workloads, seed and version",
        remedy="finish those as they were begun, or delete the folder",
    )


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
