import json
import math

import pytest

from lora_capacity.errors import InputError
from lora_capacity.facts import kv_error, predict_startup, score_startups
from lora_capacity.fitting import FIRST_GUESS, fit_terms, leave_out
from lora_capacity.measurements import read_startups
from lora_capacity.units import BYTES_PER_GIB

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
ROW = {
    "id": "one",
    "vllm_version": "0.19.0",
    "engine": "V1",
    "gpu": "H100 80GB",
    "gpu_memory_gib": 79.19,
    "model": "llama",
    "max_model_len": 8192,
    "gpu_memory_utilization": 0.9,
    "outcome": "ok",
}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "model_configs").mkdir()
    (tmp_path / "model_configs" / "llama.json").write_text(json.dumps(LLAMA))
    (tmp_path / "models.csv").write_text("model_as_written_in_table,config_file\nllama,llama.json\nother,\n")

    def reader(*rows):
        columns = list(dict.fromkeys(name for row in rows for name in (ROW | row)))
        lines = [",".join(columns), *(",".join(str((ROW | row).get(name, "")) for name in columns) for row in rows)]
        (tmp_path / "facts.csv").write_text("\n".join(lines) + "\n")
        return read_startups(tmp_path / "facts.csv", tmp_path / "models.csv")

    return reader


@pytest.mark.parametrize(
    ("text", "kind", "gib"),
    [
        ("RTX 3090-class 24GB (name not in log)", "RTX 3090", 23.58),
        ("A10G/L4 24GB (22.06 GiB)", "A10G", 22.06),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", 79.15),
        ("DGX Spark GB10 128GB", "GB10", 121.63),
        ("A100", "A100-80GB", 79.15),
        ("RTX 4090 48GB (modded)", "RTX 4090", 23.52),
        ("64GB card (not named)", "64GB card", 0.97 * 64),
    ],
)
def test_a_gpu_is_known_by_what_people_write(read, text, kind, gib):
    (startup,) = read({"gpu": text, "gpu_memory_gib": ""})
    assert startup.gpu_kind == kind
    assert startup.gpu.memory_bytes / BYTES_PER_GIB == pytest.approx(gib, rel=0.01)


def test_memory_that_was_logged_goes_before_the_catalogue_s(read):
    (startup,) = read({"gpu": "RTX 4090 48GB (modded)", "gpu_memory_gib": 47.5})
    assert (startup.gpu.name, startup.gpu.memory_bytes) == ("RTX 4090", int(47.5 * BYTES_PER_GIB))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, (8192, 1024)),
        ({"gpu": "L4"}, (2048, 256)),
        ({"gpu": "A100 80GB"}, (2048, 256)),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 512}, (512, 8)),
        ({"engine": "V0", "vllm_version": "0.6.x", "max_model_len": 20000}, (20000, 256)),
        ({"engine": "V0", "vllm_version": "0.7.2", "max_model_len": 131072}, (2048, 256)),
    ],
)
def test_what_is_not_told_is_the_version_s_default(read, row, expected):
    (startup,) = read({"gpu_memory_gib": ""} | row)
    settings = startup.plan_settings(startup.shape, startup.gpu)
    assert (settings["max_num_batched_tokens"], settings["max_num_seqs"]) == expected


def test_versions_in_words_are_the_newest_and_v0_sorts_its_logits(read):
    newest, old = read({"vllm_version": "latest image 2026-08"}, {"vllm_version": "0.6.5 dev", "engine": "V0"})
    assert newest.behaviour.counts_cuda_graphs
    assert not old.behaviour.counts_cuda_graphs
    assert old.behaviour.samples_by_sorting


# 7.25 billion of 8.03 billion parameters are in linear layers of the decoder; the others stay at 16 bits.
@pytest.mark.parametrize(
    ("words", "bits"), [("", 16), ("fp8", 8), ("compressed-tensors w8a8", 8), ("gptq_marlin", 4.2), ("awq 4-bit", 4.2)]
)
def test_weights_are_stored_as_the_table_says(read, words, bits):
    (startup,) = read({"quantization": words})
    expected = (6.98e9 * bits / 8 + 1.05e9 * 2) / BYTES_PER_GIB
    assert startup.shape.weight_bytes / BYTES_PER_GIB == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_answered_is_told_and_not_refused(read):
    other, nameless = (predict_startup(each, FIRST_GUESS) for each in read({"model": "other"}, NAMELESS))
    assert (other.status, nameless.status) == ("unsupported", "unsupported")
    assert "config.json" in other.reason
    assert "gpu_memory_gib" in nameless.reason
    assert other.to_json()["kv_cache_tokens"] is None


NAMELESS = {"gpu": "", "gpu_memory_gib": ""}


def test_the_table_s_word_goes_before_a_description_that_is_cut_short(read, tmp_path):
    cut = LLAMA | {"quantization_config": {"quant_method": "modelopt"}}
    (tmp_path / "model_configs" / "llama.json").write_text(json.dumps(cut))
    told, untold = read({"quantization": "nvfp4"}, {})
    assert told.shape.quantization == "nvfp4"
    with pytest.raises(InputError, match="quant_algo"):
        _ = untold.shape


# Parameters as published with the model: the map does not know it, the bundled shapes do.
def test_a_model_that_the_map_lacks_may_be_bundled(read):
    known, blank = read({"model": "Qwen/Qwen3-8B"}, {"model": ""})
    assert known.shape.weight_bytes == pytest.approx(2 * 8.19e9, rel=0.001)
    assert "the name of a model" in predict_startup(blank, FIRST_GUESS).reason


def test_outcomes_and_their_reasons(read):
    rows = read({}, {"gpu_memory_gib": 17.5, "gpu": "card"}, {"gpu_memory_gib": 10, "gpu": "card"})
    found = [predict_startup(each, FIRST_GUESS) for each in rows]
    assert [each.status for each in found] == ["ok", "no_kv_cache", "oom"]
    assert [bool(each.reason) for each in found] == [False, True, True]
    assert found[0].low < found[0].kv_cache_tokens < found[0].high


# The scores of numbers made up so that they can be told by hand.
def test_scores(read):
    prediction = predict_startup(read({})[0], FIRST_GUESS)
    tokens = [prediction.kv_cache_tokens / ratio for ratio in (1.0, 1.1, 0.8)]
    rows = read(
        *({"id": each, "kv_cache_tokens": each, "outcome": "ok"} for each in tokens), {"outcome": "oom"}, NAMELESS
    )
    scores = score_startups(rows, [predict_startup(each, FIRST_GUESS) for each in rows])
    assert (scores["rows"], scores["answered"], scores["kv_rows"]) == (5, 4, 3)
    assert scores["kv_median_error"] == pytest.approx(0.1, abs=0.001)
    assert (scores["kv_within_5_percent"], scores["kv_within_15_percent"]) == pytest.approx((1 / 3, 2 / 3), abs=1e-4)
    assert (scores["outcomes"], scores["outcomes_right"]) == (4, 3)
    assert scores["by_gpu"]["H100-80GB"]["rows"] == 4


def test_blocks_and_gib_tell_the_kv_cache_too(read):
    prediction = predict_startup(read({})[0], FIRST_GUESS)
    tokens = prediction.kv_cache_tokens
    by_blocks, by_gib, silent = read(
        {"num_gpu_blocks": tokens / 32, "block_size": 32}, {"kv_cache_gib": prediction.kv_cache_gib / 2}, {}
    )
    assert kv_error(by_blocks, prediction) == pytest.approx(0)
    assert kv_error(by_gib, prediction) == pytest.approx(1)
    assert math.isnan(kv_error(silent, prediction))


# Twice what is usual outside PyTorch, on one kind of card: its own terms follow it, those of the others do not.
def test_terms_follow_what_was_logged(read):
    usual = FIRST_GUESS.context_bytes / BYTES_PER_GIB
    own = [{"id": f"l4-{each}", "gpu": "L4", "gpu_memory_gib": 22.06, "non_torch_gib": 4 * usual} for each in range(6)]
    rest = [{"id": f"h100-{each}", "non_torch_gib": usual} for each in range(6)]
    rows = read(*own, *rest)
    alone = fit_terms(rows[:6])
    assert alone.context_bytes == pytest.approx(4 * FIRST_GUESS.context_bytes, rel=0.2)
    assert fit_terms(rows[6:]).context_bytes == pytest.approx(FIRST_GUESS.context_bytes, rel=0.02)
    left = leave_out(rows, lambda each: each.gpu_kind)
    assert [each.id for each in left] == [each.id for each in rows]
    told = [predict_startup(each, FIRST_GUESS).kv_cache_tokens for each in rows]
    assert left[0].kv_cache_tokens == pytest.approx(told[0], rel=0.01)
    assert left[6].kv_cache_tokens < told[6]


def test_a_table_without_memory_tells_no_terms(read):
    with pytest.raises(InputError, match="startups"):
        fit_terms(read({}, NAMELESS))
