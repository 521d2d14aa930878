"""What runs held on average over time, from samples taken while they ran."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_capacity.errors import InputError
from lora_capacity.measurements.runs import FloatArray, Runs
from lora_capacity.units import S_PER_HOUR

_COLUMNS = ("run_id", "t_s", "running", "kv_usage")


@dataclass(frozen=True, eq=False)
class TimeMeans:
    """Means over the time of each run, ``[runs]``; NaN where there are no samples of it.

    Attributes:
        running: Running requests.
        kv_usage: Share of the KV cache in use.
    """

    running: FloatArray
    kv_usage: FloatArray


def read_time_means(path: str | Path, runs: Runs) -> TimeMeans:
    """Average the samples of running requests and KV cache in use over the time of each run.

    Busy servers are sampled at longer intervals, so that a plain mean would count the quiet beginning of a run for more
    than its time: each sample stands for the time halfway to those next to it, the last up to the end of the run.

    Args:
        path: Parquet file with the columns ``run_id``, ``t_s`` (ascending within a run), ``running`` and ``kv_usage``.
        runs: The runs; their ``run_id`` ties them to the samples.

    Raises:
        InputError: If the file cannot be read or lacks a column.
    """
    import pyarrow as pa  # not at the top: what only writes the schemas' tables should not wait for it
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        allowed = f"a Parquet file with the columns {', '.join(_COLUMNS)}"
        raise InputError("series", str(path), allowed, str(error).split("\n")[0]) from None
    columns = {name: np.asarray(table[name].to_numpy()) for name in _COLUMNS}
    length_s = np.where(np.isnan(runs.duration_s), S_PER_HOUR, runs.duration_s)
    place = {str(name): row for row, name in enumerate(runs.run_id) if name}
    running, kv_usage = np.full((2, len(runs)), np.nan)
    of_run = columns["run_id"].astype(str)
    starts = np.flatnonzero(np.append(True, of_run[1:] != of_run[:-1]))
    for start, end in zip(starts, np.append(starts[1:], of_run.size), strict=True):
        row = place.get(of_run[start]) if end > start else None
        if row is not None:
            at_s = columns["t_s"][start:end].astype(np.float64)
            edges_s = np.concatenate([[0.0], (at_s[1:] + at_s[:-1]) / 2.0, [max(length_s[row], at_s[-1])]])
            for mean, name in ((running, "running"), (kv_usage, "kv_usage")):
                mean[row] = np.average(columns[name][start:end], weights=np.diff(edges_s))
    return TimeMeans(running, kv_usage)
