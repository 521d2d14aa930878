"""Colours of figures: a sequential map whose lightness grows evenly, so that it reads in grey and to the colour-blind.

Lightness in OKLab is linear along the map, in light and in dark; only hue and chroma bend. More ink means more on a
light page, more light on a dark one.

Source: OKLab, B. Ottosson, "A perceptual color space for image processing", 2020.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

STEPS = 32
"""Colours of the map: more than the eye tells apart, and a letter or digit each in the page's data."""

_LIGHT = np.array([[0.955, 0.035, 105.0], [0.745, 0.085, 180.0], [0.535, 0.090, 240.0], [0.325, 0.115, 278.0]])
_DARK = np.array([[0.300, 0.085, 282.0], [0.505, 0.085, 245.0], [0.710, 0.090, 182.0], [0.915, 0.100, 108.0]])
"""Lightness, chroma and hue in degrees at equal distances along the map, lowest first."""

_TO_LMS = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def ramp(*, dark: bool = False, steps: int = STEPS) -> list[str]:
    """Return the map's colours as ``#rrggbb``, lowest first."""
    anchors = _DARK if dark else _LIGHT
    place = np.linspace(0.0, len(anchors) - 1.0, steps)
    columns = [np.interp(place, np.arange(len(anchors)), column) for column in anchors.T]
    columns[0] = np.linspace(anchors[0, 0], anchors[-1, 0], steps)
    return [_hex(colour) for colour in srgb(np.stack(columns, axis=1))]


def srgb(lch: ArrayLike) -> Float[np.ndarray, "colours 3"]:
    """Return gamma-encoded sRGB, unclipped, of OKLab lightness, chroma and hue in degrees, ``[colours, 3]``."""
    lightness, chroma, hue = np.asarray(lch, np.float64).T
    lab = np.stack([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], axis=1)
    linear = (lab @ _TO_LMS.T) ** 3 @ _TO_RGB.T
    bright = 1.055 * np.maximum(linear, 0.0031308) ** (1.0 / 2.4) - 0.055
    return np.asarray(np.where(linear > 0.0031308, bright, 12.92 * linear))


def _hex(colour: Float[np.ndarray, "3"]) -> str:
    return "#" + "".join(f"{round(255 * min(max(part, 0.0), 1.0)):02x}" for part in colour.tolist())
