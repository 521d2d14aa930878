"""What a twin says of servers that are about to be sent a workload's requests for a while."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.engines import ServerConfig
from lora_capacity.engines.vllm.config import SCHEDULING
from lora_capacity.measurements import is_starved
from lora_capacity.run import TWINS, engine_named, simulate
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios import Scenarios, build_scenarios
from lora_capacity.status import Status
from lora_capacity.workload import Workload
from lora_capacity.workload.requests import Requests

_VARYING = ("max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
_FIXED = ("gpu_memory_utilization", "max_model_len", "block_size", "target_modules", *SCHEDULING)
_STARTED = (Status.OK.label, Status.OUTSIDE_CALIBRATION.label)


@dataclass(frozen=True)
class Outcome:
    """What one configuration does under its traffic, predicted or measured; NaN where that means nothing.

    Attributes:
        status: Label of :class:`~lora_capacity.status.Status`: whether the server starts.
        offered_tokens_per_s: Tokens of the requests that arrived, per second.
        throughput_tokens_per_s: Input plus output tokens of completed requests per second.
        itl_s: Mean inter-token latency, as clients see it, likewise the next two.
        ttft_s: Mean time to first token of the requests that got one.
        tpot_s: Mean over requests of their mean time per output token after the first.
        attainment: Share of arriving requests that keep the workload's bounds.
    """

    status: str
    offered_tokens_per_s: float = math.nan
    throughput_tokens_per_s: float = math.nan
    itl_s: float = math.nan
    ttft_s: float = math.nan
    tpot_s: float = math.nan
    attainment: float = math.nan

    @property
    def starts(self) -> bool:
        """Whether the server starts."""
        return self.status in _STARTED

    @property
    def starved(self) -> bool:
        """Whether throughput is 10 % or more below the offered load; False where unknown."""
        return bool(is_starved(self.throughput_tokens_per_s, self.offered_tokens_per_s))


def predict_outcomes(
    workload: Workload,
    calibration: Calibration,
    servers: Sequence[ServerConfig],
    engine: str = "event",
    *,
    seed: int = 0,
    metrics_interval_s: float = 0.0,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Predict what servers do with the requests of one sample of a workload, from an empty server to its horizon.

    The event twin runs these very requests; the steady twin is given how many they are, and how long on average.

    Args:
        workload: The traffic; its horizon is the time observed.
        calibration: The servers' calibration.
        servers: Their settings; those beyond adapters, slots, rank and batch limits are the same for all.
        engine: Which twin, ``steady`` or ``event``.
        seed: Seed of the sample (`Workload.sample_requests`).
        metrics_interval_s: Time between two readings of the servers' metrics; 0: nobody reads them. Every adapter is
            taken to have been asked before.
        progress: Called with the servers predicted and their total.

    Raises:
        InputError: If the engine is unknown or a setting is not allowed.
    """
    twin = engine_named(engine, TWINS)
    first = servers[0]
    costs = calibration.costs
    warm = dataclasses.replace(costs.front_end, adapter_response_s=0.0, metrics_interval_s=metrics_interval_s)
    calibration = dataclasses.replace(calibration, costs=dataclasses.replace(costs, front_end=warm))
    scenarios = build_scenarios(
        workload,
        calibration,
        adapters=[server.max_cpu_loras for server in servers],
        max_loras=[server.max_loras for server in servers],
        **{name: np.array([getattr(server, name) for server in servers]) for name in _VARYING},
        **{name: getattr(first, name) for name in _FIXED},
    )
    samples = [workload.sample_requests(server.max_cpu_loras, seed) for server in servers]
    if twin.draws_requests:
        results = simulate(calibration, scenarios, workload, engine=engine, seed=seed, progress=progress)
    else:
        sampled = _as_sampled(scenarios, samples)
        results = simulate(calibration, sampled, workload, engine=engine, progress=progress)
    return [
        Outcome(
            status=Status(int(results.status[row])).label,
            offered_tokens_per_s=offered_tokens_per_s(requests, workload.horizon_s),
            throughput_tokens_per_s=float(results.throughput_tokens_per_s[row]),
            itl_s=float(results.client.itl_s[row]),
            tpot_s=float(results.client.tpot_s[row]),
            ttft_s=float(results.client.ttft_s[row]),
            attainment=float(results.attainment[row]),
        )
        for row, requests in enumerate(samples)
    ]


def offered_tokens_per_s(requests: Requests, duration_s: float) -> float:
    """Return the tokens, in and out, of the requests that arrive within a time, per second."""
    came = requests.arrival_s <= duration_s
    return float((requests.input_tokens[came].sum() + requests.output_tokens[came].sum()) / duration_s)


def _as_sampled(scenarios: Scenarios, samples: Sequence[Requests]) -> Scenarios:
    """Return the configurations with as many requests, and as long ones, as were drawn for each."""
    host: Any = scenarios.take(slice(None))
    drawn = np.array([len(requests) for requests in samples])
    host = host.scaled(drawn / (host.requests_per_s * host.horizon_s))
    means = {
        name: np.array([getattr(requests, name).mean() if len(requests) else 1.0 for requests in samples])
        for name in ("input_tokens", "output_tokens")
    }
    sampled: Scenarios = dataclasses.replace(
        host,
        mean_input_tokens=means["input_tokens"].astype(host.mean_input_tokens.dtype),
        mean_output_tokens=means["output_tokens"].astype(host.mean_output_tokens.dtype),
    )
    return sampled
