import decimal
import math
from typing import Any

import numpy as np
import pytest

from lora_capacity.errors import InputError, LoraCapacityError, check_keys, check_number, nearest_hint


def test_an_input_error_says_field_value_allowed_and_remedy() -> None:
    error = InputError("arrivals.cv", -1, "a number > 0", "use 1 for poisson")
    assert str(error) == "arrivals.cv: -1 is not allowed; allowed: a number > 0; use 1 for poisson"
    assert str(InputError("a", "b", "c")) == "a: 'b' is not allowed; allowed: c"
    assert isinstance(error, ValueError)
    assert isinstance(error, LoraCapacityError)


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x1b[31mb", "a\x00b", "a\u2028b"])
def test_a_message_stays_on_one_printable_line(text: str) -> None:
    assert str(InputError(text, text, "text")).isprintable()
    with pytest.raises(InputError) as caught:
        check_keys("", {text: 1}, ["a"])
    assert str(caught.value).isprintable()
    with pytest.raises(InputError) as caught:
        check_keys("section", {text: 1}, ["a"])
    assert str(caught.value).isprintable()
    assert repr(text)[1:-1] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "known", "nearest"),
    [
        ("horizons_s", ["horizon_s", "max_pending"], "horizon_s"),
        ("rate", ["ranks", "rate_per_s"], "rate_per_s"),
        ("rate_per_s", ["adapter", "rank", "rate"], "rate"),
        ("cw", ["process", "cv"], "cv"),
        ("max", ["min", "max_loras", "max_lora_rank"], "max_loras"),
        ("adapter", ["adapters", "adapters_per_gpu"], "adapters"),
    ],
)
def test_the_nearest_known_name_is_named(name: str, known: list[str], nearest: str) -> None:
    assert nearest_hint(name, known) == f"did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("colour", ["horizon_s", "max_pending", "arrivals"]),
        ("m", ["mean", "max_pending"]),
        ("xy", ["cv", "id"]),
        ("cw", ["count", "process"]),
        ("", ["mean"]),
        ("mean", []),
    ],
)
def test_a_name_like_no_other_gets_no_hint(name: str, known: list[str]) -> None:
    assert nearest_hint(name, known) == ""


def test_the_first_unknown_key_is_refused() -> None:
    check_keys("arrivals", {"cv": 1}, ["process", "cv"])
    with pytest.raises(InputError, match=r"^arrivals\.cw: 'cw' .* the keys process, cv; did you mean 'cv'\?$"):
        check_keys("arrivals", {"process": "x", "cw": 1, "cx": 2}, ["process", "cv"])
    with pytest.raises(InputError, match=r"^3: 3 is not allowed; allowed: the keys process, cv$"):
        check_keys("", {3: 1}, ["process", "cv"])


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.float64(2), decimal.Decimal(2)])
def test_numbers_of_any_type_are_taken(value: object) -> None:
    assert check_number("x", value, minimum=2, maximum=2) == 2.0
    whole = check_number("x", value, integer=True)
    assert (whole, type(whole)) == (2, int)


@pytest.mark.parametrize(
    ("value", "bounds", "words"),
    [
        (-0.1, {"minimum": 0}, "x: -0.1 is not allowed; allowed: a number >= 0"),
        (0, {"minimum": 0, "exclusive": True}, "x: 0 is not allowed; allowed: a number > 0"),
        (1.1, {"minimum": 0, "maximum": 1}, "x: 1.1 is not allowed; allowed: a number >= 0 and <= 1"),
        (2, {"maximum": 1}, "x: 2 is not allowed; allowed: a number <= 1"),
        (1.5, {"integer": True, "minimum": 1}, "x: 1.5 is not allowed; allowed: a whole number >= 1"),
        (True, {}, "x: True is not allowed; allowed: a number"),
        ("1", {}, "x: '1' is not allowed; allowed: a number"),
        (None, {}, "x: missing; allowed: a number"),
        (1j, {}, "x: 1j is not allowed; allowed: a number"),
        ([1.0], {}, "x: [1.0] is not allowed; allowed: a number"),
        (math.nan, {}, "x: nan is not allowed; allowed: a number"),
        (math.inf, {"minimum": 0}, "x: inf is not allowed; allowed: a number >= 0"),
        (-math.inf, {"integer": True}, "x: -inf is not allowed; allowed: a whole number"),
    ],
)
def test_anything_but_a_number_within_bounds_is_refused(value: object, bounds: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_number("x", value, **bounds)
    assert str(caught.value) == words


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("integer", [False, True])
def test_a_whole_number_beyond_floating_point_is_refused_briefly(digits: int, integer: bool) -> None:
    with pytest.raises(InputError, match=r"^x: 'a number of more than 308 digits' is not allowed; allowed: a"):
        check_number("x", -(10**digits), integer=integer)
