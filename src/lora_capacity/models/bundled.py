"""Shapes of the models that are served most, by their names at Hugging Face."""

import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.models.shape import ModelShape

_SHOWN = 6
"""Most names that a message lists of those that are like the one asked for."""


@functools.cache
def bundled_shapes() -> Mapping[str, Mapping[str, Any]]:
    """Sizes as in ``config.json`` by name. Source: the files of these models."""
    text = (importlib.resources.files("lora_capacity.models") / "bundled_shapes.json").read_text(encoding="utf-8")
    return {name: each["config"] for each in json.loads(text) for name in each["names"]}


def find_shape(model: str, quantization: str | None = None, layouts: Path | None = None) -> ModelShape:
    """Return the shape of a model: of a folder or a ``config.json`` if there is one, else a bundled one.

    Args:
        model: A path, or a name with or without its organisation, in whatever case.
        quantization: As in :meth:`ModelShape.from_hf_config`.
        layouts: As in :meth:`ModelShape.from_hf_config`.

    Raises:
        InputError: If there is neither such a file nor such a name, or as :meth:`ModelShape.from_hf_config` says.
    """
    path = Path(model)
    if path.exists():
        return ModelShape.from_file(path, quantization, layouts)
    names = bundled_shapes()
    wanted = model.lower()
    found = [name for name in names if wanted in (name.lower(), name.lower().rpartition("/")[2])]
    if not found:
        like = [name for name in names if wanted.rpartition("/")[2].split("-")[0] in name.lower()]
        known = f"a folder with config.json, or one of {', '.join(like[:_SHOWN] or list(names)[:_SHOWN])}, ..."
        raise InputError("model", model, known, nearest_hint(model, names))
    return ModelShape.from_hf_config({**names[found[0]], "_name_or_path": found[0]}, found[0], quantization, layouts)
