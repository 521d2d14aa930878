"""Words for labels and quantities: every label of a status, verdict and bottleneck has its own."""

import math

import pytest

from lora_capacity import Status
from lora_capacity.reports.heatmap import BOTTLENECKS, REGIONS
from lora_capacity.scenarios import Bottleneck
from lora_capacity.words import FAILURES, bottleneck, duration, percent, plural, shown, spoken

LABELS = sorted({*(each.label for each in (*Status, *Bottleneck)), *BOTTLENECKS, *REGIONS})


@pytest.mark.parametrize("label", LABELS)
def test_every_label_is_told_without_underscores(label: str) -> None:
    assert spoken(label)
    assert "_" not in spoken(label)


def test_different_labels_are_told_differently() -> None:
    assert len({spoken(label) for label in LABELS}) == len(LABELS)


def test_statuses_without_numbers_have_a_sentence() -> None:
    assert set(FAILURES) == {status.label for status in Status if not status.started}


@pytest.mark.parametrize(
    ("label", "told"),
    [("none", "none"), ("kv_cache", "the KV cache"), ("sequences", "the batch limit (max_num_seqs)")],
)
def test_bottleneck_names_its_flag(label: str, told: str) -> None:
    assert bottleneck(label) == told


def test_counts_and_quantities() -> None:
    assert [plural(count, "slot") for count in (0, 1, 1024)] == ["0 slots", "1 slot", "1,024 slots"]
    assert [duration(value) for value in (0.0123, 0.5, 1.234, 75.0, math.nan)] == [
        *("12.3 ms", "500 ms", "1.23 s", "75 s", "–"),
    ]
    assert [shown(value) for value in (True, 12345, 12345.6, None)] == ["yes", "12,345", "12,346", "–"]


def test_no_number_is_told_in_powers_of_ten() -> None:
    assert [shown(value) for value in (999.7, 5e-10, -5e-10, 0.0)] == ["1,000", "< 0.001", "> -0.001", "0"]
    assert [percent(value) for value in (0.0, 1e-7, 0.0123, math.nan)] == ["0 %", "< 0.01 %", "1.23 %", "–"]
