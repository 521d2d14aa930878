"""How a server is started: a shell's line, a file for ``vllm serve --config``, a Kubernetes Deployment."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from lora_capacity.engines.vllm.config import FlagValue, ServerConfig

_ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Lets adapters be loaded while the server runs (``/v1/load_lora_adapter``, in vLLM's documentation of LoRA), where
no ``--lora-modules`` name them at its start."""


def environment(server: ServerConfig) -> dict[str, str]:
    """Return the variables that a server is started with: none without LoRA."""
    return dict(_ENVIRONMENT) if server.enable_lora else {}


FORMS = ("command", "config", "k8s")
"""What `emitted` can return."""

_PORT = 8000
"""Port that ``vllm serve`` listens on by default."""

_START_S, _CHECK_S = 1800, 10
"""Time for a start before Kubernetes gives up, as long as `profile` waits for one, and between two looks."""


def emitted(server: ServerConfig, model: str, form: str, name: str = "") -> str:
    """Return what starts a server in one of `FORMS`.

    Args:
        server: Its settings.
        model: Name, Hugging Face id or path of the model.
        form: ``command``: a line for a shell; ``config``: YAML for ``vllm serve --config FILE``; ``k8s``: YAML of a
            Kubernetes Deployment of the version's own image.
        name: What Kubernetes calls it; by default the model's name.
    """
    if form == "command":
        variables = (f"{name}={value}" for name, value in environment(server).items())
        return " ".join((*variables, server.serve_command(model)))
    document = _config(server, model) if form == "config" else _deployment(server, model, name or model)
    text: str = yaml.safe_dump(document, sort_keys=False, width=120)
    return text.rstrip()


def _config(server: ServerConfig, model: str) -> dict[str, FlagValue]:
    """Flags by name; older vLLM leaves a flag out that is false, so that a switch is turned off by its own flag."""
    document: dict[str, FlagValue] = {"model": model}
    for name, value in server.flags.items():
        flag = name.replace("_", "-")
        document |= {f"no-{flag}": True} if value is False else {flag: value}
    return document


def _deployment(server: ServerConfig, model: str, name: str) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9]+", "-", name.rsplit("/", 1)[-1].lower()).strip("-")
    labels: Mapping[str, str] = {"app": name}
    container = {
        "name": "vllm",
        "image": f"vllm/vllm-openai:v{server.vllm_version.removeprefix('v')}",
        "command": shlex.split(server.serve_command(model)),
        "env": [{"name": variable, "value": value} for variable, value in environment(server).items()],
        "ports": [{"containerPort": _PORT}],
        "startupProbe": {
            "httpGet": {"path": "/health", "port": _PORT},
            "periodSeconds": _CHECK_S,
            "failureThreshold": _START_S // _CHECK_S,
        },
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if server.device == "gpu":
        container["resources"] = {"limits": {"nvidia.com/gpu": server.layout.get("tensor_parallel_size", 1)}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": dict(labels)},
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": {
                    "containers": [container],
                    "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
                },
            },
        },
    }
