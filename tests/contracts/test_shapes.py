"""Array shapes in annotations are checked for real while the tests run."""

import importlib
import pkgutil

import lora_capacity
from tests.shapes import CHECKED

LEAST = 150
"""Functions that are checked at least."""


def test_many_functions_are_checked() -> None:
    for module in pkgutil.walk_packages(lora_capacity.__path__, "lora_capacity."):
        importlib.import_module(module.name)
    assert len(CHECKED) >= LEAST
