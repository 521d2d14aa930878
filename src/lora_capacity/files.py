"""Files that are whole or absent, whatever interrupts their writing; the one place that writes files."""

import contextlib
import errno
import fcntl
import glob
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = ".part"
"""Ending of the name under which a file is written."""


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file under another name beside it, then rename it: half a file would be taken for a whole one.

    Of several writers at once, the last one to finish wins. A link is replaced, not followed. What a writer of the same
    file left behind that was killed is removed.

    Args:
        path: The file; its folder exists.
        content: Bytes, or text to be written as UTF-8; what of a file's name is no text stands as escapes.

    Raises:
        OSError: If it cannot be written, or a folder, device or pipe is there; a file that was there is then left as it
            was.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EINVAL, "no ordinary file", str(path))
    _clean(path)
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")  # a rename moves nothing between disks
    try:
        with written.open("xb") as file, locked(file.fileno()):
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or the new name might reach the disk before the content does
            written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(handle: int, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock of an open file or folder until the block ends; without one where the file system knows none.

    Args:
        handle: Its descriptor.
        wait: Whether to wait for others that hold it.

    Yields:
        Whether nobody else holds it.
    """
    kind = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        yield False
        return
    except OSError:  # network file systems
        yield True
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def locked_folder(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, as `locked` does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with locked(handle, wait=wait) as alone:
            yield alone
    finally:
        os.close(handle)


def _clean(path: Path) -> None:
    """Remove what writers of a file left behind; those that still write hold a lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        with contextlib.suppress(OSError), left.open("rb") as file, locked(file.fileno(), wait=False) as alone:
            if alone:
                left.unlink(missing_ok=True)
