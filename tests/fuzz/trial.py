"""One damaged file after the other, and what became of each."""

import dataclasses
import json
import random
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lora_capacity.errors import LoraCapacityError
from tests.fuzz.readers import readers

LONGEST_S = 10
"""Seconds after which reading a file counts as a hang."""

LONGEST_LINE = 1500
"""Characters of a message, beyond which nobody reads it; lists of known names take most."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A damaged file and what became of it.

    Attributes:
        reader: What read it.
        seed: Makes the same file again.
        outcome: ``accepted``, ``refused`` or ``fault``.
        fault: What is wrong with that; empty if nothing.
    """

    reader: str
    seed: int
    outcome: str
    fault: str = ""


def record(file: Path, name: str, content: Any) -> None:
    """Keep figures of the Trust page in its result file, in place of those of the same name."""
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.write_text(json.dumps(known | {name: content}, indent=1) + "\n", encoding="utf-8")


class Hang(Exception):
    """Reading takes too long."""


def run(inputs: int, seed: int) -> Iterator[Trial]:
    """Read so many damaged files, in turn by each reader."""
    names = list(readers())
    with tempfile.TemporaryDirectory() as folder:
        for number in range(inputs):
            yield attempt(names[number % len(names)], seed * 1_000_000 + number, Path(folder) / str(number))


def attempt(reader: str, seed: int, folder: Path) -> Trial:
    """Damage a file and read it: it is either taken, or refused in one line that shows nothing raw."""
    known = readers()[reader]
    folder.mkdir(parents=True)
    path = known.make(folder, random.Random(seed))
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(LONGEST_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            known.read(path)
    except LoraCapacityError as error:
        text = str(error)
        raw = "" if text.isprintable() else "characters that a terminal acts upon"
        return Trial(reader, seed, "refused", raw or ("a long message" if len(text) > LONGEST_LINE else ""))
    except Hang:
        return Trial(reader, seed, "fault", f"still reading after {LONGEST_S} s")
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Trial(reader, seed, "fault", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"[:400])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for each in sorted(folder.rglob("*"), reverse=True):
            each.unlink() if each.is_file() else each.rmdir()
        folder.rmdir()
    return Trial(reader, seed, "accepted")


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang
