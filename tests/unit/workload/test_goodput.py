import math
from typing import Any

import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import Goodput, Workload

LENGTHS = {"mean": 220, "std": 250, "min": 4, "max": 1024}


def read(**keys: Any) -> Goodput:
    lengths = {"input_tokens": LENGTHS, "output_tokens": LENGTHS}
    mix = {"mix": {"rates_per_s": [0.4], "ranks": [8]}}
    return Workload.from_mapping({"adapters": mix, "requests": lengths, **keys}).goodput


def test_bounds_are_milliseconds_in_a_file_and_seconds_inside() -> None:
    found = read(goodput={"ttft": 1000, "tpot": 50}, attainment=0.9)
    assert (found.ttft_s, found.tpot_s, found.e2el_s, found.attainment) == (1.0, 0.05, math.inf, 0.9)
    assert found.to_ms() == {"ttft": 1000.0, "tpot": 50.0}
    assert read(goodput={"e2el": 9000}).ttft_s == math.inf


def test_without_bounds_first_tokens_have_to_come_within_two_seconds() -> None:
    assert read() == Goodput(ttft_s=2.0, attainment=0.95)
    assert read(attainment=0.99).attainment == 0.99


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"goodput": {"ttft": 0}}, "goodput.ttft: 0 is not allowed; allowed: a number > 0"),
        ({"goodput": {"itl": 5}}, "goodput.itl: 'itl' is not allowed; allowed: the keys ttft, tpot, e2el"),
        ({"goodput": 5}, "goodput: 5 is not allowed"),
        ({"attainment": 1.5}, "attainment: 1.5 is not allowed"),
        ({"attainment": 95}, "attainment: 95 is not allowed"),
    ],
)
def test_what_is_no_bound_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**keys)


def test_bounds_made_in_python_are_checked_too() -> None:
    for wrong in ({"ttft_s": -1.0}, {"tpot_s": math.nan}, {"e2el_s": 0}, {"attainment": 0}):
        with pytest.raises(InputError):
            Goodput(**wrong)
