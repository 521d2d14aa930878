"""What is told from shapes, to the byte, against tensors.

Weights and adapter slots, on one GPU and sharded over two, against those of vLLM's own models of small dimensions;
adapters in host memory against those that PEFT makes for transformers' models.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lora_capacity.engines import ServerConfig, VllmBehaviour
from lora_capacity.hardware import find_gpu
from lora_capacity.memory import Deployment, EstimatedTerms, MemoryQuestion, slot_bytes
from lora_capacity.models import ModelShape, split_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
GIVEN_PYTHON = os.environ.get("LORA_CAPACITY_VLLM_PYTHON")
PYTHON = Path(GIVEN_PYTHON or REPOSITORY / ".venv-vllm" / "bin" / "python")
TIMEOUT_S = 300
SLOTS, RANK, GPUS = 2, 8, 2
BEHAVIOUR = VllmBehaviour.for_version("0.32.0")

BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
SHARED = {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.25,
}


def case(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    config = {**BASE, "architectures": [architecture], "model_type": model_type, **changes}
    return {key: value for key, value in config.items() if value is not None or key == "q_lora_rank"}


CASES = {
    "llama": case("LlamaForCausalLM", "llama", tie_word_embeddings=True),
    "mistral": case("MistralForCausalLM", "mistral", sliding_window=None),
    "qwen2": case("Qwen2ForCausalLM", "qwen2", head_dim=None),
    "qwen3": case("Qwen3ForCausalLM", "qwen3"),
    "qwen2_moe": case("Qwen2MoeForCausalLM", "qwen2_moe", head_dim=None, **EXPERTS, **SHARED),
    "qwen3_moe": case("Qwen3MoeForCausalLM", "qwen3_moe", **EXPERTS, decoder_sparse_step=1, mlp_only_layers=[]),
    "qwen3_next": case("Qwen3NextForCausalLM", "qwen3_next", **EXPERTS, **SHARED, **DELTA),
    "gemma": case("GemmaForCausalLM", "gemma", tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
    "gemma2": case("Gemma2ForCausalLM", "gemma2", tie_word_embeddings=True, sliding_window=16),
    "gemma3": case("Gemma3ForCausalLM", "gemma3_text", tie_word_embeddings=True, sliding_window=16),
    "phi3": case("Phi3ForCausalLM", "phi3", head_dim=None, original_max_position_embeddings=64),
    "granite": case("GraniteForCausalLM", "granite", head_dim=None, tie_word_embeddings=True),
    "granitemoe": case(
        "GraniteMoeForCausalLM", "granitemoe", head_dim=None, num_local_experts=4, num_experts_per_tok=2
    ),
    "falcon": case(
        "FalconForCausalLM",
        "falcon",
        head_dim=None,
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
        bias=False,
        alibi=False,
        intermediate_size=None,
        num_key_value_heads=None,
        tie_word_embeddings=True,
    ),
    "olmo2": case("Olmo2ForCausalLM", "olmo2"),
    "smollm3": case("SmolLM3ForCausalLM", "smollm3"),
    "starcoder2": case("Starcoder2ForCausalLM", "starcoder2", head_dim=None, use_bias=True),
    "seed_oss": case("SeedOssForCausalLM", "seed_oss", attention_bias=True, attention_out_bias=False),
    "glm": case("GlmForCausalLM", "glm", attention_bias=True),
    "nemotron": case("NemotronForCausalLM", "nemotron", norm_eps=1e-5, hidden_act="relu2"),
    "exaone4": case("Exaone4ForCausalLM", "exaone4"),
    "glm4": case("Glm4ForCausalLM", "glm4", attention_bias=True),
    "glm4_moe": case("Glm4MoeForCausalLM", "glm4_moe", **{**LATENT, "num_key_value_heads": 2}, use_qk_norm=False),
    "deepseek_v2": case("DeepseekV2ForCausalLM", "deepseek_v2", head_dim=None, **LATENT, q_lora_rank=None),
    "deepseek_v3": case(
        "DeepseekV3ForCausalLM", "deepseek_v3", head_dim=None, **LATENT, q_lora_rank=48, topk_method="noaux_tc"
    ),
    "mixtral": case("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt_oss": case(
        "GptOssForCausalLM",
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        intermediate_size=64,
    ),
}


MAMBA = {
    "hybrid_override_pattern": "M*-M",
    "num_hidden_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
}
HYBRID = {**DELTA, "layer_types": ["linear_attention", "full_attention"]}
# transformers names the layers of two otherwise than adapters that vLLM loads.
ADAPTED = {name: config for name, config in CASES.items() if name not in ("granitemoe", "glm4")} | {
    "qwen3_5": case("Qwen3_5ForCausalLM", "qwen3_5_text", **HYBRID),
    "qwen3_5_moe": case("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", **EXPERTS, **SHARED, **HYBRID),
    "nemotron_h": case("NemotronHForCausalLM", "nemotron_h", **MAMBA),
}
# As PEFT adapts a convolution, vLLM does not load it.
NOT_ADAPTED = {"conv1d"}


def run_script(script: str, cases: dict[str, Any], folder: Path, gpus: int = 1) -> dict[str, Any]:
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: run tests/vllm/make_environment.sh, or set LORA_CAPACITY_VLLM_PYTHON")
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [str(PYTHON), str(Path(__file__).with_name(script)), "cases.json", "counts.json"]
    words += [str(gpus)] if gpus > 1 else []
    ran = subprocess.run(words, check=False, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads((folder / "counts.json").read_text())


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {name: {"config": config, "slots": SLOTS, "rank": RANK} for name, config in CASES.items()}
    return run_script("count_tensors.py", cases, tmp_path_factory.mktemp("tensors"))


@pytest.mark.parametrize("name", CASES)
def test_weights_and_slots_are_vllms_own_to_the_byte(counts, name):
    found = counts[name]
    assert "error" not in found, found
    shape = ModelShape.from_hf_config(CASES[name], name)
    assert split_model(shape)[0].weight_bytes - _copies(shape) == found["weights"]
    assert SLOTS * slot_bytes(shape, BEHAVIOUR, RANK) == found["slots"], found["layers"]


@pytest.fixture(scope="module")
def sharded_counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {
        f"{name} {fully}": {"config": config, "slots": SLOTS, "rank": RANK, "fully_sharded": fully}
        for name, config in CASES.items()
        for fully in (False, True)
    }
    return run_script("count_tensors.py", cases, tmp_path_factory.mktemp("sharded"), GPUS)


@pytest.mark.parametrize("fully", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_weights_and_slots_of_one_of_two_gpus_are_vllms_own_to_the_byte(sharded_counts, name, fully):
    found = sharded_counts[f"{name} {fully}"]
    assert "error" not in found, found
    shape = ModelShape.from_hf_config(CASES[name], name)
    (shard,) = split_model(shape, GPUS)
    assert shard.weight_bytes - _copies(shape) // GPUS == found["weights"]
    assert SLOTS * slot_bytes(shard, BEHAVIOUR, RANK, fully_sharded_loras=fully) == found["slots"], found["layers"]


def adapter_case(config: dict[str, Any]) -> dict[str, Any]:
    """Return what is adapted, as ``count_adapters.py`` takes it: every linear layer with slots."""
    modules = {module for layer in ModelShape.from_hf_config(config, "model").layers for module in layer.modules}
    adapted = [module for module in modules if module.adapted]
    return {
        "config": config,
        "names": sorted(set().union(*(module.adapter_names for module in adapted)) - NOT_ADAPTED),
        "rank": RANK,
        "experts_apart": not any(module.experts and module.parts for module in adapted),
    }


def host_bytes(config: dict[str, Any], *names: str) -> int:
    shape = ModelShape.from_hf_config(config, "model")
    server = ServerConfig("0.32.0", SLOTS, SLOTS, RANK, 64, 2048, 0.9, 64)
    terms, gpu = EstimatedTerms.bundled(), find_gpu("H100").gpu
    return MemoryQuestion(shape, gpu, terms, server, Deployment(), True, names).host_bytes_per_adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {name: adapter_case(config) for name, config in ADAPTED.items()}
    return run_script("count_adapters.py", cases, tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_in_host_memory_are_pefts_own_to_the_byte(adapters, name):
    config, found = ADAPTED[name], adapters[name]
    assert "error" not in found, found
    assert host_bytes(config, *adapter_case(config)["names"]) == sum(found.values()), found
    if "experts" in found:  # whose layers are called as others of the same model
        assert host_bytes(config, "experts") == found["experts"]
    else:
        assert {each: host_bytes(config, each) for each in found} == found


def test_adapters_of_real_models_are_pefts_own_to_the_byte(measurements_dir, tmp_path):
    configs = {}
    for file in (measurements_dir.parent / "cases" / "configs").glob("*/config.json"):
        config = json.loads(file.read_text())
        # transformers does not know the one, and of the other the file does not tell the layers.
        if config["model_type"] not in ("internlm2", "nemotron_h"):
            configs[file.parent.name] = shortened(config)
    assert len(configs) >= 12
    counts = run_script("count_adapters.py", {name: adapter_case(each) for name, each in configs.items()}, tmp_path)
    expected = {name: host_bytes(each, *adapter_case(each)["names"]) for name, each in configs.items()}
    assert {name: sum(found.values()) for name, found in counts.items() if "error" not in found} == expected, counts


def shortened(config: dict[str, Any], layers: int = 4) -> dict[str, Any]:
    """Return the configuration of the model with its first layers only, its weights not quantized."""
    shorter = {key: value for key, value in config.items() if key != "quantization_config"}
    for key, value in shorter.items():
        if key == "text_config":
            shorter[key] = shortened(value, layers)
        elif key == "num_hidden_layers":
            shorter[key] = layers
        elif key == "layer_types":
            shorter[key] = value[:layers]
    return shorter


def _copies(shape: ModelShape) -> int:
    """Bytes that only stand beside the parameters once weights are loaded: the unfolded latent projection."""
    modules = [module for layer in shape.layers for module in layer.modules if not module.name]
    return sum(module.weight_bytes(1, shape.dtype_bytes) for module in modules)
