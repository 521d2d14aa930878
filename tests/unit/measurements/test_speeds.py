"""Tables of speeds: what is read, predicted, fitted and doubted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lora_capacity.calibration import Efficiencies, Target
from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.facts import predict_speeds, score_speeds
from lora_capacity.fitting import contradictions, fit_efficiencies, leave_out_gpus
from lora_capacity.hardware import find_gpu
from lora_capacity.measurements import read_speeds
from lora_capacity.memory import Deployment
from tests.unit.measurements.test_startups import LLAMA

GUESS = Efficiencies.first_guess()
ROW = {"id": "a", "vllm_version": "0.20.0", "gpu": "L4", "num_gpus_tp": 1, "model": "llama", "concurrency": 1}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "model_configs").mkdir()
    (tmp_path / "model_configs" / "llama.json").write_text(json.dumps(LLAMA))
    (tmp_path / "models.csv").write_text("model_as_written_in_table,config_file\nllama,llama.json\n")

    def reader(*rows):
        columns = list(dict.fromkeys(name for row in rows for name in (ROW | row)))
        lines = [",".join(columns), *(",".join(str((ROW | row).get(name, "")) for name in columns) for row in rows)]
        (tmp_path / "speeds.csv").write_text("\n".join(lines) + "\n")
        return read_speeds(tmp_path / "speeds.csv", tmp_path / "models.csv")

    return reader


def test_the_best_measure_of_a_token_is_taken(read) -> None:
    itl, tpot, throughput, nothing = read(
        {"itl_ms": 20, "tpot_ms": 30, "output_tok_s": 10},
        {"tpot_ms": 30, "output_tok_s": 10},
        {"concurrency": 8, "output_tok_s": 400},
        {"concurrency": "", "output_tok_s": 400},
    )
    assert (itl.measured_s, tpot.measured_s, throughput.measured_s) == (0.02, 0.03, 0.02)
    assert math.isnan(nothing.measured_s)
    assert throughput.tells_load
    assert not nothing.tells_load


@pytest.mark.parametrize(
    ("written", "layers", "quantization"),
    [
        ("TheBloke/Mistral-7B-v0.1-AWQ", 32, "awq"),
        ("Meta-Llama-3-70B AWQ", 80, "awq"),
        ("Llama-2-7b", 32, ""),
        ("Qwen/Qwen3-30B-A3B-FP8", 48, "fp8"),
    ],
)
def test_models_are_found_by_names_as_people_write_them(read, written, layers, quantization) -> None:
    (speed,) = read({"model": written, "quantization": quantization, "tpot_ms": 1})
    assert speed.server.shape.num_layers == layers
    assert speed.server.shape.quantization == quantization


def test_one_stream_takes_a_step_a_token_by_hand(read) -> None:
    (speed,) = read({"input_len": 100, "output_len": 200, "tpot_ms": 50})
    (found,) = predict_speeds([speed], GUESS)
    target = Target(speed.server.shape, find_gpu("L4"), Deployment(), VllmBehaviour.for_version("0.20.0"))
    costs = target.coefficients(GUESS.values)
    by_hand_s = costs["base_s"] + costs["token_s"] + 200 * costs["kv_token_s"]
    assert found.token_s == pytest.approx(by_hand_s, rel=1e-5)
    assert found.low < found.token_s < found.high
    assert found.base_s == found.token_s


def test_more_in_flight_take_longer_and_adapters_longer_still(read) -> None:
    one, many, adapters = predict_speeds(
        read({}, {"concurrency": 64}, {"concurrency": 64, "enable_lora": True, "max_loras": 8, "adapters_in_use": 8}),
        GUESS,
    )
    assert one.token_s < many.token_s < adapters.token_s
    assert adapters.base_s == pytest.approx(many.token_s)


def test_a_rate_brings_as_many_as_stay(read) -> None:
    by_rate, at_most = read({"concurrency": "", "request_rate": 2}, {"concurrency": "", "request_rate": 1e4})
    slow, saturated = predict_speeds([by_rate, at_most], GUESS)
    running = 2 * 197 * slow.token_s  # Little's law, with the usual answers
    (again,) = predict_speeds([dataclasses.replace(by_rate, concurrency=running)], GUESS)
    assert again.token_s == pytest.approx(slow.token_s, rel=1e-3)
    (full,) = predict_speeds([dataclasses.replace(by_rate, concurrency=256.0)], GUESS)
    assert saturated.token_s == pytest.approx(full.token_s)


def test_what_is_not_known_is_said(read) -> None:
    rows = read({"gpu": "Ascend 910B"}, {"model": "nobody/knows"}, {"num_gpus_tp": ""}, {"num_gpus_tp": 16})
    reasons = [each.reason for each in predict_speeds(rows, GUESS)]
    for reason, told in zip(reasons, ("gpu", "model", "num_gpus_tp", "tensor_parallel_size"), strict=True):
        assert told in reason
    assert score_speeds(rows, predict_speeds(rows, GUESS))["all"] == {"rows": 0}


def made_up(read, truth):
    """Return speeds that servers of some GPUs reach by efficiencies."""
    rows = [
        {"id": f"{gpu} {concurrency}", "gpu": gpu, "concurrency": concurrency, "tpot_ms": 1}
        for gpu in ("L4", "A100-80GB", "H100", "RTX 4090")
        for concurrency in (1, 8, 32, 100)
    ]
    speeds = read(*rows)
    exact = [each.token_s for each in predict_speeds(speeds, truth)]
    return [dataclasses.replace(each, measured_s=token_s) for each, token_s in zip(speeds, exact, strict=True)]


def test_efficiencies_are_recovered_from_speeds_that_they_make(read) -> None:
    values = {"weight_bandwidth_share": 0.75, "engine_step_s": 4e-3, "sequence_s": 40e-6}
    truth = dataclasses.replace(GUESS, values={**GUESS.values, **values})
    speeds = made_up(read, truth)
    found = fit_efficiencies(speeds)
    assert found.values["weight_bandwidth_share"] == pytest.approx(0.75, rel=0.05)  # priors pull
    assert found.step_spread < 0.07
    assert found.spreads[0] < GUESS.spreads[0]
    for name in ("lora_kernel_s", "disk_bytes_per_s"):  # of which nothing was seen
        assert found.values[name] == pytest.approx(GUESS.values[name])
    scores = score_speeds(speeds, predict_speeds(speeds, found))
    assert scores["all"]["median_error"] < 0.05
    left_out = leave_out_gpus(speeds)
    assert [each.id for each in left_out] == [each.id for each in speeds]
    assert score_speeds(speeds, left_out)["all"]["median_error"] < 0.1


def test_speeds_that_contradict_each_other_are_named_and_not_fitted(read) -> None:
    speeds = made_up(read, GUESS)
    wrong = dataclasses.replace(
        speeds[0], measured_s=3 * speeds[0].measured_s, server=dataclasses.replace(speeds[0].server, id="wrong")
    )
    assert list(contradictions([*speeds, wrong])) == ["wrong"]
    with_it, without = fit_efficiencies([*speeds, wrong]).values, fit_efficiencies(speeds).values
    assert with_it == pytest.approx(without)


def test_nothing_to_fit_is_refused(read) -> None:
    with pytest.raises(InputError, match="speeds: '1 rows'"):
        fit_efficiencies(read({"gpu": "Ascend 910B", "tpot_ms": 20}))


def test_intervals_hold_what_the_distribution_makes(read) -> None:
    speeds = read({"gpu": "A100-80GB", "concurrency": 16, "tpot_ms": 1})
    (found,) = predict_speeds(speeds, dataclasses.replace(GUESS, step_spread=0.0))
    generator = np.random.default_rng(0)
    target = Target(speeds[0].server.shape, find_gpu("A100-80GB"), Deployment(), VllmBehaviour.for_version("0.20.0"))
    names = list(GUESS.values)
    drawn = []
    for _ in range(400):
        moved = generator.multivariate_normal(np.zeros(len(names)), GUESS.covariance)
        e = dict(zip(names, (np.array(list(GUESS.values.values())) * np.exp(moved)).tolist(), strict=True))
        costs = target.coefficients(e)
        prompts = 15 / 197 * 223
        drawn.append(
            costs["base_s"]
            + (16 + prompts) * costs["token_s"]
            + prompts * costs["prefill_token_s"]
            + 16 * (223 + 0.5 * 197) * costs["kv_token_s"]
        )
    inside = np.mean((np.array(drawn) > found.low) & (np.array(drawn) < found.high))
    assert inside > 0.88  # beside what efficiencies tell, GPUs and models differ
