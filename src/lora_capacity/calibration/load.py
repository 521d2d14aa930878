"""A calibration from whatever names it: one there is, or a model and a GPU to derive one for."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

from lora_capacity.calibration.derive import derive_calibration
from lora_capacity.calibration.model import Calibration, bundled_names, read_calibration
from lora_capacity.errors import InputError, check_keys, check_type
from lora_capacity.hardware import Processor
from lora_capacity.memory import Deployment
from lora_capacity.models import ModelShape

CalibrationLike = Calibration | Mapping[str, Any] | str | os.PathLike[str]
"""What `load_calibration` takes."""


class Served(TypedDict, total=False):
    """How a model is served, as far as a calibration is derived from it."""

    tensor_parallel_size: int | None
    quantization: str | None
    kv_cache_dtype: str | None
    target_modules: str | tuple[str, ...] | None
    vllm_version: str | None


_LAYOUT = tuple(entry.name for entry in dataclasses.fields(Deployment))
DERIVED_FROM = ("model", "gpu", *Served.__annotations__)
"""What a calibration is derived from, by vLLM's names."""


def load_calibration(
    calibration: CalibrationLike | None = None,
    *,
    model: ModelShape | str | None = None,
    gpu: Processor | str | None = None,
    **served: Unpack[Served],
) -> Calibration:
    """Return the calibration that is asked for: one there is, or one derived for a model on a GPU.

    Args:
        calibration: The name of a bundled one (`bundled_names`) or the path of a file; a mapping of the arguments
            below; or a calibration, which stands for itself. None: one is derived.
        model: Layer shapes, the folder or ``config.json`` of a model, or the name of a well-known one.
        gpu: A GPU, or its name.
        **served: How it is served, by vLLM's names: ``tensor_parallel_size``, by default 1; ``quantization``, as
            ``config.json`` says; ``kv_cache_dtype``, by default ``auto``; ``target_modules``, by default
            ``all-linear``; ``vllm_version``, by default the newest that is known.

    Raises:
        InputError: If there is none of this name, nothing or too much says which, or model, GPU or layout is not known.
    """
    given = {"model": model, "gpu": gpu, **served}
    check_keys("", given, DERIVED_FROM)
    derived = {name: value for name, value in given.items() if value is not None}
    if calibration is None:
        return _derive(derived)
    for name, value in derived.items():
        raise InputError(name, value, "nothing beside calibration")
    if isinstance(calibration, Calibration):
        return calibration
    if isinstance(calibration, Mapping):
        check_keys("calibration", calibration, DERIVED_FROM)
        return _derive({name: value for name, value in calibration.items() if value is not None})
    allowed = "a Calibration, the name or the file of one, or a mapping of a model and a GPU"
    return read_calibration(os.fspath(check_type("calibration", calibration, (str, os.PathLike), allowed)))


def _derive(derived: dict[str, Any]) -> Calibration:
    if not derived:
        allowed = f"a file, or one of {', '.join(bundled_names())}; or a model and a GPU to derive one from"
        raise InputError("calibration", None, allowed)
    for name in ("model", "gpu"):
        if name not in derived:
            raise InputError(name, None, "a calibration, or a model and a GPU to derive one from")
    deployment = Deployment(**{name: derived.pop(name) for name in _LAYOUT if name in derived})
    return derive_calibration(deployment=deployment, **derived)
