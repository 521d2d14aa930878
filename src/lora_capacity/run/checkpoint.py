"""What is kept of long work that can be taken up again: a folder for one question, whose files are whole or absent."""

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_capacity.errors import InputError


def open_folder(
    folder: Path, manifest: str, identity: Mapping[str, Any], *, parts: str, other: str, allowed: str, remedy: str
) -> None:
    """Make a folder, or see that it holds the parts of the same work.

    Args:
        folder: The folder.
        manifest: Name of the file in it that tells whose parts they are.
        identity: What tells this work from others, as JSON has it.
        parts: What the folder is for.
        other: What is found where the parts are of other work.
        allowed: What is allowed there.
        remedy: What to do about it.

    Raises:
        InputError: If it holds the parts of other work, or cannot be used.
    """
    path, wanted = folder / manifest, json.loads(json.dumps(dict(identity)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, json.dumps(wanted).encode())
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(folder), str(error), f"a folder of {parts}") from None
    if found != wanted:
        raise InputError(str(folder), other, allowed, remedy)


def write_whole(path: Path, content: bytes) -> None:
    """Write under another name, then rename: half a file would be taken for a whole one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def package_version() -> str:
    """Return the version of lora-capacity."""
    try:
        return version("lora-capacity")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
