"""A workload from whatever people have of one: a file, its content, or recorded requests, in a file or in memory."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_capacity.errors import check_type
from lora_capacity.tables import ArrowStream, FrameLike, Interchange
from lora_capacity.workload.columns import is_recording
from lora_capacity.workload.goodput import Goodput
from lora_capacity.workload.workload import Workload

WorkloadLike = Workload | Mapping[str, Any] | str | os.PathLike[str] | FrameLike
"""What `load_workload` takes."""

WORKLOAD_TYPES = (Workload, Mapping, str, os.PathLike, ArrowStream, Interchange)
"""The same, for `isinstance`."""


def load_workload(
    workload: WorkloadLike,
    *,
    goodput: Mapping[str, float] | Goodput | None = None,
    attainment: float | None = None,
    recording: Mapping[str, Any] | None = None,
) -> Workload:
    """Return the workload that something stands for; a workload stands for itself.

    Args:
        workload: A workload; the content of a workload file, as a mapping; the path of such a file, or of a table of
            recorded requests (CSV, JSON lines, Parquet); or such a table of pandas, polars, Arrow or the like.
        goodput: Latency bounds in place of the workload's own, in milliseconds by vLLM's keys ``ttft``, ``tpot`` and
            ``e2el``.
        attainment: Share of the requests that should keep them, in place of the workload's.
        recording: Of a table of requests: what its columns are, by the keys of ``requests.trace``.

    Raises:
        InputError: If it is nothing of these, or anything about it cannot be used.
    """
    check_type("recording", recording, (Mapping, type(None)), "a mapping of what columns are")
    found = _load(workload, recording or {})
    if isinstance(goodput, Goodput):
        bounds = goodput.changed(attainment=attainment)
    else:
        bounds = found.goodput.changed(goodput, attainment)
    return found if bounds == found.goodput else dataclasses.replace(found, goodput=bounds)


def _load(workload: WorkloadLike, recording: Mapping[str, Any]) -> Workload:
    if isinstance(workload, Workload):
        return workload
    if isinstance(workload, Mapping):
        return Workload.from_mapping(workload)
    if isinstance(workload, ArrowStream | Interchange):
        return Workload.from_mapping({"requests": {"trace": {"file": workload, **recording}}})
    allowed = "a Workload, the path or the content of a workload file, or a table of requests"
    path = Path(check_type("workload", workload, (str, os.PathLike), allowed))
    if is_recording(path):
        return Workload.from_mapping({"requests": {"trace": {"file": path.name, **recording}}}, path.parent)
    return Workload.from_file(path)
