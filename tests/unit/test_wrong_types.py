"""What is handed over in the wrong type is told by the name of the argument, in one line."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import pytest

import lora_capacity as lc
from tests.cli.test_bad_input import RUN
from tests.examples import make_calibration

LENGTHS = {"mean": 30, "std": 10, "min": 4, "max": 60}
CONTENT = {
    "adapters": {"mix": {"rates_per_s": [0.4], "ranks": [8]}},
    "requests": {"input_tokens": LENGTHS, "output_tokens": LENGTHS},
    "horizon_s": 60,
}
CALIBRATION = make_calibration()
SCENARIOS = lc.build_scenarios(CONTENT, CALIBRATION, [2], [1])
FOUND = lc.recommend(CONTENT, CALIBRATION, engine="steady", adapters=4, max_loras=4, max_num_seqs=16)
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "runs.csv").write_text(f"{','.join(RUN)}\n{','.join(RUN.values())}\n", encoding="utf-8")
    RUNS = lc.read_runs(Path(folder) / "runs.csv")
BY_MODEL = {RUN["model"]: CALIBRATION}
FLEET = {"adapters": [{"adapter": "a", "rank": 8, "rate_per_s": 0.1}], "pools": [{"calibration": CALIBRATION}]}
FLEET |= {"requests": CONTENT["requests"]}
ENTRIES: dict[Any, dict[str, Any]] = {
    lc.Objective: {},
    lc.Workload.from_file: {"path": "none.yaml"},
    lc.Workload.from_mapping: {"mapping": CONTENT},
    lc.build_report: {"workload": CONTENT, "calibration": CALIBRATION, "found": FOUND},
    lc.build_scenarios: {"workload": CONTENT, "calibration": CALIBRATION, "adapters": [2], "max_loras": [1]},
    lc.fit_calibration: {"profile_dir": "none"},
    lc.load_calibration: {"calibration": CALIBRATION},
    lc.load_surrogate: {"name": "none"},
    lc.load_workload: {"workload": CONTENT},
    lc.place: {"fleet": FLEET},
    lc.plan_memory: {"model": "Qwen3-8B", "gpu": "L40S"},
    lc.predict_runs: {"runs": RUNS, "calibrations": BY_MODEL, "engine": "event"},
    lc.predict_workload: {"surrogate": lc.bundled_names()[0], "calibration": CALIBRATION, "workload": CONTENT},
    lc.read_runs: {"path": "none.csv"},
    lc.recommend: {"workload": CONTENT, "calibration": CALIBRATION, "engine": "steady"},
    lc.score_runs: {"runs": RUNS, "predictions": lc.predict_runs(RUNS, BY_MODEL)},
    lc.simulate: {"calibration": CALIBRATION, "scenarios": SCENARIOS, "traffic": CONTENT, "engine": "event"},
}
CASES = [
    (entry, given, name)
    for entry, given in ENTRIES.items()
    for name, parameter in inspect.signature(entry).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]


@pytest.mark.parametrize(
    ("entry", "given", "name"), CASES, ids=[f"{entry.__qualname__}-{name}" for entry, _, name in CASES]
)
def test_a_wrong_type_is_an_input_error_that_names_the_argument(
    entry: Any, given: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lc.InputError) as told:
        entry(**given | {name: object()})
    assert told.value.field.startswith(_FIELDS.get((entry, name), name))
    assert "\n" not in str(told.value)


_FIELDS: dict[tuple[Any, str], str] = {
    (lc.Objective, "goal"): "objective",
    (lc.Workload.from_mapping, "mapping"): "workload",
}


def test_every_public_function_is_tried() -> None:
    functions = {getattr(lc, name) for name in lc.__all__ if inspect.isfunction(getattr(lc, name))}
    assert functions - set(ENTRIES) == {lc.bundled_names}
