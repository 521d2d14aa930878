import re
import shlex

import pytest
import yaml

from lora_capacity.engines import FORMS, ServerConfig, emitted, environment, flag_words
from tests.examples import make_calibration

CALIBRATION = make_calibration(vllm_version="0.33.0")
SERVER = CALIBRATION.server(max_loras=4, max_cpu_loras=9, max_lora_rank=32, target_modules="attention")


def words_of(config: dict[str, object]) -> list[str]:
    """What vLLM makes of a configuration file: a flag that is true alone, others with their values."""
    words = ["vllm", "serve", str(config.pop("model"))]
    for name, value in config.items():
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def test_flags_become_words() -> None:
    flags = {"max_loras": 4, "enable_lora": True, "enable_prefix_caching": False, "lora_modules": ["a=x", "b=y"]}
    words = "--max-loras 4 --enable-lora --no-enable-prefix-caching --lora-modules a=x b=y"
    assert flag_words(flags) == words.split()


def test_all_forms_start_the_same_server() -> None:
    command = shlex.split(SERVER.serve_command("org/model"))
    assert shlex.split(emitted(SERVER, "org/model", "command")) == [
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
        *command,
    ]
    assert words_of(yaml.safe_load(emitted(SERVER, "org/model", "config"))) == command
    container = yaml.safe_load(emitted(SERVER, "org/model", "k8s"))["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == command
    assert {each["name"]: each["value"] for each in container["env"]} == environment(SERVER)
    assert container["image"].endswith(":v0.33.0")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}


@pytest.mark.parametrize(
    "name",
    ["max_loras", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "max_model_len", "block_size"],
)
def test_flags_are_told_whether_or_not_they_are_defaults(name: str) -> None:
    server = ServerConfig.with_defaults(CALIBRATION.behaviour, CALIBRATION.gpu, CALIBRATION.model)
    for form in FORMS:
        assert name.replace("_", "-") in emitted(server, "m", form)


def test_a_server_without_lora_is_started_without_its_flags() -> None:
    server = CALIBRATION.server(max_loras=0)
    assert not server.enable_lora
    assert not re.search("lora", server.serve_command("m") + emitted(server, "m", "command"), re.IGNORECASE)
    assert shlex.split(emitted(server, "m", "command"))[:3] == ["vllm", "serve", "m"]


def test_a_deployment_is_named_as_kubernetes_allows_and_takes_no_gpu_for_a_cpu() -> None:
    cpu = make_calibration(vllm_version="0.33.0", device="cpu")
    document = yaml.safe_load(emitted(cpu.server(), "Org/Some_Model.v2-", "k8s"))
    assert document["metadata"]["name"] == "some-model-v2"
    assert "resources" not in document["spec"]["template"]["spec"]["containers"][0]
