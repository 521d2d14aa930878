"""A surrogate's rules as a drawing: questions from left to right, factors at the right."""

from collections.abc import Mapping
from typing import Any

from lora_capacity.reports import svg
from lora_capacity.reports.figures import stand_alone

_ROW, _COLUMN, _TOP, _MARGIN = 22.0, 168.0, 64.0, 14.0
"""Height of a leaf and width of a question, which fit their texts; room for the title, and around all."""

_SMALL = 11.0
"""Size of the letters of questions, in CSS pixels: the smallest that is read with ease."""


def draw_rules(rules: Mapping[str, Any]) -> str:
    """Return the tree of rules as an SVG document in light colours; of each question the upper branch is "at most".

    Args:
        rules: The rules as a JSON object, as their ``to_json`` returns it.
    """
    tree, leaves, target = rules["tree"], rules["leaves"], rules["target"]
    parts: list[str] = []
    depth = _depth(tree)
    height = _TOP + _ROW * leaves + _MARGIN
    width = 2.0 * _MARGIN + _COLUMN * depth + 60.0
    _draw(tree, 0, 0, parts)
    title = f"{target} = {rules['law']} · factor"
    head = svg.text(title, _MARGIN, 22.0, class_="strong")
    note = svg.text("at most: upper branch; more: lower branch", _MARGIN, 42.0, class_="note")
    wide = max(width, 2.0 * _MARGIN + svg.width_of(title) * 1.15)
    told = f"A tree of {leaves} leaves, the figures rounded to two digits"
    return stand_alone(svg.drawing(wide, height, f"Rules for {target}", told, head, note, *parts))


def _draw(tree: Mapping[str, Any], first: int, depth: int, parts: list[str]) -> float:
    """Draw a subtree whose first leaf is in a row; return how far down its root is."""
    x = _MARGIN + _COLUMN * depth
    if "factor" in tree:
        y = _TOP + _ROW * (first + 0.5)
        parts.append(svg.text(f"× {tree['factor']:.2g}", x, y + 4.0, class_="strong"))
        return y
    above = _draw(tree["below"], first, depth + 1, parts)
    below = _draw(tree["above"], first + _leaves(tree["below"]), depth + 1, parts)
    y = 0.5 * (above + below)
    words = f"{tree['feature']} ≤ {tree['threshold']:g}"
    size = min(_SMALL, _SMALL * (_COLUMN - 18.0) / svg.width_of(words, _SMALL))
    end = x + svg.width_of(words, size) + 4.0
    for child in (above, below):
        parts.append(svg.path("link", f"M{end:.1f} {y:.1f}L{x + _COLUMN - 5.0:.1f} {child:.1f}"))
    parts.append(svg.text(words, x, y + 4.0, class_="label", font_size=size))
    return y


def _leaves(tree: Mapping[str, Any]) -> int:
    return 1 if "factor" in tree else _leaves(tree["below"]) + _leaves(tree["above"])


def _depth(tree: Mapping[str, Any]) -> int:
    return 0 if "factor" in tree else 1 + max(_depth(tree["below"]), _depth(tree["above"]))
