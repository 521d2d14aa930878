"""Calibrations from whatever names them."""

from pathlib import Path

import pytest

from lora_capacity.calibration import bundled_names, derive_calibration, load_calibration
from lora_capacity.errors import InputError
from lora_capacity.memory import Deployment
from tests.examples import make_calibration


def test_a_calibration_stands_for_itself_its_name_and_its_file(tmp_path: Path) -> None:
    calibration = make_calibration()
    calibration.save(tmp_path / "mine.json")
    assert load_calibration(calibration) is calibration
    assert load_calibration(tmp_path / "mine.json").name == calibration.name
    assert load_calibration(bundled_names()[0]).name == bundled_names()[0]


def test_one_is_derived_for_a_model_and_a_gpu() -> None:
    layout = {"tensor_parallel_size": 2, "kv_cache_dtype": "fp8"}
    expected = derive_calibration("Qwen3-8B", "L40S", deployment=Deployment(**layout), vllm_version="0.20.0")
    for found in (
        load_calibration(model="Qwen3-8B", gpu="L40S", vllm_version="0.20.0", **layout),
        load_calibration({"model": "Qwen3-8B", "gpu": "L40S", "vllm_version": "0.20.0", **layout}),
    ):
        assert found.to_json() == expected.to_json()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, r"^calibration: missing.* one of llama.*; or a model and a GPU"),
        ({"model": "Qwen3-8B"}, r"^gpu: missing.* a model and a GPU"),
        ({"calibration": {"model": "Qwen3-8B"}}, r"^gpu: missing"),
        ({"calibration": {"modell": "x"}}, r"^calibration.modell: .* did you mean 'model'"),
        ({"calibration": bundled_names()[0], "gpu": "L4"}, r"^gpu: cannot be combined with calibration"),
        ({"calibration": "lama"}, r"^calibration: 'lama'"),
        ({"model": "Qwen3-8B", "gpu": 3}, r"^gpu: 3"),
        ({"model": 3, "gpu": "L4"}, r"^model: 3"),
    ],
)
def test_what_names_none_is_refused(given: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_calibration(**given)
