import json
from dataclasses import replace

import numpy as np
import pytest

from lora_capacity.calibration import bundled_names, load_calibration
from lora_capacity.engines import VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.hardware import Gpu, find_gpu
from lora_capacity.memory import Deployment, EstimatedTerms, plan_memory
from lora_capacity.models import ModelShape
from lora_capacity.units import BYTES_PER_GIB

TERMS = EstimatedTerms.bundled()
H100 = find_gpu("H100").gpu
QWEN3_14B = ModelShape("qwen3-14b", 40, 5120, 17408, 40, 8, 128, 151936, False, False, 40960, "Qwen3ForCausalLM")
SETTINGS = {
    "max_loras": 0,
    "max_lora_rank": 16,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.9,
    "max_model_len": 8192,
}


def plan(version="0.19.0", gpu=H100, model=QWEN3_14B, quantile=0.5, **changes):
    deployment = Deployment(**{name: changes.pop(name) for name in tuple(changes) if name in vars(Deployment())})
    settings = SETTINGS | changes
    behaviour = VllmBehaviour.for_version(version)
    return plan_memory(model, gpu, TERMS, behaviour=behaviour, deployment=deployment, quantile=quantile, **settings)


# The calibrations' memory is fitted to hundreds of starts of one H100, within 0.2 %; the terms to none of these.
@pytest.mark.parametrize("name", bundled_names())
def test_estimates_come_near_what_is_fitted_to_one_machine(name):
    calibration = load_calibration(name)
    slots, rank = np.array([1, 8, 64, 128, 8]), np.array([8, 16, 16, 32, 64])
    settings = SETTINGS | {
        "max_loras": slots,
        "max_lora_rank": rank,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
    }
    fitted, estimated = (
        plan_memory(calibration.model, calibration.gpu, terms, behaviour=calibration.behaviour, **settings)
        for terms in (calibration.memory, TERMS)
    )
    np.testing.assert_allclose(estimated.kv_cache_tokens, fitted.kv_cache_tokens, rtol=0.03)


# Logged of this model on this GPU with 1,024 requests and 8,192 tokens a step: 5.64 GiB up to 0.16, 2.23 from 0.17.
@pytest.mark.parametrize(("version", "gib"), [("0.15.0", 5.64), ("0.16.0", 5.64), ("0.17.0", 2.23), ("0.18.0", 2.23)])
def test_activations_shrink_where_logits_are_not_sorted_any_more(version, gib):
    assert plan(version).activation_bytes / BYTES_PER_GIB == pytest.approx(gib, rel=0.05)


def test_a_lower_and_a_higher_quantile_enclose_what_is_expected():
    tight, expected, roomy = (plan(quantile=quantile).kv_cache_tokens for quantile in (0.95, 0.5, 0.05))
    assert tight < expected < roomy
    tighter, roomier = (plan(quantile=quantile).kv_cache_tokens for quantile in (0.99, 0.01))
    assert tighter < tight
    assert roomy < roomier


def test_graphs_are_captured_by_adapters_and_counted_by_version():
    def graphs(version="0.20.0", **changes):
        return plan(version, **changes).cuda_graph_bytes.item()

    one = graphs()
    assert graphs(enforce_eager=True) == 0
    assert [graphs("0.8.5", max_loras=4), graphs(max_loras=4)] == pytest.approx([one, 2 * one])
    # Batches of up to 512 tokens are captured, or of twice as many as there are requests.
    assert [graphs(max_num_seqs=256), graphs(max_num_seqs=64)] == pytest.approx([one, one / 4])
    # With none, 1, 2, 4 and more than 4 active adapters.
    assert graphs(max_loras=4, specialize_active_lora=True) == pytest.approx(5 * one)
    assert graphs(max_loras=1, specialize_active_lora=True) == pytest.approx(3 * one)
    counted = plan("0.19.1").kv_cache_bytes - plan("0.20.0").kv_cache_bytes
    assert counted.item() == pytest.approx(one)


def test_gpus_that_share_a_layer_keep_buffers_for_it_more_over_nvlink():
    alone, nvlink = plan().other_bytes, plan(tensor_parallel_size=2).other_bytes
    pcie = plan(gpu=Gpu("L40S", H100.memory_bytes), tensor_parallel_size=2).other_bytes
    assert alone < pcie < nvlink
    assert (nvlink - alone).item() == TERMS.linked_collective_bytes


def test_a_stage_without_the_head_does_not_sample():
    first = replace(QWEN3_14B, vocab_size=1)  # whose logits take nothing
    last = plan(pipeline_parallel_size=2, max_num_batched_tokens=1024)
    assert (
        last.activation_bytes
        > plan(model=first, pipeline_parallel_size=2, max_num_batched_tokens=1024).activation_bytes
    )


def test_terms_are_read_as_they_were_written(tmp_path):
    TERMS.save(tmp_path / "terms.json")
    assert EstimatedTerms.from_file(tmp_path / "terms.json") == TERMS


@pytest.mark.parametrize(
    ("content", "words"),
    [([], "a JSON object"), ({"context": 1}, "context"), (TERMS.to_json() | {"logit_bytes": -1}, "logit_bytes: -1")],
)
def test_a_file_of_other_content_is_told(tmp_path, content, words):
    (tmp_path / "terms.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        EstimatedTerms.from_file(tmp_path / "terms.json")
    assert words in str(error.value)
