"""Files that are whole or absent, whatever interrupts their writing."""

import os
import uuid
from pathlib import Path


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file under another name beside it, then rename it: half a file would be taken for a whole one.

    Of several writers at once, the last one to finish wins.

    Args:
        path: The file; its folder exists.
        content: Bytes, or text to be written as UTF-8.

    Raises:
        OSError: If it cannot be written; a file that was there is then left as it was.
    """
    path = Path(path)
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # beside it: a rename moves nothing between disks
    try:
        with written.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or the new name might reach the disk before the content does
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
