"""Failures that a user can mend, each told in one line."""

import difflib
from collections.abc import Iterable


class LoraCapacityError(Exception):
    """Base of every expected failure; the command line prints it as one line without a traceback."""


class InputError(LoraCapacityError, ValueError):
    """A value that the caller gave cannot be used.

    Args:
        field: Name of the offending field, as the user wrote it (``arrivals.cv``, ``runs.csv line 7, rate_per_s``).
        value: The value found there.
        allowed: What is allowed, in words (``a number > 0``).
        remedy: What to do about it, where that is not plain from ``allowed``.
    """

    def __init__(self, field: str, value: object, allowed: str, remedy: str = "") -> None:
        self.field, self.value, self.allowed, self.remedy = field, value, allowed, remedy
        message = f"{field}: {value!r} is not allowed; allowed: {allowed}"
        super().__init__(f"{message}; {remedy}" if remedy else message)


class InfeasibleError(LoraCapacityError):
    """The question is well put but no configuration satisfies it."""


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the known name closest to ``name``, or an empty string if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {matches[0]!r}?" if matches else ""


def check_keys(field: str, given: Iterable[str], known: Iterable[str]) -> None:
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
    allowed = "a whole number" if integer else "a number"
    if minimum is not None:
        allowed += f" {'>' if exclusive else '>='} {minimum:g}"
    if maximum is not None:
        allowed += f"{' and' if minimum is not None else ''} <= {maximum:g}"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InputError(field, value, allowed)
    number = float(value)
    below = minimum is not None and (number <= minimum if exclusive else number < minimum)
    above = maximum is not None and number > maximum
    if not abs(number) < float("inf") or below or above or (integer and number != int(number)):
        raise InputError(field, value, allowed)
    return int(number) if integer else number
