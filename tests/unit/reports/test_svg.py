import math
import re

import numpy as np
import pytest

from lora_capacity.reports import svg


def test_element_escapes_what_it_is_given() -> None:
    assert svg.element("g", data_i='"<1>&"') == '<g data-i="&quot;&lt;1&gt;&amp;&quot;"/>'
    assert svg.text("a < b", 1.0, 2.5) == '<text x="1" y="2.5">a &lt; b</text>'


@pytest.mark.parametrize(("low", "high"), [(0.0, 9300.0), (0.0, 0.037), (-8.3, 2.6), (3.0, 3.0)])
def test_linear_ticks_lie_within_and_are_round(low: float, high: float) -> None:
    ticks = svg.linear_ticks(low, high, 5)
    assert 1 <= len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(
            round(step / 10 ** math.floor(math.log10(step) + 1e-9))
        )


@pytest.mark.parametrize(("low", "high"), [(0.04, 900.0), (1.0, 384.0), (1.0, 1.0), (2.0, 45.0)])
def test_log_scale_keeps_to_its_ends_and_ticks_lie_within(low: float, high: float) -> None:
    scale = svg.Scale(low, high, 100.0, 0.0, log=True)
    places = [scale(tick) for tick in scale.ticks(6)]
    assert places == sorted(places, reverse=True)
    assert all(-0.5 <= place <= 100.5 for place in places)


def test_outline_surrounds_every_cell_that_is_set() -> None:
    mask = np.array([[True, True, False], [True, False, False]])
    path = svg.outline(mask, [0.0, 10.0, 20.0, 30.0], [20.0, 10.0, 0.0])
    assert _length(path) == pytest.approx(80.0)


def test_filled_covers_cells_row_by_row() -> None:
    mask = np.array([[True, True, False, True]])
    assert svg.filled(mask, [0.0, 10.0, 20.0, 30.0, 40.0], [10.0, 0.0]).count("Z") == 2


def test_line_breaks_where_a_value_is_missing() -> None:
    drawn = svg.line([(0.0, 1.0), (1.0, math.nan), (2.0, 1.0), (3.0, 2.0)])
    assert drawn.count("M") == 2
    assert drawn.count("L") == 1


def test_label_lies_within_its_region_and_off_what_is_taken() -> None:
    xs, ys = [0.0, 100.0, 200.0], [100.0, 50.0, 0.0]
    mask = np.array([[False, True], [True, True]])
    place = svg.room_for(mask, xs, ys, 60.0, 15.0)
    assert place is not None
    assert place[0] > 100.0 or place[1] < 50.0
    elsewhere = svg.room_for(mask, xs, ys, 60.0, 15.0, [(100.0, 0.0, 200.0, 100.0)])
    assert elsewhere is not None
    assert elsewhere[0] < 100.0
    assert svg.room_for(mask, xs, ys, 300.0, 15.0) is None


def test_notes_lie_off_lines_marks_and_each_other() -> None:
    line = [(0.0, 50.0), (200.0, 50.0)]
    wanted = [(words, (100.0, 50.0), (0.0, 200.0)) for words in ("one", "two")]
    drawn = svg.notes(wanted, [line], [(100.0, 30.0)], (0.0, 0.0, 200.0, 100.0))
    (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y in re.findall(r'x="([\d.]+)" y="([\d.]+)"', drawn))
    half = 0.5 * svg.width_of("one", 11.0)
    for x, y in ((x1, y1), (x2, y2)):  # y is the base line, four pixels below the middle
        assert abs(y - 4.0 - 50.0) >= 8.0
        assert abs(x - 100.0) >= half or abs(y - 4.0 - 30.0) >= 8.0
    assert abs(x1 - x2) >= 2.0 * half or abs(y1 - y2) >= 12.0
    narrow = ("a text as long as this", (10.0, 5.0), (0.0, 40.0))
    assert svg.notes([narrow], [], [], (0.0, 0.0, 200.0, 20.0)) == ""


def _length(path: str) -> float:
    total = 0.0
    for x, y, direction, end in re.findall(r"M([\d.]+) ([\d.]+)([VH])([\d.]+)", path):
        total += abs(float(end) - float(y if direction == "V" else x))
    return total
