import json
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path

import pytest

from lora_capacity.engines import (
    DEVICES,
    EngineBehaviour,
    SchedulerRules,
    ServerConfig,
    VllmBehaviour,
    smallest_max_lora_rank,
)
from lora_capacity.engines.vllm.versions import CHANGES
from lora_capacity.errors import InputError
from lora_capacity.hardware import Gpu
from lora_capacity.memory import slot_bytes
from lora_capacity.models import ModelShape, expand_target_modules
from lora_capacity.units import BYTES_PER_GIB

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
MODEL = ModelShape.from_hf_config(LLAMA, "llama")
GPU = Gpu("H100", 80 * BYTES_PER_GIB)
OLD = VllmBehaviour.for_version("0.8.5")
NEW = VllmBehaviour.for_version("0.32.0")


# Parameter counts as published with the models.
@pytest.mark.parametrize(
    ("config", "parameters"),
    [(LLAMA, 8_030_261_248), (QWEN2, 7_615_616_512), (QWEN3, 596_049_920)],
)
def test_weights_from_shapes_are_the_published_parameter_counts(config, parameters):
    assert ModelShape.from_hf_config(config, "model").weight_bytes == 2 * parameters


def test_kv_cache_of_a_token_counts_keys_and_values_of_every_layer():
    assert MODEL.kv_bytes_per_token == 131072
    assert ModelShape.from_hf_config(QWEN2, "qwen").kv_bytes_per_token == 57344
    assert ModelShape.from_hf_config(QWEN3, "qwen3").kv_bytes_per_token == 28 * 8 * 128 * 4


def test_fused_layers_keep_the_widths_of_their_parts():
    shapes = {module.name: (module.input_size, module.output_sizes) for module in MODEL.linear_modules}
    assert shapes == {
        "qkv_proj": (4096, (4096, 1024, 1024)),
        "o_proj": (4096, (4096,)),
        "gate_up_proj": (4096, (14336, 14336)),
        "down_proj": (14336, (4096,)),
    }


def test_qwen2_always_biases_attention_and_others_when_told():
    shapes = [ModelShape.from_hf_config(config, "model") for config in (LLAMA, QWEN2, QWEN3)]
    assert [shape.attention_bias for shape in shapes] == [False, True, False]
    assert ModelShape.from_hf_config(LLAMA | {"attention_bias": True}, "model").attention_bias


def test_the_architecture_is_listed_or_follows_from_the_model_type():
    assert MODEL.architecture == "LlamaForCausalLM"
    assert ModelShape.from_hf_config(QWEN3, "model").architecture == "Qwen3ForCausalLM"


def test_embeddings_are_adapted_by_architecture_and_version():
    def adapted(version):
        return set(VllmBehaviour.for_version(version).embedding_architectures)

    always = {"LlamaForCausalLM", "MixtralForCausalLM", "GraniteForCausalLM", "NemotronForCausalLM"}
    assert always <= adapted("0.8.5") & adapted("0.33.0")
    assert "MistralForCausalLM" in adapted("0.14.1") - adapted("0.15.0")
    assert "Qwen3ForCausalLM" in adapted("0.16.0") - adapted("0.15.1")
    assert not adapted("0.33.0") & {"Qwen2ForCausalLM", "GemmaForCausalLM", "Gemma3ForCausalLM"}


def test_models_on_transformers_code_have_slots_of_the_embedding_but_not_of_the_head():
    told = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_size": 4096, "vocab_size": 100352}
    model = ModelShape.from_hf_config(LLAMA | told, "model")
    before, after = (slot_bytes(model, VllmBehaviour.for_version(version), 16) for version in ("0.25.0", "0.26.0"))
    assert after - before == 16 * (4096 + 100352) * model.dtype_bytes


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        (None, 131072),
        ({"type": "linear", "factor": 2}, 262144),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    ],
)
def test_rotary_scaling_sets_the_longest_sequence(scaling, tokens):
    shape = ModelShape.from_hf_config(LLAMA | {"rope_scaling": scaling}, "model")
    assert shape.max_position_embeddings == tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "config.json num_experts: missing"),
        ({"architectures": None, "model_type": "gpt2"}, "config.json model_type: 'gpt2'"),
        ({"architectures": ["LLaMAForCausalLM"]}, "did you mean 'LlamaForCausalLM'?"),
        ({"hidden_size": None}, "config.json hidden_size: missing"),
        ({"num_hidden_layers": "many"}, "config.json num_hidden_layers: 'many'"),
        ({"num_attention_heads": 30}, "a divisor of hidden_size 4096"),
        ({"num_key_value_heads": 5}, "model.num_key_value_heads: 5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method: missing"),
        ({"quantization_config": {"quant_method": "gguf"}}, "quantization_config.quant_method: 'gguf'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantization_config.config_groups: missing",
        ),
    ],
)
def test_a_config_that_cannot_be_used_names_the_key(change, words):
    with pytest.raises(InputError, match=r"config|model\.num") as error:
        ModelShape.from_hf_config(LLAMA | change, "model")
    assert words in str(error.value)


def test_llama_without_key_value_heads_has_one_per_query_head_and_mistral_must_say():
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert ModelShape.from_hf_config(config, "model").num_key_value_heads == 32
    with pytest.raises(InputError, match="num_key_value_heads"):
        ModelShape.from_hf_config(config | {"architectures": ["MistralForCausalLM"]}, "model")


def test_a_folder_or_its_file_gives_the_shape_named_after_the_folder(tmp_path: Path):
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    expected = replace(MODEL, name="my-llama")
    assert ModelShape.from_file(folder) == expected
    assert ModelShape.from_file(folder / "config.json") == expected


@pytest.mark.parametrize("content", [None, "not json", "[1]"])
def test_an_unreadable_config_file_is_named(tmp_path: Path, content):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        ModelShape.from_file(file)


def test_whole_numbers_with_a_point_become_integers():
    shape = ModelShape.from_json(MODEL.to_json() | {"num_layers": 32.0})
    assert shape == MODEL
    assert isinstance(shape.num_layers, int)
    config = ServerConfig.with_defaults(OLD, GPU, MODEL, max_loras=2.0, max_lora_rank=32.0)
    assert "--max-loras 2 --max-cpu-loras 2 --max-lora-rank 32" in config.serve_command("m")


def test_shapes_and_gpus_survive_json():
    assert ModelShape.from_json(json.loads(json.dumps(MODEL.to_json()))) == MODEL
    assert Gpu.from_json(json.loads(json.dumps(GPU.to_json()))) == GPU


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 3}, "model.layers"),
        ({"hidden_size": 0}, "model.hidden_size: 0"),
        ({"hidden_size": True}, "model.hidden_size: True"),
        ({"architecture": "GPT2"}, "model.architecture: 'GPT2'"),
        ({"attention_bias": "no"}, "model.attention_bias: 'no' is not allowed; allowed: true or false"),
    ],
)
def test_a_bad_shape_in_json_is_told(change, words):
    with pytest.raises(InputError) as error:
        ModelShape.from_json(MODEL.to_json() | change)
    assert words in str(error.value)


def test_a_missing_field_in_json_is_told_unless_it_has_a_default():
    content = MODEL.to_json()
    del content["dtype_bytes"]
    assert ModelShape.from_json(content) == MODEL
    del content["head_dim"]
    with pytest.raises(InputError, match=r"model\.head_dim: missing"):
        ModelShape.from_json(content)
    with pytest.raises(InputError, match="model: 'a list' is not allowed; allowed: a mapping with the keys name"):
        ModelShape.from_json([1])


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("attention", ("qkv_proj", "o_proj")),
        (("up_proj",), ("gate_up_proj",)),
        (("down_proj", "v_proj", "q_proj"), ("qkv_proj", "down_proj")),
        ("all-linear", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    ],
)
def test_target_modules_name_fused_layers_in_order(given, layers):
    assert expand_target_modules(given) == layers


@pytest.mark.parametrize(
    ("given", "words"), [("atention", "did you mean 'attention'?"), ((), "at least one"), (("x",), "'x'")]
)
def test_unknown_target_modules_are_told(given, words):
    with pytest.raises(InputError) as error:
        expand_target_modules(given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("version", "gpu", "memory_gib", "expected"),
    [
        ("0.8.5", "H100-64GB", 63, (2048, 256, 0.9)),
        ("v0.8.5.post1", "A100-SXM4-80GB", 79, (8192, 1024, 0.9)),
        ("0.9.0", "NVIDIA A100-SXM4-80GB", 79, (2048, 256, 0.9)),
        ("0.9.0", "H100", 80, (8192, 1024, 0.9)),
        ("0.27.1", "B200", 180, (8192, 1024, 0.92)),
        ("0.28.0rc1", "B200", 180, (16384, 1024, 0.92)),
        ("0.32.0", "NVIDIA GB10", 120, (8192, 1024, 0.92)),
        ("0.33.0", "NVIDIA GB10", 120, (2048, 256, 0.92)),
        ("1.0", "L4", 22, (2048, 256, 0.92)),
    ],
)
def test_defaults_follow_version_and_gpu(version, gpu, memory_gib, expected):
    behaviour = VllmBehaviour.for_version(version)
    config = ServerConfig.with_defaults(behaviour, Gpu(gpu, memory_gib * BYTES_PER_GIB), MODEL)
    assert (config.max_num_batched_tokens, config.max_num_seqs, config.gpu_memory_utilization) == expected
    assert (config.max_loras, config.max_cpu_loras, config.max_lora_rank, config.max_model_len) == (1, 1, 16, 131072)


def test_rules_change_at_their_versions():
    changes = {
        "hybrid_kv_cache": "0.9.0 0.9.1",
        "adapts_experts": "0.11.0 0.11.1",
        "keeps_expert_workspace": "0.12.0 0.13.0",
        "scheduler.async_scheduling": "0.13.0 0.14.0",
        "specializes_active_lora": "0.15.1 0.16.0",
        "restricts_target_modules": "0.18.1 0.19.0",
        "scheduler.full_prompt_must_fit": "0.18.1 0.19",
        "counts_cuda_graphs": "0.19.1 0.20.0",
        "logs_kv_tokens_as_concurrency": "0.20.2 0.21",
        "scheduler.uncached_blocks_first": "0.22.1 0.23.0",
        "has_watermark": "0.23.0 0.24.0",
        "has_active_limit": "0.30.0 0.31.0",
        "scheduler.uncut_if_alone": "0.30.0 0.31.0",
        "scheduler.running_adapters_in_use": "0.32.0 0.33.0",
    }
    for rule, versions in changes.items():
        before, since = map(VllmBehaviour.for_version, versions.split())
        assert (attrgetter(rule)(before), attrgetter(rule)(since)) == (False, True), rule
    assert VllmBehaviour.for_version("0.8.5").scheduler == SchedulerRules()
    first = [VllmBehaviour.for_version(f"0.{minor}.1").scheduler.skipped_first for minor in (17, 18, 30, 31)]
    assert first == [False, True, True, False]
    assert [VllmBehaviour.for_version(f"0.11.{patch}").max_lora_ranks[0] for patch in (0, 1)] == [8, 1]


def test_a_cpu_has_batch_limits_of_its_own():
    budgets = [VllmBehaviour.for_version(version, "cpu").batch_budget(GPU) for version in ("0.9.2", "0.10.0", "0.33.0")]
    assert [(each.max_num_batched_tokens, each.max_num_seqs) for each in budgets] == [(2048, 32), *[(2048, 128)] * 2]


def test_a_cpu_is_never_scheduled_asynchronously():
    on_cpu = VllmBehaviour.for_version("0.33.0", "cpu").scheduler
    assert on_cpu == SchedulerRules(
        full_prompt_must_fit=True, running_adapters_in_use=True, uncached_blocks_first=True, uncut_if_alone=True
    )


def test_a_server_keeps_the_rules_of_its_device():
    on_cpu, on_gpu = (
        ServerConfig.with_defaults(VllmBehaviour.for_version("0.33.0", device), GPU, MODEL) for device in ("cpu", "gpu")
    )
    assert (on_cpu.device, on_cpu.behaviour) == ("cpu", VllmBehaviour.for_version("0.33.0", "cpu"))
    assert not on_cpu.behaviour.scheduler.async_scheduling
    assert on_gpu.behaviour.scheduler.async_scheduling


def test_changes_ascend_and_every_rule_is_there_from_the_first():
    releases = [change.since for change in CHANGES]
    assert releases == sorted(releases)
    assert all(change.source for change in CHANGES)
    scheduler = {f"scheduler.{entry.name}" for entry in fields(SchedulerRules)}
    own = {entry.name for entry in fields(EngineBehaviour)} - {"engine", "version", "device", "scheduler"}
    own -= {"embedding_architectures", "headless_embedding_architectures"}
    assert {change.rule for change in CHANGES} == own | scheduler
    for device in DEVICES:
        first = {change.rule for change in CHANGES if change.since == releases[0] and device in change.devices}
        assert own <= first


@pytest.mark.parametrize(
    ("version", "words"), [("latest", "a version such as"), ("0.6.4", "upgrade vLLM"), (None, "missing")]
)
def test_a_version_that_is_not_known_is_told(version, words):
    with pytest.raises(InputError) as error:
        VllmBehaviour.for_version(version)
    assert words in str(error.value)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_smallest_rank_that_takes_an_adapter(rank, allowed):
    assert smallest_max_lora_rank(rank, OLD) == allowed
    assert smallest_max_lora_rank(1, NEW) == 1


@pytest.mark.parametrize("rank", [0, 513])
def test_a_rank_that_no_slot_takes_is_told(rank):
    with pytest.raises(InputError, match="1 to 512"):
        smallest_max_lora_rank(rank, OLD)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_loras": -1}, "max_loras: -1 is not allowed; allowed: a whole number >= 0"),
        ({"max_loras": 2.5}, "max_loras: 2.5"),
        (
            {"max_loras": 4, "max_cpu_loras": 3},
            "max_cpu_loras: 3 is not allowed; allowed: a whole number >= max_loras 4",
        ),
        ({"max_lora_rank": 20}, "one of 8, 16, 32, 64, 128, 256, 320, 512; use 32"),
        ({"max_lora_rank": 1024}, "max_lora_rank: 1024"),
        ({"max_lora_rank": "big"}, "max_lora_rank: 'big'"),
        ({"max_num_seqs": 512, "max_num_batched_tokens": 256}, "a whole number >= max_num_seqs 512"),
        ({"gpu_memory_utilization": 0}, "a number > 0 and <= 1"),
        ({"gpu_memory_utilization": 1.01}, "a number > 0 and <= 1"),
        ({"max_model_len": 200_000}, "at most the 131072 tokens that llama takes"),
        ({"max_lora": 3}, "did you mean 'max_loras'?"),
        ({"target_modules": "everything"}, "target_modules: 'everything'"),
        ({"watermark": 0.01}, "watermark: 0.01 is not allowed; allowed: 0: vLLM 0.8.5 has no such flag"),
        ({"watermark": 1.0}, "watermark: 1.0 is not allowed; allowed: >= 0 and < 1"),
        ({"watermark": "low"}, "watermark: 'low'"),
        ({"max_num_active_seqs": 8}, "max_num_active_seqs: 8 is not allowed; allowed: nothing: vLLM 0.8.5 has no"),
        ({"max_num_active_seqs": 0}, "max_num_active_seqs: 0"),
        ({"long_prefill_token_threshold": 9, "max_model_len": 8}, "long_prefill_token_threshold: 9 is not allowed"),
    ],
)
def test_a_setting_that_vllm_would_refuse_is_told(given, words):
    with pytest.raises(InputError) as error:
        ServerConfig.with_defaults(OLD, GPU, MODEL, **given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_holds_every_flag_that_a_prediction_rests_on():
    config = ServerConfig.with_defaults(OLD, GPU, MODEL, max_loras=8, max_cpu_loras=64, gpu_memory_utilization=0.85)
    assert config.serve_command("my model") == (
        "vllm serve 'my model' --enable-lora --max-loras 8 --max-cpu-loras 64 --max-lora-rank 16 --max-num-seqs 1024 "
        "--max-num-batched-tokens 8192 --gpu-memory-utilization 0.85 --max-model-len 131072 --block-size 16"
    )


def test_prefix_caching_is_told_where_it_is_off():
    on, off = (ServerConfig.with_defaults(OLD, GPU, MODEL, enable_prefix_caching=given) for given in (None, False))
    assert on.enable_prefix_caching
    assert off.serve_command("m") == f"{on.serve_command('m')} --no-enable-prefix-caching"


def test_settings_of_the_scheduler_are_told_where_they_are_given():
    settings = {"watermark": 0.02, "max_num_active_seqs": 64, "long_prefill_token_threshold": 512}
    usual, given = (ServerConfig.with_defaults(NEW, GPU, MODEL, **each) for each in ({}, settings))
    told = "--watermark 0.02 --max-num-active-seqs 64 --long-prefill-token-threshold 512"
    assert given.serve_command("m") == f"{usual.serve_command('m')} {told}"
    with pytest.raises(InputError, match="from 1 to max_num_seqs 32"):
        ServerConfig.with_defaults(NEW, GPU, MODEL, max_num_active_seqs=33, max_num_seqs=32)


def test_target_modules_shrink_slots_only_where_vllm_can_be_told():
    old = ServerConfig.with_defaults(OLD, GPU, MODEL, target_modules="attention")
    new = ServerConfig.with_defaults(NEW, GPU, MODEL, target_modules="attention")
    assert (old.reserved_modules, new.reserved_modules) == ("all-linear", "attention")
    assert "--lora-target-modules" not in old.serve_command("m")
    assert new.serve_command("m").endswith("--lora-target-modules qkv_proj o_proj")
