"""The type checker that tests put on the library's functions."""

import inspect
from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from jaxtyping import AbstractArray

Function = TypeVar("Function", bound=Callable[..., object])

CHECKED: set[str] = set()
"""Functions whose shapes are checked, of the modules imported so far."""


def check_shapes(function: Function) -> Function:
    """Check arguments and result of a function whose annotations give array shapes; leave every other as it is.

    Constructors stay unchecked since JAX rebuilds its pytrees through them with leaves that are not arrays, and plain
    functions since they must answer wrong types with an error of their own.
    """
    annotations = inspect.get_annotations(function).values()
    if function.__name__ == "__init__" or not any(_has_shape(annotation) for annotation in annotations):
        return function
    CHECKED.add(f"{function.__module__}.{function.__qualname__}")
    return beartype(function)


def _has_shape(annotation: object) -> bool:
    parts = getattr(annotation, "__args__", ())
    return (inspect.isclass(annotation) and issubclass(annotation, AbstractArray)) or any(map(_has_shape, parts))
