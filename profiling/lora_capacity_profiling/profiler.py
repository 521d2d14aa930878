"""Running a campaign: server after server, point after point, each on disk before the next begins."""

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_capacity.engines import VllmBehaviour
from lora_capacity.engines.vllm.metrics import CACHE_CONFIG
from lora_capacity.errors import InputError, LoraCapacityError
from lora_capacity.models import ModelShape
from lora_capacity_profiling.campaign import Campaign
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.folder import Finished, ProfileFolder
from lora_capacity_profiling.machine import Machine
from lora_capacity_profiling.material import write_adapter
from lora_capacity_profiling.measuring import Target, measure, prepare
from lora_capacity_profiling.metrics import Snapshot, metrics_text, parse_prometheus
from lora_capacity_profiling.planning import ServerPlan, estimate_s, plan_servers
from lora_capacity_profiling.points import KvCapacity, Loading, Point, ServingRun
from lora_capacity_profiling.secrets import without_secrets
from lora_capacity_profiling.server import Server
from lora_capacity_profiling.serving import Served

_MOST_STRETCH = 10.0
"""Largest correction of guessed times by what points took so far: a first odd point must not make it days."""

_CPU_BLOCK_TOKENS = 128
"""Tokens of a KV block on CPUs by default (``check_and_update_config`` in ``vllm/platforms/cpu.py``, 0.32.0)."""


class Watcher:
    """Told how a profile goes on; does nothing by itself."""

    def starting(self, plan: ServerPlan, elapsed_s: float, line: str) -> None:
        """A server is starting, for so many seconds; the last line of its log."""

    def started(self, plan: ServerPlan, start_s: float) -> None:
        """A server is up."""

    def stopping(self, plan: ServerPlan, elapsed_s: float, left: int) -> None:
        """A server takes long to end, so many seconds by now; so many of its processes are left."""

    def measuring(self, point: str, left_s: float) -> None:
        """A point is about to be measured; about so many seconds are left, all servers included."""

    def measured(self, finished: Finished) -> None:
        """A point has been measured, or failed."""


@dataclass(frozen=True)
class Launch:
    """How servers are started, or which one is used.

    Attributes:
        model: Name or folder of the model.
        python: Interpreter of the environment with vLLM.
        environment: Variables to add to it.
        timeout_s: Most seconds that a start may take.
        url: Address of a server that runs already, used instead of starting any.
        running: Its ``max_loras``, ``max_lora_rank`` and ``max_cpu_loras``; nothing if it serves no adapters. All its
            adapters are taken to have its ``max_lora_rank``.
    """

    model: str
    python: str | Path
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 1800.0
    url: str | None = None
    running: Mapping[str, int] = field(default_factory=dict)


class Profiler:
    """Profiles one model on one machine.

    Args:
        folder: The profile folder.
        campaign: What to measure.
        shape: The model's layer shapes.
        machine: The machine and its vLLM.
        launch: How servers are started.
        command: The command line, for the record.
        watcher: Told how it goes on.
    """

    def __init__(
        self,
        folder: ProfileFolder,
        campaign: Campaign,
        shape: ModelShape,
        machine: Machine,
        launch: Launch,
        *,
        command: str = "",
        watcher: Watcher | None = None,
    ) -> None:
        self.folder, self.campaign, self.shape, self.machine, self.launch = folder, campaign, shape, machine, launch
        self.command, self.watcher = command, watcher or Watcher()
        self.plans = plan_servers(campaign)
        if launch.url is not None:
            self.plans = [mine for plan in self.plans if (mine := _that_can_run(plan, launch.running)) is not None]
        before = folder.description()
        self._servers: list[dict[str, Any]] = list(before.get("servers", []))
        self._started = str(before.get("started", _now()))
        self._measured_s = float(before.get("measured_s", 0.0))
        self._server_settings: dict[str, Any] = dict(before.get("server", {}))
        self._guessed_s = self._took_s = 0.0
        self._check_same(before)

    def pending(self, plan: ServerPlan) -> list[Point]:
        """Return the points of a server that are still to be measured."""
        return [each for each in plan.points if not isinstance(each, KvCapacity) and not self._done(each.id)]

    def start_pending(self, plan: ServerPlan) -> bool:
        """Whether it is still to be seen what KV cache a server has."""
        return plan.max_loras > 0 and not self._done(_start_id(plan))

    def estimate_s(self) -> float:
        """Return a guess of how long the rest takes, seconds."""
        return sum(map(self.estimate_server_s, self.plans))

    def estimate_server_s(self, plan: ServerPlan) -> float:
        """Return a guess of how long the rest of a server takes, seconds."""
        points = self.pending(plan)
        if not points and not self.start_pending(plan):
            return 0.0
        return estimate_s(self.campaign, points, self.machine.device, starts=self.launch.url is None)

    def run(self) -> None:
        """Measure all points that are not there yet.

        A point that fails is recorded and skipped; if its server died of it, the rest goes on on a new one.

        Raises:
            InputError: If the folder cannot be written, or a launch option cannot be used.
            ServerError: If a server cannot be stopped.
        """
        for plan in self.plans:
            left = self.pending(plan)
            while left or self.start_pending(plan):
                began_s = time.monotonic()
                try:
                    with self._server(plan) as server:
                        left = self._measure_on(server, plan, left)
                except ServerError as error:
                    self._refused(plan, left, error, time.monotonic() - began_s)
                    break
        self.folder.complete(self._description(complete=True))

    def _server(self, plan: ServerPlan) -> Server:
        if self.launch.url is not None:
            return Server.attach(self.launch.url)
        folders = {rank: str(self._adapter(rank)) for rank in plan.adapters}
        flags = {**plan.flags(self.campaign, folders), "served_model_name": self.shape.name}
        return Server.launch(
            self.launch.model,
            flags,
            log=self.folder.path / "logs" / f"{plan.name}.log",
            python=self.launch.python,
            environment={**self.campaign.environment, **self.launch.environment},
            timeout_s=self.launch.timeout_s,
            on_progress=lambda elapsed_s, line: self.watcher.starting(plan, elapsed_s, line),
            on_stop=lambda elapsed_s, left: self.watcher.stopping(plan, elapsed_s, left),
        )

    def _adapter(self, rank: int) -> Path:
        """Return the folder of an adapter of a rank; it is made at its first use."""
        folder = self.folder.path / "adapters" / f"rank{rank}"
        if not (folder / "adapter_config.json").exists():
            write_adapter(folder, self.shape, rank=rank)
        return folder

    def _measure_on(self, server: Server, plan: ServerPlan, left: list[Point]) -> list[Point]:
        """Measure points on a server; returns those that it did not live to see."""
        self.watcher.started(plan, server.start_s)
        target = self._introduce(server, plan)
        if left:
            prepare(target)
        for place, point in enumerate(left):
            name = point.id
            self.watcher.measuring(name, self._left_s(plan, left[place:]))
            began_s = time.monotonic()
            try:
                found = measure(point, target)
            except LoraCapacityError as error:
                self._add(Finished(name, failure=str(error), took_s=time.monotonic() - began_s))
                if not _lives(server):
                    return left[place + 1 :]
            else:
                took_s = time.monotonic() - began_s
                self._guessed_s += self.campaign.estimate_s(point, self.machine.device)
                self._took_s += took_s
                self._add(replace(found, took_s=round(took_s, 2)))
        return []

    def _introduce(self, server: Server, plan: ServerPlan) -> Target:
        """Note what a started server is, and what KV cache it has."""
        text = metrics_text(server.endpoint)
        report = None if server.log is None else server.report()
        kv_cache_tokens = Snapshot.from_text(text).kv_cache_tokens
        if report is not None and report.kv_cache_tokens is not None:
            kv_cache_tokens = float(report.kv_cache_tokens)
        settings = self._settings(server, text)
        self._server_settings = self._server_settings or settings
        if settings != self._server_settings:
            raise InputError("server", settings, f"the settings of the folder's other servers, {self._server_settings}")
        self._servers.append({"name": plan.name, "outcome": "ok", **server.to_json()})
        if plan.max_loras:
            graphs, model = (None, None) if report is None else (report.cuda_graph_gib, report.model_load_gib)
            row = self._start_row(plan, "ok") | {
                "kv_cache_tokens": kv_cache_tokens if kv_cache_tokens == kv_cache_tokens else "",
                "model_load_gib": "" if model is None else model,
                "cuda_graph_gib": "" if graphs is None else graphs,
            }
            self._add(Finished(_start_id(plan), "kv_capacity", row, (), "s", round(server.start_s, 2)))
        limit = self.campaign.server.get("max_model_len")
        names, base_model = plan.adapter_names, self.shape.name
        if self.launch.url is not None:
            names, base_model = {plan.max_lora_rank: server.models[1:]}, server.models[0]
        every = [name for of_rank in names.values() for name in of_rank]
        return Target(
            Served(server.endpoint, every, base_model, self.shape.vocab_size),
            plan,
            names,
            int(settings["max_num_seqs"]),
            int(settings["max_num_batched_tokens"]),
            None if limit is None else int(str(limit)),
            kv_cache_tokens,
            self.machine.gpu.name,
            self.campaign.repeats,
        )

    def _refused(self, plan: ServerPlan, left: list[Point], error: ServerError, took_s: float) -> None:
        """Note a server that did not come up: for want of memory that is a measurement, else a failure."""
        self._servers.append({"name": plan.name, "outcome": error.outcome, "reason": str(error)})
        refused = error.outcome.refused and plan.max_loras > 0
        if refused:
            row = self._start_row(plan, error.outcome)
            self._add(Finished(_start_id(plan), "kv_capacity", row, (), "s", round(took_s, 2)))
        elif self.start_pending(plan):
            self._add(Finished(_start_id(plan), failure=str(error), took_s=round(took_s, 2)))
        for point in left:
            if not self._done(point.id):
                self._add(Finished(point.id, failure=f"its server did not start ({error.outcome}): {error}"))

    def _start_row(self, plan: ServerPlan, status: str) -> dict[str, Any]:
        return {
            "model": self.shape.name,
            "max_loras": plan.max_loras,
            "max_lora_rank": plan.max_lora_rank,
            "status": status,
        }

    def _settings(self, server: Server, metrics: str) -> dict[str, Any]:
        """Return the settings that hold for all servers of a profile, by vLLM's names."""
        behaviour = VllmBehaviour.for_version(server.version or self.machine.vllm_version, self.machine.device)
        flags = self.campaign.server
        told = parse_prometheus(metrics, [CACHE_CONFIG]).get(CACHE_CONFIG, [])
        block = next((labels["block_size"] for labels, _ in told if labels.get("block_size", "").isdigit()), None)
        usual = _CPU_BLOCK_TOKENS if self.machine.device == "cpu" else behaviour.block_size
        settings: dict[str, Any] = {
            "vllm_version": server.version or self.machine.vllm_version,
            "gpu_memory_utilization": flags.get("gpu_memory_utilization", behaviour.gpu_memory_utilization),
            "max_num_seqs": flags["max_num_seqs"],
            "max_num_batched_tokens": flags["max_num_batched_tokens"],
            "max_model_len": flags.get("max_model_len", self.shape.max_position_embeddings),
            "block_size": flags.get("block_size", usual) if block is None else int(block),
        }
        if "kv_cache_memory_bytes" in flags:
            settings["kv_cache_memory_bytes"] = flags["kv_cache_memory_bytes"]
        return settings

    def _description(self, *, complete: bool = False) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "complete": complete,
            "device": self.machine.device,
            "model": self.launch.model,
            "model_shape": self.shape.to_json(),
            "gpu": self.machine.gpu.to_json(),
            "server": self._server_settings,
            "flags": without_secrets(self.campaign.server),
            "environment": without_secrets({**self.campaign.environment, **self.launch.environment}),
            "campaign": {
                "name": self.campaign.name,
                "description": self.campaign.description,
                "repeats": self.campaign.repeats,
            },
            "command": self.command,
            "started": self._started,
            "finished": _now(),
            "measured_s": round(self._measured_s, 1),
            "servers": self._servers,
        }

    def _add(self, finished: Finished) -> None:
        self._measured_s += finished.took_s
        self.folder.add(finished, self._description())
        self.watcher.measured(finished)

    def _done(self, name: str) -> bool:
        return self.folder.is_done(name)

    def _left_s(self, plan: ServerPlan, left: list[Point]) -> float:
        """Return a guess of the time left, corrected by how long points have taken so far."""
        stretch = self._took_s / self._guessed_s if self._guessed_s > 0 else 1.0
        stretch = min(max(stretch, 1.0 / _MOST_STRETCH), _MOST_STRETCH)
        here_s = estimate_s(self.campaign, left, self.machine.device, starts=False)
        later = self.plans[self.plans.index(plan) + 1 :]
        return stretch * (here_s + sum(map(self.estimate_server_s, later)))

    def _check_same(self, before: Mapping[str, Any]) -> None:
        """Refuse to add to a folder of another model, machine or server."""
        now = {
            "model_shape": self.shape.to_json(),
            "gpu": self.machine.gpu.to_json(),
            "device": self.machine.device,
            "flags": without_secrets(self.campaign.server),
        }
        for key, value in now.items():
            if key in before and before[key] != value:
                raise InputError(
                    f"{self.folder.path}: {key}", value, f"what the folder holds, {before[key]}", "choose another -o"
                )


def _that_can_run(plan: ServerPlan, running: Mapping[str, int]) -> ServerPlan | None:
    """Return what of a plan can be measured on a server that runs already; None if it is another server's."""
    if (plan.max_loras, plan.max_lora_rank) != (running.get("max_loras", 0), running.get("max_lora_rank", 0)):
        return None
    same = plan.max_cpu_loras == running.get("max_cpu_loras", plan.max_loras)
    points = tuple(point for point in plan.points if same or not isinstance(point, Loading | ServingRun))
    return replace(plan, points=points)


def _start_id(plan: ServerPlan) -> str:
    return KvCapacity(plan.max_loras, plan.max_lora_rank).id


def _lives(server: Server) -> bool:
    try:
        server.check()
    except ServerError:
        return False
    return True


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
