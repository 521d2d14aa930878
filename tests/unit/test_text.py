"""Nothing that a terminal, a page or a log would act upon is left in text; numbers are written in one way."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_capacity.text import LONGEST_SHOWN, brief, number_of, printable, printable_lines


@given(st.text())
def test_what_is_shown_is_shown_and_does_nothing_else(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert (shown == text) == text.isprintable()
    assert printable(shown) == shown
    assert printable_lines(text).replace("\n", "").isprintable()
    assert html.unescape(html.escape(shown)) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),
        ("a\r\nb\tc\0", "a\\r\\nb\\tc\\x00"),
        ("caf\udce9", "caf\\udce9"),
        ("héllo 世界 [bold]", "héllo 世界 [bold]"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_values_are_shown_in_little_room() -> None:
    for value in (10**5000, "x" * 10**6, [[[[1] * 9] * 9] * 9] * 9, {i: i for i in range(10**5)}, b"y" * 10**6):
        assert len(brief(value)) <= 3 * LONGEST_SHOWN


@pytest.mark.parametrize(("text", "number"), [("1", 1.0), ("-1.5", -1.5), (".5", 0.5), ("2.", 2.0), ("+1e-3", 1e-3)])
def test_numbers(text: str, number: float) -> None:
    assert number_of(text) == number


@pytest.mark.parametrize("text", ["", " 1", "1,5", "1_0", "١", "1:30", "0x1", "nan", "inf", "1e", "--1", "1 2"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        number_of(text)
