import numpy as np
import pytest

from lora_capacity.reports import colours


@pytest.mark.parametrize(("dark", "sign"), [(False, -1), (True, 1)])
def test_luminance_changes_one_way_along_the_map(dark: bool, sign: int) -> None:
    steps = sign * np.diff([_luminance(colour) for colour in colours.ramp(dark=dark)])
    assert steps.min() > 0


@pytest.mark.parametrize("dark", [False, True])
def test_neighbours_are_about_equally_far_apart_in_lightness(dark: bool) -> None:
    steps = np.abs(np.diff([_luminance(colour) ** (1 / 3) for colour in colours.ramp(dark=dark)]))
    assert steps.max() < 1.6 * steps.min()


def test_every_anchor_and_what_lies_between_can_be_shown() -> None:
    for anchors in (colours._LIGHT, colours._DARK):
        between = np.concatenate([(1 - t) * anchors[:-1] + t * anchors[1:] for t in np.linspace(0, 1, 21)])
        rgb = colours.srgb(between)
        assert rgb.min() >= 0
        assert rgb.max() <= 1


def test_known_colours() -> None:
    assert colours.srgb([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]) == pytest.approx(np.array([[1.0] * 3, [0.0] * 3]), abs=1e-3)
    # The red primary of sRGB.
    assert colours.srgb([[0.62796, 0.25768, 29.234]]) == pytest.approx(np.array([[1.0, 0.0, 0.0]]), abs=2e-3)


def _luminance(colour: str) -> float:
    encoded = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(encoded > 0.04045, ((encoded + 0.055) / 1.055) ** 2.4, encoded / 12.92)
    return float(linear @ [0.2126, 0.7152, 0.0722])
