"""Compiled code kept in the user's own folder, for the next process."""

import contextlib
import os
import stat
import warnings
from pathlib import Path

from lora_capacity.run.steady import enable_compilation_cache


def cache_dir() -> Path:
    """Return the folder for what is compiled: under ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lora-capacity" / "jax"


def keep_compiled_code() -> None:
    """Let JAX and Numba keep what they compile from one process to the next.

    A folder that cannot be written is done without; so is one that others can write to, with a warning, since code is
    loaded from it. Entries in it that are damaged are compiled anew.
    """
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        folder = cache_dir()
        folder.parents[1].mkdir(parents=True, exist_ok=True)
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            if not _is_private(each):
                whose = "belongs to others, or they can write to it: delete it"
                warnings.warn(f"compiled code is not kept: {each} {whose}", RuntimeWarning, stacklevel=2)
                return
        if os.access(folder, os.W_OK):
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
            enable_compilation_cache(folder)


def _is_private(folder: Path) -> bool:
    """Whether a folder is the user's own, not a link, and nobody else can write to it."""
    status = folder.lstat()
    others_write = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & others_write
