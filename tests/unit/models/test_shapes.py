"""Shapes of many architectures against published sizes, and how they are divided over GPUs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.hardware import Gpu
from lora_capacity.memory import Deployment, MemoryModel, plan_memory, slot_bytes
from lora_capacity.models import ModelShape, bundled_shapes, find_shape, split_model
from lora_capacity.units import BYTES_PER_GIB

OLD, NEW = VllmBehaviour.for_version("0.10.0"), VllmBehaviour.for_version("0.14.0")
MEMORY = MemoryModel(700e6, 200e6, 14.0, 250e6, 100e6)

# Parameters as the models' pages at Hugging Face count them (tensors of the checkpoint).
PARAMETERS = {
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-27b-it": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/phi-4": 14_659_507_200,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "ibm-granite/granite-3.1-8b-instruct": 8_170_848_256,
    "internlm/internlm2_5-7b-chat": 7_737_708_544,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_are_the_published_parameters(name):
    assert find_shape(name).weight_bytes == 2 * PARAMETERS[name]


def test_every_bundled_shape_is_read_and_survives_json():
    for name in bundled_shapes():
        shape = find_shape(name)
        assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape, name
    assert len(bundled_shapes()) >= 40


def test_a_llama_is_told_by_its_sizes_alone():
    content = find_shape("Llama-3.1-8B-Instruct").to_json()
    assert {"blocks", "order", "quantization", "other_parameters"}.isdisjoint(content)


# Layers x (inputs and outputs of the four modules, each output with an A of its own) x rank 16 x 2 bytes.
SLOTS = {
    "OLMo-2-1124-7B-Instruct": 32 * (3 * 4096 + 3 * 4096 + 8192 + 2 * 4096 + 3 * 11008 + 4096),
    "SmolLM3-3B": 36 * (3 * 2048 + 2048 + 2 * 512 + 4096 + 2 * 2048 + 2 * 11008 + 11008 + 2048),
    # q, k and v, and gate and up, stand as one in these checkpoints: one A for all.
    "phi-4": 40 * (5120 + 7680 + 10240 + 5120 + 2 * 17920 + 17920 + 5120),
    "internlm2_5-7b-chat": 32 * (4096 + 6144 + 8192 + 2 * 4096 + 2 * 14336 + 14336 + 4096),
}


@pytest.mark.parametrize("name", SLOTS)
def test_a_slot_counts_the_matrices_of_its_modules(name):
    shape = replace(find_shape(name), architecture="Qwen2ForCausalLM")  # which has no slots for embeddings
    assert slot_bytes(shape, NEW, 16) == 2 * 16 * SLOTS[name]


def test_granite_has_slots_for_embedding_and_head():
    granite = find_shape("granite-3.1-8b-instruct")
    linear = 40 * (3 * 4096 + 6144 + 8192 + 2 * 4096 + 3 * 12800 + 4096)
    assert slot_bytes(granite, NEW, 16) == 2 * 16 * (linear + 2 * (49155 + 4096))


def test_slots_of_experts_begin_with_a_version_and_are_divided_as_layers_are():
    shape = find_shape("Qwen3-30B-A3B")
    attention = 48 * (3 * 2048 + 4096 + 2 * 512 + 4096 + 2048 + 2048 + 128)  # with the router's
    experts = 48 * 128 * (2 * 2048 + 2 * 768 + 768 + 2048)
    embeddings = 2 * (151936 + 2048) if shape.architecture in NEW.embedding_architectures else 0
    assert slot_bytes(shape, OLD, 16) == 32 * attention
    assert slot_bytes(shape, NEW, 16) == 32 * (attention + experts + embeddings)
    on_four = 48 * 128 * (2 * 2048 + 2 * 192 + 192 + 2048)
    shard = split_model(shape, 4)[0]
    attention_on_four = 48 * (3 * 2048 + 1024 + 2 * 128 + 1024 + 2048 + 2048 + 128)
    assert slot_bytes(shard, NEW, 16) == 32 * (attention_on_four + on_four + embeddings)
    sharded = 48 * 128 * (2 * 512 + 2 * 192 + 192 + 512) + 48 * (3 * 512 + 1024 + 256 + 1024 + 512 + 2048 + 128)
    assert slot_bytes(shard, NEW, 16, fully_sharded_loras=True) == 32 * (sharded + embeddings)


def test_key_and_value_heads_are_not_divided_below_one_a_gpu():
    shape = find_shape("Meta-Llama-3-70B")
    assert [split_model(shape, gpus)[0].kv_elements_per_token * 2 for gpus in (1, 4, 8, 16)] == [
        *(327_680, 81_920, 40_960),
        40_960,
    ]
    # Logged: 32.95 GiB on each of four GPUs.
    assert split_model(shape, 4)[0].weight_bytes / BYTES_PER_GIB == pytest.approx(32.95, rel=0.005)


def test_stages_of_a_pipeline_share_all_layers_out():
    shape = find_shape("Qwen2.5-14B-Instruct")
    stages = split_model(shape, 1, 5)
    assert [stage.num_layers for stage in stages] == [9, 10, 10, 10, 9]
    assert sum(stage.weight_bytes for stage in stages) == shape.weight_bytes


@pytest.mark.parametrize(
    ("gpus", "stages", "words"),
    [
        (3, 1, "a divisor of the 32 attention heads"),
        (1, 33, "at most the 32 layers"),
        (0, 1, "tensor_parallel_size: 0"),
    ],
)
def test_a_division_that_does_not_work_out_is_told(gpus, stages, words):
    with pytest.raises(InputError, match=words):
        split_model(find_shape("Llama-3.1-8B-Instruct"), gpus, stages)


LLAMA = dict(bundled_shapes()["meta-llama/Llama-3.1-8B-Instruct"])
LINEAR = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
EMBEDDINGS = 2 * (2 * 128256 * 4096 + 65 * 4096)  # and norms, of 16 bits


@pytest.mark.parametrize(
    ("stored", "linear_bytes"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, LINEAR * (4 + 20 / 128) / 8),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, LINEAR * (8 + 24 / 32) / 8),
        ({"quant_method": "fp8"}, LINEAR),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, LINEAR * (1 + 4 / 128**2)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, LINEAR * (4 + 8 / 64 + 32 / 64 / 256) / 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
            },
            LINEAR + 4 * 32 * (6144 + 4096 + 2 * 14336 + 4096),
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, LINEAR * 4.5 / 8),
    ],
)
def test_quantized_layers_take_the_bits_that_are_stored(stored, linear_bytes):
    shape = ModelShape.from_hf_config({**LLAMA, "quantization_config": stored}, "m")
    assert shape.weight_bytes == pytest.approx(EMBEDDINGS + linear_bytes, rel=1e-6)


def test_layers_that_are_left_out_of_quantization_keep_their_type():
    def linear(**stored) -> float:
        config = {**LLAMA, "quantization_config": {"quant_method": "fp8", **stored}}
        return ModelShape.from_hf_config(config, "m").weight_bytes - EMBEDDINGS

    down = 32 * 4096 * 14336
    assert linear(modules_to_not_convert=["lm_head", "down_proj"]) == LINEAR + down
    assert linear(ignore=["re:.*mlp.down_proj"]) == LINEAR + down
    assert linear(ignored_layers=["model.layers.3.mlp.down_proj", "model.layers.4*"]) == (
        LINEAR + down / 32 + LINEAR / 32
    )


def test_a_scheme_beside_the_model_is_read_and_decides_the_kv_cache_too(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(dict(bundled_shapes()["meta-llama/Llama-3.1-70B-Instruct"])))
    stored = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": stored}))
    shape = ModelShape.from_file(tmp_path)
    assert shape.weight_bytes / BYTES_PER_GIB == pytest.approx(67.7, abs=0.05)
    assert plan(shape).kv_bytes_per_token == 163_840
    assert plan(shape, deployment=Deployment(kv_cache_dtype="bfloat16")).kv_bytes_per_token == 327_680


def test_a_nested_description_of_the_language_model_is_read():
    text = dict(bundled_shapes()["Qwen/Qwen3-8B"]) | {"model_type": "qwen3_vl_text"}
    config = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "text_config": text}
    shape = ModelShape.from_hf_config(config, "m")
    assert shape.weight_bytes == 2 * PARAMETERS["Qwen/Qwen3-8B"]
    vision = {"depth": 2, "hidden_size": 8, "intermediate_size": 16}
    with_vision = ModelShape.from_hf_config(config | {"vision_config": vision}, "m")
    assert with_vision.weight_bytes - shape.weight_bytes == 2 * 2 * (4 * 8 * 8 + 2 * 8 * 16)


def test_a_layout_in_a_file_is_used_and_its_faults_are_told(tmp_path: Path):
    path = tmp_path / "layouts.json"
    layout = {"architecture": "MineForCausalLM", "model_types": ["mine"], "source": "", "norms": "3*hidden_size"}
    path.write_text(json.dumps({"layouts": [layout]}))
    mine = LLAMA | {"model_type": "mine"}
    shape = ModelShape.from_hf_config(mine, "m", layouts=path)
    assert shape.weight_bytes == ModelShape.from_hf_config(LLAMA, "m").weight_bytes + 2 * 32 * 4096
    with pytest.raises(InputError, match=r"config\.json model_type: 'mine' is not allowed"):
        ModelShape.from_hf_config(mine, "m")
    for fault, words in (
        ({"mixers": {"full_attention": "magic"}}, "MineForCausalLM: 'magic' is not allowed"),
        ({"model_type": "mine"}, "model_type"),
        ({"norms": "3*width"}, "config.json width: missing"),
    ):
        other = tmp_path / f"{len(words)}.json"
        other.write_text(json.dumps({"layouts": [layout | fault]}))
        with pytest.raises(InputError) as error:
            ModelShape.from_hf_config(mine, "m", layouts=other)
        assert words in str(error.value)


def plan(shape, behaviour=NEW, **changes):
    settings = {
        "max_loras": 0,
        "max_lora_rank": 16,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.9,
        "max_model_len": 32768,
    }
    gpu = Gpu("gpu", 140 * BYTES_PER_GIB)
    return plan_memory(shape, gpu, MEMORY, behaviour=behaviour, **settings | changes)


def test_layers_of_a_window_keep_only_that_in_versions_that_group_layers():
    """24 layers of 1,024 elements a token: 12 of a window of 128, 12 of all tokens, in two tables of 12 layers."""
    shape = find_shape("gpt-oss-20b")
    block_bytes = 12 * 16 * 1024 * 2
    grouped = plan(shape)
    blocks = grouped.kv_cache_bytes // block_bytes
    assert grouped.kv_cache_tokens == blocks // 2 * 16
    of_a_request = 32768 // 16 + -(-(127 + 2048) // 16) + 1
    assert grouped.kv_cache_requests == blocks / of_a_request
    later = plan(shape, VllmBehaviour.for_version("0.30.0"))
    assert later.kv_cache_tokens == later.kv_cache_bytes // block_bytes * 32768 // of_a_request
    whole = plan(shape, VllmBehaviour.for_version("0.8.5"))
    assert whole.kv_cache_tokens == whole.kv_cache_bytes // (2 * block_bytes) * 16


def test_a_state_makes_blocks_of_attention_as_large_as_itself():
    """Qwen3-Next on two GPUs, as logged by vLLM 0.11.0: blocks of 544 tokens, 973,760 tokens in 44.59 GiB."""
    shape = find_shape("Qwen3-Next-80B-A3B-Instruct")
    on_two = Deployment(tensor_parallel_size=2)
    found = plan(shape, VllmBehaviour.for_version("0.11.0"), deployment=on_two, max_model_len=262_144)
    scaled = found.kv_cache_tokens * 44.59 * BYTES_PER_GIB / found.kv_cache_bytes
    np.testing.assert_allclose(scaled, 973_760, rtol=0.001)


def test_latent_attention_keeps_one_vector_whole_on_every_gpu():
    shape = find_shape("DeepSeek-V2-Lite")
    for gpus in (1, 4):
        found = plan(shape, deployment=Deployment(tensor_parallel_size=gpus))
        assert found.kv_bytes_per_token == 27 * (512 + 64) * 2


def test_the_tightest_stage_of_a_pipeline_counts():
    shape = find_shape("Llama-3.1-8B-Instruct")
    both = plan(shape, deployment=Deployment(pipeline_parallel_size=2))
    # The last stage holds the output head, the first the embedding: equal weights but for the last norm.
    half = split_model(shape, 1, 2)[1]
    assert both.weight_bytes == pytest.approx(half.weight_bytes, rel=0.02)
    assert both.kv_bytes_per_token == 131_072 / 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, "config.json num_experts: missing"),
        ({"model_type": "nemotron_h"}, "hybrid_override_pattern: missing"),
        ({"model_type": "gemma4", "num_kv_shared_layers": 4, "head_dim": 128}, "share a KV cache are not modelled"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "1 layers"),
        ({"model_type": "olmo2", "layer_types": ["chunked"] * 32}, "layer_types: 'chunked'"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "qk_nope_head_dim: missing"),
    ],
)
def test_what_a_shape_lacks_is_told(changes, words):
    with pytest.raises(InputError) as error:
        ModelShape.from_hf_config(LLAMA | changes, "m")
    assert words in str(error.value)
