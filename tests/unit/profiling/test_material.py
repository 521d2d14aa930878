import json
import math
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from lora_capacity_profiling.material import SMALL_LLAMA, write_adapter, write_model

from lora_capacity.errors import InputError
from lora_capacity.models import ModelShape


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read bfloat16 tensors as float32, checking that they fill the file without gaps."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    data, end, tensors = content[8 + length :], 0, {}
    for name, entry in header.items():
        begin, end_next = entry["data_offsets"]
        assert (entry["dtype"], begin, end_next - begin) == ("BF16", end, 2 * math.prod(entry["shape"]))
        end = end_next
        half = np.frombuffer(data[begin:end], "<u2").astype("<u4")
        tensors[name] = (half << 16).view("<f4").reshape(entry["shape"])
    assert end == len(data)
    return tensors


def test_model_has_the_weights_that_its_configuration_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    shape = ModelShape.from_file(folder)
    tensors = read_safetensors(folder / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) * 2 == shape.weight_bytes
    assert tensors["model.layers.3.self_attn.k_proj.weight"].shape == (128, 256)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (256, 512)
    assert np.all(tensors["model.norm.weight"] == 1)
    assert 0.019 < tensors["lm_head.weight"].std() < 0.021


def test_tied_model_has_no_head(tmp_path: Path) -> None:
    folder = write_model(tmp_path, tie_word_embeddings=True, num_hidden_layers=1)
    tensors = read_safetensors(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert sum(tensor.size for tensor in tensors.values()) * 2 == ModelShape.from_file(folder).weight_bytes


def test_same_seed_same_files(tmp_path: Path) -> None:
    first, again, other = (
        write_model(tmp_path / name, num_hidden_layers=1, seed=seed) / "model.safetensors"
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_tokenizer_has_as_many_words_as_the_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path, num_hidden_layers=1)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(words.values()) == list(range(SMALL_LLAMA["vocab_size"]))
    assert (words["<s>"], words["</s>"], words["w999"]) == (0, 1, 999)


@pytest.mark.parametrize(
    ("target_modules", "modules"),
    [
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (("down_proj", "v_proj", "q_proj"), ["q_proj", "v_proj", "down_proj"]),
        (("gate_up_proj",), ["gate_proj", "up_proj"]),
        ("o_proj", ["o_proj"]),
    ],
)
def test_adapter_has_two_factors_for_each_module(
    tmp_path: Path, target_modules: str | tuple[str, ...], modules: list[str]
) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=2)
    folder = write_adapter(tmp_path / "adapter", model, rank=4, target_modules=target_modules)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"], config["peft_type"]) == (4, modules, "LORA")
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    weights = read_safetensors(model / "model.safetensors")
    assert len(tensors) == 2 * 2 * len(modules)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        base = name.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
        assert (tensors[name.replace("lora_A", "lora_B")] @ tensors[name]).shape == weights[base].shape
        assert tensors[name].shape[0] == 4


def test_adapter_for_a_model_of_which_only_shapes_are_known(tmp_path: Path) -> None:
    shape = ModelShape("m", 1, 64, 128, 4, 2, 16, 100, True, True, 512, "Qwen2ForCausalLM")
    tensors = read_safetensors(write_adapter(tmp_path, shape, rank=8) / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (32, 8)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rank": 0}, "rank: 0 is not allowed; allowed: a whole number >= 1"),
        ({"rank": 8, "target_modules": ("q_porj",)}, "did you mean 'q_proj'?"),
    ],
)
def test_bad_adapter_is_refused_before_anything_is_written(tmp_path: Path, arguments: dict, text: str) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(InputError) as error:
        write_adapter(tmp_path / "adapter", model, **arguments)
    assert text in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_model_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file not found: .*config\.json"):
        write_adapter(tmp_path / "adapter", tmp_path, rank=8)


def test_unknown_configuration_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'hidden_size'"):
        write_model(tmp_path, hiden_size=64)


def test_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # Python ignores SIGXFSZ: writing then fails
    try:
        with pytest.raises(InputError, match=r"File too large.*a folder with room for 5,747,200 bytes"):
            write_model(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "model").glob("*.safetensors*"))
