"""Configurations tried on a real server: started or found, warmed up, sent a workload, measured, saved."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_capacity.engines import ServerConfig
from lora_capacity.errors import check_number
from lora_capacity.workload import Workload
from lora_capacity_profiling.deployment import SERVER_COLUMNS, Deployment, served_names
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.load import Progress as LoadProgress
from lora_capacity_profiling.runs import append_runs, run_row
from lora_capacity_profiling.server import Server
from lora_capacity_profiling.serving import Served, Serving, rehearse, serve_workload, traffic_columns, warm_up

Tell = Callable[[str, float, float | None], None]
"""Told the stage, the seconds spent in it, and how many it takes; None where nobody knows."""

_BUSY_CLIENT = 0.7
"""Of one core: beyond it, tokens wait for the client, which is then in part what it measures."""

_LATE_S, _LATE_SHARE = 0.05, 0.01
"""Requests sent later than a few steps of a server, and their share from which a 99th percentile shows it."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What became of one configuration.

    Attributes:
        status: ``ok``, or why the server refused to start: ``no_kv_cache`` or ``oom``.
        serving: The run; None where the server did not start.
        version: vLLM's version; empty likewise.
        warnings: What makes the measurement doubtful, in sentences.
    """

    status: str
    serving: Serving | None = None
    version: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """How configurations are tried.

    Attributes:
        workload: The traffic; its horizon is how long is measured.
        site: What servers are started with, or the address of one that runs.
        about: Columns of the runs' rows that neither workload nor settings tell: ``set``, ``scenario``, ``model``,
            ``gpu``.
        table: Where rows are added.
        warm_up_s: Seconds of other traffic of the kind before the run, >= 0.
        seed: Seed of the requests measured.
        vocab_size: Prompts hold token numbers below it.
    """

    workload: Workload
    site: Deployment | str
    about: Mapping[str, object]
    table: Path
    warm_up_s: float = 10.0
    seed: int = 0
    vocab_size: int = 1000

    def __post_init__(self) -> None:
        check_number("warm_up_s", self.warm_up_s, minimum=0)

    def measure(self, config: ServerConfig, tell: Tell) -> Measured:
        """Try a configuration and add its row to the table.

        Args:
            config: Settings of the server, which is started with them, or has them already.
            tell: Told what is going on.

        Raises:
            InputError: If something given cannot be used, or the table cannot be written any more.
            ServerError: If the server fails in another way than by want of memory as it starts.
        """
        try:
            server = self._server(config, tell)
        except ServerError as error:
            if not error.outcome.refused:
                raise
            columns = traffic_columns(self.workload, config.max_cpu_loras)
            row = run_row({**columns, **self._about(config), "status": error.outcome}, {})
            append_runs(self.table, [row])
            return Measured(error.outcome, warnings=(str(error),))
        with server:
            names = served_names(server, self.workload, config.max_cpu_loras)
            serving = self._run(server, names, tell)
            append_runs(self.table, [serving.row(self._about(config))])
        return Measured("ok", serving, server.version, doubts(serving))

    def _server(self, config: ServerConfig, tell: Tell) -> Server:
        if isinstance(self.site, str):
            return Server.attach(self.site)
        return self.site.start(
            config,
            self.workload,
            lambda spent_s, line: tell("starting vLLM", spent_s, None),
            lambda spent_s, left: tell(f"waiting for {left} processes of vLLM to end", spent_s, None),
        )

    def _run(self, server: Server, names: Sequence[str], tell: Tell) -> Serving:
        served, started_s = Served(server.endpoint, names, server.models[0], self.vocab_size), time.monotonic()
        tell("asking every adapter", 0.0, None)
        warm_up(served)
        tell("asking every adapter", time.monotonic() - started_s, None)
        progress = _of_load(tell, "warming up", self.warm_up_s)
        rehearse(served, self.workload, self.warm_up_s, seed=self.seed + 1, on_progress=progress)
        progress = _of_load(tell, "measuring", self.workload.horizon_s)
        serving = serve_workload(served, self.workload, seed=self.seed, on_progress=progress)
        server.check()
        result = serving.result
        if not np.any(result.completed & (result.requests.output_tokens > 1)):
            raise ServerError(
                f"{server.url} completed no request of two tokens or more in {self.workload.horizon_s:g} s: "
                "there is nothing to compare; measure for longer"
            )
        return serving

    def _about(self, config: ServerConfig) -> dict[str, object]:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        settings = {name: getattr(config, name) for name in SERVER_COLUMNS}
        place = f"{config.max_loras}_{config.max_cpu_loras}_{config.max_lora_rank}"
        return {"run_id": f"{self.about['set']}/{self.about['scenario']}/{place}/{now}", **self.about, **settings}


def doubts(serving: Serving) -> tuple[str, ...]:
    """Return, in sentences, what makes a run a doubtful measurement of the server."""
    result = serving.result
    found = [f"{count:,} requests failed: {why}" for why, count in result.failures.items()]
    busy = result.cpu_s / result.duration_s
    if busy > _BUSY_CLIENT:
        found.append(f"the client used {busy:.0%} of a core: it may have been slower than the server")
    late = result.lag_s[result.sent] > _LATE_S
    if late.any() and late.mean() > _LATE_SHARE:
        found.append(f"{late.mean():.0%} of the requests were sent over {1e3 * _LATE_S:.0f} ms late")
    if serving.window.missed:
        found.append(f"the server did not answer {serving.window.missed} questions for its metrics")
    return tuple(found)


def _of_load(tell: Tell, stage: str, duration_s: float) -> LoadProgress:
    return lambda elapsed_s, sent, ended: tell(stage, elapsed_s, duration_s)
