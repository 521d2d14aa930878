"""Servers of given settings, with as many random adapters as a workload asks for."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lora_capacity.engines import FlagValue, ServerConfig
from lora_capacity.errors import InputError
from lora_capacity.models import ModelShape
from lora_capacity.reading import read_json
from lora_capacity.workload import Workload
from lora_capacity_profiling.material import write_adapter
from lora_capacity_profiling.secrets import SECRET
from lora_capacity_profiling.server import OnStop, Progress, Server, offline_variables

SERVER_COLUMNS = (
    "max_loras",
    "max_cpu_loras",
    "max_lora_rank",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
)
"""Settings by which the runs of a server are told."""

_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization", "block_size")
_SHAPE = ("num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class Deployment:
    """What servers of one model are started with.

    Attributes:
        model: Folder or name of the model.
        shape: Its layer shapes, which adapters are made for, and its name.
        folder: Where logs and adapters are written.
        python: Interpreter of the environment that has vLLM.
        flags: Further flags by vLLM's names.
        environment: Variables to add to this process's own.
        port: Port to listen on; by default a free one.
        timeout_s: Most seconds that a start may take.

    Raises:
        InputError: If the model's folder holds a model of other shapes.
    """

    model: str
    shape: ModelShape
    folder: Path
    python: str = sys.executable
    flags: Mapping[str, FlagValue] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if not Path(self.model).is_dir():
            return
        found = ModelShape.from_file(Path(self.model))
        for name in _SHAPE:
            has, expected = getattr(found, name), getattr(self.shape, name)
            if has != expected:
                allowed = f"a model with a {name} of {expected}, as {self.shape.name} has"
                raise InputError(f"model {self.model}, {name}", has, allowed, "give the model's own calibration")

    def start(
        self,
        config: ServerConfig,
        workload: Workload,
        on_progress: Progress | None = None,
        on_stop: OnStop | None = None,
    ) -> Server:
        """Start a server that serves the workload's first ``max_cpu_loras`` adapters.

        Args:
            config: Its settings.
            workload: Whose adapters it serves, by rank; their weights are random.
            on_progress: Told how the start goes.
            on_stop: Told how its end goes, where that takes long.

        Raises:
            InputError: If something given cannot be used.
            ServerError: If the server does not come up; ``outcome`` tells why.
        """
        names = adapter_names(workload, config.max_cpu_loras)
        _, ranks = workload.adapters.deal(config.max_cpu_loras)
        folders = {rank: self._adapter(rank, config) for rank in sorted(set(ranks.tolist()))}
        flags: dict[str, FlagValue] = {"served_model_name": self.shape.name} | config.flags
        flags |= self.flags
        flags["lora_modules"] = [f"{name}={folders[rank]}" for name, rank in zip(names, ranks.tolist(), strict=True)]
        return Server.launch(
            self.model,
            flags,
            log=self.folder / f"server-{config.max_cpu_loras}-{config.max_loras}.log",
            python=self.python,
            environment={**offline_variables(self.model), **self.environment},
            port=self.port,
            timeout_s=self.timeout_s,
            on_progress=on_progress,
            on_stop=on_stop,
        )

    def _adapter(self, rank: int, config: ServerConfig) -> Path:
        folder = self.folder.resolve() / "adapters" / f"rank-{rank}"
        return write_adapter(folder, self.shape, rank=rank, target_modules=config.target_modules, seed=rank)


@dataclass(frozen=True)
class Profiled:
    """How the servers of a profile were started, as its ``profile.json`` tells.

    Attributes:
        model: Folder or name of the model.
        settings: Settings of `ServerConfig` that were given, by vLLM's names.
        flags: Other flags.
        environment: Variables that were added; secrets are not recorded.
    """

    model: str
    settings: Mapping[str, Any]
    flags: Mapping[str, FlagValue]
    environment: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from a profile folder.

        Raises:
            InputError: If there is no such folder, or its ``profile.json`` does not tell.
        """
        path = folder / "profile.json"
        content = read_json(path, "the profile.json of a profile folder")
        try:
            model = str(content["model"])
            flags = {name: value for name, value in dict(content["flags"]).items() if value != SECRET}
            environment = dict(content["servers"][0]["environment"]) if content["servers"] else {}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(str(path), repr(error), "a profile.json as `profile` writes it") from None
        settings = {name: flags.pop(name) for name in _SETTINGS if name in flags}
        known = {name: value for name, value in environment.items() if value != SECRET}
        return cls(model, settings, flags, known)


def adapter_names(workload: Workload, count: int) -> tuple[str, ...]:
    """Return the names of a workload's first adapters: those of its list, else ``a0``, ``a1``, ...

    Args:
        workload: The workload.
        count: How many.
    """
    names: Sequence[str] = getattr(workload.adapters, "names", ())
    return tuple(names[:count]) if names else tuple(f"a{index}" for index in range(count))


def served_names(server: Server, workload: Workload, count: int) -> tuple[str, ...]:
    """Return a running server's names of a workload's first adapters.

    Where the workload names its adapters, and the server serves all those names, it is those; else the server's
    adapters in its own order.

    Args:
        server: The server.
        workload: The workload.
        count: How many.

    Raises:
        InputError: If the server serves fewer adapters.
    """
    names = adapter_names(workload, count)
    if set(names) <= set(server.adapters):
        return names
    if len(server.adapters) < count:
        has = f"1 to {len(server.adapters)}, the adapters that {server.url} serves"
        raise InputError("adapters", count, has, "start the server with more --lora-modules")
    return server.adapters[:count]
