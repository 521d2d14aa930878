"""Derived calibrations: work counted against shapes, scaling laws, what measurements change, files, refusals."""

import dataclasses
import json

import numpy as np
import pytest

from lora_capacity.calibration import (
    Calibration,
    Efficiencies,
    Target,
    bundled_names,
    derive_calibration,
    load_calibration,
)
from lora_capacity.calibration.derive import derive_coefficients
from lora_capacity.calibration.efficiencies import FIRST_GUESSES
from lora_capacity.calibration.work import StepWork
from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.hardware import find_gpu
from lora_capacity.memory import Deployment
from lora_capacity.models import find_shape
from lora_capacity.status import Status

LLAMA, QWEN = find_shape("Llama-3.1-8B-Instruct"), find_shape("Qwen2.5-7B-Instruct")
GUESS = Efficiencies.first_guess()
MEASURED = [load_calibration(name) for name in bundled_names()]


def target(model=LLAMA, gpu="L40S", version="0.33.0", **layout) -> Target:
    return Target(model, find_gpu(gpu), Deployment(**layout), VllmBehaviour.for_version(version))


class TestWork:
    def test_a_dense_step_reads_all_weights_but_the_embedding(self) -> None:
        embedding = LLAMA.vocab_size * LLAMA.hidden_size * LLAMA.dtype_bytes
        last_norm = LLAMA.hidden_size * LLAMA.dtype_bytes
        assert StepWork.of_model(LLAMA).weight_bytes == LLAMA.weight_bytes - embedding - last_norm

    def test_two_operations_a_weight_of_the_layers(self) -> None:
        weights = sum(m.input_size * sum(m.output_sizes) for layer in LLAMA.layers for m in layer.modules)
        assert StepWork.of_model(LLAMA).token_flop == 2 * weights

    def test_a_mixture_reads_each_expert_apart_and_computes_those_of_a_token(self) -> None:
        mixture = find_shape("Qwen3-30B-A3B")
        work = StepWork.of_model(mixture)
        # Published: 30.5 billion parameters, of which 3.3 are active.
        assert work.expert_bytes * 128 + work.weight_bytes == pytest.approx(30.2e9 * 2, rel=0.01)
        assert work.token_flop / 2 == pytest.approx(3.3e9 - 2 * mixture.vocab_size * mixture.hidden_size, rel=0.1)

    def test_gpus_share_weights_and_heads_and_send_messages(self) -> None:
        one, four = (StepWork.of_model(LLAMA, Deployment(tensor_parallel_size=gpus)) for gpus in (1, 4))
        assert four.token_flop == one.token_flop / 4
        assert four.kv_bytes == one.kv_bytes / 4
        assert four.weight_bytes == pytest.approx(one.weight_bytes / 4, rel=0.001)  # norms are whole
        assert (one.messages, four.messages) == (0, 64)
        # Each GPU of a ring sends (n - 1) / n of a vector twice, for each of the two messages of a layer.
        assert four.message_bytes == 64 * 4096 * 2 * 2 * 3 / 4

    def test_four_bit_weights_are_told_apart(self) -> None:
        work = StepWork.of_model(find_shape("Llama-3.1-8B-Instruct", "awq"))
        whole = StepWork.of_model(LLAMA)
        head = LLAMA.vocab_size * LLAMA.hidden_size * 2
        assert work.weight_bytes == pytest.approx(head, rel=0.01)
        assert work.packed_bytes == pytest.approx((whole.weight_bytes - head) * 4.15625 / 16, rel=0.01)

    def test_pipelines_are_refused(self) -> None:
        with pytest.raises(InputError, match="pipeline_parallel_size: 2"):
            StepWork.of_model(LLAMA, Deployment(pipeline_parallel_size=2))


class TestScaling:
    def coefficients(self, **changed: object) -> dict[str, float]:
        return target(**changed).coefficients(GUESS.values)

    def test_a_memory_twice_as_fast_halves_what_is_read(self) -> None:
        slow = target()
        fast = dataclasses.replace(slow, processor=dataclasses.replace(slow.processor, bandwidth_bytes_per_s=2 * 864e9))
        before, after = slow.coefficients(GUESS.values), fast.coefficients(GUESS.values)
        assert after["kv_token_s"] == before["kv_token_s"] / 2
        assert after["lora_token_s"] == before["lora_token_s"] / 2
        read_s = slow.work.weight_bytes / 864e9 / GUESS.values["weight_bandwidth_share"]
        assert before["base_s"] - after["base_s"] == pytest.approx(read_s / 2)
        assert after["prefill_token_s"] == before["prefill_token_s"]

    def test_asynchronous_versions_hide_a_part_of_the_engine_loop(self) -> None:
        old, new = (self.coefficients(version=version)["base_s"] for version in ("0.13.0", "0.14.0"))
        hidden = 1.0 - GUESS.values["async_share"]
        assert old - new == pytest.approx(hidden * GUESS.values["engine_step_s"])

    def test_without_graphs_small_models_wait_for_launches(self) -> None:
        tiny = find_shape("Qwen2.5-0.5B-Instruct")
        eager, graphs = (self.coefficients(model=tiny, enforce_eager=each)["base_s"] for each in (True, False))
        assert eager > graphs
        large = find_shape("Llama-2-13b-hf")  # whose weights take longer
        assert self.coefficients(model=large, enforce_eager=True) == self.coefficients(model=large)

    def test_many_query_heads_to_a_key_cost_more_than_their_bytes(self) -> None:
        ratio = self.coefficients(model=QWEN, gpu="H100-64GB")["kv_token_s"]
        ratio /= self.coefficients(gpu="H100-64GB")["kv_token_s"]
        assert QWEN.kv_bytes_per_token / LLAMA.kv_bytes_per_token < ratio < 1.0

    def test_fp8_multiplies_faster_where_the_gpu_can(self) -> None:
        quantized = find_shape("Llama-3.1-8B-Instruct", "fp8")
        for gpu, faster in (("H100", 2.0), ("A100-80GB", 1.0)):
            plain, short = (self.coefficients(model=model, gpu=gpu)["prefill_token_s"] for model in (LLAMA, quantized))
            assert plain / short == pytest.approx(faster, rel=0.01)


class TestModules:
    """Adapters of some modules: only what adapters cost is less."""

    LORA_TERMS = ("lora_s", "lora_token_s", "adapter_s", "adapter_rank_s")
    LOAD_TERMS = ("host_to_gpu_load_s", "disk_s", "disk_rank_s")

    def coefficients(self, modules: str | tuple[str, ...], version: str = "0.33.0") -> dict[str, float]:
        return dataclasses.replace(target(version=version), target_modules=modules).coefficients(GUESS.values)

    def test_attention_alone_is_cheaper_in_every_term_of_adapters_and_the_base_model_costs_the_same(self) -> None:
        every, attention = self.coefficients("all-linear"), self.coefficients("attention")
        kernels = [dataclasses.replace(target(), target_modules=each).kernels for each in ("all-linear", "attention")]
        assert [kernel.shrink_slices for kernel in kernels] == [7, 4]
        # Of packed modules a block covers 64 outputs, and all slices are launched as wide as the widest; else 128.
        attention_tiles, mlp_tiles = 3 * 4096 // 64 + 4096 // 128, 2 * 14336 // 64 + 4096 // 128
        assert [kernel.expand_tiles for kernel in kernels] == [attention_tiles + mlp_tiles, attention_tiles]
        for name, value in every.items():
            # A block of a grid costs what it does; there are fewer.
            assert (attention[name] < value) == (name in (*self.LORA_TERMS, *self.LOAD_TERMS)), name

    def test_attention_and_the_rest_make_up_the_whole(self) -> None:
        parts = [self.coefficients(each) for each in ("attention", ("gate_proj", "up_proj", "down_proj"))]
        for name in (*self.LORA_TERMS, *self.LOAD_TERMS):
            together = sum(each[name] for each in parts)
            assert together == pytest.approx(self.coefficients("all-linear")[name]), name

    def test_versions_that_reserve_all_modules_load_less_and_compute_the_same(self) -> None:
        every, attention = (self.coefficients(each, "0.18.0") for each in ("all-linear", "attention"))
        for name, value in every.items():
            assert (attention[name] < value) == (name in self.LOAD_TERMS), name

    def test_calibration_keeps_them(self, tmp_path) -> None:
        every = derive_calibration(LLAMA, "L40S")
        some = load_calibration(model=LLAMA, gpu="L40S", target_modules=("q_proj", "v_proj"))
        some.save(tmp_path / "c.json")
        again = load_calibration(tmp_path / "c.json")
        assert again.to_json() == some.to_json()
        assert again.costs == some.costs
        assert again.slot_bytes(16) < every.slot_bytes(16)
        assert "--lora-target-modules qkv_proj" in again.server(max_loras=4).serve_command("m")
        capacities = [each.plan_memory(each.server(max_loras=32)).kv_cache_tokens.item() for each in (every, again)]
        assert capacities[0] < capacities[1]
        with pytest.raises(InputError, match=r"target_modules: 'attention' .*which the calibration is derived for"):
            again.server(target_modules="attention")
        with pytest.raises(InputError, match=r"target_modules: 'wqkv' .* of .*: qkv_proj, o_proj"):
            derive_calibration(LLAMA, "L40S", target_modules="wqkv")


class TestMeasurements:
    def test_own_measurement_is_returned_as_it_is(self) -> None:
        for known in MEASURED:
            own = target(known.model, known.gpu.name, known.vllm_version)
            found = derive_coefficients(own, GUESS, [known])
            for name, value in found.values.items():
                if known.coefficients[name]:
                    assert value == pytest.approx(known.coefficients[name], rel=0.01), name

    def test_the_same_gpu_tells_more_than_another_and_another_more_than_none(self) -> None:
        spreads = [
            derive_coefficients(target(gpu=gpu, version="0.8.5"), GUESS, measured).spreads
            for gpu, measured in (("H100-64GB", MEASURED[1:]), ("L40S", MEASURED), ("L40S", []))
        ]
        for name in ("base_s", "token_s", "expand_block_s", "adapter_s", "lora_s"):
            assert spreads[0][name] < spreads[1][name] < spreads[2][name], name

    def test_what_was_measured_moves_others_the_same_way(self) -> None:
        known = MEASURED[0]
        content = known.to_json()
        content["coefficients"]["step"]["expand_block_s"]["value"] *= 2
        slower = Calibration.from_json(content)
        before, after = (derive_coefficients(target(), GUESS, [each]).values for each in (known, slower))
        assert 1.0 < after["expand_block_s"] / before["expand_block_s"] < 2.0
        assert after["kv_token_s"] == pytest.approx(before["kv_token_s"])

    def test_cpus_and_unknown_gpus_tell_nothing(self) -> None:
        content = MEASURED[0].to_json()
        unknown = Calibration.from_json(content | {"gpu": content["gpu"] | {"name": "my own"}})
        assert derive_coefficients(target(), GUESS, [unknown]).values == derive_coefficients(target(), GUESS).values


class TestCalibration:
    def test_file_holds_all_of_it(self, tmp_path) -> None:
        derived = derive_calibration(
            find_shape("Llama-3.3-70B-Instruct"), "H100", deployment=Deployment(tensor_parallel_size=4)
        )
        derived.save(tmp_path / "c.json")
        again = load_calibration(tmp_path / "c.json")
        assert again.to_json() == derived.to_json()
        assert again.costs == derived.costs
        command = again.server(max_loras=4).serve_command("m")
        assert "--tensor-parallel-size 4" in command
        assert again.plan_memory(again.server(max_loras=4)).status.item() == Status.OK
        alone = derive_calibration(find_shape("Llama-3.3-70B-Instruct"), "H100")
        assert alone.plan_memory(alone.server(max_loras=4)).status.item() == Status.OOM

    def test_it_says_what_it_rests_on_and_how_sure_it_is(self) -> None:
        near, far = derive_calibration(LLAMA, "H100-64GB", vllm_version="0.8.5"), derive_calibration(LLAMA, "T4")
        assert near.capacity_error < far.capacity_error
        assert "measured on the H100-64GB" in near.provenance["rests_on"]["adapter_s"]
        assert "scaled to the T4" in far.provenance["rests_on"]["adapter_s"]
        assert "hosts of other servers" in far.provenance["rests_on"]["response_s"]
        amd = derive_calibration(LLAMA, "MI300X")  # no speed of another maker's GPU was seen
        assert amd.capacity_error > far.capacity_error

    def test_a_model_is_known_by_what_is_served(self) -> None:
        known = MEASURED[0]
        again = derive_calibration(known.model.served_as, known.gpu.name, vllm_version=known.vllm_version)
        for name in ("base_s", "kv_token_s", "adapter_s"):
            assert again.coefficients[name] == pytest.approx(known.coefficients[name], rel=0.01)
        assert again.capacity_error == min(each.capacity_error for each in MEASURED)

    def test_specialized_servers_keep_their_coefficients_and_say_that_nobody_measured_them(self) -> None:
        plain = derive_calibration("Qwen3-8B", "H100", vllm_version="0.33.0")
        special = plain.specialized()
        assert special.coefficients == plain.coefficients
        assert special.costs.kernels.specialized
        assert "--specialize-active-lora" in special.server(max_loras=4).serve_command("m")
        graphs = [float(each.plan_memory(each.server(max_loras=4)).cuda_graph_bytes[0]) for each in (plain, special)]
        assert graphs[1] > graphs[0]  # one for each number of adapters
        assert [each for each in special.extrapolations() if "none was measured" in each]
        assert not plain.extrapolations()
        again = Calibration.from_json(json.loads(json.dumps(special.to_json())))
        assert again.costs.kernels == special.costs.kernels
        with pytest.raises(InputError, match=r"--specialize-active-lora: .* vLLM 0.8.5 has no such flag"):
            MEASURED[0].specialized()

    def test_changing_what_a_calibration_is_of_is_refused(self) -> None:
        known = MEASURED[0]
        with pytest.raises(InputError, match=r"vllm_version: '0.33.0' .* derive_calibration"):
            dataclasses.replace(known, vllm_version="0.33.0")
        with pytest.raises(InputError, match="gpu: 'T4'"):
            dataclasses.replace(known, gpu=find_gpu("T4").gpu)
        with pytest.raises(InputError, match="model"):
            dataclasses.replace(known, model=LLAMA if known.model.name.startswith("qwen") else QWEN)
        assert dataclasses.replace(known, name="mine").name == "mine"

    @pytest.mark.parametrize(
        ("gpu", "layout", "told"),
        [
            ("H1000", {}, "gpu: 'H1000'"),
            ("H100", {"tensor_parallel_size": 16}, "tensor_parallel_size: 16 .* at most 8"),
            ("H100", {"tensor_parallel_size": 3}, "tensor_parallel_size: 3 .* divisor"),
        ],
    )
    def test_bad_input_is_one_sentence(self, gpu, layout, told) -> None:
        with pytest.raises(InputError, match=told):
            derive_calibration(LLAMA, gpu, deployment=Deployment(**layout))


class TestEfficiencies:
    def test_bundled_ones_are_near_the_first_guesses(self) -> None:
        bundled = Efficiencies.bundled()
        assert list(bundled.values) == list(FIRST_GUESSES)
        for name, (guess, _) in FIRST_GUESSES.items():
            assert abs(np.log(bundled.values[name] / guess.centre)) < 2 * guess.spread, name
        assert np.linalg.eigvalsh(bundled.covariance).min() > 0

    def test_file_is_checked(self, tmp_path) -> None:
        path = tmp_path / "e.json"
        GUESS.save(path)
        assert Efficiencies.from_file(path).values == pytest.approx(dict(GUESS.values), rel=1e-3)
        text = path.read_text()
        for old, new, told in (
            ('"layer_s"', '"layers"', "values"),
            ('"step_spread": 0.2', '"step_spread": -1', "step_spread"),
            ('"covariance": [', '"covariance": [1,', "covariance"),
        ):
            path.write_text(text.replace(old, new))
            with pytest.raises(InputError, match=told):
                Efficiencies.from_file(path)
