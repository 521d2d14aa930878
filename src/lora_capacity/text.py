"""Text of unknown origin made safe to show, and numbers read from text; each in one way, here."""

import re
import reprlib

LONGEST_SHOWN = 300
"""Characters of one value that a message shows: some lines of a terminal."""

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)


def printable(text: str) -> str:
    """Return text in which everything that a terminal, a page or a log would act upon stands as an escape.

    Those are control characters (escape sequences, line breaks, NUL), invisible and direction-changing characters, and
    bytes of a file name that are no text; what is left shows as it is and nothing else.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def printable_lines(text: str) -> str:
    """Return text as `printable` does, but for its line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class _Brief(reprlib.Repr):
    """Writes values out as Python does, cut where they are long: a message has to end, whatever was given."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict = 2, 4
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxarray = self.maxdeque = 8
        self.maxstring = self.maxother = LONGEST_SHOWN

    def repr_int(self, x: int, level: int) -> str:
        """Return a whole number, or how long it is."""
        return repr(x) if -(10**40) < x < 10**40 else f"a whole number of {x.bit_length()} bits"


brief = _Brief().repr
"""Returns a value as a message shows it: as Python writes it, cut where it is long."""


def number_of(text: str) -> float:
    """Return the number that a text is: digits of ASCII, a point for decimals, an exponent; nothing else.

    Raises:
        ValueError: If it is none. Commas, underscores, other digits, colons and words such as ``nan`` are not taken.
    """
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(text)
    return float(text)
