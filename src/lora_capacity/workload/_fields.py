"""Checks shared by the parts of a workload: sections of a mapping, lists of numbers, paths, read-only arrays."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.errors import InputError, check_keys, check_number

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]

MAX_TOKENS = 10**6
"""Longest prompt or answer: above what served models accept, and small enough to tabulate every length up to it."""


def section(field: str, value: object, keys: Iterable[str]) -> Mapping[str, Any]:
    """Return ``value`` as a mapping that has no keys but ``keys``.

    Args:
        field: Where the mapping stands, for the message (empty at the top level).
        value: What stands there.
        keys: The keys allowed.

    Raises:
        InputError: If it is no mapping or has an unknown key.
    """
    keys = list(keys)
    if not isinstance(value, Mapping):
        raise InputError(field or "workload", briefly(value), f"a mapping with the keys {', '.join(keys)}")
    check_keys(field, value, keys)
    return value


def numbers(
    field: str,
    values: object,
    *,
    integer: bool = False,
    minimum: float = 0.0,
    maximum: float | None = None,
    exclusive: bool = True,
) -> FloatArray:
    """Return a list of numbers as an array, checked one by one.

    Args:
        field: Name of the list; an element is called ``field[index]``.
        values: A list, tuple or one-dimensional array.
        integer: Whether only whole numbers are allowed.
        minimum: Smallest allowed value.
        maximum: Largest allowed value, if any.
        exclusive: Whether ``minimum`` itself is refused.

    Returns:
        float64 ``[n]``, n >= 1.

    Raises:
        InputError: If it is no list, is empty, or an element is not such a number.
    """
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        raise InputError(field, briefly(values), f"a list of at least one {'whole ' if integer else ''}number")
    return np.array(
        [
            check_number(f"{field}[{i}]", value, minimum=minimum, maximum=maximum, exclusive=exclusive, integer=integer)
            for i, value in enumerate(values)
        ],
        dtype=np.float64,
    )


def table_path(field: str, value: object, base_dir: Path) -> Path:
    """Return the path of a table named in a workload; a relative one starts at the workload file's folder.

    Raises:
        InputError: If it is not the name of a file.
    """
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError(field, briefly(value), "the path of a CSV file")
    return base_dir / value


def briefly(value: object) -> object:
    """Return what a message should show of a value: scalars themselves, a name for anything larger."""
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, str):
        return value if len(value) <= 80 else f"{value[:77]}..."
    if isinstance(value, Iterable):
        return "a list" if list(value) else "an empty list"
    return value


def read_only(values: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    """Return a copy of ``values`` that cannot be written to."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
