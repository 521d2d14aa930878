import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity.calibration import Calibration, bundled_names, load_calibration
from lora_capacity.costs import FrontEndCosts
from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.workload import RunLengths
from tests.examples import COSTS, LLAMA_8B, make_calibration, make_costs

RUNS = RunLengths(0.98, 207.0, 1024, 360.0, 26_000.0)
FULL = make_calibration(runs=RUNS, accuracy={"throughput_smape": 1.5}, provenance={"source": "a table"})
CONTENT = FULL.to_json()


def changed(path: str, value: Any) -> dict[str, Any]:
    """The content of a file with one field replaced or added, given by its path."""
    content = copy.deepcopy(CONTENT)
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[name]
    place[last] = value
    return content


def without(path: str) -> dict[str, Any]:
    content = changed(path, None)
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[name]
    del place[last]
    return content


ERRORS = {"base_s": 0.1, "token_s": 0.2}


@pytest.mark.parametrize(
    ("accuracy", "match"),
    [
        ({"coefficient_errors": {"base_s": "x"}}, r"coefficient_errors.base_s: 'x'"),
        ({"coefficient_errors": {"base_s": -1}}, r"coefficient_errors.base_s: -1"),
        ({"coefficient_errors": [1]}, "coefficient_errors: .*an object of numbers"),
        ({"coefficient_errors": ERRORS, "coefficient_correlations": [[]]}, "a triangle of numbers, 2 rows"),
        ({"coefficient_errors": ERRORS, "coefficient_correlations": [[], [1, 2]]}, "a triangle of numbers"),
        ({"coefficient_errors": ERRORS, "coefficient_correlations": [[], [7]]}, r"coefficient_correlations\[1\]: 7"),
        ({"coefficient_errors": ERRORS, "coefficient_correlations": [[], [None]]}, r"coefficient_correlations\[1\]"),
        ([], "accuracy: 'list'"),
    ],
)
def test_errors_of_coefficients_are_checked(accuracy: object, match: str) -> None:
    content = load_calibration(bundled_names()[0]).to_json() | {"accuracy": accuracy}
    with pytest.raises(InputError, match=match):
        Calibration.from_json(content)


def test_a_calibration_survives_a_file(tmp_path: Path) -> None:
    for calibration in (FULL, make_calibration(), replace(FULL, name="größer")):
        path = tmp_path / "calibration.json"
        calibration.save(path)
        assert Calibration.from_file(path) == calibration
        assert load_calibration(path) == load_calibration(str(path)) == calibration
        assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(calibration.to_json()))
        assert Calibration.from_json(calibration.to_json()) == calibration


OLD_NAMES = {
    "lora_listing_s": "listed_s",
    "skipped_request_s": "passed_over_s",
    "queued_request_s": "waiting_s",
    "host_to_gpu_load_s": "host_s",
}


def as_version_1(content: Any) -> Any:
    """The content of a file as it was written before the coefficients were renamed."""
    if isinstance(content, dict):
        old = {OLD_NAMES.get(name, name): as_version_1(value) for name, value in content.items()}
        return old | {"schema_version": 1} if "schema_version" in old else old
    return content


@pytest.mark.parametrize("name", bundled_names())
def test_a_bundled_calibration_knows_what_a_server_is_told_to_load(name: str) -> None:
    organisation, _, model = load_calibration(name).model.served_as.partition("/")
    assert organisation
    assert model.lower().replace("-", "").replace(".", "") in name.replace("-", "").replace(".", "")


@pytest.mark.parametrize("name", bundled_names())
def test_a_file_of_version_1_is_read_as_the_same_calibration(tmp_path: Path, name: str) -> None:
    calibration = load_calibration(name)
    old = as_version_1(calibration.to_json())
    assert {*OLD_NAMES.values()} < {*old["coefficients"]["step"], *old["coefficients"]["loads"]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load_calibration(tmp_path / "old.json") == calibration
    del old["coefficients"]["loads"]["host_s"]
    with pytest.raises(InputError, match="host_to_gpu_load_s: missing"):
        Calibration.from_json(old)


def test_new_names_do_not_stand_in_a_file_twice() -> None:
    twice = as_version_1(CONTENT)
    twice["coefficients"]["loads"]["host_to_gpu_load_s"] = {"value": 1.0, "unit": "s"}
    with pytest.raises(InputError, match=r"here: host_to_gpu_load_s: .* allowed: host_s, as schema version 1"):
        Calibration.from_json(twice, "here")


def test_a_file_without_a_front_end_adds_nothing_to_the_engine() -> None:
    content = make_calibration().to_json()
    del content["coefficients"]["front_end"]
    assert set(jax.tree.leaves(Calibration.from_json(content).costs.front_end)) == {0.0}
    content["coefficients"]["front_end"] = {"response_s": {"value": 0.003, "unit": "s"}}
    assert Calibration.from_json(content).costs.front_end == FrontEndCosts(response_s=0.003)
    content["coefficients"]["front_end"] = {"response_s": {"value": -1, "unit": "s"}}
    with pytest.raises(InputError, match=r"front_end\.response_s: -1"):
        Calibration.from_json(content)


def test_a_file_names_every_coefficient_with_its_unit() -> None:
    coefficients = CONTENT["coefficients"]
    assert coefficients["step"]["base_s"] == {"value": COSTS.step.base_s, "unit": "s"}
    factor = replace(FULL, costs=make_costs(active_block_factor=0.5)).to_json()["coefficients"]["step"]
    assert factor["active_block_factor"] == {"value": 0.5, "unit": "1"}
    assert set(coefficients["loads"]) == {"host_to_gpu_load_s", "disk_s", "disk_rank_s"}
    assert "kernels" not in coefficients, "follows from the model"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([CONTENT], "here: 'list' is not allowed; allowed: a JSON object"),
        (changed("schema_version", 3), "here: schema_version: 3 is not allowed; allowed: 1 to 2; update lora-capacity"),
        (changed("schema_version", "one"), "here: schema_version: 'one' is not allowed; allowed: 1 to 2"),
        (changed("schema_version", 0), "here: schema_version: 0 is not allowed; allowed: 1 to 2"),
        (changed("schema_version", True), "here: schema_version: True is not allowed; allowed: 1 to 2"),
        (without("schema_version"), "here: schema_version: missing; allowed: 1 to 2"),
        (without("coefficients"), "here: coefficients: missing"),
        (without("memory"), "here: memory: missing"),
        (changed("coefficient", {}), "here: coefficient: .* did you mean 'coefficients'?"),
        (
            changed("coefficients", []),
            "here: coefficients: 'an empty list' is not allowed; allowed: a mapping with the keys step, loads",
        ),
        (changed("coefficients.steps", {}), "here: coefficients.steps: .* did you mean 'step'?"),
        (
            without("coefficients.step"),
            "here: coefficients.step: missing; allowed: a mapping with the keys base_s",
        ),
        (
            without("coefficients.loads.host_to_gpu_load_s"),
            "here: coefficients.loads.host_to_gpu_load_s: missing",
        ),
        (
            changed("coefficients.step.token_s.value", -1e-5),
            "here: coefficients.step.token_s: -1e-05 is not allowed; allowed: a number >= 0",
        ),
        (changed("coefficients.step.token_s.value", "40 us"), "coefficients.step.token_s: '40 us' is not allowed"),
        (changed("coefficients.step.token_s", 4e-5), "coefficients.step.token_s: missing"),
        (changed("coefficients.step.tokens_s", {}), "coefficients.step.tokens_s: .* did you mean 'token_s'?"),
        (changed("fitted_ranges", [1]), "here: fitted_ranges: 'a list' is not allowed; allowed: a mapping"),
        (changed("fitted_ranges.adapters", 8), "fitted_ranges.adapters: 8 is not allowed; allowed: a list of the"),
        (changed("fitted_ranges.adapters", [9, 8]), "fitted_ranges.adapters: 8 is not allowed; allowed: a number >= 9"),
        (changed("capacity_error", -0.1), "here: capacity_error: -0.1 is not allowed"),
        (changed("capacity_error", None), "here: capacity_error: missing"),
        (changed("runs", 3), "here: runs: 3 is not allowed; allowed: a mapping with the keys output_share"),
        (changed("runs.max_pending", 0), "here: runs.max_pending: 0 is not allowed; allowed: a number > 0"),
        (without("runs.output_share"), "here: runs.output_share: missing"),
        (changed("device", "tpu"), "here: device: 'tpu' is not allowed; allowed: gpu, cpu"),
        (changed("vllm_version", "new"), "vllm_version: 'new' is not allowed"),
        (changed("memory.other_bytes", -1), "here: memory.other_bytes: -1 is not allowed"),
        (changed("gpu.memory_bytes", "64 GB"), "here: gpu.memory_bytes: '64 GB' is not allowed"),
        (without("model.num_layers"), "here: model.num_layers: missing"),
        (changed("model.architecture", "Other"), "here: model.architecture: 'Other' is not allowed"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line_that_names_the_field(content: object, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("?", r"\?")) as caught:
        Calibration.from_json(content, "here")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"coefficients: 1", r"calibration\.json line 1: 'not JSON \(.*' is not allowed; allowed: a calibration file"),
        (b"\xff\xfe", r"calibration\.json: 'bytes that are no text'"),
        (b"", r"calibration\.json line 1: 'not JSON"),
        (b"[]", r"calibration\.json: 'list' is not allowed"),
        (b"{}", r"calibration\.json: schema_version: missing"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match=words) as caught:
        load_calibration(path)
    assert str(caught.value).isprintable()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file not found: .*absent\.json"):
        load_calibration(tmp_path / "absent.json")
    with pytest.raises(InputError, match="'a folder'"):
        load_calibration(tmp_path)
    with pytest.raises(InputError, match=r"calibration: 'lama' is not allowed; allowed: a file, or one of "):
        load_calibration("lama")


def test_bundled_calibrations_load_by_name_and_are_called_so() -> None:
    names = bundled_names()
    assert list(names) == sorted(names)
    for name in names:
        calibration = load_calibration(name)
        assert calibration.name == name
        assert calibration.runs is not None
        assert Calibration.from_json(calibration.to_json()) == calibration


def test_a_name_with_a_slip_gets_a_hint() -> None:
    name = bundled_names()[0]
    with pytest.raises(InputError, match=f"did you mean '{name}'"):
        load_calibration(name[:-1])


def test_outside_tells_what_was_never_measured() -> None:
    calibration = make_calibration(fitted_ranges={"adapters": (8.0, 384.0), "max_loras": (4.0, 96.0)})
    assert calibration.outside(adapters=[8, 384, 7, 385]).tolist() == [False, False, True, True]
    outside = calibration.outside(adapters=[[8], [1]], max_loras=[4, 97], max_lora_rank=1e9)
    np.testing.assert_array_equal(outside, [[False, True], [True, True]])


def test_behaviour_and_output_lengths_follow_from_what_is_stored() -> None:
    assert FULL.behaviour == VllmBehaviour.for_version("0.8.5")
    assert FULL.model == LLAMA_8B
    lengths = RUNS.output_lengths(190.0)
    assert [lengths.mean, lengths.std] == pytest.approx([190.0, 207.0])
    assert (lengths.min, lengths.max) == (1, 1024)


def test_what_lies_outside_is_told_by_name():
    found = make_calibration().extrapolations(adapters=600, max_loras=8, max_num_seqs=3)
    assert found == ["adapters 600 is outside the calibrated range 8 to 384: extrapolated"]
