"""Numba's compiler as this package uses it."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_NUMBA: Any = numba  # of the options used here its types know few

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function for this processor when it is first called, to be called by other compiled ones."""
    return cast(
        Function, _NUMBA.njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(inspect.unwrap(function))
    )


def entry_point(function: Function) -> Function:
    """Compile a function that Python calls; it runs without Python's global lock."""
    return cast(Function, _NUMBA.njit(**_OPTIONS, nogil=True)(inspect.unwrap(function)))


def keep_compiled(function: Callable[..., Any], folder: Path) -> None:
    """Keep what a function is compiled to in a folder, and take it from there.

    Numba compares the file of the function alone with what it has kept, so the folder is one of all files here.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    config = _NUMBA.config
    given, config.CACHE_DIR = config.CACHE_DIR, str(folder / hashlib.sha256(sources).hexdigest()[:16])
    try:
        cast(Any, function).enable_caching()
    finally:
        config.CACHE_DIR = given


_OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
"""Division as in C; and no counting of references: nothing is allocated, and passing a server from function to function
would count for each of its arrays."""
