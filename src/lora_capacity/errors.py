"""Failures that a user can mend, each told in one line."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from lora_capacity.text import LONGEST_SHOWN, brief, printable

LARGEST_WHOLE = 2**53
"""Largest whole number that double precision tells from its neighbours."""

SMALLEST, LARGEST = 1.2e-38, 3.4e38
"""Sizes between which single precision, in which is computed, has all its digits."""

T = TypeVar("T")


class LoraCapacityError(Exception):
    """Base of every expected failure; the command line prints it as one line without a traceback."""


class _Missing:
    """A value that is not there."""


MISSING = _Missing()
"""What `InputError` is given in place of a value where there is none, and None is a value like others."""

NO_SUCH_FILE = "no such file"
"""What `InputError` is given in place of a value where a file does not exist."""

_BESIDE = "nothing beside "


class InputError(LoraCapacityError, ValueError):
    """A value that the caller gave cannot be used; told in one line, whatever stands in field and value.

    Args:
        field: Name of the offending field, as the user wrote it (``arrivals.cv``, ``runs.csv line 7, rate_per_s``), or
            the file, where it does not exist.
        value: The value found there; None or `MISSING` where there is none, `NO_SUCH_FILE` for a file.
        allowed: What is allowed, in words (``a number > 0``); ``nothing beside x`` where it conflicts with x.
        remedy: What to do about it, where that is not plain from ``allowed``.
    """

    def __init__(self, field: str, value: object, allowed: str, remedy: str = "") -> None:
        self.field, self.value, self.allowed, self.remedy = field, value, allowed, remedy
        where = field if len(field) <= LONGEST_SHOWN else f"{field[:LONGEST_SHOWN]}..."  # a path may be longer
        if value is NO_SUCH_FILE:
            message = f"file not found: {where}"
        elif allowed.startswith(_BESIDE):
            message = f"{where}: cannot be combined with {allowed.removeprefix(_BESIDE)}"
        else:
            found = "missing" if value is None or isinstance(value, _Missing) else f"{brief(value)} is not allowed"
            message = f"{where}: {found}; allowed: {allowed}"
        super().__init__(printable(f"{message}; {remedy}" if remedy else message))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed, self.remedy)


class InfeasibleError(LoraCapacityError):
    """The question is well put but no configuration satisfies it."""


class ClusterError(LoraCapacityError):
    """The cluster that the work was given to is lost, or cannot do it."""


class ImpossibleResultError(LoraCapacityError):
    """A simulation says what no server can do: a fault of this library, told rather than passed on.

    Args:
        what: Which number of which configuration, and its bound.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        remedy = "this is a fault of lora-capacity: please report it, with this line and the workload"
        super().__init__(f"impossible result: {what}; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what,)


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the known name closest to ``name``, or an empty string if none is close.

    Names of three letters or more of which one begins with the other are closest (``rate`` and ``rate_per_s``), then
    the name spelt most alike.
    """

    def extends(each: str) -> bool:
        shorter, longer = sorted((each, name), key=len)
        return len(shorter) >= 3 and longer.startswith(shorter)

    known = sorted(known, key=lambda each: abs(len(each) - len(name)))
    # One wrong letter of two leaves a similarity of 0.5; between longer names that is a coincidence.
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.5 if len(name) == 2 else 0.6)
    nearest = [*filter(extends, known), *alike]
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def check_type(field: str, value: T, kinds: type | tuple[type, ...], allowed: str) -> T:
    """Return a value that is of a kind that is taken.

    Args:
        field: Name of the argument.
        value: What the caller gave.
        kinds: Its type, or any of several.
        allowed: What is allowed, in words.

    Raises:
        InputError: If it is of none of them; of what is no number or text the type is told.
    """
    if not isinstance(value, kinds):
        raise InputError(field, value if isinstance(value, int | float | str) else type(value).__name__, allowed)
    return value


def check_path(field: str, value: str | os.PathLike[str]) -> Path:
    """Return a path.

    Raises:
        InputError: If it is none.
    """
    return Path(check_type(field, value, (str, os.PathLike), "a path"))


def check_choice(field: str, value: object, known: Iterable[str]) -> None:
    """Refuse what is none of the words known.

    Raises:
        InputError: Names them, and the nearest.
    """
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise InputError(field, value, ", ".join(known), nearest_hint(str(value), known))


def check_keys(field: str, given: Iterable[object], known: Iterable[str]) -> None:
    """Refuse keys of a mapping that are not known.

    Args:
        field: Where the mapping stands (empty at the top level).
        given: The keys found.
        known: The keys allowed.

    Raises:
        InputError: Names the first unknown key, the known keys, and the nearest of them.
    """
    known = list(known)
    for key in given:
        if key not in known:
            where = f"{field}.{key}" if field else str(key)
            raise InputError(where, key, f"the keys {', '.join(known)}", nearest_hint(str(key), known))


def number_words(
    minimum: float | None = None, maximum: float | None = None, *, exclusive: bool = False, integer: bool = False
) -> str:
    """Return in words what `check_number` allows: ``a whole number >= 1``."""
    words = "a whole number" if integer else "a number"
    if minimum is not None:
        words += f" {'>' if exclusive else '>='} {minimum:g}"
    if maximum is not None:
        words += f"{' and' if minimum is not None else ''} <= {maximum:{'.0f' if integer else 'g'}}"
    return words


def check_number(
    field: str,
    value: object,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive: bool = False,
    integer: bool = False,
) -> float:
    """Return ``value`` as a finite number within bounds.

    Whatever the bounds, a number other than 0 is between `SMALLEST` and `LARGEST` in size, and a whole one at most
    `LARGEST_WHOLE`: others would be rounded to 0, to infinity, or to another number.

    Args:
        field: Name of the field for the message.
        value: What the user gave; booleans and text are refused.
        minimum: Smallest allowed value, if any.
        maximum: Largest allowed value, if any.
        exclusive: Whether ``minimum`` itself is refused.
        integer: Whether only whole numbers are allowed (the result is then an ``int``).

    Raises:
        InputError: If the value is not such a number.
    """
    allowed = number_words(minimum, maximum, exclusive=exclusive, integer=integer)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InputError(field, value, allowed)
    try:
        number = float(value)
    except OverflowError:
        raise InputError(field, "a number of more than 308 digits", allowed) from None
    if integer and maximum is None and LARGEST_WHOLE < abs(number) < float("inf"):
        raise InputError(field, value, f"{allowed}, at most {LARGEST_WHOLE}")
    if number != 0 and not SMALLEST <= abs(number) <= LARGEST and abs(number) < float("inf"):
        raise InputError(field, value, f"{allowed}, 0 or between {SMALLEST:g} and {LARGEST:g} in size")
    below = minimum is not None and (number <= minimum if exclusive else number < minimum)
    above = maximum is not None and number > maximum
    if not abs(number) < float("inf") or below or above or (integer and number != int(number)):
        raise InputError(field, value, allowed)
    return int(number) if integer else number
