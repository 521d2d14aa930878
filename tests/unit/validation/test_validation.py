"""Reading measured runs, and every score on cases worked out by hand."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.errors import InputError
from lora_capacity.fitting.measured import read_measured
from lora_capacity.measurements import Runs, is_starved, mape, read_runs, read_time_means, smape
from lora_capacity.status import Status
from lora_capacity.validation import (
    Predictions,
    comparable_runs,
    pack_runs,
    predict_runs,
    run_lengths,
    score_runs,
)
from lora_capacity.validation.predict import mean_of_known

MODEL = "llama-3.1-8b-instruct"
ROW = {
    "set": "mine",
    "scenario": "s",
    "model": MODEL,
    "max_loras": 8,
    "max_cpu_loras": 20,
    "max_lora_rank": 16,
    "ranks": "8 16",
    "rates": "0.4 0.2 0.1",
    "rate_values": "0.1 0.2 0.4",
    "rate_counts": "6 7 7",
    "mean_input_tokens": 220,
    "mean_output_tokens": 200,
    "completed": 17000,
    "duration_s": 3600,
    "input_throughput": 1000,
    "output_throughput": 900,
    "mean_itl_ms": 30,
    "mean_ttft_ms": 120,
    "status": "ok",
    "arrivals": "",
}
MEASURED = [name for name in ROW if name.startswith("mean_") or name.endswith("_throughput")] + [
    "completed",
    "duration_s",
]


@pytest.fixture(scope="module")
def calibrations() -> dict[str, Calibration]:
    return {MODEL: load_calibration("llama-3.1-8b-instruct-h100-64gb")}


def read(folder: Path, *changes: dict[str, Any], without: tuple[str, ...] = ()) -> Runs:
    """Read runs that differ from `ROW`; those of other numbers of adapters have their rates dealt in turn."""
    dealt = {"rate_values": "", "rate_counts": ""}
    given = [(dealt if "max_cpu_loras" in change else {}) | change for change in changes]
    rows = [{name: value for name, value in (ROW | change).items() if name not in without} for change in given]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path = folder / "runs.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_runs(path)


def predictions(runs: Runs, **columns: Any) -> Predictions:
    """Predictions that are right, but for the columns given."""
    right: dict[str, Any] = {
        "throughput_tokens_per_s": runs.throughput_tokens_per_s,
        "itl_s": runs.itl_s,
        "tpot_s": runs.tpot_s,
        "ttft_s": runs.ttft_s,
        "mean_running": np.full(len(runs), 1.0),
        "kv_usage": np.full(len(runs), 0.1),
        "status": np.array([Status(code).label for code in runs.status], dtype=object),
        "starving_probability": np.zeros(len(runs)),
        "offered_tokens_per_s": np.full(len(runs), 2000.0),
    }
    given = {name: np.asarray(value, dtype=right[name].dtype) for name, value in columns.items()}
    return Predictions(**right | given)


def test_a_row_is_read(tmp_path: Path) -> None:
    runs = read(tmp_path, {}, {"arrivals": 17500})
    assert len(runs) == 2
    assert runs.class_count.tolist() == [[6, 7, 7]] * 2
    assert runs.class_rate_per_s.tolist() == [[0.1, 0.2, 0.4]] * 2
    assert runs.mean_rank.tolist() == [12, 12]
    assert runs.throughput_tokens_per_s.tolist() == [1900, 1900]
    assert runs.itl_s.tolist() == [0.03, 0.03]
    assert runs.ttft_s.tolist() == [0.12, 0.12]
    assert runs.started.all()
    assert math.isnan(runs.arrivals[0])
    assert runs.nominal_rate_per_s == pytest.approx([4.8, 4.8])


def test_settings_that_are_not_recorded_are_those_of_the_published_runs(tmp_path: Path) -> None:
    assert read(tmp_path, {}).max_num_seqs.tolist() == [2048]
    runs = read(tmp_path, {"max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 4096})
    assert (runs.max_num_seqs[0], runs.max_num_batched_tokens[0], runs.max_model_len[0]) == (64, 512, 4096)


def test_rates_are_dealt_in_turn_where_counts_are_not_recorded(tmp_path: Path) -> None:
    runs = read(tmp_path, {"rate_values": "", "rate_counts": ""})
    assert runs.class_count.tolist() == [[7, 7, 6]]
    assert runs.class_rate_per_s.tolist() == [[0.4, 0.2, 0.1]]
    few = read(tmp_path, {"max_cpu_loras": 2, "max_loras": 1}, without=("rate_values", "rate_counts"))
    assert few.class_count.tolist() == [[1, 1, 0]]


def test_classes_are_padded(tmp_path: Path) -> None:
    runs = read(tmp_path, {}, {"rate_values": "0.3", "rate_counts": "20"})
    assert runs.class_count.tolist() == [[6, 7, 7], [20, 0, 0]]
    assert runs.nominal_rate_per_s == pytest.approx([4.8, 6.0])


def test_server_that_did_not_start_has_no_numbers(tmp_path: Path) -> None:
    runs = read(tmp_path, {}, dict.fromkeys(MEASURED, "") | {"status": "oom"})
    assert runs.status.tolist() == [Status.OK, Status.OOM]
    assert runs.started.tolist() == [True, False]
    assert np.isnan(runs.throughput_tokens_per_s).tolist() == [False, True]


@pytest.mark.parametrize("column", MEASURED)
def test_server_that_started_has_all_numbers(tmp_path: Path, column: str) -> None:
    with pytest.raises(InputError, match=rf"row 2, {column}: '' is not allowed; .* status is ok"):
        read(tmp_path, {}, {column: ""})


@pytest.mark.parametrize(
    ("arrivals", "completed", "rate"),
    [("", 17000, 4.8), (18000, 17000, 5.0), (18000, 18000, 5.0), (60000, 17000, 4.8), (41699, 17000, 41699 / 3600)],
    ids=["not recorded", "recorded", "all completed", "clients held back", "just not held back"],
)
def test_arrival_rate(tmp_path: Path, arrivals: object, completed: int, rate: float) -> None:
    runs = read(tmp_path, {"arrivals": arrivals, "completed": completed})
    assert runs.arrival_rate_per_s(max_pending=26000) == pytest.approx([rate])


def test_runs_become_configurations(tmp_path: Path, calibrations: dict[str, Calibration]) -> None:
    calibration = calibrations[MODEL]
    assert calibration.runs is not None
    runs = read(tmp_path, {"arrivals": 18000, "max_num_seqs": 64}, {"max_loras": 4, "max_lora_rank": 32})
    scenarios, _ = pack_runs(runs, np.arange(2), calibration, calibration.runs)
    assert np.asarray(scenarios.max_loras).tolist() == [8, 4]
    assert np.asarray(scenarios.max_lora_rank).tolist() == [16, 32]
    assert np.asarray(scenarios.max_num_seqs).tolist() == [64, 2048]
    assert np.asarray(scenarios.class_rank).tolist() == [[12] * 3] * 2
    total = (np.asarray(scenarios.class_count) * np.asarray(scenarios.class_rate_per_s)).sum(axis=1)
    assert total == pytest.approx([5.0, 4.8])
    assert np.asarray(scenarios.mean_output_tokens) == pytest.approx(200 * calibration.runs.output_share)
    assert np.asarray(scenarios.horizon_s).tolist() == [3600, 3600]


SHORT = {
    "mean_input_tokens": 20,
    "mean_output_tokens": 30,
    "std_input_tokens": 5,
    "std_output_tokens": 10,
    "max_output_tokens": 60,
}


def test_recorded_lengths_take_the_place_of_the_published_ones(
    tmp_path: Path, calibrations: dict[str, Calibration]
) -> None:
    assert calibrations[MODEL].runs is not None
    runs = read(tmp_path, SHORT, {name: "" for name in SHORT if "mean" not in name})
    assert runs.tells_lengths.tolist() == [True, False]
    lengths = run_lengths(runs, np.arange(1), calibrations[MODEL].runs)
    assert (lengths.output_share, lengths.output_std_tokens, lengths.max_output_tokens) == (1, 10, 60)
    assert lengths.kv_tokens_per_request == pytest.approx(20 + (900 + 100) / 60 + 8)
    assert run_lengths(runs, np.arange(2), calibrations[MODEL].runs) == calibrations[MODEL].runs


@pytest.mark.parametrize("engine", ["steady", "event"])
@pytest.mark.parametrize("blank", [("mean_output_tokens",), ("mean_input_tokens", "mean_output_tokens")])
def test_a_server_that_did_not_start_takes_no_part_in_means(
    tmp_path: Path, calibrations: dict[str, Calibration], engine: str, blank: tuple[str, ...]
) -> None:
    """Its lengths are recorded, its means are not: the other runs are predicted as if it were not there."""
    refused = {name: "" for name in MEASURED if not name.startswith("mean_")} | dict.fromkeys(blank, "")
    refused |= dict.fromkeys(("mean_itl_ms", "mean_ttft_ms", "rate_values", "rate_counts"), "")
    refused |= {"max_loras": "2000", "max_cpu_loras": "2000"}
    runs = read(tmp_path, SHORT | {"duration_s": 60}, SHORT | refused | {"status": "oom"})
    both, alone = (predict_runs(part, calibrations, engine) for part in (runs, runs.take(np.arange(1))))
    assert both.starts.tolist() == [True, False]
    assert both.throughput_tokens_per_s[0] == pytest.approx(alone.throughput_tokens_per_s[0], rel=1e-5)
    (scores,) = score_runs(runs, both, engine)["models"]
    assert scores["runs"] == 1
    assert scores["throughput_smape"] == pytest.approx(
        score_runs(runs.take(np.arange(1)), alone)["models"][0]["throughput_smape"], rel=1e-3
    )
    none = predict_runs(runs.take(np.array([1])), calibrations, engine)
    assert none.status.tolist() == both.status[1:].tolist()


def test_a_prediction_without_numbers_is_not_averaged(tmp_path: Path) -> None:
    runs = read(tmp_path, {}, {}, {})
    told = predictions(
        runs, throughput_tokens_per_s=[1900, np.nan, 2100], itl_s=[np.nan, np.nan, runs.itl_s[2]], status=["ok"] * 3
    )
    (found,) = score_runs(runs, told)["models"]
    assert (found["runs"], found["itl_smape"]) == (2, 0)
    assert found["throughput_smape"] == smape([1900, 2100], runs.throughput_tokens_per_s[[0, 2]])
    assert sum(score_runs(runs, told)["starved"].values()) == 2


@pytest.mark.parametrize("engine", ["steady", "event"])
def test_short_requests_are_predicted(tmp_path: Path, calibrations: dict[str, Calibration], engine: str) -> None:
    fixed = {"std_input_tokens": 0, "std_output_tokens": 0, "max_output_tokens": 30}
    found = predict_runs(read(tmp_path, SHORT, SHORT | fixed, {"duration_s": 600}), calibrations, engine)
    assert found.throughput_tokens_per_s[:2] == pytest.approx(4.8 * 50, rel=0.05)
    assert found.throughput_tokens_per_s[2] == pytest.approx(4.8 * 420, rel=0.1)


def test_samples_count_for_the_time_around_them(tmp_path: Path) -> None:
    runs = read(tmp_path, {"run_id": "a", "duration_s": 100}, {"run_id": "b"}, {"run_id": "c"})
    samples = {
        "run_id": ["a", "a", "a", "other", "c"],
        "t_s": [0.0, 10.0, 50.0, 0.0, 5.0],
        "running": [1, 2, 10, 9, 7],
        "kv_usage": [0.0, 0.5, 1.0, 0.1, 0.25],
        "waiting": [0, 0, 0, 0, 0],
    }
    pq.write_table(pa.table(samples), tmp_path / "series.parquet")
    found = read_time_means(tmp_path / "series.parquet", runs)
    np.testing.assert_allclose(found.running, [(5 * 1 + 25 * 2 + 70 * 10) / 100, np.nan, 7])
    np.testing.assert_allclose(found.kv_usage, [(25 * 0.5 + 70) / 100, np.nan, 0.25])
    with pytest.raises(InputError, match=r"series: .*allowed: a Parquet file with the columns run_id, t_s, running"):
        read_time_means(tmp_path / "runs.csv", runs)


def test_rates_are_dealt_in_turn_to_any_number_of_adapters(tmp_path: Path) -> None:
    runs = read(tmp_path, {"max_cpu_loras": 8}, {"max_cpu_loras": 2**53, "max_loras": 8})
    assert runs.class_count.tolist() == [[3, 3, 2], [2**53 // 3 + 1, 2**53 // 3 + 1, 2**53 // 3]]


def test_seeds_that_tell_nothing_take_no_part_in_means() -> None:
    np.testing.assert_equal(mean_of_known([np.array([1.0, np.nan]), np.array([np.nan, np.nan])]), [1.0, np.nan])
    np.testing.assert_equal(mean_of_known([np.array([1.0, 4.0]), np.array([3.0, np.nan])]), [2.0, 4.0])


def test_several_seeds_are_averaged(tmp_path: Path, calibrations: dict[str, Calibration]) -> None:
    runs = read(tmp_path, SHORT, {"duration_s": 60})
    seen: list[tuple[int, int]] = []
    both = predict_runs(
        runs, calibrations, "event", seed=3, seeds=2, progress=lambda done, total: seen.append((done, total))
    )
    each = [predict_runs(runs, calibrations, "event", seed=seed) for seed in (3, 4)]
    for name in ("throughput_tokens_per_s", "itl_s", "ttft_s", "mean_running", "kv_usage"):
        one, other = (getattr(found, name) for found in each)
        assert np.all(one != other)
        np.testing.assert_allclose(getattr(both, name), (one + other) / 2, rtol=1e-6)
    assert {total for _, total in seen} == {4}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == 4
    with pytest.raises(InputError, match="seeds: 0"):
        predict_runs(runs, calibrations, "event", seeds=0)


def test_requests_to_the_base_model_are_offered_too(tmp_path: Path, calibrations: dict[str, Calibration]) -> None:
    runs = read(tmp_path, {"base_rate_per_s": 1.2, "arrivals": 21600, "completed": 21600})
    assert runs.nominal_rate_per_s == pytest.approx([6.0])
    found = predict_runs(runs, calibrations)
    assert found.throughput_tokens_per_s == pytest.approx(6.0 * 420, rel=0.02)


def test_recorded_bound_of_the_clients_tells_whether_they_were_held_back(tmp_path: Path) -> None:
    held, free = {"arrivals": 17095, "max_pending": 100}, {"arrivals": 17050, "max_pending": 100}
    assert read(tmp_path, held, free).arrival_rate_per_s(max_pending=26000) == pytest.approx([4.8, 17050 / 3600])


def test_predictions_keep_the_order_of_the_runs(tmp_path: Path, calibrations: dict[str, Calibration]) -> None:
    changes = [
        {"max_model_len": limit, "max_loras": slots} for slots, limit in ((8, ""), (4, 4096), (20, ""), (8, 4096))
    ]
    together = predict_runs(read(tmp_path, *changes), calibrations)
    for place, change in enumerate(changes):
        alone = predict_runs(read(tmp_path, change), calibrations)
        for field in dataclasses.fields(Predictions):
            one, among = getattr(alone, field.name)[0], getattr(together, field.name)[place]
            assert among == (pytest.approx(one, rel=1e-5) if isinstance(one, float) else one)


def test_runs_that_are_alike_are_predicted_together(tmp_path: Path, calibrations: dict[str, Calibration]) -> None:
    """A progress of two stands: the runs of each ``max_model_len``, where it is not recorded too."""
    runs = read(tmp_path, *({"max_model_len": limit, "max_loras": slots} for slots in (8, 4) for limit in ("", 4096)))
    done: list[int] = []
    predict_runs(runs, calibrations, progress=lambda predicted, _: done.append(predicted))
    assert done == [2, 4]


def test_offered_load_is_that_of_the_run(tmp_path: Path, calibrations: dict[str, Calibration]) -> None:
    predicted = predict_runs(read(tmp_path, {}, {"arrivals": 18000}), calibrations)
    assert predicted.offered_tokens_per_s == pytest.approx([4.8 * 420, 5.0 * 420])


def test_a_calibration_from_microbenchmarks_alone_predicts_too(
    tmp_path: Path, calibrations: dict[str, Calibration]
) -> None:
    bare = dataclasses.replace(calibrations[MODEL], runs=None)
    found = predict_runs(read(tmp_path, {}), {MODEL: bare})
    assert found.throughput_tokens_per_s == pytest.approx(4.8 * 420, rel=0.02)


def test_server_that_does_not_start_is_predicted_without_its_numbers(
    tmp_path: Path, calibrations: dict[str, Calibration]
) -> None:
    refused = dict.fromkeys(MEASURED, "") | {"max_loras": 1000, "max_cpu_loras": 1000, "status": "oom"}
    for rows in ([refused], [{}, refused | {"max_loras": 8}]):
        found = predict_runs(read(tmp_path, *rows), calibrations)
        assert found.starts[-1] == (len(rows) == 2)
        assert math.isnan(found.throughput_tokens_per_s[-1]) == (len(rows) == 1)


def test_models_without_calibration_and_unknown_engines_are_refused(
    tmp_path: Path, calibrations: dict[str, Calibration]
) -> None:
    with pytest.raises(InputError, match=r"model: 'other' is not allowed; allowed: a model with a calibration: llama"):
        predict_runs(read(tmp_path, {"model": "other"}), calibrations)
    with pytest.raises(InputError, match=r"engine: 'stedy' .* did you mean 'steady'\?"):
        predict_runs(read(tmp_path, {}), calibrations, "stedy")


def test_smape_and_mape() -> None:
    assert smape([110, 90], [100, 100]) == pytest.approx(100 / 2 * (10 / 210 + 10 / 190))
    assert mape([110, 90], [100, 100]) == pytest.approx(10)
    assert smape([0, 5], [5, 0]) == 100
    assert smape([0], [0]) == mape([0], [0]) == 0
    assert mape([1], [0]) == math.inf
    assert math.isnan(smape([], []))
    assert math.isnan(smape([np.nan], [1]))
    assert smape([np.nan, 110], [100, 100]) == smape([110, 100], [100, np.nan]) == smape([110], [100])
    assert mape([110, 1], [100, np.nan]) == pytest.approx(10)


def test_starved_at_ten_percent_below_the_offered_load() -> None:
    assert is_starved([90, 90.001, 0, np.nan, 1], [100, 100, 100, 100, np.nan]).tolist() == [
        True, False, True, False, False
    ]  # fmt: skip


def test_times_to_first_token_count_where_servers_keep_up(tmp_path: Path) -> None:
    runs = read(tmp_path, {}, {"mean_ttft_ms": 300}, {"input_throughput": 100, "mean_ttft_ms": 9e5})
    model = score_runs(runs, predictions(runs, ttft_s=[0.36, 0.1, 1e4]))["models"][0]
    assert model["ttft_smape_keeping_up"] == pytest.approx((50 + 50) / 2)
    assert model["ttft_smape"] > model["ttft_smape_keeping_up"]
    assert np.isnan(model["tpot_smape"])  # the table has no such column


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mean_running": 300, "max_num_seqs": 256}, "mean_running: 300.0 .*at most max_num_seqs"),
        ({"mean_kv_usage": 40}, "mean_kv_usage: 40.0 .*a share, at most 1"),
        ({"cached_share": 60}, "cached_share: 60.0 .*a share, at most 1"),
        ({"max_output_tokens": 100}, "max_output_tokens: 100.0 .*at least mean_output_tokens"),
        ({"arrivals": 0}, "arrivals: 0.0 .*some were completed"),
        ({"rate_counts": "60 70 70"}, "rate_counts: '60 70 70' .*add up to max_cpu_loras, 20"),
        ({"ranks": "8 32"}, "ranks: '8 32' .*at most max_lora_rank, 16"),
    ],
)
def test_runs_that_contradict_themselves_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        read(tmp_path, changes)


def test_runs_that_ask_another_question_are_left_out_and_told(
    tmp_path: Path, calibrations: dict[str, Calibration]
) -> None:
    rows: list[dict[str, Any]] = [
        {"gpu": "", "cached_share": ""},
        {"gpu": "NVIDIA L4", "cached_share": 0.4},
        {"gpu": "h100 64gb", "cached_share": 0.005},
        {"gpu": "H100-64GB", "cached_share": 0.4},
        {"gpu": "NVIDIA L4", "cached_share": ""},
    ]
    runs = read(tmp_path, *({"run_id": str(number)} | row for number, row in enumerate(rows)))
    left, told = comparable_runs(runs, calibrations)
    assert left.run_id.tolist() == ["0", "2"]
    assert told == [
        "2 of 5 runs left out: measured on NVIDIA L4, not on H100-64GB",
        "1 of 5 runs left out: measured with prompts from a prefix cache",
    ]
    with pytest.raises(InputError, match=r"2 of 2 runs left out: measured on NVIDIA L4.*at least one run"):
        comparable_runs(runs.take(np.array([1, 4])), calibrations)
    with pytest.raises(InputError, match=r"runs.csv, run 1: 'a run measured on NVIDIA L4.*take it out of the table"):
        read_measured(tmp_path / "runs.csv", calibrations[MODEL])


def test_errors_by_model_and_by_group(tmp_path: Path) -> None:
    runs = read(tmp_path, {}, {"scenario": "t"}, {"model": "b"}, dict.fromkeys(MEASURED, "") | {"status": "oom"})
    status = ["ok", "outside_calibration", "ok", "ok"]
    found = score_runs(runs, predictions(runs, throughput_tokens_per_s=[2100, 1900, 1900, 50], status=status))
    keys = [(each["model"], each["set"], each["scenario"], each["runs"]) for each in found["groups"]]
    assert keys == [(MODEL, "mine", "s", 1), (MODEL, "mine", "t", 1), ("b", "mine", "s", 1)]
    assert [each["throughput_smape"] for each in found["groups"]] == pytest.approx([5, 0, 0])
    assert [each["throughput_mape"] for each in found["models"]] == pytest.approx([100 / 19 / 2 * 2, 0])
    assert [each["itl_smape"] for each in found["models"]] == [0, 0]
    assert found["startup"] == {"agree": 3, "disagree": 1}


def test_a_run_that_is_said_not_to_start_is_not_averaged(tmp_path: Path) -> None:
    runs = read(tmp_path, {}, {})
    found = score_runs(runs, predictions(runs, throughput_tokens_per_s=[1900, np.nan], status=["ok", "no_kv_cache"]))
    assert found["models"][0]["runs"] == 1
    assert found["models"][0]["throughput_smape"] == 0
    assert found["startup"] == {"agree": 1, "disagree": 1}
    assert sum(found["starved"].values()) == 1


def test_starved_is_counted_both_ways(tmp_path: Path) -> None:
    shares = {"input_throughput": 700}  # 1600 of 2000 tokens/s: starved
    runs = read(tmp_path, {}, {}, {}, shares, shares)
    found = score_runs(runs, predictions(runs, throughput_tokens_per_s=[1900, 1800, 1801, 1700, 1900]))
    assert found["starved"] == {"tp": 1, "fp": 1, "fn": 1, "tn": 2}


def grid(**throughput: dict[int, float]) -> list[dict[str, Any]]:
    """Rows of a grid: by slots, the throughput at each number of adapters."""
    return [
        {"max_loras": int(slots[1:]), "max_cpu_loras": adapters, "input_throughput": value, "output_throughput": 0}
        for slots, values in throughput.items()
        for adapters, value in values.items()
    ]


def test_the_measured_optimum_is_before_the_first_starved_run(tmp_path: Path) -> None:
    # Offered load 2000, starved up to 1800. With 8 slots 64 adapters seem fine again, but lie beyond a starved run.
    runs = read(tmp_path, *grid(s8={32: 1700, 16: 1850, 64: 1990}, s16={16: 1840, 32: 1900, 64: 1500}))
    (found,) = score_runs(runs, predictions(runs))["optima"]
    assert found["measured"] == {"max_cpu_loras": 32, "max_loras": 16, "throughput": 1900}
    assert found["chosen"] == {
        "max_cpu_loras": 32,
        "max_loras": 16,
        "measured_throughput": 1900,
        "starved": False,
    }
    assert found["regret"] == 0


def test_regret_is_what_the_choice_loses(tmp_path: Path) -> None:
    runs = read(tmp_path, *grid(s8={16: 1820, 32: 1850}, s16={16: 1840, 32: 1900}))
    risky = predictions(runs, starving_probability=[0, 0, 0, 0.5])
    (found,) = score_runs(runs, risky)["optima"]
    assert (found["chosen"]["max_cpu_loras"], found["chosen"]["max_loras"]) == (32, 8)
    assert found["regret"] == pytest.approx(1 - 1850 / 1900)


def test_a_choice_that_starves_or_does_not_start_is_told(tmp_path: Path) -> None:
    rows = grid(s8={16: 1820, 32: 1850}, s16={16: 1840, 32: 1700})
    starving = read(tmp_path, *rows)
    told = predictions(starving, throughput_tokens_per_s=[1820, 1850, 1840, 1990])
    (found,) = score_runs(starving, told)["optima"]
    assert found["chosen"] == {"max_cpu_loras": 32, "max_loras": 16, "measured_throughput": 1700, "starved": True}
    rows[3] |= dict.fromkeys(MEASURED, "") | {"status": "oom"}
    refused = read(tmp_path, *rows)
    told = predictions(refused, throughput_tokens_per_s=[1820, 1850, 1840, 1990], status=["ok"] * 4)
    (found,) = score_runs(refused, told)["optima"]
    assert found["chosen"] == {"max_cpu_loras": 32, "max_loras": 16, "measured_throughput": 0, "starved": True}
    assert found["regret"] == 1


def test_no_choice_and_no_optimum(tmp_path: Path) -> None:
    runs = read(tmp_path, *grid(s8={16: 900, 32: 900}, s16={16: 900, 32: 900}))
    (found,) = score_runs(runs, predictions(runs))["optima"]
    assert found["measured"] == {"max_cpu_loras": None, "max_loras": None, "throughput": None}
    assert set(found["chosen"].values()) == {None}
    assert found["regret"] is None


def test_optima_are_of_the_optimum_set_or_else_of_every_grid(tmp_path: Path) -> None:
    cells = {8: 1850.0, 16: 1900.0}
    whole = [row | {"scenario": "grid"} for row in grid(s4=cells, s8=cells)]
    line = [row | {"scenario": "one slot count"} for row in grid(s4=cells)]
    runs = read(tmp_path, *whole, *line)
    assert [each["scenario"] for each in score_runs(runs, predictions(runs))["optima"]] == ["grid"]
    runs = read(tmp_path, *whole, *(row | {"set": "optimum"} for row in line))
    assert [each["scenario"] for each in score_runs(runs, predictions(runs))["optima"]] == ["one slot count"]
