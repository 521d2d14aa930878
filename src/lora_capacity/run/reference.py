"""Configurations run by the plain-Python reference scheduler, one after the other: slow, to check the twins with."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs, step_time_s
from lora_capacity.run.batches import Observation
from lora_capacity.run.drawn import order_of_loading
from lora_capacity.run.events import Source
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios import Bottleneck, EventDetails, Results, Scenarios, Series
from lora_capacity.twins.clients import seen_by_clients
from lora_capacity.twins.events.kv_cache import usable_blocks
from lora_capacity.twins.events.requests import TICKS, RequestTables
from lora_capacity.twins.reference import Behaviour, Config, Simulation, StepState, simulate
from lora_capacity.workload import BASE_MODEL, Requests

FloatArray = NDArray[np.float64]

_QUANTILES = (0.5, 0.95, 0.99)
"""Quantiles that `EventDetails` tells."""

_step_time_s = jax.jit(step_time_s)


def run_reference(
    calibration: Calibration,
    scenarios: Scenarios,
    source: Source,
    observation: Observation,
    progress: Progress | None,
) -> Results:
    """Run the reference over configurations, under the very requests that the event twin would get.

    Arguments as of `run_events`; there are neither series nor checkpoints.
    """
    host: Any = jax.tree.map(np.asarray, scenarios)
    observation.check(host.horizon_s)
    configs, found = len(host.status), []
    for row in range(configs):
        part = jax.tree.map(lambda values, row=row: values[row : row + 1], host)
        drawn = source.draw(part, [row], np.array([np.iinfo(np.int64).max]))
        one: Any = jax.tree.map(lambda values: values[0], part)
        tables = jax.tree.map(lambda leaf: np.asarray(leaf)[0], drawn.tables)
        found.append(_run_one(calibration, one, tables, drawn.keys[0], observation))
        if progress is not None:
            progress(row + 1, configs)
    widest = max(each.events.adapter_arrived.size for each in found if each.events is not None)

    def joined(*leaves: NDArray[Any]) -> NDArray[Any]:
        return np.stack([np.asarray(leaf) for leaf in leaves])

    return jax.tree.map(joined, *(_with_adapters(each, widest) for each in found))  # type: ignore[no-any-return]


class _StepTime:
    """What steps of one server take, seconds; it remembers which requests decode, since their tokens cost less."""

    def __init__(self, costs: Costs, scenario: Any, loaded: int, rank: NDArray[Any]) -> None:
        self.costs, self.rank = costs, rank
        self.decoding: set[int] = set()
        self.server = {
            "loaded": float(loaded),
            "max_loras": float(scenario.max_loras),
            "max_lora_rank": float(scenario.max_lora_rank),
        }

    def scheduling(self, state: StepState) -> float:
        """Return what the scheduler takes for the requests that it skips."""
        self.decoding -= set(state.preempted)
        return _number(self.costs.step.skipped_request_s) * state.skipped

    def __call__(self, state: StepState) -> float:
        """Return what the device takes for a step, adapter loads included."""
        prefill = sum(tokens for number, tokens in state.scheduled.items() if number not in self.decoding)
        self.decoding |= set(state.sampling)
        compute_s = _step_time_s(
            self.costs,
            tokens=float(state.tokens),
            prefill_tokens=float(prefill),
            kv_tokens=float(state.kv_tokens),
            adapters=float(len(state.adapters)),
            skipped=0.0,
            queued=float(state.waiting),
            **self.server,
        )
        return float(compute_s) + self.load_s(state)

    def load_s(self, state: StepState) -> float:
        """Return what a step's adapter loads take."""
        loads = self.costs.loads
        disk_s = sum(float(loads.disk_s + loads.disk_rank_s * self.rank[adapter]) for adapter in state.disk_loads)
        return _number(loads.host_to_gpu_load_s) * len(state.host_loads) + disk_s


def _run_one(
    calibration: Calibration, scenario: Any, tables: RequestTables, key: Sequence[int], observation: Observation
) -> Results:
    starts = scenario.starts
    requests = _requests(scenario, tables) if starts else Requests(*[np.zeros(0, int)] * 4)
    adapters = int(scenario.class_count.sum())
    room = adapters if scenario.max_cpu_loras is None else int(scenario.max_cpu_loras)
    step_time = _StepTime(calibration.costs, scenario, min(adapters, room), np.asarray(tables.rank))
    config = Config(
        max_num_seqs=int(min(scenario.most_active_seqs, scenario.max_num_batched_tokens)),
        max_num_batched_tokens=int(scenario.max_num_batched_tokens),
        max_loras=int(scenario.max_loras),
        max_cpu_loras=room,
        kv_blocks=int(usable_blocks(scenario.kv_cache_tokens.astype(int), int(scenario.block_size))),
        block_size=int(scenario.block_size),
        watermark_blocks=0 if scenario.watermark_blocks is None else int(scenario.watermark_blocks),
        long_prefill_token_threshold=int(scenario.long_prefill_token_threshold or 0),
        prefix_caching=tables.shared_blocks is not None,
        loaded_at_start=tuple(order_of_loading(adapters, key).tolist()) if scenario.loaded_at_start else (),
        behaviour=Behaviour.of(calibration.behaviour.scheduler),
    )
    simulation = simulate(
        requests,
        config,
        step_time,
        scheduling_time_s=step_time.scheduling,
        max_pending=int(scenario.max_pending) if np.isfinite(scenario.max_pending) else None,
        horizon_s=float(scenario.horizon_s),
    )
    return _summarise(scenario, tables, config, requests, step_time, simulation, observation.warmup_s)


def _number(value: Any) -> float:
    return float(value)


def _requests(scenario: Any, tables: Any) -> Requests:
    """Return the requests of a table, adapters by the order in which a step touches them."""
    arrives, columns = tables.arrival < np.iinfo(np.int32).max, (tables.shared_blocks, tables.cached_tokens)
    adapter, input_tokens, output_tokens = np.asarray(tables.table)[arrives].astype(int).T
    blocks, cached = (np.zeros(arrives.sum(), int) if each is None else each[arrives] for each in columns)
    arrival_s = tables.arrival[arrives] / TICKS * float(scenario.horizon_s)
    adapter = np.where(adapter == tables.rank.size, BASE_MODEL, adapter)
    return Requests(arrival_s, adapter, input_tokens, output_tokens, blocks * int(scenario.block_size), cached)


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of a server, and which part of each is observed; arrays ``[steps]``.

    Attributes:
        states: The steps as scheduled.
        finished: Requests that each finishes.
        begin_s: From when on nothing but its own scheduling kept it waiting.
        end_s: When it ended.
        observed_s: Time of it between warm-up and horizon.
        inside: Whether all of it is.
        loading_s: Part of that which adapter loads took.
        scheduling_s: Part which the scheduler spent on skipped requests.
        total_s: Time between warm-up and horizon, one number.
    """

    states: list[StepState]
    finished: list[tuple[int, ...]]
    begin_s: FloatArray
    end_s: FloatArray
    observed_s: FloatArray
    inside: NDArray[np.bool_]
    loading_s: FloatArray
    scheduling_s: FloatArray
    total_s: float

    @classmethod
    def of(cls, simulation: Simulation, step_time: _StepTime, warmup_s: float, horizon_s: float) -> Self:
        """Cut the steps of a simulation at the warm-up and the horizon."""
        states = [step.state for step in simulation.steps]
        end_s = np.array([step.end_s for step in simulation.steps])
        scheduled_s = np.array([step.scheduled_s for step in simulation.steps])
        start_s = np.array([step.start_s for step in simulation.steps])
        begin_s = np.maximum(scheduled_s, np.append(0.0, end_s)[:-1])
        observed_s = np.maximum(np.minimum(end_s, horizon_s) - np.maximum(begin_s, warmup_s), 0.0)
        loading_s = np.minimum([step_time.load_s(state) for state in states], observed_s)
        return cls(
            states=states,
            finished=[step.finished for step in simulation.steps],
            begin_s=begin_s,
            end_s=end_s,
            observed_s=observed_s,
            inside=(end_s <= horizon_s) & (begin_s >= warmup_s),
            loading_s=loading_s,
            scheduling_s=np.minimum(start_s - begin_s, observed_s - loading_s),
            total_s=horizon_s - warmup_s,
        )

    def column(self, name: str) -> FloatArray:
        """Return a number of each step, or how many there are of something."""
        values = [getattr(state, name) for state in self.states]
        return np.array([len(value) if isinstance(value, tuple) else value for value in values], dtype=float)

    def mean(self, name: str) -> float:
        """Return a mean over the time observed."""
        return float((self.column(name) * self.observed_s).sum() / self.total_s)

    def most(self, name: str) -> float:
        """Return the largest value of the steps inside."""
        return float(self.column(name)[self.inside].max(initial=0))

    def among(self, lists: Iterable[tuple[int, ...]]) -> list[int]:
        """Return the requests that lists of the steps inside name."""
        return [number for each, inside in zip(lists, self.inside, strict=True) if inside for number in each]


@dataclasses.dataclass(frozen=True, eq=False)
class _Answers:
    """The times of the requests, and which of them count; arrays ``[requests]``, times NaN where there is none.

    Attributes:
        ttft_s: Time to first token.
        tpot_s: Mean time per token after it.
        whole_s: Time to the last token.
        begun: Whether the first token comes by the horizon.
        finished: Whether a step inside finishes it.
        streamed: Whether that holds for more than one token without a preemption.
        waited_s: Time that those sent without a first token have waited by the horizon, ``[unanswered]``.
    """

    ttft_s: FloatArray
    tpot_s: FloatArray
    whole_s: FloatArray
    begun: NDArray[np.bool_]
    finished: NDArray[np.bool_]
    streamed: NDArray[np.bool_]
    waited_s: FloatArray

    @classmethod
    def of(cls, requests: Requests, simulation: Simulation, steps: _Steps, horizon_s: float) -> Self:
        """Tell them of a simulation."""
        sent_s, first_s, finished_s = simulation.sent_s, simulation.first_token_s, simulation.finished_s
        number = np.arange(len(requests))
        finished = np.isin(number, steps.among(steps.finished))
        preempted = np.isin(number, [each for state in steps.states for each in state.preempted])
        begun = first_s <= horizon_s
        return cls(
            ttft_s=first_s - sent_s,
            tpot_s=(finished_s - first_s) / np.maximum(requests.output_tokens - 1, 1),
            whole_s=finished_s - sent_s,
            begun=begun,
            finished=finished,
            streamed=finished & ~preempted & (requests.output_tokens > 1),
            waited_s=horizon_s - sent_s[(sent_s < horizon_s) & ~begun],
        )


def _summarise(
    scenario: Any,
    tables: RequestTables,
    config: Config,
    requests: Requests,
    step_time: _StepTime,
    simulation: Simulation,
    warmup_s: float,
) -> Results:
    """Return means as integrals over the observed part of each step, and counts of the steps inside it."""
    horizon_s = float(scenario.horizon_s)
    steps = _Steps.of(simulation, step_time, warmup_s, horizon_s)
    finished, sampled = steps.among(steps.finished), steps.among(state.sampling for state in steps.states)
    first_s = simulation.first_token_s
    streamed_s = np.fmin(simulation.finished_s, horizon_s) - np.maximum(first_s, warmup_s)
    later_tokens = len(sampled) - int(np.isin(first_s, steps.end_s[steps.inside]).sum())
    answers = _Answers.of(requests, simulation, steps, horizon_s)
    observed = answers.begun & (first_s > warmup_s)
    ttft_s, waited_s, tpot_s = answers.ttft_s[observed], answers.waited_s, answers.tpot_s[answers.streamed]
    events = _details(tables, config, requests, simulation, steps, answers, horizon_s) | {
        "quantile_requests": np.array([ttft_s.size + waited_s.size, tpot_s.size, len(finished)], np.int32)
    }
    member = np.sort(tables.class_of[tables.class_of >= 0])[:, np.newaxis] == np.arange(scenario.class_count.size)
    arrived, completed = (
        counts[: len(member)] @ member for counts in (events["adapter_arrived"], events["adapter_completed"])
    )
    offered_per_s = scenario.requests_per_s
    tokens = requests.input_tokens + requests.output_tokens
    numbers: dict[str, Any] = {
        "throughput_tokens_per_s": tokens[finished].sum() / steps.total_s,
        "completed_per_s": len(finished) / steps.total_s,
        "class_service": _ratio(completed, arrived),
        "mean_running": steps.mean("running"),
        "mean_waiting": steps.mean("waiting"),
        "step_time_s": _ratio(steps.observed_s.sum(), steps.inside.sum()),
        "itl_s": _ratio(np.maximum(np.nan_to_num(streamed_s), 0.0).sum(), later_tokens),
        "tpot_s": _ratio(tpot_s.sum(), tpot_s.size),
        "ttft_s": _ratio(ttft_s.sum() + waited_s.sum(), ttft_s.size + waited_s.size),
        "answered_ttft_s": _ratio(ttft_s.sum(), ttft_s.size),
        "active_adapters": steps.mean("adapters"),
        "kv_usage": steps.mean("blocks_used") / config.kv_blocks,
        "loads_per_s": steps.column("host_loads")[steps.inside].sum() / steps.total_s,
    }
    nan = 0.0 if scenario.starts else np.nan
    means: dict[str, Any] = {name: np.asarray(value + nan, np.float32) for name, value in numbers.items()}
    times = {name: value + nan for name, value in events.items() if np.asarray(value).dtype.kind == "f"}
    nothing: Any = [np.zeros(0, np.float32)] * len(dataclasses.fields(Series))
    untold: dict[str, Any] = {entry.name: np.asarray(np.nan, np.float32) for entry in dataclasses.fields(Results)}
    known: dict[str, Any] = {
        "offered_tokens_per_s": offered_per_s * (scenario.mean_input_tokens + scenario.mean_output_tokens),
        "limit": np.asarray(_bottleneck(config, steps.states[-1]) if steps.states else Bottleneck.NONE, np.int32),
        "status": scenario.status,
        "events": EventDetails(
            **events | {name: np.asarray(value, np.float32) for name, value in times.items()}, series=Series(*nothing)
        ),
    }
    results = Results(**untold | means | known)
    client = jax.tree.map(np.asarray, seen_by_clients(step_time.costs.front_end, scenario, results))
    arrived = ((requests.arrival_s >= warmup_s) & (requests.arrival_s < horizon_s)).sum()
    attainment = _attainment(scenario, answers, observed, arrived, client.ttft_s - results.answered_ttft_s)
    told: dict[str, Any] = {"client": client, "attainment": np.asarray(attainment + nan, np.float32)}
    return dataclasses.replace(results, **told)


def _details(
    tables: RequestTables,
    config: Config,
    requests: Requests,
    simulation: Simulation,
    steps: _Steps,
    answers: _Answers,
    horizon_s: float,
) -> dict[str, Any]:
    """Return the fields of `EventDetails` but the series, as if the server started."""
    class_of = tables.class_of
    by_class = np.argsort(np.where(class_of < 0, np.iinfo(np.int32).max, class_of), kind="stable")
    ttft_s, ttft_at_least = _lower_bounds(answers.ttft_s[answers.begun], answers.waited_s)
    e2e_s, e2e_at_least = _lower_bounds(answers.whole_s[answers.finished], answers.waited_s)
    whole = {
        "adapter_arrived": _count(requests.adapter, class_of.size)[by_class],
        "adapter_completed": _count(requests.adapter[~np.isnan(answers.whole_s)], class_of.size)[by_class],
        "unanswered": answers.waited_s.size,
        "max_running": steps.most("running"),
        "max_adapters": steps.most("adapters"),
        "disk_loads": steps.column("disk_loads")[steps.inside].sum(),
        "preemptions": steps.column("preempted").sum(),
        "steps": steps.inside.sum(),
        "iterations": len(steps.states),
    }
    return {
        **{name: np.asarray(value, np.int32) for name, value in whole.items()},
        "ttft_quantiles_s": ttft_s,
        "tpot_quantiles_s": _quantiles(answers.tpot_s[answers.streamed]),
        "e2e_quantiles_s": e2e_s,
        "ttft_at_least": ttft_at_least,
        "e2e_at_least": e2e_at_least,
        "adapter_worst_wait_s": _worst_wait_s(requests, simulation, horizon_s, class_of.size)[by_class],
        "max_kv_usage": np.asarray(steps.most("blocks_used") / config.kv_blocks),
        "compute_share": (steps.observed_s - steps.loading_s).sum() / steps.total_s,
        "scheduling_share": steps.scheduling_s.sum() / steps.total_s,
        "load_share": steps.loading_s.sum() / steps.total_s,
    }


def _attainment(
    scenario: Any, answers: _Answers, observed: NDArray[np.bool_], arrived: int, client_s: Any
) -> NDArray[Any]:
    """Share of arriving requests that keep their bounds; of those still streaming, as many as of the finished ones.

    Args:
        scenario: The configuration.
        answers: The requests' times.
        observed: Whether a request's first token comes in the time observed.
        arrived: Requests that arrive in it.
        client_s: How much later clients see first and last tokens than the engine.
    """
    bounds = None if scenario.bounds is None else scenario.bounds.earlier(np.nan_to_num(client_s))
    max_ttft_s, max_tpot_s, max_e2el_s = (
        (np.inf,) * 3 if bounds is None else (bounds.ttft_s, bounds.tpot_s, bounds.e2el_s)
    )
    prompt = answers.ttft_s <= max_ttft_s
    finished = answers.finished & prompt
    good = finished & (answers.tpot_s <= max_tpot_s) & (answers.whole_s <= max_e2el_s)
    share = _ratio((prompt & observed).sum(), arrived)
    return np.asarray(np.minimum(share, 1.0) * (good.sum() / finished.sum() if finished.any() else 1.0))


def _lower_bounds(times_s: FloatArray, waited_s: FloatArray) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Quantiles with the waits so far of those that still wait, and whether how much longer they will matters."""
    most = np.append(times_s, np.full(waited_s.size, np.inf))
    times_s = np.append(times_s, waited_s)
    ranked = [np.quantile(each, _QUANTILES, method="inverted_cdf") for each in (times_s, most) if each.size]
    return _quantiles(times_s), ranked[1] > ranked[0] if ranked else np.zeros(3, bool)


def _bottleneck(config: Config, last: StepState) -> Bottleneck:
    """Why the requests left in the queue were not admitted to the last step."""
    if last.waiting == 0:
        return Bottleneck.NONE
    if last.tokens == config.max_num_batched_tokens and not last.preempted:
        return Bottleneck.TOKEN_BUDGET
    if last.running >= config.max_num_seqs:
        return Bottleneck.SEQUENCES
    return Bottleneck.SLOTS if last.skipped == last.waiting else Bottleneck.KV_CACHE


def _worst_wait_s(requests: Requests, simulation: Simulation, horizon_s: float, adapters: int) -> NDArray[Any]:
    """Longest time that a request of each adapter has waited for its first admission, or still does."""
    admitted_s = np.full(len(requests), horizon_s)
    for step in reversed(simulation.steps):
        admitted_s[list(step.state.scheduled)] = step.scheduled_s
    worst_s = np.zeros(adapters)
    known = (requests.adapter != BASE_MODEL) & ~np.isnan(simulation.sent_s)
    np.maximum.at(worst_s, requests.adapter[known], (admitted_s - simulation.sent_s)[known])
    return worst_s


def _count(adapter: NDArray[Any], adapters: int) -> NDArray[np.int32]:
    return np.bincount(adapter[adapter != BASE_MODEL], minlength=adapters).astype(np.int32)


def _ratio(value: ArrayLike, by: ArrayLike) -> NDArray[Any]:
    """Divide; NaN where there is nothing to divide by."""
    above, below = np.asarray(value, float), np.asarray(by, float)
    none: FloatArray = np.full(np.broadcast(above, below).shape, np.nan)
    ratio: FloatArray = np.divide(above, below, out=none, where=below > 0)
    return ratio


def _quantiles(times_s: NDArray[Any]) -> NDArray[Any]:
    quantiles: FloatArray = np.quantile(times_s if times_s.size else [np.nan], _QUANTILES)
    return quantiles


def _with_adapters(results: Results, adapters: int) -> Results:
    """Fill what is told by adapter up to a number of adapters."""
    details: Any = results.events
    names = ("adapter_arrived", "adapter_completed", "adapter_worst_wait_s")
    wider = {name: np.pad(getattr(details, name), (0, adapters - getattr(details, name).size)) for name in names}
    filled: Results = dataclasses.replace(results, events=dataclasses.replace(details, **wider))
    return filled
