"""Names of calibrations, models and GPUs for shells to complete, read from the package's files without JAX."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

import lora_capacity

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_PACKAGE = Path(lora_capacity.__file__).parent


class Named(click.ParamType):
    """Text of which some values are known by name.

    Args:
        names: Returns them.
        files: Whether it may be a file, too.
    """

    name = "text"

    def __init__(self, names: Callable[[], Iterable[str]], *, files: bool = True) -> None:
        self._names, self._files = names, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Return the names that begin so, in whatever case."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name) for name in self._names() if name.lower().startswith(incomplete.lower())]
        return [*found, CompletionItem(incomplete, type="file")] if self._files else found


def _calibrations() -> list[str]:
    folder = _PACKAGE / "calibration" / "bundled"
    return sorted(path.stem for path in folder.glob("*.json"))


def _models() -> list[str]:
    """Return names with and without their organisation: both are taken."""
    import json

    shapes = json.loads((_PACKAGE / "models" / "bundled_shapes.json").read_text(encoding="utf-8"))
    names = [name for each in shapes for name in each["names"]]
    return sorted({*names, *(name.rpartition("/")[2] for name in names)})


def _gpus() -> list[str]:
    import csv

    table = (_PACKAGE / "hardware" / "gpus.csv").read_text(encoding="utf-8")
    return [row["name"] for row in csv.DictReader(table.splitlines())]


CALIBRATION = Named(_calibrations)
MODEL = Named(_models)
GPU = Named(_gpus, files=False)
