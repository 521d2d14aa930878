"""The processes of a `jax.distributed` job, which share configurations out among them; one alone has all."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from numpy.typing import NDArray

Item = TypeVar("Item")


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return every n-th item, those of this process; where there are not enough, the last once more."""
    return items[jax.process_index() :: jax.process_count()] or items[-1:]


def any_process(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether a flag is set in any process; every process must call it."""
    known = np.atleast_2d(process_allgather(flags))
    return np.asarray(np.any(known, axis=0))


def gather(rows: NDArray[np.int64], tree: Any) -> Any:
    """Return in order what the processes know of rows; every process must call it.

    Args:
        rows: Which rows this process knows, at least one, ``[own]``; a row may be known twice.
        tree: What it knows, leaves ``[own, …]``.

    Returns:
        Leaves ``[rows, …]``, each row once.
    """
    if jax.process_count() > 1:
        more = int(np.max(process_allgather(np.array(len(rows))))) - len(rows)
        known = jax.tree.map(
            lambda values: np.pad(values, [(0, more)] + [(0, 0)] * (values.ndim - 1), mode="edge"), (rows, tree)
        )
        rows, tree = process_allgather(known, tiled=True)
    _, first = np.unique(rows, return_index=True)
    return jax.tree.map(lambda values: np.asarray(values)[first], tree)
