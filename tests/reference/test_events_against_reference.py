"""The event twin against the reference scheduler, step by step, on workloads that hypothesis makes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_capacity.engines import SchedulerRules, VllmBehaviour
from lora_capacity.run.compiled import build_server as build_compiled
from lora_capacity.run.requests import pack_requests
from lora_capacity.scenarios import Scenarios
from lora_capacity.twins.compiled import Server, simulate_server
from lora_capacity.twins.events import RequestTables, simulate_events
from lora_capacity.twins.events import state as engine
from lora_capacity.twins.events.asynchronous import step_times
from lora_capacity.twins.events.fast_forward import fast_forward
from lora_capacity.twins.events.server import build_server
from lora_capacity.twins.events.simulation import initial_state, iterate
from lora_capacity.twins.events.step import step_work
from lora_capacity.twins.reference import Behaviour, Config, Simulation, StepState, simulate
from lora_capacity.workload import BASE_MODEL, Requests
from tests.examples import compiled_once, make_costs

ADAPTERS, LONGEST, LONGEST_PREFIX, ITERATIONS = 6, 48, 8, 2400
HORIZON_S = 1024.0
TICK_S = HORIZON_S / 2**30

# Multiples of a tick, so that both clocks are exact.
BASE, TOKEN, PREFILL, KV, ADAPTER, PASSED, WAITING, LISTED, HOST, DISK = 20000, 40, 30, 1, 300, 7, 11, 13, 5000, 9000
COSTS = make_costs(
    base_s=TICK_S * BASE,
    token_s=TICK_S * TOKEN,
    prefill_token_s=TICK_S * PREFILL,
    kv_token_s=TICK_S * KV,
    adapter_s=TICK_S * ADAPTER,
    skipped_request_s=TICK_S * PASSED,
    queued_request_s=TICK_S * WAITING,
    lora_listing_s=TICK_S * LISTED,
    host_to_gpu_load_s=TICK_S * HOST,
    disk_rank_s=TICK_S * DISK / 8,
)


VERSIONS = ("0.8.5", "0.14", "0.26", "0.32", "0.33")
RULES = {version: VllmBehaviour.for_version(version).scheduler for version in VERSIONS}
RULES["0.32 on a CPU"] = VllmBehaviour.for_version("0.32", "cpu").scheduler


class Row(NamedTuple):
    """One step; all whole numbers, times in ticks."""

    end: int
    tokens: int
    prefill_tokens: int
    kv_tokens: int
    running: int
    waiting: int
    skipped: int
    blocks: int
    adapters: int
    host_loads: int
    disk_loads: int
    preempted: int
    finished: int


class StepTime:
    """Duration of the reference's steps; keeps the prefill tokens of each."""

    def __init__(self) -> None:
        self.decoding: set[int] = set()
        self.prefill: list[int] = []

    def scheduling(self, state: StepState) -> float:
        self.decoding -= set(state.preempted)
        return PASSED * state.skipped * TICK_S

    def __call__(self, state: StepState) -> float:
        prefill = sum(tokens for number, tokens in state.scheduled.items() if number not in self.decoding)
        self.decoding |= set(state.sampling)
        self.prefill.append(prefill)
        ticks = BASE + TOKEN * state.tokens + PREFILL * prefill + KV * state.kv_tokens + ADAPTER * len(state.adapters)
        ticks += WAITING * state.waiting + LISTED * ADAPTERS * len(state.adapters)
        ticks += HOST * len(state.host_loads) + DISK * len(state.disk_loads)
        return ticks * TICK_S


@st.composite
def workloads(
    draw: st.DrawFn,
    rules: SchedulerRules,
    block_size: int = 16,
    caching: bool = False,
    thresholds: Sequence[int] = (0,),
) -> tuple[Requests, Config, int | None]:
    """Few requests, few slots, little memory: what is rare in a real server happens in most of these."""
    count = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    longest_prompt = draw(st.sampled_from([4, 20, 60, 120]))
    longest_output = draw(st.sampled_from([1, 5, 20, LONGEST]))
    span = draw(st.sampled_from([1, 2**16, 2**20, 2**22]))
    requests = Requests(
        np.sort(rng.integers(span, size=count)) * TICK_S,
        rng.integers(BASE_MODEL if draw(st.booleans()) else 0, draw(st.integers(1, ADAPTERS)), size=count),
        rng.integers(1, longest_prompt + 1, size=count),
        rng.integers(1, longest_output + 1, size=count),
    )
    tokens = draw(st.sampled_from([16, 40, 100, 500]))
    needed = int((requests.input_tokens + requests.output_tokens).max() + block_size - 2) // block_size
    config = Config(
        max_num_seqs=draw(st.sampled_from([1, 3, 8, 16])),
        max_num_batched_tokens=tokens,
        max_loras=draw(st.integers(1, ADAPTERS)),
        max_cpu_loras=ADAPTERS,
        kv_blocks=max(needed, 1) + draw(st.sampled_from([0, 1, 3, 8, 100])),
        watermark_blocks=draw(st.sampled_from([0, 0, 1, 3])),
        long_prefill_token_threshold=draw(st.sampled_from(thresholds)),
        behaviour=Behaviour.of(rules),
        block_size=block_size,
        prefix_caching=caching,
    )
    if caching:
        share = rng.choice([0.0, 0.6, 1.0], ADAPTERS + 1)[requests.adapter]
        most = rng.choice([block_size, 3 * block_size, LONGEST_PREFIX * block_size])
        shared = np.minimum(share * requests.input_tokens, most).astype(int)
        requests = replace(requests, shared_prefix_tokens=np.minimum(shared, requests.input_tokens - 1))
    return requests, config, draw(st.sampled_from([None, None, 3, 10]))


def played(requests: Requests, config: Config, max_pending: int | None) -> tuple[list[Row], Simulation]:
    step_time_s = StepTime()
    result = simulate(
        requests,
        config,
        step_time_s,
        scheduling_time_s=step_time_s.scheduling,
        max_pending=max_pending,
        horizon_s=HORIZON_S,
    )
    rows = [
        Row(
            end=round(step.end_s / TICK_S),
            tokens=step.state.tokens,
            prefill_tokens=prefill,
            kv_tokens=step.state.kv_tokens,
            running=step.state.running,
            waiting=step.state.waiting,
            skipped=step.state.skipped,
            blocks=step.state.blocks_used,
            adapters=len(step.state.adapters),
            host_loads=len(step.state.host_loads),
            disk_loads=len(step.state.disk_loads),
            preempted=len(step.state.preempted),
            finished=len(step.finished),
        )
        for step, prefill in zip(result.steps, step_time_s.prefill, strict=True)
    ]
    return rows, result


def laid_out(requests: Requests, config: Config, max_pending: int | None) -> tuple[Scenarios, RequestTables]:
    numbers = {
        "base_rate_per_s": 0.0,
        "mean_input_tokens": 1.0,
        "mean_output_tokens": 1.0,
        "kv_tokens_per_request": 1.0,
        "horizon_s": HORIZON_S,
        "max_pending": np.inf if max_pending is None else max_pending,
        "max_loras": config.max_loras,
        "max_lora_rank": 8.0,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "kv_cache_tokens": (config.kv_blocks + 1) * config.block_size,
        "block_size": config.block_size,
        "watermark_blocks": config.watermark_blocks,
    }
    if config.long_prefill_token_threshold:
        numbers["long_prefill_token_threshold"] = config.long_prefill_token_threshold
    scenarios = Scenarios(
        class_count=jnp.array([[float(ADAPTERS)]]),
        class_rate_per_s=jnp.ones((1, 1)),
        class_rank=jnp.full((1, 1), 8.0),
        status=jnp.zeros(1, jnp.int32),
        **{name: jnp.array([value]) for name, value in numbers.items()},
    )
    own = [np.zeros(ADAPTERS, dtype=int)]
    room = LONGEST_PREFIX if config.prefix_caching else 0
    tables = pack_requests(scenarios, [requests], own, seed=None, longest_prefix=room)
    return scenarios, replace(tables, longest_output=LONGEST)


Iterations = Callable[[Scenarios, RequestTables], tuple[Any, engine.State]]


@cache
def iterations(rules: SchedulerRules, block_size: int, forwards: bool) -> Iterations:
    """Return what tells what stood ready before each iteration, and the state after the last."""

    def iterations_of(scenarios: Scenarios, tables: RequestTables) -> tuple[Any, engine.State]:
        scenario, own = jax.tree.map(lambda leaf: leaf[0], (scenarios, tables))
        server = build_server(COSTS, scenario, own, rules=rules, block_size=block_size)

        def iteration(state: engine.State, _: None) -> tuple[engine.State, Any]:
            work = step_work(server, state)
            seen = (
                state.mode == engine.RUN,
                step_times(server, state, work).end,
                work,
                state.batch.running,
                state.waiting,
                server.kv_blocks - state.kv.free,
                state.statistics.counts[engine.PREEMPTIONS],
                state.calendar[state.step & (state.calendar.shape[0] - 1), engine.LEAVING],
            )
            state = iterate(server, state)
            return fast_forward(server, state) if forwards else state, seen

        state, seen = jax.lax.scan(iteration, initial_state(server, scenario.status, block_size), length=ITERATIONS)
        return seen, state

    return compiled_once(iterations_of)


def twin_rows(
    scenarios: Scenarios, tables: RequestTables, rules: SchedulerRules, block_size: int = 16
) -> tuple[list[Row], Any]:
    seen, state = iterations(rules, block_size, False)(scenarios, tables)
    ready, end, work, running, waiting, blocks, preemptions, finished = jax.tree.map(np.asarray, seen)
    assert state.mode == engine.DONE
    assert not state.overflow
    at = np.flatnonzero(ready)
    before = np.concatenate([[0], preemptions[at]])
    rows = [
        Row(
            *map(
                int,
                (
                    end[i],
                    work.tokens[i],
                    work.prefill_tokens[i],
                    work.kv_tokens[i],
                    running[i],
                    waiting[i],
                    work.skipped[i],
                    blocks[i],
                    work.adapters[i],
                    work.host_loads[i],
                    work.disk_loads[i],
                    preemptions[i] - before[j],
                    finished[i],
                ),
            )
        )
        for j, i in enumerate(at)
        if work.tokens[i] > 0
    ]
    return rows, state


def compiled_server(
    scenarios: Scenarios, tables: RequestTables, rules: SchedulerRules, host: int = ADAPTERS, rows: int = 0
) -> Server:
    """Return a server that the twin for processors has run, with so many adapters in host memory."""
    scenario, own = jax.tree.map(lambda leaf: np.asarray(leaf)[0], (scenarios, tables))
    server = build_compiled(COSTS, scenario, own, rules, rows=rows)
    server.numbers["max_cpu_loras"] = host
    assert simulate_server(server)
    return server


def rows_of(server: Server) -> list[Row]:
    """Return the steps that it has written down."""
    rows = server.rows[: server.numbers[0]["rows"]]
    return [
        Row(round(row["end_s"] / TICK_S), *(int(row[name]) for name in Row._fields if name != "end")) for row in rows
    ]


@pytest.mark.parametrize("version", RULES)
@settings(max_examples=100)
@given(st.data())
def test_same_steps_on_processors(version: str, data: st.DataObject) -> None:
    size, caching = data.draw(st.sampled_from([1, 16, 32, 48, 128])), data.draw(st.booleans())
    thresholds = (0,) if caching else (0, 1, 7, 16, 50)
    requests, config, max_pending = data.draw(workloads(RULES[version], size, caching, thresholds))
    case = requests, replace(config, max_cpu_loras=data.draw(st.integers(config.max_loras, ADAPTERS))), max_pending
    expected, result = played(*case)
    server = compiled_server(*laid_out(*case), RULES[version], case[1].max_cpu_loras, 4 * ITERATIONS)
    rows = rows_of(server)
    for i, (row, right) in enumerate(zip(rows, expected, strict=False)):
        assert row == right, f"step {i}"
    assert len(rows) == len(expected)
    assert int(server.adapters["completed"].sum()) == len(case[0])
    delays = result.first_token_s - result.sent_s
    assert int(server.histograms[0].sum()) == delays.size
    assert float(server.totals[0]["ttft_s"]) == pytest.approx(delays.sum(), rel=1e-9)
    # Steps that are written down are run one by one, others several at a time.
    forwarded = compiled_server(*laid_out(*case), RULES[version], case[1].max_cpu_loras)
    for name in set(server.totals.dtype.names) - {"iterations"}:
        assert float(forwarded.totals[0][name]) == pytest.approx(float(server.totals[0][name]), rel=1e-9), name
    np.testing.assert_array_equal(forwarded.histograms, server.histograms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "block_size"), [("0.8.5", 128), ("0.14", 16), ("0.26", 1), ("0.32 on a CPU", 16), ("0.33", 48)]
)
@settings(max_examples=60)
@given(st.data())
def test_same_steps(version: str, block_size: int, data: st.DataObject) -> None:
    """Each takes long to compile: together they have every rule on and off, and blocks of every kind of size.

    On CPUs vLLM's blocks hold 128 tokens; hybrid models have sizes that are no power of two.
    """
    case = data.draw(workloads(RULES[version], block_size))
    expected, result = played(*case)
    rows, state = twin_rows(*laid_out(*case), RULES[version], block_size)
    for i, (row, right) in enumerate(zip(rows, expected, strict=False)):
        assert row == right, f"step {i}"
    assert len(rows) == len(expected)
    assert int(state.batch.completed) == len(case[0])
    delays = result.first_token_s - result.sent_s
    assert int(state.statistics.histogram[: engine.BINS].sum()) == delays.size
    assert float(state.statistics.sums[engine.TTFT]) == pytest.approx(delays.sum(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "block_size"), [("0.14", 16), ("0.33", 32)])
@settings(max_examples=60)
@given(st.data())
def test_same_steps_with_prefix_caching(version: str, block_size: int, data: st.DataObject) -> None:
    case = data.draw(workloads(RULES[version], block_size, caching=True))
    expected, _ = played(*case)
    rows, _ = twin_rows(*laid_out(*case), RULES[version], block_size)
    for i, (row, right) in enumerate(zip(rows, expected, strict=False)):
        assert row == right, f"step {i}"
    assert len(rows) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("version", [version for version in RULES if not RULES[version].async_scheduling])
@settings(max_examples=30)
@given(st.data())
def test_quiet_steps_change_the_same_whether_skipped_or_not(version: str, data: st.DataObject) -> None:
    case = laid_out(*data.draw(workloads(RULES[version])))
    (every, state), (fewer, skipped) = (iterations(RULES[version], 16, forwards)(*case) for forwards in (False, True))
    every_step, fewer_steps = (int(np.asarray(seen[0]).sum()) for seen in (every, fewer))
    assert fewer_steps <= every_step
    compared = {
        "": ("now", "step"),
        "batch": ("completed",),
        "kv": ("free", "tokens"),
        "statistics": ("counts", "most", "histogram", "worst_wait", "bottleneck"),
    }
    for group, names in compared.items():
        left, right = (getattr(end, group) if group else end for end in (skipped, state))
        for name in names:
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    np.testing.assert_allclose(skipped.statistics.sums, state.statistics.sums, rtol=1e-5)


@pytest.mark.slow  # what it runs is compiled for the slow tests above
def test_quiet_steps_are_skipped() -> None:
    one = Requests(np.zeros(1), np.zeros(1, dtype=int), np.full(1, 10), np.full(1, 41))
    config = Config(max_num_seqs=8, max_num_batched_tokens=100, max_loras=2, max_cpu_loras=ADAPTERS, kv_blocks=30)
    case = laid_out(one, config, None)
    (every, _), (fewer, state) = (iterations(RULES["0.8.5"], 16, forwards)(*case) for forwards in (False, True))
    assert int(state.statistics.counts[engine.STEPS]) == int(np.asarray(every[0]).sum()) == 41
    assert int(np.asarray(fewer[0]).sum()) < 12


@pytest.mark.slow  # of use to the slow tests above
@pytest.mark.parametrize("version", ["0.8.5", "0.14"])
def test_the_cases_are_what_they_should_be(version: str) -> None:
    """That preemption, passing over, cut prompts and evictions really occur in workloads of this kind."""
    seen, finished_and_preempted = np.zeros(5, dtype=int), 0

    @settings(max_examples=300, database=None)
    @given(workloads(RULES[version]))
    def collect(case: tuple[Requests, Config, int | None]) -> None:
        nonlocal finished_and_preempted
        rows, result = played(*case)
        finished_and_preempted += any(
            set(before.finished) & set(step.state.preempted) for before, step in pairwise(result.steps)
        )
        seen[:] += [
            any(row.preempted for row in rows),
            any(row.skipped for row in rows),
            any(row.tokens == case[1].max_num_batched_tokens for row in rows),
            any(row.host_loads > row.disk_loads for row in rows),
            any(row.host_loads > row.adapters - before.adapters + 1 for before, row in pairwise(rows)),
        ]

    collect()
    assert np.all(seen >= 5), seen
    assert (finished_and_preempted > 0) == RULES[version].async_scheduling


def test_results_are_sums_over_the_steps() -> None:
    rng = np.random.default_rng(3)
    requests = Requests(
        np.sort(rng.integers(2**22, size=40)) * TICK_S,
        rng.integers(0, ADAPTERS, size=40),
        rng.integers(1, 100, size=40),
        rng.integers(1, LONGEST, size=40),
    )
    config = Config(max_num_seqs=8, max_num_batched_tokens=100, max_loras=2, max_cpu_loras=ADAPTERS, kv_blocks=30)
    rows, result = played(requests, replace(config, behaviour=Behaviour()), None)
    scenarios, tables = laid_out(requests, config, None)
    found = compiled_once(simulate_events)(COSTS, scenarios, tables)
    starts = np.array([step.start_s / TICK_S - PASSED * step.state.skipped for step in result.steps])
    seconds = (np.array([row.end for row in rows]) - starts) * TICK_S
    assert float(found.completed_per_s[0] * HORIZON_S) == pytest.approx(40)
    np.testing.assert_array_equal(
        found.events.adapter_completed[0, :ADAPTERS], np.bincount(requests.adapter, minlength=ADAPTERS)
    )
    np.testing.assert_array_equal(found.events.adapter_arrived[0], found.events.adapter_completed[0])
    assert int(found.events.steps[0]) == len(rows)
    for name, column in (("mean_running", "running"), ("mean_waiting", "waiting"), ("active_adapters", "adapters")):
        integral = sum(getattr(row, column) * dt for row, dt in zip(rows, seconds, strict=True))
        assert float(getattr(found, name)[0] * HORIZON_S) == pytest.approx(integral, rel=1e-5), name
    tokens = requests.output_tokens.astype(float)
    gaps = (result.finished_s - result.first_token_s).sum() / (tokens - 1).sum()
    assert float(found.itl_s[0]) == pytest.approx(gaps, rel=1e-5)
    assert float(found.ttft_s[0]) == pytest.approx(np.mean(result.first_token_s - result.sent_s), rel=1e-5)
    assert int(found.events.preemptions[0]) == sum(row.preempted for row in rows) > 0
    first_steps = [next(i for i, step in enumerate(result.steps) if n in step.state.scheduled) for n in range(40)]
    waited_s = starts[first_steps] * TICK_S
    worst_s = np.zeros(ADAPTERS)
    np.maximum.at(worst_s, requests.adapter, waited_s - result.sent_s)
    np.testing.assert_allclose(found.events.adapter_worst_wait_s[0, :ADAPTERS], worst_s, rtol=1e-6)
    assert int(found.events.max_running[0]) == max(row.running for row in rows)
    assert int(found.events.max_adapters[0]) == max(row.adapters for row in rows)
    assert float(found.events.max_kv_usage[0]) == pytest.approx(max(row.blocks for row in rows) / 30)
    assert float(found.events.compute_share[0] + found.events.load_share[0]) == pytest.approx(
        seconds.sum() / HORIZON_S, rel=1e-5
    )
