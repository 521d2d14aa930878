"""``lora-capacity memory``: its answers against logged starts and sizes worked out by hand, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run

GIB = 2**30
CARD = ("--gpu-memory-gib", "79.19")


def ask(run: Run, *words: object) -> dict:
    result = run("memory", *words, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_the_answer_has_every_part_and_adds_up(run: Run) -> None:
    found = ask(run, "--model", "Qwen3-8B", "--gpu", "L40S", "--max-loras", 4, "--max-model-len", 4096)
    assert found["status"] == "ok"
    assert found["reason"] is None
    parts = found["per_gpu"]
    assert set(parts) == {
        *("weights_bytes", "slot_bytes", "slots_bytes", "activation_bytes"),
        *("cuda_graph_bytes", "other_bytes", "kv_cache_bytes"),
    }
    spent = sum(size for name, size in parts.items() if name != "slot_bytes")
    assert spent == pytest.approx(found["settings"]["gpu_memory_utilization"] * found["gpu_memory_bytes"], rel=1e-9)
    # Logged by vLLM: 15.27 GiB and 147,456 bytes a token (36 layers of 8 heads of 128).
    assert parts["weights_bytes"] == pytest.approx(15.27 * GIB, rel=0.005)
    assert found["kv_bytes_per_token"] == 2 * 36 * 8 * 128 * 2
    for name in ("kv_cache_tokens", "kv_cache_requests", "most_max_loras"):
        assert found[name]["low"] < found[name]["expected"] < found[name]["high"]


def test_most_slots_start_and_one_more_does_not(run: Run) -> None:
    base = ("--model", "Qwen3-8B", "--gpu", "L40S", "--max-model-len", 4096)
    most = ask(run, *base)["most_max_loras"]["expected"]
    assert ask(run, *base, "--max-loras", most)["status"] == "ok"
    assert ask(run, *base, "--max-loras", most + 1)["status"] == "no_kv_cache"


def test_remedies_do_what_they_say(run: Run) -> None:
    base = ("--model", "Qwen3-8B", "--gpu-memory-gib", 22.06, "--max-loras", 8, "--max-lora-rank", 64)
    before = ask(run, *base)
    assert before["status"] == "no_kv_cache"
    assert "too little per GPU" in before["reason"]
    tried = {each["flag"]: each for each in before["remedies"]}
    assert [each["starts"] for each in before["remedies"]] == sorted(
        (e["starts"] for e in before["remedies"]), reverse=True
    )
    for flag in ("--max-model-len", "--max-loras", "--kv-cache-dtype", "--lora-target-modules"):
        value = tried[flag]["value"]
        after = ask(run, *base, flag, ",".join(value) if isinstance(value, list) else value)
        assert (after["status"] == "ok") == tried[flag]["starts"]
        assert after["kv_cache_tokens"]["expected"] == tried[flag]["kv_cache_tokens"]


def test_tensor_parallel_llama_70b_as_logged(run: Run) -> None:
    found = ask(
        run, "--model", "Meta-Llama-3-70B", "--gpu", "A100-80GB", "--tensor-parallel-size", 4, "--no-enable-lora"
    )
    # Logged on four GPUs: 32.95 GiB each, and 81,924 bytes a token.
    assert found["per_gpu"]["weights_bytes"] == pytest.approx(32.95 * GIB, rel=0.005)
    assert found["kv_bytes_per_token"] == 81_920
    assert found["per_gpu"]["slot_bytes"] == 0


def test_experts_of_one_slot(run: Run) -> None:
    found = ask(run, "--model", "Qwen3-30B-A3B", "--gpu", "H200", "--max-lora-rank", 16, "--vllm-version", "0.14.0")
    hidden, inner, experts, layers = 2048, 768, 128, 48
    of_experts = 16 * 2 * layers * experts * (2 * hidden + 2 * inner + inner + hidden)
    assert of_experts / GIB == pytest.approx(1.547, abs=0.001)
    assert of_experts < found["per_gpu"]["slot_bytes"] < 1.05 * of_experts
    older = ask(run, "--model", "Qwen3-30B-A3B", "--gpu", "H200", "--max-lora-rank", 16, "--vllm-version", "0.10.0")
    assert older["per_gpu"]["slot_bytes"] < of_experts / 10


def test_host_memory_of_many_adapters(run: Run) -> None:
    many = ("--max-loras", 8, "--max-cpu-loras", 4096, "--max-lora-rank", 32)
    found = ask(run, "--model", "Llama-3.1-8B-Instruct", "--gpu", "H100", *many)
    assert found["host_bytes"] == 640 * GIB
    assert "640.00 GiB for 4,096 adapters" in run("memory", "--model", "Llama-3.1-8B", "--gpu", "H100", *many).output


def test_host_memory_bounds_the_adapters_that_it_holds(run: Run) -> None:
    """Of rank 32 each takes 160 MiB for an 8B model, as in the test before."""
    server = ("--model", "Llama-3.1-8B-Instruct", *CARD, "--max-loras", 4, "--max-lora-rank", 32)
    for gib, most in {10: 64, 64: 409}.items():
        assert ask(run, *server, "--host-memory-gib", gib)["most_max_cpu_loras"] == most
    assert "most_max_cpu_loras" not in ask(run, *server)
    told = run("memory", *server, "--max-cpu-loras", 4096, "--host-memory-gib", 10).stdout
    assert "host memory is too small for max_cpu_loras 4,096" in " ".join(told.split())
    for words in (("--host-memory-gib", 0), ("--max-loras", 0, "--host-memory-gib", 10)):
        result = run("memory", "--model", "Llama-3.1-8B-Instruct", *CARD, *words)
        assert result.exit_code == 2
        assert "--host-memory-gib" in result.stderr


def test_a_serve_line_is_read_as_people_have_it(run: Run, tmp_path: Path) -> None:
    line = (
        "VLLM_USE_V1=1 vllm serve Qwen/Qwen3-32B -tp 2 --enable-lora --max-loras=8 --max-lora-rank 32 "
        "--max-model-len 16K --enforce-eager --lora-target-modules q_proj v_proj --port 8000 --no-enable-prefix-caching"
    )
    found = ask(run, "--gpu", "A100-80GB", "--serve-line", line)
    settings = found["settings"]
    expected = {"tensor_parallel_size": 2, "max_loras": 8, "max_lora_rank": 32, "max_model_len": 16384}
    assert {name: settings[name] for name in expected} == expected
    assert settings["enforce_eager"] is settings["enable_lora"] is True
    assert found["not_looked_at"] == ["--port"]
    (tmp_path / "vllm.yaml").write_text(
        "model: Qwen/Qwen3-32B\ntensor-parallel-size: 2\nenable_lora: true\nmax-loras: 8\nmax_lora_rank: 32\n"
        "max-model-len: 16K\nenforce-eager: true\nlora-target-modules: [q_proj, v_proj]\n"
    )
    from_file = ask(run, "--gpu", "A100-80GB", "--config", "vllm.yaml")
    assert from_file["per_gpu"] == found["per_gpu"]
    assert ask(run, "--gpu", "A100-80GB", "--serve-line", line, "--max-loras", 2)["settings"]["max_loras"] == 2
    assert ask(run, "--gpu", "H200", "--serve-line", "vllm serve Qwen/Qwen3-8B")["settings"]["enable_lora"] is False


def test_an_adapter_tells_rank_and_modules(run: Run, tmp_path: Path) -> None:
    adapter = {"r": 12, "target_modules": ["q_proj", "v_proj"], "bias": "none", "modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    found = ask(run, "--model", "Llama-3.1-8B-Instruct", *CARD, "--adapter", ".")
    assert found["settings"]["max_lora_rank"] == 16
    # A of 4,096 for q and for v, and their 4,096 + 1,024 outputs.
    assert found["host_bytes_per_adapter"] == 32 * 16 * 2 * (2 * 4096 + 4096 + 1024)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] is not allowed"),
        ({"use_dora": True}, "vLLM does not load DoRA"),
        ({"bias": "all"}, "biases of the base model"),
        ({"r": 1024}, "at most 512, the largest max_lora_rank"),
        ({"r": "many"}, "r: 'many'"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'?"),
    ],
)
def test_adapters_that_vllm_refuses_are_told(run: Run, tmp_path: Path, change: dict, words: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "target_modules": ["q_proj"]} | change))
    result = run("memory", "--model", "Llama-3.1-8B", *CARD, "--adapter", ".")
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "Qwen3-8B"), "--gpu: missing"),
        (("--model", "Qwen3-8B", "--gpu", "RTX 409"), "RTX 4090"),
        (("--model", "Qwen9-8B", "--gpu", "L4"), "model: 'Qwen9-8B' is not allowed"),
        (("--gpu", "L4"), "--model: missing"),
        (("--model", "Qwen3-8B", "--gpu", "L4", "--tensor-parallel-size", "3"), "a divisor of the 32 attention heads"),
        (("--model", "Qwen3-8B", "--gpu", "L4", "--pipeline-parallel-size", "40"), "at most the 36 layers"),
        (("--model", "Qwen3-8B", "--gpu", "L4", "--max-lora-rank", "24"), "max_lora_rank: 24"),
        (("--model", "Qwen3-8B", "--gpu", "L4", "--quantization", "awk"), "did you mean 'awq'?"),
        (("--model", "gpt-oss-20b", "--gpu", "L4", "--quantization", "fp8"), "mxfp4, as the checkpoint's weights"),
        (("--model", "Qwen3-8B", "--gpu", "L4", "--kv-cache-dtype", "int4"), "kv_cache_dtype: 'int4'"),
        (("--model", "Qwen3-8B", "--gpu", "L4", "--max-loras", "4", "--no-enable-lora"), "--enable-lora"),
        (
            ("--model", "Qwen3-8B", "--gpu", "L4", "--vllm-version", "0.10.0", "--lora-target-modules", "q_proj"),
            "no such",
        ),
        (("--gpu", "L4", "--serve-line", "vllm serve m --max-loras few"), "--max-loras: 'few'"),
        (("--gpu", "L4", "--serve-line", "vllm serve --port 1"), "no model"),
        (("--gpu", "L4", "--serve-line", "vllm serve m --enable-expert-parallel"), "not modelled"),
        (("--gpu", "L4", "--serve-line", "vllm serve 'm"), "a shell's command"),
    ],
)
def test_bad_input_is_told_in_one_line(run: Run, words: tuple[str, ...], told: str) -> None:
    result = run("memory", *words)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert told in result.output


def test_no_jax_is_loaded() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from lora_capacity_cli.main import main\n"
        "assert CliRunner().invoke(main, 'memory --model Qwen3-8B --gpu L4 --format json'.split()).exit_code == 0\n"
        "assert not {'jax', 'flax', 'scipy', 'pyarrow'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
