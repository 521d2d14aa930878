"""The dated rules against the sources of vLLM's releases, which are parsed and never run."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_capacity.engines import VllmBehaviour
from lora_capacity.hardware import Gpu
from lora_capacity.units import BYTES_PER_GIB

pytestmark = pytest.mark.vllm

GIVEN_PYTHON = os.environ.get("LORA_CAPACITY_VLLM_PYTHON")
ENVIRONMENT = Path(GIVEN_PYTHON).parents[1] if GIVEN_PYTHON else Path(__file__).parents[2] / ".venv-vllm"
LEAST_VERSIONS = 8
GPUS = [
    Gpu("NVIDIA L4", 22 * BYTES_PER_GIB),
    Gpu("NVIDIA A100-SXM4-80GB", 79 * BYTES_PER_GIB),
    Gpu("NVIDIA H100 80GB HBM3", 79 * BYTES_PER_GIB),
    Gpu("NVIDIA GB10", 120 * BYTES_PER_GIB),
    Gpu("NVIDIA B200", 178 * BYTES_PER_GIB),
]


def sources() -> dict[str, Path]:
    """Return the folders of the package by version: those beside the environment's own, and that one."""
    beside = {folder.name.removeprefix("vllm-"): folder / "vllm" for folder in ENVIRONMENT.glob("vllm-*")}
    own = {
        re.sub(r".*vllm(?:_cpu)?-([\d.]+)(\.post\d+)?\.dist-info", r"\1", str(told)): told.parent / "vllm"
        for told in ENVIRONMENT.glob("lib/python*/site-packages/vllm*-*.dist-info")
    }
    return own | beside


VERSIONS = sources()


def test_there_are_enough_versions() -> None:
    if not VERSIONS:
        pytest.skip(f"no vLLM in {ENVIRONMENT}: run tests/vllm/make_environment.sh, or set LORA_CAPACITY_VLLM_PYTHON")
    assert len(VERSIONS) >= LEAST_VERSIONS, sorted(VERSIONS)


def release(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.fixture(params=sorted(VERSIONS, key=release))
def version(request: pytest.FixtureRequest) -> str:
    told: str = request.param
    return told


def config_text(version: str) -> str:
    """Return the settings' classes: one module in older versions, a folder in newer ones."""
    folder = VERSIONS[version]
    files = [folder / "config.py"] if (folder / "config.py").exists() else sorted((folder / "config").glob("*.py"))
    return "\n".join(file.read_text("utf-8") for file in files)


def test_defaults_and_flags(version: str) -> None:
    behaviour, text = VllmBehaviour.for_version(version), config_text(version)
    share = re.search(r"gpu_memory_utilization: float = (?:Field\(\s*default=)?([\d.]+)", text)
    assert share is not None
    assert behaviour.gpu_memory_utilization == float(share[1])
    ranks = re.search(r"(?:possible_max_ranks = |MaxLoRARanks = Literal)([(\[][\d, ]+[)\]])", text)
    assert ranks is not None
    assert behaviour.max_lora_ranks == tuple(ast.literal_eval(ranks[1]))
    assert bool(behaviour.lora_extra_vocab_tokens) == bool(re.search(r"lora_extra_vocab_size: ", text))
    assert behaviour.specializes_active_lora == ("specialize_active_lora: bool" in text)
    assert behaviour.restricts_target_modules == bool(re.search(r"^    target_modules: ", text, re.MULTILINE))
    assert behaviour.has_watermark == bool(re.search(r"^    watermark: float", text, re.MULTILINE))
    assert behaviour.has_active_limit == ("max_num_active_seqs: int" in text)
    assert behaviour.lora_graph_captures == (2 if "cudagraph_specialize_lora: bool = True" in text else 1)


def test_specialized_kernels_are_launched_over_the_counts_that_graphs_are_captured_for(version: str) -> None:
    folder = VERSIONS[version] / "lora"
    counts = (folder / "utils.py").read_text("utf-8")
    told = "(n & (n - 1)) == 0 or n == max_loras + 1" in counts and "range(1, max_loras + 2)" in counts
    assert VllmBehaviour.for_version(version).specializes_active_lora == told
    for kernel in ("expand", "shrink") if told else ():
        grid = (folder / "ops" / "triton_ops" / f"lora_{kernel}_op.py").read_text("utf-8")
        assert re.search(r"grid = \([^=]*?NUM_SLICES,\s+num_active_loras", grid), kernel


def test_memory_rules(version: str) -> None:
    behaviour, folder = VllmBehaviour.for_version(version), VERSIONS[version]
    estimate = re.search(r'ESTIMATE_CUDAGRAPHS", "(\d)"', (folder / "envs.py").read_text("utf-8"))
    assert behaviour.counts_cuda_graphs == (estimate is not None and estimate[1] == "1")
    kv_cache = "\n".join(file.read_text("utf-8") for file in (folder / "v1" / "core").glob("kv_cache_*.py"))
    assert behaviour.hybrid_kv_cache == ("disable_hybrid_kv_cache_manager" in kv_cache)
    assert behaviour.logs_kv_tokens_as_concurrency == ("max_concurrency * max_model_len" in kv_cache)
    assert behaviour.keeps_expert_workspace == (folder / "v1" / "worker" / "workspace.py").exists()
    has_kernel = (folder / "v1" / "sample" / "ops" / "topk_topp_triton.py").exists()
    # Older images bring a FlashInfer that their sampler takes; from 0.9 on it asks for another.
    assert behaviour.samples_by_sorting == (not has_kernel and not version.startswith("0.8."))
    queue = (folder / "v1" / "core" / "block_pool.py").read_text("utf-8")
    assert behaviour.scheduler.uncached_blocks_first == ("prepend_n(blocks" in queue)
    lora = "\n".join(file.read_text("utf-8") for file in (folder / "lora").rglob("*.py"))
    assert behaviour.adapts_experts == ("class FusedMoEWithLoRA" in lora)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_batch_limits(version: str, gpu: Gpu) -> None:
    budget = VllmBehaviour.for_version(version).batch_budget(gpu)
    limits = (budget.max_num_batched_tokens, budget.max_num_seqs)
    assert limits == told_limits(VERSIONS[version] / "engine" / "arg_utils.py", gpu)


def told_limits(file: Path, gpu: Gpu) -> tuple[int, int]:
    """Return the limits of a server that the branches on the GPU's memory and name in vLLM's source choose."""
    tree = ast.parse(file.read_text("utf-8"))
    branch = next(node for node in ast.walk(tree) if isinstance(node, ast.If) and "device_memory" in names(node.test))
    told = {
        "device_memory": gpu.memory_bytes,
        "GiB_bytes": BYTES_PER_GIB,
        "device_name": gpu.name.lower(),
        "is_gb10": "gb10" in gpu.name.lower(),
    }
    body: list[ast.stmt] = [branch]
    while len(body) == 1 and isinstance(body[0], ast.If):
        condition = body[0]
        holds = eval(compile(ast.Expression(condition.test), str(file), "eval"), {}, told)
        body = condition.body if holds else condition.orelse
    found = dict(assigned(body))
    return found["default_max_num_batched_tokens"], found["default_max_num_seqs"]


def names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def assigned(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Yield what is assigned, that of an OpenAI-compatible server where it depends on the usage."""
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            if isinstance(value, ast.Dict):
                usages = zip(value.keys, value.values, strict=True)
                value = next(each for usage, each in usages if usage and "OPENAI_API_SERVER" in ast.unparse(usage))
            yield node.targets[0].id, ast.literal_eval(value)


def test_batch_limits_of_a_cpu(version: str) -> None:
    budget = VllmBehaviour.for_version(version, "cpu").batch_budget(Gpu("cpu", 16 * BYTES_PER_GIB))
    tree = ast.parse((VERSIONS[version] / "engine" / "arg_utils.py").read_text("utf-8"))
    on_cpu = (
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("is_cpu()")
    )
    told = [re.findall(r"OPENAI_API_SERVER: (\d+)", ast.unparse(node)) for node in on_cpu]
    limits = next((list(map(int, each)) for each in told if each), [2048, 256])
    assert [budget.max_num_batched_tokens, budget.max_num_seqs] == limits


def test_embeddings(version: str) -> None:
    models = VERSIONS[version] / "model_executor" / "models"
    classes = model_classes(models)
    registered = re.findall(r'"(\w+)": *\(\s*"\w+",\s*"(\w+)"', (models / "registry.py").read_text("utf-8"))
    told = {
        architecture
        for architecture, name in registered
        if inherits(classes, name, "SupportsLoRA") and "lm_head" in embedding_modules(classes, name)
    }
    ours = set(VllmBehaviour.for_version(version).embedding_architectures)
    assert ours <= told
    # What is left out: drafts of speculative decoding, encoders, and models that few serve.
    everyday = re.compile(
        r"(Llama|Mistral|Mixtral|Qwen\w*|Gemma\w*|Phi\w*|Granite|GraniteMoe|Olmo\w*|InternLM\w*|Falcon|GPTBigCode"
        r"|Starcoder\w*|SmolLM\w*|Nemotron|Exaone4?|Glm\w*|DeepSeek\w*|Deepseek\w*|GptOss|SeedOss|MiniMax\w*)ForCausalLM"
    )
    assert {name for name in told if everyday.fullmatch(name)} <= ours
    release = tuple(map(int, version.split(".")[:2]))
    on_transformers = set(re.findall(r'"(\w+)": *\(\s*"transformers"', (models / "registry.py").read_text("utf-8")))
    headless = set(VllmBehaviour.for_version(version).headless_embedding_architectures)
    if release >= (0, 12):
        assert headless == {name for name in on_transformers if everyday.fullmatch(name)}


Class = tuple[list[str], dict[str, str] | None]


def model_classes(folder: Path) -> dict[str, Class]:
    """Return the classes of vLLM's models with their bases and what they say of embeddings themselves."""
    found: dict[str, Class] = {}
    for file in sorted(folder.glob("*.py")):
        parts = re.split(r"^class (\w+)(?:\(([^)]*)\))?:", file.read_text("utf-8"), flags=re.MULTILINE)
        for name, bases, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            own = re.search(r"^    embedding_modules[^=\n]*= (\{[^}]*\})", body, re.MULTILINE)
            parents = [base.split("[")[0].split(".")[-1].strip() for base in (bases or "").split(",")]
            # Of two classes of one name, as those of Mixtral in its own file and in mixtral_quant, the first counts.
            found.setdefault(name, (parents, ast.literal_eval(own[1]) if own else None))
    return found


def inherits(classes: dict[str, Class], name: str, base: str) -> bool:
    return name == base or any(
        inherits(classes, each, base) for each in classes.get(name, ([], None))[0] if each != name
    )


def embedding_modules(classes: dict[str, Class], name: str) -> dict[str, str]:
    bases, own = classes.get(name, ([], None))
    if own is not None:
        return own
    return next(filter(None, (embedding_modules(classes, base) for base in bases if base != name)), {})
